"""What a run has learnt, afterwards: evaluation, video, and the agent on its own."""

import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import probes
import pytest
import torch
from moviepy import VideoFileClip
from test_checkpoints import EnoughError, curves, differing, failing_after, files, saved, start
from test_cli import PPO, TESTS, run

import ppo

FLAGS = {
    "num_steps": 16,
    "num_minibatches": 2,
    "update_epochs": 2,
    "run_name": "a",
    "eval_episodes": 0,
}
README = (PPO.parent / "README.md").read_text()


def evaluated(*, agent_class=ppo.Agent, **flags):
    """The returns of an evaluation of runs/a."""
    return ppo.evaluate("runs/a", ppo.Args(**{**FLAGS, **flags}), agent_class=agent_class)


# --- Returns --------------------------------------------------------------------------------------
def test_the_line_and_the_scalar(capsys):
    """Raw returns of differently seeded episodes, whatever the scaling."""
    flags = {"env_id": "Dice-v0", "total_timesteps": 192, "eval_episodes": 7}
    ppo.train(ppo.Args(**{**FLAGS, **flags, "eval_episodes": 0}))
    capsys.readouterr()
    probes.Dice.rewards.clear()
    returns = evaluated(**flags)
    assert isinstance(returns, np.ndarray)
    assert returns.tolist() == probes.Dice.rewards
    assert len(set(returns)) == len(returns) == 7
    line = capsys.readouterr().out
    statistics = f"mean {returns.mean():.4g} std {returns.std():.4g}"
    extremes = f"min {returns.min():.4g} max {returns.max():.4g}"
    assert line == f"eval: {statistics} {extremes} (7 episodes, greedy)\n"
    assert curves()["eval/episodic_return"] == [(192, pytest.approx(returns.mean()))]
    assert evaluated(**flags).tolist() == returns.tolist(), "the same seeds each time"
    assert capsys.readouterr().out == line


def test_after_training_and_later_are_the_same(tmp_path, command):
    """From the checkpoint of a folder, from a .pt file elsewhere, and with other flags.

    All but TensorBoard's log stays as it is.
    """
    flags = ["--total-timesteps=1024", "--num-steps=16", "--run-name=a", "--eval-episodes=3"]
    last = run(tmp_path, *flags).stdout.splitlines()[-1]
    assert re.fullmatch(r"eval: mean \S+ std \S+ min \S+ max \S+ \(3 episodes, greedy\)", last)
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(tmp_path / "runs/a/checkpoint.pt", tmp_path / "elsewhere/x.pt")
    before = {name: content for name, content, _ in files(tmp_path)}
    for path in ("runs/a", "runs/a/checkpoint.pt", "elsewhere/x.pt"):
        result = command("--evaluate", path)
        assert (result.returncode, result.stderr, result.stdout) == (0, "", last + "\n")
    more = command("--evaluate", "runs/a", "--eval-episodes=5", "--eval-stochastic").stdout
    assert more.endswith("(5 episodes, stochastic)\n")
    after = {name: content for name, content, _ in files(tmp_path)}
    assert all(after[name] == content for name, content in before.items())
    new = {str(path) for path in after.keys() - before.keys()}
    assert all("tfevents" in path for path in new), new
    assert sum(path.startswith("elsewhere") for path in new) == 1


def test_a_run_without_evaluation_can_be_evaluated(command):
    """By the command that its end shows."""
    flags = ["--total-timesteps=64", "--num-steps=8", "--run-name=a", "--eval-episodes=0"]
    last = command(*flags).stdout.splitlines()[-1]
    assert last == f"evaluate from step 64: python {sys.argv[0]} --evaluate runs/a"
    assert command(*last.split()[-2:]).stdout.endswith("(10 episodes, greedy)\n")


def test_greedy_and_stochastic():
    """A policy that has learnt nothing prefers an action by a hair: always so, or half the time."""
    flags = {"env_id": "Choice-v0", "total_timesteps": 64, "learning_rate": 0.0}
    ppo.train(ppo.Args(**FLAGS, **flags))
    flags["eval_episodes"] = 40
    assert evaluated(**flags).std() == 0
    returns = evaluated(**flags, eval_stochastic=True)
    assert abs(returns.mean()) < 0.5
    assert returns.std() > 0.8
    again = evaluated(**flags, eval_stochastic=True)
    assert again.tolist() == returns.tolist(), "it is a sample, but the same each time"


