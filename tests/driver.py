"""Runs ppo.py with the flags after the first argument, and kills it where that says, as in `step:137`.

step: before that step of the environments; opened: when that file is opened to be written, and empty;
fsync, replace: before that call, while a checkpoint is written; replaced: after that call; update: before
that minibatch. full: after that replacement the disk is full.
"""

import os
import resource
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import gymnasium as gym
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from tensorboard.summary.writer.record_writer import RecordWriter

import ppo


def at_call(owner, name, count, action, after=False):
    calls, original = [], getattr(owner, name)

    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == count and not after:
            action()
        result = original(*args, **kwargs)
        if len(calls) == count and after:
            action()
        return result

    setattr(owner, name, wrapped)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def fill_the_disk():
    """From now on no file may grow beyond 40 kB, which every checkpoint does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))


def write_slowly(self, data, original=RecordWriter.write):
    """As a disk does that is busy: what is not waited for is lost in a kill."""
    time.sleep(0.005)
    original(self, data)


RecordWriter.write = write_slowly
where, *sys.argv[1:] = sys.argv[1:]
kind, _, count = where.partition(":")
if kind == "step":
    for vector_env in (gym.vector.SyncVectorEnv, gym.vector.AsyncVectorEnv, CartPoleVectorEnv):
        at_call(vector_env, "step", int(count), kill)
elif kind in ("fsync", "replace"):
    at_call(os, kind, int(count), kill)
elif kind == "opened":
    opened = []

    def open_(*args, original=open):
        file = original(*args)
        if args[1:] == ("wb",) and "checkpoint.pt" in args[0]:
            opened.append(1)
            if len(opened) == int(count):
                kill()
        return file

    ppo.open = open_
elif kind == "replaced":
    at_call(os, "replace", int(count), kill, after=True)
elif kind == "update":
    at_call(ppo, "ppo_loss", int(count), kill)
elif kind == "full":
    at_call(os, "replace", int(count), fill_the_disk, after=True)
ppo.main()
