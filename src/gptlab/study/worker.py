"""One run of a study in a process of its own: `python -m gptlab.study.worker FOLDER ARM SEED`.

The exit status is that of `gptlab train` (`gptlab.status.EXIT_CODES`). After a mistake in the call it is 2, without a
result.json.
"""

from __future__ import annotations

import atexit
import gc
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
from gptlab.rundir import RunDir, open_study, run_name
from gptlab.status import EXIT_CODES
from gptlab.streams import best_effort

if TYPE_CHECKING:
    from gptlab.training.result import Result

RUNNER = "GPTLAB_STUDY_RUNNER"  # environment variable: the process id of the runner that started this worker
LOCK_SECONDS = 600.0  # time for an orphan of a killed runner to end its step and save a checkpoint


def main(arguments: list[str]) -> int:
    folder, arm, seed = arguments
    out = Path(folder) / run_name(arm, int(seed))
    # before PyTorch is imported, as the runner may end at any time
    threading.Thread(target=_end_with_runner, daemon=True).start()
    try:
        study = open_study(folder)
        trunk = study.trunk(arm)
        branch = (RunDir(Path(folder) / run_name(trunk[0], int(seed))), trunk[1]) if trunk else None
        result = _train(study.build(arm, int(seed)), out, branch)
    except UserError as error:
        print(f"gptlab: {error}", file=sys.stderr)
        return 2
    try:
        from gptlab.report.run_page import write_pages

        write_pages(RunDir(out))  # a tenth of a second; plots take ten times as long, `gptlab plot` draws them
    except (UserError, OSError) as error:  # the run has ended as it has
        print(f"{out}: no card.md and run.html: {error}", file=sys.stderr)
    return EXIT_CODES[result.status]


def _end_with_runner() -> None:
    """When the runner has ended for any reason, ask this process to save and end."""
    runner = int(os.environ.get(RUNNER, os.getppid()))
    # On Windows getppid() never changes, and is not the runner's for the Python of a virtual environment.
    while process_is_alive(runner) if os.name == "nt" else os.getppid() == runner:
        time.sleep(0.5)
    print("the study's runner has ended: this run stops too", file=sys.stderr, flush=True)
    signal.raise_signal(signal.SIGTERM)


def _train(recipe: Recipe, out: Path, trunk: tuple[RunDir, int] | None = None) -> Result:
    """Train, or continue a run. If another process trains the run, usually an orphan, wait until it has ended.

    Args:
        trunk: the run that this one branches off, and at which step.
    """
    from gptlab.study.branching import start_branch
    from gptlab.training.loop import train

    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            if trunk is not None:
                start_branch(*trunk, recipe, RunDir(out))
            return train(recipe, out, resume="auto", quiet=True)
        except Locked:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


if __name__ == "__main__":
    if "RANK" not in os.environ:
        atexit.register(gc.freeze)  # as `gptlab train` does
    with best_effort():  # worker.log may be on a full disk
        status = main(sys.argv[1:])
    sys.exit(status)
