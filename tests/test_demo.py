"""The parts of `make demo` that need no training."""

import ast
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from gptlab.config import load_recipe


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", Path(__file__).parents[1] / "examples/demo.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("a = 1\nb = (2,\n", "a = 1"),
        ("a = 1\nb = 2\nc", "a = 1\nb = 2"),  # the last line may be cut off anywhere
        ("class A:\n    def f(self):\n        return 1\n\n   x\n", "class A:\n    def f(self):\n        return 1"),
        ("def f(\n", ""),
        ("a = 1\n\0\n", "a = 1"),
        ("", ""),
    ],
)
def test_a_text_is_shown_as_far_as_it_is_python(demo: ModuleType, text: str, kept: str) -> None:
    assert demo.valid_python(text) == kept


def test_the_prompt_begins_python_and_the_text_has_room_to_go_on(demo: ModuleType) -> None:
    recipe = load_recipe(demo.RECIPE)
    ast.parse(recipe.sample.prompt + 'Put it."""\n')
    assert len(recipe.sample.prompt) / 3 + recipe.sample.max_tokens <= 1.2 * recipe.model.block_size
