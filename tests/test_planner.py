"""The planner: against storages of real tensors, the allocator's own record, closed forms and hand-counted layers."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import io
import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import together
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from gptlab import planner
from gptlab.cli import main
from gptlab.config import Recipe, build_recipe, load_recipe, load_study
from gptlab.distributed.shard import LocalShards
from gptlab.distributed.world import process_group
from gptlab.distributed.wrap import replicate, shard, sync_gradients, with_last
from gptlab.errors import UserError
from gptlab.hardware import GPUS
from gptlab.model import loss
from gptlab.model.encoder import build_encoder
from gptlab.model.gpt import build_model
from gptlab.optim.optimizers import make_optimizer, plain_tensors
from gptlab.planner import GB, Device, Shape
from gptlab.precision.regimes import apply_regime
from gptlab.sparsity.pruner import Pruner
from gptlab.tasks.base import open_data

CPU = torch.device("cpu")
LABELS = 50
MODERN = {"model__mlp": "swiglu", "model__norm": "rmsnorm", "model__position": "rope", "model__qk_norm": True}


def small(**changes: Any) -> Recipe:
    """A model of 3 layers, which is one more than the planner looks at; keys have __ for the dot."""
    base: dict[str, Any] = {
        "model": {"n_layer": 3, "n_head": 4, "n_embd": 64, "block_size": 64, "vocab_size": 700},
        "batch": {"micro_batch": 5, "tokens_per_step": 64 * 10},
        "train": {"max_steps": 100},
    }
    return build_recipe(base, {key.replace("__", "."): value for key, value in changes.items()})


def shape_of(recipe: Recipe) -> Shape:
    return Shape(recipe.model, recipe.precision, LABELS if recipe.task == "classify" else 0)


def real(recipe: Recipe) -> Any:
    regime = shape_of(recipe).regime
    if recipe.task == "classify":
        model: Any = build_encoder(recipe.model, LABELS, on_meta=lambda m: apply_regime(m, regime))
    else:
        model = build_model(recipe.model, on_meta=lambda m: apply_regime(m, regime))
    model.activation_checkpointing = recipe.train.activation_checkpointing
    return model


def batches(recipe: Recipe) -> list[tuple[Any, ...]]:
    """What a step of the recipe gives its model."""
    n, T, B = recipe.sequences_per_step, recipe.model.block_size, recipe.batch.micro_batch
    assert isinstance(B, int)
    draw = torch.Generator().manual_seed(0)
    found: list[tuple[Any, ...]] = []
    for _ in range(n // B):
        tokens = torch.randint(recipe.model.vocab_size, (B, T), generator=draw)
        factor = torch.tensor(1 / n)
        if recipe.task == "classify":
            found.append((tokens, torch.full((B,), T), torch.zeros(B, LABELS), factor))
        else:
            documents = (tokens % 50 == 0).cumsum(1) if recipe.model.document_attention else None
            found.append((tokens, tokens, documents, factor))
    return found


def stored(tensors: list[Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def allocated(run: Callable[[], Any]) -> tuple[int, int, Any]:
    """Bytes that PyTorch's CPU allocator gave while something ran: the most at once, and those not taken back."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = run()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most, now, kept


def updates(recipe: Recipe, model: Any, optimizer: torch.optim.Optimizer) -> None:
    for batch in batches(recipe):
        with shape_of(recipe).regime.context(CPU):
            out = model(*batch)
        out.train.backward()
        del out
    optimizer.step()


def few(cases: list[dict[str, Any]], *quick: int) -> list[Any]:
    """The cases, of which all but a few are slow together."""
    return [case if i in quick else pytest.param(case, marks=pytest.mark.slow) for i, case in enumerate(cases)]


# -- what stays ----------------------------------------------------------------------------------------------------

PURE = {"precision__regime": "bf16_pure"}
OPTIMIZERS: list[dict[str, Any]] = [
    {},
    {"precision__regime": "amp_bf16"},
    PURE,
    {"precision__regime": "fp16_pure"},
    {**PURE, "precision__head": "fp32"},
    {**PURE, "precision__norms": "fp32"},
    {"optim__amsgrad": True},
    {"optim__kernel": "foreach"},
    {**PURE, "optim__rounding": "kahan"},
    {**PURE, "optim__rounding": "stochastic"},
    {"optim__name": "adamw-spam"},
    {"optim__name": "adamw-spam", "optim__amsgrad": False},
    {"optim__name": "adamw-spam", "optim__spam_form": "stable"},
    {"optim__name": "adamw-spam", "optim__spam_form": "paper", "optim__spam_density": 0.3},
    {"optim__name": "adamw-prune", "sparsity__method": "state"},
    {"optim__name": "muon"},
    {**PURE, "optim__name": "muon"},
    {"optim__name": "sgd"},
    {"optim__name": "sgd", "optim__betas": [0.0, 0.9]},
    {"model__tied": False, "model__bias": False, "model__position": "rope"},
    {"task": "classify", "model__mlp": "gelu_erf"},
    {"optim__name": "adamw_8bit"},
]


