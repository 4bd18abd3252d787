"""Memory of every optimizer and pruner: predicted from their state, and measured as the storage of all tensors.

A row is a float32 model with its gradients and the state of its optimizer and its pruner, after some updates. The
prediction counts bytes per weight: 4 for a moment, 1/8 for a packed mask. The measurement is the storage of the live
tensors, each counted once; on a GPU also the memory of PyTorch's allocator and its peak in the last update, which
includes temporaries. Activations are in neither.

    python benchmarks/memory.py                               # GPT-2 124M predicted, a small one and 124M measured
    python benchmarks/memory.py --sizes small --out /tmp/memory.json
    python benchmarks/memory.py --only adamw magnitude

A GB is 1e9 bytes. The last rows compare ways to store the masks of the prunable weights.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import machine, say, write_json
from torch import Tensor

from gptlab.config import PRESETS, Model, Optim, Sparsity
from gptlab.hardware import device_name
from gptlab.model.gpt import GPT, build_model
from gptlab.optim.optimizers import make_optimizer, plain_tensors
from gptlab.precision.regimes import NotApplicable
from gptlab.sparsity.pruner import Pruner
from gptlab.training.setup import pick_device

SHAPES = {
    "small": Model(**PRESETS["mini"], block_size=128, vocab_size=512),
    "gpt2": Model(**PRESETS["gpt2"], vocab_size=50304),
}
PREDICTED = "gpt2"
WHOLE_BELOW, SCALED = 4096, 256  # 8-bit Adam: smaller tensors stay float32; numbers per float32 scale
SIDE = 10_000  # longest side of a matrix that has eigenvectors in SOAP
UPDATES = 2  # the masks are made after the first update and used in the second
RAMP = 100  # steps of the sparsity ramp; longer than UPDATES, as movement drops its scores at the end of the ramp


@dataclass
class Counts:
    """Counts of a model's parameters."""

    all: int
    blocks: int  # in the matrices of the blocks, which Muon updates and which can be pruned
    rows: int  # of those matrices
    squares: int  # in a square matrix for each side of a matrix, if it is at most SIDE long
    inner_squares: int  # the same of the blocks' matrices alone, with queries, keys and values as three
    whole: int  # in tensors whose moments 8-bit Adam keeps in float32
    tensors: int


def count(config: Model) -> Counts:
    with torch.device("meta"):
        parameters = dict(GPT(config).named_parameters())
    return Counts(
        sum(p.numel() for p in parameters.values()),
        sum(p.numel() for name, p in parameters.items() if name.startswith("h.") and p.dim() == 2),
        sum(len(p) for name, p in parameters.items() if name.startswith("h.") and p.dim() == 2),
        sum(n * n for p in parameters.values() if p.dim() == 2 for n in p.shape if n <= SIDE),
        config.n_layer * (8 * config.n_embd**2 + 2 * (config.n_embd**2 + config.mlp_hidden**2)),
        sum(p.numel() for p in parameters.values() if p.numel() < WHOLE_BELOW),
        len(parameters),
    )


Bytes = Callable[[Counts], float]


def moments(n: int) -> Bytes:
    return lambda c: 4 * n * c.all


def eight_bit(c: Counts) -> float:
    return 2 * (1 + 4 / SCALED) * (c.all - c.whole) + 8 * c.whole


def packed(c: Counts) -> float:
    return c.blocks / 8


