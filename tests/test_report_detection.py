"""Power, detectable differences and seeds needed: against closed forms, and by simulation of the verdict's own rule."""

import math

import numpy as np
import pytest
from scipy import integrate, stats
from statsmodels.stats.power import TTestPower

from gptlab.report import detection
from gptlab.report import statistics as st
from gptlab.report.power import effective_df


def at_most(successes: int, trials: int, rate: float) -> bool:
    return successes <= stats.binom.ppf(0.999, trials, rate)


def at_least(successes: int, trials: int, rate: float) -> bool:
    return successes >= stats.binom.ppf(0.001, trials, rate)


def test_the_minimum_detectable_effect_is_the_published_one():
    assert detection.minimum_detectable(3, 1.0) == pytest.approx(3.26, abs=0.005)
    assert stats.t.ppf(0.975, 2) / math.sqrt(3) == pytest.approx(2.48, abs=0.005)  # only where p reaches 5%
    assert detection.minimum_detectable(3, 0.02) == pytest.approx(0.02 * detection.minimum_detectable(3, 1.0))
    assert math.isnan(detection.minimum_detectable(1, 1.0))


@pytest.mark.parametrize("n", [2, 3, 5, 10, 40])
@pytest.mark.parametrize("family", [1, 18])
def test_power_is_that_of_the_squared_t(n, family):
    """t squared has the noncentral F distribution: both tails in one, by another routine."""
    effect = detection.minimum_detectable(n, 1.0, family)
    for share in (0.1, 0.5, 1.0):
        critical, shift = stats.t.ppf(1 - 0.025 / family, n - 1), share * effect * math.sqrt(n)
        reference = stats.ncf.sf(critical**2, 1, n - 1, shift**2)
        assert float(detection.power(share * effect, n, 0.05 / family)) == pytest.approx(reference, abs=2e-5)
    assert float(detection.power(effect, n, 0.05 / family)) == pytest.approx(0.8)


def test_the_seeds_needed_are_the_fewest():
    for effect, family in ((3.3, 1), (1.0, 1), (0.3, 1), (1.0, 18)):
        n = detection.seeds_needed(-effect, 1.0, family)
        assert TTestPower().power(effect, n, 0.05 / family) >= 0.8 > TTestPower().power(effect, n - 1, 0.05 / family)
    assert detection.seeds_needed(3.3, 1.0) == 3
    assert detection.seeds_needed(0.0001, 1.0) is None and detection.seeds_needed(0.0, 1.0) is None
    with pytest.raises(ValueError, match="sd = 0: must be greater than 0"):
        detection.seeds_needed(1.0, 0)


@pytest.mark.parametrize(("n", "margin", "effect"), [(3, 3.0, 0.0), (3, 1.5, 0.5), (8, 1.2, 0.3), (30, 0.5, 0.0)])
def test_the_power_of_tost_is_an_integral_over_the_sd(n, margin, effect):
    def passes(variance):
        room = margin - stats.t.ppf(0.95, n - 1) * math.sqrt(variance / (n - 1) / n)
        inside = stats.norm(effect, 1 / math.sqrt(n))
        return (inside.cdf(room) - inside.cdf(-room)) * stats.chi2.pdf(variance, n - 1) if room > 0 else 0.0

    limit = n * (n - 1) * (margin / stats.t.ppf(0.95, n - 1)) ** 2
    assert detection.power_of_tost(margin, n, effect) == pytest.approx(integrate.quad(passes, 0, limit)[0], abs=2e-3)


def test_the_seeds_for_equivalence_are_the_fewest():
    n = detection.seeds_for_equivalence(0.004, 0.004)
    assert detection.power_of_tost(1.0, n) >= 0.8 > detection.power_of_tost(1.0, n - 1)
    assert detection.seeds_for_equivalence(0.004, 0.004, effect=0.003) > n
    assert detection.seeds_for_equivalence(0.004, 0.004, effect=0.004) is None  # at the margin no number of seeds helps
    assert detection.seeds_for_equivalence(0.0, 0.004) is None
    shared = detection.seeds_for_equivalence(0.004, 0.004, tests=3)
    assert detection.power_of_tost(1.0, shared, alpha=0.05 / 3) >= 0.8 > detection.power_of_tost(1.0, n, alpha=0.05 / 3)


def said(n: int, effect: float, sd: float, margin: float, family: int = 1, trials: int = 20_000) -> float:
    """Simulated share of studies in which a true difference is called better or worse."""
    deltas = np.random.default_rng(n).normal(effect, sd, (trials, n))
    mean, spread = deltas.mean(-1), deltas.std(-1, ddof=1)
    p = st.t_test(mean, spread / math.sqrt(n), n - 1)
    return float(np.mean((p < 0.05 / family) & (np.abs(mean) > margin)))


