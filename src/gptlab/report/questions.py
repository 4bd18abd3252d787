"""The questions of a study or a comparison, answered.

All contrasts that are asked about together are one family, which Holm's correction holds to 5%.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gptlab.config import Clause, Question, arms_like, clauses
from gptlab.report import frontiers, noise, sentences, verdicts, words
from gptlab.report.advice import by_task, recommend
from gptlab.report.divergence import Divergence, kinds_of, of_questions, steps_of, times_of
from gptlab.report.estimates import Plain, comparison_data, contrast_of
from gptlab.report.grids import BestOf, chosen_text
from gptlab.report.studies import ReadStudy
from gptlab.report.targets import answer_targets


@dataclass(frozen=True)
class Evidence:
    """What was found of a question, by study."""

    judged: Mapping[str, verdicts.Judgement]
    more: Mapping[tuple[str, str], verdicts.Judgement]
    """(study, than): the difference in the first minus that in the second, for `by more than`."""
    divergence: Mapping[str, Divergence]
    """Of the question's arm, where a clause asks whether it diverges."""


def answer_questions(questions: Sequence[Question], studies: Mapping[str, ReadStudy]) -> list[tuple[Plain, Plain]]:
    """(answer, recommendation) of each question; {} where nothing is to be recommended.

    Args:
        questions: of one study, or of a comparison.
        studies: by name.
    """
    found, family = evidence_on(questions, studies)
    targets: dict[str, Plain] = {}
    if any(question.target is not None for question in questions):
        (read,) = studies.values()  # a target belongs in a study
        targets = answer_targets(read)
    result: list[tuple[Plain, Plain]] = []
    for question in questions:
        if question.target is not None:
            result.append((targets[question.id], {}))
        elif question.contrast:
            result.append(_answer_contrast(question, studies, found[question.id], family))
        else:
            result.append(_answer_frontier(question, studies))
    return result


def evidence_on(questions: Sequence[Question], studies: Mapping[str, ReadStudy]) -> tuple[dict[str, Evidence], int]:
    """What was found of each question that contrasts two arms, by its id, and the number of comparisons in the family.

    Args:
        questions, studies: as of `answer_questions`.
    """
    contrasted = {question.id: question for question in questions if question.contrast and question.target is None}
    family: dict[tuple[str, ...], verdicts.Contrast] = {}
    asked: list[tuple[str, str]] = []
    others: dict[tuple[str, str], noise.Others] = {}  # by study and metric
    for id_, question in contrasted.items():
        for name, read in studies.items():
            if all(arms_like(read.study.arms, arm) for arm in question.contrast):
                arm, reference = question.contrast
                metric = question.metric or read.study.metric
                known = others.setdefault((name, metric.name), noise.Others(read, metric.name))
                family[id_, name] = contrast_of(read, arm, reference, metric, known)
                if any(clause.verdict == "diverges" for clause in question.asked):
                    asked.append((id_, name))
        for name, than in {(clause.study, clause.than) for clause in question.asked if clause.than}:
            sides = [family.get((id_, side)) for side in (name, than)]
            if sides[0] and sides[1]:
                family[id_, name, than] = verdicts.by_more(sides[0], sides[1])
    judged = verdicts.judge(family)
    tests = of_questions([(studies[name], contrasted[id_].contrast[0]) for id_, name in asked])
    lost = dict(zip(asked, tests, strict=True))
    found = {}
    for id_ in contrasted:
        mine = {key[1:]: one for key, one in judged.items() if key[0] == id_}
        found[id_] = Evidence(
            {name: mine[(name,)] for name in studies if (name,) in mine},
            {(key[0], key[1]): one for key, one in mine.items() if len(key) == 2},
            {name: one for (of, name), one in lost.items() if of == id_},
        )
    return found, len(family)


def _answer_contrast(
    question: Question, studies: Mapping[str, ReadStudy], found: Evidence, family: int
) -> tuple[Plain, Plain]:
    texts, advice, rows = [], [], []
    arm, reference = question.contrast
    for name, read in studies.items():
        prefix = f"{name}: " if len(studies) > 1 else ""
        if name not in found.judged:
            texts.append(f"{name}: the study does not have these arms")
            continue
        metric, judged = question.metric or read.study.metric, found.judged[name]
        text = prefix + words.question_text(judged, metric.name, family, *question.contrast)
        if name in found.divergence:
            text += words.asked_divergence_text(found.divergence[name], arm)
            text += words.when_text(steps_of(read, arm), kinds_of(read, arm))
        best = judged.contrast
        text += chosen_text(read, question.contrast, best) if isinstance(best, BestOf) else ""
        texts.append(text)
        advice.append(recommend(read, question, judged, metric, family, found.divergence.get(name)))
        rows.append(comparison_data(read, judged, arm, reference, text, metric))
        if name in found.divergence:
            rows[-1]["divergence"] = divergence_data(found.divergence[name])
    texts += [words.by_more_text(one, *names, family) for names, one in found.more.items()]
    when = None
    if found.divergence and len(studies) == 2:
        first, second = studies.values()
        when = times_of(first, second, arm)
    texts += [words.times_text(when, list(studies))] if when and any(k for k, _ in when.within) else []
    known = dict.fromkeys(arm for read in studies.values() for arm in read.study.arms)
    evidence = [arm for pattern in question.contrast for arm in arms_like(known, pattern)]
    recommended = "; ".join(advice) or "no arm is recommended: no study has these arms"
    told, advised = _question_data(question, answer_to(question, found), ". ".join(texts), recommended, evidence)
    if rows:  # else the text says that no study has these arms
        told |= sentences.answer(rows, {name: str(read.folder) for name, read in studies.items()})
        more = [
            sentences.by_more(one.verdict, one.contrast.difference, one.p_holm, *names)
            for names, one in found.more.items()
        ]
        told["sentence"] = " ".join([told["sentence"], *more])
    if found.divergence:
        told["divergence"] = {
            name: divergence_data(one) | {"steps": steps_of(studies[name], arm), "kinds": kinds_of(studies[name], arm)}
            for name, one in found.divergence.items()
        }
        told["times"] = when and {"within": when.horizon, "diverged": when.within, "p": when.p, "least_p": when.least_p}
    return told | {"comparisons": rows}, advised


