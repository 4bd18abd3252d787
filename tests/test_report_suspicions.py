"""Doubtful runs: sets that were doctored in one way each are all found, honest ones pass."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from logged import TRAIN, VAL, LogSet, counted_shares, decay, honest, log_run, wander

from gptlab.logs.run import LogRun, curve
from gptlab.report import repeats
from gptlab.report.doubtful_runs import rising
from gptlab.report.doubtful_values import copied_arms, repeated_values, small_spreads
from gptlab.report.judged import Judged


def plain_set(seed: int = 7, **fixed: object) -> LogSet:
    """Two arms or three, five seeds, 25 evaluations of 4 decimals, of which nothing is warned."""
    made = honest(
        seed,
        **{"arms": 2, "seeds": 5, "evaluations": 25, "digits": 4, "noise": 0.002, "wobble": 0.002, "values_only": False}
        | fixed,
    )
    for run in made.runs:
        run.seed = (run.seed or 0) % 1337
    return made


def copy_of(run: LogRun, arm: str, seed: int) -> LogRun:
    return LogRun(
        run.source, run.form, dict(run.curves), arm, seed, settings=dict(run.settings), result=dict(run.result)
    )


def replace(made: LogSet, run: LogRun) -> None:
    """Put a run in the place of that with its arm and seed."""
    made.runs = [run if (one.arm, one.seed) == (run.arm, run.seed) else one for one in made.runs]


def shift(run: LogRun, values: np.ndarray) -> None:
    run.curves[VAL] = curve(run.curves[VAL][0], values)


# --- doctored sets: each function doctors one, and returns what the warning says


def same_run_under_two_names(made: LogSet) -> str:
    replace(made, copy_of(made.run("adamw", 1), "muon", 1))
    return r"The same run is there twice, value for value: adamw seed 1 and muon seed 1 \(2[56] points\)"


def same_run_in_other_digits(made: LogSet) -> str:
    run = made.run("adamw", 1)
    steps, values = run.curves[VAL]
    fine = values + np.random.default_rng(1).uniform(-4e-5, 4e-5, len(values))
    shift(run, np.round(fine, 4))
    replace(made, log_run("muon", 1, **{VAL: (steps + 1, fine)}))
    return r"The same run is there twice, value for value: adamw seed 1 and muon seed 1"


def same_run_up_to_its_end(made: LogSet) -> str:
    source, run = made.run("adamw", 0), made.run("adamw", 3)
    values = run.curves[VAL][1].copy()
    values[12:] = source.curves[VAL][1][12:]
    shift(run, values)
    return r"Runs agree value for value up to their ends: adamw seed 0 and adamw seed 3 \(1[34] points\)"


def run_that_was_cut(made: LogSet) -> str:
    steps, values = made.run("adamw", 0).curves[VAL]
    replace(made, log_run("adamw", 4, **{VAL: (steps[:14], values[:14])}))
    return r"One run is the beginning of the other, value for value: adamw seed 0 and adamw seed 4 \(14 points\)"


def seeds_that_begin_alike(made: LogSet) -> str:
    source, run = made.run("adamw", 0), made.run("adamw", 3)
    shift(run, np.concatenate([source.curves[VAL][1][:12], run.curves[VAL][1][12:]]))
    return r"Seeds of one arm begin with the same values: adamw seed 0 and adamw seed 3 \(12 points\)"


def values_that_repeat(made: LogSet) -> str:
    for run in made.runs:
        run.result, run.curves = {VAL: round(float(run.curves[VAL][1][-1]) + 3e-6 * (run.seed or 0), 6)}, {}
    made.run("muon", 4).result = dict(made.run("muon", 2).result)
    return r"Runs repeat to the last digit: muon seed 2 and muon seed 4 \(\d\.\d+\)"


def arms_without_noise(made: LogSet) -> str:
    for run in made.runs:
        run.result, run.curves = {VAL: 3.278143 if run.arm == "adamw" else 3.2811}, {}
    return r"Runs repeat to the last digit: adamw seed 0, .* \(3.278143\) and muon seed 0"


def one_seed_in_the_settings(made: LogSet) -> str:
    for run in made.runs:
        run.settings = {"train.seed": 1337 if run.arm == "muon" else run.seed, "data.order_seed": 7}
    return r"All runs of an arm have the same seed in their settings: muon \(train.seed = 1337 in 5 runs\)\."


def arm_that_is_another_plus_a_number(made: LogSet) -> str:
    for seed in range(5):
        steps, values = made.run("adamw", seed).curves[VAL]
        replace(made, log_run("muon", seed, **{VAL: (steps, np.round(values - 0.0123, 4))}))
    return r"Arms differ by the same number in every seed: muon is adamw -0.0123\."


def spread_far_below_any_noise(made: LogSet) -> str:
    for run in made.arm("muon"):
        run.result, run.curves = {VAL: 3.2781 + 1e-5 * (run.seed or 0)}, {}
    for run in made.arm("adamw"):
        run.result, run.curves = {VAL: float(run.curves[VAL][1][-1])}, {}
    return r"too small to be real: muon has sd 1.6e-05 over 5 seeds; measured was 0.00113 for modded-nanogpt Track 3"


def spread_far_below_the_wobble(made: LogSet) -> str:
    """Not a language model's loss: only its own curve tells how much it wobbles."""
    made.metric, draw = "reward_loss", np.random.default_rng(3)
    for run in made.runs:
        steps, values = run.curves.pop(VAL)
        if run.arm == "muon":
            values = made.run("muon", 0).curves.get(made.metric, (steps, values))[1] + 1e-6 * draw.normal(
                size=len(values)
            )
        elif run.arm == "adamw":
            values = values + 0.003 * draw.normal(size=len(values))
        if (run.arm, run.seed) == ("muon", 0):
            values = values + 0.004 * draw.normal(size=len(values))
        run.curves[made.metric] = curve(steps, values)
    return r"too small to be real: muon has sd [\de.-]+ over 5 seeds; one curve wobbles by 0.00\d+ in its last"


