"""Environments that go wrong, or are odd, to be had as `--env-id failing:Failing-v0`."""

import builtins
import multiprocessing
import os
import time
from contextlib import suppress
from pathlib import Path

import gymnasium as gym
import numpy as np
import probes
from gymnasium import spaces


class Failing(probes.Match):
    """Does what `what` says, in its ninth step if `where` does not name another place.

    `what` is the name of an exception, "nan" (as observation), "inf" (as reward) or "death" (of the
    first worker; others sleep). Where there is a RANK, only the one that `rank` names does it.
    """

    def __init__(self, what="KeyError", where=9, rank=None):
        self.what = what
        self.where = where if rank in (None, os.environ.get("RANK")) else "nowhere"
        self.steps = 0
        self.fail_if("constructor")

    def fail_if(self, where):
        if where == self.where and self.what == "death":
            first = multiprocessing.current_process().name.endswith("-0")
            os._exit(3) if first else time.sleep(1000)
        if where == self.where and self.what not in ("nan", "inf"):
            raise getattr(builtins, self.what)("the motor is on fire")

    def reset(self, *, seed=None, options=None):
        self.fail_if("reset")
        return super().reset(seed=seed, options=options)

    def step(self, action):
        self.steps += 1
        self.fail_if(self.steps)
        obs, reward, *ends = super().step(action)
        if self.steps == self.where and self.what == "nan":
            obs = obs * np.float32("nan")
        if self.steps == self.where and self.what == "inf":
            reward = float("inf")
        return obs, reward, *ends


class Stuck(probes.Match):
    """Swallows every exception in its steps, and does not come back from that of number `after`.

    All steps of a process count. A file called stuck appears when it is.
    """

    count = 0

    def __init__(self, after):
        self.after = after

    def step(self, action):
        Stuck.count += 1
        while Stuck.count > self.after:
            Path("stuck").touch()
            with suppress(BaseException):
                time.sleep(0.01)
        return super().step(action)


class Stopping(probes.Match):
    """Sends a signal to the process of its run, in a step that `where` numbers, or elsewhere.

    The first environment to get there does, once. Whatever Python makes of that is swallowed.
    """

    sent = False

    def __init__(self, number, where):
        self.number = number
        self.where = where
        self.count = 0
        self.send_if("constructor")

    def send_if(self, where):
        if where == self.where and not Stopping.sent:
            Stopping.sent = True
            with suppress(BaseException):
                os.kill(os.getpid(), self.number)

    def reset(self, *, seed=None, options=None):
        self.send_if("reset")
        return super().reset(seed=seed, options=options)

    def step(self, action):
        self.count += 1
        self.send_if(self.count)
        return super().step(action)


class Human(probes.Match):
    """Can be watched, and not be filmed, which it says in the way of `style`."""

    metadata = {"render_modes": ["human"], "render_fps": 30}  # noqa: RUF012

    def __init__(self, style, render_mode=None):
        assert style != "asserts" or render_mode in (None, "human"), "render_mode must be human"
        if style != "ignores":
            self.render_mode = render_mode
        else:
            self.metadata = {}


class Mission(spaces.Space):
    """A space that Gymnasium does not know, as MiniGrid has one."""

    def __init__(self):
        super().__init__((), str)

    def sample(self, mask=None, probability=None):
        return "go"


class Unusable(probes.Match):
    """Has spaces that cannot be trained on."""

    SPACES = {  # noqa: RUF012
        "sequence": ("observation_space", spaces.Sequence(spaces.Discrete(3))),
        "mission": ("observation_space", spaces.Dict(mission=Mission(), x=spaces.Box(-1, 1, (1,)))),
        "image beside": (
            "observation_space",
            spaces.Dict(x=spaces.Box(-1, 1, (1,)), eye=spaces.Box(0, 255, (40, 40, 3), np.uint8)),
        ),
        "tuple": ("action_space", spaces.Tuple([spaces.Discrete(2)])),
    }

    def __init__(self, kind):
        name, space = self.SPACES[kind]
        setattr(self, name, space)


class SomethingTimeLimit(gym.Wrapper):
    """Is called so, and has neither a limit nor a counter that could be set."""


for entry_point in (Failing, Stuck, Stopping, Human, Unusable):
    gym.register(f"{entry_point.__name__}-v0", entry_point, disable_env_checker=True)
gym.register("Wrapped-v0", lambda: SomethingTimeLimit(probes.Forever()), disable_env_checker=True)
for name, kwargs in {
    "SecondError": {"what": "OSError", "rank": "1"},
    "SecondNan": {"what": "nan", "rank": "1"},
    "Bug": {"where": "constructor"},
}.items():
    gym.register(f"{name}-v0", Failing, kwargs=kwargs, disable_env_checker=True)
