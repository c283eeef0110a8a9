"""Two processes of torchrun, really connected, beside one process and beside arithmetic."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from pieces import scalars, values
from test_checkpoints import ENVIRONMENT, PPO, TESTS, curves, differing, saved
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import ppo

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
HERE = ("--standalone", "--nproc-per-node=2")
FLAGS = ["--run-name=a", "--num-envs=6", "--num-steps=32", "--num-minibatches=3"]
FLAGS += ["--update-epochs=2", "--eval-episodes=0"]
LIMIT = 300  # seconds, of which a run takes ten where nothing else is done
KILLED = "forcefully exiting"  # torchrun's word for what has not ended 30 seconds after a failure
OURS = f'File "{PPO}"'  # a line of a traceback; torchrun shows one of its own


def start(folder, *command, launch=HERE):
    """Start torchrun with a command."""
    path = [str(TESTS), str(PPO.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [*TORCHRUN, *launch, *map(str, command)],
        cwd=folder,
        env={**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def workers(process):
    """The processes that torchrun has started."""
    command = ["ps", "-o", "pid=", "--ppid", str(process.pid)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True)
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
    paths = [folder / f"rank{rank}.pt" for rank in (0, 1)]
    return [torch.load(path, map_location="cpu", weights_only=False) for path in paths]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A run in two processes, to which CartPole gives different numbers of rows."""
    folder = tmp_path_factory.mktemp("two")
    flags = [*FLAGS, "--total-timesteps=1152", "--eval-episodes=2"]
    result = torchrun(folder, TESTS / "ranks.py", folder, *flags)
    assert result.returncode == 0, result.stderr
    return folder, result, seen(folder)


def test_processes_end_with_equal_weights_optimizers_and_statistics(two):
    """And so they begin, though their agents were made unequal."""
    folder, _, (first, second) = two
    assert differing(first["agent"], second["agent"]) == []
    assert differing(first["optimizer"], second["optimizer"]) == []
    assert differing(saved(folder / "runs/a")["agent"], first["agent"]) == []
    assert len(first["gradient"]) == len(second["gradient"]) == 6 * 3 * 2
    for a, b in zip(first["before"], second["before"], strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first["before"][0], first["before"][-1])


def test_no_environment_shares_a_seed(two):
    _, _, (first, second) = two
    (one, three), *_ = first["seeds"]
    ((other, three_too),) = second["seeds"]
    assert (three, three_too) == (3, 3)
    assert other == one + 3
    assert [count for _, count in first["seeds"]] == [3, 1, 1], "the first evaluates alone"


def test_processes_have_random_numbers_of_their_own(monkeypatch):
    """Also where environments draw from the generators of their process."""
    monkeypatch.setattr(ppo, "WORLD_SIZE", 2)
    drawn = []
    for rank in (0, 1):
        monkeypatch.setattr(ppo, "RANK", rank)
        _, run_seed = ppo.reseed(ppo.Args(num_envs=6), 3)
        drawn.append((run_seed, torch.rand(1).item(), np.random.rand(), random.random()))  # noqa: NPY002
    assert all(a != b for a, b in zip(*drawn, strict=True))


def test_statistics_are_those_of_all_rows(two):
    """Beside two-pass numpy, over the rows of both processes."""
    _, _, (first, second) = two
    pairs = list(zip(first["rows"], second["rows"], strict=True))
    assert any(len(a) != len(b) for a, b in pairs), "the test needs unequal numbers"
    joined = [torch.cat(pair).double().numpy() for pair in pairs]
    for name, updates in (("return_stats", joined[::2]), ("obs_stats", joined[1::2])):
        rows = np.concatenate(updates)
        assert first["agent"][f"{name}.count"] == len(rows)
        mean, std = first["agent"][f"{name}.mean"], first["agent"][f"{name}.std"]
        np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(std, rows.std(0), rtol=1e-5)


