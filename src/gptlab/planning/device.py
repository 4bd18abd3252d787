"""The device that a run is planned for: a GPU by name, or the device of this process."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Literal

import torch

from gptlab import hardware
from gptlab.errors import UserError
from gptlab.hardware import GB, Gpu
from gptlab.machine import free_memory

CONTEXT = 1 * GB  # memory of a GPU that the CUDA context, libraries and workspaces take; assumed, not measured


@dataclass(frozen=True)
class Device:
    """A device and its memory."""

    name: str
    kind: Literal["cpu", "cuda"]
    available: float
    """Bytes of device memory that a run can use."""
    gpu: Gpu | None = None
    """Peak FLOP/s of a known GPU."""
    host: float = math.inf
    """Bytes of host memory that a process of a GPU run can use, PyTorch's own included; infinity if unknown."""

    @classmethod
    def named(cls, name: str | None = None, memory_gb: float | None = None) -> Device:
        """A GPU, which need not be in this machine. At least one argument is given.

        Args:
            name: a name of `hardware.GPUS`; None for a GPU of unknown speed.
            memory_gb: memory in GB; replaces the memory in the table.

        Raises:
            UserError: the name is not in the table, or the memory is smaller than a CUDA context.
        """
        gpu = None if name is None else hardware.named(name)
        if memory_gb is None:
            assert gpu is not None, "a name, a memory or both are given"
            return cls(gpu.name, "cuda", gpu.memory - CONTEXT, gpu)
        if not CONTEXT < memory_gb * GB < math.inf:
            raise UserError(f"--memory {memory_gb:g}: must be above {CONTEXT / GB:g}, the GB that a CUDA context takes")
        kind = f"{gpu.name} with" if gpu else "a GPU with"
        return cls(f"{kind} {memory_gb:g} GB", "cuda", memory_gb * GB - CONTEXT, gpu)


def local_device(device: torch.device, processes: int = 1) -> Device:
    """A device of this machine, with the memory that is free now.

    Args:
        device: the device of this process.
        processes: ranks of the run. Ranks on one machine (torchrun's LOCAL_WORLD_SIZE) share its host memory.
    """
    free = free_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    if device.type != "cuda":
        return Device(f"this machine ({device.type})", "cpu", free)
    import psutil

    reserved, resident = torch.cuda.memory_reserved(device), psutil.Process().memory_info().rss
    free_on_gpu = torch.cuda.mem_get_info(device)[0] + reserved
    return Device(hardware.device_name(device), "cuda", free_on_gpu, hardware.gpu_of(device), free + resident)
