"""Cores and memory of this machine, and other gptlab runs that use the same cores. Works on every system."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator, MutableMapping, Sequence
from pathlib import Path, PureWindowsPath


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_busy() -> bool:
    """Whether more programs are running than there are cores; False where the system does not say."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > 1.5 * (os.cpu_count() or 1)


def free_memory() -> int:
    """Bytes of host memory that are free, or that the system can free by dropping caches."""
    try:
        import psutil
    except ImportError:  # psutil needs the module `resource` on Linux
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return psutil.virtual_memory().available


def peak_memory() -> int:
    """Peak host memory of this process in bytes. If the system does not report a peak: the current memory."""
    try:
        import resource
    except ImportError:  # Windows reports the peak in memory_info
        try:
            import psutil
        except ImportError:
            return 0
        memory = psutil.Process().memory_info()
        return int(getattr(memory, "peak_wset", memory.rss))
    unit = 1 if sys.platform == "darwin" else 1024  # macOS reports bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak() -> None:
    """Let `peak_memory_since` count from here. Only Linux can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # see proc(5)


def peak_memory_since() -> int:
    """Peak host memory of this process in bytes since `forget_peak`; elsewhere than on Linux, since its start."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return peak_memory()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), peak_memory())


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Meanwhile memory that is freed stays with this process, and is used again. glibc's malloc alone does so.

    By default it maps each tensor above 32 MiB anew: every step then waits for the system to clear the same gigabytes,
    page by page. Peak memory hardly changes. What a user has set of malloc is kept.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        yield
        return
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # the parameters' numbers, see mallopt(3)
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)
    try:
        yield
    finally:  # the default, and the thresholds to which glibc's malloc raises its own in a process with large tensors
        mallopt(mmap_max, 65536)
        mallopt(trim_threshold, 64 << 20)
        mallopt(mmap_threshold, 32 << 20)
        ctypes.CDLL(None).malloc_trim(0)


def process_is_alive(number: int) -> bool:
    try:
        import psutil
    except ImportError:
        return True
    return bool(psutil.pid_exists(number))


# -- runs that share the cores --------------------------------------------------------------------------------------


def other_runs() -> int:
    """Number of other processes that train on the cores of this one. Its own parents and children do not count.

    On a cluster, jobs on one node usually have separate cores; such jobs do not count either.
    """
    try:
        import psutil
    except ImportError:
        return 0
    here = psutil.Process()
    try:
        family = {here.pid, *(p.pid for p in here.parents()), *(p.pid for p in here.children(recursive=True))}
    except psutil.Error:  # a parent or child has just ended
        family = {here.pid}
    ours = set(here.cpu_affinity()) if hasattr(here, "cpu_affinity") else None  # macOS has none

    def shares(process: psutil.Process) -> bool:
        try:
            if process.pid in family or not trains(process.cmdline()):
                return False
            return ours is None or not ours.isdisjoint(process.cpu_affinity())
        except (psutil.Error, OSError):  # the process has ended, or belongs to another user
            return False

    return sum(shares(process) for process in psutil.process_iter())


def trains(words: Sequence[str]) -> bool:
    """Whether a command line trains by itself. torchrun and a study's runner do not; they start processes that do."""
    rest = [*words, "", ""]
    if PureWindowsPath(rest[0]).stem.startswith("python"):  # this class splits at both kinds of slashes
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
    """Number of threads for each of `runs` runs, so that every thread has a core.

    More threads than cores make all runs slower: at the end of an operation, threads that have finished spin until the
    last thread of their run has finished, and occupy cores that other threads need.
    """
    return max(1, cores() // runs)


def crowded(threads: int) -> str | None:
    """A warning if this run's threads and those of other runs need more cores than there are, else None.

    A study's runner sets the threads of its runs, so they need no warning.
    """
    others = other_runs()
    share = share_of_cores(1 + others)
    if not others or threads <= share:
        return None
    return (
        f"{say_others(others)}: {threads} threads per run are too many for {cores()} cores and slow all runs down. "
        f"Set OMP_NUM_THREADS={share} before each command, or pass --train.threads {share} to a new run"
    )


def spin_less(environment: MutableMapping[str, str]) -> None:
    """Let waiting OpenMP threads release their core sooner: after 20,000 spins instead of 300,000.

    Runs that compete for cores become several times faster; a run that is alone becomes a few percent slower. Results
    do not change. This works for GCC's OpenMP, which PyTorch uses on Linux, and in processes that load PyTorch later.
    Settings made by the user are kept.
    """
    if not environment.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        environment["GOMP_SPINCOUNT"] = "20000"


def say_others(n: int) -> str:
    """The beginning of a message about `n` other runs."""
    return (
        "another run of gptlab trains on this machine" if n == 1 else f"{n} other runs of gptlab train on this machine"
    )
