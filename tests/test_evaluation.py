"""What a run has learnt, afterwards: evaluation, video, and the agent on its own."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import probes
import pytest
import torch
from moviepy import VideoFileClip
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_checkpoints import files
from test_cli import PPO, TESTS, run

import ppo

FLAGS = {"num_steps": 16, "num_minibatches": 2, "update_epochs": 2, "run_name": "a", "eval_episodes": 0}


def evaluation(capsys, **flags):
    """Evaluate runs/a; its line on the console."""
    capsys.readouterr()
    ppo.evaluate("runs/a", ppo.Args(**{**FLAGS, **flags}))
    return capsys.readouterr().out


def test_the_line_and_the_scalar(capsys):
    """Raw returns of ten differently seeded episodes, whatever the scaling."""
    flags = {"env_id": "Dice-v0", "total_timesteps": 192}
    ppo.train(ppo.Args(**FLAGS, **flags))
    probes.Dice.rewards.clear()
    line = evaluation(capsys, eval_episodes=7, **flags)
    returns = np.array(probes.Dice.rewards)
    assert len(set(returns)) == len(returns) == 7
    statistics = f"mean {returns.mean():.1f} std {returns.std():.1f} min {returns.min()} max {returns.max()}"
    assert line == f"eval: {statistics} (7 episodes, greedy)\n"
    (event,) = EventAccumulator("runs/a").Reload().Scalars("eval/episodic_return")
    assert (event.step, event.value) == (192, pytest.approx(returns.mean()))
    probes.Dice.rewards.clear()
    assert evaluation(capsys, eval_episodes=7, **flags) == line
    assert probes.Dice.rewards == returns.tolist(), "the same seeds each time"


def test_after_training_and_later_are_the_same(tmp_path):
    """From the checkpoint of a folder, from a .pt file elsewhere, and with other flags; nothing changes."""
    flags = ["--total-timesteps=1024", "--num-steps=16", "--run-name=a", "--eval-episodes=3"]
    last = run(tmp_path, *flags).stdout.splitlines()[-1]
    assert re.fullmatch(r"eval: mean \S+ std \S+ min \S+ max \S+ \(3 episodes, greedy\)", last)
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(tmp_path / "runs/a/checkpoint.pt", tmp_path / "elsewhere/x.pt")
    before = {name: content for name, content, _ in files(tmp_path)}
    results = [
        run(tmp_path, "--evaluate", path) for path in ("runs/a", "runs/a/checkpoint.pt", "elsewhere/x.pt")
    ]
    assert [(result.returncode, result.stderr, result.stdout) for result in results] == [
        (0, "", last + "\n")
    ] * 3
    more = run(tmp_path, "--evaluate", "runs/a", "--eval-episodes=5", "--eval-stochastic").stdout
    assert more.endswith("(5 episodes, stochastic)\n")
    after = {name: content for name, content, _ in files(tmp_path)}
    assert all(after[name] == content for name, content in before.items())
    new = {str(path) for path in after.keys() - before.keys()}
    assert all("tfevents" in path for path in new), new
    assert sum(path.startswith("elsewhere") for path in new) == 1


def test_a_run_without_evaluation_can_be_evaluated(tmp_path):
    """By the command that its end shows."""
    flags = ["--total-timesteps=64", "--num-steps=16", "--run-name=a", "--eval-episodes=0"]
    last = run(tmp_path, *flags).stdout.splitlines()[-1]
    assert last == "evaluate from step 64: python ppo.py --evaluate runs/a"
    assert run(tmp_path, *last.split()[-2:]).stdout.endswith("(10 episodes, greedy)\n")


def test_greedy_and_stochastic(capsys):
    """A policy that has learnt nothing prefers one action by a hair: always so, or half of the time."""
    flags = {"env_id": "Choice-v0", "total_timesteps": 64, "learning_rate": 0.0, "eval_episodes": 40}
    ppo.train(ppo.Args(**{**FLAGS, **flags, "eval_episodes": 0}))
    assert "std 0.0" in evaluation(capsys, **flags)
    mean, std = re.search(r"mean (\S+) std (\S+)", evaluation(capsys, eval_stochastic=True, **flags)).groups()
    assert abs(float(mean)) < 0.5
    assert float(std) > 0.8


@pytest.mark.parametrize(
    "space", [ppo.spaces.Discrete(5), ppo.spaces.MultiDiscrete([3, 4]), ppo.spaces.Box(-1, 1, (2,))]
)
def test_the_greedy_action_is_the_mode(space):
    torch.manual_seed(0)
    agent = ppo.Agent(ppo.spaces.Box(-1, 1, (3,)), space, ppo.Args())
    obs = torch.randn(50, 3)
    with torch.no_grad():
        greedy, (dist, _) = agent.act(obs, greedy=True), agent(obs)
        for _ in range(200):
            assert torch.all(dist.log_prob(agent.act(obs)) <= dist.log_prob(greedy))
    assert not torch.equal(agent.act(obs), agent.act(obs)), "and otherwise it is a sample"


def test_statistics_are_frozen_and_needed(capsys, monkeypatch):
    """Without them the agent is lost: it reads 497 and 503, and has learnt to tell -1 from 1."""
    flags = {"env_id": "Shifted-v0", "total_timesteps": 8192, "learning_rate": 3e-3, "eval_episodes": 60}
    agent = ppo.train(ppo.Args(**{**FLAGS, **flags, "eval_episodes": 0}))
    counts, act = [], ppo.Agent.act
    monkeypatch.setattr(ppo.Agent, "act", lambda a, *x: counts.append(a.obs_stats.count.item()) or act(a, *x))
    assert "mean 1.0 std 0.0" in evaluation(capsys, **flags)
    assert counts == [agent.obs_stats.count.item()] * 60

    checkpoint = torch.load("runs/a/checkpoint.pt")
    fresh = ppo.RunningStats((1,)).state_dict()
    checkpoint["agent"].update({f"obs_stats.{name}": value for name, value in fresh.items()})
    torch.save(checkpoint, "runs/a/checkpoint.pt")
    mean = float(re.search(r"mean (\S+)", evaluation(capsys, **flags)).group(1))
    assert mean < 0.5


def test_an_agent_that_goes_on_for_ever_is_stopped(capsys, monkeypatch):
    """After 100,000 steps of reward 1."""
    flags = {"env_id": "Endless-v0", "total_timesteps": 64}
    ppo.train(ppo.Args(**FLAGS, **flags))
    monkeypatch.setattr(ppo.Agent, "act", lambda self, obs, greedy: torch.zeros(1, dtype=torch.int64))
    line = evaluation(capsys, eval_episodes=1, **flags)
    assert line == "eval: mean 100000.0 std 0.0 min 100000.0 max 100000.0 (1 episodes, greedy)\n"


@pytest.mark.parametrize("mode", ["async", "vector_entry_point"])
def test_evaluation_in_other_modes(mode, capsys):
    flags = {"vectorization_mode": mode, "total_timesteps": 64}
    ppo.train(ppo.Args(**FLAGS, **flags))
    assert "(2 episodes, greedy)" in evaluation(capsys, eval_episodes=2, **flags)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_load_agent(env_id):
    """It acts, values and scales as the one that was trained, also after its run has moved."""
    trained = ppo.train(ppo.Args(env_id=env_id, total_timesteps=512, vectorization_mode="async", **FLAGS))
    Path("runs").rename("moved")
    for path in ("moved/a", "moved/a/checkpoint.pt"):
        agent = ppo.load_agent(path)
        state = trained.state_dict()
        assert all(torch.equal(state[name], value) for name, value in agent.state_dict().items())
        obs = torch.randn(20, *trained.obs_stats.mean.shape)
        with torch.no_grad():
            assert torch.equal(agent.act(obs, greedy=True), trained.act(obs, greedy=True))
            assert torch.equal(agent(obs)[1], trained(obs)[1])
        action = agent.to_env(agent.act(obs, greedy=True).detach().numpy())
        assert all(gym.make(env_id).action_space.contains(a) for a in action)
    with pytest.raises(ValueError, match="no-such-run"):
        ppo.load_agent("no-such-run")


@pytest.mark.parametrize(("env_id", "size"), [("CartPole-v1", (400, 600)), ("Pendulum-v1", (500, 500))])
def test_video(env_id, size, tmp_path, capsys):
    """A file for each episode, named by the step: the first frame and one for each step, with motion."""
    flags = {"env_id": env_id, "total_timesteps": 64}
    ppo.train(ppo.Args(**FLAGS, **flags))
    returns = []
    line = evaluation(capsys, eval_episodes=2, capture_video=True, **flags)
    videos = sorted(os.listdir("runs/a/videos"))
    assert videos == [f"step-64-episode-{episode}.mp4" for episode in (0, 1)]
    for name in videos:
        with VideoFileClip(f"runs/a/videos/{name}") as clip:
            frames = list(clip.iter_frames())
        returns.append(len(frames) - 1)
        assert frames[0].shape == (*size, 3)
        assert frames[0].std() > 10, "not blank"
        assert np.abs(frames[0].astype(float) - frames[-1]).max() > 100, "something moves"
    if env_id == "CartPole-v1":
        assert f"mean {np.mean(returns):.1f} " in line
    else:
        assert all(199 <= length <= 200 for length in returns), "the reader may drop the last frame"


@pytest.mark.parametrize(
    ("missing", "flags", "part"),
    [
        ("pygame", [], "pip install"),
        ("moviepy", [], "pip install"),
        ("", ["--env-id", "probes:Match-v0"], "render_mode"),
    ],
)
def test_what_cannot_be_filmed_is_said_before_the_training(missing, flags, part, tmp_path):
    if missing:
        (tmp_path / "fakes").mkdir()
        (tmp_path / "fakes" / f"{missing}.py").write_text("raise ModuleNotFoundError('gone')")
    result = run(tmp_path, "--capture-video", "--total-timesteps=64", *flags, path=tmp_path / "fakes")
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    line = result.stderr.splitlines()[-1]
    assert line.startswith("ppo.py: ")
    assert part in line
    assert not (tmp_path / "runs").exists()


def test_an_interrupt_does_not_wait_for_the_film(tmp_path):
    """The unfinished episode is not encoded, which would take longer than anybody waits after Ctrl-C."""
    flags = ["--env-id=probes:Film-v0", "--capture-video", "--total-timesteps=64", "--num-steps=16"]
    process = subprocess.Popen(
        [sys.executable, "-u", str(PPO), *flags, "--run-name=a"], cwd=tmp_path, text=True,
        env={**os.environ, "PYTHONPATH": str(TESTS)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    while not next(process.stdout).startswith("evaluate from"):
        pass
    while not (tmp_path / "runs/a/videos").exists():
        time.sleep(0.02)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "eval:" not in out
    assert "Traceback" not in err
    assert os.listdir(tmp_path / "runs/a/videos") == []


def test_the_example_of_the_readme(tmp_path):
    """The lines of Python under "Use what it has learnt" run as they stand, after the command above them."""
    readme = (Path(ppo.__file__).parent / "README.md").read_text()
    section = readme.split("## Use what it has learnt")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    ppo.train(ppo.Args(run_name="cartpole", total_timesteps=512, eval_episodes=0))
    names = {}
    exec(code, names)
    assert names["action"] in (0, 1)
