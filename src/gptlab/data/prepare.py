"""Documents to shards: `gptlab prepare`.

    documents -> batches -> ids, in threads -> one stream of ids a split -> shards -> manifest.json

What is held at any time is a few batches of text. A run that is stopped goes on from its last record, and the shards
are the same whatever the number of workers and however often it was stopped. Several machines prepare a part each,
in folders within the dataset's (`--part`), whose shards `merge` moves up into one dataset.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import itertools
import json
import os
import re
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from gptlab import locks
from gptlab.config import Data
from gptlab.data.corpora import NAMES, Corpus, Part, open_corpus
from gptlab.data.shards import (
    FORMATS,
    MANIFEST_VERSION,
    MAX_SHARD_TOKENS,
    Dataset,
    file_sha256,
    read_manifest,
    read_shard,
    shard_header,
    token_dtype,
)
from gptlab.data.tokenizers import Tokenizer, load_tokenizer, make_tokenizer
from gptlab.errors import DataError
from gptlab.rundir import write_atomically

BATCH_CHARACTERS = 2**20  # a worker's piece of work: a third of a second
RECORD_SECONDS = 30.0  # at most this much work is done again after a kill
LINE_SECONDS = 30.0  # between lines of progress where stderr is no terminal
VOCABULARY_CHARACTERS = 10**9  # from which a BPE is learnt; more would take memory and change little
ROOM_MARGIN = 1.25  # the need of disk space is an estimate: this much too high it may be
PART_FOLDER = "part-{:04d}-of-{:04d}"


def prepare(
    corpus: str,
    *,
    source: Path | str | None = None,
    out: Path | str | None = None,
    tokenizer: str = "gpt2",
    format: str = "llmc",
    shard_tokens: int = 100_000_000,
    workers: int | None = None,
    val_fraction: float | None = None,
    val_tokens: int | None = None,
    text_field: str = "text",
    max_documents: int | None = None,
    part: str | None = None,
    progress: bool = True,
) -> Path:
    """Tokenise a corpus into a folder of shards.

    A finished folder with the same settings is left as it is; an unfinished one is gone on with.

    Args:
        corpus: stdlib, shakespeare, openwebtext, fineweb-edu, text, or the path of a file or folder.
        source: a local file or folder to read instead of downloading; needed for `text`.
        out: the folder; by default where a recipe with this corpus and tokenizer looks for it.
        tokenizer: gpt2, byte, char, bpe-N, or the path of a tokenizer.json.
        format: llmc, nanogpt (one file a split, end-of-text after each document instead of before) or npy.
        shard_tokens: tokens in a shard; nanogpt has one shard a split whatever this says.
        workers: threads that tokenise; by default one a CPU. The shards do not depend on it.
        val_fraction: share of the documents (characters, where there is one document) held out for validation.
        val_tokens: instead, that many tokens at the beginning.
        text_field: field or column of JSON and parquet files that holds the text.
        max_documents: read no more than this many documents (of the part, if it is one).
        part: "I/N": only part I, from 1, of N runs of the files, into a folder within `out`; see `merge`.
        progress: show tokens, rate and time left on stderr, and say at the end what was made.

    Returns:
        The folder, of the part if it is one.

    Raises:
        DataError: one sentence on what is wrong with a setting, the source, or the folder.
    """
    folder = Path(out or Data(corpus=corpus, tokenizer=tokenizer).folder)
    if corpus not in NAMES and source is None and Path(corpus).exists():
        corpus, source = "text", corpus
    if format not in FORMATS:
        raise DataError(f"no format '{format}': use {', '.join(FORMATS)}")
    if not 1 <= shard_tokens <= MAX_SHARD_TOKENS:
        raise DataError(f"shard_tokens = {shard_tokens}: must be at least 1 and at most {MAX_SHARD_TOKENS}")
    for name, value in (("workers", workers), ("max_documents", max_documents)):
        if value is not None and value < 1:
            raise DataError(f"{name} = {value}: must be at least 1")
    numbers = _part(part, format, tokenizer) if part else None
    opened = open_corpus(corpus, Path(source) if source else None, text_field, val_fraction, val_tokens, numbers)
    draft: dict[str, Any] = {
        "format": format,
        "version": MANIFEST_VERSION,
        "corpus": corpus,
        "source": opened.source,
        "tokenizer": _named(tokenizer),
        "settings": {
            "shard_tokens": None if format == "nanogpt" else shard_tokens,
            "end_of_text": "appended" if format == "nanogpt" else "prepended",
            "val_fraction": opened.val_fraction,
            "val_tokens": opened.val_tokens,
            "text_field": text_field,
            "max_documents": max_documents,
        },
    }
    say: Callable[[str], None] = print if progress else lambda text: None
    if numbers and (folder / "manifest.json").is_file():  # whoever waited in the queue until all was merged
        draft["settings"]["parts"] = numbers[1]
    elif numbers:
        draft["settings"]["part"] = "{} of {}".format(*numbers)
        _only_parts(folder)
        folder = folder / PART_FOLDER.format(*numbers)
    if (folder / "manifest.json").is_file():
        refuse_another(folder, read_manifest(folder), draft)
        say(f"{folder}: already prepared, {_summary(Dataset(folder).manifest)}")
        return folder
    with disk_errors(folder), lock(folder):
        manifest = _prepare(folder, opened, draft, tokenizer, workers or os.cpu_count() or 1, progress)
    say(f"{folder}: {_summary(manifest)}")
    return folder


def _named(tokenizer: str) -> dict[str, Any]:
    """What identifies the tokenizer that was asked for, before it is made."""
    path = Path(tokenizer)
    return {"name": path.stem} | ({"source_sha256": file_sha256(path)} if path.is_file() else {})


def _summary(manifest: dict[str, Any]) -> str:
    splits = manifest["splits"]
    return " and ".join(f"{splits[split]['tokens']:,} {split} tokens" for split in ("train", "val"))


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the folder of a dataset for one process. Raises DataError where another one prepares it."""
    with locks.hold(folder, DataError(f"{folder} is being prepared by another process")):
        yield


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """A full disk, or a folder that cannot be written, as a sentence."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DataError(f"no space left for {folder}: make room and run the same again") from None
        raise DataError(f"{error.filename or folder} cannot be written: {error.strerror}") from None


def _differences(folder: Path, found: dict[str, Any], asked: dict[str, Any], first: str = "now") -> str:
    """Settings in which a folder is not what is asked for, for the user; where a recorded content lies is none."""

    def flat(manifest: dict[str, Any]) -> dict[str, Any]:
        tokenizer = {key: manifest["tokenizer"].get(key) for key in ("name", "source_sha256")}
        parts = {"source": manifest["source"], "tokenizer": tokenizer, "": manifest["settings"]}
        values = {f"{part}.{key}".strip("."): value for part, items in parts.items() for key, value in items.items()}
        if "sha256" in manifest["source"] or "listing_sha256" in manifest["source"]:
            for where in ("source.path", "source.url", "source.bytes"):
                values.pop(where, None)
        return {"corpus": manifest["corpus"], "format": manifest["format"]} | values

    try:
        old, new = flat(found), flat(asked)
    except (KeyError, AttributeError, TypeError):
        raise DataError(f"{folder} holds a dataset that was not made by `gptlab prepare`: name another --out") from None
    return ", ".join(
        f"{key} = {old.get(key)} ({first} {new.get(key)})" for key in old | new if old.get(key) != new.get(key)
    )


def refuse_another(folder: Path, found: dict[str, Any], asked: dict[str, Any]) -> None:
    if differences := _differences(folder, found, asked):
        raise DataError(
            f"{folder} was made with {differences}: name another --out, or delete the folder to make it anew"
        )


# -- parts ----------------------------------------------------------------------------------------------------------


def _part(text: str, format: str, tokenizer: str) -> Part:
    """I/N as two numbers, and whether the other settings can be had in parts."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]) <= 9999:
        raise DataError(f"part {text}: give I/N, a number from 1 to N and the number of parts, such as 1/8")
    if format == "nanogpt":
        raise DataError("format nanogpt has one file a split, so it cannot be made in parts: use --format llmc or npy")
    if tokenizer == "char" or tokenizer.startswith("bpe-"):
        raise DataError(
            f"tokenizer {tokenizer} would be learnt anew by each part: prepare some of the text without --part, "
            "and give the tokenizer.json made there to --tokenizer"
        )
    return int(match[1]), int(match[2])


