"""The guard on synthetic loss curves: healthy ones of many families must pass, divergences must be found soon."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_recipe
from test_training_resume import train_until

from gptlab.guard import Divergence, Guard
from gptlab.rundir import RunDir
from gptlab.training.checkpoint import list_checkpoints
from gptlab.training.loop import train

Curve = np.ndarray
Draw = np.random.Generator


# --- healthy curves: a base, what may happen to it, and noise; each family by name


def language_model(draw: Draw, n: int) -> tuple[Curve, float]:
    """From the vocabulary's entropy past the unigram's, then a power law."""
    first = math.log(draw.choice([65, 2048, 50257]))
    constant = first * draw.uniform(0.65, 0.8)
    floor, t = constant * draw.uniform(0.2, 0.6), np.arange(n)
    return floor + (first - floor) * (1 + t / draw.uniform(3, 60)) ** -draw.uniform(0.3, 0.8), constant


def masked_language_model(draw: Draw, n: int) -> tuple[Curve, float]:
    """Rests a little under the unigram entropy for long, then learns."""
    constant, t = draw.uniform(7, 7.8), np.arange(n)
    plateau, end = constant * draw.uniform(0.85, 0.985), constant * draw.uniform(0.3, 0.6)
    leaves, width = draw.uniform(150, 1200), draw.uniform(20, 150)
    rest = plateau + (10.82 - plateau) * np.exp(-t / draw.uniform(10, 80))
    return rest - (plateau - end) / (1 + np.exp(-(t - leaves) / width)), constant


def multi_label(draw: Draw, n: int) -> tuple[Curve, float]:
    """0.69 a label falls to the label frequencies', rests there for up to 600 steps, then learns."""
    constant, t = math.exp(draw.uniform(math.log(0.01), math.log(0.2))), np.arange(n)
    leaves, speed, end = draw.uniform(50, 600), draw.uniform(50, 400), constant * draw.uniform(0.2, 0.8)
    learnt = (constant - end) * (1 - np.exp(-np.clip(t - leaves, 0, None) / speed))
    return constant + (0.693 - constant) * np.exp(-t / draw.uniform(5, 40)) - learnt, constant


def memorised(draw: Draw, n: int) -> tuple[Curve, float]:
    """A small dataset learnt by heart: the loss falls by orders of magnitude."""
    constant, t = draw.uniform(2, 8), np.arange(n)
    return constant * (draw.uniform(0.002, 0.1) + 1.3 * np.exp(-t / draw.uniform(30, 300))), constant


def classification(draw: Draw, n: int) -> tuple[Curve, float]:
    """Starts at the constant predictor's loss."""
    constant, t = draw.uniform(0.69, 6.9), np.arange(n)
    end, speed = draw.uniform(0.1, 0.8), draw.uniform(50, 500)
    return constant * (end + (1 - end) * np.exp(-t / speed)), constant


def finetuned(draw: Draw, n: int) -> tuple[Curve, float]:
    """Starts well below the constant predictor's loss, and has little left to learn or much."""
    constant, t = math.exp(draw.uniform(math.log(0.1), math.log(8))), np.arange(n)
    first, end = constant * draw.uniform(0.05, 0.85), draw.uniform(0.4, 1.0)
    return first * (end + (1 - end) * (1 + t / draw.uniform(3, 300)) ** -draw.uniform(0.3, 0.8)), constant


BASES = [language_model, masked_language_model, multi_label, memorised, classification, finetuned]


def calm(draw: Draw, curve: Curve, constant: float) -> Curve:
    return curve


def spikes(draw: Draw, curve: Curve, constant: float) -> Curve:
    """Up by several nats for up to 20 steps, then back in up to as many."""
    curve, scale = curve.copy(), max(constant, curve[0])
    for at in range(draw.integers(0, 300), len(curve), draw.integers(150, 500)):
        rise, top, decay = draw.integers(0, 6), draw.integers(0, 21), draw.uniform(0.1, 10)
        shape = np.concatenate([np.arange(1, rise + 1) / (rise + 1), np.ones(top), np.exp(-np.arange(100) / decay)])
        curve[at : at + len(shape)] += scale * draw.uniform(0.05, 0.9) * shape[: len(curve) - at]
    return curve


def slow_recoveries(draw: Draw, curve: Curve, constant: float) -> Curve:
    """Up at once, back over a hundred steps."""
    curve = curve.copy()
    for at in range(draw.integers(0, 300), len(curve), 300):
        t = np.arange(len(curve) - at)
        curve[at:] += constant * draw.uniform(0.1, 0.6) * np.exp(-t / draw.uniform(10, 30))
    return curve


