"""How fast ppo.py is, beside Stable-Baselines3's PPO on the same work and beside what the environments allow.

    python tests/benchmarks/speed.py                       # the table, three quarters of an hour on two cores
    python tests/benchmarks/speed.py --only cartpole-4     # some of its rows
    python tests/benchmarks/speed.py --profile cartpole-4  # where the time of one workload goes
    python tests/benchmarks/speed.py --modes               # which --vectorization-mode for which environment

Both programs get every setting explicitly: the same environments, networks, rollouts, minibatches, epochs and
normalisation. Each run is a process of its own on one torch thread, and the programs take turns. Steps per
second leave the start-up out, on both sides; it has a line of its own. The bound is stepping the same vector
environment with random actions. Memory is the peak of the resident set of the whole process.
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
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
PPO = HERE.parents[1] / "ppo.py"
BOTH = ("sync", "vector_entry_point")


@dataclasses.dataclass
class Workload:
    """What both programs do, in `iterations` that take some seconds."""

    env_id: str
    num_envs: int
    num_steps: int
    iterations: int
    num_minibatches: int = 4
    update_epochs: int = 4
    modes: tuple = ("sync",)

    def flags(self, mode, iterations):
        return f"""--env-id {self.env_id} --num-envs {self.num_envs} --vectorization-mode {mode}
            --num-steps {self.num_steps} --total-timesteps {iterations * self.num_envs * self.num_steps}
            --num-minibatches {self.num_minibatches} --update-epochs {self.update_epochs}
            --learning-rate 2.5e-4 --anneal-lr --gamma 0.99 --gae-lambda 0.95 --norm-adv --clip-coef 0.2
            --no-anneal-clip --clip-vloss --dual-clip None --ent-coef 0.01 --vf-coef 0.5 --max-grad-norm 0.5
            --target-kl None --no-recompute-advantages --hidden-sizes 64 64 --activation tanh
            --log-std-init 0 --norm-obs --norm-reward --device cpu --eval-episodes 0
            --checkpoint-interval 0""".split()


WORKLOADS = {
    "cartpole-4": Workload("CartPole-v1", 4, 128, 120),
    "cartpole-16": Workload("CartPole-v1", 16, 128, 60, modes=BOTH),
    "cartpole-64": Workload("CartPole-v1", 64, 128, 30, modes=BOTH),
    "cartpole-256": Workload("CartPole-v1", 256, 128, 12, modes=BOTH),
    "acrobot-8": Workload("Acrobot-v1", 8, 128, 40),
    "pendulum-4": Workload("Pendulum-v1", 4, 1024, 15),
    "halfcheetah-1": Workload("HalfCheetah-v5", 1, 2048, 6, num_minibatches=32, update_epochs=10),
    "halfcheetah-8": Workload("HalfCheetah-v5", 8, 256, 8, num_minibatches=32, update_epochs=10),
    "made-up-8": Workload("made_up:MadeUp-v0", 8, 256, 30),
}

STABLE_BASELINES3 = """
import json, sys, time
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
w, seed = json.loads(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
if ":" in w["env_id"]:
    __import__(w["env_id"].split(":")[0])
rows = w["num_envs"] * w["num_steps"]
envs = make_vec_env(w["env_id"].split(":")[-1], w["num_envs"], seed, vec_env_cls=DummyVecEnv)
envs = VecNormalize(envs, norm_obs=True, norm_reward=True, clip_obs=10.0, clip_reward=10.0, gamma=0.99)
model = PPO("MlpPolicy", envs, n_steps=w["num_steps"], batch_size=rows // w["num_minibatches"],
            n_epochs=w["update_epochs"], learning_rate=lambda remaining: 2.5e-4 * remaining, gamma=0.99,
            gae_lambda=0.95, normalize_advantage=True, clip_range=0.2, clip_range_vf=0.2, ent_coef=0.01,
            vf_coef=0.5, max_grad_norm=0.5, target_kl=None, seed=seed, device="cpu",
            policy_kwargs=dict(net_arch=[64, 64], activation_fn=torch.nn.Tanh, log_std_init=0.0))
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
actions, count, start = [envs.action_space.sample() for _ in range(100)], 0, time.perf_counter()
while time.perf_counter() - start < 1:
    for action in actions:
        envs.step(action)
    count += 100 * w["num_envs"]
print(count / (time.perf_counter() - start), "steps/s")
"""

BARE_IMPORTS = "import torch, gymnasium; from torch.utils.tensorboard import SummaryWriter"


def run(*command):
    """Run Python with these arguments to its end.

    Returns the steps/s that it printed last, megabytes, seconds, and how many processors it kept busy.
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "out"), "w+") as out:
        command, start = [sys.executable, *map(str, command)], time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=out, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        text = out.read()
    if process.returncode:
        sys.exit(f"{command} failed:\n{text}")
    speeds = re.findall(r"([\d,.]+) steps/s", text)
    megabytes = usage.ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024)
    speed = float(speeds[-1].replace(",", "")) if speeds else None
    return speed, megabytes, seconds, (usage.ru_utime + usage.ru_stime) / seconds


