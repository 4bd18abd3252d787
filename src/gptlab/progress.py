"""Progress of work that takes a while: a line on stderr with what is done, a bar, a percent and the time left."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from gptlab.files import printable
from gptlab.notebook import COLUMNS, Display
from gptlab.streams import patient

if TYPE_CHECKING:  # `gptlab --help` does without
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

PLAIN_SECONDS = 10.0  # between lines where the output is no terminal, and before the first
LIVE_SECONDS, NOTEBOOK_SECONDS = 0.25, 0.5  # between updates
BAR, NARROWEST_BAR = 20, 6  # columns

T = TypeVar("T")
Tell = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and of how much (0: unknown)."""
Count = Callable[[int, int], None]
"""The same of one thing."""


def tell_nobody(*_: object) -> None:
    pass


class Progress:
    """A context that shows what goes on.

    On a terminal it is one line that is drawn again and is gone at the end, in a notebook one display, elsewhere a
    plain line now and then. Of several ranks the first shows it. Inside, print to stderr with `message`, and to stdout
    not at all.

    Args:
        what: what is being done first.
        wanted: False shows nothing.
        of: what all of it is about, shown first.
    """

    def __init__(self, what: str, wanted: bool = True, of: str = "") -> None:
        self.head = f"{of}: " if of else ""
        self.wanted = wanted and os.environ.get("RANK", "0") == "0"
        self.console = stderr_console()
        self.live: Live | None = None
        self.display: Display | None = None
        self.shown_at = time.monotonic()
        self._begin(what)

    def _begin(self, what: str) -> None:
        self.what, self.fields = what, list[str]()
        self.share: float | None = None
        self.began, self.pace = time.monotonic(), Pace()

    def __enter__(self) -> Progress:
        if not self.wanted:
            return self
        if self.console.is_jupyter:
            self.display = Display(self.line(COLUMNS))
        elif self.console.is_terminal:
            from rich.live import Live

            self.live = Live(
                self,
                console=self.console,
                transient=True,
                refresh_per_second=1 / LIVE_SECONDS,
                redirect_stdout=False,  # it may be a file
            )
            self.live.start(refresh=True)  # at once: an import may hold up the thread that draws
            self.console.show_cursor(True)  # a process that is killed would leave it hidden
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.live is not None:
            self.live.stop()
        if self.display is not None:
            self.display.show("")

    def tell(self, what: str, done: float = 0, total: float = 0, *fields: str) -> None:
        """Show how far the work is.

        Args:
            what: what is being done. The time left is of this alone.
            done, total: in any unit; a total of 0 is unknown, and the time that has passed is shown instead.
            fields: what else to say, the most important first.
        """
        if another := what != self.what:
            self._begin(what)
        self.share, self.fields, now = min(done / total, 1.0) if total else None, [*fields], time.monotonic()
        if self.share is not None:
            self.pace.at(self.share)
        if self.live is not None and another:  # else it draws itself
            self.live.refresh()
        if not self.wanted or self.live is not None:
            return
        since = now - self.shown_at
        if self.display is not None and since >= NOTEBOOK_SECONDS:
            self.shown_at = now
            self.display.show(self.line(COLUMNS))
        elif self.display is None and since >= PLAIN_SECONDS:
            self.shown_at = now
            says = ", ".join([*self._times(), *self.fields])
            self.message(f"{self.head}{self.what}" + f": {says}" * bool(says))

    def tell_share(self, what: str, share: float | None, *fields: str) -> None:
        """The same of a share between 0 and 1; None is unknown."""
        self.tell(what, share or 0.0, share is not None, *fields)

    def each(self, what: str, items: Iterable[T], total: int) -> Iterator[T]:
        """The items, each told of when it is asked for."""
        for done, item in enumerate(items):
            self.tell(what, done, total)
            yield item

    def message(self, text: str) -> None:
        """A line on stderr, above the progress."""
        if self.wanted:
            self.console.print(printable(text), markup=False, highlight=False, soft_wrap=self.live is None)

    def line(self, width: int) -> str:
        """The line, at most `width` columns wide. What is being done is cut first, the percent and the time never."""
        times = "  ".join(self._times())
        room = width - len(times) - 2
        if self.share is None:
            return fitted([cut(printable(self.head + self.what), room), *filter(None, [times]), *self.fields], width)
        what = cut(printable(self.head + self.what), room - NARROWEST_BAR - 2)
        length = min(BAR, room - 2 - columns(what))
        bar = drawn_bar(self.share, length, self.console.encoding) if length >= NARROWEST_BAR else ""
        return fitted([*filter(None, [what, bar]), times, *self.fields], width)

    def _times(self) -> list[str]:
        """The percent and the time left; where they are unknown, the time that has passed."""
        if self.share is None:
            passed = time.monotonic() - self.began
            return [clock(passed)] if passed >= 1 else []
        return [f"{int(100 * self.share):3d}%", f"{clock(self.pace.seconds_left())} left"]

    def __rich__(self) -> Text:
        from rich.text import Text

        return Text(self.line(self.console.width - 1), no_wrap=True, overflow="crop")


class Pace:
    """Time left, at the pace since the first share: what was done before is no speed of ours."""

    def __init__(self) -> None:
        self.first: tuple[float, float] | None = None  # when, and the share that was done then
        self.last = 0.0, 0.0

    def at(self, share: float) -> None:
        self.last = time.monotonic(), share
        self.first = self.first or self.last

    def seconds_left(self) -> float | None:
        if self.first is None or self.last[1] <= self.first[1]:
            return None
        (began, before), (at, share) = self.first, self.last
        return max((at - began) * (1 - share) / (share - before) - (time.monotonic() - at), 0.0)


def stderr_console() -> Console:
    """A console on stderr for what may be lost. It draws only on a terminal that can, whatever FORCE_COLOR says."""
    from rich.console import Console

    file = patient(sys.stderr)
    return Console(file=file, force_terminal=file.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"))


def print_folded(text: str) -> None:
    """Print on stdout; on a terminal the lines are broken between words."""
    if sys.stdout is not None and sys.stdout.isatty():
        width = max(shutil.get_terminal_size().columns - 1, 20)
        fold = partial(textwrap.wrap, width=width, break_long_words=False, break_on_hyphens=False)
        text = "\n".join(line for one in text.splitlines() for line in fold(one, subsequent_indent="    ") or [""])
    print(text)


def clock(seconds: float | None) -> str:
    """A time as 0:05, 1:02:03 or 1d 2:03:04; -:-- for None."""
    if seconds is None:
        return "-:--"
    hours, rest = divmod(round(seconds), 3600)
    days = f"{hours // 24}d " if hours >= 24 else ""
    return f"{days}{hours % 24}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def drawn_bar(share: float, length: int, encoding: str) -> str:
    full = round(length * share)
    done, left = "━╌" if encoding.lower().startswith("utf") else "#-"
    return done * full + left * (length - full)


def columns(text: str) -> int:
    """Columns that a text takes on a terminal."""
    from rich.cells import cell_len

    return cell_len(text)


def fitted(fields: Sequence[str], width: int) -> str:
    """The fields that fit into a line, from the first on."""
    line = ""
    for field in fields:
        longer = f"{line}  {field}" if line else field
        if columns(longer) > width:
            break
        line = longer
    return line


def cut(text: str, width: int) -> str:
    """A text, or its beginning and "...", at most `width` columns wide; "" where there is no room for that."""
    if columns(text) <= width:
        return text
    while text and columns(text) > width - 3:
        text = text[:-1]
    return f"{text}..." if text else ""
