"""Optimizers, pruning and injected faults in the training loop: under accumulation and AMP, resumed bit for bit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_recipe
from safetensors.torch import load_file
from test_training_resume import assert_same_run, train_until

from gptlab.rundir import RunDir
from gptlab.training.checkpoint import list_checkpoints
from gptlab.training.loop import train

SPAM = {"optim__name": "adamw-spam", "optim__betas": [0.9, 0.999], "optim__spam_interval": 7}
PRUNED = {"sparsity__every": 2, "sparsity__target": 0.6}
ARMS: dict[str, dict[str, Any]] = {
    "sgd": {"optim__name": "sgd"},
    "adamw_amsgrad": {"optim__amsgrad": True},
    "spam_seed": {**SPAM, "optim__spam_warmup_steps": 3},
    "spam_paper": {**SPAM, "optim__spam_form": "paper", "optim__spam_density": 0.5, "optim__grad_clip": 0.0},
    "spam_stable": {**SPAM, "optim__spam_form": "stable", "optim__grad_clip": 0.0},
    "magnitude": {**PRUNED, "sparsity__method": "magnitude"},
    "magnitude_spam_head": {**PRUNED, **SPAM, "sparsity__method": "magnitude", "sparsity__head": True},
    "movement": {**PRUNED, "sparsity__method": "movement"},
    "distance": {**PRUNED, "sparsity__method": "movement", "sparsity__movement": "distance"},
    "bitter0": {**PRUNED, "sparsity__method": "state", "sparsity__variant": "bitter0", "optim__name": "adamw-prune"},
    "rigl": {**PRUNED, "sparsity__method": "rigl"},
    "two_of_four": {"sparsity__method": "2:4"},
    "cautious": {"optim__cautious_decay": True},
    "lion": {"optim__name": "lion", "optim__lr": 1e-3},
    "ademamix": {"optim__name": "ademamix"},
    "normuon": {"optim__name": "normuon", "optim__cautious_decay": True},
    "schedule_free": {"optim__name": "adamw-schedule-free", "schedule__shape": "constant"},
    "soap": {"optim__name": "soap", "optim__soap_every": 4},
    "mup": {"model__parametrization": "mup", "model__base_width": 8, "optim__name": "muon"},
    "completep": {"model__parametrization": "completep", "model__base_depth": 1, "optim__cautious_decay": True},
    "soap_muon": {"optim__name": "soap-muon", "optim__soap_every": 4},
    "ema": {"train__ema": 0.8},
    "ema_muon": {"train__ema": 0.8, "optim__name": "muon"},
    "ema_8bit": {"train__ema": 0.8, "optim__name": "adamw_8bit"},
    "ema_spam": {"train__ema": 0.8, **SPAM},
    "magnitude_lion": {**PRUNED, "sparsity__method": "magnitude", "optim__name": "lion"},
    "magnitude_muon": {**PRUNED, "sparsity__method": "magnitude", "optim__name": "muon"},
}
# what takes the way through the others is tried in `make test`, the rest in `make test-all`
QUICK = ("spam_seed", "movement")


@pytest.mark.parametrize("arm", [arm if arm in QUICK else pytest.param(arm, marks=pytest.mark.slow) for arm in ARMS])
def test_stopped_anywhere_it_is_the_uninterrupted_run(
    arm: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 3, 9 and 15: before pruning begins, within the ramp (6 to 18), within SPAM's second interval."""
    recipe = tiny_recipe(dataset, **ARMS[arm], precision__regime="amp_bf16", train__eval_every=12)
    whole = train(recipe, tmp_path / "whole", quiet=True)
    assert whole.status == "completed", whole.reason
    assert whole.final_val_loss is not None and math.isfinite(whole.final_val_loss)
    for step in (3, 9, 15):
        assert train_until(recipe, tmp_path / "pieces", step).status == "interrupted"
    pieces = train(recipe, tmp_path / "pieces", quiet=True)
    assert_same_run(tmp_path / "whole", tmp_path / "pieces")
    for file in ("optimizer", "sparsity"):
        last = [list_checkpoints(RunDir(tmp_path / name))[-1] / f"{file}.safetensors" for name in ("whole", "pieces")]
        assert last[0].exists() == last[1].exists() == (file == "optimizer" or "sparsity__method" in ARMS[arm])
        if last[0].exists():
            one, other = map(load_file, last)
            assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert whole.sparsity == pieces.sparsity and whole.mask_bytes == pieces.mask_bytes


@pytest.mark.parametrize("arm", ["magnitude", "movement"])
def test_what_a_pruned_run_says(arm: str, dataset: Path, tmp_path: Path) -> None:
    result = train(tiny_recipe(dataset, **ARMS[arm]), tmp_path, quiet=True)
    numbers = 2 * 12 * 32 * 32  # of the blocks' matrices
    assert result.sparsity == int(0.6 * numbers) / numbers and result.mask_bytes == numbers / 8
    assert result.mask_overhead_percent is not None and 0 < result.mask_overhead_percent < 100
    lines = [line for line in RunDir(tmp_path).read_metrics() if "sparsity" in line]
    shares = [line["sparsity"] for line in lines]
    assert [line["step"] for line in lines] == list(range(1, 25))
    assert shares == sorted(shares) and shares[5] == 0 < shares[7] < shares[17] == shares[-1] == result.sparsity
    assert all(line["mask_overhead_percent"] > 0 for line in lines)
    told = json.loads((tmp_path / "sparsity.json").read_text(encoding="utf-8"))
    weights = load_file(list_checkpoints(RunDir(tmp_path))[-1] / "model.safetensors")
    assert told["changed_at"] == 18 and told["changes"] > 0 and told["sparsity"] == result.sparsity
    assert told["by_matrix"].keys() == {key for key in weights if key.startswith("h.") and weights[key].dim() == 2}
    for name, share in told["by_matrix"].items():
        assert float((weights[name] == 0).double().mean()) == pytest.approx(share, abs=1e-12)
    assert json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))["sparsity"] == result.sparsity


