"""Corpora of text. Opening one makes a `Corpus`; its documents are read later."""

from __future__ import annotations

import math
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gptlab.data.corpora import files
from gptlab.data.corpora.base import Corpus, Reading, Wanted, share_out
from gptlab.data.download import fetch
from gptlab.data.tokenizers import valid_text
from gptlab.errors import DataError

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

# Hub id, configuration, and number of documents, from which the time left is estimated.
HUB = {
    "openwebtext": ("Skylion007/openwebtext", None, 8_013_769),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT", 9_672_101),
}
OPENWEBTEXT_VAL_FRACTION = 0.0005  # nanoGPT's test_size
OPENWEBTEXT_WHOLE = 10**10  # bytes from which a local copy counts as the whole corpus
FINEWEB_EDU_VAL_TOKENS = 100_000_000  # build-nanogpt's first shard
FINEWEB_EDU_SMALL = 10**9  # bytes of a local excerpt below which it is split as `text`: those tokens may be all of it

# Tests are left out: long tables of cases teach a model little. pydoc_data is read as documentation instead.
STDLIB_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}


def open_stdlib(wanted: Wanted) -> Corpus:
    """Source and documentation of the Python that runs this."""
    if wanted.source is not None:
        raise DataError("the corpus stdlib is the Python that runs it: for other files use `prepare text --from PATH`")
    return Corpus(wanted.name, {"python": platform.python_version()}, stdlib_files)


def stdlib_files() -> Iterator[tuple[str, str]]:
    """(name, text) of every module of the standard library but tests, then of the topics of `help()`; in order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        name = path.relative_to(root).as_posix()
        if STDLIB_SKIPPED.isdisjoint(name.split("/")) and not path.name.startswith("_sysconfigdata"):
            try:
                yield name, path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue  # a few old modules are Latin-1
    try:
        from pydoc_data.topics import topics  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return  # some distributions leave it out
    for name in sorted(topics):
        yield f"pydoc_data/topics/{name}", topics[name]


def open_shakespeare(wanted: Wanted) -> Corpus:
    """The 1.1 MB of char-rnn and nanoGPT, downloaded once."""
    if wanted.source is not None:
        return open_files(wanted)

    def documents() -> Iterator[tuple[str, str]]:
        file = fetch(SHAKESPEARE_URL, SHAKESPEARE_SHA256, "tinyshakespeare.txt", "Shakespeare", "--from", DataError)
        yield "", files.read_text(file)

    return Corpus(wanted.name, {"url": SHAKESPEARE_URL, "sha256": SHAKESPEARE_SHA256}, documents)


def open_files(wanted: Wanted, suffixes: tuple[str, ...] = files.SUFFIXES) -> Corpus:
    """A file, or every readable file of a folder in order of its path. In a part, documents are named by file and row.

    Raises:
        DataError: no source, or a folder without a readable file.
    """
    source = wanted.source
    if source is None:
        raise DataError(f"the corpus {wanted.name} is read from --from: name a file or folder")
    root = source.parent if source.is_file() else source
    found = [source] if source.is_file() else list(files.files_in(source, suffixes).values())
    if not found:
        raise DataError(f"{source} has no text: no file in it ends in {', '.join(suffixes)}")
    chosen = share_out(found, wanted.part, str(source))
    reading = Reading(total=sum(path.stat().st_size for path in chosen))

    def documents() -> Iterator[tuple[str, str]]:
        reading.done = 0
        for path, number, where, content in files.read_rows(chosen, reading, wanted.text_field):
            name = f"{path.relative_to(root).as_posix()}/{number}" if wanted.part else ""
            yield name, files.text_of(content, wanted.text_field, where)

    return Corpus(wanted.name, files.identity_of(source, root, found), documents, part=wanted.part, reading=reading)


# -- the Hugging Face hub -------------------------------------------------------------------------------------------


def open_openwebtext(wanted: Wanted) -> Corpus:
    """OpenWebText, split as nanoGPT splits it if it is whole."""
    corpus = replace(_open_hub(wanted), val_fraction=OPENWEBTEXT_VAL_FRACTION)
    if wanted.part is None and corpus.source.get("bytes", OPENWEBTEXT_WHOLE) >= OPENWEBTEXT_WHOLE:
        corpus = replace(corpus, held_out=partial(nanogpt_held_out, HUB[wanted.name][2]))
    return corpus


def open_fineweb_edu(wanted: Wanted) -> Corpus:
    """FineWeb-Edu's sample of 10 billion tokens; the first 100 million are held out unless it is a small excerpt."""
    corpus = _open_hub(wanted)
    large = corpus.source.get("bytes", FINEWEB_EDU_SMALL) >= FINEWEB_EDU_SMALL
    return replace(corpus, val_tokens=FINEWEB_EDU_VAL_TOKENS if large else 0)


