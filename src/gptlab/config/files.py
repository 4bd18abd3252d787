"""Shipped recipes, studies and comparisons, and reading their TOML files."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from gptlab.config.flags import parse_flags
from gptlab.config.recipe import Recipe, build_recipe
from gptlab.errors import ConfigError

ONE = {"recipes": "recipe", "studies": "study", "comparisons": "comparison"}


def shipped(kind: str = "recipes") -> dict[str, Path]:
    """Paths of the shipped recipes, studies or comparisons by name."""
    folder = Path(str(resources.files("gptlab") / kind))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def read_layer(name_or_path: str | Path, kind: str = "recipes") -> dict[str, Any]:
    """The content of a recipe, study or comparison file, by shipped name or path, before validation.

    Raises:
        ConfigError: there is no such file, or it is not TOML.
    """
    text = str(name_or_path)
    path = shipped(kind).get(text) or Path(text)
    if not path.is_file():
        close = difflib.get_close_matches(text, shipped(kind), n=1, cutoff=0.4)
        hint = f"did you mean '{close[0]}'? " if close else ""
        listed = f"`gptlab {kind}` lists the shipped {kind}"
        if kind == "comparisons":
            listed = f"shipped are {', '.join(shipped(kind))}"
        raise ConfigError(f"no {ONE[kind]} '{text}': {hint}{listed}; a path to a TOML file works too")
    try:
        layer = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a TOML file: {error}") from None
    return {"name": path.stem, **layer}


def load_recipe(name_or_path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe by shipped name or path.

    Args:
        name_or_path: a name that `gptlab recipes` lists, or a path to a TOML file.
        overrides: dotted names to values that replace the file's; text is read as on the command line.

    Raises:
        ConfigError: an unknown recipe or setting, or a value out of bounds.
    """
    return build_recipe(read_layer(name_or_path), parse_flags(overrides))
