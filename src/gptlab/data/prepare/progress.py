"""The progress of a preparation on stderr, and whether the disk has room for the rest."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from gptlab.errors import DataError

LINE_SECONDS, LIVE_SECONDS = 30.0, 0.2  # between lines, and between updates of the line on a terminal
ROOM_MARGIN = 1.25  # the estimate of the space needed may be too high by this factor


Show = Callable[[int, float | None], None]  # of tokens, and of the share of the source that is read


class Pace:
    """Tokens, rate and time left as a line of text. Tokens of an earlier run do not count as speed."""

    def __init__(self) -> None:
        self.first: tuple[float, int, float] | None = None  # seconds, tokens, share of the source

    def line(self, seconds: float, tokens: int, share: float | None) -> str:
        """The line at a time on some clock, with `share` of the source read (None: unknown)."""
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
def progress_line(folder: Path, wanted: bool) -> Iterator[Show]:
    """A function that shows the progress: one live line on a terminal, else a line now and then."""
    pace, last, live = Pace(), time.monotonic(), sys.stderr.isatty()

    def show(tokens: int, share: float | None) -> None:
        nonlocal last
        now = time.monotonic()
        line = f"{folder}: {pace.line(now, tokens, share)}"
        if wanted and now > last + (LIVE_SECONDS if live else LINE_SECONDS):
            last = now
            print(f"\r\x1b[K{line}" if live else line, end="" if live else "\n", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        if wanted and live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def note(text: str, wanted: bool) -> None:
    """A line on stderr, above the live one."""
    if wanted:
        print(f"\r\x1b[K{text}" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


def check_room(folder: Path, written: int, share: float | None) -> None:
    """Refuse a preparation that the disk has no room for.

    Args:
        written: bytes of token ids so far.
        share: share of the source that they come from; nothing is checked if it is unknown.

    Raises:
        DataError: the rest needs more space than is free.
    """
    if not share:
        return
    needed, free = written * (1 / share - 1), shutil.disk_usage(folder).free
    if needed > ROOM_MARGIN * free:
        raise DataError(
            f"{folder} needs about {needed / 1e9:,.2f} GB and {free / 1e9:,.2f} GB are free: "
            "make room, or name a folder on another disk with --out"
        )
