"""A workload of speed.py, in JSON, with the PPO of rlox, and a seed.

It has CartPole in Rust, and steps other environments with Gymnasium. It clips observations and
rewards where it likes, and has no shape of networks to choose but its own, which is ours.
"""

import json
import sys
import time

import numpy as np
import torch
from rlox.algorithms.ppo import PPO
from rlox.callbacks import Callback


class Watch(Callback):
    """Starts the clock after the first rollout and its update, and ends a run at its target."""

    def __init__(self, workload):
        super().__init__()
        self.workload = workload
        self.rollouts = 0
        self.reached = False

    def on_step(self, **kwargs):
        self.rollouts += 1
        if self.rollouts == 1:
            self.start = time.perf_counter()
        # The returns are of scaled rewards; where every step is worth 1, lengths are returns.
        lengths = kwargs["algo"].collector.episode_lengths[-100:]
        target = self.workload["target"]
        self.reached = bool(target) and len(lengths) == 100 and np.mean(lengths) >= target
        return not self.reached


workload, seed = json.loads(sys.argv[1]), int(sys.argv[2])
torch.manual_seed(seed)
torch.set_num_threads(1)
rows = workload["num_envs"] * workload["num_steps"]
watch = Watch(workload)
algorithm = PPO(
    workload["env_id"],
    n_envs=workload["num_envs"],
    seed=seed,
    callbacks=[watch],
    n_steps=workload["num_steps"],
    n_epochs=workload["update_epochs"],
    batch_size=rows // workload["num_minibatches"],
    learning_rate=workload["learning_rate"],
    clip_eps=workload["clip_coef"],
    vf_coef=workload["vf_coef"],
    ent_coef=workload["ent_coef"],
    max_grad_norm=0.5,
    gamma=0.99,
    gae_lambda=0.95,
    normalize_advantages=workload["norm_adv"],
    clip_vloss=True,
    anneal_lr=True,
    normalize_rewards=True,
    normalize_obs=True,
)
algorithm.train(workload["iterations"] * rows)
seconds = time.perf_counter() - watch.start
print((watch.rollouts - 1) * rows / seconds, "steps/s")
print("reached" if watch.reached else "ended", f"at step {watch.rollouts * rows}")
