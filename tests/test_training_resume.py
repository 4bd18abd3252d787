"""A run that was stopped, however it was, repeats the uninterrupted one bit for bit."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_recipe
from interrupted import killed_before
from safetensors.torch import load_file

from gptlab.config import Recipe
from gptlab.data.shards import Tokens
from gptlab.errors import RunError
from gptlab.model import matmul
from gptlab.rundir import RunDir
from gptlab.training import loop
from gptlab.training.checkpoint import Checkpoints, best_first, find_checkpoint, list_checkpoints, verify
from gptlab.training.job import open_job
from gptlab.training.loop import fit, train
from gptlab.training.outcome import result_of_run
from gptlab.training.result import Result
from gptlab.training.trainer import Trainer

MEASURED = ("step", "tokens", "loss", "lr", "grad_norm", "loss_scale", "val_loss", "train_eval_loss", "val_perplexity")


def measured(run: Path) -> list[dict[str, Any]]:
    """What must repeat of metrics.jsonl: everything but times and memory."""
    return [{key: line[key] for key in MEASURED if key in line} for line in RunDir(run).read_metrics()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(list_checkpoints(RunDir(run))[-1] / "model.safetensors")


def assert_same_run(one: Path, other: Path) -> None:
    assert measured(one) == measured(other)
    assert weights(one).keys() == weights(other).keys()
    for name, tensor in weights(one).items():
        assert torch.equal(tensor, weights(other)[name]), name


def train_until(recipe: Recipe, out: Path, step: int) -> Result:
    """Train, asked to stop when update `step` is done, as a signal asks."""
    with open_job(recipe, out, "auto", quiet=True) as job, Trainer(job) as trainer:
        job.signal = lambda: trainer.state.step > step  # type: ignore[assignment]
        fit(trainer)
        return job.finish(result_of_run(trainer))


@pytest.mark.parametrize(
    "regime",
    ["fp32", *(pytest.param(name, marks=pytest.mark.slow) for name in ("amp_bf16", "bf16_pure", "bf16_master"))],
)
def test_interrupted_and_resumed_is_the_uninterrupted_run(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, regime: str
) -> None:
    if torch.backends.mkldnn.is_available():  # as on a processor that is not Intel's, at any size
        monkeypatch.setattr(matmul, "ONEDNN", True)
        monkeypatch.setattr(matmul, "SMALLEST", 1)
    recipe = tiny_recipe(dataset, precision__regime=regime)
    assert train(recipe, tmp_path / "whole", quiet=True).status == "completed"
    for step in (0, 9, 17):  # before the first update, between checkpoints, where an evaluation is due next
        result = train_until(recipe, tmp_path / "pieces", step)
        assert (result.status, result.steps) == ("interrupted", step + 1)
        assert json.loads((tmp_path / "pieces/result.json").read_text(encoding="utf-8"))["status"] == "interrupted"
    assert train(recipe, tmp_path / "pieces", quiet=True).status == "completed"
    assert_same_run(tmp_path / "whole", tmp_path / "pieces")


def test_killed_before_the_first_checkpoint_it_starts_over(dataset: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(dataset, train__max_steps=6)
    train(recipe, tmp_path / "whole", quiet=True)
    train(recipe, tmp_path / "pieces", quiet=True)
    shutil.rmtree(tmp_path / "pieces/checkpoints")
    (tmp_path / "pieces/result.json").unlink()
    train(recipe, tmp_path / "pieces", quiet=True)
    assert_same_run(tmp_path / "whole", tmp_path / "pieces")


def test_what_a_kill_while_saving_leaves_is_no_checkpoint(dataset: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(dataset, train__max_steps=12, schedule__decay_steps=24)
    train(recipe, tmp_path / "run", quiet=True)
    train(tiny_recipe(dataset), tmp_path / "whole", quiet=True)
    checkpoints = tmp_path / "run/checkpoints"
    whole = list_checkpoints(RunDir(tmp_path / "run"))[-1]
    shutil.copytree(whole, checkpoints / ".step-00000016")  # not renamed yet: hidden, however much is in it
    shutil.copytree(whole, checkpoints / "step-00000014")
    (checkpoints / "step-00000014/manifest.json").unlink()  # what goes first when an old one is removed
    train(tiny_recipe(dataset, schedule__decay_steps=24), tmp_path / "run", quiet=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert sorted(checkpoints.iterdir()) == list_checkpoints(RunDir(tmp_path / "run"))


@contextlib.contextmanager
def stop_in_second_evaluation() -> Iterator[None]:
    """SIGTERM in the middle of it."""
    original, calls = Tokens.gather, []

    def gather(self: Any, starts: Any, length: int) -> Any:
        if sys._getframe(1).f_code.co_name == "_padded":  # asked for by an evaluation
            calls.append(1)
            if len(calls) == 20:
                os.kill(os.getpid(), signal.SIGTERM)
        return original(self, starts, length)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tokens, "gather", gather)
        yield


def test_a_stop_during_evaluation_evaluates_there_again(dataset: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(dataset)
    train(recipe, tmp_path / "whole", quiet=True)
    with stop_in_second_evaluation():
        result = train(recipe, tmp_path / "pieces", quiet=True)
    assert result.status == "interrupted"
    assert result.steps == 6
    with killed_before(1, (loop, "update")):  # a process that evaluates, and is gone before the next checkpoint
        train(recipe, tmp_path / "pieces", quiet=True)
    assert [line["step"] for line in RunDir(tmp_path / "pieces").read_metrics() if "val_loss" in line] == [0, 6]
    assert train(recipe, tmp_path / "pieces", quiet=True).status == "completed"
    assert_same_run(tmp_path / "whole", tmp_path / "pieces")


@pytest.mark.parametrize(("every", "evaluated"), [(8, [0, 8, 13]), (5, [0, 8, 10, 13])])
def test_a_stop_during_the_last_evaluation_and_a_longer_limit(
    every: int, evaluated: list[int], dataset: Path, tmp_path: Path
) -> None:
    """The last evaluation of the shorter run is there once, whether the longer one is to evaluate there or not."""
    recipe = tiny_recipe(dataset, train__max_steps=8, train__eval_every=8, schedule__decay_steps=24)
    with stop_in_second_evaluation():
        result = train(recipe, tmp_path / "run", quiet=True)
    assert (result.status, result.steps) == ("interrupted", 8)
    assert train(recipe, tmp_path / "run", quiet=True).status == "completed"
    train(recipe.replace({"train.max_steps": 13, "train.eval_every": every}), tmp_path / "run", quiet=True)
    assert [line["step"] for line in RunDir(tmp_path / "run").read_metrics() if "val_loss" in line] == evaluated


def test_evaluating_every_step_and_never_train_alike(dataset: Path, tmp_path: Path) -> None:
    losses = []
    for every in (0, 1):
        train(tiny_recipe(dataset, train__eval_every=every), tmp_path / str(every), quiet=True)
        losses.append([line["loss"] for line in measured(tmp_path / str(every)) if "loss" in line])
        evaluations = [line["step"] for line in measured(tmp_path / str(every)) if "val_loss" in line]
        assert evaluations == (list(range(25)) if every else [0, 24])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 24


def test_a_longer_limit_does_not_bend_the_curve(dataset: Path, tmp_path: Path) -> None:
    short = tiny_recipe(dataset, train__max_steps=12)
    train(short, tmp_path / "run", quiet=True)
    before = [line for line in measured(tmp_path / "run") if "loss" in line]
    assert train(tiny_recipe(dataset, train__max_steps=18), tmp_path / "run", quiet=True).steps == 18
    after = [line for line in measured(tmp_path / "run") if "loss" in line]
    assert after[:12] == before
    assert [line["lr"] for line in after[12:]] == [1e-3] * 6  # decay_steps was frozen at 12
    assert RunDir(tmp_path / "run").read_recipe().schedule.decay_steps == 12


def test_the_micro_batch_may_change_and_other_settings_may_not(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(tiny_recipe(dataset, train__max_steps=6), out, quiet=True)
    with pytest.raises(RunError, match=r"other settings: optim.lr \(0.01 then, 0.02 now\)"):
        train(tiny_recipe(dataset, train__max_steps=12, optim__lr=0.02), out, quiet=True)
    with pytest.raises(RunError, match=r"seed \(1337 then, 7 now\)"):
        train(tiny_recipe(dataset), out, seed=7, quiet=True)
    with pytest.raises(RunError, match="already has a run in it"):
        train(tiny_recipe(dataset), out, resume="never", quiet=True)
    train(tiny_recipe(dataset, train__max_steps=12, batch__micro_batch=8), out, quiet=True)
    train(tiny_recipe(dataset, train__max_steps=12, schedule__decay_steps=6), tmp_path / "other", quiet=True)
    ours, theirs = ([line["loss"] for line in measured(p) if "loss" in line] for p in (out, tmp_path / "other"))
    # the same batches in other pieces; dropout falls elsewhere, so only near
    assert ours[:6] == theirs[:6]
    assert ours[6:] == pytest.approx(theirs[6:], rel=0.1)


def test_a_resumed_run_keeps_the_micro_batch_that_auto_found(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for steps, found in ((6, 2), (12, 4)):
        monkeypatch.setattr("gptlab.training.setup.auto_micro_batch", lambda *_, found=found: found)
        recipe = tiny_recipe(dataset, train__max_steps=steps, batch__micro_batch="auto")
        train(recipe, tmp_path, quiet=True)
        assert RunDir(tmp_path).read_recipe().batch.micro_batch == 2


def test_the_last_step_is_evaluated_where_only_hellaswag_was_due(dataset: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    row = {"ind": 0, "ctx": "the cat", "endings": ["sat", "ran", "saw", "had"], "label": 0}
    rows.write_text(json.dumps(row) + "\n", encoding="utf-8")
    changes = {"train__eval_every": 0, "hellaswag__every": 4, "hellaswag__path": str(rows), "schedule__decay_steps": 24}
    direct = train(tiny_recipe(dataset, train__max_steps=4, **changes), tmp_path / "direct", quiet=True)
    train(tiny_recipe(dataset, train__max_steps=6, **changes), tmp_path / "run", quiet=True)
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000006")  # as if it had been killed after step 4
    (tmp_path / "run/result.json").unlink()
    result = train(tiny_recipe(dataset, train__max_steps=4, **changes), tmp_path / "run", quiet=True)
    assert result.final_val_loss == direct.final_val_loss


def test_a_finished_run_is_answered_and_not_touched(dataset: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(dataset, train__max_steps=4)
    first = train(recipe, tmp_path, quiet=True)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert train(recipe, tmp_path, quiet=True) == first
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(dataset: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(dataset)
    train(recipe, tmp_path / "whole", quiet=True)
    run = RunDir(tmp_path / "run")
    train(recipe.replace({"train.max_steps": 12, "schedule.decay_steps": 24}), run.path, quiet=True)
    newest = list_checkpoints(run)[-1]
    content = bytearray((newest / "model.safetensors").read_bytes())
    content[-1] ^= 1  # one bit
    (newest / "model.safetensors").write_bytes(content)
    assert find_checkpoint(run) == list_checkpoints(run)[-2]
    with pytest.raises(RunError, match="damaged: model.safetensors is not what was written"):
        find_checkpoint(run, "12")
    assert train(recipe.replace({"schedule.decay_steps": 24}), run.path, quiet=True).status == "completed"
    assert_same_run(tmp_path / "whole", run.path)
    for path in list_checkpoints(run):
        (path / "training.json").write_text("{}", encoding="utf-8")
    with pytest.raises(RunError, match="damaged"):
        train(recipe.replace({"schedule.decay_steps": 24, "train.max_steps": 30}), run.path, quiet=True)


def test_the_last_checkpoints_and_the_best_are_kept(dataset: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    train(tiny_recipe(dataset, checkpoint__every=6, checkpoint__keep_last=1, optim__lr=1e-2), tmp_path, quiet=True)
    losses = {line["step"]: line["val_loss"] for line in measured(tmp_path) if "val_loss" in line and line["step"]}
    best = min(losses, key=lambda step: losses[step])
    kept = {int(path.name.removeprefix("step-")) for path in list_checkpoints(run)}
    assert kept == {24, best}
    assert find_checkpoint(run, "best").name == f"step-{best:08d}"
    assert best_first(list_checkpoints(run))[0].name == f"step-{best:08d}"
    with pytest.raises(RunError, match=r"has no checkpoint 7: last, best or one of"):
        find_checkpoint(run, "7")


def test_a_checkpoint_is_a_copy_of_the_moment_it_was_asked_for(tmp_path: Path) -> None:
    model = torch.nn.Linear(300, 300)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    checkpoints = Checkpoints(RunDir(tmp_path), keep_last=1, keep_best=False)
    before = model.weight.detach().clone()
    checkpoints.save(model, optimizer, {"step": 1})
    with torch.no_grad():
        model.weight.zero_()  # training goes on while the thread writes
    checkpoints.wait()
    assert torch.equal(load_file(tmp_path / "checkpoints/step-00000001/model.safetensors")["weight"], before)


def test_a_checkpoint_that_cannot_be_written_is_an_error_and_not_a_silence(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 3)
    (tmp_path / "checkpoints").write_text("a file where the folder should be", encoding="utf-8")
    checkpoints = Checkpoints(RunDir(tmp_path), keep_last=1, keep_best=False)
    checkpoints.save(model, None, {"step": 1})
    with pytest.raises(OSError):
        checkpoints.wait()


def test_two_processes_do_not_train_one_run(recipe: Recipe, tmp_path: Path) -> None:
    with RunDir(tmp_path).lock(), pytest.raises(RunError, match="is being trained by another process"):
        train(recipe, tmp_path, quiet=True)


# -- kills


def start(recipe_file: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "gptlab", "train", str(recipe_file), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "kills"),
    [
        ({}, 14),
        # on a CPU float16 multiplies slowly, so this one is small; its scaler grows and backs off on the way
        ({"precision__regime": "amp_fp16", "model__n_layer": 1, "model__n_embd": 16, "model__block_size": 16}, 6),
        pytest.param({"compile__enabled": True, "train__deterministic": True}, 3, marks=pytest.mark.compiles),
    ],
)
def test_killed_at_random_moments(dataset: Path, tmp_path: Path, changes: dict[str, Any], kills: int) -> None:
    """SIGKILL again and again, while saving too: a checkpoint is written every second step."""
    recipe = tiny_recipe(dataset, train__max_steps=400, checkpoint__every=2, train__eval_every=50, **changes)
    recipe_file = tmp_path / "recipe.toml"
    recipe_file.write_text(recipe.to_toml(), encoding="utf-8")
    whole = start(recipe_file, tmp_path / "whole")
    began = time.monotonic()
    assert whole.wait() == 0, whole.stderr.read()
    took = time.monotonic() - began
    draw, done = random.Random(0), 0
    while done < kills:
        process = start(recipe_file, tmp_path / "pieces")
        metrics = tmp_path / "pieces/metrics.jsonl"
        size = metrics.stat().st_size if metrics.exists() else 0
        while process.poll() is None and (metrics.stat().st_size if metrics.exists() else 0) == size:
            time.sleep(0.01)  # until it trains
        time.sleep(draw.uniform(0, took / kills / 3))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            done += 1
        process.wait()
        assert process.returncode in (0, -signal.SIGKILL), process.stderr.read()
        if process.returncode == 0:
            break
    last = start(recipe_file, tmp_path / "pieces")
    assert last.wait() == 0, last.stderr.read()
    assert done >= min(kills, 3)
    assert_same_run(tmp_path / "whole", tmp_path / "pieces")
    for path in list_checkpoints(RunDir(tmp_path / "pieces")):
        verify(path)
    assert not list((tmp_path / "pieces/checkpoints").glob(".step-*"))


def test_sigterm_and_ctrl_c_save_and_end_as_interrupted(dataset: Path, tmp_path: Path) -> None:
    recipe_file = tmp_path / "recipe.toml"
    recipe_file.write_text(tiny_recipe(dataset, train__max_steps=100_000).to_toml(), encoding="utf-8")
    for number in (signal.SIGTERM, signal.SIGINT):
        process = start(recipe_file, tmp_path / "run")
        metrics = tmp_path / "run/metrics.jsonl"
        size = metrics.stat().st_size if metrics.exists() else 0
        while process.poll() is None and (metrics.stat().st_size if metrics.exists() else 0) < size + 1000:
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait() == 4
        result = RunDir(tmp_path / "run").read_json("result.json")
        assert result["status"] == "interrupted"
        assert int(list_checkpoints(RunDir(tmp_path / "run"))[-1].name.removeprefix("step-")) == result["steps"]
