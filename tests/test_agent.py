"""Action and observation spaces, distributions and networks; what the environment is sent."""

import math

import gymnasium as gym
import numpy as np
import pieces
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from torch import distributions, nn

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
    "box half-bounded": spaces.Box(
        np.array([0.25, -np.inf]), np.array([np.inf, 0.125]), dtype=np.float32
    ),
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
        {
            "a": spaces.Box(-1, 1, (2,)),
            "b": spaces.Tuple([spaces.Discrete(3), spaces.MultiBinary(2)]),
        }
    ),
    "tuple": spaces.Tuple([spaces.Discrete(32), spaces.Discrete(11), spaces.Box(0, 9, (2, 2))]),
}


def spaces_args(**flags):
    return ppo.Args(env_id="Spaces-v0", num_envs=3, num_steps=32, **flags)


def make_agent(space, seed=0, **flags):
    """An agent whose policy depends on the observation more than at the start of a training."""
    torch.manual_seed(seed)
    agent = ppo.Agent(OBS, space, ppo.Args(**flags))
    nn.init.normal_(agent.actor[-1].weight, std=0.3)
    return agent


@pytest.mark.parametrize("space", ACTIONS.values(), ids=ACTIONS)
def test_a_run_in_every_action_space(space):
    """The environment checks every action it is sent; log_std_init 1 goes far out of bounds.

    In the only minibatch of an iteration, the ratio is 1, though weights and scaling have changed
    since the iteration before.
    """
    args = spaces_args(
        env_kwargs={"action_space": space},
        total_timesteps=3 * 32 * 4,
        learning_rate=1e-2,
        log_std_init=1.0,
        num_minibatches=1,
        update_epochs=1,
        run_name="a",
    )
    agent = ppo.train(args)
    assert agent.obs_stats.count > 0
    tags = pieces.scalars("runs/a")
    for name in ("approx_kl", "old_approx_kl", "clipfrac"):
        logged = [value for _, value in tags[f"losses/{name}"]]
        assert logged == pytest.approx([0] * 4, abs=1e-5)


@pytest.mark.parametrize("space", ACTIONS.values(), ids=ACTIONS)
def test_the_ratio_is_one_in_the_first_minibatch(space):
    """And no more in the last of an update."""
    args = spaces_args(
        env_kwargs={"action_space": space}, learning_rate=1e-2, norm_obs=False, log_std_init=1.0
    )
    with pieces.learner(args) as learner:
        for _ in range(2):
            rollout = learner.collect()
            infos = learner.update(rollout, learner.estimate(rollout))
            assert len(infos) == 16
            assert abs(infos[0]["approx_kl"]) < 1e-5
            assert abs(infos[0]["old_approx_kl"]) < 1e-5
            assert infos[0]["clipfrac"] == 0
            assert infos[-1]["approx_kl"] > 1e-4


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("space", ACTIONS.values(), ids=ACTIONS)
def test_shapes(space):
    agent = make_agent(space)
    obs = torch.randn(6, 3)
    dist, value = agent(obs)
    action = agent.act(obs)
    assert action.shape == dist.mode().shape == (6, *agent.action_shape)
    assert dist.log_prob(action).shape == dist.entropy().shape == value.shape == (6,)
    assert not action.requires_grad
    sent = agent.to_env(action.numpy())
    assert sent.shape == (6, *space.shape)
    assert sent.dtype == space.dtype
    assert all(space.contains(a if space.shape else a[()]) for a in sent)


@pytest.mark.filterwarnings("ignore:.*flattened")
@pytest.mark.parametrize("space", OBSERVATIONS.values(), ids=OBSERVATIONS)
def test_observation_spaces(space):
    """What is learnt from is Gymnasium's flattening of observations that the space contains."""
    args = spaces_args(env_kwargs={"observation_space": space}, total_timesteps=3 * 32)
    agent = ppo.train(args, agent_class=pieces.Recording)
    flat = spaces.flatten_space(space)
    obs = torch.cat(agent.learnt).numpy()
    assert obs.shape[1:] == flat.shape
    assert np.all((obs >= flat.low) & (obs <= flat.high))
    assert len(np.unique(obs, axis=0)) > 1
    if isinstance(space, spaces.Discrete):
        assert np.all(obs.sum(1) == 1)


