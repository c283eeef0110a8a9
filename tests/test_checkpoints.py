"""Runs that are killed, interrupted, resumed and refused."""

import dataclasses
import itertools
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gymnasium as gym
import numpy as np
import pieces
import probes
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_cli import PPO, TESTS, run

import ppo

SMALL = {
    "num_steps": 16,
    "num_envs": 2,
    "num_minibatches": 2,
    "update_epochs": 2,
    "eval_episodes": 0,
    "run_name": "a",
}
SMALL_FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(TESTS)}


def start(folder, *flags):
    """ppo.py as a process of its own, in a group of its own, that goes on while the test does."""
    return subprocess.Popen(
        [sys.executable, str(PPO), *flags],
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def drive(folder, where, *flags):
    """Run ppo.py in a process of its own that is killed where the driver is told to."""
    return subprocess.run(
        [sys.executable, str(TESTS / "driver.py"), where, *flags],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )


class EnoughError(Exception):
    """The end of a run that fails where the test wants it to."""


def failing_after(count, agent_class=ppo.Agent):
    """A class of agents which fail when they have acted so often, all together."""
    calls = itertools.count(1)

    class Failing(agent_class):
        def act(self, *args, **kwargs):
            if next(calls) > count:
                raise EnoughError
            return super().act(*args, **kwargs)

    return Failing


def files(folder):
    """Name, content and time of change of every file below the folder."""
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return [
        (path.relative_to(folder), path.read_bytes(), path.stat().st_mtime_ns) for path in paths
    ]


def saved(folder="runs/a"):
    """What the checkpoint of a run holds."""
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)


