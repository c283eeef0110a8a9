"""The program as a user meets it: help, errors, exit codes, the console and what is on the disk."""

import ast
import dataclasses
import fcntl
import json
import os
import pty
import re
import resource
import struct
import subprocess
import sys
import termios
import time
import traceback
import warnings
from pathlib import Path

import failing  # noqa: F401 (registers the environments)
import numpy as np
import pytest
import torch
from gymnasium import spaces

import ppo

PPO = Path(ppo.__file__)
TESTS = Path(__file__).parent


def run(folder, *flags, path="", program=PPO, **kwargs):
    """Run the program in a folder, where the environments of the tests can be imported."""
    env = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{path}", "COLUMNS": "100"}
    command = [sys.executable, str(program), *flags]
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=300, **kwargs
    )


@pytest.fixture
def main(monkeypatch, capsys, tmp_path):
    """Do what the command line does, in this process: the exit code, stdout and stderr.

    There is a run called taken already, and no more when it has ended.
    """

    def main(*flags):
        (tmp_path / "runs" / "taken").mkdir(parents=True, exist_ok=True)
        monkeypatch.setattr(sys, "argv", ["ppo.py", *flags])
        monkeypatch.setenv("COLUMNS", "100")  # of the help
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            ppo.main()
        assert_nothing_is_left(tmp_path)
        return exit.value.code, *capsys.readouterr()

    return main


@pytest.fixture
def main_raises(monkeypatch):
    """Do what the command line does, and return the exception that main lets pass.

    Python prints such a one with its traceback, and ends with exit code 1.
    """

    def main_raises(*flags):
        monkeypatch.setattr(sys, "argv", ["ppo.py", *flags])
        with pytest.raises(Exception, match="the motor is on fire") as caught:
            ppo.main()
        return caught.type.__name__, "".join(traceback.format_exception(caught.value))

    return main_raises


def assert_nothing_is_left(folder):
    assert os.listdir(folder) == ["runs"]
    assert os.listdir(folder / "runs") == ["taken"]
    assert os.listdir(folder / "runs" / "taken") == []


def env_flags(env_id, mode="sync", **kwargs):
    flags = ["--env-id", env_id, "--vectorization-mode", mode]
    return [*flags, "--env-kwargs", json.dumps(kwargs)] if kwargs else flags


