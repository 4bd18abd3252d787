"""The guard on synthetic loss curves: healthy ones of many families must pass, divergences must be found soon."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest

from gptlab.training.guard import Divergence, Guard

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


BASES = [language_model, masked_language_model, multi_label, memorised, classification]


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
FAMILIES = list(itertools.product(BASES, EVENTS, NOISES))  # 200


def noisy(draw: Draw, curve: Curve, noise, sd: float) -> Curve:
    """Noise of `sd` times the level; a loss is positive."""
    return np.maximum(curve * (1 + sd * noise(draw, len(curve))), curve * 0.02)


def healthy(family: int, seed: int, shortest: int, longest: int) -> tuple[list[float], float | None, list[bool]]:
    """Losses, the constant predictor's loss (or None: not known), and which updates the loss scaler left out."""
    draw = np.random.default_rng([family, seed])
    base, event, noise = FAMILIES[family % len(FAMILIES)]
    curve, constant = base(draw, int(draw.integers(shortest, longest + 1)))
    sd = draw.uniform(0.002, 0.15)
    losses = noisy(draw, event(draw, curve, constant), noise, sd)
    skipped = draw.random(len(losses)) < draw.choice([0, 0.01, 0.5])
    return losses.tolist(), (None if draw.random() < 0.3 else constant), skipped.tolist()


def watch(
    losses: list[float], constant: float | None, skipped: list[bool] | None = None
) -> tuple[int, Divergence] | None:
    """The step at which the guard raised the alarm, and its verdict."""
    guard = Guard(constant, warmup_steps=100)
    for step, loss in enumerate(losses, 1):
        skip = skipped is not None and skipped[step - 1]
        if verdict := guard.update(step, loss, math.inf if skip else 1.0, skip):
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


# --- how often the guard is wrong on them


def false_alarms(seeds: range, shortest: int, longest: int) -> list[str]:
    """One curve of each family for each seed."""
    alarms = []
    for family, seed in itertools.product(range(len(FAMILIES)), seeds):
        losses, constant, skipped = healthy(family, seed, shortest, longest)
        if found := watch(losses, constant, skipped):
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


def test_healthy_curves_pass() -> None:
    assert false_alarms(range(2), 300, 900) == []  # 400 curves


def test_divergences_are_found_within_50_steps() -> None:
    check_found(range(30))


@pytest.mark.slow
def test_fewer_than_one_false_alarm_in_a_thousand_healthy_curves() -> None:
    alarms = false_alarms(range(100, 140), 500, 3000)
    assert upper_bound(len(alarms), 40 * len(FAMILIES)) < 1e-3, alarms  # of 8,000


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


@pytest.mark.parametrize("cut", [1, 9, 60, 333, 420, 440])
def test_a_resumed_guard_reaches_the_same_verdict(cut: int) -> None:
    draw = np.random.default_rng(5)
    losses = noisy(draw, np.array([10.8] * 3 + FLAT + [7.65] * 100), gaussian, 0.1).tolist()
    whole, first, second = Guard(7.6, 100), Guard(7.6, 100), Guard(7.6, 100)
    for step, loss in enumerate(losses[:cut], 1):
        assert whole.update(step, loss, 1.0, step == cut) == first.update(step, loss, 1.0, step == cut)
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    verdicts = []
    for step, loss in enumerate(losses[cut:], cut + 1):
        verdicts.append(whole.update(step, loss, 1.0))
        assert second.update(step, loss, 1.0) == verdicts[-1]
        assert second.state_dict() == whole.state_dict()
    assert any(verdicts)
