"""Judging runs of anybody's logs: values, statuses, baselines and pages, and the command line."""

import csv
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsers import Browser, needs_chromium

import gptlab
from gptlab.cli.main import main
from gptlab.errors import UserError
from gptlab.logs.read import Logs
from gptlab.logs.run import LogRun
from gptlab.report.analysis import analyse
from gptlab.report.as_json import as_json
from gptlab.report.judging import Asked, judge_logs, name_of
from gptlab.report.page import render_page
from gptlab.report.studies import ReadStudy

STEPS = np.arange(0, 1001, 100.0)


def log(arm: str, seed: int, end: float, steps: np.ndarray = STEPS, **more: Any) -> LogRun:
    """A run whose loss falls to `end` at step 1,000."""
    losses = end + 2 * (1 - steps / 1000)
    return LogRun(Path(f"{arm}-{seed}.jsonl"), "jsonl", {"val_loss": (steps, losses)}, arm, seed, **more)


def judged(runs: Iterable[LogRun], paired: bool = True, **asked: Any) -> ReadStudy:
    logs = Logs(list(runs), [], "val_loss", "lower", paired)
    return judge_logs(logs, Asked(**asked), "judged-made", ["made.csv"], "gptlab judge made.csv")


def noisy(arm: str, end: float, seeds: int, seed: int = 0, sd: float = 0.01) -> list[LogRun]:
    generator = np.random.default_rng(seed)
    return [log(arm, k, end + sd * generator.normal()) for k in range(seeds)]


def values(read: ReadStudy) -> dict[str, float]:
    return {f"{arm} {seed}": round(run.value("val_loss"), 6) for (arm, seed), run in read.runs.items()}


# -- the value of a run


def test_a_run_is_judged_at_its_last_a_common_its_best_or_any_point() -> None:
    dip = log("b", 0, 3.0, STEPS[:-1])
    dip.curves["val_loss"][1][4] = 2.5
    both = [log("a", 0, 3.0), dip]
    assert values(judged(both)) == {"a 0": 3.0, "b 0": 3.2}
    assert values(judged(both, at="common")) == {"a 0": 3.2, "b 0": 3.2}
    assert values(judged(both, at="best")) == {"a 0": 3.0, "b 0": 2.5}
    assert values(judged(both, at="250")) == {"a 0": 4.5, "b 0": 4.5}
    late = values(judged(both, at="950"))
    assert late["a 0"] == 3.1 and math.isnan(late["b 0"])  # nothing is read beyond the end of a curve
    higher = judge_logs(Logs(both, [], "val_loss", "higher", True), Asked(at="best"), "x", ["x"], "x")
    assert values(higher) == {"a 0": 5.0, "b 0": 5.0}
    assert any(
        "the best point of a run is chosen by val_loss itself" in text for text in judged(both, at="best").warnings
    )


def test_a_table_without_steps_has_the_values_themselves() -> None:
    runs = [
        LogRun(Path("t.csv"), "csv", {}, arm, seed, result={"val_loss": 3.0 + seed}) for arm in "ab" for seed in (0, 1)
    ]
    assert values(judged(runs)) == {"a 0": 3.0, "a 1": 4.0, "b 0": 3.0, "b 1": 4.0}
    assert len(analyse([judged(runs)])["studies"][0]["arms"]) == 2
    with pytest.raises(UserError, match="--at common: no run has a curve of val_loss to read a step from"):
        judged(runs, at="common")


