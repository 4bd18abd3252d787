"""From study folders to the payload of a report: numbers, verdicts, answers and recommendations, as plain data.

The verdicts are `gptlab.report.verdicts`; this module decides what is compared with what. Two families of
comparisons are each held to 5% by Holm: every arm against the baseline (the table), and the study's questions.
"""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import tomli_w

from gptlab.config import Comparison
from gptlab.logs.rows import dotted
from gptlab.report import divergence, noise, sentences, timing, verdicts, words
from gptlab.report import estimates as est
from gptlab.report import runs as logged
from gptlab.report.across import analyse_across, unlike_studies
from gptlab.report.advice import default_of, recommend_factors, recommend_overall
from gptlab.report.effects import effects_of
from gptlab.report.estimates import Plain, clean
from gptlab.report.groups import groups_of, judge_pairs
from gptlab.report.ladders import laws_of
from gptlab.report.questions import answer_questions, divergence_data
from gptlab.report.studies import ReadStudy
from gptlab.report.sweeps import sweeps_of
from gptlab.report.targets import targets_of

MOST_NAMED = 5  # arms in a note
GIVEN = "as given"


def analyse(
    studies: Sequence[ReadStudy], comparison: Comparison | None = None, control: ReadStudy | None = None
) -> Plain:
    """Everything that a report shows of the studies; of two of them compared, if a comparison is given.

    Args:
        studies: as `read_study_folder` gives them.
        comparison: names two of the studies, and the questions asked of both.
        control: the comparison's control study, if it was run.

    Raises:
        UserError: a study of the comparison is missing.
    """
    warnings = [warning for study in studies for warning in (*study.warnings, *_constant(study))]
    across = None
    if comparison is not None:
        across = analyse_across(studies, comparison, control)
        warnings += unlike_studies(studies, comparison)
    return {
        "title": " and ".join(study.study.name for study in studies),
        "gptlab": None,
        "command": None,
        "warnings": warnings,
        "studies": [analyse_study(study) for study in studies],
        "across": across,
    }


def analyse_study(read: ReadStudy) -> Plain:
    study, metric = read.study, read.study.metric
    columns = _columns(read)
    pairs = judge_pairs(read) if read.elsewhere and read.elsewhere.all_pairs else {}
    arms = _arms(read, [key for key, _ in columns], pairs)
    answers = answer_questions(study.questions, {study.name: read})
    runs = list(read.runs.values())
    added = read.runs if study.until_decided else {}
    planned = [(arm, seed) for arm in study.arms for seed in study.seeds]
    factors, pairing = effects_of(read), noise.pairing(read, metric.name)
    against = f"{study.ladder.place(study.baseline)[0]} at the same rung" if study.ladder else study.baseline
    effects = f"{factors['text'][0].upper()}{factors['text'][1:]}. " if factors else ""
    told = clean(
        {
            "name": study.name,
            "description": study.description,
            "folder": str(read.folder),
            "task": study.recipe.get("task", "lm"),
            "unit": read.unit,
            "plan": {"registered": read.plan.date, "sha256": read.plan.sha256} if read.plan else None,
            "metric": {
                "key": metric.name,
                "label": words.metric_label(metric.name, read.unit),
                "better": metric.better,
                "margin": metric.margin or None,
                "margin_from": (GIVEN if read.elsewhere else "stated by the study")
                if metric.margin
                else verdicts.NO_MARGIN,
            },
            "baseline": study.baseline,
            "most_seeds": study.most_seeds if study.until_decided else None,
            "seeds": list(dict.fromkeys([*study.seeds, *(run.seed for run in runs)])),
            "elsewhere": read.elsewhere is not None,
            "paired": read.paired,
            "runs_planned": len(runs)
            if read.elsewhere
            else len({key for key in planned if key[0] not in study.measured or key in read.runs} | added.keys()),
            "runs_found": len(runs),
            "columns": [{"key": key, "label": text} for key, text in columns],
            "arms": arms,
            "summary": f"{effects}{sentences.summary(arms, against, metric.better)}",
            "failures": [logged.failure_of(r) for r in runs if r.status not in ("completed", "not_applicable")],
            "runs": [],
            "within": logged.within_seeds(read),
            "means": {},
            "pairing": pairing,
            "notes": _notes(read, pairing),
            "equal": [] if read.elsewhere or study.ladder else logged.at_equal(read),
            "groups": groups_of(read, arms, pairs) if pairs else None,
            "factors": factors,
            "targets": targets_of(read),
            "questions": [answer for answer, _ in answers],
            "recommendations": []  # without a machine and recipes
            if read.elsewhere or study.measured
            else [advice for _, advice in answers if advice]  # no size is recommended over another
            if study.ladder
            else [
                recommend_factors(read, factors) if factors and factors["effects"] else recommend_overall(read, arms),
                *([default_of(read)] if study.default else []),
                *(advice for _, advice in answers if advice),
            ],
            "provenance": _provenance(read),
            **({"laws": laws_of(read), "against": against} if study.ladder else {}),
        }
    )
    if study.ladder is None and (sweeps := sweeps_of(read)):
        told["sweeps"] = clean(sweeps)
    # plain already, and most of all there is
    told["runs"] = [logged.curves_of(run) for run in runs]
    told["means"] = {name: mean for name in study.arms if (mean := logged.mean_curves(read.of(name)))}
    return told


