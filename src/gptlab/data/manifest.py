"""manifest.json, the description of a prepared folder, for token shards and for labelled documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from gptlab.errors import DataError

VERSION = 1
FORMATS = ("llmc", "nanogpt", "npy")


def missing_dataset(folder: str | Path, corpus: str = "CORPUS", tokenizer: str = "") -> DataError:
    """The error for a folder without a prepared dataset; it names the command that prepares one."""
    chosen = f" --tokenizer {tokenizer}" if tokenizer else ""
    return DataError(
        f"no prepared dataset at {folder}: make one with `gptlab prepare {corpus}{chosen} --out {folder}`, "
        "or name another folder with --data.path"
    )


def prepared_folder(folder: str | Path, corpus: str = "CORPUS", tokenizer: str = "") -> Path:
    """The folder of a dataset that should have been prepared from `corpus` with `tokenizer`.

    Raises:
        DataError: the folder does not exist; the message names the command that prepares it.
    """
    if not Path(folder).is_dir():
        raise missing_dataset(folder, corpus, tokenizer)
    return Path(folder)


def refuse_unfinished(folder: Path) -> None:
    """Refuse a folder that is being prepared, or that holds parts. Raises DataError, which names the command."""
    if (folder / "progress.json").is_file():
        raise DataError(f"{folder} is not finished: run the same `gptlab prepare` again to continue")
    if next(folder.glob("part-*-of-*"), None):
        raise DataError(f"{folder} holds parts of a dataset: `gptlab prepare ... --merge` makes a dataset of them")


def read_manifest(folder: Path, labeled: bool = False) -> dict[str, Any]:
    """The checked manifest of a folder, of labelled documents or of token shards.

    Raises:
        DataError: the manifest is damaged, of the other kind of dataset, or of an unknown version.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        refuse_unfinished(folder)
        raise missing_dataset(folder)
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kind, version, format = manifest.get("kind"), manifest.get("version"), manifest.get("format")
        if labeled and kind != "labeled":
            raise DataError(
                f"{folder} is a dataset without labels, for task = lm: prepare a labelled corpus with "
                "`gptlab prepare CORPUS --out DIR`, or a file with --label-field"
            )
        if kind == "labeled" and not labeled:
            raise DataError(
                f"{folder} holds labelled documents, for task = classify: name another dataset with --data.path"
            )
        if version != VERSION or format not in FORMATS:
            raise DataError(f"{path} has version {version} and format {format}, which this gptlab does not know")
        if not labeled:
            _check_shards(path, manifest)
    except DataError:
        raise
    except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error}): prepare the dataset again") from None
    return manifest


def _check_shards(path: Path, manifest: dict[str, Any]) -> None:
    """Check the fields that `shards.Dataset` reads."""
    int(manifest["tokenizer"]["vocab_size"])
    np.dtype(manifest["dtype"])
    for split in ("train", "val"):
        for entry in manifest["splits"][split]["shards"]:
            int(entry["tokens"]), int(entry["max_token"]), str(entry["sha256"])
            if Path(entry["file"]).name != entry["file"]:
                raise DataError(f"{path} names a shard outside its folder: {entry['file']}")
