"""The make front: settings to symbols and back, by gptlab's own reader and by Kconfig's tools."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import hypothesis
import kconfiglib
import pytest
from conftest import tiny_recipe
from hypothesis import example, given
from hypothesis import strategies as st

from gptlab import kconfig
from gptlab.cli import lift_settings
from gptlab.config import OPTIMIZER_NAMES, build_recipe, load_recipe, load_study, settings, shipped
from gptlab.rundir import RunDir

ROOT = Path(__file__).parent.parent
LINES_OF_SPAM = """\
CONFIG_SPAM_ENABLE_CLIP=y
CONFIG_SPAM_SPIKE_THRESHOLD="2.0"
CONFIG_SPAM_THETA="50.0"
CONFIG_SPAM_PERIODIC_RESET=y
CONFIG_SPAM_INTERVAL=1000
CONFIG_SPAM_WARMUP=y
CONFIG_SPAM_WARMUP_STEPS=100
"""


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = 0
    try:
        kconfig.main(words)
    except SystemExit as exit:
        status = int(exit.code or 0)
    return (status, *capsys.readouterr())


def by_kconfiglib(config: kconfig.Config) -> kconfiglib.Kconfig:
    """Kconfig's own reading of the Kconfig and .config that are written of this."""
    kconfig.CONFIG.write_text(config.to_text(), encoding="utf-8")
    loaded = kconfiglib.Kconfig(str(kconfig.write_kconfig(config)), suppress_traceback=True)
    loaded.load_config(str(kconfig.CONFIG))
    assert loaded.warnings == [] and loaded.missing_syms == []
    return loaded


# -- there and back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*shipped(), *shipped("studies")])
def test_what_is_shipped_comes_back_the_same(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "defconfig", name)[0] == 0
    config = kconfig.read()
    if name in shipped():
        assert (config.source, config.study) == (name, "")
        assert config.recipe == load_recipe(name)
    else:
        assert (config.source, config.study) == ("", name)
        assert config.recipe == build_recipe(load_study(name).recipe)
        assert config.command() == ["study", "run", name]

    # Kconfig's tools read it without a warning and write it as it was, to the byte
    written = kconfig.CONFIG.read_text(encoding="utf-8")
    loaded = by_kconfiglib(config)
    loaded.write_config("saved", header="")
    assert Path("saved").read_text(encoding="utf-8") == written
    assert kconfig.read(Path("saved")) == config
    # and the defaults of the Kconfig are what the .config began with
    Path("empty").write_text("", encoding="utf-8")
    loaded.load_config("empty")
    loaded.write_config("defaults", header="")
    assert Path("defaults").read_text(encoding="utf-8") == written


def test_every_setting_is_one_symbol_and_every_symbol_a_setting() -> None:
    assert [setting.name for setting in kconfig.all_settings()] == [name for name, _ in settings()]
    kinds = {setting.symbol: setting.kind for setting in kconfig.all_settings()}
    assert len(kinds) == len(kconfig.all_settings())
    wanted = {
        "SEED": "int",
        "NAME": "string",
        "TASK": "choice",
        "OPTIM_LR": "string",
        "OPTIM_BETAS": "string",
        "OPTIM_NAME": "choice",
        "MODEL_BIAS": "bool",
        "MODEL_N_LAYER": "int",
        "BATCH_MICRO_BATCH": "int",
        "COMPILE_ENABLED": "choice",
        "DATA_MIXTURE": "string",
        "SPAM_SPIKE_THRESHOLD": "string",
        "SPAM_INTERVAL": "int",
    }
    assert {symbol: kinds[symbol] for symbol in wanted} == wanted
    table = kconfig.symbols()
    assert table["OPTIM_NAME_ADAMW_SPAM"][1] == "adamw-spam"
    assert table["SPARSITY_METHOD_2_4"][1] == "2:4"
    # -1 says auto, so it must not be a value
    for setting in kconfig.all_settings():
        if setting.kind == "int" and setting.choices:
            assert setting.choices == ("auto",) and setting.low >= 0
    loaded = by_kconfiglib(kconfig.start("smoke-lm"))
    assert set(loaded.syms) - set(loaded.const_syms) >= set(table)
    assert {symbol.name for symbol in loaded.unique_defined_syms} == {*table, "RECIPE", "STUDY"}


