"""Device memory of a training step by kind, and the largest micro-batch that fits.

Weights and gradients are counted here. The optimizer, the pruner and the head state what they need themselves:
`optim.optimizers.optimizer_bytes`, `sparsity.pruner.pruner_bytes` and `model.loss.head_bytes`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gptlab.config import Recipe
from gptlab.errors import UserError
from gptlab.model.encoder import Encoder
from gptlab.model.gpt import GPT
from gptlab.model.loss import head_bytes
from gptlab.optim.optimizers import optimizer_bytes
from gptlab.planning.activations import Activations, bound_activations, count_activations
from gptlab.planning.device import Device, local_device
from gptlab.planning.resolve import Resolved, compiles
from gptlab.planning.shape import Shape, laid_out
from gptlab.sparsity.pruner import pruner_bytes

SLACK = 0.95  # share of the available memory that the largest micro-batch may fill; allocators leave gaps
CPU_TOKENS = 16384  # tokens of the largest automatic micro-batch on a CPU, which gains nothing from more


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank by kind. `peak` is the largest sum at one moment, not the sum of all kinds."""

    weights: float
    gradients: float
    optimizer: float
    masks: float
    activations: float
    head: float
    gathered: float
    """FSDP only: weights gathered from other ranks, and whole gradients until they are reduced."""
    peak: float
    moment: str
    """Moment of the peak, such as "in the loss" or "in the optimizer's step"."""
    least: float
    """What the run needs in any case: the peak, or for a compiled run only what no compiler recomputes."""


def spread_over(recipe: Recipe, processes: int) -> int:
    """Ranks that share one copy of the weights; 1 if each rank has a copy.

    Raises:
        UserError: distributed.strategy or distributed.shard_over does not suit this number of processes.
    """
    distributed = recipe.distributed
    if processes > 1 and distributed.strategy == "none":
        raise UserError(f"distributed.strategy = none: is for one process, not for {processes}; use ddp or fsdp")
    if distributed.strategy != "fsdp":
        return 1
    over = min(distributed.shard_over, processes) or processes
    if processes % over:
        raise UserError(f"distributed.shard_over = {over}: does not divide the {processes} processes")
    return over


def share_of_step(recipe: Recipe, processes: int) -> int:
    """Sequences of a step for one rank, rounded up. Raises UserError if there are fewer sequences than ranks."""
    if recipe.sequences_per_step < processes:
        raise UserError(
            f"{processes} processes cannot share the {recipe.sequences_per_step} sequences of a step: "
            f"raise batch.tokens_per_step or start fewer processes"
        )
    return math.ceil(recipe.sequences_per_step / processes)


def bytes_of(tensors: Iterable[Tensor]) -> float:
    return float(sum(t.nbytes for t in tensors))


def _gathered(shape: Shape, over: int) -> tuple[float, float, float]:
    """Bytes that FSDP needs beside local rows: gathered weights, a block's gradients, and the others' at the end.

    Gathered are embeddings, norms and head, and the matrices of the current block and the next. Gradients are reduced
    in a float32 buffer.
    """
    if over == 1:
        return 0.0, 0.0, 0.0
    model, regime = laid_out(shape), shape.regime
    block = sum(p.numel() for m in model.h[0].modules() if isinstance(m, nn.Linear) for p in m.parameters())
    rest = model.parameter_count() - shape.model.n_layer * block
    low, width = (regime.gathered or regime.weights).itemsize, regime.weights.itemsize
    return rest * width + 2.0 * block * low, block * (low + 4.0), rest * (width + 4.0)


def _backward_bytes(shape: Shape, model: GPT | Encoder, tokens: int) -> float:
    """Gradients of activations at one point of the backward pass, and the gradient of the head's weight.

    The gradients are those of a block's stream and branch, and one inside the MLP more than it frees. The gradient of
    the head's weight waits for the embedding's if the two are tied.
    """
    head = 4 * model.head_weight.numel() if isinstance(model, GPT) else 0
    stream, inside = 2 * shape.stream.itemsize * shape.model.n_embd, shape.matmul.itemsize * shape.model.mlp_hidden
    return head + tokens * (stream + inside)


def _checkpointed(shape: Shape, saved: Activations, sequences: int) -> float:
    """Activations under activation checkpointing: the input of each layer, and the document mask (torch.bool)."""
    config, tokens = shape.model, sequences * shape.model.block_size
    kept = saved.of(sequences, 0) + config.n_layer * tokens * config.n_embd * shape.stream.itemsize
    return kept + (sequences * config.block_size**2 if config.document_attention else 0)


def _never_recomputed(shape: Shape, tokens: int) -> float:
    """Activations that a compiler keeps in any case: the outputs of matrix multiplications and of attention.

    These are queries, keys, values, attention and its projection, and the MLP's hidden units and output.
    """
    config = shape.model
    per_token = 6 * config.n_embd + (2 if config.mlp == "swiglu" else 1) * config.mlp_hidden
    return float(config.n_layer * tokens * shape.matmul.itemsize * per_token)


