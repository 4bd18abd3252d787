"""Every comparison that a folder was ever asked about, in its ledger.jsonl, and what asking on costs.

A report holds its own comparisons to 5% together. Whoever asks for one report after another, as a program does that
tries one change at a time, errs at 5% each time: with 20 changes that do nothing in 64%. The ledger keeps what was
asked, and `--family ledger` makes all of it one family:

* A question is a study, a metric with its margin, and two arms, in either order, or an arm and a target: another of
  these is another question. A look is a question with certain values. The same look is there once, however often it is
  asked; one with more or other seeds, or with the values of another step, is a new one, as whoever looks until
  something is seen will see something. Of a study that runs until it is decided the looks are paid for, and the latest
  takes the place of the one before.
* First looks at pairs of arms that are asked together share what one call spends of the 5%: after M of them 5% /
  sqrt(1 + M) is left. Four fifths are for Holm's correction over the call. A fifth, in equal parts, is kept for further
  looks at each pair: with more seeds, at another step, in another metric. These are taken because of what the first
  showed, and would err in 7 to 9% of sessions if they were paid as new questions are: who adds seeds to what looks
  promising takes more than one chance, and pays for the others only if it does. The shares never add up to more than
  5%, so that the chance of any false better or worse is at most 5% over all calls, also where each answer is acted on
  at once and decides what is asked next. (A pair must not be chosen by its own values, seen before they were asked
  about.) Holm over everything asked so far would not do: acted on at once, it errs in 17% of sessions of 20 questions.

A first call with 18 comparisons has 3.1% for them, a single one 1.2%, the twentieth single one 0.022%. The tests of
divergence, speed, factors and of pairs across studies are families of their own and not in it. A question with a target
is in it with a two-sided p.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptlab import locks
from gptlab.errors import DataError, Locked, UserError
from gptlab.files import because, check_fields, parse_json, read_text
from gptlab.report import statistics as st
from gptlab.report.as_json import as_json
from gptlab.report.estimates import Plain
from gptlab.report.reading import Array
from gptlab.report.studies import Look, look_at
from gptlab.report.words import counted
from gptlab.rundir import write_atomically

FILE = "ledger.jsonl"
FIELDS: dict[str, Any] = {
    **dict.fromkeys(("date", "command", "study", "metric", "at", "a", "b", "verdict", "data"), str),
    **dict.fromkeys(("asked", "n", "most_seeds"), int),
    **dict.fromkeys(("margin", "difference", "low", "high", "p"), float),
}
NOTE = (
    "The p of comparisons, of arms and with targets, are adjusted over all that this folder was asked so far: {}. "
    "Effects of factors, divergence and speed are families of their own."
)
UNTESTED = ("diverges", "not run")
NEEDED = ("asked", "study", "metric", "a", "b", "p", "data")
AGAIN = 0.2  # of the share of a first look, for further looks at its pair
TRIES, PAUSE_SECONDS = 100, 0.1  # for another process that writes


def left(looks: float) -> float:
    """The share of the 5% that is left after so many first looks."""
    return 1 / math.sqrt(1 + looks)


def spend(calls: Iterable[Sequence[float]]) -> list[Array]:
    """p of each first look, adjusted over all calls.

    Args:
        calls: the p of the first looks of each call, in order.
    """
    adjusted, before = [], 0
    for p in calls:
        share = left(before) - left(before + len(p))
        adjusted.append(np.minimum(1.0, st.holm(p) / ((1 - AGAIN) * share)) if len(p) else np.zeros(0))
        before += len(p)
    return adjusted


# -- the file -------------------------------------------------------------------------------------------------------


def read_ledger(folder: Path) -> list[Plain]:
    """The looks in a folder's ledger in order, [] without one.

    Raises:
        DataError: a line of it is damaged. What was asked is then not known, so nothing can be said about it.
    """
    file, looks = folder / FILE, []
    try:
        text = read_text(file, DataError)
    except FileNotFoundError:
        return []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            look = parse_json(line)
            if not isinstance(look, dict) or any(look.get(key) is None for key in NEEDED):
                raise ValueError("it is no comparison")
            check_fields(look, FIELDS)
            if not (0 <= look["p"] <= 1 and math.isfinite(look["p"])):
                raise ValueError(f"p = {look['p']}")
        except ValueError as error:
            raise DataError(f"{file}, line {number} is damaged: {because(error)}; mend or remove it") from None
        looks.append(look)
    return looks


def record(folder: Path, payload: Mapping[str, Any], command: str | None) -> list[Plain]:
    """Add the comparisons of a report that are new to the ledger of its folder. Returns all looks in it.

    A comparison without a p, as there is none of one seed or a diverged arm, is no look.

    Args:
        payload: as `analyse` returns it; `at`, if it has one, says where the metric was taken.

    Raises:
        UserError: the ledger cannot be written, or is damaged.
    """
    told = as_json(payload)
    rows = [row for row in told["comparisons"] if row["p"] is not None and row["verdict"] not in UNTESTED]
    rows += [question["look"] for question in told["questions"] if question.get("look")]
    asked = [_entry(row, payload, command) for row in rows]
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        looks = read_ledger(folder)
        known = {(look_at(look), look["data"]) for look in looks}
        call = max((look["asked"] for look in looks), default=0) + 1
        new = []
        for look in asked:
            key = look_at(look), look["data"]
            if key not in known:
                known.add(key)
                new.append(look | {"asked": call})
        if new:
            lines = [json.dumps(look, ensure_ascii=False, allow_nan=False) + "\n" for look in (*looks, *new)]
            write_atomically(folder / FILE, "".join(lines))
    return [*looks, *new]


def _entry(row: Mapping[str, Any], payload: Mapping[str, Any], command: str | None) -> Plain:
    a, b = row.get("of") or (row["a"], row["b"])
    return {
        "asked": 0,
        "date": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
        "command": command,
        "study": row["study"],
        "metric": row["metric"],
        "margin": row["margin"],
        "at": str(payload.get("at") or "last"),
        "a": a,
        "b": b,
        **{key: row[key] for key in ("n", "difference", "low", "high", "p", "verdict", "data", "most_seeds")},
    }


@contextlib.contextmanager
def _locked(folder: Path) -> Any:
    """One process at a time; the lock is a folder of its own, as a study that runs holds the one on its folder."""
    with contextlib.ExitStack() as stack:
        for tried in range(TRIES):
            try:
                busy = Locked(f"{folder / FILE} is being written by another process: try again")
                stack.enter_context(locks.hold(folder / ".ledger", busy))
                break
            except Locked:
                if tried == TRIES - 1:
                    raise
                time.sleep(PAUSE_SECONDS)
            except UserError as error:
                raise UserError(f"{error}; choose --out") from None
        yield


# -- the family -----------------------------------------------------------------------------------------------------


def slots(looks: Sequence[Plain]) -> list[Plain]:
    """The looks that count, in the order in which they were first taken.

    Where looks are paid for, the latest stands in the place and the call of the first.
    """
    found: dict[Any, Plain] = {}
    for look in looks:
        paid = look.get("most_seeds")
        key = look_at(look), ("most", paid) if paid else look["data"]
        found[key] = look | {"asked": found[key]["asked"] if key in found else look["asked"]}
    return sorted(found.values(), key=lambda look: int(look["asked"]))


def adjusted(looks: Sequence[Plain]) -> list[tuple[Plain, float]]:
    """The looks that count, each with its p adjusted over all of them."""
    kept = slots(looks)
    firsts, again = _first_and_again(kept)
    spent = iter(spend([[kept[i]["p"] for i in call] for call in firsts]))
    p, before, kept_for = np.ones(len(kept)), 0, dict[Any, float]()
    for call in firsts:
        p[call] = next(spent)
        share = left(before) - left(before + len(call))
        before += len(call)
        pairs = {_pair(kept[i]) for i in call}
        kept_for |= dict.fromkeys(pairs, AGAIN * share / max(1, len(pairs)))
    taken: dict[Any, int] = {}
    for i in again:
        pair = _pair(kept[i])
        n = taken[pair] = taken.get(pair, 0) + 1
        p[i] = min(1.0, kept[i]["p"] / (kept_for[pair] * (left(n - 1) - left(n))))
    return [(look, float(value)) for look, value in zip(kept, p, strict=True)]


def _pair(look: Plain) -> Any:
    """What a look is at, in whatever metric."""
    study, _, _, arms = look_at(look)
    return study, arms


def _first_and_again(kept: Sequence[Plain]) -> tuple[list[list[int]], list[int]]:
    """Indices of the looks at pairs that no earlier call looked at, call by call, and of all others."""
    firsts, again = dict[int, list[int]](), list[int]()
    asked: dict[Any, int] = {}
    for i, look in enumerate(kept):
        call = look["asked"]
        if asked.setdefault(_pair(look), call) == call:
            firsts.setdefault(call, []).append(i)
        else:
            again.append(i)
    return [*firsts.values()], again


def family_of(looks: Sequence[Plain]) -> dict[tuple[Look, str], tuple[float, int]]:
    """Of each look, by its question and data: the adjusted p, and the number of looks in the ledger."""
    every = adjusted(looks)
    return {(look_at(look), str(look["data"])): (p, len(every)) for look, p in every}


def family_size(folder: Path) -> int:
    """How many looks the ledger of a folder counts."""
    return len(slots(read_ledger(folder)))


def summary(looks: Sequence[Plain]) -> Plain:
    """What was asked so far, and what is left: for the payload of a report, and `gptlab ledger`."""
    kept = slots(looks)
    m, first = len(kept), sum(map(len, _first_and_again(kept)[0]))
    rest, single = st.ALPHA * left(first), (1 - AGAIN) * st.ALPHA * (left(first) - left(first + 1))
    calls = len({look["asked"] for look in kept})
    text = (
        f"{counted(m, 'look')} in {counted(calls, 'call')}; of the 5% that --family ledger holds, {rest:.2%} are "
        f"left, and a new comparison alone needs p < {single:.2g}"
    )
    return {"looks": m, "calls": calls, "left": rest, "next": single, "text": text}
