"""TensorBoard, W&B and trackio, the real packages without a network: one run over two resumes, and no double points."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import tiny_recipe

from gptlab.config import Recipe, build_recipe
from gptlab.rundir import RunDir
from gptlab.training.checkpoint import list_checkpoints
from gptlab.training.loggers import _wanted, grouped
from gptlab.training.loop import train

STEPS = [1, 2, 3, 4, 5, 6, 7, 8]


def train_with_two_kills(recipe: Recipe, folder: Path) -> None:
    """Train eight steps; after steps 4 and 6 the run is as a kill before the checkpoint of that step leaves it."""
    recipe = recipe.replace({"train.eval_every": 2, "checkpoint.every": 2, "log.every": 1})
    for limit in (4, 6, 8):
        train(recipe.replace({"train.max_steps": limit}), folder, quiet=True)
        if limit < 8:
            (list_checkpoints(RunDir(folder))[-1] / "manifest.json").unlink()
            (folder / "result.json").unlink()


def of_step(rows: list[dict[str, Any]], name: str) -> dict[int, float]:
    """Values by step; a second value for a step is an error."""
    found: dict[int, float] = {}
    for row in rows:
        if name in row:
            assert row["step"] not in found, f"{name} is there twice for step {row['step']}"
            found[row["step"]] = row[name]
    return found


def logged(folder: Path, name: str) -> dict[int, float]:
    return {line["step"]: line[name] for line in RunDir(folder).read_metrics() if name in line}


def test_names_are_grouped() -> None:
    names = {"loss": "train/loss", "val_loss": "val/loss", "lr": "train/lr", "val_bits_per_byte": "val/bits_per_byte"}
    names |= {"hellaswag_acc": "hellaswag/acc", "train_eval_loss": "train/eval_loss", "micro_f1": "val/micro_f1"}
    assert {name: grouped(name) for name in names} == names


def test_project_and_group(monkeypatch: pytest.MonkeyPatch) -> None:
    def wanted(**log: Any) -> dict[str, Any]:
        recipe = build_recipe({"name": "a-study/an-arm", "train.max_steps": 1, "log": log})
        return _wanted(recipe, "WANDB_PROJECT", "WANDB_RUN_GROUP")

    for name in ("WANDB_PROJECT", "WANDB_RUN_GROUP"):
        monkeypatch.delenv(name, raising=False)
    assert wanted() == {"project": "gptlab", "group": "a-study"}
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    monkeypatch.setenv("WANDB_RUN_GROUP", "ours")
    assert wanted() == {"project": "theirs", "group": "ours"}
    asked = {"project": "p", "entity": "e", "tags": ["t"], "group": "g"}
    assert wanted(**asked) == asked


def test_recipes_of_earlier_versions_are_read() -> None:
    recipe = build_recipe({"train.max_steps": 1, "log": {"tensorboard": True, "wandb": False}})
    assert recipe.log.to == ["tensorboard"]
    assert build_recipe({"train.max_steps": 1}, {"log.to": "wandb,trackio,wandb"}).log.to == ["wandb", "trackio"]


def test_one_logger_that_fails_closes_the_others(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptlab.errors import UserError
    from gptlab.training import loggers

    closed = []
    opened = SimpleNamespace(finish=lambda: closed.append(True))

    def fails(*_: Any) -> Any:
        raise OSError("no account")

    first = (lambda *_: opened, "json")
    monkeypatch.setattr(loggers, "LOGGERS", {"tensorboard": first, "trackio": (fails, "json")})
    with pytest.raises(UserError, match="log.to = trackio: no account"):
        loggers.open_loggers(RunDir(tmp_path), recipe.replace({"log.to": ["tensorboard", "trackio"]}), -1)
    assert closed == [True]


@pytest.mark.slow
def test_tensorboard(dataset: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_with_two_kills(tiny_recipe(dataset, log__to=["tensorboard"]), tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name, theirs in (("loss", "train/loss"), ("val_loss", "val/loss")):
        found = {event.step: event.value for event in events.Scalars(theirs)}
        assert len(found) == len(events.Scalars(theirs))
        assert found == pytest.approx(logged(tmp_path, name))
    assert list(found) == [0, 2, 4, 6, 8]
    assert json.loads((tmp_path / "logs.json").read_text()) == {
        "tensorboard": f"tensorboard --logdir {tmp_path / 'tensorboard'}"
    }


@pytest.mark.slow
def test_trackio(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when trackio is imported
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    run = tmp_path / "run"
    train_with_two_kills(tiny_recipe(dataset, log__to=["trackio"], log__project="here"), run)
    [name] = SQLiteStorage.get_runs("here")
    assert name.startswith("run-")
    rows = SQLiteStorage.get_logs("here", name)
    assert of_step(rows, "train/loss") == pytest.approx(logged(run, "loss"))
    assert of_step(rows, "val/loss") == pytest.approx(logged(run, "val_loss"))
    assert list(of_step(rows, "train/loss")) == STEPS


def records(content: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log in blocks of 32 KiB, after a header of 7 bytes."""
    at, parts = 7, b""
    while at + 7 <= len(content):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


@pytest.mark.slow
def test_wandb_offline(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    train_with_two_kills(tiny_recipe(dataset, log__to=["wandb"]), tmp_path)
    from wandb.proto.wandb_internal_pb2 import Record

    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 3 and len({file.stem for file in files}) == 1  # three pieces of one run
    rows: dict[int, dict[str, Any]] = {}
    for file in files:
        for data in records(file.read_bytes()):
            record = Record.FromString(data)
            if record.HasField("history"):
                row = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                for key, value in row.items():
                    known = rows.setdefault(int(row["_step"]), {}).setdefault(key, value)
                    assert known == value or key.startswith("_") or "second" in key or "memory" in key or "mfu" in key
    assert {step: row["train/loss"] for step, row in rows.items() if "train/loss" in row} == pytest.approx(
        logged(tmp_path, "loss")
    )
