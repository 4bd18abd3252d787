"""Grids of arms, the default that a rule chooses, and losses at equal cost."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from gptlab.config import Study
from gptlab.report.analysis import analyse_study
from gptlab.report.estimates import contrast_of
from gptlab.report.questions import answer_questions, default_of
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


def test_the_best_of_a_grid_is_judged_on_seeds_that_did_not_choose_it() -> None:
    grid = {"a_1": [3.0, 3.0, 2.0], "a_2": [2.9, 3.1, 2.9], "b_1": [4.0, 4.0, 4.0]}
    found = read(grid).values("a_*", "final_val_loss")
    # without seed 0 a_1 has 5.0 and a_2 6.0; without seed 1 5.0 and 5.8; without seed 2 6.0 and 6.0, the first one
    assert found.values == {0: 3.0, 1: 3.0, 2: 2.0} and found.diverged == 0
    higher = read(grid).values("a_*", "final_val_loss", "higher")
    assert higher.values == {0: 2.9, 1: 3.1, 2: 2.0}


def test_a_grid_of_noise_has_no_winners_curse() -> None:
    rng = np.random.default_rng(0)
    chosen, naive = [], []
    for _ in range(400):
        arms = {f"a_{i}": (3 + 0.1 * rng.standard_normal(3)).tolist() for i in range(6)}
        chosen += list(read(arms).values("a_*", "final_val_loss").values.values())
        naive.append(min(np.mean(row) for row in arms.values()))
    assert abs(np.mean(chosen) - 3) < 0.012  # its standard error is 0.004
    assert np.mean(naive) < 2.95


def test_a_diverged_arm_of_a_grid_is_never_the_best_and_one_seed_chooses_nothing() -> None:
    grid = {"a_1": [1.0, 1.0, 1.0], "a_2": [2.0, 2.1, 2.2]}
    found = read(grid, diverged=(("a_1", 0),)).values("a_*", "final_val_loss")
    assert found.diverged == 1 and found.values == pytest.approx({0: math.nan, 1: 2.1, 2: 2.2}, nan_ok=True)
    every = tuple(("a_1", seed) for seed in range(3))
    assert read(grid, diverged=every).values("a_*", "final_val_loss").values == {0: 2.0, 1: 2.1, 2: 2.2}
    assert read({"a_1": [1.0], "a_2": [2.0]}).values("a_*", "final_val_loss").values == {}


def test_a_question_may_be_of_grids() -> None:
    question = {"id": "Q", "claim": "b beats a", "contrast": ["b_*", "a_*"], "confirmed_if": "better"}
    grid = {"a_1": [3.0, 3.01, 3.02], "a_2": [3.5, 3.5, 3.5], "b_1": [2.501, 2.51, 2.519], "b_2": [2.9, 2.9, 2.9]}
    made = read(grid, questions=[question])
    ((reply, advice),) = answer_questions(made.study.questions, {"made": made})
    assert reply["answer"] == "confirmed" and reply["evidence"] == ["b_1", "b_2", "a_1", "a_2"]
    assert advice["text"].endswith("use b_* rather than a_*, for better validation loss")
    assert contrast_of(made, "b_*", "a_*", made.study.metric, 0.01).difference.mean == pytest.approx(-0.5, abs=1e-3)
    with pytest.raises(ValueError, match=r"question Q: there is no arm 'c_\*'"):
        read(grid, questions=[{**question, "contrast": ["c_*", "a_*"]}])


# -- the default


RULE = {"incumbent": "simple", "among": ["clever", "longer"], "time_of": "simple"}
BASE = [3.0, 3.01, 3.02, 3.03]


def default(clever: float, longer: float, ms: dict[str, float] | None = None) -> str:
    rng = np.random.default_rng(0)
    values = {
        name: [v + by + 1e-4 * rng.standard_normal() for v in BASE]
        for name, by in (("simple", 0.0), ("clever", clever), ("longer", longer))
    }
    return str(default_of(read(values, ms=ms, default=RULE), 0.01)["text"])


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
