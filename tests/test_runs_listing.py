"""The list of runs: what is found below a folder, what each row says, and that it fits a terminal."""

import json
import os
from pathlib import Path

import pytest
from rich.cells import cell_len
from test_cli import call
from test_report_plots import evaluations, make_run, training

from gptlab.config import load_recipe
from gptlab.errors import RunError
from gptlab.report import listing
from gptlab.report.listing import find_runs, list_runs, runs_in, runs_table
from gptlab.rundir import RunDir

WIDTHS = (60, 80, 120, 200)


def finished(path: Path, losses: list[float], status: str = "completed", rate: float = 43_100.0, **recipe: object):
    steps = list(range(0, 10 * len(losses), 10))
    lines = [*training(steps[1:], losses[1:]), *evaluations(steps, losses)]
    result = {"status": status, "steps": steps[-1], "tokens_per_second": rate, "final_val_loss": losses[-1]}
    return make_run(path, lines, result, train__max_steps=steps[-1], **recipe)


def shipped(path: Path, **changes: object) -> RunDir:
    run = RunDir(path)
    run.write_recipe(load_recipe("smoke-lm", {key.replace("__", "."): value for key, value in changes.items()}))
    return run


def texts(rows, width: int) -> list[str]:
    return [str(line) for line in runs_table(rows, width)]


def test_runs_are_found_at_every_depth_and_once(tmp_path):
    for name in ("a", "study/b_seed0", "deep/er/c"):
        finished(tmp_path / "runs" / name, [3.0, 2.0])
    finished(tmp_path / "runs/a/checkpoints/not-a-run", [3.0, 2.0])  # nothing below a run is another one
    finished(tmp_path / "runs/.hidden/d", [3.0, 2.0])
    os.symlink(tmp_path / "runs", tmp_path / "runs/loop")
    names = [str(path.relative_to(tmp_path / "runs")) for path in find_runs([tmp_path / "runs", tmp_path])[0]]
    assert names == ["a", "deep/er/c", "study/b_seed0"]
    assert find_runs([tmp_path / "runs/a"]) == ([tmp_path / "runs/a"], [])


def test_what_was_not_looked_into_is_said(tmp_path, monkeypatch):
    finished(tmp_path / "1/2/3/4/5/6/run", [3.0, 2.0])
    paths, remarks = find_runs([tmp_path])
    assert paths == [] and "levels deep" in remarks[0] and str(tmp_path / "1/2/3/4/5/6") in remarks[0]
    monkeypatch.setattr(listing, "MOST_FOLDERS", 3)
    assert "only the first 3 folders" in find_runs([tmp_path])[1][-1]


