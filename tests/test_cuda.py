"""What depends on where tensors are: the same on the CPU, and on a GPU where there is one."""

from dataclasses import replace

import numpy as np
import pieces
import pytest
import test_images  # noqa: F401 (registers Square-v0)
import torch
from test_torchrun import FLAGS, TESTS, assert_equal, seen, torchrun

import ppo

SMALL = {"num_envs": 4, "num_steps": 16, "num_minibatches": 2, "eval_episodes": 2}
SMALL |= {"run_name": "a", "target_kl": 10.0, "total_timesteps": 128}
WORK = {
    "vectors": {"env_id": "CartPole-v1"},
    "reals": {"env_id": "Pendulum-v1", "recompute_advantages": True},
    "images": {"env_id": "Square-v0", "update_epochs": 2},
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
    tensors = []

    def recorded(*args):
        rollout, obs, done = collect(*args)
        tensors.extend(rollout)
        return rollout, obs, done

    monkeypatch.setattr(ppo, "collect", recorded)
    args = ppo.Args(**{**SMALL, **WORK[work], "device": device, "compile": compiled})
    agent = ppo.train(args)
    assert len(agent.eval_returns) == 2
    assert {x.device.type for x in [*agent.state_dict().values(), *tensors]} == {device}
    for tag, series in pieces.scalars("runs/a").items():
        assert np.isfinite([value for _, value in series]).all(), tag

    longer = replace(ppo.load("runs/a")["args"], resume="runs/a", total_timesteps=192)
    assert next(ppo.train(longer).parameters()).device.type == device
    assert ppo.load("runs/a")["global_step"] == 192
    loaded = ppo.load_agent("runs/a")
    with ppo.closing(ppo.make_envs(args, 1)) as envs:
        action = loaded.act(torch.from_numpy(envs.reset()[0].astype(loaded.obs_dtype)))
        assert action.device.type == "cpu"
        assert envs.single_action_space.contains(loaded.head.to_env(action.numpy())[0])


@pytest.mark.parametrize("work", ["vectors", "images"])
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_loss_and_gradient_are_those_of_the_cpu(device, work, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # which rounds more coarsely
    args = ppo.Args(**{**SMALL, **WORK[work]})
    with pieces.learner(args) as learner:
        batch = learner.estimate(learner.collect())
    agent = learner.agent
    expected = ppo.backward(agent, batch, args)
    gradients = [x.grad.clone() for x in agent.parameters()]
    agent.zero_grad()
    agent.to(device)
    info = ppo.backward(agent, ppo.Batch(*[x.to(device) for x in batch]), args)
    for name, x in info.items():
        torch.testing.assert_close(x.cpu(), expected[name], rtol=1e-3, atol=1e-5)
    for parameter, gradient in zip(agent.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad.cpu(), gradient, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(("device", "gpus"), [("cuda:0", 1), ("cuda", 2)])
def test_two_processes(device, gpus, tmp_path):
    """They share a GPU, or have one each, and end with the same agent, as they do on the CPU."""
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"there are fewer than {gpus} GPUs")
    flags = [*FLAGS, "--env-id=test_images:Square-v0", "--total-timesteps=384"]
    result = torchrun(tmp_path, TESTS / "ranks.py", tmp_path, *flags, f"--device={device}")
    assert result.returncode == 0, result.stderr
    assert "on cuda:0" in result.stdout
    first, second = seen(tmp_path)
    assert len(first["gradient"]) == 2 * 3 * 2
    for name in ("agent", "optimizer"):
        assert_equal(first[name], second[name])
