"""The kinds of files that hold documents, and their rows.

The suffix says the kind, in any case of letters; the content says how a file is packed, and wins where the two cannot
both be right. Rows are read in a stream, but for a text and for a JSON array, which are held whole.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gptlab.errors import DataError
from gptlab.files import (
    GIT_LFS,
    IS_POINTER,
    MissingPackage,
    because,
    open_regular,
    parse_json,
    read_bytes,
    unpacked,
    unpacked_lines,
)

PACKED = ("", ".gz", ".zst", ".bz2", ".xz")
KINDS = {
    ".txt": "text",
    ".md": "text",
    ".json": "json",
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",  # in a folder, only those that save_to_disk wrote
}
TABLES = tuple(
    kind + packed for packed in PACKED for kind in (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
)
SUFFIXES = (*(kind + packed for packed in PACKED for kind in (".txt", ".md")), *TABLES)

MOST_TEXT_BYTES = 2**34  # of one text, unpacked; a .gz of a few MB can unpack to more than memory holds
MOST_FIELD = 2**28  # characters of a field of CSV; an open quotation mark would take in the rest of the file
HEAD = 2**12  # bytes that say what a file is

EMPTY, POINTER, NOT_TEXT = "empty", "Git LFS pointers (fetch the files: git lfs pull)", "not text"
NOT_UTF8, DAMAGED = "not UTF-8 text", "damaged or not what their names say"
FOREIGN = {
    b"%PDF-": "a PDF",
    b"PK\x03\x04": "a zip archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a rar archive",
    b"\x93NUMPY": "an array of NumPy",
    b"\x89HDF": "an HDF5 file",
    b"SQLite format 3": "a database of SQLite",
}

Rows = Iterator[tuple[str, Any, float]]  # where a row is, the row, and the share of the file that is read with it


class Unread(DataError):
    """A file, or what is left of it, that cannot be read. `reason` is one of a few, `says` the rest of the sentence."""

    def __init__(self, path: Path | str, reason: str, says: str) -> None:
        super().__init__(f"{path}{says}")
        self.reason, self.says = reason, says


class Damaged(NamedTuple):
    """What stands in the place of a row that cannot be read; the rows after it can."""

    says: str


def suffix_of(path: Path) -> str:
    """The suffix of a kind in KINDS, with that of its packing: .jsonl.gz. "" if the name has none."""
    kind, packed = _suffixes(path)
    return kind + packed if kind else ""


def _suffixes(path: Path) -> tuple[str, str]:
    name = path.name.lower()
    packed = next(suffix for suffix in (*PACKED[1:], "") if name.endswith(suffix))
    return next((kind for kind in KINDS if name.removesuffix(packed).endswith(kind)), ""), packed


def rows_of(path: Path, column: str | None = None) -> Rows:
    """The rows of a file: objects of JSON, parquet or CSV, a `Damaged`, or the text of a whole text file.

    Args:
        column: the only column to read of a file that has it: a name, or a path into structs such as `a.b`.

    Raises:
        Unread: the file is damaged, of another kind, or not text.
        DataError: the system does not let it be read, or a package is missing, which has nothing to do with the file.
    """
    with one_sentence(path):
        kind = kind_of(path)
        if kind == "text":
            yield str(path), read_text(path), 1.0
        elif kind in ("csv", "tsv"):
            yield from _csv(path, "," if kind == "csv" else "\t")
        elif kind in ("parquet", "arrow"):
            yield from (_parquet if kind == "parquet" else _arrow)(path, column)
        else:
            yield from _json(path, kind)


@contextlib.contextmanager
def one_sentence(path: Path) -> Iterator[None]:
    """While a file is read: what the system and the decoders raise becomes one sentence, as of `rows_of`."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise Unread(path, NOT_UTF8, f" is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except MissingPackage as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    except OSError as error:
        if error.errno is not None:  # the system's: the next attempt may fare better
            raise DataError(f"{path} cannot be read: {because(error)}") from None
        raise Unread(path, DAMAGED, f" cannot be read: {because(error)}") from None


def kind_of(path: Path) -> str:
    """One of KINDS. A name without a suffix that is known leaves it to the content. Raises as `rows_of`."""
    with open_regular(path) as raw, unpacked(raw) as file:
        packed, head = file is not raw, file.read(HEAD)
    if not head:
        raise Unread(path, EMPTY, " is empty")
    suffix, packing = _suffixes(path)
    kind = KINDS.get(suffix, "")
    if head.startswith(GIT_LFS):
        raise Unread(path, POINTER, f" {IS_POINTER}")
    for start, name in (*FOREIGN.items(), (b"ustar", "a tar archive")):
        if head.startswith(start) or (start == b"ustar" and head[257:262] == start):
            raise Unread(path, NOT_TEXT, f" is {name}, not text")
    if head.startswith(b"PAR1"):
        return "parquet"
    if kind in ("parquet", "arrow"):
        return kind
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise Unread(path, NOT_UTF8, " is not UTF-8 text but UTF-16: convert it with iconv -f UTF-16 -t UTF-8")
    if b"\0" in head:
        raise Unread(path, NOT_TEXT, " is not text: it holds zero bytes")
    begins = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if packing and not packed and (kind not in ("json", "lines") or begins not in b'{["'):
        packed_as = "gzipped" if packing == ".gz" else packing
        raise Unread(path, DAMAGED, f" cannot be read: Not a {packed_as} file: name it after what it holds")
    return kind or (_json_or_text(path) if begins in (b"{", b"[") else "text")


def _json_or_text(path: Path) -> str:
    with contextlib.suppress(ValueError), open_regular(path) as raw:
        if isinstance(parse_json(next(line for line in unpacked_lines(raw) if line.strip())), dict):
            return "lines"
    with contextlib.suppress(ValueError):
        parse_json(read_bytes(path, MOST_TEXT_BYTES))
        return "json"
    return "text"


