"""Language modelling: windows of a prepared dataset, a GPT, and its held-out loss."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from gptlab.config import Model, Recipe, Sample
from gptlab.data.manifest import corpus_of, prepared_folder
from gptlab.data.sampler import Mixture, Windows, evaluation_windows
from gptlab.data.shards import Dataset, Tokens
from gptlab.data.tokenizers import Tokenizer
from gptlab.distributed.shard import init_shards
from gptlab.distributed.world import SINGLE, World, world_from_env
from gptlab.distributed.wrap import shard
from gptlab.errors import DataError, UserError
from gptlab.evals.heldout import heldout_loss, scores, whole_split
from gptlab.evals.hellaswag import Encoded, evaluate_hellaswag, open_hellaswag, write_results
from gptlab.interop.source import read_source, source_tokenizer
from gptlab.model.generate import NotFinite, generate
from gptlab.model.gpt import GPT, build_model
from gptlab.precision.regimes import Regime, apply_regime
from gptlab.progress import Tell, tell_nobody
from gptlab.seeding import address
from gptlab.streams import say

NOT_DRAWN = {"prompt", "every", "number"}  # settings of `sample` that are not about how an id is drawn


@dataclass(frozen=True)
class TextData:
    """The prepared datasets of a language-modelling run: one, or the parts of a mixture."""

    datasets: list[Dataset]

    @property
    def paths(self) -> list[Path]:
        return [dataset.path for dataset in self.datasets]

    @property
    def tokenizer(self) -> Tokenizer:
        return self.datasets[0].tokenizer

    @property
    def vocab_size(self) -> int:
        return max(d.vocab_size or d.tokenizer.vocab_size for d in self.datasets)

    @property
    def corpus(self) -> str:
        return ", ".join(dict.fromkeys(filter(None, (corpus_of(d.manifest) for d in self.datasets))))

    @property
    def n_labels(self) -> int:
        return 0

    def fingerprint(self) -> str:
        return " ".join(dataset.fingerprint() for dataset in self.datasets)

    def epoch_tokens(self, block_size: int) -> int:
        return sum(len(dataset.train) for dataset in self.datasets)

    def facts(self) -> dict[str, int]:
        return {"val_tokens": len(self.datasets[0].val)}


def open_datasets(recipe: Recipe) -> list[Dataset]:
    """The prepared datasets that a recipe names.

    Raises:
        DataError: one is missing (it says how to prepare it), named twice, or made with another tokenizer.
    """
    folders = list(recipe.data.mixture) or [recipe.data.folder]
    if len({os.path.realpath(folder) for folder in folders}) < len(folders):
        raise DataError(f"data.mixture names one folder twice: {', '.join(folders)}")
    look = world_from_env().first  # at every shard; 1,000 ranks that do it would slow a file system down
    named = recipe.data.corpus, recipe.data.tokenizer
    datasets = [Dataset(prepared_folder(folder, *named), look) for folder in folders]
    for dataset in datasets if look else ():
        dataset.verify_new()
    for dataset in datasets[1:]:
        if dataset.tokenizer.identity() != datasets[0].tokenizer.identity():
            raise DataError(
                f"data.mixture: {dataset.path} was made with another tokenizer ({dataset.tokenizer.name}) than "
                f"{datasets[0].path} ({datasets[0].tokenizer.name})"
            )
    return datasets


def document_numbers(tokens: Tensor, eot: int | None) -> Tensor | None:
    """(B, T): for each token the number of end-of-texts up to it in its row; None if no id ends a text."""
    return (tokens == eot).cumsum(dim=1) if eot is not None else None


class LanguageModelling:
    """Data, loss and scores of a language-modelling run.

    Args:
        recipe: with model.vocab_size resolved.
        data: validation is of the first dataset of a mixture.
        device: where batches go.
        folder: where hellaswag_results.jsonl goes.
        world: its ranks share each batch and each evaluation.
    """

    unit: ClassVar[str] = "tokens"
    scores: ClassVar[tuple[str, ...]] = ("loss", "hellaswag", "wikitext", "lambada", "harness")
    shortens: ClassVar[bool] = True

    def __init__(
        self, recipe: Recipe, data: TextData, device: torch.device, folder: Path, world: World = SINGLE
    ) -> None:
        datasets = data.datasets
        self.recipe, self.device, self.folder, self.world = recipe, device, folder, world
        self.datasets, self.per_step = datasets, recipe.batch.tokens_per_step
        self.bad_every = recipe.faults.batch_every
        for dataset in datasets:
            dataset.check(recipe.model.vocab_size)
        sources = [
            Windows(d.train, recipe.model.block_size, recipe.data.sampling, seed=f"{recipe.seed}/data/{i}")
            for i, d in enumerate(datasets)
        ]
        weights = list(recipe.data.mixture.values())
        self.windows = Mixture(sources, weights) if weights else sources[0]
        self.splits: dict[str, Tokens] = {"val": datasets[0].val}
        if recipe.eval.train:
            self.splits["train"] = datasets[0].train
        self.starts = {
            split: evaluation_windows(tokens, recipe.model.block_size, recipe.eval.tokens, recipe.eval.seed)
            for split, tokens in self.splits.items()
        }
        self.tokenizer = datasets[0].tokenizer
        self.token_bytes: np.ndarray | None = None
        try:
            self.token_bytes = datasets[0].token_bytes()
        except DataError as error:
            if world.first:
                say(f"val_bits_per_byte is left out: {error}")
        self.eot = datasets[0].tokenizer.eot if recipe.model.document_attention else None
        if recipe.model.document_attention and self.eot is None:
            raise DataError("model.document_attention is on, and the tokenizer has no end-of-text to tell documents by")
        self.hellaswag: Encoded | None = None
        if recipe.hellaswag.every and recipe.hellaswag.path:
            path, definition = recipe.hellaswag.path, recipe.hellaswag.definition
            if not world.first:
                world.barrier()  # rank 0 may have to download it
            self.hellaswag = open_hellaswag(path, datasets[0].tokenizer, recipe.model.block_size, definition)
            if world.first:
                world.barrier()

    @staticmethod
    def open_data(recipe: Recipe) -> TextData:
        return TextData(open_datasets(recipe))

    @staticmethod
    def read_source(name: str, seed: int) -> tuple[Model, Callable[[GPT], None]]:
        return read_source(name)

    @staticmethod
    def source_tokenizer(name: str) -> Tokenizer | None:
        return source_tokenizer(name)

    @staticmethod
    def stored_model(
        recipe: Recipe,
        shape: Callable[[str], tuple[int, ...]],
        device: torch.device,
        regime: Regime,
        init: int | Callable[[GPT], None],
    ) -> GPT:
        return build_model(recipe.model, device, init=init, on_meta=lambda model: apply_regime(model, regime))

    def build(self, regime: Regime, init: int | Callable[[GPT], None], sharded: bool = False) -> GPT:
        """The model in the regime's dtypes, from a seed or with weights copied in; sharded with FSDP."""

        def on_meta(model: GPT) -> None:
            apply_regime(model, regime)
            if sharded:
                shard(model, self.world, self.recipe.distributed.shard_over, self.device, regime.gathered)

        weights = init_shards(init) if sharded else init
        model = build_model(self.recipe.model, self.device, init=weights, on_meta=on_meta)
        model.activation_checkpointing = self.recipe.train.activation_checkpointing
        return model

    def constant_loss(self) -> float:
        """The entropy of the first million training tokens, in nats: the loss of the best constant prediction."""
        n = min(self.windows.windows_per_epoch, -(-(1 << 20) // self.recipe.model.block_size))
        counts = np.bincount(self.windows.batch(0, n).ravel())
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * np.log(shares)).sum())

    def documents(self, tokens: Tensor) -> Tensor | None:
        """(B, T) the document of each token, or None where attention is not limited to documents."""
        return document_numbers(tokens, self.eot)

    def micro_batches(self, step: int, micro_batch: int) -> Iterator[tuple[Any, ...]]:
        """This rank's micro-batches of update `step`: inputs, targets and document numbers, (micro_batch, T) each.

        The last ones may have fewer rows. The windows of a step, over all ranks, depend on the seed and the step alone.
        Every faults.batch_every-th update gets uniformly random tokens instead.
        """
        n, rank, size = self.recipe.sequences_per_step, self.world.rank, self.world.size
        first, end = n * rank // size, n * (rank + 1) // size  # this rank's rows of the step
        for piece in self.world.pieces(end - first, n, micro_batch):
            rows = slice(first + piece.start, first + piece.stop)
            batch = torch.from_numpy(self.windows.batch(step * n + rows.start, rows.stop - rows.start))  # (B, T + 1)
            if self._is_bad(step):
                draw = torch.Generator().manual_seed(address(self.recipe.seed, "bad batch", step))
                batch = torch.randint(self.recipe.model.vocab_size, (n, batch.shape[1]), generator=draw)[rows]
            if self.device.type == "cuda":
                batch = batch.pin_memory().to(self.device, non_blocking=True)
            x, y = batch[:, :-1].to(self.device), batch[:, 1:].to(self.device)
            yield x, y, self.documents(x)

    def batch_of(self, step: int) -> dict[str, Any]:
        """The windows of update `step`, over all ranks: where in the training split each one begins."""
        if self._is_bad(step):
            return {"faults.batch_every": "random tokens"}
        n = self.recipe.sequences_per_step
        owners, numbers = self.windows.places(np.arange(step * n, (step + 1) * n))
        found = {}
        for i, (dataset, source) in enumerate(zip(self.datasets, self.windows.sources, strict=True)):
            here = numbers[owners == i]
            epochs = np.unique(here // source.windows_per_epoch).tolist()
            found[str(dataset.path)] = {"epochs": epochs, "first_tokens": source.starts(here).tolist()}
        return found

    def _is_bad(self, step: int) -> bool:
        return self.bad_every > 0 and (step + 1) % self.bad_every == 0

    def due(self, step: int, last: bool) -> list[str]:
        """What to evaluate after `step` updates: some of "loss", "hellaswag", "samples"."""
        every = {"loss": self.recipe.train.eval_every}
        if self.hellaswag:
            every["hellaswag"] = self.recipe.hellaswag.every
        if self.recipe.sample.every:
            every["samples"] = self.recipe.sample.every
        return [what for what in every if last or step == 0 or (every[what] and step % every[what] == 0)]

    def evaluate(self, what: list[str], model: GPT, regime: Regime, micro_batch: int, tell: Tell) -> dict[str, Any]:
        """Scores of a model: val_loss, what follows from it, train_eval_loss, HellaSwag.

        Args:
            what: as `due` returns it. "samples" adds a list of texts, drawn in float32 or the weights' dtype.
            micro_batch: sequences in a forward pass. It changes scores by rounding only.
            tell: called before each batch; raises Stopped to end the evaluation.
        """
        result: dict[str, Any] = {}
        if "samples" in what and self.world.first:
            with contextlib.suppress(NotFinite):  # the loss says so too
                result["samples"] = sample_texts(model, self.tokenizer, self.recipe.sample)
        if "hellaswag" in what and self.hellaswag is not None:
            answers = evaluate_hellaswag(
                model,
                self.hellaswag,
                self.device,
                lambda: regime.context(self.device),
                micro_batch,
                partial(tell, "HellaSwag"),
                self.world,
            )
            if self.world.first:
                write_results(self.folder / "hellaswag_results.jsonl", answers)
            result.update(answers.scores())
        for split, tokens in self.splits.items() if "loss" in what else ():
            loss, counts = heldout_loss(
                model,
                tokens,
                self.starts[split],
                self.recipe.model.block_size,
                micro_batch,
                self.device,
                lambda: regime.context(self.device),
                self.documents,
                partial(tell, f"{split} loss"),
                self.world,
            )
            if split == "train":
                result["train_eval_loss"] = loss
            else:
                result.update(scores(loss, counts, self.token_bytes))
        return result

    def evaluate_split(
        self, model: GPT, regime: Regime, micro_batch: int, tell: Tell = tell_nobody
    ) -> dict[str, float]:
        """val_loss, val_perplexity, val_bits_per_byte over the whole validation split, and the tokens predicted."""
        dataset, block = self.datasets[0], self.recipe.model.block_size
        starts = whole_split(dataset.val, block)
        if not len(starts):
            raise DataError(f"{dataset.path}: the validation split is shorter than one window of {block} tokens")
        loss, counts = heldout_loss(
            model,
            dataset.val,
            starts,
            block,
            micro_batch,
            self.device,
            lambda: regime.context(self.device),
            self.documents,
            partial(tell, "val loss"),
        )
        return {**scores(loss, counts, self.token_bytes), "tokens": int(counts.sum())}


def continuations(
    model: GPT, tokenizer: Tokenizer, prompts: str | Sequence[str], samples: int, stop: bool = False, **settings: Any
) -> Iterator[list[int]]:
    """The ids that follow each of `repeated` prompts, one of each at a time; an empty prompt is end-of-text.

    Args:
        samples: of each prompt. Sample i of a prompt is the same beside other prompts.
        stop: end when each has had an end-of-text.
        settings: max_tokens, temperature, top_k, top_p, seed and compiled, as `generate` takes them.

    Raises:
        UserError: the tokenizer has no end-of-text, and a prompt is empty, or generation should stop there.
    """
    if stop and tokenizer.eot is None:
        raise UserError("--stop: this tokenizer has no end-of-text to stop at")
    encoded, numbers = list[list[int]](), list[int]()
    for prompt in repeated(prompts, 1):
        ids = tokenizer.encode(prompt)
        if not ids:
            if tokenizer.eot is None:
                says = "the prompt is empty, and this tokenizer has no end-of-text to start from: give --prompt"
                raise UserError(says)
            ids = [tokenizer.eot]
        encoded += [ids] * samples
        numbers += range(samples)
    if not encoded:
        return
    known = min(tokenizer.vocab_size, model.config.vocab_size)
    ended = [False] * len(encoded)
    for row in generate(model, encoded, n_ids=known, numbers=numbers, **settings):
        drawn = row.tolist()
        yield drawn
        ended = [done or index == tokenizer.eot for done, index in zip(ended, drawn, strict=True)]
        if stop and all(ended):
            return


def repeated(prompts: str | Sequence[str], samples: int) -> list[str]:
    """The prompt of each text: all samples of the first prompt, then those of the next."""
    return [prompt for prompt in ([prompts] if isinstance(prompts, str) else prompts) for _ in range(samples)]


def continued(tokenizer: Tokenizer, prompt: str, ids: list[int], stop: bool = False) -> str:
    """A prompt and the text of the ids that follow it.

    The two are decoded together: a tokenizer like SentencePiece's drops the space at the beginning of a text, and the
    continuation is none.

    Args:
        stop: leave out the first end-of-text and what follows it.
    """
    if stop and tokenizer.eot in ids:
        ids = ids[: ids.index(tokenizer.eot)]
    start = tokenizer.encode(prompt)
    before, whole = tokenizer.decode(start), tokenizer.decode([*start, *ids])
    return prompt + (whole.removeprefix(before) if whole.startswith(before) else tokenizer.decode(ids))


def streamed(tokenizer: Tokenizer, prompt: str, ids: Iterable[int], stop: bool = False) -> Iterator[str]:
    """The pieces of `continued` as soon as each is known: a character whose last bytes are missing is held back."""
    drawn: list[int] = []
    text, shown = "", 0
    for index in ids:
        drawn.append(index)
        text = continued(tokenizer, prompt, drawn, stop)
        whole = text.rstrip("\N{REPLACEMENT CHARACTER}")
        yield whole[shown:]
        shown = max(shown, len(whole))
    yield text[shown:]


def sample_texts(model: GPT, tokenizer: Tokenizer, sample: Sample) -> list[str]:
    """`sample.number` texts that continue the prompt, the prompt included."""
    settings = sample.model_dump(exclude=NOT_DRAWN)
    rows = list(continuations(model, tokenizer, sample.prompt, sample.number, **settings))
    return [continued(tokenizer, sample.prompt, [row[i] for row in rows]) for i in range(sample.number)]