def other_domains(draw: Draw, curve: Curve, constant: float) -> Curve:
    """Sequential data: the loss is 10-20% higher in some of its stretches, or from one on."""
    cuts = np.sort(draw.integers(30, len(curve), draw.integers(1, 8)))
    factor = 1 + draw.uniform(0.1, 0.2) * (np.searchsorted(cuts, np.arange(len(curve))) % 2)
    return curve * factor


def drift(draw: Draw, curve: Curve, constant: float) -> Curve:
    t = np.arange(len(curve))
    wave = np.sin(2 * np.pi * (t / draw.uniform(80, 1000) + draw.uniform()))
    return curve * (1 + draw.uniform(0, 0.1) * wave + draw.uniform(0, 0.15) * t / len(curve))


def warmup_bump(draw: Draw, curve: Curve, constant: float) -> Curve:
    """The learning rate peaks and the loss rises for a while."""
    t, peak = np.arange(len(curve)), draw.uniform(20, 300)
    return curve * (1 + draw.uniform(0.05, 0.25) * np.exp(-(((t - peak) / draw.uniform(10, 60)) ** 2)))


def restarts(draw: Draw, curve: Curve, constant: float) -> Curve:
    """The learning rate jumps back up every so often, or the optimizer's state was lost."""
    since = np.arange(len(curve)) % draw.integers(150, 700)
    first = np.arange(len(curve)) == since
    return curve * (1 + np.where(first, 0, draw.uniform(0.05, 0.25) * np.exp(-since / draw.uniform(10, 150))))


def epochs(draw: Draw, curve: Curve, constant: float) -> Curve:
    """A staircase: the loss drops where the data repeats; within an epoch it goes from easy to hard."""
    length = draw.integers(100, 600)
    epoch, share = np.divmod(np.arange(len(curve)), length)
    return curve * draw.uniform(0.75, 0.97) ** epoch * (1 + draw.uniform(0, 0.2) * share / length)


EVENTS = [calm, spikes, slow_recoveries, other_domains, drift, warmup_bump, restarts, epochs]
OF_DATA = [other_domains, drift, epochs]  # a held-out loss does not have them


def gaussian(draw: Draw, n: int) -> Curve:
    return draw.normal(size=n)


def heavy_tailed(draw: Draw, n: int) -> Curve:
    return draw.standard_t(3, size=n) / math.sqrt(3)


def skewed(draw: Draw, n: int) -> Curve:
    """Small batches: now and then one of them is hard."""
    return (draw.gamma(1.5, size=n) - 1.5) / math.sqrt(1.5)


def correlated(draw: Draw, n: int) -> Curve:
    """Neighbouring batches come from the same documents; up to two thirds of the others' size."""
    memory = draw.uniform(0.5, 0.9)
    kicks = draw.normal(size=n) * math.sqrt(1 - memory**2)
    return np.array(list(itertools.accumulate(kicks, lambda value, kick: memory * value + kick))) * 2 / 3


