"""Every optimizer and pruning method on one GPU: is it right, what does it add to a step, and what do three learn.

GPT-2 124M, AMP in bf16, compiled, 12 x 1,024 tokens at a time and four times accumulated. In this order, and what
there is no time left for is left out and named:

    check     a few updates of a small model on this device, against the same rule in float64 on the CPU
    steps     every variant steps in turn, forwards and backwards, a few steps a turn; all share one model, so that
              nothing but the optimizer and the pruner tells them apart. Ratios to AdamW, round by round
    profile   the kernels of the slowest variant's update, by torch.profiler
    train     AdamW, SPAM and Muon by gptlab.train, 600 steps on a prepared dataset: --data DIR

Masks change every 50 steps: the steps of a turn are those without a change, one with a change follows, and `overhead`
is that of 49 such steps and the change. Targets: adamw-spam under 2%, adamw-prune under 3%.

    python benchmarks/optimizers_gpu.py --data data/fineweb-edu-gpt2 --out results/optimizers_gpu.json
    python benchmarks/optimizers_gpu.py --parts check steps --accumulate 1 --only muon adamw-prune
    python benchmarks/optimizers_gpu.py --smoke --out /tmp/smoke.json         # a minute without a GPU

What --out has of the same device, torch and settings is not measured again: the same call goes on. gptlab is installed,
or PYTHONPATH=src.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common import in_turn, machine, ratios, say, show, spread, table, write_json
from torch import Tensor

from gptlab.config import PRESETS, Model, Optim, Precision, Sparsity, build_recipe, read_layer
from gptlab.evals.heldout import heldout_loss
from gptlab.hardware import device_name
from gptlab.model.gpt import GPT, build_model
from gptlab.optim.optimizers import make_optimizer
from gptlab.precision.regimes import NotApplicable, enter_regime
from gptlab.rundir import RunDir
from gptlab.sparsity.masks import unpack
from gptlab.sparsity.pruner import Pruner
from gptlab.tasks import lm
from gptlab.training.loop import train
from gptlab.training.setup import pick_device
from gptlab.training.watched import clip_gradients

EVERY = 50  # steps between changes of the masks
# What the steps are counted from and the ramp's length: so near its end the masks are at 50% to three digits.
BEGIN, DECAY_STEPS = 70_000, 100_000
ADAMW: dict[str, Any] = {"name": "adamw"}
# settings of `optim`, settings of `sparsity`
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
    "adamw_8bit": ({"name": "adamw_8bit"}, {}),
    "sgd": ({"name": "sgd"}, {}),
    "magnitude": (ADAMW, {"method": "magnitude"}),
    "magnitude by layer": (ADAMW, {"method": "magnitude", "scope": "layer"}),
    "movement gradient": (ADAMW, {"method": "movement", "movement": "gradient"}),
    "movement distance": (ADAMW, {"method": "movement", "movement": "distance"}),
    "rigl": (ADAMW, {"method": "rigl"}),
    "2:4": (ADAMW, {"method": "2:4"}),
}
TARGETS = {"adamw-spam": 2.0, "adamw-prune": 3.0}  # percent of AdamW's step, the most
ARMS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adamw-spam": {"optim.name": "adamw-spam"},
    "muon": {"optim.name": "muon"},
}
RECIPE = "gpt2-124m-openwebtext"
# Updates of the check, which gradient is a spike, and how large; SPAM's reset comes after it. The paper's form clips
# from 20 steps after a reset on.
CHECKED, SPIKED_AT, SPIKE, RESET = 30, 22, 100.0, 24
# |a - b| / |b| of what the updates moved: float32's rounding; the bf16 that Muon iterates in on a GPU; 8 bits
ALLOWED, ALLOWED_MUON, ALLOWED_8BIT, ALLOWED_MASKS = 1e-3, 5e-2, 0.2, 1e-3
TOP_KERNELS, PROFILED = 15, 3

SMOKE_MODEL = Model(n_layer=2, n_head=2, n_embd=64, block_size=64, vocab_size=512)
SMOKE_RECIPE = {
    "model.n_layer": 2, "model.n_head": 2, "model.n_embd": 32, "model.block_size": 32, "model.vocab_size": 512,
    "batch.micro_batch": 4, "batch.tokens_per_step": 256, "eval.tokens": 256, "precision.regime": "fp32",
    "train.threads": 1, "compile.enabled": False,
}  # fmt: skip

Row = dict[str, Any]


class Variant:
    """An optimizer, with its pruner where it has one, over a model that others step too."""

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
        """What follows the backward passes, as the training loop has it; with a change of masks or without."""
        before, after = BEGIN + 1, BEGIN + 2  # updates done
        if change:
            before, after = {"rigl": (BEGIN, BEGIN + 1), "2:4": (BEGIN, 0)}.get(self.method, (BEGIN - 1, BEGIN))
        if self.pruner:
            self.pruner.before_update(before)
        clip_gradients(self.model, self.max_norm)
        self.optimizer.step()
        if self.pruner:
            self.pruner.after_update(after)


class Clock:
    """Milliseconds between marks; a GPU is waited for when they are read."""

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
    """The same made-up gradients for every device and dtype, float64 on the CPU, one of them a spike."""
    generator = torch.Generator().manual_seed(0)
    shapes = [p.shape for p in model.parameters()]
    for update in range(CHECKED):
        scale = 1e-2 * (SPIKE if update == SPIKED_AT else 1.0)
        yield [scale * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def trained(name: str, device: torch.device, dtype: torch.dtype) -> tuple[GPT, Variant]:
    """A small model after a few updates."""
    model = build_model(SMOKE_MODEL, device, dtype, fill=0)
    variant = Variant(name, model, spam_interval=RESET)
    for update, grads in enumerate(gradients(model)):
        for p, grad in zip(model.parameters(), grads, strict=True):
            p.grad = grad.to(device, dtype)
        variant.update(change=update in (2, 8))
    return model, variant


def check(device: torch.device, names: list[str]) -> Row:
    """How far each variant on this device is from the rule in float64, and from int(s N) masked weights."""
    found: Row = {}
    start = dict(build_model(SMOKE_MODEL, "cpu", torch.float64, fill=0).named_parameters())
    for name in names:
        say(f"check {name}")
        try:
            model, variant = trained(name, device, torch.float32)
        except NotApplicable as error:
            found[name] = {"status": "not_applicable", "reason": str(error)}
            continue
        # the 8 bits are of a library; they are held against the rule that they approximate
        exact, reference = trained("adamw" if name == "adamw_8bit" else name, torch.device("cpu"), torch.float64)
        theirs, ours = dict(exact.named_parameters()), dict(model.named_parameters())
        masks = {}
        if variant.pruner and reference.pruner:
            a, b = variant.pruner.tensors(), reference.pruner.tensors()
            masks = {key.removeprefix("mask/"): (a[key].cpu(), b[key]) for key in a if key.startswith("mask/")}
        distance = moved = 0.0
        for key, parameter in theirs.items():
            off = (ours[key].cpu().double() - parameter).detach()
            if key in masks:  # where float32 prunes another weight, that is a matter of the masks and counted there
                off = off[~different(*masks[key], off.shape)]
            distance += float(off.square().sum())
            moved += float((parameter - start[key]).detach().square().sum())
        row: Row = {"status": "completed", "error": math.sqrt(distance / moved), "problems": []}
        allowed = {"muon": ALLOWED_MUON, "adamw_8bit": ALLOWED_8BIT}.get(name, ALLOWED)
        if not row["error"] <= allowed:
            row["problems"].append(f"{name}: moved weights {row['error']:.1e} off float64's, not {allowed:.0e} at most")
        if variant.pruner and reference.pruner:
            n = sum(p.numel() for p in variant.pruner.parameters.values())
            row["masked"], row["masked_float64"] = (round(v.pruner.sparsity() * n) for v in (variant, reference))
            bits = [different(*pair, (len(pair[0]), 8 * pair[0].shape[1])) for pair in masks.values()]
            row["masks_differ"] = sum(int(differs.sum()) for differs in bits) / n
            if row["masked"] != row["masked_float64"]:
                row["problems"].append(f"{name}: {row['masked']} weights are masked, not {row['masked_float64']}")
            if row["masks_differ"] > ALLOWED_MASKS:
                row["problems"].append(f"{name}: {row['masks_differ']:.1e} of the masks are not float64's")
        found[name] = row
    return found


def different(a: Tensor, b: Tensor, shape: Sequence[int]) -> Tensor:
    """Bool, of that shape: where two packed masks differ."""
    return unpack(a ^ b, shape)


# -- steps ----------------------------------------------------------------------------------------------------------


class Steps:
    """One model and all variants over it."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device = args, device
        self.regime = enter_regime(Precision(regime="fp32" if args.smoke else "amp_bf16"), device)
        shape = SMOKE_MODEL if args.smoke else Model(**PRESETS["gpt2"], block_size=args.block, vocab_size=50304)
        self.model = build_model(shape, device, self.regime.weights, fill=0)
        self.refused: dict[str, str] = {}
        self.variants: dict[str, Variant] = {}
        if device.type == "cuda":
            self.model.compile(dynamic=False)
        draw = torch.Generator().manual_seed(0)
        batch = torch.randint(shape.vocab_size, (args.micro_batch, shape.block_size + 1), generator=draw).to(device)
        self.x, self.y = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
        self.factor = torch.full((), 1 / (self.y.numel() * args.accumulate), device=device)

    def backward(self) -> None:
        self.model.zero_grad(set_to_none=True)
        for _ in range(self.args.accumulate):
            with self.regime.context(self.device):
                scaled, _, _ = self.model(self.x, self.y, None, self.factor)  # type: ignore[misc]
            scaled.backward()

    def add(self, name: str) -> bool:
        """Make a variant, give it its state and masks, and compile what it compiles; or note why not."""
        try:
            variant = Variant(name, self.model)
            for update in range(3):
                self.backward()
                variant.update(change=update == 1)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
        except (NotApplicable, torch.OutOfMemoryError) as error:
            self.refused[name] = str(error).splitlines()[0]
            return False
        self.variants[name] = variant
        return True

    def turn(self, variant: Variant) -> dict[str, float]:
        """A few steps of a variant without a change of its masks, and one with; milliseconds."""
        clock = Clock(self.device)
        clock.mark()
        for _ in range(self.args.steps + 1):
            self.backward()
            clock.mark()
            variant.update()
            clock.mark()
        times = clock.read()[2:]  # the first step finds another variant's caches
        step = 2 * statistics.mean(times)
        found = {"step": step, "update": statistics.mean(times[1::2]), "over_50": step}
        if variant.pruner:
            self.backward()
            clock.mark()
            variant.update(change=True)
            clock.mark()
            found["change"] = clock.read()[0] - found["update"]
            if variant.method != "2:4":  # that one changes once
                found["over_50"] = step + found["change"] / EVERY
        return found


