"""The guard on logged curves: as on a run's own losses, at the log's steps, and on few of them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
from logged import decay, log_run
from test_guard import FAMILIES, RISES, diverging, evaluated, healthy, low_start, upper_bound, watch, wild

from gptlab.guard import Divergence
from gptlab.logs import divergence
from gptlab.logs.divergence import diverged, of_losses
from gptlab.logs.run import Curve

Losses = tuple[list[float], dict[int, float]]
FLAT = [3.21] * 411


def known_curves(seeds: int, families: range) -> Iterator[Losses]:
    """Those of tests/test_guard.py: healthy, evaluated, diverging in each way, jumping at the start, wild."""
    for family in families:
        losses, _, _, held_out = healthy(family, 0, 300, 900)
        yield losses, held_out
        losses, _, held_out = evaluated(family, 0)
        yield losses, held_out
    for seed in range(seeds):
        for rise in RISES:
            yield diverging(rise, seed)[0], {}
        for at in (2, 3, 5, 10, 40):
            yield low_start(at, 2.0, seed)[0], {}
        losses, _, _, held_out = wild(seed)
        yield losses, held_out


def curve_of(losses: list[float], every: int = 1) -> Curve:
    return every * np.arange(1.0, len(losses) + 1), np.array(losses)


def held_out_of(losses: dict[int, float]) -> Curve:
    return np.array(sorted(losses), dtype=float), np.array([losses[step] for step in sorted(losses)])


def check_equal(seeds: int, families: range) -> None:
    found = 0
    for losses, held_out in known_curves(seeds, families):
        whole = watch(losses, None, None, held_out)
        assert of_losses(curve_of(losses), held_out_of(held_out)) == (whole[1] if whole else None)
        found += whole is not None
    assert found > 8 * seeds


def test_the_verdict_is_that_of_the_guard_on_every_known_curve() -> None:
    check_equal(3, range(0, len(FAMILIES), 3))


@pytest.mark.slow
def test_the_verdict_is_that_of_the_guard_on_many_curves() -> None:
    check_equal(100, range(len(FAMILIES)))


def sparse_alarms(families: range, seeds: range, every: int) -> list[str]:
    """Healthy curves of which each k-th loss was logged, or the mean of k; and evaluated ones, overfitting or not."""
    alarms = []
    for family in families:
        for seed in seeds:
            for part, (losses, held_out) in {
                "healthy": healthy(family, seed, 100 * every, 600 * every)[::3],
                "evaluated": evaluated(family, seed)[::2],
            }.items():
                blocks = np.array(losses[: len(losses) // every * every]).reshape(-1, every)
                for name, few in (("kept", blocks[:, -1]), ("mean", blocks.mean(axis=1))):
                    if found := of_losses(curve_of(few.tolist(), every), held_out_of(held_out)):
                        alarms.append(f"{part} {name} {family} {seed}: {found}")
    return alarms


def test_sparse_curves_of_healthy_runs_pass() -> None:
    assert sparse_alarms(range(0, len(FAMILIES), 3), range(1), 5) == []


@pytest.mark.slow
@pytest.mark.parametrize("every", [5, 20, 100])
def test_fewer_than_two_false_alarms_in_a_thousand_sparse_curves(every: int) -> None:
    alarms = sparse_alarms(range(len(FAMILIES)), range(100, 115), every)
    assert upper_bound(len(alarms), 15 * len(FAMILIES)) < 2e-3, alarms  # of 3,600 of each


def test_a_rise_has_the_steps_of_the_log() -> None:
    losses = FLAT + [7.65] * 100
    run = log_run("a", 0, train_loss=curve_of(losses, 25))
    reason = "the training loss rose from 3.21 to 7.65 at step 10300 and stayed up for 926 steps"
    assert diverged(run, "val_loss") == Divergence(10300, "spike", reason)
    run.curves = {"Loss/train": run.curves["train_loss"], "lr": run.curves["train_loss"]}
    assert diverged(run, "val_loss") == Divergence(10300, "spike", reason)
    run.form = "gptlab"
    assert diverged(run, "val_loss") is None  # it has been judged update by update


def test_held_out_losses_are_evaluations() -> None:
    losses = curve_of([*[3.2] * 300, *[4.2] * 100], 10)
    at = np.array([0.0, 3000, 4000])
    found = diverged(log_run("a", 0, loss=losses, eval_loss=(at, [3.2, 3.2, 4.3])), "eval_loss")
    assert found is not None
    assert (found.step, found.kind) == (4000, "spike")
    assert found.reason.startswith("the held-out loss rose from 3.2 to 4.3 by step 4000")
    assert diverged(log_run("a", 0, loss=losses, eval_loss=(at, [3.2, 3.2, 3.9])), "eval_loss") is None
    alone = log_run("a", 0, eval_loss=(np.arange(100.0), np.where(np.arange(100) > 40, 9.0, 3.0)))
    assert diverged(alone, "eval_loss") is None  # it may overfit


def test_a_loss_that_is_never_finite_again() -> None:
    steps, losses = np.arange(1.0, 101), np.full(100, 3.0)
    losses[[20, 90]] = math.nan
    run = log_run("a", 0, loss=(steps, losses), val_loss=([50, 100], [3.0, 3.0]))
    assert diverged(run, "val_loss") is None  # missing, or skipped updates
    losses[60:] = math.inf
    run = log_run("a", 0, loss=(steps, losses), val_loss=([50, 100], [3.0, math.nan]), grad_norm=([100], [math.nan]))
    reason = "loss is inf at step 61, and not finite after it"
    assert diverged(run, "val_loss") == Divergence(61, "non_finite", reason)
    run = log_run("a", 0, val_loss=([50, 100], [math.nan, math.nan]))
    assert diverged(run, "val_loss") == Divergence(
        50, "non_finite", "val_loss is nan at step 50, and not finite after it"
    )
    risen = log_run("a", 0, loss=(np.arange(520), [*FLAT, *[7.65] * 100, *[math.nan] * 9]))
    assert (diverged(risen, "val_loss") or pytest.fail("missed")).kind == "spike"  # which came first


def test_what_the_guard_does_not_judge() -> None:
    density = log_run("a", 0, loss=(np.arange(300), np.where(np.arange(300) > 150, 5.0, -3.0)))
    assert diverged(density, "loss") is None
    assert diverged(log_run("a", 0), "loss") is None
    assert diverged(log_run("a", 0, loss=([], []), val_loss=([], [])), "val_loss") is None
    assert diverged(log_run("a", 0, accuracy=([1, 2], [0.5, 0.6])), "accuracy") is None


def test_a_run_that_its_log_calls_diverged() -> None:
    run = log_run("a", 0, loss=([10, 20], [3.0, 3.1]))
    run.status = "diverged"
    assert diverged(run, "loss") == Divergence(20, "unknown", "its log says so")
    run.form, run.result = "gptlab", {"failed_at_step": 12, "failure": "spike", "reason": "the training loss rose"}
    assert diverged(run, "loss") == Divergence(12, "spike", "the training loss rose")


@pytest.mark.parametrize("noise", [0.01, 0.1])
def test_most_curves_are_not_fed_to_the_guard(noise: float, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, at = np.random.default_rng(0), np.arange(1.0, 10_001)
    base = decay(at / 10_000, 10_000, 10.8, 3.0, 20.0, 0.1)
    runs = [log_run("a", seed, loss=(at, base * (1 + noise * draw.normal(size=len(at))))) for seed in range(100)]
    fed: list[int] = []
    monkeypatch.setattr(divergence, "Logged", lambda steps: fed.append(1))
    assert [diverged(run, "loss") for run in runs] == [None] * 100
    assert fed == []