def test_runs_that_diverged_or_ended_early_are_told_and_not_averaged() -> None:
    nan = log("x", 1, 3.0)
    nan.curves["val_loss"][1][8:] = np.nan
    said = log("x", 2, 3.0, status="diverged")
    short, crashed = log("y", 3, 3.0, STEPS[:5]), log("y", 2, 3.0, status="failed")
    runs = [*noisy("base", 3.0, 4), *noisy("x", 3.0, 4), *noisy("y", 3.0, 4)]
    runs = [run for run in runs if (run.arm, run.seed) not in {("x", 1), ("x", 2), ("y", 3), ("y", 2)}]
    read = judged([*runs, nan, said, short, crashed])
    statuses = {f"{arm} {seed}": run.status for (arm, seed), run in read.runs.items() if run.status != "completed"}
    assert statuses == {"x 1": "diverged", "x 2": "diverged", "y 3": "unfinished", "y 2": "failed"}
    assert read.runs["x", 1].result["failed_at_step"] == 800
    assert any(
        "2 runs not used: y seed 3 (it ended at step 400, the arm's median is 1,000)" in w for w in read.warnings
    )
    (study,) = analyse([read])["studies"]
    arms = {arm["name"]: arm for arm in study["arms"]}
    assert arms["x"]["comparison"]["verdict"] == "diverges" and arms["y"]["comparison"]["n"] == 2
    assert {(f["arm"], f["seed"], f["status"]) for f in study["failures"]} >= {
        ("x", 1, "diverged"),
        ("y", 3, "unfinished"),
    }
    # a step that the curve reaches is as good as in a whole run
    assert judged([*runs, nan, said, short, crashed], at="300").runs["y", 3].status == "completed"


def test_a_table_with_a_value_that_is_not_finite_has_a_diverged_run() -> None:
    runs = [LogRun(Path("t.csv"), "csv", {}, "a", k, result={"val_loss": (3.0, 3.1, math.nan)[k]}) for k in range(3)]
    read = judged(runs)
    assert [run.status for run in read.runs.values()] == ["completed", "completed", "diverged"]
    assert "a seed 2 diverged (not finite): its final val_loss is nan." in read.warnings
    assert as_json(analyse([read]))["failures"][0]["step"] is None


def test_a_run_that_does_not_reach_the_step_is_told_by_its_own_end() -> None:
    read = judged([*noisy("a", 3.0, 2), log("b", 0, 3.0, STEPS[:5]), log("b", 1, 3.0, STEPS[:5])], at="900")
    failures = as_json(analyse([read]))["failures"]
    assert [(one["arm"], one["step"]) for one in failures] == [("b", 400), ("b", 400)]


def test_what_no_comparison_can_be_made_of_is_said() -> None:
    def notes(*runs: LogRun, metric: str = "val_loss", **asked: Any) -> str:
        logs = Logs(list(runs), [], metric, "lower", len(runs) > 2)
        return " ".join(analyse([judge_logs(logs, Asked(**asked), "x", ["x"], "x")])["studies"][0]["notes"])

    one = notes(log("a", 0, 3.0))
    assert "One arm is compared with nothing: --arm or --arm-from" in one and "Behrens" not in one
    assert "nothing" not in notes(log("a", 0, 3.0), targets=[3.0]).replace("nothing is called equivalent", "")
    assert "Every arm has one run, so no spread is known" in notes(log("a", 0, 3.0), log("b", 1, 3.0))
    named = [LogRun(Path("t.csv"), "csv", {}, arm, k, result={"quality": 3.0 + k}) for arm in "ab" for k in range(2)]
    assert "Lower quality is taken as better" in notes(*named, metric="quality")
    assert "Lower" not in notes(*named, metric="quality", better="lower")


def test_how_long_the_other_arms_are_does_not_make_a_run_unfinished() -> None:
    read = judged([*noisy("long", 3.0, 3), *(log("short", k, 3.0, STEPS[:6]) for k in range(3))])
    assert {run.status for run in read.runs.values()} == {"completed"}
    assert any("different steps" in text for text in read.warnings)
    read = judged([*noisy("long", 3.0, 3), *(log("short", k, 3.0, STEPS[:6]) for k in range(3))], at="common")
    assert any("3 runs went on well beyond step 500" in text for text in read.warnings)


def test_where_every_run_diverged_that_is_what_is_found() -> None:
    runs = [log(arm, k, 3.0, status="diverged") for arm in "ab" for k in range(3)]
    report = as_json(analyse([judged(runs, targets=[1.0], all_pairs=True)]))
    assert [row["verdict"] for row in report["comparisons"]] == ["diverges"] and report["groups"] == []
    assert {question["answer"] for question in report["questions"]} == {"not resolved"}
    with pytest.raises(UserError, match="--at common: no run"):
        judged(runs, at="common")