def _only_parts(folder: Path) -> None:
    """Refuse a folder that holds anything but parts: shards will be moved into it."""
    others = sorted(path.name for path in folder.glob("*") if not path.name.startswith((".", "part-")))
    if others:
        raise DataError(f"{folder} holds other files ({', '.join(others[:3])}): name another --out")


def merge(folder: Path | str, progress: bool = True) -> Path:
    """Make one dataset of the parts in a folder: their shards one after another in order of the parts.

    Shards are moved and not copied, the manifest is written last; what a kill leaves is gone on with.

    Args:
        folder: what `prepare` was given as `out`, with a folder for each part in it.

    Raises:
        DataError: a part is missing, unfinished, or made with other settings than the first.
    """
    folder = Path(folder)
    say: Callable[[str], None] = print if progress else lambda text: None
    parts = sorted(path for path in folder.glob("part-*-of-*") if path.is_dir())
    done = (folder / "manifest.json").is_file()
    if not parts and not done:
        raise DataError(f"{folder} has no parts: `gptlab prepare ... --part I/N` makes them, in one --out")
    with disk_errors(folder), lock(folder):
        if not done:
            _merge(folder, parts)
        elif any(path.suffix in (".bin", ".npy") for part in parts for path in part.iterdir()):
            raise DataError(f"{folder} holds a finished dataset beside the parts: prepare them into another --out")
        for part in parts:
            shutil.rmtree(part)  # no shard is left in it
    say(f"{folder}: {_summary(Dataset(folder).manifest)}")
    return folder


