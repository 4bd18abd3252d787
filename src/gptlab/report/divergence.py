"""Which arms diverge more often than the others of their study, how often, and when.

One diverged run shows that an arm can diverge. That it diverges more often than the study's other arms is shown by
Fisher's exact test, one-sided, of its runs against those of all other arms: 3 of 3 and 2 of 3 against 0 of 54 are
shown after Holm over 19 arms, 1 of 3 (p = 0.053) is not. A test against the reference alone sees nothing with three
seeds: 3 of 3 against 0 of 3 has p = 0.05.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from gptlab.report import statistics as st
from gptlab.report.reading import number
from gptlab.report.studies import ReadStudy

Counts = tuple[int, int]
"""(diverged runs, runs that completed or diverged)."""

CLAIMED_RATE = 2 / 3  # "X diverges" claims that at least two of three runs do
MOST_ORDERS = 9999  # of the exact rank-sum test; beyond it as many orders are drawn


@dataclass(frozen=True)
class Divergence:
    """An arm's diverged runs against those of the other arms."""

    diverged: int
    runs: int
    """Those that completed or diverged."""
    others: Counts
    """Of the other arms; without those that are shown to diverge more often, if several are."""
    p: float
    """Of "no more often than the others", not adjusted; 1 if no run diverged."""
    p_holm: float
    """Adjusted over the arms, or over the questions that ask for it."""
    tests: int
    """Their number."""

    @property
    def shown(self) -> bool:
        """Whether the arm is shown to diverge more often. An exact p of 5% is enough."""
        return self.p_holm <= st.ALPHA

    @property
    def most(self) -> float:
        """Upper end of the one-sided 95% interval of the rate (Clopper and Pearson 1934): 0 of 3 is 0.632."""
        return st.largest_rate(self.diverged, self.runs, st.ALPHA)

    @property
    def excluded(self) -> bool:
        """Whether the arm is shown to diverge in fewer than two of three runs."""
        return self.most < CLAIMED_RATE


def fisher(arm: Counts, others: Counts) -> float:
    """One-sided p that an arm diverges no more often than the others: Fisher's exact test, in whole numbers."""
    (k, n), (k_other, n_other) = arm, others
    lost, runs = k + k_other, n + n_other
    ways = sum(math.comb(lost, x) * math.comb(runs - lost, n - x) for x in range(k, min(n, lost) + 1))
    return ways / math.comb(runs, n)


def more_often(counts: Mapping[str, Counts]) -> dict[str, Divergence]:
    """Each arm of a study against all others, with Holm's correction over the arms.

    An arm that is shown to diverge is left out when the arms after it are tested, so that two that break do not hide
    each other. In simulated studies with one rate for all other arms at most 5% name one of these.
    """
    pool, untested, worst = dict(counts), list(counts), 0.0
    found = {}
    while untested:
        lost, runs = (sum(count[i] for count in pool.values()) for i in (0, 1))
        others = {count: (lost - count[0], runs - count[1]) for count in {counts[arm] for arm in untested}}
        ps = {count: fisher(count, other) for count, other in others.items()}
        arm = min(untested, key=lambda arm: ps[counts[arm]])
        own, p = counts[arm], ps[counts[arm]]
        worst = max(worst, min(1.0, p * len(untested)))
        found[arm] = Divergence(*own, others[own], p, worst, len(counts))
        untested.remove(arm)
        if found[arm].shown:
            del pool[arm]
    return {arm: found[arm] for arm in counts}


def of_study(read: ReadStudy) -> dict[str, Divergence]:
    """Every arm of a study."""
    return more_often({arm: counts_of(read, arm) for arm in read.study.arms})


def of_questions(asked: Sequence[tuple[ReadStudy, str]]) -> list[Divergence]:
    """The arms (or patterns of arms) of questions that ask whether they diverge; Holm over these questions."""
    found = []
    for read, arm in asked:
        ours, (lost, runs) = counts_of(read, arm), counts_of(read, "*")
        others = (lost - ours[0], runs - ours[1])
        found.append(Divergence(*ours, others, fisher(ours, others), st.NAN, len(asked)))
    adjusted = st.holm([one.p for one in found])
    return [replace(one, p_holm=float(p)) for one, p in zip(found, adjusted, strict=True)]


