"""Runs of Hugging Face's Trainer: trainer_state.json in the run's folder, or in the last of its checkpoints.

Settings are read from JSON beside it. training_args.bin is a pickle, which may run code, and is never opened: what it
alone knows (the seed) must come from the path.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptlab.errors import DataError
from gptlab.files import check_fields, damaged, read_json
from gptlab.logs.rows import curves, dotted, is_number, name_run, points_of
from gptlab.logs.run import How, LogRun

STATE = "trainer_state.json"
SETTINGS = {
    "config.json": "config.",
    "args.json": "",
    "training_args.json": "",
}  # files, and what their names begin with
OF_STATE = ("max_steps", "num_train_epochs", "train_batch_size")
FIELDS = {"log_history": list, "global_step": int, "max_steps": int, "trial_params": dict, "stateful_callbacks": {}}


def is_mine(path: Path) -> bool:
    if not os.path.isdir(path):
        return path.name.endswith(STATE)
    return os.path.isfile(path / STATE) or any(_checkpoints(path))


def read(path: Path, how: How) -> list[LogRun]:
    """Read a run from its folder, a checkpoint's, or the file.

    Raises:
        DataError: a file is damaged, or no metric was logged.
    """
    remarks = list[str]()
    if os.path.isdir(path):
        folder, name, beside = path, "", [path]
        state = _newest(path, beside, remarks)
    else:
        folder, name, beside = path.parent, path.name.removesuffix(STATE).rstrip("-_."), [path.parent]
        state = _state(path)
    with damaged(path, DataError):
        if not name:
            absolute = Path(os.path.abspath(folder))
            name = (absolute.parent if _step_of(absolute) >= 0 else absolute).name
        done = state.get("global_step") or 0
        control = state.get("stateful_callbacks", {}).get("TrainerControl", {}).get("args", {})
        complete = 0 < (state.get("max_steps") or 0) <= done or control.get("should_training_stop") is True
        rows, result = list[tuple[float, dict[str, Any]]](), dict[str, Any]()
        for line in state.get("log_history") or []:
            row = {key: value for key, value in line.items() if key != "step"}
            if "train_runtime" in line:  # what train() says at its end
                result |= {key: value for key, value in row.items() if is_number(value)}
                complete = complete or line["step"] >= done
            else:
                rows.append((line["step"], row))
        if state.get("best_metric") is not None:
            result["best_metric"] = state["best_metric"]
        settings = {key: state[key] for key in OF_STATE if state.get(key) is not None}
        settings |= dotted(state.get("trial_params") or {})
        for file in (at / some for some in SETTINGS for at in beside):
            try:
                settings |= dotted(read_json(file, DataError, finite=False), SETTINGS[file.name])
            except FileNotFoundError:
                pass
            except DataError as fault:
                remarks.append(str(fault))
        run = LogRun(
            path,
            "trainer_state",
            curves(points_of(rows, how.step)),
            name=name,
            status="completed" if complete else "unfinished",
            settings=settings,
            result=result,
            remarks=remarks,
        )
    if not run.curves:
        raise DataError(f"{path}: the Trainer's log_history holds no metric; logging_steps sets how often it logs")
    return [name_run(run, how)]


def _newest(path: Path, beside: list[Path], remarks: list[str]) -> dict[str, Any]:
    """The state that the run ended with. Folders that settings may lie in are added to `beside`.

    The folder's own state is written at the end of training. A checkpoint that is further continued that training, or
    an earlier training left it behind: they are told apart by whether their histories begin alike.
    """
    own = _state(path / STATE) if os.path.isfile(path / STATE) else None
    for folder in sorted(_checkpoints(path), key=_step_of, reverse=True):
        if own is not None and _step_of(folder) <= (own.get("global_step") or 0):
            beside.insert(0, folder)
            return own
        try:
            further = _state(folder / STATE)
        except DataError as fault:  # a run is often killed while it saves
            remarks.append(str(fault))
            continue
        before, after = ([repr(line) for line in some.get("log_history") or []] for some in (own or {}, further))
        if all(line in after for line in before if "train_runtime" not in line):
            beside.insert(0, folder)
            return further
        remarks.append(f"{folder} was left there by another training, and is not read")
    if own is None:
        raise DataError(remarks[0])
    return own


def _state(file: Path) -> dict[str, Any]:
    try:
        state = read_json(file, DataError, finite=False)
        check_fields(state, FIELDS)
    except FileNotFoundError:
        raise DataError(f"{file} does not exist") from None
    except ValueError as fault:
        if isinstance(fault, DataError):
            raise
        raise DataError(f"{file} is damaged: {fault}") from None
    return state


def _checkpoints(path: Path) -> Iterator[Path]:
    try:
        names = os.listdir(path)
    except OSError:  # the caller says so, for any form
        names = []
    return (path / name for name in names if _step_of(Path(name)) >= 0 and os.path.isfile(path / name / STATE))


def _step_of(folder: Path) -> int:
    """N of a folder that is called checkpoint-N, or -1."""
    found = re.fullmatch(r"checkpoint-(\d{1,18})", folder.name)
    return int(found[1]) if found else -1
