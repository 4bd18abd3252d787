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

__all__ = ["Recipe", "Result", "Study", "load_recipe", "load_run", "load_study", "train"]

if TYPE_CHECKING:
    from gptlab.config import Recipe as Recipe
    from gptlab.config import Study as Study
    from gptlab.config import load_recipe as load_recipe
    from gptlab.config import load_study as load_study
    from gptlab.training.load import load_run as load_run
    from gptlab.training.loop import train as train
    from gptlab.training.result import Result as Result

# Importing torch takes over a second: names are loaded when they are first asked for.
_HOMES = {
    "Recipe": "gptlab.config",
    "Study": "gptlab.config",
    "load_recipe": "gptlab.config",
    "load_study": "gptlab.config",
    "train": "gptlab.training.loop",
    "Result": "gptlab.training.result",
    "load_run": "gptlab.training.load",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gptlab' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
