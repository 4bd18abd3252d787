"""Where layers of settings come from: flags, with what may be typed for each, and shipped or own TOML files."""

from __future__ import annotations

import difflib
import functools
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from gptlab.config.recipe import Recipe, build_recipe, settings_marked, unknown_setting
from gptlab.config.sections import IN_STUDY, ON_RESUME, PRESETS
from gptlab.errors import ConfigError
from gptlab.files import parse_toml, read_toml

TYPES = {"integer": "N", "number": "X", "string": "TEXT", "array": "LIST", "object": "TABLE"}


@dataclass(frozen=True)
class Setting:
    """What may be typed for a setting, its default and its meaning."""

    name: str
    types: tuple[str, ...]
    """JSON Schema's types of its values: boolean, integer, number, string, array, object."""
    choices: tuple[Any, ...]
    """Values with a name: all values of a choice or a boolean, `auto` beside a number, else empty."""
    low: int | None
    """Lower bound of a whole number."""
    default: Any
    description: str

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    @property
    def accepts(self) -> str:
        """What may be typed: `N|auto`, `true|false`, `ddp|fsdp|none`, `TEXT`."""
        free = [TYPES[kind] for kind in self.types if kind in TYPES and not (kind == "string" and self.choices)]
        return "|".join([*free, *(str(v).lower() if isinstance(v, bool) else v for v in self.choices)])


def _setting(name: str, part: Mapping[str, Any]) -> Setting:
    """A setting from its JSON Schema."""
    branches = part.get("anyOf", [part])
    types = tuple(dict.fromkeys(branch["type"] for branch in branches))
    choices = [True, False] if "boolean" in types else []
    for branch in branches:
        branch = branch.get("items", branch)  # of a list, what may be in it
        choices += branch.get("enum", [branch["const"]] if "const" in branch else [])
    low = next((branch[key] for branch in branches for key in ("ge", "minimum") if key in branch), None)
    return Setting(name, types, tuple(choices), low, part.get("default", {}), part["description"])


@functools.cache
def flag_sections() -> dict[str, tuple[str, tuple[Setting, ...]]]:
    """Title and settings of every section, in the order of the schema; settings without a section have the key ""."""
    schema = Recipe.model_json_schema()
    found = {"": ("", tuple(_setting(k, part) for k, part in schema["properties"].items() if "$ref" not in part))}
    for name, part in schema["properties"].items():
        if "$ref" in part:
            section = schema["$defs"][part["$ref"].rpartition("/")[2]]
            title = f"{name}: " + re.split(r"[.;:]( |$)| \(", section["description"])[0]
            rows = [_setting(f"{name}.{key}", setting) for key, setting in section["properties"].items()]
            found[name] = (title, (PRESET, *rows) if name == "model" else tuple(rows))
    return found


PRESET = Setting("model.preset", ("string",), tuple(PRESETS), None, "", "Layers, heads and width of a known size.")


@functools.cache
def flags_by_name() -> dict[str, Setting]:
    return {setting.name: setting for _, rows in flag_sections().values() for setting in rows}


def parse_flag(name: str, text: str) -> Any:
    """The value of a setting from text, as on a command line: TOML, or plain text where the setting takes text.

    Raises:
        ConfigError: `name` is not a setting.
    """
    if name not in flags_by_name():
        raise unknown_setting(name)
    if flags_by_name()[name].types == ("string",):
        return text
    try:
        return parse_toml(f"value = {text}")["value"]
    except (ValueError, LookupError):
        return text  # validation says what is wrong with it


def parse_flags(overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    """A layer of dotted names to values, in which text is read as on a command line."""
    return {k: parse_flag(k, v) if isinstance(v, str) else v for k, v in (overrides or {}).items()}


def marks_as_markdown() -> str:
    """What may change without making another run, for docs/recipes.md; `python -m gptlab.config` prints it."""
    paragraphs = []
    for intro, mark in (("Resuming may change", ON_RESUME), ("Two calls for one study may differ in", IN_STUDY)):
        names: list[str] = []
        for section, (_, rows) in flag_sections().items():
            marked = [row.name for row in rows if row.name in settings_marked(mark)]
            names += [f"{section}.*"] if section and len(marked) == len(rows) else marked
        listed = ", ".join(f"`{name}`" for name in names)
        paragraphs.append(textwrap.fill(f"{intro} {listed}.", 120, break_on_hyphens=False))
    return "\n\n".join(paragraphs)


# -- files ----------------------------------------------------------------------------------------------------------


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
    try:
        found = path.is_file()
    except (OSError, ValueError):  # a name that is too long, or has a NUL
        found = False
    if not found:
        text = text if len(text) <= 200 else f"{text[:200]}..."
        close = difflib.get_close_matches(text, shipped(kind), n=1, cutoff=0.4)
        hint = f"did you mean '{close[0]}'? " if close else ""
        listed = f"`gptlab {kind}` lists the shipped {kind}"
        if kind == "comparisons":
            listed = f"shipped are {', '.join(shipped(kind))}"
        one = {"recipes": "recipe", "studies": "study", "comparisons": "comparison"}[kind]
        raise ConfigError(f"no {one} '{text}': {hint}{listed}; a path to a TOML file works too")
    return {"name": path.stem, **read_toml(path, ConfigError)}


def load_recipe(name_or_path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe by shipped name or path.

    >>> load_recipe("shakespeare-char-cpu", {"optim.lr": 3e-4}).optim.lr
    0.0003

    Args:
        name_or_path: a name that `gptlab recipes` lists, or a path to a TOML file.
        overrides: dotted names to values that replace the file's; text is read as on the command line.

    Raises:
        ConfigError: an unknown recipe or setting, or a value out of bounds.
    """
    return build_recipe(read_layer(name_or_path), parse_flags(overrides))
