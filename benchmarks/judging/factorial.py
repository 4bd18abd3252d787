"""Effects of a factorial study, as `gptlab.report.effects` tests them, and with its two simpler variances."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from numpy.random import Generator
from scipy import special

from gptlab.config import Study
from gptlab.config.factors import two_level_design
from gptlab.config.recipe import merged
from gptlab.report import statistics as st
from gptlab.report.effects import Contrasts, contrasts_of, estimate_effects
from judging.rules import SEEDS, Row, for_power, holm
from judging.worlds import WORLDS, Array, World

CHANGES = (
    ("optim", "lr", 3e-3),
    ("optim", "weight_decay", 0.0),
    ("optim", "grad_clip", 0.0),
    ("model", "position", "rope"),
    ("model", "norm", "rmsnorm"),
    ("model", "mlp", "swiglu"),
)
DESIGNS = ((4, 1), (6, 4))  # factors and fraction, both of 16 arms
EFFECTS = {3: 2.0, 5: 1.2, 10: 0.8}  # planted main effects in sds of a run, by number of seeds


def design(factors: int, fraction: int) -> Contrasts:
    changes = {f"f{k}": {section: {key: value}} for k, (section, key, value) in enumerate(CHANGES[:factors])}
    arms = {}
    for on in two_level_design([*changes], fraction):
        arms["+".join(on) or "none"] = {"settings": merged(*(changes[name] for name in on))}
    factors_ = {name: {"settings": settings} for name, settings in changes.items()}
    content = {"name": "made", "recipe": {"train": {"max_steps": 100}}, "baseline": "none", "arms": arms}
    return contrasts_of(Study.model_validate({**content, "factors": factors_, "fraction": fraction}))


def by_setting(contrasts: Contrasts) -> World:
    """Half of a run's variance is shared by the runs of its seed that have the first factor alike."""

    def draw(rng: Generator, shape: tuple[int, int, int]) -> Array:
        sides = rng.standard_normal((shape[0], 2, shape[2]))
        side = (contrasts.levels[0] > 0).astype(int)
        return (rng.standard_normal(shape) + sides[:, side]) / np.sqrt(2)

    return draw


def factors(draws: int, rng: Generator) -> Iterator[Row]:
    """Factors: some effect or interaction is shown though no factor does anything."""
    for (k, fraction), n in itertools.product(DESIGNS, SEEDS):
        contrasts = design(k, fraction)
        worlds: Mapping[str, World] = {**WORLDS, "half of the noise shared by a setting": by_setting(contrasts)}
        for world, draw in worlds.items():
            x = draw(rng, (draws, contrasts.levels.shape[1], n))
            planted = x[: for_power(draws)] - EFFECTS[n] / 2 * contrasts.levels[1][:, None]
            for variant, (test, stated) in TESTS.items():
                error = (holm(test(x, contrasts)) < st.ALPHA).any(-1).mean()
                power = (holm(test(planted, contrasts))[:, 1] < st.ALPHA).mean()
                size, effect = f"{len(contrasts.names)} effects of {k} factors", f"{EFFECTS[n]:g} sd"
                yield Row("effects of factors", variant, world, size, n, stated, error, draws, effect, power)


def shrunk(x: Array, contrasts: Contrasts) -> Array:
    return estimate_effects(x, contrasts).p


def own(x: Array, contrasts: Contrasts) -> Array:
    """Each effect with its own variance over the seeds."""
    each = (contrasts.levels @ x) * contrasts.scale[:, None]
    n = x.shape[-1]
    return st.t_test(each.mean(-1), each.std(-1, ddof=1) / np.sqrt(n), n - 1)


def pooled(x: Array, contrasts: Contrasts) -> Array:
    """All effects with the variance of the residuals of arms and seeds."""
    arms, n = x.shape[1:]
    residuals = x - x.mean(-1, keepdims=True)
    residuals -= residuals.mean(-2, keepdims=True)
    df = (arms - 1) * (n - 1)
    sd = np.sqrt((residuals**2).sum((-2, -1)) / df)
    mean = x.mean(-1) @ contrasts.levels.T * contrasts.scale
    return 2 * special.stdtr(df, -np.abs(mean) / (sd[:, None] * np.sqrt(arms / n) * contrasts.scale))


TESTS: Mapping[str, tuple[Callable[[Array, Contrasts], Array], float]] = {
    "own": (own, st.ALPHA),
    "pooled": (pooled, st.NAN),
    "shrunk": (shrunk, st.ALPHA),
}
