"""Advantages and returns against their definition."""

import numpy as np
import pytest
import torch

import ppo


def random_rollout(T=24, N=12):
    """Random numbers with NEXT_STEP's pattern of ends: the row after one resets, without flags."""
    rng = np.random.default_rng(2)
    terminated, truncated = rng.random((2, T, N)) < 0.25
    done = terminated | truncated
    for t in range(1, T):
        done[t] &= ~done[t - 1]
    terminated &= done
    assert set(terminated[-1].astype(int) + done[-1]) == {0, 1, 2}, "all kinds of ends are last"
    return rng.normal(size=(T, N)), rng.normal(size=(T + 1, N)), terminated, done


def weighted_n_step_advantage(reward, value, terminated, done, gamma, lam, t):
    """[GAE] eq. 16 by its definition, the weighted mean of an episode's n-step advantages."""
    last = next((k for k in range(t, len(reward)) if done[k]), len(reward) - 1)
    n_step = []
    for end in range(t, last + 1):
        rewards = sum(gamma ** (k - t) * reward[k] for k in range(t, end + 1))
        bootstrap = 0.0 if terminated[end] else gamma ** (end - t + 1) * value[end + 1]
        n_step.append(rewards + bootstrap - value[t])
    weights = [(1 - lam) * lam**n for n in range(len(n_step) - 1)] + [lam ** (len(n_step) - 1)]
    return np.dot(weights, n_step)


@pytest.mark.parametrize(("gamma", "lam"), [(0.99, 0.95), (0.9, 0.0), (0.8, 1.0), (1.0, 0.5)])
def test_equals_the_definition_on_every_valid_row(gamma, lam):
    """Whatever a reset row was given as its reward: here it is a million."""
    reward, value, terminated, done = random_rollout()
    valid = np.ones_like(done)
    valid[1:] = ~done[:-1]
    given = np.where(valid, reward, 1e6)
    tensors = map(torch.from_numpy, (given, value, terminated, done))
    advantage, target = ppo.gae(*tensors, gamma, lam)
    assert 100 < valid.sum() < valid.size
    for t, n in np.argwhere(valid):
        column = (x[:, n] for x in (reward, value, terminated, done))
        expected = weighted_n_step_advantage(*column, gamma, lam, t)
        assert advantage[t, n].item() == pytest.approx(expected, abs=1e-10)
        assert target[t, n].item() == pytest.approx(expected + value[t, n], abs=1e-10)