@pytest.mark.parametrize(("effect", "sd", "family"), [(0.0045, 0.004, 1), (0.006, 0.004, 18), (0.0045, 0.0005, 1)])
def test_power_is_that_of_the_verdict_with_its_margin(effect, sd, family):
    for n in (2, 3, 10):
        expected = float(detection.power(effect / sd, n, 0.05 / family, 0.004 / sd))
        share = said(n, effect, sd, 0.004, family)
        assert share == pytest.approx(expected, abs=0.0001 + 4 * math.sqrt(expected * (1 - expected) / 20_000))


def test_a_difference_up_to_the_margin_is_never_found_in_four_of_five_cases():
    assert detection.seeds_needed(0.004, 0.004, 1, margin=0.004) is None
    for n in (10, 100, 1000):
        assert float(detection.power(1.0, n, margin=1.0)) <= 0.5
        assert said(n, 0.004, 0.004, 0.004, trials=2000) < 0.55
    # a small noise detects what is just beyond the margin, and nothing within it
    least = detection.minimum_detectable(3, 0.0005, margin=0.004)
    assert 0.004 < least < 0.0045 and said(3, least, 0.0005, 0.004) == pytest.approx(0.8, abs=0.012)
    assert said(3, detection.minimum_detectable(3, 0.0005), 0.0005, 0.004) == 0


def test_the_seeds_needed_with_a_margin_are_the_fewest():
    for effect, family in ((0.0045, 1), (0.005, 1), (0.006, 1), (0.006, 18)):
        n = detection.seeds_needed(effect, 0.004, family, 0.004)
        shares = [said(k, effect, 0.004, 0.004, family) for k in (n - 1, n)]
        assert shares[0] < 0.812 and shares[1] > 0.788  # four standard errors of 0.0028
        powers = [float(detection.power(effect / 0.004, k, 0.05 / family, 1.0)) for k in (n - 1, n)]
        assert powers[0] < 0.8 <= powers[1]


@pytest.mark.slow
def test_the_seeds_that_are_named_have_the_power():
    draw, trials = np.random.default_rng(6), 20_000

    def shares(n, effect):
        deltas = draw.normal(effect, 0.01, (trials, n))
        mean, sd = deltas.mean(-1), deltas.std(-1, ddof=1)
        found = (st.t_test(mean, sd / math.sqrt(n), n - 1) < 0.05 / 18) & (mean > 0)
        return int(found.sum()), int((st.tost(n, mean, sd, 0.01) < 0.05).sum())

    n = detection.seeds_needed(0.02, 0.01, family=18)
    assert at_least(shares(n, 0.02)[0], trials, 0.8) and at_most(shares(n - 1, 0.02)[0], trials, 0.8)
    n = detection.seeds_for_equivalence(0.01, 0.01)
    assert at_least(shares(n, 0.0)[1], trials, 0.798) and at_most(shares(n - 1, 0.0)[1], trials, 0.8)


# -- the noise of a pilot


def noise_coverage(arms: int, n: int, sds: np.ndarray, trials: int) -> tuple[float, float]:
    """Share of pilots whose interval of the differences' mean variance holds the truth; and with independent ones."""
    blocks = np.random.default_rng(0).normal(size=(trials, arms + 1, n)) * sds[:, None]
    truth = sds[0] ** 2 + (sds[1:] ** 2).mean()
    variance = (blocks[:, 1:] - blocks[:, :1]).var(axis=-1, ddof=1).mean(axis=-1)
    covered = []
    for df in (np.array([effective_df(block) for block in blocks]), arms * (n - 1)):
        ratio = variance * df / truth  # chi-squared
        covered.append(float(np.mean((stats.chi2.ppf(0.025, df) <= ratio) & (ratio <= stats.chi2.ppf(0.975, df)))))
    return covered[0], covered[1]


def test_the_interval_of_a_pilots_noise_covers_although_the_baseline_is_shared():
    assert effective_df(np.random.default_rng(0).normal(size=(2, 4))) == 3  # one arm: an ordinary variance
    now, as_if_independent = noise_coverage(18, 3, np.ones(19), 1000)
    assert now >= 0.95 - 4 * 0.007 and as_if_independent < 0.7


@pytest.mark.slow
@pytest.mark.parametrize("n", [3, 5])
@pytest.mark.parametrize("arms", [1, 3, 5, 18])
def test_the_interval_of_a_pilots_noise_covers_95_percent(arms, n):
    uneven = np.exp(0.7 * np.random.default_rng(1).normal(size=arms + 1))
    quiet, loud = np.ones(arms + 1), np.ones(arms + 1)
    quiet[0], loud[0] = 1 / 3, 3.0
    for sds, least in ((np.ones(arms + 1), 0.95), (quiet, 0.95), (uneven, 0.95), (loud, 0.88)):
        assert noise_coverage(arms, n, sds, 2000)[0] >= least - 4 * math.sqrt(least * (1 - least) / 2000)
