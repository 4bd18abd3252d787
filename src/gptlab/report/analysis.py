"""From study folders to what a report says: numbers, verdicts, answers and recommendations, as plain data.

The statistics are `gptlab.report.statistics`; here is which of them is asked of what, and the rules by which a verdict
becomes a sentence. No sentence is made without a test behind it. Two families of comparisons are each held to 5% by
Holm: every arm against the baseline (the table), and the study's questions (what it was made for).
"""

from __future__ import annotations

import fnmatch
import itertools
import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np
import tomli_w

from gptlab.config import Comparison, Metric, Question, clauses
from gptlab.errors import UserError
from gptlab.report import statistics as st
from gptlab.report.plots import thin
from gptlab.report.reading import Array, number
from gptlab.report.studies import FACTS, ReadRun, ReadStudy

POINTS = 300  # of a curve on the page: 500 runs stay below 10 MB
ON, OFF = 0.975, 0.025  # shares of simulated draws from which an arm is said to be on the frontier, or not
# What a validation loss, or a score, may differ by and count as the same where a study states no margin of its own.
LOSS_FLOOR, SCORE_FLOOR = st.MARGIN_124M, 0.005
LABELS = {
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
Plain = dict[str, Any]


def analyse(
    studies: Sequence[ReadStudy], comparison: Comparison | None = None, control: ReadStudy | None = None
) -> Plain:
    """Everything that a report shows of one study or several; across two of them where a comparison is given.

    Args:
        studies: as `read_study_folder` gives them.
        comparison: names two of them and the questions asked of both.
        control: the study that the comparison names as the control of flips, where it was run.

    Raises:
        UserError: the comparison names a study that is not there.
    """
    parts = [analyse_study(study) for study in studies]
    warnings = [warning for study in studies for warning in study.warnings]
    across = None if comparison is None else analyse_across(studies, comparison, control, warnings)
    title = " and ".join(study.study.name for study in studies)
    return {"title": title, "gptlab": None, "command": None, "warnings": warnings, "studies": parts, "across": across}


# -- one study ------------------------------------------------------------------------------------------------------


def analyse_study(read: ReadStudy) -> Plain:
    study, unit = read.study, read.unit
    margin, margin_from = margin_of(read, study.metric)
    judged = st.judge(
        {arm: contrast(read, arm, study.baseline, study.metric, margin) for arm in study.arms if arm != study.baseline}
    )
    on_frontier = frontier(read, "quality")
    base_speeds, base_memory = read.speeds(study.baseline), _memory(read, study.baseline)
    columns = columns_of(read)
    arms = []
    for name, arm in study.arms.items():
        runs, memory, speeds = read.of(name), _memory(read, name), read.speeds(name)
        statuses = Counter(run.status for run in runs)
        arms.append(
            {
                "name": name,
                "group": arm.group,
                "note": arm.note,
                "settings": _flat(arm.settings),
                "statuses": dict(statuses),
                "planned": len(study.seeds),
                "values": {
                    str(run.seed): value for run in runs if math.isfinite(value := run.value(study.metric.name))
                },
                "quality": summary([run.value(study.metric.name) for run in runs]),
                "throughput": estimate(st.throughput(speeds)) if speeds else None,
                "speedup": estimate(st.speedup(speeds, base_speeds)) if speeds and name != study.baseline else None,
                "memory_gb": memory,
                "memory_ratio": memory["mean"] / base_memory["mean"] if memory and base_memory else None,
                "other": {key: s for key, _ in columns if (s := summary([run.value(key) for run in runs]))},
                "frontier": on_frontier.get(name),
                "comparison": judgement(judged[name], study.metric, len(judged), statuses) if name in judged else None,
            }
        )
    answers = answer_questions(study.questions, {study.name: read})
    return clean(
        {
            "name": study.name,
            "description": study.description,
            "folder": str(read.folder),
            "task": study.recipe.get("task", "lm"),
            "unit": unit,
            "metric": {
                "key": study.metric.name,
                "label": label(study.metric.name, unit),
                "better": study.metric.better,
                "margin": margin,
                "margin_from": margin_from,
            },
            "baseline": study.baseline,
            "seeds": list(dict.fromkeys([*study.seeds, *(run.seed for run in read.runs.values())])),
            "runs_planned": len(study.arms) * len(study.seeds),
            "runs_found": len(read.runs),
            "columns": [{"key": key, "label": text} for key, text in columns],
            "arms": arms,
            "failures": [
                failure(run) for run in read.runs.values() if run.status not in ("completed", "not_applicable")
            ],
            "runs": [curves(run) for run in read.runs.values()],
            "within": within_seeds(read),
            "means": {name: mean for name in study.arms if (mean := mean_curves(read.of(name)))},
            "notes": notes(read),
            "equal": at_equal(read),
            "questions": [answer for answer, _ in answers],
            "recommendations": [
                overall(read, arms, margin),
                *([default_of(read, margin)] if study.default else []),
                *(advice for _, advice in answers),
            ],
            "provenance": provenance(read),
        }
    )


def notes(read: ReadStudy) -> list[str]:
    """What a reader of the numbers has to know."""
    pruned = [arm for arm in read.study.arms if any(run.value("sparsity") > 0 for run in read.of(arm))]
    if not pruned:
        return []
    return [
        f"Pruned arms ({', '.join(pruned)}) multiply dense matrices that have zeros in them: neither their speed nor "
        f"the memory of their weights gains from it. Only 2:4 can, on a GPU, after `gptlab export --to sparse24`."
    ]


def margin_of(read: ReadStudy, metric: Metric) -> tuple[float, str]:
    """The margin that a metric's differences are held against, and where it is from."""
    if metric.margin:
        return metric.margin, "stated by the study"
    floor = LOSS_FLOOR if "loss" in metric.name else SCORE_FLOOR
    values = read.values(read.study.baseline, metric.name).values
    margin = st.margin_from_noise(values, floor)
    if margin > floor:
        return margin, f"twice the spread between the seeds of {read.study.baseline}, as the study states none"
    return margin, f"the floor of {floor:g}, as the study states none"


def contrast(read: ReadStudy, arm: str, reference: str, metric: Metric, margin: float) -> st.Contrast:
    ours, theirs = (read.values(name, metric.name, metric.better) for name in (arm, reference))
    return st.contrast(ours, theirs, metric.better, margin)


def columns_of(read: ReadStudy) -> list[tuple[str, str]]:
    """Numbers of results that some run has, beside those that every table shows."""
    found = {key for run in read.runs.values() for key in run.result}
    return [(key, text) for key, text in LABELS.items() if key in found and key != read.study.metric.name]


def label(key: str, unit: str) -> str:
    text = LABELS.get(key, key.replace("_", " "))
    return f"{text}, nats" + (" a token" if unit == "tokens" else "") if key.endswith("_loss") else text


def summary(values: Sequence[float]) -> Plain | None:
    """Mean and spread over runs, with the 95% interval of the mean; None without a value."""
    known = np.array([value for value in values if math.isfinite(value)])
    n = len(known)
    if not n:
        return None
    mean, sd = float(known.mean()), float(known.std(ddof=1)) if n > 1 else math.nan
    low, high = st.t_interval(mean, sd / math.sqrt(n), n - 1) if n > 1 else (math.nan, math.nan)
    return {"n": n, "mean": mean, "sd": sd, "low": float(low), "high": float(high)}


def estimate(e: st.Estimate) -> Plain | None:
    return {"value": e.value, "low": e.low, "high": e.high, "n": e.n, "of": e.of} if math.isfinite(e.value) else None


def _memory(read: ReadStudy, arm: str) -> Plain | None:
    values = [run.value("peak_memory_gb") for run in read.of(arm)]
    return summary([value for value in values if value > 0])


def frontier(read: ReadStudy, against: str, among: Sequence[str] | None = None) -> dict[str, float]:
    """Arm to the share of draws in which it is on the frontier of speed and `quality`, or of speed and `memory`.

    Arms with a diverged run are left out, and those with fewer than two runs.
    """
    arms = [arm for arm in among or read.study.arms if not any(run.status == "diverged" for run in read.of(arm))]
    speeds = {arm: {seed: float(np.median(s)) for seed, s in read.speeds(arm).items()} for arm in arms}
    metric = read.study.metric
    key, better = ("peak_memory_gb", "lower") if against == "memory" else (metric.name, metric.better)
    values = {arm: dict(read.values(arm, key).values) for arm in arms}
    shares = st.frontier([(speeds, "higher"), (values, better)])  # type: ignore[list-item]
    return {arm: share for arm, share in shares.items() if math.isfinite(share)}


def within_seeds(read: ReadStudy) -> list[Plain]:
    """HellaSwag of each run minus the baseline's of the same seed, with an interval over rows.

    It says how the difference holds on other rows for these very weights, and nothing of other seeds.
    """
    result = []
    for (arm, seed), run in read.runs.items():
        base = read.runs.get((read.study.baseline, seed))
        rows = sorted(run.picks.keys() & base.picks.keys()) if base and arm != read.study.baseline else []
        if rows and base:
            e = st.bootstrap([run.picks[row] for row in rows], [base.picks[row] for row in rows])
            result.append({"arm": arm, "seed": seed, "mean": e.value, "low": e.low, "high": e.high, "rows": e.n})
    return result


# -- sentences ------------------------------------------------------------------------------------------------------


def judgement(judged: st.Judgement, metric: Metric, family: int, statuses: Mapping[str, int]) -> Plain:
    """A judgement as plain data, and in a sentence."""
    d, welch = judged.contrast.difference, judged.contrast.welch
    text = sentence(judged, metric, family)
    if not d.n and (ended := ", ".join(f"{n} {status.replace('_', ' ')}" for status, n in statuses.items())):
        text = f"not compared: {ended}" if not judged.contrast.any_diverged else text
    return {
        "verdict": judged.verdict,
        "n": d.n,
        "mean": d.mean,
        "sd": d.sd,
        "low": d.low,
        "high": d.high,
        "p": d.p,
        "p_holm": judged.p_holm,
        "p_equivalent": judged.p_equivalent,
        "mde": judged.mde,
        "mde_family": judged.mde_family,
        "more_seeds": judged.more_seeds,
        "why": judged.why,
        "welch": {"value": welch.value, "low": welch.low, "high": welch.high, "p": welch.p} if welch else None,
        "text": text,
    }


def sentence(judged: st.Judgement, metric: Metric, family: int) -> str:
    """`not resolved: +0.012 [-0.030, +0.060] over 3 seeds, ...`: what was seen, and what would settle it."""
    c, d = judged.contrast, judged.contrast.difference
    if c.any_diverged:
        arm, reference = ("{} of {} runs diverged".format(*counts) for counts in (c.diverged, c.reference_diverged))
        of = judged.divergence
        interval = f" (95% interval of the rate {of.low:.0%} to {of.high:.0%})" if c.diverged[0] else ""
        return f"{judged.verdict}: {arm}{interval}" + (
            f"; of the reference {reference}" if c.reference_diverged[0] else ""
        )
    if not d.n:
        return f"{judged.verdict}: {judged.why}"
    seeds = f"{d.n} seed{'s' * (d.n > 1)}"
    if d.identical:
        return f"{judged.verdict}: identical in {seeds}, to the last bit" + (f"; {judged.why}" if judged.why else "")
    text = f"{judged.verdict}: {signed(d.mean)}{interval_of(d)} in {LABELS.get(metric.name, metric.name)} over {seeds}"
    if math.isfinite(d.p):
        text += f", p = {judged.p_holm:.2g} after Holm over {family}"
    if judged.why:
        text += f"; {judged.why}"
    if judged.verdict == "equivalent" and judged.p_equivalent > 0:
        text += f"; within {c.margin:g} either way, p = {judged.p_equivalent:.2g}"
    if judged.verdict == "not resolved" and math.isfinite(judged.mde):
        text += f"; {seeds} find {judged.mde:.2g} in four of five cases, or {judged.mde_family:.2g} among {family}"
        text += f"; {more_seeds(judged)} would settle it" if judged.more_seeds else ""
    return text


def more_seeds(judged: st.Judgement) -> str:
    return "1 more seed" if judged.more_seeds == 1 else f"{judged.more_seeds:,} more seeds"


def signed(value: float) -> str:
    return f"{value:+.3g}"


def interval_of(estimate: st.Difference | st.Estimate) -> str:
    low, high = estimate.low, estimate.high
    return f" [{signed(low)}, {signed(high)}]" if math.isfinite(low + high) else ""


# -- questions ------------------------------------------------------------------------------------------------------


def answer_questions(questions: Sequence[Question], studies: Mapping[str, ReadStudy]) -> list[tuple[Plain, Plain]]:
    """(answer, recommendation) of each question; all their comparisons are one family.

    Args:
        questions: of one study, or of a comparison.
        studies: by name.
    """
    family: dict[tuple[str, str], st.Contrast] = {}
    metrics: dict[tuple[str, str], Metric] = {}
    for question in questions:
        for name, read in studies.items() if question.contrast else ():
            metric = question.metric or read.study.metric
            if all(fnmatch.filter(read.study.arms, arm) for arm in question.contrast):
                metrics[question.id, name] = metric
                arm, reference = question.contrast
                family[question.id, name] = contrast(read, arm, reference, metric, margin_of(read, metric)[0])
    judged = st.judge(family)
    result = []
    for question in questions:
        if not question.contrast:
            result.append(_answer_frontier(question, studies))
            continue
        mine = {name: judged[question.id, name] for name in studies if (question.id, name) in judged}
        texts = [
            (f"{name}: " if len(studies) > 1 else "") + sentence(j, metrics[question.id, name], len(family))
            for name, j in mine.items()
        ]
        missing = [name for name in studies if name not in mine]
        texts += [f"{name}: has no such arms" for name in missing]
        texts += [
            f"no completed run of these arms has a {metrics[question.id, name].name}"
            for name, j in mine.items()
            if not j.contrast.difference.n and not j.contrast.any_diverged
        ]
        reply = answer(question, mine)
        texts = [text.removeprefix(f"{reply}: ") for text in texts]  # not resolved is said of both once
        advice = "; ".join(
            recommend(studies[name], question, j, metrics[question.id, name], len(family)) for name, j in mine.items()
        )
        known = dict.fromkeys(arm for read in studies.values() for arm in read.study.arms)
        evidence = [arm for pattern in question.contrast for arm in fnmatch.filter(known, pattern)]
        result.append(
            (
                {
                    "id": question.id,
                    "claim": question.claim,
                    "answer": reply,
                    "text": ". ".join(texts),
                    "contrast": question.contrast,
                    "evidence": evidence,
                },
                {"id": question.id, "text": advice or "none, because no study has these arms", "evidence": evidence},
            )
        )
    return result


def answer(question: Question, judged: Mapping[str, st.Judgement]) -> str:
    """confirmed where every clause that confirms it holds; rejected where one that rejects it does, by default the
    opposite of one that confirms it; else not resolved."""

    def holds(clause: tuple[bool, str, str]) -> bool | None:
        negated, verdict, study = clause
        one = judged.get(study) if study else next(iter(judged.values()), None)
        truth = None if one is None else _is(one, verdict)
        return truth if truth is None or not negated else not truth

    confirming = [holds(clause) for clause in clauses(question.confirmed_if)]
    rejecting = [truth is False for truth in confirming]
    if question.rejected_if:
        rejecting = [holds(clause) is True for clause in clauses(question.rejected_if)]
    if all(truth is True for truth in confirming):
        return "confirmed"
    return "rejected" if any(rejecting) else "not resolved"


def _is(judged: st.Judgement, verdict: str) -> bool | None:
    """Whether a judgement says better, worse, equivalent or diverges, says it is not so, or leaves it open (None)."""
    if verdict == "diverges":
        if judged.verdict == "diverges":
            return judged.contrast.reference_diverged[0] == 0 or None
        return False if judged.divergence.high < 0.5 else None  # with none of six or more, most runs do not
    if judged.verdict in ("diverges", "reference diverges", "not resolved"):
        return None
    return judged.verdict == verdict


def _answer_frontier(question: Question, studies: Mapping[str, ReadStudy]) -> tuple[Plain, Plain]:
    """Whether an arm is on one study's frontier of speed and memory, and not on the other's."""
    alone = [frontier(read, "memory") for read in studies.values()]
    shared = [
        arm for arm in alone[0] if all(arm in share for share in alone)
    ]  # of both, or an arm that was not run tells
    shares = [frontier(read, "memory", shared) if shared else {} for read in studies.values()]
    left_out = sorted(set().union(*(read.study.arms for read in studies.values())) - set(shared))
    known = {arm: [_on(share[arm]) for share in shares] for arm in shared}
    differ = [arm for arm, on in known.items() if True in on and False in on]
    unknown = [arm for arm, on in known.items() if None in on]
    reply = "confirmed" if differ else "not resolved" if unknown or len(shared) < 2 else "rejected"
    names = " and ".join(studies)
    if differ:
        text = f"on the frontier of speed and memory of one and not of the other: {', '.join(differ)}"
        advice = f"choose by task: {', '.join(differ)} pay{'s' * (len(differ) == 1)} on one of {names} only"
    elif reply == "rejected":
        text = f"{names} have the same arms on the frontier of speed and memory"
        advice = f"for speed and memory choose alike for {names}: {', '.join(a for a, on in known.items() if all(on))}"
    else:
        text = (
            f"no arm of {len(shared)} is surely on one frontier and off the other; open: {', '.join(unknown) or 'all'}"
        )
        advice = "none, because it is open which arms are on the frontiers"
    text += f"; left out, as not known in both: {', '.join(left_out)}" if left_out else ""
    return (
        {"id": question.id, "claim": question.claim, "answer": reply, "text": text, "contrast": [], "evidence": differ},
        {"id": question.id, "text": advice, "evidence": differ},
    )


def _on(share: float) -> bool | None:
    return True if share > ON else False if share < OFF else None


# -- recommendations ------------------------------------------------------------------------------------------------


def place(read: ReadStudy) -> str:
    """`for language modelling on NVIDIA H100`: what a recommendation holds for."""
    task = {"lm": "language modelling", "classify": "classification"}[read.study.recipe.get("task", "lm")]
    devices = sorted({str(run.environment.get("device_name") or "") for run in read.runs.values()} - {""})
    return f"for {task} on {' and '.join(devices) or 'unknown hardware'}"


def recommend(read: ReadStudy, question: Question, judged: st.Judgement, metric: Metric, family: int) -> str:
    """What follows from one contrast, by rule: the better one; of equivalent ones the surely faster; else nothing.

    Args:
        family: number of contrasts that are asked about together; the p of a speed-up is multiplied by it (Bonferroni).
    """
    arm, reference = question.contrast
    start, quality = place(read), LABELS.get(metric.name, metric.name)
    lost = lost_runs(read, question.contrast)
    if judged.verdict == "better":
        return f"{start}: {arm} rather than {reference}, for its {quality}{lost}"
    if judged.verdict == "worse":
        return f"{start}: {reference} rather than {arm}, for its {quality}{lost}"
    ours, theirs = judged.contrast.diverged, judged.contrast.reference_diverged
    if ours[0] and theirs[0]:
        return f"none {start}, because runs of both {arm} and {reference} diverged"
    if judged.contrast.any_diverged:
        bad, (k, n) = (arm, ours) if ours[0] else (reference, theirs)
        kinds = Counter(run.result.get("failure") or "unknown" for run in read.of(bad) if run.status == "diverged")
        return f"{start}: not {bad}; {k} of {n} runs diverged ({', '.join(map(str, kinds))})"
    if judged.verdict == "equivalent":
        ratio = st.speedup(read.speeds(arm), read.speeds(reference))
        if ratio.p * family < st.ALPHA and ratio.value > 1:
            times = f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}] times as fast"
            return f"{start}: {arm}, as good as {reference} and {times}{lost}"
        if ratio.p * family < st.ALPHA:
            times = f"{1 / ratio.value:.2f} [{1 / ratio.high:.2f}, {1 / ratio.low:.2f}] times as fast"
            return f"{start}: {reference}, as good as {arm} and {times}{lost}"
        return f"{start}: {arm} or {reference}; their {quality} is equivalent and neither is surely faster{lost}"
    more = f"; {more_seeds(judged)} would settle it" if judged.more_seeds else ""
    return f"none {start}, because {arm} against {reference} is not resolved{more}"


