"""How well ppo.py learns: environments x seeds, each a run of the command line, their curves and
a table.

    python tests/benchmarks/learning.py                           # all that runs/benchmark/ lacks
    python tests/benchmarks/learning.py --only Ant-v5 --seeds 1   # some of it
    python tests/benchmarks/learning.py --folder runs/mine        # all of it again, elsewhere
    python tests/benchmarks/learning.py --folder runs/try --only Ant-v5 --flags="--num-steps 64"

It may be interrupted and called again: a finished run is a line of results.csv, and is repeated
only if its flags here or its preset have changed, or that line is taken out (as after another
change of ppo.py). In the folder are results.csv (a line a run), <environment>.csv (the learning
curves), table.md and curves.png. The training return is the mean over the last 100 episodes, the
evaluation that of 100 greedy episodes; seconds and steps per second are of the whole command,
imports and evaluation included, with as many other runs beside it as --processes says. The table
and the picture show the runs with the flags and presets of now.
"""

import argparse
import csv
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

CLASSIC = "--num-envs 8 --num-steps 64 --update-epochs 10 --learning-rate 5e-4"
LUNAR = """--total-timesteps 1_000_000 --num-envs 16 --num-steps 1024 --num-minibatches 256
    --learning-rate 3e-4 --gamma 0.999 --gae-lambda 0.98"""
FLAGS = {  # beside --env-id and --seed
    "CartPole-v1": CLASSIC,
    "Acrobot-v1": CLASSIC,
    "MountainCar-v0": CLASSIC,
    "LunarLander-v3": LUNAR,
    "Pendulum-v1": "",  # from here on the preset for continuous actions
    "HalfCheetah-v5": "",
    "Hopper-v5": "",
    "Walker2d-v5": "",
    "Ant-v5": "",
}
# Published returns, with their spread over seeds: of CleanRL and baselines in training, of rl-zoo3
# the greedy evaluation of one tuned agent, of Tianshou the best evaluation within 1 million
# steps. MuJoCo was that of -v2 to -v4, LunarLander -v2. The README has the sources.
PUBLISHED = {
    "CartPole-v1": {"CleanRL": "490.0 ± 6.1", "baselines": "497.5", "rl-zoo3": "500.0"},
    "Acrobot-v1": {"CleanRL": "-86.4 ± 1.3", "baselines": "-81.8", "rl-zoo3": "-73.5"},
    "MountainCar-v0": {"CleanRL": "-200", "baselines": "-200", "rl-zoo3": "-110.4"},
    "LunarLander-v3": {"rl-zoo3": "242.1"},
    "Pendulum-v1": {"CleanRL": "-1142", "rl-zoo3": "-172.2"},
    "HalfCheetah-v5": {
        "CleanRL": "1442.6 ± 46.0",
        "baselines": "1668.6",
        "rl-zoo3": "5819",
        "Tianshou": "5783.9 ± 1244.0",
    },
    "Hopper-v5": {
        "CleanRL": "2382.9 ± 271.7",
        "baselines": "2316.2",
        "rl-zoo3": "2410",
        "Tianshou": "2609.3 ± 700.8",
    },
    "Walker2d-v5": {
        "CleanRL": "2288.0 ± 571.8",
        "baselines": "3425.0",
        "rl-zoo3": "3479",
        "Tianshou": "3588.5 ± 756.6",
    },
    "Ant-v5": {"rl-zoo3": "1327", "Tianshou": "3258.4 ± 1079.3"},
}
SOURCES = ("CleanRL", "baselines", "rl-zoo3", "Tianshou")
EVALUATED = {
    "rl-zoo3": " (evaluation)",
    "Tianshou": " (evaluation)",
}  # the others are of the training
COLUMNS = [
    "env_id",
    "seed",
    "steps",
    "training_return",
    "evaluation_return",
    "evaluation_std",
    "seconds",
]
COLUMNS += ["flags", "versions", "machine"]
POINTS = 100  # of a curve


