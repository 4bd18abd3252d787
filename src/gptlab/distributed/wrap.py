"""How a model is wrapped so that ranks train it together: DDP, FSDP2, loss scaling over shards."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gptlab.distributed.world import World
from gptlab.errors import UserError

T = TypeVar("T")


def replicate(model: nn.Module) -> nn.Module:
    """DDP (Li et al. 2020, arXiv 2006.15704): each rank has a copy, and gradients are summed during the backward pass.

    They are summed, not averaged: the loss is divided by the tokens of all ranks before it is differentiated.
    """
    device = next(model.parameters()).device
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # 2.13 has another name for broadcast_buffers, 2.11 has not
        ddp = nn.parallel.DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )

    def summed(_, bucket):  # type: ignore[no-untyped-def]  # DDP looks at annotations, and knows none but its own
        future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return future.then(lambda done: done.value()[0])

    ddp.register_comm_hook(None, summed)
    return ddp


def shard(model: nn.Module, world: World, over: int, device: torch.device, dtype: torch.dtype | None) -> None:
    """FSDP2 (Zhao et al. 2023, arXiv 2304.11277), in place: each rank keeps some rows of every tensor.

    A block's matrices are one group, gathered before use and freed after, in the autocast dtype, to which autocast
    would cast them anyway. Embeddings, norms and head are gathered for the whole pass in their own dtype. Gradients
    are summed in float32, or in the weights' own dtype where that is wider.

    Args:
        model: a GPT or an Encoder on the meta device; memory is allocated for its local rows only.
        over: ranks that one copy is sharded over; 0 is all. Fewer is hybrid sharding, with replicas.
        device: where it will live.
        dtype: of autocast.

    Raises:
        UserError: weights in several dtypes, or a number that does not divide the processes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    over = over or world.size
    if world.size % over:
        raise UserError(f"distributed.shard_over = {over}: does not divide the {world.size} processes")
    stored = {p.dtype for p in model.parameters()}
    if len(stored) > 1:
        raise UserError(
            "distributed.strategy = fsdp: gathers a layer's weights in one dtype, and precision.head or "
            "precision.norms gives this model two: use ddp"
        )
    wide = torch.promote_types(stored.pop(), torch.float32)
    hybrid = over < world.size
    mesh = init_device_mesh(
        device.type,
        (world.size // over, over) if hybrid else (over,),
        mesh_dim_names=("replicate", "shard") if hybrid else ("shard",),
    )
    # it warns of matrices whose outputs are views; nothing here changes those in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    groups: list[Any] = [model]
    for block in model.h:  # type: ignore[union-attr]
        matrices: list[nn.Module] = [module for module in block.modules() if isinstance(module, nn.Linear)]
        fully_shard(matrices, mesh=mesh, mp_policy=MixedPrecisionPolicy(dtype, wide))
        groups += matrices
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(None, wide, cast_forward_inputs=False))
    for module in groups:
        module.set_gradient_divide_factor(1.0)  # sums, as `replicate` does ...
        module.set_force_sum_reduction_for_comms(True)  # ... also over gloo, which knows no other kind


def make_scaler(device: torch.device, enabled: bool, sharded: bool) -> Any:
    """Loss scaling. With sharded gradients, a step that one rank has to skip is skipped by all."""
    return (_ShardedScaler if sharded else torch.amp.GradScaler)(device.type, enabled=enabled)


class _ShardedScaler(torch.amp.GradScaler):
    def _unscale_grads_(self, *arguments: Any, **named: Any) -> dict[torch.device, Tensor]:
        found = super()._unscale_grads_(*arguments, **named)
        for value in found.values():  # 1 where a gradient is not finite
            dist.all_reduce(value, dist.ReduceOp.MAX)
        return found


@contextlib.contextmanager
def sync_gradients(model: nn.Module, now: bool) -> Iterator[None]:
    """Around the forward and backward pass of a micro-batch: whether ranks exchange the gradients gathered so far."""
    if isinstance(model, nn.parallel.DistributedDataParallel) and not now:
        with model.no_sync():
            yield
        return
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(now)  # type: ignore[operator]
    yield


def with_last(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Each item, and whether it is the last one."""
    items = iter(items)
    item = next(items)
    for following in items:
        yield item, False
        item = following
    yield item, True
