"""The kernel of the head's loss, by Triton's interpreter on a CPU and by its compiler for a GPU that is not here."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from planned import allocated
from torch import Tensor

from gptlab.config import Model
from gptlab.model import loss, matmul
from gptlab.model.gpt import build_model

triton = pytest.importorskip("triton", reason="Triton is not installed: pip install triton, as constraints.txt has it")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # which Triton reads when it is imported
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own, with Triton's interpreter")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EPS = {FP32: 2**-20, BF16: 2**-7, FP16: 2**-10}  # the interpreter truncates to bfloat16
CASES = [(dtype, size, scale) for dtype in EPS for size in (1, 65, 4096, 4097, 50304) for scale in (1.0, 1e4)]
QUICK = [(BF16, 65, 1e4), (BF16, 4097, 1.0), (FP16, 65, 1.0), (FP32, 65, 1e4)]


@pytest.mark.skipif(INTERPRETED, reason="starts this file")
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=[pytest.mark.slow, pytest.mark.compiles])])
def test_the_kernel_by_the_interpreter(which: str) -> None:
    pytests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", which, "-k", "not by_the", __file__]
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *pytests], env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.skipif(INTERPRETED, reason="the compiler's")
def test_the_kernel_by_the_compiler_for_an_h100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It loads 16 bytes at a time, and has no float64, which a Python number in the wrong place brings."""
    from triton.backends.compiler import GPUTarget

    from gptlab.model import head_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"logits": "*bf16", "targets": "*i64", "factor": "*fp32", "losses": "*fp32", "largest": "*fp32"}
    constants = {"V": 50304, "BLOCK": head_kernel.BLOCK, "GRADIENT": True}
    source = triton.compiler.ASTSource(
        head_kernel.cross_entropy_row,
        types | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(0,): [["tt.divisibility", 16]]},
    )
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["ptx"]
    assert ".f64" not in ptx
    assert "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx


# -- by the interpreter ---------------------------------------------------------------------------------------------


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Turns the kernel on or off for tensors on the CPU."""
    return lambda on: monkeypatch.setattr(loss, "KERNEL_DEVICES", ("cpu",) if on else ())


def exact(logits: Tensor, targets: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Loss of each row and gradient of the summed losses times `factor`, float64."""
    wide = logits.double().requires_grad_()
    losses = F.cross_entropy(wide, targets, ignore_index=-1, reduction="none")
    [grad] = torch.autograd.grad(losses.sum() * factor, wide)
    return losses.detach(), grad


@interpreted
@pytest.mark.parametrize(
    ("dtype", "vocab_size", "scale"),
    [pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.slow]) for case in CASES],
    ids=str,
)
def test_loss_largest_logit_and_gradient_are_float64s(
    dtype: torch.dtype, vocab_size: int, scale: float, on_cpu: Callable[[bool], None]
) -> None:
    on_cpu(True)
    draw = torch.Generator().manual_seed(vocab_size)
    logits = (torch.randn(5, vocab_size, generator=draw) * scale).clamp(-6e4, 6e4).to(dtype)
    targets = torch.randint(vocab_size, (5,), generator=draw)
    targets[2], targets[3], targets[4] = -1, logits[3].argmax(), vocab_size - 1
    factor = torch.tensor(0.37)
    losses, grad = exact(logits, targets, float(factor))
    given = logits.clone()
    found, largest = loss.cross_entropy_(given, targets, factor, False)
    assert torch.equal(given, logits)  # unless the gradient is asked for
    torch.testing.assert_close(found.double(), losses, rtol=3e-7, atol=3e-7)
    assert torch.equal(largest, logits.float().abs().amax(1))
    again, _ = loss.cross_entropy_(given, targets, factor, True)
    assert torch.equal(again, found) and not given[2].any() and found[2] == 0
    smallest = 2**-24 if dtype is FP16 else 1e-9  # one rounding, of the result
    torch.testing.assert_close(given.double(), grad, rtol=EPS[dtype], atol=smallest)


@interpreted
def test_a_target_beyond_the_vocabulary_and_logits_that_are_not_finite_have_no_loss(
    on_cpu: Callable[[bool], None],
) -> None:
    on_cpu(True)
    logits = torch.randn(3, 70)
    logits[1, 7] = float("nan")
    losses, _ = loss.cross_entropy_(logits, torch.tensor([70, 1, 2]), torch.tensor(1.0), True)
    assert losses.isnan().tolist() == [True, True, False]


