"""The questions of a study or a comparison, answered, and the recommendations that follow by rule.

All contrasts that are asked about together are one family, which Holm's correction holds to 5%.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Mapping, Sequence

from gptlab.config import Metric, Question, clauses
from gptlab.report import statistics as st
from gptlab.report import timing, verdicts, words
from gptlab.report.estimates import Plain, contrast_of, frontier_shares, memory_of
from gptlab.report.grids import BestOf, chosen_text
from gptlab.report.runs import mean_seconds
from gptlab.report.studies import ReadStudy

LEAST_SPEEDUP = 1.02  # smaller ones, though significant, are no reason to choose an arm
ON, OFF = 0.975, 0.025  # shares of draws above which an arm counts as on the frontier, and below which as off it


def answer_questions(questions: Sequence[Question], studies: Mapping[str, ReadStudy]) -> list[tuple[Plain, Plain]]:
    """(answer, recommendation) of each question.

    Args:
        questions: of one study, or of a comparison.
        studies: by name.
    """
    family: dict[tuple[str, str], verdicts.Contrast] = {}
    for question in questions:
        for name, read in studies.items() if question.contrast else ():
            if all(fnmatch.filter(read.study.arms, arm) for arm in question.contrast):
                arm, reference = question.contrast
                family[question.id, name] = contrast_of(read, arm, reference, question.metric or read.study.metric)
    judged = verdicts.judge(family)
    result = []
    for question in questions:
        if question.contrast:
            mine = {name: judged[question.id, name] for name in studies if (question.id, name) in judged}
            result.append(_answer_contrast(question, studies, mine, len(family)))
        else:
            result.append(_answer_frontier(question, studies))
    return result


def _answer_contrast(
    question: Question, studies: Mapping[str, ReadStudy], judged: Mapping[str, verdicts.Judgement], family: int
) -> tuple[Plain, Plain]:
    texts, advice = [], []
    for name, read in studies.items():
        prefix = f"{name}: " if len(studies) > 1 else ""
        if name not in judged:
            texts.append(f"{name}: the study does not have these arms")
            continue
        metric = question.metric or read.study.metric
        text = prefix + words.question_text(judged[name], metric.name, family, *question.contrast)
        best = judged[name].contrast
        texts.append(text + (chosen_text(read, question.contrast, best) if isinstance(best, BestOf) else ""))
        advice.append(recommend(read, question, judged[name], metric, family))
    known = dict.fromkeys(arm for read in studies.values() for arm in read.study.arms)
    evidence = [arm for pattern in question.contrast for arm in fnmatch.filter(known, pattern)]
    recommended = "; ".join(advice) or "no arm is recommended: no study has these arms"
    return _question_data(question, answer_to(question, judged), ". ".join(texts), recommended, evidence)


def _question_data(question: Question, answer: str, text: str, advice: str, evidence: list[str]) -> tuple[Plain, Plain]:
    told = {"id": question.id, "claim": question.claim, "answer": answer, "text": text, "contrast": question.contrast}
    return told | {"evidence": evidence}, {"id": question.id, "text": advice, "evidence": evidence}


def answer_to(question: Question, judged: Mapping[str, verdicts.Judgement]) -> str:
    """confirmed, rejected or not resolved.

    A question is confirmed if all clauses of `confirmed_if` hold. It is rejected if a clause of `rejected_if` holds;
    without `rejected_if`, if a clause of `confirmed_if` is shown not to hold.
    """

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


def _is(judged: verdicts.Judgement, verdict: str) -> bool | None:
    """Whether a judgement is better, worse, equivalent or diverges; None if it is open."""
    if verdict == "diverges":
        if judged.verdict == "diverges":
            return judged.contrast.reference_diverged[0] == 0 or None
        return False if judged.divergence.high < 0.5 else None  # six runs or more, and none diverged
    if judged.verdict in ("diverges", "reference diverges", "not resolved"):
        return None
    return judged.verdict == verdict


def _answer_frontier(question: Question, studies: Mapping[str, ReadStudy]) -> tuple[Plain, Plain]:
    """Whether an arm is on one study's frontier of speed and memory, and not on the other's."""
    alone = [frontier_shares(read, "memory") for read in studies.values()]
    # An arm that only one study ran could push others off the frontier there, so only shared arms are compared.
    shared = [arm for arm in alone[0] if all(arm in share for share in alone)]
    shares = [frontier_shares(read, "memory", shared) if shared else {} for read in studies.values()]
    left_out = sorted(set().union(*(read.study.arms for read in studies.values())) - set(shared))
    known = {arm: [_is_on(share[arm]) for share in shares] for arm in shared}
    differ = [arm for arm, on in known.items() if True in on and False in on]
    unknown = [arm for arm, on in known.items() if None in on]
    alike = [arm for arm, on in known.items() if all(on)]
    reply = "confirmed" if differ else "not resolved" if unknown or len(shared) < 2 else "rejected"
    if differ:
        advice = f"choose by task: {', '.join(differ)} saves time or memory in only one of {' and '.join(studies)}"
    elif reply == "rejected":
        advice = f"the same choice for {' and '.join(studies)}: {', '.join(alike)}"
    else:
        advice = "no arm is recommended: it is open which arms are on the frontiers"
    text = words.frontier_text(studies, len(shared), differ, alike, unknown)
    text += f"; left out, as not known in both: {', '.join(left_out)}" if left_out else ""
    return _question_data(question, reply, text, advice, differ)


def _is_on(share: float) -> bool | None:
    return True if share > ON else False if share < OFF else None


# -- recommendations ------------------------------------------------------------------------------------------------


def _place(read: ReadStudy) -> str:
    devices = {str(run.environment.get("device_name") or "") for run in read.runs.values()} - {""}
    return words.place(read.study.recipe.get("task", "lm"), sorted(devices))


def _lost(read: ReadStudy, arms: Sequence[str]) -> dict[str, tuple[int, int]]:
    """For each arm the number of runs that failed or ran out of memory, and the number of its runs."""
    runs = {arm: read.of(arm) for arm in arms}
    return {arm: (sum(run.status in ("out_of_memory", "failed") for run in of), len(of)) for arm, of in runs.items()}


def _cost(read: ReadStudy, arm: str, reference: str) -> tuple[float, float]:
    """Ratios of speed and memory; NaN if unknown."""
    ours, theirs = memory_of(read, arm), memory_of(read, reference)
    memory = ours["mean"] / theirs["mean"] if ours and theirs else st.NAN
    return timing.speedup(read.speeds(arm), read.speeds(reference)).value, memory


def recommend(read: ReadStudy, question: Question, judged: verdicts.Judgement, metric: Metric, family: int) -> str:
    """What follows from one contrast: the better arm; of two equivalent arms the faster one; else nothing.

    Args:
        family: number of contrasts asked about together. The p of a speed-up is multiplied by it (Bonferroni).
    """
    arm, reference = question.contrast
    if isinstance(judged.contrast, BestOf) and all(judged.contrast.chosen):
        arm, reference = judged.contrast.chosen
    start, quality = _place(read), words.metric_name(metric.name)
    lost = words.lost_text(_lost(read, (arm, reference)))
    if judged.verdict in ("better", "worse"):
        first, second = (arm, reference) if judged.verdict == "better" else (reference, arm)
        cost = words.cost_text(*_cost(read, first, second), second)
        return f"{start}: use {first} rather than {second}, for better {quality}, {cost}{lost}"
    ours, theirs = judged.contrast.diverged, judged.contrast.reference_diverged
    if ours[0] and theirs[0]:
        return f"no arm is recommended {start}: runs of both {arm} and {reference} diverged"
    if judged.contrast.any_diverged:
        bad, (k, n) = (arm, ours) if ours[0] else (reference, theirs)
        kinds = Counter(run.result.get("failure") or "unknown" for run in read.of(bad) if run.status == "diverged")
        return f"{start}: do not use {bad}; {k} of {n} runs diverged ({', '.join(map(str, kinds))})"
    if judged.verdict == "equivalent":
        if not judged.p_equivalent * family < st.ALPHA:
            once = f"{arm} and {reference} are equivalent taken alone, but not as one of {family} comparisons"
            return f"no arm is recommended {start}: {once} (p = {judged.p_equivalent * family:.2g}, Bonferroni)"
        ratio = timing.speedup(read.speeds(arm), read.speeds(reference))
        if not (ratio.p * family < st.ALPHA and max(ratio.value, 1 / ratio.value) >= LEAST_SPEEDUP):
            return f"{start}: use {arm} or {reference}; {quality} is equivalent, neither is significantly faster{lost}"
        if ratio.value > 1:
            first, second, times = arm, reference, (ratio.value, ratio.low, ratio.high)
        else:
            first, second, times = reference, arm, (1 / ratio.value, 1 / ratio.high, 1 / ratio.low)
        memory = words.memory_text(_cost(read, first, second)[1])
        return f"{start}: use {first}, as good as {second} and {words.times_as_fast(*times)}, {memory}{lost}"
    return f"no arm is recommended {start}: {arm} against {reference} is not resolved"


def recommend_overall(read: ReadStudy, arms: Sequence[Plain]) -> Plain:
    """The fastest arm that is equivalent to the baseline or better, and significantly faster; or none, and why.

    Significance: t over seeds, by Holm over all arms. Equivalence: by Holm over the arms that are faster, which speed
    alone decides, so in at most 5% of studies an arm is recommended that is worse by the margin or more. An arm with a
    run that diverged, failed or ran out of memory is no candidate.
    """
    start, baseline, margin = _place(read), read.study.baseline, read.study.metric.margin
    quality = words.metric_name(read.study.metric.name)
    others = [a for a in arms if a["comparison"]]
    sound = [a for a in others if not {"diverged", "failed", "out_of_memory"} & a["statuses"].keys()]
    good = [a for a in sound if a["comparison"]["verdict"] in ("better", "equivalent")]
    better = [a for a in good if a["comparison"]["verdict"] == "better"]
    base = read.speeds(baseline)
    ps = st.holm([timing.speedup(read.speeds(a["name"]), base).p for a in others])
    sure = {a["name"] for a, p in zip(others, ps, strict=True) if p < st.ALPHA}
    faster = [a for a in sound if a["name"] in sure and a["speedup"]["value"] >= LEAST_SPEEDUP]
    fast = shown_as_good(faster)
    evidence = [a["name"] for a in good]
    if fast:
        best = max(fast, key=lambda a: a["speedup"]["value"])
        as_good = "better" if best in better else f"equivalent within {margin:g}"
        times = words.times_as_fast(*(best["speedup"][key] for key in ("value", "low", "high")))
        memory = words.memory_text(_cost(read, best["name"], baseline)[1])
        text = f"use {best['name']}, {times} as {baseline}, {memory}; {quality} is {as_good}"
        evidence = [best["name"], baseline]
    elif better:
        pick = min if read.study.metric.better == "lower" else max
        name = pick(better, key=lambda a: a["comparison"]["mean"])["name"]
        cost = words.cost_text(*_cost(read, name, baseline), baseline)
        text, evidence = f"use {name} rather than {baseline}, for better {quality}, {cost}", [name, baseline]
    else:
        text = f"no arm has two seeds in common with {baseline}"
        if good:
            text = f"no arm that is equivalent to {baseline} ({', '.join(evidence)}) is significantly faster"
            if alone := [a["name"] for a in faster if a in good]:
                text = (
                    f"{', '.join(alone)}, each taken alone, would be equivalent to {baseline}, but not after Holm over "
                )
                text += f"{len(faster)} faster arms"
        elif any(a["comparison"]["n"] > 1 for a in others):
            text = f"no arm is shown to be better than {baseline}"
            text += f", or equivalent within {margin:g}" if margin else f"; {verdicts.NO_MARGIN}"
        start = f"no arm is recommended {start}"
    return {"id": "overall", "text": f"{start}: {text}", "evidence": evidence}


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
    judged = verdicts.judge({arm: contrast_of(read, arm, rule.incumbent, metric) for arm in rule.among})
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
    return {"id": "default", "text": f"the default {_place(read)} {text}", "evidence": evidence}
