"""gptlab init: the recipe for a text, a time and a machine; questions, and what is refused."""

import json
import math
import os
import pty
import re
import select
import signal
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import text_of
from test_cli import call

import gptlab
from gptlab.cli import init
from gptlab.config import Recipe, build_recipe, load_recipe
from gptlab.config.schema import schema_file
from gptlab.data.corpora import text as corpora
from gptlab.errors import UserError
from gptlab.hardware import GB
from gptlab.planning import choose as choosing
from gptlab.planning import memory
from gptlab.planning.activations import bound_activations
from gptlab.planning.choose import PARAMETERS_PER_TOKEN, choose, predicted_loss
from gptlab.planning.device import Device
from gptlab.planning.measure import Speed
from gptlab.planning.shape import laid_out

HERE = Device("a CPU", "cpu", 8 * GB)
BYTES = {"corpus": "text", "tokenizer": "byte"}


def at(flops: float) -> Callable[[Recipe, Any, int], Speed]:
    """A machine that does so many FLOP/s."""
    return lambda recipe, shape, micro_batch: Speed(flops / laid_out(shape).flops_per_token(), "made up")


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine, not timed."""
    monkeypatch.setattr(init, "this_machine", lambda: (HERE, lambda *given, seconds: at(5e8)(*given)))


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a text; memory is estimated without forward passes, which would take seconds."""
    monkeypatch.setattr(memory, "count_activations", bound_activations)
    monkeypatch.chdir(tmp_path)
    Path("novel.txt").write_text("\n".join(text_of(60, seed) for seed in range(120)), encoding="utf-8")


# -- the choice


def test_where_no_text_is_read_twice_the_best_model_has_a_token_for_each_twentieth_of_a_parameter() -> None:
    for flops in (1e15, 1e18, 1e21):
        sizes = [math.sqrt(flops / 6) * 1.01**k for k in range(-600, 200)]
        best = min(sizes, key=lambda n: predicted_loss(n, flops / 6 / n, math.inf))
        assert flops / 6 / best / best == pytest.approx(1 / PARAMETERS_PER_TOKEN, rel=0.03)
    assert pytest.approx(19.6, abs=0.1) == 1 / PARAMETERS_PER_TOKEN


def test_text_that_is_read_again_is_worth_less_each_time() -> None:
    """Section 3.1 of the paper: at R_D repetitions tokens are worth 1 - 1/e of new ones, four epochs nearly all."""
    new = [predicted_loss(1e8, 1e10 * epochs, math.inf) for epochs in (1, 4, 16, 40)]
    again = [predicted_loss(1e8, 1e10 * epochs, 1e10) for epochs in (1, 4, 16, 40)]
    assert again[0] == new[0] and all(a > n for a, n in zip(again[1:], new[1:], strict=True))
    assert again[1] - new[1] < 0.1 * (again[0] - again[1]) and again[2] - again[3] < 0.1 * (again[0] - again[2])
    effective = 1 + choosing.REPEATED_DATA * (1 - math.exp(-1))
    fits = predicted_loss(1e8, 1e10 * (1 + choosing.REPEATED_DATA), 1e10)
    assert fits == pytest.approx(predicted_loss(1e8, 1e10 * effective, math.inf), rel=1e-9)
    assert predicted_loss(1e6, 1e7, 1e6) > predicted_loss(1e6, 1e7, 1e9)  # more parameters than the text is for


def test_more_time_and_a_faster_machine_take_larger_models() -> None:
    found = {}
    for flops, minutes in ((2e11, 1), (2e11, 60), (2e12, 60)):
        layer, plan = choose(BYTES, 1e12, 60 * minutes, HERE, at(flops))
        recipe = build_recipe(layer)
        found[flops, minutes] = recipe.model.n_layer
        assert plan.hours is not None and plan.tokens is not None
        assert 0.75 * minutes < 60 * plan.hours < minutes  # with evaluations; the rest is for starting
        assert 5 < plan.tokens / plan.parameters < 60
        assert recipe.schedule.warmup_steps < recipe.train.max_steps / 2
    assert found[2e11, 1] < found[2e11, 60] < found[2e12, 60]


