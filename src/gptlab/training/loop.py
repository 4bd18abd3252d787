"""The training loop: `train` trains a recipe and leaves a run directory.

Nothing that the loop does depends on when it was started: which tokens step s sees, its dropout and its learning rate
follow from the recipe and s, so a run that was killed and goes on from a checkpoint repeats the uninterrupted one.
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gptlab import machine, planner
from gptlab.config import Recipe
from gptlab.distributed.shard import LocalShards
from gptlab.distributed.world import World, is_lost_rank, process_group
from gptlab.distributed.wrap import make_scaler, replicate, sync_gradients, with_last
from gptlab.errors import NotApplicable, RunError, UserError
from gptlab.hardware import gpu_of, mfu
from gptlab.optim.optimizers import make_optimizer, set_lr
from gptlab.optim.rounding import LostUpdates
from gptlab.optim.schedule import learning_rate
from gptlab.precision.regimes import enter_regime
from gptlab.rundir import RunDir
from gptlab.seeding import address
from gptlab.tasks.data import Data, make_task, open_data, tokenizer_of, train_tokens
from gptlab.training.checkpoint import Checkpoints, list_checkpoints
from gptlab.training.guard import Divergence, Guard
from gptlab.training.logs import Logs
from gptlab.training.pruning import make_pruner, mask_facts, spike_gradients
from gptlab.training.result import Result, halve_micro_batch, result_of, say_end
from gptlab.training.setup import environment, pick_device, resolve, summary
from gptlab.training.signals import StopSignal
from gptlab.training.throughput import Energy, Stopwatch, peak_memory_gb, percentile
from gptlab.training.watched import Watched, clip_gradients


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
        SystemExit: of several processes this one ran out of memory, or lost another one.
    """
    if seed is not None:
        recipe = recipe.replace({"seed": seed})
    run = RunDir(out or f"runs/{recipe.name}_seed{recipe.seed}")
    if resume == "never" and run.exists():
        raise RunError(f"{run.path} already has a run in it: --resume auto goes on with it, --out names another folder")
    device, datasets = pick_device(recipe.train.device), open_data(recipe)
    with process_group(recipe.distributed.strategy, device) as world:
        run.writes = world.first
        before = run.read_json("result.json")
        signal = StopSignal(run.path if world.first else None)
        with hold(run, world), signal as stop, cpu_threads(recipe.train.threads):
            while True:
                less = False  # whether to try again with less at a time
                try:
                    result = _train(recipe, run, datasets, device, world, stop, quiet)
                except NotApplicable as error:
                    result = Result("not_applicable", reason=str(error))
                except (KeyboardInterrupt, UserError):
                    raise
                except Exception as error:
                    result = result_of(error, run, device, world)
                    if world.size > 1:  # the others wait for this process: whoever started them all ends them
                        say_end(result, run, world, is_lost_rank(error), before)
                        if is_lost_rank(error):
                            sys.exit(1)  # its traceback would be of this process, and the fault is the other's
                        if result.status == "out_of_memory":
                            sys.exit(3)
                        raise
                    if result.status == "failed":
                        run.write_json("result.json", result.to_json())
                        raise
                    less = True
                if not (less and halve_micro_batch(recipe, run, quiet)):
                    break
            if not world.broadcast(run.exists()):
                run.write_recipe(resolve(recipe, run, datasets, device, world)[0])
            if result.to_json() != run.read_json("result.json"):
                run.write_json("result.json", result.to_json())
        return world.broadcast(result)


@contextlib.contextmanager
def hold(run: RunDir, world: World) -> Iterator[None]:
    """The run's lock, which the first process takes for all; where it is refused, that is said in all of them."""
    with contextlib.ExitStack() as held:
        refused: UserError | None = None
        try:
            held.enter_context(run.lock())
        except UserError as error:
            refused = error
        if refused := world.broadcast(refused):
            raise refused
        yield


@contextlib.contextmanager
def cpu_threads(number: int) -> Iterator[None]:
    """Set PyTorch's number of CPU threads, and set it back for the next run in this process. 0 leaves it as it is."""
    before = torch.get_num_threads()
    if number:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        if number:
            torch.set_num_threads(before)


