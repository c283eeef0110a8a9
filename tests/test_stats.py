"""Running statistics, reward scaling, and returns that stay raw."""

import re
import time

import numpy as np
import pieces
import probes
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo


def test_running_statistics_equal_two_pass_numpy():
    """Over chunks of uneven size, with offsets up to 1e4 and scales from 1e-3 to 1e3."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(5000, 4)) * [1, 1e-3, 1e3, 1] + [0, 10, -1e3, 1e4]
    rows[:, 3] *= np.linspace(0.5, 1.5, 5000)  # a drift, so that the chunks differ
    rows = rows.astype(np.float32)
    stats = ppo.RunningStats((4,))
    for chunk in np.split(rows, [1, 2, 10, 1000, 1003, 4000]):
        stats.update(torch.from_numpy(chunk))
    assert stats.count == 5000
    rows = rows.astype(np.float64)
    np.testing.assert_allclose(stats.mean, rows.mean(0), rtol=2e-7, atol=1e-7)
    np.testing.assert_allclose(stats.std, rows.std(0), rtol=5e-7)


def test_what_was_constant_and_then_varies_has_its_true_deviation():
    rows = np.concatenate([np.full(500, 3.0), np.random.default_rng(0).normal(3, 0.01, 500)])
    stats = ppo.RunningStats(())
    for chunk in np.split(rows.astype(np.float32), 10):
        stats.update(torch.from_numpy(chunk))
    assert stats.std.item() == pytest.approx(rows.std(), rel=1e-3)


@torch.no_grad()
def outputs(agent, obs):
    """Log-probabilities of both actions, and values."""
    dist, value = agent(obs)
    actions = [torch.full((len(obs),), i) for i in range(2)]
    return torch.stack([*map(dist.log_prob, actions), value])


def test_scaling_of_observations():
    """By what an agent with the same weights and without scaling makes of scaled observations."""
    torch.manual_seed(0)
    space, actions = ppo.spaces.Box(-99, 99, (2,)), ppo.spaces.Discrete(2)
    agent = ppo.Agent(space, actions, ppo.Args())
    torch.nn.init.normal_(agent.actor[-1].weight)
    plain = ppo.Agent(space, actions, ppo.Args(norm_obs=False))
    plain.load_state_dict(agent.state_dict(), strict=False)
    x = torch.tensor([[3.0, -50.0], [1.0, 7.0]])
    clipped = torch.tensor([[3.0, -10.0], [1.0, 7.0]])
    assert torch.equal(outputs(agent, x), outputs(plain, clipped)), "the identity, but clipped"
    for _ in range(3):
        agent.obs_stats.update(torch.tensor([[0.0, 7.0], [4.0, 7.0]]))
    assert agent.obs_stats.mean.tolist() == [2, 7]
    assert agent.obs_stats.std.tolist() == pytest.approx([2, 1e-4]), "no deviation is below 1e-4"
    x = torch.tensor([[3.0, 7.0], [2.0, 7.0005], [2.0, 8.0], [-98.0, 7.0]])
    expected = torch.tensor([[0.5, 0.0], [0.0, 5.0], [0.0, 10.0], [-10.0, 0.0]])
    torch.testing.assert_close(outputs(agent, x), outputs(plain, expected), atol=0.01, rtol=0)
    assert not torch.allclose(outputs(plain, x), outputs(plain, expected), atol=0.1)


def test_scaling_of_rewards():
    """Divided by the deviation of the return, without taking a mean off, and clipped at 10."""
    agent = ppo.Agent(ppo.spaces.Box(-1, 1, (2,)), ppo.spaces.Discrete(2), ppo.Args())
    reward = torch.tensor([[1.0, -3.0], [0.0, 40.0]])
    assert agent.scale_reward(reward).tolist() == [[1, -3], [0, 10]]
    agent.return_stats.update(torch.tensor([5.0, 9.0]))
    assert agent.scale_reward(reward).tolist() == [[0.5, -1.5], [0, 10]]
    assert agent.scale_reward(torch.tensor([-21.0, 19.0])).tolist() == [-10, 9.5]


def test_scaled_rewards_are_learnt_from():
    """In a batch; the rewards of the rollout itself stay raw."""
    args = ppo.Args(env_id="Constant-v0", num_steps=16)
    with pieces.learner(args) as learner:
        rollout = learner.collect()
    assert rollout.reward.unique().tolist() == [0, 1]
    assert learner.estimate(rollout).target.unique().tolist() == [1]
    learner.agent.return_stats.update(torch.tensor([5.0, 9.0]))
    assert learner.estimate(rollout).target.unique().tolist() == [0.5]
    assert rollout.reward.unique().tolist() == [0, 1]


def moments(rows):
    """Mean and deviation of float32 rows, in double precision."""
    rows = rows.double()
    return rows.mean(0), rows.std(0, correction=0)


def test_the_first_observations_pass_unscaled_and_the_next_are_scaled():
    """Statistics change after an update alone, by its valid rows, in all environments alike."""

    class Agent(pieces.Recording):
        def __init__(self, *args):
            super().__init__(*args)
            self.seen = {}  # mean and deviation, by how many rows are in them
            self.phases = {}  # where they were used, by the same

        def note(self, phase):
            stats = self.obs_stats
            count = stats.count.item()
            self.seen[count] = (stats.mean.clone(), stats.std.clone())
            self.phases.setdefault(count, set()).add(phase)

        def act(self, *args, **kwargs):
            self.note("acting")
            return super().act(*args, **kwargs)

        def forward(self, obs):
            self.note("learning" if torch.is_grad_enabled() else "valuing")
            return super().forward(obs)

    args = ppo.Args(
        env_id="Spaces-v0",
        num_envs=3,
        num_steps=32,
        total_timesteps=192,
        update_epochs=1,
        num_minibatches=2,
        eval_episodes=0,
    )
    agent = ppo.train(args, agent_class=Agent)
    first, second = torch.cat(agent.learnt[:2]), torch.cat(agent.learnt[2:])
    both = torch.cat([first, second])
    phases = {"acting", "valuing", "learning"}
    assert agent.phases == {0: phases, len(first): phases}
    mean, std = agent.seen[0]
    assert mean.tolist() == [0] * 3
    assert std.tolist() == [1] * 3
    last = (agent.obs_stats.mean, agent.obs_stats.std)
    for stats, rows in [(agent.seen[len(first)], first), (last, both)]:
        for x, expected in zip(stats, moments(rows), strict=True):
            torch.testing.assert_close(x.double(), expected, atol=1e-4, rtol=1e-5)
    assert agent.obs_stats.count == len(both) < 192


def test_rewards_are_scaled_by_statistics_that_know_them():
    """Of reward 1 in episodes of 10 steps, cut by their time limit: sums 1, 1.9, ... in each.

    The first rollout is in the statistics before it is scaled.
    """

    class Agent(ppo.Agent):
        deviations = []  # noqa: RUF012 (at every scaling of rewards)

        def scale_reward(self, reward):
            self.deviations.append((self.return_stats.count.item(), self.return_stats.std.item()))
            return super().scale_reward(reward)

    # 22 rows are two episodes and two resets, so that every rollout starts with an episode.
    flags = {"num_envs": 2, "num_steps": 22, "total_timesteps": 88, "gamma": 0.9}
    flags["stagger_episodes"] = False
    agent = ppo.train(ppo.Args(env_id="Forever-v0", **flags), agent_class=Agent)
    sums = [sum(0.9**k for k in range(n)) for n in range(1, 11)]
    std = pytest.approx(np.std(sums), rel=1e-5)
    assert agent.deviations == [(40, std), (80, std)]
    assert agent.return_stats.mean.item() == pytest.approx(np.mean(sums), rel=1e-5)


def test_the_discounted_return_runs_on_into_the_next_rollout():
    """Of 11 rows, an episode of 10 steps and its reset each, or of 4, which cut every episode."""
    flags = {"env_id": "Forever-v0", "num_envs": 2, "total_timesteps": 88, "gamma": 0.9}
    whole = ppo.train(ppo.Args(num_steps=11, **flags)).return_stats
    parts = ppo.train(ppo.Args(num_steps=4, num_minibatches=2, **flags)).return_stats
    assert parts.count == whole.count == 80
    torch.testing.assert_close(parts.std, whole.std)


def test_the_discounted_return_starts_again_after_every_kind_of_end():
    """Counting's ends are of every kind, and 16 rows are its episodes 0 to 3 and two steps of 4."""
    args = ppo.Args(env_id="Counting-v0", num_envs=2, num_steps=16, total_timesteps=32, gamma=0.9)
    stats = ppo.train(args).return_stats
    sums = []
    for episode, length in [(0, 3), (1, 1), (2, 4), (3, 2), (4, 2)]:
        total = 0.0
        for t in range(1, length + 1):
            total = 0.9 * total + probes.Counting.reward(episode, t)
            sums.append(total)
    assert stats.count == 2 * len(sums)
    assert stats.mean.item() == pytest.approx(np.mean(sums), rel=1e-5)
    assert stats.std.item() == pytest.approx(np.std(sums), rel=1e-5)


