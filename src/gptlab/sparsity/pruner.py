"""Pruning while training: what the training loop calls before and after each update."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gptlab.config import Recipe, Sparsity
from gptlab.distributed.shard import Weights, all_reduce_shards, global_shape, local_rows
from gptlab.errors import UserError
from gptlab.seeding import address
from gptlab.sparsity import scores
from gptlab.sparsity.masks import pack, unpack
from gptlab.sparsity.schedule import is_change, ramp, rigl_fraction, sparsity_at
from gptlab.sparsity.selection import smallest, two_of_four

# stands for infinity where it is added to scores: on a CPU that takes a third of masked_fill_'s time
LARGEST = torch.finfo(torch.float32).max


def prunable(model: Weights, head: bool) -> dict[str, nn.Parameter]:
    """By name, the matrices that are pruned: those of the linear layers inside the blocks, and a GPT's output head.

    Args:
        model: a GPT or an Encoder, or the rows of one that are here.
        head: whether the head is pruned too; where it is tied to the embedding, the two are one tensor.

    Raises:
        UserError: the head of a classifier.
    """
    parameters = dict(model.named_parameters())
    if head and "head.weight" in parameters:
        raise UserError("sparsity.head = true: is for task = lm, a classifier's head is a row for each label")
    extra = "lm_head.weight" if "lm_head.weight" in parameters else "wte.weight"
    found = {
        name: p
        for name, p in parameters.items()
        if (name.startswith("h.") and p.dim() == 2) or (head and name == extra)
    }
    assert found and len({id(p) for p in found.values()}) == len(found), "there are matrices, each of them once"
    return found


# Optimizers that move a weight by its own moments and gradient alone: where these are zero, a zero stays.
ELEMENTWISE = ("adamw", "adamw-spam", "adamw-prune", "sgd")


def make_pruner(model: Weights, optimizer: torch.optim.Optimizer, recipe: Recipe) -> Pruner | NoPruner:
    """The pruner of a recipe with schedule.decay_steps resolved."""
    if recipe.sparsity.method == "none":
        return NoPruner()
    again = recipe.optim.name not in ELEMENTWISE
    return Pruner(model, optimizer, recipe.sparsity, recipe.schedule.decay_steps, recipe.seed, every_update=again)


class NoPruner:
    """A dense run: nothing is masked."""

    def before_update(self, step: int) -> None: ...

    def after_update(self, step: int) -> None: ...

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None: ...

    def facts(self) -> dict[str, Any]:
        return {}

    def overhead(self) -> float:
        return 0.0


class Pruner:
    """Masks over the prunable weights of a model in training.

    The loop, where `step` counts updates done:

        backward passes; unscale; pruner.before_update(step); clip; optimizer.step(); pruner.after_update(step + 1)

    Methods (`sparsity.method`):
    - magnitude, state, movement by distance: at each change exactly int(s N) weights are masked, those that already are
      and the smallest scores among the others. Masks only grow.
    - movement by gradient (Sanh et al. 2020, arXiv 2005.07683): the forward and backward pass see masked weights, but
      a dense copy of them and the scores go on being updated, straight through the mask; a weight may come back. At the
      end of the ramp masks become final, and the dense copy and the scores are dropped.
    - rigl (Evci et al. 2020, arXiv 1911.11134): from the first step each matrix has exactly int(target n) masked
      weights, drawn at random. Every `every` steps some of the active ones, the smallest |w|, are dropped and as many
      grown where |gradient| is largest. As in the authors' code, what was just dropped may be grown at once and
      then keeps its value, and others start at 0. Unlike there, the update of that step is taken.
    - 2:4: two of each four along a matrix's rows, by |w|, once.

    But for movement by gradient, a masked weight, its gradient and its moments are zero. Gradients are masked at each
    update; weights and moments only when masks change, as they then stay zero by themselves under an optimizer that
    acts entry by entry. Moments that are stored in 8 bits are left alone.

    Masks are one bit a weight (`masks.pack`) and are unpacked one matrix at a time. Scores are float32, whatever the
    weights are.

    Where FSDP spreads the rows of matrices over processes, all this is of the rows here, but for what is counted and
    drawn: shares, thresholds and first masks are of whole matrices, and so are the facts that are told. All processes
    call each method.

    Args:
        model: with its starting weights, on its device. rigl, and 2:4 that begins at 0, set weights to zero here unless
            the optimizer has state already: that is a resumed run, whose masks come by `load_tensors`.
        optimizer: over the model's parameters; method state needs exp_avg and exp_avg_sq in it.
        sparsity: the settings; method is not none.
        decay_steps: what `begin` and `end` are shares of, at least 1.
        seed: of rigl's first masks, which are addressed by (seed, "rigl", name) and drawn on the CPU.
        every_update: mask the weights after each update too, for an optimizer that does not act entry by entry (Muon)
            or not exactly (8 bits).

    Raises:
        UserError: 2:4 of a matrix whose rows are no multiple of 4 long, or the head of a classifier.
    """

    changed_at = 0  # the step at which masks changed last

    @torch.no_grad()
    def __init__(
        self,
        model: Weights,
        optimizer: torch.optim.Optimizer,
        sparsity: Sparsity,
        decay_steps: int,
        seed: int,
        every_update: bool,
    ) -> None:
        assert sparsity.method != "none" and decay_steps >= 1
        self.settings, self.decay_steps, self.every_update = sparsity, decay_steps, every_update
        self.optimizer, self.parameters = optimizer, prunable(model, sparsity.head)
        self.begin, self.end = ramp(sparsity, decay_steps)
        self.device = next(iter(self.parameters.values())).device
        self._flipped = torch.zeros((), dtype=torch.int64, device=self.device)
        self._counted: dict[str, int] | None = None  # masked weights of each matrix, once someone asked
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

        # all that is kept beside the model, by the names it is stored under
        self._kept: dict[str, Tensor] = {}
        for name, p in self.parameters.items():
            self._kept[f"mask/{name}"] = pack(torch.zeros_like(p, dtype=torch.bool))
            if sparsity.method == "movement" and sparsity.movement == "gradient":
                self._kept[f"score/{name}"] = torch.zeros_like(p, dtype=torch.float32)
            elif sparsity.method == "movement":
                self._kept[f"start/{name}"] = p.detach().float().clone()
            elif sparsity.method == "2:4" and p.shape[1] % 4:
                raise UserError(f"sparsity.method = 2:4: {name} has rows of {p.shape[1]}, which is no multiple of 4")
        self._masked = False  # whether anything is
        if sparsity.method == "rigl":
            self._change(0, (self._drawn(name, seed) for name in self.parameters))
        elif sparsity.method == "2:4" and self.begin == 0:
            self._change(0, self._selected(0))
        if self._masked and not optimizer.state:
            self._clear()

    # -- what the loop calls

    @torch.no_grad()
    def before_update(self, step: int) -> None:
        """Between the last backward pass and clipping: gradients are complete and unscaled, `step` updates done.

        Gradients that are not finite, for which loss scaling will skip the update, move no score and no mask.
        """
        with self._timed():
            fraction = rigl_fraction(step, self.settings, self.decay_steps) if self.settings.method == "rigl" else 0.0
            if fraction and bool(self._finite()):
                self._change(step, (self._regrown(name, fraction) for name in self.parameters))
                self._clear()
            if self._soft:
                finite = self._finite()
                for name, p in self.parameters.items():
                    if self._masked:
                        p.copy_(self._kept[f"dense/{name}"])
                    scores.accumulate_movement(self._kept[f"score/{name}"], p, _gradient(p), finite)
            elif self._masked:
                for name, p in self.parameters.items():
                    _gradient(p).mul_(self._keeps(name))  # what is not finite stays so, for whoever looks for it

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        """After the optimizer: `step` updates are done, among them the one that loss scaling may have skipped."""
        with self._timed():
            changes = self._changes_after(step)
            if changes:
                self._change(step, self._selected(step))
            if step >= self.end:
                for key in [key for key in self._kept if not key.startswith("mask/")]:
                    del self._kept[key]
            if self._soft and self._masked:
                for name, p in self.parameters.items():
                    self._kept[f"dense/{name}"] = p.detach().clone()
                    p.mul_(self._keeps(name))
            elif changes:
                self._clear()
            elif self.every_update and self._masked:
                for name, p in self.parameters.items():
                    p.mul_(self._keeps(name))

    # -- what is stored

    def tensors(self) -> dict[str, Tensor]:
        """All that `load_tensors` needs, not copied.

        "mask/<name>" for each parameter, packed. Until the ramp ends, movement has "score/<name>" and, once something
        is masked, "dense/<name>", or else "start/<name>". Each has the rows that the parameter has here. "changed" is
        (changed_at, changes), on all processes the same.
        """
        return {**self._kept, "changed": torch.stack([torch.full_like(self._flipped, self.changed_at), self._flipped])}

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what `tensors` gave; weights and moments become what they were then, if only masking changed them.

        Call it when the checkpoint's weights and the optimizer's state are loaded.
        """
        kept = {key: value.to(self.device, copy=True) for key, value in tensors.items()}
        changed = kept.pop("changed")
        names = {key.removeprefix("mask/") for key in kept if key.startswith("mask/")}
        assert names == self.parameters.keys(), "the masks are of this model"
        for name, p in self.parameters.items():
            mask, shape = kept[f"mask/{name}"], global_shape(p)
            if mask.dim() == 1:  # a whole one, as they were packed once: with no regard to rows
                kept[f"mask/{name}"] = local_rows(pack(unpack(mask, (shape.numel(),)).view(shape)), p)
        self._kept, self.changed_at, self._flipped = kept, int(changed[0]), changed[1]
        self._counted = None
        self._masked = any(self._counts().values())
        if not self._soft:
            self._clear()
        elif self._masked:
            for name, p in self.parameters.items():
                p.copy_(kept[f"dense/{name}"]).mul_(self._keeps(name))

    # -- facts

    def facts(self) -> dict[str, Any]:
        """What sparsity.json says: the share that is masked, of all and of each matrix, and the last change."""
        return {
            "sparsity": self.sparsity(),
            "mask_bytes": self.mask_bytes(),
            "changed_at": self.changed_at,
            "changes": self.changes,
            "by_matrix": self.by_layer(),
        }

    def sparsity(self) -> float:
        """The share of the prunable weights that is masked, now."""
        return sum(self._counts().values()) / self._numbers

    def by_layer(self) -> dict[str, float]:
        """That share of each matrix, by its name."""
        return {name: count / global_shape(self.parameters[name]).numel() for name, count in self._counts().items()}

    def mask_bytes(self) -> int:
        """What the masks take on the device, or on all that have rows of them."""
        shapes = [global_shape(p) for p in self.parameters.values()]
        return sum(rows * -(-cols // 8) for rows, cols in shapes)

    @property
    def changes(self) -> int:
        """How many weights were masked or came back when masks changed last, at `changed_at`."""
        return int(self._flipped)

    def overhead(self) -> float:
        """Seconds spent before and after updates since the last call; a GPU is waited for here, not there."""
        if self._events:
            self._events[-1][1].synchronize()
            self._seconds += sum(start.elapsed_time(end) for start, end in self._events) / 1000
            self._events.clear()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    # -- masks

    @property
    def _soft(self) -> bool:
        """Whether masked weights live on in a dense copy: movement by gradient, until the ramp ends."""
        return any(key.startswith("score/") for key in self._kept)

    def _keeps(self, name: str) -> Tensor:
        """The mask turned round, bool: true where the weight is kept."""
        return unpack(~self._kept[f"mask/{name}"], self.parameters[name].shape)

    def _masks(self, name: str) -> Tensor:
        return unpack(self._kept[f"mask/{name}"], self.parameters[name].shape)

    @property
    def _numbers(self) -> int:
        return sum(global_shape(p).numel() for p in self.parameters.values())

    def _counts(self) -> dict[str, int]:
        if self._counted is None:
            counts = torch.stack([self._masks(name).sum() for name in self.parameters])
            all_reduce_shards(counts, list(self.parameters.values()))
            self._counted = dict(zip(self.parameters, counts.tolist(), strict=True))
        return self._counted

    def _changes_after(self, step: int) -> bool:
        if self.settings.method == "2:4":
            return step == self.begin
        return self.settings.method != "rigl" and is_change(step, self.settings, self.decay_steps)

    def _change(self, step: int, masks: Iterable[Tensor]) -> None:
        """Take new masks, in the order of the parameters."""
        self.changed_at, self._flipped = step, torch.zeros_like(self._flipped)
        for (name, p), mask in zip(self.parameters.items(), masks, strict=True):
            packed = pack(mask)
            self._flipped += unpack(packed ^ self._kept[f"mask/{name}"], p.shape).sum()
            self._kept[f"mask/{name}"] = packed
        all_reduce_shards(self._flipped, list(self.parameters.values()))
        self._masked, self._counted = True, None

    def _clear(self) -> None:
        """Zero masked weights and what the optimizer keeps of them: moments, momentum, a compensation."""
        for name, p in self.parameters.items():
            keeps = self._keeps(name)
            p.mul_(keeps)
            for value in self.optimizer.state.get(p, {}).values():
                if not isinstance(value, Tensor) or hasattr(value, "__tensor_flatten__"):
                    continue  # a number of steps; torchao's 8 bits, a tensor made of tensors
                if value.is_floating_point() and value.shape == p.shape:
                    value.mul_(keeps)

    # -- which weights

    def _score(self, name: str) -> Tensor:
        """Float32; masked weights have the lowest there is where they may not come back."""
        p, settings = self.parameters[name], self.settings
        if self._soft:
            return self._kept[f"score/{name}"]
        if settings.method == "movement":
            score = scores.distance(p, self._kept[f"start/{name}"])
        elif settings.method == "state":
            state = self.optimizer.state.get(p, {})
            zero = p.new_zeros(())  # no moments are there yet where loss scaling skipped all updates
            m, v = (state[kind] if state else zero for kind in ("exp_avg", "exp_avg_sq"))
            score = scores.state(settings.variant, p, m, v)
        else:
            score = scores.magnitude(p)
        return score.add_(self._masks(name), alpha=-LARGEST)

    def _selected(self, step: int) -> Iterator[Tensor]:
        share = sparsity_at(step, self.settings, self.decay_steps)
        parameters = self.parameters
        made = {name: functools.partial(self._score, name) for name in parameters}
        if self.settings.method == "2:4":
            yield from map(two_of_four, parameters.values())
        elif self.settings.scope == "global":
            yield from smallest(list(made.values()), int(share * self._numbers), list(parameters.values()))
        else:
            for name, score in made.items():
                p = parameters[name]
                yield from smallest([score], int(share * global_shape(p).numel()), [p])

    def _drawn(self, name: str, seed: int) -> Tensor:
        p = self.parameters[name]
        n = global_shape(p).numel()
        order = torch.randperm(n, generator=torch.Generator().manual_seed(address(seed, "rigl", name)))
        mask = torch.zeros(n, dtype=torch.bool)
        mask[order[: int(self.settings.target * n)]] = True
        return local_rows(mask.view(global_shape(p)), p).to(p.device)

    def _regrown(self, name: str, fraction: float) -> Tensor:
        p = self.parameters[name]
        n = global_shape(p).numel()
        masked = int(self.settings.target * n)
        dropped = int(fraction * (n - masked))
        (out,) = smallest([functools.partial(self._score, name)], masked + dropped, [p])
        (mask,) = smallest([lambda: _gradient(p).float().abs().add_(~out, alpha=LARGEST)], masked, [p])
        return mask

    # -- the rest

    def _finite(self) -> Tensor:
        """(), bool: whether every gradient of the optimizer is finite, as loss scaling asks."""
        grads = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([g for g in grads if g.numel()], math.inf)  # there may be no rows here
        return all_reduce_shards((~norm.isfinite()).int(), list(self.parameters.values())) == 0

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        if self.device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((start, end))
        else:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began


def _gradient(p: nn.Parameter) -> Tensor:
    assert p.grad is not None, "every parameter takes part in the loss"
    return p.grad
