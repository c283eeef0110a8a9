"""How fast ppo.py is, beside Stable-Baselines3's PPO (SB3) on the same work and beside its
environments.

    python tests/benchmarks/speed.py                       # the table, a quarter of an hour
    python tests/benchmarks/speed.py --only cartpole-4     # some of its rows
    python tests/benchmarks/speed.py --against old/ppo.py  # beside another ppo.py, not SB3
    python tests/benchmarks/speed.py --profile cartpole-4  # where the time of one workload goes
    python tests/benchmarks/speed.py --modes               # which --vectorization-mode for what

Both programs are given the same environments, networks, initialisation, optimizer, rollouts,
minibatches, epochs and normalisation, each of them explicitly. SB3 steps environments one by one
in any case; in the rows that say so, ppo.py steps the environment's own vector version. Each run
is a process of its own on one torch thread (with images: on as many as torch likes), and the
programs take turns. Steps per second leave the start-up out, on both sides. The bound is stepping
the same vector environment with random actions. Memory is the peak of the process's resident set.
Games are played under the same conditions, by ALE's vector version in ppo.py and by the wrappers
of SB3 in SB3, and rewards are clipped by sign instead of normalised.

In the steps of ppo.py and of the bound are those that only reset an environment, 0.3 to 2 % of
all (with random actions 4 % on CartPole); SB3 resets within the step that ends an episode. ppo.py
writes TensorBoard's files and SB3 none. SB3 updates its running statistics in every step, ppo.py
after every rollout.
"""

import argparse
import collections
import dataclasses
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
PPO = HERE.parents[1] / "ppo.py"
SYNC, NATIVE = "sync", "vector_entry_point"


@dataclasses.dataclass
class Workload:
    """What both programs do, in `iterations` that take some seconds."""

    env_id: str
    num_envs: int
    num_steps: int
    iterations: int
    num_minibatches: int = 4
    update_epochs: int = 4
    modes: tuple = (SYNC,)
    clip_coef: float = 0.2
    is_game: bool = False

    @property
    def threads(self):
        """What OMP_NUM_THREADS is to be (None: left alone)."""
        return None if self.is_game else "1"

    def flags(self, mode):
        timesteps = self.iterations * self.num_envs * self.num_steps
        scaling = "--norm-obs --norm-reward --no-clip-reward"
        if self.is_game:
            scaling = "--no-norm-obs --no-norm-reward --clip-reward"
        return f"""--preset none --env-id {self.env_id} --num-envs {self.num_envs}
            --vectorization-mode {mode} --num-steps {self.num_steps} --total-timesteps {timesteps}
            --num-minibatches {self.num_minibatches} --update-epochs {self.update_epochs}
            --learning-rate 2.5e-4 --anneal-lr --gamma 0.99 --gae-lambda 0.95 --norm-adv
            --clip-coef {self.clip_coef} --no-anneal-clip --clip-vloss --dual-clip None
            --ent-coef 0.01 --vf-coef 0.5 --max-grad-norm 0.5 --target-kl None
            --no-recompute-advantages --hidden-sizes 64 64 --activation tanh --log-std-init 0
            {scaling} --device cpu --eval-episodes 0 --checkpoint-interval 1_000_000""".split()


WORKLOADS = {
    "cartpole-4": Workload("CartPole-v1", 4, 128, 120),
    "cartpole-16": Workload("CartPole-v1", 16, 128, 60, modes=(SYNC, NATIVE)),
    "cartpole-64": Workload("CartPole-v1", 64, 128, 30, modes=(SYNC, NATIVE)),
    "cartpole-256": Workload("CartPole-v1", 256, 128, 12, modes=(SYNC, NATIVE)),
    "acrobot-8": Workload("Acrobot-v1", 8, 128, 40),
    "pendulum-4": Workload("Pendulum-v1", 4, 1024, 15),
    "halfcheetah-1": Workload("HalfCheetah-v5", 1, 2048, 6, num_minibatches=32, update_epochs=10),
    "halfcheetah-8": Workload("HalfCheetah-v5", 8, 256, 8, num_minibatches=32, update_epochs=10),
    "made-up-8": Workload("made_up:MadeUp-v0", 8, 256, 30),
    "breakout-8": Workload(
        "ale_py:ALE/Breakout-v5", 8, 128, 8, modes=(NATIVE,), clip_coef=0.1, is_game=True
    ),
}

