"""First episodes that begin with a part of their time limit elapsed, so as not to march in step."""

from collections import Counter

import gymnasium as gym
import numpy as np
import pieces
import probes
import pytest
from gymnasium.wrappers import TimeLimit

import ppo

LIMIT = 40
MODES = pytest.mark.parametrize("mode", ["sync", "async"])


class Limited(probes.Forever):
    """Reward 1 for ever, until a limit that no registry knows of, or none."""

    def __init__(self, limit):
        pass


def make_limited(limit):
    env = Limited(limit)
    return env if limit is None else TimeLimit(env, limit)


class Falling(probes.Forever):
    """Ends by itself after 7 steps, long before the limit."""

    def step(self, action):
        self.t += 1
        return self.observe(), 1.0, self.t == 7, False, {}


class Own(probes.Forever):
    """Knows its limit, without a wrapper, and counts its steps under a name of its own."""

    def __init__(self):
        self._max_episode_steps = 5

    def step(self, action):
        self.t += 1
        return self.observe(), 1.0, False, self.t == 5, {}


class Both(Own):
    """As that, but the limit is said to be none, and the counter can be read alone."""

    def __init__(self):
        self._max_episode_steps = None

    @property
    def _elapsed_steps(self):
        return self.t


gym.register("Both-v0", Both, disable_env_checker=True)
gym.register("Limited-v0", make_limited, disable_env_checker=True)
gym.register("Falling-v0", Falling, disable_env_checker=True, max_episode_steps=1000)
gym.register("Own-v0", Own, disable_env_checker=True)


def roll(iterations, **flags):
    """The rollouts of so many iterations, and the state before each and after the last."""
    args = ppo.Args(**{"num_envs": 64, "num_steps": 4, "env_id": "Limited-v0", **flags})
    with pieces.learner(args) as learner:
        states = [learner.state]
        rollouts = []
        for _ in range(iterations):
            rollouts.append(learner.collect())
            states.append(learner.state)
        attributes = [
            learner.envs.unwrapped.call("has_wrapper_attr", name)
            for name in ("_elapsed_steps", "_max_episode_steps")
            if args.vectorization_mode != "vector_entry_point"
        ]
    return rollouts, states, attributes


def rows_of_ends(rollouts):
    """By environment, the rows, counted from 0 through all rollouts, that ended an episode."""
    done = np.concatenate([rollout.done.numpy() for rollout in rollouts])
    return [np.flatnonzero(column).tolist() for column in done.T]


@MODES
def test_ends_are_spread_over_the_time_limit(mode):
    """From the first iteration on, and for ever; without it they all fall into one."""
    kwargs = {"limit": LIMIT}
    iterations = 4 * (LIMIT + 1) // 4  # of 4 rows: four limits, each with a row that resets
    rollouts, states, _ = roll(iterations, env_kwargs=kwargs, vectorization_mode=mode)
    assert states[0].staggered.sum() > 55, "of 64; by chance one may begin with nothing elapsed"
    ends = [int(rollout.done.sum()) for rollout in rollouts]
    assert min(ends) >= 1
    assert max(ends) <= 20
    for rows in rows_of_ends(rollouts):
        assert 0 <= rows[0] < LIMIT
        assert set(np.diff(rows)) == {LIMIT + 1}, "later episodes have all their steps"
    first = Counter(rows[0] for rows in rows_of_ends(rollouts))
    assert len(first) > 25, "of 40 rows"

    flags = {"env_kwargs": kwargs, "vectorization_mode": mode, "stagger_episodes": False}
    rollouts, states, _ = roll(11, **flags)
    assert not states[0].staggered.any()
    assert [int(rollout.done.sum()) for rollout in rollouts] == [0] * 9 + [64, 0]


def test_both_modes_and_every_time_are_alike_but_not_every_seed():
    def first_ends(mode, seed=1):
        flags = {"env_kwargs": {"limit": LIMIT}, "vectorization_mode": mode, "seed": seed}
        rollouts, _, _ = roll(10, **flags)
        return [rows[0] for rows in rows_of_ends(rollouts)]

    ends = first_ends("sync")
    assert ends == first_ends("sync") == first_ends("async")
    assert ends != first_ends("sync", seed=2)


def test_every_restart_staggers_anew():
    """As with --exact-resume at every checkpoint, and not where it did before."""
    args = ppo.Args(env_id="Limited-v0", env_kwargs={"limit": LIMIT}, num_envs=64)
    with pieces.learner(args) as learner:
        vector = learner.envs.unwrapped
        before = vector.get_attr("_elapsed_steps")
        state = ppo.restart(learner.envs, args, 1, learner.generator)
        after = vector.get_attr("_elapsed_steps")
    assert after != before
    assert state.staggered.tolist() == [elapsed > 0 for elapsed in after]
    assert state.staggered.sum() > 55


