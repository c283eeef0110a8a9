"""CartPole is learnt within a budget, and the same test fails where nothing can be learnt."""

import gymnasium as gym
import numpy as np
import pytest
import torch

import ppo


def mean_return(seed, **flags):
    """Mean return of 20 greedy episodes after 100,000 steps."""
    agent = ppo.train(ppo.Args(seed=seed, total_timesteps=100_000, **flags))
    env = gym.make("CartPole-v1")
    returns = []
    for episode in range(20):
        obs, _ = env.reset(seed=episode)
        total = 0.0
        done = False
        while not done:
            action = agent.act(torch.from_numpy(obs).unsqueeze(0), greedy=True).numpy()
            obs, reward, terminated, truncated, _ = env.step(agent.to_env(action)[0])
            total += reward
            done = terminated or truncated
        returns.append(total)
    return np.mean(returns)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_cartpole(seed):
    assert mean_return(seed) >= 450


def test_cartpole_without_learning():
    assert mean_return(1, learning_rate=0.0) < 200
