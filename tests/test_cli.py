"""The program as a user meets it: help, errors, exit codes, the console and what stays on the disk."""

import dataclasses
import fcntl
import os
import pty
import re
import resource
import struct
import subprocess
import sys
import termios
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

import ppo

PPO = Path(ppo.__file__)
TESTS = Path(__file__).parent


def run(folder, *flags, path="", **kwargs):
    env = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{path}", "COLUMNS": "100"}
    command = [sys.executable, str(PPO), *flags]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120, **kwargs)


# What the user gives, and what the sentence has to say.
BAD_INPUT = {
    "unknown environment": ("--env-id CartPoll-v1", ["CartPoll", "Did you mean", "CartPole"]),
    "unknown version": ("--env-id CartPole-v9", ["CartPole-v9", "v1"]),
    "malformed id": ("--env-id not/an/id!", ["not/an/id!"]),
    "missing module": ("--env-id no_such_module:Env-v0", ["pip install no_such_module"]),
    "a name that a module lacks": ("--env-id lacking:Env-v0", ["cannot import name 'nothing'"]),
    "missing package": ("--env-id HalfCheetah-v5", ["MuJoCo", "pip install"]),
    "unknown keyword": ('--env-kwargs {"gravity":1}', ["gravity", "CartPole-v1"]),
    "missing namespace": ("--env-id ALE/Pong-v5", ["pip install ale_py"]),
    "missing renderer": ('--env-kwargs {"render_mode":"human"}', ["pip install"]),
    "refused value": ('--env-id probes:Faulty-v0 --env-kwargs {"fault":"refusal"}', ["size 1 is too small"]),
    "clashing keyword": ('--env-kwargs {"num_envs":2}', ["num_envs"]),
    "not an object": ("--env-kwargs [1]", ["--env-kwargs", "JSON object"]),
    "observation space": (
        '--env-id probes:Faulty-v0 --env-kwargs {"fault":"observation_space"}',
        ["Sequence", "not supported"],
    ),
    "action space": (
        '--env-id probes:Faulty-v0 --env-kwargs {"fault":"action_space"} --vectorization-mode async',
        ["Tuple", "not supported"],
    ),
    "autoreset mode": (
        "--env-id probes:SameStep-v0 --vectorization-mode vector_entry_point",
        ["SAME_STEP", "NEXT_STEP"],
    ),
    "no vector entry point": (
        "--env-id Acrobot-v1 --vectorization-mode vector_entry_point",
        ["vector entry point"],
    ),
    "unknown device": ("--device abacus", ["--device must be", "'abacus'"]),
    "absent device": ("--device cuda:77", ["--device must be", "'cuda:77'"]),
    "device without data": ("--device meta", ["--device must be", "'meta'"]),
    "existing run": ("--run-name taken", ["taken", "--run-name"]),
    "too few rows": ("--num-envs 1 --num-steps 15 --num-minibatches 4", ["--num-minibatches", "two rows"]),
}
OUT_OF_RANGE = {
    "num_envs": ["0", "-1"],
    "total_timesteps": ["0"],
    "num_steps": ["0"],
    "num_minibatches": ["0"],
    "update_epochs": ["0"],
    "hidden_sizes": ["0", "-3"],
    "seed": ["-1"],
    "eval_episodes": ["-1"],
    "checkpoint_interval": ["-1"],
    "learning_rate": ["-1e-9", "nan", "inf"],
    "ent_coef": ["-0.1", "nan", "inf"],
    "vf_coef": ["-0.1", "nan", "inf"],
    "gamma": ["1.01", "-0.1", "nan"],
    "gae_lambda": ["1.01", "-0.1", "nan"],
    "clip_coef": ["0", "nan", "inf"],
    "max_grad_norm": ["0", "nan", "inf"],
    "target_kl": ["0", "-1", "nan", "inf"],
    "dual_clip": ["1", "nan", "inf"],
    "log_std_init": ["-20.1", "2.1", "nan"],
}


