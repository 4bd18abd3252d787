"""The Python package: what `import gptlab` gives, a run and its methods, and what values show of themselves."""

import inspect
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from conftest import tiny_recipe
from made_report import EVIL, evil
from planted_runs import write_runs

import gptlab
from gptlab import api, progress
from gptlab.config import Study
from gptlab.errors import RunError, UserError
from gptlab.report.listing import Listed, Runs
from gptlab.report.write import Report
from gptlab.rundir import RunDir

CLASSES = ("Recipe", "Result", "Run", "Study")
FUNCTIONS = ("load_recipe", "load_run", "load_study", "prepare", "report", "run_study", "runs", "train")


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api") / "runs" / "tiny"
    gptlab.train(tiny_recipe(dataset, train__max_steps=12, checkpoint__every=12), out=folder, quiet=True)
    return folder


@pytest.fixture(scope="module")
def run(trained: Path) -> gptlab.Run:
    return gptlab.load_run(trained, device="cpu")


# -- the names ------------------------------------------------------------------------------------------------------


def test_a_fresh_import_shows_all_names_and_loads_no_torch() -> None:
    code = """
import sys, time
begin = time.perf_counter(); import gptlab; seconds = time.perf_counter() - begin
names = dir(gptlab)
heavy = [name for name in ("torch", "numpy", "pydantic", "matplotlib", "pandas", "rich") if name in sys.modules]
print(*names)
print(heavy, seconds < 0.5)
import gptlab.report.page
print(callable(gptlab.report), gptlab.report is sys.modules["gptlab.report"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names, heavy, other = done.stdout.splitlines()
    assert {*CLASSES, *FUNCTIONS, "__version__"} <= set(names.split()) and "_HOMES" not in names and "Any" not in names
    assert heavy == "[] True"
    assert other == "True True"  # the package of reports is a function too, whoever imports it first


@pytest.mark.parametrize("name", [name for name in dir(gptlab) if not name.startswith("_")])
def test_each_name_is_there_and_is_told_with_an_example(name: str) -> None:
    value = getattr(gptlab, name)
    assert name in CLASSES or ">>> " in (inspect.getdoc(value.__call__ if name == "report" else value) or "")


def test_methods_of_a_run_are_told_with_an_example() -> None:
    for name in ("metrics", "evaluate", "plot", "export", "card"):
        assert ">>> " in (inspect.getdoc(getattr(gptlab.Run, name)) or ""), name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'gptlab' has no attribute 'trian'"):
        gptlab.trian  # type: ignore[attr-defined]  # noqa: B018


def test_train_takes_a_recipe_by_name_or_file(trained: Path, tmp_path: Path) -> None:
    result = gptlab.train(trained / "recipe.toml", out=trained, quiet=True)  # it has finished
    assert (result.status, result.steps) == ("completed", 12)
    with pytest.raises(UserError, match="smoke-ml"):
        gptlab.train("smoke-ml", out=tmp_path)


# -- a run ----------------------------------------------------------------------------------------------------------


def test_metrics_tell_updates_from_evaluations(run: gptlab.Run) -> None:
    columns = api.metric_columns(RunDir(run.path))
    assert list(columns)[:2] == ["step", "kind"] and len({len(column) for column in columns.values()}) == 1
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == len(lines)
    for row, line in zip(rows, lines, strict=True):
        assert {key: value for key, value in row.items() if key != "kind" and value is not None} == line
        assert row["kind"] == ("eval" if "val_loss" in line else "train")
    assert [row["step"] for row in rows if row["kind"] == "eval"] == [0, 6, 12]
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 13))


def test_metrics_are_a_data_frame_where_there_is_one(run: gptlab.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = pytest.importorskip("pandas").DataFrame
    metrics = run.metrics
    assert isinstance(metrics, frame)
    table = metrics[metrics.kind == "eval"]
    assert table.val_loss.notna().all() and table.lr.isna().all() and table.step.dtype == "int64"

    monkeypatch.setitem(sys.modules, "pandas", None)  # not installed
    fake: Any = ModuleType("polars")
    fake.DataFrame = lambda columns, **_: SimpleNamespace(columns=list(columns))
    monkeypatch.setitem(sys.modules, "polars", fake)
    assert run.metrics.columns == list(metrics.columns)
    monkeypatch.setitem(sys.modules, "polars", None)
    assert isinstance(run.metrics, dict) and list(run.metrics) == list(metrics.columns)


def test_metrics_have_every_line_of_a_long_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f'{{"step": {i + 1}, "loss": null, "lr": 0.1}}\n' for i in range(60_000)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 60', encoding="utf-8")
    columns = api.metric_columns(RunDir(tmp_path))
    assert len(columns["step"]) == 60_000 and columns["loss"][-1] is None
    assert "1 damaged lines are left out" in capsys.readouterr().err
    assert api.metric_columns(RunDir(tmp_path / "none")) == {"step": [], "kind": []}


def test_evaluate_measures_as_the_command_does(run: gptlab.Run) -> None:
    scores = run.evaluate()
    assert scores["step"] == 12 and scores == run.evaluate(on=["loss"])
    assert math.isclose(scores["val_perplexity"], math.exp(scores["val_loss"]), rel_tol=1e-6)
    with pytest.raises(UserError, match=r"\./none"):
        run.evaluate(data={"path": "./none"})
    with pytest.raises(UserError, match="no setting 'data.pth'; did you mean 'data.path'"):
        run.evaluate(data={"pth": "./none"})
    with pytest.raises(UserError, match="--on los does not apply"):
        run.evaluate(on=["los"])


def test_a_plot_is_a_figure_that_a_notebook_shows(run: gptlab.Run, trained: Path) -> None:
    figure: Any = run.plot("learning_rate")
    assert figure.axes[0].get_ylabel() == "learning rate"
    picture = figure._repr_png_()
    assert picture.startswith(b"\x89PNG") and len(picture) < 100_000
    assert inspect.signature(run.plot).parameters["name"].default == "train-val_loss"
    with pytest.raises(UserError, match="has no plot 'lr': it has training_loss, .*learning_rate, throughput"):
        run.plot("lr")
    assert not (trained / "plots").exists()  # nothing is written


def test_the_card_is_markdown_whose_pictures_are_found(run: gptlab.Run, trained: Path) -> None:
    assert not isinstance(run.card, property) and repr(run.card).startswith("# Run tiny\n")
    (trained / "plots").mkdir(exist_ok=True)
    (trained / "plots" / "train-val_loss.png").write_bytes(b"")
    try:
        assert f"]({trained.as_posix()}/plots/train-val_loss.png)" in run.card._repr_markdown_()
    finally:
        (trained / "plots" / "train-val_loss.png").unlink()
        (trained / "plots").rmdir()
    assert not (trained / "card.md").exists()


def test_export_writes_what_the_command_writes(run: gptlab.Run, tmp_path: Path) -> None:
    assert run.export("hf", tmp_path / "hf", license="mit") == tmp_path / "hf"
    assert {"config.json", "model.safetensors", "README.md"} <= {file.name for file in (tmp_path / "hf").iterdir()}
    for to, more, says in (
        ("onnx", {}, "no format 'onnx': there are hf, gguf, sparse24"),
        ("sparse24", {"license": "mit"}, "license = 'mit': is for hf and gguf, not for sparse24"),
        ("gguf", {"push": "a/b"}, "push = 'a/b': is for hf, not for gguf"),
    ):
        with pytest.raises(UserError, match=says):
            run.export(to, tmp_path / "other", **more)
    assert not (tmp_path / "other").exists()


def test_what_takes_a_while_shows_how_far_it_is(
    run: gptlab.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    run.evaluate()
    assert re.search(r": +\d+%, .* left", capsys.readouterr().err)
    run.export("hf", tmp_path / "hf", license="mit")
    assert re.search(r"writing 0.00 GB: +\d+%, .* left", capsys.readouterr().err)


def test_runs_are_listed(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained.parent.parent)
    (row,) = gptlab.runs()
    assert (row.path, row.status, row.step) == (Path("runs/tiny"), "completed", 12)
    assert [found.path for found in gptlab.runs(trained)] == [trained]
    assert gptlab.runs(tmp_path) == [] and repr(gptlab.runs(tmp_path)) == "no runs"
    with pytest.raises(UserError, match="none is no folder"):
        gptlab.runs("none")


# -- what values show of themselves ---------------------------------------------------------------------------------


class Safe(HTMLParser):
    """Checks that a piece of HTML has no element but those of tables and text, and loads nothing."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.depth = 0
        self.feed(html)
        self.close()
        assert not self.depth

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        assert tag in ("table", "caption", "tr", "th", "td", "p") and {name for name, _ in attributes} <= {"style"}
        self.depth += 1

    def handle_endtag(self, tag: str) -> None:
        self.depth -= 1


