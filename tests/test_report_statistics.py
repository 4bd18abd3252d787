"""The statistics against closed forms, scipy, statsmodels and published numbers; by simulation what they promise."""

import math
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats
from scipy.signal import lfilter
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_paired

from gptlab.report import detection, rankings, timing, verdicts
from gptlab.report import statistics as st
from gptlab.report.statistics import difference, paired
from gptlab.report.verdicts import Contrast, Runs, contrast, judge

DRAW = np.random.default_rng(1)
NAN = float("nan")


def seeds(values) -> dict[int, float]:
    return dict(enumerate(np.asarray(values, dtype=float).tolist()))


def judged(*deltas, better="lower", margin=0.004) -> list[verdicts.Judgement]:
    return list(judge({i: Contrast(d, better, margin) for i, d in enumerate(deltas)}).values())


def at_most(successes: int, trials: int, rate: float = 0.05) -> bool:
    """No more than a rate explains: the 99.9% quantile of the binomial."""
    return successes <= stats.binom.ppf(0.999, trials, rate)


def at_least(successes: int, trials: int, rate: float) -> bool:
    return successes >= stats.binom.ppf(0.001, trials, rate)


# -- differences


def test_a_paired_difference_is_the_textbooks():
    a, b = DRAW.normal(3, 0.1, (2, 5))
    reference, got = stats.ttest_rel(a, b), paired(seeds(a), seeds(b))
    assert (got.n, got.mean, got.sd) == (5, pytest.approx((a - b).mean()), pytest.approx((a - b).std(ddof=1)))
    assert got.p == pytest.approx(reference.pvalue)
    assert (got.low, got.high) == pytest.approx(tuple(reference.confidence_interval()))


def test_only_common_finite_seeds_are_paired():
    got = paired({0: 3.0, 1: 3.5, 2: NAN, 7: 9.0}, {0: 1.0, 1: 1.0, 2: 1.0, 3: math.inf})
    assert (got.n, got.mean) == (2, 2.25)


def test_differences_without_a_spread():
    none, one = paired({0: 1.0}, {1: 1.0}), paired({0: 3.0}, {0: 2.5})
    assert none.n == 0 and math.isnan(none.mean)
    assert (one.n, one.mean) == (1, 0.5) and math.isnan(one.sd) and math.isnan(one.low) and math.isnan(one.p)
    same = paired(seeds([3.1, 3.2, 3.3]), seeds([3.1, 3.2, 3.3]))
    assert same.identical and (same.mean, same.low, same.high, same.p) == (0, 0, 0, 1)
    # 3.1 - 3.0 and 3.2 - 3.1 differ by rounding only: p would be 1e-15
    shifted = paired(seeds([3.1, 3.2, 3.3]), seeds([3.0, 3.1, 3.2]))
    assert not shifted.identical and shifted.mean == pytest.approx(0.1) and math.isnan(shifted.p + shifted.low)
    rounded = paired(seeds([3.1, 3.2, 3.3]), seeds([3.1, 3.2 + 1e-7, 3.3 - 1e-7]))
    assert not rounded.identical and rounded.p == 1
    tiny = paired(seeds([3.1, 3.2, 3.3]), seeds([3.101, 3.2011, 3.3012]))  # a small spread, and a real one
    assert tiny.p < 0.01


def test_welch_is_the_textbooks():
    a, b = DRAW.normal(0, 1, 4), DRAW.normal(1, 3, 6)
    reference, got = stats.ttest_ind(a, b, equal_var=False), st.welch(seeds(a), seeds(b))
    assert (got.n, got.value, got.p) == (10, pytest.approx(a.mean() - b.mean()), pytest.approx(reference.pvalue))
    assert (got.low, got.high) == pytest.approx(tuple(reference.confidence_interval()))
    alone = st.welch({0: 2.0}, {0: 1.0, 1: 2.0})
    assert alone.value == 0.5 and math.isnan(alone.p)
    assert math.isnan(st.welch(seeds([1, 1]), seeds([2, 2])).p) and math.isnan(st.welch({}, {0: 1.0}).value)


def test_holm_is_the_textbooks_and_forgets_no_comparison():
    assert st.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    p = DRAW.uniform(size=18) ** 4
    assert st.holm(p) == pytest.approx(multipletests(p, method="holm")[1])
    assert st.holm([0.02, NAN, NAN]) == pytest.approx([0.06, 1, 1])
    assert st.holm([NAN]) == [1] and len(st.holm([])) == 0


