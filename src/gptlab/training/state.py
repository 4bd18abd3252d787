"""What a resumed run needs to know beside tensors: one object, stored in a checkpoint's training.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

KINDS: dict[str, Any] = {"step": int, "metrics_lines": int, "evaluated": list, "val_loss": int | float | None}


@dataclass
class State:
    step: int = 0
    """Optimizer updates done."""
    evaluated: list[str] = field(default_factory=list)
    """What has been evaluated at this step."""
    val_loss: float | None = None
    """The held-out loss at this step; None before it is evaluated."""
    wall_seconds: float = 0.0
    """Of earlier processes of this run, as are the two below."""
    cpu_seconds: float = 0.0
    energy_joules: float = 0.0
    skipped_steps: int = 0
    """Updates that loss scaling skipped."""
    largest_logit: float = 0.0
    metrics_lines: int = 0
    """Lines of metrics.jsonl at the checkpoint; 0 if it does not say."""

    def next(self) -> None:
        """An update is done, and nothing is evaluated yet."""
        self.step, self.evaluated, self.val_loss = self.step + 1, [], None

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> State:
        """Other keys are ignored; `measured` is what `evaluated` was called in gptlab 0.1.

        Raises:
            ValueError: a value is of another type.
        """
        state = {"evaluated": state.get("measured", []), **state}
        known = {f.name: state[f.name] for f in fields(cls) if f.name in state}
        for name, value in known.items():
            if not isinstance(value, KINDS.get(name, int | float)) or isinstance(value, bool):
                raise ValueError(f"{name} = {value!r}")
        return cls(**known)
