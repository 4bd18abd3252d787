"""Speed of text generation: throughput of prefill and decode, latency and memory, by precision regime and batch size.

Prefill reads the prompt into an empty cache of keys and values and returns the first new token. Each decode step then
returns one more token. A cell is a regime and a batch size. Each round has one generation of every cell, in an order
that rotates between rounds, so that a slowdown of the machine affects all cells alike.

Shapes: B sequences, T tokens, C = n_embd, V = vocab_size.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from gptlab.bench.peers import refuse
from gptlab.config import Recipe, build_recipe, read_layer
from gptlab.config.sections import Sample
from gptlab.errors import ConfigError, UserError
from gptlab.hardware import device_name
from gptlab.interop.hf import hf_gpt2
from gptlab.machine import free_memory
from gptlab.model.decoding import Decoder, cache_dtype
from gptlab.model.generate import pick_token, uniforms
from gptlab.model.gpt import GPT, build_model
from gptlab.planning.resolve import resolve_recipe
from gptlab.precision.libraries import load_library
from gptlab.precision.regimes import REGIMES, NotApplicable, Regime, apply_regime, enter_regime
from gptlab.rundir import RunDir
from gptlab.seeding import address
from gptlab.training.setup import cropped, pick_device, start_from
from gptlab.training.throughput import Stopwatch, percentile

DEFAULT_RECIPE = "gpt2-124m-openwebtext"
DEFAULT_REGIMES = ("fp32", "tf32", "amp_bf16", "bf16_pure")
GREEDY, DRAWING = Sample(temperature=0.0), {"temperature", "top_k", "top_p"}
Init = int | Callable[[GPT], None]


@dataclass
class Cell:
    """A row of the table: a regime, a batch size, and the measurements."""

    regime: str
    batch_size: int
    peer: str = ""
    """hf: transformers' GPT-2 with the same weights, and its `generate`."""
    status: str = "completed"
    """completed, not_applicable or out_of_memory."""
    reason: str = ""
    seconds: list[list[float]] = field(default_factory=list)
    """For each generation: seconds of the prefill, then of each decode step."""
    weights_bytes: int = 0
    cache_bytes: int = 0
    peak_bytes: int = 0
    """Peak memory, on a GPU only. On a CPU, the peak of a single cell cannot be measured."""

    def to_json(self, prompt_tokens: int) -> dict[str, Any]:
        """The row of the report, without the values that were not measured. A GB is 1e9 bytes."""
        row: dict[str, Any] = {"regime": self.regime, "batch_size": self.batch_size, "status": self.status}
        if self.peer:
            row["peer"] = self.peer
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
    peers: Sequence[str] = (),
    sampled: bool = False,
) -> dict[str, Any]:
    """Measure the speed of a model's generation for each regime and batch size, in one process.

    Args:
        name: a recipe's name or path (random weights, which do not change the speed), or a run directory.
        overrides: dotted settings. Settings of `precision` other than the regime apply to every regime.
        regimes: names of precision regimes.
        batch_sizes: numbers of sequences generated at once.
        prompt_tokens: length of the prompt. Default: half of block_size, at most 256.
        new_tokens: number of generated tokens, including the first one by the prefill. Default: a quarter of
            block_size, at most 64.
        repeats: number of measured generations per cell, after one warm-up.
        progress: called with a message before each measurement.
        peers: "hf" to measure transformers' `generate` too.
        sampled: draw by `sample.temperature`, `top_k` and `top_p`, instead of taking the most likely token.

    Returns:
        The report, ready for JSON: the device, the model, the lengths, and "rows", one per cell. A peer's row has its
        time over ours of the same round, for whole generations.

    Raises:
        UserError: a recipe, run, regime or number that cannot be measured on any machine. A cell that only this
            machine cannot measure becomes a row with a status and a reason.
    """
    recipe, init = open_model(name, overrides or {})
    if not sampled:
        recipe = recipe.replace({"sample.temperature": 0.0})
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
        raise ConfigError(f"new_tokens = {new_tokens}: must be at least 2, as the prefill generates the first token")
    if prompt_tokens + new_tokens > block:
        raise ConfigError(
            f"prompt_tokens + new_tokens = {prompt_tokens} + {new_tokens}: must be at most model.block_size = {block}"
        )
    for peer in peers:
        refuse(peer, recipe.replace({"precision.regime": "fp32"}))
    device = pick_device(recipe.train.device)
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)

    sides = ["", *dict.fromkeys(peers)]
    groups = [
        [Cell(regime, B, peer) for B in dict.fromkeys(batch_sizes) for peer in sides]
        for regime in dict.fromkeys(regimes)
    ]
    cells = [cell for group in groups for cell in group]
    with torch.device("meta"):
        parameters = GPT(recipe.model).parameter_count()
    interleaved = fit_together(parameters, len(groups) * len(sides), device)
    for group in [cells] if interleaved else groups:
        measure(group, recipe, init, prompt_tokens, new_tokens, repeats, device, progress)
    rows = [cell.to_json(prompt_tokens) for cell in cells]
    ours = {(cell.regime, cell.batch_size): cell for cell in cells if not cell.peer}
    for cell, row in zip(cells, rows, strict=True):
        if cell.peer and cell.seconds and (mine := ours[cell.regime, cell.batch_size].seconds):
            ratios = [sum(a) / sum(b) for a, b in zip(cell.seconds, mine, strict=False)]
            row["time_ratio"] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
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
        "sample": recipe.sample.model_dump(include=DRAWING),
        "interleaved": interleaved,
        "compiled": False,
        "rows": rows,
    }


