"""Reproducibility: the same seed is the same run, and nothing else is."""

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
    env = {"PYTHONPATH": str(Path(ppo.__file__).parent)}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return result.stdout.split("digest ")[1]


@pytest.mark.parametrize(("mode", "kind"), [("sync", "CartPole-v1"), ("async", "Pendulum-v1")])
def test_same_seed_same_weights_in_another_process(mode, kind):
    assert digest(mode, kind, "1") == digest(mode, kind, "1") != digest(mode, kind, "2")


def same(a, b):
    """Whether two agents have the same weights and statistics, bit for bit."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_sync_and_async_are_the_same_run():
    a, b = (
        ppo.train(ppo.Args(vectorization_mode=mode, total_timesteps=2048))
        for mode in ("sync", "async")
    )
    assert same(a, b)


def test_an_earlier_run_in_the_process_changes_nothing():
    a, b = (ppo.train(ppo.Args(total_timesteps=1024)) for _ in range(2))
    assert same(a, b)


def test_the_global_generators_are_seeded():
    """From which an environment may draw, as Noisy does, and a fork, as here from that of torch."""

    class Agent(ppo.Agent):
        draws = []  # noqa: RUF012 (of all such agents)

        def act(self, *args, **kwargs):
            self.draws.append((random.random(), np.random.random(), torch.rand(()).item()))  # noqa: NPY002
            return super().act(*args, **kwargs)

    flags = {"env_id": "Noisy-v0", "total_timesteps": 64, "num_steps": 16, "eval_episodes": 0}
    agents = []
    for seed in (1, 1, 2):
        random.seed()
        np.random.seed()  # noqa: NPY002
        torch.seed()
        agents.append(ppo.train(ppo.Args(seed=seed, **flags), agent_class=Agent))
    assert same(agents[0], agents[1])
    assert not same(agents[0], agents[2])
    first, again, other = Agent.draws[:16], Agent.draws[16:32], Agent.draws[32:]
    assert first == again
    assert len(first) == len(other) == 16
    for x, y in zip(zip(*first, strict=True), zip(*other, strict=True), strict=True):
        assert not set(x) & set(y), "each of the three differs by the seed"


def test_a_restart_seeds_all_generators():
    """The run's own and the process's, by the seed of the run and the iteration."""

    def draws(seed, iteration):
        """A number of each, and the environments' first observations."""
        args = ppo.Args(seed=seed)
        generator = torch.Generator()
        generator.seed()
        random.seed()
        np.random.seed()  # noqa: NPY002
        torch.seed()
        with ppo.closing_envs(ppo.make_envs(args)) as envs:
            obs = ppo.restart(envs, args, iteration, generator).obs
        own = torch.rand((), generator=generator).item()
        process = random.random(), np.random.random(), torch.rand(()).item()  # noqa: NPY002
        return [own, *process, *obs.flatten().tolist()]

    first = draws(1, 0)
    assert len(set(first)) == 4 + 4 * 4
    assert draws(1, 0) == first
    for other in (draws(2, 0), draws(1, 7)):
        assert not set(other) & set(first)


@pytest.mark.parametrize("when", ["init", "reset", "step"])
def test_an_environment_that_seeds_the_global_generators_disturbs_nothing(when):
    """Actions, minibatches and weights are those of a run in the same environment without that.

    The evaluation at the end, which samples too, is among the actions.
    """
    flags = {
        "env_id": "Reseeding-v0",
        "num_envs": 2,
        "num_steps": 60,
        "total_timesteps": 360,
        "eval_stochastic": True,
    }
    agents = []
    actions = []
    for kind in ("never", when):
        probes.Reseeding.actions.clear()
        args = ppo.Args(env_kwargs={"when": kind}, **flags)
        agents.append(ppo.train(args))
        actions.append(probes.Reseeding.actions.copy())
    assert actions[0] == actions[1]
    assert same(*agents)
    assert len(actions[1]) == 2 * 3 * 50 + 10 * 5, "of training, without resets, and evaluation"
    # The two environments act in turn, so that ten actions are an episode of each.
    episodes = {tuple(actions[1][i : i + 10 : 2]) for i in range(0, 300, 10)}
    assert len(episodes) > 15, "of 32 that there are, in 30 episodes"
    evaluated = {tuple(actions[1][i : i + 5]) for i in range(300, 350, 5)}
    assert len(evaluated) > 3


def test_environments_have_seeds_of_their_own():
    """One Python int below 2**31 each, different between environments, checkpoints and runs."""
    seeds = []
    flags = {"num_steps": 4, "total_timesteps": 6 * 64, "checkpoint_interval": 2}
    flags["exact_resume"] = True
    for seed in (0, 1, 2, 2**40):
        probes.SEEDS.clear()
        args = ppo.Args(env_id="Counting-v0", seed=seed, num_envs=16, eval_episodes=5, **flags)
        ppo.train(args)
        # At the start, after iterations 2 and 4, perhaps at the end, and of the evaluation.
        assert len(probes.SEEDS) in (3 * 16 + 5, 4 * 16 + 5)
        assert len(set(probes.SEEDS)) == len(probes.SEEDS)
        seeds += probes.SEEDS
    assert len(set(seeds)) == len(seeds)
    assert all(type(seed) is int and 0 <= seed < 2**31 for seed in seeds)


def test_environments_are_reset_once_before_the_first_step():
    class Agent(ppo.Agent):
        resets = []  # noqa: RUF012 (of environments, by the first, second, ... action)

        def act(self, *args, **kwargs):
            self.resets.append(len(probes.SEEDS))
            return super().act(*args, **kwargs)

    probes.SEEDS.clear()
    flags = {"num_envs": 3, "num_steps": 4, "total_timesteps": 12, "num_minibatches": 2}
    ppo.train(ppo.Args(env_id="Counting-v0", eval_episodes=0, **flags), agent_class=Agent)
    assert Agent.resets == [3] * 4


@pytest.mark.parametrize(("omp_num_threads", "expected"), [(None, 1), ("2", 2)])
def test_one_thread_unless_omp_num_threads_says_otherwise(omp_num_threads, expected):
    code = """
import ppo, torch
ppo.train(ppo.Args(total_timesteps=512))
print(torch.get_num_threads())
"""
    env = {"PYTHONPATH": str(Path(ppo.__file__).parent)}
    if omp_num_threads:
        env["OMP_NUM_THREADS"] = omp_num_threads
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    assert int(result.stdout.splitlines()[-1]) == expected
