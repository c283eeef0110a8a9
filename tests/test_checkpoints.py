"""Runs that are killed, interrupted, resumed and refused, as real processes."""

import dataclasses
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

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_cli import PPO, TESTS, run

import ppo

SMALL = {"num_steps": 16, "num_envs": 2, "num_minibatches": 2, "update_epochs": 2, "eval_episodes": 0}
SMALL_FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]


def drive(folder, where, *flags):
    """Run ppo.py in a process of its own that is killed where the driver is told to."""
    env = {**os.environ, "PYTHONPATH": str(TESTS)}
    command = [sys.executable, str(TESTS / "driver.py"), where, *flags]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)


def files(folder):
    """Name, content and time of change of every file below the folder."""
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return [(path.relative_to(folder), path.read_bytes(), path.stat().st_mtime_ns) for path in paths]


def tensors(value, name=""):
    """Every tensor and number in a checkpoint, by name."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: x for k, v in items for key, x in tensors(v, f"{name}.{k}").items()}
    return {name: value}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder runs/a of a short run that is complete, with a checkpoint every 4 of 12 iterations."""
    folder = tmp_path_factory.mktemp("finished")
    flags = ["--run-name=a", "--total-timesteps=384", "--checkpoint-interval=4", *SMALL_FLAGS]
    assert run(folder, *flags).returncode == 0
    return folder / "runs" / "a"


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of it to do with as one likes, at runs/a."""
    return Path(shutil.copytree(finished, tmp_path / "runs" / "a"))


CASES = {
    "discrete, sync": ["--env-id=CartPole-v1", "--anneal-clip"],
    "continuous, async": ["--env-id=Pendulum-v1", "--vectorization-mode=async", "--recompute-advantages"],
    "discrete, vector_entry_point": ["--env-id=CartPole-v1", "--vectorization-mode=vector_entry_point"],
    "episodes of one step": [
        "--env-id=probes:Dice-v0",
        "--seed=2",
    ],  # enough of them for a best.pt, in iteration 8
    "global random numbers, unscaled": ["--env-id=probes:Noisy-v0", "--no-norm-obs", "--no-norm-reward"],
}
# Of twelve iterations of 16 steps and 4 minibatches, with a checkpoint every 4; each goes on from the last.
LIVES = [
    "step:3",  # in the first iteration, after the trial and the first checkpoint
    "opened:1",  # while the first checkpoint is written again
    "fsync:1",
    "step:70",  # in the fifth iteration, after the second checkpoint
    "update:9",  # in the third update from there
    "replace:2",  # before the third checkpoint takes the place of the second
    "replaced:2",  # just after
    "step:60",
    "none",
]


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_ends_with_the_bytes_of_one_never_stopped(case, tmp_path):
    flags = ["--run-name=a", "--total-timesteps=384", "--checkpoint-interval=4", *SMALL_FLAGS, *CASES[case]]
    (tmp_path / "unbroken").mkdir()
    (tmp_path / "killed").mkdir()

    def unbroken():
        assert drive(tmp_path / "unbroken", "none", *flags).returncode == 0

    def killed():
        lives = [(where, ["--resume", "runs/a"]) for where in LIVES]
        lives[0] = (LIVES[0], flags)
        for where, arguments in lives:
            result = drive(tmp_path / "killed", where, *arguments)
            assert result.returncode == (0 if where == "none" else -signal.SIGKILL), (where, result.stderr)

    with ThreadPoolExecutor() as pool:
        for future in [pool.submit(unbroken), pool.submit(killed)]:
            future.result()
    a, b = (tmp_path / name / "runs" / "a" for name in ("unbroken", "killed"))
    left, right = (tensors(torch.load(path / "checkpoint.pt", weights_only=True)) for path in (a, b))
    assert left.keys() == right.keys()
    for name in left:
        assert np.array_equal(left[name], right[name]), name
    for name in ("checkpoint.pt", "best.pt"):
        assert (a / name).exists() == (b / name).exists() == (name == "checkpoint.pt" or "Dice" in str(flags))
        if (a / name).exists():
            assert (a / name).read_bytes() == (b / name).read_bytes()

    if "Dice" in str(flags):
        assert torch.load(a / "best.pt")["iteration"] == 8, "the test needs one that is not written again"

    # One curve: every point once, in order, and (but for the speed) the same.
    curves = []
    for path in (a, b):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        tags = [tag for tag in events.Tags()["scalars"] if tag != "charts/SPS"]
        curves.append({tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags})
    assert curves[0] == curves[1]
    assert [step for step, _ in curves[0]["losses/policy_loss"]] == list(range(32, 385, 32))


def test_a_random_sigkill_from_outside(tmp_path):
    """Wherever the kill happens to strike, what is left can be resumed; the end is the same."""
    flags = ["--run-name=a", "--total-timesteps=20_000", "--checkpoint-interval=8", "--eval-episodes=0"]
    for name in ("unbroken", "killed"):
        (tmp_path / name).mkdir()
    assert run(tmp_path / "unbroken", *flags).returncode == 0
    env = {**os.environ, "PYTHONPATH": str(TESTS)}
    checkpoint = tmp_path / "killed" / "runs" / "a" / "checkpoint.pt"
    for arguments in (flags, ["--resume=runs/a"]):
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        process = subprocess.Popen(
            [sys.executable, str(PPO), *arguments],
            cwd=tmp_path / "killed",
            env=env,
            stdout=subprocess.DEVNULL,
        )
        while not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.3)
        process.kill()
        process.wait()
    assert run(tmp_path / "killed", "--resume=runs/a").returncode == 0
    states = [torch.load(tmp_path / x / "runs/a/checkpoint.pt")["agent"] for x in ("unbroken", "killed")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_what_a_checkpoint_holds(finished):
    checkpoint = torch.load(finished / "checkpoint.pt", weights_only=True)
    keys = {"format", "args", "agent", "optimizer", "iteration", "global_step", "recent", "best"}
    assert set(checkpoint) == keys
    assert (checkpoint["format"], checkpoint["iteration"], checkpoint["global_step"]) == (2, 12, 384)
    assert set(checkpoint["args"]) == {field.name for field in dataclasses.fields(ppo.Args)}
    assert checkpoint["args"]["total_timesteps"] == 384
    assert checkpoint["args"]["resume"] is checkpoint["args"]["evaluate"] is None
    assert {"obs_stats.mean", "obs_stats.std", "obs_stats.count", "return_stats.std"} < set(
        checkpoint["agent"]
    )
    assert checkpoint["optimizer"]["moments"].abs().amax(1).min() > 0
    assert checkpoint["optimizer"]["count"] == 12 * 2 * 2, "iterations, epochs, minibatches"
    returns, lengths = checkpoint["recent"]
    assert returns == lengths, "in CartPole"
    assert len(returns) > 5
    assert sorted(os.listdir(finished))[-1].startswith("events")
    assert len(os.listdir(finished)) == 2, "no best.pt before there are 100 episodes, and nothing temporary"


def saved_iterations(monkeypatch, **flags):
    iterations, save = [], ppo.Run.save
    monkeypatch.setattr(ppo.Run, "save", lambda self, i: (iterations.append(i), save(self, i)))
    ppo.train(ppo.Args(**{**SMALL, **flags}))
    return iterations


@pytest.mark.parametrize(
    ("interval", "total", "expected"),
    [
        (5, 384, [0, 5, 10, 12]),
        (6, 384, [0, 6, 12]),
        (0, 384, [12]),
        (None, 384, [0, 12]),
        (None, 700 * 32, [0, 625, 700]),  # 10,000 steps of 16 an iteration
    ],
)
def test_when_checkpoints_are_written(interval, total, expected, monkeypatch):
    flags = {"update_epochs": 1, "env_id": "Match-v0"}
    assert (
        saved_iterations(monkeypatch, checkpoint_interval=interval, total_timesteps=total, **flags)
        == expected
    )


def test_the_default_interval_of_a_long_run_is_a_hundredth(monkeypatch):
    """Long, by rollouts of a step that each have 10,000 environment steps."""
    flags = {"num_envs": 1, "num_steps": 10_000, "num_minibatches": 1, "update_epochs": 1, "hidden_sizes": ()}
    monkeypatch.setattr(ppo.Agent, "act", lambda self, obs: torch.zeros(len(obs), dtype=torch.int64))
    iterations = []
    monkeypatch.setattr(ppo.Run, "save", lambda self, i: iterations.append(i) or (i < 6 or sys.exit()))
    with pytest.raises(SystemExit):
        ppo.train(ppo.Args(env_id="Forever-v0", total_timesteps=320 * 10_000, **flags))
    assert iterations == [0, 3, 6]


def test_a_checkpoint_cuts_the_episodes_and_what_hangs_on_them(monkeypatch, updates):
    """Forever's episodes last 10 steps. Begun anew every 16 rows, they never get to the end of the second."""
    gaes, original = [], ppo.gae
    monkeypatch.setattr(ppo, "gae", lambda *args: gaes.append(args) or original(*args))
    flags = {**SMALL, "checkpoint_interval": 1, "total_timesteps": 96, "gamma": 0.9}
    agent = ppo.train(ppo.Args(env_id="Forever-v0", **flags))
    for _, value, terminated, done, *_ in gaes:
        assert done.nonzero()[:, 0].tolist() == [9, 9], "cut episodes are not marked as ended"
        assert not terminated.any()
        assert value.shape == (17, 2), "their last observation has a value to bootstrap from"
    sums = [sum(0.9**k for k in range(n)) for n in [*range(1, 11), *range(1, 6)]]
    assert agent.return_stats.count == 3 * 2 * 15, "row 10 resets; row 0 never does"
    assert agent.return_stats.mean.item() == pytest.approx(np.mean(sums), rel=1e-5)
    recent, _ = torch.load("runs/" + os.listdir("runs")[0] + "/checkpoint.pt")["recent"]
    assert recent == [10.0] * 6, "and do not count as episodes"


