"""--compile: the same algorithm up to rounding, compiled once, and what the clock says of it."""

import itertools
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pieces
import pytest
import torch
from test_checkpoints import SMALL, differing, drive, saved
from test_cli import run as in_a_process
from test_images import SMALL as SMALL_IMAGES  # registers Square-v0
from torch._dynamo.utils import counters

import ppo


def number_compiled():
    """How many graphs this process has compiled so far."""
    return counters["stats"]["unique_graphs"]


@pytest.fixture(autouse=True)
def forgetful():
    """What one test has compiled the next one compiles anew, and whole."""
    torch._dynamo.reset()
    counters["graph_break"].clear()
    yield
    assert not counters["graph_break"], "a part of the function was not compiled"


@pytest.fixture(scope="module", params=["CartPole-v1", "Copy-v0", "Pendulum-v1", "Square-v0"])
def example(request):
    """A learner with a rollout, and the batch of it, of one choice, several, reals, and images."""
    flags = {"env_id": request.param, "num_envs": 3, "num_steps": 33, "num_minibatches": 4}
    if request.param == "Copy-v0":
        flags["env_kwargs"] = {"kind": "multidiscrete"}
    with pieces.learner(ppo.Args(**flags)) as learner:
        for _ in range(2):
            rollout = learner.collect()
    batch = learner.estimate(rollout)
    return learner, rollout, ppo.Minibatch(*[x[:45] for x in batch])


def test_a_compiled_update_is_the_same_up_to_rounding(example):
    learner, rollout, batch = example
    eager = learner.copy()
    compiled = learner.copy()
    expected = eager.update(rollout, batch, update_epochs=2, ent_coef=0.02)
    before = number_compiled()
    infos = compiled.update(rollout, batch, update_epochs=2, ent_coef=0.02, compile=True)
    assert number_compiled() == before + 1, "for minibatches of 11 and 12 rows"
    assert len(infos) == len(expected) == 8
    for info, numbers in zip(infos, expected, strict=True):
        assert info == pytest.approx(numbers, rel=1e-3, abs=1e-5)
    moved = eager.weights() - learner.weights()
    assert moved.abs().max() > 1e-4
    torch.testing.assert_close(compiled.weights(), eager.weights(), rtol=1e-3, atol=1e-6)


def test_a_compiled_loss_sees_another_epsilon():
    """A float would be compiled in: in torch 2.13 comparisons with it never change again."""
    args = ppo.Args(num_steps=32)
    with pieces.learner(args) as learner:
        batch = learner.estimate(learner.collect())
    spread = batch.logprob + torch.linspace(-0.5, 0.5, len(batch.logprob))  # ratios from 0.6 to 1.6
    batch = batch._replace(logprob=spread, value=batch.value + spread)
    parameters = list(learner.agent.parameters())

    def differentiated(backward, epsilon):
        learner.agent.zero_grad()
        info = backward(learner.agent, batch, args, epsilon)
        return info, [x.grad.clone() for x in parameters]

    shares = []
    for epsilon in (0.4, 0.2, 0.1, 0.05):
        info, gradients = differentiated(ppo.compiled(ppo.backward), epsilon)
        expected_info, expected = differentiated(ppo.backward, epsilon)
        torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(info, expected_info, rtol=1e-4, atol=1e-6)
        shares.append(info["clipfrac"].item())
    assert shares == sorted(shares)
    assert len(set(shares)) == 4


def test_a_compiled_loss_of_a_fork_sees_other_arguments(monkeypatch):
    """Torch 2.13 would keep the first bounds of a clamp and change what it multiplies with."""
    args = ppo.Args(num_steps=32)
    with pieces.learner(args) as learner:
        batch = learner.estimate(learner.collect())
    spread = batch.logprob + torch.linspace(-0.5, 0.5, len(batch.logprob))
    batch = batch._replace(logprob=spread)
    ppo_loss = ppo.ppo_loss

    def loss_of_a_fork(agent, minibatch, args, epsilon):
        loss, info = ppo_loss(agent, minibatch, args, epsilon)
        dist, _ = agent(minibatch.obs)
        ratio = (dist.log_prob(minibatch.action) - minibatch.logprob).exp()
        clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef) * args.ent_coef
        share = ((ratio - 1).abs() > args.clip_coef).float()
        return loss, {**info, "clipped": clipped.mean().detach(), "share": share.mean()}

    monkeypatch.setattr(ppo, "ppo_loss", loss_of_a_fork)
    for number in (0.2, 0.1, 0.3, 0.05, 0.4):
        changed = replace(args, clip_coef=number, ent_coef=number / 3)
        compiled = ppo.compiled(ppo.backward)(learner.agent, batch, changed, 0.2)
        expected = ppo.backward(learner.agent, batch, changed, 0.2)
        torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-6)


