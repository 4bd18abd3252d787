"""Checkpoints: one folder for each saved step, in safetensors and JSON, complete or absent.

    step-00000500/  model.safetensors  optimizer.safetensors  [sparsity.safetensors]  training.json  manifest.json

Under FSDP each of n ranks writes its local rows, and nothing is gathered:

    model-00001-of-00004.safetensors ...  and index.json: for each tensor its shape, and which file has which rows

Any number of ranks can resume from either form. Tensors are copied before training goes on, and a thread writes the
copies. Where the host has no memory for copies, training waits while tensors are written one at a time. All files go
into a hidden folder, manifest.json with the sha256 of each file last, and the folder is then renamed: a kill at any
moment leaves only complete checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gptlab.distributed.shard import Weights, global_shape, shard_spec
from gptlab.distributed.world import SINGLE, World
from gptlab.errors import RunError
from gptlab.machine import free_memory
from gptlab.rundir import RunDir, write_atomically
from gptlab.sparsity.pruner import NoPruner, Pruner
from gptlab.training.tensors import (
    Extent,
    Saved,
    extent,
    load_optimizer_tensors,
    local_part,
    optimizer_tensors,
    write_safetensors,
)

ROOM = 2e9  # bytes of host memory that the copies must leave free


def list_checkpoints(run: RunDir) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(path for path in run.checkpoints.glob("step-*") if (path / "manifest.json").is_file())


def checkpoint_step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def verify(path: Path) -> None:
    """Raises RunError if a file of a checkpoint is missing, or differs from what was written."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        for name, digest in manifest["sha256"].items():
            with open(path / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    raise RunError(f"checkpoint {path} is damaged: {name} is not what was written")
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise RunError(f"checkpoint {path} is damaged: {error}") from None


def find_checkpoint(run: RunDir, which: str = "last") -> Path:
    """The checkpoint called last, best (lowest val_loss among those written) or by its step.

    Raises:
        RunError: there is no such checkpoint, or it is damaged.
    """
    found = list_checkpoints(run)
    if not found:
        raise RunError(f"{run.path} has no checkpoint")
    if which == "last":
        path = found[-1]
    elif which == "best":
        path = best_checkpoint(found) or found[-1]
    else:
        steps = {checkpoint_step(p): p for p in found}
        if not which.isdigit() or int(which) not in steps:
            raise RunError(f"{run.path} has no checkpoint {which}: last, best or one of {', '.join(map(str, steps))}")
        path = steps[int(which)]
    verify(path)
    return path


def best_checkpoint(paths: list[Path]) -> Path | None:
    """The checkpoint with the lowest val_loss, among those whose step was evaluated; None if there is none."""
    losses = {p: json.loads((p / "training.json").read_text(encoding="utf-8")).get("val_loss") for p in paths}
    scored = [p for p in paths if losses[p] is not None]
    return min(scored, key=lambda p: losses[p]) if scored else None


class Checkpoints:
    """Saves and restores the state of a run.

    Args:
        run: where to.
        keep_last: newest checkpoints kept.
        keep_best: keep the best one besides.
        world: its ranks save and restore together.
        sharded: whether tensors are sharded over the ranks, and not the same on each.
    """

    def __init__(
        self, run: RunDir, keep_last: int, keep_best: bool, world: World = SINGLE, sharded: bool = False
    ) -> None:
        self.run, self.keep_last, self.keep_best, self.world = run, keep_last, keep_best, world
        self.writer: threading.Thread | None = None
        self.error: BaseException | None = None
        self.group = dist.new_group(backend="gloo") if sharded else None  # for the threads that write
        if world.first:
            for leftover in run.checkpoints.glob("*step-*"):  # of a process that was killed while writing or removing
                if leftover not in list_checkpoints(run):
                    shutil.rmtree(leftover)

    def save(
        self,
        model: Weights,
        optimizer: torch.optim.Optimizer | None,
        progress: dict[str, Any],
        pruner: Pruner | NoPruner | None = None,
    ) -> None:
        """Copy the state and write it in the background, or write it now where there is no memory for copies.

        An error of the previous write is raised here or by `wait`.

        Args:
            optimizer: None for an imported model.
            progress: the content of training.json, "step" among it.
            pruner: None for an imported model.
        """
        self.wait()
        if not (self.world.first or self.group):
            return
        parameters: dict[str, Tensor] = dict(model.named_parameters())
        tensors = {"model": parameters, "optimizer": optimizer_tensors(model, optimizer) if optimizer else {}}
        if masks := pruner.tensors() if pruner else {}:
            tensors["sparsity"] = masks
        # for each tensor the local rows; None where all ranks hold the same, and rank 0 writes it
        extents = {kind: {name: extent(name, t, parameters) for name, t in of.items()} for kind, of in tensors.items()}
        spread = shard_spec(next(iter(parameters.values())))
        if spread is not None:
            tensors = {
                kind: {
                    name: t
                    for name, t in of.items()
                    if (self.world.first if extents[kind][name] is None else spread.is_writer)
                }
                for kind, of in tensors.items()
            }
        arguments: Any = f"step-{progress['step']:08d}", extents, progress
        size = sum(t.nbytes for of in tensors.values() for t in of.values())
        if self.group:  # the other ranks of this machine copy at the same time
            size *= int(os.environ.get("LOCAL_WORLD_SIZE", self.world.size))
        if size + ROOM > free_memory():
            self._write(tensors, *arguments)
            self.wait()
            return
        copies = {kind: {name: _host_copy(t) for name, t in of.items()} for kind, of in tensors.items()}
        # not a daemon: a process that exits finishes its checkpoint first
        self.writer = threading.Thread(target=self._write, args=(copies, *arguments))
        self.writer.start()

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk."""
        if self.writer is not None:
            self.writer.join()
            self.writer = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def _write(
        self,
        tensors: dict[str, dict[str, Tensor]],
        name: str,
        extents: dict[str, dict[str, Extent | None]],
        progress: dict[str, Any],
    ) -> None:
        try:
            temporary, final = self.run.checkpoints / f".{name}", self.run.checkpoints / name
            if self.world.first:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
            digests = self._write_tensors(temporary, tensors, extents)
            if not self.world.first:
                return
            (temporary / "training.json").write_text(json.dumps(progress, indent=2), encoding="utf-8")
            for path in temporary.glob("*.json"):
                with open(path, "rb+") as file:
                    digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
                    os.fsync(file.fileno())
            digests = dict(sorted(digests.items()))
            write_atomically(temporary / "manifest.json", json.dumps({"version": 1, "sha256": digests}, indent=2))
            shutil.rmtree(final, ignore_errors=True)  # an earlier, damaged checkpoint of this step
            os.replace(temporary, final)
            self._prune()
        except BaseException as error:
            self.error = error

    def _write_tensors(
        self, folder: Path, tensors: dict[str, dict[str, Tensor]], extents: dict[str, dict[str, Extent | None]]
    ) -> dict[str, str]:
        """Write this rank's tensors, and on rank 0 the index. Returns the sha256 of every file by name."""
        if self.group is None:
            return {
                f"{kind}.safetensors": write_safetensors(folder / f"{kind}.safetensors", of)
                for kind, of in tensors.items()
            }
        dist.barrier(self.group)  # rank 0 has made the folder
        digests, pieces, error = {}, [], None
        try:
            for kind, of in tensors.items():
                file = f"{kind}-{self.world.rank + 1:05d}-of-{self.world.size:05d}.safetensors"
                if of:
                    digests[file] = write_safetensors(folder / file, of)
                for name, tensor in of.items():
                    here = extents[kind][name] or Extent(tuple(tensor.shape))
                    pieces.append((kind, name, here.shape, file, here.start, len(tensor) if tensor.dim() else 0))
        except Exception as failure:
            error = f"rank {self.world.rank} could not write its part of a checkpoint: {failure}"
        everyone: list[Any] = [None] * self.world.size
        dist.gather_object((digests, pieces, error), everyone if self.world.first else None, dst=0, group=self.group)
        errors = [[error for *_, error in everyone if error]] if self.world.first else [[]]
        dist.broadcast_object_list(errors, src=0, group=self.group)
        if errors[0]:
            raise OSError("; ".join(errors[0]))
        if self.world.first:
            index: dict[str, Any] = {kind: {} for kind in tensors}
            for _, theirs, _ in everyone:
                for kind, name, shape, file, start, rows in theirs:
                    entry = index[kind].setdefault(name, {"shape": list(shape), "pieces": []})
                    entry["pieces"].append([file, start, rows])
            (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")
            digests = {file: digest for theirs, *_ in everyone for file, digest in theirs.items()}
        return digests

    def _prune(self) -> None:
        found = list_checkpoints(self.run)
        kept = set(found[-self.keep_last :])
        if self.keep_best and (best := best_checkpoint(found)):
            kept.add(best)
        for path in found:
            if path not in kept:
                (path / "manifest.json").unlink()  # a removal that is cut short leaves no checkpoint
                shutil.rmtree(path)

    def restore(
        self, model: Weights, optimizer: torch.optim.Optimizer, pruner: Pruner | NoPruner | None = None
    ) -> dict[str, Any] | None:
        """Load the newest complete checkpoint. Returns its training.json, or None where there is no checkpoint.

        Raises:
            RunError: every checkpoint is damaged, or the checkpoint is of another model.
        """
        path, damage = self.world.broadcast(self._newest() if self.world.first else (None, None))
        if damage:
            raise RunError(damage)
        if path is None:
            return None
        saved, parameters = Saved(path), dict(model.named_parameters())
        if set(saved.names("model")) != parameters.keys():
            raise RunError(f"checkpoint {path} has other tensors than this model: {_differ(saved, parameters)}")
        with torch.no_grad():
            for name, p in parameters.items():
                if saved.shape("model", name) != tuple(global_shape(p)):
                    raise RunError(f"checkpoint {path}: {name} is of shape {saved.shape('model', name)}")
                stored = local_part(saved, "model", name, parameters)
                if stored.dtype != p.dtype:
                    raise RunError(f"checkpoint {path}: {name} is in {stored.dtype}, this model's in {p.dtype}")
                p.copy_(stored)
        kinds = {name.split("/", 1)[0] for name in saved.names("optimizer")}
        moments = ((name, local_part(saved, "optimizer", name, parameters)) for name in saved.names("optimizer"))
        load_optimizer_tensors(model, optimizer, moments, kinds)
        if isinstance(pruner, Pruner):
            names = saved.names("sparsity")
            pruner.load_tensors({name: local_part(saved, "sparsity", name, parameters) for name in names})
        state: dict[str, Any] = json.loads((path / "training.json").read_text(encoding="utf-8"))
        return state

    def _newest(self) -> tuple[Path | None, str | None]:
        """The newest complete checkpoint; or, if every checkpoint is damaged, what is wrong with the newest."""
        damage: str | None = None
        for path in reversed(list_checkpoints(self.run)):
            try:
                verify(path)
            except RunError as error:
                damage = damage or str(error)
                continue
            return path, None
        return None, damage


def _differ(saved: Saved, parameters: dict[str, Any]) -> str:
    return ", ".join(sorted(set(saved.names("model")) ^ parameters.keys())[:4])


def _host_copy(tensor: Tensor) -> Tensor:
    copy = tensor.detach().to("cpu", copy=True)
    return copy.contiguous()
