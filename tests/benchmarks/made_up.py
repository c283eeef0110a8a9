"""An environment for speed.py whose step costs next to nothing, or as many ms as wanted."""

import time

import gymnasium as gym
import numpy as np


class MadeUp(gym.Env):
    """Observations from a table, a reward to guess, `work` ms of processor time in each step."""

    def __init__(self, size=128, actions=16, work=0.0):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size,))
        self.action_space = gym.spaces.Discrete(actions)
        self.table = np.random.default_rng(0).normal(size=(256, size)).astype(np.float32)
        self.work, self.count = work, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return self.table[0], {}

    def step(self, action):
        if self.work:
            end = time.thread_time() + self.work / 1000
            while time.thread_time() < end:
                pass
        self.count += 1
        return (
            self.table[self.count % 256],
            float(action == self.count % 2),
            self.count == 200,
            False,
            {},
        )


gym.register("MadeUp-v0", MadeUp)
