"""Output that may have no reader: a closed pipe, a terminal that is gone, a log on a full disk.

Training must not end because nobody reads how it goes, so its progress is best effort.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT)  # there may be room again; any other error means that the reader is gone


class Patient:
    """A text stream that drops what cannot be written."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._dropping():
            try:
                self._stream.write(text)
            except UnicodeEncodeError:  # a terminal of another encoding
                encoding = self._stream.encoding
                self._stream.write(text.encode(encoding, "replace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        with self._dropping():
            self._stream.flush()

    def isatty(self) -> bool:
        try:
            return bool(self._stream.isatty())
        except (OSError, ValueError, AttributeError):  # it is closed, or there is none
            return False

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, AttributeError) as error:  # the last two: it is closed, or there is none
            if getattr(error, "errno", None) not in FULL:
                discard(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def patient(stream: Any) -> Any:
    """The stream, for which a reader is not needed. It may be None, as sys.stderr can be."""
    return Patient(stream)


def discard(stream: Any) -> None:
    """Send what a stream still holds, and everything after it, nowhere.

    Otherwise Python flushes the stream once more when it ends, fails, and exits with 120.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):
        number = stream.fileno()
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), number)


@contextlib.contextmanager
def best_effort() -> Iterator[None]:
    """Inside, nothing that is printed raises an error. At the end, what could not be written is given up."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(patient, before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in before:
            try:
                stream.flush()
            except (OSError, ValueError, AttributeError):
                discard(stream)


def fill_descriptors() -> None:
    """Open the null device where a standard stream is closed: the next file would take its number, and its output."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)


def say(text: str) -> None:
    """Print a line on stderr, if it can be printed."""
    print(text, file=patient(sys.stderr), flush=True)
