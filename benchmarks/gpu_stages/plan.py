"""The planner against PyTorch's allocator: planned and measured peak memory of eager training steps.

An item is a model size and a micro-batch. It makes two updates of two micro-batches each and takes the peak of the
second one, when all moments and gradients exist. On a GPU the peak is torch.cuda.max_memory_allocated; on a CPU it is
the profiler's record of the allocator, plus the weights and moments that existed before. The stage `speed` has compiled
models, which keep fewer activations than planned.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

from gptlab.config import Recipe, build_recipe
from gptlab.model.gpt import build_model
from gptlab.optim.optimizers import make_optimizer
from gptlab.planning.device import local_device
from gptlab.planning.memory import step_memory
from gptlab.planning.shape import Shape
from gptlab.precision.regimes import apply_regime, enter_regime
from gpu_stages.stage import NotHere, Row, Stage, pick, run

MICRO_BATCHES_A_STEP = 2
# preset, micro-batch, regime, activation checkpointing
ROWS = [
    ("gpt2", 8, "amp_bf16", False),
    ("gpt2", 64, "amp_bf16", False),
    ("gpt2-medium", 16, "amp_bf16", False),
    ("gpt2-large", 8, "amp_bf16", False),
    ("gpt2", 32, "amp_bf16", False),
    ("gpt2-large", 16, "amp_bf16", False),
    ("gpt2-medium", 32, "amp_bf16", False),
    ("gpt2", 16, "amp_bf16", False),
    ("gpt2-medium", 8, "amp_bf16", False),
    ("gpt2-medium", 64, "amp_bf16", False),
    ("gpt2-large", 32, "amp_bf16", False),
    ("gpt2", 32, "bf16_pure", False),
    ("gpt2", 32, "fp32", False),
    ("gpt2-large", 16, "amp_bf16", True),
]
TINY_ROWS = [("micro", 2, "fp32", False), ("micro", 4, "amp_bf16", False)]


def measure(recipe: Recipe, device: torch.device) -> float:
    """Peak bytes of an update, including weights and moments."""
    regime = enter_regime(recipe.precision, device)
    model = build_model(recipe.model, device, on_meta=lambda m: apply_regime(m, regime))
    model.activation_checkpointing = recipe.train.activation_checkpointing
    optimizer = make_optimizer(model, recipe.optim)
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


def beside(stage: Stage, device: torch.device, preset: str, micro_batch: int, regime: str, again: bool) -> Row:
    block = 128 if stage.tiny else 1024
    recipe = build_recipe(
        {
            "model.preset": preset,
            "model.vocab_size": 2000 if stage.tiny else 50304,
            "model.block_size": block,
            "precision.regime": regime,
            "train.max_steps": 2,
            "batch.micro_batch": micro_batch,
            "compile.enabled": False,
            "batch.tokens_per_step": MICRO_BATCHES_A_STEP * micro_batch * block,
            "train.activation_checkpointing": again,
        }
    )
    kind = "cuda" if device.type == "cuda" else "cpu"
    found = step_memory(recipe, Shape(recipe.model, recipe.precision, 0), micro_batch, kind)
    here = local_device(device).available
    if found.peak > here:
        raise NotHere(f"the plan needs {found.peak / 1e9:.1f} GB, {here / 1e9:.1f} GB are available")
    got = measure(recipe, device)
    return {
        "planned_gb": found.peak / 1e9,
        "measured_gb": got / 1e9,
        "planned_of_measured": found.peak / got,
        "moment": found.moment,
        "says": f"{found.peak / 1e9:.3f} GB planned, {got / 1e9:.3f} GB measured: ratio {found.peak / got:.3f}",
    }


def main(stage: Stage) -> None:
    device = pick(stage)
    items: dict[str, Callable[[], Row]] = {}
    for preset, micro_batch, regime, again in TINY_ROWS if stage.tiny else ROWS:
        name = f"{preset} x {micro_batch}, {regime}" + (", activation checkpointing" if again else "")
        given = (preset, micro_batch, regime, again)
        items[name] = lambda given=given: beside(stage, device, *given)  # type: ignore[misc]
    stage.all(items, expects=3.0, most=40.0)


if __name__ == "__main__":
    run(main)
