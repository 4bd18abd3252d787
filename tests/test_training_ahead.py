"""Batches made ahead by a thread: the same ones in the same order, errors where they are asked for, no thread left."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_recipe

import gptlab
from gptlab.errors import DataError
from gptlab.tasks.lm import LanguageModelling
from gptlab.training import trainer
from gptlab.training.ahead import Ahead


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "gptlab-batches"]


def test_batches_are_those_of_their_step_in_order_and_after_a_jump() -> None:
    ahead = Ahead(lambda step: iter([(step, i) for i in range(step % 4)]))
    assert threads() == []
    for step in (3, 4, 5, 6, 9, 10, 2, 3):
        assert list(ahead(step)) == [(step, i) for i in range(step % 4)]
        assert threads() == ["gptlab-batches"]
    assert next(ahead(7)) == (7, 0)  # left early
    assert list(ahead(7)) == [(7, 0), (7, 1), (7, 2)]
    ahead.close()
    ahead.close()
    assert threads() == []


def test_they_are_made_before_they_are_asked_for() -> None:
    made = threading.Event()

    def make(step: int) -> Iterator[int]:
        yield step
        if step == 1:
            made.set()

    ahead = Ahead(make)
    assert list(ahead(0)) == [0]
    assert made.wait(30)
    ahead.close()


def test_an_error_is_raised_after_the_batches_before_it() -> None:
    def make(step: int) -> Iterator[int]:
        yield step
        if step == 2:
            raise DataError("a damaged shard")

    ahead = Ahead(make)
    assert [list(ahead(step)) for step in (0, 1)] == [[0], [1]]
    step = ahead(2)
    assert next(step) == 2
    with pytest.raises(DataError, match="a damaged shard"):
        next(step)
    assert list(ahead(3)) == [3]  # not stuck
    ahead.close()
    assert threads() == []


class Forced(Ahead):
    """In place of the plain batches of a CPU."""


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> list[Forced]:
    """Trainers read ahead, as on a GPU."""
    made: list[Forced] = []
    build = trainer.Trainer._build

    def with_thread(self: trainer.Trainer, init: Any) -> None:
        build(self, init)
        self.batches = ahead = Forced(self.batches)
        self.leaving.callback(ahead.close)
        made.append(ahead)

    monkeypatch.setattr(trainer.Trainer, "_build", with_thread)
    return made


def losses(run: Path) -> list[Any]:
    return [line["loss"] for line in gptlab.rundir.RunDir(run).read_metrics() if "loss" in line]


def test_a_run_learns_the_same_and_leaves_no_thread(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forced: list[Forced]
) -> None:
    recipe = tiny_recipe(dataset, train__max_steps=6, log__every=1)
    with monkeypatch.context() as plain:
        plain.setattr(Ahead, "__call__", lambda self, step: self.make(step))
        gptlab.train(recipe, tmp_path / "plain", quiet=True)
    result = gptlab.train(recipe.replace({"train.max_steps": 4}), tmp_path / "run", quiet=True)
    assert (result.status, threads()) == ("completed", [])
    gptlab.train(recipe, tmp_path / "run", quiet=True)  # goes on at step 4
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
    assert len(forced) == 3 and threads() == []


@pytest.mark.parametrize("error", [DataError("a damaged shard"), torch.OutOfMemoryError("CUDA out of memory.")])
def test_what_fails_in_the_thread_ends_the_run_as_without_it(
    dataset: Path, tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch, forced: list[Forced]
) -> None:
    given = LanguageModelling.micro_batches

    def failing(self: LanguageModelling, step: int, micro_batch: int) -> Iterator[Any]:
        if step == 2:
            raise error
        return given(self, step, micro_batch)

    monkeypatch.setattr(LanguageModelling, "micro_batches", failing)
    recipe = tiny_recipe(dataset, train__max_steps=4)

    def ending(folder: str) -> tuple[str, str]:
        try:
            return "", gptlab.train(recipe, tmp_path / folder, quiet=True).status
        except Exception as raised:
            return type(raised).__name__, str(raised)

    ahead = ending("ahead")
    assert threads() == []
    monkeypatch.setattr(Ahead, "__call__", lambda self, step: self.make(step))
    assert ahead == ending("plain")
    assert len(forced) >= 2
