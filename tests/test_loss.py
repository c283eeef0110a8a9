"""ppo_loss on rows small enough to work out by hand."""

import math

import pytest
import torch
from torch import nn

import ppo


class Table(nn.Module):
    """An agent whose log-probabilities, values and entropy are parameters, one a row."""

    def __init__(self, ratio, value):
        super().__init__()
        self.logprob = nn.Parameter(torch.tensor(ratio).log())
        self.value = nn.Parameter(torch.tensor(value))
        self.row_entropy = nn.Parameter(torch.full_like(self.value, 0.7))

    def forward(self, obs):
        return self, self.value

    def log_prob(self, action):
        return self.logprob

    def entropy(self):
        return self.row_entropy


def run(ratio, advantage, value=None, old_value=None, target=None, **flags):
    """The agent with gradients, the loss, and the infos, for rows of these columns."""
    zeros = [0.0] * len(ratio)
    agent = Table(ratio, value or zeros)
    batch = ppo.Batch(
        obs=torch.tensor(zeros),
        action=torch.tensor(zeros),
        logprob=torch.tensor(zeros),
        value=torch.tensor(old_value or zeros),
        advantage=torch.tensor(advantage),
        target=torch.tensor(target or zeros),
    )
    plain = {"ent_coef": 0.0, "vf_coef": 0.0, "clip_coef": 0.2, "norm_adv": False}
    args = ppo.Args(**{**plain, **flags})
    loss, info = ppo.ppo_loss(agent, batch, args)
    loss.backward()
    assert not any(x.requires_grad for x in info.values())
    return agent, loss.item(), {name: x.item() for name, x in info.items()}


RATIO = [1.5, 0.5, 0.5, 1.5, 1.1]
ADVANTAGE = [1.0, 1.0, -1.0, -2.0, 3.0]
# min(r A, clip(r) A): 1.2 (clipped), 0.5, -0.8 (clipped), -3.0, 3.3. The gradient of r A by log r
# is r A itself.
SURROGATE = [1.2, 0.5, -0.8, -3.0, 3.3]
GRADIENT = [0.0, 0.5, 0.0, -3.0, 3.3]


def test_clipped_surrogate_and_kl_estimates():
    surrogate = ppo.clipped_surrogate(torch.tensor(RATIO), torch.tensor(ADVANTAGE), epsilon=0.2)
    assert surrogate.tolist() == pytest.approx(SURROGATE)
    agent, loss, info = run(RATIO, ADVANTAGE)
    assert loss == pytest.approx(-sum(SURROGATE) / 5)
    assert info["policy_loss"] == pytest.approx(loss)
    assert agent.logprob.grad.tolist() == pytest.approx([-g / 5 for g in GRADIENT])
    assert info["clipfrac"] == pytest.approx(4 / 5)
    assert info["old_approx_kl"] == pytest.approx(-sum(math.log(r) for r in RATIO) / 5)
    assert info["approx_kl"] == pytest.approx(sum(r - 1 - math.log(r) for r in RATIO) / 5)


VALUES = {"value": [0.5, 0.1, -0.5, 1.4], "old_value": [0.0, 0.0, 0.0, 1.0]}
VALUES |= {"target": [1.0, 1.0, 1.0, 1.3]}
ONES = [1.0] * 4
NONE = [0.0] * 4


def test_value_loss_takes_the_larger_of_both_errors():
    # Values clipped to 0.2 from the old ones: 0.2, 0.1, -0.2, 1.2. Errors plain: .25, .81, 2.25,
    # .01; clipped: .64, .81, 1.44, .01. The larger: clipped (no gradient), either, plain, either.
    columns = [torch.tensor(VALUES[name]) for name in ("value", "old_value", "target")]
    errors = ppo.clipped_error(*columns, epsilon=0.2)
    assert errors.tolist() == pytest.approx([0.64, 0.81, 2.25, 0.01])
    agent, loss, info = run(ONES, NONE, vf_coef=1.0, **VALUES)
    assert info["value_loss"] == pytest.approx(0.5 * (0.64 + 0.81 + 2.25 + 0.01) / 4)
    assert loss == pytest.approx(info["value_loss"])
    gradient = agent.value.grad[:3].tolist()
    assert gradient == pytest.approx([0.0, (0.1 - 1) / 4, (-0.5 - 1) / 4])
    agent, loss, _ = run(ONES, NONE, vf_coef=0.5, clip_vloss=False, **VALUES)
    assert loss == pytest.approx(0.5 * 0.5 * (0.25 + 0.81 + 2.25 + 0.01) / 4)
    assert agent.value.grad.tolist() == pytest.approx([-0.0625, -0.1125, -0.1875, 0.0125])


def test_the_parts_are_added_and_entropy_is_a_bonus():
    """An advantage of 2, a value that is 1 too small, and an entropy of 0.7, each weighted."""
    columns = {"value": [1.0], "old_value": [1.0], "target": [2.0]}
    agent, loss, info = run([1.0], [2.0], vf_coef=0.25, ent_coef=0.1, **columns)
    assert info["policy_loss"] == pytest.approx(-2)
    assert info["value_loss"] == pytest.approx(0.5)
    assert info["entropy"] == pytest.approx(0.7)
    assert loss == pytest.approx(-2 + 0.25 * 0.5 - 0.1 * 0.7)
    assert agent.row_entropy.grad.tolist() == pytest.approx([-0.1])


def test_both_clippings_are_by_clip_coef():
    """The ratio is clipped at 1.05, and the value, which should rise by 1, at 0.05."""
    columns = {"value": [1.0], "old_value": [0.0], "target": [1.0]}
    _, loss, info = run([1.1], [1.0], clip_coef=0.05, vf_coef=1.0, **columns)
    assert loss == pytest.approx(-1.05 + 0.5 * 0.95**2)
    assert info["clipfrac"] == 1
