"""Which data and which task a recipe's `task` stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gptlab.config import Recipe
from gptlab.data.labeled import LabeledDataset
from gptlab.data.shards import Dataset
from gptlab.data.tokenizers import Tokenizer
from gptlab.distributed.world import SINGLE, World
from gptlab.tasks.classify import Classification, open_labeled
from gptlab.tasks.lm import LanguageModelling, open_datasets

Data = list[Dataset] | LabeledDataset


def open_data(recipe: Recipe) -> Data:
    """The prepared datasets a recipe names. Raises DataError where one is missing or is of another kind."""
    return open_labeled(recipe) if recipe.task == "classify" else open_datasets(recipe)


def make_task(recipe: Recipe, data: Data, device: torch.device, folder: Path, world: World = SINGLE) -> Any:
    if isinstance(data, LabeledDataset):
        return Classification(recipe, data, device, world=world)
    return LanguageModelling(recipe, data, device, folder, world)


def tokenizer_of(data: Data) -> Tokenizer:
    return data.tokenizer if isinstance(data, LabeledDataset) else data[0].tokenizer


def vocab_size_of(data: Data) -> int:
    if isinstance(data, LabeledDataset):
        return data.vocab_size
    return max(d.vocab_size or d.tokenizer.vocab_size for d in data)


def train_tokens(recipe: Recipe, data: Data) -> int:
    """Tokens of an epoch; a document counts model.block_size."""
    if isinstance(data, LabeledDataset):
        return len(data.splits["train"]) * recipe.model.block_size
    return sum(len(d.train) for d in data)


def corpus_of(recipe: Recipe, data: Data) -> str:
    """What the data was prepared from, as its manifest says; the recipe's word for it where that says nothing."""
    manifests = [data.manifest] if isinstance(data, LabeledDataset) else [dataset.manifest for dataset in data]
    return ", ".join(dict.fromkeys(manifest["corpus"] or recipe.data.corpus for manifest in manifests))


def fingerprint(data: Data) -> str:
    return data.fingerprint() if isinstance(data, LabeledDataset) else " ".join(d.fingerprint() for d in data)


def paths(data: Data) -> list[Path]:
    return [d.path for d in ([data] if isinstance(data, LabeledDataset) else data)]
