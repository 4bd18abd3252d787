"""What a 2:4 sparse GPT gains: the same masked weights as dense and as semi-structured matrices, in speed and memory.

GPT-2's shapes with random weights of which two in four are zero, bf16, on one GPU of compute capability 8.0 or more:

    dense        the weights before masking: whether zeros alone change anything
    masked       the reference: dense matrices with zeros in them
    cusparselt   torch.sparse.to_sparse_semi_structured, by either library; what does not run here says why
    cutlass

First each is checked against `masked` (logits), then they take turns, forwards and backwards: a prefill of B sequences
of T tokens, and the decode steps of a generation. Ratios are masked / variant, pair by pair: above 1 is faster.
Then single matrices, each shape of the blocks with n tokens. --compile times compiled prefills as well.

    python benchmarks/sparse24.py --out results/sparse24.json                # a GPU, ten minutes
    python benchmarks/sparse24.py --sizes gpt2-xl --compile --out results/sparse24_xl.json
    python benchmarks/sparse24.py --tiny                                     # proves the script without a GPU

Without a GPU there is `dense` and `masked` only, in float32, and their ratio is what zeros in a dense matrix gain: 1.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import in_turn, machine, ratios, say, show, spread, table, write_json
from torch import Tensor, nn

from gptlab.bench.inference import generate_timed
from gptlab.config import PRESETS, Model, Precision
from gptlab.hardware import device_name
from gptlab.model.gpt import GPT, build_model
from gptlab.model.sparse24 import block_matrices, to_semi_structured
from gptlab.precision.regimes import make_regime
from gptlab.training.setup import pick_device
from gptlab.training.throughput import Stopwatch

SIZES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
BACKENDS = ("cusparselt", "cutlass")
PREFILL = ((1, 1024), (8, 1024), (32, 128))  # (B, T)
DECODE = (1, 8, 64)  # B; dense operands are padded to 8 rows
PROMPT, NEW = 64, 32
TOKENS = (1, 16, 128, 1024, 8192)  # that a single matrix is multiplied with
ALLOWED = 0.05  # relative error of the logits, |a - b| / |b|: some 0.01 is bf16's, summed in another order


def mask24(weight: Tensor) -> Tensor:
    """The two largest of each four along the input dimension."""
    fours = weight.unflatten(1, (-1, 4))
    kept = torch.zeros_like(fours).scatter_(2, fours.abs().topk(2, dim=2).indices, 1)
    return (fours * kept).flatten(1)


def make(config: Model, device: torch.device, dtype: torch.dtype, variant: str) -> tuple[GPT | None, str]:
    """A variant of the same random model, or None and why it does not run here."""
    model = build_model(config, device, dtype, fill=0).eval().requires_grad_(False)
    if variant != "dense":
        for layer in block_matrices(model).values():
            layer.weight.copy_(mask24(layer.weight))
    if variant in BACKENDS:
        torch.sparse.SparseSemiStructuredTensor._FORCE_CUTLASS = variant == "cutlass"
        if reason := to_semi_structured(model):
            return None, reason
    return model, ""


def timed(action: Callable[[], object], device: torch.device, times: int = 1) -> float:
    """Milliseconds of one of several calls."""
    watch = Stopwatch(device)
    watch.start()
    for _ in range(times):
        action()
    watch.step()
    return 1e3 * watch.lap() / times


def measure(
    actions: dict[str, Callable[[], float]], rounds: int, reference: str = "masked", warmup: int = 2
) -> dict[str, Any]:
    """What each action gives (milliseconds), round by round in turn, and the ratios of the reference to it."""
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
    """Bytes of the blocks' matrices as they are stored, and of all else."""
    matrices = [layer.weight for layer in block_matrices(model).values()]

    def size(p: Tensor) -> int:
        if not hasattr(p, "__tensor_flatten__"):
            return p.nbytes
        return sum(getattr(p, part).nbytes for part in p.__tensor_flatten__()[0])

    inside = sum(size(p) for p in matrices)
    return inside, sum(size(p) for p in model.parameters()) - inside