def leaves(value, name=""):
    """Every tensor, number and text in a checkpoint, by name."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: x for k, v in items for key, x in leaves(v, f"{name}.{k}").items()}
    return {name: value}


def differing(a, b):
    """The names of what is not the same, bit for bit, in two checkpoints."""
    a, b = leaves(a), leaves(b)
    return [x for x in {**a, **b} if x not in a or x not in b or not np.array_equal(a[x], b[x])]


def without_speed(curves):
    """Without those that the clock decides on."""
    clocks = ("charts/SPS", "charts/seconds_")
    return {tag: points for tag, points in curves.items() if not tag.startswith(clocks)}


def curves(folder="runs/a"):
    """Every curve but that of the speed, of runs in this process.

    TensorBoard may take the files of one process in one second for each other's, so that they are
    read one by one here.
    """
    merged = {}
    for path in sorted(Path(folder).glob("events*")):
        for tag, points in without_speed(pieces.scalars(str(path))).items():
            merged[tag] = sorted(merged.get(tag, []) + points)
    return merged


def last_means(out):
    """Means of the last 100 episodes, as the last line but one says at the end of a run."""
    return re.findall(r"^end: .* steps/s(.*), after", out, re.MULTILINE)[-1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder runs/a of a complete run of 12 iterations, with a checkpoint every 4."""
    folder = tmp_path_factory.mktemp("finished")
    flags = ["--total-timesteps=384", "--checkpoint-interval=4", *SMALL_FLAGS]
    assert run(folder, *flags).returncode == 0
    return folder / "runs" / "a"


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of it to do with as one likes, at runs/a."""
    return Path(shutil.copytree(finished, tmp_path / "runs" / "a"))


# --- --exact-resume: the same bytes ---------------------------------------------------------------
CASES = {
    "discrete, sync": ["--env-id=CartPole-v1", "--anneal-clip"],
    "continuous, async": [
        "--env-id=Pendulum-v1",
        "--vectorization-mode=async",
        "--recompute-advantages",
    ],
    "discrete, vector_entry_point": [
        "--env-id=CartPole-v1",
        "--vectorization-mode=vector_entry_point",
    ],
    # Enough of them for a best.pt, in iteration 8.
    "episodes of one step": ["--env-id=probes:Dice-v0", "--seed=2"],
    "global random numbers, unscaled": [
        "--env-id=probes:Noisy-v0",
        "--no-norm-obs",
        "--no-norm-reward",
    ],
}
# Of 12 iterations of 16 steps and 4 minibatches, with a checkpoint every 4; each goes on from the
# checkpoint that the one before it has left.
LIVES = [
    "step:3",  # in the first iteration, after the first checkpoint
    "opened:1",  # while the first checkpoint is written again
    "fsync:1",
    "step:70",  # in the fifth iteration, after the second checkpoint
    "update:9",  # in the third update from there
    "replace:2",  # before the third checkpoint, or best.pt, takes the place of the second
    "replaced:2",  # just after
    "step:60",
    "none",
]


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_ends_with_the_bytes_of_one_never_stopped(case, tmp_path):
    flags = ["--total-timesteps=384", "--checkpoint-interval=4", *SMALL_FLAGS, *CASES[case]]
    flags.append("--exact-resume")
    (tmp_path / "unbroken").mkdir()
    (tmp_path / "killed").mkdir()

    def unbroken():
        result = drive(tmp_path / "unbroken", "none", *flags)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def killed():
        lives = [(where, ["--resume", "runs/a"]) for where in LIVES]
        lives[0] = (LIVES[0], flags)
        for where, arguments in lives:
            result = drive(tmp_path / "killed", where, *arguments)
            expected = 0 if where == "none" else -signal.SIGKILL
            assert result.returncode == expected, (where, result.stderr)
        return result.stdout

    with ThreadPoolExecutor() as pool:
        futures = [pool.submit(unbroken), pool.submit(killed)]
        outputs = [future.result() for future in futures]
    a, b = (tmp_path / name / "runs" / "a" for name in ("unbroken", "killed"))
    assert differing(saved(a), saved(b)) == []
    best = case == "episodes of one step"
    for name in ("checkpoint.pt", "best.pt"):
        assert (a / name).exists() == (b / name).exists() == (name == "checkpoint.pt" or best)
        if (a / name).exists():
            assert (a / name).read_bytes() == (b / name).read_bytes()
    if best:
        iteration = torch.load(a / "best.pt")["iteration"]
        assert iteration == 8, "the test needs one that is not written again"

    # One curve: every point once, in order, and (but for the speed) the same.
    logs = [without_speed(pieces.scalars(str(path))) for path in (a, b)]
    assert logs[0] == logs[1]
    assert [step for step, _ in logs[0]["losses/policy_loss"]] == list(range(32, 385, 32))
    assert ("charts/episodic_return" in logs[0]) == (case != "continuous, async")
    assert last_means(outputs[0]) == last_means(outputs[1])


def test_a_random_sigkill_from_outside(tmp_path):
    """Wherever the kill happens to strike, what is left can be resumed; the end is the same."""
    flags = ["--total-timesteps=20_000", "--checkpoint-interval=8", "--eval-episodes=0"]
    flags += ["--run-name=a", "--exact-resume"]
    for name in ("unbroken", "killed"):
        (tmp_path / name).mkdir()
    assert run(tmp_path / "unbroken", *flags).returncode == 0
    checkpoint = tmp_path / "killed" / "runs" / "a" / "checkpoint.pt"
    for arguments in (flags, ["--resume=runs/a"]):
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        process = start(tmp_path / "killed", *arguments)
        while not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.3)
        process.kill()
        process.communicate()
    assert run(tmp_path / "killed", "--resume=runs/a").returncode == 0
    states = [saved(tmp_path / name / "runs" / "a") for name in ("unbroken", "killed")]
    assert differing(*states) == []


def counting(rows):
    """Returns and lengths of the episodes that Counting ends within so many rows.

    Each end but the last row's is followed by a row that resets.
    """
    lengths = []
    row = 0
    for episode in range(rows):
        length = probes.Counting.LENGTHS[episode % 5]
        row += length
        if row <= rows:
            lengths.append(length)
        row += 1
    returns = [
        sum(probes.Counting.reward(episode, t) for t in range(1, length + 1))
        for episode, length in enumerate(lengths)
    ]
    return returns, lengths


@pytest.mark.parametrize("resumed", [False, True])
def test_the_last_hundred_episodes_go_on_where_they_ended(resumed, capsys):
    """8 iterations of 16 rows, a checkpoint, at which the episode under way is cut, and 8 more."""
    flags = {**SMALL, "env_id": "Counting-v0", "checkpoint_interval": 8, "exact_resume": True}
    if resumed:
        ppo.train(ppo.Args(**flags, total_timesteps=8 * 32))
        assert not Path("runs/a/best.pt").exists(), "the test needs fewer than 100 of them here"
        flags["resume"] = "runs/a"
    ppo.train(ppo.Args(**flags, total_timesteps=16 * 32))

    # Both environments do the same, so that each episode is there twice.
    half = [[x for x in values for _ in range(2)] for values in counting(8 * 16)]
    returns, lengths = ([*values, *values][-100:] for values in half)
    assert 50 < len(half[0]) < 100, "the test needs episodes from before the checkpoint"
    checkpoint = saved()
    assert checkpoint["returns"] == pytest.approx(returns, rel=1e-5)
    assert checkpoint["lengths"] == lengths
    mean = np.mean(returns)
    assert checkpoint["best"] == pytest.approx(mean, rel=1e-5)
    assert torch.load("runs/a/best.pt")["iteration"] == 16
    means = f", return {mean:.4g}, length {np.mean(lengths):.4g}"
    assert last_means(capsys.readouterr().out) == means


@pytest.mark.parametrize("env_id", ["Counting-v0", "CartPole-v1", "Pendulum-v1", "Noisy-v0"])
def test_a_run_that_fails_is_resumed_to_the_end_that_it_would_have_had(env_id):
    """Bit for bit: after 67 steps of an environment, and again after 67 more."""
    flags = {**SMALL, "env_id": env_id, "checkpoint_interval": 4, "total_timesteps": 12 * 32}
    flags["exact_resume"] = True
    ppo.train(ppo.Args(**{**flags, "run_name": "unbroken"}))
    with pytest.raises(EnoughError):
        ppo.train(ppo.Args(**flags), agent_class=failing_after(67))
    assert saved()["iteration"] == 4
    args = ppo.Args(**flags, resume="runs/a")
    with pytest.raises(EnoughError):
        ppo.train(args, agent_class=failing_after(67))
    assert saved()["iteration"] == 8
    ppo.train(args)
    assert differing(saved(), saved("runs/unbroken")) == [".args.run_name"]
    assert curves() == curves("runs/unbroken")
    assert [step for step, _ in curves()["losses/policy_loss"]] == list(range(32, 385, 32))


def test_all_that_a_checkpoint_holds_matters_to_the_run_that_is_resumed():
    """Whatever is changed in it, by 1, the run ends in another checkpoint than it would have."""
    flags = {**SMALL, "hidden_sizes": ()}
    ppo.train(ppo.Args(**flags, total_timesteps=4 * 32))
    checkpoint = saved()
    fresh = iter(range(1000))

    def resumed():
        folder = f"runs/{next(fresh)}"
        os.mkdir(folder)
        torch.save(checkpoint, f"{folder}/checkpoint.pt")
        ppo.train(ppo.Args(**flags, total_timesteps=6 * 32, resume=folder))
        return saved(folder)

    expected = resumed()
    assert differing(expected, resumed()) == []
    names = []
    for name, x in leaves(checkpoint).items():
        if isinstance(x, torch.Tensor) and not name.startswith(".spaces"):  # for evaluations
            before = x.clone()
            x.add_(1)
            assert differing(expected, resumed()), name
            x.copy_(before)
            names.append(name)
    for part in ("agent.obs_stats.", "agent.return_stats.", "agent.actor.", "agent.critic."):
        assert any(name.startswith(f".{part}") for name in names)
    assert any(not name.startswith(".agent") for name in names), "those of optimizers"
    for name in ("returns", "lengths"):
        checkpoint[name][-1] += 1
        assert differing(expected, resumed()), name
        checkpoint[name][-1] -= 1
    for name, change in (("best", 1000), ("iteration", 1)):
        before = checkpoint[name]
        checkpoint[name] = before + change if np.isfinite(before) else change
        assert differing(expected, resumed()), name
        checkpoint[name] = before
    assert differing(expected, resumed()) == [], "all is as it was"


# --- By default: checkpoints that change nothing --------------------------------------------------
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", "Noisy-v0", "Reseeding-v0"])
def test_saving_does_not_change_the_run(env_id):
    """Weights, optimizer, statistics, curves and returns are the same bytes with and without."""
    flags = {**SMALL, "env_id": env_id, "total_timesteps": 12 * 32}
    for name, interval in (("often", 1), ("never", 100), ("default", None)):
        args = ppo.Args(**{**flags, "run_name": name}, checkpoint_interval=interval)
        ppo.train(args)
    for name in ("often", "default"):
        names = differing(saved(f"runs/{name}"), saved("runs/never"))
        assert set(names) <= {".args.run_name", ".args.checkpoint_interval"}
        assert curves(f"runs/{name}") == curves("runs/never")


@pytest.mark.parametrize("interval", [1, 100])
def test_episodes_longer_than_the_interval_end(interval):
    """Of 40 steps, more than two rollouts, saved after each: the return is that of a whole one."""
    gym.register("Long-v0", probes.Forever, disable_env_checker=True, max_episode_steps=40)
    flags = {**SMALL, "env_id": "Long-v0", "checkpoint_interval": interval}
    ppo.train(ppo.Args(**flags, total_timesteps=6 * 32, stagger_episodes=False))
    assert saved()["returns"] == [40.0] * 4


def resumed_halfway(env_id, **more):
    """The checkpoints, half and whole, of a run that failed in its eighth iteration, and went on.

    Between the regular moments 5 and 10 the seventh iteration is saved.
    """
    flags = {**SMALL, "env_id": env_id, "checkpoint_interval": 5, "total_timesteps": 12 * 32}
    args = ppo.Args(**flags, **more)
    with pytest.raises(EnoughError):
        ppo.train(args, agent_class=failing_after(7 * 16 + 3))
    half = saved()
    ppo.train(dataclasses.replace(args, resume="runs/a"))
    return half, saved()


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_a_resumed_run_goes_on_with_all_that_is_ours(env_id):
    """Schedules, optimizer, statistics, returns and curves, from the last whole iteration."""
    half, whole = resumed_halfway(env_id, anneal_clip=True)
    assert half["iteration"] == 7
    assert whole["iteration"] == 12
    for checkpoint in (half, whole):
        (optimizer,) = checkpoint["optimizers"]
        counts = {state["step"].item() for state in optimizer["state"].values()}
        assert counts == {checkpoint["iteration"] * 2 * 2}, "epochs, minibatches"
    log = curves()
    assert [step for step, _ in log["losses/policy_loss"]] == list(range(32, 385, 32))
    rates = [rate for _, rate in log["charts/learning_rate"]]
    assert rates == pytest.approx([2.5e-4 * (1 - i / 12) for i in range(12)])
    # Valid rows: all but those that reset, one for each episode that ended before the last row.
    for name, count in (("obs_stats", "count"), ("return_stats", "count")):
        seen = whole["agent"][f"{name}.{count}"].item()
        assert half["agent"][f"{name}.{count}"].item() < seen <= 384
    if env_id == "CartPole-v1":
        count = len(half["returns"])
        assert count > 3
        assert whole["returns"][:count] == half["returns"]
        assert len(whole["returns"]) > count


def interrupting(count, at, number):
    """A class of agents that send a signal in their `count`th action or minibatch."""

    class Interrupting(ppo.Agent):
        acted = 0
        learnt = 0

        def act(self, *args, **kwargs):
            self.acted += 1
            if (at, self.acted) == ("rollout", count):
                signal.raise_signal(number)
            return super().act(*args, **kwargs)

        def forward(self, obs):
            self.learnt += torch.is_grad_enabled()
            if torch.is_grad_enabled() and (at, self.learnt) == ("update", count):
                signal.raise_signal(number)
            return super().forward(obs)

    return Interrupting


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(("at", "count"), [("rollout", 7 * 16 + 5), ("update", 7 * 4 + 3)])
@pytest.mark.parametrize("exact", [False, True])
def test_what_a_signal_leaves_is_the_unbroken_run_so_far(
    at, count, exact, number, code, capsys, monkeypatch
):
    """Iteration 7 of 12, bit for bit, though it fell to no regular moment; or 5, which did."""
    flags = {**SMALL, "total_timesteps": 12 * 32, "checkpoint_interval": 5, "exact_resume": exact}
    args = ppo.Args(**flags)
    monkeypatch.setattr(sys, "argv", ["ppo.py"])
    signal.signal(number, ppo.leave)
    with pytest.raises(SystemExit) as leaving:
        ppo.train(args, agent_class=interrupting(count, at, number))
    assert leaving.value.code == code
    expected = 5 if exact else 7
    step = 32 * expected
    assert saved()["global_step"] == step
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == f"resume from step {step}: python ppo.py --resume runs/a"
    if not exact:
        unbroken = dataclasses.replace(args, run_name="unbroken", checkpoint_interval=1)
        with pytest.raises(EnoughError):
            ppo.train(unbroken, agent_class=failing_after(7 * 16 + 1))
        names = differing(saved(), saved("runs/unbroken"))
        assert names == [".args.run_name", ".args.checkpoint_interval"]


@pytest.mark.parametrize(
    ("seconds", "exact", "expected"),
    [
        (2, False, [0, 301, 602, 903]),  # an iteration is 2 seconds long, and 600 not yet enough
        (3, False, [0, 201, 402, 603, 804, 1005]),
        (3, True, [0]),
    ],
)
def test_a_slow_run_is_saved_every_ten_minutes(seconds, exact, expected, monkeypatch):
    """By a clock that each rollout's 16 steps of the first environment move on."""
    now = 0.0
    steps = itertools.count(1)

    class Slow(Still):
        def act(self, *args, **kwargs):
            nonlocal now
            if next(steps) % 16 == 0:
                now += seconds
            return super().act(*args, **kwargs)

    monkeypatch.setattr(time, "monotonic", lambda: now)
    Watcher.begin()
    flags = {**SMALL, "update_epochs": 1, "num_minibatches": 1, "hidden_sizes": ()}
    args = ppo.Args(
        env_id="Watcher-v0",
        total_timesteps=1020 * 32,
        checkpoint_interval=2000,
        exact_resume=exact,
        **flags,
    )
    ppo.train(args, agent_class=Slow)
    assert Watcher.iterations == expected
    assert saved()["iteration"] == 1020


