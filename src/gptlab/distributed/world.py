"""Which process this is of those that train one run, and how they agree.

torchrun starts the processes. A `World` of one process works too: nothing is sent.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import math
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gptlab.errors import UserError

T = TypeVar("T")

# Seconds that a rank waits for the others: rank 0 may have a large checkpoint to read or write. What PyTorch waits for
# by itself has a tenth more, because NCCL's watchdog ends the process, and then nobody says which rank is missing.
LIMIT = 1200.0
GRACE = 3.0  # seconds in which all ranks notice that one is lost


@dataclass(frozen=True)
class World:
    """The ranks that train together. All ranks call each method that sends something."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """The rank within this machine, and the number of its GPU."""
    store: Any = field(default=None, compare=False, repr=False)
    """The key-value store through which the ranks found one another."""

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes and prints."""
        return self.rank == 0

    def share(self, items: Iterable[T]) -> Iterator[T | None]:
        """This rank's part of the items: every size-th.

        All ranks yield equally often, so that they can call collectives in between; a rank without an item at the end
        yields None.
        """
        items = iter(items)
        while batch := list(itertools.islice(items, self.size)):
            yield batch[self.rank] if self.rank < len(batch) else None

    def pieces(self, mine: int, n: int, most: int) -> list[slice]:
        """Split this rank's sequences of a step into micro-batches.

        All ranks get the same number of micro-batches. Full micro-batches and a smaller last one are preferred; where
        that gives a rank too few, the sizes are evened out.

        Args:
            mine: sequences of this rank, n // size or one more.
            n: sequences of the whole step.
            most: sequences in a micro-batch.

        Raises:
            UserError: a rank would have an empty micro-batch.
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

    # -- collectives. Numbers and objects travel in host memory, so that no GPU is waited for.

    def all_reduce(self, tensor: Tensor, op: Literal["sum", "max"] = "sum") -> Tensor:
        """Reduce a tensor over ranks, in place."""
        if self.size > 1:
            work = dist.all_reduce(tensor, dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX, async_op=True)
            _wait(work, tensor)
        return tensor

    def sum(self, number: float) -> float:
        return number if self.size == 1 else float(self.all_reduce(torch.tensor(number, dtype=torch.float64)))

    def max(self, number: float) -> float:
        return number if self.size == 1 else float(self.all_reduce(torch.tensor(number, dtype=torch.float64), "max"))

    def min(self, number: float) -> float:
        return -self.max(-number)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """(size, ...): the tensor of every rank, in the order of ranks."""
        if self.size == 1:
            return tensor[None]
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        _wait(dist.all_gather(parts, tensor, async_op=True), tensor)
        return torch.stack(parts)

    def broadcast(self, value: T, src: int = 0) -> T:
        """The value of rank `src`."""
        values: list[Any] = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=src)
        return values[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            self.all_reduce(torch.zeros(()))

    def missing(self) -> list[int]:
        """After a collective has failed here: the ranks for which it has not. They have ended, or hang.

        Each rank that calls this is not missing, and has some seconds to do so.
        """
        silent = {0} - {self.rank}  # if the store does not answer: without torchrun it is rank 0's

        def ask() -> None:
            nonlocal silent
            deadline = time.monotonic() + GRACE
            with contextlib.suppress(RuntimeError):
                self.store.set(f"gptlab/failed/{self.rank}", "")
                while True:
                    silent = {rank for rank in range(self.size) if not self.store.check([f"gptlab/failed/{rank}"])}
                    if not silent or time.monotonic() > deadline:
                        return
                    time.sleep(0.05)

        if self.store is not None:
            asking = threading.Thread(target=ask, daemon=True)  # a store whose process hangs never answers
            asking.start()
            asking.join(2 * GRACE)
        return sorted(silent)


# The last small collectives. A thread of gloo that is the last to let go of one needs the interpreter for its tensors,
# and aborts the process if that is ending: "terminate called without an active exception".
_last: deque[Any] = deque(maxlen=16)


def _keep(work: Any, tensor: Tensor) -> Any:
    if tensor.device.type == "cpu" and tensor.nbytes <= 4096:
        _last.append(work)
    return work


def _wait(work: Any, tensor: Tensor) -> None:
    """Wait for a collective, with a limit where that blocks this thread anyway: on a GPU it would make it block."""
    _keep(work, tensor)
    work.wait(timedelta(seconds=LIMIT)) if tensor.device.type == "cpu" else work.wait()


SINGLE = World()  # one process


class SharedFlag:
    """Whether a flag is set on some rank. The same on all ranks at every call, and nobody waits for the answer.

    With several ranks it is the answer to the call before: the flags of a call travel while the ranks work. All ranks
    call it equally often.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._sent: tuple[Tensor, Any] | None = None

    def __call__(self, flag: bool) -> bool:
        if self.world.size == 1:
            return flag
        before, sent = self._sent, torch.tensor(int(flag))
        if before is not None:
            _wait(before[1], before[0])
        self._sent = sent, _keep(dist.all_reduce(sent, dist.ReduceOp.MAX, async_op=True), sent)
        return before is not None and bool(before[0])


def is_lost_rank(error: BaseException) -> bool:
    """Whether an error says that another rank broke the connection, or did not come. gloo raises a RuntimeError."""
    says = ("onnection", "imed out")
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and any(s in str(error) for s in says))


def world_from_env() -> World:
    """The world that torchrun's environment variables describe. Nothing is connected."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    rank, size, local_rank = (int(os.environ.get(name, default)) for name, default in zip(names, "010", strict=True))
    return World(rank, size, local_rank)


@contextlib.contextmanager
def process_group(strategy: str, device: torch.device) -> Iterator[World]:
    """Connect the ranks of this run: over NCCL where there are GPUs, and over gloo.

    Raises:
        UserError: torchrun started several processes, and distributed.strategy is none.
    """
    world = world_from_env()
    if world.size == 1:
        yield SINGLE
        return
    if strategy == "none":
        raise UserError(f"distributed.strategy = none: {world.size} processes were started; ddp or fsdp share the work")
    if not dist.is_available():
        raise UserError(
            f"{world.size} processes were started, and this build of PyTorch cannot connect them: start one"
        )
    if not faulthandler.is_enabled():  # of a process that C++ code aborts, the launcher tells a number alone
        with contextlib.suppress(AttributeError, RuntimeError, ValueError):  # without a stderr
            faulthandler.enable()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # gloo keeps a socket to every other rank. Windows has no such limit, and macOS refuses what it calls infinite.
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if not dist.is_initialized():
        from torch.distributed.rendezvous import rendezvous

        store, _, _ = next(rendezvous("env://"))
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        limit = timedelta(seconds=1.1 * LIMIT)
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=limit)
        world = replace(world, store=store)
    yield world
    # skipped after an error: other ranks may wait in a collective, and the launcher ends them
    if dist.is_initialized():
        world.barrier()
        dist.destroy_process_group()
