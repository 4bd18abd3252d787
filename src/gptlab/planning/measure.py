"""The training speed of this machine: that of an earlier run, by its steps or its MFU, or timed on the CPU."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptlab.config import Model, Recipe
from gptlab.errors import RunError
from gptlab.hardware import device_name
from gptlab.model.encoder import Encoder, build_encoder
from gptlab.model.gpt import GPT, build_model
from gptlab.optim.optimizers import make_optimizer, set_lr
from gptlab.planning.shape import Shape, laid_out
from gptlab.precision.regimes import Regime, apply_regime, enter_regime
from gptlab.rundir import RunDir

SAMPLE = 2e10  # FLOPs; a larger micro-step is timed in part
LEAST_STEPS = 20  # timed steps of a run that says how fast a recipe is
CPU = torch.device("cpu")
# The settings that decide how long a step takes.
OF_SPEED = attrgetter(
    "task",
    "model",
    "batch.tokens_per_step",
    "precision",
    "compile.enabled",
    "optim.name",
    "sparsity.method",
    "train.activation_checkpointing",
)
OF_MFU = attrgetter("task", "precision", "compile.enabled")


@dataclass(frozen=True)
class Speed:
    """Training speed of this machine."""

    tokens: float
    """Training tokens a second."""
    note: str
    """What was timed."""
    mfu: float | None = None
    """The share of the peak FLOP/s that another model reached here, of which tokens follow; None: they were timed."""


@dataclass(frozen=True)
class Earlier:
    """A run that was timed on this device, in one process."""

    run: RunDir
    recipe: Recipe
    tokens: float
    """Training tokens a second."""
    parameters: int
    threads: int | None
    ended: float

    def mfu(self) -> float | None:
        """The share of the device's peak FLOP/s; None where it is not known."""
        line = self.run.last_line("mfu") or {}
        if not (line.get("mfu") and line.get("tokens_per_second") and self.parameters):
            return None
        return self.tokens * float(line["mfu"]) / float(line["tokens_per_second"])  # of the run in place of a step


def earlier_runs(device: torch.device, runs: Iterable[Path]) -> Iterator[Earlier]:
    """The runs on a device of this name. A run of a few steps, or with damaged files, is left out."""
    for run in map(RunDir, runs):
        try:
            result, facts = run.read_json("result.json"), run.read_json("environment.json")
            tokens = result.get("tokens_per_second") if result.get("timed_steps", 0) >= LEAST_STEPS else None
            if tokens and facts.get("device_name") == device_name(device) and facts.get("processes") == 1:
                recipe, ended = run.read_recipe(), (run.path / "result.json").stat().st_mtime
                yield Earlier(run, recipe, tokens, facts.get("parameters", 0), facts.get("threads"), ended)
        except (RunError, OSError):
            continue


def speed_of_a_run(recipe: Recipe, micro_batch: int, device: torch.device, earlier: Sequence[Earlier]) -> Speed | None:
    """The speed of the newest run that took the same steps; None without one.

    On a CPU, the number of threads must be the same too.

    Args:
        recipe: resolved.
        micro_batch: sequences.
        earlier: runs on the device.
    """
    threads = recipe.train.threads or torch.get_num_threads()
    same = [
        one
        for one in earlier
        if (device.type == "cuda" or one.threads == threads)
        and OF_SPEED(one.recipe) == OF_SPEED(recipe)
        and one.recipe.batch.micro_batch == micro_batch
    ]
    if not same:
        return None
    newest = max(same, key=lambda one: one.ended)
    return Speed(newest.tokens, f"tokens a second are those of {newest.run.path}")


def speed_by_mfu(recipe: Recipe, shape: Shape, peak: float | None, earlier: Sequence[Earlier]) -> Speed | None:
    """The speed at the MFU that the run whose model is nearest in size reached; None without one.

    Args:
        recipe: resolved. The run has its task and its regime, and is compiled if it is.
        peak: FLOP/s of the device in the regime's matmul format.
        earlier: runs on the device.
    """
    model = laid_out(shape)
    alike = [(one, share) for one in earlier if OF_MFU(one.recipe) == OF_MFU(recipe) and (share := one.mfu())]
    if not alike or not peak:
        return None
    parameters = model.parameter_count()
    one, share = min(alike, key=lambda each: (abs(math.log(each[0].parameters / parameters)), -each[0].ended))
    note = f"the MFU is that of {one.run.path}, of {one.parameters / 1e6:,.3g}M parameters"
    return Speed(share * peak / model.flops_per_token(), note, share)


