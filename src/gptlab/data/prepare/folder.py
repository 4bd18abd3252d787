"""The folder of a dataset while it is prepared: its lock, its settings, and the record for a rerun."""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptlab import locks
from gptlab.data.tokenizer_files import open_tokenizer
from gptlab.data.tokenizers import is_learnt, load_tokenizer
from gptlab.errors import DataError
from gptlab.files import read_json
from gptlab.rundir import write_atomically

RECORD = "progress.json"
DIGESTS = {"source.sha256", "source.listing_sha256"}
ROOM_MARGIN = 1.25  # the estimate of the space needed may be too high by this factor
READER = 2  # changes where documents of the same files are counted in another way


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the folder for one process. Raises DataError if another process has it, or if a file cannot be written."""
    try:
        with locks.hold(folder, DataError(f"{folder} is being prepared by another process")):
            yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DataError(f"no space left for {folder}: make room and run the same again") from None
        raise DataError(f"{error.filename or folder} cannot be written: {error.strerror}") from None


def write_manifest(folder: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """Complete a dataset: write its manifest and remove the record and the temporary files. Returns the manifest."""
    try:
        version = importlib.metadata.version("gptlab")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    manifest = {**fields, "gptlab": version}
    write_atomically(folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    sweep(folder)
    return manifest


def sweep(folder: Path) -> None:
    """Remove the record and the files under hidden names."""
    for path in (*folder.glob(".*.tmp"), folder / RECORD):
        path.unlink(missing_ok=True)


def refuse_other_files(folder: Path, but: str = ".") -> None:
    """Refuse a folder that holds files; hidden files, and those whose names start with `but`, are allowed."""
    others = sorted(path.name for path in folder.glob("*") if not path.name.startswith((".", but)))
    if others:
        raise DataError(f"{folder} holds other files ({', '.join(others[:3])}): name another --out")


def differences(
    folder: Path, found: dict[str, Any], asked: dict[str, Any], tokenizer: Path | str, other: str = "now"
) -> str:
    """Settings in which the manifest of a folder differs from what is asked for, as text; "" if there are none.

    A source or a tokenizer of the same content may have another path.

    Args:
        tokenizer: what is asked for: a name, or the file of another dataset.
        other: says in the text what the values asked for are.
    """

    def flat(manifest: dict[str, Any]) -> dict[str, Any]:
        named = {key: manifest["tokenizer"].get(key) for key in ("name", "source_sha256")}
        parts = {"source": manifest["source"], "tokenizer": named, "": manifest["settings"]}
        values = {f"{part}.{key}".strip("."): value for part, items in parts.items() for key, value in items.items()}
        if not DIGESTS.isdisjoint(values):
            values.pop("source.bytes", None)
        return {"corpus": manifest["corpus"], "format": manifest["format"]} | values

    try:
        old, new = flat(found), flat(asked)
    except (LookupError, AttributeError, TypeError):
        raise DataError(f"{folder} holds a dataset that was not made by `gptlab prepare`: name another --out") from None
    differ = [key for key in old | new if old.get(key) != new.get(key)]
    named = [key for key in differ if key.startswith("tokenizer.")]
    if named and has_tokenizer(folder, tokenizer):
        differ = [key for key in differ if key not in named]
    if not DIGESTS.isdisjoint(old) and DIGESTS.isdisjoint(differ):
        differ = [key for key in differ if key not in ("source.path", "source.url")]
    return ", ".join(f"{key} = {old.get(key)} ({other} {new.get(key)})" for key in differ)


def has_tokenizer(folder: Path, tokenizer: Path | str) -> bool:
    """Whether a folder was made with a tokenizer, whatever its name was. A learnt one is not learnt again to see it."""
    file = folder / "tokenizer.json"
    if not file.is_file() or (isinstance(tokenizer, str) and is_learnt(tokenizer)):
        return False
    asked = load_tokenizer(tokenizer) if isinstance(tokenizer, Path) else open_tokenizer(tokenizer)
    return load_tokenizer(file).identity() == asked.identity()


def refuse_another(folder: Path, found: dict[str, Any], asked: dict[str, Any], tokenizer: str) -> None:
    """Refuse a folder that was made with other settings. Raises DataError, which names them."""
    if text := differences(folder, found, asked, tokenizer):
        raise DataError(f"{folder} was made with {text}: name another --out, or delete the folder to prepare it again")


def read_record(folder: Path, draft: dict[str, Any], tokenizer: str) -> dict[str, Any]:
    """The record of an unfinished preparation: `draft`, the number of documents, the states of the splits; or {}.

    Raises:
        DataError: the folder holds other files, or documents prepared with other settings.
    """
    file = folder / RECORD
    if not file.is_file():
        refuse_other_files(folder)
        return {}
    try:
        record = read_json(file, DataError)
    except DataError as error:
        raise DataError(f"{error}: delete the folder to prepare it again") from None
    refuse_another(folder, record, draft, tokenizer)
    published = "kind" not in draft and "hub" in draft["source"]  # text of the hub is read as ever
    if record.get("reader") != READER and not published:
        raise DataError(
            f"{folder} was begun by an earlier gptlab, which read text in another way: delete the folder to begin again"
        )
    return record


def write_record(folder: Path, draft: dict[str, Any], documents: int, states: dict[str, Any]) -> None:
    record = {**draft, "reader": READER, "documents": documents, "splits": states}
    write_atomically(folder / RECORD, json.dumps(record))


def check_room(folder: Path, written: int, share: float | None) -> None:
    """Refuse a preparation that the disk has no room for.

    Args:
        written: bytes of token ids so far.
        share: share of the source that they come from; nothing is checked if it is unknown.

    Raises:
        DataError: the rest needs more space than is free.
    """
    if not share:
        return
    needed, free = written * (1 / share - 1), shutil.disk_usage(folder).free
    if needed > ROOM_MARGIN * free:
        raise DataError(
            f"{folder} needs about {needed / 1e9:,.2f} GB and {free / 1e9:,.2f} GB are free: "
            "make room, or name a folder on another disk with --out"
        )