def test_a_step_is_that_of_the_joined_minibatch(two):
    """Against the gradient of one process that has the rows of both."""
    _, _, (first, second) = two
    args = ppo.Args()
    agent = ppo.Agent(ppo.spaces.Box(-9, 9, (4,)), ppo.spaces.Discrete(2), args)
    agreeing = []
    for i in range(6):  # of the first iteration, where observations are not scaled yet
        one, other = first["minibatch"][i], second["minibatch"][i]
        joined = ppo.Minibatch(**{name: torch.cat([one[name], other[name]]) for name in one})
        assert joined.advantage.mean().item() == pytest.approx(0, abs=1e-6)
        assert joined.advantage.std().item() == pytest.approx(1, abs=1e-6)
        assert abs(one["advantage"].mean().item()) > 1e-3, "of both together, not of each"
        vector_to_parameters(first["before"][i], agent.parameters())

        def gradient_of(minibatch):
            loss, _ = ppo.ppo_loss(agent, minibatch, args, 0.2)
            gradients = torch.autograd.grad(loss, list(agent.parameters()))
            return parameters_to_vector(gradients)

        gradient = gradient_of(joined)
        plain_mean = gradient_of(ppo.Minibatch(**one)) / 2 + gradient_of(ppo.Minibatch(**other)) / 2
        scale = min(1, 0.5 / gradient.norm().item())
        for rank in (first, second):
            torch.testing.assert_close(rank["gradient"][i], scale * gradient, atol=1e-6, rtol=0)
        agreeing.append(torch.allclose(plain_mean, gradient, atol=1e-6, rtol=0))
    assert not all(agreeing), "or a plain mean would do"


def test_the_first_process_alone_writes_and_speaks_for_both(two):
    folder, result, (first, second) = two
    assert result.stdout.count("run: runs/a") == result.stdout.count("eval: mean") == 1
    assert "environments: 6 x CartPole-v1" in result.stdout
    assert "processes: 2" in result.stdout
    assert "3 minibatches of 64 rows" in result.stdout
    assert "1,152 steps (100%)" in result.stdout
    assert len(list(folder.glob("runs/*"))) == 1
    assert len(list(folder.glob("runs/a/events*"))) == 1, "with the evaluation in it"
    assert [step for step, _ in scalars(str(folder / "runs/a"))["charts/SPS"]] == [
        192 * i for i in range(1, 7)
    ]
    # Every episode but those that end in the last row of all costs a row.
    rows = sum(len(a) + len(b) for a, b in zip(first["rows"], second["rows"], strict=True)) / 2
    episodes = sum(values(str(folder / "runs/a"), "charts/episodes"))
    staggered = 6
    assert 1152 - rows <= episodes + staggered <= 1152 - rows + 6 + staggered
    assert episodes > 30


def test_what_is_logged_is_of_both(two):
    """The losses of the first iteration and its explained variance, from the rows of both."""
    folder, _, (first, second) = two
    args = ppo.Args()
    agent = ppo.Agent(ppo.spaces.Box(-9, 9, (4,)), ppo.spaces.Discrete(2), args)
    losses = []
    for i in range(6):
        one, other = first["minibatch"][i], second["minibatch"][i]
        joined = ppo.Minibatch(**{name: torch.cat([one[name], other[name]]) for name in one})
        vector_to_parameters(first["before"][i], agent.parameters())
        _, info = ppo.ppo_loss(agent, joined, args, 0.2)
        losses.append(info)
    for name in ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac"):
        mean = np.mean([info[name].item() for info in losses])
        logged = values(str(folder / "runs/a"), f"losses/{name}")[0]
        assert logged == pytest.approx(mean, abs=1e-5), name
    epoch = [x[i] for x in (first["minibatch"], second["minibatch"]) for i in range(3)]
    value = torch.cat([x["value"] for x in epoch]).double().numpy()
    target = torch.cat([x["target"] for x in epoch]).double().numpy()
    expected = 1 - np.var(target - value) / np.var(target)
    logged = values(str(folder / "runs/a"), "losses/explained_variance")[0]
    assert logged == pytest.approx(expected, abs=1e-5)


