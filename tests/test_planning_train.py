"""`gptlab train` asks the planner before it begins; and what the start of a run takes of the host's memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from conftest import tiny_recipe

import gptlab
from gptlab.cli import main
from gptlab.config import Recipe
from gptlab.errors import RunError
from gptlab.planning.memory import auto_micro_batch, step_memory
from gptlab.planning.resolve import resolve_recipe
from gptlab.rundir import RunDir

CPU = torch.device("cpu")


def peak_of(recipe: Recipe) -> float:
    micro_batch = recipe.batch.micro_batch
    assert isinstance(micro_batch, int)
    return step_memory(recipe, resolve_recipe(recipe, "cpu").shape, micro_batch, "cpu").peak


def free(size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = type("Memory", (), {"available": size, "total": 2 * size})()
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)


def test_a_run_that_cannot_fit_is_refused_at_step_0_with_the_way_out(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = {"model__dropout": 0.0, "batch__tokens_per_step": 32 * 64, "batch__micro_batch": 64, "train__max_steps": 2}
    recipe = tiny_recipe(dataset, **wide)
    asked = peak_of(recipe)
    free(0.5 * asked, monkeypatch)
    file, out = tmp_path / "wide.toml", tmp_path / "run"
    file.write_text(recipe.to_toml(), encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        main(["train", str(file), "--out", str(out)])
    assert end.value.code == 3
    result = RunDir.open(out).read_json("result.json")
    assert (result["status"], result["steps"], result["failed_at_step"]) == ("out_of_memory", 0, 0)
    assert (result["memory_asked_gb"], result["memory_free_gb"]) == (asked / 1e9, 0.5 * asked / 1e9)
    assert f"needs about {asked / 1e9:.3g} GB" in result["reason"] and result["reason"] in capsys.readouterr().out
    assert not (out / "checkpoints").exists() and not (out / "metrics.jsonl").exists()

    [flag] = [word for word in result["reason"].split() if word.isdigit()][-1:]  # --batch.micro-batch N fits
    assert gptlab.train(recipe.replace({"batch.micro_batch": int(flag)}), out, quiet=True).status == "completed"


@pytest.mark.parametrize(("over", "status"), [(1.1, "completed"), (1.2, "out_of_memory")])
def test_a_run_begins_up_to_15_percent_over(
    over: float, status: str, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe.replace({"train.max_steps": 2, "train.eval_every": 0})
    free(peak_of(recipe) / over, monkeypatch)
    assert gptlab.train(recipe, tmp_path, quiet=True).status == status


def test_a_run_that_is_there_is_left_as_it_is(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = gptlab.train(recipe.replace({"train.max_steps": 4}), tmp_path, quiet=True)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        free(1000, patch)
        assert gptlab.train(recipe.replace({"train.max_steps": 4}), tmp_path, quiet=True) == first  # nothing to do
        with pytest.raises(RunError, match="cannot continue here: it needs about"):
            gptlab.train(recipe, tmp_path, quiet=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert gptlab.train(recipe, tmp_path, quiet=True).steps == 24


def test_auto_takes_a_process_s_share_of_a_step_or_a_power_of_two(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(dataset, model__dropout=0.0, batch__micro_batch="auto", batch__tokens_per_step=32 * 21)
    found = resolve_recipe(recipe, "cpu")
    assert auto_micro_batch(found, CPU) == 21
    assert auto_micro_batch(found, CPU, 2) == 11
    enough = step_memory(recipe, found.shape, 12, "cpu").peak / 0.95
    free(2 * enough, monkeypatch)  # of which half is left alone
    assert auto_micro_batch(found, CPU) == 8
    free(1000, monkeypatch)
    assert auto_micro_batch(found, CPU) == 1
    monkeypatch.undo()
    long = recipe.replace({"batch.tokens_per_step": 32 * 600})
    assert auto_micro_batch(resolve_recipe(long, "cpu"), CPU) == 16384 // 32


# -- host memory at the start --------------------------------------------------------------------------------------

GPT2_XL = """
import json, sys
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from gptlab.config import build_recipe
from gptlab.machine import peak_memory_since as peak  # getrusage knows the peak of the process that started this one
from gptlab.model.gpt import build_model


