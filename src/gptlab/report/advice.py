"""What a report recommends, by rule, from its verdicts, with what it costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from gptlab.config import Metric, Question, factors_on
from gptlab.report import divergence, frontiers, noise, timing, verdicts, words
from gptlab.report import statistics as st
from gptlab.report.divergence import Divergence, kinds_of, of_arm
from gptlab.report.effects import effect_name
from gptlab.report.estimates import Plain, contrast_of, judged_against, memory_ratio, steps_ratio
from gptlab.report.grids import BestOf
from gptlab.report.runs import mean_seconds
from gptlab.report.studies import ReadStudy

LEAST_SPEEDUP = 1.02  # smaller ones, though significant, are no reason to choose an arm


def place_of(read: ReadStudy) -> str:
    devices = {str(run.environment.get("device_name") or "") for run in read.runs.values()} - {""}
    return words.place(read.study.recipe.get("task", "lm"), sorted(devices))


def _lost(read: ReadStudy, arms: Sequence[str]) -> dict[str, tuple[int, int]]:
    """For each arm the number of runs that failed or ran out of memory, and the number of its runs."""
    runs = {arm: read.of(arm) for arm in arms}
    return {arm: (sum(run.status in ("out_of_memory", "failed") for run in of), len(of)) for arm, of in runs.items()}


def _cost(read: ReadStudy, arm: str, reference: str) -> tuple[float, float, float]:
    """Ratios of speed, memory and steps; NaN if unknown."""
    speed = timing.speedup(read.paces(arm), read.paces(reference)).value
    return speed, memory_ratio(read, arm, reference), steps_ratio(read, arm, reference)


def recommend(
    read: ReadStudy,
    question: Question,
    judged: verdicts.Judgement,
    metric: Metric,
    family: int,
    asked: Divergence | None = None,
) -> str:
    """What follows from one contrast: the better arm; of two equivalent arms the faster one; else nothing.

    An arm is advised against if it is shown to diverge more often than the study's other arms.

    Args:
        family: number of contrasts asked about together. The p of a speed-up is multiplied by it (Bonferroni).
        asked: whether the arm diverges, if the question asks that; else it is tested over all arms of the study.
    """
    arm, reference = question.contrast
    if isinstance(judged.contrast, BestOf) and all(judged.contrast.chosen):
        arm, reference = judged.contrast.chosen
    start, quality = place_of(read), words.metric_name(metric.name)
    lost = words.lost_text(_lost(read, (arm, reference))) + words.survivors_text(judged.contrast, reference)
    if judged.verdict in ("better", "worse"):
        first, second = (arm, reference) if judged.verdict == "better" else (reference, arm)
        cost = words.cost_text(*_cost(read, first, second), second)
        return f"{start}: use {first} rather than {second}, for better {quality}, {cost}{lost}"
    if judged.contrast.any_diverged:
        broken = {arm: asked or of_arm(read, arm), reference: of_arm(read, reference)}
        broken = {name: one for name, one in broken.items() if one.diverged}
        bad = [name for name, one in broken.items() if one.shown]
        told = [
            f"{words.diverged_runs(one, name)} ({', '.join(kinds_of(read, name))}){words.more_often_text(one)}"
            for name, one in broken.items()
            if name in bad or not bad
        ]
        advice = f"{start}: do not use {' or '.join(bad)}; " if bad else f"no arm is recommended {start}: "
        return advice + "; ".join(told)
    if judged.verdict == "equivalent":
        if not judged.p_equivalent * family < st.ALPHA:
            once = f"{arm} and {reference} are equivalent taken alone, but not as one of {family} comparisons"
            return f"no arm is recommended {start}: {once} (p = {judged.p_equivalent * family:.2g}, Bonferroni)"
        ratio = timing.speedup(read.paces(arm), read.paces(reference))
        if not (ratio.p * family < st.ALPHA and max(ratio.value, 1 / ratio.value) >= LEAST_SPEEDUP):
            return f"{start}: use {arm} or {reference}; {quality} is equivalent, neither is significantly faster{lost}"
        if ratio.value > 1:
            first, second, times = arm, reference, (ratio.value, ratio.low, ratio.high)
        else:
            first, second, times = reference, arm, (1 / ratio.value, 1 / ratio.high, 1 / ratio.low)
        memory = words.memory_text(_cost(read, first, second)[1])
        return f"{start}: use {first}, as good as {second} and {words.times_as_fast(*times)}, {memory}{lost}"
    verdict = "was not run" if judged.verdict == "not run" else "is not resolved"
    return f"no arm is recommended {start}: {arm} against {reference} {verdict}"


def recommend_overall(read: ReadStudy, arms: Sequence[Plain]) -> Plain:
    """The fastest arm that is equivalent to the baseline or better, and significantly faster; or none, and why.

    Significance: t over seeds, by Holm over all arms. Equivalence: by Holm over the arms that are faster, which speed
    alone decides, so in at most 5% of studies an arm is recommended that is worse by the margin or more. An arm with a
    run that diverged, failed or ran out of memory is no candidate.
    """
    start, baseline, margin = place_of(read), read.study.baseline, read.study.metric.margin
    quality = words.metric_name(read.study.metric.name)
    others = [a for a in arms if a["comparison"]]
    sound = [a for a in others if not {"diverged", "failed", "out_of_memory"} & a["statuses"].keys()]
    good = [a for a in sound if a["comparison"]["verdict"] in ("better", "equivalent")]
    better = [a for a in good if a["comparison"]["verdict"] == "better"]
    base = read.paces(baseline)
    ps = st.holm([timing.speedup(read.paces(a["name"]), base).p for a in others])
    sure = {a["name"] for a, p in zip(others, ps, strict=True) if p < st.ALPHA}
    faster = [a for a in sound if a["name"] in sure and a["speedup"]["value"] >= LEAST_SPEEDUP]
    fast = shown_as_good(faster)
    evidence = [a["name"] for a in good]
    lost = [run.seed for run in read.of(baseline) if run.status == "diverged"]
    runs = divergence.counts_of(read, baseline)[1]
    if fast:
        best = max(fast, key=lambda a: a["speedup"]["value"])
        as_good = "better" if best in better else f"equivalent within {margin:g}"
        times = words.times_as_fast(*(best["speedup"][key] for key in ("value", "low", "high")))
        memory = words.memory_text(_cost(read, best["name"], baseline)[1])
        text = f"use {best['name']}, {times} as {baseline}, {memory}; {quality} is {as_good}"
        text += words.together_text(best["name"], _nested(best, others))
        evidence = [best["name"], baseline]
    elif better:
        pick = min if read.study.metric.better == "lower" else max
        best, added = _smallest(read, pick(better, key=lambda a: a["comparison"]["mean"]), better)
        name = best["name"]
        cost = words.cost_text(*_cost(read, name, baseline), baseline)
        text, evidence = f"use {name} rather than {baseline}, for better {quality}, {cost}", [name, baseline]
        text += words.together_text(name, _nested(best, others))
        text += f"; {added} adds changes to it and is not shown to be better than it" if added else ""
    else:
        text = f"no arm has two seeds in common with {baseline}"
        if good:
            text = f"no arm that is equivalent to {baseline} ({', '.join(evidence)}) is significantly faster"
            if alone := [a["name"] for a in faster if a in good]:
                text = (
                    f"{', '.join(alone)}, each taken alone, would be equivalent to {baseline}, but not after Holm over "
                )
                text += f"{len(faster)} faster arms"
        elif lost and runs - len(lost) < 2:
            text = f"{len(lost)} of {runs} runs of {baseline} diverged, so no arm can be compared with it"
        elif any(a["comparison"]["n"] > 1 for a in others):
            text = f"no arm is shown to be better than {baseline}"
            text += f", or equivalent within {margin:g}" if margin else f"; {verdicts.NO_MARGIN}"
        start = f"no arm is recommended {start}"
    if lost and runs - len(lost) > 1:
        text += f"; compared over the seeds in which {baseline} did not diverge (it did in {words.seeds_text(lost)})"
    return {"id": "overall", "text": f"{start}: {text}", "evidence": evidence}


def recommend_factors(read: ReadStudy, found: Plain) -> Plain:
    """The changes of a factorial that are shown to help, with what each costs, and those that are shown to do harm.

    Args:
        found: as `effects_of` returns it, with effects.
    """
    main = [effect for effect in found["effects"] if effect["kind"] == "main effect"]
    by = {verdict: [e["name"] for e in main if e["verdict"] == verdict] for verdict in ("better", "worse")}
    linked = [e for e in found["effects"] if e["verdict"] == "interact"]
    text = f"no change is recommended {place_of(read)}: none is shown to help"
    if by["better"]:
        text = f"{place_of(read)}: use {'; '.join(f'{name}, {_cost_of(read, name)}' for name in by['better'])}"
    text += f". Leave out {', '.join(by['worse'])}" if by["worse"] else ""
    if linked:
        text += (
            f". Compare the arms themselves where changes depend on one another: {'; '.join(map(effect_name, linked))}"
        )
    return {"id": "overall", "text": text, "evidence": [read.study.baseline]}


def _cost_of(read: ReadStudy, factor: str) -> str:
    """Speed, memory and steps of the arms with a factor as ratios to those without it."""
    sides: tuple[list[str], list[str]] = ([], [])
    for arm in read.study.arms:
        sides[factor not in factors_on(arm, read.study.baseline)].append(arm)

    def ratio(of: Callable[[str], Iterable[float]]) -> float:
        """Of geometric means over the arms' runs; NaN if a side has none."""
        logs = [[math.log(value) for arm in side for value in of(arm) if value > 0] for side in sides]
        return math.exp(np.mean(logs[0]) - np.mean(logs[1])) if all(logs) else st.NAN

    speed = ratio(lambda arm: [one.median for one in read.paces(arm).values()])
    memory = ratio(lambda arm: [run.value("peak_memory_gb") for run in read.of(arm)])
    steps = ratio(lambda arm: [run.value("steps") for run in read.of(arm)])
    return words.cost_text(speed, memory, steps, f"the arms without {factor}")


