"""The program as a user meets it: help, refusals, exit codes, the console and TensorBoard."""

import builtins
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from dataclasses import fields, replace
from pathlib import Path

import pieces
import pytest
import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import ppo

PPO = Path(ppo.__file__)
TESTS = Path(__file__).parent
TINY = ["--total-timesteps=96", "--num-envs=2", "--num-steps=16", "--num-minibatches=2"]
TINY += ["--update-epochs=2", "--run-name=a", "--eval-episodes=0"]


def run(folder, *flags, path="", program=PPO, **kwargs):
    """Run the program in a folder, where the environments of the tests can be imported."""
    env = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{path}", "COLUMNS": "100"}
    command = [sys.executable, str(program), *flags]
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=300, **kwargs
    )


def env_flags(env_id, mode="sync", **kwargs):
    flags = ["--env-id", env_id, "--vectorization-mode", mode]
    return [*flags, "--env-kwargs", json.dumps(kwargs)] if kwargs else flags


def words(text):
    """Text without the frames around it and its division into lines."""
    return " ".join(re.sub("[│╭╮╰╯─]", " ", text).split())


def curves(folder="runs/a"):
    """Every curve but that of the speed. TensorBoard may take the files that a process writes in a
    second for each other's, so that they are read one by one.
    """
    merged = {}
    for path in sorted(Path(folder).glob("events*")):
        for tag, points in pieces.scalars(str(path)).items():
            merged[tag] = sorted(merged.get(tag, []) + points)
    merged.pop("charts/SPS", None)
    return merged


