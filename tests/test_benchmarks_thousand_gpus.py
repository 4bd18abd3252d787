"""benchmarks/thousand_gpus.py: simulated failures against closed forms, and arithmetic."""

import importlib
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
from scipy.optimize import minimize_scalar

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
HOUR = 3600.0


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("thousand_gpus")
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


# -- arithmetic -----------------------------------------------------------------------------------------------------


def test_exchanges_take_what_a_ring_takes(script: ModuleType) -> None:
    # 125 nodes: an all-reduce sends 1 GB twice through the eight NICs of every node, 400 GB/s together
    assert script.exchange_seconds(1e9, 2, 1000) == pytest.approx(2 * 1e9 * 124 / 125 / 400e9)
    assert script.exchange_seconds(1e9, 2, 8) == pytest.approx(2e9 / 450e9)  # one node uses NVLink only
    assert script.critical_batch(1.0) == 2e8 and script.critical_batch(3.0) == pytest.approx(1.07e6, rel=0.01)


def test_parts_print_tables_and_write_json(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "found.json"
    found = script.main(["failures", "--failures", "50", "--mtbf-hours", "10", "--json", str(file)])
    assert json.loads(file.read_text(encoding="utf-8"))["failures"] == found["failures"]
    assert found["failures"]["given, one rank writes 18.7 GB"]["mtbf_s"] == 10 * HOUR
    assert "failures" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        script.main(["failure"])
