"""How well and how soon ppo.py learns: a row for each seed, and the spread over them.

    python tests/benchmarks/learning.py --seeds 1 2 3 4 5 --threshold 475
    python tests/benchmarks/learning.py --seeds 1 2 3 --env-id Acrobot-v1

Any further flag is ppo.py's. The return is the mean of the last 100 training episodes; the step is the one,
all environments counted together, at which the mean of 100 episodes in a row first reached the threshold.
"""

import argparse
import contextlib
import dataclasses
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[2]))
import ppo


class Recorder(gym.vector.VectorWrapper):
    """Keeps (step, return) of every episode that ends."""

    def __init__(self, envs, episodes):
        super().__init__(envs)
        self.step_count, self.episodes = 0, episodes

    def step(self, actions):
        *transition, info = super().step(actions)
        self.step_count += self.num_envs
        for value in info["raw_episode"]["r"][info["_raw_episode"]] if "_raw_episode" in info else ():
            self.episodes.append((self.step_count, value))
        return *transition, info


def run(args):
    """Train in an empty folder, silently; returns episodes (step, return) and the wall time."""
    episodes, make_envs = [], ppo.make_envs
    ppo.make_envs = lambda args: Recorder(make_envs(args), episodes)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as silence:
        os.chdir(folder)
        with contextlib.redirect_stdout(silence):
            ppo.train(dataclasses.replace(args, eval_episodes=0))
        os.chdir("/")
    return episodes, time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--threshold", type=float, help="mean return of 100 episodes to look for")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time")
    options, flags = parser.parse_known_args()
    runs = [tyro.cli(ppo.Args, args=[*flags, "--seed", str(seed)]) for seed in options.seeds]

    print(f"{runs[0].env_id}, flags {' '.join(flags) or '(defaults)'}")
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, gymnasium {gym.__version__}"
    print(f"{versions}, {os.cpu_count()} cores, {options.processes} runs at a time\n")
    print("| seed | episodes | return of the last 100 | step of the threshold | minutes |")
    print("|---|---|---|---|---|")
    finals, reached = [], []
    with multiprocessing.get_context("spawn").Pool(options.processes, maxtasksperchild=1) as pool:
        for args, (episodes, seconds) in zip(runs, pool.imap(run, runs), strict=True):
            steps, returns = np.array(episodes or [(0, np.nan)]).T
            means = np.convolve(returns, np.ones(100) / 100, "valid") if len(returns) >= 100 else np.array([])
            hits = np.flatnonzero(means >= options.threshold) if options.threshold is not None else []
            step = int(steps[99:][hits[0]]) if len(hits) else None
            finals.append(returns[-100:].mean())
            reached.append(step or np.inf)
            cells = [
                args.seed,
                len(episodes),
                f"{finals[-1]:.2f}",
                f"{step:,}" if step else "-",
                f"{seconds / 60:.1f}",
            ]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    print(f"\nreturn: mean {np.mean(finals):.2f}, std {np.std(finals):.2f}, min {min(finals):.2f}")
    if options.threshold is not None:
        print(f"step of the threshold: median {np.median(reached):,.0f}")


if __name__ == "__main__":
    main()
