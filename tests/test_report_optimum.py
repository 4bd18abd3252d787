"""Where a swept setting has its best value: against closed forms, by simulation, and what is refused."""

import math

import numpy as np
import pytest
from scipy import stats

from gptlab.report import optimum
from gptlab.report.optimum import NoOptimum, locate


def parabola(x):
    return x**2


def skewed(x):
    """Rising faster above than below, as losses over learning rates do."""
    return 2 * (np.exp(x) - x - 1)


def losses(draw, shape, values=5, seeds=3, sd=0.002, at=0.004, shift=0.0, cost=0.02):
    """Values a factor of two apart, losses with a minimum at `at`, and offsets of seeds."""
    offsets = draw.normal(size=seeds) * 5 * sd
    x = (np.arange(values) - (values - 1) / 2) * math.log(2) + shift
    rows = 3 + cost * shape(x)[:, None] + offsets + sd * draw.normal(size=(values, seeds))
    return {at * math.exp(a): dict(enumerate(row)) for a, row in zip(x.tolist(), rows.tolist(), strict=True)}


def test_an_exact_parabola() -> None:
    found = locate({v: {s: 3 + s + 0.5 * math.log(v / 3e-3) ** 2 for s in (0, 1)} for v in (1e-3, 2e-3, 4e-3, 8e-3)})
    assert found.value == pytest.approx(3e-3, rel=1e-4) and found.curvature == pytest.approx(0.5, rel=1e-3)
    assert found.loss == pytest.approx(3.5) and found.edge == ""
    assert math.isnan(found.low)  # no spread to take an interval from
    assert (found.best, found.values) == (4e-3, (1e-3, 2e-3, 4e-3, 8e-3))


def test_without_higher_powers_the_interval_is_that_of_fieller(monkeypatch) -> None:
    monkeypatch.setattr(optimum, "BENDS", (1e-6, 1e-6))
    draw = np.random.default_rng(2)
    rows = losses(draw, parabola, values=3, seeds=40, sd=0.02)
    found = locate(rows)
    x = np.log(np.repeat(list(rows), 40) / found.value)
    y = np.array([y for of in rows.values() for y in of.values()])
    seeds = np.tile(np.eye(40), (3, 1))
    columns = np.column_stack([x, x**2, seeds])
    theta = np.linalg.lstsq(columns, y, rcond=None)[0]
    assert math.exp(-theta[0] / theta[1] / 2) == pytest.approx(1, abs=1e-3)
    inverse = np.linalg.inv(columns.T @ columns)[:2, :2]
    s2 = ((y - columns @ theta) ** 2).sum() / (120 - 42)

    def squared_t(end):
        a = np.array([1, 2 * math.log(end / found.value)])
        return (a @ theta[:2]) ** 2 / (a @ inverse @ a * s2)

    assert [squared_t(found.low), squared_t(found.high)] == pytest.approx([stats.t.ppf(0.95, 78) ** 2] * 2, rel=0.01)


def test_offsets_of_seeds_do_not_count() -> None:
    rows = losses(np.random.default_rng(0), parabola)
    moved = {v: {s: y + 10 * s for s, y in of.items()} for v, of in rows.items()}
    a, b = locate(rows), locate(moved)
    assert (b.value, b.low, b.high) == pytest.approx((a.value, a.low, a.high), rel=1e-6)
    unpaired = locate(moved, paired=False)
    assert unpaired.high / max(unpaired.low, 1e-9) > 2 * a.high / a.low


def test_a_seed_that_some_values_lack() -> None:
    rows = losses(np.random.default_rng(1), parabola)
    first = next(iter(rows))
    part = {v: of if v != first else {0: of[0], 1: math.nan} for v, of in rows.items()}
    assert locate(part).value == pytest.approx(locate(rows).value, rel=0.2)


def test_a_minimum_at_the_edge_is_said() -> None:
    draw = np.random.default_rng(0)
    beyond = locate(losses(draw, parabola, shift=2.5 * math.log(2)))
    assert beyond.edge == "lowest" and beyond.best == beyond.values[0]
    assert locate(losses(draw, parabola, shift=-2.5 * math.log(2))).edge == "highest"
    assert locate(losses(draw, parabola)).edge == ""


def test_noise_that_hides_the_minimum_opens_the_interval() -> None:
    def bounded(draw, **how) -> bool:
        try:
            return locate(losses(draw, parabola, **how)).bounded
        except NoOptimum:  # noise made it concave
            return False

    draw = np.random.default_rng(0)
    assert sum(bounded(draw, sd=0.02, cost=0.002) for _ in range(20)) <= 8 and all(bounded(draw) for _ in range(5))


@pytest.mark.parametrize(
    "rows, says",
    [
        ({1e-3: {0: 3.0}, 2e-3: {0: 2.9}}, "takes 3 values with losses, and there are 2"),
        ({1e-3: {0: 3.0}, 2e-3: {0: 2.9}, 4e-3: {0: math.nan}}, "there are 2"),
        (
            {v: {0: 3 - x**2, 1: 4 - x**2 + 1e-4 * x} for x, v in ((-1, 1e-3), (0, 2e-3), (1, 4e-3))},
            "not convex: it is lowest at 0.001, add values below it",
        ),
    ],
)
def test_what_has_no_optimum(rows, says) -> None:
    with pytest.raises(NoOptimum, match=says):
        locate(rows)


def test_one_seed_of_three_values_has_no_interval() -> None:
    found = locate({1e-3: {0: 3.1}, 2e-3: {0: 3.0}, 4e-3: {0: 3.1}})
    assert found.value == pytest.approx(2e-3, rel=1e-3) and math.isnan(found.low) and math.isnan(found.loss_low)


def covered(studies, shape, **how):
    """Shares of intervals that hold, of the place and of the loss there; a study without an optimum has none."""
    draw, inside, at_loss, refused = np.random.default_rng(0), 0, 0, 0
    for _ in range(studies):
        try:
            found = locate(losses(draw, shape, shift=draw.uniform(-0.7, 0.7), **how))
        except NoOptimum:
            refused += 1
            continue
        inside += found.low <= 0.004 <= found.high
        at_loss += found.loss_low <= 3 <= found.loss_high
    assert refused <= 0.03 * studies
    return inside / (studies - refused), at_loss / (studies - refused)


def test_intervals_hold() -> None:
    place, loss = covered(20, skewed)
    assert place >= 0.65 and loss >= 0.65  # 99.9% of draws at 90%


@pytest.mark.slow
@pytest.mark.parametrize("shape", [parabola, skewed])
@pytest.mark.parametrize(
    "how", [{}, {"values": 3}, {"sd": 0.01}, {"values": 7, "sd": 0.0005}, {"seeds": 2, "sd": 0.005}]
)
def test_nine_of_ten_intervals_hold(shape, how) -> None:
    """A parabola alone would hold in 54 to 80% where the losses are skewed."""
    assert covered(100, shape, **how)[0] >= 0.83
