"""Checkpoints: what is in them, when they are written, and runs that go on from them."""

import itertools
import os
import pickle
import shutil
import signal
import time
from dataclasses import fields, replace
from pathlib import Path

import failing  # noqa: F401 (registers the environments)
import numpy as np
import pieces
import pytest
import torch
from test_cli import TESTS, curves, run

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


def drive(folder, where, *flags):
    """Run ppo.py in a process of its own that is killed where the driver is told to."""
    return run(folder, where, *flags, program=TESTS / "driver.py")


class EnoughError(Exception):
    """The end of a run that fails where the test wants it to."""


def failing_after(count):
    """A class of agents which fail when they have acted so often, all together."""
    calls = itertools.count(1)

    class Failing(ppo.Agent):
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


def saved(folder="runs/a", name="checkpoint.pt"):
    """What a checkpoint of a run holds."""
    return torch.load(Path(folder) / name, weights_only=True)


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


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder runs/a of a complete run of 12 iterations, of 32 steps each."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ppo.train(ppo.Args(**SMALL, total_timesteps=384))
    return folder / "runs" / "a"


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of it to do with as one likes, at runs/a."""
    return Path(shutil.copytree(finished, tmp_path / "runs" / "a"))


@pytest.fixture
def written(monkeypatch):
    """A list of (name, global step) of all checkpoints as they take their places."""
    steps = []
    move = os.replace

    def moving(source, target):
        steps.append((Path(target).name, torch.load(source, weights_only=True)["global_step"]))
        move(source, target)

    monkeypatch.setattr(os, "replace", moving)
    return steps


def steps_of(written, name="checkpoint.pt"):
    """Without repetitions, as the last may be written once more at the end."""
    return list(dict.fromkeys(step for x, step in written if x == name))


# --- What is written, and when --------------------------------------------------------------------
def test_what_a_checkpoint_holds(finished):
    """Numbers, texts, lists and tensors, which the safe way of loading takes."""
    checkpoint = saved(finished)
    keys = {"args", "global_step", "returns", "lengths", "best", "agent", "optimizer"}
    assert set(checkpoint) == keys
    assert checkpoint["global_step"] == 384
    assert set(checkpoint["args"]) == {field.name for field in fields(ppo.Args)}
    assert checkpoint["args"]["total_timesteps"] == 384
    assert checkpoint["args"]["resume"] is checkpoint["args"]["evaluate"] is None
    statistics = {"obs_stats.mean", "obs_stats.std", "obs_stats.count"}
    statistics |= {f"reward_scaler.return_stats.{x}" for x in ("mean", "std", "count")}
    assert statistics < set(checkpoint["agent"])
    state = checkpoint["optimizer"]["state"].values()
    assert {x["step"].item() for x in state} == {12 * 2 * 2}, "iterations, epochs, minibatches"
    assert checkpoint["returns"] == checkpoint["lengths"], "in CartPole"
    assert len(checkpoint["returns"]) > 5
    assert checkpoint["best"] == -np.inf
    loaded = ppo.load(str(finished))
    assert loaded["args"] == ppo.Args(**SMALL, total_timesteps=384)
    names = sorted(x.name.partition(".")[0] for x in finished.iterdir())
    assert names == ["checkpoint", "events"], "no best.pt, as there are no 100 episodes"


@pytest.mark.parametrize(
    ("interval", "total", "expected"),
    [
        (5, 384, [160, 320, 384]),
        (100, 384, [384]),
        (None, 384, list(range(32, 385, 32))),
        (None, 250 * 32, [*range(96, 8000, 160), *range(160, 8001, 160)]),
    ],
)
def test_when_checkpoints_are_written(interval, total, expected, written):
    """At every interval, and at the end; by default at hundredths, as 80 of 8,000, in whole 32s."""
    flags = {**SMALL, "update_epochs": 1, "env_id": "Match-v0"}
    ppo.train(ppo.Args(**flags, checkpoint_interval=interval, total_timesteps=total))
    assert steps_of(written) == sorted(expected)


def test_a_slow_run_is_saved_every_ten_minutes(monkeypatch, written):
    """An iteration takes 100 s, and 600 s are not yet enough; then it starts to count again.

    best.pt is chosen at regular moments only, of which there is one here, at the end.
    """
    now = 0.0
    steps = itertools.count(1)

    class Slow(ppo.Agent):
        def act(self, *args, **kwargs):
            nonlocal now
            now += 100 if next(steps) % 16 == 0 else 0
            return super().act(*args, **kwargs)

    monkeypatch.setattr(time, "monotonic", lambda: now)
    flags = {**SMALL, "env_id": "Match-v0", "checkpoint_interval": 100, "total_timesteps": 640}
    ppo.train(ppo.Args(**flags), agent_class=Slow)
    assert steps_of(written) == [7 * 32, 14 * 32, 640]
    assert steps_of(written, "best.pt") == [640]


def test_best(written):
    """best.pt is that of the checkpoint whose mean of the last 100 returns was the highest.

    Each of 4 environments ends 64 episodes in an iteration, of which number n has return
    -|600 - n|. Of the last 25 of each, the mean is -36 in iteration 9, -28 in 10 and -92 in 11.
    """
    flags = {"env_id": "RiseAndFall-v0", "run_name": "a", "eval_episodes": 0, "update_epochs": 1}
    flags |= {"num_envs": 4, "num_steps": 128, "checkpoint_interval": 1}
    ppo.train(ppo.Args(**flags, total_timesteps=20 * 512))
    assert steps_of(written, "best.pt") == [i * 512 for i in range(1, 11)]
    best = saved(name="best.pt")
    assert best["best"] == saved()["best"] == -28
    assert best["returns"] == [600 - n for n in range(616, 641) for _ in range(4)]
    assert differing(best["agent"], saved()["agent"])
    # Begun again, the environments count from 1, which is worse; the best stays.
    written.clear()
    ppo.train(ppo.Args(**flags, total_timesteps=21 * 512, resume="runs/a"))
    assert saved()["returns"] == [n - 600 for n in range(40, 65) for _ in range(4)]
    assert saved()["best"] == -28
    assert steps_of(written, "best.pt") == []


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", "Noisy-v0"])
def test_saving_does_not_change_the_run(env_id):
    flags = {**SMALL, "env_id": env_id, "total_timesteps": 12 * 32}
    for name, interval in (("often", 1), ("never", 10**9)):
        args = ppo.Args(**{**flags, "run_name": name}, checkpoint_interval=interval)
        ppo.train(args)
    names = differing(saved("runs/often"), saved("runs/never"))
    assert set(names) == {".args.run_name", ".args.checkpoint_interval"}
    assert curves("runs/often") == curves("runs/never")


# --- Going on -------------------------------------------------------------------------------------
def test_a_run_that_is_killed_goes_on(tmp_path):
    """With kill -9, while a second checkpoint is written, and in the fifth iteration from there.

    What has taken its place is whole, and the curves have every point once.
    """
    flags = ["--total-timesteps=384", "--checkpoint-interval=4", *SMALL_FLAGS]
    resume = ["--resume", "runs/a"]
    for where, arguments, step in [("fsync:2", flags, 128), ("step:70", resume, 256)]:
        result = drive(tmp_path, where, *arguments)
        assert result.returncode == -signal.SIGKILL, (where, result.stderr)
        assert saved()["global_step"] == step, where
    assert run(tmp_path, *resume).returncode == 0
    assert saved()["global_step"] == 384
    steps = [step for step, _ in pieces.scalars("runs/a")["losses/policy_loss"]]
    assert steps == list(range(32, 385, 32))


def test_all_that_is_saved_is_restored(copy, command):
    """A resume that has nothing left to train writes down what it has been given."""
    path = copy / "checkpoint.pt"
    checkpoint = torch.load(path)
    checkpoint["best"] = 12.5
    checkpoint["returns"] = [float(i) for i in range(100)]
    checkpoint["lengths"] = list(range(1, 101))
    torch.save(checkpoint, path)
    assert "saved runs/a at step 384" in command("--resume=runs/a").stdout
    assert differing(saved(), checkpoint) == []


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_a_resumed_run_goes_on_with_all_that_is_ours(env_id):
    """Optimizer, statistics, schedules, returns and curves, from the last checkpoint."""
    args = ppo.Args(**SMALL, env_id=env_id, checkpoint_interval=6, total_timesteps=12 * 32)
    with pytest.raises(EnoughError):
        ppo.train(args, agent_class=failing_after(6 * 16 + 3))
    half = saved()
    ppo.train(replace(args, resume="runs/a"))
    whole = saved()
    for checkpoint, iterations in ((half, 6), (whole, 12)):
        assert checkpoint["global_step"] == iterations * 32
        counts = {x["step"].item() for x in checkpoint["optimizer"]["state"].values()}
        assert counts == {iterations * 2 * 2}
    for name in ("obs_stats.count", "reward_scaler.return_stats.count"):
        assert half["agent"][name] < whole["agent"][name] <= 384
    log = curves()
    assert [step for step, _ in log["losses/policy_loss"]] == list(range(32, 385, 32))
    rates = [rate for _, rate in log["charts/learning_rate"]]
    assert rates == pytest.approx([5e-4 * (1 - i / 12) for i in range(12)])
    count = len(half["returns"])
    assert whole["returns"][:count] == half["returns"]
    assert (len(whole["returns"]) > count > 3) == (env_id == "CartPole-v1")


def test_resuming_is_deterministic(copy, tmp_path):
    shutil.copytree(copy, tmp_path / "runs" / "b")
    args = ppo.Args(**SMALL, total_timesteps=768)
    a, b = (ppo.train(replace(args, resume=f"runs/{name}")) for name in "ab")
    assert differing(a.state_dict(), b.state_dict()) == []
    assert (copy / "checkpoint.pt").read_bytes() == Path("runs/b/checkpoint.pt").read_bytes()


def test_every_flag_given_wins(copy, command):
    """Half as much again, with a constant rate, more environments, and another of the same spaces.

    What is not given stays as it was.
    """
    flags = ["--total-timesteps=640", "--learning-rate=1e-4", "--no-anneal-lr", "--num-envs=4"]
    result = command("--resume=runs/a", *flags, "--env-id=CartPole-v0", "--num-steps=32")
    assert (result.returncode, result.stderr) == (0, "")
    checkpoint = saved()
    given = {"learning_rate": 1e-4, "anneal_lr": False, "num_envs": 4, "env_id": "CartPole-v0"}
    given |= {"total_timesteps": 640, "num_steps": 32}
    expected = vars(ppo.Args(**SMALL | given))
    assert checkpoint["args"] == expected
    rates = curves()["charts/learning_rate"]
    assert [step for step, _ in rates] == [*range(32, 385, 32), 512, 640]
    assert [rate for _, rate in rates[12:]] == pytest.approx([1e-4, 1e-4])
    assert checkpoint["optimizer"]["state"][0]["step"] == 14 * 2 * 2
    assert sum(checkpoint["lengths"]) <= 256, "the episodes of the new environment alone"


def test_another_name_is_another_folder(copy, command):
    """The old one stays as it was."""
    before = files(copy)
    result = command("--resume=runs/a", "--run-name=b", "--total-timesteps=448")
    assert (result.returncode, result.stderr) == (0, "")
    assert files(copy) == before
    assert saved("runs/b")["global_step"] == 448
    assert [step for step, _ in curves("runs/b")["losses/policy_loss"]] == [416, 448]
    result = command("--resume=runs/a", "--run-name=b", "--total-timesteps=448")
    assert result.returncode == 2, "now it is there"


def test_a_run_that_has_moved_goes_on_where_it_is(copy, command):
    copy.rename("moved")
    result = command("--resume=moved/checkpoint.pt", "--total-timesteps=448")
    assert (result.returncode, result.stderr) == (0, "")
    assert saved("moved")["global_step"] == 448
    assert os.listdir("runs") == []


# --- What cannot be used --------------------------------------------------------------------------
class Exploit:
    def __reduce__(self):
        return os.system, ("touch executed",)


def rewrite(change):
    def write(path):
        checkpoint = torch.load(path)
        change(checkpoint)
        torch.save(checkpoint, path)

    return write


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


BAD_CHECKPOINTS = {
    "missing": lambda path: path.unlink(),
    "torn": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "flipped byte": flip_a_byte,
    "no checkpoint": lambda path: path.write_text("not a checkpoint\n" * 100),
    "a tensor": lambda path: torch.save(torch.zeros(3), path),
    "weights alone": lambda path: torch.save(torch.load(path)["agent"], path),
    "an agent of another size": rewrite(lambda x: x["args"].update(hidden_sizes=(8,))),
    "an unknown flag": rewrite(lambda x: x["args"].update(colour="red")),
    "code, zipped": lambda path: torch.save(Exploit(), path),
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
    assert line.startswith("ppo.py: Cannot use runs/a/checkpoint.pt: ")
    assert files(tmp_path) == before, "nothing is executed or overwritten"


@pytest.mark.parametrize(
    "flags", [["--hidden-sizes", "8"], ["--env-id=Acrobot-v1"], ["--no-norm-obs"]], ids=" ".join
)
def test_a_network_that_does_not_fit_is_refused(flags, copy, tmp_path, command):
    before = files(tmp_path)
    for more in (["--resume=runs/a", "--total-timesteps=768"], ["--evaluate=runs/a"]):
        result = command(*more, *flags)
        assert result.returncode == 2
        (line,) = result.stderr.splitlines()
        assert line.startswith("ppo.py: Cannot use runs/a/checkpoint.pt: ")
        assert files(tmp_path) == before
