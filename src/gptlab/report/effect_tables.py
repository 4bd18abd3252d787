"""The tables of a factorial's effects, of sweeps and of times to a target, for CSV files and the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gptlab.report.effects import effect_name
from gptlab.report.reading import duration, human
from gptlab.report.words import interval, number_form, one_line

STYLES = {"better": "green", "worse": "red", "equivalent": "cyan", "interact": "yellow"}
ENDS = {"low": "95% low", "high": "95% high"}


def factor_rows(study: Mapping[str, Any]) -> list[dict[str, Any]]:
    unit = f"[{study['metric']['label']}]"
    return [
        {
            "effect": effect_name(effect),
            "kind": effect["kind"],
            "note": effect["note"],
            f"change {unit}": effect["effect"],
            f"simultaneous 95% low {unit}": effect["low"],
            f"simultaneous 95% high {unit}": effect["high"],
            **{key: effect[key] for key in ("p", "p_adjusted", "verdict", "text")},
        }
        for effect in (study.get("factors") or {}).get("effects", [])
    ]


def sweep_rows(study: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The best value of each sweep, and by how much it moves."""
    found, unit = study.get("sweeps") or {"sweeps": [], "drifts": []}, f"[{study['metric']['label']}]"
    percent = f"{found['level']:.0%}" if found["sweeps"] else ""
    rows = []
    for sweep in found["sweeps"]:
        best = sweep["optimum"] or {}
        row = {"sweep": sweep["name"], "setting": sweep["setting"], "best value": best.get("value")}
        row |= {f"best value {percent} {end}": best.get(end) for end in ("low", "high")}
        row |= {f"at it {unit}": best.get("loss")}
        row |= {f"at it {percent} {end} {unit}": best.get(f"loss_{end}") for end in ("low", "high")}
        row |= {f"curvature {unit} per squared ln": best.get("curvature")}
        row |= {f"curvature {percent} {end}": best.get(f"curvature_{end}") for end in ("low", "high")}
        row |= {key: best.get(key) for key in ("lowest", "highest", "edge")}
        rows.append(row | {"left_out": [one["arm"] for one in sweep["left_out"]], "text": sweep["text"]})
    for drift in found["drifts"]:
        row = {"sweep": drift["of"], "setting": drift["setting"], "from": drift["from"], "to": drift["to"]}
        row |= {"over": drift["over"], "drift": drift["value"]}
        rows.append(row | {f"drift {percent} {end}": drift[end] for end in ("low", "high")} | {"text": drift["text"]})
    return rows


