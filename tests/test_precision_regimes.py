"""The dtypes of each regime, read from the operations that run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gptlab.config import Model, Optim, Precision
from gptlab.model.encoder import build_encoder
from gptlab.model.gpt import build_model
from gptlab.model.loss import HeadLoss
from gptlab.optim.optimizers import describe, make_optimizer
from gptlab.precision.regimes import NotApplicable, Regime, apply_regime, enter_regime, make_regime

F32, BF16, FP16, FP8 = torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn
VOCAB, LABELS = 112, 112  # no matrix of the blocks has this size, so it identifies the head
SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": VOCAB}
CPU = torch.device("cpu")

# precision settings; then dtypes of: body weights, norm weights, head weight, body matmul, head matmul, loss
EXPECTED: dict[str, tuple[dict[str, str], tuple[torch.dtype, ...]]] = {
    "fp32": ({"regime": "fp32"}, (F32, F32, F32, F32, F32, F32)),
    "amp_fp16": ({"regime": "amp_fp16"}, (F32, F32, F32, FP16, FP16, F32)),
    "amp_bf16": ({"regime": "amp_bf16"}, (F32, F32, F32, BF16, BF16, F32)),
    "bf16_master": ({"regime": "bf16_master"}, (F32, F32, F32, BF16, BF16, F32)),
    "bf16_pure": ({"regime": "bf16_pure"}, (BF16, BF16, BF16, BF16, BF16, BF16)),
    "fp16_pure": ({"regime": "fp16_pure"}, (FP16, FP16, FP16, FP16, FP16, FP16)),
    "amp_bf16_fp32_head": ({"regime": "amp_bf16", "head": "fp32"}, (F32, F32, F32, BF16, F32, F32)),
    "bf16_body_fp32_head": (
        {"regime": "bf16_pure", "head": "fp32", "loss": "fp32"},
        (BF16, BF16, F32, BF16, F32, F32),
    ),
    "bf16_fp32_norms": ({"regime": "bf16_pure", "norms": "fp32"}, (BF16, F32, BF16, BF16, BF16, BF16)),
    "amp_bf16_bf16_loss": ({"regime": "amp_bf16", "loss": "bf16"}, (F32, F32, F32, BF16, BF16, BF16)),
    "fp8_tensorwise": ({"regime": "fp8_tensorwise"}, (F32, F32, F32, FP8, BF16, F32)),
    "fp8_rowwise": ({"regime": "fp8_rowwise"}, (F32, F32, F32, FP8, BF16, F32)),
}


class Matmuls(TorchDispatchMode):
    """Records the operand dtypes of all matrix products, separately for the head."""

    def __init__(self) -> None:
        super().__init__()
        self.body: set[torch.dtype] = set()
        self.head: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "_scaled_mm", "bmm"):
            operands = [a for a in args if isinstance(a, torch.Tensor) and a.dim() >= 2][-2:]
            head = any(VOCAB in operand.shape for operand in operands)
            (self.head if head else self.body).update(
                getattr(operand, "_data", operand).dtype  # torchao's tensor wraps the float8 data
                for operand in operands
            )
        return func(*args, **(kwargs or {}))


def gpt(regime: Regime) -> tuple[Any, tuple[Any, ...]]:
    model = build_model(Model(**SHAPE), on_meta=lambda m: apply_regime(m, regime))
    tokens = torch.randint(VOCAB, (2, 16), generator=torch.Generator().manual_seed(0))
    return model, (tokens, tokens.roll(-1, 1), None)


def encoder(regime: Regime) -> tuple[Any, tuple[Any, ...]]:
    config = Model(**{**SHAPE, "vocab_size": 60, "mlp": "gelu_erf"})
    model = build_encoder(config, LABELS, on_meta=lambda m: apply_regime(m, regime))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(60, (16, 16), generator=generator)
    targets = (torch.rand(16, LABELS, generator=generator) < 0.1).float()
    return model, (tokens, torch.full((16,), 16), targets)


@pytest.mark.parametrize("build", [gpt, encoder], ids=["gpt", "encoder"])
@pytest.mark.parametrize("name", EXPECTED)
def test_a_regime_is_what_it_says(name: str, build: Callable[[Regime], tuple[Any, tuple[Any, ...]]]) -> None:
    settings, (body, norms, head, matmul, head_matmul, loss) = EXPECTED[name]
    if matmul is FP8:
        pytest.importorskip("torchao")
    regime = enter_regime(Precision.model_validate(settings), CPU)
    model, batch = build(regime)
    parameters = dict(model.named_parameters())
    head_name = next(n for n in ("lm_head.weight", "head.weight", "wte.weight") if n in parameters)
    for key, parameter in parameters.items():
        is_norm = "ln_" in key
        is_head = key.removesuffix("bias").removesuffix("weight") == head_name.removesuffix("weight")
        assert parameter.dtype is (norms if is_norm else head if is_head else body), key
    outputs: dict[str, torch.dtype] = {}
    for key, module in model.named_modules():
        module.register_forward_hook(
            lambda _, __, out, key=key: outputs.__setitem__(key, out.dtype) if torch.is_tensor(out) else None
        )
    factor = torch.tensor(1 / 32)
    with Matmuls() as seen:
        with regime.context(CPU):
            result = model(*batch, factor)
        assert isinstance(result, HeadLoss)
        result.train.backward()
    assert seen.head == {head_matmul}
    if matmul is FP8:  # attention stays bf16
        gradients = torch.float8_e5m2 if regime.float8 == "tensorwise" else FP8
        assert {FP8, gradients} <= seen.body <= {FP8, gradients, BF16, F32}
        assert outputs["h.0.mlp.c_fc"] is BF16
    else:
        assert seen.body - {F32 if regime.autocast else matmul} <= {matmul} and matmul in seen.body
        assert outputs["h.0.mlp.c_fc"] is matmul and outputs["h.0.attn.c_attn"] is matmul
    assert result.train.dtype is loss
    assert result.value.dtype is F32 and result.largest_logit.dtype is F32
    assert all(p.grad is not None and p.grad.dtype is p.dtype for p in parameters.values())
    with torch.no_grad(), regime.context(CPU):
        assert model(*batch[:1] if build is gpt else batch[:2]).dtype is head_matmul


@pytest.mark.parametrize("build", [gpt, encoder], ids=["gpt", "encoder"])
def test_between_float32_weights_everything_is_bf16(build: Callable[[Regime], tuple[Any, tuple[Any, ...]]]) -> None:
    """bf16_master: the residual stream and its gradient, which autocast leaves in float32."""
    found = {}
    for name in ("amp_bf16", "bf16_master"):
        regime = enter_regime(Precision(regime=name), CPU)
        model, batch = build(regime)
        stream: list[torch.dtype] = []
        for block in model.h:
            block.register_forward_hook(lambda _, __, out, s=stream: s.append(out.dtype))
            block.register_full_backward_hook(lambda _, __, grads, s=stream: s.append(grads[0].dtype))
        with regime.context(CPU):
            result = model(*batch, torch.tensor(1 / 32))
        result.train.backward()
        found[name] = result.value.item(), set(stream)
    assert found["amp_bf16"][1] == {F32} and found["bf16_master"][1] == {BF16}
    assert found["bf16_master"][0] == pytest.approx(found["amp_bf16"][0], rel=2e-3)


@pytest.mark.parametrize(
    ("name", "optim", "expected"),
    [
        ("fp32", {}, 8.0),
        ("amp_bf16", {}, 8.0),
        ("bf16_pure", {}, 4.0),
        ("fp16_pure", {}, 4.0),
        ("bf16_pure", {"rounding": "stochastic"}, 4.0),
        ("bf16_pure", {"rounding": "kahan"}, 6.0),
        ("amp_bf16", {"name": "adamw_8bit"}, 2.1),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bytes_of_the_moments(name: str, optim: dict[str, Any], expected: float) -> None:
    if optim.get("name") == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    regime = make_regime(Precision.model_validate({"regime": name}))
    shape = {**SHAPE, "n_embd": 128, "vocab_size": 512}  # matrices of more than 4,096 numbers
    model = build_model(Model(**shape), on_meta=lambda m: apply_regime(m, regime))
    optimizer = make_optimizer(model, Optim(**optim))
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e-3)
    optimizer.step()
    measured = describe(optimizer)["bytes_per_parameter"]
    assert measured == pytest.approx(expected, rel=0.06)


def test_one_fp32_head_without_tf32_and_one_with() -> None:
    assert make_regime(Precision(regime="amp_bf16")).tf32
    assert not make_regime(Precision(regime="amp_bf16", head="fp32")).tf32  # its matmul would lose 13 bits in TF32
    enter_regime(Precision(regime="amp_bf16", head="fp32"), CPU)
    assert torch.get_float32_matmul_precision() == "highest"


def test_what_a_cpu_cannot_do_is_said() -> None:
    with pytest.raises(NotApplicable, match=r"TF32 needs an NVIDIA GPU of compute capability 8\.0 or higher, not cpu"):
        enter_regime(Precision(regime="tf32"), CPU)


def test_a_gpu_without_float8_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(NotApplicable, match=r"capability 8\.9"):
        enter_regime(Precision(regime="fp8_tensorwise"), torch.device("cuda"))


def through(linear: nn.Linear, x: Tensor, upstream: Tensor, regime: Regime | None) -> tuple[Tensor, Tensor, Tensor]:
    """Output, input gradient and weight gradient of a linear layer, in a regime or without one."""
    model, weight = nn.Module(), linear.weight.detach().clone().requires_grad_()
    model.h = nn.ModuleList([nn.Linear(linear.in_features, linear.out_features, bias=False)])
    model.h[0].weight = nn.Parameter(weight)
    if regime is not None:
        apply_regime(model, regime)
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", BF16):
        out = model.h[0](x)
    out.backward(upstream)
    assert x.grad is not None and model.h[0].weight.grad is not None
    return out.detach().float(), x.grad, model.h[0].weight.grad


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_emulated_float8_is_torchs(recipe: str) -> None:
    """torchao's float8 product and the emulation multiply the same float8 numbers and differ by rounding only.

    The bound is for a sum of n products. Dividing the operands by their scales, multiplying and adding makes at most
    n + 3 float32 roundings, each at most 2^-24 of the sum of the products' magnitudes. Rounding to float8 at most
    doubles a number (half of the smallest subnormal number rounds up), so these magnitudes are at most 4 |a| |b|.
    Finally both sides round to bf16, by at most 2^-9 of the result.
    """
    pytest.importorskip("torchao")
    emulated = enter_regime(Precision.model_validate({"regime": f"fp8_{recipe}"}), CPU)
    real = make_regime(Precision.model_validate({"regime": f"fp8_{recipe}"}))
    assert emulated.emulated and not real.emulated
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(48, 32, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(32, 48, generator=generator) / 7)
    x = torch.randn(2, 8, 48, generator=generator) * torch.logspace(-3, 1, 48)
    upstream = (torch.randn(2, 8, 32, generator=generator) * 1e-3).to(BF16)
    try:
        reference = through(linear, x, upstream, real)
    except RuntimeError as error:  # oneDNN with a limit below the processor's instructions
        pytest.skip(f"torch._scaled_mm does not run here: {error}")
    got, plain = through(linear, x, upstream, emulated), through(linear, x, upstream, None)
    a, w, g = (
        x.abs().double().flatten(0, 1),
        linear.weight.detach().abs().double(),
        upstream.abs().double().flatten(0, 1),
    )
    magnitudes = (a @ w.T).view(2, 8, 32), (g @ w).view(2, 8, 48), g.T @ a
    for ours, theirs, rounded_not, sums, n in zip(got, reference, plain, magnitudes, (48, 32, 16), strict=True):
        bound = 2 * (n + 3) * 2**-24 * 4 * sums + 2**-8 * 1.01 * torch.maximum(ours.abs(), theirs.abs())
        assert ((ours.double() - theirs.double()).abs() <= bound).all()
        assert ((rounded_not.double() - theirs.double()).abs() > bound).any()  # the bound tells float8 from bf16


LIMITED = """
import torch
from gptlab.config import Model, Precision
from gptlab.model.gpt import build_model
from gptlab.precision.regimes import apply_regime, enter_regime
for name in ("fp8_tensorwise", "fp8_rowwise"):
    regime = enter_regime(Precision.model_validate({"regime": name}), torch.device("cpu"))
    config = Model(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=48)
    model = build_model(config, on_meta=lambda m: apply_regime(m, regime))
    tokens = torch.arange(32).view(2, 16)
    with regime.context(torch.device("cpu")):
        loss = model(tokens, tokens, None, torch.tensor(1 / 32)).train
    loss.backward()
    print(f"{loss.item():.3f}")
