"""Runs opened for use: their model and tokenizer, evaluated, sampled from, imported."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptlab.config import Recipe
from gptlab.data.tokenizers import Tokenizer, load_tokenizer
from gptlab.errors import RunError, UserError
from gptlab.evals.heldout import heldout_loss, scores, whole_split
from gptlab.evals.hellaswag import evaluate_hellaswag, open_hellaswag, wilson_interval, write_results
from gptlab.evals.perplexity import lambada_perplexity, load_lambada, load_wikitext, wikitext_perplexity
from gptlab.model.encoder import Encoder, build_encoder
from gptlab.model.gpt import GPT, build_model
from gptlab.precision.regimes import Regime, apply_regime, enter_regime, make_regime
from gptlab.rundir import RunDir
from gptlab.tasks.classify import Classification, open_labeled
from gptlab.tasks.lm import NOT_DRAWN, continuations, document_numbers, open_datasets
from gptlab.training.checkpoint import Saved, checkpoint_step, find_checkpoint
from gptlab.training.setup import largest_micro_batch, pick_device, start_from


@dataclass
class Run:
    """A trained run: what `load_run` gives."""

    path: Path
    recipe: Recipe
    model: GPT | Encoder
    """An Encoder where recipe.task = "classify"."""
    tokenizer: Tokenizer
    step: int
    """Optimizer updates the weights have seen."""

    def sample(self, prompt: str | None = None, samples: int = 1, **settings: Any) -> list[str]:
        """Texts that go on from a prompt, the prompt included.

        Args:
            prompt: default the recipe's.
            samples: how many.
            settings: max_tokens, temperature, top_k, top_p, seed; default the recipe's `sample` section.
        """
        text = self.recipe.sample.prompt if prompt is None else prompt
        rows = list(self.stream(text, samples, **settings))
        return [text + self.tokenizer.decode([row[i] for row in rows]) for i in range(samples)]

    def stream(self, prompt: str, samples: int = 1, **settings: Any) -> Iterator[list[int]]:
        """The ids as they are drawn, one of each sample at a time; arguments as for `sample`."""
        if isinstance(self.model, Encoder):
            raise RunError(f"{self.path} is a classifier's run: it writes no text")
        chosen = {**self.recipe.sample.model_dump(exclude=NOT_DRAWN), **settings}
        yield from continuations(self.model, self.tokenizer, prompt, samples, **chosen)


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
    chosen = find_checkpoint(run, checkpoint)
    _, fill = start_from(str(path), chosen)
    regime = make_regime(recipe.precision, where)
    model: GPT | Encoder
    if recipe.task == "classify":
        n_labels = Saved(chosen).shape("model", "head.weight")[0]
        model = build_encoder(recipe.model, n_labels, where, init=fill, on_meta=lambda m: apply_regime(m, regime))
    else:
        model = build_model(recipe.model, where, init=fill, on_meta=lambda m: apply_regime(m, regime))
    tokenizer = load_tokenizer(run.tokenizer_file)
    return Run(Path(path), recipe, model.eval(), tokenizer, checkpoint_step(chosen))


def evaluate_run(run: Run, on: Sequence[str], overrides: dict[str, Any], tasks: Sequence[str] = ()) -> dict[str, float]:
    """Score a run; what is measured is computed in its own precision regime, losses in float32.

    Args:
        on: what to measure, any of:
            "loss" over the whole validation split: val_loss, val_perplexity, val_bits_per_byte and the tokens
            predicted. Of a classifier val_loss and the scores of the whole validation split, and where there is a test
            split the same as test_loss, test_micro_f1 and so on.
            "hellaswag": hellaswag_acc and hellaswag_acc_norm, or by the harness's definition hellaswag_harness_acc
            and hellaswag_harness_acc_norm, with 95% intervals; every row goes into the run's hellaswag_results.jsonl.
            "wikitext", "lambada": see `gptlab.evals.perplexity`.
            "harness": lm-eval's tasks, see `gptlab.evals.harness.run_harness`.
        overrides: dotted settings, such as data.path for a dataset other than the run's, or hellaswag.path.
        tasks: of "harness": names of lm-eval's, or paths to YAML files.

    Raises:
        UserError: a dataset, file or task that is missing or does not fit the run, or lm-eval is not installed.
    """
    recipe = run.recipe.replace(overrides)
    device = run.model.device
    regime = enter_regime(recipe.precision, device)
    micro_batch = recipe.batch.micro_batch
    if micro_batch == "auto":
        micro_batch = largest_micro_batch(recipe, device)
    result: dict[str, float] = {"step": run.step}
    if isinstance(run.model, Encoder):
        if others := [name for name in on if name != "loss"]:
            raise UserError(f"{run.path} is a classifier's run: {NAMES[others[0]]} is for language models")
        return result | _classification_scores(run, run.model, recipe, regime, micro_batch)
    if tasks and "harness" not in on:
        raise UserError("--tasks names tasks of lm-eval: --on harness runs them")
    how = device, lambda: regime.context(device), micro_batch
    if "loss" in on:
        result |= _validation_loss(run, run.model, recipe, regime, micro_batch)
    if "hellaswag" in on:
        result |= _hellaswag_scores(run, run.model, recipe, regime, micro_batch)
    if "wikitext" in on:
        if not recipe.eval.wikitext:
            raise UserError("no WikiText file is named: --eval.wikitext FILE names wiki.test.raw")
        result |= wikitext_perplexity(run.model, run.tokenizer, load_wikitext(recipe.eval.wikitext), *how)
    if "lambada" in on:
        if not recipe.eval.lambada:
            raise UserError("no LAMBADA file is named: --eval.lambada FILE names lambada_test_en.jsonl")
        result |= lambada_perplexity(run.model, run.tokenizer, load_lambada(recipe.eval.lambada), *how)
    if "harness" in on:
        if not tasks:
            raise UserError("no task is named: --tasks hellaswag arc_easy runs two of lm-eval's")
        if importlib.util.find_spec("lm_eval") is None:
            raise UserError("--on harness needs lm-eval: pip install 'gptlab[harness]'")
        from gptlab.evals.harness import HarnessLM, run_harness

        result |= run_harness(HarnessLM(run.model, run.tokenizer, *how), tasks)
    return result


NAMES = {"hellaswag": "HellaSwag", "wikitext": "WikiText", "lambada": "LAMBADA", "harness": "lm-eval"}


def _hellaswag_scores(run: Run, model: GPT, recipe: Recipe, regime: Regime, micro_batch: int) -> dict[str, float]:
    if not recipe.hellaswag.path:
        raise UserError("no HellaSwag file is named: --hellaswag.path FILE names hellaswag_val.jsonl")
    block, device = recipe.model.block_size, model.device
    rows = open_hellaswag(recipe.hellaswag.path, run.tokenizer, block, recipe.hellaswag.definition)
    answers = evaluate_hellaswag(model, rows, device, lambda: regime.context(device), micro_batch)
    assert answers is not None
    write_results(run.path / "hellaswag_results.jsonl", answers)
    result: dict[str, float] = {}
    for name, share in answers.scores().items():
        low, high = wilson_interval(share, answers.n)
        result |= {name: share, f"{name}_low": low, f"{name}_high": high}
    return result | {"hellaswag_rows": answers.n}


def _classification_scores(
    run: Run, model: Encoder, recipe: Recipe, regime: Regime, micro_batch: int
) -> dict[str, float]:
    dataset = open_labeled(recipe)
    trained_on = RunDir(run.path).read_json("environment.json").get("data", {}).get("fingerprint")
    if trained_on != dataset.fingerprint():  # its outputs stand for that dataset's labels
        raise RunError(f"{dataset.path} is not the dataset that {run.path} was trained on: its labels may be others")
    task = Classification(recipe, dataset, model.device)
    result: dict[str, float] = {}
    for split in ("val", "test"):
        if split in dataset.splits:
            everything = np.arange(len(dataset.splits[split]))
            scored = task.score(split, everything, model, regime, micro_batch)
            assert scored is not None
            result |= {(key if split == "val" and key != "loss" else f"{split}_{key}"): scored[key] for key in scored}
            result["documents" if split == "val" else "test_documents"] = len(everything)
    return result


def _validation_loss(run: Run, model: GPT, recipe: Recipe, regime: Regime, micro_batch: int) -> dict[str, float]:
    dataset = open_datasets(recipe)[0]
    dataset.check(recipe.model.vocab_size)
    if dataset.tokenizer.spec() != run.tokenizer.spec():
        raise RunError(
            f"{dataset.path} was made with another tokenizer ({dataset.tokenizer.name}) than {run.path} was trained "
            f"with ({run.tokenizer.name})"
        )
    device, block = run.model.device, recipe.model.block_size
    starts = whole_split(dataset.val, block)
    if not len(starts):
        raise RunError(f"{dataset.path}: the validation split is shorter than one window of {block} tokens")
    eot = dataset.tokenizer.eot if recipe.model.document_attention else None
    measured = heldout_loss(
        model,
        dataset.val,
        starts,
        block,
        micro_batch,
        device,
        lambda: regime.context(device),
        lambda x: document_numbers(x, eot),
    )
    assert measured is not None
    loss, counts = measured
    return {**scores(loss, counts, dataset.tokenizer.token_bytes()), "tokens": int(counts.sum())}
