"""Environments that a fork solves and ppo.py does not, registered on import: `tasks:Name-v0`."""

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class Cue(gym.Env):
    """The first of six observations shows which action the last one asks for."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        self.wanted = self.np_random.integers(2)
        return np.array([2 * self.wanted - 1, 0], np.float32), {}

    def step(self, action):
        reward = 0.0
        if self.t == 5:
            reward = 1.0 if action == self.wanted else -1.0
        self.t += 1
        return np.array([0, self.t == 5], np.float32), reward, self.t == 6, False, {}


class Masked(gym.Env):
    """Of twelve actions two are allowed, others are no actions; the larger one is rewarded.

    At the end, when nothing can be done any more, none is.
    """

    observation_space = spaces.Box(0, 1, (12,), np.float32)
    action_space = spaces.Discrete(12)

    def observe(self):
        self.mask = np.zeros(12, np.int8)
        if self.t < 4:
            self.mask[self.np_random.choice(12, 2, replace=False)] = 1
        return self.mask.astype(np.float32), {"action_mask": self.mask, "other": object()}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observe()

    def step(self, action):
        if not self.mask[action]:
            raise AssertionError("this action is not allowed")
        reward = float(action == np.flatnonzero(self.mask)[1])
        self.t += 1
        obs, info = self.observe()
        return obs, reward, self.t == 4, False, info


class Both(gym.Env):
    """Whether the image is bright and what the vector says decide together on the right action."""

    observation_space = spaces.Dict(
        {"eye": spaces.Box(0, 255, (40, 40), np.uint8), "sign": spaces.Box(-1, 1, (1,), np.float32)}
    )
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.bits = self.np_random.integers(2, size=2)
        eye = np.full((40, 40), 200 * self.bits[0], np.uint8)
        return {"eye": eye, "sign": np.float32([2 * self.bits[1] - 1])}, {}

    def step(self, action):
        reward = float(action == self.bits.sum() % 2)
        return self.reset()[0], reward, True, False, {}


class Chain(gym.Env):
    """A line of 16 places. In each, one of five actions leads on, and the others back to the start.

    Only the last place, where the episode ends, has a reward.
    """

    observation_space = spaces.Box(0, 1, (16,), np.float32)
    action_space = spaces.Discrete(5)
    onward = np.random.default_rng(0).integers(5, size=16)

    def observe(self):
        return np.eye(16, dtype=np.float32)[self.place]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = 0
        return self.observe(), {}

    def step(self, action):
        self.place = self.place + 1 if action == self.onward[self.place] else 0
        is_last = self.place == 15
        return self.observe(), float(is_last), is_last, False, {}


gym.register("Cue-v0", Cue, disable_env_checker=True)
gym.register("Masked-v0", Masked, disable_env_checker=True)
gym.register("Both-v0", Both, disable_env_checker=True)
gym.register("Chain-v0", Chain, max_episode_steps=50, disable_env_checker=True)
