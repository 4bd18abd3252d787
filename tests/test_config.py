"""Settings: merged in order, validated once, and refused in sentences."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from gptlab.cli import lift_settings
from gptlab.cli.train import common_flags, every_flag, settings_help
from gptlab.config import (
    OPTIMIZER_NAMES,
    build_recipe,
    flag_sections,
    load_recipe,
    may_change,
    may_differ,
    parse_flag,
    read_layer,
    settings,
    unknown_setting,
)
from gptlab.errors import ConfigError


def test_later_layers_win_and_a_preset_holds_within_its_own_layer() -> None:
    file = {"model": {"preset": "gpt2", "n_layer": 3}, "train": {"max_steps": 5}}
    assert build_recipe(file).model.n_layer == 3  # explicit beside a preset
    assert build_recipe(file).model.n_embd == 768
    bigger = build_recipe(file, {"model.preset": "gpt2-medium"})  # a preset over explicit values of an earlier layer
    assert (bigger.model.n_layer, bigger.model.n_head, bigger.model.n_embd) == (24, 16, 1024)
    assert build_recipe(file, {"model.preset": "gpt2-medium"}, {"model.n_layer": 2}).model.n_layer == 2
    assert build_recipe(file, {"optim": {"lr": 1e-3}}, {"optim.eps": 1e-6}).optim.lr == 1e-3  # sections merge


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ({"optim.lr": -1}, "optim.lr = -1: must be greater than 0"),
        ({"optim.lrr": 1}, "no setting 'optim.lrr'; did you mean 'optim.lr'?"),
        ({"train.lr": 1}, "no setting 'train.lr'; did you mean 'optim.lr'?"),
        ({"optim.lr": float("nan")}, "optim.lr = nan: must be a finite number"),
        ({"optim.lr": float("inf")}, "optim.lr = inf: must be a finite number"),
        ({"optim.betas": [0.9, 1.0]}, "optim.betas = 1.0: must be less than 1"),
        ({"model.bias": 1}, "model.bias = 1: must be true or false"),
        ({"model.bias": "yes"}, "model.bias = yes: must be true or false"),
        ({"train.max_steps": True}, "train.max_steps = True: must be a whole number"),
        ({"train.max_steps": 2.5}, "train.max_steps = 2.5: must be a whole number"),
        ({"compile.enabled": "maybe"}, "compile.enabled = maybe: must be true or false or 'auto'"),
        ({"batch.micro_batch": 0}, "batch.micro_batch = 0: must be at least 1 or 'auto'"),
        ({"model.position": "alibi"}, "model.position = alibi: must be one of 'learned' or 'rope'"),
        ({"model.preset": "gpt3"}, "model.preset = 'gpt3': must be one of nano, micro"),
        ({"model": 3}, "model = 3: must be a section of settings"),
        ({"model.n_head": 5}, "model.n_embd = 48: must be divisible by model.n_head = 5"),
        ({"batch.tokens_per_step": 1000}, "batch.tokens_per_step = 1000: must be a multiple of model.block_size = 64"),
        ({"batch.micro_batch": 5}, "batch.micro_batch = 5: must not exceed the 4 sequences of a step"),
        ({"schedule.min_lr": 1.0}, "schedule.min_lr = 1.0: must not exceed optim.lr"),
        ({"train.max_steps": 0}, "the run has no end: set train.max_steps, train.max_tokens or train.max_epochs"),
        ({"data.path": "a", "data.mixture": {"b": 1.0}}, "data.path and data.mixture are both set"),
        ({"data.mixture": {"b": 0.0}}, "data.mixture = 0.0: must be greater than 0"),
        ({"optim.rounding": "kahan"}, "optim.rounding = kahan: works only with precision.regime = bf16_pure, not fp32"),
        ({"task": "classify"}, "model.mlp = gelu: must be gelu_erf where task = classify"),
    ],
)
def test_what_is_wrong_is_one_sentence(override: dict, sentence: str) -> None:
    base = {"model": {"preset": "nano", "block_size": 64}, "batch": {"tokens_per_step": 256}, "train": {"max_steps": 1}}
    with pytest.raises(ConfigError) as error:
        build_recipe(base, override)
    assert str(error.value).startswith(sentence)
    assert "\n" not in str(error.value)
    assert "pydantic" not in str(error.value)


def test_several_mistakes_are_a_line_each() -> None:
    with pytest.raises(ConfigError) as error:
        build_recipe({"optim": {"lr": -1}, "modl": {}, "train": {"max_steps": 1}})
    assert sorted(str(error.value).splitlines()) == ["no setting 'modl'", "optim.lr = -1: must be greater than 0"]


def test_flags_are_read_by_the_type_of_their_setting() -> None:
    assert parse_flag("optim.lr", "3e-4") == 3e-4
    assert parse_flag("train.max_steps", "1_000") == 1000
    assert build_recipe({}, {"train.max_tokens": parse_flag("train.max_tokens", "1e10")}).train.max_tokens == 10**10
    assert parse_flag("data.path", "123") == "123"  # a folder of that name, not a number
    assert parse_flag("data.path", "true") == "true"
    assert parse_flag("batch.micro_batch", "auto") == "auto"
    assert parse_flag("batch.micro_batch", "8") == 8
    assert parse_flag("compile.enabled", "false") is False
    assert parse_flag("optim.betas", "[0.8, 0.9]") == [0.8, 0.9]
    assert parse_flag("data.mixture", '{"data/a" = 0.5}') == {"data/a": 0.5}


def test_settings_are_lifted_out_of_a_command_line() -> None:
    words = [
        "train",
        "r",
        "--optim.lr",
        "-3",
        "--train.max-steps=5",
        "--seed",
        "1",
        "--sample.prompt",
        "--x",
        "--out",
        "a.b",
    ]
    left, lifted = lift_settings(words)
    assert left == ["train", "r", "--seed", "1", "--out", "a.b"]
    assert lifted == {"optim.lr": -3, "train.max_steps": 5, "sample.prompt": "--x"}
    with pytest.raises(ConfigError, match=r"--optim.lr needs a value"):
        lift_settings(["train", "r", "--optim.lr"])
    with pytest.raises(ConfigError, match=r"--optim.lr needs a value"):
        lift_settings(["train", "--optim.lr", "--train.max-steps", "5"])


def test_a_recipe_file_repeats_itself() -> None:
    recipe = load_recipe("shakespeare-char-cpu", {"optim.lr": "1e-3", "data.tokenizer": "byte"})
    again = build_recipe(tomllib.loads(recipe.to_toml()))
    assert again == recipe


def test_no_recipe_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no recipe 'shakespeare-chr'.*did you mean 'shakespeare-char'"):
        read_layer("shakespeare-chr")
    broken = tmp_path / "broken.toml"
    broken.write_text("model = [", encoding="utf-8")
    with pytest.raises(ConfigError, match="is not a TOML file"):
        read_layer(broken)


def test_every_setting_says_what_it_is() -> None:
    for name, field in settings():
        assert field.description, name


ALWAYS = {
    "name",
    "description",
    "data.path",
    "train.max_steps",
    "train.max_tokens",
    "train.max_epochs",
    "train.eval_every",
    "train.price_per_hour",
    "hellaswag.every",
    "hellaswag.path",
    "hellaswag.definition",
    "checkpoint.every",
    "checkpoint.keep_last",
    "checkpoint.keep_best",
    "checkpoint.at",
    "distributed.strategy",
    "distributed.shard_over",
    "sample.every",
    "sample.number",
    "sample.prompt",
    "sample.max_tokens",
    "sample.temperature",
    "sample.top_k",
    "sample.top_p",
    "sample.seed",
    "log.every",
    "log.to",
    "log.project",
    "log.entity",
    "log.tags",
    "log.group",
}


def test_what_a_resumed_run_and_a_study_may_change() -> None:
    names = [name for name, _ in settings()]
    on_resume = {"batch.micro_batch", "train.activation_checkpointing", "train.attention"}
    on_resume |= {"compile.enabled", "compile.mode"}
    assert {name for name in names if may_change(name)} == ALWAYS | on_resume
    assert {name for name in names if may_differ(name)} == ALWAYS | {"seed"}


def test_the_documentation_says_what_may_change() -> None:
    printed = subprocess.run([sys.executable, "-m", "gptlab.config"], capture_output=True, text=True, check=True).stdout
    assert printed in (Path(__file__).parents[1] / "docs/recipes.md").read_text(encoding="utf-8")


def test_help_says_what_may_be_typed() -> None:
    rows = [row for _, rows in flag_sections().values() for row in rows]
    assert [row.name for row in rows if row.name != "model.preset"] == [name for name, _ in settings()]
    accepts = {row.flag: row.accepts for row in rows}
    assert accepts["--optim.name"] == "|".join(OPTIMIZER_NAMES)
    assert accepts["--batch.micro-batch"] == "N|auto"
    assert accepts["--compile.enabled"] == "true|false|auto"
    assert accepts["--optim.lr"] == "X"
    assert accepts["--data.path"] == "TEXT"
    for row in rows:
        for value in (*row.choices, *([row.default] if row.name != "model.preset" else [])):
            try:
                build_recipe({"train.max_steps": 1}, {row.name: value})
            except ConfigError as error:  # another setting may forbid it
                assert "must be one of" not in str(error)
    for width in (60, 80, 100, 120):
        page = settings_help(every_flag(), width).splitlines()
        assert max(map(len, page)) <= width
        assert len(page) > len(rows)
        assert ("  --model.position learned|rope     Position embeddings" in "\n".join(page)) == (width >= 100)


def test_the_short_help_has_settings_that_exist() -> None:
    assert set(common_flags()) <= set(every_flag()) and 25 <= len(common_flags()) <= 40


def test_a_setting_without_a_section_is_not_a_flag() -> None:
    assert str(unknown_setting("task")) == "no flag '--task'; did you mean a line 'task = ...' in the recipe file?"


def test_limits_take_the_first() -> None:
    recipe = build_recipe(
        {"model": {"block_size": 64}, "batch": {"tokens_per_step": 640}, "train": {"max_tokens": 6500, "max_epochs": 1}}
    )
    assert recipe.step_limit(train_tokens=10**6) == 11  # 10 steps are 6,400 tokens
    assert recipe.step_limit(train_tokens=1280) == 2
    assert recipe.replace({"train.max_steps": 1}).step_limit(1280) == 1
    assert recipe.replace({"train.eval_only": True}).step_limit(1280) == 0
