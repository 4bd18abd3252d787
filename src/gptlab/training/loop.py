"""The training loop: `train` trains a recipe and leaves a run directory.

Nothing that the loop does depends on when it was started: which tokens step s sees, its dropout and its learning rate
follow from the recipe and s, so a run that was killed and goes on from a checkpoint repeats the uninterrupted one.
"""

from __future__ import annotations

import math
import os
import resource
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gptlab.config import Recipe, UserError
from gptlab.data.shards import Dataset
from gptlab.model.gpt import address, build_model
from gptlab.optim.optimizers import make_optimizer
from gptlab.optim.schedule import learning_rate
from gptlab.precision.regimes import NotApplicable, enter_regime
from gptlab.rundir import RunDir, RunError
from gptlab.tasks.lm import LanguageModelling, open_datasets
from gptlab.training.checkpoint import Checkpoints
from gptlab.training.logs import Logs
from gptlab.training.setup import environment, pick_device, resolve, summary
from gptlab.training.signals import StopSignal
from gptlab.training.throughput import Stopwatch, peak_flops, peak_memory_gb


@dataclass
class Result:
    """How a run ended; result.json holds the same, without what does not apply."""

    status: str
    """completed, diverged, out_of_memory, interrupted, failed or not_applicable."""
    steps: int = 0
    tokens: int = 0
    final_train_loss: float | None = None
    final_val_loss: float | None = None
    val_perplexity: float | None = None
    val_bits_per_byte: float | None = None
    tokens_per_second: float | None = None
    """Median over the logged intervals of training alone, the first one left out: it compiles and warms up."""
    time_per_iter_ms: float | None = None
    peak_memory_gb: float | None = None
    wall_seconds: float | None = None
    cpu_seconds: float | None = None
    failed_at_step: int | None = None
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


def train(
    recipe: Recipe, out: str | Path | None = None, seed: int | None = None, resume: str = "auto", quiet: bool = False
) -> Result:
    """Train a recipe, or go on with a run that was stopped.

    Args:
        recipe: what to train.
        out: the run directory; default runs/<recipe>_seed<seed>.
        seed: replaces the recipe's.
        resume: "auto" goes on with the run that is in `out`; "never" refuses a folder with a run in it.
        quiet: print nothing.

    Returns:
        How the run ended, as result.json has it. A run that is finished already is not touched.

    Raises:
        UserError: a setting, dataset, folder or source that cannot be used; nothing is overwritten then.
    """
    if seed is not None:
        recipe = recipe.replace({"seed": seed})
    run = RunDir(out or f"runs/{recipe.name}_seed{recipe.seed}")
    if resume == "never" and run.exists():
        raise RunError(f"{run.path} already has a run in it: --resume auto goes on with it, --out names another folder")
    device, datasets = pick_device(recipe.train.device), open_datasets(recipe)
    with run.lock(), StopSignal() as stop:
        try:
            result = _train(recipe, run, datasets, device, stop, quiet)
        except NotApplicable as error:
            result = Result("not_applicable", reason=str(error))
            run.write_recipe(resolve(recipe, run, datasets, device)[0])
        except torch.OutOfMemoryError as error:
            result = Result("out_of_memory", reason=str(error).splitlines()[0])
        except (KeyboardInterrupt, UserError):
            raise
        except Exception as error:
            run.write_json("result.json", Result("failed", reason=f"{type(error).__name__}: {error}").to_json())
            raise
        if result.to_json() != run.read_json("result.json"):
            run.write_json("result.json", result.to_json())
    return result


