"""The sentences of a report, made from its numbers, and how names and numbers are written.

Every sentence rests on a test of `gptlab.report.statistics`: nothing is said that the numbers do not show.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from math import floor, log10
from statistics import median
from typing import Any

from gptlab.report import statistics as st
from gptlab.report import verdicts
from gptlab.report.divergence import CLAIMED_RATE, Divergence, Times

METRIC_NAMES = {
    "final_val_loss": "validation loss",
    "final_train_loss": "training loss",
    "val_perplexity": "perplexity",
    "val_bits_per_byte": "bits per byte",
    "micro_f1": "micro-F1",
    "macro_f1": "macro-F1",
    "accuracy": "accuracy",
    "p_at_1": "P@1",
    "p_at_3": "P@3",
    "p_at_5": "P@5",
    "rp_at_5": "RP@5",
    "ndcg_at_5": "nDCG@5",
    "sparsity": "sparsity",
    "mask_overhead_percent": "masks, % of step",
    "hellaswag_acc_norm": "HellaSwag",
    "wall_seconds": "wall time, s",
    "cost": "cost",
    "energy_joules": "energy, J",
    "largest_logit": "largest |logit|",
    "skipped_steps": "skipped steps",
}
TASK_WORDS = {"lm": "language modelling", "classify": "classification"}
# False findings in families of 1 to 18 that start with 3 seeds and stop at 20 at most (tests/test_report_looks.py).
ERROR_OF_ONE_LOOK, ERROR_OF_MANY_LOOKS = 0.11, 0.27
LOOKS = (
    f"seeds added after a look raise the error from 5% to about {ERROR_OF_ONE_LOOK:.0%}, and up to "
    f"{ERROR_OF_MANY_LOOKS:.0%} if they are added one at a time"
)
LOOKS_ARE_PAID = "seeds may be added: looks are paid for"  # in a study that runs until it is decided
SECOND_LOOK = f"that second look raises the chance of a false finding from 5% to about {ERROR_OF_ONE_LOOK:.0%}"
# A comparison in words. `{0}` is the arm and `{1}` its reference.
NAMED_VERDICTS = {
    "better": "{0} is better than {1}",
    "worse": "{0} is worse than {1}",
    "equivalent": "{0} and {1} are equivalent",
    "diverges": "{0} diverges",
    "reference diverges": "{1} diverges",
    "not resolved": "{0} minus {1}",
}


# -- names and numbers ----------------------------------------------------------------------------------------------


def metric_name(key: str) -> str:
    return METRIC_NAMES.get(key, key.replace("_", " "))


def metric_label(key: str, unit: str) -> str:
    """The name of a metric with its unit; `unit` is tokens or samples, or "" where it is not known."""
    if not key.endswith("_loss") or not unit:
        return metric_name(key)
    return f"{metric_name(key)}, nats" + " per token" * (unit == "tokens")


def one_line(text: str) -> str:
    """Text without line breaks and control codes, which could break a table, an SVG file or a terminal."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


def decimals(metric: Mapping[str, Any]) -> int:
    """Digits after the point that show a tenth of the margin; 4 without a margin."""
    margin = metric["margin"]
    return min(6, max(2, 1 - floor(log10(margin)))) if margin else 4


def number_form(study: Mapping[str, Any]) -> str:
    """How values of a study's metric are printed: `.4f`, or `.5g` where they are too small or too large for it.

    The usual spread has a digit too, however wide the margin is.
    """
    margin = study["metric"]["margin"]
    largest = max((abs(arm["quality"]["mean"]) for arm in study["arms"] if arm["quality"]), default=0.0)
    tiny = 0 < largest < 0.01 and not (margin and margin >= 1e-5)
    if tiny or largest >= 1e6:
        return ".5g"
    known = [arm["quality"] for arm in study["arms"] if arm["quality"]]
    spreads = [one["sd"] for one in known if one["sd"] and one["sd"] > 1e-6 * largest]  # less is rounding
    spread = median(spreads) if spreads else 1.0
    return f".{max(decimals(study['metric']), min(6, -floor(log10(spread))))}f"


