"""Two processes of torchrun, really connected, beside one process and beside arithmetic."""

import atexit
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pieces
import pytest
import torch
from torch.nn.utils import clip_grad_norm_, parameters_to_vector

import ppo

TESTS = Path(__file__).parent
PPO = Path(ppo.__file__)
FLAGS = ["--run-name=a", "--num-envs=6", "--num-steps=32", "--num-minibatches=3"]
FLAGS += ["--update-epochs=2"]
TARGET_KL = 0.0005
LIMIT = 300  # seconds, of which a run takes ten where nothing else is done
KILLED = "forcefully exiting"  # torchrun's word for what has not ended 30 seconds after a failure
OURS = f'File "{PPO}"'  # a line of a traceback; torchrun shows one of its own


def start(folder, *command):
    """Start two processes with a command."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = [str(TESTS), str(PPO.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [*launch, *map(str, command)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def workers(process):
    """The processes that torchrun has started."""
    command = ["ps", "-o", "pid=", "--ppid", str(process.pid)]
    listed = subprocess.run(command, capture_output=True, text=True)
    return [int(pid) for pid in listed.stdout.split()]


def finish(process):
    """Its output and errors; it has to end by itself."""
    try:
        return process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        for pid in workers(process):  # in sessions of their own
            os.kill(pid, signal.SIGKILL)
        raise
    finally:
        process.kill()


def torchrun(folder, *command):
    process = start(folder, *command)
    out, err = finish(process)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def seen(folder):
    """What the two processes of ranks.py saw."""
    paths = [folder / f"rank{rank}.pt" for rank in (0, 1)]
    return [torch.load(path, map_location="cpu", weights_only=False) for path in paths]


def assert_equal(a, b):
    """All tensors and numbers in nested dicts, lists and tuples, bit for bit."""
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A run in two processes, to which CartPole gives different numbers of rows."""
    folder = tmp_path_factory.mktemp("two")
    flags = [*FLAGS, "--total-timesteps=1152", "--eval-episodes=2"]
    flags += [f"--target-kl={TARGET_KL}", "--learning-rate=0.002"]
    result = torchrun(folder, TESTS / "ranks.py", folder, *flags)
    assert result.returncode == 0, result.stderr
    return folder, result, seen(folder)


def test_processes_begin_and_end_with_equal_weights_optimizers_and_statistics(two):
    folder, _, (first, second) = two
    for name in ("before", "agent", "optimizer"):
        assert_equal(first[name], second[name])
    checkpoint = ppo.load(str(folder / "runs/a"))
    assert_equal(checkpoint["agent"], first["agent"])
    assert not torch.equal(first["before"][0]["actor.0.weight"], first["agent"]["actor.0.weight"])


def test_no_environment_shares_a_seed(two):
    _, _, (first, second) = two
    of_three = [seed for seed, count in first["seeds"] if count == 3]
    other, *evaluated = second["seeds"]
    assert other == (of_three[0] + 3, 3)
    assert evaluated == [], "the first evaluates alone"
    assert len(of_three) == 1


def test_processes_have_random_numbers_of_their_own(monkeypatch):
    """Also where environments draw from the generators of their process."""
    drawn = []
    for rank in (0, 1):
        monkeypatch.setattr(ppo, "RANK", rank)
        env_seed = ppo.seed_generators(1, 3)
        drawn.append([torch.rand(1).item(), np.random.rand(), random.random(), env_seed])  # noqa: NPY002
    assert [a == b for a, b in zip(*drawn, strict=True)] == [False, False, False, True]


def test_statistics_are_those_of_all_rows(two):
    """Beside two-pass numpy, over the rows of both processes."""
    _, _, (first, second) = two
    pairs = list(zip(first["rows"], second["rows"], strict=True))
    assert any(len(a) != len(b) for a, b in pairs), "the test needs unequal numbers"
    joined = [torch.cat(pair).double().numpy() for pair in pairs]
    for name, updates in (("reward_scaler.return_stats", joined[::2]), ("obs_stats", joined[1::2])):
        rows = np.concatenate(updates)
        assert first["agent"][f"{name}.count"] == len(rows)
        mean, std = first["agent"][f"{name}.mean"], first["agent"][f"{name}.std"]
        np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(std, rows.std(0), rtol=1e-5)