def lost_runs(read: ReadStudy, arms: Sequence[str]) -> str:
    """`; 3 of 5 runs of x ran out of memory or failed`, where any did."""
    text = ""
    for arm in arms:
        runs = read.of(arm)
        if lost := sum(run.status in ("out_of_memory", "failed") for run in runs):
            text += f"; {lost} of {len(runs)} runs of {arm} ran out of memory or failed"
    return text


def overall(read: ReadStudy, arms: Sequence[Plain], margin: float) -> Plain:
    """The fastest arm that is equivalent to the baseline or better and surely faster; or none, and why.

    Surely: t over seeds, by Holm over all arms. An arm of which a run diverged, failed or ran out of memory is out.
    """
    start, baseline = place(read), read.study.baseline
    quality = LABELS.get(read.study.metric.name, read.study.metric.name)
    others = [a for a in arms if a["comparison"]]
    sound = [a for a in others if not {"diverged", "failed", "out_of_memory"} & a["statuses"].keys()]
    good = [a for a in sound if a["comparison"]["verdict"] in ("better", "equivalent")]
    base = read.speeds(baseline)
    ps = st.holm([st.speedup(read.speeds(a["name"]), base).p for a in others])
    sure = {a["name"] for a, p in zip(others, ps, strict=True) if p < st.ALPHA}
    fast = [a for a in good if a["name"] in sure and a["speedup"]["value"] > 1]
    if fast:
        best = max(fast, key=lambda a: a["speedup"]["value"])
        s, verdict = best["speedup"], best["comparison"]["verdict"]
        as_good = f"better by more than {margin:g}" if verdict == "better" else f"equivalent within {margin:g}"
        times = f"{s['value']:.2f} [{s['low']:.2f}, {s['high']:.2f}] times as fast as {baseline}"
        text = f"{start}: {best['name']}, {times}, {quality} {as_good}"
        return {"id": "overall", "text": text, "evidence": [best["name"], baseline]}
    better = [a for a in good if a["comparison"]["verdict"] == "better"]
    if better:
        pick = min if read.study.metric.better == "lower" else max
        best = pick(better, key=lambda a: a["comparison"]["mean"])
        text = f"{start}: {best['name']} rather than {baseline}, for its {quality}"
        return {"id": "overall", "text": text, "evidence": [best["name"], baseline]}
    why = "no arm was compared"
    if good:
        why = f"no arm that is equivalent to {baseline} ({', '.join(a['name'] for a in good)}) is surely faster"
    elif any(a["comparison"]["n"] > 1 for a in others):
        why = f"no arm is shown better than {baseline}, or equivalent within {margin:g}"
    return {"id": "overall", "text": f"none {start}, because {why}", "evidence": [a["name"] for a in good]}


