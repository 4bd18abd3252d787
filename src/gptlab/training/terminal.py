"""What a run shows while it trains: two lines on a terminal, one display in a notebook, plain lines elsewhere."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

from rich.live import Live
from rich.text import Text

from gptlab.files import printable
from gptlab.notebook import COLUMNS, Display
from gptlab.progress import clock, drawn_bar, fitted, stderr_console

PLAIN_SECONDS = 6.0  # between training lines in a file or a batch system: at most ten a minute
LIVE_SECONDS = 0.5


class Terminal:
    """The status of a run, and messages above it.

    Args:
        total: the last step.
        step: of the checkpoint from which the run continues, or -1.
        quiet: show nothing.
    """

    def __init__(self, total: int, step: int, quiet: bool = False) -> None:
        self.total, self.step, self.quiet = total, max(step, 0), quiet
        self.console = stderr_console()
        self.fields: list[str] = []
        self.doing = "starting"
        self.began, self.first, self.shown = time.monotonic(), max(step, 0), -PLAIN_SECONDS
        self.live: Live | None = None
        self.display: Display | None = None
        if quiet:
            return
        if self.console.is_jupyter:
            self.display = Display()
            self._update(0.0)
        elif self.console.is_terminal:
            self.live = Live(self, console=self.console, transient=True, refresh_per_second=1 / LIVE_SECONDS)
            self.live.start(refresh=True)  # at once: an import may hold up the thread that draws

    def message(self, text: str) -> None:
        """A line above the status."""
        if self.display is not None:
            self.display.message(printable(text))
        elif not self.quiet:
            self.console.print(printable(text), markup=False, highlight=False, soft_wrap=self.live is None)

    def status(self, step: int, fields: Sequence[str]) -> None:
        """What a training line says, the most important first."""
        self.step, self.fields, self.doing = step, list(fields), ""
        self._update(LIVE_SECONDS)
        if self.live is None and self.display is None and time.monotonic() - self.shown > PLAIN_SECONDS:
            self.shown = time.monotonic()
            self.message(f"step {step}/{self.total}  {'  '.join(fields)}")

    def busy(self, doing: str) -> None:
        """What goes on between two steps; "" when it is over."""
        self.doing = doing
        self._update(LIVE_SECONDS)

    def evaluation(self, step: int, fields: Sequence[str]) -> None:
        """Scores on one line: on a terminal as many as it holds, elsewhere all."""
        head = f"step {step}/{self.total}"
        everything = [head, *fields]
        self.message("  ".join(everything) if self.live is None else fitted(everything, self.console.width))

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()
        self._update(0.0)

    def lines(self, width: int) -> tuple[str, str]:
        """The two lines of the status, each at most `width` characters long."""
        share = self.step / self.total if self.total else 1.0
        head = f"step {self.step:,}/{self.total:,} "
        tail = f" {share:4.0%}  {self._left()} left"
        room = width - len(head) - len(tail)
        bar = drawn_bar(share, room, self.console.encoding) if room >= 4 else ""
        return f"{head}{bar}{tail}"[:width], fitted([*([self.doing] if self.doing else []), *self.fields], width)

    def _left(self) -> str:
        """Time left, at the pace since this process began."""
        done = self.step - self.first
        if done < 2:
            return clock(None)
        return clock((time.monotonic() - self.began) / done * (self.total - self.step))

    def __rich__(self) -> Text:
        return Text("\n".join(self.lines(self.console.width)), no_wrap=True, overflow="crop")

    def _update(self, seconds: float) -> None:
        if self.display is not None and time.monotonic() - self.shown >= seconds:
            self.shown = time.monotonic()
            self.display.show("\n".join(self.lines(COLUMNS)))


def small_curve(values: Sequence[float], width: int, height: int = 6) -> list[str]:
    """A curve in blocks, with its highest and lowest value; [] for fewer than two values."""
    if len(values) < 2 or width < 20:
        return []
    label = max(len(f"{value:.3f}") for value in (max(values), min(values)))
    columns = min(width - label - 2, len(values) if len(values) > 20 else 20)
    ends = [i * len(values) // columns for i in range(columns + 1)]
    means = [sum(values[a : max(b, a + 1)]) / len(values[a : max(b, a + 1)]) for a, b in itertools.pairwise(ends)]
    low, high = min(means), max(means)
    levels = [round((mean - low) / ((high - low) or 1) * (8 * height - 1)) + 1 for mean in means]
    rows = []
    for row in reversed(range(height)):
        blocks = "".join(" ▁▂▃▄▅▆▇█"[max(0, min(8, level - 8 * row))] for level in levels)
        edge = f"{high:.3f}" if row == height - 1 else f"{low:.3f}" if row == 0 else ""
        rows.append(f"{edge:>{label}} ┤{blocks}".rstrip())
    return rows
