"""Batches made ahead of the steps that need them."""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

DEPTH = 2  # micro-batches that wait
POLL = 0.05  # seconds until a thread with nowhere to put a batch looks whether it should end


class Ahead:
    """Makes the batches of step after step in a thread, as long as they are asked for in order.

    What raises in the thread is raised where the batch is asked for. The thread starts with the first step.

    Args:
        make: the batches of a step, which depend on the step alone.
    """

    def __init__(self, make: Callable[[int], Iterator[Any]]) -> None:
        self.make = make
        self.next_step = -1
        self.thread: threading.Thread | None = None

    def __call__(self, step: int) -> Iterator[Any]:
        """The batches of a step. A step other than the next, or after one that was left early, starts anew."""
        if step != self.next_step:
            self.close()
            self.made: queue.Queue[tuple[str, Any]] = queue.Queue(DEPTH)
            self.ended = threading.Event()
            gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
            given = step, self.made, self.ended, gpu
            self.thread = threading.Thread(target=self._fill, args=given, name="gptlab-batches", daemon=True)
            self.thread.start()
        self.next_step = -1
        while (found := self.made.get())[0] == "batch":
            yield found[1]
        if found[0] == "error":
            raise found[1]
        self.next_step = step + 1

    def close(self) -> None:
        """End the thread."""
        if self.thread is not None:
            self.ended.set()
            self.thread.join()
        self.thread, self.next_step = None, -1

    def _fill(self, step: int, made: queue.Queue[tuple[str, Any]], ended: threading.Event, gpu: int | None) -> None:
        def put(kind: str, value: Any = None) -> bool:
            while not ended.is_set():
                with contextlib.suppress(queue.Full):
                    made.put((kind, value), timeout=POLL)
                    return True
            return False

        try:
            if gpu is not None:
                torch.cuda.set_device(gpu)  # a thread begins with the first one
            for at in itertools.count(step):
                if not (all(put("batch", batch) for batch in self.make(at)) and put("end")):
                    return
        except BaseException as error:
            put("error", error)