def test_statistics_are_saved_with_the_weights():
    agent = ppo.Agent(ppo.spaces.Box(-1, 1, (3,)), ppo.spaces.Discrete(2), ppo.Args())
    for stats in ("obs_stats", "return_stats"):
        assert {f"{stats}.{x}" for x in ("mean", "std", "count")} < set(agent.state_dict())


def test_scaling_can_be_off():
    args = ppo.Args(env_id="Forever-v0", total_timesteps=512, norm_obs=False, norm_reward=False)
    agent = ppo.train(args)
    assert agent.obs_stats is agent.return_stats is None
    assert not any("stats" in name for name in agent.state_dict())
    reward = torch.tensor([-1000.0, 1e-3])
    assert torch.equal(agent.scale_reward(reward), reward), "not even clipped"


def test_tensorboard():
    """Raw returns of all episodes, whatever the scaling, counted by the environment's rule."""
    # 3 environments of 16 rows: episodes of 3, 1, 4, 2 steps and a reset after each make 14 rows.
    flags = {"num_envs": 3, "num_steps": 16, "total_timesteps": 96}
    ppo.train(ppo.Args(env_id="Counting-v0", run_name="a", **flags))
    tags = pieces.scalars("runs/a")
    reward = probes.Counting.reward
    # The next 16 rows are the other five steps of episode 4, then 3, 1 and 4 steps, and the resets.
    for i, episodes in enumerate([{0: 3, 1: 1, 2: 4, 3: 2}, {4: 7, 5: 3, 6: 1, 7: 4}]):
        step = 48 * (i + 1)
        returns = [sum(reward(e, t) for t in range(1, n + 1)) for e, n in episodes.items()]
        expected = {
            "episodes": 3 * len(episodes),  # three that end in the same step are three
            "episodic_length": np.mean(list(episodes.values())),
            "episodic_return": np.mean(returns),
            "episodic_return_min": min(returns),
            "episodic_return_max": max(returns),
        }
        for name, value in expected.items():
            assert tags[f"charts/{name}"][i] == (step, pytest.approx(value, rel=1e-5)), name
    assert [step for step, _ in tags["losses/policy_loss"]] == [48, 96]
    assert [x for _, x in tags["charts/learning_rate"]] == pytest.approx([2.5e-4, 1.25e-4])
    assert all(norm > 0 for _, norm in tags["losses/grad_norm"])
    losses = "policy_loss value_loss entropy old_approx_kl approx_kl clipfrac grad_norm"
    names = {f"losses/{x}" for x in [*losses.split(), "explained_variance"]}
    charts = "learning_rate SPS episodes episodic_length episodic_return"
    names |= {f"charts/{x}" for x in [*charts.split(), "episodic_return_min"]}
    assert names | {"charts/episodic_return_max", "eval/episodic_return"} <= set(tags)
    text = EventAccumulator("runs/a").Reload().Tensors("hyperparameters/text_summary")[0]
    assert "|gae_lambda|0.95|" in text.tensor_proto.string_val[0].decode()