def test_the_kconfig_has_bounds_types_and_help() -> None:
    loaded = by_kconfiglib(kconfig.start("smoke-lm"))
    heads = loaded.syms["MODEL_N_HEAD"]
    assert heads.nodes[0].prompt[0] == "model.n_head"
    assert heads.nodes[0].help == "Attention heads; must divide n_embd."
    assert [int(bound.str_value) for bound in heads.ranges[0][:2]] == [1, 2**63 - 1]
    assert loaded.syms["SEED"].ranges == []
    choice = loaded.syms["OPTIM_NAME_MUON"].choice
    assert [symbol.nodes[0].prompt[0] for symbol in choice.syms] == OPTIMIZER_NAMES
    assert "Muon for the blocks' matrices" in choice.nodes[0].help
    menus = [node.prompt[0] for node in loaded.node_iter() if node.item is kconfiglib.MENU]
    assert "model: Shape and parts of the network" in menus and "compile: torch.compile" in menus


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)


@hypothesis.settings(max_examples=20, deadline=None)
@given(texts, texts)
@example('a "quoted" \\ \n\r line \\n', "$(shell,false) $HOME #")
def test_any_text_survives(prompt: str, description: str) -> None:
    base = load_recipe("smoke-lm")
    recipe = base.replace({"sample.prompt": prompt, "description": description})
    loaded = by_kconfiglib(kconfig.Config("", "smoke-lm", base, recipe))
    assert kconfig.read().recipe == recipe
    loaded.write_config("saved", header="")
    assert kconfig.read(Path("saved")).recipe == recipe
    # as the defaults of a Kconfig, where $(...) is a macro; $NAME is kconfiglib's own, of old, and cannot be escaped
    recipe = recipe.replace(
        {k: re.sub(r"\$(?!\()", "", v) for k, v in (("sample.prompt", prompt), ("description", description))}
    )
    loaded = by_kconfiglib(kconfig.Config("", "smoke-lm", recipe, recipe))
    Path("empty").write_text("", encoding="utf-8")
    loaded.load_config("empty")
    loaded.write_config("saved", header="")
    assert kconfig.read(Path("saved")).recipe == recipe


@hypothesis.settings(max_examples=25, deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "optim.lr": st.floats(min_value=0, exclude_min=True, allow_infinity=False),
            "optim.betas": st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2),
            "data.mixture": st.dictionaries(st.text("ab/\"' $\\=}#é", max_size=5), st.floats(1e-9, 1e9), max_size=3),
            "batch.micro_batch": st.one_of(st.just("auto"), st.integers(1, 16)),
            "compile.enabled": st.sampled_from([True, False, "auto"]),
            "optim.spam_theta": st.one_of(st.just("auto"), st.floats(1e-9, 1e9)),
            "optim.spam_warmup_steps": st.one_of(st.just("auto"), st.integers(0, 2**62)),
            "sample.seed": st.integers(-(2**62), 2**62),
            "schedule.min_lr": st.just(0.0),
        }
    )
)
def test_any_value_survives(values: dict) -> None:
    base = load_recipe("smoke-lm")
    config = kconfig.Config("", "smoke-lm", base, base.replace(values))
    by_kconfiglib(config).write_config("saved", header="")
    assert kconfig.read(Path("saved")) == kconfig.read() == config
    # as flags of a study they are the same values
    study = kconfig.Config("architecture-smoke", "", base, config.recipe)
    _, flags = lift_settings(study.command())
    assert base.replace(flags) == config.recipe


# -- a .config by hand ----------------------------------------------------------------------------------------------


