"""Environments whose value function and best policy are known, learnt from start to end."""

import numpy as np
import probes
import pytest
import torch

import ppo

FLAGS = {"num_steps": 32, "update_epochs": 4, "gamma": 0.99, "gae_lambda": 0.95}
FLAGS |= {"learning_rate": 1e-2, "ent_coef": 0.0, "clip_vloss": False, "hidden_sizes": (16,)}
FLAGS |= {"norm_obs": False, "norm_reward": False}


def learn(env_id, steps=20_000, **flags):
    return ppo.train(ppo.Args(env_id=env_id, total_timesteps=steps, **{**FLAGS, **flags}))


@torch.no_grad()
def value(agent, obs):
    return agent(torch.tensor([[float(obs)]]))[1].item()


@torch.no_grad()
def probability(agent, obs, action):
    return agent(torch.tensor([[float(obs)]]))[0].log_prob(torch.tensor([action])).exp().item()


def test_value_depends_on_the_observation():
    agent = learn("Sign-v0")
    assert value(agent, -1) == pytest.approx(-1, abs=0.05)
    assert value(agent, 1) == pytest.approx(1, abs=0.05)


def test_value_is_discounted():
    agent = learn("Delay-v0", gamma=0.6)
    assert value(agent, 0) == pytest.approx(0.6, abs=0.03)
    assert value(agent, 1) == pytest.approx(1, abs=0.03)


def test_action_depends_on_the_observation():
    agent = learn("Match-v0")
    assert probability(agent, -1, 0) > 0.95
    assert probability(agent, 1, 1) > 0.95


def test_time_limits_do_not_end_the_value():
    """Reward 1 for ever, cut every 10 steps: V = 1 / (1 - 0.9) = 10."""
    assert value(learn("Forever-v0", steps=60_000, gamma=0.9), 0) == pytest.approx(10, abs=0.3)


@pytest.mark.parametrize("kind", probes.Copy.SPACES)
def test_copy_the_observation(kind):
    """With all scaling on, as by default."""
    space = probes.Copy.SPACES[kind]
    flags = {"env_kwargs": {"kind": kind}, "norm_obs": True, "norm_reward": True}
    flags |= {"hidden_sizes": (64,), "learning_rate": 3e-3, "log_std_init": -1.0}
    agent = learn("Copy-v0", steps=40_000, **flags)
    space.seed(0)
    wanted = np.array([space.sample() for _ in range(500)])
    flat = np.array([ppo.spaces.flatten(space, w) for w in wanted], np.float32)
    with torch.no_grad():
        action = agent.head.to_env(agent.act(torch.from_numpy(flat)).numpy())
    if kind == "box":
        assert np.abs((action - wanted) / (space.high - space.low)).mean() < 0.05
    else:
        assert np.mean(action == wanted) > 0.95