def test_a_run_compiles_once():
    """Beside the trial that the start makes, whatever is annealed."""
    flags = {**SMALL, "total_timesteps": 5 * 32, "num_minibatches": 3, "anneal_clip": True}
    before = number_compiled()
    ppo.train(ppo.Args(**flags))
    assert number_compiled() == before
    ppo.train(ppo.Args(**{**flags, "run_name": "b"}, compile=True))
    assert number_compiled() == before + 2
    eager = np.array(pieces.values("runs/a", "losses/value_loss"))
    assert pieces.values("runs/b", "losses/value_loss") == pytest.approx(eager, rel=1e-3)


def test_runs_of_one_process_do_not_use_up_the_compiler():
    """torch compiles a function so often, eight times as it comes, and then no more."""
    with torch._dynamo.config.patch(recompile_limit=2):
        for seed, hidden in enumerate([(3,), (4,), (3, 4), (4, 5)]):
            args = ppo.Args(**{**SMALL, "run_name": str(seed)}, hidden_sizes=hidden, compile=True)
            args.total_timesteps = 32
            before = number_compiled()
            ppo.train(args)
            assert number_compiled() == before + 2


def test_images_compile_and_resume(command):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL_IMAGES.items()]
    flags = [flag for flag in flags if "norm-obs" not in flag]
    result = command(*flags, "--env-id=Square-v0", "--total-timesteps=128", "--compile")
    assert result.returncode == 0, result.stderr
    assert "compiled: the first update took " in result.stdout
    result = command("--resume=runs/a", "--total-timesteps=192", "--no-compile")
    assert result.returncode == 0, result.stderr
    assert "compiled" not in result.stdout
    assert saved()["iteration"] == 3
    assert saved()["args"]["compile"] is False


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_compiled_runs_are_deterministic_and_resumed_exactly(env_id, tmp_path):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    flags += [f"--env-id={env_id}", "--preset=none", "--compile", "--exact-resume"]
    flags += ["--total-timesteps=320", "--checkpoint-interval=4"]
    results = {}
    for name, where in (("whole", "step:1000"), ("again", "step:1000"), ("killed", "step:96")):
        folder = tmp_path / name
        folder.mkdir()
        result = drive(folder, where, *flags)
        assert (result.returncode == 0) == (name != "killed"), result.stderr
        if name == "killed":
            result = drive(folder, "step:1000", "--resume=runs/a", "--exact-resume")
            assert result.returncode == 0, result.stderr
        results[name] = saved(folder / "runs/a")
    assert not differing(results["whole"], results["again"])
    assert not differing(results["whole"], results["killed"])


# A compiler that is there, but not all that it needs.
WITHOUT_HEADERS = """#!/bin/sh
case "$1" in --version) echo "g++ 12"; exit 0;; esac
echo "In file included from x.cpp:1:" >&2
echo "x.cpp:1:10: fatal error: Python.h: No such file or directory" >&2
exit 1
"""


@pytest.mark.parametrize(
    ("compiler", "cache", "part"),
    [
        ("/no/such/compiler", "cache", "/no/such/compiler"),
        ("/bin/false", "cache", "/bin/false"),
        ("without_headers", "cache", "fatal error: Python.h: No such file"),
        ("g++", "taken", "File exists"),
    ],
)
def test_what_cannot_be_compiled_is_one_sentence_and_exit_code_2(
    compiler, cache, part, tmp_path, monkeypatch
):
    (tmp_path / "taken").write_text("a file where a folder should be")
    script = tmp_path / "without_headers"
    script.write_text(WITHOUT_HEADERS)
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script) if compiler == script.name else compiler)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / cache))
    result = in_a_process(tmp_path, "--compile")
    assert result.returncode == 2, result.stderr
    assert result.stdout == "trying to compile ...\n"
    (line,) = result.stderr.splitlines()
    assert line.startswith("ppo.py: --compile: nothing can be compiled here; torch says: ")
    assert part in line
    assert not (tmp_path / "runs").exists()


