"""What a run needs before it starts: memory by kind, time, cost, host memory and disk.

    >>> plan_recipe(load_recipe("gpt2-124m-fineweb-edu"), Device.named("H100")).sentence
    'needs about 29.5 GB of the 79.0 GB available on H100'

All numbers are of an eager run. A compiled run keeps fewer activations; how many is known only once it is compiled.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from gptlab.config import Recipe
from gptlab.errors import ConfigError, UserError
from gptlab.hardware import GB
from gptlab.optim.optimizers import optimizer_bytes
from gptlab.planning.activations import bound_activations
from gptlab.planning.device import Device, local_device
from gptlab.planning.measure import Speed
from gptlab.planning.memory import Memory, bytes_of, largest_that_fits, share_of_step, step_memory
from gptlab.planning.regime import say_bf16
from gptlab.planning.resolve import Resolved, resolve_recipe
from gptlab.planning.shape import Shape, laid_out
from gptlab.sparsity.pruner import pruner_bytes
from gptlab.tasks.base import TaskData

HOST = {"cpu": 0.4 * GB, "cuda": 3 * GB}  # a process with PyTorch loaded: measured on a CPU, assumed with CUDA
TOO_MUCH = 0.15  # refuse a run that needs over 15% more than is available


@dataclass(frozen=True)
class Plan:
    """What a run needs, in bytes, seconds and FLOPs. None is a number that cannot be known."""

    name: str
    device: str
    available: float
    """Bytes of memory that the device has for the run."""
    processes: int
    """Ranks, each with a device of its own."""
    parameters: int
    flops_per_token: int
    micro_batch: int
    micro_batches: int
    """Per rank and step."""
    memory: Memory
    """Of one rank."""
    largest_micro_batch: int
    """At most a rank's share of a step; 0 if not even one sequence fits."""
    mfu: float
    measured: bool
    """Whether tokens_per_second was measured on this machine. Otherwise it follows from `mfu`."""
    tokens_per_second: float | None
    """Of all ranks together."""
    steps: int | None
    tokens: int | None
    """Training tokens of the whole run."""
    hours: float | None
    """Training and evaluation of the held-out loss."""
    cost: float | None
    host: float
    """Bytes of host memory that one process needs, PyTorch's own included."""
    copies: float
    """Bytes of host memory for the copy that a checkpoint is written from, all processes together, if they are free."""
    host_available: float
    """Bytes of host memory that one process can use."""
    data: float | None
    """Bytes of the dataset on disk; if it is not prepared, of as many tokens as the run reads."""
    checkpoint: float
    """Bytes of one checkpoint."""
    checkpoints: float
    """Bytes of all checkpoints that exist at one time, with the one that is being written."""
    sentence: str
    """Whether the run fits, with numbers and what to change."""
    notes: list[str]

    @property
    def needed_gb(self) -> float:
        return self.memory.peak / GB

    @property
    def available_gb(self) -> float:
        return self.available / GB

    @property
    def device_hours(self) -> float | None:
        """Hours times devices."""
        return None if self.hours is None else self.hours * self.processes

    @property
    def verdict(self) -> str:
        """The plan in one line: `fits: 29.5 of 79.0 GB, about 6.0 h, 463,000 tokens/s assumed at 40% MFU`."""
        if self.refused or self.memory.peak > self.available:
            return f"{'does not fit' if self.refused else 'may not fit'}: {self.sentence}"
        facts = [f"fits: {self.needed_gb:.3g} of {self.available_gb:.3g} GB", say_time(self.hours), self.rate]
        return ", ".join([*filter(None, facts), *([f"cost {self.cost:,.2f}"] if self.cost is not None else [])])

    @property
    def rate(self) -> str:
        """Tokens a second, and where they come from; "" if they are unknown."""
        if self.tokens_per_second is None:
            return ""
        source = "measured here" if self.measured else f"assumed at {self.mfu:.0%} MFU"
        return f"{self.tokens_per_second:,.0f} tokens/s {source}"

    @property
    def refused(self) -> bool:
        """Whether `gptlab train` refuses the run: it needs over 15% more memory than the device or the host has."""
        over = 1 + TOO_MUCH
        return self.memory.least > over * self.available or self.host > over * self.host_available

    def to_json(self) -> dict[str, Any]:
        facts = dataclasses.asdict(self)
        facts["host_available"] = self.host_available if math.isfinite(self.host_available) else None
        return {
            **facts,
            "device_hours": self.device_hours,
            "needed_gb": self.needed_gb,
            "available_gb": self.available_gb,
            "refused": self.refused,
            "verdict": self.verdict,
        }