def test_best_is_chosen_at_regular_moments_only(monkeypatch):
    """RiseAndFall is at its best in iteration 10, which the clock saves, but 4, 8, 12 count."""
    now = 0.0

    class Late(ppo.Agent):
        rollouts = 0

        def scale_reward(self, reward):  # once an iteration
            nonlocal now
            self.rollouts += 1
            if self.rollouts == 10:
                now = 601.0
            if self.rollouts == 11:
                assert saved()["iteration"] == 10, "the clock has saved it"
            return super().scale_reward(reward)

    monkeypatch.setattr(time, "monotonic", lambda: now)
    flags = {"env_id": "RiseAndFall-v0", "run_name": "a", "eval_episodes": 0}
    args = ppo.Args(**flags, total_timesteps=20 * 512, checkpoint_interval=4)
    ppo.train(args, agent_class=Late)
    best = torch.load("runs/a/best.pt")
    assert best["iteration"] == 8, "its mean is -100, that of 12 is -156"
    assert saved()["best"] == best["best"]


# --- What is written, and when --------------------------------------------------------------------
def test_what_a_checkpoint_holds(finished):
    checkpoint = saved(finished)
    keys = {"format", "args", "iteration", "global_step", "returns", "lengths", "best", "agent"}
    assert keys < set(checkpoint)
    assert checkpoint["format"] == 4
    assert (checkpoint["iteration"], checkpoint["global_step"]) == (12, 384)
    assert set(checkpoint["args"]) == {field.name for field in dataclasses.fields(ppo.Args)}
    assert checkpoint["args"]["total_timesteps"] == 384
    assert checkpoint["args"]["resume"] is checkpoint["args"]["evaluate"] is None
    statistics = {"obs_stats.mean", "obs_stats.std", "obs_stats.count", "return_stats.std"}
    assert statistics < set(checkpoint["agent"])
    observation_space, action_space = [ppo.space_of(x) for x in checkpoint["spaces"]]
    assert (observation_space.shape, action_space) == ((4,), gym.spaces.Discrete(2))
    optimizers = leaves({name: checkpoint[name] for name in checkpoint.keys() - keys - {"spaces"}})
    state = {name: x for name, x in optimizers.items() if isinstance(x, torch.Tensor)}
    assert len(state) > 0
    assert all(x.abs().max() > 0 for x in state.values())
    steps = [x.item() for name, x in state.items() if name.endswith(".step")]
    assert set(steps) <= {12 * 2 * 2}, "iterations, epochs, minibatches"
    assert checkpoint["returns"] == checkpoint["lengths"], "in CartPole"
    assert len(checkpoint["returns"]) > 5
    assert checkpoint["best"] == -np.inf
    assert sorted(os.listdir(finished))[-1].startswith("events")
    names = os.listdir(finished)
    assert len(names) == 2, "no best.pt before there are 100 episodes, and nothing temporary"


