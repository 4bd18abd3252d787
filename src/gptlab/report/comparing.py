"""Runs beside each other, for `gptlab compare`: what differs in them, and whether their models differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptlab.report.card import EVALUATION_NAMES, RESULT_NAMES
from gptlab.report.estimates import Plain
from gptlab.report.listing import Listed, lowest
from gptlab.report.reading import Array, duration, human, number, settings_of
from gptlab.report.statistics import ALPHA, RESAMPLES, Estimate, bootstrap
from gptlab.rundir import RunDir

Documents = NDArray[np.int64] | None

# Windows or documents of one pair of models, and of several: the bootstrap's interval of fewer is too short. Simulated
# with normal losses, the error that is said to be 5% is up to 7.5%.
FEWEST, FEWEST_OF_SEVERAL = 20, 30
NOT_COMPARED = ("name", "description")
FACTS = {
    "parameters": "parameters",
    "device_name": "device",
    "processes": "processes",
    "torch": "PyTorch",
    "gptlab": "gptlab",
    "git_commit": "git commit",
}
RESULTS = (
    "final_val_loss",
    "val_bits_per_byte",
    "val_perplexity",
    "final_train_loss",
    "hellaswag_acc_norm",
    "hellaswag_acc",
    "hellaswag_harness_acc_norm",
    "hellaswag_harness_acc",
    "tokens_per_second",
    "samples_per_second",
    "peak_memory_gb",
    "wall_seconds",
)


def differing_settings(runs: Sequence[RunDir]) -> list[tuple[str, list[Any]]]:
    """(name, a value for each run) of the settings, and facts of data and machine, that are not the same in all."""
    recipes = [settings_of(run.read_recipe()) for run in runs]
    rows = [(key, [one[key] for one in recipes]) for key in recipes[0] if key not in NOT_COMPARED]
    environments = [run.read_json("environment.json") for run in runs]
    rows += [(name, [_fact(one.get(key)) for one in environments]) for key, name in FACTS.items()]
    prints = [one.get("data", {}).get("fingerprint", "unknown") for one in environments]
    rows.append(("data fingerprint", prints))
    return [(name, values) for name, values in rows if any(value != values[0] for value in values)]


def _fact(value: Any) -> str:
    return "unknown" if value is None else f"{value:,}" if isinstance(value, int) else str(value)[:40]


def results_beside(runs: Sequence[RunDir], rows: Sequence[Listed]) -> list[tuple[str, list[str]]]:
    """(name, a text for each run) of how they ended and what they reached; what no run knows is left out."""
    outcomes = [run.read_json("result.json") for run in runs]
    bests = [lowest((line["step"], number(line["val_loss"])) for line in run.lines_with("val_loss"))[0] for run in runs]
    limits = ["?" if row.limit is None else f"{row.limit:,}" for row in rows]
    table = [
        ("status", [row.status for row in rows]),
        ("step", [f"{row.step:,} of {limit}" for row, limit in zip(rows, limits, strict=True)]),
        ("best validation loss", ["" if best is None else f"{best:.4f}" for best in bests]),
    ]
    names = {**EVALUATION_NAMES, **RESULT_NAMES}
    for key in RESULTS:
        values = [number(_measured(run, one, key)) for run, one in zip(runs, outcomes, strict=True)]
        table.append((names[key], [_shown(key, value) for value in values]))
    return [(name, texts) for name, texts in table if any(texts)]


def _measured(run: RunDir, result: Plain, key: str) -> Any:
    if key in result or key not in EVALUATION_NAMES or not run.metrics_file.is_file():
        return result.get(key)
    return max(run.lines_with(key), key=lambda line: line["step"], default={}).get(key)


def _shown(key: str, value: float) -> str:
    if not np.isfinite(value):
        return ""
    if key == "wall_seconds":
        return duration(value)
    return human(value) if key.endswith("per_second") else f"{value:.4f}"


def paired_difference(first: Array, other: Array, documents: Documents, pairs: int = 1) -> tuple[Estimate, str]:
    """`other` minus `first` in the mean loss, with an interval over documents or windows, and which of the two.

    Windows that begin in one document are not independent, and are averaged first.

    Args:
        first, other: losses of the same windows, (n,).
        documents: (n,) the document that a window begins in; None if that is not known.
        pairs: of models that are compared. All intervals hold together with 95% (Bonferroni).
    """
    how: dict[str, Any] = {"resamples": RESAMPLES * pairs, "alpha": ALPHA / pairs}
    if documents is None:
        return bootstrap(other, first, **how), "windows"
    found = np.unique(documents, return_inverse=True)[1]
    counts = np.bincount(found)
    if len(counts) == len(first) or len(counts) < fewest(pairs):
        return bootstrap(other, first, **how), "windows"
    return bootstrap(np.bincount(found, other) / counts, np.bincount(found, first) / counts, **how), "documents"


def fewest(pairs: int) -> int:
    return FEWEST if pairs == 1 else FEWEST_OF_SEVERAL


def _differs(estimate: Estimate, pairs: int) -> bool:
    """Whether a difference is shown: its interval and the paired t agree on it."""
    return estimate.p < ALPHA / pairs and not estimate.low <= 0 <= estimate.high


def models_differ(
    names: tuple[str, str], losses: tuple[Array, Array], documents: Documents, length: int, pairs: int = 1
) -> list[str]:
    """Sentences on whether two models differ on the same windows of validation text; `pairs` are asked of in all."""
    a, b = names
    estimate, unit = paired_difference(*losses, documents, pairs)
    what = f"{estimate.n:,} {unit}" + (f" ({len(losses[0]):,} windows)" if unit == "documents" else "")
    told = f"{b} minus {a}: {estimate.value:+.4f} nats a token"
    if np.array_equal(*losses):
        return [f"{a} and {b} have the same loss on every window: the models are equal in what was measured."]
    if estimate.n < fewest(pairs):
        return [f"{told} over {what} of {length} tokens: too few for an interval; --eval.tokens N takes more."]
    if not _differs(estimate, pairs):
        verdict = f"No difference between the models {a} and {b} is seen"
    else:
        verdict = f"The model {b if estimate.value < 0 else a} is better than {a if estimate.value < 0 else b}"
    together = f" (simultaneous: {1 - ALPHA / pairs:.1%} each, Bonferroni over {pairs} pairs)" * (pairs > 1)
    alike = unit == "windows" and (documents is None or len(np.unique(documents)) < len(documents))
    return [
        f"{verdict}. {told}, 95% interval [{estimate.low:+.4f}, {estimate.high:+.4f}]{together}, "
        f"paired over {what} of the validation split, {length} tokens each.",
        f"The interval is of the mean over other {unit} of this kind for these weights, by a bootstrap (BCa); a "
        "difference is shown where the paired t agrees. Windows do not overlap"
        + (", and are taken as independent, which neighbours in one document are in part." if alike else "."),
    ]


def differ_data(names: tuple[str, str], losses: tuple[Array, Array], documents: Documents, pairs: int = 1) -> Plain:
    """The same as plain data: the second model, `a`, against the first, `b`."""
    (b, a), (estimate, unit) = names, paired_difference(*losses, documents, pairs)
    few = estimate.n < fewest(pairs)
    low, high = (float("nan"), float("nan")) if few else (estimate.low, estimate.high)
    shown = not few and _differs(estimate, pairs)
    verdict = ("better" if estimate.value < 0 else "worse") if shown else "not resolved"
    told = {"a": a, "b": b, "metric": "loss", "difference": estimate.value, "low": low, "high": high, "p": estimate.p}
    return told | {"verdict": verdict, "n": estimate.n, "of": unit, "windows": len(losses[0])}


NOT_THE_METHODS = (
    "This is about these runs, not about the methods: with other seeds the order may turn round. `gptlab study run` "
    "answers that."
)
