"""The sizes of a run's tensors: its model without memory, whole or the rows of one rank."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import nn

from gptlab.config import Model, Precision
from gptlab.distributed.shard import ShardSpec
from gptlab.model.encoder import Encoder
from gptlab.model.gpt import GPT
from gptlab.precision.regimes import FP32, Regime, apply_regime, make_regime


@dataclass(frozen=True)
class Shape:
    """The settings of a recipe that decide how large its tensors are."""

    model: Model
    precision: Precision
    n_labels: int
    """Outputs of a classifier; 0 for a language model."""

    @property
    def regime(self) -> Regime:
        return make_regime(self.precision)

    @property
    def stream(self) -> torch.dtype:
        """Dtype of the residual stream."""
        return FP32 if self.regime.autocast else self.regime.stream or self.regime.weights

    @property
    def matmul(self) -> torch.dtype:
        """Dtype of the matrix multiplications inside the blocks."""
        return self.regime.matmul

    def lay_out(self, layers: int | None = None) -> GPT | Encoder:
        """The model in its regime's dtypes, on the meta device.

        Args:
            layers: in place of the shape's own.
        """
        config = self.model if layers is None else self.model.model_copy(update={"n_layer": layers})
        with torch.device("meta"):
            model = Encoder(config, self.n_labels) if self.n_labels else GPT(config)
            apply_regime(model, self.regime)
        return model


@functools.lru_cache(maxsize=64)
def laid_out(shape: Shape, over: int = 1) -> GPT | Encoder:
    """`Shape.lay_out`, with the local rows of rank 0 where FSDP shards the weights over `over` ranks."""
    model = shape.lay_out()
    if over > 1:
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    rows = nn.Parameter(p.detach()[: math.ceil(len(p) / over)])
                    rows.shard = ShardSpec(p.shape, 0, None, True)  # type: ignore[attr-defined]
                    module._parameters[name] = rows
    return model
