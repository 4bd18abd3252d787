"""Corpora: where documents come from, and which of them are held out for validation.

    stdlib        source and documentation of the Python that runs this; nothing is downloaded
    shakespeare   the 1.1 MB of char-rnn and nanoGPT
    openwebtext   through the Hugging Face hub, or a local copy
    fineweb-edu   the sample of 10 billion tokens, likewise
    text          files and folders: .txt, .md, .json, .jsonl (these also as .gz), .parquet

A corpus gives the same documents in the same order every time it is asked; restarting a preparation relies on it.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import itertools
import json
import math
import platform
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gptlab.data.download import fetch
from gptlab.data.shards import file_sha256
from gptlab.data.tokenizers import valid_text
from gptlab.errors import DataError

NAMES = ("stdlib", "shakespeare", "openwebtext", "fineweb-edu", "text")

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

# Hub id, configuration, and the number of documents, from which the time left is told.
HUB = {
    "openwebtext": ("Skylion007/openwebtext", None, 8_013_769),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT", 9_672_101),
}
OPENWEBTEXT_VAL_FRACTION = 0.0005  # nanoGPT's test_size
OPENWEBTEXT_WHOLE = 10**10  # bytes from which a local copy is taken for all of it
FINEWEB_EDU_VAL_TOKENS = 100_000_000  # build-nanogpt's first shard
FINEWEB_EDU_SMALL = 10**9  # bytes of a local excerpt below which those tokens could be all of it: split as `text`
DEFAULT_VAL_FRACTION = 0.05
ONE_DOCUMENT_VAL_FRACTION = 0.1  # nanoGPT's for Shakespeare

# Tests are left out: long tables of cases teach a model little. pydoc_data is read as documentation instead.
STDLIB_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}

SUFFIXES = (".txt", ".md", ".json", ".jsonl", ".parquet", ".txt.gz", ".md.gz", ".json.gz", ".jsonl.gz")


Part = tuple[int, int]  # number of a part, from 1, and how many there are


@dataclass
class Reading:
    """How much of its source a corpus has read, in bytes of files or in documents; a total of 0 is not known."""

    total: float = 0
    done: float = 0

    @property
    def share(self) -> float | None:
        return min(self.done / self.total, 1.0) if self.total else None


@dataclass(frozen=True)
class Corpus:
    """Documents, and the rule that splits them.

    Attributes:
        source: what identifies the text, for the manifest: path or url or hub id, and sha256 or sizes.
        documents: makes an iterator of (name, text), empty texts included; a name is "" where only the position of a
            document identifies it.
        val_fraction: share of the documents (of the characters, where there is one document) that is held out.
        val_tokens: instead, the tokens at the beginning that are held out; 0 is none.
        held_out: instead, makes the set of the positions of the documents that are held out; for the whole corpus.
        part: which of several parts the documents are, where they are not all.
        reading: how far the newest of the iterators is.
    """

    name: str
    source: dict[str, Any]
    documents: Callable[[], Iterator[tuple[str, str]]]
    val_fraction: float | None = None
    val_tokens: int = 0
    held_out: Callable[[], frozenset[int]] | None = None
    part: Part | None = None
    reading: Reading = field(default_factory=Reading)

    def texts(self, max_documents: int | None = None) -> Iterator[str]:
        """Every document whole, whatever its split."""
        return (text for _, text in itertools.islice(self.documents(), max_documents) if text)

    def split(self, max_documents: int | None = None) -> Iterator[tuple[str, str]]:
        """(split, text) of each document in order, empty ones left out; split is "train" or "val".

        - `held_out` is a list of positions, empty documents counted.
        - The first `val_tokens` tokens are val: then every document comes as "train" and the writer of tokens cuts.
        - One document is cut in two by position, the end of it is val.
        - Named documents are val when a hash of their name says so, so they stay where they are in another version.
        - Of every 1 / val_fraction others one is val, by a hash of its position; of fewer than that also one.

        Raises:
            DataError: the corpus has no documents.
        """
        if self.held_out and max_documents is None:
            chosen = self.held_out()
            for index, (_, text) in enumerate(self.documents()):
                if text:
                    yield "val" if index in chosen else "train", text
            return
        texts = ((name, text) for name, text in itertools.islice(self.documents(), max_documents) if text)
        head = list(itertools.islice(texts, 2))
        if not head:
            raise DataError(f"the corpus {self.name} has no documents: {_where(self.source)} holds no text")
        if self.val_tokens:
            for _, text in itertools.chain(head, texts):
                yield "train", text
        elif len(head) == 1 and self.part is None:
            text = head[0][1]
            fraction = ONE_DOCUMENT_VAL_FRACTION if self.val_fraction is None else self.val_fraction
            cut = int((1 - fraction) * len(text))
            yield from ((split, part) for split, part in (("train", text[:cut]), ("val", text[cut:])) if part)
        else:
            yield from self._split_many(itertools.chain(head, texts))

    def _split_many(self, texts: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
        fraction = DEFAULT_VAL_FRACTION if self.val_fraction is None else self.val_fraction
        if fraction == 0:
            yield from (("train", text) for _, text in texts)
            return
        size = max(2, round(1 / fraction))  # documents of which one is held out
        for block in itertools.count():
            # The first block is read before it is split, as the corpus may end within it.
            group = list(itertools.islice(texts, size)) if block == 0 else itertools.islice(texts, size)
            held_out = int(fraction_of(f"document {block}") * (len(group) if isinstance(group, list) else size))
            empty = True
            for index, (name, text) in enumerate(group):
                empty = False
                is_val = fraction_of(name) < fraction if name else index == held_out
                yield "val" if is_val else "train", text
            if empty:
                return


def fraction_of(name: str) -> float:
    """A number in [0, 1) that depends on a name and nothing else."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") / 2**64