def _merge(folder: Path, parts: list[Path]) -> None:
    total = int(parts[0].name.rpartition("-")[2])
    names = [PART_FOLDER.format(index, total) for index in range(1, total + 1)]
    if strangers := [part.name for part in parts if part.name not in names]:
        raise DataError(f"{folder} holds parts of different numbers of parts, {names[0]} and {strangers[0]}: keep one")
    if missing := [index for index, name in enumerate(names, 1) if not (folder / name / "manifest.json").is_file()]:
        raise DataError(
            f"{folder}: {len(missing)} of {total} parts are not finished: prepare them with --part {missing[0]}/{total}"
            + (", ..." if len(missing) > 1 else "")
        )
    manifests = [read_manifest(part) for part in parts]
    for part, manifest in zip(parts, manifests, strict=True):
        manifest["settings"].pop("part", None)
        differences = _differences(part, manifest, manifests[0], first=f"in {parts[0].name}")
        if not differences and manifest["tokenizer"] != manifests[0]["tokenizer"]:
            differences = f"another tokenizer.json than {parts[0].name}"
        if differences:
            raise DataError(f"{part} was made with {differences}: delete the wrong one and prepare it again")
    splits = {}
    for split in ("train", "val"):
        shards: list[dict[str, Any]] = []
        for part, manifest in zip(parts, manifests, strict=True):
            for entry in manifest["splits"][split]["shards"]:
                target = folder / shard_name(manifest["format"], manifest["corpus"], split, len(shards))
                if (part / entry["file"]).is_file():
                    if target.exists():
                        raise DataError(f"{target} is in the way of a shard of {part.name}: move it elsewhere")
                    os.replace(part / entry["file"], target)
                if read_shard(target, manifest["format"]).tokens != entry["tokens"]:
                    raise DataError(
                        f"{target} is not the shard that {part.name} recorded: delete both and prepare anew"
                    )
                shards.append({**entry, "file": target.name})
        counts = {key: sum(m["splits"][split][key] for m in manifests) for key in ("tokens", "documents", "bytes")}
        splits[split] = {**counts, "shards": shards}
    shutil.copyfile(parts[0] / "tokenizer.json", folder / "tokenizer.json")
    settings = {**manifests[0]["settings"], "parts": total}
    merged = {**manifests[0], "settings": settings, "splits": splits, "gptlab": version()}
    write_atomically(folder / "manifest.json", json.dumps(merged, indent=2) + "\n")


