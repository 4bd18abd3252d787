"""Speed and memory of a 2:4 sparse GPT: the same masked weights as dense and as semi-structured matrices.

GPT-2's shapes with random weights, two of each four set to zero, in bf16, on a GPU of compute capability 8.0 or higher:

    dense        the weights before masking; shows whether zeros alone change anything
    masked       the reference: dense matrices with zeros
    cusparselt   torch.sparse.to_sparse_semi_structured with this backend, or the reason why it does not work here
    cutlass      the same with the other backend

The logits of each variant are checked against `masked`. Then the variants take turns, in alternating order, with a
prefill of B sequences of T tokens, and with the decode steps of a generation. Ratios are masked / variant for
neighbouring turns; above 1, the variant is faster. Finally single matrices of each shape in the blocks are multiplied.

Without a GPU, only `dense` and `masked` run, in float32; their ratio should be 1.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from common import in_turn, ratios, show, spread
from torch import Tensor, nn

from gptlab.bench.inference import generate_timed
from gptlab.config import PRESETS, Model, Precision
from gptlab.interop.sparse24 import block_matrices, to_semi_structured
from gptlab.model.gpt import GPT, build_model
from gptlab.precision.regimes import make_regime
from gptlab.training.throughput import Stopwatch
from gpu_stages.stage import Row, Stage, pick, run

BACKENDS = ("cusparselt", "cutlass")
ALLOWED = 0.05  # largest relative error of the logits, |a - b| / |b|; bf16 in another order of sums gives about 0.01


@dataclass(frozen=True)
class Shapes:
    """The shapes that are measured for each model size."""

    prefill: tuple[tuple[int, int], ...] = ((1, 1024), (8, 1024), (32, 128))
    """(B, T)."""
    decode: tuple[int, ...] = (1, 8, 64)
    """B. Dense operands are padded to 8 rows."""
    prompt: int = 64
    new_tokens: int = 24
    tokens: tuple[int, ...] = (1, 16, 128, 1024, 8192)
    """Tokens that a single matrix is multiplied with."""
    rounds: int = 5
    times: int = 30
    """Multiplications per timing of a matrix."""


TINY = Shapes(((2, 64), (8, 128)), (1, 8), 16, 8, (16, 256), rounds=3, times=5)


def mask24(weight: Tensor) -> Tensor:
    """The weight with only the two largest of each four along the input dimension."""
    fours = weight.unflatten(1, (-1, 4))
    kept = torch.zeros_like(fours).scatter_(2, fours.abs().topk(2, dim=2).indices, 1)
    return (fours * kept).flatten(1)


def make(dense: GPT, variant: str) -> tuple[GPT | None, str]:
    """A variant of a random model, or None and the reason why it does not work here."""
    model = dense if variant == "dense" else copy.deepcopy(dense)
    if variant != "dense":
        for layer in block_matrices(model).values():
            layer.weight.copy_(mask24(layer.weight))
    if variant in BACKENDS:
        torch.sparse.SparseSemiStructuredTensor._FORCE_CUTLASS = variant == "cutlass"
        if reason := to_semi_structured(model):
            return None, reason
    return model, ""


def timed(action: Callable[[], object], device: torch.device, times: int = 1) -> float:
    """Milliseconds per call, averaged over several calls."""
    watch = Stopwatch(device)
    watch.start()
    for _ in range(times):
        action()
    watch.step()
    return 1e3 * watch.lap() / times


def measure(
    actions: dict[str, Callable[[], float]], rounds: int, reference: str = "masked", warmup: int = 2
) -> dict[str, Any]:
    """The milliseconds that each action returns, measured in turns, and the ratios reference / action."""
    seen: dict[str, list[float]] = {name: [] for name in actions}
    for action in actions.values():
        for _ in range(warmup):
            action()
    for name in in_turn(list(actions), rounds):
        seen[name].append(actions[name]())
    return {
        name: {"ms": spread(values), "gain": ratios(seen[reference], values), "all_ms": values}
        for name, values in seen.items()
    }


def weights_bytes(model: GPT) -> tuple[int, int]:
    """Stored bytes of the block matrices, and of all other parameters."""
    matrices = [layer.weight for layer in block_matrices(model).values()]

    def size(p: Tensor) -> int:
        if not hasattr(p, "__tensor_flatten__"):
            return p.nbytes
        return sum(getattr(p, part).nbytes for part in p.__tensor_flatten__()[0])

    inside = sum(size(p) for p in matrices)
    return inside, sum(size(p) for p in model.parameters()) - inside


@torch.no_grad()
def size_up(size: str, config: Model, args: Shapes, device: torch.device, dtype: torch.dtype) -> Row:
    """All measurements of one model size."""
    row: dict[str, Any] = {"size": size, "model": config.model_dump(), "not_applicable": {}, "memory": {}}
    models: dict[str, GPT] = {}
    variants = ("dense", "masked", *(BACKENDS if device.type == "cuda" else ()))
    dense = build_model(config, device, dtype, init=0).eval().requires_grad_(False)
    for variant in variants:
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        model, reason = make(dense, variant)
        if model is None:
            row["not_applicable"][variant] = reason
            continue
        models[variant] = model
        inside, outside = weights_bytes(model)
        row["memory"][variant] = {"blocks_matrices": inside, "all_else": outside}
        if device.type == "cuda":
            row["memory"][variant]["allocated"] = torch.cuda.memory_allocated() - before

    tokens = torch.randint(config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0)).to(device)
    exact = models["masked"](tokens).float()
    row["error"] = {}
    for variant in list(models):
        if variant in BACKENDS:
            error = ((models[variant](tokens).float() - exact).norm() / exact.norm()).item()
            row["error"][variant] = error
            if error > ALLOWED:
                raise RuntimeError(f"{size} {variant}: the logits differ by {error:.1%} from those of `masked`")

    regime = make_regime(Precision(regime="bf16_pure" if dtype is torch.bfloat16 else "fp32"))

    def prefill(model: GPT, x: Tensor) -> Callable[[], float]:
        return lambda: timed(lambda: model.logits(model.hidden(x)[:, -1]), device)

    def decode(model: GPT, x: Tensor) -> Callable[[], float]:
        def step() -> float:
            seconds = generate_timed(model, regime, x, args.new_tokens)[1][1:]
            return 1e3 * sum(seconds) / len(seconds)

        return step

    def ids(B: int, T: int) -> Tensor:
        return torch.randint(config.vocab_size, (B, T), generator=torch.Generator().manual_seed(1)).to(device)

    row["prefill"], row["decode"], row["peak"] = {}, {}, {}
    for B, T in args.prefill:
        x = ids(B, T)
        row["prefill"][f"{B} x {T}"] = measure({name: prefill(models[name], x) for name in models}, args.rounds)
        if device.type == "cuda":
            row["peak"][f"{B} x {T}"] = {}
            for name, model in models.items():
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                prefill(model, x)()
                row["peak"][f"{B} x {T}"][name] = torch.cuda.max_memory_allocated() - before
    for B in args.decode:
        x = ids(B, args.prompt)
        row["decode"][f"{B} x 1"] = measure({name: decode(models[name], x) for name in models}, args.rounds)
    told = []
    for kind in ("prefill", "decode"):
        for shape, measured in row[kind].items():
            gains = ", ".join(
                f"{name} {show(got['gain'], '.2f')}" for name, got in measured.items() if name != "masked"
            )
            told.append(f"{kind} {shape}: {gains}")
    left_out = [f"{name}: {reason}" for name, reason in row["not_applicable"].items()]
    row["says"] = "gain over masked: " + "; ".join([*told, *left_out])
    return row


@torch.no_grad()
def matrix(rows: int, cols: int, args: Shapes, device: torch.device, dtype: torch.dtype) -> Row:
    """One linear layer without a bias, for several numbers of tokens."""
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0)).to(device, dtype) * 0.02
    weights: dict[str, Tensor] = {"dense": weight, "masked": mask24(weight)}
    for backend in BACKENDS if device.type == "cuda" else ():
        torch.sparse.SparseSemiStructuredTensor._FORCE_CUTLASS = backend == "cutlass"
        try:
            sparse = torch.sparse.to_sparse_semi_structured(weights["masked"])
            F.linear(torch.zeros(8, cols, dtype=dtype, device=device), sparse)
            weights[backend] = nn.Parameter(sparse, requires_grad=False)
        except RuntimeError:
            continue  # `size_up` reports the reason
    found = {}
    for n in args.tokens:
        x = torch.randn(n, cols, generator=torch.Generator().manual_seed(1)).to(device, dtype)

        def multiply(w: Tensor, x: Tensor = x) -> Callable[[], float]:
            return lambda: timed(lambda: F.linear(x, w), device, args.times)

        found[str(n)] = measure({name: multiply(w) for name, w in weights.items()}, args.rounds)
    best = {
        n: max((got["gain"]["median"], name) for name, got in measured.items() if name != "masked")
        for n, measured in found.items()
    }
    told = ", ".join(f"{n} tokens {name} {gain:.2f}" for n, (gain, name) in best.items())
    return {"rows": rows, "cols": cols, "tokens": found, "says": f"best gain over masked: {told}"}


def main(stage: Stage) -> None:
    device = pick(stage)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shapes = TINY if stage.tiny else Shapes()
    sizes = {size: Model(**PRESETS[size], vocab_size=50304) for size in ("gpt2", "gpt2-large", "gpt2-xl")}
    if stage.tiny:
        sizes = {"tiny": Model(n_layer=2, n_head=4, n_embd=256, block_size=128, vocab_size=512)}
    items: dict[str, Callable[[], Row]] = {}
    for size, config in sizes.items():
        C = config.n_embd
        for rows, cols in ((4 * C, C), (C, 4 * C), (3 * C, C), (C, C)):
            name = f"{size} {rows} x {cols}"
            items[name] = lambda rows=rows, cols=cols: matrix(rows, cols, shapes, device, dtype)  # type: ignore[misc]
        items[size] = lambda size=size, config=config: size_up(size, config, shapes, device, dtype)  # type: ignore[misc]
    stage.all(items, expects=3.0, most=60.0)


if __name__ == "__main__":
    run(main)
