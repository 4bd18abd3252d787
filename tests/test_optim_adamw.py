"""AdamW with every rounding and number of bits: against PyTorch's, closed forms, and itself after a resume."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gptlab.config import Optim, build_recipe
from gptlab.errors import ConfigError, RunError
from gptlab.interop.files import write_safetensors
from gptlab.optim.adamw import AdamW
from gptlab.optim.optimizers import describe, make_optimizer, parameter_groups, set_lr
from gptlab.optim.rounding import LostUpdates, round_stochastically
from gptlab.precision.regimes import NotApplicable
from gptlab.rundir import RunDir
from gptlab.seeding import address
from gptlab.training.checkpoint import Checkpoints
from gptlab.training.tensors import Saved, load_optimizer, optimizer_tensors

BF16 = torch.bfloat16


class Parameters(nn.Module):
    """A model that is nothing but its parameters."""

    def __init__(self, *tensors: Tensor) -> None:
        super().__init__()
        self.list = nn.ParameterList(tensors)


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def give_gradients(model: nn.Module, step: int, scale: float = 1.0) -> None:
    for i, p in enumerate(model.parameters()):
        p.grad = (drawn(*p.shape, seed=address("gradient", step, i)) * scale).to(p.dtype)


# -- against PyTorch's


def test_float64_is_adamw_exactly() -> None:
    ours, theirs = (Parameters(drawn(9, 7, seed=1, dtype=torch.float64), torch.ones(5).double()) for _ in range(2))
    kwargs = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-6}
    a = AdamW(parameter_groups(ours, 0.3), **kwargs)
    b = torch.optim.AdamW(parameter_groups(theirs, 0.3), foreach=False, **kwargs)
    for step in range(50):
        for optimizer, model in ((a, ours), (b, theirs)):
            set_lr(optimizer, 0.01 / (1 + step))
            give_gradients(model, step)
            optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-12, atol=1e-12)
        assert torch.equal(a.state[p]["step"], b.state[q]["step"])
        for kind in ("exp_avg", "exp_avg_sq"):
            assert torch.allclose(a.state[p][kind], b.state[q][kind], rtol=1e-12, atol=0)


def test_to_nearest_it_is_the_fused_kernel() -> None:
    """The arms with other roundings differ from the one that PyTorch trains in the rounding alone."""
    ours, theirs = (Parameters((drawn(300, 40, seed=1) * 0.02).to(BF16)) for _ in range(2))
    kwargs = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
    a, b = AdamW(ours.parameters(), **kwargs), torch.optim.AdamW(theirs.parameters(), fused=True, **kwargs)
    p, q = ours.list[0], theirs.list[0]
    for step in range(10):
        for optimizer, model in ((a, ours), (b, theirs)):
            give_gradients(model, step, 1e-2)
            optimizer.step()
        for kind in ("exp_avg", "exp_avg_sq"):
            # the last bits of float32 decide about the bf16 in 1 of 2^16 cases, a few operations a step, ten steps
            assert (a.state[p][kind] == b.state[q][kind]).float().mean() > 0.995
        assert a.state[p]["step"].dtype == b.state[q]["step"].dtype
        assert (p == q).float().mean() > 0.995


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_float32_parameters_are_updated_in_float32(rounding: str) -> None:
    ours, theirs = Parameters(torch.ones(8), torch.ones(8, 8, dtype=BF16)), Parameters(torch.ones(8))
    a = make_optimizer(ours, Optim(rounding=rounding))
    b = make_optimizer(theirs, Optim())
    for step in range(5):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        a.step()
        b.step()
    assert torch.allclose(ours.list[0], theirs.list[0], rtol=1e-6)
    assert "compensation" not in a.state[ours.list[0]]


# -- rounding


def test_stochastic_rounding_is_unbiased_and_takes_a_neighbour() -> None:
    x = torch.cat([drawn(60, seed=1), drawn(4, seed=2) * 1e-39])  # the last ones are subnormal
    draws = round_stochastically(x.expand(20000, -1).contiguous(), seed=5)
    down = (x.view(torch.int32) >> 16).to(torch.int16)  # towards zero; one more is away from it
    neighbours = down.view(BF16).double(), (down + 1).view(BF16).double()
    assert ((draws.double() == neighbours[0]) | (draws.double() == neighbours[1])).all()
    gap, error = neighbours[1] - neighbours[0], draws.double().mean(0) - x.double()
    chance = (x.double() - neighbours[0]) / gap
    assert (error.abs() <= 4 * gap.abs() * (chance * (1 - chance) / 20000).sqrt()).all()


def test_stochastic_rounding_uses_all_sixteen_bits() -> None:
    x = torch.full((2**22,), 0x3F800001, dtype=torch.int32).view(torch.float32)  # 1 + 2^-23
    up = int((round_stochastically(x, seed=3) > 1).sum())
    assert abs(up - 64) < 4 * 8  # 2^22 times 2^-16, and its standard deviation


def test_stochastic_rounding_at_the_edges() -> None:
    largest = torch.finfo(BF16).max
    keeps = torch.tensor([0.0, -0.0, 1.0, -1.5, largest, -largest, torch.inf, -torch.inf, 2.0**-133])
    past = torch.nextafter(torch.tensor([largest, -largest]), torch.tensor(0.0)) * (1 + 2**-12)
    for seed in range(50):
        rounded = round_stochastically(keeps, seed)
        assert torch.equal(rounded.view(torch.int16), keeps.to(BF16).view(torch.int16))
        assert torch.equal(round_stochastically(past, seed), past.to(BF16)) and past.to(BF16).isfinite().all()
        nans = torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
        assert round_stochastically(nans, seed).isnan().all()


def test_random_bits_are_addressed() -> None:
    def train(seed: int, disturb: bool = False) -> Tensor:
        model = Parameters(torch.ones(64, 64, dtype=BF16), torch.ones(64, 64, dtype=BF16))
        optimizer = make_optimizer(model, Optim(lr=1e-3, rounding="stochastic"), seed)
        kept = []
        for _ in range(2):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
                p.data.fill_(1.0)
            if disturb:
                torch.rand(3)
            optimizer.step()
            kept += [p.detach().clone() for p in model.parameters()]
        return torch.stack(kept)

    one = train(1)
    assert torch.equal(one, train(1, disturb=True))
    assert not torch.equal(one, train(2))
    for i in range(4):
        for j in range(i):  # another step or another parameter, another draw
            assert not torch.equal(one[i], one[j])


def test_what_nearest_loses_the_others_keep() -> None:
    """1.0 + 1000 x 1e-4 = 1.1, while a bf16 next to 1.0 is 0.0078 away."""
    ends = {}
    for rounding in ("nearest", "stochastic", "kahan"):
        p = nn.Parameter(torch.ones(4096, dtype=BF16))
        optimizer = AdamW([p], lr=1e-4, betas=(0.0, 0.0), eps=1e-12, weight_decay=0.0, rounding=rounding)
        p.grad = -torch.ones_like(p)
        for _ in range(1000):
            optimizer.step()
        ends[rounding] = p.double().mean().item()
    assert ends["nearest"] == 1.0
    assert ends["kahan"] == pytest.approx(1.1, abs=0.008)  # the compensation is a bf16 itself
    assert ends["stochastic"] == pytest.approx(1.1, abs=4 * 0.028 / 64)  # 12.8 +- 3.6 moves of 0.0078 each


@pytest.mark.parametrize(
    "lr, dtype, share",
    [(6e-4, BF16, 0.0), (6e-5, BF16, 0.43), (2e-5, BF16, 0.70), (2e-5, torch.float32, 0.0)],
)
def test_share_of_lost_updates(lr: float, dtype: torch.dtype, share: float) -> None:
    """Of weights from N(0, 0.02^2), by the size of the update."""
    model = Parameters((drawn(512, 384, seed=1) * 0.02).to(dtype))
    lost, p = LostUpdates(model, 20000), model.list[0]
    p.grad = torch.ones_like(p)
    p.grad[::2] = 0  # not counted, whatever happens to them
    lost.before()
    with torch.no_grad():
        p.copy_((p.float() - lr * (p.grad != 0)).to(dtype))
    assert lost.after().item() == pytest.approx(share, abs=0.03)


def test_norms_in_bf16_lose_every_update() -> None:
    model = Parameters(torch.ones(64, dtype=BF16))
    optimizer, lost = make_optimizer(model, Optim(lr=6e-4)), LostUpdates(model)
    give_gradients(model, 0)
    lost.before()
    optimizer.step()
    assert lost.after() == 1


def test_lost_updates_without_gradients() -> None:
    lost = LostUpdates(Parameters(torch.ones(8, 8)))
    lost.before()
    assert lost.after() == 0


def test_sample_is_spread_and_small() -> None:
    lost = LostUpdates(Parameters(torch.zeros(1000, 768), torch.zeros(768)), sample=2000)
    (_, matrix), (_, norm) = lost.where
    assert (len(matrix), len(norm)) == (1998, 2)
    assert len((matrix % 768).unique()) > 500 and len((matrix // 768).unique()) > 800


# -- kernels


def test_eps_vanishes_in_float16_and_foreach_divides_by_it() -> None:
    assert torch.tensor(1e-8, dtype=torch.float16) == 0
    for kernel, survives in (("fused", True), ("foreach", False)):
        model = Parameters(torch.ones(8, 8, dtype=torch.float16))
        optimizer = make_optimizer(model, Optim(kernel=kernel))
        model.list[0].grad = torch.ones_like(model.list[0])
        model.list[0].grad[0] = 0  # as of a token that a batch has not
        optimizer.step()
        assert model.list[0].isfinite().all() == survives
        told = describe(optimizer)
        assert (told["kernel"], told["eps_is_zero"], told["bytes_per_parameter"]) == (kernel, True, 4.0)


# -- 8 bits


def two_layers(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.Linear(128, 64)).to(dtype)


def train_steps(model: nn.Module, optimizer: torch.optim.Optimizer, begin: int, end: int) -> None:
    dtype = next(model.parameters()).dtype
    for step in range(begin, end):
        x = drawn(16, 64, seed=step).to(dtype)
        loss = (model(x) - x.roll(1, 1)).float().square().mean()
        loss.backward()
        set_lr(optimizer, 1e-2 / (1 + step))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def check_resume(optim: Optim, dtype: torch.dtype, folder: Path) -> torch.optim.Optimizer:
    """5 + 4 steps with a checkpoint between them are 9 steps, in every bit that is kept."""
    straight = two_layers(dtype)
    optimizer = make_optimizer(straight, optim, seed=3)
    train_steps(straight, optimizer, 0, 9)

    before, checkpoints = two_layers(dtype), Checkpoints(RunDir(folder), 1, False)
    first = make_optimizer(before, optim, seed=3)
    train_steps(before, first, 0, 5)
    checkpoints.save(before, first, {"step": 5})
    checkpoints.wait()
    after = two_layers(dtype)
    second = make_optimizer(after, optim, seed=3)
    assert Checkpoints(RunDir(folder), 1, False).restore(after, second) == {"step": 5}
    for p, q in zip(before.parameters(), after.parameters(), strict=True):
        assert {k: type(v) for k, v in first.state[p].items()} == {k: type(v) for k, v in second.state[q].items()}
    train_steps(after, second, 5, 9)

    for p, q in zip(straight.parameters(), after.parameters(), strict=True):
        assert torch.equal(p, q)
    ends = optimizer_tensors(straight, optimizer), optimizer_tensors(after, second)
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][key], ends[1][key]) and ends[0][key].dtype == ends[1][key].dtype for key in ends[0])
    return optimizer


@pytest.mark.parametrize(
    "dtype, settings",
    [
        (torch.float32, {}),
        (BF16, {"kernel": "foreach"}),
        (BF16, {"rounding": "stochastic"}),
        (BF16, {"rounding": "kahan"}),
        (torch.float32, {"name": "adamw_8bit"}),
        (BF16, {"name": "adamw_8bit"}),
    ],
)
def test_resume_is_exact(dtype: torch.dtype, settings: dict[str, str], tmp_path: Path) -> None:
    if "name" in settings:
        pytest.importorskip("bitsandbytes")
    check_resume(Optim(**settings), dtype, tmp_path)


@pytest.mark.slow  # torchao compiles
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.compiles
def test_torchao_resumes_exactly(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizers = pytest.importorskip("torchao.optim")
    monkeypatch.setattr("gptlab.optim.optimizers._eight_bit", lambda device: optimizers.AdamW8bit)
    told = describe(check_resume(Optim(name="adamw_8bit"), dtype, tmp_path))
    assert told["optimizer"].startswith("torchao.") and told["bytes_per_parameter"] < 2.5
    assert_learns_a_quadratic()


def test_bitsandbytes_learns_and_says_what_it_is() -> None:
    pytest.importorskip("bitsandbytes")
    told = describe(assert_learns_a_quadratic())
    assert told["optimizer"].startswith("bitsandbytes.optim.") and told["kernel"] == "bitsandbytes"
    assert 2 < told["bytes_per_parameter"] < 2.2  # two codes and the scales


def assert_learns_a_quadratic() -> torch.optim.Optimizer:
    ends = []
    for name in ("adamw", "adamw_8bit"):
        model = Parameters(drawn(128, 128, seed=1))
        optimizer = make_optimizer(model, Optim(name=name, lr=0.03, weight_decay=0.0))
        for step in range(60):
            model.list[0].grad = model.list[0].detach() - 1.0 + 0.1 * drawn(128, 128, seed=100 + step)
            optimizer.step()
        ends.append(model.list[0].detach().clone())
    apart = (ends[0] - ends[1]).square().mean().sqrt()
    assert apart < 0.1 * (ends[0] - drawn(128, 128, seed=1)).square().mean().sqrt()  # the way they went
    return optimizer


@pytest.mark.parametrize("settings", [{"name": "adamw_8bit"}, {"rounding": "kahan"}])
def test_loss_scaling_skips_a_step(settings: dict[str, str]) -> None:
    if "name" in settings:
        pytest.importorskip("bitsandbytes")
    model = Parameters(drawn(128, 64, seed=1), torch.ones(4, dtype=BF16))
    optimizer, scaler = make_optimizer(model, Optim(**settings)), torch.amp.GradScaler("cpu")
    for factor, moves in ((1.0, True), (torch.inf, False), (1.0, True)):
        before = model.list[0].detach().clone()
        scaler.scale(model.list[0].square().sum() * factor).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert (not torch.equal(before, model.list[0])) == moves and model.list[0].isfinite().all()


# -- what does not go together


def test_settings_that_exclude_one_another() -> None:
    base = {"train.max_steps": 1, "precision.regime": "bf16_pure"}
    with pytest.raises(ConfigError, match="optim.kernel = foreach"):
        build_recipe(base, {"optim.kernel": "foreach", "optim.rounding": "kahan"})
    with pytest.raises(ConfigError, match="optim.rounding = stochastic"):
        build_recipe(base, {"optim.name": "adamw_8bit", "optim.rounding": "stochastic"})
    with pytest.raises(NotApplicable, match="this model has none"):
        make_optimizer(two_layers(torch.float32), Optim(rounding="stochastic"))


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(NotApplicable, match=r"on cpu: needs bitsandbytes, which `pip install 'gptlab\[precision\]'`"):
        make_optimizer(two_layers(torch.float32), Optim(name="adamw_8bit"))


def test_moments_of_another_library_are_refused(tmp_path: Path) -> None:
    model = two_layers(torch.float32)
    write_safetensors(tmp_path / "optimizer.safetensors", {"exp_avg.codes/0.weight": torch.zeros(1)})
    with pytest.raises(RunError, match="8-bit moments are torchao"):
        load_optimizer(Saved(tmp_path), model, make_optimizer(model, Optim()))
