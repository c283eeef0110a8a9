"""First episodes that begin with a part of their time limit elapsed, so as not to march in step."""

from collections import Counter

import failing  # noqa: F401 (registers the environments)
import gymnasium as gym
import numpy as np
import probes
import pytest

import ppo

LIMIT = 40
gym.register("Limited-v0", probes.Forever, disable_env_checker=True, max_episode_steps=LIMIT)


def ends(rows, step=0, **flags):
    """By environment, the rows, counted from 0, that ended an episode."""
    args = ppo.Args(**{"env_id": "Limited-v0", "num_envs": 64, **flags})
    done = []
    with ppo.open_envs(args) as envs:
        ppo.reset(envs, args, step)
        for _ in range(rows):
            _, _, terminated, truncated, _ = envs.step(np.zeros(args.num_envs, int))
            done.append(terminated | truncated)
    return [np.flatnonzero(column).tolist() for column in np.array(done).T]


@pytest.mark.parametrize(("mode", "num_envs"), [("sync", 64), ("async", 6)])
def test_first_ends_are_spread_over_the_time_limit(mode, num_envs):
    """Later episodes have all their steps, and a row that resets; without the flag all have."""
    flags = {"vectorization_mode": mode, "num_envs": num_envs}
    rows = ends(3 * (LIMIT + 1), **flags)
    assert all(0 <= x[0] < LIMIT for x in rows)
    assert all(set(np.diff(x)) == {LIMIT + 1} for x in rows)
    first = Counter(x[0] for x in rows)
    assert len(first) > num_envs / 3, "half of them differ, by chance"
    assert rows == ends(3 * (LIMIT + 1), **flags)
    assert rows != ends(3 * (LIMIT + 1), seed=2, **flags)
    assert rows != ends(3 * (LIMIT + 1), step=512, **flags), "a resumed run has others"
    marching = ends(LIMIT + 1, stagger_episodes=False, **flags)
    assert marching == [[LIMIT - 1]] * num_envs


@pytest.mark.parametrize("mode", ["sync", "async", "vector_entry_point"])
def test_what_has_no_time_limit_of_gymnasiums_is_left_alone(mode):
    """A wrapper that is called SomethingTimeLimit, and a vector version of its own."""
    is_native = mode == "vector_entry_point"
    env_id = "Native-v0" if is_native else "failing:Wrapped-v0"
    flags = {"env_id": env_id, "vectorization_mode": mode, "num_envs": 3}
    rows = ends(30, **flags)
    assert is_native or rows == [[]] * 3
    assert rows == ends(30, **flags, stagger_episodes=False)


def test_a_limit_in_env_kwargs_counts():
    """In place of the registered one, of which most parts are longer; -1 means none."""
    first = Counter(x[0] for x in ends(10, env_kwargs={"max_episode_steps": 10}))
    assert max(first.values()) < 20
    assert ends(10, env_kwargs={"max_episode_steps": -1}) == [[]] * 64


def test_an_evaluation_plays_whole_episodes():
    flags = {"num_steps": 16, "total_timesteps": 128, "eval_episodes": 3}
    assert ppo.train(ppo.Args(env_id="Limited-v0", **flags)).eval_returns.tolist() == [40.0] * 3
