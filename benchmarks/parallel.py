"""Training by one process and by several: difference of the losses, and speed.

    python benchmarks/parallel.py [--data DIR] [--steps 50] [--processes 2 4] [--pairs 3] [--json FILE]

Exactness: the same run of 50 steps (7 sequences per step in micro-batches of 3, clipped) with DDP and FSDP on each
number of processes; reported is the largest relative difference of losses, gradient norms and evaluations from the run
with one process. Speed: the shape of `shakespeare-char-cpu` on the same number of cores, one process with 2 threads
against 2 processes with one thread each, in turns; on a machine with several GPUs, one GPU against all GPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import in_turn, machine, ratios, write_json

from gptlab.config import build_recipe, load_recipe
from gptlab.rundir import RunDir

KINDS = ("loss", "grad_norm", "val_loss")


def run(recipe: Any, out: Path, processes: int, strategy: str, threads: int) -> dict[str, Any]:
    """Train in new processes. Returns the content of result.json."""
    file = out.with_suffix(".toml")
    file.write_text(
        recipe.replace({"train.threads": threads, "distributed.strategy": strategy}).to_toml(), encoding="utf-8"
    )
    words = ["-m", "gptlab", "train", str(file), "--out", str(out)]
    if processes > 1:
        words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return RunDir(out).read_json("result.json")


def curve(out: Path) -> dict[tuple[str, int], float]:
    return {(kind, line["step"]): line[kind] for line in RunDir(out).read_metrics() for kind in KINDS if kind in line}


def exact(data: str, steps: int, counts: list[int], folder: Path) -> list[dict[str, Any]]:
    recipe = build_recipe(
        {
            "model": {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 64},
            "data": {"path": data, "tokenizer": "byte"},
            "batch": {"micro_batch": 3, "tokens_per_step": 7 * 64},
            "optim": {"lr": 3e-3},
            "log": {"every": 1},
            "schedule": {"warmup_steps": 5},
            "train": {"max_steps": steps, "eval_every": 10},
            "eval": {"tokens": 4096},
        }
    )
    run(recipe, folder / "one", 1, "ddp", 1)
    one, rows = curve(folder / "one"), []
    for n in counts:
        for strategy in ("ddp", "fsdp"):
            run(recipe, folder / f"{strategy}{n}", n, strategy, 1)
            other = curve(folder / f"{strategy}{n}")
            assert one.keys() == other.keys()
            off = {kind: max(abs(other[k] / one[k] - 1) for k in one if k[0] == kind) for kind in KINDS}
            rows.append({"processes": n, "strategy": strategy, **off})
            print(rows[-1], flush=True)
    return rows


def speed(data: str, pairs: int, folder: Path) -> dict[str, Any]:
    many, threads = (torch.cuda.device_count(), 0) if torch.cuda.device_count() > 1 else (2, 1)
    recipe = load_recipe(
        "shakespeare-char-cpu" if threads else "gpt2-124m-fineweb-edu",
        {
            "data.path": data,
            "data.tokenizer": "byte",
            "train.max_steps": 150,
            "train.eval_every": 0,
            "eval.tokens": 640,
            **({"batch.micro_batch": 6} if threads else {}),
        },
    )
    rates: dict[str, list[float]] = {"one": [], "ddp": [], "fsdp": []}
    for i, name in enumerate(in_turn(list(rates), pairs)):
        n = 1 if name == "one" else many
        found = run(recipe, folder / f"speed{i}", n, name if n > 1 else "ddp", threads * (3 - n))
        rates[name].append(found["tokens_per_second"])
    return {"processes": many, **{name: ratios(rates[name], rates["one"]) for name in ("ddp", "fsdp")}}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", default="data/stdlib-byte", help="made by: gptlab prepare stdlib --tokenizer byte")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = exact(given.data, given.steps, given.processes, Path(folder))
        facts = {"exact": rows, "speed": speed(given.data, given.pairs, Path(folder)) if given.pairs else None}
    print(json.dumps(facts, indent=2))
    write_json(given.json, {"machine": machine(), **facts})


if __name__ == "__main__":
    main()
