# ruff: noqa: E402, I001
import signal
import subprocess
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import ppo
import probes  # noqa: F401 (registers the environments)


def pytest_configure(config):
    marker = "upstream: true of this ppo.py alone; a fork leaves it out with -m 'not upstream'"
    config.addinivalue_line("markers", marker)
    # The processes of pytest-xdist have no main program, whose name ends what ppo.py prints.
    vars(sys.modules["__main__"]).setdefault("__file__", pytest.__file__)


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    """Every test runs where its runs/ harm nobody."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def restored_handlers():
    """What main does to its process, it must not do to that of the tests."""
    handlers = {number: signal.getsignal(number) for number in ppo.SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    ppo.EXIT_CODES.clear()


@contextmanager
def shown_warnings():
    """Python's own way with warnings, of which pytest has another: they go to stderr."""

    def show(message, category, filename, lineno, file=None, line=None):
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))

    with warnings.catch_warnings():
        warnings.resetwarnings()
        for category in (DeprecationWarning, PendingDeprecationWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)
        warnings.showwarning = show
        yield


@pytest.fixture
def command(monkeypatch, capsys):
    """Does what a command line says, in this process; returns exit code and output."""

    def execute(*flags):
        monkeypatch.setattr(sys, "argv", ["ppo.py", *flags])
        capsys.readouterr()  # what was printed before
        code = 0
        try:
            with shown_warnings():
                ppo.main()
        except SystemExit as end:
            code = end.code
        return subprocess.CompletedProcess(flags, code, *capsys.readouterr())

    return execute