def default_of(read: ReadStudy, margin: float) -> Plain:
    """Which arm the study's rule makes the default, and why."""
    rule, metric = read.study.default, read.study.metric
    assert rule is not None
    limit_arm = rule.time_of or rule.incumbent
    judged = st.judge({arm: contrast(read, arm, rule.incumbent, metric, margin) for arm in rule.among})
    seconds = {arm: mean_seconds(read, arm) for arm in (*rule.among, limit_arm)}
    better = {arm: j.contrast.difference.mean for arm, j in judged.items() if j.verdict == "better"}
    quick = [arm for arm in better if seconds[arm] <= 1.02 * seconds[limit_arm]]
    evidence = list(dict.fromkeys([rule.incumbent, *rule.among]))
    if quick:
        pick = (min if metric.better == "lower" else max)(quick, key=lambda arm: better[arm])
        text = f"the default {place(read)} is {pick}: {sentence(judged[pick], metric, len(judged))}"
        return {"id": "default", "text": text, "evidence": evidence}
    why = f"none of {', '.join(rule.among)} is shown better"
    if better:
        slow = ", ".join(f"{arm} ({seconds[arm] / seconds[limit_arm]:.2f} times)" for arm in better)
        why = f"what is better takes more time than {limit_arm}: {slow}"
    return {"id": "default", "text": f"the default {place(read)} stays {rule.incumbent}: {why}", "evidence": evidence}