@pytest.mark.parametrize(
    "changes", few(OPTIMIZERS, *range(0, 19, 2)), ids=lambda c: " ".join(map(str, c.values())) or "adamw"
)
def test_weights_gradients_and_moments_are_those_of_real_tensors(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "activations", lambda *_: planner.Activations(0, 0, 0, 0))  # not what is asked here
    if changes.get("optim__name") == "adamw_8bit" and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    recipe = small(**changes)
    model = real(recipe)
    optimizer = make_optimizer(model, recipe.optim)
    updates(recipe, model, optimizer)
    kept = [t for state in optimizer.state.values() for t in plain_tensors(state).values()]
    kept += [mask for mask in getattr(optimizer, "_masks", (0, []))[1] if mask is not None]
    found = planner.memory(recipe, shape_of(recipe), 5, "cpu")
    assert found.weights == stored([*model.parameters(), *model.buffers()])
    assert found.gradients == stored([p.grad for p in model.parameters()])
    # step counts and the norms that SPAM keeps are left out, and 8 bits' tables of 2 KB
    assert found.optimizer == pytest.approx(stored(kept), rel=0.01, abs=4200)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "magnitude"},
        {"method": "rigl"},
        {"method": "2:4", "begin": 0.0},
        {"method": "movement", "movement": "distance"},
        {"method": "movement", "movement": "gradient"},
        {"method": "magnitude", "head": True},
    ],
    ids=lambda c: " ".join(map(str, c.values())),
)
def test_masks_are_those_of_a_real_pruner(changes: dict[str, Any]) -> None:
    recipe = small(**{f"sparsity__{key}": value for key, value in changes.items()})
    model = real(recipe)
    optimizer = make_optimizer(model, recipe.optim)
    settings = recipe.sparsity.model_copy(update={"begin": 0.0, "every": 1})
    pruner = Pruner(model, optimizer, settings, 100, seed=0, every_update=False)
    for step in range(2):  # masks change after the first, and the second has masks
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        pruner.before_update(step)
        optimizer.step()
        pruner.after_update(step + 1)
    kept = sum(t.nbytes for name, t in pruner.tensors().items() if name != "changed")
    assert planner.mask_bytes(model, recipe) == kept


# -- activations ---------------------------------------------------------------------------------------------------

SHAPES: list[dict[str, Any]] = [
    {},
    {"precision__regime": "amp_bf16"},
    {"precision__regime": "bf16_pure"},
    {"precision__regime": "bf16_pure", "precision__norms": "fp32"},
    {"precision__regime": "amp_fp16", "model__dropout": 0.1},
    {"model__document_attention": True},
    {"precision__regime": "amp_bf16", "model__document_attention": True, **MODERN},
    {"precision__regime": "amp_bf16", **MODERN, "model__tied": False},
    {"model__mlp": "relu2", "model__dropout": 0.2, "model__bias": False},
    {"precision__regime": "amp_bf16", "task": "classify", "model__mlp": "gelu_erf", "model__dropout": 0.1},
]


@pytest.mark.parametrize("changes", few(SHAPES, 0, 3, 6, 9), ids=lambda c: " ".join(map(str, c.values())) or "fp32")
def test_activations_are_what_the_allocator_gave_in_a_forward_pass(changes: dict[str, Any]) -> None:
    """On the real model, of other layers and sequences than the planner looked at."""
    recipe = small(**changes)
    model, shape = real(recipe), shape_of(recipe)
    batch = batches(recipe)[0]

    def forward() -> Any:
        with shape.regime.context(CPU):
            return model(*batch) if recipe.task == "classify" else model.hidden(batch[0], batch[2])

    forward()
    _, kept, out = allocated(forward)
    if isinstance(out, Tensor):
        kept -= out.nbytes  # the head's, and counted there
    assert planner.activations(shape, gpu=False).of(5, 3) == pytest.approx(kept, rel=0.02)


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("changes", few(SHAPES, 4, 6, 9), ids=lambda c: " ".join(map(str, c.values())) or "fp32")
def test_the_bound_is_above_what_is_kept_and_not_far(changes: dict[str, Any], gpu: bool) -> None:
    shape = shape_of(small(**changes))
    kept, bound = planner.activations(shape, gpu), planner.most_activations(shape, gpu)
    for sequences in (1, 64):
        for layers in (1, 48):
            assert kept.of(sequences, layers) <= bound.of(sequences, layers) < 8 * kept.of(sequences, layers)


