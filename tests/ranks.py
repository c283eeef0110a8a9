"""Runs ppo.py, under torchrun, with the flags after the first argument, a folder to write to.

There rank<n>.pt holds what a process saw: `seeds`, the first one of its environments at every
reset, and their number; `rows`, of every update of running statistics; and for every minibatch,
`minibatch`, `before`, the state of the agent, and `gradient`, which the optimizer was given, or
None if the update was stopped; at the end, `agent` and `optimizer`.
"""

import os
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch

import ppo

folder, *sys.argv[1:] = sys.argv[1:]
seen = defaultdict(list)
originals = ppo.make_envs, ppo.ppo_loss, ppo.train, ppo.RunningStats.update, torch.optim.Adam.step
make_envs, ppo_loss, train, update, step = originals


def recording_make_envs(*args):
    envs = make_envs(*args)
    reset = envs.unwrapped.reset

    def recording_reset(*, seed=None, options=None):
        seen["seeds"].append((seed, envs.num_envs))
        return reset(seed=seed, options=options)

    envs.unwrapped.reset = recording_reset
    return envs


def recording_loss(agent, batch, *rest):
    seen["minibatch"].append(batch._asdict())
    seen["before"].append({name: x.clone() for name, x in agent.state_dict().items()})
    seen["gradient"].append(None)
    return ppo_loss(agent, batch, *rest)


def recording_step(self):
    gradients = [x.grad.flatten() for x in self.param_groups[0]["params"]]
    seen["gradient"][-1] = torch.cat(gradients)
    seen["optimizer"] = self
    return step(self)


def recording_update(self, x):
    seen["rows"].append(x.clone())
    update(self, x)


def recording_train(*args):
    agent = train(*args)
    seen["agent"] = agent.state_dict()
    seen["optimizer"] = seen["optimizer"].state_dict()
    torch.save(dict(seen), f"{folder}/rank{os.environ['RANK']}.pt")
    return agent


def connect_by_gloo(_backends, connect=torch.distributed.init_process_group):
    connect("cpu:gloo,cuda:gloo")


if "--device=cuda:0" in sys.argv:  # which nccl does not let processes share
    torch.distributed.init_process_group = connect_by_gloo
ppo.make_envs, ppo.ppo_loss, ppo.train = recording_make_envs, recording_loss, recording_train
ppo.RunningStats.update = recording_update
torch.optim.Adam.step = recording_step
ppo.main()
