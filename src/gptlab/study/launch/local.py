"""A job in the background of this machine: `python -m gptlab.study.launch.local FOLDER PART`.

The process starts the ranks of the job, warns them ahead of the time limit as SLURM does, and starts them again when
they ask for it. It outlives the command that started it.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from gptlab.errors import UserError
from gptlab.study.launch.record import FILES, PRINTED, Launch, LaunchPart, job_command
from gptlab.training.signals import WARNING

if TYPE_CHECKING:
    import psutil

MODULE = "gptlab.study.launch.local"
START_AGAIN = 144  # exit status of a rank that was warned, has saved, and is to be started again
POLL_SECONDS = 0.05
KILL_SECONDS = 2.0  # between SIGINT and SIGKILL for ranks that are still there at the time limit


def check_system() -> None:
    """Raise UserError on Windows, which lacks the signals that jobs need."""
    if not hasattr(signal, WARNING):
        raise UserError("gptlab launch needs Linux or macOS; gptlab train and gptlab study run work on this system too")


def local_command(folder: Path, part: str) -> list[str]:
    return [sys.executable, "-P", "-m", MODULE, str(folder.resolve()), part]


def start_local_job(launch: Launch, part: LaunchPart) -> str:
    """Start the job in a session of its own. Returns its process id."""
    nowhere = subprocess.DEVNULL  # `gptlab launch | tee` must not wait for the job
    words = local_command(launch.folder, part.name)
    process = subprocess.Popen(words, stdin=nowhere, stdout=nowhere, stderr=nowhere, start_new_session=True)
    return str(process.pid)


def local_process(job: str) -> psutil.Process | None:
    """The process of a local job; None if the job has ended."""
    import psutil

    try:
        process = psutil.Process(int(job))
        return process if MODULE in process.cmdline() else None
    except (ValueError, psutil.Error):
        return None


class LocalJob:
    """The ranks of one job."""

    def __init__(self, launch: Launch, part: LaunchPart) -> None:
        self.launch, self.part = launch, part
        self.ranks: list[subprocess.Popen[bytes]] = []
        self.ended = False  # by a signal

    def run(self) -> int:
        signal.signal(signal.SIGTERM, self._end)
        signal.signal(signal.SIGINT, self._end)
        while not self.ended:
            codes = self._run_once()
            if START_AGAIN not in codes:
                return max(codes, key=abs)
        return 0

    def _run_once(self) -> list[int]:
        """Start the ranks and wait until all of them have ended. Returns their exit statuses."""
        asked, began, warned = self.part.resources, time.monotonic(), False
        self.ranks = [self._start(rank) for rank in range(asked.tasks_per_node)]
        if self.ended:  # by a signal that came while the ranks were started
            self._send(signal.SIGTERM)
        while any(rank.poll() is None for rank in self.ranks):
            seconds = time.monotonic() - began
            if asked.seconds is not None and seconds >= asked.seconds - asked.signal_delay and not warned:
                warned = True
                self._send(getattr(signal, WARNING))
            if asked.seconds is not None and seconds >= asked.seconds:
                self._kill()
            time.sleep(POLL_SECONDS)
        return [rank.wait() for rank in self.ranks]

    def _start(self, rank: int) -> subprocess.Popen[bytes]:
        gpus, n = self.part.resources.gpus, self.part.resources.tasks_per_node
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(visible.split(",")[:gpus])}
        if n > 1:
            environment |= rank_variables(rank, n, rank, n, "127.0.0.1", os.getpid())
        with open(self.launch.folder / FILES / f"{os.getpid()}_{rank}_log.out", "ab") as log:
            words = job_command(self.launch.folder, self.part.name)
            return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)

    def _send(self, number: int) -> None:
        for rank in self.ranks:
            rank.send_signal(number)  # nothing happens if it has ended

    def _kill(self) -> None:
        self._send(signal.SIGINT)
        time.sleep(KILL_SECONDS)
        self._send(signal.SIGKILL)

    def _end(self, number: int, frame: object) -> None:
        self.ended = True
        if number == signal.SIGTERM:  # Ctrl-C reaches the ranks by itself
            self._send(number)


def rank_variables(rank: int, ranks: int, local: int, local_ranks: int, host: str, job: int) -> dict[str, str]:
    """torchrun's environment variables for one process of a job.

    Args:
        host: the machine of rank 0.
        job: a number from which the port follows. Ports from 30000 on are left to outgoing connections.
    """
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(local),
        "LOCAL_WORLD_SIZE": str(local_ranks),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(10000 + job % 20000),
    }


def main(arguments: list[str]) -> int:
    folder, name = Path(arguments[0]), arguments[1]
    launch = Launch.read(folder)
    assert launch is not None
    part = launch.part(name)
    if part.job == PRINTED:
        part.job, launch.host = str(os.getpid()), socket.gethostname()
        launch.write()
    return LocalJob(launch, part).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