# -- what is compared


@pytest.mark.parametrize(
    ("arms", "baseline", "why"),
    [
        ({"x": 3, "Control": 3}, "Control", "it is called so"),
        ({"x": 3, "y": 4}, "y", "it has the most runs, 4"),
        ({"x": 2, "y": 3, "z": 3}, "y", "of the arms with the most runs, 3, it comes first"),
        ({"x": 3, "y": 3}, "x", "all arms have as many runs, and it comes first"),
    ],
)
def test_a_baseline_that_nobody_named_is_chosen_and_told(arms: dict[str, int], baseline: str, why: str) -> None:
    read = judged(run for arm, n in arms.items() for run in noisy(arm, 3.0, n))
    assert read.study.baseline == baseline and read.elsewhere is not None
    assert f"The baseline is {baseline}: {why}; --baseline NAME takes another." in read.elsewhere.notes
    named = judged((run for arm, n in arms.items() for run in noisy(arm, 3.0, n)), baseline="x")
    assert named.study.baseline == "x" and not any("baseline is" in note for note in named.elsewhere.notes)


@pytest.mark.parametrize("arm", ["lr=[1e-3]", "adam*", "a/b c", "é", "x?", "-1"])
def test_an_arm_may_be_called_anything(arm: str) -> None:
    read = judged(
        [*noisy("base", 3.0, 3), *noisy(arm, 2.0, 3, 1), *noisy("adam2", 3.0, 3, 2)], all_pairs=True, targets=[2.5]
    )
    report = as_json(analyse([read]))
    (row,) = [row for row in report["comparisons"] if (row["a"], row["b"]) == (arm, "base")]
    assert row["verdict"] == "better" and len(report["comparisons"]) == 3
    answers = {question["contrast"][0]: question["answer"] for question in report["questions"]}
    assert answers == {"base": "rejected", arm: "confirmed", "adam2": "rejected"}


def test_seeds_pair_the_runs_unless_they_only_number_them() -> None:
    shared = np.random.default_rng(0).normal(0, 0.1, 6)  # what a seed does to every arm
    runs = [
        log(arm, k, 3.0 + gain + shared[k] + 0.001 * (-1) ** (k * (arm == "x")))
        for arm, gain in (("base", 0), ("x", -0.02))
        for k in range(6)
    ]
    paired, unpaired = (as_json(analyse([judged(runs, paired=is_so)])) for is_so in (True, False))
    assert [report["comparisons"][0]["verdict"] for report in (paired, unpaired)] == ["better", "not resolved"]
    (row,) = unpaired["comparisons"]
    assert row["runs"] == [6, 6] and row["wins"] is None and "over 6 and 6 runs" in row["text"]
    assert any("share no seeds" in note for note in unpaired["studies"][0]["notes"])
    assert as_json(analyse([judged(runs, paired=False)]))["comparisons"] == unpaired["comparisons"]
    again = judged(runs, paired=False)
    assert judge_logs(Logs(runs, [], "val_loss", "lower", False), Asked(paired=True), "x", ["x"], "x").paired
    assert not again.paired


def test_arms_of_unequal_size_share_no_seed_and_are_compared_all_the_same() -> None:
    runs = [*noisy("base", 3.0, 8), *(log("x", 100 + k, 2.9 + 0.01 * k) for k in range(3))]
    (row,) = as_json(analyse([judged(runs, paired=False, margin=0.01)]))["comparisons"]
    assert (row["verdict"], row["runs"], row["n"]) == ("better", [3, 8], 3)
    (row,) = as_json(analyse([judged(runs, paired=True, margin=0.01)]))["comparisons"]
    assert (row["verdict"], row["why"]) == ("not resolved", "no seed in common")


