"""Checkpoints: a folder a step, in safetensors and JSON, that is either whole or not there.

    step-00000500/  model.safetensors  optimizer.safetensors  [sparsity.safetensors]  training.json  manifest.json

Where FSDP has spread the tensors over n processes, each writes the rows that it has, and nothing is gathered:

    model-00001-of-00004.safetensors ...  and index.json: of each tensor the shape, and which file has which rows

Any number of processes goes on from either form. Tensors are copied before training goes on, and a thread writes the
copies; where the host has no room for copies, training waits while tensors are written, one at a time. Everything is
written into a hidden folder, manifest.json with the sha256 of each file last, and then renamed, so that a kill at any
moment leaves whole checkpoints only.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from gptlab.distributed.shard import Weights, global_shape, shard_spec
from gptlab.distributed.world import SINGLE, World
from gptlab.errors import RunError
from gptlab.machine import free_memory
from gptlab.optim.optimizers import plain_tensors
from gptlab.precision.libraries import load_library
from gptlab.rundir import RunDir, write_atomically
from gptlab.sparsity.pruner import NoPruner, Pruner

ROOM = 2e9  # bytes that copies for a checkpoint leave free on the host
BLOCK = 256  # numbers that share a scale in 8-bit moments
SCALES, TABLES = ("scale", "absmax1", "absmax2"), ("qmap", "qmap1", "qmap2")  # of torchao's and bitsandbytes'


def list_checkpoints(run: RunDir) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(path for path in run.checkpoints.glob("step-*") if (path / "manifest.json").is_file())


def checkpoint_step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def verify(path: Path) -> None:
    """Raise RunError where a file of a checkpoint is missing or is not the one that was written."""
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
        RunError: there is none, or it is damaged.
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
    """The one with the lowest val_loss among those that were evaluated at their step."""
    losses = {p: json.loads((p / "training.json").read_text(encoding="utf-8")).get("val_loss") for p in paths}
    scored = [p for p in paths if losses[p] is not None]
    return min(scored, key=lambda p: losses[p]) if scored else None


# -- files of tensors


DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write a safetensors file tensor by tensor; the sha256 of what was written.

    The library's own writer takes all tensors in host memory at once. The format is eight bytes of length, a JSON
    header padded to eight bytes, and the numbers, here with the widest types first so that all are aligned.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:

        def write(data: Any) -> None:
            file.write(data)
            digest.update(data)

        write(len(text).to_bytes(8, "little"))
        write(text)
        for name in order:
            tensor = tensors[name].detach().cpu().contiguous()
            write(tensor.flatten().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


@dataclass(frozen=True)
class Extent:
    """Which rows of a whole tensor a process has; of one that it has whole, all."""

    shape: tuple[int, ...]
    start: int = 0


class Saved:
    """The tensors of a checkpoint, whichever number of processes wrote it.

    Args:
        path: the checkpoint's folder.

    Raises:
        RunError: its index cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index: dict[str, Any] = {}
        if (path / "index.json").is_file():
            try:
                self.index = json.loads((path / "index.json").read_text(encoding="utf-8"))
            except json.JSONDecodeError as error:
                raise RunError(f"checkpoint {path} is damaged: {error}") from None
        self._files: dict[str, Any] = {}

    def _file(self, name: str) -> Any:
        if name not in self._files:
            self._files[name] = safe_open(self.path / name, framework="pt")
        return self._files[name]

    def names(self, kind: str) -> list[str]:
        """Of the tensors of one kind: model, optimizer or sparsity."""
        return list(self.index[kind]) if self.index else list(self._file(f"{kind}.safetensors").keys())

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        if self.index:
            return tuple(self.index[kind][name]["shape"])
        return tuple(self._file(f"{kind}.safetensors").get_slice(name).get_shape())

    def read(self, kind: str, name: str, start: int = 0, rows: int | None = None) -> Tensor:
        """A whole tensor, or some of its rows.

        Raises:
            RunError: rows are in no file, or a file has other rows than the index says.
        """
        shape = self.shape(kind, name)
        if not shape or not self.index:
            file = self.index[kind][name]["pieces"][0][0] if self.index else f"{kind}.safetensors"
            if not shape:
                return self._file(file).get_tensor(name)
            return self._file(file).get_slice(name)[start : shape[0] if rows is None else start + rows]
        stop = shape[0] if rows is None else start + rows
        parts, reached = [], start
        for file, first, length in sorted(self.index[kind][name]["pieces"], key=lambda piece: piece[1]):
            if first <= reached < min(first + length, stop):
                piece = self._file(file).get_slice(name)
                if piece.get_shape() != [length, *shape[1:]]:
                    raise RunError(f"checkpoint {self.path} is damaged: {file} has another {name} than its index says")
                parts.append(piece[reached - first : min(first + length, stop) - first])
                reached = min(first + length, stop)
        if reached < stop:
            raise RunError(f"checkpoint {self.path} is damaged: no file has row {reached} of {name}")
        if not parts:  # no rows are asked for
            return self._file(self.index[kind][name]["pieces"][0][0]).get_tensor(name)[:0]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


