"""How fast ppo.py is, beside Stable-Baselines3's PPO (SB3) and other peers on the same work.

    python tests/benchmarks/speed.py                       # beside SB3, half an hour
    python tests/benchmarks/speed.py --only cartpole-4     # some of its rows
    python tests/benchmarks/speed.py --peers folder        # beside more peers than SB3
    python tests/benchmarks/speed.py --until               # seconds until a return is reached
    python tests/benchmarks/speed.py --against old/ppo.py  # beside another ppo.py, not SB3
    python tests/benchmarks/speed.py --profile cartpole-4  # where the time of one workload goes
    python tests/benchmarks/speed.py --modes               # which --vectorization-mode for what

All programs are given the same environments, networks, initialisation, optimizer, rollouts,
minibatches, epochs and scaling, as far as they can be told; peers/ has what each is told, and says
what is different. Each run is a process of its own on one torch thread (with images: on as many as
torch likes), and the programs take turns. Steps per second leave out the start-up, and of ppo.py
and the compiled peers the first iteration; --until counts all seconds from the command to its end.
The bound is stepping the same environments with random actions. Memory is the peak of the process's
resident set.

What is not the same: SB3 steps environments one by one, while ppo.py, in the rows that say so,
steps the environment's own vector version. Games are played by ALE's vector version in ppo.py, by
the wrappers of SB3 in SB3. The steps of ppo.py and of the bound that only reset an environment
count, 0.3 to 2 % of all (with random actions 4 % on CartPole); SB3 resets within the last step of
an episode. ppo.py writes TensorBoard's files, SB3 none. SB3 updates its running statistics in every
step, ppo.py after every rollout.

SB3 comes with tests/benchmarks/requirements.txt. Other peers have virtual environments of their own
in the folder that --peers names. Those that are not there are left out, and the script prints the
command that makes them.
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

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

HERE = Path(__file__).parent
PEERS = HERE / "peers"
PPO = HERE.parents[1] / "ppo.py"
SYNC, NATIVE = "sync", "vector_entry_point"


@dataclasses.dataclass
class Workload:
    """What all programs do, in `iterations` that take some seconds."""

    env_id: str
    num_envs: int
    num_steps: int
    iterations: int
    num_minibatches: int = 4
    update_epochs: int = 4
    modes: tuple = (SYNC,)
    clip_coef: float = 0.2
    learning_rate: float = 2.5e-4
    norm_adv: bool = True
    ent_coef: float = 0.01
    vf_coef: float = 0.5
    log_std_init: float = 0.0
    target_kl: float | None = None
    recompute_advantages: bool = False
    is_game: bool = False
    target: float | None = None  # end once the mean of the last 100 training episodes is this

    @property
    def threads(self):
        """What OMP_NUM_THREADS is to be (None: left alone)."""
        return None if self.is_game else "1"

    @property
    def title(self):
        work = f"{self.env_id.split(':')[-1]}, {self.num_envs} x {self.num_steps}"
        return f"{work}, {self.update_epochs} epochs of {self.num_minibatches} minibatches"

    def flags(self, mode):
        timesteps = self.iterations * self.num_envs * self.num_steps
        scaling = "--norm-obs --norm-reward --no-clip-reward"
        if self.is_game:
            scaling = "--no-norm-obs --no-norm-reward --clip-reward"
        norm_adv = "--norm-adv" if self.norm_adv else "--no-norm-adv"
        recompute = "--recompute-advantages" if self.recompute_advantages else ""
        return f"""--preset discrete --env-id {self.env_id} --num-envs {self.num_envs}
            --vectorization-mode {mode} --num-steps {self.num_steps} --total-timesteps {timesteps}
            --num-minibatches {self.num_minibatches} --update-epochs {self.update_epochs}
            --learning-rate {self.learning_rate} --anneal-lr --gamma 0.99 --gae-lambda 0.95
            {norm_adv} --clip-coef {self.clip_coef} --clip-vloss
            --ent-coef {self.ent_coef} --vf-coef {self.vf_coef} --max-grad-norm 0.5
            --target-kl {self.target_kl} {recompute} --hidden-sizes 64 64 --activation tanh
            --log-std-init {self.log_std_init} {scaling} --device cpu --eval-episodes 0
            --checkpoint-interval 1_000_000""".split()


PRESET = {  # that of ppo.py for continuous actions
    "num_envs": 64,
    "num_steps": 32,
    "num_minibatches": 32,
    "update_epochs": 10,
    "learning_rate": 3e-4,
    "norm_adv": False,
    "ent_coef": 0.001,
    "vf_coef": 0.25,
    "log_std_init": -1.0,
    "target_kl": 0.05,
    "recompute_advantages": True,
}
WORKLOADS = {
    "cartpole-4": Workload("CartPole-v1", 4, 128, 120),
    "cartpole-16": Workload("CartPole-v1", 16, 128, 60, modes=(SYNC, NATIVE)),
    "cartpole-64": Workload("CartPole-v1", 64, 128, 30, modes=(SYNC, NATIVE)),
    "cartpole-256": Workload("CartPole-v1", 256, 128, 12, modes=(SYNC, NATIVE)),
    "acrobot-8": Workload("Acrobot-v1", 8, 128, 40),
    "pendulum-4": Workload("Pendulum-v1", 4, 1024, 15),
    "halfcheetah-1": Workload("HalfCheetah-v5", 1, 2048, 6, num_minibatches=32, update_epochs=10),
    "halfcheetah-8": Workload("HalfCheetah-v5", 8, 256, 8, num_minibatches=32, update_epochs=10),
    "halfcheetah-64": Workload("HalfCheetah-v5", iterations=12, **PRESET),
    "made-up-8": Workload("made_up:MadeUp-v0", 8, 256, 30),
    "breakout-8": Workload(
        "ale_py:ALE/Breakout-v5", 8, 128, 8, modes=(NATIVE,), clip_coef=0.1, is_game=True
    ),
}
WITH_PEERS = {
    "cartpole-4": WORKLOADS["cartpole-4"],
    "cartpole-64": WORKLOADS["cartpole-64"],
    "pendulum-4": WORKLOADS["pendulum-4"],
    "pendulum-rltools": Workload("Pendulum-v1", 4, 1024, 74, num_minibatches=16, update_epochs=2),
    "halfcheetah-1": WORKLOADS["halfcheetah-1"],
}
UNTIL = {
    "cartpole-4": Workload("CartPole-v1", 4, 128, 977, target=475),
    "halfcheetah-64": Workload("HalfCheetah-v5", iterations=489, target=3000, **PRESET),
}
PACKAGES = {  # of the peers' virtual environments
    "sbx": "sbx-rl==0.28.0 torch==2.13.0 gymnasium[mujoco]==1.4.0 mujoco==4.0.0",
    "rlox": "rlox==1.2.0 torch==2.13.0 gymnasium==1.4.0",
    "rejax": "rejax==0.1.3 gymnax==0.0.9",
    "rltools": "rltools==2.2.1 gymnasium==1.4.0",
}
RUNS_WHAT = {  # environments of WITH_PEERS and UNTIL that a peer can run and was made for
    "SB3": ("CartPole-v1", "Pendulum-v1", "HalfCheetah-v5"),
    "sbx": ("CartPole-v1", "Pendulum-v1", "HalfCheetah-v5"),
    "rlox": ("CartPole-v1", "Pendulum-v1"),
    "rejax": ("CartPole-v1", "Pendulum-v1"),
    "rltools": ("Pendulum-v1",),
}

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
    reached: int | None  # step at which the target was reached


def sb3(workload, seed):
    """The command of SB3's run."""
    spec = json.dumps(dataclasses.asdict(workload))
    return sys.executable, PEERS / "with_sb3.py", "stable_baselines3", spec, seed