# What the user gives, and what the sentence has to say.
BAD_INPUT = {
    "unknown environment": (["--env-id=CartPoll-v1"], ["CartPoll", "Did you mean", "CartPole"]),
    "unknown version": (["--env-id=CartPole-v9"], ["CartPole-v9", "v1"]),
    "malformed id": (["--env-id=not/an/id!"], ["not/an/id!"]),
    "missing module": (["--env-id=no_such_module:Env-v0"], ["No module named 'no_such_module'"]),
    "a name that a module lacks": (
        ["--env-id=lacking:Env-v0"],
        ["cannot import name 'nothing' from 'gymnasium'"],
    ),
    "unknown keyword": (['--env-kwargs={"gravity": 1}'], ["gravity", "CartPole-v1"]),
    "clashing keyword": (['--env-kwargs={"num_envs": 2}'], ["num_envs"]),
    "refused value": (
        env_flags("probes:Faulty-v0", fault="refusal", size=-7),
        ["probes:Faulty-v0", "'size': -7", "ValueError", "size -7 is too small"],
    ),
    "not an object": (["--env-kwargs=[1]"], ["--env-kwargs must be a JSON object", "[1]"]),
    "an empty list": (["--env-kwargs=[]"], ["--env-kwargs must be a JSON object", "[]"]),
    "observation space": (
        env_flags("probes:Faulty-v0", fault="observation space"),
        ["Sequence", "not supported"],
    ),
    "action space": (
        env_flags("probes:Faulty-v0", mode="async", fault="action space"),
        ["Tuple", "not supported"],
    ),
    "autoreset mode": (
        env_flags("probes:SameStep-v0", mode="vector_entry_point"),
        ["SAME_STEP", "NEXT_STEP"],
    ),
    "no vector entry point": (
        env_flags("Acrobot-v1", mode="vector_entry_point"),
        ["vector entry point"],
    ),
    "unknown device": (["--device=abacus"], ["no device abacus", "--device"]),
    "absent device": (["--device=cuda:77"], ["no device cuda:77", "--device"]),
    "device without data": (["--device=meta"], ["no device meta", "--device"]),
    "existing run": (["--run-name=taken"], ["taken", "--run-name"]),
    "too few rows": (
        ["--num-envs=1", "--num-steps=15", "--num-minibatches=4"],
        ["--num-minibatches", "two rows"],
    ),
    "no run to resume": (["--resume=nowhere"], ["Cannot use nowhere", "No such file"]),
    "no run to evaluate": (["--evaluate=nowhere"], ["Cannot use nowhere", "No such file"]),
}
MISSING = {  # the same, where some packages are not installed
    "environment": (["--env-id=HalfCheetah-v5"], ["MuJoCo", 'pip install "gymnasium[mujoco]"']),
    "games": (["--env-id=ALE/Pong-v5"], ["No module named 'ale_py'", "pip install ale-py"]),
    "renderer": (['--env-kwargs={"render_mode": "human"}'], ["pygame", "pip install"]),
}
OUT_OF_RANGE = {
    "num_envs": [0, -1],
    "total_timesteps": [0, -1],
    "num_steps": [0, -1],
    "num_minibatches": [0, -1],
    "update_epochs": [0, -1],
    "hidden_sizes": [(0,), (64, -3)],
    "seed": [-1],
    "eval_episodes": [-1],
    "checkpoint_interval": [0, -1],
    "learning_rate": [-1e-9, float("nan"), float("inf")],
    "ent_coef": [-0.1, float("nan"), float("inf")],
    "vf_coef": [-0.1, float("nan"), float("inf")],
    "gamma": [1.01, -0.1, float("nan")],
    "gae_lambda": [1.01, -0.1, float("nan")],
    "clip_coef": [0.0, float("nan"), float("inf")],
    "max_grad_norm": [0.0, float("nan"), float("inf")],
    "target_kl": [0.0, -1.0, float("nan"), float("inf")],
    "dual_clip": [1.0, float("nan"), float("inf")],
    "log_std_init": [-20.1, 2.1, float("nan")],
}
LIMITS = {  # what is just in range
    "num_envs": [1],
    "total_timesteps": [1],
    "num_minibatches": [1],
    "update_epochs": [1],
    "hidden_sizes": [(), (1,)],
    "seed": [0],
    "eval_episodes": [0],
    "checkpoint_interval": [1],
    "learning_rate": [0.0],
    "ent_coef": [0.0],
    "vf_coef": [0.0],
    "gamma": [0.0, 1.0],
    "gae_lambda": [0.0, 1.0],
    "log_std_init": [-20.0, 2.0],
}


SHORT = "--total-timesteps=512"  # so that what is not refused, as it should be, ends soon


def flag(name):
    return "--" + name.replace("_", "-")


def assert_says(code, stderr, parts):
    """Exit code 2 and one sentence, which has these parts, and no advice but among them."""
    assert code == 2
    (line,) = stderr.splitlines()
    assert line.startswith("ppo.py: ")
    for part in parts:
        assert part in line
    assert ("pip install" in line) == ("pip install" in " ".join(parts))


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_sentence_and_exit_code_2(name, main):
    flags, parts = BAD_INPUT[name]
    code, _, stderr = main(SHORT, *flags)
    assert_says(code, stderr, parts)


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_package_is_one_sentence_and_exit_code_2(name, tmp_path):
    modules = tmp_path / "modules"
    modules.mkdir()
    for module in ("ale_py", "mujoco", "pygame"):
        error = f"ModuleNotFoundError(\"No module named '{module}'\", name='{module}')"
        (modules / f"{module}.py").write_text(f"raise {error}")
    flags, parts = MISSING[name]
    result = run(tmp_path, *flags, path=modules)
    assert_says(result.returncode, result.stderr, parts)
    assert os.listdir(tmp_path) == ["modules"]