def test_observations_are_flattened_in_the_order_of_gymnasium():
    space = OBSERVATIONS["dict"]
    envs = ppo.make_envs(spaces_args(env_kwargs={"observation_space": space}))
    assert envs.single_observation_space == spaces.flatten_space(space)
    obs, _ = envs.reset(seed=3)
    assert obs.shape == (3, 7)
    space.seed(3)
    np.testing.assert_allclose(obs[0], spaces.flatten(space, space.sample()), rtol=1e-6)


@pytest.mark.parametrize(
    "space", [spaces.Text(3), spaces.Dict({"a": spaces.Sequence(spaces.Discrete(2))})]
)
def test_unsupported_observation_spaces_are_named(space):
    with pytest.raises(ppo.InputError, match=type(space).__name__):
        ppo.make_envs(spaces_args(env_kwargs={"observation_space": space}))


@pytest.mark.parametrize(
    "space", [spaces.Box(0, 9, (2,), np.int32), spaces.Text(3), spaces.Tuple([])]
)
def test_unsupported_action_spaces_are_named(space):
    with pytest.raises(ppo.InputError, match=type(space).__name__):
        ppo.Agent(OBS, space, ppo.Args())


# The distributions by themselves, each beside the same one of torch.
def categorical(logits):
    dist = ppo.Categorical(logits.log_softmax(-1))
    return dist, distributions.Categorical(logits=logits)


def several(logits):
    dist = ppo.Categorical(logits.log_softmax(-1))
    return dist, distributions.Independent(distributions.Categorical(logits=logits), 1)


def gaussian(mean):
    log_std = torch.tensor([-1.5, 0.0, 0.7, 0.2]) + 0.1 * mean.mean()
    normal = distributions.Normal(mean, log_std.exp())
    return ppo.Gaussian(mean, log_std), distributions.Independent(normal, 1)


def gaussian_by_state(mean):
    """As a fork may have it, whose deviation is an output of its network."""
    log_std = 0.3 * mean.flip(-1) - 0.5
    normal = distributions.Normal(mean, log_std.exp())
    return ppo.Gaussian(mean, log_std), distributions.Independent(normal, 1)


PAIRS = {
    "categorical": (categorical, (50, 4)),
    "several": (several, (50, 3, 4)),
    "gaussian": (gaussian, (50, 4)),
    "gaussian by state": (gaussian_by_state, (50, 4)),
}


@pytest.fixture(params=PAIRS)
def pair(request):
    """Parameters (50, ...), and a function that makes our distribution and torch's of them."""
    make, shape = PAIRS[request.param]
    torch.manual_seed(0)
    return (2 * torch.randn(shape)).requires_grad_(), make


def test_log_prob_and_entropy_are_those_of_torch(pair):
    """Values and gradients."""
    parameters, make = pair
    ours, theirs = make(parameters)
    action = theirs.sample()
    weight = torch.linspace(-1, 2, 50)
    for x, expected in [
        (ours.log_prob(action), theirs.log_prob(action)),
        (ours.entropy(), theirs.entropy()),
    ]:
        assert x.shape == (50,)
        torch.testing.assert_close(x, expected)
        gradients = [
            torch.autograd.grad((weight * y).sum(), parameters, retain_graph=True)[0]
            for y in (x, expected)
        ]
        torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


def test_mode_is_that_of_torch(pair):
    """No sample has a larger probability."""
    parameters, make = pair
    ours, theirs = make(parameters)
    assert torch.equal(ours.mode(), theirs.mode)
    for _ in range(20):
        assert torch.all(ours.log_prob(theirs.sample()) <= ours.log_prob(ours.mode()))


