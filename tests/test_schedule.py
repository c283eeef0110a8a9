"""How many steps of what size: iterations, annealing, the optimizer's step and the KL stop."""

import math

import pieces
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

import ppo


@pytest.fixture
def steps():
    """The (learning rate, 2-norm of the gradient) of every minibatch's step in the test.

    In a dict with an entry for each optimizer, as a fork may have several.
    """
    taken = []

    def note(optimizer, _args, _kwargs):
        if not taken or id(optimizer) in taken[-1]:
            taken.append({})
        parameters = [x for group in optimizer.param_groups for x in group["params"]]
        norms = [x.grad.norm() for x in parameters if x.grad is not None]
        rate = optimizer.param_groups[0]["lr"]
        taken[-1][id(optimizer)] = (rate, torch.stack(norms).norm().item())

    hook = register_optimizer_step_pre_hook(note)
    yield taken
    hook.remove()


class Shifted:
    """A distribution whose log-probabilities are too large by a number, or by one a row."""

    def __init__(self, dist, shift):
        self.dist = dist
        self.shift = shift
        self.entropy = dist.entropy

    def log_prob(self, action):
        return self.dist.log_prob(action) + self.shift


class Spread(ppo.Agent):
    """Its probability ratios in a minibatch, at a learning rate of 0, are 1.0005, 1.0015, ..."""

    def forward(self, obs):
        dist, value = super().forward(obs)
        if torch.is_grad_enabled():  # else it is valued, as the policy that acted
            dist = Shifted(dist, (1 + (torch.arange(len(obs)) + 0.5) / 1000).log())
        return dist, value


class Drifting(ppo.Agent):
    """Its ratio, at a learning rate of 0, is 1 + 0.15 k in minibatch k = 0, 1, ... of an update."""

    def act(self, *args, **kwargs):
        self.calls = 0
        return super().act(*args, **kwargs)

    def forward(self, obs):
        dist, value = super().forward(obs)
        if torch.is_grad_enabled():
            dist = Shifted(dist, math.log(1 + 0.15 * self.calls))
            self.calls += 1
        return dist, value


@pytest.fixture(scope="module")
def example():
    """A learner with a rollout of CartPole, in which some episodes end, and the batch of it."""
    args = ppo.Args(num_envs=4, num_steps=32, norm_reward=False)
    with pieces.learner(args) as learner:
        for _ in range(3):
            rollout = learner.collect()
    assert rollout.done.any()
    return learner, rollout, learner.estimate(rollout)


@pytest.mark.parametrize(
    ("total", "iterations"), [(1, 1), (63, 1), (64, 1), (65, 2), (128, 2), (300, 5)]
)
def test_runs_are_rounded_up_to_whole_rollouts(total, iterations, steps):
    flags = {"num_steps": 16, "num_minibatches": 2, "update_epochs": 3, "run_name": "a"}
    args = ppo.Args(total_timesteps=total, eval_episodes=0, **flags)
    agent = ppo.train(args, agent_class=pieces.Recording)
    assert [len(obs) for obs in agent.acted] == [4] * 16 * iterations
    assert len(agent.learnt) == len(steps) == iterations * 3 * 2
    checkpoint = ppo.load("runs/a")
    assert checkpoint["iteration"] == iterations
    assert checkpoint["global_step"] == 64 * iterations
    assert [step for step, _ in pieces.scalars("runs/a")["charts/SPS"]] == [
        64 * (i + 1) for i in range(iterations)
    ]


