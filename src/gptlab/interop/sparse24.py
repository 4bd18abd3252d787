"""Export and import of a GPT whose block matrices are 2:4 sparse. The zeros are not stored, nor multiplied on a GPU.

2:4 means that at most two of any four neighbours along the input dimension of a matrix (rows, cols) are not zero. An
export is a folder of three files, none of them a pickle:

    config.json        {"format": "gptlab-sparse24", "version": 1, "dtype", "model", "matrices": {name: [rows, cols]}}
    tokenizer.json     as in a run directory, if a tokenizer is given
    model.safetensors  for each 2:4 matrix: NAME.values (rows, cols / 2), the two kept weights of each group of four;
                       NAME.places, uint8, one byte for four values: 2 bits for the position of each value in its
                       group, the first value in the lowest bits. All other tensors are dense, under their own names

A 16-bit matrix takes 9 bits per weight, 9/16 of the dense matrix.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gptlab.config import Model
from gptlab.data.tokenizers import Tokenizer, load_tokenizer
from gptlab.errors import HubError
from gptlab.files import because, damaged, read_json
from gptlab.interop import files
from gptlab.model.gpt import GPT, build_model
from gptlab.model.parametrization import folded, plain
from gptlab.progress import Count, tell_nobody

FORMAT, VERSION = "gptlab-sparse24", 1
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# Sizes must be multiples of these for both of PyTorch's backends at 16 bits. cuSPARSELt alone needs 16 x 16.
ROWS, COLS = 32, 64


# -- compression of a matrix ----------------------------------------------------------------------------------------


def compress(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Compress a 2:4 matrix (rows, cols) into values (rows, cols / 2) and places (ceil(rows cols / 8),) uint8."""
    fours = weight.unflatten(1, (-1, 4))  # (rows, cols / 4, 4)
    kept = (fours != 0).to(torch.int8)
    assert (kept.sum(2) <= 2).all(), "the matrix is 2:4"
    places = kept.argsort(dim=2, descending=True, stable=True)[..., :2].sort(dim=2).values  # (rows, cols / 4, 2)
    bits = places.flatten().to(torch.uint8)
    bits = nn.functional.pad(bits, (0, -len(bits) % 4)).view(-1, 4)  # each row becomes one byte
    packed = bits[:, 0] | bits[:, 1] << 2 | bits[:, 2] << 4 | bits[:, 3] << 6
    return fours.gather(2, places).flatten(1), packed