def _arms(read: ReadStudy, others: Sequence[str], pairs: Mapping[tuple[str, str], verdicts.Judgement]) -> list[Plain]:
    """A row for each arm: settings, runs, quality, speed, memory, and the comparison with the baseline (at its rung).

    Args:
        others: keys of further results to summarise.
        pairs: all pairs, judged, where they are one family; else each arm against the baseline is.
    """
    study, metric = read.study, read.study.metric
    references = {arm: study.reference(arm) for arm in study.arms}
    compared = {arm: reference for arm, reference in references.items() if arm != reference}
    judged = {arm: pairs[arm, study.baseline] for arm in compared} if pairs else {}
    judged = judged or est.judged_pairs(read, compared)
    diverged = divergence.of_study(read)
    on_frontier = est.frontier_shares(read) if study.ladder is None else {}
    base_paces = {base: read.paces(base) for base in references.values()}
    base_memories = {base: est.memory_of(read, base) for base in references.values()}
    rows = []
    for name, arm in study.arms.items():
        runs, memory, paces, reference = read.of(name), est.memory_of(read, name), read.paces(name), references[name]
        ratio = timing.speedup(paces, base_paces[reference]) if paces and name != reference else None
        base_memory = base_memories[reference]
        statuses = Counter(run.status for run in runs)
        values = {str(run.seed): run.value(metric.name) for run in runs}
        comparison = None
        if name in judged:
            family = judged[name].family
            text = words.comparison_text(judged[name], metric.name, family, statuses, diverged[name], reference)
            comparison = est.comparison_data(read, judged[name], name, reference, text)
            if judged[name].verdict == "diverges":
                comparison |= {"p": diverged[name].p, "p_holm": diverged[name].p_holm}
        rows.append(
            {
                "name": name,
                "group": arm.group,
                "note": arm.note,
                "settings": dotted(arm.settings),
                "statuses": dict(statuses),
                "planned": len(runs) if read.elsewhere or arm.measured else len(study.seeds),
                "values": {seed: value for seed, value in values.items() if math.isfinite(value)},
                "quality": est.mean_and_spread([*values.values()]),
                "throughput": est.as_plain(timing.throughput(paces)) if paces else None,
                "speedup": est.as_plain(ratio) if ratio else None,
                "memory_gb": memory,
                "memory_ratio": memory["mean"] / base_memory["mean"] if memory and base_memory else None,
                "other": {key: s for key in others if (s := est.mean_and_spread([run.value(key) for run in runs]))},
                "frontier": on_frontier.get(name),
                "divergence": divergence_data(diverged[name]) if diverged[name].diverged else None,
                "comparison": comparison,
            }
        )
    return rows


def _columns(read: ReadStudy) -> list[tuple[str, str]]:
    """Keys and names of further results that some run has, besides those that every table shows."""
    found = {key for run in read.runs.values() for key in run.result}
    return [(key, text) for key, text in words.METRIC_NAMES.items() if key in found and key != read.study.metric.name]


def _notes(read: ReadStudy, pairing: Plain | None) -> list[str]:
    """What a reader of the numbers has to know."""
    metric = read.study.metric.name
    notes = [] if read.study.metric.margin else [f"{verdicts.NO_MARGIN[0].upper()}{verdicts.NO_MARGIN[1:]}."]
    notes += read.elsewhere.notes if read.elsewhere else []
    if measured := read.study.measured:
        more = f" and {len(measured) - MOST_NAMED} more" if len(measured) > MOST_NAMED else ""
        notes.append(f"Measured elsewhere, and not trained by gptlab: {', '.join(measured[:MOST_NAMED])}{more}.")
    notes += [text for text in (noise.variances_text(read, metric), pairing and str(pairing["text"])) if text]
    if read.study.until_decided:
        most = read.study.most_seeds
        notes.append(
            f"Seeds are added until each comparison is decided, at most {most}; p and intervals of comparisons pay for "
            f"a look after every seed from 2 to {most}."
        )
    pruned = [arm for arm in read.study.arms if any(run.value("sparsity") > 0 for run in read.of(arm))]
    if pruned:
        notes.append(
            f"Pruned arms ({', '.join(pruned)}) multiply dense matrices that contain zeros, so pruning makes them "
            "neither faster nor smaller in memory. Only 2:4 sparsity can, on a GPU, after "
            "`gptlab export --to sparse24`."
        )
    return notes


def _constant(read: ReadStudy) -> list[str]:
    """Warnings about metrics that have one value in all runs."""
    warnings = []
    for key in dict.fromkeys([read.study.metric.name, *(q.metric.name for q in read.study.questions if q.metric)]):
        seen = [value for run in read.runs.values() if math.isfinite(value := run.value(key))]
        if len(seen) > 2 and len(set(seen)) == 1:
            name = words.metric_name(key)
            warnings.append(f"{read.study.name}: {name} is {seen[0]:g} in every run, so it measures nothing here")
    return warnings


def _provenance(read: ReadStudy) -> Plain:
    if read.elsewhere:
        return {"command": read.elsewhere.command, "sources": read.elsewhere.sources}

    def seen(key: str) -> list[str]:
        values = {str(run.environment[key]) for run in read.runs.values() if run.environment.get(key) is not None}
        return sorted(values)

    # as it was given: a report that is passed on shows no more of the disk than it must
    folder = read.folder if read.folder.name not in ("", "..") else read.folder.resolve()
    return {
        "hardware": seen("device_name"),
        "versions": {key: seen(key) for key in ("gptlab", "torch", "python", "cuda")},
        "commits": seen("git_commit"),
        "command": shlex.join(["gptlab", "study", "run", str(folder / "study.toml"), "--out", f"{folder}-again"]),
        "recipe": _toml(read.study.recipe),
        "flags": _toml(read.study.flags),
        "overrides": {name: _toml(arm.settings) for name, arm in read.study.arms.items()},
    }


def _toml(layer: Mapping[str, Any]) -> str:
    return tomli_w.dumps({key: value for key, value in layer.items() if value is not None})