def nanogpt_held_out(documents: int, fraction: float = OPENWEBTEXT_VAL_FRACTION, seed: int = 2357) -> frozenset[int]:
    """Positions of the documents that nanoGPT holds out of OpenWebText (data/openwebtext/prepare.py).

    It calls `train_test_split` of Hugging Face datasets, which takes the beginning of a permutation of numpy's.
    """
    permutation = np.random.default_rng(seed).permutation(documents)
    return frozenset(permutation[: math.ceil(fraction * documents)].tolist())


def share_out(items: list[Any], part: Part | None, what: str) -> list[Any]:
    """The run of items that is a part's: parts one after another are all of them, in order.

    Raises:
        DataError: fewer items than parts.
    """
    if part is None:
        return items
    number, parts = part
    if len(items) < parts:
        raise DataError(f"{what} has {len(items)} files and a part is whole files: use at most {len(items)} parts")
    return items[(number - 1) * len(items) // parts : number * len(items) // parts]


def _where(source: dict[str, Any]) -> str:
    return str(source.get("path") or source.get("url") or source.get("hub") or "it")


def open_corpus(
    name: str,
    source: Path | None = None,
    text_field: str = "text",
    val_fraction: float | None = None,
    val_tokens: int | None = None,
    part: Part | None = None,
) -> Corpus:
    """A corpus by name.

    Args:
        name: one of NAMES.
        source: a local file or folder; needed for `text`, instead of the download for the others.
        text_field: field or column of JSON and parquet files that holds the text.
        val_fraction, val_tokens: how much is held out, instead of the corpus's own rule; one of the two.
        part: only this part of the files. Then the name of a document is its file and row, and a hash of it rules
            whether it is held out, so that this does not depend on the number of parts.

    Raises:
        DataError: an unknown corpus, or a source that is missing or has nothing to read.
    """
    if name not in NAMES:
        raise DataError(f"no corpus '{name}': use {', '.join(NAMES)} or the path of a file or folder")
    if val_fraction is not None and val_tokens is not None:
        raise DataError("val_fraction and val_tokens are both set: hold out a share of documents or the first tokens")
    if val_fraction is not None and not 0 <= val_fraction <= 0.5:
        raise DataError(f"val_fraction = {val_fraction}: must be at least 0 and at most 0.5")
    if val_tokens is not None and val_tokens < 0:
        raise DataError(f"val_tokens = {val_tokens}: must be at least 0")
    if source is not None and not source.exists():
        raise DataError(f"{source} does not exist: --from names a file or folder to read")
    identity: dict[str, Any]
    reading = Reading()
    held_out: Callable[[], frozenset[int]] | None = None
    if part and (name == "stdlib" or (name == "shakespeare" and source is None)):
        raise DataError(f"the corpus {name} has no files to share out: prepare it without --part")
    if name == "stdlib":
        if source is not None:
            raise DataError(
                "the corpus stdlib is the Python that runs it: for other files use `prepare text --from PATH`"
            )
        identity, documents = {"python": platform.python_version()}, stdlib_files
    elif name == "shakespeare":
        if source is None:
            identity, documents = {"url": SHAKESPEARE_URL, "sha256": SHAKESPEARE_SHA256}, _shakespeare
        else:
            identity, documents = _local(source, text_field, reading, part)
    elif name == "text":
        if source is None:
            raise DataError("the corpus text is read from --from: name a file or folder")
        identity, documents = _local(source, text_field, reading, part)
    else:
        identity, documents = _from_hub(name, source, text_field, reading, part)
        if val_fraction is None and val_tokens is None:
            if name == "openwebtext":
                val_fraction = OPENWEBTEXT_VAL_FRACTION
                if part is None and identity.get("bytes", OPENWEBTEXT_WHOLE) >= OPENWEBTEXT_WHOLE:
                    held_out = partial(nanogpt_held_out, HUB[name][2])
            elif identity.get("bytes", FINEWEB_EDU_SMALL) >= FINEWEB_EDU_SMALL:
                val_tokens = FINEWEB_EDU_VAL_TOKENS
    return Corpus(name, identity, documents, val_fraction, val_tokens or 0, held_out, part, reading)


# -- the Python that runs this --------------------------------------------------------------------------------------


def stdlib_files() -> Iterator[tuple[str, str]]:
    """Every module of the standard library that is not a test, then the topics of `help()`; in order of their names."""
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


# -- Shakespeare ----------------------------------------------------------------------------------------------------


def _shakespeare() -> Iterator[tuple[str, str]]:
    yield "", read_text(_download_shakespeare())


def _download_shakespeare() -> Path:
    return fetch(SHAKESPEARE_URL, SHAKESPEARE_SHA256, "tinyshakespeare.txt", "Shakespeare", "--from", DataError)


# -- local files ----------------------------------------------------------------------------------------------------


def suffix_of(path: Path) -> str:
    return next((suffix for suffix in sorted(SUFFIXES, key=len, reverse=True) if path.name.endswith(suffix)), "")


def _local(
    source: Path, text_field: str, reading: Reading, part: Part | None = None, suffixes: tuple[str, ...] = SUFFIXES
) -> tuple[dict[str, Any], Callable[[], Iterator[tuple[str, str]]]]:
    """A file, or every readable file of a folder in order of its path; hidden ones are passed over."""
    if source.is_file():
        size = source.stat().st_size
        chosen = share_out([source], part, str(source))
        identity = {"path": str(source), "bytes": size, "sha256": file_sha256(source)}
        return identity, _files(chosen, text_field, reading, source.parent if part else None)
    found = (path for path in source.rglob("*") if path.is_file() and suffix_of(path) in suffixes)
    files = sorted(
        (path for path in found if not any(part.startswith(".") for part in path.relative_to(source).parts)),
        key=lambda path: path.relative_to(source).as_posix(),
    )
    if not files:
        raise DataError(f"{source} has no text: no file in it ends in {', '.join(suffixes)}")
    chosen = share_out(files, part, str(source))
    identity = {"path": str(source)} | listing(source, files)
    return identity, _files(chosen, text_field, reading, source if part else None)


def listing(root: Path, files: list[Path]) -> dict[str, Any]:
    """What identifies a folder's content as far as names and sizes do, which is cheap for any corpus."""
    sizes = sorted((path.relative_to(root).as_posix(), path.stat().st_size) for path in files)
    return {
        "files": len(sizes),
        "bytes": sum(size for _, size in sizes),
        "listing_sha256": hashlib.sha256(json.dumps(sizes).encode()).hexdigest(),
    }


def _files(
    files: list[Path], text_field: str, reading: Reading, root: Path | None
) -> Callable[[], Iterator[tuple[str, str]]]:
    """The documents of some files, named by file and row where `root` says what the paths are relative to."""
    sizes = [path.stat().st_size for path in files]
    reading.total = sum(sizes)

    def documents() -> Iterator[tuple[str, str]]:
        before = 0
        for path, size in zip(files, sizes, strict=True):
            kind = suffix_of(path)
            rows: Iterator[tuple[str, float]]
            try:
                if kind == ".parquet":
                    rows = _parquet(path, text_field)
                elif kind.startswith(".jsonl"):
                    rows = _jsonl(path, text_field)
                elif kind.startswith(".json"):
                    rows = _json(path, text_field)
                else:
                    rows = iter([(read_text(path), 1.0)])
                for row, (text, share) in enumerate(rows):
                    reading.done = before + share * size
                    yield f"{path.relative_to(root).as_posix()}/{row}" if root else "", text
            except UnicodeDecodeError as error:
                raise DataError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
            except (OSError, EOFError) as error:
                raise DataError(f"{path} cannot be read: {error}") from None
            before += size

    return documents


def read_text(path: Path) -> str:
    content = gzip.decompress(path.read_bytes()) if path.name.endswith(".gz") else path.read_bytes()
    return content.decode("utf-8-sig").replace("\r\n", "\n")


def _text_of(record: Any, text_field: str, where: str) -> str:
    if isinstance(record, str):
        return valid_text(record)
    if isinstance(record, dict) and isinstance(text := record.get(text_field), str):
        return valid_text(text)
    fields = f"; it has {', '.join(map(str, record))}" if isinstance(record, dict) else ""
    raise DataError(f"{where} has no text in a field '{text_field}'{fields}: name the field with --text-field")


def _jsonl(path: Path, text_field: str) -> Iterator[tuple[str, float]]:
    """Text of each line, and the share of the file that has been read with it."""
    size = path.stat().st_size
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(path, "rb"))
        lines = stack.enter_context(gzip.open(file)) if path.name.endswith(".gz") else file
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise DataError(f"{path}, line {number} is not JSON: {error}") from None
                yield _text_of(record, text_field, f"{path}, line {number}"), file.tell() / size


