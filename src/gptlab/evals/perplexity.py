"""Perplexity of WikiText-2 and LAMBADA from local files, by the definitions of lm-eval's tasks (version 0.4)."""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from gptlab.data.corpora import read_text
from gptlab.data.tokenizers import Tokenizer
from gptlab.errors import UserError
from gptlab.evals.likelihood import encode_pairs, lay_out, likelihoods, rolling_pairs
from gptlab.model.gpt import GPT

Context = Callable[[], AbstractContextManager[object]]


class PerplexityError(UserError):
    """A file that is not what is to be measured."""


def wikitext_perplexity(
    model: GPT, tokenizer: Tokenizer, pages: Sequence[str], device: torch.device, context: Context, micro_batch: int
) -> dict[str, float]:
    """WikiText-2 (Merity et al. 2016, arXiv 1609.07843), an article at a time, spaces put back to where text has them.

    Words are those between white space in the file, bytes the file's too, so that no tokenizer and no detokenizer
    changes what is divided by.

    Returns:
        wikitext_word_perplexity, wikitext_byte_perplexity, wikitext_bits_per_byte, and the number of articles.
    """
    pairs = [pair for page in pages for pair in rolling_pairs(tokenizer, detokenize(page), model.config.block_size)]
    measured = likelihoods(model, lay_out(pairs, model.config.block_size), device, context, micro_batch)
    assert measured is not None
    loss = float(measured.losses.sum())
    n_words = sum(len(re.split(r"\s+", page)) for page in pages)
    n_bytes = sum(len(page.encode()) for page in pages)
    return {
        "wikitext_word_perplexity": _exp(loss / n_words),
        "wikitext_byte_perplexity": _exp(loss / n_bytes),
        "wikitext_bits_per_byte": loss / n_bytes / math.log(2),
        "wikitext_pages": len(pages),
    }


def lambada_perplexity(
    model: GPT, tokenizer: Tokenizer, texts: Sequence[str], device: torch.device, context: Context, micro_batch: int
) -> dict[str, float]:
    """LAMBADA (Paperno et al. 2016, arXiv 1606.06031): the last word of each passage, given all before it.

    Returns:
        lambada_perplexity of a last word, lambada_byte_perplexity (the word's bytes and its space), lambada_acc (the
        share of words of which each token was the likeliest), and the number of passages.
    """
    words = [tuple(text.rpartition(" ")[::2]) for text in texts]
    cut = [(before, " " + word) for before, word in words]
    pairs = lay_out(encode_pairs(tokenizer, cut), model.config.block_size)
    measured = likelihoods(model, pairs, device, context, micro_batch)
    assert measured is not None
    loss, n_bytes = float(measured.losses.sum()), sum(len(word.encode()) for _, word in cut)
    return {
        "lambada_perplexity": _exp(loss / len(texts)),
        "lambada_byte_perplexity": _exp(loss / n_bytes),
        "lambada_acc": float(measured.greedy.mean()),
        "lambada_passages": len(texts),
    }


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))


# -- files ----------------------------------------------------------------------------------------------------------


def load_wikitext(path: str) -> list[str]:
    """The articles of wiki.test.raw or wiki.test.tokens, or of the same with gzip (.gz); a title is " = Title = "."""
    pages: list[list[str]] = [[]]
    for line in _read(path).split("\n"):
        text = line.strip()
        if re.match(r"= (?!= )", text) and re.search(r"(?<!=) =$", text):
            pages.append([])
        pages[-1].append(line)
    joined = ["\n".join(page) for page in pages]
    if not (found := [page for page in joined if page.strip()]):
        raise PerplexityError(f"{path} has no text")
    return found


def load_lambada(path: str) -> list[str]:
    """The passages of OpenAI's lambada_test.jsonl: lines of {"text": ...}; .gz is read too."""
    texts = []
    for number, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
            context, _, word = text.rpartition(" ")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise PerplexityError(f'{path}, line {number} is not a passage: {{"text": ...}} was expected') from None
        if not context.strip() or not word:
            raise PerplexityError(f"{path}, line {number}: a passage has a last word and words before it")
        texts.append(text)
    if not texts:
        raise PerplexityError(f"{path} has no passages")
    return texts


def _read(path: str) -> str:
    try:
        return read_text(Path(path))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise PerplexityError(f"{path} cannot be read: {error}") from None


# What WikiText's tokenizer did, undone in this order (that of lm-eval's task, whose numbers depend on it).
_JOINED = [
    ("s '", "s'"),
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    (" : ", ": "),
    (" ; ", "; "),
    (" . ", ". "),
    (" ! ", "! "),
    (" ? ", "? "),
    (" , ", ", "),
]
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
    """A page of WikiText with punctuation, brackets and quotes set as in running text."""
    for old, new in _JOINED:
        page = page.replace(old, new)
    for left, right in _ENCLOSED:
        page = re.sub(rf"({left})\s*([^{right}]*?)\s*({right})", r"\1\2\3", page)
    for old, new in _REST:
        page = page.replace(old, new)
    return page
