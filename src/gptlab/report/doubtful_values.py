"""Rules for values that independent runs do not have: the same run twice, too small a spread, too few digits.

Each rule is a function that returns sentences, and states how often it warns of honest runs.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
from scipy import special

from gptlab.logs.divergence import HELD_OUT, plain
from gptlab.logs.run import Array
from gptlab.report import noise, precedents, repeats
from gptlab.report.judged import Judged, listed
from gptlab.report.reading import number
from gptlab.report.words import counted, one_line

RARE = 0.01  # chance that honest seeds repeat as often
SMALL = 0.01  # ... that their spread is as small
REAL_SHARE = 3.0  # a spread may be this many times smaller than any that was measured
OWN_WOBBLE = 0.05  # of the variance of the wobble: what the seeds of an arm do not share, and half of that for safety
WOBBLE_DF = 3  # degrees of freedom of the wobble of ten overlapping differences
NATS = (1.0, 12.0)  # a loss of a language model: for others no noise was measured
CONSTANT = 0.05  # a paired difference has at least this many times the sd of an unpaired one
ROUGH = 1.5  # steps of printing that are this many sds between seeds: a fifth of the variance is rounding
FIVE_DIGITS = 3e-5  # steps of printing over the value


# -- runs that are not several runs


def same_runs(judged: Judged) -> Iterator[str]:
    """Runs whose curves agree: throughout, in their last values, or, of one arm, in their first ones.

    One set of honest runs in a million has such an agreement (`repeats.agreements`).
    """
    whole, end, cut, start = list[str](), list[str](), list[str](), list[str]()
    for one in judged.agreements:
        kind = whole if one.whole else end if not one.start else cut if one.contained else start
        kind.append(f"{judged.name(one.first)} and {judged.name(one.second)} ({one.points} points)")
    ask = "Check the files they come from and judge one of each pair"
    if whole:
        yield f"The same run is there twice, value for value: {listed(whole)}. {ask}."
    if cut:
        yield f"One run is the beginning of the other, value for value: {listed(cut)}. {ask}."
    if end:
        yield f"Runs agree value for value up to their ends: {listed(end)}. {ask}."
    if start:
        yield (
            f"Seeds of one arm begin with the same values: {listed(start)}. They share a beginning, so their spread "
            "is smaller than that of independent runs: check that the seed is set before the model and the data order."
        )


def repeated_values(judged: Judged) -> Iterator[str]:
    """Seeds of an arm with the same final value to the last digit, of which the curves do not show that they are one.

    Two honest seeds agree with chance 0.28 steps of printing over their sd; as many agreements as a warning needs come
    up in one set of a hundred. Where all seeds of all arms agree there is no sd; then five digits are asked of a loss.
    Nothing is said of a share without curves: it may be a count of few.
    """
    known, equal = {i for one in judged.agreements for i in (one.first, one.second)}, list[str]()
    expected, repeated, (sd, _), largest_step = 0.0, 0, judged.spread, 0.0
    largest = max((abs(value) for value in judged.values.values()), default=0.0)
    for arm, indices in judged.arms.items():
        rows: dict[float, list[int]] = defaultdict(list)
        for i in indices:
            key = (arm, judged.runs[i].seed or 0)
            if key in judged.values and i not in known and i not in judged.lost:
                rows[judged.values[key]].append(i)
        n, step = sum(map(len, rows.values())), judged.steps[arm]
        repeated, largest_step = repeated + n - len(rows), max(largest_step, step)
        expected += n * (n - 1) / 2 * repeats.AGREE * step / sd if sd > 0 else 0.0
        equal += [f"{judged.names(same)} ({value:.10g})" for value, same in rows.items() if len(same) > 1]
    if not repeated or (judged.sign < 0 and not any(len(steps) for steps, _ in judged.curves)):
        return
    if sd > 0:
        likely = expected > 0.5 or special.gammainc(repeated, expected) > RARE  # P(Poisson >= repeated)
    else:
        likely = judged.sign < 0 or largest_step > FIVE_DIGITS * largest
    if not likely:
        yield (
            f"Runs repeat to the last digit: {listed(equal)}. Independent runs do not: check that each has its own "
            "seed, and that no value was copied."
        )


def one_seed(judged: Judged) -> Iterator[str]:
    """Runs of an arm whose settings say that they have the same seed."""
    found = []
    for arm, indices in judged.arms.items():
        seeds = [_seeds(judged.runs[i].settings) for i in indices]
        common = set.intersection(*map(set, seeds)) if len(seeds) > 1 else set()
        if common and all(len({one[key] for one in seeds}) == 1 for key in common):
            key = min(common, key=lambda key: (len(key), key))
            found.append(f"{one_line(arm)} ({key} = {seeds[0][key]} in {counted(len(seeds), 'run')})")
    if found:
        yield f"All runs of an arm have the same seed in their settings: {listed(found)}. Check that they are several."


def _seeds(settings: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(value) for key, value in settings.items() if plain(key).endswith("seed") and value is not None}


def copied_arms(judged: Judged) -> Iterator[str]:
    """Arms that are another arm plus a constant, seed by seed.

    Warns of one honest set in a hundred at most, if their paired differences have at least a twentieth of the sd of
    unpaired ones (a correlation over seeds of 0.9975).
    """
    groups: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for arm, own in judged.sound.items():
        if len(own) > 2:
            groups[tuple(sorted(own))].append(arm)
    pairs = sum(len(arms) * (len(arms) - 1) // 2 for arms in groups.values())
    found, equal = list[str](), list[str]()
    for seeds, arms in groups.items():
        block = np.array([[judged.sound[arm][seed] for seed in seeds] for arm in arms])
        variances, df = noise.pair_variances(block), len(seeds) - 1
        least = 2 * CONSTANT**2 * np.minimum.outer(block.var(axis=1, ddof=1), block.var(axis=1, ddof=1))
        rows, columns = np.triu_indices(len(arms), 1)
        least, variances = least[rows, columns], np.maximum(variances[rows, columns], 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            chance = np.where(least > 0, special.fdtr(df, df, variances / least), 1.0)
        for k in np.flatnonzero(chance * pairs < SMALL):
            one, other = block[rows[k]], block[columns[k]]
            shift = float((other - one).mean())
            first, second = one_line(arms[rows[k]]), one_line(arms[columns[k]])
            if (one == other).all():
                equal.append(f"{second} is {first}")
            else:
                found.append(f"{second} is {first} {shift:+.4g}")
    if equal:
        yield f"Arms are equal in every seed: {listed(equal)}. Check that they are not one set of runs."
    if found:
        yield f"Arms differ by the same number in every seed: {listed(found)}. Check that both were measured."


# -- a spread that is too small


def small_spreads(judged: Judged) -> Iterator[str]:
    """Arms whose seeds differ by less than seeds do, by the noise of other settings or by the wobble of their curves.

    Warns of one honest set in a hundred at most for each of the two, if the noise of the runs is at least a third of
    the smallest that was measured (gptlab/noise.toml), and if at most 90% of the variance of the wobble is common to
    the seeds of an arm. Of 19 public configurations the spread is 1.5 to 85 times the wobble.
    """
    rows = {arm: np.array([*own.values()]) for arm, own in judged.sound.items() if len(own) > 1}
    rows = {arm: row for arm, row in rows.items() if np.ptp(row) > 0}  # without a spread: values repeat, or are rounded
    if not rows:
        return
    known = measured_noise(judged, float(np.mean([row.mean() for row in rows.values()])))
    if known:
        sds = {arm: float(row.std(ddof=1)) for arm, row in rows.items()}
        df = np.array([len(row) - 1 for row in rows.values()])
        chance = special.chdtr(df, df * (np.array([*sds.values()]) / (known.run_sd / REAL_SHARE)) ** 2)
        if low := [arm for arm, p in zip(sds, chance, strict=True) if p * len(sds) < SMALL]:
            yield (
                f"The spread between seeds is too small to be real: {_spreads(rows, low)}; measured was "
                f"{known.run_sd:.3g} for {known.text}. Check that each run has its own seed and order of data."
            )
            return
    wobbles = {arm: w for arm in rows if (w := _wobble(judged, arm)) > 0}
    if not wobbles:
        return
    tests = {arm: (float(rows[arm].var(ddof=1)), len(rows[arm]) - 1, w) for arm, w in wobbles.items()}
    total = sum(df for _, df, _ in tests.values())
    pooled = sum(variance * df for variance, df, _ in tests.values()) / total, total, median(wobbles.values())
    low = [arm for arm, test in tests.items() if _below_wobble(*test) * (len(tests) + 1) < SMALL]
    if not low and _below_wobble(*pooled) * (len(tests) + 1) < SMALL:
        low = [*tests]
    if low:
        yield (
            f"The spread between seeds is too small to be real: {_spreads(rows, low)}; one curve wobbles by "
            f"{median(wobbles[arm] for arm in low):.2g} in its last evaluations. Check that each run has its own seed."
        )


def _below_wobble(variance: float, df: int, wobble: float) -> float:
    return float(special.fdtr(df, WOBBLE_DF, np.square(np.sqrt(variance) / wobble) / OWN_WOBBLE))


def _spreads(rows: Mapping[str, Array], arms: Sequence[str]) -> str:
    texts = [
        f"{one_line(arm)} has sd {rows[arm].std(ddof=1):.2g} over {counted(len(rows[arm]), 'seed')}" for arm in arms
    ]
    return listed(texts)


def _wobble(judged: Judged, arm: str) -> float:
    """Of the last evaluations of an arm's runs, the median; NaN if none has enough."""
    found = [repeats.late_wobble(*judged.curves[i]) for i in judged.arms[arm] if i in judged.ends]
    return median([w for w in found if math.isfinite(w)] or [math.nan])


