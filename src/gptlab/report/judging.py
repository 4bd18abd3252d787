"""Verdicts on runs that something else trained: logs become a study in memory, and go through the report of one.

A run is judged by the value that it has at one point of its curve, `at`: last, its last point; common, the last step
that all runs reach; best, its best point; or a step, read linearly between points and never beyond a curve's ends.
A run has diverged if its log says so, if its last value is no number, or if the guard that stops a training run would
have stopped it (gptlab.logs.divergence). One that ended long before the other runs of its arm is unfinished, and has no
value unless its curve reaches the step that is asked for.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from pydantic import Field

from gptlab.config import Metric, Question, Section, Study, read_layer
from gptlab.config.recipe import validated
from gptlab.errors import UserError
from gptlab.guard import Divergence
from gptlab.logs.divergence import diverged
from gptlab.logs.naming import is_metric
from gptlab.logs.read import Logs
from gptlab.logs.run import Curve, LogRun
from gptlab.report.reading import number
from gptlab.report.studies import Elsewhere, ReadRun, ReadStudy
from gptlab.report.suspicions import suspicions
from gptlab.report.words import counted

SHORT = 0.9  # of the median last step of an arm's runs: a run that ended before is unfinished
POINTS = ("last", "common", "best")
BASELINES = ("baseline", "base", "control", "default")  # arms that are the baseline if none is named
TRAINING = ("loss", "train_loss", "train/loss", "training_loss")
NOTHING: Curve = (np.array([]), np.array([]))
ENDINGS = re.compile(r"(\.(csv|tsv|txt|log|jsonl?|ndjson|parquet|gz|zst|bz2|xz|zip|toml))+$", re.IGNORECASE)
MOST_NAMED = 8  # arms or runs in a message


@dataclass(frozen=True)
class Asked:
    """What is asked of the runs; None and "" are guessed."""

    baseline: str = ""
    better: str = ""
    margin: float | None = None
    at: str = "last"
    all_pairs: bool = False
    targets: Sequence[float] = ()
    """Each is asked of the mean of every arm, and gives the steps to it."""
    questions: str = ""
    """A study file, whose questions, margin, baseline and targets are asked."""
    paired: bool | None = None
    """Whether equal seeds of two arms are the same seed."""


class JudgedStudy(Study):
    """A study whose arms are called as the logs call them."""

    def _check_names(self) -> None:
        pass  # they name no folders


def judge_logs(logs: Logs, asked: Asked, name: str, sources: Sequence[str], command: str) -> ReadStudy:
    """The runs as a study, for `analyse`.

    Args:
        logs: as `read_logs` gives them.
        name: of the study.
        sources: what was read, and `command`: what judged it, for the page.

    Raises:
        UserError: an unknown arm, metric or question, a negative margin, or a step that no run reaches.
    """
    given, counts = given_by(asked.questions), Counter(str(run.arm) for run in logs.runs)
    _check_numbers(asked, logs.metric)
    margin = given.metric.margin if asked.margin is None else asked.margin
    stated = given.metric.better if "better" in given.metric.model_fields_set else logs.better
    by = "--baseline is" if asked.baseline else "the study's baseline is"
    baseline, why = _baseline(counts, asked.baseline or given.baseline, by)
    paired = logs.paired if asked.paired is None else asked.paired
    own = [_checked(question, logs, list(counts), paired) for question in given.questions]
    of_targets = [
        Question(id=f"{arm} at {x}", claim=f"the mean of {arm} reaches {x:g}", contrast=[arm], target=x)
        for x in dict.fromkeys(asked.targets)
        for arm in counts
    ]
    has_curves = any(logs.metric in run.curves for run in logs.runs)
    lost = [diverged(run, logs.metric) for run in logs.runs]
    point = _point([run for run, one in zip(logs.runs, lost, strict=True) if one is None], logs.metric, asked.at)
    what = f"{counted(len(logs.runs), 'run')} of {counted(len(counts), 'arm')}, trained elsewhere"
    content = {
        "name": name,
        "description": f"{what}; {logs.metric} {point.says}",
        "recipe": {},
        "arms": {arm: {} for arm in counts},
        "seeds": sorted({int(run.seed or 0) for run in logs.runs}),
        "baseline": baseline,
        "metric": {"name": logs.metric, "better": asked.better or stated, "margin": margin},
        "questions": [*own, *of_targets],
        "targets": [*dict.fromkeys([*asked.targets, *given.targets])],
    }
    study = validated(JudgedStudy, content)
    metrics = [*dict.fromkeys([logs.metric, *(q.metric.name for q in own if q.metric)])]
    runs = [_read(run, metrics, study, point, one) for run, one in zip(logs.runs, lost, strict=True)]
    by_key = {(run.arm, run.seed): run for run in runs}
    values = {key: value for key, run in by_key.items() if math.isfinite(value := run.value(logs.metric))}
    warnings = [*_warnings(study, runs, point)]
    warnings += suspicions(logs.runs, logs.metric, study.metric.better, asked.at, values, given.declared, study.targets)
    known = asked.better or "better" in given.metric.model_fields_set or is_metric(logs.metric)
    notes = [] if known else [f"Lower {logs.metric} is taken as better, which its name does not say (--better higher)."]
    notes += [
        *_notes(counts, baseline, why, paired, asked.targets),
        *(r for r in logs.remarks if not r.startswith("judged by ")),
    ]
    tabled = frozenset(question.id for question in of_targets if has_curves)
    elsewhere = Elsewhere(command, list(sources), paired, asked.all_pairs, tabled, notes)
    return ReadStudy(study, Path(name), by_key, list(dict.fromkeys(warnings)), elsewhere=elsewhere)


def _notes(counts: Mapping[str, int], baseline: str, why: str, paired: bool, targets: Sequence[float]) -> Iterator[str]:
    """What was chosen for the reader, and what he has to know."""
    if len(counts) < 2:
        if not targets:
            yield "One arm is compared with nothing: --arm or --arm-from tells arms apart, --target X asks of one."
        return
    if why:
        yield f"The baseline is {baseline}: {why}; --baseline NAME takes another."
    if paired:
        yield "A seed is taken as the same seed in every arm; --unpaired, where seeds only number the runs."
    alone = [arm for arm, n in counts.items() if n == 1]
    if len(alone) == len(counts):
        yield (
            "Every arm has one run, so no spread is known and nothing can be said: --arm, --arm-from or a folder for "
            "each arm says which runs belong together."
        )
    elif alone:
        yield f"Of an arm with one run nothing can be said, its spread is unknown: {_listed(alone)}."


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def name_of(path: Path) -> str:
    """`judged-NAME` after a file or folder that was read."""
    name = ENDINGS.sub("", path.resolve().name) or "logs"
    return f"judged-{name}"


# -- what is asked --------------------------------------------------------------------------------------------------


class Given(Section):
    """What a study file asks, whatever its recipe and arms are."""

    questions: list[Question] = Field(default_factory=list)
    metric: Metric = Metric()
    baseline: str = ""
    targets: list[float] = Field(default_factory=list)
    declared: int | None = None
    """Number of its arms."""


def given_by(name_or_path: str) -> Given:
    """The questions, metric, baseline and targets of a study file; what it does not say has its default."""
    if not name_or_path:
        return Given()
    layer = read_layer(name_or_path, "studies")
    asks = ("questions", "metric", "baseline", "targets")
    content: dict[str, Any] = {key: layer[key] for key in asks if key in layer}
    if not content.get("questions") and not content.get("targets"):
        raise UserError(f"{name_or_path} has no [[questions]]")
    if isinstance(arms := layer.get("arms"), dict):
        content["declared"] = len(arms)
    return validated(Given, content, f"{name_or_path}: ")


def metric_asked(name_or_path: str) -> str:
    """The metric that a study file names, as a log has it; "" if it names none."""
    metric = given_by(name_or_path).metric
    return _logged(metric.name) if "name" in metric.model_fields_set else ""


def _logged(metric: str) -> str:
    """The final loss of a run is the last of its `val_loss`."""
    return "val_loss" if metric == "final_val_loss" else metric


def _check_numbers(asked: Asked, metric: str) -> None:
    if asked.margin is not None and not (asked.margin >= 0 and math.isfinite(asked.margin)):
        raise UserError(f"--margin {asked.margin:g}: must be 0 or more, in the unit of {metric}")
    for target in asked.targets:
        if not math.isfinite(target):
            raise UserError(f"--target {target:g}: must be a number")


def _checked(question: Question, logs: Logs, arms: Sequence[str], paired: bool) -> Question:
    """A question of a study file. Raises UserError if the runs have not what it is about."""
    for arm in question.contrast:
        if "*" not in arm:
            _known(arm, arms, f"question {question.id} names the arm")
        elif arm not in arms and not paired:
            raise UserError(f"question {question.id}: {arm}, the best of several arms, needs runs that share seeds")
    if question.metric is None:
        return question
    name = _logged(question.metric.name)
    if not any(name in run.curves or name in run.result for run in logs.runs):
        raise UserError(f"question {question.id} is about {name}, which no run logs")
    return question.model_copy(update={"metric": question.metric.model_copy(update={"name": name})})


def _known(arm: str, arms: Sequence[str], what: str) -> str:
    """The arm. Raises UserError, with the arm that is meant, if there is no such arm."""
    if arm in arms:
        return arm
    close = difflib.get_close_matches(arm, arms, n=1, cutoff=0.4)
    hint = f"did you mean '{close[0]}'? " if close else ""
    raise UserError(f"{what} '{arm}', which no run has: {hint}the arms are {_listed(arms)}")


def _baseline(counts: Mapping[str, int], named: str, by: str) -> tuple[str, str]:
    """The baseline, and why it is that if nobody named it."""
    arms, most = list(counts), max(counts.values())
    if named:
        return _known(named, arms, by), ""
    if called := [arm for arm in arms if arm.lower() in BASELINES]:
        return called[0], "it is called so"
    first = [arm for arm, n in counts.items() if n == most]
    if len(first) == 1:
        return first[0], f"it has the most runs, {most}"
    if len(first) == len(arms):
        return first[0], "all arms have as many runs, and it comes first"
    return first[0], f"of the arms with the most runs, {most}, it comes first"


# -- the point at which runs are judged -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """Where on its curve a run is judged."""

    at: str
    """last, best or step."""
    step: float
    """If at is step."""
    ends: Mapping[str, float]
    """Arm to the median last step of its runs."""
    says: str


def _point(runs: Sequence[LogRun], metric: str, at: str) -> Point:
    """The point that `at` names on the curves of runs that did not diverge. Raises UserError if no run has it."""
    lasts: dict[str, list[float]] = {}
    for run in runs:
        steps, _ = run.curves.get(metric, NOTHING)
        if len(steps):
            lasts.setdefault(str(run.arm), []).append(float(steps[-1]))
    ends = {arm: float(median(own)) for arm, own in lasts.items()}
    if at in ("last", "best"):
        return Point(at, math.nan, ends, "at the last point of each run" if at == "last" else "at its best in each run")
    if not ends:
        raise UserError(f"--at {at}: no run has a curve of {metric} to read a step from; --at last takes what there is")
    if at == "common":
        step = min(end for arm, own in lasts.items() for end in own if end >= SHORT * ends[arm])
        return Point("step", step, ends, f"at step {step:,g}, the last that all runs have")
    try:
        step = float(at)
    except ValueError:
        raise UserError(f"--at {at}: must be last, common, best or a step") from None
    first = min(float(run.curves[metric][0][0]) for run in runs if len(run.curves.get(metric, NOTHING)[0]))
    last = max(max(own) for own in lasts.values())
    if not first <= step <= last:
        raise UserError(f"--at {at}: the curves of {metric} go from step {first:,g} to {last:,g}")
    return Point("step", step, ends, f"at step {step:,g}")


def _value(curve: Curve, better: str, point: Point) -> tuple[float, float]:
    """(step, value) of a curve at a point; NaN beyond its ends."""
    steps, values = curve
    kept = np.isfinite(values)
    steps, values = steps[kept], values[kept]
    if not len(steps):
        return math.nan, math.nan
    if point.at == "step":
        inside = steps[0] <= point.step <= steps[-1]
        return point.step, float(np.interp(point.step, steps, values)) if inside else math.nan
    i = -1 if point.at == "last" else int((np.argmin if better == "lower" else np.argmax)(values))
    return float(steps[i]), float(values[i])


def _read(run: LogRun, metrics: Sequence[str], study: Study, point: Point, lost: Divergence | None) -> ReadRun:
    """A run of the study, with its status at the point."""
    arm, better = str(run.arm), study.metric.better
    curve = run.curves.get(metrics[0], NOTHING)
    training = next((run.curves[key] for key in TRAINING if key in run.curves and key != metrics[0]), NOTHING)
    result: dict[str, Any] = {}
    for metric in metrics:
        if metric in run.curves:
            step, result[metric] = _value(run.curves[metric], better, point)
            if metric == metrics[0]:
                ends = run.curves[metric][0]
                result["steps"] = step if math.isfinite(result[metric]) or not len(ends) else float(ends[-1])
        elif point.at != "step":
            result[metric] = number(run.result.get(metric))
    status, short = run.status, len(curve[0]) > 0 and curve[0][-1] < SHORT * point.ends.get(arm, 0)
    if lost is not None:
        status = "diverged"
        result |= {"failed_at_step": lost.step if run.curves else None, "failure": lost.kind, "reason": lost.reason}
    elif not math.isfinite(result.get(metrics[0], math.nan)):
        status = run.status if run.status != "completed" else "unfinished"
        reached = f"its curve ends at step {curve[0][-1]:,g}" if len(curve[0]) else f"it has no {metrics[0]}"
        result["reason"] = reached
    elif point.at == "step":
        status = "completed"  # how it went on does not matter
    elif short:
        status = "unfinished" if run.status == "completed" else run.status
        result["reason"] = f"it ended at step {curve[0][-1]:,g}, the arm's median is {point.ends[arm]:,g}"
    curves = {"loss": training, "val_loss": curve}
    return ReadRun(arm, int(run.seed or 0), run.source, status, result, curves)


def _warnings(study: Study, runs: Sequence[ReadRun], point: Point) -> Iterator[str]:
    """What the point at which runs are judged makes doubtful."""
    if left := [run for run in runs if run.status not in ("completed", "diverged")]:
        told = [f"{run.arm} seed {run.seed} ({run.result.get('reason', run.status)})" for run in left]
        yield f"{counted(len(left), 'run')} not used: {_listed(told)}"
    ends = [float(run.curves["val_loss"][0][-1]) for run in runs if len(run.curves["val_loss"][0])]
    beyond = sum(SHORT * end > point.step for end in ends)
    if point.at == "step" and beyond:
        yield (
            f"{counted(beyond, 'run')} went on well beyond step {point.step:,g}: where a learning rate had not decayed "
            "yet, that counts against it"
        )
    if point.at == "best":
        yield (
            f"the best point of a run is chosen by {study.metric.name} itself, which makes it better than the run is, "
            "the more so the more points a run has; --at last or common chooses nothing"
        )
