"""Several processes that train one run, each on its share of every batch: DDP or FSDP2, started by torchrun.

A `World` says which process this is, and is how processes agree; one process alone is a world too, in which nothing is
sent. Under DDP each holds all weights. Under FSDP each holds some rows of every tensor (`Shards`), and what works on
weights, gradients and moments sees those rows as plain tensors, which know of the whole by their `Spread`.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gptlab.config import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes that train together. Each of its methods that sends something is called by all of them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among the processes of this machine; the number of its GPU."""

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def share(self, items: Iterable[T]) -> Iterator[T | None]:
        """This process's part of items, every size-th; None at the end where others still have one.

        All processes get as many, so that they can meet at each.
        """
        items = iter(items)
        while batch := list(itertools.islice(items, self.size)):
            yield batch[self.rank] if self.rank < len(batch) else None

    def pieces(self, mine: int, n: int, most: int) -> list[slice]:
        """Cut the `mine` of a step's n sequences that this process has into micro-batches.

        Every process gets as many: full ones and a smaller last one, or pieces of about one size where that gives too
        few.

        Args:
            mine: n // size, or one more.
            most: sequences in a micro-batch.

        Raises:
            UserError: a process would have none for one of them.
        """
        count = math.ceil(math.ceil(n / self.size) / most)
        if n // self.size < count:
            raise UserError(
                f"{n} sequences a step cannot be shared by {self.size} processes in micro-batches of {most}: "
                f"batch.tokens_per_step must be a multiple of {self.size} sequences"
                + (", or --batch.micro-batch more than 1" if n >= self.size else ", or start fewer processes")
            )
        if math.ceil(mine / most) == count:
            return [slice(i, min(i + most, mine)) for i in range(0, mine, most)]
        return [slice(mine * i // count, mine * (i + 1) // count) for i in range(count)]

    # -- agreeing; what is sent is in host memory, so that no GPU is waited for, except where a tensor is on one

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """The maximum over processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether one of the processes says so."""
        return flag if self.size == 1 else bool(self.max(torch.tensor(int(flag))))

    def least(self, number: int) -> int:
        return -self.most(-number)

    def most(self, number: int) -> int:
        return number if self.size == 1 else int(self.max(torch.tensor(number)))

    def total(self, number: float) -> float:
        return number if self.size == 1 else float(self.sum(torch.tensor(number, dtype=torch.float64)))

    def highest(self, number: float) -> float:
        return number if self.size == 1 else float(self.max(torch.tensor(number, dtype=torch.float64)))

    def from_first(self, value: T) -> T:
        """What the first process has."""
        return self.of(value, 0)

    def of(self, value: T, rank: int) -> T:
        """What one of the processes has."""
        values: list[Any] = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=rank)
        return values[0]

    def meet(self) -> None:
        """Wait until all are here."""
        if self.size > 1:
            self.sum(torch.zeros(()))


ALONE = World()


def lost_another(error: BaseException) -> bool:
    """Whether an error says that the connection to another process broke."""
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and "onnection" in str(error))  # gloo's