def interval(value: float, low: float | None, high: float | None, form: str) -> str:
    """`+0.012 [-0.030, 0.054]`, or `+0.012` without an interval."""
    ends = "" if low is None or high is None else f" [{low:{form}}, {high:{form}}]"
    return f"{value:+{form}}{ends}"


def signed(value: float, low: float, high: float) -> str:
    """The same in three significant digits, for sentences."""
    return f"{value:+.3g}" + (f" [{low:+.3g}, {high:+.3g}]" if math.isfinite(low + high) else "")


def times_as_fast(ratio: float, low: float, high: float) -> str:
    return f"{ratio:.2f} [{low:.2f}, {high:.2f}] times as fast"


def cost_text(speed: float, memory: float, steps: float, reference: str) -> str:
    """`at 0.17 times the speed and 5.20 times the memory of base`: what a recommended arm costs, as ratios.

    Args:
        steps: left out if the arms take as many, or if it is unknown.
    """
    ratios = [(speed, "speed"), (memory, "memory"), *([(steps, "steps")] if abs(steps - 1) >= 0.005 else [])]
    known = [f"{ratio:.2f} times the {what}" for ratio, what in ratios if ratio > 0]
    unknown = [what for ratio, what in ((speed, "speed"), (memory, "memory")) if not ratio > 0]
    told = [f"at {' and '.join(known)} of {reference}"] if known else []
    return ", ".join([*told, *(f"{what} unknown" for what in unknown)])


def memory_text(ratio: float) -> str:
    return f"with {ratio:.2f} times the memory" if ratio > 0 else "memory unknown"


def counted(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'s' * (n != 1)}"


def sample(n: int, runs: Sequence[int] | None, noun: str = "seed") -> str:
    """What a comparison rests on: `3 seeds`, or, where the arms share none, `5 and 10 runs`."""
    return f"{runs[0]:,} and {runs[1]:,} runs" if runs else counted(n, noun)


