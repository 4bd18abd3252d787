"""Questions against a number, and the time to a target with runs that do not reach it, as `gptlab.report.targets`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
from numpy.random import Generator
from scipy import special

from gptlab.report import statistics as st
from gptlab.report.targets import Reached, time_to
from judging.rules import SEEDS, Row
from judging.worlds import BAD, BAD_SHARE, WORLDS, Array

LEVEL = 0.01
EFFECTS = {3: 5.0, 5: 2.0, 10: 1.0}  # sds of a run below the target, by number of seeds
RUNS = (5, 8, 20)  # of an arm whose time to a target is estimated
SPREAD = 0.05  # sd of the logarithm of a run's time
CHEAP = 10  # a tenth of the draws, where each takes Python's time


def targets(draws: int, rng: Generator) -> Iterator[Row]:
    """A mean is called at most the target though it is the target; an interval of the time misses the true one."""
    for (world, draw), n in itertools.product(WORLDS.items(), SEEDS):
        x = draw(rng, (draws, 2, n))[:, 1]  # the arm that a world singles out
        effect = f"{EFFECTS[n]:g} sd"
        truths = {"mean of healthy runs": (0.0, LEVEL)}
        if "bad run" in world and "baseline" not in world:  # no test knows a mean that one run in twenty decides
            truths["mean of all runs"] = (BAD * BAD_SHARE, st.NAN)
        for variant, (mean, stated) in truths.items():
            error, power = ((p_below(x - mean - by) < LEVEL).mean() for by in (0.0, EFFECTS[n]))
            yield Row("a mean against a number", variant, world, "1", n, stated, error, draws, effect, power)
    for reaching, n in itertools.product((1.0, 0.8, 0.4), RUNS):
        few = max(1, draws // CHEAP)
        logs = SPREAD * rng.standard_normal((few, n))
        end = SPREAD * special.ndtri(reaching)
        missed = np.array([misses(one, end) for one in logs])
        world = "every run reaches it" if reaching == 1 else f"{reaching:.0%} of the runs reach it"
        yield Row("time to a target", "interval", world, f"{n} runs", n, st.ALPHA, missed.mean(), few)


def p_below(x: Array) -> Array:
    """One-sided p of a true mean of 0 or more, over the last axis."""
    n = x.shape[-1]
    return special.stdtr(n - 1, x.mean(-1) / (x.std(-1, ddof=1) / math.sqrt(n)))


def misses(logs: Array, end: float) -> bool:
    """Whether the interval of times misses the true median of 1, if runs are followed to exp(end)."""
    runs = [Reached(math.exp(min(one, end)), bool(one <= end)) for one in logs]
    time = time_to(runs)
    return not (np.isnan(time.low) or time.low <= 1) or not (np.isnan(time.high) or time.high >= 1)