@pytest.mark.parametrize("anneal", [True, False])
def test_annealing_of_the_learning_rate(anneal, steps):
    """Five iterations: 5/5, 4/5, ... 1/5, also where the last is only begun by total_timesteps."""
    flags = {"total_timesteps": 64 * 4 + 1, "num_steps": 16, "num_minibatches": 1}
    args = ppo.Args(learning_rate=1e-3, anneal_lr=anneal, update_epochs=2, run_name="a", **flags)
    ppo.train(args)
    expected = [1e-3, 8e-4, 6e-4, 4e-4, 2e-4] if anneal else [1e-3] * 5
    logged = pieces.values("runs/a", "charts/learning_rate")
    assert logged == pytest.approx(expected)
    assert len(steps) == 2 * 5
    for epoch in (steps[::2], steps[1::2]):
        for optimizer in epoch[0]:
            rates = [step[optimizer][0] for step in epoch]
            assert rates == pytest.approx([rates[0] * x / 1e-3 for x in expected])
        first = next(iter(epoch[0]))
        assert [step[first][0] for step in epoch] == pytest.approx(logged)


def test_each_group_is_annealed_from_its_own_learning_rate():
    """Also where optimizers are loaded from a checkpoint on the way."""

    def make_optimizers():
        x, y, z = (nn.Parameter(torch.zeros(1)) for _ in range(3))
        groups = [{"params": [x], "lr": 0.4}, {"params": [y]}]
        return [torch.optim.Adam(groups, lr=0.1), torch.optim.SGD([z], lr=2.0)]

    def rates(optimizers):
        return [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]

    optimizers = make_optimizers()
    ppo.anneal(optimizers, 1.0)
    assert rates(optimizers) == [0.4, 0.1, 2.0]
    ppo.anneal(optimizers, 0.75)
    assert rates(optimizers) == pytest.approx([0.3, 0.075, 1.5])
    loaded = make_optimizers()
    for optimizer, saved in zip(loaded, optimizers, strict=True):
        optimizer.load_state_dict(saved.state_dict())
    for resumed in (optimizers, loaded):
        ppo.anneal(resumed, 0.5)
        assert rates(resumed) == pytest.approx([0.2, 0.05, 1.0])


@pytest.mark.parametrize("anneal", [True, False])
def test_annealing_of_the_clipping(anneal):
    """By the fraction of 100 rows whose ratio, 1.0005 to 1.0995, is outside: all are valid here."""
    flags = {"num_envs": 4, "num_steps": 25, "num_minibatches": 1, "update_epochs": 1}
    args = ppo.Args(
        env_id="Endless-v0",
        total_timesteps=500,
        learning_rate=0.0,
        clip_coef=0.1,
        anneal_clip=anneal,
        eval_episodes=0,
        run_name="a",
        **flags,
    )
    ppo.train(args, agent_class=Spread)
    expected = [0.0, 0.2, 0.4, 0.6, 0.8] if anneal else [0.0] * 5
    assert pieces.values("runs/a", "losses/clipfrac") == pytest.approx(expected)


def test_the_optimizer_is_adam_with_epsilon_1e_5():
    """[Details] #3; a checkpoint holds its settings."""
    ppo.train(ppo.Args(total_timesteps=64, num_steps=16, eval_episodes=0, run_name="a"))
    groups = [group for x in ppo.load("runs/a")["optimizers"] for group in x["param_groups"]]
    adam_groups = [group for group in groups if "betas" in group]
    assert adam_groups
    assert {(group["eps"], *group["betas"]) for group in adam_groups} == {(1e-5, 0.9, 0.999)}


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-5, weight_decay=0.1, fused=True)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-2, eps=1e-5, fused=True)


