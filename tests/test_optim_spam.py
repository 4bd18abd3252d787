"""SPAM in its three forms: against the rules written out in numpy, their invariants, PyTorch's AdamW, and a resume."""

from __future__ import annotations

import copy
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gptlab.config import build_recipe
from gptlab.errors import ConfigError
from gptlab.optim.spam import AdamWSPAM, Form, clip_spikes, warmup_factor

FORMS: tuple[Form, ...] = ("seed", "paper", "stable")
LR, DECAY = 3e-3, 0.1
SHAPES = ((6, 5), (4, 3), (7,))
few = settings(max_examples=12, deadline=None)


def lr_at(t: int) -> float:
    return LR * min(1.0, t / 20) * (1 - t / 400)


def gradients(t: int, spikes: bool = True) -> list[np.ndarray]:
    """Of step t, from 1: noise whose size differs by entry; entries of 1,000, and whole gradients 5 times as large."""
    draw = np.random.default_rng([7, t])
    grads = [np.random.default_rng(i).uniform(0.1, 2, s) * draw.normal(size=s) for i, s in enumerate(SHAPES)]
    if spikes and t in (3, 30, 65, 66, 90, 135):
        grads[0][t % 6, 1] = -1000.0
        grads[2][t % 7] = 1000.0
    if spikes and t in (5, 25, 80, 150):
        grads = [5 * g for g in grads]
    if t <= 40:
        grads[1][0] = 0.0  # a row that comes late
    return grads


def starting_point() -> list[np.ndarray]:
    return [np.random.default_rng([9, i]).normal(size=s) for i, s in enumerate(SHAPES)]


def trained(optimizer: AdamWSPAM, parameters: list[nn.Parameter], first: int, last: int, spikes: bool = True) -> None:
    for t in range(first, last + 1):
        for p, g in zip(parameters, gradients(t, spikes), strict=True):
            p.grad = torch.from_numpy(g).to(p.dtype)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(t)
        optimizer.step()


def make(form: Form, dtype: torch.dtype = torch.float64, **kwargs: Any) -> tuple[AdamWSPAM, list[nn.Parameter]]:
    parameters = [nn.Parameter(torch.from_numpy(w).to(dtype)) for w in starting_point()]
    groups = [{"params": parameters[:2], "weight_decay": DECAY}, {"params": parameters[2:], "weight_decay": 0.0}]
    return AdamWSPAM(groups, form, **kwargs), parameters


# -- against the rules


def adamw(w: np.ndarray, m: np.ndarray, v: np.ndarray, lr: float, wd: float, step: int, eps: float, b=(0.9, 0.999)):
    """Decoupled decay and Adam's step; v is the square that divides."""
    return w * (1 - lr * wd) - lr * (m / (1 - b[0] ** step)) / (np.sqrt(v / (1 - b[1] ** step)) + eps)


