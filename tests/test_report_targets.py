"""Targets: a mean against a number, times to a loss with censored runs, and how often their intervals cover.

The coverage of the slow tests, as a table: `python tests/test_report_targets.py`.
"""

import csv
import io
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from planted_runs import planted, write_runs
from rich.console import Console
from scipy import stats

from gptlab.config import Study, load_comparison, load_study
from gptlab.errors import ConfigError
from gptlab.report import targets as tg
from gptlab.report.analysis import analyse
from gptlab.report.questions import answer_questions
from gptlab.report.studies import read_study_folder
from gptlab.report.tables import print_report, write_csv

MOST_3 = {"id": "T", "claim": "at most 3", "contrast": ["x"], "target": 3.0, "level": 0.01}


def study(seeds: int = 5, **more: object) -> Study:
    base = {"name": "made", "recipe": {"train": {"max_steps": 100}}, "arms": {"base": {}, "x": {}}, "baseline": "base"}
    return Study.model_validate(base | {"seeds": list(range(seeds)), "metric": {"margin": 0.01}} | more)


def answered(values: list[float], diverged: int = 0, **more: object) -> dict:
    questions = [MOST_3 | {key: more.pop(key) for key in ("level", "target") if key in more}]
    made = study(len(values) + diverged, questions=questions, **more)
    ended = {("x", len(values) + k): "diverged" for k in range(diverged)}
    read = planted(made, lambda arm, seed: values[seed] if arm == "x" and seed < len(values) else None, ended)
    ((answer, advice),) = answer_questions(read.study.questions, {"made": read})
    assert advice == {}
    return answer


# -- the mean against a number


@pytest.mark.parametrize("target", [2.9, 3.0, 3.05])
def test_the_test_is_the_one_sided_t(target: float) -> None:
    values = [3.01, 2.95, 3.04, 2.97]
    below, above = tg.one_sided(values, target)
    assert below == pytest.approx(stats.ttest_1samp(values, target, alternative="less").pvalue)
    assert above == pytest.approx(stats.ttest_1samp(values, target, alternative="greater").pvalue)


def test_a_mean_is_confirmed_rejected_or_left_open() -> None:
    good, bad = [2.98, 2.985, 2.979, 2.982], [3.02, 3.025, 3.019, 3.022]
    sure = answered(good)
    assert sure["answer"] == "confirmed" and sure["evidence"] == ["x"]
    p = stats.ttest_1samp(good, 3.0, alternative="less").pvalue
    assert sure["text"].startswith("x: mean validation loss 2.9815 [2.977")
    assert sure["text"].endswith(f"over 4 seeds; at most 3 with one-sided p = {p:.2g} (level 0.01)")
    assert answered(bad)["answer"] == "rejected" and "above 3 with one-sided p" in answered(bad)["text"]
    assert answered([2.98, 3.03, 2.97])["answer"] == "not resolved"
    assert answered(good[:2])["answer"] == "not resolved"  # p = 0.04: not at this level, but at 0.05
    assert answered(good[:2], level=0.05)["answer"] == "confirmed"
    high = {"metric": {"name": "accuracy", "better": "higher"}}
    assert answered(good, **high)["answer"] == "rejected" and answered(bad, **high)["answer"] == "confirmed"


def test_survivors_single_seeds_and_constant_values_show_nothing() -> None:
    good = [2.98, 2.985, 2.979, 2.982]
    lost = answered(good, diverged=1)
    assert lost["answer"] == "not resolved"
    assert lost["text"] == "1 of 5 runs of x diverged, so the mean of the others is no evidence"
    assert answered([2.0])["text"] == "x: mean validation loss 2 in 1 seed, without a spread to test against"
    assert answered([2.0, 2.0])["answer"] == "not resolved"
    assert answered([math.nan])["text"] == "x has no completed run with a final_val_loss"


