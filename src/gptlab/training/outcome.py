"""The result of a run: from its trainer if it ended or was stopped, or from the error that ended it."""

from __future__ import annotations

import contextlib
import json
import math
import re
import statistics
import traceback
from dataclasses import fields
from typing import Any

import torch

from gptlab.distributed.world import World, is_lost_rank
from gptlab.errors import DataError, LostRank, NotApplicable, OutOfMemory, UserError
from gptlab.files import printable
from gptlab.guard import Diverged
from gptlab.rundir import FAILURE, RunDir, write_atomically
from gptlab.streams import say
from gptlab.training.job import Job
from gptlab.training.result import NotStarted, Result
from gptlab.training.throughput import peak_memory_gb, percentile
from gptlab.training.trainer import Trainer

# The status of a run that an exception ended; the first class that fits. A divergence is not among them: the trainer
# knows more of it. See `result_of_run`.
STATUS_OF: dict[type[Exception], str] = {
    NotApplicable: "not_applicable",
    OutOfMemory: "out_of_memory",
    LostRank: "failed",
    Exception: "failed",
}

MOST_NAMED = 8  # of the ranks that are missing


def typed(error: Exception, world: World) -> Exception:
    """The error as one of our types, where PyTorch raises a type that says less."""
    first, *_ = str(error).splitlines() or [""]
    rank = f"rank {world.rank} of {world.size}"
    # on a CPU PyTorch raises a plain RuntimeError
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error):
        return OutOfMemory(str(error))
    if world.size > 1 and is_lost_rank(error):
        missing = world.missing()
        named = ", ".join(map(str, missing[:MOST_NAMED])) + (", ..." if len(missing) > MOST_NAMED else "")
        who = f"rank {named}, which ended or hangs" if missing else "another rank"
        return LostRank(f"{rank} lost {who}: {type(error).__name__}: {first}")
    return error


def outcome_of(error: Exception, job: Job) -> Result:
    """The result of a run that an error ended.

    Raises:
        UserError: as it came: nothing has been written but for data that turned out to be damaged under way.
        Exception: a failed run's error, when its result is written. With several processes every error is raised, as
            the other ranks wait for this one; the first rank that fails writes result.json.
    """
    if isinstance(error, NotStarted):
        return error.result
    under_way = isinstance(error, DataError) and job.state is not None
    if isinstance(error, UserError) and not isinstance(error, NotApplicable) and not under_way:
        raise error
    known = typed(error, job.world)
    status = next(status for kind, status in STATUS_OF.items() if isinstance(known, kind))
    if status == "not_applicable":
        return Result(status, reason=str(known))
    if status == "out_of_memory":
        result = out_of_memory(str(known), job.run, job.device)
    else:
        first, *_ = str(known).splitlines() or [""]
        said = isinstance(known, LostRank | DataError)
        result = Result(status, reason=first if said else f"{type(known).__name__}: {first}")
    if job.state is not None:
        result.steps = job.state.step
    if job.world.size > 1:
        rank = f"rank {job.world.rank} of {job.world.size}"
        if not isinstance(known, LostRank):
            result.reason = f"{rank}: {result.reason}"
        if _write_first(result, job):
            leave_evidence(error, result, job)
        if known is error:
            raise error
        raise type(known)(result.reason) from error
    leave_evidence(error, result, job)
    if status == "failed":
        with contextlib.suppress(OSError):  # what ended the run is raised, whether it can be recorded or not
            job.write(result)
        raise error
    return result


def _write_first(result: Result, job: Job) -> bool:
    """Write result.json, unless another rank has, or the file is that of an earlier attempt. Returns whether it did."""
    file = job.run.path / "result.json"
    with contextlib.suppress(OSError):
        if job.before and job.run.read_json("result.json") == job.before:
            file.unlink()
        with open(file, "x", encoding="utf-8") as opened:
            json.dump(result.to_json(), opened, indent=2)
            return True
    return False


