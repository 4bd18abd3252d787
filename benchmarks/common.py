"""Shared by the benchmarks: facts about the machine, paired ratios, tables and JSON files.

Importing this module does not import torch, as some benchmarks measure the start of a process.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "src"))  # gpu.py runs without gptlab installed
from gptlab.hardware import cpu_facts, processor_name
from gptlab.machine import cores


def machine() -> dict[str, Any]:
    """The processor and its instructions for matrix products, the number of cores, and the load at this moment."""
    known = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    return {
        "cpu": processor_name(),
        "instructions": [name for name in known if name in cpu_facts().get("flags", "").split()],
        "cores": cores(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "command": sys.argv,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """Median, minimum and maximum of a / b, where each measurement of a is paired with the neighbouring one of b."""
    return spread([x / y for x, y in zip(a, b, strict=True)])


def show(spread: dict[str, float], form: str = ".3f") -> str:
    return f"{spread['median']:{form}} ({spread['min']:{form}} .. {spread['max']:{form}})"


def table(rows: Sequence[Sequence[object]]) -> None:
    """Print rows in columns. The first row is the heading."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in texts) for i in range(len(texts[0]))]
    for row in texts:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def say(text: str) -> None:
    """Print a progress message on stderr. Only the results go to stdout."""
    print(text, file=sys.stderr, flush=True)


def write_json(path: Path | None, measured: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")


def in_turn(names: Sequence[str], rounds: int) -> Iterator[str]:
    """Every name once per round, in alternating order, so that a slowdown of the machine affects all names alike."""
    for r in range(rounds):
        yield from names if r % 2 == 0 else reversed(names)
