"""Worlds of noise: losses of runs whose arms do not differ, (studies, arms, seeds).

A healthy run has a standard deviation of 1 beside what its seed shares with the other arms, and a mean of 0. The worlds
differ in what a textbook assumes: equal, normal, independent noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Array = NDArray[np.float64]
World = Callable[[Generator, tuple[int, int, int]], Array]

BAD_SHARE, BAD = 0.05, 20.0  # share of bad runs, and by how many sds they are worse
NORMALISED_T3 = 3**0.5  # sd of Student's t with 3 degrees of freedom


def equal(rng: Generator, shape: tuple[int, int, int]) -> Array:
    return rng.standard_normal(shape)


def lognormal(sigma: float) -> World:
    """Each arm has its own sd, with a median of 1: exp(sigma z)."""

    def draw(rng: Generator, shape: tuple[int, int, int]) -> Array:
        return rng.standard_normal(shape) * np.exp(sigma * rng.standard_normal((*shape[:2], 1)))

    return draw


def noisy(arms: slice, times: float) -> World:
    """Some arms have `times` the noise of the others."""

    def draw(rng: Generator, shape: tuple[int, int, int]) -> Array:
        x = rng.standard_normal(shape)
        x[:, arms] *= times
        return x

    return draw


def heavy(rng: Generator, shape: tuple[int, int, int]) -> Array:
    return rng.standard_t(3, shape) / NORMALISED_T3


def bad(arms: slice) -> World:
    """One run in twenty of the given arms is worse by 20 sds: a run that broke and was not noticed."""

    def draw(rng: Generator, shape: tuple[int, int, int]) -> Array:
        x = rng.standard_normal(shape)
        x[:, arms] += BAD * (rng.random(x[:, arms].shape) < BAD_SHARE)
        return x

    return draw


def shared(correlation: float) -> World:
    """Runs of one seed are correlated over the arms; what is left of a run beside its seed has an sd of 1."""
    sd = (correlation / (1 - correlation)) ** 0.5

    def draw(rng: Generator, shape: tuple[int, int, int]) -> Array:
        return rng.standard_normal(shape) + sd * rng.standard_normal((shape[0], 1, shape[2]))

    return draw


def bad_seeds(rng: Generator, shape: tuple[int, int, int]) -> Array:
    """In one seed of twenty all runs have ten times the noise: a machine that failed, or data that was damaged."""
    return rng.standard_normal(shape) * np.where(rng.random((shape[0], 1, shape[2])) < BAD_SHARE, 10, 1)


def loaded(rng: Generator, shape: tuple[int, int, int]) -> Array:
    """A seed moves all arms the same way, and some three times as far as others."""
    loads = rng.uniform(0.5, 1.5, (*shape[:2], 1))
    return rng.standard_normal(shape) + 3 * loads * rng.standard_normal((shape[0], 1, shape[2]))


# The baseline is the first arm, and the arm with a planted effect the last: it is as noisy as most.
ALL, BASELINE, ONE, HALF = slice(None), slice(0, 1), slice(1, 2), slice(1, -1, 2)
WORLDS: Mapping[str, World] = {
    "equal noise, seeds share nothing": equal,
    "equal noise, seeds correlate by 0.9": shared(0.9),
    "seeds move arms differently": loaded,
    "unequal noise, lognormal 0.5": lognormal(0.5),
    "unequal noise, lognormal 1": lognormal(1.0),
    "one arm ten times as noisy": noisy(ONE, 10),
    "half of the arms three times as noisy": noisy(HALF, 3),
    "half of the arms ten times as noisy": noisy(HALF, 10),
    "the baseline ten times as noisy": noisy(BASELINE, 10),
    "the baseline three times as noisy": noisy(BASELINE, 3),
    "the baseline a tenth as noisy": noisy(BASELINE, 0.1),
    "heavy tails, t with 3 df": heavy,
    "one bad seed in twenty": bad_seeds,
    "one bad run in twenty, all arms": bad(ALL),
    "one bad run in twenty, one arm": bad(ONE),
    "one bad run in twenty, the baseline": bad(BASELINE),
}
