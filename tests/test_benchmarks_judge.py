"""benchmarks/judge.py: rules on arrays are those of reports, worlds are as described, a rule that errs is caught."""

import csv
import importlib
import itertools
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy import stats

from gptlab.report import divergence, grids, verdicts
from gptlab.report import statistics as st
from gptlab.report import targets as report_targets

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def on_path() -> Iterator[None]:
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def script(name: str) -> ModuleType:
    return importlib.import_module(name)


CODES = {"better": -1.0, "worse": 1.0, "equivalent": 0.0, "not resolved": math.nan}


def contrast(arm: np.ndarray, reference: np.ndarray, margin: float) -> verdicts.Contrast:
    runs = (verdicts.Runs(dict(enumerate(row.tolist()))) for row in (arm, reference))
    return verdicts.contrast(*runs, "lower", margin)


def coded(judged: dict[int, verdicts.Judgement]) -> list[float]:
    return [CODES[judgement.verdict] for judgement in judged.values()]


def studies(rng: np.random.Generator, count: int, arms: int, seeds: int) -> np.ndarray:
    """Losses with effects of all sizes, so that every verdict occurs."""
    x = rng.normal(3, 0.01, (count, arms, seeds)) + rng.normal(0, 0.05, (count, 1, seeds))
    return x + rng.choice([0, 0.01, -0.05, 0.1], (count, arms, 1))


# -- the rules on arrays are the rules of a report --------------------------------------------------------------------


@pytest.mark.parametrize(("seeds", "margin"), [(3, 0.0), (3, 0.03), (6, 0.015)])
def test_verdicts_on_arrays_are_the_verdicts_of_reports(seeds: int, margin: float) -> None:
    rules = script("judging.rules")
    x = studies(np.random.default_rng(seeds), 60, 5, seeds)
    x[0, 1] = x[0, 0] + 0.25  # the same difference in every seed
    got = rules.judged(x, rules.own_variance, margin)
    wanted = [coded(verdicts.judge({a: contrast(one[a], one[0], margin) for a in range(1, 5)})) for one in x]
    np.testing.assert_array_equal(got, wanted)
    assert len(np.unique(got[~np.isnan(got)])) == (3 if margin else 2)


def test_holm_on_arrays_is_holm() -> None:
    rules = script("judging.rules")
    p = np.random.default_rng(0).random((50, 7)) ** 3
    p[0, 0], p[1, 2:4] = math.nan, p[1, 3]
    np.testing.assert_allclose(rules.holm(p), [st.holm(row) for row in p])


def test_grids_on_arrays_are_the_grids_of_reports() -> None:
    rules = script("judging.rules")
    x = studies(np.random.default_rng(1), 80, 5, 4)
    wanted = []
    for one in x:
        rows = [dict(enumerate(row.tolist())) for row in one]
        pairs = grids.pairs_of(rows[2:], rows[:2], 1.0, (3, 2))
        i, j = pairs.chosen()
        delta = grids._judged_over(pairs, st.paired(rows[2:][i], rows[:2][j]), 1.0)
        judged = verdicts.judge({0: grids.BestOf(delta, "lower", 0.0, pairs=pairs)})
        wanted += np.nan_to_num(coded(judged)).tolist()
    got = rules.paired_grids(x, 2, rules.own_variance)
    assert got.tolist() == wanted and {*wanted} == {-1, 0, 1}


def test_the_replaced_rule_for_grids_chooses_on_the_other_seeds() -> None:
    rules = script("judging.rules")
    x = studies(np.random.default_rng(2), 30, 5, 4)
    for one, got in zip(x, rules.left_out_grids(x, 2), strict=True):
        deltas = []
        for seed in range(4):
            others = np.delete(one, seed, axis=1).mean(1)
            deltas.append(one[2 + others[2:].argmin(), seed] - one[others[:2].argmin(), seed])
        one_test = st.paired(dict(enumerate(deltas)), dict.fromkeys(range(4), 0.0))
        assert got == (np.sign(one_test.mean) if one_test.p < 0.05 else 0)


