"""The promises about the files themselves: what it costs to read them."""

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

# Not to be raised: a feature takes out as many lines as it puts in.
LIMITS = {
    "lines": 1250,
    "line of the banner": 660,
    "functions and classes at the top level": 55,
    "names of part II that part I uses": 14,
    "tokens on a line of code": 10.0,
    "columns": 100,
}
MAX_COMPLEXITY = 10
MAX_LINES_OF_TESTS = 5000
MAX_LINES_OF_README = 170


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


def names_from_below(code, banner):
    """The names that are defined at the top level below a line and used above it."""
    below = set()
    for node in ast.parse(code).body:
        if node.lineno > banner:
            match node:
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                    below.add(name)
                case ast.Assign() | ast.AnnAssign():
                    below |= {x.id for x in ast.walk(node) if is_name(x, ast.Store)}
    used = {x.id for x in ast.walk(ast.parse(code)) if is_name(x, ast.Load) and x.lineno < banner}
    return below & used


def is_name(node, context):
    return isinstance(node, ast.Name) and isinstance(node.ctx, context)


def shape(code):
    """What a file costs its reader, as LIMITS has it."""
    lines = code.splitlines()
    (banner,) = [i for i, line in enumerate(lines, 1) if "nothing below is PPO" in line]
    top = [x for x in ast.parse(code).body if isinstance(x, ast.FunctionDef | ast.ClassDef)]
    return {
        "lines": len(lines),
        "line of the banner": banner,
        "functions and classes at the top level": len(top),
        "names of part II that part I uses": len(names_from_below(code, banner)),
        "tokens on a line of code": density(code),
        "columns": max(map(len, lines)),
    }


@pytest.mark.parametrize("name", LIMITS)
def test_shape(name):
    assert shape(CODE)[name] <= LIMITS[name]


def tricks(code):
    """Lines that hold more than a reader takes in at once: [(line, what it is)]."""
    found = []
    tree = ast.parse(code)
    arguments = []
    for node in ast.walk(tree):
        match node:
            case ast.Call(args=args, keywords=keywords):
                arguments += [*args, *(keyword.value for keyword in keywords)]
            case ast.Assign(targets=[_, _, *_]):
                found.append((node.lineno, "chained assignment"))
            case ast.Assign(targets=[ast.Tuple()], value=ast.Tuple()):
                found.append((node.lineno, "two assignments"))
    for argument in arguments:
        for node in ast.walk(argument):
            if isinstance(node, ast.NamedExpr):
                found.append((node.lineno, "walrus in an argument"))
    return sorted(set(found))


def test_one_thing_a_line():
    assert tricks(CODE) == []


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
    assert settings["line-length"] <= LIMITS["columns"]
    assert settings["lint"]["mccabe"]["max-complexity"] <= MAX_COMPLEXITY
    assert {"E", "C90", "PLW2901"} <= set(settings["lint"]["select"])
    rules = ["--select=C901,PLW2901,E501", "--ignore-noqa"]
    result = ruff("check", "--no-cache", *rules, "ppo.py")
    assert result.returncode == 0, result.stdout


def test_tests_and_readme_are_short():
    files = (ROOT / "tests").glob("*.py")
    assert sum(len(path.read_text().splitlines()) for path in files) <= MAX_LINES_OF_TESTS
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= MAX_LINES_OF_README
    assert max(map(len, lines)) <= LIMITS["columns"]


def test_licence_and_requirements():
    assert CODE.splitlines()[0] == "# SPDX-License-Identifier: MIT"
    lines = (ROOT / "requirements.txt").read_text().split()
    names = [line.split("==")[0] for line in lines]
    assert names == ["torch", "gymnasium", "numpy", "tyro", "tensorboard"]
    assert "torch==2.13.0" in lines