# -- at equal cost --------------------------------------------------------------------------------------------------


def seconds_a_step(run: ReadRun) -> float:
    return number(run.result.get("time_per_iter_ms")) / 1000


def mean_seconds(read: ReadStudy, arm: str) -> float:
    """Mean seconds of training of an arm's completed runs, evaluations and checkpoints left out; NaN without any."""
    known = [seconds_a_step(run) * run.value("steps") for run in read.of(arm) if run.status == "completed"]
    return float(np.mean(known)) if known else math.nan


def at_equal(read: ReadStudy) -> list[Plain]:
    """Validation losses where all arms have spent as many steps, as many tokens, as much time; [] of equal ones.

    The budget is what the cheapest completed run spent in all. A run that went on is read off its curve of validation
    losses there, linearly between evaluations: its learning rate had not come down yet, which speaks against it.
    """
    done = [run for run in read.runs.values() if run.status == "completed" and len(run.curves["val_loss"][0])]
    result = []
    for what in ("steps", read.unit, "seconds"):
        ends = {id(run): _spent(run, what, run.value("steps")) for run in done}
        known = [end for end in ends.values() if end > 0]
        if len(known) < 2 or max(known) <= 1.01 * min(known):
            continue
        budget = min(known)
        at = {(run.arm, run.seed): _at(run, what, budget) for run in done if ends[id(run)] > 0}
        arms = []
        for name in read.study.arms:
            mine = {seed: value for (arm, seed), value in at.items() if arm == name}
            shared = {seed: v - base for seed, v in mine.items() if (base := at.get((read.study.baseline, seed)))}
            difference = summary(list(shared.values())) if name != read.study.baseline else None
            arms.append({"name": name, "quality": summary(list(mine.values())), "difference": difference})
        result.append({"what": what, "budget": budget, "arms": arms})
    return result


