"""precision.regime = auto: bf16 where the device multiplies it faster, at the shapes of the recipe's own matrices."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gptlab.config import Recipe
from gptlab.model.gpt import GPT
from gptlab.model.matmul import linear
from gptlab.planning.shape import Shape
from gptlab.precision.regimes import REGIMES, Regime

SECONDS, ROUNDS = 0.7, 3  # to measure for, and rounds at least
FLOPS = {"cpu": 8e9, "cuda": 4e12}  # of a round, so that several fit
LEAST_ROWS = 128  # tokens; with fewer, a product is bound by memory
COLUMNS = 4096  # of a larger vocabulary, by which time grows in proportion
GAIN = 1.3  # from which on bf16 is taken: autocast's copies of what is not multiplied cost a tenth of a small step


def choose_regime(speed: float, kind: str) -> str:
    """The regime for a device that multiplies bf16 `speed` times as fast as float32, or as TF32 where it has that.

    On a CPU casts by hand cost less than autocast's.
    """
    if speed < GAIN:
        return wide_regime(kind)
    return "bf16_master" if kind == "cpu" else "amp_bf16"


def wide_regime(kind: str) -> str:
    """What bf16 is compared with: fp32, or tf32 on a GPU that has it."""
    has_tf32 = kind == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    return "tf32" if has_tf32 else "fp32"


def say_bf16(speed: float) -> str:
    return f"bf16 matrix products are {speed:.2g} times as fast"


def bf16_speed(recipe: Recipe, shape: Shape, device: torch.device) -> float:
    """How many times as fast as float32 the device takes the recipe's matrix products in bf16, in about a second.

    It is 0 where that is not tried: on a device that is neither a CPU nor a CUDA GPU. Timed are the linear layers and
    the head, each forward and backward, with autocast's copies of weights and inputs, in turn with both regimes. On a
    GPU that has TF32 the float32 products are in TF32. The global generator is not used, and the settings of the
    process are as before.

    Args:
        recipe: its step decides how many rows a matrix has.
        shape: of its model.
    """
    if device.type not in FLOPS:
        return 0.0
    sides = [REGIMES[wide_regime(device.type)], REGIMES["amp_bf16"]]
    weights = matrices(shape)
    each = 6 * sum(rows * columns for rows, columns in weights)  # FLOPs of a token
    sequences = recipe.batch.micro_batch if recipe.batch.micro_batch != "auto" else recipe.sequences_per_step
    tokens = min(sequences * shape.model.block_size, max(LEAST_ROWS, int(FLOPS[device.type] / each)))
    threads, mode = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        torch.set_num_threads(recipe.train.threads or threads)
        draw = torch.Generator().manual_seed(0)
        products: list[tuple[int, Tensor, Tensor]] = []
        for (rows, columns), count in weights.items():
            x, weight = (torch.randn(n, columns, generator=draw).to(device).requires_grad_() for n in (tokens, rows))
            products.append((count, x, weight))
        best = {side.name: math.inf for side in sides}  # other work on the machine makes times longer, never shorter
        rounds = 0
        began = time.perf_counter()
        for side in sides:
            _seconds(products, side, device)  # a warm-up
        while rounds < ROUNDS or time.perf_counter() - began < SECONDS:
            for side in sides if rounds % 2 else reversed(sides):
                best[side.name] = min(best[side.name], _seconds(products, side, device))
            rounds += 1
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(mode)
    return best[sides[0].name] / best[sides[1].name]


def matrices(shape: Shape) -> Counter[tuple[int, int]]:
    """(rows, columns) of each matrix that tokens are multiplied with, and how much of it a step has.

    A head with more rows than `COLUMNS` counts as several of that many.
    """
    model = shape.lay_out()
    found: Counter[tuple[int, int]] = Counter()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            found[module.out_features, module.in_features] += 1
    if isinstance(model, GPT):
        rows, columns = model.head_weight.shape
        if not shape.model.tied:
            found[rows, columns] -= 1
        found[min(rows, COLUMNS), columns] += max(1, round(rows / COLUMNS))
    return +found


def _seconds(products: list[tuple[int, Tensor, Tensor]], regime: Regime, device: torch.device) -> float:
    """Seconds of a step's products, forward and backward."""
    torch.set_float32_matmul_precision("high" if regime.tf32 else "highest")
    wait: Callable[[], object] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    total = 0.0
    for count, x, weight in products:
        wait()
        began = time.perf_counter()
        with regime.context(device):
            out = linear(x, weight)  # the model's own, which takes another library on some processors
        torch.autograd.grad(out, (x, weight), torch.ones_like(out))
        wait()
        total += count * (time.perf_counter() - began)
    return total