class Watcher(probes.Match):
    """Notes, in every step, a checkpoint of the run that was not there in the step before."""

    iterations = []  # of the checkpoints  # noqa: RUF012
    files = []  # which they were  # noqa: RUF012
    enough = np.inf  # steps of all environments
    steps = 0

    @classmethod
    def begin(cls, enough=np.inf):
        cls.iterations.clear()
        cls.files.clear()
        cls.enough = enough
        cls.steps = 0

    def step(self, action):
        status = os.stat("runs/a/checkpoint.pt")
        file = (status.st_ino, status.st_mtime_ns)
        if self.files[-1:] != [file]:
            self.files.append(file)
            self.iterations.append(saved()["iteration"])
        Watcher.steps += 1
        if self.steps == self.enough:
            raise EnoughError
        return super().step(action)


class Still(ppo.Agent):
    """Does always the same, which takes no time."""

    def act(self, obs, *args, **kwargs):
        return torch.zeros(len(obs), dtype=torch.int64)


gym.register("Watcher-v0", Watcher, disable_env_checker=True)


@pytest.mark.parametrize(
    ("interval", "total", "expected"),
    [
        (5, 384, [0, 5, 10]),
        (6, 384, [0, 6]),
        (12, 384, [0]),
        (100, 384, [0]),
        (None, 384, list(range(12))),
        (None, 250 * 32, list(range(0, 250, 2))),
        ("exact", 384, [0]),
        ("exact", 700 * 32, [0, 625]),  # 10,000 steps of 16 an iteration
    ],
)
def test_when_checkpoints_are_written(interval, total, expected):
    """At the start, at every interval, by default a hundredth of the run, and at the end."""
    Watcher.begin()
    flags = {**SMALL, "update_epochs": 1, "env_id": "Watcher-v0"}
    if interval == "exact":
        interval = None
        flags["exact_resume"] = True
    ppo.train(ppo.Args(**flags, checkpoint_interval=interval, total_timesteps=total))
    assert Watcher.iterations == expected
    assert saved()["iteration"] == total // 32


