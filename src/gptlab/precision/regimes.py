"""Precision regimes: the dtypes of the parameters and of each part of a training step."""

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
    """Dtype of the parameters, their gradients and moments."""
    autocast: torch.dtype | None = None
    """Dtype of matmuls and attention under autocast. Norms and the loss stay float32."""
    stream: torch.dtype | None = None
    """Dtype of activations and their gradients, and of matmuls, to which the weights are cast explicitly: the residual
    stream is in it too, which autocast leaves in float32. Norms and the loss are computed in float32."""
    tf32: bool = False
    """Compute float32 matmuls in TF32 (10 bits of mantissa). Few matmuls are left in float32 under autocast."""
    loss_scaling: bool = False
    """Scale the loss so that small float16 gradients do not underflow. Steps with an overflow are skipped."""
    float8: str | None = None
    """torchao's recipe name for the linear layers of the blocks. The other parts follow `autocast`."""
    emulated: bool = False
    """Round to float8 and multiply in float32, for devices without float8 matmuls."""
    head: torch.dtype | None = None
    """Dtype of the head's weight and matmul. None: the same as the rest of the model."""
    norms: torch.dtype | None = None
    """Dtype of the norms and their weights. None: the same as the rest of the model."""
    loss: torch.dtype = FP32
    """Dtype of the softmax (or sigmoid) and its gradient. Logged and evaluated losses are always float32."""

    @property
    def gathered(self) -> torch.dtype | None:
        """Dtype in which FSDP may gather the block matrices, if they are cast to it anyway. None: unchanged."""
        if self.float8:
            return None  # its scales are computed from the float32 weights
        return self.autocast or self.stream

    @property
    def matmul(self) -> torch.dtype:
        """Dtype of the matmuls, keys and values."""
        return self.autocast or self.stream or self.weights

    @property
    def matmul_format(self) -> Format:
        """Format of the matrix products. MFU and the planner's time are relative to the GPU's peak in this format.

        The float8 regimes have bf16, because head and attention are not in float8; their MFU is thus comparable with
        that of amp_bf16. The format of the head (`precision.head`) is ignored.
        """
        low = self.matmul
        if low is FP32:
            return "tf32" if self.tf32 else "fp32"
        return "bf16" if low is BF16 else "fp16"

    def context(self, device: torch.device) -> AbstractContextManager[object]:
        """The context of a forward pass: autocast, or a context that does nothing."""
        return torch.autocast(device.type, self.autocast) if self.autocast else contextlib.nullcontext()


REGIMES = {
    regime.name: regime
    for regime in (
        Regime("fp32"),
        Regime("tf32", tf32=True),
        Regime("amp_bf16", autocast=BF16, tf32=True),
        Regime("amp_fp16", autocast=FP16, tf32=True, loss_scaling=True),
        Regime("bf16_master", stream=BF16, tf32=True),
        Regime("bf16_pure", weights=BF16, loss=BF16),
        Regime("fp16_pure", weights=FP16, loss=FP16),
        Regime("fp8_tensorwise", autocast=BF16, tf32=True, float8="tensorwise"),
        Regime("fp8_rowwise", autocast=BF16, tf32=True, float8="rowwise"),
    )
}


def make_regime(precision: Precision, device: torch.device | None = None) -> Regime:
    """The regime of a recipe's `precision` section.

    Args:
        device: where the model runs; None means a GPU. Other devices emulate float8.
    """
    regime = REGIMES[precision.regime]
    if regime.float8 and device is not None and device.type != "cuda":
        regime = replace(regime, emulated=True)
    if precision.head == "fp32":  # the head's matmul must not be rounded to TF32
        regime = replace(regime, head=FP32, tf32=regime.name == "tf32")
    if precision.norms == "fp32":
        regime = replace(regime, norms=FP32)
    if precision.loss != "auto":
        regime = replace(regime, loss={"fp32": FP32, "bf16": BF16}[precision.loss])
    return regime


def enter_regime(precision: Precision, device: torch.device) -> Regime:
    """The regime of a `precision` section. Also sets the float32 matmul mode of the process.

    Raises:
        NotApplicable: TF32 needs a CUDA GPU of compute capability 8.0 or higher. float8 needs torchao and, on a GPU,
            compute capability 8.9 (9.0 for fp8_rowwise). A CPU emulates float8.
    """
    regime = make_regime(precision, device)
    cuda = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if regime.name == "tf32" and (cuda is None or cuda < (8, 0)):
        raise NotApplicable(
            f"precision.regime = tf32: TF32 needs an NVIDIA GPU of compute capability 8.0 or higher, not {device.type}"
        )
    if regime.float8:
        _torchao(regime)
        least = (9, 0) if regime.float8 == "rowwise" else (8, 9)
        if (cuda is None and device.type != "cpu") or (cuda is not None and cuda < least):
            raise NotApplicable(
                f"precision.regime = {regime.name}: needs a GPU of compute capability {least[0]}.{least[1]} or higher"
            )
    torch.set_float32_matmul_precision("high" if regime.tf32 else "highest")
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = regime.tf32
    return regime


def apply_regime(model: nn.Module, regime: Regime) -> None:
    """Set a model's dtypes: of the parameters, of the head's matmul and of the loss.

    Args:
        model: a GPT or an Encoder. The head is `lm_head`, `head` or, if tied, the embedding, which is then stored in
            the head's dtype. Norms are the modules whose class name ends in Norm. The model reads `stream_dtype`,
            `head_dtype` and `loss_dtype` in its forward pass.
        regime: the dtypes.
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
    parts.stream_dtype = (regime.stream or regime.weights) if regime.autocast is None else None
    parts.head_dtype, parts.loss_dtype = regime.head, regime.loss
    if regime.float8:
        _to_float8(model, regime)


def _torchao(regime: Regime) -> Any:
    wanted_by = f"precision.regime = {regime.name}"
    return load_library("torchao.float8", wanted_by, "Float8LinearConfig", "convert_to_float8_training")


def _to_float8(model: nn.Module, regime: Regime) -> None:
    """Convert the linear layers of the blocks to torchao's float8 training, in place (arXiv 2209.05433).

    Emulation rounds an operand to float8 with the same scale, divides it by the scale in float32, and multiplies in
    float32. torchao's float8 product is not used on a CPU: depending on the processor, oneDNN has only reference code
    for it (with AMX, 800 times slower than float32) or none.
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
