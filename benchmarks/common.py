"""What the benchmarks share: the machine they ran on, ratios pair by pair, a table, and a JSON file.

Nothing here imports torch: the start of a process is among the things measured.
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


def machine() -> dict[str, Any]:
    """The processor, what it multiplies in, how many cores, and how busy it was when this was called."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    except OSError:
        facts = {}
    flags = set(facts.get("flags", "").split())
    known = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    return {
        "cpu": facts.get("model name", platform.processor()),
        "instructions": [name for name in known if name in flags],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "command": sys.argv,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest of a / b, each measurement of a against the one of b taken beside it."""
    return spread([x / y for x, y in zip(a, b, strict=True)])


def show(spread: dict[str, float], form: str = ".3f") -> str:
    return f"{spread['median']:{form}} ({spread['min']:{form}} .. {spread['max']:{form}})"


def table(rows: Sequence[Sequence[object]]) -> None:
    """Print rows in columns, the first row a heading."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in texts) for i in range(len(texts[0]))]
    for row in texts:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def say(text: str) -> None:
    """Progress, on stderr: the table comes last on stdout."""
    print(text, file=sys.stderr, flush=True)


def write_json(path: Path | None, measured: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")


def in_turn(names: Sequence[str], rounds: int) -> Iterator[str]:
    """Every name once a round, forwards and backwards by turns, so that a machine that slows down slows all alike."""
    for r in range(rounds):
        yield from names if r % 2 == 0 else reversed(names)
