"""Divergence: Fisher's exact test against the other arms, what it errs, and when runs diverge."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from gptlab.config import Study
from gptlab.report import divergence, verdicts
from gptlab.report.divergence import Divergence, fisher, more_often, times_of
from gptlab.report.questions import answer_questions
from gptlab.report.studies import ReadRun, ReadStudy


def test_the_test_is_fishers_one_sided() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        n, m = rng.integers(1, 8), rng.integers(1, 60)
        k, other = rng.integers(0, n + 1), rng.integers(0, m + 1)
        reference = stats.fisher_exact([[k, n - k], [other, m - other]], alternative="greater").pvalue
        assert fisher((int(k), int(n)), (int(other), int(m))) == pytest.approx(reference)
    assert fisher((3, 3), (0, 3)) == 0.05 == fisher((1, 1), (0, 19))  # exactly
    assert fisher((0, 0), (0, 0)) == fisher((0, 3), (3, 3)) == 1


def counts(*first: int, arms: int = 19, n: int = 3) -> dict[str, tuple[int, int]]:
    return {str(i): (first[i] if i < len(first) else 0, n) for i in range(arms)}


def test_two_of_three_are_shown_and_one_of_three_is_not() -> None:
    for lost, shown in ((3, True), (2, True), (1, False)):
        found = more_often(counts(lost))
        assert [one.shown for one in found.values()] == [shown] + [False] * 18
        assert found["0"].others == (0, 54) and found["0"].p == pytest.approx(fisher((lost, 3), (0, 54)))
        assert found["0"].p_holm == pytest.approx(19 * found["0"].p)
    assert more_often(counts(1))["0"].p == pytest.approx(3 / 57)
    # one that broke does not hide another: it is left out of the others once it is shown
    both = more_often(counts(3, 2))
    assert both["0"].shown and both["1"].shown and both["1"].others == (0, 51)
    assert 18 * fisher((2, 3), (3, 54)) > 0.05  # and would hide it
    # two arms, three seeds: the exact p of all against none is 5%, over two arms 10%
    assert not more_often(counts(3, arms=2))["0"].shown
    assert more_often(counts(4, arms=2, n=4))["0"].p_holm == pytest.approx(2 / 70)


def test_two_of_three_are_excluded_by_none_of_three() -> None:
    one = lambda k, n: Divergence(k, n, (0, 54), 1.0, 1.0, 1)  # noqa: E731
    assert one(0, 3).most == pytest.approx(1 - 0.05 ** (1 / 3)) and one(0, 3).excluded
    assert not one(0, 2).excluded and not one(1, 4).excluded and one(1, 5).excluded and not one(3, 3).excluded
    assert math.isclose(one(2, 9).most, stats.binomtest(2, 9, alternative="less").proportion_ci(method="exact").high)


def rejected(rates: list[float], n: int, trials: int) -> tuple[int, int, float]:
    """Studies that name an arm with the lowest rate, studies that ask of the last arm and confirm, and power."""
    draw, low, wrong, confirmed, right = np.random.default_rng(n), min(rates), 0, 0, 0
    lost = draw.binomial(n, rates, (trials, len(rates)))
    seen: dict[bytes, tuple[bool, int]] = {}  # most studies are alike
    for row in lost:
        if row.tobytes() not in seen:
            found = more_often({str(i): (int(k), n) for i, k in enumerate(row)})
            named = [rates[int(arm)] for arm, one in found.items() if one.shown]
            seen[row.tobytes()] = low in named, sum(rate > low for rate in named)
        wrong += seen[row.tobytes()][0]
        right += seen[row.tobytes()][1]
        asked = fisher((int(row[-1]), n), (int(row[:-1].sum()), n * (len(rates) - 1)))
        confirmed += asked <= 0.05
    return wrong, confirmed, right / max(1, trials * sum(rate > low for rate in rates))


@pytest.mark.parametrize("rate", [0.02, 0.2])
def test_arms_alike_are_named_in_at_most_5_percent_of_studies(rate: float) -> None:
    wrong, confirmed, _ = rejected([rate] * 19, 3, 1000)
    assert max(wrong, confirmed) <= stats.binom.ppf(0.999, 1000, 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3, 5, 10])
@pytest.mark.parametrize("bad", [[], [1.0], [0.7], [0.5, 0.5], [1.0, 0.7, 0.7, 0.5, 0.5]])
@pytest.mark.parametrize("rate", [0.01, 0.02, 0.05, 0.1, 0.3])
def test_no_arm_is_named_for_what_others_do(rate: float, bad: list[float], n: int) -> None:
    for arms in (3, 19):
        wrong, confirmed, _ = rejected([*bad, *[rate] * (arms - min(arms - 1, len(bad)))][:arms], n, 4000)
        assert max(wrong, confirmed) <= stats.binom.ppf(0.999, 4000, 0.05), arms


# -- a reference that lost a seed


def studies_that_err(n: int, arms: int = 18, trials: int = 3000) -> int:
    """Studies of equal arms with a false verdict, where the baseline diverges in three runs of ten, by chance."""
    draw, wrong = np.random.default_rng(n), 0
    for _ in range(trials):
        own, common = draw.normal(size=(arms + 1, n)), 2 * draw.normal(size=n)
        # arms keep all their runs: an arm that lost one is never compared
        lost = draw.random(n) < 0.3
        base = verdicts.Runs({k: v for k, v in enumerate((own[0] + common).tolist()) if not lost[k]}, int(lost.sum()))
        runs = [verdicts.Runs(dict(enumerate(row.tolist()))) for row in own[1:] + common]
        judged = verdicts.judge({i: verdicts.contrast(arm, base, "lower", 0.01) for i, arm in enumerate(runs)})
        wrong += any(one.verdict in ("better", "worse") for one in judged.values())
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("n", [3, 5, 8])
def test_a_baseline_that_breaks_by_chance_costs_no_error(n: int) -> None:
    assert studies_that_err(n) <= stats.binom.ppf(0.999, 3000, 0.05)


@pytest.mark.slow
def test_two_arms_that_break_alike_where_losses_are_high_are_not_told_apart() -> None:
    """The law of losses and of divergence is one; the surviving pairs are chosen alike on both sides."""
    draw, wrong, trials, found = np.random.default_rng(0), 0, 20_000, 0
    for _ in range(trials):
        x, y = draw.normal(size=(2, 5)) + draw.normal(size=5)
        if (x > 2).any():
            continue
        lost = y > 2
        runs = verdicts.Runs({k: v for k, v in enumerate(y.tolist()) if not lost[k]}, int(lost.sum()))
        arm = verdicts.Runs(dict(enumerate(x.tolist())))
        if lost.any():
            found += 1
            wrong += verdicts.judge({0: verdicts.contrast(arm, runs, "lower", 1e-6)})[0].verdict in ("better", "worse")
    assert found > 1000 and wrong <= stats.binom.ppf(0.999, found, 0.05)


# -- when


def read(steps: list[int | None], last: int, name: str) -> ReadStudy:
    """Runs of x that diverge at these steps, or end at the last step."""
    base: dict[str, Any] = {"name": name, "recipe": {"train": {"max_steps": last}}, "arms": {"x": {}, "base": {}}}
    question = {"id": "Q", "claim": "c", "contrast": ["x", "base"], "confirmed_if": "diverges"}
    study = Study.model_validate({**base, "baseline": "base", "questions": [question]})
    runs = {}
    for seed, step in enumerate(steps):
        for arm, at in (("x", step), ("base", None)):
            result: dict[str, Any] = {"status": "completed", "steps": last, "final_val_loss": 3.0 + 0.1 * seed}
            if at is not None:
                result = {"status": "diverged", "failed_at_step": at, "failure": "spike", "steps": at - 1}
            runs[arm, seed] = ReadRun(arm, seed, Path(arm), result["status"], result)
    return ReadStudy(study, Path(name), runs, [])


def test_times_are_compared_over_the_steps_that_both_studies_ran() -> None:
    late, early = read([6000, 7000, 8000], 10_000, "late"), read([100, 200, None], 5_000, "early")
    found = times_of(late, early, "x")
    assert found and found.horizon == 5000 and found.within == ((0, 3), (2, 3)) and found.earlier == 1
    # of the C(6, 3) orders, 4 put both failures on one side, and as many on the other
    assert found.p == pytest.approx(8 / 20) and found.least_p == 0.1
    five, none = read([1, 2, 3, 4, 5], 100, "a"), read([None] * 5, 100, "b")
    apart = times_of(five, none, "x")
    assert apart and apart.p == pytest.approx(2 / math.comb(10, 5)) and apart.earlier == 0
    without = times_of(five, read([7, 8, 9, 10, 11], 100, "b"), "x")
    ranks = stats.mannwhitneyu([1, 2, 3, 4, 5], [7, 8, 9, 10, 11], method="exact").pvalue
    assert without and without.p == pytest.approx(ranks)
    never = times_of(none, none, "x")
    assert never and never.p == 1 and times_of(none, read([], 100, "b"), "x") is None
    many = times_of(read([*range(1, 13)], 99, "a"), read([*range(50, 62)], 99, "b"), "x")
    assert many and many.p < 0.001  # 2.7 million orders: 9,999 are drawn


def test_a_question_says_when_and_how() -> None:
    made = read([300, 700, None, 500], 1000, "made")
    ((reply, _),) = answer_questions(made.study.questions, {"made": made})
    assert "at steps 300 to 700, median 500 (spike 3)" in reply["text"]
    assert reply["divergence"]["made"]["kinds"] == {"spike": 3} and reply["times"] is None
    one = read([300, None, None], 1000, "made")
    ((reply, advice),) = answer_questions(one.study.questions, {"made": one})
    assert "; at step 300 (spike 1)" in reply["text"] and reply["answer"] == "not resolved"
    assert advice["text"].startswith("no arm is recommended") and "1 of 3 runs of x diverged (spike)" in advice["text"]
    none = read([None] * 3, 1000, "made")
    ((reply, _),) = answer_questions(none.study.questions, {"made": none})
    assert reply["answer"] == "rejected"
    assert "0 of 3 runs of x diverged; fewer than two of three do: at most 63% (one-sided 95% limit)" in reply["text"]
    two = read([None] * 2, 1000, "made")
    ((reply, _),) = answer_questions(two.study.questions, {"made": two})
    assert reply["answer"] == "not resolved" and "up to 78% may" in reply["text"]
    assert divergence.of_arm(made, "*").tests == 2