def _nested(arm: Plain, others: Sequence[Plain]) -> list[str]:
    """Arms that change some of the settings that an arm changes, to the same values, and no other."""
    own = arm["settings"].items()
    return [a["name"] for a in others if a["settings"] and a["settings"].items() < own]


def _smallest(read: ReadStudy, best: Plain, better: Sequence[Plain]) -> tuple[Plain, str]:
    """The arm with the fewest changes of those that the best arm adds to without being shown to be better.

    Arms that each keep the changes of the one before are not recommended for a last change that did nothing. All these
    arms are better than the baseline; Holm over them.

    Returns:
        The arm, and the name of the best one if that is another.
    """
    parts = [a for a in better if a["name"] in _nested(best, better)]
    metric = read.study.metric
    others = noise.Others(read, metric.name)
    judged = verdicts.judge({a["name"]: contrast_of(read, best["name"], a["name"], metric, others) for a in parts})
    enough = [a for a in parts if judged[a["name"]].verdict != "better"]
    if not enough:
        return best, ""
    return min(enough, key=lambda a: len(a["settings"])), best["name"]


def shown_as_good(arms: Sequence[Plain]) -> list[Plain]:
    """The arms that are better than the baseline, or equivalent to it after Holm over the given arms."""
    unknown = float("nan")
    ps = st.holm([unknown if (p := a["comparison"]["p_equivalent"]) is None else p for a in arms])
    said = [a["comparison"]["verdict"] for a in arms]
    return [
        a
        for a, verdict, p in zip(arms, said, ps, strict=True)
        if verdict == "better" or (verdict == "equivalent" and p < st.ALPHA)
    ]


