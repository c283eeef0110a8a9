"""Rollouts and minibatches: every transition and no reset, bootstrapped from where it led to."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pieces
import probes
import pytest
import torch
from test_gae import weighted_n_step_advantage

import ppo

FLAGS = {"num_envs": 3, "num_steps": 16, "gamma": 0.9, "learning_rate": 1e-2}
FLAGS |= {"norm_obs": False, "norm_reward": False, "norm_adv": False, "num_minibatches": 4}


@torch.no_grad()
def check_batch(batch, rollout, agent, args):
    """Compare a batch with its rollout, and with advantages by their definition."""
    obs, valid = rollout.obs[:-1], rollout.valid
    dist, value = agent(rollout.obs.flatten(0, 1))
    value = value.view(*rollout.obs.shape[:2])
    columns = (x.double().numpy() for x in (rollout.reward, value))
    columns = [*columns, rollout.terminated.numpy(), rollout.done.numpy()]
    expected = [
        weighted_n_step_advantage(*(x[:, n] for x in columns), args.gamma, args.gae_lambda, t)
        for t, n in valid.nonzero().tolist()
    ]
    dist, _ = agent(obs[valid])
    for x, y in [
        (batch.obs, obs[valid]),
        (batch.action, rollout.action[valid]),
        (batch.logprob, dist.log_prob(batch.action)),
        (batch.value, value[:-1][valid]),
        (batch.advantage, torch.tensor(expected).float()),
        (batch.target, batch.advantage + batch.value),
    ]:
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
    assert not any(x.requires_grad for x in batch)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_counting_environment(mode):
    """Over three rollouts, between which the agent changes and the episodes go on."""
    args = ppo.Args(env_id="Counting-v0", vectorization_mode=mode, **FLAGS)
    Env = probes.Counting
    position = [(0, 0)] * 3  # episode and step of each environment
    ends = set()
    with pieces.learner(args, pieces.Recording) as learner:
        names = learner.obs[:, 0].tolist()
        assert len(set(names)) == 3
        for _ in range(3):
            learner.agent.acted.clear()
            rollout = learner.collect()
            acted = torch.stack(learner.agent.acted)
            assert torch.equal(acted, rollout.obs[:-1]), "one batch of N a step"
            for t, n in np.ndindex(args.num_steps, 3):
                episode, step = position[n]
                length = Env.LENGTHS[episode % 5]
                assert rollout.obs[t, n].tolist() == [names[n], episode, step]
                is_reset = step == length  # from the final observation
                end = Env.ENDS[episode % 3] if step + 1 == length else ""
                reward = 0 if is_reset else Env.reward(episode, step + 1)
                position[n] = (episode + 1, 0) if is_reset else (episode, step + 1)
                ends.add(end)
                assert rollout.obs[t + 1, n].tolist() == [names[n], *position[n]]
                assert rollout.valid[t, n] == (not is_reset)
                assert rollout.terminated[t, n] == (end in ("terminated", "both"))
                assert rollout.done[t, n] == (end != "")
                assert rollout.reward[t, n].item() == pytest.approx(reward, abs=1e-6)
            batch = learner.estimate(rollout)
            check_batch(batch, rollout, learner.agent, args)
            learner.update(rollout, batch)
    assert ends == {"", "terminated", "truncated", "both"}


@pytest.mark.parametrize("mode", ["sync", "vector_entry_point"])
def test_cartpole(mode):
    """With a limit of 18 steps some episodes fall before it and others are cut by it.

    In either case the next observation is the last one of the episode, and then the first one.
    """
    flags = {"vectorization_mode": mode, "stagger_episodes": False, **FLAGS, "num_steps": 254}
    args = ppo.Args(env_kwargs={"max_episode_steps": 18}, **flags)
    age = [0] * 3
    with pieces.learner(args) as learner:
        rollout = learner.collect()
        check_batch(learner.estimate(rollout), rollout, learner.agent, args)
    obs = rollout.obs.double().numpy()
    for t, n in np.ndindex(args.num_steps, 3):
        done = False
        if rollout.valid[t, n]:
            age[n] += 1
            x, x_dot, theta, theta_dot = obs[t, n]
            expected = [x + 0.02 * x_dot, theta + 0.02 * theta_dot]
            np.testing.assert_allclose(obs[t + 1, n, [0, 2]], expected, atol=1e-6)
            fallen = abs(obs[t + 1, n, 2]) > 12 * 2 * np.pi / 360
            assert rollout.terminated[t, n] == fallen
            done = fallen or age[n] == 18
        else:
            assert rollout.done[t - 1, n]
            assert np.abs(obs[t + 1, n]).max() <= 0.05
            age[n] = 0
        assert rollout.done[t, n] == done
        assert rollout.reward[t, n] == rollout.valid[t, n]
    assert 0 < rollout.terminated.sum() < rollout.done.sum()


@pytest.mark.parametrize("num_minibatches", [1, 3, 7])
def test_a_whole_run_learns_from_every_valid_row_once_an_epoch(num_minibatches):
    """Counting's observations are (environment, episode, step); at its length a row only resets."""
    flags = {**FLAGS, "num_minibatches": num_minibatches, "update_epochs": 2}
    args = ppo.Args(env_id="Counting-v0", total_timesteps=96, eval_episodes=0, **flags)
    agent = ppo.train(args, agent_class=pieces.Recording)
    parts = agent.learnt
    assert len(parts) == 2 * 2 * num_minibatches, "iterations, epochs, parts"
    for i in range(0, len(parts), num_minibatches):
        sizes = [len(part) for part in parts[i : i + num_minibatches]]
        assert max(sizes) - min(sizes) <= 1
    epochs = [torch.cat(parts[i * num_minibatches :][:num_minibatches]) for i in range(4)]
    rows = [[tuple(row) for row in epoch.tolist()] for epoch in epochs]
    assert sorted(rows[0]) == sorted(rows[1]) != rows[1] != rows[0], "shuffled anew"
    lengths = probes.Counting.LENGTHS
    # The 32 rows of an environment are episodes of 3, 1, 4, 2, 7, 3 and 1 steps, a reset after
    # each, and four steps of the next.
    counted = [(e, t) for e in range(7) for t in range(lengths[e % 5])] + [(7, t) for t in range(4)]
    learnt = Counter(rows[0] + rows[2])
    names = {name for name, _, _ in learnt}
    assert len(names) == 3
    assert learnt == Counter((name, *row) for name in names for row in counted)


