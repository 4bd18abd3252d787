"""A report, or runs, as one web page: a payload in, one HTML file out that needs no network and no other file.

The text, style and scripts of the pages are in page/. Data enters the page as JSON only, and the script shows it
through text nodes, so a `<` in an arm's name is a `<` on the screen. A policy in the head forbids the browser every
request, and every script and style except the page's own.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from gptlab.report.curves import thin
from gptlab.rundir import write_atomically

SHARED = ("base.js", "table.js", "picture.js", "charts.js", "curves.js")
REPORT, RUNS = (
    (*SHARED, "effects.js", "sweeps.js", "laws.js", "page.js"),
    (*SHARED, "runs.js"),
)  # scripts of the two pages, joined in this order
MOST_POINTS = 400_000  # of all curves of a report together: some 6 MB
DIGITS = 5  # of a loss in a curve: a tenth of a pixel where a chart of 400 pixels shows a tenth of the loss


def write_page(payload: dict[str, Any], file: Path) -> None:
    """Write the page of a report; its folder is created if it is missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, render_page(payload))


def render_page(payload: dict[str, Any]) -> str:
    """The page of a report as HTML.

    Args:
        payload: as `analyse` returns it. Losses of its curves are rounded here, and curves thinned if there are many.

    Raises:
        ValueError: the payload holds a NaN or an infinity.
    """
    return fill_page(_packed(payload), REPORT)


def fill_page(payload: dict[str, Any], scripts: Sequence[str], connect: str = "'none'") -> str:
    """A page with a payload and scripts of page/; `connect`: where the policy lets its script connect to."""
    style, script = _asset("page.css"), "".join(_asset(name) for name in scripts)
    policy = {
        "default-src": "'none'",
        "connect-src": connect,
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
        "payload": embedded(payload),
        "script": script,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _asset("page.html"))


def _asset(name: str) -> str:
    return (resources.files("gptlab") / "report" / "page" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """The hash by which a Content-Security-Policy allows a script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def embedded(value: Any) -> str:
    """JSON for a script element: nothing in it ends the element, opens a comment or breaks a line.

    json.dumps already escapes U+2028 and every other character beyond ASCII.
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")


def _packed(payload: dict[str, Any]) -> dict[str, Any]:
    """The payload with each curve as two lists, steps and rounded losses, which halves the size of the page."""
    curves = [
        curve
        for study in payload["studies"]
        for of in (*study["runs"], *study["means"].values())
        for kind in ("train", "val")
        if (curve := of.get(kind))
    ]
    most = MOST_POINTS // len(curves) if sum(map(len, curves)) > MOST_POINTS else 0
    studies = []
    for study in payload["studies"]:
        runs = [run | {kind: _two_lists(run.get(kind), most) for kind in ("train", "val")} for run in study["runs"]]
        means = {
            arm: {kind: _two_lists(curve, most) for kind, curve in kinds.items()}
            for arm, kinds in study["means"].items()
        }
        groups = study.get("groups")  # of whose pairs, up to half a million, the page shows none
        groups = groups and {key: value for key, value in groups.items() if key != "pairs"}
        studies.append(study | {"runs": runs, "means": means, "groups": groups})
    return payload | {"studies": studies}


def _two_lists(points: list[list[float | None]] | None, most: int = 0) -> list[list[float | None]]:
    """[[step, loss], ...] as [[step, ...], [loss, ...]], with about `most` points if that is not 0."""
    steps, losses = ([*axis] for axis in zip(*points, strict=True)) if points else ([], [])
    if most and len(steps) > most:
        x, y = thin(np.array(steps), np.array(losses, dtype=np.float64), most)
        steps, losses = x.tolist(), [None if math.isnan(loss) else loss for loss in y.tolist()]
    return [steps, [None if loss is None else float(f"{loss:.{DIGITS}g}") for loss in losses]]