def ours(workload, mode, seed, *more):
    """The command of ppo.py's run, to the end or to the workload's target."""
    program = [PPO] if workload.target is None else [PEERS / "with_ppo.py", workload.target]
    return sys.executable, *program, *workload.flags(mode), "--seed", seed, *more


def run(*command, threads="1"):
    """Run a command to its end, on so many torch threads (None: torch's own)."""
    env = {**os.environ, "PYTHONPATH": str(HERE)}
    if threads is not None:
        env["OMP_NUM_THREADS"] = threads
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "out"), "w+") as out:
        command, start = [*map(str, command)], time.perf_counter()
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
        speed = logged_speed(folder)
    speeds = re.findall(r"([\d,.]+) steps/s", text)
    reached = re.search(r"reached at step (\d+)", text)
    if speed is None and speeds:
        speed = float(speeds[-1].replace(",", ""))
    megabytes = usage.ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024)
    busy = (usage.ru_utime + usage.ru_stime) / seconds
    return Result(speed, megabytes, seconds, busy, int(reached[1]) if reached else None)


def logged_speed(folder):
    """Steps/s of ppo.py's run in a folder after its first iteration, by its TensorBoard log."""
    for path in Path(folder).glob("runs/*"):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        if "charts/SPS" in events.Tags()["scalars"]:
            points = events.Scalars("charts/SPS")
            seconds = points[-1].wall_time - points[0].wall_time
            return (points[-1].step - points[0].step) / seconds if seconds else None
    return None


