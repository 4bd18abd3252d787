"""Layers of settings: merged in order, validated once, and refused in sentences.

A recipe file, an arm's overrides and the flags of a command line are such layers: dictionaries with the same keys.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from gptlab.config.sections import PRESETS
from gptlab.errors import ConfigError

Validated = TypeVar("Validated", bound=BaseModel)


def settings_of(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting of a model and its sections as (dotted name, pydantic FieldInfo), in the order of the schema."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from settings_of(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def nested(layer: Mapping[str, Any]) -> dict[str, Any]:
    """Nest dotted keys: {"optim.lr": 1} becomes {"optim": {"lr": 1}}. model.preset is replaced by the shape it names.

    Raises:
        ConfigError: a section that is given a value, or an unknown preset.
    """
    result: dict[str, Any] = {}
    for key, value in layer.items():
        section, dot, leaf = key.partition(".")
        if dot:
            inner = result.setdefault(section, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"{section} = {inner}: must be a section of settings")
            inner[leaf] = value
        elif isinstance(value, Mapping) and isinstance(result.get(key, {}), dict):
            result[key] = {**result.get(key, {}), **value}
        else:
            result[key] = value
    model = result.get("model")
    if isinstance(model, dict) and "preset" in model:
        preset = model.pop("preset")
        if preset not in PRESETS:
            raise ConfigError(f"model.preset = {preset!r}: must be one of {', '.join(PRESETS)}")
        result["model"] = {**PRESETS[preset], **model}
    return result


def flat(layer: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The (dotted name, value) pairs of a nested layer."""
    for key, value in layer.items():
        if isinstance(value, Mapping) and prefix + key != "data.mixture":
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Layers nested and merged setting by setting; later layers win."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in nested(layer).items():
            is_section = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = {**result[key], **value} if is_section else value
    return result


def validated(model: type[Validated], content: Mapping[str, Any], where: str = "") -> Validated:
    """The model made of `content`. Raises ConfigError with a sentence for each wrong setting, after `where`."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        names = [name for name, _ in settings_of(model)]
        raise ConfigError(where + _sentences(error, names)) from None


def unknown_name(name: str, known: Iterable[str]) -> ConfigError:
    """The error for a name that is not a setting, with the known name that was probably meant."""
    known = [*known, "model.preset"]
    if name in known:  # from a command line: only settings of a section are flags
        return ConfigError(f"no flag '--{name}'; did you mean a line '{name} = ...' in the recipe file?")
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    if not close:  # the right word in the wrong section
        leaf = name.rsplit(".", 1)[-1]
        close = [key for key in known if key.rsplit(".", 1)[-1] == leaf]
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return ConfigError(f"no setting '{name}'{hint}")


# Pydantic's error types: what a value must be, and the key of the bound in the error's context.
_BOUNDS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}
_KINDS = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "string": "text",
    "dict": "a table",
    "finite_number": "a finite number",
    "model": "a section of settings",
    "model_attributes": "a section of settings",
}


def _sentences(error: ValidationError, known: list[str]) -> str:
    """Pydantic's errors, one sentence per setting: `optim.lr = -1: must be greater than 0`."""
    problems: dict[str, list[str]] = {}
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            problems.setdefault(str(unknown_name(name, known)), [])
        elif item["type"] == "missing":  # only in a study: every setting of a recipe has a default
            problems.setdefault(f"{name} is missing", [])
        elif item["type"] == "value_error":  # a complete sentence of our own
            problems.setdefault(str(item["ctx"]["error"]), [])
        else:  # the location may go on after the setting: an element, or a branch of a union
            name = next((key for key in known if "." in key and name.startswith(key + ".")), name)
            value = item["input"] if not isinstance(item["input"], dict) else "{...}"
            problems.setdefault(f"{name} = {value}", []).append(_requirement(item))
    lines = [f"{head}: must be {' or '.join(dict.fromkeys(says))}" if says else head for head, says in problems.items()]
    return "\n".join(lines)


def _requirement(item: Any) -> str:
    """What a value must be: `greater than 0`."""
    kind = item["type"]
    if kind in _BOUNDS:
        words, key = _BOUNDS[kind]
        return f"{words} {item['ctx'][key]:g}"
    if kind == "literal_error":
        expected: str = item["ctx"]["expected"]
        return f"one of {expected}" if " or " in expected else expected
    if kind == "too_short":
        return f"a list of at least {item['ctx']['min_length']}"
    stem = kind.removesuffix("_type").removesuffix("_parsing")
    return _KINDS.get(stem, item["msg"].replace("Input should be ", ""))
