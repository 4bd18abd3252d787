"""Which runs come next in a study that runs until it is decided.

    the study's seeds -> decide -> one more seed of each arm with an open comparison -> decide -> ...

What is compared: the study's questions, those with a number too, and the candidates of its default; without either,
every arm with the baseline.
A comparison has ended if it is better, worse or equivalent; if a run diverged, so that nothing can be compared; or if
it is hopeless: the chance that it is decided within the stated seeds is below 10%. An arm gets a seed while a
comparison that it is in is open, and only if each of its runs so far completed or diverged. A run is never cut short.

Decisions rest on the results of the seeds so far alone, and are made again from the first seed on at each start: a
study that was killed goes on as if it had not been.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gptlab.config import Study
from gptlab.report import verdicts
from gptlab.report.estimates import judged_against
from gptlab.report.looks import HOPELESS
from gptlab.report.questions import answer_to, evidence_on
from gptlab.report.statistics import ALPHA, difference
from gptlab.report.studies import ReadStudy, read_study_folder
from gptlab.report.targets import answer_targets, looks_at
from gptlab.rundir import RunDir, run_name
from gptlab.study.folder import is_finished
from gptlab.study.order import run_order
from gptlab.study.runs import PlannedRun, first_seeds

DECIDED = ("better", "worse", "equivalent")
DIVERGED = ("diverges", "reference diverges")

Key = tuple[str, int]  # arm and seed


@dataclass(frozen=True)
class Compared:
    """A comparison, and whether it is open."""

    name: str
    sides: tuple[str, str]
    """Arm and reference, or patterns."""
    judged: verdicts.Judgement
    state: str
    """A verdict, confirmed or rejected (of a question about divergence), hopeless, or open."""
    divergence: bool = False
    """Whether it asks if an arm diverges; arms then get seeds although they diverged."""

    def __str__(self) -> str:
        n, c = self.judged.contrast.difference.n, self.judged.contrast
        seeds = f"{n} seed{'s' * (n != 1)}"
        if self.state in DIVERGED:
            which, (k, of) = (0, c.diverged) if self.state == "diverges" else (1, c.reference_diverged)
            return f"{self.name}: not compared, {k} of {of} runs of {self.sides[which]} diverged"
        return f"{self.name}: {self.state} after {seeds}"


def compared(read: ReadStudy) -> list[Compared]:
    """The comparisons that decide which arms get more seeds."""
    study = read.study
    evidence, _ = evidence_on(study.questions, {study.name: read})
    found = []
    for question in [one for one in study.questions if one.id in evidence]:
        arm, reference = question.contrast
        own = evidence[question.id]
        judged, state = own.judged[study.name], _state(own.judged[study.name])
        if own.divergence:
            answer = answer_to(question, own)
            state = "open" if answer in ("not resolved", "not run") else answer
        name = f"{question.id} {arm} against {reference}"
        found.append(Compared(name, (arm, reference), judged, state, bool(own.divergence)))
    found += _targets(read)
    if study.default is not None:
        found += _against(read, study.default.incumbent, study.default.among, "default: ")
    if not found:
        found = _against(read, study.baseline, [arm for arm in study.arms if arm != study.baseline], "")
    return found


def _targets(read: ReadStudy) -> list[Compared]:
    """The study's questions with a number, each with a judgement of the arm's mean minus the number."""
    found = []
    answers = answer_targets(read)
    for question in [one for one in read.study.questions if one.target is not None]:
        (arm,), looks, level = question.contrast, looks_at(read, question), question.level or ALPHA
        values = looks.differences
        sd = float(values.std(ddof=1)) if len(values) > 1 else math.nan
        d = difference(len(values), float(values.mean()) if len(values) else math.nan, sd, looks.rounding)
        runs = read.values(arm, (question.metric or read.study.metric).name)
        counts = (runs.diverged, len(values) + runs.diverged)
        judged = verdicts.judge({"": verdicts.Contrast(d, "lower", 0.0, diverged=counts, looks=looks)})[""]
        answer = str(answers[question.id]["answer"])
        state = "open" if answer in ("not resolved", "not run") else answer
        if runs.diverged:
            state = "diverges"
        elif state == "open" and 1 < len(values) < looks.most:
            hopeless = looks.chance_to_decide(0.0, 2 * level / len(answers)) < HOPELESS
            state = "hopeless" if hopeless else state
        found.append(Compared(f"{question.id} {arm} against {question.target:g}", (arm, arm), judged, state))
    return found


def _against(read: ReadStudy, reference: str, arms: Sequence[str], prefix: str) -> list[Compared]:
    judged = judged_against(read, arms, reference)
    return [
        Compared(f"{prefix}{arm} against {reference}", (arm, reference), one, _state(one))
        for arm, one in judged.items()
    ]


def _state(judged: verdicts.Judgement) -> str:
    if judged.verdict in (*DECIDED, *DIVERGED):
        return judged.verdict
    c = judged.contrast
    if c.difference.n > 1 and c.difference.identical and not c.tested:  # a metric that is the same in every run
        return "hopeless"
    return "hopeless" if judged.hopeless else "open"


class Decider:
    """Hands out the runs of a study, round by round.

    Args:
        first: the runs of the study's own seeds, in the order in which they start.
        budget: hours of training, summed over the runs of the study; None: no limit.
    """

    def __init__(self, study: Study, folder: Path, first: Sequence[PlannedRun], budget: float | None) -> None:
        self.study, self.folder, self.budget = study, folder, budget
        self.seeds = first_seeds(study, study.most_seeds)
        self.rounds = [list(first)]
        if budget is not None:  # which may end between two of the study's seeds
            self.rounds = [[run for run in first if run.seed == seed] for seed in dict.fromkeys(r.seed for r in first)]
        self.planned: set[Key] = set()
        self.compared: list[Compared] = []
        self.ended: dict[tuple[str, str], str] = {}  # name and state: what was said when it ended
        self.blocked: dict[str, str] = {}  # arm: its run that has no value
        self.over_budget = ""
        self.news: list[str] = []
        """What has ended since the round before, one line each."""

    def next_round(self) -> list[PlannedRun]:
        """The runs of the next round, also those that have a result; [] if no seed is added any more.

        Call it when all runs of the round before have ended.
        """
        self.news = []
        runs = self.rounds.pop(0) if self.rounds else [self._run(key) for key in self._decide()]
        todo = [run for run in runs if not is_finished(self.study, self.folder, run)]
        if todo and self.budget is not None:
            self.over_budget = _over(read_study_folder(self.folder), todo, self.budget)
            if self.over_budget:
                self._decide()
                return []
        self.planned |= {(run.arm, run.seed) for run in runs}
        return runs

    def _run(self, key: Key) -> PlannedRun:
        arm, seed = key
        recipe = self.study.build(arm, seed)
        return PlannedRun(arm, seed, self.study.arms[arm].group, recipe, RunDir(self.folder / run_name(arm, seed)))

    def _decide(self) -> list[Key]:
        """Judge what has been planned so far. Returns the runs of the next round."""
        read = read_study_folder(self.folder)
        read = replace(read, runs={key: run for key, run in read.runs.items() if key in self.planned})
        self.compared = compared(read)
        ended = {(one.name, one.state): str(one) for one in self.compared if one.state != "open"}
        self.news += [text for key, text in ended.items() if key not in self.ended]
        again = [one.name for one in self.compared if one.state == "open" and (one.name, "hopeless") in self.ended]
        self.news += [f"{name}: open again, because another comparison was decided" for name in again]
        self.ended = ended | {key: text for key, text in self.ended.items() if key in ended}
        status = {key: read.runs[key].status if key in read.runs else "unfinished" for key in self.planned}
        self.blocked = {
            arm: f"{arm} seed {seed} is {status[arm, seed].replace('_', ' ')}"
            for arm, seed in sorted(self.planned, reverse=True)
            if status[arm, seed] not in ("completed", "diverged")
        }
        diverged = {arm for (arm, _), how in status.items() if how == "diverged"}
        wanted: set[Key] = set()
        for one in self.compared:
            if one.state == "open" and all(sides := self._sides(one, diverged)):
                arms = [arm for side in sides for arm in side]
                left = ([(arm, seed) for arm in arms if (arm, seed) not in self.planned] for seed in self.seeds)
                wanted.update(next(filter(None, left), ()))
        seeds = sorted({seed for _, seed in wanted}, key=self.seeds.index)
        return [key for key in run_order(self.study, {arm for arm, _ in wanted}, seeds, None) if key in wanted]

    def _sides(self, one: Compared, diverged: Collection[str]) -> list[list[str]]:
        """Of a comparison the arms of each side that can get a seed. A grid goes on without arms that diverged."""
        sides = []
        for pattern in one.sides:
            arms = [arm for arm in fnmatch.filter(self.study.arms, pattern) if arm not in self.blocked]
            sides.append([arm for arm in arms if one.divergence or arm == pattern or arm not in diverged])
        return sides

    def closing(self) -> list[str]:
        """Every comparison: how it ended, or why it is open, one line each."""
        most, lines = self.study.most_seeds, []
        for one in self.compared:
            text = self.ended.get((one.name, one.state), str(one))
            if one.state == "hopeless":
                text += f": {one.judged.why or f'a chance below {HOPELESS:.0%} to decide it within {most} seeds'}"
            elif one.state == "open":
                arms = [arm for pattern in one.sides for arm in fnmatch.filter(self.study.arms, pattern)]
                blocked = [self.blocked[arm] for arm in arms if arm in self.blocked]
                at_most = f"{most} seeds are the most that were stated"
                text += f": {'; '.join(blocked) or self.over_budget or at_most}"
            lines.append(text)
        return lines


def _over(read: ReadStudy, runs: Sequence[PlannedRun], budget: float) -> str:
    """Why these runs do not fit into the budget, in hours; empty if they do."""
    seconds: dict[str, list[float]] = {}
    for run in read.runs.values():
        seconds.setdefault(run.arm, []).append(float(run.result.get("wall_seconds") or 0.0))
    every = [value for values in seconds.values() for value in values]
    spent, whole = sum(every) / 3600, _mean(every)
    more = sum(_mean(seconds[run.arm]) if run.arm in seconds else whole for run in runs) / 3600
    if spent + more <= budget:
        return ""
    return f"{spent:.3g} of {budget:.3g} hours are used, and the next seed takes about {more:.2g}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def standing(folder: Path) -> list[str]:
    """How the comparisons of a study stand that runs until it is decided, one line each."""
    return [str(one) for one in compared(read_study_folder(folder))]