def test_samples_are_distributed_as_those_of_torch(pair):
    """200,000 draws in one state: means and frequencies within five standard errors."""
    parameters, make = pair
    n = 200_000
    first = parameters[:1].detach()
    _, theirs = make(first)
    ours, _ = make(first.expand(n, *first.shape[1:]))
    samples = ours.sample(torch.Generator().manual_seed(0))
    if isinstance(ours, ppo.Gaussian):
        z = (samples - theirs.mean) / theirs.stddev
        assert torch.all(z.mean(0).abs() < 5 / math.sqrt(n))
        assert torch.all((z.std(0) - 1).abs() < 5 / math.sqrt(2 * n))
        correlation = z.T @ z / n - torch.eye(4)
        assert torch.all(correlation.abs() < 5 * math.sqrt(2 / n)), "dimensions are independent"
        assert (z.abs() > 1.96).float().mean().item() == pytest.approx(0.05, abs=0.002)
        return
    actions, counts = samples.view(n, -1).unique(dim=0, return_counts=True)
    expected = [theirs.log_prob(x.view(samples[:1].shape)).exp() for x in actions]
    p = torch.cat(expected)
    error = (p * (1 - p) / n).sqrt()
    assert p.sum().item() == pytest.approx(1, abs=0.001), "all likely actions are drawn"
    assert torch.all((counts / n - p).abs() < 5 * error + 1 / n)


def test_samples_follow_from_the_generator_alone(pair):
    parameters, make = pair
    ours, _ = make(parameters)
    generator = torch.Generator().manual_seed(5)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = ours.sample(generator)
    second = ours.sample(generator)
    assert torch.equal(torch.random.get_rng_state(), state), "the global one is left alone"
    assert not torch.equal(first, second)
    torch.manual_seed(2)
    generator.manual_seed(5)
    assert torch.equal(ours.sample(generator), first)
    assert torch.equal(ours.sample(generator), second)
    torch.manual_seed(3)
    drawn = ours.sample()
    torch.manual_seed(3)
    assert torch.equal(ours.sample(), drawn), "without a generator it is the global one"
    assert not torch.equal(ours.sample(), drawn)


def test_independent_choices():
    """Log-probability and entropy against products over all combinations, by hand."""
    agent = make_agent(spaces.MultiDiscrete([3, 1, 2]), norm_obs=False)
    obs = torch.randn(1, 3)
    output = agent.actor(agent.features(obs)).view(3, 3)
    p = [output[0].softmax(0), output[1, :1].softmax(0), output[2, :2].softmax(0)]
    dist, _ = agent(obs)
    joint = {}
    for i in range(3):
        for k in range(2):
            joint[i, 0, k] = (p[0][i] * p[1][0] * p[2][k]).item()
    for action, probability in joint.items():
        log_prob = dist.log_prob(torch.tensor([action])).item()
        assert log_prob == pytest.approx(math.log(probability), rel=1e-5)
    entropy = -sum(q * math.log(q) for q in joint.values())
    assert dist.entropy().item() == pytest.approx(entropy, rel=1e-5)
    objective = dist.log_prob(torch.tensor([[2, 0, 1]])) + dist.entropy()
    (gradient,) = torch.autograd.grad(objective, agent.actor[-1].bias)
    missing = [4, 5, 8]
    assert not gradient[missing].any()
    assert gradient[[0, 1, 2, 6, 7]].all()


def test_gaussian_density_by_hand():
    agent = make_agent(spaces.Box(-1, 1, (2,)), norm_obs=False, log_std_init=-0.5)
    obs = torch.randn(1, 3)
    mean = agent.actor(agent.features(obs))[0].tolist()
    std = math.exp(-0.5)
    dist, _ = agent(obs)
    action = [0.3, -2.0]
    density = 1.0
    for a, m in zip(action, mean, strict=True):
        density *= math.exp(-((a - m) ** 2) / (2 * std**2)) / (std * math.sqrt(2 * math.pi))
    log_prob = dist.log_prob(torch.tensor([action])).item()
    assert log_prob == pytest.approx(math.log(density), rel=1e-5)
    entropy = math.log(2 * math.pi * math.e * std**2)
    assert dist.entropy().item() == pytest.approx(entropy, rel=1e-5)
    assert agent.scalars() == {"action_std": pytest.approx(std)}


# Spaces whose choices have different numbers of options, and these numbers.
UNEVEN = {
    "multidiscrete": (spaces.MultiDiscrete([3, 2, 5]), [3, 2, 5]),
    "of one option": (spaces.MultiDiscrete([1, 4]), [1, 4]),
    "2 x 2": (spaces.MultiDiscrete([[3, 2], [1, 4]]), [3, 2, 1, 4]),
}


