"""Before the first step: the device, the resolved recipe, the first weights, and the record of where the run ran."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gptlab.config import Model, Recipe, may_change, settings, value_of
from gptlab.data.tokenizer_files import OURS
from gptlab.data.tokenizers import Tokenizer, load_tokenizer
from gptlab.distributed.world import SINGLE, World
from gptlab.distributed.world import world_from_env as started
from gptlab.errors import RunError, UserError
from gptlab.hardware import device_name
from gptlab.interop.source import read_source
from gptlab.model.gpt import GPT
from gptlab.optim.optimizers import describe
from gptlab.planning.memory import auto_micro_batch
from gptlab.planning.regime import choose_regime, say_bf16
from gptlab.planning.resolve import resolve_recipe
from gptlab.precision.regimes import make_regime
from gptlab.rundir import RunDir
from gptlab.tasks.base import Init, Task, TaskData, task_of
from gptlab.training.checkpoint import has_begun, list_checkpoints, open_checkpoint
from gptlab.training.tensors import stored_weights
from gptlab.version import VERSION


def pick_device(name: str) -> torch.device:
    """The device of train.device; with several ranks, this rank's GPU. Raises UserError if there is no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if (name == "cuda" and not torch.cuda.is_available()) or (name == "mps" and not torch.backends.mps.is_available()):
        raise UserError(f"train.device = {name}: this machine, or this build of PyTorch, has no such device")
    world = started()
    if name != "cuda" or world.size == 1:
        return torch.device(name)
    if world.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"rank {world.rank} has no GPU: it is process {world.local_rank} of a machine with "
            f"{torch.cuda.device_count()} GPUs; start one process per GPU"
        )
    return torch.device("cuda", world.local_rank)


def resolve(
    recipe: Recipe, run: RunDir, data: TaskData, device: torch.device, world: World = SINGLE
) -> tuple[Recipe, Init]:
    """The recipe with every default filled in, and what sets the first weights: a seed, or a function of the model.

    A resumed run keeps the stored micro-batch, decay steps and compilation where the recipe leaves them open. A run
    that never took a step is begun anew, with any settings.

    Raises:
        RunError: the run in this folder was trained with other settings or other data; it names them. Or it would go on
            at learning rate 0.
        UserError: train.init_from cannot be read.
    """
    stored = run.read_recipe() if run.exists() and has_begun(run) else None
    model, init = first_weights(recipe, stored, run, data)
    found = resolve_recipe(recipe, device.type, data, model, stored)
    recipe = found.recipe
    if recipe.batch.micro_batch == "auto":
        here = auto_micro_batch(found, device, world.size)
        recipe = recipe.replace({"batch.micro_batch": int(world.min(here))})
    if stored is not None:
        made_of = {f"data.{key}": getattr(recipe.data, key) for key in ("corpus", "tokenizer")}
        refuse_differences(stored.replace(made_of), recipe, run)  # these only name the data; the fingerprint is of it
        trained_on = run.read_json("environment.json").get("data", {}).get("fingerprint")
        if trained_on and trained_on != data.fingerprint():
            raise RunError(f"{run.path} was trained on other data than {', '.join(map(str, data.paths))} holds")
        refuse_idle_steps(stored, recipe, run, data.epoch_tokens(recipe.model.block_size))
    return recipe, init


def settle_regime(
    recipe: Recipe, run: RunDir, data: TaskData, device: torch.device, world: World = SINGLE
) -> tuple[Recipe, float | None]:
    """The recipe with a regime in place of precision.regime = auto: that of the begun run, or by rank 0's measurement.

    Returns:
        The recipe, and how many times as fast as float32 bf16 was when it was measured; None if it never was.
    """
    begun = run.exists() and has_begun(run)
    known = run.read_json("environment.json").get("bf16_speed") if begun else None
    if recipe.precision.regime != "auto":
        return recipe, known
    if begun:
        return recipe.replace({"precision.regime": run.read_recipe().precision.regime}), known
    speed: float | None = None
    if world.first:
        speed = resolve_recipe(recipe, device.type, data).bf16
    speed = world.broadcast(speed)
    return recipe.replace({"precision.regime": choose_regime(speed or 0.0, device.type)}), speed or None


def first_weights(recipe: Recipe, stored: Recipe | None, run: RunDir, data: TaskData) -> tuple[Model | None, Init]:
    """The shape that train.init_from gives, None without it, and what sets the first weights.

    A run with checkpoints reads train.init_from no more.
    """
    name = recipe.train.init_from
    if not name:
        return None, recipe.seed
    if list_checkpoints(run):
        return (stored if stored and stored.train.init_from == name else recipe).model, recipe.seed
    task, earlier = task_of(recipe), RunDir(name)
    if earlier.exists():
        if (other := earlier.read_recipe().task) != recipe.task:
            raise RunError(f"train.init_from = {name}: is a run of task = {other}, and this run's is {recipe.task}")
        file = earlier.tokenizer_file
        refuse_tokenizer(name, load_tokenizer(file) if file.is_file() else None, data, str(file))
        source, init = start_from(name)
    else:
        source, init = task.read_source(name, recipe.seed)
        refuse_tokenizer(name, task.source_tokenizer(name), data, name)
    if (wanted := recipe.model.parametrization) not in ("standard", source.parametrization):
        raise RunError(
            f"train.init_from = {name}: has model.parametrization = {source.parametrization}, this recipe {wanted}; "
            "weights keep their own: remove model.parametrization"
        )
    if task.shortens and recipe.model.block_size < source.block_size:
        source, init = cropped(source, recipe.model.block_size, init)
    return source.model_copy(update={"dropout": recipe.model.dropout}), init


