"""Checkpoints in any state, and other things beside them: what is whole is used, what is not ours is left alone."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_recipe
from safetensors.torch import load

from gptlab.config import Optim, Recipe, build_recipe
from gptlab.errors import RunError
from gptlab.interop.files import write_safetensors
from gptlab.model.gpt import build_model
from gptlab.optim.optimizers import make_optimizer
from gptlab.rundir import RunDir
from gptlab.sparsity.pruner import make_pruner
from gptlab.training import checkpoint as checkpoint_module
from gptlab.training.checkpoint import (
    Checkpoints,
    checkpoint_step,
    find_checkpoint,
    list_checkpoints,
    open_checkpoint,
)
from gptlab.training.load import load_run
from gptlab.training.loop import train


def load_file(file: Path) -> dict[str, torch.Tensor]:
    """Tensors that do not change when the file is written again, as mapped ones would."""
    return load(file.read_bytes())


def stepped(model: torch.nn.Module) -> torch.optim.Optimizer:
    """An optimizer that has made its state."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


def saved(folder: Path, losses: dict[int, float | None], keep_last: int = 9) -> RunDir:
    """A run with checkpoints of a small model, given as {step: val_loss}."""
    run, model = RunDir(folder), torch.nn.Linear(4, 3)
    run.write_recipe(build_recipe({"name": "small", "train": {"max_steps": 9}}))
    checkpoints = Checkpoints(run, keep_last, keep_best=True)
    for step, loss in losses.items():
        checkpoints.save(model, stepped(model), {"step": step, "val_loss": loss})
    checkpoints.wait()
    return run


@pytest.fixture
def four(four_once: Path, tmp_path: Path) -> Callable[[], RunDir]:
    """Makes runs with the checkpoints 1 to 4; the second is the best, and the last is better than the third."""
    made: list[RunDir] = []

    def copy() -> RunDir:
        made.append(RunDir(shutil.copytree(four_once, tmp_path / f"copy-{len(made)}")))
        return made[-1]

    return copy


@pytest.fixture(scope="module")
def four_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("four") / "run", {1: 2.0, 2: 0.5, 3: 1.0, 4: 0.4}).path


def restored(run: RunDir) -> tuple[dict[str, Any] | None, list[str]]:
    model = torch.nn.Linear(4, 3)
    checkpoints = Checkpoints(run, 9, keep_best=False)
    return checkpoints.restore(model, torch.optim.AdamW(model.parameters(), fused=True)), checkpoints.passed_over


def steps(run: RunDir) -> list[int]:
    return [checkpoint_step(path) for path in list_checkpoints(run)]


def path_of(run: RunDir, step: int) -> Path:
    return run.checkpoints / f"step-{step:08d}"


def top_bit(content: bytes) -> bytes:
    return content[:20] + bytes([content[20] ^ 0x80]) + content[21:]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "a flipped top bit": top_bit,
    "cut off": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "a list": lambda content: b"[]",
    "null": lambda content: b"null",
    "deep": lambda content: b"[" * 100_000,
    "an object": lambda content: b'{"sha256": {}, "step": 3}',
}
FILES = ("manifest.json", "training.json", "model.safetensors", "optimizer.safetensors")


def damage(file: Path, how: str) -> None:
    file.write_bytes(DAMAGES[how](file.read_bytes()))


@pytest.mark.parametrize("how", DAMAGES)
def test_what_cannot_be_read_is_no_candidate(
    how: str, four: Callable[[], RunDir], capsys: pytest.CaptureFixture[str]
) -> None:
    for file in FILES:
        run = four()
        damage(path_of(run, 4) / file, how)
        progress, passed_over = restored(run)
        assert progress is not None and progress["step"] == 3, file
        assert len(passed_over) == 1 and "step-00000004" in passed_over[0] and file in passed_over[0]
        for which, step in (("last", 3), ("best", 2)):
            assert find_checkpoint(run, which) == path_of(run, step), file
            assert capsys.readouterr().err.count("step-00000004") == 1  # named, and once
        with pytest.raises(RunError, match=file):
            find_checkpoint(run, "4")