# -- the work -------------------------------------------------------------------------------------------------------


def _prepare(
    folder: Path, corpus: Corpus, draft: dict[str, Any], tokenizer_name: str, workers: int, progress: bool
) -> dict[str, Any]:
    state = _begin(folder, draft)
    max_documents = draft["settings"]["max_documents"]
    if (folder / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(folder / "tokenizer.json")
    else:
        tokenizer = make_tokenizer(tokenizer_name, _vocabulary_texts(tokenizer_name, corpus, max_documents))
        write_atomically(folder / "tokenizer.json", json.dumps(tokenizer.spec()) + "\n")
    dtype = token_dtype(draft["format"], tokenizer.vocab_size)
    shard_tokens = draft["settings"]["shard_tokens"]
    splits = {
        name: _SplitWriter(folder, name, draft["format"], draft["corpus"], dtype, shard_tokens, state["splits"][name])
        for name in ("train", "val")
    }
    val_tokens = 0 if corpus.part and corpus.part[0] > 1 else corpus.val_tokens  # the first tokens are the first part's
    consumed: int = state["documents"]
    if consumed and progress:
        print(f"{folder}: going on after {consumed:,} documents")

    def record() -> None:
        """What is on disk now, so that a rerun goes on from here. Only then do finished shards get their names."""
        for writer in splits.values():
            writer.flush()
        states = {name: writer.state for name, writer in splits.items()}
        write_atomically(folder / "progress.json", json.dumps({**draft, "documents": consumed, "splits": states}))
        for writer in splits.values():
            writer.publish()

    shares: deque[float | None] = deque()  # how much of the source was read with each batch that is not yet done

    def batches() -> Iterator[list[tuple[str, str]]]:
        for batch in _batches(itertools.islice(corpus.split(max_documents), consumed, None)):
            shares.append(corpus.reading.share)
            yield batch

    last_record = time.monotonic()
    first_share: float | None = None
    room_checked = False
    append = draft["settings"]["end_of_text"] == "appended"
    work = partial(_tokenise, tokenizer=tokenizer, dtype=dtype, append_eot=append)
    with progress_bar(progress, folder) as show:
        for done in _map_in_order(work, batches(), workers):
            consumed += done.documents
            share = shares.popleft()
            if max_documents:
                share = max(share or 0.0, consumed / max_documents)
            tokens = sum(writer.tokens for writer in splits.values()) + sum(len(piece.ids) for piece in done.pieces)
            first_share = share if first_share is None else first_share
            if share != first_share and not room_checked:  # until then documents are given that were read ahead
                check_room(folder, tokens * dtype.itemsize, share)
                room_checked = True
            for piece in _cut(done.pieces, val_tokens - splits["val"].tokens, tokenizer):
                splits[piece.split].write(piece)
            show(tokens, share)
            if any(writer.unpublished for writer in splits.values()) or time.monotonic() > last_record + RECORD_SECONDS:
                record()
                last_record = time.monotonic()
    for writer in splits.values():
        writer.close()
    record()
    if splits["train"].tokens == 0:
        raise DataError(
            f"all {splits['val'].tokens} tokens of the corpus {corpus.name} fell into the validation split: "
            f"delete {folder} and hold out less (--val-tokens, --val-fraction)"
        )
    manifest = {
        **draft,
        "tokenizer": {
            **draft["tokenizer"],
            "vocab_size": tokenizer.vocab_size,
            "eot": tokenizer.eot,
            "file": "tokenizer.json",
            "sha256": file_sha256(folder / "tokenizer.json"),
        },
        "dtype": dtype.name,
        "splits": {name: writer.summary() for name, writer in splits.items()},
        "gptlab": version(),
    }
    write_atomically(folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    (folder / "progress.json").unlink()
    return manifest


def _begin(folder: Path, draft: dict[str, Any]) -> dict[str, Any]:
    """The state to go on from; a folder that holds something else is refused."""
    record = folder / "progress.json"
    if record.is_file():
        try:
            state: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{record} is damaged ({error}): delete the folder to prepare it anew") from None
        if state["documents"]:
            refuse_another(folder, state, draft)
        elif _differences(folder, state, draft):  # nothing is in it yet, so nothing is lost
            for path in (folder / "tokenizer.json", *folder.glob(".*.tmp")):
                path.unlink(missing_ok=True)
            record.unlink()
            return _begin(folder, draft)
        return state
    others = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))  # a kill may leave those
    if others:
        raise DataError(f"{folder} holds other files ({', '.join(others[:3])}): name another --out")
    zeros = {"tokens": 0, "documents": 0, "bytes": 0, "open_tokens": 0, "open_max": -1}
    state = {**draft, "documents": 0, "splits": {split: {"shards": [], **zeros} for split in ("train", "val")}}
    write_atomically(record, json.dumps(state))
    return state