def test_tost_is_the_textbooks():
    a, b = DRAW.normal(0, 1, 6), DRAW.normal(0.2, 1, 6)
    d = paired(seeds(a), seeds(b))
    for margin in (0.2, 1.0, 2.0):
        p = float(st.tost(d.n, d.mean, d.sd, margin))
        assert p == pytest.approx(ttost_paired(a, b, -margin, margin)[0])
        low, high = st.t_interval(d.mean, d.sd / math.sqrt(d.n), d.n - 1, level=0.90)
        assert (p < 0.05) == (-margin < low and high < margin)


def test_rates_of_diverged_runs_are_exact():
    assert (st.rate(6, 6).low, st.rate(6, 6).high) == pytest.approx((0.025 ** (1 / 6), 1))
    assert (st.rate(0, 3).low, st.rate(0, 3).high) == pytest.approx((0, 1 - 0.025 ** (1 / 3)))
    reference = stats.binomtest(2, 9).proportion_ci(method="exact")
    assert (st.rate(2, 9).low, st.rate(2, 9).high) == pytest.approx((reference.low, reference.high))
    assert math.isnan(st.rate(0, 0).value)


def test_rates_cover_at_every_rate():
    for n in (1, 3, 6, 18):
        intervals = [st.rate(k, n) for k in range(n + 1)]
        for p in np.linspace(0.01, 0.99, 99):
            covered = sum(stats.binom.pmf(k, n, p) for k in range(n + 1) if intervals[k].low <= p <= intervals[k].high)
            assert covered >= 0.95


def test_the_bootstrap_is_scipys():
    a = DRAW.exponential(size=300) ** 1.5  # skewed, so that BCa is not the percentile interval
    b = DRAW.exponential(size=300)
    reference = stats.bootstrap((a - b,), np.mean, n_resamples=20_000, method="BCa", batch=1000, rng=3)
    got = st.bootstrap(a, b, resamples=20_000)
    width = got.high - got.low
    assert got.value == pytest.approx((a - b).mean()) and got.n == 300
    assert got.low == pytest.approx(reference.confidence_interval.low, abs=0.03 * width)
    assert got.high == pytest.approx(reference.confidence_interval.high, abs=0.03 * width)
    assert st.bootstrap(a, b, seed=5) == st.bootstrap(a, b, seed=5) != st.bootstrap(a, b, seed=6)
    same = st.bootstrap(a, a)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    assert math.isnan(st.bootstrap([1.0], [2.0]).low) and math.isnan(st.bootstrap([], []).value)


# -- verdicts

CLEAR = difference(5, -0.020, 0.001)


def test_a_clear_difference_is_better_or_worse_by_the_metrics_direction():
    assert judged(CLEAR)[0].verdict == "better"
    assert judged(CLEAR, better="higher")[0].verdict == "worse"


def test_holm_decides_and_not_the_p_of_one_comparison():
    close = difference(3, 0.020, 0.006)  # p = 0.03
    assert judged(close)[0].verdict == "worse"
    other, *_ = judged(close, difference(3, 0.001, 0.006), difference(0, NAN, NAN))
    assert other.verdict == "not resolved" and other.p_holm == pytest.approx(3 * close.p)


def test_what_the_margin_calls_none_is_no_finding():
    small, unclear = judged(difference(5, 0.002, 0.0005), difference(5, 0.0035, 0.0009))
    assert (small.verdict, small.why) == ("equivalent", "differs, by less than the margin") and small.p_holm < 0.01
    assert (unclear.verdict, unclear.why) == ("not resolved", "differs, perhaps by less than the margin")
    assert unclear.more_seeds == detection.seeds_for_equivalence(0.004, 0.0009, 0.0035) - 5
    assert judged(difference(5, 0.002, 0.0005), margin=0.0)[0].verdict == "worse"  # no margin, no such reserve


def test_no_difference_comes_with_what_could_have_been_found():
    got, _ = judged(difference(3, 0.003, 0.010), CLEAR)
    assert got.verdict == "not resolved"
    assert got.mde == pytest.approx(0.0326, abs=1e-4) and got.mde_family > 1.3 * got.mde
    assert got.more_seeds == detection.seeds_for_equivalence(0.004, 0.010) - 3
    beyond, _ = judged(difference(3, 0.012, 0.010), CLEAR)
    assert beyond.more_seeds == detection.seeds_needed(0.012, 0.010, family=2) - 3
    unlucky, _ = judged(difference(12, 0.0025, 0.0040), CLEAR)  # has the seeds that are enough in 80% of all cases
    assert unlucky.more_seeds == 1


