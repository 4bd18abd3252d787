"""How the cost of gptlab's own work grows: with the tokens of a dataset, its shards, a run's metrics, a study's runs.

Every piece of work is done at several sizes on made-up files, in a temporary folder. Its time is CPU time, which other
programs on the machine change little; its memory is the peak above what was in use before.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from gptlab import machine
from gptlab.config import Recipe, build_recipe, load_study, read_layer
from gptlab.data.containers import Shard, shard_header
from gptlab.data.sampler import Windows
from gptlab.data.shards import Dataset, Tokens
from gptlab.hardware import processor_name
from gptlab.planning.resolve import resolve_recipe
from gptlab.progress import tell_nobody
from gptlab.report.listing import find_runs, list_runs
from gptlab.report.write import write_report
from gptlab.rundir import RunDir, run_name

TOKENS = (10**6, 10**7, 10**8, 10**9, 10**10, 10**11)
SHARDS = (1, 10, 100, 1000, 10_000)
LINES = (1000, 10_000, 100_000)
RUNS = (10, 50, 250)
SHARD_TOKENS = 10**8
UINT16 = np.dtype("<u2")

FITTED = 3  # the largest sizes, where what a call costs at any size weighs least
FLAT, LESS, LINEAR = 0.25, 0.75, 1.25  # exponents up to which growth is called flat, less than linear, and linear
SECONDS = 0.2  # of CPU time to repeat a fast piece of work for


@dataclass(frozen=True)
class Work:
    """A piece of work that is done at several sizes."""

    name: str
    grows: str
    """What `sizes` counts."""
    sizes: Sequence[int]
    prepare: Callable[[int], Callable[[], Any]]
    """From a size, the work to be timed."""
    meaning: str
    """What it is part of, for the reader."""


def bench_scaling(
    name: str,
    overrides: Mapping[str, Any] | None = None,
    tell: Callable[[str], None] = tell_nobody,
) -> dict[str, Any]:
    """Measure how the cost of the work on a recipe's data and of runs grows.

    Args:
        name: a recipe's name or path: its context, its step and its sampling.
        overrides: dotted settings.
        tell: called with a message before each measurement.

    Returns:
        The report, ready for JSON: "rows" with sizes, seconds, bytes and the exponents that fit them.

    Raises:
        UserError: the recipe cannot be used.
    """
    recipe = resolve_recipe(build_recipe(read_layer(name), overrides or {}), "cpu").recipe
    rows = []
    with tempfile.TemporaryDirectory(prefix="gptlab-bench-") as folder:
        for work in works(recipe, Path(folder)):
            cost = []
            for size in work.sizes:
                tell(f"{work.name}: {size:,} {work.grows}")
                cost.append(measured(work.prepare(size)))
            rows.append(_row(work, cost))
    return {
        "recipe": recipe.name,
        "block_size": recipe.model.block_size,
        "sequences_per_step": recipe.sequences_per_step,
        "cpu": processor_name(),
        "rows": rows,
    }


def measured(work: Callable[[], Any]) -> tuple[float, int]:
    """CPU seconds of a piece of work, the least of several times, and its peak memory in bytes."""
    machine.forget_peak()
    before = machine.peak_memory_since()
    began = time.process_time()
    work()
    seconds = [time.process_time() - began]
    peak = machine.peak_memory_since() - before
    while sum(seconds) < SECONDS and len(seconds) < 100:
        began = time.process_time()
        work()
        seconds.append(time.process_time() - began)
    return max(min(seconds), 1e-7), max(peak, 0)


def exponent(sizes: Sequence[int], costs: Sequence[float]) -> float:
    """The power of the size that the costs of the `FITTED` largest sizes follow, by least squares of the logarithms."""
    x, y = np.log(np.asarray(sizes[-FITTED:], float)), np.log(np.asarray(costs[-FITTED:], float))
    x = x - x.mean()
    return float((x @ y) / (x @ x)) if len(x) > 1 else 0.0


def growth(power: float) -> str:
    limits = {"flat": FLAT, "less than linear": LESS, "linear": LINEAR}
    return next((word for word, limit in limits.items() if power <= limit), "more than linear")


def _row(work: Work, cost: Sequence[tuple[float, int]]) -> dict[str, Any]:
    seconds, peak = [each for each, _ in cost], [each for _, each in cost]
    power = exponent(work.sizes, seconds)
    # to the resolution of a process's memory: some pages more or less are no growth
    memory = exponent(work.sizes, [each + 2**22 for each in peak])
    return {
        "work": work.name,
        "grows": work.grows,
        "sizes": list(work.sizes),
        "seconds": seconds,
        "peak_bytes": peak,
        "exponent": power,
        "memory_exponent": memory,
        "growth": growth(power),
        "memory_growth": growth(memory),
        "says": (
            f"{work.name} ({work.meaning}) is {growth(power)} in {work.grows}, and so is its memory"
            if growth(power) == growth(memory)
            else f"{work.name} ({work.meaning}) is {growth(power)} in {work.grows}, and its memory is {growth(memory)}"
        ),
    }


# -- the work -------------------------------------------------------------------------------------------------------


def works(recipe: Recipe, folder: Path) -> list[Work]:
    """Everything that is measured. Files go under `folder`."""
    block, n, sampling = recipe.model.block_size, recipe.sequences_per_step, recipe.data.sampling

    def order(tokens: int) -> Callable[[], Any]:
        drawn = Windows(far_tokens(tokens, folder / "shard.bin"), block, "shuffled", "1337/data/0")
        last = drawn.windows_per_epoch // n * n  # a step of the second epoch: no step is like the first
        return lambda: drawn.starts(np.arange(last, last + n))

    def batch(tokens: int) -> Callable[[], Any]:
        drawn = Windows(far_tokens(tokens, folder / "shard.bin"), block, sampling, "1337/data/0")
        steps = iter(range(10**6))
        return lambda: drawn.batch(n * next(steps), n)

    def dataset(shards: int) -> Path:
        path = folder / f"shards-{shards}"
        if not path.exists():
            make_shards(path, shards, 4 * block + 1)
        return path

    def opening(shards: int) -> Callable[[], Any]:
        path = dataset(shards)
        return lambda: Dataset(path).fingerprint()

    def of_shards(shards: int) -> Callable[[], Any]:
        drawn, steps = Windows(Dataset(dataset(shards)).train, block, sampling, "1337/data/0"), iter(range(10**6))
        return lambda: drawn.batch(n * next(steps), n)

    def run(lines: int) -> RunDir:
        found = RunDir(folder / f"run-{lines}")
        if not found.exists():
            found.write_recipe(recipe)
            write_lines(found, metric_lines(10 * lines, 10, 1000, seed=0))
        return found

    def study(runs: int) -> Path:
        path = folder / f"study-{runs}"
        if not path.exists():
            make_study(path, arms=5, seeds=max(2, runs // 5), steps=500)
        return path

    def report(runs: int) -> Callable[[], Any]:
        path = study(runs)
        return lambda: write_report([path], out=folder / f"report-{runs}")

    def listing(runs: int) -> Callable[[], Any]:
        path = study(runs)
        return lambda: list_runs(find_runs([path])[0])

    step = f"{n} x {block} tokens"
    return [
        Work("order", "tokens", TOKENS, order, f"which {n} windows a step takes, shuffled"),
        Work("batch", "tokens", TOKENS, batch, f"reading a step's {step}"),
        Work("dataset", "shards", SHARDS, opening, "opening a prepared dataset, once a run"),
        Work("batch of small shards", "shards", SHARDS, of_shards, f"reading a step's {step}"),
        Work("metrics", "lines", LINES, lambda size: run(size).read_metrics, "reading metrics.jsonl for plots"),
        Work("resume", "lines", LINES, lambda size: partial(run(size).cut_metrics, 10**12), "cutting metrics.jsonl"),
        Work("last line", "lines", LINES, lambda size: partial(run(size).last_line, "val_loss"), "of metrics.jsonl"),
        Work("runs", "runs", RUNS, listing, "`gptlab runs`, of runs with 52 lines each"),
        Work("report", "runs", RUNS, report, "`gptlab study report`, of 5 arms"),
    ]


def far_tokens(tokens: int, file: Path) -> Tokens:
    """A split of up to any size, whose full shards are all one sparse file without data on disk."""
    each = min(tokens, SHARD_TOKENS)
    offset = len(shard_header("llmc", UINT16, each))
    if not file.exists():
        write_sparse(file, SHARD_TOKENS)
    return Tokens([Shard(file, "llmc", UINT16, offset, each)] * (tokens // each))


def write_sparse(file: Path, tokens: int) -> None:
    """A shard with a header and its full size, and no data on disk where the file system can do that."""
    header = shard_header("llmc", UINT16, tokens)
    with open(file, "wb") as handle:
        handle.write(header)
        handle.truncate(len(header) + UINT16.itemsize * tokens)


def make_shards(folder: Path, count: int, tokens: int) -> None:
    """A prepared dataset of sparse shards."""
    folder.mkdir(parents=True)
    splits: dict[str, Any] = {}
    for split, number in (("train", count), ("val", 1)):
        files = [f"{split}-{i:06d}.bin" for i in range(number)]
        for file in files:
            write_sparse(folder / file, tokens)
        entry = {"tokens": tokens, "max_token": 50256, "sha256": "0" * 64}
        splits[split] = {
            "tokens": number * tokens,
            "documents": 1,
            "bytes": 4 * number * tokens,
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


def metric_lines(steps: int, every: int, eval_every: int, seed: int, rate: float = 1.0) -> list[dict[str, Any]]:
    """Made-up lines of metrics.jsonl for a loss that falls as a power of the step."""
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


def write_lines(run: RunDir, lines: Sequence[dict[str, Any]]) -> None:
    run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def make_study(folder: Path, arms: int, seeds: int, steps: int) -> None:
    """A finished study of made-up runs, whose arms differ by some thousandths of a nat."""
    folder.mkdir(parents=True)
    source = folder / "many.toml"
    text = [
        'name = "many"',
        'recipe = "smoke-lm"',
        f"seeds = {list(range(seeds))}",
        'baseline = "arm-000"',
        'metric = { name = "final_val_loss", better = "lower", margin = 0.004 }',
        f"settings.train.max_steps = {steps}",
        *(f"[arms.arm-{arm:03d}]\noptim.lr = {6e-3 * (1 + arm / 100):.6g}" for arm in range(arms)),
    ]
    source.write_text("\n".join(text) + "\n", encoding="utf-8")
    study = load_study(source)
    source.unlink()
    (folder / "study.toml").write_text(study.to_toml(), encoding="utf-8")
    facts = {"device_name": "H100", "torch": "2.13.0", "gptlab": "0", "threads": 1, "data": {"fingerprint": "0" * 16}}
    for index, arm in enumerate(study.arms):
        for seed in study.seeds:
            run = RunDir(folder / run_name(arm, seed))
            run.write_recipe(study.build(arm, seed))
            run.write_json("environment.json", facts)
            lines = metric_lines(steps, 10, 250, seed, rate=1 + index / 500)
            write_lines(run, lines)
            result = {
                "status": "completed",
                "steps": steps,
                "tokens": steps * 4194304,
                "final_val_loss": next(line["val_loss"] for line in reversed(lines) if "val_loss" in line),
                "tokens_per_second": 4.6e8,
                "peak_memory_gb": 8.1,
                "wall_seconds": 1000.0 + seed,
            }
            run.write_json("result.json", result)
            summary = {"study": study.name, "arm": arm, "group": "core", "seed": seed, **result}
            (folder / f"{run_name(arm, seed)}.json").write_text(json.dumps(summary), encoding="utf-8")


# -- as text --------------------------------------------------------------------------------------------------------


def render(report: Mapping[str, Any]) -> Group:
    """The report for a terminal: a row per piece of work with its first and last size, and a sentence for each."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for head in ("work", "grows", "from", "to", "seconds", "", "exponent", "peak MB", "", "exponent"):
        table.add_column(head, justify="left" if head in ("work", "grows") else "right", no_wrap=True)
    for row in report["rows"]:
        ends = (0, -1)
        table.add_row(
            row["work"],
            row["grows"],
            *(f"{row['sizes'][i]:.0e}" if row["sizes"][i] >= 10**6 else f"{row['sizes'][i]:,}" for i in ends),
            *(f"{row['seconds'][i]:.2g}" for i in ends),
            f"{row['exponent']:.2f}",
            *(f"{row['peak_bytes'][i] / 1e6:,.0f}" for i in ends),
            f"{row['memory_exponent']:.2f}",
        )
    says = (
        f"{report['recipe']} on {report['cpu']}: CPU seconds, and the peak above what was in use before; the exponents "
        f"fit the {FITTED} largest sizes: up to {FLAT} is called flat, from {LESS} to {LINEAR} linear"
    )
    return Group(table, *(Text(line, overflow="fold") for line in [*(row["says"] for row in report["rows"]), says]))