def machine():
    """The processor and the number of cores."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"{found[1] if found else platform.processor()}, {os.cpu_count()} cores"


@cache
def settings(env_id):
    """What a run has beside its seed: the flags above, in brackets what its preset sets below."""
    flags = shlex.split(FLAGS[env_id])
    preset = {} if "--preset" in FLAGS[env_id] else ppo.preset(env_id)
    return " ".join([*flags, *(f"({name} {x})" for name, x in preset.items() if name != "preset")])


def train(env_id, seed):
    """Run ppo.py in an empty folder; return its line of results.csv, and its curve."""
    command = [
        "--env-id",
        env_id,
        "--seed",
        str(seed),
        "--eval-episodes",
        "100",
        "--run-name",
        "run",
    ]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, ROOT / "ppo.py", *shlex.split(FLAGS[env_id]), *command],
            cwd=folder,
            capture_output=True,
            text=True,
        )
        seconds = time.perf_counter() - start
        if done.returncode:
            raise RuntimeError(
                f"{env_id}, seed {seed}, ended with {done.returncode}:\n{done.stderr[-2000:]}"
            )
        checkpoint = torch.load(Path(folder, "runs/run/checkpoint.pt"), weights_only=True)
        events = EventAccumulator(str(Path(folder, "runs/run")), size_guidance={"scalars": 0})
        events.Reload()
    packages = f"torch {torch.__version__}, gymnasium {gym.__version__}"
    versions = f"Python {platform.python_version()}, {packages}"
    evaluation = re.search(r"eval: mean (\S+) std (\S+)", done.stdout)
    row = {
        "env_id": env_id,
        "seed": seed,
        "steps": checkpoint["global_step"],
        "training_return": round(float(np.mean(checkpoint["returns"])), 2),
        "evaluation_return": evaluation[1],
        "evaluation_std": evaluation[2],
        "seconds": round(seconds),
        "flags": settings(env_id),
        "versions": versions,
        "machine": machine(),
    }
    return row, curve(events, checkpoint["global_step"])


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
    """By environment the finished runs of results.csv whose flags and preset are those of now."""
    runs = {}
    for line in read(folder / "results.csv"):
        if line["env_id"] in FLAGS and line["flags"] == settings(line["env_id"]):
            runs.setdefault(line["env_id"], []).append(line)
    return runs


def write(path, columns, rows):
    """Write a CSV file as a whole, so that an interruption leaves the old one or the new one."""
    with path.with_suffix(".tmp").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    path.with_suffix(".tmp").replace(path)


def keep(folder, row, points):
    """Add a run to the folder, its curve first: a line of results.csv means that all is there."""
    path = folder / f"{row['env_id']}.csv"
    rows = [x for x in read(path) if x["seed"] != str(row["seed"])]
    rows += [
        {"seed": row["seed"], "step": step, "seconds": seconds, "return": mean}
        for step, seconds, mean in points
    ]
    write(path, ["seed", "step", "seconds", "return"], sorted(rows, key=lambda x: int(x["seed"])))
    name = row["env_id"], str(row["seed"])
    results = [*(x for x in read(folder / "results.csv") if (x["env_id"], x["seed"]) != name), row]
    results.sort(key=lambda x: ([*FLAGS, x["env_id"]].index(x["env_id"]), int(x["seed"])))
    write(folder / "results.csv", COLUMNS, results)


def table(folder):
    """Write table.md: mean and deviation over the seeds, beside what others have published."""
    finished = current(folder)
    lines = [
        "| environment | steps | seeds | training return | greedy evaluation | "
        + " | ".join(SOURCES)
    ]
    lines[0] += " | steps/s | minutes |"
    lines.append("|---" * (len(SOURCES) + 7) + "|")
    for env_id, runs in finished.items():
        training, evaluation, seconds, steps = (
            np.array([float(x[name]) for x in runs])
            for name in ("training_return", "evaluation_return", "seconds", "steps")
        )
        cells = [env_id, f"{steps[0]:,.0f}", ", ".join(x["seed"] for x in runs)]
        cells += [f"{x.mean():.1f} ± {x.std():.1f}" for x in (training, evaluation)]
        cells += [PUBLISHED[env_id].get(source, "") for source in SOURCES]
        cells += [f"{(steps / seconds).mean():,.0f}", f"{seconds.mean() / 60:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    where = {f"{x['versions']}, {x['machine']}" for runs in finished.values() for x in runs}
    lines += ["", "Runs: " + "; ".join(sorted(where)) + "."]
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def picture(folder):
    """Draw curves.png: the mean over the seeds, its deviation shaded, and the published figures."""
    shown = {env_id: [x["seed"] for x in runs] for env_id, runs in current(folder).items()}
    rows = -(-len(shown) // 3)
    figure, axes = plt.subplots(rows, 3, figsize=(12, 3.2 * rows), squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    for axis, (env_id, seeds) in zip(axes.flat, shown.items(), strict=False):
        points = read(folder / f"{env_id}.csv")
        by_seed = [
            np.array(
                [(float(x["step"]), float(x["return"])) for x in points if x["seed"] == seed]
            ).T
            for seed in seeds
        ]
        steps = np.linspace(max(x[0][0] for x in by_seed), min(x[0][-1] for x in by_seed), POINTS)
        returns = np.array([np.interp(steps, *x) for x in by_seed])
        mean, std = returns.mean(0), returns.std(0)
        axis.plot(steps, mean, label=f"ppo.py, {len(seeds)} seeds")
        axis.fill_between(steps, mean - std, mean + std, alpha=0.25)
        for colour, source in zip(("C1", "C2", "C3", "C4"), SOURCES, strict=True):
            if published := PUBLISHED[env_id].get(source):
                axis.axhline(
                    float(published.split()[0]),
                    color=colour,
                    ls="--",
                    lw=1,
                    label=source + EVALUATED.get(source, ""),
                )
        axis.set_title(env_id, fontsize=10)
        axis.tick_params(labelsize=8)
        axis.legend(fontsize=6, loc="best")
    figure.supxlabel("environment steps", fontsize=9)
    figure.supylabel("episodic return in training", fontsize=9)
    figure.tight_layout()
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
        choices=FLAGS,
        default=list(FLAGS),
        metavar="ENV_ID",
        help="of the nine (all)",
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
    FLAGS.update({env_id: f"{flags} {args.flags}" for env_id, flags in FLAGS.items()})
    args.folder.mkdir(parents=True, exist_ok=True)
    finished = {(e, int(x["seed"])) for e, runs in current(args.folder).items() for x in runs}
    wanted = dict.fromkeys((e, seed) for seed in args.seeds for e in args.only)
    missing = [run for run in wanted if run not in finished]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    lock = Lock()

    def job(run):
        row, points = train(*run)
        with lock:
            keep(args.folder, row, points)
            print(", ".join(f"{name} {row[name]}" for name in COLUMNS[:7]), flush=True)

    pool = ThreadPoolExecutor(args.processes)
    try:
        for future in as_completed([pool.submit(job, run) for run in missing]):
            future.result()
    except KeyboardInterrupt:  # which, when it is Ctrl-C, the runs under way have received too
        print(
            "interrupted; runs under way are waited for, unless they were interrupted as well",
            flush=True,
        )
        sys.exit(130)
    finally:
        pool.shutdown(cancel_futures=True)
        if current(args.folder):
            table(args.folder)
            picture(args.folder)


if __name__ == "__main__":
    main()
