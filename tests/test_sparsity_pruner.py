"""Pruning while training: exact shares, zeros that stay, the methods against numpy, and a resume bit for bit."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gptlab.config import PRESETS, Model, Sparsity, build_recipe
from gptlab.errors import UserError
from gptlab.model.encoder import Encoder
from gptlab.model.gpt import GPT, build_model
from gptlab.optim.adamw import AdamW
from gptlab.optim.muon import Muon
from gptlab.optim.spam import AdamWSPAM
from gptlab.sparsity.masks import unpack
from gptlab.sparsity.pruner import NoPruner, Pruner, make_pruner, prunable
from gptlab.sparsity.schedule import rigl_fraction, sparsity_at

TINY = Model(n_layer=1, n_head=2, n_embd=16, block_size=12, vocab_size=37, position="rope")
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude"},
    "magnitude by layer": {"method": "magnitude", "scope": "layer", "head": True},
    "bitter0": {"method": "state", "variant": "bitter0"},
    "bitter1": {"method": "state", "variant": "bitter1"},
    "bitter3": {"method": "state", "variant": "bitter3", "schedule": "late"},
    "bitter7": {"method": "state", "variant": "bitter7", "schedule": "linear"},
    "movement": {"method": "movement"},
    "movement by layer": {"method": "movement", "scope": "layer", "head": True},
    "distance": {"method": "movement", "movement": "distance"},
    "rigl": {"method": "rigl"},
    "2:4": {"method": "2:4"},
    "2:4 from the start": {"method": "2:4", "begin": 0.0},
}


def settings_of(method: str, **changes: Any) -> Sparsity:
    return Sparsity(**{"target": 0.5 if "2:4" in method else 0.6, "every": 5, **METHODS[method], **changes})


class Run:
    """A tiny GPT in training; its steps are pruned over 40."""

    def __init__(self, sparsity: Sparsity, every_update: bool = False) -> None:
        self.model = build_model(TINY, init=5)
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, foreach=True
        )
        self.sparsity, self.every_update, self.step = sparsity, every_update, 0
        self.make()

    def make(self) -> None:
        self.pruner = Pruner(self.model, self.optimizer, self.sparsity, 40, 7, self.every_update)

    def train(self, until: int, look: Callable[[int], None] = lambda step: None) -> Run:
        while self.step < until:
            tokens = torch.randint(0, 37, (2, 13), generator=torch.Generator().manual_seed(self.step))
            loss = self.model(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
            self.pruner.before_update(self.step)
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.step += 1
            self.pruner.after_update(self.step)
            look(self.step)
            self.optimizer.zero_grad()
        return self

    def state(self) -> dict[str, Tensor]:
        state = {f"weight/{name}": p.detach() for name, p in self.model.named_parameters()} | self.pruner.tensors()
        for name, p in self.model.named_parameters():
            state |= {f"{kind}/{name}": value for kind, value in self.optimizer.state[p].items()}
        return state


def masks(pruner: Pruner) -> dict[str, Tensor]:
    tensors = pruner.tensors()
    return {name: unpack(tensors[f"mask/{name}"], p.shape) for name, p in pruner.parameters.items()}


def zeros_hold(pruner: Pruner, before: dict[str, Tensor]) -> None:
    """Masked weights are zero, and what the optimizer keeps of them; the gradients were, of those masked before."""
    for name, mask in masks(pruner).items():
        p = pruner.parameters[name]
        assert not p[mask].any() and p[~mask].any()
        assert p.grad is not None and not p.grad[before[name]].any() and p.grad[~before[name]].any()
        for value in pruner.optimizer.state[p].values():
            if isinstance(value, Tensor) and value.shape == p.shape:
                assert not value[mask].any() and value[~mask].any()


# -- what is pruned


def test_the_weights_of_gpt2() -> None:
    with torch.device("meta"):
        tied = GPT(Model(**PRESETS["gpt2"], vocab_size=50304))
        one = {**PRESETS["gpt2"], "n_layer": 1, "vocab_size": 50304}
        untied, encoder = GPT(Model(**one, tied=False)), Encoder(Model(**one, mlp="gelu_erf"), 4)

    def numbers(model: nn.Module, head: bool) -> int:
        return sum(p.numel() for p in prunable(model, head).values())

    assert numbers(tied, False) == 84_934_656 and numbers(tied, True) == 123_568_128
    assert numbers(untied, False) == numbers(encoder, False) == 84_934_656 / 12
    assert numbers(untied, True) == 84_934_656 / 12 + 50304 * 768
    assert len(prunable(tied, False)) == 48
    assert set(prunable(tied, True)) - set(prunable(tied, False)) == {"wte.weight"}
    assert set(prunable(untied, True)) - set(prunable(untied, False)) == {"lm_head.weight"}
    with pytest.raises(UserError, match=r"sparsity\.head"):
        prunable(encoder, True)


def test_tied_weights_stay_one_tensor() -> None:
    run = Run(settings_of("magnitude", head=True)).train(40)
    assert run.model.head_weight is run.model.wte.weight
    assert run.pruner.by_layer()["wte.weight"] > 0 and (run.model.wte.weight == 0).any()


# -- how much, and when


@pytest.mark.parametrize("method", METHODS)
def test_exact_shares_at_each_step(method: str) -> None:
    sparsity = settings_of(method)
    run = Run(sparsity)
    pruner, n = run.pruner, {name: p.numel() for name, p in run.pruner.parameters.items()}
    total = sum(n.values())
    assert pruner.mask_bytes() == sum(math.ceil(size / 8) for size in n.values())
    earlier = [masks(pruner)]

    def look(step: int) -> None:
        now = masks(pruner)
        changed = sum(int((now[name] ^ earlier[-1][name]).sum()) for name in n)
        if changed:
            at = step - 1 if method == "rigl" else step  # rigl's masks change before the update
            assert (pruner.changes, pruner.changed_at) == (changed, at)
        earlier.append(now)
        # changes every 5 steps between 10 and 30
        share = sparsity_at(min(step // 5 * 5, 30) if step >= 10 else 0, sparsity, 40)
        counts = {name: int(mask.sum()) for name, mask in now.items()}
        if method == "rigl":
            assert counts == {name: int(0.6 * size) for name, size in n.items()}
        elif "2:4" in method:
            on = method != "2:4" or step >= 10
            assert counts == {name: size // 2 * on for name, size in n.items()}
            assert not on or all((mask.view(-1, 4).sum(1) == 2).all() for mask in now.values())
        elif sparsity.scope == "layer":
            assert counts == {name: int(share * size) for name, size in n.items()}
        else:
            assert sum(counts.values()) == int(share * total)
        assert pruner.sparsity() == sum(counts.values()) / total
        assert pruner.by_layer() == {name: counts[name] / n[name] for name in n}
        for name, mask in now.items():
            assert not pruner.parameters[name][mask].any()
        if not method.startswith("movement") or step > 30:  # after the end as all others
            zeros_hold(pruner, now if method == "rigl" else earlier[-2])
            if method != "rigl":
                assert all((now[name] >= earlier[-2][name]).all() for name in n), "no weight comes back"

    run.train(40, look)
    changes = sum(any((a[name] ^ b[name]).any() for name in n) for a, b in itertools.pairwise(earlier))
    assert changes == {"2:4": 1, "2:4 from the start": 0, "rigl": 5}.get(method, 4)
    if method.startswith("movement"):
        assert {key.split("/")[0] for key in pruner.tensors()} == {"mask", "changed"}


def test_2_to_4_refuses_other_rows() -> None:
    model = build_model(TINY.model_copy(update={"mlp_width": 22}))
    with pytest.raises(UserError, match=r"h\.0\.mlp\.c_proj\.weight has rows of 22"):
        Pruner(model, torch.optim.SGD(model.parameters()), settings_of("2:4"), 40, 0, False)


# -- zeros that stay


class OneBlock(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.h = nn.ModuleList([nn.Linear(12, size, bias=False) for size in (7, 20)])
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=draw).to(dtype)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1, fused=True),
    "amsgrad": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1, amsgrad=True, foreach=True),
    "seed": lambda p: AdamWSPAM(p, "seed", 1e-2, weight_decay=0.1, interval=90),
    "paper": lambda p: AdamWSPAM(p, "paper", 1e-2, weight_decay=0.1, interval=90),
    "stable": lambda p: AdamWSPAM(p, "stable", 1e-2, weight_decay=0.1, interval=90),
    "sgd": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, weight_decay=0.1),
    "kahan": lambda p: AdamW(p, 1e-2, weight_decay=0.1, rounding="kahan"),
    "stochastic": lambda p: AdamW(p, 1e-2, weight_decay=0.1, rounding="stochastic"),
    "muon": lambda p: Muon([{"params": p, "muon": True, "parts": 1}], 1e-2, weight_decay=0.1),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n in ("paper", "stable", "kahan", "stochastic"))) for n in OPTIMIZERS],
)
def test_masked_weights_stay_zero_for_1000_steps(name: str) -> None:
    """Under weight decay and momentum; masks change at 30, 60 and 90, when the optimizer has moments of all."""
    model = OneBlock(torch.bfloat16 if name in ("kahan", "stochastic") else torch.float32)
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    sparsity = Sparsity(method="magnitude", begin=0.05, end=0.09, every=30)
    pruner = Pruner(model, optimizer, sparsity, 1000, 0, every_update=name == "muon")
    draw = torch.Generator().manual_seed(1)
    for step in range(1000):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=draw).to(p.dtype)
        pruner.before_update(step)
        optimizer.step()
        pruner.after_update(step + 1)
        if step % 7 == 0:
            assert all(not p[mask].any() for p, mask in zip(model.parameters(), masks(pruner).values(), strict=True))
        if step % 50 == 49 and step > 90:
            assert pruner.sparsity() == int(0.5 * 324) / 324 and pruner.changed_at == 90
            for p, mask in zip(model.parameters(), masks(pruner).values(), strict=True):
                kept = [t for t in optimizer.state[p].values() if isinstance(t, Tensor) and t.shape == p.shape]
                assert kept and not any(t[mask].any() for t in kept) and not p.grad[mask].any()
                assert p[~mask].count_nonzero() > 0.9 * (~mask).sum()


# -- the methods


def gradients(pruner: Pruner, step: int) -> dict[str, np.ndarray]:
    made = {}
    for i, (name, p) in enumerate(pruner.parameters.items()):
        draw = np.random.default_rng([step, i])
        made[name] = (draw.normal(size=tuple(p.shape)) * np.random.default_rng(i).uniform(0, 2, p.shape)).astype("f4")
        p.grad = torch.from_numpy(made[name].copy())
    return made


def smallest_of(values: dict[str, np.ndarray], k: int) -> dict[str, np.ndarray]:
    together = np.concatenate([v.ravel() for v in values.values()])
    mask = np.zeros(len(together), dtype=bool)
    mask[np.argsort(together, kind="stable")[:k]] = True
    parts = np.split(mask, np.cumsum([v.size for v in values.values()])[:-1])
    return {name: part.reshape(values[name].shape) for name, part in zip(values, parts, strict=True)}


@pytest.mark.parametrize("movement", ["gradient", "distance"])
def test_movement_by_its_definition(movement: str) -> None:
    """60 steps of SGD, 41 of them with masks, against numpy: dense weights, scores, masks, what the forward sees."""
    sparsity = Sparsity(method="movement", movement=movement, target=0.7, begin=0.2, end=0.8, every=4)  # type: ignore
    model = OneBlock(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.125)  # a power of two: numpy rounds as torch does
    pruner = Pruner(model, optimizer, sparsity, 50, 0, every_update=False)
    dense = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    start, n = copy.deepcopy(dense), sum(w.size for w in dense.values())
    score = {name: np.zeros_like(w) for name, w in dense.items()}
    mask = {name: np.zeros(w.shape, dtype=bool) for name, w in dense.items()}
    returned = 0
    for step in range(60):
        grads = gradients(pruner, step)
        soft = movement == "gradient" and step < 40
        for name, g in grads.items():
            score[name] -= g * dense[name]
            dense[name] -= np.float32(0.125) * (g if soft else np.where(mask[name], 0, g))
        pruner.before_update(step)
        optimizer.step()
        pruner.after_update(step + 1)
        if step + 1 in (12, 16, 20, 24, 28, 32, 36, 40):
            if movement == "distance":
                score = {
                    name: np.where(mask[name], -np.inf, w * (w - start[name])).astype("f4") for name, w in dense.items()
                }
            new = smallest_of(score, int(n * sparsity_at(step + 1, sparsity, 50)))
            returned += sum((mask[name] & ~new[name]).sum() for name in new)
            mask = new
        if not (movement == "gradient" and step + 1 < 40):
            dense = {name: np.where(mask[name], 0, w).astype("f4") for name, w in dense.items()}
        for name, p in model.named_parameters():
            np.testing.assert_array_equal(p.detach().numpy(), np.where(mask[name], 0, dense[name]), strict=False)
    assert pruner.sparsity() == int(0.7 * n) / n
    assert (returned > 20) == (movement == "gradient")


def test_movement_of_negative_and_zero_scores_is_exact() -> None:
    """As published, all weights with a score of 0 or less were dropped, whatever the target."""
    for movement in ("gradient", "distance"):
        model = OneBlock(torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        sparsity = Sparsity(method="movement", movement=movement, target=0.3, every=2)  # type: ignore[arg-type]
        pruner = Pruner(model, optimizer, sparsity, 20, 0, every_update=False)
        for step in range(20):
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            pruner.before_update(step)
            pruner.after_update(step + 1)
            assert pruner.sparsity() <= 0.3
        assert pruner.sparsity() == int(0.3 * 324) / 324


def test_rigl_by_its_definition() -> None:
    """Against a sort: drop the smallest |w| of the active ones, grow by |gradient| among all that are then inactive."""
    sparsity = Sparsity(method="rigl", target=0.75, every=3, end=0.8, rigl_alpha=0.5)
    model = OneBlock(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)
    pruner = Pruner(model, optimizer, sparsity, 50, 3, every_update=False)
    for name, mask in masks(pruner).items():
        assert int(mask.sum()) == int(0.75 * mask.numel()) and not pruner.parameters[name][mask].any()
    grown_all = back = 0
    for step in range(50):
        grads, old = gradients(pruner, step), masks(pruner)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        pruner.before_update(step)
        fraction = rigl_fraction(step, sparsity, 50)
        assert bool(fraction) == (step in range(3, 40, 3))
        for name, new in masks(pruner).items():
            active, p = ~old[name].numpy(), pruner.parameters[name]
            dropped = int(fraction * active.sum())
            w = np.where(active, np.abs(before[name].numpy()), np.inf).ravel()
            keep = active.ravel().copy()
            keep[np.argsort(w, kind="stable")[:dropped]] = False
            growth = np.where(keep, -1, np.abs(grads[name]).ravel())
            expected = keep.copy()
            expected[np.argsort(-growth, kind="stable")[:dropped]] = True
            np.testing.assert_array_equal(~new.numpy().ravel(), expected)
            grown = old[name] & ~new
            assert not p[grown].any()
            assert all(not t[grown | new].any() for t in optimizer.state[p].values() if t.shape == p.shape)
            kept = ~old[name] & ~new
            assert torch.equal(p[kept], before[name][kept])
            back += int((torch.from_numpy(active & ~keep.reshape(active.shape)) & ~new).sum())
            grown_all += int(grown.sum())
            np.testing.assert_array_equal(p.grad.numpy(), np.where(new, 0, grads[name]))
        optimizer.step()
        pruner.after_update(step + 1)
    assert grown_all > 50 and back > 0


def test_rigl_draws_from_its_seed() -> None:
    def drawn(seed: int) -> list[Tensor]:
        model = OneBlock(torch.float32)
        optimizer = torch.optim.SGD(model.parameters())
        return list(masks(Pruner(model, optimizer, Sparsity(method="rigl"), 9, seed, False)).values())

    assert all(torch.equal(a, b) for a, b in zip(drawn(1), drawn(1), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(drawn(1), drawn(2), strict=True))


def test_bitter1_is_magnitude() -> None:
    a, b = Run(settings_of("bitter1")).train(40), Run(settings_of("magnitude")).train(40)
    assert all(torch.equal(x, y) for x, y in zip(a.state().values(), b.state().values(), strict=True))
    c = Run(settings_of("bitter0", schedule="cubic")).train(40)
    assert any(not torch.equal(x, y) for x, y in zip(masks(a.pruner).values(), masks(c.pruner).values(), strict=True))


@pytest.mark.parametrize("method", ["magnitude", "bitter0", "movement", "distance", "rigl", "2:4"])
def test_updates_that_loss_scaling_skips(method: str) -> None:
    """Gradients that overflowed move neither masks nor scores; from a run's first update on, without moments."""
    run = Run(settings_of(method))
    pruner, parameters = run.pruner, list(run.model.parameters())
    before = copy.deepcopy(pruner.tensors())
    for step in range(9):  # rigl would have changed its masks
        for p in parameters:
            p.grad = torch.full_like(p, math.inf)
        next(iter(pruner.parameters.values())).grad = torch.full((48, 16), math.nan)
        pruner.before_update(step)
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        assert not norm.isfinite(), "who looks for it still finds it"
        pruner.after_update(step + 1)
    assert all(torch.equal(before[key], value) for key, value in pruner.tensors().items())
    for step in range(9, 40):
        for p in parameters:
            p.grad = torch.full_like(p, math.inf)
        pruner.before_update(step)
        pruner.after_update(step + 1)
    total = sum(p.numel() for p in pruner.parameters.values())
    assert all(p.isfinite().all() for p in parameters)
    assert pruner.sparsity() == pytest.approx(0.5 if method == "2:4" else 0.6, abs=8 / total)


