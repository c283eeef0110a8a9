# ruff: noqa: E402, I001
import signal
import sys
import threading
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import ppo
import probes  # noqa: F401 (registers the environments)


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    """Every test runs where its runs/ harm nobody."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def restored_handlers():
    """What main does to its process, it must not do to that of the tests."""
    signals = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    hook = threading.excepthook
    yield
    for number, handler in signals.items():
        signal.signal(number, handler)
    threading.excepthook = hook


@pytest.fixture
def updates(monkeypatch):
    """What reaches the loss while the test trains: (minibatch, clip_coef, info) of every call, in order."""
    calls, original = [], ppo.ppo_loss

    def ppo_loss(agent, minibatch, args, clip_coef):
        loss, info = original(agent, minibatch, args, clip_coef)
        calls.append((ppo.Minibatch(*(x.clone() for x in minibatch)), clip_coef, dict(info)))
        return loss, info

    monkeypatch.setattr(ppo, "ppo_loss", ppo_loss)
    return calls
