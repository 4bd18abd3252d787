"""Text from a model: one token at a time, with a cache of keys and values."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from gptlab.model.gpt import GPT, KVCache
from gptlab.seeding import address


def pick_token(
    logits: Tensor, temperature: float, top_k: int, top_p: float, generators: list[torch.Generator]
) -> Tensor:
    """Draw the next id of each sequence, (B,), from logits (B, V) on the CPU.

    Temperature first, then the top_k likeliest, then the fewest of those that hold top_p of the probability (nucleus
    sampling, Holtzman et al. 2020, arXiv 1904.09751); temperature 0 takes the likeliest.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    values, order = logits.sort(dim=-1, descending=True, stable=True)
    if top_k:
        values = values[:, :top_k]
    probabilities = F.softmax(values, dim=-1)  # (B, k), falling
    if top_p < 1:
        before = probabilities.cumsum(dim=-1) - probabilities  # the mass of likelier ids; the first is always kept
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    drawn = [torch.multinomial(row, 1, generator=g) for row, g in zip(probabilities, generators, strict=True)]
    return order.gather(1, torch.stack(drawn))[:, 0]


@torch.no_grad()
def generate(
    model: GPT,
    prompt: Tensor,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    n_ids: int | None = None,
    use_cache: bool = True,
) -> Iterator[Tensor]:
    """Yield the ids that follow a prompt, (B,) at a time, on the CPU.

    Sequence i draws from a generator addressed by (seed, i): a sample is the same however many are made beside it. When
    the context is full, the model reads its last half again and goes on from there.

    Args:
        prompt: (B, T) ids, T at least 1; of a longer one than fits the end is read.
        top_k: 0 is all.
        n_ids: ids that have a meaning; the padding of the vocabulary beyond is never drawn.
        use_cache: False reads the whole context for each token, for comparison.
    """
    was_training, block = model.training, model.config.block_size
    model.eval()
    dtype = model.stream_dtype or model.wte.weight.dtype
    B = prompt.shape[0]
    generators = [torch.Generator().manual_seed(address(seed, "sample", i)) for i in range(B)]
    context = prompt.to(model.device)[:, -block:]  # (B, T): what the model has read or is about to read
    new, cache = context, None
    try:
        for _ in range(max_tokens):
            if context.shape[1] > block:
                context = context[:, -(block // 2 or 1) :]
                new, cache = context, None
            if use_cache and cache is None:
                cache = KVCache(model, B, min(block, context.shape[1] + max_tokens), dtype)
            last = model.hidden(new if use_cache else context, cache=cache)[:, -1]  # (B, C)
            logits = model.logits(last)[:, :n_ids].float().cpu()  # (B, V)
            ids = pick_token(logits, temperature, top_k, top_p, generators)
            yield ids
            new = ids[:, None].to(model.device)  # (B, 1)
            context = torch.cat((context, new), dim=1)
    finally:
        model.train(was_training)