def _spent(run: ReadRun, what: str, step: float) -> float:
    if what == "steps":
        return step
    if what == "seconds":
        return step * seconds_a_step(run)
    return step * run.value(what) / run.value("steps") if run.value("steps") > 0 else math.nan


def _at(run: ReadRun, what: str, budget: float) -> float:
    steps, losses = run.curves["val_loss"]
    return float(np.interp(budget, [_spent(run, what, float(step)) for step in steps], losses))


# -- across studies -------------------------------------------------------------------------------------------------


def analyse_across(
    studies: Sequence[ReadStudy], comparison: Comparison, control: ReadStudy | None, warnings: list[str]
) -> Plain:
    """Rankings, flips and answers over two studies; what makes them hard to compare is added to `warnings`."""
    by_name = {read.study.name: read for read in studies}
    for name in comparison.compare:
        if name not in by_name:
            raise UserError(
                f"the comparison {comparison.name} is of {' and '.join(comparison.compare)}: "
                f"no folder of {name} was given"
            )
    chosen = {name: by_name[name] for name in comparison.compare}
    for what, key in FACTS.items():
        seen = [
            {str(run.environment[key]) for run in r.runs.values() if run.environment.get(key)} for r in chosen.values()
        ]
        if seen[0] and seen[1] and seen[0] != seen[1] and what != "commit":
            told = " and ".join(f"{name} {', '.join(sorted(v))}" for name, v in zip(chosen, seen, strict=True))
            warnings.append(f"the studies differ in their {what}: {told}")
    first, second = chosen.values()
    shared = [arm for arm in first.study.arms if arm in second.study.arms and first.of(arm) and second.of(arm)]
    pairs = list(itertools.combinations(shared, 2))
    flips = st.flips({pair: _contrasts(chosen, pair) for pair in pairs})
    controlled: dict[tuple[str, str], st.Flip] = {}
    if control is not None and comparison.control is not None:
        stands_in = {comparison.control.of: control}
        replaced = {name: stands_in.get(name, read) for name, read in chosen.items()}
        controlled = st.flips({pair: _contrasts(replaced, pair) for pair in pairs if flips[pair].verdict == "flips"})
    values = [{arm: read.values(arm, read.study.metric.name) for arm in shared} for read in chosen.values()]
    tau = st.ranking(values[0], values[1], (first.study.metric.better, second.study.metric.better))
    tau_text = "fewer than two arms can be ranked in both studies"
    if math.isfinite(tau.value):
        interval = f"[{tau.low:.2f}, {tau.high:.2f}]"
        tau_text = f"Kendall's tau-b {tau.value:.2f} {interval} over {tau.n} arms, p = {tau.p:.2g} of no association"
    flipping = {arm for pair, flip in flips.items() if flip.verdict == "flips" for arm in pair}
    ranks = [_ranks(v, read.study.metric.better) for v, read in zip(values, chosen.values(), strict=True)]
    answers = answer_questions(comparison.questions, chosen)
    flips_told = [_flip(pair, flip, chosen, controlled.get(pair), comparison) for pair, flip in flips.items()]
    return clean(
        {
            "name": comparison.name,
            "description": comparison.description,
            "studies": comparison.compare,
            "ranking": {
                "tau": tau.value,
                "low": tau.low,
                "high": tau.high,
                "p": tau.p,
                "n": tau.n,
                "text": tau_text,
            },
            "ranks": [{"arm": arm, "ranks": [r.get(arm) for r in ranks], "flip": arm in flipping} for arm in shared],
            "flips": flips_told,
            "counts": dict(Counter(flip.verdict for flip in flips.values())),
            "questions": [reply for reply, _ in answers],
            "recommendations": [advice for _, advice in answers],
        }
    )


