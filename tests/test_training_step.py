"""What a step need not do: wait for a device between logged steps, pass over gradients twice, map memory anew."""

from __future__ import annotations

import math
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_recipe
from test_training_optimizers import PRUNED, SPAM
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gptlab.model import matmul
from gptlab.optim.adamw import PlainAdamW
from gptlab.training.job import open_job
from gptlab.training.loop import train, update
from gptlab.training.step_buffer import clip_gradients
from gptlab.training.trainer import Trainer

ON_THE_CPU = ("step", "largest_lr", "weight_sum")  # state that is there on purpose, so that no GPU is waited for


class Reads(TorchDispatchMode):
    """Counts what a GPU would be waited for: numbers read from a device, and sizes that depend on values."""

    def __init__(self, allowed: set[int]) -> None:
        super().__init__()
        self.allowed, self.names = allowed, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        waits = name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")
        if waits and args[0].data_ptr() not in self.allowed:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


ARMS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adamw foreach": {"optim__kernel": "foreach"},
    "cautious": {"optim__cautious_decay": True},
    "spam seed": SPAM,
    "spam stable": {**SPAM, "optim__spam_form": "stable", "optim__grad_clip": 0.0},
    "sgd": {"optim__name": "sgd"},
    "lion": {"optim__name": "lion"},
    "ademamix": {"optim__name": "ademamix"},
    "muon": {"optim__name": "muon"},
    "normuon": {"optim__name": "normuon"},
    "schedule-free": {"optim__name": "adamw-schedule-free", "schedule__shape": "constant"},
    "soap": {"optim__name": "soap"},
    "ema": {"train__ema": 0.8},
    "pruned": {**PRUNED, "sparsity__method": "magnitude", "sparsity__every": 100},
    "bf16 weights": {"precision__regime": "bf16_pure", "optim__rounding": "stochastic"},
}


@pytest.mark.parametrize("arm", ARMS)
def test_nothing_is_read_from_the_device_between_logged_steps(arm: str, dataset: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(dataset, **ARMS[arm], model__dropout=0.0, log__every=100, batch__tokens_per_step=128)
    with open_job(recipe, tmp_path, "never", quiet=True) as job, Trainer(job) as t:
        for step in range(3):  # the first one makes the state
            kept = [s[name] for s in t.optimizer.state.values() for name in ON_THE_CPU if name in s]
            reads = Reads({state.data_ptr() for state in kept})
            with reads:
                t.monitor.observe(update(t, step))
            t.state.next()
        assert not t.logs_at(t.state.step) and reads.names == []


def test_a_read_is_counted() -> None:
    with Reads(set()) as reads:
        torch.ones(()).item()
        torch.ones(3).nonzero()
    assert reads.names == ["_local_scalar_dense", "nonzero"]


def stepped(folded: bool, max_norm: float, scale: float) -> tuple[list[Tensor], Tensor]:
    """Weights after four steps, and the norms of the last."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 7))
    optimizer = PlainAdamW(model.parameters(), lr=1e-2, fused=True)
    norms = torch.zeros(())
    for _ in range(4):
        (scale * model(torch.randn(16, 40)).square().sum()).backward()
        norms = clip_gradients(model, max_norm, optimizer if folded else None)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()], norms


def test_the_fused_kernel_clips_as_a_pass_of_its_own() -> None:
    (apart, norms), (folded, same) = stepped(False, 0.5, 1.0), stepped(True, 0.5, 1.0)
    assert float(norms[0]) > 0.5  # it is clipped
    for a, b in zip(apart, folded, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(norms, same)
    (never, _), _ = stepped(False, math.inf, 1.0), None
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(never, folded, strict=True))
    (apart, _), (folded, _) = stepped(False, 1e6, 1.0), stepped(True, 1e6, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(apart, folded, strict=True))  # nothing to clip: the same bits
    (broken, _) = stepped(True, 0.5, math.nan)
    assert all(p.isnan().all() for p in broken)  # as with clip_grad_norm_


def test_a_run_clips_in_the_kernel(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is clipped; a run whose gradients are multiplied in a pass of their own has the same losses."""
    recipe = tiny_recipe(dataset, optim__grad_clip=0.05, train__max_steps=8)
    folded = train(recipe, tmp_path / "folded", quiet=True)
    monkeypatch.setattr("gptlab.training.loop.clip_gradients", lambda model, norm, _: clip_gradients(model, norm))
    apart = train(recipe, tmp_path / "apart", quiet=True)
    assert folded.final_val_loss == pytest.approx(apart.final_val_loss, abs=1e-5)
    unclipped = train(recipe.replace({"optim.grad_clip": 0.0}), tmp_path / "unclipped", quiet=True)
    assert abs(unclipped.final_val_loss - apart.final_val_loss) > 1e-4  # type: ignore[operator]


@pytest.mark.parametrize("by_onednn", [True, False])
def test_batched_products(by_onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "ONEDNN", by_onednn and torch.backends.mkldnn.is_available())
    monkeypatch.setattr(matmul, "SMALLEST", 1)
    draw = torch.Generator().manual_seed(1)
    a, b, c = (torch.randn(3, m, n, generator=draw) for m, n in ((20, 33), (33, 17), (20, 17)))
    exact = a.double() @ b.double()
    torch.testing.assert_close(matmul.batch_product(a, b).double(), exact, rtol=1e-5, atol=1e-5)
    exact = -4.5 * c.double() + 2.0 * exact
    torch.testing.assert_close(matmul.batch_sum(-4.5, c, 2.0, a, b).double(), exact, rtol=1e-5, atol=1e-5)
    total, low = torch.ones(20, 17), [x[0].bfloat16() for x in (a, b)]
    matmul.add_product(total, *low)
    exact = 1 + low[0].double() @ low[1].double()
    torch.testing.assert_close(total.double(), exact, rtol=2e-2, atol=2e-2)


KEPT = """
import resource
import numpy as np
from gptlab.machine import kept_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.full(1 << 23, 1.0)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
with kept_memory():
    print(*[faults() for _ in range(30)][27:])  # an aligned block may not fit where the first ones were
print(int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize())  # resident
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_freed_memory_is_used_again() -> None:
    clean = {"PATH": "/usr/bin", "PYTHONPATH": ":".join(sys.path)}
    run = subprocess.run([sys.executable, "-c", KEPT], env=clean, capture_output=True, text=True, check=True)
    faults, resident = run.stdout.splitlines()
    assert all(int(n) < 100 for n in faults.split())  # each page of 64 MiB would be one
    kept = clean | {"MALLOC_MMAP_MAX_": "65536"}  # a user's setting is left alone
    run = subprocess.run([sys.executable, "-c", KEPT], env=kept, capture_output=True, text=True, check=True)
    assert all(int(n) > 10 for n in run.stdout.splitlines()[0].split())
    assert int(resident) < int(run.stdout.splitlines()[1]) + (32 << 20)  # at the end it is given back