def environment() -> World:
    """The world that torchrun's environment variables tell of; nothing is connected."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    rank, size, local_rank = (int(os.environ.get(name, default)) for name, default in zip(names, "010", strict=True))
    return World(rank, size, local_rank)


@contextlib.contextmanager
def joined(strategy: str, device: torch.device) -> Iterator[World]:
    """The processes of this run, connected: over NCCL where there are GPUs, and over gloo.

    Raises:
        UserError: torchrun started several processes, and distributed.strategy is none.
    """
    world = environment()
    if world.size == 1:
        yield ALONE
        return
    if strategy == "none":
        raise UserError(f"distributed.strategy = none: {world.size} processes were started; ddp or fsdp share the work")
    if not dist.is_available():
        raise UserError(
            f"{world.size} processes were started, and this build of PyTorch cannot connect them: start one"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # gloo keeps a socket to every other process; Windows has no such limit, and macOS refuses what it calls infinite
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    yield world
    # not where an error comes by: then others may wait in a collective, and whoever started all of them ends them
    if dist.is_initialized():
        world.meet()
        dist.destroy_process_group()


# -- tensors whose rows are spread over processes


@dataclass(frozen=True)
class Spread:
    """Which rows of a whole tensor this process holds. All processes of the group call what sends something."""

    shape: torch.Size
    """Of the whole."""
    start: int
    """The first row here."""
    group: Any
    """torch's process group: those among whom the rows are spread."""
    keeper: bool
    """Whether this process writes its rows into checkpoints: in a hybrid world several hold the same ones."""

    def whole(self, rows: Tensor) -> Tensor:
        """The whole of a tensor of which each process has the rows here; same first dimension as the parameter."""
        each = -(-self.shape[0] // self.group.size())
        padded = rows.new_zeros(each, *rows.shape[1:])
        padded[: len(rows)] = rows
        gathered = rows.new_empty(each * self.group.size(), *rows.shape[1:])
        dist.all_gather(list(gathered.chunk(self.group.size())), padded, group=self.group)
        return gathered[: self.shape[0]]

    def rows(self, whole: Tensor, n: int) -> Tensor:
        """The n rows of a whole tensor that belong here."""
        return whole[self.start : self.start + n]


def spread_of(parameter: Tensor) -> Spread | None:
    """How a parameter of an optimizer is spread; None where this process has all of it."""
    return getattr(parameter, "spread", None)


def whole_shape(parameter: Tensor) -> torch.Size:
    spread = spread_of(parameter)
    return parameter.shape if spread is None else spread.shape


def rows_of(whole: Tensor, parameter: Tensor) -> Tensor:
    """What of a whole tensor is at a parameter's place: its rows here, or all of it."""
    spread = spread_of(parameter)
    return whole if spread is None else spread.rows(whole, len(parameter))


def over_shards(value: Tensor, parameters: Sequence[Tensor], how: Literal["sum", "max"] = "sum") -> Tensor:
    """A number per process, or several, put together over those that the parameters are spread over, in place.

    Where they are not spread it is left as it is.
    """
    spread = spread_of(parameters[0])
    if spread is not None:
        dist.all_reduce(value, dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX, group=spread.group)
    return value


def norms(tensors: Sequence[Tensor], parameters: Sequence[Tensor], order: float = 2.0) -> Tensor:
    """(n,): the norm of each of n tensors, whole ones, in float32 at least.

    Args:
        tensors: the parameters' gradients, say: where a parameter is spread, the rows here.
        order: 2 or infinity.
    """
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    some = [t if t.numel() else t.new_zeros(1) for t in tensors]  # there may be no rows here
    here = torch.stack(torch._foreach_norm(some, order, dtype=wide))
    spread = spread_of(parameters[0])
    if spread is None:
        return here
    if order == math.inf:
        # a maximum may pass a NaN over
        return over_shards(here.nan_to_num(nan=math.inf, posinf=math.inf), parameters, "max")
    # summed here, in one order: copies side by side (hybrid) would else be clipped by factors that differ in a bit
    parts = [torch.empty_like(here) for _ in range(spread.group.size())]
    dist.all_gather(parts, here.square(), group=spread.group)
    return torch.stack(parts).sum(0).sqrt()


class Shards:
    """The parameters of an FSDP model as this process holds them: plain ones, by the model's names.

    They share memory with the model's. The optimizer, the pruner, clipping and checkpoints work on them; each has a
    `spread`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._of: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}  # ours and the model's
        for name, theirs in model.named_parameters():
            rows, spread = _rows(theirs)
            ours = nn.Parameter(rows, requires_grad=theirs.requires_grad)
            ours.spread = spread  # type: ignore[attr-defined]
            self._of[name] = ours, theirs

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, ours) for name, (ours, _) in self._of.items())

    def parameters(self) -> Iterator[nn.Parameter]:
        return (ours for ours, _ in self._of.values())

    def take_gradients(self) -> None:
        """Move the gradients of the backward passes here."""
        for ours, theirs in self._of.values():
            if theirs.grad is not None:
                ours.grad, theirs.grad = theirs.grad.to_local(), None  # type: ignore[attr-defined]

    @torch.no_grad()
    def fill(self, model: nn.Module) -> None:
        """Copy the whole weights into a model that is not spread; all processes call this."""
        for name, parameter in model.named_parameters():
            ours = self._of[name][0]
            parameter.copy_(ours.spread.whole(ours.detach()))  # type: ignore[attr-defined]


def _rows(parameter: Any) -> tuple[Tensor, Spread]:
    """The rows of a parameter of an FSDP model that are here."""
    mesh = parameter.device_mesh
    group, copies = mesh.get_group("shard"), mesh.ndim > 1
    rows: Tensor = parameter.detach().to_local()
    each = math.ceil(parameter.shape[0] / group.size())
    start = min(each * group.rank(), parameter.shape[0])
    assert len(rows) == min(each, parameter.shape[0] - start), "FSDP2 cuts as torch.chunk does"
    keeper = not copies or mesh.get_local_rank("replicate") == 0
    return rows, Spread(parameter.shape, start, group, keeper)


class _Whole:
    """Stands for an FSDP model whose weights are set: gives whole tensors, one at a time, and keeps the rows here."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            rows, spread = _rows(parameter)
            whole = torch.empty(spread.shape, dtype=rows.dtype)
            yield name, whole
            rows.copy_(spread.rows(whole, len(rows)))


def fill_weights(model: Any, fill: int | Callable[[Any], None]) -> None:
    """Initialise a model from a seed, or by a function that copies weights in; of an FSDP model, the rows here.

    Never more than one whole tensor is in memory for that. What fills takes the parameters by `named_parameters`.
    """
    target = _Whole(model) if hasattr(model, "set_requires_gradient_sync") else model
    with torch.no_grad():
        type(model).init_weights(target, fill) if isinstance(fill, int) else fill(target)


Weights = nn.Module | Shards  # what has parameters by name: all of them, or rows of them


def replicate(model: nn.Module) -> nn.Module:
    """DDP (Li et al. 2020, arXiv 2006.15704): each process has a copy, and gradients are summed as they come.

    Summed, not averaged: a loss is divided by the tokens of all processes before it is differentiated.
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
    """FSDP2 (Zhao et al. 2023, arXiv 2304.11277), in place: each process keeps some rows of every tensor.

    A block's matrices are one group, gathered before they are used and let go after, in the autocast dtype, which is
    what autocast would make of them. All else, embeddings, norms and head, is gathered for the whole pass in its own
    dtype. Gradients are summed in float32, or in the weights' own dtype where that is wider.

    Args:
        model: a GPT or an Encoder on the meta device: it gets memory for its rows only.
        over: processes that one copy is spread over; 0 is all. Fewer is the hybrid form: copies side by side.
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
    """Loss scaling; where gradients are spread, a step that one process cannot take is taken by none."""
    return (_SpreadScaler if sharded else torch.amp.GradScaler)(device.type, enabled=enabled)


class _SpreadScaler(torch.amp.GradScaler):
    def _unscale_grads_(self, *arguments: Any, **named: Any) -> dict[torch.device, Tensor]:
        found = super()._unscale_grads_(*arguments, **named)
        for value in found.values():  # 1 where a gradient is not finite
            dist.all_reduce(value, dist.ReduceOp.MAX)
        return found


@contextlib.contextmanager
def sending(model: nn.Module, now: bool) -> Iterator[None]:
    """Around forward and backward of a micro-batch: whether its gradients are sent, with those before it."""
    if isinstance(model, nn.parallel.DistributedDataParallel) and not now:
        with model.no_sync():
            yield
        return
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(now)  # type: ignore[operator]
    yield


def with_last(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Each item, and whether it is the last."""
    items = iter(items)
    item = next(items)
    for following in items:
        yield item, False
        item = following
    yield item, True
