"""Noise over seeds as it was measured in other settings: where to begin without a pilot.

`gptlab/noise.toml` has an entry for each setting. `python -m gptlab.report.precedents DIR ...` prints those of study
folders.
"""

from __future__ import annotations

import argparse
import math
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from gptlab.errors import UserError
from gptlab.report import noise
from gptlab.report.reading import human, number
from gptlab.report.studies import ReadStudy, read_study_folder


@dataclass(frozen=True)
class Precedent:
    """The noise of a metric in one setting."""

    name: str
    task: str
    metric: str
    run_sd: float
    """Of one run over seeds, in the metric's units."""
    df: int
    """Degrees of freedom of run_sd."""
    parameters: int
    corpus: str
    source: str
    paired_sd: float = 0.0
    """Of the difference between two runs of the same seed; 0: not known."""
    tokens: int = 0
    """That a run trained on; 0: not known."""
    batch_tokens: int = 0

    @property
    def sd(self) -> float:
        """Of a paired difference; where that is not known, as if pairing bought nothing."""
        return self.paired_sd or math.sqrt(2) * self.run_sd

    @property
    def text(self) -> str:
        """`modded-nanogpt Track 3 (124M parameters, FineWeb)`."""
        size = f"{human(self.parameters)} parameters, {self.corpus}"
        size += f", {human(self.tokens)} tokens" if self.tokens else ""
        pairing = "" if self.paired_sd else "; runs without pairing by seed, which would make it smaller"
        return f"{self.name} ({size}{pairing})"


def precedents() -> list[Precedent]:
    with resources.files("gptlab").joinpath("noise.toml").open("rb") as file:
        return [Precedent(**entry) for entry in tomllib.load(file)["settings"]]


def nearest(task: str, metric: str, parameters: int | None, tokens: int | None = None) -> Precedent | None:
    """The setting with this metric that is nearest: of this task, then by the logarithms of parameters and of tokens.

    Args:
        parameters, tokens: of the planned runs; None where they are not known.
    """

    def distance(entry: Precedent) -> tuple[bool, float, float]:
        sizes = ((entry.parameters, parameters), (entry.tokens, tokens))
        far = [abs(math.log(one / other)) if one and other else 0.0 for one, other in sizes]
        return entry.task != task, far[0], far[1]

    return min((entry for entry in precedents() if entry.metric == metric), key=distance, default=None)


def measured(read: ReadStudy) -> Precedent:
    """The noise of a study's metric: medians over arms and over pairs of arms, so that a few noisy arms do not decide.

    Raises:
        UserError: fewer than two distinct arms completed the same two seeds.
    """
    from scipy import special

    study, key = read.study, read.study.metric.name
    block = noise.complete_block(noise.sound_arms(read, key))
    if min(block.shape) < 2:
        raise UserError(f"{read.folder} shows no noise of {key}: two arms must have completed the same two seeds")
    arms, n = block.shape
    typical = special.chdtri(n - 1, 0.5) / (n - 1)  # median of a variance over its mean
    between = noise.pair_variances(block)[np.triu_indices(arms, 1)]
    recipe = study.build(study.baseline, study.seeds[0])
    base = next(run for run in read.of(study.baseline) + list(read.runs.values()) if run.status == "completed")
    data = base.environment.get("data") or {}
    return Precedent(
        name=study.name,
        task=recipe.task,
        metric=key,
        run_sd=_digits(math.sqrt(np.median(block.var(axis=1, ddof=1)) / typical)),
        paired_sd=_digits(math.sqrt(np.median(between) / typical)),
        df=arms * (n - 1),
        parameters=int(base.environment.get("parameters") or 0),
        tokens=int(np.nan_to_num(number(base.result.get("tokens")))),
        batch_tokens=recipe.batch.tokens_per_step if recipe.task == "lm" else 0,
        corpus=str(data.get("corpus") or ""),
        source=f"gptlab study run {study.name}: {arms} arms, {n} seeds, medians over arms",
    )


def _digits(value: float) -> float:
    return float(f"{value:.3g}")


def main(folders: Sequence[Path]) -> str:
    entries: list[dict[str, Any]] = []
    for folder in folders:
        entry = asdict(measured(read_study_folder(folder)))
        entries.append({key: value for key, value in entry.items() if value})
    return tomli_w.dumps({"settings": entries})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print entries of noise.toml for the folders of studies.")
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR")
    print(main(parser.parse_args().folders))
