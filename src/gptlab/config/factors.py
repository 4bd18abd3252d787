"""Factors: on/off changes of a recipe whose combinations are the arms of a study.

`fraction` = 1 trains all 2^k combinations of k factors. 2, 4, 8 or 16 trains that part of them, chosen such that no
main effect is mixed with an interaction of two factors (resolution IV or more).
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import Any

from pydantic import Field

from gptlab.config.sections import Section
from gptlab.errors import ConfigError

MOST_FACTORS = 8
# Generators of the fractions with the least aberration (Fries and Hunter 1980; NIST/SEMATECH e-Handbook of
# Statistical Methods, table 5.3.3.4.7): each further factor is on where an odd number of the named ones is. The
# arm with every factor off is then in every fraction.
GENERATORS: dict[tuple[int, int], tuple[str, ...]] = {  # (factors, fraction)
    (4, 2): ("ABC",),
    (5, 2): ("ABCD",),
    (6, 2): ("ABCDE",),
    (6, 4): ("ABC", "BCD"),
    (7, 2): ("ABCDEF",),
    (7, 4): ("ABCD", "ABDE"),
    (7, 8): ("ABC", "BCD", "ACD"),
    (8, 2): ("ABCDEFG",),
    (8, 4): ("ABCD", "ABEF"),
    (8, 8): ("ABC", "ABD", "BCDE"),
    (8, 16): ("BCD", "ACD", "ABC", "ABD"),
}


class Factor(Section):
    """A change of a study's recipe that is on in half of the arms."""

    note: str = ""
    """One line for tables."""
    settings: dict[str, Any] = Field(min_length=1)
    """Nested settings where it is on; off, the recipe's hold."""


def two_level_design(factors: Sequence[str], fraction: int) -> list[tuple[str, ...]]:
    """The factors that are on in each arm, in standard order, starting with none.

    Raises:
        ConfigError: there is no such fraction, or too few or too many factors.
    """
    k = len(factors)
    if not 2 <= k <= MOST_FACTORS:
        raise ConfigError(f"[factors] has {k}: a factorial needs 2 to {MOST_FACTORS} factors")
    known = [1, *(part for count, part in GENERATORS if count == k)]
    if fraction not in known:
        *most, last = map(str, known)
        choices = f"{', '.join(most)} or {last}" if most else last
        raise ConfigError(
            f"fraction = {fraction}: must be {choices} for {k} factors; others would mix main effects with interactions"
        )
    generators = GENERATORS.get((k, fraction), ())
    arms = []
    for levels in itertools.product((0, 1), repeat=k - len(generators)):
        basic = levels[::-1]  # the first factor changes fastest
        made = [sum(basic["ABCDEFGH".index(letter)] for letter in word) % 2 for word in generators]
        arms.append(tuple(name for name, on in zip(factors, [*basic, *made], strict=True) if on))
    return arms


def factors_on(arm: str, baseline: str) -> Collection[str]:
    """The factors that are on in an arm of a factorial, from its name."""
    return () if arm == baseline else arm.split("+")
