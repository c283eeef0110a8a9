"""Presets: which environments call for one, what it sets, and what wins over it."""

import math
import re
from ast import literal_eval

import numpy as np
import pytest
from gymnasium import spaces
from test_cli import words

import ppo

TABLE = """
total_timesteps       500_000  1_000_000  10_000_000
num_envs              16       64         8
num_steps             128      32         128
gamma                 0.995    0.99       0.99
anneal_gamma          False    True       False
gae_lambda            0.98     0.9        0.95
learning_rate         5e-4     3e-4       2.5e-4
num_minibatches       16       32         4
update_epochs         10       10         4
norm_adv              True     False      True
target_kl             None     0.05       None
recompute_advantages  False    True       False
clip_coef             0.2      0.2        0.1
ent_coef              0.01     0.001      0.01
anneal_ent_coef       False    True       False
vf_coef               0.5      0.25       0.5
hidden_sizes          64,64    64,64      64,64
log_std_init          0.0      -1.0       -1.0
norm_obs              True     True       False
norm_reward           True     True       True
clip_reward           False    False      False
vectorization_mode    'sync'   'sync'     'sync'
"""
ROWS = [line.split() for line in TABLE.strip().splitlines()]
EXPECTED = {
    name: {field: literal_eval(values[i]) for field, *values in ROWS}
    for i, name in enumerate(["discrete", "continuous", "image"])
}
EXPECTED["games"] = EXPECTED["image"] | {
    "clip_reward": True,
    "norm_reward": False,
    "vectorization_mode": "vector_entry_point",
}


def test_what_is_trained_without_a_flag():
    """In Python and on the command line."""
    args = ppo.Args()
    assert ppo.parse_args([]) == args
    assert args.env_id == "CartPole-v1"
    assert vars(args) | EXPECTED["discrete"] == vars(args)
    others = {"seed": 1, "anneal_lr": True, "clip_vloss": True, "max_grad_norm": 0.5}
    others |= {"compile": False}
    assert vars(args) | others == vars(args)


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--env-id=Acrobot-v1"], "discrete"),
        (["--env-id=Pendulum-v1"], "continuous"),
        (["--env-id=Pendulum-v1", "--preset=auto", "--vectorization-mode=async"], "continuous"),
        (["--env-id=Pendulum-v1", "--preset=discrete"], "discrete"),
        (["--preset", "continuous"], "continuous"),
        (["--preset=image"], "image"),
        (['--env-kwargs={"kind": "multidiscrete"}', "--env-id=Copy-v0"], "discrete"),
        (['--env-kwargs={"kind": "multibinary"}', "--env-id=Copy-v0"], "discrete"),
        (['--env-kwargs={"real": true}', "--env-id=Spaces-v0"], "continuous"),
        (["--env-id=Native-v0", "--vectorization-mode=vector_entry_point"], "discrete"),
        (["--env-id=ALE/Pong-v5"], "games"),
        (["--env-id=ale_py:ALE/Pong-v5"], "games"),
    ],
)
def test_the_preset_of_a_command_line(flags, name):
    """Spaces-v0 has a choice of actions, and with the keyword `real` real ones."""
    args = vars(ppo.parse_args([*flags, "--seed=3"]))
    expected = dict(EXPECTED[name])
    given = re.search(r"vectorization-mode=(\S+)", " ".join(flags))
    if given:
        expected["vectorization_mode"] = given[1]
    assert {field: args[field] for field in expected} == expected
    assert args["seed"] == 3


@pytest.mark.parametrize("actions", [spaces.Discrete(3), spaces.Box(-1, 1, (2,))])
def test_the_preset_of_images(actions, monkeypatch):
    """Whatever the actions are."""
    kwargs = ppo.gym.registry["Spaces-v0"].kwargs
    monkeypatch.setitem(kwargs, "observation_space", spaces.Box(0, 255, (40, 40, 3), np.uint8))
    monkeypatch.setitem(kwargs, "action_space", actions)
    args = vars(ppo.parse_args(["--env-id=Spaces-v0"]))
    assert {field: args[field] for field in EXPECTED["image"]} == EXPECTED["image"]


def test_every_flag_wins_over_the_preset():
    """Also where it is what the discrete preset has anyway."""
    argv = ["--env-id=Pendulum-v1", "--num-envs=8", "--ent-coef", "0.01", "--norm-adv"]
    argv += ["--total-timesteps", "500_000", "--target-kl=None", "--log-std-init=0"]
    argv += ["--hidden-sizes", "8", "16", "--no-norm-obs", "--max-grad-norm=inf"]
    args = ppo.parse_args(argv)
    given = {"num_envs": 8, "ent_coef": 0.01, "norm_adv": True, "total_timesteps": 500_000}
    given |= {"target_kl": None, "log_std_init": 0.0, "hidden_sizes": (8, 16), "norm_obs": False}
    given |= {"max_grad_norm": math.inf, "env_id": "Pendulum-v1"}
    assert args == ppo.Args(**EXPECTED["continuous"] | given)
    games = ppo.parse_args(["--env-id=ALE/Pong-v5", "--no-clip-reward", "--norm-reward"])
    assert (games.clip_reward, games.norm_reward) == (False, True)


def test_help_shows_the_numbers_of_the_preset_or_the_run(monkeypatch, capsys):
    def default(flag, *argv):
        monkeypatch.setenv("COLUMNS", "100")
        with pytest.raises(SystemExit) as end:
            ppo.parse_args([*argv, "--help"])
        assert end.value.code == 0
        return re.search(rf"{flag} .*?\(default: (\S+)\)", words(capsys.readouterr().out))[1]

    assert default("--num-envs INT") == "16"
    assert default("--num-envs INT", "--env-id", "Pendulum-v1") == "64"
    assert default("--num-envs INT", "--preset=continuous") == "64"
    tiny = ["--total-timesteps=64", "--num-envs=2", "--num-minibatches=4", "--run-name=a"]
    ppo.train(ppo.parse_args(["--env-id=Pendulum-v1", *tiny, "--eval-episodes=0"]))
    assert default("--num-envs INT", "--resume=runs/a") == "2", "a saved run keeps its own"
    assert default("--num-steps INT", "--evaluate", "runs/a") == "32"


def test_parse_args_of_a_saved_run():
    """All is as it was, but for what is given."""
    argv = ["--env-id=Spaces-v0", '--env-kwargs={"real": true}', "--total-timesteps=64"]
    argv += ["--num-envs=2", "--num-minibatches=4", "--run-name=a", "--gae-lambda=0.5"]
    argv += ["--hidden-sizes", "8", "16", "--eval-episodes=0", "--target-kl=None"]
    args = ppo.parse_args(argv)
    ppo.train(args)
    resumed = ppo.parse_args(["--resume", "runs/a", "--total-timesteps", "256", "--gamma=0.5"])
    changes = {"resume": "runs/a", "total_timesteps": 256, "gamma": 0.5}
    assert vars(resumed) == vars(args) | changes