def test_identical_bits_are_equivalent_and_a_constant_shift_is_not_resolved():
    same, shift, one, none = judged(
        difference(3, 0.0, 0.0), difference(3, 0.001, 0.0), difference(1, 0.001, NAN), difference(0, NAN, NAN)
    )
    assert (same.verdict, same.p_equivalent, same.p_holm) == ("equivalent", 0, 1)
    assert (shift.verdict, shift.why) == ("not resolved", "every seed shows the same difference")
    assert (one.verdict, one.why) == ("not resolved", "one seed has no spread")
    assert (none.verdict, none.why) == ("not resolved", "no seed in common")
    assert all(math.isnan(j.mde) and j.more_seeds is None for j in (shift, one, none))
    rounding = judged(difference(3, 1e-9, 1e-10, rounding=1e-6), difference(3, 1e-9, 0.0, rounding=1e-6))
    assert [j.verdict for j in rounding] == ["equivalent"] * 2 and not rounding[0].contrast.difference.identical
    assert judged(difference(1, 0.0, NAN))[0].verdict == "not resolved"


def test_nothing_is_equivalent_without_a_stated_margin():
    deltas = difference(9, 1e-5, 1e-4), difference(3, 0.0, 0.0), difference(3, 1e-9, 1e-10, rounding=1e-6)
    for got in judged(*deltas, margin=0.0):
        assert (got.verdict, got.why) == ("not resolved", "no margin is stated, so nothing is called equivalent")
        assert math.isnan(got.p_equivalent)


def test_diverged_runs_are_counted_and_never_averaged():
    whole, lost = Runs(seeds([3.0, 3.1, 3.2])), Runs({0: 2.0}, diverged=2)
    part = Runs({0: 2.0, 1: 2.1001}, diverged=1)  # its survivors are far better, and it is no finding
    got = judge(
        {
            "lost": contrast(lost, whole, "lower", 0.004),
            "part": contrast(part, whole, "lower", 0.004),
            "other way": contrast(whole, part, "lower", 0.004),
            "both": contrast(part, lost, "lower", 0.004),
        }
    )
    assert [j.verdict for j in got.values()] == ["diverges", "diverges", "worse", "diverges"]  # over seeds 0 and 1
    one_left = contrast(whole, Runs({0: 2.0}, diverged=2), "lower", 0.004)
    assert judge({0: one_left})[0].verdict == "reference diverges" and math.isnan(one_left.p)
    assert (got["lost"].divergence.value, got["lost"].divergence.n) == (2 / 3, 3)
    assert got["other way"].divergence.value == 0
    assert got["part"].contrast.difference.p < 0.001 and got["part"].p_holm == 1
    assert math.isnan(got["part"].p_equivalent + got["part"].mde)


def test_published_deltas_are_not_significant_and_fp16_naive_diverges_6_of_6():
    """Precision regimes of a 124M GPT, 1,000 steps, 3 seeds: paired delta of the training loss against fp32."""
    published = {
        "amp_fp16": difference(3, +0.009, 0.038),
        "amp_bf16": difference(3, +0.012, 0.022),
        "bf16_pure": difference(3, +0.036, 0.020),
        "amp_bf16_8bit_adam": difference(3, +0.054, 0.028),
    }
    family = {name: Contrast(d, "lower", 0.004) for name, d in published.items()}
    family["fp16_naive"] = Contrast(difference(0, NAN, NAN), "lower", 0.004, None, (6, 6), (0, 3))
    got = judge(family)
    for name in published:
        assert published[name].p > 0.05 and got[name].verdict == "not resolved"
        assert got[name].mde == pytest.approx(3.26 * published[name].sd, rel=1e-2)
        assert got[name].more_seeds > 0
    naive = got["fp16_naive"]
    assert naive.verdict == "diverges" and naive.contrast.diverged == (6, 6)
    assert (naive.divergence.value, naive.divergence.n) == (1, 6) and naive.divergence.low == pytest.approx(
        0.54, abs=0.01
    )


# -- flips

UP, DOWN, SAME, NOISY = (difference(4, m, s) for m, s in ((0.05, 0.001), (-0.05, 0.001), (0.0, 0.001), (0.01, 0.02)))


def test_pairs_flip_only_if_both_tasks_hold():
    pairs = {
        "flips": (Contrast(UP, "lower", 0.004), Contrast(UP, "higher", 0.01)),
        "agrees": (Contrast(UP, "lower", 0.004), Contrast(DOWN, "higher", 0.01)),
        "equivalent": (Contrast(SAME, "lower", 0.004), Contrast(SAME, "higher", 0.01)),
        "one holds": (Contrast(UP, "lower", 0.004), Contrast(NOISY, "higher", 0.01)),
        "one is none": (Contrast(UP, "lower", 0.004), Contrast(UP, "higher", 0.06)),
        "one diverges": (Contrast(UP, "lower", 0.004, diverged=(1, 4)), Contrast(UP, "higher", 0.01)),
    }
    got = verdicts.flips(pairs)
    expected = ["flips", "agrees", "equivalent", "unresolved", "unresolved", "diverges"]
    assert [flip.verdict for flip in got.values()] == expected
    flip = got["flips"]
    assert (flip.first.verdict, flip.second.verdict) == ("worse", "better")
    # -0.05 in units of 0.004 and +0.05 in units of 0.01
    assert flip.interaction.value == pytest.approx(-12.5 - 5) and flip.p_holm < 0.001
    assert flip.first.p_holm >= 6 * UP.p  # the family holds both tasks of every pair
    assert math.isnan(got["one diverges"].interaction.p) and got["one diverges"].p_holm == 1


