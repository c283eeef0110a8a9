"""How well ppo.py learns: environments x seeds, each a run of the command line, their curves and
a table.

    python tests/benchmarks/learning.py                           # all that runs/benchmark/ lacks
    python tests/benchmarks/learning.py --only Ant "Ant, 3M" --seeds 1   # some of it
    python tests/benchmarks/learning.py --folder runs/mine        # all of it again, elsewhere
    python tests/benchmarks/learning.py --folder runs/try --only Ant --flags="--num-steps 64"

It may be interrupted and called again: a finished run is a line of results.csv, and is repeated
only if its flags here or its preset have changed, or that line is taken out (as after another
change of ppo.py). A folder is for one call at a time, and for one setting of --flags. In the folder
are results.csv (a line a run), <task>.csv (the learning curves), table.md and curves.png. The
training return is the mean over the last 100 episodes, the evaluation that of 100 greedy episodes
of the last checkpoint, and that of best.pt another one; seconds and steps per second are of the
whole training, imports, compiling and evaluation included, with as many other runs beside it as
--processes says. The table and the picture show the runs with the flags and presets of now. All are
trained with --compile.
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
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import ppo  # noqa: E402

SHORT = "--total-timesteps 100_000"
MILLION = "--total-timesteps 1_000_000"
LONG = "--total-timesteps 3_000_000"
PENDULUM = f"{SHORT} --num-envs 16 --num-steps 64 --num-minibatches 16 --log-std-init 0"
PENDULUM += " --gamma 0.9 --learning-rate 1e-3"
SWIMMER = "--num-envs 8 --num-steps 256 --log-std-init 0 --gamma 0.9999 --gae-lambda 0.98"
CONTINUOUS = """--env-kwargs '{"continuous": true}' --gamma 0.995 --gae-lambda 0.98"""
# By name: the environment, and the flags beside the seed. Where there are none, it is the preset.
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
    "BipedalWalker, 5M": ("BipedalWalker-v3", "--total-timesteps 5_000_000"),
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
    "Humanoid, 3M": ("Humanoid-v5", LONG),
    "Pong, 3M": ("ALE/Pong-v5", LONG),
    "Breakout, 3M": ("ALE/Breakout-v5", LONG),
}
# What others have published, and what kind of number it is. The README has the addresses. Versions
# of environments differ: MuJoCo was that of -v2 to -v4 (SLM-Lab: -v5), LunarLander mostly -v2.
TRAINING = "training"
TUNED = "greedy evaluation of one agent, tuned for it"
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
    "BipedalWalker, 5M": {"rl-zoo3": "287.9"},
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
COLUMNS = [
    "task",
    "seed",
    "steps",
    "training_return",
    "evaluation_return",
    "evaluation_std",
    "best_return",
    "seconds",
]
COLUMNS += ["flags", "versions", "machine"]
POINTS = 100  # of a curve


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
    """What a run has beside its seed: all flags that are not the defaults, of presets, too."""
    defaults = vars(ppo.Args())
    args = vars(ppo.parse_args(command_line(task)))
    return json.dumps({name: x for name, x in args.items() if x != defaults[name]})


def run(folder, *flags):
    """What ppo.py prints, in a folder."""
    command = [sys.executable, ROOT / "ppo.py", *flags, "--eval-episodes", "100"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        end = done.stderr[-2000:]
        raise RuntimeError(f"{shlex.join(flags)} ended with {done.returncode}:\n{end}")
    return done.stdout


def train(task, seed):
    """Run ppo.py in an empty folder; return its line of results.csv, and its curve."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        printed = run(folder, *command_line(task), "--seed", str(seed), "--run-name", "run")
        seconds = time.perf_counter() - start
        evaluation = evaluated(printed)
        best = ""  # there is none where fewer than 100 episodes have ended
        if Path(folder, "runs/run/best.pt").exists():
            best, _ = evaluated(run(folder, "--evaluate", "runs/run/best.pt"))
        checkpoint = torch.load(Path(folder, "runs/run/checkpoint.pt"), weights_only=True)
        events = EventAccumulator(str(Path(folder, "runs/run")), size_guidance={"scalars": 0})
        events.Reload()
    packages = f"torch {torch.__version__}, gymnasium {gym.__version__}"
    versions = f"Python {platform.python_version()}, {packages}"
    row = {
        "task": task,
        "seed": seed,
        "steps": checkpoint["global_step"],
        "training_return": round(float(np.mean(checkpoint["returns"])), 2),
        "evaluation_return": evaluation[0],
        "evaluation_std": evaluation[1],
        "best_return": best,
        "seconds": round(seconds),
        "flags": settings(task),
        "versions": versions,
        "machine": machine(),
    }
    return row, curve(events, checkpoint["global_step"])


