"""Logs of other tools: what they wrote is read back equal, NaN and infinity included, and damage is one sentence."""

import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign_logs import (
    Rows,
    message,
    wandb_items,
    wandb_log,
    wandb_records,
    write_mlflow,
    write_mlflow_sqlite,
    write_trackio,
    write_wandb,
)

from gptlab.errors import UserError
from gptlab.logs import mlflow, tensorboard, trackio, trainer, wandb
from gptlab.logs.run import How, LogRun

NAMED = How(arm="arm", seed="seed")
SETTINGS = {"arm": "a", "seed": 3, "optim": {"lr": 0.1}}
ROWS: Rows = [
    (step, {"train/loss": 3 / step} | ({"val_loss": 1 / 3 / step} if step % 5 == 0 else {})) for step in range(1, 11)
]
ROWS += [(11, {"val_loss": math.nan}), (12, {"val_loss": math.inf}), (13, {"val_loss": -math.inf, "train/loss": 0.1})]
NOT_ROOT = pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may read everything")


def expected(rows: Rows, name: str, kind: type = float) -> list[tuple[int, float]]:
    return [(step, float(kind(row[name]))) for step, row in rows if name in row]


def same(run: LogRun, rows: Rows, kind: type = float) -> None:
    """The run has these metrics and no others, equal to the last bit."""
    assert set(run.curves) == {name for _, row in rows for name in row}
    for name, (steps, values) in run.curves.items():
        wanted = expected(rows, name, kind)
        np.testing.assert_array_equal(steps, [step for step, _ in wanted])
        np.testing.assert_array_equal(values, [value for _, value in wanted])


def one(runs: list[LogRun]) -> LogRun:
    assert len(runs) == 1
    return runs[0]


# -- Hugging Face's Trainer -----------------------------------------------------------------------------------------


def write_state(folder: Path, steps: int, most: int = 8, ended: bool = False, offset: float = 0.0) -> None:
    history: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        history.append({"epoch": step / 16, "learning_rate": 0.01 / step, "loss": 3 / step + offset, "step": step})
        if step % 2 == 0:
            loss = math.nan if step == 6 else math.inf if step == 8 else 1 / step
            history.append({"epoch": step / 16, "eval_loss": loss, "eval_runtime": 0.1, "step": step})
    if ended:
        history.append({"epoch": 0.5, "step": steps, "total_flos": 1.5, "train_loss": 2.5, "train_runtime": 0.0786})
    control = {"args": {"should_training_stop": steps == most}, "attributes": {}}
    state = {"best_metric": None, "global_step": steps, "log_history": history, "max_steps": most}
    state |= {"stateful_callbacks": {"TrainerControl": control}, "trial_params": None, "train_batch_size": 4}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps(state, indent=2))


def test_trainer_state(tmp_path: Path) -> None:
    run = tmp_path / "wide-1"
    write_state(run / "checkpoint-4", 4)
    write_state(run / "checkpoint-8", 8)
    (run / "checkpoint-8" / "config.json").write_text('{"n_layer": 1, "nested": {"a": 2}}')
    assert trainer.is_mine(run) and not trainer.is_mine(tmp_path)
    read = one(trainer.read(run, How()))
    assert (read.name, read.status, read.form, read.source) == ("wide-1", "completed", "trainer_state", run)
    assert read.curves["loss"][1].tolist() == [3 / step for step in range(1, 9)]
    np.testing.assert_array_equal(read.curves["eval_loss"], [[2, 4, 6, 8], [1 / 2, 1 / 4, math.nan, math.inf]])
    assert read.settings == {"max_steps": 8, "train_batch_size": 4, "config.n_layer": 1, "config.nested.a": 2}

    (run / "args.json").write_text('{"seed": 7, "recipe": "wide", "optim": {"lr": 0.1}}')
    assert one(trainer.read(run, How(seed="seed"))).seed == 7
    write_state(run, 8, ended=True)
    ended = one(trainer.read(run, How(arm="recipe", seed="seed")))
    assert (ended.arm, ended.seed, ended.settings["optim.lr"]) == ("wide", 7, 0.1)
    assert ended.result == {"epoch": 0.5, "total_flos": 1.5, "train_loss": 2.5, "train_runtime": 0.0786}
    assert "train_loss" not in ended.curves and len(ended.curves["loss"][0]) == 8
    by_file = one(trainer.read(run / "trainer_state.json", How()))
    assert by_file.name == "wide-1" and by_file.status == "completed"
    assert one(trainer.read(run / "checkpoint-4", How())).name == "wide-1"


