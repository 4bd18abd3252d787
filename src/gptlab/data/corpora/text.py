"""Corpora of text. Opening one makes a `Corpus`; its documents are read later."""

from __future__ import annotations

import math
import platform
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from gptlab.data.corpora import files, kinds
from gptlab.data.corpora.base import Corpus, Reading, Wanted, share_out
from gptlab.data.corpora.splits import split_of
from gptlab.data.download import fetch
from gptlab.errors import DataError
from gptlab.files import open_regular, parse_json

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

OPENWEBTEXT_VAL_FRACTION = 0.0005  # nanoGPT's test_size
TOLD = {kinds.DAMAGED, kinds.NOT_TEXT, kinds.NOT_UTF8, files.NO_FIELD, files.NO_TEXT}  # of these, each file is told of
JSON_TEXT = "as plain text, though they hold lines of JSON: call them .jsonl"
GIVE_UP = 10_000  # rows of a file without one text before the file is given up

# Tests are left out: long tables of cases teach a model little. pydoc_data is read as documentation instead.
STDLIB_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}


def open_stdlib(wanted: Wanted) -> Corpus:
    """Source and documentation of the Python that runs this."""
    if wanted.source is not None:
        raise DataError("the corpus stdlib is the Python that runs it: for other files use `prepare text --from PATH`")
    reading = Reading(wanted.strict)

    def documents() -> Iterator[tuple[str, str]]:
        reading.begin({}, {})
        reading.total = sum(path.stat().st_size for path in stdlib_modules().values())  # the topics are few
        for name, text in stdlib_files():
            reading.done += len(text)
            yield name, text

    return Corpus(wanted.name, {"python": platform.python_version()}, documents, reading=reading)


