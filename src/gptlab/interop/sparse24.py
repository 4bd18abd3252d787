"""A model whose blocks' matrices are 2:4 sparse, stored without their zeros and multiplied without them on a GPU.

2:4 means that of four neighbours along the input dimension of a matrix (rows, cols) at most two are not zero. A folder
has three files, none of them a pickle:

    config.json        {"format": "gptlab-sparse24", "version": 1, "dtype", "model", "matrices": {name: [rows, cols]}}
    tokenizer.json     as in a run directory, where a tokenizer is given
    model.safetensors  of each such matrix NAME.values (rows, cols / 2), the two that are kept of each four, and
                       NAME.places, a byte for each four of those: 2 bits say where among its four neighbours each
                       stood, the first value's lowest; all else dense under its own name

In 16 bits that is 9/16 of the dense matrix: 9 bits a weight.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gptlab.config import Model
from gptlab.data.tokenizers import Tokenizer, load_tokenizer
from gptlab.errors import UserError
from gptlab.interop.hf import copy_stored, refuse_others
from gptlab.model.gpt import GPT, build_model

FORMAT, VERSION = "gptlab-sparse24", 1
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# What both of PyTorch's libraries take in 16 bits; its cuSPARSELt alone is content with multiples of 16 x 16.
ROWS, COLS = 32, 64


# -- four weights, two of them kept ---------------------------------------------------------------------------------


def compress(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Values (rows, cols / 2) and places (ceil(rows cols / 8),) uint8 of a 2:4 matrix (rows, cols)."""
    fours = weight.unflatten(1, (-1, 4))  # (rows, cols / 4, 4)
    kept = (fours != 0).to(torch.int8)
    assert (kept.sum(2) <= 2).all(), "the matrix is 2:4"
    places = kept.argsort(dim=2, descending=True, stable=True)[..., :2].sort(dim=2).values  # (rows, cols / 4, 2)
    bits = places.flatten().to(torch.uint8)
    bits = nn.functional.pad(bits, (0, -len(bits) % 4)).view(-1, 4)  # a byte each
    packed = bits[:, 0] | bits[:, 1] << 2 | bits[:, 2] << 4 | bits[:, 3] << 6
    return fours.gather(2, places).flatten(1), packed