CHUNKED: list[dict[str, Any]] = [
    {},
    {"precision__regime": "amp_bf16"},
    {"precision__regime": "amp_bf16", "precision__head": "fp32"},
    {"precision__regime": "amp_bf16", "precision__loss": "bf16", "batch__micro_batch": 10},
    {"precision__regime": "bf16_pure", "batch__micro_batch": 10},
    {"precision__regime": "amp_bf16", **MODERN},
    {"precision__regime": "amp_bf16", "train__activation_checkpointing": True, "model__document_attention": True},
    {"train__activation_checkpointing": True, "batch__micro_batch": 10},
    {"task": "classify", "model__mlp": "gelu_erf", "model__dropout": 0.1},
]


@pytest.mark.parametrize(
    "chunk", [1 << 18, pytest.param(64 << 20, marks=pytest.mark.slow)], ids=["several chunks", "one chunk"]
)
@pytest.mark.parametrize("changes", few(CHUNKED, 0, 6), ids=lambda c: " ".join(map(str, c.values())) or "fp32")
def test_the_peak_is_that_of_a_real_step(changes: dict[str, Any], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", chunk)
    recipe = small(**changes)
    model = real(recipe)
    optimizer = make_optimizer(model, recipe.optim)
    updates(recipe, model, optimizer)
    kept = [t for state in optimizer.state.values() for t in plain_tensors(state).values()]
    optimizer.zero_grad(set_to_none=True)
    most, _, _ = allocated(lambda: updates(recipe, model, optimizer))
    peak = stored([*model.parameters(), *model.buffers()]) + stored(kept) + most
    assert isinstance(recipe.batch.micro_batch, int)
    found = planner.memory(recipe, shape_of(recipe), recipe.batch.micro_batch, "cpu")
    assert found.peak == pytest.approx(peak, rel=0.09)


def test_a_gpu_keeps_what_was_counted_by_hand() -> None:
    """GPT-2 under autocast, bytes a token of a layer: C channels and H heads.

    Two norms keep float32 inputs and two float32 each, and a bf16 copy of their output goes into a matrix: 2 (4 + 2) C
    and 16. Queries, keys, values 6 C, attention's output 2 C, its log-sum-exp 4 H. The MLP 8 C before and after GELU.
    """
    C, H, T = 64, 4, 64
    kept = planner.activations(shape_of(small(precision__regime="amp_bf16")), gpu=True)
    assert kept.a_layer_and_sequence == T * (36 * C + 4 * H + 16)
    assert kept.a_layer == 2 * 12 * C * C  # a bf16 copy of the matrices
    dropping = planner.activations(shape_of(small(precision__regime="amp_bf16", model__dropout=0.1)), gpu=True)
    assert dropping.a_layer_and_sequence - kept.a_layer_and_sequence == T * 2 * C  # a byte, after each projection
    within = small(precision__regime="amp_bf16", model__document_attention=True)
    masked = planner.activations(shape_of(within), gpu=True)
    assert masked.a_layer_and_sequence - kept.a_layer_and_sequence == 2 * T * T  # bf16, for all heads


def test_checkpointing_keeps_one_input_a_layer() -> None:
    recipe = small(precision__regime="amp_bf16", train__activation_checkpointing=True)
    found = planner.memory(recipe, shape_of(recipe), 5, "cuda")
    ids, stats, norm = 8, 8, 4 * 64  # tokens are int64; the last norm keeps its input
    assert found.activations == 5 * 64 * (3 * 4 * 64 + ids + stats + norm)


# -- devices, time and money ---------------------------------------------------------------------------------------


def test_memory_is_given_for_a_gpu_of_any_name_or_none() -> None:
    recipe = load_recipe("gpt2-124m-fineweb-edu")
    card, any_gpu = Device.named("RTX3060"), Device.named(memory_gb=12)
    assert card.available == any_gpu.available == 11 * GB and card.kind == any_gpu.kind == "cuda"
    both = Device.named("RTX4060Ti-8", 12)
    assert (both.name, both.available, both.gpu) == ("RTX4060Ti-8 with 12 GB", 11 * GB, GPUS["RTX4060Ti-8"])
    known, unknown = planner.plan(recipe, both), planner.plan(recipe, any_gpu)
    assert known.memory == unknown.memory and known.hours and unknown.hours is unknown.tokens_per_second is None
    for memory in (0, -12, 1, math.nan, math.inf):
        with pytest.raises(UserError, match=f"^--memory {memory:g}: must be above 1, "):
            Device.named(memory_gb=memory)


def test_time_and_cost_follow_from_flops() -> None:
    recipe = load_recipe("gpt2-124m-openwebtext", {"compile.enabled": "false"})
    found = planner.plan(recipe, Device.named("A100-80"), mfu=0.5, price=2.0)
    n = 50304 * 768 + 1024 * 768 + 12 * (12 * 768**2 + 2 * 768) + 768  # no biases
    assert found.parameters == n
    multiplied = 50304 * 768 + 12 * 12 * 768**2
    assert found.flops_per_token == 6 * multiplied + 12 * 12 * 768 * 1024
    rate = 0.5 * 312e12 / found.flops_per_token
    assert found.tokens_per_second == pytest.approx(rate)
    evaluated = 22 * 2 * 2457600  # at 0, every 500 of 10,000 steps and at the end, of both splits
    assert found.hours == pytest.approx((10000 * 61440 + evaluated / 3) / rate / 3600)
    assert found.cost == pytest.approx(2 * found.hours)
    assert found.data == 2 * 10000 * 61440
    assert found.checkpoint == pytest.approx(12 * n, rel=1e-6)
    assert found.checkpoints == 4 * found.checkpoint  # the last two, the best, and one that is being written
    json.dumps(found.to_json())


def test_a_regime_is_timed_at_its_own_peak() -> None:
    for regime, peak in (("fp32", 19.5e12), ("tf32", 156e12), ("amp_bf16", 312e12)):
        found = planner.plan(small(precision__regime=regime), Device.named("A100-40"), mfu=0.5, bound=True)
        assert found.tokens_per_second == pytest.approx(0.5 * peak / found.flops_per_token)
    assert planner.plan(small(precision__regime="amp_bf16"), Device.named("T4")).hours is None


def clock() -> Callable[[], float]:
    """A clock by which a micro-step takes three seconds, and an update one."""
    ticks = itertools.cycle([0.0, 3.0, 1.0])  # before a micro-step, after it, after the update
    return itertools.accumulate(ticks).__next__


@pytest.mark.parametrize(
    "changes",
    [
        {"optim__name": "muon"},
        {"precision__regime": "amp_fp16", "model__document_attention": True},
        {"task": "classify", "model__mlp": "gelu_erf"},
    ],
    ids=["muon", "amp_fp16", "classify"],
)
def test_the_speed_of_a_cpu_is_that_of_its_steps(changes: dict[str, Any]) -> None:
    recipe = small(**changes)
    step = 2 * 3.0 + 1.0  # two micro-steps of 5 sequences and an update
    speed = planner.measure(recipe, shape_of(recipe), 5, seconds=8.0, clock=clock())
    assert speed.tokens == pytest.approx(64 * 10 / step)
    assert speed.note == "tokens a second were measured for about 8 s on this CPU"
    once = planner.measure(recipe, shape_of(recipe), 5, seconds=0.0, clock=clock())
    assert once.tokens == pytest.approx(64 * 10 / step)


def test_of_a_large_model_a_part_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    monkeypatch.setattr(planner, "build_model", lambda config, **_: built.append(config) or build_model(config, **_))
    monkeypatch.setattr(planner, "SAMPLE", 1e8)
    recipe = small(model__n_layer=12, model__block_size=512, model__n_embd=128, batch__tokens_per_step=8 * 512)
    speed = planner.measure(recipe, shape_of(recipe), 8, seconds=2.0, clock=clock())
    [config] = built
    assert (config.n_layer, config.block_size, config.n_embd) == (2, 128, 128)
    part, whole = build_model(config), real(recipe)
    step = 3.0 * (8 * 512 / 128) * (whole.flops_per_token() / part.flops_per_token())
    step += 1.0 * whole.parameter_count() / part.parameter_count()
    assert speed.tokens == pytest.approx(8 * 512 / step)
    assert speed.note.endswith(" and are extrapolated from 2 of 12 layers and 128 tokens")
    found = planner.plan(recipe, Device("a CPU", "cpu", 8 * GB), measure=lambda *_: speed)
    assert found.measured and found.tokens_per_second == speed.tokens
    assert found.hours and found.hours > 100 * 8 * 512 / speed.tokens / 3600 and speed.note in found.notes


def test_a_cpu_that_cannot_do_it_is_not_measured() -> None:
    never = planner.plan(small(), Device("a small CPU", "cpu", 1e5), measure=lambda *_: pytest.fail("it cannot fit"))
    assert never.hours is None and not never.measured
    mode, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    found = planner.plan(small(precision__regime="tf32"), Device("a CPU", "cpu", 8 * GB), measure=planner.measure)
    assert found.hours is None and any("TF32 needs an NVIDIA GPU" in note for note in found.notes)
    assert (torch.get_float32_matmul_precision(), torch.get_num_threads()) == (mode, threads)


def test_a_study_is_the_sum_of_its_runs() -> None:
    study = load_study("bitter-lesson-smoke")
    whole = planner.plan_study(study, Device.named("L4"), price=3.0)
    assert list(whole.arms) == list(study.arms)
    arms = [planner.plan(study.build(arm, 0), Device.named("L4")) for arm in study.arms]
    hours = [arm.hours for arm in arms if arm.hours is not None]
    assert whole.hours == pytest.approx(sum(hours) * len(study.seeds))
    assert whole.cost == pytest.approx(3 * whole.hours)


# -- the answer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu", ["T4", "L4", "H100"])
@pytest.mark.parametrize("preset", ["gpt2", "gpt2-large"])
def test_the_largest_micro_batch_fits_and_one_more_does_not(preset: str, gpu: str) -> None:
    recipe = load_recipe("gpt2-124m-fineweb-edu", {"model.preset": preset, "precision.regime": "amp_fp16"})
    device = Device.named(gpu)
    shape, _, _ = planner.resolve(recipe)
    most = planner.largest_micro_batch(recipe, shape, device)

    def peak(sequences: int) -> float:
        return planner.memory(recipe, shape, sequences, "cuda").peak

    assert 0 <= most < recipe.sequences_per_step
    assert most == 0 or peak(most) <= 0.95 * device.available
    assert peak(most + 1) > 0.95 * device.available
    auto = planner.plan(recipe.replace({"batch.micro_batch": "auto"}), device)
    assert auto.micro_batch == max(1, most) and auto.largest_micro_batch == most


def test_what_cannot_fit_is_refused_with_a_way_out_that_works() -> None:
    recipe = load_recipe("gpt2-124m-fineweb-edu", {"model.preset": "gpt2-large", "batch.micro_batch": 512})
    device = Device.named("L4")
    found = planner.plan(recipe, device)
    assert found.refused and found.needed_gb > found.available_gb == 23
    way = re.search(r"--batch.micro-batch (\d+) fits", found.sentence)
    assert way and int(way[1]) == found.largest_micro_batch
    other = planner.plan(recipe.replace({"batch.micro_batch": int(way[1])}), device)
    assert not other.refused and other.needed_gb < 23 and "of the 23.0 GB" in other.sentence

    tight = Device("a small GPU", "cuda", 15 * GB)  # weights, gradients and moments of 774M take 12.4
    found = planner.plan(recipe.replace({"batch.micro_batch": 8, "model.block_size": 8192}), tight)
    assert "--train.activation-checkpointing true" in found.sentence
    none = planner.plan(recipe, Device("a tiny GPU", "cuda", 2 * GB))
    assert none.refused and "a smaller model is needed" in none.sentence


def test_a_run_is_refused_from_15_percent_on_and_a_compiled_one_later() -> None:
    recipe = small(precision__regime="amp_bf16", compile__enabled=False)
    peak = planner.memory(recipe, shape_of(recipe), 5, "cuda").peak
    assert not planner.plan(recipe, Device("x", "cuda", peak / 1.14)).refused
    assert planner.plan(recipe, Device("x", "cuda", peak / 1.16)).refused
    compiled = recipe.replace({"compile.enabled": True})
    assert not planner.plan(compiled, Device("x", "cuda", peak / 1.16)).refused
    assert planner.plan(compiled, Device("x", "cuda", peak / 4)).refused


def test_a_host_needs_pytorch_and_one_tensor_and_no_copies() -> None:
    recipe = load_recipe("gpt2-124m-fineweb-edu", {"model.preset": "gpt2-xl", "batch.micro_batch": 1})
    found = planner.plan(recipe, dataclasses.replace(Device.named("H100"), host=4 * GB))
    assert found.host == 3 * GB + 4 * 50304 * 1600 < 4 * GB
    assert found.copies == found.checkpoint > 18 * GB and not found.refused
    short = planner.plan(recipe, dataclasses.replace(Device.named("H100"), host=2.8 * GB))
    assert short.refused and "needs about 3.3 GB of host memory" in short.sentence and " 2.8: " in short.sentence
    assert planner.plan(recipe, Device.named("H100"), processes=8).host == found.host  # each


def test_fits_asks_for_what_is_free_and_looks_closer_only_where_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, looks = small(), []
    exact = planner.activations
    monkeypatch.setattr(planner, "activations", lambda *a: looks.append(a) or exact(*a))

    def free(size: float) -> None:
        monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": size})())

    found = planner.fits(recipe, CPU)
    assert not found.refused and not looks
    assert found.tokens_per_second is None and found.hours is None  # no peak is known
    peak = planner.memory(recipe, shape_of(recipe), 5, "cpu").peak
    for size, refused in ((1.2 * peak, False), (0.9 * peak, False), (0.8 * peak, True)):
        looks.clear()
        free(size)
        found = planner.fits(recipe, CPU)
        assert (found.refused, found.needed_gb) == (refused, peak / GB) and looks
    free(2 * 1.2 * peak)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # of torchrun: the memory is for two
    assert planner.fits(recipe.replace({"batch.tokens_per_step": 64 * 20}), CPU, 4).available_gb == 1.2 * peak / GB


# -- several processes ---------------------------------------------------------------------------------------------

FSDP = {"distributed__strategy": "fsdp"}


def test_processes_share_the_time_and_the_batch_and_not_the_cost() -> None:
    recipe = load_recipe("gpt2-124m-fineweb-edu", {"model.preset": "gpt2-large", "batch.micro_batch": "auto"})
    device = Device.named("H100")
    one, eight = planner.plan(recipe, device, price=2.0), planner.plan(recipe, device, price=2.0, processes=8)
    assert one.hours and eight.hours and one.tokens_per_second and eight.tokens_per_second
    assert eight.tokens_per_second == pytest.approx(8 * one.tokens_per_second)
    assert eight.hours == pytest.approx(one.hours / 8) and eight.device_hours == pytest.approx(one.hours)
    assert eight.cost == pytest.approx(2 * one.hours) and eight.checkpoint == one.checkpoint
    assert (one.memory.weights, one.memory.optimizer) == (eight.memory.weights, eight.memory.optimizer)
    assert eight.largest_micro_batch == one.largest_micro_batch == eight.micro_batch
    assert eight.micro_batches == -(-64 // eight.micro_batch)  # of 512 sequences
    machine = recipe.replace({"train.price_per_hour": 16.0})
    assert planner.plan(machine, device, processes=8).cost == pytest.approx(16 * eight.hours)
    small_step = recipe.replace({"batch.tokens_per_step": 12 * 1024, "batch.micro_batch": 4})
    assert planner.plan(small_step, device, processes=8).micro_batch == 2  # its share, and not more
    study = planner.plan_study(load_study("sizes-smoke", {"data.tokenizer": "byte"}), device, processes=2)
    assert study.hours and study.device_hours == pytest.approx(2 * study.hours)


def test_fsdp_spreads_weights_gradients_and_moments_by_rows() -> None:
    recipe = small(**FSDP, model__n_embd=60, model__vocab_size=701)  # 701 rows: 176, 176, 176 and 173
    C, V, M = 60, 701, 240
    rows = [176 * C, 16 * C]  # embeddings, of 64 positions
    rows += 3 * [(45 + 15) * (C + 1), M // 4 * (C + 1), 15 * (M + 1), 4 * 15]  # c_attn and c_proj, c_fc, c_proj, norms
    found = planner.memory(recipe, shape_of(recipe), 1, "cuda", processes=4)
    assert found.weights == found.gradients == 4 * (sum(rows) + 2 * 15) and found.optimizer == 2 * found.weights
    block = C * 4 * C + 4 * C + 2 * C * M + C + M
    rest = V * C + 64 * C + (3 * 4 + 2) * C
    assert found.gathered == 4 * (rest + 2 * block) + 8 * block + 4 * (rest + 3 * block)  # and whole gradients
    hybrid = recipe.replace({"distributed.shard_over": 2})
    two = planner.memory(hybrid, shape_of(recipe), 1, "cuda", processes=4)
    assert two == dataclasses.replace(
        two,
        **{
            k: getattr(planner.memory(recipe, shape_of(recipe), 1, "cuda", 2), k)
            for k in ("weights", "gradients", "optimizer", "gathered")
        },
    )
    alone = planner.memory(recipe, shape_of(recipe), 1, "cuda")
    assert alone == planner.memory(small(model__n_embd=60, model__vocab_size=701), shape_of(recipe), 1, "cuda")


def test_what_does_not_go_with_so_many_processes() -> None:
    device = Device.named("L4")
    for changes, processes, says in (
        ({"distributed__strategy": "none"}, 2, "distributed.strategy = none"),
        ({**FSDP, "distributed__shard_over": 3}, 4, "distributed.shard_over = 3: does not divide the 4"),
        ({}, 11, "11 processes cannot share the 10 sequences"),
        ({}, 0, "--gpus 0: must be at least 1"),
    ):
        with pytest.raises(UserError, match=says):
            planner.plan(small(**changes), device, processes=processes)


def test_a_model_that_no_gpu_holds_is_told_of_fsdp() -> None:
    recipe = load_recipe("gpt2-124m-fineweb-edu", {"model.preset": "gpt2-xl", "batch.micro_batch": 8})
    found = planner.plan(recipe, Device.named("L4"), processes=8)
    way = re.search(
        r"--distributed.strategy fsdp --distributed.shard-over 0 --batch.micro-batch (\d+) fits", found.sentence
    )
    assert found.refused and way
    other = recipe.replace({"distributed.strategy": "fsdp", "batch.micro_batch": int(way[1])})
    assert not planner.plan(other, Device.named("L4"), processes=8).refused


def step_of_several(changes: dict[str, Any]) -> tuple[float, float]:
    """Planned and measured peak of a process: what it holds between updates, and what its allocator gave in one."""
    recipe = small(**changes)
    shape, sharded = shape_of(recipe), recipe.distributed.strategy == "fsdp"
    with process_group(recipe.distributed.strategy, CPU) as world:

        def lay_out(model: Any) -> None:
            apply_regime(model, shape.regime)
            if sharded:
                shard(model, world, 0, CPU, shape.regime.gathered)

        model = build_model(recipe.model, on_meta=lay_out)
        model.activation_checkpointing = recipe.train.activation_checkpointing
        weights = LocalShards(model) if sharded else model
        net = model if sharded else replicate(model)
        optimizer = make_optimizer(weights, recipe.optim)

        def update() -> None:
            for batch, last in with_last(batches(recipe)[: recipe.sequences_per_step // 5 // world.size]):
                with sync_gradients(net, last):
                    with shape.regime.context(CPU):
                        out = net(*batch)
                    out.train.backward()
                    del out
            if sharded:
                weights.collect_gradients()
            optimizer.step()
            optimizer.zero_grad(set_to_none=sharded)

        update()
        update()
        here = [
            *weights.parameters(),
            *(t for state in optimizer.state.values() for t in plain_tensors(state).values()),
        ]
        buckets = [] if sharded else [p.grad for p in model.parameters()]
        most, _, _ = allocated(update)
        return planner.memory(recipe, shape, 5, "cpu", world.size).peak, stored([*here, *buckets]) + most


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        FSDP,
        {**FSDP, "precision__regime": "amp_bf16", "train__activation_checkpointing": True},
    ],
    ids=lambda c: " ".join(map(str, c.values())) or "ddp",
)
def test_the_peak_of_one_of_two_processes_is_that_of_a_real_step(changes: dict[str, Any]) -> None:
    shape = {"model__n_layer": 5, "model__n_embd": 128, "model__vocab_size": 2000, "batch__tokens_per_step": 64 * 20}
    for planned, measured in together(2, step_of_several, {**shape, **changes}):
        # over gloo, tensors that its threads let go of stay in the profiler's count
        assert planned == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(("tokenizer", "ids"), [("gpt2", 50257), ("byte", 257), ("bpe-2048", 2048)])
def test_a_vocabulary_that_is_known_without_data(tokenizer: str, ids: int, tmp_path: Path) -> None:
    recipe = small(model__vocab_size=0, data__tokenizer=tokenizer, data__path=str(tmp_path / "none"))
    shape, epoch, notes = planner.resolve(recipe)
    assert shape.model.vocab_size == ids and epoch is None and "no prepared dataset" in notes[0]


def test_a_vocabulary_that_is_in_the_dataset(recipe: Recipe, tmp_path: Path) -> None:
    shape, epoch, notes = planner.resolve(recipe)
    assert shape.model.vocab_size == open_data(recipe).vocab_size and epoch and not notes
    found = planner.plan(recipe, Device.named("L4"))
    assert found.data == 2 * epoch
    with pytest.raises(UserError, match="data.tokenizer = char: how many ids"):
        planner.plan(recipe.replace({"data.path": str(tmp_path / "none")}), Device.named("L4"))
    unended = recipe.replace({"train.max_steps": 0, "train.max_epochs": 2.0, "data.path": str(tmp_path / "none")})
    unended = unended.replace({"model.vocab_size": 30})
    assert planner.plan(unended, Device.named("L4")).steps is None
    with pytest.raises(UserError, match="--mfu 40"):
        planner.plan(recipe, Device.named("L4"), mfu=40)


def test_tables_name_what_they_show() -> None:
    from rich.console import Console

    console = Console(width=200, record=True, file=io.StringIO())
    layers = [{"model.preset": "micro", "model.vocab_size": 300, "train.max_steps": 10}]
    rows = planner.sweep(layers, Device.named("L4"), ["micro", "mini"], [32, 64])
    assert list(rows) == ["micro x 32", "micro x 64", "mini x 32", "mini x 64"]
    assert rows["mini x 64"].memory.activations > 1.9 * rows["mini x 32"].memory.activations
    console.print(planner.render_rows(rows, "size x micro-batch"))
    console.print(planner.render(dataclasses.replace(rows["mini x 64"], notes=["[a note]"])))
    study = planner.plan_study(load_study("sizes-smoke"), Device.named("L4"))
    console.print(planner.render_study(study))
    [name, *_] = study.arms
    arms = {**study.arms, name: dataclasses.replace(study.arms[name], hours=None)}
    console.print(planner.render_study(dataclasses.replace(study, arms=arms)))
    text = console.export_text()
    assert f" hours of one machine without {name}, whose time is unknown" in text
    for word in (
        "size x micro-batch",
        "mini x 64",
        "activations",
        "largest micro-batch that fits",
        "[a note]",
        "seeds",
    ):
        assert word in text


def cli(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(list(words))
    return int(end.value.code or 0)


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("plan", "gpt2-124m-fineweb-edu", "--gpu", "h100", "--json", str(tmp_path / "a/plan.json")) == 0
    facts = json.loads((tmp_path / "a/plan.json").read_text(encoding="utf-8"))
    assert facts["parameters"] == 124_475_904 and "needs about" in capsys.readouterr().out
    assert cli("plan", "gpt2-124m-fineweb-edu", "--gpu", "L4", "--micro-batches", "4", "8") == 0
    assert cli("plan", "gpt2-124m-fineweb-edu", "--gpu", "RTX3060", "--memory", "12") == 0
    assert "the 11.0 GB that a run can have of RTX3060 with 12 GB" in capsys.readouterr().out
    assert cli("plan", "gpt2-124m-fineweb-edu", "--gpu", "h100", "--gpus", "8", "--json", str(tmp_path / "8.json")) == 0
    assert json.loads((tmp_path / "8.json").read_text(encoding="utf-8"))["processes"] == 8
    assert cli("plan", "sizes-smoke", "--gpu", "L4", "--data.tokenizer", "byte") == 0
    assert "3 arms x 3 seeds" in capsys.readouterr().out
    for words, says in (
        (["gpt2-124m-fineweb-edu", "--gpu", "H10"], "--gpu H10: did you mean H100"),
        (["gpt2-124m-fineweb-edu", "--memory", "nan"], "--memory nan: must be above 1"),
        (["gpt2-124m-fineweb-edu", "--gpu", "L4", "--price", "-1"], "--price -1: must be 0 or more"),
        (["sizes-smoke", "--sizes", "gpt2"], "--sizes and --micro-batches are for a recipe"),
        (["no-such-recipe"], "no recipe 'no-such-recipe'"),
        (["gpt2-124m-fineweb-edu", "--optim.lr", "-1"], "optim.lr = -1: must be greater than 0"),
    ):
        assert cli("plan", *words) == 2
        assert says in capsys.readouterr().err
