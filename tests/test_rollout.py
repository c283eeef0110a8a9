"""Rollouts and minibatches: every transition and no reset, bootstrapped from where it led to."""

import copy
import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pieces
import probes
import pytest
import torch

import ppo

RAW = {"norm_obs": False, "norm_reward": False, "norm_adv": False}
FLAGS = {"num_envs": 3, "num_steps": 16, **RAW}
TERMINATED = ("terminated", "both")
TRUNCATED = ("truncated", "both")


class Account:
    """The rewards of one environment's episode so far, and what a row should hold of them."""

    def __init__(self):
        self.rewards = []

    def enter(self, kind, reward):
        """The discounted return, return and length up to a row that ended as `kind` says.

        It is None where the row only reset.
        """
        self.rewards = [] if kind is None else [*self.rewards, reward]
        age = len(self.rewards)
        discounted = sum(0.9 ** (age - 1 - i) * r for i, r in enumerate(self.rewards))
        return discounted, sum(self.rewards), age


def check_rollout(rollout, kinds, rewards, accounts):
    """Compare a rollout with how each row (T, N) ended, None for a reset, and what it gave."""
    ended = []
    for t, n in np.ndindex(rollout.reward.shape):
        kind = kinds[t][n]
        assert rollout.valid[t, n].item() == (kind is not None)
        assert rollout.terminated[t, n].item() == (kind in TERMINATED)
        assert rollout.done[t, n].item() == (kind in TERMINATED + TRUNCATED)
        assert rollout.reward[t, n].item() == pytest.approx(rewards[t][n], abs=1e-6)
        discounted, total, age = accounts[n].enter(kind, rewards[t][n])
        assert rollout.discounted_return[t, n].item() == pytest.approx(discounted, abs=1e-6)
        if kind in TERMINATED + TRUNCATED:
            ended.append((total, age))
    assert rollout.episode_return.tolist() == pytest.approx([total for total, _ in ended], abs=1e-6)
    assert rollout.episode_length.tolist() == [age for _, age in ended]


@torch.no_grad()
def lambda_returns(obs, rewards, kinds, next_obs, agent, args):
    """Lambda returns and values of one environment's rows, from the last to the first.

    Where a row only reset the environment, kinds is None, and so is its return.
    """
    value = agent(torch.as_tensor(np.array(obs), dtype=torch.float32))[1].tolist()
    next_value = agent(torch.as_tensor(np.array(next_obs), dtype=torch.float32))[1].tolist()
    returns = [None] * len(obs)
    following = None
    for t in reversed(range(len(obs))):
        if kinds[t] is None:
            following = None
            continue
        if kinds[t] in TERMINATED:
            returns[t] = rewards[t]
        elif kinds[t] in TRUNCATED or following is None:
            returns[t] = rewards[t] + args.gamma * next_value[t]
        else:
            mixed = (1 - args.gae_lambda) * next_value[t] + args.gae_lambda * following
            returns[t] = rewards[t] + args.gamma * mixed
        following = returns[t]
    return returns, value


def check_batch(batch, rollout, kinds, rewards, next_obs, agent, args):
    """Compare a batch with lambda returns by hand; every real transition is in it, once."""
    expected = {}
    for n in range(args.num_envs):
        obs = rollout.obs[:-1, n].numpy()
        column = (
            [row[n] for row in rewards],
            [row[n] for row in kinds],
            [row[n] for row in next_obs],
        )
        returns, value = lambda_returns(obs, *column, agent, args)
        for t in range(args.num_steps):
            if returns[t] is not None:
                action = rollout.action[t, n].item()
                expected[obs[t].tobytes()] = (returns[t], value[t], action)
    assert sorted(row.numpy().tobytes() for row in batch.obs) == sorted(expected)
    for i, row in enumerate(batch.obs):
        target, value, action = expected[row.numpy().tobytes()]
        assert batch.target[i].item() == pytest.approx(target, abs=1e-4)
        assert batch.value[i].item() == pytest.approx(value, abs=1e-5)
        assert batch.advantage[i].item() == pytest.approx(target - value, abs=1e-4)
        assert batch.action[i].item() == action
    with torch.no_grad():
        logprob = agent(batch.obs)[0].log_prob(batch.action)
    torch.testing.assert_close(batch.logprob, logprob)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_counting_environment(mode):
    """Over three rollouts, between which the agent changes and the episodes go on."""
    args = ppo.Args(
        env_id="Counting-v0", vectorization_mode=mode, gamma=0.9, learning_rate=1e-2, **FLAGS
    )
    Env = probes.Counting
    accounts = [Account() for _ in range(3)]
    position = [(0, 0)] * 3  # episode and step of each environment
    ends = Counter()
    with pieces.learner(args) as learner:
        names = learner.state.obs[:, 0].tolist()
        assert len(set(names)) == 3
        for _ in range(3):
            rollout = learner.collect()
            kinds, rewards, next_obs = [], [], []
            for t in range(args.num_steps):
                assert rollout.obs[t].tolist() == [[names[n], *position[n]] for n in range(3)]
                kinds.append([])
                rewards.append([])
                for n, (episode, step) in enumerate(position):
                    length = Env.LENGTHS[episode % 5]
                    if step == length:  # the final observation: this row resets
                        kinds[t].append(None)
                        rewards[t].append(0.0)
                        position[n] = (episode + 1, 0)
                    else:
                        last = step + 1 == length
                        kinds[t].append(Env.ENDS[episode % 3] if last else "")
                        rewards[t].append(Env.reward(episode, step + 1))
                        position[n] = (episode, step + 1)
                next_obs.append([(names[n], *position[n]) for n in range(3)])
                ends.update(kinds[t])
            assert rollout.obs[-1].tolist() == [list(x) for x in next_obs[-1]]
            check_rollout(rollout, kinds, rewards, accounts)
            batch = learner.estimate(rollout)
            check_batch(batch, rollout, kinds, rewards, next_obs, learner.agent, args)
            learner.update(rollout, batch)
    assert set(ends) == {None, "", "terminated", "truncated", "both"}


