"""How many steps of what size: an update beside SB3's, annealing, and the KL stop."""

import math

import numpy as np
import pieces
import pytest
import stable_baselines3
import torch
from gymnasium import spaces
from probes import Spaces
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv
from torch.optim.optimizer import register_optimizer_step_pre_hook

import ppo


@pytest.fixture
def steps():
    """The (learning rate, 2-norm of the gradient) of every minibatch's step in the test."""
    taken = []

    def note(optimizer, _args, _kwargs):
        (group,) = optimizer.param_groups
        norms = [x.grad.norm() for x in group["params"] if x.grad is not None]
        taken.append((group["lr"], torch.stack(norms).norm().item()))

    hook = register_optimizer_step_pre_hook(note)
    yield taken
    hook.remove()


class Shifted:
    """A distribution whose log-probabilities are too large by a number."""

    def __init__(self, dist, shift):
        self.dist = dist
        self.shift = shift
        self.entropy = dist.entropy

    def log_prob(self, action):
        return self.dist.log_prob(action) + self.shift


class Drifting(ppo.Agent):
    """Its ratio, at a learning rate of 0, is 1, 1.15, 1.3, 1.45 and so again in minibatches."""

    first = 1

    def act(self, *args):
        self.calls = 0
        return super().act(*args)

    def forward(self, obs):
        dist, value = super().forward(obs)
        if torch.is_grad_enabled():  # else it is valued, as the policy that acted
            dist = Shifted(dist, math.log(self.first + 0.15 * (self.calls % 4)))
            self.calls += 1
        return dist, value


class Far(Drifting):
    """Its ratio is 2 in the first minibatch, of which the approximate KL is 0.307."""

    first = 2


def sb3s(action_space, agent, rollout, args):
    """SB3's PPO with the weights of an agent, and with a rollout of which all rows are valid."""
    T, N = rollout.reward.shape
    box = spaces.Box(-9, 9, (3,))
    envs = DummyVecEnv([lambda: Spaces(box, action_space)] * N)
    model = stable_baselines3.PPO(
        "MlpPolicy", envs, 1e-3, n_steps=T, batch_size=T, ent_coef=args.ent_coef, device="cpu"
    )
    model.set_logger(Logger(None, []))
    policy = model.policy
    actor = [*policy.mlp_extractor.policy_net, policy.action_net]
    critic = [*policy.mlp_extractor.value_net, policy.value_net]
    pairs = [*zip(actor, agent.actor, strict=True), *zip(critic, agent.critic, strict=True)]
    for theirs, ours in pairs:
        theirs.load_state_dict(ours.state_dict())
    buffer = model.rollout_buffer
    starts = np.ones(N)
    with torch.no_grad():
        for t in range(T):
            obs, action = rollout.obs[t], rollout.action[t]
            value, logprob, _ = policy.evaluate_actions(obs, action)
            buffer.add(*map(np.asarray, (obs, action, rollout.reward[t])), starts, value, logprob)
            starts = rollout.done[t].numpy()
        last = policy.predict_values(rollout.obs[T])
    buffer.compute_returns_and_advantage(last, starts)
    return model, pairs


