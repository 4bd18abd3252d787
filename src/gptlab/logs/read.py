"""Runs of anybody's logs: found, read, and given an arm, a seed and the metric to judge by."""

from __future__ import annotations

import importlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Literal

from gptlab.errors import UserError
from gptlab.files import because, printable
from gptlab.logs.naming import METRICS, VALIDATION, better_of, is_metric, name_runs, plain
from gptlab.logs.run import How, LogRun, Unclear
from gptlab.progress import Tell, tell_nobody

READERS = ("own", "trainer", "wandb", "mlflow", "tensorboard", "trackio", "tables", "text")  # asked in this order
HERE = "\0"  # stands for a path in a sentence


@dataclass
class Logs:
    """What `read_logs` found."""

    runs: list[LogRun]
    """Every run has an arm and a seed, and no other run has both; sorted by them. A run may lack the metric."""
    remarks: list[str]
    """One sentence for each thing that was guessed, left out or could not be read."""
    metric: str
    """The metric to judge by."""
    better: Literal["lower", "higher"]
    """The better direction of the metric, by its name."""
    paired: bool
    """Whether a seed is the same seed in all arms. False where runs were only counted, two arms with several runs share
    fewer than two seeds, or all arms have one run and they share none."""


def read_logs(paths: Sequence[Path], how: How, tell: Tell = tell_nobody) -> Logs:
    """Read the runs in files and folders of any form. A folder is searched.

    Args:
        how: what the caller says about them; the rest is guessed and said in `Logs.remarks`.
        tell: called before each log.

    Raises:
        UserError: there is no run, or runs cannot be told apart without an option, which is named.
    """
    runs, remarks = list[LogRun](), list[str]()
    found = list[tuple[ModuleType, Path]]()
    left = dict[str, list[Path]]()  # what is wrong: with which logs
    for path in paths:
        if not os.path.lexists(path):
            raise UserError(f"{path} does not exist")
        here = list(_logs_in(path, left))
        if not here and path.is_file():
            here = [(_reader("text"), path)]
        if not here:
            left.setdefault(f"{HERE} holds no log that gptlab knows", []).append(path)
        found += here
    for done, (reader, path) in enumerate(found):
        tell("reading logs", done, len(found))
        try:
            runs += reader.read(path, how)
        except Unclear:
            raise
        except UserError as error:
            left.setdefault(str(error).replace(str(path), HERE), []).append(path)
        except OSError as error:
            left.setdefault(f"{HERE} cannot be read: {because(error)}", []).append(path)
    for says, where in left.items():
        more = f" (and {len(where) - 1} more)" if len(where) > 1 else ""
        remarks.append(says.replace(HERE, str(where[0])) + more)
    if not runs:
        raise UserError(remarks[0] if remarks else "no log was named")
    for run in runs:
        remarks += run.remarks
    remarks += name_runs(runs, how)
    metric = _choose_metric(runs, how, remarks)
    better = better_of(metric)
    remarks.append(f"judged by {printable(metric)}, {better} is better")
    return Logs(runs, list(dict.fromkeys(remarks)), metric, better, _paired(runs))


@cache
def _reader(name: str) -> ModuleType:
    return importlib.import_module(f"gptlab.logs.{name}")


def _logs_in(path: Path, left: dict[str, list[Path]]) -> Iterator[tuple[ModuleType, Path]]:
    """The logs in a file or folder, each with its reader.

    A folder that is a log is not searched, as a trainer may write the same numbers in several forms; but a folder with
    a metrics.jsonl may hold such folders.
    """
    own = _reader("own")
    try:
        reader = next((_reader(name) for name in READERS if _reader(name).is_mine(path)), None)
        inside = sorted(path.iterdir()) if reader in (None, own) and path.is_dir() else []
        if reader is own:
            inside = [] if (path / "study.toml").is_file() else [child for child in inside if own.is_mine(child)]
    except OSError as error:
        left.setdefault(f"{HERE} cannot be read: {because(error)}", []).append(path)
        return
    if reader is not None:
        yield reader, path
    for child in inside:
        if not child.name.startswith("."):
            yield from _logs_in(child, left)


def _choose_metric(runs: Sequence[LogRun], how: How, remarks: list[str]) -> str:
    """The metric to judge by: as said, or the most telling one that most runs have."""
    known = Counter(name for run in runs for name in {**run.curves, **run.result})
    metric = how.metric
    if metric and metric not in known:
        metric = next((name for name in known if plain(name) == plain(how.metric)), "")
    names = ", ".join(map(printable, sorted(known)[:30]))
    if how.metric and not metric:
        raise UserError(f"no run has a metric {how.metric!r}, which --metric names; there are {names}")
    if not metric:
        by_plain = {name: [k for k in known if plain(k) == name] for name in METRICS}
        some = [name for same in by_plain.values() for name in sorted(same, key=lambda k: -known[k])]
        every = [name for name, count in known.items() if count == len(runs)]
        telling = [name for name in every if is_metric(name)]
        alone = [one[0] for one in (every, telling) if len(one) == 1]
        metric = next(iter([*some, *alone]), "")
    if not metric:
        raise UserError(f"--metric must say by which number runs are judged: {names or 'the logs have none'}")
    if plain(metric) in VALIDATION:
        _take_same(runs, metric, remarks)
    if lack := [run for run in runs if metric not in run.curves and metric not in run.result]:
        first = f"{lack[0].arm} seed {lack[0].seed} ({lack[0].source})"
        more = f" and {len(lack) - 1} more" if len(lack) > 1 else ""
        remarks.append(f"{first}{more} logged no {printable(metric)}")
    return metric


def _take_same(runs: Sequence[LogRun], metric: str, remarks: list[str]) -> None:
    """Take another name of the validation loss, as another trainer has it, for the metric."""
    for run in runs:
        if metric in run.curves or metric in run.result:
            continue
        for values in (run.curves, run.result):
            other = next((name for name in values if plain(name) in VALIDATION), None)
            if other is not None:
                values[metric] = values[other]
                remarks.append(f"{printable(other)} of {run.form} logs is taken for {metric}")
                break


def _paired(runs: Sequence[LogRun]) -> bool:
    seeds = dict[str | None, set[int | None]]()
    for run in runs:
        seeds.setdefault(run.arm, set()).add(run.seed)
    several = [some for some in seeds.values() if len(some) > 1]
    if not several and len(set(map(frozenset, seeds.values()))) > 1:
        return False  # a run of each arm, of different seeds
    return not any(run.counted for run in runs) and all(len(a & b) > 1 for a, b in combinations(several, 2))
