"""HellaSwag (Zellers et al. 2019, arXiv 1905.07830): which of four endings does the model find likeliest?

Two definitions, whose numbers are others:

- tokens (build-nanogpt, llm.c): the raw context and " " + ending are tokenised apart and joined; `acc` picks the ending
  with the lowest summed loss, `acc_norm` the one with the lowest mean loss a token. GPT-2 124M as released scores
  0.2859 and 0.2955 on the 10,042 validation rows.
- harness (EleutherAI's lm-eval): the context is put together from its parts and headed by the activity, WikiHow's
  brackets are taken out, context and ending are tokenised together, and `acc_norm` divides by the characters of the
  ending. GPT-2 124M as released scores 0.2892 and 0.3114.

Chance is 0.25.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from gptlab.data.download import fetch
from gptlab.data.tokenizers import Gpt2Tokenizer, Tokenizer
from gptlab.distributed.world import SINGLE, World
from gptlab.errors import DataError
from gptlab.evals.likelihood import Ids, Pairs, encode_named, encode_pairs, lay_out, likelihoods
from gptlab.files import because, open_regular, parse_json, read_bytes, unpacked_lines
from gptlab.model.gpt import GPT
from gptlab.progress import Count, tell_nobody
from gptlab.rundir import write_atomically

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"

LLMC_HEADER = 256  # int32s
LLMC_MAGIC, LLMC_VERSION = 20240522, 1
LLMC_ROW = 65535  # what begins a row

Definition = Literal["tokens", "harness"]


# -- rows -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    ind: int
    ctx: str
    endings: tuple[str, str, str, str]
    label: int
    """Which ending is the right one, 0 to 3."""
    activity_label: str | None = None
    """This and the two parts of ctx are what the harness's definition is made of; some copies of the file lack them."""
    ctx_a: str | None = None
    ctx_b: str | None = None
    where: str = field(default="", compare=False)
    """File and line, for messages."""

    def __str__(self) -> str:
        return self.where or f"HellaSwag row {self.ind}"


def load_rows(path: str | Path) -> list[Row]:
    """The rows of hellaswag_val.jsonl, or of the same with gzip (.gz).

    Raises:
        DataError: the file is missing, damaged or empty, or a line of it is no row; the line is named.
    """
    path, rows, number = Path(path), [], 0
    try:
        with open_regular(path) as file:
            for number, line in enumerate(unpacked_lines(file), start=1):
                try:
                    if line.strip():
                        rows.append(_row(parse_json(line.decode("utf-8-sig")), f"{path}, line {number}"))
                except ValueError as error:  # UTF-8, JSON (without a line number of its own), and what _row says
                    says = getattr(error, "msg", error)
                    raise DataError(f"{path}, line {number} is not a HellaSwag row: {says}") from None
    except FileNotFoundError:
        raise DataError(f"there is no HellaSwag file {path}: hellaswag.path names hellaswag_val.jsonl") from None
    except DataError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read beyond line {number}: {because(error)}") from None
    if not rows:
        raise DataError(f"{path} has no rows")
    return rows


def _row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError("an object was expected")
    if missing := [key for key in ("ind", "ctx", "endings", "label") if key not in value]:
        raise ValueError(f"it has no {' and no '.join(missing)}")
    ind, ctx, endings, label = (value[key] for key in ("ind", "ctx", "endings", "label"))
    if type(ind) is not int or not 0 <= ind < 2**63:
        raise ValueError("ind must be a whole number")
    if not isinstance(ctx, str) or not ctx:
        raise ValueError("ctx must be a text")
    if not isinstance(endings, list) or len(endings) != 4 or not all(isinstance(ending, str) for ending in endings):
        raise ValueError("endings must be four texts")
    if type(label) not in (int, str) or str(label) not in ("0", "1", "2", "3"):  # the test split's labels are secret
        raise ValueError(f"label must be 0, 1, 2 or 3, not {label!r}")
    parts = [value.get(key) for key in ("activity_label", "ctx_a", "ctx_b")]
    if not all(part is None or isinstance(part, str) for part in parts):
        raise ValueError("activity_label, ctx_a and ctx_b must be texts")
    first, second, third, fourth = endings
    activity, ctx_a, ctx_b = parts
    return Row(ind, ctx, (first, second, third, fourth), int(label), activity, ctx_a, ctx_b, where)