def keep(agent):
    pass


def initialise_again(agent):
    """As a fork does that wants another initialisation, and worse."""
    nn.init.normal_(agent.actor[-1].weight)
    nn.init.constant_(agent.actor[-1].bias, 5.0)


def favour_what_is_missing(agent):
    with torch.no_grad():
        agent.actor[-1].bias[agent.absent.flatten()] = 1e4


def replace_the_head(agent):
    head = agent.actor[-1]
    agent.actor[-1] = nn.Linear(head.in_features, head.out_features)


def train(agent):
    """Steps that would raise the probability of what is missing, if anything could."""
    optimizer = torch.optim.Adam(agent.parameters(), lr=0.1)
    for _ in range(20):
        dist, _ = agent(torch.randn(64, 3))
        absent = agent.absent.expand_as(dist.logp)
        loss = -dist.logp[absent].clamp(-1e8).mean() - dist.entropy().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("space", UNEVEN)
@pytest.mark.parametrize(
    "change", [keep, initialise_again, favour_what_is_missing, replace_the_head, train]
)
def test_options_that_a_choice_lacks_are_never_taken(space, change):
    """Whatever becomes of the output layer, its other options share all the probability."""
    space, options = UNEVEN[space]
    agent = make_agent(space)
    change(agent)
    obs = torch.randn(2000, 3)
    dist, _ = agent(obs)
    p = dist.logp.exp()
    for i, n in enumerate(options):
        assert not p[:, i, n:].any()
        torch.testing.assert_close(p[:, i, :n].sum(1), torch.ones(2000))
    for action in (agent.act(obs), agent.act(obs, greedy=True)):
        assert torch.all(action < torch.tensor(options))
        assert all(space.contains(x) for x in agent.to_env(action.numpy()))
    assert dist.log_prob(agent.act(obs)).isfinite().all()
    entropy = dist.entropy()
    assert torch.all((entropy >= 0) & (entropy <= sum(map(math.log, options)) + 1e-4))


def test_training_does_not_bring_missing_options_back():
    """All choices of many iterations are in the space, which the environment insists on."""
    args = spaces_args(
        env_kwargs={"action_space": spaces.MultiDiscrete([1, 4, 2])},
        total_timesteps=3 * 32 * 10,
        learning_rate=0.1,
        ent_coef=1.0,
    )
    agent = ppo.train(args)
    dist, _ = agent(torch.randn(100, 3))
    assert not dist.logp.exp()[agent.absent.expand_as(dist.logp)].any()


@pytest.mark.parametrize("name", ["discrete", "multidiscrete", "multibinary", "box"])
def test_acting_and_learning_have_the_same_distribution(name):
    """What `act` samples from, or takes the mode of, is what `agent(obs)` returns."""
    agent = make_agent(ACTIONS[name], log_std_init=0.3)
    agent.obs_stats.update(torch.randn(100, 3) * torch.tensor([1.0, 5.0, 0.1]) + 3)
    obs = torch.randn(500, 3)
    dist, _ = agent(obs)
    generator = torch.Generator().manual_seed(0)
    action = agent.act(obs, generator=generator)
    assert torch.equal(action, dist.sample(generator.manual_seed(0)))
    assert torch.equal(agent.act(obs, greedy=True), dist.mode())
    torch.manual_seed(0)
    action = agent.act(obs)
    torch.manual_seed(0)
    assert torch.equal(action, dist.sample())


def test_what_a_fork_does_in_features_is_done_in_acting_too():
    """As a shared torso, of which this is a small one."""

    class Agent(ppo.Agent):
        def __init__(self, *args):
            super().__init__(*args)
            self.gate = nn.Parameter(torch.tensor(1.0))

        def features(self, obs):
            return self.gate * super().features(obs)

    torch.manual_seed(0)
    agent = Agent(OBS, spaces.Discrete(5), ppo.Args())
    nn.init.normal_(agent.actor[-1].weight)
    obs = torch.randn(200, 3)
    before = agent.act(obs, greedy=True)
    nn.init.constant_(agent.gate, -1.0)
    dist, _ = agent(obs)
    assert torch.equal(agent.act(obs, greedy=True), dist.mode())
    assert not torch.equal(dist.mode(), before)