def cartpole_dynamics(obs, action):
    """The next state of CartPole, from its equations of motion."""
    _, x_dot, theta, theta_dot = obs
    force = 10.0 if action == 1 else -10.0
    cos = np.cos(theta)
    sin = np.sin(theta)
    temp = (force + 0.05 * theta_dot**2 * sin) / 1.1
    theta_acc = (9.8 * sin - cos * temp) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
    x_acc = temp - 0.05 * theta_acc * cos / 1.1
    change = np.array([x_dot, x_acc, theta_dot, theta_acc])
    return obs + 0.02 * change


@pytest.mark.parametrize("mode", ["sync", "vector_entry_point"])
def test_cartpole(mode):
    """With a limit of 18 steps some episodes fall before it and others are cut by it."""
    args = ppo.Args(
        env_kwargs={"max_episode_steps": 18},
        vectorization_mode=mode,
        gamma=0.9,
        num_envs=3,
        num_steps=127,
        stagger_episodes=False,
        **RAW,
    )
    accounts = [Account() for _ in range(3)]
    age = [0] * 3  # None where the next row resets
    ends = Counter()
    with pieces.learner(args) as learner:
        for _ in range(2):
            rollout = learner.collect()
            obs = rollout.obs.double().numpy()
            kinds, rewards, next_obs = [], [], []
            for t in range(args.num_steps):
                kinds.append([])
                rewards.append([])
                next_obs.append([])
                for n in range(3):
                    if age[n] is None:
                        assert np.abs(obs[t + 1, n]).max() <= 0.05
                        kinds[t].append(None)
                        rewards[t].append(0.0)
                        next_obs[t].append(obs[t + 1, n])
                        age[n] = 0
                        continue
                    led_to = cartpole_dynamics(obs[t, n], rollout.action[t, n].item())
                    np.testing.assert_allclose(obs[t + 1, n], led_to, atol=1e-5)
                    age[n] += 1
                    fallen = abs(led_to[2]) > 12 * 2 * np.pi / 360
                    kind = "terminated" if fallen else ""
                    if age[n] == 18:
                        kind = "both" if fallen else "truncated"
                    kinds[t].append(kind)
                    rewards[t].append(1.0)
                    next_obs[t].append(led_to)
                    if kind:
                        age[n] = None
                ends.update(kinds[t])
            check_rollout(rollout, kinds, rewards, accounts)
            batch = learner.estimate(rollout)
            check_batch(batch, rollout, kinds, rewards, next_obs, learner.agent, args)
    assert ends["terminated"] > 0
    assert ends["truncated"] > 0


def test_running_sums_of_two_environments():
    """Row 2 resets the first of them; before row 0 the sums were 8 and 0."""
    x = np.array([[1.0, 10.0], [2.0, 20.0], [0.0, 30.0], [4.0, 40.0]])
    valid = np.array([[True, True], [True, True], [False, True], [True, True]])
    last = np.array([8.0, 0.0])
    sums = ppo.running_sums(x, valid, 1.0, last)
    assert sums.tolist() == [[9.0, 10.0], [11.0, 30.0], [0.0, 60.0], [4.0, 100.0]]
    sums = ppo.running_sums(x, valid, 0.5, last)
    assert sums.tolist() == [[5.0, 10.0], [4.5, 25.0], [0.0, 42.5], [4.0, 61.25]]
    sums = ppo.running_sums(valid, valid, 1.0, last)
    assert sums.tolist() == [[9.0, 1.0], [10.0, 2.0], [0.0, 3.0], [1.0, 4.0]]


