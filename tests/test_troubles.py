"""What people run into: environments, consoles and command lines that are not as one thinks."""

import gc
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pieces
import probes
import pytest
import torch
import troubles
from gymnasium import spaces
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from test_cli import PPO, TESTS, run

import ppo

SMALL = {
    "num_envs": 2,
    "num_steps": 16,
    "num_minibatches": 2,
    "update_epochs": 2,
    "total_timesteps": 96,
    "run_name": "a",
}


def flags_of(env_id, **kwargs):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    env_kwargs = f"--env-kwargs={json.dumps(kwargs)}"
    return [*flags, "--preset=none", f"--env-id=troubles:{env_id}-v0", env_kwargs]


def trained(env_id, env_kwargs=None, **flags):
    args = {**SMALL, "eval_episodes": 0, **flags}
    return ppo.train(ppo.Args(env_id=f"{env_id}-v0", env_kwargs=env_kwargs or {}, **args))


def weights(agent):
    return torch.cat([x.detach().flatten() for x in agent.parameters()])


# --- What environments do to their process --------------------------------------------------------
@pytest.fixture
def process():
    """What environments change is changed back."""
    errors = np.geterr()
    yield
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    np.seterr(**errors)


@pytest.mark.parametrize("where", ["constructor", "reset", "step"])
@pytest.mark.parametrize("what", ["folder", "gradients", "dtype", "numpy"])
def test_what_an_environment_does_to_its_process(what, where, process, command, tmp_path):
    """The run is that of an environment which does nothing, and its files are where they belong."""
    flags = ppo.preset("Meddling-v0") | {**SMALL, "run_name": "b"}
    flags["gamma"] = 1e-300  # with numbers that underflow
    expected = trained("Meddling", **flags)
    flags = [x for x in flags_of("Meddling", what=what, where=where) if "preset" not in x]
    result = command(*flags, "--gamma=1e-300")
    assert result.returncode == 0, result.stderr
    os.chdir(tmp_path)
    folder = tmp_path / "runs" / "a"
    names = sorted(x.name for x in folder.iterdir())
    assert names[0] == "checkpoint.pt"
    assert len(names) == 2, "a checkpoint and one file of TensorBoard's, with the evaluation"
    assert len(pieces.values(str(folder), "eval/episodic_return")) == 1
    assert torch.equal(weights(ppo.load_agent(str(folder))), weights(expected))
    assert os.listdir(tmp_path / "runs") == ["a", "b"] or os.listdir(tmp_path / "runs") == [
        "b",
        "a",
    ]
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32
    result = command("--evaluate=runs/a", "--eval-episodes=3")
    assert result.returncode == 0, result.stderr
    assert len(pieces.values(str(folder), "eval/episodic_return")) == 2


@pytest.mark.parametrize("where", ["constructor", "reset", "step"])
def test_an_environment_that_exits_is_no_success(where, tmp_path):
    result = run(tmp_path, *flags_of("Meddling", what="exit", where=where))
    assert result.returncode == 1
    assert "troubles.py" in result.stderr, "the line that did it is shown"
    assert "RuntimeError: An environment has ended the process." in result.stderr


def test_the_exit_code_of_an_environment_is_kept(command):
    assert command(*flags_of("Meddling", what="exit 3", where="step")).returncode == 3


# --- What environments return ---------------------------------------------------------------------
def test_ends_may_be_whole_numbers():
    """Then ~done would be -1 or -2, which is true, and resets would be trained on."""
    args = ppo.Args(env_id="Whole-v0", vectorization_mode="vector_entry_point", num_envs=2)
    with pieces.learner(args) as learner:
        rollout = learner.collect()
    assert rollout.done.dtype == rollout.valid.dtype == torch.bool
    assert rollout.done[:8, 0].tolist() == [False, False, True, False] * 2
    assert rollout.valid[:8, 0].tolist() == [True, True, True, False] * 2
    assert rollout.episode_return.tolist() == [3.0] * 64
    assert (learner.estimate(rollout).obs < 3).all()


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int64])
def test_an_agent_takes_observations_of_any_type(dtype):
    agent = trained("Odd")
    obs = np.array([[1], [-1]], dtype)
    action = agent.act(torch.from_numpy(obs), greedy=True)
    assert torch.equal(action, agent.act(torch.tensor([[1.0], [-1.0]]), greedy=True))