@pytest.mark.parametrize("how", DAMAGES)
def test_an_old_one_that_cannot_be_read_ends_no_later_save(how: str, four: Callable[[], RunDir]) -> None:
    run = four()
    for step, file in enumerate(FILES, 1):
        damage(path_of(run, step) / file, how)
    model = torch.nn.Linear(4, 3)
    checkpoints = Checkpoints(run, 2, keep_best=True)
    checkpoints.save(model, stepped(model), {"step": 5, "val_loss": 1.0})
    checkpoints.wait()
    assert steps(run) == [4, 5]  # whole or not, their tensors are not read


def test_a_manifest_lists_every_file_that_is_read(four: Callable[[], RunDir]) -> None:
    for file in ("model.safetensors", "optimizer.safetensors", "training.json"):
        run = four()
        manifest = json.loads((path_of(run, 4) / "manifest.json").read_text(encoding="utf-8"))
        del manifest["sha256"][file]
        (path_of(run, 4) / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        assert restored(run)[1] == [f"checkpoint {path_of(run, 4)} is damaged: its manifest.json does not list {file}"]
    run = four()
    write_safetensors(path_of(run, 4) / "sparsity.safetensors", {})  # would be read
    with pytest.raises(RunError, match="does not list sparsity.safetensors"):
        find_checkpoint(run, "4")


def test_no_whole_checkpoint_is_a_sentence(four: Callable[[], RunDir]) -> None:
    run = four()
    for path in list_checkpoints(run):
        (path / "training.json").unlink()
    for read in (lambda: find_checkpoint(run), lambda: find_checkpoint(run, "best"), lambda: restored(run)):
        with pytest.raises(RunError, match="step-0000000. is damaged: training.json: No such file"):
            read()


def test_a_folder_tells_the_step_of_a_checkpoint(tmp_path: Path) -> None:
    run = saved(tmp_path, {1: None})
    path_of(run, 1).rename(path_of(run, 7))
    with pytest.raises(RunError, match="step-00000007 is damaged: its training.json is of step 1"):
        restored(run)


def test_a_checkpoint_of_another_run_is_named_passed_over_and_kept(tmp_path: Path) -> None:
    run, other = saved(tmp_path / "run", {1: None}), saved(tmp_path / "other", {2: None, 3: None})
    shutil.copytree(path_of(other, 2), path_of(run, 2))
    shutil.copytree(path_of(other, 3), path_of(run, 3))
    progress, passed_over = restored(run)
    assert progress is not None and progress["step"] == 1
    assert [f"step-0000000{n} is of another run" in text for n, text in zip((3, 2), passed_over, strict=True)]
    model = torch.nn.Linear(4, 3)
    checkpoints = Checkpoints(run, 1, keep_best=False)
    for step in (2, 3, 4):
        checkpoints.save(model, stepped(model), {"step": step})
    checkpoints.wait()
    assert steps(run) == [4]
    for step in (2, 3):  # they were in the way
        kept = path_of(run, step).with_name(f"step-0000000{step}.moved-1")
        assert json.loads((kept / "manifest.json").read_text(encoding="utf-8"))["run"] == other.read_id()


def test_a_run_whose_id_is_lost_takes_that_of_its_checkpoints(tmp_path: Path) -> None:
    run = saved(tmp_path, {1: None})
    before = run.read_id()
    assert len(before) == 16
    for content in ("", "\N{SNOWMAN}", None):
        run.id_file.unlink() if content is None else run.id_file.write_text(content, encoding="utf-8")
        assert find_checkpoint(run) == path_of(run, 1)  # and writes nothing
        assert run.read_id() == ""
        assert restored(run)[0] is not None
        assert run.read_id() == before


# -- what is not ours


def test_other_things_are_left_and_stop_nothing(tmp_path: Path) -> None:
    run = saved(tmp_path / "run", {1: 1.0, 2: 2.0, 20: 3.0})
    folder, elsewhere = run.checkpoints, tmp_path / "elsewhere"
    for name in ("backup-step-20", "step-00000020.bak", "step-00000020 (copy)", "step-20", "step-\u00b2"):
        shutil.copytree(path_of(run, 20), folder / name)
    shutil.copytree(path_of(run, 20), elsewhere / "step-00000099")
    for name in (".step-00000007", "step-00000008"):
        (folder / name).symlink_to(elsewhere / "step-00000099")
    (folder / "notes-step-1.txt").write_text("mine", encoding="utf-8")
    (folder / "step-00000030").write_text("mine", encoding="utf-8")
    (folder / ".step-00000031").write_text("mine", encoding="utf-8")
    (folder / ".step-00000002").mkdir()  # ours: a kill while writing
    (folder / "step-00000003").mkdir()  # ours: a kill while removing
    others = {path.name for path in folder.iterdir()} - {".step-00000002", "step-00000003"}
    assert restored(run)[0] == {"step": 20, "val_loss": 3.0}
    assert {path.name for path in folder.iterdir()} == others
    assert (find_checkpoint(run), find_checkpoint(run, "best")) == (path_of(run, 20), path_of(run, 1))
    with pytest.raises(RunError, match=r"has no checkpoint \u00b2: last, best or one of 1, 2, 20"):
        find_checkpoint(run, "\u00b2")
    model = torch.nn.Linear(4, 3)
    checkpoints = Checkpoints(run, 1, keep_best=False)
    for step in (30, 31):
        checkpoints.save(model, stepped(model), {"step": step})
    checkpoints.wait()
    assert steps(run) == [31]
    assert (folder / "step-00000030.moved-1").read_text(encoding="utf-8") == "mine"
    assert (folder / ".step-00000031.moved-1").read_text(encoding="utf-8") == "mine"
    gone = {path_of(run, step).name for step in (1, 2, 20)} | {".step-00000031", "step-00000030"}
    assert others - gone <= {path.name for path in folder.iterdir()}
    assert (elsewhere / "step-00000099/model.safetensors").is_file()


def test_a_folder_behind_a_link_holds_checkpoints_and_other_things(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    (shared / "old-step-1").mkdir(parents=True)
    (shared / "old-step-1/thesis.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").symlink_to(shared)
    run = saved(tmp_path / "run", {1: None, 2: None}, keep_last=1)
    assert steps(run) == [2] and restored(run)[0] is not None
    assert (shared / "old-step-1/thesis.txt").read_text(encoding="utf-8") == "mine"


# -- tensors that a hand can make, with the right sha256


def rewrite(path: Path, file: str, content: dict[str, torch.Tensor] | dict[str, Any]) -> None:
    """Write a file of a checkpoint anew, and its sha256."""
    if file.endswith(".safetensors"):
        digest = write_safetensors(path / file, content)
    else:
        (path / file).write_text(json.dumps(content), encoding="utf-8")
        digest = hashlib.sha256((path / file).read_bytes()).hexdigest()
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    manifest["sha256"][file] = digest
    (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


CHANGES: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]] = {
    "one number": lambda t: {k: v.flatten()[:1].clone() if k.startswith("exp_avg/") else v for k, v in t.items()},
    "no numbers": lambda t: {k: v.new_zeros(0) if k == "exp_avg_sq/weight" else v for k, v in t.items()},
    "turned": lambda t: {k: v.t().contiguous() if v.dim() == 2 else v for k, v in t.items()},
    "another dtype": lambda t: {k: v.double() if k == "exp_avg/bias" else v for k, v in t.items()},
    "integers": lambda t: {k: v.long() if k == "exp_avg/bias" else v for k, v in t.items()},
    "steps for each": lambda t: {k: v.expand(3).clone() if k.startswith("step/") else v for k, v in t.items()},
    "half": lambda t: {k: v for k, v in t.items() if k.endswith("weight")},
    "nothing": lambda t: {},
    "more": lambda t: {**t, "exp_avg/other": torch.zeros(3)},
    "no slash": lambda t: {**t, "exp_avg": torch.zeros(3)},
    "other moments": lambda t: {k.replace("exp_avg_sq", "momentum"): v for k, v in t.items()},
}


@pytest.mark.parametrize("how", CHANGES)
def test_the_optimizers_tensors_are_those_of_the_model(how: str, tmp_path: Path) -> None:
    """A kernel reads and writes past the end of moments that are too short."""
    run = saved(tmp_path, {1: None})
    file = path_of(run, 1) / "optimizer.safetensors"
    rewrite(path_of(run, 1), file.name, CHANGES[how](load_file(file)))
    with pytest.raises(RunError, match=r"step-00000001( has other tensors than this model's optimizer|: )"):
        restored(run)


def test_what_is_stored_comes_back_to_the_bit(tmp_path: Path) -> None:
    model = torch.nn.Linear(4, 3)
    optimizer = stepped(model)
    checkpoints = Checkpoints(RunDir(tmp_path), 1, keep_best=False)
    checkpoints.save(model, optimizer, {"step": 1})
    checkpoints.wait()
    other = torch.nn.Linear(4, 3)
    second = torch.optim.AdamW(other.parameters(), fused=True)
    checkpoints.restore(other, second)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert optimizer.state[p].keys() == second.state[q].keys()
        assert all(torch.equal(optimizer.state[p][kind], second.state[q][kind]) for kind in optimizer.state[p])


def pruned(dataset: Path, method: str, out: Path) -> tuple[Recipe, RunDir]:
    recipe = tiny_recipe(
        dataset, sparsity__method=method, sparsity__every=2, train__max_steps=12, train__eval_every=0, model__n_layer=1
    )
    train(recipe.replace({"train.max_steps": 8, "schedule.decay_steps": 12}), out, quiet=True)
    return recipe, RunDir(out)


@pytest.mark.parametrize("method", ["magnitude", "movement"])
def test_the_masks_are_those_of_the_run(method: str, dataset: Path, tmp_path: Path) -> None:
    recipe, run = pruned(dataset, method, tmp_path)
    recipe = run.read_recipe()
    path = list_checkpoints(run)[-1]
    before = load_file(path / "sparsity.safetensors")
    name = min(key for key in before if key.startswith("mask/"))

    def masks(tensors: dict[str, torch.Tensor]) -> str | None:
        model = build_model(recipe.model, "cpu", init=0)
        pruner = make_pruner(model, make_optimizer(model, Optim()), recipe)
        return pruner.unlike(tensors, 8)

    assert masks(before) is None
    assert masks({**before, name: before[name][:1]}) == f"{name} is of shape (1, 4) in torch.uint8"
    assert "in torch.int64" in masks({**before, name: before[name].long()})
    assert masks({key: t for key, t in before.items() if key != name}) == f"{name} is only in one of them"
    assert masks({**before, "mask/other": before[name]}) == "mask/other is only in one of them"
    assert masks({**before, "changed": before["changed"][:1]}) == "changed is of shape (1,) in torch.int64"
    if method == "movement":
        assert {key.partition("/")[0] for key in before} == {"mask", "score", "dense", "changed"}
        for kind in ("dense", "score"):
            assert f"{kind}/h.0" in str(masks({key: t for key, t in before.items() if not key.startswith(kind)}))
    rewrite(path, "sparsity.safetensors", {**before, name: before[name][:1]})
    with pytest.raises(RunError, match=r"the masks are not of this run: mask/.* is of shape \(1, 4\)"):
        train(recipe.replace({"train.max_steps": 12}), tmp_path, quiet=True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("evaluated", 3),
        ("wall_seconds", "x"),
        ("skipped_steps", None),
        ("val_loss", []),
        ("scaler", []),
        ("guard", {"recent": ["x"]}),
        ("guard", {"first": {}}),
    ],
)
def test_training_json_of_other_types_is_a_sentence(
    key: str, value: Any, tmp_path: Path, small_run: tuple[Recipe, Path]
) -> None:
    recipe, whole = small_run
    shutil.copytree(whole, tmp_path / "run")
    path = list_checkpoints(RunDir(tmp_path / "run"))[-1]
    rewrite(path, "training.json", json.loads((path / "training.json").read_text(encoding="utf-8")) | {key: value})
    with pytest.raises(RunError, match="training.json of checkpoint 2 is not of a run"):
        train(recipe.replace({"train.max_steps": 3}), tmp_path / "run", quiet=True)


