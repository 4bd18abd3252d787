"""Grids of arms, the default that a rule chooses, and losses at equal cost."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from gptlab.config import Metric, Study
from gptlab.report import verdicts
from gptlab.report.advice import default_of
from gptlab.report.analysis import analyse_study
from gptlab.report.grids import BestOf, Pairs, best_of, pairs_of
from gptlab.report.questions import answer_questions
from gptlab.report.runs import at_equal
from gptlab.report.studies import ReadRun, ReadStudy
from gptlab.report.tables import print_report, write_csv

NOTHING = (np.array([]), np.array([]))


def read(
    values: dict[str, list[float]],
    ms: dict[str, float] | None = None,
    steps: dict[str, int] | None = None,
    diverged: tuple[tuple[str, int], ...] = (),
    **more: Any,
) -> ReadStudy:
    """A study read from nowhere: curves fall from 5 linearly to each run's loss; a step takes ms[arm]."""
    base = {
        "name": "made",
        "recipe": {"train": {"max_steps": 100}},
        "arms": {arm: {} for arm in values},
        "baseline": next(iter(values)),
        "metric": {"name": "final_val_loss", "margin": 0.01},
    }
    study = Study.model_validate({**base, **more})
    runs = {}
    for arm, row in values.items():
        for seed, value in enumerate(row):
            n = (steps or {}).get(arm, 100)
            result = {"status": "completed", "final_val_loss": value, "steps": n, "tokens": 10 * n}
            result |= {"time_per_iter_ms": (ms or {}).get(arm, 20.0), "tokens_per_second": 1000.0}
            if (arm, seed) in diverged:
                result = {"status": "diverged", "steps": 7, "failed_at_step": 7}
            at = np.linspace(0, n, 11)
            curves = {"loss": NOTHING, "val_loss": (at, 5 + (value - 5) * at / n), "tokens_per_second": NOTHING}
            path, status = Path(f"{arm}_seed{seed}"), str(result["status"])
            runs[arm, seed] = ReadRun(arm, seed, path, status, result, curves, {})
    return ReadStudy(study, Path("results/made"), runs, [])


# -- the best of a grid


def grids(values: dict[str, list[float]], better: str = "lower", **more: Any) -> BestOf:
    metric = Metric.model_validate({"name": "final_val_loss", "better": better, "margin": 0.01})
    return best_of(read(values, **more), ("a_*", "b_*"), metric)


def test_the_best_of_grids_is_the_intersection_union_of_paired_t_tests() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.normal(3, 0.1, (3, 4)), rng.normal(3.1, 0.1, (2, 4))
        values = {f"a_{i}": row.tolist() for i, row in enumerate(a)}
        values |= {f"b_{i}": row.tolist() for i, row in enumerate(b)}
        got = grids(values)
        below, above, within = (
            np.array([[stats.ttest_rel(x, y + by, alternative=side).pvalue for y in b] for x in a])
            for side, by in (("less", 0.0), ("greater", 0.0), ("less", 0.01))
        )
        better, worse = 3 * below.max(1).min(), 2 * above.max(0).min()
        d = got.difference
        assert d.p == pytest.approx(min(1, 2 * min(better, worse)))
        assert got.chosen == (f"a_{a.mean(1).argmin()}", f"b_{b.mean(1).argmin()}")
        assert d.mean == pytest.approx(a.mean(1).min() - b.mean(1).min())
        assert d.low < d.mean < d.high and (d.p < 0.05) == (d.low > 0 or d.high < 0)  # the interval agrees
        assert got.pairs and got.pairs.p_below(0.01) == pytest.approx(min(1, 3 * within.max(1).min()))
        turned = grids({arm: [-v for v in row] for arm, row in values.items()}, "higher").difference
        assert (turned.low, turned.high, turned.p) == pytest.approx((-d.high, -d.low, d.p))
    alone, reference = grids({"a_1": a[0].tolist(), "b_1": b[0].tolist()}).difference, stats.ttest_rel(a[0], b[0])
    assert alone.p == pytest.approx(reference.pvalue)
    assert (alone.low, alone.high) == pytest.approx(tuple(reference.confidence_interval()))