@torch.no_grad()
def size_up(size: str, config: Model, args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Any:
    """Everything about one shape of a model."""
    row: dict[str, Any] = {"size": size, "model": config.model_dump(), "not_applicable": {}, "memory": {}}
    models: dict[str, GPT] = {}
    variants = ("dense", "masked", *(BACKENDS if device.type == "cuda" else ()))
    for variant in variants:
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        model, reason = make(config, device, dtype, variant)
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
                raise SystemExit(f"{size} {variant}: logits differ by {error:.1%} from those of the masked matrices")

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

    row["prefill"], row["decode"], row["compiled_prefill"], row["peak"] = {}, {}, {}, {}
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
    if args.compile:
        torch.compiler.reset()
        torch._dynamo.config.recompile_limit = 64  # a graph for each variant and shape
        for name, model in list(models.items()):
            try:
                model.hidden = torch.compile(model.hidden, dynamic=False)  # type: ignore[method-assign]
                prefill(model, ids(*args.prefill[0]))()
            except Exception as error:  # of the compiler: any
                row["not_applicable"][f"{name}, compiled"] = f"{type(error).__name__}: {error}".splitlines()[0]
                del models[name]
        if "masked" in models:
            for B, T in args.prefill:
                x = ids(B, T)
                what = {name: prefill(model, x) for name, model in models.items()}
                row["compiled_prefill"][f"{B} x {T}"] = measure(what, args.rounds)
    return row


@torch.no_grad()
def matrix(rows: int, cols: int, args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Any:
    """One linear layer, without a bias, at several numbers of tokens."""
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0)).to(device, dtype) * 0.02
    weights: dict[str, Tensor] = {"dense": weight, "masked": mask24(weight)}
    for backend in BACKENDS if device.type == "cuda" else ():
        torch.sparse.SparseSemiStructuredTensor._FORCE_CUTLASS = backend == "cutlass"
        try:
            sparse = torch.sparse.to_sparse_semi_structured(weights["masked"])
            F.linear(torch.zeros(8, cols, dtype=dtype, device=device), sparse)
            weights[backend] = nn.Parameter(sparse, requires_grad=False)
        except RuntimeError:
            continue  # `size_up` has the reason
    found = {}
    for n in args.tokens:
        x = torch.randn(n, cols, generator=torch.Generator().manual_seed(1)).to(device, dtype)

        def multiply(w: Tensor, x: Tensor = x) -> Callable[[], float]:
            return lambda: timed(lambda: F.linear(x, w), device, args.times)

        found[str(n)] = measure({name: multiply(w) for name, w in weights.items()}, args.rounds)
    return {"rows": rows, "cols": cols, "tokens": found}


def report(result: dict[str, Any]) -> None:
    """Print the tables."""
    lines: list[list[object]] = [["what", "variant", "ms", "gain over masked", "blocks' matrices MB", "error"]]
    for row in result["sizes"]:
        for kind in ("prefill", "compiled_prefill", "decode"):
            for shape, measured in row[kind].items():
                for name, got in measured.items():
                    inside = row["memory"][name]["blocks_matrices"] / 1e6
                    error = f"{row['error'][name]:.1e}" if name in row["error"] else ""
                    lines.append([f"{row['size']} {kind.replace('_', ' ')} {shape}", name, f"{got['ms']['median']:.3f}",
                                  show(got["gain"]), f"{inside:.1f}", error])  # fmt: skip
    table(lines)
    for row in result["sizes"]:
        for name, reason in row["not_applicable"].items():
            print(f"{row['size']} {name}: not applicable: {reason}")
    lines = [["matrix", "tokens", "variant", "ms", "gain over masked"]]
    for got in result["matrices"]:
        for n, measured in got["tokens"].items():
            for name, value in measured.items():
                shape = f"{got['rows']} x {got['cols']}"
                lines.append([shape, n, name, f"{value['ms']['median']:.4f}", show(value["gain"])])
    print()
    table(lines)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--times", type=int, default=50, help="multiplications in one timing of a matrix")
    parser.add_argument("--compile", action="store_true", help="compiled prefills as well: minutes more for each size")
    parser.add_argument("--budget-seconds", type=float, default=540, help="begin no size or matrix after that")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--tiny", action="store_true", help="two layers of width 256, to try this without a GPU")
    parser.add_argument("--out", type=Path, default=Path("results/sparse24.json"), metavar="FILE")
    args = parser.parse_args(argv)
    device, began = pick_device(args.device), time.monotonic()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    args.prefill, args.decode, args.prompt, args.new_tokens, args.tokens = PREFILL, DECODE, PROMPT, NEW, TOKENS
    shapes = {size: Model(**PRESETS[size], vocab_size=50304) for size in args.sizes}
    if args.tiny:
        shapes = {"tiny": Model(n_layer=2, n_head=4, n_embd=256, block_size=128, vocab_size=512)}
        args.prefill, args.decode, args.prompt, args.new_tokens = ((2, 64), (8, 128)), (1, 8), 16, 8
        args.tokens, args.times = (16, 256), 5
    result: dict[str, Any] = {
        "machine": machine(), "device": device_name(device), "torch": torch.__version__, "cuda": torch.version.cuda,
        "dtype": str(dtype), "sizes": [], "matrices": [], "left_out": [],
    }  # fmt: skip

    def go_on(what: str) -> bool:
        if time.monotonic() - began < args.budget_seconds:
            say(f"{what}, {time.monotonic() - began:.0f} s gone")
            return True
        result["left_out"].append(what)
        return False

    for size, config in shapes.items():
        if go_on(size):
            result["sizes"].append(size_up(size, config, args, device, dtype))
            write_json(args.out, result)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    for size, config in shapes.items():
        C = config.n_embd
        for rows, cols in ((3 * C, C), (C, C), (4 * C, C), (C, 4 * C)):
            if go_on(f"{size} {rows} x {cols}"):
                result["matrices"].append({"size": size, **matrix(rows, cols, args, device, dtype)})
    write_json(args.out, result)
    report(result)
    if device.type != "cuda":
        print("\nNo GPU here: a dense matrix with zeros in it is multiplied like any other: a gain of 1 within noise")
    return result


if __name__ == "__main__":
    main()