def test_one_arm_has_a_mean_and_an_interval_and_no_comparison() -> None:
    report = as_json(analyse([judged(noisy("only", 3.0, 4), targets=[3.2])]))
    assert report["comparisons"] == [] and report["arms"][0]["n"] == 4 and report["arms"][0]["low"] < 3.0
    assert [question["answer"] for question in report["questions"]] == ["confirmed"]


@pytest.mark.parametrize("paired", [True, False])
def test_of_one_run_nothing_is_said(paired: bool) -> None:
    read = judged([log("a", 0, 3.0), log("b", 0, 2.0)], paired=paired)
    (row,) = as_json(analyse([read]))["comparisons"]
    assert row["verdict"] == "not resolved" and row["p"] is None and row["difference"] == pytest.approx(-1)
    assert any(note.startswith("Every arm has one run, so no spread is known") for note in read.elsewhere.notes)


def test_pairs_are_one_family_and_arms_alike_share_a_letter() -> None:
    runs = [
        run
        for i, (arm, end) in enumerate({"a": 3.0, "b": 3.001, "c": 3.5, "d": 2.5}.items())
        for run in noisy(arm, end, 6, i)
    ]
    report = as_json(analyse([judged(runs, paired=False, all_pairs=True, margin=0.05, baseline="a")]))
    verdicts = {(row["a"], row["b"]): row["verdict"] for row in report["comparisons"]}
    assert verdicts == {
        ("b", "a"): "equivalent", ("c", "a"): "worse", ("d", "a"): "better",
        ("c", "b"): "worse", ("d", "b"): "better", ("d", "c"): "better",
    }  # fmt: skip
    assert [(g["letter"], g["arms"]) for g in report["groups"]] == [("a", ["d"]), ("b", ["a", "b"]), ("c", ["c"])]
    p = [row["p"] for row in report["comparisons"]]
    assert min(row["p_adjusted"] for row in report["comparisons"]) == pytest.approx(6 * min(p))
    alone = as_json(analyse([judged(runs, paired=False, baseline="a")]))
    assert alone["groups"] == [] and len(alone["comparisons"]) == 3
    assert min(row["p_adjusted"] for row in alone["comparisons"]) == pytest.approx(
        3 * min(r["p"] for r in alone["comparisons"])
    )


def test_a_diverged_arm_has_no_letter() -> None:
    runs = [*noisy("a", 3.0, 3), *noisy("b", 3.0, 3, 1), *noisy("c", 3.0, 3, 2)]
    runs[-1].status = "diverged"
    report = as_json(analyse([judged(runs, all_pairs=True)]))
    assert [g["arms"] for g in report["groups"]] == [["a", "b"]] or [g["arms"] for g in report["groups"]] == [
        ["b", "a"]
    ]


# -- targets


def test_targets_are_asked_of_every_arm_and_steps_to_them_are_given() -> None:
    runs = [*noisy("a", 3.0, 5), *noisy("b", 2.0, 5, 1)]
    read = judged(runs, paired=False, targets=[3.5])
    report = as_json(analyse([read]))
    assert [(q["id"], q["answer"], q["target"]) for q in report["questions"]] == [
        ("a at 3.5", "confirmed", 3.5),
        ("b at 3.5", "confirmed", 3.5),
    ]
    (target,) = report["studies"][0]["targets"]
    a, b = target["arms"]
    assert target["units"] == ["steps"] and target["label"] == "val loss"
    assert a["steps"]["value"] == pytest.approx(750, abs=10) and b["steps"]["value"] == pytest.approx(250, abs=10)
    ratio = b["ratio"]["steps"]
    logs = [np.log([run["steps"] for run in arm["each"]]) for arm in (a, b)]
    assert ratio["value"] == pytest.approx(np.exp(logs[0].mean() - logs[1].mean()))
    assert ratio["low"] < ratio["value"] < ratio["high"] and a["ratio"] is None


