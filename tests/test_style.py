"""The promises about the file itself: what it costs to read it."""

import ast
import io
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.upstream

ROOT = Path(__file__).parent.parent
CODE = (ROOT / "ppo.py").read_text()

# Promised to readers.
MAX_COLUMNS = 100
MAX_TOKENS_PER_LINE = 10.0
MAX_COMPLEXITY = 10

# The lengths that the file has reached. Who adds a feature that is worth them raises these, and
# who has found lines to do without lowers them.
MAX_LINES_OF_PPO = 914
MAX_LINES = 2127


def test_licence():
    assert CODE.splitlines()[0] == "# SPDX-License-Identifier: MIT"


def test_columns():
    assert max(map(len, CODE.splitlines())) <= MAX_COLUMNS


def test_lines():
    lines = CODE.splitlines()
    assert len(lines) <= MAX_LINES
    (banner,) = [i for i, line in enumerate(lines, 1) if "nothing below is PPO" in line]
    assert banner <= MAX_LINES_OF_PPO


def density(code):
    """Tokens on a line of code, on the mean: without comments, docstrings and ends of lines.

    A string in brackets that runs over three lines is one token on three lines.
    """
    documented = set()
    for node in ast.walk(ast.parse(code)):
        match node:
            case ast.Expr(value=ast.Constant(value=str())):
                documented |= set(range(node.lineno, node.end_lineno + 1))
    layout = {"COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENCODING", "ENDMARKER"}
    count = 0
    lines = set()
    depth = 0  # within f-strings, of which Python 3.12 makes several tokens and 3.11 one
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        kind = tokenize.tok_name[token.type]
        if kind in layout or token.start[0] in documented:
            continue
        lines |= set(range(token.start[0], token.end[0] + 1))
        if kind.endswith("STRING_END"):
            depth -= 1
        elif depth == 0:
            count += 1
        if kind.endswith("STRING_START"):
            depth += 1
    return count / len(lines)


def test_density():
    assert density(CODE) <= MAX_TOKENS_PER_LINE


def test_density_is_counted_right():
    assert density("x = 1  # one\n\n# two\n") == 3
    assert density('"""Docstring\nof two lines."""\n\nx = 1\ny = f(x)\n') == (3 + 6) / 2
    assert density('def f():\n    """One line."""\n    return f"{1 + 1} is two"\n') == (5 + 2) / 2
    assert density("x = [\n    1,\n]\n") == (3 + 2 + 1) / 3


def tricks(code):
    """Lines that hold more than a reader takes in at once, and what it is: [(line, what)]."""
    found = []
    tree = ast.parse(code)
    arguments = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            arguments += [*node.args, *(keyword.value for keyword in node.keywords)]
        if isinstance(node, ast.Assign) and len(node.targets) > 1:
            found.append((node.lineno, "chained assignment"))
    for argument in arguments:
        for node in ast.walk(argument):
            if isinstance(node, ast.NamedExpr):
                found.append((node.lineno, "walrus in an argument"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Lambda) and not any(node is x for x in arguments):
            found.append((node.lineno, "lambda that is no argument"))
    return sorted(set(found))


def test_one_thing_a_line():
    assert tricks(CODE) == []


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("f(x := 1)", "walrus in an argument"),
        ("f(1, key=[(x := 1) + 1])", "walrus in an argument"),
        ("a = b = 1", "chained assignment"),
        ("a[0] = b = 1", "chained assignment"),
        ("f = lambda: 1", "lambda that is no argument"),
        ("f({'a': lambda: 1})", "lambda that is no argument"),
        ("f(lambda: 1, key=lambda x: x)", None),
        ("a, b = 1, 2", None),
        ("if (x := 1) > 0: pass", None),
    ],
)
def test_what_is_a_trick(line, what):
    assert tricks(f"\n{line}\n") == ([(2, what)] if what else [])


def ruff(*arguments):
    command = [sys.executable, "-m", "ruff", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff(command):
    result = ruff(*command, "--no-cache", ".")
    assert result.returncode == 0, result.stdout


def test_ruff_holds_the_promises():
    """Its rules are on, and no line of the file is excepted from them."""
    settings = tomllib.loads((ROOT / ".ruff.toml").read_text())
    assert settings["line-length"] <= MAX_COLUMNS
    assert settings["lint"]["mccabe"]["max-complexity"] <= MAX_COMPLEXITY
    assert {"E", "C90", "PLW2901"} <= set(settings["lint"]["select"])
    rules = ["--select=C901,PLW2901,E501", "--ignore-noqa"]
    result = ruff("check", "--no-cache", *rules, "ppo.py")
    assert result.returncode == 0, result.stdout


def test_requirements_are_pinned():
    lines = (ROOT / "requirements.txt").read_text().split()
    names = [line.split("==")[0] for line in lines]
    assert names == ["torch", "gymnasium", "numpy", "tyro", "tensorboard"]
    assert "torch==2.13.0" in lines