def test_several_targets_are_one_family() -> None:
    values = [2.98, 2.99, 2.975]
    p = stats.ttest_1samp(values, 3.0, alternative="less").pvalue
    assert p < 0.05 < 2 * p
    asked = [MOST_3 | {"id": name, "level": 0.05} for name in "AB"]
    one, two = (planted(study(3, questions=asked[:n]), lambda arm, seed: values[seed]) for n in (1, 2))
    assert [tg.answer_targets(read)["A"]["answer"] for read in (one, two)] == ["confirmed", "not resolved"]
    assert "Holm over 2 targets" in tg.answer_targets(two)["A"]["text"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"contrast": ["x", "base"]}, "question T: contrast = ['x', 'base']: must name one arm, for its target"),
        ({"contrast": ["x*"]}, "question T: contrast = ['x*']: must name one arm"),
        ({"confirmed_if": "better"}, "question T: target and level say when it is confirmed"),
        ({"target": None}, "question T: level = 0.01: belongs with target"),
        ({"target": None, "level": None}, "question T: confirmed_if is missing"),
        ({"level": 0.5}, "questions.0.level = 0.5: must be less than 0.5"),
        ({"contrast": ["y"]}, "question T: there is no arm 'y'"),
    ],
)
def test_what_is_wrong_with_a_target_is_said_in_a_sentence(tmp_path: Path, change: dict, sentence: str) -> None:
    fields = {key: value for key, value in (MOST_3 | change).items() if value is not None}
    asks = "".join(f"{key} = {value!r}\n" for key, value in fields.items())
    text = f"recipe = 'shakespeare-char-cpu'\nbaseline = 'base'\n[arms.base]\n[arms.x]\n[[questions]]\n{asks}"
    (tmp_path / "mine.toml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        load_study(tmp_path / "mine.toml")
    assert str(error.value).startswith(f"study mine: {sentence}")


def test_a_comparison_has_no_targets(tmp_path: Path) -> None:
    asks = "".join(f"{key} = {value!r}\n" for key, value in MOST_3.items())
    (tmp_path / "both.toml").write_text(f"compare = ['a', 'b']\n[[questions]]\n{asks}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"comparison both: question T: target = 3.0: belongs in a study"):
        load_comparison(tmp_path / "both.toml")


# -- when a loss is reached


def test_a_crossing_is_read_between_the_first_evaluation_below_and_the_one_before() -> None:
    steps, losses = np.array([0.0, 100, 200, 300, 400]), np.array([6.0, 4.0, 3.0, 3.5, 2.0])
    assert tg.crossing(steps, losses, 3.25) == 175  # before it rises again
    assert tg.crossing(steps, losses, 3.0) == 200 and tg.crossing(steps, losses, 4.0) == 100
    assert tg.crossing(steps, losses, 7.0) == 0
    assert math.isnan(tg.crossing(steps, losses, 1.9)) and math.isnan(tg.crossing(steps[:0], losses[:0], 3.0))
    holes = np.array([6.0, np.nan, 3.0, np.inf, 2.0])
    assert tg.crossing(steps, holes, 4.5) == 100 and tg.crossing(steps, holes, 2.5) == 300


def test_all_runs_reach_it_gives_the_geometric_mean_with_a_t_interval_of_logs() -> None:
    at = [100.0, 120.0, 150.0]
    found = tg.time_to([tg.Reached(value, True) for value in at])
    logs = np.log(at)
    low, high = stats.t.interval(0.95, 2, logs.mean(), stats.sem(logs))
    assert found.of == "geometric mean" and found.value == pytest.approx(stats.gmean(at))
    assert (found.low, found.high) == (pytest.approx(math.exp(low)), pytest.approx(math.exp(high)))
    single = tg.time_to([tg.Reached(100.0, True)])
    assert single.value == pytest.approx(100) and math.isnan(single.low)
    assert math.isnan(tg.time_to([]).value) and math.isnan(tg.time_to([tg.Reached(0.0, True)] * 2).value)


def runs(reached: list[float], censored: list[float]) -> list[tg.Reached]:
    return [tg.Reached(at, True) for at in reached] + [tg.Reached(at, False) for at in censored]


def test_a_run_that_never_gets_there_is_censored_and_in_no_mean() -> None:
    two_of_three = tg.time_to(runs([100, 120], [200]))
    assert (two_of_three.of, two_of_three.value) == ("median", 120)
    assert math.isnan(two_of_three.low) and math.isnan(two_of_three.high)  # P(all above the median) = 1/8
    assert math.isnan(tg.time_to(runs([100], [200, 200])).value)  # the median is beyond 200
    early = tg.time_to(runs([100, 150], [120]))  # interrupted at 120: it may be below the median or above
    assert math.isnan(early.value)
    five_of_six = tg.time_to(runs([130, 110, 100, 120, 140], [200]))
    assert (five_of_six.value, five_of_six.low, five_of_six.high) == (125, 100, math.inf)
    none_of_six = tg.time_to(runs([], [200] * 6))
    assert math.isnan(none_of_six.value) and (none_of_six.low, none_of_six.high) == (200, math.inf)
    many = tg.time_to(runs([*range(100, 119)], [200]))  # 20 runs: the 6th smallest and the 6th largest
    assert (many.value, many.low, many.high) == (109.5, 105, 114)


@pytest.mark.parametrize("n", range(6, 40))
def test_the_medians_interval_is_the_tightest_that_covers_95_percent(n: int) -> None:
    found = tg.time_to(runs([float(k) for k in range(1, n)], [1e9]))
    below = stats.binom.cdf(found.low - 1, n, 0.5)  # P(the k-th smallest is above the median)
    assert 2 * below <= 0.05 < 2 * stats.binom.cdf(found.low, n, 0.5)
    assert found.high == (n + 1 - found.low if found.low > 1 else math.inf)


def test_ratios_are_paired_and_say_only_what_is_known() -> None:
    base, x = [100.0, 130, 110], [50.0, 60, 56]
    ours, theirs = ({seed: tg.Reached(at, True) for seed, at in enumerate(row)} for row in (x, base))
    found = tg.ratio_of(ours, theirs)
    logs = np.log(np.divide(base, x))
    assert found.value == pytest.approx(math.exp(logs.mean()))
    assert found.low == pytest.approx(math.exp(stats.t.interval(0.95, 2, logs.mean(), stats.sem(logs))[0]))
    row = {"value": found.value, "low": found.low, "high": found.high}
    assert (
        tg.ratio_text(row, "base")
        == f"; {found.value:.2f} ({found.low:.2f} to {found.high:.2f}) times fewer steps than base"
    )
    back = vars(tg.ratio_of(theirs, ours))
    assert tg.ratio_text(back, "x").endswith("times as many steps as x")
    assert tg.ratio_text(back, "x").startswith(f"; {found.value:.2f} (")
    part = {"value": 1.2, "low": 1.1, "high": math.inf}
    assert tg.ratio_text(part, "base") == "; 1.20 (1.10 or more) times fewer steps than base"
    slow = {"value": 0.8, "low": 0.5, "high": math.inf}
    assert tg.ratio_text(slow, "base") == "; 1.25 (2.00 or less) times as many steps as base"
    assert math.isnan(tg.ratio_of({0: ours[0]}, theirs).value)
    assert math.isnan(tg.ratio_of(ours | {1: tg.Reached(80, False)}, theirs).low)
    six = {seed: tg.Reached(50.0 + seed, True) for seed in range(6)}
    never = {seed: tg.Reached(100.0, False) for seed in range(6)}
    least = tg.ratio_of(six, never)
    assert math.isnan(least.value) and (least.low, least.high) == (pytest.approx(100 / 55), math.inf)
    assert tg.ratio_text(vars(least), "base") == "; at least 1.82 times fewer steps than base"


def test_a_report_says_how_many_runs_reach_a_target_and_when() -> None:
    steps = np.arange(0.0, 101, 20)

    def curve(arm: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
        start = {"base": 4.0, "x": 3.5}[arm] + 0.02 * seed
        kept = slice(0, 3) if (arm, seed) == ("base", 5) else slice(None)
        return steps[kept], (start - steps / 100)[kept]

    made = study(6, targets=[3.2, 2.0], questions=[MOST_3])
    read = planted(made, lambda arm, seed: 3.0 + 0.01 * seed, {("base", 5): "diverged"}, curve)
    found = analyse([read])["studies"][0]["targets"]
    assert [target["target"] for target in found] == [3.2, 3.0, 2.0]  # the question's too
    base, x = found[0]["arms"]
    assert (x["reached"], x["runs"], x["steps"]["of"]) == (6, 6, "geometric mean")
    at = [30.0, 32, 34, 36, 38, 40]
    assert [run["steps"] for run in x["each"]] == pytest.approx(at)
    assert x["tokens"]["value"] == pytest.approx(512 * stats.gmean(at))
    assert x["seconds"]["value"] == pytest.approx(0.02 * stats.gmean(at))
    assert (base["reached"], base["steps"]["of"], base["steps"]["high"]) == (5, "median", None)
    assert base["steps"]["low"] == 40  # followed for 40 steps only
    # the sixth run may be below the median of the others or above
    assert base["text"] == "base reaches 3.2 in 5 of 6 runs; the median is at least 40 steps"
    assert base["ratio"] is None and x["ratio"]["steps"]["value"] is None
    assert x["text"].startswith("x reaches 3.2 in 6 of 6 runs, after 35 steps (31 to 39); at least 1.0")
    assert found[2]["arms"][1]["text"] == (
        "x reaches 2 in 0 of 6 runs, followed for 100 steps; the median is at least 100 steps"
    )


def test_targets_stand_in_text_csv_and_study_file(tmp_path: Path) -> None:
    made = study(3, targets=[3.3])
    write_runs(tmp_path / "made", made, lambda arm, seed: {"base": 3.0, "x": 2.8}[arm] + 0.01 * seed)
    assert load_study(tmp_path / "made" / "study.toml").targets == [3.3]
    console = Console(file=io.StringIO(), width=120)
    payload = analyse([read_study_folder(tmp_path / "made")])
    print_report(payload, console)
    write_csv(payload, tmp_path)
    text = console.file.getvalue()
    assert "validation loss 3.3" in text and "3 of 3" in text and "71 [" in text  # 3.01 + 1 - 71 / 100
    rows = list(csv.DictReader(io.StringIO((tmp_path / "made-targets.csv").read_text(encoding="utf-8"))))
    base, x = payload["studies"][0]["targets"][0]["arms"]
    assert [float(row["steps (value)"]) for row in rows] == [base["steps"]["value"], x["steps"]["value"]]
    assert float(rows[1]["times fewer steps than base"]) == x["ratio"]["steps"]["value"] > 1.3
    assert rows[0]["times fewer steps than base"] == "" and rows[1]["reached"] == "3"


# -- how often intervals cover


def reports_of(n: int, reach: float, trials: int) -> dict[str, float]:
    """Curves with power-law decay that differ from run to run and are evaluated every 20 steps with noise, cut off
    where a share `reach` of them has reached the target. Truth: of 20,000 uncut curves.

    Returns:
        The share of intervals that cover, among all studies with an interval and among those whose runs all reach it;
        and the shares of studies with an interval and with all runs reaching it.
    """
    at, target = np.arange(0.0, 1501, 20), 3.28

    def times(rng: np.random.Generator, count: int) -> np.ndarray:
        speed, floor = np.exp(0.03 * rng.standard_normal((count, 1))), 0.003 * rng.standard_normal((count, 1))
        losses = 3.0 + floor + 5.0 / (1 + at * speed / 20) ** 0.75 + 0.002 * rng.standard_normal((count, len(at)))
        return np.array([tg.crossing(at, row, target) for row in losses])

    many = times(np.random.default_rng(0), 20_000)
    assert np.isfinite(many).all()
    end = np.inf if reach == 1 else np.quantile(many, reach)
    mean, median = np.exp(np.log(many).mean()), np.median(many)
    drawn = times(np.random.default_rng(1), trials * n).reshape(trials, n)
    covered, complete = [], []
    for row in drawn:
        found = tg.time_to([tg.Reached(min(step, end), step <= end) for step in row])
        if not math.isnan(found.low):
            truth = mean if found.of == "geometric mean" else median
            covered.append(found.low <= truth <= found.high)
            complete.append(found.of == "geometric mean")
    hit, whole = np.array(covered), np.array(complete)
    return {
        "covered": float(hit.mean()),
        "covered, all reach": float(hit[whole].mean()) if whole.any() else math.nan,
        "with an interval": len(hit) / trials,
        "all reach": float(whole.sum()) / trials,
        "wrong": float((~hit).sum()) / trials,
    }


@pytest.mark.slow
@pytest.mark.parametrize("n", [3, 5, 10])
def test_intervals_of_runs_that_all_reach_a_target_cover_95_percent(n: int) -> None:
    trials = 4000
    assert reports_of(n, 1.0, trials)["covered"] >= stats.binom.ppf(0.0005, trials, 0.95) / trials


@pytest.mark.slow
@pytest.mark.parametrize("reach", [0.3, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("n", [3, 5, 6, 10, 20])
def test_with_censored_runs_at_most_5_percent_of_studies_state_a_wrong_interval(n: int, reach: float) -> None:
    """No interval is no statement. Intervals of studies whose runs all happen to reach the target cover less."""
    trials = 4000
    assert reports_of(n, reach, trials)["wrong"] <= stats.binom.ppf(0.9995, trials, 0.05) / trials


def wrong_answers(draw: Callable[[np.random.Generator], np.ndarray], trials: int) -> tuple[float, float]:
    """How often a mean that equals the target is confirmed to be below it, and above it, at 1%."""
    rng = np.random.default_rng(0)
    ps = np.array([tg.one_sided(draw(rng).tolist(), 0.0) for _ in range(trials)])
    below, above = (ps < 0.01).mean(axis=0)
    return float(below), float(above)


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_a_mean_at_the_target_is_confirmed_and_rejected_in_1_percent_each(n: int) -> None:
    trials = 20_000
    low, high = stats.binom.ppf([0.0005, 0.9995], trials, 0.01) / trials
    for share in wrong_answers(lambda rng: rng.standard_normal(n), trials):
        assert low <= share <= high


if __name__ == "__main__":
    for n in (3, 5, 6, 10, 20):
        for reach in (0.3, 0.5, 0.8, 0.95, 1.0):
            found = {name: f"{100 * share:.1f}%" for name, share in reports_of(n, reach, 4000).items()}
            print(f"{n} | {reach:g} | " + " | ".join(found.values()))