def in_turn(commands, seed):
    """Of programs that take turns, who goes first changes with the seed."""
    return list(commands)[:: 1 if seed % 2 else -1]


def show_row(cells):
    print(f"| {' | '.join(cells)} |", flush=True)


def show_head(*columns):
    show_row(columns)
    print("|---" * len(columns) + "|")


def spread(values, form=",.0f"):
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def compare(names, runs):
    """Print rows for each workload and mode: medians, in brackets the lowest and the highest."""
    show_head("steps/s", "ppo.py", "ppo.py --compile", "SB3")
    others = []  # the rows of the second table
    for name in names:
        workload, results = WORKLOADS[name], collections.defaultdict(list)
        spec = json.dumps(dataclasses.asdict(workload))
        for seed in range(1, runs + 1):
            commands = {"SB3": sb3(workload, seed)}
            for mode in workload.modes:
                commands["ppo.py", mode] = ours(workload, mode, seed)
                commands["compiled", mode] = ours(workload, mode, seed, "--compile")
                commands["bound", mode] = (sys.executable, "-c", RANDOM_ACTIONS, spec, mode)
            for program in in_turn(commands, seed):
                results[program].append(run(*commands[program], threads=workload.threads))
        for mode in workload.modes:
            eager, compiled = results["ppo.py", mode], results["compiled", mode]
            programs = eager, compiled, results["SB3"]
            title = f"{workload.env_id.split(':')[-1]}, {workload.num_envs} x {workload.num_steps}"
            title += ", own vector version" if mode == NATIVE else ""
            show_row([title, *(spread([x.speed for x in program]) for program in programs)])
            bound = statistics.median(x.speed for x in results["bound", mode])
            share = statistics.median(ratios(eager, results["bound", mode]))
            cells = [title, *(spread(ratios(x, results["SB3"]), ".2f") for x in (eager, compiled))]
            cells += [f"{bound:,.0f}", f"{share:.0%}"]
            for program in programs:
                cells.append(f"{statistics.median(x.megabytes for x in program):,.0f}")
            others.append(cells)
    print()
    columns = ["ratio to SB3", "ratio with --compile", "bound, steps/s", "share of it"]
    show_head("", *columns, "MB, ppo.py", "--compile", "SB3")
    for cells in others:
        show_row(cells)


def ratios(results, others):
    """Of the speeds of runs that took turns."""
    return [a.speed / b.speed for a, b in zip(results, others, strict=True)]


def peers_of(folder):
    """The command of every peer that is installed, before workload and seed, by its name."""
    found = {"SB3": (sys.executable, PEERS / "with_sb3.py", "stable_baselines3")}
    for name, packages in PACKAGES.items():
        environment = Path(folder or "folder", name)
        python = environment / "bin" / "python"
        if not python.exists():
            make = f"python -m venv {environment} && {environment}/bin/pip install {packages}"
            print(f"{name} is left out; with --peers {environment.parent}, {make}")
            continue
        program = (PEERS / "with_sb3.py", "sbx") if name == "sbx" else (PEERS / f"with_{name}.py",)
        found[name] = (python.absolute(), *program)
    return found


def results_of_peers(workload, runs, peers):
    """Results of ppo.py, without and with --compile, and of the peers, run in turn."""
    results = {name: [] for name in ("ppo.py", "ppo.py --compile", *peers)}
    spec = json.dumps(dataclasses.asdict(workload))
    for seed in range(1, runs + 1):
        commands = {
            "ppo.py": ours(workload, SYNC, seed),
            "ppo.py --compile": ours(workload, SYNC, seed, "--compile"),
        }
        for name, command in peers.items():
            if workload.env_id in RUNS_WHAT[name]:
                commands[name] = (*command, spec, seed)
        for name in in_turn(commands, seed):
            results[name].append(run(*commands[name], threads=workload.threads))
    return {name: x for name, x in results.items() if x}


def compare_peers(names, runs, folder):
    """Print steps/s of ppo.py and its peers, and their ratio to SB3's."""
    peers = peers_of(folder)
    show_head("work", "program", "steps/s", "ratio to SB3")
    for name in names:
        workload = WITH_PEERS[name]
        results = results_of_peers(workload, runs, peers)
        for program, others in results.items():
            ratio = statistics.median(ratios(others, results["SB3"]))
            show_row([workload.title, program, spread([x.speed for x in others]), f"{ratio:.2f}"])


