"""How well ppo.py learns: environments x seeds, each a run of the command line.

    python tests/benchmarks/learning.py                           # all that runs/benchmark/ lacks
    python tests/benchmarks/learning.py --only Ant "Ant, 3M" --seeds 1   # some of it
    python tests/benchmarks/learning.py --folder runs/mine        # all of it again, elsewhere
    python tests/benchmarks/learning.py --folder runs/try --only Ant --flags="--num-steps 64"

A finished run is a line of results.csv and a curve in <task>.csv. It is not run again, unless its
task has other flags now, be it here or by a preset, or its line is taken out, as must be done where
a default of Args changes. So this may be interrupted and called again, but not twice at a time for
one folder. The runs whose flags are those of now are shown in table.md, curves.png and front.png.
All are trained with --compile.

The training return is the mean of the last 100 episodes, the evaluation that of 100 greedy episodes
of the last checkpoint, and the best return the same of best.pt. Seconds are those of the whole
training, from its command to its exit, with as many others beside it as --processes says.
"""

import argparse
import csv
import itertools
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from threading import Lock

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[2]
PUBLIC = ROOT / "runs/benchmark"
sys.path.insert(0, str(ROOT))
import ppo  # noqa: E402

SHORT = "--total-timesteps 100_000"
MILLION = "--total-timesteps 1_000_000"
LONG = "--total-timesteps 3_000_000"
BEFORE = "--no-anneal-gamma --ent-coef 0 --no-anneal-ent-coef"  # as these tasks were run
PENDULUM = f"{SHORT} --num-envs 16 --num-steps 64 --num-minibatches 16 --log-std-init 0"
PENDULUM += " --gamma 0.9 --learning-rate 1e-3"
SWIMMER = "--num-envs 8 --num-steps 256 --log-std-init 0 --gamma 0.9999 --gae-lambda 0.98"
SWIMMER += " --ent-coef 0.003"
CONTINUOUS = """--env-kwargs '{"continuous": true}'"""
# By name: the environment, and the flags beside the seed. Where there are none, the preset decides.
TASKS = {
    "CartPole": ("CartPole-v1", ""),
    "CartPole, 100k": ("CartPole-v1", SHORT),
    "Acrobot": ("Acrobot-v1", ""),
    "MountainCar": ("MountainCar-v0", ""),
    "MountainCarContinuous, 100k": ("MountainCarContinuous-v0", f"{SHORT} --log-std-init 0"),
    "Pendulum": ("Pendulum-v1", ""),
    "Pendulum, 100k": ("Pendulum-v1", PENDULUM),
    "LunarLander": ("LunarLander-v3", MILLION),
    "LunarLander, continuous": ("LunarLander-v3", CONTINUOUS),
    "BipedalWalker, 2M": ("BipedalWalker-v3", "--total-timesteps 2_000_000 --ent-coef 0.002"),
    "HalfCheetah": ("HalfCheetah-v5", ""),
    "Hopper": ("Hopper-v5", ""),
    "Walker2d": ("Walker2d-v5", ""),
    "Ant": ("Ant-v5", ""),
    "Humanoid": ("Humanoid-v5", ""),
    "Swimmer": ("Swimmer-v5", SWIMMER),
    "Reacher": ("Reacher-v5", ""),
    "InvertedDoublePendulum": ("InvertedDoublePendulum-v5", "--num-minibatches 4"),
    "HalfCheetah, 3M": ("HalfCheetah-v5", LONG),
    "Hopper, 3M": ("Hopper-v5", LONG),
    "Walker2d, 3M": ("Walker2d-v5", LONG),
    "Ant, 3M": ("Ant-v5", LONG),
    "Humanoid, 3M": ("Humanoid-v5", f"{LONG} {BEFORE}"),
    "Pong, 3M": ("ALE/Pong-v5", LONG),
    "Breakout, 3M": ("ALE/Breakout-v5", LONG),
}
# What others have published, and what kind of number it is; sources: runs/benchmark/README.md.
# Versions differ: theirs are MuJoCo's -v2 to -v4 (SLM-Lab: -v5), and mostly LunarLander-v2.
TRAINING = "training"
TUNED = "greedy evaluation of one tuned agent"
BEST = "best of many evaluations"
KINDS = {
    "CleanRL": TRAINING,
    "baselines": TRAINING,
    "SLM-Lab": TRAINING,
    "rl-zoo3": TUNED,
    "Tianshou": BEST,
    "XuanCe": BEST,
    "Sample Factory": BEST,
    "MushroomRL": BEST,
}
COLORS = dict(zip(KINDS, ["C1", "C2", "C3", "C4", "C5", "C6", "black", "C8"], strict=True))
PUBLISHED = {  # with the steps, where these are not those of the task
    "CartPole": {"CleanRL": "490.0 ± 6.1", "baselines": "497.5"},
    "CartPole, 100k": {"rl-zoo3": "500.0", "SLM-Lab": "498.9 (200k)"},
    "Acrobot": {
        "CleanRL": "-86.4 ± 1.3",
        "baselines": "-81.8",
        "SLM-Lab": "-81.3 (300k)",
        "rl-zoo3": "-73.5 (1M)",
    },
    "MountainCar": {"CleanRL": "-200", "baselines": "-200", "rl-zoo3": "-110.4 (1M)"},
    "MountainCarContinuous, 100k": {"rl-zoo3": "88.3 (20k, gSDE)"},
    "Pendulum": {
        "CleanRL": "-1142 (8M)",
        "SLM-Lab": "-174.9 (300k)",
        "MushroomRL": "-129.9 (300k)",
    },
    "Pendulum, 100k": {"rl-zoo3": "-172.2"},
    "LunarLander": {"rl-zoo3": "242.1", "SLM-Lab": "183.3 (300k)"},
    "LunarLander, continuous": {"rl-zoo3": "270", "SLM-Lab": "132.6 (300k)"},
    "BipedalWalker, 2M": {"rl-zoo3": "287.9 (5M)"},
    "HalfCheetah": {
        "CleanRL": "1442.6 ± 46.0",
        "baselines": "1668.6",
        "rl-zoo3": "5819",
        "Tianshou": "5783.9 ± 1244.0",
        "XuanCe": "4628",
        "MushroomRL": "5751 (1.5M)",
    },
    "Hopper": {
        "CleanRL": "2382.9 ± 271.7",
        "baselines": "2316.2",
        "rl-zoo3": "2410",
        "Tianshou": "2609.3 ± 700.8",
        "XuanCe": "3450",
        "MushroomRL": "2996 (1.5M)",
    },
    "Walker2d": {
        "CleanRL": "2288.0 ± 571.8",
        "baselines": "3425.0",
        "rl-zoo3": "3479",
        "Tianshou": "3588.5 ± 756.6",
        "XuanCe": "4319",
    },
    "Ant": {
        "rl-zoo3": "1327",
        "Tianshou": "3258.4 ± 1079.3 (its rerun of 2025: 1023 ± 230)",
        "XuanCe": "2811",
    },
    "Humanoid": {"Tianshou": "787", "XuanCe": "705"},
    "Swimmer": {"rl-zoo3": "281.6", "SLM-Lab": "282.4 (4M)"},
    "Reacher": {"Tianshou": "-4.1 ± 0.3", "SLM-Lab": "-5.0"},
    "InvertedDoublePendulum": {
        "Tianshou": "9231.3 ± 270.4",
        "SLM-Lab": "8384",
        "Sample Factory": "9350 (10M)",
    },
    "HalfCheetah, 3M": {
        "Tianshou": "7337",
        "SLM-Lab": "6241 (10M)",
        "Sample Factory": "6263 (10M)",
    },
    "Hopper, 3M": {"Tianshou": "3128", "SLM-Lab": "1654 (4M)", "Sample Factory": "2793 (10M)"},
    "Walker2d, 3M": {"Tianshou": "4896", "SLM-Lab": "4379 (10M)", "Sample Factory": "5488 (10M)"},
    "Ant, 3M": {"Tianshou": "4079", "SLM-Lab": "2138 (10M)", "Sample Factory": "5876 (10M)"},
    "Humanoid, 3M": {"Tianshou": "1360", "SLM-Lab": "2661 (10M)", "Sample Factory": "5439 (10M)"},
    "Pong, 3M": {
        "CleanRL": "20.36 (10M)",
        "SLM-Lab": "16.7 (10M)",
        "rl-zoo3": "20.99 (10M, sampled)",
    },
    "Breakout, 3M": {
        "CleanRL": "414.66 (10M)",
        "SLM-Lab": "326.5 (10M)",
        "rl-zoo3": "398.0 (10M, sampled)",
    },
}
COLUMNS = ["task", "seed", "steps", "training_return", "evaluation_return", "evaluation_std"]
COLUMNS += ["best_return", "seconds", "flags", "versions", "machine"]
POINTS = 100  # of a curve
FRONT = ["CartPole", "LunarLander", "Pendulum", "HalfCheetah"]  # on the front page
FRONT += ["Hopper", "Walker2d", "Ant", "Humanoid"]