def test_best(monkeypatch):
    """best.pt is that of the checkpoint whose mean of the last 100 returns was the highest."""
    seen, save = [], ppo.Run.save

    def recording(self, iteration):
        save(self, iteration)
        seen.append((np.mean(list(self.queues[0])[-100:]) if len(self.queues[0]) >= 100 else None, iteration))

    monkeypatch.setattr(ppo.Run, "save", recording)
    flags = {"run_name": "a", "total_timesteps": 20 * 512, "checkpoint_interval": 1, "eval_episodes": 0}
    ppo.train(ppo.Args(env_id="RiseAndFall-v0", **flags))
    means = [(mean, iteration) for mean, iteration in seen if mean is not None]
    best, checkpoint = torch.load("runs/a/best.pt"), torch.load("runs/a/checkpoint.pt")
    mean, iteration = max(means)
    assert means[0][1] < iteration < means[-1][1], "the test needs a run that has its best in between"
    assert best["iteration"] == iteration
    assert best["best"] == checkpoint["best"] == pytest.approx(mean)
    assert np.mean(best["recent"][0]) == pytest.approx(mean)
    assert not torch.equal(best["agent"]["critic.4.bias"], checkpoint["agent"]["critic.4.bias"])


def test_a_complete_run_says_so_and_stays_as_it_is(copy, tmp_path):
    before = files(tmp_path)
    for more in ([], ["--total-timesteps=300"], ["--eval-episodes=3"]):
        result = run(tmp_path, "--resume", "runs/a", *more)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout == "runs/a is complete. A larger --total-timesteps trains it further.\n"
    assert files(tmp_path) == before


