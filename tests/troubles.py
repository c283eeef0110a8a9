"""Environments as people have them, which made trouble: `--env-id troubles:Name-v0`."""

import json
import os
import sys

import gymnasium as gym
import numpy as np
import probes
import torch
from gymnasium import spaces


class Meddling(probes.Match):
    """Does something to its process, in the constructor, every reset or every step.

    Episodes of three steps, whose rewards are tiny.
    """

    def __init__(self, what="nothing", where="constructor"):
        self.what = what
        self.where = where
        self.meddle("constructor")

    def meddle(self, where):
        if where != self.where:
            return
        if self.what == "folder":
            os.makedirs("elsewhere", exist_ok=True)
            os.chdir("elsewhere")
        if self.what == "gradients":
            torch.set_grad_enabled(False)
        if self.what == "dtype":
            torch.set_default_dtype(torch.float64)
        if self.what == "numpy":
            np.seterr(all="raise")
        if self.what == "exit":
            sys.exit()
        if self.what == "exit 3":
            sys.exit(3)

    def reset(self, *, seed=None, options=None):
        self.meddle("reset")
        return super().reset(seed=seed, options=options)

    def step(self, action):
        self.meddle("step")
        self.t += 1
        obs, reward, *_ = super().step(action)
        return obs, 1e-20 * reward, self.t == 3, False, {}


class Odd(probes.Match):
    """Returns rewards and infos of a kind; each environment of a process has a number."""

    count = 0

    def __init__(self, reward="number", info="none"):
        self.reward = reward
        self.info = info
        self.number = Odd.count
        Odd.count += 1

    def step(self, action):
        obs, reward, *ends, _ = super().step(action)
        if self.reward == "array":
            reward = np.array([reward])
        if self.reward == "vector":
            reward = np.array([reward, 1.0])
        infos = {
            "none": [{}, {}],
            "None and a number": [{"x": 1}, {"x": None}],
            "a string and a number": [{"x": 0.5}, {"x": "far"}],
            "lengths": [{"x": np.zeros(2)}, {"x": np.zeros(3)}],
            "deep": [{"x": 3}, {"x": {"y": np.zeros((2, 2))}}],
        }
        return obs, reward, *ends, infos[self.info][self.number % 2]


class Offset(probes.Probe):
    """`steps` steps of a reward: the offset, and 1 more for the best action."""

    def __init__(self, offset, steps=1, best=1):
        self.offset = offset
        self.steps = steps
        self.best = best

    def observe(self):
        return np.array([self.t], np.float32)

    def step(self, action):
        self.t += 1
        reward = self.offset + float(action == self.best)
        return self.observe(), reward, self.t == self.steps, False, {}


class Quadratic(probes.Probe):
    """One step that costs 100 + 5 |a - 0.7|^2, in two dimensions."""

    action_space = spaces.Box(-1, 1, (2,), np.float32)

    def observe(self):
        return np.zeros(1, np.float32)

    def step(self, action):
        cost = 100 + 5 * np.square(action - 0.7).sum()
        return self.observe(), -float(cost), True, False, {}


class Above(probes.Probe):
    """One step, whose action has a lower bound of 5 alone, and is best at 8."""

    action_space = spaces.Box(5, np.inf, (1,), np.float32)

    def observe(self):
        return np.zeros(1, np.float32)

    def step(self, action):
        return self.observe(), -float(abs(action[0] - 8)), True, False, {}


class UnixTime(probes.Match):
    """Tells the time beside what matters, in seconds since 1970, which float32 cannot."""

    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)

    def observe(self):
        return np.array([1e5, super().observe()[0], 1.7e9 + self.t], np.float32)


class Connecting(probes.Match):
    """Connects in `reset`, and cannot close what is not connected."""

    def reset(self, *, seed=None, options=None):
        self.connection = "open"
        return super().reset(seed=seed, options=options)

    def close(self):
        del self.connection


class Disconnected(probes.Match):
    """Cannot close at all, or ends the process then."""

    def __init__(self, exits=False):
        self.exits = exits

    def close(self):
        if self.exits:
            sys.exit()
        raise ConnectionError("the simulator is gone")


class Whole(gym.vector.VectorEnv):
    """A vector version of its own: whole numbers where flags are meant, and a `close` of its own.

    Episodes of three steps, of which the observation is the number.
    """

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}  # noqa: RUF012
    single_observation_space = spaces.Box(0, 3, (1,), np.float32)
    single_action_space = spaces.Discrete(2)
    closed_count = 0

    def __init__(self, num_envs):
        self.num_envs = num_envs

    def reset(self, *, seed=None, options=None):
        self.t = np.zeros(self.num_envs, int)
        return self.t[:, None].astype(np.float32), {}

    def step(self, actions):
        self.t = np.where(self.t == 3, 0, self.t + 1)
        reward = (self.t > 0).astype(np.float64)
        terminated = (self.t == 3).astype(np.int64)
        return self.t[:, None].astype(np.float32), reward, terminated, 0 * terminated, {}

    def close(self):
        Whole.closed_count += 1


class Mission(spaces.Space):
    """A space that Gymnasium does not know, as MiniGrid has one."""

    def __init__(self):
        super().__init__((), str)

    def sample(self, mask=None, probability=None):
        return "go"


class MissionEnv(probes.Probe):
    """Observes a mission beside numbers."""

    observation_space = spaces.Dict(mission=Mission(), x=spaces.Box(-1, 1, (1,)))

    def observe(self):
        return self.observation_space.sample()


class Buggy(probes.Match):
    """Its constructor has a bug, of which an argument is no cause."""

    def __init__(self, size=1, bug="key"):
        if bug == "key":
            {}["x"]
        if bug == "json":
            json.loads(bug)
        if bug == "type":
            self.size = None + 1
        assert bug != "assertion"


class Grey(probes.Film):
    """Renders what is no RGB image."""

    def __init__(self, render_mode=None, kind="grey"):
        super().__init__(render_mode)
        self.kind = kind

    def render(self):
        frame = super().render()
        return {"grey": frame[:, :, 0], "four": np.zeros((8, 8, 4), np.uint8), "none": None}[
            self.kind
        ]


class Small(probes.Match):
    """Returns of 0.955 of their wanted action and 0.955e-9 else, or the same, huge."""

    def __init__(self, factor=1.0):
        self.factor = factor

    def step(self, action):
        obs, _, *rest = super().step(0)
        return obs, 0.9554321 * self.factor, *rest


class Wide(probes.Match):
    observation_space = spaces.Discrete(6000)

    def observe(self):
        super().observe()
        return int(self.wanted)


for name, entry_point in {
    "Meddling": Meddling,
    "Odd": Odd,
    "Offset": Offset,
    "Quadratic": Quadratic,
    "Above": Above,
    "UnixTime": UnixTime,
    "Connecting": Connecting,
    "Disconnected": Disconnected,
    "Mission": MissionEnv,
    "Buggy": Buggy,
    "Grey": Grey,
    "Small": Small,
    "Wide": Wide,
}.items():
    gym.register(f"{name}-v0", entry_point, disable_env_checker=True)
gym.register("Whole-v0", vector_entry_point=Whole)