def uneven(draw: Draw, n: int) -> Curve:
    """Calm and noisy stretches take turns."""
    return draw.normal(size=n) * np.repeat(draw.choice([0.2, 1.0], size=n // 40 + 1), 40)[:n]


NOISES = [gaussian, heavy_tailed, skewed, correlated, uneven]
FAMILIES = list(itertools.product(BASES, EVENTS, NOISES))  # 240


def noisy(draw: Draw, curve: Curve, noise, sd: float) -> Curve:
    """Noise of `sd` times the level; a loss is positive."""
    return np.maximum(curve * (1 + sd * noise(draw, len(curve))), curve * 0.02)


def healthy(
    family: int, seed: int, shortest: int, longest: int
) -> tuple[list[float], float | None, list[bool], dict[int, float]]:
    """Losses, the constant predictor's loss (or None: not known), which updates the loss scaler left out, and the
    held-out loss before the first of them.
    """
    draw = np.random.default_rng([family, seed])
    base, event, noise = FAMILIES[family % len(FAMILIES)]
    curve, constant = base(draw, int(draw.integers(shortest, longest + 1)))
    sd = draw.uniform(0.002, 0.15)
    losses = noisy(draw, event(draw, curve, constant), noise, sd)
    skipped = draw.random(len(losses)) < draw.choice([0, 0.01, 0.5])
    unknown = draw.random() < 0.3 and base is not finetuned  # what that had learnt before would not be known
    return losses.tolist(), (None if unknown else constant), skipped.tolist(), {0: float(curve[0])}


def evaluated(family: int, seed: int) -> tuple[list[float], float | None, dict[int, float]]:
    """A healthy run that is evaluated: losses, the constant predictor's loss, held-out losses by steps done.

    Half of the runs overfit: the held-out loss rises by up to six times what it was, the training loss falls.
    """
    draw = np.random.default_rng([family, seed, 1])
    base, event, noise = FAMILIES[family]
    clean, constant = base(draw, int(draw.integers(300, 1201)))
    curve, share = event(draw, clean, constant), np.linspace(0, 1, len(clean))
    held_out = (clean if event in OF_DATA else curve) * (1 + draw.uniform(-0.1, 0.3) * np.minimum(share * 5, 1))
    if draw.random() < 0.5:
        begins, height = draw.uniform(0.05, 0.8), draw.uniform(0, 6)
        overfit = np.clip((share - begins) / (1 - begins), 0, 1) ** draw.uniform(0.5, 2)
        held_out, curve = held_out + height * np.min(held_out) * overfit, curve * (1 - draw.uniform(0, 0.97) * overfit)
    held_out = noisy(draw, held_out, NOISES[draw.integers(len(NOISES))], draw.uniform(0, 0.04))
    every = int(draw.choice([1, 5, 20, 50, 100, 250, len(clean)]))
    steps = {*range(0, len(clean), every), len(clean)}  # as training does
    losses = noisy(draw, curve, noise, draw.uniform(0.002, 0.15))
    at = {step: float(held_out[min(step, len(clean) - 1)]) for step in sorted(steps)}
    return losses.tolist(), (None if draw.random() < 0.3 and base is not finetuned else constant), at


def watch(
    losses: list[float],
    constant: float | None,
    skipped: list[bool] | None = None,
    held_out: dict[int, float] | None = None,
) -> tuple[int, Divergence] | None:
    """The step at which the guard raised the alarm, and its verdict."""
    guard, held_out = Guard(constant, warmup_steps=100), held_out or {}
    for step in range(len(losses) + 1):
        skip = skipped is not None and step > 0 and skipped[step - 1]
        if step and (verdict := guard.update(step, losses[step - 1], math.inf if skip else 1.0, skip)):
            return step, verdict
        if step in held_out and (verdict := guard.evaluated(step, held_out[step], step == len(losses))):
            return step, verdict
    return None


# --- divergences: what happens to a healthy curve from a step on; `t` is 1 at the first step of it


def jump(draw: Draw, t: Curve, level: float, target: float) -> Curve:
    return np.full(len(t), target)


def ramp(draw: Draw, t: Curve, level: float, target: float) -> Curve:
    return level + (target - level) * np.minimum(t / draw.integers(5, 31), 1)


def overshoot(draw: Draw, t: Curve, level: float, target: float) -> Curve:
    return target + (target - level) * draw.uniform(0.5, 3) * np.exp(-t / draw.uniform(2, 8))


def exponential(draw: Draw, t: Curve, level: float, target: float) -> Curve:
    """From what shows on a plot: a tenth of the way to the target, at most to the constant predictor's loss."""
    return level + 0.1 * (target - level) * np.exp(np.minimum(t / draw.uniform(1, 6), 600))


def oscillating(draw: Draw, t: Curve, level: float, target: float) -> Curve:
    """A blow-up that swings."""
    swing = 1 + draw.uniform(0.3, 0.8) * np.sin(2 * np.pi * t / draw.uniform(2, 15))
    return level + (target - level) * swing * np.minimum(t / draw.integers(1, 16), 1) * np.exp(
        t / draw.uniform(20, 200)
    )


def collapse(draw: Draw, t: Curve, level: float, target: float) -> Curve:
    """To the constant predictor's loss, which hardly varies."""
    return level + (target - level) * np.minimum(t / draw.integers(1, 31), 1)


RISES = [jump, ramp, overshoot, exponential, oscillating, collapse]


def diverging(rise, seed: int) -> tuple[list[float], float, int]:
    """Losses, the constant predictor's, and the step (from 1) at which the divergence began."""
    for attempt in itertools.count():
        draw = np.random.default_rng([RISES.index(rise), seed, attempt])
        curve, constant = BASES[draw.integers(len(BASES))](draw, int(draw.integers(300, 1500)))
        sd, began = draw.uniform(0.002, 0.15), int(draw.integers(60, len(curve) - 80))
        level = curve[began - 1]
        if max(level, 0.9 * curve[began - 50]) < 0.6 * constant:  # it had learnt something, and not only just now
            break
    t = np.arange(1.0, len(curve) - began + 1)
    losses = noisy(draw, curve, NOISES[draw.integers(len(NOISES))], sd)
    if rise is collapse:
        risen = rise(draw, t, level, constant * draw.uniform(0.99, 1.05))
    else:
        risen = rise(draw, t, level, constant * draw.uniform(1.15, 4))
    losses[began:] = noisy(draw, risen, gaussian, sd if rise is not collapse else min(sd, 0.03))
    return losses.tolist(), constant, began + 1


def low_start(at: int, times: float, seed: int) -> tuple[list[float], float]:
    """Starts well below the constant predictor's loss, is at that loss or a multiple of it from a step on, and stays.

    What had been learnt before is 40% to 90% of that loss; steps count from 1.
    """
    draw = np.random.default_rng([at, int(times), seed])
    constant, sd = math.exp(draw.uniform(math.log(0.1), math.log(8))), draw.uniform(0.002, 0.05)
    low = noisy(draw, np.full(at - 1, constant * draw.uniform(0.1, 0.6)), NOISES[draw.integers(len(NOISES))], sd)
    high = noisy(draw, np.full(100, constant * times * draw.uniform(0.99, 1.03)), gaussian, min(sd, 0.03))
    return [*low.tolist(), *high.tolist()], constant


def wild(seed: int) -> tuple[list[float], float, None, dict[int, float]]:
    """Breaks early, and the training loss swings: one in three to eight is where it was, the others are anywhere above.

    The held-out loss is up and falls slowly, as the learning rate does. It is evaluated five times.
    """
    draw = np.random.default_rng([seed, 2])
    curve, constant = language_model(draw, 400)
    began, height = int(draw.integers(10, 150)), curve[0] * draw.uniform(3, 8)
    fall = np.exp(-np.arange(400 - began) / draw.uniform(400, 1000))
    losses = noisy(draw, curve, gaussian, draw.uniform(0.002, 0.1))
    up = draw.random(400 - began) < draw.uniform(2 / 3, 7 / 8)
    losses[began:] += up * height * fall * np.exp(draw.normal(0, 1, 400 - began))
    held_out = [*curve[:began], *(height * fall), height * fall[-1]]
    return losses.tolist(), constant, None, {step: float(held_out[step]) for step in range(0, 401, 100)}


# --- how often the guard is wrong on them


def false_alarms(seeds: range, shortest: int, longest: int) -> list[str]:
    """One curve of each family for each seed."""
    alarms = []
    for family, seed in itertools.product(range(len(FAMILIES)), seeds):
        if found := watch(*healthy(family, seed, shortest, longest)):
            alarms.append(f"{'/'.join(part.__name__ for part in FAMILIES[family])} seed {seed}: {found}")
    return alarms


def upper_bound(hits: int, trials: int) -> float:
    """95% upper bound of a rate: with it, so few hits would come up once in twenty."""
    rates = np.arange(1, 10_000) / 1_000_000
    chance = sum(math.comb(trials, k) * rates**k * (1 - rates) ** (trials - k) for k in range(hits + 1))
    return float(rates[np.argmax(chance <= 0.05)])


def check_found(seeds: range) -> None:
    """Every divergence is noticed within 50 steps of its beginning, is named right and dated right."""
    for rise in RISES:
        off = []
        for seed in seeds:
            losses, constant, began = diverging(rise, seed)
            found = watch(losses, constant)
            assert found is not None, f"{rise.__name__} {seed}: missed"
            step, verdict = found
            assert began <= step <= began + 50, f"{rise.__name__} {seed}: began at {began}, noticed at {step}"
            assert verdict.kind == ("collapse" if rise is collapse else "spike"), f"{rise.__name__} {seed}: {verdict}"
            off.append(abs(verdict.step - began))
        assert np.median(off) <= 2, rise.__name__
        assert np.quantile(off, 0.9) <= 10, f"{rise.__name__}: {sorted(off)}"  # a ramp shows where it leaves the noise


def check_low_starts(seeds: range) -> None:
    """A jump of a run that starts low is noticed within 50 steps, named and dated right; at most 1% are missed."""
    for at, times in itertools.product((2, 3, 5, 10, 40), (1.0, 2.0)):
        missed, off = 0, []
        for seed in seeds:
            found = watch(*low_start(at, times, seed))
            if found is None or found[0] > at + 50:
                missed += 1
                continue
            assert found[1].kind == ("collapse" if times == 1 else "spike"), f"{at} {times} {seed}: {found}"
            off.append(abs(found[1].step - at))
        assert np.quantile(off, 0.9) <= 2, f"{at} {times}: {sorted(off)}"
        assert missed <= len(seeds) / 100, f"to {times} times the constant predictor's loss at step {at}: {missed}"


def evaluation_alarms(seeds: range) -> list[str]:
    """One evaluated run of each family for each seed."""
    alarms = []
    for family, seed in itertools.product(range(len(FAMILIES)), seeds):
        losses, constant, held_out = evaluated(family, seed)
        if found := watch(losses, constant, None, held_out):
            alarms.append(f"{'/'.join(part.__name__ for part in FAMILIES[family])} seed {seed}: {found}")
    return alarms


def check_wild(seeds: range) -> None:
    """At most 1 in 50 is missed; more than a third are found by their evaluations alone."""
    found = [watch(*wild(seed)) for seed in seeds]
    assert sum(one is None for one in found) <= len(seeds) / 50
    assert sum("held-out" in one[1].reason for one in found if one) >= len(seeds) / 3


def test_healthy_curves_pass() -> None:
    assert false_alarms(range(2), 300, 900) == []  # 480 curves


def test_divergences_are_found_within_50_steps() -> None:
    check_found(range(30))


def test_jumps_of_runs_that_start_low_are_found() -> None:
    check_low_starts(range(40))


def test_healthy_runs_pass_their_evaluations() -> None:
    assert evaluation_alarms(range(1)) == []  # 240 runs, half of which overfit


def test_evaluations_show_what_wild_losses_hide() -> None:
    check_wild(range(60))


@pytest.mark.slow
def test_many_jumps_of_runs_that_start_low_are_found() -> None:
    check_low_starts(range(100, 400))


@pytest.mark.slow
def test_fewer_than_one_false_alarm_in_a_thousand_evaluated_runs() -> None:
    alarms = evaluation_alarms(range(100, 140))
    assert upper_bound(len(alarms), 40 * len(FAMILIES)) < 1e-3, alarms  # of 9,600


@pytest.mark.slow
def test_fewer_than_one_false_alarm_in_a_thousand_healthy_curves() -> None:
    alarms = false_alarms(range(100, 140), 500, 3000)
    assert upper_bound(len(alarms), 40 * len(FAMILIES)) < 1e-3, alarms  # of 9,600


@pytest.mark.slow
def test_many_divergences_are_found_within_50_steps() -> None:
    check_found(range(100, 250))  # 900


# --- each rule, to the step

FLAT = [3.21] * 411  # a jump after it is at step 412


def test_a_loss_that_is_not_finite_ends_it_at_once() -> None:
    for loss in (math.nan, math.inf, -math.inf):
        reason = f"the training loss is {loss} at step 3"
        assert watch([3.0, 2.9, loss], None) == (3, Divergence(3, "non_finite", reason))


def test_a_gradient_that_is_not_finite_counts_unless_the_update_was_skipped() -> None:
    guard = Guard(None, 0)
    assert guard.update(1, 3.0, math.inf, skipped=True) is None
    assert guard.update(2, 3.0, math.nan) == Divergence(2, "non_finite", "the gradient norm is nan at step 2")


def test_fifty_skipped_updates_in_a_row() -> None:
    losses = [3.0] * 200
    reason = "the gradients were not finite for 50 steps in a row at any loss scale"
    assert watch(losses, None, [100 < step <= 149 for step in range(1, 201)]) is None
    found = watch(losses, None, [step > 100 for step in range(1, 201)])
    assert found == (150, Divergence(101, "non_finite", reason))


def test_a_jump_that_stays_is_a_spike() -> None:
    reason = "the training loss rose from 3.21 to 7.65 at step 412 and stayed up for 38 steps"
    assert watch(FLAT + [7.65] * 100, None) == (449, Divergence(412, "spike", reason))
    assert watch(FLAT + [7.65] * 100, 5.5) == (449, Divergence(412, "spike", reason))


def test_a_jump_to_the_constant_predictors_loss_is_a_collapse() -> None:
    reason = (
        "the training loss rose from 3.21 to 7.65 at step 412 and stayed up, no better than a constant prediction's "
        "7.6, for 38 steps"
    )
    assert watch(FLAT + [7.65] * 100, 7.6) == (449, Divergence(412, "collapse", reason))


def test_a_ramp_is_dated_at_its_foot() -> None:
    losses = FLAT + [3.21 + 0.3 * min(step, 30) for step in range(1, 100)]
    step, verdict = watch(losses, 7.6) or pytest.fail("missed")
    assert (step, verdict.step, verdict.kind) == (451, 412, "spike")


@pytest.mark.parametrize("scale", [2.0**-12, 2.0**10])
def test_no_threshold_depends_on_the_scale(scale: float) -> None:
    losses, constant, _ = diverging(collapse, 3)
    plain, scaled = watch(losses, constant), watch([scale * loss for loss in losses], scale * constant)
    assert plain and scaled
    assert (plain[0], plain[1].step) == (scaled[0], scaled[1].step)


def test_a_spike_that_comes_back_is_none() -> None:
    back = [9.0] * 20 + [3.21 + 6 * math.exp(-t / 8) for t in range(200)]
    assert watch(FLAT + back, 7.6) is None
    assert watch(FLAT + [3.21 + 6 * math.exp(-t / 40) for t in range(300)], 7.6) is None  # slowly
    assert watch(FLAT + [3.21 * 1.2] * 300, 7.6) is None  # other data


def test_a_run_that_diverges_in_its_first_steps() -> None:
    step, verdict = watch([10.8 - 0.02 * t for t in range(15)] + [25.0] * 60, 7.6) or pytest.fail("missed")
    assert (step, verdict.step, verdict.kind) == (53, 16, "spike")
    too_high_a_rate = [10.8] + [30 + 1000 * math.exp(-t / 15) for t in range(60)]  # falling, but from where to where
    step, verdict = watch(too_high_a_rate, None) or pytest.fail("missed")
    assert (step, verdict.step, verdict.kind) == (39, 2, "spike")


def test_a_loss_that_never_leaves_the_constant_predictors() -> None:
    reason = "the training loss never left a constant prediction's 7.6: 7.59 for 1500 steps"
    assert watch([7.59] * 1600, 7.6) == (1500, Divergence(1, "collapse", reason))
    assert watch([7.59] * 900 + [7.59 - 0.001 * t for t in range(1000)], 7.6) is None  # a plateau
    guard = Guard(7.6, warmup_steps=1000)
    assert [step for step in range(1, 4001) if guard.update(step, 7.59, 1.0)] == [4000]


def test_a_loss_that_comes_back_to_the_constant_predictors_from_nearby() -> None:
    """Too small a rise to tell from other data, until it has lasted."""
    reason = "the training loss has come back to a constant prediction's 7.6: 7.6 for 1500 steps"
    assert watch([6.5] * 500 + [7.6] * 1600, 7.6) == (2000, Divergence(501, "collapse", reason))


@pytest.mark.parametrize("constant", [7.0, 7.4, 7.6, 7.8])
def test_a_pretrained_model_that_forgets_all_at_once(constant: float) -> None:
    losses = [2.0, *np.random.default_rng(1).uniform(7.6, 7.9, 1000).tolist()]
    step, verdict = watch(losses, constant) or pytest.fail("missed")
    assert (step, verdict.step, verdict.kind) == (39, 2, "spike" if constant == 7.0 else "collapse")
    assert verdict.reason.startswith("the training loss rose from 2 to 7.")
    assert watch(losses, constant, None, {0: 2.1}) == (step, verdict)
    # at first an untrained model, of which one batch was easy
    assert watch([2.0, *(7.75 * 0.999**t for t in range(1000))], 7.6, None, {0: 8.4}) is None


# float16 without loss scaling, two layers, bytes: an untrained model has 5.43 nats, a constant predictor 3.27
FP16 = """
    5.38 5.44 5.51 5.76 5.43 5.22 5.03 4.95 4.68 4.57 4.77 4.4 4.3 9.98 11.07 30.51 69.34 72.78 29.33 5.3 8.92
    81.4 53.84 44.09 47.52 4.07 4.64 31.78 44.31 31.52 17.2 35.06 23.77 9.96 40.06 14.53 25.76 3.92 93.84 31.46
    7.48 86.91 7.48 21.14 37.13 3.61 6.99 5.54 60.2 3.5 6.74 118.79 24.11 13.15 39.44 21.52 19.99 10.01 88.27
    3.86 3.37 9.77 28.56 9.44 3.46 33.42 9.48 6.16 14.49 14.95 24.21 19.57 9.01 3.07 40.67 27.59 63.25 182.14
    15.08 185.69 14.38 6 27.6 41.93 11.35 21.52 11.53 13.32 32.22 15.75 8.72 52.57 9.98 36.23 15.99 14.23 3.48
    17.33 3.23 32.61 84.72 34.14 38.85 36.91 5.73 3.32 81.58 60.38 36.94 23.37 7.9 11.62 27.39 39.06 457.86
    20.35 39.73 14.62 55.44 26.34 9.02 7.9 8.78 3.42 3.18 62.55 13.28 11.97 8.54 5.44 3.07 13.84 3.34 40.49 5.53
    41.82 9.88 9.44 26.01 26.3 94.12 30.86 28.91 23.99 12.79 10.69 7.44 3.22 30.53 37.83 64.2 66.79 12.78 5.32
    87.11 3.47 11.3 5.16 116.79 12.21 14.63 41.6 7.37 3.44 14.12 40.79 25.5 39.03 3.49 3.14 8.49 3.24 5.23 6.5
    6.34 15.18 5.13 3.23 5.23 3.14 44.39 24.77 6.95 3.09 23.27 25.94 10.85 3.09 10.27 7.25 11.59 12.15 15.46
    3.04 3.33 2.99 3.18 45.1 10.25 10.04
"""


def test_evaluations_far_above_the_untrained_models() -> None:
    losses = [float(loss) for loss in FP16.split()]
    held_out = {0: 5.43, 50: 33.66, 100: 22.63, 150: 19.15, 200: 17.98}
    assert watch(losses, 3.27) is None  # 38 of 42 are never up: the training losses alone do not show it
    step, verdict = watch(losses, 3.27, None, held_out) or pytest.fail("missed")
    assert verdict == Divergence(
        50,
        "spike",
        "the held-out loss rose from 5.43 to 33.7 by step 50 and is 19.1 at step 150, as the training loss rose from "
        "5.38 to 21.9",
    )
    assert step == 150
    only_the_end = {0: held_out[0], 200: held_out[200]}
    step, verdict = watch(losses, 3.27, None, only_the_end) or pytest.fail("missed")
    reason = "the held-out loss rose from 5.43 to 18 by step 200, as the training loss rose from 5.38 to 10.1"
    assert verdict == Divergence(200, "spike", reason)
    assert watch([*losses, 5.0], 3.27, None, {**only_the_end, 200: 6.7}) is None  # up by less than a quarter


def test_evaluations_of_a_model_that_forgets_little_by_little() -> None:
    """Too small a rise for noisy training losses: all that had been learnt was a quarter of 3.27."""
    losses = [2.5, *np.random.default_rng(2).normal(3.3, 0.2, 150).tolist()]
    held_out = {0: 2.56, 50: 3.36, 100: 3.33, 150: 3.31}
    assert watch(losses, 3.27) is None
    step, verdict = watch([*losses, 3.3], 3.27, None, held_out) or pytest.fail("missed")
    assert (step, verdict.step, verdict.kind) == (150, 50, "collapse")  # three in a row, not the last
    assert verdict.reason.endswith("; a constant prediction's is 3.27")


def test_overfitting_is_no_divergence_however_far_it_goes() -> None:
    held_out = {0: 0.7, **{step: 0.3 + 8 * step / 1000 for step in range(100, 1001, 100)}}
    assert watch([0.69 * math.exp(-t / 300) for t in range(1000)], 0.69, None, held_out) is None


def test_a_rise_of_the_held_out_loss_that_comes_back_is_none() -> None:
    losses = [3.2] * 300 + [4.2] * 250 + [3.2] * 50  # a rise of 31%, less than the training losses are judged by
    back = {0: 3.2, 300: 3.2, 350: 4.9, 400: 4.7, 450: 4.4, 500: 4.1, 600: 3.2}
    assert watch(losses, 4.0, None, back) is None
    step, verdict = watch(losses, 4.0, None, {**back, 400: 4.8, 450: 4.8}) or pytest.fail("missed")
    assert (step, verdict.step) == (450, 350)
    assert watch(losses, 4.0, None, {**back, 450: 3.9, 500: 4.9}) is None  # three, not in a row


def test_at_the_end_of_the_run_a_held_out_loss_has_no_time_to_come_back() -> None:
    held_out = {0: 3.2, 300: 3.2, 400: 4.3}
    assert watch([3.2] * 300 + [4.2] * 100, 4.0, None, held_out) is not None
    assert watch([3.2] * 300 + [4.2] * 101, 4.0, None, held_out) is None
    assert watch([3.2] * 380 + [4.2] * 20, 4.0, None, held_out) is None  # a spike
    assert watch([3.2] * 350 + [4.6] * 30 + [4.05] * 20, 4.0, None, held_out) is None  # that comes back


def test_a_held_out_loss_that_is_not_finite() -> None:
    found = watch([3.0] * 5, None, None, {0: 3.0, 4: math.nan})
    assert found == (4, Divergence(4, "non_finite", "the held-out loss is nan at step 4"))


@pytest.mark.parametrize("cut", [1, 9, 60, 333, 420, 440])
def test_a_resumed_guard_reaches_the_same_verdict(cut: int) -> None:
    draw = np.random.default_rng(5)
    losses = noisy(draw, np.array([10.8] * 3 + FLAT + [7.65] * 100), gaussian, 0.1).tolist()
    whole, first, second = Guard(7.6, 100), Guard(7.6, 100), Guard(7.6, 100)
    for step, loss in enumerate(losses[:cut], 1):
        assert whole.update(step, loss, 1.0, step == cut) == first.update(step, loss, 1.0, step == cut)
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert second.state_dict() == first.state_dict()
    verdicts = []
    for step, loss in enumerate(losses[cut:], cut + 1):
        verdicts.append(whole.update(step, loss, 1.0))
        assert second.update(step, loss, 1.0) == verdicts[-1]
        assert second.state_dict() == whole.state_dict()
    assert any(verdicts)


@pytest.mark.parametrize("cut", [0, 1, 60, 100, 149, 150])
def test_a_resumed_guard_judges_evaluations_alike(cut: int) -> None:
    losses, held_out = [float(loss) for loss in FP16.split()], {0: 5.43, 50: 33.66, 100: 22.63, 150: 19.15}
    guard, verdicts = Guard(3.27, 100), []
    for step in range(151):
        if step:
            verdicts.append(guard.update(step, losses[step - 1], 1.0))
        if step in held_out:
            verdicts.append(guard.evaluated(step, held_out[step], False))
        if step == cut:
            state = guard.state_dict()
            guard = Guard(3.27, 100)
            guard.load_state_dict(json.loads(json.dumps(state, allow_nan=False)))
            assert guard.state_dict() == state
    assert verdicts == [None] * (len(verdicts) - 1) + [watch(losses, 3.27, None, held_out)[1]]


def test_a_state_from_before_held_out_losses_were_judged_loads() -> None:
    losses = FLAT + [7.65] * 100
    old = Guard(7.6, 100)
    for step, loss in enumerate(losses[:420], 1):
        assert old.update(step, loss, 1.0) is None
    names = ("recent", "block", "levels", "spreads", "first", "skips", "best", "resting_since")
    guard = Guard(7.6, 100)
    guard.load_state_dict({name: old.state_dict()[name] for name in names})
    assert guard.evaluated(420, 7.7, False) is None  # the first that it sees
    found = [step for step in range(421, 512) if guard.update(step, losses[step - 1], 1.0)]
    assert found[0] == 449


# --- in a run


def test_a_run_ends_at_the_evaluation_that_shows_a_divergence(dataset: Path, tmp_path: Path) -> None:
    """Also where the evaluation comes between two training lines, and where the run was stopped before it."""
    small = {"model__n_layer": 1, "model__dropout": 0.0, "eval__train": False, "log__every": 1000}
    base = tiny_recipe(dataset, **small, train__max_steps=60, train__eval_every=0, checkpoint__every=0)
    assert train(base, tmp_path / "base", quiet=True).final_val_loss < 1.9
    broken = base.replace(
        {
            **{"train.init_from": str(tmp_path / "base"), "train.max_steps": 30, "train.eval_every": 15},
            **{"optim.lr": 0.1, "schedule.min_lr": 0.1, "schedule.warmup_steps": 0, "checkpoint.every": 10},
        }
    )
    whole = train(broken, tmp_path / "whole", quiet=True)
    assert (whole.status, whole.steps, whole.final_val_loss) == ("diverged", 30, None)
    assert whole.failed_at_step in (15, 30)  # evaluated there
    assert "the held-out loss rose from 1." in whole.reason
    evidence = RunDir(tmp_path / "whole").read_json("divergence.json")
    assert (evidence["step"], evidence["reason"]) == (whole.failed_at_step, whole.reason)
    assert [update["step"] for update in evidence["updates"]][-1] == "30"
    assert [path.name for path in list_checkpoints(RunDir(tmp_path / "whole"))][-1] == "step-00000020"

    train_until(broken, tmp_path / "stopped", 17)
    resumed = train(broken, tmp_path / "stopped", quiet=True)
    assert (resumed.failed_at_step, resumed.reason) == (whole.failed_at_step, whole.reason)
