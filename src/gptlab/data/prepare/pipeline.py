"""Documents to a prepared dataset: `gptlab prepare`, for text and for labelled documents.

    documents -> batches -> token ids, in threads -> writers of each split -> files -> manifest.json

A few batches of text are in memory at a time. A preparation that was stopped continues from its last record, and the
files are the same for any number of workers and stops. Several machines can prepare a part each (`--part`), in folders
within the dataset's; `--merge` makes one dataset of the parts.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gptlab.config import Data
from gptlab.data.containers import MAX_SHARD_TOKENS
from gptlab.data.corpora import LABELED, TEXT, open_corpus
from gptlab.data.corpora.base import AnyCorpus, Corpus, Document, LabeledCorpus
from gptlab.data.manifest import FORMATS, INEXACT, VERSION, corpus_of, read_manifest
from gptlab.data.prepare import folder as state
from gptlab.data.prepare import parts
from gptlab.data.prepare.summary import lacks_something, summary
from gptlab.data.prepare.writer import LabeledOutput, LabeledWriter, Output, Piece, ShardOutput, ShardWriter, new_states
from gptlab.data.tokenizer_files import identify_tokenizer, open_text_tokenizer, open_tokenizer
from gptlab.data.tokenizers import Tokenizer, UnencodableError, is_learnt, load_tokenizer, make_tokenizer
from gptlab.data.verified import file_sha256
from gptlab.errors import DataError
from gptlab.files import because
from gptlab.progress import Progress, print_folded
from gptlab.rundir import write_atomically

BATCH_CHARACTERS = 2**20  # of one task for a worker: a third of a second
RECORD_SECONDS = 30.0  # at most this much work is repeated after a kill
VOCABULARY_CHARACTERS = 10**9  # of training text for a BPE; more would take memory and change little


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
    label_field: str | None = None,
    max_documents: int | None = None,
    part: str | None = None,
    merge: bool = False,
    strict: bool = False,
    progress: bool = True,
) -> Path:
    """Tokenize a corpus into a folder for `shards.Dataset`, or with labels for `labeled.LabeledDataset`.

    A finished folder with the same settings is left as it is; an unfinished one is continued.

    >>> gptlab.prepare("stdlib", tokenizer="bpe-2048")
    PosixPath('data/stdlib-bpe-2048')

    Args:
        corpus: a name in `corpora.TEXT` or `corpora.LABELED`, or the path of a file or folder.
        source: local file or folder (with labels: or hub id) to read instead of the usual source.
        out: the folder; by default where a recipe with this corpus and tokenizer looks for it.
        tokenizer: gpt2, byte, char, bpe-N, a tokenizer.json, a folder with one or with vocab.json and merges.txt, or a
            hub id such as FacebookAI/roberta-base.
        format: llmc, npy, or nanogpt (one file a split, end-of-text after each document); text only.
        shard_tokens: tokens in a shard of llmc and npy; text only.
        workers: threads that tokenize; by default one per CPU. The files do not depend on it.
        val_fraction: share of the documents (characters, if there is one document) held out for validation.
        val_tokens: number of tokens at the beginning to hold out instead; text only.
        text_field: field or column that holds the text.
        label_field: field or column that holds the labels, see `corpora.labels`; or folder: each text file has the
            name of its folder as its label.
        max_documents: read at most this many documents (of the part; with labels, of each split).
        part: "I/N", prepare only part I, from 1, of N, in a folder within `out`.
        merge: instead, make one dataset of the parts in `out`.
        strict: refuse what is otherwise left out and counted: a row without text, a file that cannot be read.
        progress: show tokens, rate and time left on stderr, and print at the end what was made.

    Returns:
        The folder; with `part`, the part's. Raises DataError for a wrong setting, source, or folder.
    """
    folder = Path(out or Data(corpus=corpus, tokenizer=tokenizer).folder)
    say: Callable[[str], None] = print_folded if progress else lambda text: None
    if merge:
        say(f"{folder}: {summary(folder, parts.merge(folder))}")
        return folder
    if corpus not in TEXT | LABELED and source is None and Path(corpus).exists():
        corpus, source = "text", corpus
    if format not in FORMATS:
        raise DataError(f"no format '{format}': use {', '.join(FORMATS)}")
    if not 1 <= shard_tokens <= MAX_SHARD_TOKENS:
        raise DataError(f"shard_tokens = {shard_tokens}: must be at least 1 and at most {MAX_SHARD_TOKENS}")
    for name, value in (("workers", workers), ("max_documents", max_documents)):
        if value is not None and value < 1:
            raise DataError(f"{name} = {value}: must be at least 1")
    numbers = parts.parse_part(part, format, tokenizer) if part else None
    path = Path(source) if source else None
    with Progress(f"opening {corpus}", progress, folder.name):
        opened = open_corpus(corpus, path, text_field, val_fraction, val_tokens, numbers, label_field, strict)
    labeled = isinstance(opened, LabeledCorpus)
    settings: dict[str, Any]
    if isinstance(opened, LabeledCorpus):
        if format != "llmc" or val_tokens is not None:
            raise DataError("--val-tokens and --format are for text without labels: use --val-fraction")
        format = "npy"
        settings = {"text_field": text_field, "label_field": label_field}
        settings |= {"max_documents": max_documents, "val_fraction": val_fraction}
    else:
        settings = {"shard_tokens": shard_tokens, "end_of_text": "prepended"}
        if format == "nanogpt":
            settings = {"shard_tokens": None, "end_of_text": "appended"}
        settings |= {"val_fraction": opened.val_fraction, "val_tokens": opened.val_tokens}
        settings |= {"text_field": text_field, "max_documents": max_documents}
    draft: dict[str, Any] = {"kind": "labeled"} if labeled else {}
    draft |= {"format": format, "version": VERSION, "corpus": corpus, "source": opened.source}
    draft |= {"tokenizer": identify_tokenizer(tokenizer), "settings": settings}
    if numbers and (folder / "manifest.json").is_file():  # this job waited in a queue until after the merge
        settings |= {} if labeled else {"parts": numbers[1]}
    elif numbers:
        settings["part"] = "{} of {}".format(*numbers)
        state.refuse_other_files(folder, but="part-")
        folder = parts.part_folder(folder, numbers)
    if (folder / "manifest.json").is_file():
        manifest = read_manifest(folder, labeled)
        former = opened.former_source if isinstance(opened, Corpus) else None
        if former and state.differences(folder, manifest, draft, tokenizer):
            old = former()
            if not state.differences(folder, manifest, {**draft, "source": old}, tokenizer):
                say(
                    f"{folder}: already prepared, by a gptlab that read {old['files']:,} of its files where this one "
                    f"reads {opened.source['files']:,}: delete the folder to prepare it again"
                )
                return folder
        state.refuse_another(folder, manifest, draft, tokenizer)
        if strict and lacks_something(folder, manifest):
            raise DataError(f"{folder} was prepared without --strict, and lacks rows or files: name another --out")
        with contextlib.suppress(OSError):  # the folder may be read-only
            state.sweep(folder)  # a kill between the manifest and this leaves the record
        made_of = corpus_of(manifest)  # files of equal names and sizes count as the same, wherever they are
        say(f"{folder}: already prepared, {summary(folder, manifest)}" + f"\n  made of {made_of}" * bool(made_of))
        return folder
    with state.lock(folder):
        record = state.read_record(folder, draft, tokenizer)
        if record.get("documents"):
            say(f"{folder}: continuing after {record['documents']:,} documents")
        try:
            with Progress("opening the tokenizer", progress, folder.name) as shown:
                manifest = _prepare(folder, opened, draft, record, tokenizer, workers or os.cpu_count() or 1, shown)
        except (DataError, OSError):
            if not (folder / state.RECORD).is_file():
                state.sweep(folder)  # nothing is recorded, so nothing is left in the folder
            raise
    say(f"{folder}: {summary(folder, manifest)}")
    return folder


def _prepare(
    folder: Path,
    corpus: AnyCorpus,
    draft: dict[str, Any],
    record: dict[str, Any],
    tokenizer_name: str,
    workers: int,
    shown: Progress,
) -> dict[str, Any]:
    """Write the files of a dataset, from the record on. Returns the manifest."""
    kind: type[Output] = LabeledOutput if "kind" in draft else ShardOutput
    if (folder / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(folder / "tokenizer.json")
    else:
        texts = _vocabulary_texts(tokenizer_name, corpus, draft["settings"]["max_documents"], shown)
        given = open_tokenizer if kind is LabeledOutput else open_text_tokenizer
        tokenizer = make_tokenizer(tokenizer_name, texts) if is_learnt(tokenizer_name) else given(tokenizer_name)
    consumed = record.get("documents", 0)
    output = kind(folder, draft, tokenizer, record["splits"] if record else new_states(kind))
    _write_documents(output, corpus, tokenizer, consumed, workers, shown)
    identity = {**draft["tokenizer"], "vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot}
    identity |= {"file": "tokenizer.json", "sha256": file_sha256(folder / "tokenizer.json")}
    return state.write_manifest(folder, {**draft, "tokenizer": identity, **output.finish(corpus.reading)})


def _write_documents(
    output: Output, corpus: AnyCorpus, tokenizer: Tokenizer, consumed: int, workers: int, shown: Progress
) -> None:
    """Tokenize and write the documents after the first `consumed`; record every RECORD_SECONDS what is written."""
    writers: list[ShardWriter | LabeledWriter] = [*output.writers.values()]
    max_documents = output.draft["settings"]["max_documents"]
    val_tokens = 0
    if isinstance(corpus, Corpus) and not (corpus.part and corpus.part[0] > 1):
        val_tokens = corpus.val_tokens  # the first tokens are in the first part

    def save() -> None:
        for writer in writers:
            writer.flush()
        state.write_record(output.folder, output.draft, consumed, {writer.split: writer.state for writer in writers})
        if not (output.folder / "tokenizer.json").is_file():
            write_atomically(output.folder / "tokenizer.json", json.dumps(tokenizer.spec()) + "\n")
        for writer in writers:
            writer.publish()

    shares: deque[float | None] = deque()  # of the source, read with each of the batches that are in work

    def batches() -> Iterator[list[Document]]:
        for batch in _batches(told(itertools.islice(corpus.split(max_documents), consumed, None))):
            shares.append(corpus.reading.share)
            yield batch

    def told(documents: Iterable[Document]) -> Iterator[Document]:
        for document in documents:
            if first_share is None:  # nothing is tokenised yet: what is read is all that there is to tell of
                shown.tell_share("reading", corpus.reading.share)
            yield document

    shown.tell("reading")
    began = last_save = time.monotonic()
    tokens_before = sum(writer.state["tokens"] for writer in writers)
    first_share: float | None = None
    room_checked = False
    for pieces in _map_in_order(partial(_tokenize, tokenizer=tokenizer, output=output), batches(), workers):
        for index, why in sorted(entry for piece in pieces for entry in piece.refused):
            says = f"{output.folder}: document {consumed + index + 1:,}, {why}"
            if corpus.reading.strict:
                raise DataError(f"{says}: --strict leaves nothing out")
            shown.message(f"{says}; it is left out")
        consumed += sum(piece.documents + len(piece.refused) for piece in pieces)
        share = shares.popleft()
        if max_documents and isinstance(corpus, Corpus):
            share = max(share or 0.0, consumed / max_documents)
        tokens = sum(writer.state["tokens"] for writer in writers) + sum(len(piece.ids) for piece in pieces)
        first_share = share if first_share is None else first_share
        if share != first_share and not room_checked:  # the share of the first batch counts what was read ahead
            state.check_room(output.folder, tokens * output.dtype.itemsize, share)
            room_checked = True
        for piece in _cut(pieces, val_tokens - output.writers["val"].state["tokens"], tokenizer):
            output.writers[piece.split].write(piece)
        rate = (tokens - tokens_before) / max(time.monotonic() - began, 1e-9)
        shown.tell_share("tokenising", share, f"{tokens / 1e6:,.1f}M tokens", f"{rate / 1e6:,.2f}M tokens/s")
        if any(writer.unpublished for writer in writers) or time.monotonic() > last_save + RECORD_SECONDS:
            save()
            last_save = time.monotonic()
    output.close(corpus.name, whole=corpus.part is None)
    save()


def _vocabulary_texts(
    name: str, corpus: AnyCorpus, max_documents: int | None, shown: Progress
) -> Callable[[], Iterator[str]]:
    """The texts a vocabulary is learnt from: for char all documents, for bpe-N the beginning of the training split."""

    def all_documents() -> Iterator[str]:
        shown.tell("reading the characters")
        for text in corpus.texts(max_documents):
            shown.tell_share("reading the characters", corpus.reading.share)
            yield text

    def beginning() -> Iterator[str]:
        shown.tell("reading the words")
        characters = 0
        for document in corpus.split(max_documents):
            if characters >= VOCABULARY_CHARACTERS:
                break
            share = corpus.reading.share
            shown.tell_share("reading the words", share and max(share, characters / VOCABULARY_CHARACTERS))
            if document.split == "train":
                characters += len(document.text)
                yield document.text
        shown.tell(f"learning {int(name.removeprefix('bpe-')) - 257:,} merges")

    return all_documents if name == "char" else beginning


# -- documents to token ids -----------------------------------------------------------------------------------------


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _tokenize(batch: list[Document], tokenizer: Tokenizer, output: Output) -> list[Piece]:
    """A batch of documents as a piece for each split that is in it."""
    ids, refused = _encode([document.text for document in batch], tokenizer)
    pieces = []
    for split in dict.fromkeys(document.split for document in batch):
        mine = [index for index, document in enumerate(batch) if document.split == split and index not in refused]
        stream = [array for index in mine for array in (*output.before, ids[index], *output.after)]
        texts = [batch[index].text for index in mine]
        size = sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
        joined = np.concatenate(stream or [[]], dtype=output.dtype, casting="unsafe")
        piece = Piece(split, joined, len(mine), size, [(len(ids[index]), batch[index].labels) for index in mine])
        if not tokenizer.exact:
            lost = sum(tokenizer.lost_bytes(batch[index].text, ids[index]) for index in mine)
            piece.inexact = dict(zip(INEXACT, (int(tokenizer.token_bytes()[joined].sum()), lost), strict=True))
        piece.refused = [(index, why) for index, why in refused.items() if batch[index].split == split]
        pieces.append(piece)
    return pieces


def _encode(texts: list[str], tokenizer: Tokenizer) -> tuple[list[Any], dict[int, str]]:
    """The ids of each text; of each that the tokenizer cannot take, no ids, and its position and why."""
    try:
        return tokenizer.encode_batch(texts), {}
    except UnencodableError as error:
        if len(texts) == 1:
            begin = f"{texts[0][:40]!r}{'...' * (len(texts[0]) > 40)}"
            return [[]], {0: f"{begin} ({len(texts[0]):,} characters): {because(error)}"}
    halves = len(texts) // 2
    (ids, refused), (more, others) = _encode(texts[:halves], tokenizer), _encode(texts[halves:], tokenizer)
    return ids + more, refused | {halves + index: why for index, why in others.items()}


def _cut(pieces: list[Piece], val_room: int, tokenizer: Tokenizer) -> Iterator[Piece]:
    """Move the first `val_room` ids of the training stream to validation; a document may be cut (build-nanogpt)."""
    for piece in pieces:
        if piece.split == "train" and val_room > 0:
            ids, rest = piece.ids[:val_room], piece.ids[val_room:]
            documents = int((ids == tokenizer.eot).sum()) if len(rest) else piece.documents
            part, of = 1, 1  # of the bytes; exact if the tokenizer is
            if len(rest):
                part, of = (int(tokenizer.token_bytes()[some].sum()) for some in (ids, piece.ids))
            size = piece.bytes * part // max(of, 1)
            inexact = {key: number * part // max(of, 1) for key, number in piece.inexact.items()}
            yield Piece("val", ids, documents, size, inexact=inexact)
            inexact = {key: number - inexact[key] for key, number in piece.inexact.items()}
            documents, size = piece.documents - documents, piece.bytes - size
            piece = Piece("train", rest, documents, size, inexact=inexact, refused=piece.refused)
        if len(piece.ids) or piece.rows or piece.refused:
            yield piece


def _map_in_order(
    work: Callable[[list[Document]], list[Piece]], batches: Iterator[list[Document]], workers: int
) -> Iterator[list[Piece]]:
    """Results in the order of the batches, a few of which are read ahead.

    Threads and not processes: every tokenizer works outside the interpreter's lock, nothing is copied between
    processes, and no process outlives a killed one.
    """
    if workers == 1:
        yield from map(work, batches)
        return
    pool = ThreadPoolExecutor(workers, "tokenize")
    waiting: deque[Future[list[Piece]]] = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(work, batch))
            if len(waiting) > workers + 2:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
