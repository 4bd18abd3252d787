"""A study report's numbers as text: CSV files with every digit, and the tables of the terminal.

Both take the payload that `analysis` makes. Names, notes and reasons come from files that anyone may have written: a
spreadsheet runs none of them as a formula, and the terminal takes none of them as markup or as a control code.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import floor, log10
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gptlab.report.reading import human
from gptlab.status import STATUSES

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")  # what spreadsheets begin a formula with, or skip before one
STYLES = {
    "better": "green",
    "worse": "red",
    "equivalent": "cyan",
    "diverges": "yellow",
    "reference diverges": "yellow",
    "confirmed": "green",
    "rejected": "red",
}
WIDE = 112  # columns from which on the whole table fits the terminal
MOST_FAILURES = 12  # lines on the terminal; the CSV file has them all


# -- words and numbers that figures and tables share ----------------------------------------------------------------


def one_line(text: str) -> str:
    """Text without line breaks and control codes, which could break a table, an SVG file or a terminal."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


def decimals(metric: Mapping[str, Any]) -> int:
    """Digits after the point that show a tenth of the margin; 4 where there is none."""
    margin = metric["margin"]
    return min(6, max(2, 1 - floor(log10(margin)))) if margin else 4


def interval(value: float, low: float | None, high: float | None, digits: int) -> str:
    """`+0.012 [-0.030, 0.054]`, or `+0.012` where there is no interval."""
    ends = "" if low is None or high is None else f" [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{value:+.{digits}f}{ends}"


def runs_of(arm: Mapping[str, Any]) -> int:
    """How many runs an arm was to have, or has where that is more."""
    return max(arm["planned"], sum(arm["statuses"].values()))


def went_wrong(arm: Mapping[str, Any]) -> str:
    """What happened to the runs that did not complete: `2 of 3 diverged`; empty where all did."""
    counts = {status.replace("_", " "): n for status, n in arm["statuses"].items() if status != "completed" and n}
    return ", ".join(f"{n} of {runs_of(arm)} {status}" for status, n in counts.items())


def stems(names: Iterable[str]) -> list[str]:
    """For each study's name what its files' names begin with: safe on any file system, and no two alike."""
    taken: list[str] = []
    for name in names:
        stem = unique = re.sub(r"[^\w.+-]+", "-", name).strip("-.") or "study"
        while unique.lower() in map(str.lower, taken):
            unique = f"{stem}-{len(taken) + 1}"
        taken.append(unique)
    return taken


# -- CSV ------------------------------------------------------------------------------------------------------------


def write_csv(payload: Mapping[str, Any], out: Path) -> list[Path]:
    """Write the tables of a report, with every digit; units stand in the headers, and an empty cell is not known.

    Args:
        out: folder, made where it is missing.

    Returns:
        The files: `<study>-arms.csv`, `<study>-runs.csv` and, where there are any, `<study>-equal.csv` (losses at equal
        steps, tokens and time), `<study>-failures.csv`, `questions.csv`, `ranks.csv` and `flips.csv`.
    """
    studies, across = payload["studies"], payload["across"]
    tables: dict[str, list[dict[str, Any]]] = {}
    for study, stem in zip(studies, stems(study["name"] for study in studies), strict=True):
        tables[f"{stem}-arms"] = [_arm(study, arm) for arm in study["arms"]]
        tables[f"{stem}-runs"] = _runs(study)
        tables[f"{stem}-equal"] = _equal_rows(study)
        tables[f"{stem}-failures"] = study["failures"]
    asked = [*studies, across] if across else studies
    tables["questions"] = [{"study": of["name"]} | question for of in asked for question in of["questions"]]
    if across:
        tables["ranks"] = [
            {"arm": row["arm"]}
            | {f"rank in {name}": rank for name, rank in zip(across["studies"], row["ranks"], strict=True)}
            | {"flip": row["flip"]}
            for row in across["ranks"]
        ]
        tables["flips"] = across["flips"]

    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name, rows in tables.items():
        if rows:
            written.append(out / f"{name}.csv")
            _write(written[-1], rows)
    return written


