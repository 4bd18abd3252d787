"""How a run ended: what result.json holds."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from gptlab.notebook import html_table


@dataclass
class Result:
    """How a run ended. result.json has the same keys, without those that do not apply."""

    status: str
    """completed, diverged, out_of_memory, interrupted, failed or not_applicable."""
    steps: int = 0
    tokens: int | None = None
    samples: int | None = None
    final_train_loss: float | None = None
    final_val_loss: float | None = None
    val_perplexity: float | None = None
    val_bits_per_byte: float | None = None
    final_train_eval_loss: float | None = None
    """The loss over eval.tokens tokens of the training split, with eval.train."""
    tokens_per_second: float | None = None
    """Tokens of a step over the median time of a step, without the process's first ten steps (compilation, warm-up),
    evaluations and checkpoints."""
    samples_per_second: float | None = None
    """The same in samples, such as the documents of task = classify."""
    time_per_iter_ms: float | None = None
    """Median over the same steps."""
    time_per_iter_p95_ms: float | None = None
    timed_steps: int | None = None
    """The number of these steps."""
    peak_memory_gb: float | None = None
    peak_memory_reserved_gb: float | None = None
    """GPU memory that PyTorch reserved, used or not."""
    wall_seconds: float | None = None
    cpu_seconds: float | None = None
    energy_joules: float | None = None
    cost: float | None = None
    sparsity: float | None = None
    """Share of the prunable weights that is masked."""
    mask_bytes: int | None = None
    """Memory of the masks, one bit per weight."""
    mask_overhead_percent: float | None = None
    """Share of the steps' time spent on masks."""
    skipped_steps: int | None = None
    """Updates that loss scaling skipped because float16 gradients overflowed."""
    largest_logit: float | None = None
    """The largest |logit| of any training step."""
    scores: dict[str, float] = field(default_factory=dict)
    """Further scores of the last evaluation, such as a classifier's; keys of their own in result.json."""
    failed_at_step: int | None = None
    failure: str | None = None
    """Kind of divergence: non_finite, spike or collapse."""
    failed_tensor: str | None = None
    """The first tensor concerned."""
    memory_asked_gb: float | None = None
    """When memory ran out: what was asked for, and what the device had free and in total."""
    memory_free_gb: float | None = None
    memory_total_gb: float | None = None
    reason: str | None = None

    def __repr__(self) -> str:
        values = self.to_json().items()
        shown = ", ".join(
            f"{key}={value:.5g}" if isinstance(value, float) else f"{key}={value!r}" for key, value in values
        )
        return f"Result({shown})"

    def _repr_html_(self) -> str:
        return html_table([], self.to_json().items())

    def to_json(self) -> dict[str, Any]:
        plain = {key: value for key, value in asdict(self).items() if value is not None and key != "scores"}
        return {**plain, **self.scores}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Result:
        known = {f.name for f in fields(cls)}
        scores = {key: value for key, value in content.items() if key not in known}
        return cls(**{key: value for key, value in content.items() if key in known}, scores=scores)


class NotStarted(Exception):
    """Nothing has to be trained, or nothing can be; the result says which."""

    def __init__(self, result: Result) -> None:
        super().__init__(result.reason or result.status)
        self.result = result