def _train(
    recipe: Recipe, run: RunDir, datasets: list[Dataset], device: torch.device, stop: StopSignal, quiet: bool
) -> Result:
    began, cpu_began = time.perf_counter(), _cpu_seconds()
    regime = enter_regime(recipe.precision.regime, device)
    if recipe.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses, or does not repeat
    torch.use_deterministic_algorithms(recipe.train.deterministic)
    recipe, fill = resolve(recipe, run, datasets, device)
    limit = recipe.step_limit(sum(len(d.train) for d in datasets))
    before = run.read_json("result.json")
    if before.get("status") == "completed" and before["steps"] >= limit:
        return Result(**before)

    # the collaborators: data and loss, weights, optimizer, loss scaling, checkpoints
    task = LanguageModelling(recipe, datasets, device, run.path)
    model = build_model(recipe.model, device, regime.weights, fill)
    model.activation_checkpointing = recipe.train.activation_checkpointing
    optimizer = make_optimizer(model, recipe.optim)
    scaler = torch.amp.GradScaler(device.type, enabled=regime.loss_scaling)
    checkpoints = Checkpoints(run, recipe.checkpoint.keep_last, recipe.checkpoint.keep_best)
    tokens_per_step, micro_batch = recipe.batch.tokens_per_step, recipe.batch.micro_batch
    assert isinstance(micro_batch, int), "resolved"

    state: dict[str, Any] = {"step": 0, "measured": [], "wall_seconds": 0.0, "cpu_seconds": 0.0}
    restored = checkpoints.restore(model, optimizer)
    if restored:
        state = restored
        scaler.load_state_dict(state["scaler"])
    step, measured, saved_step = state["step"], state["measured"], state["step"] if restored else -1
    run.write_recipe(recipe)
    run.write_json("tokenizer.json", datasets[0].tokenizer.spec())
    run.write_json("environment.json", environment(recipe, datasets, model, device))
    run.cut_metrics(step if restored else -1)
    (run.path / "result.json").unlink(missing_ok=True)  # no result: it is running, or was killed
    if recipe.compile.enabled:
        model.compile(dynamic=False)

    watch, peak = Stopwatch(), peak_flops(device)
    seconds: float | None
    losses: list[torch.Tensor] = []  # of the updates since they were last read: a GPU does not wait for each
    lr, grad_norm, val_loss = 0.0, torch.zeros(()), state.get("val_loss")  # val_loss and measured are of this step
    diverged: tuple[int, str] | None = None
    logs = Logs(run, recipe, limit, step, quiet)
    logs.say(summary(recipe, model, device, limit, step))
    if recipe.hellaswag.every and not recipe.hellaswag.path:
        logs.say("HellaSwag is left out: --hellaswag.path FILE names hellaswag_val.jsonl")
    try:
        while True:
            ends, stopping = step >= limit, stop()
            saves = saved_step != step and (ends or stopping or due(step, recipe.checkpoint.every))

            # log; a loss that is not finite ends the run, before a checkpoint of it is written
            logs_now = step == 1 or ends or due(step, recipe.log.every)
            if losses and (logs_now or saves):
                values = torch.stack(losses).tolist()
                seconds = watch.lap(len(values))
                if logs_now:
                    line = {
                        "step": step, "tokens": step * tokens_per_step, "loss": values[-1], "lr": lr,
                        "grad_norm": grad_norm.item(), "tokens_per_second": tokens_per_step / seconds,
                        "memory_gb": peak_memory_gb(device),
                    }  # fmt: skip
                    if peak:
                        line["mfu"] = model.flops_per_token() * line["tokens_per_second"] / peak
                    if regime.loss_scaling:
                        line["loss_scale"] = scaler.get_scale()
                    logs.training(line)
                for back, value in enumerate(reversed(values)):
                    if not math.isfinite(value):
                        diverged = step - back, f"the training loss is {value}"
                losses = []
                if diverged:
                    break

            # evaluate, save, and see whether to stop
            watch.pause()
            if what := [name for name in task.due(step, ends) if name not in measured]:
                scores = task.evaluate(what, model, regime, micro_batch, stop)
                if scores is None:
                    stopping = saves = True  # asked to stop on the way; the resumed run evaluates here
                else:
                    logs.evaluation({"step": step, "tokens": step * tokens_per_step, **scores})
                    measured, val_loss = [*measured, *what], scores.get("val_loss", val_loss)
            if saves:
                progress = {
                    "step": step, "scaler": scaler.state_dict(), "measured": measured, "val_loss": val_loss,
                    "wall_seconds": state["wall_seconds"] + time.perf_counter() - began,
                    "cpu_seconds": state["cpu_seconds"] + _cpu_seconds() - cpu_began,
                }  # fmt: skip
                checkpoints.save(model, optimizer, progress)
                saved_step = step
            if ends or stopping:
                break
            watch.start()

            # one update: learning rate, accumulated gradient, clipping, step
            lr = learning_rate(step, recipe.optim.lr, recipe.schedule)
            for group in optimizer.param_groups:
                group["lr"] = lr
            if recipe.model.dropout:
                torch.manual_seed(address(recipe.seed, "dropout", step))
            loss = torch.zeros((), device=device)
            for x, y in task.micro_batches(step, micro_batch):  # (B, T) each
                with regime.context(device):
                    part = model(x, y, task.documents(x)) / tokens_per_step
                scaler.scale(part).backward()
                loss += part.detach()
            scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optim.grad_clip or math.inf)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss)
            step, measured, val_loss = step + 1, [], None
    finally:
        logs.close()
        checkpoints.wait()

    seconds, lines = watch.steady(), run.read_metrics()
    evaluations = [line for line in lines if "val_loss" in line]
    last_eval = evaluations[-1] if evaluations and not diverged else {}
    finished = step >= limit and "loss" in measured
    return Result(
        status="diverged" if diverged else "completed" if finished else "interrupted",
        steps=step,
        tokens=step * tokens_per_step,
        final_train_loss=next((line["loss"] for line in reversed(lines) if "loss" in line), None),
        final_val_loss=last_eval.get("val_loss"),
        val_perplexity=last_eval.get("val_perplexity"),
        val_bits_per_byte=last_eval.get("val_bits_per_byte"),
        tokens_per_second=tokens_per_step / seconds if seconds else None,
        time_per_iter_ms=1000 * seconds if seconds else None,
        peak_memory_gb=peak_memory_gb(device),
        wall_seconds=state["wall_seconds"] + time.perf_counter() - began,
        cpu_seconds=state["cpu_seconds"] + _cpu_seconds() - cpu_began,
        failed_at_step=diverged[0] if diverged else None,
        reason=diverged[1] if diverged else None,
    )


def due(step: int, every: int) -> bool:
    return every > 0 and step > 0 and step % every == 0


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