def _write(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    headers = list(dict.fromkeys(header for row in rows for header in row))
    with open(file, "w", newline="", encoding="utf-8", errors="backslashreplace") as handle:
        writer = csv.writer(handle)
        writer.writerow([_cell(header) for header in headers])
        writer.writerows([_cell(row.get(header)) for header in headers] for row in rows)


def _cell(value: Any) -> Any:
    """A value as the csv module shall write it: numbers by repr, so that they come back exactly, and text as text."""
    match value:
        case None:
            return ""
        case bool():
            return "true" if value else "false"
        case int() | float():
            return value
        case dict():
            value = json.dumps(value, ensure_ascii=False)
        case list():
            value = "; ".join(map(str, value))
    return f"'{value}" if value.startswith(FORMULA) else value


def _arm(study: Mapping[str, Any], arm: Mapping[str, Any]) -> dict[str, Any]:
    unit, speed = f"[{study['metric']['label']}]", f"[{study['unit']}/s]"
    statuses = list(dict.fromkeys([*STATUSES, *(status for arm in study["arms"] for status in arm["statuses"])]))
    seeds = dict.fromkeys([*map(str, study["seeds"]), *(seed for arm in study["arms"] for seed in arm["values"])])
    row = {"arm": arm["name"], "baseline": arm["name"] == study["baseline"]}
    row |= {key: arm[key] for key in ("group", "note", "settings")}
    row |= {"runs planned": arm["planned"]} | {f"runs {s}": arm["statuses"].get(s, 0) for s in statuses}
    summary = ("n", "mean", "sd", "low", "high")
    row |= _flat("quality", unit, arm["quality"], summary)
    row |= {f"seed {seed} {unit}": arm["values"].get(seed) for seed in seeds}
    row |= _flat("throughput", speed, arm["throughput"], ("value", "low", "high", "n", "of"))
    row |= _flat("speed-up", "[x baseline]", arm["speedup"], ("value", "low", "high", "n", "of"))
    row |= _flat("peak memory", "[GB]", arm["memory_gb"], summary)
    row |= {"peak memory [x baseline]": arm["memory_ratio"], "frontier [share of draws]": arm["frontier"]}
    for column in study["columns"]:
        what, _, of = column["label"].partition(", ")
        row |= _flat(what, f"[{of}]" if of else "", arm["other"].get(column["key"]), summary)
    comparison = arm["comparison"] or {}
    row["verdict"] = comparison.get("verdict")
    row |= _flat("difference", unit, comparison, summary)
    row |= {key: comparison.get(key) for key in ("p", "p_holm", "p_equivalent")}
    row |= {f"{key} {unit}": comparison.get(key) for key in ("mde", "mde_family")}
    row["more_seeds"] = comparison.get("more_seeds")
    row |= _flat("welch", unit, comparison.get("welch"), ("value", "low", "high", "p"))
    return row | {key: comparison.get(key) for key in ("why", "text")}


def _flat(what: str, unit: str, numbers: Mapping[str, Any] | None, keys: Iterable[str]) -> dict[str, Any]:
    """A group of the payload as columns: `quality mean [validation loss, nats]`, but `quality n`, which has no unit."""
    words = {"low": "95% low", "high": "95% high", "value": ""}
    named = {key: " ".join(filter(None, [what, words.get(key, key)])) for key in keys}
    headers = {key: name if key in ("n", "of", "p") or not unit else f"{name} {unit}" for key, name in named.items()}
    return {header: (numbers or {}).get(key) for key, header in headers.items()}


def _equal_rows(study: Mapping[str, Any]) -> list[dict[str, Any]]:
    unit = f"[validation loss, nats a {study['unit'][:-1]}]"
    return [
        {"at equal": equal["what"], "budget": equal["budget"], "arm": arm["name"]}
        | _flat("quality", unit, arm["quality"], ("n", "mean", "sd", "low", "high"))
        | _flat("difference", unit, arm["difference"], ("n", "mean", "sd", "low", "high"))
        for equal in study["equal"]
        for arm in equal["arms"]
    ]


def _runs(study: Mapping[str, Any]) -> list[dict[str, Any]]:
    values = {arm["name"]: arm["values"] for arm in study["arms"]}
    failures = {(failure["arm"], failure["seed"]): failure for failure in study["failures"]}
    rows = []
    for run in study["runs"]:
        failure = failures.get((run["arm"], run["seed"]), {})
        steps = [step for curve in ("train", "val") for step, _ in run[curve]]
        rows.append(
            {
                "arm": run["arm"],
                "seed": run["seed"],
                "status": run["status"],
                "ended [step]": run["ended"],
                "last logged [step]": max(steps, default=None),
                f"{study['metric']['key']} [{study['metric']['label']}]": values.get(run["arm"], {}).get(
                    str(run["seed"])
                ),
                "failure": failure.get("failure"),
                "reason": failure.get("reason"),
                "folder": run["folder"],
            }
        )
    return rows


# -- the terminal ---------------------------------------------------------------------------------------------------


def print_report(payload: Mapping[str, Any], console: Console) -> None:
    """Print a report: a table for each study, what was asked and answered, what to do, and what went wrong."""
    for study in payload["studies"]:
        console.print(Text(one_line(f"{study['name']}: {study['description']}").rstrip(": "), "bold"))
        for table in _tables(study, console.width):
            console.print(table)
        console.print(Text(_legend(study), "dim"))
        for note in study["notes"]:
            console.print(Text(one_line(note), "dim"))
        if study["equal"]:
            console.print(_equal(study))
        _answers(study, console)
        _failures(study, console)
        console.print()
    if across := payload["across"]:
        console.print(Text(one_line(f"{across['name']}: {' and '.join(across['studies'])}"), "bold"))
        console.print(Text(one_line(across["ranking"]["text"])))
        counts = Counter(flip["verdict"] for flip in across["flips"])
        told = ", ".join(f"{n} {verdict}" for verdict, n in counts.most_common())
        _item(console, f"pairs of arms: {told or 'none'}", "", "")
        for flip in across["flips"]:
            if flip["verdict"] == "flips":
                _item(console, f"{flip['arm']} against {flip['reference']}", "flips", flip["text"])
        _answers(across, console)
        console.print()
    for warning in payload["warnings"]:
        _item(console, "warning", "", warning, style="yellow")


def _tables(study: Mapping[str, Any], width: int) -> list[Table]:
    """The table of a study; in two parts where the terminal is narrow, so that an arm stays one line."""
    rows = [_row(study, arm) for arm in study["arms"]]
    arm, runs, quality, difference, verdict, *rest = rows[0]
    parts = [[arm, runs, quality, difference, verdict, *rest]]
    if width < WIDE:
        parts = [[arm, quality, difference, verdict], [arm, runs, *rest]]
    tables = []
    for headers in parts:
        tables.append(Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold"))
        for header in headers:
            tables[-1].add_column(
                Text(header), justify="left" if header in (arm, verdict) else "right", overflow="fold"
            )
        for row in rows:
            tables[-1].add_row(*(row[header] for header in headers))
    return tables


def _equal(study: Mapping[str, Any]) -> Table:
    """Validation losses at equal steps, tokens and time, with the difference from the baseline there."""
    digits = decimals(study["metric"])
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column(Text("validation loss at"))
    for equal in study["equal"]:
        table.add_column(Text(f"{human(equal['budget'])} {equal['what']}"), justify="right", overflow="fold")
    for i, arm in enumerate(study["arms"]):
        row = [Text(one_line(arm["name"]))]
        for equal in study["equal"]:
            quality, d = equal["arms"][i]["quality"], equal["arms"][i]["difference"]
            against = f"  {interval(d['mean'], d['low'], d['high'], digits)}" if d else ""
            row.append(Text(f"{quality['mean']:.{digits}f}{against}" if quality else ""))
        table.add_row(*row)
    return table


def _row(study: Mapping[str, Any], arm: Mapping[str, Any]) -> dict[str, Text]:
    digits, metric = decimals(study["metric"]), one_line(study["metric"]["label"]).replace(", ", ",\n")
    quality, speed, memory = arm["quality"], arm["throughput"], arm["memory_gb"]
    spread = f" ± {quality['sd']:.{digits}f}" if quality and quality["sd"] is not None else ""
    ratio = f" x{arm['speedup']['value']:.2f}" if arm["speedup"] else ""
    comparison = arm["comparison"] or {}
    verdict = comparison.get("verdict", "baseline")
    mean, mde, more = (comparison.get(key) for key in ("mean", "mde", "more_seeds"))
    difference = went_wrong(arm)
    if mean is not None and "diverges" not in verdict:  # what survivors show is no evidence
        difference = interval(mean, comparison["low"], comparison["high"], digits)
    completed = arm["statuses"].get("completed", 0)
    return {
        "arm": Text(one_line(arm["name"])),
        "runs": Text(f"{completed} of {runs_of(arm)}", "" if completed == runs_of(arm) else "yellow"),
        metric: Text(f"{quality['mean']:.{digits}f}{spread}" if quality else ""),
        "difference": Text(difference),
        "verdict": Text(verdict, STYLES.get(verdict, "dim")),
        "detects": Text("" if mde is None else f"{mde:.{digits}f}"),
        "more": Text("" if more is None else f"{more:,}"),
        f"{study['unit']}/s": Text(f"{human(speed['value'])}{ratio}" if speed else ""),
        "GB": Text(f"{memory['mean']:#.3g}".rstrip(".") if memory else ""),
    }


def _legend(study: Mapping[str, Any]) -> str:
    metric = study["metric"]
    margin = f"margin {metric['margin']:g} ({metric['margin_from']})" if metric["margin"] else "no margin was set"
    return one_line(
        f"{study['runs_found']} of {study['runs_planned']} runs. {metric['label']}: {metric['better']} is better; "
        f"mean ± sd. Difference: from {study['baseline']}, paired by seed, 95% interval; verdict after Holm, {margin}. "
        f"Detects: the difference found with 80% power. More: seeds to add that would resolve it."
    )


def _answers(of: Mapping[str, Any], console: Console) -> None:
    for question in of["questions"]:
        _item(console, f"{question['id']} {question['claim']}", question["answer"], question["text"])
    for recommendation in of["recommendations"]:
        _item(console, "recommendation", "", recommendation["text"])


def _failures(study: Mapping[str, Any], console: Console) -> None:
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for failure in study["failures"]:
        groups.setdefault((failure["arm"], failure["status"]), []).append(failure)
    for (arm, status), found in list(groups.items())[:MOST_FAILURES]:
        where = [f"seed {f['seed']}" + ("" if f["step"] is None else f" at step {f['step']:,}") for f in found]
        head = f"{arm}: {len(found)} {status.replace('_', ' ')} ({', '.join(where)})"
        _item(console, head, "", found[0]["reason"], style="yellow")
    if len(groups) > MOST_FAILURES:
        _item(console, f"and {len(groups) - MOST_FAILURES} more arms with failures", "", "", style="yellow")


def _item(console: Console, head: str, verdict: str, text: str, style: str = "") -> None:
    line = Text(one_line(head), style)
    if verdict:
        line.append(": ").append(one_line(verdict), STYLES.get(verdict, "bold"))
    if text := (text or "").removeprefix(f"{verdict}: "):  # texts of comparisons begin with their verdict
        line.append(f": {one_line(text)}", "default")
    console.print(Padding(line, (0, 0, 0, 2), expand=False))
