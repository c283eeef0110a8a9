"""Atari games, with the real emulator: lives, scores, FIRE, and what is learnt from."""

import contextlib
import dataclasses
import shutil
from pathlib import Path

import ale_py  # noqa: F401 (registers the games)
import gymnasium as gym
import numpy as np
import pieces
import pytest
import torch
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

import ppo

BREAKOUT = "ALE/Breakout-v5"
FIRE = 1


def game(**flags):
    """The arguments of a small run of it."""
    small = {"num_envs": 2, "num_steps": 200, "num_minibatches": 2, "total_timesteps": 400}
    small |= {"update_epochs": 1, "eval_episodes": 0, "run_name": "a"}
    return ppo.Args(env_id=BREAKOUT, **{**ppo.preset(BREAKOUT), **small, **flags})


def test_the_game_goes_on_with_fire_after_a_lost_life():
    """Beside ALE's own version, which is sent FIRE by hand, without sticky actions or clipping."""
    with ppo.closing_envs(ppo.make_envs(game())) as envs:
        plain = gym.make_vec(
            f"ale_py:{BREAKOUT}",
            2,
            "vector_entry_point",
            repeat_action_probability=0.0,
            reward_clipping=False,
        )
        obs, _ = envs.reset(seed=7)
        other, info = plain.reset(seed=7)
        assert np.array_equal(obs, other)
        lives = info["lives"].tolist()
        fire = [False, False]
        seen = [[5], [5]]
        rng = np.random.default_rng(0)
        for _ in range(600):
            action = rng.integers(4, size=2)
            obs, reward, terminated, truncated, info = envs.step(action.copy())
            sent = np.where(fire, FIRE, action)
            other, score, over, cut, truth = plain.step(sent)
            assert np.array_equal(obs, other)
            assert reward.tolist() == score.tolist()
            assert truncated.tolist() == cut.tolist() == [False, False]
            for n in range(2):
                now = int(truth["lives"][n])
                lost = now < lives[n]
                assert terminated[n] == lost
                assert info["life_lost"][n] == (lost and not over[n])
                fire[n] = lost and not over[n]
                if now != lives[n]:
                    seen[n].append(now)
                lives[n] = now
        plain.close()
    for order in seen:
        assert order[:7] == [5, 4, 3, 2, 1, 0, 5], "one recorded game, and the next"


@pytest.mark.parametrize("name", ["Breakout", "Seaquest"])
def test_pixels_and_scores_are_those_of_gymnasiums_wrappers(name):
    """On the same actions, over several games, pixel by pixel.

    Switched off, as the two define it differently: no-ops at the start, of which ALE takes 0 to 30
    and Gymnasium 1 to 30, from generators of their own; and FIRE at the start, which Gymnasium does
    not have, nor after a lost life, where it is sent by hand. Asked of Gymnasium: zeros before the
    first frame, which it would repeat; frames and actions as ALE/...-v5 does not have them.
    """
    env_id = f"ALE/{name}-v5"
    bare = {"noop_max": 0, "use_fire_reset": False}
    args = dataclasses.replace(game(num_envs=1, env_kwargs=bare), env_id=env_id)
    env = gym.make(env_id, frameskip=1, repeat_action_probability=0.0)
    env = AtariPreprocessing(env, noop_max=0)
    env = FrameStackObservation(env, 4, padding_type="zero")
    rng = np.random.default_rng(0)
    games = 0
    with ppo.closing_envs(ppo.make_envs(args)) as envs, contextlib.closing(env):
        obs, _ = envs.reset(seed=3)
        expected, info = env.reset(seed=3)
        assert np.array_equal(obs[0], expected)
        is_over = fire = False
        for _ in range(700):
            action = int(rng.integers(envs.single_action_space.n))
            obs, reward, *_ = envs.step(np.array([action]))
            if is_over:
                expected, info = env.reset()
                score = 0
                is_over = fire = False
                games += 1
            else:
                lives = info["lives"]
                expected, score, is_over, _, info = env.step(FIRE if fire else action)
                fire = info["lives"] < lives and not is_over
            assert np.array_equal(obs[0], expected)
            assert reward[0] == score
    assert games >= 2


class Recorded(gym.vector.VectorWrapper):
    """Keeps what the environments return."""

    def __init__(self, envs):
        super().__init__(envs)
        self.rows = []

    def step(self, action):
        row = self.env.step(action)
        self.rows.append(row)
        return row