def _train(
    recipe: Recipe, run: RunDir, datasets: Data, device: torch.device, world: World, signal: StopSignal, quiet: bool
) -> Result:
    began, cpu_began, energy = time.perf_counter(), time.process_time(), Energy(device)
    regime = enter_regime(recipe.precision, device)
    if recipe.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses, or does not repeat
    torch.use_deterministic_algorithms(recipe.train.deterministic)
    recipe, fill = resolve(recipe, run, datasets, device, world)
    limit = recipe.step_limit(train_tokens(recipe, datasets))
    before = run.read_json("result.json")
    world.barrier()  # all have read what the first process is about to write
    if before.get("status") == "completed" and before["steps"] >= limit:
        return Result.from_json(before)
    if not recipe.train.eval_only:
        n, most = recipe.sequences_per_step, recipe.batch.micro_batch
        assert isinstance(most, int), "resolved"
        world.pieces(n // world.size, n, most)  # says before anything is written that they cannot be shared
        found = planner.fits(recipe, device, world.size)
        if (refuses := int(world.max(world.rank if found.refused else -1))) >= 0:
            facts = found.sentence, found.needed_gb, found.available_gb
            sentence, asked, free = world.broadcast(facts, src=refuses)
            if list_checkpoints(run):
                raise RunError(f"{run.path} cannot go on here: it {sentence}")
            return Result(
                "out_of_memory", failed_at_step=0, memory_asked_gb=asked, memory_free_gb=free, reason=sentence
            )

    # the collaborators: data and loss, weights, optimizer, loss scaling, checkpoints, and who watches for divergence
    sharded = world.size > 1 and recipe.distributed.strategy == "fsdp"
    task = make_task(recipe, datasets, device, run.path, world)
    model = task.build(regime, fill, sharded)
    weights = LocalShards(model) if sharded else model  # what this process has of them
    optimizer = make_optimizer(weights, recipe.optim, recipe.seed)
    pruner = make_pruner(weights, optimizer, recipe)
    scaler = make_scaler(device, regime.loss_scaling, sharded)
    checkpoints = Checkpoints(run, recipe.checkpoint.keep_last, recipe.checkpoint.keep_best, world, sharded)
    constant = world.broadcast(task.constant_loss() if world.first else None)
    guard, lost = Guard(constant, recipe.schedule.warmup_steps), LostUpdates(weights)
    watched = Watched(weights, regime.weights is not torch.float32, world)
    # SPAM clips by itself, when it has looked at the norm
    max_norm = math.inf if recipe.optim.name == "adamw-spam" else recipe.optim.grad_clip or math.inf
    unit, per_step, micro_batch = task.unit, task.per_step, recipe.batch.micro_batch
    assert isinstance(micro_batch, int), "resolved"

    state: dict[str, Any] = {
        "step": 0,
        "measured": [],
        "wall_seconds": 0.0,
        "cpu_seconds": 0.0,
        "energy_joules": 0.0,
        "skipped_steps": 0,
        "largest_logit": 0.0,
    }
    restored = checkpoints.restore(weights, optimizer, pruner)
    if restored:
        state |= restored
        scaler.load_state_dict(state["scaler"])
        if "guard" in state:
            guard.load_state_dict(state["guard"])
    step, measured, saved_step = state["step"], state["measured"], state["step"] if restored else -1
    run.write_recipe(recipe)
    run.write_json("tokenizer.json", tokenizer_of(datasets).spec())
    if world.first:
        run.write_json("environment.json", environment(recipe, datasets, model, optimizer, device, world))
    run.cut_metrics(step if restored else -1)
    run.remove("result.json")  # no result: it is running, or was killed
    if recipe.compile.enabled:
        model.compile(dynamic=False)
    net = replicate(model) if world.size > 1 and not sharded else model

    watch, gpu = Stopwatch(device), gpu_of(device)
    peak = gpu.peak(regime.matmul_format) if gpu else None
    lr, val_loss = 0.0, state.get("val_loss")  # val_loss and measured are of this step
    updates_lost: torch.Tensor | None = None
    mask_seconds = 0.0
    diverged: Divergence | None = None
    tensor: str | None = None

    def logged(step: int) -> bool:
        return step == 1 or step >= limit or due(step, recipe.log.every)

    def spent() -> dict[str, float]:
        return {
            "wall_seconds": state["wall_seconds"] + time.perf_counter() - began,
            "cpu_seconds": state["cpu_seconds"] + world.sum(time.process_time() - cpu_began),
            "energy_joules": state["energy_joules"] + world.sum(energy.joules() or 0.0),
        }

    def stop() -> bool:
        return world.any(signal())  # all stop at one step

    logs = Logs(run, recipe, limit, step, quiet or not world.first)
    logs.say(summary(recipe, model, device, limit, step, world))
    if device.type == "mps":
        logs.say("train.device = mps: gptlab is untested on Apple's GPUs; compare a short run with --train.device cpu")
    if device.type == "cpu" and world.size == 1 and not quiet and (says := machine.crowded(torch.get_num_threads())):
        logs.say(says)
    if recipe.hellaswag.every and not recipe.hellaswag.path:
        logs.say("HellaSwag is left out: --hellaswag.path FILE names hellaswag_val.jsonl")
    try:
        while True:
            ends, stopping = step >= limit, stop()
            saves = saved_step != step and (ends or stopping or due(step, recipe.checkpoint.every))

            # log, and look at each update since the last look; a divergence ends the run before it is checkpointed
            logs_now = logged(step)
            if watched and (logs_now or saves):
                updates = watched.read(step)
                seconds, masking = watch.lap(), pruner.overhead() if pruner else 0.0
                mask_seconds += masking
                state["largest_logit"] = max(state["largest_logit"], *(update.largest_logit for update in updates))
                for update in updates:
                    skipped = regime.loss_scaling and not math.isfinite(update.grad_norm)
                    state["skipped_steps"] += skipped
                    diverged = diverged or guard.update(update.step, update.loss, update.grad_norm, skipped)
                if logs_now:
                    line = {
                        "step": step,
                        unit: step * per_step,
                        "loss": updates[-1].loss,
                        "lr": lr,
                        "grad_norm": updates[-1].grad_norm,
                        f"{unit}_per_second": per_step / seconds,
                        "memory_gb": peak_memory_gb(device),
                        "largest_logit": updates[-1].largest_logit,
                    }
                    if updates_lost is not None and not (regime.loss_scaling and skipped):
                        line["updates_lost"] = float(updates_lost)
                    if peak and unit == "tokens":
                        line["mfu"] = mfu(model.flops_per_token(), line["tokens_per_second"], world.size * peak)
                    if pruner:
                        line |= mask_facts(pruner, run, step, masking / (seconds * len(updates)))
                    if regime.loss_scaling:
                        line |= {"loss_scale": scaler.get_scale(), "skipped_steps": state["skipped_steps"]}
                    logs.training(line)
                if diverged:
                    diverged, tensor = watched.evidence(diverged, updates, run)
                    break

            # evaluate, save, and see whether to stop
            watch.pause()
            if what := [name for name in task.due(step, ends) if name not in measured]:
                whole = task.build(regime, weights.gather_into) if isinstance(weights, LocalShards) else model
                scores = task.evaluate(what, whole, regime, micro_batch, stop)
                del whole  # FSDP's copy is not to stay while training goes on
                if scores is None:
                    stopping = saves = True  # asked to stop on the way; the resumed run evaluates here
                else:
                    logs.samples(step, scores.pop("samples", []))
                    if scores:
                        logs.evaluation({"step": step, unit: step * per_step, **scores})
                    measured, val_loss = [*measured, *what], scores.get("val_loss", val_loss)
                    if val_loss is not None and not math.isfinite(val_loss):
                        diverged = Divergence(step, "non_finite", f"the held-out loss is {val_loss} at step {step}")
                        break
            if saves:
                progress = {
                    "step": step,
                    "scaler": scaler.state_dict(),
                    "measured": measured,
                    "val_loss": val_loss,
                    "guard": guard.state_dict(),
                    **spent(),
                }
                checkpoints.save(weights, optimizer, {**state, **progress}, pruner)
                saved_step = step
            if ends or stopping:
                break
            watch.start()

            # one update: learning rate, accumulated gradient, clipping, step
            lr = learning_rate(step, recipe.optim.lr, recipe.schedule)
            set_lr(optimizer, lr)
            if recipe.model.dropout:
                torch.manual_seed(address(recipe.seed, "dropout", step, *([world.rank] if world.rank else [])))
            factor = scaler.scale(torch.full((), 1 / per_step, device=device))
            loss, largest = torch.zeros((), device=device), torch.zeros((), device=device)
            for batch, last in with_last(task.micro_batches(step, micro_batch)):
                with sync_gradients(net, last):
                    with regime.context(device):
                        scaled, value, logit = net(*batch, factor)  # a HeadLoss
                    scaled.backward()
                loss, largest = loss + value / per_step, torch.maximum(largest, logit)
            if isinstance(weights, LocalShards):
                weights.collect_gradients()
            scaler.unscale_(optimizer)
            if due(step + 1, recipe.faults.gradient_every):
                spike_gradients(weights, recipe.faults.gradient_factor)
            if pruner:
                pruner.before_update(step)
            norms = clip_gradients(weights, max_norm)
            if logged(step + 1):
                lost.before()
            scaler.step(optimizer)
            updates_lost = lost.after() if logged(step + 1) else None
            if pruner:
                pruner.after_update(step + 1)
            watched.update(loss, largest, norms)
            scaler.update()
            optimizer.zero_grad(set_to_none=net is model)  # DDP's gradients stay in its buckets
            watch.step()
            step, measured, val_loss = step + 1, [], None
    finally:
        logs.close()
        checkpoints.wait()

    times, lines, sums = watch.steady(), run.read_metrics(), spent()
    evaluations = [line for line in lines if "val_loss" in line]
    last_eval = evaluations[-1] if evaluations and not diverged else {}
    finished = step >= limit and "loss" in measured
    rate = per_step / statistics.median(times) if times else None
    return Result(
        status="diverged" if diverged else "completed" if finished else "interrupted",
        steps=step,
        tokens=step * per_step if unit == "tokens" else None,
        samples=step * per_step if unit == "samples" else None,
        final_train_loss=next((line["loss"] for line in reversed(lines) if "loss" in line), None),
        final_val_loss=last_eval.get("val_loss"),
        val_perplexity=last_eval.get("val_perplexity"),
        val_bits_per_byte=last_eval.get("val_bits_per_byte"),
        final_train_eval_loss=last_eval.get("train_eval_loss"),
        tokens_per_second=rate if unit == "tokens" else None,
        samples_per_second=rate if unit == "samples" else None,
        time_per_iter_ms=1000 * statistics.median(times) if times else None,
        time_per_iter_p95_ms=1000 * percentile(times, 0.95) if times else None,
        timed_steps=len(times),
        peak_memory_gb=world.max(peak_memory_gb(device)),
        peak_memory_reserved_gb=(
            world.max(torch.cuda.max_memory_reserved(device) / 1e9) if device.type == "cuda" else None
        ),
        wall_seconds=sums["wall_seconds"],
        cpu_seconds=sums["cpu_seconds"],
        energy_joules=sums["energy_joules"] or None,
        cost=sums["wall_seconds"] / 3600 * recipe.train.price_per_hour or None,
        sparsity=pruner.sparsity() if pruner else None,
        mask_bytes=pruner.mask_bytes() if pruner else None,
        mask_overhead_percent=100 * mask_seconds / sum(watch.step_seconds) if mask_seconds else None,
        skipped_steps=state["skipped_steps"] if regime.loss_scaling else None,
        largest_logit=finite(state["largest_logit"]),
        scores={key: last_eval[key] for key in last_eval if key not in NOT_SCORES} if unit == "samples" else {},
        failed_at_step=diverged.step if diverged else None,
        failure=diverged.kind if diverged else None,
        failed_tensor=tensor,
        reason=diverged.reason if diverged else None,
    )


# keys of an evaluation line that have a place of their own in a result
NOT_SCORES = ("step", "samples", "val_loss", "train_eval_loss")


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def due(step: int, every: int) -> bool:
    return every > 0 and step > 0 and step % every == 0
