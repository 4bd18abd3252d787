"""The table of corpora.

A corpus is a function of `Wanted` that returns a `Corpus` (text) or a `LabeledCorpus` (text with labels), and a line
in one of the two tables. It yields the same documents in the same order each time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from gptlab.data.corpora import constructs, labeled, text
from gptlab.data.corpora.base import AnyCorpus, Corpus, LabeledCorpus, Part, Wanted
from gptlab.errors import DataError

TEXT: dict[str, Callable[[Wanted], Corpus]] = {
    "stdlib": text.open_stdlib,
    "shakespeare": text.open_shakespeare,
    "openwebtext": text.Hub(
        "Skylion007/openwebtext",
        documents=8_013_769,
        whole=10**10,
        val_fraction=text.OPENWEBTEXT_VAL_FRACTION,
        held_out=text.nanogpt_held_out,
    ).open,
    "fineweb-edu": text.Hub(
        "HuggingFaceFW/fineweb-edu",
        "sample-10BT",
        folder="sample/10BT",
        documents=9_672_101,
        whole=10**9,
        val_tokens=100_000_000,  # build-nanogpt's first shard
    ).open,
    "text": text.open_files,  # files and folders of the kinds in kinds.SUFFIXES
}
LABELED: dict[str, Callable[[Wanted], LabeledCorpus]] = {
    "eurlex57k": labeled.EURLEX57K.open,  # 57,000 EU acts, EuroVoc concepts (Chalkidis et al. 2019, arXiv 1906.02192)
    "agnews": labeled.AGNEWS.open,  # news in 4 classes (Zhang et al. 2015)
    "imdb": labeled.open_imdb,  # film reviews, positive or negative (Maas et al. 2011)
    "constructs": constructs.open_constructs,  # functions of Python's library with the syntax in them; no download
    "text": labeled.Table().open,  # files and folders with --label-field: .json, .jsonl (also as .gz), .parquet
}


def open_corpus(
    name: str,
    source: Path | None = None,
    text_field: str = "text",
    val_fraction: float | None = None,
    val_tokens: int | None = None,
    part: Part | None = None,
    label_field: str | None = None,
    strict: bool = False,
) -> AnyCorpus:
    """A corpus by name.

    Args:
        name: a name in TEXT or LABELED; `label_field` makes `text` a labelled corpus.
        val_fraction, val_tokens: how much to hold out, instead of the corpus's own rule.
        part: one part of the documents. In a part of a text corpus, a document is named by its file and row, and a
            hash of the name says whether it is held out, so that this does not depend on the number of parts.
        strict: refuse a file that cannot be read, and a row without text, instead of leaving them out.

    Raises:
        DataError: an unknown corpus, settings that exclude each other, or a source that is missing or empty.
    """
    wanted = Wanted(name, source, text_field, label_field, part, strict)
    if label_field is not None or (name not in TEXT and name in LABELED):
        if name not in LABELED:
            names = ", ".join(name for name in LABELED if name != "text")
            raise DataError(
                f"no labelled corpus '{name}': use {names} or the path of a file or folder with --label-field"
            )
        if val_fraction is not None and not 0 < val_fraction <= 0.5:
            raise DataError(f"val_fraction = {val_fraction}: must be more than 0 and at most 0.5")
        labelled = replace(LABELED[name](wanted), val_fraction=val_fraction, part=part)
        labelled.reading.strict = strict
        return labelled
    if name not in TEXT:
        raise DataError(f"no corpus '{name}': use {', '.join(TEXT | LABELED)} or the path of a file or folder")
    if val_fraction is not None and val_tokens is not None:
        raise DataError("val_fraction and val_tokens are both set: hold out a share of documents or the first tokens")
    if val_fraction is not None and not 0 <= val_fraction <= 0.5:
        raise DataError(f"val_fraction = {val_fraction}: must be at least 0 and at most 0.5")
    if val_tokens is not None and val_tokens < 0:
        raise DataError(f"val_tokens = {val_tokens}: must be at least 0")
    if source is not None and not source.exists():
        raise DataError(f"{source} does not exist: --from names a file or folder to read")
    corpus = TEXT[name](wanted)
    if corpus.part != part:
        raise DataError(f"the corpus {name} has no files to share out: prepare it without --part")
    if val_fraction is not None or val_tokens is not None:
        corpus = replace(corpus, val_fraction=val_fraction, val_tokens=val_tokens or 0, held_out=None)
    return corpus