def test_games_that_the_installed_package_lacks(tmp_path):
    """Nobody is told to install what is there: here an ale_py that registers nothing."""
    (tmp_path / "ale_py.py").write_text("")
    result = run(tmp_path, "--env-id=ALE/Pong-v5", path=tmp_path)
    assert result.returncode == 2
    assert "ALE" in result.stderr
    assert "pip install ale-py" not in result.stderr


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_a_flag_out_of_range_is_exit_code_2(name, main):
    value = OUT_OF_RANGE[name][-1]
    given = [str(x) for x in (value if isinstance(value, tuple) else (value,))]
    code, _, stderr = main(SHORT, flag(name), *given)
    assert_says(code, stderr, [f"{flag(name)} must be "])


@pytest.mark.parametrize(
    ("name", "value"), [(name, x) for name, values in OUT_OF_RANGE.items() for x in values]
)
def test_every_numeric_flag_has_a_range(name, value):
    with pytest.raises(ValueError, match=f"^{flag(name)} must be .*, not "):
        ppo.train(ppo.Args(**{"total_timesteps": 512, name: value}))
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("name", "value"), [(name, x) for name, values in LIMITS.items() for x in values]
)
def test_ranges_include_their_limits(name, value):
    ppo.check(ppo.Args(**{name: value}))


def test_no_numeric_flag_is_forgotten():
    """Nor is one that a fork adds: some number is wrong for every one of them."""
    for field in dataclasses.fields(ppo.Args):
        kind = getattr(field.type, "__name__", "") or str(field.type)
        if "tuple[int" in str(field.type):
            wrong = (-1,)
        elif re.search(r"\bfloat\b", f"{kind} {field.type}"):
            wrong = float("nan")
        elif re.search(r"\bint\b", f"{kind} {field.type}"):
            wrong = -1
        else:
            assert field.name not in OUT_OF_RANGE
            continue
        with pytest.raises(ppo.InputError, match=flag(field.name)):
            ppo.check(ppo.Args(**{field.name: wrong}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("env_id", "CartPoll-v1"),
        ("vectorization_mode", "threads"),
        ("activation", "gelu"),
        ("device", "abacus"),
        ("env_kwargs", ["size"]),
        ("resume", "nowhere"),
        ("run_name", "taken"),
    ],
)
def test_in_python_bad_input_is_a_value_error(name, value, tmp_path):
    (tmp_path / "runs" / "taken").mkdir(parents=True)
    with pytest.raises(ValueError, match=value[0] if name == "env_kwargs" else value):
        ppo.train(ppo.Args(**{"total_timesteps": 512, name: value}))
    assert_nothing_is_left(tmp_path)


@pytest.mark.parametrize(
    "flags",
    [["--num-envs", "two"], ["--env-kwargs", "{"], ["--no-such-flag"], ["--activation", "x"]],
    ids=" ".join,
)
def test_what_cannot_be_parsed_is_exit_code_2(flags, main):
    code, _, stderr = main(*flags)
    assert code == 2
    assert flags[0] in stderr
    assert "Traceback" not in stderr


# What the constructor of an environment does.
@pytest.mark.parametrize("error", ["AssertionError", "KeyError", "TypeError", "ValueError"])
def test_a_constructor_that_refuses_its_arguments(error, main):
    code, _, stderr = main(*env_flags(f"failing:{error}-v0", where="constructor"))
    parts = [f"failing:{error}-v0", "'where': 'constructor'", error, "the motor is on fire"]
    assert_says(code, stderr, parts)


