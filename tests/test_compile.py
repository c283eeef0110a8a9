"""--compile: the same algorithm up to rounding, compiled once, and with no number frozen in."""

import math
from dataclasses import replace

import pieces
import pytest
import torch
from torch._dynamo.utils import counters

import ppo

SMALL = {"num_envs": 2, "num_steps": 16, "num_minibatches": 2, "update_epochs": 2}
SMALL |= {"eval_episodes": 0, "total_timesteps": 5 * 32}


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


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Copy-v0", "Pendulum-v1"])
def test_a_compiled_update_is_the_same_up_to_rounding(env_id):
    """Of one choice, several, and reals; and also if the advantages are recomputed."""
    flags = {"env_id": env_id, "num_envs": 3, "num_steps": 33, "num_minibatches": 4}
    if env_id == "Copy-v0":
        flags["env_kwargs"] = {"kind": "multidiscrete"}
    with pieces.learner(ppo.Args(**flags, compile=True)) as learner:
        rollout = [learner.collect() for _ in range(2)][-1]
    batch = learner.estimate(rollout)
    flags = {"update_epochs": 2, "ent_coef": 0.02, "recompute_advantages": True}
    learners = {compile: learner.copy() for compile in (False, True)}
    infos = {}
    for compile, one in learners.items():
        torch.manual_seed(0)
        before = number_compiled()
        infos[compile] = one.update(rollout, batch, **flags, compile=compile)
        assert number_compiled() == before + compile
    assert len(infos[True]) == 8
    for info, expected in zip(infos[True], infos[False], strict=True):
        assert info == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert (learners[False].weights() - learner.weights()).abs().max() > 1e-4
    weights = [learners[compile].weights() for compile in (True, False)]
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-6)


def test_a_compiled_update_sees_other_numbers():
    """None of the arguments is a constant of what is compiled, nor do schedules compile anew."""
    args = ppo.Args(num_steps=32, num_minibatches=1, update_epochs=1, norm_adv=False)
    args.compile = True
    with pieces.learner(args) as learner:
        rollout = learner.collect()
        batch = learner.estimate(rollout)
    spread = batch.logprob + torch.linspace(-0.5, 0.5, len(batch.logprob))  # ratios from 0.6 to 1.6
    batch = batch._replace(logprob=spread, value=batch.value + spread)
    changes = [{"clip_coef": x} for x in (0.4, 0.2, 0.1, 0.05)]
    changes += [{"ent_coef": x} for x in (0.0, 0.03, 0.5)]
    changes += [{"vf_coef": x} for x in (0.0, 1.0, 7.0)]
    changes += [{"clip_vloss": False}]
    different, counts = [], []
    for change in changes:
        gradients = []
        for compile in (True, False):
            one = learner.copy()
            (info,) = one.update(rollout, batch, **change, compile=compile, max_grad_norm=math.inf)
            gradients.append(torch.cat([x.grad.flatten() for x in one.agent.parameters()]))
            different.append(info["clipfrac"])
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5, msg=str(change))
        counts.append(number_compiled())
    assert counts[0] == counts[3]
    assert counts[4] == counts[6]
    assert different[:8:2] == sorted(set(different[:8])), "the test needs ratios that are clipped"


def test_runs_of_one_process_are_those_of_their_own_flags():
    """Another agent, other sizes and numbers after it: each compiled as it is uncompiled."""
    before = number_compiled()
    for number, change in enumerate(
        [
            {"num_minibatches": 3, "anneal_gamma": True, "anneal_ent_coef": True},
            {"ent_coef": 0.3, "vf_coef": 2.0, "max_grad_norm": math.inf},
            {"hidden_sizes": (8,), "activation": "relu"},
        ]
    ):
        weights = []
        for compile in (False, True):
            flags = {**SMALL, **change, "run_name": f"{number}-{compile}"}
            agent = ppo.train(ppo.Args(**flags, compile=compile))
            weights.append(torch.cat([x.detach().flatten() for x in agent.parameters()]))
            if number == 0:  # one that is compiled once, over several iterations
                assert number_compiled() == before + compile
        torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-5, msg=str(change))


def test_a_compiled_run_resumes_and_is_evaluated_without_a_compiler(command, monkeypatch):
    ppo.train(ppo.Args(**SMALL, run_name="a", compile=True))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", None)
        assert command("--evaluate=runs/a", "--eval-episodes=1").returncode == 0
    args = ppo.load("runs/a")["args"]
    assert args.compile
    agents = []
    for compile in (True, False):
        changed = replace(args, compile=compile, run_name=str(compile), total_timesteps=320)
        agents.append(ppo.train(replace(changed, resume="runs/a")))
    torch.testing.assert_close(agents[0].state_dict(), agents[1].state_dict(), rtol=1e-3, atol=1e-5)
