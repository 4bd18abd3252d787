"""Tensors on disk: safetensors files, which rows of a tensor are where, and the optimizer's state by name."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from gptlab.distributed.shard import Weights, shard_spec
from gptlab.errors import RunError
from gptlab.optim.optimizers import plain_tensors
from gptlab.precision.libraries import load_library

BLOCK = 256  # numbers that share a scale in 8-bit moments
SCALES, TABLES = ("scale", "absmax1", "absmax2"), ("qmap", "qmap1", "qmap2")  # of torchao's and bitsandbytes'

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
    """Write a safetensors file one tensor at a time. Returns its sha256.

    The library's own writer needs all tensors in host memory at once. The format is eight bytes of length, a JSON
    header padded to eight bytes, and the data, here with the widest types first so that all tensors are aligned.
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
    """The rows of a whole tensor that a rank holds, from `start` on."""

    shape: tuple[int, ...]
    start: int = 0


class Saved:
    """The tensors of a checkpoint, however many ranks wrote it.

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
        """Names of the tensors of a kind: model, optimizer or sparsity."""
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


def load_optimizer_tensors(
    model: Weights, optimizer: torch.optim.Optimizer, tensors: Iterable[tuple[str, Tensor]], kinds: set[str]
) -> None:
    """Load the state that `optimizer_tensors` returned, one tensor at a time.

    Args:
        kinds: the parts of the names before the slash.

    Raises:
        RunError: the 8-bit moments are of another library than this optimizer.
    """
    library = "bitsandbytes" if "state1" in kinds else "torchao" if "exp_avg.codes" in kinds else ""
    if not type(optimizer).__module__.startswith(library):
        raise RunError(f"the 8-bit moments are {library}'s: resume this run on the type of device on which it began")
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
            state[kind] = value  # the optimizer moves it to its device
        elif part:
            quantized.setdefault((name, kind), {})[part] = value.to(p.device)
        elif kind == "step" and not optimizer.defaults.get("fused"):
            state[kind] = value  # stays on the CPU; only fused AdamW counts on the weights' device
        else:
            state[kind] = value.to(p.device)
    for (name, kind), parts in quantized.items():
        subclass = load_library("torchao.optim.subclass_8bit", "optim.name = adamw_8bit", "OptimState8bit")
        p, signed = parameters[name], bool(parts["qmap"].min() < 0)
        optimizer.state[p][kind] = subclass.OptimState8bit(**parts, signed=signed, dtype=p.dtype)


def local_part(saved: Saved, kind: str, name: str, parameters: Mapping[str, Tensor]) -> Tensor:
    """The local rows of a stored tensor, or all of it where it is not sharded."""
    shape, found = saved.shape(kind, name), rows_here(name, parameters)
    flat = name.startswith("mask/") and len(shape) == 1  # an older form of packed masks; the pruner takes its rows
    if found is None or not shape or flat:
        return saved.read(kind, name)
    return saved.read(kind, name, *found[1:])
