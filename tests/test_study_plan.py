"""The registered plan: kept before the first run, and every later edit of what a study asks is shown."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_cli import call
from test_study_runner import Fakes, study_file

from gptlab.config import Study, load_study, plan_changes, plan_hash, shipped, study_plan
from gptlab.errors import RunError
from gptlab.rundir import open_study, read_plan
from gptlab.study.folder import keep_study
from gptlab.study.runner import run_study

QUESTION = """
[[questions]]
id = "Q1"
claim = "the higher rate is better"
contrast = ["fast", "plain"]
confirmed_if = "better"
"""
METRIC = 'metric = { name = "final_val_loss", margin = 0.004 }\n'


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return Fakes(tmp_path).replace_workers(monkeypatch)


@pytest.fixture
def study(dataset: Path, tmp_path: Path) -> Study:
    return load_study(study_file(tmp_path, dataset, METRIC + QUESTION))


def changed(study: Study, **changes: Any) -> Study:
    """The study as its file would be read with other questions, metric, baseline or default."""
    return Study.model_validate({**study.model_dump(), **changes})


def remarks(folder: Path) -> list[str]:
    plan = read_plan(folder, open_study(folder))
    assert plan is not None
    return plan.remarks


# -- what is compared


def test_every_edit_of_what_a_study_asks_is_named(study: Study) -> None:
    plan = json.loads(json.dumps(study_plan(study)))
    assert plan_changes(plan, study) == []
    (question,) = study.model_dump()["questions"]
    second = {**question, "id": "Q2"}
    after = "after the first run"
    for changes, says in (
        ({"metric": {"margin": 0.25}}, [f"the metric was changed {after}: margin 0.004 then, 0.25 now"]),
        (
            {"questions": [{**question, "confirmed_if": "not worse"}]},
            [f'question Q1 was changed {after}: confirmed_if "better" then, "not worse" now'],
        ),
        (
            {"questions": [{**question, "metric": {"name": "accuracy"}}]},
            [
                f"question Q1 was changed {after}: metric none then, "
                '{"name": "accuracy", "better": "lower", "margin": 0.0} now'
            ],
        ),
        ({"questions": [second, question]}, [f"question Q2 was added {after}"]),
        ({"questions": [second]}, [f"question Q1 was removed {after}", f"question Q2 was added {after}"]),
        ({"baseline": "fast"}, [f'the baseline was changed {after}: "plain" then, "fast" now']),
        ({"default": {"incumbent": "plain", "among": ["fast"]}}, [f"the default was added {after}"]),
        ({"description": "x", "seeds": [5], "flags": {"optim.lr": 1.0}}, []),
        ({"arms": {**study.model_dump()["arms"], "new": {}}}, [f"arm new was added {after}"]),
    ):
        assert plan_changes(plan, changed(study, **changes)) == says


def test_the_order_of_arms_and_questions_is_no_change(study: Study) -> None:
    two = changed(
        study, questions=[*study.model_dump()["questions"], {**study.model_dump()["questions"][0], "id": "Q2"}]
    )
    other = changed(
        two, questions=two.model_dump()["questions"][::-1], arms=dict(reversed(two.model_dump()["arms"].items()))
    )
    assert plan_changes(study_plan(two), other) == []


def test_what_an_older_version_did_not_write_had_its_default(study: Study) -> None:
    plan = study_plan(study)
    del plan["default"], plan["metric"]["better"], plan["questions"][0]["rejected_if"]
    plan["of_a_newer_version"] = 3
    assert plan_changes(plan, study) == []
    default = {"incumbent": "plain", "among": ["fast"]}
    assert plan_changes(plan, changed(study, default=default)) == ["the default was added after the first run"]


def test_the_hash_is_that_of_canonical_json() -> None:
    plan = {"metric": {"name": "\u00e4", "margin": 0.004}, "arms": ["b", "a"]}
    text = '{"arms":["b","a"],"metric":{"margin":0.004,"name":"\u00e4"}}'
    assert plan_hash(plan) == hashlib.sha256(text.encode("utf-8")).hexdigest()


@pytest.mark.parametrize("name", shipped("studies"))
def test_the_plan_of_a_shipped_study_survives_its_files(name: str, tmp_path: Path) -> None:
    study = load_study(name)
    (tmp_path / "study.toml").write_text(study.to_toml(), encoding="utf-8")
    again = load_study(tmp_path / "study.toml")
    assert plan_hash(study_plan(again)) == plan_hash(json.loads(json.dumps(study_plan(study))))
    assert plan_changes(study_plan(study), again) == []


# -- the folder


def test_an_edit_after_the_first_run_is_shown_and_not_refused(
    study: Study, fakes: Fakes, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file = Path("results/tiny"), tmp_path / "tiny.toml"
    assert call(capsys, "study", "run", file, "--seed", 0)[0] == 0
    kept = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", kept["registered"])
    assert (kept["late"], kept["sha256"]) == (False, plan_hash(study_plan(study)))
    assert remarks(folder) == []
    assert "first run" not in call(capsys, "study", "status", folder)[1]

    study_file(tmp_path, dataset, METRIC.replace("0.004", "0.25") + QUESTION.replace('better"', 'not worse"'))
    status, _, err = call(capsys, "study", "run", file, "--seed", 1)
    assert (status, len(fakes.started())) == (0, 6)  # the runs are those of the same study
    says = [
        "the metric was changed after the first run: margin 0.004 then, 0.25 now",
        'question Q1 was changed after the first run: claim "the higher rate is better" then, '
        '"the higher rate is not worse" now; confirmed_if "better" then, "not worse" now',
    ]
    assert remarks(folder) == says
    assert all(line in err.splitlines() for line in says)
    assert kept["sha256"] in err
    assert call(capsys, "study", "status", folder)[1].splitlines()[-2:] == says
    assert json.loads((folder / "plan.json").read_text(encoding="utf-8")) == kept
    assert open_study(folder).metric.margin == 0.25


def test_an_edit_by_hand_is_shown_too(study: Study, fakes: Fakes) -> None:
    folder = Path("results/tiny")
    run_study(study, seeds=[0], quiet=True)
    for path in folder.glob("*_seed*/*"):  # as if the runs had been deleted to save space: their summaries stay
        path.unlink()
    for path in folder.glob("*_seed0"):
        path.rmdir()
    file = folder / "study.toml"
    file.write_text(file.read_text(encoding="utf-8").replace("margin = 0.004", "margin = 0.25"), encoding="utf-8")
    says = ["the metric was changed after the first run: margin 0.004 then, 0.25 now"]
    assert remarks(folder) == says
    run_study(open_study(folder), seeds=[0], quiet=True)
    assert remarks(folder) == says

    plan = folder / "plan.json"
    plan.write_text(plan.read_text(encoding="utf-8").replace("0.004", "0.25"), encoding="utf-8")
    assert remarks(folder) == ["results/tiny/plan.json was edited: its sha256 is of another plan"]
    plan.write_text('{"plan": 3}', encoding="utf-8")
    with pytest.raises(RunError, match=r"plan.json is damaged"):
        remarks(folder)


def test_before_the_first_run_the_plan_follows_the_study(study: Study, fakes: Fakes) -> None:
    folder = Path("results/tiny")
    folder.mkdir(parents=True)
    keep_study(folder, study, [0])
    keep_study(folder, changed(study, metric={"margin": 0.25}), [0])
    assert remarks(folder) == []
    assert json.loads((folder / "plan.json").read_text(encoding="utf-8"))["plan"]["metric"]["margin"] == 0.25


def test_a_folder_without_a_plan_works_and_gets_a_late_one(study: Study, fakes: Fakes, capsys: Any) -> None:
    folder = Path("results/tiny")
    run_study(study, seeds=[0], quiet=True)
    (folder / "plan.json").unlink()  # as an earlier version of gptlab left it
    assert read_plan(folder, study) is None
    assert call(capsys, "study", "status", folder)[0] == 0
    # what the folder asked so far is registered, not what this call asks
    run_study(changed(study, metric={"margin": 0.25}), seeds=[1], quiet=True)
    late, edit = remarks(folder)
    assert re.fullmatch(r"the plan was registered on \d{4}-\d\d-\d\d, after runs had begun", late)
    assert edit == "the metric was changed after the first run: margin 0.004 then, 0.25 now"


def test_the_summary_of_a_quick_test_is_no_run_of_the_study(study: Study, fakes: Fakes) -> None:
    folder = Path("results/tiny")
    folder.mkdir(parents=True)
    (folder / "plain_seed0.json").write_text('{"study": "tiny-quick-100", "status": "completed"}', encoding="utf-8")
    run_study(study, seeds=[0], quiet=True)
    assert remarks(folder) == []