@pytest.fixture(scope="module")
def bad_runs(tmp_path_factory):
    """Every bad input, by running the program, each in a folder of its own with a run called taken."""

    missing = tmp_path_factory.mktemp("missing")

    def attempt(flags):
        folder = tmp_path_factory.mktemp("bad")
        (folder / "runs" / "taken").mkdir(parents=True)
        for name in ("mujoco", "pygame"):  # as if they were not installed
            missing.joinpath(f"{name}.py").write_text(f"raise ModuleNotFoundError('No module named {name}')")
        flags = flags.replace("_space", " space").split(" --")
        argv = [word for flag in flags for word in ("--" + flag.removeprefix("--")).split(" ", 1)]
        return (
            run(folder, *argv, path=missing),
            sorted(os.listdir(folder / "runs")),
            os.listdir(folder / "runs" / "taken"),
        )

    commands = {name: flags for name, (flags, _) in BAD_INPUT.items()}
    commands |= {name: f"--{name.replace('_', '-')} {values[-1]}" for name, values in OUT_OF_RANGE.items()}
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(commands, pool.map(attempt, commands.values()), strict=True))


@pytest.mark.parametrize("name", [*BAD_INPUT, *OUT_OF_RANGE])
def test_bad_input_is_one_sentence_and_exit_code_2(name, bad_runs):
    result, runs, taken = bad_runs[name]
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if "ppo.py: " in line]
    assert len(lines) == 1
    assert lines[0] == result.stderr.splitlines()[-1]
    parts = BAD_INPUT.get(name, ("", [f"--{name.replace('_', '-')}"]))[1]
    for part in parts:
        assert part in lines[0]
    assert ("pip install" in lines[0]) == ("pip install" in " ".join(parts))
    assert (runs, taken) == (["taken"], []), "nothing may be left behind"


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in OUT_OF_RANGE.items() for v in values])
def test_every_numeric_flag_has_a_range(name, value):
    number = float(value) if "." in value or not value.lstrip("-").isdigit() else int(value)
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} must be"):
        ppo.train(ppo.Args(**{name: (number,) if name == "hidden_sizes" else number}))
    assert not os.path.exists("runs")


def test_no_numeric_flag_is_forgotten():
    fields = dataclasses.fields(ppo.Args)
    numeric = {
        f.name for f in fields if re.search(r"\b(int|float)\b", getattr(f.type, "__name__", str(f.type)))
    }
    numeric |= {f.name for f in fields if "tuple[int" in str(f.type)}
    assert numeric == set(OUT_OF_RANGE)


@pytest.mark.parametrize(
    "flags",
    [
        {"env_id": "CartPoll-v1"},
        {"vectorization_mode": "threads"},
        {"activation": "gelu"},
        {"device": "abacus"},
    ],
)
def test_in_python_bad_input_is_a_value_error(flags):
    with pytest.raises(ValueError, match=next(iter(flags.values()))):
        ppo.train(ppo.Args(**flags))


@pytest.mark.parametrize(
    "flags", [["--num-envs", "two"], ["--env-kwargs", "{"], ["--no-such-flag"], ["--activation", "x"]]
)
def test_what_cannot_be_parsed_is_exit_code_2(flags, tmp_path):
    result = run(tmp_path, *flags)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert os.listdir(tmp_path) == []


def test_help_has_a_sentence_for_every_flag(tmp_path):
    result = run(tmp_path, "--help")
    assert result.returncode == 0
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", result.stdout).split())
    for field in dataclasses.fields(ppo.Args):
        flag = "--" + field.name.replace("_", "-")
        match = re.search(
            rf"{flag}(?:, --no-\S+)? (?:[{{\[A-Z]\S*(?: \[?[A-Z.\]]+)* )?([a-zA-Z][^(]{{15,}})", text
        )
        assert match, f"{flag} has no help"
    assert "1_000_000" in text
    assert os.listdir(tmp_path) == []


def test_every_flag_is_read_somewhere():
    code = PPO.read_text()
    for field in dataclasses.fields(ppo.Args):
        assert re.search(rf"(args|self)\.{field.name}\b", code), f"nothing reads {field.name}"


def test_a_run(tmp_path):
    """Underscores in numbers, a made-up run folder, a header, progress and a summary; nothing on stderr."""
    flags = ["--total-timesteps", "2_048", "--env-id", "probes:Match-v0", "--exp-name", "a/b: c"]
    result = run(tmp_path, *flags)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    (name,) = os.listdir(tmp_path / "runs")
    assert re.fullmatch(r"probes-Match-v0__a-b--c__1__\d+", name)
    for part in (
        f"run: runs/{name}",
        "4 x probes:Match-v0",
        "Discrete(2)",
        "parameters on cpu",
        "2,048 steps (100%)",
    ):
        assert part in result.stdout
    *_, end, way, evaluation = result.stdout.splitlines()
    assert end.startswith("end: 2,048 steps (100%)")
    assert way == f"evaluate from step 2,048: python ppo.py --evaluate runs/{name}"
    number = r"-?\d+\.\d"
    pattern = rf"eval: mean {number} std {number} min {number} max {number} \(10 episodes, greedy\)"
    assert re.fullmatch(pattern, evaluation)
    assert os.listdir(tmp_path) == ["runs"]