@pytest.mark.parametrize("make_optimizer", [sgd, adamw, adam])
@pytest.mark.parametrize("max_grad_norm", [None, 0.2, 100.0])
def test_a_step_is_the_optimizers_of_the_clipped_gradient(make_optimizer, max_grad_norm, example):
    """Of every minibatch, with the clipping of the gradient by its definition."""
    learner, rollout, batch = example
    learner, by_hand = learner.copy(), learner.copy()
    args = ppo.Args(num_minibatches=3, update_epochs=2, max_grad_norm=max_grad_norm, norm_adv=False)
    learner.args = args
    learner.optimizers = [make_optimizer(learner.agent.parameters())]
    infos = learner.update(rollout, batch)
    agent, parameters = by_hand.agent, list(by_hand.agent.parameters())
    optimizer = make_optimizer(parameters)
    norms = []
    for _ in range(2):
        for minibatch in ppo.minibatches(batch, 3, by_hand.generator):
            loss, _ = ppo.ppo_loss(agent, minibatch, args, args.clip_coef)
            gradients = torch.autograd.grad(loss, parameters)
            norm = math.sqrt(sum(x.square().sum().item() for x in gradients))
            scale = 1 if max_grad_norm is None else min(1, max_grad_norm / norm)
            for x, gradient in zip(parameters, gradients, strict=True):
                x.grad = scale * gradient
            optimizer.step()
            norms.append(norm)
    assert [info["grad_norm"] for info in infos] == pytest.approx(norms, rel=1e-4)
    assert 0.2 < min(norms) < max(norms) < 100, "0.2 clips all of them and 100 none"
    torch.testing.assert_close(learner.weights(), by_hand.weights(), atol=1e-5, rtol=1e-5)
    assert not torch.equal(learner.weights(), example[0].weights())


@pytest.mark.parametrize("max_grad_norm", [0.01, 0.2])
def test_gradients_are_clipped_by_their_global_norm(max_grad_norm, example):
    """A step of SGD at a learning rate of 1 shows the gradient that it was given."""
    learner, rollout, batch = example
    flags = {"num_minibatches": 1, "update_epochs": 1}
    steps = []
    for norm in (None, max_grad_norm):
        other = learner.copy()
        other.optimizers = [torch.optim.SGD(other.agent.parameters(), lr=1.0)]
        (info,) = other.update(rollout, batch, max_grad_norm=norm, **flags)
        steps.append(learner.weights() - other.weights())
        assert info["grad_norm"] == pytest.approx(steps[0].norm().item(), rel=1e-4)
    whole, clipped = steps
    assert whole.norm() > 0.2
    assert clipped.norm().item() == pytest.approx(max_grad_norm, rel=1e-3)
    torch.testing.assert_close(clipped, whole * max_grad_norm / whole.norm(), atol=1e-6, rtol=1e-2)


def test_gradients_of_zero_stay_so():
    """An infinite bound, and a parameter without a gradient, are no trouble either."""
    x, y, unused = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    for max_norm in (0.5, math.inf):
        x.grad = torch.zeros(2)
        y.grad = torch.zeros(2)
        assert ppo.clip_gradients([x, unused, y], max_norm) == 0
        assert x.grad.tolist() == y.grad.tolist() == [0, 0]
    x.grad = torch.tensor([3.0, 0.0])
    y.grad = torch.tensor([0.0, -4.0])
    assert ppo.clip_gradients([x, unused, y], math.inf) == 5
    assert x.grad.tolist() == [3, 0]
    assert ppo.clip_gradients([x, unused, y], 1.0) == 5
    assert x.grad.tolist() == pytest.approx([0.6, 0])
    assert y.grad.tolist() == pytest.approx([0, -0.8])
    assert unused.grad is None


def test_no_gradient_is_left_over_from_before(example):
    """Neither from the minibatch before nor from what the test did to the agent."""
    learner, rollout, batch = example
    clean, dirty = learner.copy(), learner.copy()
    for x in dirty.agent.parameters():
        x.grad = torch.full_like(x, 5.0)
    assert clean.update(rollout, batch) == dirty.update(rollout, batch)


def test_several_optimizers_each_step(example):
    """As a fork has them that gives actor and critic one each: the same as with one for both."""
    learner, rollout, batch = example
    one, two = learner.copy(), learner.copy()
    one.optimizers = [sgd(one.agent.parameters())]
    parameters = list(two.agent.parameters())
    two.optimizers = [sgd(parameters[:3]), sgd(parameters[3:])]
    assert one.update(rollout, batch) == two.update(rollout, batch)
    assert torch.equal(one.weights(), two.weights())