def test_a_diverged_arm_of_a_grid_is_never_the_best_and_one_seed_decides_nothing() -> None:
    values = {"a_1": [1.0, 1.01, 1.0], "a_2": [2.0, 2.1, 2.2], "b_1": [4.0, 4.0, 4.1]}
    got = grids(values, diverged=(("a_1", 0),))
    assert got.chosen == ("a_2", "b_1") and got.left_out == ["a_1 (1 of 3 runs diverged)"] and got.diverged == (0, 3)
    assert got.pairs and got.pairs.sizes == (2, 1)  # the choice is paid for even so
    every = grids(values, diverged=(("a_1", 0), ("a_2", 1)))
    assert every.any_diverged and every.diverged == (2, 6) and verdicts.judge({0: every})[0].verdict == "diverges"
    one = verdicts.judge({0: grids({"a_1": [1.0], "a_2": [2.0], "b_1": [4.0]})})[0]
    assert (one.verdict, one.why) == ("not resolved", "one seed has no spread")
    none = verdicts.judge({0: grids({"a_1": [], "a_2": [2.0], "b_1": []})})[0]
    assert (none.verdict, none.why) == ("not run", "")
    lost = verdicts.judge({0: grids({"a_1": [math.nan], "b_1": [1.0]})})[0]  # run, and without a value
    assert (lost.verdict, lost.why) == ("not resolved", "no seed in common")


def test_identical_grids_are_equivalent_and_a_constant_shift_shows_nothing() -> None:
    grid = {"a_1": [3.0, 3.1, 3.2], "a_2": [3.3, 3.5, 3.6], "b_1": [3.0, 3.1, 3.2]}
    assert verdicts.judge({0: grids(grid)})[0].verdict == "equivalent"
    shifted = grids({**grid, "b_1": [4.0, 4.1, 4.2]})  # rounding is the only spread of a_1 minus b_1
    assert math.isnan(shifted.difference.p) and verdicts.judge({0: shifted})[0].verdict == "not resolved"


def test_a_question_may_be_of_grids_and_names_the_chosen_settings() -> None:
    question = {"id": "Q", "claim": "b beats a", "contrast": ["b_*", "a_*"], "confirmed_if": "better"}
    grid = {"a_1": [3.0, 3.01, 3.02], "a_2": [3.5, 3.52, 3.5], "b_1": [2.501, 2.51, 2.519], "b_2": [2.9, 2.9, 2.91]}
    rates = {"a_1": 1e-3, "a_2": 2e-3, "b_1": 3e-3, "b_2": 2e-3, "b_3": 4e-3}
    arms = {arm: {"settings": {"optim": {"lr": rate}}} for arm, rate in rates.items()}
    made = read(grid, questions=[question], arms=arms)
    ((reply, advice),) = answer_questions(made.study.questions, {"made": made})
    assert reply["answer"] == "confirmed" and reply["evidence"] == ["b_1", "b_2", "b_3", "a_1", "a_2"]
    cost = "at 1.00 times the speed of a_1, memory unknown"
    assert advice["text"].endswith(f"use b_1 rather than a_1, for better validation loss, {cost}")
    edge = "the best of a_* is a_1, at the edge of its grid (optim.lr = 0.001 is the smallest)"
    assert f"; the best of b_* is b_1; {edge}; left out: b_3 (no completed run)" in reply["text"]
    with pytest.raises(ValueError, match=r"question Q: there is no arm 'c_\*'"):
        read(grid, questions=[{**question, "contrast": ["c_*", "a_*"]}])


