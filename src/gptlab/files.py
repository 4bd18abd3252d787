"""Files of JSON, TOML and text, whoever wrote them, read with all checks in one place.

A file may be cut off, of another kind, not text, or nested a million levels deep. Every fault is one sentence that
names the file, in the caller's type of error.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import math
import os
import stat
import sys
import tomllib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from gptlab.errors import UserError

MOST_BYTES = 2**30  # of a file that is read as a whole, unpacked
MOST_UNPACKED, LEAST_UNPACKED = 100, 2**26  # times its packed size may a .gz grow, and bytes that any may have
GIT_LFS = b"version https://git-lfs.github.com/spec/"  # how a pointer begins
MOST_LEVELS = 100  # of nested objects and lists; Python's own limit depends on who asks


def printable(text: str) -> str:
    """Foreign text for a terminal or a table: control characters, which could move the cursor, are shown as escapes."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def for_terminal(text: str) -> str:
    """Text for stdout: as it is in a file or a pipe, `printable` on a terminal."""
    return printable(text) if sys.stdout is not None and sys.stdout.isatty() else text


def because(error: BaseException) -> str:
    """What an error says, on one line and without the path, which the caller names."""
    says = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return printable(" ".join(says.split())[:300]) or type(error).__name__


@contextlib.contextmanager
def damaged(path: Path, error: type[UserError]) -> Iterator[None]:
    """While the content of a file is taken apart: what Python raises for another structure becomes one sentence."""
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as fault:
        raise error(f"{path} is damaged: {type(fault).__name__}: {because(fault)}") from None


def open_regular(path: Path) -> io.BufferedReader:
    """An existing file. Raises OSError for anything but a file: reading a pipe or a device may never end."""

    def at_once(name: str, flags: int) -> int:  # opening a pipe would wait for its writer
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    file = open(path, "rb", opener=at_once)  # noqa: SIM115 - returned open
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError("it is not a file")
    return file


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """A whole file; the content of a .gz. Raises OSError, also for more than `most` bytes and for damaged gzip."""
    try:
        with open_regular(path) as raw:
            packed = path.name.endswith(".gz")
            most = min(most, _unpacked(raw)) if packed else most
            with gzip.open(raw) if packed else raw as file:
                content = file.read(most + 1)
    except (EOFError, zlib.error) as error:
        raise OSError(because(error)) from None
    if len(content) > most:
        raise OSError(f"it holds more than {most:,} bytes")
    return content


def _unpacked(file: IO[bytes]) -> int:
    """The bytes that an open .gz may unpack to: two megabytes of zeros can stand for two gigabytes."""
    return max(LEAST_UNPACKED, MOST_UNPACKED * os.fstat(file.fileno()).st_size)


def gzip_lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of an open .gz. Raises OSError for a line that is too long for its file and for damaged gzip."""
    most = _unpacked(file)
    try:
        with gzip.open(file) as unpacked:
            while line := unpacked.readline(most + 1):
                if len(line) > most:
                    raise OSError(f"a line holds more than {most:,} bytes")
                yield line
    except (EOFError, zlib.error) as error:
        raise OSError(because(error)) from None


def refuse_pointer(path: Path, begins: bytes, error: type[UserError]) -> None:
    """Raise `error` for a file that Git LFS left in the place of a large one, which it begins to tell."""
    if begins.startswith(GIT_LFS):
        raise error(f"{path} is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`")


def read_text(path: Path, error: type[UserError]) -> str:
    """A whole file of UTF-8.

    Raises:
        FileNotFoundError: as it came, since what a missing file means is the caller's to say.
        error: the file cannot be read.
    """
    try:
        content = read_bytes(path)
        refuse_pointer(path, content, error)
        return content.decode("utf-8")
    except (FileNotFoundError, UserError):
        raise
    except UnicodeDecodeError as fault:
        raise error(f"{path} is damaged: byte {fault.start} is not UTF-8 text") from None
    except (OSError, ValueError) as fault:  # ValueError: a NUL in the path
        raise error(f"{path} cannot be read: {because(fault)}") from None


def parse_json(text: str | bytes) -> Any:
    """A value from JSON. Raises ValueError, also for nesting that Python cannot read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"it is nested more than {MOST_LEVELS} levels deep") from None


def parse_toml(text: str) -> dict[str, Any]:
    """A table from TOML. Raises ValueError, also for nesting that Python cannot read."""
    try:
        table = tomllib.loads(text)
    except RecursionError:
        raise ValueError(f"it is nested more than {MOST_LEVELS} levels deep") from None
    check_values(table, finite=False)  # what a setting may be is said by its name
    return table


def read_json(path: Path, error: type[UserError], finite: bool = True) -> dict[str, Any]:
    """The object in a JSON file of which every value is checked by `check_values`. Raises as `read_text`.

    Args:
        finite: refuse NaN and infinity.
    """
    text = read_text(path, error)
    try:
        if not text:
            raise ValueError("it is empty")
        value = parse_json(text)
        check_values(value, finite)
    except ValueError as fault:
        raise error(f"{path} is damaged: {because(fault)}") from None
    if not isinstance(value, dict):
        raise error(f"{path} is damaged: it does not hold a JSON object")
    return value


def read_toml(path: Path, error: type[UserError]) -> dict[str, Any]:
    """The table in a TOML file of which every value is checked by `check_values`. Raises as `read_text`."""
    text = read_text(path, error)
    try:
        return parse_toml(text)
    except ValueError as fault:
        raise error(f"{path} is not a TOML file: {because(fault)}") from None


def check_values(value: Any, finite: bool = True) -> None:
    """Raises ValueError where a value holds what Python parses and most code cannot take.

    That is deep nesting, whole numbers beyond 64 bits, half a character (a lone surrogate), and NaN or infinity.
    """
    rows, levels = [value], 0
    while rows:
        if levels > MOST_LEVELS:
            raise ValueError(f"it is nested more than {MOST_LEVELS} levels deep")
        inner: list[Any] = []
        for row in rows:
            if isinstance(row, dict):
                inner += row
                inner += row.values()
            elif isinstance(row, list):
                inner += row
            elif isinstance(row, str):
                row.encode()  # UnicodeEncodeError is a ValueError
            elif isinstance(row, int):
                if not -(2**63) <= row < 2**64:
                    raise ValueError("it holds a whole number of more than 64 bits")
            elif finite and isinstance(row, float) and not math.isfinite(row):
                raise ValueError("it holds a number that is not finite")
        rows, levels = inner, levels + 1


def check_fields(content: dict[str, Any], fields: dict[str, Any]) -> None:
    """Check the kinds of known fields, where they are present. Raises ValueError, which names the field.

    Null is as good as absent but for an object of known fields.

    Args:
        fields: name to str, int, float (any number), dict, list, or a dictionary of the fields of an object.
    """
    for name, kind in fields.items():
        value: Any = content.get(name, {} if isinstance(kind, dict) else None)
        if value is None and not isinstance(kind, dict):
            continue
        wanted = dict if isinstance(kind, dict) else kind
        fits = isinstance(value, int | float) if wanted is float else isinstance(value, wanted)
        if not fits or (isinstance(value, bool) and wanted is not bool):
            raise ValueError(f"{name} is {type(value).__name__}, not {wanted.__name__}")
        if isinstance(kind, dict):
            check_fields(value, kind)
