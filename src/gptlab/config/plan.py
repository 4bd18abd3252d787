"""The registered plan of a study: what it asks, as it was before its first run, and what has changed since."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from gptlab.config.study import Study
from gptlab.errors import ConfigError

# What of a study is no part of its plan: texts, and what its runs are. `study_differences` looks after the runs.
NOT_PLANNED = {"name", "description", "recipe", "arms", "flags", "seeds"}


def study_plan(study: Study) -> dict[str, Any]:
    """What a study asks: the names of its arms, baseline, metric and margin, questions, and every rule beside them."""
    asked = study.model_dump(mode="json", exclude=NOT_PLANNED | ({"ladder"} if study.ladder is None else set()))
    return {"arms": sorted(study.arms), **asked}


def plan_hash(plan: Mapping[str, Any]) -> str:
    """sha256 of a plan as canonical JSON: sorted keys, no spaces, UTF-8."""
    text = json.dumps(plan, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def plan_changes(plan: Mapping[str, Any], study: Study) -> list[str]:
    """What a study asks now that its registered plan did not, one sentence each.

    Raises:
        ConfigError: the plan is not one that `study_plan` makes.
    """
    then, now = _parts(_with_defaults(plan)), _parts(study_plan(study))
    changes = []
    for name in {**then, **now}:
        if name not in then:
            changes.append(f"{name} was added after the first run")
        elif name not in now:
            changes.append(f"{name} was removed after the first run")
        elif then[name] != now[name]:
            one, two = then[name], now[name]
            edits = [
                f"{key} {_shown(one.get(key))} then, {_shown(two.get(key))} now".strip()
                for key in {**one, **two}
                if one.get(key) != two.get(key)
            ]
            changes.append(f"{name} was changed after the first run: {'; '.join(edits)}")
    return changes


def _with_defaults(plan: Mapping[str, Any]) -> dict[str, Any]:
    """A plan with what an earlier version of gptlab did not write, at its default."""
    known = {key: value for key, value in plan.items() if key in Study.model_fields and key not in NOT_PLANNED}
    fields: dict[str, Any] = Study.model_fields
    try:
        values = {key: TypeAdapter(fields[key].annotation).validate_python(value) for key, value in known.items()}
        arms = TypeAdapter(list[str]).validate_python(plan.get("arms"))
    except ValidationError as error:
        raise ConfigError(f"not a plan of this version of gptlab: {error.errors()[0]['msg']}") from None
    whole = Study.model_construct(name="", recipe={}, arms={}, **{"baseline": "", **values})
    return {**study_plan(whole), "arms": arms}


def _parts(plan: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{what a sentence names: its settings}."""
    parts: dict[str, dict[str, Any]] = {}
    for key, value in plan.items():
        if key == "arms":
            parts |= {f"arm {arm}": {} for arm in value}
        elif key == "questions":
            parts |= {f"question {question['id']}": question for question in value}
        elif value is not None:
            name = {"variances": "the rule for variances"}.get(key, f"the {key}")
            parts[name] = value if isinstance(value, dict) else {"": value}
    return parts


def _shown(value: Any) -> str:
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
