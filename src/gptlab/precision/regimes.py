"""A regime is a precision policy: dtype of the parameters, autocast, loss scaling and the mode of float32 matmuls."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from gptlab.config import UserError


class NotApplicable(UserError):
    """This machine cannot do what the regime says; it is never quietly run in another precision."""


@dataclass(frozen=True)
class Regime:
    name: str
    weights: torch.dtype = torch.float32
    """Parameters, gradients and moments."""
    autocast: torch.dtype | None = None
    """Matmuls and attention inside autocast; norms and the loss stay float32."""
    tf32: bool = False
    """float32 matmuls in TF32: 10 bits of mantissa. Under autocast next to none are left to matter."""
    loss_scaling: bool = False
    """Multiply the loss so that small float16 gradients are not lost; steps with an overflow are skipped."""

    def context(self, device: torch.device) -> AbstractContextManager[object]:
        """Autocast, or nothing, around a forward pass."""
        return torch.autocast(device.type, self.autocast) if self.autocast else contextlib.nullcontext()


REGIMES = {
    regime.name: regime
    for regime in (
        Regime("fp32"),
        Regime("tf32", tf32=True),
        Regime("amp_bf16", autocast=torch.bfloat16, tf32=True),
        Regime("amp_fp16", autocast=torch.float16, tf32=True, loss_scaling=True),
        Regime("bf16_pure", weights=torch.bfloat16, tf32=True),
    )
}


def enter_regime(name: str, device: torch.device) -> Regime:
    """The regime of a name, with the process's float32 matmul mode set for it.

    Raises:
        NotApplicable: TF32 without a CUDA GPU of compute capability 8.0 or more.
    """
    regime = REGIMES[name]
    if name == "tf32" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)):
        raise NotApplicable(
            f"precision.regime = tf32: TF32 needs an NVIDIA GPU from Ampere on, and this is {device.type}"
        )
    torch.set_float32_matmul_precision("high" if regime.tf32 else "highest")
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = regime.tf32
    return regime
