"""Action and observation spaces, distributions and networks; what the environment is sent."""

import math

import numpy as np
import pieces
import pytest
import torch
from gymnasium import spaces
from torch import distributions, nn

import ppo

inf = np.inf
OBS = spaces.Box(-5, 20, (3,), np.float64)
ACTIONS = {
    "discrete": spaces.Discrete(3),
    "multidiscrete": spaces.MultiDiscrete([3, 2, 5]),
    "multidiscrete 2 x 2": spaces.MultiDiscrete([[3, 2], [1, 4]], start=[[0, 1], [-3, 2]]),
    "multibinary 2 x 3": spaces.MultiBinary((2, 3)),
    "box": spaces.Box(-2, 2, (2,), np.float32),
    "box asymmetric": spaces.Box(np.array([0.0, -1.0]), np.array([1000.0, 0.5]), dtype=np.float64),
    "box 2 x 3": spaces.Box(0, 0.1, (2, 3), np.float32),
    "box scalar": spaces.Box(-1, 1, (), np.float32),
    "box unbounded": spaces.Box(-inf, inf, (2,), np.float32),
    "box half-bounded": spaces.Box(
        np.array([0.25, -inf]), np.array([inf, 0.125]), dtype=np.float32
    ),
    "box huge": spaces.Box(-1e30, 1e30, (2,), np.float32),
}
OBSERVATIONS = {
    "box": OBS,
    "box scalar": spaces.Box(-1, 1, ()),
    "box 2 x 3": spaces.Box(-1, 1, (2, 3)),
    "box int8": spaces.Box(-100, 100, (3,), np.int8),
    "small image": spaces.Box(0, 255, (4, 5, 3), np.uint8),
    "discrete": spaces.Discrete(5, start=-1),
    "multidiscrete": spaces.MultiDiscrete([[2, 3], [4, 5]], start=[[1, 0], [0, -2]]),
    "multibinary": spaces.MultiBinary((2, 2)),
    "nested": spaces.Dict(
        a=spaces.Box(-1, 1, (2,)), b=spaces.Tuple([spaces.Discrete(3), spaces.Box(0, 9, (2, 2))])
    ),
}


def spaces_args(**flags):
    return ppo.Args(env_id="Spaces-v0", num_envs=3, num_steps=32, **flags)


def make_agent(space, **flags):
    """An agent whose policy depends on the observation more than at the start of a training."""
    torch.manual_seed(0)
    agent = ppo.Agent(OBS, space, ppo.Args(**flags))
    nn.init.normal_(agent.actor[-1].weight, std=0.3)
    return agent


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("space", ACTIONS.values(), ids=ACTIONS)
def test_a_run_in_every_action_space(space):
    """The environment checks every action it is sent; log_std_init 1 goes far out of bounds.

    In the only minibatch of an iteration, the ratio is 1, though weights and scaling have changed
    since the iteration before.
    """
    flags = {"total_timesteps": 3 * 32 * 4, "learning_rate": 1e-2, "log_std_init": 1.0}
    flags |= {"num_minibatches": 1, "update_epochs": 1, "eval_episodes": 1, "run_name": "a"}
    agent = ppo.train(spaces_args(env_kwargs={"action_space": space}, **flags))
    assert agent.obs_stats.count > 0
    if isinstance(space, spaces.Box):
        std = agent.head.log_std.exp().mean().item()
        assert pieces.values("runs/a", "charts/action_std")[-1] == pytest.approx(std)
    for name in ("approx_kl", "old_approx_kl", "clipfrac"):
        assert pieces.values("runs/a", f"losses/{name}") == pytest.approx([0] * 4, abs=1e-5)
    obs = torch.randn(6, 3)
    dist, value = agent(obs)
    action = agent.act(obs, agent.head.noise(6))
    assert action.shape == dist.mode().shape
    assert dist.log_prob(action).shape == dist.entropy().shape == value.shape == (6,)
    assert not action.requires_grad
    sent = agent.head.to_env(action.numpy())
    assert (sent.shape, sent.dtype) == ((6, *space.shape), space.dtype)


