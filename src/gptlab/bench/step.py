"""Speed of a training step: tokens per second, MFU, memory and the time of each part, beside other trainers.

A step is the recipe's own: its data, micro-batches, loss, precision, compilation, clipping, optimizer and logs. Each
side has its own process. The sides take turns of one step, in alternating order, while the others wait, so that a
slowdown of the machine affects all sides alike. A ratio compares the two steps of a round.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

from gptlab.bench.peers import refuse
from gptlab.bench.sides import OURS, PARTS, WARM_UP, Order, Worker
from gptlab.config import build_recipe, read_layer
from gptlab.data.containers import write_shard
from gptlab.data.tokenizers import make_tokenizer
from gptlab.errors import ConfigError, DataError
from gptlab.hardware import mfu
from gptlab.planning.resolve import resolve_recipe
from gptlab.progress import tell_nobody
from gptlab.tasks.base import open_data
from gptlab.training.setup import pick_device

PAUSE = 0.1  # seconds between two turns on a CPU: waiting OpenMP threads stop spinning
RANDOM_TOKENS = 1 << 20


def bench_step(
    name: str,
    overrides: Mapping[str, Any] | None = None,
    peers: Sequence[str] = (),
    rounds: int = 10,
    profile: bool = False,
    progress: Callable[[str], None] = tell_nobody,
    needs_data: bool = False,
) -> dict[str, Any]:
    """Time the optimizer steps of a recipe, and those of peers.

    Args:
        name: a recipe's name or path.
        overrides: dotted settings.
        peers: some of `peers.PEERS`.
        rounds: timed steps of each side.
        profile: also name the operations that take most of a step.
        progress: called with a message before each step that takes a while.
        needs_data: time making batches too, and refuse a recipe without its data.

    Returns:
        The report, ready for JSON: facts, "rows" with one entry per side, and "ratios": a peer's time over ours.

    Raises:
        UserError: something that cannot be measured here; it says why.
    """
    if rounds < 1:
        raise ConfigError(f"rounds = {rounds}: must be at least 1")
    recipe = build_recipe(read_layer(name), overrides or {})
    quiet = {"log.to": [], "hellaswag.every": 0, "sample.every": 0, "train.eval_only": False, "eval.train": False}
    recipe = recipe.replace(quiet)
    with tempfile.TemporaryDirectory(prefix="gptlab-bench-") as folder, contextlib.ExitStack() as leaving:
        found = resolve_recipe(recipe, pick_device(recipe.train.device).type)
        recipe, shape = recipe.replace({"precision.regime": found.recipe.precision.regime}), found.shape.model
        for peer in peers:
            refuse(peer, recipe.replace({"model": shape.model_dump()}))
        try:
            open_data(recipe)
            data = ", ".join(recipe.data.mixture) or str(recipe.data.folder)
        except DataError:
            if needs_data or recipe.task != "lm" or recipe.train.init_from:
                raise
            data = "random tokens, for the recipe's data is not prepared"
            path = random_data(Path(folder) / "data", shape.vocab_size)
            recipe = recipe.replace({"data.path": path, "data.mixture": {}, "model.vocab_size": shape.vocab_size})

        workers: dict[str, Worker] = {}
        facts: dict[str, dict[str, Any]] = {}
        for side in dict.fromkeys((OURS, *peers)):  # one after the other: compiling does not disturb the others
            progress(f"{side}: building the model, first steps")
            order = Order(side, facts[OURS]["recipe"] if facts else recipe, f"{folder}/{side}")
            workers[side] = Worker(order)
            leaving.callback(workers[side].close)
            facts[side] = workers[side].answer()
        ours = facts[OURS]
        seconds: dict[str, list[dict[str, float]]] = {side: [] for side in workers}
        for r in range(rounds):
            for side in list(workers) if r % 2 == 0 else reversed(workers):
                progress(f"round {r + 1} of {rounds}: {side}")
                if len(workers) > 1 and ours["device"] == "cpu":
                    time.sleep(PAUSE)
                seconds[side].append(workers[side].ask("step"))
        recipe = ours["recipe"]
        parts = [part for part in PARTS if not (part == "head" and recipe.compile.enabled)]
        rows = [_row(side, facts[side], ours, seconds[side], parts, workers[side].ask("memory")) for side in workers]
        report = {
            **{key: ours[key] for key in ("device", "device_name", "threads")},
            "torch": torch.__version__,
            "recipe": recipe.name,
            "parameters": ours["parameters"],
            "precision": recipe.precision.regime,
            "optimizer": recipe.optim.name,
            "compiled": recipe.compile.enabled,
            "compile_mode": recipe.compile.mode,
            "block_size": recipe.model.block_size,
            f"{ours['unit']}_per_step": ours["per_step"],
            "data": data,
            "rounds": rounds,
            "rows": rows,
            "ratios": {row["name"]: _ratio(row["seconds"], rows[0]["seconds"]) for row in rows[1:]},
        }
        if profile:
            progress("profiling a step")
            report["profile"] = {side: worker.ask("profile") for side, worker in workers.items()}
        if needs_data:
            report["batch_seconds"] = [workers[OURS].ask("batches") for _ in range(rounds)]
        return report


def random_data(folder: Path, vocab_size: int) -> str:
    """Write a dataset of random ids. Returns its path."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    for split, n in (("train", RANDOM_TOKENS), ("val", RANDOM_TOKENS // 8)):
        write_shard(folder / f"{split}.bin", draw.integers(min(vocab_size, 1 << 16), size=n), "nanogpt")
    spec = make_tokenizer("byte", lambda: iter(())).spec()
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    return str(folder)


