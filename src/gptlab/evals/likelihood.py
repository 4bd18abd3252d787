"""How likely a model finds what follows a context: the one question of HellaSwag, LAMBADA, WikiText and lm-eval.

Continuations of one context are read in one row: the context once, and behind it every continuation, which sees the
context and itself and stands at the position that it has in its own text. So the context is computed once, and the
batches keep to a few shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from gptlab.data.tokenizers import Tokenizer, valid_text
from gptlab.distributed.world import SINGLE, World
from gptlab.errors import DataError, UserError
from gptlab.model.gpt import GPT
from gptlab.model.loss import chunk_length
from gptlab.progress import Count, tell_nobody

# Widths that rows are padded to, equally spaced. HellaSwag's validation rows have 159 of GPT-2's tokens on average,
# padded to one width 302, to four 193, to eight 176.
WIDTHS = 8

Ids = Sequence[int] | NDArray[Any]


@dataclass(frozen=True)
class Pairs:
    """Contexts with their continuations, laid out in rows of at most block_size tokens; made by `lay_out`.

    A row is a context and, one behind another, continuations without their last tokens, which predict nothing.
    """

    tokens: NDArray[np.int32]  # (N,) of all rows
    positions: NDArray[np.int32]  # (N,) of a token in its own text
    branches: NDArray[np.int32]  # (N,) 0 in a context, k in the row's k-th continuation
    widths: NDArray[np.int64]  # (rows,) tokens of a row
    sources: NDArray[np.int64]  # (M,) indices into a row of the tokens that predict a continuation's, pair by pair
    targets: NDArray[np.int32]  # (M,) what they predict
    targets_in_row: NDArray[np.int64]  # (rows,)
    lengths: NDArray[np.int64]  # (pairs,) tokens of a continuation
    block_size: int


def lay_out(pairs: Iterable[tuple[Ids, Ids]], block_size: int) -> Pairs:
    """Rows from (context, continuation) pairs of ids, neither empty; neighbours with equal contexts share a row.

    The last token of a pair is no input, so a pair has room for block_size + 1; a longer one loses the beginning of its
    context. A continuation has at most block_size tokens.
    """
    tokens: list[Any] = []
    positions: list[Any] = []
    branches: list[Any] = []
    sources: list[Any] = []
    targets: list[Any] = []
    widths: list[int] = []
    in_row: list[int] = []
    before: Any = None
    k = 0
    for context, continuation in pairs:
        context, new = np.asarray(context, np.int32), np.asarray(continuation, np.int32)
        assert len(context) > 0 and 0 < len(new) <= block_size
        context = context[-(block_size + 1 - len(new)) :]
        c, e = len(context), len(new)
        if before is None or widths[-1] + e - 1 > block_size or not np.array_equal(context, before):
            tokens.append(context)
            positions.append(np.arange(c))
            branches.append(np.zeros(c))
            widths.append(c)
            in_row.append(0)
            before, k = context, 0
        k += 1
        tokens.append(new[:-1])
        positions.append(np.arange(c, c + e - 1))
        branches.append(np.full(e - 1, k))
        sources.append(np.concatenate(([c - 1], np.arange(widths[-1], widths[-1] + e - 1))))
        targets.append(new)
        widths[-1] += e - 1
        in_row[-1] += e
    return Pairs(
        tokens=np.concatenate(tokens).astype(np.int32),
        positions=np.concatenate(positions).astype(np.int32),
        branches=np.concatenate(branches).astype(np.int32),
        widths=np.array(widths),
        sources=np.concatenate(sources).astype(np.int64),
        targets=np.concatenate(targets),
        targets_in_row=np.array(in_row),
        lengths=np.array([len(part) for part in targets]),
        block_size=block_size,
    )


def encode_named(tokenizer: Tokenizer, texts: Sequence[str], where: Callable[[int], str]) -> list[NDArray[Any]]:
    """Ids of each text.

    Args:
        where: file and line of a text by its index, for messages.

    Raises:
        DataError: a text that the tokenizer has no ids for; it is named.
    """
    texts = [valid_text(text) for text in texts]
    try:
        return tokenizer.encode_batch(texts)
    except DataError:
        for i, text in enumerate(texts):
            try:
                tokenizer.encode_batch([text])
            except DataError as error:
                raise DataError(f"{where(i)}: {error}") from None
        raise


def encode_pairs(
    tokenizer: Tokenizer, texts: Sequence[tuple[str, str]], where: Callable[[int], str]
) -> list[tuple[list[int], list[int]]]:
    """Ids of (context, continuation) texts, tokenised together and cut after the context's own ids (as lm-eval does).

    Spaces at the end of a context go to the continuation. Where there is no context, end-of-text stands for it.

    Args:
        where: file and line of a pair by its index, for messages.

    Raises:
        UserError: a text without context, and a tokenizer without end-of-text.
        DataError: a text that the tokenizer has no ids for, or a continuation of which it leaves nothing.
    """
    moved = [(context.rstrip(), context[len(context.rstrip()) :] + continuation) for context, continuation in texts]
    wholes = encode_named(tokenizer, [context + continuation for context, continuation in moved], where)
    contexts = encode_named(tokenizer, [context for context, _ in moved], where)
    pairs = []
    for whole, context in zip(wholes, contexts, strict=True):
        start = context.tolist() or [end_of_text(tokenizer)]
        pairs.append((start, whole.tolist()[len(context) :]))
    for i, (_, continuation) in enumerate(pairs):
        if not continuation:
            raise DataError(f"{where(i)}: the tokenizer {tokenizer.name} has no token for {texts[i][1]!r}")
    return pairs


def rolling_pairs(tokenizer: Tokenizer, text: str, block_size: int, where: str) -> list[tuple[Ids, Ids]]:
    """A whole text cut into pairs that predict each of its tokens once, as lm-eval does.

    The first window begins with end-of-text, each further one with the last token of the one before; the last window
    reaches as far back as it can. There are none where the tokenizer leaves nothing of a text.

    Args:
        where: file and line of the text, for messages.

    Raises:
        UserError: a tokenizer without end-of-text.
        DataError: a text that the tokenizer has no ids for.
    """
    ids = encode_named(tokenizer, [text], lambda _: where)[0].tolist()
    cuts = range(0, len(ids), block_size)
    return [(ids[max(0, i - block_size) : i] or [end_of_text(tokenizer)], ids[i : i + block_size]) for i in cuts]


def end_of_text(tokenizer: Tokenizer) -> int:
    if tokenizer.eot is None:
        raise UserError(
            f"the tokenizer {tokenizer.name} has no end-of-text, which a text without context is read after"
        )
    return tokenizer.eot


class Likelihood(NamedTuple):
    losses: NDArray[np.float64]
    """(pairs,) nats, summed over the tokens of a continuation."""
    greedy: NDArray[np.bool_]
    """(pairs,) whether each token of it was the likeliest."""


@torch.no_grad()
def likelihoods(
    model: GPT,
    pairs: Pairs,
    device: torch.device,
    context: Callable[[], AbstractContextManager[object]],
    micro_batch: int,
    before_batch: Count = tell_nobody,
    world: World = SINGLE,
) -> Likelihood:
    """The losses of all continuations given their contexts.

    No random numbers are drawn, and the model keeps its mode (train or eval).

    Args:
        context: makes the autocast context of a forward pass.
        micro_batch: rows of block_size tokens in one forward pass; batches of shorter rows have about as many tokens.
        before_batch: called by all ranks with the number of batches done and of all; raises Stopped to end the work.
        world: its ranks share the batches.

    Raises:
        UserError: the model has no row for an id.
    """
    largest = max(int(ids.max(initial=-1)) for ids in (pairs.tokens, pairs.targets))
    if largest >= model.config.vocab_size:
        raise UserError(
            f"a text has token id {largest}, and the model's vocabulary ends at {model.config.vocab_size - 1}: its "
            "tokenizer has ids that the model was not trained with"
        )
    was_training = model.training
    model.eval()
    order, losses, greedy = [], [], []
    try:
        groups = _groups(pairs, micro_batch)
        for i, group in enumerate(world.share(groups)):
            before_batch(i * world.size, len(groups))
            if group is None:
                continue
            which, *laid = _laid(pairs, *group)
            tokens, positions, branches, sources, targets = (torch.from_numpy(a).to(device) for a in laid)
            with context():
                x = _hidden(model, tokens, positions, branches).flatten(0, 1)  # (B T, C)
                loss, best = _predicted(model, x[sources], targets)  # most positions predict no continuation's token
            order.append(which)
            losses.append(loss)
            greedy.append(best)
    finally:
        model.train(was_training)
    # Summed in float64, where k equal float32 losses sum to exactly k times one: equal means stay equal.
    each, right = np.zeros(len(pairs.targets)), np.zeros(len(pairs.targets), np.uint8)
    if order:
        done = np.concatenate(order)
        each[done] = torch.cat(losses).cpu().double().numpy()
        right[done] = torch.cat(greedy).cpu().numpy()
    world.all_reduce(torch.from_numpy(each))  # in place; what the others have done is 0 here
    world.all_reduce(torch.from_numpy(right))
    starts = np.cumsum(pairs.lengths) - pairs.lengths
    return Likelihood(np.add.reduceat(each, starts), np.logical_and.reduceat(right.astype(bool), starts))


def _hidden(model: GPT, tokens: Tensor, positions: Tensor, branches: Tensor) -> Tensor:
    """The last hidden states (B, T, C) of rows whose tokens (B, T) see the row's context and their own branch."""
    if not (branches > 1).any():  # one continuation a row: causal attention says the same, and is faster
        return model.hidden(tokens)
    causal = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=tokens.device).tril()  # (T, T)
    mask = causal & ((branches[:, None, :] == branches[:, :, None]) | (branches[:, None, :] == 0))  # (B, T, T)
    x, rope = model.wte(tokens), None  # (B, T, C)
    if model.wpe is not None:
        x = x + model.wpe(positions)
    else:
        rope = model.rope_cos[positions][:, None], model.rope_sin[positions][:, None]  # (B, 1, T, D / 2)
    if model.stream_dtype is not None:
        x = x.to(model.stream_dtype)
    for block in model.h:
        x = block(x, rope, mask[:, None])
    return model.ln_f(x)


