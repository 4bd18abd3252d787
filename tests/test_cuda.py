"""What only a GPU can get wrong. `pytest -m cuda` runs these tests; they are skipped where there is no GPU.

The bodies do not depend on the device: GPTLAB_CUDA_TESTS=cpu runs them on a CPU, which shows that they are sound, not
that a GPU is right. `benchmarks/gpu.py` runs them as its stage `correctness`, in one process, one after another.
"""

import gc
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import tiny_recipe
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import gptlab
from gptlab.config import Optim, Recipe, load_study
from gptlab.distributed.shard import LocalShards, init_shards
from gptlab.distributed.world import SINGLE
from gptlab.distributed.wrap import make_scaler, replicate, shard
from gptlab.guard import Diverged
from gptlab.model.gpt import GPT, build_model
from gptlab.model.loss import cross_entropy_
from gptlab.optim.optimizers import make_optimizer
from gptlab.planning.memory import step_memory
from gptlab.planning.shape import Shape
from gptlab.precision.regimes import NotApplicable, apply_regime, enter_regime
from gptlab.rundir import RunDir
from gptlab.tasks.lm import LanguageModelling
from gptlab.training.job import open_job
from gptlab.training.loop import fit
from gptlab.training.outcome import result_of_run
from gptlab.training.scoring import evaluate_run
from gptlab.training.throughput import Stopwatch
from gptlab.training.trainer import Trainer

DEVICE = torch.device(os.environ.get("GPTLAB_CUDA_TESTS", "cuda"))
CUDA = DEVICE.type == "cuda"
pytestmark = pytest.mark.cuda

# Relative rounding error of a float32 sum of n terms, taken in another order on another device: eps sqrt(n), with
# n = tokens x width, which is more than any sum of these models has.
TERMS = 256 * 128
ROUNDING = torch.finfo(torch.float32).eps * math.sqrt(TERMS)


@pytest.fixture(autouse=True)
def left_as_it_was() -> Iterator[None]:
    """Tests share a process: what one of them sets for all is undone."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")
    torch.compiler.reset()
    gc.collect()
    if CUDA:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.empty_cache()


def small(dataset: Path, **changes: object) -> Recipe:
    """Wide enough for float8 and 8-bit moments; no dropout, whose random numbers are the device's own."""
    settings: dict[str, object] = {
        "model__n_embd": 64,
        "model__dropout": 0.0,
        "train__device": DEVICE.type,
        "compile__enabled": False,
        "train__eval_every": 0,
        "eval__train": False,
        "eval__tokens": 96,
        "checkpoint__every": 0,
        "checkpoint__keep_best": False,
    }
    return tiny_recipe(dataset, **(settings | changes))


def lines(run: Path, key: str = "loss") -> list[tuple[int, float]]:
    return [(line["step"], line[key]) for line in RunDir(run).read_metrics() if key in line]


# -- a whole run ----------------------------------------------------------------------------------------------------


def test_a_run_is_trained_evaluated_and_sampled(dataset: Path, tmp_path: Path) -> None:
    settings = {
        "precision__regime": "amp_bf16",
        "train__max_steps": 60,
        "train__eval_every": 30,
        "checkpoint__every": 30,
    }
    result = gptlab.train(small(dataset, **settings), tmp_path / "run", quiet=True)
    assert result.status == "completed" and result.steps == 60
    assert result.final_val_loss is not None and result.final_val_loss < 2.5, "the characters of a small grammar"
    assert result.tokens_per_second and result.peak_memory_gb
    run = gptlab.load_run(tmp_path / "run", device=DEVICE.type)
    assert next(run.model.parameters()).device.type == DEVICE.type
    assert len(run.sample("the ", samples=2, max_tokens=16)) == 2
    scores = evaluate_run(run, ["loss"], {})
    assert math.isfinite(scores["val_loss"])


# -- equal to the CPU, equal to itself ------------------------------------------------------------------------------


