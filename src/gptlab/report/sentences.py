"""The first lines of a report, in plain words: what was found, what it costs, and what would change the answer.

Every function takes plain data, as `estimates.comparison_data` and `analysis` make it. p values are put as what they
are: how often such a study would show so much if there were nothing to show. Numbers that only a reader of statistics
needs stand in `words.evidence_text`.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from math import ceil, comb, floor, isfinite, log10
from typing import Any

from gptlab.report import statistics as st
from gptlab.report.looks import HOPELESS
from gptlab.report.words import SECOND_LOOK, counted, more_text, sample

Row = Mapping[str, Any]

OTHER_WAY = {"lower": "higher", "higher": "lower"}
SPEEDS = ("tokens_per_second", "samples_per_second")
ABOUT = (0.95, 1.05)  # intervals of a ratio of speeds that stay within this, and include 1, are "about as fast"
MOST_NAMES = 3  # arms that a summary lists by name; more are counted


# -- one comparison -------------------------------------------------------------------------------------------------


def finding(row: Row, where: str = "here") -> str:
    """`muon is better than adamw here: lower validation loss by 0.31 (0.21 to 0.40) nats per token, in 3 of 3 seeds...`

    Args:
        row: a comparison of a with b.
        where: `here`, or `in STUDY`.
    """
    if row["divergence"] and row["divergence"]["runs"]:
        return _divergence(row["divergence"], row["of"][0], where)
    a, b = (_side(arm, of) for arm, of in zip((row["a"], row["b"]), row["of"], strict=True))
    metric, _, unit = row["label"].partition(", ")
    unit = f" {unit}" if unit else ""
    verdict, n = row["verdict"], row["n"]
    seeds = sample(n, row["runs"])
    if row["reference_diverged"][0]:
        seeds += f", without those of {b} that diverged" if row["runs"] else f" in which {b} did not diverge"
    if verdict in ("better", "worse"):
        way = row["better"] if verdict == "better" else OTHER_WAY[row["better"]]
        ends = sorted((abs(row["low"]), abs(row["high"])))
        over = f"over {seeds}"
        if not row["runs"]:
            over = f"in {row['wins'] if verdict == 'better' else n - row['wins']} of {seeds}"
        size = _between(abs(row["mean"]), *ends)
        return (
            f"{a} is {verdict} than {b} {where}: {way} {metric} by {size}{unit}, {over}; if "
            f"there were no difference, at most {chance(row['p_holm'])} of such studies would show one this clear."
        )
    if verdict == "equivalent":
        alike = f"{a} is as good as {b} {where}, within {row['margin']:g}{unit} of {metric}"
        if not row["p_equivalent"]:
            return f"{alike}: the results are identical in {seeds}."
        return (  # without the interval of the difference, which rests on another test
            f"{alike}: the difference is {row['mean']:+.2g} over {seeds}, and shown to be under "
            f"{row['holds_from']:.2g}; if it were {row['margin']:g}, at most {chance(row['p_equivalent'])} of "
            "such studies would look this alike."
        )
    (k, of), (k_b, of_b) = row["diverged"], row["reference_diverged"]
    if verdict == "diverges":
        told = f"{k} of {counted(of, 'run')} did, and {k_b} of {of_b} of {b}"
        return f"{a} diverges {where}: {told}, so they are not compared."
    if verdict == "not run":
        return f"{_missing(row)} {where if where != 'here' else 'yet'}, so {a} and {b} are not compared."
    open_ = f"It is open whether {a} or {b} is better {where}"
    if verdict == "reference diverges":
        return f"{open_}: {k_b} of {counted(of_b, 'run')} of {b} diverged, and {k} of {of} of {a}."
    if not n and row["runs"]:
        return f"{open_}: not both have a completed run with a {metric}."
    if not n:
        return f"{open_}: no seed has a completed run of both with a {metric}."
    if row["why"].startswith("differs"):
        open_ = f"{a} differs from {b} {where}, but it is open whether by more than the margin of {row['margin']:g}"
    found = f"the first minus the second is {_between(row['mean'], row['low'], row['high'], '+')}{unit} in {metric}"
    return f"{open_}: {found}, {'in the one seed so far' if n == 1 and not row['runs'] else f'over {seeds}'}."


def _divergence(found: Row, arm: str, where: str) -> str:
    """The finding of a question that asks whether an arm diverges in two of three runs."""
    k, n, (k_others, n_others) = found["diverged"], found["runs"], found["others"]
    if found["excluded"]:
        few = sum(comb(n, i) * 2**i for i in range(k + 1)) / 3**n
        return (
            f"{arm} does not diverge in two of three runs {where}: {k} of {n} did; if it were so, at most "
            f"{chance(few)} of such studies would show so few."
        )
    told = f"{k} of {counted(n, 'run')} did, and {k_others} of {n_others} of the study's other arms"
    if found["shown"]:
        return (
            f"{arm} diverges {where}: {told}; if it were no more prone to it than they, at most "
            f"{chance(found['p_holm'])} of such studies would show this."
        )
    if k:
        return f"It is open whether {arm} diverges more often than other arms {where}: {told}."
    return f"It is open whether {arm} diverges {where}: none of {counted(n, 'run')} did, too few to say."


def by_more(verdict: str, d: st.Difference, p: float, first: str, second: str) -> str:
    """Whether an arm gains or loses more in one study than in another.

    Args:
        d: the first study's difference minus the second's, in margins; positive if the arm gains more in the first.
        p: adjusted.
    """
    if not d.n or not isfinite(d.p):
        return f"By how much more in {first} than in {second} is open."
    if verdict in ("better", "worse"):
        low, high = sorted((abs(d.low), abs(d.high)))
        size = _between(abs(d.mean), low, high)
        return (
            f"It {'gains' if verdict == 'better' else 'loses'} more in {first} than in {second}, by {size} margins; if "
            f"there were no difference, at most {chance(p)} of such studies would show one this clear."
        )
    if verdict == "equivalent":
        return f"The difference is the same in {first} and {second}, within a margin."
    size = f"{_between(d.mean, d.low, d.high, '+')} margins"
    return f"It is open whether it differs by more in {first} than in {second}: the first minus the second is {size}."


def frontier(
    studies: Sequence[str], only: Mapping[str, Sequence[str]], alike: Sequence[str], open_: Sequence[str], answer: str
) -> str:
    """Whether the arms that save time or memory are the same in two studies.

    Args:
        only: study to the arms that save in it alone.
        alike: arms that save in both.
        open_: arms of which it is not known in one study at least.
    """
    both = " and ".join(studies)
    if answer == "not run":
        return f"{both} have not both been run, so their arms are not compared."
    if answer == "confirmed":
        parts = [f"in {name} alone with {', '.join(arms)}" for name, arms in only.items() if arms]
        parts += [f"in both with {', '.join(alike)}"] if alike else []
        return f"Choose by task: time or memory is saved {_listed(parts)}."
    if answer == "rejected":
        return f"The same arms save time or memory in {both}: {', '.join(alike) or 'none'}."
    return f"It is open whether the same arms save time or memory in {both}; not known of {', '.join(open_) or 'all'}."


def cost(row: Row) -> str:
    """`a runs at 0.83 times the speed of b and takes 1.10 times as much memory.`; empty if there is nothing to say."""
    if row["verdict"] in ("diverges", "reference diverges", "not run") or row["divergence"] or row["metric"] in SPEEDS:
        return ""
    a, b, parts = row["a"], row["b"], []
    if speed := row["speed"]:
        ratio, low, high = (speed[key] for key in ("value", "low", "high"))
        ends = "" if low is None else f" ({low:.2f} to {high:.2f})"
        if ends and ABOUT[0] < low <= 1 <= high < ABOUT[1]:
            parts.append(f"runs about as fast as {b}")
        elif ends and low <= 1 <= high:
            parts.append(f"may be faster or slower than {b}, {ratio:.2f}{ends} times its speed,")
        else:
            parts.append(f"runs at {ratio:.2f}{ends} times the speed of {b}")
    if ratio := row["memory_ratio"]:
        of = "" if parts else f" as {b}"
        times = "" if abs(ratio - 1) < 0.005 else f"{ratio:.2f} times "
        parts.append(f"takes {times}as much memory{of}")
    if (ratio := row["steps_ratio"]) and abs(ratio - 1) >= 0.005:
        parts.append(f"trains for {ratio:.2f} times as many steps")
    return f"{a} {' and '.join(parts)}." if parts else ""


def outlook(row: Row, folder: str) -> str:
    """What would change the answer.

    Args:
        folder: of the study, for the command that runs what is missing.
    """
    parts, verdict, unit = [], row["verdict"], row["label"].partition(", ")[2]
    unit = f" {unit}" if unit else ""
    if verdict == "not run":
        if row["reason"]:
            return f"It needs another machine: {row['reason']}."
        arms = [arm for arm, n in zip(row["of"], row["started"], strict=True) if not n]
        if any("*" in arm for arm in arms):
            return f"Run it: {shlex.join(['gptlab', 'study', 'run', folder])}."
        return f"Run it: {shlex.join(['gptlab', 'study', 'run', folder, '--arm', *arms])}."
    if (asked := row["divergence"]) and asked["runs"]:
        if asked["excluded"]:
            return ""
        return "How often it diverges takes more seeds to say." if asked["shown"] else "More seeds would tell."
    if verdict == "diverges":
        return "How often it diverges takes more seeds to say."
    if verdict in ("better", "worse"):
        parts.append(f"A margin above {abs(row['mean']):.2g}{unit} would make it too small to matter.")
    if verdict == "equivalent":
        if row["holds_from"]:
            parts.append(f"A margin below {row['holds_from']:.2g}{unit} would leave it open.")
        if not (together := row["p_equivalent"] * row["family"]) < st.ALPHA:
            parts.append(f"Taken as one of {row['family']} comparisons it is not shown (p = {together:.2g}).")
    if verdict == "not resolved":
        if row["p"] is not None and row["p"] < st.ALPHA <= row["p_holm"] and not row["why"]:
            parts.append(f"Taken alone it would count, but not as one of {row['family']} comparisons.")
        if most := row["most_seeds"]:
            add = f"Add seeds: {shlex.join(['gptlab', 'study', 'run', folder, '--until-decided'])}; looks are paid for."
            given_up = f"A verdict within {most} seeds is unlikely (below {HOPELESS:.0%}), so it gets no more seeds."
            ended = f"It is open after {most} seeds, as many as were planned."
            parts.append(given_up if row["hopeless"] else add if row["n"] < most else ended)
        elif row["n"] < 2:
            both = "Two seeds or more that both have completed are needed."
            parts.append("Two completed runs or more of each are needed." if row["runs"] else both)
        elif more := row["more_seeds"]:
            parts.append(
                f"{more_text(more, not row['runs'])} would settle it in four of five cases if the difference and the "
                f"spread are as seen, but {SECOND_LOOK}."
            )
        elif not row["margin"]:
            parts.append("No margin is stated, so nothing is called as good as another.")
        elif row["why"] and not row["why"].startswith("differs"):
            parts.append(f"{row['why'][0].upper()}{row['why'][1:]}.")
    for arm, edge in zip((row["a"], row["b"]), row["edges"], strict=True):
        if edge:
            parts.append(f"{arm} lies at the edge of its grid ({edge}): settings beyond it may be better.")
    return " ".join(parts)


def answer(rows: Sequence[Row], folders: Mapping[str, str]) -> dict[str, str]:
    """`sentence`, `cost` and `change` of a question: those of each study that has the arms, one after the other.

    Args:
        rows: the question's comparison in each study.
        folders: of the studies, by name.
    """
    several = len(folders) > 1
    told: dict[str, list[str]] = {"sentence": [], "cost": [], "change": []}
    for row in rows:
        found = finding(row, f"in {row['study']}" if several else "here")
        told["sentence"].append(f"T{found[1:]}" if found.startswith("the best of ") else found)
        for key, text in (("cost", cost(row)), ("change", outlook(row, folders[row["study"]]))):
            told[key] += [f"{row['study']}: {text}" if several else text] if text else []
    told["sentence"] += [f"{name} has no such arms." for name in folders if name not in {row["study"] for row in rows}]
    return {key: " ".join(parts) for key, parts in told.items()}


# -- a whole study --------------------------------------------------------------------------------------------------

VERBS = {  # verdict: what one arm and what several arms do
    "better": ("is better", "are better"),
    "equivalent": ("is as good", "are as good"),
    "worse": ("is worse", "are worse"),
    "not resolved": ("is open", "are open"),
    "reference diverges": ("is open", "are open"),
    "diverges": ("diverges", "diverge"),
    "not run": ("was not run", "were not run"),
}


def summary(arms: Sequence[Row], baseline: str, better: str) -> str:
    """`Of 18 arms compared with base, 1 is better (x), ...`, and the finding on the best of them."""
    compared = [arm for arm in arms if arm["comparison"]]
    if not compared:
        return ""
    parts = []
    for verb in dict.fromkeys(VERBS.values()):
        names = [arm["name"] for arm in compared if VERBS[arm["comparison"]["verdict"]] == verb]
        if names:
            named = f" ({', '.join(names)})" if len(names) <= MOST_NAMES else ""
            parts.append(f"{len(names)} {verb[len(names) > 1]}{named}")
    told = [f"Of {counted(len(compared), 'arm')} compared with {baseline}, {_listed(parts)}."]
    if found := [arm["comparison"] for arm in compared if arm["comparison"]["verdict"] == "better"]:
        told.append(finding((min if better == "lower" else max)(found, key=lambda row: row["mean"])))
    return " ".join(told)


# -- words ----------------------------------------------------------------------------------------------------------


def chance(p: float) -> str:
    """A probability in percent, rounded up to two digits, at least 0.01%: `2.5%`, `100%`."""
    percent = max(100 * p, 0.01)
    unit = 10.0 ** (floor(log10(percent)) - 1)
    return f"{ceil(round(percent / unit, 6)) * unit:.3g}%"


def _between(value: float, low: float | None, high: float | None, sign: str = "") -> str:
    """`0.31 (0.21 to 0.40)`: two digits of the interval's width, at most three of the value."""
    if low is None or high is None:
        return f"{value:{sign}.3g}"
    if not 1e-5 <= (abs(value) or 1.0) < 1e7:
        return f"{value:{sign}.3g} ({low:.3g} to {high:.3g})"
    digits = max(0, min(1 - floor(log10(high - low)) if high > low else 8, 2 - floor(log10(abs(value) or 1e-6))))
    return f"{value:{sign},.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def _side(arm: str, of: str) -> str:
    """An arm, or `the best of muon_* (muon_3)`."""
    return arm if arm == of else f"the best of {of} ({arm})"


def _missing(row: Row) -> str:
    """`x has no run`, `neither x nor base has a run`."""
    missing = [of for of, n in zip(row["of"], row["started"], strict=True) if not n]
    return f"Neither {missing[0]} nor {missing[1]} has a run" if len(missing) > 1 else f"{missing[0]} has no run"


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
