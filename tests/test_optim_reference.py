"""Every optimizer that `make_optimizer` makes, 200 steps against the papers' rules in float64.

Muon's and SPAM's references stand with their own tests; here they are seen to be given what the settings say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gptlab.config import Model, Optim, load_recipe
from gptlab.errors import ConfigError
from gptlab.model.gpt import build_model
from gptlab.optim.muon import Muon
from gptlab.optim.optimizers import describe, make_optimizer, parameter_groups, set_lr
from gptlab.optim.spam import AdamWSPAM
from gptlab.seeding import address

STEPS, LR, DECAY, BETAS, EPS = 200, 3e-3, 0.1, (0.9, 0.97), 1e-6
Arrays = dict[str, np.ndarray]


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
    ends = [rule("matrix", start) for rule in (adamw(), adamw(amsgrad=True), sgd)]
    for i in range(3):
        assert np.abs(ends[i] - ends[i - 1]).max() > 1e-3


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


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "adamw-spam", "adamw-prune", "muon", "sgd"])
def test_every_parameter_is_in_exactly_one_group(name: str) -> None:
    pytest.importorskip("bitsandbytes")
    model = tiny()
    optimizer = make_optimizer(model, Optim(name=name))  # type: ignore[arg-type]
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    told = describe(optimizer)
    assert told["eps"] == (None if name == "sgd" else 1e-8) and told["eps_is_zero"] is False


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
