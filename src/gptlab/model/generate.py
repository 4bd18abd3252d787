"""Generation of text, one token at a time, with a cache of keys and values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from gptlab.errors import RunError, UserError
from gptlab.model.decoding import Decoder
from gptlab.model.gpt import GPT
from gptlab.seeding import address

AT_ONCE = 64  # numbers of a generator
COLDEST = 1e-30  # logits divided by less may exceed float32, and the most likely id has a probability of 1 long before


class NotFinite(RunError):
    """The logits of a model are NaN or infinite."""


def pick_token(logits: Tensor, temperature: float, top_k: int, top_p: float, uniforms: Tensor) -> Tensor:
    """Draw the next id of each sequence, (B,), from logits (B, V).

    Args:
        logits: (B, V).
        temperature: divides the logits; 0 takes the most likely id, and so does less than `COLDEST`.
        top_k: keep the k most likely ids; 0 keeps all.
        top_p: then keep the smallest set of the most likely ids whose probabilities sum to at least top_p (nucleus
            sampling, Holtzman et al. 2020, arXiv 1904.09751).
        uniforms: (B,) float64 in [0, 1), one for each sequence: the probability below the id that is drawn.
    """
    if temperature < COLDEST:
        return logits.argmax(dim=-1)
    logits, ids = logits.float() / temperature, None
    if 0 < top_k < logits.shape[-1]:
        logits, ids = logits.topk(top_k)  # (B, k), in descending order
    p = torch.softmax(logits.double(), dim=-1)
    if top_p < 1:
        p = p.where(nucleus(p, top_p), 0)
    below = p.cumsum(dim=-1)  # (B, k): probability of an id and of those before it
    total = below[:, -1:].contiguous()
    last = torch.searchsorted(below, total).clamp(max=p.shape[1] - 1)  # that is kept, with NaN too
    drawn = torch.searchsorted(below, uniforms[:, None] * total, right=True).minimum(last)
    return (drawn if ids is None else ids.gather(1, drawn))[:, 0]


def nucleus(p: Tensor, top_p: float) -> Tensor:
    """Whether an id is in the smallest set of the most likely ids with at least top_p; of equal ones the first ids.

    Only values are sorted: on a CPU by NumPy, several times as fast as ids with their values.

    Args:
        p: (B, V) probabilities, float64.
    """
    ascending = torch.from_numpy(np.sort(p.numpy(), axis=-1)) if p.device.type == "cpu" else p.sort(dim=-1).values
    likely = ascending.flip(-1)
    enough = likely.new_full((len(p), 1), top_p)
    last = torch.searchsorted(likely.cumsum(dim=-1), enough).clamp(max=p.shape[1] - 1)  # of those that are kept
    least = likely.gather(1, last)
    above, equal = p > least, p == least
    return above | (equal & (equal.cumsum(dim=-1) <= last + 1 - above.sum(dim=-1, keepdim=True)))


def uniforms(seeds: Sequence[int]) -> Iterator[Tensor]:
    """Numbers in [0, 1) for ever, (B,) float64 at a time; each place has its own generator with its seed."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    while True:
        many = [torch.rand(AT_ONCE, generator=generator, dtype=torch.float64) for generator in generators]
        yield from torch.stack(many, dim=1)


@torch.no_grad()
def generate(
    model: GPT,
    prompts: Tensor | Sequence[Sequence[int]],
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    n_ids: int | None = None,
    use_cache: bool = True,
    numbers: Sequence[int] | None = None,
    compiled: bool = False,
) -> Iterator[Tensor]:
    """Generate the ids that follow prompts; yields (B,) ids on the CPU for each new token.

    A sequence draws from its own generator, seeded by (seed, its number), so what follows a prompt does not depend on
    the other sequences. When the context is full, generation continues with its last half.

    Args:
        model: its weights must not change meanwhile.
        prompts: ids of B prompts, at least one each. Only the last block_size ids of a prompt are read.
        temperature, top_k, top_p: see `pick_token`.
        n_ids: size of the tokenizer's vocabulary; padding ids of the model beyond it are never drawn.
        use_cache: False computes the whole context anew for each token, for comparison.
        numbers: of the sequences; default 0 to B - 1.
        compiled: compile the reading of one token, which takes longer than a short text.

    Raises:
        UserError: the model has no row for an id of a prompt.
        NotFinite: no next id can be drawn.
    """
    block = model.config.block_size
    contexts = [ids[-block:] for ids in (prompts.tolist() if isinstance(prompts, Tensor) else map(list, prompts))]
    if (largest := max(map(max, contexts))) >= model.config.vocab_size:
        raise UserError(
            f"the prompt has token id {largest}, and the model's vocabulary ends at {model.config.vocab_size - 1}: its "
            "tokenizer has ids that the model was not trained with; leave their text out"
        )
    B = len(contexts)
    draws = uniforms([address(seed, "sample", i) for i in numbers or range(B)])
    decoder = Decoder(model, B, min(block, max(map(len, contexts)) + max_tokens), max_tokens, compiled)
    drawn = torch.empty(0)
    for i in range(max_tokens):
        full = [b for b, context in enumerate(contexts) if len(context) > block]
        for b in full:
            contexts[b] = contexts[b][-(block // 2 or 1) :]
        if i == 0 or len(full) == B or not use_cache:
            logits = decoder.read(contexts)  # (B, V)
        else:
            logits = decoder.step(drawn)
            if full:
                logits[full] = decoder.read([contexts[b] for b in full], full)
        logits = logits[:, :n_ids].float()
        drawn = pick_token(logits, temperature, top_k, top_p, next(draws).to(model.device))
        least, most = logits.aminmax(dim=-1)  # NaN if one is
        ids = drawn.where(least.isfinite() & most.isfinite(), -1).cpu()  # the one wait for the device
        if (ids < 0).any():
            raise NotFinite("the model's logits are NaN or infinite, as after a diverged training")
        yield ids
        for context, index in zip(contexts, ids.tolist(), strict=True):
            context.append(index)