def steps(args: argparse.Namespace, device: torch.device, names: list[str]) -> tuple[Row, Steps]:
    """Step times of every variant, in turn, and what each costs more than AdamW."""
    world = Steps(args, device)
    for name in names:
        say(f"steps: {name} {'is ready' if world.add(name) else 'left out: ' + world.refused[name]}")
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in world.variants}
    for name in in_turn(list(seen), args.rounds):
        say(f"steps: {name}, round {len(seen[name]) + 1} of {args.rounds}")
        seen[name].append(world.turn(world.variants[name]))
    rows: Row = {name: {"status": "not_applicable", "reason": reason} for name, reason in world.refused.items()}
    plain = [turn["step"] for turn in seen["adamw"]]
    for name, turns in seen.items():
        row: Row = {"status": "completed"}
        for key in turns[0]:
            row[f"{key}_ms"] = spread([turn[key] for turn in turns])
        more = ratios([turn["over_50"] for turn in turns], plain)
        row["overhead_percent"] = {key: 100 * (value - 1) for key, value in more.items()}
        # from the updates alone, which the noise of the passes is not in
        update = [100 * (turn["over_50"] - turn["step"] + turn["update"] - base["update"]) / base["step"]
                  for turn, base in zip(turns, seen["adamw"], strict=True)]  # fmt: skip
        row["overhead_of_update_percent"] = spread(update)
        target = next((percent for start, percent in TARGETS.items() if name.startswith(start)), None)
        if target is not None:
            row["target_percent"], row["met"] = target, row["overhead_of_update_percent"]["median"] < target
        rows[name] = row
    return rows, world


