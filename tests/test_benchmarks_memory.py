"""benchmarks/memory.py on a CPU: its predictions hold."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("memory")


def test_counts_are_those_of_gpt2(memory: ModuleType, tmp_path: Path) -> None:
    c = memory.count(memory.SHAPES["gpt2"])
    assert c.all == 50304 * 768 + 1024 * 768 + 12 * (12 * 768**2 + 13 * 768) + 2 * 768
    assert c.blocks == 84_934_656
    nothing = memory.main(["--sizes", "--only", "none", "--out", str(tmp_path / "memory.json")])
    shares = {row["name"]: row["of_the_weights"] for row in nothing["masks"]}
    assert shares["float32 masks + scores (2x)"] == 2 and shares["torch.bool masks (0.25x)"] == 0.25
    assert round(shares["packed masks (0.03x)"], 2) == 0.03


@pytest.mark.parametrize(
    "words", [["amsgrad", "normuon", "sgd", "movement", "magnitude"], pytest.param([""], marks=pytest.mark.slow)]
)
def test_every_row_is_measured_as_predicted(
    words: list[str], memory: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "memory.json"
    rows = memory.main(["--sizes", "small", "--only", *words, "--device", "cpu", "--out", str(out)])["rows"]
    assert len(rows) == (len(memory.ROWS) if words == [""] else 7)
    for row in rows:
        if "small" not in row["measured"]:  # the 8-bit library is missing
            assert row["name"] == "adamw_8bit" and row["reason"]
            continue
        got, said = row["measured"]["small"], row["predicted"]["small"]
        for part in memory.PARTS:  # plus kilobytes for steps, norms and tables
            assert said[part] <= got[part] <= said[part] + 5000, (row["name"], part)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 + len(rows) + 4 and len({line.count("|") for line in printed}) == 1
    assert json.loads(out.read_text(encoding="utf-8"))["rows"] == rows