@pytest.mark.filterwarnings("ignore:.*flattened")
@pytest.mark.parametrize("space", OBSERVATIONS.values(), ids=OBSERVATIONS)
def test_observation_spaces(space):
    """What is learnt from is Gymnasium's flattening of observations, which as_batch makes, too."""
    args = spaces_args(env_kwargs={"observation_space": space}, total_timesteps=3 * 32)
    agent = ppo.train(args, agent_class=pieces.Recording)
    flat = spaces.flatten_space(space)
    obs = torch.cat(agent.learnt).numpy()
    assert obs.shape[1:] == flat.shape
    assert np.all((obs >= flat.low) & (obs <= flat.high))
    assert len(np.unique(obs, axis=0)) > 1
    with ppo.open_envs(args) as envs:
        obs, _ = envs.reset(seed=3)
    space.seed(3)
    expected = space.sample()
    np.testing.assert_allclose(obs[0], spaces.flatten(space, expected), rtol=1e-6)
    batch = ppo.as_batch(expected, space)
    assert torch.equal(batch, torch.from_numpy(obs[:1]).float())


pixels = spaces.Box(0, 255, (84, 84, 3), np.uint8)
SEQUENCE = spaces.Sequence(spaces.Discrete(2))


@pytest.mark.parametrize(
    ("name", "space", "named"),
    [
        ("observation_space", SEQUENCE, "Sequence"),
        ("observation_space", spaces.Dict({"a": SEQUENCE}), "Sequence"),
        ("observation_space", spaces.Graph(spaces.Discrete(2), None), "Graph"),
        ("observation_space", spaces.Dict(eye=pixels, x=OBS), "eye is an image within a Dict"),
        ("action_space", spaces.Text(3), "Text"),
        ("action_space", spaces.Tuple([spaces.Discrete(2)]), "Tuple"),
    ],
)
def test_unsupported_spaces_are_named(name, space, named):
    with pytest.raises(ppo.InputError, match=named):
        ppo.make_envs(spaces_args(env_kwargs={name: space}), 2)


# The distributions by themselves, each beside the same one of torch.
def categorical(logits):
    dist = ppo.Categorical(logits.log_softmax(-1))
    theirs = distributions.Categorical(logits=logits)
    return dist, theirs if logits.dim() == 2 else distributions.Independent(theirs, 1)


def gaussian(mean):
    log_std = torch.tensor([-1.5, 0.0, 0.7, 0.2]) + 0.1 * mean.mean()
    normal = distributions.Normal(mean, log_std.exp())
    return ppo.Gaussian(mean, log_std), distributions.Independent(normal, 1)


PAIRS = {
    "categorical": (categorical, (50, 4), spaces.Discrete(4)),
    "several": (categorical, (50, 3, 4), spaces.MultiDiscrete([4, 4, 4])),
    "gaussian": (gaussian, (50, 4), spaces.Box(-1, 1, (4,))),
}


@pytest.fixture(params=PAIRS)
def pair(request):
    """Parameters (50, ...), a function that makes our distribution and torch's, and a space."""
    make, shape, space = PAIRS[request.param]
    torch.manual_seed(0)
    return 2 * torch.randn(shape), make, space


def test_log_prob_and_entropy_and_mode_are_those_of_torch(pair):
    """No sample has a larger probability than the mode."""
    parameters, make, _ = pair
    ours, theirs = make(parameters)
    action = theirs.sample()
    assert ours.entropy().shape == (50,)
    torch.testing.assert_close(ours.log_prob(action), theirs.log_prob(action))
    torch.testing.assert_close(ours.entropy(), theirs.entropy())
    assert torch.equal(ours.mode(), theirs.mode)
    for _ in range(20):
        assert torch.all(ours.log_prob(theirs.sample()) <= ours.log_prob(ours.mode()))


