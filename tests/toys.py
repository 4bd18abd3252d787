"""A toy of each kind that CONTRIBUTING.md says how to add, written outside the package."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from gptlab.config import Model, Optim, Recipe
from gptlab.data.corpora.base import Corpus, Wanted
from gptlab.distributed.shard import Weights
from gptlab.distributed.world import World
from gptlab.model.gpt import GPT, build_model
from gptlab.optim.cost import OptimizerBytes, Parameters, total_bytes
from gptlab.optim.optimizers import OptimizerEntry
from gptlab.precision.regimes import Regime, apply_regime
from gptlab.progress import Tell, tell_nobody
from gptlab.seeding import address
from gptlab.tasks.lm import TextData, open_datasets


class SignMomentum(torch.optim.Optimizer):
    """The sign of a moving average of the gradient (signSGD with momentum, Bernstein et al. 2018, arXiv 1802.04434)."""

    def __init__(self, params: Any, lr: float, beta: float) -> None:
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["beta"])
                p.sub_(average.sign(), alpha=group["lr"])


def make_sign(weights: Weights, optim: Optim, seed: int) -> torch.optim.Optimizer:
    return SignMomentum(weights.parameters(), optim.lr, optim.betas[0])


def sign_bytes(parameters: Parameters, optim: Optim, gpu: bool) -> OptimizerBytes:
    largest = max(p.nbytes for p in parameters.values())
    return OptimizerBytes(kept=total_bytes(parameters), temporary=largest)


OPTIMIZER = OptimizerEntry(make_sign, sign_bytes)
REGIME = Regime("toy_fp64", weights=torch.float64, loss=torch.float64)


def open_counting(wanted: Wanted) -> Corpus:
    """Documents that count: "one two three ..." from some word on."""
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]

    def documents() -> Iterator[tuple[str, str]]:
        for i in range(200):
            yield f"{i}", " ".join(words[(i + j) % 10] for j in range(40))

    return Corpus("toy-counting", "counting to nine, 200 documents", documents)


class LastToken:
    """A task: a GPT predicts the last token of each window and nothing else. A sample is a window."""

    unit: ClassVar[str] = "samples"
    scores: ClassVar[tuple[str, ...]] = ("loss",)
    shortens: ClassVar[bool] = False

    def __init__(self, recipe: Recipe, data: TextData, device: torch.device, folder: Path, world: World) -> None:
        self.recipe, self.data, self.device = recipe, data, device
        self.per_step = recipe.sequences_per_step

    @staticmethod
    def open_data(recipe: Recipe) -> TextData:
        return TextData(open_datasets(recipe))

    @staticmethod
    def read_source(name: str, seed: int) -> tuple[Model, Callable[[Any], None]]:
        raise NotImplementedError

    @staticmethod
    def stored_model(recipe: Recipe, shape: Any, device: torch.device, regime: Regime, init: Any) -> GPT:
        return build_model(recipe.model, device, init=init, on_meta=lambda model: apply_regime(model, regime))

    def build(self, regime: Regime, init: Any, sharded: bool = False) -> GPT:
        return self.stored_model(self.recipe, None, self.device, regime, init)

    def constant_loss(self) -> float | None:
        return None

    def batch(self, split: str, n: int, *where: object) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = getattr(self.data.datasets[0], split)
        length = self.recipe.model.block_size + 1
        draw = np.random.default_rng(address(*where))
        rows = torch.from_numpy(tokens.gather(draw.integers(0, len(tokens) - length, n), length))  # (n, T + 1)
        targets = torch.full_like(rows[:, 1:], -1)
        targets[:, -1] = rows[:, -1]
        return rows[:, :-1].to(self.device), targets.to(self.device)

    def micro_batches(self, step: int, micro_batch: int) -> Iterator[tuple[Any, ...]]:
        x, y = self.batch("train", self.per_step, self.recipe.seed, "last token", step)
        for inputs, targets in zip(x.split(micro_batch), y.split(micro_batch), strict=True):
            yield inputs, targets, None

    def due(self, step: int, last: bool) -> list[str]:
        return ["loss"] if last or step % self.recipe.train.eval_every == 0 else []

    def evaluate(self, what: list[str], model: GPT, regime: Regime, micro_batch: int, tell: Tell) -> dict[str, Any]:
        return self.evaluate_split(model, regime, micro_batch, tell)

    @torch.no_grad()
    def evaluate_split(
        self, model: GPT, regime: Regime, micro_batch: int, tell: Tell = tell_nobody
    ) -> dict[str, float]:
        tell("val loss", 0, 1)
        x, y = self.batch("val", 64, self.recipe.eval.seed, "last token")
        logits = model(x)[:, -1].float()  # (n, V)
        loss = torch.nn.functional.cross_entropy(logits, y[:, -1]).item()
        return {"val_loss": loss, "accuracy": (logits.argmax(1) == y[:, -1]).float().mean().item()}