def read_text(path: Path) -> str:
    """A text file, unpacked, without byte order mark, its lines ended by LF. Raises OSError or UnicodeDecodeError."""
    return read_bytes(path, MOST_TEXT_BYTES).decode("utf-8-sig").replace("\r\n", "\n")


# -- tables ---------------------------------------------------------------------------------------------------------


def _json(path: Path, kind: str) -> Rows:
    """A value a line; or one array or one object over several lines, if the beginning looks like it."""
    size = path.stat().st_size
    with open_regular(path) as raw:
        numbered = ((number, line) for number, line in enumerate(unpacked_lines(raw), 1) if line.strip())
        if (first := next(numbered, None)) is None:
            return
        value, array = _line(first[1]), first[1].removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
        if isinstance(value, Damaged):
            whole = array or kind == "json"
        else:
            whole = array and (kind == "json" or isinstance(next(iter(value), None), dict))
        if not whole:
            for number, line in itertools.chain([first], numbered):
                yield f"{path}, line {number}", _line(line), raw.tell() / size
            return
    try:
        content = parse_json(read_bytes(path, MOST_TEXT_BYTES))
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        raise Unread(path, DAMAGED, f" is not JSON: {because(error)}") from None
    rows = content if isinstance(content, list) else [content]
    for number, row in enumerate(rows, 1):
        yield f"{path}, record {number}", row, number / len(rows)


def _line(line: bytes) -> Any:
    try:
        return parse_json(line)
    except UnicodeDecodeError as error:
        return Damaged(f"is not UTF-8 text ({error.reason} at byte {error.start} of the line)")
    except ValueError as error:
        return Damaged(f"is not JSON: {because(error)}")


def _csv(path: Path, delimiter: str) -> Rows:
    """Rows below a header. A row with more fields than the header is damaged: a text may have been cut at a comma."""
    size = path.stat().st_size
    csv.field_size_limit(MOST_FIELD)
    with open_regular(path) as raw:
        # A byte that is not UTF-8 becomes half a character, so that it spoils its own row and not the reader.
        lines = (line.decode("utf-8", "surrogateescape") for line in unpacked_lines(raw))
        first = next(lines, "").removeprefix("\ufeff")
        reader = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            line = reader.line_num + 1
            try:
                fields = next(reader)
                "".join(fields).encode()
            except StopIteration:
                return
            except UnicodeEncodeError:
                row: Any = Damaged("is not UTF-8 text")
            except csv.Error as error:
                row = Damaged(f"is not CSV: {because(error)}")
            else:
                if header is None or not fields:
                    header = header or fields
                    continue
                row = dict(zip(header, fields, strict=False))
                if len(fields) > len(header):
                    row = Damaged(f"has {len(fields)} fields, and the header has {len(header)}")
            if header is None:
                raise Unread(path, DAMAGED, f" has no header: line {line} {row.says}")
            yield f"{path}, line {line}", row, raw.tell() / size


def _parquet(path: Path, column: str | None) -> Rows:
    with _arrow_errors(path, "parquet"):
        from pyarrow import BufferReader
        from pyarrow.parquet import ParquetFile

        with open_regular(path) as raw, unpacked(raw) as file:
            packed = file is not raw
        source = BufferReader(read_bytes(path, MOST_TEXT_BYTES)) if packed else path
        # By default pyarrow fetches, and keeps, every row group of the file, or a whole one: gigabytes of FineWeb-Edu.
        with ParquetFile(source, pre_buffer=False, buffer_size=2**20) as table:
            columns = [column] if column and _has(table.schema_arrow, column) else None
            number, total = 0, table.metadata.num_rows
            for batch in table.iter_batches(batch_size=1024, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row, number / total


def _arrow(path: Path, column: str | None) -> Rows:
    """A file of `save_to_disk`, or of the cache of datasets."""
    with _arrow_errors(path, "Arrow"):
        import pyarrow
        from pyarrow import ipc

        with pyarrow.memory_map(str(path)) as file:
            whole = file.read(6) == b"ARROW1"
            file.seek(0)
            table = ipc.open_file(file) if whole else ipc.open_stream(file)
            batches = (table.get_batch(i) for i in range(table.num_record_batches)) if whole else table
            number, size = 0, file.size()
            top = column.split(".")[0] if column and column not in table.schema.names else column
            for batch in batches:
                chosen = batch.select([top]) if column and _has(table.schema, column) else batch
                chosen.validate(full=True)  # Arrow believes the lengths in a file, and would read beyond its end
                for begin in range(0, len(chosen), 1024):
                    for row in chosen.slice(begin, 1024).to_pylist():
                        number += 1
                        yield f"{path}, row {number}", row, min(file.tell() / size, 1.0)


@contextlib.contextmanager
def _arrow_errors(path: Path, name: str) -> Iterator[None]:
    try:
        from pyarrow import ArrowException
    except ImportError:
        raise DataError(f"{path} needs pyarrow to be read: pip install pyarrow") from None
    try:
        yield
    except (UnicodeDecodeError, DataError):
        raise
    except (ArrowException, ValueError, OverflowError) as error:
        raise Unread(path, DAMAGED, f" is not a readable {name} file: {because(error)}") from None


def _has(schema: Any, column: str) -> bool:
    """Whether a table has a column of this name, or structs with such a path."""
    if column in schema.names:
        return True
    from pyarrow import types

    top, *inner = column.split(".")
    kind = schema.field(top).type if top in schema.names else None
    for name in inner:
        if kind is None or not types.is_struct(kind) or kind.get_field_index(name) < 0:
            return False
        kind = kind.field(name).type
    return kind is not None
