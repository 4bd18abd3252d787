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
import itertools
import json
import math
import os
import re
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gptlab.config import Recipe
from gptlab.data.verified import file_sha256
from gptlab.distributed.shard import Weights, shard_spec
from gptlab.distributed.world import SINGLE, World
from gptlab.errors import RunError
from gptlab.files import because
from gptlab.interop.files import write_safetensors
from gptlab.machine import free_memory
from gptlab.progress import tell_nobody
from gptlab.rundir import RunDir, write_atomically
from gptlab.sparsity.pruner import NoPruner, Pruner
from gptlab.sparsity.schedule import ramp
from gptlab.streams import say
from gptlab.training.tensors import (
    Extent,
    Saved,
    check_names,
    check_part,
    extent,
    is_file_name,
    load_optimizer,
    local_part,
    optimizer_tensors,
    read_index,
    read_object,
    read_part,
)

VERSION = 1  # of manifest.json
OURS, UNFINISHED = re.compile(r"step-[0-9]{8,}"), re.compile(r"\.?step-[0-9]{8,}")  # names of folders
BUSY = "{}: its checkpoints are removed faster than they can be read: try again when the run has ended"
TRIES = 20  # to read a checkpoint beside a process that removes old ones
ROOM = 2e9  # bytes of host memory that the copies must leave free


class Foreign(RunError):
    """A checkpoint of another run."""


def list_checkpoints(run: RunDir) -> list[Path]:
    """Finished checkpoints, oldest first, damaged ones among them. Whatever else is in the folder is not ours."""
    return sorted((p for p in _folders(run, OURS) if (p / "manifest.json").is_file()), key=checkpoint_step)