def _contrasts(studies: Mapping[str, ReadStudy], pair: tuple[str, str]) -> tuple[st.Contrast, st.Contrast]:
    a, b = (contrast(r, pair[0], pair[1], r.study.metric, margin_of(r, r.study.metric)[0]) for r in studies.values())
    return a, b


def _ranks(values: Mapping[str, st.Runs], better: str) -> dict[str, int]:
    """Arm to its place, 1 the best; arms with a diverged run share the last one, and one without a value has none."""
    means = {
        arm: math.inf if runs.diverged else float(np.mean(known)) * (1 if better == "lower" else -1)
        for arm, runs in values.items()
        if (known := [v for v in runs.values.values() if math.isfinite(v)]) or runs.diverged
    }
    return {arm: 1 + sum(other < mean for other in means.values()) for arm, mean in means.items()}


def _flip(
    pair: tuple[str, str],
    flip: st.Flip,
    studies: Mapping[str, ReadStudy],
    controlled: st.Flip | None,
    comparison: Comparison,
) -> Plain:
    parts = [
        f"{name}: {signed(judged.contrast.difference.mean)}{interval_of(judged.contrast.difference)}"
        for name, judged in zip(studies, (flip.first, flip.second), strict=True)
        if judged.contrast.difference.n
    ]
    text = f"{flip.verdict}: {'; '.join(parts)}"
    if math.isfinite(flip.interaction.value):
        interaction = f"{signed(flip.interaction.value)}{interval_of(flip.interaction)} margins"
        text += f"; interaction {interaction}, p = {flip.p_holm:.2g}"
    if flip.verdict == "flips":
        rates = {name: read.study.recipe.get("optim", {}).get("lr") for name, read in studies.items()}
        if controlled is not None and comparison.control is not None:
            one = (controlled.first, controlled.second)[comparison.compare.index(comparison.control.of)]
            if controlled.verdict == "flips":
                text += "; it stays at a matched learning rate"
            elif controlled.verdict == "agrees" or one.verdict == "equivalent":
                text += "; gone at a matched learning rate: an artefact"
            else:
                text += f"; {comparison.control.study} does not resolve whether the learning rate is why"
        elif len(set(rates.values())) > 1:
            wanted = f", which {comparison.control.study} would tell" if comparison.control else ""
            shown = ", ".join(f"{rate:g}" for rate in rates.values() if rate)
            text += f"; perhaps an artefact of the learning rates ({shown}){wanted}"
    return {
        "arm": pair[0],
        "reference": pair[1],
        "verdict": flip.verdict,
        "text": text,
        "p_interaction": flip.p_holm,
        "controlled": controlled.verdict if controlled else None,
    }