def best_of_each_run(made: LogSet) -> str:
    made.values = made.last_values()
    for run in made.arm("muon"):
        values = run.curves[VAL][1].copy()
        values[-1] += 0.04
        shift(run, values)
        made.values["muon", run.seed or 0] = float(values.min())
    return r"The value is the best of the run, not the last: muon seed 0 \(\d\.\d+; its curve ends at \d\.\d+\)"


def arms_of_different_length(made: LogSet) -> str:
    for run in made.arm("muon"):
        steps, values = run.curves[VAL]
        run.curves[VAL] = curve(steps[:20], values[:20])
    return r"Arms end at different steps: muon at \d+ and adamw at \d+\."


def arms_of_different_tokens(made: LogSet) -> str:
    for run in made.runs:
        run.result["tokens"] = 10**8 if run.arm == "muon" else 2 * 10**8
    return r"different numbers of tokens: muon 1e\+08 and adamw 2e\+08"


def arms_of_different_data(made: LogSet) -> str:
    for run in made.runs:
        run.settings["data.path"] = "/data/fineweb10B" if run.arm == "muon" else "/scratch/fineweb-edu/"
    return r"Runs read different data: data.path is fineweb-edu in adamw and fineweb10B in muon"


def seeds_of_different_settings(made: LogSet) -> str:
    for run in made.runs:
        run.settings = {
            "optim.lr": 0.002 if (run.arm, run.seed) == ("muon", 4) else 0.001,
            "seed": run.seed,
            "job_id": run.seed,
        }
    return r"Seeds of one arm have different settings: optim.lr is 0.001 and 0.002 in muon"


def more_arms_than_declared(made: LogSet) -> str:
    made.declared = 1
    return r"2 arms were logged and 1 declared"


def each_run_stops_at_the_target(made: LogSet) -> str:
    target = np.median([run.curves[VAL][1][18] for run in made.arm("muon")])
    for run in made.arm("muon"):
        steps, values = run.curves[VAL]
        first = int((values <= target).argmax())
        values = np.concatenate([values[: first + 1]])
        run.curves[VAL] = curve(steps[: first + 1] + (run.seed or 0), values)
    return r"Each run ends at its best, beyond all that any run had before: muon"


def arm_that_stops_where_its_mean_passes(made: LogSet) -> str:
    mean = np.mean([run.curves[VAL][1] for run in made.arm("muon")], axis=0)
    made.targets = [float(mean[17:19].mean())]
    for run in made.arm("muon"):
        steps, values = run.curves[VAL]
        run.curves[VAL] = curve(steps[:19], values[:19])
    return r"Arms end at the first evaluation whose mean passes, others go on: muon"