def test_episodes_are_logged_by_the_rollout_they_end_in():
    """Episodes of CartPole last eight steps and more, so that none ends in a first rollout of 4."""
    args = ppo.Args(run_name="a", num_steps=4, num_envs=16, total_timesteps=64 * 8)
    ppo.train(args)
    tags = pieces.scalars("runs/a")
    assert tags["charts/episodes"][0][0] > 64
    assert [step for step, _ in tags["charts/SPS"]] == [64 * (i + 1) for i in range(8)]
    assert tags["charts/episodic_return"] == tags["charts/episodic_length"]


def test_tensorboard_has_the_deviation_of_a_gaussian():
    space = ppo.spaces.Box(-1, 1, (2,))
    flags = {"env_kwargs": {"action_space": space}, "total_timesteps": 512, "learning_rate": 0.0}
    ppo.train(ppo.Args(env_id="Spaces-v0", run_name="a", log_std_init=-1.0, **flags))
    assert pieces.scalars("runs/a")["charts/action_std"] == [(512, pytest.approx(np.exp(-1)))]


def test_explained_variance_by_hand():
    """Values that are right are worth 1, those that are constant 0, and worse ones less."""
    target = torch.tensor([1.0, 2.0, 3.0])
    for value, expected in [
        ([1.0, 2.0, 3.0], 1),
        ([11.0, 12.0, 13.0], 1),
        ([5.0, 5.0, 5.0], 0),
        ([1.5, 2.0, 2.5], 0.75),
        ([3.0, 2.0, 1.0], -3),
    ]:
        result = ppo.explained_variance(torch.tensor(value), target)
        assert result.item() == pytest.approx(expected)


