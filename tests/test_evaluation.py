"""What a run has learnt, afterwards: evaluation, video, and the agent on its own."""

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import failing  # noqa: F401 (registers the environments)
import gymnasium as gym
import numpy as np
import probes
import pytest
import torch
from gymnasium import spaces
from moviepy import VideoFileClip
from test_checkpoints import SMALL, differing, files, saved
from test_cli import curves, env_flags

import ppo

FLAGS = {**SMALL, "total_timesteps": 64}


def evaluated(command, *flags):
    """The line that an evaluation of runs/a prints of its returns, and the mean in it."""
    result = command("--evaluate=runs/a", *flags)
    assert (result.returncode, result.stderr) == (0, "")
    line = result.stdout.splitlines()[-1]
    return line, float(line.split()[2])


# --- Returns --------------------------------------------------------------------------------------
def test_the_returns_the_line_and_the_scalar(command):
    """Raw returns of differently seeded episodes, whatever the scaling; the same each time."""
    probes.Dice.rewards.clear()
    agent = ppo.train(ppo.Args(**{**FLAGS, "env_id": "Dice-v0", "eval_episodes": 7}))
    rewards = probes.Dice.rewards[-7:]
    assert agent.eval_returns.tolist() == rewards
    assert len(set(rewards)) == 7
    before = files("runs")
    statistics = f"mean {np.mean(rewards):.5g} std {np.std(rewards):.5g}"
    extremes = f"min {min(rewards):.5g} max {max(rewards):.5g}"
    expected = f"eval: {statistics} {extremes} (7 episodes, greedy)"
    point = [(64, pytest.approx(np.mean(rewards)))]
    assert evaluated(command) == (expected, pytest.approx(np.mean(rewards), rel=1e-4))
    assert curves()["eval/episodic_return"] == point * 2
    Path("elsewhere").mkdir()
    shutil.copy("runs/a/checkpoint.pt", "elsewhere/x.pt")
    assert command("--evaluate", "elsewhere/x.pt").stdout.splitlines()[-1] == expected
    assert curves("elsewhere")["eval/episodic_return"] == point
    assert all(x in files("runs") for x in before), "all but TensorBoard's log stays as it is"
    line, mean = evaluated(command, "--eval-episodes=5", "--seed=2", "--eval-stochastic")
    assert line.endswith("(5 episodes, stochastic)")
    assert mean != pytest.approx(np.mean(rewards), rel=1e-3)


def test_greedy_and_stochastic(command):
    """A policy that has learnt nothing prefers an action by a hair: always so, or half the time."""
    ppo.train(ppo.Args(**FLAGS, env_id="Choice-v0", learning_rate=0.0))
    line, _ = evaluated(command, "--eval-episodes=40")
    assert re.match(r"eval: mean -?1 std 0 ", line)
    flags = ["--eval-stochastic", "--eval-episodes=40"]
    line, mean = evaluated(command, *flags)
    assert abs(mean) < 0.5
    assert evaluated(command, *flags)[0] == line, "a sample, but the same each time"


def test_statistics_are_frozen_and_needed(command):
    """Without them the agent is lost: it reads 497 and 503, and has learnt to tell -1 from 1."""
    flags = {"env_id": "Shifted-v0", "total_timesteps": 8192, "num_steps": 64}
    agent = ppo.train(ppo.Args(**{**FLAGS, **flags, "eval_episodes": 60}))
    assert set(agent.eval_returns) == {1.0}
    assert differing(agent.state_dict(), saved()["agent"]) == []
    checkpoint = saved()
    fresh = ppo.RunningStats((1,)).state_dict()
    checkpoint["agent"].update({f"obs_stats.{name}": value for name, value in fresh.items()})
    torch.save(checkpoint, "runs/a/checkpoint.pt")
    assert evaluated(command)[1] < 0.5


def test_an_episode_that_goes_on_for_ever_is_cut():
    """After 10,000 steps, with reward 1 in each; the next one begins anew."""
    args = ppo.Args(**{**FLAGS, "env_id": "Endless-v0", "eval_episodes": 2})
    assert ppo.train(args).eval_returns.tolist() == [10_000.0] * 2


def test_other_vectorization_modes():
    """Worker processes play the episodes that this process plays; a vector version has its own."""
    args = ppo.Args(**{**FLAGS, "env_id": "Dice-v0", "eval_episodes": 3})
    returns = [
        ppo.train(replace(args, run_name=mode, vectorization_mode=mode)).eval_returns.tolist()
        for mode in ("sync", "async")
    ]
    assert returns[0] == returns[1]
    native = replace(args, env_id="Native-v0", vectorization_mode="vector_entry_point")
    assert len(ppo.train(native).eval_returns) == 3


