"""`gptlab train shakespeare-char-fast` against `shakespeare-char-cpu`: time and loss of whole runs.

The two take turns, each in a new process, in alternating order; every pair has another seed. Measured are wall_seconds
of result.json (the whole training, with start, evaluations and checkpoints) and the wall seconds of the process (also
imports, plots and card). `gptlab eval` scores every run on the whole validation split in windows of 64 tokens. TARGET
is the loss on random windows that nanoGPT's README reports for a CPU.

    python benchmarks/shakespeare_fast.py --data data/shakespeare-char --pairs 3

`gptlab prepare shakespeare --tokenizer char` makes the dataset. The exit status is 1 if a fast run misses TARGET, has
more parameters than the other recipe, or takes more than a quarter of its time (median).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import machine, ratios, say, show, spread, table, write_json

FAST, CPU = "shakespeare-char-fast", "shakespeare-char-cpu"
TARGET = 1.8857  # nats a token
SHARE = 0.25  # largest ratio of the two times


def gptlab(*arguments: object) -> float:
    """Run a gptlab process. Returns its wall seconds."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "gptlab", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}")
    return time.perf_counter() - began


def measured(recipe: str, seed: int, data: Path, run: Path) -> dict[str, Any]:
    process = gptlab("train", recipe, "--seed", seed, "--data.path", data, "--out", run)
    gptlab("eval", run, "--out", run / "scores.json")
    result, scores, environment = (
        json.loads((run / name).read_text(encoding="utf-8"))
        for name in ("result.json", "scores.json", "environment.json")
    )
    return {
        "seed": seed,
        "steps": result["steps"],
        "parameters": environment["parameters"],
        "wall": result["wall_seconds"],
        "process": process,
        "step_ms": result["time_per_iter_ms"],
        "val_loss": scores["val_loss"],
        "tokens": scores["tokens"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="prepared dataset")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()

    before = machine()
    runs: dict[str, list[dict[str, Any]]] = {FAST: [], CPU: []}
    with tempfile.TemporaryDirectory() as folder:
        for pair in range(args.pairs):
            for name in sorted(runs, reverse=pair % 2 == 0):
                one = measured(name, 1337 + pair, args.data, Path(folder) / f"{name}{pair}")
                runs[name].append(one)
                say(f"pair {pair + 1}/{args.pairs} {name}: {one['wall']:.1f} s, val_loss {one['val_loss']:.4f}")

    columns = {
        name: {key: [one[key] for one in found] for key in ("wall", "process", "step_ms", "val_loss")}
        for name, found in runs.items()
    }
    compared = {key: ratios(columns[FAST][key], columns[CPU][key]) for key in ("wall", "process", "step_ms")}
    write_json(args.json, {"machine": before, "runs": runs, "fast / cpu": compared})
    table(
        [
            ("", "parameters", "steps", "wall s", "process s", "ms a step", "val_loss, whole split"),
            *(
                (
                    name,
                    f"{found[0]['parameters']:,}",
                    found[0]["steps"],
                    *(show(spread(columns[name][key]), ".1f") for key in ("wall", "process", "step_ms")),
                    show(spread(columns[name]["val_loss"]), ".4f"),
                )
                for name, found in runs.items()
            ),
            ("fast / cpu", "", "", *(show(compared[key]) for key in ("wall", "process", "step_ms")), ""),
        ]
    )
    print(f"val_loss over {runs[FAST][0]['tokens']:,} tokens; target {TARGET}")
    worst = max(columns[FAST]["val_loss"])
    if worst > TARGET or compared["wall"]["median"] > SHARE or runs[FAST][0]["parameters"] > runs[CPU][0]["parameters"]:
        sys.exit(f"{FAST} did not reach {TARGET} in {SHARE} of the time with at most as many parameters")


if __name__ == "__main__":
    main()
