"""Two processes of torchrun, with real connections, against one process and against arithmetic by hand."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_checkpoints import tensors
from test_cli import PPO, TESTS, run

import ppo

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
FLAGS = ["--run-name=a", "--num-envs=6", "--num-steps=32", "--num-minibatches=3", "--update-epochs=2"]


def start(folder, *command, launch=("--standalone", "--nproc-per-node=2")):
    """Start torchrun with a command, in a process group of its own."""
    env = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*TORCHRUN, *launch, *map(str, command)], cwd=folder, env=env, **pipes)


def finish(process):
    """Its output and errors; it has to end by itself."""
    try:
        return process.communicate(timeout=100)
    finally:
        process.kill()


def torchrun(folder, *command):
    process = start(folder, *command)
    out, err = finish(process)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A run of two processes that CartPole's episodes give different numbers of rows, and what each saw."""
    folder = tmp_path_factory.mktemp("two")
    result = torchrun(
        folder, TESTS / "ranks.py", folder, *FLAGS, "--total-timesteps=1152", "--checkpoint-interval=3"
    )
    assert result.returncode == 0, result.stderr
    return folder, result, [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


def test_processes_end_with_equal_weights_optimizer_and_statistics(two):
    folder, _, (first, second) = two
    for part in ("agent", "optimizer"):
        assert first[part].keys() == second[part].keys()
        for name, x in first[part].items():
            assert torch.equal(x, second[part][name]), name
    saved = torch.load(folder / "runs/a/checkpoint.pt", weights_only=True)
    assert all(torch.equal(x, first["agent"][name]) for name, x in saved["agent"].items())
    assert len(first["gradients"]) == len(second["gradients"]) == 6 * 3 * 2
    assert torch.equal(first["before"][0], second["before"][0])


def test_no_environment_shares_a_seed(two):
    _, _, ranks = two
    trainings = ([seeds for seeds in rank["seeds"] if len(seeds) == 3] for rank in ranks)  # not evaluations
    for resets in zip(*trainings, strict=True):
        seeds = [seed for rank in resets for seed in rank]
        assert len(seeds) == len(set(seeds)) == 6
        assert max(seeds) - min(seeds) == 5


def test_processes_sample_different_actions(two):
    _, _, (first, second) = two
    assert first["minibatches"][0]["action"].tolist() != second["minibatches"][0]["action"].tolist()


def test_statistics_are_those_of_all_rows(two):
    """Against two-pass numpy over the rows of both processes, which differ in number."""
    _, _, (first, second) = two
    updates = [torch.cat(pair).double().numpy() for pair in zip(first["rows"], second["rows"], strict=True)]
    assert any(len(a) != len(b) for a, b in zip(first["rows"], second["rows"], strict=True))
    for name, rows in (
        ("return_stats", np.concatenate(updates[::2])),
        ("obs_stats", np.concatenate(updates[1::2])),
    ):
        assert first["agent"][f"{name}.count"] == len(rows)
        np.testing.assert_allclose(first["agent"][f"{name}.mean"], rows.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(first["agent"][f"{name}.std"], rows.std(0), rtol=1e-5)


def test_a_step_is_that_of_the_joined_minibatch(two):
    """Gradient of every step against that of one process on the rows of both, with its own normalisation."""
    _, _, (first, second) = two
    args = ppo.Args()
    agent = ppo.Agent(ppo.spaces.Box(-9, 9, (4,)), ppo.spaces.Discrete(2), args)
    uneven = 0
    for step in range(6):  # of the first iteration, where nothing is scaled yet
        one, other = first["minibatches"][step], second["minibatches"][step]
        uneven += len(one["ret"]) != len(other["ret"])
        joined = ppo.Minibatch(**{name: torch.cat([one[name], other[name]]) for name in one})
        assert joined.advantage.mean().item() == pytest.approx(0, abs=1e-4)
        assert joined.advantage.std().item() == pytest.approx(1, abs=1e-4)
        assert abs(one["advantage"].mean().item()) > 1e-4, "of both together, not of each"
        torch.nn.utils.vector_to_parameters(first["before"][step], agent.parameters())
        loss, _ = ppo.ppo_loss(agent, joined, args, 0.2)
        gradient = torch.cat([x.flatten() for x in torch.autograd.grad(loss, list(agent.parameters()))])
        gradient *= min(1, 0.5 / gradient.norm().item())
        for rank in (first, second):
            torch.testing.assert_close(rank["gradients"][step], gradient, atol=1e-6, rtol=1e-4)
    assert uneven, "or a plain mean would do"


def test_the_first_process_alone_writes_and_speaks_for_both(two):
    folder, result, ranks = two
    assert result.stdout.count("run: runs/a") == result.stdout.count("eval: mean") == 1
    assert result.stdout.count("6 x CartPole-v1") == 1
    assert sorted(path.name for path in folder.glob("runs/*")) == ["a"]
    events = EventAccumulator(str(folder / "runs/a"))
    events.Reload()
    episodes = sum(event.value for event in events.Scalars("charts/episodes"))
    resets = sum(
        6 * 32 - len(torch.cat(pair)) for pair in zip(*(rank["rows"][::2] for rank in ranks), strict=True)
    )
    assert resets <= episodes <= resets + 6 * 6  # all ends but those in the last row of a rollout
    assert [event.step for event in events.Scalars("charts/SPS")] == [192 * i for i in range(1, 7)]
    assert "1,152 steps (100%)" in result.stdout


def test_kl_stop_is_one_for_all(tmp_path):
    """Both stop at the same minibatch, or one would wait for the other for ever."""
    flags = [*FLAGS, "--total-timesteps=960", "--target-kl=0.0005", "--learning-rate=0.001"]
    result = torchrun(tmp_path, TESTS / "ranks.py", tmp_path, *flags)
    assert result.returncode == 0, result.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in (0, 1))
    taken = len(first["gradients"])
    assert taken == len(second["gradients"])
    assert 5 <= taken < 5 * 6, "it stopped at times, and not at once"
    assert torch.equal(first["optimizer"]["moments"], second["optimizer"]["moments"])


def test_killed_and_resumed_it_is_bitwise_that_of_an_unbroken_run(two, tmp_path):
    flags = [*FLAGS, "--total-timesteps=1152", "--checkpoint-interval=3"]
    (tmp_path / "killed").mkdir()
    result = torchrun(tmp_path, TESTS / "driver.py", "replaced:2", *flags)  # the first after its second save
    assert result.returncode != 0
    checkpoint = torch.load(tmp_path / "runs/a/checkpoint.pt", weights_only=True)
    assert checkpoint["iteration"] == 3
    refused = run(tmp_path, "--resume=runs/a")
    assert refused.returncode == 2
    assert "2 processes" in refused.stderr
    assert torchrun(tmp_path, PPO, "--resume=runs/a").returncode == 0
    unbroken, resumed = (
        torch.load(x / "runs/a/checkpoint.pt", weights_only=True) for x in (two[0], tmp_path)
    )
    for name, x in tensors(unbroken).items():
        y = tensors(resumed)[name]
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, name


def test_the_death_of_one_process_ends_all(tmp_path):
    process = start(tmp_path, PPO, *FLAGS, "--total-timesteps=10_000_000", "--checkpoint-interval=5")
    checkpoint = tmp_path / "runs/a/checkpoint.pt"
    while not checkpoint.exists():
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(1)
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    workers = [int(pid) for pid in listed.stdout.split()]
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    began = time.monotonic()
    _, err = finish(process)
    assert time.monotonic() - began < 60  # torchrun alone gives its processes 30 s
    assert process.returncode == 1
    assert "Signal 9" in err
    assert not any(os.path.exists(f"/proc/{pid}") for pid in workers)
    assert torch.load(checkpoint, weights_only=True)["global_step"] > 0


def test_an_error_in_one_process_is_seen_and_ends_all(tmp_path):
    flags = [
        "--total-timesteps=100_000",
        "--env-id=probes:Faulty-v0",
        '--env-kwargs={"fault": "second process"}',
    ]
    result = torchrun(tmp_path, PPO, *FLAGS, *flags)
    assert result.returncode == 1
    assert re.search(r"ppo.py: reward\[\d+, \d\] is inf", result.stderr)


def test_two_nodes(tmp_path):
    """Two launchers with a process each, which both have local rank 0, meet at an address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meet = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
    command = [TESTS / "ranks.py", tmp_path, *FLAGS, "--total-timesteps=384"]
    nodes = [start(tmp_path, *command, launch=meet) for _ in range(2)]
    outputs = [finish(node) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert sum(out.count("run: runs/a") for out, _ in outputs) == 1
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in (0, 1))
    assert all(torch.equal(x, second["agent"][name]) for name, x in first["agent"].items())
    seeds = [first["seeds"][0], second["seeds"][0]]
    assert len({*seeds[0], *seeds[1]}) == 6


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-envs=5"], "--num-envs 5 cannot be divided among 2 processes"),
        (["--num-envs=4", "--num-steps=8", "--num-minibatches=5"], "Too many --num-minibatches"),
    ],
)
def test_what_cannot_be_divided_is_refused(tmp_path, flags, message):
    result = torchrun(tmp_path, PPO, "--eval-episodes=0", "--total-timesteps=100", *flags)
    assert result.returncode == 1
    assert message in result.stderr
    assert not list(tmp_path.glob("runs/*"))


def test_one_process_connects_to_nobody(monkeypatch):
    monkeypatch.setattr(torch.distributed, "init_process_group", None)
    ppo.train(ppo.Args(total_timesteps=128, eval_episodes=0))


def test_cartpole_is_learnt_by_two(tmp_path):
    result = torchrun(tmp_path, PPO, "--total-timesteps=100_000", "--eval-episodes=20")
    assert float(re.search(r"eval: mean (\S+)", result.stdout)[1]) >= 450