@pytest.fixture(scope="module")
def small_run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    out = tmp_path_factory.mktemp("faults") / "run"
    recipe = tiny_recipe(dataset, train__max_steps=2, model__n_layer=1, train__eval_every=0)
    train(recipe, out, quiet=True)
    return recipe, out


# -- indexes


def sharded(run: RunDir, files: list[str], **others: Any) -> Path:
    """A checkpoint as several processes write it, whose model is in files of these names."""
    path = path_of(run, 1)
    tensors = load_file(path / "model.safetensors") | load_file(path / "optimizer.safetensors")
    (path / "model.safetensors").unlink()
    (path / "optimizer.safetensors").unlink()
    index: dict[str, Any] = {"model": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        pieces = [[file, 0, len(tensor) if tensor.dim() else 0] for file in files]
        index["optimizer" if "/" in name else "model"][name] = {"shape": list(tensor.shape), "pieces": pieces}
    for file in files:
        (path / file).parent.mkdir(exist_ok=True)
        write_safetensors(path / file, tensors)
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    manifest["sha256"] = {"training.json": manifest["sha256"]["training.json"]} | {
        file: hashlib.sha256((path / file).read_bytes()).hexdigest() for file in files
    }
    (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    rewrite(path, "index.json", index | others)
    return path


def test_an_index_names_files_of_its_folder_that_the_manifest_lists(tmp_path: Path) -> None:
    run = saved(tmp_path / "whole", {1: None})
    sharded(run, ["all.safetensors"])
    assert restored(run)[0] is not None
    for n, file in enumerate(
        ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "a/b.safetensors", "..")
    ):
        run = saved(tmp_path / str(n), {1: None})
        path = sharded(run, ["all.safetensors"])
        index = json.loads((path / "index.json").read_text(encoding="utf-8"))
        index["model"]["weight"]["pieces"][0][0] = file
        rewrite(path, "index.json", index)
        with pytest.raises(RunError, match=r"index.json does not say which files of it hold weight"):
            find_checkpoint(run)
    run = saved(tmp_path / "unlisted", {1: None})
    path = sharded(run, ["all.safetensors"])
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    del manifest["sha256"]["all.safetensors"]
    (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(RunError, match="does not list all.safetensors"):
        restored(run)


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        3,
        {},
        {"weight": 3},
        {"weight": {"shape": [3, 4]}},
        {"weight": {"shape": 3, "pieces": [["all.safetensors", 0, 3]]}},
        {"weight": {"shape": [3.5, 4], "pieces": [["all.safetensors", 0, 3]]}},
        {"weight": {"shape": [-3, 4], "pieces": [["all.safetensors", 0, 3]]}},
        {"weight": {"shape": [3, 4], "pieces": []}},
        {"weight": {"shape": [3, 4], "pieces": [["all.safetensors", 0]]}},
        {"weight": {"shape": [3, 4], "pieces": [[3, 0, 3]]}},
        {"weight": {"shape": [3, 4], "pieces": [["all.safetensors", "0", 3]]}},
        {"weight": {"shape": [3, 4], "pieces": [["training.json", 0, 3]]}, "bias": {"shape": [3], "pieces": []}},
    ],
)
def test_an_index_of_any_other_form_is_a_sentence(entry: Any, tmp_path: Path) -> None:
    run = saved(tmp_path, {1: None})
    sharded(run, ["all.safetensors"], model=entry)
    with pytest.raises(RunError, match="step-00000001"):
        restored(run)


