"""Starts that are refused pin nothing, and a run that goes on is the same run everywhere."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_recipe

from gptlab.config import Recipe, build_recipe
from gptlab.errors import NotApplicable, RunError, UserError
from gptlab.optim.schedule import learning_rate
from gptlab.rundir import RunDir
from gptlab.training.checkpoint import Checkpoints, best_first, final_sparsity_step, find_checkpoint, list_checkpoints
from gptlab.training.loop import train
from gptlab.training.setup import idle_steps
from gptlab.training.trainer import Trainer


@pytest.fixture
def small(dataset: Path) -> Recipe:
    return tiny_recipe(dataset, train__max_steps=2, train__eval_every=0, model__n_layer=1)


def refuse(error: Exception, monkeypatch: pytest.MonkeyPatch, recipe: Recipe, out: Path) -> None:
    """A start that ends like this before the first update."""

    def step(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("gptlab.training.loop.update", step)
        try:
            train(recipe, out, quiet=True)
        except type(error) as raised:
            assert raised is error


@pytest.mark.parametrize(
    "error",
    [NotApplicable("not here"), torch.OutOfMemoryError("out of memory"), RuntimeError("a fault"), UserError("no")],
    ids=lambda error: type(error).__name__,
)
def test_a_run_that_never_took_a_step_takes_other_settings(
    error: Exception, small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(error, monkeypatch, small, tmp_path / "run")
    assert RunDir(tmp_path / "run").exists()
    other = small.replace({"optim.lr": 2e-2, "train.max_steps": 4})
    result = train(other, tmp_path / "run", resume="never", quiet=True)
    assert (result.status, result.steps) == ("completed", 4)
    stored = RunDir(tmp_path / "run").read_recipe()
    assert (stored.optim.lr, stored.schedule.decay_steps) == (2e-2, 4)
    train(other, tmp_path / "alone", quiet=True)
    losses = [[line.get("loss") for line in RunDir(tmp_path / name).read_metrics()] for name in ("run", "alone")]
    assert losses[0] == losses[1]
    with pytest.raises(RunError, match="other settings: optim.lr"):  # it took steps
        train(small, tmp_path / "run", quiet=True)


def test_the_recipe_beside_a_refused_start_is_of_that_start(
    small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for lr in (1e-3, 2e-3):
        refuse(NotApplicable("not here"), monkeypatch, small.replace({"optim.lr": lr}), tmp_path)
        assert RunDir(tmp_path).read_recipe().optim.lr == lr
        assert RunDir(tmp_path).read_json("result.json")["status"] == "not_applicable"


def test_a_run_that_took_a_step_and_has_no_checkpoint_keeps_its_settings(
    small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(trainer: Trainer) -> None:
        raise RuntimeError("a disk fault")

    monkeypatch.setattr(Trainer, "save", fail)
    with pytest.raises(RuntimeError, match="a disk fault"):
        train(small, tmp_path, quiet=True)
    assert not list_checkpoints(RunDir(tmp_path))
    with pytest.raises(RunError, match="other settings: optim.lr"):
        train(small.replace({"optim.lr": 2e-2}), tmp_path, quiet=True)


@pytest.mark.parametrize(("package", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_missing_package_is_a_sentence_and_leaves_nothing(
    package: str, module: str, small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"log.to = {package}: {package} cannot be imported .*pip install {package}"):
        train(small.replace({"log.to": [package]}), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


# -- a longer limit


@pytest.mark.parametrize("shape", ["cosine", "linear", "wsd", "wsd-sqrt", "constant"])
def test_the_steps_at_rate_0_are_those_that_the_schedule_says(shape: str, small: Recipe) -> None:
    changes = {"schedule.shape": shape, "schedule.warmup_steps": 0, "schedule.decay_steps": 4}
    for floor in (0.0, 1e-4):
        recipe = small.replace({**changes, "schedule.min_lr": floor})
        for limit in (3, 4, 5, 9):
            rates = [learning_rate(step, recipe.optim.lr, recipe.schedule) for step in range(limit)]
            idle = [step + 1 for step, rate in enumerate(rates) if rate == 0]
            says = f"steps {idle[0]} to {idle[-1]} train at learning rate 0" if idle else ""
            assert idle_steps(recipe, limit).partition(",")[0] == says


def test_a_longer_limit_that_would_train_at_rate_0_is_refused(small: Recipe, tmp_path: Path) -> None:
    small = small.replace({"schedule.min_lr": 0.0, "schedule.warmup_steps": 0})
    train(small, tmp_path / "run", quiet=True)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(RunError) as refused:
        train(small.replace({"train.max_steps": 6}), tmp_path / "run", quiet=True)
    assert str(refused.value) == (
        f"{tmp_path / 'run'}: steps 3 to 6 train at learning rate 0, as schedule.decay_steps = 2 and schedule.min_lr = "
        f"0. A new run can start from its weights (--train.init-from {tmp_path / 'run'} --out DIR), or train 6 steps "
        "from the beginning (--schedule.decay-steps 6 --out DIR)"
    )
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert train(small, tmp_path / "run", quiet=True).steps == 2
    # the two ways out
    again = small.replace({"train.init_from": str(tmp_path / "run")})
    assert train(again, tmp_path / "on", quiet=True).status == "completed"
    anew = small.replace({"train.max_steps": 6, "schedule.decay_steps": 6})
    assert train(anew, tmp_path / "anew", quiet=True).status == "completed"


def test_steps_at_rate_0_that_were_asked_for_are_said_and_resumed(
    small: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = small.replace({"train.max_steps": 4, "schedule.decay_steps": 2, "schedule.min_lr": 0.0})
    assert train(small, tmp_path / "run").status == "completed"
    says = "steps 3 to 4 train at learning rate 0, as schedule.decay_steps = 2 and schedule.min_lr = 0"
    assert says in capsys.readouterr().err
    assert train(small.replace({"train.max_steps": 2}), tmp_path / "other").status == "completed"
    assert "learning rate 0" not in capsys.readouterr().err
    (tmp_path / "run/result.json").unlink()  # as if it had been killed
    assert train(small, tmp_path / "run", quiet=True).status == "completed"


# -- one run in other tools


def test_a_resumed_run_is_one_run_in_wandb(small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def init(**settings: Any) -> SimpleNamespace:
        asked.append(settings)
        return SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    small = small.replace({"log.to": ["wandb"]})
    for steps in (2, 3):
        train(small.replace({"train.max_steps": steps}), tmp_path / "run", quiet=True)
    train(small, tmp_path / "other", quiet=True)
    first, second, other = asked
    assert first["id"] == second["id"] == RunDir(tmp_path / "run").read_id() != other["id"]
    assert {settings["resume"] for settings in asked} == {"allow"}

    def fails(**settings: Any) -> None:
        raise ConnectionError("api.wandb.ai does not answer\nand more")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=fails))
    with pytest.raises(UserError, match="log.to = wandb: api.wandb.ai does not answer; WANDB_MODE=offline"):
        train(small, tmp_path / "third", quiet=True)


def test_tensorboard_forgets_what_came_after_the_checkpoint(small: Recipe, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    small = small.replace({"log.to": ["tensorboard"], "train.eval_every": 1, "checkpoint.every": 2})
    train(small.replace({"train.max_steps": 3}), tmp_path, quiet=True)
    newest = list_checkpoints(RunDir(tmp_path))[-1]
    assert newest.name == "step-00000003"
    (newest / "manifest.json").unlink()  # as if it had been killed after step 3, before the checkpoint
    (tmp_path / "result.json").unlink()
    train(small.replace({"train.max_steps": 5}), tmp_path, quiet=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5]
    assert [event.step for event in events.Scalars("val/loss")] == [0, 1, 2, 3, 4, 5]


# -- the best checkpoint of a pruned run


def test_the_best_of_a_pruned_run_is_at_its_final_sparsity(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pruned = {"method": "magnitude", "begin": 0.0, "end": 0.5}
    recipe = build_recipe(
        {"name": "pruned", "train": {"max_steps": 8}, "schedule": {"decay_steps": 8}, "sparsity": pruned}
    )
    assert final_sparsity_step(recipe) == 4
    for method, step in (("2:4", 0), ("rigl", 0), ("none", 0), ("state", 4), ("movement", 4)):
        changed = {"sparsity.method": method, **({"optim.name": "adamw-prune"} if method == "state" else {})}
        assert final_sparsity_step(recipe.replace(changed)) == step
    run, model = RunDir(tmp_path), torch.nn.Linear(2, 2)
    run.write_recipe(recipe)
    checkpoints = Checkpoints(run, 1, keep_best=True, final_step=4)
    for step, loss, best in ((1, 3.0, 1), (2, 2.0, 2), (3, 2.5, 2), (4, 2.9, 4), (5, 3.1, 4), (6, 2.8, 6)):
        checkpoints.save(model, None, {"step": step, "val_loss": loss})
        checkpoints.wait()
        assert find_checkpoint(run, "best").name == best_first(list_checkpoints(run), 4)[0].name == f"step-{best:08d}"
        says = f"step-{best:08d} is the best checkpoint, and not at the final sparsity, which begins at 4\n"
        assert capsys.readouterr().err == (says if best < 4 else "")
    assert json.loads((find_checkpoint(run, "best") / "training.json").read_text(encoding="utf-8"))["val_loss"] == 2.8
