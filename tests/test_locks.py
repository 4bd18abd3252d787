"""The lock on a folder: one holder at a time, errors, and release when the holder ends."""

import errno
import fcntl
import os
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptlab import locks
from gptlab.errors import UserError
from gptlab.locks import hold, is_held

BUSY = UserError("somebody else is at it")


class Msvcrt(types.SimpleNamespace):
    """The used part of Windows' module, implemented with this system's locks."""

    LK_NBLCK, LK_UNLCK = 2, 0

    @staticmethod
    def locking(descriptor: int, mode: int, size: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_UN if mode == 0 else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OSError(errno.EACCES, "Permission denied") from None


@pytest.fixture(params=["fcntl", "msvcrt"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "msvcrt":
        monkeypatch.setattr(locks, "fcntl", None)
        monkeypatch.setattr(locks, "msvcrt", Msvcrt)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock on tmp_path / "run" and has created a file in it."""
    program = (
        "import sys, time; from pathlib import Path; from gptlab.locks import hold\n"
        "folder = Path(sys.argv[1])\n"
        "with hold(folder, ValueError()): (folder / 'x').touch(); print('held', flush=True); sys.stdin.readline()"
    )
    words = [sys.executable, "-c", program, str(tmp_path / "run")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.usefixtures("system")
def test_a_second_process_is_told_and_a_killed_one_holds_nothing(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert is_held(run)
    with pytest.raises(UserError, match="somebody else is at it"), hold(run, BUSY):
        pass
    assert is_held(run)
    holder.kill()
    holder.wait()
    assert not is_held(run)
    with hold(run, BUSY):
        assert is_held(run)
    assert sorted(path.name for path in run.iterdir()) == [".lock", "x"]


@pytest.mark.usefixtures("system")
def test_two_places_of_one_process_are_two_and_two_folders_are_free(tmp_path: Path) -> None:
    refused: list[UserError] = []

    def second() -> None:
        try:
            with hold(tmp_path / "a", BUSY):
                pass
        except UserError as error:
            refused.append(error)

    with hold(tmp_path / "a", BUSY), hold(tmp_path / "b", BUSY):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        assert refused == [BUSY]
        assert is_held(tmp_path / "a") and is_held(tmp_path / "b")
        (tmp_path / "a/kept").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]  # the empty folder b was removed
    assert not is_held(tmp_path / "a")


@pytest.mark.usefixtures("system")
def test_a_look_creates_nothing_and_does_not_stand_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_held(tmp_path / "none") and not is_held(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".lock").touch()
    looking = os.open(tmp_path / ".lock", os.O_RDONLY)  # another process is just looking
    assert locks._lock(looking, shared=True)
    monkeypatch.setattr(locks.time, "sleep", lambda _: locks._close(looking))
    with hold(tmp_path, BUSY):
        assert is_held(tmp_path)


def test_a_folder_that_can_only_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".lock").touch(mode=0o444)
    opened = os.open

    def only_read(path: Path, flags: int, mode: int = 0) -> int:  # permissions do not stop a test that runs as root
        if flags & (os.O_RDWR | os.O_WRONLY | os.O_CREAT):
            raise OSError(errno.EROFS, "Read-only file system")
        return opened(path, flags)

    monkeypatch.setattr(os, "open", only_read)
    assert not is_held(tmp_path)
    with pytest.raises(UserError, match="cannot be written: Read-only file system"), hold(tmp_path, BUSY):
        pass


def test_a_disk_without_locks_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", missing)
    with hold(tmp_path, BUSY):
        assert not is_held(tmp_path)
    assert capsys.readouterr().err == f"{tmp_path}: the disk has no locks: do not start a second process on it\n"


def test_a_child_does_not_keep_its_parents_lock(tmp_path: Path) -> None:
    """The lock of a killed process ends, even if a forked child and a started child continue."""
    program = (
        "import os, signal, subprocess, sys, time; from pathlib import Path; from gptlab.locks import hold\n"
        "with hold(Path(sys.argv[1]), ValueError()):\n"
        "    started = subprocess.Popen(['sleep', '60'], stdout=subprocess.DEVNULL).pid\n"
        "    ready, tell = os.pipe()\n"
        "    forked = os.fork()\n"
        "    if not forked:\n"
        "        os.write(tell, b'x'); os.close(1); time.sleep(60); os._exit(0)\n"
        "    os.read(ready, 1)\n"
        "    print(started, forked, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    run = tmp_path / "run"
    done = subprocess.run([sys.executable, "-c", program, str(run)], stdout=subprocess.PIPE, text=True)
    children = [int(number) for number in done.stdout.split()]
    try:
        assert len(children) == 2 and (run / ".lock").is_file() and not is_held(run)
        with hold(run, BUSY):
            pass
    finally:
        for child in children:
            os.kill(child, 9)


def test_a_file_that_a_holder_has_removed_is_not_taken_for_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder ends and removes the empty folder after we open the file and before we lock it."""
    run, lock = tmp_path / "run", locks._lock

    def late(descriptor: int, shared: bool) -> bool | None:
        if not removed:
            removed.append(descriptor)
            (run / ".lock").unlink()
            run.rmdir()
        return lock(descriptor, shared)

    removed: list[int] = []
    monkeypatch.setattr(locks, "_lock", late)
    with hold(run, BUSY):
        assert is_held(run)  # the new file is locked
