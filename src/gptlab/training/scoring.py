"""Scores of a finished run: what `gptlab eval --on` measures."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from gptlab.config import Recipe
from gptlab.data.manifest import MOST_LOST
from gptlab.data.tokenizers import Tokenizer, valid_text
from gptlab.distributed.world import SINGLE
from gptlab.errors import RunError, UserError
from gptlab.evals.hellaswag import evaluate_hellaswag, open_hellaswag, wilson_interval, write_results
from gptlab.evals.perplexity import (
    detokenize,
    lambada_perplexity,
    load_lambada,
    load_wikitext,
    wikitext_perplexity,
)
from gptlab.planning.memory import auto_micro_batch
from gptlab.planning.resolve import resolve_recipe
from gptlab.precision.regimes import Regime, enter_regime
from gptlab.progress import Count, Tell, tell_nobody
from gptlab.rundir import RunDir
from gptlab.streams import say
from gptlab.tasks.base import open_data, task_of
from gptlab.training.load import Run


@dataclass(frozen=True)
class Evaluation:
    """A run to score, and how its forward passes are made."""

    run: Run
    recipe: Recipe
    """With the overrides of this evaluation."""
    regime: Regime
    micro_batch: int
    tasks: Sequence[str]
    """Of lm-eval."""
    tell: Tell = tell_nobody

    @property
    def device(self) -> torch.device:
        return self.run.model.device

    def passes(self, what: str) -> tuple[torch.device, Callable[[], AbstractContextManager[object]], int, Count]:
        """Device, autocast context, micro-batch, and what is called before a batch of `what`."""
        return self.device, partial(self.regime.context, self.device), self.micro_batch, partial(self.tell, what)


def heldout_scores(e: Evaluation) -> dict[str, float]:
    data = open_data(e.recipe)
    trained_on = RunDir(e.run.path).read_json("environment.json").get("data", {}).get("fingerprint")
    if data.n_labels and trained_on != data.fingerprint():  # outputs stand for that dataset's labels
        raise RunError(f"{data.paths[0]} is not the dataset that {e.run.path} was trained on: labels may differ")
    if data.tokenizer.identity() != e.run.tokenizer.identity():
        raise RunError(
            f"{data.paths[0]} was made with another tokenizer ({data.tokenizer.name}) than {e.run.path} was trained "
            f"with ({e.run.tokenizer.name})"
        )
    recipe = e.recipe.replace({"hellaswag.every": 0})  # HellaSwag has a scorer of its own
    task = task_of(recipe)(recipe, data, e.device, e.run.path, SINGLE)
    return task.evaluate_split(e.run.model, e.regime, e.micro_batch, e.tell)


def hellaswag_scores(e: Evaluation) -> dict[str, float]:
    if not e.recipe.hellaswag.path:
        raise UserError("no HellaSwag file is named: --hellaswag.path FILE names hellaswag_val.jsonl")
    rows = open_hellaswag(
        e.recipe.hellaswag.path, e.run.tokenizer, e.recipe.model.block_size, e.recipe.hellaswag.definition
    )
    answers = evaluate_hellaswag(e.run.model, rows, *e.passes("HellaSwag"))
    write_results(e.run.path / "hellaswag_results.jsonl", answers)
    result: dict[str, float] = {}
    for name, share in answers.scores().items():
        low, high = wilson_interval(share, answers.n)
        result |= {name: share, f"{name}_low": low, f"{name}_high": high}
    return result | {"hellaswag_rows": answers.n}


def wikitext_scores(e: Evaluation) -> dict[str, float]:
    if not e.recipe.eval.wikitext:
        raise UserError("no WikiText file is named: --eval.wikitext FILE names wiki.test.raw")
    pages = load_wikitext(e.recipe.eval.wikitext)
    scores = wikitext_perplexity(e.run.model, e.run.tokenizer, pages, *e.passes("WikiText"))
    return _of_all_bytes(scores, e.run.tokenizer, [detokenize(page.text) for page in pages])


def lambada_scores(e: Evaluation) -> dict[str, float]:
    if not e.recipe.eval.lambada:
        raise UserError("no LAMBADA file is named: --eval.lambada FILE names lambada_test_en.jsonl")
    texts = load_lambada(e.recipe.eval.lambada)
    scores = lambada_perplexity(e.run.model, e.run.tokenizer, texts, *e.passes("LAMBADA"))
    return _of_all_bytes(scores, e.run.tokenizer, [passage.text for passage in texts])


def _of_all_bytes(scores: dict[str, float], tokenizer: Tokenizer, texts: Sequence[str]) -> dict[str, float]:
    """The scores; without those per byte where the tokenizer loses too many of the bytes for them to mean anything."""
    if tokenizer.exact:
        return scores
    texts = [valid_text(text) for text in texts]
    lost = sum(map(tokenizer.lost_bytes, texts, tokenizer.encode_batch(texts)))
    if (share := lost / sum(len(text.encode()) for text in texts)) <= MOST_LOST:
        return scores
    without = {name for name in scores if name.endswith(("byte_perplexity", "bits_per_byte"))}
    named = " and ".join(sorted(without))
    say(f"{named}: left out, the tokenizer drops or changes {100 * share:.2g}% of the bytes of the text")
    return {name: score for name, score in scores.items() if name not in without}


def harness_scores(e: Evaluation) -> dict[str, float]:
    if not e.tasks:
        raise UserError("no task is named: --tasks hellaswag arc_easy runs two of lm-eval's")
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--on harness needs lm-eval: pip install 'gptlab[harness]'")
    os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval's bars would be drawn into ours
    from gptlab.evals.harness import HarnessLM, run_harness

    e.tell("lm-eval", 0, 0)
    return run_harness(HarnessLM(e.run.model, e.run.tokenizer, *e.passes("lm-eval")), e.tasks)


# by the names of `gptlab eval --on`, in the order in which they are measured
SCORERS: dict[str, Callable[[Evaluation], dict[str, float]]] = {
    "loss": heldout_scores,
    "hellaswag": hellaswag_scores,
    "wikitext": wikitext_scores,
    "lambada": lambada_scores,
    "harness": harness_scores,
}


def forward_sequences(run: Run, recipe: Recipe) -> int:
    """Sequences in a forward pass of a finished run."""
    size = recipe.batch.micro_batch
    if size == "auto":
        return auto_micro_batch(resolve_recipe(recipe, run.model.device.type), run.model.device)
    return size


def evaluate_run(
    run: Run, on: Sequence[str], overrides: dict[str, Any], tasks: Sequence[str] = (), tell: Tell = tell_nobody
) -> dict[str, float]:
    """Score a run in its own precision regime; losses are computed in float32.

    Args:
        on: what to measure, any of:
            "loss" over the whole validation split: val_loss, val_perplexity, val_bits_per_byte and the tokens
            predicted. For a classifier val_loss and its scores, and with a test split test_loss and so on.
            "hellaswag": hellaswag_acc and hellaswag_acc_norm, or by the harness's definition hellaswag_harness_acc
            and hellaswag_harness_acc_norm, with 95% intervals; every row goes into the run's hellaswag_results.jsonl.
            "wikitext", "lambada": see `gptlab.evals.perplexity`.
            "harness": lm-eval's tasks, see `gptlab.evals.harness.run_harness`.
        overrides: dotted settings, such as data.path for a dataset other than the run's, or hellaswag.path.
        tasks: for "harness": names of lm-eval's tasks, or paths to YAML files.
        tell: called before each batch.

    Raises:
        UserError: a dataset, file or task that is missing or does not fit the run, or lm-eval is not installed.
    """
    recipe = run.recipe.replace(overrides)
    regime = enter_regime(recipe.precision, run.model.device)
    micro_batch = forward_sequences(run, recipe)
    if unknown := [name for name in on if name not in task_of(recipe).scores]:
        raise UserError(f"{run.path} is a run of task = {recipe.task}: --on {unknown[0]} does not apply to it")
    if tasks and "harness" not in on:
        raise UserError("--tasks names tasks of lm-eval: --on harness runs them")
    evaluation = Evaluation(run, recipe, regime, micro_batch, tasks, tell)
    result: dict[str, float] = {"step": run.step}
    for name, scorer in SCORERS.items():
        if name in on:
            result |= scorer(evaluation)
    return result