# -- the model ------------------------------------------------------------------------------------------------------


def open_model(name: str, overrides: Mapping[str, Any]) -> tuple[Recipe, Init]:
    """The recipe of a model with its complete shape, and the `init` that `build_model` takes.

    Args:
        name: a recipe's name or path, or a run directory.
        overrides: dotted settings.

    Raises:
        UserError: there is no such recipe, it is a classifier's, or its vocabulary size is unknown.
    """
    run = RunDir(name)
    recipe = run.read_recipe().replace(overrides) if run.exists() else build_recipe(read_layer(name), overrides)
    if recipe.task == "classify":
        raise UserError(f"{name} is a classifier. This benchmark measures text generation: name a language model")
    if run.exists() and (shapes := [key for key in overrides if key.startswith("model.")]):
        raise UserError(f"{shapes[0]}: cannot change the shape of the trained model {name}. Name a recipe instead")
    source = name if run.exists() else recipe.train.init_from
    if source:
        model, init = start_from(source)
        if recipe.model.block_size < model.block_size:
            model, init = cropped(model, recipe.model.block_size, init)
        return recipe.replace({"model": model.model_dump()}), init
    return recipe.replace({"model": resolve_recipe(recipe, "cpu").shape.model.model_dump()}), recipe.seed


def fit_together(parameters: int, n_regimes: int, device: torch.device) -> bool:
    """Whether the models of all regimes together need less than a quarter of the free memory."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    return n_regimes * 4 * parameters < free / 4


# -- measuring ------------------------------------------------------------------------------------------------------


@torch.no_grad()  # torchao's float8 tensors do not support inference_mode
def generate_timed(
    model: GPT, regime: Regime, prompt: Tensor, new_tokens: int, sample: Sample = GREEDY
) -> tuple[Tensor, list[float]]:
    """Generation. The ids stay on the device, so the host does not wait for each token.

    Args:
        model: in the regime's dtypes, in evaluation mode.
        regime: of the model.
        prompt: (B, T) ids.
        new_tokens: number of tokens to generate.
        sample: how the next token is drawn.

    Returns:
        The new ids (B, new_tokens), and the seconds of the prefill and of each decode step.
    """
    device, (B, T) = prompt.device, prompt.shape
    watch, ids = Stopwatch(device), list[Tensor]()
    with regime.context(device):
        watch.start()
        decoder = Decoder(model, B, T + new_tokens, new_tokens)  # part of the first token: it casts and packs weights
        logits = decoder.read(prompt.tolist())  # (B, V)
        draws = uniforms([address(sample.seed, "sample", b) for b in range(B)])
        for i in range(new_tokens):
            logits = decoder.step(ids[-1]) if i else logits
            draw = next(draws).to(device) if sample.temperature else logits  # a greedy step copies nothing
            ids.append(pick_token(logits, sample.temperature, sample.top_k, sample.top_p, draw))
            if device.type == "mps":
                torch.mps.synchronize()  # the stopwatch waits for CUDA only
            watch.step()
    watch.lap()
    return torch.stack(ids, dim=1), watch.step_seconds


def of_peer(model: GPT, regime: Regime) -> Any:
    """transformers' model with the same weights, in their dtype."""
    if regime.stream or regime.float8 or regime.head or regime.norms:
        raise NotApplicable("transformers' model has one dtype, or autocast")
    load_library("transformers.models.gpt2.modeling_gpt2", "--vs hf")  # without what it logs of others
    return hf_gpt2(model).to(model.device, regime.weights).eval()


