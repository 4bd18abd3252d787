"""Factorial studies: which arms they have, what is refused, and that a study's own file reads back as it was."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from gptlab.config import Study, load_study
from gptlab.config.factors import GENERATORS, two_level_design
from gptlab.errors import ConfigError

BASE = 'recipe = "shakespeare-char-cpu"\n'
ROPE = '[factors.rope]\nmodel.position = "rope"\n'
LR = "[factors.lr]\noptim.lr = 3e-3\nschedule.min_lr = 3e-4\n"
NORM = '[factors.norm]\nmodel.norm = "rmsnorm"\n'
MLP = '[factors.mlp]\nnote = "gated"\nmodel.mlp = "swiglu"\n'


def load(folder: Path, text: str) -> Study:
    (folder / "mine.toml").write_text(BASE + text, encoding="utf-8")
    return load_study(folder / "mine.toml")


def test_all_combinations_are_the_arms_and_build_on_one_another(tmp_path: Path) -> None:
    study = load(tmp_path, ROPE + LR)
    assert list(study.arms) == ["none", "rope", "lr", "rope+lr"] and study.baseline == "none"
    built = {arm: study.build(arm, 0) for arm in study.arms}
    assert [(r.model.position, r.optim.lr, r.schedule.min_lr) for r in built.values()] == [
        ("learned", 1e-3, 1e-4),
        ("rope", 1e-3, 1e-4),
        ("learned", 3e-3, 3e-4),
        ("rope", 3e-3, 3e-4),
    ]
    assert {arm.group for arm in study.arms.values()} == {"core"}
    assert next(iter(load(tmp_path, 'baseline = "classic"\n' + ROPE + LR).arms)) == "classic"


def test_a_fraction_is_the_combinations_of_its_generator(tmp_path: Path) -> None:
    study = load(tmp_path, "fraction = 2\n" + ROPE + LR + NORM + MLP)
    even = ["none", "rope+mlp", "lr+mlp", "rope+lr", "norm+mlp", "rope+norm", "lr+norm", "rope+lr+norm+mlp"]
    assert list(study.arms) == even  # D = ABC: an even number of the four is on


@pytest.mark.parametrize(("k", "fraction"), GENERATORS)
def test_fractions_have_the_published_resolution_and_are_balanced(k: int, fraction: int) -> None:
    """Resolutions of NIST's table 5.3.3.4.7, from the arms themselves: the shortest product of factors that is
    constant over all arms."""
    names = "ABCDEFGH"[:k]
    arms = two_level_design(names, fraction)
    assert len(set(arms)) == len(arms) == 2**k // fraction and arms[0] == ()
    levels = np.array([[1 if name in on else -1 for name in names] for on in arms])
    assert (levels.sum(axis=0) == 0).all()
    words = [
        size
        for size in range(1, k + 1)
        for subset in itertools.combinations(range(k), size)
        if abs(levels[:, subset].prod(axis=1).sum()) == len(arms)
    ]
    resolution = {(4, 2): 4, (5, 2): 5, (6, 4): 4, (7, 4): 4, (7, 8): 4, (8, 4): 5, (8, 8): 4, (8, 16): 4}
    assert min(words) == resolution.get((k, fraction), k)
    assert len(words) == fraction - 1


def test_the_studys_own_file_reads_back_the_same_and_expands_nothing_twice(tmp_path: Path) -> None:
    study = load(tmp_path, 'baseline = "classic"\nfraction = 2\n' + ROPE + LR + NORM + MLP)
    (tmp_path / "study.toml").write_text(study.to_toml(), encoding="utf-8")
    again = load_study(tmp_path / "study.toml")
    assert again.to_toml() == study.to_toml() and list(again.arms) == list(study.arms)
    assert again.factors == study.factors and (again.fraction, again.factors["mlp"].note) == (2, "gated")
    assert [again.build(arm, 3) for arm in again.arms] == [study.build(arm, 3) for arm in study.arms]


def test_a_study_with_the_arms_of_a_factorial_has_its_factors(tmp_path: Path) -> None:
    load(tmp_path, "fraction = 2\n" + ROPE + LR + NORM + MLP)
    (tmp_path / "other.toml").write_text(f'arms_of = "{tmp_path}/mine.toml"\nrecipe = "shakespeare-char"\n')
    study = load_study(tmp_path / "other.toml")
    assert (len(study.arms), list(study.factors), study.baseline) == (8, ["rope", "lr", "norm", "mlp"], "none")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (ROPE, "study mine: [factors] has 1: a factorial needs 2 to 8 factors"),
        (ROPE + "[factors.empty]\n", "study mine, factor empty: has no settings"),
        ("[factors]\nlr = 3\n" + ROPE, "study mine, factor lr: is 3 and must be a table of settings"),
        (ROPE + "[factors.lr]\nseed = 3\n", "study mine, factor lr: sets seed, which an arm cannot"),
        (ROPE + "[factors.lr]\noptim.lrr = 3\n", "study mine, factor lr: no setting 'optim.lrr'"),
        (ROPE + "[factors.lr]\noptim.lr = 1e-3\n", "study mine, factor lr: changes nothing"),
        (ROPE + '[factors."a+b"]\noptim.lr = 2e-3\n', "study mine: factor 'a+b': must consist of"),
        (LR + "[factors.low]\noptim.lr = 2e-3\n", "study mine: the factors lr and low both set optim.lr"),
        ("fraction = 2\n" + ROPE + LR + NORM, "study mine: fraction = 2: must be 1 for 3 factors; others would mix"),
        ("fraction = 4\n" + ROPE + LR + NORM + MLP, "study mine: fraction = 4: must be 1 or 2 for 4 factors"),
        ('baseline = "rope"\n' + ROPE + LR, "study mine: baseline = rope: of a factorial, it names the arm with"),
        (ROPE + LR + "[arms.muon]\n", "study mine: arm muon: a study with [factors] makes its own arms"),
        (ROPE + LR + "[arms.rope]\noptim.lr = 2e-3\n", "study mine: arm rope: a study with [factors] makes its own"),
        ('baseline = "a"\nfraction = 2\n[arms.a]\n', "study mine: fraction = 2: needs [factors.NAME] tables"),
        ("factors = 3\n", "study mine: factors = 3: must be a table"),
    ],
)
def test_what_is_wrong_with_factors_is_said_in_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text)
    assert str(error.value).startswith(sentence)