@MODES
def test_only_episodes_that_began_with_steps_elapsed_are_left_out(mode):
    """Each environment's first one, unless it began at 0; all later ones are whole."""
    rollouts, states, _ = roll(60, env_kwargs={"limit": 3}, vectorization_mode=mode)
    staggered = states[0].staggered
    assert 30 < staggered.sum() < 55, "two thirds of 64"
    lengths = np.concatenate([rollout.episode_length for rollout in rollouts])
    assert set(lengths) == {3}
    ended = sum(len(rows) for rows in rows_of_ends(rollouts))
    assert len(lengths) == ended - staggered.sum()
    returns = np.concatenate([rollout.episode_return for rollout in rollouts])
    assert returns.tolist() == lengths.tolist()
    for rows, is_staggered in zip(rows_of_ends(rollouts), staggered, strict=True):
        assert (rows[0] < 2) == is_staggered
    assert not states[-1].staggered.any()


def test_two_ends_in_one_rollout():
    """Of the first two episodes of an environment only the second counts."""
    rollouts, states, _ = roll(1, env_kwargs={"limit": 3}, num_steps=7)
    staggered = states[0].staggered
    rows = rows_of_ends(rollouts)
    # With k steps elapsed the ends are in rows 2 - k and 6 - k.
    assert all(len(ends) == 2 for ends in rows)
    assert len(rollouts[0].episode_return) == 2 * 64 - staggered.sum()
    assert set(rollouts[0].episode_length) == {3}
    assert not states[1].staggered.any()


def test_a_staggered_episode_that_ends_by_itself_is_left_out_too():
    rollouts, states, _ = roll(5, env_id="Falling-v0")
    assert states[0].staggered.all()
    assert states[1].staggered.all(), "no episode has ended in 4 rows"
    assert not states[2].staggered.any()
    assert [len(rollout.episode_return) for rollout in rollouts] == [0, 0, 0, 64, 0]


def test_a_run_counts_whole_episodes_only(command):
    """In the console, the log, the returns that are saved, and best.pt."""
    flags = ["--env-id=probes:Forever-v0", "--num-envs=16", "--num-steps=8", "--run-name=a"]
    result = command(*flags, "--total-timesteps=1280", "--eval-episodes=0")
    assert result.returncode == 0, result.stderr
    assert "return 10, length 10" in result.stdout.splitlines()[-2]
    checkpoint = ppo.load("runs/a")
    assert set(checkpoint["returns"]) == set(checkpoint["lengths"]) == {10.0}
    for tag in ("charts/episodic_return_min", "charts/episodic_length"):
        assert set(pieces.values("runs/a", tag)) == {10.0}


@pytest.mark.parametrize(
    ("env_id", "mode", "kwargs"),
    [
        ("Limited-v0", "sync", {"limit": None}),
        ("Limited-v0", "async", {"limit": None}),
        ("Own-v0", "sync", {}),
        ("Own-v0", "async", {}),
        ("Both-v0", "sync", {}),
        ("Both-v0", "async", {}),
        ("CartPole-v1", "vector_entry_point", {}),
    ],
)
def test_what_has_no_time_limit_wrapper_is_left_alone(env_id, mode, kwargs):
    """It goes on, and has no attribute that it had not before."""
    flags = {"env_id": env_id, "vectorization_mode": mode, "env_kwargs": kwargs}
    rollouts, states, attributes = roll(3, **flags)
    assert not states[0].staggered.any()
    if attributes:
        assert attributes[0] == (env_id == "Both-v0",) * 64, "_elapsed_steps"
    if env_id in ("Own-v0", "Both-v0"):
        assert rows_of_ends(rollouts) == [[4, 10]] * 64


def test_the_learnt_value_is_that_of_a_reward_for_ever():
    """1 / (1 - gamma), as what only a limit ends goes on: also where we have moved the limit."""
    flags = {"num_envs": 16, "num_steps": 32, "learning_rate": 1e-2, "num_minibatches": 2}
    flags |= {"norm_reward": False, "clip_vloss": False, "gamma": 0.9, "run_name": "a"}
    args = ppo.Args(env_id="Forever-v0", total_timesteps=60_000, eval_episodes=0, **flags)
    agent = ppo.train(args)
    _, value = agent(ppo.torch.zeros(1, 1))
    assert value.item() == pytest.approx(10, rel=0.02)