def update_with_weights(learner, rollout, batch, learning_rate, **flags):
    """The infos of an update by SGD, and the weights before each step and after the last."""
    other = learner.copy()
    other.optimizers = [torch.optim.SGD(other.agent.parameters(), lr=learning_rate)]
    weights = []
    other.optimizers[0].register_step_pre_hook(lambda *_: weights.append(other.weights()))
    infos = other.update(rollout, batch, num_minibatches=3, norm_adv=False, **flags)
    return infos, [*weights, other.weights()]


@pytest.mark.parametrize("position", [0, 1, 2])
def test_kl_stop(position, example):
    """Above the target no step is taken and the update ends, in whichever minibatch that is.

    Of one row, which is in it, the ratio is e^3, and so its part of the KL e^3 - 1 - 3 = 16.1.
    """
    learner, rollout, batch = example
    index = torch.arange(len(batch.obs))
    parts = ppo.minibatches(batch._replace(target=index), 3, learner.copy().generator)
    row = list(parts)[position].target[0]
    logprob = batch.logprob.clone()
    logprob[row] -= 3
    batch = batch._replace(logprob=logprob)
    infos, weights = update_with_weights(learner, rollout, batch, 1e-4)
    kls = [info["approx_kl"] for info in infos]
    assert max(kls[:position], default=0) < 0.1 < kls[position]
    stopped = update_with_weights(learner, rollout, batch, 1e-4, target_kl=0.1)
    assert stopped[0] == infos[:position]
    assert len(stopped[1]) == position + 1
    assert all(map(torch.equal, stopped[1], weights))


@pytest.mark.parametrize("steps", range(1, 12))
def test_kl_stop_where_the_policy_drifts(steps, example):
    """The update ends at the first KL above the target, in whichever epoch that is."""
    learner, rollout, batch = example
    infos, weights = update_with_weights(learner, rollout, batch, 1.0)
    kls = [info["approx_kl"] for info in infos]
    target = max(kls[:steps])
    expected = next((i for i, kl in enumerate(kls) if kl > target), len(kls))
    assert expected >= steps
    stopped = update_with_weights(learner, rollout, batch, 1.0, target_kl=target)
    assert stopped[0] == infos[:expected]
    assert torch.equal(stopped[1][-1], weights[expected])


def test_kl_stop_before_the_first_step(example):
    """Rows whose ratio is 2 have an approximate KL of 2 - 1 - log 2 = 0.307."""
    learner, rollout, batch = example
    batch = batch._replace(logprob=batch.logprob - math.log(2))
    other = learner.copy()
    assert other.update(rollout, batch, target_kl=0.306) == []
    assert torch.equal(other.weights(), learner.weights())
    infos = other.update(rollout, batch, target_kl=0.308, num_minibatches=1, update_epochs=1)
    assert [info["approx_kl"] for info in infos] == pytest.approx([1 - math.log(2)])
    assert not torch.equal(other.weights(), learner.weights())


def test_without_a_target_nothing_stops(example):
    learner, rollout, batch = example
    infos, _ = update_with_weights(learner, rollout, batch, 1.0)
    assert len(infos) == 4 * 3
    assert max(info["approx_kl"] for info in infos) > 0.01


FIXED = {  # a run of Constant, of reward 1 and one step, in which nothing is learnt
    "env_id": "Constant-v0",
    "num_envs": 4,
    "num_steps": 16,
    "total_timesteps": 128,
    "update_epochs": 2,
    "num_minibatches": 4,
    "learning_rate": 0.0,
    "max_grad_norm": None,
    "norm_adv": False,
    "norm_reward": False,
    "eval_episodes": 0,
    "run_name": "a",
}