def test_a_short_text_is_not_read_more_often_than_it_is_worth() -> None:
    layer, plan = choose(BYTES, 40_000, 36_000, HERE, at(2e10))
    recipe = build_recipe(layer)
    assert plan.tokens == pytest.approx(choosing.MOST_EPOCHS * 40_000, rel=0.05) and recipe.model.n_layer == 2
    assert recipe.model.block_size < 0.05 * 40_000  # the held-out part has windows
    [first, short, _] = choosing.facts(recipe, plan, 40_000)
    assert "16 times the text" in first and "so the run is shorter" in short


def test_a_gpu_trains_in_its_own_format_and_what_does_not_fit_is_not_chosen() -> None:
    regimes = {"H100": "amp_bf16", "T4": "amp_fp16"}
    for name, regime in regimes.items():
        layer, plan = choose(BYTES, math.inf, 30, Device.named(name))
        assert layer["precision"]["regime"] == regime and not plan.measured and plan.hours and plan.hours < 1 / 120
    with pytest.raises(UserError, match="the speed of a GPU with 12 GB is unknown: --gpu"):
        choose(BYTES, math.inf, 600, Device.named(memory_gb=12))
    with pytest.raises(UserError, match="not even a model of .* parameters fits: it needs about"):
        choose(BYTES, math.inf, 600, Device("a tiny CPU", "cpu", 1e6), at(1e9))


# -- the file


