"""Parameters whose rows FSDP has spread over ranks, as plain tensors.

Under FSDP each rank holds some rows of every tensor. The optimizer, the pruner, clipping and checkpoints work on these
rows as plain parameters (`LocalShards`); a parameter's `shard` says which rows of the whole tensor they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class ShardSpec:
    """Which rows of a whole tensor this rank holds. All ranks of the group call each method that sends something."""

    shape: torch.Size
    """Of the whole tensor."""
    start: int
    """The first local row."""
    group: Any
    """The process group that the rows are spread over."""
    is_writer: bool
    """Whether this rank writes its rows into checkpoints. Under hybrid sharding several ranks hold the same rows."""

    def all_gather(self, rows: Tensor) -> Tensor:
        """The whole tensor, from the local rows of every rank; the first dimension is the parameter's."""
        each = -(-self.shape[0] // self.group.size())
        padded = rows.new_zeros(each, *rows.shape[1:])
        padded[: len(rows)] = rows
        gathered = rows.new_empty(each * self.group.size(), *rows.shape[1:])
        dist.all_gather(list(gathered.chunk(self.group.size())), padded, group=self.group)
        return gathered[: self.shape[0]]

    def local(self, whole: Tensor, n: int) -> Tensor:
        """The n local rows of a whole tensor."""
        return whole[self.start : self.start + n]


def shard_spec(parameter: Tensor) -> ShardSpec | None:
    """How a parameter is sharded; None where this rank holds all of it."""
    return getattr(parameter, "shard", None)


def global_shape(parameter: Tensor) -> torch.Size:
    shard = shard_spec(parameter)
    return parameter.shape if shard is None else shard.shape


def local_rows(whole: Tensor, parameter: Tensor) -> Tensor:
    """The part of a whole tensor that corresponds to a parameter: its local rows, or all of it."""
    shard = shard_spec(parameter)
    return whole if shard is None else shard.local(whole, len(parameter))


def all_reduce_shards(value: Tensor, parameters: Sequence[Tensor], op: Literal["sum", "max"] = "sum") -> Tensor:
    """Reduce a tensor, in place, over the ranks that the parameters are sharded over; unsharded, it stays as it is."""
    shard = shard_spec(parameters[0])
    if shard is not None:
        dist.all_reduce(value, dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX, group=shard.group)
    return value


def norms(tensors: Sequence[Tensor], parameters: Sequence[Tensor], order: float = 2.0) -> Tensor:
    """(n,): the norm of each of n whole tensors, in float32 at least.

    Args:
        tensors: one for each parameter, such as its gradient: the local rows where it is sharded.
        order: 2 or infinity.
    """
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    some = [t if t.numel() else t.new_zeros(1) for t in tensors]  # a rank may have no rows
    here = torch.stack(torch._foreach_norm(some, order, dtype=wide))
    shard = shard_spec(parameters[0])
    if shard is None:
        return here
    if order == math.inf:
        # a maximum may skip a NaN
        return all_reduce_shards(here.nan_to_num(nan=math.inf, posinf=math.inf), parameters, "max")
    # summed locally, in one order: hybrid replicas would otherwise be clipped by factors that differ in a bit
    parts = [torch.empty_like(here) for _ in range(shard.group.size())]
    dist.all_gather(parts, here.square(), group=shard.group)
    return torch.stack(parts).sum(0).sqrt()


class LocalShards:
    """The local rows of an FSDP model's parameters, as plain parameters by the model's names.

    They share memory with the model's, and each has a `shard`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._of: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}  # ours and the model's
        for name, theirs in model.named_parameters():
            rows, shard = _local(theirs)
            ours = nn.Parameter(rows, requires_grad=theirs.requires_grad)
            ours.shard = shard  # type: ignore[attr-defined]
            self._of[name] = ours, theirs

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, ours) for name, (ours, _) in self._of.items())

    def parameters(self) -> Iterator[nn.Parameter]:
        return (ours for ours, _ in self._of.values())

    def collect_gradients(self) -> None:
        """Take over the gradients that the backward passes left at the model's parameters."""
        for ours, theirs in self._of.values():
            if theirs.grad is not None:
                ours.grad, theirs.grad = theirs.grad.to_local(), None  # type: ignore[attr-defined]

    @torch.no_grad()
    def gather_into(self, model: nn.Module) -> None:
        """Copy the whole weights into a model that is not sharded. All ranks call this."""
        for name, parameter in model.named_parameters():
            ours = self._of[name][0]
            parameter.copy_(ours.shard.all_gather(ours.detach()))  # type: ignore[attr-defined]


def _local(parameter: Any) -> tuple[Tensor, ShardSpec]:
    """The local rows of a parameter of an FSDP model."""
    mesh = parameter.device_mesh
    group, replicas = mesh.get_group("shard"), mesh.ndim > 1
    rows: Tensor = parameter.detach().to_local()
    each = math.ceil(parameter.shape[0] / group.size())
    start = min(each * group.rank(), parameter.shape[0])
    assert len(rows) == min(each, parameter.shape[0] - start), "FSDP2 cuts as torch.chunk does"
    is_writer = not replicas or mesh.get_local_rank("replicate") == 0
    return rows, ShardSpec(parameter.shape, start, group, is_writer)


class _Whole:
    """Stands for an FSDP model while it is initialised: yields whole tensors, one at a time, and keeps local rows."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            rows, shard = _local(parameter)
            whole = torch.empty(shard.shape, dtype=rows.dtype)
            yield name, whole
            rows.copy_(shard.local(whole, len(rows)))


def init_shards(init: int | Callable[[Any], None]) -> Callable[[Any], None]:
    """`init` for an FSDP model, for `build_model`: at most one whole tensor is in memory at a time.

    Args:
        init: a seed, or a function that takes a model and sets its weights by `named_parameters`.
    """

    def initialise(model: Any) -> None:
        type(model).init_weights(_Whole(model), init) if isinstance(init, int) else init(_Whole(model))

    return initialise


Weights = nn.Module | LocalShards  # parameters by name: whole tensors, or local rows
