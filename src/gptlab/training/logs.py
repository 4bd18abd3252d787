"""What a run logs while it trains: metrics.jsonl, the terminal, and the loggers of `log.to`."""

from __future__ import annotations

import json
import math
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from gptlab.config import Recipe
from gptlab.errors import RunError
from gptlab.files import printable
from gptlab.rundir import RunDir
from gptlab.streams import patient
from gptlab.training.loggers import grouped, open_loggers
from gptlab.training.state import State


class Logs:
    """Writes each line of metrics to all its places.

    On a terminal there is a progress bar. Elsewhere (a file, a batch system) there is a plain line for each evaluation
    and at most ten training lines a minute.

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
        self.total_steps, self.quiet, self.unit = total_steps, quiet, unit
        self.console = Console(file=patient(sys.stderr))
        self.bar: Progress | None = None
        self.last_print = -math.inf
        self.loggers = open_loggers(run, recipe, step)
        if self.loggers:
            run.write_json("logs.json", {logger.name: logger.address for logger in self.loggers})
        if not quiet and self.console.is_terminal:
            self.bar = Progress(
                TextColumn("[bold]{task.completed:.0f}/{task.total:.0f}"),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
                refresh_per_second=2,
            )
            self.bar.start()
            self.bar.add_task("", total=total_steps, completed=max(step, 0))

    def message(self, text: str) -> None:
        """A line on the terminal, above the progress bar."""
        if not self.quiet:
            self.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def training(self, line: dict[str, Any]) -> None:
        """A training line: step, tokens or samples, loss, lr, grad_norm, throughput and more."""
        self._write(line)
        mfu = f"MFU {100 * line['mfu']:.1f}%  " if "mfu" in line else ""
        text = (
            f"loss {_number(line['loss'])}  lr {line['lr']:.2e}  {line[f'{self.unit}_per_second']:,.0f} {self.unit}/s  "
            f"{mfu}{line['memory_gb']:.2f} GB"
        )
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=line["step"], description=text)
        elif time.monotonic() - self.last_print > 6:  # seconds
            self.last_print = time.monotonic()
            self.message(f"step {line['step']}/{self.total_steps}  {text}")

    def evaluation(self, line: dict[str, Any]) -> None:
        self._write(line)
        scores = "  ".join(
            f"{key} {_number(value)}" for key, value in line.items() if key not in ("step", "tokens", "samples")
        )
        self.message(f"step {line['step']}/{self.total_steps}  {scores}")

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
        if self.bar is not None:
            self.bar.stop()
        self._look_for_file()
        self.file.close()
        for logger in self.loggers:
            logger.finish()
            self.message(f"also logged: {logger.address}")


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else str(value)