def test_the_interaction_is_welchs_test_of_differences_in_margins():
    a, b = DRAW.normal(0.01, 0.01, 4), DRAW.normal(-0.02, 0.05, 6)
    zero = lambda x: seeds(np.zeros(len(x)))  # noqa: E731
    first, second = (
        contrast(Runs(seeds(a)), Runs(zero(a)), "lower", 0.004),
        contrast(Runs(seeds(b)), Runs(zero(b)), "higher", 0.02),
    )
    got, reference = verdicts.flips({"": (first, second)})[""], stats.ttest_ind(-a / 0.004, b / 0.02, equal_var=False)
    assert got.interaction.p == pytest.approx(reference.pvalue) and got.p_holm == got.interaction.p
    low, high = reference.confidence_interval()
    assert (got.interaction.low, got.interaction.high) == pytest.approx((low, high))


def test_by_more_than_another_task_is_welchs_test_with_a_margin_of_one():
    rng = np.random.default_rng(5)
    for shift in (0.0, 30.0):
        a, b = rng.normal(0.0, 0.005, 4), rng.normal(0.0, 0.03, 6)
        zero = lambda x: seeds(np.zeros(len(x)))  # noqa: E731
        first = contrast(Runs(seeds(a + 0.004 * shift)), Runs(zero(a)), "lower", 0.004)
        second = contrast(Runs(seeds(b)), Runs(zero(b)), "higher", 0.02)
        got, x, y = verdicts.by_more(first, second), -(a + 0.004 * shift) / 0.004, b / 0.02
        reference = stats.ttest_ind(x, y, equal_var=False)
        assert got.difference.p == pytest.approx(reference.pvalue)
        above, below = (
            stats.ttest_ind(x + by, y, equal_var=False, alternative=side).pvalue
            for by, side in ((1, "greater"), (-1, "less"))
        )
        assert got.p_within() == pytest.approx(max(above, below))
        assert judge({0: got})[0].verdict == ("worse" if shift else "not resolved")
    near = contrast(Runs(seeds(rng.normal(0, 0.0001, 4))), Runs(zero(a)), "lower", 0.004)
    same = contrast(Runs(seeds(rng.normal(0, 0.0001, 6))), Runs(zero(b)), "higher", 0.02)
    assert judge({0: verdicts.by_more(near, same)})[0].verdict == "equivalent"
    lost = contrast(Runs({}, diverged=3), Runs(zero(a)), "lower", 0.004)
    assert judge({0: verdicts.by_more(lost, same)})[0].verdict == "diverges"
    unstated = contrast(Runs(seeds(a)), Runs(zero(a)), "lower", 0.0)
    assert judge({0: verdicts.by_more(unstated, same)})[0].verdict == "not resolved"


# -- throughput


def test_throughput_over_runs_is_a_t_interval_of_logs():
    medians = np.array([100.0, 110.0, 105.0])
    got = timing.throughput({s: [0.5 * m, m, m, 3 * m] for s, m in enumerate(medians)})
    log = np.log(medians)
    half = stats.t.ppf(0.975, 2) * log.std(ddof=1) / math.sqrt(3)
    assert (got.n, got.of, got.value) == (3, "runs", pytest.approx(math.exp(log.mean())))
    assert (got.low, got.high) == pytest.approx((math.exp(log.mean() - half), math.exp(log.mean() + half)))


def test_rates_and_times_say_the_same():
    times = DRAW.lognormal(0, 0.1, 205)
    rate, time = timing.throughput({0: 1 / times}), timing.throughput({0: times})
    assert (rate.value, rate.low, rate.high) == pytest.approx((1 / time.value, 1 / time.high, 1 / time.low))
    assert (rate.n, rate.of) == (205, "steps")


def test_a_slow_stretch_widens_the_interval_of_a_run():
    even = DRAW.lognormal(0, 0.01, 1000)
    drift = even * np.repeat([1.0, 1.2], 500)  # half of the run at another clock
    assert timing.throughput({0: drift}).high / timing.throughput({0: drift}).low > 1.1
    assert timing.throughput({0: even}).high / timing.throughput({0: even}).low < 1.01