STABLE_BASELINES3 = """
import json, sys, time
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize
w, seed = json.loads(sys.argv[1]), int(sys.argv[2])
if ":" in w["env_id"]:
    __import__(w["env_id"].split(":")[0])
rows = w["num_envs"] * w["num_steps"]
env_id = w["env_id"].split(":")[-1]
if w["is_game"]:
    envs = make_atari_env(env_id, w["num_envs"], seed, vec_env_cls=DummyVecEnv)
    envs = VecFrameStack(envs, 4)
    policy, network = "CnnPolicy", dict()
else:
    envs = make_vec_env(env_id, w["num_envs"], seed, vec_env_cls=DummyVecEnv)
    envs = VecNormalize(envs, norm_obs=True, norm_reward=True, clip_obs=10.0, clip_reward=10.0,
                        gamma=0.99)
    policy = "MlpPolicy"
    network = dict(net_arch=dict(pi=[64, 64], vf=[64, 64]), activation_fn=torch.nn.Tanh)
model = PPO(policy, envs, n_steps=w["num_steps"], batch_size=rows // w["num_minibatches"],
            n_epochs=w["update_epochs"], learning_rate=lambda remaining: 2.5e-4 * remaining,
            gamma=0.99, gae_lambda=0.95, normalize_advantage=True, clip_range=w["clip_coef"],
            clip_range_vf=w["clip_coef"], ent_coef=0.01,
            vf_coef=0.5, max_grad_norm=0.5, target_kl=None, seed=seed, device="cpu",
            policy_kwargs=dict(ortho_init=True, log_std_init=0.0, optimizer_kwargs=dict(eps=1e-5),
                               **network))
start = time.perf_counter()
model.learn(w["iterations"] * rows)
print(w["iterations"] * rows / (time.perf_counter() - start), "steps/s")
"""

RANDOM_ACTIONS = """
import json, sys, time
import gymnasium as gym
w, mode = json.loads(sys.argv[1]), sys.argv[2]
envs = gym.make_vec(w["env_id"], w["num_envs"], mode)
envs.action_space.seed(0)
envs.reset(seed=0)
actions = [envs.action_space.sample() for _ in range(100)]
for action in actions:
    envs.step(action)
count, start = 0, time.perf_counter()
while time.perf_counter() - start < 2:
    for action in actions:
        envs.step(action)
    count += 100 * w["num_envs"]
print(count / (time.perf_counter() - start), "steps/s")
"""

BARE_IMPORTS = "import torch, gymnasium; from torch.utils.tensorboard import SummaryWriter"


class Result(NamedTuple):
    speed: float | None  # steps/s, the last that the program printed
    megabytes: float
    seconds: float
    busy: float  # processors, on average


def run(*command, threads="1"):
    """Run Python with these arguments to its end, on so many torch threads (None: torch's own)."""
    env = {**os.environ, "PYTHONPATH": str(HERE)}
    if threads is not None:
        env["OMP_NUM_THREADS"] = threads
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "out"), "w+") as out:
        command, start = [sys.executable, *map(str, command)], time.perf_counter()
        process = subprocess.Popen(
            command, cwd=folder, env=env, stdout=out, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        text = out.read()
    if process.returncode:
        sys.exit(f"{command} failed:\n{text}")
    speeds = re.findall(r"([\d,.]+) steps/s", text)
    speed = float(speeds[-1].replace(",", "")) if speeds else None
    megabytes = usage.ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024)
    return Result(speed, megabytes, seconds, (usage.ru_utime + usage.ru_stime) / seconds)


def spread(values, form=",.0f"):
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def compare(names, runs):
    """Print a row for each workload and mode: medians, in brackets the lowest and the highest."""
    print(
        "| | ppo.py, steps/s | SB3, steps/s | ratio "
        "| bound, steps/s | share | MB, ppo.py | MB, SB3 |"
    )
    print("|---|---|---|---|---|---|---|---|")
    medians = {}
    for name in names:
        workload, results = WORKLOADS[name], collections.defaultdict(list)
        spec = json.dumps(dataclasses.asdict(workload))
        for seed in range(1, runs + 1):
            commands = {"SB3": ("-c", STABLE_BASELINES3, spec, seed)}
            for mode in workload.modes:
                commands["ppo.py", mode] = (PPO, *workload.flags(mode), "--seed", seed)
                commands["bound", mode] = ("-c", RANDOM_ACTIONS, spec, mode)
            for program in list(commands)[:: 1 if seed % 2 else -1]:  # who goes first changes
                results[program].append(run(*commands[program], threads=workload.threads))
        for mode in workload.modes:
            ours, theirs, bound = results["ppo.py", mode], results["SB3"], results["bound", mode]
            shares = [a.speed / b.speed for a, b in zip(ours, bound, strict=True)]
            medians[name, mode] = statistics.median(x.speed for x in ours)
            cells = [
                f"{workload.env_id.split(':')[-1]}, {workload.num_envs} x {workload.num_steps}",
                spread([x.speed for x in ours]),
                spread([x.speed for x in theirs]),
                spread([a.speed / b.speed for a, b in zip(ours, theirs, strict=True)], ",.2f"),
                f"{statistics.median(x.speed for x in bound):,.0f}",
                f"{statistics.median(shares):.0%}",
                f"{statistics.median(x.megabytes for x in ours):,.0f}",
                f"{statistics.median(x.megabytes for x in theirs):,.0f}",
            ]
            cells[0] += ", its own vector version" if mode == NATIVE else ""
            print(f"| {' | '.join(cells)} |", flush=True)
    few, many = ("cartpole-4", SYNC), ("cartpole-256", NATIVE)
    if few in medians and many in medians:
        print(f"\nsteps/s of 256 environments over those of 4: {medians[many] / medians[few]:.1f}")


