"""The layout of a run directory and of a study's folder. All reading and writing of these files goes through here.

    recipe.toml  environment.json  tokenizer.json  metrics.jsonl  result.json  card.md  run.html  id
    checkpoints/step-00000500/  plots/

Training passes nothing but run directories to the analysis.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from gptlab import files, locks
from gptlab.config import Recipe, Study, build_recipe, load_study, plan_changes, plan_hash, study_plan
from gptlab.errors import ConfigError, Locked, RunError
from gptlab.status import STATUSES

# Fields that are computed with or compared, of result.json (and a study's summaries of it) and of environment.json.
RESULT: dict[str, Any] = {
    **dict.fromkeys(("status", "reason", "failure", "failed_tensor", "study", "arm", "group"), str),
    **dict.fromkeys(("steps", "tokens", "samples", "failed_at_step", "seed"), int),
    **dict.fromkeys(("final_train_loss", "final_val_loss", "wall_seconds", "cpu_seconds"), float),
}
ENVIRONMENT: dict[str, Any] = {"data": {"train_tokens": int, "fingerprint": str}, "threads": int, "parameters": int}

FAILURE = "failure.txt"  # what a failed run leaves

MOST_LINES = 50_000  # of training in memory: more than a plot has pixels, and some 60 MB
MOST_LINE_BYTES = 2**20  # a longer line is none of ours
MOST_AT_ONCE = 2**25  # bytes of metrics that are parsed together
NUMBERS = {int, float, bool, type(None)}  # what stands in a line
LOSS = re.compile(rb'"loss": ([^,}]+)')
STANDS_OUT = 1.5  # a loss this many times the last one kept is kept too


def write_atomically(path: Path, text: str) -> None:
    """Write a text file such that readers, also after a crash, see either the old or the new content as a whole."""
    temporary = _temporary(path)
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


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
        self.damaged_lines = 0
        """Lines of metrics.jsonl that the last `read_metrics` could not read."""

    @classmethod
    def open(cls, path: str | Path) -> RunDir:
        """An existing run. Raises RunError if the folder has no recipe.toml."""
        run = cls(path)
        if not run.exists():
            raise RunError(f"{path} is not a run directory: it has no recipe.toml")
        return run

    def exists(self) -> bool:
        try:
            return self.recipe_file.is_file()
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:  # of no run
                return False
            raise

    # -- files that are written as a whole

    def write_recipe(self, recipe: Recipe) -> None:
        if not self.writes:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.recipe_file, recipe.to_toml())

    def read_recipe(self) -> Recipe:
        try:
            return build_recipe(files.read_toml(self.recipe_file, RunError))
        except FileNotFoundError:
            raise RunError(f"{self.recipe_file} is missing") from None
        except ConfigError as error:
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
        """Remove a file of the run if it exists, and what a kill left of it."""
        if self.writes:
            (self.path / name).unlink(missing_ok=True)
            _temporary(self.path / name).unlink(missing_ok=True)

    def read_json(self, name: str) -> dict[str, Any]:
        """The content of a JSON file of the run; {} if it is missing. Raises RunError if it is damaged."""
        file = self.path / name
        try:
            content = files.read_json(file, RunError)
            with files.damaged(file, RunError):
                if name == "environment.json":
                    files.check_fields(content, ENVIRONMENT)
                elif name == "result.json" or "_seed" in name:  # a run's result, or a study's summary of it
                    files.check_fields(content, RESULT)
                    if "status" in content and content["status"] not in STATUSES:
                        raise ValueError(f"status = {content['status']}: unknown status")
        except FileNotFoundError:
            return {}
        except RunError as error:
            again = "; training writes it anew when it is deleted"
            raise RunError(f"{error}{again if name in ('result.json', 'environment.json') else ''}") from None
        return content

    # -- how far the run is

    def status(self, result: dict[str, Any], running: bool | None = None) -> str:
        """running, the status of the result.json, stopped (killed), or waiting.

        Args:
            running: whether a process trains the run; None asks its lock.
        """
        if running or (running is None and self.is_held()):
            return "running"
        begun = self.metrics_file.exists() or self.checkpoints.exists()
        return str(result.get("status") or ("stopped" if begun else "waiting"))

    def limit(self, recipe: Recipe) -> int | None:
        """Steps of the whole run; None while only a dataset tells that no process has opened."""
        tokens = self.read_json("environment.json").get("data", {}).get("train_tokens")
        return recipe.step_limit(tokens or 0) if tokens or not recipe.train.max_epochs else None

    # -- metrics: appended line by line. A kill can leave half a line, which readers skip.

    def read_metrics(self, most: int = MOST_LINES) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl as dictionaries, in bounded memory. NaN and infinity are floats.

        All evaluations are among them. Of more than `most` training lines every second, third, ... is, and between
        two of these the one with the highest loss where that stands out. `damaged_lines` counts what was skipped.
        """
        self.damaged_lines = 0
        if not self.metrics_file.is_file():
            return []
        with open(self.metrics_file, "rb") as file:
            count = sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b""))
        every = -(-count // most)
        if every <= 1 and (values := _parsed_at_once(self.metrics_file)) is not None:
            return values
        return list(self._metric_lines(every))

    def has_steps(self) -> bool:
        """Whether a line is of an update."""
        return any(isinstance(line["step"], int) and line["step"] > 0 for line in self._metric_lines(1))

    def _metric_lines(self, every: int) -> Iterator[dict[str, Any]]:
        left = 0  # lines of training until the next that is kept
        kept, highest, spike = -1.0, -1.0, b""

        def parsed(line: bytes) -> Iterator[dict[str, Any]]:
            if (value := parse_metrics(line)) is not None:
                yield value
            elif line.strip():
                self.damaged_lines += 1

        for block in _blocks(self.metrics_file):
            lines = block.removesuffix(b"\n").split(b"\n")
            if every <= 1:
                for line in lines:
                    yield from parsed(line)
                continue
            others = [i for i, line in enumerate(lines) if b'"loss"' not in line and line.startswith(b"{")]
            losses, damaged = _losses(block, lines, others)
            at = 0  # of a line; its loss is `passed` places before
            for passed, stop in enumerate([*others, len(lines)]):
                while at < stop:
                    begin, end = at - passed, min(at + left, stop) - passed
                    if left:
                        top = max(losses[begin:end])
                        if top > max(highest, STANDS_OUT * kept):
                            highest, spike = top, lines[losses.index(top, begin) + passed]
                        self.damaged_lines += sum(damaged[begin:end])
                        left, at = left - (end - begin), end + passed
                        continue
                    if spike:
                        yield from parsed(spike)
                    kept, highest, spike, left = losses[begin], -1.0, b"", every - 1
                    yield from parsed(lines[at])
                    at += 1
                if stop < len(lines):
                    yield from parsed(lines[stop])
                    at += 1
        if spike:
            yield from parsed(spike)
        if every > 1 and left != every - 1 and (last := self.last_line("loss")) is not None:
            yield last

    def lines_with(self, key: str) -> Iterator[dict[str, Any]]:
        """The lines of metrics.jsonl that have `key`, in order; only these are parsed."""
        name = f'"{key}"'.encode()
        for line in _raw_lines(self.metrics_file):
            if name in line and key in (value := parse_metrics(line) or {}):
                yield value

    def last_line(self, key: str) -> dict[str, Any] | None:
        """The last line of metrics.jsonl that has `key`, found from the end; None if there is none."""
        for line in _lines_backwards(self.metrics_file):
            if f'"{key}"'.encode() in line and key in (value := parse_metrics(line) or {}):
                return value
        return None

    def cut_metrics(self, step: int, most: int = 0) -> tuple[int, int]:
        """Remove the lines after `step`, because a run that resumes at this step writes them again.

        Args:
            most: lines to keep; 0 for all. Behind those that the checkpoint of this step knows of may be an evaluation
                at this step, by a process that was killed before its next checkpoint.

        Returns:
            The number of lines that are left, and that of damaged lines, which are removed too. The last line counts
            only if it is not cut off.
        """
        if not self.writes or not self.metrics_file.is_file():
            return 0, 0
        left = damaged = 0
        temporary = self.metrics_file.with_name(f".{self.metrics_file.name}.tmp")
        with open(temporary, "wb") as kept:
            for line in _raw_lines(self.metrics_file):
                ours = re.match(rb'\{"step": (\d{1,18}), "[^\0]*\}\n', line)  # parsing all would take a minute
                value = {"step": int(ours[1])} if ours else parse_metrics(line)
                if value is None:
                    damaged += bool(line.strip()) and line.endswith(b"\n")
                elif value["step"] <= step and (left < most or not most):
                    kept.write(line if line.endswith(b"\n") else line + b"\n")
                    left += 1
            kept.flush()
            os.fsync(kept.fileno())
        os.replace(temporary, self.metrics_file)
        return left, damaged

    def open_metrics(self) -> IO[str]:
        if not self.writes:
            return open(os.devnull, "w", encoding="utf-8")
        self.path.mkdir(parents=True, exist_ok=True)
        return open(self.metrics_file, "a", encoding="utf-8", buffering=1)  # line-buffered: a kill loses no line

    def has_open(self, file: IO[str]) -> bool:
        """Whether an open file is still metrics.jsonl."""
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self.metrics_file))
        except FileNotFoundError:
            return False

    # -- one writer at a time

    def is_held(self) -> bool:
        """Whether a process trains the run."""
        return locks.is_held(self.path)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the run for this process. Raises Locked if another process trains it."""
        if not self.writes:
            yield
            return
        with locks.hold(self.path, Locked(f"{self.path} is being trained by another process")):
            yield


def parse_metrics(line: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl; None for what is no line of a run: a whole step, and numbers or null under all names."""
    try:
        value = files.parse_json(line)
    except ValueError:
        return None
    if not isinstance(value, dict) or type(value.get("step")) is not int or not 0 <= value["step"] < 2**63:
        return None
    return value if all(v is None or isinstance(v, int | float | bool) for v in value.values()) else None


