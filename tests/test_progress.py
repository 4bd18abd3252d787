"""What is seen while one waits, and the command that is printed afterwards."""

import argparse
import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import text_of, tiny_recipe
from terminals import on_a_terminal

from gptlab import cli, progress
from gptlab.cli import prepare as cli_prepare
from gptlab.cli import train as cli_train
from gptlab.config import load_recipe, shipped
from gptlab.evals.heldout import heldout_loss
from gptlab.progress import Pace, Progress, clock, columns, cut, drawn_bar
from gptlab.streams import best_effort


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


# -- the line


@pytest.mark.parametrize("width", [24, 40, 79, 119, 199])
@pytest.mark.parametrize("of", ["", "data", "my-folder-" * 12, "日本語" * 20])
def test_the_line_fits_and_keeps_percent_and_time(width: int, of: str, now: SimpleNamespace) -> None:
    shown = Progress("opening", wanted=False, of=of)
    shown.tell("reading", 0, 400_000)
    now.now = 3700.0
    shown.tell("reading", 1_000, 400_000, "12.3M tokens", "1.20M tokens/s")
    line = shown.line(width)
    assert columns(line) <= width
    assert re.search(r"  0%  17d \d:\d\d:\d\d left", line)
    if width >= 79:
        assert "━" in line or "╌" in line
    shown.tell("learning 1,791 merges")
    now.now = 3765.0
    assert columns(shown.line(width)) <= width and shown.line(width).endswith("1:05")


def test_the_time_left_is_at_the_pace_of_this_process(now: SimpleNamespace) -> None:
    pace = Pace()
    assert pace.seconds_left() is None
    now.now = 100.0
    pace.at(0.5)  # of an earlier process
    assert pace.seconds_left() is None
    now.now = 110.0
    pace.at(0.6)
    assert pace.seconds_left() == pytest.approx(40)
    now.now = 115.0
    assert pace.seconds_left() == pytest.approx(35)
    now.now = 500.0
    assert pace.seconds_left() == 0


def test_another_thing_has_a_pace_of_its_own(now: SimpleNamespace) -> None:
    shown = Progress("first", wanted=False)
    for share in (0.0, 0.5):
        shown.tell_share("first", share)
        now.now += 100
    shown.tell_share("second", 0.0)
    assert " -:-- left" in shown.line(80)
    shown.tell_share("third", None)
    assert shown.line(80) == "third"


def test_times_and_bars() -> None:
    assert [clock(t) for t in (None, 0.4, 59.6, 3600, 90061)] == ["-:--", "0:00", "1:00", "1:00:00", "1d 1:01:01"]
    assert drawn_bar(0.5, 6, "utf-8") == "━━━╌╌╌" and drawn_bar(0.5, 6, "ascii") == "###---"
    assert cut("abcdefgh", 8) == "abcdefgh" and cut("abcdefgh", 7) == "abcd..." and cut("abcdefgh", 2) == ""


# -- where it is shown


@pytest.mark.parametrize("forced", ["FORCE_COLOR", "TTY_COMPATIBLE", "NO_COLOR"])
def test_no_terminal_gets_plain_lines(
    forced: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], now: SimpleNamespace
) -> None:
    monkeypatch.setenv(forced, "1")
    with Progress("opening", of="set") as shown:
        for i in range(4):
            shown.tell("reading", i, 4, "12 files")
            now.now += 6  # a line each ten seconds
        shown.message("a file is left out")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["set: reading:  50%, 0:12 left, 12 files", "a file is left out"]


def test_only_the_first_rank_shows_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with Progress("opening") as shown:
            shown.tell("reading", 1, 2)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_reader_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    read, write = os.pipe()
    os.close(read)
    with best_effort(), open(write, "w", encoding="utf-8") as without_reader:
        for stream in (None, without_reader):
            monkeypatch.setattr(sys, "stderr", stream)
            with Progress("opening") as shown:
                shown.tell("reading", 1, 2)
                shown.message("a file is left out")