def test_a_grids_speed_is_the_chosen_arms() -> None:
    question = {"id": "Q", "claim": "as good", "contrast": ["b_*", "a_*"], "confirmed_if": "equivalent"}
    rng = np.random.default_rng(0)
    values = {
        arm: [v + by + 1e-4 * rng.standard_normal() for v in BASE]
        for arm, by in (("a_1", 0.0), ("a_2", 0.1), ("b_1", 0.0), ("b_2", 0.02))
    }
    made = read(values, questions=[question])
    for (arm, _), run in made.runs.items():  # b_2 is fast, and not the one that was chosen
        run.result["tokens_per_second"] = (3000.0 if arm == "b_2" else 1000.0) * math.exp(0.01 * rng.standard_normal())
    ((reply, advice),) = answer_questions(made.study.questions, {"made": made})
    assert reply["answer"] == "confirmed"
    assert advice["text"].endswith("use b_1 or a_1; validation loss is equivalent, neither is significantly faster")


# sds of the arms of A, of one arm of A, and of one reference
WORLDS = {
    "equal": (1.0, 1.0, 1.0),
    "one arm": (1.0, 10.0, 1.0),
    "one reference": (1.0, 1.0, 10.0),
    "A": (3.0, 3.0, 1.0),
}


def grid_study(draw: np.random.Generator, sizes: tuple[int, int], n: int, world: str, gap: float) -> Pairs:
    """Grids with the same best mean. The other references are worse by `gap`."""
    rest, first, reference = WORLDS[world]
    arms, references = draw.normal(0, rest, (sizes[0], n)), draw.normal(0, 1.0, (sizes[1], n))
    arms[0] *= first / rest
    references[0] *= reference
    references[1:] += gap
    common = 3 * draw.normal(size=n)
    rows = [[dict(enumerate((row + common).tolist())) for row in side] for side in (arms, references)]
    return pairs_of(rows[0], rows[1], 1.0, sizes)


def false_claims(sizes: tuple[int, int], n: int, world: str, gap: float, trials: int) -> int:
    """Number of studies of equal grids that are told apart."""
    draw, found = np.random.default_rng(n), 0
    for _ in range(trials):
        pairs = grid_study(draw, sizes, n, world, gap)
        low, high = pairs.interval()
        claim = 2 * min(pairs.p_below(0.0), pairs.p_above(0.0)) < 0.05
        assert claim == (low > 0 or high < 0)
        found += claim
    return found