# -- a resume


@pytest.mark.parametrize(
    "method, restored_first",
    [
        *((m, False) for m in METHODS if m not in ("bitter1", "bitter3", "bitter7")),  # they keep what bitter0 keeps
        *((m, True) for m in ("rigl", "2:4 from the start", "distance", "movement")),
    ],
)
def test_a_resume_is_exact(method: str, restored_first: bool) -> None:
    """At 20 of 40 steps, in the midst of the ramp, whether the pruner is made before or after the weights are there."""
    first, resumed = Run(settings_of(method)).train(20), Run(settings_of(method))
    saved = copy.deepcopy(first.state())
    resumed.model.load_state_dict(first.model.state_dict())
    resumed.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    if restored_first:
        resumed.make()
    resumed.pruner.load_tensors(first.pruner.tensors())
    resumed.step = 20

    def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
        return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)

    assert equal(resumed.state(), saved)
    resumed.train(40)
    assert equal(first.state(), saved), "what was loaded is a copy"
    assert equal(resumed.state(), first.train(40).state())


def test_loading_sets_the_weights() -> None:
    """Into a model that has the weights before masking, or in movement's case any."""
    for method in ("magnitude", "movement", "rigl"):
        first = Run(settings_of(method)).train(20)
        other = Run(settings_of(method))
        with torch.no_grad():
            for p in other.model.parameters():
                p.add_(1)
        other.pruner.load_tensors(first.pruner.tensors())
        for name, mask in masks(first.pruner).items():
            p = other.pruner.parameters[name]
            assert mask.any() and not p[mask].any()
            assert method != "movement" or torch.equal(p, first.pruner.parameters[name])


