"""Action and observation spaces: distributions, what is stored, and what the environment is sent."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

import ppo

OBS = spaces.Box(-5, 20, (3,), np.float64)
ACTIONS = {
    "discrete": spaces.Discrete(3),
    "discrete from 5": spaces.Discrete(3, start=5),
    "discrete from -2": spaces.Discrete(2, start=-2),
    "multidiscrete": spaces.MultiDiscrete([3, 2, 5]),
    "multidiscrete 2 x 2": spaces.MultiDiscrete([[3, 2], [1, 4]], start=[[0, 1], [-3, 2]]),
    "multibinary": spaces.MultiBinary(4),
    "multibinary 2 x 3": spaces.MultiBinary((2, 3)),
    "box": spaces.Box(-2, 2, (2,), np.float32),
    "box asymmetric": spaces.Box(np.array([0.0, -1.0]), np.array([1000.0, 0.5]), dtype=np.float64),
    "box 2 x 3": spaces.Box(0, 0.1, (2, 3), np.float32),
    "box scalar": spaces.Box(-1, 1, (), np.float32),
    "box float16": spaces.Box(-0.3, 0.7, (2,), np.float16),
    "box unbounded": spaces.Box(-np.inf, np.inf, (2,), np.float32),
    "box half-bounded": spaces.Box(np.array([0.25, -np.inf]), np.array([np.inf, 0.125]), dtype=np.float32),
    "box float16 unbounded": spaces.Box(-np.inf, np.inf, (1,), np.float16),
    "box huge": spaces.Box(-1e30, 1e30, (2,), np.float32),
}
OBSERVATIONS = {
    "box": OBS,
    "box scalar": spaces.Box(-1, 1, ()),
    "box 2 x 3": spaces.Box(-1, 1, (2, 3)),
    "box int8": spaces.Box(-100, 100, (3,), np.int8),
    "image": spaces.Box(0, 255, (4, 5, 3), np.uint8),
    "discrete": spaces.Discrete(5, start=-1),
    "multidiscrete": spaces.MultiDiscrete([[2, 3], [4, 5]], start=[[1, 0], [0, -2]]),
    "multibinary": spaces.MultiBinary((2, 2)),
    "dict": spaces.Dict(
        {"a": spaces.Box(-1, 1, (2,)), "b": spaces.Tuple([spaces.Discrete(3), spaces.MultiBinary(2)])}
    ),
    "tuple": spaces.Tuple([spaces.Discrete(32), spaces.Discrete(11), spaces.Box(0, 9, (2, 2))]),
}


def spaces_args(**flags):
    return ppo.Args(env_id="Spaces-v0", num_envs=3, num_steps=32, **flags)


@pytest.mark.parametrize("space", ACTIONS.values(), ids=ACTIONS)
def test_actions_are_in_their_space_and_the_ratio_starts_at_one(space, updates):
    """The environment checks every action it is sent; log_std_init 1 sends Gaussians far out of bounds."""
    args = spaces_args(
        env_kwargs={"action_space": space}, total_timesteps=3 * 32 * 4, learning_rate=1e-2, log_std_init=1.0
    )
    agent = ppo.train(args)
    assert agent.obs_stats.count > 0
    for iteration in range(4):
        first, last = updates[16 * iteration][2], updates[16 * iteration + 15][2]
        assert abs(first["approx_kl"]) < 1e-5
        assert abs(first["old_approx_kl"]) < 1e-5
        assert first["clipfrac"] == 0
        assert last["approx_kl"] > 1e-4, "the policy should have moved by the last minibatch"


@pytest.mark.parametrize("space", ACTIONS.values(), ids=ACTIONS)
def test_shapes(space):
    torch.manual_seed(0)
    agent = ppo.Agent(OBS, space, ppo.Args())
    obs = torch.randn(6, 3)
    dist, value = agent(obs)
    action = agent.act(obs).detach()
    assert action.shape == (6, *agent.action_shape)
    assert dist.log_prob(action).shape == dist.entropy().shape == value.shape == (6,)
    sent = agent.to_env(action.numpy())
    assert sent.shape == (6, *space.shape)
    assert sent.dtype == space.dtype
    assert all(space.contains(a if space.shape else a[()]) for a in sent)


@pytest.mark.parametrize("space", OBSERVATIONS.values(), ids=OBSERVATIONS)
def test_observation_spaces(space, updates):
    """What is learnt from is Gymnasium's flattening of observations that the space contains."""
    args = spaces_args(env_kwargs={"observation_space": space}, total_timesteps=3 * 32)
    ppo.train(args)
    flat = spaces.flatten_space(space)
    for obs in updates[0][0].obs.numpy():
        assert obs.shape == flat.shape
        assert np.all((obs >= flat.low) & (obs <= flat.high))
    if isinstance(space, spaces.Discrete):
        assert np.all(updates[0][0].obs.sum(1).numpy() == 1)