@pytest.mark.parametrize(("target_kl", "taken"), [(None, 8), (0.05, 3)])
def test_losses_are_averaged_over_all_steps_taken(target_kl, taken, steps):
    """Ratios of 1, 1.15, 1.3 and so on, in turn; at 1.45 the KL is 0.078 and no step is taken."""
    agent = ppo.train(ppo.Args(target_kl=target_kl, **FIXED), agent_class=Drifting)
    with torch.no_grad():
        dist, value = super(Drifting, agent).forward(torch.zeros(1, 1))
    v = value.item()
    ratios = [1 + 0.15 * k for k in range(taken)]
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
    assert len(steps) == 2 * taken
    for i in range(2):
        norms = [
            math.hypot(*(norm for _, norm in step.values()))
            for step in steps[i * taken : (i + 1) * taken]
        ]
        mean = pytest.approx(sum(norms) / taken, rel=1e-4)
        assert tags["losses/grad_norm"][i] == (64 * (i + 1), mean)


def test_a_run_goes_on_where_no_step_was_taken(steps):
    """There are no losses to log then. A ratio of 2 has an approximate KL of 0.307."""

    class Agent(ppo.Agent):
        def forward(self, obs):
            dist, value = super().forward(obs)
            return Shifted(dist, math.log(2) if torch.is_grad_enabled() else 0.0), value

    ppo.train(ppo.Args(target_kl=0.3, **FIXED), agent_class=Agent)
    assert steps == []
    tags = pieces.scalars("runs/a")
    assert not {"losses/approx_kl", "losses/policy_loss", "losses/grad_norm"} & set(tags)
    assert [step for step, _ in tags["charts/learning_rate"]] == [64, 128]


def test_advantages_are_normalised_by_minibatch(example):
    """Mean 0, deviation 1 within each: as if those given had been so, and whatever their units."""
    learner, rollout, batch = example
    flags = {"num_minibatches": 4, "update_epochs": 1}
    index = torch.arange(len(batch.obs))
    order = ppo.minibatches(batch._replace(advantage=index), 4, learner.copy().generator)
    normalised = batch.advantage.clone()
    for minibatch in order:
        rows = minibatch.advantage
        x = batch.advantage[rows].double().numpy()
        scaled = (x - x.mean()) / x.std(ddof=1)
        normalised[rows] = torch.from_numpy(scaled).float()
    assert abs(normalised - batch.advantage).max() > 0.1

    def weights(advantage, **more):
        other = learner.copy()
        other.optimizers = [torch.optim.SGD(other.agent.parameters(), lr=0.1)]
        infos = other.update(rollout, batch._replace(advantage=advantage), **flags, **more)
        assert len(infos) == 4
        return other.weights()

    expected = weights(normalised, norm_adv=False)
    torch.testing.assert_close(weights(batch.advantage, norm_adv=True), expected)
    torch.testing.assert_close(weights(5 * batch.advantage + 3, norm_adv=True), expected)
    assert not torch.allclose(weights(batch.advantage, norm_adv=False), expected)


def test_equal_advantages_are_normalised_to_nothing(example):
    """Their deviation is 0, by which nothing must be divided."""
    learner, rollout, batch = example
    other = learner.copy()
    equal = torch.full_like(batch.advantage, 3.0)
    infos = other.update(rollout, batch._replace(advantage=equal), norm_adv=True)
    assert all(abs(info["policy_loss"]) < 1e-6 for info in infos)
    assert other.weights().isfinite().all()


def rebind(agent):
    agent.critic[-1].weight = nn.Parameter(agent.critic[-1].weight.detach().clone())
    return f"critic.{len(agent.critic) - 1}.weight"


def add(agent):
    agent.auxiliary = nn.Linear(3, 1, bias=False)
    return "auxiliary.weight"


def replace_layer(agent):
    agent.actor[-1] = nn.Linear(agent.actor[-1].in_features, 2)
    return f"actor.{len(agent.actor) - 1}.weight"