# --- What is refused ------------------------------------------------------------------------------
BAD_INPUT = {  # what the user gives, and what the sentence has to say
    "unknown environment": (["--env-id=CartPoll-v1"], ["CartPoll", "Did you mean", "CartPole"]),
    "unknown version": (["--env-id=CartPole-v9"], ["CartPole-v9", "v1"]),
    "missing module": (["--env-id=no_such_module:Env-v0"], ["No module named 'no_such_module'"]),
    "unknown keyword": (['--env-kwargs={"gravity": 1}'], ["CartPole-v1", "gravity"]),
    "a list of keywords": (["--env-kwargs=[1]"], ["--env-kwargs", '{"size": 5}']),
    "a negative size": (["--hidden-sizes=-1"], ["--hidden-sizes must be at least 1"]),
    "refused value": (
        env_flags("failing:Failing-v0", where="constructor", what="ValueError"),
        ["failing:Failing-v0", "ValueError", "the motor is on fire"],
    ),
    "sequences": (env_flags("failing:Unusable-v0", kind="sequence"), ["Unusable-v0", "Sequence"]),
    "unknown space": (env_flags("failing:Unusable-v0", kind="mission"), ["mission"]),
    "image among others": (env_flags("failing:Unusable-v0", kind="image beside"), ["multi-input"]),
    "tuple": (env_flags("failing:Unusable-v0", mode="async", kind="tuple"), ["Tuple", "Discrete"]),
    "autoreset mode": (env_flags("SameStep-v0", "vector_entry_point"), ["SAME_STEP", "NEXT_STEP"]),
    "existing run": (["--run-name=taken"], ["runs/taken exists", "--resume", "--run-name"]),
    "too few rows": (
        ["--num-envs=1", "--num-steps=15", "--num-minibatches=4"],
        ["--num-minibatches", "two rows", "7"],
    ),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_sentence_and_exit_code_2(name, command, tmp_path):
    flags, parts = BAD_INPUT[name]
    os.makedirs("runs/taken")
    result = command("--total-timesteps=512", *flags)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("ppo.py: ")
    assert all(part in line for part in parts), line
    assert [str(x.relative_to(tmp_path)) for x in tmp_path.rglob("*")] == ["runs", "runs/taken"]


@pytest.mark.parametrize(
    ("name", "flags", "part"),
    [
        ("mujoco", ["--env-id=HalfCheetah-v5"], 'pip install "gymnasium[mujoco]"'),
        ("ale_py", ["--env-id=ALE/Pong-v5"], "ale_py"),
        ("pygame", ["--capture-video"], "pip install"),
        ("moviepy", ["--capture-video"], "pip install"),
    ],
)
def test_a_missing_package_is_named(name, flags, part, command, monkeypatch):
    for module in list(sys.modules):
        if module.startswith((f"{name}.", "gymnasium.envs.mujoco")):
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    result = command("--run-name=a", "--total-timesteps=512", *flags)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("ppo.py: ")
    assert part in line
    assert not Path("runs").exists()


NAN = float("nan")
OUT_OF_RANGE = {
    "num_envs total_timesteps num_steps num_minibatches update_epochs": [0, -1],
    "seed eval_episodes": [-1],
    "checkpoint_interval": [0],
    "learning_rate ent_coef vf_coef clip_coef max_grad_norm target_kl": [-1e-9, NAN],
    "gamma gae_lambda": [1.01, -0.1, NAN],
    "log_std_init": [-20.1, 2.1, NAN],
}


def test_every_number_has_a_range_that_includes_its_limits():
    numbers = {x.name for x in fields(ppo.Args) if re.match(r"(<class ')?(int|float)", str(x.type))}
    assert numbers == set(" ".join(OUT_OF_RANGE).split())
    for names, values in OUT_OF_RANGE.items():
        for name, value in itertools.product(names.split(), values):
            flag = "--" + name.replace("_", "-")
            with pytest.raises(ppo.InputError, match=rf"^{flag} must be .*, not {value}\.$"):
                ppo.train(ppo.Args(**{name: value}))
    assert os.listdir() == []
    ones = dict.fromkeys(["num_envs", "num_minibatches", "update_epochs", "total_timesteps"], 1)
    zeros = dict.fromkeys(["seed", "eval_episodes", "gamma", "gae_lambda", "ent_coef"], 0)
    ppo.check(ppo.Args(**ones, **zeros, num_steps=4, vf_coef=0.0, log_std_init=-20))
    ppo.check(ppo.Args(gamma=1.0, gae_lambda=1.0, log_std_init=2))


def test_a_flag_out_of_range_is_exit_code_2_also_in_an_evaluation(command):
    assert command(*TINY, "--env-id=Match-v0").returncode == 0
    for flags in ([], ["--evaluate=runs/a"]):
        result = command(*flags, "--eval-episodes=1", "--seed=-1")
        sentence = "ppo.py: --seed must be at least 0, not -1.\n"
        assert (result.returncode, result.stderr) == (2, sentence)
    assert os.listdir("runs") == ["a"]


@pytest.mark.parametrize(
    "flags",
    [["--num-envs", "two"], ["--env-kwargs", "{"], ["--no-such-flag"], ["--activation", "x"]],
    ids=" ".join,
)
def test_what_cannot_be_parsed_is_exit_code_2(flags, command):
    result = command(*flags)
    assert result.returncode == 2
    assert flags[0] in result.stderr


def test_a_bug_of_an_environment_keeps_its_traceback(tmp_path):
    """Nothing was asked for that its constructor could have refused."""
    result = run(tmp_path, "--env-id=failing:Bug-v0")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1] == "KeyError: 'the motor is on fire'"
    assert "failing.py" in result.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("what", ["RuntimeError", "ValueError", "FloatingPointError", "OSError"])
@pytest.mark.parametrize("where", ["reset", 9])
def test_what_an_environment_raises_is_no_bad_input(what, where, command):
    """Though its type be one that is a refusal elsewhere, or that of what a nan raises."""
    with pytest.raises(getattr(builtins, what), match="the motor is on fire") as caught:
        command(*TINY, *env_flags("failing:Failing-v0", what=what, where=where))
    assert caught.type is getattr(builtins, what)


