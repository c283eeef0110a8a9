"""CartPole is learnt within a budget, and the same test fails where nothing can be learnt."""

import gymnasium as gym
import numpy as np
import pytest

import ppo


def mean_return(**flags):
    """Mean return of 20 greedy episodes after a training, played as README says."""
    agent = ppo.train(ppo.Args(eval_episodes=0, **flags))
    env = gym.make("CartPole-v1")
    returns = np.zeros(20)
    for episode in range(20):
        obs, _ = env.reset(seed=episode)
        done = False
        while not done:
            action = agent.act(ppo.as_batch(obs, env.observation_space))
            obs, reward, terminated, truncated, _ = env.step(agent.head.to_env(action.numpy())[0])
            returns[episode] += reward
            done = terminated or truncated
    return returns.mean()


@pytest.mark.parametrize("seed", [1, 2])
def test_cartpole(seed):
    assert mean_return(seed=seed, total_timesteps=100_000) >= 450


def test_cartpole_without_learning():
    assert mean_return(total_timesteps=5_000, learning_rate=0.0) < 200
