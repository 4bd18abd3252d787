"""Every optimizer that `make_optimizer` makes, 200 steps against the papers' rules in float64.

The references of Muon, NorMuon and SPAM stand with their own tests; here they are seen to be given the settings. Where
a package has the same optimizer, it is a second reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gptlab.config import OPTIMIZER_NAMES, Model, Optim, load_recipe
from gptlab.errors import ConfigError
from gptlab.model.gpt import build_model
from gptlab.optim.muon import Muon
from gptlab.optim.optimizers import after_update, before_gradients, describe, make_optimizer, parameter_groups, set_lr
from gptlab.optim.spam import AdamWSPAM
from gptlab.seeding import address

STEPS, LR, DECAY, BETAS, EPS = 200, 3e-3, 0.1, (0.9, 0.97), 1e-6
SHAPE = Model(n_layer=1, n_head=2, n_embd=8, block_size=8, vocab_size=11)


class Small(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64, rows: int = 6) -> None:
        super().__init__()
        self.matrix, self.vector = (
            nn.Parameter(torch.from_numpy(np.random.default_rng(i).normal(size=shape)).to(dtype))
            for i, shape in enumerate(((rows, 5), (7,)))
        )


def gradient(name: str, shape: tuple[int, ...], step: int) -> np.ndarray:
    draw = np.random.default_rng(address(name, step))
    return draw.normal(size=shape) * (3.0 if step < 60 else 0.1)  # the second moment falls, for AMSGrad to matter


def lr_at(step: int) -> float:
    return LR * min(1.0, (step + 1) / 20)


def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = STEPS) -> None:
    for step in range(steps):
        for name, p in model.named_parameters():
            p.grad = torch.from_numpy(gradient(name, tuple(p.shape), step)).to(p.dtype)
        set_lr(optimizer, lr_at(step))
        optimizer.step()


def adamw(amsgrad: bool = False) -> Callable[[str, np.ndarray], np.ndarray]:
    """Loshchilov and Hutter 2019, algorithm 2; AMSGrad: Reddi et al. 2018, as PyTorch has it (bias-corrected last)."""

    def trained(name: str, w: np.ndarray) -> np.ndarray:
        m, v, largest = np.zeros_like(w), np.zeros_like(w), np.zeros_like(w)
        for step in range(STEPS):
            g, t, lr = gradient(name, w.shape, step), step + 1, lr_at(step)
            m = BETAS[0] * m + (1 - BETAS[0]) * g
            v = BETAS[1] * v + (1 - BETAS[1]) * g * g
            largest = np.maximum(largest, v)
            square = (largest if amsgrad else v) / (1 - BETAS[1] ** t)
            w = w - lr * (DECAY if w.ndim > 1 else 0.0) * w
            w = w - lr * (m / (1 - BETAS[0] ** t)) / (np.sqrt(square) + EPS)
        return w

    return trained


def sgd(name: str, w: np.ndarray) -> np.ndarray:
    """Heavy ball, the decay in the gradient: v = mu v + (g + wd w), w -= lr v."""
    velocity = np.zeros_like(w)
    for step in range(STEPS):
        g = gradient(name, w.shape, step) + (DECAY if w.ndim > 1 else 0.0) * w
        velocity = BETAS[0] * velocity + g
        w = w - lr_at(step) * velocity
    return w


def decay_of(w: np.ndarray, update: np.ndarray, cautious: bool) -> np.ndarray:
    """lambda x, and with Chen et al. 2025 (arXiv 2510.12402, algorithm 1) lambda I(u x >= 0) x."""
    return (DECAY if w.ndim > 1 else 0.0) * w * ((update * w >= 0) if cautious else 1.0)


def cautious_adamw(name: str, w: np.ndarray) -> np.ndarray:
    m, v = np.zeros_like(w), np.zeros_like(w)
    for step in range(STEPS):
        g = gradient(name, w.shape, step)
        m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g * g
        u = (m / (1 - BETAS[0] ** (step + 1))) / (np.sqrt(v / (1 - BETAS[1] ** (step + 1))) + EPS)
        w = w - lr_at(step) * (u + decay_of(w, u, cautious=True))
    return w


def lion(cautious: bool = False) -> Callable[[str, np.ndarray], np.ndarray]:
    """Chen et al. 2023 (arXiv 2302.06675), algorithm 2."""

    def trained(name: str, w: np.ndarray) -> np.ndarray:
        m = np.zeros_like(w)
        for step in range(STEPS):
            g = gradient(name, w.shape, step)
            u = np.sign(BETAS[0] * m + (1 - BETAS[0]) * g)
            w = w - lr_at(step) * (u + decay_of(w, u, cautious))
            m = BETAS[1] * m + (1 - BETAS[1]) * g
        return w

    return trained


def ademamix(warmup: int, cautious: bool = False) -> Callable[[str, np.ndarray], np.ndarray]:
    """Pagliardini et al. 2024 (arXiv 2409.03137), algorithm 1 and its two schedulers."""
    beta3, alpha = 0.995, 6.0

    def trained(name: str, w: np.ndarray) -> np.ndarray:
        m1, m2, v = np.zeros_like(w), np.zeros_like(w), np.zeros_like(w)
        for step in range(STEPS):
            g, t = gradient(name, w.shape, step), step + 1
            now, rate = min(t * alpha / warmup, alpha), beta3
            if t < warmup:
                start, end = np.log(BETAS[0]), np.log(beta3)
                rate = min(np.exp(start * end / ((1 - t / warmup) * end + (t / warmup) * start)), beta3)
            m1 = BETAS[0] * m1 + (1 - BETAS[0]) * g
            m2 = rate * m2 + (1 - rate) * g
            v = BETAS[1] * v + (1 - BETAS[1]) * g * g
            u = m1 / (1 - BETAS[0] ** t) + now * m2
            u = u / (np.sqrt(v / (1 - BETAS[1] ** t)) + EPS)
            w = w - lr_at(step) * (u + decay_of(w, u, cautious))
        return w

    return trained


def schedule_free(name: str, w: np.ndarray) -> np.ndarray:
    """Defazio et al. 2024 (arXiv 2405.15682): x, y and z as three arrays. Gradients do not depend on the weights."""
    x, z, v, total = w, w, np.zeros_like(w), 0.0
    for step in range(STEPS):
        g, lr = gradient(name, w.shape, step), lr_at(step)
        y = (1 - BETAS[0]) * z + BETAS[0] * x
        v = BETAS[1] * v + (1 - BETAS[1]) * g * g
        z = z - lr * (g / (np.sqrt(v / (1 - BETAS[1] ** (step + 1))) + EPS) + (DECAY if w.ndim > 1 else 0.0) * y)
        total += lr**2  # the rate never falls here, so it is the largest so far
        x = (1 - lr**2 / total) * x + lr**2 / total * z
    return x


def soap(largest_side: int) -> Callable[[str, np.ndarray], np.ndarray]:
    """Vyas et al. 2024 (arXiv 2409.11321), algorithms 3 and 4, with the first step left out as in the authors' code."""

    def trained(name: str, w: np.ndarray) -> np.ndarray:
        grams = [np.zeros((n, n)) for n in w.shape] if w.ndim == 2 else []
        bases = [np.eye(n) for n in w.shape] if w.ndim == 2 else [np.eye(len(w)), np.eye(1)]
        m, v = np.zeros_like(w), np.zeros_like(w)

        def turned(x: np.ndarray, back: bool) -> np.ndarray:
            left, right = bases if back else [q.T for q in bases]
            return (left @ x.reshape(len(x), -1) @ right.T).reshape(x.shape)

        for t in range(STEPS):
            g, lr = gradient(name, w.shape, t), lr_at(t)
            products = [g @ g.T, g.T @ g] if w.ndim == 2 else []
            if t:
                m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * turned(g, False) ** 2
                u = turned(turned(m, False) / (np.sqrt(v) + EPS), True)
                w = w - lr * np.sqrt(1 - BETAS[1] ** t) / (1 - BETAS[0] ** t) * u
                w = w - lr * (DECAY if w.ndim > 1 else 0.0) * w
            for side, product in enumerate(products):
                grams[side] = BETAS[1] * grams[side] + (1 - BETAS[1]) * product
                if len(product) > largest_side:
                    continue
                if t == 0:
                    bases[side] = np.linalg.eigh(grams[side])[1][:, ::-1]
                elif t % 10 == 0:
                    order = np.argsort(-np.diag(bases[side].T @ grams[side] @ bases[side]), kind="stable")
                    bases[side] = np.linalg.qr((grams[side] @ bases[side])[:, order])[0]
                    v = np.take(v, order, side)
        return w

    return trained


