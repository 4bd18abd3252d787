"""benchmarks/optimizers_gpu.py and benchmarks/memory.py on a CPU: the check finds faults, the predictions hold."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from gptlab.config import Optim
from gptlab.optim.optimizers import make_optimizer

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
CPU = torch.device("cpu")
PRUNES = ("magnitude", "movement", "rigl", "2:4", "adamw-prune")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("optimizers_gpu")


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("memory")


# -- the check ------------------------------------------------------------------------------------------------------


def test_what_is_right_passes_the_check(script: ModuleType) -> None:
    names = ["adamw-spam seed", "adamw-prune bitter0", "muon", "rigl", "2:4"]
    found = script.check(CPU, names)
    assert list(found) == names
    for name, row in found.items():
        assert row["problems"] == [] and 0 < row["error"] < 1e-4, name
    n = 2 * 12 * 64 * 64  # the blocks' matrices
    assert found["2:4"]["masked"] == found["rigl"]["masked"] == n // 2
    assert 0.499 < found["adamw-prune bitter0"]["masked"] / n < 0.5  # near the end of the ramp


def test_a_wrong_optimizer_and_wrong_masks_are_found(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: torch.nn.Module, optim: Optim, seed: int) -> torch.optim.Optimizer:
        if next(model.parameters()).dtype is torch.float32:
            optim = optim.model_copy(update={"betas": (0.9, 0.96)})
        return make_optimizer(model, optim, seed)

    with monkeypatch.context() as patch:
        patch.setattr(script, "make_optimizer", wrong)
        assert "off float64's" in script.check(CPU, ["adamw"])["adamw"]["problems"][0]

    class Lazy(script.Pruner):  # type: ignore[name-defined,misc]
        def after_update(self, step: int) -> None:
            if next(iter(self.parameters.values())).dtype is not torch.float32:
                super().after_update(step)

    monkeypatch.setattr(script, "Pruner", Lazy)
    problems = script.check(CPU, ["magnitude"])["magnitude"]["problems"]
    assert any("0 weights are masked, not" in problem for problem in problems)
    assert any("of the masks are not float64's" in problem for problem in problems)


# -- memory ---------------------------------------------------------------------------------------------------------


def test_counts_are_those_of_gpt2(memory: ModuleType, tmp_path: Path) -> None:
    c = memory.count(memory.SHAPES["gpt2"])
    assert c.all == 50304 * 768 + 1024 * 768 + 12 * (12 * 768**2 + 13 * 768) + 2 * 768
    assert c.blocks == 84_934_656
    nothing = memory.main(["--sizes", "--only", "none", "--out", str(tmp_path / "memory.json")])
    shares = {row["name"]: row["of_the_weights"] for row in nothing["masks"]}
    assert shares["float32 masks + scores (2x)"] == 2 and shares["torch.bool masks (0.25x)"] == 0.25
    assert round(shares["packed masks (0.03x)"], 2) == 0.03


@pytest.mark.parametrize(
    "words", [["amsgrad", "muon", "sgd", "movement", "magnitude"], pytest.param([""], marks=pytest.mark.slow)]
)
def test_every_row_is_measured_as_predicted(
    words: list[str], memory: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "memory.json"
    rows = memory.main(["--sizes", "small", "--only", *words, "--device", "cpu", "--out", str(out)])["rows"]
    assert len(rows) == (len(memory.ROWS) if words == [""] else 7)
    for row in rows:
        if "small" not in row["measured"]:  # no library for 8 bits
            assert row["name"] == "adamw_8bit" and row["reason"]
            continue
        got, said = row["measured"]["small"], row["predicted"]["small"]
        for part in memory.PARTS:  # beside it: steps, norms and tables of kilobytes
            assert said[part] <= got[part] <= said[part] + 5000, (row["name"], part)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 + len(rows) + 4 and len({line.count("|") for line in printed}) == 1
    assert json.loads(out.read_text())["rows"] == rows


# -- all of it ------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # every variant is made and stepped, and three runs are trained
def test_a_smoke_run_on_a_cpu(dataset: Path, tmp_path: Path) -> None:
    files = ["--data", str(dataset), "--out", str(tmp_path / "out.json"), "--work", str(tmp_path / "work")]
    command = [sys.executable, str(BENCHMARKS / "optimizers_gpu.py"), "--smoke", "--device", "cpu", *files]

    def call() -> dict[str, Any]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, capture_output=True, env=environment, timeout=300)
        content: dict[str, Any] = json.loads((tmp_path / "out.json").read_text())
        return content

    content = call()
    assert content["left_out"] == [] and len(content["check"]) == len(content["steps"]) == 17
    done = {name: row for name, row in content["steps"].items() if row["status"] == "completed"}
    for name, row in done.items():
        assert 0 < row["update_ms"]["median"] < row["step_ms"]["median"]
        assert ("change_ms" in row) == name.startswith(PRUNES), name
        assert ("met" in row) == name.startswith(("adamw-spam", "adamw-prune"))
    assert done["adamw"]["overhead_percent"] == {"median": 0, "min": 0, "max": 0}
    slowest = max(done, key=lambda name: done[name]["update_ms"]["median"])
    assert content["profile"]["variant"] == slowest and 0 < len(content["profile"]["kernels"]) <= 15
    for row in content["train"].values():
        assert row["status"] == "completed" and row["steps"] == 12
        assert row["val_losses"][-1][1] < row["val_losses"][0][1]
    assert call() | {"machine": 0} == content | {"machine": 0}  # times and all: nothing ran again