def test_a_metric_that_is_better_when_higher_reaches_its_target_from_below() -> None:
    runs = [log(arm, k, 3.0 + k / 100) for arm in "ab" for k in range(3)]
    for run in runs:
        steps, losses = run.curves.pop("val_loss")
        run.curves["accuracy"] = steps, 1 - losses / 10  # 0.5 to 0.7
    logs = Logs(runs, [], "accuracy", "higher", True)
    report = as_json(analyse([judge_logs(logs, Asked(targets=[0.6, 0.9]), "x", ["x"], "x")]))
    targets = {target["target"]: target["arms"][0] for target in report["studies"][0]["targets"]}
    assert targets[0.6]["reached"] == 3 and targets[0.6]["steps"]["value"] == pytest.approx(505, abs=1)
    assert targets[0.9]["reached"] == 0
    assert [q["answer"] for q in report["questions"]] == ["confirmed", "confirmed", "rejected", "rejected"]


# -- the command line


@pytest.fixture
def logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CSV file of three arms with four seeds each, in the working directory."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    with open("runs.csv", "w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(["optimizer", "seed", "step", "val_loss", "train_loss"])
        for arm, gain in {"adamw": 0.0, "muon": -0.2, "lion": 0.0}.items():
            for seed in range(4):
                end = 3 + gain + 0.01 * generator.normal()
                for step in STEPS:
                    loss = end + 2 * math.exp(-step / 300) + 0.001 * generator.normal()
                    writer.writerow([arm, seed, int(step), f"{loss:.5f}", f"{loss - 0.05:.5f}"])
    return tmp_path / "runs.csv"


Told = Callable[..., tuple[int, str, str]]