def say_time(hours: float | None) -> str:
    """A time as a person says it: `about 9.8 h`, `about 12 min`."""
    if hours is None:
        return "time unknown"
    if hours >= 1:
        return f"about {hours:,.{1 if hours < 100 else 0}f} h"
    return f"about {hours * 60:.0f} min" if hours * 3600 >= 90 else f"about {max(1, hours * 3600):.0f} s"


def plan_here(recipe: Recipe, device: torch.device, processes: int = 1, data: TaskData | None = None) -> Plan:
    """The plan of a run on a device of this machine with the memory that is free now.

    `.refused` and `.sentence` answer before the run starts. Activations are counted only if `bound_activations`, which
    needs no forward pass, does not fit.

    Args:
        recipe: resolved, so that train.init_from is not read again.
        data: the recipe's datasets, if they are open.
    """
    here = local_device(device, processes)
    resolved = resolve_recipe(recipe, here.kind, data, recipe.model)
    found = plan_recipe(resolved, here, processes=processes, bound=True)
    return plan_recipe(resolved, here, processes=processes) if found.memory.peak > here.available else found


def plan_recipe(
    recipe: Recipe | Resolved,
    device: Device,
    mfu: float = 0.4,
    price: float = 0.0,
    processes: int = 1,
    measure: Callable[[Recipe, Shape, int], Speed | None] | None = None,
    bound: bool = False,
) -> Plan:
    """The plan of a run on one device, or on several with one process each.

    Args:
        recipe: batch.micro_batch = auto takes the largest micro-batch that fits.
        device: of `Device.named` or `local_device`.
        mfu: share of the peak FLOP/s of the regime's matmul format, see `hardware.mfu`.
        price: of one device for one hour; 0 takes train.price_per_hour, the price of the whole machine.
        processes: ranks, see distributed.strategy.
        measure: times the device, such as `measure_speed` on a CPU, or returns None. It is not called if nothing fits.
        bound: with a given micro-batch, use `bound_activations` and look for no larger micro-batch.

    Raises:
        UserError: an argument is out of bounds; see also `resolve_recipe`, `spread_over` and `share_of_step`.
    """
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu {mfu}: must be above 0 and at most 1")
    if not 0 <= price < math.inf:
        raise UserError(f"--price {price:g}: must be 0 or more")
    if processes < 1:
        raise UserError(f"--gpus {processes}: must be at least 1")
    resolved = recipe if isinstance(recipe, Resolved) else _resolved(recipe, device)
    recipe, shape = resolved.recipe, resolved.shape
    model, gpu, steps = laid_out(shape), device.kind == "cuda", resolved.steps
    micro_batch, largest, need = _fit(recipe, shape, device, processes, bound)
    peak = device.gpu.peak(shape.regime.matmul_format) if device.gpu else None
    speed = Speed(processes * mfu * peak / model.flops_per_token(), "") if peak else None
    notes, measured = resolved.notes + _notes(recipe, gpu, processes), False
    if resolved.bf16 is not None:
        notes.append(f"precision.regime = auto is {recipe.precision.regime}: {say_bf16(resolved.bf16)}")
    if measure is not None and largest:
        try:
            if found := measure(recipe, shape, min(micro_batch, largest)):
                speed, measured, mfu = found, found.mfu is None, found.mfu or mfu
                notes.append(found.note)
        except UserError as error:
            notes.append(str(error))
    tokens = None if steps is None else steps * recipe.batch.tokens_per_step
    hours = _hours(recipe, steps, speed)
    price_per_hour = price * processes or recipe.train.price_per_hour
    state = bytes_of(model.parameters()) + optimizer_bytes(model, recipe.optim, gpu, recipe.train.ema).kept
    checkpoint = state + pruner_bytes(model, recipe.sparsity)
    # weights go to a GPU one at a time, from float32
    host = HOST[device.kind] + (4 * model.wte.weight.numel() if gpu else need.peak)
    read = resolved.epoch if resolved.epoch is not None else tokens
    return Plan(
        name=recipe.name,
        device=device.name,
        available=device.available,
        processes=processes,
        parameters=model.parameter_count(),
        flops_per_token=model.flops_per_token(),
        micro_batch=micro_batch,
        micro_batches=math.ceil(share_of_step(recipe, processes) / micro_batch),
        memory=need,
        largest_micro_batch=largest,
        mfu=mfu,
        measured=measured,
        tokens_per_second=speed.tokens if speed else None,
        steps=steps,
        tokens=tokens,
        hours=hours,
        cost=hours * price_per_hour if hours is not None and price_per_hour else None,
        host=host,
        copies=checkpoint,
        host_available=device.host,
        data=None if read is None else read * (2 if shape.model.vocab_size <= 2**16 else 4),
        checkpoint=checkpoint,
        checkpoints=_checkpoints(recipe, steps) * checkpoint,
        sentence=_sentence(recipe, shape, device, processes, need, host, largest),
        notes=notes,
    )