def refuse_tokenizer(name: str, tokenizer: Tokenizer | None, data: TaskData, file: str) -> None:
    """Refuse to train weights on ids that stand for other text than the weights have learnt; None: nobody knows."""
    if tokenizer is not None and tokenizer.identity() != data.tokenizer.identity():
        where = tokenizer.name if tokenizer.spec()["kind"] in OURS else file
        raise RunError(
            f"train.init_from = {name}: has another tokenizer than {data.paths[0]} ({data.tokenizer.name}): "
            f"`gptlab prepare ... --tokenizer {where}` makes data for it"
        )


def refuse_differences(stored: Recipe, recipe: Recipe, run: RunDir) -> None:
    differ = [
        f"{name} ({value_of(stored, name)} then, {value_of(recipe, name)} now)"
        for name, _ in settings()
        if not may_change(name) and value_of(stored, name) != value_of(recipe, name)
    ]
    if differ:
        raise RunError(
            f"{run.path} holds a run with other settings: {', '.join(differ)}; --out names another folder for this one"
        )


def refuse_idle_steps(stored: Recipe, recipe: Recipe, run: RunDir, epoch: int) -> None:
    """Refuse a longer limit where the steps that it adds have the learning rate 0."""
    limit, before = recipe.step_limit(epoch), stored.step_limit(epoch)
    if limit > before and (idle := idle_steps(recipe, limit)):
        raise RunError(
            f"{run.path}: {idle}. A new run can start from its weights (--train.init-from {run.path} --out DIR), or "
            f"train {limit} steps from the beginning (--schedule.decay-steps {limit} --out DIR)"
        )


def idle_steps(recipe: Recipe, limit: int) -> str:
    """Which steps have the learning rate 0, because the schedule ends before the run does; "" if none has."""
    schedule = recipe.schedule
    if schedule.shape == "constant" or schedule.min_lr or limit <= schedule.decay_steps:
        return ""
    return (
        f"steps {schedule.decay_steps + 1} to {limit} train at learning rate 0, as schedule.decay_steps = "
        f"{schedule.decay_steps} and schedule.min_lr = 0"
    )


def start_from(source: str) -> tuple[Model, Callable[[Any], None]]:
    """Shape and weights of a run directory (its last checkpoint), a Hugging Face folder or id."""
    if not RunDir(source).exists():
        return read_source(source)
    run = RunDir.open(source)
    return run.read_recipe().model, stored_weights(open_checkpoint(run))


class _Longer:
    """Stands for a model with a longer context while its weights are set: the first learned positions are kept."""

    def __init__(self, short: Any, config: Model) -> None:
        self.short, self.config = short, config

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self.short.named_parameters():
            if name != "wpe.weight":
                yield name, parameter
                continue
            longer = parameter.new_empty(self.config.block_size, parameter.shape[1])
            yield name, longer
            parameter.copy_(longer[: len(parameter)])


def cropped(model: Model, block_size: int, fill: Callable[[Any], None]) -> tuple[Model, Callable[[Any], None]]:
    """A model with a shorter context: the learned positions past its end are dropped."""

    @torch.no_grad()
    def crop(short: Any) -> None:
        fill(_Longer(short, model))

    return model.model_copy(update={"block_size": block_size}), crop


def environment(
    recipe: Recipe,
    data: TaskData,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    world: World,
    bf16: float | None = None,
) -> dict[str, Any]:
    """The content of environment.json: versions, hardware, commit and command.

    Args:
        bf16: what `settle_regime` measured.
    """
    emulated = make_regime(recipe.precision, device).emulated
    return {
        "gptlab": VERSION,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "device": device.type,
        "device_name": device_name(device),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": world.size,
        **({"float8": "emulated in float32"} if emulated else {}),
        **({"bf16_speed": bf16} if bf16 else {}),
        "git_commit": _git_commit(),
        "command": sys.argv,
        "parameters": sum(p.numel() for p in model.parameters()),
        **(model.size() if isinstance(model, GPT) else {}),
        "optimizer": describe(optimizer),
        "data": {
            "path": [str(path.resolve()) for path in data.paths],
            "corpus": data.corpus,
            "tokenizer": data.tokenizer.name,
            "train_tokens": data.epoch_tokens(recipe.model.block_size),
            **data.facts(),
            "fingerprint": data.fingerprint(),
        },
    }


def summary(
    recipe: Recipe,
    task: Task,
    model: Any,
    device: torch.device,
    limit: int,
    step: int,
    world: World,
    bf16: float | None = None,
) -> str:
    """One line for the terminal on what is about to happen."""
    tuned = " with max-autotune" if recipe.compile.mode == "max-autotune" else ""
    compiled, micro_batch = f", compiled{tuned}" if recipe.compile.enabled else "", recipe.batch.micro_batch
    where = device.type if world.size == 1 else f"{world.size} x {device.type} ({recipe.distributed.strategy})"
    return (
        f"{recipe.name} (seed {recipe.seed}): {model.parameter_count() / 1e6:.1f}M parameters, "
        f"{recipe.precision.regime}{compiled} on {where}; steps {step} to {limit} of {task.per_step:,} {task.unit}, "
        f"in micro-batches of {micro_batch} x {recipe.model.block_size} tokens"
        + (f"; {say_bf16(bf16)}" if bf16 else "")
    )


def _git_commit() -> str | None:
    """The commit of the checkout, with + if its files differ from it; None for an installed package."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run(
            [*git, "status", "--porcelain", "."], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changes.strip() else "")
