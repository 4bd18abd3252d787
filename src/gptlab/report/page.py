"""The report as one web page: a payload in, one HTML file out that needs no network and no file beside it.

The page's own text, style and script stand in page/. Data goes into it as JSON only, and the script shows it through
text nodes, so that a `<` in an arm's name is a `<` on the screen. A policy in the head forbids the browser every
request, and every script and style but these.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

from gptlab.rundir import write_atomically

SCRIPTS = ("base.js", "table.js", "charts.js", "page.js")  # in this order they are one script
DIGITS = 5  # of a loss in a curve: a tenth of a pixel where a chart of 400 pixels shows a tenth of the loss


def write_page(payload: dict[str, Any], file: Path) -> None:
    """Write the page of a report; its folder is made where there is none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, render_page(payload))


def render_page(payload: dict[str, Any]) -> str:
    """The page of a report as HTML.

    Args:
        payload: what `analysis` makes of studies. Its curves are thinned here no further, but rounded.

    Raises:
        ValueError: the payload holds a NaN or an infinity.
    """
    style, script = _read("page.css"), "".join(_read(name) for name in SCRIPTS)
    policy = {
        "default-src": "'none'",
        "script-src": _hash(script),
        "style-src": _hash(style),
        "img-src": "data:",  # the empty icon, so that no browser asks for one
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    parts = {
        "policy": "; ".join(f"{what} {source}" for what, source in policy.items()),
        "title": html.escape(str(payload["title"])),
        "style": style,
        "payload": _embedded(_packed(payload)),
        "script": script,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _read("page.html"))


def _read(name: str) -> str:
    return (resources.files("gptlab") / "report" / "page" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """A script or style as a Content-Security-Policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _embedded(value: Any) -> str:
    """JSON that a script element can hold: nothing in it ends the element, opens a comment or breaks a line.

    json.dumps writes U+2028 and every other character beyond ASCII as an escape already.
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")


def _packed(payload: dict[str, Any]) -> dict[str, Any]:
    """The payload with each curve as two lists, steps and rounded losses, which halves the page."""
    studies = []
    for study in payload["studies"]:
        runs = [run | {kind: _curve(run.get(kind)) for kind in ("train", "val")} for run in study["runs"]]
        means = {arm: {kind: _curve(curve) for kind, curve in kinds.items()} for arm, kinds in study["means"].items()}
        studies.append(study | {"runs": runs, "means": means})
    return payload | {"studies": studies}


def _curve(points: list[list[float | None]] | None) -> list[list[float | None]]:
    """[[step, loss], ...] as [[step, ...], [loss, ...]]."""
    points = points or []
    losses = [None if loss is None else float(f"{loss:.{DIGITS}g}") for _, loss in points]
    return [[step for step, _ in points], losses]
