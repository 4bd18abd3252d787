"""Several gloo processes on this machine, for tests of what they do together."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import secrets
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

HANGS = 600.0  # seconds after which a process is taken to hang, on any machine under any load


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """Inside, this process trains in float64 what a recipe asks for in float32.

    Runs whose sums differ in their order agree to some 1e-15 then. In float32 AdamW makes a difference of one rounding
    in a gradient near 0 as large as any, and after 50 steps no bound on what is left can be derived.
    """
    import torch

    from gptlab.precision.regimes import REGIMES, Regime

    before = REGIMES["fp32"]
    REGIMES["fp32"] = Regime("fp32", weights=torch.float64, loss=torch.float64)
    try:
        yield
    finally:
        REGIMES["fp32"] = before


def free_port() -> int:
    """A port that nothing listens on, below those that systems give to outgoing connections.

    One of those may be taken by a connection between this call and the listening, and the other rank then waits.
    """
    while True:
        port = secrets.choice(range(15_000, 30_000))
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            return port


def _child(rank: int, n: int, port: int, results: Any, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(n),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    import torch

    torch.set_num_threads(1)
    try:
        results.put((rank, work(*arguments), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))


def _start(n: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, list[Any]]:
    context = multiprocessing.get_context("spawn")
    results, port = context.Queue(), free_port()
    children = [context.Process(target=_child, args=(r, n, port, results, work, arguments)) for r in range(n)]
    for child in children:
        child.start()
    return results, children


def killed(n: int, work: Callable[..., Any], *arguments: Any, seconds: float = HANGS) -> list[int | None]:
    """Exit codes of n processes that do not live to return anything."""
    _, children = _start(n, work, arguments)
    for child in children:
        child.join(seconds)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
    return codes


class Died(RuntimeError):
    """A process ended without a result."""


def _given(results: Any, children: list[Any], seconds: float) -> list[Any]:
    """What each child has put, by rank."""
    given: dict[int, Any] = {}
    deadline = time.monotonic() + seconds
    while len(given) < len(children):
        try:
            result = results.get(timeout=1)
            given[result[0]] = result
        except queue.Empty:
            codes = {rank: child.exitcode for rank, child in enumerate(children) if rank not in given}
            if any(codes.values()) or time.monotonic() > deadline:
                raise Died(f"no result of the processes with these exit codes: {codes}") from None
    return [given[rank] for rank in sorted(given)]


def together(n: int, work: Callable[..., Any], *arguments: Any, seconds: float = HANGS) -> list[Any]:
    """What `work(*arguments)`, a function of a module, returns in each of n processes, as torchrun would start them."""
    results, children = _start(n, work, arguments)
    try:
        given = _given(results, children, seconds)
    finally:
        for child in children:
            child.join(5)
            child.kill()
    for rank, _, error in given:
        assert error is None, f"process {rank} of {n}:\n{error}"
    return [value for _, value, _ in given]