# -- the optimizer's state by the names of the parameters


def optimizer_tensors(model: Weights, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """{"exp_avg/h.0.mlp.c_fc.weight": tensor, ...}: all the optimizer keeps, as `plain_tensors`, by its parameter.

    What it keeps of all of them together stands in `optimizer.state` under a name, and here under the same.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        f"{kind}/{p if isinstance(p, str) else names[id(p)]}": tensor
        for p, state in optimizer.state.items()
        for kind, tensor in plain_tensors(state).items()
    }


def rows_here(name: str, parameters: Mapping[str, Tensor]) -> tuple[int, int, int] | None:
    """Of a tensor with rows: how many the whole has, the first one here, and how many are here.

    None where every process has the same, whole.

    Args:
        name: as the parameter's, or kind/name as `optimizer_tensors` and `Pruner.tensors` have it.
    """
    kind, _, of = name.rpartition("/")
    parameter, part = parameters.get(of), kind.rpartition(".")[2]
    spread = None if parameter is None else shard_spec(parameter)
    if spread is None or parameter is None or part in TABLES:
        return None
    if part in SCALES:
        first = spread.start * spread.shape[1:].numel()
        assert first % BLOCK == 0, "make_optimizer has refused what cuts through a scale"
        return -(-spread.shape.numel() // BLOCK), first // BLOCK, -(-parameter.numel() // BLOCK)
    return spread.shape[0], spread.start, len(parameter)


def extent(name: str, tensor: Tensor, parameters: Mapping[str, Tensor]) -> Extent | None:
    """Which rows of a whole tensor this one is; None where every process has the same, whole."""
    found = rows_here(name, parameters) if tensor.dim() else None
    if found is None:
        return None
    whole, start, n = found
    assert len(tensor) == n, f"{name} has the rows of its parameter"
    return Extent((whole, *tensor.shape[1:]), start)


def load_optimizer_tensors(
    model: Weights, optimizer: torch.optim.Optimizer, tensors: Iterable[tuple[str, Tensor]], kinds: set[str]
) -> None:
    """Give an optimizer the state that `optimizer_tensors` named, one tensor after another.

    Args:
        kinds: what stands before the names' slash.

    Raises:
        RunError: 8-bit moments of another library than this optimizer's.
    """
    library = "bitsandbytes" if "state1" in kinds else "torchao" if "exp_avg.codes" in kinds else ""
    if not type(optimizer).__module__.startswith(library):
        raise RunError(f"the moments are in 8 bits of {library}: this run goes on only on the device it began on")
    parameters = dict(model.named_parameters())
    quantized: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, value in tensors:
        kind, name = key.split("/", 1)
        kind, _, part = kind.partition(".")
        p = parameters.get(name)
        state = optimizer.state[name if p is None else p]  # type: ignore[index]
        if part == "int":
            state[kind] = int(value)
        elif p is None:
            state[kind] = value  # the optimizer takes it to its device
        elif part:
            quantized.setdefault((name, kind), {})[part] = value.to(p.device)
        elif kind == "step" and not optimizer.defaults.get("fused"):
            state[kind] = value  # on the CPU; fused AdamW alone counts beside the weights
        else:
            state[kind] = value.to(p.device)
    for (name, kind), parts in quantized.items():
        subclass = load_library("torchao.optim.subclass_8bit", "optim.name = adamw_8bit", "OptimState8bit")
        p, signed = parameters[name], bool(parts["qmap"].min() < 0)
        optimizer.state[p][kind] = subclass.OptimState8bit(**parts, signed=signed, dtype=p.dtype)


class Checkpoints:
    """Saves and restores the state of a run.

    Args:
        run: where to.
        keep_last: newest checkpoints kept.
        keep_best: keep the best one besides.
        world: all its processes save and restore together.
        spread: whether tensors are spread over them, and not the same in each.
    """

    def __init__(
        self, run: RunDir, keep_last: int, keep_best: bool, world: World = SINGLE, spread: bool = False
    ) -> None:
        self.run, self.keep_last, self.keep_best, self.world = run, keep_last, keep_best, world
        self.writer: threading.Thread | None = None
        self.error: BaseException | None = None
        self.group = dist.new_group(backend="gloo") if spread else None  # of the threads that write
        if world.first:
            for leftover in run.checkpoints.glob("*step-*"):  # of a process that was killed while it wrote or removed
                if leftover not in list_checkpoints(run):
                    shutil.rmtree(leftover)

    def save(
        self,
        model: Weights,
        optimizer: torch.optim.Optimizer | None,
        progress: dict[str, Any],
        pruner: Pruner | NoPruner | None = None,
    ) -> None:
        """Copy the state and write it in the background, or write it now where there is no room for copies.

        An error of the last write is raised here or by `wait`.

        Args:
            optimizer: None for a model that was trained elsewhere.
            progress: what is not a tensor, "step" among it; training.json holds it.
            pruner: None for a dense model.
        """
        self.wait()
        if not (self.world.first or self.group):
            return
        parameters: dict[str, Tensor] = dict(model.named_parameters())
        tensors = {"model": parameters, "optimizer": optimizer_tensors(model, optimizer) if optimizer else {}}
        if masks := pruner.tensors() if pruner else {}:
            tensors["sparsity"] = masks
        # of each tensor, which rows are here: None where all processes have the same, and the first writes it
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
        if self.group:  # the others of this machine copy at the same time
            size *= int(os.environ.get("LOCAL_WORLD_SIZE", self.world.size))
        if size + ROOM > free_memory():
            self._write(tensors, *arguments)
            self.wait()
            return
        copies = {kind: {name: _host_copy(t) for name, t in of.items()} for kind, of in tensors.items()}
        # not a daemon: a process that ends of itself ends its checkpoint first
        self.writer = threading.Thread(target=self._write, args=(copies, *arguments))
        self.writer.start()

    def wait(self) -> None:
        """Until the last checkpoint is on the disk."""
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
            shutil.rmtree(final, ignore_errors=True)  # a step that is saved again after a damaged file
            os.replace(temporary, final)
            self._prune()
        except BaseException as error:
            self.error = error

    def _write_tensors(
        self, folder: Path, tensors: dict[str, dict[str, Tensor]], extents: dict[str, dict[str, Extent | None]]
    ) -> dict[str, str]:
        """Write what this process has; the first writes the index when all have. The sha256 of every file by name."""
        if self.group is None:
            return {
                f"{kind}.safetensors": write_safetensors(folder / f"{kind}.safetensors", of)
                for kind, of in tensors.items()
            }
        dist.barrier(self.group)  # the folder is there
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
            error = f"process {self.world.rank} could not write its part of a checkpoint: {failure}"
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
                (path / "manifest.json").unlink()  # from here on it is no checkpoint, should the removal be cut short
                shutil.rmtree(path)

    def restore(
        self, model: Weights, optimizer: torch.optim.Optimizer, pruner: Pruner | NoPruner | None = None
    ) -> dict[str, Any] | None:
        """Load the newest checkpoint that is whole; its training.json, or None where there is none.

        Raises:
            RunError: there are checkpoints and every one is damaged, or it is of another model.
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
                stored = _read(saved, "model", name, parameters)
                if stored.dtype != p.dtype:
                    raise RunError(f"checkpoint {path}: {name} is in {stored.dtype}, this model's in {p.dtype}")
                p.copy_(stored)
        kinds = {name.split("/", 1)[0] for name in saved.names("optimizer")}
        moments = ((name, _read(saved, "optimizer", name, parameters)) for name in saved.names("optimizer"))
        load_optimizer_tensors(model, optimizer, moments, kinds)
        if isinstance(pruner, Pruner):
            names = saved.names("sparsity")
            pruner.load_tensors({name: _read(saved, "sparsity", name, parameters) for name in names})
        state: dict[str, Any] = json.loads((path / "training.json").read_text(encoding="utf-8"))
        return state

    def _newest(self) -> tuple[Path | None, str | None]:
        """The newest whole checkpoint, or what is wrong with the newest where none is whole."""
        damage: str | None = None
        for path in reversed(list_checkpoints(self.run)):
            try:
                verify(path)
            except RunError as error:
                damage = damage or str(error)
                continue
            return path, None
        return None, damage


def _read(saved: Saved, kind: str, name: str, parameters: Mapping[str, Tensor]) -> Tensor:
    """The rows of a stored tensor that belong here."""
    shape, found = saved.shape(kind, name), rows_here(name, parameters)
    flat = name.startswith("mask/") and len(shape) == 1  # as masks were packed once; the pruner takes its rows
    if found is None or not shape or flat:
        return saved.read(kind, name)
    return saved.read(kind, name, *found[1:])


def _differ(saved: Saved, parameters: dict[str, Any]) -> str:
    return ", ".join(sorted(set(saved.names("model")) ^ parameters.keys())[:4])


def _host_copy(tensor: Tensor) -> Tensor:
    copy = tensor.detach().to("cpu", copy=True)
    return copy.contiguous()
