"""The GPU's kernel of attention: PyTorch's choice, a given one, or the fastest at the run's shape."""

from __future__ import annotations

import contextlib
import statistics
import time
import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gptlab.config import Recipe
from gptlab.precision.regimes import Regime

KERNELS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
# What follows the preferred kernel takes the shapes that it does not know. flash is also a way around cuDNN.
OTHERS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
ORDERS = {"cudnn": [*KERNELS.values(), *OTHERS], "flash": [KERNELS["flash"], *OTHERS]}
ROUNDS, WARM_UP = 10, 3


@contextlib.contextmanager
def attention_kernel(name: str) -> Iterator[None]:
    """Prefer a kernel of `ORDERS`; other names leave the choice to PyTorch."""
    if name not in ORDERS:
        yield
        return
    compiler = torch.compiler.config  # its cache of compiled code does not know which kernel the code was compiled for
    before = compiler.cache_key_tag
    compiler.cache_key_tag = f"{before} attention {name}".strip()
    try:
        with sdpa_kernel(ORDERS[name], set_priority=True):
            yield
    finally:
        compiler.cache_key_tag = before


def attention_seconds(recipe: Recipe, regime: Regime, device: torch.device) -> dict[str, float]:
    """Median seconds of a layer's attention, forward and backward, by each kernel that runs here, in turns."""
    B, shape, draw = int(recipe.batch.micro_batch), recipe.model, torch.Generator(device).manual_seed(0)
    qkv = torch.randn(B, shape.block_size, 3 * shape.n_embd, generator=draw, device=device)
    qkv = qkv.to(regime.matmul).requires_grad_()
    q, k, v = qkv.unflatten(2, (3, shape.n_head, shape.head_size)).permute(2, 0, 3, 1, 4)  # (B, H, T, D) of the model

    def run(kernel: SDPBackend) -> float:
        synchronize(device)
        began = time.perf_counter()
        with sdpa_kernel([kernel]):
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=shape.dropout, is_causal=True)
        torch.autograd.grad(y, qkv, y, retain_graph=True)  # q, k and v are made once
        synchronize(device)
        return time.perf_counter() - began

    found: dict[str, list[float]] = {name: [] for name in KERNELS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's reasons why a kernel does not run
        for r in range(WARM_UP + ROUNDS):
            for name in list(found):
                try:
                    seconds = run(KERNELS[name])
                except RuntimeError:  # there is no such kernel for this GPU, dtype or shape
                    del found[name]
                    continue
                found[name] += [seconds] if r >= WARM_UP else []
    return {name: statistics.median(times) for name, times in found.items()}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fastest(seconds: dict[str, float]) -> tuple[str, str]:
    """The fastest kernel, or "auto" where there is no choice, and a sentence for the user."""
    name = min(seconds, key=lambda kernel: seconds[kernel]) if len(seconds) > 1 else "auto"
    told = ", ".join(f"{kernel} {1000 * s:.3g} ms" for kernel, s in seconds.items()) or "neither cudnn nor flash runs"
    return name, f"train.attention = fastest: {name} ({told} a layer, forward and backward)"


def ignored(recipe: Recipe, asked: Recipe, device: torch.device) -> list[str]:
    """Sentences on settings of GPUs and of the compiler that do nothing in this run.

    Args:
        recipe: resolved.
        asked: as the user wrote it.
    """
    found = []
    if asked.train.attention != "auto" and device.type != "cuda":
        found.append(f"train.attention = {asked.train.attention}: does nothing on {device.type}; it is for GPUs")
    elif asked.train.attention == "fastest" and asked.model.document_attention:
        found.append("train.attention = fastest: left to PyTorch, as attention within documents has a mask")
    if recipe.compile.mode != "default" and not recipe.compile.enabled:
        found.append(f"compile.mode = {recipe.compile.mode}: does nothing, as this run is not compiled")
    return found