@pytest.fixture
def judge(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Told:
    monkeypatch.setattr("gptlab.report.write.draw_report", lambda *_: [])  # it takes a second

    def call(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(["judge", *words])
        return int(end.value.code or 0), *capsys.readouterr()

    return call


def test_a_file_is_judged_by_one_command(logged: Path, judge: Told) -> None:
    status, out, err = judge(
        "runs.csv", "--arm", "optimizer", "--baseline", "adamw", "--margin", "0.05", "--json", "r.json"
    )
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "judged-runs: 12 runs of 3 arms, trained elsewhere; val_loss at the last point of each run"
    assert "muon is better than adamw here: lower val loss by" in out and "page: results/judged-runs/report.html" in out
    report = json.loads(Path("r.json").read_text(encoding="utf-8"))
    assert list(report)[:3] == ["arms", "comparisons", "questions"]
    assert [(row["a"], row["b"], row["verdict"]) for row in report["comparisons"]] == [
        ("muon", "adamw", "better"),
        ("lion", "adamw", "equivalent"),
    ] or {row["a"]: row["verdict"] for row in report["comparisons"]} == {"muon": "better", "lion": "equivalent"}
    page = Path("results/judged-runs/report.html").read_text(encoding="utf-8")
    assert "gptlab judge runs.csv --arm optimizer" in page
    files = {file.name for file in Path("results/judged-runs").iterdir()}
    assert {"judged-runs-arms.csv", "judged-runs-runs.csv", "report.html"} <= files
    header = Path("results/judged-runs/judged-runs-arms.csv").read_text(encoding="utf-8").splitlines()[0]
    assert "throughput" not in header and "peak memory" not in header and "val loss" in header


@pytest.mark.parametrize("more", [(), ("--pairs", "all", "--target", "3.0"), ("--unpaired", "--at", "common")])
def test_nothing_is_said_of_a_recipe_a_machine_or_a_study_to_run(
    logged: Path, judge: Told, more: tuple[str, ...]
) -> None:
    status, out, _ = judge("runs.csv", "--json", "-", *more)
    assert status == 0
    report = json.loads(out)
    told = json.dumps({key: value for key, value in report.items() if key != "runs"})
    for word in ("study run", "unknown hardware", "speed unknown", "tokens", "nats", "study report", ".toml", "NaN"):
        assert word not in told, word
    _, out, _ = judge("runs.csv", *more)
    for word in ("study run", "hardware", "speed", "/s", "GB", "nats"):
        assert word not in out.replace("results", ""), word
    assert report["recommendations"] == []


def test_a_column_that_numbers_runs_does_not_pair_them(logged: Path, judge: Told) -> None:
    logged.write_text(logged.read_text(encoding="utf-8").replace(",seed,", ",run,", 1), encoding="utf-8")
    for words, said in (
        ((), "unpaired"),
        (("--seed", "run"), "unpaired"),
        (("--seed", "run", "--paired"), "paired by seed"),
    ):
        status, out, _ = judge("runs.csv", "--arm", "optimizer", *words)
        assert status == 0 and f", {said}, with" in " ".join(out.split()), words


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["none.csv"], "none.csv does not exist"),
        (["runs.csv", "--metric", "val_los"], "val_loss"),
        (
            ["runs.csv", "--baseline", "adam"],
            "--baseline is 'adam', which no run has: did you mean 'adamw'? the arms are",
        ),
        (["runs.csv", "--margin", "-1"], "--margin -1: must be 0 or more, in the unit of val_loss"),
        (["runs.csv", "--margin", "nan"], "--margin nan: must be 0 or more"),
        (["runs.csv", "--at", "2000"], "--at 2000: the curves of val_loss go from step 0 to 1,000"),
        (["runs.csv", "--at", "end"], "--at end: must be last, common, best or a step"),
        (["runs.csv", "--at", "nan"], "--at nan: "),
        (["runs.csv", "--target", "nan"], "--target nan: must be a number"),
        (["runs.csv", "--questions", "none.toml"], "no study 'none.toml'"),
        (
            ["runs.csv", "--questions", "q.toml"],
            "question Q names the arm 'muom', which no run has: did you mean 'muon'?",
        ),
        (["runs.csv", "--questions", "bad.toml"], "bad.toml has no [[questions]]"),
        (["runs.csv", "--questions", "odd.toml"], "odd.toml: "),
        (["runs.csv", "--questions", "text.toml"], "text.toml: "),
        (["runs.csv", "--questions", "f1.toml"], "question Q is about micro_f1, which no run logs"),
        (["runs.csv", "--optim.lr", "1"], "`gptlab judge` takes no settings such as --optim.lr"),
        (["runs.csv", "--out", "runs.csv"], "runs.csv holds something else; choose --out"),
        (["runs.csv", "--out", "full"], "full holds something else; choose --out"),
        (["runs.csv", "--out", "other"], "other holds the judgement of a.csv; choose --out"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value)[9:].replace("/", "_"),
)
def test_a_call_that_is_wrong_is_one_sentence(logged: Path, judge: Told, words: list[str], says: str) -> None:
    Path("q.toml").write_text(
        '[[questions]]\nid = "Q"\nclaim = "c"\ncontrast = ["muom", "adamw"]\nconfirmed_if = "better"'
    )
    Path("bad.toml").write_text("seeds = [1]")
    Path("odd.toml").write_text('targets = [1.0]\nmetric = { margin = "much" }')
    Path("text.toml").write_text('[[questions]]\nid = "Q"\nclaim = "c"\ncontrast = "muon"')
    about = 'id = "Q"\nclaim = "c"\ncontrast = ["muon", "adamw"]\nconfirmed_if = "better"'
    Path("f1.toml").write_text(f'[[questions]]\n{about}\nmetric = {{ name = "micro_f1" }}')
    for folder, file, text in (("full", "mine.txt", "mine"), ("other", "judged.json", '{"sources": ["a.csv"]}')):
        Path(folder).mkdir()
        (Path(folder) / file).write_text(text)
    status, out, err = judge(*words)
    assert (status, out) == (2, "") and says in err and len(err.splitlines()) == 1
    assert (Path("full") / "mine.txt").read_text() == "mine" and not Path("results").exists()


def test_the_folder_of_a_judgement_is_written_anew(logged: Path, judge: Told) -> None:
    assert judge("runs.csv")[0] == 0 and judge("runs.csv", "--margin", "0.1")[0] == 0
    assert "--margin 0.1" in Path("results/judged-runs/report.html").read_text(encoding="utf-8")