def test_a_row_says_how_a_run_stands(tmp_path):
    finished(tmp_path / "done", [3.0, 1.5, 1.75])
    finished(tmp_path / "bad", [3.0, 2.5], status="diverged")
    make_run(tmp_path / "killed", [*evaluations([0], [3.0]), *training([1, 2], [2.9, 2.8])])
    make_run(tmp_path / "waits", []).metrics_file.unlink()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/recipe.toml").write_text("x = [", encoding="utf-8")
    held = make_run(tmp_path / "now", [*evaluations([0], [3.0]), *training([1, 4], [2.9, 2.8], speeds=[500, 1000])])
    with held.lock():
        rows = {row.path.name: row for row in list_runs(find_runs([tmp_path])[0])}
    assert {name: row.status for name, row in rows.items()} == {
        "done": "completed",
        "bad": "diverged",
        "killed": "stopped",
        "waits": "waiting",
        "broken": "damaged",
        "now": "running",
    }
    done, now = rows["done"], rows["now"]
    assert (done.step, done.limit, done.best_val_loss, done.best_step, done.rate) == (20, 20, 1.5, 10, 43_100.0)
    assert (now.step, now.limit, now.rate) == (4, 10, 1000.0)
    assert now.seconds_left == pytest.approx(6 * now_tokens(held) / 1000)  # six steps are left
    assert "recipe.toml is not a TOML file" in rows["broken"].reason
    assert list_runs([tmp_path / "now"])[0].status == "stopped"  # the lock is free again


def now_tokens(run: RunDir) -> int:
    return run.read_recipe().batch.tokens_per_step


def test_rows_are_sorted_by_their_best_loss_within_a_recipe(tmp_path):
    for name, recipe, losses in (("a", "x", [3.0, 2.0]), ("b", "x", [3.0, 1.0]), ("c", "w", [9.0, 8.0])):
        finished(tmp_path / name, losses, name=recipe)
    make_run(tmp_path / "d", [], name="x")
    rows = list_runs(find_runs([tmp_path])[0])
    assert [(row.recipe, row.path.name) for row in rows] == [("w", "c"), ("x", "b"), ("x", "a"), ("x", "d")]


def test_differences_are_from_the_shipped_recipe(tmp_path):
    recipe = load_recipe("smoke-lm")
    assert (recipe.compile.enabled, recipe.model.vocab_size, recipe.data.tokenizer) == ("auto", 0, "byte")
    settled = {"model__vocab_size": 257, "compile__enabled": False, "data__path": "/x/stdlib-byte"}
    shipped(tmp_path / "plain", **settled)
    shipped(tmp_path / "other", optim__lr=3e-3, seed=7, log__every=3, sample__every=5, data__path="/y/mine")
    rows = {row.path.name: row for row in list_runs(find_runs([tmp_path])[0])}
    assert rows["plain"].differs == {}
    assert list(rows["other"].differs) == ["optim.lr", "sample.every", "log.every", "data.path", "seed"]
    assert list(rows["other"].differs.values()) == [3e-3, 5, 3, "mine", 7]


def test_differences_of_an_own_recipe_are_from_what_most_runs_have(tmp_path):
    for i, lr in enumerate([1e-3, 1e-3, 5e-3]):
        finished(tmp_path / f"{i}", [3.0, 2.0], name="mine", optim__lr=lr)
    rows = {row.path.name: row.differs for row in list_runs(find_runs([tmp_path])[0])}
    assert rows == {"0": {}, "1": {}, "2": {"optim.lr": 5e-3}}


def test_what_tells_runs_apart_comes_first(tmp_path):
    for i, lr in enumerate([1e-3, 2e-3]):
        shipped(tmp_path / f"{i}", model__n_layer=7, optim__lr=lr, train__max_steps=99)
    for row in list_runs(find_runs([tmp_path])[0]):
        assert next(iter(row.differs)) == "optim.lr" and set(row.differs) >= {"model.n_layer", "train.max_steps"}


@pytest.mark.parametrize("width", WIDTHS)
def test_the_table_fits_and_keeps_what_matters(tmp_path, width):
    name = "stdlib-demo+n_layer=2+n_embd=64+tokens_per_step=1024+lr=3e-4_seed1337"
    finished(tmp_path / name, [3.0, 1.2345], name="a-recipe-with-quite-a-long-name", optim__lr=3e-4)
    finished(tmp_path / "\u6587\u5b57", [3.0, 2.0], status="out_of_memory", name="a-recipe-with-quite-a-long-name")
    lines = texts(list_runs(find_runs([tmp_path])[0]), width)
    assert all(cell_len(line) <= width for line in lines)
    for part in ("completed", "10", "1.2345", "43.1K"):
        assert part in lines[2]
    assert "out_of_memory" in lines[3] and lines[2].split()[0].endswith("seed1337")
    assert lines[0].split()[:6] == ["run", "status", "step", "best", "tok/s", "age"]


def test_control_characters_are_not_sent_to_the_terminal(tmp_path):
    evil = finished(tmp_path / "a\x1b[31mred", [3.0, 2.0], status="failed")
    evil.write_json("result.json", {"status": "failed", "reason": "\x1b[2Jgone"})
    assert "\x1b" not in "".join(texts(list_runs(find_runs([tmp_path])[0]), 120))


def test_the_command_lists_runs_and_results(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, out, _ = call(capsys, "runs")
    assert status == 0 and "no run in runs and results: `gptlab train RECIPE`" in out
    finished(tmp_path / "runs/a", [3.0, 2.0])
    finished(tmp_path / "results/study/b_seed0", [3.0, 1.0])
    (tmp_path / "results/c").mkdir()
    (tmp_path / "results/c/recipe.toml").write_bytes(b"\xff")
    status, out, err = call(capsys, "runs")
    assert status == 0 and err == "" and "results/c damaged: results/c/recipe.toml is damaged" in out
    assert out.index("study/b_seed0") < out.index("runs/a  ")  # the better one first
    rows = json.loads(call(capsys, "runs", "--json")[1])
    assert [(row["path"], row["best_val_loss"]) for row in rows] == [
        ("results/c", None),
        ("results/study/b_seed0", 1.0),
        ("runs/a", 2.0),
    ]
    assert json.loads(call(capsys, "runs", "runs", "--json")[1])[0]["path"] == "runs/a"
    status, _, err = call(capsys, "runs", "nowhere")
    assert status == 2 and "nowhere is no folder" in err


def test_a_folder_of_runs_stands_for_its_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/a", "runs/b"):
        finished(tmp_path / name, [3.0, 2.0])
    assert [run.path.name for run in runs_in([Path("runs"), Path("runs/a")])] == ["a", "b"]
    with pytest.raises(RunError, match="no run is below it"):
        runs_in([tmp_path / "runs/a/nothing"])
    drawn = []
    monkeypatch.setattr("gptlab.report.plots.draw", lambda runs, out, tell: drawn.append((runs, out)) or [])
    assert call(capsys, "plot", "runs")[0] == 0
    assert [([run.path for run in runs], out) for runs, out in drawn] == [
        ([Path("runs/a"), Path("runs/b")], Path("plots"))
    ]
    assert "not a run directory" in call(capsys, "plot", "nowhere")[2]
