"""`gptlab train shakespeare-char-fast` against `shakespeare-char-cpu`, whole runs, and what each scores.

The two take turns on this machine, each a fresh process, and which of them begins alternates; a pair has a seed of
its own. Measured are the wall_seconds of result.json (all of the training, with its start, evaluations and
checkpoints) and those of the process (imports, plots and card too). `gptlab eval` then scores every run over the
whole validation split, in windows of 64 tokens: TARGET is what nanoGPT's README reports of random windows for a CPU.

    python benchmarks/shakespeare_fast.py --data data/shakespeare-char --pairs 3

--data is a dataset as `gptlab prepare shakespeare --tokenizer char` makes it. It ends with 1 if a fast run misses
TARGET, has more parameters than the other, or takes more than a quarter of its time in the median.
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
SHARE = 0.25  # of the other recipe's time


def gptlab(*arguments: object) -> float:
    """Wall seconds of a gptlab process."""
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
    print(f"val_loss is of {runs[FAST][0]['tokens']:,} tokens; the target is {TARGET}")
    worst = max(columns[FAST]["val_loss"])
    if worst > TARGET or compared["wall"]["median"] > SHARE or runs[FAST][0]["parameters"] > runs[CPU][0]["parameters"]:
        sys.exit(f"{FAST} is to reach {TARGET} in {SHARE} of the time with no more parameters, and did not")


if __name__ == "__main__":
    main()
