"""Environments whose right answers are known, registered on import: `--env-id probes:Name-v0`."""

import random

import gymnasium as gym
import numpy as np
from gymnasium import spaces

SEEDS = []  # every seed that a Counting environment of this process was reset with


class Probe(gym.Env):
    observation_space = spaces.Box(-1, 1, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observe(), {}

    def observe(self):
        return np.zeros(1, np.float32)


class Constant(Probe):
    """One step, reward 1: V = 1."""

    def step(self, action):
        return self.observe(), 1.0, True, False, {}


class Delay(Probe):
    """Two steps, observations 0 and 1, reward 1 at the end: V(0) = gamma, V(1) = 1."""

    def observe(self):
        return np.array([self.t], np.float32)

    def step(self, action):
        self.t += 1
        return self.observe(), float(self.t == 2), self.t == 2, False, {}


class Choice(Probe):
    """One step, reward 1 for action 1 and -1 for action 0."""

    def step(self, action):
        return self.observe(), 1.0 if action == 1 else -1.0, True, False, {}


class Match(Probe):
    """One step, reward 1 for the action that the observation asks for, else -1."""

    def observe(self):
        self.wanted = self.np_random.integers(2)
        return np.array([2 * self.wanted - 1], np.float32)

    def step(self, action):
        reward = 1.0 if action == self.wanted else -1.0
        return self.observe(), reward, True, False, {}


class Sign(Match):
    """One step, a random sign as observation and reward: V(s) = s."""

    def step(self, action):
        reward = 2.0 * self.wanted - 1
        return self.observe(), reward, True, False, {}


class Forever(Probe):
    """Reward 1 for ever; registered with a time limit of 10 steps. V = 1 / (1 - gamma)."""

    def step(self, action):
        return self.observe(), 1.0, False, False, {}


class Counting(gym.Env):
    """Observations (environment, episode, step), so that every row can be told from every other.

    Episode e lasts LENGTHS[e % 5] steps and ends as ENDS[e % 3] says; its rewards are distinct.
    """

    LENGTHS = (3, 1, 4, 2, 7)
    ENDS = ("terminated", "truncated", "both")
    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            SEEDS.append(seed)
            self.name, self.episode = self.np_random.integers(1, 10_000), -1
        self.episode, self.t, self.over = self.episode + 1, 0, False
        return self.observe(), {}

    def observe(self):
        return np.array([self.name, self.episode, self.t], np.float32)

    def step(self, action):
        assert not self.over, "stepped after its end"
        self.t += 1
        self.over = self.t == self.LENGTHS[self.episode % 5]
        end = self.ENDS[self.episode % 3] if self.over else ""
        terminated = end in ("terminated", "both")
        truncated = end in ("truncated", "both")
        return self.observe(), self.reward(self.episode, self.t), terminated, truncated, {}

    @staticmethod
    def reward(episode, t):
        return np.sin(episode + 0.1 * t)


class Spaces(Probe):
    """Random observations of any space; insists on actions that are in its action space."""

    def __init__(self, observation_space=None, action_space=None, real=False):
        self.observation_space = observation_space or spaces.Box(-5, 20, (3,), np.float64)
        default = spaces.Box(-1, 1, (1,)) if real else spaces.Discrete(2)
        self.action_space = action_space or default

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.observation_space.seed(seed)
        return super().reset(seed=seed)

    def observe(self):
        return self.observation_space.sample()

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        ends = self.np_random.random(2) < (0.1, 0.05)
        return self.observe(), 1.0, bool(ends[0]), bool(ends[1]), {}


class Copy(Spaces):
    """One step in which the action should equal the observation, in the space of that kind."""

    SPACES = {  # noqa: RUF012
        "discrete": spaces.Discrete(4, start=3),
        "multidiscrete": spaces.MultiDiscrete([3, 2, 4], start=[1, 0, -2]),
        "multibinary": spaces.MultiBinary(4),
        "box": spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 10.0], np.float32)),
    }

    def __init__(self, kind):
        super().__init__(self.SPACES[kind], self.SPACES[kind])

    def observe(self):
        self.wanted = self.observation_space.sample()
        return self.wanted

    def step(self, action):
        wanted = self.wanted
        obs, _, _, _, info = super().step(action)
        if isinstance(self.action_space, spaces.Box):
            size = self.action_space.high - self.action_space.low
            reward = -np.square((action - wanted) / size).sum()
        else:
            reward = np.mean(np.asarray(action) == wanted)
        return obs, float(reward), True, False, info


class Noisy(Probe):
    """Draws from the generators of random and numpy as well as from its own; never ends."""

    def observe(self):
        numbers = random.random(), np.random.random(), self.np_random.random()  # noqa: NPY002
        return np.array([sum(numbers)], np.float32)

    def step(self, action):
        return self.observe(), random.random(), False, False, {}


class RiseAndFall(Probe):
    """Episodes of one step, whose return rises until an environment's 600th and falls again."""

    count = 0

    def step(self, action):
        self.count += 1
        return self.observe(), -abs(600.0 - self.count), True, False, {}


class Dice(Probe):
    """One step, whose reward is thrown at the reset."""

    rewards = []  # of all episodes of this process  # noqa: RUF012

    def observe(self):
        self.reward = float(self.np_random.integers(-1000, 1000))
        self.rewards.append(self.reward)
        return np.zeros(1, np.float32)

    def step(self, action):
        return np.zeros(1, np.float32), self.reward, True, False, {}


class Shifted(Match):
    """Match, with observations in the units of another world: 497 and 503."""

    observation_space = spaces.Box(0, 1000, (1,), np.float32)

    def observe(self):
        return 500 + 3 * super().observe()


class SameStep(gym.vector.VectorEnv):
    """A vector environment with the wrong autoreset mode."""

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}  # noqa: RUF012
    single_observation_space, single_action_space = spaces.Box(-1, 1, (1,)), spaces.Discrete(2)

    def __init__(self, num_envs):
        self.num_envs = num_envs


PLAIN = [Constant, Delay, Choice, Match, Sign, Counting, Spaces, Copy, RiseAndFall, Dice, Shifted]
LIMITED = {"Forever": (Forever, 10), "Endless": (Forever, None), "Noisy": (Noisy, 10)}
LIMITED |= {x.__name__: (x, None) for x in PLAIN}
for name, (entry_point, limit) in LIMITED.items():
    gym.register(f"{name}-v0", entry_point, max_episode_steps=limit, disable_env_checker=True)
gym.register("SameStep-v0", Constant, vector_entry_point=SameStep)
native = "gymnasium.envs.classic_control.cartpole:CartPoleVectorEnv"
gym.register("Native-v0", vector_entry_point=native)