ADAMW = {"name": "adamw"}
PRUNE = {"name": "adamw-prune"}
# name, settings of `optim` and of `sparsity`, bytes of the optimizer's and of the pruner's state
ROWS: list[tuple[str, dict[str, Any], dict[str, Any], Bytes, Bytes]] = [
    ("adamw", ADAMW, {}, moments(2), moments(0)),
    ("adamw, amsgrad", {**ADAMW, "amsgrad": True}, {}, moments(3), moments(0)),
    ("adamw-spam, seed (amsgrad)", {"name": "adamw-spam", "spam_form": "seed"}, {}, moments(3), moments(0)),
    ("adamw-spam, paper", {"name": "adamw-spam", "spam_form": "paper"}, {}, moments(2), moments(0)),
    ("adamw-spam, stable", {"name": "adamw-spam", "spam_form": "stable"}, {}, moments(2), moments(0)),
    ("adamw_8bit", {"name": "adamw_8bit"}, {}, eight_bit, moments(0)),
    ("muon", {"name": "muon"}, {}, lambda c: 4 * c.blocks + 8 * (c.all - c.blocks), moments(0)),
    ("normuon", {"name": "normuon"}, {}, lambda c: 4 * c.blocks + 4 * c.rows + 8 * (c.all - c.blocks), moments(0)),
    ("lion", {"name": "lion"}, {}, moments(1), moments(0)),
    ("ademamix", {"name": "ademamix"}, {}, moments(3), moments(0)),
    ("adamw-schedule-free", {"name": "adamw-schedule-free"}, {}, moments(2), moments(0)),
    ("soap", {"name": "soap"}, {}, lambda c: 8 * c.all + 8 * c.squares, moments(0)),
    (
        "soap-muon",
        {"name": "soap-muon"},
        {},
        lambda c: 8 * c.all + 8 * c.inner_squares,  # Muon's momentum and a second moment, or AdamW's two
        moments(0),
    ),
    ("sgd with momentum", {"name": "sgd"}, {}, moments(1), moments(0)),
    ("adamw + magnitude", ADAMW, {"method": "magnitude"}, moments(2), packed),
    (
        "adamw + movement, gradient",
        ADAMW,
        {"method": "movement", "movement": "gradient"},
        moments(2),
        lambda c: packed(c) + 8 * c.blocks,  # scores, and the values of masked weights
    ),
    (
        "adamw + movement, distance",
        ADAMW,
        {"method": "movement", "movement": "distance"},
        moments(2),
        lambda c: packed(c) + 4 * c.blocks,  # the initial weights
    ),
    ("adamw + rigl", ADAMW, {"method": "rigl"}, moments(2), packed),
    ("adamw + 2:4", ADAMW, {"method": "2:4"}, moments(2), packed),
    ("adamw-prune + state, bitter0", PRUNE, {"method": "state", "variant": "bitter0"}, moments(2), packed),
    ("adamw-prune + state, bitter1", PRUNE, {"method": "state", "variant": "bitter1"}, moments(2), packed),
]
# name, bytes per prunable weight, tensors of n weights
MASKS: list[tuple[str, float, Callable[[int], list[Tensor]]]] = [
    ("float32 masks + scores (2x)", 8, lambda n: [torch.ones(n), torch.zeros(n)]),
    ("float32 masks (1x)", 4, lambda n: [torch.ones(n)]),
    ("torch.bool masks (0.25x)", 1, lambda n: [torch.ones(n, dtype=torch.bool)]),
    ("packed masks (0.03x)", 1 / 8, lambda n: [torch.zeros(-(-n // 8), dtype=torch.uint8)]),
]


def stored(tensors: list[Tensor]) -> int:
    """Bytes of the storages of these tensors, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def measure(config: Model, optim: dict[str, Any], sparsity: dict[str, Any], device: torch.device) -> dict[str, float]:
    """Measured bytes of a row, after UPDATES updates on one short sequence."""
    gc.collect()
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated() if cuda else 0
    model = build_model(config, device)
    optimizer = make_optimizer(model, Optim(**optim), 0)
    pruner = None
    if sparsity:
        settings = Sparsity(**sparsity, begin=0.0, every=1)
        pruner = Pruner(model, optimizer, settings, RAMP, seed=0, every_update=False)
    tokens = torch.randint(config.vocab_size, (1, 65), generator=torch.Generator().manual_seed(0)).to(device)
    found: dict[str, float] = {}
    for step in range(UPDATES):
        optimizer.zero_grad(set_to_none=True)
        loss = model(tokens[:, :-1], tokens[:, 1:])
        assert isinstance(loss, Tensor)
        (loss / 64).backward()
        del loss
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        if pruner:
            pruner.before_update(step)
        optimizer.step()
        if pruner:
            pruner.after_update(step + 1)
    parameters = list(model.parameters())
    kept = [t for state in optimizer.state.values() for t in plain_tensors(state).values()]
    found["weights"] = stored(parameters)
    found["gradients"] = stored([p.grad for p in parameters if p.grad is not None])
    found["optimizer"] = stored(kept)
    found["pruner"] = stored(list(pruner.tensors().values())) if pruner else 0
    if pruner:
        found["masks"] = pruner.mask_bytes()
    if cuda:
        found["allocated"] = torch.cuda.memory_allocated() - before
        found["peak_of_an_update"] = torch.cuda.max_memory_allocated() - before
    return found


def predict(c: Counts, optimizer: Bytes, pruner: Bytes) -> dict[str, float]:
    return {"weights": 4 * c.all, "gradients": 4 * c.all, "optimizer": optimizer(c), "pruner": pruner(c)}


PARTS = ("weights", "gradients", "optimizer", "pruner")


def total(parts: dict[str, float]) -> float:
    return sum(parts[part] for part in PARTS)


def markdown(rows: list[dict[str, Any]], masks: list[dict[str, Any]], sizes: list[str], cuda: bool) -> str:
    """The table: predicted bytes per parameter, predicted GB of GPT-2 124M, measured GB, and measured / predicted."""
    head = ["", "optimizer, bytes a parameter", "pruner", "all", f"{PREDICTED} predicted, GB"]
    head += [cell for size in sizes for cell in (f"{size} measured, GB", "measured / predicted")]
    head += [cell for size in sizes for cell in (f"{size} allocated, GB", "peak of an update, GB")] if cuda else []
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    n = count(SHAPES[PREDICTED]).all
    for row in rows:
        part = row["predicted"][PREDICTED]
        line = [row["name"], *(f"{part[key] / n:.2f}" for key in ("optimizer", "pruner")), f"{total(part) / n:.2f}"]
        line.append(f"{total(part) / 1e9:.3f}")
        for size in sizes:
            got = row["measured"].get(size)
            over = got and total(got) / total(row["predicted"][size])
            line += [f"{total(got) / 1e9:.3f}", f"{over:.4f}"] if got else [row["reason"], ""]
        for size in sizes if cuda else ():
            got = row["measured"].get(size, {})
            line += [f"{got[key] / 1e9:.3f}" if got else "" for key in ("allocated", "peak_of_an_update")]
        lines.append(line)
    prunable = count(SHAPES[PREDICTED]).blocks
    for row in masks:
        line = [row["name"], "", f"{row['a_weight']:.3g} a prunable weight", ""]
        line.append(f"{row['a_weight'] * prunable / 1e9:.4f}")
        for size in sizes:
            got, said = row["measured"][size], row["a_weight"] * count(SHAPES[size]).blocks
            line += [f"{got / 1e9:.4f}", f"{got / said:.4f}"]
        lines.append(line + [""] * (len(head) - len(line)))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", choices=list(SHAPES), default=list(SHAPES), help="shapes to measure")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="only rows whose name contains one of these words")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--out", type=Path, default=Path("results/memory.json"), metavar="FILE")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    rows: list[dict[str, Any]] = []
    for name, optim, sparsity, optimizer, pruner in ROWS:
        if args.only and not any(word in name for word in args.only):
            continue
        row: dict[str, Any] = {"name": name, "measured": {}, "reason": ""}
        row["predicted"] = {size: predict(count(SHAPES[size]), optimizer, pruner) for size in SHAPES}
        for size in args.sizes:
            try:
                row["measured"][size] = measure(SHAPES[size], optim, sparsity, device)
            except (NotApplicable, MemoryError, torch.OutOfMemoryError) as error:
                row["reason"] = str(error).splitlines()[0]
            say(f"{name}, {size}: {row['measured'].get(size, row['reason'])}")
        rows.append(row)
    masks: list[dict[str, Any]] = []
    for name, a_weight, make in MASKS:
        got = {size: stored(make(count(SHAPES[size]).blocks)) for size in args.sizes}
        masks.append({"name": name, "a_weight": a_weight, "of_the_weights": a_weight / 4, "measured": got})
    result = {
        "machine": machine(),
        "device": device_name(device),
        "torch": torch.__version__,
        "counts": {size: vars(count(config)) for size, config in SHAPES.items()},
        "rows": rows,
        "masks": masks,
    }
    write_json(args.out, result)
    print(markdown(rows, masks, args.sizes, device.type == "cuda"))
    return result


if __name__ == "__main__":
    main()