# -- runs -----------------------------------------------------------------------------------------------------------


def failure(run: ReadRun) -> Plain:
    r, steps = run.result, [number(run.result.get(key)) for key in ("failed_at_step", "steps")]
    text = {key: None if r.get(key) is None else str(r[key]) for key in ("failure", "failed_tensor", "reason")}
    return {
        "arm": run.arm,
        "seed": run.seed,
        "status": run.status,
        "step": next((int(step) for step in steps if math.isfinite(step)), None),
        "failure": text["failure"],
        "tensor": text["failed_tensor"],
        "reason": text["reason"],
    }


def curves(run: ReadRun) -> Plain:
    ended = failure(run)["step"] if run.status == "diverged" else None
    return {
        "arm": run.arm,
        "seed": run.seed,
        "status": run.status,
        "ended": ended,
        "folder": str(run.folder),
        "train": points(*run.curves["loss"]),
        "val": points(*run.curves["val_loss"]),
    }


def points(steps: Array, values: Array) -> list[list[float]]:
    steps, values = thin(steps, values, POINTS)
    return [[int(step), float(value)] for step, value in zip(steps, values, strict=True)]


def mean_curves(runs: Sequence[ReadRun]) -> Plain:
    """Mean losses of an arm's completed runs, at the steps that all of them have; {} below two of them."""
    completed = [run for run in runs if run.status == "completed"]
    result = {}
    for name, key in (("train", "loss"), ("val", "val_loss")):
        tracks = [run.curves[key] for run in completed]
        if len(tracks) > 1 and len(steps := reduce(np.intersect1d, [steps for steps, _ in tracks])):
            means = np.mean([values[np.isin(at, steps)] for at, values in tracks], axis=0)
            result[name] = points(steps, means)
    return result