def test_bitter1_is_magnitude(dataset: Path, tmp_path: Path) -> None:
    """Equal settings, equal masks, and so the same run to the last bit."""
    train(tiny_recipe(dataset, **ARMS["magnitude"]), tmp_path / "magnitude", quiet=True)
    changes = {**ARMS["bitter0"], "sparsity__variant": "bitter1"}
    train(tiny_recipe(dataset, **changes), tmp_path / "bitter1", quiet=True)
    assert_same_run(tmp_path / "magnitude", tmp_path / "bitter1")


def test_a_dense_run_says_nothing_of_sparsity(dataset: Path, tmp_path: Path) -> None:
    train(tiny_recipe(dataset, train__max_steps=2), tmp_path, quiet=True)
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert not {"sparsity", "mask_bytes", "mask_overhead_percent"} & result.keys()
    assert not (tmp_path / "sparsity.json").exists()
    assert all("sparsity" not in line for line in RunDir(tmp_path).read_metrics())


def test_spam_clips_and_logs_the_norm_as_it_was(dataset: Path, tmp_path: Path) -> None:
    """Without spike handling and resets adamw-spam clips by norm and nothing else, as AdamW's run does."""
    plain = {"optim__betas": [0.9, 0.999], "optim__grad_clip": 0.5, "train__max_steps": 12}
    off = {
        "optim__name": "adamw-spam",
        "optim__spam_enable_clip": False,
        "optim__spam_spike_threshold": 0,
        "optim__spam_periodic_reset": False,
        "optim__amsgrad": False,
    }
    runs = {}
    for name, changes in (("adamw", plain), ("spam", {**plain, **off})):
        train(tiny_recipe(dataset, **changes), tmp_path / name, quiet=True)
        lines = [line for line in RunDir(tmp_path / name).read_metrics() if "grad_norm" in line]
        runs[name] = [(line["loss"], line["grad_norm"]) for line in lines]
    for ours, theirs in zip(runs["spam"], runs["adamw"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert max(norm for _, norm in runs["adamw"]) > 0.5


def test_injected_gradient_spikes(dataset: Path, tmp_path: Path) -> None:
    changes = {"train__max_steps": 12, "optim__lr": 1e-5, "schedule__min_lr": 0.0}
    norms = {}
    for factor in (1.0, 1000.0):
        spiked = {**changes, "faults__gradient_every": 5, "faults__gradient_factor": factor}
        train(tiny_recipe(dataset, **spiked), tmp_path / str(factor), quiet=True)
        lines = RunDir(tmp_path / str(factor)).read_metrics()
        norms[factor] = [line["grad_norm"] for line in lines if "grad_norm" in line]
    for step, (one, other) in enumerate(zip(norms[1.0], norms[1000.0], strict=True), 1):
        assert other / one == pytest.approx(1000.0 if step in (5, 10) else 1.0, rel=0.05), step


def test_injected_bad_batches(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fourth batch is noise, of which no model knows more than the number of ids; and it is resumed exactly."""
    recipe = tiny_recipe(dataset, faults__batch_every=4, optim__lr=3e-2, train__eval_every=0)
    train(recipe, tmp_path / "whole", quiet=True)
    lines = [line for line in RunDir(tmp_path / "whole").read_metrics() if "loss" in line]
    bad = [line["loss"] for line in lines if line["step"] % 4 == 0]
    good = [line["loss"] for line in lines if line["step"] % 4 and line["step"] > 16]
    assert min(bad) > 3.0 > max(good)
    train_until(recipe, tmp_path / "pieces", 10)
    train(recipe, tmp_path / "pieces", quiet=True)
    assert_same_run(tmp_path / "whole", tmp_path / "pieces")


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["spam_seed", "bitter0", "magnitude_muon"])
@pytest.mark.compiles
def test_compiled_it_learns_the_same(arm: str, dataset: Path, tmp_path: Path) -> None:
    losses = []
    for compiled in (False, True):
        recipe = tiny_recipe(dataset, **ARMS[arm], model__dropout=0.0, compile__enabled=compiled, train__max_steps=8)
        losses.append(train(recipe, tmp_path / str(compiled), quiet=True).final_val_loss)
    assert losses[0] == pytest.approx(losses[1], abs=5e-3)


def test_fp16_steps_that_are_skipped_count_for_nothing(dataset: Path, tmp_path: Path) -> None:
    """A scale that overflows at first: the pruner is still called, and ends at its target."""
    recipe = tiny_recipe(dataset, **ARMS["movement"], precision__regime="amp_fp16")
    result = train(recipe, tmp_path, quiet=True)
    assert result.status == "completed" and result.sparsity == int(0.6 * 24576) / 24576
