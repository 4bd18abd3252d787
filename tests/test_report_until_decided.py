"""p and intervals that hold at every look: against other formulas, and by simulation of studies with a look after every
seed."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import special, stats

from gptlab.report import looks, verdicts, words
from gptlab.report.grids import pairs_of, pairs_with_looks
from gptlab.report.looks import Looks, at_a_look, chance_of_any, overall, summaries

MOST = 12


def crossings(studies: int, most: int, seed: int = 0) -> np.ndarray:
    """The smallest one-sided p of all looks at equal arms, (studies,)."""
    n, mean, sd = summaries(np.random.default_rng(seed).standard_normal((studies, most)))
    return special.stdtr(n - 1, mean * np.sqrt(n) / sd).min(axis=1)


# -- the p of all looks


def test_one_look_is_the_t_test_and_two_are_a_known_integral() -> None:
    for p in (0.3, 0.05, 1e-3):
        assert chance_of_any(p, 2) == pytest.approx(p, rel=1e-3)
    # of three values, the direction is uniform on the sphere: a look at 2 and one at 3 are a lune and a cap
    p = 0.05
    x = stats.norm.ppf(np.arange(1, 400_001)[:, None] * np.sqrt([2, 3, 5]) % 1)  # a lattice, no random numbers
    two = special.stdtr(1, (x[:, 0] + x[:, 1]) / np.abs(x[:, 0] - x[:, 1])) < p
    three = stats.ttest_1samp(x, 0, axis=1, alternative="less").pvalue < p
    assert chance_of_any(p, 3) == pytest.approx((two | three).mean(), rel=0.01)


def test_the_chance_of_any_look_is_the_simulated_one() -> None:
    smallest = crossings(100_000, MOST)
    for p in (0.2, 0.03, 0.005, 0.001):
        chance = chance_of_any(p, MOST)
        assert abs((smallest < p).mean() - chance) < 4 * math.sqrt(chance / 1e5) + 0.01 * chance
        assert p < chance < (MOST - 1) * p  # between one look and Bonferroni over all looks


def test_the_table_agrees_with_the_integral_and_is_inverted() -> None:
    for p in (0.04, 0.007, 2.2e-4, 3e-6):
        assert overall(p, MOST) == pytest.approx(chance_of_any(p, MOST), rel=0.03)
        assert at_a_look(float(overall(p, MOST)), MOST) == pytest.approx(p)
    assert 2 * at_a_look(0.025, MOST) == pytest.approx(0.0088, rel=0.02)  # of each look, two-sided
    assert overall(1.0, MOST) == 1
    assert 0 < overall(0.0, MOST) < 1e-250
    p = np.geomspace(1e-12, 1, 200)
    assert (np.diff(overall(p, MOST)) > 0).all()


def test_summaries_are_those_of_every_prefix() -> None:
    x = 1e6 + np.random.default_rng(1).standard_normal((3, 7))
    n, mean, sd = summaries(x)
    for k in range(2, 8):
        assert n[k - 2] == k
        assert mean[:, k - 2] == pytest.approx(x[:, :k].mean(axis=1), rel=1e-15)
        assert sd[:, k - 2] == pytest.approx(x[:, :k].std(axis=1, ddof=1), rel=1e-8)


def test_interval_excludes_zero_exactly_where_p_says_so() -> None:
    generator = np.random.default_rng(2)
    for _ in range(200):
        one = Looks(generator.normal(0.9, 1, generator.integers(2, 13)), MOST)
        for level in (0.05, 0.3):
            low, high = one.interval(level)
            assert (one.p < level) == (not low < 0 < high)


def test_a_finding_is_not_taken_back_and_later_seeds_only_narrow_the_interval() -> None:
    x = np.array([1.0, 1.1, 0.9, 1.05, -3.0, 4.0, -3.0])
    p = [Looks(x[:k], MOST).p for k in range(2, 8)]
    assert p[2] < 0.05
    assert p == sorted(p, reverse=True)
    assert p[2:] == [p[2]] * 4
    ends = [Looks(x[:k], MOST).interval() for k in range(2, 8)]
    assert all(a[0] <= b[0] and b[1] <= a[1] for a, b in itertools.pairwise(ends))
    with_more = Looks(np.append(x, [5.0] * 20), 7)
    assert with_more.p == Looks(x, 7).p  # seeds beyond those that are paid for do not count


def test_two_looks_that_contradict_each_other_leave_the_last_interval() -> None:
    x = np.concatenate([1 + 0.001 * np.arange(5), np.full(7, -9.0) + 0.1 * np.arange(7)])
    low, high = Looks(x, MOST).interval()
    assert low < x.mean() < high


def test_looks_without_a_spread_are_left_out() -> None:
    zero = Looks(np.zeros(4), MOST)
    assert zero.p == 1
    assert np.isnan(zero.interval()).all()
    same_at_first = Looks(np.array([1.0, 1.0, 5.0, -3.0, 1.1]), MOST, rounding=1e-6)
    assert same_at_first.p > 0.5  # not infinitely sure after two seeds
    assert Looks(np.array([1.0]), MOST).p == 1


def test_p_within_is_two_one_sided_tests() -> None:
    x = np.random.default_rng(3).normal(0.2, 1, 8)
    one = Looks(x, MOST)
    n = np.arange(2, 9)
    each = [stats.ttest_1samp(x[:k], 2.5, alternative="less").pvalue for k in n]
    other = [stats.ttest_1samp(x[:k], -2.5, alternative="greater").pvalue for k in n]
    assert one.p_within(2.5) == pytest.approx(max(overall(min(each), MOST), overall(min(other), MOST)))


# -- verdicts


def contrast(x: np.ndarray, margin: float = 0.0, most: int = MOST) -> verdicts.Contrast:
    arm, reference = verdicts.Runs(dict(enumerate(x + 3))), verdicts.Runs(dict.fromkeys(range(len(x)), 3.0))
    return verdicts.with_looks(verdicts.contrast(arm, reference, "lower", margin), arm, reference, most)


def test_verdicts_use_the_looks() -> None:
    x = np.array([-1.0, -1.3, -0.6])
    ordinary = verdicts.contrast(
        verdicts.Runs(dict(enumerate(x))), verdicts.Runs(dict.fromkeys(range(3), 0.0)), "lower", 0
    )
    assert verdicts.judge({"a": ordinary})["a"].verdict == "better"
    (judged,) = verdicts.judge({"a": contrast(x)}).values()
    assert judged.verdict == "not resolved"  # p = 4.5% at a single look
    assert judged.p_holm == pytest.approx(2 * overall(ordinary.p / 2, MOST))
    assert judged.contrast.difference.low < ordinary.difference.low < ordinary.difference.high < 0
    assert judged.more_seeds is None
    assert np.isnan(judged.mde)
    text = words.evidence_text(judged, "final_val_loss", 1)
    assert text.endswith("; seeds may be added: looks are paid for")
    assert "would resolve" not in text
    (judged,) = verdicts.judge({"a": contrast(np.array([-1.0, -1.1, -0.9, -1.0, -1.02]))}).values()
    assert judged.verdict == "better"
    (judged,) = verdicts.judge({"a": contrast(np.array([-0.1, 0.1, 0.02, -0.05, 0.01]), margin=1.0)}).values()
    assert judged.verdict == "equivalent"
    runs = verdicts.Runs({0: 1.0, 1: 2.0, 2: 3.0})
    identical = verdicts.with_looks(verdicts.contrast(runs, runs, "lower", 1.0), runs, runs, MOST)
    assert verdicts.judge({"a": identical})["a"].verdict == "equivalent"


def test_the_best_of_a_grid_of_one_arm_is_that_arm() -> None:
    x = np.random.default_rng(4).normal(-0.9, 1, 9)
    a, b = [dict(enumerate(x))], [dict.fromkeys(range(9), 0.0)]
    pairs = pairs_with_looks(pairs_of(a, b, 1.0, (1, 1)), a, b, 1.0, MOST)
    one = Looks(x, MOST)
    assert (pairs.p_below(0.0), pairs.p_above(0.0)) == (one.p_below(), one.p_above())
    assert pairs.interval() == pytest.approx(one.interval())
    two = replace(pairs, sizes=(2, 1))  # a second arm is planned and has no runs yet
    assert two.p_below(0.0) == pytest.approx(2 * one.p_below())


def best_p(x: np.ndarray, most: int) -> tuple[float, tuple[float, float]]:
    """Two-sided p and interval of a grid (arms, seeds) against another of the same size."""
    half = len(x) // 2
    a, b = ([dict(enumerate(row)) for row in rows] for rows in (x[:half], x[half:]))
    pairs = pairs_with_looks(pairs_of(a, b, 1.0, (half, half)), a, b, 1.0, most)
    return 2 * min(pairs.p_below(0.0), pairs.p_above(0.0)), pairs.interval()


def test_interval_of_a_grid_excludes_zero_exactly_where_p_says_so() -> None:
    generator = np.random.default_rng(5)
    found = 0
    for _ in range(100):
        x = generator.normal(0, 1, (4, 8)) + np.array([-2.5, 0, 0, 0])[:, None]
        p, (low, high) = best_p(x, 8)
        assert (p < 0.05) == (not low < 0 < high)
        found += p < 0.05
    assert 5 < found < 95


# -- hopeless


def test_the_chance_to_decide_grows_with_the_effect_and_ends_with_the_seeds() -> None:
    x = np.array([-1.0, 1.2, 0.1, -0.4])
    x = x - x.mean()
    noise = x.std(ddof=1)
    chances = [Looks(x + shift * noise, MOST).chance_to_decide(0.0) for shift in (0, 0.5, 1.5)]
    assert chances[0] < chances[1] < chances[2]
    assert chances[2] > 0.8
    assert Looks(x, 4).chance_to_decide(0.0) == 0  # no seed is left
    assert Looks(x, MOST).chance_to_decide(3 * noise) > 0.9  # equivalence
    assert Looks(x[:1], MOST).chance_to_decide(0.0) == 1  # nothing is known yet
    assert Looks(x, MOST).chance_to_decide(0.0) == chances[0]  # the same at every call


def test_the_chance_to_decide_is_that_of_the_rules() -> None:
    """From one look before the end, the predictive t distribution gives it in closed form."""
    x = np.array([0.3, 1.5, 0.6, 1.4, -0.2])
    one, n = Looks(x, 6), 5
    assert one.p > 0.05
    reach = x.std(ddof=1) * math.sqrt(1 + 1 / n)
    new = x.mean() + reach * stats.t.ppf((np.arange(20_000) + 0.5) / 20_000, n - 1)
    decided = np.mean([Looks(np.append(x, value), 6).p < 0.05 for value in new[::40]])
    assert one.chance_to_decide(0.0) == pytest.approx(decided, abs=4 * math.sqrt(decided / looks.DRAWS))


# -- simulated studies


WORLDS = ("normal", "heavy tails", "bad seeds", "one arm x10", "baseline x10")


def world(name: str, generator: np.random.Generator, studies: int, arms: int) -> np.ndarray:
    """Differences of equal arms from one baseline, (studies, arms, MOST)."""
    shape = (studies, arms + 1, MOST)
    runs = generator.standard_t(3, shape) if name == "heavy tails" else generator.standard_normal(shape)
    if name == "bad seeds":
        runs += 20 * (generator.random(shape) < 0.05)
    runs[:, 1 if name == "one arm x10" else 0] *= 10 if name.endswith("x10") else 1
    return runs[:, 1:] - runs[:, :1]


def smallest_p(x: np.ndarray) -> np.ndarray:
    """Two-sided p of all looks up to each, (studies, arms, looks)."""
    n, mean, sd = summaries(x)
    one = special.stdtr(n - 1, -np.abs(mean) * np.sqrt(n) / sd)
    return np.minimum(1, 2 * overall(np.minimum.accumulate(one, axis=-1), x.shape[-1]))


def test_simulated_p_is_that_of_looks() -> None:
    x = np.random.default_rng(6).standard_normal((20, 1, MOST)) + 0.5
    ours = [Looks(row[0], MOST).p for row in x]
    assert np.all(smallest_p(x)[:, 0, -1] <= np.array(ours) + 1e-12)  # both sides' smallest |t|, of which one counts
    assert smallest_p(x)[:, 0, -1] == pytest.approx(ours)


@pytest.mark.parametrize("name", WORLDS)
def test_a_look_after_every_seed_keeps_the_error(name: str) -> None:
    studies = 4000
    for arms in (1, 3):
        p = smallest_p(world(name, np.random.default_rng(7), studies, arms))[..., -1]
        wrong = (p.min(axis=1) * arms < 0.05).mean()  # Holm's first step: a finding at any of the looks
        assert wrong < 0.05 + 3 * math.sqrt(0.05 * 0.95 / studies)
    if name == "normal":
        assert wrong > 0.03


@pytest.mark.slow
@pytest.mark.parametrize("arms", [1, 3, 18])
@pytest.mark.parametrize("name", WORLDS)
def test_false_findings(name: str, arms: int, capsys: pytest.CaptureFixture[str]) -> None:
    """The table of the documentation; `-s` prints it."""
    studies = 20_000 if arms < 18 else 6_000
    generator = np.random.default_rng(8)
    x = world(name, generator, studies, arms)
    wrong = (smallest_p(x)[..., -1].min(axis=1) * arms < 0.05).mean()
    assert wrong < 0.05 + 3 * math.sqrt(0.05 * 0.95 / studies)
    with capsys.disabled():
        print(f"\n{name}, {arms} comparisons, {studies:,} studies: false {wrong:.2%}")


def e_value(x: np.ndarray) -> np.ndarray:
    """Right-Haar t Bayes factor with a normal prior of variance 4 on the effect size, (..., looks)."""
    n, mean, sd = summaries(x)
    t2, spread = n * (mean / sd) ** 2, 1 + 4 * n
    log = n / 2 * (np.log1p(t2 / (n - 1)) - np.log1p(t2 / (n - 1) / spread)) - np.log(spread) / 2
    return np.exp(np.maximum.accumulate(log, axis=-1))


def test_the_e_value_is_the_ratio_of_marginal_likelihoods() -> None:
    """By integration over mean and sd: with a prior on the effect size against an effect of 0."""
    x = np.array([0.3, 1.1, 0.4, 0.9])
    log_sd, effect = np.linspace(-5, 5, 1501)[:, None], np.linspace(-14, 14, 1501)
    deviations = (x[:, None, None] / np.exp(log_sd) - effect) ** 2
    joint = np.exp(-deviations.sum(axis=0) / 2 - 4 * log_sd)
    prior = np.exp(-(effect**2) / 8)
    null = np.exp(-((x[:, None, None] / np.exp(log_sd)) ** 2).sum(axis=0) / 2 - 4 * log_sd).sum()
    ratio = (joint * prior).sum() / prior.sum() / null
    assert e_value(x)[-1] == pytest.approx(max(ratio, e_value(x[:3])[-1]), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("arms", [1, 3, 18])
def test_power_and_seeds_beside_those_of_the_e_value(arms: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Of one comparison at Holm's first step; effects in sds of the paired difference."""
    studies = 20_000
    for effect in (0, 1, 2, 4):
        x = np.random.default_rng(12).normal(effect, 1, (studies, MOST))
        power, seeds = [], []
        for found in (smallest_p(x[:, None])[:, 0] * arms < 0.05, e_value(x) > 20 * arms):
            power.append(float(found[:, -1].mean()))
            seeds.append(float(np.median(np.where(found.any(axis=1), 2 + found.argmax(axis=1), np.inf))))
        with capsys.disabled():
            print(f"\n{arms} comparisons, {effect} sd: looks {power[0]:.1%}, {seeds[0]:g} seeds; ", end="")
            print(f"e-value {power[1]:.1%}, {seeds[1]:g} seeds")
        error = 3 * math.sqrt(0.25 / studies)
        assert power[0] > power[1] - error
        assert seeds[0] <= seeds[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", WORLDS)
def test_equivalence_at_the_margin_is_rarely_said(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The truth is the margin: at any look, equivalence is false."""
    x = world(name, np.random.default_rng(9), 20_000, 1)[:, 0]
    for margin in (1.0, 3.0, 10.0):
        shifted = x - (x.mean() - margin if name == "bad seeds" else -margin)
        n, mean, sd = summaries(shifted)
        sides = [special.stdtr(n - 1, (sign * mean - margin) * np.sqrt(n) / sd).min(axis=1) for sign in (1, -1)]
        said = (np.maximum(*(overall(side, MOST) for side in sides)) < 0.05).mean()
        with capsys.disabled():
            print(f"\n{name}, margin {margin:g}: equivalent {said:.2%}")
        assert said < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 20_000)


@pytest.mark.slow
@pytest.mark.parametrize("name", WORLDS)
def test_the_best_of_equal_grids(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Two grids of three arms, with a look after every seed; their interval covers 0."""
    studies, generator = 400, np.random.default_rng(10)
    runs = world(name, generator, studies, 6)
    wrong = np.mean([best_p(x, MOST)[0] < 0.05 for x in runs])
    with capsys.disabled():
        print(f"\n{name}: {wrong:.2%}")
    assert wrong < 0.05 + 3 * math.sqrt(0.05 * 0.95 / studies)


@pytest.mark.slow
@pytest.mark.parametrize(("effect", "margin"), [(0.0, 0.0), (0.0, 0.5), (0.5, 0.5), (1.0, 0.0), (1.0, 0.5), (2.0, 1.0)])
def test_how_often_hopeless_is_wrong(effect: float, margin: float, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the comparisons that were ended as hopeless, few would have been decided by the last seed: at most the 10%
    that the rule states on average over truths, and about that for each of these."""
    studies = 500
    x = np.random.default_rng(11).normal(effect, 1, (studies, MOST))
    n, mean, sd = summaries(x)
    decided = looks._verdicts(n, mean, sd, margin, MOST, 0.05)
    ended = []
    for row, verdict in zip(x, decided, strict=True):
        for k in range(3, MOST):  # studies start with three seeds
            if verdict[: k - 1].any():
                break
            if Looks(row[:k], MOST).chance_to_decide(margin) < looks.HOPELESS:
                ended.append((k, bool(verdict[k - 1 :].any())))
                break
    wrong = sum(late for _, late in ended)
    seeds = np.median([k for k, _ in ended]) if ended else math.nan
    with capsys.disabled():
        print(
            f"\neffect {effect:g} sd, margin {margin:g} sd: decided {decided.any(axis=1).mean():.1%} without the rule; "
            f"hopeless {len(ended) / studies:.1%} (median {seeds:.0f} seeds), wrong in {wrong} of {len(ended)}"
        )
    assert wrong < 0.15 * len(ended) + 3 * math.sqrt(0.15 * len(ended) + 1)
