"""Environments whose right answers are known, registered on import: `--env-id probes:Name-v0`."""

import os
import random
import subprocess

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces

SEEDS = []  # every seed that a Counting environment of this process was reset with


class Probe(gym.Env):
    observation_space = spaces.Box(-1, 1, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observe(), {}


class Constant(Probe):
    """One step, reward 1: V = 1."""

    def observe(self):
        return np.zeros(1, np.float32)

    def step(self, action):
        return self.observe(), 1.0, True, False, {}


class Sign(Probe):
    """One step, a random sign as observation and reward: V(s) = s."""

    def observe(self):
        self.sign = np.float32(self.np_random.choice([-1, 1]))
        return np.array([self.sign])

    def step(self, action):
        sign = self.sign
        return self.observe(), float(sign), True, False, {}


class Delay(Probe):
    """Two steps, observations 0 and 1, reward 1 at the end: V(0) = gamma, V(1) = 1."""

    def observe(self):
        return np.array([self.t], np.float32)

    def step(self, action):
        self.t += 1
        return self.observe(), float(self.t == 2), self.t == 2, False, {}


class Choice(Probe):
    """One step, reward 1 for action 1 and -1 for action 0."""

    def observe(self):
        return np.zeros(1, np.float32)

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


class Forever(Probe):
    """Reward 1 for ever; registered with a time limit of 10 steps. V = 1 / (1 - gamma)."""

    def observe(self):
        return np.zeros(1, np.float32)

    def step(self, action):
        return self.observe(), 1.0, False, False, {}


class Expiring(Forever):
    """Reward 1 for 10 steps, after which the episode terminates, which no observation tells."""

    def step(self, action):
        self.t += 1
        return self.observe(), 1.0, self.t == 10, False, {}


class Clock(Delay):
    """Delay, in which time passes: 1/16 of a second a step, and 1,000 seconds a reset by seed."""

    seconds = 0.0  # since the start, of all such environments of this process

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            Clock.seconds += 1000
        return super().reset(seed=seed, options=options)

    def step(self, action):
        Clock.seconds += 1 / 16
        return super().step(action)


class Reseeding(Probe):
    """Episodes of 5 steps; seeds the global generators, always alike, when the argument says so."""

    actions = []  # of all such environments of this process, in order  # noqa: RUF012

    def __init__(self, when="never"):
        self.when = when
        self.seed_globals("init")

    def seed_globals(self, now):
        if now == self.when:
            random.seed(0)
            np.random.seed(0)  # noqa: NPY002
            torch.manual_seed(0)

    def reset(self, *, seed=None, options=None):
        self.seed_globals("reset")
        return super().reset(seed=seed, options=options)

    def observe(self):
        return self.np_random.uniform(-1, 1, 1).astype(np.float32)

    def step(self, action):
        self.seed_globals("step")
        self.actions.append(int(action))
        self.t += 1
        return self.observe(), float(action), self.t == 5, False, {}


class Copy(gym.Env):
    """One step in which the action should equal the observation, in the space of that kind."""

    SPACES = {  # noqa: RUF012
        "discrete": spaces.Discrete(4, start=3),
        "multidiscrete": spaces.MultiDiscrete([3, 2, 4], start=[1, 0, -2]),
        "multibinary": spaces.MultiBinary(4),
        "box": spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 10.0], np.float32)),
    }

    def __init__(self, kind):
        self.action_space = self.SPACES[kind]
        self.observation_space = self.SPACES[kind]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.wanted = self.observation_space.sample()
        return self.wanted, {}

    def step(self, action):
        assert self.action_space.contains(action), action
        if isinstance(self.action_space, spaces.Box):
            size = self.action_space.high - self.action_space.low
            reward = -np.square((action - self.wanted) / size).sum()
        else:
            reward = np.mean(np.asarray(action) == self.wanted)
        return self.wanted, float(reward), True, False, {}


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


class Spaces(gym.Env):
    """Random observations of any space; insists on actions that are in its action space."""

    def __init__(self, observation_space=None, action_space=None, real=False):
        self.observation_space = observation_space or spaces.Box(-5, 20, (3,), np.float64)
        default = spaces.Box(-1, 1, (1,)) if real else spaces.Discrete(2)
        self.action_space = action_space or default

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        ends = self.np_random.random(2) < (0.1, 0.05)
        return self.observation_space.sample(), 1.0, bool(ends[0]), bool(ends[1]), {}


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

    def observe(self):
        return np.zeros(1, np.float32)

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