"""


@pytest.mark.slow
def test_float8_is_emulated_on_any_processor() -> None:
    """The losses are the same with the instructions of older processors. The variables affect x86 only."""
    pytest.importorskip("torchao")
    seen = set()
    for aten, onednn in (("", ""), ("", "SSE41"), ("", "AVX2"), ("avx2", "AVX2"), ("default", "SSE41")):
        limits = {"ATEN_CPU_CAPABILITY": aten, "ONEDNN_MAX_CPU_ISA": onednn}
        environment = {**os.environ, **{key: value for key, value in limits.items() if value}}
        done = subprocess.run([sys.executable, "-c", LIMITED], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stderr == "", "an optional library's load warnings reach the terminal"
        seen.add(done.stdout)
    losses = [[float(loss) for loss in out.split()] for out in seen]
    assert all(loss == pytest.approx(losses[0], rel=0.01) and len(loss) == 2 for loss in losses)


def test_initial_weights_are_the_same_numbers_in_every_regime() -> None:
    """A float32 head is not rounded to the bf16 of the blocks first."""
    plain = build_model(Model(**SHAPE), init=3)
    regime = make_regime(Precision(regime="bf16_pure", head="fp32"))
    mixed = build_model(Model(**SHAPE), init=3, on_meta=lambda m: apply_regime(m, regime))
    assert torch.equal(plain.wte.weight, mixed.wte.weight)
    assert torch.equal(plain.h[0].mlp.c_fc.weight.bfloat16(), mixed.h[0].mlp.c_fc.weight)