def test_the_questions_of_a_study_file_are_asked(logged: Path, judge: Told) -> None:
    Path("q.toml").write_text(
        'baseline = "adamw"\ntargets = [3.5]\nmetric = { name = "final_val_loss", better = "lower", margin = 0.05 }\n'
        '[[questions]]\nid = "Q1"\nclaim = "muon beats adamw"\ncontrast = ["muon", "adamw"]\nconfirmed_if = "better"\n'
        '[[questions]]\nid = "Q2"\nclaim = "muon reaches 2.9"\ncontrast = ["muon"]\ntarget = 2.9\n'
        '[[questions]]\nid = "Q3"\nclaim = "no better than the best"\ncontrast = ["lion", "*n"]\n'
        'confirmed_if = "not better"\n'
    )
    status, out, err = judge("runs.csv", "--questions", "q.toml", "--json", "-")
    assert status == 0, err
    report = json.loads(out)
    assert [(q["id"], q["answer"]) for q in report["questions"]][:2] == [("Q1", "confirmed"), ("Q2", "confirmed")]
    assert report["studies"][0]["metric"]["margin"] == 0.05 and report["studies"][0]["baseline"] == "adamw"
    assert [target["target"] for target in report["studies"][0]["targets"]] == [3.5, 2.9]
    status, _, err = judge("runs.csv", "--questions", "q.toml", "--unpaired")
    assert status == 2 and "question Q3: *n, the best of several arms, needs runs that share seeds" in err


def test_the_terminal_shows_groups_and_steps_in_the_order_of_the_means(logged: Path, judge: Told) -> None:
    _, out, _ = judge("runs.csv", "--pairs", "all", "--target", "3.1")
    lines = [line.split() for line in out.splitlines() if line.startswith(("adamw ", "muon ", "lion "))]
    assert lines[0][0] == "muon" and [line[-1] for line in lines[:3]] == ["a", "b", "b"]
    assert lines[3][0] == "muon" and lines[3][1] == "confirmed"
    assert "verdict after Holm over all 3 pairs" in " ".join(out.split())