def test_the_default_interval_of_a_long_exact_run_is_a_hundredth():
    """Long, by rollouts that each have 10,000 steps of an environment, half of them resets."""
    Watcher.begin(enough=20_001)
    flags = {"num_envs": 1, "num_steps": 10_000, "num_minibatches": 1, "update_epochs": 1}
    args = ppo.Args(
        env_id="Watcher-v0",
        run_name="a",
        total_timesteps=2_500_000,
        hidden_sizes=(),
        exact_resume=True,
        **flags,
    )
    with pytest.raises(EnoughError):
        ppo.train(args, agent_class=Still)
    assert Watcher.iterations == [0, 2, 4]


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize(
    ("num_steps", "interval", "steps"),
    [
        (16, 1, [*range(1, 11), *range(1, 6)]),  # row 10 resets
        (6, 2, [*range(1, 11), 1]),  # an episode goes on from one rollout to the next
        (10, 1, [*range(1, 11)]),  # it ends in the last row, and none resets
    ],
)
def test_exact_checkpoints_cut_episodes_and_what_hangs_on_them(num_steps, interval, steps, resumed):
    """Forever's episodes last 10 steps. Begun anew at checkpoints, the second never gets there."""
    flags = {**SMALL, "env_id": "Forever-v0", "gamma": 0.9, "stagger_episodes": False}
    flags |= {"num_steps": num_steps, "checkpoint_interval": interval, "exact_resume": True}
    window = 2 * num_steps * interval
    if resumed:
        ppo.train(ppo.Args(**flags, total_timesteps=window))
        flags["resume"] = "runs/a"
    agent = ppo.train(ppo.Args(**flags, total_timesteps=3 * window))
    sums = [sum(0.9**k for k in range(n)) for n in steps]  # n is the step in the episode
    assert agent.return_stats.count == 3 * 2 * len(steps)
    assert agent.return_stats.mean.item() == pytest.approx(np.mean(sums), rel=1e-5)
    assert agent.return_stats.std.item() == pytest.approx(np.std(sums), rel=1e-5)
    assert agent.obs_stats.count == 3 * 2 * len(steps)
    checkpoint = saved()
    assert checkpoint["returns"] == [10.0] * 6, "those that were cut do not count"
    assert checkpoint["lengths"] == [10.0] * 6
    assert {value for _, value in curves()["charts/episodic_length"]} == {10.0}


def test_what_comes_after_an_exact_checkpoint_is_new():
    """Environments and actions begin anew there, but not with what they began with before."""
    flags = {**SMALL, "checkpoint_interval": 1, "total_timesteps": 4 * 32, "learning_rate": 0.0}
    flags["exact_resume"] = True
    ppo.train(ppo.Args(**flags, env_id="Dice-v0"))
    returns = saved()["returns"]
    assert len(returns) == 4 * 16
    assert len(set(returns)) > 55, "of 2,000 numbers"
    probes.Reseeding.actions.clear()
    ppo.train(ppo.Args(**{**flags, "run_name": "b"}, env_id="Reseeding-v0"))
    actions = np.split(np.array(probes.Reseeding.actions), 4)
    assert len({tuple(window) for window in actions}) == 4


def test_what_comes_after_a_cut_has_the_value_of_the_last_observation():
    """It is neither an end nor a limit, and all that the next rollout has of it is nothing."""
    flags = {"num_steps": 4, "gamma": 0.9, "gae_lambda": 0.0, "hidden_sizes": ()}
    args = ppo.Args(env_id="Forever-v0", **flags, norm_reward=False, stagger_episodes=False)
    with pieces.learner(args) as learner:
        torch.nn.init.constant_(learner.agent.critic[-1].bias, 5.0)  # V, as observations are 0
        rollout = learner.collect()
        assert not rollout.done.any()
        advantage = learner.estimate(rollout).advantage
        assert advantage.tolist() == pytest.approx([1 + 0.9 * 5 - 5] * 16)
        learner.state = ppo.restart(learner.envs, args, 1, learner.generator)
        rollout = learner.collect()
        assert rollout.valid.all()
        assert learner.state.episode_length[0] == 4
        assert learner.state.episode_return[0] == 4
        assert rollout.discounted_return[:, 0].tolist() == pytest.approx([1, 1.9, 2.71, 3.439])


def test_best():
    """best.pt is that of the checkpoint whose mean of the last 100 returns was the highest.

    Each of 4 environments ends 64 episodes in an iteration, of which number n has return
    -|600 - n|. Of the last 25 of each, the mean is -36 in iteration 9, -28 in 10 and -92 in 11.
    """
    flags = {"env_id": "RiseAndFall-v0", "run_name": "a", "eval_episodes": 0}
    args = ppo.Args(**flags, total_timesteps=20 * 512, checkpoint_interval=1)
    ppo.train(args)
    path = Path("runs/a/best.pt")
    best = torch.load(path)
    assert best["iteration"] == 10
    assert best["best"] == saved()["best"] == -28
    assert best["returns"] == [600 - n for n in range(616, 641) for _ in range(4)]
    assert differing(best["agent"], saved()["agent"])

    # Begun again, the environments count from 1, which is worse; the best stays.
    content = path.read_bytes()
    ppo.train(dataclasses.replace(args, total_timesteps=21 * 512, resume="runs/a"))
    assert saved()["returns"] == [n - 600 for n in range(40, 65) for _ in range(4)]
    assert saved()["best"] == -28
    assert path.read_bytes() == content