def seeds_text(seeds: Sequence[int]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def stems(names: Iterable[str]) -> list[str]:
    """How each study's file names begin: safe on any file system, and no two alike."""
    taken: list[str] = []
    for name in names:
        stem = unique = re.sub(r"[^\w.+-]+", "-", name).strip("-.") or "study"
        while unique.lower() in map(str.lower, taken):
            unique = f"{stem}-{len(taken) + 1}"
        taken.append(unique)
    return taken


# -- an arm's runs --------------------------------------------------------------------------------------------------


def runs_of(arm: Mapping[str, Any]) -> int:
    """The number of planned runs, or of found runs if that is larger."""
    return max(arm["planned"], sum(arm["statuses"].values()))


def went_wrong(arm: Mapping[str, Any]) -> str:
    """What happened to the runs that did not complete: `2 of 3 diverged`; empty if all completed."""
    counts = {status.replace("_", " "): n for status, n in arm["statuses"].items() if status != "completed" and n}
    return ", ".join(f"{n} of {runs_of(arm)} {status}" for status, n in counts.items())


def shown_verdict(arm: Mapping[str, Any]) -> str:
    """The verdict as tables and figures show it."""
    return str(arm["comparison"]["verdict"]) if arm["comparison"] else "baseline"


def told_apart(of: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The questions that are answered one by one; the table of a target answers the others."""
    return [question for question in of["questions"] if not question.get("tabled")]


# -- comparisons ----------------------------------------------------------------------------------------------------


def comparison_text(
    judged: verdicts.Judgement,
    metric: str,
    family: int,
    statuses: Mapping[str, int],
    divergence: Divergence | None = None,
    reference: str = "the reference",
) -> str:
    """`better: -0.1 [-0.12, -0.08] in ...`: the verdict on an arm against the baseline, and what it rests on.

    Args:
        metric: its key.
        family: number of comparisons that Holm's correction is over.
        statuses: number of the arm's runs by status.
        divergence: of the arm, tested over all arms of the study.
    """
    if judged.contrast.difference.n or judged.contrast.any_diverged:
        text = f"{judged.verdict}: {evidence_text(judged, metric, family, reference)}{more_seeds(judged)}"
        return text + (more_often_text(divergence) if divergence and divergence.diverged else "")
    ended = ", ".join(f"{n} {status.replace('_', ' ')}" for status, n in statuses.items())
    if judged.verdict == "not run":
        if statuses.keys() - {"not_applicable"}:
            return "not run: the baseline has no run yet"
        return f"not run: {ended or 'this arm has no run yet'}"
    return f"not compared: {ended}"


def question_text(judged: verdicts.Judgement, metric: str, family: int, arm: str, reference: str) -> str:
    """`x is better than base: -0.1 [-0.12, -0.08] in ...`."""
    if judged.verdict == "not run":
        return f"{arm} or {reference} has no run yet"
    if not judged.contrast.difference.n and not judged.contrast.any_diverged:
        if judged.contrast.runs:
            return f"{arm} or {reference} has no completed run with a {metric}"
        return f"no seed has completed runs of both {arm} and {reference} with a {metric}"
    return (
        f"{NAMED_VERDICTS[judged.verdict].format(arm, reference)}: {evidence_text(judged, metric, family, reference)}"
    )


def evidence_text(judged: verdicts.Judgement, metric: str, family: int, reference: str = "the reference") -> str:
    """What was measured, in numbers."""
    c, d = judged.contrast, judged.contrast.difference
    if c.any_diverged:
        parts = []
        if c.diverged[0]:
            parts.append("{} of {} runs diverged".format(*c.diverged))
        else:
            parts.append("{} of {} runs of {} diverged".format(*c.reference_diverged, reference))
        return "; ".join(parts)
    seeds = sample(d.n, c.runs)
    if d.identical and not d.low < d.high:  # of grids, other arms than the chosen ones count too
        return f"bit-identical in {seeds}{survivors_text(c, reference)}" + (f"; {judged.why}" if judged.why else "")
    text = f"{signed(d.mean, d.low, d.high)} in {metric_name(metric)} over {seeds}{survivors_text(c, reference)}"
    if math.isfinite(d.p):
        over = f"Holm-adjusted over {counted(family, 'comparison')}"
        over = f"adjusted over the {counted(c.ledger[1], 'look')} in the ledger" if c.ledger else over
        text += f" (p = {judged.p_holm:.2g}, {over})"
    if judged.why:
        text += f"; {judged.why}"
    if judged.verdict == "equivalent" and judged.p_equivalent > 0:
        text += f"; smaller than the margin of {c.margin:g} (p = {judged.p_equivalent:.2g})"
    if judged.verdict == "not resolved" and c.looks is not None:
        text += f"; {LOOKS_ARE_PAID}" if len(c.looks.differences) < c.looks.most and not judged.hopeless else ""
    elif judged.verdict == "not resolved" and math.isfinite(judged.mde):
        text += f"; detectable with 80% power from {seeds}: {judged.mde:.2g}"
        text += f", or {judged.mde_family:.2g} after Holm over {family}" if family > 1 else ""
    return text


def more_seeds(judged: verdicts.Judgement) -> str:
    """What would resolve a comparison, as a clause; empty if it is resolved or unknown."""
    if not judged.more_seeds or judged.contrast.any_diverged:
        return ""
    seeds = more_text(judged.more_seeds, judged.contrast.runs is None)
    would = "would resolve it in four of five cases if the difference and the spread are as seen"
    return f"; {seeds} {would}, but {SECOND_LOOK}"


def more_text(n: int, paired: bool) -> str:
    return counted(n, "more seed" if paired else "more run") + ("" if paired else " of each")


def survivors_text(c: verdicts.Contrast, reference: str) -> str:
    """Over which seeds an arm is compared with a reference that diverged in others, as a clause."""
    if c.any_diverged or not c.reference_diverged[0]:
        return ""
    if c.runs:
        return f", compared with the {counted(c.runs[1], 'run')} of {reference} that did not diverge"
    seeds = f" (it did in {seeds_text(c.reference_lost)})"
    return f", compared over the {counted(c.difference.n, 'seed')} in which {reference} did not diverge" + (
        seeds if c.reference_lost else ""
    )


# -- divergence -----------------------------------------------------------------------------------------------------


def diverged_runs(found: Divergence, arm: str = "") -> str:
    of = f" of {arm}" if arm else ""
    return f"{found.diverged} of {found.runs} runs{of} diverged"


def more_often_text(found: Divergence) -> str:
    """Whether an arm with diverged runs is shown to diverge more often, as a clause with its p."""
    over = f", Holm-adjusted over {found.tests} tests" if found.tests > 1 else ""
    test = f"{found.others[0]} of {found.others[1]} runs; p = {found.p_holm:.2g}, Fisher's exact test{over}"
    if found.shown:
        return f"; more often than the study's other arms ({test})"
    return f"; too few to say that it diverges more often than the study's other arms ({test})"


def asked_divergence_text(found: Divergence, arm: str) -> str:
    """What the test of a question that asks whether an arm diverges found, as a clause."""
    if not found.runs:
        return ""
    text = more_often_text(found) if found.diverged else f"; {diverged_runs(found, arm)}"
    if found.excluded:
        text += f"; fewer than two of three do: at most {found.most:.0%} (one-sided 95% limit)"
    elif not found.diverged:
        text += f"; up to {found.most:.0%} may (one-sided 95% limit), and the claim is {CLAIMED_RATE:.0%} or more"
    return text


def when_text(steps: Sequence[int], kinds: Mapping[str, int]) -> str:
    """When and how runs diverged, as a clause: `; at steps 5,800 to 9,100, median 7,000 (non_finite 2, spike 1)`."""
    if not kinds:
        return ""
    how = ", ".join(f"{kind} {n}" for kind, n in kinds.items())
    if not steps:
        return f"; at unknown steps ({how})"
    if len(steps) == 1:
        return f"; at step {steps[0]:,} ({how})"
    return f"; at steps {min(steps):,} to {max(steps):,}, median {median(steps):,.0f} ({how})"


def times_text(found: Times, studies: Sequence[str]) -> str:
    """Whether an arm diverges earlier in one of two studies."""
    counts = " and ".join(f"{k} of {n} in {name}" for (k, n), name in zip(found.within, studies, strict=True))
    span = f"In the first {found.horizon:,.0f} steps, which both studies ran" if found.horizon < math.inf else "In all"
    text = f"{span}, {counts} diverged; "
    if found.p <= st.ALPHA:
        text += f"earlier or more often in {studies[found.earlier]}"
    else:
        text += "whether one task hides or amplifies it is open"
    text += f" (p = {found.p:.2g}, exact rank-sum test of the times; runs that did not diverge come last)"
    return text + (f"; as many runs cannot give less than {found.least_p:.2g}" if found.least_p > st.ALPHA else "")


# -- recommendations ------------------------------------------------------------------------------------------------


def place(task: str, devices: Sequence[str]) -> str:
    """`for language modelling on NVIDIA H100`: what a recommendation holds for."""
    return f"for {TASK_WORDS.get(task, task)} on {' and '.join(devices) or 'unknown hardware'}"


def together_text(arm: str, nested: Sequence[str]) -> str:
    """That an arm which keeps the changes of others is recommended as a whole, as a clause."""
    return f" (all changes of {arm} together: it keeps those of {', '.join(nested)})" if nested else ""


def lost_text(lost: Mapping[str, tuple[int, int]]) -> str:
    """Arm to (runs that failed or ran out of memory, its runs), as a clause at the end of a recommendation."""
    return "".join(f"; {k} of {n} runs of {arm} failed or ran out of memory" for arm, (k, n) in lost.items() if k)


def frontier_text(
    studies: Sequence[str],
    only: Mapping[str, list[str]],
    alike: list[str],
    open_: list[str],
    least: tuple[float, float],
    answer: str,
) -> str:
    """Which arms save time or memory in one study and not in the other.

    Args:
        only: study to the arms that save in it alone.
        alike: arms that save in both.
        open_: arms of which it is not known in one study at least.
        least: the smallest gains in speed and memory that count, as shares.
    """
    both = f"on both frontiers: {', '.join(alike)}" if alike else ""
    if answer == "confirmed":
        parts = [f"on the frontier of speed and memory in {name} only: {', '.join(a)}" for name, a in only.items() if a]
        parts += [both] if both else []
        parts += [f"open: {', '.join(open_)}"] if open_ else []
    elif answer == "rejected":
        parts = [f"no arm is on the frontier of speed and memory in only one of {' and '.join(studies)}"]
        parts += [both] if both else []
    else:
        parts = [f"open which arms are on the frontiers of speed and memory: {', '.join(open_) or 'all'}"]
    least_text = f"gains under {100 * least[0]:.3g}% of speed and {100 * least[1]:.3g}% of memory count as none"
    return "; ".join([*parts, least_text])


def ratios_text(ratios: Mapping[str, Mapping[str, tuple[float, float]]]) -> str:
    """Speed and memory of arms in each study, as ratios to the baseline's."""
    if not ratios:
        return ""
    told = [
        f"{arm}: " + ", ".join(f"{speed:.2f} and {memory:.2f} in {name}" for name, (speed, memory) in of.items())
        for arm, of in ratios.items()
    ]
    return f". Speed and memory as ratios to the baseline's: {'; '.join(told)}"


def by_more_text(judged: verdicts.Judgement, first: str, second: str, family: int) -> str:
    """How much larger a difference is in one study than in another."""
    d = judged.contrast.difference
    if not d.n or not math.isfinite(d.p):
        why = "a run diverged" if judged.contrast.any_diverged else "that takes a margin and two seeds of each"
        return f"By how much more in {first} than in {second} is open: {why}"
    known = {
        "better": f"Better by more in {first} than in {second}",
        "worse": f"Worse by more in {first} than in {second}",
        "equivalent": f"The same in {first} and {second} within a margin",
    }
    said = known.get(judged.verdict, f"Open whether {first} and {second} differ by a margin")
    said += ", by more than a margin" if min(abs(d.low), abs(d.high)) > 1 and d.low * d.high > 0 else ""
    return (
        f"{said}: difference of the two {signed(d.mean, d.low, d.high)} margins "
        f"(p = {judged.p_holm:.2g}, Holm-adjusted over {counted(family, 'comparison')})"
    )


# -- across studies -------------------------------------------------------------------------------------------------


def ranking_text(tau: st.Estimate, unranked: Sequence[str]) -> str:
    """How alike the rankings of two studies are.

    Args:
        unranked: arms with a diverged run that are not shown to diverge more often.
    """
    text = "fewer than two arms can be ranked in both studies"
    if math.isfinite(tau.value):
        text = f"Kendall's tau-b of the two rankings: {tau.value:.2f} [{tau.low:.2f}, {tau.high:.2f}] over "
        text += f"{tau.n} arms (p = {tau.p:.2g} of no association)"
    without = f"; not ranked, as runs diverged, but too few to call it last: {', '.join(unranked)}"
    return text + (without if unranked else "")


def flip_text(flip: verdicts.Flip, studies: Iterable[str]) -> str:
    """`flips: lm: -0.1 [...]; cls: +0.2 [...]; interaction ...`."""
    differences = [(name, j.contrast.difference) for name, j in zip(studies, (flip.first, flip.second), strict=True)]
    parts = [f"{name}: {signed(d.mean, d.low, d.high)}" for name, d in differences if d.n]
    if math.isfinite((change := flip.interaction).value):
        parts.append(f"interaction {signed(change.value, change.low, change.high)} margins (p = {flip.p_holm:.2g})")
    return f"{flip.verdict}: {'; '.join(parts)}"