def until(names, runs, folder):
    """Print the seconds, from the command to its end, until a return is reached."""
    peers = {x: command for x, command in peers_of(folder).items() if x not in ("rejax", "rltools")}
    show_head("work, until", "program", "seconds", "steps", "runs that reached it")
    for name in names:
        workload = UNTIL[name]
        for program, results in results_of_peers(workload, runs, peers).items():
            reached = [x for x in results if x.reached is not None]
            cells = [f"{workload.title}, until {workload.target:,}", program, "", ""]
            if reached:
                cells[2] = spread([x.seconds for x in reached])
                cells[3] = f"{statistics.median(x.reached for x in reached):,.0f}"
            show_row([*cells, f"{len(reached)} of {len(results)}"])


def compare_versions(names, runs, other):
    """Print steps/s of this ppo.py and of another one, which take turns, and their ratio."""
    show_head("", "ppo.py, steps/s", f"{other}, steps/s", "ratio")
    for name in names:
        workload = WORKLOADS[name]
        for more in ([], ["--compile"]):
            results = {PPO: [], other: []}
            for seed in range(1, runs + 1):
                for program in in_turn(results, seed):
                    flags = [*workload.flags(workload.modes[0]), "--seed", seed, *more]
                    result = run(sys.executable, program, *flags, threads=workload.threads)
                    results[program].append(result)
            cells = [" ".join([name, *more])]
            cells += [spread([x.speed for x in results[program]]) for program in (PPO, other)]
            show_row([*cells, spread(ratios(results[PPO], results[other]), ".2f")])


def start_up(runs):
    """Print the seconds of a run of one iteration, from its command to its exit, and of imports."""
    one = dataclasses.replace(WORKLOADS["cartpole-4"], iterations=1)
    seconds = collections.defaultdict(list)
    for seed in range(runs + 1):
        seconds["ppo.py"].append(run(*ours(one, SYNC, seed)).seconds)
        seconds["imports"].append(run(sys.executable, "-c", BARE_IMPORTS).seconds)
        seconds["SB3"].append(run(*sb3(one, seed)).seconds)
    warm = {name: x[1:] for name, x in seconds.items()}  # the first may have read from the disk
    print(
        f"\na run of one iteration, from the command to its exit: {spread(warm['ppo.py'], '.2f')} s"
    )
    print(f"of SB3: {spread(warm['SB3'], '.2f')} s")
    print(f"importing torch, gymnasium and tensorboard alone: {spread(warm['imports'], '.2f')} s")


