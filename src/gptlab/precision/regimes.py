"""A regime is a precision policy: in which format parameters are stored, and each part of a step is computed."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from gptlab.config import Precision
from gptlab.errors import NotApplicable as NotApplicable
from gptlab.hardware import Format
from gptlab.precision.libraries import load_library

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Regime:
    name: str
    weights: torch.dtype = FP32
    """Parameters, their gradients and moments."""
    autocast: torch.dtype | None = None
    """Matmuls and attention inside autocast; norms and the loss stay float32."""
    tf32: bool = False
    """float32 matmuls in TF32: 10 bits of mantissa. Under autocast next to none are left to matter."""
    loss_scaling: bool = False
    """Multiply the loss so that small float16 gradients are not lost; steps with an overflow are skipped."""
    float8: str | None = None
    """torchao's recipe for the blocks' linear layers; the rest is as `autocast` has it."""
    emulated: bool = False
    """Round to float8 and multiply in float32: what a device without float8 matmuls does."""
    head: torch.dtype | None = None
    """Head matmul and the head's weight; None: as the rest of the model."""
    norms: torch.dtype | None = None
    """Norms and their weights; None: as the rest of the model."""
    loss: torch.dtype = FP32
    """Softmax (or sigmoid) and its gradient. What is logged and evaluated is float32 in any case."""

    @property
    def gathered(self) -> torch.dtype | None:
        """What FSDP may gather the blocks' matrices in, as autocast rounds them to it anyway; None: as they are."""
        return self.autocast if self.float8 is None else None  # float8's scales are of the float32 weights

    @property
    def matmul_format(self) -> Format:
        """Format that the matrices are multiplied in, whose peak FLOP/s MFU and the planner's time are shares of.

        It is bf16 for the float8 regimes: head and attention are not in float8, and so their MFU compares with that of
        amp_bf16. The head's own format (`precision.head`) does not count.
        """
        low = self.autocast or self.weights
        if low is FP32:
            return "tf32" if self.tf32 else "fp32"
        return "bf16" if low is BF16 else "fp16"

    def context(self, device: torch.device) -> AbstractContextManager[object]:
        """Autocast, or nothing, around a forward pass."""
        return torch.autocast(device.type, self.autocast) if self.autocast else contextlib.nullcontext()


REGIMES = {
    regime.name: regime
    for regime in (
        Regime("fp32"),
        Regime("tf32", tf32=True),
        Regime("amp_bf16", autocast=BF16, tf32=True),
        Regime("amp_fp16", autocast=FP16, tf32=True, loss_scaling=True),
        Regime("bf16_pure", weights=BF16, loss=BF16),
        Regime("fp16_pure", weights=FP16, loss=FP16),
        Regime("fp8_tensorwise", autocast=BF16, tf32=True, float8="tensorwise"),
        Regime("fp8_rowwise", autocast=BF16, tf32=True, float8="rowwise"),
    )
}


def make_regime(precision: Precision, device: torch.device | None = None) -> Regime:
    """The regime of a recipe's `precision` section.

    Args:
        device: where it runs, if not on a GPU: float8 is emulated elsewhere.
    """
    regime = REGIMES[precision.regime]
    if regime.float8 and device is not None and device.type != "cuda":
        regime = replace(regime, emulated=True)
    if precision.head == "fp32":  # TF32 would take from the head's matmul what is asked for
        regime = replace(regime, head=FP32, tf32=regime.name == "tf32")
    if precision.norms == "fp32":
        regime = replace(regime, norms=FP32)
    if precision.loss != "auto":
        regime = replace(regime, loss={"fp32": FP32, "bf16": BF16}[precision.loss])
    return regime


def enter_regime(precision: Precision, device: torch.device) -> Regime:
    """The regime of a `precision` section, with the process's float32 matmul mode set for it.

    Raises:
        NotApplicable: TF32 without a CUDA GPU of compute capability 8.0 or more; float8 without a torchao that works,
            or on a GPU below 8.9 (9.0 for scales a row). On a CPU float8 is emulated.
    """
    regime = make_regime(precision, device)
    cuda = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if regime.name == "tf32" and (cuda is None or cuda < (8, 0)):
        raise NotApplicable(
            f"precision.regime = tf32: TF32 needs an NVIDIA GPU from Ampere on, and this is {device.type}"
        )
    if regime.float8:
        _torchao(regime)
        least = (9, 0) if regime.float8 == "rowwise" else (8, 9)
        if (cuda is None and device.type != "cpu") or (cuda is not None and cuda < least):
            raise NotApplicable(
                f"precision.regime = {regime.name}: needs a GPU of compute capability {least[0]}.{least[1]} or more"
            )
    torch.set_float32_matmul_precision("high" if regime.tf32 else "highest")
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = regime.tf32
    return regime


def apply_regime(model: nn.Module, regime: Regime) -> None:
    """Give a model the regime's dtypes: its parameters, and what it multiplies its head and takes its loss in.

    A model is a GPT or an Encoder: its head is `lm_head` or `head` (a GPT's may be its embedding, which is then stored
    in the head's dtype), its norms are the modules whose class ends in Norm, and `stream_dtype`, `head_dtype` and
    `loss_dtype` are read as it runs.
    """
    model.to(regime.weights)
    for name, module in model.named_modules():
        if regime.norms and type(module).__name__.endswith("Norm"):
            module.to(regime.norms)
        if regime.head and name in ("lm_head", "head"):
            module.to(regime.head)
    if regime.head and getattr(model, "lm_head", True) is None:
        model.wte.to(regime.head)
    parts: Any = model
    parts.stream_dtype = regime.weights if regime.autocast is None else None
    parts.head_dtype, parts.loss_dtype = regime.head, regime.loss
    if regime.float8:
        _to_float8(model, regime)


def _torchao(regime: Regime) -> Any:
    wanted_by = f"precision.regime = {regime.name}"
    return load_library("torchao.float8", wanted_by, "Float8LinearConfig", "convert_to_float8_training")


def _to_float8(model: nn.Module, regime: Regime) -> None:
    """Train the blocks' linear layers in float8 (Micikevicius et al. 2022, arXiv 2209.05433), in place, by torchao.

    Emulated, an operand is rounded to float8 with the same scale, divided by it in float32, and multiplied there. On a
    CPU `torch._scaled_mm` may give the same products to oneDNN's reference code (on processors with AMX, 800 times
    slower than float32), or find no code for them.
    """
    torchao = _torchao(regime)

    def wanted(module: nn.Module, name: str) -> bool:
        return (
            name.startswith("h.")
            and isinstance(module, nn.Linear)
            and module.in_features % 16 == 0
            and module.out_features % 16 == 0
        )

    config = replace(torchao.Float8LinearConfig.from_recipe_name(regime.float8), emulate=regime.emulated)
    torchao.convert_to_float8_training(model, config=config, module_filter_fn=wanted)