@pytest.mark.parametrize("more", [[], ["--preset=none"]])
@pytest.mark.parametrize("error", ["AssertionError", "KeyError", "TypeError", "ValueError"])
def test_a_constructor_that_has_no_arguments_to_refuse(error, more, main_raises):
    """So it is a bug, and keeps its traceback."""
    name, shown = main_raises(*env_flags(f"failing:{error}-v0"), *more)
    assert name == error
    assert "failing.py" in shown
    assert os.listdir() == []


@pytest.mark.parametrize("error", ["RuntimeError", "ZeroDivisionError", "OSError"])
def test_a_constructor_that_fails(error, main_raises):
    """These are no refusals, whatever the arguments."""
    name, shown = main_raises(*env_flags(f"failing:{error}-v0", where="constructor"))
    assert name == error
    assert "failing.py" in shown
    assert os.listdir() == []


# Help.
HELP = {
    "short": (["-h", "--preset=none"], ""),
    "unknown environment": (["--env-id=CartPoll-v1", "--help"], "CartPoll"),
    "missing module": (["--help", "--env-id=no_such_module:Env-v0"], "No module named"),
    "refused value": (["--help", *BAD_INPUT["refused value"][0]], "size -7 is too small"),
    "not an object": (["--env-kwargs=[1]", "--help"], "--env-kwargs must be"),
    "no run to resume": (["--resume=nowhere", "--help"], "Cannot use nowhere"),
    "no run to evaluate": (["-h", "--evaluate=nowhere"], "Cannot use nowhere"),
}


def words(text):
    """Text without the frames around it and its division into lines."""
    return " ".join(re.sub("[│╭╮╰╯─]", " ", text).split())


@pytest.mark.parametrize("name", HELP)
def test_help_is_always_printed(name, main):
    """Where the environment or the run cannot be had, a sentence above the help says so."""
    _, alone, _ = main("--help", "--preset=none")
    flags, reason = HELP[name]
    code, stdout, stderr = main(*flags)
    assert (code, stderr) == (0, "")
    assert stdout.endswith(alone)
    above = stdout.removesuffix(alone)
    assert reason in above
    assert bool(above) == bool(reason)
    assert "--num-envs INT" in alone


def test_help_is_printed_where_a_constructor_has_a_bug(main):
    code, stdout, _ = main("--help", "--env-id=failing:ValueError-v0")
    assert code == 0
    assert "the motor is on fire" in stdout
    assert "--num-envs INT" in stdout


def test_help_has_a_sentence_for_every_flag(main):
    text = words(main("--help")[1])
    kind = r"(?:[{\[A-Z]\S*(?: \[?[A-Z.\]]+)* )?"
    for field in dataclasses.fields(ppo.Args):
        sentence = rf"{flag(field.name)}(?:, --no-\S+)? {kind}[a-zA-Z](?:(?!\(default:).){{14,}}"
        assert re.search(sentence, text), f"{field.name} has no help"
    assert "1_000_000" in text


def test_every_flag_is_read_somewhere():
    code = PPO.read_text()
    for field in dataclasses.fields(ppo.Args):
        assert re.search(rf"(args|self)\.{field.name}\b", code), f"nothing reads {field.name}"


# A run.
def test_a_run(tmp_path):
    """Underscores in numbers, a made-up folder, a header, progress, a summary; stderr is empty."""
    flags = ["--total-timesteps", "2_048", "--env-id", "probes:Match-v0", "--exp-name", "a/b: c"]
    result = run(tmp_path, *flags)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    (name,) = os.listdir(tmp_path / "runs")
    assert re.fullmatch(r"probes-Match-v0__a-b--c__1__\d+", name)
    header = result.stdout.splitlines()
    assert header[0] == f"run: runs/{name}, from step 0, preset discrete"
    assert header[1] == "environments: 8 x probes:Match-v0, sync"
    assert header[5] == "first rollout, of 512 steps ..."
    assert header[2] == "spaces: (1,) -> Discrete(2)"
    assert re.fullmatch(r"agent: [\d,]+ parameters on cpu, processes: 1", header[3])
    assert header[4] == "update: 10 epochs of 4 minibatches of 128 rows"
    assert re.match(r"2,048 steps \(100%\), 0:00:00 left, [\d,]+ steps/s, return .*", header[9])
    *_, end, way, evaluation = result.stdout.splitlines()
    assert end.startswith("end: 2,048 steps (100%)")
    assert way == f"evaluate from step 2,048: python {PPO} --evaluate runs/{name}"
    number = r"-?[\d,.]+"
    pattern = rf"eval: mean {number} std {number} min {number} max {number} \(10 episodes, greedy\)"
    assert re.fullmatch(pattern, evaluation)
    assert os.listdir(tmp_path) == ["runs"]