def test_run_folders_are_never_shared(tmp_path, monkeypatch):
    """Made-up names hold milliseconds; where even these are equal, the second run is refused."""
    clock = iter([7_001_000_000, 7_002_000_000, 7_002_000_000, 0])
    fake = SimpleNamespace(time_ns=lambda: next(clock), perf_counter=time.perf_counter)
    monkeypatch.setattr(ppo, "time", fake)
    flags = {"env_id": "probes:Match-v0", "total_timesteps": 64, "num_steps": 16, "eval_episodes": 0}
    ppo.train(ppo.Args(**flags))
    ppo.train(ppo.Args(**flags))
    assert sorted(os.listdir("runs")) == [f"probes-Match-v0__ppo__1__{t}" for t in (7001, 7002)]
    with pytest.raises(ppo.InputError, match="7002"):
        ppo.train(ppo.Args(**flags))
    (tmp_path / "runs").rename(tmp_path / "moved")
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(ppo.InputError, match="runs"):
        ppo.train(ppo.Args(run_name="x"))


def test_progress_on_a_terminal_is_one_line(tmp_path):
    """In a pseudo-terminal of 60 columns no line is longer, and all of the progress overwrites itself."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    env = {**os.environ, "PYTHONPATH": str(TESTS), "COLUMNS": "60"}
    command = [sys.executable, str(PPO), "--total-timesteps", "20_480"]
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=child, stderr=child)
    os.close(child)
    output = b""
    try:
        while chunk := os.read(parent, 4096):
            output += chunk
    except OSError:  # how Linux says that the other end is closed
        pass
    assert process.wait() == 0
    lines = output.decode().replace("\r\n", "\n").split("\n")
    progress = [line for line in lines if "\r" in line]
    assert len(progress) == 1
    updates = progress[0].split("\r")[1:]
    assert len(updates) == 40
    assert all(len(update) == 59 for update in updates)
    assert re.match(r"18,432 steps \(90%\), [\d,]+ steps/s, return \d+\.\d, length", updates[35])


def test_training_and_evaluating_import_no_compiler(tmp_path):
    """Any of torch's own optimizers would, which takes longer than a run of some iterations."""
    code = "ppo.train(ppo.Args(total_timesteps=512)); sys.exit('torch._dynamo' in sys.modules)"
    command = [sys.executable, "-c", f"import sys, ppo; {code}"]
    assert (
        subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(PPO.parent)}).returncode
        == 0
    )


