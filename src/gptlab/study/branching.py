"""Runs that branch off a longer one: at the step where their decay begins they take over its checkpoint.

    trunk    warm-up, constant rate ............................ decay
    branch                        \\ decay

A warm-up-stable-decay schedule has the same rate in both until the branch decays, and data and dropout follow from the
step: the branch is bit for bit the run that would have trained from the beginning.
"""

from __future__ import annotations

import sys

from gptlab.config import Recipe
from gptlab.errors import RunError
from gptlab.rundir import RunDir
from gptlab.training.checkpoint import copy_checkpoint, list_checkpoints, step_folder, verify

SPENT = ("wall_seconds", "cpu_seconds", "energy_joules")


def start_branch(trunk: RunDir, step: int, recipe: Recipe, run: RunDir) -> None:
    """Make a run directory at a step of another run. A run that has a checkpoint of its own is left as it is.

    Where the other run has no whole checkpoint of the step, the run starts from the beginning, and says so.
    """
    with run.lock():
        if list_checkpoints(run):
            return
        checkpoint = trunk.checkpoints / step_folder(step)
        try:
            progress = verify(checkpoint, trunk.read_id())
            stored = trunk.read_recipe()
            facts, tokenizer = trunk.read_json("environment.json"), trunk.tokenizer_file.read_bytes()
            lines = trunk.metrics_file.read_bytes()
        except (RunError, OSError) as error:
            says = f"{trunk.path} has no checkpoint of step {step} to branch off ({error})"
            print(f"{says}: it starts from the beginning", file=sys.stderr, flush=True)
            return
        own = {key: getattr(recipe.train, key) for key in ("max_steps", "max_tokens", "max_epochs")}
        shared = {key: progress.get(key, 0.0) for key in SPENT}
        run.path.mkdir(parents=True, exist_ok=True)
        run.write_json(
            "environment.json",
            {**facts, "branch_of": {"run": trunk.path.name, "id": trunk.read_id(), "step": step, **shared}},
        )
        run.tokenizer_file.write_bytes(tokenizer)
        run.metrics_file.write_bytes(lines)
        run.cut_metrics(step, progress.get("metrics_lines", 0))
        run.write_recipe(
            stored.replace(
                {
                    "name": recipe.name,
                    "train": {**stored.train.model_dump(), **own},
                    "schedule.decay_steps": recipe.train.max_steps,
                    "checkpoint": recipe.checkpoint.model_dump(),
                }
            )
        )
        copy_checkpoint(checkpoint, run, dict.fromkeys(SPENT, 0.0))  # last: from here on the run goes on by itself