def test_a_step_is_that_of_the_joined_minibatch(two):
    """Against one process that has the rows of both: gradient, advantages, KL stop, and the log."""
    folder, _, (first, second) = two
    args = ppo.Args()
    agent = ppo.Agent(ppo.spaces.Box(-9, 9, (4,)), ppo.spaces.Discrete(2), args)
    own_stop_differs = False
    steps = []  # the scalars of every minibatch, and whether its step was taken
    for i, before in enumerate(first["before"]):
        agent.load_state_dict(before)
        one, other = first["minibatch"][i], second["minibatch"][i]
        joined = ppo.Batch(**{name: torch.cat([one[name], other[name]]) for name in one})
        assert joined.advantage.mean().item() == pytest.approx(0, abs=1e-6)
        assert joined.advantage.std().item() == pytest.approx(1, abs=1e-5)
        assert abs(one["advantage"].mean().item()) > 1e-4, "of both together, not of each"
        agent.zero_grad()
        info = ppo.backward(agent, joined, args)
        clip_grad_norm_(agent.parameters(), 0.5)
        taken = info["approx_kl"].item() <= TARGET_KL
        for rank in (first, second):
            assert (rank["gradient"][i] is not None) == taken
            if taken:
                gradient = parameters_to_vector([x.grad for x in agent.parameters()])
                torch.testing.assert_close(rank["gradient"][i], gradient, atol=1e-6, rtol=0)
        own = [ppo.ppo_loss(agent, ppo.Batch(**x), args)[1] for x in (one, other)]
        own_stop_differs |= any((x["approx_kl"].item() <= TARGET_KL) != taken for x in own)
        steps.append((info, taken))
    assert 0 < sum(not taken for _, taken in steps) < len(steps)
    assert own_stop_differs, "or each could decide for itself"

    # The first iteration's means are logged, and its explained variance, from all rows.
    log = {tag: points[0][1] for tag, points in pieces.scalars(str(folder / "runs/a")).items()}
    infos = [info for info, taken in itertools.takewhile(lambda step: step[1], steps[:6])]
    assert log["losses/updates"] == len(infos) > 0
    for name in ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac"):
        mean = np.mean([info[name].item() for info in infos])
        assert log[f"losses/{name}"] == pytest.approx(mean, abs=1e-5), name
    epoch = [x[i] for x in (first["minibatch"], second["minibatch"]) for i in range(3)]
    value = torch.cat([x["value"] for x in epoch]).double().numpy()
    target = torch.cat([x["target"] for x in epoch]).double().numpy()
    expected = 1 - np.var(target - value) / np.var(target)
    assert log["losses/explained_variance"] == pytest.approx(expected, abs=1e-5)


def test_the_first_process_alone_writes_and_speaks_for_both(two):
    """And the end is clean."""
    folder, result, _ = two
    assert "Traceback" not in result.stderr
    for words in ("making 6 x CartPole-v1", "runs/a: ", "eval: mean", "saved runs/a at step 1,152"):
        assert result.stdout.count(words) == 1, words
    assert "1,152 steps (100%)" in result.stdout
    assert os.listdir(folder / "runs") == ["a"]
    scalars = pieces.scalars(str(folder / "runs/a"))
    assert [step for step, _ in scalars["charts/SPS"]] == [192 * i for i in range(1, 7)]
    assert len(scalars["eval/episodic_return"]) == 1


