"""What reaches the loss: every real transition and no reset, bootstrapped from where it led to."""

import copy
import itertools
from collections import Counter

import numpy as np
import probes
import pytest
import torch

import ppo

FLAGS = {"num_envs": 3, "num_steps": 16, "norm_obs": False, "norm_reward": False, "norm_adv": False}


@pytest.fixture
def valuings(monkeypatch):
    """(agent as it was, obs, action) of every call of logprob_and_value while the test trains."""
    calls, original = [], ppo.logprob_and_value

    def logprob_and_value(agent, obs, action):
        calls.append((copy.deepcopy(agent), obs.clone(), action.clone()))
        return original(agent, obs, action)

    monkeypatch.setattr(ppo, "logprob_and_value", logprob_and_value)
    return calls


def follow(obs, rewards, kinds, next_obs, agent, args):
    """Lambda returns of one environment's rows, from the last to the first, each in its own episode.

    Where a row only reset the environment, kinds is None, and so is its return.
    """
    with torch.no_grad():
        value = agent(torch.as_tensor(np.array(obs), dtype=torch.float32))[1].double().numpy()
        next_value = agent(torch.as_tensor(np.array(next_obs), dtype=torch.float32))[1].double().numpy()
    returns, following = [None] * len(obs), None
    for t in reversed(range(len(obs))):
        if kinds[t] is None:
            following = None
            continue
        if kinds[t] in ("terminated", "both"):
            returns[t] = rewards[t]
        elif kinds[t] == "truncated" or following is None:
            returns[t] = rewards[t] + args.gamma * next_value[t]
        else:
            mixed = (1 - args.gae_lambda) * next_value[t] + args.gae_lambda * following
            returns[t] = rewards[t] + args.gamma * mixed
        following = returns[t]
    return returns, value


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_counting_environment(mode, updates, valuings):
    iterations = 3
    args = ppo.Args(
        env_id="Counting-v0",
        vectorization_mode=mode,
        total_timesteps=3 * 16 * iterations,
        update_epochs=1,
        **FLAGS,
    )
    ppo.train(args)
    Env = probes.Counting
    expected = {}  # obs of every real transition -> its return and value
    names = valuings[0][1][0, :, 0].tolist()
    assert len(set(names)) == 3
    state = dict.fromkeys(names, (0, 0))  # episode and step
    for agent, stored_obs, _ in valuings:
        for n, name in enumerate(names):
            obs, rewards, kinds, next_obs = [], [], [], []
            for t in range(args.num_steps):
                episode, step = state[name]
                assert stored_obs[t, n].tolist() == [name, episode, step]
                length = Env.LENGTHS[episode % 5]
                obs.append((name, episode, step))
                if step == length:  # the final observation: this row resets
                    state[name] = (episode + 1, 0)
                    kinds.append(None)
                else:
                    state[name] = (episode, step + 1)
                    kinds.append(Env.ENDS[episode % 3] if step + 1 == length else "")
                next_obs.append((name, *state[name]))
                rewards.append(Env.reward(episode, step + 1))
            returns, values = follow(obs, rewards, kinds, next_obs, agent, args)
            for row in zip(obs, returns, values, strict=True):
                if row[1] is not None:
                    expected[row[0]] = row[1:]

    seen = Counter()
    for minibatch, _, _ in updates:
        for obs, ret, value, adv in zip(
            minibatch.obs, minibatch.ret, minibatch.value, minibatch.advantage, strict=True
        ):
            key = tuple(obs.tolist())
            seen[key] += 1
            assert key in expected, "a reset reached the loss"
            assert ret.item() == pytest.approx(expected[key][0], abs=1e-5)
            assert value.item() == pytest.approx(expected[key][1], abs=1e-5)
            assert adv.item() == pytest.approx(expected[key][0] - expected[key][1], abs=1e-5)
    assert set(seen) == set(expected)
    assert set(seen.values()) == {1}


def cartpole_dynamics(obs, action):
    """The next state of CartPole, from its equations of motion."""
    x, x_dot, theta, theta_dot = obs
    force, cos, sin = (10.0 if action == 1 else -10.0), np.cos(theta), np.sin(theta)
    temp = (force + 0.05 * theta_dot**2 * sin) / 1.1
    theta_acc = (9.8 * sin - cos * temp) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
    x_acc = temp - 0.05 * theta_acc * cos / 1.1
    return np.array(
        [x + 0.02 * x_dot, x_dot + 0.02 * x_acc, theta + 0.02 * theta_dot, theta_dot + 0.02 * theta_acc]
    )