def test_five_steps_equal_the_cpus_in_float32(dataset: Path, tmp_path: Path) -> None:
    """Losses agree to rounding. So do weights, by the norm of all that moved.

    An update of Adam is g / |g| in its first steps, also where |g| is nothing but rounding. A share `ROUNDING` of the
    elements is that small and may be off by twice an update: sqrt(ROUNDING) of the norm, times two.
    """
    weights: dict[str, dict[str, Tensor]] = {}
    for device in ("cpu", DEVICE.type):
        # no biases: the gradient of the keys' bias is zero but for rounding, which Adam would make a whole step of
        recipe = small(dataset, train__device=device, train__max_steps=5, model__bias=False)
        assert gptlab.train(recipe, tmp_path / device, quiet=True).status == "completed"
        model = gptlab.load_run(tmp_path / device, device="cpu").model
        weights[device] = {name: p.detach().double() for name, p in model.named_parameters()}
    for key in ("loss", "grad_norm"):
        theirs, ours = lines(tmp_path / "cpu", key), lines(tmp_path / DEVICE.type, key)
        assert len(theirs) == 5
        for (step, a), (_, b) in zip(theirs, ours, strict=True):
            # each update carries the difference of the one before into the loss
            assert b == pytest.approx(a, rel=20 * ROUNDING), f"{key} of step {step}"
    trained = gptlab.load_run(tmp_path / "cpu", device="cpu").recipe
    start = dict(build_model(trained.model, "cpu", init=trained.seed).named_parameters())
    off = moved = 0.0
    for name, theirs in weights["cpu"].items():
        off += float((weights[DEVICE.type][name] - theirs).square().sum())
        moved += float((theirs - start[name].detach().double()).square().sum())
    assert math.sqrt(off / moved) < 2 * math.sqrt(ROUNDING)


# -- what is multiplied in which format -----------------------------------------------------------------------------