def test_the_published_lines_are_read_and_written() -> None:
    kconfig.CONFIG.write_text(
        'CONFIG_RECIPE="smoke-lm"\nCONFIG_OPTIM_NAME_ADAMW_SPAM=y\n' + LINES_OF_SPAM, encoding="utf-8"
    )
    config = kconfig.read()
    spam = {"name": "adamw-spam", "spam_spike_threshold": 2.0, "spam_theta": 50.0, "spam_interval": 1000}
    spam["spam_warmup_steps"] = 100
    assert config.recipe == load_recipe("smoke-lm", {f"optim.{key}": value for key, value in spam.items()})
    for name in ("gpt2-shakespeare-l4", "gpt2-shakespeare-w7900"):  # they say the published values
        lines = kconfig.start(name).to_text().splitlines()
        assert set(LINES_OF_SPAM.splitlines()) <= set(lines)
        assert "CONFIG_OPTIM_NAME_ADAMW_SPAM=y" in lines


def test_the_two_cards_train_the_same() -> None:
    l4, w7900 = (load_recipe(f"gpt2-shakespeare-{card}") for card in ("l4", "w7900"))
    own = {"name": "x", "description": "", "batch.micro_batch": 1}
    assert l4.replace(own) == w7900.replace(own)
    assert (l4.batch.micro_batch, w7900.batch.micro_batch) == (16, 32)