def by_the_rules(form: Form, steps: int, interval: int, warmup: int, amsgrad: bool) -> tuple[list[np.ndarray], Counter]:
    W, taken = starting_point(), Counter()
    M, V, X = ([np.zeros_like(w) for w in W] for _ in range(3))
    norms: list[float] = []
    ema = [[0.0, 0.0, 0.0] for _ in W]
    last_reset, adam_step, in_v = None, 0, 0
    for t in range(1, steps + 1):
        G, lr = gradients(t), lr_at(t)
        if form == "paper" and t % interval == 0:
            M, V, last_reset = [0 * m for m in M], [0 * v for v in V], t
        if form == "seed":
            for g, v in zip(G, V, strict=True):
                for i in np.ndindex(g.shape):
                    if v[i] > 0:
                        thr = math.sqrt(50 * (v[i] / (1 - 0.999**in_v) + 1e-12))
                        if abs(g[i]) > thr:
                            g[i] = math.copysign(thr, g[i])
                            taken["clipped"] += 1
            norm = math.sqrt(sum((g**2).sum() for g in G))
            past = norms[-100:]
            if len(past) >= 10 and (norm - np.mean(past)) / np.std(past) > 2.0:
                M, V = [0.5 * m for m in M], [0.9 * v for v in V]
                taken["outlier"] += 1
            norms.append(norm)
            if norm > 1.0:
                G = [g / (norm + 1e-6) for g in G]
                taken["norm clipped"] += 1
            if t % interval == 0:
                M, V, last_reset, in_v = [0 * m for m in M], [0 * v for v in V], t, 0
        if form == "paper" and t - (last_reset or 0) >= 20:
            for g, v in zip(G, V, strict=True):
                spikes = (g**2 > 5000 * v) & (v > 0)
                g[spikes] = (np.sign(g) * np.sqrt(5000 * v))[spikes]
                taken["clipped"] += int(spikes.sum())
        if form == "stable":
            for k, (g, e) in enumerate(zip(G, ema, strict=True)):
                top = np.abs(g).max()
                e[0] = 0.999 * e[0] + 0.001 * top
                bound = e[0] / (1 - 0.999**t)
                spikes = np.abs(g) > bound
                g[spikes] = g[spikes] / top * bound
                taken["clipped"] += int(spikes.sum())
                norm = math.sqrt((g**2).sum())
                e[1] = 0.7 * e[1] + 0.3 * norm
                e[2] = 0.9 * e[2] + 0.1 * norm**2
                G[k] = g / norm * (e[1] / (1 - 0.7**t)) / (math.sqrt(e[2] / (1 - 0.9**t)) + 1e-8)
            if t % interval == 0:
                M, V, X, adam_step = [0 * m for m in M], [0 * v for v in V], [0 * x for x in X], 0
                taken["reset"] += 1
        if last_reset is not None:
            j = t - last_reset
            taken["reset"] += j == 0
            taken["warm-up"] += j < warmup
            if form == "seed" and j < warmup:
                lr *= max(1e-3, 0.5 * (1 - math.cos(math.pi * j / warmup)))
            if form == "paper" and j < warmup:
                lr *= 1 - 0.99 * 0.5 * (1 + math.cos(math.pi * j / (warmup + 1)))
        adam_step, in_v = adam_step + 1, in_v + 1
        M = [0.9 * m + 0.1 * g for m, g in zip(M, G, strict=True)]
        V = [0.999 * v + 0.001 * g**2 for v, g in zip(V, G, strict=True)]
        X = [np.maximum(x, v) for x, v in zip(X, V, strict=True)]
        eps = 1e-6 if form == "paper" else 1e-8
        for k, wd in enumerate((DECAY, DECAY, 0.0)):
            W[k] = adamw(W[k], M[k], (X if amsgrad else V)[k], lr, wd, adam_step, eps)
    return W, taken


@pytest.mark.parametrize(
    "form, changes, branches",
    [
        ("seed", {}, {"clipped", "outlier", "norm clipped"}),
        ("seed", {"interval": 60, "warmup_steps": 25}, {"clipped", "outlier", "norm clipped", "reset", "warm-up"}),
        (
            "seed",
            {"interval": 60, "warmup_steps": 25, "amsgrad": False, "fused": True},
            {"clipped", "outlier", "reset", "warm-up"},
        ),
        ("paper", {}, {"clipped"}),
        ("paper", {"interval": 60, "warmup_steps": 25}, {"clipped", "reset", "warm-up"}),
        (
            "paper",
            {"interval": 60, "warmup_steps": 25, "amsgrad": True, "fused": True},
            {"clipped", "reset", "warm-up"},
        ),
        ("stable", {}, {"clipped"}),
        ("stable", {"interval": 60}, {"clipped", "reset"}),
        ("stable", {"interval": 60, "amsgrad": True, "fused": True}, {"clipped", "reset"}),
    ],
)
def test_200_steps_by_the_rules(form: Form, changes: dict[str, Any], branches: set[str]) -> None:
    optimizer, parameters = make(form, **changes)
    trained(optimizer, parameters, 1, 200)
    amsgrad = changes.get("amsgrad", form == "seed")
    interval, warmup = changes.get("interval", 1000), changes.get("warmup_steps", 0)
    expected, taken = by_the_rules(form, 200, interval, warmup, amsgrad)
    for p, w in zip(parameters, expected, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), w, rtol=1e-6, atol=1e-12)
    assert branches <= {key for key, n in taken.items() if n}
    if form == "seed":
        assert optimizer.shared["events"] == taken["outlier"]


def test_defaults_are_the_published_ones() -> None:
    p = [nn.Parameter(torch.ones(1))]

    def told(form: Form) -> tuple[Any, ...]:
        o = AdamWSPAM(p, form)
        numbers = o.theta, o.threshold, o.interval, o.warmup_steps, o.max_norm
        return o.defaults["betas"], o.defaults["eps"], o.defaults["amsgrad"], *numbers

    assert told("seed") == ((0.9, 0.999), 1e-8, True, 50.0, 2.0, 1000, 100, 1.0)
    assert told("paper") == ((0.9, 0.999), 1e-6, False, 5000.0, 0.0, 500, 150, 0.0)
    assert told("stable")[:3] == ((0.9, 0.999), 1e-8, False) and told("stable")[5:7] == (1000, 0)


