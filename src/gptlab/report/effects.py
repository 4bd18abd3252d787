"""Which change did it: main effects and two-way interactions of a factorial study, with intervals that hold together.

A main effect is the mean of all runs with the factor on minus the mean of those with it off. An interaction is the
effect of one factor with the other on, minus its effect with the other off. In a fraction some interactions share a
contrast; they are estimated, tested and named together.

Each effect is computed for each seed, and tested by t over the seeds. Its variance is shrunk toward the mean variance
of all contrasts of the arms (Smyth 2004, with fixed prior degrees of freedom). The pooled residual variance alone would
not do: runs of one seed that share a setting also share noise, which then falls on that setting's effect. With half of
the variance shared, its error is 23% instead of 5% (`tests/test_report_effects.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from gptlab.config import Study, factors_on
from gptlab.report import statistics as st
from gptlab.report import words
from gptlab.report.estimates import Plain
from gptlab.report.reading import Array
from gptlab.report.studies import ReadStudy

PRIOR_DF = 2  # the most; see `prior_df`
VERDICTS = ("better", "worse", "equivalent", "not resolved")  # on main effects


@dataclass(frozen=True)
class Contrasts:
    """The contrasts of a factorial's arms."""

    names: list[list[str]]
    """For each, the effects that it stands for: one, or interactions that share it."""
    levels: Array
    """(contrasts, arms), 1 or -1."""

    @property
    def scale(self) -> Array:
        """(contrasts,). A contrast times the arms' values and this is an effect: a difference of two means, or of two
        differences."""
        return np.array([4 if " x " in name else 2 for name, *_ in self.names]) / self.levels.shape[1]


@dataclass(frozen=True)
class Effects:
    """Effects of a factorial; each field is (..., contrasts) or broadcasts to it."""

    mean: Array
    se: Array
    df: float
    p: Array
    """Two-sided, not adjusted."""

    def adjusted(self) -> Array:
        """p over all effects, by Bonferroni: Holm's may be below 5% where the interval below has 0 in it."""
        return np.minimum(1, np.nan_to_num(self.p, nan=1.0) * self.mean.shape[-1])

    def interval(self) -> tuple[Array, Array]:
        """95% intervals that hold all together, by Bonferroni."""
        return st.t_interval(self.mean, self.se, self.df, 1 - st.ALPHA / self.mean.shape[-1])


def contrasts_of(study: Study) -> Contrasts:
    """Main effects, then interactions of two. Interactions with equal levels in all arms are one contrast."""
    on = [set(factors_on(arm, study.baseline)) for arm in study.arms]
    main = {name: np.array([1.0 if name in arm else -1.0 for arm in on]) for name in study.factors}
    found: dict[bytes, tuple[list[str], Array]] = {levels.tobytes(): ([name], levels) for name, levels in main.items()}
    for a, b in itertools.combinations(main, 2):
        product = main[a] * main[b]
        found.setdefault(product.tobytes(), ([], product))[0].append(f"{a} x {b}")
    return Contrasts([names for names, _ in found.values()], np.array([levels for _, levels in found.values()]))


def prior_df(arms: int, seeds: int) -> float:
    """Degrees of freedom by which the mean variance of all contrasts counts.

    As many as keep the error within 5% where all but a tenth of the noise is shared by the runs of one factor, or one
    arm is ten times as noisy as the others (tests/test_report_effects.py).
    """
    return (PRIOR_DF if arms >= 16 else PRIOR_DF / 2) * min(1.0, (seeds - 1) / 2)


def estimate_effects(values: Array, contrasts: Contrasts) -> Effects:
    """Effects from balanced runs.

    Args:
        values: (..., arms, seeds), finite, at least two seeds.
    """
    arms, seeds = values.shape[-2:]
    each = np.swapaxes(contrasts.levels @ values, -1, -2) * contrasts.scale  # (..., seeds, contrasts)
    residuals = values - values.mean(-1, keepdims=True)
    residuals = residuals - residuals.mean(-2, keepdims=True)
    run_variance = (residuals**2).sum((-2, -1)) / ((arms - 1) * (seeds - 1))
    pooled = run_variance[..., None] * arms * contrasts.scale**2
    prior = prior_df(arms, seeds)
    df = seeds - 1 + prior
    variance = ((seeds - 1) * each.var(-2, ddof=1) + prior * pooled) / df
    nothing = np.sqrt(run_variance) <= st.ROUNDING * np.abs(values).max((-2, -1))  # no noise to test against
    mean, se = each.mean(-2), np.where(nothing[..., None], np.nan, np.sqrt(variance / seeds))
    return Effects(mean, se, df, 2 * special.stdtr(df, -np.abs(mean / se)))


