"""Runs that evaluate and save other weights than they differentiate: train.ema and Schedule-Free AdamW."""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_recipe
from safetensors.torch import load_file
from test_training_resume import assert_same_run, train_until

import gptlab
from gptlab.config import build_recipe
from gptlab.planning.resolve import resolve_recipe
from gptlab.rundir import RunDir
from gptlab.training import trainer
from gptlab.training.checkpoint import list_checkpoints
from gptlab.training.loop import train
from gptlab.training.scoring import evaluate_run

FREE = {"optim__name": "adamw-schedule-free", "schedule__shape": "constant"}


def losses(path: Path) -> list[float]:
    return [line["loss"] for line in RunDir(path).read_metrics() if "loss" in line]


def test_a_run_ends_with_the_average_of_its_weights(dataset: Path, tmp_path: Path) -> None:
    """It trains as without, and evaluates and saves the mean of the weights with powers of 0.8 as weights."""
    short = {"train__max_steps": 4, "train__eval_every": 0, "checkpoint__every": 1, "checkpoint__keep_last": 4}
    short |= {"eval__tokens": 10**6, "eval__train": False}  # the whole split, as `evaluate_run` takes it
    averaged = train(tiny_recipe(dataset, train__ema=0.8, **short), tmp_path / "averaged", quiet=True)
    plain = train(tiny_recipe(dataset, **short), tmp_path / "plain", quiet=True)
    assert losses(tmp_path / "averaged") == losses(tmp_path / "plain")
    logged = [{key for line in RunDir(tmp_path / run).read_metrics() for key in line} for run in ("averaged", "plain")]
    assert logged[1] - logged[0] == {"updates_lost"}  # which would be of the average
    assert averaged.final_val_loss != plain.final_val_loss
    both = [list_checkpoints(RunDir(tmp_path / run)) for run in ("averaged", "plain")]
    states = [load_file(p / "optimizer.safetensors") for p in both[0]]
    weights = [load_file(p / "model.safetensors") for p in both[1]]
    ends = load_file(both[0][-1] / "model.safetensors")
    for name, end in ends.items():
        assert all(torch.equal(state[f"raw/{name}"], w[name]) for state, w in zip(states, weights, strict=True))
        shares = torch.tensor([0.8 ** (4 - i) for i in range(1, 5)], dtype=torch.float64)
        wanted = sum(share * w[name].double() for share, w in zip(shares / shares.sum(), weights, strict=True))
        torch.testing.assert_close(end.double(), wanted, rtol=1e-6, atol=1e-7)
    again = evaluate_run(gptlab.load_run(tmp_path / "averaged", device="cpu"), ["loss"], {})["val_loss"]
    assert again == pytest.approx(averaged.final_val_loss, abs=1e-6)


@pytest.mark.parametrize(
    "changes", [{"train__ema": 0.8}, pytest.param(FREE, marks=pytest.mark.slow)], ids=["ema", "schedule-free"]
)
def test_steps_that_loss_scaling_skips(
    changes: dict[str, Any], dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The average stays as it is, is what is evaluated and saved, and the run is resumed bit for bit.

    A scale that grows 2^12 times every third step overflows again and again.
    """
    scaler = functools.partial(torch.amp.GradScaler, "cpu", growth_factor=2.0**12, growth_interval=3)
    monkeypatch.setattr(trainer, "make_scaler", lambda *_: scaler(backoff_factor=2.0**-12))
    many = {"train__max_steps": 10, "checkpoint__every": 1, "checkpoint__keep_last": 10}
    recipe = tiny_recipe(dataset, precision__regime="amp_fp16", **many, **changes)
    whole = train(recipe, tmp_path / "whole", quiet=True)
    assert whole.status == "completed" and whole.skipped_steps and 0 < whole.skipped_steps < 8, whole
    same = 0
    folders = list_checkpoints(RunDir(tmp_path / "whole"))
    for before, after in itertools.pairwise(folders):
        skipped = [
            json.loads((p / "training.json").read_text(encoding="utf-8"))["skipped_steps"] for p in (before, after)
        ]
        one, other = (load_file(p / "model.safetensors") for p in (before, after))
        moved = max(float((one[name] - other[name]).abs().max()) for name in one)
        assert (moved < 1e-6) == (skipped[1] > skipped[0])
        same += moved < 1e-6
    assert same >= 2
    for step in (3, 6):
        train_until(recipe, tmp_path / "pieces", step)
    train(recipe, tmp_path / "pieces", quiet=True)
    assert_same_run(tmp_path / "whole", tmp_path / "pieces")


def test_ademamix_rises_over_the_run(dataset: Path) -> None:
    """ademamix_warmup = 0 is the decay of the schedule, which is the run, also if a longer run goes on with it."""
    recipe = build_recipe(tiny_recipe(dataset, optim__name="ademamix").model_dump(), {"train.max_steps": 24})
    data = None
    first = resolve_recipe(recipe, "cpu", data).recipe
    assert first.optim.ademamix_warmup == first.schedule.decay_steps == 24
    longer = resolve_recipe(recipe.replace({"train.max_steps": 50}), "cpu", data, None, first).recipe
    assert longer.optim.ademamix_warmup == 24
    own = resolve_recipe(recipe.replace({"optim.ademamix_warmup": 7}), "cpu", data).recipe
    assert own.optim.ademamix_warmup == 7
    other = resolve_recipe(recipe.replace({"optim.name": "adamw"}), "cpu", data).recipe
    assert other.optim.ademamix_warmup == 0