# --- Resuming: what may change --------------------------------------------------------------------
def test_a_complete_run_says_so_and_stays_as_it_is(copy, tmp_path, command):
    before = files(tmp_path)
    for more in ([], ["--total-timesteps=300"], ["--eval-episodes=3"]):
        result = command("--resume", "runs/a", *more)
        assert (result.returncode, result.stderr) == (0, "")
        sentence = "runs/a is complete. A larger --total-timesteps trains it further.\n"
        assert result.stdout == sentence
    assert files(tmp_path) == before


def test_training_longer(copy, command):
    """Twice the timesteps: the learning rate goes by the new total from where the run had ended."""
    result = command("--resume=runs/a/", "--total-timesteps=768", "--checkpoint-interval=2")
    assert result.returncode == 0, result.stderr
    assert "run: runs/a/, from step 384" in result.stdout
    checkpoint = saved()
    assert (checkpoint["iteration"], checkpoint["args"]["total_timesteps"]) == (24, 768)
    assert checkpoint["args"]["checkpoint_interval"] == 2
    rates = curves()["charts/learning_rate"]
    expected = [5e-4 * (1 - i / 12) for i in range(12)]
    expected += [5e-4 * (1 - i / 24) for i in range(12, 24)]
    assert [step for step, _ in rates] == list(range(32, 769, 32))
    assert [rate for _, rate in rates] == pytest.approx(expected)
    assert command("--resume=runs/a").stdout.startswith("runs/a is complete")


def test_resuming_twice_from_one_checkpoint_is_the_same(copy, tmp_path):
    """In Python, where the other arguments have to be those that the run was started with."""
    shutil.copytree(copy, tmp_path / "runs" / "b")
    args = ppo.Args(**SMALL, total_timesteps=768, checkpoint_interval=4)
    a, b = (ppo.train(dataclasses.replace(args, resume=f"runs/{name}")) for name in "ab")
    assert differing(a.state_dict(), b.state_dict()) == []
    contents = [(tmp_path / "runs" / name / "checkpoint.pt").read_bytes() for name in "ab"]
    assert contents[0] == contents[1]
    refused = {
        "--seed, --gamma cannot be given with --resume runs/a": {"seed": 2, "gamma": 0.9},
        "--evaluate cannot be given with --resume runs/a": {"evaluate": "runs/b"},
        "--resume must be the folder of a run": {"resume": "runs/a/checkpoint.pt"},
    }
    for sentence, changes in refused.items():
        with pytest.raises(ppo.InputError, match=sentence):
            ppo.train(dataclasses.replace(args, **{"resume": "runs/a", **changes}))


@pytest.mark.parametrize(
    ("flags", "loads"),
    [
        (["--resume", "runs/a"], 1),
        (["--resume", "runs/a", "--total-timesteps=448", "--eval-episodes=1"], 1),
        (["--evaluate", "runs/a", "--eval-episodes=1"], 1),
        (["--evaluate", "runs/a/checkpoint.pt", "--eval-episodes=1"], 1),
        (["--total-timesteps=64", "--eval-episodes=1"], 0),
    ],
)
def test_a_command_reads_a_checkpoint_once(flags, loads, copy, command, monkeypatch):
    """So that what it goes by is what it checked, also where the file is replaced meanwhile."""
    paths = []
    load = torch.load
    monkeypatch.setattr(
        torch, "load", lambda file, **kwargs: paths.append(file) or load(file, **kwargs)
    )
    assert command(*flags).returncode == 0
    assert [str(path) for path in paths] == ["runs/a/checkpoint.pt"] * loads


def test_objects_in_the_arguments():
    """What a checkpoint cannot hold is trained with all the same; the checkpoint has its name."""
    flags = {**SMALL, "env_id": "Spaces-v0", "eval_episodes": 1}
    flags["env_kwargs"] = {"action_space": gym.spaces.Discrete(3)}
    agent = ppo.train(ppo.Args(**flags, total_timesteps=64))
    assert agent.actor[-1].out_features == 3
    assert saved()["args"]["env_kwargs"] == {"action_space": "Discrete(3)"}
    ppo.train(ppo.Args(**flags, total_timesteps=128, resume="runs/a"))
    assert saved()["global_step"] == 128
    assert len(ppo.evaluate("runs/a", ppo.Args(**flags, total_timesteps=128))) == 1


# --- What cannot be resumed or evaluated ----------------------------------------------------------
class Exploit:
    def __reduce__(self):
        return os.system, ("touch executed",)


def rewrite(change):
    def write(path):
        checkpoint = torch.load(path)
        change(checkpoint)
        torch.save(checkpoint, path)

    return write


def keep_the_weights(checkpoint):
    for name in checkpoint.keys() - {"agent"}:
        del checkpoint[name]


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


BAD_CHECKPOINTS = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "torn": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "the last block lost": lambda path: path.write_bytes(path.read_bytes()[:-4096] + bytes(4096)),
    "flipped byte": flip_a_byte,
    "no checkpoint": lambda path: path.write_text("not a checkpoint\n" * 100),
    "a tensor": lambda path: torch.save(torch.zeros(3), path),
    "weights alone": rewrite(keep_the_weights),
    "another format": rewrite(lambda checkpoint: checkpoint.update(format=2)),
    "another environment": rewrite(
        lambda checkpoint: checkpoint["args"].update(env_id="Acrobot-v1")
    ),
    "an unknown space": rewrite(lambda checkpoint: checkpoint["spaces"][1].update(kind="Graph")),
    "an unknown flag": rewrite(lambda checkpoint: checkpoint["args"].update(colour="red")),
    "code, zipped": lambda path: torch.save(Exploit(), path),
    "code, in old style": lambda path: torch.save(
        Exploit(), path, _use_new_zipfile_serialization=False
    ),
    "code, bare": lambda path: path.write_bytes(pickle.dumps(Exploit())),
}


