"""What a task is, and which tasks there are.

A task says what is learnt and how it is scored: it opens the data, builds the model, cuts each step into micro-batches
and evaluates. `gptlab.config.TASKS` is the only list of tasks; training, planning, loading and evaluating ask the class
that it names.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch

from gptlab.config import TASKS, Model, Recipe
from gptlab.data.tokenizers import Tokenizer
from gptlab.distributed.world import World
from gptlab.precision.regimes import Regime
from gptlab.progress import Tell, tell_nobody

Init = int | Callable[[Any], None]  # a seed, or a function that sets a model's weights


class TaskData(Protocol):
    """The prepared data of a run."""

    @property
    def paths(self) -> list[Path]: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def corpus(self) -> str:
        """What the data was prepared from; "" where its manifest does not say."""
        ...

    @property
    def n_labels(self) -> int:
        """Outputs of the model: labels of an encoder, 0 for a language model."""
        ...

    def fingerprint(self) -> str:
        """A hash of the data; a resumed run refuses other data."""
        ...

    def epoch_tokens(self, block_size: int) -> int:
        """Tokens of an epoch."""
        ...

    def facts(self) -> dict[str, int]:
        """Sizes for environment.json."""
        ...


class Task(Protocol):
    """Data, model, loss and scores of a run.

    A model that `build` returns is called as model(*micro_batch, factor) and returns a `HeadLoss`. It has
    `parameter_count()`, `flops_per_token()`, `device`, and the attribute `activation_checkpointing`.
    """

    unit: ClassVar[str]
    """"tokens" or "samples": what the loss is a mean over, and what throughput counts."""
    scores: ClassVar[tuple[str, ...]]
    """What `gptlab eval --on` can measure."""

    shortens: ClassVar[bool]
    """Whether train.init_from can be given a model.block_size shorter than the source's."""

    def __init__(self, recipe: Recipe, data: Any, device: torch.device, folder: Path, world: World) -> None: ...

    @staticmethod
    def open_data(recipe: Recipe) -> TaskData:
        """The prepared data that a recipe names. Raises DataError where it is missing or of another kind."""
        ...

    @staticmethod
    def read_source(name: str, seed: int) -> tuple[Model, Callable[[Any], None]]:
        """Shape and weights of another library's model, for train.init_from; new parts are drawn from the seed."""
        ...

    @staticmethod
    def source_tokenizer(name: str) -> Tokenizer | None:
        """The tokenizer of that model; None if it comes without one."""
        ...

    @staticmethod
    def stored_model(
        recipe: Recipe, shape: Callable[[str], tuple[int, ...]], device: torch.device, regime: Regime, init: Init
    ) -> Any:
        """The model of a checkpoint, without the data; `shape` gives the shape of a stored tensor by name."""
        ...

    @property
    def per_step(self) -> int:
        """Units of one step, over all ranks."""
        ...

    def build(self, regime: Regime, init: Init, sharded: bool = False) -> Any:
        """The model in the regime's dtypes; sharded with FSDP."""
        ...

    def constant_loss(self) -> float | None:
        """The loss in nats of the best constant prediction, by which a collapse is recognised; None if unknown."""
        ...

    def micro_batches(self, step: int, micro_batch: int) -> Iterator[tuple[Any, ...]]:
        """This rank's micro-batches of update `step`, which depend on the seed and the step alone."""
        ...

    def batch_of(self, step: int) -> dict[str, Any]:
        """Where the batch of update `step`, over all ranks, is in the data, as JSON values by the dataset's folder."""
        ...

    def due(self, step: int, last: bool) -> list[str]:
        """What to evaluate after `step` updates."""
        ...

    def evaluate(self, what: list[str], model: Any, regime: Regime, micro_batch: int, tell: Tell) -> dict[str, Any]:
        """Scores by the names of metrics.jsonl, `val_loss` among them.

        All ranks call `tell` before each batch; it raises Stopped to end the evaluation.
        """
        ...

    def evaluate_split(
        self, model: Any, regime: Regime, micro_batch: int, tell: Tell = tell_nobody
    ) -> dict[str, float]:
        """Scores over the whole validation split, for `gptlab eval --on loss`."""
        ...


def task_of(recipe: Recipe) -> type[Task]:
    """The class of a recipe's task."""
    module, _, name = TASKS[recipe.task].rpartition(".")
    task: type[Task] = getattr(importlib.import_module(module), name)
    return task


def open_data(recipe: Recipe) -> TaskData:
    """The prepared data of a recipe's task."""
    return task_of(recipe).open_data(recipe)


if TYPE_CHECKING:  # mypy compares them with the protocol
    from gptlab.tasks.classify import Classification
    from gptlab.tasks.lm import LanguageModelling

    _: list[type[Task]] = [LanguageModelling, Classification]