def profile(world: Steps, rows: Row) -> Row:
    """The kernels of the slowest variant's update."""
    done = {name: row["update_ms"]["median"] for name, row in rows.items() if row["status"] == "completed"}
    name = max(done, key=lambda name: done[name])
    variant, cuda = world.variants[name], world.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    world.backward()
    with torch.profiler.profile(activities=[activity.CUDA if cuda else activity.CPU]) as profiler:
        for _ in range(PROFILED):
            variant.update()
        if cuda:
            torch.cuda.synchronize()
    kernels = [
        {"kernel": got.key[:160], "calls": got.count / PROFILED,
         "ms": (got.self_device_time_total if cuda else got.self_cpu_time_total) / 1000 / PROFILED}
        for got in profiler.key_averages()
        if got.device_type.name == ("CUDA" if cuda else "CPU") and not getattr(got, "is_user_annotation", False)
    ]  # fmt: skip
    total = sum(kernel["ms"] for kernel in kernels)
    return {"variant": name, "ms": total, "kernels": sorted(kernels, key=lambda k: -k["ms"])[:TOP_KERNELS]}


# -- train ----------------------------------------------------------------------------------------------------------


def evaluate(*given: Any) -> Any:
    with torch.compiler.set_stance("force_eager"):  # compiling it would take as long as many steps
        return heldout_loss(*given)


