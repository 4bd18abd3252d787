"""Settings as a user meets them: as flags on a command line, in help texts, and in the documentation."""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gptlab.config.recipe import Recipe, settings_marked, unknown_setting
from gptlab.config.sections import IN_STUDY, ON_RESUME, PRESETS

TYPES = {"boolean": "true|false", "integer": "N", "number": "X", "string": "TEXT", "array": "LIST", "object": "TABLE"}


@dataclass(frozen=True)
class Setting:
    """A setting: what may be typed for it, its default and its meaning."""

    name: str
    """Dotted: optim.lr."""
    types: tuple[str, ...]
    """JSON Schema's types of its values: boolean, integer, number, string, array, object."""
    choices: tuple[str, ...]
    """Values with a name: all values of a choice, `auto` beside a number or a boolean, else empty."""
    low: int | None
    """Lower bound of a whole number."""
    default: Any
    description: str

    @property
    def flag(self) -> str:
        """--optim.weight-decay."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def accepts(self) -> str:
        """What may be typed: `N|auto`, `true|false`, `ddp|fsdp|none`, `TEXT`."""
        free = [TYPES[kind] for kind in self.types if kind != "string" or not self.choices]
        return "|".join([*free, *self.choices])


@functools.cache
def flag_sections() -> dict[str, tuple[str, tuple[Setting, ...]]]:
    """Title and settings of every section, in the order of the schema; the key "" has the settings without one."""
    schema = Recipe.model_json_schema()
    top = {name: part for name, part in schema["properties"].items() if "$ref" not in part}
    found = {"": ("", tuple(_setting(name, part) for name, part in top.items()))}
    for section, part in schema["properties"].items():
        if section not in top:
            content = schema["$defs"][part["$ref"].rpartition("/")[2]]
            title = f"{section}: " + re.split(r"[.;:]( |$)| \(", content["description"])[0]
            rows = [_setting(f"{section}.{name}", setting) for name, setting in content["properties"].items()]
            found[section] = (title, (PRESET, *rows) if section == "model" else tuple(rows))
    return found


def _setting(name: str, part: Mapping[str, Any]) -> Setting:
    """A setting, from its JSON Schema."""
    branches = part.get("anyOf", [part])
    choices = [v for branch in branches for v in branch.get("enum", [branch["const"]] if "const" in branch else [])]
    low = next((branch[key] for branch in branches for key in ("ge", "minimum") if key in branch), None)
    types = tuple(dict.fromkeys(branch["type"] for branch in branches))
    return Setting(name, types, tuple(choices), low, part.get("default", {}), part["description"])


PRESET = Setting(
    "model.preset", ("string",), tuple(PRESETS), None, "", "Layers, heads and width of a known size, set together."
)


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
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # validation says what is wrong with it


def parse_flags(overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    """A layer of dotted names to values, in which text is read as on a command line."""
    return {k: parse_flag(k, v) if isinstance(v, str) else v for k, v in (overrides or {}).items()}


def marks_as_markdown() -> str:
    """What may change without becoming another run, for docs/recipes.md: `python -m gptlab.config` prints it."""
    lines = []
    for title, mark in (("Resuming may change", ON_RESUME), ("Calls for one study may differ in", IN_STUDY)):
        marked = settings_marked(mark)
        names: list[str] = []
        for section, (_, rows) in flag_sections().items():
            whole = section and all(row.name in marked for row in rows)
            names += [f"{section}.*"] if whole else [row.name for row in rows if row.name in marked]
        lines.append(f"{title} " + ", ".join(f"`{name}`" for name in names) + ".")
    return "\n\n".join(lines)
