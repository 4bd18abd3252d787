"""Overhead of every optimizer and pruning method on one GPU, and a check of their results.

GPT-2 124M, amp_bf16, compiled, 12 x 1,024 tokens per backward pass. All variants share one model, so they differ only
in optimizer and pruner. Each variant takes turns with AdamW, in alternating order, with a few updates per turn. An
update is everything after the backward passes: pruning, clipping and the optimizer's step. `overhead_percent` is the
additional time over AdamW's update, relative to a step of four backward passes. Masks change every 50 steps: an update
with a change is measured separately and counts 1/50. Targets: adamw-spam under 2%, adamw-prune under 3%.

`check` compares some updates of a small model on this device with the same updates in float64 on the CPU.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from common import in_turn, show, spread
from torch import Tensor

from gptlab.config import PRESETS, Model, Optim, Precision, Sparsity
from gptlab.model.gpt import GPT, build_model
from gptlab.optim.optimizers import make_optimizer
from gptlab.precision.regimes import enter_regime
from gptlab.sparsity.masks import unpack
from gptlab.sparsity.pruner import Pruner
from gptlab.training.step_buffer import clip_gradients
from gpu_stages.stage import Row, Stage, kernels_of, pick, run, synchronize

EVERY = 50  # steps between changes of the masks
# The first step, and the length of the sparsity ramp. At this step the sparsity is 50% to three digits.
BEGIN, DECAY_STEPS = 70_000, 100_000
ADAMW: dict[str, Any] = {"name": "adamw"}
# name -> settings of `optim`, settings of `sparsity`
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "adamw": (ADAMW, {}),
    "adamw amsgrad": ({**ADAMW, "amsgrad": True}, {}),
    "adamw-spam seed": ({"name": "adamw-spam", "spam_form": "seed"}, {}),
    "adamw-spam seed without amsgrad": ({"name": "adamw-spam", "spam_form": "seed", "amsgrad": False}, {}),
    "adamw-spam paper": ({"name": "adamw-spam", "spam_form": "paper"}, {}),
    "adamw-spam stable": ({"name": "adamw-spam", "spam_form": "stable"}, {}),
    "adamw-prune bitter0": ({"name": "adamw-prune"}, {"method": "state", "variant": "bitter0"}),
    "adamw-prune bitter1": ({"name": "adamw-prune"}, {"method": "state", "variant": "bitter1"}),
    "muon": ({"name": "muon"}, {}),
    "normuon": ({"name": "normuon"}, {}),
    "lion": ({"name": "lion"}, {}),
    "ademamix": ({"name": "ademamix"}, {}),
    "adamw-schedule-free": ({"name": "adamw-schedule-free"}, {}),
    "soap": ({"name": "soap"}, {}),
    "adamw_8bit": ({"name": "adamw_8bit"}, {}),
    "sgd": ({"name": "sgd"}, {}),
    "magnitude": (ADAMW, {"method": "magnitude"}),
    "magnitude by layer": (ADAMW, {"method": "magnitude", "scope": "layer"}),
    "movement gradient": (ADAMW, {"method": "movement", "movement": "gradient"}),
    "movement distance": (ADAMW, {"method": "movement", "movement": "distance"}),
    "rigl": (ADAMW, {"method": "rigl"}),
    "2:4": (ADAMW, {"method": "2:4"}),
}
TARGETS = {"adamw-spam": 2.0, "adamw-prune": 3.0}  # largest overhead, in percent of AdamW's step
ACCUMULATE = 4  # backward passes per step, for the overhead
# The check: number of updates, the update with a spike in its gradient, the factor of the spike, and SPAM's reset
# interval. The paper's form of SPAM starts to clip 20 steps after a reset.
CHECKED, SPIKED_AT, SPIKE, RESET = 30, 22, 100.0, 24
# Largest |a - b| / |b| of the weights' changes, for: float32; Muon and NorMuon, which iterate in bf16 on a GPU; 8-bit
# Adam; SOAP, whose first eigenvectors of the eigenvalue 0 are any. Last: the largest share of differing masks.
ALLOWED, ALLOWED_MUON, ALLOWED_8BIT, ALLOWED_SOAP, ALLOWED_MASKS = 1e-3, 5e-2, 0.2, 0.5, 1e-3
UPDATES, ROUNDS = 6, 5  # timed updates per turn, turns per side

SMALL = Model(n_layer=2, n_head=2, n_embd=64, block_size=64, vocab_size=512)


class Variant:
    """An optimizer and its pruner, if any, for a model that all variants share."""

    def __init__(self, name: str, model: GPT, **settings: Any) -> None:
        optim, sparsity = VARIANTS[name]
        self.model = model
        self.optimizer = make_optimizer(model, Optim(**optim, **settings), 0)
        self.pruner = None
        if sparsity:
            masks = Sparsity(**sparsity, begin=0.0, every=EVERY)
            self.pruner = Pruner(model, self.optimizer, masks, DECAY_STEPS, seed=0, every_update=False)
        self.method = sparsity.get("method", "none")
        self.max_norm = math.inf if optim["name"] == "adamw-spam" else 1.0  # SPAM clips by itself

    def update(self, change: bool = False) -> None:
        """Everything after the backward passes, as in the training loop, with or without a change of the masks."""
        before, after = BEGIN + 1, BEGIN + 2  # steps before and after this update
        if change:
            before, after = {"rigl": (BEGIN, BEGIN + 1), "2:4": (BEGIN, 0)}.get(self.method, (BEGIN - 1, BEGIN))
        if self.pruner:
            self.pruner.before_update(before)
        clip_gradients(self.model, self.max_norm)
        self.optimizer.step()
        if self.pruner:
            self.pruner.after_update(after)


class Clock:
    """Milliseconds between marks. Only reading them waits for the GPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda, self.marks = device.type == "cuda", []  # type: ignore[var-annotated]

    def mark(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def read(self) -> list[float]:
        marks, self.marks = self.marks, []
        pairs = list(itertools.pairwise(marks))
        if self.cuda:
            marks[-1].synchronize()
            return [a.elapsed_time(b) for a, b in pairs]
        return [1e3 * (b - a) for a, b in pairs]


# -- check ----------------------------------------------------------------------------------------------------------


def gradients(model: GPT) -> Iterator[list[Tensor]]:
    """Random gradients, float64 on the CPU, the same for every device and dtype; one update has a spike."""
    generator = torch.Generator().manual_seed(0)
    shapes = [p.shape for p in model.parameters()]
    for update in range(CHECKED):
        scale = 1e-2 * (SPIKE if update == SPIKED_AT else 1.0)
        yield [scale * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def trained(name: str, device: torch.device, dtype: torch.dtype) -> tuple[GPT, Variant]:
    """A small model after a few updates."""
    model = build_model(SMALL, device, dtype, init=0)
    variant = Variant(name, model, spam_interval=RESET)
    for update, grads in enumerate(gradients(model)):
        for p, grad in zip(model.parameters(), grads, strict=True):
            p.grad = grad.to(device, dtype)
        variant.update(change=update in (2, 8))
    return model, variant


def check(device: torch.device, name: str) -> Row:
    """Compare a variant on this device with the same variant in float64: weights, masks, number of masked weights."""
    start = dict(build_model(SMALL, "cpu", torch.float64, init=0).named_parameters())
    model, variant = trained(name, device, torch.float32)
    # 8-bit Adam comes from a library; it is compared with AdamW, which it approximates
    exact, reference = trained("adamw" if name == "adamw_8bit" else name, torch.device("cpu"), torch.float64)
    theirs, ours = dict(exact.named_parameters()), dict(model.named_parameters())
    masks = {}
    if variant.pruner and reference.pruner:
        a, b = variant.pruner.tensors(), reference.pruner.tensors()
        masks = {key.removeprefix("mask/"): (a[key].cpu(), b[key]) for key in a if key.startswith("mask/")}
    distance = moved = 0.0
    for key, parameter in theirs.items():
        off = (ours[key].cpu().double() - parameter).detach()
        if key in masks:  # differing masks are counted separately
            off = off[~different(*masks[key], off.shape)]
        distance += float(off.square().sum())
        moved += float((parameter - start[key]).detach().square().sum())
    row: Row = {"error": math.sqrt(distance / moved), "problems": []}
    muons = dict.fromkeys(("muon", "normuon"), ALLOWED_MUON)
    allowed = {**muons, "adamw_8bit": ALLOWED_8BIT, "soap": ALLOWED_SOAP}.get(name, ALLOWED)
    if not row["error"] <= allowed:
        row["problems"].append(
            f"{name}: the weights' changes differ from float64's by {row['error']:.1e}, more than {allowed:.0e}"
        )
    if variant.pruner and reference.pruner:
        n = sum(p.numel() for p in variant.pruner.parameters.values())
        row["masked"], row["masked_float64"] = (round(v.pruner.sparsity() * n) for v in (variant, reference))
        bits = [different(*pair, (len(pair[0]), 8 * pair[0].shape[1])) for pair in masks.values()]
        row["masks_differ"] = sum(int(differs.sum()) for differs in bits) / n
        if row["masked"] != row["masked_float64"]:
            row["problems"].append(f"{name}: {row['masked']} weights are masked, not {row['masked_float64']}")
        if row["masks_differ"] > ALLOWED_MASKS:
            row["problems"].append(f"{name}: {row['masks_differ']:.1e} of the masks differ from float64's")
    return row | {"says": "; ".join(row["problems"]) or f"correct: differs from float64 by {row['error']:.1e}"}


def right(stage: Stage, device: torch.device, name: str) -> Row:
    """The check as an item, which fails if there is a problem."""
    row = check(device, name)
    if row["problems"]:
        stage.note(f"check {name}", **row)
        raise RuntimeError(row["says"])
    return row


def different(a: Tensor, b: Tensor, shape: Sequence[int]) -> Tensor:
    """Where two packed masks differ: bool, of the given shape."""
    return unpack(a ^ b, shape)


# -- time of an update ----------------------------------------------------------------------------------------------


class Updates:
    """The model that all variants share, and the measurement of a variant."""

    def __init__(self, stage: Stage, device: torch.device) -> None:
        self.stage, self.device = stage, device
        self.regime = enter_regime(Precision(regime="fp32" if stage.tiny else "amp_bf16"), device)
        shape = SMALL if stage.tiny else Model(**PRESETS["gpt2"], vocab_size=50304)
        self.model = build_model(shape, device, self.regime.weights, init=0)
        if device.type == "cuda":
            self.model.compile(dynamic=False)
        draw = torch.Generator().manual_seed(0)
        batch = torch.randint(shape.vocab_size, (2 if stage.tiny else 12, shape.block_size + 1), generator=draw)
        batch = batch.to(device)
        self.x, self.y = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
        self.factor = torch.full((), 1 / self.y.numel(), device=device)
        self.reference: Variant | None = None

    def backward(self) -> None:
        self.model.zero_grad(set_to_none=True)
        with self.regime.context(self.device):
            scaled, _, _ = self.model(self.x, self.y, None, self.factor)  # type: ignore[misc]
        scaled.backward()

    def make(self, name: str) -> Variant:
        """A variant after three updates, so that its state and masks exist and everything is compiled."""
        variant = Variant(name, self.model)
        for update in range(3):
            self.backward()
            variant.update(change=update == 1)
        synchronize(self.device)
        return variant

    def turn(self, variant: Variant) -> dict[str, float]:
        """Mean milliseconds of some updates without a change of the masks, and of one update with a change."""
        clock = Clock(self.device)
        clock.mark()
        for _ in range((2 if self.stage.tiny else UPDATES) + 1):
            self.backward()
            clock.mark()
            variant.update()
            clock.mark()
        times = clock.read()[2:]  # without the first step, whose caches are those of another variant
        found = {"backward": statistics.mean(times[::2]), "update": statistics.mean(times[1::2])}
        if variant.pruner:
            self.backward()
            clock.mark()
            variant.update(change=True)
            clock.mark()
            found["change"] = clock.read()[0] - found["update"]
        return found

    def measure(self, name: str) -> Row:
        """Time of a variant's update, and the overhead over AdamW's update."""
        self.reference = self.reference or self.make("adamw")
        sides = {"adamw": self.reference, name: self.reference if name == "adamw" else self.make(name)}
        seen: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for side in in_turn(list(sides), 2 if self.stage.tiny else ROUNDS):
            seen[side].append(self.turn(sides[side]))
        more = []
        for turn, base in zip(seen[name], seen["adamw"], strict=True):
            # the masks of 2:4 change once per run
            changes = 0.0 if sides[name].method == "2:4" else turn.get("change", 0.0) / EVERY
            step = ACCUMULATE * base["backward"] + base["update"]
            more.append(100 * (turn["update"] + changes - base["update"]) / step)
        row: Row = {f"{key}_ms": spread([turn[key] for turn in seen[name]]) for key in seen[name][0]}
        row |= {"turns": seen, "overhead_percent": spread(more)}
        target = next((percent for start, percent in TARGETS.items() if name.startswith(start)), None)
        says = f"update {show(row['update_ms'], '.2f')} ms, overhead {show(row['overhead_percent'], '.2f')}% of a step"
        if target is not None:
            row["target_percent"], row["met"] = target, row["overhead_percent"]["median"] < target
            says += f": the target of {target:.0f}% is {'met' if row['met'] else 'missed'}"
        return row | {"says": says}

    def kernels(self, name: str) -> Row:
        """The kernels of a variant's update."""
        variant = self.make(name)
        self.backward()
        row = kernels_of(variant.update, self.device, times=3)
        return row | {"says": f"{row['ms']:.2f} ms of kernels per update"}


def main(stage: Stage) -> None:
    device = pick(stage)
    updates = Updates(stage, device)
    items: dict[str, Callable[[], Row]] = {}
    for name in VARIANTS:
        items[name] = lambda name=name: updates.measure(name)  # type: ignore[misc]
    for name in VARIANTS:
        items[f"check {name}"] = lambda name=name: right(stage, device, name)  # type: ignore[misc]
    for name in ("adamw-spam seed", "muon", "soap", "adamw-prune bitter0"):
        items[f"kernels {name}"] = lambda name=name: updates.kernels(name)  # type: ignore[misc]
    stage.all(items, expects=3.0, most=60.0)


if __name__ == "__main__":
    run(main)