def train_arm(arm: str, args: argparse.Namespace) -> Row:
    """An arm by `gptlab.train`: its losses, held-out losses and speed."""
    settings: Row = {
        "data.path": str(args.data), "train.max_steps": args.train_steps, "train.eval_every": args.train_steps // 3,
        "schedule.warmup_steps": args.train_steps // 6, "eval.train": False, "eval.tokens": 614400, "log.every": 10,
        "checkpoint.every": 0, "checkpoint.keep_best": False, "train.device": args.device,
    }  # fmt: skip
    layer = read_layer(RECIPE)
    recipe = build_recipe(layer, settings | (SMOKE_RECIPE if args.smoke else {}) | ARMS[arm])
    run = RunDir(args.work / arm)
    shutil.rmtree(run.path, ignore_errors=True)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    lm.heldout_loss = evaluate
    row: Row = train(recipe, run.path, quiet=True).to_json()
    lines = run.read_metrics()
    row["losses"] = [[line["step"], line["loss"]] for line in lines if line.get("loss") is not None]
    row["val_losses"] = [[line["step"], line["val_loss"]] for line in lines if "val_loss" in line]
    row["optim"] = recipe.optim.model_dump()
    shutil.rmtree(run.path, ignore_errors=True)  # 1.5 GB of checkpoint
    return row


# -- all of it ------------------------------------------------------------------------------------------------------