def test_flips_on_arrays_are_the_flips_of_reports() -> None:
    rules = script("judging.rules")
    rng = np.random.default_rng(3)
    tasks = [studies(rng, 60, 4, 5) for _ in range(2)]
    got = rules.flipped(tasks, rules.own_variance)
    pairs = [*itertools.combinations(range(4), 2)]
    for k, one in enumerate(zip(*tasks, strict=True)):
        both = {(a, b): tuple(contrast(task[a], task[b], 0.0) for task in one) for a, b in pairs}
        assert got[k].tolist() == [flip.verdict == "flips" for flip in verdicts.flips(both).values()]
    assert got.any() and not got.all()


def test_repeated_tests_stop_where_nothing_is_open() -> None:
    rules = script("judging.rules")
    x = studies(np.random.default_rng(4), 40, 3, 8)
    got = rules.repeated_tests(x[:, 1:] - x[:, :1], 0.02)
    for one, found in zip(x, got, strict=True):
        for n in range(3, 9):
            wanted = coded(verdicts.judge({a: contrast(one[a, :n], one[0, :n], 0.02) for a in (1, 2)}))
            if not np.isnan(wanted).any() or 1 in np.abs(wanted):
                break
        np.testing.assert_array_equal(found, wanted)


def test_looks_on_arrays_are_the_looks_of_reports() -> None:
    looking = script("judging.looking")
    x = studies(np.random.default_rng(5), 40, 3, 8)
    got = looking.every_look(x[:, 1:] - x[:, :1])
    for one, found in zip(x, got, strict=True):
        family = {}
        for arm in (1, 2):
            sides = [verdicts.Runs(dict(enumerate(row.tolist()))) for row in (one[arm], one[0])]
            family[arm] = verdicts.with_looks(verdicts.contrast(*sides, "lower", 0.0), *sides, 8)
        adjusted = st.holm([c.p for c in family.values()])
        for code, p, c in zip(found, adjusted, family.values(), strict=True):
            assert c.looks is not None
            wanted = (-1 if c.looks.p_below() < c.looks.p_above() else 1) if p < 0.05 else math.nan
            assert code == wanted or (math.isnan(code) and math.isnan(wanted))
    assert np.isnan(got).any() and (got == -1).any()


def test_effects_with_the_simpler_variances_are_those_of_least_squares() -> None:
    factorial = script("judging.factorial")
    contrasts = factorial.design(4, 1)
    x = np.random.default_rng(6).normal(size=(3, 16, 4)) + np.random.default_rng(7).normal(size=(3, 1, 4))
    own, pooled = factorial.own(x, contrasts), factorial.pooled(x, contrasts)
    for one, p_own, p_pooled in zip(x, own, pooled, strict=True):
        each = contrasts.levels @ one
        assert p_own == pytest.approx(stats.ttest_1samp(each, 0, axis=1).pvalue)
        mean, residuals = one.mean(1), one - one.mean(1, keepdims=True) - one.mean(0) + one.mean()
        se = np.sqrt((residuals**2).sum() / 45 / 4 * (contrasts.levels**2).sum(1))
        assert p_pooled == pytest.approx(2 * stats.t.sf(np.abs(contrasts.levels @ mean) / se, 45))
    side = (contrasts.levels[0] > 0).astype(int)
    drawn = factorial.by_setting(contrasts)(np.random.default_rng(8), (2000, 16, 3))
    correlation = np.corrcoef(drawn.transpose(1, 0, 2).reshape(16, -1))
    assert correlation == pytest.approx(0.5 * (side[:, None] == side) + 0.5 * np.eye(16), abs=0.06)


def test_targets_on_arrays_are_the_targets_of_reports() -> None:
    targets = script("judging.targets")
    x = np.random.default_rng(9).normal(size=(20, 4))
    assert targets.p_below(x) == pytest.approx([report_targets.one_sided(row.tolist(), 0.0)[0] for row in x])
    logs = np.array([-0.3, -0.2, -0.1, -0.2, -0.25])
    assert targets.misses(logs, math.inf) and not targets.misses(logs + 0.21, math.inf)


