"""The parts of one run, built in the order in which a reader needs them."""

from __future__ import annotations

import codecs
import contextlib
import locale
import math
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import TracebackType
from typing import Any

import torch

from gptlab import machine
from gptlab.distributed.shard import LocalShards
from gptlab.distributed.world import SharedFlag
from gptlab.distributed.wrap import make_scaler, replicate
from gptlab.errors import RunError, Stopped, UserError
from gptlab.optim.optimizers import make_optimizer
from gptlab.planning.plan import plan_here
from gptlab.precision.regimes import enter_regime
from gptlab.progress import Progress
from gptlab.rundir import FAILURE
from gptlab.seeding import address
from gptlab.sparsity.pruner import make_pruner
from gptlab.tasks.base import Init, task_of
from gptlab.training.ahead import Ahead
from gptlab.training.attention import attention_kernel, attention_seconds, fastest, ignored
from gptlab.training.checkpoint import Checkpoints, final_sparsity_step, list_checkpoints
from gptlab.training.job import Job
from gptlab.training.loggers import require_packages
from gptlab.training.logs import Logs
from gptlab.training.monitor import Monitor
from gptlab.training.result import NotStarted, Result
from gptlab.training.setup import environment, idle_steps, resolve, settle_regime, summary
from gptlab.training.signals import stack_on_sigterm
from gptlab.training.state import State
from gptlab.training.throughput import Energy

# PyTorch's names. CUDA graphs would keep the gradient of one micro-batch where the next ones are to be added to it.
COMPILE_MODES = {"default": "default", "max-autotune": "max-autotune-no-cudagraphs"}