def test_samples_are_distributed_as_those_of_torch(pair):
    """200,000 draws in one state: means and frequencies within five standard errors."""
    parameters, make, space = pair
    n = 200_000
    first = parameters[:1]
    _, theirs = make(first)
    ours, _ = make(first.expand(n, *first.shape[1:]))
    head = make_agent(space).head
    torch.manual_seed(0)
    noise = head.noise(2, n // 2).flatten(0, 1)
    samples = ours.sample(noise)
    assert torch.equal(ours.sample(noise), samples), "they follow from the noise alone"
    if isinstance(ours, ppo.Gaussian):
        z = (samples - theirs.mean) / theirs.stddev
        assert torch.all(z.mean(0).abs() < 5 / math.sqrt(n))
        covariance = z.T @ z / n - torch.eye(4)
        assert torch.all(covariance.abs() < 5 * math.sqrt(2 / n)), "dimensions are independent"
        assert (z.abs() > 1.96).float().mean().item() == pytest.approx(0.05, abs=0.002)
        return
    actions, counts = samples.view(n, -1).unique(dim=0, return_counts=True)
    p = torch.cat([theirs.log_prob(x.view(samples[:1].shape)).exp() for x in actions])
    error = (p * (1 - p) / n).sqrt()
    assert p.sum().item() == pytest.approx(1, abs=0.001), "all likely actions are drawn"
    assert torch.all((counts / n - p).abs() < 5 * error + 1 / n)


@pytest.mark.parametrize(
    ("space", "options"),
    [
        (spaces.MultiDiscrete([1, 4]), [1, 4]),
        (spaces.MultiDiscrete([[3, 2], [1, 4]]), [3, 2, 1, 4]),
    ],
)
def test_options_that_a_choice_lacks_are_never_taken(space, options):
    """Whatever the output layer favours; its other options share all the probability."""
    agent = make_agent(space)
    with torch.no_grad():
        bias = agent.actor[-1].bias.view(len(options), -1)
        for i, n in enumerate(options):
            bias[i, n:] = 1e4
    obs = torch.randn(2000, 3)
    dist, _ = agent(obs)
    p = dist.logp.exp()
    for i, n in enumerate(options):
        assert not p[:, i, n:].any()
        torch.testing.assert_close(p[:, i, :n].sum(1), torch.ones(2000))
    for noise in (None, agent.head.noise(2000)):
        action = agent.act(obs, noise)
        assert torch.all(action < torch.tensor(options))
        assert all(space.contains(x) for x in agent.head.to_env(action.numpy()))
        assert dist.log_prob(action).isfinite().all()
    entropy = dist.entropy()
    assert torch.all((entropy >= 0) & (entropy <= sum(map(math.log, options)) + 1e-4))


@pytest.mark.parametrize("name", ["discrete", "multidiscrete", "box"])
def test_acting_and_learning_have_the_same_distribution(name):
    """What `act` samples from, or takes the mode of, is what `agent(obs)` returns."""
    agent = make_agent(ACTIONS[name], log_std_init=0.3)
    agent.obs_stats.update(torch.randn(100, 3) * torch.tensor([1.0, 5.0, 0.1]) + 3)
    obs = torch.randn(500, 3)
    noise = agent.head.noise(500)
    dist, _ = agent(obs)
    assert torch.equal(agent.act(obs, noise), dist.sample(noise))
    assert torch.equal(agent.act(obs), dist.mode())


def test_the_deviation_is_kept_within_bounds():
    """log sigma from -20 to 2, in which it has a gradient, and is the same in all states."""
    agent = make_agent(ACTIONS["box"], log_std_init=-0.5)
    for log_std, expected, has_gradient in [(-0.5, -0.5, 1), (3.0, 2.0, 0), (-30.0, -20.0, 0)]:
        nn.init.constant_(agent.head.log_std, log_std)
        dist, _ = agent(torch.randn(5, 3))
        entropy = 2 * (expected + 0.5 * math.log(2 * math.pi * math.e))
        assert dist.entropy().tolist() == pytest.approx([entropy] * 5)
        (gradient,) = torch.autograd.grad(dist.entropy().sum(), agent.head.log_std)
        assert gradient.tolist() == [5 * has_gradient] * 2
    assert make_agent(ACTIONS["box"], log_std_init=-0.5).head.log_std.tolist() == [-0.5] * 2


MAPPED = {
    "bounded and clipped": (
        spaces.Box(np.float32([-2, 0, -inf, -1]), np.float32([2, 10, inf, inf])),
        [[0, 0, 0, 0], [1, -1, 5, 5], [0.5, 0.5, -7, 2], [3, -3, 1e9, -3]],
        [[0, 5, 0, 0], [2, 0, 5, 5], [1, 7.5, -7, 2], [2, 0, 1e9, -1]],
    ),
    "moved to the bound where 0 is out of bounds": (
        spaces.Box(np.float32([5, -inf, -inf, 5]), np.float32([inf, -7, 7, 2e6])),
        [[0] * 4, [3] * 4, [-3] * 4],
        [[5, -7, 0, 5], [8, -7, 3, 8], [5, -10, -3, 5]],
    ),
    "bounds beyond a million are none": (
        spaces.Box(np.float32([-1e6, -1.1e6]), np.float32([1e6, 1e6])),
        [[0.5, 0.5]],
        [[5e5, 0.5]],
    ),
    "float64": (ACTIONS["box asymmetric"], [[-1, 0.5], [3, -3]], [[0, 0.125], [1000, -1]]),
    "options from 5": (spaces.Discrete(3, start=5), [0, 2], [5, 7]),
    "options 2 x 2": (ACTIONS["multidiscrete 2 x 2"], [[0, 1, 0, 3]], [[[0, 2], [-3, 5]]]),
    "binary": (spaces.MultiBinary((2, 2)), [[0, 1, 1, 0]], [[[0, 1], [1, 0]]]),
}


@pytest.mark.parametrize("case", MAPPED)
def test_what_the_environment_is_sent(case):
    space, action, expected = MAPPED[case]
    dtype = np.float32 if isinstance(space, spaces.Box) else np.int64
    sent = make_agent(space).head.to_env(np.array(action, dtype))
    np.testing.assert_allclose(sent, expected)
    assert sent.dtype == space.dtype


def test_the_unclipped_sample_is_what_is_learnt_from():
    """A standard normal one, neither mapped to [0, 10] nor clipped to [-1, 1]."""
    space = spaces.Box(0, 10, (1,), np.float32)
    with pieces.learner(spaces_args(env_kwargs={"action_space": space})) as learner:
        rollout = learner.collect()
    action = learner.estimate(rollout).action
    assert torch.equal(action, rollout.action[rollout.valid])
    assert action.min() < -1.5
    assert action.max() > 1.5
    assert abs(action.mean()) < 0.5


@pytest.mark.upstream
def test_networks():
    """[Details] #2: gains sqrt 2 within, 0.01 for the policy's output, 1 for the value's.

    [Details] #13: policy and value function share no parameters.
    """
    args = ppo.Args(hidden_sizes=(64, 32, 8), activation="relu")
    agent = ppo.Agent(spaces.Box(-1, 1, (64,)), spaces.Discrete(5), args)
    for network, outputs, gain in [(agent.actor, 5, 0.01), (agent.critic, 1, 1.0)]:
        assert [type(layer) for layer in network] == [nn.Linear, nn.ReLU] * 3 + [nn.Linear]
        sizes = [(64, 2**0.5), (32, 2**0.5), (8, 2**0.5), (outputs, gain)]
        for layer, (units, scale) in zip(list(network)[::2], sizes, strict=True):
            w = layer.weight.detach()
            eye = torch.eye(units)  # the rows are orthogonal
            torch.testing.assert_close(w @ w.T, scale**2 * eye, atol=1e-5, rtol=0)
            assert torch.all(layer.bias == 0)
    assert not set(agent.actor.parameters()) & set(agent.critic.parameters())
    agent = ppo.Agent(OBS, spaces.Discrete(2), ppo.Args())
    assert [type(layer) for layer in agent.critic] == [nn.Linear, nn.Tanh] * 2 + [nn.Linear]