class Nuisance(Probe):
    """Makes it hard to stop: by a child process, which it ends when it is closed."""

    def __init__(self, kind):
        self.kind = kind
        if kind == "child":
            self.child = subprocess.Popen(["sleep", "1000"])

    def observe(self):
        return np.zeros(1, np.float32)

    def step(self, action):
        self.t += 1
        return self.observe(), 1.0, False, self.t == 10, {}

    def close(self):
        if self.kind == "child":
            self.child.kill()
            self.child.wait()


class Film(Probe):
    """Never ends, and shows noise, which takes long to encode."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def observe(self):
        return np.zeros(1, np.float32)

    def step(self, action):
        return self.observe(), 1.0, False, False, {}

    def render(self):
        return np.random.default_rng(0).integers(256, size=(240, 320, 3), dtype=np.uint8)


class OddError(Exception):
    """Cannot be made anew from its message alone."""

    def __init__(self, a, b):
        super().__init__(a + b)


class Faulty(Probe):
    """Goes wrong in its 40th step, in the way that `fault` says, or cannot be used at all."""

    def __init__(self, fault="none", size=1):
        self.fault, self.steps = fault, 0
        if fault == "refusal":
            raise ValueError(f"size {size} is too small")
        if fault == "observation space":
            self.observation_space = spaces.Sequence(spaces.Discrete(3))
        if fault == "action space":
            self.action_space = spaces.Tuple([spaces.Discrete(2)])
        if fault == "action":
            self.action_space = spaces.Box(-np.inf, np.inf, (1,))

    def reset(self, *, seed=None, options=None):
        self.seed = self.seed if seed is None else seed
        return super().reset(seed=seed, options=options)

    def observe(self):
        return np.zeros(1, np.float32)

    def step(self, action):
        self.steps += 1
        obs, reward = self.observe(), 1.0
        if self.steps >= 40:
            if self.fault == "obs":
                obs = obs + np.float32("nan")
            if self.fault == "reward":
                reward = float("inf")
            after_nan = self.fault == "exception after nan" and self.steps > 40
            if self.fault == "exception" or after_nan:
                raise RuntimeError("the motor is on fire")
            if self.fault == "exception after nan":
                obs = obs + np.float32("nan")
            if self.fault == "death" and self.seed % 4 == 0:
                os._exit(3)
            if self.fault == "odd exception":
                raise OddError("two", "arguments")
        return obs, reward, False, self.steps % 20 == 0, {}


class SameStep(gym.vector.VectorEnv):
    """A vector environment with the wrong autoreset mode."""

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}  # noqa: RUF012
    single_observation_space, single_action_space = spaces.Box(-1, 1, (1,)), spaces.Discrete(2)

    def __init__(self, num_envs):
        self.num_envs = num_envs


for name, entry_point, limit in [
    ("Constant", Constant, None),
    ("Sign", Sign, None),
    ("Delay", Delay, None),
    ("Choice", Choice, None),
    ("Match", Match, None),
    ("Forever", Forever, 10),
    ("Copy", Copy, None),
    ("Counting", Counting, None),
    ("Spaces", Spaces, None),
    ("Faulty", Faulty, None),
    ("Noisy", Noisy, 10),
    ("Nuisance", Nuisance, None),
    ("Film", Film, None),
    ("LongFilm", Film, 10_000),
    ("Dice", Dice, None),
    ("Shifted", Shifted, None),
    ("Endless", Forever, None),
    ("RiseAndFall", RiseAndFall, None),
    ("Expiring", Expiring, None),
    ("Clock", Clock, None),
    ("Reseeding", Reseeding, None),
]:
    gym.register(f"{name}-v0", entry_point, max_episode_steps=limit, disable_env_checker=True)
gym.register("SameStep-v0", Constant, vector_entry_point=SameStep)
native = "gymnasium.envs.classic_control.cartpole:CartPoleVectorEnv"
gym.register("Native-v0", vector_entry_point=native)
