"""How a run ended: what result.json holds, and what is made of an error."""

from __future__ import annotations

import contextlib
import gc
import json
import re
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from gptlab.config import Recipe
from gptlab.distributed.world import World, is_lost_rank
from gptlab.rundir import RunDir
from gptlab.training.checkpoint import checkpoint_step, list_checkpoints

FIRST_STEPS = 10  # after which a run that runs out of memory is not tried again with less at a time
LINGER = 5  # seconds; see `say_end`


@dataclass
class Result:
    """How a run ended; result.json holds the same, without what does not apply."""

    status: str
    """completed, diverged, out_of_memory, interrupted, failed or not_applicable."""
    steps: int = 0
    tokens: int | None = None
    samples: int | None = None
    final_train_loss: float | None = None
    final_val_loss: float | None = None
    val_perplexity: float | None = None
    val_bits_per_byte: float | None = None
    final_train_eval_loss: float | None = None
    """The loss over as many tokens of the training split, where eval.train asks for it."""
    tokens_per_second: float | None = None
    """In the steady state: a step over its median time. The process's first ten steps (compilation, warm-up) are left
    out, evaluations and checkpoints too."""
    samples_per_second: float | None = None
    """The same in documents, for task = classify."""
    time_per_iter_ms: float | None = None
    """Median over the steady state."""
    time_per_iter_p95_ms: float | None = None
    timed_steps: int | None = None
    """Steps that the times are of."""
    peak_memory_gb: float | None = None
    peak_memory_reserved_gb: float | None = None
    """What PyTorch took from the GPU, with what it did not use."""
    wall_seconds: float | None = None
    cpu_seconds: float | None = None
    energy_joules: float | None = None
    cost: float | None = None
    sparsity: float | None = None
    """Share of the prunable weights that is zero."""
    mask_bytes: int | None = None
    """What the masks take, one bit a weight."""
    mask_overhead_percent: float | None = None
    """Share of the steps' time that went into masks."""
    skipped_steps: int | None = None
    """Updates left out because their float16 gradients overflowed."""
    largest_logit: float | None = None
    """The largest |logit| of any training step."""
    scores: dict[str, float] = field(default_factory=dict)
    """A classifier's scores at the end; result.json has them beside the rest."""
    failed_at_step: int | None = None
    failure: str | None = None
    """Kind of divergence: non_finite, spike or collapse."""
    failed_tensor: str | None = None
    """The first tensor concerned."""
    memory_asked_gb: float | None = None
    """Where memory ran out: what the last tensor would have taken, and what the device had free and in all."""
    memory_free_gb: float | None = None
    memory_total_gb: float | None = None
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        plain = {key: value for key, value in asdict(self).items() if value is not None and key != "scores"}
        return {**plain, **self.scores}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Result:
        known = {f.name for f in fields(cls)}
        scores = {key: value for key, value in content.items() if key not in known}
        return cls(**{key: value for key, value in content.items() if key in known}, scores=scores)


def ran_out_of_memory(error: Exception) -> bool:
    """On a CPU PyTorch raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def result_of(error: Exception, run: RunDir, device: torch.device, world: World) -> Result:
    """The result of a run that an error ended: out_of_memory or failed."""
    if ran_out_of_memory(error):
        return out_of_memory(str(error), run, device)
    first, *_ = str(error).splitlines() or [""]
    says = f"{type(error).__name__}: {first}"
    if world.size > 1:
        what = "lost another one" if is_lost_rank(error) else "failed"
        says = f"process {world.rank} of {world.size} {what}: {says}"
    return Result("failed", reason=says)


def say_end(result: Result, run: RunDir, world: World, follows: bool, before: dict[str, Any]) -> None:
    """Say why this process of several ends; the first one that does writes result.json.

    Args:
        follows: another one has ended: whoever started them all is to see that one first, and not this.
        before: result.json as an earlier attempt left it.
    """
    who = "" if result.status == "failed" else f"process {world.rank} of {world.size}: "
    print(f"{who}{result.reason}", file=sys.stderr, flush=True)
    if follows:
        time.sleep(LINGER)
    with contextlib.suppress(OSError):
        if before and run.read_json("result.json") == before:
            (run.path / "result.json").unlink()
        with open(run.path / "result.json", "x", encoding="utf-8") as file:
            json.dump(result.to_json(), file, indent=2)


def halve_micro_batch(recipe: Recipe, run: RunDir, quiet: bool) -> bool:
    """After running out of memory in the first steps: half as many sequences at a time, twice as often.

    Only where batch.micro_batch is auto: a number that was given is not changed. The run's recipe.toml has the new one.

    Returns:
        Whether the run can be tried again.
    """
    if recipe.batch.micro_batch != "auto" or not run.exists():
        return False
    stored = run.read_recipe()
    begun = max((checkpoint_step(path) for path in list_checkpoints(run)), default=0)
    done = max((line["step"] for line in run.read_metrics() if "loss" in line), default=0)
    most = stored.batch.micro_batch
    if most == "auto" or most == 1 or done > begun + FIRST_STEPS:
        return False
    run.write_recipe(stored.replace({"batch.micro_batch": most // 2}))
    gc.collect()  # what the failed attempt still holds
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()  # the result's peak is of the attempt that succeeds
    if not quiet:
        print(
            f"out of memory with micro-batches of {most} sequences: trying again with {most // 2}, and more of them a "
            f"step; a step still has {recipe.batch.tokens_per_step:,} tokens",
            file=sys.stderr,
            flush=True,
        )
    return True


def out_of_memory(message: str, run: RunDir, device: torch.device) -> Result:
    """What was asked for, which PyTorch's message says, and what there is when the run has let go of nothing yet."""
    import psutil

    free, total = psutil.virtual_memory().available, psutil.virtual_memory().total
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
    asked = re.search(r"tried to allocate ([\d.]+) (\w+)", message, re.IGNORECASE)
    unit = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    reason = message.splitlines()[0] if message else "out of memory"
    if run.exists() and (most := run.read_recipe().batch.micro_batch) != "auto" and most > 1:
        reason += f"; --batch.micro-batch {most // 2} takes less at a time and trains the same, auto finds what fits"
    return Result(
        "out_of_memory",
        memory_asked_gb=float(asked[1]) * unit.get(asked[2], 1) / 1e9 if asked else None,
        memory_free_gb=free / 1e9,
        memory_total_gb=total / 1e9,
        reason=reason,
    )