@pytest.mark.parametrize(
    ("own", "checkpoint", "steps", "status"),
    [
        ("", "4 of 8", 4, "unfinished"),
        ("ended 6 of 6", "8 of 8", 8, "completed"),  # what both have holds a NaN
        ("ended 6 of 8", "4 of 8", 6, "completed"),  # stopped early
        ("ended 4 of 4", "8 of 8", 8, "completed"),  # resumed, and killed before its end
        ("ended 4 of 4", "6 of 8", 6, "unfinished"),
        ("ended 4 of 4", "other 8 of 8", 4, "completed"),  # an earlier training left the checkpoint
    ],
)
def test_the_newest_state_counts(tmp_path: Path, own: str, checkpoint: str, steps: int, status: str) -> None:
    def write(folder: Path, said: str) -> int:
        how, _, numbers = said.rpartition(" of ")[0].rpartition(" ")
        done = int(numbers)
        write_state(folder, done, int(said[-1]), "ended" in how, 0.5 if "other" in how else 0.0)
        return done

    if own:
        write(tmp_path, own)
    done = int(checkpoint.removeprefix("other ")[0])
    write(tmp_path / f"checkpoint-{done}", checkpoint)
    read = one(trainer.read(tmp_path, How()))
    assert (len(read.curves["loss"][0]), read.status) == (steps, status)
    assert bool(read.remarks) == ("other" in checkpoint)


def test_a_state_may_lack_what_is_null(tmp_path: Path) -> None:
    write_state(tmp_path / "checkpoint-4", 4)
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    state |= {"global_step": None, "max_steps": None, "log_history": state["log_history"][:1]}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    assert len(one(trainer.read(tmp_path, How())).curves["loss"][0]) == 4


def test_a_run_that_was_killed_while_it_saved(tmp_path: Path) -> None:
    write_state(tmp_path / "checkpoint-4", 4)
    write_state(tmp_path / "checkpoint-8", 8)
    half = tmp_path / "checkpoint-8" / "trainer_state.json"
    half.write_text(half.read_text()[:700])
    read = one(trainer.read(tmp_path, How()))
    assert (len(read.curves["loss"][0]), read.status) == (4, "unfinished")
    assert read.remarks[0].startswith(f"{half} is damaged")


