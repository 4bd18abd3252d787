"""Reports of very many arms: the work grows with the arms, not with their square, and memory stays bounded.

Calls of Python functions are counted, and no seconds: the counts are the same on any machine.
"""

import itertools
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptlab.config import Study
from gptlab.report import detection, noise, rankings
from gptlab.report import statistics as st
from gptlab.report.analysis import analyse
from gptlab.report.curves import thin
from gptlab.report.figures import report_figures
from gptlab.report.studies import ReadRun, ReadStudy


def made(
    arms: int, seeds: int = 4, variances: str = "shrunk", lost: int = 0, copies: int = 0, gaps: int = 0
) -> ReadStudy:
    """A study with speeds and curves, of arms of which some have diverged runs, are copies, or lack a run."""
    rng = np.random.default_rng(arms)
    names = [f"a{i}" for i in range(arms)]
    content: dict[str, Any] = {"name": "made", "recipe": {}, "arms": {name: {} for name in names}, "baseline": "a0"}
    content |= {"metric": {"margin": 0.01}, "seeds": [*range(seeds)], "variances": variances}
    values = 3 + rng.normal(0, 0.02, (arms, 1)) + rng.normal(0, 0.02, seeds) + rng.normal(0, 0.01, (arms, seeds))
    values[1 : 1 + copies] = values[0] + 0.25 * np.arange(copies)[:, None]
    runs, steps = {}, np.arange(1.0, 61)
    for i, seed in itertools.product(range(arms), range(seeds)):
        if arms - gaps <= i and seed == i % seeds:
            continue
        status = "diverged" if 2 <= i - copies < 2 + lost and seed == 0 else "completed"
        result = {"status": status, "steps": 60, "peak_memory_gb": 10.0 + i % 3, "tokens_per_second": 1e3}
        if status == "completed":
            result["final_val_loss"] = float(values[i, seed])
        speeds = 1e3 * (1 + i / arms) * np.exp(0.01 * rng.standard_normal(60))
        losses = values[i, seed] + 5 / steps
        curves = {"loss": (steps, losses), "val_loss": (steps[::6], losses[::6]), "tokens_per_second": (steps, speeds)}
        runs[names[i], seed] = ReadRun(names[i], seed, Path(f"{names[i]}_seed{seed}"), status, result, curves)
    return ReadStudy(Study.model_validate(content), Path("results/made"), runs, [])


def calls_of(function: Callable[[], object]) -> int:
    """How many calls of Python functions and of built-in ones a function makes."""
    count = 0

    def seen(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(seen)
    try:
        function()
    finally:
        sys.setprofile(before)
    return count


def test_twice_the_arms_take_about_twice_the_calls() -> None:
    studies = [made(arms, lost=3) for arms in (20, 40)]
    analyse(studies)  # imports, and draws that are kept
    work = [calls_of(lambda read=read: analyse([read])) for read in studies]  # type: ignore[misc]
    assert work[1] < 2.6 * work[0], work


def test_the_variances_of_a_study_are_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    plain = noise.pair_variances
    monkeypatch.setattr(noise, "pair_variances", lambda block: asked.append(block.shape) or plain(block))
    analyse([made(12)])
    few = len(asked)
    analyse([made(24)])
    assert few < 10 and len(asked) == 2 * few


@pytest.mark.slow
def test_figures_of_many_arms_are_as_much_work_as_those_of_fifty() -> None:
    payloads = [analyse([made(arms)]) for arms in (50, 150)]
    report_figures(payloads[0])  # imports
    work = [calls_of(lambda payload=payload: report_figures(payload)) for payload in payloads]  # type: ignore[misc]
    assert work[1] < 1.5 * work[0], work


@pytest.mark.parametrize("more", [{}, {"copies": 5}, {"lost": 4}, {"gaps": 9}, {"copies": 4, "lost": 3, "gaps": 7}])
def test_what_is_left_without_two_arms_is_what_a_new_count_gives(more: dict[str, int]) -> None:
    read = made(18, 5, **more)
    others = noise.Others(read, "final_val_loss")
    values, found = noise.sound_arms(read, "final_val_loss"), 0
    for arm, reference in itertools.combinations(read.study.arms, 2):
        both = [st.finite(read.values(name, "final_val_loss").values) for name in (arm, reference)]
        expected = noise.prior_from(values, *both)
        assert others.prior(arm, reference) == expected
        found += expected is not None
    assert found > 100


def test_points_that_another_beats_are_those_of_all_pairs() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 6, (2, 300, 20)).astype(float)  # with ties on one axis and on both
    x[:, 0], y[0] = -np.inf, 3.0
    pairs = (x[:, None] >= x[..., None]) & (y[:, None] >= y[..., None])
    pairs &= (x[:, None] > x[..., None]) | (y[:, None] > y[..., None])
    assert (rankings.beaten(x, y) == pairs.any(axis=2)).all()


def test_the_points_that_stay_are_the_extremes_of_each_stretch() -> None:
    rng = np.random.default_rng(1)
    for points in (101, 997, 5000):
        steps, values = np.arange(points), rng.normal(size=points).round(1)  # with ties: the first one stays
        edges = np.linspace(0, points, 51).astype(int)
        kept = {0, points - 1}
        for start, stop in itertools.pairwise(edges):
            kept |= {start + int(values[start:stop].argmin()), start + int(values[start:stop].argmax())}
        got = thin(steps, values, 100)
        assert got[0].tolist() == sorted(kept) and (got[1] == values[got[0]]).all()


def test_the_draws_behind_the_power_take_little_memory() -> None:
    detection.priors.cache_clear()
    tracemalloc.start()
    detection.priors(100, 3)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 20e6  # all draws at once: 320 MB
