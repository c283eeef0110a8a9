"""A workload of speed.py, in JSON, with the PPO of rejax, and a seed.

Environment and update are one program compiled by JAX; the environments are gymnax's. Its learning
rate is constant, its initialisation is flax's, and gradients are clipped by value.
"""

import json
import sys
import time

import jax
from rejax import PPO

workload, seed = json.loads(sys.argv[1]), int(sys.argv[2])
rows = workload["num_envs"] * workload["num_steps"]
steps = workload["iterations"] * rows
algorithm = PPO.create(
    env=workload["env_id"],
    num_envs=workload["num_envs"],
    num_steps=workload["num_steps"],
    num_epochs=workload["update_epochs"],
    num_minibatches=workload["num_minibatches"],
    learning_rate=workload["learning_rate"],
    max_grad_norm=0.5,
    total_timesteps=steps,
    eval_freq=steps,
    skip_initial_evaluation=True,
    gamma=0.99,
    gae_lambda=0.95,
    clip_eps=workload["clip_coef"],
    ent_coef=workload["ent_coef"],
    vf_coef=workload["vf_coef"],
    normalize_observations=True,
    normalize_rewards=True,
    agent_kwargs={"activation": "tanh", "hidden_layer_sizes": (64, 64)},
)
algorithm = algorithm.replace(eval_callback=lambda *_: ())
train = jax.jit(algorithm.train).lower(jax.random.PRNGKey(seed)).compile()
start = time.perf_counter()
jax.block_until_ready(train(jax.random.PRNGKey(seed)))
print(steps / (time.perf_counter() - start), "steps/s")