@pytest.mark.parametrize("reward", ["vector", "array"])
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_vector_for_a_reward_is_said_to_be_the_environments(mode, reward, tmp_path):
    flags = [*flags_of("Odd", reward=reward), f"--vectorization-mode={mode}"]
    result = run(tmp_path, *flags)
    assert result.returncode == 1
    assert "A reward is one number" in result.stderr
    assert "LinearReward" in result.stderr


INFOS = ["None and a number", "a string and a number", "lengths", "deep"]


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("info", INFOS)
def test_infos_of_any_kind_do_no_harm(info, mode):
    troubles.Odd.count = 0
    expected = trained("Odd", run_name="b")
    troubles.Odd.count = 0
    agent = trained("Odd", {"info": info}, vectorization_mode=mode)
    assert torch.equal(weights(agent), weights(expected))


@pytest.mark.parametrize("info", INFOS)
def test_which_infos_would_do_harm(info):
    """To Gymnasium's own collection of them."""
    troubles.Odd.count = 0
    envs = gym.make_vec("Odd-v0", 2, "sync", info=info)
    envs.reset(seed=0)
    with pytest.raises((TypeError, ValueError, AttributeError)):
        envs.step(np.zeros(2, int))


@pytest.mark.parametrize("best", [0, 1])
@pytest.mark.parametrize(
    ("offset", "steps", "gamma"),
    [(-100, 1, 0.99), (5000, 1, 0.99), (-100, 2, 0.99), (-100, 10, 0.0)],
)
def test_an_offset_of_rewards_does_not_matter(offset, steps, gamma, best):
    """Though returns deviate from their mean by a fraction of it: by 0.5 where it is 5,000."""
    args = ppo.Args(
        env_id="Offset-v0",
        env_kwargs={"offset": float(offset), "steps": steps, "best": best},
        num_envs=8,
        num_steps=32,
        total_timesteps=20_000,
        gamma=gamma,
        eval_episodes=1,
    )
    assert ppo.train(args).eval_returns.tolist() == [(offset + 1) * steps]


def test_an_offset_of_the_cost_of_a_continuous_action(command):
    """100 + 5 |a - 0.7|^2, with the preset."""
    args = ppo.parse_args(["--env-id=troubles:Quadratic-v0", "--total-timesteps=100_000"])
    assert args.preset == "continuous"
    assert ppo.train(args).eval_returns.mean() > -100.1


def test_an_action_with_one_bound_is_learnt():
    """The bound is 5, the best 8; an agent that samples around 0 would never leave 5."""
    flags = {**SMALL, "num_envs": 8, "num_steps": 32, "total_timesteps": 40_000}
    flags |= {"learning_rate": 1e-2, "ent_coef": 0.0}
    args = ppo.Args(env_id="Above-v0", eval_episodes=1, **flags)
    assert ppo.train(args).eval_returns.tolist() == [pytest.approx(0.0, abs=0.3)]


def test_numbers_too_large_for_float32_are_named(command):
    """Once, and not those that are merely constant."""
    result = command(*flags_of("UnixTime"))
    assert result.returncode == 0
    (line,) = result.stderr.splitlines()
    assert line.startswith("ppo.py: warning: observation 2 is about 1.7e+09, ")
    assert command(*flags_of("Odd"), "--run-name=b").stderr == ""


def test_wide_observations_are_said_before_hours_are_spent(command):
    result = command(*flags_of("Wide"))
    assert result.returncode == 0
    (line,) = result.stderr.splitlines()
    assert line.startswith("ppo.py: warning: the network has 6,000 inputs")


@pytest.mark.parametrize(
    ("env_id", "steps", "warned"), [("Endless", 1024, 1), ("Endless", 992, 0), ("Forever", 1024, 0)]
)
def test_episodes_that_do_not_end_are_said_before_hours_are_spent(env_id, steps, warned, command):
    """After a tenth of the run, if that was a thousand steps in an environment at least."""
    flags = [*flags_of("Odd")[:-3], f"--env-id=probes:{env_id}-v0", "--preset=none"]
    flags += [f"--total-timesteps={10 * 2 * steps}", "--eval-episodes=0"]
    result = command(*flags)
    assert result.returncode == 0
    assert result.stderr.count("warning: no episode has ended in a tenth of the run") == warned
    assert result.stderr.count("\n") == warned
    text = f"no return yet, an episode is at {10 * steps:,} steps"
    assert (text in result.stdout) == (env_id == "Endless")


