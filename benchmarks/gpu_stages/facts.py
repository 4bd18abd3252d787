"""Facts about the machine, and the rates of matrix products, attention and copies.

Products have the shapes of GPT-2 124M at 65,536 tokens, in the forward pass and for both gradients. Inputs are random,
as a GPU multiplies zeros faster. The rate of a copy counts the bytes read and the bytes written.
"""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Callable
from typing import Any

from common import machine, spread

from gpu_stages.stage import NotHere, Row, Stage, kernels_of, milliseconds, peak_of, pick, rate, run

WIDTH, VOCABULARY = 768, 50304
SHAPES = {  # (inputs, outputs) of the linear layers
    "qkv": (WIDTH, 3 * WIDTH),
    "proj": (WIDTH, WIDTH),
    "mlp up": (WIDTH, 4 * WIDTH),
    "mlp down": (4 * WIDTH, WIDTH),
    "head": (WIDTH, VOCABULARY),
}
PACKAGES = ("torch", "triton", "numpy", "transformers", "torchao", "bitsandbytes", "safetensors", "tiktoken")


def nvidia_smi() -> str:
    fields = "driver_version,power.limit,clocks.sm,clocks.mem,temperature.gpu"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=15).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)


def versions(device: Any) -> Row:
    import torch

    row: Row = {"python": platform.python_version(), "cuda": torch.version.cuda, "machine": machine(), "packages": {}}
    for name in PACKAGES:
        try:
            row["packages"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            row["packages"][name] = None
    row["cudnn"] = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        row |= {
            "device": gpu.name,
            "gpu_gb": gpu.total_memory / 1e9,
            "capability": [gpu.major, gpu.minor],
            "multiprocessors": gpu.multi_processor_count,
            "nccl": str(torch.cuda.nccl.version()),
            "free_gb": torch.cuda.mem_get_info()[0] / 1e9,
        }
        row["nvidia_smi"] = nvidia_smi()
    row["peak_tflops"] = {
        kind: (peak_of(device, kind) or 0) / 1e12 or None for kind in ("bf16", "fp16", "tf32", "fp32")
    }
    says = f"{row.get('device', 'CPU')}, torch {row['packages']['torch']}, CUDA {row['cuda']}, cuDNN {row['cudnn']}"
    return row | {"says": f"{says}, peak in bf16 {row['peak_tflops']['bf16']} TFLOP/s"}


def product(a: Any, b: Any, device: Any, peak: float | None = None, action: Callable[[], object] | None = None) -> Row:
    """Rate of a @ b in TFLOP/s, and the share of the peak."""
    flops = 2 * a.shape[0] * a.shape[1] * b.shape[1]
    row: Row = {"tflops": rate(milliseconds(action or (lambda: a @ b), device), flops)}
    return row | ({"of_peak": 1e12 * row["tflops"]["median"] / peak} if peak else {})


def square(stage: Stage, device: Any) -> Row:
    """The product of two square matrices in every format."""
    import torch

    n, row = 256 if stage.tiny else 8192, Row()
    draw = torch.randn(2, n, n, device=device)
    formats = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
    for name, dtype in formats.items():
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        a, b = draw.to(dtype)
        row[name] = product(a, b, device, peak_of(device, name))
    torch.set_float32_matmul_precision("highest")
    if device.type == "cuda":
        try:
            a, b = draw[0].to(torch.float8_e4m3fn), draw[1].to(torch.float8_e4m3fn).t()  # row-major @ column-major
            scale = torch.ones((), device=device), torch.nn.functional.ScalingType.TensorWise
            scaled_mm = torch.nn.functional.scaled_mm
            row["fp8"] = product(a, b, device, None, lambda: scaled_mm(a, b, *scale, *scale))
        except Exception as error:
            row["fp8"] = {"error": f"{type(error).__name__}: {error}"[:200]}
    told = ", ".join(f"{name} {got['tflops']['median']:.1f}" for name, got in row.items() if "tflops" in got)
    return {"n": n, "formats": row, "says": f"{n}^3 in TFLOP/s: {told}"}


def layer(stage: Stage, device: Any, inputs: int, outputs: int) -> Row:
    """Products of a linear layer in bf16: forward, gradient of the input, gradient of the weight."""
    import torch

    n = 256 if stage.tiny else 65536
    if stage.tiny:
        inputs, outputs = inputs // 12, outputs // 12
    draw = {"dtype": torch.bfloat16, "device": device}
    x, w, dy = torch.randn(n, inputs, **draw), torch.randn(outputs, inputs, **draw), torch.randn(n, outputs, **draw)
    peak = peak_of(device)
    rows = {
        "forward": product(x, w.t(), device, peak),
        "d input": product(dy, w, device, peak),
        "d weight": product(dy.t(), x, device, peak),
    }
    total = sum(2 * n * inputs * outputs / row["tflops"]["median"] for row in rows.values())  # FLOPs / TFLOP/s
    mean = 6 * n * inputs * outputs / total
    told = ", ".join(f"{name} {row['tflops']['median']:.0f}" for name, row in rows.items())
    return {
        "tokens": n,
        "inputs": inputs,
        "outputs": outputs,
        **rows,
        "mean_tflops": mean,
        "says": f"TFLOP/s: {told}; together {mean:.0f}",
    }


def copies(stage: Stage, device: Any) -> Row:
    import torch

    n = (16 if stage.tiny else 4096) << 20
    a = torch.empty(n, dtype=torch.uint8, device=device).random_(0, 255)
    b = torch.empty_like(a)
    row: Row = {"bytes": n, "device_tb_s": rate(milliseconds(lambda: b.copy_(a), device), 2 * n)}
    if device.type == "cuda":
        small = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
        there = torch.empty_like(small, device=device)
        row["host_to_device_tb_s"] = rate(
            milliseconds(lambda: there.copy_(small, non_blocking=True), device), 256 << 20
        )
    return row | {"says": f"{row['device_tb_s']['median']:.2f} TB/s on the device, read and written"}


def attention(stage: Stage, device: Any, B: int, T: int, name: str, deterministic: bool = False) -> Row:
    """The kernels that scaled_dot_product_attention chooses for GPT-2's heads, their time, and non-finite gradients.

    FLOPs count the causal half only: 2 products forward and 5 backward, 2 T T D / 2 each.
    """
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    H, D = (2, 16) if stage.tiny else (12, 64)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
    qkv = torch.randn(B, T, 3 * H * D, device=device, dtype=dtype)
    dy = torch.randn(B, H, T, D, device=device, dtype=dtype)
    parts = [part.view(B, T, H, D).transpose(1, 2).detach().requires_grad_() for part in qkv.split(H * D, dim=2)]

    def both() -> Any:
        y = F.scaled_dot_product_attention(*parts, is_causal=True)
        return torch.autograd.grad(y, parts, dy)

    row: Row = {"B": B, "T": T, "H": H, "D": D, "dtype": name, "deterministic": deterministic}
    torch.use_deterministic_algorithms(deterministic)
    try:
        seen = kernels_of(both, device, top=40)["kernels"]
        row["kernels"] = [k["kernel"] for k in seen if k["class"] == "attention"] or [k["kernel"] for k in seen[:4]]
        row["not_finite"] = {key: int((~grad.isfinite()).sum()) for key, grad in zip("qkv", both(), strict=True)}
        backends = {"picked": None, "cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
        for key, backend in backends.items():
            if deterministic or (device.type != "cuda" and key == "cudnn"):
                continue
            try:
                if backend is None:
                    times = milliseconds(both, device, runs=6, warmup=2)
                else:
                    with sdpa_kernel(backend):
                        times = milliseconds(both, device, runs=6, warmup=2)
                flops = 7 * B * H * T * T * D
                row[key] = {"ms": spread(times), "tflops": rate(times, flops)}
            except RuntimeError as error:
                row[key] = {"error": str(error).splitlines()[0][:200]}
    finally:
        torch.use_deterministic_algorithms(False)
    text = " ".join(row["kernels"]).lower()
    names = {"cudnn": "cudnn", "flash": "flash", "cutlass": "memory-efficient", "fmha": "memory-efficient"}
    row["backend"] = next((kind for word, kind in names.items() if word in text), "math or unknown")
    bad = sum(row["not_finite"].values())
    return row | {"says": f"{row['backend']}: {row['kernels'][0][:80]}" + (f"; {bad} NOT FINITE" if bad else "")}


def main(stage: Stage) -> None:
    device = pick(stage)
    B, T = (4, 64) if stage.tiny else (64, 1024)
    items: dict[str, Callable[[], Row]] = {
        "versions": lambda: versions(device),
        "attention bf16": lambda: attention(stage, device, B, T, "bf16"),
        "square products": lambda: square(stage, device),
    }
    for name, (inputs, outputs) in SHAPES.items():
        items[f"product {name}"] = lambda inputs=inputs, outputs=outputs: layer(stage, device, inputs, outputs)
    items["copies"] = lambda: copies(stage, device)
    # one sequence less, because errors have been reported for exactly 65,536 tokens
    items[f"attention bf16, {B - 1} sequences"] = lambda: attention(stage, device, B - 1, T, "bf16")
    items["attention fp32"] = lambda: attention(stage, device, B // 4, T, "fp32")
    items["attention bf16, deterministic"] = lambda: attention(stage, device, B // 4, T, "bf16", deterministic=True)
    items["nvml"] = energy
    stage.all(items, expects=2.0, most=20.0)


def energy() -> Row:
    """Whether the energy of a run can be measured."""
    import torch

    from gptlab.training.throughput import Energy

    if not torch.cuda.is_available():
        raise NotHere("energy is measured on NVIDIA GPUs only")
    joules = Energy(torch.device("cuda")).joules()
    return {"joules": joules, "says": f"energy can {'be' if joules is not None else 'not be'} measured"}


if __name__ == "__main__":
    run(main)
