"""Runs ppo.py with the flags after the first argument, and kills it where that says: `step:137`.

step: before that step of the environments; opened: when that file is opened to be written, and
empty; fsync, replace: before that call, while a checkpoint is written; replaced: after that call;
update: before that gradient is computed. full: after that replacement the disk is full.
"""

import builtins
import os
import resource
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import gymnasium as gym
import torch
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from tensorboard.summary.writer.record_writer import RecordWriter

import ppo


def at_call(owner, name, count, action, after=False, counts=lambda *args: True):
    """Act before a call, or after it: that one of those that count."""
    calls = 0
    original = getattr(owner, name)

    def wrapped(*args, **kwargs):
        nonlocal calls
        calls += counts(*args)
        now = calls == count and counts(*args)
        if now and not after:
            action()
        result = original(*args, **kwargs)
        if now and after:
            action()
        return result

    setattr(owner, name, wrapped)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def fill_the_disk():
    """From now on no file may grow beyond 40 kB, which every checkpoint does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))


def writes_a_checkpoint(file, mode="r", *_):
    return "checkpoint.pt" in str(file) and "w" in mode


def write_slowly(self, data, original=RecordWriter.write):
    """As a disk does that is busy: what is not waited for is lost in a kill."""
    time.sleep(0.005)
    original(self, data)


RecordWriter.write = write_slowly
where, *sys.argv[1:] = sys.argv[1:]
kind, _, number = where.partition(":")
count = int(number or 0)
if kind == "step":
    for vector_env in (gym.vector.SyncVectorEnv, gym.vector.AsyncVectorEnv, CartPoleVectorEnv):
        at_call(vector_env, "step", count, kill)
elif kind in ("fsync", "replace"):
    at_call(os, kind, count, kill)
elif kind == "opened":
    at_call(builtins, "open", count, kill, after=True, counts=writes_a_checkpoint)
elif kind == "replaced":
    at_call(os, "replace", count, kill, after=True)
elif kind == "update":
    at_call(torch.Tensor, "backward", count, kill)
elif kind == "full":
    at_call(os, "replace", count, fill_the_disk, after=True)
ppo.main()
