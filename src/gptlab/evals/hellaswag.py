"""HellaSwag (Zellers et al. 2019, arXiv 1905.07830): which of four endings does the model find likeliest?

The token-normalised definition of build-nanogpt and llm.c: the raw context and " " + ending are tokenised apart and
joined; `acc` picks the ending with the lowest summed loss, `acc_norm` the one with the lowest mean loss a token. GPT-2
124M as released scores 0.2859 and 0.2955 on the 10,042 validation rows; chance is 0.25. lm-eval's definition edits the
text and divides by characters, so its numbers are others.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from gptlab.config import UserError
from gptlab.data.tokenizers import Tokenizer, valid_text
from gptlab.model.gpt import GPT
from gptlab.model.loss import chunk_length
from gptlab.rundir import write_atomically

# Widths that sequences are padded to. Each is a shape that a compiled model is compiled for; a single one would make
# 1.6 times the tokens of four (GPT-2's tokens of the validation rows: 592 a row, 361, and 295 without any padding).
WIDTHS = 4


class HellaSwagError(UserError):
    """A file that does not hold HellaSwag's rows, or a row that cannot be scored."""


# -- rows -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    ind: int
    ctx: str
    endings: tuple[str, str, str, str]
    label: int
    """Which ending is the right one, 0 to 3."""


def load_rows(path: str | Path) -> list[Row]:
    """The rows of hellaswag_val.jsonl, or of the same with gzip (.gz).

    Raises:
        HellaSwagError: the file is missing, damaged or empty, or a line of it is no row; the line is named.
    """
    path, rows, number = Path(path), [], 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    if line.strip():
                        rows.append(_row(json.loads(line.decode())))
                except ValueError as error:  # UTF-8, JSON (without a line number of its own), and what _row says
                    says = getattr(error, "msg", error)
                    raise HellaSwagError(f"{path}, line {number} is not a HellaSwag row: {says}") from None
    except FileNotFoundError:
        raise HellaSwagError(f"there is no HellaSwag file {path}: hellaswag.path names hellaswag_val.jsonl") from None
    except (OSError, EOFError, zlib.error) as error:
        raise HellaSwagError(f"{path} cannot be read beyond line {number}: {error}") from None
    if not rows:
        raise HellaSwagError(f"{path} has no rows")
    return rows


def _row(value: Any) -> Row:
    if not isinstance(value, dict):
        raise ValueError("an object was expected")
    if missing := [key for key in ("ind", "ctx", "endings", "label") if key not in value]:
        raise ValueError(f"it has no {' and no '.join(missing)}")
    ind, ctx, endings, label = (value[key] for key in ("ind", "ctx", "endings", "label"))
    if type(ind) is not int:
        raise ValueError("ind must be a whole number")
    if not isinstance(ctx, str) or not ctx:
        raise ValueError("ctx must be a text")
    if not isinstance(endings, list) or len(endings) != 4 or not all(isinstance(ending, str) for ending in endings):
        raise ValueError("endings must be four texts")
    if type(label) not in (int, str) or str(label) not in ("0", "1", "2", "3"):  # the test split's labels are secret
        raise ValueError(f"label must be 0, 1, 2 or 3, not {label!r}")
    return Row(ind, ctx, (endings[0], endings[1], endings[2], endings[3]), int(label))


@dataclass(frozen=True)
class Encoded:
    """Tokenised rows: each one's context and four endings lie one behind another in `tokens`."""

    ind: NDArray[np.int64]  # (n,)
    label: NDArray[np.int64]  # (n,)
    tokens: NDArray[np.int32]
    lengths: NDArray[np.int64]  # (n, 5) tokens of the context and of each ending
    block_size: int
    n_cut: int
    """Rows that were too long for block_size and were cut."""


