"""A recipe with everything filled in that it leaves open, for training and for planning."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gptlab.config import Model, Recipe
from gptlab.data.corpora.labeled import CLASSES
from gptlab.data.tokenizer_files import local_files, open_tokenizer
from gptlab.errors import ConfigError, DataError
from gptlab.planning.regime import bf16_speed, choose_regime
from gptlab.planning.shape import Shape
from gptlab.rundir import RunDir
from gptlab.tasks.base import TaskData, open_data

VOCABULARIES = {"gpt2": 50257, "byte": 257}
CORPUS_LABELS = {**{name: len(classes) for name, classes in CLASSES.items()}, "eurlex57k": 4271}  # in training splits


@dataclass(frozen=True)
class Resolved:
    """A recipe whose vocabulary, shape, folders, compilation and decay steps are settled."""

    recipe: Recipe
    """Settled, except for batch.micro_batch = auto, which depends on the device's free memory."""
    shape: Shape
    epoch: int | None
    """Training tokens in one epoch; None if the dataset is not prepared."""
    notes: list[str] = field(default_factory=list)
    """Assumptions, for the user."""
    bf16: float | None = None
    """How many times as fast as float32 the device multiplies bf16; None unless precision.regime was auto."""

    @property
    def steps(self) -> int | None:
        """Optimizer steps of the run; None if only the dataset's size tells."""
        train, epoch = self.recipe.train, self.epoch
        if epoch is None and train.max_epochs:
            if not (train.max_steps or train.max_tokens):
                return None
            epoch = 2**62  # assume that another limit is reached first
        return self.recipe.step_limit(epoch or 0)


def resolve_recipe(
    recipe: Recipe,
    kind: str,
    data: TaskData | None = None,
    model: Model | None = None,
    stored: Recipe | None = None,
    measure: Callable[[Recipe, Shape], float] | None = None,
) -> Resolved:
    """Fill in what a recipe leaves open.

    Args:
        kind: type of the device, such as "cpu" or "cuda".
        data: the recipe's datasets. By default they are opened here, if they are prepared.
        model: the shape, if train.init_from has been read. By default it is read here, if it names a run directory.
        stored: the resolved recipe of a run that is resumed; where `recipe` leaves a setting open, this one's is kept.
        measure: how many times as fast as float32 the device multiplies bf16, for precision.regime = auto. By default
            it is timed here.

    Raises:
        ConfigError: only the dataset tells the vocabulary or the number of labels, and it is not prepared. Or its
            folder has a name that is not UTF-8.
    """
    notes: list[str] = []
    if data is None:
        try:
            data = open_data(recipe)
        except DataError:
            notes.append(f"no prepared dataset at {', '.join(recipe.data.mixture) or recipe.data.folder}")
    model = model or _shape_of_source(recipe, notes)
    if not model.vocab_size:
        model = model.model_copy(update={"vocab_size": _vocab_size(recipe, data)})
    labels = data.n_labels if data is not None else _n_labels(recipe)
    folders = {_absolute(folder): weight for folder, weight in recipe.data.mixture.items()}
    where: dict[str, Any] = {"path": "" if folders else _absolute(recipe.data.folder), "mixture": folders}
    where |= {} if data is None else _made_of(data)
    recipe = recipe.replace({"model": model.model_dump(), "data": {**recipe.data.model_dump(), **where}})
    epoch = None if data is None else data.epoch_tokens(recipe.model.block_size)
    bf16: float | None = None
    if recipe.precision.regime == "auto":
        regime = stored.precision.regime if stored else ""
        if not regime:
            wide = Shape(recipe.model, recipe.precision.model_copy(update={"regime": "fp32"}), labels)
            bf16 = measure(recipe, wide) if measure else bf16_speed(recipe, wide, torch.device(kind))
            regime = choose_regime(bf16, kind)
        recipe = recipe.replace({"precision.regime": regime})
    found = Resolved(recipe, Shape(recipe.model, recipe.precision, labels), epoch, notes)

    settled: dict[str, Any] = {}
    if recipe.compile.enabled == "auto":
        settled["compile.enabled"] = stored.compile.enabled if stored else compiles(recipe, kind)
    if recipe.train.attention == "fastest" and (stored or kind != "cuda" or recipe.model.document_attention):
        settled["train.attention"] = stored.train.attention if stored else "auto"  # else it is measured
    if recipe.batch.micro_batch == "auto" and stored:  # dropout and rounding depend on it
        settled["batch.micro_batch"] = stored.batch.micro_batch
    if not recipe.schedule.decay_steps and (stored or found.steps is not None):
        settled["schedule.decay_steps"] = stored.schedule.decay_steps if stored else found.steps
    if not recipe.optim.ademamix_warmup and recipe.optim.name == "ademamix":
        steps = settled.get("schedule.decay_steps", recipe.schedule.decay_steps)
        settled["optim.ademamix_warmup"] = stored.optim.ademamix_warmup if stored else steps
    return Resolved(recipe.replace(settled), found.shape, epoch, notes, bf16)


def compiles(recipe: Recipe, kind: str) -> bool:
    """Whether a run on this type of device is compiled."""
    return recipe.compile.enabled is True or (recipe.compile.enabled == "auto" and kind == "cuda")


def _shape_of_source(recipe: Recipe, notes: list[str]) -> Model:
    """The recipe's shape, or the shape of the run in train.init_from, whose context the recipe may shorten."""
    model, source = recipe.model, recipe.train.init_from
    if not source:
        return model
    if not RunDir(source).exists():
        notes.append(f"train.init_from = {source} is not read: the shape is the recipe's own")
        return model
    found = RunDir.open(source).read_recipe().model
    block_size = min(model.block_size, found.block_size)
    return found.model_copy(update={"block_size": block_size, "dropout": model.dropout})


def _absolute(folder: str) -> str:
    path = str(Path(folder).resolve())
    try:
        path.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{path}: a name in it is not UTF-8 text, which no recipe.toml can hold: rename it") from None
    return path


def _made_of(data: TaskData) -> dict[str, str]:
    """Corpus ("" if not known) and tokenizer of the data, whatever the recipe says: data.path may name other data."""
    try:
        return {"corpus": data.corpus, "tokenizer": data.tokenizer.name}
    except DataError:  # shards of another tool may not say what their ids stand for
        return {"corpus": data.corpus}


def _vocab_size(recipe: Recipe, data: TaskData | None) -> int:
    if data is not None:
        return data.vocab_size
    name = recipe.data.tokenizer
    if name in VOCABULARIES:
        return VOCABULARIES[name]
    if trained := re.fullmatch(r"bpe-(\d+)", name):
        return int(trained[1])
    if local_files(name):
        return open_tokenizer(name).vocab_size
    raise ConfigError(
        f"data.tokenizer = {name}: the number of its ids is not known until {recipe.data.folder} is prepared; "
        f"prepare it, or give --model.vocab-size N"
    )


def _n_labels(recipe: Recipe) -> int:
    labels = CORPUS_LABELS.get(recipe.data.corpus, 0) if recipe.task == "classify" else 0
    if recipe.task == "classify" and not labels:
        raise ConfigError(
            f"data.corpus = {recipe.data.corpus}: the number of its labels is not known until {recipe.data.folder} is "
            f"prepared; run `gptlab prepare {recipe.data.corpus}`"
        )
    return labels
