"""Runs ppo.py with the flags after the first argument, and kills it where that says: `step:137`.

step: before that step of the environments; fsync, replace: before that call, while a checkpoint is
written; replaced: after that call; never: not at all.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import gymnasium as gym

import ppo


def kill_at_call(owner, name, count, after=False):
    """Kill the process before or after that call of a function of its owner."""
    calls = 0
    original = getattr(owner, name)

    def wrapped(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == count and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if calls == count and after:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, wrapped)


where, *sys.argv[1:] = sys.argv[1:]
kind, _, number = where.partition(":")
if kind != "never":
    owner = gym.vector.SyncVectorEnv if kind == "step" else os
    kill_at_call(owner, kind.removesuffix("d"), int(number), after=kind == "replaced")
ppo.main()
