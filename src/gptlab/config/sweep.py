"""A study made of a recipe and the values that some of its settings take, as `gptlab study sweep` is given them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gptlab.config.folder import assignment, changed_settings, short_name
from gptlab.config.layers import parse_flag
from gptlab.config.recipe import build_recipe, merged, validated
from gptlab.config.study import Study
from gptlab.errors import ConfigError

MOST_ARMS = 64  # each is trained with every seed; a study file may have more
FORM = "optim.lr=1e-3,3e-3 names a setting and its values"
PER_TOKEN = {"data.tokenizer", "data.path"}  # of another tokenizer, the loss per token is another quantity
NO_SWEEP = ("name", "description", "seed")


def sweep_study(layer: Mapping[str, Any], changes: Sequence[str], flags: Mapping[str, Any], seeds: int) -> Study:
    """The study whose arms are all combinations of the values. Every recipe is validated.

    The baseline is the arm with the recipe's own values, or the first arm if they are not among the values. The name
    is that of the recipe with the flags and the values that are swept: other values are another study.

    Args:
        layer: the recipe's settings.
        changes: `setting=value,value`, one for each setting.
        flags: dotted names to values, for all arms.
        seeds: 0, 1, ... for each arm.

    Raises:
        ConfigError: a change of another form, an unknown setting, a value out of bounds, or too many arms.
    """
    swept: dict[str, list[Any]] = {}
    for change in changes:
        name, values = read_change(change)
        if name in swept:
            raise ConfigError(f"{name} is swept twice: name all its values together, {name}=A,B,C")
        if name in flags:
            raise ConfigError(f"{name} is swept, and --{name} gives it one value: leave one of them out")
        swept[name] = values
    count = " x ".join(str(len(values)) for values in swept.values())
    arms: dict[str, dict[str, Any]] = {}
    for combination in itertools.islice(itertools.product(*swept.values()), MOST_ARMS + 1):
        own = dict(zip(swept, combination, strict=True))
        name = re.sub(r"[^\w.+=,-]+", "-", "+".join(itertools.starmap(assignment, own.items())), flags=re.ASCII)
        if arms.setdefault(name, own) is not own:
            raise ConfigError(f"two arms would be called {name}: name values that differ in letters or digits")
    if len(arms) > MOST_ARMS:
        raise ConfigError(f"{count} arms: a sweep has at most {MOST_ARMS}; name fewer values, or write a study file")
    if len(arms) < 2:
        raise ConfigError(f"a sweep compares at least two values: {FORM}")
    for own in arms.values():
        build_recipe(layer, flags, own)
    base = build_recipe(layer, flags)
    same = (name for name, own in arms.items() if build_recipe(layer, flags, own) == base)
    whole = {**changed_settings(base, layer, flags), **swept}
    suffix = short_name("".join(f"+{assignment(name, value)}" for name, value in whole.items()), whole)
    recipe = {key: value for key, value in merged(layer).items() if key not in NO_SWEEP}
    content = {
        "name": re.sub(r"[^A-Za-z0-9_.+=,-]+", "-", base.name).lstrip("-.+=,_") + suffix,
        "description": f"a sweep of {base.name}: {' '.join(changes)}",
        "recipe": recipe,
        "arms": {name: {"settings": merged(own)} for name, own in arms.items()},
        "flags": merged(flags),
        "seeds": list(range(seeds)),
        "baseline": next(same, next(iter(arms))),
        "metric": {"name": "val_bits_per_byte" if PER_TOKEN & swept.keys() else "final_val_loss"},
    }
    return validated(Study, content, f"study {content['name']}: ")


def read_change(text: str) -> tuple[str, list[Any]]:
    """A setting and its values: `optim.lr=1e-3,3e-3`. Commas in brackets are part of a value."""
    name, equals, values = text.partition("=")
    name = name.strip().replace("-", "_")
    pieces = [piece.strip() for piece in re.split(r",(?![^\[]*\])", values)]
    if not equals or not all(pieces):
        raise ConfigError(f"{text}: {FORM}")
    if name in NO_SWEEP:
        raise ConfigError(f"{name} cannot be swept" + "; --seeds N trains every arm with N seeds" * (name == "seed"))
    parsed = [parse_flag(name, piece) for piece in pieces]
    if twice := [piece for i, piece in enumerate(pieces) if parsed[i] in parsed[:i]]:
        raise ConfigError(f"{name} = {twice[0]} is named twice")
    return name, parsed