@pytest.mark.slow
def test_a_real_trainer(tmp_path: Path) -> None:
    """Two seeds of a tiny model; both of the files that the Trainer leaves hold what its own history does."""
    import torch

    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("tensorboard")
    transformers.logging.set_verbosity_error()

    class Data(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 64

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            ids = torch.arange(8) * (index + 1) % 32
            return {"input_ids": ids, "labels": ids}

    class Diverges(transformers.Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            return loss * math.nan if self.state.global_step == 6 and self.model.training else loss

    for seed in (0, 1):
        config = transformers.GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=32, n_positions=8)
        folder = tmp_path / f"base-{seed}"
        arguments = transformers.TrainingArguments(
            output_dir=str(folder), seed=seed, max_steps=8, logging_steps=1, eval_strategy="steps", eval_steps=2,
            save_steps=4, use_cpu=True, report_to="tensorboard", disable_tqdm=True, logging_nan_inf_filter=False,
        )  # fmt: skip
        torch.manual_seed(seed)
        model = transformers.GPT2LMHeadModel(config)
        trained = Diverges(model=model, args=arguments, train_dataset=Data(), eval_dataset=Data())
        trained.train()
        if seed:
            trained.save_state()
        read = one(trainer.read(folder, How()))
        assert read.name == folder.name and read.status == "completed"
        for name in ("loss", "eval_loss", "grad_norm", "learning_rate"):
            wanted = [(line["step"], line[name]) for line in trained.state.log_history if name in line]
            np.testing.assert_array_equal(np.transpose(read.curves[name]), wanted)
        assert math.isnan(read.curves["loss"][1][6])
        assert ("train_runtime" in read.result) == bool(seed)
        assert read.settings["max_steps"] == 8

        [events] = (folder / "runs").iterdir()
        seen = one(tensorboard.read(events, How(seed="seed")))
        assert seen.seed == seed and seen.name == folder.name and seen.settings["config.n_layer"] == 1
        for name, theirs in (("loss", "train/loss"), ("eval_loss", "eval/loss")):
            steps, values = read.curves[name]
            np.testing.assert_array_equal(seen.curves[theirs], [steps, np.float32(values)])


# -- TensorBoard ----------------------------------------------------------------------------------------------------


@pytest.fixture
def writer() -> Callable[..., Any]:
    """PyTorch's writer of events. Files that one process opens within a second are told apart by their numbers."""
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter


def log(opened: Any, rows: Rows, **how: Any) -> None:
    for step, row in rows:
        for name, value in row.items():
            opened.add_scalar(name, value, step, **how)
    opened.close()


def test_tensorboard(tmp_path: Path, writer: Callable[..., Any]) -> None:
    log(writer(str(tmp_path / "plain-0")), ROWS)
    assert tensorboard.is_mine(tmp_path / "plain-0") and not tensorboard.is_mine(tmp_path)
    run = one(tensorboard.read(tmp_path / "plain-0", How()))
    assert (run.name, run.status, run.remarks) == ("plain-0", "completed", [])
    same(run, ROWS, np.float32)
    [file] = (tmp_path / "plain-0").iterdir()
    assert tensorboard.is_mine(file)
    by_file = one(tensorboard.read(file, How()))
    assert by_file.name == "plain-0"
    same(by_file, ROWS, np.float32)
    log(writer(str(tmp_path / "tensors-0")), ROWS, new_style=True)
    same(one(tensorboard.read(tmp_path / "tensors-0", How())), ROWS, np.float32)
    log(writer(str(tmp_path / "double-0")), ROWS, new_style=True, double_precision=True)
    same(one(tensorboard.read(tmp_path / "double-0", How())), ROWS)
    assert {run.name for run in tensorboard.read(tmp_path, How())} == {"plain-0", "tensors-0", "double-0"}


def test_a_tag_may_be_empty(tmp_path: Path, writer: Callable[..., Any]) -> None:
    rows: Rows = [(step, {"": 1.0 * step, "loss": 2.0}) for step in range(4)]
    log(writer(str(tmp_path)), rows)
    same(one(tensorboard.read(tmp_path, How())), rows)


def test_event_files_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    names = [f"events.out.tfevents.1700000000.host.7.{i}" for i in (9, 10, 11)]
    for name in reversed(names):
        (tmp_path / name).touch()
    assert [file.name for file in tensorboard._files(tmp_path)] == names


@pytest.mark.parametrize("purge", [None, 5])
def test_a_resumed_run_of_tensorboard_goes_back(tmp_path: Path, writer: Callable[..., Any], purge: int | None) -> None:
    first: Rows = [(step, {"loss": 1.0 * step, "val": 2.0 * step}) for step in range(1, 9)]
    again: Rows = [(step, {"loss": 10.0 * step}) for step in range(5, 8)]
    log(writer(str(tmp_path)), first)
    log(writer(str(tmp_path), purge_step=purge), again)
    run = one(tensorboard.read(tmp_path, How()))
    np.testing.assert_array_equal(run.curves["loss"], [[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 50, 60, 70]])
    assert run.curves["val"][0].tolist() == ([1, 2, 3, 4] if purge else [1, 2, 3, 4, 5, 6, 7, 8])
    [remark] = run.remarks or ["none"]
    assert remark == "none" if purge else "goes back to step 5 of loss and ends at 7, before the 8" in remark


def test_what_a_run_writes_to_folders_below_it(tmp_path: Path, writer: Callable[..., Any]) -> None:
    opened = writer(str(tmp_path / "run-2"))
    opened.add_scalar("loss", 0.5, 1)
    opened.add_scalars("train/losses", {"a": 0.25, "b": 4.0}, 1)
    opened.add_hparams({"seed": 2, "lr": 0.5, "arm": "wide", "fused": True}, {"final": 0.75})
    opened.close()
    log(writer(str(tmp_path / "run-2" / "another")), [(1, {"other": 1.0})])
    log(writer(str(tmp_path / "keras" / "train")), [(1, {"epoch_loss": 1.0})])
    log(writer(str(tmp_path / "keras" / "validation")), [(1, {"epoch_loss": 2.0})])
    log(writer(str(tmp_path / "kind" / "version_3")), [(1, {"x": 2.0})])
    runs = {run.name: run for run in tensorboard.read(tmp_path, NAMED)}
    assert set(runs) == {"run-2", "another", "keras", "kind/version_3"}
    main = runs["run-2"]
    assert {name: values.tolist() for name, (_, values) in main.curves.items()} == {
        "loss": [0.5], "train/losses/a": [0.25], "train/losses/b": [4.0]
    }  # fmt: skip
    assert main.settings == {"seed": 2, "lr": 0.5, "arm": "wide", "fused": True}
    assert (main.result, main.arm, main.seed) == ({"final": 0.75}, "wide", 2)
    assert set(runs["keras"].curves) == {"train/epoch_loss", "validation/epoch_loss"}
    assert tensorboard.is_mine(tmp_path / "keras") and not tensorboard.is_mine(tmp_path)


def test_event_files_that_end_anywhere_or_are_damaged(tmp_path: Path, writer: Callable[..., Any]) -> None:
    log(writer(str(tmp_path)), [(step, {"loss": step / 3}) for step in range(8)])
    [file] = tmp_path.iterdir()
    content = file.read_bytes()
    whole = {step: float(np.float32(step / 3)) for step in range(8)}
    for at in range(0, len(content), 11):
        for damaged in (content[:at], content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :]):
            file.write_bytes(damaged)
            try:
                run = one(tensorboard.read(tmp_path, How()))
            except UserError as error:
                assert str(tmp_path) in str(error) and "\n" not in str(error)
                continue
            points = dict(zip(*(part.tolist() for part in run.curves["loss"]), strict=True))
            assert points.items() <= whole.items()
            if len(points) < 8 and damaged != content[:at]:
                assert run.status == "unfinished" and "cut off or damaged after byte" in run.remarks[0]


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "events.out.tfevents.1.host.1.0").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing.event_file_loader", None)
    with pytest.raises(UserError, match=r"needs the package tensorboard: pip install 'gptlab\[tensorboard\]'"):
        tensorboard.read(tmp_path, How())