TINY = {"env_id": "Match-v0", "total_timesteps": 64, "num_steps": 16, "eval_episodes": 0}


def test_run_folders_are_never_shared(tmp_path, monkeypatch):
    """Made-up names hold milliseconds; where even these are equal, the second run is refused."""
    monkeypatch.setattr(time, "time_ns", lambda: 7_001_000_000)
    ppo.train(ppo.Args(**TINY))
    monkeypatch.setattr(time, "time_ns", lambda: 7_002_000_000)
    ppo.train(ppo.Args(**TINY))
    assert sorted(os.listdir("runs")) == [f"Match-v0__ppo__1__{t}" for t in (7001, 7002)]
    with pytest.raises(ppo.InputError, match="7002"):
        ppo.train(ppo.Args(**TINY))
    (tmp_path / "runs").rename(tmp_path / "moved")
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(ppo.InputError, match="runs"):
        ppo.train(ppo.Args(**TINY, run_name="x"))


def test_a_run_name_is_made_safe():
    for name in ("a b/../c", "日本語", "..."):
        ppo.train(ppo.Args(**TINY, run_name=name))
    assert sorted(os.listdir("runs")) == sorted(["a-b-..-c", "日本語", "run"])
    with pytest.raises(ppo.InputError, match="runs/run"):
        ppo.train(ppo.Args(**TINY, run_name="..."))
    assert os.listdir() == ["runs"]


def in_a_terminal(folder, columns, *flags):
    """What the program shows in a pseudo-terminal of so many columns, without the ends of lines."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env = {**os.environ, "PYTHONPATH": str(TESTS)}
    env.pop("COLUMNS", None)
    command = [sys.executable, str(PPO), *flags]
    process = subprocess.Popen(
        command, cwd=folder, env=env, stdin=child, stdout=child, stderr=child
    )
    os.close(child)
    output = b""
    try:
        while chunk := os.read(parent, 4096):
            output += chunk
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(parent)
    assert process.wait() == 0
    return output.decode().replace("\r\n", "\n").split("\n")


@pytest.mark.parametrize("columns", [60, 0])
def test_progress_on_a_terminal_is_one_line(columns, tmp_path):
    """All of the progress overwrites itself, and is cut to the width, unless that is unknown."""
    lines = in_a_terminal(tmp_path, columns, "--total-timesteps=10_240", "--eval-episodes=0")
    (progress,) = [line for line in lines if "\r" in line]
    updates = progress.replace("\x1b[K", "").split("\r")[1:]
    assert len(updates) == 21
    assert updates[0] == "first rollout, of 512 steps ..."
    if columns == 0:
        assert all(re.search(r", length [\d.]+$", update) for update in updates[1:])
    else:
        assert max(map(len, updates)) == columns - 1
    pattern = r"9,216 steps \(90%\), \d:\d\d:\d\d left, [\d,]+ steps/s, return"
    assert re.match(pattern, updates[18])


def test_import_has_no_side_effects(tmp_path):
    code = "import torch; n = torch.get_num_threads(); state = torch.get_rng_state(); import ppo; "
    code += "assert torch.get_num_threads() == n; assert torch.get_rng_state().equal(state)"
    env = {**os.environ, "PYTHONPATH": str(PPO.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert os.listdir(tmp_path) == []


@pytest.mark.upstream
def test_defaults():
    """Those of CleanRL's ppo.py, with scaling on. A fork may have more flags."""
    expected = {
        "exp_name": "ppo",
        "run_name": None,
        "seed": 1,
        "torch_deterministic": True,
        "device": "auto",
        "resume": None,
        "checkpoint_interval": None,
        "evaluate": None,
        "eval_episodes": 10,
        "eval_stochastic": False,
        "capture_video": False,
        "env_id": "CartPole-v1",
        "env_kwargs": {},
        "preset": "none",
        "num_envs": 4,
        "vectorization_mode": "sync",
        "total_timesteps": 500_000,
        "num_steps": 128,
        "gamma": 0.99,
        "gae_lambda": 0.95,
        "learning_rate": 2.5e-4,
        "anneal_lr": True,
        "num_minibatches": 4,
        "update_epochs": 4,
        "norm_adv": True,
        "max_grad_norm": 0.5,
        "target_kl": None,
        "recompute_advantages": False,
        "clip_coef": 0.2,
        "anneal_clip": False,
        "clip_vloss": True,
        "dual_clip": None,
        "ent_coef": 0.01,
        "vf_coef": 0.5,
        "hidden_sizes": (64, 64),
        "activation": "tanh",
        "log_std_init": 0.0,
        "norm_obs": True,
        "norm_reward": True,
    }
    defaults = vars(ppo.Args())
    assert {name: defaults[name] for name in expected} == expected