def effects_of(read: ReadStudy) -> Plain | None:
    """The effects of a factorial study, with sentences; None if the study has no factors.

    Only seeds in which every arm has a value count, so that each effect compares like with like; `notes` names the runs
    that others lack. Without two such seeds there are no effects.
    """
    study, metric = read.study, read.study.metric
    if not study.factors:
        return None
    contrasts = contrasts_of(study)
    runs = {arm: st.finite(dict(read.values(arm, metric.name).values)) for arm in study.arms}
    seeds = list(dict.fromkeys([*study.seeds, *(seed for _, seed in read.runs)]))
    whole = [seed for seed in seeds if all(seed in values for values in runs.values())]
    result: Plain = {
        "design": _design(study, contrasts, len(whole)),
        "notes": _left_out(read, runs, seeds),
        "effects": [],
    }
    if not _balanced(contrasts):
        return result | {"text": "no effects: the arms are not a balanced factorial"}
    if len(whole) < 2:
        lacking = f"{words.counted(len(whole), 'seed')} so far has" if len(whole) == 1 else "no seed has"
        return result | {"text": f"no effects yet: {lacking} a {metric.name} in every arm, and two must"}
    found = estimate_effects(np.array([[runs[arm][seed] for seed in whole] for arm in study.arms]), contrasts)
    low, high = found.interval()
    adjusted = found.adjusted()
    for i, names in enumerate(contrasts.names):
        sure, beyond = adjusted[i] < st.ALPHA, abs(found.mean[i]) > metric.margin
        verdict = "not resolved"
        if sure and beyond:
            verdict = "interact" if " x " in names[0] else _side(found.mean[i], metric.better)
        elif max(-low[i], high[i]) < metric.margin:
            verdict = "equivalent"
        factor = study.factors.get(names[0])
        effect = {
            "name": names[0],
            "aliases": names[1:],
            "kind": "interaction" if " x " in names[0] else "main effect",
            "note": factor.note if factor else "",
            "effect": found.mean[i],
            "low": low[i],
            "high": high[i],
            "p": found.p[i],
            "p_adjusted": adjusted[i],
            "verdict": verdict,
        }
        result["effects"].append(effect | {"text": _effect_text(effect, words.metric_name(metric.name))})
    return result | {"text": _summary(result["effects"], words.metric_name(metric.name))}


def _side(mean: float, better: str) -> str:
    return "better" if (mean < 0) == (better == "lower") else "worse"


def _balanced(contrasts: Contrasts) -> bool:
    """Whether every contrast compares half of the arms with the other half, and is independent of all others."""
    levels = np.vstack([np.ones(contrasts.levels.shape[1]), contrasts.levels])
    return bool((levels @ levels.T == np.diag([levels.shape[1]] * len(levels))).all())


# -- words ----------------------------------------------------------------------------------------------------------


def effect_name(effect: Mapping[str, object]) -> str:
    """`rope`, or `rope x swiglu or warmup x lr` of interactions that share a contrast."""
    return " or ".join([str(effect["name"]), *effect["aliases"]])  # type: ignore[misc]


def _range(effect: Plain) -> str:
    """`0.23 (0.2 to 0.26)`: the size of an effect, with its interval on the same side."""
    sign = 1 if effect["effect"] >= 0 else -1
    ends = sorted((sign * effect["low"], sign * effect["high"]))
    return f"{abs(effect['effect']):.3g} ({ends[0]:.3g} to {ends[1]:.3g})"