def compare_versions(names, runs, other):
    """Print steps/s of this ppo.py and of another one, which take turns, and their ratio."""
    print(f"| | ppo.py, steps/s | {other}, steps/s | ratio |\n|---|---|---|---|")
    for name in names:
        workload, speeds = WORKLOADS[name], {PPO: [], other: []}
        for seed in range(1, runs + 1):
            for program in list(speeds)[:: 1 if seed % 2 else -1]:  # who goes first changes
                flags = workload.flags(workload.modes[0])
                result = run(program, *flags, "--seed", seed, threads=workload.threads)
                speeds[program].append(result.speed)
        ratios = [a / b for a, b in zip(speeds[PPO], speeds[other], strict=True)]
        cells = [name, spread(speeds[PPO]), spread(speeds[other]), spread(ratios, ",.2f")]
        print(f"| {' | '.join(cells)} |", flush=True)


def start_up(runs):
    """Print the seconds of a run of one iteration, from its command to its exit, and of imports."""
    one, seconds = (
        dataclasses.replace(WORKLOADS["cartpole-4"], iterations=1),
        collections.defaultdict(list),
    )
    spec = json.dumps(dataclasses.asdict(one))
    for seed in range(runs + 1):
        seconds["ppo.py"].append(run(PPO, *one.flags(SYNC)).seconds)
        seconds["imports"].append(run("-c", BARE_IMPORTS).seconds)
        seconds["SB3"].append(run("-c", STABLE_BASELINES3, spec, seed).seconds)
    warm = {
        name: x[1:] for name, x in seconds.items()
    }  # the first may have read the files from the disk
    ratios = [a / b for a, b in zip(warm["ppo.py"], warm["imports"], strict=True)]
    ours, imports, theirs = (spread(warm[name], ".2f") for name in ("ppo.py", "imports", "SB3"))
    print(f"\na run of one iteration, from the command to its exit: {ours} s")
    print(f"importing torch, gymnasium and tensorboard alone: {imports} s")
    print(f"ratio: {spread(ratios, '.2f')}; SB3's run of one iteration: {theirs} s")