def test_arms_with_equal_counts_diverge_alike() -> None:
    diverging = script("judging.diverging")
    for lost in ((0, 3, 0, 0, 2, 0, 0, 0), (1, 0, 0, 0, 0, 0, 0, 0), (0,) * 8, (3, 3, 0, 0, 0, 0, 0, 0)):
        judged = divergence.more_often({f"{a}": (k, 3) for a, k in enumerate(lost)})
        assert diverging.which_diverge(lost, 3) == [judged[f"{a}"].shown for a in range(8)]
    noise, alike = 0.1 * np.random.default_rng(0).normal(size=(2, 6, 3)), np.ones((2, 6, 1))
    assert not diverging.differ(*noise, alike, 1.0)
    assert diverging.differ(*noise, alike, 2.0)  # one arm is twice as fast, in one of the tasks


# -- the worlds -------------------------------------------------------------------------------------------------------


def test_the_worlds_are_what_their_names_say() -> None:
    worlds = script("judging.worlds")
    shape, rng = (4000, 5, 4), np.random.default_rng(0)
    x = {name: draw(rng, shape) for name, draw in worlds.WORLDS.items()}
    assert all(drawn.shape == shape for drawn in x.values())
    runs = shape[0] * shape[2]
    near = 4 / math.sqrt(2 * runs)  # four standard errors of a normal sd of 1
    sds = {name: drawn.std((0, 2)) for name, drawn in x.items()}
    for name, wanted in (
        ("equal noise, seeds share nothing", [1, 1, 1, 1, 1]),
        ("one arm ten times as noisy", [1, 10, 1, 1, 1]),
        ("half of the arms three times as noisy", [1, 3, 1, 3, 1]),
        ("half of the arms ten times as noisy", [1, 10, 1, 10, 1]),
        ("the baseline ten times as noisy", [10, 1, 1, 1, 1]),
        ("the baseline three times as noisy", [3, 1, 1, 1, 1]),
        ("the baseline a tenth as noisy", [0.1, 1, 1, 1, 1]),
    ):
        assert sds[name] == pytest.approx(wanted, rel=near)
    assert sds["heavy tails, t with 3 df"] == pytest.approx([1] * 5, abs=0.2)  # its fourth moment is infinite
    assert np.quantile(np.abs(x["heavy tails, t with 3 df"]), 0.99) == pytest.approx(5.841 / math.sqrt(3), rel=0.05)
    shared = x["equal noise, seeds correlate by 0.9"]
    correlation = np.corrcoef(shared.transpose(1, 0, 2).reshape(5, -1))[np.triu_indices(5, 1)]
    assert correlation == pytest.approx([0.9] * 10, abs=4 * 0.19 / math.sqrt(runs))
    own = shared - shared.mean(1, keepdims=True)
    assert own.std() * math.sqrt(5 / 4) == pytest.approx(1, abs=near)
    loaded = x["seeds move arms differently"]  # loads from 0.5 to 1.5: of mean 1 and variance 1/12
    assert loaded.var() == pytest.approx(1 + 9 * (1 + 1 / 12), rel=0.05)
    assert (loaded - loaded.mean(1, keepdims=True)).var() * 5 / 4 == pytest.approx(1 + 9 / 12, rel=0.05)
    for sigma, name in ((0.5, "unequal noise, lognormal 0.5"), (1.0, "unequal noise, lognormal 1")):
        logs = np.log(np.abs(x[name]))  # log |z| of a normal z has a variance of pi^2 / 8 and a mean of -0.635
        assert logs.mean() == pytest.approx(-0.635, abs=0.05)
        within = logs.var(axis=2, ddof=1).mean()
        assert within == pytest.approx(math.pi**2 / 8, rel=0.05)
        assert logs.mean(2).var() - within / 4 == pytest.approx(sigma**2, rel=0.1)
    rate = 4 * math.sqrt(0.05 * 0.95 / runs)
    by_seed = np.abs(x["one bad seed in twenty"]).mean(1)  # of five values: 8.0 +- 2.7 in a bad seed, else 0.8 +- 0.3
    assert (by_seed > 2.5).mean() == pytest.approx(0.05, abs=rate + 0.002)
    for name, bad in (("all arms", [1, 1, 1, 1, 1]), ("one arm", [0, 1, 0, 0, 0]), ("the baseline", [1, 0, 0, 0, 0])):
        share = (x[f"one bad run in twenty, {name}"] > 10).mean((0, 2))
        assert share == pytest.approx(0.05 * np.array(bad), abs=rate)


