"""Pruning while training. The training loop calls a pruner before and after each update."""

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

# stands for infinity when added to scores, which takes a third of masked_fill_'s time on a CPU
LARGEST = torch.finfo(torch.float32).max
# Optimizers that move a weight by its own moments and gradient alone: with these at zero, a zero weight stays zero.
ELEMENTWISE = ("adamw", "adamw-spam", "adamw-prune", "sgd")


def prunable(model: Weights, head: bool) -> dict[str, nn.Parameter]:
    """The matrices that are pruned, by name: linear layers inside the blocks, and optionally a GPT's output head.

    Args:
        model: a GPT or an Encoder, or its local rows.
        head: whether to prune the head, which is one tensor with the embedding if the two are tied.

    Raises:
        UserError: head = true for a classifier.
    """
    parameters = dict(model.named_parameters())
    if head and "head.weight" in parameters:
        raise UserError(
            "sparsity.head = true: is for task = lm; the head of a classifier has one row per label and is not pruned"
        )
    extra = "lm_head.weight" if "lm_head.weight" in parameters else "wte.weight"
    found = {
        name: p
        for name, p in parameters.items()
        if (name.startswith("h.") and p.dim() == 2) or (head and name == extra)
    }
    assert found and len({id(p) for p in found.values()}) == len(found), "there are matrices, each of them once"
    return found


