"""How many steps of what size: iterations, annealing, gradient clipping and the KL stop."""

import gymnasium as gym
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo


@pytest.fixture
def steps(monkeypatch):
    """The learning rate of every optimizer step while the test trains."""
    rates, original = [], ppo.Adam.step

    def step(self, gradient, learning_rate):
        rates.append(learning_rate)
        return original(self, gradient, learning_rate)

    monkeypatch.setattr(ppo.Adam, "step", step)
    return rates


@pytest.mark.parametrize(("total", "iterations"), [(1, 1), (63, 1), (64, 1), (65, 2), (128, 2), (300, 5)])
def test_runs_are_rounded_up_to_whole_rollouts(total, iterations, monkeypatch, steps):
    env_steps, original = [], gym.vector.SyncVectorEnv.step

    def step(self, actions):
        env_steps.append(len(actions))
        return original(self, actions)

    monkeypatch.setattr(gym.vector.SyncVectorEnv, "step", step)
    ppo.train(
        ppo.Args(
            total_timesteps=total,
            num_envs=4,
            num_steps=16,
            num_minibatches=2,
            update_epochs=3,
            eval_episodes=0,
        )
    )
    assert sum(env_steps) == 64 * iterations
    assert len(steps) == iterations * 3 * 2


def test_annealing_ends_with_the_last_iteration(updates, steps):
    """Five iterations: 5/5, 4/5, ... 1/5, also where the last one is only begun by total_timesteps."""
    flags = {"total_timesteps": 64 * 4 + 1, "num_steps": 16, "num_minibatches": 1, "update_epochs": 1}
    ppo.train(ppo.Args(learning_rate=1e-3, clip_coef=0.1, **flags))
    assert steps == pytest.approx([1e-3, 8e-4, 6e-4, 4e-4, 2e-4])
    assert [clip for _, clip, _ in updates] == [0.1] * 5
    ppo.train(ppo.Args(learning_rate=1e-3, clip_coef=0.1, anneal_lr=False, anneal_clip=True, **flags))
    assert steps[5:] == [1e-3] * 5
    assert [clip for _, clip, _ in updates[5:]] == pytest.approx([0.1, 0.08, 0.06, 0.04, 0.02])


def test_kl_stop(updates, steps, monkeypatch):
    """Above the target no step is taken, the update ends, and that minibatch is not in the averages."""
    flags = {"run_name": "a", "total_timesteps": 512 * 3, "learning_rate": 1e-2, "anneal_lr": False}
    logged = []
    original = ppo.Run.log
    monkeypatch.setattr(
        ppo.Run,
        "log",
        lambda self, i, n, scalars: (logged.append(dict(scalars)), original(self, i, n, scalars)),
    )
    ppo.train(ppo.Args(target_kl=0.01, **flags))
    kls, iterations = [info["approx_kl"].item() for _, _, info in updates], [[]]
    for kl in kls:
        iterations[-1].append(kl)
        if kl > 0.01 or len(iterations[-1]) == 16:
            iterations.append([])
    assert iterations.pop() == []
    assert len(iterations) == 3, "an update phase ends at the first KL above the target, not later or before"
    assert sum(kl > 0.01 for kl in kls) >= 2, "the test needs a stop"
    assert len(steps) == sum(kl <= 0.01 for kl in kls)
    for scalars, kl in zip(logged, iterations, strict=True):
        taken = [x for x in kl if x <= 0.01]
        assert scalars["losses/approx_kl"] == pytest.approx(sum(taken) / len(taken), rel=1e-4)


def test_kl_stop_before_the_first_step(steps, monkeypatch):
    """Where not even one minibatch was learnt from, there are no losses to log, and the run goes on."""
    logged, loss = [], ppo.ppo_loss
    monkeypatch.setattr(ppo, "ppo_loss", lambda *x: (loss(*x)[0], {"approx_kl": torch.tensor(0.5)}))
    monkeypatch.setattr(ppo.Run, "log", lambda self, i, n, scalars: logged.append(set(scalars)))
    ppo.train(ppo.Args(target_kl=0.4, total_timesteps=1024))
    assert steps == []
    assert logged == [{"losses/explained_variance", "charts/learning_rate"}] * 2


def test_without_a_target_nothing_stops(updates, steps):
    ppo.train(ppo.Args(total_timesteps=512 * 2, learning_rate=1e-2))
    assert len(steps) == len(updates) == 32
    assert max(info["approx_kl"] for _, _, info in updates) > 0.01


def test_gradients_are_clipped_by_their_global_norm(monkeypatch):
    norms, original = [], ppo.Adam.step

    def step(self, gradient, learning_rate):
        norms.append(gradient.norm().item())
        return original(self, gradient, learning_rate)

    monkeypatch.setattr(ppo.Adam, "step", step)
    ppo.train(ppo.Args(total_timesteps=512, max_grad_norm=0.01))
    assert max(norms) == pytest.approx(0.01, rel=1e-3)
    norms.clear()
    ppo.train(ppo.Args(total_timesteps=512, max_grad_norm=None))
    assert max(norms) > 0.1


def test_advantages_are_normalised_by_minibatch(updates):
    ppo.train(ppo.Args(total_timesteps=512))
    for minibatch, _, _ in updates:
        assert minibatch.advantage.mean().item() == pytest.approx(0, abs=1e-5)
        assert minibatch.advantage.std().item() == pytest.approx(1, abs=1e-4)
    updates.clear()
    ppo.train(ppo.Args(total_timesteps=512, norm_adv=False))
    assert all(abs(minibatch.advantage.std().item() - 1) > 1e-3 for minibatch, _, _ in updates)
    for minibatch, _, _ in updates:
        torch.testing.assert_close(minibatch.advantage, minibatch.ret - minibatch.value, atol=1e-5, rtol=1e-5)