def _folders(run: RunDir, names: re.Pattern[str]) -> list[Path]:
    """Folders in checkpoints/ that have exactly such a name. No symbolic links: what is behind them is not ours."""
    try:
        with os.scandir(run.checkpoints) as entries:
            return [Path(e.path) for e in entries if names.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def step_folder(step: int) -> str:
    return f"step-{step:08d}"


def checkpoint_step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def has_begun(run: RunDir) -> bool:
    """Whether a run has a checkpoint or has taken a step. If not, its folder is free for other settings."""
    return bool(list_checkpoints(run)) or run.has_steps() or bool(run.read_json("result.json").get("steps"))


def read_manifest(path: Path, run_id: str = "") -> tuple[dict[str, str], str]:
    """The sha256 of each file of a checkpoint by name, and the id of its run ("" in older checkpoints).

    Args:
        run_id: of the run that the checkpoint should be of; "" if unknown.

    Raises:
        Foreign: the checkpoint is of another run.
        RunError: the manifest cannot be read, or does not list what a checkpoint has.
    """
    manifest = read_object(path / "manifest.json")
    digests, of = manifest.get("sha256"), manifest.get("run", "")
    if manifest.get("version") != VERSION:
        raise RunError(
            f"checkpoint {path} is damaged, or of another gptlab: its manifest.json is not version {VERSION}"
        )
    if not isinstance(digests, dict) or not all(is_file_name(k) and isinstance(v, str) for k, v in digests.items()):
        raise RunError(f"checkpoint {path} is damaged: its manifest.json does not hold the sha256 of each file")
    if run_id and of and of != run_id:
        raise Foreign(f"checkpoint {path} is of another run: --train.init-from RUN starts a run from another one's")
    tensors = [f"{kind}.safetensors" for kind in ("model", "optimizer", "sparsity")]
    sharded = "index.json" in digests
    required = ["training.json", *([] if sharded else tensors[:2])]
    present = [name for name in ("index.json", *tensors) if (path / name).exists()]  # and would be read
    if unlisted := [name for name in (*required, *present) if name not in digests]:
        raise RunError(f"checkpoint {path} is damaged: its manifest.json does not list {unlisted[0]}")
    return digests, str(of)


def read_progress(path: Path, run_id: str = "") -> dict[str, Any]:
    """The training.json of a checkpoint, whose tensors are not read; arguments and errors as of `verify`."""
    digests, _ = read_manifest(path, run_id)
    _check_digest(path, "training.json", digests["training.json"])
    progress = read_object(path / "training.json")
    if progress.get("step") != checkpoint_step(path):
        raise RunError(f"checkpoint {path} is damaged: its training.json is of step {progress.get('step')}")
    return progress


def verify(path: Path, run_id: str = "", read: Callable[[int], None] = tell_nobody) -> dict[str, Any]:
    """Read all files of a checkpoint. Returns its training.json. `read` is called with the bytes of each block.

    Raises:
        Foreign: the checkpoint is of another run than `run_id`.
        RunError: a file is missing or differs from what was written, or the index names a file that is not listed.
    """
    progress, (digests, _) = read_progress(path, run_id), read_manifest(path, run_id)
    for name, digest in digests.items():
        _check_digest(path, name, digest, read)
    for entries in read_index(path).values():
        for entry in entries.values():
            if unlisted := [file for file, _, _ in entry["pieces"] if file not in digests]:
                raise RunError(f"checkpoint {path} is damaged: its manifest.json does not list {unlisted[0]}")
    return progress


def _check_digest(path: Path, name: str, digest: str, read: Callable[[int], None] = tell_nobody) -> None:
    try:
        found = file_sha256(path / name, read)
    except OSError as error:
        raise RunError(f"checkpoint {path} is damaged: {name}: {because(error)}") from None
    if found != digest:
        raise RunError(f"checkpoint {path} is damaged: {name} is not what was written")


def find_checkpoint(run: RunDir, which: str = "last") -> Path:
    """The checkpoint called last, best (see `best_first`) or by its step.

    For last and best, a checkpoint that cannot be used is named on stderr and passed over. One that a process removes
    meanwhile, as training does with old ones, is none.

    Raises:
        RunError: there is no such checkpoint, or none that is whole.
    """
    run_id, named = run.read_id(), set[str]()
    for _ in range(TRIES):
        found = list_checkpoints(run) or list_checkpoints(run)  # the only one may have been replaced meanwhile
        if not found:
            raise RunError(f"{run.path} has no checkpoint")
        order, final_step = found[::-1], 0
        if which == "best":
            final_step = final_sparsity_step(run.read_recipe())
            order = best_first(found, final_step, run_id)
        elif which != "last":
            order = [p for p in found if re.fullmatch("0*" + str(checkpoint_step(p)), which)]
            if not order:
                steps = ", ".join(str(checkpoint_step(p)) for p in found)
                raise RunError(f"{run.path} has no checkpoint {which}: last, best or one of {steps}")
        problems: list[RunError] = []
        for path in order:
            try:
                verify(path, run_id)
            except RunError as problem:
                if not (path / "manifest.json").is_file():
                    break  # it was removed: look again
                problems.append(problem)
                if which in ("last", "best") and str(problem) not in named:
                    named.add(str(problem))
                    say(f"{problem}; it is passed over")
                continue
            if checkpoint_step(path) < final_step:
                say(f"{path.name} is the best checkpoint, and not at the final sparsity, which begins at {final_step}")
            return path
        else:
            raise problems[0]
    raise RunError(BUSY.format(run.path))


def open_checkpoint(run: RunDir, which: str = "last") -> Saved:
    """`find_checkpoint`, with the files of its model open: if it is removed meanwhile, they can still be read."""
    for _ in range(TRIES):
        path = find_checkpoint(run, which)
        try:
            return Saved(path).open("model")
        except RunError:
            if (path / "manifest.json").is_file():
                raise
    raise RunError(BUSY.format(run.path))


def copy_checkpoint(path: Path, run: RunDir, changes: dict[str, Any]) -> None:
    """Make a checkpoint of another run one of this run, which is then its owner. Tensors are linked where they can be.

    Args:
        changes: to training.json.
    """
    digests, _ = read_manifest(path)
    temporary, final = run.checkpoints / f".{path.name}", run.checkpoints / path.name
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    progress = json.dumps({**read_progress(path), **changes}, indent=2)
    for name in digests:
        if name == "training.json":
            write_atomically(temporary / name, progress)
            continue
        try:
            os.link(path / name, temporary / name)
        except OSError:  # a file system without links
            shutil.copyfile(path / name, temporary / name)
    digests["training.json"] = hashlib.sha256(progress.encode()).hexdigest()
    manifest = {"version": VERSION, "run": run.make_id(), "sha256": digests}
    write_atomically(temporary / "manifest.json", json.dumps(manifest, indent=2))
    os.replace(temporary, final)


def best_first(paths: list[Path], final_step: int = 0, run_id: str = "") -> list[Path]:
    """Checkpoints ordered by val_loss.

    Those that cannot be read come first, to be named; then those that were evaluated, from `final_step` on and before;
    then those that were not, the newest first.
    """

    def rank(path: Path) -> tuple[float, float]:
        step = checkpoint_step(path)
        try:
            loss = read_progress(path, run_id).get("val_loss")
        except RunError:
            return 0, -step
        if isinstance(loss, int | float) and math.isfinite(loss):
            return 1 if step >= final_step else 2, loss
        return 3, -step

    return sorted(paths, key=rank)


def final_sparsity_step(recipe: Recipe) -> int:
    """The step from which the masked share is the final one; 0 if nothing is pruned, or all of it at the start."""
    begin, end = ramp(recipe.sparsity, recipe.schedule.decay_steps)
    return {"none": 0, "rigl": 0, "2:4": begin}.get(recipe.sparsity.method, end)


class Checkpoints:
    """Saves and restores the state of a run.

    Args:
        run: where to.
        keep_last: newest checkpoints kept.
        keep_best: keep the best one besides.
        final_step: the best one is of this step or later, if there is one; see `final_sparsity_step`.
        always: steps whose checkpoints are kept.
        world: its ranks save and restore together.
        sharded: whether tensors are sharded over the ranks, and not the same on each.
    """

    def __init__(
        self,
        run: RunDir,
        keep_last: int,
        keep_best: bool,
        world: World = SINGLE,
        sharded: bool = False,
        final_step: int = 0,
        always: Sequence[int] = (),
    ) -> None:
        self.run, self.keep_last, self.keep_best, self.world = run, keep_last, keep_best, world
        self.final_step, self.always = final_step, always
        self.passed_over: list[str] = []
        """What is wrong with the checkpoints that `restore` passed over, one sentence each."""
        self.writer: threading.Thread | None = None
        self.error: BaseException | None = None
        self.group = dist.new_group(backend="gloo") if sharded else None  # for the threads that write
        if world.first:
            for leftover in _folders(run, UNFINISHED):  # of a process that was killed while writing or removing
                if leftover.name.startswith(".") or not (leftover / "manifest.json").exists():
                    shutil.rmtree(leftover, ignore_errors=True)

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
        arguments: Any = step_folder(progress["step"]), extents, progress
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
                self._make_way(temporary)
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
            manifest = {"version": VERSION, "run": self.run.make_id(), "sha256": digests}
            write_atomically(temporary / "manifest.json", json.dumps(manifest, indent=2))
            self._make_way(final)
            os.replace(temporary, final)
            self._prune(progress["step"])
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

    def _make_way(self, path: Path) -> None:
        """Remove an earlier, damaged checkpoint of the same step. Whatever is not ours is renamed."""
        if not os.path.lexists(path):
            return
        if path.is_dir() and not path.is_symlink() and not self._is_foreign(path):
            shutil.rmtree(path)
            return
        names = (path.with_name(f"{path.name}.moved-{n}") for n in itertools.count(1))
        aside = next(name for name in names if not os.path.lexists(name))
        path.rename(aside)
        say(f"{path} was in the way of a checkpoint, and is now {aside.name}")

    def _is_foreign(self, path: Path) -> bool:
        try:
            read_manifest(path, self.run.read_id())
        except Foreign:
            return True
        except RunError:  # damaged
            pass
        return False

    def _prune(self, newest: int) -> None:
        """Remove what is older than the newest checkpoints, except the best. A damaged one is not counted."""
        found = [p for p in list_checkpoints(self.run) if checkpoint_step(p) <= newest and not self._is_foreign(p)]
        whole = [p for p in found if _is_readable(p)]
        kept = set(whole[-self.keep_last :])
        if self.keep_best:
            kept |= set(best_first(whole, self.final_step)[:1])
        for path in found:
            if path not in kept and checkpoint_step(path) not in self.always:
                (path / "manifest.json").unlink()  # a removal that is cut short leaves no checkpoint
                shutil.rmtree(path)

    def restore(
        self, model: Weights, optimizer: torch.optim.Optimizer, pruner: Pruner | NoPruner | None = None
    ) -> dict[str, Any] | None:
        """Load the newest whole checkpoint. Returns its training.json, or None where there is no checkpoint.

        Raises:
            RunError: there are checkpoints and none is whole, or the checkpoint is of another model.
        """
        path, progress, self.passed_over = self.world.broadcast(self._newest() if self.world.first else (None, {}, []))
        if path is None and self.passed_over:
            raise RunError(self.passed_over[0])
        if path is None:
            return None
        saved, parameters = Saved(path), dict(model.named_parameters())
        check_names(saved, "model", parameters)
        for name, p in parameters.items():
            check_part(saved, "model", name, p, parameters)
        if saved.names("optimizer") or progress["step"] != progress.get("skipped_steps", 0):
            load_optimizer(saved, model, optimizer)  # there is no state before the first update that is not skipped
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(read_part(saved, "model", name, p, parameters))
        if isinstance(pruner, Pruner):
            stored = {name: local_part(saved, "sparsity", name, parameters) for name in saved.names("sparsity")}
            if problem := pruner.unlike(stored, progress["step"]):
                raise RunError(f"checkpoint {path}: the masks are not of this run: {problem}")
            pruner.load_tensors(stored)
        return progress

    def _newest(self) -> tuple[Path | None, dict[str, Any], list[str]]:
        """The newest whole checkpoint and its training.json, and what is wrong with those after it."""
        run_id, problems = self.run.read_id(), []
        for path in reversed(list_checkpoints(self.run)):
            try:
                progress = verify(path, run_id)
            except RunError as error:
                problems.append(str(error))
                continue
            if not run_id:
                self.run.make_id(read_manifest(path)[1])
            return path, progress, problems
        return None, {}, problems


def _is_readable(path: Path) -> bool:
    try:
        read_progress(path)
    except RunError:
        return False
    return True


def _host_copy(tensor: Tensor) -> Tensor:
    copy = tensor.detach().to("cpu", copy=True)
    return copy.contiguous()
