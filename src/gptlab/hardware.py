"""A table of GPUs with their memory, bandwidth and peak FLOP/s by format. MFU, the planner and the benchmarks use it.

    >>> named("RTX 4090").peak("bf16")
    165150720000000.0
    >>> recognise("NVIDIA H100 NVL").name
    'H100-NVL'

The module does not import PyTorch.
"""

from __future__ import annotations

import difflib
import functools
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gptlab.errors import UserError

if TYPE_CHECKING:
    import torch

Format = Literal["fp8", "bf16", "fp16", "tf32", "fp32"]
GB, TERA = 1e9, 1e12


@dataclass(frozen=True)
class Gpu:
    """Data sheet of a GPU. A card that a driver presents as several devices counts as one of these devices.

    Peaks are for dense matrix multiplication with float32 accumulation, without structured sparsity. None means that
    the GPU does not support the format, or that the manufacturer has not published the rate.
    """

    name: str
    """Name for gptlab's command line."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Memory bandwidth in bytes per second."""
    fp8: float | None
    bf16: float | None
    fp16: float | None
    tf32: float | None
    fp32: float
    reported: str
    """Regular expression for the full device name that the driver reports, without the manufacturer's name."""
    source: str
    """Document with these figures."""

    def peak(self, format: Format) -> float | None:
        """Peak FLOP/s of matrix multiplication in a format."""
        peak: float | None = getattr(self, format)
        return peak


def _gpu(
    name: str,
    reported: str,
    memory: float,
    bandwidth: float,
    fp8: float | None,
    bf16: float | None,
    fp16: float | None,
    tf32: float | None,
    fp32: float,
    source: str,
) -> Gpu:
    """A row of the table: memory in GB, bandwidth in GB/s, peaks in TFLOP/s."""

    def peak(tera: float | None) -> float | None:
        return None if tera is None else tera * TERA

    rates = {"fp8": peak(fp8), "bf16": peak(bf16), "fp16": peak(fp16), "tf32": peak(tf32)}
    return Gpu(name, memory * GB, bandwidth * GB, **rates, fp32=fp32 * TERA, reported=reported, source=source)


def _geforce(name: str, memory: float, bandwidth: float, cores: int, clock: float, fp8: bool, source: str) -> Gpu:
    """A GeForce card, from its number of CUDA cores and its boost clock in GHz.

    By the white papers of all three architectures, a core does one float32 multiply-add per cycle. With float32
    accumulation, the tensor cores reach the same rate in TF32, twice that rate in bf16 and float16, and four times in
    float8. Workstation and server cards have twice these tensor rates.
    """
    fp32 = 2 * cores * clock / 1000
    model = name.partition("-")[0].removeprefix("RTX")
    model = re.sub(r"^(\d+)(Ti)?(Super)?$", lambda m: " ".join(filter(None, m.groups())), model)
    reported = f"GeForce RTX {model.replace('Super', 'SUPER')}"
    rates = 4 * fp32 if fp8 else None, 2 * fp32, 2 * fp32, fp32
    return _gpu(name, reported, memory, bandwidth, *rates, fp32, source)


_H100 = "NVIDIA H100 Tensor Core GPU data sheet"
_H200 = "NVIDIA H200 Tensor Core GPU data sheet"
_A100 = "NVIDIA A100 Tensor Core GPU data sheet"
_V100 = "NVIDIA V100 Tensor Core GPU data sheet"
_GH200 = "NVIDIA GH200 Grace Hopper Superchip data sheet"
_B200 = "NVIDIA Blackwell architecture technical brief, HGX B200; DGX B200 data sheet (memory)"
_GB10 = "NVIDIA DGX Spark specifications; NVIDIA's talk on GB10 at Hot Chips 2025 (FP32)"
_A6000 = "NVIDIA Ampere GA102 GPU architecture white paper, RTX A6000"
_ADA6000 = "NVIDIA Ada GPU architecture white paper for professional GPUs, RTX 6000"
_MI300X = "AMD Instinct MI300X data sheet"
_MI250 = "AMD Instinct MI250 data sheet"
_AMPERE = "NVIDIA Ampere GA102 GPU architecture white paper; GeForce RTX 30 series specifications"
_ADA = "NVIDIA Ada GPU architecture white paper; GeForce RTX 40 series specifications"
_BLACKWELL = "NVIDIA RTX Blackwell GPU architecture white paper; GeForce RTX 50 series specifications"