def test_an_environment_that_seeds_torch_does_not_choose_the_actions():
    """It does so in every reset, so that all episodes would be the same."""
    flags = {"env_id": "Reseeding-v0", "env_kwargs": {"when": "reset"}, "total_timesteps": 64}
    ppo.train(ppo.Args(**FLAGS, **flags))
    assert evaluated(**flags, eval_stochastic=True, eval_episodes=20).std() > 0.5


@pytest.mark.parametrize(
    "space", [gym.spaces.Discrete(5), gym.spaces.MultiDiscrete([3, 4]), gym.spaces.Box(-1, 1, (2,))]
)
def test_the_greedy_action_is_the_mode(space):
    torch.manual_seed(0)
    agent = ppo.Agent(gym.spaces.Box(-1, 1, (3,)), space, ppo.Args())
    obs = torch.randn(50, 3)
    with torch.no_grad():
        greedy = agent.act(obs, greedy=True)
        dist, _ = agent(obs)
        for _ in range(200):
            assert torch.all(dist.log_prob(agent.act(obs)) <= dist.log_prob(greedy))
    assert not torch.equal(agent.act(obs), agent.act(obs)), "and otherwise it is a sample"


class Counted(ppo.Agent):
    """Notes how many observations its statistics are of, whenever it acts."""

    counts = []  # noqa: RUF012

    def act(self, *args, **kwargs):
        self.counts.append(self.obs_stats.count.item())
        return super().act(*args, **kwargs)


def test_statistics_are_frozen_and_needed():
    """Without them the agent is lost: it reads 497 and 503, and has learnt to tell -1 from 1."""
    flags = {"env_id": "Shifted-v0", "total_timesteps": 8192, "learning_rate": 3e-3}
    agent = ppo.train(ppo.Args(**FLAGS, **flags))
    Counted.counts.clear()
    flags["eval_episodes"] = 60
    assert set(evaluated(**flags, agent_class=Counted)) == {1.0}
    assert Counted.counts == [agent.obs_stats.count.item()] * 60

    checkpoint = torch.load("runs/a/checkpoint.pt")
    fresh = ppo.RunningStats((1,)).state_dict()
    checkpoint["agent"].update({f"obs_stats.{name}": value for name, value in fresh.items()})
    torch.save(checkpoint, "runs/a/checkpoint.pt")
    assert evaluated(**flags).mean() < 0.5


class Still(ppo.Agent):
    """Does always the same, which takes no time."""

    def act(self, obs, *args, **kwargs):
        return torch.zeros(len(obs), dtype=torch.int64)


def test_an_agent_that_goes_on_for_ever_is_stopped(capsys):
    """After its share of the steps that were trained, with reward 1 in each, or 1,000."""
    flags = {"env_id": "Endless-v0", "total_timesteps": 9600}
    ppo.train(ppo.Args(**FLAGS, **flags))
    assert evaluated(**flags, eval_episodes=4, agent_class=Still).tolist() == [2400.0] * 4
    line = "eval: mean 2,400 std 0 min 2,400 max 2,400"
    line += " (4 episodes, greedy, 4 of them cut after 2,400 steps)"
    assert capsys.readouterr().out.splitlines()[-1] == line
    assert evaluated(**flags, eval_episodes=100, agent_class=Still).tolist() == [1000.0] * 100


@pytest.mark.parametrize("mode", ["async", "vector_entry_point"])
def test_evaluation_in_other_modes(mode):
    """It plays the episodes that it plays in this process."""
    flags = {"total_timesteps": 64}
    ppo.train(ppo.Args(**FLAGS, **flags, vectorization_mode=mode))
    flags["eval_episodes"] = 2
    returns = evaluated(**flags, vectorization_mode=mode)
    assert len(returns) == 2
    if mode == "async":
        ppo.train(ppo.Args(**{**FLAGS, **flags, "run_name": "b"}))
        assert curves("runs/b")["eval/episodic_return"] == [(64, pytest.approx(returns.mean()))]