def seed_that_is_missing(made: LogSet) -> str:
    made.runs = [run for run in made.runs if run.seed != 2]
    return r"Runs are missing: adamw has no seed 2 and muon has no seed 2\."


def run_without_a_value(made: LogSet) -> str:
    made.run("muon", 3).curves = {}
    return r"Runs have no val_loss to judge: muon seed 3"


def bfloat16(values: np.ndarray, bits: int = 7) -> np.ndarray:
    steps = 2.0 ** (np.floor(np.log2(values)) - bits)
    return np.round(values / steps) * steps


def loss_in_bfloat16(made: LogSet) -> str:
    for run in made.arm("muon"):
        shift(run, np.round(bfloat16(run.curves[VAL][1]), 4))
    return r"The val_loss was logged as a 16-bit number: muon \(bfloat16: steps of 1/64\)"


def loss_in_float16(made: LogSet) -> str:
    for run in made.arm("muon"):
        shift(run, bfloat16(run.curves[VAL][1], 10))
    return r"16-bit number: muon \(float16: steps of 1/512\)"


def loss_in_bfloat16_between_evaluations(made: LogSet) -> str:
    """A run is judged at a step between two points, where the value is no 16-bit number."""
    told = loss_in_bfloat16(made)
    made.values = {key: value + 1 / 300 for key, value in made.last_values().items()}
    return told


def loss_of_two_decimals(made: LogSet) -> str:
    for run in made.runs:
        shift(run, np.round(run.curves[VAL][1], 2))
    return r"The val_loss comes in steps of 0.01, and the sd between seeds is 0"


def run_that_diverged(made: LogSet) -> str:
    losses = np.concatenate([np.linspace(9, 3.5, 100), np.full(100, 3.5), np.full(100, 7.7)])
    made.run("muon", 2).curves[TRAIN] = curve(np.arange(1, 301) * 10.0, losses)
    return r"muon seed 2 diverged at step 2010 \(spike\): the training loss rose from 3.5 to 7.7 at step 2010"


def run_that_ends_in_nan(made: LogSet) -> str:
    values = made.run("muon", 2).curves[VAL][1].copy()
    values[20:] = np.nan
    shift(made.run("muon", 2), values)
    return r"muon seed 2 diverged at step \d+ \(not finite\): val_loss is nan at step \d+, and not finite after it"


def run_that_ends_early(made: LogSet) -> str:
    steps, values = made.run("muon", 2).curves[VAL]
    made.run("muon", 2).curves[VAL] = curve(steps[:15], values[:15])
    return r"Runs end early: muon seed 2 ends at step \d+ and the others of its arm at \d+"


def run_that_did_not_complete(made: LogSet) -> str:
    made.run("muon", 2).status = "out_of_memory"
    return r"Runs did not complete: muon seed 2 \(out of memory\)"


def evaluations_that_stop_before_the_run(made: LogSet) -> str:
    for run in made.runs:
        last = run.curves[VAL][0][-1]
        run.curves[TRAIN] = curve(np.linspace(1, 1.2 * last, 200), np.linspace(9, 4, 200))
    return r"Runs go on after the last val_loss: adamw seed 0 \(last value at step \d+ of \d+\)"


def values_that_are_lost_in_between(made: LogSet) -> str:
    values = made.run("muon", 2).curves[VAL][1].copy()
    values[[7, 9]] = np.nan
    shift(made.run("muon", 2), values)
    return r"The val_loss is not finite in between: muon seed 2 \(2 points\)"


def run_that_overfits(made: LogSet) -> str:
    run = made.run("muon", 2)
    values = run.curves[VAL][1]
    shift(run, values + 2 * np.clip(np.linspace(-1, 1, len(values)), 0, None))
    return r"Runs end worse than their best: muon seed 2 \(\d.\d+ at step \d+, \d.\d+ at \d+\)"