def test_speedups_pair_by_seed():
    a, b = {0: [200.0], 1: [240.0], 5: [1.0]}, {0: [100.0], 1: [118.0], 9: [1.0]}
    log = np.log([2.0, 240 / 118])
    got = timing.speedup(a, b)
    half = stats.t.ppf(0.975, 1) * log.std(ddof=1) / math.sqrt(2)
    assert (got.n, got.of, got.value) == (2, "seeds", pytest.approx(math.exp(log.mean())))
    assert (got.low, got.high) == pytest.approx((math.exp(log.mean() - half), math.exp(log.mean() + half)))
    one = timing.speedup({0: 2 * DRAW.lognormal(0, 0.1, 500)}, {0: DRAW.lognormal(0, 0.1, 500)})
    assert one.of == "steps" and 1.9 < one.low < one.value < one.high < 2.1


def test_throughput_without_enough_samples_has_no_interval():
    few = timing.throughput({0: [1.0, 2.0, 3.0]})
    assert few.value == pytest.approx(2) and math.isnan(few.low)
    assert math.isnan(timing.throughput({}).value) and math.isnan(timing.throughput({0: [NAN, 0.0]}).value)
    lone = timing.speedup({0: [2.0]}, {0: [1.0]})
    assert lone.value == pytest.approx(2) and math.isnan(lone.low)
    assert math.isnan(timing.speedup({0: [2.0]}, {1: [1.0]}).value)


# -- many arms


def study(means, n=3, sd=1.0, draw=DRAW, names="abcdefghijklmnopqrstuvwxyz") -> dict[str, Runs]:
    """Arms with a noise of their own and a larger one that is the seed's."""
    values = np.array(means)[:, None] + 3 * draw.normal(size=(1, n)) + sd * draw.normal(size=(len(means), n))
    return {name: Runs(seeds(row)) for name, row in zip(names, values, strict=False)}


def test_tau_is_kendalls_and_has_the_published_p():
    for m, p in ((4, 0.083), (6, 0.0028)):
        got = rankings.ranking(study(np.arange(m) * 50.0), study(np.arange(m) * 50.0), ("lower", "lower"))
        assert (got.value, got.low, got.high, got.n) == (pytest.approx(1), 1, 1, m)
        assert got.p == pytest.approx(p, rel=0.02)
    order = DRAW.permutation(8)
    a, b = study(np.arange(8) * 50.0), study(order * 50.0)
    reference = stats.kendalltau(np.arange(8), order)
    assert rankings.ranking(a, b, ("lower", "lower")).value == pytest.approx(reference.statistic)
    turned = rankings.ranking(a, b, ("lower", "higher"))
    assert (turned.value, turned.low) == pytest.approx((-reference.statistic, turned.high))


def test_orders_that_are_not_known_leave_tau_open():
    noise = rankings.ranking(study(np.zeros(6)), study(np.zeros(6)), ("lower", "lower"))
    assert noise.low < -0.8 and noise.high > 0.8
    one = rankings.ranking(study(np.arange(5.0), n=1), study(np.arange(5.0), n=1), ("lower", "lower"))
    assert (one.low, one.high) == (-1, 1)
    lost = {"lost": Runs({}, diverged=1)}  # last in both: 5 of 15 orders are known
    one = rankings.ranking(study(np.arange(5.0), n=1) | lost, study(np.arange(5.0), n=1) | lost, ("lower", "lower"))
    assert (one.low, one.high) == pytest.approx((-5 / 15, 1))
    # two close arms among four that are far apart: 1 of 6 pairs is open
    close = rankings.ranking(study([0.0, 0.01, 100, 200]), study([0.0, 0.01, 100, 200]), ("lower", "lower"))
    assert (close.low, close.high) == pytest.approx((4 / 6, 1))


@pytest.mark.parametrize("n", [3, 6])
def test_the_order_of_two_arms_is_known_where_their_paired_t_says_so(n):
    clear, verdicts = study([0, 500], n), set()
    for gap in np.linspace(0, 8, 30):
        arms = study([0, gap], n)
        p = paired(arms["a"].values, arms["b"].values).p  # Tukey's range of two arms is the t test
        got = rankings.ranking(arms, clear, ("lower", "lower"))
        assert (got.low == got.high) == (p < 0.025)  # half of 5% for each study
        verdicts.add(bool(p < 0.025))
    assert verdicts == {True, False}