def spread(values, digits=0):
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def compare(names, runs):
    """Print a row for each workload and mode: medians, and in brackets from the lowest to the highest."""
    print("| | ppo.py, steps/s | SB3, steps/s | ratio | bound, steps/s | share | MB, ppo.py | MB, SB3 |")
    print("|---|---|---|---|---|---|---|---|")
    medians = {}
    for name in names:
        workload = WORKLOADS[name]
        spec = json.dumps(dataclasses.asdict(workload))
        rounds = []
        for seed in range(1, runs + 1):
            ours = {
                mode: run(PPO, *workload.flags(mode, workload.iterations), "--seed", seed)
                for mode in workload.modes
            }
            theirs = run("-c", STABLE_BASELINES3, spec, seed)
            rounds.append((ours, theirs, {m: run("-c", RANDOM_ACTIONS, spec, m)[0] for m in workload.modes}))
        for mode in workload.modes:
            ours, theirs, bounds = (
                [x[0][mode] for x in rounds],
                [x[1] for x in rounds],
                [x[2] for x in rounds],
            )
            ratios = [a[0] / b[0] for a, b in zip(ours, theirs, strict=True)]
            share = statistics.median(a[0] / b[mode] for a, b in zip(ours, bounds, strict=True))
            medians[name, mode] = statistics.median(x[0] for x in ours)
            cells = (
                f"{workload.env_id.split(':')[-1]}, {workload.num_envs} x {workload.num_steps}"
                + (f", {mode}" if mode != "sync" else ""),
                spread([x[0] for x in ours]),
                spread([x[0] for x in theirs]),
                spread(ratios, 2),
                f"{statistics.median(b[mode] for b in bounds):,.0f}",
                f"{share:.0%}",
                *(f"{statistics.median(x[1] for x in program):,.0f}" for program in (ours, theirs)),
            )
            print(f"| {' | '.join(cells)} |", flush=True)
    one, many = ("cartpole-4", "sync"), ("cartpole-256", "vector_entry_point")
    if one in medians and many in medians:
        print(f"\nsteps/s of 256 environments over those of 4: {medians[many] / medians[one]:.1f}")


def start_up(runs):
    """Print the seconds from the command to the end of a run of one iteration, and of the bare imports."""
    seconds = collections.defaultdict(list)
    one = dataclasses.replace(WORKLOADS["cartpole-4"], iterations=1)
    for seed in range(runs + 1):
        seconds["ppo.py"].append(run(PPO, *one.flags("sync", 1))[2])
        seconds["bare imports"].append(run("-c", BARE_IMPORTS)[2])
        seconds["SB3"].append(run("-c", STABLE_BASELINES3, json.dumps(dataclasses.asdict(one)), seed)[2])
    warm = {name: x[1:] for name, x in seconds.items()}  # the first reads the files from the disk
    ratios = [a / b for a, b in zip(warm["ppo.py"], warm["bare imports"], strict=True)]
    print(f"\nstart to the end of the first iteration: {spread(warm['ppo.py'], 2)} s")
    print(f"importing torch, gymnasium and tensorboard alone: {spread(warm['bare imports'], 2)} s")
    print(f"ratio: {spread(ratios, 2)}; SB3's first iteration: {spread(warm['SB3'], 2)} s")


class Clock:
    """Adds up the time spent in functions, each replaced by one that is timed."""

    def __init__(self):
        self.seconds, self.calls = collections.Counter(), collections.Counter()
        self.begin, self.end = {}, {}  # of the first and the last call

    def time(self, owner, name, label):
        function = getattr(owner, name)

        def timed(*args, **kwargs):
            start = time.perf_counter()
            self.begin.setdefault(label, start)
            try:
                return function(*args, **kwargs)
            finally:
                self.end[label] = time.perf_counter()
                self.seconds[label] += self.end[label] - start
                self.calls[label] += 1

        setattr(owner, name, timed)


