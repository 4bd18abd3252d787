"""Two arms whose runs share no seeds, compared by Welch's statistic and the distribution of Behrens and Fisher.

The statistic is the difference of the means over its standard error, each arm with its own variance. Student's t with
Welch's degrees of freedom errs where it matters: 18 arms of 3 runs against a baseline of 10, all with equal noise, find
a difference that is none in 13% of studies after Holm; 16% where the baseline is ten times quieter, and single
comparisons of 2 runs with 10 err in 11%. The distribution of Behrens (1929) and Fisher (1935), a sum of the two arms' t
weighted by their standard errors, errs in at most 5.0% of single comparisons, of such families and of all pairs, from 2
runs on (Robinson 1976 found it conservative too). It costs power where noise is equal and runs are few: a difference of
four sds at 3 runs each is found in 64% of cases, and by Welch's t in 88%.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from gptlab.report import statistics as st
from gptlab.report import verdicts
from gptlab.report.reading import Array

# Nodes of the integral over a logit, by the trapezoidal rule: 1e-11 of the chance with one degree of freedom.
LOGIT, STEP = np.linspace(-60, 60, 241, retstep=True)


def chance_beyond(t: ArrayLike, share: ArrayLike, df: ArrayLike, other_df: ArrayLike) -> Array:
    """P(sqrt(share) x + sqrt(1 - share) y > t) of independent Student's x and y: one-sided p of a statistic t.

    Args:
        share: of the first arm in the squared standard error.
        df, other_df: degrees of freedom of the first arm and of the other, at least 1.
    """
    t, share, df, other_df = (np.asarray(x, dtype=np.float64)[..., None] for x in (t, share, df, other_df))
    # Given b, the first arm's part in both sums of squares, which is Beta(df / 2, other_df / 2), the sum is a t with
    # all degrees of freedom, scaled.
    log_b, log_rest = -np.logaddexp(0, -LOGIT), -np.logaddexp(0, LOGIT)
    density = np.exp(df / 2 * log_b + other_df / 2 * log_rest - special.betaln(df / 2, other_df / 2))
    scale = share * df * np.exp(-log_b) + (1 - share) * other_df * np.exp(-log_rest)
    tails = special.stdtr(df + other_df, -t * np.sqrt((df + other_df) / scale))
    return np.asarray(STEP * (density * tails).sum(axis=-1))


def critical(share: float, df: int, other_df: int, alpha: float = st.ALPHA) -> float:
    """The statistic that is exceeded, to either side, with probability alpha."""
    from scipy.optimize import brentq

    high = 2 * float(special.stdtrit(min(df, other_df), 1 - alpha / 2))
    return float(brentq(lambda t: 2 * float(chance_beyond(t, share, df, other_df)) - alpha, 0.0, high))


@dataclass(frozen=True)
class Unpaired(verdicts.Contrast):
    """`difference` has n: runs of the arm that has fewer, and sd: the standard error times the root of that."""

    share: float = st.NAN
    """Of the arm in the squared standard error."""

    def p_within(self) -> float:
        d, runs = self.difference, self.runs or (0, 0)
        t = (self.margin - abs(d.mean)) / d.sd * np.sqrt(d.n)
        return float(chance_beyond(t, self.share, *(n - 1 for n in runs)))


def difference(a: Mapping[int, float], b: Mapping[int, float]) -> tuple[st.Difference, float]:
    """a - b over all runs of each, and the share of a in the squared standard error.

    Without a spread in both (one run, a coarse metric, copies) there is no noise to test against: p is NaN.
    """
    x, y = (np.array([*st.finite(values).values()]) for values in (a, b))
    n = min(len(x), len(y))
    mean = float(x.mean() - y.mean()) if n else st.NAN
    if n < 2:
        return st.Difference(n, mean, st.NAN, st.NAN, st.NAN, st.NAN), st.NAN
    squares = [float(values.var(ddof=1)) / len(values) for values in (x, y)]
    se = float(np.sqrt(sum(squares)))
    if se <= st.ROUNDING * max(np.abs(x).max(), np.abs(y).max()):
        return st.Difference(n, mean, 0.0, st.NAN, st.NAN, st.NAN), st.NAN
    share, dfs, sd = squares[0] / sum(squares), (len(x) - 1, len(y) - 1), se * float(np.sqrt(n))
    half = critical(share, *dfs) * se
    p = min(1.0, 2 * float(chance_beyond(abs(mean) / se, share, *dfs)))
    return st.Difference(n, mean, sd, mean - half, mean + half, p, sd), share


def contrast(arm: verdicts.Runs, reference: verdicts.Runs, better: st.Better, margin: float) -> Unpaired:
    """Two arms compared; `verdicts.contrast` compares them seed by seed."""
    known = [len(st.finite(runs.values)) for runs in (arm, reference)]
    delta, share = difference(arm.values, reference.values)
    counts, other = ((runs.diverged, n + runs.diverged) for runs, n in zip((arm, reference), known, strict=True))
    welch, run = st.welch(arm.values, reference.values), bool(arm.values and reference.values)
    return Unpaired(
        *(delta, better, margin, welch, counts, other),
        share=share,
        run=run,
        reference_lost=reference.lost,
        runs=(known[0], known[1]),
    )
