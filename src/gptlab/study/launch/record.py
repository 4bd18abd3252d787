"""launch.json: which jobs were submitted for the folder of a run or a study."""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from gptlab.errors import RunError
from gptlab.files import check_fields, damaged
from gptlab.rundir import RunDir, write_atomically
from gptlab.study.launch.resources import Resources

RECORD = "launch.json"
FILES = "launch"  # the folder beside launch.json: batch scripts, logs, the recipe
RECIPE = f"{FILES}/recipe.toml"
PRINTED = "printed"  # the job number in a printed script, until the script runs


@dataclass
class LaunchPart:
    """One job, or one job array."""

    name: str
    """run or study; for a study on SLURM gate (runs that open the sanity gate), arms (all other runs), gate_branches
    and branches (runs that branch off those), report."""
    words: list[str]
    """The command of the job; [] when read from launch.json."""
    resources: Resources
    runs: list[tuple[str, int]] = field(default_factory=list)
    """(arm, seed) of each task of an array, or of all runs that the job trains."""
    after: list[str] = field(default_factory=list)
    """Names of the parts that must end first."""
    job: str = ""
    """Job number of SLURM, or process id of the local job; empty before submission."""


@dataclass
class Launch:
    """What launch.json holds."""

    folder: Path
    on: str
    """slurm or local."""
    name: str
    command: str
    """The command line of the launch. The same command line continues what is not finished."""
    parts: list[LaunchPart]
    jobs: int | None = None
    """Runs of a study at the same time."""
    arms: list[str] | None = None
    seeds: list[int] | None = None
    host: str = field(default_factory=socket.gethostname)
    launched: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S"))
    files: dict[str, str] = field(default_factory=dict)
    """{path in the folder: text} of what the job reads beside launch.json; not in launch.json."""

    def to_json(self) -> str:
        parts = {
            part.name: {"job": part.job, "runs": part.runs, "resources": part.resources.model_dump()}
            for part in self.parts
        }
        keys = ("on", "name", "command", "jobs", "arms", "seeds", "host", "launched")
        return json.dumps({key: getattr(self, key) for key in keys} | {"parts": parts}, indent=2) + "\n"

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / RECORD, self.to_json())

    @classmethod
    def read(cls, folder: Path) -> Launch | None:
        """The launch of a folder; None without launch.json. Raises RunError where the file is damaged."""
        content = RunDir(folder).read_json(RECORD)
        if not content:
            return None
        with damaged(folder / RECORD, RunError):
            texts, lists = ("on", "name", "command", "host", "launched"), ("arms", "seeds")
            check_fields(content, dict.fromkeys(texts, str) | dict.fromkeys(lists, list) | {"jobs": int})
            if content["on"] not in ("slurm", "local") or not content["parts"]:
                raise ValueError(f"on = {content['on']}, or no parts")
            parts = []
            for name, part in content.pop("parts").items():
                check_fields(part, {"job": str, "runs": list, "resources": dict})
                if part["job"] is None or not all(isinstance(a, str) and isinstance(s, int) for a, s in part["runs"]):
                    raise ValueError(f"part {name} has no job, or other runs than arms and seeds")
                runs = [(arm, seed) for arm, seed in part["runs"]]
                parts.append(LaunchPart(name, [], Resources(**part["resources"]), runs, job=part["job"]))
            return cls(folder, parts=parts, **content)

    def part(self, name: str) -> LaunchPart:
        return next(part for part in self.parts if part.name == name)

    def tasks(self) -> Iterator[tuple[str, LaunchPart, tuple[str, int] | None]]:
        """(job number as SLURM writes it, part, run) for every job and for every task of an array."""
        for part in self.parts:
            for i, run in enumerate(part.runs):
                yield f"{part.job}_{i}" if self.on == "slurm" and part.job else part.job, part, run
            if not part.runs:
                yield part.job, part, None


def job_command(folder: Path, part: str) -> list[str]:
    """The command of a job. launch.json in the folder says what the job does."""
    return [sys.executable, "-uP", "-m", "gptlab", "launch", "--job", str(folder.resolve()), "--part", part]