# -- what the benchmark says ------------------------------------------------------------------------------------------


def play(monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    monkeypatch.setattr(sys, "argv", ["judge.py", *args])
    with pytest.raises(SystemExit) as ended:
        script("judge").main()
    return int(ended.value.code or 0)


def lines_of(text: str) -> list[list[str]]:
    return [line.strip("| \n").split(" | ") for line in text.splitlines() if line]


def test_every_rule_has_a_row_in_every_world(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge, worlds = script("judge"), script("judging.worlds")
    play(monkeypatch, "rules", "--draws", "20", "--json", str(tmp_path / "judge.json"))
    cells = json.loads((tmp_path / "judge.json").read_text(encoding="utf-8"))["cells"]
    names = {cell["rule"] for cell in cells}
    assert len(names) >= len(judge.RULES)
    for name in names - {"diverges", "time to a target"}:  # these have worlds of their own
        assert {cell["world"] for cell in cells if cell["rule"] == name} >= set(worlds.WORLDS)
    assert all(0 <= cell["error"] <= 1 for cell in cells)
    printed = capsys.readouterr().out
    tables = [[line for line in table.splitlines() if line] for table in printed.split("\n\n") if table.strip()]
    assert len(tables) == 1 + len(names)
    for table in tables:
        assert len({line.count("|") for line in table}) == 1 and set(table[1]) <= set("| -")


def test_a_rule_that_errs_is_caught(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rules = script("judging.rules")

    def known_variance(x: np.ndarray, arms: np.ndarray, references: np.ndarray) -> np.ndarray:
        mean, variance = rules.differences(x, arms, references)
        return st.t_test(mean, np.sqrt(variance / x.shape[-1]), 1e6)  # as if three seeds gave the sd exactly

    stated = rules.TESTS["own"][1]
    monkeypatch.setattr(rules, "TESTS", {**rules.TESTS, "known": (known_variance, stated)})
    assert play(monkeypatch, "rules", "--draws", "200", "--only", "baseline") == 1
    summary = lines_of(capsys.readouterr().out.partition("\n\n")[0])
    marked = {line[1] for line in summary if "!" in line[6]}
    assert marked == {"known"}


def test_four_standard_errors_above_the_stated_error_are_too_many() -> None:
    row = script("judging.rules").Row("rule", "variant", "world", "1", 3, 0.05, 0.05, 10_000)
    limit = 0.05 + 4 * math.sqrt(0.05 * 0.95 / 10_000)
    for error, holds in ((0.0, True), (limit - 0.001, True), (limit + 0.002, False)):
        assert type(row)(**{**vars(row), "error": error}).holds is holds
    assert type(row)(**{**vars(row), "stated": math.nan, "error": 0.9}).holds


# -- whole reports ----------------------------------------------------------------------------------------------------


def test_a_whole_report_says_what_was_planted(tmp_path: Path) -> None:
    reports, rules = script("judging.reports"), script("judging.rules")
    folder = reports.Folder(tmp_path / "planted", 3, 0.1)
    rng = np.random.default_rng(0)
    x, speeds = rng.standard_normal((9, 3)), reports.draw_speeds(rng, 3)
    report = folder.report(x, speeds)
    said = [CODES[arm["comparison"]["verdict"]] for arm in report["arms"][1:]]
    np.testing.assert_array_equal(said, rules.judged(x[None], rules.TESTS["shrunk"][0], 0.1)[0])
    x[reports.ARMS.index(reports.PLANTED)] -= 1000
    report = folder.report(x, speeds)
    assert all(reports.found_in(report).values())
    assert not any(reports.false_in(report, "one arm is better").values())
    false = reports.false_in(report, "nothing differs")
    assert false == dict.fromkeys(reports.PARTS, True)
    rows = reports.one_report("one arm is better", "one bad run in twenty, all arms", 2, (0,))
    assert [row.variant for row in rows] == [*reports.PARTS] and all(row.draws == 2 for row in rows)


def test_looks_at_reports_count_a_finding_of_any_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    reports = script("judging.reports")
    seen = []

    def false_in(report: dict, truth: str) -> dict[str, bool]:
        seen.append(len(report["seeds"]))
        return {"a verdict": len(report["seeds"]) == 3, "an answer": False, "a recommendation": True}

    monkeypatch.setattr(reports, "MOST_SEEDS", 4)
    monkeypatch.setattr(reports, "false_in", false_in)
    rows = reports.looks("nothing differs", reports.LOOKED[0], 2, (0,))
    assert seen == [3, 4, 3, 4]
    assert [row.error for row in rows] == [1.0, 0.0]


# -- real runs --------------------------------------------------------------------------------------------------------


def test_real_runs_are_compared_at_a_common_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    track3 = script("judging.track3")
    rng, rows = np.random.default_rng(0), []
    for name, loss, runs, last in (("a", 3.0, 4, 30), ("b", 3.0, 6, 20), ("c", 3.5, 8, 20)):
        for run, step in itertools.product(range(runs), range(10, last + 1, 10)):
            rows.append((name, run, step, loss + 10 / step + 2e-4 * rng.standard_normal(), 200.0))
    file = tmp_path / "runs.csv"
    with open(file, "w", encoding="utf-8", newline="") as out:
        csv.writer(out).writerows([("configuration", "run", "step", "val_loss", "step_avg_ms"), *rows])
    losses = track3.losses_of(file)
    assert list(losses) == ["step 20", "last step"]
    assert losses["step 20"]["a"] == pytest.approx([3.5] * 4, abs=1e-3)
    assert losses["last step"]["a"] == pytest.approx([3.333] * 4, abs=1e-3)
    assert track3.welch_all(losses["step 20"], 0.001).tolist() == [0.0, -1.0, -1.0]  # a and b, a and c, b and c
    assert play(monkeypatch, "track3", str(file), "--draws", "10") == 0
    table = lines_of(capsys.readouterr().out)
    at_3 = next(line for line in table if line[0] == "step 20" and line[2].startswith("3 ") and line[3] == "own")
    differ, equivalent, *wrong = (float(cell.strip("%")) for cell in at_3[4:9])
    assert differ == pytest.approx(66.7, abs=2) and 0 < equivalent <= 33.4 and not any(wrong)


def test_subsampled_studies_hold_each_run_once() -> None:
    track3 = script("judging.track3")
    runs = {"a": np.arange(4.0), "b": np.arange(10.0, 16.0)}
    x = track3.subsampled(np.random.default_rng(0), runs, 4)
    assert x.shape == (track3.CHUNK, 2, 4)
    assert (np.sort(x[:, 0], axis=1) == np.arange(4.0)).all()
    assert all(len({*row}) == 4 for row in x[:, 1].tolist()) and {*x[:, 1].ravel()} == {*runs["b"].tolist()}
    null = track3.residuals(np.random.default_rng(0), {"a": np.arange(8.0), "b": 100 + 5 * np.arange(8.0)}, 3)
    spread = np.arange(8.0).std(ddof=1)
    assert null.std((0, 2)) == pytest.approx([spread, 5 * spread], rel=0.1)
    assert null.mean((0, 2)) == pytest.approx([0, 0], abs=4 * 5 * spread / math.sqrt(3 * track3.CHUNK))
