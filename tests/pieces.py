"""What `ppo.train` sets up before its loop, for tests that call its phases themselves."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import replace

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

import ppo


class Recording(ppo.Agent):
    """An agent that keeps the observations which it acts on, and those which it learns from."""

    def __init__(self, *args):
        super().__init__(*args)
        self.acted = []  # obs (N, *obs) of every call of act
        self.learnt = []  # obs (M, *obs) of every call of forward with gradients, as in the loss

    def act(self, obs, noise=None):
        self.acted.append(obs.clone())
        return super().act(obs, noise)

    def forward(self, obs):
        if torch.is_grad_enabled():
            self.learnt.append(obs.clone())
        return super().forward(obs)


class Learner:
    """Environments, agent, optimizer and position of a run, and its phases as methods."""

    def __init__(self, envs, args: ppo.Args, agent_class: type[ppo.Agent]):
        self.envs = envs
        self.args = args
        on_cpu = replace(args, device="cpu")  # as the tensors are that tests compare with
        ppo.set_up(on_cpu, ppo.is_image(envs.single_observation_space))
        self.agent = agent_class(envs.single_observation_space, envs.single_action_space, args)
        self.optimizer = torch.optim.Adam(
            self.agent.parameters(), args.learning_rate, eps=1e-5, fused=True
        )
        self.obs, self.done = ppo.reset(envs, args, 0)

    def collect(self) -> ppo.Rollout:
        rollout, self.obs, self.done = ppo.collect(
            self.agent, self.envs, self.obs, self.done, self.args
        )
        return rollout

    def estimate(self, rollout: ppo.Rollout) -> ppo.Batch:
        return ppo.estimate_advantages(self.agent, rollout, self.args)

    def update(self, rollout: ppo.Rollout, batch: ppo.Batch, **flags) -> list[dict]:
        """The infos of an update, as numbers; flags change the arguments for this once."""
        args = replace(self.args, **flags)
        infos = ppo.update(self.agent, self.optimizer, rollout, batch, args)
        return [{name: x.item() for name, x in info.items()} for info in infos]

    def copy(self) -> "Learner":
        """One that can be updated without changing this one, and that has no environments."""
        other = copy(self)
        other.envs = None
        other.agent, other.optimizer = deepcopy((self.agent, self.optimizer))
        return other

    def weights(self) -> Tensor:
        """All parameters, copied into one vector."""
        return torch.cat([x.detach().flatten() for x in self.agent.parameters()])


@contextmanager
def learner(args: ppo.Args, agent_class: type[ppo.Agent] = ppo.Agent) -> Iterator[Learner]:
    """A Learner whose environments are closed at the end."""
    with ppo.open_envs(args) as envs:
        yield Learner(envs, args, agent_class)


def scalars(folder: str) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every tag in TensorBoard's log of a run's folder."""
    events = EventAccumulator(folder, size_guidance={"scalars": 0}).Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def values(folder: str, tag: str) -> list[float]:
    """The values of one tag in TensorBoard's log of a run's folder."""
    return [value for _, value in scalars(folder)[tag]]
