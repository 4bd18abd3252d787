"""Frontiers of speed and memory in two studies: which arms save something in one and nothing in the other.

An arm is dominated if another gains more than a threshold on one axis (speed or memory) and loses less than the
threshold on the other (additive epsilon-dominance of logarithms, after Zitzler et al. 2003). Both are measured in
thresholds, so that

    depth of an arm = the largest min(gain - 1, 1 - loss) over the other arms; positive if it is dominated.

The depth moves no faster than speed and memory do. An arm is called off the frontier at a depth of a half or more, and
on it at minus a half or less: tasks differ only where a gain or a loss differs by a whole threshold. Without that gap
an arm that is exactly a threshold better would differ between tasks by its noise, and by a byte of memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gptlab.report import statistics as st
from gptlab.report import timing, verdicts
from gptlab.report.estimates import judged_against, memory_ratio
from gptlab.report.rankings import DRAWS, centred_block, drawn_means
from gptlab.report.reading import Array
from gptlab.report.studies import ReadStudy

LEAST_GAIN = 0.02  # of speed and of memory, where a question states no other
CLEAR = 0.5  # thresholds beyond the line between on and off
SURE = 0.975  # share of draws above which an arm counts as on the frontier, or off it

Axis = Mapping[str, Mapping[int, float]]
"""Arm to seed to value."""


@dataclass(frozen=True)
class Frontiers:
    """Two studies' frontiers over the arms that both know."""

    arms: list[str]
    on: dict[str, tuple[float, float]]
    """Arm to the share of draws, in each study, in which it is clearly on the frontier."""
    off: dict[str, tuple[float, float]]

    def pays(self, arm: str, study: int) -> bool | None:
        """Whether an arm saves time or memory in a study: no other arm is as good for less. None if that is open."""
        return True if self.on[arm][study] > SURE else False if self.off[arm][study] > SURE else None

    @property
    def differ(self) -> list[str]:
        """Arms that pay in one study and not in the other."""
        return [arm for arm in self.arms if {self.pays(arm, 0), self.pays(arm, 1)} == {True, False}]

    @property
    def alike(self) -> bool:
        """Whether no arm pays in one study and not in the other: of each arm, one half of that is excluded."""
        excluded = [min(self.on[arm][i], self.off[arm][1 - i]) < 1 - SURE for arm in self.arms for i in (0, 1)]
        return bool(self.arms) and all(excluded)


def frontiers(
    studies: Sequence[tuple[Axis, Axis]], least: tuple[float, float], seed: int = 0, draws: int = DRAWS
) -> Frontiers:
    """Compare two frontiers.

    A draw is each arm's mean logarithm plus t times its standard error, without the common effect of each seed. Of
    simulated pairs of equal studies at most 5% differ, whatever the noise, and of pairs that just differ at most 5% are
    called alike (tests/test_report_frontiers.py).

    Args:
        studies: of each, speed and memory of the same arms.
        least: the smallest gains in speed and in memory that count, as shares.
        seed: of the simulation.
    """
    arms = [arm for arm in studies[0][0] if all(len(st.finite(axis.get(arm, {}))) > 1 for s in studies for axis in s)]
    if len(arms) < 2:
        return Frontiers([], {}, {})
    generator = np.random.default_rng(seed)
    depths = []
    for axes in studies:
        units = [
            sign * _draws({arm: axis[arm] for arm in arms}, draws, generator) / np.log1p(gain)
            for axis, gain, sign in zip(axes, least, (1, -1), strict=True)
        ]
        depths.append(depth(*units))
    clear = [d <= -CLEAR for d in depths], [d >= CLEAR for d in depths]
    shares = [np.stack([side.mean(axis=0) for side in sides], axis=1).tolist() for sides in clear]
    on, off = ({arm: (a, b) for arm, (a, b) in zip(arms, rows, strict=True)} for rows in shares)
    return Frontiers(arms, on, off)


def depth(speed: Array, memory: Array) -> Array:
    """How far each arm is dominated, (draws, arms), from speed and saved memory in thresholds, (draws, arms)."""
    deepest = np.full(speed.shape, -1.0)  # of no other arm: it gains nothing and loses nothing
    for other in range(speed.shape[1]):
        gains = speed[:, [other]] - speed, memory[:, [other]] - memory
        gain, loss = np.maximum(*gains), -np.minimum(*gains)
        deepest = np.maximum(deepest, np.minimum(gain - 1, 1 - loss))
    return deepest


def _draws(axis: Axis, draws: int, generator: np.random.Generator) -> Array:
    """Simulated mean logarithms, (draws, arms)."""
    known = {arm: st.finite(values).items() for arm, values in axis.items()}
    _, block = centred_block(
        {arm: {seed: float(np.log(v)) for seed, v in values if v > 0} for arm, values in known.items()}
    )
    m, n = block.shape
    if n < 2 or m < len(axis):  # fewer than two common seeds
        return np.full((draws, len(axis)), np.nan)
    return drawn_means(block, draws, generator, st.ROUNDING)


def judged_of(read: ReadStudy) -> dict[str, verdicts.Judgement]:
    """Every arm of a study against its baseline."""
    baseline = read.study.baseline
    return judged_against(read, [arm for arm in read.study.arms if arm != baseline], baseline)


def compare(studies: Mapping[str, ReadStudy], least: tuple[float, float]) -> tuple[Frontiers, dict[str, str]]:
    """The frontiers of two studies over the arms that are usable in both, and why the others are left out.

    An arm is left out of both if it is worse than the baseline or had a diverged run in one of them, or fewer than two
    runs: it could push others off one frontier and not off the other.
    """
    reasons: dict[str, dict[str, list[str]]] = {}
    for name, read in studies.items():
        for arm, why in _unusable(read, list(dict.fromkeys(a for r in studies.values() for a in r.study.arms))).items():
            reasons.setdefault(arm, {}).setdefault(why, []).append(name)
    axes = []
    for read in studies.values():
        arms = [arm for arm in read.study.arms if arm not in reasons]
        speeds = {arm: {seed: one.median for seed, one in read.paces(arm).items()} for arm in arms}
        axes.append((speeds, {arm: dict(read.values(arm, "peak_memory_gb").values) for arm in arms}))
    told = {arm: [f"{why} in {' and '.join(names)}" for why, names in found.items()] for arm, found in reasons.items()}
    return frontiers(axes, least), {arm: ", ".join(why) for arm, why in told.items()}


def _unusable(read: ReadStudy, arms: Sequence[str]) -> dict[str, str]:
    """Arms that cannot be on the frontier of a study, and why."""
    worse = {arm for arm, judged in judged_of(read).items() if judged.verdict == "worse"}
    found = {}
    for arm in arms:
        runs = read.of(arm)
        known = [run for run in runs if len(run.speeds(read.unit)) and run.value("peak_memory_gb") > 0]
        if any(run.status == "diverged" for run in runs):
            found[arm] = "diverged"
        elif arm in worse:
            found[arm] = f"worse than {read.study.baseline}"
        elif len([run for run in known if run.status == "completed"]) < 2:
            found[arm] = "fewer than two runs"
    return found


def ratios(read: ReadStudy, arm: str) -> tuple[float, float]:
    """Speed and memory of an arm, as ratios to the baseline's; NaN if unknown."""
    baseline = read.study.baseline
    return timing.speedup(read.paces(arm), read.paces(baseline)).value, memory_ratio(read, arm, baseline)