def test_a_result_shows_what_is_set(trained: Path) -> None:
    result = gptlab.Result.from_json(json.loads((trained / "result.json").read_text(encoding="utf-8")))
    assert repr(result).startswith("Result(status='completed', steps=12, tokens=3072, final_train_loss=")
    assert "None" not in repr(result) and len(repr(result)) < 500
    assert repr(gptlab.Result("failed", reason="a <b>")) == "Result(status='failed', steps=0, reason='a <b>')"
    html = gptlab.Result("failed", 1000, 12345.678, scores={"micro_f1": 0.5}, reason=EVIL)._repr_html_()
    Safe(html)
    assert "1,000" in html and "12346" in html and "micro_f1" in html


def test_recipes_studies_and_runs_are_short(run: gptlab.Run) -> None:
    parameters = json.loads((run.path / "environment.json").read_text(encoding="utf-8"))["parameters"]
    assert repr(run) == f"Run('{run.path}', recipe='tiny', step=12, parameters={parameters:,})"
    recipe = gptlab.load_recipe("shakespeare-char-cpu")
    assert repr(recipe) == (
        "Recipe(name='shakespeare-char-cpu', task='lm', model.n_layer=4, model.n_embd=128, model.block_size=64, "
        "data.corpus='shakespeare', optim.name='adamw', optim.lr=0.001, train.max_steps=2000, seed=1337)"
    )
    study = gptlab.load_study("precision-lm")
    assert "'and 15 more'], baseline='fp32_baseline', seeds=[" in repr(study) and len(repr(study)) < 400
    assert len(str(study)) < 400 and gptlab.load_study("precision-lm") == study


