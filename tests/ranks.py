"""Runs ppo.py under torchrun with the flags after the first argument, a folder that each process writes to.

rank<n>.pt there has what it saw: `seeds`, of every environment at every reset; `first` and `last`, its state
of agent and optimizer; and for each step that was taken, the minibatch, the parameters before it and the
gradient, and of each rollout the advantages and the number of valid rows.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch

import ppo

folder, *sys.argv[1:] = sys.argv[1:]
seen = {"seeds": [], "minibatches": [], "before": [], "gradients": [], "advantages": [], "rows": []}
make_envs, ppo_loss, gae = ppo.make_envs, ppo.ppo_loss, ppo.gae


def recording_make_envs(*args):
    envs = make_envs(*args)
    reset = envs.unwrapped.reset

    def recording_reset(*, seed=None, options=None):
        seen["seeds"].append([seed + i for i in range(envs.num_envs)])
        return reset(seed=seed, options=options)

    envs.unwrapped.reset = recording_reset
    return envs


def recording_loss(agent, minibatch, *rest):
    seen["minibatches"].append(minibatch._asdict())
    return ppo_loss(agent, minibatch, *rest)


def recording_gae(*args):
    result = gae(*args)
    seen["advantages"].append(result[0].clone())
    return result


class Adam(ppo.Adam):
    def __init__(self, parameters):
        super().__init__(parameters)
        seen["optimizer"] = self

    def step(self, gradient, learning_rate):
        seen["before"].append(self.vector.clone())
        seen["gradients"].append(gradient.clone())
        super().step(gradient, learning_rate)


class RunningStats(ppo.RunningStats):
    def update(self, x):
        seen["rows"].append(x.clone())
        super().update(x)


ppo.make_envs, ppo.ppo_loss, ppo.gae = recording_make_envs, recording_loss, recording_gae
ppo.Adam, ppo.RunningStats = Adam, RunningStats
train = ppo.train


def recording_train(args):
    agent = train(args)
    seen["agent"], seen["optimizer"] = agent.state_dict(), seen["optimizer"].state_dict()
    torch.save(seen, f"{folder}/rank{os.environ['RANK']}.pt")
    return agent


ppo.train = recording_train
ppo.main()
