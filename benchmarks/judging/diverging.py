"""Which arms diverge more often, and whether two frontiers differ: as `gptlab.report.divergence` and `frontiers`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache

import numpy as np
from numpy.random import Generator

from gptlab.report import statistics as st
from gptlab.report.divergence import more_often
from gptlab.report.frontiers import frontiers
from judging.rules import SEEDS, Row
from judging.worlds import WORLDS, Array

ARMS = 19
NOISE = 0.005  # relative, of a run's speed
LEAST = (0.02, 0.02)  # gains in speed and memory that count
FEWER = 200  # a comparison of frontiers takes 4,000 draws of its own


def divergence(draws: int, rng: Generator) -> Iterator[Row]:
    """An arm is said to diverge more often though all have the same rate. Before: an arm diverges if a run does."""
    for rate, n in itertools.product((0.01, 0.02, 0.05, 0.2), SEEDS):
        lost = rng.binomial(n, rate, (draws, ARMS))
        planted = lost.copy()
        planted[:, -1] = rng.binomial(n, 0.9, draws)
        shown, found = (np.array([which_diverge(tuple(row), n) for row in k.tolist()]) for k in (lost, planted))
        world, size = f"{rate:.0%} of all runs diverge", f"{ARMS} arms"
        for variant, null, power, stated in (
            ("before", (lost > 0).any(-1).mean(), (planted[:, -1] > 0).mean(), st.NAN),
            ("Fisher's test", shown.any(-1).mean(), found[:, -1].mean(), st.ALPHA),
        ):
            yield Row("diverges", variant, world, size, n, stated, null, draws, "90% diverge", power)


@cache
def _by_counts(lost: tuple[int, ...], n: int) -> dict[int, bool]:
    """Diverged runs to whether an arm with as many is shown to diverge; arms with equal counts fare alike."""
    judged = more_often({f"{a}": (k, n) for a, k in enumerate(lost)})
    return {k: judged[f"{a}"].shown if f"{a}" in judged else False for a, k in enumerate(lost)}


def which_diverge(lost: tuple[int, ...], n: int) -> list[bool]:
    shown = _by_counts(tuple(sorted(lost)), n)
    return [shown[k] for k in lost]


def two_frontiers(draws: int, rng: Generator) -> Iterator[Row]:
    """The frontiers of two tasks are said to differ though all arms have the same speed and memory in both."""
    few = max(1, draws // FEWER)
    for (world, draw), n in itertools.product(WORLDS.items(), (3, 5)):
        sizes = np.exp(0.1 * rng.standard_normal((few, 2, 6, 1)))  # of the arms, alike in both tasks
        tasks = [draw(rng, (few, 6, n)) for _ in range(2)]
        error = np.mean([differ(tasks[0][i], tasks[1][i], sizes[i], 1.0) for i in range(few)])
        power = np.mean([differ(tasks[0][i], tasks[1][i], sizes[i], 1.5) for i in range(few)])
        yield Row("frontiers differ", "", world, "6 arms", n, st.ALPHA, error, few, "1.5 times as fast", power)


def differ(first: Array, second: Array, sizes: Array, gain: float) -> bool:
    """Whether some arm pays in one task alone; the last arm of the first task is `gain` times as fast as the best."""
    studies = []
    for noise, faster in ((first, gain), (second, 1.0)):
        speeds = sizes[0] * np.exp(NOISE * noise)
        if faster > 1:
            speeds[-1] *= faster * sizes[0].max() / sizes[0][-1]
        memory = np.broadcast_to(sizes[1], speeds.shape)
        studies.append(tuple({f"{a}": dict(enumerate(row)) for a, row in enumerate(axis)} for axis in (speeds, memory)))
    return bool(frontiers(studies, LEAST).differ)  # type: ignore[arg-type]