recipe = build_recipe({"model.preset": "gpt2-xl", "model.vocab_size": 50304, "train.max_steps": 1})
"""

# A GPU's memory is not the host's. Where there is none, weights on the meta device stand in: each tensor that is to be
# copied to one is made in host memory all the same, and let go.
ELSEWHERE = """
copied = []

class Elsewhere(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default and args[0].device.type == "meta":
            copied.append(args[1].nbytes if args[1].device.type == "cpu" else 0)
        return func(*args, **(kwargs or {}))
"""


def child(code: str, *arguments: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print({name: round(value / 1e9, 2) for name, value in found.items()})
    return found


@pytest.mark.slow
def test_gpt2_xl_passes_through_host_memory_one_tensor_at_a_time() -> None:
    found = child(
        GPT2_XL
        + ELSEWHERE
        + """
with Elsewhere():
    model = build_model(recipe.model, "meta", init=0)
print(json.dumps({"peak": peak(), "copied": sum(copied), "largest": max(copied), "bytes": 4 * model.parameter_count()}))
"""
    )
    matrices = found["bytes"] - 4 * 1600 * (48 * (4 + 3 + 1 + 4 + 1) + 2)  # norms and biases are set where they are
    assert found["copied"] == matrices and found["largest"] == 4 * 50304 * 1600
    assert found["peak"] < 4e9  # with PyTorch


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gpt2_xl_on_a_cpu_takes_its_weights_and_one_gigabyte(dtype: str) -> None:
    if psutil.virtual_memory().available < 9e9:
        pytest.skip("less than 9 GB are free")
    found = child(
        GPT2_XL
        + f"""
model = build_model(recipe.model, "cpu", torch.{dtype}, init=0)
print(json.dumps({{"peak": peak(), "bytes": sum(p.nbytes for p in model.parameters())}}))
"""
    )
    assert found["peak"] < found["bytes"] + 1e9


@pytest.mark.slow
def test_gpt2_xl_of_a_checkpoint_passes_through_host_memory_one_tensor_at_a_time(tmp_path: Path) -> None:
    """Pages of the file are left out, which are mapped: the kernel takes them back when it needs them."""
    found = child(
        GPT2_XL
        + ELSEWHERE
        + """
import threading
from pathlib import Path
from gptlab.rundir import RunDir
from gptlab.training.checkpoint import write_safetensors
from gptlab.training.tensors import Saved, stored_weights

run, checkpoint = RunDir(sys.argv[1]), Path(sys.argv[1]) / "checkpoints/step-00000000"
checkpoint.mkdir(parents=True)
run.write_recipe(recipe)
with torch.device("meta"):
    parameters = dict(build_model(recipe.model, "meta", init=lambda model: None).named_parameters())
zeros = torch.zeros((), dtype=torch.bfloat16)
write_safetensors(checkpoint / "model.safetensors", {name: zeros.expand(p.shape) for name, p in parameters.items()})
written = peak()

most, done = 0, threading.Event()
def watch():
    global most
    while not done.wait(0.005):
        status = open("/proc/self/status").read().split("RssAnon:")[1]
        most = max(most, 1024 * int(status.split()[0]))
thread = threading.Thread(target=watch)
thread.start()
with Elsewhere():
    build_model(recipe.model, "meta", torch.bfloat16, init=stored_weights(Saved(checkpoint)))
done.set()
thread.join()
size = 2 * sum(p.numel() for p in parameters.values())
print(json.dumps({"peak": most, "written": written, "copied": sum(copied), "bytes": size}))
""",
        str(tmp_path / "run"),
    )
    assert found["copied"] == found["bytes"] > 3e9
    assert found["written"] < 2e9 and found["peak"] < 2e9
