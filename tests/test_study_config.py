"""Study files: what is read, merged, refused and written."""

from pathlib import Path

import pytest

from gptlab.config import load_study, shipped
from gptlab.errors import ConfigError

BASE = 'recipe = "shakespeare-char-cpu"\nbaseline = "plain"\n'
TWO = BASE + '[arms.plain]\n[arms.fast]\ngroup = "extended"\nnote = "hot"\noptim.lr = 3e-3\nmodel.preset = "nano"\n'


def write(folder: Path, text: str, name: str = "mine.toml") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_an_arm_is_the_recipe_with_its_settings_and_a_seed(tmp_path: Path) -> None:
    study = load_study(write(tmp_path, TWO))
    assert (study.name, study.seeds, list(study.arms)) == ("mine", [0, 1, 2], ["plain", "fast"])
    assert (study.arms["fast"].group, study.arms["fast"].note) == ("extended", "hot")
    plain, fast = study.build("plain", 1), study.build("fast", 5)
    assert (plain.name, plain.seed, plain.optim.lr, plain.model.n_layer) == ("mine/plain", 1, 1e-3, 4)
    assert (fast.name, fast.seed, fast.optim.lr, fast.model.n_layer) == ("mine/fast", 5, 3e-3, 3)
    same = {"name": "x", "seed": 0, "optim.lr": 1.0, "model.n_layer": 4, "model.n_head": 4, "model.n_embd": 128}
    assert plain.replace(same) == fast.replace(same)


def test_settings_of_a_study_lie_between_its_recipe_and_its_arms(tmp_path: Path) -> None:
    text = BASE + 'settings = { "optim.lr" = 7e-3, train.max_steps = 9 }\n[arms.plain]\n[arms.slow]\noptim.lr = 2e-3\n'
    study = load_study(write(tmp_path, text))
    rates = [(study.build(arm, 0).optim.lr, study.build(arm, 0).train.max_steps) for arm in study.arms]
    assert rates == [(7e-3, 9), (2e-3, 9)]


def test_flags_beat_arms_and_say_so(tmp_path: Path) -> None:
    study = load_study(write(tmp_path, TWO), {"optim.lr": "2e-3", "model.n_layer": 2, "train.max_steps": 5})
    assert [study.build(arm, 0).optim.lr for arm in study.arms] == [2e-3, 2e-3]
    assert (study.build("fast", 0).model.n_layer, study.build("fast", 0).model.n_embd) == (2, 48)
    assert sorted(study.beaten()) == [("fast", "model.n_layer"), ("fast", "optim.lr")]
    assert load_study(write(tmp_path, TWO), {"optim.lr": 3e-3}).beaten() == []  # says the same


@pytest.mark.parametrize("overrides", [{}, {"optim.lr": 2e-3, "sample.prompt": "3"}])
def test_the_resolved_file_stands_alone_and_builds_the_same(tmp_path: Path, overrides: dict[str, object]) -> None:
    study = load_study(write(tmp_path, TWO), overrides)
    again = load_study(write(tmp_path, study.to_toml(), "study.toml"))
    assert "shakespeare-char-cpu" not in study.to_toml()
    assert (again.name, again.seeds, again.baseline, again.flags) == ("mine", [0, 1, 2], "plain", study.flags)
    for arm in study.arms:
        assert again.build(arm, 3) == study.build(arm, 3)
    assert again.to_toml() == study.to_toml()
    assert load_study(tmp_path / "study.toml", {"optim.lr": 5e-3}).build("fast", 0).optim.lr == 5e-3


def test_arms_of_another_study(tmp_path: Path) -> None:
    write(
        tmp_path, TWO + '[[questions]]\nid = "Q"\nclaim = "c"\ncontrast = ["fast", "plain"]\nconfirmed_if = "better"\n'
    )
    text = f'arms_of = "{tmp_path}/mine.toml"\nrecipe = "shakespeare-char"\n[arms.fast]\noptim.lr = 9e-3\n[arms.new]\n'
    study = load_study(write(tmp_path, text, "other.toml"))
    assert list(study.arms) == ["plain", "fast", "new"]
    assert (study.baseline, [question.id for question in study.questions]) == ("plain", ["Q"])
    fast = study.build("fast", 0)
    assert (fast.optim.lr, fast.model.n_layer, study.arms["fast"].group) == (9e-3, 3, "extended")
    assert load_study(tmp_path / "mine.toml").build("fast", 0).optim.lr == 3e-3
    chained = f'arms_of = "{tmp_path}/other.toml"\nrecipe = "shakespeare-char"\n'
    with pytest.raises(ConfigError, match=r"arms_of = other: has the arms of .*mine.toml; name that study"):
        load_study(write(tmp_path, chained, "third.toml"))


