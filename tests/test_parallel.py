"""One run on several processes is the run on one: its losses, its order of data, its checkpoints."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS, tiny_recipe
from processes import free_port, together

from gptlab.config import UserError
from gptlab.parallel import World
from gptlab.rundir import RunDir
from gptlab.training.loop import train

STEPS = 50


def hellaswag(folder: Path) -> Path:
    draw = random.Random(1)
    lines = [
        {
            "ind": i, "ctx": " ".join(draw.choices(WORDS, k=4)), "label": i % 4,
            "endings": [" ".join(draw.choices(WORDS, k=draw.choice((1, 2)))) for _ in range(4)],
        }
        for i in range(11)
    ]  # fmt: skip
    path = folder / "hellaswag.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def job(dataset: Path, out: Path, **changes: object) -> tuple[str, str, dict[str, Any]]:
    """A run of 7 sequences a step: 3 + 3 + 1 on one process, 3 and 4 on two, 1, 2, 2 and 2 on four."""
    given = {
        "model__dropout": 0.0, "batch__tokens_per_step": 224, "train__max_steps": STEPS, "train__eval_every": 20,
        "checkpoint__every": 25, "optim__lr": 3e-3, **changes,
    }  # fmt: skip
    return str(dataset), str(out), given


def run_jobs(jobs: list[tuple[str, str, dict[str, Any]]], ports: list[int]) -> list[dict[str, Any]]:
    """Train one after another, in this process of several (or alone)."""
    results = []
    for (dataset, out, changes), port in zip(jobs, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        try:
            results.append(train(tiny_recipe(Path(dataset), **changes), out, quiet=True).to_json())
        except UserError as error:
            results.append({"error": str(error)})
    return results


def on(n: int, jobs: list[tuple[str, str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Results of the first process, that of the others being the same."""
    ports = [free_port() for _ in jobs]
    if n == 1:
        return run_jobs(jobs, ports)
    first, *others = together(n, run_jobs, jobs, ports)
    assert all(other == first for other in others)
    return first


def curves(run: Path) -> dict[str, dict[int, float]]:
    kinds = ("loss", "grad_norm", "val_loss", "train_eval_loss", "hellaswag_acc_norm", "largest_logit", "lr")
    lines = RunDir(run).read_metrics()
    return {kind: {line["step"]: line[kind] for line in lines if kind in line} for kind in kinds}


def assert_same_curves(one: Path, other: Path, tolerance: float = 2e-5) -> None:
    first, second = curves(one), curves(other)
    for kind, points in first.items():
        assert points.keys() == second[kind].keys(), kind
        for step, value in points.items():
            # rounding grows with the steps: gradients are taken of weights that differ in the last bits
            assert second[kind][step] == pytest.approx(value, rel=tolerance * (1 + step)), (kind, step)


@pytest.fixture(scope="module")
def alone(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on one process, with HellaSwag."""
    folder = tmp_path_factory.mktemp("alone")
    path = hellaswag(folder)
    on(1, [job(dataset, folder / "run", hellaswag__path=str(path), hellaswag__every=25)])
    return folder


@pytest.mark.parametrize("n", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_train_the_run_of_one(dataset: Path, alone: Path, tmp_path: Path, n: int) -> None:
    extra = {"hellaswag__path": str(alone / "hellaswag.jsonl"), "hellaswag__every": 25}
    results = on(
        n,
        [
            job(dataset, tmp_path / "ddp", **extra),
            job(dataset, tmp_path / "fsdp", distributed__strategy="fsdp", **extra),
        ],
    )
    whole = RunDir(alone / "run").read_json("result.json")
    for strategy, result in zip(("ddp", "fsdp"), results, strict=True):
        assert result["status"] == "completed"
        assert_same_curves(alone / "run", tmp_path / strategy)
        assert result["final_val_loss"] == pytest.approx(whole["final_val_loss"], rel=1e-4)
        rows = (tmp_path / strategy / "hellaswag_results.jsonl").read_text().splitlines()
        assert len(rows) == 11
        assert RunDir(tmp_path / strategy).read_json("environment.json")["processes"] == n


def test_rows_of_a_step_are_shared_without_gap_or_overlap() -> None:
    for n in range(1, 40):
        for size in range(1, 9):
            for most in range(1, 6):
                shares = [(n * r // size, n * (r + 1) // size) for r in range(size)]
                worlds = [World(r, size) for r in range(size)]
                try:
                    cuts = [w.pieces(b - a, n, most) for w, (a, b) in zip(worlds, shares, strict=True)]
                except UserError as error:
                    assert n < size or (most == 1 and n % size), error
                    continue
                assert len({len(cut) for cut in cuts}) == 1  # as many for each, for all to meet
                for cut, (a, b) in zip(cuts, shares, strict=True):
                    rows = [i for piece in cut for i in range(piece.start, piece.stop)]
                    assert rows == list(range(b - a))
                    assert all(0 < piece.stop - piece.start <= most for piece in cut)
    assert World().pieces(7, 7, 3) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert list(World(1, 3).share("abcd")) == ["b", None]
    torch.testing.assert_close(World().sum(torch.ones(2)), torch.ones(2))