def test_policy_and_value_function_both_see_scaled_observations():
    torch.manual_seed(0)
    agent = ppo.Agent(OBS, ACTIONS["box"], ppo.Args())
    plain = ppo.Agent(OBS, ACTIONS["box"], ppo.Args(norm_obs=False))
    plain.load_state_dict(agent.state_dict(), strict=False)
    # Means 1, 20, -4; deviations 1, 10, and 0, which is taken for a little more.
    agent.obs_stats.update(torch.tensor([[0.0, 10.0, -4.0], [2.0, 30.0, -4.0]]))
    dist, value = agent(torch.tensor([[2.0, 25.0, -4.0]]))
    expected_dist, expected_value = plain(torch.tensor([[1.0, 0.5, 0.0]]))
    torch.testing.assert_close(dist.mode(), expected_dist.mode())
    torch.testing.assert_close(value, expected_value)


def test_bounded_dimensions_are_mapped_and_all_are_clipped():
    inf = np.inf
    low = np.array([-2, 0, -inf, -1], np.float32)
    high = np.array([2, 10, inf, inf], np.float32)
    agent = ppo.Agent(OBS, spaces.Box(low, high), ppo.Args())
    action = [[0, 0, 0, 0], [1, -1, 5, 5], [0.5, 0.5, -7, 2], [3, -3, 1e9, -3]]
    expected = [[0, 5, 0, 0], [2, 0, 5, 5], [1, 7.5, -7, 2], [2, 0, 1e9, -1]]
    np.testing.assert_allclose(agent.to_env(np.array(action, np.float32)), expected)


def test_dimensions_with_one_bound_start_within_it():
    """Where 0 is out of bounds: else all samples would be clipped to the bound, good or bad."""
    inf = np.inf
    low = np.array([5, -inf, -inf, 5], np.float32)
    high = np.array([inf, -7, 7, 2e6], np.float32)
    agent = ppo.Agent(OBS, spaces.Box(low, high), ppo.Args())
    sent = agent.to_env(np.array([[0] * 4, [3] * 4, [-3] * 4], np.float32))
    np.testing.assert_allclose(sent, [[5, -7, 0, 5], [8, -7, 3, 8], [5, -10, -3, 5]])


def test_the_mapping_goes_by_the_space():
    """Not by the distribution, of which a fork may have another."""
    agent = ppo.Agent(OBS, ACTIONS["box asymmetric"], ppo.Args())
    agent.log_std = None
    sent = agent.to_env(np.array([[-1, 0.5], [3, -3]], np.float32))
    np.testing.assert_allclose(sent, [[0, 0.125], [1000, -1]])


def test_dimensions_with_huge_bounds_are_not_mapped():
    """Beyond a million they are taken for none."""
    low, high = np.array([-1e6, -1.1e6], np.float32), np.array([1e6, 1e6], np.float32)
    agent = ppo.Agent(OBS, spaces.Box(low, high), ppo.Args())
    sent = agent.to_env(np.array([[0.5, 0.5]], np.float32))
    np.testing.assert_allclose(sent, [[5e5, 0.5]])


def test_options_are_counted_from_the_start_of_their_space():
    for space, action, expected in [
        (spaces.Discrete(3, start=5), [0, 2], [5, 7]),
        (ACTIONS["multidiscrete 2 x 2"], [[0, 1, 0, 3]], [[[0, 2], [-3, 5]]]),
        (spaces.MultiBinary((2, 2)), [[0, 1, 1, 0]], [[[0, 1], [1, 0]]]),
    ]:
        agent = ppo.Agent(OBS, space, ppo.Args())
        np.testing.assert_array_equal(agent.to_env(np.array(action)), expected)


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
def test_initialisation():
    """[Details] #2: gains sqrt 2 within, 0.01 for the policy's output, 1 for the value's."""
    space = spaces.Box(-1, 1, (64,))
    agent = ppo.Agent(space, spaces.Discrete(5), ppo.Args(hidden_sizes=(64, 64)))
    for network, gain in [(agent.actor, 0.01), (agent.critic, 1.0)]:
        linears = [layer for layer in network if isinstance(layer, nn.Linear)]
        for layer, expected in zip(linears, [math.sqrt(2), math.sqrt(2), gain], strict=True):
            w = layer.weight.detach()
            if len(w) > w.shape[1]:  # then the columns are orthogonal, else the rows
                w = w.T
            eye = torch.eye(len(w))
            torch.testing.assert_close(w @ w.T, expected**2 * eye, atol=1e-5, rtol=0)
            assert torch.all(layer.bias == 0)