def test_what_is_left_out_is_the_recipes_and_the_last_word_counts() -> None:
    kconfig.CONFIG.write_text(
        "# by hand\nCONFIG_RECIPE=smoke-lm\nCONFIG_OPTIM_LR=3e-3\n# CONFIG_MODEL_TIED is not set\n\n"
        "CONFIG_MODEL_BIAS=n\nCONFIG_OPTIM_NAME_SGD=y\nCONFIG_OPTIM_NAME_MUON=y\n# CONFIG_OPTIM_NAME_SGD is not set\n"
        "CONFIG_SEED=1\nCONFIG_SEED=3\n",
        encoding="utf-8",
    )
    changes = {"optim.lr": 3e-3, "model.tied": False, "model.bias": False, "optim.name": "muon", "seed": 3}
    assert kconfig.read().recipe == load_recipe("smoke-lm", changes)


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ("CONFIG_OPTIM_LRR=1", ".config, line 2: no symbol 'CONFIG_OPTIM_LRR'; did you mean 'CONFIG_OPTIM_LR'?"),
        ("# CONFIG_MODEL_TIE is not set", "no symbol 'CONFIG_MODEL_TIE'; did you mean 'CONFIG_MODEL_TIED'?"),
        ("CONFIG_ZZZZ=y", ".config, line 2: no symbol 'CONFIG_ZZZZ'"),
        ("OPTIM_LR=1", ".config, line 2: 'OPTIM_LR=1' is not of the form CONFIG_NAME=value"),
        ("CONFIG_MODEL_BIAS=maybe", ".config, line 2: CONFIG_MODEL_BIAS=maybe: must be y or n"),
        ("CONFIG_OPTIM_LR=-1", "optim.lr = -1: must be greater than 0"),
        ("CONFIG_OPTIM_LR=fast", "optim.lr = fast: must be a number"),
        ("CONFIG_MODEL_N_HEAD=-1", "model.n_head = -1: must be at least 1"),
        ("CONFIG_SPAM_INTERVAL=0", "optim.spam_interval = 0: must be at least 1"),
        ("CONFIG_BATCH_TOKENS_PER_STEP=100", "must be a multiple of model.block_size = 32"),
        ('CONFIG_STUDY="sizes"', "either CONFIG_RECIPE or CONFIG_STUDY must be set"),
        ('CONFIG_RECIPE=""', "either CONFIG_RECIPE or CONFIG_STUDY must be set"),
        ('CONFIG_RECIPE="smoke-ml"', "no recipe 'smoke-ml': did you mean 'smoke-lm'?"),
        ('CONFIG_RECIPE=""\nCONFIG_STUDY="size"', "no study 'size': did you mean 'sizes'?"),
        (
            'CONFIG_RECIPE=""\nCONFIG_STUDY="sizes"\nCONFIG_SEED=3',
            "sets seed, which only the study sizes can set",
        ),
    ],
)
def test_what_is_wrong_is_said(lines: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    kconfig.CONFIG.write_text(f'CONFIG_RECIPE="smoke-lm"\n{lines}\n', encoding="utf-8")
    for verb in ("run", "test-matrix", "menuconfig", "write"):
        status, _, err = call(capsys, verb)
        assert status == 2
        assert err.startswith("gptlab: ") and err.count("\n") == 1 and sentence in err


# -- commands -------------------------------------------------------------------------------------------------------


def test_defconfig(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = call(capsys, "defconfig", "gpt2-shakespeare-l5")
    assert (status, "did you mean 'gpt2-shakespeare-l4'?" in err, kconfig.CONFIG.exists()) == (2, True, False)
    assert call(capsys, "run")[0] == 2  # there is none
    _, out, _ = call(capsys, "defconfig", "gpt2-shakespeare-l4")
    assert "replaced" not in out and "recipe gpt2-shakespeare-l4" in out
    _, out, _ = call(capsys, "defconfig", "architecture-smoke")
    assert ".config was replaced and holds" in out and "study architecture-smoke: `make test-matrix`" in out
    before = kconfig.CONFIG.read_bytes()
    assert call(capsys, "defconfig", "nothing-of-the-kind")[0] == 2
    assert kconfig.CONFIG.read_bytes() == before


def test_names_are_one_thing_each() -> None:
    names = [*shipped(), *shipped("studies"), *kconfig.ALIASES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("alias", list(kconfig.ALIASES))
def test_published_names(alias: str) -> None:
    study = kconfig.ALIASES[alias]
    if study not in shipped("studies"):
        pytest.skip(f"study {study} is not shipped")
    config = kconfig.start(alias)
    assert (config.study, config.command()) == (study, ["study", "run", study])


def test_a_study_takes_what_differs_as_flags() -> None:
    kconfig.CONFIG.write_text(
        kconfig.start("architecture-smoke").to_text() + "CONFIG_TRAIN_MAX_STEPS=7\n", encoding="utf-8"
    )
    command = kconfig.read().command()
    assert command == ["study", "run", "architecture-smoke", "--train.max_steps=7"]
    study = load_study(command[2], lift_settings(command)[1])
    assert {study.build(arm, 0).train.max_steps for arm in study.arms} == {7}


def test_menuconfig_wants_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    call(capsys, "defconfig", "smoke-lm")
    status, _, err = call(capsys, "menuconfig")
    assert (status, err) == (2, "gptlab: menuconfig needs a terminal\n")


def test_test_matrix_wants_a_study(capsys: pytest.CaptureFixture[str]) -> None:
    call(capsys, "defconfig", "smoke-lm")
    status, _, err = call(capsys, "test-matrix")
    assert status == 2 and "smoke-lm" in err
    named = re.search("make defconfig-([^`]+)`", err)[1]
    assert named in kconfig.ALIASES or named in shipped("studies")


def make(*words: str) -> subprocess.CompletedProcess[str]:
    """make with the repository's Makefile, here, without installing anything."""
    command = [
        "make",
        "-f",
        ROOT / "Makefile",
        "-o",
        "install",
        "-o",
        "install-demo",
        f"BIN={Path(sys.executable).parent}",
        *words,
    ]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_run_trains_the_resolved_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(kconfig.os, "execv", lambda program, words: ran.append(words[1:]))
    kconfig.main(["defconfig", "shakespeare-char-cpu"])
    kconfig.main(["run"])
    assert ran.pop() == ["-m", "gptlab", "train", ".kconfig/recipe.toml"]
    assert load_recipe(".kconfig/recipe.toml") == load_recipe("shakespeare-char-cpu")
    kconfig.main(["defconfig", "architecture-smoke"])
    for verb in ("run", "test-matrix"):
        kconfig.main([verb])
        assert ran.pop() == ["-m", "gptlab", "study", "run", "architecture-smoke"]


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@needs_make
def test_make_alone_is_help_until_there_is_a_config() -> None:
    told = make()
    assert told.returncode == 0 and "make defconfig-NAME" in told.stdout and "make demo" in told.stdout
    wrong = make("defconfig-smoke-ml")
    assert wrong.returncode == 2 and "did you mean 'smoke-lm'?" in wrong.stderr and not kconfig.CONFIG.exists()
    assert make("defconfig-smoke-lm").returncode == 0
    assert "kconfig run" in make("-n").stdout
    assert "make demo" in make("help").stdout
    assert "pytest" in make("-n", "test").stdout and "kconfig" not in make("-n", "test").stdout


@pytest.mark.slow
@needs_make
def test_make_trains(dataset: Path) -> None:
    tiny = tiny_recipe(dataset, train__max_steps=3)
    kconfig.CONFIG.write_text(kconfig.Config("", "smoke-lm", load_recipe("smoke-lm"), tiny).to_text(), encoding="utf-8")
    done = make()
    assert done.returncode == 0, done.stderr
    assert "completed after 3 steps" in done.stdout and "run: runs/tiny_seed1337" in done.stdout
    assert RunDir(Path("runs/tiny_seed1337")).read_recipe().optim == tiny.optim
    kconfig.CONFIG.write_text(
        kconfig.CONFIG.read_text(encoding="utf-8") + "CONFIG_OPTIM_LR=1\n", encoding="utf-8"
    )  # another one in the same folder
    wrong = make()
    assert wrong.returncode == 2 and "optim.lr" in wrong.stderr


@pytest.mark.slow
@needs_make
def test_make_test_matrix(dataset: Path) -> None:
    Path("pair.toml").write_text(
        'recipe = "smoke-lm"\nseeds = [1]\nbaseline = "adamw"\n[arms.adamw]\n[arms.muon]\noptim.name = "muon"\n',
        encoding="utf-8",
    )
    kconfig.CONFIG.write_text(
        f'CONFIG_STUDY="pair.toml"\nCONFIG_TRAIN_MAX_STEPS=3\nCONFIG_DATA_PATH="{dataset}"\n'
        f'CONFIG_DATA_TOKENIZER="char"\n',
        encoding="utf-8",
    )
    done = make("test-matrix")
    assert done.returncode == 0, done.stderr + done.stdout
    summaries = {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in Path("results/pair").glob("*_seed1.json")
    }
    assert {name: summary["steps"] for name, summary in summaries.items()} == {"adamw_seed1": 3, "muon_seed1": 3}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux, for a terminal")
def test_menuconfig_saves_what_is_chosen() -> None:
    kconfig.CONFIG.write_text(
        f'CONFIG_RECIPE="smoke-lm"\nCONFIG_OPTIM_NAME_ADAMW_SPAM=y\n{LINES_OF_SPAM}', encoding="utf-8"
    )
    before = kconfig.read()
    screen = ["tmux", "-L", f"gptlab-{os.getpid()}"]
    menu = f"{sys.executable} -m gptlab.kconfig menuconfig; echo $? > status"
    subprocess.run([*screen, "new-session", "-d", "-x", "100", "-y", "40", menu], check=True)
    try:
        for keys in (
            ["Down", "Down"],
            ["Down", "Enter"],
            ["BSpace"] * 4,
            ["7", "Enter"],
            ["s"],
            ["Enter"],
            ["Escape"],
            ["q"],
        ):
            time.sleep(1.5)
            subprocess.run([*screen, "send-keys", *keys], check=True)
        for _ in range(40):
            if Path("status").exists():
                break
            time.sleep(0.25)
        assert Path("status").read_text(encoding="utf-8").strip() == "0"
    finally:
        subprocess.run([*screen, "kill-server"], capture_output=True)
    assert kconfig.read().recipe == before.recipe.replace({"seed": 7})
