"""manifest.json, the description of a prepared folder, for token shards and for labelled documents."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from gptlab import files
from gptlab.errors import DataError

VERSION = 1
FORMATS = ("llmc", "nanogpt", "npy")
INEXACT = ("token_bytes", "lost_bytes")  # of a split, where the ids do not hold the text byte for byte
MOST_LOST = 0.01  # share of the bytes that may be lost where bits per byte of text are still a measure


def missing_dataset(folder: str | Path, corpus: str = "", tokenizer: str = "") -> DataError:
    """The error for a folder without a prepared dataset; it names the command that prepares one."""
    chosen = ["--tokenizer", tokenizer] if tokenizer else []
    command = shlex.join(["gptlab", "prepare", corpus or "CORPUS", *chosen, "--out", str(folder)])
    return DataError(
        f"no prepared dataset at {folder}: make one with `{command}`, or name another folder with --data.path"
    )


def prepared_folder(folder: str | Path, corpus: str = "", tokenizer: str = "") -> Path:
    """The folder of a dataset that should have been prepared from `corpus` with `tokenizer`.

    Raises:
        DataError: the folder does not exist; the message names the command that prepares it.
    """
    if not Path(folder).is_dir():
        raise missing_dataset(folder, corpus, tokenizer)
    return Path(folder)


def corpus_of(manifest: dict[str, Any]) -> str:
    """What a dataset was prepared from, as `gptlab prepare` takes it: a name, or the path of text; "" if not known."""
    corpus, source = str(manifest.get("corpus") or ""), manifest.get("source")
    path = source.get("path") if isinstance(source, dict) else None
    return path if corpus == "text" and isinstance(path, str) else corpus


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
        manifest = files.read_json(path, DataError)
    except DataError as error:
        raise DataError(f"{error}: prepare the dataset again") from None
    with files.damaged(path, DataError):
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
    return manifest


def lost_share(manifest: dict[str, Any]) -> float:
    """The share of the text's bytes that do not come back from its ids."""
    splits = manifest["splits"].values()
    return sum(split.get("lost_bytes", 0) for split in splits) / max(sum(split.get("bytes", 0) for split in splits), 1)


def _check_shards(path: Path, manifest: dict[str, Any]) -> None:
    """Check the fields that `shards.Dataset` reads."""
    has(manifest, {"corpus": str, "tokenizer": dict, "dtype": str, "splits": dict})
    has(manifest["tokenizer"], {"vocab_size": int})
    files.check_fields(manifest["tokenizer"], {"sha256": str, "name": str})
    if manifest["dtype"] not in ("uint16", "uint32"):
        raise ValueError(f"dtype = {manifest['dtype']}")
    for split in ("train", "val"):
        files.check_fields(manifest["splits"][split], dict.fromkeys(("bytes", *INEXACT), int))
        for entry in manifest["splits"][split]["shards"]:
            has(entry, {"file": str, "tokens": int, "max_token": int, "sha256": str})
            if Path(entry["file"]).name != entry["file"] or "\0" in entry["file"]:
                raise DataError(f"{path} names a shard outside its folder: {entry['file']}")
            if not 0 <= entry["tokens"] < 2 ** (31 if manifest["format"] == "llmc" else 40):
                raise ValueError(f"tokens = {entry['tokens']}")


def has(content: dict[str, Any], fields: dict[str, Any]) -> None:
    """Raises LookupError or ValueError where a field is missing, null or of another kind."""
    for name in fields:
        if content[name] is None:
            raise ValueError(f"{name} is null")
    files.check_fields(content, fields)