def test_images_are_announced_as_flattened():
    args = spaces_args(env_kwargs={"observation_space": OBSERVATIONS["image"]})
    with pytest.warns(UserWarning, match="flattened"):
        envs = ppo.make_envs(args)
    assert envs.single_observation_space.shape == (60,)


def test_independent_choices():
    """Log-probability and entropy against products over all combinations, padding included."""
    torch.manual_seed(0)
    space = spaces.MultiDiscrete([3, 1, 2])
    agent = ppo.Agent(OBS, space, ppo.Args(norm_obs=False))
    torch.nn.init.normal_(agent.actor[-2].weight)
    obs = torch.randn(1, 3)
    logits = agent.actor(obs).view(3, 3)
    p = [logits[0].softmax(0), logits[1, :1].softmax(0), logits[2, :2].softmax(0)]
    dist, _ = agent(obs)
    joint = {(i, 0, k): (p[0][i] * p[1][0] * p[2][k]).item() for i in range(3) for k in range(2)}
    for action, probability in joint.items():
        assert dist.log_prob(torch.tensor([action])).exp().item() == pytest.approx(probability, rel=1e-5)
    entropy = -sum(q * math.log(q) for q in joint.values())
    assert dist.entropy().item() == pytest.approx(entropy, rel=1e-5)
    (gradient,) = torch.autograd.grad(
        dist.log_prob(torch.tensor([[2, 0, 1]])) + dist.entropy(), agent.actor[-2].bias
    )
    missing = [4, 5, 8]
    assert not gradient[missing].any()  # so training never brings a missing option back
    assert gradient[[0, 1, 2, 6, 7]].all()


def test_gaussian():
    agent = ppo.Agent(OBS, spaces.Box(-1, 1, (2,)), ppo.Args(norm_obs=False, log_std_init=-0.5))
    obs = torch.randn(1, 3)
    mean, std = agent.actor(obs)[0].tolist(), math.exp(-0.5)
    dist, _ = agent(obs)
    action = [0.3, -2.0]
    density = math.prod(
        math.exp(-((a - m) ** 2) / (2 * std**2)) / (std * math.sqrt(2 * math.pi))
        for a, m in zip(action, mean, strict=True)
    )
    assert dist.log_prob(torch.tensor([action])).item() == pytest.approx(math.log(density), rel=1e-5)
    assert dist.entropy().item() == pytest.approx(math.log(2 * math.pi * math.e * std**2), rel=1e-5)
    assert agent.scalars() == {"charts/action_std": pytest.approx(std)}


