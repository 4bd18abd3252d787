"""TensorBoard's event files. A folder with event files is a run.

What one run writes to several folders is put together: the parts train/ and validation/ of Keras, and the folders that
PyTorch's `add_scalars` and `add_hparams` make below the run's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptlab.errors import DataError, UserError
from gptlab.files import because, damaged, open_regular, parse_json, printable
from gptlab.logs.rows import Points, curves, dotted, name_run, read_each
from gptlab.logs.run import How, LogRun

MARK = "tfevents"  # in the name of every event file
PARTS = ("train", "training", "validation", "valid", "val", "eval", "test")
HPARAMS = re.compile(r"\d{9,}\.\d+")  # PyTorch's add_hparams calls its folder by the time


@dataclass
class Events:
    """What the event files of a folder hold."""

    folder: Path
    points: Points = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    cut: bool = False
    """The last file ends within a record."""


def is_mine(path: Path) -> bool:
    if not os.path.isdir(path):
        return MARK in path.name and os.path.isfile(path)
    return bool(_files(path)) or _in_parts(path)


def read(path: Path, how: How) -> list[LogRun]:
    """Read the runs in an event file, or in a folder and the folders below it.

    Raises:
        UserError: the package tensorboard is missing.
        DataError: no scalar can be read.
    """
    try:
        import tensorboard.backend.event_processing.event_file_loader  # noqa: F401
    except ImportError:
        raise UserError(
            "reading TensorBoard's event files needs the package tensorboard: pip install 'gptlab[tensorboard]'"
        ) from None
    if not os.path.isdir(path):
        return [_run(_read([path], Events(path)), [], path.parent, how)]
    runs: dict[Path, list[Events]] = {}  # the run's own events, and those of its other folders
    faults = list[str]()

    def unreadable(fault: OSError) -> None:
        faults.append(f"{fault.filename} cannot be read: {because(fault)}")

    for name, below, _ in os.walk(path, onerror=unreadable):
        below.sort()
        folder = Path(name)
        if not (files := _files(folder)):
            continue
        try:
            events = _read(files, Events(folder))
        except UserError as fault:
            faults.append(str(fault))
            continue
        above = folder.parent
        if folder != path and (above in runs or _in_parts(above)) and _is_part(events):
            runs.setdefault(above, [Events(above)]).append(events)
        else:
            runs[folder] = [events]

    def run(folder: Path) -> LogRun:
        own, *parts = runs[folder]
        return _run(own, parts, folder, how)

    return read_each(runs, run, f"{path} holds no event file that can be read", faults)


def _run(own: Events, parts: list[Events], folder: Path, how: How) -> LogRun:
    points, settings, result = dict(own.points), dict(own.settings), dict[str, Any]()
    for part in parts:
        settings |= part.settings
        for tag, some in part.points.items():
            prefix = tag.replace("/", "_") + "_"
            if HPARAMS.fullmatch(part.folder.name):
                result[tag] = some[1][-1]
            elif part.folder.name.startswith(prefix):
                points[f"{tag}/{part.folder.name.removeprefix(prefix)}"] = some
            else:
                points[f"{part.folder.name}/{tag}"] = some
    if not points:
        raise DataError(f"{own.folder} holds event files, but no scalar")
    with damaged(own.folder, DataError):
        name = _name(Path(os.path.abspath(folder)), settings)
        run = LogRun(own.folder, "tensorboard", curves(points), name=name, settings=settings, result=result)
    run.remarks = [remark for events in (own, *parts) for remark in events.remarks]
    if own.cut or any(part.cut for part in parts):
        run.status = "unfinished"
    return name_run(run, how)


def _name(folder: Path, settings: dict[str, Any]) -> str:
    """The name of a run: its folder's, or what Lightning and Hugging Face's Trainer called the run that is in it."""
    if re.fullmatch(r"version_\d+", folder.name):
        return f"{folder.parent.name}/{folder.name}"
    if re.match(r"[A-Z][a-z]{2}\d\d_\d\d-\d\d-\d\d_", folder.name):
        return str(settings.get("run_name") or Path(str(settings.get("output_dir", ""))).name or folder.name)
    return folder.name


def _is_part(events: Events) -> bool:
    """Whether a folder belongs to the run of the folder above it."""
    name = events.folder.name
    return (
        name in PARTS
        or HPARAMS.fullmatch(name) is not None
        or (bool(events.points) and all(name.startswith(tag.replace("/", "_") + "_") for tag in events.points))
    )


def _in_parts(folder: Path) -> bool:
    """Whether a folder is a run of which all events are in folders of parts."""
    return not _files(folder) and sum(bool(_files(folder / part)) for part in PARTS) > 1


def _files(folder: Path) -> list[Path]:
    try:
        names = sorted(os.listdir(folder), key=_numbered)
    except OSError:  # the caller says so, for any form
        return []
    return [folder / name for name in names if MARK in name and os.path.isfile(folder / name)]


def _numbered(name: str) -> list[str | int]:
    """Sorts numbers in names as numbers: a process's tenth file of a second comes after its ninth."""
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", name)]