ASKS = "[[questions]]\nid = 'Q'\nclaim = 'c'\ncontrast = ['plain', 'fast']\nconfirmed_if = 'better"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            f"[arms.plain]\n[arms.fast]\n{ASKS} in x'\n",
            "study mine: question Q: 'better in x' belongs in a comparison",
        ),
        (
            f"[arms.plain]\n[arms.fast]\n{ASKS} by more than x'\n",
            "study mine: question Q: 'better by more than x' belongs in a comparison",
        ),
        (f"[arms.plain]\n[arms.fast]\n{ASKS}'\n{ASKS}'\n", "study mine: two questions have the same id: Q"),
        ("name = 'a/b'\n[arms.plain]\n", "study a/b: name 'a/b': must consist of letters, digits"),
        ("arms = 3\n", "study mine: arms = 3: must be a table"),
        ("settings = 3\n[arms.plain]\n", "study mine: settings = 3: must be a table"),
        ("flags = 3\n[arms.plain]\n", "study mine: flags = 3: must be a table"),
        ("[arms]\nplain = 3\n", "study mine, arm plain: is 3 and must be a table of settings"),
        ("", "study mine: has no arms"),
        ("[arms.other]\n", "study mine: baseline = plain: must be one of the arms other"),
        ("foo = 1\n[arms.plain]\n", "study mine: no setting 'foo'"),
        ("seeds = []\n[arms.plain]\n", "study mine: seeds = []: must be a list of at least 1"),
        ("seeds = [0, 0]\n[arms.plain]\n", "study mine: seeds = [0, 0]: contains a seed twice"),
        ("[arms.plain]\ngroup = 'new'\n", "study mine: arms.plain.group = new: must be one of 'core' or 'extended'"),
        ("[arms.plain]\nseed = 3\n", "study mine, arm plain: sets seed, which an arm cannot"),
        ("[arms.plain]\noptim.lrr = 3\n", "study mine, arm plain: no setting 'optim.lrr'; did you mean 'optim.lr'?"),
        ("[arms.plain]\noptim.lr = -3\n", "study mine, arm plain: optim.lr = -3: must be greater than 0"),
        ("[arms.plain]\n[arms.'../up']\n", "study mine: arm '../up': must consist of letters"),
        ("[arms.plain]\n[[questions]]\nid = 'Q'\n", "study mine: questions.0.claim is missing"),
        ("metric.better = 'up'\n[arms.plain]\n", "study mine: metric.better = up: must be one of 'lower' or 'higher'"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_study(write(tmp_path, BASE + text))
    assert str(error.value).startswith(sentence)


def test_a_study_needs_a_recipe_that_is_there(tmp_path: Path) -> None:
    for recipe, sentence in (("", "recipe is missing"), ('recipe = "shakespear-char"\n', "did you mean")):
        with pytest.raises(ConfigError, match=sentence):
            load_study(write(tmp_path, recipe + 'baseline = "a"\n[arms.a]\n'))
    with pytest.raises(ConfigError, match="no study 'precision-ml': did you mean 'precision-lm'?"):
        load_study("precision-ml")


@pytest.mark.parametrize("name", shipped("studies"))
def test_every_shipped_study_is_whole(name: str, tmp_path: Path) -> None:
    study = load_study(name)
    again = load_study(write(tmp_path, study.to_toml(), "study.toml"))
    assert again.questions == study.questions and again.metric == study.metric
    assert [again.build(arm, 5) for arm in study.arms] == [study.build(arm, 5) for arm in study.arms]
    assert study.name == name
    assert study.description
    assert study.arms[study.baseline].group == "core"
    for arm in study.arms:
        assert study.build(arm, 5).seed == 5