@pytest.mark.parametrize("name", ["discrete", "multidiscrete", "multibinary", "box"])
def test_distributions_are_those_of_torch(name):
    """Values and gradients of log-probability and entropy against torch.distributions."""
    torch.manual_seed(0)
    agent = ppo.Agent(OBS, ACTIONS[name], ppo.Args(log_std_init=-0.3))
    torch.nn.init.normal_(agent.actor[4].weight)
    obs = torch.randn(50, 3)
    action, output = agent.act(obs), agent.actor(agent.normalize(obs))
    if name == "box":
        base = torch.distributions.Normal(output, agent.log_std.exp())
    else:
        base = torch.distributions.Categorical(logits=output)
    expected = torch.distributions.Independent(base, len(agent.action_shape))
    parameters, dist = [*agent.actor.parameters(), *([agent.log_std] if name == "box" else [])], agent(obs)[0]
    pairs = (dist.log_prob(action), expected.log_prob(action)), (dist.entropy(), expected.entropy())
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs)
        weight = torch.linspace(-1, 2, 50)
        gradients = [
            torch.autograd.grad((weight * x).sum(), parameters, retain_graph=True, materialize_grads=True)
            for x in (ours, theirs)
        ]
        torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["discrete", "multidiscrete", "box"])
def test_acting_samples_from_the_distribution_that_is_learnt(name):
    """200,000 draws: frequencies and moments within five standard errors of what `agent(obs)` says."""
    torch.manual_seed(0)
    n = 200_000
    agent = ppo.Agent(OBS, ACTIONS[name], ppo.Args(log_std_init=0.3))
    torch.nn.init.normal_(agent.actor[4].weight, std=0.3)
    obs = torch.randn(1, 3)
    with torch.no_grad():
        action, (dist, _) = agent.act(obs.expand(n, 3)), agent(obs)
    if name == "box":
        mean, std = dist.output[0], dist.log_std.exp()
        assert torch.all((action.mean(0) - mean).abs() < 5 * std / math.sqrt(n))
        assert torch.all((action.std(0) - std).abs() < 5 * std / math.sqrt(2 * n))
        return
    combinations, counts = action.view(n, -1).unique(dim=0, return_counts=True)
    dist, _ = agent(obs.expand(len(combinations), 3))
    p = dist.log_prob(combinations.view(len(combinations), *agent.action_shape)).exp()
    assert len(combinations) == {"discrete": 3, "multidiscrete": 30}[name]
    assert p.sum().item() == pytest.approx(1, abs=1e-5)
    assert torch.all((counts / n - p).abs() < 5 * (p * (1 - p) / n).sqrt())


def test_policy_and_value_function_both_see_scaled_observations():
    torch.manual_seed(0)
    agent, plain = (ppo.Agent(OBS, ACTIONS["box"], ppo.Args(norm_obs=on)) for on in (True, False))
    plain.load_state_dict(agent.state_dict(), strict=False)
    agent.obs_stats.update(
        torch.tensor([[0.0, 10.0, -4.0], [2.0, 30.0, -4.0]])
    )  # means 1, 20, -4, deviations 1, 10, 0
    dist, value = agent(torch.tensor([[2.0, 25.0, -4.0]]))
    expected_dist, expected_value = plain(torch.tensor([[1.0, 0.5, 0.0]]))
    torch.testing.assert_close(dist.output, expected_dist.output)
    torch.testing.assert_close(value, expected_value)


def test_bounded_dimensions_are_mapped_and_all_are_clipped():
    inf = np.inf
    space = spaces.Box(np.array([-2, 0, -inf, 1], np.float32), np.array([2, 10, inf, inf], np.float32))
    agent = ppo.Agent(OBS, space, ppo.Args())
    action = np.array([[0, 0, 0, 0], [1, -1, 5, 5], [0.5, 0.5, -7, 2], [3, -3, 1e9, -3]], np.float32)
    expected = [[0, 5, 0, 1], [2, 0, 5, 5], [1, 7.5, -7, 2], [2, 0, 1e9, 1]]
    np.testing.assert_allclose(agent.to_env(action), expected)