@pytest.mark.parametrize("action_space", [spaces.Discrete(4), spaces.Box(-1, 1, (2,))])
def test_a_whole_update_equals_stable_baselines3s(action_space, monkeypatch):
    """Advantages, targets, and weights after 10 epochs of 4 minibatches, which are the same rows.

    Without truncations, and where an environment resets within the step of its end, both libraries
    mean the same by a rollout.
    """
    T, N = 32, 4
    flags = {"gamma": 0.99, "gae_lambda": 0.95, "learning_rate": 1e-3, "vf_coef": 1.0}
    flags |= {"clip_vloss": False, "norm_obs": False, "norm_reward": False, "num_minibatches": 4}
    args = ppo.Args(**flags)  # as SB3's defaults, but for the learning rate
    torch.manual_seed(0)
    agent = ppo.Agent(spaces.Box(-9, 9, (3,)), action_space, args)
    done = torch.rand(T, N) < 0.2
    obs = torch.randn(T + 1, N, 3)
    flat = agent.act(obs[:-1].flatten(0, 1), agent.head.noise(T * N))
    rollout = ppo.Rollout(
        obs=obs,
        action=flat.view(T, N, *flat.shape[1:]),
        reward=torch.randn(T, N),
        terminated=done,
        done=done,
        valid=torch.ones(T, N, dtype=torch.bool),
    )
    model, pairs = sb3s(action_space, agent, rollout, args)
    batch = ppo.estimate_advantages(agent, rollout, args)
    for ours, theirs in [
        (batch.advantage, model.rollout_buffer.advantages),
        (batch.target, model.rollout_buffer.returns),
    ]:
        np.testing.assert_allclose(ours.view(T, N), theirs, atol=1e-5)

    def rows_by_environment(size):
        time, env = np.divmod(torch.randperm(size).numpy(), N)
        return env * T + time

    monkeypatch.setattr(np.random, "permutation", rows_by_environment)
    before = agent.actor[0].weight.detach().clone()
    torch.manual_seed(1)
    model.train()
    torch.manual_seed(1)
    optimizer = torch.optim.Adam(agent.parameters(), args.learning_rate, eps=1e-5)
    infos = ppo.update(agent, optimizer, rollout, batch, args)
    assert len(infos) == 40
    assert max(info["clipfrac"] for info in infos) > 0
    assert max(info["grad_norm"] for info in infos) > 0.5, "gradients are clipped"
    assert abs(agent.actor[0].weight - before).max() > 5e-3
    for theirs, ours in pairs:
        for x, y in zip(theirs.parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(y, x, atol=1e-5, rtol=0)
    if isinstance(action_space, spaces.Box):
        log_std = model.policy.log_std
        torch.testing.assert_close(agent.head.log_std, log_std, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("total", "iterations"), [(1, 1), (64, 1), (65, 2), (300, 5)])
def test_runs_are_rounded_up_to_whole_rollouts(total, iterations, steps):
    """And the optimizer is Adam with an epsilon of 1e-5, [Details] #3."""
    flags = {"num_envs": 4, "num_steps": 16, "num_minibatches": 2, "update_epochs": 3}
    args = ppo.Args(total_timesteps=total, eval_episodes=0, run_name="a", **flags)
    agent = ppo.train(args, agent_class=pieces.Recording)
    assert [len(obs) for obs in agent.acted] == [4] * 16 * iterations
    assert len(agent.learnt) == len(steps) == iterations * 3 * 2
    checkpoint = ppo.load("runs/a")
    assert checkpoint["global_step"] == 64 * iterations
    (group,) = checkpoint["optimizer"]["param_groups"]
    assert (group["eps"], *group["betas"], group["weight_decay"]) == (1e-5, 0.9, 0.999, 0)
    logged = [step for step, _ in pieces.scalars("runs/a")["charts/SPS"]]
    assert logged == [64 * (i + 1) for i in range(iterations)]


@pytest.mark.parametrize("on", [True, False])
def test_annealing(on, steps, monkeypatch):
    """In five iterations rate and bonus fall by fifths, and 1 - gamma until it is halved."""
    gammas, weights = [], []
    gae, ppo_loss = ppo.gae, ppo.ppo_loss
    monkeypatch.setattr(ppo, "gae", lambda *x: gammas.append(x[4]) or gae(*x))
    monkeypatch.setattr(ppo, "ppo_loss", lambda *x: weights.append(x[2].ent_coef) or ppo_loss(*x))
    flags = {"num_envs": 4, "num_steps": 16, "num_minibatches": 4, "update_epochs": 2}
    flags |= {"total_timesteps": 320, "recompute_advantages": True, "eval_episodes": 0}
    flags |= {"learning_rate": 1e-3, "gamma": 0.9, "ent_coef": 0.1, "env_id": "Endless-v0"}
    flags |= {"anneal_lr": on, "anneal_gamma": on, "anneal_ent_coef": on, "run_name": "a"}
    ppo.train(ppo.Args(**flags))
    left = pytest.approx([1, 0.8, 0.6, 0.4, 0.2] if on else [1] * 5)
    rates = [rate * 1000 for rate, _ in steps]
    assert len(rates) == len(weights) == 5 * 8
    assert [x * 1000 for x in pieces.values("runs/a", "charts/learning_rate")] == left
    assert rates[::8] == rates[7::8] == left
    assert [x * 10 for x in weights[::8]] == [x * 10 for x in weights[7::8]] == left
    expected = [0.9, 0.92, 0.94, 0.95, 0.95] if on else [0.9] * 5
    assert gammas[::2] == gammas[1::2] == pytest.approx(expected)


# A run of Constant, of reward 1 and one step, in which nothing is learnt.
FIXED = {"env_id": "Constant-v0", "num_envs": 4, "num_steps": 16, "total_timesteps": 128}
FIXED |= {"update_epochs": 2, "num_minibatches": 4, "learning_rate": 0.0, "max_grad_norm": math.inf}
FIXED |= {"norm_adv": False, "norm_reward": False, "eval_episodes": 0, "run_name": "a"}


@pytest.mark.parametrize(("target_kl", "taken"), [(None, 8), (0.05, 3)])
def test_losses_are_averaged_over_all_steps_taken(target_kl, taken, steps):
    """Of 1.45 the KL is 0.078, which may end the update: then no step is taken, nor later ones."""
    agent = ppo.train(ppo.Args(target_kl=target_kl, **FIXED), agent_class=Drifting)
    with torch.no_grad():
        dist, value = super(Drifting, agent).forward(torch.zeros(1, 1))
    v = value.item()
    ratios = [1 + 0.15 * (k % 4) for k in range(taken)]
    expected = {  # the advantage is 1 - v, the target 1
        "policy_loss": [-min(r, 1.2) * (1 - v) for r in ratios],
        "value_loss": [0.5 * (v - 1) ** 2 for r in ratios],
        "entropy": [dist.entropy().item() for r in ratios],
        "old_approx_kl": [-math.log(r) for r in ratios],
        "approx_kl": [r - 1 - math.log(r) for r in ratios],
        "clipfrac": [float(r > 1.2) for r in ratios],
    }
    tags = pieces.scalars("runs/a")
    for name, numbers in expected.items():
        mean = pytest.approx(sum(numbers) / taken, rel=1e-4, abs=1e-6)
        assert tags[f"losses/{name}"] == [(64, mean), (128, mean)], name
    assert tags["losses/updates"] == [(64, taken), (128, taken)]
    norms = [norm for _, norm in steps]
    means = [np.mean(norms[:taken]), np.mean(norms[taken:])]
    assert [norm for _, norm in tags["losses/grad_norm"]] == pytest.approx(means, rel=1e-4)


def test_a_run_goes_on_where_no_step_was_taken(steps):
    """There are no losses to log then."""
    ppo.train(ppo.Args(target_kl=0.3, **FIXED), agent_class=Far)
    assert steps == []
    tags = pieces.scalars("runs/a")
    assert not {"losses/approx_kl", "losses/policy_loss", "losses/grad_norm"} & set(tags)
    assert [step for step, _ in tags["charts/learning_rate"]] == [64, 128]


def test_equal_advantages_are_normalised_to_nothing():
    batch = ppo.Batch(*[torch.full((20,), 3.0)] * 6)
    for part in ppo.minibatches(batch, ppo.Args(num_minibatches=4)):
        assert abs(part.advantage).max() < 1e-6