def nanogpt_held_out(documents: int, fraction: float = OPENWEBTEXT_VAL_FRACTION, seed: int = 2357) -> frozenset[int]:
    """Positions of the documents that nanoGPT holds out of OpenWebText (data/openwebtext/prepare.py).

    nanoGPT calls `train_test_split` of Hugging Face datasets, which takes the beginning of a permutation of numpy's.
    """
    permutation = np.random.default_rng(seed).permutation(documents)
    return frozenset(permutation[: math.ceil(fraction * documents)].tolist())


def _open_hub(wanted: Wanted) -> Corpus:
    """Streamed from the hub, or a local copy: a folder of `save_to_disk`, a copy of the repository, or a file."""
    name, source, part = wanted.name, wanted.source, wanted.part
    hub, configuration, total = HUB[name]
    if source is not None and not any((source / file).is_file() for file in ("state.json", "dataset_dict.json")):
        sample = source / "sample" / "10BT"  # in a copy of FineWeb-Edu's repository
        if name == "fineweb-edu" and sample.is_dir():
            source = sample
        suffixes = (".parquet",) if source.is_dir() and any(source.rglob("*.parquet")) else files.SUFFIXES
        return open_files(replace(wanted, source=source), suffixes)
    if source is not None and part:
        raise DataError(f"{source} was written by save_to_disk and cannot be read in parts: give parquet files")
    identity: dict[str, Any] = {"hub": hub, "configuration": configuration}
    if source is not None:
        identity = files.identity_of(source, source, [path for path in source.rglob("*.*") if path.is_file()])
    reading = Reading()

    def documents() -> Iterator[tuple[str, str]]:
        with files.hub_errors(hub, source):
            import datasets

            if source is not None:
                stored = datasets.load_from_disk(str(source))
                rows = stored["train"] if isinstance(stored, datasets.DatasetDict) else stored
                reading.total = len(rows)
            else:
                from pyarrow.dataset import ParquetFragmentScanOptions

                # By default the row groups of a file are fetched ahead and kept: gigabytes.
                scan = ParquetFragmentScanOptions(pre_buffer=False, use_buffered_stream=True, buffer_size=2**20)
                settings = {"streaming": True, "fragment_scan_options": scan, "batch_size": 1024}
                rows = datasets.load_dataset(hub, configuration, split="train", **settings)
                reading.total = total
            if rows.column_names is not None:
                if wanted.text_field not in rows.column_names:
                    columns = ", ".join(rows.column_names)
                    raise DataError(f"{name} has no field '{wanted.text_field}', only {columns}: see --text-field")
                rows = rows.select_columns([wanted.text_field])
            reading.done = 0
            named = (("", row) for row in rows)
            if part is not None:
                shards = rows.n_shards
                mine = share_out(list(range(shards)), part, hub)
                reading.total = total * len(mine) / shards
                each = ((file, enumerate(rows.shard(num_shards=shards, index=file))) for file in mine)
                named = ((f"{file}/{index}", row) for file, numbered in each for index, row in numbered)
            for name_of_row, row in named:
                reading.done += 1
                yield name_of_row, valid_text(row[wanted.text_field] or "")

    return Corpus(name, identity, documents, part=part, reading=reading)