@pytest.mark.parametrize("change", [rebind, add, replace_layer])
def test_a_parameter_that_the_optimizer_does_not_know_is_an_error(change, example):
    """It would never learn. The message has its name; nothing has been learnt by then."""
    learner, rollout, batch = example
    other = learner.copy()
    name = change(other.agent)
    before = other.weights()
    with pytest.raises(RuntimeError, match=rf"\b{name}\b"):
        other.update(rollout, batch)
    assert torch.equal(other.weights(), before)
    other.optimizers = [torch.optim.Adam(other.agent.parameters())]
    other.update(rollout, batch)
    assert not torch.equal(other.weights(), before)


def test_a_parameter_made_at_the_first_use_is_an_error_in_a_run():
    class Late(ppo.Agent):
        def act(self, *args, **kwargs):
            self.late = nn.Linear(2, 2)
            return super().act(*args, **kwargs)

    with pytest.raises(RuntimeError, match=r"late\.weight"):
        ppo.train(ppo.Args(total_timesteps=512), agent_class=Late)


@pytest.mark.parametrize("frozen", [False, True])
def test_parameters_that_are_not_used_or_frozen(frozen):
    """A fork may have both; neither changes, and nor need the optimizer know what is frozen."""

    class Agent(ppo.Agent):
        def __init__(self, *args):
            super().__init__(*args)
            self.spare = nn.Linear(3, 3)
            self.first = next(self.actor.parameters())
            if frozen:
                self.spare.requires_grad_(False)
                self.first.requires_grad_(False)
            self.watched = [*self.spare.parameters(), self.first]
            self.initial = [x.detach().clone() for x in self.watched]

    agent = ppo.train(ppo.Args(total_timesteps=512), agent_class=Agent)
    same = [torch.equal(x, y) for x, y in zip(agent.watched, agent.initial, strict=True)]
    assert same == [True, True, frozen]


def test_a_frozen_parameter_need_not_be_in_an_optimizer(example):
    learner, rollout, batch = example
    other = learner.copy()
    other.agent.critic.requires_grad_(False)
    other.agent.auxiliary = nn.Linear(3, 1).requires_grad_(False)
    learnt = [x for x in other.agent.parameters() if x.requires_grad]
    other.optimizers = [torch.optim.Adam(learnt, lr=1e-3)]
    critic = [x.clone() for x in other.agent.critic.parameters()]
    actor = [x.clone() for x in other.agent.actor.parameters()]
    other.update(rollout, batch)
    assert all(map(torch.equal, critic, other.agent.critic.parameters()))
    assert not any(map(torch.equal, actor, other.agent.actor.parameters()))


@pytest.mark.parametrize(
    "flags",
    [{"dual_clip": 1.0001}, {"ent_coef": 1.0}, {"vf_coef": 2.0}, {"clip_coef": 0.01}],
    ids=lambda flags: next(iter(flags)),
)
def test_an_update_goes_by_the_arguments_it_is_given(flags, example):
    """A fork may change them between updates."""
    learner, rollout, batch = example
    one, other = learner.copy(), learner.copy()
    one.optimizers = [torch.optim.SGD(one.agent.parameters(), lr=0.1)]
    other.optimizers = [torch.optim.SGD(other.agent.parameters(), lr=0.1)]
    one.update(rollout, batch)
    other.update(rollout, batch, **flags)
    assert not torch.equal(one.weights(), other.weights())


class Reads(TorchDispatchMode):
    """Counts how often a tensor is read as a number, for which the program waits for the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("target_kl", "expected"), [(None, 0), (100.0, 16)])
def test_the_kl_is_read_only_where_there_is_a_target(target_kl, expected, example):
    """Without a target no minibatch waits for the device."""
    learner, rollout, batch = example
    other = learner.copy()
    other.optimizers = [torch.optim.Adam(other.agent.parameters(), fused=True)]
    args = ppo.Args(target_kl=target_kl)
    with Reads() as reads:
        ppo.update(other.agent, other.optimizers, rollout, batch, args, 0.2, other.generator)
    assert reads.count == expected
