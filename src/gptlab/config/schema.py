"""JSON schemas of recipe and study files, with which editors complete and check TOML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gptlab.config.ladder import RATES
from gptlab.config.layers import shipped
from gptlab.config.recipe import Recipe
from gptlab.config.sections import PRESETS
from gptlab.config.study import Study

KINDS = ("recipe", "study")
DRAFT = "http://json-schema.org/draft-07/schema#"  # what the editors' TOML servers read
BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


def json_schema(kind: str) -> dict[str, Any]:
    """The schema of a file: "recipe" or "study"."""
    recipe = Recipe.model_json_schema()
    recipe["$defs"]["Model"]["properties"]["preset"] = {
        "enum": list(PRESETS),
        "description": "Layers, heads and width of a known size.",
    }
    found = recipe if kind == "recipe" else _study_schema(recipe)
    return {"$schema": DRAFT, **_standard(found), "title": f"gptlab {kind}"}


def _study_schema(recipe: dict[str, Any]) -> dict[str, Any]:
    """The schema of a study's file, in which arms, factors and `settings` are parts of a recipe."""
    study = Study.model_json_schema()
    study["$defs"] |= recipe["$defs"]
    for rate in RATES:
        section, _, leaf = rate.partition(".")
        of_section = study["$defs"][section.capitalize()]["properties"]
        told = {key: of_section[leaf].pop(key) for key in ("default", "description")}
        one = of_section[leaf]  # an arm of a ladder may list one for each size
        of_section[leaf] = {"anyOf": [one, {"type": "array", "items": one, "minItems": 1}], **told}
    parts = {key: part for key, part in recipe["properties"].items() if key not in ("name", "description", "seed")}
    settings = {"type": "object", "properties": parts, "additionalProperties": False}
    for name, own in (("Arm", ("group", "note", "measured")), ("Factor", ("note",))):
        table = study["$defs"][name]
        kept = {key: table["properties"][key] for key in own}
        study["$defs"][name] = settings | {"description": table["description"], "properties": {**kept, **parts}}
    whole = {**parts, **{key: recipe["properties"][key] for key in ("name", "description", "seed")}}
    names = {"type": "string", "description": "A shipped recipe, or the path of a TOML file."}
    study["properties"] |= {
        "recipe": {"anyOf": [names, settings | {"properties": whole}], "description": "What all arms share."},
        "settings": settings | {"description": "Settings of all arms, which replace the recipe's."},
        "arms_of": {"type": "string", "description": "A study whose arms, baseline and questions this file takes."},
    }
    study.pop("required", None)  # arms_of may bring what is missing
    return study


def _standard(part: Any) -> Any:
    """A schema with the bounds under their names in JSON Schema, and no titles of single settings."""
    if isinstance(part, list):
        return [_standard(item) for item in part]
    if not isinstance(part, dict):
        return part
    kept = {k: v for k, v in part.items() if not (k == "title" and isinstance(v, str))}
    return {BOUNDS.get(k, k) if isinstance(v, int | float) else k: _standard(v) for k, v in kept.items()}


def schema_file(kind: str) -> Path:
    """The schema as it is shipped, to which `#:schema` in the shipped files leads."""
    return shipped()["smoke-lm"].parents[1] / "schemas" / f"{kind}.json"
