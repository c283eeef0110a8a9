"""Environments that fail, to be had as `--env-id failing:ValueError-v0`, for example."""

import builtins
import multiprocessing
import os
import time

import gymnasium as gym
import numpy as np
from gymnasium import spaces

ERRORS = ("AssertionError", "FloatingPointError", "ImportError", "KeyError", "OSError")
ERRORS += ("RuntimeError", "TypeError", "ValueError", "ZeroDivisionError")


class Failing(gym.Env):
    """Raises an exception of its own, in the constructor unless `where` says otherwise."""

    observation_space = spaces.Box(-1, 1, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, error, where="constructor"):
        self.error = error
        self.where = where
        self.steps = 0
        self.fail("constructor")

    def fail(self, where):
        if where == self.where:
            raise getattr(builtins, self.error)("the motor is on fire")

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.fail("reset")
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        obs = np.zeros(1, np.float32)
        if self.steps >= 9:
            self.fail("step")
        if self.steps >= 10:
            self.fail("step after a nan")
        if self.steps == 9 and self.where == "step after a nan":
            obs = obs + np.float32("nan")
        return obs, 1.0, False, False, {}


class Stuck(Failing):
    """For two workers: in the same step the first dies, and the second takes very long."""

    def __init__(self):
        super().__init__(error="OSError", where="nowhere")

    def step(self, action):
        if self.steps == 8:
            first = multiprocessing.current_process().name.endswith("-0")
            os._exit(3) if first else time.sleep(1000)
        return super().step(action)


class Exploding(Failing):
    """The reward of the eighth step is infinite, and the observation after the ninth a nan."""

    def __init__(self):
        super().__init__(error="OSError", where="nowhere")

    def step(self, action):
        obs, reward, *ends = super().step(action)
        if self.steps == 8:
            reward = float("inf")
        if self.steps == 9:
            obs = obs + np.float32("nan")
        return obs, reward, *ends


class SecondError(Failing):
    """Raises an exception in its ninth step, in the second process of torchrun alone."""

    def __init__(self):
        second = os.environ.get("RANK") == "1"
        super().__init__(error="OSError", where="step" if second else "nowhere")


class SecondNan(Failing):
    """Observes a nan after its ninth step, in the second process of torchrun alone."""

    def __init__(self):
        super().__init__(error="OSError", where="nowhere")

    def step(self, action):
        obs, *rest = super().step(action)
        if self.steps == 9 and os.environ.get("RANK") == "1":
            obs = obs + np.float32("nan")
        return obs, *rest


for name in ERRORS:
    gym.register(f"{name}-v0", Failing, kwargs={"error": name}, disable_env_checker=True)
gym.register("SecondError-v0", SecondError, disable_env_checker=True)
gym.register("SecondNan-v0", SecondNan, disable_env_checker=True)
gym.register("Stuck-v0", Stuck, disable_env_checker=True)
gym.register("Exploding-v0", Exploding, disable_env_checker=True)
