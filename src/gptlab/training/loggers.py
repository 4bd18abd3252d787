"""Other programs that a run logs to: TensorBoard, Weights & Biases, trackio. Each is one run over all resumes.

A logger has `log(numbers, step)`, `finish()`, and `address`, which says where to look; adding one is a class, its line
in LOGGERS and its name in `log.to`. Names are grouped: train/loss, val/loss.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

from gptlab.config import Recipe
from gptlab.errors import UserError
from gptlab.rundir import RunDir

VALIDATION = {"val_loss": "loss", "val_bits_per_byte": "bits_per_byte", "val_perplexity": "perplexity"}
PLACES = {"train_eval_loss": "train/eval_loss", "hellaswag_acc": "hellaswag/acc"}
PLACES |= {"hellaswag_acc_norm": "hellaswag/acc_norm"}
SCORES = ("micro_f1", "macro_f1", "p_at_", "r_at_", "r_precision", "ndcg_at_", "accuracy")


def grouped(name: str) -> str:
    """A name in a line of metrics with its group: train/loss, val/loss, hellaswag/acc."""
    if name in PLACES:
        return PLACES[name]
    validation = VALIDATION.get(name, name.removeprefix("val_") if name.startswith(("val_", *SCORES)) else "")
    return f"val/{validation}" if validation else f"train/{name}"


class TensorBoard:
    """Events in the run's tensorboard/ folder; those after the checkpoint it resumes from are purged."""

    name = "tensorboard"

    def __init__(self, run: RunDir, recipe: Recipe, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run.path / "tensorboard"), purge_step=step + 1)
        self.address = f"tensorboard --logdir {run.path / 'tensorboard'}"

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self.writer.close()


class Wandb:
    """A run of Weights & Biases under the run's id. After a resume, W&B ignores steps that it has; they are equal."""

    name = "wandb"

    def __init__(self, run: RunDir, recipe: Recipe, step: int) -> None:
        import wandb

        self.run = wandb.init(
            id=run.make_id(),
            name=run.path.name,
            dir=str(run.path),
            config=recipe.model_dump(),
            resume="allow",
            **_wanted(recipe, "WANDB_PROJECT", "WANDB_RUN_GROUP"),  # wandb reads WANDB_ENTITY and WANDB_TAGS itself
        )
        offline = os.environ.get("WANDB_MODE") == "offline" or not getattr(self.run, "url", None)
        self.address = f"wandb sync {run.path / 'wandb'}/offline-run-*" if offline else str(self.run.url)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self.run.log(dict(numbers), step=step)

    def finish(self) -> None:
        self.run.finish()


class Trackio:
    """A run of trackio, on this machine unless TRACKIO_SPACE_ID says otherwise. Steps that it has are not repeated."""

    name = "trackio"

    def __init__(self, run: RunDir, recipe: Recipe, step: int) -> None:
        logging.getLogger("httpx").setLevel(logging.WARNING)  # it would print every request
        import trackio

        wanted = _wanted(recipe, "TRACKIO_PROJECT", "TRACKIO_GROUP")
        self.run = trackio.init(
            project=wanted["project"],
            name=f"{run.path.name}-{run.make_id()[:6]}",  # trackio tells runs by their names
            group=wanted.get("group"),
            config=recipe.model_dump(),
            resume="allow",
            embed=False,
            auto_log_cpu=False,
        )
        self.known = getattr(self.run, "_next_step", 0) if step >= 0 else 0
        self.address = f"trackio show --project {wanted['project']}"

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        if step >= self.known:
            self.run.log(dict(numbers), step=step)

    def finish(self) -> None:
        self.run.finish()


Logger = TensorBoard | Wandb | Trackio
LOGGERS: dict[str, tuple[Callable[[RunDir, Recipe, int], Logger], str]] = {
    "tensorboard": (TensorBoard, "torch.utils.tensorboard"),
    "wandb": (Wandb, "wandb"),
    "trackio": (Trackio, "trackio"),
}  # by log.to: what opens it, and the module that it needs


def open_loggers(run: RunDir, recipe: Recipe, step: int) -> list[Logger]:
    """The loggers of `log.to`; `step` is of the checkpoint from which the run continues, or -1.

    Raises:
        UserError: one does not start, for want of a network or an account.
    """
    found: list[Logger] = []
    for name in recipe.log.to if run.writes else ():
        try:
            found.append(LOGGERS[name][0](run, recipe, step))
        except Exception as error:  # of the network, the account or the package: without a common base class
            for logger in found:
                logger.finish()
            first, *_ = str(error).splitlines() or [type(error).__name__]
            hint = "; WANDB_MODE=offline logs without a network" if name == "wandb" else ""
            raise UserError(f"log.to = {name}: {first}{hint}") from None
    return found


def require_packages(recipe: Recipe) -> None:
    """Raise UserError if a package that the run is to log to is missing. All ranks call this, and all stop."""
    for name in recipe.log.to:
        try:
            importlib.import_module(LOGGERS[name][1])
        except ImportError as error:
            raise UserError(
                f"log.to = {name}: {name} cannot be imported ({error}); `pip install {name}` adds it"
            ) from None


def _wanted(recipe: Recipe, project: str, group: str) -> dict[str, Any]:
    """Project, entity, tags and group: the recipe's, else what an environment variable says, else the study."""
    log, study = recipe.log, recipe.name.rpartition("/")[0]
    found: dict[str, Any] = {"project": log.project or os.environ.get(project) or "gptlab"}
    if log.entity:
        found["entity"] = log.entity
    if log.tags:
        found["tags"] = list(log.tags)
    if chosen := log.group or os.environ.get(group) or study:
        found["group"] = chosen
    return found
