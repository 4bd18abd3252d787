"""The JSON schemas accept what is shipped, refuse what `build_recipe` refuses, and are shipped as they are printed."""

import json
import tomllib
from typing import Any

import pytest
from jsonschema import Draft7Validator

from gptlab.cli import main
from gptlab.config import shipped
from gptlab.config.schema import KINDS, json_schema, schema_file

FOLDERS = {"recipe": "recipes", "study": "studies"}


def faults(kind: str, content: Any) -> list[str]:
    return [error.message for error in Draft7Validator(json_schema(kind)).iter_errors(content)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_shipped_files_name_a_schema_that_accepts_them(kind: str) -> None:
    Draft7Validator.check_schema(json_schema(kind))
    for name, path in shipped(FOLDERS[kind]).items():
        first, _, rest = path.read_text(encoding="utf-8").partition("\n")
        assert (path.parent / first.removeprefix("#:schema ")).resolve() == schema_file(kind).resolve(), name
        assert faults(kind, tomllib.loads(rest)) == [], name


@pytest.mark.parametrize("kind", KINDS)
def test_the_shipped_schema_is_what_is_printed(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Otherwise: gptlab schema KIND > src/gptlab/schemas/KIND.json"""
    with pytest.raises(SystemExit):
        main(["schema", kind])
    assert capsys.readouterr().out == schema_file(kind).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "kind, content",
    [
        ("recipe", {"optim": {"lrr": 1.0}}),
        ("recipe", {"optim": {"lr": -1.0}}),
        ("recipe", {"model": {"mlp": "relu"}}),
        ("recipe", {"model": {"preset": "gpt5"}}),
        ("recipe", {"model": {"n_layer": 0}}),
        ("recipe", {"compile": {"enabled": "yes"}}),
        ("study", {"arms": {"a": {"optim": {"lrr": 1.0}}}}),
        ("study", {"arms": {"a": {"group": "middle"}}}),
        ("study", {"arms": {"a": {"seed": 3}}}),
        ("study", {"arms": {"a": {"optim": {"lr": [1e-3, -1e-3]}}}}),
        ("study", {"settings": {"optim": {"name": "adam"}}}),
        ("study", {"factors": {"a": {"model": {"norm": "none"}}}}),
    ],
)
def test_what_is_wrong_is_found(kind: str, content: Any) -> None:
    assert len(faults(kind, content)) == 1


def test_an_arm_of_a_ladder_lists_its_rates() -> None:
    rates = {"optim": {"lr": [2e-3, 1e-3], "muon_lr": 0.02}, "schedule": {"min_lr": [2e-4, 1e-4]}}
    assert faults("study", {"ladder": {"sizes": ["2x64", "4x128"]}, "arms": {"a": rates}}) == []


def test_it_says_what_a_setting_is() -> None:
    setting = json_schema("recipe")["$defs"]["Optim"]["properties"]["lr"]
    assert setting["description"] == "Peak learning rate." and setting["exclusiveMinimum"] == 0
    json.dumps(json_schema("study"))