def provenance(read: ReadStudy) -> Plain:
    def seen(key: str) -> list[str]:
        values = {str(run.environment[key]) for run in read.runs.values() if run.environment.get(key) is not None}
        return sorted(values)

    folder = read.folder.resolve()
    return {
        "hardware": seen("device_name"),
        "versions": {key: seen(key) for key in ("gptlab", "torch", "python", "cuda")},
        "commits": seen("git_commit"),
        "command": shlex.join(["gptlab", "study", "run", str(folder / "study.toml"), "--out", f"{folder}-again"]),
        "recipe": tomli_w.dumps(_filled(read.study.recipe)),
        "flags": tomli_w.dumps(_filled(read.study.flags)),
        "overrides": {name: tomli_w.dumps(_filled(arm.settings)) for name, arm in read.study.arms.items()},
    }


def _filled(layer: Mapping[str, Any]) -> Plain:
    return {key: value for key, value in layer.items() if value is not None}


def _flat(layer: Mapping[str, Any], prefix: str = "") -> Plain:
    flat: Plain = {}
    for key, value in layer.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def clean(value: Any) -> Any:
    """The same without what JSON cannot say: NaN and infinity are null, numpy's numbers Python's."""
    if isinstance(value, Mapping):
        return {str(key): clean(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [clean(inner) for inner in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