# -- Weights & Biases -----------------------------------------------------------------------------------------------


def test_wandb(tmp_path: Path) -> None:
    config = SETTINGS | {"_wandb": {"cli": 1}, "long": "x" * 70000}  # a record over three blocks
    records = wandb_records(ROWS, config, group="wide")
    records[-1:] = [
        message((3, message(*wandb_items({"best": 0.25, "note": "hi", "train/loss": 9.0}, 1)))),
        records[-1],
    ]
    file = write_wandb(tmp_path, records)
    for path in (file, file.parent, file.parent.parent):
        assert wandb.is_mine(path)
        run = one(wandb.read(path, NAMED))
        assert (run.name, run.arm, run.seed, run.status, run.source) == ("a-0", "a", 3, "completed", file)
        assert run.settings.pop("long") == "x" * 70000
        assert run.settings == {"arm": "a", "seed": 3, "optim.lr": 0.1, "project": "project", "group": "wide"}
        assert run.result == {"best": 0.25} and run.remarks == []
        same(run, ROWS)
    assert not wandb.is_mine(tmp_path)


@pytest.mark.parametrize(("code", "status"), [(0, "completed"), (1, "failed"), (-1, "failed"), (None, "unfinished")])
def test_how_a_run_of_wandb_ended(tmp_path: Path, code: int | None, status: str) -> None:
    file = write_wandb(tmp_path, wandb_records(ROWS, exit_code=code))
    run = one(wandb.read(file, How()))
    assert run.status == status and not run.remarks


def test_wandb_names_arms_by_a_group(tmp_path: Path) -> None:
    """The group and the project are settings like others, unless the run has some of these names."""
    write_wandb(tmp_path, wandb_records(ROWS, {"project": "mine"}, group="wide"))
    run = one(wandb.read(tmp_path / "wandb", How(arm="group")))
    assert run.arm == "wide" and run.settings["project"] == "mine"


