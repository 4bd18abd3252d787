"""Limits beyond one machine: 1,000 GPUs that train on 10^13 tokens (docs/scaling.md).

`gptlab bench scaling` measures how data, metrics and reports grow. Each part here runs gptlab's own code at that scale
if possible, or is arithmetic:

    memory        parameters, checkpoint and hours by the planner (hours on one GPU, divided by 1,000)
    network       arithmetic: time of gradient exchange and gathers against computation, and cost of a larger batch
    agreeing      sockets of processes that train together, and time of an all-reduce between them
    index         the index of a sharded checkpoint
    failures      the checkpoint interval by Young and Daly, against a simulation of failures
    startup       files and bytes that a process reads to start; speed of a checkpoint's sha256

    python benchmarks/thousand_gpus.py                            # all parts: some minutes and 1 GB of disk
    python benchmarks/thousand_gpus.py failures --mtbf-hours 14   # mean time between failures of the whole machine
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import machine, table, write_json

from gptlab.config import load_recipe
from gptlab.data.verified import file_sha256

TOKENS, BLOCK = 10**13, 1024
# Unexpected interruptions of 16,384 H100s in 54 days (Llama 3 herd of models, 2024, section 3.3.4)
LLAMA_GPU_HOURS = 16384 * 54 * 24 / 419
# Manual and estimated automatic restarts of 992 A100s in two months (OPT, Zhang et al. 2022, section 2.5)
OPT_GPU_HOURS = 992 * 60 * 24 / (35 + 70)

# GPUs per node; bytes per second in each direction of a GPU's 400 Gbit/s NIC, and of its NVLink
NODE, NIC, NVLINK = 8, 50e9, 450e9
# Critical batch in tokens, from the loss in nats (Kaplan et al. 2020, section 5.1); fitted to other data and optimizers
CRITICAL_TOKENS, CRITICAL_POWER = 2e8, 1 / 0.21

Table = list[tuple[object, ...]]


def seconds(work: Callable[[], Any], repeats: int = 5) -> float:
    """The minimum time of a few repetitions, as other processes share the machine."""
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return min(taken)


def measured(script: str, *arguments: object) -> dict[str, Any]:
    """Run a script in a new process. Returns the JSON that it prints."""
    line = [sys.executable, "-c", script, *map(str, arguments)]
    content: dict[str, Any] = json.loads(subprocess.run(line, capture_output=True, text=True, check=True).stdout)
    return content


# -- memory and time, by the planner --------------------------------------------------------------------------------


def plans() -> dict[str, Any]:
    """The planner's numbers of GPT-2 small and XL on one H100, with 10^13 tokens in steps of 4 Mi."""
    from gptlab.planning.device import Device
    from gptlab.planning.plan import plan_recipe

    found = {}
    for preset in ("gpt2", "gpt2-xl"):
        step = 2**22
        recipe = load_recipe(
            "gpt2-124m-fineweb-edu",
            {
                "model.preset": preset,
                "batch.micro_batch": 4,
                "batch.tokens_per_step": step,
                "train.max_steps": 0,
                "train.max_tokens": TOKENS,
                "train.max_epochs": 0,
                "eval.tokens": 655360,
                "train.eval_every": 1000,
            },
        )
        plan = plan_recipe(recipe, Device.named("H100"))
        found[preset] = {
            "parameters": plan.parameters,
            "flops_per_token": plan.flops_per_token,
            "weights": plan.memory.weights,
            "peak": plan.memory.peak,
            "checkpoint": plan.checkpoint,
            "tokens_per_second": plan.tokens_per_second,
            "hours": plan.hours,
            "data": plan.data,
            "steps": plan.steps,
        }
    return found


def memory(gpus: int) -> tuple[dict[str, Any], Table]:
    found = plans()
    rows: Table = [("", "parameters", "peak GB, 4 sequences", "checkpoint GB", "a rank's MB", "hours on all GPUs")]
    for name, plan in found.items():
        rows.append(
            (
                name,
                f"{plan['parameters'] / 1e6:.0f}M",
                f"{plan['peak'] / 1e9:.1f}",
                f"{plan['checkpoint'] / 1e9:.2f}",
                f"{plan['checkpoint'] / gpus / 1e6:.2f}",
                f"{plan['hours'] / gpus:.1f}",
            )
        )
    return found, rows


# -- the network: arithmetic ----------------------------------------------------------------------------------------