@torch.no_grad()
def peer_timed(
    model: Any, regime: Regime, prompt: Tensor, new_tokens: int, sample: Sample = GREEDY
) -> tuple[Tensor, list[float]]:
    """`generate_timed` by transformers' `generate`, to the same length. It has random numbers of its own."""
    watch = Stopwatch(prompt.device)
    drawing = sample.model_dump(include=DRAWING) if sample.temperature else {}

    def after(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        watch.step()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    with regime.context(prompt.device):
        watch.start()
        ids = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=bool(drawing),
            **drawing,
            use_cache=True,
            max_new_tokens=new_tokens,
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=[after],
        )
    watch.lap()
    return ids[:, prompt.shape[1] :], watch.step_seconds


def cache_bytes(recipe: Recipe, batch: int, room: int, dtype: torch.dtype) -> int:
    """Bytes of a `KVCache` for `batch` sequences of `room` tokens."""
    return 2 * recipe.model.n_layer * batch * room * recipe.model.n_embd * dtype.itemsize


def measure(
    cells: list[Cell],
    recipe: Recipe,
    init: Init,
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    device: torch.device,
    progress: Callable[[str], None] = lambda _: None,
) -> None:
    """Measure cells round by round, with one model per regime, and store the results in the cells."""
    models: dict[tuple[str, str], Any] = {}
    for name, peer in dict.fromkeys((cell.regime, cell.peer) for cell in cells):
        mine = [cell for cell in cells if (cell.regime, cell.peer) == (name, peer)]
        progress(f"{peer or name}: building the model")
        with excused(mine):
            regime = _enter(recipe, name, device)
            model = _build(recipe, init, regime, device)
            models[name, peer] = model = of_peer(model, regime) if peer else model
            for cell in mine:
                cell.weights_bytes = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    for r in range(repeats + 1):
        for cell in cells[r % len(cells) :] + cells[: r % len(cells)]:
            if cell.status != "completed":
                continue
            progress(f"{f'round {r} of {repeats}' if r else 'warm-up'}: {cell.regime}, batch size {cell.batch_size}")
            with excused([cell]):
                seconds = _generation(cell, models[cell.regime, cell.peer], recipe, prompt_tokens, new_tokens, device)
                if r:  # round 0 warms up: it compiles kernels, fills caches and raises a GPU's clock
                    cell.seconds.append(seconds)


def _enter(recipe: Recipe, name: str, device: torch.device) -> Regime:
    return enter_regime(recipe.precision.model_copy(update={"regime": name}), device)


def _build(recipe: Recipe, init: Init, regime: Regime, device: torch.device) -> GPT:
    return build_model(recipe.model, device, init=init, on_meta=lambda model: apply_regime(model, regime)).eval()


