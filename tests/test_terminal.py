"""What a run shows: two lines that fit any terminal, plain lines elsewhere, one display in a notebook."""

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from conftest import tiny_recipe
from terminals import on_a_terminal

from gptlab.config import Study
from gptlab.notebook import Display
from gptlab.progress import fitted
from gptlab.study.runner import StudyRunner
from gptlab.study.table import RunState
from gptlab.training import terminal as module
from gptlab.training.terminal import Terminal, small_curve

FIELDS = ["loss 1.2345", "val 1.3000", "12,345 tokens/s", "lr 1.00e-03", "MFU 40.0%", "12.34 GB", "grad norm 0.5000"]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    now = iter(range(0, 10**6, 10))
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: float(next(now))))
    return Terminal(2_000_000, -1, quiet=True)


@pytest.mark.parametrize("width", [20, 40, 60, 79, 80, 120, 200])
def test_the_status_fits_and_always_has_the_loss_and_the_time_left(width: int, shown: Terminal) -> None:
    shown.status(1_000, FIELDS)
    for doing in ("", "evaluating 12%"):
        shown.busy(doing)
        first, second = shown.lines(width)
        assert max(len(first), len(second)) <= width
        assert "loss 1.2345" in second or (doing and width < 30)
        if width >= 60:
            assert first.startswith("step 1,000/2,000,000 ") and re.search(r"   0%  (\d+d )?\d+:\d\d:\d\d left$", first)
    assert ("grad norm" in shown.lines(120)[1]) and "grad norm" not in shown.lines(80)[1]


def test_the_time_left_counts_the_steps_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    shown = Terminal(1100, 1000, quiet=True)
    assert "-:-- left" in shown.lines(80)[0]
    clock.now = 50.0
    shown.status(1050, FIELDS)
    assert shown.lines(80)[0].endswith(" 95%  0:50 left")


def test_fields_are_dropped_from_the_end() -> None:
    assert fitted(["one", "two", "three"], 8) == "one  two"
    assert fitted(["one", "two", "three"], 2) == ""


def test_the_small_curve_falls_from_the_highest_to_the_lowest_value() -> None:
    rows = small_curve([4 - 3 * i / 99 for i in range(100)], 80)
    assert len(rows) == 6
    assert rows[0].strip().startswith("3.9") or rows[0].strip().startswith("4.0")
    assert rows[-1].strip().startswith("1.0")
    lengths = [len(row) for row in rows]
    assert lengths == sorted(lengths) and max(lengths) <= 80
    assert small_curve([1.0], 80) == [] and len(small_curve([2.0, 2.0], 80)) == 6


def test_a_file_gets_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Terminal(20, -1)
    shown.status(1, FIELDS)
    shown.status(2, FIELDS)  # within six seconds
    shown.evaluation(2, ["val_loss 1.0", *(f"score_{i} 0.123456789" for i in range(20))])
    shown.close()
    err = capsys.readouterr().err
    assert "\x1b" not in err and "\r" not in err
    assert [line.split("  ")[0] for line in err.splitlines()] == ["step 1/20", "step 2/20"]
    assert "score_19 0.123456789" in err


def notebook(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """What a notebook shows in turn in the one display that there is, as HTML and as text."""
    pages: list[dict[str, str]] = []

    def display(page: dict[str, str], raw: bool, display_id: bool) -> Any:
        assert raw and display_id and not pages
        pages.append(page)
        return SimpleNamespace(update=lambda page, raw: pages.append(page))

    fake: Any = ModuleType("IPython.display")
    fake.display = display
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", fake)
    return pages


def test_a_notebook_has_one_display_that_is_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = notebook(monkeypatch)
    console = SimpleNamespace(is_jupyter=True, is_terminal=False, width=80, encoding="utf-8")
    monkeypatch.setattr(module, "stderr_console", lambda: console)
    shown = Terminal(20, -1)
    for step in range(30):
        shown.message(f"<b>{step}</b>")
    shown.status(20, FIELDS)
    shown.close()
    html, text = pages[-1]["text/html"], pages[-1]["text/plain"]
    assert "&lt;b>29" in html.replace("&gt;", ">") and "<b>" not in html
    assert "<b>29" in text and "<b>17" not in text and "loss 1.2345" in text
    assert "step 20/20" in text and "100%" in text


def test_a_study_in_a_notebook_has_one_table_that_is_updated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pages = notebook(monkeypatch)
    arms: dict[str, Any] = {"slow": {}, "fast": {"settings": {"optim": {"lr": 1e-2}}}}
    study = Study(name="two", recipe={}, arms=arms, baseline="slow")
    watched = StudyRunner(study, tmp_path, [], 1, [], quiet=True)
    watched.quiet, watched.display = False, Display()
    for arm in study.arms:
        watched.states[arm] = RunState(arm, 0, status="waiting")
    watched.say("<first>")
    watched.show(last=True)
    watched.say("the end")
    text = pages[-1]["text/plain"]
    assert text.index("<first>") < text.index("the end") < text.index("arm  ") < text.index("fast ")
    assert "done 0 of 2: 2 waiting" in text and not capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="has no pseudo-terminals")
@pytest.mark.parametrize("columns", [80, 120, 200])
def test_training_on_a_terminal_wraps_nothing(columns: int, dataset: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(dataset, train__max_steps=60, train__eval_every=20, log__every=1)
    (tmp_path / "a.toml").write_text(recipe.to_toml(), encoding="utf-8")
    words = ["-m", "gptlab", "train", str(tmp_path / "a.toml"), "--out", str(tmp_path / "run")]
    lines, status = on_a_terminal(columns, sys.executable, *words, COLUMNS="", OMP_NUM_THREADS="1")
    assert status == 0
    own = [line for line in lines if not line.startswith(("run: ", "next: "))]  # paths to paste are not wrapped
    assert max(map(len, own)) <= columns
    assert any(re.match(r"step 60/60 ━+ 100%  0:00 left", line) for line in lines)
    assert any("loss" in line and "tokens/s" in line for line in lines)
    assert lines[0] == "loading PyTorch" and "starting" in lines
    assert sum(line.count("┤") for line in lines) == 6
    assert lines[-2].startswith("next: gptlab sample ")
    plain, _ = on_a_terminal(columns, sys.executable, *words, COLUMNS="", NO_COLOR="1")
    assert any("completed after 60 steps" in line for line in plain)
