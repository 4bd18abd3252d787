"""What a run leaves that failed or diverged, and what it does when its metrics are taken away."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_recipe

from gptlab.cli import main
from gptlab.config import Recipe
from gptlab.data.labeled import LabeledDataset
from gptlab.data.prepare import prepare
from gptlab.data.shards import Dataset
from gptlab.errors import RunError
from gptlab.rundir import FAILURE, RunDir
from gptlab.tasks.classify import Classification, LabeledData
from gptlab.tasks.lm import LanguageModelling, TextData
from gptlab.training.checkpoint import Checkpoints, find_checkpoint, list_checkpoints, verify
from gptlab.training.logs import Logs
from gptlab.training.loop import train
from gptlab.training.outcome import leave_evidence
from gptlab.training.result import Result
from gptlab.training.trainer import Trainer

CPU = torch.device("cpu")
MOVES_OPEN_FILES = pytest.mark.skipif(os.name == "nt", reason="Windows does not remove open files")


@pytest.fixture
def small(dataset: Path) -> Recipe:
    changes = {"model__n_layer": 1, "train__max_steps": 4, "train__eval_every": 2, "checkpoint__every": 2}
    return tiny_recipe(dataset, **changes, eval__train=False)


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, do: Callable[[Trainer], None]) -> None:
    """Do something in update `step`, which counts from 0."""
    before = Trainer.inject_faults

    def inject(self: Trainer, at: int) -> None:
        if at == step:
            do(self)
        before(self, at)

    monkeypatch.setattr(Trainer, "inject_faults", inject)


def fail(error: Exception) -> Callable[[Trainer], None]:
    def do(_: Trainer) -> None:
        raise error

    return do


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> dict[int, np.ndarray]:
    """The inputs that each update has read."""
    rows: dict[int, list[np.ndarray]] = {}
    before = LanguageModelling.micro_batches

    def micro_batches(self: LanguageModelling, step: int, micro_batch: int) -> Iterator[tuple[Any, ...]]:
        rows[step] = []
        for batch in before(self, step, micro_batch):
            rows[step].append(batch[0].numpy())
            yield batch

    monkeypatch.setattr(LanguageModelling, "micro_batches", micro_batches)
    return rows  # type: ignore[return-value]


def test_a_run_that_draws_samples_diverges_as_one_without(dataset: Path, tmp_path: Path) -> None:
    drawn = {"sample__every": 1, "sample__prompt": "the", "sample__max_tokens": 2}
    recipe = tiny_recipe(dataset, **drawn, train__eval_every=1, optim__lr=1e30, schedule__warmup_steps=0)
    result = train(recipe, tmp_path / "run", quiet=True)
    assert (result.status, result.failure) == ("diverged", "non_finite")
    assert (tmp_path / "run" / "samples").is_dir()  # those before the first update


def test_a_failed_run_leaves_its_stack_its_metrics_and_its_batch(
    small: Recipe, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Any, capsys: Any
) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, 3, fail(RuntimeError("a \x1b[31mfault")))
        with pytest.raises(RuntimeError, match="fault"):
            train(small, tmp_path)
    says = f"{tmp_path / FAILURE} has the stack, the last metrics and the batch"
    assert says in capsys.readouterr().err
    head, metrics, batch, stack = (tmp_path / FAILURE).read_text(encoding="utf-8").split("\n\n", 3)
    assert head == r"failed after 3 steps: RuntimeError: a \x1b[31mfault"
    assert [json.loads(line)["step"] for line in metrics.splitlines()[1:]] == [3, 2]
    assert batch.startswith("batch of step 4,")
    [(path, place)] = json.loads(batch.splitlines()[1]).items()
    assert path == str(dataset) and place["epochs"] == [0]
    windows = Dataset(dataset).train.gather(np.array(place["first_tokens"]), small.model.block_size)
    assert np.array_equal(windows, np.concatenate(read[3]))
    assert stack.startswith("stack\nTraceback") and "in inject" in stack
    assert train(small, tmp_path, quiet=True).status == "completed"
    assert not (tmp_path / FAILURE).exists()  # of the attempt before


def test_a_diverged_run_names_the_batch_of_the_first_bad_step(
    small: Recipe, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Any, capsys: Any
) -> None:
    def break_gradients(t: Trainer) -> None:
        for p in t.weights.parameters():
            p.grad.fill_(torch.nan)

    at_step(monkeypatch, 1, break_gradients)
    monkeypatch.setattr("gptlab.cli.train.draw_run", lambda out: None)
    (tmp_path / "r.toml").write_text(small.replace({"log.every": 4}).to_toml(), encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        main(["train", str(tmp_path / "r.toml"), "--out", str(tmp_path / "run")])
    assert end.value.code == 3
    file = tmp_path / "run" / "divergence.json"
    assert f"evidence: {file}" in capsys.readouterr().out
    evidence = json.loads(file.read_text(encoding="utf-8"))
    assert evidence["step"] == 2
    first = evidence["batch"][str(dataset)]["first_tokens"]
    windows = Dataset(dataset).train.gather(np.array(first), small.model.block_size)
    assert np.array_equal(windows, np.concatenate(read[1]))


def test_out_of_memory_leaves_the_allocators_table(
    small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(monkeypatch, 1, fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")))
    assert train(small, tmp_path, quiet=True).status == "out_of_memory"
    text = (tmp_path / FAILURE).read_text(encoding="utf-8")
    assert text.startswith("out_of_memory after 1 steps: CUDA out of memory") and "in inject" in text
    monkeypatch.setattr(torch.cuda, "memory_summary", lambda device: f"the table of {device}")
    job: Any = SimpleNamespace(run=RunDir(tmp_path), state=None, task=None, device=torch.device("cuda"), quiet=True)
    leave_evidence(RuntimeError("x"), Result("out_of_memory", reason="x"), job)
    assert "memory\nthe table of cuda" in (tmp_path / FAILURE).read_text(encoding="utf-8")


@pytest.mark.parametrize("sampling", ["shuffled", "random", "sequential", "mixture", "bad"])
def test_where_a_batch_is_in_the_data(sampling: str, dataset: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(dataset, model__vocab_size=64)
    data = [Dataset(dataset)]
    if sampling == "mixture":
        data.append(Dataset(Path(shutil.copytree(dataset, tmp_path / "other"))))
        recipe = recipe.replace({"data.path": "", "data.mixture": {str(dataset): 3.0, str(tmp_path / "other"): 1.0}})
    elif sampling == "bad":
        recipe = recipe.replace({"faults.batch_every": 2})
    else:
        recipe = recipe.replace({"data.sampling": sampling})
    task = LanguageModelling(recipe, TextData(data), CPU, tmp_path)
    for step in (0, 1, 500):  # several epochs on
        rows = np.concatenate([x.numpy() for x, *_ in task.micro_batches(step, 3)])
        places = task.batch_of(step)
        if sampling == "bad" and step == 1:
            assert places == {"faults.batch_every": "random tokens"}
            continue
        found = [d.train.gather(np.array(places[str(d.path)]["first_tokens"], np.int64), 32) for d in data]
        assert sorted(map(tuple, np.concatenate(found))) == sorted(map(tuple, rows))
        assert (places[str(data[0].path)]["epochs"] == [0]) == (step < 2)


def test_where_a_batch_of_documents_is(tmp_path: Path) -> None:
    rows = [{"text": f"words {n} {'x' * n}", "label": n % 3} for n in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    folder = prepare(str(tmp_path / "rows.jsonl"), out=tmp_path / "set", tokenizer="byte", label_field="label")
    changes = {"data__tokenizer": "byte", "model__vocab_size": 260, "model__mlp": "gelu_erf"}
    recipe = tiny_recipe(folder, task="classify", **changes)
    dataset = LabeledDataset(folder)
    task = Classification(recipe, LabeledData(dataset), CPU, tmp_path)
    place = task.batch_of(9)[str(folder)]
    _, lengths = dataset.splits["train"].batch(np.array(place["documents"]), 32)
    seen = np.concatenate([lengths.numpy() for _, lengths, _ in task.micro_batches(9, 3)])
    assert sorted(seen) == sorted(lengths) and min(place["epochs"]) > 0


# -- metrics that are taken away


@MOVES_OPEN_FILES
@pytest.mark.parametrize("when", ["under way", "at the end"])
def test_without_its_metrics_a_run_says_so_once_and_goes_on(
    when: str, small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run, close = RunDir(tmp_path), Logs.close
    if when == "under way":
        at_step(monkeypatch, 1, lambda _: run.metrics_file.unlink())
    else:
        monkeypatch.setattr(Logs, "close", lambda self: (run.metrics_file.unlink(), close(self)))
    result = train(small, tmp_path)
    assert result.status == "completed"
    assert capsys.readouterr().err.count("metrics.jsonl was removed under way") == 1
    lines = run.read_metrics()
    assert {line["step"] for line in lines} == ({0, 1, 2, 3, 4} if when == "under way" else {4})
    assert result.final_val_loss == [line["val_loss"] for line in lines if "val_loss" in line][-1]
    assert result.final_train_loss == [line["loss"] for line in lines if "loss" in line][-1]


@MOVES_OPEN_FILES
def test_without_its_folder_a_run_ends_with_a_sentence(
    small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(monkeypatch, 0, lambda _: (tmp_path / "run").rename(tmp_path / "moved") and None)
    with pytest.raises(RunError, match="run was removed or moved while it was being trained"):
        train(small, tmp_path / "run", quiet=True)


def test_a_resume_says_which_metrics_are_missing(small: Recipe, tmp_path: Path, capsys: Any) -> None:
    train(small, tmp_path, quiet=True)
    run = RunDir(tmp_path)
    lines = run.metrics_file.read_text(encoding="utf-8").splitlines(keepends=True)
    for path in list_checkpoints(run):
        progress = verify(path)
        assert progress["metrics_lines"] == sum(json.loads(line)["step"] <= progress["step"] for line in lines)
    del lines[1:3]
    run.metrics_file.write_text("".join(lines), encoding="utf-8")
    train(small.replace({"train.max_steps": 6}), tmp_path)
    n = len(lines) + 2
    says = f"metrics.jsonl: 2 of the {n} lines up to step 4 are missing, and are not measured again"
    assert capsys.readouterr().err.count(says) == 1
    run.metrics_file.unlink()
    train(small.replace({"train.max_steps": 8}), tmp_path)
    assert "lines up to step 6 are missing" in capsys.readouterr().err
    train(small.replace({"train.max_steps": 10}), tmp_path)
    assert "missing" not in capsys.readouterr().err  # it was said


# -- checkpoints are read as all files are


def test_an_infinite_logit_is_no_damage(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    checkpoints = Checkpoints(run, 2, keep_best=True)
    checkpoints.save(torch.nn.Linear(4, 3), None, {"step": 1, "largest_logit": float("inf")})
    checkpoints.wait()
    assert verify(find_checkpoint(run))["largest_logit"] == float("inf")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_in_the_place_of_a_tensor_file_does_not_hang(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    checkpoints = Checkpoints(run, 2, keep_best=True)
    checkpoints.save(torch.nn.Linear(4, 3), None, {"step": 1})
    checkpoints.wait()
    [path] = list_checkpoints(run)
    (path / "optimizer.safetensors").unlink()
    os.mkfifo(path / "optimizer.safetensors")
    with pytest.raises(RunError, match=r"is damaged: optimizer.safetensors: it is not a file"):
        find_checkpoint(run)
