"""The loss of finished runs window by window, on the same text: what says whether two models differ."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from gptlab.data.sampler import evaluation_windows
from gptlab.data.shards import Tokens
from gptlab.data.tokenizers import Tokenizer, load_tokenizer
from gptlab.errors import RunError
from gptlab.model.loss import chunk_length
from gptlab.precision.regimes import enter_regime
from gptlab.progress import Count, tell_nobody
from gptlab.rundir import RunDir
from gptlab.tasks.lm import document_numbers, open_datasets
from gptlab.training.load import Run
from gptlab.training.scoring import forward_sequences

READ_AT_ONCE = 2**20  # tokens


@dataclass(frozen=True)
class SharedWindows:
    """Windows of the validation split that several runs are measured on."""

    tokens: Tokens
    starts: NDArray[np.int64]  # (n,) in ascending order; no two windows overlap
    length: int
    """Tokens that are predicted in a window."""
    documents: NDArray[np.int64] | None  # (n,) the document that a window begins in; None without end-of-text
    tokenizer: Tokenizer
    data: str = ""
    """Fingerprint of the dataset."""

    def beginnings(self, count: int, length: int = 24) -> list[str]:
        """The texts that some windows begin with, as prompts."""
        chosen = self.starts[np.linspace(0, len(self.starts) - 1, min(count, len(self.starts))).round().astype(int)]
        length = min(length, self.length)
        return [self.tokenizer.decode(row.tolist()) for row in self.tokens.gather(chosen, length)]

    def lines(self, losses: NDArray[np.float64]) -> str:
        """JSON lines: each window's first token in the split, its number of tokens, document, loss and beginning."""
        documents = self.documents.tolist() if self.documents is not None else [None] * len(self.starts)
        texts = self.beginnings(len(self.starts))
        rows = zip(self.starts.tolist(), documents, losses.tolist(), texts, strict=True)
        return "".join(
            json.dumps(
                {"window": start, "tokens": self.length, "document": document}
                | {"loss": loss if math.isfinite(loss) else None, "data": self.data, "text": text}
            )
            + "\n"
            for start, document, loss, text in rows
        )


def shared_windows(runs: Sequence[RunDir], overrides: Mapping[str, Any]) -> SharedWindows:
    """The windows that the first run is evaluated on while it trains, for all runs.

    A run with a shorter context predicts a window in pieces.

    Args:
        runs: at least one.
        overrides: settings of the first run, such as eval.tokens and data.path.

    Raises:
        RunError: no text is the same for all of them; it says why.
        DataError: the dataset is missing.
    """
    recipes = [run.read_recipe() for run in runs]
    if others := [run for run, recipe in zip(runs, recipes, strict=True) if recipe.task != "lm"]:
        raise RunError(f"{others[0].path} is no language model: it has no loss over windows of text")
    specs = [load_tokenizer(run.tokenizer_file).spec() for run in runs]
    if other := [run for run, spec in zip(runs, specs, strict=True) if spec != specs[0]]:
        raise RunError(
            f"{runs[0].path} and {other[0].path} have different tokenizers: a loss in nats a token is not the same "
            "measure for both; their bits per byte are, where they were measured on the same text"
        )
    prints = [run.read_json("environment.json").get("data", {}).get("fingerprint") for run in runs]
    other = [run for run, known in zip(runs, prints, strict=True) if known != prints[0] or known is None]
    if other and len(runs) > 1:
        raise RunError(
            f"{runs[0].path} and {other[0].path} were not trained on the same data, as far as environment.json says "
            f"({prints[0]}, {prints[runs.index(other[0])]}): no text is held out from both"
        )
    recipe = recipes[0].replace(overrides)
    dataset, *more = open_datasets(recipe)
    data = " ".join(one.fingerprint() for one in (dataset, *more))
    if data != (prints[0] or data):  # of one run it may be unknown
        raise RunError(f"{dataset.path} is not the dataset that the runs were trained on: --data.path names another")
    length = max(one.model.block_size for one in recipes)
    if odd := [one.model.block_size for one in recipes if length % one.model.block_size]:
        raise RunError(f"windows of {length} tokens do not divide into a context of {odd[0]}")
    dataset.val.vocab_size = recipe.model.vocab_size
    starts = evaluation_windows(dataset.val, length, recipe.eval.tokens, recipe.eval.seed)
    documents = _documents(dataset.val, starts, dataset.tokenizer.eot)
    return SharedWindows(dataset.val, starts, length, documents, dataset.tokenizer, data)


def _documents(tokens: Tokens, starts: NDArray[np.int64], eot: int | None) -> NDArray[np.int64] | None:
    """(n,) for each start the number of end-of-texts up to it; None without end-of-text."""
    if eot is None:
        return None
    ends: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
    for begin in range(0, int(starts[-1]) + 1, READ_AT_ONCE):
        part = tokens.gather(np.array([begin]), min(READ_AT_ONCE, int(starts[-1]) + 1 - begin))[0]
        ends.append(begin + np.flatnonzero(part == eot))
    return np.searchsorted(np.concatenate(ends), starts, side="right")


@torch.no_grad()
def window_losses(run: Run, windows: SharedWindows, before_batch: Count = tell_nobody) -> NDArray[np.float64]:
    """(n,) the mean loss of each window in nats a token, in the run's own precision; losses are float32, sums float64.

    No random numbers are drawn.
    """
    model, device, block = run.model.eval(), run.model.device, run.recipe.model.block_size
    regime, micro_batch = enter_regime(run.recipe.precision, device), forward_sequences(run, run.recipe)
    eot = windows.tokenizer.eot if run.recipe.model.document_attention else None
    starts = (windows.starts[:, None] + np.arange(0, windows.length, block)).ravel()
    losses = []
    batches = range(0, len(starts), micro_batch)
    for done, i in enumerate(batches):
        before_batch(done, len(batches))
        batch = torch.from_numpy(windows.tokens.gather(starts[i : i + micro_batch], block + 1)).to(device)  # (B, T + 1)
        inputs, targets = batch[:, :-1], batch[:, 1:].flatten()
        with regime.context(device):
            x = model.hidden(inputs, document_numbers(inputs, eot)).flatten(0, 1)  # (B T, C)
            step = chunk_length(len(x), model.config.vocab_size, device.type)
            each = [
                F.cross_entropy(model.logits(part).float(), y, reduction="none")
                for part, y in zip(x.split(step), targets.split(step), strict=True)
            ]
        losses.append(torch.cat(each).double().view(len(batch), block).mean(1).cpu().numpy())
    return np.concatenate(losses).reshape(len(windows.starts), -1).mean(1)
