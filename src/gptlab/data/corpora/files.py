"""Local files of documents: which of a folder are read, what identifies them, their rows, and the text in a row."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gptlab.data.corpora import kinds
from gptlab.data.corpora.base import Reading
from gptlab.data.corpora.kinds import SUFFIXES as SUFFIXES
from gptlab.data.corpora.kinds import TABLES as TABLES
from gptlab.data.corpora.kinds import read_text as read_text
from gptlab.data.corpora.kinds import suffix_of as suffix_of
from gptlab.data.tokenizers import valid_text
from gptlab.data.verified import file_sha256
from gptlab.errors import DataError
from gptlab.files import because, read_json

# Why a file of a folder is not read.
HIDDEN, OTHER_KIND = "hidden", "of a kind that is not read"
BROKEN, NO_FILE = "broken links", "neither files nor folders"
SAME, PREPARED = "links to folders that are read already", "prepared datasets"
SAVED, UNLISTED = "of save_to_disk, beside its data", "not in the state.json of save_to_disk"
LACKING = "missing, though the state.json of save_to_disk has them"

# What stands in a row where its text should be.
NULL = "null, empty or only white space"
KNOWN, NAME_IT = 20, "name the field of the text with --text-field"  # names of fields in a message
NO_FIELD, NO_TEXT, NO_ROW = "without the field", "with another value than text in the field", "damaged"

# What `--strict` refuses of a file.
FAULTS = frozenset(
    {BROKEN, LACKING, NO_FIELD, NO_TEXT, kinds.EMPTY, kinds.POINTER, kinds.NOT_TEXT, kinds.NOT_UTF8, kinds.DAMAGED}
)

OLD_SUFFIXES = (".txt", ".md", ".json", ".jsonl", ".parquet", ".txt.gz", ".md.gz", ".json.gz", ".jsonl.gz")


class FileRow(NamedTuple):
    """A row of a file: an object of JSON, parquet or CSV, or the text of a whole text file."""

    path: Path
    number: int  # in the file, from 0
    where: str  # for messages
    content: Any


class Listing(NamedTuple):
    """What a folder holds, hidden or not, by the path within it, in order.

    Attributes:
        files: those to read.
        skipped: by reason, those not to read; a name that ends in / is a folder's.
    """

    files: dict[str, Path]
    skipped: dict[str, list[str]]


def list_folder(root: Path, suffixes: tuple[str, ...] = SUFFIXES) -> Listing:
    """The files of a folder and of those below, with one of the suffixes or saved by `save_to_disk`.

    A folder that is linked to is read once, under its own name if it has one below `root`.

    Raises:
        DataError: a folder may not be listed.
    """
    every: dict[str, Path] = {}
    skipped: defaultdict[str, list[str]] = defaultdict(list)
    seen: set[tuple[int, int]] = set()
    folders: list[tuple[str, Path]] = [("", root)]
    links: list[tuple[str, Path]] = []
    while folders or links:
        within, folder = folders.pop() if folders else links.pop(0)
        try:
            status = folder.stat()
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"{folder} cannot be listed: {because(error)}") from None
        if (status.st_dev, status.st_ino) in seen:
            skipped[SAME].append(within)
            continue
        seen.add((status.st_dev, status.st_ino))
        names = {entry.name for entry in entries}
        if within and "tokenizer.json" in names and names & {"manifest.json", "progress.json"}:
            skipped[PREPARED].append(within)
            continue
        for entry in entries:
            name = within + entry.name
            if entry.name.startswith("."):
                skipped[HIDDEN].append(name + "/" * entry.is_dir())
            elif entry.is_dir():
                (links if entry.is_symlink() else folders).append((name + "/", Path(entry.path)))
            elif entry.is_file():
                every[name] = Path(entry.path)
            else:
                skipped[BROKEN if entry.is_symlink() else NO_FILE].append(name)
    saved = _saved(every)
    files: dict[str, Path] = {}
    for name in sorted(every | saved):
        known = name in saved or suffix_of(every[name]) in suffixes
        if reason := saved.get(name, "") if known else OTHER_KIND:
            skipped[reason].append(name)
        else:
            files[name] = every[name]
    return Listing(files, {reason: sorted(names) for reason, names in skipped.items()})


def _saved(files: dict[str, Path]) -> dict[str, str]:
    """The files in folders of `save_to_disk`: "" for those of the data, and why the others are not read."""
    found = {name: SAVED for name in files if name.rpartition("/")[2] == "dataset_dict.json"}
    together: defaultdict[Path, dict[str, Path]] = defaultdict(dict)
    for name, path in files.items():
        together[path.parent][name] = path
    for name, path in files.items():
        if name.rpartition("/")[2] != "state.json":
            continue
        try:
            listed = read_json(path, DataError)["_data_files"]
            data = {path.parent / str(entry["filename"]) for entry in listed}
        except (DataError, LookupError, TypeError):
            continue  # a stranger's
        within = name.removesuffix("state.json")
        beside = together[path.parent]
        found |= {within + file.name: LACKING for file in data - set(beside.values())}
        for other, file in beside.items():
            if file.suffix == ".arrow":
                found[other] = "" if file in data else UNLISTED
            elif file.name in ("state.json", "dataset_info.json"):
                found[other] = SAVED
    return found


def files_in(root: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """The files of a folder with one of the suffixes, by their path within it, in order; see `list_folder`."""
    return list_folder(root, suffixes).files


def identity_of(source: Path, root: Path, files: list[Path]) -> dict[str, Any]:
    """What identifies a file (its sha256) or a folder (names and sizes in it, which is cheap for any corpus)."""
    if source.is_file():
        return {"path": str(source), "bytes": source.stat().st_size, "sha256": file_sha256(source)}
    sizes = sorted((path.relative_to(root).as_posix(), path.stat().st_size) for path in files)
    return {
        "path": str(root),
        "files": len(sizes),
        "bytes": sum(size for _, size in sizes),
        "listing_sha256": hashlib.sha256(json.dumps(sizes).encode()).hexdigest(),
    }


def former_identity(root: Path, suffixes: tuple[str, ...]) -> dict[str, Any]:
    """What identified a folder in gptlab 0.1, which read fewer of its files."""
    if any((root / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return identity_of(root, root, [path for path in root.rglob("*.*") if path.is_file()])
    old = tuple(suffix for suffix in OLD_SUFFIXES if suffix in suffixes)
    paths = [path for path in root.rglob("*") if path.name.endswith(old) and path.is_file()]
    return identity_of(root, root, [path for path in paths if "/." not in f"/{path.relative_to(root).as_posix()}"])


# -- rows -----------------------------------------------------------------------------------------------------------


def read_rows(files: list[Path], reading: Reading, column: str | None = None) -> Iterator[FileRow]:
    """The rows of some files, one file after another. `reading.done` goes on from where it is.

    Args:
        column: the only column that is read of a table that has it.

    Raises:
        DataError: a file is unreadable or not what its suffix says; the message names the file and the line.
    """
    for path in files:
        for row in rows_of_file(path, reading, column):
            if isinstance(row.content, kinds.Damaged):
                raise DataError(f"{row.where} {row.content.says}")
            yield row


def rows_of_file(path: Path, reading: Reading, column: str | None = None) -> Iterator[FileRow]:
    """The rows of a file, also those that are `Damaged`. Raises as `kinds.rows_of`."""
    before, size = reading.done, 0
    try:
        with kinds.one_sentence(path):
            size = path.stat().st_size
        for number, (where, content, share) in enumerate(kinds.rows_of(path, column)):
            reading.done = before + share * size
            yield FileRow(path, number, where, content)
    finally:
        reading.done = before + size


class Lack(NamedTuple):
    """What a row has instead of a text: one of NULL, NO_FIELD, NO_TEXT, NO_ROW, and the end of a sentence about it."""

    reason: str
    says: str


EMPTY_TEXT = Lack(NULL, " has no text")


def find_text(row: Any, field: str) -> str | Lack:
    """The text in a field of a row; a row that is text itself is taken whole."""
    if isinstance(row, kinds.Damaged):
        return Lack(NO_ROW, f" {row.says}")
    if isinstance(row, dict):
        try:
            row = field_of(row, field)
        except KeyError:
            names = ", ".join([str(name) for name in row][:KNOWN]) + " ..." * (len(row) > KNOWN)
            known = f", only {names}" if row else ""
            return Lack(NO_FIELD, f" has no field '{field}'{known}: {NAME_IT}")
        says = f": field '{field}' holds {type(row).__name__}, not text"
    else:
        says = " is not an object with fields"
    if row is None or row == "" or (isinstance(row, float) and math.isnan(row)):
        return EMPTY_TEXT
    return valid_text(row) if isinstance(row, str) else Lack(NO_TEXT, says)


def field_of(row: dict[str, Any], field: str) -> Any:
    """The value of a field; of `a.b`, unless a field is called that, the value of b in a. Raises KeyError."""
    if field in row or "." not in field:
        return row[field]
    value: Any = row
    for name in field.split("."):
        if not isinstance(value, dict):
            raise KeyError(field)
        value = value[name]
    return value


def text_of(row: Any, field: str, where: str) -> str:
    """The text in a field of a row; null is the empty text. Raises DataError if there is none."""
    found = find_text(row, field)
    if isinstance(found, Lack) and found.reason != NULL:
        raise DataError(where + found.says)
    return "" if isinstance(found, Lack) else found


def with_plain_lines(text: str) -> str:
    """A text without a byte order mark, its lines ended by LF. The same for every format."""
    text = text.removeprefix("\ufeff")
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


# -- the Hugging Face hub -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def hub_errors(hub: str, source: Path | None = None) -> Iterator[None]:
    """Turn any failure to read from the hub, or from a local copy of it, into a DataError."""
    try:
        yield
    except DataError:
        raise
    except ImportError:
        raise DataError(f"{source or hub} needs the package datasets to be read: pip install datasets") from None
    except Exception as error:  # of requests, fsspec, pyarrow and datasets, which share no class
        where = str(source) if source else f"{hub} on the Hugging Face hub"
        hint = "" if source else ": connect to the network, or name a local copy with --from PATH"
        first_line = str(error).splitlines()[0] if str(error) else ""
        raise DataError(f"{where} could not be read ({type(error).__name__}: {first_line}){hint}") from None
