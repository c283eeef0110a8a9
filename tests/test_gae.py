"""Advantages and returns against independent computations of the same."""

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer

import ppo


def random_rollout(seed, T=24, N=7):
    """Random numbers with NEXT_STEP's pattern of ends: the row after one resets, without flags."""
    rng = np.random.default_rng(seed)
    terminated, truncated = rng.random((2, T, N)) < 0.25
    for flag, n in [(terminated, 0), (truncated, 1), (terminated, 2), (truncated, 2)]:
        flag[0, n] = True  # ends on the first row
    done = terminated | truncated
    for t in range(1, T):
        terminated[t] &= ~done[t - 1]
        done[t] &= ~done[t - 1]
    done[-2, 3:5] = False  # ends on the last row
    done[-1, 3:5] = True
    terminated[-1, 3:5] = [True, False]
    terminated &= done
    reward = rng.normal(size=(T, N))
    value = rng.normal(size=(T + 1, N))
    return reward, value, terminated, done


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
@pytest.mark.parametrize("seed", range(5))
def test_equals_the_definition_on_every_valid_row(seed, gamma, lam):
    reward, value, terminated, done = random_rollout(seed)
    advantage, target = ppo.gae(
        *map(torch.from_numpy, (reward, value, terminated, done)), gamma, lam
    )
    checked = 0
    for t, n in np.ndindex(reward.shape):
        if t == 0 or not done[t - 1, n]:
            row = (x[:, n] for x in (reward, value, terminated, done))
            expected = weighted_n_step_advantage(*row, gamma, lam, t)
            assert advantage[t, n].item() == pytest.approx(expected, abs=1e-10)
            assert target[t, n].item() == pytest.approx(expected + value[t, n], abs=1e-10)
            checked += 1
    assert checked > 100


def test_what_a_reset_row_was_given_changes_no_other_row():
    reward, value, terminated, done = random_rollout(0)
    valid = np.ones_like(done)
    valid[1:] = ~done[:-1]
    other = np.where(valid, reward, 1e6)
    results = [
        ppo.gae(*map(torch.from_numpy, (x, value, terminated, done)), 0.9, 0.8)
        for x in (reward, other)
    ]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a[valid], b[valid])
        assert not torch.equal(a, b)


def test_terminated_wins_where_both_flags_are_set():
    tensors = [
        torch.tensor([[1.0]]),
        torch.tensor([[0.5], [100.0]]),
        torch.tensor([[True]]),
        torch.tensor([[True]]),
    ]
    advantage, target = ppo.gae(*tensors, 0.9, 0.9)
    assert advantage.item() == 0.5
    assert target.item() == 1.0


def test_equals_stable_baselines3_without_truncations():
    """There, and where an environment resets within the step of its end, both mean the same."""
    T, N, gamma, lam = 32, 3, 0.97, 0.9
    rng = np.random.default_rng(0)
    reward = rng.normal(size=(T, N)).astype(np.float32)
    value = rng.normal(size=(T + 1, N)).astype(np.float32)
    done = rng.random((T, N)) < 0.2
    buffer = RolloutBuffer(T, spaces.Box(-1, 1, (1,)), spaces.Discrete(2), "cpu", lam, gamma, N)
    episode_start = np.zeros(N, bool)
    zeros = np.zeros((N, 1), np.float32)
    for t in range(T):
        values = torch.from_numpy(value[t])
        buffer.add(zeros, zeros, reward[t], episode_start, values, torch.zeros(N))
        episode_start = done[t]
    buffer.compute_returns_and_advantage(torch.from_numpy(value[T]), done[T - 1])

    advantage, target = ppo.gae(*map(torch.from_numpy, (reward, value, done, done)), gamma, lam)
    np.testing.assert_allclose(advantage, buffer.advantages, atol=1e-5)
    np.testing.assert_allclose(target, buffer.returns, atol=1e-5)