TYPED: dict[str, tuple[int, int | float]] = {"typed": (6, 0.1), "whole": (5, 5), "flag": (4, 1)}  # 5 stands for -3


def test_values_of_all_kinds(tmp_path: Path) -> None:
    """Nested names, numbers that are not JSON, a changed configuration, and what is no number."""
    no_numbers = {"text": "hi", "flag": True, "none": None, "picture": {"_type": "image"}, "list": [1]}
    item = message(*((1, message((2, name), value)) for name, value in TYPED.items()))
    changed = message((5, message(*wandb_items({"seed": 5}, 1), (2, message((1, "gone"), (16, "1"))))))
    records = wandb_records([(1, {"a.b": 1.5, "c": {"d": 2.5}, **no_numbers})], {"seed": 4, "gone": 1}, exit_code=None)
    records += [message((2, item + message((2, message((1, 2)))))), changed]
    run = one(wandb.read(write_wandb(tmp_path, records), NAMED))
    assert run.seed == 5 and "gone" not in run.settings
    found = {name: (steps.tolist(), values.tolist()) for name, (steps, values) in run.curves.items()}
    assert found == {"a.b": ([1.0], [1.5]), "c.d": ([1.0], [2.5]), "typed": ([2.0], [0.1]), "whole": ([2.0], [-3.0])}


def test_the_step_of_a_metric_of_wandb(tmp_path: Path) -> None:
    """The Trainer logs training and evaluation as steps of their own, and says which metric is the step."""
    rows: Rows = [
        (0, {"start": 5.0}),
        (1, {"train/loss": 3.0, "train/global_step": 10, "plain": 1.0}),
        (2, {"eval/loss": 2.0, "train/global_step": 10}),
        (3, {"eval/loss": 1.0, "tokens": 640.0}),
        (4, {"train/loss": 2.0, "train/global_step": 20, "tokens": 1280.0}),
    ]
    records = wandb_records(rows)
    define = [((1, "train/global_step"),), ((2, "*"), (4, "train/global_step")), ((1, "plain"),)]
    records[2:2] = [message((12, message(*fields))) for fields in define]
    run = one(wandb.read(write_wandb(tmp_path, records), How()))
    steps = {name: points[0].tolist() for name, points in run.curves.items()}
    assert steps == {
        "train/loss": [10, 20], "eval/loss": [10], "train/global_step": [1, 2, 4], "plain": [1],
        "start": [0],  # no step was known yet, so that it is over W&B's own
        "tokens": [10, 20],
    }  # fmt: skip
    assert run.curves["eval/loss"][1].tolist() == [1.0]  # of the two at step 10 the later
    asked = one(wandb.read(tmp_path / "wandb", How(step="tokens")))
    assert asked.curves["train/loss"][0].tolist() == [1, 4]  # the first has no tokens
    assert asked.curves["eval/loss"][0].tolist() == [2, 3]
    assert "logs eval/loss, plain, start and 2 more without tokens: they are over W&B's own step" in asked.remarks[0]


def test_a_line_of_history_without_a_step_is_counted(tmp_path: Path) -> None:
    rows = [message((2, message(*wandb_items({"loss": value})))) for value in (3.0, 2.0)]
    run = one(wandb.read(write_wandb(tmp_path, [*wandb_records([]), *rows]), How()))
    np.testing.assert_array_equal(run.curves["loss"], [[0, 1], [3, 2]])


def test_pieces_of_a_run_of_wandb_are_one(tmp_path: Path) -> None:
    again: Rows = [(step, {"train/loss": 9.0}) for step in range(12, 16)]
    write_wandb(tmp_path, wandb_records(ROWS, SETTINGS, exit_code=None), "20260102_000000")
    write_wandb(tmp_path, wandb_records(again, SETTINGS), "20260103_000000")
    other = wandb_records([(1, {"train/loss": 7.0})], name="other")
    write_wandb(tmp_path, other, "20260101_000000", "zzz")
    (tmp_path / "wandb" / "latest-run").symlink_to(tmp_path / "wandb" / "offline-run-20260103_000000-abc123")
    runs = {run.name: run for run in wandb.read(tmp_path / "wandb", How())}
    assert len(runs) == 2 and runs["a-0"].status == "completed"
    steps, values = runs["a-0"].curves["train/loss"]
    assert steps.tolist() == [*range(1, 11), 12, 13, 14, 15] and values[-4:].tolist() == [9.0] * 4


