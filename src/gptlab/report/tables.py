"""A report's numbers as text: CSV files with every digit, and the tables of the terminal and of a notebook.

All take the payload of `analysis`. Names, notes and reasons come from files that anyone may have written, so they are
escaped: no spreadsheet runs them as a formula, and no terminal and no notebook takes them as markup or a control code.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gptlab.files import printable
from gptlab.notebook import html_table
from gptlab.report.effect_tables import (
    factor_rows,
    law_pair_rows,
    law_rows,
    pair_rows,
    print_factors,
    print_laws,
    print_sweeps,
    print_targets,
    ranked,
    sweep_rows,
    target_rows,
)
from gptlab.report.reading import human
from gptlab.report.words import (
    LOOKS,
    LOOKS_ARE_PAID,
    counted,
    interval,
    number_form,
    one_line,
    runs_of,
    shown_verdict,
    stems,
    told_apart,
    went_wrong,
)
from gptlab.status import STATUSES

FORMULA = ("=", "+", "-", "@", "\t", "\n")  # a cell that begins with these may be run as a formula
STYLES = {
    "better": "green",
    "worse": "red",
    "equivalent": "cyan",
    "diverges": "yellow",
    "reference diverges": "yellow",
    "confirmed": "green",
    "rejected": "red",
}
WIDE = 112  # columns: the whole table fits a terminal of this width
OF_ALL = ("overall", "default")  # recommendations from all arms; those from a question say what its answer says
GROUPS = "groups: arms that share a letter cannot be told apart; arms without a letter in common can."
MOST_FAILURES = 12  # lines on the terminal; the CSV file has all failures


# -- CSV ------------------------------------------------------------------------------------------------------------


def write_csv(payload: Mapping[str, Any], out: Path) -> list[Path]:
    """Write the tables of a report with every digit. Headers state units; an empty cell means unknown.

    Args:
        out: folder, created if it is missing.

    Returns:
        The files: `<study>-arms.csv`, `<study>-runs.csv`, and those of `<study>-equal.csv` (losses at equal steps,
        tokens and time), `<study>-factors.csv`, `<study>-sweeps.csv`, `<study>-targets.csv`, `<study>-pairs.csv`,
        `<study>-laws.csv`, `<study>-extrapolated.csv`, `<study>-failures.csv`, `questions.csv`, `ranks.csv` and
        `flips.csv` that have rows.
    """
    studies, across = payload["studies"], payload["across"]
    tables: dict[str, list[dict[str, Any]]] = {}
    for study, stem in zip(studies, stems(study["name"] for study in studies), strict=True):
        tables[f"{stem}-arms"] = [_arm_row(study, arm) for arm in study["arms"]]
        tables[f"{stem}-runs"] = _run_rows(study)
        tables[f"{stem}-equal"] = _equal_rows(study)
        tables[f"{stem}-factors"] = factor_rows(study)
        tables[f"{stem}-sweeps"] = sweep_rows(study)
        tables[f"{stem}-targets"] = target_rows(study)
        tables[f"{stem}-pairs"] = pair_rows(study)
        tables[f"{stem}-laws"] = law_rows(study)
        tables[f"{stem}-extrapolated"] = law_pair_rows(study)
        tables[f"{stem}-failures"] = study["failures"]
    asked = [*studies, across] if across else studies
    tables["questions"] = [
        {"study": of["name"]} | {key: value for key, value in question.items() if key != "comparisons"}
        for of in asked
        for question in of["questions"]
    ]
    tables["comparisons"] = [
        {"question": question["id"]} | row
        for of in asked
        for question in of["questions"]
        for row in question["comparisons"]
    ]
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
            _write_rows(written[-1], rows)
    return written


def _write_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    headers = list(dict.fromkeys(header for row in rows for header in row))
    with open(file, "w", newline="", encoding="utf-8", errors="backslashreplace") as handle:
        writer = csv.writer(handle)
        writer.writerow([_cell(header) for header in headers])
        writer.writerows([_cell(row.get(header)) for header in headers] for row in rows)


def _cell(value: Any) -> Any:
    """A value for the csv module: numbers by repr, so that they read back exactly, and text that is no formula."""
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
    value = printable(value)
    return f"'{value}" if value.startswith(FORMULA) else value


def _arm_row(study: Mapping[str, Any], arm: Mapping[str, Any]) -> dict[str, Any]:
    unit, speed = f"[{study['metric']['label']}]", f"[{study['unit']}/s]"
    statuses = list(dict.fromkeys([*STATUSES, *(status for arm in study["arms"] for status in arm["statuses"])]))
    seeds = dict.fromkeys([*map(str, study["seeds"]), *(seed for arm in study["arms"] for seed in arm["values"])])
    row = {"arm": arm["name"], "baseline": arm["name"] == study["baseline"]}
    row |= {key: arm[key] for key in ("group", "note", "settings")}
    row |= {"runs planned": arm["planned"]} | {f"runs {s}": arm["statuses"].get(s, 0) for s in statuses}
    summary = ("n", "mean", "sd", "low", "high")
    row |= _columns_of("quality", unit, arm["quality"], summary)
    row |= {f"seed {seed} {unit}": arm["values"].get(seed) for seed in seeds}
    row |= _columns_of("throughput", speed, arm["throughput"], ("value", "low", "high", "n", "of"))
    row |= _columns_of("speed-up", "[x baseline]", arm["speedup"], ("value", "low", "high", "n", "of"))
    row |= _columns_of("peak memory", "[GB]", arm["memory_gb"], summary)
    row |= {"peak memory [x baseline]": arm["memory_ratio"], "frontier [share of draws]": arm["frontier"]}
    for column in study["columns"]:
        what, _, of = column["label"].partition(", ")
        row |= _columns_of(what, f"[{of}]" if of else "", arm["other"].get(column["key"]), summary)
    comparison = arm["comparison"] or {}
    row["verdict"] = comparison.get("verdict")
    row |= _columns_of("difference", unit, comparison, summary)
    row |= {key: comparison.get(key) for key in ("p", "p_holm", "p_equivalent", "df")}
    row[f"spread {unit}"] = comparison.get("spread")
    row |= {f"{key} {unit}": comparison.get(key) for key in ("mde", "mde_family")}
    row["more_seeds"] = comparison.get("more_seeds")
    row |= _columns_of("welch", unit, comparison.get("welch"), ("value", "low", "high", "p"))
    row |= {"seeds where better": comparison.get("wins")}
    row |= {f"{key} [diverged, runs]": comparison.get(key) for key in ("diverged", "reference_diverged")}
    row |= {key: comparison.get(key) for key in ("why", "text")}
    if study["groups"]:
        row["groups"] = study["groups"]["letters"].get(arm["name"])
    no_machine = ("throughput", "speed-up", "peak memory", "frontier", "group", "note", "settings")
    return (
        {k: v for k, v in row.items() if k == "groups" or not k.startswith(no_machine)} if study["elsewhere"] else row
    )


def _columns_of(what: str, unit: str, numbers: Mapping[str, Any] | None, keys: Iterable[str]) -> dict[str, Any]:
    """A group of numbers as columns: `quality mean [validation loss, nats]`; `quality n` has no unit."""
    words = {"low": "95% low", "high": "95% high", "value": ""}
    named = {key: " ".join(filter(None, [what, words.get(key, key)])) for key in keys}
    headers = {key: name if key in ("n", "of", "p") or not unit else f"{name} {unit}" for key, name in named.items()}
    return {header: (numbers or {}).get(key) for key, header in headers.items()}


def _equal_rows(study: Mapping[str, Any]) -> list[dict[str, Any]]:
    unit = f"[validation loss, nats per {study['unit'][:-1]}]"
    return [
        {"at equal": equal["what"], "budget": equal["budget"], "arm": arm["name"]}
        | _columns_of("quality", unit, arm["quality"], ("n", "mean", "sd", "low", "high"))
        | _columns_of("difference", unit, arm["difference"], ("n", "mean", "sd", "low", "high"))
        for equal in study["equal"]
        for arm in equal["arms"]
    ]


def _run_rows(study: Mapping[str, Any]) -> list[dict[str, Any]]:
    values, metric = {arm["name"]: arm["values"] for arm in study["arms"]}, study["metric"]
    failures = {(failure["arm"], failure["seed"]): failure for failure in study["failures"]}
    rows = []
    for run in study["runs"]:
        failure = failures.get((run["arm"], run["seed"]), {})
        steps = [step for curve in ("train", "val") for step, _ in run[curve]]
        value = values.get(run["arm"], {}).get(str(run["seed"]))
        row = {key: run[key] for key in ("arm", "seed", "status")}
        row |= {"ended [step]": run["ended"], "last logged [step]": max(steps, default=None)}
        row |= {f"{metric['key']} [{metric['label']}]": value}
        row |= {key: failure.get(key) for key in ("failure", "reason")}
        rows.append(row | {"folder": run["folder"]})
    return rows


# -- the terminal ---------------------------------------------------------------------------------------------------


def print_report(payload: Mapping[str, Any], console: Console) -> None:
    """Print a report: the comparison, then each study, its answers first and its evidence last; then warnings."""
    if across := payload["across"]:
        console.print(Text(one_line(f"{across['name']}: {' and '.join(across['studies'])}"), "bold"))
        _answers(across, console)
        console.print(Text(one_line(across["ranking"]["text"])))
        counts = Counter(flip["verdict"] for flip in across["flips"])
        told = ", ".join(f"{n} {verdict}" for verdict, n in counts.most_common())
        _item(console, f"pairs of arms: {told or 'none'}", "", "")
        for flip in across["flips"]:
            if flip["verdict"] == "flips":
                _item(console, f"{flip['arm']} against {flip['reference']}", "flips", flip["text"])
        _evidence(across, console)
        console.print()
    for study in payload["studies"]:
        console.print(Text(one_line(f"{study['name']}: {study['description']}").rstrip(": "), "bold"))
        _answers(study, console)
        print_laws(study, console)
        for table in _arm_tables(study, console.width):
            console.print(table)
        if told_apart(study) and study["summary"]:
            console.print(Text(one_line(study["summary"])))
        console.print(Text(_explanation(study), "dim"))
        for note in study["notes"]:
            console.print(Text(one_line(note), "dim"))
        if study["equal"]:
            console.print(Text(one_line(_equal_explanation(study)), "dim"))
            console.print(_equal_table(study))
        print_factors(study, console)
        print_sweeps(study, console)
        print_targets(study, console)
        _failures(study, console)
        _evidence(study, console)
        console.print()
    for warning in payload["warnings"]:
        _item(console, "warning", "", warning, style="yellow")


def _arm_tables(study: Mapping[str, Any], width: int) -> list[Table]:
    """The table of a study, in two parts if the terminal is narrow, so that each arm takes one line."""
    rows = [_table_row(study, arm) for arm in ranked(study, study["arms"])]
    arm, runs, quality, difference, verdict, *rest = rows[0]
    parts = [[arm, runs, quality, difference, verdict, *rest]]
    if width < WIDE:
        parts = [[arm, quality, difference, verdict], [arm, runs, *rest]]
        parts = parts if rest else [[arm, runs, quality, difference, verdict]]
    tables = []
    for headers in parts:
        tables.append(Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold"))
        for header in headers:
            side: Literal["left", "right"] = "left" if header in (arm, verdict) else "right"
            tables[-1].add_column(Text(header), justify=side, overflow="fold")
        for row in rows:
            tables[-1].add_row(*(row[header] for header in headers))
    return tables


def _equal_table(study: Mapping[str, Any]) -> Table:
    form = number_form(study)
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column(Text("validation loss at"))
    for equal in study["equal"]:
        table.add_column(Text(f"{human(equal['budget'])} {equal['what']}"), justify="right", overflow="fold")
    for i, arm in enumerate(study["arms"]):
        row = [Text(one_line(arm["name"]))]
        for equal in study["equal"]:
            quality, d = equal["arms"][i]["quality"], equal["arms"][i]["difference"]
            against = f"  {interval(d['mean'], d['low'], d['high'], form)}" if d else ""
            row.append(Text(f"{quality['mean']:{form}}{against}" if quality else ""))
        table.add_row(*row)
    return table


def _table_row(study: Mapping[str, Any], arm: Mapping[str, Any]) -> dict[str, Text]:
    form, metric = number_form(study), one_line(study["metric"]["label"]).replace(", ", ",\n")
    quality, speed, memory = arm["quality"], arm["throughput"], arm["memory_gb"]
    spread = f" ± {quality['sd']:{form}}" if quality and quality["sd"] is not None else ""
    ratio = f" x{arm['speedup']['value']:.2f}" if arm["speedup"] else ""
    comparison = arm["comparison"] or {}
    verdict = shown_verdict(arm)
    mean, mde, more = (comparison.get(key) for key in ("mean", "mde", "more_seeds"))
    difference = went_wrong(arm)
    if mean is not None and "diverges" not in verdict:  # the runs that survived are not a fair sample
        difference = interval(mean, comparison["low"], comparison["high"], form)
    completed = arm["statuses"].get("completed", 0)
    row = {
        "arm": Text(one_line(arm["name"])),
        "runs": Text(f"{completed} of {runs_of(arm)}", "" if completed == runs_of(arm) else "yellow"),
        metric: Text(f"{quality['mean']:{form}}{spread}" if quality else ""),
        "difference": Text(difference),
        "verdict": Text(verdict, STYLES.get(verdict, "dim")),
        "detects": Text("" if mde is None else f"{mde:{form}}"),
        "more": Text("" if more is None else f"{more:,}"),
    }
    if study["groups"]:
        row["groups"] = Text(study["groups"]["letters"].get(arm["name"], ""))
    if study["elsewhere"]:
        return row
    speeds = {f"{study['unit']}/s": Text(f"{human(speed['value'])}{ratio}" if speed else "")}
    return row | speeds | {"GB": Text(f"{memory['mean']:#.3g}".rstrip(".") if memory else "")}


def _explanation(study: Mapping[str, Any]) -> str:
    metric = study["metric"]
    margin = f"margin {metric['margin']:.4g} ({metric['margin_from']})" if metric["margin"] else "no margin was set"
    further = "seeds" if study["paired"] else "runs of each"
    power = (
        f"detects: difference detectable with 80% power. more: further {further} that would resolve it in four of five "
        f"cases if the difference and the spread are as seen; {LOOKS}"
    )
    start = f"{study['runs_found']} of {study['runs_planned']} runs. {metric['label']}: {metric['better']} is better; "
    start += "mean ± sd."
    if study["elsewhere"] and len(study["arms"]) == 1:
        return one_line(start)
    holm = f"Holm over all {counted(study['groups']['family'], 'pair')}" if study["groups"] else "Holm"
    against = study.get("against", study["baseline"])
    holm = "adjustment over the ledger" if study.get("ledger") else holm
    return one_line(
        f"{start} difference: from {against}, {'paired by seed' if study['paired'] else 'unpaired'}, with "
        f"its 95% interval; verdict after {holm}, {margin}. {LOOKS_ARE_PAID if study['most_seeds'] else power}."
        + (f" {GROUPS}" if study["groups"] else "")
    )


def _equal_explanation(study: Mapping[str, Any]) -> str:
    return (
        "At equal cost: validation loss when each run had spent as much as the cheapest run spent in total, and the "
        f"difference from {study['baseline']} (95% interval, not adjusted). Longer runs are read before their learning "
        "rate has decayed, which counts against them."
    )


def _answers(of: Mapping[str, Any], console: Console) -> None:
    """For each question what was found, what it costs and what would change it; without questions, a summary."""
    for question in told_apart(of):
        _item(console, f"{question['id']} {question['claim']}", question["answer"], "")
        for text in (question["sentence"], f"{question['cost']} {question['change']}".strip()):
            if text:
                console.print(Padding(Text(one_line(text)), (0, 0, 0, 5), expand=False))
    if not told_apart(of) and of.get("summary"):
        _item(console, of["summary"], "", "")
    for advice in of["recommendations"]:
        if advice["id"] in OF_ALL:
            _item(console, "recommendation", "", advice["text"])


def _evidence(of: Mapping[str, Any], console: Console) -> None:
    for question in told_apart(of):
        _item(console, f"evidence on {question['id']}: {question['text']}", "", "", "dim")


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
    if text := (text or "").removeprefix(f"{verdict}: "):  # texts of comparisons start with the verdict
        line.append(f": {one_line(text)}", "default")
    console.print(Padding(line, (0, 0, 0, 2), expand=False))


# -- in a notebook --------------------------------------------------------------------------------------------------


def report_html(payload: Mapping[str, Any]) -> str:
    """What a notebook shows of a report: the answers, the arms, what is recommended and what to beware of."""
    parts = []
    for study in payload["studies"]:
        caption = f"{study['name']}: {study['runs_found']} of {study['runs_planned']} runs"
        parts += _answers_html(study)
        found = study.get("sweeps") or {"sweeps": [], "drifts": []}
        parts += [f"<p>{escape(one_line(one['text']))}</p>" for one in (*found["sweeps"], *found["drifts"])]
        rows = [_table_row(study, arm) for arm in study["arms"]]
        head = [title.replace("\n", " ") for title in rows[0]] if rows else []
        parts.append(html_table(head, [[cell.plain for cell in row.values()] for row in rows], caption))
    parts += _answers_html(payload["across"]) if payload["across"] else []
    parts += [f"<p>warning: {escape(one_line(text))}</p>" for text in payload["warnings"]]
    return "".join(parts)


def _answers_html(of: Mapping[str, Any]) -> list[str]:
    rows = [[q["id"], q["claim"], q["answer"], q["sentence"]] for q in told_apart(of)]
    says = [] if rows else [of.get("summary") or ""]
    says += [advice["text"] for advice in of["recommendations"] if advice["id"] in OF_ALL]
    table = [html_table(["question", "claim", "answer", "found"], rows)] if rows else []
    return table + [f"<p>{escape(one_line(text))}</p>" for text in says if text]
