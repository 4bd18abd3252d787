"""The training loop: `train` trains a recipe and leaves a run directory.

`fit` says when things happen, `update` what one optimizer step is. Nothing depends on when a process was started: the
tokens of step s, its dropout and its learning rate follow from the recipe and s, so a run that was killed and resumed
from a checkpoint repeats the uninterrupted run bit for bit.
"""

from __future__ import annotations

from pathlib import Path

import torch

from gptlab.config import Recipe, load_recipe
from gptlab.distributed.wrap import sync_gradients, with_last
from gptlab.errors import Stopped
from gptlab.guard import Diverged
from gptlab.optim.optimizers import after_update, before_gradients, is_averaging, set_lr
from gptlab.optim.schedule import learning_rate
from gptlab.training.job import Job, open_job
from gptlab.training.outcome import outcome_of, result_of_run
from gptlab.training.result import Result
from gptlab.training.step_buffer import Seen, clip_gradients
from gptlab.training.trainer import Trainer


def train(
    recipe: Recipe | str | Path,
    out: str | Path | None = None,
    seed: int | None = None,
    resume: str = "auto",
    quiet: bool = False,
) -> Result:
    """Train a recipe, or resume a run that was stopped.

    >>> gptlab.train("smoke-lm", out="runs/first")
    Result(status='completed', steps=200, ...)

    Args:
        recipe: what to train: of `load_recipe`, a name that `gptlab recipes` lists, or a TOML file.
        out: the run directory; default runs/<recipe>_seed<seed>.
        seed: replaces the recipe's.
        resume: "auto" resumes the run in `out`; "never" refuses a folder that holds a run.
        quiet: print nothing.

    Returns:
        How the run ended, as in result.json. A run that has finished is left as it is.

    Raises:
        UserError: a setting, dataset, folder or source that cannot be used. Nothing is overwritten.
        OutOfMemory: with several processes: this rank ran out of memory.
        LostRank: with several processes: another rank failed.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    recipe = recipe if seed is None else recipe.replace({"seed": seed})
    with open_job(recipe, out, resume, quiet) as job:
        while True:
            try:
                result = attempt(job)
            except Exception as error:
                result = outcome_of(error, job)  # raises what a caller has to see
            if not (result.status == "out_of_memory" and job.halve_micro_batch()):
                return job.finish(result)


def attempt(job: Job) -> Result:
    with Trainer(job) as trainer:
        diverged: Diverged | None = None
        try:
            fit(trainer)
        except Diverged as error:
            diverged = error
    return result_of_run(trainer, diverged)


def fit(t: Trainer) -> None:
    """Train until the last step, or until a stop is requested.

    Raises:
        Diverged: the loss or the weights broke. No checkpoint holds such weights.
    """
    while True:
        step = t.state.step
        last, stopping = step >= t.limit, t.stop_requested()
        saving = step != t.saved_step and (last or stopping or t.saves_at(step))

        # log the updates since the last look, and judge them; only here does training wait for a GPU
        if t.monitor.pending and (t.logs_at(step) or saving):
            t.monitor.report(t.state, t.logs if t.logs_at(step) else None)

        with t.monitor.paused():  # throughput is of updates alone
            try:
                t.evaluate(last)  # fixed windows and no shared random numbers: training does not notice
            except Stopped:
                saving = stopping = True  # the resumed run evaluates at this step
            if saving:
                t.save()
        if last or stopping:
            return

        t.monitor.observe(update(t, step))
        t.state.next()


def update(t: Trainer, step: int) -> Seen:
    """One optimizer step. It follows from the recipe, the weights, the optimizer's state and `step`."""
    set_lr(t.optimizer, lr := learning_rate(step, t.recipe.optim.lr, t.recipe.schedule))
    t.seed_dropout(step)
    before_gradients(t.optimizer)

    # losses are summed over the tokens of the whole step: a smaller last micro-batch has its proper weight
    factor = t.scaler.scale(torch.full((), 1 / t.task.per_step, device=t.device))
    loss, largest_logit = torch.zeros((), device=t.device), torch.zeros((), device=t.device)
    for batch, last in with_last(t.batches(step)):
        with sync_gradients(t.net, last):  # ranks exchange gradients once a step
            with t.regime.context(t.device):
                scaled, value, logit = t.net(*batch, factor)  # a HeadLoss
            scaled.backward()
        loss, largest_logit = loss + value / t.task.per_step, torch.maximum(largest_logit, logit)
    t.collect_gradients()
    t.scaler.unscale_(t.optimizer)

    t.inject_faults(step)
    t.pruner.before_update(step)
    norms = clip_gradients(t.weights, t.max_norm, None if t.regime.loss_scaling else t.optimizer)
    # a step that ends at an average says nothing of what rounding loses
    with t.monitor.lost_updates(t.logs_at(step + 1) and not is_averaging(t.optimizer)):
        t.scaler.step(t.optimizer)
    after_update(t.optimizer)
    t.pruner.after_update(step + 1)
    t.scaler.update()
    t.optimizer.zero_grad(set_to_none=t.frees_gradients)
    return Seen(lr, loss, largest_logit, norms)