def test_an_arm_of_which_one_run_diverged_is_not_the_last_but_has_no_rank():
    """Nothing shows that it diverges more often, and what survived is no fair sample."""
    a, b = study([0, 50, 100, 25], sd=0.1), study([0, 50, 100, 25], sd=0.1)
    one = a | {"d": Runs({0: 25.0, 1: 25.0}, diverged=1)}
    assert rankings.diverging(one) == {"d": False}
    for first, second in ((one, b), (b, one)):
        got = rankings.ranking(first, second, ("lower", "lower"))
        assert (got.value, got.n) == (pytest.approx(1), 3)
    many = {name: Runs(seeds([float(i)] * 10)) for i, name in enumerate("abc")}
    many |= {"d": Runs(seeds([0.0] * 4), diverged=6)}  # 6 of 10, and none of 30
    assert rankings.diverging(many) == {"d": True}
    assert rankings.ranking(many, many, ("lower", "lower")).n == 4


def test_arms_without_a_completed_run_rank_last_and_tied():
    lost = {"x": Runs({}, diverged=3), "y": Runs({}, diverged=2)}
    a = study([0, 50, 100], sd=0.1) | lost
    got = rankings.ranking(a, study([0, 50, 100], sd=0.1) | lost, ("lower", "lower"))
    assert (got.value, got.low, got.high, got.n) == (pytest.approx(1), 1, 1, 5)
    healthy = study([0, 50, 100, 150, 200], sd=0.1, names="abcxy")
    reference = stats.kendalltau([1, 2, 3, 4, 4], [1, 2, 3, 4, 5]).statistic
    got = rankings.ranking(a, healthy, ("lower", "lower"))
    assert (got.value, got.low, got.high) == pytest.approx([reference] * 3)


def test_only_shared_arms_with_runs_are_ranked():
    a, b = study([0, 50, 100]), study([0, 50, 100]) | {"extra": Runs({0: 1.0})}
    b["c"] = Runs({0: 100.0})  # one run, where the others have three
    assert rankings.ranking(a, b, ("lower", "lower")).n == 2
    assert math.isnan(rankings.ranking(a, {}, ("lower", "lower")).value)


def speed_and_quality(speeds, losses, n=3, sd=1.0, draw=DRAW):
    fast = study(speeds, n, 0.1, draw)
    good = study(losses, n, sd, draw)
    return [({k: r.values for k, r in fast.items()}, "higher"), ({k: r.values for k, r in good.items()}, "lower")]


def test_frontier_membership_is_a_share_of_draws():
    got = rankings.frontier(speed_and_quality([100, 200, 150, 300], [0, 50, 100, 150]))
    assert got["a"] > 0.99 and got["b"] > 0.99 and got["c"] < 0.01 and got["d"] > 0.99
    axes = speed_and_quality([100, 200, 300, 400], [0, 0, 0, 0], n=5)
    assert rankings.frontier(axes) == rankings.frontier(axes)
    assert rankings.frontier(axes)["d"] == 1  # the fastest always is
    ratio = [({k: {s: x / axes[0][0]["a"][s] for s, x in v.items()} for k, v in axes[0][0].items()}, "higher"), axes[1]]
    assert rankings.frontier(ratio)["c"] == pytest.approx(
        rankings.frontier(axes)["c"], abs=0.05
    )  # normalised to the baseline
    two = speed_and_quality(
        [100, 200], [0, 0], n=40
    )  # the slower one is on it if it is better, and the seeds' noise is none
    better = paired(*(two[1][0][name] for name in "ab"))
    expected = stats.norm.cdf(-better.mean / (better.sd / math.sqrt(40)))
    assert rankings.frontier(two)["a"] == pytest.approx(expected, abs=0.03)
    axes[0][0]["b"] = {0: 1.0}
    assert set(rankings.frontier(axes)) == {"a", "c", "d"}
    memory = {"a": seeds([14.2] * 3), "b": seeds([14.2] * 3), "c": seeds([9.7] * 3)}  # a tie, and no noise
    got = rankings.frontier([(memory, "lower"), speed_and_quality([0] * 3, [0, 1e6, 2e6])[1]])
    assert got == {"a": 1, "b": 0, "c": 1}
    same = {name: {0: 1.0, 1: 1.0} for name in "ab"}
    assert rankings.frontier([(same, "higher"), (same, "lower")]) == {"a": 1, "b": 1}


