"""Requests to stop: signals and `gptlab stop` end a run at the next step, after a checkpoint."""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

WARNING = "SIGUSR2"  # SLURM sends it ahead of a time limit or a preemption; the job continues later
# A closed terminal sends SIGHUP, many batch scripts send SIGUSR1. Windows has only the first two signals.
SIGNALS = [
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", WARNING, "SIGUSR1", "SIGHUP") if hasattr(signal, name)
]
STOP_FILE = "stop"  # `gptlab stop` writes this file into the folder of a run or a study
LOOK_SECONDS = 1.0  # between two checks for the file, which may be on a slow network disk


class StopSignal:
    """Whether the run should end. A second Ctrl-C raises KeyboardInterrupt and does not wait for the checkpoint.

    A context manager: signals are handled inside the context, and only in the main thread, because Python handles
    signals there. Nested contexts both receive a signal; a new inner context inherits a pending request. An ignored
    SIGHUP stays ignored, because nohup started the process.

    Args:
        folder: creating a file `stop` here ends this run. A leftover file is deleted at the start; the file is deleted
            once obeyed.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.requested = False
        self.reason: str | None = None
        """Name of the signal, or "gptlab stop". SIGUSR2 is not replaced by later requests."""
        self._file = folder / STOP_FILE if folder is not None else None
        self._looked_at = -LOOK_SECONDS
        self._before: dict[int, Any] = {}

    def __call__(self) -> bool:
        if self._file is not None and not self.requested and time.monotonic() - self._looked_at >= LOOK_SECONDS:
            self._looked_at = time.monotonic()
            if self._file.exists():
                self._ask("gptlab stop")
        return self.requested

    def _ask(self, reason: str) -> None:
        self.requested = True
        if self.reason != WARNING:
            self.reason = reason

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if number == getattr(signal, "SIGHUP", None):
            _leave_terminal()
        if number == signal.SIGINT and os.environ.get("RANK", "0") == "0":
            with contextlib.suppress(OSError):  # print may be at work where the signal arrived
                os.write(2, b"\nsaving, then stopping; Ctrl-C again stops without saving\n")
        heard: StopSignal | None = self
        while heard is not None:
            heard._ask(signal.Signals(number).name)
            heard = heard._outer(number)

    def _outer(self, number: int) -> StopSignal | None:
        before = getattr(self._before.get(number), "__self__", None)
        return before if isinstance(before, StopSignal) else None

    def __enter__(self) -> StopSignal:
        if self._file is not None:
            self._file.unlink(missing_ok=True)
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number != getattr(signal, "SIGHUP", None) or signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
            if (outer := self._outer(signal.SIGTERM)) is not None and outer.reason is not None:
                self._ask(outer.reason)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._file is not None:
            self._file.unlink(missing_ok=True)


@contextlib.contextmanager
def stack_on_sigterm(file: Path) -> Iterator[None]:
    """On SIGTERM, write where the threads of this process are into `file`, which goes when the context is left.

    What ends the ranks of a run after one of them has failed sends SIGTERM first. A rank that hangs, also within C, so
    leaves the place. Enter this inside of a `StopSignal`, which hears the signal as well.
    """
    with contextlib.ExitStack() as opened:
        with contextlib.suppress(AttributeError, OSError):  # on Windows; on a full disk
            opened.callback(file.unlink, missing_ok=True)
            stream = opened.enter_context(open(file, "w", encoding="utf-8"))
            faulthandler.register(signal.SIGTERM, stream, all_threads=True, chain=True)
            opened.callback(faulthandler.unregister, signal.SIGTERM)
        yield


def _leave_terminal() -> None:
    """If the terminal is gone, discard further output: every write would raise an error."""
    for number in (1, 2):
        try:
            os.get_terminal_size(number)
        except OSError as error:
            if error.errno in (errno.EIO, errno.ENXIO):
                with contextlib.suppress(OSError), open(os.devnull, "w", encoding="utf-8") as nowhere:
                    os.dup2(nowhere.fileno(), number)
