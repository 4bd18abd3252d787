"""Tensors on disk: safetensors files, which rows of a tensor are where, and the optimizer's state by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gptlab.distributed.shard import Weights, shard_spec
from gptlab.errors import RunError
from gptlab.files import read_json
from gptlab.optim.optimizers import plain_tensors

BLOCK = 256  # numbers that share a scale in 8-bit moments
SCALES, TABLES = ("scale", "absmax1", "absmax2"), ("qmap", "qmap1", "qmap2")  # of torchao's and bitsandbytes'


@dataclass(frozen=True)
class Extent:
    """The rows of a whole tensor that a rank holds, from `start` on."""

    shape: tuple[int, ...]
    start: int = 0


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint. Raises RunError if the file cannot be read or holds anything else."""
    try:
        return read_json(file, RunError, finite=False)  # the largest |logit| of a run may be infinite
    except FileNotFoundError:
        raise RunError(f"checkpoint {file.parent} is damaged: it has no {file.name}") from None


def is_file_name(name: Any) -> bool:
    """Whether a name from a JSON file is that of a file in the same folder, and not a path."""
    return isinstance(name, str) and bool(re.fullmatch(r"\w[\w.-]*", name, re.ASCII))


def read_index(path: Path) -> dict[str, Any]:
    """The index of a checkpoint that several ranks wrote; {} if one process wrote it.

    Raises:
        RunError: it is not an index, or names a file outside the checkpoint's folder.
    """
    if not (path / "index.json").is_file():
        return {}
    index = read_object(path / "index.json")
    for kind, entries in index.items():
        for name, entry in entries.items() if isinstance(entries, dict) else [(kind, None)]:
            match entry:
                case {"shape": [*shape], "pieces": [_, *_] as pieces} if all(map(_is_count, shape)):
                    if all(map(_is_piece, pieces)):
                        continue
            raise RunError(f"checkpoint {path} is damaged: index.json does not say which files of it hold {name}")
    return index


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_piece(piece: Any) -> bool:
    match piece:
        case [file, start, rows]:
            return is_file_name(file) and _is_count(start) and _is_count(rows)
    return False


class Saved:
    """The tensors of a checkpoint, however many ranks wrote it.

    Args:
        path: the checkpoint's folder.

    Raises:
        RunError: its index cannot be read. The methods raise it for what is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index = read_index(path)
        self._files: dict[str, Any] = {}

    def _file(self, name: str) -> Any:
        if name not in self._files:
            try:
                self._files[name] = safe_open(self.path / name, framework="pt")
            except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: PyTorch cannot map the file
                raise RunError(f"checkpoint {self.path} is damaged: {name}: {error}") from None
        return self._files[name]

    def _slice(self, file: str, name: str) -> Any:
        opened = self._file(file)
        if name not in opened.keys():  # noqa: SIM118  (the handle is not a dictionary)
            raise RunError(f"checkpoint {self.path} is damaged: {file} has no {name}")
        return opened.get_slice(name)

    def _entry(self, kind: str, name: str) -> dict[str, Any]:
        try:
            entry: dict[str, Any] = self.index[kind][name]
        except KeyError:
            raise RunError(f"checkpoint {self.path} is damaged: its index has no {kind} tensor {name}") from None
        return entry

    def open(self, kind: str) -> Saved:
        """Open all files of a kind now: they can be read to the end, also if the checkpoint is removed meanwhile."""
        for entry in self.index.get(kind, {}).values():
            for file, _, _ in entry["pieces"]:
                self._file(file)
        self.names(kind)
        return self

    def names(self, kind: str) -> list[str]:
        """Names of the tensors of a kind: model, optimizer or sparsity."""
        return list(self.index.get(kind, ())) if self.index else list(self._file(f"{kind}.safetensors").keys())

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        if self.index:
            return tuple(self._entry(kind, name)["shape"])
        return tuple(self._slice(f"{kind}.safetensors", name).get_shape())

    def read(self, kind: str, name: str, start: int = 0, rows: int | None = None) -> Tensor:
        """A whole tensor, or some of its rows.

        Raises:
            RunError: rows are in no file, or a file has other rows than the index says.
        """
        shape = self.shape(kind, name)
        if not shape or not self.index:
            file = self._entry(kind, name)["pieces"][0][0] if self.index else f"{kind}.safetensors"
            part = self._slice(file, name)
            if not shape and part.get_shape() == []:
                return self._file(file).get_tensor(name)
            if part.get_shape() != list(shape):
                raise RunError(f"checkpoint {self.path} is damaged: {file} has another {name} than its index says")
            return part[start : shape[0] if rows is None else start + rows]
        stop = shape[0] if rows is None else start + rows
        parts, reached = [], start
        for file, first, length in sorted(self._entry(kind, name)["pieces"], key=lambda piece: piece[1]):
            if first <= reached < min(first + length, stop):
                piece = self._slice(file, name)
                if piece.get_shape() != [length, *shape[1:]]:
                    raise RunError(f"checkpoint {self.path} is damaged: {file} has another {name} than its index says")
                parts.append(piece[reached - first : min(first + length, stop) - first])
                reached = min(first + length, stop)
        if reached < stop:
            raise RunError(f"checkpoint {self.path} is damaged: no file has row {reached} of {name}")
        if not parts:  # no rows are asked for
            return self._slice(self._entry(kind, name)["pieces"][0][0], name)[:0]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def stored_weights(saved: Saved) -> Callable[[nn.Module], None]:
    """A function that copies a checkpoint's weights into a model, one tensor at a time, in the model's dtypes.

    It raises RunError where the model has another shape.
    """

    @torch.no_grad()
    def fill(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if (found := saved.shape("model", name)) != tuple(parameter.shape):
                raise RunError(f"checkpoint {saved.path}: {name} is of shape {found}, not {tuple(parameter.shape)}")
            parameter.copy_(saved.read("model", name))

    return fill


# -- the optimizer's state by the names of the parameters


def optimizer_tensors(model: Weights, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `plain_tensors`: {"exp_avg/h.0.mlp.c_fc.weight": tensor, ...}.

    State of all parameters together has a string as its key in `optimizer.state`, and the same string here.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        f"{kind}/{p if isinstance(p, str) else names[id(p)]}": tensor
        for p, state in optimizer.state.items()
        for kind, tensor in plain_tensors(state).items()
    }


def rows_here(name: str, parameters: Mapping[str, Tensor]) -> tuple[int, int, int] | None:
    """(total rows, first local row, local rows) of a sharded tensor; None if the tensor is replicated.

    Args:
        name: the parameter's, or kind/name as in `optimizer_tensors` and `Pruner.tensors`.
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
    """The rows of the whole tensor that a local tensor holds; None if the tensor is replicated."""
    found = rows_here(name, parameters) if tensor.dim() else None
    if found is None:
        return None
    whole, start, n = found
    assert len(tensor) == n, f"{name} has the rows of its parameter"
    return Extent((whole, *tensor.shape[1:]), start)