def decompress(values: Tensor, places: Tensor) -> Tensor:
    """The matrix (rows, cols) of the values and places that `compress` returned.

    Raises:
        HubError: the sizes do not match, or two values have the same place.
    """
    rows, half = values.shape
    if half % 2 or places.dtype is not torch.uint8 or places.shape != (-(-values.numel() // 4),):
        raise HubError(f"values {list(values.shape)} and places {list(places.shape)} are not a 2:4 matrix")
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=places.device)
    where = (places[:, None] >> shifts & 3).flatten()[: values.numel()].view(rows, half // 2, 2).long()
    if not (where[..., 0] < where[..., 1]).all():
        raise HubError("two values have the same place")
    return values.new_zeros(rows, half // 2, 4).scatter_(2, where, values.unflatten(1, (-1, 2))).flatten(1)


def block_matrices(model: GPT) -> dict[str, nn.Linear]:
    """The linear layers inside the blocks, by the name of their weight. The embedding and the head stay dense."""
    return {f"h.{name}.weight": layer for name, layer in model.h.named_modules() if isinstance(layer, nn.Linear)}


# -- export and import ----------------------------------------------------------------------------------------------


@torch.no_grad()
def export_sparse24(
    model: GPT,
    tokenizer: Tokenizer | None,
    folder: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    written: Count = tell_nobody,
) -> None:
    """Write a model with 2:4 block matrices as a folder that `load_sparse24` reads.

    Args:
        model: trained with `sparsity.method = "2:4"`.
        tokenizer: None to write the model alone.
        folder: new or empty; it appears complete or not at all.
        dtype: bfloat16 or float16, for all weights, which are rounded to nearest. There are no float32 kernels for
            2:4 matrices.
        written: called with the bytes of weights that are written, of all.

    Raises:
        HubError: a matrix is not 2:4, a weight is not finite in this dtype, or the folder is not empty.
    """
    assert dtype in DTYPES.values(), "2:4 kernels need 16-bit weights"
    matrices, tensors = block_matrices(model), {}
    for name, parameter in model.named_parameters():
        if name in matrices:
            _refuse_dense(name, parameter)
        weight = folded(model.config, name, parameter).to(dtype)
        if not weight.isfinite().all():
            raise HubError(f"{name}: has weights that are not finite in {str(dtype).removeprefix('torch.')}")
        if name in matrices:
            tensors[f"{name}.values"], tensors[f"{name}.places"] = compress(weight)
        else:
            tensors[name] = weight.contiguous()
    config = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": str(dtype).removeprefix("torch."),
        "model": plain(model.config).model_dump(),
        "matrices": {name: list(layer.weight.shape) for name, layer in matrices.items()},
    }
    with files.export_folder(folder) as temporary:
        files.write_hub_json(temporary / "config.json", config)
        if tokenizer is not None:
            files.write_hub_json(temporary / "tokenizer.json", tokenizer.spec())
        files.write_safetensors(temporary / "model.safetensors", tensors, written=written)


def _refuse_dense(name: str, weight: Tensor) -> None:
    """Raise HubError if a matrix is not 2:4."""
    cols = weight.shape[1]
    if cols % 4:
        raise HubError(f"{name}: cannot be 2:4, as its {cols} columns are not a multiple of four")
    kept = weight.unflatten(1, (-1, 4)).count_nonzero(dim=2)  # (rows, cols / 4)
    if (dense := int((kept > 2).sum())) > 0:
        raise HubError(
            f"{name}: is not 2:4: {dense:,} of its {kept.numel():,} groups of four weights have more than two that are "
            "not zero. Train with --sparsity.method 2:4"
        )


def _read_config(folder: Path) -> tuple[Model, torch.dtype]:
    file = folder / "config.json"
    try:
        given = read_json(file, HubError)
    except FileNotFoundError:
        raise HubError(f"{folder} is not a 2:4 model: config.json is missing") from None
    with damaged(file, HubError):
        if (given["format"], given["version"]) != (FORMAT, VERSION):
            raise HubError(f"{file}: the format is not {FORMAT}, version {VERSION}")
        return Model.model_validate(given["model"]), DTYPES[given["dtype"]]


def load_sparse24(
    folder: str | Path, device: torch.device | str = "cpu", semi_structured: bool | Literal["auto"] = "auto"
) -> tuple[GPT, Tokenizer | None]:
    """Load a folder that `export_sparse24` wrote: the model, for inference, and its tokenizer or None.

    Args:
        folder: written by `export_sparse24`.
        device: where the weights go.
        semi_structured: True makes the block matrices `torch.sparse.to_sparse_semi_structured` tensors, which a GPU
            multiplies without the zeros. False makes them dense. "auto" makes them semi-structured if the device
            supports it, else dense with a warning that gives the reason.

    Raises:
        HubError: there is no such folder, it is damaged, or semi_structured is True and the device does not support it.
    """
    folder, device = Path(folder), torch.device(device)
    config, dtype = _read_config(folder)

    @torch.no_grad()
    def init(model: GPT) -> None:
        file, matrices = folder / "model.safetensors", block_matrices(model)
        parameters = dict(model.named_parameters())
        parts = {name: [f"{name}.values", f"{name}.places"] if name in matrices else [name] for name in parameters}
        try:
            with safe_open(file, framework="pt", device=str(device)) as stored:
                expected, there = {part for names in parts.values() for part in names}, set(stored.keys())
                files.check_tensor_names(file, expected - there, there - expected, "model")
                for name, parameter in parameters.items():
                    tensors = [stored.get_tensor(part) for part in parts[name]]
                    try:
                        tensor = decompress(*tensors) if name in matrices else tensors[0]
                    except HubError as error:
                        raise HubError(f"{file}: {name} is damaged: {error}") from None
                    files.copy_stored(file, name, tensor, parameter)
        except HubError:
            raise
        except (OSError, ValueError, SafetensorError) as error:
            raise HubError(f"{file} cannot be read: {because(error)}") from None

    model = build_model(config, device, dtype, init=init).eval().requires_grad_(False)
    if semi_structured:
        reason = to_semi_structured(model)
        if reason and semi_structured is True:
            raise HubError(f"semi_structured = True: {reason}. Use semi_structured = False for dense matrices")
        if reason:
            warnings.warn(f"{folder}: loaded as dense matrices, without a gain in speed: {reason}", stacklevel=2)
    named = folder / "tokenizer.json"
    return model, load_tokenizer(named) if named.is_file() else None


class SemiStructured(nn.Linear):
    """A linear layer with a semi-structured 2:4 weight, for inference."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__(dense.in_features, dense.out_features, dense.bias is not None, device="meta")
        weight = torch.sparse.to_sparse_semi_structured(dense.weight.detach())
        self.weight, self.bias = nn.Parameter(weight, requires_grad=False), dense.bias

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features)
        # The product exists for two dimensions only, and PyTorch does not flatten all strides by itself.
        y = nn.functional.linear(x.flatten(0, -2), self.weight, self.bias)
        return y.contiguous().unflatten(0, x.shape[:-1])  # the result may be transposed, which slows attention down


@torch.no_grad()
def to_semi_structured(model: GPT) -> str:
    """Make the block matrices, which must be 2:4, semi-structured in place.

    Returns:
        "", or the reason why this is not possible here; the model is then unchanged.
    """
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
        made[next(iter(made))](model.wte.weight[:1])  # c_attn; PyTorch may have no kernel for this GPU
    except RuntimeError as error:
        return f"PyTorch says: {str(error).splitlines()[0]}"
    for name, sparse in made.items():
        model.set_submodule(name.removesuffix(".weight"), sparse)
    return ""
