"""Every optimizer on the rows that FSDP leaves a process, against one process that has all of them.

Gradients are drawn whole and each process takes its rows, so what is compared is the optimizers alone. All cases go
through one start of processes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from processes import together
from torch import Tensor, nn

from gptlab.config import Model, Optim
from gptlab.distributed.shard import LocalShards, ShardSpec, Weights, global_shape, local_rows, shard_spec
from gptlab.distributed.world import World, process_group
from gptlab.distributed.wrap import shard
from gptlab.model.gpt import build_model
from gptlab.optim.optimizers import _refuse_other_blocks, describe, make_optimizer, parameter_groups, set_lr
from gptlab.optim.rounding import LostUpdates
from gptlab.precision.regimes import NotApplicable
from gptlab.seeding import address

pytestmark = pytest.mark.xdist_group("parallel_optim")  # they share processes that take seconds to start

# of 4 processes one has no rows of a norm's 6, of c_proj's and of the 5 positions; c_attn is cut inside q, k and v
SHAPE = Model(n_layer=1, n_head=2, n_embd=6, block_size=5, vocab_size=11, tied=False)
NARROW = {"parametrization": "mup", "base_width": 2}
LARGE = Model(n_layer=1, n_head=2, n_embd=128, block_size=8, vocab_size=96, bias=False)  # for blocks of 256
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
SPAM: dict[str, Any] = {"name": "adamw-spam", "spam_interval": 6, "lr": 0.01, "grad_clip": 3.0}
CASES: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "adamw": ({}, FP64),
    "adamw foreach": ({"kernel": "foreach"}, FP64),
    "adamw amsgrad": ({"amsgrad": True}, FP64),
    "adamw bf16": ({"lr": 1e-4}, BF16),
    "adamw stochastic": ({"rounding": "stochastic"}, BF16),
    "adamw kahan": ({"rounding": "kahan"}, BF16),
    "adamw_8bit": ({"name": "adamw_8bit"}, FP32),
    "adamw-spam seed": ({**SPAM, "spam_form": "seed"}, FP64),
    "adamw-spam paper": ({**SPAM, "spam_form": "paper", "spam_theta": 2.0, "spam_interval": 40}, FP64),
    "adamw-spam sparse": ({**SPAM, "spam_form": "paper", "spam_density": 0.3}, FP64),
    "adamw-spam stable": ({**SPAM, "spam_form": "stable"}, FP64),
    "adamw-prune": ({"name": "adamw-prune"}, FP64),
    "muon": ({"name": "muon", "muon_lr": 0.05}, FP64),
    "sgd": ({"name": "sgd"}, FP64),
    "adamw cautious": ({"cautious_decay": True}, FP64),
    "lion": ({"name": "lion", "cautious_decay": True}, FP64),
    "ademamix": ({"name": "ademamix", "ademamix_warmup": 20}, FP64),
    "normuon": ({"name": "normuon", "muon_lr": 0.05}, FP64),
    "adamw-schedule-free": ({"name": "adamw-schedule-free"}, FP64),
    "muon ema": ({"name": "muon"}, FP64),
    "adamw mup": ({}, FP64),
    "muon mup": ({"name": "muon", "muon_lr": 0.05}, FP64),
}
EXACT = ("adamw bf16", "adamw stochastic", "adamw kahan", "adamw_8bit")  # rounding would make more of a difference


def sharded(shape: Model, dtype: torch.dtype, world: World) -> LocalShards:
    model = build_model(shape, "cpu", dtype, 3)
    shard(model, world, 0, torch.device("cpu"), None)
    return LocalShards(model)


def gradient(p: Tensor, step: int, i: int) -> Tensor:
    """Of the rows here."""
    return (local_rows(drawn(global_shape(p), step, i), p) + 0.01 * p.detach().double()).to(p.dtype)


@functools.cache
def drawn(shape: torch.Size, step: int, i: int) -> Tensor:
    """Every seventh number is a spike at steps 5 and 15, and all are at step 12."""
    draw = torch.Generator().manual_seed(address(step, i))
    whole = torch.randn(shape, generator=draw, dtype=FP64) * 0.1
    if step in (5, 15):
        whole.view(-1)[::7] *= 100
    return whole * 30 if step == 12 else whole


def plain(t: Tensor) -> np.ndarray:
    return (t.float() if t.dtype is BF16 else t).detach().numpy()


def run(weights: Weights, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What 16 steps make of weights and state, whole tensors of them, and what is told on the way."""
    lost, shares = LostUpdates(weights, sample=10**9), []  # of all numbers: one sample on any process
    for step in range(16):
        set_lr(optimizer, 0.01 / (1 + 0.1 * step))
        for i, p in enumerate(weights.parameters()):
            p.grad = gradient(p, step, i)
        lost.before()
        optimizer.step()
        shares.append(float(lost.after()))
    found: dict[str, Any] = {"lost": np.array(shares), "told": describe(optimizer)}
    for name, p in weights.named_parameters():
        kept = {kind: t for kind, t in optimizer.state[p].items() if isinstance(t, Tensor)}
        for kind, t in {"weight": p.detach(), **kept}.items():
            if type(t) is Tensor and t.shape == p.shape:
                spread = shard_spec(p)
                found[f"{kind}/{name}"] = plain(t if spread is None else spread.all_gather(t))
    shared = optimizer.state.get("spam", {})  # type: ignore[call-overload]
    return {**found, **{f"spam.{kind}": torch.as_tensor(value).numpy() for kind, value in shared.items()}}