def critical_batch(loss: float) -> float:
    """Tokens in the batch at which a run needs twice its minimum of steps and of tokens (Kaplan et al. 2020)."""
    return CRITICAL_TOKENS / loss**CRITICAL_POWER


def exchange_seconds(size: float, passes: float, gpus: int) -> float:
    """Lower bound on the time to send `passes` times `size` bytes through every node and every GPU, without latency.

    Rings over all GPUs use all NICs of a node, so the NICs share a message; within the node, every GPU receives the
    whole message. An all-reduce takes two passes, an all-gather or a reduce-scatter one.
    """
    nodes = max(1, gpus // NODE)
    between = size * (nodes - 1) / nodes / (NODE * NIC)
    return passes * max(between, size / NVLINK)


def network(gpus: int) -> tuple[dict[str, Any], Table]:
    found: dict[str, Any] = {}
    rows: Table = [
        (
            "",
            "tokens a step",
            "sequences a GPU",
            "compute ms",
            "exchange ms",
            "speed, hidden .. not",
            "steps",
            "tokens wasted by",
        )
    ]
    for name, plan in plans().items():
        rate, size = plan["tokens_per_second"], plan["weights"]
        # Gradients are reduced in float32; FSDP gathers the weights in bf16, in the forward and the backward pass.
        # With one copy of the model per node, gathers stay on NVLink, and each NIC all-reduces an eighth of the
        # gradients.
        inside = exchange_seconds(size / 2, 2, NODE) + exchange_seconds(size, 1, NODE)
        ways = {
            "ddp": exchange_seconds(size, 2, gpus),
            "fsdp": exchange_seconds(size / 2, 2, gpus) + exchange_seconds(size, 1, gpus),
            "fsdp over 8": inside + 2 * size / NODE / NIC,
        }
        critical = critical_batch({"gpt2": 3.0, "gpt2-xl": 2.5}[name])
        found[name] = {"seconds": ways, "critical_tokens": critical, "batches": {}}
        for tokens in (2**19, 2**20, *(n * gpus * BLOCK for n in (1, 2, 4, 8, 16))):
            sequences = tokens / BLOCK / gpus
            computing = math.ceil(sequences) * BLOCK / rate  # of the rank with the most rows
            ideal = sequences * BLOCK / rate
            exchange = ways["ddp"]
            hidden, bare = ideal / max(computing, exchange), ideal / (computing + exchange)
            waste = 1 + tokens / critical
            found[name]["batches"][str(tokens)] = {"speed": [hidden, bare], "waste": waste, "compute_s": computing}
            rows.append(
                (
                    name,
                    f"{tokens:,}",
                    f"{sequences:.2f}",
                    f"{1e3 * computing:.1f}",
                    f"{1e3 * exchange:.1f}",
                    f"{hidden:.2f} .. {bare:.2f}",
                    f"{TOKENS / tokens:,.0f}",
                    f"{waste:.1f}",
                )
            )
        rows += [(name, way, "", "", f"{1e3 * taken:.1f}", "", "", "") for way, taken in ways.items()]
    return found, rows


# -- agreement between processes ------------------------------------------------------------------------------------

AGREE = """
import json, os, sys, time
import torch, torch.distributed as dist
from gptlab.distributed.world import process_group
size, port = int(sys.argv[1]), sys.argv[2]
rank = 0
for other in range(1, size):  # forked after the import, to share its memory
    if os.fork() == 0:
        rank = other
        break
os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": port}
torch.set_num_threads(1)
def sockets():
    count = 0
    for number in os.listdir("/proc/self/fd"):
        try:
            count += os.readlink("/proc/self/fd/" + number).startswith("socket")
        except OSError:  # the descriptor of the listing itself
            pass
    return count
with process_group("ddp", torch.device("cpu")) as world:
    world.max(0.0)
    one = sockets()
    dist.all_reduce(torch.zeros(1), group=dist.new_group(backend="gloo"))  # sharded checkpoints use such a group
    two = sockets()
    began = time.perf_counter()
    for _ in range(20):
        world.max(0.0)
    taken = (time.perf_counter() - began) / 20
    if world.first:
        print(json.dumps({"sockets": one, "sockets_of_two_groups": two, "exchange_s": taken}), flush=True)
if rank:
    os._exit(0)
while True:
    try:
        os.wait()
    except ChildProcessError:
        break
"""


def agreeing(sizes: Sequence[int] = (2, 4, 8, 16, 32)) -> tuple[dict[str, Any], Table]:
    """Processes on this machine that exchange one number, as the flag to stop, which a training step covers."""
    found = {}
    rows: Table = [("processes", "sockets of each", "with a second group", "to exchange a number, ms")]
    for size in sizes:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        found[str(size)] = one = measured(AGREE, size, port)
        rows.append((size, one["sockets"], one["sockets_of_two_groups"], f"{1e3 * one['exchange_s']:.1f}"))
    return found, rows


def index(gpus: int, tensors: int = 580) -> tuple[dict[str, Any], Table]:
    """The index of a sharded checkpoint of GPT-2 XL with moments. It has an entry for each tensor and process."""
    found = {}
    rows: Table = [("spread over", "index, MB", "to read, s")]
    for size in (NODE, gpus):
        kinds = {
            kind: {
                f"{moment}h.{i}.mlp.c_fc.weight": {
                    "shape": [1600, 6400],
                    "pieces": [[f"{kind}-{r + 1:05d}-of-{size:05d}.safetensors", 2 * r, 2] for r in range(size)],
                }
                for moment in moments
                for i in range(tensors)
            }
            for kind, moments in (("model", [""]), ("optimizer", ["exp_avg/", "exp_avg_sq/"]))
        }
        text = json.dumps(kinds)
        found[str(size)] = one = {"bytes": len(text), "read_s": seconds(lambda text=text: json.loads(text), 3)}
        rows.append((size, f"{one['bytes'] / 1e6:.1f}", f"{one['read_s']:.2f}"))
    return found, rows


# -- failures -------------------------------------------------------------------------------------------------------


def young(stall: float, mtbf: float) -> float:
    """The checkpoint interval with the least waste, to first order (Young 1974)."""
    return math.sqrt(2 * stall * mtbf)


def daly(stall: float, mtbf: float) -> float:
    """The checkpoint interval with the least waste, to higher order (Daly 2006, equation 37)."""
    if stall >= 2 * mtbf:
        return mtbf
    x = stall / (2 * mtbf)
    return math.sqrt(2 * stall * mtbf) * (1 + math.sqrt(x) / 3 + x / 9) - stall


def expected_waste(interval: float, stall: float, write: float, restart: float, mtbf: float) -> float:
    """Share of the time that is lost: not spent on training that a checkpoint keeps (Daly 2006, equation 20).

    Background writes are added to the equation: a write of `write` seconds costs as much as a restart that takes
    `write` seconds longer. A save waits for the previous write.
    """
    cycle = max(interval, write) + stall
    return 1 - interval * math.exp(-(restart + write) / mtbf) / (mtbf * math.expm1(cycle / mtbf))


def simulate(
    interval: float, stall: float, write: float, restart: float, mtbf: float, failures: int, seed: int
) -> float:
    """The share of `expected_waste`, by a simulation with exponentially distributed times between failures.

    Args:
        interval: seconds of training between checkpoints.
        stall: seconds that training waits for the copy of the tensors.
        write: further seconds until the copy is on the disk; training continues meanwhile.
        restart: seconds from a failure to the first step. Failures may happen during a restart.
        mtbf: mean seconds between failures of the whole machine.
        failures: number of failures to simulate.
        seed: of the failure times.
    """
    rng = np.random.default_rng(seed)
    clock = kept = 0.0  # kept: seconds of training in the last checkpoint on the disk
    for _ in range(failures):
        life = rng.exponential(mtbf)
        now, work = restart, kept
        writing: tuple[float, float] | None = None  # time when the checkpoint is on the disk, and training in it
        while now < life:
            now, work = now + interval, work + interval
            if writing is not None:
                now = max(now, writing[0])  # `Checkpoints.save` waits for the previous write
                if writing[0] <= life:
                    kept = writing[1]
            now += stall
            writing = (now + write, work)
        if writing is not None and writing[0] <= life:
            kept = writing[1]
        clock += life
    return 1 - kept / clock


def failures(gpus: int, mtbf_hours: float | None, events: int) -> tuple[dict[str, Any], Table]:
    """Waste for two published failure rates and two ways to write a checkpoint of the 1.5B model."""
    rates = {"Llama 3": LLAMA_GPU_HOURS / gpus, "OPT": OPT_GPU_HOURS / gpus}
    if mtbf_hours:
        rates = {"given": mtbf_hours}
    # (stall, write) in seconds; docs/scaling.md explains the numbers
    forms = {"one rank writes 18.7 GB": (7.5, 31.0), "each of 1,000 its rows": (0.05, 3.0)}
    restart = 600.0
    found: dict[str, Any] = {}
    rows: Table = [
        (
            "rate",
            "checkpoint",
            "MTBF h",
            "Young s",
            "Daly s",
            "waste % at 1/2",
            "at Daly's",
            "at 2x",
            "simulated",
        )
    ]
    for source, hours in rates.items():
        for form, (stall, write) in forms.items():
            mtbf = 3600 * hours
            best = daly(stall, mtbf)
            intervals = [best / 2, best, 2 * best]
            said = [expected_waste(i, stall, write, restart, mtbf) for i in intervals]
            got = [simulate(i, stall, write, restart, mtbf, events, seed=1) for i in intervals]
            found[f"{source}, {form}"] = {
                "mtbf_s": mtbf,
                "stall_s": stall,
                "write_s": write,
                "restart_s": restart,
                "young_s": young(stall, mtbf),
                "daly_s": best,
                "expected": said,
                "simulated": got,
            }
            rows.append(
                (
                    source,
                    form,
                    f"{hours:.1f}",
                    f"{young(stall, mtbf):,.0f}",
                    f"{best:,.0f}",
                    *(f"{100 * waste:.2f}" for waste in said),
                    " / ".join(f"{100 * waste:.2f}" for waste in got),
                )
            )
    return found, rows


# -- start-up -------------------------------------------------------------------------------------------------------

STARTED = """
import json, os, sys, time
began = time.perf_counter()
import gptlab.training.loop
took = time.perf_counter() - began
files = {m.__file__ for m in list(sys.modules.values()) if getattr(m, "__file__", None)}
mapped = {line.split(maxsplit=5)[5].strip() for line in open("/proc/self/maps") if len(line.split(maxsplit=5)) == 6}
mapped = {path for path in mapped if os.path.isfile(path)}
print(json.dumps({"seconds": took, "modules": len(files), "libraries": len(mapped - files),
                  "library_bytes": sum(os.path.getsize(path) for path in mapped)}))
"""


def startup(folder: Path) -> tuple[dict[str, Any], Table]:
    found = measured(STARTED)
    file = folder / "checkpoint"
    file.write_bytes(os.urandom(2**20) * 1024)  # 1 GiB, in the page cache
    found["sha256_bytes_per_second"] = 2**30 / seconds(lambda: file_sha256(file), 3)
    file.unlink()
    rows: Table = [
        ("a process that can train imports", ""),
        ("files of Python", f"{found['modules']:,}"),
        ("libraries", f"{found['libraries']:,}, {found['library_bytes'] / 1e9:.2f} GB"),
        ("in seconds, from the page cache", f"{found['seconds']:.1f}"),
        ("sha256, GB/s", f"{found['sha256_bytes_per_second'] / 1e9:.2f}"),
    ]
    return found, rows


# -- all parts ------------------------------------------------------------------------------------------------------

PARTS = ("memory", "network", "agreeing", "index", "failures", "startup")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"default: {' '.join(PARTS)}")
    parser.add_argument("--gpus", type=int, default=1000)
    parser.add_argument(
        "--mtbf-hours",
        type=float,
        help="of the whole machine (default: two published rates)",
    )
    parser.add_argument("--failures", type=int, default=5000, help="simulated failures per row (default: 5000)")
    parser.add_argument("--work", type=Path, metavar="DIR", help="for the files (default: a temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"{', '.join(sorted(unknown))}: must be among {', '.join(PARTS)}")

    found: dict[str, Any] = {"machine": machine(), "gpus": args.gpus}
    with tempfile.TemporaryDirectory(dir=args.work) as name:
        folder = Path(name)
        parts: dict[str, Callable[[], tuple[dict[str, Any], Table]]] = {
            "memory": lambda: memory(args.gpus),
            "network": lambda: network(args.gpus),
            "agreeing": agreeing,
            "index": lambda: index(args.gpus),
            "failures": lambda: failures(args.gpus, args.mtbf_hours, args.failures),
            "startup": lambda: startup(folder),
        }
        for part in args.parts or PARTS:
            began = time.perf_counter()
            found[part], rows = parts[part]()
            print(f"\n{part} ({time.perf_counter() - began:.0f} s)")
            table(rows)
            write_json(args.json, found)
    return found


if __name__ == "__main__":
    main()