@pytest.mark.parametrize(
    "flags", [["--resume", "--total-timesteps=768"], ["--evaluate", "--eval-episodes=2"]]
)
@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
def test_bad_checkpoints_are_refused_in_a_sentence(name, flags, copy, tmp_path, command):
    BAD_CHECKPOINTS[name](copy / "checkpoint.pt")
    before = files(tmp_path)
    mode, more = flags
    result = command(mode, "runs/a", more)
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    other = "ppo.py: The spaces of Acrobot-v1 are not those that the agent has."
    assert line.startswith("ppo.py: Cannot use runs/a/checkpoint.pt: ") or line == other
    assert files(tmp_path) == before, "nothing is executed or overwritten"


def test_an_optimizer_that_does_not_fit_is_refused(copy, command):
    """That of another agent, or none."""

    def drop_a_parameter(value):
        """Of every group of parameters, wherever they are."""
        for name, x in list(value.items() if isinstance(value, dict) else enumerate(value)):
            if name == "params":
                x.pop()
            elif isinstance(x, dict | list):
                drop_a_parameter(x)

    rewrite(drop_a_parameter)(copy / "checkpoint.pt")
    result = command("--resume", "runs/a", "--total-timesteps=768")
    assert result.returncode == 2
    assert re.fullmatch(r"ppo.py: Cannot use runs/a/checkpoint.pt: .*\.\n", result.stderr)
    assert command("--evaluate", "runs/a", "--eval-episodes=1").returncode == 0


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ("--resume runs/none", ["runs/none"]),
        (
            "--resume runs/a/checkpoint.pt --total-timesteps=768",
            ["--resume must be the folder of a run", "runs/a/checkpoint.pt"],
        ),
        ("--evaluate runs/none.pt", ["runs/none.pt"]),
        ("--resume runs/a --learning-rate 1e-3", ["--learning-rate cannot", "--resume runs/a"]),
        (
            "--resume runs/a --seed=2 --hidden-sizes 8 --no-norm-obs",
            ["--seed", "--hidden-sizes", "--norm-obs"],
        ),
        ("--resume runs/a --env-id Acrobot-v1", ["--env-id cannot"]),
        ("--resume runs/a --run-name b", ["--run-name cannot"]),
        (
            "--evaluate runs/a --eval-episodes=2 --env-id Acrobot-v1",
            ["--env-id cannot", "--evaluate runs/a"],
        ),
        ("--evaluate runs/a --resume runs/a", ["--evaluate", "--resume"]),
        ("--resume=", ["Cannot use"]),
        ("--evaluate=", ["Cannot use"]),
    ],
)
def test_flags_that_a_saved_run_refuses(flags, parts, copy, tmp_path, command):
    before = files(tmp_path)
    result = command(*flags.split())
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("ppo.py: ")
    assert all(part in line for part in parts), line
    assert files(tmp_path) == before


# --- Runs that are stopped ------------------------------------------------------------------------
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, command):
    """Full from the second of four checkpoints on, at step 128, as the kernel reports it."""
    flags = ["--total-timesteps=384", "--checkpoint-interval=4", *SMALL_FLAGS]
    result = drive(tmp_path, "full:2", *flags)
    assert result.returncode == 1
    assert "File too large" in result.stderr.splitlines()[-1]
    assert saved()["iteration"] == 4
    assert command("--resume", "runs/a").returncode == 0
    assert saved()["iteration"] == 12


def at_file(number, act, monkeypatch):
    """Act while that file of checkpoints is written; return a list that gets an entry for each."""
    fsync = os.fsync
    calls = []

    def acting(descriptor):
        calls.append(descriptor)
        if len(calls) == number:
            act()
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", acting)
    return calls


def fail():
    raise OSError("the disk is on fire")


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("act", [fail, lambda: signal.raise_signal(signal.SIGINT)])
def test_the_last_line_names_a_step_that_is_saved(act, number, exact, command, monkeypatch, capsys):
    """Whatever comes while a checkpoint is written, which takes long on a disk that is busy.

    At the end it is written again, unless --exact-resume has regular checkpoints only.
    """
    at_file(1 + number, act, monkeypatch)
    flags = ["--total-timesteps=384", "--checkpoint-interval=4", *SMALL_FLAGS]
    flags.append("--exact-resume" if exact else "--no-exact-resume")
    try:
        out = command(*flags).stdout
    except OSError:
        out = capsys.readouterr().out
    step = saved()["global_step"]
    assert step == (number - exact) * 128
    assert out.splitlines()[-1] == f"resume from step {step}: python ppo.py --resume runs/a"


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("target", ["process", "group"])
def test_signals(mode, number, code, target, tmp_path):
    """To the process alone, and to its group, as a terminal does with Ctrl-C."""
    flags = ["--run-name=a", "--vectorization-mode", mode, "--total-timesteps=1_000_000"]
    process = start(tmp_path, *flags, "--checkpoint-interval=5")
    path = tmp_path / "runs" / "a" / "checkpoint.pt"
    deadline = time.monotonic() + 300
    while not (path.exists() and torch.load(path)["iteration"] >= 5):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (os.kill if target == "process" else os.killpg)(process.pid, number)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code
    assert err == ""
    step = torch.load(path)["global_step"]
    assert out.splitlines()[-1] == f"resume from step {step:,}: python {PPO} --resume runs/a"
    wait_for_the_end_of(process)
    events = EventAccumulator(str(path.parent)).Reload()
    last = events.Scalars("losses/policy_loss")[-1].step
    assert step <= last <= step + 512, "at most the iteration under way is lost"


def test_two_signals_at_once_are_one(monkeypatch):
    """As for a worker that a terminal interrupts, and its parent terminates."""
    complaints = []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    both = {signal.SIGINT, signal.SIGTERM}
    for number in both:
        signal.signal(number, ppo.leave)
    signal.pthread_sigmask(signal.SIG_BLOCK, both)
    for number in both:
        signal.raise_signal(number)
    with pytest.raises(SystemExit, match="130"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, both)
    signal.raise_signal(signal.SIGTERM)
    assert complaints == []


