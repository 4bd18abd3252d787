"""`--json` of the verbs that print tables: JSON alone on the standard output, or a file beside the tables."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from planted import planted
from test_cli import call

from gptlab.cli.common import json_too
from gptlab.config import load_study
from gptlab.errors import UserError

VALUES = {"classic": [3.0, 3.1, 3.2], "rmsnorm": [2.9, 3.05, None]}


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return planted(tmp_path / "results/made", "architecture-smoke", VALUES)


def keys(value: Any) -> set[str]:
    return set(value[0] if isinstance(value, list) else value)


CALLS: dict[str, tuple[list[str], set[str]]] = {
    "recipes": (["recipes"], {"name", "description"}),
    "studies": (["studies"], {"name", "description"}),
    "status": (["study", "status", "results/made"], {"study", "runs", "standing", "remarks"}),
    "power": (
        ["study", "power", "precision-lm", "--effect", "0.02", "--noise", "0.01"],
        {"study", "metric", "effect", "margin", "comparisons", "noise", "seeds_alone", "seeds_family"}
        | {"seeds_equivalent", "detects", "text"},
    ),
    "doctor": (["doctor", "--seconds", "0"], {"gptlab", "PyTorch", "CPU", "GPU", "packages", "disk"}),
    "plan": (["plan", "smoke-lm", "--gpu", "h100"], {"name", "device", "memory", "parameters"}),
    "verify": (["verify", "results/made"], {"what", "fault"}),
}


@pytest.mark.parametrize("verb", CALLS)
def test_the_standard_output_is_json_and_a_file_is_written_beside_the_tables(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    words, expected = CALLS[verb]
    shown = call(capsys, *words)
    for flag in (["--json"], ["--json", "-"]):
        status, out, _ = call(capsys, *words, *flag)
        told = json.loads(out)
        assert status == shown[0] and expected <= keys(told)
    status, out, _ = call(capsys, *words, "--json", tmp_path / "new/told.json")
    if verb != "doctor":  # whose free memory and disk change meanwhile
        assert out == shown[1] and json.loads((tmp_path / "new/told.json").read_text(encoding="utf-8")) == told


def test_a_study_s_runs_and_the_number_of_seeds(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads(call(capsys, "study", "status", study, "--json")[1])
    runs = {(run["arm"], run["seed"]): run for run in told["runs"]}
    seeds = load_study("architecture-smoke").seeds
    assert runs["classic", seeds[0]]["status"] == "completed" and runs["rmsnorm", seeds[2]]["status"] == "waiting"
    power = json.loads(call(capsys, *CALLS["power"][0], "--json")[1])
    assert f"{power['seeds_alone']:,} seeds" in "\n".join(power["text"])
    row = next(row for row in power["detects"] if row["seeds"] == 10)
    assert any(line.split()[:2] == ["10", f"{row['alone']:.3g}"] for line in power["text"])


def test_what_was_found_is_written_though_the_rest_fails(tmp_path: Path) -> None:
    with pytest.raises(UserError), json_too(tmp_path / "x.json") as tell:
        tell({"value": math.nan, "more": [math.inf, 1.5]})
        raise UserError("the terminal is gone")
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"value": None, "more": [None, 1.5]}


def test_a_folder_is_no_file_and_a_launch_has_no_table(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = call(capsys, "runs", "--json", "results")
    assert status == 2 and "results is a folder; give a file name" in err
    status, _, err = call(capsys, "launch", "smoke-lm", "--on", "local", "--json")
    assert status == 2 and "`gptlab launch --status`" in err