def _parsed_at_once(file: Path) -> list[dict[str, Any]] | None:
    """The lines of a file, parsed together in a third of the time; None unless `parse_metrics` takes every line."""
    with open(file, "rb") as opened:
        lines = opened.read(MOST_AT_ONCE).split(b"\n")
        if opened.read(1) or lines.pop():  # too much for memory, or the last line is cut off
            return None
    if not all(line.startswith(b"{") and line.endswith(b"}") and len(line) < MOST_LINE_BYTES for line in lines):
        return None
    try:
        values = files.parse_json(b"[" + b",".join(lines) + b"]")
    except ValueError:
        return None
    if len(values) != len(lines):  # a line with two objects, or two lines that are one
        return None
    for value in values:
        if type(value) is not dict or type(value.get("step")) is not int or not 0 <= value["step"] < 2**63:
            return None
        if not NUMBERS.issuperset(map(type, value.values())):
            return None
    return values


def _raw_lines(file: Path) -> Iterator[bytes]:
    """The lines of a file. A missing file has none."""
    if not file.is_file():
        return
    with open(file, "rb") as opened:
        yield from iter(lambda: opened.readline(MOST_LINE_BYTES), b"")


def _lines_backwards(file: Path) -> Iterator[bytes]:
    """The lines of a file from the last to the first. A missing file has none."""
    if not file.is_file():
        return
    with open(file, "rb") as opened:
        end, rest = opened.seek(0, os.SEEK_END), b""
        while end > 0:
            begin = max(0, end - 2**16)
            opened.seek(begin)
            first, *lines = (opened.read(end - begin) + rest).split(b"\n")
            yield from reversed(lines)
            end, rest = begin, first[:MOST_LINE_BYTES]
        yield rest


