"""A full disk, a folder that may not be written, limits of the shell, a clock that goes back, closed streams.

Each ends in one sentence and the documented exit status, and the same command goes on to the same bits once there is
room again.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_recipe
from planted_runs import write_runs
from readers import STUDY
from test_faults_kills import FORK, PROCESSES, assert_same
from test_study_runner import study_file
from test_training_resume import train_until

from gptlab.cli import main
from gptlab.cli.train import draw_run
from gptlab.config import Recipe, load_study
from gptlab.rundir import RunDir
from gptlab.training.loop import train

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="limits and mounts are Linux's")]
ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
NOBODY = 65534


def child(limit: Callable[[], None], words: list[str], write: int) -> None:
    """A command line under limits, with what it says on stderr in a pipe."""
    os.dup2(write, 2)
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - pytest's is another
    limit()
    main(words)


def run(*words: object, limit: Callable[[], None] = lambda: None) -> tuple[int, str]:
    """Exit status and stderr of a command line under limits."""
    read, write = os.pipe()  # a file would have its own limits
    process = PROCESSES.Process(target=child, args=(limit, [str(word) for word in words], write))
    process.start()
    os.close(write)
    with open(read, encoding="utf-8") as pipe:
        says = pipe.read()
    process.join(300)
    code = process.exitcode
    process.kill()
    assert code is not None, "it hangs"
    return code, says


def some(kept: list[Any], *more: Any) -> list[Any]:
    """Values of a test of which `make test-all` tries the first ones alone."""
    return [*kept, *(pytest.param(value, marks=pytest.mark.faults) for value in more)]


def assert_sentence(status: int, says: str) -> None:
    """A failure, or a wrong call, in one sentence at the end and no traceback before."""
    assert status in (1, 2, 3), (status, says)
    assert "Traceback" not in says and says.splitlines()[-1].startswith("gptlab: "), says


@pytest.fixture(scope="module")
def recipe(dataset: Path) -> Recipe:
    small = {"train__max_steps": 8, "train__eval_every": 4, "eval__tokens": 64, "model__n_layer": 1}
    return tiny_recipe(dataset, **small, checkpoint__every=2, checkpoint__keep_last=1, schedule__warmup_steps=2)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder that any user may enter; pytest's own are closed to others."""
    folder = Path(tempfile.mkdtemp(prefix="gptlab-faults-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def whole(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train(recipe, folder, quiet=True)
    draw_run(folder)  # and so all that it needs is loaded, also for a user who cannot read our libraries
    return folder


@pytest.fixture
def file(recipe: Recipe, place: Path) -> Path:
    (place / "r.toml").write_text(recipe.to_toml(), encoding="utf-8")
    return place / "r.toml"


forked = pytest.mark.skipif(not FORK, reason="limits are set in a forked process")


def file_size(most: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


# -- no room


@forked
@pytest.mark.parametrize("kb", some([0, 16], 1, 4, 40, 90))
def test_a_file_that_may_not_grow_ends_a_run_with_a_sentence(kb: int, file: Path, whole: Path, tmp_path: Path) -> None:
    """ulimit -f, the full disk that everybody can make."""
    status, says = run("train", file, "--out", tmp_path / "run", limit=file_size(kb * 1024))
    assert_sentence(status, says)
    assert status == 1
    assert run("train", file, "--out", tmp_path / "run")[0] == 0
    assert_same(whole, tmp_path / "run")


@pytest.fixture
def disk(place: Path) -> Iterator[Callable[[int], Path]]:
    """A function that mounts a file system of so many KB, or makes the mounted one larger."""
    folder = place / "disk"
    folder.mkdir()
    mounted = False

    def of(kb: int) -> Path:
        nonlocal mounted
        options = f"{'remount,' if mounted else ''}size={kb}k"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip("mounting is not permitted here")
        mounted = True
        return folder

    yield of
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


@forked
@pytest.mark.parametrize("kb", some([16, 200], 4, 40, 100, 300))
def test_a_full_disk_ends_a_run_with_a_sentence_and_it_goes_on_when_there_is_room(
    kb: int, file: Path, whole: Path, disk: Callable[[int], Path], tmp_path: Path
) -> None:
    out = disk(kb) / "run"
    status, says = run("train", file, "--out", out)
    assert_sentence(status, says)
    assert status == 1 and "No space left on device" in says
    disk(100_000)
    assert run("train", file, "--out", out)[0] == 0
    assert_same(whole, out)


@forked
@pytest.mark.parametrize("kb", some([24], 4, 100))
def test_a_study_on_a_full_disk(kb: int, dataset: Path, disk: Callable[[int], Path], tmp_path: Path) -> None:
    study = study_file(tmp_path, dataset, train__max_steps=2, train__eval_every=0, eval__tokens=64)
    words = ["study", "run", study, "--seeds", "1", "--arm", "plain", "--out", disk(kb) / "s"]
    status, says = run(*words)
    assert status == 1 and "Traceback" not in says and "No space left on device" in says
    disk(100_000)
    assert run(*words)[0] == 0
    assert RunDir(disk(100_000) / "s" / "plain_seed0").read_json("result.json")["status"] == "completed"


def made_study(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "study.toml").write_text(STUDY.replace("seeds = [0]", "seeds = [0, 1, 2]"), encoding="utf-8")
    study = load_study(folder / "study.toml")
    write_runs(folder / "two", study, lambda arm, seed: 3.0 + (arm == "a") + seed / 10)
    return folder / "two"


@forked
@pytest.mark.parametrize("kb", some([4], 0, 100))
def test_a_report_on_a_full_disk(kb: int, tmp_path: Path) -> None:
    words = ["study", "report", made_study(tmp_path), "--out", tmp_path / "report"]
    status, says = run(*words, limit=file_size(kb * 1024))
    assert_sentence(status, says)
    assert run(*words)[0] == 0
    assert (tmp_path / "report" / "report.html").stat().st_size > 100_000


# -- no permission


@forked
@pytest.mark.skipif(not ROOT, reason="only root can become another user; test_faults_files.py tries it as a user")
@pytest.mark.parametrize("verb", ["train", "study run", "report", "plot", "export"])
def test_a_folder_that_may_not_be_written(
    verb: str, file: Path, whole: Path, place: Path, tmp_path: Path, dataset: Path
) -> None:
    closed, run_dir = place / "closed", place / "run"
    closed.mkdir()
    shutil.copytree(whole, run_dir)
    run_dir.chmod(0o755)
    study_dir = made_study(place / "made")
    data = shutil.copytree(dataset, place / "data")
    study = study_file(place, data, train__max_steps=2)
    words = {
        "train": ["train", file, "--data.path", data, "--out", closed / "run"],
        "study run": ["study", "run", study, "--out", closed / "s"],
        "report": ["study", "report", study_dir, "--out", closed / "report"],
        "plot": ["plot", run_dir, "--out", closed / "plots"],
        "export": ["export", run_dir, "--to", "hf", closed / "hf"],
    }[verb]
    status, says = run(*words, limit=lambda: os.setuid(NOBODY))
    assert_sentence(status, says)
    assert status == 2 and "Permission denied" in says
    assert not list(closed.iterdir())


@forked
@pytest.mark.skipif(not ROOT, reason="only root can become another user")
def test_a_run_whose_folder_is_closed_goes_on_when_it_is_opened(
    recipe: Recipe, file: Path, whole: Path, place: Path, tmp_path: Path, dataset: Path
) -> None:
    data = shutil.copytree(dataset, place / "data")
    words = ["train", file, "--data.path", data, "--out", place / "open" / "run"]
    train_until(recipe.replace({"data.path": str(data)}), place / "open" / "run", 4)
    status, says = run(*words, limit=lambda: os.setuid(NOBODY))
    assert_sentence(status, says)
    assert "Permission denied" in says
    assert run(*words)[0] == 0
    assert_same(whole, place / "open" / "run")


# -- limits of the shell


@forked
@pytest.mark.parametrize("more", some([0, 3, 8], 1, 2, 5, 16))
def test_few_open_files(more: int, file: Path, whole: Path, tmp_path: Path) -> None:
    """ulimit -n"""

    def few() -> None:
        highest = max(int(name) for name in os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + more, highest + more))

    status, says = run("train", file, "--out", tmp_path / "run", limit=few)
    if status:
        assert_sentence(status, says)
        assert status == 1 or (status == 2 and "open files" in says)  # 2: the recipe itself could not be opened
    assert run("train", file, "--out", tmp_path / "run")[0] == 0
    assert_same(whole, tmp_path / "run")


@forked
@pytest.mark.parametrize("mb", some([2], 0, 16))
def test_little_memory(mb: int, file: Path, whole: Path, tmp_path: Path) -> None:
    """ulimit -v, once PyTorch is loaded."""
    words = ["train", file, "--out", tmp_path / "run"]

    def little() -> None:
        import psutil

        most = psutil.Process().memory_info().vms + mb * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

    status, says = run(*words, limit=little)
    if status:
        assert_sentence(status, says)
    assert run(*words)[0] == 0
    assert_same(whole, tmp_path / "run")


@pytest.mark.parametrize("mb", some([500], 60, 200, 1000))
def test_too_little_memory_to_load_what_is_needed(mb: int, file: Path, tmp_path: Path) -> None:
    limit = f"ulimit -v {mb * 1024}; exec {sys.executable} -m gptlab train {file} --out {tmp_path / 'run'}"
    ended = subprocess.run(["bash", "-c", limit], capture_output=True, text=True, timeout=120)
    assert ended.returncode in (1, 3), (ended.returncode, ended.stderr)
    assert "Traceback" not in ended.stderr and "gptlab: " in ended.stderr, ended.stderr
    assert not (tmp_path / "run").exists()


# -- the clock


@pytest.mark.parametrize("step", [-1.0, -1e9])
def test_a_clock_that_goes_back(
    step: float, recipe: Recipe, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = time.time, 0

    def back() -> float:
        nonlocal calls
        calls += 1
        return real() + calls * step if step > -1e6 else max(0.0, real() + step * (calls % 2))

    monkeypatch.setattr(time, "time", back)
    result = train(recipe, tmp_path / "run", quiet=True)
    assert result.status == "completed"
    assert result.wall_seconds is not None and result.wall_seconds >= 0
    assert result.time_per_iter_ms is None or result.time_per_iter_ms > 0
    assert_same(whole, tmp_path / "run")
    with pytest.raises(SystemExit) as ended:
        main(["study", "report", str(made_study(tmp_path))])
    assert not ended.value.code


def test_files_from_the_future(recipe: Recipe, whole: Path, tmp_path: Path) -> None:
    train_until(recipe, tmp_path / "run", 4)
    for path in (tmp_path / "run").rglob("*"):
        os.utime(path, (4e9, 4e9))
    train(recipe, tmp_path / "run", quiet=True)
    assert_same(whole, tmp_path / "run")


# -- the streams


@pytest.mark.parametrize("closed", some(["<&- >&- 2>&-"], "<&-", ">&-", "2>&-"))
@pytest.mark.parametrize("verb", ["train", "study run", "report"])
def test_closed_streams(closed: str, verb: str, file: Path, dataset: Path, tmp_path: Path) -> None:
    study = study_file(tmp_path, dataset, train__max_steps=2, train__eval_every=0, eval__tokens=64)
    words = {
        "train": f"train {file} --out out",
        "study run": f"study run {study} --seeds 1 --arm plain --out out",
        "report": f"study report {made_study(tmp_path)} --out out",
    }[verb]
    line = f"{sys.executable} -m gptlab {words} {closed}"
    ended = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (ended.returncode, "Traceback" in ended.stderr) == (0, False), ended.stderr
    wanted = {"train": "result.json", "study run": "plain_seed0.json", "report": "report.html"}[verb]
    assert (tmp_path / "out" / wanted).stat().st_size > 100


def test_the_errors_that_another_command_line_would_not_mend() -> None:
    from gptlab.cli.main import MACHINE

    assert {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENOMEM} <= set(MACHINE)