def _row(
    name: str,
    facts: Mapping[str, Any],
    ours: Mapping[str, Any],
    seconds: list[dict[str, float]],
    parts: Sequence[str],
    memory: float,
) -> dict[str, Any]:
    steps = [sum(each.values()) for each in seconds]
    spread = _spread(steps)
    speed = ours["per_step"] / spread["median"]
    row = {
        "name": name,
        "micro_batch": facts["micro_batch"],
        "step_seconds": spread,
        f"{ours['unit']}_per_second": speed,
        "peak_memory_gb": memory,
        "first_step_seconds": facts["first_step_seconds"],
        "first_loss": facts["first_loss"],
        "parts": {part: statistics.mean(each[part] for each in seconds) for part in parts},  # a mean: these add up
        "seconds": steps,
    }
    if ours["peak"] and ours["unit"] == "tokens":
        row["mfu"] = mfu(ours["flops_per_token"], speed, ours["peak"])
    return row


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _ratio(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """a / b of the same round; above 1, b is faster."""
    return _spread([x / y for x, y in zip(a, b, strict=True)])


def bench_data(
    name: str,
    overrides: Mapping[str, Any] | None = None,
    rounds: int = 10,
    progress: Callable[[str], None] = tell_nobody,
) -> dict[str, Any]:
    """How fast a recipe's batches are made, beside how fast its steps need them.

    Arguments and errors as for `bench_step`.
    """
    report = bench_step(name, overrides, (), rounds, False, progress, needs_data=True)
    [row], seconds = report.pop("rows"), report.pop("batch_seconds")
    del report["ratios"]
    unit = "tokens" if "tokens_per_step" in report else "samples"
    step, made = sum(row["parts"].values()), report[f"{unit}_per_step"] / statistics.median(seconds)
    return report | {
        f"batches_{unit}_per_second": made,
        f"step_{unit}_per_second": row[f"{unit}_per_second"],
        "times_as_fast": made / row[f"{unit}_per_second"],
        "waits_percent": 100 * row["parts"]["data"] / step,
    }


# -- as text --------------------------------------------------------------------------------------------------------


def render(report: Mapping[str, Any]) -> Group:
    """The report of `bench_step` for a terminal."""
    unit = "tokens" if "tokens_per_step" in report else "samples"
    rows, ratios = report["rows"], report["ratios"]
    table = _table("", *(row["name"] for row in rows))

    def line(head: str, of: Callable[[Mapping[str, Any]], str]) -> None:
        table.add_row(head, *(of(row) for row in rows))

    line("ms a step", lambda row: _show(row["step_seconds"], 1000, ",.4g"))
    line(f"{unit}/s", lambda row: f"{row[f'{unit}_per_second']:,.0f}")
    if any("mfu" in row for row in rows):
        line("MFU", lambda row: f"{row['mfu']:.1%}")
    line("peak GB of the steps", lambda row: f"{row['peak_memory_gb']:.3g}")
    line("first step, s", lambda row: f"{row['first_step_seconds']:.3g}")
    line("first loss", lambda row: f"{row['first_loss']:.4f}")
    line("micro-batch", lambda row: f"{row['micro_batch']}")
    for part in rows[0]["parts"]:
        line(f"{_called(part, report)}, mean ms", lambda row, part=part: _share(row["parts"], part))  # type: ignore[misc]
    if ratios:
        says = {OURS: "", **{name: f"{_show(ratio, 1, '.3f')}" for name, ratio in ratios.items()}}
        line("time / gptlab's", lambda row: says[row["name"]])
    shown: list[Any] = [table]
    for name, operations in report.get("profile", {}).items():
        top = _table(f"{name}: operations", "calls", "ms")
        for one in operations:
            top.add_row(one["operation"][:100], f"{one['calls']:,}", f"{one['ms']:,.2f}")
        shown += [Text(), top]
    says_peers = "; peers train by torch's AdamW" if ratios else ""
    tuned = " with max-autotune" if report["compile_mode"] == "max-autotune" else ""
    compiled = f"compiled{tuned}" if report["compiled"] else "not compiled"
    about = (
        f"{_facts(report)}: {report['precision']}, {compiled}, {report['optimizer']}, "
        f"{report[f'{unit}_per_step']:,} {unit} a step; median (min .. max) of {report['rounds']} steps after "
        f"{WARM_UP}, in turn{says_peers}; data: {report['data']}"
    )
    return Group(*shown, Text(about, overflow="fold"))


def render_data(report: Mapping[str, Any]) -> Text:
    """The report of `bench_data` for a terminal."""
    unit = "tokens" if "tokens_per_step" in report else "samples"
    made, used = report[f"batches_{unit}_per_second"], report[f"step_{unit}_per_second"]
    return Text(
        f"{_facts(report)}, data: {report['data']}: batches of {made:,.0f} {unit}/s, and steps that take "
        f"{used:,.0f} {unit}/s: {report['times_as_fast']:,.3g} times as fast; a step waits "
        f"{report['waits_percent']:.2g}% of its time for data",
        overflow="fold",
    )


def _facts(report: Mapping[str, Any]) -> str:
    threads = f", {report['threads']} threads" if report["device"] == "cpu" else ""
    return f"{report['recipe']}, {report['parameters'] / 1e6:.1f}M parameters, on {report['device_name']}{threads}"


def _called(part: str, report: Mapping[str, Any]) -> str:
    """Compiled, the head cannot be told from the blocks."""
    return "forward and head" if part == "forward" and report["compiled"] else part


def _table(*heads: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i else "left", no_wrap=True)
    return table


def _show(spread: Mapping[str, float], factor: float, form: str) -> str:
    return "{} ({} .. {})".format(*(f"{factor * spread[key]:{form}}" for key in ("median", "min", "max")))


def _share(parts: Mapping[str, float], part: str) -> str:
    return f"{1000 * parts[part]:,.3g} ({parts[part] / sum(parts.values()):.1%})"
