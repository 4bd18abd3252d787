"""What a notebook shows: values as HTML, and text in one place that changes as it grows old."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

COLUMNS = 100  # of text
MOST_MESSAGES = 12  # in a display


def html_table(head: Sequence[str], rows: Iterable[Sequence[Any]], caption: str = "") -> str:
    """A table as HTML; every text is escaped.

    >>> html_table(["step", "loss"], [[1000, 2.5]])
    '<table><tr><th ...>step</th>...'

    Args:
        head: titles of the columns; [] for none.
        rows: texts and numbers, None for an empty cell. Numbers stand on the right.
        caption: a line above the table.
    """
    titles = "".join(f'<th style="text-align:left">{escape(title)}</th>' for title in head)
    lines = [f"<tr>{titles}</tr>"] if head else []
    lines += [f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows]
    above = f'<caption style="text-align:left">{escape(caption)}</caption>' if caption else ""
    return f"<table>{above}{''.join(lines)}</table>"


def _cell(value: Any) -> str:
    side = "right" if isinstance(value, int | float) else "left"
    return f'<td style="text-align:{side}">{escape(short_value(value))}</td>'


def short_value(value: Any) -> str:
    """A value as a person reads it: 76,800, 2.4567, 3e-04, and a text as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:.5g}"


class Display:
    """One place of a notebook: the newest messages, and below them a text that is replaced as it changes."""

    def __init__(self, text: str = "") -> None:
        from IPython.display import display

        self.messages: deque[str] = deque(maxlen=MOST_MESSAGES)
        self.text = text
        self._handle: Any = display(self._page(), raw=True, display_id=True)

    def message(self, text: str) -> None:
        self.messages.append(text)
        self.show(self.text)

    def show(self, text: str) -> None:
        self.text = text
        self._handle.update(self._page(), raw=True)

    def _page(self) -> dict[str, str]:
        text = "\n".join([*self.messages, "", self.text]).strip("\n")
        html = f'<pre style="line-height: 1.3">{escape(text, quote=False)}</pre>' if text else ""
        return {"text/plain": text, "text/html": html}