@pytest.mark.parametrize("clip_reward", [True, False])
def test_what_is_learnt_from_and_what_is_reported(clip_reward):
    """Signs of rewards up to a lost life, and the score of the whole game, FIRE rows included."""
    with pieces.learner(game(clip_reward=clip_reward, num_steps=150)) as learner:
        learner.envs = Recorded(learner.envs)
        rollouts = [learner.collect() for _ in range(4)]
    reward = np.array([row[1] for row in learner.envs.rows])
    terminated = np.array([row[2] for row in learner.envs.rows])
    life_lost = np.array([row[4]["life_lost"] for row in learner.envs.rows])
    joined = {
        name: torch.cat([getattr(rollout, name) for rollout in rollouts]).numpy()
        for name in ("reward", "terminated", "done", "valid")
    }
    assert np.array_equal(joined["terminated"], terminated)
    assert np.array_equal(joined["done"], terminated)
    assert joined["valid"][0].all()
    assert np.array_equal(joined["valid"][1:], ~terminated[:-1])
    assert reward.max() > 0, "the test needs a score"
    assert np.array_equal(joined["reward"], np.sign(reward) if clip_reward else reward)
    scores = []
    for t, n in np.argwhere(terminated & ~life_lost):
        ends = np.flatnonzero((terminated & ~life_lost)[:t, n])
        start = ends[-1] + 1 if len(ends) else 0
        scores.append((reward[start : t + 1, n].sum(), t + 1 - start - (len(ends) > 0)))
    assert len(scores) > 3
    returns = np.concatenate([rollout.episode_return for rollout in rollouts])
    lengths = np.concatenate([rollout.episode_length for rollout in rollouts])
    assert list(zip(returns, lengths, strict=True)) == scores
    assert life_lost.sum() > 2 * len(scores)


@pytest.mark.parametrize("clip_reward", [True, False])
def test_scores_above_one(clip_reward):
    """In Space Invaders: the environment returns them, and with --clip-reward 1 is learnt from."""
    args = dataclasses.replace(
        game(clip_reward=clip_reward, num_steps=150), env_id="ALE/SpaceInvaders-v5"
    )
    with pieces.learner(args) as learner:
        learner.envs = Recorded(learner.envs)
        rollout = learner.collect()
    reward = np.array([row[1] for row in learner.envs.rows])
    assert reward.max() >= 5
    assert np.array_equal(rollout.reward, np.sign(reward) if clip_reward else reward)


def test_observations_are_stored_as_bytes():
    with pieces.learner(game(num_steps=16)) as learner:
        rollout = learner.collect()
    assert rollout.obs.dtype == torch.uint8
    assert rollout.obs.untyped_storage().nbytes() == 17 * 2 * 4 * 84 * 84


def test_the_flags_of_a_game(command):
    for env_id in (BREAKOUT, f"ale_py:{BREAKOUT}"):
        args = ppo.parse_args(["--env-id", env_id, "--num-envs=4"])
        assert (args.preset, args.vectorization_mode) == ("image", "vector_entry_point")
        assert (args.clip_reward, args.norm_reward, args.num_envs) == (True, False, 4)
        with ppo.closing_envs(ppo.make_envs(args)) as envs:
            assert envs.single_observation_space.shape == (4, 84, 84)
    small = ppo.preset(BREAKOUT, {"img_height": 30})  # too small for the network for images
    assert small["preset"] == "discrete"
    for mode in ("sync", "async"):
        result = command("--env-id", BREAKOUT, "--vectorization-mode", mode)
        assert result.returncode == 2
        assert "--vectorization-mode must be vector_entry_point" in result.stderr
    result = command("--env-id", BREAKOUT, "--capture-video", "--total-timesteps=64")
    assert result.returncode == 2
    assert "cannot be filmed" in result.stderr.splitlines()[-1]


def test_resuming_is_deterministic():
    """Twice from one checkpoint, the same bytes."""
    ppo.train(game())
    shutil.copytree("runs/a", "runs/b")
    for name in "ab":
        ppo.train(game(total_timesteps=800, resume=f"runs/{name}"))
    a, b = (Path(f"runs/{name}/checkpoint.pt").read_bytes() for name in "ab")
    assert a == b


def test_whole_games_are_evaluated():
    """Of raw scores, beyond the first life: as many FIREs as lives are lost, and then the end."""

    class Busy(ppo.Agent):
        """Moves by chance, and counts its actions."""

        acted = 0

        def act(self, obs, greedy=False, generator=None):
            Busy.acted += 1
            return torch.randint(4, (len(obs),), generator=generator)

    args = game(eval_episodes=3)
    ppo.train(args, agent_class=Busy)
    Busy.acted = 0
    returns = ppo.evaluate("runs/a", args, agent_class=Busy)
    assert len(returns) == 3
    assert returns.max() > 0
    assert Busy.acted > 3 * 90, "a life alone takes about 25 steps"


def test_what_games_are_asked_for_in_vain(command):
    """Colours, which are a fourth dimension, and what the version of ALE does not know."""
    for kwargs, part in (
        ('{"grayscale": false}', "dimensions"),
        ('{"size": 5}', "size"),
        ('{"episodic_life": true}', "cannot be played with episodic_life"),
        ('{"continuous": true}', "cannot be played with continuous"),
    ):
        result = command("--env-id", BREAKOUT, "--env-kwargs", kwargs)
        assert result.returncode == 2
        assert part in result.stderr.splitlines()[-1]
        assert "pip install" not in result.stderr
    result = command("--env-id=ALE/Brakeout-v5", "--total-timesteps=64")
    assert result.returncode == 2
    assert "Brakeout" in result.stderr