# --- Agents on their own, and those of other classes ----------------------------------------------
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_load_agent(env_id):
    """It acts, values and scales as the one that was trained, also after its run has moved."""
    flags = {"env_id": env_id, "total_timesteps": 512, "vectorization_mode": "async"}
    trained = ppo.train(ppo.Args(**FLAGS, **flags))
    Path("runs").rename("moved")
    for path in ("moved/a", "moved/a/checkpoint.pt"):
        agent = ppo.load_agent(path)
        assert differing(trained.state_dict(), agent.state_dict()) == []
        assert_alike(agent, trained)
        obs = torch.randn(20, *trained.obs_stats.mean.shape)
        action = agent.to_env(agent.act(obs, greedy=True).numpy())
        assert all(gym.make(env_id).action_space.contains(a) for a in action)
    with pytest.raises(ValueError, match="no-such-run"):
        ppo.load_agent("no-such-run")


def assert_alike(agent, trained):
    """Both do the same, and value the same, in some states."""
    obs = torch.randn(20, *trained.obs_stats.mean.shape)
    reward = torch.randn(20)
    assert torch.equal(agent.act(obs, greedy=True), trained.act(obs, greedy=True))
    with torch.no_grad():
        assert torch.equal(agent(obs)[1], trained(obs)[1])
        assert torch.equal(agent.scale_reward(reward), trained.scale_reward(reward))


SHARED = '''
"""An agent whose policy and value function share their hidden layers."""

from torch import nn

import ppo


class SharedTorso(ppo.Agent):
    def __init__(self, observation_space, action_space, args):
        super().__init__(observation_space, action_space, args)
        sizes = [*observation_space.shape, *args.hidden_sizes]
        self.shared = nn.Sequential(ppo.mlp(sizes, nn.Tanh, gain=2**0.5), nn.Tanh())
        self.actor = ppo.mlp([sizes[-1], int(action_space.n)], nn.Tanh, gain=0.01)
        self.critic = ppo.mlp([sizes[-1], 1], nn.Tanh, gain=1.0)

    def features(self, obs):
        scaled = (obs - self.obs_stats.mean) / self.obs_stats.std
        return self.shared(scaled.clamp(-10, 10))

    def scalars(self):
        return {"shared_norm": sum(x.square().sum().item() for x in self.shared.parameters())}
'''


@pytest.fixture
def shared_torso(tmp_path, monkeypatch):
    """The class SharedTorso, from a file of its own."""
    (tmp_path / "shared.py").write_text(SHARED)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("shared").SharedTorso
    del sys.modules["shared"]


def test_an_agent_of_another_class_is_trained_resumed_evaluated_and_loaded(shared_torso):
    flags = {**FLAGS, "env_id": "Match-v0", "learning_rate": 3e-3, "checkpoint_interval": 16}
    flags |= {"eval_episodes": 20, "exact_resume": True}
    args = ppo.Args(**flags, total_timesteps=32 * 64)
    unbroken = ppo.train(replace(args, run_name="unbroken"), shared_torso)
    assert type(unbroken) is shared_torso
    with pytest.raises(EnoughError):
        ppo.train(args, agent_class=failing_after(20 * 16, shared_torso))
    half = saved()
    assert half["iteration"] == 16
    resumed = ppo.train(replace(args, resume="runs/a"), agent_class=shared_torso)
    assert differing(saved("runs/a"), saved("runs/unbroken")) == [".args.run_name"]
    assert differing(resumed.state_dict(), saved()["agent"]) == []
    names = {name for name in saved()["agent"] if name.startswith("shared.")}
    assert len(names) == len(list(resumed.shared.parameters()))
    changed = differing(half["agent"], saved()["agent"])
    assert {f".{name}" for name in names} < set(changed), "all of it learns"
    log = curves("runs/unbroken")
    assert len({value for _, value in log["charts/shared_norm"]}) == 32

    returns = ppo.evaluate("runs/a", args, agent_class=shared_torso)
    assert set(returns) == {1.0}, "what the observation asks for"
    assert log["eval/episodic_return"] == [(32 * 64, 1.0)], "as after the training"
    loaded = ppo.load_agent("runs/a", agent_class=shared_torso)
    assert type(loaded) is shared_torso
    assert_alike(loaded, resumed)


