"""Studies with a look after every seed, as `gptlab.report.looks` pays for them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from numpy.random import Generator
from scipy import special

from gptlab.report import statistics as st
from gptlab.report.looks import overall, summaries
from judging.rules import Row, for_power, is_finding, repeated_tests, verdicts_of
from judging.worlds import WORLDS, Array

MOST = (12, 20)  # stated seeds


def looks(draws: int, rng: Generator) -> Iterator[Row]:
    """A look after every seed, until all is decided or the seeds are run: some finding is false."""
    for (world, draw), family, most in itertools.product(WORLDS.items(), (1, 3, 18), MOST):
        x = draw(rng, (draws, family + 1, most))
        d, few = x[:, 1:] - x[:, :1], for_power(draws)
        planted = d[:few].copy()
        planted[:, -1] -= 2.0
        rule, size, effect = "a look after every seed", f"{family}", "2 sd"
        error, power = is_finding(repeated_tests(d[:few])).any(-1).mean(), finds(repeated_tests(planted))
        yield Row(rule, "before", world, size, most, st.NAN, error, few, effect, power)
        error, power = is_finding(every_look(d)).any(-1).mean(), finds(every_look(planted))
        yield Row(rule, "until decided", world, size, most, st.ALPHA, error, draws, effect, power)


def finds(verdicts: Array) -> float:
    return float((verdicts[:, -1] == -1).mean())


def every_look(d: Array) -> Array:
    """Findings of any look without a margin: -1 better, 1 worse, NaN open. A p that fell never rises again.

    Args:
        d: paired differences, (studies, comparisons, seeds).
    """
    n, mean, sd = summaries(d)
    half = special.stdtr(n - 1, -np.abs(mean) / (sd / np.sqrt(n)))
    below, above = (np.where(side, half, 1 - half).min(-1) for side in (mean < 0, mean > 0))
    p = np.minimum(1, 2 * overall(np.minimum(below, above), d.shape[-1]))
    return verdicts_of(np.where(below < above, -1.0, 1.0), p)