def evaluated(printed):
    """Mean and deviation of the evaluation that was printed."""
    found = re.search(r"eval: mean (\S+) std (\S+)", printed)
    return [float(x.replace(",", "")) for x in found.groups()]


def curve(events, total):
    """Points (step, seconds, mean return of episodes since the last point) of a run's log."""
    if "charts/episodes" not in events.Tags()["scalars"]:
        return []
    first = events.Scalars("charts/SPS")[0]
    zero = first.wall_time - first.step / first.value  # which leaves start-up out
    returns, counts = (events.Scalars(f"charts/{name}") for name in ("episodic_return", "episodes"))
    points = []
    for i in range(POINTS):
        window = [
            (mean, count.value)
            for mean, count in zip(returns, counts, strict=True)
            if i * total / POINTS < mean.step <= (i + 1) * total / POINTS
        ]
        if window:
            mean = sum(mean.value * n for mean, n in window) / sum(n for _, n in window)
            last = window[-1][0]
            points.append((last.step, round(last.wall_time - zero, 1), round(mean, 2)))
    return points


def read(path):
    """The lines of a CSV file, none if it is not there."""
    return list(csv.DictReader(path.open())) if path.exists() else []


def current(folder):
    """By task the finished runs of results.csv whose flags and preset are those of now."""
    runs = {}
    for line in read(folder / "results.csv"):
        if line["task"] in TASKS and line["flags"] == settings(line["task"]):
            runs.setdefault(line["task"], []).append(line)
    return runs


def write(path, columns, rows):
    """Write a CSV file as a whole, so that an interruption leaves the old one or the new one."""
    with path.with_suffix(".tmp").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    path.with_suffix(".tmp").replace(path)


def curve_file(task):
    return task.replace(", ", "-") + ".csv"


def keep(folder, row, points):
    """Add a run to the folder, its curve first: a line of results.csv means that all is there."""
    path = folder / curve_file(row["task"])
    rows = [x for x in read(path) if x["seed"] != str(row["seed"])]
    rows += [
        {"seed": row["seed"], "step": step, "seconds": seconds, "return": mean}
        for step, seconds, mean in points
    ]
    write(path, ["seed", "step", "seconds", "return"], sorted(rows, key=lambda x: int(x["seed"])))
    name = row["task"], str(row["seed"])
    results = [*(x for x in read(folder / "results.csv") if (x["task"], x["seed"]) != name), row]
    results.sort(key=lambda x: ([*TASKS, x["task"]].index(x["task"]), int(x["seed"])))
    write(folder / "results.csv", COLUMNS, results)