def leave_evidence(error: Exception, result: Result, job: Job) -> None:
    """Write failure.txt: the last metrics, the batch by its place in the data, the stack, and memory that ran out."""
    run, state = job.run, job.state
    parts = [f"{result.status} after {result.steps} steps: {result.reason}"]
    with contextlib.suppress(OSError, RuntimeError):  # a full disk, or a GPU that answers no more
        lines = filter(None, map(run.last_line, ("loss", "val_loss")))
        parts.append("\n".join(["last metrics", *map(json.dumps, lines)]))
        if state is not None and job.task is not None:
            batch = json.dumps(job.task.batch_of(state.step))
            parts.append(f"batch of step {state.step + 1}, in the training split\n{batch}")
        parts.append("stack\n" + "".join(traceback.format_exception(error)))
        if result.status == "out_of_memory" and job.device.type == "cuda":
            parts.append("memory\n" + torch.cuda.memory_summary(job.device))
        write_atomically(run.path / FAILURE, printable("\n\n".join(parts)) + "\n")
        if result.status == "failed" and state is not None and not job.quiet:
            say(f"{run.path / FAILURE} has the stack, the last metrics and the batch")


def result_of_run(t: Trainer, diverged: Diverged | None = None) -> Result:
    """The result of a run that reached its end, was stopped, or diverged. All ranks call this."""
    unit, state, spent = t.task.unit, t.state, t.spent()
    times, all_seconds = t.monitor.watch.steady(), sum(t.monitor.watch.step_seconds)
    finished = state.step >= t.limit and not set(t.task.due(state.step, True)) - set(state.evaluated)
    last = {} if diverged else t.run.last_line("val_loss") or {}
    named = {"step", unit, "val_loss", "train_eval_loss", *(f.name for f in fields(Result))}
    median = statistics.median(times) if times else None
    counts: dict[str, Any] = {unit: state.step * t.task.per_step}
    counts[f"{unit}_per_second"] = t.task.per_step / median if median else None
    masks, masking = t.pruner.facts(), t.monitor.mask_seconds
    reserved = torch.cuda.max_memory_reserved(t.device) / 1e9 if t.device.type == "cuda" else None
    return Result(
        status="diverged" if diverged else "completed" if finished else "interrupted",
        steps=state.step,
        **counts,
        final_train_loss=(t.run.last_line("loss") or {}).get("loss"),
        final_val_loss=last.get("val_loss"),
        val_perplexity=last.get("val_perplexity"),
        val_bits_per_byte=last.get("val_bits_per_byte"),
        final_train_eval_loss=last.get("train_eval_loss"),
        time_per_iter_ms=1000 * median if median else None,
        time_per_iter_p95_ms=1000 * percentile(times, 0.95) if times else None,
        timed_steps=len(times),
        peak_memory_gb=t.world.max(peak_memory_gb(t.device)),
        peak_memory_reserved_gb=None if reserved is None else t.world.max(reserved),
        wall_seconds=spent["wall_seconds"],
        cpu_seconds=spent["cpu_seconds"],
        energy_joules=spent["energy_joules"] or None,
        cost=spent["wall_seconds"] / 3600 * t.recipe.train.price_per_hour or None,
        sparsity=masks.get("sparsity"),
        mask_bytes=masks.get("mask_bytes"),
        mask_overhead_percent=100 * masking / all_seconds if masking else None,
        skipped_steps=state.skipped_steps if t.regime.loss_scaling else None,
        largest_logit=state.largest_logit if math.isfinite(state.largest_logit) else None,
        scores={key: last[key] for key in last if key not in named},
        failed_at_step=diverged.divergence.step if diverged else None,
        failure=diverged.divergence.kind if diverged else None,
        failed_tensor=diverged.tensor if diverged else None,
        reason=diverged.divergence.reason if diverged else None,
    )


def out_of_memory(message: str, run: RunDir, device: torch.device) -> Result:
    """What was asked for, as PyTorch's message says, and what is free while the run still holds its memory."""
    import psutil

    free, total = psutil.virtual_memory().available, psutil.virtual_memory().total
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
    asked = re.search(r"tried to allocate ([\d.]+) (\w+)", message, re.IGNORECASE)
    unit = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    reason = message.splitlines()[0] if message else "out of memory"
    if run.exists() and (most := run.read_recipe().batch.micro_batch) != "auto" and most > 1:
        reason += f"; --batch.micro-batch {most // 2} needs less memory and trains the same; auto finds what fits"
    return Result(
        "out_of_memory",
        memory_asked_gb=float(asked[1]) * unit.get(asked[2], 1) / 1e9 if asked else None,
        memory_free_gb=free / 1e9,
        memory_total_gb=total / 1e9,
        reason=reason,
    )
