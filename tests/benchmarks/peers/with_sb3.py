"""A workload of speed.py, in JSON, with the PPO of Stable-Baselines3 or of SBX, and a seed.

    python with_sb3.py stable_baselines3 '{"env_id": ...}' 1

SBX is told what it can be told: its value loss is not clipped, and its target of the KL divergence
changes the learning rate instead of ending an update, so that it is left out.
"""

import importlib
import json
import sys
import time

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize


class Watch(BaseCallback):
    """Starts the clock when everything is compiled, and ends a run that has reached its target."""

    def __init__(self, target):
        super().__init__()
        self.target = target
        self.rollouts = 0

    def _on_step(self):
        return not self.reached

    def _on_rollout_start(self):
        self.rollouts += 1
        if self.rollouts <= 2:  # SBX compiles in the first rollout and its update
            self.start = time.perf_counter()
            self.start_steps = self.num_timesteps
        returns = [episode["r"] for episode in self.model.ep_info_buffer]
        self.reached = len(returns) == 100 and np.mean(returns) >= (self.target or np.inf)


def main():
    library, workload, seed = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    module = importlib.import_module(library)
    is_sbx = library == "sbx"
    if ":" in workload["env_id"]:
        importlib.import_module(workload["env_id"].split(":")[0])
    env_id = workload["env_id"].split(":")[-1]
    rows = workload["num_envs"] * workload["num_steps"]
    if workload["is_game"]:
        envs = make_atari_env(env_id, workload["num_envs"], seed, vec_env_cls=DummyVecEnv)
        envs = VecFrameStack(envs, 4)
        policy = "CnnPolicy"
        network = {}
    else:
        envs = make_vec_env(env_id, workload["num_envs"], seed, vec_env_cls=DummyVecEnv)
        envs = VecNormalize(envs, clip_obs=10.0, clip_reward=10.0, gamma=0.99)
        policy = "MlpPolicy"
        network = {"net_arch": {"pi": [64, 64], "vf": [64, 64]}}
    if not is_sbx:
        network["optimizer_kwargs"] = {"eps": 1e-5}  # the default of SBX
    flags = {}
    if not is_sbx:
        flags["clip_range_vf"] = workload["clip_coef"]
        if workload["target_kl"] is not None:
            flags["target_kl"] = workload["target_kl"] / 1.5  # it stops at 1.5 times this
    model = module.PPO(
        policy,
        envs,
        n_steps=workload["num_steps"],
        batch_size=rows // workload["num_minibatches"],
        n_epochs=workload["update_epochs"],
        learning_rate=lambda remaining: workload["learning_rate"] * remaining,
        gamma=0.99,
        gae_lambda=0.95,
        normalize_advantage=workload["norm_adv"],
        clip_range=workload["clip_coef"],
        ent_coef=workload["ent_coef"],
        vf_coef=workload["vf_coef"],
        max_grad_norm=0.5,
        seed=seed,
        device="cpu",
        policy_kwargs={"ortho_init": True, "log_std_init": workload["log_std_init"], **network},
        **flags,
    )
    watch = Watch(workload["target"])
    model.learn(workload["iterations"] * rows, callback=watch)
    seconds = time.perf_counter() - watch.start
    print((model.num_timesteps - watch.start_steps) / seconds, "steps/s")
    print("reached" if watch.reached else "ended", f"at step {model.num_timesteps}")


main()