DOCTORED: list[Callable[[LogSet], str]] = [
    same_run_under_two_names,
    same_run_in_other_digits,
    same_run_up_to_its_end,
    run_that_was_cut,
    seeds_that_begin_alike,
    values_that_repeat,
    arms_without_noise,
    one_seed_in_the_settings,
    arm_that_is_another_plus_a_number,
    spread_far_below_any_noise,
    spread_far_below_the_wobble,
    best_of_each_run,
    arms_of_different_length,
    arms_of_different_tokens,
    arms_of_different_data,
    seeds_of_different_settings,
    more_arms_than_declared,
    each_run_stops_at_the_target,
    arm_that_stops_where_its_mean_passes,
    seed_that_is_missing,
    run_without_a_value,
    loss_in_bfloat16,
    loss_in_bfloat16_between_evaluations,
    loss_in_float16,
    loss_of_two_decimals,
    run_that_diverged,
    run_that_ends_in_nan,
    run_that_ends_early,
    run_that_did_not_complete,
    evaluations_that_stop_before_the_run,
    values_that_are_lost_in_between,
    run_that_overfits,
]


@pytest.mark.parametrize("doctor", DOCTORED, ids=lambda doctor: doctor.__name__)
def test_a_doctored_set_is_found(doctor: Callable[[LogSet], str]) -> None:
    made = plain_set()
    assert made.warnings() == []
    told = doctor(made)
    warnings = made.warnings()
    assert any(re.search(told, warning) for warning in warnings), warnings
    print(*warnings, sep="\n")


# --- honest sets


def warned(sets: range) -> list[str]:
    """The warnings about honest sets, every eighth of them of accuracies."""
    found = []
    for seed in sets:
        made = honest(seed) if seed % 8 else counted_shares(seed)
        found += [f"{seed}: {' '.join(warnings)}" for warnings in [made.warnings()] if warnings]
    return found


def test_at_most_two_of_forty_honest_sets_are_warned_of() -> None:
    assert len(warned(range(40))) <= 2


@pytest.mark.slow
def test_one_honest_set_in_a_hundred_is_warned_of_at_most() -> None:
    found = warned(range(1000, 3000))
    assert len(found) <= 20, found


def test_what_is_no_fault_is_not_warned_of() -> None:
    made = plain_set(arms=3)
    made.runs = [run for run in made.runs if run.arm == "adamw" or (run.seed or 0) < 3]  # a baseline with more seeds
    for run in made.runs:
        run.settings = {
            "train.seed": run.seed,
            "data.corpus": "fineweb",
            "optim.lr": {"adamw": 1e-3}.get(run.arm or "", 2e-2),
        }
        run.curves["lr"] = curve([0, 1, 2, 3], [0, 1, 1, 0])
    assert made.warnings() == []
    arms_of_different_length(made)
    made.at = "common"
    assert [warning for warning in made.warnings() if "different steps" in warning] == []
    primes = plain_set(seeds=4)
    for run in primes.runs:
        run.seed = (2, 3, 5, 7)[run.seed or 0]
    assert primes.warnings() == []
    assert LogSet([]).warnings() == LogSet(primes.runs[:1]).warnings() == []


def test_arms_may_branch_from_one_run() -> None:
    """The same seed begins alike in two arms: a cooldown that begins later."""
    made = plain_set()
    for seed in range(5):
        trunk, values = made.run("adamw", seed).curves[VAL][1], made.run("muon", seed).curves[VAL][1]
        shift(made.run("muon", seed), np.concatenate([trunk[:15], values[15:]]))
    assert made.warnings() == []


def test_a_log_of_two_decimals_does_not_make_runs_the_same() -> None:
    """Late evaluations of two decimals are equal in most runs; also beside a log of all digits."""
    for digits in (2, 3):
        for seed in range(4):
            made = plain_set(seed, seeds=8, digits=digits, evaluations=100, noise=0.0015, wobble=0.0005, share=0.9)
            fine = plain_set(seed, seeds=8, digits=None, evaluations=100, noise=0.0015, wobble=0.0005, share=0.9)
            mixed = LogSet([*made.arm("adamw"), *fine.arm("muon")])
            assert [w for w in made.warnings() + mixed.warnings() if "value for value" in w] == []


def test_one_run_twice_is_found_among_a_hundred_long_ones() -> None:
    draw, at = np.random.default_rng(0), np.arange(1.0, 10_001)
    base = decay(at / 10_000, 10_000, 10.8, 3.0, 20.0, 0.1)
    runs = [
        log_run(f"arm{arm}", seed, **{TRAIN: (at, base * (1 + 0.002 * draw.normal(size=len(at))))})
        for arm in range(20)
        for seed in range(5)
    ]
    runs[-1].curves = dict(runs[0].curves)
    (warning,) = LogSet(runs, TRAIN).warnings()
    assert warning.startswith(
        "The same run is there twice, value for value: arm0 seed 0 and arm19 seed 4 (10000 points)"
    )


