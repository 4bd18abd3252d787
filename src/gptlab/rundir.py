"""The layout of a run directory and of a study's folder. All reading and writing of these files goes through here.

    recipe.toml  environment.json  tokenizer.json  metrics.jsonl  result.json  card.md  id
    checkpoints/step-00000500/  plots/

Training passes nothing but run directories to the analysis.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from gptlab import locks
from gptlab.config import Recipe, Study, build_recipe, load_study, plan_changes, plan_hash, study_plan
from gptlab.errors import ConfigError, Locked, RunError


def write_atomically(path: Path, text: str) -> None:
    """Write a text file such that readers, also after a crash, see either the old or the new content as a whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class RunDir:
    """The folder of one run. Nothing is created before the first write.

    Args:
        path: the folder. Reading needs a recipe.toml in it (see `open`).
        writes: whether this process writes. The write methods of other ranks do nothing.
    """

    def __init__(self, path: str | Path, writes: bool = True) -> None:
        self.path, self.writes = Path(path), writes
        self.recipe_file = self.path / "recipe.toml"
        self.metrics_file = self.path / "metrics.jsonl"
        self.tokenizer_file = self.path / "tokenizer.json"
        self.id_file = self.path / "id"
        self.checkpoints = self.path / "checkpoints"
        self.plots = self.path / "plots"

    @classmethod
    def open(cls, path: str | Path) -> RunDir:
        """An existing run. Raises RunError if the folder has no recipe.toml."""
        run = cls(path)
        if not run.exists():
            raise RunError(f"{path} is not a run directory: it has no recipe.toml")
        return run

    def exists(self) -> bool:
        return self.recipe_file.is_file()

    # -- files that are written as a whole

    def write_recipe(self, recipe: Recipe) -> None:
        if not self.writes:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.recipe_file, recipe.to_toml())

    def read_recipe(self) -> Recipe:
        try:
            return build_recipe(tomllib.loads(self.recipe_file.read_text(encoding="utf-8")))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, ConfigError) as error:
            raise RunError(f"{self.recipe_file} cannot be read: {error}") from None

    def read_id(self) -> str:
        """What tells this run from all others; "" if it is not known."""
        try:
            text = self.id_file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            return ""
        return text if re.fullmatch("[0-9a-f]{16}", text) else ""

    def make_id(self, known: str = "") -> str:
        """The run's id: as it is, or else `known`, or else drawn, and written."""
        found = self.read_id()
        if not found and self.writes:
            found = known or secrets.token_hex(8)
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.id_file, found + "\n")
        return found

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        if self.writes:
            write_atomically(self.path / name, json.dumps(value, indent=2, allow_nan=False) + "\n")

    def remove(self, name: str) -> None:
        """Remove a file of the run if it exists."""
        if self.writes:
            (self.path / name).unlink(missing_ok=True)

    def read_json(self, name: str) -> dict[str, Any]:
        """The content of a JSON file of the run; {} if it is missing. Raises RunError if it is damaged."""
        file = self.path / name
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise RunError(f"{file} is damaged: {error}") from None

    # -- metrics: appended line by line. A kill can leave half a line, which readers skip.

    def read_metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl as dictionaries. NaN and infinity are floats."""
        return list(self._metric_lines())

    def _metric_lines(self) -> Iterator[dict[str, Any]]:
        if not self.metrics_file.is_file():
            return
        with open(self.metrics_file, encoding="utf-8", errors="replace") as file:
            for line in file:
                with contextlib.suppress(json.JSONDecodeError, RecursionError):
                    value = json.loads(line)
                    if isinstance(value, dict) and "step" in value:
                        yield value

    def has_steps(self) -> bool:
        """Whether a line is of an update."""
        return any(isinstance(line["step"], int) and line["step"] > 0 for line in self._metric_lines())

    def cut_metrics(self, step: int) -> None:
        """Remove the lines after `step`, because a run that resumes at this step writes them again."""
        if not self.writes:
            return
        kept = "".join(json.dumps(line) + "\n" for line in self._metric_lines() if line["step"] <= step)
        if self.metrics_file.is_file():
            write_atomically(self.metrics_file, kept)

    def open_metrics(self) -> IO[str]:
        if not self.writes:
            return open(os.devnull, "w", encoding="utf-8")
        self.path.mkdir(parents=True, exist_ok=True)
        return open(self.metrics_file, "a", encoding="utf-8", buffering=1)  # line-buffered: a kill loses no line

    # -- one writer at a time

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the run for this process. Raises Locked if another process trains it."""
        if not self.writes:
            yield
            return
        with locks.hold(self.path, Locked(f"{self.path} is being trained by another process")):
            yield


# -- a study's folder: study.toml, plan.json, a run directory for each arm and seed, and a summary of each run beside it

PLAN = "plan.json"


def run_name(arm: str, seed: int) -> str:
    """The name of a run's folder in the study's folder. The run's summary has the same name with .json."""
    return f"{arm}_seed{seed}"


def open_study(folder: str | Path) -> Study:
    """The study in a folder. Raises RunError if the folder has no study.toml."""
    if not (Path(folder) / "study.toml").is_file():
        raise RunError(f"{folder} is not a study's folder: it has no study.toml")
    return load_study(Path(folder) / "study.toml")


@dataclass(frozen=True)
class RegisteredPlan:
    """What a study asked before its first run."""

    date: str
    """When it was registered, in UTC."""
    sha256: str
    remarks: list[str]
    """What a reader of the results must know, one sentence each: what was changed since, or that it came late."""


def read_plan(folder: str | Path, study: Study) -> RegisteredPlan | None:
    """The registered plan in a study's folder, compared with what the study asks now; None without plan.json.

    Raises:
        RunError: plan.json is damaged.
    """
    file = Path(folder) / PLAN
    content = RunDir(folder).read_json(PLAN)
    if not content:
        return None
    try:
        date, sha256, late, plan = (content[key] for key in ("registered", "sha256", "late", "plan"))
        date, remarks = str(date), plan_changes(plan, study)
    except (ConfigError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{file} is damaged: {error}") from None
    if late:
        remarks.insert(0, f"the plan was registered on {date[:10]}, after runs had begun")
    if sha256 != plan_hash(plan):
        remarks.insert(0, f"{file} was edited: its sha256 is of another plan")
    return RegisteredPlan(date, sha256, remarks)


def new_plan(study: Study, late: bool) -> str:
    """The text of plan.json. `late`: runs have begun before."""
    plan = study_plan(study)
    now = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
    content = {"registered": now, "late": late, "sha256": plan_hash(plan), "plan": plan}
    return json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