def head(N: int, C: int, vocab_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(N, C, generator=draw).to(dtype).requires_grad_()
    weight = (torch.randn(vocab_size, C, generator=draw) * 0.3).requires_grad_()
    targets = torch.randint(vocab_size, (N,), generator=draw)
    targets[::5] = -1
    return x, weight, targets


@interpreted
@pytest.mark.parametrize("dtype, tokens_in_chunk", [(BF16, 1000), (BF16, 4), (FP16, 4), (FP32, 4)], ids=str)
def test_the_head_is_the_same_with_the_kernel(
    dtype: torch.dtype, tokens_in_chunk: int, on_cpu: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "KERNEL_BYTES", 65 * dtype.itemsize * tokens_in_chunk)
    x, weight, targets = head(11, 16, 65, dtype)
    found = {}
    for on in (False, True):
        on_cpu(on)
        out = loss.linear_cross_entropy(x, weight, targets, torch.tensor(8.0))
        with torch.no_grad():
            evaluated = loss.linear_cross_entropy(x, weight, targets, torch.tensor(8.0))
        assert torch.equal(evaluated.train, out.train) and evaluated.largest_logit == out.largest_logit
        found[on] = [out, *torch.autograd.grad(out.train / 3, (x, weight))]
    plain, ours = found[False], found[True]
    torch.testing.assert_close(ours[0].value, plain[0].value)
    torch.testing.assert_close(ours[0].train, plain[0].train)
    assert ours[0].largest_logit == plain[0].largest_logit and ours[0].largest_logit.dtype == torch.float32
    for left, right in zip(ours[1:], plain[1:], strict=True):
        assert left.dtype == right.dtype and not ours[1][::5].any()
        assert (left - right).float().norm() <= EPS[dtype] * right.float().norm()


@interpreted
@pytest.mark.parametrize("tokens_in_chunk", [1000, 16])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_the_head_takes_the_memory_that_is_planned(
    dtype: torch.dtype, tokens_in_chunk: int, on_cpu: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    N, C, V = 64, 32, 3000
    monkeypatch.setattr(loss, "KERNEL_BYTES", V * dtype.itemsize * tokens_in_chunk)
    on_cpu(True)
    rows = torch.zeros(min(N, tokens_in_chunk))
    monkeypatch.setattr(loss, "cross_entropy_", lambda *given: (rows, rows))  # the interpreter keeps what it was given
    x, weight, targets = head(N, C, V, FP32)
    with matmul.mkl():  # oneDNN lays matrices out anew
        most, _, _ = allocated(lambda: loss.linear_cross_entropy(x, weight, targets, dtype=dtype))
    planned = loss.head_bytes(N, weight, FP32, dtype, FP32, "cpu")
    copied = 0 if dtype is FP32 else weight.nbytes  # a CPU adds bfloat16 to float32 by way of a copy
    assert most + x.nbytes == pytest.approx(planned + copied, rel=0.02)
    on_cpu(False)
    assert loss.head_bytes(N, weight, FP32, dtype, FP32, "cpu") > planned  # float32 copies


@interpreted
def test_a_loss_that_the_kernel_does_not_know_takes_the_plain_path(
    on_cpu: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """precision.loss = bf16, fp16_pure, and float64."""

    def refuse(*given: Any) -> None:
        raise AssertionError("the kernel was asked")

    on_cpu(True)
    monkeypatch.setattr(loss, "cross_entropy_", refuse)
    for dtype, loss_dtype in ((BF16, BF16), (FP16, FP16), (torch.float64, None)):
        x, weight, targets = head(8, 16, 65, dtype)
        loss.linear_cross_entropy(x, weight, targets, loss_dtype=loss_dtype).train.backward()
    x, weight, targets = head(8, 16, 65, BF16)
    with pytest.raises(AssertionError, match="was asked"):
        loss.linear_cross_entropy(x, weight, targets)


SHAPE = Model(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=300)


def step(model: torch.nn.Module, call: Any) -> list[Tensor]:
    tokens = torch.randint(300, (4, 16), generator=torch.Generator().manual_seed(0))
    targets = tokens.roll(-1, 1)
    targets[:, -1] = -1
    out = call(tokens, targets, None, torch.tensor(1 / 60))
    out.train.backward()
    return [out.value, out.largest_logit, *(p.grad for p in model.parameters() if p.grad is not None)]


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.compiles])])
def test_a_model_with_the_kernel_is_one_graph(backend: str, on_cpu: Callable[[bool], None]) -> None:
    on_cpu(True)
    torch.compiler.reset()
    eager, compiled = build_model(SHAPE), build_model(SHAPE)
    eager.stream_dtype = compiled.stream_dtype = BF16
    plain = step(eager, eager)
    called = torch.compile(compiled, backend=backend, fullgraph=True, dynamic=False)
    for ours, theirs in zip(step(compiled, called), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-4)


@interpreted
@pytest.mark.slow
@pytest.mark.compiles
def test_inductor_does_not_copy_the_logits(on_cpu: Callable[[bool], None]) -> None:
    """The operation works on the buffer that the matmul wrote."""
    import re

    from torch._inductor.utils import run_and_get_code

    on_cpu(True)
    torch.compiler.reset()
    model = build_model(SHAPE)
    model.stream_dtype = BF16
    _, code = run_and_get_code(step, model, torch.compile(model, fullgraph=True, dynamic=False))
    text = "\n".join(code)
    [given] = re.findall(r"ops\.gptlab\.cross_entropy_\.default\((\w+),", text)
    assert re.search(rf"extern_kernels\.mm\([^\n]*out={given}\)", text)
