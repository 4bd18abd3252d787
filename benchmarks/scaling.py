"""Limits beyond one machine: 1,000 GPUs, 10^13 tokens, and a study of 1,000 runs (docs/scaling.md).

Each part runs gptlab's own code at that scale if possible, or is arithmetic:

    permutation   the order of 10^13 tokens: time, memory, and a check that the ranks' rows partition the batch
    shards        a folder of sparse shards: time and memory of opening it and of drawing windows
    memory        parameters, checkpoint and hours by the planner (hours on one GPU, divided by 1,000)
    network       arithmetic: time of gradient exchange and gathers against computation, and cost of a larger batch
    agreeing      sockets of processes that train together, and time of an all-reduce between them
    index         the index of a sharded checkpoint
    failures      the checkpoint interval by Young and Daly, against a simulation of failures
    metrics       metrics.jsonl of a long run: bytes, seconds to read, to cut and to plot
    startup       files and bytes that a process reads to start; speed of a checkpoint's sha256
    study         1,000 runs with synthetic numbers: `gptlab study status` and `gptlab study report`

    python benchmarks/scaling.py                            # all parts: about ten minutes and 2 GB of disk
    python benchmarks/scaling.py failures --mtbf-hours 14   # mean time between failures of the whole machine
    python benchmarks/scaling.py shards --shards 100000
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
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import machine, say, table, write_json

from gptlab.config import load_recipe, load_study
from gptlab.data.containers import Shard, shard_header
from gptlab.data.sampler import Windows
from gptlab.data.shards import Tokens
from gptlab.data.verified import file_sha256
from gptlab.rundir import RunDir, run_name

TOKENS, SHARD_TOKENS, BLOCK = 10**13, 10**8, 1024
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


# -- the order of the data ------------------------------------------------------------------------------------------


def rows_of(rank: int, world: int, rows: int) -> range:
    """A rank's contiguous share of the rows of a global batch. The sizes of any two ranks differ by at most one."""
    return range(rank * rows // world, (rank + 1) * rows // world)


def far_windows(tokens: int = TOKENS, seed: str = "1337/data/0") -> Windows:
    """The windows of a split without files. The order depends only on the sizes of the shards."""
    shard = Shard(Path("train.bin"), "llmc", np.dtype("<u2"), 1024, SHARD_TOKENS)
    return Windows(Tokens([shard] * (tokens // SHARD_TOKENS)), BLOCK, "shuffled", seed)


def permutation(world: int) -> tuple[dict[str, Any], Table]:
    windows = far_windows()
    n = windows.windows_per_epoch
    found: dict[str, Any] = {"windows": n}
    rows: Table = [("sequences a step", "all of them, ms", "one rank's, ms", "peak of all, MB", "disjoint and whole")]
    for batch in (512, 4096, 16384):
        step = n // batch - 1  # the last whole batch of the epoch
        first = step * batch
        whole = windows.starts(np.arange(first, first + batch))
        shares = [rows_of(rank, world, batch) for rank in range(world)]
        parts = [windows.starts(np.arange(first + r.start, first + r.stop)) for r in shares if len(r)]
        same = bool(np.array_equal(np.concatenate(parts), whole)) and len(np.unique(whole)) == batch
        own = max(shares, key=len)
        all_s = seconds(lambda first=first, batch=batch: windows.starts(np.arange(first, first + batch)))
        one_s = seconds(lambda a=first + own.start, b=first + own.stop: windows.starts(np.arange(a, b)), 50)
        tracemalloc.start()
        windows.starts(np.arange(first, first + batch))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        found[str(batch)] = {"all_s": all_s, "rank_s": one_s, "peak_bytes": peak, "disjoint_and_whole": same}
        rows.append(
            (f"{batch:,}", f"{1e3 * all_s:.2f}", f"{1e3 * one_s:.2f}", f"{peak / 1e6:.2f}", "yes" if same else "NO")
        )
    sample = 10**7
    began = time.perf_counter()
    drawn = windows.starts(np.arange(n // 2, n // 2 + sample))
    found["sample"] = {
        "windows": sample,
        "seconds": time.perf_counter() - began,
        "repeated": sample - len(np.unique(drawn)),
        "lowest": int(drawn.min()),
        "highest": int(drawn.max()),
        "mean_share": float(drawn.mean() / TOKENS),
    }
    s = found["sample"]
    rows.append((f"{sample:,} in turn", f"{1e3 * s['seconds']:,.0f}", "", "", f"{s['repeated']} repeated"))
    return found, rows


# -- shards ---------------------------------------------------------------------------------------------------------


def make_shards(folder: Path, count: int) -> None:
    """A dataset of sparse shards: complete headers and full sizes, but no data on disk."""
    folder.mkdir(parents=True)
    header, size = shard_header("llmc", np.dtype("<u2"), SHARD_TOKENS), 2 * SHARD_TOKENS
    entry = {"tokens": SHARD_TOKENS, "max_token": 50256, "sha256": "0" * 64}
    splits: dict[str, Any] = {}
    for split, number in (("train", count), ("val", 1)):
        files = [f"{split}-{i:06d}.bin" for i in range(number)]
        for file in files:
            with open(folder / file, "wb") as handle:
                handle.write(header)
                handle.truncate(len(header) + size)
        splits[split] = {
            "tokens": number * SHARD_TOKENS,
            "documents": 1,
            "bytes": 4 * number * SHARD_TOKENS,
            "shards": [{"file": file, **entry} for file in files],
        }
    manifest = {
        "format": "llmc",
        "version": 1,
        "corpus": "text",
        "dtype": "uint16",
        "splits": splits,
        "tokenizer": {"name": "gpt2", "vocab_size": 50257, "eot": 50256},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")


# For scripts in new processes. VmHWM is the peak; the `ru_maxrss` of a new process starts at its parent's value.
PEAK = """
def peak_mb():
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
"""


def measured(script: str, *arguments: object) -> dict[str, Any]:
    """Run a script in a new process. Returns the JSON that it prints."""
    line = [sys.executable, "-c", PEAK + script, *map(str, arguments)]
    content: dict[str, Any] = json.loads(subprocess.run(line, capture_output=True, text=True, check=True).stdout)
    return content


OPEN = """
import json, sys, time
import numpy as np
from gptlab.data.sampler import Windows
from gptlab.data.shards import Dataset
base, began = peak_mb(), time.perf_counter()
data = Dataset(sys.argv[1])
opened = time.perf_counter() - began
opened_mb = peak_mb() - base
began = time.perf_counter()
data.check(50304), data.fingerprint()
checked = time.perf_counter() - began
windows = Windows(data.train, 1024, "shuffled", "1337/data/0")
began = time.perf_counter()
for step in range(64):
    windows.batch(64 * step, 64)
print(json.dumps({"open_s": opened, "open_mb": opened_mb, "check_s": checked,
                  "window_us": 1e6 * (time.perf_counter() - began) / 4096}))
"""


def shards(count: int, folder: Path) -> tuple[dict[str, Any], Table]:
    found: dict[str, Any] = {}
    rows: Table = [("shards", "tokens", "manifest, MB", "open, s", "memory, MB", "check, s", "a window, us")]
    for number in sorted({min(100, count), max(1, count // 10), count}):  # all 100 stay open, see MAX_OPEN_SHARDS
        data = folder / f"shards-{number}"
        say(f"{number:,} sparse shards")
        make_shards(data, number)
        done = subprocess.run(
            [sys.executable, "-c", PEAK + OPEN, str(data)], capture_output=True, text=True, check=True
        )
        one = {**json.loads(done.stdout), "manifest_bytes": (data / "manifest.json").stat().st_size}
        found[str(number)] = one
        rows.append(
            (
                f"{number:,}",
                f"{number * SHARD_TOKENS:.0e}",
                f"{one['manifest_bytes'] / 1e6:.1f}",
                f"{one['open_s']:.2f}",
                f"{one['open_mb']:.0f}",
                f"{one['check_s']:.2f}",
                f"{one['window_us']:.0f}",
            )
        )
        subprocess.run(["rm", "-r", str(data)], check=True)
    return found, rows


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
    world.any(False)
    one = sockets()
    dist.all_reduce(torch.zeros(1), group=dist.new_group(backend="gloo"))  # sharded checkpoints use such a group
    two = sockets()
    began = time.perf_counter()
    for _ in range(20):
        world.any(False)
    taken = (time.perf_counter() - began) / 20
    if world.first:
        print(json.dumps({"sockets": one, "sockets_of_two_groups": two, "any_s": taken}), flush=True)
if rank:
    os._exit(0)
while True:
    try:
        os.wait()
    except ChildProcessError:
        break
"""


def agreeing(sizes: Sequence[int] = (2, 4, 8, 16, 32)) -> tuple[dict[str, Any], Table]:
    """Processes on this machine that agree on whether to stop, as in each training step."""
    found = {}
    rows: Table = [("processes", "sockets of each", "with a second group", "to agree, ms")]
    for size in sizes:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        found[str(size)] = one = measured(AGREE, size, port)
        rows.append((size, one["sockets"], one["sockets_of_two_groups"], f"{1e3 * one['any_s']:.1f}"))
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


# -- metrics --------------------------------------------------------------------------------------------------------


def metric_lines(steps: int, every: int, eval_every: int, seed: int, rate: float = 1.0) -> list[dict[str, Any]]:
    """Synthetic lines of metrics.jsonl for a loss that falls as a power of the step."""
    rng = np.random.default_rng(seed)
    lines = []
    for step in range(0, steps + 1, every):
        loss = 2.5 + 6 * (1 + rate * step / 50) ** -0.5
        if step:
            lines.append(
                {
                    "step": step,
                    "tokens": step * 4194304,
                    "loss": loss + rng.normal(0, 0.02),
                    "lr": 6e-4,
                    "grad_norm": abs(rng.normal(0.3, 0.03)),
                    "tokens_per_second": 4.6e8 + rng.normal(0, 1e6),
                    "memory_gb": 8.123456789,
                    "largest_logit": 20 + rng.normal(),
                    "updates_lost": 0.0,
                    "mfu": 0.4 + rng.normal(0, 0.01),
                }
            )
        if step % eval_every == 0:
            value = loss + rng.normal(0, 0.004)
            lines.append(
                {
                    "step": step,
                    "tokens": step * 4194304,
                    "val_loss": value,
                    "val_perplexity": math.exp(value),
                    "val_bits_per_byte": value / 3.3,
                }
            )
    return lines


DRAW = """
import json, sys, time
from pathlib import Path
from gptlab.report.plots import draw
from gptlab.rundir import RunDir
run = RunDir.open(sys.argv[1])
began = time.perf_counter()
n = len(run.read_metrics())
read = time.perf_counter() - began
began = time.perf_counter()
draw([run], run.plots)
drawn = time.perf_counter() - began
began = time.perf_counter()
run.cut_metrics(10**12)
print(json.dumps({"lines": n, "read_s": read, "draw_s": drawn, "cut_s": time.perf_counter() - began,
                  "peak_mb": peak_mb()}))
"""


def metrics(folder: Path, steps: int = TOKENS // 2**22) -> tuple[dict[str, Any], Table]:
    found: dict[str, Any] = {}
    rows: Table = [("steps", "lines", "MB", "bytes a line", "read, s", "cut, s", "draw, s", "peak MB")]
    for number in (steps // 10, steps):
        run = RunDir(folder / f"metrics-{number}")
        run.write_recipe(load_recipe("gpt2-124m-fineweb-edu", {"train.max_steps": number}))
        lines = metric_lines(number, 10, 1000, seed=0)
        run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        del lines
        size = run.metrics_file.stat().st_size
        done = subprocess.run(
            [sys.executable, "-c", PEAK + DRAW, str(run.path)], capture_output=True, text=True, check=True
        )
        one = {**json.loads(done.stdout), "bytes": size}
        found[str(number)] = one
        rows.append(
            (
                f"{number:,}",
                f"{one['lines']:,}",
                f"{size / 1e6:.1f}",
                f"{size / one['lines']:.0f}",
                f"{one['read_s']:.1f}",
                f"{one['cut_s']:.1f}",
                f"{one['draw_s']:.1f}",
                f"{one['peak_mb']:.0f}",
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


# -- a study of 1,000 runs ------------------------------------------------------------------------------------------


def make_study(folder: Path, arms: int, seeds: int, steps: int = 10_000) -> None:
    """A finished study of synthetic runs, whose arms differ by some thousandths of a nat."""
    source = folder / "many.toml"
    folder.mkdir(parents=True)
    text = [
        'name = "many"',
        'recipe = "smoke-lm"',
        f"seeds = {list(range(seeds))}",
        'baseline = "arm-000"',
        'metric = { name = "final_val_loss", better = "lower", margin = 0.004 }',
        f"settings.train.max_steps = {steps}",
    ]
    for arm in range(arms):
        text.append(f"[arms.arm-{arm:03d}]\noptim.lr = {6e-3 * (1 + arm / 100):.6g}")
    source.write_text("\n".join(text) + "\n", encoding="utf-8")
    study = load_study(source)
    source.unlink()
    (folder / "study.toml").write_text(study.to_toml(), encoding="utf-8")
    facts = {"device_name": "H100", "torch": "2.13.0", "gptlab": "0", "threads": 1, "data": {"fingerprint": "0" * 16}}
    for index, arm in enumerate(study.arms):
        for seed in study.seeds:
            run = RunDir(folder / run_name(arm, seed))
            run.path.mkdir()
            run.recipe_file.write_text(study.build(arm, seed).to_toml(), encoding="utf-8")
            (run.path / "environment.json").write_text(json.dumps(facts), encoding="utf-8")
            lines = metric_lines(steps, 10, 250, seed, rate=1 + index / 500)
            run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            last = next(line for line in reversed(lines) if "val_loss" in line)
            result = {
                "status": "completed",
                "steps": steps,
                "tokens": steps * 4194304,
                "final_val_loss": last["val_loss"],
                "tokens_per_second": 4.6e8,
                "peak_memory_gb": 8.1,
                "wall_seconds": 1000.0 + seed,
            }
            (run.path / "result.json").write_text(json.dumps(result), encoding="utf-8")
            summary = {"study": study.name, "arm": arm, "group": "core", "seed": seed, **result}
            (folder / f"{run_name(arm, seed)}.json").write_text(json.dumps(summary), encoding="utf-8")


CALL = """
import sys
from gptlab.cli import main
try:
    main(sys.argv[1:])
finally:
    print(peak_mb(), file=sys.stderr)
"""


def cost_of(*arguments: str) -> tuple[float, float]:
    """Seconds and peak MB of a gptlab command."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", PEAK + CALL, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=True,
    )
    return time.perf_counter() - began, float(done.stderr.split()[-1])


def study(folder: Path, sizes: list[tuple[int, int]]) -> tuple[dict[str, Any], Table]:
    found: dict[str, Any] = {}
    rows: Table = [("arms x seeds", "on disk, MB", "status, s", "MB", "report, s", "MB", "page, MB", "run, s")]
    for arms, seeds in sizes:
        say(f"a study of {arms} arms x {seeds} seeds")
        data = folder / f"study-{arms}x{seeds}"
        make_study(data, arms, seeds)
        size = sum(file.stat().st_size for file in data.rglob("*") if file.is_file())
        status_s, status_mb = cost_of("study", "status", str(data))
        report_s, report_mb = cost_of("study", "report", str(data), "--out", str(data / "out"))
        page = (data / "out" / "report.html").stat().st_size
        run_s, _ = cost_of("study", "run", str(data), "--data.path", str(folder))  # all runs are finished
        found[f"{arms}x{seeds}"] = {
            "bytes": size,
            "status_s": status_s,
            "status_mb": status_mb,
            "report_s": report_s,
            "report_mb": report_mb,
            "page_bytes": page,
            "run_s": run_s,
        }
        rows.append(
            (
                f"{arms} x {seeds}",
                f"{size / 1e6:.0f}",
                f"{status_s:.1f}",
                f"{status_mb:.0f}",
                f"{report_s:.1f}",
                f"{report_mb:.0f}",
                f"{page / 1e6:.1f}",
                f"{run_s:.1f}",
            )
        )
    return found, rows


# -- all parts ------------------------------------------------------------------------------------------------------

PARTS = ("permutation", "shards", "memory", "network", "agreeing", "index", "failures", "metrics", "startup", "study")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"default: {' '.join(PARTS)}")
    parser.add_argument("--gpus", type=int, default=1000)
    parser.add_argument("--shards", type=int, default=TOKENS // SHARD_TOKENS)
    parser.add_argument(
        "--mtbf-hours",
        type=float,
        help="of the whole machine (default: two published rates)",
    )
    parser.add_argument("--failures", type=int, default=5000, help="simulated failures per row (default: 5000)")
    parser.add_argument("--arms", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--work", type=Path, metavar="DIR", help="for the files (default: a temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"{', '.join(sorted(unknown))}: must be among {', '.join(PARTS)}")

    found: dict[str, Any] = {"machine": machine(), "gpus": args.gpus}
    with tempfile.TemporaryDirectory(dir=args.work) as name:
        folder = Path(name)
        sizes = [
            (max(2, args.arms // 10), args.seeds),
            (args.arms, args.seeds),
            (5 * args.arms, max(2, args.seeds // 5)),
        ]
        parts: dict[str, Callable[[], tuple[dict[str, Any], Table]]] = {
            "permutation": lambda: permutation(args.gpus),
            "shards": lambda: shards(args.shards, folder),
            "memory": lambda: memory(args.gpus),
            "network": lambda: network(args.gpus),
            "agreeing": agreeing,
            "index": lambda: index(args.gpus),
            "failures": lambda: failures(args.gpus, args.mtbf_hours, args.failures),
            "metrics": lambda: metrics(folder),
            "startup": lambda: startup(folder),
            "study": lambda: study(folder, sizes),
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