def test_a_rollout_only_acts():
    """One batch of N observations a step goes through the policy, and nothing through the rest."""
    args = ppo.Args(env_id="Counting-v0", **FLAGS)
    with pieces.learner(args, pieces.Recording) as learner:
        rollout = learner.collect()
        assert len(learner.agent.acted) == args.num_steps
        assert torch.equal(torch.stack(learner.agent.acted), rollout.obs[:-1])
        assert learner.agent.valued == learner.agent.learnt == []


def test_no_reset_reaches_the_loss_of_a_whole_run():
    """Counting's observations are (environment, episode, step); at its length a row only resets."""
    args = ppo.Args(env_id="Counting-v0", total_timesteps=96, update_epochs=2, **FLAGS)
    agent = ppo.train(args, agent_class=pieces.Recording)
    learnt = Counter(tuple(row) for obs in agent.learnt for row in obs.tolist())
    lengths = probes.Counting.LENGTHS
    # The 32 rows of an environment are episodes of 3, 1, 4, 2, 7, 3 and 1 steps, a reset after
    # each, and four steps of the next.
    counted = [(e, t) for e in range(7) for t in range(lengths[e % 5])] + [(7, t) for t in range(4)]
    names = {name for name, _, _ in learnt}
    assert set(learnt) == {(name, *row) for name in names for row in counted}
    assert len(names) == 3
    assert set(learnt.values()) == {2}, "once an epoch"


def indexed_batch(rows):
    """A batch whose k-th field is k + 1 times the row's index."""
    index = torch.arange(rows)
    fields = range(1, len(ppo.Minibatch._fields) + 1)
    return ppo.Minibatch._make(index * k for k in fields)