def _json(path: Path, text_field: str) -> Iterator[tuple[str, float]]:
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON: {error}; a file with an object a line is called .jsonl") from None
    records = content if isinstance(content, list) else [content]
    for number, record in enumerate(records, 1):
        yield _text_of(record, text_field, f"{path}, record {number}"), number / len(records)


def _parquet(path: Path, text_field: str) -> Iterator[tuple[str, float]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise DataError(f"{path} needs pyarrow to be read: pip install pyarrow") from None
    try:
        # pyarrow otherwise fetches, and keeps, every row group of the file, or a whole one: gigabytes of FineWeb-Edu.
        with ParquetFile(path, pre_buffer=False, buffer_size=2**20) as table:
            if text_field not in table.schema_arrow.names:
                columns = ", ".join(table.schema_arrow.names)
                raise DataError(f"{path} has no column '{text_field}', only {columns}: name one with --text-field")
            row, rows = 0, table.metadata.num_rows
            for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if text is not None and not isinstance(text, str):
                        raise DataError(f"{path}: column '{text_field}' holds {type(text).__name__}, not text")
                    yield text or "", row / rows
    except ArrowException as error:
        raise DataError(f"{path} is not a readable parquet file: {error}") from None


# -- the Hugging Face hub -------------------------------------------------------------------------------------------


def _from_hub(
    name: str, source: Path | None, text_field: str, reading: Reading, part: Part | None
) -> tuple[dict[str, Any], Callable[[], Iterator[tuple[str, str]]]]:
    """Streamed through `datasets`; of a local copy of the repository its parquet files are read, a file as it is."""
    hub, configuration, total = HUB[name]
    saved = source is not None and ((source / "state.json").is_file() or (source / "dataset_dict.json").is_file())
    if source is not None and not saved:
        sample = source / "sample" / "10BT"  # in a copy of FineWeb-Edu's repository
        if name == "fineweb-edu" and sample.is_dir():
            source = sample
        suffixes = (".parquet",) if source.is_dir() and any(source.rglob("*.parquet")) else SUFFIXES
        return _local(source, text_field, reading, part, suffixes)
    identity: dict[str, Any] = {"hub": hub, "configuration": configuration} if source is None else {"path": str(source)}
    if source is not None:
        identity |= listing(source, [path for path in source.rglob("*.*") if path.is_file()])
        if part:
            raise DataError(f"{source} was written by save_to_disk, which --part cannot share out: give parquet files")

    def documents() -> Iterator[tuple[str, str]]:
        try:
            import datasets
            from pyarrow.dataset import ParquetFragmentScanOptions
        except ImportError:
            raise DataError(f"the corpus {name} needs the package datasets: pip install datasets") from None
        try:
            if source is not None:
                stored = datasets.load_from_disk(str(source))
                rows = stored["train"] if isinstance(stored, datasets.DatasetDict) else stored
                reading.total = len(rows)
            else:
                # Otherwise the row groups of a file are fetched ahead and kept: gigabytes.
                scan = ParquetFragmentScanOptions(pre_buffer=False, use_buffered_stream=True, buffer_size=2**20)
                settings = {"streaming": True, "fragment_scan_options": scan, "batch_size": 1024}
                rows = datasets.load_dataset(hub, configuration, split="train", **settings)
                reading.total = total
            if rows.column_names is not None:
                if text_field not in rows.column_names:
                    columns = ", ".join(rows.column_names)
                    raise DataError(f"{name} has no column '{text_field}', only {columns}: name one with --text-field")
                rows = rows.select_columns([text_field])
            reading.done = 0
            if part is None:
                named = (("", row) for row in rows)
            else:
                files = rows.n_shards
                mine = share_out(list(range(files)), part, hub)
                reading.total = total * len(mine) / files
                named = (
                    (f"{file}/{index}", row)
                    for file in mine
                    for index, row in enumerate(rows.shard(num_shards=files, index=file))
                )
            for name_of_row, row in named:
                reading.done += 1
                yield name_of_row, valid_text(row[text_field] or "")
        except DataError:
            raise
        except Exception as error:  # of requests, fsspec, pyarrow and datasets: there is no common class
            where = str(source) if source else f"{hub} on the Hugging Face hub"
            hint = "" if source else ": connect to the network, or name a local copy with --from PATH"
            first_line = str(error).splitlines()[0] if str(error) else ""
            raise DataError(f"{where} could not be read ({type(error).__name__}: {first_line}){hint}") from None

    return identity, documents