def report(result: Row) -> None:
    """Print the tables."""
    if result.get("check"):
        lines: list[list[object]] = [["check", "off float64", "masks off", "status"]]
        for name, row in result["check"].items():
            error, differ = (f"{row[key]:.1e}" if key in row else "" for key in ("error", "masks_differ"))
            lines.append([name, error, differ, "; ".join(row.get("problems", [])) or row.get("reason", "right")])
        table(lines)
    if result.get("steps"):
        lines = [["steps", "step ms", "update ms", "a change ms", "% more than adamw, whole step", "by its update",
                  "target"]]  # fmt: skip
        for name, row in result["steps"].items():
            if row["status"] != "completed":
                lines.append([name, row["status"], row["reason"]])
                continue
            change = show(row["change_ms"], ".2f") if "change_ms" in row else ""
            target = f"under {row['target_percent']:.0f}%: {'met' if row['met'] else 'missed'}" if "met" in row else ""
            lines.append([name, show(row["step_ms"], ".2f"), show(row["update_ms"], ".3f"), change,
                          show(row["overhead_percent"], ".2f"), show(row["overhead_of_update_percent"], ".2f"),
                          target])  # fmt: skip
        print()
        table([line + [""] * (len(lines[0]) - len(line)) for line in lines])
    if result.get("profile"):
        got = result["profile"]
        print(f"\n{got['variant']}: {got['ms']:.3f} ms of kernels an update")
        table([["kernel", "ms", "calls"]] + [[k["kernel"][:100], f"{k['ms']:.3f}", k["calls"]] for k in got["kernels"]])
    if result.get("train"):
        lines = [["train", "status", "tokens/s", "peak GB", "val_loss", "losses"]]
        for arm, row in result["train"].items():
            if "losses" not in row:
                lines.append([arm, row["reason"], "", "", "", ""])
                continue
            chosen = row["losses"][:: max(1, len(row["losses"]) // 6)]
            lines.append([arm, row["status"], f"{row.get('tokens_per_second') or 0:,.0f}",
                          f"{row.get('peak_memory_gb', 0):.2f}", " ".join(f"{v:.4f}" for _, v in row["val_losses"]),
                          " ".join(f"{step}: {loss:.3f}" for step, loss in chosen)])  # fmt: skip
        print()
        table(lines)
    for what in result["left_out"]:
        print(f"left out: {what}")
    if result["settings"]["smoke"]:
        print("--smoke: its times say nothing")


def main(argv: list[str] | None = None) -> Row:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/optimizers_gpu.json"), metavar="FILE")
    parser.add_argument("--parts", nargs="+", choices=["check", "steps", "profile", "train"], metavar="PART",
                        default=["check", "steps", "profile", "train"])  # fmt: skip
    parser.add_argument("--only", nargs="+", metavar="WORD", help="variants with one of these words in their names")
    parser.add_argument("--data", type=Path, metavar="DIR", help="a prepared dataset, for the part train")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM")
    parser.add_argument("--train-steps", type=int, default=600)
    parser.add_argument("--micro-batch", type=int, default=12)
    parser.add_argument("--block", type=int, default=1024)
    parser.add_argument("--accumulate", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget-seconds", type=float, default=570, help="begin nothing that would end later")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--work", type=Path, default=Path("runs/optimizers_gpu"), metavar="DIR")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and few steps, to try this without a GPU")
    args = parser.parse_args(argv)
    if args.smoke:
        args.micro_batch, args.accumulate, args.steps, args.rounds = 2, 2, 2, 2
        args.train_steps = min(args.train_steps, 12)
    device, began = pick_device(args.device), time.monotonic()
    args.device = device.type
    names = [name for name in VARIANTS if name == "adamw" or not args.only or any(w in name for w in args.only)]
    result: Row = {
        "machine": machine(), "device": device_name(device), "torch": torch.__version__, "cuda": torch.version.cuda,
        "settings": {key: getattr(args, key) for key in ("micro_batch", "block", "accumulate", "steps", "rounds",
                                                         "train_steps", "only", "smoke")},
        "every": EVERY, "left_out": [], "seconds": {},
    }  # fmt: skip
    if args.out.is_file():
        old = json.loads(args.out.read_text())
        if all(old.get(key) == result[key] for key in ("device", "torch", "settings")):
            result |= {key: old[key] for key in ("check", "steps", "profile", "train", "seconds") if key in old}

    def time_for(what: str, seconds: float) -> bool:
        left = args.budget_seconds - (time.monotonic() - began)
        if left < seconds:
            result["left_out"].append(f"{what}: {max(0, left):.0f} s remained, about {seconds:.0f} s expected")
        return left >= seconds

    def part(what: str, got: Any, since: float) -> None:
        result[what], result["seconds"][what] = got, time.monotonic() - since
        write_json(args.out, result)
        say(f"{what}: took {result['seconds'][what]:.0f} s")

    if "check" in args.parts and "check" not in result:
        part("check", check(device, names), time.monotonic())
    if "steps" in args.parts and "steps" not in result and time_for("steps", 1 if args.smoke else 120):
        since = time.monotonic()
        rows, world = steps(args, device, names)
        part("steps", rows, since)
        if "profile" in args.parts:
            part("profile", profile(world, rows), time.monotonic())
        del world
        gc.collect()
        torch.compiler.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if "train" in args.parts and args.data is None:
        result["left_out"].append("train: --data names no prepared dataset")
    elif "train" in args.parts:
        since, took = time.monotonic(), 1.0 if args.smoke else 90.0
        got: Row = dict(result.get("train", {}))
        for arm in args.arms:
            if arm not in got and time_for(f"train {arm}", took):
                began_arm = time.monotonic()
                got[arm] = train_arm(arm, args)
                took = time.monotonic() - began_arm
                part("train", got, since)
    write_json(args.out, result)
    report(result)
    problems = [problem for row in result.get("check", {}).values() for problem in row.get("problems", [])]
    result["problems"] = problems
    print(json.dumps({"problems": problems}))
    return result


if __name__ == "__main__":
    raise SystemExit(1 if main()["problems"] else 0)