def float32_error() -> float:
    """|c - exact| / |exact| of a float32 product as this process multiplies it now.

    TF32 keeps 10 bits of each factor: some 3e-4. float32 stays under 1e-5.
    """
    n = 1024 if CUDA else 256
    a, b = torch.randn(2, n, n, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    exact = a.double() @ b.double()
    return float((a @ b - exact).norm() / exact.norm())


class Multiplied(TorchDispatchMode):
    """The formats of what goes into matrix products and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        product = name.endswith("mm") or name == "_linear_pointwise"  # oneDNN's
        if product or ("attention" in name and "backward" not in name):  # which is given float32 sums, too
            parts = [getattr(arg, "_data", arg) for arg in args if isinstance(arg, Tensor)]  # torchao's hold theirs
            self.dtypes.update(part.dtype for part in parts if part.is_floating_point())
        return func(*args, **(kwargs or {}))


STUDY = load_study("precision-lm")


@pytest.mark.parametrize("arm", list(STUDY.arms))
def test_an_arm_multiplies_in_what_its_regime_says(arm: str) -> None:
    recipe = STUDY.build(arm, seed=0).replace(
        {
            "model.n_layer": 1,
            "model.block_size": 64,
            "batch.tokens_per_step": 64,
            "batch.micro_batch": 1,
            "model.n_embd": 64,
            "model.n_head": 2,
            "model.vocab_size": 512,
        }
    )
    try:
        regime = enter_regime(recipe.precision, DEVICE)
        model = build_model(recipe.model, DEVICE, on_meta=lambda model: apply_regime(model, regime))
        optimizer = make_optimizer(model, recipe.optim)
    except NotApplicable as error:
        pytest.skip(str(error))
    tokens = torch.randint(recipe.model.vocab_size, (2, recipe.model.block_size + 1)).to(DEVICE)
    with Multiplied() as seen, regime.context(DEVICE):
        factor = torch.tensor(1 / tokens.numel(), device=DEVICE)
        model(tokens[:, :-1], tokens[:, 1:], None, factor).train.backward()
    optimizer.step()
    assert {p.dtype for p in model.parameters()} == {
        regime.weights,
        regime.head or regime.weights,
        regime.norms or regime.weights,
    }
    float8 = {dtype for dtype in seen.dtypes if "float8" in str(dtype)}
    body = regime.matmul
    if CUDA or not regime.float8:  # on a CPU float8 may be emulated
        assert seen.dtypes - float8 == {body, regime.head or body}
        assert bool(float8) == bool(regime.float8)
    error = float32_error()
    assert error < 1e-5 if not (CUDA and regime.tf32) else 5e-5 < error < 5e-3


# -- the head's kernel, and attention's -----------------------------------------------------------------------------


@pytest.mark.skipif(not CUDA, reason="tests/test_model_head_kernel.py runs it on a CPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("vocab_size", "scale"), [(65, 1e4), (4097, 1.0), (50257, 30.0)])
def test_the_kernel_of_the_head_is_right(dtype: torch.dtype, vocab_size: int, scale: float) -> None:
    logits = (torch.randn(64, vocab_size, device=DEVICE) * scale).clamp(-6e4, 6e4).to(dtype)
    targets = torch.randint(vocab_size, (64,), device=DEVICE)
    targets[::5] = -1
    factor = torch.tensor(1024 / 64, device=DEVICE)
    wide = logits.double().requires_grad_()
    losses = F.cross_entropy(wide, targets, ignore_index=-1, reduction="none")
    [grad] = torch.autograd.grad(losses.sum() * factor, wide)
    largest = logits.abs().amax(1).float()
    found, magnitudes = cross_entropy_(logits, targets, factor, True)
    torch.testing.assert_close(found.double(), losses.detach(), rtol=1e-6, atol=1e-6)
    assert torch.equal(magnitudes, largest) and not logits[::5].any()
    eps = {torch.float32: 2**-18, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(logits.double(), grad, rtol=eps, atol=6e-8 if dtype is torch.float16 else 1e-7)


@pytest.mark.skipif(not CUDA, reason="for a GPU")
def test_the_kernel_finds_rows_beyond_two_to_the_31() -> None:
    N, V = 43000, 50304
    if torch.cuda.mem_get_info()[0] < 6e9:
        pytest.skip("needs 6 GB")
    logits = torch.zeros(N, V, dtype=torch.bfloat16, device=DEVICE)
    logits[-1, 7] = 9.0
    targets = torch.full((N,), 7, device=DEVICE)
    losses, largest = cross_entropy_(logits, targets, torch.ones((), device=DEVICE), False)
    assert largest[-1] == 9 and not largest[:-1].any()
    assert losses[-1].item() == pytest.approx(math.log(math.exp(9) + V - 1) - 9, rel=1e-5)


@pytest.mark.skipif(not CUDA, reason="kernels of GPUs")
@pytest.mark.parametrize("name", ["fastest", "cudnn", "flash"])
def test_a_run_trains_with_a_kernel_of_attention(name: str, dataset: Path, tmp_path: Path) -> None:
    recipe = small(dataset, precision__regime="bf16_master", train__attention=name)
    assert gptlab.train(recipe, tmp_path / "run", quiet=True).status == "completed"
    assert RunDir(tmp_path / "run").read_recipe().train.attention in ("auto", "cudnn", "flash")


# -- loss scaling ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["fused", "foreach"])
def test_an_overflow_skips_the_step_and_halves_the_scale(kernel: str, dataset: Path) -> None:
    layer = nn.Linear(8, 8, device=DEVICE)
    optimizer = make_optimizer(layer, Optim(kernel=kernel))
    scaler = make_scaler(DEVICE, True, False)
    x = torch.randn(4, 8, device=DEVICE)

    def update(spoil: bool) -> list[Tensor]:
        scaler.scale(layer(x).square().mean()).backward()
        if spoil:
            layer.weight.grad[3, 3] = math.inf
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return [p.detach().clone() for p in layer.parameters()]

    before = [p.detach().clone() for p in layer.parameters()]
    scale = scaler.get_scale()
    skipped = update(spoil=True)
    assert all(map(torch.equal, before, skipped))
    assert scaler.get_scale() == scale / 2
    moved = update(spoil=False)
    assert not any(map(torch.equal, skipped, moved))
    assert scaler.get_scale() == scale / 2


def test_amp_fp16_trains(dataset: Path, tmp_path: Path) -> None:
    result = gptlab.train(
        small(dataset, precision__regime="amp_fp16", train__max_steps=12), tmp_path / "run", quiet=True
    )
    assert result.status == "completed" and result.skipped_steps is not None
    losses = [loss for _, loss in lines(tmp_path / "run")]
    assert losses[-1] < losses[0]


# -- resuming -------------------------------------------------------------------------------------------------------

RESUMED = {
    "amp_bf16 with dropout": {"precision__regime": "amp_bf16", "model__dropout": 0.1},
    "amp_fp16": {"precision__regime": "amp_fp16"},
    "bf16_pure, stochastic rounding": {"precision__regime": "bf16_pure", "optim__rounding": "stochastic"},
    "muon": {"optim__name": "muon"},
    "normuon": {"optim__name": "normuon", "optim__cautious_decay": True},
    "schedule-free": {"optim__name": "adamw-schedule-free", "schedule__shape": "constant"},
    "soap": {"optim__name": "soap", "optim__soap_every": 3},
    "soap-muon": {"optim__name": "soap-muon", "optim__soap_every": 3},
    "completep": {"model__parametrization": "completep", "model__base_width": 16, "optim__name": "muon"},
    "average under loss scaling": {"train__ema": 0.9, "precision__regime": "amp_fp16"},
    "adamw-prune": {"optim__name": "adamw-prune", "sparsity__method": "state"},
    "8-bit moments": {"optim__name": "adamw_8bit", "precision__regime": "amp_bf16"},
    "fp8_tensorwise": {"precision__regime": "fp8_tensorwise", "batch__tokens_per_step": 96, "batch__micro_batch": 2},
    "compiled": {"precision__regime": "amp_bf16", "compile__enabled": True, "model__n_layer": 1},
}


@pytest.mark.parametrize("name", list(RESUMED))
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(name: str, dataset: Path, tmp_path: Path) -> None:
    if not CUDA and name == "compiled":
        pytest.skip("compiling for a CPU takes minutes")
    settings = {"train__deterministic": True, "checkpoint__every": 4, "schedule__decay_steps": 12, **RESUMED[name]}
    whole = gptlab.train(small(dataset, train__max_steps=12, **settings), tmp_path / "whole", quiet=True)
    if whole.status == "not_applicable":
        pytest.skip(str(whole.reason))
    gptlab.train(small(dataset, train__max_steps=5, **settings), tmp_path / "parts", quiet=True)
    gptlab.train(small(dataset, train__max_steps=12, **settings), tmp_path / "parts", quiet=True)
    for key in ("loss", "grad_norm", "largest_logit"):
        assert lines(tmp_path / "parts", key) == lines(tmp_path / "whole", key)
    files = [sorted((tmp_path / run / "checkpoints").glob("step-*"))[-1] for run in ("whole", "parts")]
    tensors = [sorted(path.name for path in folder.glob("*.safetensors")) for folder in files]
    assert tensors[0] == tensors[1] and tensors[0]
    for file in tensors[0]:
        assert (files[0] / file).read_bytes() == (files[1] / file).read_bytes(), file


# -- several processes, of which there is one -----------------------------------------------------------------------


def updates(net: nn.Module, weights: Any, model: GPT, n: int) -> list[float]:
    """Losses of some updates of SGD with momentum on made-up tokens, two micro-batches each."""
    optimizer = torch.optim.SGD(list(weights.parameters()), lr=0.1, momentum=0.9)
    draw, losses = torch.Generator().manual_seed(0), []
    tokens = torch.randint(64, (2, 4, 33), generator=draw).to(DEVICE)
    factor = torch.tensor(1 / (2 * 4 * 32), device=DEVICE)
    for _ in range(n):
        total = 0.0
        for batch in tokens:
            out = net(batch[:, :-1], batch[:, 1:], None, factor)
            out.train.backward()
            total += float(out.value) * float(factor)
        if isinstance(weights, LocalShards):
            weights.collect_gradients()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total)
    return losses


def test_one_process_over_nccl_trains_as_one_without(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DDP's hook and FSDP2's gathering, over NCCL with one process: the calls, not what several would exchange."""
    config = small(dataset).model.model_copy(update={"vocab_size": 64})
    alone = build_model(config, DEVICE, init=0)
    expected = updates(alone, alone, alone, 4)
    assert expected[-1] < expected[0]
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "lo")  # there may be no network
    store, backend = dist.HashStore(), "cpu:gloo,cuda:nccl" if CUDA else "gloo"
    if CUDA:
        torch.cuda.set_device(0)
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        copy = build_model(config, DEVICE, init=0)
        assert updates(replicate(copy), copy, copy, 4) == pytest.approx(expected, rel=20 * ROUNDING)
        spread = build_model(
            config, DEVICE, init=init_shards(0), on_meta=lambda model: shard(model, SINGLE, 0, DEVICE, None)
        )
        weights = LocalShards(spread)
        assert updates(spread, weights, spread, 4) == pytest.approx(expected, rel=20 * ROUNDING)
        whole = build_model(config, DEVICE, init=1)
        weights.gather_into(whole)
        assert torch.equal(whole.wte.weight, dict(weights.named_parameters())["wte.weight"].detach())
    finally:
        dist.destroy_process_group()


