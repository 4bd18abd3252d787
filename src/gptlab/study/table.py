"""The state of a study, read from its folder: `gptlab study status` and the live table of `gptlab study run`."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from gptlab.config import Study
from gptlab.errors import RunError
from gptlab.files import printable
from gptlab.rundir import RunDir, open_study, parse_metrics, run_name
from gptlab.status import STATUSES
from gptlab.study.order import run_order

ENDED = tuple(status for status in STATUSES if status != "interrupted")
COLOURS = {
    "running": "cyan",
    "completed": "green",
    "diverged": "yellow",
    "out_of_memory": "yellow",
    "failed": "red",
    "damaged": "red",
    "not_applicable": "dim",
    "waiting": "dim",
}
TAIL_BYTES = 16384  # of metrics.jsonl: about sixty lines, usually with an evaluation


@dataclass
class RunState:
    """One row of the table."""

    arm: str
    seed: int
    status: str
    """waiting, running, stopped (killed; continues with the study), the status of the ended run, or damaged (a file of
    the run cannot be read; `reason` says which)."""
    step: int = 0
    limit: int | None = None
    """Steps of the whole run; None while they depend on a dataset that no run has opened."""
    loss: float | None = None
    val_loss: float | None = None
    rate: str = ""
    """Tokens or samples per second."""
    seconds_left: float | None = None
    seconds_whole: float | None = None
    """Seconds of the whole run: measured if it has ended, estimated from its speed while it trains."""
    reason: str = ""

    @property
    def ended(self) -> bool:
        return self.status in ENDED


def read_state(folder: Path, study: Study, arm: str, seed: int, running: bool | None = None) -> RunState:
    """The state of a run.

    Args:
        folder: the folder of the study.
        running: whether a process trains the run; None asks the lock of the run.
    """
    try:
        return _read_state(folder, study, arm, seed, running)
    except (RunError, OSError) as error:  # the study is told without it
        return RunState(arm, seed, "damaged", reason=str(error))


def _read_state(folder: Path, study: Study, arm: str, seed: int, running: bool | None) -> RunState:
    run = RunDir(folder / run_name(arm, seed))
    result = run.read_json("result.json") or ({} if run.exists() else read_summary(folder, study, arm, seed))
    recipe = run.read_recipe() if run.exists() else study.build(arm, seed)
    state = RunState(arm, seed, status := run.status(result, running), limit=run.limit(recipe))
    state.reason = result.get("reason", "") if status == result.get("status") else ""
    for line in last_metrics(run.metrics_file):
        state.step = line["step"]
        state.loss, state.val_loss = line.get("loss", state.loss), line.get("val_loss", state.val_loss)
        seconds = 0.0
        for unit, size in (("tokens", recipe.batch.tokens_per_step), ("samples", recipe.sequences_per_step)):
            if rate := line.get(f"{unit}_per_second"):
                state.rate, seconds = f"{rate:,.0f} {unit}/s", size / rate
        if status == "running" and seconds and state.limit is not None:
            state.seconds_whole = seconds * state.limit
            state.seconds_left = seconds * max(0, state.limit - state.step)
    if state.ended:
        state.step = result.get("steps") or state.step
        state.val_loss, state.seconds_whole = result.get("final_val_loss"), result.get("wall_seconds")
    return state


def read_study(folder: Path) -> list[RunState]:
    """The states of all runs of a study, in the order in which the runs start."""
    study = open_study(folder)
    order = run_order(study, study.arms, study.seeds, study.seeds[0])
    if study.until_decided:  # seeds were added, of some arms
        more = range(max(study.seeds) + 1, max(study.seeds) + 1 + study.most_seeds)
        order += [run for run in run_order(study, study.arms, more, None) if (folder / run_name(*run)).is_dir()]
    order = [run for run in order if run[0] not in study.measured or (folder / f"{run_name(*run)}.json").is_file()]
    states = [read_state(folder, study, arm, seed) for arm, seed in order]
    for state in states:
        state.limit = state.step if state.arm in study.measured else state.limit
    return states


def read_summary(folder: Path, study: Study, arm: str, seed: int) -> dict[str, Any]:
    """The summary beside the folder of a run; {} without a summary, or if it is of another study."""
    summary = RunDir(folder).read_json(f"{run_name(arm, seed)}.json")
    return summary if summary.get("study") == study.name else {}


def last_metrics(file: Path) -> list[dict[str, Any]]:
    """The last lines of metrics.jsonl; incomplete lines are skipped."""
    try:
        with open(file, "rb") as handle:
            handle.seek(max(0, handle.seek(0, 2) - TAIL_BYTES))
            tail = handle.read()
    except FileNotFoundError:
        return []
    return [value for line in tail.split(b"\n") if (value := parse_metrics(line)) is not None]


# -- as text --------------------------------------------------------------------------------------------------------


def study_table(states: Sequence[RunState], jobs: int = 1, rows: int | None = None) -> Group:
    """The table of runs, the reasons of runs that did not complete, and the progress of the study.

    Args:
        jobs: runs at the same time, for the estimate of the time left.
        rows: show at most this many runs: running runs first, waiting runs last.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("arm", "seed", "status", "step", "loss", "val_loss", "speed", "left"):
        right = name not in ("arm", "status")
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    shown = _fitting(states, rows)
    for state in shown:
        limit = "?" if state.limit is None else f"{state.limit:,}"
        table.add_row(
            state.arm,
            str(state.seed),
            Text(state.status, COLOURS.get(state.status, "")),
            f"{state.step:,}/{limit}" if state.step or state.status == "running" else "",
            _number(state.loss),
            _number(state.val_loss),
            state.rate,
            duration(state.seconds_left),
        )
    reasons = [f"{s.arm} seed {s.seed} {s.status}: {printable(s.reason)}" for s in shown if s.reason]
    hidden = [f"{len(states) - len(shown)} more runs are not shown"] if len(shown) < len(states) else []
    return Group(table, *(Text(line, overflow="fold") for line in [*hidden, *reasons, study_progress(states, jobs)]))


