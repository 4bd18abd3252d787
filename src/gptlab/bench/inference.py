"""How fast a model writes text: prefill, decode, latency and memory, by precision regime and batch size.

A generation reads a prompt into an empty cache of keys and values up to the first new token (prefill), then feeds each
token to get the next (decode). A regime and a batch size are a cell. Cells are measured in rounds: each round has one
generation of every cell, in an order that rotates, so that a machine that slows down slows all of them alike.

Shapes are written as in `gptlab.model.gpt`: B sequences, T tokens, C = n_embd, V = vocab_size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from gptlab.config import Recipe, build_recipe, read_layer
from gptlab.errors import ConfigError, UserError
from gptlab.hardware import device_name
from gptlab.model.gpt import GPT, KVCache, build_model
from gptlab.planning.resolve import resolve_recipe
from gptlab.precision.regimes import REGIMES, NotApplicable, Regime, apply_regime, enter_regime
from gptlab.rundir import RunDir
from gptlab.seeding import address
from gptlab.training.setup import cropped, pick_device, start_from
from gptlab.training.throughput import Stopwatch, percentile

DEFAULT_RECIPE = "gpt2-124m-openwebtext"
DEFAULT_REGIMES = ("fp32", "tf32", "amp_bf16", "bf16_pure")
Fill = int | Callable[[GPT], None]


@dataclass
class Cell:
    """A line of the table: a regime, a batch size, and what was measured."""

    regime: str
    batch_size: int
    status: str = "completed"
    """completed, not_applicable or out_of_memory."""
    reason: str = ""
    seconds: list[list[float]] = field(default_factory=list)
    """Of each generation those of its prefill, then those of each decode step."""
    weights_bytes: int = 0
    cache_bytes: int = 0
    peak_bytes: int = 0
    """Measured, on a GPU only: a process has no peak of its own for each cell on a CPU."""

    def to_json(self, prompt_tokens: int) -> dict[str, Any]:
        """The line as the report has it; what was not measured is absent. GB are 1e9 bytes."""
        row: dict[str, Any] = {"regime": self.regime, "batch_size": self.batch_size, "status": self.status}
        if self.reason:
            row["reason"] = self.reason
        if self.status == "completed":
            first = [seconds[0] for seconds in self.seconds]
            steps = [step for seconds in self.seconds for step in seconds[1:]]
            row |= {
                "prefill_tokens_per_second": self.batch_size * prompt_tokens * len(first) / sum(first),
                "decode_tokens_per_second": self.batch_size * len(steps) / sum(steps),
                "first_token_ms_p50": 1e3 * percentile(first, 0.5),
                "first_token_ms_p95": 1e3 * percentile(first, 0.95),
                "decode_ms_p50": 1e3 * percentile(steps, 0.5),
                "decode_ms_p95": 1e3 * percentile(steps, 0.95),
            }
        sizes = {"weights": self.weights_bytes, "cache": self.cache_bytes, "peak_memory": self.peak_bytes}
        return row | {f"{name}_gb": size / 1e9 for name, size in sizes.items() if size}


def bench_inference(
    name: str = DEFAULT_RECIPE,
    overrides: Mapping[str, Any] | None = None,
    regimes: Sequence[str] = DEFAULT_REGIMES,
    batch_sizes: Sequence[int] = (1, 8),
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    repeats: int = 5,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure a model's generation in each regime at each batch size, one process for all of it.

    Args:
        name: a recipe's name or path (random weights: speed does not depend on them), or a run directory (its own).
        overrides: dotted settings; those of `precision` other than the regime hold in every regime.
        regimes: names of precision regimes.
        batch_sizes: sequences that are generated side by side.
        prompt_tokens: tokens that are read before the first new one; default a half of block_size, at most 256.
        new_tokens: tokens that are generated, the first by the prefill; default a quarter of block_size, at most 64.
        repeats: generations of each cell that count; one before them warms up.
        progress: told what is measured next.

    Returns:
        The report, ready for JSON: the device, the model, the lengths, and a line ("rows") for each cell.

    Raises:
        UserError: a recipe, run, regime or number that cannot be measured. What only this machine cannot do is a line.
    """
    recipe, fill = open_model(name, overrides or {})
    block = recipe.model.block_size
    prompt_tokens = min(256, max(1, block // 2)) if prompt_tokens is None else prompt_tokens
    new_tokens = min(64, max(2, block // 4)) if new_tokens is None else new_tokens
    for regime in regimes:
        if regime not in REGIMES:
            raise ConfigError(f"regimes = {regime}: must be one of {', '.join(REGIMES)}")
    numbers = {"batch_sizes": min(batch_sizes), "prompt_tokens": prompt_tokens, "repeats": repeats}
    for key, value in numbers.items():
        if value < 1:
            raise ConfigError(f"{key} = {value}: must be at least 1")
    if new_tokens < 2:
        raise ConfigError(f"new_tokens = {new_tokens}: must be at least 2, as the first one is the prefill's")
    if prompt_tokens + new_tokens > block:
        raise ConfigError(
            f"prompt_tokens + new_tokens = {prompt_tokens} + {new_tokens}: must be at most model.block_size = {block}"
        )
    device = pick_device(recipe.train.device)
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)

    groups = [[Cell(regime, B) for B in dict.fromkeys(batch_sizes)] for regime in dict.fromkeys(regimes)]
    cells = [cell for group in groups for cell in group]
    with torch.device("meta"):
        parameters = GPT(recipe.model).parameter_count()
    interleaved = fit_together(parameters, len(groups), device)
    for group in [cells] if interleaved else groups:
        measure(group, recipe, fill, prompt_tokens, new_tokens, repeats, device, progress)
    return {
        "device": device.type,
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "recipe": recipe.name,
        "parameters": parameters,
        "vocab_size": recipe.model.vocab_size,
        "precision": recipe.precision.model_dump(include={"head", "norms"}),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "repeats": repeats,
        "interleaved": interleaved,
        "compiled": False,
        "rows": [cell.to_json(prompt_tokens) for cell in cells],
    }


# -- what is measured -----------------------------------------------------------------------------------------------


def open_model(name: str, overrides: Mapping[str, Any]) -> tuple[Recipe, Fill]:
    """The recipe of a model, its shape complete, and what fills its weights.

    Args:
        name: a recipe's name or path, or a run directory.

    Raises:
        UserError: there is none, it is a classifier's, or nothing tells how many token ids it has.
    """
    run = RunDir(name)
    recipe = run.read_recipe().replace(overrides) if run.exists() else build_recipe(read_layer(name), overrides)
    if recipe.task == "classify":
        raise UserError(f"{name} is a classifier's: it writes no text, and this benchmark is of writing")
    if run.exists() and (shapes := [key for key in overrides if key.startswith("model.")]):
        raise UserError(f"{shapes[0]}: the weights of {name} have a shape already; a recipe can be given another")
    source = name if run.exists() else recipe.train.init_from
    if source:
        model, fill = start_from(source)
        if recipe.model.block_size < model.block_size:
            model, fill = cropped(model, recipe.model.block_size, fill)
        return recipe.replace({"model": model.model_dump()}), fill
    return recipe.replace({"model": resolve_recipe(recipe, "cpu").shape.model.model_dump()}), recipe.seed


def fit_together(parameters: int, n_regimes: int, device: torch.device) -> bool:
    """Whether a model for each regime takes under a quarter of what is free, so that all can be there at once."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return n_regimes * 4 * parameters < free / 4


# -- measuring ------------------------------------------------------------------------------------------------------


@torch.no_grad()  # not inference_mode, which torchao's float8 tensors do not take
def generate_timed(model: GPT, regime: Regime, prompt: Tensor, new_tokens: int) -> tuple[Tensor, list[float]]:
    """Greedy generation with the ids kept on the device: nothing is drawn and no token is waited for.

    Args:
        model: in the regime's dtypes, in evaluation mode.
        prompt: (B, T) ids.

    Returns:
        The new ids (B, new_tokens), and seconds: of the prefill up to its id, then of each decode step.
    """
    device, (B, T) = prompt.device, prompt.shape
    cache = KVCache(model, B, T + new_tokens, cache_dtype(regime))
    watch, new, ids = Stopwatch(device), prompt, []
    # One autocast context for the whole generation: it keeps the copies of the weights that it casts at the prefill.
    # Left after each token it would cast all of them for the next.
    with regime.context(device):
        watch.start()
        for _ in range(new_tokens):
            last = model.hidden(new, cache=cache)[:, -1]  # (B, C)
            new = model.logits(last).argmax(dim=-1, keepdim=True)  # (B, V) to (B, 1)
            if device.type == "mps":
                torch.mps.synchronize()  # the stopwatch times queues of CUDA only
            watch.step()
            ids.append(new)
    watch.lap()
    return torch.cat(ids, dim=1), watch.step_seconds


def cache_dtype(regime: Regime) -> torch.dtype:
    """What keys and values come out as; a cache of another dtype would be cast as a whole at every token."""
    return regime.autocast or regime.weights


def cache_bytes(recipe: Recipe, batch: int, room: int, dtype: torch.dtype) -> int:
    """Bytes of a `KVCache`: keys and values of n_embd numbers a layer and token."""
    return 2 * recipe.model.n_layer * batch * room * recipe.model.n_embd * dtype.itemsize


def measure(
    cells: list[Cell],
    recipe: Recipe,
    fill: Fill,
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    device: torch.device,
    progress: Callable[[str], None] = lambda _: None,
) -> None:
    """Fill in cells, round by round, with a model for each regime among them."""
    models: dict[str, GPT] = {}
    for name in dict.fromkeys(cell.regime for cell in cells):
        mine = [cell for cell in cells if cell.regime == name]
        progress(f"{name}: making the model")
        with excused(mine):
            regime = _enter(recipe, name, device)
            models[name] = _build(recipe, fill, regime, device)
            for cell in mine:
                cell.weights_bytes = sum(t.nbytes for t in (*models[name].parameters(), *models[name].buffers()))
    for r in range(repeats + 1):
        for cell in cells[r % len(cells) :] + cells[: r % len(cells)]:
            if cell.status != "completed":
                continue
            progress(f"{f'round {r} of {repeats}' if r else 'warm-up'}: {cell.regime}, batch size {cell.batch_size}")
            with excused([cell]):
                seconds = _generation(cell, models[cell.regime], recipe, prompt_tokens, new_tokens, device)
                if r:  # the first generation compiles kernels, fills caches and wakes a GPU's clock
                    cell.seconds.append(seconds)


def _enter(recipe: Recipe, name: str, device: torch.device) -> Regime:
    return enter_regime(recipe.precision.model_copy(update={"regime": name}), device)


def _build(recipe: Recipe, fill: Fill, regime: Regime, device: torch.device) -> GPT:
    # Also here weights keep requires_grad: autocast keeps the copies of such weights only.
    return build_model(recipe.model, device, init=fill, on_meta=lambda model: apply_regime(model, regime)).eval()


def _generation(
    cell: Cell, model: GPT, recipe: Recipe, prompt_tokens: int, new_tokens: int, device: torch.device
) -> list[float]:
    """Seconds of one generation of a cell; its memory is noted."""
    B, regime = cell.batch_size, _enter(recipe, cell.regime, device)  # TF32 or not holds for the whole process
    cell.cache_bytes = cache_bytes(recipe, B, prompt_tokens + new_tokens, cache_dtype(regime))
    if device.type != "cuda" and cell.cache_bytes > psutil.virtual_memory().available:
        # Linux grants memory that is not there, and kills the process that uses it
        free = psutil.virtual_memory().available / 1e9
        raise MemoryError(f"the cache of keys and values takes {cell.cache_bytes / 1e9:.1f} GB, {free:.1f} GB are free")
    generator = torch.Generator().manual_seed(address(recipe.seed, "bench", B))
    prompt = torch.randint(recipe.model.vocab_size, (B, prompt_tokens), generator=generator).to(device)  # (B, T)
    if device.type != "cuda":
        return generate_timed(model, regime, prompt, new_tokens)[1]
    torch.cuda.reset_peak_memory_stats(device)
    others = torch.cuda.memory_allocated(device) - cell.weights_bytes  # the models of the other regimes, mainly
    seconds = generate_timed(model, regime, prompt, new_tokens)[1]
    cell.peak_bytes = max(cell.peak_bytes, torch.cuda.max_memory_allocated(device) - others)
    return seconds


@contextlib.contextmanager
def excused(cells: list[Cell]) -> Iterator[None]:
    """What this machine cannot do becomes the status and reason of these cells; any other error is raised.

    torchao's float8 layers are made for training: where they cannot multiply shapes as small as a decode step's, that
    is not_applicable too.
    """
    try:
        yield
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, NotApplicable):
            status = "not_applicable"
        elif isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in reason:
            status = "out_of_memory"
        elif REGIMES[cells[0].regime].float8 and isinstance(error, (RuntimeError, ValueError, AssertionError)):
            status = "not_applicable"
        else:
            raise
        for cell in cells:
            cell.status, cell.reason = status, reason


# -- as text --------------------------------------------------------------------------------------------------------


def render(report: Mapping[str, Any]) -> Group:
    """The report for a terminal: a table, what could not be measured and why, and how it was done."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for head in (
        "regime",
        "batch",
        "prefill\ntokens/s",
        "decode\ntokens/s",
        "first token\nms p50/p95",
        "step\nms p50/p95",
        "weights\nMB",
        "cache\nMB",
        "peak\nMB",
    ):
        table.add_column(head, justify="left" if head == "regime" else "right", no_wrap=True)
    for row in report["rows"]:
        values = [""] * 4
        if row["status"] == "completed":
            rates = [f"{row[f'{part}_tokens_per_second']:,.0f}" for part in ("prefill", "decode")]
            times = [f"{_ms(row[f'{part}_ms_p50'])}/{_ms(row[f'{part}_ms_p95'])}" for part in ("first_token", "decode")]
            values = rates + times
        sizes = [f"{1e3 * row[key]:,.0f}" if key in row else "" for key in ("weights_gb", "cache_gb", "peak_memory_gb")]
        table.add_row(row["regime"], str(row["batch_size"]), *values, *sizes)
    missing = [row for row in report["rows"] if row["status"] != "completed"]
    reasons = dict.fromkeys(f"{row['regime']} {row['status']}: {row['reason']}" for row in missing)
    order = "cells in turn" if report["interleaved"] else "one regime after the other, for want of memory"
    says = (
        f"{report['recipe']}, {report['parameters'] / 1e6:.1f}M parameters, on {report['device_name']}: "
        f"{report['prompt_tokens']} tokens of prompt, {report['new_tokens']} new ones; {report['repeats']} times after "
        f"a warm-up, {order}; greedy, not compiled"
    )
    return Group(table, *(Text(line, overflow="fold") for line in [*reasons, says]))


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.2f}" if milliseconds < 100 else f"{milliseconds:.0f}"
