"""The automated researcher of examples/: how often it errs, how much it finds, and that it trains."""

import importlib.util
import itertools
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import tiny_recipe
from planted_runs import planted as read_runs

from gptlab.config import Study
from gptlab.report.analysis import analyse


@pytest.fixture(scope="module")
def researcher() -> ModuleType:
    spec = importlib.util.spec_from_file_location("researcher", Path(__file__).parents[1] / "examples/researcher.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["researcher"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def test_what_a_session_accepts(researcher: ModuleType) -> None:
    found = researcher.simulated(researcher.Plan(), 100)
    assert found["null_accepted"] <= 0.05 and found["sessions_with_a_false_one"] <= 0.05 + 3 * 0.022
    assert found["gains_found"] >= 0.8 and 200 < found["runs_per_session"] < 300


@pytest.mark.slow
@pytest.mark.parametrize("better", ["lower", "higher"])
def test_what_many_sessions_accept(researcher: ModuleType, better: str) -> None:
    found = researcher.simulated(researcher.Plan(better=better), 1500, seed=10_000)
    assert found["sessions_with_a_false_one"] <= 0.05 and found["null_accepted"] <= 0.005
    assert 0.83 <= found["gains_found"] <= 0.87


@pytest.mark.slow
def test_lenient_screening_does_not_spend_more(researcher: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every edit reaches the held-out seeds, as if it had been chosen on the search seeds."""
    monkeypatch.setattr(researcher, "SCREEN", 1.1)
    found = researcher.simulated(researcher.Plan(), 1500, every=0)
    assert 0.02 <= found["sessions_with_a_false_one"] <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 1500)


def test_held_out_seeds_are_new_each_time(researcher: ModuleType) -> None:
    asked: dict[str, list[int]] = {}

    class Seen(researcher.Draws):  # type: ignore[name-defined,misc]
        def measure(self, label: str, seeds: Any) -> Any:
            asked.setdefault(label, []).extend(seeds)
            return super().measure(label, seeds)

    plan = researcher.Plan(budget=8)
    lab = Seen(plan, 1)
    rows = list(researcher.session(plan, iter(["gain=2", "gain=0", "gain=3", "gain=-5"] * 2), lab))
    held_out = [seed for row in rows for seed in row["seeds"]]
    assert len(held_out) >= 4 * 12 and len(set(held_out)) == len(held_out) and min(held_out) >= 1000
    assert all(seed < 4 or seed >= 1000 for seeds in asked.values() for seed in seeds)
    for before, row in itertools.pairwise(rows):
        assert row["base"] == (before["label"] if before["accepted"] else before["base"])
    assert [row["accepted"] for row in rows if row["change"] == "gain=-5"] == [False, False]


def test_a_session_goes_on_where_it_was_stopped(researcher: ModuleType) -> None:
    plan, changes = researcher.Plan(budget=6), [f"gain={k % 3}" for k in range(6)]
    whole = list(researcher.session(plan, iter(changes), researcher.Draws(plan, 4)))
    lab = researcher.Draws(plan, 4)
    part = [row for row, _ in zip(researcher.session(plan, iter(changes), lab), range(3), strict=False)]
    assert whole == part + list(researcher.session(plan, iter(changes[3:]), lab, part))


def test_p_is_the_report_s(researcher: ModuleType) -> None:
    rng = np.random.default_rng(0)
    base, edit = ({seed: float(x) for seed, x in enumerate(rng.normal(3 - k, 1, 6))} for k in (0, 1))
    study = Study.model_validate(
        {"name": "s", "recipe": {}, "arms": {"base": {}, "edit": {}}, "baseline": "base", "seeds": list(range(6))}
    )
    read = read_runs(study, lambda arm, seed: (base if arm == "base" else edit)[seed])
    row = analyse([read])["studies"][0]["arms"][1]["comparison"]
    assert row["mean"] < 0
    assert researcher.p_better(edit, base, "lower") == pytest.approx(row["p"] / 2)
    assert researcher.p_better(edit, base, "higher") == pytest.approx(1 - row["p"] / 2)
    assert researcher.p_better(edit | {3: math.nan}, base, "lower") == 1.0
    assert researcher.p_better(base, base, "lower") >= 0.5
    assert researcher.p_better(dict.fromkeys(base, 1.0), dict.fromkeys(base, 2.0), "lower") == 1.0  # no spread


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "name a recipe, and changes by --edit"),
        (["smoke-lm"], "or --simulate N"),
        (["smoke-lm", "--edit", "optim.lr"], "'optim.lr' is no change: write it as optim.lr=0.01"),
        (["smoke-lm", "--propose", "no-such-command"], "--propose no-such-command"),
        (["smoke-lm", "--edit", "optim.lr=1", "--budget", "0"], "--budget must be at least 1"),
    ],
    ids=["nothing", "no edits", "no value", "no command", "no budget"],
)
def test_wrong_calls(
    researcher: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    assert researcher.main([*words, "--out", str(tmp_path / "out")]) == 2
    assert says in capsys.readouterr().err


def test_a_folder_keeps_its_plan(researcher: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = researcher.Plan()
    lab = researcher.Lab(tmp_path, "smoke-lm", "final_val_loss", plan)
    assert lab.done == []
    row = {"label": "edit-01", "change": "optim.lr=0.01", "base": "base", "accepted": True, "seeds": [], "why": ""}
    (tmp_path / "session.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert researcher.Lab(tmp_path, "smoke-lm", "final_val_loss", plan).recipes["edit-01"].optim.lr == 0.01
    words = ["smoke-lm", "--out", str(tmp_path), "--edit", "optim.lr=0.02"]
    assert researcher.main(words) == 2 and "has tried optim.lr=0.01: give these first" in capsys.readouterr().err
    assert researcher.main([*words, "--budget", "30"]) == 2
    assert "begun with another plan: budget (20 then)" in capsys.readouterr().err


@pytest.fixture
def base(dataset: Path, tmp_path: Path) -> Iterator[Path]:
    quick = {"train__max_steps": 12, "train__eval_every": 12, "checkpoint__every": 12, "eval__train": False}
    recipe = tiny_recipe(dataset, **quick, optim__lr=1e-3, model__dropout=0.0)
    (tmp_path / "base.toml").write_text(recipe.to_toml(), encoding="utf-8")
    yield tmp_path / "base.toml"


@pytest.mark.slow
def test_a_session_that_trains(researcher: ModuleType, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = base.parent / "session"
    words = [str(base), "--out", str(out), "--budget", "4", "--search", "3", "--held-out", "5"]
    edits = ["--edit", "optim.lr=0.02", "--edit", "optim.lr=0.001", "--edit", "schedule.warmup_steps=5"]
    edits += ["--edit", "optim.lr=1e-5"]  # below schedule.min_lr
    assert researcher.main([*words, *edits]) == 0
    rows = [json.loads(line) for line in (out / "session.jsonl").read_text(encoding="utf-8").splitlines()]
    said = capsys.readouterr().out
    assert [row["accepted"] for row in rows[:2]] == [True, False]
    assert [row["base"] for row in rows[1:]] == ["edit-01"] * 3
    assert rows[2]["accepted"] is False  # it is as the recipe was
    assert (
        rows[3]["why"].startswith("schedule.min_lr") and "edit-04 optim.lr=1e-5: not accepted; schedule.min_lr" in said
    )
    assert "edit-01 optim.lr=0.02: accepted" in said and "4 of 4 edits tried" in said
    assert "lr = 0.02" in (out / "best.toml").read_text(encoding="utf-8")
    assert len(list(out.glob("runs/*_seed*"))) >= 3 + 5 + 3 + 5 + 3
    before = (out / "session.jsonl").read_bytes()
    assert researcher.main([*words, *edits]) == 0 and (out / "session.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_command_proposes(researcher: ModuleType, base: Path) -> None:
    agent = base.parent / "agent.py"
    agent.write_text(
        "import sys\nseen = len(sys.stdin.read().splitlines())\nprint('' if seen > 1 else f'optim.lr={2 + seen}e-3')\n",
        encoding="utf-8",
    )
    words = ["--budget", "5", "--search", "2", "--held-out", "2", "--propose", f"{sys.executable} {agent}"]
    assert researcher.main([str(base), "--out", str(base.parent / "session"), *words]) == 0
    lines = (base.parent / "session/session.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["change"] for line in lines] == ["optim.lr=2e-3", "optim.lr=3e-3"]