def load_llmc(path: str | Path) -> list[tuple[int, int, list[NDArray[Any]]]]:
    """Index, label and GPT-2's ids of the context and the four endings, of each row of llm.c's hellaswag_val.bin.

    Raises:
        DataError: the file is missing or damaged, or another one.
    """
    try:
        content = read_bytes(Path(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {because(error)}") from None
    header = np.frombuffer(content[: 4 * LLMC_HEADER].ljust(4 * LLMC_HEADER, b"\0"), "<i4")
    if len(content) < 4 * LLMC_HEADER or (header[0], header[1]) != (LLMC_MAGIC, LLMC_VERSION):
        raise DataError(f"{path} is not llm.c's hellaswag_val.bin: its header is another")
    body = np.frombuffer(content[4 * LLMC_HEADER :], "<u2", (len(content) - 4 * LLMC_HEADER) // 2)
    rows, at = [], 0
    for number in range(int(header[2])):
        try:
            begins, _, ind, label, n_endings = (int(value) for value in body[at : at + 5])
            pieces, at = [], at + 5
            for _ in range(5):
                n = int(body[at])
                pieces.append(body[at + 1 : at + 1 + n])
                at += 1 + n
            if begins != LLMC_ROW or n_endings != 4 or label > 3 or at > len(body) or not all(map(len, pieces)):
                raise ValueError
            if max(int(ids.max()) for ids in pieces) >= Gpt2Tokenizer.vocab_size:
                raise ValueError
        except (IndexError, ValueError):
            raise DataError(f"{path} is damaged: its row {number} of {header[2]} is no row") from None
        rows.append((ind, label, pieces))
    if not rows:
        raise DataError(f"{path} has no rows")
    return rows


def download() -> Path:
    """The original hellaswag_val.jsonl, kept in the user's cache folder and checked by its sha256."""
    return fetch(URL, SHA256, "hellaswag_val.jsonl", "HellaSwag", "--hellaswag.path", DataError)


# -- tokens ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """Tokenised rows: four pairs of a context and an ending for each."""

    ind: NDArray[np.int64]  # (n,)
    label: NDArray[np.int64]  # (n,)
    lengths: NDArray[np.int64]  # (n, 4) what acc_norm divides by: tokens of an ending, or characters
    pairs: Pairs
    definition: Definition
    n_cut: int
    """Rows that were too long for block_size and were cut."""


def open_hellaswag(path: str, tokenizer: Tokenizer, block_size: int, definition: Definition = "tokens") -> Encoded:
    """Rows ready to be scored, from a path as the setting hellaswag.path gives it.

    Args:
        path: hellaswag_val.jsonl (or .gz), llm.c's .bin, or "download".
        block_size: the model's, in tokens.

    Raises:
        DataError: the file cannot be had or read, or does not fit the tokenizer or the definition.
    """
    if Path(path).suffix != ".bin":
        return encode_rows(load_rows(download() if path == "download" else path), tokenizer, block_size, definition)
    if definition == "harness":
        raise DataError(f"{path} has no text, which hellaswag.definition = harness needs: use hellaswag_val.jsonl")
    if tokenizer.identity() != Gpt2Tokenizer().identity():
        raise DataError(f"{path} holds GPT-2's ids, and this model's tokenizer is {tokenizer.name}")
    rows = load_llmc(path)
    which = [(ind, label) for ind, label, _ in rows]
    return _encoded(which, [pieces for *_, pieces in rows], block_size, [f"{path}, row {ind}" for ind, _ in which])


def encode_rows(
    rows: Sequence[Row], tokenizer: Tokenizer, block_size: int, definition: Definition = "tokens"
) -> Encoded:
    """Tokenise rows for one of the two definitions.

    A row longer than block_size tokens loses the beginning of its context. By the tokens' definition it loses as much
    as its longest ending demands, so that all four endings follow the same text; by the harness's each ending has a
    context as long as fits. Where an ending alone leaves no room, it loses its end and the context keeps one token.

    Args:
        block_size: the model's, in tokens; at least 2.

    Raises:
        DataError: a text of which the tokenizer leaves nothing, a block_size of 1, or a row without what the
            harness's definition is made of.
        DataError: a text that the tokenizer has no ids for.
    """
    assert rows, "load_rows gives at least one"
    which = [(row.ind, row.label) for row in rows]
    if definition == "harness":
        return _encode_harness(rows, tokenizer, block_size)
    texts = [text for row in rows for text in (row.ctx, *(" " + ending for ending in row.endings))]
    ids = encode_named(tokenizer, texts, lambda i: str(rows[i // 5]))
    return _encoded(which, [ids[5 * i : 5 * i + 5] for i in range(len(rows))], block_size, [str(row) for row in rows])


def _encoded(
    which: Sequence[tuple[int, int]],
    pieces: Sequence[Sequence[NDArray[Any]]],
    block_size: int,
    where: Sequence[str],
) -> Encoded:
    """From index and label of each row, the ids of its context and of its four endings, and its place for messages."""
    _check_block(block_size)
    pairs: list[tuple[Ids, Ids]] = []
    n_cut = 0
    for place, (context, *endings) in zip(where, pieces, strict=True):
        if not all(len(piece) for piece in (context, *endings)):
            raise DataError(f"{place}: its context or an ending has no tokens")
        longest = max(len(ending) for ending in endings)
        n_cut += len(context) + longest > block_size
        context = context[-max(1, block_size - longest) :]
        pairs += [(context, ending[: block_size - 1]) for ending in endings]
    ind, label = np.array(which, np.int64).T
    laid = lay_out(pairs, block_size)
    return Encoded(ind, label, laid.lengths.reshape(-1, 4), laid, "tokens", n_cut)


def _encode_harness(rows: Sequence[Row], tokenizer: Tokenizer, block_size: int) -> Encoded:
    _check_block(block_size)
    texts: list[tuple[str, str]] = []
    for row in rows:
        if row.activity_label is None or row.ctx_a is None or row.ctx_b is None:
            raise DataError(
                f"{row} lacks activity_label, ctx_a or ctx_b, which hellaswag.definition = harness "
                "puts together: use the original hellaswag_val.jsonl"
            )
        query = _without_brackets(f"{row.activity_label}: {row.ctx_a} {row.ctx_b.capitalize()}")
        texts += [(query, " " + _without_brackets(ending)) for ending in row.endings]
    pairs = encode_pairs(tokenizer, texts, lambda i: str(rows[i // 4]))
    too_long = [len(context) + len(ending) > block_size + 1 for context, ending in pairs]
    return Encoded(
        ind=np.array([row.ind for row in rows]),
        label=np.array([row.label for row in rows]),
        lengths=np.array([len(ending) - 1 for _, ending in texts]).reshape(-1, 4),
        pairs=lay_out([(context, ending[:block_size]) for context, ending in pairs], block_size),
        definition="harness",
        n_cut=int(np.reshape(too_long, (-1, 4)).any(axis=1).sum()),
    )


def _check_block(block_size: int) -> None:
    if block_size < 2:
        raise DataError("model.block_size = 1: HellaSwag needs room for a token of context and one of an ending")


def _without_brackets(text: str) -> str:
    """WikiHow's marks taken out of a text, in the order and with the leftovers of lm-eval's task."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


# -- scores ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HellaSwagResult:
    """Losses of every ending, and the accuracies that follow from them.

    Of equal losses the first ending is picked; a row with a loss that is not finite has no pick (-1) and is wrong.
    """

    ind: NDArray[np.int64]  # (n,)
    label: NDArray[np.int64]  # (n,)
    losses: NDArray[np.float64]  # (n, 4) nats, summed over the tokens of an ending
    lengths: NDArray[np.int64]  # (n, 4) tokens of an ending, or by the harness's definition its characters
    definition: Definition = "tokens"

    @property
    def n(self) -> int:
        return len(self.label)

    @property
    def pick(self) -> NDArray[np.int64]:
        """The endings with the lowest summed loss, (n,)."""
        return _lowest(self.losses, self.losses)

    @property
    def pick_norm(self) -> NDArray[np.int64]:
        """The endings with the lowest mean loss a token (or a character), (n,)."""
        return _lowest(self.losses, self.losses / np.maximum(self.lengths, 1e-9))  # nothing is never picked

    @property
    def acc(self) -> float:
        return float((self.pick == self.label).mean())

    @property
    def acc_norm(self) -> float:
        return float((self.pick_norm == self.label).mean())

    def scores(self) -> dict[str, float]:
        """The two accuracies under their names in metrics.jsonl."""
        name = "hellaswag" if self.definition == "tokens" else "hellaswag_harness"
        return {f"{name}_acc": self.acc, f"{name}_acc_norm": self.acc_norm}


def _lowest(losses: NDArray[np.float64], means: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.where(np.isfinite(losses).all(axis=1), means.argmin(axis=1), -1)


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


def evaluate_hellaswag(
    model: GPT,
    encoded: Encoded,
    device: torch.device,
    context: Callable[[], AbstractContextManager[object]],
    micro_batch: int,
    before_batch: Count = tell_nobody,
    world: World = SINGLE,
) -> HellaSwagResult:
    """The losses of all endings of all rows; arguments as for `likelihoods`."""
    measured = likelihoods(model, encoded.pairs, device, context, micro_batch, before_batch, world)
    losses = measured.losses.reshape(-1, 4)
    return HellaSwagResult(encoded.ind, encoded.label, losses, encoded.lengths, encoded.definition)


def write_results(path: Path, result: HellaSwagResult) -> None:
    """hellaswag_results.jsonl: a line per row, null for a loss that is not finite and for a row without a pick."""
    lines = []
    for ind, label, losses, lengths, pick, pick_norm in zip(
        result.ind, result.label, result.losses, result.lengths, result.pick, result.pick_norm, strict=True
    ):
        line = {
            "ind": int(ind),
            "label": int(label),
            "losses": [float(loss) if math.isfinite(loss) else None for loss in losses],
            "lengths": lengths.tolist(),
            "pick": int(pick) if pick >= 0 else None,
            "pick_norm": int(pick_norm) if pick_norm >= 0 else None,
        }
        lines.append(json.dumps(line, allow_nan=False) + "\n")
    write_atomically(path, "".join(lines))