def _head(shape: Shape, model: GPT | Encoder, tokens: int, kind: str) -> float:
    if isinstance(model, Encoder):
        return 0.0
    dtype = shape.regime.head or shape.matmul
    return head_bytes(tokens, model.head_weight, shape.stream, dtype, shape.regime.loss, kind)


def step_memory(
    recipe: Recipe, shape: Shape, sequences: int, kind: str, processes: int = 1, saved: Activations | None = None
) -> Memory:
    """Memory of one rank of a run.

    From the second micro-batch of a step on, gradients are there while the loss is taken; under FSDP these are whole
    gradients. With one micro-batch they replace activations in the backward pass, except under DDP, whose buckets are
    there from the start.

    Args:
        sequences: of one micro-batch.
        kind: "cpu" or "cuda".
        saved: activations; default `count_activations` of the shape.
    """
    model, gpu, over = laid_out(shape), kind == "cuda", spread_over(recipe, processes)
    rows, config, tokens = laid_out(shape, over), shape.model, sequences * shape.model.block_size
    gradients = bytes_of(rows.parameters())
    weights = gradients + bytes_of(rows.buffers())
    kept, temporary = optimizer_bytes(rows, recipe.optim, gpu, recipe.train.ema)
    masks = pruner_bytes(rows, recipe.sparsity)
    head = _head(shape, model, tokens, kind)
    gathered, reduced, root = _gathered(shape, over)
    saved = saved or count_activations(shape, gpu)
    if over > 1 and shape.regime.gathered:  # gathered in autocast's dtype, so that it copies nothing
        saved = dataclasses.replace(saved, per_layer=0)

    work, casts = _backward_bytes(shape, model, tokens), 0.0
    if recipe.train.activation_checkpointing:  # a layer is computed again; autocast keeps copies of all its weights
        activations = _checkpointed(shape, saved, sequences)
        work, casts = work + saved.layer(sequences), config.n_layer * saved.per_layer
    else:
        activations = saved.of(sequences, config.n_layer)

    embedding = model.wte.weight.nbytes  # its gradient is made dense before it is added
    before = weights + kept + masks
    accumulates, buckets = sequences < share_of_step(recipe, processes), processes > 1 and over == 1
    held = gradients if accumulates or buckets else 0.0
    if over > 1 and accumulates:  # whole gradients in float32, which are reduced with those of the last micro-batch
        held = 4.0 * model.parameter_count()
    last = root if over > 1 else embedding * (2 if config.tied and held else 1)
    moments = {
        "in the loss": before + gathered + held + activations + casts + head,
        "in the backward pass": before + gathered + reduced + held + activations + work,
        "at the end of the backward pass": before + gathered + gradients + last,
        "in the optimizer's step": before + gradients + temporary,
    }
    if over > 1:  # an evaluation gathers the whole model
        moments["in an evaluation"] = before + bytes_of(model.parameters()) + saved.layer(sequences) + head
    moment = max(moments, key=lambda name: moments[name])
    peak = least = moments[moment]
    if compiles(recipe, kind):
        floor = min(activations, _never_recomputed(shape, tokens))
        least = max(before + gathered + held + floor, before + gradients)
    gathered += reduced + (held if over > 1 else 0.0)
    return Memory(weights, gradients, kept, masks, activations, head, gathered, peak, moment, least)


def largest_that_fits(recipe: Recipe, shape: Shape, device: Device, processes: int = 1, most: float = math.inf) -> int:
    """The largest micro-batch, in sequences, that fits into `SLACK` of the available memory; 0 if none does.

    Args:
        processes: ranks that share a step. A micro-batch is never larger than a rank's share.
        most: upper limit.
    """

    def fits(sequences: int, saved: Activations | None = None) -> bool:
        return step_memory(recipe, shape, sequences, device.kind, processes, saved).peak <= SLACK * device.available

    bound = bound_activations(shape, device.kind == "cuda")
    share = share_of_step(recipe, processes)
    if share <= most:  # the whole share at once accumulates no gradients, and may need less than a part of it
        if fits(share, bound) or fits(share):
            return share
        most = share - 1
    if fits(int(most), bound):
        return int(most)
    low, high = 0, int(most)  # low fits
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def auto_micro_batch(resolved: Resolved, device: torch.device, processes: int = 1) -> int:
    """The micro-batch that batch.micro_batch = auto takes: a rank's share of a step, or the largest power of two.

    On a CPU it leaves half of the free memory alone and takes at most `CPU_TOKENS` tokens.
    """
    recipe, here = resolved.recipe, local_device(device, processes)
    most = share = share_of_step(recipe, processes)
    if device.type == "cpu":
        here = dataclasses.replace(here, available=here.available / 2)
        most = min(share, max(1, CPU_TOKENS // recipe.model.block_size))
    found = largest_that_fits(recipe, resolved.shape, here, processes, most)
    return found if found == share else 2 ** int(math.log2(max(1, found)))