# --- Nothing non-finite survives ------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize(
    ("what", "sentence"), [("nan", "obs[7, 0, 0] is nan"), ("inf", "reward[6, 0] is inf")]
)
def test_a_nan_is_named_and_not_saved(what, sentence, mode, command):
    """Step 12 is in row 22, as every other row resets; the first rollout of 16 is saved."""
    flags = env_flags("failing:Failing-v0", mode, what=what, where=12)
    result = command(*TINY, "--checkpoint-interval=1", "--no-norm-obs", *flags)
    assert (result.returncode, result.stderr) == (1, f"ppo.py: {sentence}.\n")
    checkpoint = ppo.load("runs/a")
    assert checkpoint["global_step"] == 32
    assert all(torch.isfinite(x).all() for x in checkpoint["agent"].values())


@pytest.mark.parametrize("name", ["policy_loss", "grad_norm"])
def test_a_nan_in_an_update_is_named(name):
    """A loss, or a finite loss with a gradient that is not."""

    class Agent(ppo.Agent):
        def forward(self, obs):
            dist, value = super().forward(obs)
            if torch.is_grad_enabled():  # in an update
                bad = (next(self.parameters()) * 0).square().sum().sqrt()  # 0, its slope infinite
                value = value + bad if name == "grad_norm" else value
                dist = dist if name == "grad_norm" else ppo.Categorical(dist.logp * NAN)
            return dist, value

    args = ppo.Args(total_timesteps=1024, num_minibatches=1, update_epochs=1)
    with pytest.raises(ppo.NonFiniteError, match=rf"^{name} is nan\.$"):
        ppo.train(args, agent_class=Agent)