def _vocabulary_texts(tokenizer_name: str, corpus: Corpus, max_documents: int | None) -> Callable[[], Iterator[str]]:
    """What a vocabulary is learnt from: the beginning of the training split; for `char` everything, so that no
    character is unknown."""
    if tokenizer_name == "char":
        return lambda: corpus.texts(max_documents)

    def beginning() -> Iterator[str]:
        characters = 0
        for split, text in corpus.split(max_documents):
            if split == "train" and characters < VOCABULARY_CHARACTERS:
                characters += len(text)
                yield text
            elif characters >= VOCABULARY_CHARACTERS:
                return

    return beginning


def check_room(folder: Path, written: int, share: float | None) -> None:
    """Refuse to begin what a disk cannot hold, going by the first batches.

    Args:
        written: bytes of ids so far.
        share: how much of the source they are; None where it is not known, and then nothing is checked.

    Raises:
        DataError: what is still to come is more than there is room for.
    """
    if not share:
        return
    needed, free = written * (1 / share - 1), shutil.disk_usage(folder).free
    if needed > ROOM_MARGIN * free:
        raise DataError(
            f"{folder} needs about {needed / 1e9:,.2f} GB and {free / 1e9:,.2f} GB are free: "
            "make room, or name a folder on another disk with --out"
        )


def version() -> str:
    try:
        return importlib.metadata.version("gptlab")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


# -- documents to ids -----------------------------------------------------------------------------------------------


@dataclass
class _Piece:
    """A stretch of one split's stream of ids."""

    split: str
    ids: NDArray[Any]  # (tokens,)
    documents: int
    bytes: int  # of UTF-8 text


@dataclass
class _Done:
    documents: int
    pieces: list[_Piece]


