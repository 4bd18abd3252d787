"""The runs in a folder: what `gptlab runs` lists, and how a folder of runs stands for its runs."""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.text import Text

from gptlab.config import Recipe, assignment, load_recipe, may_change, shipped
from gptlab.errors import RunError, UserError
from gptlab.files import printable
from gptlab.notebook import html_table
from gptlab.report.reading import duration, human, number, settings_of
from gptlab.rundir import RunDir
from gptlab.streams import say

FOLDERS = (Path("runs"), Path("results"))  # where runs are if nothing else is said
MOST_LEVELS, MOST_FOLDERS = 5, 20_000  # below a folder, that are looked into
NO_DIFFERENCE = ("name", "description", "data.path")
SETTLED = ("model.vocab_size", "schedule.decay_steps", "optim.ademamix_warmup")  # a run replaces their 0
COLOURS = {"running": "cyan", "completed": "green", "failed": "red", "damaged": "red"}


@dataclass
class Listed:
    """A run, as far as its folder tells."""

    path: Path
    recipe: str = ""
    status: str = ""
    """running, waiting, stopped (killed), a status of gptlab.status, or damaged (`reason` says what)."""
    step: int = 0
    limit: int | None = None
    """Steps of the whole run; None if only a dataset tells that no process has opened."""
    best_val_loss: float | None = None
    best_step: int | None = None
    rate: float | None = None
    """Tokens or samples per second: the median of a run that has ended, else the last one logged."""
    unit: str = "tokens"
    age_seconds: float = 0.0
    """Since the run last wrote something."""
    seconds_left: float | None = None
    """Of a running one, without evaluations."""
    differs: dict[str, Any] = field(default_factory=dict)
    """Settings that differ from the recipe's, by dotted name."""
    reason: str = ""

    @property
    def running(self) -> bool:
        return self.status == "running"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}

    def __repr__(self) -> str:
        best = "" if self.best_val_loss is None else f", best_val_loss={self.best_val_loss:.4f}"
        return f"Listed('{self.path}', recipe={self.recipe!r}, status={self.status!r}, step={self.step}{best})"

    def _repr_html_(self) -> str:
        return Runs([self])._repr_html_()


class Runs(list[Listed]):
    """Runs, which a terminal and a notebook show as a table."""

    def __repr__(self) -> str:
        return "\n".join(line.plain for line in runs_table(self, 120)) if self else "no runs"

    def _repr_html_(self) -> str:
        head = ["run", "recipe", "status", "step", "best val_loss", "per second", "age", "differs from the recipe"]
        rows = []
        for row in self:
            path, *cells, changed = _cells(row, ".")
            rows.append([path, row.recipe, *cells, "; ".join(filter(None, [changed, row.reason]))])
        return html_table(head, rows) if self else "no runs"


# -- finding --------------------------------------------------------------------------------------------------------


def find_runs(folders: Iterable[Path]) -> tuple[list[Path], list[str]]:
    """Every run directory that is one of these folders or below one, and a sentence for each part not looked into."""
    found: dict[str, Path] = {}
    remarks: list[str] = []
    seen: set[str] = set()
    level = list(folders)
    for depth in range(MOST_LEVELS + 1):
        below: list[Path] = []
        for folder in level:
            real = os.path.realpath(folder)
            if real in seen or len(seen) >= MOST_FOLDERS:
                continue
            seen.add(real)
            if RunDir(folder).exists():
                found[real] = folder
                continue
            try:
                with os.scandir(folder) as entries:
                    inner = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
            except OSError as error:
                remarks.append(f"{folder} is left out: {error.strerror}")
                continue
            below += [folder / name for name in inner]
        level = below
        if depth == MOST_LEVELS and level:
            remarks.append(f"{len(level):,} folders more than {MOST_LEVELS} levels deep, from {level[0]} on, left out")
    if len(seen) >= MOST_FOLDERS:
        remarks.append(f"only the first {MOST_FOLDERS:,} folders were looked into: name a smaller folder")
    return sorted(found.values()), remarks


def runs(*folders: str | Path) -> Runs:
    """The runs in folders, as `gptlab runs` lists them: by recipe, and within a recipe by their best validation loss.

    >>> gptlab.runs()[0].best_val_loss
    2.7301

    Args:
        folders: run directories, or folders of them; default: runs and results.

    Raises:
        UserError: one of them is no folder.
    """
    given = [Path(folder) for folder in folders]
    for folder in given:
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder: runs are looked for in runs and results, if no folder is named")
    paths, remarks = find_runs(given or [folder for folder in FOLDERS if folder.is_dir()])
    for remark in remarks:
        say(remark)
    return Runs(list_runs(paths))


def runs_in(folders: Sequence[Path]) -> list[RunDir]:
    """The runs that folders stand for: a run directory itself, any other folder all runs below it.

    Raises:
        RunError: a folder without a run.
    """
    runs: dict[str, RunDir] = {}
    for folder in folders:
        paths, remarks = find_runs([folder])
        if not paths:
            why = f": {remarks[0]}" if remarks and folder.is_dir() else ""
            raise RunError(f"{folder} is not a run directory: it has no recipe.toml, and no run is below it{why}")
        runs |= {os.path.realpath(path): RunDir(path) for path in paths}
    return list(runs.values())


