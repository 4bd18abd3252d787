"""A lock that lets one process at a time use a folder: an operating system's lock on the file `.lock` in the folder.

The system releases the lock when the process ends, for whatever reason, so there are no stale locks. The file may stay.
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
TRIES, PAUSE_SECONDS = 10, 0.02  # `is_held` takes the lock for microseconds; a process that starts then tries again
TAKEN = (errno.EACCES, errno.EAGAIN)  # any other error means that the file system does not support locks

_held: set[int] = set()  # descriptors of the locks that this process holds


@contextlib.contextmanager
def hold(folder: Path, busy: UserError) -> Iterator[None]:
    """Hold the lock on a folder. A missing folder is created, and removed at the end if only the lock file is in it.

    Some network file systems have no locks. The folder is then not protected, and a warning is printed on stderr.

    Args:
        folder: the folder to lock.
        busy: error to raise if the lock is taken, by another process or elsewhere in this one.

    Raises:
        UserError: the folder cannot be written; or `busy`.
    """
    descriptor = _acquire(folder, busy)
    _held.add(descriptor)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows cannot remove an open file
            if [path.name for path in folder.iterdir()] == [NAME]:
                (folder / NAME).unlink()
                folder.rmdir()
        _held.discard(descriptor)
        _close(descriptor)


def is_held(folder: Path) -> bool:
    """Whether a process holds the lock on a folder. Nothing is written, so the folder may be read-only."""
    try:
        descriptor = os.open(folder / NAME, os.O_RDONLY)
    except OSError:
        return False
    try:
        return _lock(descriptor, shared=True) is False
    finally:
        _close(descriptor)


def _acquire(folder: Path, busy: UserError) -> int:
    """Open and lock the lock file; returns its descriptor."""
    file = folder / NAME
    for _ in range(TRIES):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the previous holder has just removed the folder
            continue
        except OSError as error:
            if (
                isinstance(error, FileExistsError) and not folder.is_file()
            ):  # removed, and perhaps made again, meanwhile
                continue
            raise UserError(f"{folder} cannot be written: {error.strerror}") from None
        locked = _lock(descriptor, shared=False)
        with contextlib.suppress(OSError):  # the previous holder may have removed the file after it was opened here
            if locked is not False and os.path.samestat(os.fstat(descriptor), os.stat(file)):
                if locked is None:
                    print(f"{folder}: the disk has no locks: do not start a second process on it", file=sys.stderr)
                return descriptor
        _close(descriptor)
        time.sleep(PAUSE_SECONDS)
    raise busy


def _lock(descriptor: int, shared: bool) -> bool | None:
    """Try to lock an open file. Returns whether it is locked now, or None if the system has no locks."""
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
        with contextlib.suppress(OSError):  # not locked. On Windows, closing alone would unlock only after a delay
            msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)  # type: ignore[attr-defined, unused-ignore]
    os.close(descriptor)


def _forget() -> None:
    """Close the parent's locks in a forked child, so that they end with the parent. The parent still holds them."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