# --- Help and the console -------------------------------------------------------------------------
def test_help_has_a_sentence_for_every_flag(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    result = command("--help")
    assert result.returncode == 0
    text = words(result.stdout)
    kind = r"(?:[{\[A-Z]\S*(?: \[?[A-Z.\]]+)* )?"
    for field in fields(ppo.Args):
        flag = "--" + field.name.replace("_", "-")
        sentence = rf"{flag}(?:, --no-\S+)? {kind}[a-zA-Z](?:(?!\(default:).){{14,}}"
        assert re.search(sentence, text), f"{field.name} has no help"
        assert re.search(rf"\b(args|self)\.{field.name}\b", PPO.read_text()), "nothing reads it"


NUMBER = r"-?[\d,.]+"
PROGRESS = rf"(\d+:\d\d:\d\d) left, ({NUMBER}) steps \((\d+)%\), ({NUMBER}) steps/s"
RETURN = rf", return ({NUMBER}), length ({NUMBER})"


def test_a_run_of_the_program(tmp_path, monkeypatch):
    """A made-up name, a header, 32 lines, an evaluation, what to do next; stderr is empty.

    RANK, which a cluster may set, means nothing without WORLD_SIZE.
    """
    monkeypatch.setenv("RANK", "1")
    flags = ["--total-timesteps", "51_200", "--env-id", "probes:Match-v0", "--exp-name", "a/b: c"]
    flags += ["--num-envs=8", "--num-steps=64", "--num-minibatches=4", "--update-epochs=1"]
    result = run(tmp_path, *flags)
    assert (result.returncode, result.stderr) == (0, "")
    assert os.listdir(tmp_path) == ["runs"]
    (name,) = os.listdir(tmp_path / "runs")
    assert re.fullmatch(r"probes-Match-v0__a-b- c__1__\d+", name)
    making, made, *progress, empty, saved, evaluating, evaluation, way = result.stdout.splitlines()
    assert making == "making 8 x probes:Match-v0 ..."
    parameters = 2 * (64 + 64 + 64 * 64 + 64) + 65 * 2 + 65
    assert made == f"runs/{name}: {parameters:,} parameters on cpu"
    assert len(progress) == 32
    shown = [re.fullmatch(PROGRESS + RETURN, line) for line in progress]
    steps = [int(x[2].replace(",", "")) for x in shown]
    assert steps == [-(-51_200 * i // 32 // 512) * 512 for i in range(1, 33)]
    assert [int(x[3]) for x in shown] == [round(step / 512) for step in steps]
    assert all(x[6] == "1" for x in shown), "the length"
    assert shown[-1][1] == "0:00:00"
    assert (empty, saved) == ("", f"saved runs/{name} at step 51,200")
    assert evaluating == "evaluating 10 episodes ..."
    pattern = rf"eval: mean {NUMBER} std {NUMBER} min {NUMBER} max {NUMBER} \(10 episodes, greedy\)"
    assert re.fullmatch(pattern, evaluation)
    assert way == f"python {PPO} --evaluate runs/{name}"


def test_progress_on_a_terminal_is_one_line(command, monkeypatch):
    """It overwrites itself, and is cut to the width of the terminal."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    result = command("--total-timesteps=40_960", "--update-epochs=1", "--eval-episodes=0")
    (line,) = [line for line in result.stdout.split("\n") if "\r" in line]
    updates = line.split("\r\x1b[K")[1:]
    assert len(updates) == 20
    assert max(map(len, updates)) == 59
    assert re.match(PROGRESS.replace(r"(\d+)%", "90%"), updates[17])


# --- TensorBoard ----------------------------------------------------------------------------------
LOSSES = {"policy_loss", "value_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac"}
LOSSES |= {"grad_norm", "explained_variance", "updates"}
CHARTS = {"learning_rate", "episodic_return", "episodic_length"}


@pytest.mark.parametrize(("kind", "more"), [("discrete", set()), ("box", {"charts/action_std"})])
def test_tags(kind, more, command):
    command(*TINY, "--eval-episodes=2", *env_flags("Copy-v0", kind=kind))
    scalars = curves()
    expected = {f"losses/{x}" for x in LOSSES} | {f"charts/{x}" for x in CHARTS} | more
    assert set(scalars) == expected | {"eval/episodic_return"}
    assert all([step for step, _ in scalars[tag]] == [32, 64, 96] for tag in expected)
    assert [step for step, _ in scalars["eval/episodic_return"]] == [96]
    assert scalars["losses/updates"] == [(32, 4), (64, 4), (96, 4)]
    assert {length for _, length in scalars["charts/episodic_length"]} == {1}


def test_flags_are_in_the_table_of_hyperparameters(command):
    command(*TINY, "--gamma=0.875", "--env-id=Match-v0")
    data = EventAccumulator("runs/a").Reload().PluginTagToContent("hparams")
    content = HParamsPluginData.FromString(data["_hparams_/session_start_info"])
    flags = content.session_start_info.hparams
    assert flags["gamma"].number_value == 0.875
    assert flags["env_id"].string_value == "Match-v0"


# --- The README -----------------------------------------------------------------------------------
README = PPO.with_name("README.md").read_text()


@pytest.mark.upstream
def test_every_command_of_the_readme_parses():
    commands = re.findall(r"(?:python|torchrun .*?) ppo\.py( --[^`\n|]*)", README)
    assert len(commands) > 5
    for flags in commands:
        argv = shlex.split(flags, comments=True)
        if "--help" not in argv:
            tyro.cli(ppo.CommandLine, args=argv)


@pytest.mark.upstream
def test_every_example_of_the_readme_runs(monkeypatch, capsys):
    """In the order of the page; all trainings are short."""
    train = ppo.train

    def train_shortly(args, *rest, **kwargs):
        steps = 0 if args.resume is None else ppo.load(args.resume)["global_step"]
        args = replace(args, total_timesteps=steps + 1024, eval_episodes=1)
        return train(args, *rest, **kwargs)

    monkeypatch.setattr(ppo, "train", train_shortly)
    monkeypatch.setattr(sys, "argv", ["ppo.py"])
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for path in set(re.findall(r"runs/[\w-]+", "".join(blocks))):
        ppo.train(ppo.Args(run_name=Path(path).name))
    for block in blocks:
        code = compile(textwrap.dedent(block), "README.md", "exec")
        exec(code, {"__name__": "__main__"})