def optimizer_of(weights: Weights, name: str) -> torch.optim.Optimizer:
    if name == "torchao":
        from torchao.optim import AdamW8bit

        _refuse_other_blocks(weights, whole_blocks=True)
        return AdamW8bit(parameter_groups(weights, 0.1), lr=0.01)
    ema = 0.9 if name.endswith("ema") else 0.0
    return make_optimizer(weights, Optim(**CASES[name][0]), 4, ema, shape_of(name))


def shape_of(name: str) -> Model:
    shape = LARGE if name in ("adamw_8bit", "torchao") else SHAPE
    return shape.model_copy(update=NARROW if name.endswith("mup") else {})


def of_shards(names: list[str]) -> dict[str, Any]:
    """In each process."""
    found = {}
    with process_group("fsdp", torch.device("cpu")) as world:
        for name in names:
            weights = sharded(shape_of(name), CASES.get(name, ({}, FP32))[1], world)
            found[name] = run(weights, optimizer_of(weights, name))
            found[name]["empty"] = [key for key, p in weights.named_parameters() if not len(p)]
    return found


def of_one(name: str) -> dict[str, Any]:
    weights = build_model(shape_of(name), "cpu", CASES.get(name, ({}, FP32))[1], 3)
    return run(weights, optimizer_of(weights, name))


def assert_equal(one: dict[str, Any], several: list[dict[str, Any]], exact: bool) -> None:
    for found in several:
        assert found.keys() - {"empty"} == one.keys()
        for key, value in one.items():
            if key != "told":
                tolerance = 0 if exact else 1e-10
                np.testing.assert_allclose(found[key], value, rtol=tolerance, atol=tolerance, err_msg=key)
                np.testing.assert_array_equal(found[key], several[0][key], err_msg=f"{key} on all processes")
        assert found["told"].get("muon_share") == one["told"].get("muon_share")
        if found["told"]["bytes_per_parameter"]:
            assert found["told"]["bytes_per_parameter"] == pytest.approx(one["told"]["bytes_per_parameter"], rel=0.4)


@pytest.fixture(scope="session")
def two() -> Iterator[list[dict[str, Any]]]:
    pytest.importorskip("bitsandbytes")
    yield together(2, of_shards, list(CASES))