def wait_for_the_end_of(process):
    """Of all in its group, too: nothing may outlive the run."""
    deadline = time.monotonic() + 20  # for the system to bury them
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("a process has outlived the run")


@pytest.mark.parametrize("where", ["constructor", "reset", 1, 20])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_while_an_environment_is_busy(where, number, code, command, tmp_path):
    """Before the run has begun nothing is left of it; then its last line says how to go on."""
    kwargs = json.dumps({"number": number, "where": where})
    flags = ["--env-id=stopping:Stopping-v0", "--env-kwargs", kwargs, "--checkpoint-interval=9"]
    result = command(*flags, "--total-timesteps=384", *SMALL_FLAGS)
    assert (result.returncode, result.stderr) == (code, "")
    if where in (1, 20):
        step = 0 if where == 1 else 64
        line = f"resume from step {step}: python ppo.py --resume runs/a"
        assert result.stdout.splitlines()[-1] == line
        assert saved()["global_step"] == step
    else:
        assert result.stdout == ""
        assert os.listdir(tmp_path) == []


def test_a_signal_while_a_worker_starts(tmp_path):
    """It is gone, too, without a word."""
    kwargs = json.dumps({"number": signal.SIGINT, "where": "reset", "worker": True})
    flags = ["--env-id=stopping:Stopping-v0", "--env-kwargs", kwargs, "--preset=none"]
    process = start(tmp_path, *flags, "--vectorization-mode=async", "--num-envs=1")
    out, err = process.communicate(timeout=300)  # returns when nobody holds the pipes any more
    assert (process.returncode, out, err) == (130, "", "")
    wait_for_the_end_of(process)
    assert os.listdir(tmp_path) == []


def test_workers_may_close_their_environments(tmp_path):
    """Which here means a process of its own for each, that would outlive it."""
    flags = ["--env-id=probes:Nuisance-v0", '--env-kwargs={"kind":"child"}', "--run-name=a"]
    flags += ["--vectorization-mode=async", "--total-timesteps=10_000_000"]
    process = start(tmp_path, *flags)
    while not (tmp_path / "runs/a/checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    _, err = process.communicate(timeout=300)  # returns when nobody holds the pipes any more
    assert (process.returncode, err) == (143, "")
    wait_for_the_end_of(process)


def test_a_nan_names_the_last_checkpoint_and_leaves_it(command):
    flags = ["--env-id=probes:Faulty-v0", '--env-kwargs={"fault":"reward"}']
    result = command(*flags, "--checkpoint-interval=2", *SMALL_FLAGS, "--num-steps=13")
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("ppo.py: reward[")
    last = result.stdout.splitlines()[-1]
    assert last == "resume from step 52: python ppo.py --resume runs/a"
    checkpoint = saved()
    assert checkpoint["global_step"] == 52, "though the third iteration was whole, too"
    assert all(torch.isfinite(x).all() for x in checkpoint["agent"].values())


def test_weights_that_are_not_finite_are_never_saved(command):
    """The last step of an iteration, after which no loss is computed, may have broken them."""
    flags = ["--learning-rate=1e38", "--num-minibatches=1", "--update-epochs=1", "--run-name=a"]
    result = command(*flags, "--total-timesteps=5000")
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert re.match(r"ppo.py: (actor|critic)\.\d\.(weight|bias)\[[\d, ]+\] is ", line)
    assert result.stdout.splitlines()[-1].startswith("resume from step 0: ")
    assert all(torch.isfinite(x).all() for x in saved()["agent"].values())


def test_a_second_signal_does_not_disturb_the_end(command, monkeypatch):
    """It comes while the checkpoint is written for the first one."""

    def signals():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)

    calls = at_file(2, signals, monkeypatch)
    kwargs = json.dumps({"number": signal.SIGINT, "where": 20})
    flags = ["--env-id=stopping:Stopping-v0", "--env-kwargs", kwargs, "--checkpoint-interval=9"]
    result = command(*flags, "--total-timesteps=384", *SMALL_FLAGS)
    assert (result.returncode, result.stderr) == (130, "")
    line = "resume from step 64: python ppo.py --resume runs/a"
    assert result.stdout.splitlines()[-1] == line
    assert saved()["global_step"] == 64
    assert len(calls) == 2
    assert not list(Path("runs/a").glob("*.tmp"))


def test_a_signal_while_the_best_is_written_loses_neither(command, monkeypatch):
    """Of Dice's 12 iterations number 8 is the best; its files are the third and fourth."""
    at_file(3, lambda: signal.raise_signal(signal.SIGINT), monkeypatch)
    flags = ["--env-id=probes:Dice-v0", "--seed=2", "--checkpoint-interval=4", *SMALL_FLAGS]
    assert command(*flags, "--total-timesteps=384").returncode == 130
    best = torch.load("runs/a/best.pt")
    assert best["iteration"] == saved()["iteration"] == 8
    assert differing(best, saved()) == []


def test_a_resume_that_is_stopped_at_once_keeps_what_was_asked(copy, command):
    """A larger total, of which the last line says how to go on to it."""
    args = ppo.load("runs/a")["args"]
    longer = dataclasses.replace(args, total_timesteps=1000, resume="runs/a")
    with pytest.raises(EnoughError):
        ppo.train(longer, agent_class=failing_after(3))
    assert saved()["args"]["total_timesteps"] == 1000
    assert "is complete" not in command("--resume=runs/a").stdout
    assert saved()["global_step"] == 1024


def test_a_statistic_that_is_not_finite_is_named():
    class Odd(ppo.Agent):
        def __init__(self, *args):
            super().__init__(*args)
            self.register_buffer("odd", torch.tensor(np.nan))

    with pytest.raises(ppo.NonFiniteError, match=r"^odd\[0\] is nan$"):
        ppo.train(ppo.Args(**SMALL, total_timesteps=64), agent_class=Odd)