def plain_text(table: Group, width: int) -> str:
    """A table without colours."""
    text = io.StringIO()
    Console(file=text, width=width, force_terminal=False, force_jupyter=False, color_system=None).print(table)
    return text.getvalue().rstrip()


def study_progress(states: Sequence[RunState], jobs: int = 1) -> str:
    """One line: `done 3 of 9: 2 completed, 1 diverged, 1 running, 5 waiting; about 0:12:30 left`."""
    counts = Counter(state.status for state in states)
    order = sorted(counts, key=[*STATUSES, "damaged", "running", "stopped", "waiting"].index)
    done = sum(state.ended for state in states)
    says = f"done {done} of {len(states)}: " + ", ".join(f"{counts[status]} {status}" for status in order)
    left = study_seconds_left(states, jobs)
    return says + (f"; about {duration(left)} left" if left else "")


def study_seconds_left(states: Sequence[RunState], jobs: int) -> float | None:
    """Seconds until all runs have ended, if each waiting run takes the mean time of the runs whose time is known."""
    whole = [s.seconds_whole for s in states if s.seconds_whole and s.status in ("completed", "running")]
    running = [s.seconds_left for s in states if s.status == "running" and s.seconds_left is not None]
    waiting = [s for s in states if not s.ended and s.seconds_left is None]
    if not whole:
        return None
    mean = sum(whole) / len(whole)
    work = sum(running) + mean * len(waiting)
    return max([work / max(1, jobs), *running, mean if waiting else 0.0])


def duration(seconds: float | None) -> str:
    return "" if seconds is None else str(timedelta(seconds=round(seconds)))


def _fitting(states: Sequence[RunState], rows: int | None) -> list[RunState]:
    def last_to_go(i: int) -> tuple[int, int]:
        state = states[i]
        kind = 0 if state.status == "running" else 3 if state.status == "waiting" else 2 if state.ended else 1
        return kind, i if kind == 3 else -i

    kept = set(sorted(range(len(states)), key=last_to_go)[:rows])
    return [state for i, state in enumerate(states) if i in kept]


def _number(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.4f}"
