"""CONTRIBUTING.md, "Add one of these": a toy of each kind trains, resumes, is planned and reported."""

import re
from pathlib import Path

import pytest
import toys
from test_training_resume import assert_same_run, train_until

import gptlab
from gptlab import config
from gptlab.config import Recipe, Study, build_recipe
from gptlab.data.corpora import TEXT
from gptlab.data.prepare import prepare
from gptlab.data.shards import Dataset
from gptlab.errors import ConfigError
from gptlab.optim.optimizers import OPTIMIZERS
from gptlab.planning.device import Device
from gptlab.planning.plan import plan_recipe
from gptlab.precision.regimes import REGIMES
from gptlab.report.write import write_report
from gptlab.rundir import RunDir
from gptlab.study.folder import keep_study, write_summary
from gptlab.study.runs import planned_runs
from gptlab.training.scoring import evaluate_run


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line for each toy, as CONTRIBUTING.md says; an optimizer's and a regime's name are in the schema too."""
    monkeypatch.setitem(TEXT, "toy-counting", toys.open_counting)
    monkeypatch.setitem(OPTIMIZERS, "toy-sign", toys.OPTIMIZER)
    config.OPTIMIZER_NAMES.append("toy-sign")
    monkeypatch.setitem(REGIMES, "toy_fp64", toys.REGIME)
    config.REGIME_NAMES.append("toy_fp64")
    monkeypatch.setitem(config.TASKS, "toy-last", "toys.LastToken")
    yield
    config.OPTIMIZER_NAMES.remove("toy-sign")
    config.REGIME_NAMES.remove("toy_fp64")


@pytest.fixture
def counting(listed: None, tmp_path: Path) -> Path:
    return prepare("toy-counting", out=tmp_path / "counting", tokenizer="char")


def recipe_of(data: Path, **changes: object) -> Recipe:
    return build_recipe(
        {
            "name": "toy",
            "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16},
            "data": {"path": str(data), "corpus": "toy-counting", "tokenizer": "char"},
            "batch": {"micro_batch": 3, "tokens_per_step": 128},
            "optim": {"lr": 3e-3},
            "train": {"max_steps": 30, "eval_every": 10, "device": "cpu"},
            "eval": {"tokens": 640},
            "checkpoint": {"every": 10},
            "log": {"every": 1},
        },
        {key.replace("__", "."): value for key, value in changes.items()},
    )


ADDED = {
    "corpus": {},
    "optimizer": {"optim__name": "toy-sign"},
    "regime": {"precision__regime": "toy_fp64"},
    "task": {"task": "toy-last"},
    "all": {"optim__name": "toy-sign", "precision__regime": "toy_fp64", "task": "toy-last"},
}


@pytest.mark.parametrize("kind", ADDED)
def test_a_toy_trains_resumes_and_is_planned(kind: str, counting: Path, tmp_path: Path) -> None:
    assert Dataset(counting).manifest["corpus"] == "toy-counting"
    recipe = recipe_of(counting, **ADDED[kind])
    result = gptlab.train(recipe, tmp_path / "whole", quiet=True)
    assert result.status == "completed", result.reason
    first, *_, last = (line["val_loss"] for line in RunDir(tmp_path / "whole").read_metrics() if "val_loss" in line)
    assert last < first  # it learns
    train_until(recipe, tmp_path / "pieces", 14)
    assert gptlab.train(recipe, tmp_path / "pieces", quiet=True).status == "completed"
    assert_same_run(tmp_path / "whole", tmp_path / "pieces")
    assert evaluate_run(gptlab.load_run(tmp_path / "whole", device="cpu"), ["loss"], {})["val_loss"] > 0
    for device in ("H100", "RTX4090"):
        plan = plan_recipe(recipe, Device.named(device))
        assert plan.needed_gb > 0 and plan.steps == 30
    if "task" in recipe.model_dump(exclude_defaults=True):
        assert (result.samples, result.tokens) == (240, None) and result.samples_per_second
        assert 0 <= result.scores["accuracy"] <= 1


@pytest.mark.parametrize("kind", ["optimizer", "task"])
def test_a_study_of_a_toy_is_reported(kind: str, counting: Path, tmp_path: Path) -> None:
    recipe = recipe_of(counting, **({"task": "toy-last"} if kind == "task" else {}), train__max_steps=6)
    other = {"optim": {"name": "toy-sign"}} if kind == "optimizer" else {"model": {"n_embd": 32}}
    study = Study.model_validate(
        {
            "name": "toy-study",
            "recipe": recipe.model_dump(),
            "seeds": [0, 1],
            "baseline": "plain",
            "metric": {"name": "final_val_loss", "better": "lower"},
            "arms": {"plain": {"settings": {}}, "toy": {"settings": other}},
        }
    )
    folder = tmp_path / "study"
    folder.mkdir()
    keep_study(folder, study, study.seeds)
    for run in planned_runs(study, folder, None, None):
        assert gptlab.train(run.recipe, run.dir.path, quiet=True).status == "completed"
        write_summary(study, folder, run, run.dir.read_json("result.json"))
    report = write_report([folder], out=tmp_path / "report")
    arms = {arm["name"] for arm in report.payload["studies"][0]["arms"]}
    assert arms == {"plain", "toy"}
    assert report.page.stat().st_size > 10_000


def test_names_that_are_not_listed_are_refused(tmp_path: Path) -> None:
    for name, choices in (("optim__name", "'adamw'.*'sgd'"), ("precision__regime", "'fp32'"), ("task", "'lm' or")):
        with pytest.raises(
            ConfigError, match=re.escape(name.replace("__", ".")) + f" = toy: must be one of .*{choices}"
        ):
            recipe_of(tmp_path, **{name: "toy"})
