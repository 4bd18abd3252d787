"""One run of a study, in a process of its own: `python -m gptlab.study.worker FOLDER ARM SEED`.

Ends with 0 where a result was written, 3 where it diverged or ran out of memory, 4 where it was interrupted, 2 where it
cannot be trained as it is asked for, 1 where it failed.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from gptlab.config import Recipe
from gptlab.errors import Locked, UserError
from gptlab.machine import process_is_alive
from gptlab.rundir import open_study, run_name

if TYPE_CHECKING:
    from gptlab.training.outcome import Result

RUNNER = "GPTLAB_STUDY_RUNNER"  # environment variable: the process id of the runner that started this worker
LOCK_SECONDS = 600.0  # an orphan of a killed runner ends after its current step and a checkpoint
CODES = {"completed": 0, "not_applicable": 0, "failed": 1, "diverged": 3, "out_of_memory": 3, "interrupted": 4}


def main(arguments: list[str]) -> int:
    folder, arm, seed = arguments
    # before anything else is imported, as the runner may end any time
    threading.Thread(target=_end_with_runner, daemon=True).start()
    try:
        result = _train(open_study(folder).build(arm, int(seed)), Path(folder) / run_name(arm, int(seed)))
    except UserError as error:
        print(f"gptlab: {error}", file=sys.stderr)
        return 2
    return CODES[result.status]


def _end_with_runner() -> None:
    """When the runner dies, whatever of, ask this process to save and end."""
    runner = int(os.environ.get(RUNNER, os.getppid()))
    # on Windows a process keeps its parent's number for good, and a virtual environment's Python has another parent
    while process_is_alive(runner) if os.name == "nt" else os.getppid() == runner:
        time.sleep(0.5)
    print("the study's runner has ended: this run stops too", file=sys.stderr, flush=True)
    signal.raise_signal(signal.SIGTERM)


def _train(recipe: Recipe, out: Path) -> Result:
    """Train, or go on; where another process holds the run, an orphan as a rule, wait until it has ended."""
    from gptlab.training.loop import train

    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return train(recipe, out, resume="auto", quiet=True)
        except Locked:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
