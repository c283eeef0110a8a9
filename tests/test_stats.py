"""Running statistics, reward scaling, and returns that stay raw."""

import itertools
import re
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import probes
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo


def test_running_statistics_equal_two_pass_numpy():
    """Over chunks of uneven size, with offsets up to 1e4 times and scales 1e-3 to 1e3 times the ordinary."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(5000, 4)) * [1, 1e-3, 1e3, 1] + [0, 10, -1e3, 1e4]
    rows[:, 3] *= np.linspace(0.5, 1.5, 5000)  # a drift, so that the chunks differ
    stats = ppo.RunningStats((4,))
    for chunk in np.split(rows.astype(np.float32), [1, 2, 10, 1000, 1003, 4000]):
        stats.update(torch.from_numpy(chunk))
    assert stats.count == 5000
    np.testing.assert_allclose(stats.mean, rows.mean(0), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(stats.std, rows.std(0), rtol=1e-3)


def test_scaling():
    agent = ppo.Agent(ppo.spaces.Box(-99, 99, (2,)), ppo.spaces.Discrete(2), ppo.Args())
    x = torch.tensor([[3.0, -50.0], [1.0, 7.0]])
    clipped = torch.tensor([[3.0, -10.0], [1.0, 7.0]])
    assert torch.equal(agent.normalize(x), clipped), "the identity at first, but clipped"
    for _ in range(3):
        agent.obs_stats.update(torch.tensor([[0.0, 7.0], [4.0, 7.0]]))
    assert agent.obs_stats.std.tolist() == pytest.approx([2, 1e-4]), "a constant keeps the smallest deviation"
    x = torch.tensor([[3.0, 7.0], [2.0, 7.0005], [2.0, 8.0]])
    expected = torch.tensor([[0.5, 0.0], [0.0, 5.0], [0.0, 10.0]])
    torch.testing.assert_close(agent.normalize(x), expected, atol=0.01, rtol=0)


def test_what_was_constant_and_then_varies_has_its_true_deviation():
    rows = np.concatenate([np.full(500, 3.0), np.random.default_rng(0).normal(3, 0.01, 500)])
    stats = ppo.RunningStats(())
    for chunk in np.split(rows.astype(np.float32), 10):
        stats.update(torch.from_numpy(chunk))
    assert stats.std.item() == pytest.approx(rows.std(), rel=1e-3)


def test_the_first_observations_pass_unscaled_and_the_next_are_scaled(monkeypatch):
    """Statistics change after an update phase alone, by its valid rows, and are those of all environments."""
    seen, rows = [], []
    original_normalize, original_loss = ppo.Agent.normalize, ppo.ppo_loss

    def normalize(agent, obs):
        seen.append((agent.obs_stats.count.item(), obs.clone(), original_normalize(agent, obs).clone()))
        return seen[-1][2]

    def ppo_loss(agent, minibatch, *rest):
        rows.append((agent.obs_stats.count.item(), minibatch.obs.clone()))
        return original_loss(agent, minibatch, *rest)

    monkeypatch.setattr(ppo.Agent, "normalize", normalize)
    monkeypatch.setattr(ppo, "ppo_loss", ppo_loss)
    agent = ppo.train(
        ppo.Args(
            env_id="Spaces-v0",
            num_envs=3,
            num_steps=32,
            total_timesteps=192,
            update_epochs=1,
            num_minibatches=2,
            eval_episodes=0,
        )
    )
    counts = sorted({count for count, _ in rows})
    assert counts[0] == 0, "the identity in the whole first iteration"
    first = torch.cat([obs for count, obs in rows if count == 0]).double()
    second = torch.cat([obs for count, obs in rows if count == len(first)]).double()
    assert counts == [0, len(first)]
    for count, obs, scaled in seen:
        if count == 0:
            torch.testing.assert_close(scaled, obs.clamp(-10, 10))
        else:
            expected = (obs - first.mean(0)) / first.std(0, correction=0)
            torch.testing.assert_close(scaled.double(), expected.clamp(-10, 10), atol=1e-4, rtol=1e-4)
    both = torch.cat([first, second])
    assert agent.obs_stats.count == len(both) < 192
    torch.testing.assert_close(agent.obs_stats.mean.double(), both.mean(0), atol=1e-5, rtol=1e-5)


def test_rewards_are_divided_by_the_deviation_of_the_discounted_return(monkeypatch):
    """Of reward 1 in episodes of 10 steps, cut by their time limit: sums 1, 1.9, ... start again at each."""
    scaled, original = [], ppo.gae

    def gae(reward, *rest):
        scaled.append(reward.clone())
        return original(reward, *rest)

    monkeypatch.setattr(ppo, "gae", gae)
    # 22 rows are two episodes and two resets, so that every rollout starts with an episode.
    agent = ppo.train(ppo.Args(env_id="Forever-v0", num_envs=2, num_steps=22, total_timesteps=88, gamma=0.9))
    sums = [sum(0.9**k for k in range(n)) for n in range(1, 11)]
    assert agent.return_stats.count == 2 * 2 * 2 * 10
    assert agent.return_stats.std.item() == pytest.approx(np.std(sums), rel=1e-5)
    assert agent.return_stats.mean.item() == pytest.approx(np.mean(sums), rel=1e-5)
    expected = np.tile([*[1 / np.std(sums)] * 10, 0], 2)
    for reward in scaled:
        np.testing.assert_allclose(reward, np.stack([expected] * 2, 1), rtol=1e-5)


def test_the_discounted_return_runs_on_into_the_next_rollout():
    """Of 11 rows, an episode of 10 steps and its reset each, or of 4, which cut every episode."""
    args = ppo.Args(env_id="Forever-v0", num_envs=2, num_steps=11, total_timesteps=2 * 44, gamma=0.9)
    whole = ppo.train(args).return_stats
    args.num_steps, args.num_minibatches = 4, 2
    parts = ppo.train(args).return_stats
    assert parts.count == whole.count == 80
    torch.testing.assert_close(parts.std, whole.std)


def test_the_discounted_return_starts_again_after_every_kind_of_end():
    """Counting's ends are of every kind, and 16 rows are its episodes 0 to 3 and two steps of 4."""
    args = ppo.Args(env_id="Counting-v0", num_envs=2, num_steps=16, total_timesteps=32, gamma=0.9)
    stats, sums = ppo.train(args).return_stats, []
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
    names = {f"{stats}.{x}" for stats in ("obs_stats", "return_stats") for x in ("mean", "std", "count")}
    assert names < set(agent.state_dict())


