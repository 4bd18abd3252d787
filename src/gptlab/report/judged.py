"""The runs of a judgement, and what the rules of `gptlab.report.suspicions` need of them."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

import numpy as np

from gptlab.guard import Divergence
from gptlab.logs.divergence import EMPTY, diverged, training_losses
from gptlab.logs.run import Array, Curve, LogRun
from gptlab.report import repeats
from gptlab.report.words import one_line


class Judged:
    """The runs of a judgement, and what several rules need of them."""

    def __init__(
        self,
        runs: Sequence[LogRun],
        metric: str,
        better: str,
        at: str,
        values: Mapping[tuple[str, int], float],
        arms_declared: int | None = None,
        targets: Sequence[float] = (),
    ) -> None:
        self.runs, self.metric, self.sign, self.at = runs, metric, -1.0 if better == "higher" else 1.0, at
        self.values = {key: value for key, value in values.items() if math.isfinite(value)}
        self.arms_declared, self.targets = arms_declared, targets
        self.arms: dict[str, list[int]] = defaultdict(list)
        """Indices of the runs of each arm."""
        for i, run in enumerate(runs):
            self.arms[run.arm or ""].append(i)

    @cached_property
    def lost(self) -> dict[int, Divergence]:
        """The runs that diverged."""
        found = ((i, diverged(run, self.metric)) for i, run in enumerate(self.runs))
        return {i: one for i, one in found if one}

    @cached_property
    def curves(self) -> list[Curve]:
        """The metric's finite points of each run."""
        curves = []
        for run in self.runs:
            steps, values = run.curves.get(self.metric, EMPTY)
            known = np.isfinite(values)
            curves.append((steps[known], values[known]))
        return curves

    @cached_property
    def agreements(self) -> list[repeats.Agreement]:
        """Runs whose metric agrees, or whose training loss does where the metric has fewer than six points."""
        rows = []
        for run, (_, values) in zip(self.runs, self.curves, strict=True):
            if len(values) < 6:
                _, losses = training_losses(run)
                values = max(values, losses[np.isfinite(losses)], key=len)
            rows.append(values)
        found = repeats.agreements(rows)
        # arms may branch from one run, and begin alike where they share a seed
        return [
            one
            for one in found
            if one.contained or not one.start or self.runs[one.first].arm == self.runs[one.second].arm
        ]

    @cached_property
    def sound(self) -> dict[str, dict[int, float]]:
        """Values by arm and seed, without diverged runs and second copies of a run."""
        left_out = {*self.lost, *(one.second for one in self.agreements)}
        found: dict[str, dict[int, float]] = {}
        for arm, indices in self.arms.items():
            keys = {i: (arm, self.runs[i].seed or 0) for i in indices}
            found[arm] = {
                key[1]: self.values[key] for i, key in keys.items() if key in self.values and i not in left_out
            }
        return found

    @cached_property
    def spread(self) -> tuple[float, int]:
        """The sd between seeds of an arm, pooled over arms, and its degrees of freedom."""
        return pooled_sd([[*own.values()] for own in self.sound.values()])

    def logged(self, arm: str, points: int) -> Array:
        """The last values of an arm's curves, and of runs without a curve their values, as their logs have them."""
        rows = []
        for i in self.arms[arm]:
            value = self.values.get((arm, self.runs[i].seed or 0))
            rows.append(self.curves[i][1][-points:])
            if not len(rows[-1]) and value is not None:
                rows[-1] = np.array([value])
        return np.concatenate(rows)

    @cached_property
    def steps(self) -> dict[str, float]:
        """In which the metric of each arm is printed, or counted; of few values that of all arms."""
        known = {arm: self.logged(arm, 20) for arm in self.arms}
        common = repeats.grid(np.concatenate([*known.values()]))
        few = {arm: len(np.unique(values)) < 5 for arm, values in known.items()}
        return {arm: common if few[arm] else max(common, repeats.grid(values)) for arm, values in known.items()}

    @cached_property
    def ends(self) -> dict[int, float]:
        """The last step with a metric of each run that has a curve and did not diverge."""
        return {i: float(steps[-1]) for i, (steps, _) in enumerate(self.curves) if len(steps) and i not in self.lost}

    @cached_property
    def usual_ends(self) -> dict[str, float]:
        """The most common of them in each arm; of equally common ones the last."""
        found = {}
        for arm, indices in self.arms.items():
            if own := [self.ends[i] for i in indices if i in self.ends]:
                found[arm] = max(Counter(own).items(), key=lambda item: (item[1], item[0]))[0]
        return found

    def name(self, i: int) -> str:
        return f"{one_line(self.runs[i].arm or '')} seed {self.runs[i].seed}"

    def names(self, indices: Iterable[int]) -> str:
        return listed([self.name(i) for i in indices])


def pooled_sd(arms: Iterable[Sequence[float]]) -> tuple[float, int]:
    """The sd of values about the mean of their arm, and its degrees of freedom; NaN and 0 without two of an arm."""
    rows = [np.array(own) for own in arms if len(own) > 1]
    df = sum(len(row) - 1 for row in rows)
    if not df:
        return math.nan, 0
    sd = math.sqrt(sum(float(((row - row.mean()) ** 2).sum()) for row in rows) / df)
    return (sd if sd > 1e-12 * np.abs(rows[0]).max() else 0.0), df  # less is rounding


def listed(names: Sequence[str], most: int = 5) -> str:
    """`a, b and c`, or `a, b, c, d and 7 more`."""
    if len(names) > most:
        return f"{', '.join(names[: most - 1])} and {len(names) - most + 1} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
