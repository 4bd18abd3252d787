"""Nobody reads what is printed: a closed pipe, a full disk behind a log, streams that are closed."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_recipe
from rich.table import Table

from gptlab.cli import main
from gptlab.cli.common import wide_console
from gptlab.rundir import RunDir
from gptlab.streams import best_effort, fill_descriptors, say
from gptlab.training.signals import StopSignal


def closed_pipe() -> Any:
    """A stream whose reader has left."""
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w", encoding="utf-8")


def full_disk() -> Any:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    return open("/dev/full", "w", encoding="utf-8")


def closed_file() -> Any:
    stream = io.StringIO()
    stream.close()
    return stream


NOBODY: dict[str, Callable[[], Any]] = {
    "a closed pipe": closed_pipe,
    "a full disk": full_disk,
    "a closed file": closed_file,
    "none": lambda: None,
}


@pytest.fixture
def recipe_file(dataset: Path, tmp_path: Path) -> Path:
    recipe = tiny_recipe(dataset, train__max_steps=3, train__eval_every=0, model__n_layer=1)
    file = tmp_path / "recipe.toml"
    file.write_text(recipe.to_toml(), encoding="utf-8")
    return file


@pytest.mark.parametrize("who", NOBODY)
def test_training_ends_as_if_somebody_had_read(
    who: str, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptlab.cli.train.draw_run", lambda out: None)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", NOBODY[who]())
        patch.setattr(sys, "stderr", NOBODY[who]())
        with pytest.raises(SystemExit) as ended:
            main(["train", str(recipe_file), "--out", str(tmp_path / "run")])
        say("nobody")
        with best_effort():
            print("nobody")
    assert ended.value.code == 0
    assert RunDir(tmp_path / "run").read_json("result.json")["status"] == "completed"


def test_a_terminal_of_another_encoding_goes_on_being_written(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(written, encoding="ascii"))
    say("loss \N{PLUS-MINUS SIGN}")
    say("and on")
    assert written.getvalue().splitlines() == [b"loss ?", b"and on"]


@pytest.mark.parametrize("who", NOBODY)
def test_a_mistake_keeps_its_exit_status(who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", NOBODY[who]())
    with pytest.raises(SystemExit) as ended:
        main(["train", "no-such-recipe"])
    assert ended.value.code == 2


def test_a_table_that_nobody_reads_to_the_end_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """rich itself would end the process with 1."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", closed_pipe())
        with pytest.raises(BrokenPipeError):
            wide_console(80).print(Table("a"))
        patch.setattr(sys, "stdout", closed_pipe())
        with pytest.raises(SystemExit) as ended:
            main(["recipes"])
    assert ended.value.code == 0


def test_a_report_is_written_before_it_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gptlab.report import write

    done: list[str] = []
    monkeypatch.setattr(write, "read_study_folder", lambda folder, tell=None: type("Read", (), {"study": Named()})())
    monkeypatch.setattr(write, "analyse", lambda *studies: {})
    files = (("record", []), ("write_page", None), ("write_csv", []), ("draw_report", []))
    for name, returned in (("print_report", None), *files):
        monkeypatch.setattr(
            write,
            name,
            lambda *_, name=name, returned=returned: done.append(name) or returned,  # type: ignore[misc]
        )
    write.write_report([tmp_path], console=wide_console(80))
    assert done == ["record", "write_page", "write_csv", "draw_report", "print_report"]


class Named:
    name = "a study"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_closed_standard_stream_is_no_number_for_a_file() -> None:
    child = os.fork()
    if not child:
        os.close(1)
        os.close(2)
        fill_descriptors()
        os._exit(os.open(os.devnull, os.O_RDONLY) <= 2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.fixture
def stop() -> Iterator[StopSignal]:
    with StopSignal() as outer, StopSignal() as inner:
        yield inner
        assert outer.reason == inner.reason


def test_ctrl_c_is_answered_at_once_and_once(stop: StopSignal, capfd: pytest.CaptureFixture[str]) -> None:
    signal.raise_signal(signal.SIGINT)
    assert stop.requested and stop.reason == "SIGINT"
    assert capfd.readouterr().err.count("saving, then stopping") == 1
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP"])
def test_signals_of_batch_systems_and_terminals_ask_to_save(name: str, stop: StopSignal) -> None:
    signal.raise_signal(getattr(signal, name))
    assert stop.requested and stop.reason == name


# -- as a shell does it


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("gptlab train recipe.toml --out run 2>&1 | head -1", 0),
        ("gptlab train recipe.toml --out run > /dev/full 2>&1", 0),
        ("gptlab train recipe.toml --out run >&- 2>&-", 0),
        ("gptlab train recipe.toml --out run 2>&1 | true", 0),
        ("gptlab recipes | true", 0),
        ("gptlab train no-such-recipe 2>&1 | true", 2),
        ("gptlab train no-such-recipe 2> /dev/full", 2),
    ],
)
def test_in_a_shell(line: str, status: int, recipe_file: Path) -> None:
    line = line.replace("gptlab", f"{sys.executable} -m gptlab")
    done = subprocess.run(
        ["bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}"], cwd=recipe_file.parent, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (status, "")
    if "--out run" in line:
        assert json.loads((recipe_file.parent / "run/result.json").read_text(encoding="utf-8"))["steps"] == 3