# --- how often each rule of chance warns of honest runs


def judged(arms: dict[str, np.ndarray], metric: str = VAL, better: str = "lower") -> Judged:
    """Values (seeds,) or curves (seeds, points) by arm."""
    runs = []
    for arm, rows in arms.items():
        for seed, row in enumerate(rows):
            run = log_run(arm, seed)
            if np.ndim(row):
                run.curves[metric] = curve(np.arange(len(row)), row)
            else:
                run.result[metric] = float(row)
            runs.append(run)
    made = LogSet(runs, metric, better)
    return Judged(runs, metric, better, "last", made.last_values())


def check_repeats(sets: int) -> None:
    """Values of 3 to 6 decimals, and shares of 50 to 5,000 documents: at most one in a hundred is warned of."""
    draw, hits = np.random.default_rng(1), Counter[str]()
    for _ in range(sets):
        n, arms = int(draw.choice([2, 3, 5, 10, 20])), int(draw.choice([1, 2, 6]))
        losses = 3.3 + 0.0011 * draw.normal(size=(arms, n))
        digits, documents = int(draw.integers(3, 7)), int(draw.choice([50, 872, 5000]))
        hits["losses"] += any(repeated_values(judged(dict(zip("abcdef", np.round(losses, digits), strict=False)))))
        counts = draw.binomial(documents, np.clip(0.8 + 0.01 * draw.normal(size=(arms, n, 6)), 0, 1))
        shares = np.round(counts / documents, 6)
        hits["shares"] += any(repeated_values(judged(dict(zip("abcdef", shares, strict=False)), "accuracy", "higher")))
    assert max(hits.values(), default=0) <= 0.012 * sets + 2, hits


def check_spreads(sets: int) -> None:
    """Noise of a third of the smallest that is known, and wobble of which 90% is common to the seeds."""
    draw, hits = np.random.default_rng(2), Counter[str]()
    for _ in range(sets):
        n, arms = int(draw.choice([2, 3, 5, 10, 20])), int(draw.choice([1, 2, 6]))
        known = 3.3 + 0.00113 / 3 * draw.normal(size=(arms, n))
        hits["known"] += any(small_spreads(judged(dict(zip("abcdef", known, strict=False)))))
        common, own = draw.normal(size=(arms, 1, 20)), draw.normal(size=(arms, n, 20))
        curves = 100 + np.linspace(1, 0, 20) ** 3 + 0.01 * (np.sqrt(0.9) * common + np.sqrt(0.1) * own)
        hits["wobble"] += any(small_spreads(judged(dict(zip("abcdef", curves, strict=False)), "loss_of_something")))
    assert max(hits.values(), default=0) <= 0.01 * sets + 2, hits


def check_copies(sets: int) -> None:
    """Arms whose seeds correlate by 0.9975."""
    draw, hits = np.random.default_rng(3), 0
    for _ in range(sets):
        n, arms = int(draw.choice([3, 5, 10])), int(draw.choice([2, 3, 6]))
        values = 3.3 + 0.001 * (np.sqrt(0.9975) * draw.normal(size=n) + np.sqrt(0.0025) * draw.normal(size=(arms, n)))
        hits += any(copied_arms(judged(dict(zip("abcdef", values, strict=False)))))
    assert hits <= 0.01 * sets + 2


def check_rises(sets: int) -> None:
    """Curves that have flattened and wander, remembering up to 0.95 of where they were; or training losses."""
    draw, hits = np.random.default_rng(4), Counter[str]()
    for _ in range(sets):
        noise, memory = draw.uniform(0.0005, 0.02), draw.uniform(0, 0.95)
        flat = [3 + 7 * np.exp(-np.arange(60) / draw.uniform(1, 10)) for _ in range(5)]
        hits["flat"] += any(rising(judged({"a": np.array([row + noise * wander(draw, 60, memory) for row in flat])})))
        losses = 3 + 7 * (1 + np.arange(2000) / 30) ** -0.5
        rows = losses * (1 + draw.uniform(0.01, 0.3) * draw.normal(size=(5, 2000)))
        hits["losses"] += any(rising(judged({"a": rows})))
    assert max(hits.values()) <= 1e-3 * sets, hits