@pytest.fixture(scope="session")
def four() -> Iterator[list[dict[str, Any]]]:
    names = [name for name in CASES if name != "adamw_8bit"]  # it refuses these shapes
    yield together(4, of_shards, names, seconds=500)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_do_what_one_does(name: str, two: list[dict[str, Any]]) -> None:
    one = of_one(name)
    assert_equal(one, [found[name] for found in two], name in EXACT)
    if name == "adamw bf16":
        assert one["lost"].max() > 0.05
    if name == "adamw_8bit":
        assert one["state1/h.0.mlp.c_fc.weight"].dtype == np.uint8
    if "spam" in name and name.endswith("seed"):
        assert one["spam.events"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name != "adamw_8bit"])
def test_four_processes_of_which_one_has_no_rows(name: str, four: list[dict[str, Any]]) -> None:
    assert_equal(of_one(name), [found[name] for found in four], name in EXACT)
    assert {"ln_f.weight", "h.0.attn.c_proj.weight", "wpe.weight"} <= {*four[3][name]["empty"]}
    assert not four[0][name]["empty"]


@pytest.mark.slow
@pytest.mark.compiles
def test_torchaos_8_bits() -> None:
    pytest.importorskip("torchao")
    found = together(2, of_shards, ["torchao"], seconds=500)
    assert_equal(of_one("torchao"), [f["torchao"] for f in found], exact=True)


# -- what is refused


class Group:
    """Of n processes."""

    def __init__(self, n: int) -> None:
        self.n = n

    def size(self) -> int:
        return self.n


class Cut(nn.Module):
    """A tensor as it is spread over n processes; which rows are here does not matter."""

    def __init__(self, shape: tuple[int, ...], n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, *shape[1:]))
        self.weight.shard = ShardSpec(torch.Size(shape), 0, Group(n), True)  # type: ignore[assignment]


@pytest.mark.parametrize(
    "shape, n, bitsandbytes, torchao",
    [
        ((1024, 768), 8, True, True),
        ((50257, 768), 8, True, True),  # the last process has fewer rows
        ((3072,), 8, True, True),  # kept in full, whole or cut
        ((4096,), 2, False, False),  # in 8 bits, and halves would be kept in full
        ((4097,), 2, False, True),  # torchao keeps it in full as well
        ((128, 128), 4, True, True),  # 16,384, and so is a quarter
        ((128, 128), 5, False, False),
        ((100, 96), 2, False, True),  # 50 rows end inside a block; torchao keeps 9,600 in full
        ((100, 256), 8, False, False),  # 13 rows are too few
        ((100, 96), 1, True, True),
        ((9, 4096), 4, False, False),  # the last has no rows
        ((33, 200), 1, True, True),
    ],
)
def test_8_bits_where_blocks_would_be_others(shape: tuple[int, ...], n: int, bitsandbytes: bool, torchao: bool) -> None:
    for whole_blocks, fine in ((False, bitsandbytes), (True, torchao)):
        if fine:
            _refuse_other_blocks(Cut(shape, n), whole_blocks)
        else:
            with pytest.raises(
                NotApplicable, match=r"adamw_8bit.* fsdp would split weight inside .*\([\d,]+ values, .*ddp"
            ):
                _refuse_other_blocks(Cut(shape, n), whole_blocks)


def test_soap_wants_whole_matrices() -> None:
    for name in ("soap", "soap-muon"):
        with pytest.raises(NotApplicable, match=f"optim.name = {name}: .* pass --distributed.strategy ddp"):
            make_optimizer(Cut((64, 64), 2), Optim(name=name))
    make_optimizer(Cut((64, 64), 1), Optim(name="soap"))


def test_make_optimizer_asks() -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(NotApplicable, match="split weight inside such a block .4,096 values, 2,048 per process"):
        make_optimizer(Cut((64, 64), 2), Optim(name="adamw_8bit"))