def test_explained_variance_of_a_run():
    """Delay has as many of its two states, with targets r + gamma r' and r' at a lambda of 1."""

    class Agent(ppo.Agent):
        rewards = []  # noqa: RUF012 (T, N), as they are learnt from

        def scale_reward(self, reward):
            self.rewards.append(super().scale_reward(reward))
            return self.rewards[-1]

    args = ppo.Args(
        run_name="a",
        env_id="Delay-v0",
        num_envs=2,
        num_steps=12,
        total_timesteps=24,
        gamma=0.6,
        gae_lambda=1.0,
        learning_rate=0.0,
        norm_obs=False,
    )
    agent = ppo.train(args, agent_class=Agent)
    (reward,) = agent.rewards
    first, second = reward[0::3].numpy(), reward[1::3].numpy()  # and every third only resets
    with torch.no_grad():
        _, value = agent(torch.tensor([[0.0], [1.0]]))
    v0, v1 = value.tolist()
    target = np.array([first + 0.6 * second, second])
    missed = np.array([first + 0.6 * second - v0, second - v1])
    expected = 1 - np.var(missed) / np.var(target)
    assert abs(expected) > 0.01
    logged = pieces.scalars("runs/a")["losses/explained_variance"]
    assert logged == [(24, pytest.approx(expected, rel=1e-3))]


def test_explained_variance_is_left_out_where_all_targets_are_equal():
    args = ppo.Args(run_name="a", env_id="Constant-v0", total_timesteps=512, norm_reward=False)
    ppo.train(args)
    assert "losses/explained_variance" not in pieces.scalars("runs/a")
    assert "losses/value_loss" in pieces.scalars("runs/a")


def test_console_in_a_file(capsys):
    """At most about forty lines, whatever the length; the last ones sum up."""
    flags = {"num_steps": 16, "num_minibatches": 1, "update_epochs": 1}
    ppo.train(ppo.Args(run_name="a", total_timesteps=64 * 100, **flags))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "run: runs/a, from step 0, preset none"
    assert 20 < len(lines) <= 42
    shown = [line for line in lines if "6,400 steps (100%)" in line]
    assert any("steps/s" in line and "left" in line for line in shown)
    end = r"end: 6,400 steps \(100%\), \S+ steps/s, return (\S+), length \1, after 0:00:\d\d"
    assert re.fullmatch(end, lines[-3])


def test_console_tells_returns_from_lengths_and_the_time_left(capsys, monkeypatch):
    """By a clock of the environments: a second an iteration, and 1,000 for each reset by seed.

    The speed leaves out the time that environments take to start. An iteration has four episodes
    of two steps in each of two environments, and as many resets.
    """
    monkeypatch.setattr(probes.Clock, "seconds", 0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: probes.Clock.seconds)
    flags = {"num_envs": 2, "num_steps": 12, "total_timesteps": 240, "num_minibatches": 1}
    ppo.train(ppo.Args(env_id="Clock-v0", run_name="a", **flags))
    assert probes.Clock.seconds > 2000, "the start took its time"
    lines = capsys.readouterr().out.splitlines()
    assert "48 steps (20%), 0:00:08 left, 24 steps/s, return 1, length 2" in lines
    assert any(x.startswith("end: 240 steps (100%), 24 steps/s, return 1, len") for x in lines)
    assert pieces.values("runs/a", "charts/SPS") == [24] * 10