def _batches(documents: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch: list[tuple[str, str]] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document[1])
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _tokenise(batch: list[tuple[str, str]], tokenizer: Tokenizer, dtype: np.dtype[Any], append_eot: bool) -> _Done:
    """A batch of documents as one stretch of ids for each split, documents delimited by end-of-text."""
    ids = tokenizer.encode_batch([text for _, text in batch])
    delimiter = [np.array([tokenizer.eot])] if tokenizer.eot is not None else []
    before, after = ([], delimiter) if append_eot else (delimiter, [])
    pieces = []
    for split in ("train", "val"):
        mine = [index for index, (name, _) in enumerate(batch) if name == split]
        if mine:
            parts = [part for index in mine for part in (*before, ids[index], *after)]
            texts = (batch[index][1] for index in mine)
            size = sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
            pieces.append(_Piece(split, np.concatenate(parts, dtype=dtype, casting="unsafe"), len(mine), size))
    return _Done(len(batch), pieces)


def _cut(pieces: list[_Piece], val_room: int, tokenizer: Tokenizer) -> Iterator[_Piece]:
    """Move the first `val_room` ids of the training stream to validation; a document may be cut (build-nanogpt)."""
    for piece in pieces:
        if piece.split == "train" and val_room > 0:
            ids, rest = piece.ids[:val_room], piece.ids[val_room:]
            size = int(tokenizer.token_bytes()[ids].sum()) if len(rest) else piece.bytes
            documents = int((ids == tokenizer.eot).sum()) if len(rest) else piece.documents
            yield _Piece("val", ids, documents, size)
            piece = _Piece("train", rest, piece.documents - documents, piece.bytes - size)
        if len(piece.ids):
            yield piece


def _map_in_order(
    work: Callable[[list[tuple[str, str]]], _Done], batches: Iterator[list[tuple[str, str]]], workers: int
) -> Iterator[_Done]:
    """Results in the order of the batches, a few of which are read ahead.

    Threads and not processes: every tokenizer spends its time outside the interpreter's lock, nothing has to be
    copied between processes, and no process is left behind when this one is killed.
    """
    if workers == 1:
        yield from map(work, batches)
        return
    pool = ThreadPoolExecutor(workers, "tokenise")
    waiting: deque[Future[_Done]] = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(work, batch))
            if len(waiting) > workers + 2:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


# -- ids to shards --------------------------------------------------------------------------------------------------


def shard_name(format: str, corpus: str, split: str, index: int) -> str:
    if format == "nanogpt":
        return f"{split}.bin"
    return f"{corpus}_{split}_{index:06d}.npy" if format == "npy" else f"{split}-{index:06d}.bin"