@torch.no_grad()
def load_optimizer(saved: Saved, model: Weights, optimizer: torch.optim.Optimizer) -> None:
    """Load the state that `optimizer_tensors` returned. Call it before the weights are loaded, which it changes.

    A first step with zero gradients makes the state that the optimizer has, whatever it is. What is stored must be the
    same tensors: kernels do not look at shapes.

    Raises:
        RunError: the state is of another optimizer or model, or its 8-bit moments are of another library.
    """
    names = saved.names("optimizer")
    kinds = {name.split("/", 1)[0] for name in names}
    library = "bitsandbytes" if "state1" in kinds else "torchao" if "exp_avg.codes" in kinds else ""
    if not type(optimizer).__module__.startswith(library):
        raise RunError(f"the 8-bit moments are {library}'s: resume this run on the type of device on which it began")
    parameters = dict(model.named_parameters())
    for p in parameters.values():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    state = optimizer_tensors(model, optimizer)
    check_names(saved, "optimizer", state)
    for name, tensor in state.items():
        check_part(saved, "optimizer", name, tensor, parameters)
        stored = read_part(saved, "optimizer", name, tensor, parameters)
        kind, _, of = name.partition("/")
        if kind.endswith(".int"):
            key: Any = parameters.get(of, of)
            optimizer.state[key][kind.removesuffix(".int")] = int(stored)
        else:
            tensor.copy_(stored)


def check_names(saved: Saved, kind: str, wanted: Iterable[str]) -> None:
    """Raise RunError if a checkpoint has other tensors of a kind than those wanted."""
    if differ := sorted(set(saved.names(kind)) ^ set(wanted)):
        what = "this model" if kind == "model" else f"this model's {kind}"
        raise RunError(f"checkpoint {saved.path} has other tensors than {what}: {', '.join(differ[:4])}")


def check_part(saved: Saved, kind: str, name: str, here: Tensor, parameters: Mapping[str, Tensor]) -> None:
    """Raise RunError if what a checkpoint has in the place of a tensor is of another shape or dtype.

    Args:
        here: the tensor, or its local rows.
    """
    whole = extent(name, here, parameters)
    wanted = tuple(here.shape) if whole is None else whole.shape
    if (found := saved.shape(kind, name)) != wanted:
        raise RunError(f"checkpoint {saved.path}: {name} is of shape {found}, and not {wanted}")
    _check_dtype(saved, name, saved.read(kind, name, 0, 0), here)


def read_part(saved: Saved, kind: str, name: str, here: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    """What a checkpoint has in the place of a tensor or its local rows, after `check_part`."""
    stored = local_part(saved, kind, name, parameters)
    _check_dtype(saved, name, stored, here)
    return stored


def _check_dtype(saved: Saved, name: str, stored: Tensor, here: Tensor) -> None:
    if stored.dtype != here.dtype:
        raise RunError(f"checkpoint {saved.path}: {name} is in {stored.dtype}, this model's in {here.dtype}")


def local_part(saved: Saved, kind: str, name: str, parameters: Mapping[str, Tensor]) -> Tensor:
    """The local rows of a stored tensor, or all of it where it is not sharded."""
    shape, found = saved.shape(kind, name), rows_here(name, parameters)
    flat = name.startswith("mask/") and len(shape) == 1  # an older form of packed masks; the pruner takes its rows
    if found is None or not shape or flat:
        return saved.read(kind, name)
    return saved.read(kind, name, *found[1:])