# --- Training -------------------------------------------------------------------------------------
def machine():
    """The processor and the number of cores."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"{found[1] if found else platform.processor()}, {os.cpu_count()} cores"


def command_line(task):
    """The flags of a task's runs, but for the seed."""
    env_id, flags = TASKS[task]
    return ["--env-id", env_id, "--compile", *shlex.split(flags)]


@cache
def settings(task):
    """The arguments of a task's runs that are not the defaults of Args, in JSON."""
    defaults = vars(ppo.Args())
    args = vars(ppo.parse_args(command_line(task)))
    return json.dumps({name: x for name, x in args.items() if x != defaults[name]})


def run(folder, *flags):
    """Run ppo.py in a folder; return the mean and the deviation of its evaluation."""
    command = [sys.executable, ROOT / "ppo.py", *flags, "--eval-episodes", "100"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        end = done.stderr[-2000:]
        raise RuntimeError(f"{shlex.join(flags)} ended with {done.returncode}:\n{end}")
    found = re.search(r"eval: mean (\S+) std (\S+)", done.stdout)
    return float(found[1]), float(found[2])


def train(task, seed):
    """Train in an empty folder; return the line of results.csv, and the curve."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "runs/run")
        start = time.perf_counter()
        mean, std = run(folder, *command_line(task), "--seed", str(seed), "--run-name", "run")
        seconds = time.perf_counter() - start
        best = ""  # there is none where fewer than 100 episodes have ended
        if (path / "best.pt").exists():
            best, _ = run(folder, "--evaluate", str(path / "best.pt"))
        checkpoint = ppo.load(str(path))
        steps = checkpoint["global_step"]
        events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
    packages = f"torch {torch.__version__}, gymnasium {gym.__version__}"
    row = {
        "task": task,
        "seed": seed,
        "steps": steps,
        "training_return": round(float(np.mean(checkpoint["returns"])), 2),
        "evaluation_return": mean,
        "evaluation_std": std,
        "best_return": best,
        "seconds": round(seconds),
        "flags": settings(task),
        "versions": f"Python {platform.python_version()}, {packages}",
        "machine": machine(),
    }
    return row, curve(events, steps)


def curve(events, total):
    """Points (step, seconds, return) of a run's log, the last one of each hundredth of the run."""
    if "charts/episodic_return" not in events.Tags()["scalars"]:
        return []  # no episode has ended
    first = events.Scalars("charts/SPS")[0]
    start = first.wall_time - first.step / first.value
    points = {}
    for x in events.Scalars("charts/episodic_return"):
        hundredth = (x.step - 1) * POINTS // total
        points[hundredth] = x.step, round(x.wall_time - start, 1), round(x.value, 2)
    return list(points.values())


# --- Files ----------------------------------------------------------------------------------------
def read(path):
    """The lines of a CSV file, none if it is not there."""
    return list(csv.DictReader(path.open())) if path.exists() else []


def write(path, columns, rows):
    """Write a CSV file as a whole, so that an interruption leaves the old one or the new one."""
    with path.with_suffix(".tmp").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    path.with_suffix(".tmp").replace(path)


def current(folder):
    """By task the lines of results.csv whose flags are those of now."""
    runs = {}
    for line in read(folder / "results.csv"):
        if line["task"] in TASKS and line["flags"] == settings(line["task"]):
            runs.setdefault(line["task"], []).append(line)
    return runs


def curve_file(folder, task):
    return folder / (task.replace(", ", "-") + ".csv")


def keep(folder, row, points):
    """Add a run to the folder, its curve first: a line of results.csv means that all is there."""
    task, seed = row["task"], str(row["seed"])
    path = curve_file(folder, task)
    rows = [x for x in read(path) if x["seed"] != seed]
    for step, seconds, mean in points:
        rows.append({"seed": seed, "step": step, "seconds": seconds, "return": mean})
    rows.sort(key=lambda x: int(x["seed"]))
    write(path, ["seed", "step", "seconds", "return"], rows)
    path = folder / "results.csv"
    rows = [x for x in read(path) if (x["task"], x["seed"]) != (task, seed)]
    rows.append(row)
    order = [*TASKS, *(x["task"] for x in rows)]
    rows.sort(key=lambda x: (order.index(x["task"]), int(x["seed"])))
    write(path, COLUMNS, rows)


# --- Table and pictures ---------------------------------------------------------------------------
def show_row(cells):
    return f"| {' | '.join(cells)} |\n"


def write_tables(folder):
    """Write table.md: mean, deviation and worst of the seeds, and what others have published."""
    finished = current(folder)
    names = ["environment", "steps", "seeds", "training return", "worst"]
    names += ["greedy evaluation", "worst", "of best.pt", "steps/s", "minutes"]
    text = show_row(names) + "|---" * len(names) + "|\n"
    for task, runs in finished.items():
        values = {}
        for name in COLUMNS[2:8]:
            values[name] = np.array([float(x[name] or "nan") for x in runs])
        cells = [task, f"{values['steps'][0]:,.0f}", " ".join(x["seed"] for x in runs)]
        for name in ("training_return", "evaluation_return", "best_return"):
            spread = f" ± {values[name].std():.1f}" if len(runs) > 1 else ""
            cells.append(f"{values[name].mean():.1f}{spread}")
            if name != "best_return":
                cells.append(f"{values[name].min():.1f}")
        cells.append(f"{(values['steps'] / values['seconds']).mean():,.0f}")
        cells.append(f"{values['seconds'].mean() / 60:.1f}")
        text += show_row(cells)
    kinds = [TRAINING, TUNED, BEST]
    text += "\nWhat others have published, by the kind of figure:\n\n"
    text += show_row(["environment", *kinds]) + "|---" * (1 + len(kinds)) + "|\n"
    for task in finished:
        cells = [task]
        for kind in kinds:
            sources = PUBLISHED[task].items()
            cells.append(", ".join(f"{name} {x}" for name, x in sources if KINDS[name] == kind))
        text += show_row(cells)
    (folder / "table.md").write_text(text)
    print(text)


def draw(axis, folder, task, runs):
    """Draw the mean over the seeds, with its deviation shaded, over millions of steps."""
    curves = []
    for seed in (x["seed"] for x in runs):
        points = [x for x in read(curve_file(folder, task)) if x["seed"] == seed]
        if points:  # else no episode has ended
            steps = np.array([int(x["step"]) for x in points]) / 1e6
            curves.append((steps, np.array([float(x["return"]) for x in points])))
    if not curves:
        return
    steps = np.linspace(max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves), POINTS)
    returns = np.array([np.interp(steps, *x) for x in curves])
    mean, std = returns.mean(0), returns.std(0)
    axis.plot(steps, mean, label="ppo.py")
    axis.fill_between(steps, mean - std, mean + std, alpha=0.25)


