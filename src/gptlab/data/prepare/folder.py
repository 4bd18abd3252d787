"""The folder of a dataset while it is prepared: its lock, its settings, and the record for a rerun."""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptlab import locks
from gptlab.errors import DataError
from gptlab.files import read_json
from gptlab.rundir import write_atomically

RECORD = "progress.json"
DIGESTS = {"source.sha256", "source.listing_sha256"}


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


def differences(folder: Path, found: dict[str, Any], asked: dict[str, Any], other: str = "now") -> str:
    """Settings in which the manifest of a folder differs from what is asked for, as text; "" if there are none.

    A source of the same content may have another path. `other` says in the text what the values asked for are.
    """

    def flat(manifest: dict[str, Any]) -> dict[str, Any]:
        tokenizer = {key: manifest["tokenizer"].get(key) for key in ("name", "source_sha256")}
        parts = {"source": manifest["source"], "tokenizer": tokenizer, "": manifest["settings"]}
        values = {f"{part}.{key}".strip("."): value for part, items in parts.items() for key, value in items.items()}
        if not DIGESTS.isdisjoint(values):
            values.pop("source.bytes", None)
        return {"corpus": manifest["corpus"], "format": manifest["format"]} | values

    try:
        old, new = flat(found), flat(asked)
    except (LookupError, AttributeError, TypeError):
        raise DataError(f"{folder} holds a dataset that was not made by `gptlab prepare`: name another --out") from None
    changed = [key for key in old | new if old.get(key) != new.get(key)]
    if not DIGESTS.isdisjoint(old) and DIGESTS.isdisjoint(changed):
        changed = [key for key in changed if key not in ("source.path", "source.url")]
    return ", ".join(f"{key} = {old.get(key)} ({other} {new.get(key)})" for key in changed)


def refuse_another(folder: Path, found: dict[str, Any], asked: dict[str, Any]) -> None:
    """Refuse a folder that was made with other settings. Raises DataError, which names them."""
    if text := differences(folder, found, asked):
        raise DataError(f"{folder} was made with {text}: name another --out, or delete the folder to prepare it again")


def read_record(folder: Path, draft: dict[str, Any]) -> dict[str, Any]:
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
    refuse_another(folder, record, draft)
    return record


def write_record(folder: Path, draft: dict[str, Any], documents: int, states: dict[str, Any]) -> None:
    write_atomically(folder / RECORD, json.dumps({**draft, "documents": documents, "splits": states}))