def _predicted(model: GPT, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses (N,) in nats, float32, of target ids given hidden states (N, C), and whether each was the likeliest id.

    The logits are made for some tokens at a time: those of a batch in float32 would be larger than the model.
    """
    step = chunk_length(len(x), model.config.vocab_size, x.device.type)
    losses, best = [], []
    for part, y in zip(x.split(step), targets.split(step), strict=True):
        logits = model.logits(part).float()  # (n, V)
        losses.append(F.cross_entropy(logits, y, reduction="none"))
        best.append(logits.gather(1, y[:, None])[:, 0] == logits.amax(dim=-1))  # argmax takes seven times as long
    return torch.cat(losses), torch.cat(best)


def _groups(pairs: Pairs, micro_batch: int) -> list[tuple[NDArray[np.int64], int, int]]:
    """All rows in batches of at most WIDTHS shapes: the numbers of its rows, the rows B and the columns T of each."""
    groups = []
    edges = np.ceil(np.linspace(pairs.widths.min(), pairs.widths.max(), WIDTHS + 1)[1:])
    bucket = np.searchsorted(edges, pairs.widths)
    for b in reversed(range(WIDTHS)):  # what takes most memory comes first
        members = np.flatnonzero(bucket == b)
        if not len(members):
            continue
        members = members[np.argsort(-pairs.widths[members], kind="stable")]
        width = int(pairs.widths[members[0]])
        n_batches = -(-len(members) // max(1, micro_batch * pairs.block_size // width))
        size = -(-len(members) // n_batches)  # full batches but for a few rows of the last
        groups += [(members[i : i + size], size, width) for i in range(0, len(members), size)]
    return groups


def _laid(pairs: Pairs, rows: NDArray[np.int64], size: int, width: int) -> tuple[NDArray[np.int64], ...]:
    """A batch of rows, padded below and to the right.

    Returns:
        which: (N,) indices into pairs.targets.
        tokens, positions, branches: (B, T) the model's input.
        sources: (N,) indices into B T of what predicts the targets.
        targets: (N,) ids.
    """
    at = np.arange(width)[None, :]  # (1, T)
    there = np.zeros((size, width), bool)
    there[: len(rows)] = at < pairs.widths[rows, None]
    source = (np.cumsum(pairs.widths) - pairs.widths)[rows, None] + at
    source = source[there[: len(rows)]]  # indices into pairs.tokens, row by row
    laid = [np.full((size, width), fill, np.int64) for fill in (0, 0, -1)]
    for part, values in zip(laid, (pairs.tokens, pairs.positions, pairs.branches), strict=True):
        part[there] = values[source]
    n = pairs.targets_in_row[rows]
    first = (np.cumsum(pairs.targets_in_row) - pairs.targets_in_row)[rows]  # targets in pairs.targets
    which = np.arange(n.sum()) + np.repeat(first - (np.cumsum(n) - n), n)
    in_batch = pairs.sources[which] + np.repeat(np.arange(len(rows)) * width, n)
    return which, *laid, in_batch, pairs.targets[which].astype(np.int64)
