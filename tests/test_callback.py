"""What a callback of `train` can do: end the training, and change its environments."""

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pieces
import pytest
from gymnasium import spaces

import ppo


class Levels(gym.Env):
    """Episodes of two steps, whose return is twice the level."""

    observation_space = spaces.Box(0, 10, (1,), np.float32)
    action_space = spaces.Discrete(2)
    level = 1.0
    _elapsed_steps = 0  # some environments have that, but no TimeLimit to stagger

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.array([self.t], np.float32), self.level, self.t == 2, False, {}


gym.register("Levels-v0", Levels, disable_env_checker=True)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_curriculum_that_ends_before_its_time(mode):
    """Episodes are of two steps and a reset, so that an iteration of 96 steps ends 32 of them."""

    def harder(run):
        num_episodes.append(len(run.envs.return_queue))
        if run.step == 192:
            run.envs.unwrapped.set_attr("level", 5.0)
            run.envs.return_queue.clear()
        return run.step == 288

    num_episodes = []
    args = ppo.Args(env_id="Levels-v0", num_envs=4, num_steps=24, vectorization_mode=mode)
    agent = ppo.train(replace(args, total_timesteps=480, eval_episodes=0), callback=harder)
    assert num_episodes == [32, 64, 32]
    assert pieces.values(agent.folder, "charts/episodic_return") == [2, 2, 10]
    assert ppo.load(agent.folder)["global_step"] == 288