def test_training_longer(copy, tmp_path):
    """Twice the timesteps: the learning rate goes by the new total from where the run had ended."""
    result = run(tmp_path, "--resume=runs/a/", "--total-timesteps=768", "--checkpoint-interval=2")
    assert result.returncode == 0, result.stderr
    assert "run: runs/a/, from step 384" in result.stdout
    checkpoint = torch.load(copy / "checkpoint.pt")
    assert (checkpoint["iteration"], checkpoint["args"]["total_timesteps"]) == (24, 768)
    assert checkpoint["args"]["checkpoint_interval"] == 2
    events = EventAccumulator(str(copy)).Reload()
    rates = [(e.step, e.value) for e in events.Scalars("charts/learning_rate")]
    expected = [2.5e-4 * (1 - i / 12) for i in range(12)] + [2.5e-4 * (1 - i / 24) for i in range(12, 24)]
    assert [step for step, _ in rates] == list(range(32, 769, 32))
    assert [rate for _, rate in rates] == pytest.approx(expected)
    assert run(tmp_path, "--resume=runs/a").stdout.startswith("runs/a is complete")


def test_resuming_twice_from_one_checkpoint_is_the_same(copy, tmp_path):
    """In Python, where the other arguments have to be those that the run was started with."""
    shutil.copytree(copy, tmp_path / "runs" / "b")
    args = ppo.Args(run_name="a", total_timesteps=768, checkpoint_interval=4, **SMALL)
    a, b = (ppo.train(dataclasses.replace(args, resume=f"runs/{name}")).state_dict() for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert (tmp_path / "runs/a/checkpoint.pt").read_bytes() == (
        tmp_path / "runs/b/checkpoint.pt"
    ).read_bytes()
    with pytest.raises(ppo.InputError, match="--seed, --gamma cannot be given with --resume runs/a"):
        ppo.train(dataclasses.replace(args, resume="runs/a", seed=2, gamma=0.9))
    with pytest.raises(ppo.InputError, match="--evaluate cannot be given with --resume runs/a"):
        ppo.train(dataclasses.replace(args, resume="runs/a", evaluate="runs/b"))
    with pytest.raises(ppo.InputError, match="--resume must be the folder of a run"):
        ppo.train(dataclasses.replace(args, resume="runs/a/checkpoint.pt"))


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
    "empty": lambda path: path.write_bytes(b""),
    "torn": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "the last block lost": lambda path: path.write_bytes(path.read_bytes()[:-4096] + bytes(4096)),
    "flipped byte": flip_a_byte,
    "no checkpoint": lambda path: path.write_text("not a checkpoint\n" * 100),
    "a tensor": lambda path: torch.save(torch.zeros(3), path),
    "weights alone": rewrite(lambda checkpoint: [checkpoint.pop(name) for name in [*checkpoint][:-2]]),
    "another format": rewrite(lambda checkpoint: checkpoint.update(format=1)),
    "another environment": rewrite(lambda checkpoint: checkpoint["args"].update(env_id="Acrobot-v1")),
    "an unknown flag": rewrite(lambda checkpoint: checkpoint["args"].update(colour="red")),
    "code, zipped": lambda path: torch.save(Exploit(), path),
    "code, in old style": lambda path: torch.save(Exploit(), path, _use_new_zipfile_serialization=False),
    "code, bare": lambda path: path.write_bytes(pickle.dumps(Exploit())),
}


