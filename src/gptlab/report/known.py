"""A run beside published results: GPT-2 as released, and reproductions of its 124M model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gptlab.config import Recipe
from gptlab.report.reading import duration, human, number, series

EDU = "FineWeb-Edu"


@dataclass(frozen=True)
class Known:
    """Published figures; None if not published. Losses on different data cannot be compared."""

    name: str
    loss_on: str
    val_loss: float | None
    acc_norm: float | None
    """HellaSwag's 10,042 validation rows, token-normalised: the ending with the lowest mean loss per token."""
    acc: float | None
    """The ending with the lowest summed loss."""
    trained_on: str
    cost: str


KNOWN = [
    Known("GPT-2 124M as released", EDU, 3.2924, 0.2955, 0.2859, "WebText", ""),
    Known("classic 124M on one H100", EDU, 3.0796, 0.305, 0.288, "FineWeb-Edu, 10B tokens", "10 h, 260K tokens/s"),
    Known("classic 124M, the run 230126", EDU, 3.26, 0.28, None, "FineWeb-Edu, 10B tokens", "one RTX 5090"),
    Known("modern 124M, the run 050226", EDU, 2.99, 0.32, None, "FineWeb-Edu, 20B tokens", "22 h, one RTX 5090"),
]
# the name above of a corpus' validation split
LOSS_ON = {"fineweb-edu": EDU}
DEFINITIONS = (
    "Loss: nats per token of GPT-2's BPE, over part of the validation split of the named data. Each run held out a "
    "part of its own, so differences of a few hundredths mean nothing. HellaSwag: all 10,042 validation rows, "
    "token-normalised (acc_norm) or summed (acc); lm-eval defines them differently. This run's figures are its last "
    "evaluation. The others are as published, with one seed each."
)


def beside_the_known(
    recipe: Recipe, corpus: str, result: dict[str, Any], lines: list[dict[str, Any]]
) -> list[list[str]]:
    """Rows of a table, the header first: this run, then the published ones with a loss on the same data.

    Empty if the run did not use GPT-2's tokenizer, or nothing is published about its data.

    Args:
        corpus: as the dataset's manifest names it.
    """
    loss_on = LOSS_ON.get(corpus)
    if loss_on is None or recipe.task != "lm" or recipe.data.tokenizer != "gpt2" or recipe.data.mixture:
        return []
    last = {
        key: values[-1]
        for key in ("val_loss", "hellaswag_acc_norm", "hellaswag_acc")
        if len(values := series(lines, key)[1])
    }
    if not last:
        return []
    tokens, seconds = number(result.get("tokens")), number(result.get("wall_seconds"))
    mine = Known(
        "**this run**",
        loss_on,
        last.get("val_loss"),
        last.get("hellaswag_acc_norm"),
        last.get("hellaswag_acc"),
        f"{loss_on}, {human(tokens)} tokens" if np.isfinite(tokens) else loss_on,
        duration(seconds) if np.isfinite(seconds) else "",
    )
    rows = [["run", "trained on", f"validation loss, {loss_on}", "HellaSwag acc_norm", "HellaSwag acc", "time"]]
    for known in [mine, *(known for known in KNOWN if known.loss_on == loss_on)]:
        scores = [_shown(known.val_loss), _shown(known.acc_norm), _shown(known.acc)]
        rows.append([known.name, known.trained_on, *scores, known.cost])
    return rows


def _shown(value: float | None) -> str:
    return "" if value is None or not np.isfinite(value) else f"{value:.4g}"
