"""What depends on where tensors are: the same on the CPU, and on a GPU where there is one."""

from dataclasses import replace

import numpy as np
import pieces
import pytest
import torch
from test_checkpoints import TESTS, differing
from test_images import SMALL as IMAGES  # registers Square-v0
from test_torchrun import FLAGS, seen, torchrun

import ppo

VECTORS = {"num_envs": 4, "num_steps": 16, "num_minibatches": 2, "run_name": "a", "target_kl": 10.0}
WORK = {
    "vectors": {"env_id": "CartPole-v1", **VECTORS},
    "reals": {"env_id": "Pendulum-v1", "recompute_advantages": True, **VECTORS},
    "images": {"env_id": "Square-v0", **IMAGES, "run_name": "a"},
}
without_gpu = not torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(without_gpu, reason="there is no GPU")
CUDA = pytest.param("cuda", marks=needs_gpu)


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize(
    ("device", "compiled"),
    [  # what is compiled for the CPU has tests of its own
        ("cpu", False),
        pytest.param("cuda", False, marks=needs_gpu),
        pytest.param("cuda", True, marks=needs_gpu),
    ],
)
def test_a_run_on_a_device(device, work, compiled, monkeypatch):
    """It is trained there, stays finite, is resumed there, and its agent acts on the CPU."""
    collect = ppo.collect
    rollouts = []

    def recorded(*args):
        rollout, state = collect(*args)
        rollouts.append(rollout)
        return rollout, state

    monkeypatch.setattr(ppo, "collect", recorded)
    args = ppo.Args(**{**WORK[work], "device": device, "compile": compiled})
    args.total_timesteps = 2 * args.batch_size
    agent = ppo.train(args)
    kinds = {x.device.type for x in [*agent.parameters(), *agent.buffers()]}
    for rollout in rollouts:
        kinds |= {x.device.type for x in rollout if isinstance(x, torch.Tensor)}
        assert rollout.obs.dtype == (torch.uint8 if work == "images" else torch.float32)
    assert kinds == {device}
    for tag, series in pieces.scalars("runs/a").items():
        assert np.isfinite([value for _, value in series]).all(), tag

    checkpoint = ppo.load("runs/a")
    longer = 3 * args.batch_size
    resumed = ppo.train(replace(checkpoint["args"], resume="runs/a", total_timesteps=longer))
    assert next(resumed.parameters()).device.type == device
    steps = {step for step, _ in pieces.scalars("runs/a")["losses/value_loss"]}
    assert steps == {args.batch_size, 2 * args.batch_size, longer}
    loaded = ppo.load_agent("runs/a")
    obs = loaded.observation_space.sample()
    action = loaded.act(torch.from_numpy(obs[None]), greedy=True)
    assert action.device.type == "cpu"
    assert loaded.action_space.contains(loaded.to_env(action.numpy())[0])


@pytest.mark.parametrize("work", ["vectors", "images"])
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_loss_and_gradient_are_those_of_the_cpu(device, work, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # which rounds more coarsely
    args = ppo.Args(**WORK[work])
    with pieces.learner(args) as learner:
        batch = learner.estimate(learner.collect())
    agent = learner.agent
    expected = ppo.backward(agent, batch, args, 0.2)
    gradients = [x.grad.clone() for x in agent.parameters()]
    agent.zero_grad()
    agent.to(device)
    there = ppo.Minibatch(*[x.to(device) for x in batch])
    info = ppo.backward(agent, there, args, 0.2)
    for name, x in info.items():
        torch.testing.assert_close(x.cpu(), expected[name], rtol=1e-3, atol=1e-5)
    for parameter, gradient in zip(agent.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad.cpu(), gradient, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(("device", "gpus"), [("cuda:0", 1), ("cuda", 2)])
def test_two_processes(device, gpus, tmp_path):
    """They share a GPU, or have one each, and end with the same agent, as they do on the CPU."""
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"there are fewer than {gpus} GPUs")
    flags = [*FLAGS, "--total-timesteps=384", f"--device={device}"]
    result = torchrun(tmp_path, TESTS / "ranks.py", tmp_path, *flags)
    assert result.returncode == 0, result.stderr
    assert "on cuda:0, processes: 2" in result.stdout
    first, second = seen(tmp_path)
    assert len(first["gradient"]) == 2 * 3 * 2
    for name in ("agent", "optimizer"):
        assert differing(first[name], second[name]) == []