class Trainer:
    """Everything that `fit` and `update` work with. A context: it closes logs and waits for the last checkpoint.

    Args:
        job: what is open.

    Raises:
        NotStarted: the run has finished, or does not fit into memory.
        UserError: the run cannot continue with these settings or data; nothing is overwritten.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.run, self.world, self.device = job, job.run, job.world, job.device
        self.leaving, self.stop = contextlib.ExitStack(), SharedFlag(job.world)
        with Progress("starting", not job.quiet and self.world.first):
            self._open()
        self._open_logs()

    def _open(self) -> None:
        """Everything but the logs, which hold the screen from then on."""
        job = self.job
        self.began, self.cpu_began, self.energy = time.perf_counter(), time.process_time(), Energy(self.device)
        recipe, self.bf16 = settle_regime(job.recipe, self.run, job.data, self.device, self.world)
        self.regime = enter_regime(recipe.precision, self.device)
        set_determinism(recipe.train.deterministic)
        self.recipe, init = resolve(recipe, self.run, job.data, self.device, self.world)
        self.limit = self.recipe.step_limit(job.data.epoch_tokens(self.recipe.model.block_size))
        self.micro_batch = int(self.recipe.batch.micro_batch)  # "auto" is resolved
        self._preflight()
        self.remarks = ignored(self.recipe, job.recipe, self.device)
        if self.recipe.train.attention == "fastest":
            name, told = fastest(attention_seconds(self.recipe, self.regime, self.device))
            self.recipe = self.recipe.replace({"train.attention": self.world.broadcast(name)})
            self.remarks.append(told)
        self._build(init)
        self._restore()

    def _preflight(self) -> None:
        """Refuse what need not or cannot start, before anything is written."""
        stored = self.run.read_json("result.json")
        self.world.barrier()  # all ranks have read what rank 0 is about to write
        if stored.get("status") == "completed" and (stored.get("steps") or 0) >= self.limit:
            raise NotStarted(Result.from_json(stored))
        if self.recipe.compile.enabled and codecs.lookup(locale.getpreferredencoding(False)).name == "ascii":
            raise UserError(
                "compile.enabled = true: PyTorch's compiler reads files in the locale's encoding, which is ASCII and "
                "must be UTF-8: set PYTHONUTF8=1, or pass --compile.enabled false"
            )
        require_packages(self.recipe)
        if self.recipe.train.eval_only:
            return
        n = self.recipe.sequences_per_step
        self.world.pieces(n // self.world.size, n, self.micro_batch)  # raises where ranks cannot share them
        plan = plan_here(self.recipe, self.device, self.world.size, self.job.data)
        if (refusing := int(self.world.max(self.world.rank if plan.refused else -1))) < 0:
            return
        facts = plan.sentence, plan.needed_gb, plan.available_gb
        sentence, asked, free = self.world.broadcast(facts, src=refusing)
        if list_checkpoints(self.run):
            raise RunError(f"{self.run.path} cannot continue here: it {sentence}")
        raise NotStarted(
            Result("out_of_memory", failed_at_step=0, memory_asked_gb=asked, memory_free_gb=free, reason=sentence)
        )

    def _build(self, init: Init) -> None:
        """Task, model, optimizer, pruner, loss scaling, checkpoints."""
        recipe, world = self.recipe, self.world
        self.sharded = world.size > 1 and recipe.distributed.strategy == "fsdp"
        self.task = task_of(recipe)(recipe, self.job.data, self.device, self.run.path, world)
        make = partial(self.task.micro_batches, micro_batch=self.micro_batch)
        self.batches: Callable[[int], Iterator[tuple[Any, ...]]] = make
        if self.device.type == "cuda":  # copies to a GPU need not wait for its step; a CPU has nothing to gain
            self.batches = ahead = Ahead(make)
            self.leaving.callback(ahead.close)
        self.model = self.task.build(self.regime, init, self.sharded)
        self.weights = LocalShards(self.model) if self.sharded else self.model  # this rank's part of them
        self.optimizer = make_optimizer(self.weights, recipe.optim, recipe.seed, recipe.train.ema, recipe.model)
        self.pruner = make_pruner(self.weights, self.optimizer, recipe)
        self.scaler = make_scaler(self.device, self.regime.loss_scaling, self.sharded)
        self.checkpoints = Checkpoints(
            self.run,
            recipe.checkpoint.keep_last,
            recipe.checkpoint.keep_best,
            world,
            self.sharded,
            final_sparsity_step(recipe),
            recipe.checkpoint.at,
        )
        # SPAM clips by itself, after it has seen the norm
        self.max_norm = math.inf if recipe.optim.name == "adamw-spam" else recipe.optim.grad_clip or math.inf
        self.monitor = Monitor(
            self.run, recipe, self.regime, self.task, self.model, self.weights, self.pruner, self.scaler, world
        )

    def _restore(self) -> None:
        """The newest checkpoint, if there is one; then the files that say what runs here."""
        restored = self.checkpoints.restore(self.weights, self.optimizer, self.pruner)
        self.state, self.saved_step = State(), -1
        if restored:
            try:
                self.state = State.from_state_dict(restored)
                self.scaler.load_state_dict(numbers(restored["scaler"]))
                self.monitor.guard.load_state_dict(numbers(restored.get("guard", {})))
            except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
                raise RunError(
                    f"{self.run.path}: training.json of checkpoint {restored['step']} is not of a run: {error}"
                ) from None
            self.saved_step = self.state.step
        self.job.state, self.job.task = self.state, self.task
        self.run.make_id()
        self.run.write_recipe(self.recipe)
        self.run.write_json("tokenizer.json", self.job.data.tokenizer.spec())
        if self.world.first:
            facts = environment(
                self.recipe, self.job.data, self.model, self.optimizer, self.device, self.world, self.bf16
            )
            before = self.run.read_json("environment.json") if restored else {}
            facts |= {key: before[key] for key in ("branch_of",) if key in before}
            self.run.write_json("environment.json", facts)
        had, step = self.state.metrics_lines, self.state.step
        again = set(self.task.due(step, step >= self.limit)) - set(self.state.evaluated)
        kept = self.run.cut_metrics(self.saved_step, had if again else 0)
        self.state.metrics_lines, self.damaged_lines = kept
        self.missing_lines = had - self.state.metrics_lines
        self.run.remove("result.json")  # without it the run is running, or was killed
        self.run.remove(FAILURE)
        if self.recipe.compile.enabled:
            self.model.compile(dynamic=False, mode=COMPILE_MODES[self.recipe.compile.mode])
        self.net = replicate(self.model) if self.world.size > 1 and not self.sharded else self.model
        self.frees_gradients = self.net is self.model  # DDP's stay in its buckets

    def _open_logs(self) -> None:
        recipe, quiet = self.recipe, self.job.quiet or not self.world.first
        self.logs = Logs(self.run, recipe, self.task.unit, self.limit, self.saved_step, self.state, quiet)
        where = self.device, self.limit, self.state.step, self.world, self.bf16
        self.logs.message(summary(recipe, self.task, self.model, *where))
        if self.damaged_lines:
            lines = f"{self.damaged_lines} damaged line{'s' * (self.damaged_lines > 1)}"
            self.logs.message(f"{self.run.metrics_file}: {lines} removed; what they held is not measured again")
        if self.world.first and self.missing_lines > 0:
            self.logs.message(
                f"{self.run.metrics_file}: {self.missing_lines} of the {self.missing_lines + self.state.metrics_lines} "
                f"lines up to step {self.saved_step} are missing, and are not measured again"
            )
        if self.device.type == "mps":
            self.logs.message("train.device = mps is untested: compare a short run with --train.device cpu")
        if not recipe.train.eval_only and (idle := idle_steps(recipe, self.limit)):
            self.logs.message(idle)
        for remark in self.remarks:
            self.logs.message(remark)
        for problem in self.checkpoints.passed_over:
            self.logs.message(f"{problem}; it is passed over")
        alone = self.device.type == "cpu" and self.world.size == 1 and not quiet
        if alone and (crowded := machine.crowded(torch.get_num_threads())):
            self.logs.message(crowded)
        if recipe.hellaswag.every and not recipe.hellaswag.path:
            self.logs.message("HellaSwag is left out: --hellaswag.path FILE names hellaswag_val.jsonl")

    def __enter__(self) -> Trainer:
        self.leaving.enter_context(attention_kernel(self.recipe.train.attention))
        if self.world.size > 1:
            self.leaving.enter_context(stack_on_sigterm(self.run.path / f"stack-rank-{self.world.rank}.txt"))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.leaving.close()
        self.logs.close()
        self.checkpoints.wait()

    # -- what `fit` asks for

    def logs_at(self, step: int) -> bool:
        return step == 1 or step >= self.limit or due(step, self.recipe.log.every)

    def saves_at(self, step: int) -> bool:
        return due(step, self.recipe.checkpoint.every) or step in self.recipe.checkpoint.at

    def stop_requested(self) -> bool:
        """Whether some rank was asked to stop: all ranks stop at the same step, with several one step later."""
        return self.stop(self.job.signal())

    def check_stop(self) -> None:
        """Raises Stopped on all ranks where a stop was requested."""
        if self.stop_requested():
            raise Stopped

    def before_batch(self, what: str, done: int, total: int) -> None:
        """What an evaluation calls before each batch."""
        self.logs.evaluating(what, done, total)
        self.check_stop()

    def evaluate(self, last: bool) -> None:
        """Evaluate what is due at this step and not done yet.

        Raises:
            Stopped: a stop was requested meanwhile; nothing of it is kept.
            Diverged: the held-out loss or the updates before it show a divergence.
        """
        state = self.state
        what = [name for name in self.task.due(state.step, last) if name not in state.evaluated]
        if not what:
            return
        if self.monitor.pending:  # the guard compares the held-out loss with the training losses up to it
            self.monitor.report(state, None)
        whole = self.task.build(self.regime, self.weights.gather_into) if self.sharded else self.model
        scores = self.task.evaluate(what, whole, self.regime, self.micro_batch, self.before_batch)
        self.logs.evaluated()
        self.logs.samples(state.step, scores.pop("samples", []))
        if scores:
            self.logs.evaluation({"step": state.step, self.task.unit: state.step * self.task.per_step, **scores})
        state.evaluated, state.val_loss = [*state.evaluated, *what], scores.get("val_loss", state.val_loss)
        if "val_loss" in scores:
            self.monitor.evaluated(state, scores["val_loss"], last)

    def save(self) -> None:
        """Copy the state; a thread writes the files. `State`, scaler and guard go into training.json."""
        progress = {
            **self.state.state_dict(),
            **self.spent(),
            "scaler": self.scaler.state_dict(),
            "guard": self.monitor.guard.state_dict(),
        }
        self.checkpoints.save(self.weights, self.optimizer, progress, self.pruner)
        self.saved_step = self.state.step

    # -- what `update` asks for

    def seed_dropout(self, step: int) -> None:
        if self.recipe.model.dropout:
            rank = [self.world.rank] if self.world.rank else []
            torch.manual_seed(address(self.recipe.seed, "dropout", step, *rank))

    def collect_gradients(self) -> None:
        """FSDP's gradients go to the local rows."""
        if self.sharded:
            self.weights.collect_gradients()

    @torch.no_grad()
    def inject_faults(self, step: int) -> None:
        """Every faults.gradient_every updates a gradient spike, for the `spikes` study: gradients times a factor."""
        if due(step + 1, self.recipe.faults.gradient_every):
            grads = [p.grad for p in self.weights.parameters() if p.grad is not None]
            torch._foreach_mul_(grads, self.recipe.faults.gradient_factor)

    # -- the end

    def spent(self) -> dict[str, float]:
        """Seconds and joules of the run so far, earlier processes included."""
        state, world = self.state, self.world
        return {
            "wall_seconds": state.wall_seconds + time.perf_counter() - self.began,
            "cpu_seconds": state.cpu_seconds + world.sum(time.process_time() - self.cpu_began),
            "energy_joules": state.energy_joules + world.sum(self.energy.joules() or 0.0),
        }


def numbers(state: dict[str, Any]) -> dict[str, Any]:
    """A stored state, if it holds nothing but numbers, None, and lists of numbers; raises ValueError otherwise."""
    for name, value in state.items():
        for number in value if isinstance(value, list) else [value]:
            if not (number is None or isinstance(number, int | float)):
                raise ValueError(f"{name} = {value!r}")
    return state


def set_determinism(on: bool) -> None:
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses, or does not repeat
    if on != torch.are_deterministic_algorithms_enabled():  # the call imports PyTorch's compiler, for a second
        torch.use_deterministic_algorithms(on)


def due(step: int, every: int) -> bool:
    return every > 0 and step > 0 and step % every == 0