def test_the_kl_stop_is_one_for_both(tmp_path):
    """At the same minibatch, or one would wait for the other for ever."""
    flags = [*FLAGS, "--total-timesteps=960", "--target-kl=0.0005", "--learning-rate=0.001"]
    result = torchrun(tmp_path, TESTS / "ranks.py", tmp_path, *flags)
    assert result.returncode == 0, result.stderr
    first, second = seen(tmp_path)
    taken = len(first["gradient"])
    assert taken == len(second["gradient"])
    assert 5 <= taken < 5 * 6, "it stopped at times, and not at once"
    assert differing(first["optimizer"], second["optimizer"]) == []


@pytest.mark.parametrize("exact", [False, True])
def test_a_killed_run_is_resumed(exact, tmp_path):
    """Twice from one checkpoint, the same bytes; with --exact-resume, those of an unbroken run."""
    flags = [*FLAGS, "--total-timesteps=1152", "--checkpoint-interval=3"]
    flags += ["--exact-resume"] if exact else []
    broken, other = tmp_path / "broken", tmp_path / "other"
    broken.mkdir()
    result = torchrun(broken, TESTS / "driver.py", "replaced:2", *flags)
    assert result.returncode != 0
    assert saved(broken / "runs/a")["iteration"] == 3
    if exact:
        other.mkdir()
        assert torchrun(other, PPO, *flags).returncode == 0
    else:
        subprocess.run(["cp", "-r", broken, other], check=True)
        assert torchrun(other, PPO, "--resume=runs/a").returncode == 0
    assert torchrun(broken, PPO, "--resume=runs/a").returncode == 0
    assert saved(broken / "runs/a")["iteration"] == 6
    assert differing(saved(broken / "runs/a"), saved(other / "runs/a")) == []
    assert curves(broken / "runs/a") == curves(other / "runs/a")


def test_the_number_of_processes_stays(two, monkeypatch, command):
    """But one process can evaluate what two have learnt."""
    monkeypatch.chdir(two[0])
    result = command("--resume=runs/a", "--total-timesteps=2000")
    assert result.returncode == 2
    way = "torchrun --nproc-per-node 2 ppo.py --resume runs/a"
    assert f"runs/a needs as many processes as it had, 2: {way}" in result.stderr
    result = command("--evaluate=runs/a", "--eval-episodes=1")
    assert result.returncode == 0, result.stderr


def training(folder, *flags):
    """A long run, once it has written its first checkpoint after the one at the start."""
    process = start(folder, PPO, *FLAGS, "--total-timesteps=10_000_000", *flags)
    path = folder / "runs/a/checkpoint.pt"
    for _ in range(10 * LIMIT):
        if path.exists() and saved(folder / "runs/a")["iteration"] > 0:
            return process
        assert process.poll() is None
        time.sleep(0.1)
    raise AssertionError("it did not start to train")


def test_the_death_of_one_process_ends_both(tmp_path):
    process = training(tmp_path, "--checkpoint-interval=5")
    first, second = workers(process)
    os.kill(second, signal.SIGKILL)
    _, err = finish(process)
    assert KILLED not in err
    assert process.returncode == 1
    assert "Signal 9" in err
    assert not any(os.path.exists(f"/proc/{pid}") for pid in (first, second))
    assert saved(tmp_path / "runs/a")["iteration"] >= 5


