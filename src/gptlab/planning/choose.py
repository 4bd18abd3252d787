"""A recipe for some text, some minutes and a machine: how large a model, and how long it trains.

The model is the one on a ladder of sizes whose loss is predicted to be lowest after as many tokens as it can train on
in the time. The prediction is the scaling law of Muennighoff et al. 2023 (arXiv 2305.16264, section 3.1 and appendix A,
constants of their fit), which is Hoffmann et al.'s (2022, arXiv 2203.15556) with data that is read again:

    L(N, D) = E + A / N'^a + B / D'^a,    a = 0.353
    D' = U (1 + R_D (1 - exp(-r / R_D))),       r = D / U - 1 repetitions of U different tokens, R_D = 15.4
    N' = U_N (1 + R_N (1 - exp(-n / R_N))),     n = N / U_N - 1, U_N = 0.051 U parameters, R_N = 5.3

Where the text is never read twice this is about 20 tokens per parameter, and less text asks for a smaller model. The
law was fitted to models of 7M to 9B parameters; for smaller ones it is an extrapolation. Text is read at most
MOST_EPOCHS times, even if that ends the run before its time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from gptlab.config import Recipe, build_recipe
from gptlab.errors import UserError
from gptlab.planning.device import Device
from gptlab.planning.measure import Speed
from gptlab.planning.plan import Plan, plan_recipe

A, B, EXPONENT = math.exp(6.255414), math.exp(7.3049974), 0.3526596
REPEATED_DATA, EXCESS_PARAMETERS = 15.387756, 5.309743  # R_D and R_N
PARAMETERS_PER_TOKEN = (A / B) ** (1 / EXPONENT)  # compute-optimal: 0.051, about 20 tokens for each parameter
MOST_EPOCHS = 16  # the value of reading again has then fallen to 1 / e, see R_D
LEAST_GAIN = 1e-3  # of predicted loss, for which the next size is taken
DEPTHS = (2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32)
EVALUATIONS = 10
START_SECONDS = 8.0  # until training begins, and for the plots at the end: 4 s of a core were measured


def predicted_loss(parameters: float, tokens: float, different: float) -> float:
    """The part of the loss that a choice can lower, see the module.

    Args:
        tokens: trained on, the repeated ones too.
        different: tokens of the text.
    """
    used = min(tokens, different)
    repeated = tokens / used - 1
    data = used * (1 + REPEATED_DATA * -math.expm1(-repeated / REPEATED_DATA))
    fitting = min(parameters, PARAMETERS_PER_TOKEN * used)
    excess = parameters / fitting - 1
    model = fitting * (1 + EXCESS_PARAMETERS * -math.expm1(-excess / EXCESS_PARAMETERS))
    return A / model**EXPONENT + B / data**EXPONENT


def choose(
    data: dict[str, Any],
    different: float,
    seconds: float,
    device: Device,
    measure: Callable[[Recipe, Any, int], Speed | None] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, Any], Plan]:
    """The settings of a recipe for a text and a time, and its plan.

    Args:
        data: the recipe's [data].
        different: training tokens of the text; infinity if it is larger than any run reads.
        seconds: that the whole run may take.
        measure: times the device, see `plan_recipe`.
        say: is told of each size that is looked at.

    Raises:
        UserError: the speed of the device is not known, or not even the smallest model fits it.
    """
    for_training = max(0.8 * seconds, seconds - START_SECONDS)
    regime = _regime(device)

    def planned(depth: int, tokens: float) -> tuple[Recipe, Plan, float]:
        """A rung of the ladder, with the batch for some tokens, and how many it can train on; 0: no fit."""
        recipe = build_recipe(_layer(depth, tokens, different, data, regime))
        plan = plan_recipe(recipe, device, measure=measure)
        fits = bool(plan.largest_micro_batch) and not plan.refused
        if fits and plan.tokens_per_second is None:
            raise UserError("; ".join([f"the speed of {device.name} is unknown", *plan.notes[-1:]]))
        evaluated = (EVALUATIONS + 2) * recipe.eval.tokens / 3  # see plan._hours
        can = max((plan.tokens_per_second or 0) * for_training - evaluated, recipe.batch.tokens_per_step)
        return recipe, plan, min(can, MOST_EPOCHS * different) if fits else 0.0

    best: tuple[float, int, float] | None = None
    tokens = 1e6
    for depth in DEPTHS:
        recipe, plan, tokens = planned(depth, tokens)
        if not tokens:
            break
        loss = predicted_loss(plan.parameters, tokens, different)
        say(f"{_size(recipe, plan)}: {plan.rate}, {tokens:,.0f} tokens in the time")
        if best is not None and loss > (1 - LEAST_GAIN) * best[0]:
            break
        best = loss, depth, tokens
    if best is None:
        raise UserError(f"not even a model of {plan.parameters:,} parameters fits: it {plan.sentence}")
    _, depth, tokens = best
    _, plan, tokens = planned(depth, tokens)  # with the batch for so many tokens
    layer = _layer(depth, tokens, different, data, regime)
    recipe, speed = build_recipe(layer), plan.tokens_per_second
    if not plan.measured or speed is None:
        return layer, plan_recipe(recipe, device, measure=measure)
    return layer, plan_recipe(recipe, device, measure=lambda *_: Speed(speed, plan.notes[-1]))


def _layer(depth: int, tokens: float, different: float, data: dict[str, Any], regime: str) -> dict[str, Any]:
    """The settings of a model of some depth that trains on about so many tokens.

    Width is 64 per layer with heads of 64, as in GPT-2. The other parts and rates are those of the recipe stdlib-demo.
    The tokens of a step grow with those of the run as from stdlib-demo to gpt2-124m-fineweb-edu.
    """
    block = next(size for least, size in ((12, 1024), (8, 512), (4, 256), (0, 128)) if depth >= least)
    while block > 32 and 200 * block > different:  # short text: also its held-out part needs whole windows
        block //= 2
    per_step = max(block, 2 ** round(math.log2(1024 * (tokens / 4e5) ** 0.6)))
    steps = max(1, math.floor(tokens / per_step))
    every = max(1, steps // EVALUATIONS)
    evaluated = min(max(64 * block, block * round(tokens / 100 / block)), 2**20)
    width = 64 * depth
    return {
        "model": {
            "n_layer": depth,
            "n_head": depth,
            "n_embd": width,
            "block_size": block,
            "position": "rope",
            "norm": "rmsnorm",
            "mlp": "swiglu",
            "bias": False,
            "qk_norm": True,
            "zero_init": True,
        },
        "data": data,
        "batch": {"tokens_per_step": per_step},
        "optim": {
            "name": "muon",
            "lr": float(f"{5e-3 * min(1.0, math.sqrt(192 / width)):.2g}"),
            "betas": [0.9, 0.95],
            "muon_lr": 0.025,
            "muon_momentum": 0.9,
            "weight_decay": 0.01,
        },
        "schedule": {"shape": "wsd", "warmup_steps": max(10, steps // 100), "decay_fraction": 0.5},
        "train": {"max_steps": steps, "eval_every": every},
        "eval": {"tokens": evaluated},
        "checkpoint": {"every": every},
        "precision": {"regime": regime},
    }


def _regime(device: Device) -> str:
    if device.kind == "cpu":
        return "fp32"
    if device.gpu is None:
        raise UserError(f"the speed of {device.name} is unknown: --gpu names a known GPU that is like it")
    return "amp_bf16" if device.gpu.bf16 else "amp_fp16" if device.gpu.fp16 else "fp32"


def _size(recipe: Recipe, plan: Plan) -> str:
    return f"{recipe.model.n_layer} layers of {recipe.model.n_embd}, {plan.parameters / 1e6:.3g}M parameters"


def facts(recipe: Recipe, plan: Plan, different: float) -> Iterator[str]:
    """The choice in a few lines."""
    tokens = plan.tokens or 0
    share = tokens / different
    read = "" if not share else f", {share:.0%} of the text" if share < 1 else f", {share:.2g} times the text"
    yield f"{_size(recipe, plan)}; {plan.steps:,} steps of {recipe.batch.tokens_per_step:,} tokens{read}"
    if tokens > 0.95 * MOST_EPOCHS * different:
        yield f"the text is short: reading it more than {MOST_EPOCHS} times would bring little, so the run is shorter"
    yield plan.verdict
    yield from (note for note in plan.notes if note.startswith("the MFU is that of"))
