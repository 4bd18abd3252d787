"""gptlab study sweep: the arms of a grid, what is refused before anything runs, and the verdicts at the end."""

import re
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_recipe
from test_cli import call
from test_study_runner import Fakes

from gptlab.config import load_study, sweep_study
from gptlab.errors import ConfigError
from gptlab.rundir import open_study


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return Fakes(tmp_path).replace_workers(monkeypatch)


def sweep(*changes: str, flags: dict[str, Any] | None = None, seeds: int = 2) -> Any:
    layer = {"name": "tiny", "seed": 7, "train": {"max_steps": 10}, "optim": {"lr": 3e-3, "name": "adamw"}}
    return sweep_study(layer, changes, flags or {}, seeds)


def test_several_settings_make_a_grid() -> None:
    study = sweep("optim.lr=1e-3,3e-3", "optim.weight-decay=0,0.1")
    assert list(study.arms) == [
        "lr=1e-3+weight_decay=0",
        "lr=1e-3+weight_decay=0.1",
        "lr=3e-3+weight_decay=0",
        "lr=3e-3+weight_decay=0.1",
    ]
    assert study.baseline == "lr=3e-3+weight_decay=0.1"  # the recipe's own values
    assert (study.name, study.seeds) == ("tiny+lr=1e-3,3e-3+weight_decay=0,0.1", [0, 1])
    one = study.build("lr=1e-3+weight_decay=0", 1)
    assert (one.optim.lr, one.optim.weight_decay, one.seed) == (1e-3, 0.0, 1)


@pytest.mark.parametrize(
    ("change", "arms", "baseline"),
    [
        ("optim.lr=1e-3,2e-3", ["lr=1e-3", "lr=2e-3"], "lr=1e-3"),  # the recipe's own is not among them
        ("optim.name=muon,adamw", ["optim.name=muon", "optim.name=adamw"], "optim.name=adamw"),
        ("optim.betas=[0.9, 0.99],[0.9, 0.95]", ["betas=0.9,0.99", "betas=0.9,0.95"], "betas=0.9,0.95"),
        ("batch.micro_batch=auto,4", ["micro_batch=auto", "micro_batch=4"], "micro_batch=auto"),
        ("model.preset=nano,gpt2", ["preset=nano", "preset=gpt2"], "preset=gpt2"),
        ("data.path=my data/a,b", ["data.path=my-data-a", "data.path=b"], "data.path=my-data-a"),
        ("compile.enabled=true,false", ["enabled=true", "enabled=false"], "enabled=true"),
    ],
)
def test_values_of_every_kind(change: str, arms: list[str], baseline: str) -> None:
    study = sweep(change)
    short = [arm.rpartition(".")[2] for arm in study.arms]
    assert short == [arm.rpartition(".")[2] for arm in arms]
    assert study.baseline.endswith(baseline.rpartition(".")[2])


def test_another_sweep_is_another_study(tmp_path: Path) -> None:
    names = [
        sweep("optim.lr=1e-3,3e-3").name,
        sweep("optim.lr=1e-3,4e-3").name,
        sweep("optim.lr=1e-3,3e-3", flags={"optim.weight_decay": 0.0}).name,
    ]
    assert names[2] == "tiny+weight_decay=0+lr=1e-3,3e-3" and len(set(names)) == 3
    long = sweep("optim.lr=" + ",".join(f"{i}.25e-4" for i in range(1, 30)))
    assert re.fullmatch(r"tiny\+[0-9a-f]{8}", long.name)
    (tmp_path / "study.toml").write_text(long.to_toml(), encoding="utf-8")
    assert load_study(tmp_path / "study.toml") == long


def test_a_loss_per_token_is_not_compared_over_tokenizers() -> None:
    assert sweep("data.tokenizer=byte,char").metric.name == "val_bits_per_byte"
    assert sweep("optim.lr=1e-3,3e-3").metric.name == "final_val_loss"


@pytest.mark.parametrize(
    ("changes", "flags", "says"),
    [
        (["optim.lr"], {}, "optim.lr: optim.lr=1e-3,3e-3 names a setting and its values"),
        (["optim.lr=1e-3,"], {}, "names a setting and its values"),
        (["optim.lr=1e-3"], {}, "at least two values"),
        (["optim.lrr=1,2"], {}, "no setting 'optim.lrr'; did you mean 'optim.lr'?"),
        (["optim.lr=-1,2"], {}, "optim.lr = -1: must be greater than 0"),
        (["optim.lr=1e-3,0.001"], {}, "optim.lr = 0.001 is named twice"),
        (["optim.lr=1,2", "optim.lr=3,4"], {}, "optim.lr is swept twice"),
        (["optim.lr=1,2"], {"optim.lr": 3.0}, "optim.lr is swept, and --optim.lr gives it one value"),
        (["seed=1,2"], {}, "seed cannot be swept; --seeds N"),
        (["data.path=a b,a/b"], {}, "two arms would be called"),
        (
            ["optim.lr=" + ",".join(f"{i}e-4" for i in range(1, 10)), "train.max_steps=1,2,3,4,5,6,7,8"],
            {},
            "9 x 8 arms: a sweep has at most 64",
        ),
    ],
)
def test_what_is_wrong_is_said(changes: list[str], flags: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        sweep(*changes, flags=flags)


def test_it_runs_and_compares(fakes: Fakes, dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Path("tiny.toml")
    recipe.write_text(tiny_recipe(dataset).to_toml(), encoding="utf-8")
    status, _, err = call(capsys, "study", "sweep", recipe, "optim.lr=1e-3,-2", "--seeds", 2)
    assert (status, "optim.lr = -2: must be greater than 0" in err, Path("results").exists()) == (2, True, False)
    words = ["study", "sweep", recipe, "optim.lr=1e-3,1e-2", "--seeds", 2]
    status, out, _ = call(capsys, *words)
    folder = Path("results/tiny+lr=1e-3,1e-2")
    assert status == 0
    assert out.startswith(f"study: {folder}/study.toml, 2 arms x 2 seeds; the baseline is lr=1e-2\n")
    assert out.endswith(f"next: gptlab study report {folder}\n")
    assert re.search(r"^lr=1e-3 +2 of 2 ", out, re.M) and re.search(r"^lr=1e-2 +2 of 2 .*baseline", out, re.M)
    assert sorted(fakes.started()) == ["lr=1e-2_seed0", "lr=1e-2_seed1", "lr=1e-3_seed0", "lr=1e-3_seed1"]
    assert open_study(folder).build("lr=1e-3", 1).optim.lr == 1e-3
    assert call(capsys, *words[:-1], 3)[0] == 0 and len(fakes.started()) == 6  # the first two seeds are kept
    assert call(capsys, "study", "run", folder)[0] == 0 and len(fakes.started()) == 6

    fakes.ends = {"lr=5e-3": ["failed: a fault"]}
    status, out, _ = call(capsys, "study", "sweep", recipe, "optim.lr=5e-3,1e-2", "--out", "mine", "--seeds", 1)
    assert status == 1 and "next: gptlab study report mine" in out
    for wrong, says in ((["--seeds", 0], "--seeds 0: must be at least 1"), (["--jobs", 0], "jobs = 0: must be")):
        status, _, err = call(capsys, *words[:-2], *wrong)
        assert (status, says in err) == (2, True)
    assert "smoke-lm" not in call(capsys, "study", "sweep", "sizes-smoke", "optim.lr=1,2")[2]
