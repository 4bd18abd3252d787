"""A run opened for use: its model and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gptlab.config import Recipe
from gptlab.data.tokenizers import Tokenizer, load_tokenizer
from gptlab.errors import RunError
from gptlab.model.gpt import GPT
from gptlab.precision.regimes import make_regime
from gptlab.rundir import RunDir
from gptlab.tasks.base import task_of
from gptlab.tasks.lm import NOT_DRAWN, continuations, continued, repeated, streamed
from gptlab.training.checkpoint import checkpoint_step, open_checkpoint
from gptlab.training.setup import pick_device
from gptlab.training.tensors import stored_weights


@dataclass
class Run:
    """A trained run as the rest of the package opens it; `gptlab.Run` adds what needs reports and scores."""

    path: Path
    recipe: Recipe
    model: Any
    """A GPT, or an Encoder where recipe.task = "classify"."""
    tokenizer: Tokenizer
    step: int
    """Optimizer updates the weights have seen."""

    def __repr__(self) -> str:
        parameters = sum(weight.numel() for weight in self.model.parameters())
        return f"Run('{self.path}', recipe={self.recipe.name!r}, step={self.step}, parameters={parameters:,})"

    def sample(
        self, prompt: str | Sequence[str] | None = None, samples: int = 1, stop: bool = False, **settings: Any
    ) -> list[str]:
        """Texts that continue a prompt, the prompt included.

        Args:
            prompt: default the recipe's. Of several all texts are drawn at once; a text is the same as alone.
            samples: how many of each prompt; those of the first prompt come first.
            stop: end a text at end-of-text, which is left out.
            settings: max_tokens, temperature, top_k, top_p, seed; default the recipe's `sample` section. `compiled`
                compiles the reading of a token, which only pays on a GPU and for tens of thousands of them.
        """
        prompts = self.recipe.sample.prompt if prompt is None else prompt
        rows = list(self.ids(prompts, samples, stop, **settings))
        texts = repeated(prompts, samples)
        return [continued(self.tokenizer, text, [row[i] for row in rows], stop) for i, text in enumerate(texts)]

    def stream(self, prompt: str | None = None, stop: bool = False, **settings: Any) -> Iterator[str]:
        """The text of `sample` in pieces, as it is drawn; arguments as for `sample`."""
        text = self.recipe.sample.prompt if prompt is None else prompt
        ids = (index for (index,) in self.ids(text, 1, stop, **settings))
        yield from streamed(self.tokenizer, text, ids, stop)

    def ids(
        self, prompt: str | Sequence[str], samples: int = 1, stop: bool = False, **settings: Any
    ) -> Iterator[list[int]]:
        """The ids as they are drawn, one of each sample at a time; arguments as for `sample`."""
        if not isinstance(self.model, GPT):
            raise RunError(f"{self.path} is a run of task = {self.recipe.task}: it generates no text")
        chosen = {**self.recipe.sample.model_dump(exclude=NOT_DRAWN), **settings}
        yield from continuations(self.model, self.tokenizer, prompt, samples, stop, **chosen)


def load_run(path: str | Path, checkpoint: str = "last", device: str = "auto") -> Run:
    """Open a run directory.

    Args:
        path: the run directory.
        checkpoint: "last", "best" (lowest val_loss among those written) or a step.
        device: as train.device.

    Raises:
        RunError: no run, no such checkpoint, or a damaged one.
    """
    run = RunDir.open(path)
    recipe = run.read_recipe()
    where = pick_device(device)
    saved = open_checkpoint(run, checkpoint)
    shape, fill = partial(saved.shape, "model"), stored_weights(saved)
    model = task_of(recipe).stored_model(recipe, shape, where, make_regime(recipe.precision, where), fill)
    tokenizer = load_tokenizer(run.tokenizer_file)
    return Run(Path(path), recipe, model.eval(), tokenizer, checkpoint_step(saved.path))