def test_smallest_minibatches_have_two_rows_and_stay_finite():
    """One-step episodes, where every second row is a reset: 2 x 2 rows in 2 minibatches."""
    args = ppo.Args(
        env_id="Choice-v0", total_timesteps=100, num_envs=2, num_steps=5, num_minibatches=2
    )
    agent = ppo.train(args, agent_class=pieces.Recording)
    assert min(len(obs) for obs in agent.learnt) == 2
    assert all(x.isfinite().all() for x in agent.state_dict().values())
    with pytest.raises(ppo.InputError, match="two rows"):
        ppo.train(replace(args, num_minibatches=3))


def test_recomputed_advantages():
    """Before each further epoch the rollout is valued anew; the old log-probabilities stay."""
    args = ppo.Args(env_id="Counting-v0", **{**FLAGS, "norm_reward": True})
    with pieces.learner(args) as learner:
        rollout = learner.collect()
    learner.agent.reward_scaler.update(rollout.reward, rollout.valid)
    batch = learner.estimate(rollout)

    def three_epochs(choose):
        """Three updates of one epoch; `choose` makes the later batches of what is valued anew."""
        torch.manual_seed(0)
        other = learner.copy()
        infos = other.update(rollout, batch, update_epochs=1)
        for _ in range(2):
            chosen = choose(other.estimate(rollout))
            infos += other.update(rollout, chosen, update_epochs=1)
        return infos

    anew = three_epochs(lambda new: new._replace(logprob=batch.logprob))
    never = three_epochs(lambda new: batch)
    assert anew != three_epochs(lambda new: new), "the test can tell them apart"
    for recompute, expected in [(True, anew), (False, never)]:
        torch.manual_seed(0)
        flags = {"update_epochs": 3, "recompute_advantages": recompute}
        assert learner.copy().update(rollout, batch, **flags) == expected
    assert anew != never
