"""What a run logs while it trains: metrics.jsonl, the terminal, and the loggers of `log.to`."""

from __future__ import annotations

import json
import math
from typing import Any

from gptlab.config import Recipe
from gptlab.errors import RunError
from gptlab.progress import Pace, clock
from gptlab.rundir import RunDir
from gptlab.training.loggers import grouped, open_loggers
from gptlab.training.state import State
from gptlab.training.terminal import Terminal


class Logs:
    """Writes each line of metrics to all its places.

    Where these lines are shown is for `Terminal` to say.

    Args:
        run: its metrics.jsonl is appended to.
        recipe: names the run for Weights & Biases.
        unit: "tokens" or "samples", as the task counts.
        total_steps: where the bar ends.
        step: of the checkpoint from which it continues, or -1. What was logged after it is purged from TensorBoard.
        state: its `metrics_lines` counts the lines of metrics.jsonl.
        quiet: print nothing.
    """

    def __init__(
        self, run: RunDir, recipe: Recipe, unit: str, total_steps: int, step: int, state: State, quiet: bool = False
    ) -> None:
        self.run, self.file, self.state = run, run.open_metrics(), state
        self.last: dict[bool, str] = {}  # the last training line (True) and the last evaluation
        self.total_steps, self.unit = total_steps, unit
        self.val_loss: float | None = None
        self.pace = Pace()  # of an evaluation
        self.loggers = open_loggers(run, recipe, step)
        if self.loggers:
            run.write_json("logs.json", {logger.name: logger.address for logger in self.loggers})
        self.terminal = Terminal(total_steps, step, quiet)  # last: it holds the screen until `close`

    def message(self, text: str) -> None:
        """A line on the terminal, above the status."""
        self.terminal.message(text)

    def training(self, line: dict[str, Any]) -> None:
        """A training line: step, tokens or samples, loss, lr, grad_norm, throughput and more."""
        self._write(line)
        fields = [
            f"loss {_number(line['loss'])}",
            *([f"val {_number(self.val_loss)}"] if self.val_loss is not None else []),
            f"{line[f'{self.unit}_per_second']:,.0f} {self.unit}/s",
            f"lr {line['lr']:.2e}",
            *([f"MFU {100 * line['mfu']:.1f}%"] if "mfu" in line else []),
            f"{line['memory_gb']:.2f} GB",
            *([f"grad norm {_number(line['grad_norm'])}"] if line.get("grad_norm") is not None else []),
        ]
        self.terminal.status(line["step"], fields)

    def evaluation(self, line: dict[str, Any]) -> None:
        self._write(line)
        scores = {k: v for k, v in line.items() if k not in ("step", "tokens", "samples")}
        self.val_loss = line.get("val_loss", self.val_loss)
        self.terminal.evaluation(line["step"], [f"{key} {_number(value)}" for key, value in scores.items()])

    def evaluating(self, what: str, done: int, total: int) -> None:
        """Called before each batch of an evaluation: how many of this part of it are done, and of how many."""
        if done == 0:
            self.pace = Pace()
        self.pace.at(done / total)
        self.terminal.busy(f"evaluating {what} {done / total:.0%}, {clock(self.pace.seconds_left())} left")

    def evaluated(self) -> None:
        self.terminal.busy("")

    def samples(self, step: int, texts: list[str]) -> None:
        """Write generated texts to samples/step-00000500.txt. A resumed run writes the same file again."""
        if not texts:
            return
        folder = self.run.path / "samples"
        folder.mkdir(exist_ok=True)
        text = "\n---\n".join(texts) + "\n"
        (folder / f"step-{step:08d}.txt").write_text(text, encoding="utf-8")
        self.message(f"step {step}/{self.total_steps}  {text}")

    def _write(self, line: dict[str, Any]) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self._look_for_file()
        self.last["loss" in line] = text = json.dumps(finite) + "\n"
        self.file.write(text)
        self.state.metrics_lines += 1
        numbers = {k: v for k, v in finite.items() if k != "step" and v is not None}
        for logger in self.loggers:
            logger.log({grouped(key): value for key, value in numbers.items()}, line["step"])

    def _look_for_file(self) -> None:
        """Where metrics.jsonl was removed or replaced under way, say so, and go on in a new one.

        The new file has the last two lines, of which the run's result is made.

        Raises:
            RunError: the whole folder is gone.
        """
        if not self.run.writes or self.run.has_open(self.file):
            return
        if not self.run.exists():
            raise RunError(f"{self.run.path} was removed or moved while it was being trained")
        self.file.close()
        self.file = self.run.open_metrics()
        self.file.writelines(self.last.values())
        self.state.metrics_lines = len(self.last)
        self.message(f"{self.run.metrics_file} was removed under way; it has only the lines from here on")

    def close(self) -> None:
        self.terminal.close()
        self._look_for_file()
        self.file.close()
        for logger in self.loggers:
            logger.finish()
            self.message(f"also logged: {logger.address}")


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else str(value)
