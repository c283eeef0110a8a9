"""Reproducibility: the same seed is the same run, and nothing else is."""

import hashlib
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import probes
import pytest
import torch

import ppo

DIGEST = """
import hashlib, sys, ppo
mode, kind, seed = sys.argv[1:]
args = ppo.Args(env_id=kind, vectorization_mode=mode, seed=int(seed), total_timesteps=2048)
state = ppo.train(args).state_dict()
print("digest", hashlib.sha256(b"".join(x.numpy().tobytes() for x in state.values())).hexdigest())
"""


def digest(*arguments):
    command = [sys.executable, "-c", DIGEST, *arguments]
    path = Path(ppo.__file__).parent
    out = subprocess.run(
        command, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(path)}
    ).stdout
    return out.split("digest ")[1]


@pytest.mark.parametrize(("mode", "kind"), [("sync", "CartPole-v1"), ("async", "Pendulum-v1")])
def test_same_seed_same_weights_in_another_process(mode, kind):
    assert digest(mode, kind, "1") == digest(mode, kind, "1") != digest(mode, kind, "2")


def test_sync_and_async_are_the_same_run():
    a, b = (
        ppo.train(ppo.Args(vectorization_mode=mode, total_timesteps=2048)).state_dict()
        for mode in ("sync", "async")
    )
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_an_earlier_run_in_the_process_changes_nothing():
    def weights():
        state = ppo.train(ppo.Args(total_timesteps=1024)).state_dict()
        return hashlib.sha256(b"".join(x.numpy().tobytes() for x in state.values())).hexdigest()

    assert weights() == weights()


def test_the_global_generators_are_seeded():
    draws = []
    for seed in (1, 1, 2):
        ppo.train(ppo.Args(seed=seed, total_timesteps=64, num_steps=16))
        draws.append((random.random(), np.random.random()))  # noqa: NPY002
    assert draws[0] == draws[1]
    assert draws[0][0] != draws[2][0]
    assert draws[0][1] != draws[2][1]


def test_environments_have_seeds_of_their_own():
    """One Python int below 2**31 each, different between environments, checkpoints and runs."""
    seeds = []
    for seed in (0, 1, 2, 2**40):
        probes.SEEDS.clear()
        flags = {"num_steps": 4, "total_timesteps": 6 * 64, "checkpoint_interval": 2, "eval_episodes": 5}
        ppo.train(ppo.Args(env_id="Counting-v0", seed=seed, num_envs=16, **flags))
        assert (
            len(probes.SEEDS) == (1 + 3) * 16 + 5
        )  # a trial before anything is written, and iterations 0, 2, 4
        assert len(set(probes.SEEDS[16:])) == 3 * 16 + 5
        seeds += probes.SEEDS[16:]
    assert len(set(seeds)) == 4 * (3 * 16 + 5)
    assert all(type(seed) is int and 0 <= seed < 2**31 for seed in seeds)


@pytest.mark.parametrize(("omp_num_threads", "expected"), [(None, 1), ("2", 2)])
def test_one_thread_unless_omp_num_threads_says_otherwise(omp_num_threads, expected):
    code = "import ppo, torch; ppo.train(ppo.Args(total_timesteps=512)); print(torch.get_num_threads())"
    env = {"PYTHONPATH": str(Path(ppo.__file__).parent)}
    if omp_num_threads:
        env["OMP_NUM_THREADS"] = omp_num_threads
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
    ).stdout
    assert int(out.splitlines()[-1]) == expected