def test_an_exact_run_stays_compiled(command):
    """Or not compiled: its bytes are promised, and rounding is another."""
    ppo.train(ppo.Args(**SMALL, total_timesteps=32, compile=True, exact_resume=True))
    result = command("--resume=runs/a", "--total-timesteps=64", "--no-compile")
    assert result.returncode == 2
    assert "--compile cannot be given with --resume runs/a: it keeps its own." in result.stderr
    assert command("--evaluate=runs/a", "--no-compile", "--eval-episodes=1").returncode == 0
    assert command("--resume=runs/a", "--total-timesteps=64").returncode == 0


def test_what_was_compiled_is_evaluated_without_a_compiler(command, monkeypatch):
    ppo.train(ppo.Args(**SMALL, total_timesteps=32, compile=True))
    monkeypatch.setattr(torch, "compile", None)
    result = command("--evaluate=runs/a", "--eval-episodes=2")
    assert result.returncode == 0, result.stderr
    assert "(2 episodes, greedy)" in result.stdout


class Clock:
    """One that goes on only when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        clock = {"perf_counter": lambda: self.now, "monotonic": lambda: self.now, "time_ns": int}
        monkeypatch.setattr(ppo, "time", SimpleNamespace(**clock))

    def takes(self, function, *seconds):
        """The function, whose calls take so long, the last one for ever after."""
        durations = itertools.chain(seconds, itertools.repeat(seconds[-1]))

        def timed(*args):
            self.now += next(durations)
            return function(*args)

        return timed


@pytest.mark.parametrize("compiled", [False, True])
def test_what_the_clock_says(compiled, monkeypatch, capsys):
    """The first update, in which functions are compiled, takes 100 seconds, others take 4."""
    clock = Clock(monkeypatch)
    monkeypatch.setattr(ppo, "collect", clock.takes(ppo.collect, 2))
    monkeypatch.setattr(ppo, "estimate_advantages", clock.takes(ppo.estimate_advantages, 1))
    monkeypatch.setattr(ppo, "update", clock.takes(ppo.update, 100, 4))
    monkeypatch.setattr(ppo.Run, "log", clock.takes(ppo.Run.log, 0.5))
    monkeypatch.setattr(ppo.Run, "keep", clock.takes(ppo.Run.keep, 0, 0.5))  # 0 at the start
    ppo.train(ppo.Args(**SMALL, total_timesteps=4 * 32, compile=compiled))
    assert pieces.values("runs/a", "charts/seconds_rollout") == [2, 2, 2, 2]
    assert pieces.values("runs/a", "charts/seconds_advantage") == [1, 1, 1, 1]
    assert pieces.values("runs/a", "charts/seconds_update") == [100, 4, 4, 4]
    out = capsys.readouterr().out
    speeds = pieces.values("runs/a", "charts/SPS")
    first = 32 / 103.5
    if compiled:
        assert speeds == pytest.approx([first, 32 / 8, 64 / 16, 96 / 24])
        assert out.count("compiled: the first update took 100.0 s") == 1
    else:
        assert speeds == pytest.approx([first, 64 / 111.5, 96 / 119.5, 128 / 127.5])
        assert "compiled" not in out
    assert "after 0:02:08" in out, "the end tells all of it"


LOSING = """
import os
import signal

import torch

import ppo


def lose(function, **_):
    def call(*arguments):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except SystemExit:
            pass
        return function(*arguments)
    return call


torch.compile = lose
ppo.main()
"""


def test_ctrl_c_ends_a_run_even_if_torch_loses_it(tmp_path):
    """What a handler raises while torch compares guards, torch takes for guards that differ."""
    program = tmp_path / "losing.py"
    program.write_text(LOSING)
    flags = ["--compile", "--total-timesteps=1024", "--run-name=a"]
    result = in_a_process(tmp_path, *flags, program=program, path=Path(ppo.__file__).parent)
    assert result.returncode == 130, result.stderr
    assert "--resume runs/a" in result.stdout
    assert "eval:" not in result.stdout


def test_main_can_be_called_again_after_a_signal(command, monkeypatch):
    flags = ["--compile", "--total-timesteps=1024", "--eval-episodes=0"]
    with monkeypatch.context() as patch:
        patch.setattr(ppo, "collect", lambda *_: signal.raise_signal(signal.SIGINT))
        assert command(*flags, "--run-name=a").returncode == 130
    assert command(*flags, "--run-name=b").returncode == 0
