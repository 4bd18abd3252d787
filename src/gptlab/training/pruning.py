"""What a run does about sparsity: its pruner, what is said of the masks, and faults injected on purpose."""

from __future__ import annotations

from typing import Any

import torch

from gptlab.config import Recipe
from gptlab.distributed.shard import Weights
from gptlab.rundir import RunDir
from gptlab.sparsity.pruner import Pruner

# they move a weight by its moments and gradient alone, so that where these are zero a zero stays
ELEMENTWISE = ("adamw", "adamw-spam", "adamw-prune", "sgd")


def make_pruner(model: Weights, optimizer: torch.optim.Optimizer, recipe: Recipe) -> Pruner | None:
    """The pruner of a recipe with schedule.decay_steps resolved, or None where nothing is pruned."""
    if recipe.sparsity.method == "none":
        return None
    again = recipe.optim.name not in ELEMENTWISE
    return Pruner(model, optimizer, recipe.sparsity, recipe.schedule.decay_steps, recipe.seed, every_update=again)


def mask_facts(pruner: Pruner, run: RunDir, step: int, share: float) -> dict[str, Any]:
    """What a training line says of the masks; sparsity.json, written when they changed, has each matrix's share.

    Args:
        share: of the step time that went into masks, since the last line.
    """
    sparsity = pruner.sparsity()  # counts, with all processes; what follows needs no other
    if run.read_json("sparsity.json").get("changed_at") != pruner.changed_at:
        facts: dict[str, Any] = {"step": step, "sparsity": sparsity, "mask_bytes": pruner.mask_bytes()}
        facts |= {"changed_at": pruner.changed_at, "changes": pruner.changes, "by_matrix": pruner.by_layer()}
        run.write_json("sparsity.json", facts)
    return {"sparsity": sparsity, "mask_changes": pruner.changes, "mask_overhead_percent": 100 * share}


@torch.no_grad()
def spike_gradients(model: Weights, factor: float) -> None:
    """A gradient spike, as the `spikes` study injects it: every gradient times one number."""
    torch._foreach_mul_([p.grad for p in model.parameters() if p.grad is not None], factor)
