"""Logs of runs as other trainers write them: honest ones, with the noise of language models."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gptlab.logs.run import LogRun, curve
from gptlab.report.suspicions import suspicions

VAL, TRAIN = "val_loss", "train_loss"


@dataclass
class LogSet:
    """The runs of one judgement; `warnings` judges each at its last value unless `values` says otherwise."""

    runs: list[LogRun]
    metric: str = VAL
    better: str = "lower"
    at: str = "last"
    declared: int | None = None
    targets: list[float] = field(default_factory=list)
    values: dict[tuple[str, int], float] | None = None

    def run(self, arm: str, seed: int) -> LogRun:
        return next(run for run in self.runs if (run.arm, run.seed) == (arm, seed))

    def arm(self, arm: str) -> list[LogRun]:
        return [run for run in self.runs if run.arm == arm]

    def last_values(self) -> dict[tuple[str, int], float]:
        found = {}
        for run in self.runs:
            if self.metric in run.result:
                found[run.arm or "", run.seed or 0] = float(run.result[self.metric])
            elif self.metric in run.curves:
                found[run.arm or "", run.seed or 0] = float(run.curves[self.metric][1][-1])
        return found

    def warnings(self) -> list[str]:
        values = self.last_values() if self.values is None else self.values
        return suspicions(self.runs, self.metric, self.better, self.at, values, self.declared, self.targets)


def log_run(arm: str, seed: int, **curves: Any) -> LogRun:
    """A run of curves given as (steps, values)."""
    return LogRun(Path(f"{arm}-{seed}.log"), "text", {k: curve(*v) for k, v in curves.items()}, arm, seed)


def decay(share: np.ndarray, steps: int, first: float, floor: float, speed: float, cooldown: float) -> np.ndarray:
    """A power law, and a lower end by cooldown: what a loss is without noise, over shares of a run."""
    law = floor + (first - floor) * (1 + share * steps / speed) ** -0.6
    return law - cooldown * np.clip((share - 0.6) / 0.4, 0, 1) ** 1.5


def wander(draw: np.random.Generator, n: int, memory: float) -> np.ndarray:
    """Noise of sd 1 of which each value remembers the one before."""
    kicks, value, found = draw.normal(size=n), draw.normal(), np.empty(n)
    for i in range(n):
        value = memory * value + math.sqrt(1 - memory**2) * kicks[i]
        found[i] = value
    return found


def honest(seed: int, **fixed: Any) -> LogSet:
    """An honest set: arms of different quality, speed and noise, seeds that share some of it, evaluations that wobble.

    Args:
        fixed: what is not drawn: arms, seeds, evaluations, digits, noise, wobble, values_only, training, share.
    """
    draw = np.random.default_rng([19, seed])
    arms = int(draw.choice([1, 2, 2, 3, 4, 6]))
    seeds = int(draw.choice([2, 3, 3, 5, 5, 8, 12]))
    evaluations = int(draw.choice([12, 25, 40, 100]))
    digits: int | None = draw.choice(np.array([4, 4, 5, 6, None], dtype=object))
    noise = float(np.exp(draw.uniform(math.log(0.0008), math.log(0.02))))
    values_only, training = draw.random() < 0.2, draw.random() < 0.5
    share = float(draw.choice([0.0, 0.5, 0.9]))  # of a seed's deviation that all arms have in common
    arms, seeds, evaluations = fixed.get("arms", arms), fixed.get("seeds", seeds), fixed.get("evaluations", evaluations)
    digits, noise, share = fixed.get("digits", digits), fixed.get("noise", noise), fixed.get("share", share)
    values_only, training = fixed.get("values_only", values_only), fixed.get("training", training)

    steps = int(draw.choice([500, 3000, 20000])) // evaluations * evaluations
    at = np.linspace(0, steps, evaluations + 1)[int(draw.random() < 0.5) :].round()
    floor, first = draw.uniform(2.0, 3.2), draw.uniform(9, 11)
    law = {"first": first, "floor": floor, "speed": draw.uniform(2, 40), "cooldown": draw.uniform(0, 0.15)}
    wobble, memory = fixed.get("wobble", noise * draw.uniform(0.05, 1.0)), draw.uniform(0, 0.9)
    same_data = draw.choice([0.0, 0.5, 0.8])  # of the wobble: what all runs have, which read the same data in order
    common = wander(draw, len(at), memory)
    numbers = [*range(seeds)] if draw.random() < 0.7 else [*range(1337, 1337 + seeds)]
    deviations = {number: draw.normal() for number in range(3000)}
    runs = []
    for arm in range(arms):
        name = ["adamw", "muon", "soap", "lion", "shampoo", "ademamix"][arm]
        own = {**law, "floor": floor + draw.normal() * 5 * noise, "speed": law["speed"] * draw.uniform(0.7, 1.3)}
        sd, more = noise * draw.uniform(0.7, 1.5), 2 * seeds if arm == 0 and arms > 2 and draw.random() < 0.3 else seeds
        for number in [*numbers, *range(numbers[-1] + 1, numbers[-1] + 1 + more - seeds)]:
            deviation = math.sqrt(share) * deviations[number] + math.sqrt(1 - share) * draw.normal()
            values = decay(at / steps, steps, **own) + sd * deviation * (1 + 4 * np.exp(-at / steps * 8))
            wobbles = math.sqrt(same_data) * common + math.sqrt(1 - same_data) * wander(draw, len(at), memory)
            values = values + wobble * wobbles * (1 + 4 * np.exp(-at / steps * 8))
            values = values if digits is None else np.round(values, digits)
            run = log_run(name, number, **{VAL: (at, values)})
            if values_only:
                run.curves, run.result = {}, {VAL: float(values[-1])}
            elif training:
                logged = np.linspace(1, steps, min(steps, 300)).round()
                losses = decay(logged / steps, steps, **own) * (1 + 0.02 * draw.normal(size=len(logged)))
                run.curves[TRAIN] = curve(logged, np.round(losses, 4))
            runs.append(run)
    return LogSet(runs)


def counted_shares(seed: int) -> LogSet:
    """An honest set of accuracies over 872 documents, which agree now and then."""
    draw = np.random.default_rng([20, seed])
    at, digits, runs = np.arange(1, 11) * 100.0, int(draw.choice([4, 6, 12])), []
    for arm in ("base", "tuned", "frozen")[: draw.integers(1, 4)]:
        level = draw.uniform(0.6, 0.9)
        for number in range(int(draw.choice([3, 5, 10]))):
            truth = level * (1 - np.exp(-at / 200)) + 0.004 * draw.normal()
            right = draw.binomial(872, np.clip(truth, 0, 1)) / 872
            runs.append(log_run(arm, number, accuracy=(at, np.round(right, digits))))
    numbers = {arm: sum(run.arm == arm for run in runs) for arm in ("base", "tuned", "frozen")}
    least = min(n for n in numbers.values() if n)
    return LogSet([run for run in runs if (run.seed or 0) < least], "accuracy", "higher")
