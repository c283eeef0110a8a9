"""Presets and parse_args: which environments call for a preset, what it sets, and what wins."""

import re
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from test_cli import run, words

import ppo

CONTINUOUS = {
    "total_timesteps": 1_000_000,
    "num_envs": 64,
    "num_steps": 32,
    "gae_lambda": 0.9,
    "num_minibatches": 32,
    "update_epochs": 10,
    "learning_rate": 3e-4,
    "ent_coef": 0.0,
    "vf_coef": 0.25,
    "log_std_init": -1.0,
    "norm_adv": False,
    "recompute_advantages": True,
    "target_kl": 0.05,
}
DISCRETE = {
    "num_envs": 8,
    "num_steps": 64,
    "gamma": 0.995,
    "gae_lambda": 0.98,
    "learning_rate": 5e-4,
    "update_epochs": 10,
}
TINY = ["--run-name=a", "--total-timesteps=128", "--num-envs=2", "--num-minibatches=4"]
TINY += ["--eval-episodes=0"]


def saved():
    """The arguments of the run, as its checkpoint has them."""
    return torch.load("runs/a/checkpoint.pt", weights_only=True)["args"]


@pytest.fixture
def command_line(monkeypatch, capsys):
    """Do what the command line does, in this process, and return what it prints."""

    def command_line(*flags):
        monkeypatch.setattr(sys, "argv", ["ppo.py", *flags])
        capsys.readouterr()
        ppo.main()
        return capsys.readouterr().out

    return command_line


# Python.
def test_preset_goes_by_the_actions():
    box = spaces.Box(-1, 1, (2,))
    continuous = {"preset": "continuous", **CONTINUOUS}
    discrete = {"preset": "discrete", **DISCRETE}
    assert ppo.preset("Pendulum-v1") == continuous
    assert ppo.preset("probes:Spaces-v0", {"action_space": box}) == continuous
    for space in (spaces.Discrete(3), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(2)):
        assert ppo.preset("probes:Spaces-v0", {"action_space": space}) == discrete
    assert ppo.preset("Pendulum-v1", name="none") == {"preset": "none"}
    assert ppo.preset("CartPole-v1", name="continuous") == continuous
    with pytest.raises(ppo.InputError, match="No-such-env"):
        ppo.preset("No-such-env-v0")


def test_preset_closes_the_environment_that_it_looks_at():
    closed = []

    class Closing(gym.Env):
        observation_space = spaces.Box(-1, 1, (1,), np.float32)
        action_space = spaces.Box(-1, 1, (1,), np.float32)

        def close(self):
            closed.append(self)

    gym.register("Closing-v0", Closing, disable_env_checker=True)
    assert ppo.preset("Closing-v0")["preset"] == "continuous"
    assert len(closed) == 1


def test_preset_of_what_has_only_a_vector_version():
    only = ppo.preset("probes:Native-v0", mode="vector_entry_point")
    assert only == {"preset": "discrete", **DISCRETE}


@pytest.mark.parametrize(
    ("env_id", "numbers"), [("Pendulum-v1", CONTINUOUS), ("Acrobot-v1", DISCRETE)]
)
def test_preset_makes_valid_arguments(env_id, numbers):
    args = ppo.Args(env_id=env_id, **ppo.preset(env_id))
    ppo.check(args)
    changed = {name for name, x in vars(args).items() if x != getattr(ppo.Args(), name)}
    assert changed == {"env_id", "preset", *numbers}, "it sets nothing that was so anyway"


def test_what_a_preset_gives_may_be_changed():
    """Every call gives a new dict, so that another run is not changed with this one."""
    ppo.preset("Pendulum-v1")["num_envs"] = 1
    assert ppo.preset("Pendulum-v1")["num_envs"] == 64


# Command line: --help, and flags beside the preset.
def test_help_shows_the_defaults_of_the_preset(monkeypatch, capsys):
    def default(flag, *more):
        monkeypatch.setenv("COLUMNS", "100")
        with pytest.raises(SystemExit):
            ppo.parse_args(["--help", *more])
        return re.search(rf"{flag} .*?\(default: (\S+)\)", words(capsys.readouterr().out))[1]

    assert default("--num-envs INT") == "8"
    assert default("--num-envs INT", "--preset", "none") == "4"
    assert default("--num-envs INT", "--env-id", "Pendulum-v1") == "64"
    assert default("--num-envs INT", "--env-id", "Pendulum-v1", "--preset", "none") == "4"
    assert default("--num-envs INT", "--preset", "continuous") == "64"
    assert default("--preset", "--env-id", "Pendulum-v1") == "continuous"
    ppo.train(ppo.parse_args(["--env-id=Pendulum-v1", *TINY]))
    assert default("--num-envs INT", "--resume", "runs/a") == "2", "a saved run keeps its own"
    assert default("--num-steps INT", "--evaluate", "runs/a") == "32"