OFF = {"spike_clip": False, "reset": False, "threshold": 0.0, "max_norm": 0.0}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_switched_off_it_is_adamw(form: Form, fused: bool) -> None:
    ours, parameters = make(form, torch.float32, amsgrad=True, eps=1e-8, fused=fused, **OFF)
    _, others = make(form, torch.float32)
    groups = [{"params": others[:2], "weight_decay": DECAY}, {"params": others[2:], "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, amsgrad=True, fused=fused, foreach=not fused)
    trained(ours, parameters, 1, 50)
    trained(theirs, others, 1, 50)  # type: ignore[arg-type]
    for p, q in zip(parameters, others, strict=True):
        assert torch.equal(p, q)
        assert ours.state[p].keys() == theirs.state[q].keys()


@pytest.mark.parametrize("form", ("seed", "paper"))
def test_without_an_event_it_is_adamw(form: Form) -> None:
    """All switched on, and nothing that they are for: entries of one size, equal norms."""
    ours, parameters = make(form, torch.float32, amsgrad=False, eps=1e-8, max_norm=1e3)
    _, others = make(form, torch.float32)
    groups = [{"params": others[:2], "weight_decay": DECAY}, {"params": others[2:], "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, foreach=True)
    for t in range(60):
        for p, q in zip(parameters, others, strict=True):
            p.grad = torch.rand(p.shape, generator=torch.Generator().manual_seed(t)).sub_(0.5).sign_()
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    assert all(torch.equal(p, q) for p, q in zip(parameters, others, strict=True))


# -- invariants


@few
@given(st.sampled_from(FORMS), st.integers(1, 9), st.booleans())
def test_resets_exactly_at_multiples_of_the_interval(form: Form, interval: int, on: bool) -> None:
    p = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = AdamWSPAM([p], form, reset=on, interval=interval, spike_clip=False, max_norm=0.0)
    n = 0  # gradients in exp_avg, all of them 1
    for t in range(1, 31):
        p.grad = torch.ones_like(p)
        optimizer.step()
        n = 1 if on and t % interval == 0 else n + 1
        assert torch.allclose(optimizer.state[p]["exp_avg"], torch.tensor(1 - 0.9**n, dtype=torch.float64))
        assert torch.allclose(optimizer.state[p]["exp_avg_sq"], torch.tensor(1 - 0.999**n, dtype=torch.float64))
        assert optimizer.state[p]["step"] == (n if form == "stable" else t)
    assert optimizer.shared["updates"] == 30


@few
@given(st.sampled_from(("seed", "paper")), st.integers(0, 400), st.integers(0, 200))
def test_warmup_factor(form: Form, since: int, steps: int) -> None:
    factor = warmup_factor(form, since, steps)
    assert factor == 1.0 if since >= steps else 0 < factor < 1
    assert factor <= warmup_factor(form, since + 1, steps)
    lowest = 1e-3 if form == "seed" else 0.01
    assert factor >= lowest - 1e-15
    assert steps == 0 or warmup_factor(form, 0, steps) == pytest.approx(lowest)


@few
@given(st.integers(2, 20), st.integers(0, 30), st.floats(1e-4, 1e-1), st.booleans())
def test_the_factor_never_compounds(interval: int, steps: int, lr: float, on: bool) -> None:
    """Weight decay alone shows the rate that a step was taken at; the group's stays as it was set."""
    p = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = AdamWSPAM([p], "seed", lr, weight_decay=1.0, interval=interval, warmup=on, warmup_steps=steps)
    for t in range(1, 45):
        before, p.grad = p.detach().clone(), torch.zeros_like(p)
        optimizer.step()
        factor = warmup_factor("seed", t % interval, steps) if on and t >= interval else 1.0
        assert torch.allclose(p, before * (1 - lr * factor), rtol=1e-14, atol=0)
        assert optimizer.param_groups[0]["lr"] == lr


numbers, squares = st.floats(-1e6, 1e6), st.one_of(st.just(0.0), st.floats(1e-6, 1e6))


@few
@given(st.lists(st.tuples(numbers, squares), min_size=1), st.floats(1, 1e4))
def test_spike_clip(pairs: list[tuple[float, float]], theta: float) -> None:
    before, v = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    after = before.clone()
    clip_spikes(after, v, theta)
    bound = (theta * v).sqrt()
    under = (before.abs() <= bound) | (v == 0)  # where there is no v there is no bound
    assert torch.equal(after[under], before[under])
    assert torch.equal(after.sign(), before.sign())
    assert torch.allclose(after[~under].abs(), bound[~under], rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "form, clipped, left_alone",
    [
        ("seed", (2, 29, 30, 31), (1,)),  # the clip of step 30 comes before its reset
        ("paper", (20, 29, 50), (1, 19, 30, 31, 49)),  # 20 steps after the start and after a reset
    ],
)
def test_no_clip_before_there_is_a_moment(form: Form, clipped: tuple[int, ...], left_alone: tuple[int, ...]) -> None:
    for last in (*clipped, *left_alone):
        p = nn.Parameter(torch.ones(4, dtype=torch.float64))
        optimizer = AdamWSPAM([p], form, interval=30, threshold=0.0, max_norm=0.0)
        for t in range(1, last + 1):
            p.grad = torch.full_like(p, 1e6 if t == last else 1.0)
            optimizer.step()
        assert (p.grad != 1e6).all() if last in clipped else (p.grad == 1e6).all()


def test_a_row_that_was_not_seen_has_no_bound() -> None:
    p = nn.Parameter(torch.ones(2, 3, dtype=torch.float64))
    optimizer = AdamWSPAM([p], "paper")
    for t in range(1, 41):
        p.grad = torch.tensor([[1.0], [0.0 if t < 40 else 0.5]], dtype=torch.float64).expand(2, 3).clone()
        optimizer.step()
    assert (p.grad[1] == 0.5).all() and (p[1] < 1).all()


def test_right_after_a_reset_ordinary_gradients_are_left_alone() -> None:
    """Without its bias correction v would bound them at sqrt(50 x 0.001) = 0.22 of themselves."""
    p = nn.Parameter(torch.ones(5, dtype=torch.float64))
    optimizer = AdamWSPAM([p], interval=7, threshold=0.0, max_norm=0.0)
    for t in range(1, 30):
        p.grad = torch.full_like(p, 1.0 + t % 3)
        optimizer.step()
        assert torch.equal(p.grad, torch.full_like(p, 1.0 + t % 3))


@few
@given(st.sampled_from((0, 9, 10, 11, 99, 100, 101, 130)), st.floats(2, 1e4), st.floats(1e-6, 0.2))
def test_one_outlier_is_one_event(before: int, size: float, noise: float) -> None:
    """Norms that alternate are at most (10 + 1) / sqrt(10 x 12) standard deviations from their mean, one is not."""
    p = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = AdamWSPAM([p], spike_clip=False, reset=False, max_norm=0.0)
    for t in range(before + 20):
        p.grad = torch.full_like(p, size if t == before else 1 + noise * (-1) ** t)
        if t == before and t >= 10:
            kept = [optimizer.state[p][kind].clone() for kind in ("exp_avg", "exp_avg_sq")]
        optimizer.step()
        if t == before and t >= 10:
            assert torch.allclose(optimizer.state[p]["exp_avg"], 0.9 * 0.5 * kept[0] + 0.1 * size)
            assert torch.allclose(optimizer.state[p]["exp_avg_sq"], 0.999 * 0.9 * kept[1] + 0.001 * size**2)
    assert optimizer.shared["events"] == (before >= 10)  # fewer norms say nothing


@pytest.mark.parametrize("size, events", [(1.0199, 0), (1.0201, 1)])
def test_an_outlier_is_more_than_two_population_standard_deviations(size: float, events: int) -> None:
    p = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = AdamWSPAM([p], spike_clip=False, max_norm=0.0)
    for t in range(11):
        p.grad = torch.full_like(p, size if t == 10 else 1 + 0.01 * (-1) ** t)  # 1 +- 0.01, not 0.0105
        optimizer.step()
    assert optimizer.shared["events"] == events


@pytest.mark.parametrize("later, events", [(100, 1), (101, 2)])
def test_the_history_has_the_last_100_norms(later: int, events: int) -> None:
    """With a norm of 10 among them 1.5 is nothing, without it is."""
    p = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = AdamWSPAM([p], spike_clip=False, reset=False, max_norm=0.0)
    for t in range(21 + later):
        p.grad = torch.full_like(p, 10 if t == 20 else 1.5 if t == 20 + later else 1 + 0.01 * (-1) ** t)
        optimizer.step()
    assert optimizer.shared["events"] == events


def test_rounding_is_no_outlier() -> None:
    p = nn.Parameter(torch.ones(1))
    optimizer = AdamWSPAM([p], max_norm=0.0)
    for t in range(20):
        p.grad = torch.full_like(p, 1.0 if t < 19 else 1 + 2.0**-23)  # the first one that is not equal
        optimizer.step()
    assert optimizer.shared["events"] == 0


@few
@given(st.floats(0.1, 0.9), st.integers(2, 12), st.integers(0, 5))
def test_sparse_momentum(density: float, interval: int, seed: int) -> None:
    """What moves between two resets is one draw of the density given; vectors move whole."""
    torch.manual_seed(0)
    matrix, vector = nn.Parameter(torch.zeros(40, 50)), nn.Parameter(torch.zeros(9))
    optimizer = AdamWSPAM([matrix, vector], "paper", density=density, interval=interval, warmup=False, seed=seed)
    draws: list[Tensor] = []
    for t in range(1, 3 * interval):
        before = matrix.detach().clone(), vector.detach().clone()
        matrix.grad, vector.grad = torch.randn_like(matrix), torch.randn_like(vector)
        optimizer.step()
        assert (vector != before[1]).all()
        if t == 1 or t % interval == 0:
            draws.append(matrix != before[0])
            assert draws[-1].float().mean().item() == pytest.approx(density, abs=0.06)  # 5 standard deviations
        assert torch.equal(matrix != before[0], draws[-1])
    assert len(draws) == 3 and not torch.equal(draws[0], draws[1]) and not torch.equal(draws[1], draws[2])


# -- state


@pytest.mark.parametrize(
    "form, changes, dtype",
    [
        ("seed", {}, torch.float32),
        ("seed", {}, torch.bfloat16),
        ("paper", {"density": 0.5}, torch.float32),
        ("stable", {}, torch.bfloat16),
    ],
)
def test_resume_is_exact(form: Form, changes: dict[str, Any], dtype: torch.dtype) -> None:
    """Between a reset and the end of its warm-up, with a history that goes round its ring."""
    if form != "stable":
        changes = {**changes, "warmup_steps": 30}
    straight, parameters = make(form, dtype, interval=100, **changes)
    trained(straight, parameters, 1, 140)

    first, begun = make(form, dtype, interval=100, **changes)
    trained(first, begun, 1, 113)
    state, weights = copy.deepcopy(first.state_dict()), [p.detach().clone() for p in begun]
    second, resumed = make(form, dtype, interval=100, **changes)
    second.load_state_dict(state)
    for p, w in zip(resumed, weights, strict=True):
        p.data.copy_(w)
    trained(second, resumed, 114, 140)

    for p, q in zip(parameters, resumed, strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(straight.state[p][k], second.state[q][k]) for k in straight.state[p])
    assert straight.shared.keys() == second.shared.keys() and second.shared["updates"] == 140
    for key, value in straight.shared.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, second.shared[key]) and second.shared[key].dtype is torch.float32
    if form == "seed":
        assert straight.shared["events"] >= 2


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_loss_scaling_skips_is_none(fused: bool) -> None:
    p = nn.Parameter(torch.ones(5))
    optimizer, scaler = AdamWSPAM([p], fused=fused), torch.amp.GradScaler("cpu")
    for factor in (1.0, math.inf, 1.0):
        before = p.detach().clone()
        scaler.scale((p * p).sum() * factor).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(before, p) == (factor == math.inf) and p.isfinite().all()
    assert optimizer.shared["updates"] == 2 and optimizer.shared["norms"].isfinite().all()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"spam_form": "zscore"}, "optim.spam_form = zscore"),
        ({"spam_theta": 0.0}, "optim.spam_theta = 0.0"),
        (
            {"spam_form": "stable", "spam_theta": 5.0},
            "optim.spam_theta = 5.0: has no meaning with optim.spam_form = stable",
        ),
        ({"spam_form": "stable", "spam_warmup_steps": 5}, "optim.spam_warmup_steps = 5: must be 0 with"),
        ({"spam_interval": 0}, "optim.spam_interval = 0"),
        ({"spam_spike_threshold": -1.0}, "optim.spam_spike_threshold = -1.0: must be at least 0"),
        ({"spam_density": 0.5}, "optim.spam_density = 0.5"),
        ({"spam_form": "paper", "spam_density": 0.5, "spam_periodic_reset": False}, "optim.spam_density = 0.5"),
    ],
)
def test_settings_out_of_bounds(changes: dict[str, Any], message: str) -> None:
    optim = {"optim": {"name": "adamw-spam", **changes}}
    with pytest.raises(ConfigError, match=message):
        build_recipe({"train.max_steps": 1}, optim)