def test_cartpole_vector_entry_point(updates, valuings):
    """With a limit of 12 steps some episodes fall before it and most are cut by it."""
    args = ppo.Args(
        env_id="CartPole-v1",
        env_kwargs={"max_episode_steps": 12},
        vectorization_mode="vector_entry_point",
        total_timesteps=3 * 64 * 2,
        update_epochs=1,
        num_envs=3,
        num_steps=64,
        **{k: v for k, v in FLAGS.items() if k.startswith("norm")},
    )
    ppo.train(args)
    expected, ends = {}, Counter()
    age = [0, 0, 0]
    for agent, obs, action in valuings:
        obs, action = obs.numpy(), action.numpy()
        for n in range(3):
            kinds, nexts = [], []
            for t in range(args.num_steps):
                if age[n] is None:  # this row resets
                    assert np.abs(obs[t + 1, n]).max() <= 0.05
                    kinds.append(None)
                    nexts.append(obs[t + 1, n])
                    age[n] = 0
                    continue
                nexts.append(cartpole_dynamics(obs[t, n], action[t, n]))
                np.testing.assert_allclose(obs[t + 1, n], nexts[-1], atol=1e-5)
                age[n] += 1
                fallen = abs(nexts[-1][2]) > 12 * 2 * np.pi / 360
                kinds.append("terminated" if fallen else "truncated" if age[n] == 12 else "")
                ends[kinds[-1]] += 1
                age[n] = None if kinds[-1] else age[n]
            returns, _ = follow(obs[:-1, n], np.ones(args.num_steps), kinds, nexts, agent, args)
            expected |= {obs[t, n].tobytes(): ret for t, ret in enumerate(returns) if ret is not None}
    assert ends["terminated"] > 0
    assert ends["truncated"] > 0
    rows = [row for minibatch, _, _ in updates for row in zip(minibatch.obs, minibatch.ret, strict=True)]
    assert sorted(obs.numpy().tobytes() for obs, _ in rows) == sorted(expected)
    for obs, ret in rows:
        assert ret.item() == pytest.approx(expected[obs.numpy().tobytes()], abs=1e-4)


@pytest.mark.parametrize("num_minibatches", [1, 3, 5, 7])
def test_every_valid_row_once_an_epoch(num_minibatches, updates):
    """Uneven parts, whatever the numbers; 3 x 15 rows less the resets is not divisible by most of these."""
    args = ppo.Args(
        env_id="Counting-v0",
        total_timesteps=45,
        num_minibatches=num_minibatches,
        update_epochs=4,
        **{**FLAGS, "num_steps": 15},
    )
    ppo.train(args)
    assert len(updates) == 4 * num_minibatches
    rows = [[tuple(obs.tolist()) for obs in minibatch.obs] for minibatch, _, _ in updates]
    sizes = [len(part) for part in rows]
    assert max(sizes) - min(sizes) <= 1
    starts = range(0, len(rows), num_minibatches)
    epochs = [list(itertools.chain(*rows[i : i + num_minibatches])) for i in starts]
    for epoch in epochs:
        assert sorted(epoch) == sorted(set(epochs[0]))
    if num_minibatches > 1:
        assert epochs[0] != epochs[1], "epochs are shuffled anew"


def test_smallest_minibatches_have_two_rows_and_stay_finite(updates):
    """One-step episodes, where every second row is a reset: 2 x (5 // 2) = 4 rows for 2 minibatches."""
    args = ppo.Args(env_id="Choice-v0", total_timesteps=100, num_envs=2, num_steps=5, num_minibatches=2)
    agent = ppo.train(args)
    assert min(len(minibatch.obs) for minibatch, _, _ in updates) == 2
    assert all(x.isfinite().all() for x in agent.state_dict().values())


def test_values_come_in_chunks_of_the_whole():
    """5,001 x 2 rows are three chunks of 4,096; the same by one pass over all of them."""
    torch.manual_seed(0)
    space = ppo.spaces.Box(-1, 1, (2,))
    agent = ppo.Agent(space, ppo.spaces.Discrete(3), ppo.Args(norm_obs=False))
    obs, action = torch.randn(5002, 2, 2), torch.randint(3, (5001, 2))
    logprob, value = ppo.logprob_and_value(agent, obs, action)
    with torch.no_grad():
        dist, expected_value = agent(obs.flatten(0, 1))
        expected_logprob = dist.log_prob(torch.cat([action, action[:1]]).flatten()).view(5002, 2)[:-1]
    torch.testing.assert_close(value, expected_value.view(5002, 2))
    torch.testing.assert_close(logprob, expected_logprob)


@pytest.mark.parametrize("norm_reward", [False, True])
def test_recomputed_advantages_are_of_the_same_rewards(norm_reward, monkeypatch):
    rewards, original = [], ppo.gae
    monkeypatch.setattr(ppo, "gae", lambda *args: rewards.append(args[0].clone()) or original(*args))
    flags = {**FLAGS, "norm_reward": norm_reward}
    ppo.train(
        ppo.Args(
            env_id="Counting-v0", total_timesteps=48, update_epochs=3, recompute_advantages=True, **flags
        )
    )
    assert len(rewards) == 3
    assert all(torch.equal(reward, rewards[0]) for reward in rewards)


def test_recomputed_advantages(updates):
    """Before each further epoch values and returns are computed anew; the old log-probabilities stay."""

    def by_row(epoch, field):
        minibatch = updates[epoch][0]
        rows = zip(minibatch.obs, getattr(minibatch, field), strict=True)
        return {tuple(obs.tolist()): x.item() for obs, x in rows}

    flags = {
        "env_id": "Counting-v0",
        "total_timesteps": 48,
        "num_minibatches": 1,
        "update_epochs": 3,
        **FLAGS,
    }
    ppo.train(ppo.Args(recompute_advantages=True, learning_rate=1e-2, **flags))
    for field, stays in [("logprob", True), ("value", False), ("ret", False), ("advantage", False)]:
        assert (by_row(0, field) == by_row(1, field)) is stays
        assert (by_row(1, field) == by_row(2, field)) is stays
    updates.clear()
    ppo.train(ppo.Args(recompute_advantages=False, learning_rate=1e-2, **flags))
    for field in ("logprob", "value", "ret", "advantage"):
        assert by_row(0, field) == by_row(2, field)