def test_import_has_no_side_effects(tmp_path):
    code = "import torch; n = torch.get_num_threads(); import ppo; assert torch.get_num_threads() == n"
    env = {**os.environ, "PYTHONPATH": str(PPO.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert os.listdir(tmp_path) == []


def test_a_run_name_is_made_safe(tmp_path):
    make = lambda name: ppo.train(ppo.Args(run_name=name, total_timesteps=64, num_steps=16, eval_episodes=0))  # noqa: E731
    for name in ("a b/../c", "日本語", "..."):
        make(name)
    assert sorted(os.listdir("runs")) == sorted(["a-b-..-c", "日本語", "run"])
    with pytest.raises(ppo.InputError, match="runs/run"):
        make("...")


@pytest.mark.parametrize(
    "flags",
    [{"num_steps": 128.0}, {"num_envs": None}, {"seed": 1.5}, {"learning_rate": "1e-3"}, {"hidden_sizes": 64},
     {"hidden_sizes": (64.0,)}, {"total_timesteps": float("inf")}, {"env_kwargs": None}],
)  # fmt: skip
def test_values_of_another_kind_are_refused(flags):
    (name,) = flags
    with pytest.raises(ppo.InputError, match=f"--{name.replace('_', '-')} must be"):
        ppo.train(ppo.Args(**flags))
    assert not os.path.exists("runs")


def test_defaults():
    """Those of CleanRL's ppo.py, with scaling on."""
    assert dataclasses.asdict(ppo.Args()) == {
        "exp_name": "ppo", "run_name": None, "seed": 1, "torch_deterministic": True, "device": "auto",
        "env_id": "CartPole-v1", "env_kwargs": {}, "preset": "none", "num_envs": 4,
        "vectorization_mode": "sync",
        "total_timesteps": 500_000, "learning_rate": 2.5e-4, "anneal_lr": True, "num_steps": 128,
        "gamma": 0.99, "gae_lambda": 0.95, "num_minibatches": 4, "update_epochs": 4, "norm_adv": True,
        "clip_coef": 0.2,
        "anneal_clip": False, "clip_vloss": True, "dual_clip": None, "ent_coef": 0.01, "vf_coef": 0.5,
        "max_grad_norm": 0.5, "target_kl": None, "recompute_advantages": False, "hidden_sizes": (64, 64),
        "activation": "tanh", "log_std_init": 0.0, "norm_obs": True, "norm_reward": True,
        "resume": None, "checkpoint_interval": None, "evaluate": None, "eval_episodes": 10,
        "eval_stochastic": False, "capture_video": False,
    }  # fmt: skip


def test_torch_deterministic():
    for flag in (True, False):
        ppo.train(ppo.Args(total_timesteps=64, num_steps=16, torch_deterministic=flag))
        assert ppo.torch.backends.cudnn.deterministic is flag


@pytest.mark.parametrize("fault", ["death", "odd exception"])
def test_async_workers_that_fail_do_not_hang_the_run(fault, tmp_path):
    """One that is killed, and one whose exception cannot be passed on; neither leaves a process behind."""
    kwargs = f'{{"fault": "{fault}"}}'
    flags = ["--env-id", "probes:Faulty-v0", "--env-kwargs", kwargs, "--vectorization-mode", "async"]
    result = run(tmp_path, *flags)
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "end: 0 steps" in result.stdout
    commands = [path.read_text() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(fault in command and str(PPO) in command for command in commands)


FAULTS = {
    "action": r"action\[0, 0, 0\] is nan",
    "obs": r"obs\[41, 0, 0\] is nan",  # of the 40th step, which is row 40, as row 20 was a reset
    "reward": r"reward\[40, 0\] is inf",
    "exception after nan": r"obs\[41, 0, 0\] is nan, upon which came .*the motor is on fire.*",
}


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("fault", FAULTS)
def test_nonfinite_values_stop_the_run(fault, mode, monkeypatch, capsys):
    argv = [
        "ppo.py",
        "--env-id",
        "Faulty-v0",
        "--env-kwargs",
        f'{{"fault": "{fault}"}}',
        "--vectorization-mode",
        mode,
    ]
    monkeypatch.setattr(sys, "argv", argv)
    if fault == "action":
        act = ppo.Agent.act
        monkeypatch.setattr(ppo.Agent, "act", lambda self, obs: act(self, obs) * float("nan"))
    with pytest.raises(SystemExit) as exit:
        ppo.main()
    assert exit.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ppo.py: ")]
    assert re.fullmatch("ppo.py: " + FAULTS[fault], line)


@pytest.mark.parametrize("field", ["policy_loss", "grad_norm"])
def test_nonfinite_updates_stop_the_run(field, monkeypatch):
    """A loss, and a finite loss with a gradient that is not: the first that failed is named."""
    original = ppo.ppo_loss

    def ppo_loss(agent, *rest):
        loss, info = original(agent, *rest)
        if field == "policy_loss":
            return loss * float("nan"), info | {"policy_loss": info["policy_loss"] * float("nan")}
        return loss + (agent.actor[0].bias * 0).abs().sqrt().sum(), info

    monkeypatch.setattr(ppo, "ppo_loss", ppo_loss)
    with pytest.raises(FloatingPointError, match=field):
        ppo.train(ppo.Args(total_timesteps=1024))


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_an_exception_of_the_environment_keeps_its_traceback(mode, tmp_path):
    flags = [
        "--env-id",
        "probes:Faulty-v0",
        "--env-kwargs",
        '{"fault": "exception"}',
        "--vectorization-mode",
        mode,
    ]
    result = run(tmp_path, *flags, "--num-steps", "16", "--run-name", "a")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "RuntimeError: the motor is on fire" in result.stderr
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    losses = EventAccumulator(str(tmp_path / "runs" / "a")).Reload().Scalars("losses/policy_loss")
    assert [event.step for event in losses] == [64, 128], "what came before is flushed"


def test_a_full_disk_is_exit_code_1(tmp_path):
    """No file may grow beyond 4 kB, which is what the log does in its third iteration or so."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # noqa: E731
    result = run(tmp_path, "--checkpoint-interval=0", preexec_fn=limit)
    assert result.returncode == 1
    assert result.stderr == "ppo.py: [Errno 27] File too large\n"
