"""What all importers and exporters share: files of weights, downloads, and an output folder that is complete or absent.

None of it needs transformers: a model folder is JSON and safetensors.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptlab.config import Model
from gptlab.data.tokenizer_files import FILES
from gptlab.errors import HubError
from gptlab.files import because, open_regular, printable, read_json, refuse_pointer
from gptlab.progress import Count, tell_nobody

Stored = dict[str, Callable[[], Tensor]]  # name of a stored tensor -> function that reads the tensor

TOKENIZER_FILES = [*FILES, "vocab.txt", "*.model"]  # the last two are not read: there, the ids are not GPT-2's
WEIGHT_FILES = ["model.safetensors", "model.safetensors.index.json", "model-*.safetensors"]
OLD_WEIGHT_FILES = ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin"]


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


class Plain(dict[str, Any]):
    """Stands for an object of a foreign class, which is not imported: it has the object's fields and no behaviour."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.update(state)


def _dtype(name: Any, *_: Any) -> Plain:
    dtype = Plain()
    dtype["name"] = name
    return dtype


def _scalar(dtype: Any, content: Any) -> Any:
    """A number that numpy pickled, without numpy's own unpickling."""
    if not re.fullmatch(r"[biuf][1248]", dtype["name"]):
        raise pickle.UnpicklingError
    return np.frombuffer(content, "<" + dtype["name"])[0].item()


# Classes whose objects lie in checkpoints beside the weights: settings, paths, and numpy's numbers.
_PLAIN = re.compile(r"[\w.]+\.(\w*(Config|Args|Arguments|Namespace|Path))")
_NUMPY = {
    **dict.fromkeys(("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"), _scalar),
    "numpy.dtype": _dtype,
}


def _stand_ins(file: Path) -> list[Any]:
    """What stands for foreign classes while a file is loaded: (stand-in, name), and the class of which all are."""
    names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    stand_ins = [(_NUMPY.get(name, Plain), name) for name in names if name in _NUMPY or _PLAIN.fullmatch(name)]
    return [*stand_ins, Plain]


def safe_torch_load(file: Path) -> Any:
    """Load a file written by `torch.save`. Only tensors and plain values are unpickled, so no code can run.

    Objects of settings and paths become `Plain`, and numpy's numbers numbers.

    Raises:
        HubError: the file is empty, a pointer or damaged, or holds other Python objects.
    """
    if not file.is_file():
        raise HubError(f"{file} cannot be read: it is not a file")
    refuse_stub(file)
    try:
        zipped = zipfile.is_zipfile(file)
        with torch.serialization.safe_globals(_stand_ins(file) if zipped else []):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
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


def refuse_stub(file: Path) -> None:
    """Raise HubError for a file that is missing, empty, or a Git LFS pointer."""
    try:
        with open_regular(file) as opened:
            begins = opened.read(100)
    except FileNotFoundError:
        raise HubError(f"{file} is missing, but the index names it") from None
    except (OSError, ValueError) as error:
        raise HubError(f"{file} cannot be read: {because(error)}") from None
    if not begins:
        raise HubError(f"{file} is empty: copy or download it again")
    refuse_pointer(file, begins, HubError)


def _stored_safetensors(files: Iterable[Path]) -> Stored:
    stored: Stored = {}
    for file in files:
        refuse_stub(file)
        try:
            handle = safe_open(file, framework="pt")
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
    """The weights of a folder: model.safetensors or pytorch_model.bin, or their shards. Raises HubError if absent."""
    for name, read in (("model.safetensors", _stored_safetensors), ("pytorch_model.bin", _stored_pickles)):
        if (folder / name).is_file():
            return read([folder / name])
        if (index := folder / f"{name}.index.json").is_file():
            named = read_hub_json(index).get("weight_map")
            if not isinstance(named, dict) or not all(isinstance(shard, str) for shard in named.values()):
                raise HubError(f"{index} is damaged: weight_map names no files")
            shards = sorted(set(named.values()))
            if any(Path(shard).name != shard or "\0" in shard for shard in shards):
                raise HubError(f"{index} names files outside its folder")
            return read(folder / shard for shard in shards)
    raise HubError(f"{folder} has no weights: neither model.safetensors, nor pytorch_model.bin, nor an index of shards")


