# ruff: noqa: E402, I001
import signal
import subprocess
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import ppo
import probes  # noqa: F401 (registers the environments)


def pytest_configure(config):
    marker = "upstream: true of this ppo.py alone; a fork leaves it out with -m 'not upstream'"
    config.addinivalue_line("markers", marker)


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    """Every test runs where its runs/ harm nobody."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # to which main adds the folder


@pytest.fixture(autouse=True)
def restored_handlers():
    """What main does to its process, it must not do to that of the tests."""
    handlers = {number: signal.getsignal(number) for number in ppo.SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    ppo.STOP.clear()


@pytest.fixture
def command(monkeypatch, capsys):
    """Does what a command line says, in this process; returns exit code and output.

    An exception that main does not catch, which Python would print, is raised.
    """

    def execute(*flags):
        monkeypatch.setattr(sys, "argv", ["ppo.py", *flags])
        capsys.readouterr()  # what was printed before
        code = 0
        try:
            ppo.main()
        except SystemExit as end:
            code = end.code
        return subprocess.CompletedProcess(flags, code, *capsys.readouterr())

    return execute