def test_torch_deterministic():
    for deterministic in (True, False):
        ppo.train(ppo.Args(**TINY, torch_deterministic=deterministic))
        assert torch.backends.cudnn.deterministic is deterministic


# What stops a run.
def working_in(folder):
    """The processes, beside this, with this working directory; Linux alone shows them."""
    processes = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if link.readlink() == folder:
                processes.append(int(link.parent.name))
        except OSError:
            continue  # it has ended, or is another user's
    return [process for process in processes if process != os.getpid()]


@pytest.mark.parametrize(
    "flags",
    [
        env_flags("probes:Faulty-v0", mode="async", fault="death"),
        env_flags("probes:Faulty-v0", mode="async", fault="odd exception"),
        [*env_flags("failing:Stuck-v0", mode="async"), "--num-envs=2"],
    ],
    ids=["death", "odd exception", "death beside a long step"],
)
def test_async_workers_that_fail_do_not_hang_the_run(flags, tmp_path):
    """Some are killed, some raise what cannot be passed on; no process stays behind.

    There is one traceback, as closing the environments does not wait for the dead.
    """
    result = run(tmp_path, *flags)
    assert result.returncode == 1
    assert result.stderr.count("Traceback (most recent call last):\n  File") == 1
    assert "end: 0 steps" in result.stdout
    assert working_in(tmp_path) == []


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_an_exception_of_the_environment_keeps_its_traceback(mode, tmp_path):
    flags = env_flags("probes:Faulty-v0", mode=mode, fault="exception")
    result = run(tmp_path, *flags, "--num-steps=16", "--num-envs=4", "--run-name=a")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "RuntimeError: the motor is on fire" in result.stderr
    assert f"resume from step 128: python {PPO} --resume runs/a" in result.stdout
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    losses = EventAccumulator(str(tmp_path / "runs" / "a")).Reload().Scalars("losses/policy_loss")
    assert [event.step for event in losses] == [64, 128], "what came before is flushed"