def _effect_text(effect: Plain, metric: str) -> str:
    if not np.isfinite(effect["p"]):
        return f"{effect_name(effect)}: {effect['effect']:+.3g} in {metric}, without a spread to test against"
    if effect["kind"] == "main effect":
        what = f"{effect['name']} {_does(effect)} {metric} by {_range(effect)}"
    else:
        what = (
            f"{effect_name(effect)}: together they change {metric} by {words.signed(*_numbers(effect))} more than the "
        )
        what += "sum of both"
    return f"{what}, p = {effect['p_adjusted']:.2g}: {effect['verdict']}"


def _numbers(effect: Plain) -> tuple[float, float, float]:
    return effect["effect"], effect["low"], effect["high"]


def _summary(effects: Sequence[Plain], metric: str) -> str:
    """One sentence: which changes help and by how much, which do harm, and what is open."""
    main = [effect for effect in effects if effect["kind"] == "main effect"]
    by = {verdict: [e for e in main if e["verdict"] == verdict] for verdict in VERDICTS}
    parts = ["no change is shown to help"]
    if helping := sorted(by["better"], key=lambda e: -abs(e["effect"])):
        does = ("lower" if helping[0]["effect"] < 0 else "raise") + "s" * (len(helping) == 1)
        sizes = _listed([f"{e['name']} by {_range(e)}" for e in helping])
        parts = [f"{len(helping)} of {len(main)} changes {does} {metric}: {sizes}"]
    parts += [f"{e['name']} {_does(e)} it by {_range(e)}, which is worse" for e in by["worse"]]
    if small := by["equivalent"]:
        change = "changes" if len(small) == 1 else "change"
        parts.append(f"{_listed([e['name'] for e in small])} {change} it by less than the margin")
    if unsure := by["not resolved"]:
        parts.append(f"not resolved: {', '.join(e['name'] for e in unsure)}")
    sure = [effect_name(e) for e in effects if e["verdict"] == "interact"]
    parts.append(f"shown to depend on one another: {'; '.join(sure)}" if sure else "no interaction is shown")
    return "; ".join(parts)


def _does(effect: Plain) -> str:
    return "lowers" if effect["effect"] < 0 else "raises"


def _listed(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _design(study: Study, contrasts: Contrasts, seeds: int) -> str:
    k, arms = len(study.factors), len(study.arms)
    part = f"all {arms}" if arms == 2**k else f"{arms} of the {2**k}"
    text = f"{part} combinations of {k} factors, {words.counted(seeds, 'whole seed')}. "
    if arms < 2**k:
        shared = sum(len(names) > 1 for names in contrasts.names)
        text += "Main effects are clear of interactions of two factors, which "
        text += "are named together where they share a contrast" if shared else "are clear of one another"
        text += "; interactions of three or more are taken to be zero. "
    count, prior = len(contrasts.names), prior_df(arms, max(2, seeds))
    return text + (
        f"An effect is the mean over the runs with the factor on minus that with it off. The 95% intervals of all "
        f"{count} effects hold together, and p is over all (Bonferroni). Variances are shrunk toward their mean "
        f"over all contrasts, by {prior:g} prior degrees of freedom."
    )


def _left_out(read: ReadStudy, runs: Mapping[str, Mapping[int, float]], seeds: Sequence[int]) -> list[str]:
    """What is missing in the seeds that are left out, and whether a factor is on in every run that diverged."""
    notes, study = [], read.study
    for seed in seeds:
        lacking = [arm for arm in study.arms if seed not in runs[arm]]
        if not lacking:
            continue
        ended = {arm: read.runs[arm, seed].status if (arm, seed) in read.runs else "not run" for arm in lacking}
        told = ", ".join(f"{arm} {status.replace('_', ' ')}" for arm, status in list(ended.items())[:4])
        more = f" and {len(lacking) - 4} more" if len(lacking) > 4 else ""
        notes.append(f"seed {seed} is left out: no {read.study.metric.name} of {told}{more}")
    diverged = [set(factors_on(arm, study.baseline)) for (arm, _), run in read.runs.items() if run.status == "diverged"]
    if diverged:
        common = [name for name in study.factors if all(name in on for on in diverged)]
        also = f", all with {' and '.join(common)}" if common and len(diverged) > 1 else ""
        runs_text = words.counted(len(diverged), "run")
        notes.append(f"{runs_text} diverged{also}; the effects are of the seeds in which none did")
    return notes
