"""The sentences of a report, made from its numbers, and how names and numbers are written.

Every sentence rests on a test of `gptlab.report.statistics`: nothing is said that the numbers do not show.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from math import floor, log10
from typing import Any

from gptlab.report import statistics as st
from gptlab.report import verdicts

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
    """The name of a metric with its unit; `unit` is tokens or samples."""
    if not key.endswith("_loss"):
        return metric_name(key)
    return f"{metric_name(key)}, nats" + " per token" * (unit == "tokens")


def one_line(text: str) -> str:
    """Text without line breaks and control codes, which could break a table, an SVG file or a terminal."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


def decimals(metric: Mapping[str, Any]) -> int:
    """Digits after the point that show a tenth of the margin; 4 without a margin."""
    margin = metric["margin"]
    return min(6, max(2, 1 - floor(log10(margin)))) if margin else 4


def interval(value: float, low: float | None, high: float | None, digits: int) -> str:
    """`+0.012 [-0.030, 0.054]`, or `+0.012` without an interval."""
    ends = "" if low is None or high is None else f" [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{value:+.{digits}f}{ends}"


def signed(value: float, low: float, high: float) -> str:
    """The same in three significant digits, for sentences."""
    return f"{value:+.3g}" + (f" [{low:+.3g}, {high:+.3g}]" if math.isfinite(low + high) else "")


def times_as_fast(ratio: float, low: float, high: float) -> str:
    return f"{ratio:.2f} [{low:.2f}, {high:.2f}] times as fast"


def cost_text(speed: float, memory: float, reference: str) -> str:
    """`at 0.17 times the speed and 5.20 times the memory of base`: what a recommended arm costs."""
    known = [f"{ratio:.2f} times the {what}" for ratio, what in ((speed, "speed"), (memory, "memory")) if ratio > 0]
    unknown = [what for ratio, what in ((speed, "speed"), (memory, "memory")) if not ratio > 0]
    told = [f"at {' and '.join(known)} of {reference}"] if known else []
    return ", ".join([*told, *(f"{what} unknown" for what in unknown)])


def memory_text(ratio: float) -> str:
    return f"with {ratio:.2f} times the memory" if ratio > 0 else "memory unknown"


def counted(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'s' * (n != 1)}"


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
    """The verdict as tables and figures show it: `not run` for an arm without any run that trained."""
    if not arm["comparison"]:
        return "baseline"
    trained = any(n for status, n in arm["statuses"].items() if status != "not_applicable")
    if arm["comparison"]["verdict"] == "not resolved" and arm["comparison"]["mean"] is None and not trained:
        return "not run"
    return str(arm["comparison"]["verdict"])


# -- comparisons ----------------------------------------------------------------------------------------------------


def comparison_text(judged: verdicts.Judgement, metric: str, family: int, statuses: Mapping[str, int]) -> str:
    """`better: -0.1 [-0.12, -0.08] in ...`: the verdict on an arm against the baseline, and what it rests on.

    Args:
        metric: its key.
        family: number of comparisons that Holm's correction is over.
        statuses: number of the arm's runs by status.
    """
    if judged.contrast.difference.n or judged.contrast.any_diverged:
        return f"{judged.verdict}: {evidence_text(judged, metric, family)}"
    ended = ", ".join(f"{n} {status.replace('_', ' ')}" for status, n in statuses.items())
    if not statuses.keys() - {"not_applicable"}:
        return f"not run: {ended or 'this arm has no run yet'}"
    return f"not compared: {ended}"


def question_text(judged: verdicts.Judgement, metric: str, family: int, arm: str, reference: str) -> str:
    """`x is better than base: -0.1 [-0.12, -0.08] in ...`."""
    if not judged.contrast.difference.n and not judged.contrast.any_diverged:
        return f"no seed has completed runs of both {arm} and {reference} with a {metric}"
    return (
        f"{NAMED_VERDICTS[judged.verdict].format(arm, reference)}: {evidence_text(judged, metric, family, reference)}"
    )