@pytest.mark.parametrize(
    ("error", "where", "mode"),
    [
        ("FloatingPointError", "step", "sync"),
        ("FloatingPointError", "step", "async"),
        ("FloatingPointError", "step after a nan", "sync"),
        ("RuntimeError", "step after a nan", "async"),
        ("ValueError", "step", "sync"),
        ("ValueError", "reset", "async"),
        ("TypeError", "reset", "sync"),
        ("KeyError", "step", "sync"),
        ("AssertionError", "reset", "sync"),
        ("ImportError", "step", "sync"),
        ("OSError", "step", "sync"),
    ],
)
def test_what_an_environment_raises_is_no_bad_input(error, where, mode, main_raises):
    """Though its type be one that is a refusal elsewhere, or that of what a nan raises."""
    flags = env_flags(f"failing:{error}-v0", mode=mode, where=where)
    name, shown = main_raises(*flags)
    assert name == error
    assert ("failing.py" if mode == "sync" else "async_vector_env.py") in shown


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("obs", "obs[41, 0, 0] is nan"),  # of the 40th step, which is row 40, as row 20 was a reset
        ("reward", "reward[40, 0] is inf"),
    ],
)
def test_nonfinite_values_stop_the_run(fault, sentence, mode, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ppo.py", *env_flags("Faulty-v0", mode=mode, fault=fault)])
    with pytest.raises(SystemExit) as exit:
        ppo.main()
    assert exit.value.code == 1
    captured = capsys.readouterr()
    assert captured.err == f"ppo.py: {sentence}\n"
    assert "resume from step 0: python ppo.py --resume runs/" in captured.out


def test_nonfinite_actions_stop_the_run():
    class Agent(ppo.Agent):
        def act(self, *args, **kwargs):
            return super().act(*args, **kwargs) * float("nan")

    args = ppo.Args(env_id="Faulty-v0", env_kwargs={"fault": "action"}, num_steps=16)
    with pytest.raises(ppo.NonFiniteError, match=r"^action\[0, 0, 0\] is nan$"):
        ppo.train(args, agent_class=Agent)


@pytest.mark.parametrize(
    ("name", "index"), [("policy_loss", 2), ("grad_norm", 3), ("grad_norm", 2)]
)
def test_nonfinite_updates_stop_the_run(name, index):
    """A loss, or a finite loss with a gradient that is not: the first that failed is named."""

    class Agent(ppo.Agent):
        count = 0

        def forward(self, obs):
            if not torch.is_grad_enabled():  # not in an update
                return super().forward(obs)
            wrong = self.count == index
            self.count += 1
            if wrong and name == "policy_loss":
                return super().forward(obs * float("nan"))
            dist, value = super().forward(obs)
            if wrong:  # the root of 0 is 0, and its slope infinite
                value = value + (next(self.parameters()) * 0).square().sum().sqrt()
            return dist, value

    args = ppo.Args(total_timesteps=1024, update_epochs=1, num_minibatches=4)
    with pytest.raises(FloatingPointError, match=rf"^{name}\[{index}\] is nan$"):
        ppo.train(args, agent_class=Agent)


def test_the_first_value_that_is_not_finite_is_named():
    """A reward of infinity in row 7, and a nan that follows it in the observation of row 9."""
    args = ppo.Args(env_id="failing:Exploding-v0", num_envs=1, total_timesteps=128)
    with pytest.raises(ppo.NonFiniteError, match=r"^reward\[7, 0\] is inf$"):
        ppo.train(args)


@pytest.mark.parametrize("limit", [4096, 20_000])
def test_a_full_disk_is_exit_code_1(limit, tmp_path):
    """No file may grow beyond these bytes: the first checkpoint does, or TensorBoard's log."""
    small = ["--hidden-sizes=1", "--num-steps=16", "--total-timesteps=64_000", "--run-name=a"]
    full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # noqa: E731
    result = run(tmp_path, *small, preexec_fn=full)
    assert result.returncode == 1
    assert "File too large" in result.stderr
    if limit == 20_000:
        step = ppo.load("runs/a")["global_step"]
        assert f"resume from step {step:,}: python {PPO} --resume runs/a" in result.stdout


def test_actions_without_bounds_bring_no_warning():
    box = spaces.Box(-np.inf, np.inf, (1,))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        ppo.Agent(spaces.Box(-1, 1, (1,)), box, ppo.Args())


def test_an_infinite_reward_brings_no_warning_beside_the_sentence():
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with pytest.raises(ppo.NonFiniteError):
            ppo.train(ppo.Args(env_id="Faulty-v0", env_kwargs={"fault": "reward"}))


# Copies of the file, changed as a fork may change it.
def test_annotations_may_be_strings(tmp_path):
    code = PPO.read_text()
    lines = code.splitlines(keepends=True)
    lines.insert(ast.parse(code).body[0].end_lineno, "\nfrom __future__ import annotations\n")
    fork = tmp_path / "ppo.py"
    fork.write_text("".join(lines))
    expected = run(tmp_path, "--help")
    result = run(tmp_path, "--help", program=fork)
    assert (result.returncode, result.stderr) == (0, "")
    assert words(result.stdout).replace(str(fork), "") == words(expected.stdout).replace(
        str(PPO), ""
    )
    flags = ["--env-id=Pendulum-v1", "--num-envs=4", "--num-minibatches=4", "--run-name=a"]
    result = run(tmp_path, *flags, "--total-timesteps=256", "--eval-episodes=1", program=fork)
    assert (result.returncode, result.stderr) == (0, "")
    assert "end: 256 steps (100%)" in result.stdout
    assert "eval: mean" in result.stdout
    flags = ["--resume=runs/a", "--total-timesteps=512", "--eval-episodes=0"]
    result = run(tmp_path, *flags, program=fork)
    assert (result.returncode, result.stderr) == (0, "")
    assert "end: 512 steps (100%)" in result.stdout


MISTAKES = {
    "NameError": "arsg.num_envs >= 1",
    "AttributeError": "args.num_evns >= 1",
    "TypeError": "args.num_envs >= '1'",
    "ValueError": "args.num_envs >= int('one')",
}


@pytest.mark.parametrize("error", MISTAKES)
def test_a_mistake_in_a_check_is_not_taken_for_bad_input(error, tmp_path):
    """The condition of the first requirement is written wrong; that keeps its traceback."""
    tree = ast.parse(PPO.read_text())
    (check,) = [x for x in tree.body if getattr(x, "name", "") == "check"]
    calls = [x for x in ast.walk(check) if isinstance(x, ast.Call)]
    requirement = next(x for x in calls if ast.unparse(x.func) == "require")
    requirement.args[1] = ast.parse(MISTAKES[error], mode="eval").body
    fork = tmp_path / "ppo.py"
    fork.write_text(ast.unparse(tree))
    result = run(tmp_path, "--preset=none", program=fork)
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert MISTAKES[error] in result.stderr
    assert result.stderr.splitlines()[-1].startswith(f"{error}: ")


@pytest.mark.upstream
def test_the_network_of_the_readme_takes_the_same_command_line(tmp_path):
    """The module under "Fork it" is trained, resumed, evaluated, and refused in a sentence."""
    section = PPO.with_name("README.md").read_text().split("## Fork it")[1]
    _, code = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    fork = tmp_path / "fork.py"
    fork.write_text(code)
    (tmp_path / "ppo.py").symlink_to(PPO)
    commands = [
        ["--run-name=a", "--total-timesteps=1024", "--eval-episodes=0"],
        ["--resume=runs/a", "--total-timesteps=2048"],
        ["--evaluate=runs/a", "--eval-episodes=2"],
    ]
    results = [run(tmp_path, *flags, program=fork) for flags in commands]
    assert [(result.returncode, result.stderr) for result in results] == [(0, "")] * 3
    assert "end: 2,048 steps (100%)" in results[1].stdout
    assert "(2 episodes, greedy)" in results[2].stdout
    agent = ppo.load(tmp_path / "runs/a")["agent"]
    assert "torso.0.weight" in agent
    result = run(tmp_path, "--num-envs=0", program=fork)
    assert (result.returncode, result.stderr) == (
        2,
        "ppo.py: --num-envs must be at least 1, not 0.\n",
    )
