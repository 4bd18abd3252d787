"""gptlab: a laboratory for pretraining GPT-2-class language models.

>>> import gptlab
>>> recipe = gptlab.load_recipe("shakespeare-char-cpu", {"train.max_steps": 100})
>>> result = gptlab.train(recipe, out="runs/first")
>>> run = gptlab.load_run("runs/first")
>>> run.tokenizer.decode(run.tokenizer.encode("To be"))
'To be'
"""

from typing import TYPE_CHECKING, Any

from gptlab.version import VERSION as __version__  # noqa: F401

__all__ = [
    "Recipe",
    "Result",
    "Run",
    "Study",
    "judge",
    "load_recipe",
    "load_run",
    "load_study",
    "prepare",
    "report",
    "run_study",
    "runs",
    "train",
]

if TYPE_CHECKING:
    from gptlab.api import Run as Run
    from gptlab.api import judge as judge
    from gptlab.api import load_run as load_run
    from gptlab.api import run_study as run_study
    from gptlab.config import Recipe as Recipe
    from gptlab.config import Study as Study
    from gptlab.config import load_recipe as load_recipe
    from gptlab.config import load_study as load_study
    from gptlab.data.prepare import prepare as prepare
    from gptlab.report import report as report
    from gptlab.report.listing import runs as runs
    from gptlab.training.loop import train as train
    from gptlab.training.result import Result as Result

# Importing torch takes over a second: names are loaded when they are first asked for.
_HOMES = {
    **dict.fromkeys(("Recipe", "Study", "load_recipe", "load_study"), "gptlab.config"),
    **dict.fromkeys(("Run", "judge", "load_run", "run_study"), "gptlab.api"),
    "runs": "gptlab.report.listing",
    "prepare": "gptlab.data.prepare",
    "train": "gptlab.training.loop",
    "Result": "gptlab.training.result",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "report":  # a package that is a function too
        return import_module("gptlab.report")
    if name not in _HOMES:
        raise AttributeError(f"module 'gptlab' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__", "__doc__", "__name__", "__path__", "__file__"]
