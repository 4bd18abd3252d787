"""benchmarks/scaling.py: simulated failures against closed forms, the order of 10^13 tokens, synthetic runs."""

import importlib
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from gptlab.data.sampler import Windows
from gptlab.data.shards import Dataset
from gptlab.report.studies import read_study_folder
from gptlab.rundir import RunDir

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
HOUR = 3600.0


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("scaling")
    finally:
        sys.path.remove(str(BENCHMARKS))


# -- failures -------------------------------------------------------------------------------------------------------


def test_waste_is_as_worked_out_by_hand(script: ModuleType) -> None:
    # Without restart and write, and with cycles far shorter than the MTBF: stall / cycle, and half a cycle per failure
    assert script.expected_waste(100, 1, 0, 0, 1e6) == pytest.approx(1 / 101 + 50.5 / 1e6, rel=2e-2)
    # A cycle of ln 2 MTBFs succeeds every other time: the share interval / (M (2 - 1)) is kept
    assert script.expected_waste(math.log(2) * 1000, 0, 0, 0, 1000) == pytest.approx(1 - math.log(2))
    # A restart of ln 2 MTBFs succeeds every other time
    assert script.expected_waste(1e-3, 0, 0, math.log(2), 1.0) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(("stall", "write", "restart"), [(30, 0, 0), (5, 120, 0), (5, 0, 900), (20, 400, 600)])
@pytest.mark.parametrize("share", [0.5, 1, 2])
def test_simulated_failures_cost_what_the_formula_says(
    stall: float, write: float, restart: float, share: float, script: ModuleType
) -> None:
    mtbf, n = 4 * HOUR, 4000
    interval = share * script.daly(stall, mtbf)
    expected = script.expected_waste(interval, stall, write, restart, mtbf)
    simulated = script.simulate(interval, stall, write, restart, mtbf, n, seed=7)
    lost = expected - stall / (interval + stall)  # the cost of failures; its standard error falls as sqrt(n)
    assert simulated == pytest.approx(expected, abs=5 * lost / math.sqrt(n))


def test_a_write_longer_than_the_interval_holds_up_the_next_checkpoint(script: ModuleType) -> None:
    given = {"stall": 10, "write": 300, "restart": 0, "mtbf": 4 * HOUR}
    assert script.expected_waste(interval=100, **given) > 2 / 3  # two of three seconds are spent waiting
    simulated = script.simulate(interval=100, **given, failures=4000, seed=3)
    assert simulated == pytest.approx(script.expected_waste(interval=100, **given), abs=0.01)


@pytest.mark.parametrize("stall", [0.05, 7.5, 60, 600])
def test_daly_finds_the_least_waste_and_a_background_write_does_not_move_it(stall: float, script: ModuleType) -> None:
    mtbf = 14 * HOUR
    for write, restart in ((0, 0), (30, 600)):
        write = min(write, script.daly(stall, mtbf) / 4)

        def waste(log: float, write: float = write, restart: float = restart) -> float:
            return float(script.expected_waste(math.exp(log), stall, write, restart, mtbf))

        best = math.exp(minimize_scalar(waste, bounds=(0, math.log(10 * mtbf)), method="bounded").x)
        assert script.daly(stall, mtbf) == pytest.approx(best, rel=0.01)
        assert script.young(stall, mtbf) == pytest.approx(best, rel=0.15)


def test_the_simulation_has_its_least_waste_at_dalys_interval(script: ModuleType) -> None:
    stall, mtbf = 60.0, 4 * HOUR
    best = script.daly(stall, mtbf)
    wastes = [script.simulate(share * best, stall, 0, 0, mtbf, 20_000, seed=5) for share in (1 / 3, 1, 3)]
    assert wastes[1] < 0.75 * min(wastes[0], wastes[2])


# -- the order of the data ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def far(script: ModuleType) -> Windows:
    windows: Windows = script.far_windows()
    return windows


@given(st.integers(0, 2 * 10**6), st.sampled_from([1, 7, 640]), st.integers(1, 4096))
@settings(max_examples=15, deadline=None)
def test_ranks_cover_a_batch_of_ten_trillion_tokens_without_overlap(
    script: ModuleType, far: Windows, step: int, world: int, batch: int
) -> None:
    first = step * batch
    shares = [script.rows_of(rank, world, batch) for rank in range(world)]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    parts = [far.starts(np.arange(first + r.start, first + r.stop)) for r in shares if len(r)]
    starts = np.concatenate(parts)
    assert len(np.unique(starts)) == batch and starts.min() >= 0 and starts.max() + 1025 <= 10**13
    assert (starts % 1024 == 0).all()
    assert np.array_equal(starts, far.starts(np.arange(first, first + batch)))


# -- arithmetic -----------------------------------------------------------------------------------------------------


def test_exchanges_take_what_a_ring_takes(script: ModuleType) -> None:
    # 125 nodes: an all-reduce sends 1 GB twice through the eight NICs of every node, 400 GB/s together
    assert script.exchange_seconds(1e9, 2, 1000) == pytest.approx(2 * 1e9 * 124 / 125 / 400e9)
    assert script.exchange_seconds(1e9, 2, 8) == pytest.approx(2e9 / 450e9)  # one node uses NVLink only
    assert script.critical_batch(1.0) == 2e8 and script.critical_batch(3.0) == pytest.approx(1.07e6, rel=0.01)


# -- what is made up is read as the real thing ----------------------------------------------------------------------


def test_sparse_shards_are_a_dataset(script: ModuleType, tmp_path: Path) -> None:
    script.make_shards(tmp_path / "data", 3)
    data = Dataset(tmp_path / "data")
    assert len(data.train) == 3 * 10**8 and data.max_token()[0] == 50256
    used = sum(file.stat().st_blocks * 512 for file in (tmp_path / "data").iterdir())
    assert used < 10**6  # of apparently 800 MB


def test_a_made_up_study_is_read_without_complaint(script: ModuleType, tmp_path: Path) -> None:
    script.make_study(tmp_path / "study", arms=3, seeds=2, steps=500)
    read = read_study_folder(tmp_path / "study")
    assert read.warnings == [] and len(read.runs) == 6
    assert all(run.status == "completed" and len(run.curves["loss"][0]) == 50 for run in read.runs.values())


@pytest.mark.slow  # trains a run of one step
def test_made_up_lines_have_the_keys_of_a_run_that_was_trained(
    script: ModuleType, dataset: Path, tmp_path: Path
) -> None:
    from gptlab.config import load_recipe
    from gptlab.training.loop import train

    recipe = load_recipe("smoke-lm", {"data.path": str(dataset), "train.max_steps": 1, "model.vocab_size": 0})
    train(recipe, tmp_path / "run", quiet=True)
    trained = {frozenset(line) for line in RunDir(tmp_path / "run").read_metrics()}
    made_up = {frozenset(line) - {"mfu"} for line in script.metric_lines(10, 10, 10, seed=0)}  # no MFU on a CPU
    assert made_up == trained


def test_parts_print_tables_and_write_json(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "found.json"
    arguments = ["failures", "shards", "--failures", "50", "--mtbf-hours", "10", "--shards", "2", "--json", str(file)]
    found = script.main(arguments)
    assert json.loads(file.read_text(encoding="utf-8"))["shards"].keys() == {"1", "2"}
    assert found["failures"]["given, one rank writes 18.7 GB"]["mtbf_s"] == 10 * HOUR
    assert "failures" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        script.main(["failure"])
