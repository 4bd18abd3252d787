"""The sha256 of prepared files: checked before a run first uses them, and again when a file is not the one checked."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from gptlab import files
from gptlab.errors import DataError
from gptlab.progress import tell_nobody

REMEMBERED_BYTES = 10**8  # smaller datasets are hashed at each start, in a tenth of a second
SAID_BYTES = 10**9  # a second or more of reading is announced
BLOCK = 2**20


def cache_folder() -> Path:
    """Where downloads and records are kept: $XDG_CACHE_HOME/gptlab, or ~/.cache/gptlab."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gptlab"


def file_sha256(path: Path, read: Callable[[int], None] = tell_nobody) -> str:
    """The sha256 of a file, in hexadecimal. `read` is called with the bytes of each block."""
    digest = hashlib.sha256()
    with files.open_regular(path) as file:
        while block := file.read(BLOCK):
            digest.update(block)
            read(len(block))
    return digest.hexdigest()


def verify_files(
    folder: Path,
    recorded: Sequence[tuple[Path, str]],
    again: bool = False,
    read: Callable[[int], None] = tell_nobody,
) -> None:
    """Compare files with the sha256s that a manifest records.

    What was right is remembered in the user's cache folder with the file's size, time and inode, and is not read again
    while these stay. Damage that leaves them as they are, as of a disk, is found with `again`.

    Args:
        folder: of the dataset.
        recorded: (file, sha256).
        again: read every file, remembered or not.
        read: called with the bytes of each block that is read.

    Raises:
        DataError: a file is missing or is not what was written; the sentence names the first.
    """
    record = cache_folder() / f"verified-{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]}.json"
    known: dict[str, object] = {}
    with contextlib.suppress(DataError, OSError):
        known = {} if again else files.read_json(record, DataError)
    now: dict[str, list[object]] = {}
    for path, sha256 in recorded:
        try:
            at = path.stat()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {files.because(error)}") from None
        now[path.name] = [at.st_size, at.st_mtime_ns, at.st_ino, sha256]
    unread = [(path, sha256) for path, sha256 in recorded if known.get(path.name) != now[path.name]]
    if (size := sum(path.stat().st_size for path, _ in unread)) >= SAID_BYTES:
        print(f"{folder}: verifying {size / 1e9:.1f} GB in {len(unread)} files, once", file=sys.stderr, flush=True)
    for path, sha256 in unread:
        try:
            right = file_sha256(path, read) == sha256
        except OSError as error:
            raise DataError(f"{path} cannot be read: {files.because(error)}") from None
        if not right:
            raise DataError(f"{path} is damaged: its sha256 is not the manifest's; prepare the dataset again")
    if unread and sum(path.stat().st_size for path, _ in recorded) >= REMEMBERED_BYTES:
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time alone
            record.parent.mkdir(parents=True, exist_ok=True)
            temporary = record.with_name(f".{record.name}.{os.getpid()}.tmp")
            temporary.write_text(json.dumps(now), encoding="utf-8")
            os.replace(temporary, record)
