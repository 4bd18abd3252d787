"""What all importers and exporters share: files of weights, downloads, and an output folder that is complete or absent.

None of it needs transformers: a model folder is JSON and safetensors.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptlab.config import Model
from gptlab.errors import HubError
from gptlab.files import because, read_json

Stored = dict[str, Callable[[], Tensor]]  # name of a stored tensor -> function that reads the tensor

TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"]
WEIGHT_FILES = ["model.safetensors", "model.safetensors.index.json", "model-*.safetensors"]


# -- reading --------------------------------------------------------------------------------------------------------


def read_hub_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a Hugging Face folder. Raises HubError if the file is missing or damaged."""
    try:
        return read_json(file, HubError)
    except FileNotFoundError:
        raise HubError(f"{file.parent} is not a Hugging Face model: {file.name} is missing") from None


def imported_shape(file: Path, mlp_width: int, **settings: Any) -> Model:
    """A validated `Model`. mlp_width becomes 0 if it equals the default width. Raises HubError for an invalid shape."""
    try:
        config = Model(mlp_width=mlp_width, **settings)
    except ValidationError as error:
        problem = error.errors()[0]
        what = f"model.{problem['loc'][0]} = {problem['input']}: " if problem["loc"] else ""
        raise HubError(f"{file}: gptlab cannot build this model: {what}{problem['msg']}") from None
    if not config.vocab_size:
        raise HubError(f"{file}: gptlab cannot build this model: model.vocab_size = 0")
    default = config.model_copy(update={"mlp_width": 0})
    return default if default.mlp_hidden == config.mlp_hidden else config


def safe_torch_load(file: Path) -> Any:
    """Load a file written by `torch.save`. Only tensors and plain values are unpickled, so no code can run.

    Raises:
        HubError: the file is damaged or holds other Python objects.
    """
    if not file.is_file():
        raise HubError(f"{file} cannot be read: it is not a file")
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError:
        raise HubError(
            f"{file} is not loaded: it is damaged, or a pickle of Python objects other than tensors and plain values, "
            "which could run code"
        ) from None
    except OSError as error:
        raise HubError(f"{file} cannot be read: {because(error)}") from None
    except Exception as error:  # of a damaged file, the unpickler raises IndexError, KeyError, UnicodeDecodeError, ...
        raise HubError(
            f"{file} cannot be read: it is damaged, or torch.save did not write it ({because(error)})"
        ) from None


def _stored_safetensors(files: Iterable[Path]) -> Stored:
    stored: Stored = {}
    for file in files:
        try:
            handle = safe_open(file, framework="pt")
        except FileNotFoundError:
            raise HubError(f"{file} is missing, but the index names it") from None
        except (SafetensorError, OSError, ValueError) as error:
            raise HubError(f"{file} cannot be read: {because(error)}") from None
        for name in handle.keys():  # noqa: SIM118  (the handle is not a dictionary)
            if name in stored:
                raise HubError(f"{file}: {name} is also stored in another file")
            stored[name] = partial(_read_tensor, file, handle, name)
    return stored


def _read_tensor(file: Path, handle: Any, name: str) -> Tensor:
    try:
        tensor: Tensor = handle.get_tensor(name)
        return tensor
    except Exception as error:  # of safetensors or torch: a dtype it lacks, a file cut off meanwhile
        raise HubError(f"{file}: {name} cannot be read: {because(error)}") from None


def stored_weights(folder: Path) -> Stored:
    """The weights of a folder: model.safetensors, its shards, or else pytorch_model.bin. Raises HubError if absent."""
    if (folder / "model.safetensors").is_file():
        return _stored_safetensors([folder / "model.safetensors"])
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = read_hub_json(index).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(shard, str) for shard in named.values()):
            raise HubError(f"{index} is damaged: weight_map names no files")
        shards = sorted(set(named.values()))
        if any(Path(shard).name != shard or "\0" in shard for shard in shards):
            raise HubError(f"{index} names files outside its folder")
        return _stored_safetensors(folder / shard for shard in shards)
    if (folder / "pytorch_model.bin").is_file():
        return stored_state_dict(folder / "pytorch_model.bin", safe_torch_load(folder / "pytorch_model.bin"))
    raise HubError(f"{folder} has no weights: neither model.safetensors, nor an index of shards, nor pytorch_model.bin")


def stored_state_dict(file: Path, state: Any) -> Stored:
    """A loaded state_dict as `Stored`. Raises HubError if it is anything else than a dictionary of tensors."""
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized
        for name, value in state.items()
    ):
        raise HubError(f"{file} does not hold a dictionary of tensors, which are dense and have names")
    return {name: partial(state.__getitem__, name) for name in state}


def check_tensor_names(source: Path, missing: Set[str], foreign: Set[str], model: str) -> None:
    """Raise HubError if a source lacks tensors of our model, or has tensors that our model lacks."""
    for problem, found in (("lacks", missing), (f"has tensors that our {model} lacks:", foreign)):
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise HubError(f"{source} {problem} {', '.join(sorted(found)[:3])}{more}")


def copy_stored(source: Path, name: str, tensor: Tensor, part: Tensor) -> None:
    """Copy a stored tensor into a parameter or a slice of a parameter. Raises HubError if dtype or shape differ."""
    if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise HubError(f"{source}: {name} is stored as {tensor.dtype}: quantised weights cannot be imported")
    if tensor.shape != part.shape:
        raise HubError(f"{source}: {name} has shape {list(tensor.shape)}, not {list(part.shape)}")
    part.copy_(tensor)


def download(name: str, check: Callable[[Path], object]) -> Path:
    """Download a Hugging Face id such as `openai-community/gpt2` into the hub's cache and return the folder.

    Args:
        name: the id.
        check: is called with a folder that holds config.json only, before the weights are downloaded. It raises
            HubError for a model that cannot be imported.

    Raises:
        HubError: the id does not exist, the network does not answer, or `check` refused the model.
    """
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.endswith((".pt", ".bin", ".safetensors")):
        raise HubError(f"{name}: no such file or folder, and not a Hugging Face id")
    from huggingface_hub import snapshot_download  # importing it takes half a second

    def fetch(*patterns: str) -> Path:
        try:
            return Path(snapshot_download(name, allow_patterns=list(patterns)))
        except Exception as error:  # errors of the hub, the network and the disk have no common base class
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise HubError(
                f"{name} is not a local folder and could not be downloaded from the Hugging Face hub. Check the id, "
                f"the network and, for a gated model, your token (hf auth login). The hub says: {reason}"
            ) from None

    check(fetch("config.json"))
    folder = fetch("config.json", *TOKENIZER_FILES, *WEIGHT_FILES)
    if any(folder.glob("*.safetensors")):
        return folder
    return fetch("config.json", *TOKENIZER_FILES, "pytorch_model.bin")


# -- writing --------------------------------------------------------------------------------------------------------


def write_hub_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def export_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder to write an export into; it becomes `folder` at the end, or is removed after an error.

    Raises:
        HubError: the folder exists and is not empty.
    """
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise HubError(f"{folder} exists and is not empty: export into a new folder")
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left behind by an export that was killed
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.replace(folder)  # replaces an empty folder
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