def _generation(
    cell: Cell, model: Any, recipe: Recipe, prompt_tokens: int, new_tokens: int, device: torch.device
) -> list[float]:
    """Seconds of one generation of a cell. Stores the cell's memory."""
    B, regime = cell.batch_size, _enter(recipe, cell.regime, device)  # TF32 is a setting of the whole process
    cell.cache_bytes = cache_bytes(
        recipe, B, prompt_tokens + new_tokens, cache_dtype(device, regime.matmul, regime.autocast is not None)
    )
    if device.type != "cuda" and cell.cache_bytes > (free := free_memory()):
        # Linux would grant the memory and then kill this process
        needs = f"needs {cell.cache_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        raise MemoryError(f"the cache of keys and values {needs}")
    generator = torch.Generator().manual_seed(address(recipe.seed, "bench", B))
    prompt = torch.randint(recipe.model.vocab_size, (B, prompt_tokens), generator=generator).to(device)  # (B, T)
    timed = peer_timed if cell.peer else generate_timed
    if device.type != "cuda":
        return timed(model, regime, prompt, new_tokens, recipe.sample)[1]
    torch.cuda.reset_peak_memory_stats(device)
    others = torch.cuda.memory_allocated(device) - cell.weights_bytes  # mainly models of other regimes
    seconds = timed(model, regime, prompt, new_tokens, recipe.sample)[1]
    cell.peak_bytes = max(cell.peak_bytes, torch.cuda.max_memory_allocated(device) - others)
    return seconds


@contextlib.contextmanager
def excused(cells: list[Cell]) -> Iterator[None]:
    """Turn errors of this machine (memory, unsupported regimes) into status and reason of the cells; raise all others.

    torchao's float8 layers are made for training and may not support the small matrices of a decode step; this also
    becomes not_applicable.
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
    """The report for a terminal: the table, the reasons of cells that were not measured, and the settings."""
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
        "time /\ngptlab's",
    ):
        table.add_column(head, justify="left" if head == "regime" else "right", no_wrap=True)
    for row in report["rows"]:
        values = [""] * 4
        if row["status"] == "completed":
            rates = [f"{row[f'{part}_tokens_per_second']:,.0f}" for part in ("prefill", "decode")]
            times = [f"{_ms(row[f'{part}_ms_p50'])}/{_ms(row[f'{part}_ms_p95'])}" for part in ("first_token", "decode")]
            values = rates + times
        sizes = [f"{1e3 * row[key]:,.0f}" if key in row else "" for key in ("weights_gb", "cache_gb", "peak_memory_gb")]
        name, ratio = f"{row.get('peer', '')} {row['regime']}".strip(), row.get("time_ratio")
        over = f"{ratio['median']:.3f} ({ratio['min']:.3f} .. {ratio['max']:.3f})" if ratio else ""
        table.add_row(name, str(row["batch_size"]), *values, *sizes, over)
    missing = [row for row in report["rows"] if row["status"] != "completed"]
    reasons = dict.fromkeys(
        f"{row.get('peer', '')} {row['regime']} {row['status']}: {row['reason']}".strip() for row in missing
    )
    order = "cells in rotation" if report["interleaved"] else "one regime after the other to save memory"
    sample = report["sample"]
    how = "sampled by " + ", ".join(f"{key} {value:g}" for key, value in sample.items())
    says = (
        f"{report['recipe']}, {report['parameters'] / 1e6:.1f}M parameters, on {report['device_name']}: "
        f"{report['prompt_tokens']} prompt tokens, {report['new_tokens']} new tokens; measured {report['repeats']} "
        f"times after a warm-up, {order}; "
        f"{how if sample['temperature'] else 'greedy'}, not compiled"
    )
    return Group(table, *(Text(line, overflow="fold") for line in [*reasons, says]))


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.2f}" if milliseconds < 100 else f"{milliseconds:.0f}"
