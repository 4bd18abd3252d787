"""Runs of Weights & Biases as they lie on disk: run-ID.wandb in wandb/offline-run-DATE-ID/ or wandb/run-DATE-ID/.

Such a file is a log of LevelDB's form whose records are protocol buffers. The package wandb has no reader of it any
more, and none is needed: this module takes the few fields apart that make curves, settings and a summary.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

from gptlab.errors import DataError
from gptlab.files import because, damaged, parse_json, printable, read_bytes
from gptlab.logs.rows import Points, curves, dotted, is_number, name_run, read_each
from gptlab.logs.run import How, LogRun

HEADER = b":W&B\xe1\xbe\x00"  # with the version, 0
BLOCK = 32768  # bytes; no record's head crosses from one to the next
WHOLE, FIRST, LAST = 1, 2, 4  # what of a record a piece holds; 3 is a middle
HISTORY, SUMMARY, CONFIG, METRIC, RUN, EXIT = 2, 3, 5, 12, 17, 18  # numbers of the kinds of record


@dataclass
class Content:
    """What the files of one run hold."""

    name: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, float]] = field(default_factory=list)
    axes: list[tuple[str, str]] = field(default_factory=list)
    """Metrics, or patterns of them, and the metric that is their step (`define_metric`)."""
    summary: dict[str, float] = field(default_factory=dict)
    exit: int | None = None
    remarks: list[str] = field(default_factory=list)


def is_mine(path: Path) -> bool:
    if not os.path.isdir(path):
        return path.suffix == ".wandb" and os.path.isfile(path)
    return bool(_files(path)[0])


def read(path: Path, how: How) -> list[LogRun]:
    """Read the run in a file or a run's folder, or all that are in a folder wandb/. Pieces of a run are put together.

    Raises:
        DataError: nothing can be read.
    """
    files, faults = _files(path) if os.path.isdir(path) else ([path], [])
    pieces: dict[str, list[Path]] = {}
    for file in files:
        pieces.setdefault(file.stem, []).append(file)
    return read_each(pieces.values(), lambda same: _read(same, how), f"{path} holds no run of W&B", faults)


def _files(folder: Path) -> tuple[list[Path], list[str]]:
    """The files of the runs in a folder, by date, and what cannot be read: its own, else those of folders in it."""
    faults = list[str]()

    def inside(folder: Path, begins: str | tuple[str, ...], ends: str) -> list[Path]:
        try:
            return [folder / name for name in os.listdir(folder) if name.startswith(begins) and name.endswith(ends)]
        except OSError as fault:
            faults.append(f"{folder} cannot be read: {because(fault)}")
            return []

    found = inside(folder, "", ".wandb")
    if not found:
        below = [run for run in inside(folder, ("offline-run-", "run-"), "") if os.path.isdir(run)]
        found = [file for run in below for file in inside(run, "run-", ".wandb")]
    mine = [file for file in found if os.path.isfile(file)]
    return sorted(mine, key=lambda file: (file.parent.name.removeprefix("offline-"), file.name)), faults


def _read(files: list[Path], how: How) -> LogRun:
    """Read a run from its pieces: each resume makes one."""
    content = Content()
    for file in files:
        content.exit = None  # of the last one it counts
        try:
            for record in _records(file, content.remarks):
                with damaged(file, DataError):
                    _take(record, content)
        except DataError as fault:  # what is before it, and other pieces, are as good as ever
            content.remarks.append(str(fault))
    source = files[-1] if len(files) == 1 else files[-1].parent
    points = _points(content, how, source)
    result = {name: value for name, value in content.summary.items() if name not in points and name[:1] != "_"}
    if not points and (content.exit is None or not result):  # what a run that was killed says last is no result
        raise DataError((content.remarks or [f"{files[-1]} holds no metric"])[0])
    status = "unfinished" if content.exit is None else "failed" if content.exit else "completed"
    name = content.name or files[-1].stem.removeprefix("run-")
    with damaged(files[-1], DataError):
        run = LogRun(
            source, "wandb", curves(points), name=name, status=status, settings=content.settings, result=result
        )
    run.remarks = content.remarks
    return name_run(run, how)


def _points(content: Content, how: How, source: Path) -> Points:
    """The points of each metric over its step: the caller's, the one that `define_metric` gave it, or W&B's own."""
    points, places = Points(), dict[str, float]()
    names = {name for row in content.rows for name in row if not name.startswith("_")}
    axis = {name: how.step or _axis(name, content.axes) for name in names}
    seen = dict[str, float]()
    for row in content.rows:  # a metric of which a point has no such step is over W&B's own
        seen |= row
        axis |= {name: "_step" for name in row if name in axis and axis[name] not in seen}
    if how.step and (without := sorted(name for name, step in axis.items() if step != how.step)):
        said = printable(", ".join(without[:3])) + (f" and {len(without) - 3} more" if len(without) > 3 else "")
        content.remarks.append(f"{source} logs {said} without {how.step}: they are over W&B's own step")
    for row in content.rows:
        places |= row
        for name, value in row.items():
            if name in axis and name != axis[name]:
                steps, values = points.setdefault(name, ([], []))
                steps.append(places[axis[name]])
                values.append(value)
    return points


def _axis(name: str, axes: list[tuple[str, str]]) -> str:
    exact = [step for metric, step in axes if metric == name]
    globs = [step for metric, step in axes if step != name and fnmatchcase(name, metric)]
    return (exact or globs or ["_step"])[-1]


# -- the records ----------------------------------------------------------------------------------------------------


def _records(file: Path, remarks: list[str]) -> Iterator[bytes]:
    """The records of a file. It may end anywhere, as that of a run that was killed does; then a remark says so."""
    try:
        content = read_bytes(file)
    except OSError as fault:
        raise DataError(f"{file} cannot be read: {because(fault)}") from None
    if not content.startswith(HEADER):
        raise DataError(f"{file} is damaged: it does not begin as a run of W&B does")
    at, parts, start = len(HEADER), b"", len(HEADER)
    while at < len(content):
        room = BLOCK - at % BLOCK
        if room < 7:
            at += room
            continue
        end = at + 7
        if end <= len(content):
            checksum, length, kind = struct.unpack_from("<IHB", content, at)
            end += length
        if end > len(content) or length > room - 7 or zlib.crc32(content[at + 6 : end]) != checksum:
            break
        parts = (b"" if kind in (WHOLE, FIRST) else parts) + content[at + 7 : end]
        at = end
        if kind in (WHOLE, LAST):
            yield parts
            parts, start = b"", at
    if start < len(content) and (at < len(content) or parts):
        remarks.append(
            f"{file} is cut off or damaged after byte {start:,} of {len(content):,}: what is before it was read"
        )


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer: their numbers, and a whole number or the bytes."""
    at, end = 0, len(message)
    while at < end:
        key = message[at]
        at += 1
        if key > 127:
            key, at = _varint(message, at - 1)
        kind = key & 7
        if kind == 1:
            size = 8
        elif kind == 5:
            size = 4
        elif kind in (0, 2):
            size = message[at]  # of a number: the number itself
            at += 1
            if size > 127:
                size, at = _varint(message, at - 1)
        else:
            raise ValueError(f"a field of unknown kind {kind}")
        if kind == 0:
            yield key >> 3, size
            continue
        if at + size > end:
            raise ValueError("a field is longer than its record")
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A whole number of seven bits a byte, the lowest first, and where it ends."""
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7


def _take(record: bytes, content: Content) -> None:
    """Add what a record says."""
    for kind, body in _fields(record):
        if kind == HISTORY:
            content.rows.append({"_step": float(len(content.rows)), **_row(body)})
        elif kind == SUMMARY and b"_step" not in body:  # W&B also repeats each line of history here
            content.summary |= {key: number for key, value in _items(body) if (number := _number(value)) is not None}
        elif kind == CONFIG:
            _configure(body, content)
        elif kind == METRIC:
            said = dict(_fields(body))
            content.axes.append(((said.get(1) or said.get(2, b"")).decode(), said.get(4, b"_step").decode()))
        elif kind == RUN:
            said = dict(_fields(body))
            content.name = (said.get(8) or said.get(1, b"")).decode()
            for number, setting in ((3, "project"), (6, "group"), (7, "job_type")):
                if said.get(number):
                    content.settings.setdefault(setting, said[number].decode())
            _configure(said.get(4, b""), content)
        elif kind == EXIT:
            content.exit = dict(_fields(body)).get(1, 0)


def _row(body: bytes) -> dict[str, float]:
    """The numbers of a line of history."""
    row: dict[str, float] = {}
    for number, value in _fields(body):
        if number == 1:
            key, said = _item(value)
            if (known := _number(said)) is not None:
                row[key] = known
            elif isinstance(said, bytes) and said.startswith(b"{"):  # versions before 0.18 nest here
                inner = dotted({key: parse_json(said)})
                row |= {name: number for name, number in inner.items() if is_number(number)}
        elif number == 2:
            row.setdefault("_step", float(dict(_fields(value)).get(1, 0)))
    return row


def _items(body: bytes) -> Iterator[tuple[str, Any]]:
    return (_item(value) for number, value in _fields(body) if number == 1)


def _item(item: bytes) -> tuple[str, Any]:
    """Dotted name and value: JSON, as bytes, or a number."""
    key, said = b"", cast(Any, b"")
    for number, value in _fields(item):
        if number in (16, 8):
            said = value
        elif number == 1:
            key = value
        elif number == 2:
            key = key + b"." + value if key else value
        elif number == 6 and len(value) == 8:
            said = struct.unpack("<d", value)[0]
        elif number == 5:
            said = (value >> 1) ^ -(value & 1)
    return key.decode(), said


def _number(value: Any) -> float | None:
    """A number, which JSON may call NaN or Infinity; None for anything else."""
    try:
        return float(value)
    except ValueError:
        return None


def _configure(body: bytes, content: Content) -> None:
    for number, item in _fields(body):
        key, value = _item(item)
        if key == "_wandb" or key.startswith("_wandb."):
            continue
        if number == 1:
            said = parse_json(value) if isinstance(value, bytes) else value
            content.settings |= dotted({key: said})
        elif number == 2:
            content.settings.pop(key, None)