def stdlib_modules() -> dict[str, Path]:
    """The modules of the standard library but tests, by name, in order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    wanted = {name for name in found if STDLIB_SKIPPED.isdisjoint(name.split("/"))}
    return {name: found[name] for name in sorted(wanted) if not found[name].name.startswith("_sysconfigdata")}


def stdlib_files() -> Iterator[tuple[str, str]]:
    """(name, text) of every module of the standard library, then of the topics of `help()`; in order."""
    for name, path in stdlib_modules().items():
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


def open_files(wanted: Wanted, suffixes: tuple[str, ...] = files.SUFFIXES, as_published: bool = False) -> Corpus:
    """A file, or every readable file of a folder in order of its path. In a part, documents are named by file and row.

    What is in a folder and cannot be read is left out and counted (see `Reading`); a file that is named must be whole.

    Args:
        as_published: every file must be whole, and line ends, byte order marks and documents of white space stay.

    Raises:
        DataError: no source, or a folder without a readable file.
    """
    source, field, part = wanted.source, wanted.text_field, wanted.part
    if source is None:
        raise DataError(f"the corpus {wanted.name} is read from --from: name a file or folder")
    single, noted = source.is_file(), dict[str, list[str]]()
    whole = single or as_published or wanted.strict
    root = source.parent if single else source
    if single:
        found, skipped = {source.name: source}, dict[str, list[str]]()
    else:
        found, skipped, noted = for_training(root, files.list_folder(root, suffixes))
    if wanted.strict and (faults := files.FAULTS.intersection(skipped)):
        reason = min(faults)
        raise DataError(f"{root / skipped[reason][0]} cannot be read: it is one of the files {reason}")
    if not found:
        raise DataError(_nothing_to_read(source, skipped))
    chosen = share_out([*found.items()], part, str(source))
    reading = Reading(wanted.strict, total=sum(path.stat().st_size for _, path in chosen))

    def documents() -> Iterator[tuple[str, str]]:
        reading.begin(*((skipped, noted) if not part or part[0] == 1 else ({}, {})))
        faults: list[kinds.Unread] = []
        kept, lost = 0, 0  # bytes of the files that gave a document, and of those without the field
        for name, path in chosen:
            read, size = 0, path.stat().st_size
            try:
                for number, text in _texts(path, reading, field, whole, as_published):
                    read += bool(text)
                    if text.startswith("{") and kinds.KINDS.get(path.suffix) == "text" and _is_row(text, field):
                        reading.noted.setdefault(JSON_TEXT, []).append(name)
                    yield f"{name}/{number}" if part else "", text
            except kinds.Unread as fault:
                if whole and (wanted.strict or fault.reason != kinds.EMPTY):
                    raise
                reading.unread += not read
                says = fault.says.lstrip(": ").removesuffix(f": {files.NAME_IT}")
                says += f"; {read:,} documents were read" if read else ""
                told = f" ({says})" if read or fault.reason in TOLD else ""
                reading.skipped.setdefault(fault.reason, []).append(name + told)
                of_field = fault.reason in (files.NO_FIELD, files.NO_TEXT)
                lost += size if of_field else 0
                if of_field or (fault.reason != kinds.EMPTY and not part):
                    faults.append(fault)
            kept += size if read else 0
        if lost > kept:  # a slip rather than a stray table: what is left would not be the corpus
            faults = [fault for fault in faults if fault.reason in (files.NO_FIELD, files.NO_TEXT)]
        if faults and (lost > kept or not kept):
            others = f" ({len(faults) - 1:,} more of its files cannot be read)" if len(faults) > 1 else ""
            raise DataError(f"{faults[0]}{others}")

    identity = files.identity_of(source, root, [*found.values()])
    former = None if single else partial(files.former_identity, root, suffixes)
    return Corpus(wanted.name, identity, documents, part=part, reading=reading, former_source=former)


def _is_row(text: str, field: str) -> bool:
    """Whether a text begins with a line of JSON that has the field."""
    try:
        return field in parse_json(text.partition("\n")[0])
    except (ValueError, TypeError):
        return False


def _nothing_to_read(folder: Path, skipped: dict[str, list[str]]) -> str:
    for reason in (OTHER_SPLIT, REPOSITORY):
        if names := skipped.get(reason):
            return (
                f"{folder} has no text for training, only files {reason} ({', '.join(names[:3])}): name one to read it"
            )
    suffixes = ", ".join(kind for kind in kinds.KINDS if kind != ".arrow")
    beside = "; ".join(f"{', '.join(names[:3])}: {reason}" for reason, names in skipped.items())
    also = f"{folder} has no text: no file in it ends in {suffixes} (also with .gz, .zst, .bz2 or .xz)"
    return f"{also}, and save_to_disk wrote none of them" + (f" ({beside})" if beside else "")


def _texts(path: Path, reading: Reading, field: str, whole: bool, as_published: bool) -> Iterator[tuple[int, str]]:
    """The number of each row of a file, and its text; "" for a row without, which is counted.

    Args:
        whole: the file ends where it is damaged; otherwise it goes on after a damaged row, where that is possible.

    Raises:
        Unread: the file, or the rest of it, cannot be read, or no row of it has a text. Then no row is counted.
    """
    counted = Counter(reading.left_out), dict(reading.first)
    read, lacks = 0, Counter[str]()
    first: kinds.Unread | None = None
    fault: kinds.Unread | None = None
    try:
        for row in files.rows_of_file(path, reading, field):
            found = files.find_text(row.content, field)
            if isinstance(found, str) and not as_published:
                found = files.with_plain_lines(found)
                found = files.EMPTY_TEXT if found.isspace() else found
            found = found or files.EMPTY_TEXT
            if isinstance(found, str):
                read += 1
                yield row.number, found
                continue
            if reading.strict:
                raise DataError(row.where + found.says)
            if found.reason != files.NULL and not first:
                reason = kinds.DAMAGED if found.reason == files.NO_ROW else found.reason
                first = kinds.Unread(row.where, reason, found.says)
            if found.reason == files.NO_ROW and whole:
                fault = kinds.Unread(row.where, kinds.DAMAGED, found.says)
                break
            lacks[found.reason] += 1
            if not read and lacks.total() - lacks[files.NULL] >= GIVE_UP:
                break
            reading.leave_out(found.reason, row.where)
            yield row.number, ""
    except kinds.Unread as error:
        fault = error
    if not read:
        reading.left_out, reading.first = counted
        fault = first or fault or kinds.Unread(path, kinds.EMPTY, " holds no text")
    if fault:
        raise fault


# -- what of a folder is for training -------------------------------------------------------------------------------

REPOSITORY = "of the repository of a dataset, not of the data"
OTHER_SPLIT = "of a test or validation split by their names"
CARD = re.compile(rb"^(annotations_creators|configs|dataset_info|pretty_name|size_categories|task_categories):", re.M)


def for_training(
    root: Path, listing: files.Listing
) -> tuple[dict[str, Path], dict[str, list[str]], dict[str, list[str]]]:
    """The files to train on, those that are skipped, and those of which the user should know, the last two by reason.

    A file whose name, or whose nearest folder's, says test or validation is skipped beside one that says train, and
    in a clone of a dataset's repository. Elsewhere it is read, since a text may well be about tests, and noted. In a
    clone, its card and other files about the data are skipped.
    """
    found, skipped = dict(listing.files), {reason: [*names] for reason, names in listing.skipped.items()}
    clones = _clones(root, listing)
    places = {name: _place(name) for name in found}
    split = {folder for said, folder in places.values() if said == "train"}
    tables = {clone: any(name.startswith(clone) and _is_table(name) for name in found) for clone in clones}
    noted: list[str] = []
    for name, (said, folder) in places.items():
        clone = max((clone for clone in clones if name.startswith(clone)), key=len, default=None)
        reason = ""
        if clone is not None and not (_is_table(name) if tables[clone] else name.lower().endswith(".txt")):
            reason = REPOSITORY
        elif said in ("val", "test"):
            reason = OTHER_SPLIT if clone is not None or folder in split else ""
            noted += [name] if not reason else []
        if reason:
            skipped.setdefault(reason, []).append(name)
            del found[name]
    return found, skipped, {OTHER_SPLIT: noted} if noted else {}


def _is_table(name: str) -> bool:
    return files.suffix_of(Path(name)) in (*files.TABLES, ".arrow") and not name.endswith("dataset_infos.json")


def _clones(root: Path, listing: files.Listing) -> list[str]:
    """The folders that are repositories of datasets, by the path within `root` with a / at the end: "" is `root`."""
    found = []
    for name in (*listing.files, *listing.skipped.get(files.HIDDEN, ())):
        folder, _, last = name.rpartition("/")
        if last in ("README.md", ".gitattributes"):
            with kinds.one_sentence(root / name), open_regular(root / name) as file:
                head = file.read(2**16)
            if last == "README.md":
                front = head.split(b"\n---", 1)[0] if head.startswith(b"---") else b""
            if CARD.search(front) if last == "README.md" else b"*.parquet filter=lfs" in head:
                found.append(f"{folder}/" if folder else "")
        elif last == "dataset_infos.json":
            found.append(f"{folder}/" if folder else "")
    return found


def _place(name: str) -> tuple[str, str]:
    """The split that a name or its nearest folder says, and the folder that is split so; "" for none."""
    parts = name.split("/")
    for index in reversed(range(len(parts))):
        if said := split_of(parts[index]):
            return said, "/".join(parts[:index])
    return "", ""


# -- the Hugging Face hub -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hub:
    """A corpus of the Hugging Face hub, as it is published.

    Attributes:
        hub, configuration: what `datasets.load_dataset` is given.
        documents: number of them, from which the time left is estimated.
        folder: of the configuration's files, in a copy of the repository.
        whole: bytes from which a local copy is taken for the whole corpus; a smaller one is an excerpt.
        val_fraction: share that is held out.
        val_tokens: tokens at the beginning that are held out of the whole corpus instead.
        held_out: positions, of so many documents, that are held out of the whole corpus instead.
    """

    hub: str
    configuration: str | None = None
    documents: int = 0
    folder: str = ""
    whole: int = 0
    val_fraction: float | None = None
    val_tokens: int = 0
    held_out: Callable[[int], frozenset[int]] | None = None

    def open(self, wanted: Wanted) -> Corpus:
        """Streamed from the hub, or a local copy: a folder of `save_to_disk`, a copy of the repository, or a file."""
        corpus = self._stream(wanted) if wanted.source is None else self._local(wanted, wanted.source)
        corpus = replace(corpus, val_fraction=self.val_fraction)
        if corpus.source.get("bytes", self.whole) >= self.whole:
            held_out = partial(self.held_out, self.documents) if self.held_out and not wanted.part else None
            corpus = replace(corpus, val_tokens=self.val_tokens, held_out=held_out)
        return corpus

    def _local(self, wanted: Wanted, source: Path) -> Corpus:
        if self.folder and (source / self.folder).is_dir():
            source = source / self.folder
        suffixes = (".parquet",) if source.is_dir() and any(source.rglob("*.parquet")) else files.SUFFIXES
        return open_files(replace(wanted, source=source), suffixes, as_published=True)

    def _stream(self, wanted: Wanted) -> Corpus:
        hub, field, part = self.hub, wanted.text_field, wanted.part
        reading = Reading(wanted.strict)

        def documents() -> Iterator[tuple[str, str]]:
            with files.hub_errors(hub):
                import datasets
                from pyarrow.dataset import ParquetFragmentScanOptions

                # By default the row groups of a file are fetched ahead and kept: gigabytes.
                scan = ParquetFragmentScanOptions(pre_buffer=False, use_buffered_stream=True, buffer_size=2**20)
                settings = {"streaming": True, "fragment_scan_options": scan, "batch_size": 1024}
                rows = datasets.load_dataset(hub, self.configuration, split="train", **settings)
                if rows.column_names is not None:
                    if (top := field if field in rows.column_names else field.split(".")[0]) not in rows.column_names:
                        columns = ", ".join(rows.column_names)
                        raise DataError(f"{wanted.name} has no field '{field}', only {columns}: see --text-field")
                    rows = rows.select_columns([top])
                reading.begin({}, {})
                reading.total = self.documents
                named = ((f"{index}", row) for index, row in enumerate(rows))
                if part is not None:
                    shards = rows.n_shards
                    mine = share_out(list(range(shards)), part, hub)
                    reading.total = self.documents * len(mine) / shards
                    each = ((file, enumerate(rows.shard(num_shards=shards, index=file))) for file in mine)
                    named = ((f"{file}/{index}", row) for file, numbered in each for index, row in numbered)
                for name, row in named:
                    reading.done += 1
                    found = files.find_text(row, field) or files.EMPTY_TEXT
                    if isinstance(found, files.Lack):
                        where = f"{hub}, row {name}"
                        if reading.strict or found.reason != files.NULL:
                            raise DataError(where + found.says)
                        reading.leave_out(found.reason, where)
                    yield name if part else "", "" if isinstance(found, files.Lack) else found

        identity = {"hub": hub, "configuration": self.configuration}
        return Corpus(wanted.name, identity, documents, part=part, reading=reading)


def nanogpt_held_out(documents: int, fraction: float = OPENWEBTEXT_VAL_FRACTION, seed: int = 2357) -> frozenset[int]:
    """Positions of the documents that nanoGPT holds out of OpenWebText (data/openwebtext/prepare.py).

    nanoGPT calls `train_test_split` of Hugging Face datasets, which takes the beginning of a permutation of numpy's.
    """
    permutation = np.random.default_rng(seed).permutation(documents)
    return frozenset(permutation[: math.ceil(fraction * documents)].tolist())
