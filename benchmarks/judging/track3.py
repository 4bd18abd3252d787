"""Real runs: verdicts on all pairs of configurations from a few runs of each, against the verdicts from all runs.

The file has the columns configuration, run, step and val_loss. The runs of two configurations share nothing, so their
numbers are taken for seeds: a pairing that is valid, as any is that does not look at the losses, and that does not
help. A rule that pairs pays for it with degrees of freedom. The reference regards no pairing: Welch's t over all runs.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.random import Generator
from scipy import special

from gptlab.report import noise, verdicts
from gptlab.report import statistics as st
from judging.rules import TESTS, Test, differences, is_finding, verdicts_of
from judging.worlds import Array

Runs = Mapping[str, Array]
"""Configuration to its losses, (runs,)."""
MARGINS = (0.001, 0.002)  # nats; the runs' sd is 0.0011, and the benchmark's records are told apart by less
CHUNK = 500  # studies at a time


@dataclass(frozen=True)
class Cell:
    """What a rule says about all pairs, in shares."""

    losses: str
    margin: float
    runs: str
    rule: str
    differ: float
    """Pairs called better or worse."""
    equivalent: float
    opposite: float
    """Studies in which some pair has the opposite sign of the verdict from all runs: at most 5%."""
    equal_in_error: float
    """Pairs called equivalent, of those that differ by all runs: at most 5%."""
    found_in_error: float
    """Pairs called better or worse, of those that are equivalent by all runs. They may differ within the margin."""
    null: float
    """Studies with a finding where all configurations have the same mean and their own noise: at most 5%."""
    draws: int

    @property
    def holds(self) -> bool:
        """Whether what is at most 5% is so, within four standard errors."""
        most = st.ALPHA + 4 * (st.ALPHA * (1 - st.ALPHA) / self.draws) ** 0.5
        return not max(self.opposite, np.nan_to_num(self.equal_in_error), np.nan_to_num(self.null)) > most


def read(file: Path) -> dict[str, dict[int, Array]]:
    """Configuration to step to the losses of its runs. A run that did not log a step is left out there."""
    found: dict[str, dict[int, list[float]]] = {}
    with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            found.setdefault(row["configuration"], {}).setdefault(int(row["step"]), []).append(float(row["val_loss"]))
    return {name: {step: np.array(losses) for step, losses in steps.items()} for name, steps in found.items()}


def losses_of(file: Path) -> dict[str, Runs]:
    """Losses to compare: at the last step that all configurations logged, and at the last step of each."""
    read_ = read(file)
    common = max(set.intersection(*(set(steps) for steps in read_.values())))
    at_common = {name: steps[common] for name, steps in read_.items()}
    return {f"step {common}": at_common, "last step": {name: steps[max(steps)] for name, steps in read_.items()}}


def welch_all(runs: Runs, margin: float) -> Array:
    """Verdicts on all pairs from all runs, (pairs,): -1 better, 1 worse, 0 equivalent, NaN open."""
    i, j = np.triu_indices(len(runs), 1)
    mean, var, n = (np.array([f(x) for x in runs.values()]) for f in (np.mean, lambda x: np.var(x, ddof=1), len))
    return _welch(*(side for k in (i, j) for side in (mean[k], var[k], n[k])), margin)


def _welch(mean_x: Array, var_x: Array, n_x: Array, mean_y: Array, var_y: Array, n_y: Array, margin: float) -> Array:
    a, b = var_x / n_x, var_y / n_y
    se, df = np.sqrt(a + b), (a + b) ** 2 / (a**2 / (n_x - 1) + b**2 / (n_y - 1))
    delta = mean_x - mean_y
    return verdicts_of(delta, st.t_test(delta, se, df), special.stdtr(df, (np.abs(delta) - margin) / se), margin)


Judge = Callable[[Array, float], Array]
"""From losses (studies, configurations, runs) and a margin: verdicts on all pairs."""


def welch(x: Array, margin: float) -> Array:
    """Without pairing, for comparison: no verdict of a report rests on it."""
    n, (i, j) = np.asarray(x.shape[-1]), np.triu_indices(x.shape[1], 1)
    mean, var = x.mean(-1), x.var(-1, ddof=1)
    return _welch(mean[:, i], var[:, i], n, mean[:, j], var[:, j], n, margin)


def paired(test: Test) -> Judge:
    def judge(x: Array, margin: float) -> Array:
        pairs = np.triu_indices(x.shape[1], 1)
        mean, variance = differences(x, *pairs)
        within = st.tost(x.shape[-1], mean, np.sqrt(variance), margin) if margin else 1.0
        return verdicts_of(mean, test(x, *pairs), within, margin)

    return judge


CODES = {"better": -1.0, "worse": 1.0, "equivalent": 0.0}


def judged_all(runs: Runs, variances: str, margin: float) -> Array:
    """What a report says on all pairs from all runs, (pairs,): of two configurations the runs that both have."""
    values = {name: dict(enumerate(losses.tolist())) for name, losses in runs.items()}
    shared = noise.shared_variance(values) if variances == "shared" else None
    family = {}
    for a, b in itertools.combinations(values, 2):
        prior = None if variances == "own" else noise.prior_from(values, values[a], values[b])
        if shared and shared.p > noise.GUARD:
            prior = noise.Prior(2 * shared.variance, shared.df, shared.arms, shared=True)
        sides = (verdicts.Runs(values[name]) for name in (a, b))
        family[a, b] = verdicts.contrast(*sides, "lower", margin, prior)
    return np.array([CODES.get(one.verdict, st.NAN) for one in verdicts.judge(family).values()])


def play(file: Path, draws: int, seed: int) -> Iterator[Cell]:
    judges = {**{name: paired(test) for name, (test, _) in TESTS.items()}, "Welch": welch}
    for losses, runs in losses_of(file).items():
        for margin, n in itertools.product(MARGINS, (3, 5)):
            kept = {name: x for name, x in runs.items() if len(x) >= n}
            yield from _cells(losses, kept, margin, n, judges, draws, seed)
        for margin in MARGINS:
            truth = welch_all(runs, margin)
            said = {**{name: judged_all(runs, name, margin) for name in TESTS}, "Welch": truth}
            for name, verdicts_ in said.items():
                yield Cell(losses, margin, "all", name, *_shares(verdicts_[None], truth), st.NAN, 1)


def _cells(
    losses: str, runs: Runs, margin: float, n: int, judges: Mapping[str, Judge], draws: int, seed: int
) -> Iterator[Cell]:
    truth = welch_all(runs, margin)
    for name, judge in judges.items():
        rng = np.random.default_rng([seed, n])  # the same studies for every rule and margin
        shares, nulls = [], []
        for _ in range(math.ceil(draws / CHUNK)):
            shares.append(_shares(judge(subsampled(rng, runs, n), margin), truth))
            nulls.append(is_finding(judge(residuals(rng, runs, n), 0.0)).any(-1).mean())
        cell = (*np.mean(shares, axis=0).tolist(), float(np.mean(nulls)))
        yield Cell(losses, margin, f"{n} ({len(runs)} configurations)", name, *cell, CHUNK * len(shares))


def subsampled(rng: Generator, runs: Runs, n: int) -> Array:
    """CHUNK studies of n runs of each configuration, without replacement."""
    return np.stack([rng.permuted(np.tile(x, (CHUNK, 1)), axis=1)[:, :n] for x in runs.values()], axis=1)


def residuals(rng: Generator, runs: Runs, n: int) -> Array:
    """CHUNK studies of configurations with the same mean: each has its own sd, and all have the shape of all residuals.

    The residuals of one configuration alone are too few: drawn with replacement, they repeat and have no spread.
    """
    sds = np.array([x.std(ddof=1) for x in runs.values()])
    pool = np.concatenate([(x - x.mean()) / x.std(ddof=0) for x in runs.values()])
    return rng.choice(pool, (CHUNK, len(runs), n)) * sds[:, None]


def _shares(said: Array, truth: Array) -> tuple[float, float, float, float, float]:
    found, equal = is_finding(said), said == 0
    opposite = (said * truth == -1).any(-1).mean()
    differ, same = is_finding(truth), truth == 0
    in_error = equal[:, differ].mean() if differ.any() else st.NAN
    within = found[:, same].mean() if same.any() else st.NAN
    return float(found.mean()), float(equal.mean()), float(opposite), float(in_error), float(within)
