"""One damaged run, and a stranger's words, in a study and in its report."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_recipe
from readers import STUDY
from test_report_tables import make_arm, make_failure, make_payload, make_study
from test_study_runner import Fakes, fakes, statuses, study, summary

from gptlab.config import Study, load_study
from gptlab.report.card import card
from gptlab.report.studies import read_study_folder
from gptlab.report.tables import write_csv
from gptlab.rundir import RunDir
from gptlab.study.runner import run_study

__all__ = ["fakes", "study"]  # fixtures
OUT = Path("results/tiny")
ESCAPES = "\x1b]0;title\x07\x9b31m"


def test_a_failed_run_keeps_its_steps_and_a_strangers_words_are_shown(study: Study, fakes: Fakes, capfd: Any) -> None:
    fakes.ends["fast"] = [f"failed: ValueError: {ESCAPES}"]
    assert run_study(study, arms=["plain", "fast"], seeds=[0]) == 1
    result = RunDir(OUT / "fast_seed0").read_json("result.json")
    assert (result["status"], result["steps"], result["tokens"]) == ("failed", 24, 6144)
    assert summary(OUT, "fast_seed0")["steps"] == 24
    says = capfd.readouterr().err
    assert r"fast seed 0: failed at step 24" in says and r"ValueError: \x1b]0;title\x07\x9b31m" in says
    assert not re.search("[\x1b\x07\x9b]", says)


@pytest.mark.parametrize("file", ["result.json", "environment.json", "recipe.toml"])
def test_a_damaged_run_is_named_and_left_and_the_study_goes_on(
    file: str, study: Study, fakes: Fakes, capfd: Any
) -> None:
    run = RunDir(OUT / "fast_seed0")
    run.write_recipe(study.build("fast", 0))
    run.write_json("result.json", {"status": "completed", "steps": 24})
    (run.path / file).write_bytes(b"\xff damaged")
    assert run_study(study, arms=["plain", "fast"], seeds=[0]) == 1
    says = capfd.readouterr().err
    assert says.count("fast seed 0 is left out") == 1
    assert f"{run.path / file} " in re.search("fast seed 0 is left out: (.*)", says)[1]
    assert (run.path / file).read_bytes() == b"\xff damaged"
    states = statuses(OUT)
    assert states.pop("fast 0") == "damaged" and "fast_seed0" not in fakes.started()
    assert states["plain 0"] == "completed"


def test_a_damaged_summary_is_written_anew(study: Study, fakes: Fakes) -> None:
    core = {"arms": ["plain", "fast"], "seeds": [0], "quiet": True}
    assert run_study(study, **core) == 0
    whole = summary(OUT, "plain_seed0")
    (OUT / "plain_seed0.json").write_bytes(b"[]")
    assert run_study(study, **core) == 0
    assert summary(OUT, "plain_seed0") == whole
    assert len(fakes.started()) == 2
    (OUT / "plain_seed0.json").write_bytes(b"[]")
    assert run_study(study, quiet=True) == 0  # with arms that wait for the gate


def test_until_decided_goes_on_without_a_damaged_run(study: Study, fakes: Fakes, capfd: Any) -> None:
    run = RunDir(OUT / "fast_seed0")
    run.write_recipe(study.build("fast", 0))
    (run.path / "result.json").write_bytes(b"[]")
    assert run_study(study, until_decided=True, most_seeds=3) == 1
    assert "fast against plain: open after" in capfd.readouterr().err
    assert "fast_seed0" not in fakes.started() and "plain_seed1" in fakes.started()


# -- the report


def test_a_report_says_how_many_lines_of_metrics_were_damaged(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(STUDY, encoding="utf-8")
    for arm in "ab":
        run = RunDir(tmp_path / f"{arm}_seed0")
        run.write_recipe(load_study(tmp_path / "study.toml").build(arm, 0))
        run.write_json("result.json", {"status": "completed", "steps": 2, "final_val_loss": 3.5})
        lines = ['{"step": 0, "val_loss": 4}', *["{half"] * (2 if arm == "b" else 0), '{"step": 2, "val_loss": 3.5}']
        run.metrics_file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    read = read_study_folder(tmp_path)
    says = [text for text in read.warnings if "metrics.jsonl" in text]
    assert says == [f"{tmp_path / 'b_seed0'}/metrics.jsonl: 2 damaged lines left out of the curves"]


def test_tables_and_cards_show_escapes_and_do_not_have_them(dataset: Path, tmp_path: Path) -> None:
    failure = make_failure("a", reason=ESCAPES)
    files = write_csv(make_payload(make_study(make_arm(), failures=[failure])), tmp_path / "tables")
    texts = {file.name: file.read_text(encoding="utf-8") for file in files}
    assert r"\x1b]0;title\x07\x9b31m" in "".join(text for name, text in texts.items() if "failures" in name)
    run = RunDir(tmp_path / "run")
    run.write_recipe(tiny_recipe(dataset, description=ESCAPES))
    run.write_json("result.json", {"status": "failed", "reason": ESCAPES})
    run.write_json("environment.json", {"device_name": ESCAPES, "command": ["gptlab", ESCAPES]})
    texts["card"] = card(run)
    assert texts["card"].count("title") == 4
    for name, text in texts.items():
        assert not re.search("[\x1b\x07\x9b]", text), name