def test_a_notebook_has_one_display(monkeypatch: pytest.MonkeyPatch, now: SimpleNamespace) -> None:
    pages: list[str] = []
    made: list[str] = []

    def display(page: dict[str, str], raw: bool, display_id: bool) -> Any:
        made.append(page["text/html"])
        return SimpleNamespace(update=lambda page, raw: pages.append(page["text/html"]))

    fake: Any = ModuleType("IPython.display")
    fake.display = display
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", fake)
    console = SimpleNamespace(is_jupyter=True, is_terminal=False, encoding="utf-8")
    monkeypatch.setattr(progress, "stderr_console", lambda: console)
    with Progress("opening <b>") as shown:
        for i in range(8):
            now.now += 0.3  # it is updated twice a second
            shown.tell("reading", i, 8)
    assert len(made) == 1 and "opening &lt;b&gt;</pre>" in made[0]
    assert len(pages) == 5 and " 87%" in pages[-2] and pages[-1] == ""


def test_what_is_printed_is_folded_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "data/set: " + ", ".join(f"{i} things" for i in range(20)) + "\n  made of text"
    for is_terminal in (True, False):
        out: Any = io.StringIO()
        out.isatty = lambda is_terminal=is_terminal: is_terminal
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setenv("COLUMNS", "80")
        progress.print_folded(text)
        lines = out.getvalue().splitlines()
        assert (max(map(len, lines)) < 80) == is_terminal
        assert re.sub(r"\s+", " ", out.getvalue().strip()) == re.sub(r"\s+", " ", text)


# -- what an evaluation tells


def test_an_evaluation_tells_how_many_batches_there_are() -> None:
    class Zero(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor, documents: Any) -> torch.Tensor:
            return torch.zeros(())

    tokens: Any = SimpleNamespace(gather=lambda starts, n: np.zeros((len(starts), n), np.int64))
    told: list[tuple[int, int]] = []

    def tell(done: int, total: int) -> None:
        told.append((done, total))

    how = (8, 3, torch.device("cpu"), contextlib.nullcontext)
    heldout_loss(Zero(), tokens, np.arange(7), *how, before_batch=tell)
    assert told == [(0, 3), (1, 3), (2, 3)]


