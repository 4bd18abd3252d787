"""The order in which the runs of a study start.

    core arms of the gate's seed -> sanity gate -> all other runs, seed by seed, arms mixed within a seed

A machine that grows slower or faster while a study runs then hardly favours an arm or a group of arms: only the core
arms of the gate's seed are always early.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from gptlab.config import Study
from gptlab.seeding import address


def run_order(study: Study, arms: Collection[str], seeds: Sequence[int], gate: int | None) -> list[tuple[str, int]]:
    """(arm, seed) of each run. The order depends on names and seeds alone: it is the same on every machine.

    Args:
        gate: the seed whose core arms start first; None if no run waits for them.
    """

    def drawn(seed: int) -> list[str]:
        return sorted(arms, key=lambda arm: address(study.name, seed, arm))

    runs = [(arm, seed) for seed in dict.fromkeys(seeds) for arm in drawn(seed)]
    return sorted(runs, key=lambda run: not (run[1] == gate and run[0] in core_arms(study)))


def core_arms(study: Study) -> list[str]:
    """The arms of the core group that gptlab trains."""
    return [name for name, arm in study.arms.items() if arm.group == "core" and not arm.measured]
