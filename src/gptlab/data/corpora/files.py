"""Rows of local files (text, JSON, JSON lines, all also gzipped; parquet), and what reading the hub needs."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gptlab.data.corpora.base import Reading
from gptlab.data.tokenizers import valid_text
from gptlab.data.verified import file_sha256
from gptlab.errors import DataError
from gptlab.files import because, gzip_lines, open_regular, parse_json, read_bytes

TABLES = (".json", ".jsonl", ".parquet", ".json.gz", ".jsonl.gz")
SUFFIXES = (".txt", ".md", ".json", ".jsonl", ".parquet", ".txt.gz", ".md.gz", ".json.gz", ".jsonl.gz")


MOST_TEXT_BYTES = 2**34  # of one text, unpacked; a .gz of a few MB can unpack to more than memory holds


class FileRow(NamedTuple):
    """A row of a file: an object of JSON or parquet, or the text of a whole text file."""

    path: Path
    number: int  # in the file, from 0
    where: str  # for messages
    content: Any


def suffix_of(path: Path) -> str:
    """The longest of SUFFIXES that the name ends in, or ""."""
    return next((suffix for suffix in sorted(SUFFIXES, key=len, reverse=True) if path.name.endswith(suffix)), "")


def files_in(root: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """The files of a folder with one of the suffixes, by their path within it, in order; hidden files are left out."""
    paths = (path for path in root.rglob("*") if path.is_file() and suffix_of(path) in suffixes)
    found = {path.relative_to(root).as_posix(): path for path in paths}
    return {name: found[name] for name in sorted(found) if not any(part[0] == "." for part in name.split("/"))}


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


def read_rows(files: list[Path], reading: Reading, column: str | None = None) -> Iterator[FileRow]:
    """The rows of some files, one file after another. `reading.done` goes on from where it is.

    Args:
        column: the only column that is read of a parquet file that has it.

    Raises:
        DataError: a file is unreadable or not what its suffix says; the message names the file and the line.
    """
    for path in files:
        before, size, kind = reading.done, 0, suffix_of(path)
        try:
            size = path.stat().st_size
            if kind == ".parquet":
                rows = _parquet(path, column)
            elif kind.startswith(".json"):
                rows = _jsonl(path) if kind.startswith(".jsonl") else _json(path)
            else:
                rows = iter([(str(path), read_text(path), 1.0)])
            for number, (where, content, share) in enumerate(rows):
                reading.done = before + share * size
                yield FileRow(path, number, where, content)
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
        except OSError as error:
            raise DataError(f"{path} cannot be read: {because(error)}") from None
        reading.done = before + size


def read_text(path: Path) -> str:
    """A text file or .txt.gz without byte order mark, its lines ended by LF. Raises OSError or UnicodeDecodeError."""
    return read_bytes(path, MOST_TEXT_BYTES).decode("utf-8-sig").replace("\r\n", "\n")


def text_of(row: Any, field: str, where: str) -> str:
    """The text in a field of a row; a row that is text itself is taken whole, null is the empty text."""
    if isinstance(row, str):
        return valid_text(row)
    if not isinstance(row, dict):
        raise DataError(f"{where} is not an object with fields")
    if field not in row:
        known = f", only {', '.join(map(str, row))}" if row else ""
        raise DataError(f"{where} has no field '{field}'{known}: name the field of the text with --text-field")
    text = "" if row[field] is None else row[field]
    if not isinstance(text, str):
        raise DataError(f"{where}: field '{field}' holds {type(text).__name__}, not text")
    return valid_text(text)


# -- the kinds of files: where a row is, the row, and the share of the file that has been read with it ----------------


def _jsonl(path: Path) -> Iterator[tuple[str, Any, float]]:
    size = path.stat().st_size
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open_regular(path))
        lines = gzip_lines(file) if path.name.endswith(".gz") else file
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = parse_json(line)
                except UnicodeDecodeError:
                    raise
                except ValueError as error:
                    raise DataError(f"{path}, line {number} is not JSON: {error}") from None
                yield f"{path}, line {number}", row, file.tell() / size


def _json(path: Path) -> Iterator[tuple[str, Any, float]]:
    try:
        content = parse_json(read_text(path))
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}; call a file with one object per line .jsonl") from None
    rows = content if isinstance(content, list) else [content]
    for number, row in enumerate(rows, 1):
        yield f"{path}, record {number}", row, number / len(rows)


def _parquet(path: Path, column: str | None) -> Iterator[tuple[str, Any, float]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise DataError(f"{path} needs pyarrow to be read: pip install pyarrow") from None
    try:
        # By default pyarrow fetches, and keeps, every row group of the file, or a whole one: gigabytes of FineWeb-Edu.
        with ParquetFile(path, pre_buffer=False, buffer_size=2**20) as table:
            columns = [column] if column in table.schema_arrow.names else None
            number, total = 0, table.metadata.num_rows
            for batch in table.iter_batches(batch_size=1024, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row, number / total
    except ArrowException as error:
        raise DataError(f"{path} is not a readable parquet file: {error}") from None


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