def test_an_agent_of_another_class_is_refused_without_it(shared_torso):
    """And with it, where the run was not trained with it: in a sentence, with nothing written."""
    args = ppo.Args(**FLAGS, total_timesteps=64)
    ppo.train(args, agent_class=shared_torso)
    ppo.train(replace(args, run_name="b"))
    before = files("runs")
    longer = replace(args, total_timesteps=128)
    for name, agent_class in (("a", ppo.Agent), ("b", shared_torso)):
        path = f"runs/{name}"
        named = replace(longer, run_name=name)
        for action in (
            lambda path=path, x=agent_class: ppo.load_agent(path, agent_class=x),
            lambda path=path, x=agent_class, args=named: ppo.evaluate(path, args, agent_class=x),
            lambda path=path, x=agent_class, args=named: ppo.train(
                replace(args, resume=path), agent_class=x
            ),
        ):
            with pytest.raises(ppo.InputError) as refusal:
                action()
            sentence = str(refusal.value)
            assert sentence.startswith(f"Cannot use {path}/checkpoint.pt: ")
            assert re.fullmatch(r"[^\n]*[^.\n]\.", sentence)
            assert agent_class.__name__ in sentence
    assert files("runs") == before


# --- Video ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("env_id", "size"), [("CartPole-v1", (400, 600)), ("Pendulum-v1", (500, 500))]
)
def test_video(env_id, size):
    """A file for each episode, named by the step: the first frame and one a step, with motion."""
    flags = {"env_id": env_id, "total_timesteps": 64}
    ppo.train(ppo.Args(**FLAGS, **flags))
    returns = evaluated(**flags, eval_episodes=2, capture_video=True)
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
    if env_id == "CartPole-v1":
        assert lengths == returns.tolist()
    else:
        assert all(199 <= length <= 200 for length in lengths), "the reader may drop the last frame"
    assert returns.tolist() == evaluated(**flags, eval_episodes=2).tolist(), "as without a film"


@pytest.mark.parametrize(
    ("missing", "env_id", "mode", "part"),
    [
        ("pygame", "CartPole-v1", "sync", "pip install"),
        ("moviepy", "CartPole-v1", "sync", "pip install"),
        ("moviepy", "CartPole-v1", "async", "pip install"),
        ("", "probes:Match-v0", "sync", "render_mode"),
    ],
)
def test_what_cannot_be_filmed_is_said_before_the_training(missing, env_id, mode, part, tmp_path):
    """In a sentence; nothing is trained, or written."""
    if missing:
        (tmp_path / "fakes").mkdir()
        (tmp_path / "fakes" / f"{missing}.py").write_text("raise ModuleNotFoundError('gone')")
    flags = ["--total-timesteps=64", "--run-name=a", "--env-id", env_id]
    flags += ["--vectorization-mode", mode, "--num-steps=16"]
    result = run(tmp_path, "--capture-video", *flags, path=tmp_path / "fakes")
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    line = result.stderr.splitlines()[-1]
    assert line.startswith("ppo.py: ")
    assert part in line
    assert result.stdout == ""
    assert not (tmp_path / "runs").exists()
    longer = ["--no-capture-video", "--eval-episodes=1"]
    assert run(tmp_path, *flags, *longer, path=tmp_path / "fakes").returncode == 0


class Blind(probes.Match):
    """Takes a render_mode and shows nothing."""

    open = 0  # how many there are

    def __init__(self, render_mode=None):
        Blind.open += 1

    def close(self):
        Blind.open -= 1


gym.register("Blind-v0", Blind, disable_env_checker=True)


def test_an_environment_that_shows_nothing_is_refused_in_a_sentence(command):
    flags = ["--env-id=Blind-v0", "--total-timesteps=64", "--num-steps=16", "--run-name=a"]
    result = command(*flags, "--capture-video")
    assert result.returncode == 2
    line = result.stderr.splitlines()[-1]
    assert line.startswith("ppo.py: ")
    assert "Blind-v0" in line
    assert not Path("runs").exists()
    assert Blind.open == 0