def measure_speed(
    recipe: Recipe,
    shape: Shape,
    micro_batch: int,
    seconds: float = 3.0,
    clock: Callable[[], float] = time.perf_counter,
) -> Speed:
    """Time micro-steps and optimizer steps on the CPU, in turn, after one of each as a warm-up.

    Of a model whose micro-step takes more than `SAMPLE` FLOPs only a part is timed: fewer sequences, then two layers,
    then a shorter context. The time of a token is scaled by FLOPs, the time of an update by the number of weights.

    Args:
        micro_batch: sequences.
        seconds: to spend.

    Raises:
        UserError: the regime does not work on a CPU, or a library is missing.
    """
    config, sequences = _part(shape, micro_batch)
    threads, mode = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        torch.set_num_threads(recipe.train.threads or threads)
        regime = enter_regime(recipe.precision, CPU)
        model, inputs = _model_and_batch(config, shape.n_labels, sequences, regime)
        model.activation_checkpointing = recipe.train.activation_checkpointing
        optimizer = make_optimizer(model, recipe.optim, recipe.seed, recipe.train.ema, config)
        set_lr(optimizer, 0.0)  # the weights do not change

        def step() -> tuple[float, float]:
            """Seconds of a micro-step and of an update."""
            begin = clock()
            with regime.context(CPU):
                out = model(*inputs)
            out.train.backward()
            middle = clock()
            optimizer.step()
            return middle - begin, clock() - middle

        step()
        steps = [step()]
        while sum(map(sum, steps)) < seconds:
            steps.append(step())
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(mode)
    passes, update = (sum(each) / len(steps) for each in zip(*steps, strict=True))
    whole, timed = laid_out(shape), sequences * config.block_size
    per_token = passes / timed * whole.flops_per_token() / model.flops_per_token()
    per_step = update * whole.parameter_count() / model.parameter_count()
    note = f"tokens a second were measured for about {seconds:.2g} s on this CPU"
    if config != shape.model:
        note += f" and are extrapolated from {config.n_layer} of {shape.model.n_layer} layers and {timed} tokens"
    return Speed(1 / (per_token + per_step / (recipe.sequences_per_step * shape.model.block_size)), note)


def _part(shape: Shape, micro_batch: int) -> tuple[Model, int]:
    """The model and the number of sequences to time."""
    config = shape.model

    def flops() -> int:  # of one sequence
        return laid_out(dataclasses.replace(shape, model=config)).flops_per_token() * config.block_size

    sequences = max(1, min(micro_batch, int(SAMPLE // flops())))
    if flops() > SAMPLE:
        config = config.model_copy(update={"n_layer": min(2, config.n_layer)})
    if flops() > SAMPLE:
        block = max(128, int(config.block_size * SAMPLE / flops()))
        config = config.model_copy(update={"block_size": min(block, config.block_size)})
    return config, sequences


def _model_and_batch(
    config: Model, n_labels: int, sequences: int, regime: Regime
) -> tuple[GPT | Encoder, tuple[Any, ...]]:
    tokens = torch.arange(sequences * config.block_size).view(sequences, -1) % config.vocab_size
    factor = torch.tensor((2.0**16 if regime.loss_scaling else 1.0) / tokens.numel())
    if n_labels:
        lengths, targets = torch.full((sequences,), config.block_size), torch.zeros(sequences, n_labels)
        encoder = build_encoder(config, n_labels, on_meta=lambda m: apply_regime(m, regime))
        return encoder, (tokens, lengths, targets, factor)
    documents: Tensor | None = torch.zeros_like(tokens) if config.document_attention else None
    gpt = build_model(config, on_meta=lambda m: apply_regime(m, regime))
    return gpt, (tokens, tokens, documents, factor)
