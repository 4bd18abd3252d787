"""Frontiers of speed and memory: which arms pay in one study and not in the other, and what noise does to equals."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from scipy import stats

from gptlab.report import frontiers
from gptlab.report.frontiers import Axis, Frontiers, depth

LEAST = (0.02, 0.02)
UNIT = np.log(1.02)


def test_depth_is_measured_in_thresholds() -> None:
    speed = np.array([[0.0, 0.0, 3.0, 3.0]])
    memory = np.array([[0.0, 0.5, -0.5, -3.0]])
    # 0: from 1 it gains 0.5, from 2 it gains 3 and loses 0.5, from 3 it gains 3 and loses 3
    # 1: from 2 it gains 3 and loses 1; 2: from 1 it gains 1 and loses 3; 3: from 2 it gains 2.5 and loses nothing
    assert depth(speed, memory).tolist() == [[0.5, 0.0, -1.0, 1.0]]
    assert depth(np.zeros((2, 1)), np.zeros((2, 1))).tolist() == [[-1.0], [-1.0]]


def test_depth_moves_no_faster_than_speed_and_memory() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        speed, memory = rng.normal(0, 3, (2, 1, 8))
        change = rng.uniform(-0.1, 0.1, (2, 1, 8))
        moved = depth(speed + change[0], memory + change[1])
        assert np.abs(moved - depth(speed, memory)).max() <= 0.2  # two arms move by a tenth


def study(
    speed: Sequence[float], memory: Sequence[float], sd: float, n: int, draw: np.random.Generator
) -> tuple[Axis, Axis]:
    """Speeds and memory of arms from their logarithms; memory is equal in all seeds, as on a real machine."""
    common = draw.normal(0, sd, n)
    rates = {
        str(i): {k: float(np.exp(s + common[k] + draw.normal(0, sd))) for k in range(n)} for i, s in enumerate(speed)
    }
    return rates, {str(i): dict.fromkeys(range(n), float(np.exp(m))) for i, m in enumerate(memory)}


def pair(
    speeds: tuple[Sequence[float], Sequence[float]],
    memory: tuple[Sequence[float], Sequence[float]],
    sd: float = 0.002,
    n: int = 3,
    seed: int = 0,
    draws: int = 1000,
) -> Frontiers:
    draw = np.random.default_rng(seed)
    return frontiers.frontiers(
        [study(s, m, sd, n, draw) for s, m in zip(speeds, memory, strict=True)], LEAST, draws=draws
    )


def test_an_arm_differs_where_a_gain_is_real() -> None:
    flat = [0.0, 0.0, 0.0]
    slower = pair(([0, 0.3, 0], [0, -0.3, 0]), (flat, flat))
    assert slower.differ == ["0", "1", "2"]  # where 1 is fast, the others are dominated
    assert [slower.pays("1", i) for i in (0, 1)] == [True, False] and not slower.alike
    assert [slower.pays("0", i) for i in (0, 1)] == [False, True]
    alike = pair(([0, 0.3, 0], [0, 0.2, 0]), (flat, flat))
    assert alike.differ == [] and alike.alike
    # a byte of memory decides nothing, nor does 0.3% of speed; copies of an arm pay as it does
    byte = pair(([0, 0.003, 0], [0, -0.003, 0]), ([0, -1e-9, 0.001], [0, 1e-9, -0.001]), sd=0.001)
    assert byte.differ == [] and byte.alike and all(byte.pays(arm, 0) for arm in byte.arms)
    trade = pair(([0, 0.1], [0, 0.1]), ([0, 0.1], [0, 0.0]))  # faster and heavier; faster and as light
    assert trade.differ == ["0"] and [trade.pays("1", i) for i in (0, 1)] == [True, True]


def test_what_is_not_known_of_both_is_left_out() -> None:
    draw = np.random.default_rng(0)
    one, two = (study([0, 0.3, 0.1], [0, 0, 0], 0.002, 3, draw) for _ in range(2))
    del two[1]["2"]
    assert frontiers.frontiers([one, two], LEAST).arms == ["0", "1"]
    assert frontiers.frontiers([({}, {}), two], LEAST).arms == []


def differing(
    draw: np.random.Generator, trials: int, sd: float, n: int, change: Mapping[str, float], spread: float
) -> int:
    """Pairs of studies of 19 arms that are said to differ."""
    found = 0
    for _ in range(trials):
        speed, memory = draw.normal(0, spread, (2, 19))
        if change.get("grid"):  # many ties, and differences of about a threshold
            speed, memory = np.round(speed / change["grid"]) * change["grid"], np.round(memory / UNIT) * UNIT
        moved = speed + change["speed"] * draw.normal(size=19), memory + change["memory"] * draw.normal(size=19)
        two = [study(s, m, sd, n, draw) for s, m in ((speed, memory), moved)]
        found += bool(frontiers.frontiers([two[0], two[1]], LEAST, draws=500).differ)
    return found


EQUAL = {"speed": 0.0, "memory": 0.0}
TINY = {"speed": 0.003, "memory": 0.001}


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("sd", [0.001, 0.003, 0.01, 0.03, 0.1])
@pytest.mark.parametrize(
    "change", [EQUAL, EQUAL | {"grid": UNIT}, EQUAL | {"grid": 1.5 * UNIT}, TINY, TINY | {"grid": UNIT}]
)
def test_equal_and_all_but_equal_tasks_differ_in_at_most_5_percent(
    change: Mapping[str, float], sd: float, n: int
) -> None:
    draw = np.random.default_rng(0)
    wrong = sum(differing(draw, 50, sd, n, change, spread) for spread in (0.03, 0.3))
    assert wrong <= stats.binom.ppf(0.999, 100, 0.05)


@pytest.mark.slow
def test_tasks_that_differ_are_found() -> None:
    change = {"speed": 0.3, "memory": 0.2}
    assert differing(np.random.default_rng(0), 100, 0.003, 3, change, 0.3) > 80


@pytest.mark.slow
@pytest.mark.parametrize("sd", [0.002, 0.01, 0.03])
def test_tasks_that_differ_by_no_more_than_the_gap_are_called_alike_in_at_most_5_percent(sd: float) -> None:
    """Arm 0 is half a threshold on the one side of the line in one task, and on the other side in the other."""
    trials = 400
    gain = (0.5 * UNIT, 1.5 * UNIT)
    rejected = 0
    for seed in range(trials):
        found = pair(([0, gain[0]], [0, gain[1]]), ([0, 0], [0, 0]), sd, seed=seed, draws=500)
        rejected += found.alike
    assert rejected <= stats.binom.ppf(0.999, trials, 0.05)