class Pruner:
    """Masks over the prunable weights of a model in training.

    In the loop, where `step` counts updates:

        backward passes; unscale; pruner.before_update(step); clip; optimizer.step(); pruner.after_update(step + 1)

    Methods (`sparsity.method`):
    - magnitude, state, movement by distance: each change masks exactly int(s N) weights, those masked before and the
      smallest scores of the others. Masks only grow.
    - movement by gradient (Sanh et al. 2020, arXiv 2005.07683): forward and backward passes use masked weights, while a
      dense copy and the scores are updated as if there were no mask (straight-through). A weight may come back. At the
      end of the ramp the masks become final, and the dense copy and the scores are deleted.
    - rigl (Evci et al. 2020, arXiv 1911.11134): each matrix has exactly int(target n) masked weights from the first
      step on, drawn at random. Every `every` steps some active weights, those with the smallest |w|, are dropped, and
      as many grow where |gradient| is largest. As in the authors' code, a weight just dropped may grow at once and then
      keeps its value, and the others start at 0. Unlike there, the update of that step is applied.
    - 2:4: two of each four neighbours in a row, by |w|, once.

    Masked weights, their gradients and their moments are zero, except under movement by gradient. Gradients are masked
    at every update, weights and moments only when masks change: an elementwise optimizer then keeps them at zero.
    Moments stored in 8 bits are not changed.

    Masks have one bit per weight (`masks.pack`) and are unpacked one matrix at a time. Scores are float32.

    Under FSDP everything is of the local rows, except counts and draws: shares, thresholds, first masks and the
    reported facts are of whole matrices. All ranks call each method.

    Args:
        model: with its first weights, on its device. rigl, and 2:4 that begins at 0, set weights to zero here, unless
            the optimizer has state: the run is then resumed, and its masks follow by `load_tensors`.
        optimizer: of the model's parameters; method state needs exp_avg and exp_avg_sq.
        sparsity: the settings; the method is not none.
        decay_steps: `begin` and `end` are shares of it; at least 1.
        seed: of rigl's first masks, which are addressed by (seed, "rigl", name) and drawn on the CPU.
        every_update: also mask weights after each update, for an optimizer that is not elementwise (Muon) or not exact
            (8 bits).

    Raises:
        UserError: 2:4 for a matrix whose rows are no multiple of 4 long, or the head of a classifier.
    """

    changed_at = 0  # step of the last change of masks

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
        self._counted: dict[str, int] | None = None  # masked weights of each matrix; None until asked for
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

        # the pruner's state, by name in the checkpoint
        self._kept: dict[str, Tensor] = {}
        for name, p in self.parameters.items():
            self._kept[f"mask/{name}"] = pack(torch.zeros_like(p, dtype=torch.bool))
            if sparsity.method == "movement" and sparsity.movement == "gradient":
                self._kept[f"score/{name}"] = torch.zeros_like(p, dtype=torch.float32)
            elif sparsity.method == "movement":
                self._kept[f"start/{name}"] = p.detach().float().clone()
            elif sparsity.method == "2:4" and p.shape[1] % 4:
                raise UserError(f"sparsity.method = 2:4: {name} has rows of {p.shape[1]}, not a multiple of 4")
        self._masked = False  # whether any weight is
        if sparsity.method == "rigl":
            self._change(0, (self._drawn(name, seed) for name in self.parameters))
        elif sparsity.method == "2:4" and self.begin == 0:
            self._change(0, self._selected(0))
        if self._masked and not optimizer.state:
            self._clear()

    # -- what the loop calls

    @torch.no_grad()
    def before_update(self, step: int) -> None:
        """Call it between the last backward pass and clipping, with unscaled gradients, after `step` updates.

        Non-finite gradients, for which loss scaling skips the update, change no score and no mask.
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
                    _gradient(p).mul_(self._keeps(name))  # non-finite gradients stay non-finite, to be found

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        """Call it after the optimizer's update number `step`, whether loss scaling skipped it or not."""
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
        """The state that `load_tensors` needs, not copied.

        "mask/<name>" is the packed mask of a parameter. Until the ramp ends, movement by gradient has "score/<name>"
        and, once a weight is masked, "dense/<name>"; movement by distance has "start/<name>". All have local rows.
        "changed" is (changed_at, changes), the same on all ranks.
        """
        return {**self._kept, "changed": torch.stack([torch.full_like(self._flipped, self.changed_at), self._flipped])}

    def unlike(self, tensors: dict[str, Tensor], step: int) -> str | None:
        """How stored tensors differ from those that this run has after `step` updates; None if they do not."""
        ramping = step < self.end
        wanted = {k: t for k, t in self.tensors().items() if ramping or k.startswith("mask/") or k == "changed"}
        masked = any(bool(t.any()) for k, t in tensors.items() if k.startswith("mask/"))
        if self._soft and ramping and (masked or any(k.startswith("dense/") for k in tensors)):
            wanted |= {f"dense/{name}": p for name, p in self.parameters.items()}
        if differ := sorted(wanted.keys() ^ tensors.keys()):
            return f"{', '.join(differ[:4])} is only in one of them"
        for key, want in wanted.items():
            shapes = [want.shape]
            if key.startswith("mask/"):  # an earlier format packed the whole mask without regard to rows
                shapes.append(torch.Size([-(-global_shape(self.parameters[key.removeprefix("mask/")]).numel() // 8)]))
            if tensors[key].dtype != want.dtype or tensors[key].shape not in shapes:
                return f"{key} is of shape {tuple(tensors[key].shape)} in {tensors[key].dtype}"
        return None

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore the state of `tensors`, and mask weights and moments as they were then.

        Call it after the checkpoint's weights and the optimizer's state are loaded.
        """
        kept = {key: value.to(self.device, copy=True) for key, value in tensors.items()}
        changed = kept.pop("changed")
        names = {key.removeprefix("mask/") for key in kept if key.startswith("mask/")}
        assert names == self.parameters.keys(), "the masks are of this model"
        for name, p in self.parameters.items():
            mask, shape = kept[f"mask/{name}"], global_shape(p)
            if mask.dim() == 1:  # an earlier format packed the whole mask without regard to rows
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
        """The content of sparsity.json: the masked share, of all matrices and of each, and the last change."""
        return {
            "sparsity": self.sparsity(),
            "mask_bytes": self.mask_bytes(),
            "changed_at": self.changed_at,
            "changes": self.changes,
            "by_matrix": self.by_layer(),
        }

    def sparsity(self) -> float:
        """Share of the prunable weights that is masked."""
        return sum(self._counts().values()) / self._numbers

    def by_layer(self) -> dict[str, float]:
        """Masked share of each matrix, by name."""
        return {name: count / global_shape(self.parameters[name]).numel() for name, count in self._counts().items()}

    def mask_bytes(self) -> int:
        """Bytes of the masks, on all ranks that have rows of them."""
        shapes = [global_shape(p) for p in self.parameters.values()]
        return sum(rows * -(-cols // 8) for rows, cols in shapes)

    @property
    def changes(self) -> int:
        """Weights that were masked or came back at the last change, step `changed_at`."""
        return int(self._flipped)

    def overhead(self) -> float:
        """Seconds spent in `before_update` and `after_update` since the last call. Waits for a GPU; they do not."""
        if self._events:
            self._events[-1][1].synchronize()
            self._seconds += sum(start.elapsed_time(end) for start, end in self._events) / 1000
            self._events.clear()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    # -- masks

    @property
    def _soft(self) -> bool:
        """Whether a dense copy keeps masked weights: movement by gradient, until the ramp ends."""
        return any(key.startswith("score/") for key in self._kept)

    def _keeps(self, name: str) -> Tensor:
        """The inverse mask, bool: true for a weight that is kept."""
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
        """Replace the masks, given in the order of the parameters."""
        self.changed_at, self._flipped = step, torch.zeros_like(self._flipped)
        for (name, p), mask in zip(self.parameters.items(), masks, strict=True):
            packed = pack(mask)
            self._flipped += unpack(packed ^ self._kept[f"mask/{name}"], p.shape).sum()
            self._kept[f"mask/{name}"] = packed
        all_reduce_shards(self._flipped, list(self.parameters.values()))
        self._masked, self._counted = True, None

    def _clear(self) -> None:
        """Zero masked weights and their optimizer state: moments, momentum, compensation."""
        for name, p in self.parameters.items():
            keeps = self._keeps(name)
            p.mul_(keeps)
            for value in self.optimizer.state.get(p, {}).values():
                if not isinstance(value, Tensor) or hasattr(value, "__tensor_flatten__"):
                    continue  # a step count; torchao's 8-bit moments, a tensor made of tensors
                if value.is_floating_point() and value.shape == p.shape:
                    value.mul_(keeps)

    # -- which weights

    def _score(self, name: str) -> Tensor:
        """Float32 scores. Masked weights that may not come back have the lowest score."""
        p, settings = self.parameters[name], self.settings
        if self._soft:
            return self._kept[f"score/{name}"]
        if settings.method == "movement":
            score = scores.distance(p, self._kept[f"start/{name}"])
        elif settings.method == "state":
            state = self.optimizer.state.get(p, {})
            zero = p.new_zeros(())  # there are no moments yet if loss scaling skipped all updates
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

    # -- helpers

    def _finite(self) -> Tensor:
        """(), bool: whether all gradients are finite, as loss scaling checks."""
        grads = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([g for g in grads if g.numel()], math.inf)  # a rank may have no rows
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


class NoPruner:
    """Stands in for a `Pruner` in a run that prunes nothing: its methods do nothing."""

    def before_update(self, step: int) -> None: ...

    def after_update(self, step: int) -> None: ...

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None: ...

    def facts(self) -> dict[str, Any]:
        return {}

    def overhead(self) -> float:
        return 0.0


def make_pruner(model: Weights, optimizer: torch.optim.Optimizer, recipe: Recipe) -> Pruner | NoPruner:
    """The pruner of a recipe with schedule.decay_steps resolved."""
    if recipe.sparsity.method == "none":
        return NoPruner()
    again = recipe.optim.name not in ELEMENTWISE
    return Pruner(model, optimizer, recipe.sparsity, recipe.schedule.decay_steps, recipe.seed, every_update=again)


def pruner_bytes(model: Weights, sparsity: Sparsity) -> float:
    """Bytes that a pruner keeps on the device: one bit per prunable weight, and movement's state until the ramp ends.

    Args:
        model: with or without memory. Under FSDP the local rows.
    """
    if sparsity.method == "none":
        return 0.0
    kept = 0.0
    for p in prunable(model, sparsity.head).values():
        kept += p.shape[0] * math.ceil(p.shape[1] / 8)
        if sparsity.method == "movement":  # float32 scores and the dense weights, or float32 weights at the start
            kept += 4 * p.numel() + (p.nbytes if sparsity.movement == "gradient" else 0)
    return kept
