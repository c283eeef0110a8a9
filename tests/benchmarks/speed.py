"""Steps per second of ppo.py and Stable-Baselines3's PPO on the same work, alternately, in fresh processes.

    python tests/benchmarks/speed.py

The same environment, networks, rollouts, minibatches, epochs and normalisation on both sides, each of them
given explicitly, on one torch thread. Start-up is left out on both sides.
"""

import argparse
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import gymnasium
import stable_baselines3
import torch

PPO = Path(__file__).parents[2] / "ppo.py"
ENV_ID, NUM_ENVS, NUM_STEPS = "CartPole-v1", 4, 128

FLAGS = f"""--env-id {ENV_ID} --num-envs {NUM_ENVS} --num-steps {NUM_STEPS} --vectorization-mode sync
    --num-minibatches 4 --update-epochs 4 --learning-rate 2.5e-4 --anneal-lr --gamma 0.99 --gae-lambda 0.95
    --norm-adv --clip-coef 0.2 --clip-vloss --ent-coef 0.01 --vf-coef 0.5 --max-grad-norm 0.5 --target-kl None
    --hidden-sizes 64 64 --activation tanh --norm-obs --norm-reward --device cpu --eval-episodes 0
    --checkpoint-interval 0"""

STABLE_BASELINES3 = f"""
import sys, time, torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
steps, seed = map(int, sys.argv[1:])
torch.set_num_threads(1)
envs = VecNormalize(make_vec_env("{ENV_ID}", {NUM_ENVS}, seed=seed, vec_env_cls=DummyVecEnv), gamma=0.99)
model = PPO("MlpPolicy", envs, n_steps={NUM_STEPS}, batch_size={NUM_ENVS * NUM_STEPS // 4}, n_epochs=4,
            learning_rate=lambda remaining: 2.5e-4 * remaining, gamma=0.99, gae_lambda=0.95,
            normalize_advantage=True, clip_range=0.2, clip_range_vf=0.2, ent_coef=0.01, vf_coef=0.5,
            max_grad_norm=0.5, target_kl=None, seed=seed, device="cpu",
            policy_kwargs=dict(net_arch=[64, 64], activation_fn=torch.nn.Tanh))
start = time.perf_counter()
model.learn(steps)
print(steps / (time.perf_counter() - start), "steps/s")
"""


def measure(command):
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        out = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True).stdout
    return float(re.findall(r"([\d,.]+) steps/s", out)[-1].replace(",", ""))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5, help="of each program")
    parser.add_argument("--steps", type=int, default=102_400, help="of each run")
    options = parser.parse_args()
    versions = f"torch {torch.__version__}, gymnasium {gymnasium.__version__}"
    print(
        f"Python {platform.python_version()}, {versions}, stable-baselines3 {stable_baselines3.__version__}"
    )
    print(f"{os.cpu_count()} cores, {options.runs} alternating runs of {options.steps:,} steps\n")
    ours, theirs = [], []
    for seed in map(str, range(1, options.runs + 1)):
        ours.append(
            measure(
                [sys.executable, PPO, *FLAGS.split(), "--total-timesteps", str(options.steps), "--seed", seed]
            )
        )
        theirs.append(measure([sys.executable, "-c", STABLE_BASELINES3, str(options.steps), seed]))
    print(f"| {ENV_ID}, {NUM_ENVS} x {NUM_STEPS} | median steps/s | min | max |")
    print("|---|---|---|---|")
    for name, speeds in (("ppo.py", ours), ("Stable-Baselines3", theirs)):
        print(f"| {name} | {statistics.median(speeds):,.0f} | {min(speeds):,.0f} | {max(speeds):,.0f} |")
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    print(f"\nratio: median {statistics.median(ratios):.2f}, min {min(ratios):.2f}, max {max(ratios):.2f}")


if __name__ == "__main__":
    main()