class _SplitWriter:
    """One split's stream of ids, cut into shards as it is written.

    A shard is written under a temporary name. When it is full it is closed, entered into the state, and after the
    state is on disk (`publish`) it gets its name: whatever has its final name is complete and recorded.

    Args:
        state: as `progress.json` has it; the file being written is cut back to what was recorded.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        format: str,
        corpus: str,
        dtype: np.dtype[Any],
        shard_tokens: int | None,
        state: dict[str, Any],
    ) -> None:
        self.folder, self.split, self.format, self.corpus, self.dtype = folder, split, format, corpus, dtype
        self.shard_tokens = shard_tokens or sys.maxsize
        self.state = state
        self.unpublished: list[str] = []
        self._file: IO[bytes] | None = None
        for entry in state["shards"]:
            if self._temporary(entry["file"]).is_file() and not (folder / entry["file"]).is_file():
                os.replace(self._temporary(entry["file"]), folder / entry["file"])  # killed before it was named
            if not (folder / entry["file"]).is_file():
                raise DataError(f"{folder / entry['file']} is missing: delete the folder to prepare it anew")
        if state["open_tokens"]:
            path = self._temporary(self._name())
            size = self._offset() + state["open_tokens"] * dtype.itemsize
            if not path.is_file() or path.stat().st_size < size:
                raise DataError(f"{path} is missing or truncated: delete the folder to prepare it anew")
            self._file = open(path, "r+b")  # noqa: SIM115 - stays open from document to document
            self._file.truncate(size)
            self._file.seek(size)

    @property
    def tokens(self) -> int:
        return int(self.state["tokens"])

    def _name(self) -> str:
        """File name of the shard being written."""
        return shard_name(self.format, self.corpus, self.split, len(self.state["shards"]))

    def _temporary(self, name: str) -> Path:
        return self.folder / f".{name}.tmp"

    def _offset(self) -> int:
        return len(shard_header(self.format, self.dtype, 0))

    def write(self, piece: _Piece) -> None:
        ids = piece.ids
        while len(ids):
            if self._file is None:
                self._file = open(self._temporary(self._name()), "w+b")  # noqa: SIM115 - as above
                self._file.write(shard_header(self.format, self.dtype, 0))  # the count comes when it is known
            room = self.shard_tokens - self.state["open_tokens"]
            part, ids = ids[:room], ids[room:]
            self._file.write(part.tobytes())
            self.state["open_tokens"] += len(part)
            self.state["open_max"] = max(self.state["open_max"], int(part.max()))
            self.state["tokens"] += len(part)
            if self.state["open_tokens"] == self.shard_tokens:
                self.close()
        self.state["documents"] += piece.documents
        self.state["bytes"] += piece.bytes

    def close(self) -> None:
        """Complete the shard being written, if there is one."""
        if self._file is None:
            return
        name = self._name()
        self._file.seek(0)
        self._file.write(shard_header(self.format, self.dtype, self.state["open_tokens"]))
        self.flush()
        self._file.seek(0)
        digest = hashlib.file_digest(self._file, "sha256").hexdigest()  # type: ignore[arg-type]
        self._file.close()
        self._file = None
        tokens, max_token = self.state["open_tokens"], self.state["open_max"]
        self.state["shards"].append({"file": name, "tokens": tokens, "max_token": max_token, "sha256": digest})
        self.state["open_tokens"], self.state["open_max"] = 0, -1
        self.unpublished.append(name)

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def publish(self) -> None:
        """Give finished shards their names; to be called when the state that lists them is on disk."""
        for name in self.unpublished:
            os.replace(self._temporary(name), self.folder / name)
        self.unpublished.clear()

    def summary(self) -> dict[str, Any]:
        return {key: self.state[key] for key in ("tokens", "documents", "bytes", "shards")}


class Pace:
    """Tokens, rate and time left as a line of text. What an earlier run wrote does not count as speed."""

    def __init__(self) -> None:
        self.first: tuple[float, int, float] | None = None  # seconds, tokens, share of the source

    def line(self, seconds: float, tokens: int, share: float | None) -> str:
        """The state at some time on a clock, with `share` of the source read (None: not known)."""
        text = f"{tokens / 1e6:,.1f}M tokens"
        if self.first is None:
            self.first = seconds, tokens, share or 0.0
            return text
        begin, tokens_before, share_before = self.first
        passed = max(seconds - begin, 1e-9)
        text += f", {(tokens - tokens_before) / passed / 1e6:,.2f}M tokens/s"
        if share is not None:
            text += f", {share:.1%}"
            if share > share_before:
                left = round(passed * (1 - share) / (share - share_before))
                text += f", {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"
        return text


@contextlib.contextmanager
def progress_bar(wanted: bool, folder: Path) -> Iterator[Callable[..., None]]:
    """What shows (tokens, share of the source): a live line on a terminal, elsewhere a line now and then, on stderr."""
    pace = Pace()
    if not wanted:
        yield lambda tokens, share=None: None
        return
    if not sys.stderr.isatty():
        last = time.monotonic()

        def tell(tokens: int, share: float | None = None) -> None:
            nonlocal last
            line = pace.line(time.monotonic(), tokens, share)
            if time.monotonic() > last + LINE_SECONDS:
                last = time.monotonic()
                print(f"{folder}: {line}", file=sys.stderr, flush=True)

        yield tell
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"{folder}")

        def show(tokens: int, share: float | None = None) -> None:
            bar.update(task, description=f"{folder}  {pace.line(time.monotonic(), tokens, share)}")

        yield show
