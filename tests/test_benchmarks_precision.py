"""benchmarks/precision_gpu.py on a CPU: what is measured again and what is not, the table, and a whole tiny run."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gptlab.config import load_study

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("precision_gpu")


def timed(arm: str, rate: float | None, device: str = "GPU A", **more: Any) -> dict[str, Any]:
    row = {"kind": "time", "arm": arm, "timed": 60, "round": 1, "device": device, "torch": "2", "settings": {}}
    ended = {"status": "completed", "seconds": 50.0, "losses": [[1, 9.0], [70, 8.0]], "steady": True}
    speed = {"tokens_per_second": rate, "time_per_iter_ms": 1000.0} if rate else {}
    return row | ended | speed | more


def table(capsys: pytest.CaptureFixture[str]) -> list[dict[str, str]]:
    """The lines of the throughput tables that were printed, by heading."""
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines() if "|" in line
    ]
    start = [i for i, row in enumerate(rows) if row[:2] == ["arm", "steps"]]
    return [
        dict(zip(rows[start[0]], row, strict=True))
        for row in rows
        if len(row) == len(rows[start[0]]) and row[1][:1].isdigit()
    ]


def test_ratios_are_to_the_reference_of_the_same_device_steps_and_round(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        timed("amp_bf16", 300.0),
        timed("amp_bf16", 330.0, timed=300),
        timed("amp_bf16", 320.0, round=2),
        timed("amp_bf16", 999.0, device="GPU B"),
        timed("fp16_naive", 7.0, status="diverged", steady=False, failed_at_step=3, reason="the loss is nan"),
        timed("bf16_kahan", 250.0, losses=[[1, 9.0], [70, 9.1]]),
        timed("fp32_tf32_matmul", 200.0),
        timed("fp32_baseline", 100.0),
        timed("fp32_baseline", 80.0, round=2),
    ]
    (tmp_path / "planted.json").write_text(json.dumps({"rows": rows}))
    assert script.main(["--table", str(tmp_path / "planted.json")]) == 0
    lines = table(capsys)
    short = {(line["arm"], line["steps"], line["tokens/s"]): (line["x fp32"], line["x TF32"]) for line in lines}
    assert short == {
        ("amp_bf16", "60", "300"): ("3.00", "1.50"),
        ("fp16_naive", "60", "(7)"): ("", ""),  # it ended while it compiled
        ("bf16_kahan", "60", "250"): ("2.50", "1.25"),
        ("fp32_tf32_matmul", "60", "200"): ("2.00", "1.00"),
        ("fp32_baseline", "60", "100"): ("1.00", "0.50"),
        ("amp_bf16", "60 (round 2)", "320"): ("4.00", "1.60*"),
        ("fp32_baseline", "60 (round 2)", "80"): ("1.00", "0.40*"),
        ("amp_bf16", "300", "330"): ("3.30*", "1.65*"),
        ("amp_bf16", "60", "999"): ("", ""),  # the other GPU has no reference
    }
    first = next(line for line in lines if line["tokens/s"] == "300")
    assert (first["plan"], first["x fp32 / plan"], first["x TF32 / plan"]) == ("2.0", "1.50", "0.75")
    status = {line["arm"]: line["status"] for line in lines}
    assert status["fp16_naive"] == "diverged at step 3: the loss is nan"
    assert "did not fall" in status["bf16_kahan"] and status["fp32_baseline"] == "completed"


def test_a_call_does_what_is_missing_and_nothing_twice(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "work" / "data").mkdir(parents=True)
    (tmp_path / "work" / "data" / "manifest.json").write_text("{}")
    done: list[tuple[str, str, int]] = []
    device, fails = "GPU A", {"bf16_pure"}

    def launch(job: dict[str, Any], folder: Path, seconds: float) -> dict[str, Any]:
        if job["kind"] == "where":
            return {"device": device, "torch": "2"}
        done.append((job["kind"], job["arm"], job["timed"]))
        if job["kind"] != "time":
            return {"status": "completed", "arms": {}, "seconds": 1.0}
        if job["arm"] in fails:
            return {"status": "failed", "reason": "a fault", "seconds": 1.0}
        return timed(job["arm"], 5.0, timed=job["timed"], round=job["round"], device=device)

    def call(out: str, *more: str) -> int:
        done.clear()
        return script.main(["--out", str(tmp_path / out), "--work", str(tmp_path / "work"), *more])

    monkeypatch.setattr(script, "launch", launch)
    assert call("a.json") == 1
    arms = list(load_study("precision-lm").arms)
    assert [arm for kind, arm, steps in done[1:20]] == [*arms[1:], "fp32_baseline"]  # the slowest last
    assert done[0][0] == "check" and done[0][1].split() == [*arms[1:], "fp32_baseline"]
    core = ["amp_fp16", "amp_bf16", "bf16_pure", "fp32_baseline"]
    assert [arm for kind, arm, steps in done if steps == 300] == core
    assert [arm for kind, arm, steps in done if kind == "profile"] == ["amp_bf16", "bf16_pure"]
    assert [arm for kind, arm, steps in done[26:]] == ["fp32_baseline", "fp32_tf32_matmul", *core[2::-1]]

    fails.clear()
    assert call("a.json") == 0
    assert done == [("time", "bf16_pure", 60), ("time", "bf16_pure", 300), ("time", "bf16_pure", 60)]
    assert call("a.json") == 0 and done == []
    assert call("b.json", "--resume-from", str(tmp_path / "a.json")) == 0 and done == []
    assert (
        json.loads((tmp_path / "b.json").read_text())["rows"] == json.loads((tmp_path / "a.json").read_text())["rows"]
    )
    device = "GPU B"
    assert call("b.json", "--resume-from", str(tmp_path / "a.json"), "--arms", "bf16_kahan") == 0
    assert done == [("check", "bf16_kahan", 0), ("time", "bf16_kahan", 60)]
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert {row["device"] for row in rows if row["arm"] == "bf16_kahan"} == {"GPU A", "GPU B"}
    device = "GPU A"
    assert call("a.json", "--long-steps", "400", "--budget-seconds", "100") == 0 and done == []  # 50 s and 340 more
    assert "another call" in capsys.readouterr().err
    assert call("new.json", "--budget-seconds", "0") == 0 and done == []


@pytest.mark.slow  # a process an arm
def test_a_tiny_run_on_a_cpu(tmp_path: Path) -> None:
    arms = ["bf16_pure", "fp16_naive_foreach", "fp32_tf32_matmul", "fp32_baseline"]
    files = ["--out", str(tmp_path / "out.json"), "--work", str(tmp_path / "work")]
    command = [sys.executable, str(BENCHMARKS / "precision_gpu.py"), "--tiny", "--train.device", "cpu", *files]
    command += ["--long-steps", "0", "--rounds", "1", "--arms", *arms]

    def call() -> dict[str, Any]:
        subprocess.run(
            command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300
        )
        return json.loads((tmp_path / "out.json").read_text())

    content = call()
    rows = {(row["kind"], row["arm"]): row for row in content["rows"]}
    status = {arm: row["status"] for (kind, arm), row in rows.items() if kind == "time"}
    assert status == {
        "bf16_pure": "completed", "fp16_naive_foreach": "diverged", "fp32_tf32_matmul": "not_applicable",
        "fp32_baseline": "completed",
    }  # fmt: skip
    for arm in ("bf16_pure", "fp32_baseline"):
        row = rows["time", arm]
        assert (
            row["timed_steps"] == 12
            and row["steps"] == 22
            and row["steady"]
            and row["losses"][-1][1] < row["losses"][0][1]
        )
        assert row["step_ms"]["p5"] <= row["step_ms"]["p50"] <= row["step_ms"]["p95"]
        assert row["step_ms"]["p95"] == pytest.approx(row["time_per_iter_p95_ms"])
        assert row["tokens_per_second"] == pytest.approx(512 * 1000 / row["time_per_iter_ms"])
    assert (
        not rows["time", "fp16_naive_foreach"]["steady"] and rows["time", "fp16_naive_foreach"]["failed_at_step"] == 1
    )
    (checked,) = [row for (kind, _), row in rows.items() if kind == "check"]
    assert checked["problems"] == [] and checked["arms"]["bf16_pure"]["stored"] == "bfloat16"
    assert checked["arms"]["fp32_baseline"]["multiplied"] == "float32"
    kernels = rows["profile", "bf16_pure"]["kernels"]
    assert 0 < len(kernels) <= 15 and kernels[0]["ms"] >= kernels[-1]["ms"] >= 0
    by_arm = {line["arm"]: line for line in content["table"]}
    ratio = rows["time", "bf16_pure"]["tokens_per_second"] / rows["time", "fp32_baseline"]["tokens_per_second"]
    assert by_arm["bf16_pure"]["x_fp32_of_plan"] == pytest.approx(ratio / 2.1)
    assert call()["rows"] == content["rows"]  # times and all: nothing ran again
