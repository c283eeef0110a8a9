"""Advantages and returns against independent computations of the same."""

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer

import ppo


def random_rollout(seed, T=24, N=7):
    """Random numbers with NEXT_STEP's pattern of ends: the row after an end is a reset, with neither flag."""
    rng = np.random.default_rng(seed)
    terminated, truncated = rng.random((2, T, N)) < 0.25
    terminated[0, 0] = truncated[0, 1] = terminated[0, 2] = truncated[0, 2] = True  # ends on the first row
    done = terminated | truncated
    for t in range(1, T):
        terminated[t] &= ~done[t - 1]
        done[t] &= ~done[t - 1]
    terminated[-1, 3], done[-1, 3], done[-2, 3] = True, True, False  # ends on the last row
    terminated[-1, 4], done[-1, 4], done[-2, 4] = False, True, False
    terminated &= done
    reward, value = rng.normal(size=(T, N)), rng.normal(size=(T + 1, N))
    return reward, value, terminated, done


def weighted_n_step_advantage(reward, value, terminated, done, gamma, lam, t):
    """[GAE] eq. 16 by its definition, as the weighted mean of all n-step advantages within the episode."""
    last = next((k for k in range(t, len(reward)) if done[k]), len(reward) - 1)
    n_step = []
    for end in range(t, last + 1):
        rewards = sum(gamma ** (k - t) * reward[k] for k in range(t, end + 1))
        bootstrap = 0.0 if terminated[end] else gamma ** (end - t + 1) * value[end + 1]
        n_step.append(rewards + bootstrap - value[t])
    weights = [(1 - lam) * lam**n for n in range(len(n_step) - 1)] + [lam ** (len(n_step) - 1)]
    return np.dot(weights, n_step)


@pytest.mark.parametrize(("gamma", "lam"), [(0.99, 0.95), (0.9, 0.0), (0.8, 1.0), (1.0, 0.5)])
@pytest.mark.parametrize("seed", range(5))
def test_equals_the_definition_on_every_valid_row(seed, gamma, lam):
    reward, value, terminated, done = random_rollout(seed)
    advantage, ret = ppo.gae(*map(torch.from_numpy, (reward, value, terminated, done)), gamma, lam)
    checked = 0
    for t, n in np.ndindex(reward.shape):
        if t == 0 or not done[t - 1, n]:
            row = (x[:, n] for x in (reward, value, terminated, done))
            expected = weighted_n_step_advantage(*row, gamma, lam, t)
            assert advantage[t, n].item() == pytest.approx(expected, abs=1e-10)
            assert ret[t, n].item() == pytest.approx(expected + value[t, n], abs=1e-10)
            checked += 1
    assert checked > 100


def test_terminated_wins_where_both_flags_are_set():
    tensors = [
        torch.tensor([[1.0]]),
        torch.tensor([[0.5], [100.0]]),
        torch.tensor([[True]]),
        torch.tensor([[True]]),
    ]
    advantage, ret = ppo.gae(*tensors, 0.9, 0.9)
    assert (advantage.item(), ret.item()) == (0.5, 1.0)


def test_equals_stable_baselines3_without_truncations():
    """There, and where an environment resets within the step of its end, both mean the same."""
    T, N, gamma, lam = 32, 3, 0.97, 0.9
    rng = np.random.default_rng(0)
    reward, value = rng.normal(size=(T, N)).astype(np.float32), rng.normal(size=(T + 1, N)).astype(np.float32)
    done = rng.random((T, N)) < 0.2
    buffer = RolloutBuffer(T, spaces.Box(-1, 1, (1,)), spaces.Discrete(2), "cpu", lam, gamma, N)
    episode_start = np.zeros(N, bool)
    for t in range(T):
        zeros = np.zeros((N, 1), np.float32)
        buffer.add(zeros, zeros, reward[t], episode_start, torch.from_numpy(value[t]), torch.zeros(N))
        episode_start = done[t]
    buffer.compute_returns_and_advantage(torch.from_numpy(value[T]), done[T - 1])

    advantage, ret = ppo.gae(*map(torch.from_numpy, (reward, value, done, done)), gamma, lam)
    np.testing.assert_allclose(advantage, buffer.advantages, atol=1e-5)
    np.testing.assert_allclose(ret, buffer.returns, atol=1e-5)