def test_the_recipe_runs(fast: None, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call(capsys, "init", "--data", "novel.txt", "--minutes", 0.05, "--out", "my own.toml")
    assert status == 0
    *_, first, second = out.splitlines()
    assert (first, second) == ("  gptlab prepare novel.txt --tokenizer byte", "  gptlab train 'my own.toml'")
    text = Path("my own.toml").read_text(encoding="utf-8")
    assert text.startswith(f"#:schema {schema_file('recipe').as_uri()}\n# novel.txt: 29.1 KB of text")
    content = tomllib.loads(text)
    assert content["data"] == {"corpus": "novel.txt", "tokenizer": "byte"}
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(content, json.loads(schema_file("recipe").read_text(encoding="utf-8")))
    assert load_recipe("my own.toml").name == "my own"
    assert call(capsys, *first.split()[1:])[0] == 0
    short = ["--train.max-steps", 2, "--eval.tokens", 640, "--model.n-embd", 32, "--batch.tokens-per-step", 640]
    status, out, err = call(capsys, "train", "my own.toml", *short)
    assert status == 0, err
    status, out, _ = call(capsys, "init", "--data", "novel.txt", "--minutes", 0.05, "--out", "again.toml")
    assert "it is prepared" in out and "gptlab prepare" not in out
    status, out, _ = call(capsys, "init", "--data", "data/novel.txt-byte", "--minutes", 0.05, "--out", "third.toml")
    assert load_recipe("third.toml").data.path == "data/novel.txt-byte" and "gptlab prepare" not in out


def test_a_crowd_is_told_of(fast: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for load, told in ((0.1, False), (99.0 * (os.cpu_count() or 1), True)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        out = call(capsys, "init", "--data", "novel.txt", "--minutes", 0.05, "--out", f"{told}.toml")[1]
        assert ("other programs are using these cores" in out) is told


def test_what_is_there_is_not_overwritten(fast: None, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.toml").write_text("mine", encoding="utf-8")
    status, _, err = call(capsys, "init", "--data", "novel.txt", "--minutes", 1)
    assert (status, err) == (2, "gptlab: mine.toml exists: --out names another file\n")
    assert Path("mine.toml").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--data", "nothing.txt"], "nothing.txt: no file or folder, and not one of stdlib, shakespeare"),
        (["--data", "agnews"], "agnews has labels"),
        (["--data", "short.txt"], "short.txt holds 5 bytes of text: too little"),
        (["--data", "rows.jsonl"], "has no field 'text', only body: name the field of the text with --text-field"),
        (["--data", "novel.txt", "--minutes", "-1"], "-1.0: minutes must be a number above 0"),
        (["--data", "novel.txt", "--minutes", "nan"], "minutes must be a number above 0"),
        (["--data", "novel.txt", "--gpu", "H10"], "--gpu H10: did you mean H100"),
        (["--data", "novel.txt", "--out", "no/such.toml"], "no is no folder"),
        (["--data", "novel.txt", "--optim.lr", "1"], "`gptlab init` takes no settings"),
    ],
)
def test_what_is_wrong_is_said(words: list[str], says: str, fast: None, capsys: pytest.CaptureFixture[str]) -> None:
    Path("short.txt").write_text("short", encoding="utf-8")
    Path("rows.jsonl").write_text('{"body": "text"}\n', encoding="utf-8")
    words = words if "--minutes" in words else [*words, "--minutes", "1"]
    status, _, err = call(capsys, "init", *words)
    assert (status, says in err, err.count("\n")) == (2, True, 1), err
    assert not list(Path().glob("*.toml"))


def test_the_size_of_a_large_text_is_estimated_from_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("many").mkdir()
    for i in range(8):
        rows = "".join(json.dumps({"body": text_of(60, i), "id": i}) + "\n" for _ in range(50))
        Path(f"many/{i}.jsonl").write_text(rows, encoding="utf-8")
    whole = sum(len(text_of(60, i)) * 50 for i in range(8))
    monkeypatch.setattr(init, "ENOUGH", whole // 4)
    found = init.look("many", "body", cpu=True)
    assert found.tokens == pytest.approx(0.95 * whole, rel=0.05)
    assert found.commands == ["gptlab prepare many --tokenizer byte --text-field body"]
    monkeypatch.setattr(init, "TOKENIZERS_OF_A_CPU", ((1e3, "bpe-2048", 3.0),))
    assert init.look("many", "body", cpu=True).data["tokenizer"] == "bpe-2048"
    assert init.look("fineweb-edu", "text", cpu=False).tokens == math.inf


def test_a_corpus_that_training_prepares_has_one_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "stdlib_files", lambda: iter([(f"{i}.py", f"x = {i}\n" * 400) for i in range(40)]))
    found = init.look("stdlib", "text", cpu=True)
    assert found.commands == [] and "in 40 documents" in found.says


# -- questions


def test_what_is_not_given_is_asked_for(
    fast: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = iter(["nothing.txt", "novel.txt", "soon", "0.2", ""])
    monkeypatch.setattr("builtins.input", lambda question: print(question) or next(typed))
    monkeypatch.setattr(init.sys.stdin, "isatty", lambda: True, raising=False)
    status, out, _ = call(capsys, "init")
    assert status == 0
    assert "nothing.txt: no file or folder" in out and "soon: minutes must be a number" in out
    assert "on this machine" not in out and list(typed) == []
    assert load_recipe("mine.toml").data.corpus == "novel.txt"


@pytest.mark.parametrize(("key", "status", "says"), [(b"\x04", 2, "the answers ended"), (b"\x03", 4, "stopped")])
def test_leaving_is_a_sentence(key: bytes, status: int, says: str) -> None:
    child, terminal = pty.fork()
    if not child:
        os.environ["PYTHONPATH"] = str(Path(gptlab.__file__).parents[1])
        os.execv(sys.executable, [sys.executable, "-m", "gptlab", "init", "--data", "novel.txt"])
    shown, until, pressed = b"", time.monotonic() + 120, 0.0
    while time.monotonic() < until:
        if not select.select([terminal], [], [], 0.5)[0]:
            if b"minutes of training: " in shown and time.monotonic() > pressed + 20:
                os.write(terminal, key)  # again, if it came while the terminal changed its mode, which drops it
                pressed = time.monotonic()  # not soon: a second Ctrl-C would end the process while it says goodbye
            continue
        try:
            shown += os.read(terminal, 65536)
        except OSError:
            break
    else:
        os.kill(child, signal.SIGKILL)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status
    assert re.search(f"gptlab: {says}.*nothing was written", shown.decode()) and b"Traceback" not in shown
    assert not Path("mine.toml").exists()


def test_without_a_terminal_nothing_is_asked(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = call(capsys, "init", "--minutes", 1)
    assert (status, err.count("\n"), "without one, give --data PATH --minutes N" in err) == (2, 1, True)
