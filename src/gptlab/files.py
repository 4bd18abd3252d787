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
MOST_UNPACKED, LEAST_UNPACKED = 100, 2**26  # times its size may a packed file grow, and bytes that any may have
GIT_LFS = b"version https://git-lfs.github.com/spec/"  # how a pointer begins
IS_POINTER = "is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`"
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
    """A whole file, unpacked. Raises OSError, also for more than `most` bytes and for damage to a packed file."""
    with open_regular(path) as raw, unpacked(raw) as file:
        most = most if file is raw else min(most, _unpacked(raw))
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(f"it holds more than {most:,} bytes")
    return content


# -- packed files ---------------------------------------------------------------------------------------------------


class MissingPackage(OSError):
    """What a packed file needs is not installed; the message says what to install."""


def packing_of(head: bytes) -> str:
    """How a file that begins so is packed: gzip, zstd, bzip2 or xz, or ""."""
    if head[:3] == b"BZh" and head[4:10] in (b"1AY&SY", b"\x17rE8P\x90"):  # the second is that of an empty file
        return "bzip2"
    starts = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd", "xz": b"\xfd7zXZ\0"}
    if head[1:4] == b"\x2a\x4d\x18" and 0x50 <= head[0] <= 0x5F:  # pzstd begins with a frame to skip
        return "zstd"
    return next((name for name, start in starts.items() if head.startswith(start)), "")


@contextlib.contextmanager
def unpacked(raw: io.BufferedReader) -> Iterator[IO[bytes]]:
    """What an open file holds: the file itself, or what a packed one unpacks to, whatever it is called.

    Raises:
        OSError: a packed file is damaged or cut off.
        MissingPackage: nothing that unpacks it is installed.
    """
    packing = packing_of(raw.peek(16)[:16])
    if not packing:
        yield raw
        return
    file: Any
    faults: tuple[type[Exception], ...] = (EOFError, zlib.error)
    try:
        if packing == "gzip":
            file = gzip.GzipFile(fileobj=raw)
        elif packing == "bzip2":
            import bz2

            file = bz2.BZ2File(raw)
        elif packing == "xz":
            import lzma

            file = lzma.LZMAFile(raw)  # noqa: SIM115 - closed below
            faults = (*faults, lzma.LZMAError)
        else:
            import zstandard

            file = io.BufferedReader(_Zstd(raw))
            faults = (*faults, zstandard.ZstdError)
    except ImportError:
        needs = "pip install zstandard" if packing == "zstd" else f"this Python was built without {packing}"
        raise MissingPackage(f"it is packed with {packing}: {needs}") from None
    try:
        with file:
            yield file
    except faults as error:
        raise OSError(because(error)) from None


class _Zstd(io.RawIOBase):
    """The frames of an open .zst. The reader of `zstandard` takes a file that was cut off for a whole one."""

    PIECE = 2**11  # bytes; they unpack to at most 64 MB

    def __init__(self, raw: IO[bytes]) -> None:
        self.raw = raw
        self.frame: Any = None  # the one that is being unpacked
        self.rest = b""  # packed
        self.ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        from zstandard import ZstdDecompressor

        while not self.ready:
            piece = self.rest or self.raw.read(self.PIECE)
            if not piece and self.frame is None:
                return 0
            if not piece:
                raise EOFError("Compressed file ended before the end-of-stream marker was reached")
            frame = self.frame or ZstdDecompressor().decompressobj()
            self.ready = memoryview(frame.decompress(piece))
            self.frame, self.rest = (None, frame.unused_data) if frame.eof else (frame, b"")
        count = min(len(buffer), len(self.ready))
        buffer[:count], self.ready = self.ready[:count], self.ready[count:]
        return count


def _unpacked(file: IO[bytes]) -> int:
    """The bytes that an open packed file may unpack to: two megabytes of zeros can stand for two gigabytes."""
    return max(LEAST_UNPACKED, MOST_UNPACKED * os.fstat(file.fileno()).st_size)


def unpacked_lines(raw: io.BufferedReader) -> Iterator[bytes]:
    """The lines of an open file, unpacked. Raises as `unpacked`, and OSError for a line too long for a packed file."""
    with unpacked(raw) as file:
        if file is raw:
            yield from raw
            return
        most = _unpacked(raw)
        while line := file.readline(most + 1):
            if len(line) > most:
                raise OSError(f"a line holds more than {most:,} bytes")
            yield line


def refuse_pointer(path: Path, begins: bytes, error: type[UserError]) -> None:
    """Raise `error` for a file that Git LFS left in the place of a large one, which it begins to tell."""
    if begins.startswith(GIT_LFS):
        raise error(f"{path} {IS_POINTER}")


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