def test_the_command_line_starts_without_scipy():
    code = (
        "import sys\nfrom gptlab.cli import main\nsys.argv = ['gptlab', '--help']\n"
        "try: main()\nexcept SystemExit: pass\nassert 'scipy' not in sys.modules and 'statsmodels' not in sys.modules\n"
        "import gptlab.report.statistics\nassert 'scipy.stats' not in sys.modules and 'statsmodels' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# -- what is promised, by simulation: seeded, with bounds that a right program passes 999 times in 1,000


@pytest.mark.slow
def test_a_family_of_18_under_the_null_errs_in_at_most_5_percent():
    draw = np.random.default_rng(2)
    arms = draw.normal(size=(20_000, 19, 3)) + 2 * draw.normal(
        size=(20_000, 1, 3)
    )  # one baseline for all, as in a study
    deltas = arms[:, 1:] - arms[:, :1]
    p = st.t_test(deltas.mean(-1), deltas.std(-1, ddof=1) / math.sqrt(3), 2)
    wrong = sum((st.holm(family) < 0.05).any() for family in p)
    assert at_most(wrong, len(p))
    assert (p.min(1) < 0.05).mean() > 0.3  # what would be claimed without Holm

    claims = 0
    for values in arms[:400]:
        runs = [Runs(seeds(row)) for row in values]
        verdicts = {
            j.verdict for j in judge({i: contrast(r, runs[0], "lower", 0.0) for i, r in enumerate(runs[1:])}).values()
        }
        claims += bool(verdicts & {"better", "worse"})
    assert at_most(claims, 400)


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3, 5])
def test_intervals_of_differences_cover_95_percent(n):
    draw, trials = np.random.default_rng(3), 100_000
    deltas = draw.normal(0.3, 2.0, (trials, n))
    low, high = st.t_interval(deltas.mean(-1), deltas.std(-1, ddof=1) / math.sqrt(n), n - 1)
    covered = int(((low <= 0.3) & (high >= 0.3)).sum())
    assert at_least(covered, trials, 0.95) and at_most(covered, trials, 0.95)

    covered = [0, 0]
    for _ in range(4000):
        a, b = seeds(draw.normal(0.3, 1.0, n)), seeds(draw.normal(0, 1.5, n + 1))
        for i, got in enumerate((paired(a, b), st.welch(a, b))):
            covered[i] += got.low <= 0.3 <= got.high
    assert at_least(covered[0], 4000, 0.95) and at_most(covered[0], 4000, 0.95)
    assert at_least(covered[1], 4000, 0.94)  # Satterthwaite's degrees of freedom are an approximation


@pytest.mark.slow
@pytest.mark.parametrize(("n", "sd"), [(3, 0.0001), (3, 0.002), (3, 0.01), (10, 0.004)])
def test_tost_errs_in_at_most_5_percent_at_the_margin(n, sd):
    trials = 200_000
    deltas = np.random.default_rng(4).normal(0.004, sd, (trials, n))
    passed = int((st.tost(n, deltas.mean(-1), deltas.std(-1, ddof=1), 0.004) < 0.05).sum())
    assert at_most(passed, trials)
    assert sd > 0.001 or at_least(passed, trials, 0.05)  # exactly 5% where the other side is far


@pytest.mark.slow
@pytest.mark.parametrize("family", [1, 18])
def test_twice_the_minimum_detectable_effect_is_found(family):
    draw, trials = np.random.default_rng(5), 300
    effect = 2 * detection.minimum_detectable(3, 1.0, family)
    expected = float(detection.power(effect, 3, 0.05 / family))
    assert expected > 0.99
    deltas = draw.normal(0, 1.0, (trials, family, 3))
    deltas[:, 0] += effect
    found = sum(
        judged(*(difference(3, x.mean(), x.std(ddof=1)) for x in family_of), better="higher", margin=0.5)[0].verdict
        == "better"
        for family_of in deltas
    )
    assert at_least(found, trials, expected)


@pytest.mark.slow
def test_planted_flips_are_found_and_others_are_not():
    draw, trials = np.random.default_rng(7), 200
    effect = 2 * detection.minimum_detectable(3, 1.0, family=12)
    #        flips            the same in both  one task only    none in either   equivalent
    truth = [(effect, -effect), (effect, effect), (effect, 0.0), (0.0, 0.0), (0.0, 0.0), (0.0, 0.0)]
    found = wrong = interactions = 0
    for _ in range(trials):
        pairs = {
            i: tuple(
                Contrast(difference(3, x.mean(), x.std(ddof=1)), "higher", 2.0)
                for x in (draw.normal(m, 1.0, 3) for m in means)
            )
            for i, means in enumerate(truth)
        }
        got = verdicts.flips(pairs)
        found += got[0].verdict == "flips"
        wrong += any(got[i].verdict == "flips" for i in range(1, 6))
        interactions += any(got[i].p_holm < 0.05 for i in (1, 3, 4, 5))
    assert at_least(found, trials, 0.98)  # both of two that are found with 99.6% each
    assert wrong == 0  # it takes two false claims of opposite signs, each at 5% / 12
    assert at_most(interactions, trials)


def autoregressive(draw, phi, shape):
    """Step times: 100 ms, 5% noise, neighbours correlated by phi."""
    noise = lfilter([1], [1, -phi], draw.normal(size=(shape[0], shape[1] + 200)), axis=1)[:, 200:]
    return 0.1 * np.exp(0.05 * math.sqrt(1 - phi**2) * noise)