MIX = {"name": "ademamix", "ademamix_beta3": 0.995, "ademamix_alpha": 6.0}


@pytest.mark.parametrize(
    "settings, rule",
    [
        ({}, adamw()),
        ({"kernel": "foreach"}, adamw()),
        ({"amsgrad": True}, adamw(amsgrad=True)),
        ({"amsgrad": True, "kernel": "foreach"}, adamw(amsgrad=True)),
        ({"name": "adamw-prune"}, adamw()),
        ({"name": "adamw-prune", "amsgrad": True}, adamw(amsgrad=True)),
        ({"name": "sgd"}, sgd),
        ({"cautious_decay": True}, cautious_adamw),
        ({"name": "lion"}, lion()),
        ({"name": "lion", "cautious_decay": True}, lion(cautious=True)),
        ({**MIX, "ademamix_warmup": 1}, ademamix(1)),
        ({**MIX, "ademamix_warmup": 150}, ademamix(150)),
        ({**MIX, "ademamix_warmup": 300, "cautious_decay": True}, ademamix(300, cautious=True)),
        ({"name": "adamw-schedule-free"}, schedule_free),
        ({"name": "soap"}, soap(10)),
        ({"name": "soap", "soap_largest_side": 5}, soap(5)),
        ({"name": "soap", "soap_largest_side": 1}, soap(1)),
    ],
    ids=lambda part: " ".join(map(str, part.values())) if isinstance(part, dict) else "",
)
def test_200_steps_by_the_rules(settings: dict[str, Any], rule: Callable[[str, np.ndarray], np.ndarray]) -> None:
    model = Small()
    wanted = {name: rule(name, p.detach().numpy().copy()) for name, p in model.named_parameters()}
    optim = Optim(**{"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY, **settings})
    run(model, make_optimizer(model, optim))
    for name, p in model.named_parameters():
        np.testing.assert_allclose(p.detach().numpy(), wanted[name], rtol=1e-6)


def test_the_rules_tell_one_optimizer_from_another() -> None:
    start = np.random.default_rng(0).normal(size=(6, 5))
    rules = [adamw(), adamw(amsgrad=True), sgd, cautious_adamw, lion(), lion(cautious=True)]
    rules += [ademamix(1), ademamix(150), ademamix(300), schedule_free, soap(10), soap(5), soap(1)]
    ends = [rule("matrix", start) for rule in rules]
    for i in range(len(ends)):
        for j in range(i):
            assert np.abs(ends[i] - ends[j]).max() > 1e-3, (i, j)


def package(name: str, model: Small) -> torch.optim.Optimizer:
    """The same optimizer of another library, with the same settings."""
    decays = {"weight_decay": DECAY}
    groups: Any = [{"params": [model.matrix], **decays}, {"params": [model.vector], "weight_decay": 0.0}]
    if name == "adamw-schedule-free":
        theirs = pytest.importorskip("schedulefree").AdamWScheduleFree(groups, lr=LR, betas=BETAS, eps=EPS)
        theirs.train()
        return theirs
    others = pytest.importorskip("pytorch_optimizer")
    if name == "lion":
        return others.Lion(groups, lr=LR, betas=BETAS, **decays)
    if name == "ademamix":
        betas = (*BETAS, 0.995)
        return others.AdEMAMix(groups, lr=LR, betas=betas, alpha=6.0, t_alpha_beta3=150, eps=EPS, weight_decouple=True)
    return others.SOAP(groups, lr=LR, betas=BETAS, eps=EPS, **decays)


@pytest.mark.parametrize(
    "name, tolerance", [("lion", 1e-9), ("ademamix", 1e-3), ("adamw-schedule-free", 1e-9), ("soap", 1e-3)]
)
def test_200_steps_of_another_library(name: str, tolerance: float) -> None:
    """AdEMAMix's authors add 1e-8 to the decay rates in their scheduler; that SOAP has its QR in float32."""
    ours, theirs = Small(), Small()
    settings = {**MIX, "ademamix_warmup": 150} if name == "ademamix" else {"name": name}
    optim = Optim(**{"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY, **settings})
    run(ours, make_optimizer(ours, optim))
    other = package(name, theirs)
    run(theirs, other)
    if name == "adamw-schedule-free":
        other.eval()  # type: ignore[attr-defined]
    for mine, p in zip(ours.parameters(), theirs.parameters(), strict=True):
        np.testing.assert_allclose(mine.detach().numpy(), p.detach().numpy(), rtol=tolerance, atol=tolerance)


def test_the_weights_of_schedule_free_between_updates() -> None:
    """The average between updates, (1 - beta1) z + beta1 x for the gradient, and back if there is no step."""
    model = Small()
    optimizer = make_optimizer(model, Optim(name="adamw-schedule-free", lr=LR, betas=BETAS))
    before_gradients(optimizer)  # before the first update all three are the same
    run(model, optimizer, 5)
    x, z = model.matrix.detach().clone(), optimizer.state[model.matrix]["z"].clone()
    for _ in range(2):
        before_gradients(optimizer)
        torch.testing.assert_close(model.matrix.detach(), (1 - BETAS[0]) * z + BETAS[0] * x)
    after_update(optimizer)
    torch.testing.assert_close(model.matrix.detach(), x)
    assert (x - z).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["adamw", "muon", "lion", "soap"])
def test_the_average_of_the_weights(name: str) -> None:
    """Between updates the parameters are the mean of the raw weights, with powers of 0.9 as weights."""
    plain, averaged = (build_model(SHAPE, "cpu", torch.float64, 1) for _ in range(2))
    optim = Optim(name=name, lr=LR, weight_decay=DECAY)
    one, other = make_optimizer(plain, optim), make_optimizer(averaged, optim, ema=0.9)
    after_update(other)
    raw: list[torch.Tensor] = []
    for step in range(12):
        for (key, p), q in zip(plain.named_parameters(), averaged.parameters(), strict=True):
            p.grad, q.grad = (torch.from_numpy(gradient(key, tuple(p.shape), step)) for _ in range(2))
        before_gradients(other)
        for p, q in zip(plain.parameters(), averaged.parameters(), strict=True):
            assert torch.equal(p, q)  # the raw weights are those of a run without
        one.step()
        other.step()
        raw.append(torch.cat([p.detach().flatten() for p in plain.parameters()]))
        shares = torch.tensor([0.9 ** (step - i) for i in range(step + 1)], dtype=torch.float64)
        mean = (torch.stack(raw) * (shares / shares.sum())[:, None]).sum(0)
        torch.testing.assert_close(torch.cat([p.detach().flatten() for p in averaged.parameters()]), mean)
        after_update(other)  # nothing is left to do
    before_gradients(other)
    after_update(other)  # a step that loss scaling skips
    torch.testing.assert_close(torch.cat([p.detach().flatten() for p in averaged.parameters()]), mean)


# -- eight bits


def dynamic_map(signed: bool) -> np.ndarray:
    """The 256 numbers of dynamic tree quantisation (Dettmers et al. 2022, arXiv 2110.02861, figure 2).

    The leading zeros of a byte are a power of ten, from 1e-6 up, what is behind them a fraction in [0.1, 1], which
    stands for the middle of its interval; without a sign there is a bit more for the fraction.
    """
    numbers = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1)
        fractions = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (i - 6)
        numbers += [*fractions, *(-fractions if signed else [])]
    return np.sort(numbers)


def blocks(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, 256)


def test_eight_bits_by_their_own_rule() -> None:
    """From the state that is there the next one and the weights follow: a scale for 256 numbers, and the nearest code.

    Nearest for bitsandbytes on a CPU is by a table of 2^16 numbers.
    """
    pytest.importorskip("bitsandbytes")
    model = Small(torch.float32, rows=1024)  # 5,120 numbers; smaller tensors are kept in full
    optimizer = make_optimizer(model, Optim(name="adamw_8bit", lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY))
    p, differing = model.matrix, 0
    maps = {"1": dynamic_map(signed=True), "2": dynamic_map(signed=False)}
    moments = {key: np.zeros(p.shape) for key in maps}
    for step in range(STEPS):
        w, g, lr, t = p.detach().double().numpy(), gradient("matrix", tuple(p.shape), step), lr_at(step), step + 1
        g = g.astype(np.float32).astype(np.float64)
        for q in model.parameters():
            q.grad = torch.from_numpy(gradient("matrix" if q is p else "vector", tuple(q.shape), step)).float()
        m = BETAS[0] * moments["1"] + (1 - BETAS[0]) * g
        v = BETAS[1] * moments["2"] + (1 - BETAS[1]) * g * g
        change = (m / (1 - BETAS[0] ** t)) / (np.sqrt(v / (1 - BETAS[1] ** t)) + EPS)
        set_lr(optimizer, lr)
        optimizer.step()
        np.testing.assert_allclose(p.detach().numpy(), w * (1 - lr * DECAY) - lr * change, rtol=1e-6, atol=3e-7)
        state = optimizer.state[p]
        for key, wide in (("1", m), ("2", v)):
            np.testing.assert_allclose(state[f"qmap{key}"].numpy(), maps[key], rtol=1e-5, atol=1e-9)
            scale = np.abs(blocks(wide)).max(1)
            np.testing.assert_allclose(state[f"absmax{key}"].numpy(), scale, rtol=1e-5)
            x = blocks(wide) / scale[:, None]  # in [-1, 1]
            nearest = np.abs(x - maps[key][np.searchsorted((maps[key][1:] + maps[key][:-1]) / 2, x)])
            kept = state[f"state{key}"].numpy().reshape(-1, 256)
            assert np.all(np.abs(maps[key][kept] - x) <= nearest + 2.0**-15)
            differing += int((np.abs(maps[key][kept] - x) > nearest + 1e-6).sum())
            moments[key] = state[f"qmap{key}"].double().numpy()[kept] * state[f"absmax{key}"].double().numpy()[:, None]
            moments[key] = moments[key].reshape(p.shape)
    assert differing < 0.03 * 2 * STEPS * p.numel()


# -- settings


def tiny() -> nn.Module:
    return build_model(Model(n_layer=2, n_head=2, n_embd=8, block_size=8, vocab_size=11, bias=True), init=1)


@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
def test_every_parameter_is_in_exactly_one_group(name: str) -> None:
    pytest.importorskip("bitsandbytes")
    model = tiny()
    optimizer = make_optimizer(model, Optim(name=name))  # type: ignore[arg-type]
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    told = describe(optimizer)
    assert told["eps"] == (None if name in ("sgd", "lion") else 1e-8) and told["eps_is_zero"] is False


def test_spam_is_given_its_settings() -> None:
    """Defaults are the form's, as published; each setting reaches the optimizer."""
    model = tiny()
    seed = make_optimizer(model, Optim(name="adamw-spam", betas=(0.9, 0.999)), seed=3)
    assert isinstance(seed, AdamWSPAM) and seed.defaults["amsgrad"] and seed.defaults["fused"]
    assert (seed.form, seed.theta, seed.threshold, seed.interval, seed.warmup_steps) == ("seed", 50.0, 2.0, 1000, 100)
    assert seed.spike_clip and seed.reset and seed.warmup and (seed.max_norm, seed.density, seed.seed) == (1.0, 1.0, 3)
    paper = make_optimizer(model, Optim(name="adamw-spam", spam_form="paper"))
    assert (paper.theta, paper.threshold, paper.interval, paper.warmup_steps) == (5000.0, 0.0, 500, 150)
    assert not paper.defaults["amsgrad"]
    stable = make_optimizer(model, Optim(name="adamw-spam", spam_form="stable"))
    assert (stable.interval, stable.warmup_steps, stable.defaults["amsgrad"]) == (1000, 0, False)
    other = Optim(
        name="adamw-spam",
        kernel="foreach",
        grad_clip=0.0,
        amsgrad=False,
        spam_form="paper",
        spam_enable_clip=False,
        spam_spike_threshold=3.0,
        spam_theta=7.0,
        spam_periodic_reset=True,
        spam_interval=11,
        spam_warmup=False,
        spam_warmup_steps=4,
        spam_density=0.5,
    )
    made = make_optimizer(model, other)
    assert (made.spike_clip, made.threshold, made.theta, made.reset, made.interval) == (False, 3.0, 7.0, True, 11)
    assert (made.warmup, made.warmup_steps, made.density, made.max_norm) == (False, 4, 0.5, 0.0)
    assert made.defaults["foreach"] and not made.defaults["amsgrad"] and not made.defaults["fused"]


def test_muon_is_given_its_settings() -> None:
    optimizer = make_optimizer(tiny(), Optim(name="muon", muon_lr=0.03, muon_momentum=0.9, lr=1e-3))
    assert isinstance(optimizer, Muon) and optimizer.param_groups[0]["momentum"] == 0.9
    set_lr(optimizer, 5e-4)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.015) and optimizer.param_groups[-1]["lr"] == 5e-4


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"optim.name": "adamw-prune"}, "optim.name = adamw-prune: works only with sparsity.method = state, not none"),
        ({"sparsity.method": "state"}, "sparsity.method = state: works only with optim.name = adamw-prune, not adamw"),
        (
            {"sparsity.method": "2:4", "sparsity.target": 0.6},
            "sparsity.method = 2:4: always gives sparsity 0.5; remove",
        ),
        ({"sparsity.method": "rigl", "sparsity.begin": 0.8}, "sparsity.begin = 0.8: must be before"),
        ({"optim.name": "muon", "optim.amsgrad": "true"}, "optim.amsgrad = true: works only with optim.name = adamw, "),
        (
            {"optim.name": "sgd", "optim.kernel": "foreach"},
            "optim.kernel = foreach: works only with optim.name = adamw, ",
        ),
        (
            {"optim.name": "adamw-spam", "optim.spam_form": "stable", "optim.spam_theta": "50"},
            "has no meaning with optim.spam_form = stable",
        ),
        (
            {"optim.name": "adamw-spam", "optim.spam_form": "stable", "optim.spam_warmup_steps": "5"},
            "must be 0 with optim.spam_form",
        ),
        (
            {"optim.name": "adamw-spam", "optim.spam_density": "0.5"},
            "below 1 works only with optim.spam_form = paper and resets",
        ),
        (
            {"optim.name": "lion", "optim.kernel": "foreach"},
            "optim.kernel = foreach: works only with optim.name = adamw, ",
        ),
        (
            {"optim.name": "sgd", "optim.cautious_decay": "true"},
            "optim.cautious_decay = true: works only with optim.name = adamw, lion, ademamix, muon or normuon",
        ),
        (
            {"optim.name": "muon", "optim.cautious_decay": "true", "precision.regime": "bf16_pure"},
            "optim.cautious_decay = true: does not work with optim.name = muon and bf16_pure",
        ),
        (
            {"optim.name": "adamw-schedule-free"},
            "schedule.shape = cosine: must be constant with optim.name = adamw-schedule-free",
        ),
        (
            {"optim.name": "soap", "precision.regime": "bf16_pure"},
            "optim.name = soap: does not work with precision.regime = bf16_pure",
        ),
        (
            {"optim.name": "soap-muon", "precision.regime": "bf16_pure"},
            "optim.name = soap-muon: does not work with precision.regime = bf16_pure",
        ),
        (
            {"optim.name": "soap", "sparsity.method": "magnitude"},
            "sparsity.method = magnitude: does not work with optim.name = soap",
        ),
        ({"train.ema": "0.9", "sparsity.method": "rigl"}, "sparsity.method = rigl: does not work with train.ema = 0.9"),
        (
            {"train.ema": "0.9", "precision.regime": "bf16_pure"},
            "train.ema = 0.9: does not work with precision.regime = bf16_pure",
        ),
        (
            {"train.ema": "0.9", "optim.name": "adamw-schedule-free", "schedule.shape": "constant"},
            "train.ema = 0.9: does not work with optim.name = adamw-schedule-free",
        ),
        ({"optim.spam_theta": "0"}, "optim.spam_theta = 0: must be greater than 0 or 'auto'"),
        (
            {
                "task": "classify",
                "model.mlp": "gelu_erf",
                "model.position": "learned",
                "model.bias": "true",
                "faults.batch_every": "5",
            },
            "faults.batch_every = 5: works only with task = lm",
        ),
    ],
)
def test_settings_that_exclude_one_another(settings: dict[str, str], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_recipe("smoke-lm", settings)
    assert sentence in str(error.value)


def test_groups_have_a_decay_where_they_should() -> None:
    decays, rest = parameter_groups(tiny(), 0.3)
    assert decays["weight_decay"] == 0.3 and rest["weight_decay"] == 0.0
    assert {p.dim() for p in decays["params"]} == {2} and {p.dim() for p in rest["params"]} == {1}  # type: ignore