def types(network, kind):
    return [layer for layer in network if isinstance(layer, kind)]


@pytest.mark.parametrize("hidden", [(), (16,), (16, 8, 4)])
def test_mlp_ends_in_a_linear_layer_of_its_gain(hidden):
    """Also where a fork adds layers, as LayerNorm, between the linear ones and the activations."""
    sizes = [6, *hidden, 2]
    network = ppo.mlp(sizes, nn.ReLU, gain=0.3)
    linears = types(network, nn.Linear)
    assert network[-1] is linears[-1]
    assert [linears[0].in_features, *(x.out_features for x in linears)] == sizes
    assert isinstance(network[0], nn.Linear), "nothing is done to the input"
    w = network[-1].weight.detach()
    torch.testing.assert_close(w @ w.T, 0.09 * torch.eye(2), atol=1e-6, rtol=0)
    kinds = [type(x) for x in network if isinstance(x, nn.Linear | nn.ReLU)]
    assert kinds == [nn.Linear, nn.ReLU] * len(hidden) + [nn.Linear]
    assert network(torch.randn(5, 6)).shape == (5, 2)


@pytest.mark.upstream
def test_network_flags():
    args = ppo.Args(hidden_sizes=(16, 8, 4), activation="relu")
    agent = ppo.Agent(OBS, spaces.Discrete(2), args)
    for network, outputs in [(agent.actor, 2), (agent.critic, 1)]:
        assert [x.out_features for x in types(network, nn.Linear)] == [16, 8, 4, outputs]
        assert len(types(network, nn.ReLU)) == 3
        assert not types(network, nn.Tanh)
    agent = ppo.Agent(OBS, spaces.Discrete(2), ppo.Args(hidden_sizes=()))
    assert len(types(agent.actor, nn.Linear)) == 1
    agent = ppo.Agent(OBS, spaces.Discrete(2), ppo.Args())
    assert len(types(agent.actor, nn.Tanh)) == len(types(agent.critic, nn.Tanh)) == 2


def test_policy_and_value_function_share_no_parameters():
    """[Details] #13."""
    agent = ppo.Agent(OBS, spaces.Discrete(2), ppo.Args())
    actor, critic = set(agent.actor.parameters()), set(agent.critic.parameters())
    assert actor
    assert critic
    assert not actor & critic


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_make_envs(mode):
    """N environments that reset the step after an end, with vectors as observations."""
    args = ppo.Args(env_id="Counting-v0", num_envs=2, vectorization_mode=mode)
    with ppo.closing_envs(ppo.make_envs(args)) as envs:
        assert envs.num_envs == 2
        assert envs.single_observation_space.shape == (3,)
        assert envs.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
        envs.reset(seed=0)
        action = np.zeros(2, np.int64)
        ends = [envs.step(action)[2].tolist() for _ in range(3)]
        assert ends == [[False] * 2, [False] * 2, [True] * 2]
        obs, reward, terminated, truncated, _ = envs.step(action)
    assert obs[:, 1:].tolist() == [[1, 0]] * 2
    assert not reward.any()
    assert not terminated.any()
    assert not truncated.any()


def test_make_envs_closes_what_it_refuses():
    class Texts(gym.Env):
        observation_space = spaces.Text(9)
        action_space = spaces.Discrete(2)
        closed = 0

        def close(self):
            Texts.closed += 1

    gym.register("Texts-v0", Texts, disable_env_checker=True)
    with pytest.raises(ppo.InputError, match="Text"):
        ppo.make_envs(ppo.Args(env_id="Texts-v0", num_envs=3))
    assert Texts.closed == 3
