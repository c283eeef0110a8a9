"""How ppo.py scales from one process to two under torchrun, each pinned to a core of its own.

    python tests/benchmarks/scaling.py                       # the tables, a quarter of an hour
    python tests/benchmarks/scaling.py --runs 3              # with fewer runs of each
    python tests/benchmarks/scaling.py --only CartPole-v1

The same flags are the same algorithm, so that environments and rows are those of both processes
together. The efficiency is the throughput of two processes over twice that of one. The bound is
that of two runs side by side that are not connected, with half of the environments each: the most
that two cores can do that share memory and power. All of them take turns. The share of time in
all-reduce is that of the first process, and includes its waiting for the other.

The last table is a model of P processes, each with as many environments as in the run of two. An
all-reduce of b bytes takes 2 log2(P) latency + 2 (P - 1) / P b / bandwidth. An iteration has as
many of them as were counted in the run of two, and all else takes as long as measured there.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from speed import show_head, show_row, spread

HERE = Path(__file__).parent
PPO = HERE.parents[1] / "ppo.py"
COMMON = ["--eval-episodes", "0", "--device", "cpu"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
NETWORKS = {"20 us, 1 GB/s": (20e-6, 1e9), "5 us, 10 GB/s": (5e-6, 10e9)}
PROCESSES = (8, 64, 512)


class Workload(NamedTuple):
    """What is trained, in `iterations` that take some seconds."""

    env_id: str
    num_envs: int
    num_steps: int
    iterations: int
    flags: str = ""  # beside the preset's

    def command(self, share):
        """The flags of a run with this share of the environments."""
        num_envs = self.num_envs // share
        return [
            *COMMON,
            *("--env-id", self.env_id),
            *("--num-envs", str(num_envs)),
            *("--num-steps", str(self.num_steps)),
            *("--total-timesteps", str(self.iterations * num_envs * self.num_steps)),
            *self.flags.split(),
        ]

    @property
    def name(self):
        return f"{self.env_id.split(':')[-1]}, {self.num_envs} x {self.num_steps}"


CLEANRL = "--update-epochs 4 --learning-rate 2.5e-4 --gamma 0.99 --gae-lambda 0.95"
SLOW = """--env-kwargs {"work":1.0}"""  # ms a step
WORKLOADS = {
    "CartPole-v1": Workload("CartPole-v1", 64, 128, 20, CLEANRL),
    "HalfCheetah-v5": Workload("HalfCheetah-v5", 64, 32, 10),
    "MadeUp-v0": Workload("made_up:MadeUp-v0", 8, 128, 5, f"{CLEANRL} {SLOW}"),
}


class Result(NamedTuple):
    """Of a process, without its first iteration."""

    speed: float  # steps/s, of its own environments
    seconds: float  # of an iteration
    reducing: float  # seconds of an iteration in all-reduce
    sizes: list[int]  # bytes of each all-reduce of the last iteration


def worker(flags):
    """Run ppo.py in this process, pinned to a core, and print its Result if it is the first."""
    core = int(os.environ.get("CORE") or os.environ["LOCAL_RANK"])
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[core]})
    sys.path[:0] = [str(HERE), str(PPO.parent)]
    import ppo

    reducing = 0.0
    sizes = []
    iterations = []  # of each: the time at its end, and the seconds in all-reduce up to there
    all_sum, log = ppo.all_sum, ppo.Run.log

    def timed_all_sum(x):
        nonlocal reducing
        start = time.perf_counter()
        result = all_sum(x)
        reducing += time.perf_counter() - start
        sizes.append(x.numel() * x.element_size())
        return result

    def recording_log(run, *args):
        log(run, *args)
        iterations.append((time.perf_counter(), reducing, run.batch_size, list(sizes)))
        sizes.clear()

    ppo.all_sum, ppo.Run.log = timed_all_sum, recording_log
    sys.argv[1:] = flags
    ppo.main()
    if ppo.RANK == 0:
        (start, before, *_), (end, after, rows, last) = iterations[0], iterations[-1]
        count = len(iterations) - 1
        seconds = (end - start) / count
        print(json.dumps([rows / seconds, seconds, (after - before) / count, last]))


def start(launch, flags, core=""):
    """Start a worker, or several."""
    return subprocess.Popen(
        [*launch, __file__, "--worker", *flags],
        cwd=tempfile.mkdtemp(),
        env={**os.environ, "OMP_NUM_THREADS": "1", "CORE": core},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate()
    if process.returncode:
        sys.exit(f"{process.args} failed:\n{out}{err}")
    return Result(*json.loads(out.splitlines()[-1]))


def measure(workload):
    """Steps/s of one process, and of two side by side; the Result of two that are connected."""
    python = [sys.executable]
    one = finish(start(python, workload.command(1), core="0"))
    pair = [start(python, workload.command(2), core=core) for core in ("0", "1")]
    apart = sum(finish(process).speed for process in pair)
    return one.speed, apart, finish(start(TORCHRUN, workload.command(1)))


def efficiency(result, processes, latency, bandwidth):
    """What the model says of so many processes."""
    seconds = 0.0
    for size in result.sizes:
        seconds += 2 * math.log2(processes) * latency
        seconds += 2 * (processes - 1) / processes * size / bandwidth
    local = result.seconds - result.reducing
    return local / (local + seconds)


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--runs", type=int, default=5, help="of each")
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, help="rows of the table")
    options = parser.parse_args()
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores, {platform.processor()}")
    print(f"median (lowest to highest) of {options.runs} runs\n")
    show_head("steps/s", "1 process", "2 processes", "2 that are not connected")
    others, middle = [], {}
    for name in options.only or WORKLOADS:
        workload = WORKLOADS[name]
        runs = [measure(workload) for _ in range(options.runs)]
        one = spread([one for one, _, _ in runs])
        two = spread([two.speed for _, _, two in runs])
        show_row([workload.name, one, two, spread([apart for _, apart, _ in runs])])
        others.append(
            [
                workload.name,
                spread([two.speed / one / 2 for one, _, two in runs], ".0%"),
                spread([apart / one / 2 for one, apart, _ in runs], ".0%"),
                spread([two.reducing / two.seconds for _, _, two in runs], ".0%"),
                str(len(runs[0][2].sizes)),
            ]
        )
        middle[workload.name] = sorted(two for _, _, two in runs)[options.runs // 2]
    print()
    show_head("", "efficiency", "bound", "in all-reduce", "all-reduces an iteration")
    for cells in others:
        show_row(cells)
    print("\nA model, not a measurement, of the efficiency of more processes:\n")
    show_head("", "latency, bandwidth", *(f"{count} processes" for count in PROCESSES))
    for name, result in middle.items():
        for network, (latency, bandwidth) in NETWORKS.items():
            cells = [f"{efficiency(result, count, latency, bandwidth):.0%}" for count in PROCESSES]
            show_row([name, network, *cells])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2:])
    else:
        main()
