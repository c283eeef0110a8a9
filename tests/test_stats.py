"""Running statistics, reward scaling, and what is logged of them."""

import re
import time
from collections import Counter

import numpy as np
import pieces
import probes
import pytest
import torch
from gymnasium import spaces
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo


def test_running_statistics_equal_two_pass_numpy():
    """Over chunks of uneven size, with offsets up to 1e4 and scales from 1e-3 to 1e3."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(5000, 5)) * [1, 1e-3, 1e3, 1, 0.01] + [0, 10, -1e3, 1e4, 3]
    rows[:, 3] *= np.linspace(0.5, 1.5, 5000)  # a drift, so that the chunks differ
    rows[:1000, 4] = 3  # constant, and then it varies
    rows = rows.astype(np.float32)
    stats = ppo.RunningStats((5,))
    for chunk in np.split(rows, [1, 2, 10, 1000, 1003, 4000]):
        stats.update(torch.from_numpy(chunk))
    assert stats.count == 5000
    rows = rows.astype(np.float64)
    np.testing.assert_allclose(stats.mean, rows.mean(0), rtol=2e-7, atol=1e-7)
    np.testing.assert_allclose(stats.std, rows.std(0), rtol=2e-5)


@torch.no_grad()
def test_scaling_of_observations():
    """By what an agent with the same weights and without scaling makes of scaled observations."""
    space, actions = spaces.Box(-99, 99, (2,)), spaces.Discrete(2)
    agent = ppo.Agent(space, actions, ppo.Args())
    torch.nn.init.normal_(agent.actor[-1].weight)
    plain = ppo.Agent(space, actions, ppo.Args(norm_obs=False))
    plain.load_state_dict(agent.state_dict(), strict=False)
    cases = [
        ([], [[3, -50], [1, 7]], [[3, -10], [1, 7]]),  # the identity, but clipped
        ([[0, 5], [4, 45]], [[3, 35], [2, 999], [-98, 5]], [[0.5, 0.5], [0, 10], [-10, -1]]),
    ]
    for rows, obs, scaled in cases:
        if rows:
            agent.obs_stats.update(torch.tensor(rows).float())
        dist, value = agent(torch.tensor(obs).float())
        expected_dist, expected_value = plain(torch.tensor(scaled).float())
        torch.testing.assert_close(dist.logp, expected_dist.logp)
        torch.testing.assert_close(value, expected_value)
    assert {f"obs_stats.{x}" for x in ("mean", "std", "count")} < set(agent.state_dict())


@pytest.mark.parametrize(("dtype", "least"), [(np.float32, 1e-4), (np.int64, 0.2)])
def test_no_deviation_is_below_a_least_one(dtype, least):
    """So that what is rare does not become large; integers are mostly one-hot."""
    agent = ppo.Agent(spaces.Box(0, 9, (1,), dtype), spaces.Discrete(2), ppo.Args())
    agent.obs_stats.update(torch.full((10, 1), 7.0))
    scaled = agent.features(torch.tensor([[7.0], [7 + 5 * least]]))
    assert scaled.flatten().tolist() == pytest.approx([0, 5], rel=1e-2)


def test_scaling_of_rewards():
    """Divided by the deviation of the return, without taking a mean off, and clipped at 10.

    By a fifth of the root mean square where that is more: of 9 and 11 it is sqrt(101) / 5.
    """
    reward = torch.tensor([[1.0, -3.0], [0.0, 40.0], [-21.0, 19.0]])
    for returns, scale in [([], 1.0), ([5.0, 9.0], 2.0), ([9.0, 11.0], 101**0.5 / 5)]:
        scaler = ppo.RewardScaler(0.9)
        if returns:
            scaler.return_stats.update(torch.tensor(returns))
        scaled = scaler.normalize(reward)
        assert scaled.flatten().tolist() == pytest.approx(
            [max(-10, min(10, x / scale)) for x in [1, -3, 0, 40, -21, 19]]
        )


def test_the_discounted_return():
    """By brute force, over rollouts that cut episodes; it starts again after all kinds of ends."""
    args = ppo.Args(env_id="Counting-v0", num_envs=2, num_steps=7, num_minibatches=1, gamma=0.9)
    with pieces.learner(args) as learner:
        scaler = learner.agent.reward_scaler
        for _ in range(5):
            rollout = learner.collect()
            reward = rollout.reward + 9 * ~rollout.valid  # some environments pay for a reset
            scaler.update(reward, rollout.valid)
    sums = []
    for episode in range(8):  # of 3 + 1 + 4 + 2 + 7 + 3 + 1 + 4 steps, and 8 resets: 33 rows
        length = probes.Counting.LENGTHS[episode % 5]
        rewards = [probes.Counting.reward(episode, t) for t in range(1, length + 1)]
        sums += [sum(0.9 ** (k - i) * rewards[i] for i in range(k + 1)) for k in range(length)]
    rewards = [probes.Counting.reward(8, t) for t in (1, 2)]  # the first two steps of the next
    sums += [rewards[0], 0.9 * rewards[0] + rewards[1]]
    stats = scaler.return_stats
    assert stats.count == 2 * len(sums)
    assert stats.mean.item() == pytest.approx(np.mean(sums), rel=1e-5)
    assert stats.std.item() == pytest.approx(np.std(sums), rel=1e-5)
    assert {f"reward_scaler.return_stats.{x}" for x in ("mean", "std", "count")} < set(
        learner.agent.state_dict()
    )


class Noting(pieces.Recording):
    """Notes, at every use of the scaling, how many observations and returns are known to it."""

    def __init__(self, *args):
        super().__init__(*args)
        self.uses = []

    def features(self, obs):
        known = (self.obs_stats.count, self.reward_scaler.return_stats.count)
        self.uses.append(tuple(x.item() for x in known))
        return super().features(obs)


def test_when_statistics_are_updated():
    """Observations' after the update, by its valid rows, of all environments alike.

    Rewards' before it, so that the first rewards are scaled by what they have in them.
    """
    flags = {"num_envs": 3, "num_steps": 32, "total_timesteps": 192}
    flags |= {"update_epochs": 1, "num_minibatches": 2, "eval_episodes": 0}
    agent = ppo.train(ppo.Args(env_id="Spaces-v0", **flags), agent_class=Noting)
    rows = torch.cat(agent.learnt).double()
    first = len(torch.cat(agent.learnt[:2]))
    both = len(rows)
    # Twice 32 steps, and then two calls that value and two minibatches.
    expected = {(0, 0): 32, (0, first): 4, (first, first): 32, (first, both): 4}
    assert Counter(agent.uses) == expected
    stats = agent.obs_stats
    torch.testing.assert_close(stats.mean.double(), rows.mean(0), atol=1e-4, rtol=1e-5)
    std = rows.std(0, correction=0)
    torch.testing.assert_close(stats.std.double(), std, atol=1e-4, rtol=1e-5)
    assert agent.obs_stats.count == both < 192


@pytest.mark.parametrize("clip_reward", [False, True])
def test_learning_from_rewards_as_they_are_or_from_their_signs(clip_reward):
    flags = {"num_envs": 2, "num_steps": 64, "norm_obs": False, "norm_reward": False}
    args = ppo.Args(env_id="Counting-v0", clip_reward=clip_reward, **flags)
    with pieces.learner(args) as learner:
        reward = learner.collect().reward[:3, 0].tolist()
    raw = [probes.Counting.reward(0, t) for t in (1, 2, 3)]
    assert reward == pytest.approx(np.sign(raw) if clip_reward else raw)
    assert learner.agent.obs_stats is learner.agent.reward_scaler is None
    assert not any("stats" in name for name in learner.agent.state_dict())


def test_tensorboard():
    """Means of the last 100 raw returns and lengths, whatever the scaling, and everything else."""
    # 3 environments of 16 rows: episodes of 3, 1, 4, 2 steps and a reset after each make 14 rows.
    # The next 16 rows are the other five steps of episode 4, then 3, 1 and 4 steps, and the resets.
    flags = {"num_envs": 3, "num_steps": 16, "total_timesteps": 5 * 48, "clip_reward": True}
    ppo.train(ppo.Args(env_id="Counting-v0", run_name="a", num_minibatches=4, **flags))
    tags = pieces.scalars("runs/a")
    lengths = [probes.Counting.LENGTHS[e % 5] for e in range(8)]
    returns = [
        sum(probes.Counting.reward(e, t) for t in range(1, n + 1)) for e, n in enumerate(lengths)
    ]
    for name, expected in [("return", returns), ("length", lengths)]:
        logged = tags[f"charts/episodic_{name}"]
        assert logged[0] == (48, pytest.approx(np.mean(expected[:4]), rel=1e-5))
        assert logged[1] == (96, pytest.approx(np.mean(expected[:8]), rel=1e-5))
    assert [step for step, _ in tags["losses/policy_loss"]] == [48 * i for i in range(1, 6)]
    assert [x for _, x in tags["losses/updates"]] == [40] * 5
    rates = [5e-4 * (1 - i / 5) for i in range(5)]
    assert [x for _, x in tags["charts/learning_rate"]] == pytest.approx(rates)
    assert all(norm > 0 for _, norm in tags["losses/grad_norm"])
    assert tags["eval/episodic_return"][0][0] == 240
    text = EventAccumulator("runs/a").Reload().Tensors("hyperparameters/text_summary")[0]
    assert "|gae_lambda|0.98|" in text.tensor_proto.string_val[0].decode()


def test_explained_variance():
    """Delay has as many of its two states, with targets r + gamma r' and r' at a lambda of 1."""
    flags = {"env_id": "Delay-v0", "num_envs": 2, "num_steps": 12, "total_timesteps": 24}
    flags |= {"gamma": 0.6, "gae_lambda": 1.0, "learning_rate": 0.0, "num_minibatches": 4}
    agent = ppo.train(ppo.Args(run_name="a", norm_obs=False, **flags))
    scaled = agent.reward_scaler.normalize(torch.tensor(1.0)).item()
    with torch.no_grad():
        _, value = agent(torch.tensor([[0.0], [1.0]]))
    v0, v1 = value.tolist()
    target = np.array([0.6 * scaled, scaled])
    expected = 1 - np.var(target - [v0, v1]) / np.var(target)
    assert 0.01 < abs(expected) < 0.99
    logged = pieces.scalars("runs/a")["losses/explained_variance"]
    assert logged == [(24, pytest.approx(expected, rel=1e-3))]


def test_console_and_speed(capsys, monkeypatch):
    """32 lines in a file, of time left, steps, speed, return and length, by the agent's clock.

    An iteration takes a second, and has four episodes of two steps in each of two environments,
    and as many resets.
    """

    class Agent(ppo.Agent):
        seconds = 0.0

        def act(self, *args):
            Agent.seconds += 1 / 16
            return super().act(*args)

    monkeypatch.setattr(time, "monotonic", lambda: Agent.seconds)
    flags = {"num_envs": 2, "num_steps": 16, "num_minibatches": 1, "update_epochs": 1}
    args = ppo.Args(env_id="Delay-v0", run_name="a", total_timesteps=32 * 100, **flags)
    ppo.train(args, agent_class=Agent)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "making 2 x Delay-v0 ..."
    assert re.fullmatch(r"runs/a: [\d,]+ parameters on cpu", lines[1])
    shown = [line for line in lines if "steps/s" in line]
    assert len(shown) == 32
    assert shown[0] == "0:01:36 left, 128 steps (4%), 32 steps/s, return 1, length 2"
    assert shown[-1] == "0:00:00 left, 3,200 steps (100%), 32 steps/s, return 1, length 2"
    assert pieces.values("runs/a", "charts/SPS") == [32] * 100