def test_files_of_wandb_that_end_anywhere_or_are_damaged(tmp_path: Path) -> None:
    """What is before the damage is read, and a sentence says that something is missing."""
    rows: Rows = [(step, {"loss": step / 3}) for step in range(3)]
    file = write_wandb(tmp_path, wandb_records(rows, SETTINGS))
    content = file.read_bytes()
    whole = {float(step): step / 3 for step in range(3)}
    ends = {len(wandb_log(wandb_records(rows, SETTINGS)[:count])) for count in range(10)}
    for at in sorted({*range(0, len(content), 5), *ends} - {len(content)}):
        for damaged in (content[:at], content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :]):
            file.write_bytes(damaged)
            try:
                run = one(wandb.read(tmp_path / "wandb", How()))
            except UserError as error:
                assert str(file) in str(error) and "\n" not in str(error)
                continue
            points = dict(zip(*(part.tolist() for part in run.curves["loss"]), strict=True))
            assert points.items() <= whole.items() and run.status == "unfinished"
            assert bool(run.remarks) == (len(damaged) not in ends or damaged != content[:at])
    file.write_bytes(content)
    assert one(wandb.read(file, How())).status == "completed"


@pytest.mark.slow
def test_real_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = pytest.importorskip("wandb", reason="the package wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    big: Rows = [(step, {"loss": 1 / step, "extra.nested": step * 0.7}) for step in range(1, 2000)]
    for name, rows, code in (("a-0", ROWS, 0), ("a-1", big, 1)):
        run = theirs.init(
            project="p",
            name=name,
            group="g",
            dir=str(tmp_path),
            config=SETTINGS,
            settings=theirs.Settings(console="off"),
        )
        for step, row in rows:
            run.log(
                {"extra" if "." in key else key: {"nested": row[key]} if "." in key else row[key] for key in row}, step
            )
        run.summary["best"] = 0.25
        run.finish(exit_code=code)
    found = {run.name: run for run in wandb.read(tmp_path / "wandb", NAMED)}
    for name, rows, status in (("a-0", ROWS, "completed"), ("a-1", big, "failed")):
        read = found[name]
        same(read, rows)
        assert (read.arm, read.seed, read.status, read.remarks) == ("a", 3, status, [])
        assert read.result == {"best": 0.25}
        assert read.settings == {"arm": "a", "seed": 3, "optim.lr": 0.1, "project": "p", "group": "g"}


# -- MLflow and trackio ---------------------------------------------------------------------------------------------

PARAMS = {"arm": "a", "seed": "3", "optim.lr": "0.1", "note": "two\nlines"}
READ = {"experiment": "exp", "arm": "a", "seed": 3, "optim.lr": 0.1, "note": "two\nlines"}


def test_mlflow_file_store(tmp_path: Path) -> None:
    store = tmp_path / "mlruns"
    run = write_mlflow(store, "a-3", ROWS, PARAMS)
    write_mlflow(store, "gone", ROWS, PARAMS, stage="deleted")
    write_mlflow(store, "empty", [], PARAMS)
    write_mlflow(store, "'it''s'", ROWS, {}, status=4)
    for path in (store, store / "364120237829291904"):
        assert mlflow.is_mine(path)
        runs = {run.name: run for run in mlflow.read(path, NAMED)}
        assert {name: run.status for name, run in runs.items()} == {"a-3": "completed", "'it''s'": "failed"}
        assert (runs["a-3"].arm, runs["a-3"].seed, runs["a-3"].settings) == ("a", 3, READ)
        same(runs["a-3"], ROWS)
        said = [remark for run in runs.values() for remark in run.remarks]
        assert said == [
            f"{path}: runs left out because they logged no metric: 1",
            f"{path}: runs left out because they were deleted: 1",
        ]
    assert mlflow.is_mine(run) and one(mlflow.read(run, How())).name == "a-3"
    assert not mlflow.is_mine(tmp_path) and not mlflow.is_mine(run / "metrics")


@pytest.mark.parametrize(("number", "status"), [(1, "unfinished"), (3, "completed"), (4, "failed"), (5, "interrupted")])
def test_how_a_run_of_mlflow_ended(tmp_path: Path, number: int, status: str) -> None:
    run = write_mlflow(tmp_path, "a", ROWS, {}, status=number)
    (run / "tags" / "mlflow.runName").unlink()
    read = one(mlflow.read(tmp_path, How()))
    assert (read.status, read.name) == (status, "a")


def test_a_damaged_run_of_mlflow_leaves_the_others(tmp_path: Path) -> None:
    bad, cut = (write_mlflow(tmp_path, name, ROWS, {}) for name in ("bad", "cut"))
    (bad / "metrics" / "val_loss").write_text("1795881620067 0.5 1\n1795881620067 half 2\n")
    file = cut / "metrics" / "val_loss"
    file.write_text(file.read_text()[:-4])  # "13" could have been "130"
    run = one(mlflow.read(tmp_path, How()))
    assert run.curves["val_loss"][0].tolist() == [5, 10, 11, 12]
    assert run.remarks == [
        f"{file} ends within a line, which is left out",
        f"{bad / 'metrics' / 'val_loss'} is damaged: line 2 is not a time, a value and a step",
    ]


def test_mlflow_logs_a_step_twice_and_the_later_counts(tmp_path: Path) -> None:
    write_mlflow(tmp_path, "a", [(1, {"loss": 1.0}), (2, {"loss": 2.0}), (1, {"loss": 3.0})], {})
    np.testing.assert_array_equal(one(mlflow.read(tmp_path, How())).curves["loss"], [[1, 2], [3, 2]])


def test_sqlite_of_mlflow_and_trackio(tmp_path: Path) -> None:
    write_mlflow_sqlite(tmp_path / "mlflow.db", {"a-3": ROWS, "b": ROWS[:4]}, PARAMS)
    write_trackio(tmp_path / "project.db", {"a-3": ROWS, "b": ROWS[:4]}, SETTINGS)
    for reader, file, other in ((mlflow, "mlflow.db", "project.db"), (trackio, "project.db", "mlflow.db")):
        assert reader.is_mine(tmp_path / file) and not reader.is_mine(tmp_path / other)
        first, second = reader.read(tmp_path / file, NAMED)
        same(first, ROWS)
        same(second, ROWS[:4])
        assert (first.name, first.arm, first.seed, first.status) == ("a-3", "a", 3, "completed")
        assert first.settings == (READ if reader is mlflow else {"group": "g", "arm": "a", "seed": 3, "optim.lr": 0.1})


@pytest.mark.slow
@pytest.mark.parametrize("where", ["mlruns", "mlflow.db"])
def test_real_mlflow(tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = pytest.importorskip("mlflow", reason="the package mlflow is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    theirs.set_tracking_uri(f"sqlite:///{tmp_path / where}" if where.endswith("db") else (tmp_path / where).as_uri())
    theirs.set_experiment("exp")
    with theirs.start_run(run_name="a-3"):
        theirs.log_params(PARAMS)
        for step, row in ROWS:
            theirs.log_metrics(row, step=step)
    with pytest.raises(KeyError), theirs.start_run(run_name="b"):
        theirs.log_metric("val_loss", 1.5, step=1)
        raise KeyError
    assert mlflow.is_mine(tmp_path / where)
    runs = {run.name: run for run in mlflow.read(tmp_path / where, NAMED)}
    same(runs["a-3"], ROWS)
    assert (runs["a-3"].settings, runs["a-3"].status, runs["b"].status) == (READ, "completed", "failed")


@pytest.mark.slow
def test_real_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))  # read when trackio is imported
    theirs = pytest.importorskip("trackio", reason="the package trackio is not installed")
    run = theirs.init(project="here", name="a-3", config=SETTINGS, embed=False, auto_log_cpu=False)
    for step, row in ROWS:
        run.log(row, step=step)
    run.finish()
    from trackio.sqlite_storage import SQLiteStorage

    read = one(trackio.read(Path(SQLiteStorage.get_project_db_path("here")), NAMED))
    same(read, ROWS)
    assert (read.name, read.arm, read.seed) == ("a-3", "a", 3)


# -- all of them ----------------------------------------------------------------------------------------------------


def trainer_file(folder: Path) -> Path:
    write_state(folder, 8)
    return folder / "trainer_state.json"


def events_file(folder: Path) -> Path:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    log(SummaryWriter(str(folder)), ROWS)
    return next(folder.iterdir())


def metric_file(folder: Path) -> Path:
    return write_mlflow(folder, "a", [(step, {"val_loss": 1.0}) for step in range(9)], {}) / "metrics" / "val_loss"


def sqlite_file(folder: Path) -> Path:
    write_mlflow_sqlite(folder / "mlflow.db", {"a": ROWS}, PARAMS)
    return folder / "mlflow.db"


def trackio_file(folder: Path) -> Path:
    write_trackio(folder / "project.db", {"a": ROWS}, SETTINGS)
    return folder / "project.db"


def wandb_file(folder: Path) -> Path:
    return write_wandb(folder, wandb_records(ROWS, SETTINGS))


KINDS = {
    "trainer": (trainer, trainer_file, lambda file: file.parent),
    "tensorboard": (tensorboard, events_file, lambda file: file.parent),
    "wandb": (wandb, wandb_file, lambda file: file.parent.parent),
    "mlflow": (mlflow, metric_file, lambda file: file.parent.parent),
    "mlflow-sqlite": (mlflow, sqlite_file, lambda file: file),
    "trackio": (trackio, trackio_file, lambda file: file),
}


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_one_sentence(tmp_path: Path, kind: str) -> None:
    """A file cut in half, emptied, of random bytes, and with bytes changed: read in part, or a sentence with a path."""
    reader, write, place = KINDS[kind]
    file = write(tmp_path)
    content = file.read_bytes()
    draw = random.Random(0)

    def damaged() -> Iterable[bytes]:
        yield b""
        yield content[: len(content) // 2]
        yield draw.randbytes(len(content))
        for _ in range(12):
            at = draw.randrange(len(content))
            yield content[:at] + draw.randbytes(8) + content[at + 8 :]

    faults = 0
    for made in damaged():
        file.write_bytes(made)
        try:
            reader.read(place(file), NAMED)
        except UserError as error:
            faults += 1
            assert "\n" not in str(error) and str(tmp_path) in str(error)
    assert faults


@NOT_ROOT
@pytest.mark.parametrize("kind", KINDS)
def test_without_rights(tmp_path: Path, kind: str) -> None:
    reader, write, place = KINDS[kind]
    file = write(tmp_path)
    file.chmod(0)
    with pytest.raises(UserError) as raised:
        reader.read(place(file), How())
    assert str(tmp_path) in str(raised.value)
    folder = file.parent
    mode = folder.stat().st_mode
    folder.chmod(0)
    try:
        assert reader.is_mine(folder) in (True, False)  # and does not raise
    finally:
        folder.chmod(mode)


@pytest.mark.parametrize("kind", ["wandb", "mlflow-sqlite", "trackio"])
def test_a_seed_is_a_whole_number(tmp_path: Path, kind: str) -> None:
    reader, write, place = KINDS[kind]
    with pytest.raises(UserError, match="optim.lr is 0.1, not a whole number that can be a seed"):
        reader.read(place(write(tmp_path)), How(seed="optim.lr"))


def test_reading_loads_nothing_heavy(tmp_path: Path) -> None:
    """Each package takes seconds to import; only TensorBoard's own is needed, and that only for its files."""
    places = {}
    for kind in ("trainer", "wandb", "mlflow"):
        reader, write, place = KINDS[kind]
        places[reader.__name__] = str(place(write(tmp_path / kind)))
    code = (
        "import importlib, sys, pathlib; from gptlab.logs.run import How\n"
        f"for name, path in {places!r}.items():\n"
        "    assert importlib.import_module(name).read(pathlib.Path(path), How())\n"
        "print(*(set(sys.modules) & {'torch', 'tensorflow', 'wandb', 'mlflow', 'transformers', 'tensorboard'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr, done.returncode) == ("", "", 0)
