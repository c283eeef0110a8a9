"""Environments whose value function and best policy are known, learnt from start to end."""

import numpy as np
import probes
import pytest
import torch

import ppo

FLAGS = {
    "num_envs": 8,
    "num_steps": 32,
    "learning_rate": 1e-2,
    "ent_coef": 0.0,
    "norm_obs": False,
    "norm_reward": False,
    "clip_vloss": False,
    "hidden_sizes": (16,),
}


def learn(env_id, steps=20_000, **flags):
    return ppo.train(ppo.Args(env_id=env_id, total_timesteps=steps, **{**FLAGS, **flags}))


@torch.no_grad()
def value(agent, obs):
    return agent(torch.tensor([[float(obs)]]))[1].item()


@torch.no_grad()
def probability(agent, obs, action):
    return agent(torch.tensor([[float(obs)]]))[0].log_prob(torch.tensor([action])).exp().item()


def test_value_of_a_constant_reward():
    assert value(learn("Constant-v0"), 0) == pytest.approx(1, abs=0.02)


def test_value_depends_on_the_observation():
    agent = learn("Sign-v0")
    assert value(agent, -1) == pytest.approx(-1, abs=0.05)
    assert value(agent, 1) == pytest.approx(1, abs=0.05)


def test_value_is_discounted():
    agent = learn("Delay-v0", gamma=0.6)
    assert value(agent, 0) == pytest.approx(0.6, abs=0.03)
    assert value(agent, 1) == pytest.approx(1, abs=0.03)


def test_action_matters():
    assert probability(learn("Choice-v0"), 0, 1) > 0.95


def test_action_depends_on_the_observation():
    agent = learn("Match-v0")
    assert probability(agent, -1, 0) > 0.95
    assert probability(agent, 1, 1) > 0.95


def test_time_limits_do_not_end_the_value():
    """Reward 1 for ever, cut every 10 steps: V = 1 / (1 - 0.9) = 10."""
    assert value(learn("Forever-v0", steps=60_000, gamma=0.9), 0) == pytest.approx(10, abs=0.3)


def test_terminations_do():
    """The same, but for real ends: as no observation tells the time, V is a mean over it.

    Were time limits taken for these, Forever's value would be this one.
    """
    agent = learn("Expiring-v0", steps=60_000, gamma=0.9, gae_lambda=1.0)
    expected = np.mean([(1 - 0.9**n) / (1 - 0.9) for n in range(1, 11)])
    assert expected == pytest.approx(4.14, abs=0.01)
    assert value(agent, 0) == pytest.approx(expected, abs=0.6)


@pytest.mark.parametrize("kind", probes.Copy.SPACES)
def test_copy_the_observation(kind):
    """With all scaling on, as by default."""
    space = probes.Copy.SPACES[kind]
    agent = learn(
        "Copy-v0",
        steps=60_000,
        env_kwargs={"kind": kind},
        norm_obs=True,
        norm_reward=True,
        hidden_sizes=(64,),
        learning_rate=3e-3,
        log_std_init=-1.0,
    )
    space.seed(0)
    wanted = np.array([space.sample() for _ in range(500)])
    flat = np.array([ppo.spaces.flatten(space, w) for w in wanted], np.float32)
    with torch.no_grad():
        action = agent.to_env(agent.act(torch.from_numpy(flat), greedy=True).numpy())
    if kind == "box":
        assert np.abs((action - wanted) / (space.high - space.low)).mean() < 0.05
    else:
        assert np.mean(action == wanted) > 0.95
