"""A workload of speed.py, in JSON, with the PPO of RLtools, and a seed: Gymnasium's environment.

RLtools is C++, compiled for these sizes when it is first asked for them. Nothing is scaled but
advantages, and its learning rate is constant.
"""

import json
import sys
import time

import gymnasium as gym
from gymnasium.wrappers import RescaleAction
from rltools import PPO

workload, seed = json.loads(sys.argv[1]), int(sys.argv[2])
rows = workload["num_envs"] * workload["num_steps"]


def make_env():
    env = RescaleAction(gym.make(workload["env_id"]), -1, 1)
    env.reset(seed=seed)
    return env


module = PPO(
    make_env,
    enable_evaluation=False,
    interface_name="speed",
    GAMMA=0.99,
    LAMBDA=0.95,
    EPSILON_CLIP=workload["clip_coef"],
    INITIAL_ACTION_STD=1.0,
    ACTION_ENTROPY_COEFFICIENT=workload["ent_coef"],
    N_EPOCHS=workload["update_epochs"],
    STEP_LIMIT=workload["iterations"],
    ACTOR_ACTIVATION_FUNCTION="TANH",
    CRITIC_ACTIVATION_FUNCTION="TANH",
    N_ENVIRONMENTS=workload["num_envs"],
    ON_POLICY_RUNNER_STEPS_PER_ENV=workload["num_steps"],
    BATCH_SIZE=rows // workload["num_minibatches"],
    OPTIMIZER_ALPHA=workload["learning_rate"],
)
state = module.State(seed)
start = time.perf_counter()
while not state.step():
    pass
print(workload["iterations"] * rows / (time.perf_counter() - start), "steps/s")