class Clock:
    """Adds up the time spent in functions, each replaced by one that is timed."""

    def __init__(self):
        self.seconds, self.calls = collections.Counter(), collections.Counter()

    def time(self, owner, name, label):
        function = getattr(owner, name)

        def timed(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds[label] += time.perf_counter() - start
            self.calls[label] += 1
            return result

        setattr(owner, name, timed)


def profile(name, mode):
    """Print the time of an iteration by phase, taken at the functions that ppo.py is made of."""
    sys.path[:0] = [str(PPO.parent), str(HERE)]
    import torch

    import ppo

    clock, make_envs, log = Clock(), ppo.make_envs, ppo.Run.log
    iterations = []  # of each: its phases, the parts of these, and calls

    def timed_envs(*args):
        envs = make_envs(*args)
        clock.time(envs, "step", "envs.step")
        return envs

    def timed_log(*args):
        start = time.perf_counter()
        log(*args)
        phases = {
            name: clock.seconds[name] for name in ("collect", "estimate_advantages", "update")
        }
        phases["log"] = time.perf_counter() - start
        iterations.append((phases, dict(clock.seconds), dict(clock.calls)))
        clock.seconds.clear()
        clock.calls.clear()

    ppo.make_envs, ppo.Run.log = timed_envs, timed_log
    adam = torch.optim.Adam
    parts = {
        "collect": {"envs.step": None, "Agent.act": ppo.Agent, "Agent.to_env": ppo.Agent},
        "estimate_advantages": {"logprob_and_value": ppo, "gae": ppo},
        "update": {
            "ppo_loss": ppo,
            "Tensor.backward": torch.Tensor,
            "clip_gradients": ppo,
            "Adam.zero_grad": adam,
            "Adam.step": adam,
        },
        "log": {},
    }
    for phase in ("collect", "estimate_advantages", "update"):
        clock.time(ppo, phase, phase)
    for owners in parts.values():
        for label, owner in owners.items():
            if owner is not None:  # envs.step is timed where the environments are made
                clock.time(owner, label.split(".")[-1], label)
    workload = WORKLOADS[name]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        ppo.train(ppo.tyro.cli(ppo.Args, args=workload.flags(mode)))
        os.chdir(HERE)  # the folder is about to go
    print(f"\n{name}, {mode}, by medians over the iterations\n")
    print_profile(parts, iterations)


def print_profile(parts, iterations):
    """Print a row for each phase, and for each function that is timed within it."""
    phases, seconds, calls = zip(*iterations[2:], strict=True)  # the first ones are slower

    def median(column, label):
        return statistics.median(x[label] for x in column)

    total = sum(median(phases, phase) for phase in parts)
    print(f"an iteration takes {total * 1e3:.1f} ms\n")
    print("| phase | ms | share | calls | us a call |\n|---|---|---|---|---|")
    for phase, labels in parts.items():
        whole = rest = median(phases, phase)
        print(f"| **{phase}** | {whole * 1e3:.2f} | {whole / total:.0%} | | |")
        for label in labels:
            part, count = median(seconds, label), median(calls, label)
            rest -= part
            print(f"| {label} | {part * 1e3:.2f} | {part / total:.0%} ", end="")
            print(f"| {count:.0f} | {part / count * 1e6:,.0f} |")
        if labels:
            print(f"| the rest | {rest * 1e3:.2f} | {rest / total:.0%} | | |")


def modes(runs):
    """Print steps/s of the modes and the processors kept busy, for ever slower steps."""
    print("| 8 environments | sync | async | vector_entry_point |\n|---|---|---|---|")
    base = dataclasses.replace(WORKLOADS["cartpole-4"], num_envs=8, iterations=100)
    cases = [("CartPole-v1, about 0.01 ms a step", base, {}, (SYNC, "async", NATIVE))]
    for work, iterations in (0.03, 80), (0.1, 60), (0.3, 40), (1.0, 20), (3.0, 10):
        title = f"made up, {work} ms a step"
        slow = dataclasses.replace(
            base, env_id="made_up:MadeUp-v0", num_steps=64, iterations=iterations
        )
        cases.append((title, slow, {"work": work}, (SYNC, "async")))
    for title, workload, kwargs, names in cases:
        results = collections.defaultdict(list)
        for _ in range(runs):
            for mode in names:
                results[mode].append(
                    run(PPO, *workload.flags(mode), "--env-kwargs", json.dumps(kwargs))
                )
        cells = []
        for mode in (SYNC, "async", NATIVE):
            busy = [x.busy for x in results[mode]]
            speeds = [x.speed for x in results[mode]]
            cells.append(f"{spread(speeds)}, {statistics.median(busy):.1f} busy" if speeds else "")
        print(f"| {title} | {' | '.join(cells)} |", flush=True)


def installed(package):
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5, help="of each program")
    parser.add_argument("--native", action="store_true", help=f"profile with {NATIVE}")
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, help="rows of the table")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--against", type=Path, help="compare with this other ppo.py, not with SB3")
    what.add_argument(
        "--profile", choices=WORKLOADS, help="print where the time of this workload goes"
    )
    what.add_argument("--modes", action="store_true", help="compare the vectorization modes")
    options = parser.parse_args()
    if options.runs < 1:
        parser.error("--runs must be at least 1")
    if options.native and NATIVE not in WORKLOADS[options.profile or "cartpole-4"].modes:
        parser.error(
            "--native is for the profile of a workload that has a vector version of its own"
        )
    packages = ("torch", "gymnasium", "numpy", "mujoco", "ale-py", "stable-baselines3")
    print(f"Python {platform.python_version()}, {', '.join(map(installed, packages))}")
    model = (
        re.search("model name\t: (.*)", Path("/proc/cpuinfo").read_text())
        if sys.platform == "linux"
        else None
    )
    processor = model[1] if model else platform.processor()
    load = f"load {os.getloadavg()[0]:.1f} before" if hasattr(os, "getloadavg") else ""
    print(f"{processor}, {os.cpu_count()} cores, {load}")
    if not options.profile:
        print(f"median (lowest to highest) of {options.runs} runs\n")
    if options.profile:
        workload = WORKLOADS[options.profile]
        if workload.threads is not None:
            os.environ["OMP_NUM_THREADS"] = workload.threads
        profile(options.profile, NATIVE if options.native else workload.modes[0])
    elif options.against:
        compare_versions(options.only or WORKLOADS, options.runs, options.against.resolve())
    elif options.modes:
        modes(options.runs)
    else:
        compare(options.only or WORKLOADS, options.runs)
        if not options.only:
            start_up(options.runs)


if __name__ == "__main__":
    main()
