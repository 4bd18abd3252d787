"""Ladders: every arm of a study in several sizes and with several numbers of tokens.

A rung is a size and a number of tokens: the arm `muon` at 4 layers of width 128 is the arm `muon@4x128`, and with
several budgets `muon@4x128-20tpp`, at 20 tokens per parameter. All arms have the same tokens and steps at a rung.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from gptlab.config.recipe import Recipe, build_recipe, merged, nested
from gptlab.config.sections import Count, Positive, Section
from gptlab.errors import ConfigError

RATES = ("optim.lr", "optim.muon_lr", "schedule.min_lr")  # of which an arm may list one for each size
SCALED = ("optim.lr", "schedule.min_lr")  # by lr_exponent; Muon scales its updates by the shapes itself
OWN = ("model.n_layer", "model.n_embd", "model.n_head", "train.max_steps", "train.max_tokens", "train.max_epochs")
UNITS = {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


class Size(NamedTuple):
    n_layer: int
    n_embd: int

    @property
    def parameters(self) -> int:
        """The weights of the blocks' matrices in GPT-2's form, 12 layers width^2 (Kaplan et al. 2020)."""
        return 12 * self.n_layer * self.n_embd**2


def size_of(text: str) -> Size:
    """The size that "4x128" names. Raises ValueError."""
    match = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,5})", text)
    if match is None:
        raise ValueError(f"{text}: must be layers x width, such as 4x128")
    return Size(int(match[1]), int(match[2]))


def parameters_of(text: str) -> float:
    """The number of parameters that "124M" or "12x768" names. Raises ValueError."""
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)([KMBT]?)", text):
        return float(match[1]) * UNITS[match[2]]
    try:
        return size_of(text).parameters
    except ValueError:
        raise ValueError(f"{text}: must be a number of parameters, such as 124M, or layers x width") from None


class Ladder(Section):
    """Sizes and budgets at which every arm is trained, to see what holds at scale."""

    sizes: list[str] = Field(min_length=1)
    """Layers x width, the smallest first: ["2x64", "4x128"]."""
    tokens_per_parameter: list[float] = Field(default=[20.0], min_length=1)
    """Training tokens of a run for each parameter of its size, 12 layers width^2 (no embeddings); Hoffmann et al. 2022
    find about 20 best. Several make several runs of each size."""
    head_size: Count = 0
    """Width of an attention head at every size. 0: the recipe's."""
    tokens_per_step: list[Positive] = Field(default_factory=list)
    """batch.tokens_per_step of each size; empty: the recipe's at every size."""
    lr_exponent: float = 0.0
    """k: optim.lr and schedule.min_lr are multiplied by (parameters / parameters of the first size)^-k. 0: the same at
    every size, as with muP. A rate that an arm lists for each size is taken as it is."""
    branch: bool = False
    """Train the longest run of each size, and start its shorter ones at their decay from its checkpoints. For
    schedule.shape = wsd or wsd-sqrt."""
    hold_out: Literal["none", "largest"] = "none"
    """The size that is left out of the fit and predicted from the others."""
    extrapolate: list[str] = Field(default_factory=list)
    """Sizes at which arms are compared by their laws: "124M" parameters without embeddings, or layers x width."""

    @field_validator("tokens_per_parameter", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return [float(value)] if isinstance(value, int | float) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _consistent(self) -> Ladder:
        found = [size_of(text).parameters for text in self.sizes]
        if sorted(set(found)) != found:
            raise ValueError(f"ladder.sizes = {self.sizes}: must grow, each with more parameters than the one before")
        for text in self.extrapolate:
            parameters_of(text)
        multiples = self.tokens_per_parameter
        if sorted(set(multiples)) != multiples or multiples[0] <= 0:
            raise ValueError(f"ladder.tokens_per_parameter = {multiples}: must be above 0 and grow")
        if self.tokens_per_step and len(self.tokens_per_step) != len(self.sizes):
            raise ValueError(f"ladder.tokens_per_step = {self.tokens_per_step}: must have one for each of the sizes")
        if self.branch and len(multiples) < 2:
            raise ValueError("ladder.branch = true: needs several tokens_per_parameter, of which the most is the trunk")
        if self.hold_out == "largest" and len(self.sizes) < 2:
            raise ValueError("ladder.hold_out = largest: needs two sizes or more")
        return self

    @property
    def rungs(self) -> dict[str, tuple[str, float]]:
        """Size and tokens per parameter of each rung by its name."""
        several = len(self.tokens_per_parameter) > 1
        return {
            f"{size}-{multiple:g}tpp" if several else size: (size, multiple)
            for size in self.sizes
            for multiple in self.tokens_per_parameter
        }

    @property
    def held_out(self) -> str:
        """The size that is left out of the fit; "" if none is."""
        return self.sizes[-1] if self.hold_out == "largest" else ""

    def place(self, arm: str) -> tuple[str, str, float]:
        """(arm of the file, size, tokens per parameter) of an arm's name."""
        base, _, rung = arm.rpartition("@")
        return (base, *self.rungs[rung])

    def at_rung(self, arm: str, base: str) -> str:
        """The name of another arm at the same rung."""
        return f"{base}@{arm.rpartition('@')[2]}"

    def budgets(self, arm: str) -> list[str]:
        """The arms that have the arm and size of this one, and differ in tokens alone; the shortest first."""
        base, size, _ = self.place(arm)
        return [f"{base}@{name}" for name, (of, _) in self.rungs.items() if of == size]

    def trunk(self, arm: str) -> str:
        """The arm whose run an arm branches off; "" if it does not."""
        longest = self.budgets(arm)[-1]
        return longest if self.branch and arm != longest else ""


def expanded(content: dict[str, Any], where: str) -> dict[str, Any]:
    """A study file with the arms of its ladder. Arms that it already has, as a study's folder does, stay.

    Raises:
        ConfigError: an arm, or a setting of it, that a ladder cannot have.
    """
    try:
        ladder = Ladder.model_validate(content["ladder"])
    except ValueError:  # validating the study says what is wrong with it
        return content
    if content.get("factors"):
        raise ConfigError(f"{where}: has [ladder] and [factors]: make the arms of one of them")
    arms, made = dict(content.get("arms", {})), {}
    if any("@" in name for name in arms):
        return content
    for base, table in arms.items():
        for name, (size, multiple) in ladder.rungs.items():
            try:
                own = {**table, **_settings(ladder, content["recipe"], table, size, multiple)}
            except ConfigError as error:
                raise ConfigError(f"{where}, arm {base}: {error}") from None
            made[f"{base}@{name}"] = own
    if (baseline := content.get("baseline")) in arms:
        content = {**content, "baseline": f"{baseline}@{list(ladder.rungs)[-1]}"}
    return {**content, "arms": made}


def _settings(
    ladder: Ladder, shared: Mapping[str, Any], table: Mapping[str, Any], size: str, multiple: float
) -> dict[str, Any]:
    """An arm's settings at a rung, by sections."""
    own = nested({key: value for key, value in table.items() if key not in ("group", "note", "measured")})
    if table.get("measured"):
        raise ConfigError("measured: an arm of a ladder is trained at every size")
    for name in OWN:
        section, _, leaf = name.partition(".")
        if leaf in own.get(section, {}):
            raise ConfigError(f"sets {name}, which [ladder] sets")
    place, shape = ladder.sizes.index(size), size_of(size)
    factor = (shape.parameters / size_of(ladder.sizes[0]).parameters) ** -ladder.lr_exponent
    base = build_recipe(shared, _first_rates(own))
    if base.task != "lm":
        raise ConfigError(f"task = {base.task}: [ladder] is for task = lm")
    rates: dict[str, Any] = {}
    for name in RATES:
        section, _, leaf = name.partition(".")
        given = own.get(section, {}).get(leaf)
        if isinstance(given, list):
            if len(given) != len(ladder.sizes):
                raise ConfigError(f"{name} = {given}: must be one number, or one for each of {len(ladder.sizes)} sizes")
            rates[name] = given[place]
        elif name in SCALED and factor != 1.0:
            rates[name] = float(f"{factor * getattr(getattr(base, section), leaf):.6g}")
    head = ladder.head_size or base.model.head_size
    if shape.n_embd % head:
        raise ConfigError(f"ladder.sizes: {size}: its width must be a multiple of the head size {head}")
    step = ladder.tokens_per_step[place] if ladder.tokens_per_step else base.batch.tokens_per_step
    lengths = {"train.max_steps": max(1, round(multiple * shape.parameters / step))}
    lengths |= {f"train.{key}": 0 for key in ("max_tokens", "max_epochs") if getattr(base.train, key)}
    batch = {"batch.tokens_per_step": step} if ladder.tokens_per_step else {}
    whole = {"model.n_layer": shape.n_layer, "model.n_embd": shape.n_embd, "model.n_head": shape.n_embd // head}
    return merged(own, rates, whole, lengths, batch)


def _first_rates(own: Mapping[str, Any]) -> dict[str, Any]:
    """An arm's settings with the first of each list of rates."""
    found = merged(own)
    for name in RATES:
        section, _, leaf = name.partition(".")
        if isinstance(values := found.get(section, {}).get(leaf), list) and values:
            found[section] = {**found[section], leaf: values[0]}
    return found


def branch_step(recipe: Recipe) -> int:
    """The step at which a run leaves a longer one that differs from it in its length alone; 0 if at none.

    Raises:
        ConfigError: a setting by which the length of a run bends it before its decay.
    """
    schedule, length = recipe.schedule, recipe.train.max_steps
    wrong = ""
    if schedule.shape not in ("wsd", "wsd-sqrt"):
        wrong = f"schedule.shape = {schedule.shape}: must be wsd or wsd-sqrt"
    elif schedule.decay_steps:
        wrong = f"schedule.decay_steps = {schedule.decay_steps}: must be 0, the end of each run"
    elif recipe.optim.name == "ademamix" and not recipe.optim.ademamix_warmup:
        wrong = "optim.ademamix_warmup = 0: must be a number of steps, as 0 is the length of the run"
    elif recipe.sparsity.method != "none":
        wrong = f"sparsity.method = {recipe.sparsity.method}: must be none, as its ramp follows the run's length"
    if wrong:
        raise ConfigError(f"ladder.branch = true: {wrong}")
    step = schedule.decay_begin(length)
    return step if step < length else 0