def test_a_signal_to_one_stops_both_and_other_numbers_of_processes_resume(tmp_path, command):
    """One process begins, two go on until a signal comes, and one ends the run and evaluates it."""
    small = [*FLAGS, "--eval-episodes=0"]
    assert command(*small, "--total-timesteps=192").returncode == 0
    long = ["--resume=runs/a", "--total-timesteps=10_000_000", "--checkpoint-interval=1"]
    process = start(tmp_path, PPO, *long)
    for _ in range(10 * LIMIT):
        if ppo.load("runs/a")["global_step"] > 192 * 3:
            break
        assert process.poll() is None
        time.sleep(0.1)
    os.kill(workers(process)[1], signal.SIGTERM)
    out, err = finish(process)
    assert process.returncode != 0
    assert OURS not in err
    assert KILLED not in err
    step = int(re.search(r"saved runs/a at step ([\d,]+)", out)[1].replace(",", ""))
    assert ppo.load("runs/a")["global_step"] == step
    result = command("--resume=runs/a", f"--total-timesteps={step + 192}", "--eval-episodes=1")
    assert result.returncode == 0, result.stderr
    assert "eval: mean" in result.stdout
    assert ppo.load("runs/a")["global_step"] == step + 192


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("failing:SecondNan-v0", r"ppo.py: obs\[\d+, \d, 0\] is nan"),
        ("failing:SecondError-v0", "OSError: the motor is on fire"),
    ],
)
def test_a_failure_of_one_process_is_seen_and_ends_both(env_id, message, tmp_path):
    flags = [*FLAGS, "--total-timesteps=100_000", f"--env-id={env_id}"]
    result = torchrun(tmp_path, PPO, *flags)
    assert KILLED not in result.stderr
    assert result.returncode == 1
    assert re.search(message, result.stderr), result.stderr
    assert not (tmp_path / "runs/a/checkpoint.pt").exists()


def test_what_cannot_be_divided_is_refused(monkeypatch):
    monkeypatch.setattr(ppo, "WORLD_SIZE", 2)
    with pytest.raises(ppo.InputError, match="--num-envs must be a multiple of the 2 processes"):
        ppo.check(ppo.Args(num_envs=5))
    with pytest.raises(ppo.InputError, match="--num-minibatches"):
        ppo.check(ppo.Args(num_envs=4, num_steps=8, num_minibatches=5))


@pytest.mark.parametrize("gpu", [True, False])
def test_each_process_of_a_machine_has_a_gpu_and_sums_there_by_nccl(gpu, monkeypatch):
    """Tensors on the CPU are never summed by nccl, which it cannot."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(ppo, "WORLD_SIZE", 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.distributed, "init_process_group", asked.append)
    monkeypatch.setattr(atexit, "register", lambda *_: None)  # what ends a connection
    assert ppo.set_up(ppo.Args(), True) == ("cuda:1" if gpu else "cpu")
    assert ppo.set_up(ppo.Args(device="cuda:0"), True) == "cuda:0"
    chosen = torch.distributed.distributed_c10d.BackendConfig(asked[0]).get_device_backend_map()
    assert chosen["cpu"] == "gloo"
    assert (chosen["cuda"] == "nccl") == gpu


TWICE = """
import atexit
import os


def tell():
    os.write(1, b"%d thread at the end\\n" % len(os.listdir("/proc/self/task")))  # in one piece


atexit.register(tell)
import ppo

for name in ("eager", "compiled"):
    args = ppo.Args(num_envs=4, total_timesteps=768, eval_episodes=1, run_name=name)
    args.compile = name == "compiled"
    ppo.train(args)
"""


def test_a_program_trains_twice_and_compiled_is_as_eager(tmp_path):
    """Up to rounding: what is summed over processes comes after what is compiled.

    At the end there is no thread of a connection that could outlive Python, and crash it at times.
    """
    (tmp_path / "twice.py").write_text(TWICE)
    result = torchrun(tmp_path, "twice.py")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("eval: mean") == 2
    assert result.stdout.count("1 thread at the end") == 2, result.stdout
    eager, compiled = (ppo.load(f"runs/{name}")["agent"] for name in ("eager", "compiled"))
    torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-5)