def draw_curves(folder):
    """Draw curves.png: every task, with a line for each published figure."""
    finished = current(folder)
    rows = -(-len(finished) // 4)
    figure, axes = plt.subplots(rows, 4, figsize=(14, 2.8 * rows), squeeze=False)
    for axis in axes.flat[len(finished) :]:
        axis.set_axis_off()
    styles = {TRAINING: "--", TUNED: "-.", BEST: ":"}
    legend = {}
    for axis, (task, runs) in zip(axes.flat, finished.items(), strict=False):
        axis.set_title(f"{task} ({len(runs)} seed{'s' * (len(runs) > 1)})", fontsize=10)
        axis.tick_params(labelsize=8)
        draw(axis, folder, task, runs)
        for source, published in PUBLISHED[task].items():
            kind = KINDS[source]
            label = f"{source}, {kind}"
            line = {"color": COLORS[source], "ls": styles[kind], "lw": 1.5, "label": label}
            axis.axhline(float(published.split()[0]), **line)
        handles, labels = axis.get_legend_handles_labels()
        legend |= dict(zip(labels, handles, strict=True))
    figure.supxlabel("million environment steps", fontsize=9)
    figure.supylabel("episodic return in training", fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.85 / figure.get_figheight()))
    figure.legend(legend.values(), legend, loc="upper center", ncols=3, fontsize=10)
    figure.savefig(folder / "curves.png", dpi=90)


