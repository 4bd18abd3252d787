"""The wish to stop: signals and `gptlab stop` end a run at the next step, after a checkpoint."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

WARNING = "SIGUSR2"  # what SLURM is asked to send ahead of a time limit or a preemption: the job is to go on later
# SIGHUP comes when a terminal is closed, SIGUSR1 from many batch scripts. Windows has the first two only.
SIGNALS = [
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", WARNING, "SIGUSR1", "SIGHUP") if hasattr(signal, name)
]
STOP_FILE = "stop"  # in the folder of a run or a study: what `gptlab stop` writes
LOOK_SECONDS = 1.0  # between two looks for that file, which may lie on a slow network disk


class StopSignal:
    """Calls to end the run. A second Ctrl-C does not wait for the checkpoint.

    Used as a context: signals are listened to inside it, and only in the main thread, where Python allows it. Of two
    contexts, one in the other, both hear a signal, and the inner one what the outer one has heard before. A SIGHUP that
    is ignored stays ignored: the process was started by nohup.

    Args:
        folder: where a file named `stop` ends the run too, and it alone; one from before is removed, and so is the one
            that was obeyed.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.requested = False
        self.reason: str | None = None
        """The signal's name, or "gptlab stop"; once the job was warned it stays SIGUSR2."""
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
        self._ask(signal.Signals(number).name)
        if (outer := self._outer(number)) is not None:
            outer._handle(number, frame)

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


def _leave_terminal() -> None:
    """Let what is still printed go nowhere if the terminal is gone: every line would be an error."""
    for number in (1, 2):
        try:
            os.get_terminal_size(number)
        except OSError as error:
            if error.errno in (errno.EIO, errno.ENXIO):
                with contextlib.suppress(OSError), open(os.devnull, "w", encoding="utf-8") as nowhere:
                    os.dup2(nowhere.fileno(), number)