def evidence_text(judged: verdicts.Judgement, metric: str, family: int, reference: str = "the reference") -> str:
    """What was measured, and what more would resolve it."""
    c, d = judged.contrast, judged.contrast.difference
    if c.any_diverged:
        parts = []
        if c.diverged[0]:
            low, high = judged.divergence.low, judged.divergence.high
            parts.append("{} of {} runs diverged".format(*c.diverged))
            parts.append(f"the true rate is between {low:.0%} and {high:.0%} (95% interval)")
        if c.reference_diverged[0]:
            parts.append("{} of {} runs of {} diverged".format(*c.reference_diverged, reference))
        return "; ".join(parts)
    seeds = counted(d.n, "seed")
    if d.identical and not d.low < d.high:  # of grids, other arms than the chosen ones count too
        return f"bit-identical in {seeds}" + (f"; {judged.why}" if judged.why else "")
    text = f"{signed(d.mean, d.low, d.high)} in {metric_name(metric)} over {seeds}"
    if math.isfinite(d.p):
        text += f" (p = {judged.p_holm:.2g}, Holm-adjusted over {counted(family, 'comparison')})"
    if judged.why:
        text += f"; {judged.why}"
    if judged.verdict == "equivalent" and judged.p_equivalent > 0:
        text += f"; smaller than the margin of {c.margin:g} (p = {judged.p_equivalent:.2g})"
    if judged.verdict == "not resolved" and math.isfinite(judged.mde):
        text += f"; detectable with 80% power from {seeds}: {judged.mde:.2g}"
        text += f", or {judged.mde_family:.2g} after Holm over {family}" if family > 1 else ""
        text += more_seeds(judged)
    return text


def more_seeds(judged: verdicts.Judgement) -> str:
    if not judged.more_seeds:
        return ""
    seeds = f"{judged.more_seeds:,} more seed{'s' * (judged.more_seeds > 1)}"
    return f"; {seeds} would resolve it in four of five cases if the difference and the spread are as seen, but {LOOKS}"


# -- recommendations ------------------------------------------------------------------------------------------------


def place(task: str, devices: Sequence[str]) -> str:
    """`for language modelling on NVIDIA H100`: what a recommendation holds for."""
    return f"for {TASK_WORDS.get(task, task)} on {' and '.join(devices) or 'unknown hardware'}"


def lost_text(lost: Mapping[str, tuple[int, int]]) -> str:
    """Arm to (runs that failed or ran out of memory, its runs), as a clause at the end of a recommendation."""
    return "".join(f"; {k} of {n} runs of {arm} failed or ran out of memory" for arm, (k, n) in lost.items() if k)


def frontier_text(studies: Iterable[str], shared: int, differ: list[str], alike: list[str], open_: list[str]) -> str:
    """Whether arms are on the frontier of speed and memory in one study and not in the other."""
    if differ:
        return f"on the frontier of speed and memory in only one of the studies: {', '.join(differ)}"
    if open_ or shared < 2:
        return f"open, of {counted(shared, 'arm')} in both studies: {', '.join(open_) or 'all'}"
    return f"{' and '.join(studies)} have the same arms on the frontier of speed and memory: {', '.join(alike)}"


# -- across studies -------------------------------------------------------------------------------------------------


def ranking_text(tau: st.Estimate) -> str:
    if not math.isfinite(tau.value):
        return "fewer than two arms can be ranked in both studies"
    return (
        f"Kendall's tau-b of the two rankings: {tau.value:.2f} [{tau.low:.2f}, {tau.high:.2f}] over {tau.n} arms "
        f"(p = {tau.p:.2g} of no association)"
    )


def flip_text(flip: verdicts.Flip, studies: Iterable[str]) -> str:
    """`flips: lm: -0.1 [...]; cls: +0.2 [...]; interaction ...`."""
    differences = [(name, j.contrast.difference) for name, j in zip(studies, (flip.first, flip.second), strict=True)]
    parts = [f"{name}: {signed(d.mean, d.low, d.high)}" for name, d in differences if d.n]
    if math.isfinite((change := flip.interaction).value):
        parts.append(f"interaction {signed(change.value, change.low, change.high)} margins (p = {flip.p_holm:.2g})")
    return f"{flip.verdict}: {'; '.join(parts)}"