def target_rows(study: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for target in study.get("targets") or []:
        for arm in target["arms"]:
            row = {"target": target["target"], "arm": arm["name"], "runs": arm["runs"], "reached": arm["reached"]}
            for unit in target["units"]:
                time, ratio = arm[unit], arm["ratio"][unit] if arm["ratio"] else {}
                row |= {f"{unit} ({key})": time[key] for key in ("of", "value")}
                row |= {f"{unit} {name}": time[key] for key, name in ENDS.items()}
                row |= {f"times fewer {unit} than {study['baseline']}": ratio.get("value")}
                row |= {f"times fewer {unit} {name}": ratio.get(key) for key, name in ENDS.items()}
            rows.append(row | {"text": arm["text"]})
    return rows


def pair_rows(study: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every pair of arms, where all are compared."""
    if not study["groups"]:
        return []
    own = [arm["comparison"] for arm in study["arms"] if arm["comparison"]]
    unit, keys = f"[{study['metric']['label']}]", ("p", "p_holm", "p_equivalent", "verdict", "why")
    return [
        {"a": row["a"], "b": row["b"], f"difference {unit}": row["mean"]}
        | {f"{name} {unit}": row[key] for key, name in ENDS.items()}
        | {key: row[key] for key in keys}
        for row in [*own, *study["groups"]["pairs"]]
    ]


def law_rows(study: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The laws of a ladder, one row each: the coefficients, or why there is none."""
    return [
        {"arm": arm["arm"]} | {key: value for key, value in law.items() if key != "formula"}
        for arm in (study.get("laws") or {"arms": []})["arms"]
        for law in arm["laws"]
    ]


def law_pair_rows(study: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Arms of a ladder against the baseline at the sizes that were asked for, and where they cross."""
    rows = []
    for pair in (study.get("laws") or {"pairs": []})["pairs"]:
        sides = {key: pair[key] for key in "ab"}
        crossing = {f"zero at {key}": value for key, value in (pair["crossing"] or {}).items()}
        rows += [sides | row | crossing | {"text": pair["text"]} for row in pair["at"] or [{}]]
    return rows


def print_laws(study: Mapping[str, Any], console: Console) -> None:
    if not (laws := study.get("laws")):
        return
    for text in law_sentences(laws):
        console.print(Text(one_line(text)))
    table = _table(("arm", "left"), ("law", "left"), ("", "left"), ("spread", "right"))
    for arm in laws["arms"]:
        for law in arm["laws"]:
            told = law["formula"] or f"no law: {law['why']}"
            remarks = f" ({'; '.join(law['remarks'])})" if law.get("remarks") else ""
            spread = f"{law['spread']:.2%}" if law.get("spread") else ""
            table.add_row(*map(Text, (one_line(arm["arm"]), law["law"], one_line(f"{told}{remarks}"), spread)))
    console.print(table)
    for note in laws["notes"]:
        console.print(Text(one_line(note), "dim"))


def law_sentences(laws: Mapping[str, Any]) -> list[str]:
    """The plain sentence of each pair of arms, and of each prediction of a size that was held out."""
    held = [f"{arm['held_out']['text']}." for arm in laws["arms"] if arm["held_out"]]
    return [*(pair["text"] for pair in laws["pairs"]), *held]


def ranked(study: Mapping[str, Any], arms: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows of arms, the best mean first where all pairs are compared."""
    if not study["groups"]:
        return list(arms)
    return sorted(arms, key=lambda arm: study["groups"]["order"].index(arm["name"]))


def print_factors(study: Mapping[str, Any], console: Console) -> None:
    factors = study.get("factors")
    if not factors:
        return
    console.print(Text(one_line(f"Factors: {factors['text']}.")))
    if factors["effects"]:
        form = number_form(study)
        table = _table(
            ("change", "left"), (f"effect on {study['metric']['label']}", "right"), ("p", "right"), ("", "left")
        )
        for effect in factors["effects"]:
            p = "" if effect["p"] is None else f"{effect['p_adjusted']:.2g}"
            number = interval(effect["effect"], effect["low"], effect["high"], form)
            verdict = Text(effect["verdict"], STYLES.get(effect["verdict"], "dim"))
            table.add_row(Text(one_line(effect_name(effect))), Text(number), Text(p), verdict)
        console.print(table)
    for note in (factors["design"], *factors["notes"]):
        console.print(Padding(Text(one_line(note), "dim"), (0, 0, 0, 2), expand=False))


def print_sweeps(study: Mapping[str, Any], console: Console) -> None:
    found = study.get("sweeps")
    for one in (*found["sweeps"], *found["drifts"]) if found else ():
        console.print(Padding(Text(one_line(one["text"])), (0, 0, 0, 2), expand=False))


def print_targets(study: Mapping[str, Any], console: Console) -> None:
    for target in study.get("targets") or []:
        units = target["units"]
        means = _means(study, target["target"])
        side = "at most" if study["metric"]["better"] == "lower" else "at least"
        head = (f"{target['label']} {target['target']:g}", "left"), (f"mean {side} it", "left")
        table = _table(
            *head[: 2 if means else 1], ("runs that reach it", "right"), *((unit, "right") for unit in units)
        )
        for arm in ranked(study, target["arms"]):
            cells = [Text(_time_cell(arm, unit)) for unit in units]
            told = [means.get(arm["name"], Text())] if means else []
            table.add_row(Text(one_line(arm["name"])), *told, f"{arm['reached']} of {arm['runs']}", *cells)
        console.print(table)
        if means:
            text = f"mean: one-sided t over an arm's runs; p after Holm over {len(_tabled(study))} targets"
            console.print(Padding(Text(text, "dim"), (0, 0, 0, 2), expand=False))
    if study.get("targets"):
        console.print(Padding(Text(study["targets"][0]["note"], "dim"), (0, 0, 0, 2), expand=False))


def _tabled(study: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [question for question in study["questions"] if question.get("tabled")]


def _means(study: Mapping[str, Any], target: float) -> dict[str, Text]:
    """For each arm whether its mean reaches a target, where that was asked of all arms."""
    found = {}
    for question in _tabled(study):
        if question["target"] == target:
            p = "" if question["p"] is None or question["answer"] == "not run" else f" (p = {question['p']:.2g})"
            style = {"confirmed": "green", "rejected": "red"}.get(question["answer"], "dim")
            found[question["contrast"][0]] = Text(f"{question['answer']}{p}", style)
    return found


def _time_cell(arm: Mapping[str, Any], unit: str) -> str:
    """`3,250 [3,180, 3,320] x0.70`: time, its interval, and its ratio to the baseline's; `not in 5,000` steps."""
    shown = duration if unit == "seconds" else human if unit != "steps" else lambda value: f"{value:,.0f}"
    time, ratio = arm[unit], arm["ratio"][unit]["value"] if arm["ratio"] else None
    followed = [run[unit] for run in arm["each"] if run[unit] is not None]
    if not arm["reached"]:
        return f"not in {shown(max(followed))}" if followed else ""
    if time["value"] is None:
        if time["low"] is not None:
            return f"median over {shown(time['low'])}"
        return "median unknown" if time["of"] == "median" else ""
    text = "median " * (time["of"] == "median") + shown(time["value"])
    if time["low"] is not None:
        text += f" [{shown(time['low'])}, {'...' if time['high'] is None else shown(time['high'])}]"
    return text + ("" if ratio is None else f" x{1 / ratio:.2f}")


def _table(*columns: tuple[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for header, side in columns:
        table.add_column(Text(one_line(header)), justify=side, overflow="fold")
    return table