# -- reading --------------------------------------------------------------------------------------------------------


def list_runs(paths: Iterable[Path]) -> list[Listed]:
    """The runs in these directories, by recipe, and within a recipe by their best validation loss."""
    rows, recipes = [], {}
    for path in paths:
        row, recipe = read_run(path)
        if recipe is not None:
            recipes[path] = recipe
            lines = RunDir(path).lines_with("val_loss")
            row.best_val_loss, row.best_step = lowest((line["step"], number(line["val_loss"])) for line in lines)
        rows.append(row)
    tell_apart(rows, recipes)
    return sorted(rows, key=lambda row: (row.recipe, _or_last(row.best_val_loss), str(row.path)))


def lowest(points: Iterable[tuple[int, float]]) -> tuple[float, int] | tuple[None, None]:
    """The lowest finite value of (step, value) points and its step."""
    return min(((value, step) for step, value in points if math.isfinite(value)), default=(None, None))


def tell_apart(rows: Sequence[Listed], recipes: Mapping[Path, Recipe]) -> None:
    """Set what differs from the recipe, for each run; what tells it from the others of its recipe comes first."""
    groups: dict[str, list[Listed]] = {}
    for row in rows:
        if row.path in recipes:
            groups.setdefault(row.recipe, []).append(row)
    for name, own in groups.items():
        base = usual_settings(name, [recipes[row.path] for row in own])
        every = [differing(base, recipes[row.path]) for row in own]
        shared = {key for key in every[0] if all(key in one and one[key] == every[0][key] for one in every)}
        for row, found in zip(own, every, strict=True):
            row.differs = dict(sorted(found.items(), key=lambda item: item[0] in shared))


def _or_last(value: float | None) -> float:
    return math.inf if value is None else value


def read_run(path: Path) -> tuple[Listed, Recipe | None]:
    """A run without its best loss and what differs, and its recipe; None if that cannot be read."""
    try:
        return _read_run(RunDir(path))
    except (UserError, OSError) as error:  # the others are listed without it
        return Listed(path, status="damaged", reason=printable(str(error)), age_seconds=_age(path)), None


def _read_run(run: RunDir) -> tuple[Listed, Recipe]:
    path = run.path
    recipe, result = run.read_recipe(), run.read_json("result.json")
    row = Listed(path, recipe.name, age_seconds=_age(path), reason=printable(str(result.get("reason") or "")))
    row.status, row.limit = run.status(result), run.limit(recipe)
    row.step = (run.last_line("step") or {"step": 0})["step"]
    if row.status == result.get("status") and result.get("steps"):
        row.step = result["steps"]
    last = run.last_line("lr") or {}
    for unit, size in (("tokens", recipe.batch.tokens_per_step), ("samples", recipe.sequences_per_step)):
        rate = number(last.get(f"{unit}_per_second") if row.running else result.get(f"{unit}_per_second"))
        rate = rate if rate > 0 else number(last.get(f"{unit}_per_second"))
        if 0 < rate < math.inf:
            row.rate, row.unit = rate, unit
            if row.running and row.limit is not None:
                row.seconds_left = size / rate * max(0, row.limit - row.step)
    return row, recipe


def _age(path: Path) -> float:
    """Seconds since a file of the run was written."""
    times = [0.0]
    for name in ("recipe.toml", "metrics.jsonl", "result.json"):
        try:
            times.append((path / name).stat().st_mtime)
        except OSError:
            continue
    return max(0.0, time.time() - max(times))


def usual_settings(name: str, recipes: Sequence[Recipe]) -> dict[str, Any]:
    """What runs of a recipe are told apart from: the shipped recipe of that name, else their most common values."""
    if name in shipped():
        return settings_of(load_recipe(name))
    every = [settings_of(recipe) for recipe in recipes]
    usual = {}
    for key in every[0]:
        counts = Counter(json.dumps(one[key], sort_keys=True) for one in every)
        usual[key] = json.loads(counts.most_common(1)[0][0])
    return usual


