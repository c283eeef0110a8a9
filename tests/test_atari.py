"""Atari games, with the real emulator: lives, scores, FIRE, films, and what is learnt from."""

import functools
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import ale_py
import gymnasium as gym
import numpy as np
import pieces
import pytest
import torch
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

import ppo

gym.register_envs(ale_py)
FIRE = 1


def game(name="Breakout", **flags):
    """The arguments of a small run of it."""
    args = ppo.parse_args(["--env-id", f"ALE/{name}-v5"])
    small = {"num_envs": 2, "num_steps": 200, "num_minibatches": 2, "total_timesteps": 400}
    small |= {"update_epochs": 1, "eval_episodes": 0, "run_name": "a"}
    return replace(args, **{**small, **flags})


def by_hand(name, frameskip=4):
    """The game as Gymnasium's own wrappers prepare it, one environment."""
    env = gym.make(f"ALE/{name}-v5", frameskip=1, repeat_action_probability=0.0)
    env = AtariPreprocessing(env, noop_max=0, frame_skip=frameskip)
    return FrameStackObservation(env, 4, padding_type="zero")


@pytest.fixture
def bare_films(monkeypatch):
    """Films of games that begin as `by_hand` has them: no no-ops, zeros before the first frame."""
    prepare = functools.partial(AtariPreprocessing, noop_max=0)
    stack = functools.partial(FrameStackObservation, padding_type="zero")
    monkeypatch.setattr(gym.wrappers, "AtariPreprocessing", prepare)
    monkeypatch.setattr(gym.wrappers, "FrameStackObservation", stack)


@pytest.mark.parametrize(
    ("name", "kwargs"), [("Breakout", {}), ("Seaquest", {}), ("Breakout", {"frameskip": 2})]
)
def test_pixels_and_scores_are_those_of_gymnasiums_wrappers(name, kwargs, bare_films):
    """On the same actions, over several games, pixel by pixel; so are films, in the first game.

    Switched off, as ALE and Gymnasium define it differently: no-ops at the start, of which ALE
    takes 0 to 30 and Gymnasium 1 to 30, from generators of their own; and FIRE at the start, which
    is sent here, but for a film. After a lost life it is sent to Gymnasium's wrappers by hand.
    """
    bare = game(name, env_kwargs={**kwargs, "noop_max": 0, "use_fire_reset": False})
    filmed = replace(bare, env_kwargs=kwargs)
    rng = np.random.default_rng(0)
    games = lost_lives = 0
    with (
        closing(ppo.make_envs(bare, 1)) as envs,
        closing(ppo.make_envs(filmed, 1, "films/x")) as film,
        closing(by_hand(name, **kwargs)) as env,
    ):
        obs, _ = envs.reset(seed=3)
        film_obs, _ = film.reset(seed=3)
        expected, info = env.reset(seed=3)
        assert np.array_equal(obs[0], expected)
        fire, over = True, False
        score = length = 0
        for t in range(700):
            sent = int(rng.integers(envs.single_action_space.n))
            action = FIRE if fire else sent
            obs, reward, terminated, truncated, _ = envs.step(np.array([sent if t else FIRE]))
            if over:
                games += 1
                expected, info = env.reset()
                gain, over, fire = 0, False, False
                score = length = 0
            else:
                lives = info["lives"]
                expected, gain, over, _, info = env.step(action)
                fire = info["lives"] < lives and not over
                lost_lives += fire
                score, length = score + gain, length + 1
            assert np.array_equal(obs[0], expected)
            assert (reward[0], terminated[0], truncated[0]) == (gain, fire or over, False)
            assert envs.episode_count == games + over, "statistics are of whole games"
            if over:
                assert (envs.return_queue[-1], envs.length_queue[-1]) == (score, length)
            if games == 0:
                film_obs, film_reward, film_terminated, *_ = film.step(np.array([sent]))
                assert np.array_equal(film_obs[0], expected)
                assert (film_reward[0], film_terminated[0]) == (gain, fire or over)
        (frame,) = film.render()
    assert frame.shape == (210, 160, 3)
    assert (frame[..., 0] != frame[..., 2]).any(), "in colour"
    if not kwargs:
        assert lost_lives >= 2
        assert games >= 1


