"""The planner against PyTorch's allocator: predicted and measured peak memory of training steps.

A row is a size, a regime and a micro-batch: two updates of two micro-batches each are made, and the peak is taken over
the second one, when moments and gradients are all there. On a GPU that is torch.cuda.max_memory_allocated, on a CPU the
record of the allocator that the profiler keeps, beside the weights and moments that are there before.

    python benchmarks/plan_gpu.py                                              # 124M, 355M, 774M; 8 to 64 sequences
    python benchmarks/plan_gpu.py --presets gpt2 --regimes amp_bf16 bf16_pure fp32 --compile --out /tmp/plan.json
    python benchmarks/plan_gpu.py --presets micro mini --micro-batches 2 4 --vocab-size 2000 --block-size 128   # a CPU

A row that the plan does not let fit is left out, and says so. Compiled runs keep fewer activations than is predicted.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path
from typing import Any

import torch
from common import machine, say, write_json

from gptlab import planner
from gptlab.config import Recipe, build_recipe
from gptlab.hardware import device_name
from gptlab.model.gpt import build_model
from gptlab.optim.optimizers import make_optimizer
from gptlab.precision.regimes import apply_regime, enter_regime
from gptlab.training.setup import pick_device

MICRO_BATCHES_A_STEP = 2


def measure(recipe: Recipe, device: torch.device, compiled: bool) -> float:
    """Bytes at the peak of an update, weights and moments included."""
    regime = enter_regime(recipe.precision, device)
    model = build_model(recipe.model, device, lay_out=lambda m: apply_regime(m, regime))
    model.activation_checkpointing = recipe.train.activation_checkpointing
    optimizer = make_optimizer(model, recipe.optim)
    if compiled:
        model.compile(dynamic=False)
    B, T = recipe.batch.micro_batch, recipe.model.block_size
    assert isinstance(B, int)
    tokens = torch.randint(recipe.model.vocab_size, (B, T + 1), device=device)
    factor = torch.tensor(1 / recipe.batch.tokens_per_step, device=device)

    def update() -> None:
        for _ in range(MICRO_BATCHES_A_STEP):
            with regime.context(device):
                out = model(tokens[:, :-1], tokens[:, 1:], None, factor)
            out.train.backward()
            del out
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    update()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        update()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated())
    kept = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    before = sum(t.nbytes for t in (*model.parameters(), *model.buffers(), *kept))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        update()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return float(before + most)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["gpt2", "gpt2-medium", "gpt2-large"])
    parser.add_argument("--regimes", nargs="+", default=["amp_bf16"])
    parser.add_argument("--micro-batches", nargs="+", type=int, default=[8, 16, 32, 64])
    parser.add_argument("--vocab-size", type=int, default=50304)
    parser.add_argument("--block-size", type=int, default=1024)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = pick_device(options.device)
    kind = "cuda" if device.type == "cuda" else "cpu"
    rows: list[dict[str, Any]] = []
    print("| size | regime | micro-batch | planned GB | measured GB | planned / measured | moment |")
    print("| --- | --- | ---: | ---: | ---: | ---: | --- |")
    for preset in options.presets:
        for regime in options.regimes:
            for micro_batch in options.micro_batches:
                recipe = build_recipe({
                    "model.preset": preset, "model.vocab_size": options.vocab_size,
                    "model.block_size": options.block_size, "precision.regime": regime, "train.max_steps": 2,
                    "batch.micro_batch": micro_batch, "compile.enabled": options.compile,
                    "batch.tokens_per_step": MICRO_BATCHES_A_STEP * micro_batch * options.block_size,
                    "train.activation_checkpointing": options.checkpointing,
                })  # fmt: skip
                shape = planner.Shape(recipe.model, recipe.precision, 0)
                found = planner.memory(recipe, shape, micro_batch, kind)
                said = found.peak
                name = f"| {preset} | {regime} | {micro_batch} | {said / 1e9:.3f} "
                if found.least > planner.at_hand(device).available:
                    print(f"{name}| does not fit | | |")
                    continue
                try:
                    got = measure(recipe, device, options.compile)
                except torch.OutOfMemoryError:
                    print(f"{name}| out of memory | | |")
                    continue
                finally:
                    torch._dynamo.reset() if options.compile else None
                    gc.collect()
                    torch.cuda.empty_cache() if kind == "cuda" else None
                print(f"{name}| {got / 1e9:.3f} | {said / got:.3f} | {found.moment} |", flush=True)
                rows.append({
                    "preset": preset, "regime": regime, "micro_batch": micro_batch, "planned": said, "measured": got,
                })  # fmt: skip
    if rows:
        worst = max(rows, key=lambda row: abs(row["planned"] / row["measured"] - 1))
        say(f"furthest off: {worst['planned'] / worst['measured']:.3f} on {device_name(device)}")
    if options.out:
        write_json(options.out, {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
