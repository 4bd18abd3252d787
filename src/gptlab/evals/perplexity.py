"""Perplexity on WikiText-2 and LAMBADA from local files, as lm-eval's tasks define it (version 0.4)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import torch

from gptlab.data.corpora.files import read_text
from gptlab.data.tokenizers import Tokenizer, valid_text
from gptlab.errors import DataError
from gptlab.evals.likelihood import encode_pairs, lay_out, likelihoods, rolling_pairs
from gptlab.files import because, parse_json
from gptlab.model.gpt import GPT
from gptlab.progress import Count, tell_nobody

Context = Callable[[], AbstractContextManager[object]]


class Passage(NamedTuple):
    """A text of a file."""

    text: str
    where: str
    """File and line, for messages."""


def wikitext_perplexity(
    model: GPT,
    tokenizer: Tokenizer,
    pages: Sequence[Passage],
    device: torch.device,
    context: Context,
    micro_batch: int,
    before_batch: Count = tell_nobody,
) -> dict[str, float]:
    """Perplexity on WikiText-2 (Merity et al. 2016, arXiv 1609.07843), article by article, after `detokenize`.

    Words (separated by white space) and bytes are counted in the file, so they depend neither on the tokenizer nor on
    the detokenizer.

    Returns:
        wikitext_word_perplexity, wikitext_byte_perplexity, wikitext_bits_per_byte, and the number of articles.

    Raises:
        DataError: text that the tokenizer has no ids for, or of which it leaves nothing at all.
    """
    block_size = model.config.block_size
    pairs = [pair for text, where in pages for pair in rolling_pairs(tokenizer, detokenize(text), block_size, where)]
    if not pairs:
        raise DataError(f"{pages[0].where}: the tokenizer {tokenizer.name} has no token for this text nor what follows")
    measured = likelihoods(model, lay_out(pairs, block_size), device, context, micro_batch, before_batch)
    loss = float(measured.losses.sum())
    n_words = sum(len(re.split(r"\s+", page.text)) for page in pages)
    n_bytes = sum(len(page.text.encode()) for page in pages)
    return {
        "wikitext_word_perplexity": _exp(loss / n_words),
        "wikitext_byte_perplexity": _exp(loss / n_bytes),
        "wikitext_bits_per_byte": loss / n_bytes / math.log(2),
        "wikitext_pages": len(pages),
    }


def lambada_perplexity(
    model: GPT,
    tokenizer: Tokenizer,
    passages: Sequence[Passage],
    device: torch.device,
    context: Context,
    micro_batch: int,
    before_batch: Count = tell_nobody,
) -> dict[str, float]:
    """LAMBADA (Paperno et al. 2016, arXiv 1606.06031): the last word of each passage, given the words before it.

    A passage longer than the model's context loses its beginning.

    Returns:
        lambada_perplexity (per last word), lambada_byte_perplexity (per byte of the word and its leading space),
        lambada_acc (share of the words that greedy decoding gives), and the number of passages.

    Raises:
        DataError: a passage that the tokenizer has no ids for, or whose last word has none, or more than block_size.
    """
    block_size = model.config.block_size
    words = [passage.text.rpartition(" ")[::2] for passage in passages]
    cut = [(before, " " + word) for before, word in words]
    pairs = encode_pairs(tokenizer, cut, lambda i: passages[i].where)
    for passage, (_, word) in zip(passages, pairs, strict=True):
        if len(word) > block_size:
            raise DataError(
                f"{passage.where}: the last word has {len(word)} tokens, more than model.block_size = {block_size}"
            )
    measured = likelihoods(model, lay_out(pairs, block_size), device, context, micro_batch, before_batch)
    loss, n_bytes = float(measured.losses.sum()), sum(len(word.encode()) for _, word in cut)
    return {
        "lambada_perplexity": _exp(loss / len(passages)),
        "lambada_byte_perplexity": _exp(loss / n_bytes),
        "lambada_acc": float(measured.greedy.mean()),
        "lambada_passages": len(passages),
    }


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))


# -- files ----------------------------------------------------------------------------------------------------------


def load_wikitext(path: str) -> list[Passage]:
    """The articles in wiki.test.raw or wiki.test.tokens, also gzipped (.gz). A line " = Title = " starts an article."""
    pages: list[tuple[int, list[str]]] = [(1, [])]
    for number, line in enumerate(_read(path).split("\n"), 1):
        text = line.strip()
        if re.match(r"= (?!= )", text) and re.search(r"(?<!=) =$", text):
            pages.append((number, []))
        pages[-1][1].append(line)
    joined = [Passage("\n".join(lines), f"{path}, the article at line {number}") for number, lines in pages]
    if not (found := [page for page in joined if page.text.strip()]):
        raise DataError(f"{path} has no text")
    return found


def load_lambada(path: str) -> list[Passage]:
    """The passages in OpenAI's lambada_test.jsonl, also gzipped (.gz): one {"text": ...} per line."""
    passages = []
    for number, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            text = valid_text(parse_json(line)["text"])
            context, _, word = text.rpartition(" ")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError(f'{path}, line {number}: expected a passage {{"text": ...}}') from None
        if not context.strip() or not word:
            raise DataError(f"{path}, line {number}: a passage needs at least two words")
        passages.append(Passage(text, f"{path}, line {number}"))
    if not passages:
        raise DataError(f"{path} has no passages")
    return passages


def _read(path: str) -> str:
    try:
        return read_text(Path(path))
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a NUL in the path
        raise DataError(f"{path} cannot be read: {because(error)}") from None


# Replacements that undo WikiText's tokenization, in the order of lm-eval's task. The order changes the scores.
_JOINED = [("s '", "s'")]
_JOINED += [(f" @{mark}@ ", mark) for mark in "-,."]
_JOINED += [(f" {mark} ", f"{mark} ") for mark in ":;.!?,"]
_ENCLOSED = [(r"\(", r"\)"), (r"\[", r"\]"), ("{", "}"), ('"', '"'), ("'", "'")]
_REST = [
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
]


def detokenize(page: str) -> str:
    """A page of WikiText with the spaces around punctuation, brackets and quotes as in normal text."""
    for old, new in _JOINED:
        page = page.replace(old, new)
    for left, right in _ENCLOSED:
        page = re.sub(rf"({left})\s*([^{right}]*?)\s*({right})", r"\1\2\3", page)
    for old, new in _REST:
        page = page.replace(old, new)
    return page