def test_games_begin_as_ale_has_them():
    """With no-ops and FIRE; without sticky actions, but if they are asked for, in films as well."""
    options = {"repeat_action_probability": 0.0, "reward_clipping": False}
    plain = gym.make_vec("ALE/Breakout-v5", 2, "vector_entry_point", **options)
    sticky = game(env_kwargs={"repeat_action_probability": 0.25})
    with (
        closing(plain),
        closing(ppo.make_envs(game(), 2)) as envs,
        closing(ppo.make_envs(sticky, 2)) as sticky_envs,
        closing(ppo.make_envs(sticky, 1, "films/x")) as film,
    ):
        assert np.array_equal(plain.reset(seed=7)[0], envs.reset(seed=7)[0])
        sticky_envs.reset(seed=7)
        rng = np.random.default_rng(0)
        differs = False
        for _ in range(20):
            action = rng.integers(4, size=2)
            obs = plain.step(action)[0]
            assert np.array_equal(envs.step(action)[0], obs)
            differs = differs or not np.array_equal(sticky_envs.step(action)[0], obs)
        assert differs
        emulator = film.unwrapped.envs[0].unwrapped.ale
        assert emulator.getFloat("repeat_action_probability") == 0.25


class Random(ppo.Agent):
    """Moves by chance, which takes less time, and counts its actions."""

    acted = 0

    def act(self, obs, noise=None):
        Random.acted += len(obs)
        return torch.randint(4, (len(obs),))


class Recorded(gym.vector.VectorWrapper):
    """Keeps what the environments return."""

    def __init__(self, envs):
        super().__init__(envs)
        self.rows = []

    def step(self, action):
        row = self.env.step(action)
        self.rows.append(row)
        return row


@pytest.mark.parametrize(("name", "clip_reward"), [("Breakout", False), ("SpaceInvaders", True)])
def test_what_is_learnt_from_and_what_is_reported(name, clip_reward):
    """Raw rewards or their signs up to a lost life; and scores of whole games, FIRE rows too."""
    with pieces.learner(game(name, clip_reward=clip_reward, num_steps=400), Random) as learner:
        learner.envs = Recorded(learner.envs)
        rollouts = [learner.collect() for _ in range(3)]
        reported = list(learner.envs.env.return_queue)
    reward = np.array([row[1] for row in learner.envs.rows])
    terminated = np.array([row[2] for row in learner.envs.rows])
    lives = np.array([row[4]["lives"] for row in learner.envs.rows])
    joined = {
        name: torch.cat([getattr(rollout, name) for rollout in rollouts]).numpy()
        for name in ("reward", "terminated", "done", "valid")
    }
    assert rollouts[0].obs.dtype == torch.uint8
    assert np.array_equal(joined["terminated"], terminated)
    assert np.array_equal(joined["done"], terminated)
    assert np.array_equal(joined["valid"][1:], ~terminated[:-1])
    assert terminated.sum() > (lives == 0).sum() > 0
    assert reward.max() > (1 if clip_reward else 0), "the test needs a score"
    assert np.array_equal(joined["reward"], np.sign(reward) if clip_reward else reward)
    scores = []
    score = np.zeros(2)
    for t, n in np.ndindex(reward.shape):
        score[n] += reward[t, n]
        if lives[t, n] == 0 and terminated[t, n]:
            scores.append(score[n])
            score[n] = 0
    assert len(scores) >= 2
    assert reported == scores


def test_whole_games_are_evaluated_and_filmed():
    """Of raw scores, beyond the first life: as many FIREs as lives are lost, and then the end."""

    args = game(eval_episodes=2, capture_video=True, total_timesteps=64, num_steps=32)
    Random.acted = 0
    agent = ppo.train(args, agent_class=Random)
    assert len(agent.eval_returns) == 2
    assert Random.acted - 64 > 2 * 90, "a life alone takes about 25 steps"
    names = [f"step-64-episode-{n}.mp4" for n in (0, 1)]
    files = {path.name for path in Path(agent.folder, "videos").iterdir()}
    assert set(names) <= files


def test_what_games_are_asked_for(command):
    for env_id in ("ALE/Breakout-v5", "ale_py:ALE/Breakout-v5"):
        args = ppo.parse_args(["--env-id", env_id, "--num-envs=4"])
        assert args.vectorization_mode == "vector_entry_point"
        assert (args.clip_reward, args.norm_reward, args.num_envs) == (True, False, 4)
        assert args.norm_obs is False
    for flags, part in (
        (["--vectorization-mode=sync"], "--vectorization-mode must be vector_entry_point"),
        (["--env-kwargs", '{"size": 5}'], "size"),
    ):
        result = command("--env-id=ALE/Breakout-v5", "--total-timesteps=64", *flags)
        assert result.returncode == 2, (flags, result.stderr)
        assert part in result.stderr.splitlines()[-1]
    result = command("--env-id=ALE/Brakeout-v5", "--total-timesteps=64")
    assert result.returncode == 2
    assert "Brakeout" in result.stderr
