"""Reproducibility: the same seed is the same run, and nothing else is."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import probes
import pytest
import torch
from pieces import Recording
from test_checkpoints import differing

import ppo


def train(agent_class=ppo.Agent, **flags):
    small = {"num_envs": 4, "num_steps": 16, "total_timesteps": 256, "eval_episodes": 0}
    name = f"{len(list(Path('runs').glob('*')))}"
    return ppo.train(ppo.Args(**{**small, "run_name": name, **flags}), agent_class)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", "Noisy-v0"])
def test_same_seed_same_run(env_id, monkeypatch):
    """Whatever ran before in this process, and with worker processes, too; not with another seed.

    Noisy-v0 draws from the generators of random and numpy as well as from its own.
    """
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(2)  # as in a process that has trained nothing yet
    modes = ["sync", "sync"] if env_id == "Noisy-v0" else ["sync", "sync", "async"]
    agents = [train(env_id=env_id, vectorization_mode=mode) for mode in modes]
    other = train(env_id=env_id, seed=2)
    for agent in agents[1:]:
        assert differing(agent.state_dict(), agents[0].state_dict()) == []
    assert differing(other.state_dict(), agents[0].state_dict())


def test_the_seed_reaches_networks_actions_and_environments():
    def parts(seed):
        probes.SEEDS.clear()
        flags = {"env_id": "Counting-v0", "learning_rate": 0.0, "norm_obs": False}
        agent = train(Recording, seed=seed, **flags)
        policy = [x.detach().tolist() for x in agent.actor.parameters()]
        return policy[0], probes.SEEDS.copy(), agent.learnt[0][:, 1:].tolist()  # in minibatches

    for x, again, other in zip(parts(1), parts(1), parts(2), strict=True):
        assert x == again != other


def test_a_reset_seeds_all_generators():
    """By the seed of the run and the step."""

    def draws(seed, step):
        args = ppo.Args(seed=seed)
        random.seed()
        np.random.seed()  # noqa: NPY002
        torch.seed()
        with ppo.open_envs(args) as envs:
            obs, _ = ppo.reset(envs, args, step)
        numbers = random.random(), np.random.random(), torch.rand(()).item()  # noqa: NPY002
        return [*numbers, *obs.flatten().tolist()]

    first = draws(1, 0)
    assert len(set(first)) == 3 + 16 * 4
    assert draws(1, 0) == first
    for other in (draws(2, 0), draws(1, 7)):
        assert not set(other) & set(first)


def test_environments_have_seeds_of_their_own():
    """Python ints below 2**31, different in evaluations, resumed runs and those of other seeds."""
    seeds = []
    flags = {"env_id": "Counting-v0", "num_steps": 4, "num_envs": 16, "eval_episodes": 5}
    for seed in (0, 1, 2, 2**40):
        probes.SEEDS.clear()
        name = f"seed-{seed}"
        train(seed=seed, run_name=name, total_timesteps=128, **flags)
        assert len(probes.SEEDS) == 16 + 5
        seeds += probes.SEEDS
        probes.SEEDS.clear()
        args = {"run_name": name, "resume": f"runs/{name}", "total_timesteps": 256}
        train(seed=seed, **args, **flags)
        seeds += probes.SEEDS[:16]
    assert all(type(seed) is int and 0 <= seed < 2**31 for seed in seeds)
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize(("omp_num_threads", "expected"), [(None, 1), ("2", 2)])
def test_the_import_changes_nothing_and_a_run_the_threads(omp_num_threads, expected, tmp_path):
    """To one thread for small networks, unless OMP_NUM_THREADS says otherwise."""
    code = "import torch; n = torch.get_num_threads(); state = torch.get_rng_state(); import ppo; "
    code += "assert torch.get_num_threads() == n; assert torch.get_rng_state().equal(state); "
    code += "ppo.train(ppo.Args(eval_episodes=0, total_timesteps=512)); "
    code += "print(torch.get_num_threads())"
    env = {"PYTHONPATH": str(Path(ppo.__file__).parent)}
    if omp_num_threads:
        env["OMP_NUM_THREADS"] = omp_num_threads
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    assert int(result.stdout.splitlines()[-1]) == expected
    assert os.listdir(tmp_path) == ["runs"]
