"""The promises about the file itself."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_length_and_licence():
    lines = (ROOT / "ppo.py").read_text().splitlines()
    assert lines[0] == "# SPDX-License-Identifier: MIT"
    assert len(lines) <= 700
    assert max(map(len, lines)) <= 110


def test_ruff():
    for command in (["check"], ["format", "--check"]):
        result = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--no-cache", "."],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stdout


def test_requirements_are_pinned():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert [line.split("==")[0] for line in lines] == ["torch", "gymnasium", "numpy", "tyro", "tensorboard"]
    assert "torch==2.13.0" in lines