def divergence_data(one: Divergence) -> Plain:
    of = ("diverged", "runs", "others", "p", "p_holm", "shown", "excluded", "most")
    return {key: getattr(one, key) for key in of}


def _question_data(question: Question, answer: str, text: str, advice: str, evidence: list[str]) -> tuple[Plain, Plain]:
    told = {"id": question.id, "claim": question.claim, "answer": answer, "text": text, "contrast": question.contrast}
    told |= {"sentence": f"{text[:1].upper()}{text[1:]}.", "cost": "", "change": "", "comparisons": []}
    return told | {"evidence": evidence}, {"id": question.id, "text": advice, "evidence": evidence}


def answer_to(question: Question, found: Evidence) -> str:
    """confirmed, rejected, not resolved, or not run if no study has runs of both arms.

    A question is confirmed if all clauses of `confirmed_if` hold. It is rejected if a clause of `rejected_if` holds;
    without `rejected_if`, if a clause of `confirmed_if` is shown not to hold.
    """

    def holds(clause: Clause) -> bool | None:
        study = clause.study or next(iter(found.judged), "")
        truth: bool | None = None
        if clause.verdict == "diverges":
            truth = _diverges(found.divergence[study]) if study in found.divergence else None
        elif study in found.judged:
            truth = _is(found.judged[study], clause.verdict)
            if clause.than:
                more = found.more.get((study, clause.than))
                both = [truth, _is(more, clause.verdict) if more else None]
                truth = False if False in both else None if None in both else True
        return truth if truth is None or not clause.negated else not truth

    confirming = [holds(clause) for clause in clauses(question.confirmed_if)]
    rejecting = [truth is False for truth in confirming]
    if question.rejected_if:
        rejecting = [holds(clause) is True for clause in clauses(question.rejected_if)]
    if all(truth is True for truth in confirming):
        return "confirmed"
    if any(rejecting):
        return "rejected"
    tried = any(one.verdict != "not run" for one in found.judged.values())
    return "not resolved" if tried or any(one.runs for one in found.divergence.values()) else "not run"


def _is(judged: verdicts.Judgement, verdict: str) -> bool | None:
    """Whether a judgement is better, worse or equivalent; None if it is open."""
    if judged.verdict in ("diverges", "reference diverges", "not resolved", "not run"):
        return None
    return judged.verdict == verdict


def _diverges(found: Divergence) -> bool | None:
    """Whether an arm diverges: in at least two of three runs, and more often than the others; None if it is open.

    False if two of three runs are excluded at 5%: 0 of 3 diverged, or 1 of 5. An arm that does diverge in exactly two
    of three is then denied in 3.7% of studies with three seeds, and in 7.3% in one of two studies at least.
    """
    return False if found.excluded else True if found.shown else None


def _answer_frontier(question: Question, studies: Mapping[str, ReadStudy]) -> tuple[Plain, Plain]:
    """Whether an arm saves time or memory in one study and not in the other."""
    least = question.least_speedup or frontiers.LEAST_GAIN, question.least_memory or frontiers.LEAST_GAIN
    found, left_out = frontiers.compare(studies, least)
    names = list(studies)
    pays = {arm: [found.pays(arm, i) for i in range(len(names))] for arm in found.arms}
    only = {name: [a for a in found.differ if pays[a][i]] for i, name in enumerate(names)}
    alike = [arm for arm, on in pays.items() if all(on)]
    unknown = [arm for arm, on in pays.items() if None in on]
    ratio = {arm: {name: frontiers.ratios(read, arm) for name, read in studies.items()} for arm in found.arms}
    reply = "confirmed" if found.differ else "rejected" if found.alike else "not resolved"
    if found.differ:
        advice = by_task(studies, only)
    elif reply == "rejected":
        advice = f"the same choice for {' and '.join(names)}: {', '.join(alike)}"
    else:
        advice = "no arm is recommended: it is open which arms are on the frontiers"
    if not all(any(run.status != "not_applicable" for run in read.runs.values()) for read in studies.values()):
        reply = "not run"
    text = words.frontier_text(names, only, alike, unknown, least, reply)
    shown = [*found.differ, *(arm for arm in alike if arm not in {r.study.baseline for r in studies.values()})]
    text += words.ratios_text({arm: ratio[arm] for arm in shown})
    same = {why: [arm for arm in left_out if left_out[arm] == why] for why in dict.fromkeys(left_out.values())}
    told_out = "; ".join(f"{', '.join(arms)} ({why})" for why, arms in same.items())
    text += f"; left out: {told_out}" if same else ""
    told, advised = _question_data(question, reply, text, advice, found.differ or alike)
    told["sentence"] = sentences.frontier(names, only, alike, unknown, reply)
    told["frontier"] = {
        arm: {
            name: {"pays": pays[arm][i], "on": found.on[arm][i], "off": found.off[arm][i]}
            | {"speedup": ratio[arm][name][0], "memory_ratio": ratio[arm][name][1]}
            for i, name in enumerate(names)
        }
        for arm in found.arms
    }
    return told, advised