@pytest.fixture(scope="module")
def bad_checkpoints(finished, tmp_path_factory):
    def attempt(case):
        name, flag = case
        folder = tmp_path_factory.mktemp("bad")
        path = Path(shutil.copytree(finished, folder / "runs" / "a")) / "checkpoint.pt"
        BAD_CHECKPOINTS[name](path)
        before = files(folder)
        more = {"--resume": "--total-timesteps=768", "--evaluate": "--eval-episodes=2"}
        result = run(folder, flag, "runs/a", more[flag])
        return result, before, files(folder)

    cases = [(name, flag) for name in BAD_CHECKPOINTS for flag in ("--resume", "--evaluate")]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(cases, pool.map(attempt, cases), strict=True))


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
def test_bad_checkpoints_are_refused_in_a_sentence(name, flag, bad_checkpoints):
    result, before, after = bad_checkpoints[name, flag]
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("ppo.py: Cannot use runs/a/checkpoint.pt: ")
    assert after == before, "nothing is executed or overwritten"


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--resume", "runs/none"], ["runs/none"]),
        (["--resume", "runs/a/checkpoint.pt", "--total-timesteps=768"], ["runs/a/checkpoint.pt", "folder"]),
        (["--evaluate", "runs/none.pt"], ["runs/none.pt"]),
        (["--resume", "runs/a", "--learning-rate", "1e-3"], ["--learning-rate", "runs/a"]),
        (["--resume", "runs/a", "--seed=2", "--hidden-sizes", "8", "--no-norm-obs"],
         ["--seed", "--hidden-sizes", "--norm-obs"]),
        (["--resume", "runs/a", "--env-id", "Acrobot-v1"], ["--env-id"]),
        (["--resume", "runs/a", "--run-name", "b"], ["--run-name"]),
        (["--evaluate", "runs/a", "--eval-episodes=2", "--env-id", "Acrobot-v1"], ["--env-id"]),
        (["--evaluate", "runs/a", "--resume", "runs/a"], ["--evaluate", "--resume"]),
        (["--resume", ""], ["--resume"]),
        (["--evaluate", ""], ["--evaluate"]),
    ],
)  # fmt: skip
def test_flags_that_a_saved_run_refuses(flags, parts, copy, tmp_path):
    before = files(tmp_path)
    result = run(tmp_path, *flags)
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("ppo.py: ")
    assert all(part in line for part in parts), line
    assert files(tmp_path) == before


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    """Full from the second of four checkpoints on, that is at step 128, as the kernel reports it."""
    flags = ["--run-name=a", "--total-timesteps=384", "--checkpoint-interval=4", *SMALL_FLAGS]
    result = drive(tmp_path, "full:2", *flags)
    assert result.returncode == 1
    assert result.stderr == "ppo.py: [Errno 27] File too large\n"
    assert "resume from step 128: python ppo.py --resume runs/a" in result.stdout
    assert torch.load(tmp_path / "runs/a/checkpoint.pt", weights_only=True)["iteration"] == 4
    assert run(tmp_path, "--resume", "runs/a").returncode == 0
    assert torch.load(tmp_path / "runs/a/checkpoint.pt", weights_only=True)["iteration"] == 12


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("target", ["process", "group"])
def test_signals(mode, number, code, target, tmp_path):
    """To the process alone, and to its group, as a terminal does with Ctrl-C."""
    env = {**os.environ, "PYTHONPATH": str(TESTS)}
    flags = ["--run-name=a", "--vectorization-mode", mode, "--total-timesteps=1_000_000"]
    process = subprocess.Popen(
        [sys.executable, str(PPO), *flags, "--checkpoint-interval=5"], cwd=tmp_path, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    path = tmp_path / "runs" / "a" / "checkpoint.pt"
    deadline = time.monotonic() + 60
    while not (path.exists() and torch.load(path)["iteration"] >= 5):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (os.kill if target == "process" else os.killpg)(process.pid, number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert err == ""
    step = torch.load(path)["global_step"]
    assert out.splitlines()[-1] == f"resume from step {step:,}: python ppo.py --resume runs/a"
    time.sleep(0.2)  # for the system to bury them
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    events = EventAccumulator(str(path.parent)).Reload()
    assert events.Scalars("losses/policy_loss")[-1].step >= step


def test_signals_again_and_during_the_start(tmp_path):
    """Ctrl-C again and again is as once, and where there is no checkpoint yet there is nothing to resume."""
    env = {**os.environ, "PYTHONPATH": str(TESTS)}
    flags = ["--run-name=a", "--total-timesteps=1_000_000", "--checkpoint-interval=0"]
    flags += ["--vectorization-mode=async", "--num-envs=8"]
    process = subprocess.Popen(
        [sys.executable, str(PPO), *flags], cwd=tmp_path, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    while not (tmp_path / "runs").exists():
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    deadline = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
        os.kill(process.pid, signal.SIGINT)
        os.kill(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "")
    assert "resume" not in out
    assert not (tmp_path / "runs/a/checkpoint.pt").exists()


def test_an_exit_that_python_swallows_is_tried_again(tmp_path):
    """What a signal raises in a __del__ is lost, whoever sent it; the run ends all the same."""
    flags = ["--env-id=probes:Nuisance-v0", '--env-kwargs={"kind":"del"}', "--checkpoint-interval=5"]
    result = run(tmp_path, "--run-name=a", "--total-timesteps=10_000_000", *flags)
    assert result.returncode == 143
    assert re.search(r"resume from step [\d,]+: python ppo.py --resume runs/a\n$", result.stdout)


def test_workers_may_close_their_environments(tmp_path):
    """Which here means a process of its own for each, that would outlive it."""
    env = {**os.environ, "PYTHONPATH": str(TESTS)}
    flags = ["--env-id=probes:Nuisance-v0", '--env-kwargs={"kind":"child"}', "--vectorization-mode=async"]
    process = subprocess.Popen(
        [sys.executable, str(PPO), *flags, "--run-name=a", "--total-timesteps=10_000_000"], cwd=tmp_path,
        env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    while not (tmp_path / "runs/a/checkpoint.pt").exists():
        time.sleep(0.05)
    process.terminate()
    _, err = process.communicate(timeout=30)  # returns when nobody holds the pipes any more
    assert (process.returncode, err) == (143, "")
    time.sleep(0.2)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_a_nan_names_the_last_checkpoint_and_leaves_it(tmp_path):
    flags = ["--env-id=probes:Faulty-v0", '--env-kwargs={"fault":"reward"}', "--checkpoint-interval=2"]
    result = run(tmp_path, "--run-name=a", *flags, *SMALL_FLAGS)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("ppo.py: reward[")
    assert "resume from step 64: python ppo.py --resume runs/a" in result.stdout
    checkpoint = torch.load(tmp_path / "runs/a/checkpoint.pt")
    assert checkpoint["global_step"] == 64
    assert all(torch.isfinite(x).all() for x in checkpoint["agent"].values())


def test_numpy_and_other_objects_in_the_arguments():
    """Numbers of numpy are saved as numbers; what cannot be saved plainly does not make a bad checkpoint."""
    space = ppo.spaces.Discrete(3)
    flags = {**SMALL, "seed": np.int64(3), "learning_rate": np.float32(0.5), "hidden_sizes": (np.int32(8),)}
    flags |= {
        "env_id": "Spaces-v0",
        "env_kwargs": {"action_space": space},
        "run_name": "a",
        "eval_episodes": 1,
    }
    agent = ppo.train(ppo.Args(total_timesteps=64, **flags))
    args = torch.load("runs/a/checkpoint.pt", weights_only=True)["args"]
    assert (args["seed"], args["learning_rate"], args["hidden_sizes"]) == (3, 0.5, [8])
    assert args["env_kwargs"] == {"action_space": "Discrete(3)"}
    assert agent.actor[-1].out_features == 3
    flags |= {
        "num_envs": np.int64(2),
        "num_steps": np.int32(16),
        "hidden_sizes": [8],
        "device": torch.device("cpu"),
    }
    args = ppo.Args(total_timesteps=64, **{**flags, "run_name": "b"})
    ppo.train(args)
    assert type(torch.load("runs/b/checkpoint.pt", weights_only=True)["global_step"]) is int
    ppo.train(dataclasses.replace(args, resume="runs/b", total_timesteps=128))
    assert torch.load("runs/b/checkpoint.pt", weights_only=True)["global_step"] == 128


def test_the_last_line_goes_by_the_file(monkeypatch, capsys):
    """A signal that comes while a checkpoint gets its name is handled right after, with save unfinished."""
    replace = os.replace

    def interrupted(source, target):
        replace(source, target)
        if torch.load(target)["iteration"] == 2:
            raise SystemExit(130)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(SystemExit):
        ppo.train(ppo.Args(run_name="a", total_timesteps=2048, checkpoint_interval=1))
    assert "resume from step 1,024: python ppo.py --resume runs/a" in capsys.readouterr().out
