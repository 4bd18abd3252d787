"""Runs that share a CPU: two runs with all cores each, two with half of the cores, and the effect of OpenMP's spinning.

    python benchmarks/sharing.py [--rounds 6] [--seconds 1.5] [--realtime] [--json FILE]

A run makes steps of `shakespeare-char-cpu`'s shape, batch 12, for some seconds. Reported are the steps per second of
all runs together. The variants take turns. A spin count is libgomp's GOMP_SPINCOUNT: how often a waiting thread checks
whether it can continue before it releases its core. --realtime gives single runs priority over all other processes
(SCHED_FIFO, as root), so that load on the machine does not disturb them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from common import in_turn, machine, ratios, say, show, spread, table, write_json

from gptlab.machine import cores

COUNTS = (None, 1000, 5000, 20000)


def steps(seconds: float, realtime: bool) -> None:
    """Print `ready`, wait for a line on stdin, make steps, and print the steps per second."""
    import torch

    from gptlab.config import Optim, load_recipe
    from gptlab.model.gpt import build_model
    from gptlab.optim.optimizers import make_optimizer

    shape = load_recipe("shakespeare-char-cpu").model.model_copy(update={"vocab_size": 65})
    model = build_model(shape, "cpu")
    optimizer = make_optimizer(model, Optim())
    x, y = torch.randint(65, (2, 12, shape.block_size))  # (B, T) each

    def step() -> None:
        model(x, y, None, torch.full((), 1 / x.numel())).train.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(3):
        step()
    print("ready", flush=True)
    sys.stdin.readline()
    if realtime:
        for thread in os.listdir("/proc/self/task"):
            os.sched_setscheduler(int(thread), os.SCHED_FIFO, os.sched_param(1))
    began, n = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        step()
        n += 1
    print(n / (time.perf_counter() - began), flush=True)


def together(runs: int, threads: int, count: int | None, seconds: float, realtime: bool) -> float:
    """Steps per second of `runs` simultaneous processes, summed."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    environment["OMP_NUM_THREADS"] = str(threads)
    if count is not None:
        environment["GOMP_SPINCOUNT"] = str(count)
    words = [sys.executable, __file__, "--child", "--seconds", str(seconds), *["--realtime"] * realtime]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    started = [subprocess.Popen(words, **pipes) for _ in range(runs)]
    for process in started:
        assert process.stdout.readline() == "ready\n"
    for process in started:
        process.stdin.write("\n")
        process.stdin.flush()
    return sum(float(process.communicate()[0]) for process in started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--realtime", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return steps(args.seconds, args.realtime)

    variants = {"two, half the cores each": (2, max(1, cores() // 2), None)}
    for count in COUNTS:
        name = "default" if count is None else f"spin count {count:,}"
        variants |= {f"two, all cores each, {name}": (2, cores(), count), f"alone, {name}": (1, cores(), count)}
    measured: dict[str, list[float]] = {name: [] for name in variants}
    for name in in_turn(list(variants), args.rounds):
        runs, threads, count = variants[name]
        measured[name].append(together(runs, threads, count, args.seconds, args.realtime and runs == 1))
        say(f"{name}: {measured[name][-1]:.2f} steps/s, load {os.getloadavg()[0]:.1f}")
    bases = {2: "two, all cores each, default", 1: "alone, default"}
    rows: list[tuple[object, ...]] = [("runs", "steps/s", "against the default")]
    for name, values in measured.items():
        rows.append(
            (name, show(spread(values), ".2f"), show(ratios(values, measured[bases[variants[name][0]]]), ".2f"))
        )
    table(rows)
    write_json(args.json, {"machine": machine(), "steps_per_second": measured})


if __name__ == "__main__":
    main()