def of_arm(read: ReadStudy, arm: str) -> Divergence:
    """An arm, or a pattern of arms (Bonferroni), among all arms of its study."""
    found = of_study(read)
    if arm in found:
        return found[arm]
    (one,) = of_questions([(read, arm)])
    return replace(one, p_holm=min(1.0, one.p * len(found)), tests=len(found))


def counts_of(read: ReadStudy, arm: str) -> Counts:
    statuses = [run.status for run in read.of(arm)]
    lost = statuses.count("diverged")
    return lost, lost + statuses.count("completed")


# -- when and how ---------------------------------------------------------------------------------------------------


def steps_of(read: ReadStudy, arm: str) -> list[int]:
    """The steps at which an arm's runs diverged, where they are known."""
    lost = [run.result for run in read.of(arm) if run.status == "diverged"]
    steps = [next((s for key in ("failed_at_step", "steps") if (s := number(r.get(key))) >= 0), st.NAN) for r in lost]
    return sorted(int(step) for step in steps if math.isfinite(step))


def kinds_of(read: ReadStudy, arm: str) -> dict[str, int]:
    """How often each kind of failure (non_finite, spike, collapse) ended a run of an arm."""
    lost = [run.result.get("failure") for run in read.of(arm) if run.status == "diverged"]
    return dict(Counter(str(kind or "unknown") for kind in lost))


@dataclass(frozen=True)
class Times:
    """When an arm diverges in two studies, over the steps that both ran."""

    horizon: float
    """Steps; later failures count as none. Infinite if no run ended without a failure."""
    within: tuple[Counts, Counts]
    """Of each study the runs that diverged by then, and all runs."""
    p: float
    """Two-sided, of equal times: an exact rank-sum test, in which runs without a failure come last and are tied."""
    earlier: int
    """0 or 1: the study in which the runs diverge earlier on average."""

    @property
    def least_p(self) -> float:
        """The smallest p that as many runs can have."""
        (_, n), (_, m) = self.within
        return 2 / math.comb(n + m, n)


def times_of(first: ReadStudy, second: ReadStudy, arm: str) -> Times | None:
    """Whether an arm diverges at other steps in one study than in the other; None if it has no run in one.

    Runs without a divergence are censored at their last step. The shorter study censors both, so that only the steps
    that both studies ran are compared: without this, runs of a longer study would have more time to fail.
    """
    ends = []
    for read in (first, second):
        done = [number(run.result.get("steps")) for run in read.of(arm) if run.status == "completed"]
        planned = number(read.study.recipe.get("train", {}).get("max_steps"))
        ends.append(min([end for end in done or [planned] if end > 0], default=math.inf))
    horizon = min(ends)
    found = []
    for read in (first, second):
        # A failure at an unknown step, or beyond the horizon, counts as none.
        found.append(([step for step in steps_of(read, arm) if step <= horizon], counts_of(read, arm)[1]))
    if not all(n for _, n in found):
        return None
    from scipy import stats

    rows = [np.array([*steps, *[math.inf] * (n - len(steps))]) for steps, n in found]
    ranks = stats.rankdata(np.concatenate(rows))
    x, y = ranks[: len(rows[0])], ranks[len(rows[0]) :]
    p = 1.0
    if np.ptp(ranks) > 0:
        test = stats.permutation_test(
            (x, y),
            lambda x, y, axis: np.mean(x, axis=axis) - np.mean(y, axis=axis),
            vectorized=True,
            n_resamples=MOST_ORDERS,
            rng=np.random.default_rng(0),
        )
        p = float(test.pvalue)
    a, b = ((len(steps), n) for steps, n in found)
    return Times(horizon, (a, b), p, int(x.mean() > y.mean()))
