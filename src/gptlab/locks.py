"""A lock on a folder for one process at a time: the operating system's lock on the file `.lock` in it.

The lock ends with the process that holds it, however that ends: a stale lock does not exist, and the file may stay.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from gptlab.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
try:
    import msvcrt
except ImportError:  # everything else
    msvcrt = None  # type: ignore[assignment]

NAME = ".lock"
TRIES, PAUSE_SECONDS = 10, 0.02  # `is_held` takes the lock for microseconds: whoever starts just then tries again
TAKEN = (errno.EACCES, errno.EAGAIN)  # any other error says that the disk has no locks

_held: set[int] = set()  # descriptors of the locks that this process holds


@contextlib.contextmanager
def hold(folder: Path, busy: UserError) -> Iterator[None]:
    """Hold a folder, which is made where it is missing, and removed again where nothing but the lock came to be in it.

    A disk without locks (some network disks) does not protect the folder, and a line on stderr says so.

    Args:
        busy: is raised where the lock is taken, by another process or in this one.

    Raises:
        UserError: the folder cannot be written.
    """
    descriptor = _acquire(folder, busy)
    _held.add(descriptor)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows does not remove a file that is open
            if [path.name for path in folder.iterdir()] == [NAME]:
                (folder / NAME).unlink()
                folder.rmdir()
        _held.discard(descriptor)
        _close(descriptor)


def is_held(folder: Path) -> bool:
    """Whether a process holds a folder. Nothing is written, so a folder that can only be read will do."""
    try:
        descriptor = os.open(folder / NAME, os.O_RDONLY)
    except OSError:
        return False
    try:
        return _lock(descriptor, shared=True) is False
    finally:
        _close(descriptor)


def _acquire(folder: Path, busy: UserError) -> int:
    """The descriptor of the lock's file, locked."""
    file = folder / NAME
    for _ in range(TRIES):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the folder has just been removed by a holder who has ended
            continue
        except OSError as error:
            raise UserError(f"{folder} cannot be written: {error.strerror}") from None
        locked = _lock(descriptor, shared=False)
        with contextlib.suppress(OSError):  # a holder who has ended may have removed the file since it was opened
            if locked is not False and os.path.samestat(os.fstat(descriptor), os.stat(file)):
                if locked is None:
                    print(f"{folder}: the disk has no locks: start no second process on this folder", file=sys.stderr)
                return descriptor
        _close(descriptor)
        time.sleep(PAUSE_SECONDS)
    raise busy


def _lock(descriptor: int, shared: bool) -> bool | None:
    """Try to lock an open file. Returns whether that went well, or None where there are no locks."""
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        elif msvcrt is not None:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]
        else:
            return None
    except OSError as error:
        return False if error.errno in TAKEN else None
    return True


def _close(descriptor: int) -> None:
    if fcntl is None and msvcrt is not None:
        with contextlib.suppress(OSError):  # it was not locked; Windows takes its time to unlock a file that is closed
            msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)  # type: ignore[attr-defined, unused-ignore]
    os.close(descriptor)


def _forget() -> None:
    """Let a forked child keep no lock of its parent's alive. The lock itself stays: the parent has it open."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