def draw_front(folder):
    """Draw front.png: eight tasks, each with the best training return that is published."""
    finished = current(folder)
    figure, axes = plt.subplots(2, 4, figsize=(9, 4.6), layout="constrained")
    for axis, task in zip(axes.flat, FRONT, strict=True):
        axis.set_title(task, fontsize=11)
        axis.tick_params(labelsize=9)
        draw(axis, folder, task, finished.get(task, []))
        training = [x for x in PUBLISHED[task].items() if KINDS[x[0]] == TRAINING]
        if training:
            source, published = max(training, key=lambda x: float(x[1].split()[0]))
            value = float(published.split()[0])
            axis.axhline(value, color="C1", ls="--")
            found = re.search(r"\((.*)\)", published)
            text = f"{source} {value:g}" + (f", {found[1]}" if found else "")
            corner = {"transform": axis.transAxes, "ha": "right"}
            axis.text(0.98, 0.05, text, fontsize=9, color="#b34700", **corner)
    band = Patch(color="C0", alpha=0.25), Line2D([], [], color="C0")
    dashes = Line2D([], [], color="C1", ls="--")
    legend = {"ppo.py, mean and deviation over seeds": band, "best published, in training": dashes}
    figure.legend(legend.values(), legend, loc="outside upper center", ncols=2, fontsize=10)
    figure.supxlabel("million environment steps", fontsize=10)
    figure.supylabel("return in training", fontsize=10)
    figure.savefig(folder / "front.png", dpi=150)