def test_the_unclipped_sample_is_what_is_learnt_from(updates):
    space = spaces.Box(0, 10, (1,), np.float32)
    ppo.train(spaces_args(env_kwargs={"action_space": space}, total_timesteps=96, update_epochs=1))
    action = torch.cat([minibatch.action for minibatch, _, _ in updates])
    assert action.min() < -1.5  # a standard normal sample, neither mapped to [0, 10] nor clipped to [-1, 1]
    assert action.max() > 1.5
    assert abs(action.mean()) < 0.5


def test_initialisation():
    """[37] #2: orthogonal with gain sqrt 2 within, 0.01 for the policy's output, 1 for the value's."""
    agent = ppo.Agent(spaces.Box(-1, 1, (64,)), spaces.Discrete(5), ppo.Args(hidden_sizes=(64, 64)))
    for network, gain in [(agent.actor, 0.01), (agent.critic, 1.0)]:
        linears = [layer for layer in network if isinstance(layer, torch.nn.Linear)]
        for layer, expected in zip(linears, [math.sqrt(2), math.sqrt(2), gain], strict=True):
            w, eye = layer.weight.detach(), torch.eye(len(layer.weight))
            torch.testing.assert_close(w @ w.T, expected**2 * eye, atol=1e-5, rtol=0)
            assert torch.all(layer.bias == 0)


@pytest.mark.parametrize("n", [1_000, 60_000])  # computed in two ways
def test_tanh_is_that_of_torch(n):
    """Value and gradient against torch.tanh, within the rounding of float32, far out too."""
    x = torch.linspace(-100, 100, n).asinh_().mul_(3).requires_grad_()
    ours, theirs = ppo.Tanh()(x), torch.tanh(x)
    torch.testing.assert_close(ours, theirs, atol=2.5e-7, rtol=0)
    assert torch.equal(ours, theirs) == (n == 1_000), "each size is computed in its own way"
    weight = torch.linspace(-1, 2, n)
    gradients = (torch.autograd.grad(y, x, weight)[0] for y in (ours, theirs))
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=0)
    assert torch.equal(x, torch.linspace(-100, 100, n).asinh_().mul_(3)), "the input is left alone"


def test_network_flags():
    agent = ppo.Agent(OBS, spaces.Discrete(2), ppo.Args(hidden_sizes=(16, 8, 4), activation="relu"))
    for network in (agent.actor, agent.critic):
        assert [type(layer).__name__ for layer in network] == ["Linear", "ReLU"] * 3 + ["Linear"]
    assert [layer.out_features for layer in agent.critic[::2]] == [16, 8, 4, 1]
    linear = ppo.Agent(OBS, spaces.Discrete(2), ppo.Args(hidden_sizes=()))
    assert [type(layer).__name__ for layer in linear.actor] == ["Linear"]


@pytest.mark.parametrize("space", [spaces.Box(0, 9, (2,), np.int32), spaces.Text(3), spaces.Tuple([])])
def test_unsupported_action_spaces_are_named(space):
    with pytest.raises(ppo.InputError, match=type(space).__name__):
        ppo.Agent(OBS, space, ppo.Args())


@pytest.mark.parametrize("space", [spaces.Text(3), spaces.Dict({"a": spaces.Sequence(spaces.Discrete(2))})])
def test_unsupported_observation_spaces_are_named(space):
    with pytest.raises(ppo.InputError, match=type(space).__name__):
        ppo.make_envs(spaces_args(env_kwargs={"observation_space": space}))


def test_make_envs_reports_raw_statistics():
    envs = ppo.make_envs(ppo.Args(env_id="Counting-v0", num_envs=2))
    assert isinstance(envs, gym.vector.VectorEnv)
    envs.reset(seed=0)
    for _ in range(3):
        *_, info = envs.step(np.zeros(2, np.int64))
    assert info["_raw_episode"].tolist() == [True, True]
    assert info["raw_episode"]["l"].tolist() == [3, 3]