def test_flags_win_over_the_preset(command_line):
    flags = ["--env-id=Pendulum-v1", *TINY, "--learning-rate=0.01", "--norm-adv"]
    output = command_line(*flags)
    assert output.splitlines()[0] == "run: runs/a, from step 0, preset continuous"
    given = {
        "total_timesteps": 128,
        "num_envs": 2,
        "num_minibatches": 4,
        "learning_rate": 0.01,
        "norm_adv": True,
    }
    args = saved()
    assert {name: args[name] for name in CONTINUOUS} == CONTINUOUS | given
    assert args["preset"] == "continuous"


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--env-id=CartPole-v1"], "discrete"),
        (["--env-id=Pendulum-v1", "--preset=none"], "none"),
        (["--env-id=CartPole-v1", "--preset=none"], "none"),
        (["--env-id=CartPole-v1", "--preset=continuous"], "continuous"),
        (["--env-id=Pendulum-v1", "--preset=auto"], "continuous"),
        (["--preset", "auto", "--env-id", "CartPole-v1"], "discrete"),
        (['--env-kwargs={"real": true}', "--env-id=Spaces-v0"], "continuous"),
        (["--env-id=Spaces-v0"], "discrete"),
        (["--env-id=Pendulum-v1", "--vectorization-mode=async"], "continuous"),
        (["--env-id=Native-v0", "--vectorization-mode=vector_entry_point"], "discrete"),
    ],
)
def test_the_command_line_and_parse_args_choose_the_same_preset(flags, name, command_line):
    """Spaces-v0 has a choice of actions, and with the keyword `real` real ones."""
    output = command_line(*TINY, *flags)
    assert output.splitlines()[0] == f"run: runs/a, from step 0, preset {name}"
    args = saved()
    assert args["preset"] == name
    expected = vars(ppo.Args()) | {"none": {}, "discrete": DISCRETE, "continuous": CONTINUOUS}[name]
    for field in ("num_steps", "update_epochs", "learning_rate", "gamma", "vf_coef"):
        assert args[field] == expected[field], field
    assert ppo.parse_args([*TINY, *flags]) == ppo.load("runs/a")["args"]


def test_the_program_itself_has_the_arguments_of_parse_args(tmp_path):
    flags = ["--env-id=probes:Spaces-v0", '--env-kwargs={"real": true}', *TINY, "--gamma", "0.9"]
    flags += ["--hidden-sizes", "8", "16", "--no-norm-obs", "--max-grad-norm=None", "--seed=1_000"]
    result = run(tmp_path, *flags)
    assert (result.returncode, result.stderr) == (0, "")
    args = ppo.parse_args(flags)
    assert args == ppo.load("runs/a")["args"]
    given = {
        "env_kwargs": {"real": True},
        "preset": "continuous",
        "gamma": 0.9,
        "hidden_sizes": (8, 16),
        "norm_obs": False,
        "max_grad_norm": None,
        "seed": 1000,
        "num_steps": 32,
    }
    assert {name: getattr(args, name) for name in given} == given


# parse_args in Python.
def test_parse_args_takes_a_list(monkeypatch):
    """It has nothing to do with the command line of the process, unless none is given."""
    monkeypatch.setattr(sys, "argv", ["program", "--env-id", "Pendulum-v1"])
    discrete = ppo.preset("CartPole-v1")
    assert ppo.parse_args([]) == ppo.Args(**discrete)
    three = ppo.Args(seed=3, **discrete)
    assert ppo.parse_args(["--env-id", "CartPole-v1", "--seed", "3"]) == three
    assert ppo.parse_args(["--preset", "none"]) == ppo.Args()
    continuous = ppo.Args(env_id="Pendulum-v1", **ppo.preset("Pendulum-v1"))
    assert ppo.parse_args() == continuous
    assert ppo.parse_args(["--env-id=Pendulum-v1"]) == continuous


def test_parse_args_of_a_saved_run():
    flags = ["--env-id=Pendulum-v1", *TINY, "--gae-lambda=0.5"]
    ppo.train(ppo.parse_args(flags))
    args = ppo.parse_args(["--resume", "runs/a", "--total-timesteps", "256"])
    expected = ppo.parse_args(flags)
    expected.resume = "runs/a"
    expected.total_timesteps = 256
    assert args == expected
    ppo.train(args)
    assert torch.load("runs/a/checkpoint.pt", weights_only=True)["global_step"] == 256


def test_parse_args_of_bad_input(capsys):
    """What cannot be had is an InputError, and what cannot be parsed an exit, as with tyro."""
    with pytest.raises(ppo.InputError, match="CartPoll"):
        ppo.parse_args(["--env-id", "CartPoll-v1"])
    with pytest.raises(ppo.InputError, match="nowhere"):
        ppo.parse_args(["--resume", "nowhere"])
    with pytest.raises(SystemExit) as exit:
        ppo.parse_args(["--num-envs", "two"])
    assert exit.value.code == 2
    with pytest.raises(SystemExit) as exit:
        ppo.parse_args(["--help"])
    assert exit.value.code == 0


# Saved runs.
def test_a_continuous_run_is_resumed_and_evaluated_as_what_it_was(command_line):
    """Repeating --env-id or --preset=auto changes nothing of what the run has."""
    command_line("--env-id=Pendulum-v1", *TINY)
    command_line("--resume=runs/a", "--env-id=Pendulum-v1", "--total-timesteps=256")
    args = saved()
    assert (args["num_steps"], args["num_envs"], args["total_timesteps"]) == (32, 2, 256)
    flags = ["--evaluate=runs/a", "--env-id=Pendulum-v1", "--eval-episodes=1"]
    assert "eval: mean" in command_line(*flags)
    output = command_line("--resume=runs/a", "--preset=auto", "--total-timesteps=512")
    assert "end: 512 steps" in output


def test_a_resumed_run_keeps_its_own(command_line, tmp_path):
    """Repeating --env-id brings no preset into a run that had none."""
    command_line("--env-id=Pendulum-v1", "--preset=none", *TINY)
    command_line("--resume=runs/a", "--env-id=Pendulum-v1", "--total-timesteps=512")
    assert saved()["num_steps"] == 128
    flags = ["--resume=runs/a", "--total-timesteps=1024", "--preset=continuous"]
    refused = run(tmp_path, *flags)
    assert refused.returncode == 2
    assert "--preset cannot be given with --resume" in refused.stderr