def test_scaling_can_be_off(updates):
    agent = ppo.train(ppo.Args(env_id="Forever-v0", total_timesteps=512, norm_obs=False, norm_reward=False))
    assert agent.obs_stats is agent.return_stats is None
    assert not any("stats" in name for name in agent.state_dict())


def scalars(run):
    events = EventAccumulator(f"runs/{run}", size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}, events


def test_tensorboard():
    """Raw returns of all episodes, whatever the scaling, counted by hand from the environment's rule."""
    # 3 equal environments, 16 rows each: episodes of 3, 1, 4, 2 steps and a reset after each make 14 rows.
    ppo.train(ppo.Args(env_id="Counting-v0", run_name="a", num_envs=3, num_steps=16, total_timesteps=96))
    tags, events = scalars("a")
    returns = [sum(np.sin(e + 0.1 * t) for t in range(1, n + 1)) for e, n in enumerate([3, 1, 4, 2])]
    assert tags["charts/episodic_return"][0] == (48, pytest.approx(np.mean(returns), rel=1e-5))
    assert tags["charts/episodic_return_min"][0] == (48, pytest.approx(min(returns), rel=1e-5))
    assert tags["charts/episodic_return_max"][0] == (48, pytest.approx(max(returns), rel=1e-5))
    assert tags["charts/episodic_length"][0] == (48, 2.5)
    assert tags["charts/episodes"][0] == (48, 12), "three that end in the same step are three"
    assert [step for step, _ in tags["losses/policy_loss"]] == [48, 96]
    losses = "policy_loss value_loss entropy old_approx_kl approx_kl clipfrac grad_norm explained_variance"
    charts = (
        "learning_rate SPS episodes episodic_length episodic_return episodic_return_min episodic_return_max"
    )
    assert set(tags) == {f"losses/{x}" for x in losses.split()} | {f"charts/{x}" for x in charts.split()} | {
        "eval/episodic_return"
    }
    assert [rate for _, rate in tags["charts/learning_rate"]] == pytest.approx([2.5e-4, 1.25e-4])
    assert all(norm > 0 for _, norm in tags["losses/grad_norm"])
    text = events.Tensors("hyperparameters/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "|gae_lambda|0.95|" in text


def test_tensorboard_without_episodes_and_with_a_gaussian():
    space = ppo.spaces.Box(-1, 1, (2,))
    args = ppo.Args(env_id="Spaces-v0", env_kwargs={"action_space": space}, run_name="a", log_std_init=-1.0)
    args.total_timesteps, args.learning_rate = 512, 0.0
    ppo.train(args)
    assert scalars("a")[0]["charts/action_std"] == [(512, pytest.approx(np.exp(-1)))]
    # Episodes of CartPole last eight steps and more, so that none ends in the first rollout of four.
    ppo.train(ppo.Args(run_name="b", num_steps=4, num_envs=16, total_timesteps=64 * 8))
    tags = scalars("b")[0]
    assert tags["charts/episodes"][0][0] > 64
    assert len(tags["charts/SPS"]) == 8


def test_losses_are_averaged_over_all_minibatches(updates):
    ppo.train(ppo.Args(run_name="a", total_timesteps=1024))
    tags = scalars("a")[0]
    for name in ("policy_loss", "value_loss", "entropy", "approx_kl", "old_approx_kl", "clipfrac"):
        for iteration in range(2):
            mean = np.mean([info[name].item() for _, _, info in updates[16 * iteration :][:16]])
            assert tags[f"losses/{name}"][iteration][1] == pytest.approx(mean, rel=1e-4, abs=1e-7)


def test_explained_variance(monkeypatch):
    """1 less the variance of what the value function misses, over the variance of the returns."""
    calls, original = [], ppo.gae
    monkeypatch.setattr(ppo, "gae", lambda *args: calls.append((args, original(*args))) or calls[-1][1])
    ppo.train(ppo.Args(run_name="a", env_id="Forever-v0", num_envs=2, num_steps=10, total_timesteps=20))
    (((_, value, *_), (_, ret)),) = calls
    expected = 1 - np.var((ret - value[:-1]).numpy(), ddof=1) / np.var(ret.numpy(), ddof=1)
    assert scalars("a")[0]["losses/explained_variance"] == [(20, pytest.approx(expected, rel=1e-4))]


def test_console_in_a_file(capsys):
    """At most about forty lines, whatever the length; the last ones sum up."""
    ppo.train(
        ppo.Args(run_name="a", total_timesteps=64 * 100, num_steps=16, num_minibatches=1, update_epochs=1)
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "run: runs/a, from step 0, preset none"
    assert 20 < len(lines) <= 42
    assert any("6,400 steps (100%)" in line and "steps/s" in line and "left" in line for line in lines)
    end = r"end: 6,400 steps \(100%\), \S+ steps/s, return (\S+), length \1, after 0:00:\d\d"
    assert re.fullmatch(end, lines[-3])


def test_console_tells_returns_from_lengths_and_the_time_left(capsys, monkeypatch):
    """Ten iterations of a second by the clock, of four episodes of two steps in each of two environments."""
    ticks = itertools.count()
    monkeypatch.setattr(ppo, "time", SimpleNamespace(perf_counter=lambda: next(ticks), time_ns=lambda: 0))
    ppo.train(ppo.Args(env_id="Delay-v0", num_envs=2, num_steps=12, total_timesteps=240, num_minibatches=1))
    lines = capsys.readouterr().out.splitlines()
    assert "48 steps (20%), 24 steps/s, return 1.0, length 2.0, 0:00:08 left" in lines
    assert "end: 240 steps (100%), 24 steps/s, return 1.0, length 2.0, after 0:00:11" in lines


def test_speed_leaves_the_first_reset_out(monkeypatch):
    """The clock starts after the environments are reset, which may take long."""
    order = []
    reset, init = ppo.gym.vector.SyncVectorEnv.reset, ppo.Run.__init__
    monkeypatch.setattr(
        ppo.gym.vector.SyncVectorEnv, "reset", lambda *a, **k: (order.append("reset"), reset(*a, **k))[1]
    )
    monkeypatch.setattr(ppo.Run, "__init__", lambda *a: (order.append("clock"), init(*a))[1])
    ppo.train(ppo.Args(total_timesteps=64, num_steps=16, eval_episodes=0))
    assert order == ["reset", "clock", "reset"]


def test_wrappers_may_be_above_the_statistics(monkeypatch):
    """As a fork puts them that changes rewards for learning alone: the log still has the raw returns."""
    make_envs = ppo.make_envs
    half = lambda args: gym.wrappers.vector.TransformReward(make_envs(args), lambda reward: reward / 2)  # noqa: E731
    monkeypatch.setattr(ppo, "make_envs", half)
    ppo.train(ppo.Args(env_id="Delay-v0", run_name="a", total_timesteps=512, eval_episodes=0))
    assert {value for _, value in scalars("a")[0]["charts/episodic_return"]} == {1.0}