@pytest.mark.parametrize("world", WORLDS)
def test_equal_grids_are_told_apart_in_at_most_5_percent(world: str) -> None:
    assert false_claims((3, 3), 5, world, 0.0, 100) <= stats.binom.ppf(0.999, 100, 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("sizes", [(3, 3), (9, 3)])
def test_the_best_of_equal_grids_errs_in_at_most_5_percent(sizes: tuple[int, int], world: str) -> None:
    for n, gap in itertools.product((3, 5, 10), (0.0, 30.0)):  # flat grids, and one reference that is far ahead
        trials = 1000
        assert false_claims(sizes, n, world, gap, trials) <= stats.binom.ppf(0.999, trials, 0.05), (n, gap)


@pytest.mark.slow
def test_a_better_grid_is_found_with_five_seeds() -> None:
    draw, found, trials = np.random.default_rng(0), 0, 400
    for _ in range(trials):
        rows = draw.normal(size=(6, 5))
        rows[0] -= 4  # sds of a run
        sides = [[dict(enumerate(row.tolist())) for row in side] for side in (rows[:3], rows[3:])]
        found += 2 * pairs_of(sides[0], sides[1], 1.0, (3, 3)).p_below(0.0) < 0.05
    assert found >= stats.binom.ppf(0.001, trials, 0.82)  # 83.6% in 10,000


# -- the default


RULE = {"incumbent": "simple", "among": ["clever", "longer"], "time_of": "simple"}
BASE = [3.0, 3.01, 3.02, 3.03]


def default(clever: float, longer: float, ms: dict[str, float] | None = None) -> str:
    rng = np.random.default_rng(0)
    values = {
        name: [v + by + 1e-4 * rng.standard_normal() for v in BASE]
        for name, by in (("simple", 0.0), ("clever", clever), ("longer", longer))
    }
    return str(default_of(read(values, ms=ms, default=RULE))["text"])


def test_the_default_is_chosen_by_the_rule() -> None:
    assert "stays simple: none of clever, longer is shown to be better" in default(0.0, 0.05)
    assert " is clever, which is better than simple: -0.1 [" in default(-0.1, 0.0)
    assert " is longer, which is better than simple: -0.2 [" in default(-0.1, -0.2)
    assert " is clever, which is better than simple: -0.1 [" in default(-0.1, -0.2, {"longer": 24.2})
    slow = default(0.0, -0.2, {"longer": 24.2})
    assert slow.endswith("stays simple: the better arms take more time than simple: longer (1.21 times)")
    assert " is longer, " in default(0.0, -0.2, {"longer": 20.3})  # 1.5% more is the same time


def test_a_rule_names_arms_that_there_are() -> None:
    with pytest.raises(ValueError, match="default: there is no arm 'clever'"):
        read({"simple": BASE, "longer": BASE}, default=RULE)


# -- at equal cost


def test_losses_are_read_off_where_all_have_spent_as_much() -> None:
    made = read({"base": [3.0, 3.2], "slow": [2.0, 2.0], "long": [1.0, 1.0]}, {"slow": 40.0}, {"long": 200})
    by = {equal["what"]: equal for equal in at_equal(made)}
    assert [by[what]["budget"] for what in ("steps", "tokens", "seconds")] == [100, 1000, pytest.approx(2.0)]
    means = {what: [arm["quality"]["mean"] for arm in by[what]["arms"]] for what in by}
    assert means["steps"] == means["tokens"] == pytest.approx([3.1, 2.0, 3.0])
    assert means["seconds"] == pytest.approx([3.1, 3.5, 3.0])  # in two seconds the slow one does half of its steps
    difference = by["seconds"]["arms"][1]["difference"]
    assert difference["mean"] == pytest.approx(0.4) and difference["n"] == 2
    assert by["seconds"]["arms"][0]["difference"] is None


def test_equal_costs_are_not_told_again(tmp_path: Path) -> None:
    made = read({"base": [3.0, 3.2], "slow": [2.0, 2.0]}, {"slow": 40.0})
    assert [equal["what"] for equal in at_equal(made)] == ["seconds"]
    assert at_equal(read({"base": [3.0], "same": [2.0]})) == []
    assert at_equal(read({"base": [3.0, 3.0], "x": [2.0, 2.0]}, diverged=(("x", 0), ("x", 1)))) == []
    study = analyse_study(made)
    payload = {"studies": [study], "across": None, "warnings": []}
    assert any(file.name == "made-equal.csv" for file in write_csv(payload, tmp_path))
    rows = (tmp_path / "made-equal.csv").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 3 and rows[2].startswith("seconds,2.0,slow,2,3.5,0.0,")
    console = Console(record=True, width=140)
    print_report(payload, console)
    assert "validation loss at" in (text := console.export_text()) and "2 seconds" in text


def test_a_study_of_pruning_says_that_zeros_gain_nothing() -> None:
    made = read({"dense": [3.0, 3.1], "pruned": [3.2, 3.3]})
    assert analyse_study(made)["notes"] == []
    for seed in (0, 1):
        made.runs["pruned", seed].result["sparsity"] = 0.5
    study = analyse_study(made)
    assert "(pruned) multiply dense matrices" in study["notes"][0]
    console = Console(record=True, width=140)
    print_report({"studies": [study], "across": None, "warnings": []}, console)
    assert "neither faster nor smaller in memory" in " ".join(console.export_text().split())
