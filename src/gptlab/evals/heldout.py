"""Held-out loss: nats a token, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import nn

from gptlab.data.shards import Tokens
from gptlab.distributed.world import SINGLE, World
from gptlab.progress import Count, tell_nobody


@torch.no_grad()
def heldout_loss(
    model: nn.Module,
    tokens: Tokens,
    starts: np.ndarray,  # (n,) where the windows begin
    block_size: int,
    micro_batch: int,
    device: torch.device,
    context: Callable[[], AbstractContextManager[object]],
    documents: Callable[[torch.Tensor], torch.Tensor | None] = lambda _: None,
    before_batch: Count = tell_nobody,
    world: World = SINGLE,
) -> tuple[float, np.ndarray]:
    """Mean loss in nats a token over windows, and how often each id was a target.

    Every batch has the same shape, the last one padded, so that a compiled model is compiled once. No random numbers
    are drawn, and the model keeps its mode (train or eval).

    Args:
        model: called as model(tokens, targets, documents), the summed loss.
        starts: first positions of windows of block_size tokens and their targets.
        before_batch: called by all ranks with the number of batches done and of all; raises Stopped to end the work.
        world: its ranks share the batches.

    Returns:
        (loss, counts of the target ids).
    """
    was_training = model.training
    model.eval()
    total, counts = torch.zeros((), dtype=torch.float64, device=device), np.zeros(0, dtype=np.int64)
    try:
        micro_batch = min(micro_batch, len(starts))
        batches = range(0, len(starts), micro_batch)
        for done, i in enumerate(world.share(batches)):
            before_batch(done * world.size, len(batches))
            if i is None:
                continue
            batch = _padded(tokens, starts[i : i + micro_batch], block_size, micro_batch)
            x, y = torch.from_numpy(batch[:, :-1]).to(device), torch.from_numpy(batch[:, 1:]).to(device)
            with context():
                total += model(x.clamp(min=0), y, documents(x))
            seen = np.bincount(batch[:, 1:][batch[:, 1:] >= 0])
            counts = np.pad(counts, (0, max(0, len(seen) - len(counts))))
            counts[: len(seen)] += seen
    finally:
        model.train(was_training)
    counts = np.pad(counts, (0, int(world.max(len(counts))) - len(counts)))
    world.all_reduce(total)
    world.all_reduce(torch.from_numpy(counts))  # in place: they share memory
    return total.item() / int(counts.sum()), counts


def _padded(tokens: Tokens, starts: np.ndarray, block_size: int, micro_batch: int) -> np.ndarray:
    """A batch (micro_batch, block_size + 1); rows that fill it up are -1."""
    batch = tokens.gather(starts, block_size + 1)
    if len(batch) < micro_batch:
        fill = np.full((micro_batch - len(batch), block_size + 1), -1, dtype=np.int64)
        batch = np.concatenate((batch, fill))
    return batch


def whole_split(tokens: Tokens, block_size: int) -> np.ndarray:
    """Starts of windows that tile a split: every token but the first is predicted, save a last piece of a window."""
    return np.arange((len(tokens) - 1) // block_size, dtype=np.int64) * block_size


def scores(loss: float, counts: np.ndarray, token_bytes: np.ndarray | None) -> dict[str, float]:
    """val_loss, its perplexity, and bits per byte of text where the tokenizer tells how many bytes an id stands for."""
    result = {"val_loss": loss, "val_perplexity": math.exp(min(loss, 700.0))}
    if token_bytes is not None and (n_bytes := (counts @ token_bytes[: len(counts)]).item()) > 0:
        result["val_bits_per_byte"] = loss * int(counts.sum()) / math.log(2) / n_bytes
    return result