def _stored_pickles(files: Iterable[Path]) -> Stored:
    stored: Stored = {}
    for file in files:
        refuse_stub(file)
        part = stored_state_dict(file, safe_torch_load(file))
        if twice := stored.keys() & part.keys():
            raise HubError(f"{file}: {min(twice)} is also stored in another file")
        stored |= part
    return stored


# What wraps a model in training, and gives its tensors' names a part: torch.compile, DDP, FSDP, DeepSpeed.
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}


def unwrapped(source: Path, stored: Stored) -> Stored:
    """Tensors by the names that the model itself gives them: without wrappers, and without what all names begin with.

    All begin alike where the model is an attribute of another, as in Lightning's checkpoints.
    """
    parts = {name: [part for part in name.split(".") if part not in _WRAPPERS] for name in stored}
    while len(parts) > 1 and len({part[0] for part in parts.values()}) == 1 and min(map(len, parts.values())) > 1:
        parts = {name: part[1:] for name, part in parts.items()}
    tensors: Stored = {}
    for name, read in stored.items():
        own = ".".join(parts[name])
        if own in tensors:
            raise HubError(f"{source}: {own} is stored twice")
        tensors[own] = read
    return tensors


def stored_state_dict(file: Path, state: Any) -> Stored:
    """A loaded state_dict as `Stored`, also one within a checkpoint of Lightning, DeepSpeed or another trainer.

    Raises:
        HubError: it is anything else than a dictionary of tensors.
    """
    if isinstance(state, dict):
        within = (state.get(key) for key in ("state_dict", "model_state_dict", "model", "module"))
        state = next((inner for inner in within if isinstance(inner, dict)), state)
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
    """Copy a stored tensor into a parameter or a slice of one. Raises HubError for another dtype or shape, and NaN."""
    if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise HubError(f"{source}: {name} is stored as {tensor.dtype}: quantised weights cannot be imported")
    if tensor.shape != part.shape:
        raise HubError(f"{source}: {name} has shape {list(tensor.shape)}, not {list(part.shape)}")
    if not torch.isfinite(tensor).all():
        raise HubError(f"{source}: {name} holds NaN or infinity: its training diverged, or the file is damaged")
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
            reason = printable(next(iter(str(error).strip().splitlines()), type(error).__name__))
            raise HubError(
                f"{name} is not a local folder and could not be downloaded from the Hugging Face hub. Check the id, "
                f"the network and, for a gated model, your token (hf auth login). The hub says: {reason}"
            ) from None

    check(fetch("config.json"))
    folder = fetch("config.json", *TOKENIZER_FILES, *WEIGHT_FILES)
    if any(folder.glob("*.safetensors")):
        return folder
    return fetch("config.json", *TOKENIZER_FILES, *OLD_WEIGHT_FILES)


# -- writing --------------------------------------------------------------------------------------------------------


def write_hub_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    written: Count = tell_nobody,
) -> str:
    """Write a safetensors file one tensor at a time. Returns its sha256.

    The library's own writer needs all tensors in host memory at once. The format is eight bytes of length, a JSON
    header padded to eight bytes, and the data, here with the widest types first so that all tensors are aligned.

    Args:
        metadata: texts for the header.
        written: called before each tensor with the bytes that are written, of all.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
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
            written(header[name]["data_offsets"][0], end)
            tensor = tensors[name].detach().cpu().contiguous()
            write(tensor.flatten().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def write_more(folder: Path, more: Mapping[str, bytes] | None) -> None:
    """Write further files of an export, by name; a name may have one folder in it."""
    for name, content in (more or {}).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


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


@contextlib.contextmanager
def export_file(file: str | Path) -> Iterator[Path]:
    """A temporary file to write an export into; it becomes `file` at the end, or is removed after an error.

    Raises:
        HubError: there is such a file.
    """
    file = Path(file).absolute()
    if file.exists():
        raise HubError(f"{file} exists: export into a new file")
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
