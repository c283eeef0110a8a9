"""How ppo.py scales from one process to two under torchrun, each pinned to a core of its own.

    python tests/benchmarks/scaling.py           # the table, and a model of many processes; ten minutes
    python tests/benchmarks/scaling.py --runs 3  # fewer runs of each

The same flags are the same algorithm, so the numbers of environments and rows are those of both processes
together. The efficiency is the throughput of two processes over twice that of one. One and two processes
take turns. The time in collective operations is that of the first process, waiting for the other included.

The model is of more processes with as many environments each as in the run of two: an all-reduce of n bytes
among P takes 2 log2(P) latency + 2 (P - 1) / P n / bandwidth, and the rest of an iteration what it took here.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
COMMON = """ --num-minibatches 4 --update-epochs 4 --learning-rate 2.5e-4 --hidden-sizes 64 64 --device cpu
    --eval-episodes 0 --checkpoint-interval 0"""
PROCESSES = (8, 64, 512)
STEPS = 4 * 4  # of an iteration; each has an all-reduce of the gradient, 40 kB, and one of two numbers
OTHERS = 14  # all-reduces and gathers of an iteration: statistics, losses, episodes
WORKLOADS = {  # name: flags, and iterations of some seconds
    "CartPole-v1, 64 x 128": ("--env-id CartPole-v1 --num-envs 64 --num-steps 128", 20),
    "HalfCheetah-v5, 16 x 128": ("--env-id HalfCheetah-v5 --num-envs 16 --num-steps 128", 10),
    "made up, 1 ms a step, 8 x 128": (
        """--env-id made_up:MadeUp-v0 --env-kwargs {"work":1.0} --num-envs 8 --num-steps 128""",
        4,
    ),
}


def worker(flags):
    """One process of a run: pin it, time what it does, and print that if it is the first."""
    rank = int(os.environ["RANK"])
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path[:0] = [str(HERE), str(HERE.parents[1])]
    import torch

    import ppo

    seconds = {"collective": 0.0, "update": 0.0}

    def timed(owner, name, what):
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                seconds[what] += time.perf_counter() - start

        setattr(owner, name, wrapped)

    calls = []
    timed(ppo, "all_sum", "collective")
    timed(torch.distributed, "all_gather_object", "collective")
    log = ppo.Run.log

    def recording_log(run, iteration, scalars):
        log(run, iteration, scalars)
        calls.append((time.perf_counter(), seconds["collective"]))

    ppo.Run.log = recording_log
    timed(ppo, "ppo_loss", "update")
    timed(torch.autograd, "grad", "update")
    timed(ppo.Adam, "step", "update")
    sys.argv[1:] = flags
    ppo.main()
    if rank == 0:
        # From the end of the first iteration, which warms up, to that of the last.
        (start, before), (end, after) = calls[0], calls[-1]
        result = {"seconds": end - start, "collective": after - before, "iterations": len(calls) - 1}
        result["update"] = seconds["update"] / len(calls)
        print(json.dumps(result), file=sys.stderr)


def run(processes, flags, iterations):
    """Seconds of an iteration, of its update, and of its collective operations."""
    flags = (flags + COMMON).split()
    batch = int(flags[flags.index("--num-envs") + 1]) * int(flags[flags.index("--num-steps") + 1])
    flags += ["--total-timesteps", str(iterations * batch)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    with tempfile.TemporaryDirectory() as folder:
        command = [*launch, __file__, "--worker", *flags]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        sys.exit(done.stderr)
    result = json.loads(lines[-1])
    n = result["iterations"]
    return batch * n / result["seconds"], result["update"], result["collective"] / n, result["seconds"] / n


def measure_collectives():
    """Microseconds of an all-reduce of one number, and of 40,000, between two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, __file__, "--collectives"], capture_output=True, text=True)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[")))


def collectives():
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[int(os.environ["RANK"])]})
    import torch

    torch.distributed.init_process_group()
    result = []
    for size in (1, 40_000):
        x, times = torch.ones(size), []
        for _ in range(500):
            start = time.perf_counter()
            torch.distributed.all_reduce(x)
            times.append(time.perf_counter() - start)
        result.append(statistics.median(times) * 1e6)
    if os.environ["RANK"] == "0":
        print(json.dumps(result))
    torch.distributed.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    print(f"median (lowest to highest) of {args.runs} runs; processes pinned to a core each\n")
    print("| | 1 process, steps/s | 2 processes, steps/s | efficiency | update, 1 process | in collectives |")
    print("|---|---|---|---|---|---|")
    local = {}
    for name, (flags, iterations) in WORKLOADS.items():
        ones, twos = [], []
        for i in range(args.runs):
            for processes in (1, 2) if i % 2 else (2, 1):
                (ones if processes == 1 else twos).append(run(processes, flags, iterations))
        efficiency = sorted(two[0] / one[0] / 2 for one, two in zip(ones, twos, strict=True))
        one, two = (sorted(x[0] for x in xs) for xs in (ones, twos))
        middle = args.runs // 2
        share = statistics.median(two[2] / two[3] for two in twos)
        update = statistics.median(x[1] for x in ones)
        local[name] = statistics.median(x[3] - x[2] for x in twos)
        print(
            f"| {name} | {one[middle]:,.0f} ({one[0]:,.0f} to {one[-1]:,.0f}) "
            f"| {two[middle]:,.0f} ({two[0]:,.0f} to {two[-1]:,.0f}) "
            f"| {efficiency[middle]:.0%} ({efficiency[0]:.0%} to {efficiency[-1]:.0%}) "
            f"| {update * 1e3:.0f} ms | {share:.0%} |",
            flush=True,
        )
    small, large = measure_collectives()
    print(f"\nan all-reduce of 1 number takes {small:.0f} us, of 40,000 {large:.0f} us\n")
    print("a model of the efficiency, by latency and bandwidth:\n")
    print("| | | " + " | ".join(f"{processes} processes" for processes in PROCESSES) + " |")
    print("|---|---|" + "---|" * len(PROCESSES))
    here = (small / 2 * 1e-6, 160_000 / max(large - small, 1) * 1e6)
    networks = {"as measured here": here, "20 us, 1 GB/s": (20e-6, 1e9), "5 us, 10 GB/s": (5e-6, 10e9)}
    for name, seconds in local.items():
        for network, (latency, bandwidth) in networks.items():
            cells = []
            for processes in PROCESSES:
                few = 2 * math.log2(processes) * latency
                gradient = few + 2 * (processes - 1) / processes * 40_000 / bandwidth
                cells.append(f"{seconds / (seconds + STEPS * (few + gradient) + OTHERS * few):.0%}")
            print(f"| {name} | {network} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    if "--worker" in sys.argv:
        worker(sys.argv[sys.argv.index("--worker") + 1 :])
    elif "--collectives" in sys.argv:
        collectives()
    else:
        main()