def encode_rows(rows: Sequence[Row], tokenizer: Tokenizer, block_size: int) -> Encoded:
    """Tokenise rows, each at most block_size tokens from the context's first to its longest ending's last.

    A longer row loses the beginning of its context, as much as its longest ending demands, so that all four endings
    follow the same text. Where an ending alone leaves no room, it loses its end and the context keeps one token.

    Args:
        block_size: the model's, in tokens; at least 2.

    Raises:
        HellaSwagError: a text of which the tokenizer leaves nothing, or a block_size of 1.
        DataError: a text that the tokenizer has no ids for.
    """
    if block_size < 2:
        raise HellaSwagError("model.block_size = 1: HellaSwag needs room for a token of context and one of an ending")
    assert rows, "load_rows gives at least one"
    texts = [valid_text(text) for row in rows for text in (row.ctx, *(" " + ending for ending in row.endings))]
    ids = tokenizer.encode_batch(texts)
    pieces: list[NDArray[Any]] = []
    n_cut = 0
    for i, row in enumerate(rows):
        context, *endings = ids[5 * i : 5 * i + 5]
        if not all(len(piece) for piece in (context, *endings)):
            raise HellaSwagError(f"HellaSwag row {row.ind}: its context or an ending has no tokens")
        longest = max(len(ending) for ending in endings)
        n_cut += len(context) + longest > block_size
        pieces.append(context[-max(1, block_size - longest) :])
        pieces.extend(ending[: block_size - 1] for ending in endings)
    return Encoded(
        ind=np.array([row.ind for row in rows], np.int64),
        label=np.array([row.label for row in rows], np.int64),
        tokens=np.concatenate(pieces).astype(np.int32),
        lengths=np.array([len(piece) for piece in pieces], np.int64).reshape(-1, 5),
        block_size=block_size,
        n_cut=n_cut,
    )


# -- scores ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HellaSwagResult:
    """Losses of every ending, and the accuracies that follow from them.

    Of equal losses the first ending is picked; a row with a loss that is not finite has no pick (-1) and is wrong.
    """

    ind: NDArray[np.int64]  # (n,)
    label: NDArray[np.int64]  # (n,)
    losses: NDArray[np.float64]  # (n, 4) nats, summed over the tokens of an ending
    lengths: NDArray[np.int64]  # (n, 4) tokens of an ending

    @property
    def n(self) -> int:
        return len(self.label)

    @property
    def pick(self) -> NDArray[np.int64]:
        """The endings with the lowest summed loss, (n,)."""
        return _lowest(self.losses)

    @property
    def pick_norm(self) -> NDArray[np.int64]:
        """The endings with the lowest mean loss a token, (n,)."""
        return _lowest(self.losses / self.lengths)

    @property
    def acc(self) -> float:
        return float((self.pick == self.label).mean())

    @property
    def acc_norm(self) -> float:
        return float((self.pick_norm == self.label).mean())

    def scores(self) -> dict[str, float]:
        """The two accuracies under their names in metrics.jsonl."""
        return {"hellaswag_acc": self.acc, "hellaswag_acc_norm": self.acc_norm}


