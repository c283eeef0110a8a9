"""Presets: which environments call for one, what it sets, and that every flag given by hand wins."""

import dataclasses
import re

import pytest
import torch
from test_cli import run

import ppo

CONTINUOUS = {
    "total_timesteps": 1_000_000, "num_envs": 64, "num_steps": 32, "num_minibatches": 32, "update_epochs": 10,
    "learning_rate": 3e-4, "ent_coef": 0.0, "vf_coef": 0.25, "log_std_init": -1.0, "norm_adv": False,
    "recompute_advantages": True, "target_kl": 0.05,
}  # fmt: skip
TINY = ["--run-name=a", "--total-timesteps=128", "--num-envs=2", "--num-minibatches=4", "--eval-episodes=0"]


def saved(folder):
    """The arguments of a run, as its checkpoint has them."""
    return torch.load(folder / "runs/a/checkpoint.pt", weights_only=True)["args"]


def test_preset_goes_by_the_actions():
    box, choice = ppo.spaces.Box(-1, 1, (2,)), ppo.spaces.MultiDiscrete([2, 3])
    assert ppo.preset("Pendulum-v1") == {"preset": "continuous", **CONTINUOUS}
    assert ppo.preset("probes:Spaces-v0", {"action_space": box})["preset"] == "continuous"
    assert ppo.preset("CartPole-v1") == {"preset": "none"}
    assert ppo.preset("probes:Spaces-v0", {"action_space": choice}) == {"preset": "none"}
    assert ppo.preset("Pendulum-v1", name="none") == {"preset": "none"}
    assert ppo.preset("CartPole-v1", name="continuous") == {"preset": "continuous", **CONTINUOUS}
    with pytest.raises(ppo.InputError, match="No-such-env"):
        ppo.preset("No-such-env-v0")


def test_preset_closes_the_environment_that_it_looks_at(monkeypatch):
    closed, close = [], ppo.gym.vector.SyncVectorEnv.close
    monkeypatch.setattr(
        ppo.gym.vector.SyncVectorEnv, "close", lambda self, **x: closed.append(close(self, **x)) or None
    )
    ppo.preset("Pendulum-v1")
    assert closed


def test_preset_of_what_has_only_a_vector_version():
    assert ppo.preset("probes:Native-v0", mode="vector_entry_point") == {"preset": "none"}


def test_preset_makes_valid_arguments():
    args = ppo.Args(env_id="Pendulum-v1", **ppo.preset("Pendulum-v1"))
    ppo.check(args)
    changed = {name for name, x in vars(args).items() if x != getattr(ppo.Args(), name)}
    assert changed == {"env_id", "preset", *CONTINUOUS}, "it sets nothing that it would have been anyway"


def test_help_shows_the_defaults_of_the_preset(tmp_path):
    def default(flag, *more):
        text = " ".join(re.sub("[│╭╮╰╯─]", " ", run(tmp_path, "--help", *more).stdout).split())
        return re.search(rf"{flag} .*?\(default: (\S+)\)", text)[1]

    assert default("--num-envs INT") == "4"
    assert default("--num-envs INT", "--env-id", "Pendulum-v1") == "64"
    assert default("--num-envs INT", "--env-id", "Pendulum-v1", "--preset", "none") == "4"
    assert default("--preset", "--env-id", "Pendulum-v1") == "continuous"


def test_flags_win_over_the_preset(tmp_path):
    result = run(tmp_path, "--env-id=Pendulum-v1", *TINY, "--learning-rate=0.01", "--norm-adv")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0] == "run: runs/a, from step 0, preset continuous"
    given = {
        "total_timesteps": 128,
        "num_envs": 2,
        "num_minibatches": 4,
        "learning_rate": 0.01,
        "norm_adv": True,
    }
    args = saved(tmp_path)
    assert {name: args[name] for name in CONTINUOUS} == CONTINUOUS | given
    assert args["preset"] == "continuous"


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--env-id=CartPole-v1"], "none"),
        (["--env-id=Pendulum-v1", "--preset=none"], "none"),
        (["--env-id=CartPole-v1", "--preset=continuous"], "continuous"),
        (["--env-id=Pendulum-v1", "--preset=auto"], "continuous"),
        (["--env-id=CartPole-v1", "--preset=auto"], "none"),
    ],
)
def test_preset_flag(tmp_path, flags, name):
    result = run(tmp_path, *TINY, *flags)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0] == f"run: runs/a, from step 0, preset {name}"
    args = saved(tmp_path)
    assert args["preset"] == name
    expected = CONTINUOUS if name == "continuous" else dataclasses.asdict(ppo.Args())
    for field in ("num_steps", "update_epochs", "learning_rate", "recompute_advantages", "vf_coef"):
        assert args[field] == expected[field], field


def test_preset_sees_the_keywords(tmp_path):
    """Spaces-v0 has a choice of actions, and with this keyword real ones."""
    flags = ["--env-id=probes:Spaces-v0", '--env-kwargs={"real": true}', *TINY]
    assert run(tmp_path, *flags).returncode == 0
    assert saved(tmp_path)["preset"] == "continuous"


def test_preset_and_a_native_environment(tmp_path):
    flags = ["--env-id=probes:Native-v0", "--vectorization-mode=vector_entry_point", *TINY]
    result = run(tmp_path, *flags)
    assert result.returncode == 0, result.stderr


def test_a_continuous_run_is_resumed_and_evaluated_as_what_it_was(tmp_path):
    """Repeating --env-id brings no preset into a run that had none, nor changes one that had."""
    assert run(tmp_path, "--env-id=Pendulum-v1", *TINY).returncode == 0
    result = run(tmp_path, "--resume=runs/a", "--env-id=Pendulum-v1", "--total-timesteps=256")
    assert result.returncode == 0, result.stderr
    assert {name: saved(tmp_path)[name] for name in ("num_steps", "num_envs")} == {
        "num_steps": 32,
        "num_envs": 2,
    }
    assert run(tmp_path, "--evaluate=runs/a", "--env-id=Pendulum-v1", "--eval-episodes=1").returncode == 0
    assert run(tmp_path, "--resume=runs/a", "--preset=auto", "--total-timesteps=512").returncode == 0


def test_a_resumed_run_keeps_its_own(tmp_path):
    assert run(tmp_path, "--env-id=Pendulum-v1", "--preset=none", *TINY).returncode == 0
    result = run(tmp_path, "--resume=runs/a", "--env-id=Pendulum-v1", "--total-timesteps=512")
    assert result.returncode == 0, result.stderr
    assert saved(tmp_path)["num_steps"] == 128
    refused = run(tmp_path, "--resume=runs/a", "--total-timesteps=1024", "--preset=continuous")
    assert refused.returncode == 2
    assert "--preset cannot be given with --resume" in refused.stderr
