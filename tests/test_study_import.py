"""Logs of other trainers become a study's folder, gptlab trains arms beside them, and a report compares all."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptlab.cli import main
from gptlab.config import load_study
from gptlab.errors import ConfigError, DataError, UserError
from gptlab.logs.read import Logs, read_logs
from gptlab.logs.run import How, LogRun
from gptlab.report.analysis import analyse_study
from gptlab.report.studies import read_study_folder
from gptlab.rundir import RunDir, open_study
from gptlab.study.folder import study_differences
from gptlab.study.importing import import_logs, study_file_of
from gptlab.study.runs import gate_seed, planned_runs
from gptlab.study.table import read_study


def call(*words: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return ended.value.code if isinstance(ended.value.code, int) else 0


def nanogpt_log(file: Path, last: float, steps: int = 24) -> Path:
    """What nanoGPT prints of a run."""
    lines = ["tokens per iteration will be: 256", "number of parameters: 0.03M"]
    for step in range(0, steps + 1, 6):
        loss = last + (3.0 - last) * (1 - step / steps)
        lines += [
            f"step {step}: train loss {loss - 0.1:.4f}, val loss {loss:.4f}",
            f"iter {step}: loss {loss - 0.05:.4f}, time 26.51ms, mfu 14.05%",
        ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n")
    return file


VALUES = {"adamw": [2.5, 2.5625, 2.4375], "muon": [2.25, 2.3125]}


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    for arm, values in VALUES.items():
        for seed, value in enumerate(values):
            nanogpt_log(tmp_path / "logs" / f"{arm}_seed{seed}.log", value)
    return tmp_path / "logs"


def imported(logs: Path, out: Path, **how: str) -> list[str]:
    return import_logs(read_logs([logs], How()), out, **how)[1]


def test_a_folder_of_logs_becomes_a_study_that_a_report_reads(
    logs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine"
    assert call("import", "log", logs, "--out", out) == 0
    told = capsys.readouterr()
    assert f"study: {out}: 5 runs of 2 arms, the baseline is adamw" in told.out
    assert "text logs are read by --pattern nanogpt" in told.err and "judged by val_loss, lower is better" in told.err
    study = open_study(out)
    assert study.measured == ["adamw", "muon"] and study.seeds == [0, 1, 2] and study.metric.name == "final_val_loss"
    read = read_study_folder(out)
    assert {key: run.value("final_val_loss") for key, run in read.runs.items()} == {
        (arm, seed): value for arm, values in VALUES.items() for seed, value in enumerate(values)
    }
    steps, values = read.runs["muon", 1].curves["val_loss"]
    assert steps.tolist() == [0, 6, 12, 18, 24] and values[-1] == 2.3125
    assert read.runs["muon", 1].curves["loss"][1][-1] == 2.2625
    assert not read.paired
    told = analyse_study(read)
    assert told["runs_planned"] == told["runs_found"] == 5
    assert "Measured elsewhere, and not trained by gptlab: adamw, muon." in told["notes"]
    assert [one for one in read.warnings if "differ" in one] == []
    assert any("the plan was registered" in one and "after runs had begun" in one for one in read.warnings)
    assert {(one.arm, one.status, one.limit) for one in read_study(out)} == {(arm, "completed", 24) for arm in VALUES}
    assert json.loads((out / "muon_seed1" / "environment.json").read_text())["source"] == str(logs / "muon_seed1.log")


def test_a_study_of_measured_arms_alone_has_nothing_to_train(logs: Path, tmp_path: Path) -> None:
    imported(logs, tmp_path / "out")
    study = open_study(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"all arms were measured elsewhere; add a table \[arms.NAME\] with settings"):
        planned_runs(study, tmp_path / "out", None, None)
    assert call("study", "run", tmp_path / "out") == 2 and call("plan", tmp_path / "out") == 2


def with_arm(folder: Path, tmp_path: Path, table: str = "[arms.mine]\noptim.lr = 3e-3\n") -> Path:
    """The study file of a folder, with an arm added."""
    file = tmp_path / "edited.toml"
    file.write_text(study_file_of(folder, file) + "\n" + table)
    return file


def test_an_arm_may_be_added_and_is_the_only_one_that_is_trained(logs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    imported(logs, out, recipe="smoke-lm")
    before, now = open_study(out), load_study(with_arm(out, tmp_path))
    assert now.recipe == before.recipe and study_differences(before, now) == []
    runs = planned_runs(now, out, None, None)
    assert sorted((run.arm, run.seed, run.gate) for run in runs) == [("mine", seed, None) for seed in (0, 1, 2)]
    assert runs[0].recipe.optim.lr == 3e-3 and runs[0].recipe.model == now.build("mine", 0).model
    with pytest.raises(ConfigError, match="arm muon was measured elsewhere .text .*muon_seed0.log and 1 more"):
        planned_runs(now, out, ["muon"], None)
    behind = load_study(with_arm(out, tmp_path, '[arms.mine]\ngroup = "extended"\n'))
    assert gate_seed(behind, out, ["mine"], [0]) is None  # no measured arm opens a gate


def test_seeds_are_not_added_to_what_is_measured(
    logs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    imported(logs, tmp_path / "out", recipe="smoke-lm")
    file = with_arm(tmp_path / "out", tmp_path)
    assert call("study", "run", file, "--out", tmp_path / "out", "--until-decided") == 2
    assert "--until-decided adds seeds, and adamw was measured elsewhere: leave it out" in capsys.readouterr().err


def test_what_is_measured_may_not_change(logs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    imported(logs, out)
    study = open_study(out)
    trained = study.model_copy(
        update={"arms": {**study.arms, "muon": study.arms["muon"].model_copy(update={"measured": ""})}}
    )
    (change,) = study_differences(study, trained)
    assert change.startswith("measured (text ") and change.endswith("then,  now) in muon")
    fewer = study.model_copy(update={"arms": {"adamw": study.arms["adamw"]}})
    assert study_differences(study, fewer) == ["there was an arm muon"]
    with pytest.raises(ConfigError, match="an arm that was measured elsewhere has no settings"):
        load_study(edited(out, tmp_path, "[arms.muon]\n", "[arms.muon]\noptim.lr = 1e-3\n"))
    with pytest.raises(ConfigError, match="until_decided adds seeds, and adamw was measured elsewhere"):
        load_study(edited(out, tmp_path, "until_decided = false", "until_decided = true"))


def edited(folder: Path, tmp_path: Path, old: str, new: str) -> Path:
    text = (folder / "study.toml").read_text()
    assert old in text
    (tmp_path / "edited.toml").write_text(text.replace(old, new))
    return tmp_path / "edited.toml"


def test_new_from_prints_or_writes_a_file_that_loads(
    logs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, file = tmp_path / "my study", tmp_path / "new.toml"
    imported(logs, out, recipe="smoke-lm")
    assert open_study(out).name == "my-study"
    capsys.readouterr()
    assert call("study", "new-from", out) == 0
    printed = capsys.readouterr().out
    assert f"gptlab study run FILE.toml --out '{out}'" in printed and "[arms.muon]" in printed
    assert call("study", "new-from", out, "--out", file) == 0
    assert load_study(file) == open_study(out)
    uncommented = "\n".join(line.removeprefix("#   ") for line in file.read_text().splitlines()[3:12])
    file.write_text(file.read_text() + uncommented)
    assert load_study(file).questions[0].contrast == ["mine", "adamw"]
    capsys.readouterr()
    assert call("study", "new-from", out, "--out", file) == 2
    assert "exists: --out names another file" in capsys.readouterr().err
    assert call("study", "new-from", logs) == 2
    assert "is not a study's folder" in capsys.readouterr().err


def made(*runs: tuple[str, int, Sequence[float]], **more: Any) -> Logs:
    return Logs(
        [
            LogRun(
                Path(f"{arm}{seed}.csv"),
                "csv",
                {"val_loss": (np.arange(len(values)) * 10.0, np.array(values))},
                arm,
                seed,
                **more,
            )
            for arm, seed, values in runs
        ],
        [],
        "val_loss",
        "lower",
        True,
    )


def test_arms_and_studies_get_names_that_are_allowed(tmp_path: Path) -> None:
    logs = made(
        ("lr = 0.1", 0, [3.0]), ("lr/0.1", 0, [3.0]), ("ünï", 0, [3.0]), ("../x", 0, [3.0]), ("lr-0.1", 0, [3.0])
    )
    study, remarks = import_logs(logs, tmp_path / "- größe")
    assert study.name == "gr-e" and sorted(study.arms) == ["lr-0.1", "lr-0.1-2", "lr-=-0.1", "n", "x"]
    assert "the arm lr/0.1 is called lr-0.1-2: an arm has letters, digits and _ . + = , -" in remarks
    assert len(remarks) == 4


def test_how_runs_ended_is_kept(tmp_path: Path) -> None:
    logs = made(("a", 0, [3.0, math.nan]), ("a", 1, [3.0, 2.0]), ("b", 0, [3.0, 2.5]))
    logs.runs[2].status = "unfinished"
    import_logs(logs, tmp_path / "out")
    read = read_study_folder(tmp_path / "out")
    assert {key: run.status for key, run in read.runs.items()} == {
        ("a", 0): "diverged", ("a", 1): "completed", ("b", 0): "interrupted"
    }  # fmt: skip
    result = RunDir(tmp_path / "out" / "a_seed0").read_json("result.json")
    assert result["failed_at_step"] == 10 and result["reason"] == "its last val_loss is no number"


def test_numbers_of_a_table_without_steps_are_imported(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("arm,seed,accuracy,steps_per_s\na,0,0.5,3\na,1,0.75,4\nb,0,0.25,5\n")
    study, remarks = import_logs(read_logs([tmp_path / "a.csv"], How()), tmp_path / "out")
    assert (study.metric.name, study.metric.better) == ("accuracy", "higher")
    assert remarks == ["runs of gptlab have no accuracy, so arms that it trains cannot be compared in it"]
    read = read_study_folder(tmp_path / "out")
    assert [run.value("accuracy") for run in read.runs.values()] == [0.5, 0.75, 0.25]


def test_what_cannot_be_imported_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    broken = made(("a", 0, [3.0, 2.0]))
    broken.runs[0].curves["val_loss"] = (np.array([0.5, 1.5]), np.array([3.0, 2.0]))
    with pytest.raises(
        DataError, match="a0.csv: its steps are no whole numbers from 0 on; --step names another column"
    ):
        import_logs(broken, out)
    with pytest.raises(UserError, match="baseline = c: must be one of the arms a, b"):
        import_logs(made(("a", 0, [3.0]), ("b", 0, [3.0])), out, baseline="c")
    with pytest.raises(UserError, match="no recipe 'x'"):
        import_logs(made(("a", 0, [3.0])), out, recipe="x")
    assert not out.exists()
    out.mkdir()
    (out / "a").touch()
    with pytest.raises(UserError, match="exists and is not an empty folder: --out names a new one"):
        import_logs(made(("a", 0, [3.0])), out)


def test_other_kinds_of_import_are_as_they_were(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert call("import", "hf", tmp_path / "nothing", "--out", tmp_path / "run") == 2
    assert "nothing" in capsys.readouterr().err
    assert call("import", "other", tmp_path, "--out", tmp_path / "run") == 2
    assert "hf" in capsys.readouterr().err


@pytest.mark.slow
def test_an_arm_is_trained_beside_imported_runs_and_compared_with_them(
    logs: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(
        f"""
        model = {{ n_layer = 1, n_head = 2, n_embd = 32, block_size = 32 }}
        data = {{ path = "{dataset}", tokenizer = "char" }}
        batch = {{ micro_batch = 8, tokens_per_step = 256 }}
        optim = {{ lr = 1e-2 }}
        train = {{ max_steps = 24, eval_every = 6, device = "cpu", threads = 1 }}
        eval = {{ tokens = 640 }}
        """
    )
    assert call("import", "log", "logs", "--out", "both", "--recipe", recipe) == 0
    assert call("study", "new-from", "both", "--out", "new.toml") == 0
    question = '[[questions]]\nid = "mine"\nclaim = "-"\ncontrast = ["mine", "adamw"]\nconfirmed_if = "better"\n'
    with open("new.toml", "a", encoding="utf-8") as file:
        file.write(f"\n[arms.mine]\nmodel.norm = 'rmsnorm'\n{question}")
    assert call("study", "run", "new.toml", "--out", "both", "--jobs", "2") == 0
    assert call("study", "run", "both") == 0  # all is trained
    assert call("study", "report", "both", "--json", "told.json") == 0
    read = read_study_folder("both")
    assert [(arm, len(read.of(arm))) for arm in read.study.arms] == [("adamw", 3), ("muon", 2), ("mine", 3)]
    assert all(run.status == "completed" for run in read.runs.values())
    assert math.isfinite(read.runs["mine", 2].value("final_val_loss"))
    assert "both: arm mine was added after the first run" in read.warnings
    assert not any("differ" in one or "settings" in one for one in read.warnings)
    told = json.loads(Path("told.json").read_text())
    assert "mine" in json.dumps(told) and "unpaired" in capsys.readouterr().out
