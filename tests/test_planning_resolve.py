"""One resolution of a recipe, for training and for planning."""

from __future__ import annotations

from pathlib import Path

import pytest
from planned import CPU, small

from gptlab.config import Recipe
from gptlab.errors import UserError
from gptlab.planning.device import Device
from gptlab.planning.plan import plan_recipe
from gptlab.planning.resolve import resolve_recipe
from gptlab.rundir import RunDir
from gptlab.tasks.base import open_data
from gptlab.training.setup import resolve


@pytest.mark.parametrize(("tokenizer", "ids"), [("gpt2", 50257), ("byte", 257), ("bpe-2048", 2048)])
def test_a_vocabulary_that_is_known_without_data(tokenizer: str, ids: int, tmp_path: Path) -> None:
    recipe = small(model__vocab_size=0, data__tokenizer=tokenizer, data__path=str(tmp_path / "none"))
    found = resolve_recipe(recipe, "cpu")
    assert found.shape.model.vocab_size == ids and found.epoch is None and "no prepared dataset" in found.notes[0]


def test_a_vocabulary_that_is_in_the_dataset(recipe: Recipe, tmp_path: Path) -> None:
    found = resolve_recipe(recipe, "cuda")
    assert found.shape.model.vocab_size == open_data(recipe).vocab_size and found.epoch and not found.notes
    assert plan_recipe(recipe, Device.named("L4")).data == 2 * found.epoch
    with pytest.raises(UserError, match="data.tokenizer = char: the number of its ids"):
        plan_recipe(recipe.replace({"data.path": str(tmp_path / "none")}), Device.named("L4"))
    unended = recipe.replace({"train.max_steps": 0, "train.max_epochs": 2.0, "data.path": str(tmp_path / "none")})
    unended = unended.replace({"model.vocab_size": 30})
    assert plan_recipe(unended, Device.named("L4")).steps is None
    with pytest.raises(UserError, match="--mfu 40"):
        plan_recipe(recipe, Device.named("L4"), mfu=40)


def test_training_and_planning_resolve_a_recipe_alike(recipe: Recipe, tmp_path: Path) -> None:
    recipe = recipe.replace({"batch.micro_batch": "auto", "train.max_steps": 0, "train.max_epochs": 1.5})
    planned = resolve_recipe(recipe, "cpu")
    trained, init = resolve(recipe, RunDir(tmp_path), open_data(recipe), CPU)
    assert init == recipe.seed and planned.recipe.batch.micro_batch == "auto"
    assert trained == planned.recipe.replace({"batch.micro_batch": trained.batch.micro_batch})
    assert planned.epoch and trained.schedule.decay_steps == planned.steps == recipe.step_limit(planned.epoch)
    assert trained.compile.enabled is False and Path(trained.data.path).is_absolute()


def test_what_a_recipe_leaves_open_stays_as_the_stored_run_has_it(recipe: Recipe) -> None:
    stored = recipe.replace({"batch.micro_batch": 2, "compile.enabled": True, "schedule.decay_steps": 7})
    left_open = recipe.replace({"batch.micro_batch": "auto", "compile.enabled": "auto", "schedule.decay_steps": 0})
    kept = resolve_recipe(left_open, "cpu", stored=stored).recipe
    assert (kept.batch.micro_batch, kept.compile.enabled, kept.schedule.decay_steps) == (2, True, 7)
    fixed = recipe.replace({"batch.micro_batch": 4, "compile.enabled": False, "schedule.decay_steps": 9})
    given = resolve_recipe(fixed, "cpu", stored=stored).recipe
    assert (given.batch.micro_batch, given.compile.enabled, given.schedule.decay_steps) == (4, False, 9)


def test_the_shape_of_a_run_to_start_from_is_planned_with_a_shorter_context(recipe: Recipe, tmp_path: Path) -> None:
    source = resolve_recipe(recipe, "cpu").recipe
    RunDir(tmp_path).write_recipe(source)
    other = {"train.init_from": str(tmp_path), "model.block_size": 16, "model.n_layer": 9, "model.dropout": 0.3}
    found = resolve_recipe(recipe.replace(other), "cpu")
    assert found.recipe.model == source.model.model_copy(update={"block_size": 16, "dropout": 0.3}) and not found.notes
    elsewhere = resolve_recipe(recipe.replace({**other, "train.init_from": "no/such/run"}), "cpu")
    assert elsewhere.recipe.model.n_layer == 9 and "is not read" in elsewhere.notes[0]
