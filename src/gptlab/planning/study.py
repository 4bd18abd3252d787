"""Plans of a study's runs, and of one recipe in several sizes and micro-batches."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gptlab.config import Study, build_recipe
from gptlab.errors import ConfigError
from gptlab.planning.device import Device
from gptlab.planning.measure import Speed
from gptlab.planning.plan import Plan, plan_recipe, say_time
from gptlab.planning.resolve import resolve_recipe
from gptlab.planning.shape import laid_out


@dataclass(frozen=True)
class StudyPlan:
    """The plans of a study's arms. Each arm is run once per seed."""

    name: str
    arms: dict[str, Plan]
    seeds: int

    @property
    def hours(self) -> float | None:
        """Of all runs, one after another; None if the hours of an arm are unknown."""
        return _total(plan.hours for plan in self.arms.values() for _ in range(self.seeds))

    @property
    def device_hours(self) -> float | None:
        """Hours times devices."""
        return _total(plan.device_hours for plan in self.arms.values() for _ in range(self.seeds))

    @property
    def cost(self) -> float | None:
        return _total(plan.cost for plan in self.arms.values() for _ in range(self.seeds))

    @property
    def refused(self) -> list[str]:
        """The arms that `gptlab train` refuses."""
        return [arm for arm, plan in self.arms.items() if plan.refused]

    @property
    def verdict(self) -> str:
        """The plan in one line: `fits: at most 31 of 79 GB, 19 arms x 3 seeds, about 39.5 h, ...`."""
        size = f"{len(self.arms)} arms x {self.seeds} seeds"
        if self.refused:
            return f"does not fit: {', '.join(self.refused)}, of {size}"
        first, peak = next(iter(self.arms.values())), max(plan.needed_gb for plan in self.arms.values())
        tight = any(plan.memory.peak > plan.available for plan in self.arms.values())
        known = [plan.hours * self.seeds for plan in self.arms.values() if plan.hours is not None]
        unknown = [arm for arm, plan in self.arms.items() if plan.hours is None]
        devices = first.device if first.processes == 1 else f"{first.processes} x {first.device}"
        source = "measured here" if first.measured else f"assumed at {first.mfu:.0%} MFU"
        facts = [f"{'may not fit' if tight else 'fits'}: at most {peak:.3g} of {first.available_gb:.3g} GB", size]
        facts.append(f"{say_time(sum(known) if known else None)} of {devices}" + f" {source}" * bool(known))
        if known and unknown:
            facts.append(f"without {', '.join(unknown)}, whose time is unknown")
        if first.processes > 1 and self.device_hours is not None:
            facts.append(f"{self.device_hours:,.1f} GPU hours")
        if self.cost is not None:
            facts.append(f"cost {self.cost:,.2f}")
        return ", ".join(facts)

    @property
    def checkpoints(self) -> float:
        """Bytes of the checkpoints of all runs."""
        return sum(plan.checkpoints for plan in self.arms.values()) * self.seeds

    def to_json(self) -> dict[str, Any]:
        arms = {name: plan.to_json() for name, plan in self.arms.items()}
        return {
            "name": self.name,
            "seeds": self.seeds,
            "hours": self.hours,
            "device_hours": self.device_hours,
            "cost": self.cost,
            "checkpoints": self.checkpoints,
            "verdict": self.verdict,
            "arms": arms,
        }


def _total(values: Iterator[float | None]) -> float | None:
    known = list(values)
    return None if None in known else sum(value for value in known if value is not None)


def plan_study(
    study: Study, device: Device, measure: Callable[..., Speed | None] | None = None, **terms: Any
) -> StudyPlan:
    """The plan of each arm of a study.

    Args:
        measure, terms: as of `plan_recipe`: mfu, price, processes.
    """
    trained = [arm for arm in study.arms if arm not in study.measured]
    if not trained:
        raise ConfigError(f"study {study.name}: all arms were measured elsewhere, so there is nothing to train")
    speed, first = _shared(measure, len(trained)), study.seeds[0]
    arms = {arm: plan_recipe(study.build(arm, first), device, measure=speed, **terms) for arm in trained}
    branches = {arm: trunk[1] for arm in trained if (trunk := study.trunk(arm))}
    arms |= {arm: _branch(arms[arm], step) for arm, step in branches.items()}
    return StudyPlan(study.name, arms, len(study.seeds))


def _branch(plan: Plan, begins: int) -> Plan:
    """The plan of a run whose first steps another run of the study trains."""
    if plan.hours is None or not plan.steps:
        return plan
    own = 1 - begins / plan.steps
    note = "the hours of a run that branches off a longer one are of its own steps"
    cost = None if plan.cost is None else own * plan.cost
    return replace(plan, hours=own * plan.hours, cost=cost, notes=[*plan.notes, note])


def size_of(study: Study) -> tuple[int | None, int | None]:
    """Parameters of the baseline's model, and tokens that it trains on; None where only missing data tells."""
    try:
        resolved = resolve_recipe(study.build(study.baseline, study.seeds[0]), "cpu")
    except ConfigError:
        return None, None
    steps = resolved.steps
    tokens = None if steps is None else steps * resolved.recipe.batch.tokens_per_step
    return laid_out(resolved.shape).parameter_count(), tokens


def _shared(measure: Callable[..., Speed | None] | None, plans: int) -> Callable[..., Speed | None] | None:
    """The measurement, with its three seconds shared among several plans."""
    return measure and functools.partial(measure, seconds=3.0 / plans)


def plan_sweep(
    layers: Sequence[Mapping[str, Any]],
    device: Device,
    presets: Sequence[str] = (),
    micro_batches: Sequence[int] = (),
    measure: Callable[..., Speed | None] | None = None,
    **terms: Any,
) -> dict[str, Plan]:
    """Plans of a recipe in several sizes and micro-batches, by name.

    Args:
        layers: of the recipe, see `build_recipe`.
        presets: values of model.preset; default is the recipe's shape.
        micro_batches: in sequences; default is the recipe's micro-batch.
        measure, terms: as of `plan_recipe`: mfu, price, processes.
    """
    rows = {}
    speed = _shared(measure, len(presets or [""]) * len(micro_batches or [0]))
    sizes: dict[str, Sequence[Any]] = {"model.preset": presets, "batch.micro_batch": micro_batches}
    asked = {key: values for key, values in sizes.items() if values}
    for values in itertools.product(*asked.values()):
        name = " x ".join(map(str, values))
        layer = dict(zip(asked, values, strict=True))
        rows[name] = plan_recipe(build_recipe(*layers, layer), device, measure=speed, **terms)
    return rows
