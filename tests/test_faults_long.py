"""A hundred thousand steps: memory, open files and threads stay as they are."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from conftest import tiny_recipe
from test_faults_kills import PROCESSES

from gptlab.config import Recipe
from gptlab.training.loop import train
from gptlab.training.trainer import Trainer

LOOKS = 50


def measured(recipe: Recipe, out: str, every: int, found: Any) -> None:
    """Train, and put (step, resident bytes, open files, threads) for each `every` steps."""
    torch.set_num_threads(1)
    process, seen = psutil.Process(), Trainer.seed_dropout

    def look(self: Trainer, step: int) -> None:
        if step % every == 0:
            self.checkpoints.wait()  # the thread that writes a checkpoint holds a copy of the weights
            found.put((step, process.memory_info().rss, process.num_fds(), process.num_threads()))
        seen(self, step)

    Trainer.seed_dropout = look  # type: ignore[method-assign]
    status = train(recipe, out, quiet=True).status
    found.put(status)


@pytest.mark.skipif(sys.platform != "linux", reason="counts what Linux counts")
@pytest.mark.parametrize(
    "steps", [pytest.param(2_000, marks=pytest.mark.slow), pytest.param(100_000, marks=pytest.mark.faults)]
)
def test_many_steps_need_no_more_memory_files_or_threads(steps: int, dataset: Path, tmp_path: Path) -> None:
    every = steps // LOOKS
    recipe = tiny_recipe(
        dataset,
        model__n_layer=1,
        model__n_head=1,
        model__n_embd=8,
        model__block_size=8,
        batch__micro_batch=1,
        batch__tokens_per_step=8,
        eval__tokens=64,
        eval__train=False,
        train__max_steps=steps,
        train__eval_every=every,
        checkpoint__every=every,
    )
    found = PROCESSES.Queue()
    process = PROCESSES.Process(target=measured, args=(recipe, str(tmp_path / "run"), every, found))
    process.start()
    looks = []
    while not isinstance(look := found.get(timeout=1200), str):
        looks.append(look)
    process.join()
    assert look == "completed" and len(looks) == LOOKS
    at, resident, files, threads = np.array(looks[LOOKS // 5 :]).T  # caches fill up, and libraries are loaded, before
    slope = np.polyfit(at, resident, 1)[0]
    grown = resident[-1] - resident[0]
    print(
        f"{steps:,} steps: resident {resident.min() / 1e6:.1f} to {resident.max() / 1e6:.1f} MB, {slope:.2f} bytes a "
        f"step; {files.min()} to {files.max()} open files, {threads.min()} to {threads.max()} threads"
    )
    half = len(threads) // 2
    assert files.min() == files.max()
    assert threads[half:].max() <= threads[:half].max()  # one that has just ended may still be counted
    assert grown < 8e6 and slope < max(100, 2e7 / steps)
    assert len(os.listdir(tmp_path / "run" / "checkpoints")) <= 4
