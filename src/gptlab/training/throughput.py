"""How fast training goes: tokens a second of training alone, and the share of the GPU's peak that is."""

from __future__ import annotations

import statistics
import time

import torch

# Dense bf16 peaks in FLOP/s, from NVIDIA's data sheets. A GPU that is not here has no MFU: it is never guessed.
PEAK_FLOPS = {"A100": 312e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12}


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of this device, or None where it is not known. The longest name that fits rules."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((PEAK_FLOPS[key] for key in sorted(PEAK_FLOPS, key=len, reverse=True) if key in name), None)


class Stopwatch:
    """Seconds of training steps: paused while the run evaluates or saves."""

    def __init__(self) -> None:
        self.seconds = 0.0  # since the last lap
        self.started: float | None = None
        self.step_seconds: list[float] = []  # mean seconds a step, one entry a lap

    def start(self) -> None:
        self.started = time.perf_counter()

    def pause(self) -> None:
        if self.started is not None:
            self.seconds += time.perf_counter() - self.started
            self.started = None

    def lap(self, steps: int) -> float:
        """Seconds a step over the `steps` since the last lap."""
        self.pause()
        self.start()
        seconds, self.seconds = self.seconds / steps, 0.0
        self.step_seconds.append(seconds)
        return seconds

    def steady(self) -> float | None:
        """Median seconds a step, without the first lap, which holds compilation and warm-up."""
        laps = self.step_seconds[1:] or self.step_seconds
        return statistics.median(laps) if laps else None


def peak_memory_gb(device: torch.device) -> float:
    """The most memory this process has held, in GB (1e9 bytes): of the GPU, or of the host for a CPU run."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