# --- Command line ---------------------------------------------------------------------------------
def parse():
    """The options, and the tasks and seeds that have not been run with the flags of now."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--folder", type=Path, default=PUBLIC, help="of results (runs/benchmark)")
    names = "; ".join(TASKS)
    parser.add_argument(
        "--only", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help=f"of {names}"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="(1 to 5)")
    parser.add_argument("--flags", default="", help="more flags, to try another setting")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time (2)")
    args = parser.parse_args()
    for task, (env_id, flags) in TASKS.items():
        TASKS[task] = env_id, f"{flags} {args.flags}"
    lines = itertools.chain.from_iterable(current(args.folder).values())
    finished = [(x["task"], int(x["seed"])) for x in lines]
    there = [(x["task"], int(x["seed"])) for x in read(args.folder / "results.csv")]
    wanted = list(itertools.product(args.only, args.seeds))
    missing = [x for x in wanted if x not in finished]
    if args.flags and (args.folder.resolve() == PUBLIC or set(missing) & set(there)):
        parser.error(f"{args.folder} has runs with other flags, which would be lost")
    return args, missing


def main():
    args, missing = parse()
    print(f"{len(missing)} runs are missing", flush=True)
    args.folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    lock = Lock()

    def job(task, seed):
        row, points = train(task, seed)
        with lock:
            keep(args.folder, row, points)
            print(", ".join(f"{name} {row[name]}" for name in COLUMNS[:8]), flush=True)

    pool = ThreadPoolExecutor(args.processes)
    try:
        for future in as_completed([pool.submit(job, *x) for x in missing]):
            future.result()
    except (KeyboardInterrupt, RuntimeError) as error:
        sys.exit(f"{error or 'interrupted'}\nruns under way are waited for")
    finally:
        pool.shutdown(cancel_futures=True)
        if current(args.folder):
            write_tables(args.folder)
            draw_curves(args.folder)
            draw_front(args.folder)


if __name__ == "__main__":
    main()