@pytest.mark.parametrize("method", [m for m in METHODS if m != "rigl"])  # it asks at changes whether all is finite
def test_no_number_is_read_in_an_update(method: str) -> None:
    """Tensors without values refuse to be read: so a GPU, too, is nowhere waited for."""
    with torch.device("meta"):
        model = GPT(TINY)
    optimizer = torch.optim.SGD(model.parameters())
    pruner = Pruner(model, optimizer, settings_of(method, end=0.5), 40, 0, every_update=True)
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    for step in range(25):
        pruner.before_update(step)
        pruner.after_update(step + 1)
    assert pruner.changed_at == {"2:4": 10, "2:4 from the start": 0}.get(method, 20)


def test_overhead_counts_from_one_call_to_the_next() -> None:
    run = Run(settings_of("magnitude")).train(20)
    assert 0 < run.pruner.overhead() < 60
    assert run.pruner.overhead() == 0


def test_a_run_that_prunes_nothing_has_a_pruner_that_does_nothing() -> None:
    recipe = build_recipe({"train.max_steps": 1, "schedule.decay_steps": 40})
    model = build_model(TINY)
    none = make_pruner(model, torch.optim.SGD(model.parameters()), recipe)
    assert isinstance(none, NoPruner)
    assert {name for name in vars(NoPruner) if not name.startswith("_")} <= set(dir(Pruner))
    none.before_update(0)
    none.after_update(1)
    none.load_tensors({})
    assert none.tensors() == none.facts() == {} and none.overhead() == 0
    some = make_pruner(model, torch.optim.SGD(model.parameters()), recipe.replace({"sparsity.method": "magnitude"}))
    assert isinstance(some, Pruner) and not some.every_update
    muon = recipe.replace({"sparsity.method": "magnitude", "optim.name": "muon"})
    again = make_pruner(model, torch.optim.SGD(model.parameters()), muon)
    assert isinstance(again, Pruner) and again.every_update