def decompress(values: Tensor, places: Tensor) -> Tensor:
    """The matrix (rows, cols) that `compress` took apart.

    Raises:
        UserError: sizes that do not belong together, or two values in one place.
    """
    rows, half = values.shape
    if half % 2 or places.dtype is not torch.uint8 or places.shape != (-(-values.numel() // 4),):
        raise UserError(f"values {list(values.shape)} and places {list(places.shape)} are no 2:4 matrix")
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=places.device)
    where = (places[:, None] >> shifts & 3).flatten()[: values.numel()].view(rows, half // 2, 2).long()
    if not (where[..., 0] < where[..., 1]).all():
        raise UserError("two values stand in one place")
    return values.new_zeros(rows, half // 2, 4).scatter_(2, where, values.unflatten(1, (-1, 2))).flatten(1)


def block_matrices(model: GPT) -> dict[str, nn.Linear]:
    """The linear layers inside the blocks, by the name of their weight; the embedding and the head stay dense."""
    return {f"h.{name}.weight": layer for name, layer in model.h.named_modules() if isinstance(layer, nn.Linear)}


# -- to and from a folder -------------------------------------------------------------------------------------------


@torch.no_grad()
def export_sparse24(
    model: GPT, tokenizer: Tokenizer | None, folder: str | Path, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write a model whose blocks' matrices are 2:4 as a folder that `load_sparse24` reads.

    Args:
        model: as `sparsity.method = "2:4"` trains it.
        tokenizer: None to write the model alone.
        folder: new or empty; it appears complete or not at all.
        dtype: of every weight in the folder, bfloat16 or float16: the kernels for 2:4 matrices take no float32. The
            weights are rounded to nearest.

    Raises:
        UserError: a matrix is not 2:4, a weight is not finite in this dtype, or the folder has something in it.
    """
    folder = Path(folder).absolute()
    assert dtype in DTYPES.values(), "2:4 kernels take 16 bits"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty: export into a new folder")
    matrices, tensors = block_matrices(model), {}
    for name, parameter in model.named_parameters():
        if name in matrices:
            _refuse_dense(name, parameter)
        weight = parameter.to(dtype)
        if not weight.isfinite().all():
            raise UserError(f"{name}: has weights that are not finite in {str(dtype).removeprefix('torch.')}")
        if name in matrices:
            tensors[f"{name}.values"], tensors[f"{name}.places"] = compress(weight)
        else:
            tensors[name] = weight.contiguous()
    config = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": str(dtype).removeprefix("torch."),
        "model": model.config.model_dump(),
        "matrices": {name: list(layer.weight.shape) for name, layer in matrices.items()},
    }
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of an export that was killed
    temporary.mkdir(parents=True)
    try:
        _write_json(temporary / "config.json", config)
        if tokenizer is not None:
            _write_json(temporary / "tokenizer.json", tokenizer.spec())
        save_file(tensors, temporary / "model.safetensors")
        temporary.replace(folder)  # an empty folder gives way to it
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _refuse_dense(name: str, weight: Tensor) -> None:
    """Raise UserError where a matrix is not 2:4."""
    cols = weight.shape[1]
    if cols % 4:
        raise UserError(f"{name}: has rows of {cols} weights, not a multiple of four, so it cannot be 2:4")
    kept = weight.unflatten(1, (-1, 4)).count_nonzero(dim=2)  # (rows, cols / 4)
    if (dense := int((kept > 2).sum())) > 0:
        raise UserError(
            f"{name}: is not 2:4, {dense:,} of its {kept.numel():,} groups of four have more than two weights that are "
            "not zero; a run with --sparsity.method 2:4 trains such a model"
        )


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_config(folder: Path) -> tuple[Model, torch.dtype]:
    file = folder / "config.json"
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
        if (given["format"], given["version"]) != (FORMAT, VERSION):
            raise UserError(f"{file}: is not of format {FORMAT}, version {VERSION}")
        return Model.model_validate(given["model"]), DTYPES[given["dtype"]]
    except FileNotFoundError:
        raise UserError(f"{folder} is no 2:4 model: it has no config.json") from None
    except (OSError, json.JSONDecodeError, KeyError, TypeError, ValidationError) as error:
        raise UserError(f"{file} cannot be read: {type(error).__name__}: {str(error).splitlines()[0]}") from None


def load_sparse24(
    folder: str | Path, device: torch.device | str = "cpu", semi_structured: bool | Literal["auto"] = "auto"
) -> tuple[GPT, Tokenizer | None]:
    """The model of a folder that `export_sparse24` wrote, for inference, and its tokenizer where it has one.

    Args:
        folder: where it is.
        device: where the weights go.
        semi_structured: true: the blocks' matrices become `torch.sparse.to_sparse_semi_structured` tensors, which a
            GPU multiplies without their zeros; false: dense matrices with zeros in them; auto: the first where this
            device can, else the second with a warning that says why.

    Raises:
        UserError: no such folder, a damaged one, or true where it cannot be.
    """
    folder, device = Path(folder), torch.device(device)
    config, dtype = _read_config(folder)

    @torch.no_grad()
    def fill(model: GPT) -> None:
        file, matrices = folder / "model.safetensors", block_matrices(model)
        parameters = dict(model.named_parameters())
        parts = {name: [f"{name}.values", f"{name}.places"] if name in matrices else [name] for name in parameters}
        try:
            with safe_open(file, framework="pt", device=str(device)) as stored:
                expected, there = {part for names in parts.values() for part in names}, set(stored.keys())
                refuse_others(file, expected - there, there - expected, "model")
                for name, parameter in parameters.items():
                    tensors = [stored.get_tensor(part) for part in parts[name]]
                    try:
                        tensor = decompress(*tensors) if name in matrices else tensors[0]
                    except UserError as error:
                        raise UserError(f"{file}: {name} is damaged: {error}") from None
                    copy_stored(file, name, tensor, parameter)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} cannot be read: {error}") from None

    model = build_model(config, device, dtype, init=fill).eval().requires_grad_(False)
    if semi_structured:
        reason = to_semi_structured(model)
        if reason and semi_structured is True:
            raise UserError(f"semi_structured: {reason}; semi_structured = False loads dense matrices")
        if reason:
            warnings.warn(f"{folder} is loaded as dense matrices, which gain nothing: {reason}", stacklevel=2)
    named = folder / "tokenizer.json"
    return model, load_tokenizer(named) if named.is_file() else None


class SemiStructured(nn.Linear):
    """A linear layer over a 2:4 matrix that is semi-structured; for inference."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__(dense.in_features, dense.out_features, dense.bias is not None, device="meta")
        weight = torch.sparse.to_sparse_semi_structured(dense.weight.detach())
        self.weight, self.bias = nn.Parameter(weight, requires_grad=False), dense.bias

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features)
        # there is a product for two dimensions only, and for some strides PyTorch would not fold more into two
        y = nn.functional.linear(x.flatten(0, -2), self.weight, self.bias)
        return y.contiguous().unflatten(0, x.shape[:-1])  # it may come transposed, which attention's kernels dislike


@torch.no_grad()
def to_semi_structured(model: GPT) -> str:
    """Make the blocks' matrices, 2:4 already, semi-structured in place. Returns why not; then all is as it was."""
    device = model.device
    if device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"device {device}"
        return f"2:4 kernels need an NVIDIA GPU of compute capability 8.0 or more, not {name}"
    layers = block_matrices(model)
    for name, layer in layers.items():
        rows, cols = layer.weight.shape
        if rows % ROWS or cols % COLS:
            return f"{name}: {rows} x {cols} is not a multiple of {ROWS} x {COLS}"
    try:
        made = {name: SemiStructured(layer) for name, layer in layers.items()}
        made[next(iter(made))](model.wte.weight[:1])  # c_attn; a library may have no kernel for this GPU
    except RuntimeError as error:
        return f"PyTorch says: {str(error).splitlines()[0]}"
    for name, sparse in made.items():
        model.set_submodule(name.removesuffix(".weight"), sparse)
    return ""
