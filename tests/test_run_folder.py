"""The folder of a run without --out: another one for each setting that makes another run."""

from pathlib import Path
from typing import Any

import pytest

from gptlab.config import build_recipe, load_recipe, read_layer, run_folder
from gptlab.config.folder import _written

NAME = "shakespeare-char-cpu"


def folder(flags: dict[str, Any], named: str = NAME) -> str:
    layer = read_layer(named)
    return str(run_folder(build_recipe(layer, flags), named, layer, flags))


@pytest.mark.parametrize(
    "flags, name",
    [
        ({}, ""),
        ({"optim.lr": 3e-4}, "+lr=3e-4"),
        ({"optim.lr": 1e-3}, ""),  # what the recipe says
        ({"optim.betas": [0.9, 0.95]}, "+betas=0.9,0.95"),
        ({"model.bias": True}, "+bias=true"),
        ({"optim.name": "muon"}, "+optim.name=muon"),
        ({"optim.lr": 3e-4, "model.n_layer": 2}, "+n_layer=2+lr=3e-4"),
        ({"model.n_layer": 2, "optim.lr": 3e-4}, "+n_layer=2+lr=3e-4"),
        ({"model.preset": "gpt2"}, "+preset=gpt2"),
        ({"train.max_steps": 3, "train.eval_every": 1, "data.path": "x", "log.every": 1}, ""),
    ],
)
def test_the_name_says_what_makes_another_run(flags: dict[str, Any], name: str) -> None:
    assert folder(flags) == f"runs/{NAME}{name}_seed1337"


def test_long_and_awkward_values_are_named_by_a_hash() -> None:
    names = {folder({"train.init_from": text}) for text in ("../a", "../b", "a/b", "a" * 99)}
    assert len(names) == 4
    assert all(len(Path(name).parts) == 2 and len(name) < 60 for name in names)


@pytest.mark.parametrize(
    "value, text",
    [(0.0003, "3e-4"), (0.00035, "0.00035"), (1e-30, "1e-30"), (0.95, "0.95"), (0.1, "0.1"), (1.0, "1"), (20.0, "20")],
)
def test_numbers_are_short_and_exact(value: float, text: str) -> None:
    assert _written(value) == text
    assert float(text) == value


def test_a_run_directory_means_itself_and_a_change_of_it_a_folder_beside_it(tmp_path: Path) -> None:
    run = tmp_path / "mine+lr=3e-4_seed5"
    run.mkdir()
    (run / "recipe.toml").write_text(load_recipe(NAME, {"optim.lr": "3e-4", "seed": 5}).to_toml())
    layer = read_layer(run / "recipe.toml")

    def found(flags: dict[str, Any]) -> Path:
        return run_folder(build_recipe(layer, flags), run, layer, flags)

    assert found({}) == run
    assert found({"optim.weight_decay": 0.5}) == tmp_path / "mine+lr=3e-4+weight_decay=0.5_seed5"
    assert found({"seed": 6}) == tmp_path / "mine+lr=3e-4_seed6"


def test_the_recipe_of_a_run_keeps_the_changes_in_its_name(tmp_path: Path) -> None:
    for run, name in ((f"{NAME}+lr=3e-4_seed5", f"{NAME}+lr=3e-4"), ("first", NAME)):
        (tmp_path / run).mkdir()
        (file := tmp_path / run / "recipe.toml").write_text(load_recipe(NAME, {"optim.lr": "3e-4"}).to_toml())
        assert run_folder(load_recipe(file), file, read_layer(file), {}) == Path(f"runs/{name}_seed1337")