def check_agreements(sets: int) -> None:
    """Evaluations every few steps, of which 90% of the wobble is common and which keep their distance for long."""
    draw, hits = np.random.default_rng(5), 0
    for _ in range(sets):
        noise, digits = draw.uniform(0.0002, 0.003), int(draw.integers(2, 7))
        common, n = wander(draw, 60, draw.uniform(0, 0.9)), 8
        wobbles = [np.sqrt(0.9) * common + np.sqrt(0.1) * wander(draw, 60, 0.95) for _ in range(n)]
        curves = 3 + np.linspace(0.4, 0, 60) ** 2 + noise * (np.array(wobbles) + draw.normal(size=(n, 1)))
        hits += bool(repeats.agreements(np.round(curves, digits)))
    assert hits == 0


CHECKS = {
    "repeats": check_repeats,
    "spreads": check_spreads,
    "copies": check_copies,
    "rises": check_rises,
    "agreements": check_agreements,
}


@pytest.mark.parametrize("rule", CHECKS)
def test_a_rule_of_chance_seldom_warns_of_honest_runs(rule: str) -> None:
    CHECKS[rule](40)


@pytest.mark.slow
@pytest.mark.parametrize("rule", CHECKS)
def test_the_rate_at_which_a_rule_warns_of_honest_runs(rule: str) -> None:
    CHECKS[rule](3000)


# --- the numbers that rules rest on


def test_decimals_and_grids() -> None:
    assert [repeats.decimals(np.array(x)) for x in ([3.0, 4.0], [3.28, 3.2], [3.2781, 10.9], [1 / 3], [])] == [
        0,
        2,
        4,
        10,
        0,
    ]
    assert repeats.grid(np.array([3.2781, 3.2799, 3.30])) == pytest.approx(1e-4)
    shares = np.round(np.array([700, 703, 712, 715, 716]) / 872, 6)
    assert repeats.grid(shares) == pytest.approx(1 / 872, rel=1e-3)
    rough = np.round(np.unique(np.random.default_rng(1).binomial(872, 0.8, size=40)) / 872, 4)
    assert repeats.grid(rough) == pytest.approx(1 / 872, rel=1e-2)
    assert repeats.grid(np.round(np.random.default_rng(1).normal(3, 0.01, size=40), 4)) == pytest.approx(1e-4)
    assert repeats.grid(np.array([0.1234567890123])) == pytest.approx(0.1234567890123 * 2**-23)


def test_the_wobble_is_that_of_noise_about_any_trend() -> None:
    draw, steps = np.random.default_rng(1), np.cumsum(np.tile([125.0, 125.0, 25.0], 300))[-14:]
    trend = 3 + ((steps - steps[0]) / 1000) ** 3
    found = [repeats.late_wobble(steps, trend + 0.01 * draw.normal(size=14)) for _ in range(400)]
    assert np.median(found) == pytest.approx(0.01, rel=0.1)
    assert repeats.late_wobble(steps, trend) < 1e-9
    assert np.isnan(repeats.late_wobble(steps[:7], trend[:7]))


def test_agreements_are_found_wherever_they_are() -> None:
    draw = np.random.default_rng(2)
    rows = [3 + 0.01 * draw.normal(size=40) for _ in range(50)]
    rows[7], rows[9], rows[30] = (
        rows[3].copy(),
        rows[5][:20].copy(),
        np.concatenate([draw.normal(size=9), rows[20][25:]]),
    )
    found = {
        (one.first, one.second): (one.points, one.whole, one.start, one.contained) for one in repeats.agreements(rows)
    }
    assert found == {
        (3, 7): (40, True, False, True),
        (5, 9): (20, False, True, True),
        (20, 30): (15, False, False, False),
    }


def test_arms_that_are_equal_in_every_seed_are_called_so() -> None:
    runs = [
        LogRun(Path("t.csv"), "csv", {}, arm, seed, result={VAL: 3.0 + seed / 7}) for arm in "ab" for seed in range(4)
    ]
    values = {(run.arm or "", run.seed or 0): run.result[VAL] for run in runs}
    assert list(copied_arms(Judged(runs, VAL, "lower", "last", values))) == [
        "Arms are equal in every seed: b is a. Check that they are not one set of runs."
    ]