def test_a_signal_saves_the_last_iteration(tmp_path):
    process = training(tmp_path, "--checkpoint-interval=5")
    process.send_signal(signal.SIGTERM)
    out, err = finish(process)
    assert process.returncode != 0
    assert OURS not in err
    way = rf"resume from step ([\d,]+): torchrun --nproc-per-node 2 {PPO} --resume runs/a\n"
    step = int(re.search(way, out)[1].replace(",", ""))
    assert saved(tmp_path / "runs/a")["global_step"] == step


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("failing:SecondNan-v0", r"ppo.py: obs\[\d+, \d, 0\] is nan in process 1"),
        ("failing:SecondError-v0", "OSError: the motor is on fire"),
    ],
)
def test_a_failure_of_one_process_is_seen_and_ends_both(env_id, message, tmp_path):
    flags = [*FLAGS, "--total-timesteps=100_000", f"--env-id={env_id}", "--preset=none"]
    result = torchrun(tmp_path, PPO, *flags)
    assert KILLED not in result.stderr
    assert result.returncode == 1
    assert re.search(message, result.stderr), result.stderr
    assert saved(tmp_path / "runs/a")["iteration"] == 0


def node():
    """The flags of two launchers of a process each, which meet at an address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d"]
    return [*launch, f"--rdzv-endpoint=127.0.0.1:{port}"]


def test_two_nodes(tmp_path):
    """Both processes have local rank 0."""
    launch = node()
    command = [TESTS / "ranks.py", tmp_path, *FLAGS, "--total-timesteps=384"]
    nodes = [start(tmp_path, *command, launch=launch) for _ in range(2)]
    outputs = [finish(node) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert sum(out.count("run: runs/a") for out, _ in outputs) == 1
    first, second = seen(tmp_path)
    assert differing(first["agent"], second["agent"]) == []
    assert second["seeds"] == [(first["seeds"][0][0] + 3, 3)]


def test_nodes_are_to_have_the_same_flags(tmp_path):
    launch = node()
    command = [PPO, *FLAGS, "--total-timesteps=384"]
    nodes = [start(tmp_path, *command, *more, launch=launch) for more in ((), ("--gamma=0.9",))]
    for process in nodes:
        _, err = finish(process)
        assert process.returncode == 1
        assert "ppo.py: The flags of the processes differ" in err
        assert OURS not in err
    assert not list(tmp_path.glob("runs/*"))


def test_a_folder_that_is_there_is_left_alone(two):
    """Only the first process knows of it, but both end without a traceback."""
    folder, *_ = two
    before = (folder / "runs/a/checkpoint.pt").read_bytes()
    result = torchrun(folder, PPO, *FLAGS, "--total-timesteps=384")
    assert result.returncode == 1
    assert "ppo.py: Cannot make folder runs/a: File exists" in result.stderr
    assert OURS not in result.stderr
    assert (folder / "runs/a/checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-envs=5"], "--num-envs must be a multiple of the 2 processes, not 5."),
        (
            ["--num-envs=4", "--num-steps=8", "--num-minibatches=5"],
            "--num-minibatches 5 needs two rows in each, and of 16 steps only 8 are sure",
        ),
    ],
)
def test_what_cannot_be_divided_is_refused(flags, message, tmp_path):
    result = torchrun(tmp_path, PPO, "--eval-episodes=0", "--total-timesteps=100", *flags)
    assert result.returncode == 1
    assert message in result.stderr
    assert OURS not in result.stderr
    assert not list(tmp_path.glob("runs/*"))


def test_images_are_learnt_from_by_two(tmp_path):
    flags = [*FLAGS, "--env-id=test_images:Square-v0", "--total-timesteps=384"]
    result = torchrun(tmp_path, TESTS / "ranks.py", tmp_path, *flags)
    assert result.returncode == 0, result.stderr
    first, second = seen(tmp_path)
    assert first["minibatch"][0]["obs"].dtype == torch.uint8
    assert differing(first["agent"], second["agent"]) == []


def test_each_process_on_a_machine_has_a_gpu(monkeypatch):
    """By its number on the machine, not among all."""
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device=None: zeros(*size))
    monkeypatch.setattr(ppo, "RANK", 5)
    monkeypatch.setattr(ppo, "LOCAL_RANK", 1)
    space = ppo.spaces.Box(-1, 1, (3,))
    assert str(ppo.set_up(ppo.Args(device="cuda"), space)) == "cuda:1"
    assert str(ppo.set_up(ppo.Args(device="cuda:0"), space)) == "cuda:0"


def test_more_processes_than_gpus(monkeypatch):
    """Also where the device was found by auto, it is said what was not found, and what to do."""

    def no_second_gpu(*size, device=None):
        assert device == "cuda:1"
        raise RuntimeError("invalid device ordinal")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", no_second_gpu)
    monkeypatch.setattr(ppo, "WORLD_SIZE", 2)
    monkeypatch.setattr(ppo, "LOCAL_RANK", 1)
    image = ppo.spaces.Box(0, 255, (3, 96, 96), np.uint8)
    with pytest.raises(ppo.InputError, match=r"no device cuda:1 here.*processes than there are"):
        ppo.set_up(ppo.Args(), image)


@pytest.mark.parametrize("gpu", [True, False])
def test_tensors_on_the_cpu_are_never_summed_by_nccl(gpu, monkeypatch):
    """Which a process would by default where there is a GPU, and fail."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(ppo, "WORLD_SIZE", 2)
    monkeypatch.setattr(ppo, "all_gather", lambda x: x)
    monkeypatch.setattr(ppo.atexit, "register", lambda _: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", asked.append)
    ppo.connect(ppo.Args())
    (backend,) = asked
    chosen = torch.distributed.distributed_c10d.BackendConfig(backend).get_device_backend_map()
    assert chosen["cpu"] == "gloo"
    assert (chosen["cuda"] == "nccl") == gpu


def test_one_process_connects_to_nobody(monkeypatch):
    monkeypatch.setattr(torch.distributed, "init_process_group", None)
    monkeypatch.setattr(torch.distributed, "all_reduce", None)
    ppo.train(ppo.Args(total_timesteps=512, eval_episodes=0))


TWICE = """
import atexit
import os


def tell():
    # In one piece, as the other process does so at the same time.
    os.write(1, b"%d thread at the end\\n" % len(os.listdir("/proc/self/task")))


atexit.register(tell)
import ppo

for name in "ab":
    ppo.train(ppo.Args(num_envs=4, total_timesteps=1024, eval_episodes=1, run_name=name))
"""


def test_a_program_may_train_twice(tmp_path):
    """And leaves no thread that could outlive Python, and crash it then."""
    (tmp_path / "twice.py").write_text(TWICE)
    result = torchrun(tmp_path, "twice.py")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("eval: mean") == 2
    assert result.stdout.count("1 thread at the end") == 2
    assert differing(saved(tmp_path / "runs/a")["agent"], saved(tmp_path / "runs/b")["agent"]) == []


def test_cartpole_is_learnt_by_two(tmp_path):
    """As by one, which reaches 450 in test_learning."""
    flags = ["--num-envs=8", "--total-timesteps=120_000", "--eval-episodes=20"]
    result = torchrun(tmp_path, PPO, *flags)
    assert float(re.search(r"eval: mean (\S+)", result.stdout)[1]) >= 450, result.stdout


def test_compiled_processes_are_those_that_are_not_up_to_rounding(tmp_path):
    """Loss and gradient are compiled; what is summed over processes comes after them."""
    results = []
    for name, flags in (("eager", ["--no-compile"]), ("compiled", ["--compile"])):
        folder = tmp_path / name
        folder.mkdir()
        result = torchrun(folder, PPO, *FLAGS, "--total-timesteps=384", *flags)
        assert result.returncode == 0, result.stderr
        assert ("compiled: the first update took" in result.stdout) == (name == "compiled")
        results.append(saved(folder / "runs/a")["agent"])
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-5)