def default_of(read: ReadStudy) -> Plain:
    """Which arm the study's rule makes the default, and why."""
    rule, metric = read.study.default, read.study.metric
    assert rule is not None
    limit_arm = rule.time_of or rule.incumbent
    judged = judged_against(read, rule.among, rule.incumbent)
    seconds = {arm: mean_seconds(read, arm) for arm in (*rule.among, limit_arm)}
    better = {arm: j.contrast.difference.mean for arm, j in judged.items() if j.verdict == "better"}
    quick = [arm for arm in better if seconds[arm] <= 1.02 * seconds[limit_arm]]
    if quick:
        pick = (min if metric.better == "lower" else max)(quick, key=lambda arm: better[arm])
        shown = words.evidence_text(judged[pick], metric.name, len(judged))
        text = f"is {pick}, which is better than {rule.incumbent}: {shown}"
    elif better:
        slow = ", ".join(f"{arm} ({seconds[arm] / seconds[limit_arm]:.2f} times)" for arm in better)
        text = f"stays {rule.incumbent}: the better arms take more time than {limit_arm}: {slow}"
    else:
        text = f"stays {rule.incumbent}: none of {', '.join(rule.among)} is shown to be better"
    evidence = list(dict.fromkeys([rule.incumbent, *rule.among]))
    return {"id": "default", "text": f"the default {place_of(read)} {text}", "evidence": evidence}


def by_task(studies: Mapping[str, ReadStudy], only: Mapping[str, list[str]]) -> str:
    """What follows from arms that save time or memory in one study only: those that are as good as the baseline.

    Speed and memory alone decide which arms these are, so Holm over them holds equivalence to 5%.
    """
    judged_in = {name: frontiers.judged_of(studies[name]) for name, arms in only.items() if arms}
    rows = {(name, arm): judged_in[name].get(arm) for name, arms in only.items() for arm in arms}
    ps = dict(zip(rows, st.holm([one.p_equivalent if one else 0.0 for one in rows.values()]), strict=True))
    parts = []
    for (name, arm), judged in rows.items():
        read = studies[name]
        quality, baseline = words.metric_name(read.study.metric.name), read.study.baseline
        told = f"{arm}, {words.cost_text(*_cost(read, arm, baseline), baseline)}"
        if judged is None:
            parts.append(f"{place_of(read)}: use {arm}, the baseline")
        elif judged.verdict == "better" or (judged.verdict == "equivalent" and ps[name, arm] < st.ALPHA):
            parts.append(f"{place_of(read)}: use {told}; {quality} is {judged.verdict}")
        else:
            parts.append(
                f"{place_of(read)}: {told}, saves time or memory, but its {quality} is not shown to be as good"
            )
    return "; ".join(parts)