def profile(name):
    """Print how much of an iteration is spent in which function of ppo.py."""
    sys.path[:0] = [str(PPO.parent), str(HERE)]
    import torch

    import ppo

    labels = []
    seconds, calls = collections.Counter(), collections.Counter()
    iterations = []  # of each: when it ended, and both counters at that time

    def clock(owner, name, label):
        """Replace a function by one whose calls are counted and timed."""
        function = getattr(owner, name)
        labels.append(label)

        def timed(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            seconds[label] += time.perf_counter() - start
            calls[label] += 1
            if label == "Run.save":
                iterations.append((time.perf_counter(), seconds.copy(), calls.copy()))
            return result

        setattr(owner, name, timed)

    clock(ppo, "collect", "collect")
    clock(ppo.RecordEpisodeStatistics, "step", "- envs.step")
    clock(ppo.Agent, "act", "- Agent.act")
    clock(ppo.CategoricalHead, "to_env", "- CategoricalHead.to_env")
    clock(ppo.GaussianHead, "to_env", "- GaussianHead.to_env")
    clock(ppo.RewardScaler, "update", "RewardScaler.update")
    clock(ppo, "estimate_advantages", "estimate_advantages")
    clock(ppo, "gae", "- gae")
    clock(ppo, "update", "update")
    clock(ppo, "ppo_loss", "- ppo_loss")
    clock(torch.Tensor, "backward", "- Tensor.backward")
    clock(torch.nn.utils, "clip_grad_norm_", "- clip_grad_norm_")
    clock(torch.optim.Adam, "zero_grad", "- Adam.zero_grad")
    clock(torch.optim.Adam, "step", "- Adam.step")
    clock(ppo.RunningStats, "update", "RunningStats.update, of returns and observations")
    clock(ppo.Run, "log", "Run.log")
    clock(ppo.Run, "save", "Run.save")
    workload = WORKLOADS[name]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        ppo.train(ppo.parse_args(workload.flags(workload.modes[0])))
        os.chdir(HERE)  # the folder is about to go
    start, seconds_before, calls_before = iterations[1]  # the first ones are slower
    end, seconds, calls = iterations[-1]
    count = len(iterations) - 2
    total = (end - start) / count
    print(f"\n{name}: an iteration takes {total * 1e3:.1f} ms, of which are spent in\n")
    show_head("function (- within the one above)", "ms", "share", "calls", "us a call")
    for label in labels:
        part = (seconds[label] - seconds_before[label]) / count
        number = (calls[label] - calls_before[label]) / count
        if number:
            cells = [f"{part * 1e3:.2f}", f"{part / total:.0%}", f"{number:.0f}"]
            show_row([label, *cells, f"{part / number * 1e6:,.0f}"])
    if workload.recompute_advantages:
        print("\nAll calls of estimate_advantages but one are within update.")


def modes(runs):
    """Print steps/s of the modes and the processors kept busy, for ever slower steps."""
    show_head("8 environments", SYNC, "async", NATIVE)
    base = dataclasses.replace(WORKLOADS["cartpole-4"], num_envs=8, iterations=100)
    made_up = dataclasses.replace(base, env_id="made_up:MadeUp-v0", num_steps=64)
    cases = [("CartPole-v1, about 0.01 ms a step", base, {}, (SYNC, "async", NATIVE))]
    for work, iterations in (0.03, 80), (0.1, 60), (0.3, 40), (1.0, 20), (3.0, 10):
        workload = dataclasses.replace(made_up, iterations=iterations)
        cases.append((f"made up, {work} ms a step", workload, {"work": work}, (SYNC, "async")))
    for title, workload, kwargs, names in cases:
        results = {mode: [] for mode in names}
        for seed in range(1, runs + 1):
            for mode in in_turn(names, seed):
                command = ours(workload, mode, seed, "--env-kwargs", json.dumps(kwargs))
                results[mode].append(run(*command))
        cells = [title]
        for x in results.values():
            busy = statistics.median(result.busy for result in x)
            cells.append(f"{spread([result.speed for result in x])}, {busy:.1f} busy")
        show_row(cells + [""] * (3 - len(names)))


def installed(package):
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"


def parse():
    """The options, with `names`, the rows that are asked for."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--runs", type=int, default=5, help="of each program")
    parser.add_argument("--only", nargs="+", help="rows of the table")
    parser.add_argument("--peers", type=Path, help="folder of the peers' virtual environments")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--against", type=Path, help="compare with this other ppo.py, not with SB3")
    what.add_argument(
        "--profile", choices=WORKLOADS, help="print where the time of this workload goes"
    )
    what.add_argument("--modes", action="store_true", help="compare the vectorization modes")
    what.add_argument("--until", action="store_true", help="seconds until a return is reached")
    options = parser.parse_args()
    table = WORKLOADS
    if options.until:
        table = UNTIL
    elif options.peers:
        table = WITH_PEERS
    options.names = options.only or list(table)
    if not set(options.names) <= set(table):
        parser.error(f"--only takes some of {', '.join(table)}")
    return options


def show_machine():
    packages = ("torch", "gymnasium", "numpy", "mujoco", "ale-py", "stable-baselines3")
    print(f"Python {platform.python_version()}, {', '.join(map(installed, packages))}")
    info = Path("/proc/cpuinfo")
    model = re.search("model name\t: (.*)", info.read_text()) if info.exists() else None
    processor = model[1] if model else platform.processor()
    load = f"load {os.getloadavg()[0]:.1f} before" if hasattr(os, "getloadavg") else ""
    print(f"{processor}, {os.cpu_count()} cores, {load}")


def main():
    options = parse()
    names, runs = options.names, options.runs
    show_machine()
    if options.profile:
        workload = WORKLOADS[options.profile]
        if workload.threads is not None:
            os.environ["OMP_NUM_THREADS"] = workload.threads
        profile(options.profile)
        return
    print(f"median (lowest to highest) of {runs} runs\n")
    if options.against:
        compare_versions(names, runs, options.against.resolve())
    elif options.modes:
        modes(runs)
    elif options.until:
        until(names, runs, options.peers)
    elif options.peers:
        compare_peers(names, runs, options.peers)
    else:
        compare(names, runs)
        if not options.only:
            start_up(runs)


if __name__ == "__main__":
    main()