def _read(files: list[Path], events: Events) -> Events:
    """Read the event files of a folder; their names begin with their times.

    A run that was resumed went back: of a metric that a later file begins at some step, what earlier files have from
    that step on counts no more. Nor does what a writer purged.
    """
    faults, back = list[str](), ""
    for file in files:
        new = Points()
        events.cut = False
        try:
            for step, tag, value in _scalars(file, events):
                if tag is not None:
                    steps, values = new.setdefault(tag, ([], []))
                    steps.append(step)
                    values.append(value)
                else:  # a writer's new start
                    for known in (events.points, new):
                        known |= {name: _before(some, step) for name, some in known.items()}
        except DataError as fault:
            faults.append(str(fault))
            continue
        for tag, some in new.items():
            if not some[0]:
                continue
            earlier = events.points.get(tag, ([], []))
            if earlier[0] and max(earlier[0]) > max(some[0]):
                back = back or (
                    f"{file} goes back to step {min(some[0])} of {printable(tag)} and ends at {max(some[0])}, before "
                    f"the {max(earlier[0])} of an earlier file: the later file counts"
                )
            kept = _before(earlier, min(some[0]))
            events.points[tag] = kept[0] + some[0], kept[1] + some[1]
    events.points = {tag: some for tag, some in events.points.items() if some[0]}
    if faults and len(faults) == len(files):
        raise DataError(faults[0])
    events.remarks += faults + ([back] if back else [])
    return events


def _before(some: tuple[list[float], list[float]], step: float) -> tuple[list[float], list[float]]:
    kept = [(x, y) for x, y in zip(*some, strict=True) if x < step]
    return [x for x, _ in kept], [y for _, y in kept]


def _scalars(file: Path, events: Events) -> Iterator[tuple[int, str | None, float]]:
    """Step, tag and value of each scalar; no tag where the writer purged what is at that step and later.

    Settings and remarks go to `events`.
    """
    from google.protobuf.message import DecodeError
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.util.tensor_util import make_ndarray

    try:
        with open_regular(file) as opened:
            size = os.fstat(opened.fileno()).st_size
    except OSError as fault:
        raise DataError(f"{file} cannot be read: {because(fault)}") from None
    at = 0
    plugins: dict[str, str] = {}  # by tag; only a tag's first value says it
    for record in RawEventFileLoader(str(file)).Load():
        try:
            event = Event.FromString(record)
        except DecodeError:
            break
        at += len(record) + 16  # its length and two checksums
        if event.HasField("session_log") and event.session_log.status == SessionLog.START:
            yield event.step, None, 0.0
        for value in event.summary.value:
            plugin = value.metadata.plugin_data.plugin_name
            plugin = plugins.setdefault(value.tag, plugin) if plugin else plugins.get(value.tag, "")
            if value.HasField("simple_value"):
                yield event.step, value.tag, value.simple_value
            elif plugin == "hparams":
                events.settings |= _hparams(value.metadata.plugin_data.content)
            elif value.HasField("tensor") and plugin in ("scalars", "text"):
                with damaged(file, DataError):
                    array = make_ndarray(value.tensor)
                    if array.size == 1 and plugin == "scalars":
                        yield event.step, value.tag, float(array.item())
                    elif array.size == 1:
                        events.settings |= _of_text(value.tag, array.item())
    if at < size:  # the loader stops there, and says nothing
        if not at:
            raise DataError(f"{file} is damaged: it holds no event that can be read")
        events.remarks.append(f"{file} is cut off or damaged after byte {at:,} of {size:,}: what is before it was read")
        events.cut = True


def _hparams(content: bytes) -> dict[str, Any]:
    """The settings that the plugin of hyperparameters keeps."""
    from google.protobuf.message import DecodeError
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    try:
        said = HParamsPluginData.FromString(content).session_start_info.hparams
    except DecodeError:
        return {}
    found: dict[str, Any] = {}
    for name, value in said.items():
        kind = value.WhichOneof("kind")
        if kind == "number_value":
            number = value.number_value
            found[name] = int(number) if number.is_integer() else number
        elif kind in ("string_value", "bool_value"):
            found[name] = getattr(value, kind)
    return found


def _of_text(tag: str, text: Any) -> dict[str, Any]:
    """The settings that the Trainer of Hugging Face writes as text of JSON: its arguments, and the model's."""
    name = tag.removesuffix("/text_summary")
    if name not in ("args", "model_config"):
        return {}
    try:
        said = parse_json(text)
    except (ValueError, TypeError):
        return {}
    return dotted(said, "" if name == "args" else "config.") if isinstance(said, dict) else {}
