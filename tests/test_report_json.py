"""`study report --json`: all that the page has, in rows that name their study."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_report_analysis import made, make_study, noise, shifted, write_study

from gptlab.cli import main
from gptlab.config import Comparison
from gptlab.report.analysis import analyse
from gptlab.report.as_json import as_json

VERDICTS = {"better", "worse", "equivalent", "not resolved", "diverges", "not run"}
RENAMED = {"name": "arm", "mean": "difference", "p_holm": "p_adjusted"}


def payload() -> dict[str, Any]:
    """Two studies with every verdict, and a comparison of them."""
    rng = np.random.default_rng(0)
    base = noise(rng, 5)
    values: dict[str, Any] = {
        "base": base,
        "better": shifted(base, -0.05, rng),
        "worse": shifted(base, 0.05, rng),
        "same": shifted(base, 0.0, rng),
        "open": shifted(base, 0.02, rng, 0.05),
        "dead": base,
        "none": [None] * 5,
    }
    question = {"id": "Q", "claim": "c", "contrast": ["better", "base"], "confirmed_if": "better"}
    against_dead = {"id": "D", "claim": "c", "contrast": ["same", "dead"], "confirmed_if": "better"}
    one, two = (
        made(values, diverged=[("dead", k) for k in range(4)], name=name, questions=[question, against_dead])
        for name in ("one", "two")
    )
    across = {"name": "both", "compare": ["one", "two"]}
    across |= {"questions": [{**question, "confirmed_if": "better in one, better in two"}]}
    return analyse([one, two], Comparison.model_validate(across)) | {"gptlab": "0", "command": "c"}


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from leaves(inner)
    else:
        yield value


def test_the_shape_is_the_one_that_programs_rely_on() -> None:
    report = as_json(payload())
    assert list(report)[:3] == ["arms", "comparisons", "questions"] and report["warnings"] == []
    for arm in report["arms"]:
        assert list(arm)[:7] == ["study", "arm", "n", "mean", "sd", "low", "high"]
    first = ["study", "a", "b", "question", "asked_in", "difference", "low", "high", "p", "p_adjusted", "verdict"]
    keys = {tuple(row) for row in report["comparisons"]}
    assert len(keys) == 1 and list(*keys)[: len(first)] == first
    found = {(row["a"], row["b"]): row["verdict"] for row in report["comparisons"] if row["study"] == "one"}
    assert set(found.values()) == VERDICTS
    assert found == {
        ("better", "base"): "better",
        ("worse", "base"): "worse",
        ("same", "base"): "equivalent",
        ("open", "base"): "not resolved",
        ("dead", "base"): "diverges",
        ("none", "base"): "not run",
        ("same", "dead"): "not resolved",
    }
    (dead,) = [row for row in report["comparisons"] if row["b"] == "dead" and row["study"] == "one"]
    assert dead["reference_diverged"] == [4, 5] and dead["diverged"] == [0, 5]
    asked = [
        (row["study"], row["question"], row["asked_in"]) for row in report["comparisons"] if row["question"] == "Q"
    ]
    assert asked == [("one", "Q", "one"), ("two", "Q", "two"), ("one", "Q", "both"), ("two", "Q", "both")]
    assert [(q["study"], q["id"]) for q in report["questions"]] == [
        ("one", "Q"), ("one", "D"), ("two", "Q"), ("two", "D"), ("both", "Q"),
    ]  # fmt: skip


def test_nothing_that_the_page_has_is_left_out() -> None:
    shown = payload()
    for study in shown["studies"]:  # whatever other modules add to a study
        study["added"] = {"by": [study["name"], 0.1 + 0.2]}
    report = as_json(shown)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    kept = {json.dumps(leaf) for leaf in leaves(report)}
    renamed = {json.dumps("reference diverges")}
    assert {json.dumps(leaf) for leaf in leaves(shown)} - renamed <= kept
    for study, rest in zip(shown["studies"], report["studies"], strict=True):
        mine = {
            key: [row for row in report[key] if row["study"] == study["name"]] for key in ("arms", "runs", "failures")
        }
        for key, value in study.items():
            if key in ("runs", "failures", "recommendations"):
                assert [row for row in report[key] if row["study"] == study["name"]] == [
                    {"study": study["name"], **row} for row in value
                ]
            elif key not in ("arms", "questions"):
                assert rest[key] == value
        for arm, row in zip(study["arms"], mine["arms"], strict=True):
            assert arm.keys() - {"name", "quality", "comparison"} <= row.keys()
            assert (row["n"], row["mean"]) == ((q := arm["quality"] or {}).get("n", 0), q.get("mean"))
    rows = [arm["comparison"] for study in shown["studies"] for arm in study["arms"] if arm["comparison"]]
    for row, told in zip(rows, report["comparisons"], strict=False):
        for key, value in row.items():
            changed = key == "verdict" and value == "reference diverges"
            assert told[RENAMED.get(key, key)] == ("not resolved" if changed else value)


def test_it_is_written_to_a_file_or_to_the_standard_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gptlab.report.write.draw_report", lambda *_: [])  # it takes seconds
    write_study(tmp_path / "results/made", make_study(["base", "x"]))
    told = []
    for where in ("-", "new/report.json"):
        with pytest.raises(SystemExit) as end:
            main(["study", "report", "results/made", "--json", where])
        assert end.value.code == 0
        out, err = capsys.readouterr()
        assert ("page: " in err) == (where == "-") and ("page: " in out) == (where != "-")
        told.append(json.loads(out if where == "-" else (tmp_path / where).read_text(encoding="utf-8")))
        told[-1].pop("command")
    assert told[0] == told[1] and [arm["arm"] for arm in told[0]["arms"]] == ["base", "x"]
    assert told[0]["arms"][0]["n"] == 3 and math.isfinite(told[0]["comparisons"][0]["p_adjusted"])
    with pytest.raises(SystemExit) as end:
        main(["study", "report", "results/made", "--json", "results"])
    assert end.value.code == 2 and "results is a folder; give a file name" in capsys.readouterr().err