def _resolved(recipe: Recipe, device: Device) -> Resolved:
    """A recipe for a device. A GPU may be elsewhere: its data sheet says how fast it multiplies bf16."""
    if device.kind == "cpu":
        return resolve_recipe(recipe, "cpu")
    gpu = device.gpu
    by_sheet = (gpu.bf16 or 0.0) / (gpu.tf32 or gpu.fp32) if gpu and (gpu.tf32 or gpu.fp32) else 1.0
    return resolve_recipe(recipe, device.kind, measure=lambda *_: by_sheet)


def _fit(recipe: Recipe, shape: Shape, device: Device, processes: int, bound: bool) -> tuple[int, int, Memory]:
    """The micro-batch, the largest that fits, and the memory of the first."""
    share, given = share_of_step(recipe, processes), recipe.batch.micro_batch
    if bound and given != "auto":
        micro_batch, saved = min(given, share), bound_activations(shape, device.kind == "cuda")
        return micro_batch, micro_batch, step_memory(recipe, shape, micro_batch, device.kind, processes, saved)
    largest = largest_that_fits(recipe, shape, device, processes)
    micro_batch = max(1, largest) if given == "auto" else min(given, share)
    return micro_batch, largest, step_memory(recipe, shape, micro_batch, device.kind, processes)


def _notes(recipe: Recipe, gpu: bool, processes: int) -> list[str]:
    notes = []
    if recipe.compile.enabled:
        notes.append("activations are those of an eager run; a compiled run keeps fewer")
    if recipe.precision.regime.startswith("fp8") and gpu:
        notes.append("the hours are those of bf16; float8 is faster only in large matrices")
    if recipe.task == "classify":
        notes.append("every document counts as block_size tokens; shorter documents take less time")
    if processes > 1:
        notes.append("the hours leave out communication between processes and waiting for one another")
    return notes


def _hours(recipe: Recipe, steps: int | None, speed: Speed | None) -> float | None:
    if steps is None or speed is None:
        return None
    evaluations = 2 + (steps // recipe.train.eval_every if recipe.train.eval_every else 0)
    evaluated = evaluations * recipe.eval.tokens * (2 if recipe.eval.train else 1)
    # a forward pass has a third of the FLOPs of a training step
    return (steps * recipe.batch.tokens_per_step + evaluated / 3) / speed.tokens / 3600


def _checkpoints(recipe: Recipe, steps: int | None) -> float:
    """How many checkpoints exist at one time, with the one that is being written."""
    settings = recipe.checkpoint
    written = math.inf if steps is None else 1 + (steps // settings.every if settings.every else 0)
    return min(settings.keep_last + settings.keep_best + 1, written) + len(settings.at)


def _sentence(
    recipe: Recipe, shape: Shape, device: Device, processes: int, need: Memory, host: float, largest: int
) -> str:
    """Whether the run fits, with numbers and what to change."""
    have = f"the {device.available / GB:.1f} GB available on {device.name}"
    if device.kind == "cuda" and host > device.host:
        return (
            f"needs about {host / GB:.1f} GB of host memory for PyTorch and one tensor on its way to the GPU, more "
            f"than the {device.host / GB:.1f} GB that a process can have: end other programs, or start fewer processes"
        )
    if need.peak <= device.available:
        return f"needs about {need.peak / GB:.3g} GB of {have}"
    needs = f"needs about {need.peak / GB:.3g} GB {need.moment}, more than {have}"
    if largest:
        return f"{needs}: --batch.micro-batch {largest} fits, with the same tokens in a step"
    ways: list[dict[str, Any]] = [
        {"train.activation_checkpointing": True},
        {"train.activation_checkpointing": True, "precision.regime": "bf16_pure"},
    ]
    if processes > 1:
        ways.insert(0, {"distributed.strategy": "fsdp", "distributed.shard_over": 0})
        ways += [{**ways[0], **way} for way in ways[1:]]
    for way in ways:
        try:
            other = recipe.replace(way)
        except ConfigError:
            continue
        flags = " ".join(f"--{key.replace('_', '-')} {str(value).lower()}" for key, value in way.items())
        other_shape = dataclasses.replace(shape, precision=other.precision)
        if most := largest_that_fits(other, other_shape, device, processes):
            return f"{needs}: {flags} --batch.micro-batch {most} fits"
    return f"{needs}; even micro-batch 1 in bf16 with activation checkpointing does not fit. Use a smaller model."