def differing(base: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The settings of a run that differ from `base`: first those that make another run, last the seed.

    What a recipe leaves open and a run has settled is no difference, nor is where a dataset lies.
    """
    own = settings_of(recipe)
    found = {
        key: value
        for key, value in own.items()
        if key not in NO_DIFFERENCE
        and base[key] != "auto"
        and (base[key] or key not in SETTLED)
        and not (base["train.init_from"] and key.startswith("model."))
        and _alike(key, base[key]) != _alike(key, value)
    }
    folder = recipe.data.model_copy(update={"path": ""}).folder
    if Path(own["data.path"]).name not in ("", Path(folder).name, Path(base["data.path"]).name):
        found["data.path"] = Path(own["data.path"]).name
    return dict(sorted(found.items(), key=lambda item: 2 * (item[0] == "seed") + may_change(item[0])))


def _alike(key: str, value: Any) -> Any:
    """A value such that equal ones of a recipe and of a run are equal."""
    if key == "data.mixture":
        return {Path(folder).name: weight for folder, weight in value.items()}
    return list(value) if isinstance(value, tuple) else value


# -- as text --------------------------------------------------------------------------------------------------------


def runs_table(rows: Sequence[Listed], width: int) -> list[Text]:
    """Lines of at most `width` columns: a heading for each recipe, and a row for each run; then what went wrong.

    Where there is little room, the settings that differ are cut first, then the names of the runs in their middle.
    """
    unit = "tok/s" if all(row.unit == "tokens" for row in rows) else "per s"
    titles = ("run", "status", "step", "best", unit, "age", "differs from the recipe")
    groups: dict[str, list[Listed]] = {}
    for row in rows:
        groups.setdefault(row.recipe, []).append(row)
    parts = {name: _common_folder([row.path for row in own]) for name, own in groups.items()}
    cells = [(row, _cells(row, parts[row.recipe])) for row in rows]
    natural = [max(cell_len(c[i]) for c in [titles, *(c for _, c in cells)]) for i in range(len(titles))]
    fixed = 2 + sum(natural[1:6]) + 2 * 5
    name, differs = _shared(width - fixed, natural[0], natural[6])
    widths = [name, *natural[1:6], differs]
    lines = [_line(titles, widths)]
    lines[0].stylize("bold")
    for recipe, own in groups.items():
        folder = f", in {parts[recipe]}" if parts[recipe] else ""
        heading = f"{recipe or 'not readable'}: {len(own)} run{'s' * (len(own) != 1)}{folder}"
        lines.append(Text(_cropped(printable(heading), width), style="bold"))
        lines += [
            _line(c, widths, COLOURS.get(row.status, "yellow"), row.recipe) for row, c in cells if row.recipe == recipe
        ]
    for row in rows:
        if row.reason:
            lines.append(Text(f"{printable(str(row.path))} {row.status}: {row.reason}", overflow="fold"))
    return lines


def _common_folder(paths: Sequence[Path]) -> str:
    common = os.path.commonpath([os.path.abspath(path.parent) for path in paths])
    return os.path.relpath(common) if not os.path.relpath(common).startswith("..") else common


def _cells(row: Listed, folder: str) -> tuple[str, ...]:
    limit = "?" if row.limit is None else f"{row.limit:,}"
    step = f"{row.step:,}" if row.step == row.limit else f"{row.step:,}/{limit}"
    best = "" if row.best_val_loss is None else f"{row.best_val_loss:.4f}"
    name = os.path.relpath(os.path.abspath(row.path), os.path.abspath(folder))
    changed = ", ".join(assignment(key, value) for key, value in row.differs.items())
    if row.status == "damaged":
        step = ""
    rate = "" if row.rate is None else human(row.rate)
    return printable(name), row.status, step, best, rate, _short_age(row.age_seconds), printable(changed)


def _short_age(seconds: float) -> str:
    """The largest unit of a time: 3 d, 5 h, 12 min, 40 s."""
    first, unit, *_ = duration(float(round(seconds))).split()
    return f"{first} {unit}"


def _shared(room: int, name: int, differs: int) -> tuple[int, int]:
    """Columns of the run's name and, two behind it, of what differs; 0 where there is no room for it."""
    if name + 2 + differs <= room:
        return name, differs
    least = min(differs, max(14, room // 2))
    if room - 2 - least < min(name, 12):
        return max(8, min(name, room)), 0
    name = min(name, room - 2 - least)
    return name, room - 2 - name


def _line(cells: Sequence[str], widths: Sequence[int], style: str = "", recipe: str = "") -> Text:
    name, status, *numbers, differs = cells
    line = Text("  ", no_wrap=True)
    name = _cropped(name, widths[0], tail=len(name) if recipe and name.startswith(recipe) else widths[0] // 2)
    line.append(_padded(name, widths[0]) + "  ")
    line.append(_padded(status, widths[1]), style=style)
    for text, width in zip(numbers, widths[2:6], strict=True):
        line.append("  " + " " * (width - cell_len(text)) + text)
    if widths[6]:
        line.append("  " + _cropped(differs, widths[6]))
    line.rstrip()
    return line


def _padded(text: str, width: int) -> str:
    return text + " " * (width - cell_len(text))


def _cropped(text: str, width: int, tail: int = 0) -> str:
    """Text of at most `width` columns; an ellipsis stands for what is left out before the last `tail` columns."""
    if cell_len(text) <= width:
        return text
    end = text[len(text) - tail :]
    while end and cell_len(end) >= width:
        end = end[1:]
    begin = text[: len(text) - tail]
    while begin and cell_len(begin) + 1 + cell_len(end) > width:
        begin = begin[:-1]
    return f"{begin}…{end}"
