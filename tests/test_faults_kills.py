"""SIGKILL before the n-th operation that changes the disk: whatever n is, the run goes on to the same bits."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_recipe
from safetensors.torch import load_file
from test_tasks_classify import labelled as labelled  # a fixture
from test_tasks_classify import recipe as classifier
from test_training_resume import assert_same_run

from gptlab.config import Recipe
from gptlab.rundir import RunDir
from gptlab.training.checkpoint import list_checkpoints, verify
from gptlab.training.loop import train

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
# A forked child starts at once. PyTorch's autograd cannot be forked after a backward pass where there is a GPU.
FORK = sys.platform == "linux" and not torch.cuda.is_available()
PROCESSES = multiprocessing.get_context("fork" if FORK else "spawn")
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


def count_changes(folder: Path, limit: int) -> None:
    """Kill this process before it changes the disk under `folder` for the time of number `limit`, from 1; 0 is never.

    Opening a file to write it and the flush to the disk are changes too: a file may be empty, or written and not yet
    renamed.
    """
    done, inside = 0, str(folder)

    def change() -> None:
        nonlocal done
        done += 1
        if done == limit:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR) and str(path).startswith(inside):
                change()
        elif event in CHANGES:
            change()

    real = os.fsync

    def fsync(descriptor: int) -> None:
        change()
        real(descriptor)

    os.fsync = fsync
    sys.addaudithook(hook)


def child(recipe: Recipe, out: Path, limit: int) -> None:
    torch.set_num_threads(1)
    count_changes(out, limit)
    train(recipe, out, quiet=True)


def start(recipe: Recipe, out: Path, limit: int = 0) -> int:
    """Train in a process that is killed so. Returns its exit code."""
    process = PROCESSES.Process(target=child, args=(recipe, out, limit))
    process.start()
    process.join(600)
    code = process.exitcode
    process.kill()
    assert code in (0, -signal.SIGKILL), code
    return code


def killed(recipe: Recipe, out: Path, limits: Iterable[int]) -> int:
    """Start again and again, killed before each of these changes, and then to the end. Returns the number of kills."""
    kills = 0
    for limit in limits:
        if start(recipe, out, limit) == 0:
            return kills
        kills += 1
    assert start(recipe, out) == 0
    return kills


def assert_same(whole: Path, pieces: Path) -> None:
    """Losses, weights, moments and masks to the bit, and nothing left over."""
    assert_same_run(whole, pieces)
    last = [list_checkpoints(RunDir(path))[-1] for path in (whole, pieces)]
    for file in ("optimizer", "sparsity"):
        if (last[0] / f"{file}.safetensors").exists():
            one, other = (load_file(path / f"{file}.safetensors") for path in last)
            assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    for path in list_checkpoints(RunDir(pieces)):
        verify(path, RunDir(pieces).read_id())
    assert sorted((pieces / "checkpoints").iterdir()) == list_checkpoints(RunDir(pieces))
    assert not list(pieces.glob(".*.tmp"))
    results = [RunDir(path).read_json("result.json") for path in (whole, pieces)]
    assert results[0]["status"] == results[1]["status"] == "completed"
    assert results[0]["final_val_loss"] == results[1]["final_val_loss"]


SMALL: dict[str, Any] = {
    "train__max_steps": 10,
    "train__eval_every": 4,
    "eval__tokens": 64,
    "eval__train": False,
    "model__n_layer": 1,
    "checkpoint__every": 2,
    "checkpoint__keep_last": 1,
    "schedule__warmup_steps": 2,
}


def test_killed_before_changes_of_the_disk(dataset: Path, tmp_path: Path) -> None:
    """One of each part: start-up, tensors, training.json, manifest, rename, removal."""
    recipe = tiny_recipe(dataset, **SMALL, sparsity__method="magnitude", sparsity__every=2)
    assert start(recipe, tmp_path / "whole") == 0
    limits = [3, 9, 14, 19, 24, 28, 32] if FORK else [24]
    assert killed(recipe, tmp_path / "pieces", limits) == len(limits)
    assert_same(tmp_path / "whole", tmp_path / "pieces")


PRUNED = {"sparsity__every": 2}
SPAM = {"optim__name": "adamw-spam", "optim__spam_interval": 4, "optim__betas": [0.9, 0.999]}
KINDS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "amsgrad": {"optim__amsgrad": True, "optim__kernel": "foreach"},
    "sgd": {"optim__name": "sgd"},
    "muon": {"optim__name": "muon", "data__sampling": "random"},
    "adamw_8bit": {"optim__name": "adamw_8bit"},
    "spam_seed": SPAM,
    "spam_paper": {**SPAM, "optim__spam_form": "paper", "optim__spam_density": 0.5},
    "spam_stable": {**SPAM, "optim__spam_form": "stable"},
    "magnitude": {**PRUNED, "sparsity__method": "magnitude"},
    "movement": {**PRUNED, "sparsity__method": "movement"},
    "distance": {**PRUNED, "sparsity__method": "movement", "sparsity__movement": "distance"},
    "state": {**PRUNED, "sparsity__method": "state", "optim__name": "adamw-prune"},
    "rigl": {**PRUNED, "sparsity__method": "rigl"},
    "two_of_four": {"sparsity__method": "2:4"},
    "amp_bf16": {"precision__regime": "amp_bf16"},
    "amp_fp16": {"precision__regime": "amp_fp16", "model__n_embd": 16, "model__block_size": 16},
    "stochastic": {"precision__regime": "bf16_pure", "optim__rounding": "stochastic"},
    "kahan": {"precision__regime": "bf16_pure", "optim__rounding": "kahan"},
    "samples": {"sample__every": 2, "sample__max_tokens": 4, "sample__prompt": "the"},
    "checkpoint_each_step": {"checkpoint__every": 1, "train__eval_every": 1},
}


ORDER = [*KINDS, "classify"]


def of_kind(kind: str, dataset: Path, labelled: Path) -> Recipe:
    if kind == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    if kind == "classify":
        changes = {"train.max_steps": 10, "train.eval_every": 4, "checkpoint.every": 2, "checkpoint.keep_last": 1}
        return classifier(labelled, **changes, **{"train.max_epochs": 0, "train.device": "cpu"})
    return tiny_recipe(dataset, **{**SMALL, **KINDS[kind]})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ORDER)
def test_killed_before_two_changes_of_the_disk(kind: str, dataset: Path, labelled: Path, tmp_path: Path) -> None:
    recipe, draw = of_kind(kind, dataset, labelled), random.Random(kind)
    assert start(recipe, tmp_path / "whole") == 0
    assert killed(recipe, tmp_path / "pieces", [draw.randint(10, 40), draw.randint(1, 8)]) == 2
    assert_same(tmp_path / "whole", tmp_path / "pieces")


@pytest.mark.faults
@pytest.mark.parametrize("kind", ORDER)
def test_killed_before_every_change_of_the_disk(kind: str, dataset: Path, labelled: Path, tmp_path: Path) -> None:
    """Before every third change of the disk, and then at random; each start goes on from what the last one left."""
    recipe = of_kind(kind, dataset, labelled)
    assert start(recipe, tmp_path / "whole") == 0
    kills = killed(recipe, tmp_path / "pieces", range(1 + ORDER.index(kind) % 3, 45, 3))
    assert_same(tmp_path / "whole", tmp_path / "pieces")
    shutil.rmtree(tmp_path / "pieces")
    draw = random.Random(kind)
    kills += killed(recipe, tmp_path / "pieces", (draw.randint(15, 60) for _ in range(5)))
    assert_same(tmp_path / "whole", tmp_path / "pieces")
    print(f"{kind}: {kills} kills", flush=True)
    assert kills >= 10