# Rates that a document gives with structured sparsity are halved here. There is no guess for a GPU that is not listed.
# Memory distinguishes cards that report the same name.
GPUS = {
    gpu.name: gpu
    for gpu in (
        #    name, reported name, memory, bandwidth, fp8, bf16, fp16, tf32, fp32, source
        _gpu("H100", r"H100 80GB HBM3", 80, 3350, 1979, 989, 989, 494, 67, f"{_H100}, SXM"),
        _gpu("H100-PCIe", r"H100 PCIe", 80, 2000, 1513, 756, 756, 378, 51, f"{_H100}, PCIe"),
        _gpu("H100-NVL", r"H100 NVL", 94, 3900, 1670.5, 835.5, 835.5, 417.5, 60, f"{_H100}, NVL"),
        _gpu("H200", r"H200", 141, 4800, 1979, 989, 989, 494, 67, f"{_H200}, SXM"),
        _gpu("H200-NVL", r"H200 NVL", 141, 4800, 1670.5, 835.5, 835.5, 417.5, 60, f"{_H200}, NVL"),
        # The reported name has the memory of the CPU, or of the GPU: 96 GB, or 144 GB at 4.9 TB/s.
        _gpu("GH200", r"GH200 \d+GB?( HBM3e?)?", 96, 4000, 1979, 989, 989, 494, 67, _GH200),
        _gpu("B200", r"B200", 180, 8000, 4500, 2250, 2250, 1100, 80, _B200),
        # The tensor rates are not published. CPU and GPU share the memory.
        _gpu("GB10", r"GB10", 128, 273, None, None, None, None, 31, _GB10),
        _gpu("A100-40", r"A100-(SXM4|PCIE)-40GB", 40, 1555, None, 312, 312, 156, 19.5, f"{_A100}, 40 GB"),
        _gpu("A100-80", r"A100-SXM4-80GB", 80, 2039, None, 312, 312, 156, 19.5, f"{_A100}, 80 GB SXM"),
        _gpu("A100-80-PCIe", r"A100 80GB PCIe", 80, 1935, None, 312, 312, 156, 19.5, f"{_A100}, 80 GB PCIe"),
        # Volta and Turing have neither bf16 nor TF32.
        _gpu("V100-SXM2-16", r"V100-SXM2-16GB", 16, 900, None, None, 125, None, 15.7, f"{_V100}, NVLink"),
        _gpu("V100-SXM2-32", r"V100-SXM2-32GB", 32, 900, None, None, 125, None, 15.7, f"{_V100}, NVLink"),
        _gpu("V100-PCIe-16", r"V100-PCIE-16GB", 16, 900, None, None, 112, None, 14, f"{_V100}, PCIe"),
        _gpu("V100-PCIe-32", r"V100-PCIE-32GB", 32, 900, None, None, 112, None, 14, f"{_V100}, PCIe"),
        _gpu("T4", r"T4", 16, 320, None, None, 65, None, 8.1, "NVIDIA Turing GPU architecture white paper, Tesla T4"),
        _gpu("A10", r"A10", 24, 600, None, 125, 125, 62.5, 31.2, "NVIDIA A10 Tensor Core GPU data sheet"),
        _gpu("A10G", r"A10G", 24, 600, None, 70, 70, 35, 35, "NVIDIA A10G data sheet for AWS"),
        _gpu("A6000", r"RTX A6000", 48, 768, None, 154.8, 154.8, 77.4, 38.7, _A6000),
        _gpu("RTX6000Ada", r"RTX 6000 Ada Generation", 48, 960, 728.5, 364.2, 364.2, 182.1, 91.1, _ADA6000),
        _gpu("L4", r"L4", 24, 300, 242.5, 121, 121, 60, 30.3, "NVIDIA L4 Tensor Core GPU data sheet"),
        _gpu("L40S", r"L40S", 48, 864, 733, 362.05, 362.05, 183, 91.6, "NVIDIA L40S GPU data sheet"),
        #        name, memory, bandwidth, CUDA cores, boost clock, float8
        _geforce("RTX3060", 12, 360, 3584, 1.777, False, _AMPERE),
        _geforce("RTX3060Ti", 8, 448, 4864, 1.665, False, _AMPERE),
        _geforce("RTX3070", 8, 448, 5888, 1.725, False, _AMPERE),
        _geforce("RTX3070Ti", 8, 608, 6144, 1.770, False, _AMPERE),
        _geforce("RTX3080-10", 10, 760, 8704, 1.710, False, _AMPERE),
        _geforce("RTX3080-12", 12, 912, 8960, 1.710, False, _AMPERE),
        _geforce("RTX3080Ti", 12, 912, 10240, 1.665, False, _AMPERE),
        _geforce("RTX3090", 24, 936, 10496, 1.695, False, _AMPERE),
        _geforce("RTX3090Ti", 24, 1008, 10752, 1.860, False, _AMPERE),
        _geforce("RTX4060", 8, 272, 3072, 2.460, True, _ADA),
        _geforce("RTX4060Ti-8", 8, 288, 4352, 2.535, True, _ADA),
        _geforce("RTX4060Ti-16", 16, 288, 4352, 2.535, True, _ADA),
        _geforce("RTX4070", 12, 504, 5888, 2.475, True, _ADA),
        _geforce("RTX4070Super", 12, 504, 7168, 2.475, True, _ADA),
        _geforce("RTX4070Ti", 12, 504, 7680, 2.610, True, _ADA),
        _geforce("RTX4070TiSuper", 16, 672, 8448, 2.610, True, _ADA),
        _geforce("RTX4080", 16, 717, 9728, 2.505, True, _ADA),
        _geforce("RTX4080Super", 16, 736, 10240, 2.550, True, _ADA),
        _geforce("RTX4090", 24, 1008, 16384, 2.520, True, _ADA),
        _geforce("RTX5070", 12, 672, 6144, 2.512, True, _BLACKWELL),
        _geforce("RTX5070Ti", 16, 896, 8960, 2.452, True, _BLACKWELL),
        _geforce("RTX5080", 16, 960, 10752, 2.617, True, _BLACKWELL),
        _geforce("RTX5090", 32, 1792, 21760, 2.407, True, _BLACKWELL),
        _gpu("MI300X", r"Instinct MI300X( OAM| VF)?", 192, 5300, 2614.9, 1307.4, 1307.4, 653.7, 163.4, _MI300X),
        # Half of the card: each of the two chips is a device. The driver reports the same name for the MI250X, which
        # is 6% faster.
        _gpu("MI250", r"Instinct MI250(X / MI250|X/MI250)?", 64, 1638, None, 181, 181, None, 45.3, _MI250),
        _gpu("W7900", r"Radeon PRO W7900", 48, 864, None, 122.6, 122.6, None, 61.3, "AMD Radeon PRO W7900 data sheet"),
    )
}


