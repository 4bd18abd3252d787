"""The folder of a run whose --out is not given."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

from gptlab.config.recipe import Recipe, build_recipe, may_change, settings, value_of
from gptlab.errors import ConfigError

LONGEST = 80  # characters of the changed settings; longer ones are named by a hash
HASH_DIGITS = 8


def run_folder(recipe: Recipe, named: str | Path, layer: Mapping[str, Any], flags: Mapping[str, Any]) -> Path:
    """runs/<recipe>[+leaf=value...]_seed<k>: another folder for each value of a setting that makes another run.

    Settings that a resumed run may change do not count, nor do flags that say what the recipe says. A run directory in
    place of a recipe means itself, and RUN/recipe.toml keeps the changes that are in the name of RUN.

    Args:
        recipe: the recipe with the flags.
        named: what was typed for RECIPE: a name, a file or a run directory.
        layer: the recipe's settings without the flags.
        flags: dotted names to values.
    """
    changed = changed_settings(recipe, layer, flags)
    run = Path(named)
    itself = (run / "recipe.toml").is_file()
    folder = run if itself else run.parent
    stem = re.sub(r"_seed-?\d+$", "", folder.resolve().name)
    if itself and not changed and recipe.seed == layer.get("seed", recipe.seed):
        return run
    if not itself and not (run.name == "recipe.toml" and stem.startswith(f"{recipe.name}+")):
        stem = recipe.name
    return (run.parent if itself else Path("runs")) / f"{stem}{_suffix(changed)}_seed{recipe.seed}"


def changed_settings(recipe: Recipe, layer: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags, in the order of the schema, that make another run of a recipe."""
    try:
        before: Recipe | None = build_recipe(layer)
    except ConfigError:  # it is complete with the flags only
        before = None
    found = {}
    for name in ("model.preset", *(name for name, _ in settings())):
        if name in flags and name != "seed" and not may_change(name):
            whole = "model" if name == "model.preset" else name
            if before is None or value_of(before, whole) != value_of(recipe, whole):
                found[name] = flags[name] if name == "model.preset" else value_of(recipe, name)
    return found


def _suffix(changed: Mapping[str, Any]) -> str:
    """+leaf=value for each setting; + and a hash where that is long, or holds what a name of a folder should not."""
    return short_name("".join(f"+{assignment(name, value)}" for name, value in changed.items()), changed)


def short_name(suffix: str, changed: Any) -> str:
    """A suffix of a name, or + and a hash of what it says where it is long or no folder should be called that."""
    if len(suffix) <= LONGEST and re.fullmatch(r"[\w+.,=-]*", suffix, re.ASCII):
        return suffix
    return "+" + hashlib.sha256(json.dumps(changed).encode()).hexdigest()[:HASH_DIGITS]


def assignment(name: str, value: Any) -> str:
    """A setting as short as it is clear: lr=3e-4, and with its section where two have the same name."""
    leaf = name.rpartition(".")[2]
    return f"{leaf if _leaves()[leaf] <= 1 else name}={_written(value)}"


@functools.cache
def _leaves() -> Counter[str]:
    return Counter(name.rpartition(".")[2] for name, _ in settings())


def _written(value: Any) -> str:
    """A value in a name: 3e-4 for 0.0003, true for True, 0.9,0.95 for a list."""
    if isinstance(value, list | tuple):
        return ",".join(map(_written, value))
    if isinstance(value, float):
        plain = repr(value).removesuffix(".0")
        _, digits, exponent = Decimal(plain).normalize().as_tuple()
        if len(digits) == 1 and isinstance(exponent, int) and len(plain) > 3:
            return f"{'-' * (value < 0)}{digits[0]}e{exponent}"
        return plain
    return str(value).lower() if isinstance(value, bool) else str(value)