# -- memory ---------------------------------------------------------------------------------------------------------


def test_running_out_of_memory_halves_the_micro_batch(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = (
        small(
            dataset,
            model__n_embd=256,
            model__n_layer=4,
            batch__tokens_per_step=2048 * 32,
            batch__micro_batch="auto",
            train__max_steps=2,
            train__device=DEVICE.type,
        )
        if CUDA
        else small(dataset, batch__micro_batch="auto", train__max_steps=2)
    )
    all_at_once = recipe.sequences_per_step
    if CUDA:
        sized = recipe.replace({"model.vocab_size": 64})
        shape = Shape(sized.model, sized.precision, 0)
        whole, quarter = (step_memory(sized, shape, n, "cuda").peak for n in (all_at_once, all_at_once // 4))
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((whole + quarter) / 2 / total)  # the planner does not see this cap
    else:
        given = LanguageModelling.micro_batches

        def capped(self: Any, step: int, micro_batch: int) -> Any:
            if micro_batch > all_at_once // 2:
                raise torch.OutOfMemoryError("out of memory. Tried to allocate 1.00 GiB")
            return given(self, step, micro_batch)

        monkeypatch.setattr(LanguageModelling, "micro_batches", capped)
    try:
        result = gptlab.train(recipe, tmp_path / "run", quiet=True)
    finally:
        if CUDA:
            torch.cuda.set_per_process_memory_fraction(1.0)
    assert result.status == "completed" and result.steps == 2
    assert RunDir(tmp_path / "run").read_recipe().batch.micro_batch in (all_at_once // 2, all_at_once // 4)


# -- divergence, and waiting for the GPU ----------------------------------------------------------------------------


def test_the_guard_names_a_planted_nan(dataset: Path, tmp_path: Path) -> None:
    with open_job(small(dataset, train__max_steps=9), tmp_path, "auto", quiet=True) as job, Trainer(job) as trainer:

        def plant(step: int) -> None:
            if step == 2:
                dict(trainer.model.named_parameters())["h.0.mlp.c_fc.weight"].grad[1, 2] = math.nan

        trainer.inject_faults = plant  # type: ignore[method-assign]
        with pytest.raises(Diverged) as caught:
            fit(trainer)
        result = result_of_run(trainer, caught.value)
    assert (result.status, result.failed_at_step, result.failure) == ("diverged", 3, "non_finite")
    assert result.failed_tensor == "gradient of h.0.mlp.c_fc.weight"


@pytest.mark.parametrize("regime", ["amp_bf16", "amp_fp16", "bf16_pure"])
def test_a_step_waits_for_the_gpu_only_where_a_line_is_logged(regime: str, dataset: Path, tmp_path: Path) -> None:
    waits: list[int] = []
    seen: list[warnings.WarningMessage] = []

    def mode(name: str) -> None:
        if CUDA:
            torch.cuda.set_sync_debug_mode(name)

    class Listening(Stopwatch):
        def start(self) -> None:
            super().start()
            seen.clear()
            mode("warn")

        def step(self) -> None:
            mode("default")
            waits.append(sum("synchroniz" in str(warning.message) for warning in seen))
            super().step()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seen = caught
        if CUDA:  # that a wait is seen at all
            mode("warn")
            torch.ones(1, device=DEVICE).item()
            mode("default")
            assert len(caught) == 1
        recipe = small(dataset, precision__regime=regime, log__every=5, train__max_steps=14)
        with open_job(recipe, tmp_path, "auto", quiet=True) as job, Trainer(job) as trainer:
            trainer.monitor.watch = Listening(trainer.device)
            fit(trainer)
            assert result_of_run(trainer).status == "completed"
    assert len(waits) == 14
    logged = {1, 5, 10, 14}
    assert [n for step, n in enumerate(waits, 1) if step not in logged] == [0] * 10


# -- compiled, which takes longest -----------------------------------------------------------------------------------


@pytest.mark.parametrize("regime", ["fp32", "amp_bf16"])
def test_compiled_equals_eager(regime: str, dataset: Path, tmp_path: Path) -> None:
    if not CUDA:
        pytest.skip("compiling for a CPU takes minutes")
    losses = {}
    for compiled in (False, True):
        recipe = small(
            dataset,
            train__max_steps=5,
            compile__enabled=compiled,
            precision__regime=regime,
            batch__micro_batch=4,
            model__n_layer=1,
        )
        assert gptlab.train(recipe, tmp_path / str(compiled), quiet=True).status == "completed"
        losses[compiled] = [loss for _, loss in lines(tmp_path / str(compiled))]
    # fused operations round once where single ones round each time: bf16 has eps 2^-8, and a mean of 256 tokens
    allowed = 20 * ROUNDING if regime == "fp32" else 2**-8
    assert losses[True] == pytest.approx(losses[False], rel=allowed)


def test_a_compiled_step_is_compiled_once(dataset: Path, tmp_path: Path) -> None:
    """A ragged last micro-batch and evaluation have shapes of their own; from the second step on nothing is new."""
    if not CUDA:
        pytest.skip("compiling for a CPU takes minutes")
    torch._dynamo.utils.counters.clear()
    recipe = small(dataset, train__max_steps=3, compile__enabled=True, precision__regime="amp_bf16", model__n_layer=1)
    assert gptlab.train(recipe, tmp_path / "a", quiet=True).status == "completed"
    frames = torch._dynamo.utils.counters["frames"]["ok"]
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    recipe = small(dataset, train__max_steps=9, compile__enabled=True, precision__regime="amp_bf16", model__n_layer=1)
    assert gptlab.train(recipe, tmp_path / "b", quiet=True).status == "completed"
    assert torch._dynamo.utils.counters["frames"]["ok"] == frames > 0
    assert not torch._dynamo.utils.counters["graph_break"]