def test_an_interrupt_does_not_wait_for_the_film(tmp_path):
    """The unfinished episode is not encoded, which would take longer than anybody waits."""
    flags = ["--env-id=probes:LongFilm-v0", "--capture-video", "--total-timesteps=64"]
    process = start(tmp_path, *flags, "--num-steps=16", "--run-name=a")
    while not next(process.stdout).startswith("evaluate from"):
        pass
    while not (tmp_path / "runs/a/videos").exists():
        time.sleep(0.02)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "eval:" not in out
    assert "Traceback" not in err
    assert os.listdir(tmp_path / "runs/a/videos") == []


# --- The examples of the README -------------------------------------------------------------------
def examples(heading):
    """The blocks of Python in a section of it."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


@pytest.mark.upstream
def test_every_example_is_python():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) > 5
    for block in blocks:
        compile(textwrap.dedent(block), "README.md", "exec")


def names_of(code):
    """What an example has defined once it has run, after the command that it stands below."""
    ppo.train(ppo.Args(run_name="cartpole", total_timesteps=5120, eval_episodes=0))
    names = {}
    exec(code, names)
    return names


@pytest.mark.upstream
def test_the_example_of_using_an_agent():
    code, _ = examples("Use what it has learnt")
    assert names_of(code)["action"] in (0, 1)


@pytest.mark.upstream
def test_the_example_of_an_agent_out_of_torch():
    """It computes the same from a file of numpy's."""
    _, code = examples("Use what it has learnt")
    logits = names_of(code)["logits"]
    agent = ppo.load_agent("runs/cartpole")
    rows = np.random.default_rng(0).normal(0, 1, (50, 4)).astype(np.float32)
    with torch.no_grad():
        dist, _ = agent(torch.from_numpy(rows))
    numbers = np.array([logits(row) for row in rows])
    normalised = numbers - np.log(np.exp(numbers).sum(1, keepdims=True))
    np.testing.assert_allclose(normalised, dist.logp.numpy(), atol=1e-5)
    assert len(set(numbers.argmax(1))) == 2


@pytest.mark.upstream
def test_the_example_of_a_wrapper(tmp_path):
    """A module of its own, with the name that the command beside it has."""
    (code,) = [code for code in examples("Your own environment") if "gym.register" in code]
    (tmp_path / "my_envs.py").write_text(textwrap.dedent(code))
    (command,) = re.findall(r"`python ppo.py (--env-id my_envs:.*?)`", README)
    flags = ["--total-timesteps=20_000", "--run-name=a", "--eval-episodes=2"]
    result = run(tmp_path, *command.split(), *flags)
    assert (result.returncode, result.stderr) == (0, "")
    assert "spaces: (9,) -> Box(-1.0, 1.0, (1,), float32)" in result.stdout
    assert saved()["lengths"][-1] == 100
    assert "preset continuous" in result.stdout


@pytest.mark.upstream
def test_the_example_of_an_agent_of_ones_own(tmp_path):
    """A file that takes the same command line, resumes, and loads what it has trained."""
    (code,) = [code for code in examples("Fork it") if "(ppo.Agent)" in code]
    (name,) = re.findall(r"class (\w+)\(ppo.Agent\)", code)
    program = tmp_path / "fork.py"
    program.write_text(code)
    paths = f"{PPO.parent}{os.pathsep}{TESTS}"
    for flags in (
        ["--run-name=a", "--total-timesteps=256", "--num-steps=16"],
        ["--resume=runs/a", "--total-timesteps=512", "--eval-episodes=1"],
    ):
        result = run(tmp_path, *flags, path=paths, program=program)
        assert (result.returncode, result.stderr) == (0, "")
    assert saved()["global_step"] == 512
    load = f"import fork, ppo; print(type(ppo.load_agent('runs/a', agent_class=fork.{name})))"
    environment = {**os.environ, "PYTHONPATH": paths}
    command = [sys.executable, "-c", load]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.stdout == f"<class 'fork.{name}'>\n", result.stderr