def test_the_first_evaluation_of_a_run_has_a_percent(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptlab.training.loop import train
    from gptlab.training.terminal import Terminal

    said: list[tuple[int, str]] = []
    monkeypatch.setattr(Terminal, "busy", lambda self, doing: said.append((self.step, doing)))
    train(tiny_recipe(dataset, train__max_steps=1, batch__micro_batch=2), tmp_path / "run", quiet=True)
    first = [doing for step, doing in said if step == 0]
    assert first[0] == "evaluating val loss 0%, -:-- left"
    assert re.fullmatch(r"evaluating val loss 10%, 0:0\d left", first[1])
    assert "evaluating train loss 0%, -:-- left" in first and first[-1] == ""


def test_what_reads_or_writes_much_has_a_percent(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gptlab.data.corpora import constructs

    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    modules = [
        (f"{i}.py", f"def f{i}(x):\n    return [x + {i} for x in range(x, {i} + x)] if x else 3\n") for i in range(60)
    ]
    monkeypatch.setattr(constructs, "stdlib_files", lambda: iter(modules))
    monkeypatch.setattr("gptlab.report.plots.PLOTS", {})  # take a second
    for words, says in (
        (["verify", str(run)], f"reading {run}"),
        (["plot", str(run), "--out", str(tmp_path / "plots")], "reading the runs"),
        (["prepare", "constructs", "--tokenizer", "byte", "--out", str(tmp_path / "set")], "set: reading"),
        (["verify", str(tmp_path / "set")], f"reading {tmp_path / 'set'}"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        assert ended.value.code == 0
        assert re.search(rf"^{re.escape(says)}: +\d+%, .* left$", capsys.readouterr().err, re.M), words


# -- the next command


@pytest.mark.parametrize(
    ("task", "folder", "recipe"),
    [
        ("lm", "data/shakespeare-char", "shakespeare-char-cpu"),
        ("lm", "data/shakespeare-gpt2", "shakespeare-bpe"),
        ("lm", "data/stdlib-bpe-2048", "stdlib-demo"),
        ("lm", "data/stdlib-byte", "smoke-lm"),
        ("lm", "data/fineweb-edu-gpt2", "gpt2-124m-fineweb-edu"),
        ("classify", "data/agnews-roberta-base", "roberta-base-agnews"),
        ("lm", "data/notes-gpt2", "stdlib-demo"),
        ("classify", "data/notes-gpt2", "smoke-cls"),
    ],
)
def test_the_recipe_of_a_dataset(task: str, folder: str, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_prepare.os.path, "exists", lambda path: False)
    assert cli_prepare.fitting_recipe(task, folder) == recipe


def test_a_gpu_trains_another_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_prepare.os.path, "exists", lambda path: True)
    assert cli_prepare.fitting_recipe("lm", "data/shakespeare-char") == "shakespeare-char"


def test_every_shipped_recipe_has_the_task_that_its_dataset_is_for() -> None:
    for name in shipped("recipes"):
        recipe = load_recipe(name)
        chosen = load_recipe(cli_prepare.fitting_recipe(recipe.task, recipe.data.folder))
        assert (chosen.task, chosen.data.folder) == (recipe.task, recipe.data.folder)


def said_by(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 0
    return capsys.readouterr().out.splitlines()


def test_prepare_prints_a_command_that_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my texts").mkdir()
    for i in range(40):
        (tmp_path / "my texts" / f"{i}.txt").write_text(text_of(200, i), encoding="utf-8")
    *_, next_line = said_by(capsys, "prepare", "my texts", "--tokenizer", "byte")
    command = "gptlab train stdlib-demo --data.path 'data/my texts-byte' --name 'my texts-byte'"
    assert next_line == f"next: {command}"
    small = "--train.max-steps 1 --model.n-layer 1 --model.n-embd 16 --model.n-head 2 --eval.tokens 256"
    out = said_by(capsys, *shlex.split(command)[1:], *small.split(), "--checkpoint.every", "0")
    assert any(line.startswith("run: runs/my texts-byte") for line in out)
    *_, next_line = said_by(capsys, "prepare", "my texts", "--tokenizer", "byte", "--part", "1/2", "--out", "parts")
    assert next_line == "next: gptlab prepare 'my texts' --out parts --merge"


def test_a_dataset_where_its_recipe_looks_for_it_needs_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("data/stdlib-byte")
    folder.mkdir(parents=True)
    manifest = {"corpus": "stdlib", "tokenizer": {"name": "byte"}}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    options = argparse.Namespace(part=None, corpus="stdlib")
    assert cli_prepare.next_command(folder, options) == "gptlab train smoke-lm"


@pytest.mark.parametrize(("status", "says"), [(0, "next: gptlab study report 'my results'"), (4, "to go on: gptlab")])
def test_a_study_ends_with_the_next_command(
    status: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gptlab.study import runner

    monkeypatch.setattr(runner, "run_study", lambda *_: status)
    monkeypatch.chdir(tmp_path)
    Path("my results").mkdir()
    Path("my results/study.toml").write_bytes(shipped("studies")["architecture-smoke"].read_bytes())
    words = ["study", "run", "architecture-smoke", "--out", "my results"]
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == status
    *above, line = capsys.readouterr().out.splitlines()
    assert any("classic" in shown and "baseline" in shown for shown in above) is (status == 0)
    assert line == says if status == 0 else line == f"to go on: {shlex.join(['gptlab', *words])}"


def test_an_interrupted_run_prints_what_resumes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    options = argparse.Namespace(command="gptlab train 'my recipe.toml' --resume never --out x")
    assert cli_train.again(options) == "gptlab train 'my recipe.toml' --out x"


# -- whole commands on a terminal


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from gptlab.training.loop import train

    out = tmp_path_factory.mktemp("progress") / "run"
    with best_effort():
        train(tiny_recipe(dataset, train__max_steps=2), out, quiet=True)
    return out


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="has no pseudo-terminals")
@pytest.mark.parametrize("width", [80, 120, 200])
def test_commands_on_a_terminal(width: int, run: Path, tmp_path: Path) -> None:
    def lines_of(*words: str) -> list[str]:
        env = {"COLUMNS": "", "OMP_NUM_THREADS": "1"}
        lines, status = on_a_terminal(width, sys.executable, "-m", "gptlab", *words, **env)
        assert status == 0, lines
        own = [line for line in lines if not line.startswith(("dataset: ", "next: ")) and str(tmp_path) not in line]
        assert max(map(len, own)) <= width
        return lines

    lines = lines_of("prepare", "stdlib", "--tokenizer", "bpe-1024", "--out", str(tmp_path / "set"))
    assert lines[0] == "set: opening stdlib"
    assert any(re.match(r"set: reading the words  [━╌]{20}  +\d+%  [\d:-]+ left", line) for line in lines)
    assert any(line.startswith("set: learning 767 merges") for line in lines)
    assert any(re.match(r"set: tokenising  [━╌]{20}  +\d+%  [\d:-]+ left  \d+\.\dM tokens", line) for line in lines)
    lines = lines_of("eval", str(run))
    assert lines[0].startswith("opening ")
    begin = lines.index("{")
    assert json.loads("".join(lines[begin:]))["step"] == 2
    lines = lines_of("sample", str(run), "--samples", "3", "--prompt", "the", "--max-tokens", "20")
    assert any(re.match(r"drawing 3 texts  [━╌]{20}", line) for line in lines)
    lines = lines_of("export", str(run), "--to", "hf", str(tmp_path / "hf"))
    assert any(line.startswith("writing 0.00 GB") for line in lines)


@pytest.mark.slow
def test_stdout_is_for_machines(run: Path) -> None:
    words = [sys.executable, "-m", "gptlab", "eval", str(run)]
    ended = subprocess.run(words, capture_output=True, text=True, check=True, env={**os.environ, "FORCE_COLOR": "1"})
    assert json.loads(ended.stdout)["step"] == 2
    assert "\x1b" not in ended.stderr and "\r" not in ended.stderr


# Ends a command when it begins to import what takes long.
UNTIL_IT_LOADS = """
import os, sys
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "matplotlib", "scipy", "transformers", "datasets"):
            os.write(2, f"\\nloads {name}\\n".encode())
            os._exit(0)
sys.meta_path.insert(0, Slow())
from gptlab.cli import main
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="has no pseudo-terminals")
@pytest.mark.parametrize(
    "words",
    [
        "doctor",
        "init --data stdlib --minutes 1 --out mine.toml",
        "prepare stdlib --tokenizer byte --out set",
        "train smoke-lm",
        "eval RUN",
        "sample RUN",
        "compare RUN RUN",
        "plot RUN --out plots",
        "export RUN --to hf out",
        "import nanogpt ckpt.pt --out imported",
        "verify RUN",
        "runs RUN",
        "plan smoke-lm",
        "plan precision-lm --gpu H100",
        "bench step smoke-lm",
        "bench inference RUN",
        "study run architecture-smoke",
        "study sweep smoke-lm optim.lr=1e-3,3e-3",
        "study report STUDY",
        "study status STUDY",
        "study power architecture-smoke --effect 0.1",
        "launch smoke-lm --on slurm --print",
        "stop RUN",
    ],
)
def test_a_line_is_written_before_anything_slow_is_loaded(words: str, run: Path, tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study/study.toml").write_bytes(shipped("studies")["architecture-smoke"].read_bytes())
    places = {"RUN": str(run), "STUDY": str(tmp_path / "study")}
    typed = shlex.join(places.get(word, word) for word in words.split())
    source = os.path.dirname(os.path.dirname(cli.__file__))
    begin = f"cd {shlex.quote(str(tmp_path))}; PYTHONPATH={shlex.quote(os.path.dirname(source))}"
    python = shlex.join([sys.executable, "-c", UNTIL_IT_LOADS])
    lines, _ = on_a_terminal(80, "sh", "-c", f"{begin} exec {python} {typed}")
    said = [line for line in lines if line]
    assert said and not said[0].startswith("loads "), said
