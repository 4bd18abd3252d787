"""Kernels of attention and modes of the compiler: what a run asks of PyTorch, and what it says if that is nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_recipe
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

import gptlab
from gptlab.config import Recipe, load_recipe
from gptlab.planning.resolve import resolve_recipe
from gptlab.precision.regimes import REGIMES
from gptlab.rundir import RunDir
from gptlab.training import attention
from gptlab.training.attention import attention_kernel, attention_seconds, fastest, ignored

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TINY: dict[str, Any] = {"train__max_steps": 2, "train__eval_every": 0}


def smoke(**settings: Any) -> Recipe:
    return load_recipe("smoke-lm", {name.replace("__", "."): value for name, value in settings.items()})


def test_a_kernel_is_preferred_only_inside() -> None:
    before = _cur_sdpa_kernel_backends(with_priority=True)
    with attention_kernel("flash"):
        inside = _cur_sdpa_kernel_backends(with_priority=True)
        assert inside[0] is SDPBackend.FLASH_ATTENTION and SDPBackend.CUDNN_ATTENTION not in inside
        assert torch.compiler.config.cache_key_tag == "attention flash"
    with attention_kernel("cudnn"):
        assert _cur_sdpa_kernel_backends(with_priority=True)[:2] == [
            SDPBackend.CUDNN_ATTENTION,
            SDPBackend.FLASH_ATTENTION,
        ]
    with attention_kernel("auto"):
        assert _cur_sdpa_kernel_backends(with_priority=True) == before
    assert _cur_sdpa_kernel_backends(with_priority=True) == before and torch.compiler.config.cache_key_tag == ""


def test_only_kernels_that_run_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "ROUNDS", 2)
    found = attention_seconds(smoke(batch__micro_batch=2), REGIMES["bf16_master"], CPU)
    assert set(found) == {"flash"} and found["flash"] > 0


def test_the_fastest_is_taken_where_there_is_a_choice() -> None:
    assert fastest({"cudnn": 0.0005, "flash": 0.00062}) == (
        "cudnn",
        "train.attention = fastest: cudnn (cudnn 0.5 ms, flash 0.62 ms a layer, forward and backward)",
    )
    assert fastest({"cudnn": 2.0, "flash": 1.0})[0] == "flash"
    assert fastest({"flash": 1.0})[0] == "auto"
    assert fastest({})[0] == "auto" and "neither cudnn nor flash runs" in fastest({})[1]


def test_what_is_measured_is_kept_when_a_run_resumes() -> None:
    recipe = smoke(train__attention="fastest")
    assert resolve_recipe(recipe, "cuda").recipe.train.attention == "fastest"  # before it is measured
    assert resolve_recipe(recipe, "cpu").recipe.train.attention == "auto"
    stored = recipe.replace({"train.attention": "flash"})
    assert resolve_recipe(recipe, "cuda", stored=stored).recipe.train.attention == "flash"
    masked = recipe.replace({"model.document_attention": True})
    assert resolve_recipe(masked, "cuda").recipe.train.attention == "auto"
    assert ignored(masked, masked, CUDA) == [
        "train.attention = fastest: left to PyTorch, as attention within documents has a mask"
    ]
    assert ignored(recipe, recipe, CUDA) == []


def test_a_cpu_run_says_what_does_nothing(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = {"train__attention": "fastest", "compile__mode": "max-autotune"}
    gptlab.train(tiny_recipe(dataset, **TINY, **asked), out=tmp_path)
    told = " ".join(capsys.readouterr().err.split())
    assert "train.attention = fastest: does nothing on cpu; it is for GPUs" in told
    assert "compile.mode = max-autotune: does nothing, as this run is not compiled" in told
    run = RunDir(tmp_path)
    assert run.read_recipe().train.attention == "auto" and run.read_json("environment.json")["first_step_seconds"] > 0


def test_max_autotune_makes_no_cuda_graphs(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch._inductor import list_mode_options

    asked: list[str] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, *, dynamic, mode: asked.append(mode))
    for mode in ("default", "max-autotune"):
        recipe = tiny_recipe(dataset, **TINY, compile__enabled=True, compile__mode=mode)
        gptlab.train(recipe, out=tmp_path / mode)
    assert (
        asked == ["default", "max-autotune-no-cudagraphs"]
        and "compiled with max-autotune on" in capsys.readouterr().err
    )
    assert list_mode_options(asked[1]) == {"max_autotune": True, "coordinate_descent_tuning": True}