# -- read beside a process that removes


def test_a_checkpoint_that_is_pruned_while_it_is_read_is_read_anew(
    tmp_path: Path, small_run: tuple[Recipe, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(small_run[1], tmp_path / "run")
    run = RunDir(tmp_path / "run")
    first = list_checkpoints(run)[-1]

    def next_one() -> None:
        """What training does: the next checkpoint is written, and the last one removed."""
        last = list_checkpoints(run)[-1]
        step = checkpoint_step(last) + 1
        progress = json.loads((last / "training.json").read_text(encoding="utf-8")) | {"step": step}
        shutil.copytree(last, run.checkpoints / "copy")
        rewrite(run.checkpoints / "copy", "training.json", progress)
        (run.checkpoints / "copy").rename(path_of(run, step))
        (last / "manifest.json").unlink()
        shutil.rmtree(last)

    real, calls = checkpoint_module._check_digest, []

    def check(path: Path, name: str, digest: str, *told: Any) -> None:
        calls.append(name)
        if len(calls) in (2, 5):  # in the middle of a checkpoint
            next_one()
        real(path, name, digest, *told)

    monkeypatch.setattr(checkpoint_module, "_check_digest", check)
    assert load_run(run.path, device="cpu").step == 4
    assert capsys.readouterr().err == ""  # nothing was damaged
    assert not first.exists()

    monkeypatch.setattr(checkpoint_module, "_check_digest", real)
    opened = open_checkpoint(run)
    next_one()  # while the weights are copied
    assert all(opened.read("model", name).numel() for name in opened.names("model"))