def profile(name, mode):
    """Print the time of an iteration by phase, taken from outside at the functions that ppo.py is made of."""
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
        updated = time.perf_counter()
        log(*args)
        start, acted = clock.begin["Agent.act"], clock.begin["logprob_and_value"]
        valued, logged = clock.end["gae"], time.perf_counter()
        phases = {"rollout": acted - start, "advantages": valued - acted}
        iterations.append((phases | {"update": updated - valued, "log": logged - updated}, *clock_reading()))

    def clock_reading():
        reading = dict(clock.seconds), dict(clock.calls)
        for times in (clock.seconds, clock.calls, clock.begin, clock.end):
            times.clear()
        return reading

    ppo.make_envs, ppo.Run.log = timed_envs, timed_log
    parts = {
        "rollout": {"envs.step": None, "Agent.act": ppo.Agent, "Agent.to_env": ppo.Agent},
        "advantages": {"logprob_and_value": ppo, "gae": ppo},
        "update": {"ppo_loss": ppo, "torch.autograd.grad": torch.autograd, "Adam.step": ppo.Adam},
        "log": {},
    }
    for owners in parts.values():
        for label, owner in owners.items():
            if owner is not None:
                clock.time(owner, label.split(".")[-1], label)
    workload = WORKLOADS[name]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        ppo.train(ppo.tyro.cli(ppo.Args, args=workload.flags(mode, workload.iterations)))
        os.chdir(HERE)
    iterations = iterations[2:]  # the first ones are slower

    def median(index, label):
        return statistics.median(x[index].get(label, 0) for x in iterations)

    total = sum(median(0, phase) for phase in parts)
    print(f"\n{name}, {mode}: {total * 1e3:.1f} ms an iteration, by medians\n")
    print("| phase | ms | share | calls | us a call |\n|---|---|---|---|---|")
    for phase, labels in parts.items():
        print(f"| **{phase}** | {median(0, phase) * 1e3:.2f} | {median(0, phase) / total:.0%} | | |")
        for label in labels:
            seconds, calls = median(1, label), median(2, label)
            cells = (
                f"{seconds * 1e3:.2f} | {seconds / total:.0%} | {calls:.0f} | {seconds / calls * 1e6:,.0f}"
            )
            print(f"| {label} | {cells} |")
        rest = median(0, phase) - sum(median(1, label) for label in labels)
        if labels:
            print(f"| the rest | {rest * 1e3:.2f} | {rest / total:.0%} | | |")


def modes(runs):
    """Print steps/s of the modes, and the processors kept busy, for steps that take longer and longer."""
    print("| 8 environments | sync | async | vector_entry_point |\n|---|---|---|---|")
    base = dataclasses.replace(WORKLOADS["cartpole-4"], num_envs=8, iterations=20)
    cases = [("CartPole-v1, about 0.01 ms a step", base, {}, (*BOTH, "async"))]
    for work in (0.03, 0.1, 0.3, 1.0, 3.0):
        workload = dataclasses.replace(base, env_id="made_up:MadeUp-v0", num_steps=64)
        cases.append((f"made up, {work} ms a step", workload, {"work": work}, ("sync", "async")))
    for title, workload, kwargs, names in cases:
        results = collections.defaultdict(list)
        for _ in range(runs):
            for mode in names:
                flags = workload.flags(mode, workload.iterations)
                results[mode].append(run(PPO, *flags, "--env-kwargs", json.dumps(kwargs)))
        cells = [title]
        for mode in ("sync", "async", "vector_entry_point"):
            speeds, _, _, cores = zip(*results[mode], strict=True) if mode in results else ((), (), (), ())
            cells.append(f"{spread(speeds)}, {statistics.median(cores):.1f} busy" if speeds else "")
        print(f"| {' | '.join(cells)} |", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5, help="of each program")
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, help="rows of the table")
    parser.add_argument("--profile", choices=WORKLOADS, help="print where the time of this workload goes")
    parser.add_argument("--mode", choices=BOTH, default="sync", help="of the environments that are profiled")
    parser.add_argument("--modes", action="store_true", help="compare the vectorization modes")
    options = parser.parse_args()
    packages = ("torch", "gymnasium", "numpy", "mujoco", "stable-baselines3")
    print(f"Python {platform.python_version()}, {', '.join(f'{x} {version(x)}' for x in packages)}")
    model = (
        re.search("model name\t: (.*)", Path("/proc/cpuinfo").read_text())
        if sys.platform == "linux"
        else None
    )
    processor = model[1] if model else platform.processor()
    print(f"{processor}, {os.cpu_count()} cores; median (lowest to highest) of {options.runs} runs\n")
    if options.profile:
        profile(options.profile, options.mode)
    elif options.modes:
        modes(options.runs)
    else:
        compare(options.only or WORKLOADS, options.runs)
        if not options.only:
            start_up(options.runs)


if __name__ == "__main__":
    main()