def test_python_judges_as_the_command_line_does(logged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptlab.report.write.draw_report", lambda *_: [])
    report = gptlab.judge("runs.csv", arm="optimizer", margin=0.05, targets=[3.0], pairs="all", out="mine")
    assert report.page == Path("mine/report.html") and repr(report).startswith("Report(judged-runs, answers={}")
    assert (
        report.payload["command"]
        == "gptlab judge runs.csv --arm optimizer --margin 0.05 --at last --pairs all --target 3.0 --out mine"
    )
    assert "muon" in report._repr_html_()
    with pytest.raises(UserError, match="pairs = 'some': must be all"):
        gptlab.judge("runs.csv", pairs="some")
    with pytest.raises(UserError, match="better = 'more': must be lower or higher"):
        gptlab.judge("runs.csv", better="more")


@pytest.mark.parametrize(
    ("path", "name"),
    [("x/runs.csv.gz", "judged-runs"), ("x/a.b.jsonl", "judged-a.b"), ("x/logs", "judged-logs"), ("/", "judged-logs")],
)
def test_a_judgement_is_called_after_what_was_read(path: str, name: str) -> None:
    assert name_of(Path(path)) == name


# -- the page


def page(*runs: LogRun, paired: bool = False, **asked: Any) -> str:
    return render_page(analyse([judged(runs, paired, **asked)]) | {"command": "gptlab judge made.csv", "gptlab": "1"})


@pytest.mark.slow
@needs_chromium
def test_the_page_has_groups_targets_and_curves_and_no_place_for_what_is_not_known(browser: Browser) -> None:
    arms = {"a": 3.0, "b [x]*": 3.001, "c": 2.0}
    runs = [run for i, (arm, end) in enumerate(arms.items()) for run in noisy(arm, end, 4, i)]
    browser.open(page(*runs, all_pairs=True, targets=[3.5], margin=0.1, baseline="a"))
    assert browser.complaints() == []
    text = browser.run("document.body.innerText")
    for word in (
        "hardware",
        "per second",
        "memory",
        "Recommendation",
        "seed",
        "nats",
        "Repeat this study",
        "undefined",
    ):
        assert word not in text.replace("--paired", "").replace("share no seeds", ""), word
    assert "RUNS JUDGED" in text and "Judge again" in text and "All 3 pairs of arms are compared" in text
    rows = browser.each("#study-0-table tbody tr", "[one.dataset.arm, one.cells[one.cells.length - 1].innerText]")
    assert rows[0] == ["c", "a"] and {arm for arm, _ in rows[1:]} == {"a", "b [x]*"}
    assert {letter for _, letter in rows[1:]} == {"b"}
    assert browser.each("#study-0-target-0 tbody tr", "one.cells[0].innerText")[0] == "c"
    assert browser.first("#study-0-target-0 tbody tr", "one.cells[1].innerText").startswith("✓ confirmed")
    assert browser.each(".forest .seed", "1") == [] and len(browser.each(".forest .mean", "1")) == 2
    # seed by seed the differences of single seeds are marked
    browser.open(page(*runs, paired=True, baseline="a"))
    assert len(browser.each(".forest .seed", "1")) == 8 and browser.complaints() == []


@pytest.mark.slow
@needs_chromium
def test_the_page_of_one_arm_or_of_values_without_steps_has_no_fault(browser: Browser) -> None:
    table = [LogRun(Path("t.csv"), "csv", {}, arm, k, result={"val_loss": 3.0 + k}) for arm in "ab" for k in (0, 1)]
    for runs in (noisy("only", 3.0, 3), table, [log("a", 0, 3.0), log("b", 0, 2.0)]):
        browser.open(page(*runs, targets=[3.2], all_pairs=True))
        text = browser.run("document.body.innerText")
        assert browser.complaints() == [] and "undefined" not in text
        assert ("The logs hold no curve of val loss." in text) == (runs is table)


@pytest.mark.slow
@needs_chromium
def test_the_differences_of_tiny_values_and_of_many_arms_can_be_read(browser: Browser) -> None:
    def table(arms: str, scale: float) -> list[LogRun]:
        noise = np.random.default_rng(0).normal(size=(len(arms), 4))
        return [
            LogRun(Path("t.csv"), "csv", {}, arm, k, result={"val_loss": scale * (3 + i / 10 + noise[i, k] / 100)})
            for i, arm in enumerate(arms)
            for k in range(4)
        ]

    browser.resize(400, 900)
    browser.open(page(*table("ab", 1e-9), baseline="a"))
    told = browser.each(".forest .edge text", "one.textContent")
    assert told[0] == "worse →" and "← better" not in told  # no room left of zero
    assert "0" in told and "+1e\u221210" in told and max(map(len, told)) < 10
    assert "e\u2212" in browser.first("#study-0-table tbody tr", "one.innerText")
    browser.resize(1280, 900)
    browser.open(page(*table("abcdefghijklmnop", 1.0), baseline="a"))
    rows = browser.each(".forest-row[data-arm] .says", "[one.offsetHeight, one.dataset.tip]")
    assert len(rows) == 15 and max(height for height, _ in rows) < 80 and all("Holm" in tip for _, tip in rows)
    assert browser.complaints() == []


@pytest.mark.slow
@needs_chromium
def test_the_page_draws_no_difference_of_an_arm_that_diverged(browser: Browser) -> None:
    runs = [*noisy("a", 3.0, 4), *noisy("b", 2.9, 4, seed=1), *noisy("c", 2.8, 4, seed=2)]
    runs[-1].curves["val_loss"][1][8:] = np.nan
    browser.open(page(*runs, baseline="a", paired=True))
    drawn = browser.each(".forest-row[data-arm]", "[one.dataset.arm, one.querySelectorAll('.mean, .seed').length]")
    assert drawn == [["b", 5], ["c", 0]]
    cells = {row[0]: row[1] for row in browser.each("#study-0-table tbody tr", "[one.dataset.arm, one.innerText]")}
    assert "diverges" in cells["c"] and "\u2212" in cells["b"] and "\u2212" not in cells["c"]
    assert browser.complaints() == []