def _blocks(file: Path) -> Iterator[bytes]:
    """A file in blocks of whole lines. A missing file has none; what is longer than any line of ours is a block."""
    if not file.is_file():
        return
    with open(file, "rb") as opened:
        rest = b""
        while part := opened.read(MOST_LINE_BYTES):
            rest += part
            cut = rest.rfind(b"\n") + 1 or len(rest) * (len(rest) > MOST_LINE_BYTES)
            if cut:
                yield rest[:cut]
                rest = rest[cut:]
        if rest:
            yield rest


def _losses(block: bytes, lines: list[bytes], others: list[int]) -> tuple[list[float], list[bool]]:
    """The loss in each line of training, which is not parsed, and whether the line is damaged.

    It is infinite if it is no number, and minus infinity if it is NaN or the line is damaged.

    Args:
        lines: of the block.
        others: the positions of those that are not of training.
    """
    if block.count(b"}\n") == len(lines):
        with contextlib.suppress(ValueError):
            losses = [*map(float, LOSS.findall(block))]
            if len(losses) == len(lines) - len(others) and not math.isnan(sum(losses)):
                return losses, []
    skipped = set(others)
    training = [line for i, line in enumerate(lines) if i not in skipped]
    damaged = [not line.endswith(b"}") for line in training]
    return [-math.inf if d else _loss_of(line) for line, d in zip(training, damaged, strict=True)], damaged


def _loss_of(line: bytes) -> float:
    try:
        loss = float(LOSS.findall(line)[0])
    except (ValueError, IndexError):
        return math.inf
    return -math.inf if math.isnan(loss) else loss


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
    except (ConfigError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{file} is damaged: {files.because(error)}") from None
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