def recognise(reported: str, memory: float | None = None) -> Gpu | None:
    """The GPU with this device name, or None if it is not in the table.

    The full name must match: "... Laptop GPU", "RTX 4090 D", MIG slices and virtual GPUs are other devices.

    Args:
        reported: device name from the driver.
        memory: bytes of the device, to choose between cards of the same name. None chooses the smallest.
    """
    short = re.sub(r"^((NVIDIA|AMD|Tesla)\s+)+", "", reported.strip())
    found = [gpu for gpu in GPUS.values() if re.fullmatch(gpu.reported, short)]
    return min(found, key=lambda gpu: abs(gpu.memory - (memory or 0)), default=None)


def named(name: str) -> Gpu:
    """A GPU by its name in the table or its device name. Raises UserError for an unknown name."""
    known = {_plain(key): gpu for key, gpu in GPUS.items()}
    wanted = _plain(name)
    found = known.get(wanted) or recognise(name)
    if found is None:
        close = [key for key in known if wanted and key.startswith(wanted)]
        close = close or difflib.get_close_matches(wanted, known, n=3)
        says = f"did you mean {' or '.join(known[key].name for key in close)}?" if close else ""
        says = says or f"must be one of {', '.join(GPUS)};"
        raise UserError(f"--gpu {name}: {says} --memory GB plans for any other GPU")
    return found


def _plain(name: str) -> str:
    """A name in lower case, without punctuation, manufacturer and a final "GB"."""
    plain = re.sub(r"[\W_]", "", name).lower()
    return re.sub(r"^(nvidia|amd|geforce|tesla|instinct|radeonpro)+", "", plain).removesuffix("gb")


def device_name(device: torch.device) -> str:
    """The name that a GPU or the processor reports."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    return processor_name()


def processor_name() -> str:
    return cpu_facts().get("model name") or platform.processor() or platform.machine()


def cpu_facts() -> dict[str, str]:
    """The entries of /proc/cpuinfo, such as "model name" and "flags"; {} if there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


@functools.cache
def cpu_multiplies_bf16() -> bool:
    """Whether the processor has instructions for products of bf16."""
    return bool({"avx512_bf16", "amx_bf16"} & set(cpu_facts().get("flags", "").split()))


def gpu_of(device: torch.device) -> Gpu | None:
    """The table's entry for a device of this machine, or None if the device is not listed."""
    memory = None
    if device.type == "cuda":
        import torch

        memory = torch.cuda.get_device_properties(device).total_memory
    return recognise(device_name(device), memory)


def mfu(flops_per_token: float, tokens_per_second: float, peak: float) -> float:
    """Model FLOPs utilization (PaLM, arXiv 2204.02311): the model's FLOP/s as a share of the peak.

    Args:
        flops_per_token: see `GPT.flops_per_token`.
        tokens_per_second: over all devices.
        peak: FLOP/s of all devices, in the regime's `matmul_format`.
    """
    return flops_per_token * tokens_per_second / peak