# --- Closing --------------------------------------------------------------------------------------
def test_an_environment_that_cannot_close_before_it_is_reset(command):
    """To look at its spaces one is made and closed at once, for which it has only a warning."""
    flags = [x for x in flags_of("Connecting") if "preset" not in x]
    result = command(*flags)
    assert result.returncode == 0, result.stderr
    lines = result.stderr.splitlines()
    assert lines
    assert all("warning: closing the environments failed: AttributeError" in x for x in lines)
    assert isinstance(ppo.load_agent("runs/a"), ppo.Agent)


def test_a_close_that_fails_costs_nothing(command):
    result = command(*flags_of("Disconnected"))
    assert result.returncode == 0, result.stderr
    assert "eval: mean" in result.stdout
    assert "failed: ConnectionError: the simulator is gone" in result.stderr
    result = command(*flags_of("Disconnected", exits=True), "--run-name=b")
    assert result.returncode == 0
    assert "failed: RuntimeError: An environment has ended the process." in result.stderr


def test_a_vector_version_is_closed_once():
    """The environments of the training, those of the evaluation, and those that look at spaces."""
    troubles.Whole.closed_count = 0
    flags = ["--env-id=troubles:Whole-v0", "--vectorization-mode=vector_entry_point"]
    args = ppo.parse_args([*flags, "--total-timesteps=1024", "--eval-episodes=2"])
    assert troubles.Whole.closed_count == 1
    ppo.train(args)
    gc.collect()
    assert troubles.Whole.closed_count == 3


# --- Refusals -------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_space_that_gymnasium_does_not_know_is_refused_in_a_sentence(mode, command):
    result = command(*flags_of("Mission"), f"--vectorization-mode={mode}")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "are not supported, or a part of them is not; README says how" in line


def test_a_refused_argument_shows_where(command):
    """One sentence, with the file, the line and the text of it."""
    result = command(*flags_of("Buggy", size=3))
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "KeyError: 'x'" in line
    assert "troubles.py, line " in line
    assert '{}["x"])' in line
    result = command(*flags_of("Buggy", bug="assertion"))
    (line,) = result.stderr.splitlines()
    assert 'assert bug != "assertion"' in line
    for bug, part in (("json", "json.loads(bug)"), ("type", "None + 1")):
        (line,) = command(*flags_of("Buggy", bug=bug)).stderr.splitlines()
        assert "troubles.py, line " in line
        assert part in line


@pytest.mark.parametrize(
    ("kind", "shape"), [("grey", "(240, 320)"), ("four", "(8, 8, 4)"), ("none", "None")]
)
def test_what_is_no_image_is_not_filmed(kind, shape, command, tmp_path):
    result = command(*flags_of("Grey", kind=kind), "--capture-video")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.endswith(f"it renders {shape}, not an RGB image (height, width, 3).")
    assert not (tmp_path / "runs").exists()


# --- The console ----------------------------------------------------------------------------------
class Tee:
    """Writes to a list, and has nothing else of a file."""

    def __init__(self, **methods):
        self.lines = []
        self.write = self.lines.append
        self.flush = lambda: None
        vars(self).update(methods)


