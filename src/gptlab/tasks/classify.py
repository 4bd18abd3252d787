"""Document classification: labelled documents, an encoder with a linear head, and F1 and ranking scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from gptlab.config import Model, Recipe
from gptlab.data.labeled import LabeledDataset, constant_loss
from gptlab.data.manifest import corpus_of, prepared_folder
from gptlab.data.sampler import permute
from gptlab.data.tokenizers import Tokenizer
from gptlab.distributed.shard import init_shards
from gptlab.distributed.world import SINGLE, World, world_from_env
from gptlab.distributed.wrap import shard
from gptlab.errors import DataError, UserError
from gptlab.evals.classification import multi_label_scores, single_label_scores
from gptlab.interop.hf_encoder import encoder_tokenizer, read_encoder
from gptlab.model.encoder import Encoder, build_encoder
from gptlab.precision.regimes import Regime, apply_regime
from gptlab.progress import Tell, tell_nobody


def open_labeled(recipe: Recipe) -> LabeledDataset:
    """The prepared dataset that a recipe names. Raises DataError, which says how to prepare it, if there is none."""
    dataset = LabeledDataset(prepared_folder(recipe.data.folder, recipe.data.corpus, recipe.data.tokenizer))
    if world_from_env().first:
        dataset.verify_new()
    return dataset


def label_names(recipe: Recipe) -> tuple[list[str], bool]:
    """Names of a trained classifier's outputs, and whether a document has several; from the dataset of its run.

    Raises:
        DataError: the dataset is not where it was.
    """
    dataset = open_labeled(recipe)
    return dataset.labels[: dataset.n_train_labels], bool(dataset.manifest["multi"])


@dataclass(frozen=True)
class LabeledData:
    """The prepared dataset of a classification run."""

    dataset: LabeledDataset

    @property
    def paths(self) -> list[Path]:
        return [self.dataset.path]

    @property
    def tokenizer(self) -> Tokenizer:
        return self.dataset.tokenizer

    @property
    def vocab_size(self) -> int:
        return self.dataset.vocab_size

    @property
    def corpus(self) -> str:
        return corpus_of(self.dataset.manifest)

    @property
    def n_labels(self) -> int:
        return self.dataset.n_train_labels

    def fingerprint(self) -> str:
        return self.dataset.fingerprint()

    def epoch_tokens(self, block_size: int) -> int:
        """A document counts block_size tokens."""
        return len(self.dataset.splits["train"]) * block_size

    def facts(self) -> dict[str, int]:
        return {"train_documents": len(self.dataset.splits["train"]), "labels": self.n_labels}


class Classification:
    """Data, loss and scores of a classification run.

    A step has batch.tokens_per_step / model.block_size documents. The documents of a step are sorted by length before
    they are cut into micro-batches, to save padding. The documents of a step depend on the seed and the step alone.

    Args:
        recipe: with model.vocab_size resolved.
        data: its training labels are the model's outputs.
        device: where batches go.
        folder: unused, for classification writes no files of its own.
        world: its ranks share each batch and each evaluation.
    """

    unit: ClassVar[str] = "samples"
    scores: ClassVar[tuple[str, ...]] = ("loss",)
    shortens: ClassVar[bool] = False

    def __init__(
        self, recipe: Recipe, data: LabeledData, device: torch.device, folder: Path, world: World = SINGLE
    ) -> None:
        dataset = data.dataset
        self.world = world
        if recipe.model.vocab_size < dataset.vocab_size:
            raise DataError(
                f"model.vocab_size = {recipe.model.vocab_size}: {dataset.path} has {dataset.vocab_size} token ids"
            )
        if dataset.multi and len(dataset.labels) < 2:
            raise DataError(f"{dataset.path} has the label {dataset.labels[0]} alone: lists of labels need two or more")
        self.recipe, self.dataset, self.device = recipe, dataset, device
        self.per_step = recipe.sequences_per_step
        self.n_labels = dataset.n_train_labels
        n = max(1, recipe.eval.tokens // recipe.model.block_size)
        splits = ["val", "train"] if recipe.eval.train else ["val"]
        self.samples = {split: self._sample(split, n) for split in splits}

    def _sample(self, split: str, n: int) -> np.ndarray:
        """Documents to evaluate on, drawn once without replacement, the same for the same eval.seed."""
        size = len(self.dataset.splits[split])
        drawn = permute(np.arange(min(n, size)), size, f"{self.recipe.eval.seed}/eval/{split}") if n < size else None
        return np.arange(size) if drawn is None else drawn

    @staticmethod
    def open_data(recipe: Recipe) -> LabeledData:
        return LabeledData(open_labeled(recipe))

    @staticmethod
    def read_source(name: str, seed: int) -> tuple[Model, Callable[[Encoder], None]]:
        config, position_offset, init = read_encoder(name, seed)
        if position_offset != 2:
            raise UserError(f"train.init_from = {name}: is not a RoBERTa model")
        return config, init

    @staticmethod
    def source_tokenizer(name: str) -> Tokenizer | None:
        return encoder_tokenizer(name)

    @staticmethod
    def stored_model(
        recipe: Recipe,
        shape: Callable[[str], tuple[int, ...]],
        device: torch.device,
        regime: Regime,
        init: int | Callable[[Encoder], None],
    ) -> Encoder:
        n_labels = shape("head.weight")[0]
        return build_encoder(
            recipe.model, n_labels, device, init=init, on_meta=lambda model: apply_regime(model, regime)
        )

    def build(self, regime: Regime, init: int | Callable[[Encoder], None], sharded: bool = False) -> Encoder:
        """The model in the regime's dtypes, from a seed or with weights copied in; sharded with FSDP."""

        def on_meta(model: Encoder) -> None:
            apply_regime(model, regime)
            if sharded:
                shard(model, self.world, self.recipe.distributed.shard_over, self.device, regime.gathered)

        model = build_encoder(
            self.recipe.model,
            self.n_labels,
            self.device,
            init=init_shards(init) if sharded else init,
            on_meta=on_meta,
        )
        model.activation_checkpointing = self.recipe.train.activation_checkpointing
        return model

    def constant_loss(self) -> float:
        """The loss in nats when every label is predicted at its frequency in the training split."""
        return constant_loss(self.dataset)

    def micro_batches(self, step: int, micro_batch: int) -> Iterator[tuple[Any, ...]]:
        """This rank's micro-batches of update `step`: tokens (B, T), lengths (B,) and targets, (B, labels) or (B,)."""
        # every size-th, so that all ranks have documents of about the same length
        mine = self._by_length("train", self._documents(step)[1])[self.world.rank :: self.world.size]
        for piece in self.world.pieces(len(mine), self.per_step, micro_batch):
            rows = mine[piece]
            tokens, lengths = self._batch("train", rows)
            targets = torch.from_numpy(self.dataset.splits["train"].targets(rows, self.n_labels))
            yield self._move(tokens), self._move(lengths), self._move(targets)

    def _documents(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch of each document of update `step`, and its number in the training split."""
        n, size = self.per_step, len(self.dataset.splits["train"])
        epochs, places = np.divmod(np.arange(step * n, (step + 1) * n), size)
        documents = places.copy()
        for epoch in np.unique(epochs).tolist():
            here, key = epochs == epoch, f"{self.recipe.seed}/data/{epoch}"
            documents[here] = permute(places[here], size, key)
        return epochs, documents

    def batch_of(self, step: int) -> dict[str, Any]:
        """The documents of update `step`, over all ranks, by their numbers in the training split."""
        epochs, documents = self._documents(step)
        return {str(self.dataset.path): {"epochs": np.unique(epochs).tolist(), "documents": documents.tolist()}}

    def _by_length(self, split: str, documents: np.ndarray) -> np.ndarray:
        return documents[np.argsort(self.dataset.splits[split].lengths[documents], kind="stable")]

    def _batch(self, split: str, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, lengths = self.dataset.splits[split].batch(rows, self.recipe.model.block_size)
        return torch.from_numpy(tokens), torch.from_numpy(lengths)

    def _move(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def due(self, step: int, last: bool) -> list[str]:
        """What to evaluate after `step` updates: "loss", with all scores, or nothing."""
        every = self.recipe.train.eval_every
        return ["loss"] if last or step == 0 or (every and step % every == 0) else []

    def evaluate(self, what: list[str], model: Encoder, regime: Regime, micro_batch: int, tell: Tell) -> dict[str, Any]:
        """val_loss, the scores of a model, and train_eval_loss."""
        result: dict[str, float] = {}
        for split, documents in self.samples.items() if what else ():
            scored = self.score(split, documents, model, regime, micro_batch, tell)
            result |= {"train_eval_loss": scored["loss"]} if split == "train" else _named(scored)
        return result

    def evaluate_split(
        self, model: Encoder, regime: Regime, micro_batch: int, tell: Tell = tell_nobody
    ) -> dict[str, float]:
        """val_loss and the scores over the whole validation split; test_loss, ... where there is a test split."""
        result: dict[str, float] = {}
        for split in ("val", "test"):
            if split in self.dataset.splits:
                everything = np.arange(len(self.dataset.splits[split]))
                scored = self.score(split, everything, model, regime, micro_batch, tell)
                prefixed = {(k if split == "val" and k != "loss" else f"{split}_{k}"): v for k, v in scored.items()}
                result |= prefixed | {"documents" if split == "val" else "test_documents": len(everything)}
        return result

    def score(
        self,
        split: str,
        documents: np.ndarray,
        model: Encoder,
        regime: Regime,
        micro_batch: int,
        tell: Tell = tell_nobody,
    ) -> dict[str, float]:
        """Mean loss of some documents in float32, and their scores. No random numbers are drawn."""
        was_training = model.training
        model.eval()
        order, losses, truth = self._by_length(split, documents), 0.0, self.dataset.splits[split]
        logits = torch.zeros(len(order), self.n_labels)
        try:
            batches = range(0, len(order), micro_batch)
            for done, i in enumerate(self.world.share(batches)):
                tell(f"{split} loss", done * self.world.size, len(batches))
                if i is None:
                    continue
                rows = order[i : i + micro_batch]
                tokens, lengths = self._batch(split, rows)
                with torch.no_grad(), regime.context(self.device):
                    out = model(self._move(tokens), self._move(lengths)).float()  # (B, labels)
                targets = self._move(torch.from_numpy(truth.targets(rows, self.n_labels)))
                if self.dataset.multi:
                    losses += F.binary_cross_entropy_with_logits(out, targets, reduction="sum").item() / self.n_labels
                else:
                    losses += F.cross_entropy(out, targets, reduction="sum", ignore_index=-1).item()
                logits[i : i + micro_batch] = out.cpu()
        finally:
            model.train(was_training)
        numbers, losses = self.world.all_reduce(logits).numpy(), self.world.sum(losses)  # 0 where other ranks score
        ids = [truth.label_ids(row) for row in order.tolist()]
        counts = self.dataset.train_counts
        if self.dataset.multi:
            scores = multi_label_scores(numbers, ids, counts)
        else:
            scores = single_label_scores(numbers, np.array([label[0] for label in ids]))
        return {"loss": losses / len(documents), **scores}


def _named(scored: dict[str, float]) -> dict[str, float]:
    return {"val_loss" if key == "loss" else key: value for key, value in scored.items()}