def measured_noise(judged: Judged, mean: float) -> precedents.Precedent | None:
    """The nearest known noise of a language model's held-out loss; the smallest where no run says how large it is."""
    if judged.sign < 0 or not HELD_OUT.fullmatch(plain(judged.metric).removeprefix("final_")) or not within(mean, NATS):
        return None
    names = ("parameters", "n_params", "num_params")
    settings = [setting for run in judged.runs for setting in run.settings.items()]
    sizes = [size for key, value in settings if plain(key) in names and (size := number(value)) >= 1]
    if sizes:
        return precedents.nearest("lm", "final_val_loss", int(min(sizes[0], 1e15)))
    known = [one for one in precedents.precedents() if (one.task, one.metric) == ("lm", "final_val_loss")]
    return min(known, key=lambda one: one.run_sd)


def within(value: float, bounds: tuple[float, float]) -> bool:
    return bounds[0] <= value <= bounds[1]


# -- numbers that were logged too roughly


def sixteen_bits(judged: Judged) -> Iterator[str]:
    """Metrics whose values are all 16-bit numbers: steps of 1/64 around 3. One honest set in a million has such."""
    found = []
    for arm in judged.arms:
        if known := repeats.sixteen_bits(judged.logged(arm, repeats.SAMPLE), repeats.CERTAIN / len(judged.arms)):
            found.append(f"{one_line(arm)} ({known[0]}: steps of 1/{1 / known[1]:g})")
    if found:
        yield (
            f"The {judged.metric} was logged as a 16-bit number: {listed(found)}. Smaller differences are lost: "
            "compute it in float32 and log that."
        )


def rounded(judged: Judged) -> Iterator[str]:
    """Values in steps as large as what seeds differ by: a fifth of their variance is rounding, or more."""
    values = np.array([value for own in judged.sound.values() for value in own.values()])
    sd, df = judged.spread
    if not df or (np.ptp(values) == 0 and values[0] in (0.0, 1.0, 100.0)):
        return
    step = max(judged.steps.values())
    if step > ROUGH * sd and (sd > 0 or step > FIVE_DIGITS * np.abs(values).max()) and not [*sixteen_bits(judged)]:
        yield (
            f"The {judged.metric} comes in steps of {step:.2g}, and the sd between seeds is {sd:.2g}: differences are "
            "lost in rounding. Log more digits."
        )