@pytest.mark.slow
@pytest.mark.parametrize(("phi", "steps"), [(0.0, 100), (0.7, 200), (0.9, 1000)])
def test_throughput_intervals_cover_although_steps_are_correlated(phi, steps):
    draw, trials = np.random.default_rng(8), 2000
    a, b = autoregressive(draw, phi, (trials, steps)), autoregressive(draw, phi, (trials, steps))
    one = [timing.throughput({0: x}) for x in a]
    ratio = [timing.speedup({0: 2 * x}, {0: y}) for x, y in zip(a, b, strict=True)]
    assert at_least(sum(e.low <= 0.1 <= e.high for e in one), trials, 0.93)
    assert at_least(sum(e.low <= 2 <= e.high for e in ratio), trials, 0.93)
    naive = stats.t.ppf(0.975, steps - 1) * np.log(a).std(1) / math.sqrt(steps)  # as if steps were independent
    covered = np.abs(np.log(a).mean(1) - math.log(0.1)) <= naive
    assert phi == 0 or covered.mean() < 0.65


@pytest.mark.slow
def test_throughput_intervals_cover_over_seeds():
    draw, trials = np.random.default_rng(9), 4000
    machines = 100 * np.exp(0.02 * draw.normal(size=(trials, 3)))
    speeds = 1.5 * machines * np.exp(0.01 * draw.normal(size=(trials, 3)))
    one = [timing.throughput({s: [x] for s, x in enumerate(row)}) for row in machines]
    ratio = [
        timing.speedup(*({s: [x] for s, x in enumerate(row)} for row in rows))
        for rows in zip(speeds, machines, strict=True)
    ]
    for covered in (sum(e.low <= 100 <= e.high for e in one), sum(e.low <= 1.5 <= e.high for e in ratio)):
        assert at_least(covered, trials, 0.95) and at_most(covered, trials, 0.95)


@pytest.mark.slow
def test_the_bootstrap_over_documents_covers():
    draw, trials = np.random.default_rng(10), 600
    a, b = draw.exponential(size=(trials, 300)), draw.exponential(size=(trials, 300)) ** 1.5
    truth = 1 - math.gamma(2.5)
    covered = sum(
        e.low <= truth <= e.high for e in (st.bootstrap(x, y, resamples=1000) for x, y in zip(a, b, strict=True))
    )
    assert at_least(covered, trials, 0.93)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["alike", "mixed", "reversed"])
@pytest.mark.parametrize(("gap", "sd"), [(0.1, 1.0), (1.0, 1.0), (4.0, 1.0), (1.0, "one arm is noisy")])
def test_kendalls_interval_covers(order, gap, sd):
    draw, trials, m = np.random.default_rng(11), 150, 8
    noise = np.array([1.0] * (m - 1) + [10.0])[:, None] if isinstance(sd, str) else sd
    ranks = {"alike": np.arange(m), "mixed": np.array([3, 0, 1, 6, 2, 7, 5, 4]), "reversed": -np.arange(m)}[order]
    truth = stats.kendalltau(np.arange(m), ranks).statistic
    covered, width = 0, 0.0
    for _ in range(trials):
        got = rankings.ranking(*(study(gap * x, 3, noise, draw) for x in (np.arange(m), ranks)), ("lower", "lower"))
        covered += got.low - 1e-9 <= truth <= got.high + 1e-9
        width += (got.high - got.low) / trials
    assert at_least(covered, trials, 0.95)
    assert width < 0.5 or gap < 4  # and it is not open where orders are clear


@pytest.mark.slow
def test_frontiers_of_equal_studies_do_not_differ_and_planted_ones_do():
    draw, trials, m = np.random.default_rng(12), 150, 8
    speeds = 100.0 * np.arange(1, m + 1)

    def changed(a, b):
        return {k for k in a if max(a[k], b[k]) > 0.975 and min(a[k], b[k]) < 0.025}

    wrong = found = 0
    for trial in range(trials):
        losses = (trial % 3) * 0.3 * np.arange(m)  # ties, and arms that are on the frontier by little
        wrong += bool(
            changed(*(rankings.frontier(speed_and_quality(speeds, losses, 5, 1.0, draw), draws=1000) for _ in "ab"))
        )
        far = 20.0 * np.arange(m)
        other = far.copy()
        other[3] = far[4] + 10  # slower and worse than the next one
        pair = [rankings.frontier(speed_and_quality(speeds, x, 5, 1.0, draw), draws=1000) for x in (far, other)]
        found += changed(*pair) == {"d"}
    assert at_most(wrong, trials, 0.02)
    assert at_least(found, trials, 0.9)
