"""Two studies of the same arms compared: rankings, flips, and the questions asked of both."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from gptlab.config import Comparison
from gptlab.errors import UserError
from gptlab.report import noise, rankings, verdicts, words
from gptlab.report.estimates import Plain, clean, contrast_of
from gptlab.report.questions import answer_questions
from gptlab.report.studies import FACTS, ReadStudy

Pair = tuple[str, str]


def analyse_across(studies: Sequence[ReadStudy], comparison: Comparison, control: ReadStudy | None) -> Plain:
    """Rankings, flips and answers over the two studies that a comparison names.

    Args:
        control: the comparison's control study, if it was run.

    Raises:
        UserError: a study of the comparison is missing.
    """
    chosen = _chosen(studies, comparison)
    first, second = chosen.values()
    both = [arm for arm in first.study.arms if arm in second.study.arms]
    shared = [arm for arm in both if _tried(first, arm) and _tried(second, arm)]
    flips = verdicts.flips(_contrasts(chosen, [*itertools.combinations(shared, 2)]))
    controlled: dict[Pair, verdicts.Flip] = {}
    if control is not None and comparison.control is not None:
        replaced = {name: control if name == comparison.control.of else read for name, read in chosen.items()}
        flipped = [pair for pair, flip in flips.items() if flip.verdict == "flips"]
        controlled = verdicts.flips(_contrasts(replaced, flipped))
    values = [{arm: read.values(arm, read.study.metric.name) for arm in shared} for read in chosen.values()]
    tau = rankings.ranking(values[0], values[1], (first.study.metric.better, second.study.metric.better))
    flipping = {arm for pair, flip in flips.items() if flip.verdict == "flips" for arm in pair}
    unranked = [arm for arm in shared if False in [rankings.diverging(v).get(arm) for v in values]]
    ranks = [_ranks(v, read.study.metric.better) for v, read in zip(values, chosen.values(), strict=True)]
    answers = answer_questions(comparison.questions, chosen)
    return clean(
        {
            "name": comparison.name,
            "description": comparison.description,
            "studies": comparison.compare,
            "ranking": {"tau": tau.value, **{key: getattr(tau, key) for key in ("low", "high", "p", "n")}}
            | {"unranked": unranked, "text": words.ranking_text(tau, unranked)},
            "ranks": [{"arm": arm, "ranks": [r.get(arm) for r in ranks], "flip": arm in flipping} for arm in shared],
            "flips": [_flip_data(pair, f, chosen, controlled.get(pair), comparison) for pair, f in flips.items()],
            "counts": dict(Counter(flip.verdict for flip in flips.values())),
            "questions": [reply for reply, _ in answers],
            "recommendations": [advice for _, advice in answers],
        }
    )


def _chosen(studies: Sequence[ReadStudy], comparison: Comparison) -> dict[str, ReadStudy]:
    by_name = {read.study.name: read for read in studies}
    for name in comparison.compare:
        if name not in by_name:
            pair = " and ".join(comparison.compare)
            raise UserError(f"the comparison {comparison.name} is of {pair}: no folder of {name} was given")
    return {name: by_name[name] for name in comparison.compare}


def unlike_studies(studies: Sequence[ReadStudy], comparison: Comparison) -> list[str]:
    """Warnings about what the two studies of a comparison do not share, except for the commit."""
    chosen, warnings = _chosen(studies, comparison), []
    for what, key in FACTS.items():
        seen = {
            name: {str(run.environment[key]) for run in read.runs.values() if run.environment.get(key)}
            for name, read in chosen.items()
        }
        first, second = seen.values()
        if first and second and first != second and what != "commit":
            told = " and ".join(f"{name} {', '.join(sorted(values))}" for name, values in seen.items())
            warnings.append(f"the studies differ in their {what}: {told}")
    return warnings


def _tried(read: ReadStudy, arm: str) -> bool:
    """Whether an arm has a run that was started."""
    return bool(read.values(arm, read.study.metric.name).values)


def _contrasts(
    studies: Mapping[str, ReadStudy], pairs: Sequence[Pair]
) -> dict[Pair, tuple[verdicts.Contrast, verdicts.Contrast]]:
    """Each pair of arms in both studies."""
    known = [(read, noise.Others(read, read.study.metric.name)) for read in studies.values()]
    first, second = ([contrast_of(read, *pair, read.study.metric, of) for pair in pairs] for read, of in known)
    return dict(zip(pairs, zip(first, second, strict=True), strict=True))


def _ranks(values: Mapping[str, verdicts.Runs], better: str) -> dict[str, int]:
    """The rank of each arm, 1 for the best. Arms with a diverged run share the last rank, or have none."""
    lost = rankings.diverging(values)
    means = {arm: math.inf for arm, last in lost.items() if last}
    for arm, runs in values.items():
        if arm not in lost and (known := [value for value in runs.values.values() if math.isfinite(value)]):
            means[arm] = float(np.mean(known)) * (1 if better == "lower" else -1)
    return {arm: 1 + sum(other < mean for other in means.values()) for arm, mean in means.items()}


def _flip_data(
    pair: Pair,
    flip: verdicts.Flip,
    studies: Mapping[str, ReadStudy],
    controlled: verdicts.Flip | None,
    comparison: Comparison,
) -> Plain:
    text = words.flip_text(flip, studies)
    if flip.verdict == "flips":
        text += _learning_rate_text(studies, controlled, comparison)
    return {
        "arm": pair[0],
        "reference": pair[1],
        "verdict": flip.verdict,
        "text": text,
        "p_interaction": flip.p_holm,
        "controlled": controlled.verdict if controlled else None,
    }


def _learning_rate_text(
    studies: Mapping[str, ReadStudy], controlled: verdicts.Flip | None, comparison: Comparison
) -> str:
    """Whether a flip may come from the studies' different learning rates, as a clause."""
    control = comparison.control
    if controlled is not None and control is not None:
        replaced = (controlled.first, controlled.second)[comparison.compare.index(control.of)]
        if controlled.verdict == "flips":
            return "; it stays at a matched learning rate"
        if controlled.verdict == "agrees" or replaced.verdict == "equivalent":
            return "; it is gone at a matched learning rate, so it is an artefact"
        return f"; {control.study} does not resolve whether the learning rate is the cause"
    rates = {name: read.study.recipe.get("optim", {}).get("lr") for name, read in studies.items()}
    if len(set(rates.values())) < 2:
        return ""
    shown = ", ".join(f"{rate:g}" for rate in rates.values() if rate)
    wanted = f"; run {control.study} to find out" if control else ""
    return f"; the different learning rates ({shown}) may be the cause{wanted}"