@pytest.mark.parametrize(
    "stdout",
    [Tee(), Tee(isatty=lambda: True), Tee(isatty=lambda: False), None],
    ids=["tee", "terminal", "no terminal", "none"],
)
def test_any_stdout_will_do(stdout, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ppo.py", *flags_of("Odd")])
    monkeypatch.setattr(sys, "stdout", stdout)
    ppo.main()
    assert stdout is None or "eval: mean" in "".join(stdout.lines)


def test_a_name_that_the_console_cannot_print(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(TESTS), "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, str(PPO), *flags_of("Odd"), "--run-name=größe"]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert b"run: runs/gr??e, from step 0" in result.stdout
    assert (tmp_path / "runs" / "größe" / "checkpoint.pt").exists()


def test_a_closed_stdout(tmp_path):
    line = f"{shlex.join([sys.executable, str(PPO), *flags_of('Odd')])} >&-"
    env = {**os.environ, "PYTHONPATH": str(TESTS)}
    result = subprocess.run(line, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / "runs" / "a" / "checkpoint.pt").exists()


def test_a_reader_that_goes_away_ends_the_run_quietly(tmp_path):
    """As with `| head -1`; what was trained so far is kept."""
    program = shlex.join([sys.executable, str(PPO), *flags_of("Odd"), "--total-timesteps=10_000"])
    line = f"{{ {program}; echo $? > code; }} | head -n 7"
    env = {**os.environ, "PYTHONPATH": str(TESTS)}
    result = subprocess.run(line, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.stderr == ""
    assert len(result.stdout.splitlines()) == 7
    assert (tmp_path / "code").read_text() == "141\n"
    assert torch.load(tmp_path / "runs" / "a" / "checkpoint.pt")["iteration"] > 5


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (0.955, "0.955"),
        (0.0, "0"),
        (500.0, "500"),
        (132.93, "132.9"),
        (-4439.27, "-4,439"),
        (12345.678, "12,346"),
        (1.2346e-9, "1.235e-09"),
        (3.4e37, "3.4e+37"),
        (np.float32(-0.01234567), "-0.01235"),
        (float("nan"), "nan"),
    ],
)
def test_numbers_have_four_digits(x, text):
    assert ppo.short(x) == text


@pytest.mark.parametrize(
    ("factor", "text"), [(1.0, "0.9554"), (1e-9, "9.554e-10"), (1e30, "9.554e+29")]
)
def test_returns_of_any_size_are_shown(factor, text, command):
    out = command(*flags_of("Small", factor=factor)).stdout.splitlines()
    assert f"return {text}, length 1" in out[-5]
    assert out[-1].startswith(f"eval: mean {text} std 0 min {text} max {text} (10")


def test_a_path_with_spaces_is_quoted(command):
    command(*flags_of("Odd"), "--eval-episodes=0")
    os.rename("runs/a", "my run")
    result = command("--resume=my run", "--total-timesteps=128")
    assert (
        result.stdout.splitlines()[-1]
        == "evaluate from step 128: python ppo.py --evaluate 'my run'"
    )


def test_a_fork_of_another_name_says_its_own(tmp_path):
    fork = tmp_path / "my fork.py"
    fork.write_text(PPO.read_text())
    result = run(tmp_path, *flags_of("Odd"), "--eval-episodes=0", program=fork.name)
    last = result.stdout.splitlines()[-1]
    assert last == "evaluate from step 96: python 'my fork.py' --evaluate runs/a"


def test_a_notebook_is_told_no_command(tmp_path):
    """What has no file has no command line."""
    code = f"import sys; sys.path[:0] = [{str(PPO.parent)!r}, {str(TESTS)!r}]\n"
    code += f"import ppo, troubles; ppo.train(ppo.Args(env_id='Odd-v0', **{SMALL}))"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "evaluate from step 96: runs/a\n" in result.stdout


def test_sighup_saves_and_nohup_goes_on(tmp_path):
    for ignored in (False, True):
        name = f"--run-name={ignored}"
        program = [sys.executable, str(PPO), *flags_of("Odd"), name, "--total-timesteps=3_000"]
        env = {**os.environ, "PYTHONPATH": str(TESTS)}
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        process = subprocess.Popen(
            program, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True
        )
        signal.signal(signal.SIGHUP, before)
        for line in process.stdout:
            if "steps/s" in line:
                break
        process.send_signal(signal.SIGHUP)
        rest = process.communicate(timeout=300)[0]
        if ignored:
            assert process.returncode == 0
            assert "eval: mean" in rest
        else:
            assert process.returncode == 128 + signal.SIGHUP
            assert "resume from step" in rest


def test_ctrl_c_is_heard_in_the_background(command):
    """Where a shell has told the process to ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    result = command(*flags_of("Odd"))
    assert result.returncode == 0
    assert signal.getsignal(signal.SIGINT) is ppo.leave


# --- Command lines --------------------------------------------------------------------------------
def test_true_false_and_powers_of_ten_are_understood():
    argv = ["--norm-obs", "False", "--clip_reward", "True", "--total-timesteps", "1e5"]
    argv += ["--exp-name", "False", "--gamma", "5e-1", "--checkpoint-interval=2.5E1"]
    argv += ["--norm_adv=False", "--num-envs=8", "--env-kwargs={}"]
    args = ppo.parse_args(argv)
    assert args.norm_obs is False
    assert args.clip_reward is True
    assert args.total_timesteps == 100_000
    assert args.exp_name == "False"
    assert args.gamma == 0.5
    assert args.checkpoint_interval == 25
    assert (args.norm_adv, args.num_envs) == (False, 8)


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--cuda", "False"], "--device"),
        (["--gym-id", "CartPole-v1"], "--env-id"),
        (["--track"], "TensorBoard"),
        (["--wandb-project-name=x"], "Weights & Biases"),
        (["--wandb_entity", "x"], "Weights & Biases"),
        (["--save-model"], "runs/"),
        (["--upload-model"], "runs/"),
        (["--hf_entity=x"], "runs/"),
        (["--cuda=False"], "--device"),
        (["--env-id=PongNoFrameskip-v4"], "--env-id must be ALE/Breakout-v5"),
    ],
)
def test_flags_of_cleanrl_that_are_not_here(flags, part, command):
    result = command(*flags, "--total-timesteps", "100000")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("ppo.py: ")
    assert part in line


def test_flags_of_cleanrl_that_are_here(command):
    """Its own command, with underscores, of another kind of environment."""
    line = "--env-id CartPole-v1 --total-timesteps 512 --capture_video False --torch-deterministic"
    line += " True --num_envs 4 --anneal-lr True --run-name a --eval-episodes 0"
    assert command(*line.split()).returncode == 0
    assert ppo.load("runs/a")["args"].capture_video is False


def test_a_module_is_found_in_the_folder_where_one_is(tmp_path):
    (tmp_path / "mine.py").write_text((TESTS / "probes.py").read_text())
    flags = ["--env-id=mine:Match-v0", "--total-timesteps=512", "--eval-episodes=0"]
    env = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(PPO), *flags]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_whose_environment_it_is_is_said(command):
    """If a module has none of the name, Gymnasium takes its own."""
    result = command(*flags_of("Odd"), "--env-id=troubles:CartPole-v1", "--env-kwargs={}")
    line = "environments: 2 x troubles:CartPole-v1, which is gymnasium.envs.classic_control"
    assert line in result.stdout


# --- From Python ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("anneal_lr", "False", "bool"),
        ("device", None, "str"),
        ("run_name", 5, "str | None"),
        ("num_envs", 4.0, "int"),
        ("gamma", "0.9", "float | int"),
        ("target_kl", "none", "float | int | None"),
        ("clip_vloss", 1, "bool"),
    ],
)
def test_values_of_a_wrong_type_are_refused(name, value, kind, tmp_path):
    flag = "--" + name.replace("_", "-")
    with pytest.raises(ppo.InputError) as caught:
        ppo.train(ppo.Args(**{name: value}))
    options = {f"{flag} must be of type {x}, not {value!r}." for x in kinds(kind)}
    assert str(caught.value) in options
    assert not (tmp_path / "runs").exists()


def kinds(kind):
    """The ways to order the members of a union."""
    return [" | ".join(x) for x in itertools.permutations(kind.split(" | "))]


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("hidden_sizes", 64, "whole numbers"),
        ("hidden_sizes", (64.0,), "whole numbers"),
        ("vectorization_mode", "foo", "sync or async or vector_entry_point"),
        ("activation", "gelu", "tanh or relu"),
    ],
)
def test_values_that_are_not_among_the_options_are_refused(name, value, part):
    with pytest.raises(ppo.InputError, match=f"must be {part}.*not {re.escape(repr(value))}"):
        ppo.check(ppo.Args(**{name: value}))


def test_whole_numbers_are_taken_for_floats():
    ppo.check(ppo.Args(gamma=1, ent_coef=0, target_kl=1, learning_rate=0))


def test_resuming_from_python_needs_what_changes_alone():
    """And keeps what the run was started with."""
    first = trained("Odd", gamma=0.5, hidden_sizes=(8,))
    agent = ppo.train(ppo.Args(resume="runs/a", total_timesteps=128, eval_episodes=3))
    assert weights(agent).shape == weights(first).shape
    assert len(agent.eval_returns) == 3
    assert len(first.eval_returns) == 0
    args = ppo.load("runs/a")["args"]
    assert (args.gamma, args.hidden_sizes, args.total_timesteps) == (0.5, (8,), 128)
    with pytest.raises(ppo.InputError, match="--gamma cannot be given with --resume"):
        ppo.train(ppo.Args(resume="runs/a", gamma=0.7))
    returns = ppo.evaluate("runs/a", ppo.Args(eval_episodes=4))
    assert len(returns) == 4
    assert len(ppo.evaluate(Path("runs/a"), ppo.Args())) == 10, "not the 3 of the training"


def test_the_returns_of_the_evaluation_can_be_found():
    agent = trained("Small", eval_episodes=3)
    assert agent.eval_returns.tolist() == [0.9554321] * 3


@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(5, start=2),
        spaces.MultiDiscrete([2, 3], start=[1, 0]),
        spaces.MultiDiscrete([[2, 3], [4, 5]]),
        spaces.MultiBinary([2, 3]),
        spaces.MultiBinary(4),
        spaces.Box(np.float32([-1, 0]), np.float32([1, np.inf]), dtype=np.float32),
        spaces.Box(0, 255, (3, 40, 40), np.uint8),
        spaces.Box(-1.5, 7, (), np.float64),
    ],
    ids=str,
)
def test_spaces_of_checkpoints_are_what_they_were(space, tmp_path):
    torch.save(ppo.plain_space(space), "space.pt")
    assert ppo.space_of(torch.load("space.pt", weights_only=True)) == space


def test_a_vector_version_may_return_lists(monkeypatch):
    step = troubles.Whole.step
    monkeypatch.setattr(
        troubles.Whole, "step", lambda *args: (*[x.tolist() for x in step(*args)[:4]], {})
    )
    flags = {**SMALL, "env_id": "Whole-v0", "vectorization_mode": "vector_entry_point"}
    assert ppo.train(ppo.Args(**flags)).eval_returns.tolist() == [3.0] * 10


def test_an_evaluation_takes_no_time_limit_for_a_reason_to_last():
    gym.register("Long-v1", probes.Forever, max_episode_steps=100_000, disable_env_checker=True)
    gym.register("Short-v1", probes.Forever, max_episode_steps=1500, disable_env_checker=True)
    for env_id, expected in (("Long-v1", 10_000.0), ("Short-v1", 1500.0)):
        args = ppo.Args(**{**SMALL, "run_name": env_id}, env_id=env_id, eval_episodes=1)
        assert ppo.train(args).eval_returns.tolist() == [expected]


def test_an_agent_is_loaded_without_its_simulator(tmp_path):
    trained("Small")
    code = f"import sys; sys.path.insert(0, {str(PPO.parent)!r})\n"
    code += "import ppo; print(ppo.load_agent('runs/a').action_space)"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.stdout == "Discrete(2)\n", result.stderr
    assert "troubles" not in code


def test_one_observation_becomes_a_batch():
    box = spaces.Box(-1, 1, (2,), np.float64)
    assert ppo.as_batch(np.array([0.5, -0.5]), box).tolist() == [[0.5, -0.5]]
    assert ppo.as_batch(2, spaces.Discrete(4)).tolist() == [[0, 0, 1, 0]]
    both = spaces.Dict(a=box, b=spaces.Discrete(2))
    batch = ppo.as_batch({"a": np.array([0.5, -0.5]), "b": 1}, both)
    assert batch.tolist() == [[0.5, -0.5, 0, 1]]
    assert batch.dtype == torch.float32
    image = spaces.Box(0, 255, (40, 40), np.uint8)
    assert ppo.as_batch(image.sample(), image).dtype == torch.uint8
    assert ppo.as_batch(image.sample(), image).shape == (1, 40, 40)


def test_an_environment_whose_spaces_have_changed_is_refused(command, monkeypatch):
    trained("Odd")
    monkeypatch.setattr(troubles.Odd, "action_space", spaces.Discrete(3))
    result = command("--evaluate=runs/a")
    assert result.returncode == 2
    assert "The spaces of Odd-v0 are not those that the agent has." in result.stderr


class Whim(ppo.Agent):
    """Changes the arguments while it is trained, as the loop of a fork may do."""

    def __init__(self, observation_space, action_space, args):
        super().__init__(observation_space, action_space, args)
        self.args = args

    def act(self, *args, **kwargs):
        self.args.ent_coef /= 2
        return super().act(*args, **kwargs)


def test_the_flags_of_a_run_are_those_that_it_was_started_with(command):
    args = ppo.Args(env_id="Odd-v0", **{**SMALL, "eval_episodes": 0, "ent_coef": 0.5})
    ppo.train(args, Whim)
    assert args.ent_coef < 0.5
    assert ppo.load("runs/a")["args"].ent_coef == 0.5
    result = command("--resume=runs/a", "--ent-coef=0.5", "--total-timesteps=128")
    assert result.returncode == 0, result.stderr


# --- TensorBoard ----------------------------------------------------------------------------------
def test_a_run_and_its_evaluation_have_one_writer(command, tmp_path):
    result = command(*flags_of("Odd"))
    assert result.returncode == 0
    names = [x for x in os.listdir("runs/a") if x.startswith("events")]
    assert len(names) == 1
    assert sorted(os.listdir("runs")) == ["a"]
    assert [step for step, _ in pieces.scalars("runs/a")["eval/episodic_return"]] == [96]


def test_flags_are_in_the_table_of_hyperparameters():
    trained("Odd", gamma=0.875, hidden_sizes=(8, 4))
    events = EventAccumulator("runs/a").Reload()
    data = events.PluginTagToContent("hparams")
    assert "_hparams_/session_start_info" in data
    content = HParamsPluginData.FromString(data["_hparams_/session_start_info"])
    flags = content.session_start_info.hparams
    assert flags["gamma"].number_value == 0.875
    assert flags["norm_obs"].number_value == 1
    assert flags["hidden_sizes"].string_value == "(8, 4)"
    assert flags["env_id"].string_value == "Odd-v0"
    assert set(flags) == set(vars(ppo.Args()))


def test_the_number_of_steps_taken_is_logged():
    trained("Odd", target_kl=1e-9)
    taken = pieces.values("runs/a", "losses/updates")
    assert len(taken) == 3
    assert all(0 < x < 4 for x in taken), "of 4, as the KL divergence stops it"
    trained("Odd", run_name="b")
    assert pieces.values("runs/b", "losses/updates") == [4, 4, 4]


def test_an_evaluation_in_a_folder_that_cannot_be_written(command, monkeypatch):
    """Which only another user than root can find."""
    trained("Odd")
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    files = sorted(os.listdir("runs/a"))
    result = command("--evaluate=runs/a")
    assert result.returncode == 0
    assert "eval: mean" in result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith("ppo.py: warning: this evaluation is not in TensorBoard, as /")
    assert sorted(os.listdir("runs/a")) == files


def test_a_long_evaluation_shows_its_progress(monkeypatch):
    """On a terminal, once a second."""
    trained("Small")
    seconds = itertools.count(0.0, 0.3)  # a look at the clock every 0.3 seconds
    monkeypatch.setattr(ppo.time, "monotonic", lambda: next(seconds))
    stdout = Tee(isatty=lambda: True)
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(troubles.Small, "step", probes.Forever.step)
    ppo.evaluate("runs/a", ppo.Args(eval_episodes=2))
    shown = [line for line in stdout.lines if "eval: episode" in line]
    assert 200 < len(shown) < 2000
    assert shown[0] == "\r\x1b[Keval: episode 1, step 4"
    assert "eval: episode 2, step " in shown[-1]
    assert "2 of them cut after 1,000 steps" in stdout.lines[-2]


# --- Learning that goes astray --------------------------------------------------------------------
@pytest.mark.parametrize("bound", [-20, 2])
def test_log_sigma_stays_in_range(bound):
    """Driven beyond it by a bonus on entropy, or a penalty, that outweighs all else."""

    class Driven(ppo.Agent):
        def policy(self, features):
            dist = super().policy(features)
            dist.log_std.register_hook(lambda gradient: torch.full_like(gradient, -bound))
            return dist

    flags = {"env_id": "Above-v0", "learning_rate": 1.0, "total_timesteps": 96}
    args = ppo.Args(**{**SMALL, **flags, "eval_episodes": 0, "anneal_lr": False})
    args.total_timesteps = 32 * 8
    agent = ppo.train(args, Driven)
    assert agent.log_std.tolist() == [bound]


def test_what_no_loss_reaches_is_named(command, monkeypatch, capsys):
    class Idle(ppo.Agent):
        def __init__(self, *args):
            super().__init__(*args)
            self.idle = torch.nn.Linear(2, 2)

    ppo.train(ppo.Args(env_id="Odd-v0", **{**SMALL, "eval_episodes": 0}), Idle)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(
        "does not depend on idle.weight, idle.bias of the agent, which learn nothing."
    )
