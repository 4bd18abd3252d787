"""Files of tensors: what is written is what the library reads, and rows come back however they were cut."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from gptlab.errors import RunError
from gptlab.interop.files import DTYPES, write_safetensors
from gptlab.rundir import RunDir
from gptlab.training.checkpoint import Checkpoints, find_checkpoint
from gptlab.training.tensors import Saved


def test_the_library_reads_every_dtype_and_shape(tmp_path: Path) -> None:
    tensors = {
        f"{name}/{shape}": torch.arange(64).to(dtype)[: torch.Size(shape).numel()].reshape(shape)
        for dtype, name in DTYPES.items()
        for shape in ((), (3,), (2, 5), (0, 4))
    }
    tensors["turned"] = torch.arange(6.0).reshape(2, 3).t()
    digest = write_safetensors(tmp_path / "file", tensors)
    assert digest == hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()
    read = load_file(tmp_path / "file")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype is tensor.dtype and torch.equal(read[name], tensor), name


def spread_over(folder: Path, whole: torch.Tensor, cuts: list[int]) -> Saved:
    """A checkpoint of one tensor whose rows several processes wrote."""
    pieces = []
    for k, (start, stop) in enumerate(itertools.pairwise(cuts), 1):
        write_safetensors(folder / f"model-{k}.safetensors", {"w": whole[start:stop]})
        pieces.append([f"model-{k}.safetensors", start, stop - start])
    (folder / "index.json").write_text(
        json.dumps({"model": {"w": {"shape": list(whole.shape), "pieces": pieces}}}), encoding="utf-8"
    )
    return Saved(folder)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 12), draw=st.data())
def test_any_rows_of_any_cut(tmp_path_factory: pytest.TempPathFactory, rows: int, draw: st.DataObject) -> None:
    whole = torch.arange(rows * 3.0).reshape(rows, 3)
    inner = draw.draw(st.lists(st.integers(0, rows), max_size=4))  # a process may have none
    saved = spread_over(tmp_path_factory.mktemp("cut"), whole, [0, *sorted(inner), rows])
    start = draw.draw(st.integers(0, rows))
    n = draw.draw(st.integers(0, rows - start))
    assert saved.names("model") == ["w"] and saved.shape("model", "w") == (rows, 3)
    assert torch.equal(saved.read("model", "w", start, n), whole[start : start + n])
    assert torch.equal(saved.read("model", "w"), whole)


def test_gaps_and_other_rows_than_the_index_says_are_refused(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(6, 2)
    spread_over(tmp_path, whole, [0, 2, 4, 6])
    index = json.loads((tmp_path / "index.json").read_text(encoding="utf-8"))
    del index["model"]["w"]["pieces"][1]
    (tmp_path / "index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(RunError, match="no file has row 2 of w"):
        Saved(tmp_path).read("model", "w")
    assert torch.equal(Saved(tmp_path).read("model", "w", 4, 2), whole[4:])
    saved = spread_over(tmp_path, whole, [0, 2, 4, 6])
    write_safetensors(tmp_path / "model-2.safetensors", {"w": whole[2:5]})
    with pytest.raises(RunError, match=r"model-2.safetensors has another w than its index says"):
        saved.read("model", "w")
    (tmp_path / "index.json").write_text("{", encoding="utf-8")
    with pytest.raises(RunError, match="is damaged"):
        Saved(tmp_path)


def test_another_model_is_refused_by_name_shape_and_dtype(tmp_path: Path) -> None:
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoints = Checkpoints(RunDir(tmp_path), keep_last=1, keep_best=False)
    checkpoints.save(model, optimizer, {"step": 1})
    checkpoints.wait()
    for other, says in (
        (torch.nn.Linear(4, 3, bias=False), "has other tensors than this model: bias"),
        (torch.nn.Linear(5, 3), r"weight is of shape \(3, 4\)"),
        (torch.nn.Linear(4, 3).bfloat16(), "is in torch.float32, this model's in torch.bfloat16"),
    ):
        with pytest.raises(RunError, match=says):
            checkpoints.restore(other, torch.optim.AdamW(other.parameters()))


def test_without_room_for_copies_it_is_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1e9))
    model = torch.nn.Linear(4, 3)
    checkpoints = Checkpoints(RunDir(tmp_path), keep_last=1, keep_best=False)
    checkpoints.save(model, torch.optim.AdamW(model.parameters()), {"step": 1})
    assert checkpoints.writer is None  # and it is there already
    saved = Saved(find_checkpoint(RunDir(tmp_path)))
    assert torch.equal(saved.read("model", "weight"), model.weight)
