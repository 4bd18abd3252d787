"""The training speed of this machine: that of an earlier run of the same recipe, or timed on the CPU."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
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


@dataclass(frozen=True)
class Speed:
    """Training speed of this machine."""

    tokens: float
    """Training tokens a second."""
    note: str
    """What was timed."""


def speed_of_a_run(recipe: Recipe, micro_batch: int, device: torch.device, runs: Iterable[Path]) -> Speed | None:
    """The speed of the newest run that took the same steps on a device of this name, in one process; None without one.

    On a CPU, the number of threads must be the same too. A run of a few steps, or with damaged files, does not count.

    Args:
        recipe: resolved.
        micro_batch: sequences.
        runs: run directories.
    """
    threads = recipe.train.threads or torch.get_num_threads()
    best: tuple[float, Speed] | None = None
    for run in map(RunDir, runs):
        try:
            result, facts = run.read_json("result.json"), run.read_json("environment.json")
            tokens = result.get("tokens_per_second") if result.get("timed_steps", 0) >= LEAST_STEPS else None
            same = facts.get("device_name") == device_name(device) and facts.get("processes") == 1
            same = same and (device.type == "cuda" or facts.get("threads") == threads)
            if not (tokens and same and run.exists()):
                continue
            earlier, ended = run.read_recipe(), (run.path / "result.json").stat().st_mtime
        except (RunError, OSError):
            continue
        same = OF_SPEED(earlier) == OF_SPEED(recipe) and earlier.batch.micro_batch == micro_batch
        if same and (best is None or ended > best[0]):
            best = ended, Speed(tokens, f"tokens a second are those of {run.path}")
    return best and best[1]


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
        optimizer = make_optimizer(model, recipe.optim, recipe.seed)
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
