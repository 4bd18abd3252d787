"""What this machine has for a run: cores, memory, and other runs of gptlab that share them. On any system."""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping, Sequence
from pathlib import PureWindowsPath


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory() -> int:
    """Bytes of host memory that are free, or would be if the system's caches were."""
    try:
        import psutil
    except ImportError:  # on Linux it needs `resource`
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return psutil.virtual_memory().available


def peak_memory() -> int:
    """The most bytes of host memory that this process has held; where the system does not say, what it holds now."""
    try:
        import resource
    except ImportError:  # Windows counts the peak beside what is held
        try:
            import psutil
        except ImportError:
            return 0
        memory = psutil.Process().memory_info()
        return int(getattr(memory, "peak_wset", memory.rss))
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def process_is_alive(number: int) -> bool:
    try:
        import psutil
    except ImportError:
        return True
    return bool(psutil.pid_exists(number))


# -- sharing --------------------------------------------------------------------------------------------------------


def other_runs() -> int:
    """Processes that train on this one's cores, beside it, what it has started and what started it.

    A cluster gives jobs on one node cores of their own: these are not counted.
    """
    try:
        import psutil
    except ImportError:
        return 0
    here = psutil.Process()
    try:
        family = {here.pid, *(p.pid for p in here.parents()), *(p.pid for p in here.children(recursive=True))}
    except psutil.Error:  # one of them has just ended
        family = {here.pid}
    ours = set(here.cpu_affinity()) if hasattr(here, "cpu_affinity") else None  # macOS has none

    def shares(process: psutil.Process) -> bool:
        try:
            if process.pid in family or not trains(process.cmdline()):
                return False
            return ours is None or not ours.isdisjoint(process.cpu_affinity())
        except (psutil.Error, OSError):  # it has ended, or is another user's and tells nothing
            return False

    return sum(shares(process) for process in psutil.process_iter())


def trains(words: Sequence[str]) -> bool:
    """Whether a command line is that of a process which trains; torchrun's and a study's runner only start those."""
    rest = [*words, "", ""]
    if PureWindowsPath(rest[0]).stem.startswith("python"):  # splits at either slash
        rest.pop(0)
        while rest[0].startswith("-") and rest[0] != "-m":
            rest.pop(0)
    if rest[:2] == ["-m", "gptlab.study.worker"]:
        return True
    if rest[:2] == ["-m", "gptlab"]:
        rest = rest[2:]
    elif PureWindowsPath(rest[0]).stem == "gptlab":
        rest = rest[1:]
    else:
        return False
    return rest[0] == "train" or (rest[:2] == ["launch", "--job"] and "run" in rest[2:])


def share_of_cores(runs: int) -> int:
    """Threads for each of so many runs, so that every thread has a core.

    With more threads than cores all runs are slower: at the end of an operation the threads of a run wait for its last
    one by spinning, which keeps that one, or another run, from the core.
    """
    return max(1, cores() // runs)


def crowded(threads: int) -> str | None:
    """A sentence on a run of so many threads beside others on the same cores; None where there is nothing to say.

    A study's runner sets its runs' threads by itself.
    """
    others = other_runs()
    share = share_of_cores(1 + others)
    if not others or threads <= share:
        return None
    return (
        f"{say_others(others)}: {threads} threads for each run are too many for {cores()} cores, and all are slower; "
        f"OMP_NUM_THREADS={share} before each command, or --train.threads {share} for a new run, is faster"
    )


def spin_less(environment: MutableMapping[str, str]) -> None:
    """Have OpenMP's waiting threads give up their core sooner: after 20,000 looks and not 300,000.

    A run that is alone loses a few percent, and runs that compete for cores are several times faster; the sums
    are the same. It works in processes that load PyTorch later, with GCC's OpenMP, which PyTorch uses on Linux. A
    setting of the user's stays.
    """
    if not environment.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        environment["GOMP_SPINCOUNT"] = "20000"


def say_others(n: int) -> str:
    """The beginning of a sentence about other runs."""
    return (
        "another run of gptlab trains on this machine" if n == 1 else f"{n} other runs of gptlab train on this machine"
    )
