"""benchmarks/gpu.py: stages that end in different ways, repeated calls, time limits; all stages on a CPU."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
import torch

from gptlab.config import Optim, load_study
from gptlab.optim.optimizers import make_optimizer

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
CPU = torch.device("cpu")

FAKES = {
    "good": "stage.all({'a': lambda: {'n': 1, 'says': 'one'}, 'b': lambda: {'n': (2, float('nan'))}}, expects=0)",
    "raises": """
        def broken():
            raise ValueError("a fault")
        stage.all({'a': broken, 'b': lambda: {'n': 2}}, expects=0)
        """,
    "memory": """
        def greedy():
            raise MemoryError("too much")
        stage.all({'a': greedy, 'b': lambda: {'n': 2}}, expects=0)
        """,
    "hangs": """
        def wait():
            stage.note('b', so_far=3)
            time.sleep(600)
        items = {'a': lambda: {'n': 1}, 'b': wait, 'c': lambda: {'n': 3}}
        for name in stage.todo(list(items)):
            stage.measure(name, items[name], most=1 if name == 'b' else 300)
        """,
    "hangs_whole": """
        subprocess.Popen(['sleep', '100000'])
        time.sleep(600)
        """,
    "killed": """
        def die():
            os.kill(os.getpid(), signal.SIGKILL)
        stage.all({'a': lambda: {'n': 1}, 'b': die, 'c': lambda: {'n': 3}}, expects=0)
        """,
    "slow": """
        def long():
            stage.ends = 0
            return {'n': 1}
        stage.all({'a': long, 'b': lambda: {'n': 2}}, expects=0)
        """,
    "nothing": "pass",
    "no_import": "import a_module_that_is_not_there",
}


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script with fake stages."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("gpu")
    for name, body in FAKES.items():
        head = "import os, signal, subprocess, time\nfrom gpu_stages.stage import run\n\ndef main(stage):\n"
        body = textwrap.indent(textwrap.dedent(body).strip(), "    ")
        (tmp_path / f"fake_{name}.py").write_text(f"{head}{body}\n\nrun(main)\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(script, "PARTS", {name: script.Part(f"fake_{name}", 300) for name in FAKES})
    monkeypatch.setattr(script, "identity", lambda tiny: {"device": "a device", "tiny": tiny})
    monkeypatch.setattr(script, "LEAST", 0.5)
    return script


def call(gpu: ModuleType, tmp_path: Path, stages: str, *more: str) -> dict[str, Any]:
    gpu.main(["--out", str(tmp_path / "out"), "--stages", stages, *more])
    results: dict[str, Any] = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    return results


def statuses(stage: dict[str, Any]) -> list[str]:
    return [row["status"] for row in stage["items"].values()]


def test_a_stage_ends_in_any_way_and_the_next_one_starts(gpu: ModuleType, tmp_path: Path) -> None:
    stages = call(gpu, tmp_path, "raises,memory,hangs,killed,nothing,no_import,good")["stages"]
    assert {name: stage["status"] for name, stage in stages.items()} == {
        "raises": "failed",
        "memory": "out_of_memory",
        "hangs": "timeout",
        "killed": "killed",
        "nothing": "failed",
        "no_import": "failed",
        "good": "done",
    }
    assert statuses(stages["raises"]) == ["failed", "done"]
    assert stages["raises"]["items"]["a"]["error"] == "ValueError: a fault"
    assert statuses(stages["memory"]) == ["out_of_memory", "done"]
    # after a process has ended, a new process measures the remaining items
    assert statuses(stages["hangs"]) == ["done", "timeout", "done"] and stages["hangs"]["launches"] == 2
    assert stages["hangs"]["items"]["b"]["so_far"] == 3
    assert any("in wait" in line for line in stages["hangs"]["tail"]), "where it hung"
    assert statuses(stages["killed"]) == ["done", "killed", "done"] and stages["killed"]["launches"] == 2
    assert "a_module_that_is_not_there" in " ".join(stages["no_import"]["tail"])
    assert stages["good"]["items"]["a"]["n"] == 1 and stages["good"]["items"]["b"]["n"] == [2, "nan"]


def in_session(process: psutil.Process, leaders: list[int]) -> bool:
    try:
        return os.getsid(process.pid) in leaders and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, psutil.Error):
        return False


def test_a_stage_at_its_limit_is_ended_with_all_that_it_started(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []

    class Noted(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            started.append(self.pid)

    with monkeypatch.context() as patch:
        patch.setattr(gpu.subprocess, "Popen", Noted)
        stages = call(gpu, tmp_path, "hangs_whole", "--budget", "4")["stages"]
    assert stages["hangs_whole"]["status"] == "timeout" and stages["hangs_whole"]["exit"] is None
    patience = time.monotonic() + 300  # a killed process exists until its parent waits for it
    while there := [p.name() for p in psutil.process_iter() if in_session(p, started)]:
        assert time.monotonic() < patience, there
        time.sleep(0.05)


def test_the_same_call_goes_on_and_does_nothing_twice(gpu: ModuleType, tmp_path: Path) -> None:
    first = call(gpu, tmp_path, "raises,good")
    file = tmp_path / "fake_raises.py"
    file.write_text(
        file.read_text(encoding="utf-8").replace('raise ValueError("a fault")', "return {'n': 7}"), encoding="utf-8"
    )
    again = call(gpu, tmp_path, "raises,good")
    assert again["stages"]["good"] == first["stages"]["good"]
    assert again["stages"]["raises"]["status"] == "done" and again["stages"]["raises"]["items"]["a"]["n"] == 7
    assert again["stages"]["raises"]["items"]["b"] == first["stages"]["raises"]["items"]["b"]
    assert len(again["calls"]) == 2


def test_what_there_is_no_time_for_is_left_for_another_call(gpu: ModuleType, tmp_path: Path) -> None:
    stages = call(gpu, tmp_path, "slow,good")["stages"]
    assert stages["slow"]["status"] == "timeout" and statuses(stages["slow"]) == ["done", "waiting"]
    assert stages["good"]["status"] == "done"
    assert call(gpu, tmp_path, "slow")["stages"]["slow"]["status"] == "done"
    (tmp_path / "out" / "results.json").unlink()
    assert call(gpu, tmp_path, "good", "--budget", "0")["stages"] == {}


def test_results_of_another_device_are_not_mixed_in(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call(gpu, tmp_path, "good")
    monkeypatch.setattr(gpu, "identity", lambda tiny: {"device": "another", "tiny": tiny})
    with pytest.raises(SystemExit) as exit:
        call(gpu, tmp_path, "good")
    assert exit.value.code == 2 and "choose another --out" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit:
        call(gpu, tmp_path, "good,bad")
    assert exit.value.code == 2 and "--stages bad: must be among" in capsys.readouterr().err


# -- the stages' own rules ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTN", "gemm"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu>", "gemm"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob", "attention"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention"),
        ("triton_red_fused__log_softmax_nll_loss_forward_0", "cross-entropy"),
        ("cross_entropy_row", "cross-entropy"),
        ("triton_per_fused_native_layer_norm_add_3", "norm and elementwise"),
        ("triton_tem_fused_addmm_7", "gemm"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("Memset (Device)", "copies"),
    ],
)
def test_a_kernel_s_name_tells_its_class(gpu: ModuleType, name: str, kind: str) -> None:
    assert importlib.import_module("gpu_stages.stage").kernel_class(name) == kind


def test_what_is_right_passes_the_optimizers_check(gpu: ModuleType) -> None:
    script = importlib.import_module("gpu_stages.optimizers")
    n = 2 * 12 * 64 * 64  # weights in the matrices of the blocks
    masked = {"2:4": n // 2, "rigl": n // 2, "adamw-prune bitter0": None, "muon": None, "adamw-spam seed": None}
    masked |= dict.fromkeys(("normuon", "lion", "ademamix", "adamw-schedule-free"))
    assert script.check(CPU, "soap")["problems"] == []
    for name, count in masked.items():
        row = script.check(CPU, name)
        assert row["problems"] == [] and 0 < row["error"] < 1e-4, name
        if count is not None:
            assert row["masked"] == count
        elif name.startswith("adamw-prune"):
            assert 0.499 < row["masked"] / n < 0.5  # near the end of the ramp


def test_a_wrong_optimizer_and_wrong_masks_are_found(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    script = importlib.import_module("gpu_stages.optimizers")

    def wrong(model: torch.nn.Module, optim: Optim, seed: int) -> torch.optim.Optimizer:
        if next(model.parameters()).dtype is torch.float32:
            optim = optim.model_copy(update={"betas": (0.9, 0.96)})
        return make_optimizer(model, optim, seed)

    with monkeypatch.context() as patch:
        patch.setattr(script, "make_optimizer", wrong)
        assert "differ from float64's" in script.check(CPU, "adamw")["problems"][0]

    class Lazy(script.Pruner):  # type: ignore[name-defined,misc]
        def after_update(self, step: int) -> None:
            if next(iter(self.parameters.values())).dtype is not torch.float32:
                super().after_update(step)

    monkeypatch.setattr(script, "Pruner", Lazy)
    problems = script.check(CPU, "magnitude")["problems"]
    assert any("0 weights are masked, not" in problem for problem in problems)
    assert any("of the masks differ from float64's" in problem for problem in problems)


# -- all of it ------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # minutes
def test_all_stages_run_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--tiny", "--budget", "3000", "--out", str(tmp_path)]
    environment = {key: value for key, value in os.environ.items() if key != "GPTLAB_CUDA_TESTS"}

    def results() -> dict[str, Any]:
        subprocess.run(command, check=True, env={**environment, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
        content: dict[str, Any] = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
        return content

    content = results()
    stages = content["stages"]
    wrong = {
        f"{name}, {item}": row
        for name, stage in stages.items()
        for item, row in stage["items"].items()
        if row["status"] not in ("done", "not_applicable")
    }
    assert wrong == {} and {stage["status"] for stage in stages.values()} == {"done"}
    assert list(stages) == [
        "facts",
        "data",
        "correctness",
        "speed",
        "parts",
        "precision",
        "optimizers",
        "plan",
        "inference",
        "sparse24",
        "train",
    ]
    items = {name: stage["items"] for name, stage in stages.items()}
    assert sum(row["status"] == "done" for row in items["correctness"].values()) >= 30
    speed = items["speed"]["classic beside nanogpt-loop"]
    assert speed["loss"]["gptlab"] > 0 and len(speed["turns_seconds"]["nanogpt-loop"]) == 2
    kernel = "done" if importlib.util.find_spec("triton") else "not_applicable"
    assert {items["parts"][name]["status"] for name in ("head kernel", "head alone", "twelve layers")} == {kernel}
    assert items["parts"]["attention"]["status"] == "not_applicable"
    assert items["parts"]["bf16_master"]["on_is_faster_by"]["median"] > 0
    arms = load_study("precision-lm").arms
    assert set(items["precision"]) == {*arms, "kernels amp_bf16", "kernels bf16_master"}
    assert items["precision"]["fp32_tf32_matmul"]["status"] == "not_applicable"
    assert not items["precision"]["fp16_naive_foreach"]["finite"] and items["precision"]["bf16_pure"]["finite"]
    assert items["precision"]["fp32_baseline"]["x_fp32"] == 1
    for name, row in items["optimizers"].items():
        if "update_ms" in row:
            prunes = name.startswith(("magnitude", "movement", "rigl", "2:4", "adamw-prune"))
            assert row["update_ms"]["median"] > 0 and ("change_ms" in row) == prunes
            assert ("met" in row) == name.startswith(("adamw-spam", "adamw-prune"))
    assert items["optimizers"]["adamw"]["overhead_percent"] == {"median": 0, "min": 0, "max": 0}
    assert all(0.9 < row["planned_of_measured"] < 1.1 for row in items["plan"].values())
    assert items["inference"]["hellaswag fp32"]["real_rows"] is False
    size = items["sparse24"]["tiny"]
    assert size["memory"]["dense"] == size["memory"]["masked"] and set(size["prefill"]["2 x 64"]) == {"dense", "masked"}
    curve = items["train"]["curve"]
    assert curve["loss"][-1][1] < curve["loss"][0][1] and len(curve["val_loss"]) >= 10
    assert results()["stages"] == stages  # including times: nothing ran again
