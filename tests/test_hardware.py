"""The table of GPUs: device names, published rates, FLOPs per token, and MFU."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_recipe
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import gptlab
from gptlab import hardware
from gptlab.config import Model
from gptlab.errors import UserError
from gptlab.hardware import GB, GPUS, gpu_of, named, recognise
from gptlab.model.encoder import build_encoder
from gptlab.model.gpt import GPT, build_model
from gptlab.model.matmul import mkl
from gptlab.precision.regimes import REGIMES
from gptlab.rundir import RunDir

# -- names ----------------------------------------------------------------------------------------------------------

REPORTED = {
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H100 PCIe": "H100-PCIe",
    "NVIDIA H100 NVL": "H100-NVL",
    "NVIDIA H200": "H200",
    "NVIDIA H200 NVL": "H200-NVL",
    "NVIDIA GH200 480GB": "GH200",
    "NVIDIA GH200 96GB HBM3": "GH200",
    "NVIDIA GH200 144G HBM3e": "GH200",
    "NVIDIA B200": "B200",
    "NVIDIA GB10": "GB10",
    "NVIDIA A100-SXM4-40GB": "A100-40",
    "NVIDIA A100-PCIE-40GB": "A100-40",
    "A100-SXM4-40GB": "A100-40",
    "NVIDIA A100-SXM4-80GB": "A100-80",
    "NVIDIA A100 80GB PCIe": "A100-80-PCIe",
    "Tesla V100-SXM2-16GB": "V100-SXM2-16",
    "Tesla V100-SXM2-32GB": "V100-SXM2-32",
    "Tesla V100-PCIE-16GB": "V100-PCIe-16",
    "Tesla V100-PCIE-32GB": "V100-PCIe-32",
    "Tesla T4": "T4",
    "NVIDIA A10": "A10",
    "NVIDIA A10G": "A10G",
    "NVIDIA RTX A6000": "A6000",
    "NVIDIA RTX 6000 Ada Generation": "RTX6000Ada",
    "NVIDIA L4": "L4",
    "NVIDIA L40S": "L40S",
    "NVIDIA GeForce RTX 3060": "RTX3060",
    "NVIDIA GeForce RTX 3060 Ti": "RTX3060Ti",
    "NVIDIA GeForce RTX 3070": "RTX3070",
    "NVIDIA GeForce RTX 3070 Ti": "RTX3070Ti",
    "NVIDIA GeForce RTX 3080": "RTX3080-10",
    "NVIDIA GeForce RTX 3080 Ti": "RTX3080Ti",
    "GeForce RTX 3090": "RTX3090",
    "NVIDIA GeForce RTX 3090 Ti": "RTX3090Ti",
    "NVIDIA GeForce RTX 4060": "RTX4060",
    "NVIDIA GeForce RTX 4060 Ti": "RTX4060Ti-8",
    "NVIDIA GeForce RTX 4070": "RTX4070",
    "NVIDIA GeForce RTX 4070 SUPER": "RTX4070Super",
    "NVIDIA GeForce RTX 4070 Ti": "RTX4070Ti",
    "NVIDIA GeForce RTX 4070 Ti SUPER": "RTX4070TiSuper",
    "NVIDIA GeForce RTX 4080": "RTX4080",
    "NVIDIA GeForce RTX 4080 SUPER": "RTX4080Super",
    "NVIDIA GeForce RTX 4090": "RTX4090",
    "NVIDIA GeForce RTX 5070": "RTX5070",
    "NVIDIA GeForce RTX 5070 Ti": "RTX5070Ti",
    "NVIDIA GeForce RTX 5080": "RTX5080",
    "NVIDIA GeForce RTX 5090": "RTX5090",
    "AMD Instinct MI300X": "MI300X",
    "AMD Instinct MI300X VF": "MI300X",
    "AMD Instinct MI250X / MI250": "MI250",
    "AMD Instinct MI250": "MI250",
    "AMD Radeon PRO W7900": "W7900",
}

OTHERS = [
    "NVIDIA GeForce RTX 5090 D",
    "NVIDIA GeForce RTX 4090 D",
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 3080 Ti Laptop GPU",
    "NVIDIA GeForce RTX 2080 Ti",
    "NVIDIA T400 4GB",
    "NVIDIA A100",
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    "NVIDIA GH200 480GB MIG 1g.12gb",
    "NVIDIA A10-24Q",
    "NVIDIA L40",
    "NVIDIA A40",
    "NVIDIA GB200",
    "NVIDIA B300",
    "Tesla V100S-PCIE-32GB",
    "Quadro RTX 6000",
    "AMD Radeon RX 7900 XTX",
    "AMD EPYC 7763 64-Core Processor",
    "Apple M2",
    "",
]


@pytest.mark.parametrize("name", REPORTED)
def test_a_name_from_the_driver_is_one_gpu(name: str) -> None:
    found = recognise(name)
    assert found is not None and found.name == REPORTED[name]
    short = re.sub(r"^(NVIDIA|AMD|Tesla) ", "", name)
    assert len({gpu.reported for gpu in GPUS.values() if re.fullmatch(gpu.reported, short)}) == 1
    assert named(name) == found  # the command line accepts device names


def test_every_gpu_is_reported_by_a_name() -> None:
    assert {*REPORTED.values(), "RTX3080-12", "RTX4060Ti-16"} == set(GPUS)


@pytest.mark.parametrize("name", OTHERS)
def test_other_devices_are_not_recognised(name: str) -> None:
    assert recognise(name) is None


@pytest.mark.parametrize(
    ("name", "memory", "key"),
    [
        ("NVIDIA GeForce RTX 3080", 10 * 2**30, "RTX3080-10"),
        ("NVIDIA GeForce RTX 3080", 12.6 * GB, "RTX3080-12"),
        ("NVIDIA GeForce RTX 4060 Ti", 8.2 * GB, "RTX4060Ti-8"),
        ("NVIDIA GeForce RTX 4060 Ti", 16 * 2**30, "RTX4060Ti-16"),
    ],
)
def test_memory_tells_cards_of_one_name_apart(
    name: str, memory: float, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert recognise(name, memory) == GPUS[key]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    properties = type("Properties", (), {"total_memory": memory})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert gpu_of(torch.device("cuda")) == GPUS[key]


def test_a_gpu_is_named_loosely_and_not_guessed() -> None:
    assert named("a100-80gb").name == named("A100_80").name == "A100-80"
    assert named("rtx 4090") is named("GeForce RTX 4090") is GPUS["RTX4090"]
    for name, close in (
        ("RTX3080", "RTX3080-10 or RTX3080-12 or RTX3080Ti"),
        ("rtx4060-ti", "RTX4060Ti-8 or RTX4060Ti-16"),
        ("h10", "H100"),
    ):
        with pytest.raises(UserError, match=rf"--gpu {name}: did you mean {close}.*\? --memory GB plans for any other"):
            named(name)
    for name in ("?", "Voodoo"):
        with pytest.raises(UserError, match=r"must be one of H100, .*W7900; --memory GB plans for any other GPU$"):
            named(name)


def test_the_docs_name_every_gpu() -> None:
    text = (Path(__file__).parents[1] / "docs/planning.md").read_text(encoding="utf-8")
    assert [name for name in GPUS if not re.search(rf"\b{name}\b", text)] == []


def test_the_table_is_read_without_pytorch() -> None:
    code = "import sys, gptlab.hardware; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# -- figures --------------------------------------------------------------------------------------------------------

# TFLOP/s in NVIDIA's white papers: bf16 with float32 accumulation, and float32 without tensor cores
PUBLISHED = {
    "RTX3070": (40.6, 20.3),
    "RTX3080-10": (59.5, 29.8),
    "RTX3090": (71, 35.6),
    "RTX4080": (97.5, 48.7),
    "RTX4090": (165.2, 82.6),
    "RTX5080": (112.6, 56.3),
    "RTX5090": (209.5, 104.8),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_geforce_rates_from_cores_and_clock_are_the_published_ones(name: str) -> None:
    gpu = GPUS[name]
    assert (gpu.bf16, gpu.fp32) == tuple(pytest.approx(tera * 1e12, rel=0.003) for tera in PUBLISHED[name])


# CUDA cores and boost clock in GHz
CHIPS = {
    "A10": (9216, 1.695),
    "A6000": (10752, 1.80),
    "RTX6000Ada": (18176, 2.505),
    "L4": (7424, 2.04),
    "L40S": (18176, 2.52),
    "T4": (2560, 1.59),
    "V100-SXM2-16": (5120, 1.53),
    "A100-40": (6912, 1.41),
}


@pytest.mark.parametrize("name", CHIPS)
def test_other_float32_rates_follow_from_cores_and_clock(name: str) -> None:
    cores, clock = CHIPS[name]
    assert GPUS[name].fp32 == pytest.approx(2 * cores * clock * 1e9, rel=0.01)


@pytest.mark.parametrize("gpu", GPUS.values(), ids=list(GPUS))
def test_formats_of_a_gpu_agree(gpu: hardware.Gpu) -> None:
    """Tensor cores double the rate for half the width. bf16 and float16 have the same rate."""
    if gpu.bf16 is not None:
        assert gpu.fp16 == gpu.bf16 >= gpu.fp32
    if gpu.tf32 is not None:
        assert gpu.bf16 == pytest.approx(2 * gpu.tf32, rel=0.03) and gpu.tf32 >= gpu.fp32
    if gpu.fp8 is not None:
        assert gpu.bf16 is not None and gpu.fp8 == pytest.approx(2 * gpu.bf16, rel=0.02)
    assert gpu.source and 4 * GB < gpu.memory < 300 * GB and 1e11 < gpu.bandwidth < 1e13
    assert 2e12 < gpu.fp32 < 3e14  # all figures have the right unit


def test_a_chip_is_as_fast_whatever_its_memory_and_slower_on_a_card() -> None:
    rates: dict[str, Any] = {name: (g.fp8, g.bf16, g.fp16, g.tf32, g.fp32) for name, g in GPUS.items()}
    for names in (
        ("H100", "H200", "GH200"),
        ("H100-NVL", "H200-NVL"),
        ("A100-40", "A100-80", "A100-80-PCIe"),
        ("V100-SXM2-16", "V100-SXM2-32"),
        ("V100-PCIe-16", "V100-PCIe-32"),
        ("RTX4060Ti-8", "RTX4060Ti-16"),
    ):
        assert len({rates[name] for name in names}) == 1
    for card, module in (("H100-PCIe", "H100-NVL"), ("H100-NVL", "H100"), ("V100-PCIe-16", "V100-SXM2-16")):
        assert all(a < b for a, b in zip(rates[card], rates[module], strict=True) if a is not None)


# -- FLOPs a token --------------------------------------------------------------------------------------------------

MODERN = {"mlp": "swiglu", "norm": "rmsnorm", "position": "rope", "qk_norm": True, "bias": False}


@pytest.mark.parametrize("shape", [{}, MODERN], ids=["classic", "modern"])
def test_flops_a_token_are_those_of_the_matrix_multiplications(shape: dict[str, Any]) -> None:
    """The count is PyTorch's, for a forward and a backward pass with attention as matrix products."""
    counted = []
    for tied in (True, False):
        model = build_model(Model(n_layer=3, n_head=4, n_embd=64, block_size=32, vocab_size=301, tied=tied, **shape))
        tokens = torch.arange(64).view(2, 32)
        with mkl(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            out = model(tokens)
            assert isinstance(out, torch.Tensor)
            out.sum().backward()
        assert counter.get_total_flops() == tokens.numel() * model.flops_per_token()
        counted.append(model.flops_per_token())
    assert counted[0] == counted[1]


def test_flops_of_a_document_are_those_of_its_blocks() -> None:
    config = Model(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=99, mlp="gelu_erf", tied=False)
    model, labels = build_encoder(config, n_labels=5), 5
    tokens, lengths = torch.arange(48).view(3, 16), torch.full((3,), 16)
    with mkl(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = model(tokens, lengths)
        assert isinstance(out, torch.Tensor)
        out.sum().backward()
    head = 6 * labels * 32  # for one token per document
    assert counter.get_total_flops() == 48 * model.flops_per_token() + 3 * head


def test_the_shipped_124m_has_as_many_flops_tied_and_untied() -> None:
    flops = []
    for tied in (True, False):
        with torch.device("meta"):
            flops.append(GPT(Model(vocab_size=50304, tied=tied)).flops_per_token())
    assert flops[0] == flops[1] == 6 * (50304 * 768 + 12 * 12 * 768**2) + 12 * 12 * 768 * 1024


# -- MFU ------------------------------------------------------------------------------------------------------------


def test_a_regime_has_the_format_of_its_matrices() -> None:
    assert {name: regime.matmul_format for name, regime in REGIMES.items()} == {
        "fp32": "fp32",
        "tf32": "tf32",
        "amp_bf16": "bf16",
        "amp_fp16": "fp16",
        "bf16_pure": "bf16",
        "bf16_master": "bf16",
        "fp16_pure": "fp16",
        "fp8_tensorwise": "bf16",
        "fp8_rowwise": "bf16",
    }
    a100, t4 = GPUS["A100-40"], GPUS["T4"]
    assert [a100.peak(form) for form in ("fp8", "bf16", "tf32", "fp32")] == [None, 312e12, 156e12, 19.5e12]
    assert [t4.peak(form) for form in ("bf16", "fp16", "tf32", "fp32")] == [None, 65e12, None, 8.1e12]


@pytest.mark.parametrize(("regime", "peak"), [("fp32", 104.8e12), ("amp_bf16", 209.5e12)])
def test_the_progress_line_of_an_rtx_5090_shows_mfu(
    regime: str,
    peak: float,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The test renames the processor to RTX 5090. The MFU of the small model rounds to 0.0%."""
    monkeypatch.setattr(hardware, "device_name", lambda device: "NVIDIA GeForce RTX 5090")
    recipe = tiny_recipe(dataset, precision__regime=regime, train__max_steps=2, train__eval_every=0)
    gptlab.train(recipe, tmp_path)
    assert re.search(r"step 1/2  .* tokens/s  .*MFU 0\.0%  \d+\.\d\d GB", capsys.readouterr().err)
    run = RunDir(tmp_path)
    model = build_model(run.read_recipe().model)
    lines = [line for line in run.read_metrics() if "tokens_per_second" in line]
    assert len(lines) == 2
    for line in lines:
        used = line["tokens_per_second"] * model.flops_per_token()
        assert line["mfu"] == pytest.approx(used / peak, rel=1e-3)  # the peaks above have four digits


def test_an_unknown_device_has_no_mfu_at_all(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, regime in (("NVIDIA GeForce RTX 4090 Laptop GPU", "amp_bf16"), ("Tesla T4", "amp_bf16")):
        monkeypatch.setattr(hardware, "device_name", lambda device, name=name: name)
        out = tmp_path / name.replace(" ", "")
        gptlab.train(tiny_recipe(dataset, precision__regime=regime, train__max_steps=1, train__eval_every=0), out)
        said = capsys.readouterr().err
        assert "tokens/s" in said and "MFU" not in said
        assert all("mfu" not in line for line in RunDir(out).read_metrics())