def test_runs_show_a_table(run: gptlab.Run) -> None:
    rows = Runs([Listed(Path(EVIL), EVIL, "damaged", reason=EVIL), *gptlab.runs(run.path)])
    for html in (rows._repr_html_(), rows[0]._repr_html_(), run._repr_html_()):
        Safe(html)
    assert "completed" in run._repr_html_() and "tiny" in run._repr_html_()
    assert "damaged" in repr(rows) and "12/" not in repr(rows) and len(repr(rows[1])) < 300


def test_a_report_shows_answers_and_arms_and_runs_no_script() -> None:
    report = Report(evil(), Path(EVIL), [])
    Safe(report._repr_html_())
    assert len(repr(report)) < 2000


def test_report_answers_a_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    arms: dict[str, Any] = {"slow": {}, "fast": {"settings": {"optim": {"lr": 1e-2}}}}
    question: Any = {"id": "Q1", "claim": "fast learns more", "contrast": ["fast", "slow"], "confirmed_if": "better"}
    monkeypatch.setattr("gptlab.report.write.draw_report", lambda *_: [])  # takes a second
    study = Study(name="two", recipe={"train": {"max_steps": 9}}, arms=arms, baseline="slow", questions=[question])
    write_runs(
        tmp_path / "two",
        study,
        lambda arm, seed: 2.0 + 0.01 * (7 * seed % 5 - 3 * seed * (arm == "fast")) - 0.5 * (arm == "fast"),
    )
    report = gptlab.report(tmp_path / "two")
    assert repr(report) == f"Report(two, answers={{'Q1': 'confirmed'}}, page='{tmp_path / 'two' / 'report.html'}')"
    assert "confirmed" in report._repr_html_() and "6 of 6 runs" in report._repr_html_() and report.page.is_file()
    assert f"gptlab study report {tmp_path / 'two'}" in report.page.read_text(encoding="utf-8")
    assert "analysing the runs" in capsys.readouterr().err

    calls: list[Any] = []
    monkeypatch.setattr(api.runner, "run_study", lambda *given: calls.append(given))
    again = gptlab.run_study(tmp_path / "two" / "study.toml", out=tmp_path / "two", seeds=[0], quiet=True)
    assert repr(again) == repr(report) and capsys.readouterr().err == ""
    assert calls == [(study, tmp_path / "two", None, [0], None, True)]
    with pytest.raises(RunError, match="is not a study's folder"):
        gptlab.report(tmp_path)