@pytest.mark.parametrize(("rows", "count"), [(12, 1), (12, 4), (37, 3), (37, 5), (38, 7), (8, 4)])
def test_minibatches_have_every_row_once(rows, count):
    generator = torch.Generator().manual_seed(0)
    parts = list(ppo.minibatches(indexed_batch(rows), count, generator))
    assert len(parts) == count
    sizes = [len(part.obs) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert sorted(torch.cat([part.obs for part in parts]).tolist()) == list(range(rows))
    for part in parts:
        for k, field in enumerate(part, start=1):
            assert torch.equal(field, k * part.obs), "fields of a row stay together"


def test_minibatches_keep_shapes_and_types():
    batch = ppo.Minibatch(
        obs=torch.randn(10, 2, 3),
        action=torch.arange(20).view(10, 2),
        logprob=torch.arange(10.0),
        value=torch.arange(10.0),
        advantage=torch.arange(10.0),
        target=torch.arange(10.0),
    )
    for part in ppo.minibatches(batch, 4, torch.Generator()):
        rows = part.target.long()
        for field, whole in zip(part, batch, strict=True):
            assert field.dtype == whole.dtype
            assert torch.equal(field, whole[rows])


def test_minibatches_are_drawn_from_the_generator():
    """The same from the same seed, anew each time, and without the global generator."""

    def order(generator):
        parts = ppo.minibatches(indexed_batch(100), 4, generator)
        return torch.cat([part.obs for part in parts]).tolist()

    before = torch.random.get_rng_state()
    generator = torch.Generator().manual_seed(3)
    first = order(generator)
    second = order(generator)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(0)
    generator.manual_seed(3)
    assert order(generator) == first
    assert order(generator) == second
    assert list(range(100)) != first != second
    assert order(generator.manual_seed(4)) != first


@pytest.mark.parametrize("num_minibatches", [1, 3, 5, 7])
def test_every_valid_row_once_an_epoch(num_minibatches):
    """In 4 epochs, shuffled anew for each; 3 x 15 rows less the resets are seldom divisible."""
    args = ppo.Args(
        env_id="Counting-v0",
        num_minibatches=num_minibatches,
        update_epochs=4,
        **{**FLAGS, "num_steps": 15},
    )
    with pieces.learner(args, pieces.Recording) as learner:
        rollout = learner.collect()
        learner.update(rollout, learner.estimate(rollout))
    learnt = [[tuple(row) for row in obs.tolist()] for obs in learner.agent.learnt]
    assert len(learnt) == 4 * num_minibatches
    sizes = [len(part) for part in learnt]
    assert max(sizes) - min(sizes) <= 1
    starts = range(0, len(learnt), num_minibatches)
    epochs = [list(itertools.chain(*learnt[i : i + num_minibatches])) for i in starts]
    valid = [tuple(row) for row in rollout.obs[:-1][rollout.valid].tolist()]
    assert len(set(valid)) == len(valid)
    for epoch in epochs:
        assert sorted(epoch) == sorted(valid)
    assert epochs[0] != epochs[1]


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


def test_values_come_in_chunks_of_the_whole():
    """5,001 x 2 rows, by parts of them and by one pass over all."""
    torch.manual_seed(0)
    T = 5001
    args = ppo.Args(**RAW)
    agent = pieces.Recording(ppo.spaces.Box(-1, 1, (2,)), ppo.spaces.Discrete(3), args)
    zeros = torch.zeros(T, 2)
    rollout = ppo.Rollout(
        obs=torch.randn(T + 1, 2, 2),
        action=torch.randint(3, (T, 2)),
        reward=torch.randn(T, 2),
        terminated=zeros.bool(),
        done=zeros.bool(),
        valid=zeros == 0,
        discounted_return=zeros,
        episode_return=np.zeros(0),
        episode_length=np.zeros(0),
    )
    batch = ppo.estimate_advantages(agent, rollout, args)
    assert max(len(obs) for obs in agent.valued) == 1024
    with torch.no_grad():
        dist, value = agent(rollout.obs.flatten(0, 1))
        logprob = dist._replace(logp=dist.logp[:-2]).log_prob(rollout.action.flatten())
    value = value.view(T + 1, 2)
    torch.testing.assert_close(batch.value, value[:-1].flatten())
    torch.testing.assert_close(batch.logprob, logprob)
    last = rollout.reward[-1] + args.gamma * value[-1]
    torch.testing.assert_close(batch.target[-2:], last)
    assert not any(x.requires_grad for x in batch)


@pytest.mark.parametrize(("size", "rows"), [(17, 1024), (84 * 84 * 4, 283), (9_000_000, 1)])
def test_chunks_hold_a_bounded_number_of_numbers(size, rows):
    """Eight million, but for single observations that have more: 2,000 rows without memory."""
    chunks = []

    def agent(obs):
        chunks.append(len(obs))
        return ppo.Categorical(torch.zeros(len(obs), 2)), torch.zeros(len(obs))

    zeros = torch.zeros(1000, 2)
    fields = dict.fromkeys(ppo.Rollout._fields, zeros)
    obs = torch.zeros(1).expand(1001, 2, size)
    rollout = ppo.Rollout(**{**fields, "obs": obs, "action": zeros.long()})
    logprob, value = ppo.logprob_and_value(agent, rollout)
    assert logprob.shape == (1000, 2)
    assert value.shape == (1001, 2)
    assert max(chunks[:-1]) == rows  # the last observations come together


@pytest.mark.parametrize("norm_reward", [False, True])
def test_recomputed_advantages(norm_reward):
    """Before each further epoch the rollout is valued anew; the old log-probabilities stay."""
    args = ppo.Args(
        env_id="Counting-v0", learning_rate=1e-2, **{**FLAGS, "norm_reward": norm_reward}
    )
    with pieces.learner(args) as learner:
        rollout = learner.collect()
    if norm_reward:
        learner.agent.return_stats.update(rollout.discounted_return[rollout.valid])
    batch = learner.estimate(rollout)

    def three_epochs(choose):
        """Three updates of one epoch; `choose` makes the later batches of what is valued anew."""
        other = learner.copy()
        infos = other.update(rollout, batch, update_epochs=1)
        for _ in range(2):
            chosen = choose(other.estimate(rollout))
            infos += other.update(rollout, chosen, update_epochs=1)
        return infos

    expected = three_epochs(lambda new: new._replace(logprob=batch.logprob))
    wrong = [
        three_epochs(lambda new: new),
        three_epochs(lambda new: batch),
        three_epochs(lambda new: batch._replace(value=new.value)),
        three_epochs(lambda new: new._replace(logprob=batch.logprob, value=batch.value)),
    ]
    assert expected not in wrong, "the test can tell them apart"
    stats = copy.deepcopy(learner.agent.return_stats)
    infos = learner.copy().update(rollout, batch, update_epochs=3, recompute_advantages=True)
    assert infos == expected
    infos = learner.copy().update(rollout, batch, update_epochs=3, recompute_advantages=False)
    assert infos == wrong[1]
    infos = learner.update(rollout, batch, update_epochs=3, recompute_advantages=True)
    if norm_reward:
        assert stats.state_dict() == learner.agent.return_stats.state_dict(), "the same rewards"