# --- Agents on their own, and those of other classes ----------------------------------------------
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_load_agent(env_id):
    """It acts, values and scales as the one that was trained, also after its run has moved."""
    trained = ppo.train(ppo.Args(**FLAGS, env_id=env_id))
    Path("runs").rename("moved")
    with gym.make(env_id) as env:
        for path in ("moved/a", "moved/a/checkpoint.pt"):
            agent = ppo.load_agent(path)
            assert differing(trained.state_dict(), agent.state_dict()) == []
            obs, _ = env.reset(seed=0)
            batch = ppo.as_batch(obs, env.observation_space)
            action = agent.act(batch)
            assert torch.equal(action, trained.act(batch))
            env.step(agent.head.to_env(action.numpy())[0])
            with torch.no_grad():
                assert torch.equal(agent(batch)[1], trained(batch)[1])
    with pytest.raises(ppo.InputError, match="no-such-run"):
        ppo.load_agent("no-such-run")


def test_one_observation_becomes_a_batch():
    box = spaces.Box(-1, 1, (2,), np.float64)
    assert ppo.as_batch(np.array([0.5, -0.5]), box).tolist() == [[0.5, -0.5]]
    assert ppo.as_batch(2, spaces.Discrete(4)).tolist() == [[0, 0, 1, 0]]
    both = spaces.Dict(a=box, b=spaces.Discrete(2))
    batch = ppo.as_batch({"a": np.array([0.5, -0.5]), "b": 1}, both)
    assert batch.tolist() == [[0.5, -0.5, 0, 1]]
    assert batch.dtype == torch.float32
    image = spaces.Box(0, 255, (40, 40), np.uint8)
    pixels = image.sample()
    batch = ppo.as_batch(pixels, image)
    assert (batch.dtype, batch.shape) == (torch.uint8, (1, 40, 40))
    assert batch[0].numpy().tolist() == pixels.tolist()


class Shared(ppo.Agent):
    """An agent whose policy and value function share a layer."""

    def __init__(self, observation_space, action_space, args):
        super().__init__(observation_space, action_space, args)
        self.shared = torch.nn.Linear(*observation_space.shape, *observation_space.shape)

    def features(self, obs):
        return self.shared(super().features(obs))


def test_an_agent_of_another_class():
    """Is trained, resumed, evaluated and loaded, and not as one of a class that it is not."""
    args = ppo.Args(**{**FLAGS, "env_id": "Match-v0", "eval_episodes": 2})
    first = ppo.train(args, Shared)
    trained = ppo.train(replace(args, resume="runs/a", total_timesteps=128), Shared)
    names = {f".{name}" for name, _ in trained.named_parameters()}
    assert {".shared.weight", ".shared.bias"} < names
    assert names <= set(differing(first.state_dict(), trained.state_dict())), "all of it learns"
    loaded = ppo.load_agent("runs/a", Shared)
    assert differing(loaded.state_dict(), trained.state_dict()) == []
    with pytest.raises(ppo.InputError, match="runs/a"):
        ppo.load_agent("runs/a")


# --- Video ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("env_id", "mode", "size"),
    [("CartPole-v1", "sync", (400, 600)), ("Pendulum-v1", "async", (500, 500))],
)
def test_video(env_id, mode, size, command):
    """A file for each episode, named by the step: the first frame and one a step, with motion."""
    ppo.train(ppo.Args(**FLAGS, env_id=env_id, vectorization_mode=mode))
    flags = ["--eval-episodes=2", "--seed=5"]
    line, mean = evaluated(command, *flags)
    assert evaluated(command, *flags, "--capture-video")[0] == line, "as without a film"
    videos = sorted(os.listdir("runs/a/videos"))
    assert videos == [f"step-64-episode-{episode}.mp4" for episode in (0, 1)]
    lengths = []
    for name in videos:
        with VideoFileClip(f"runs/a/videos/{name}") as clip:
            frames = list(clip.iter_frames())
        lengths.append(len(frames) - 1)
        assert frames[0].shape == (*size, 3)
        assert frames[0].std() > 10, "not blank"
        assert np.abs(frames[0].astype(float) - frames[-1]).max() > 100, "something moves"
    total = 2 * mean if env_id == "CartPole-v1" else 2 * 200
    assert total - 2 <= sum(lengths) <= total, "the last frame of each may be lost in the encoding"


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize(
    "flags",
    [
        *(env_flags("failing:Human-v0", style=x) for x in ("asserts", "ignores", "says")),
        env_flags("Match-v0"),
    ],
    ids=["asserts", "ignores", "says", "refuses the argument"],
)
def test_what_cannot_be_filmed_is_said_before_the_training(flags, mode, command, tmp_path):
    """Environments for people to look at, and for nobody. Nothing is trained, or written."""
    tiny = [f"--{name.replace('_', '-')}={value}" for name, value in FLAGS.items()]
    flags = [*tiny, *flags, f"--vectorization-mode={mode}", "--eval-episodes=1"]
    result = command(*flags, "--capture-video")
    assert result.returncode == 2
    line = result.stderr.splitlines()[-1]
    assert line.startswith("ppo.py: ")
    assert flags[flags.index("--env-id") + 1] in line
    assert os.listdir(tmp_path) == []
    assert command(*flags).returncode == 0