def table(folder):
    """Write table.md: mean and deviation over the seeds, beside what others have published."""
    finished = current(folder)
    kinds = {TRAINING: "t", TUNED: "e", BEST: "b"}
    lines = [
        "| environment | steps | seeds | training return | greedy evaluation | of best.pt | "
        "published | steps/s | minutes |"
    ]
    lines.append("|---" * 9 + "|")
    for task, runs in finished.items():
        training, evaluation, best, seconds, steps = (
            np.array([float(x[name] or "nan") for x in runs])
            for name in ("training_return", "evaluation_return", "best_return", "seconds", "steps")
        )
        cells = [task, f"{steps[0]:,.0f}", ", ".join(x["seed"] for x in runs)]
        for x in (training, evaluation, best):
            spread = f" ± {x.std():.1f}" if len(x) > 1 else ""
            cells += [f"{x.mean():.1f}{spread}"]
        published = PUBLISHED[task].items()
        cells += [", ".join(f"{source} {x} {kinds[KINDS[source]]}" for source, x in published)]
        cells += [f"{(steps / seconds).mean():,.0f}", f"{seconds.mean() / 60:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    where = {f"{x['versions']}, {x['machine']}" for runs in finished.values() for x in runs}
    lines += ["", "; ".join(f"{letter}: {kind}" for kind, letter in kinds.items()) + "."]
    lines += ["Runs: " + "; ".join(sorted(where)) + "."]
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def picture(folder):
    """Draw curves.png: the mean over the seeds, its deviation shaded, and the published figures."""
    shown = {task: [x["seed"] for x in runs] for task, runs in current(folder).items()}
    rows = -(-len(shown) // 4)
    figure, axes = plt.subplots(rows, 4, figsize=(14, 2.8 * rows), squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    for axis, (task, seeds) in zip(axes.flat, shown.items(), strict=False):
        points = read(folder / curve_file(task))
        by_seed = [
            np.array(
                [(float(x["step"]), float(x["return"])) for x in points if x["seed"] == seed]
            ).T
            for seed in seeds
        ]
        by_seed = [x for x in by_seed if x.size > 0]  # the others have ended no episode
        seeds_shown = "1 seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
        axis.set_title(f"{task} ({seeds_shown})", fontsize=10)
        if not by_seed:
            continue
        steps = np.linspace(max(x[0][0] for x in by_seed), min(x[0][-1] for x in by_seed), POINTS)
        returns = np.array([np.interp(steps, *x) for x in by_seed])
        mean, std = returns.mean(0), returns.std(0)
        axis.plot(steps, mean, label="ppo.py")
        axis.fill_between(steps, mean - std, mean + std, alpha=0.25)
        styles = {TRAINING: "--", TUNED: "-.", BEST: ":"}
        for source, published in PUBLISHED[task].items():
            axis.axhline(
                float(published.split()[0]),
                color=COLORS[source],
                ls=styles[KINDS[source]],
                lw=1.5,
                label=f"{source}, {KINDS[source].partition(',')[0]}",
            )
        axis.tick_params(labelsize=8)
    handles = {}
    for axis in axes.flat:
        handles |= {
            label: line for line, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
    figure.supxlabel("environment steps", fontsize=9)
    figure.supylabel("episodic return in training", fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.85 / figure.get_figheight()))
    figure.legend(handles.values(), handles, loc="upper center", ncols=3, fontsize=10)
    figure.savefig(folder / "curves.png", dpi=90)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    published = ROOT / "runs/benchmark"
    parser.add_argument(
        "--folder", type=Path, default=published, help="where results are (runs/benchmark)"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=TASKS,
        default=list(TASKS),
        metavar="TASK",
        help="of these, by name (all): " + "; ".join(TASKS),
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="(1 to 5)")
    parser.add_argument(
        "--flags", default="", help="more flags for all of them, to try another setting"
    )
    parser.add_argument("--processes", type=int, default=2, help="runs at a time (2)")
    args = parser.parse_args()
    if args.flags and args.folder.resolve() == published:
        parser.error(
            "with --flags comes a --folder of its own, as runs/benchmark is what was published"
        )
    if args.processes < 1:
        parser.error(f"--processes {args.processes} runs nothing; give 1 or more")
    try:
        shlex.split(args.flags)
    except ValueError as error:
        parser.error(f"--flags {args.flags} cannot be read: {error}")
    TASKS.update({x: (env_id, f"{flags} {args.flags}") for x, (env_id, flags) in TASKS.items()})
    args.folder.mkdir(parents=True, exist_ok=True)
    finished = {
        (x["task"], int(x["seed"])) for x in itertools.chain(*current(args.folder).values())
    }
    wanted = dict.fromkeys((task, seed) for task in args.only for seed in args.seeds)
    missing = [one for one in wanted if one not in finished]
    there = {(x["task"], int(x["seed"])) for x in read(args.folder / "results.csv")}
    if args.flags and there.intersection(missing):
        parser.error(
            f"{args.folder} has these runs with other flags, which would be lost; "
            "give each setting of --flags a --folder of its own"
        )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    lock = Lock()

    def job(one):
        row, points = train(*one)
        with lock:
            keep(args.folder, row, points)
            print(", ".join(f"{name} {row[name]}" for name in COLUMNS[:8]), flush=True)

    pool = ThreadPoolExecutor(args.processes)
    try:
        for future in as_completed([pool.submit(job, one) for one in missing]):
            future.result()
    except KeyboardInterrupt:  # which, when it is Ctrl-C, the runs under way have received too
        print(
            "interrupted; runs under way are waited for, unless they were interrupted as well",
            flush=True,
        )
        sys.exit(130)
    except RuntimeError as error:
        print(f"{error}\nruns under way are waited for", file=sys.stderr, flush=True)
        sys.exit(1)
    finally:
        pool.shutdown(cancel_futures=True)
        if current(args.folder):
            table(args.folder)
            picture(args.folder)


if __name__ == "__main__":
    main()