def _lowest(losses: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.where(np.isfinite(losses).all(axis=1), losses.argmin(axis=1), -1)


def standard_error(share: float, n: int) -> float:
    """Binomial standard error of a share of n rows."""
    return math.sqrt(share * (1 - share) / n)


def wilson_interval(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share of n rows (Wilson 1927); the default z is that of 95%.

    It stays within [0, 1] and covers what it says for few rows and for shares near the ends, where share +- z standard
    errors does not.
    """
    shrink = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


@torch.no_grad()
def evaluate_hellaswag(
    model: GPT,
    encoded: Encoded,
    device: torch.device,
    context: Callable[[], AbstractContextManager[object]],
    micro_batch: int,
    stop: Callable[[], bool] = lambda: False,
) -> HellaSwagResult | None:
    """The losses of all endings of all rows.

    Each context with one of its endings is a sequence of its own, batched with others of about its length: what stands
    behind a sequence is padding that causal attention never shows it. Nothing random is drawn and the model is left in
    the mode it was found in.

    Args:
        context: makes the autocast context of a forward pass.
        micro_batch: how many sequences of block_size tokens go through the model at once; shorter ones go in larger
            numbers, as many as have as many tokens.
        stop: looked at between batches; true ends the evaluation.

    Returns:
        The result, or None when it was stopped.
    """
    lengths = encoded.lengths[:, 1:]  # (n, 4)
    was_training = model.training
    model.eval()
    order, parts = [], []
    try:
        for sequences, tokens, positions, targets in _batches(encoded, micro_batch):
            if stop():
                return None
            with context():
                x = model.hidden(torch.from_numpy(tokens).to(device)).flatten(0, 1)  # (B T, C)
                x = x[torch.from_numpy(positions).to(device)]  # (N, C): most positions predict no ending's token
                parts.append(_token_losses(x, model.head_weight, torch.from_numpy(targets).to(device)))
            order.append(sequences)
    finally:
        model.train(was_training)
    # Summed in float64, where k equal float32 losses sum to exactly k times one: equal means stay equal.
    each = torch.cat(parts).cpu().double().numpy()  # of every ending's tokens
    done = np.concatenate(order)
    starts = np.cumsum(lengths.flat[done]) - lengths.flat[done]
    losses = np.empty(lengths.size)
    losses[done] = np.add.reduceat(each, starts)
    return HellaSwagResult(encoded.ind, encoded.label, losses.reshape(-1, 4), lengths)


def _batches(
    encoded: Encoded, micro_batch: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
    """All sequences, 4 row + ending, in batches of at most WIDTHS shapes.

    Yields:
        sequences: (b,) which they are.
        tokens: (B, T) the model's input, padded below and to the right with 0. The last token predicts nothing and is
            left out.
        positions: (N,) indices into B T of the tokens that predict an ending's, sequence by sequence.
        targets: (N,) what they predict.
    """
    lengths = encoded.lengths
    begins = (np.cumsum(lengths) - lengths.ravel()).reshape(-1, 5)  # in encoded.tokens
    c = np.repeat(lengths[:, 0], 4)  # tokens of the context, by sequence
    c_begin = np.repeat(begins[:, 0], 4)
    e, e_begin = lengths[:, 1:].ravel(), begins[:, 1:].ravel()
    needs = c + e - 1
    edges = np.ceil(np.linspace(needs.min(), needs.max(), WIDTHS + 1)[1:])  # equally spaced; longest sequences last
    bucket = np.searchsorted(edges, needs)
    for b in range(WIDTHS):
        members = np.flatnonzero(bucket == b)
        if not len(members):
            continue
        members = members[np.argsort(-needs[members], kind="stable")]
        width = int(needs[members[0]])
        n_batches = -(-len(members) // max(1, micro_batch * encoded.block_size // width))
        size = -(-len(members) // n_batches)  # full batches but for a few rows of the last
        for i in range(0, len(members), size):
            sequences = members[i : i + size]
            at = np.arange(width + 1)[None, :]  # (1, T + 1)
            c_, e_ = c[sequences, None], e[sequences, None]  # (b, 1)
            source = np.where(at < c_, c_begin[sequences, None] + at, e_begin[sequences, None] + at - c_)
            whole = np.zeros((size, width + 1), np.int64)
            ending = np.zeros((size, width + 1), bool)
            ending[: len(sequences)] = (at >= c_) & (at < c_ + e_)
            whole[: len(sequences)] = np.where(at < c_ + e_, encoded.tokens.take(source, mode="clip"), 0)
            yield sequences, whole[:, :-1], np.flatnonzero(ending[:, 1:]), whole[:, 1:][ending[:, 1:]]


def _token_losses(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Losses (N,) in nats, float32, from hidden states (N, C), the head (V, C) and target ids (N,).

    The logits are made for some tokens at a time: those of a batch in float32 would be larger than the model.
    """
    step = chunk_length(len(x), weight.shape[0], x.device.type)
    chunks = zip(x.split(step), targets.split(step), strict=True)
    return torch.cat([F.cross_entropy(F.linear(part, weight).float(), y, reduction="none") for part, y in chunks])


def write_results(path: Path, result: HellaSwagResult) -> None:
    """hellaswag_results.jsonl: a line per row, null for a loss that is not finite and for a row without a pick."""
    lines = []
    for ind, label, losses, lengths, pick, pick_norm in zip(
        result.ind, result.label, result.losses, result.lengths, result.pick, result.pick_norm, strict=True
    ):
        line = {
            "ind": int(ind), "label": int(label),
            "losses": [float(loss) if math.isfinite(loss) else None for loss in losses], "lengths": lengths.tolist(),
            "pick": int(pick) if pick >= 0 else None, "pick_norm": int(pick_norm) if pick_norm >= 0 else None,
        }  # fmt: skip
        lines.append(json.dumps(line, allow_nan=False) + "\n")
    write_atomically(path, "".join(lines))
