"""Throughput: seconds of each step, energy and memory."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import torch

from gptlab.machine import peak_memory

UNTIMED = 10  # the first steps of a process compile, warm up and fill caches; they are left out


class Stopwatch:
    """Seconds of every training step, without evaluation and saving.

    On a GPU, events in the queue time a step, and the process does not wait for it.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.mark: Any = None  # when the running step began
        self.marks: list[tuple[Any, Any]] = []  # beginning and end of the steps since the last lap
        self.step_seconds: list[float] = []

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        """A step begins, unless it began when the one before it ended."""
        self.mark = self.mark or self._now()

    def step(self) -> None:
        """A step ends, and the next one begins."""
        now = self._now()
        self.marks.append((self.mark, now))
        self.mark = now

    def pause(self) -> None:
        self.mark = None

    def lap(self) -> float:
        """Mean seconds a step since the last lap. On a GPU, call it after the steps' results have been read."""
        if self.cuda and self.marks:
            self.marks[-1][1].synchronize()
        seconds = [(a.elapsed_time(b) / 1000 if self.cuda else b - a) for a, b in self.marks]
        self.marks = []
        self.step_seconds += seconds
        return statistics.mean(seconds)

    def steady(self) -> list[float]:
        """Seconds of all steps but the first ten, or the first half of fewer than twenty."""
        return self.step_seconds[min(UNTIMED, len(self.step_seconds) // 2) :]


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed (nearest rank)."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


class Energy:
    """Joules that the GPU has used since this object was made; None where NVML does not count them (before Volta)."""

    def __init__(self, device: torch.device) -> None:
        self.handle: Any = None
        if device.type != "cuda":
            return
        try:
            import pynvml

            pynvml.nvmlInit()
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            self.handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            self.nvml, self.begin = pynvml, pynvml.nvmlDeviceGetTotalEnergyConsumption(self.handle)  # millijoules
        except Exception:  # no NVML, no permission, no counter: energy is not reported
            self.handle = None

    def joules(self) -> float | None:
        if self.handle is None:
            return None
        return (self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle) - self.begin) / 1000


def peak_memory_gb(device: torch.device) -> float:
    """The peak memory of this process in GB (1e9 bytes): of the GPU, or of the host for a CPU run."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return peak_memory() / 1e9