def test_adam_is_that_of_torch():
    """100 steps of gradients of very different sizes, saved and restored in the middle."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
    copy = [torch.nn.Parameter(x.detach().clone()) for x in net.parameters()]
    ours, theirs = ppo.Adam(list(net.parameters())), torch.optim.Adam(copy, eps=1e-5)
    for step in range(100):
        for x in copy:
            x.grad = torch.randn_like(x) * 10.0 ** torch.randint(-7, 2, x.shape)
        theirs.param_groups[0]["lr"] = learning_rate = 1e-3 * (1 - step / 100)
        theirs.step()
        if step == 50:  # as in a run that is resumed
            state = {name: x.clone() for name, x in ours.state_dict().items()}
            ours = ppo.Adam(list(net.parameters()))
            ours.load_state_dict(state)
        ours.step(torch.cat([x.grad.flatten() for x in copy]), learning_rate)
        for x, expected in zip(net.parameters(), copy, strict=True):
            torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-7)


def test_all_parameters_are_views_of_the_optimizers_vector(monkeypatch):
    """And stay so when weights are loaded."""
    made, original = [], ppo.Adam.__init__
    monkeypatch.setattr(ppo.Adam, "__init__", lambda self, x: original(self, x) or made.append(self))
    args = ppo.Args(env_id="Pendulum-v1", total_timesteps=64, num_steps=16, run_name="a")
    agent = ppo.train(args)
    ppo.load(ppo.os.path.join("runs", "a"), agent=agent)
    before = {name: x.clone() for name, x in agent.named_parameters()}
    (optimizer,) = made
    optimizer.moments.zero_()
    optimizer.count.zero_()
    optimizer.step(torch.ones_like(optimizer.vector), 0.1)
    for name, x in agent.named_parameters():
        torch.testing.assert_close(x, before[name] - 0.1)  # Adam's first step is as long as the learning rate


def test_the_step_is_the_gradient_of_the_loss(monkeypatch):
    """Of every minibatch, by torch's own backward and clipping."""
    steps, original = [], ppo.Adam.step
    monkeypatch.setattr(ppo.Adam, "step", lambda *args: steps.append(args[1].clone()) or original(*args))
    losses, loss = [], ppo.ppo_loss

    def record(agent, *args):
        result = loss(agent, *args)
        agent.zero_grad()
        result[0].backward(retain_graph=True)
        norm = torch.nn.utils.clip_grad_norm_(agent.parameters(), 1.0)
        losses.append((norm.item(), torch.cat([x.grad.flatten() for x in agent.parameters()])))
        return result

    monkeypatch.setattr(ppo, "ppo_loss", record)
    ppo.train(ppo.Args(total_timesteps=512 * 2, max_grad_norm=1.0, run_name="a"))
    assert len(steps) == len(losses) == 32
    for ours, (_, expected) in zip(steps, losses, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-7)
    norms = [norm for norm, _ in losses]
    assert min(norms) < 1 < max(norms), "both are covered"
    logged = [event.value for event in EventAccumulator("runs/a").Reload().Scalars("losses/grad_norm")]
    assert logged == pytest.approx([sum(norms[:16]) / 16, sum(norms[16:]) / 16])


@pytest.mark.parametrize("frozen", [False, True])
def test_parameters_that_are_not_used_or_frozen(frozen, monkeypatch):
    """A fork may have both; neither changes."""

    class Agent(ppo.Agent):
        def __init__(self, *args):
            super().__init__(*args)
            self.spare = torch.nn.Linear(3, 3)
            self.spare.requires_grad_(not frozen)
            self.actor[0].bias.requires_grad_(not frozen)
            self.initial = [x.detach().clone() for x in (*self.spare.parameters(), self.actor[0].bias)]

    monkeypatch.setattr(ppo, "Agent", Agent)
    agent = ppo.train(ppo.Args(total_timesteps=512))
    now = [*agent.spare.parameters(), agent.actor[0].bias]
    same = [torch.equal(x, y) for x, y in zip(now, agent.initial, strict=True)]
    assert same == [True, True, frozen]


def test_dual_clip_is_used(updates):
    """With c barely above 1 it binds at once, which changes the weights."""
    flags = {"total_timesteps": 512 * 2, "learning_rate": 1e-2}
    a, b = ppo.train(ppo.Args(**flags)), ppo.train(ppo.Args(dual_clip=1.0001, **flags))
    assert not torch.equal(a.actor[0].weight, b.actor[0].weight)


@pytest.mark.parametrize(("target_kl", "reads"), [(None, 0), (100.0, 16)])
def test_the_kl_is_read_only_where_there_is_a_target(target_kl, reads, monkeypatch):
    """Reading a tensor waits for the device; without a target no minibatch does it."""
    calls, loss, item = [], ppo.ppo_loss, torch.Tensor.item

    def ppo_loss(*args):
        loss_, info = loss(*args)
        kls.append(info["approx_kl"])
        return loss_, info

    kls = []
    monkeypatch.setattr(ppo, "ppo_loss", ppo_loss)
    monkeypatch.setattr(torch.Tensor, "item", lambda x: calls.append(any(x is kl for kl in kls)) or item(x))
    ppo.train(ppo.Args(total_timesteps=512, target_kl=target_kl))
    assert sum(calls) == reads
