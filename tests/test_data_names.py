"""Where a dataset goes, and what a run says it was made of."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from conftest import text_of, tiny_recipe

from gptlab import cli
from gptlab.config import Data
from gptlab.data.manifest import missing_dataset, read_manifest
from gptlab.data.prepare import prepare
from gptlab.data.tokenizers import make_tokenizer
from gptlab.errors import ConfigError, DataError, RunError
from gptlab.planning.resolve import resolve_recipe
from gptlab.report.card import card
from gptlab.rundir import RunDir
from gptlab.training.loop import train

# -- the default folder ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("corpus", "tokenizer", "made"),
    [
        ("../other/t", "byte", "t-byte"),
        ("../other/t/", "byte", "t-byte"),
        ("../other/t/a b.txt", "byte", "a b.txt-byte"),
        ("../other/t/../t/.", "byte", "t-byte"),
        ("{tmp}/other/t", "byte", "t-byte"),
        (".", "byte", "here-byte"),
        ("..", "byte", "{base}-byte"),
        ("ünï", "byte", "ünï-byte"),
        ("../other/t", "../.own/mine.json", "t-mine"),
        ("../other/t", "{tmp}/.own/mine.json", "t-mine"),
        ("../.own/rows.jsonl", "../.own/model", "rows.jsonl-model"),
        ("../.own/rows.jsonl", "../.own/model/", "rows.jsonl-model"),
    ],
)
def test_a_path_is_prepared_within_data_and_found_there(
    corpus: str, tokenizer: str, made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("here/ünï", "other/t", ".own/model"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("here/ünï/a.txt", "other/t/a b.txt"):
        (tmp_path / name).write_text("To be, or not to be, that is the question", encoding="utf-8")
    rows = [json.dumps({"text": f"{i} is", "y": "even" if i % 2 == 0 else "odd"}) for i in range(60)]
    (tmp_path / ".own/rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    content = json.dumps(make_tokenizer("bpe-258", lambda: iter(["to be"])).hf_json())
    for name in ("mine.json", "model/tokenizer.json"):
        (tmp_path / ".own" / name).write_text(content, encoding="utf-8")
    monkeypatch.chdir(tmp_path / "here")
    corpus, tokenizer = corpus.format(tmp=tmp_path), tokenizer.format(tmp=tmp_path)
    labels = "y" if corpus.endswith("rows.jsonl") else None
    folder = prepare(corpus, tokenizer=tokenizer, label_field=labels, progress=False)
    assert folder == Path("data", made.format(base=tmp_path.name))
    assert folder == Path(Data(corpus=corpus, tokenizer=tokenizer).folder)  # where a recipe looks
    assert (folder / "manifest.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".own", "here", "other"]


def test_the_folder_of_names_and_hub_ids() -> None:
    for corpus, tokenizer, folder in [
        ("openwebtext", "gpt2", "data/openwebtext-gpt2"),
        ("stdlib", "bpe-4096", "data/stdlib-bpe-4096"),
        ("eurlex57k", "FacebookAI/roberta-base", "data/eurlex57k-roberta-base"),
        ("imdb", "org/bert-1.5", "data/imdb-bert-1.5"),
        ("../../etc", "../../x", "data/etc-x"),  # a stranger's recipe
    ]:
        assert Data(corpus=corpus, tokenizer=tokenizer).folder == folder
    assert Data(corpus="../x", path="../elsewhere").folder == "../elsewhere"


def test_two_sources_of_one_name_do_not_share_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name / "t").mkdir(parents=True)
        (tmp_path / name / "t" / "x.txt").write_text("To be, or not to be", encoding="utf-8")
    prepare("a/t", tokenizer="byte", progress=False)
    (tmp_path / "b/t/x.txt").write_text("To be, or not", encoding="utf-8")
    with pytest.raises(DataError, match=r"data/t-byte was made with source.path = a/t \(now b/t\), .*another --out"):
        prepare("b/t", tokenizer="byte", progress=False)
    assert read_manifest(Path("data/t-byte"))["source"]["path"] == "a/t"
    shutil.copyfile("a/t/x.txt", "b/t/x.txt")
    prepare("b/t", tokenizer="byte")  # the names and sizes are the same, and it is said whose tokens these are
    out = capsys.readouterr().out
    assert out.startswith("data/t-byte: already prepared, ") and out.endswith("\n  made of a/t\n")


def test_the_command_that_makes_a_missing_dataset_can_be_pasted() -> None:
    says = str(missing_dataset("data/my text-byte", "my text; ls", "byte"))
    assert "`gptlab prepare 'my text; ls' --tokenizer byte --out 'data/my text-byte'`" in says
    assert "`gptlab prepare CORPUS --out data/x`" in str(missing_dataset("data/x"))


def test_file_names_that_are_not_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        (tmp_path / "folder/x\udcff").mkdir(parents=True)
    except OSError:
        pytest.skip("this file system refuses such names")
    for number in range(40):
        (tmp_path / f"folder/x\udcff/{number}\udcfe.txt").write_text(f"Document {number}", encoding="utf-8")
    part = prepare(str(tmp_path / "folder"), tokenizer="byte", part="1/1", out=tmp_path / "parts", progress=False)
    whole = prepare(str(tmp_path / "folder"), tokenizer="byte", out=tmp_path / "whole", progress=False)
    for folder in (part, whole):
        splits = read_manifest(folder)["splits"]
        assert splits["train"]["documents"] + splits["val"]["documents"] == 40
    monkeypatch.chdir(tmp_path / "folder/x\udcff")
    assert prepare(".", tokenizer="byte", out="../../inside", progress=False) == Path("../../inside")
    shutil.copytree("../../inside", "inside")
    with pytest.raises(ConfigError, match="is not UTF-8 text, which no recipe.toml can hold: rename it"):
        train(tiny_recipe(Path("inside"), train__max_steps=1), "../../run", quiet=True)
    assert not RunDir("../../run").exists()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_names_that_the_terminal_cannot_show(encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "日本.txt").write_text(text_of(200, 0), encoding="utf-8")
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main(["prepare", "日本.txt", "--tokenizer", "byte"])
    assert ended.value.code == 0 and Path("data/日本.txt-byte/manifest.json").is_file()
    assert b"dataset: data/??.txt-byte" in written.getvalue()


# -- what a run was trained on --------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A dataset of bytes made of a folder of text."""
    (tmp_path / "novels").mkdir()
    for number in range(60):
        (tmp_path / f"novels/{number}.txt").write_text(text_of(60, number), encoding="utf-8")
    return prepare(str(tmp_path / "novels"), tokenizer="byte", out=tmp_path / "own", progress=False)


def test_a_run_names_the_corpus_and_tokenizer_of_its_dataset(own: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(own, data__corpus="shakespeare", data__tokenizer="char", train__max_steps=2)
    train(recipe, tmp_path / "run", quiet=True)
    run = RunDir(tmp_path / "run")
    stored, facts = run.read_recipe(), run.read_json("environment.json")["data"]
    assert stored.data.corpus == facts["corpus"] == str(tmp_path / "novels")
    assert stored.data.tokenizer == facts["tokenizer"] == "byte"
    told = card(run)
    assert "shakespeare" not in told.lower() and "| tokenizer | byte |" in told
    train(stored, tmp_path / "again", quiet=True)
    assert RunDir(tmp_path / "again").read_recipe() == stored
    assert [line.get("loss") for line in RunDir(tmp_path / "again").read_metrics()] == [
        line.get("loss") for line in run.read_metrics()
    ]
    assert resolve_recipe(recipe, "cpu").recipe.data == stored.data  # a plan says the same


def test_shards_that_do_not_say_their_corpus_have_none(dataset: Path, own: Path, tmp_path: Path) -> None:
    train(tiny_recipe(dataset, data__corpus="shakespeare", train__max_steps=1), tmp_path / "run", quiet=True)
    run = RunDir(tmp_path / "run")
    assert run.read_recipe().data.corpus == run.read_json("environment.json")["data"]["corpus"] == ""
    assert "shakespeare" not in card(run)


def test_a_mixture_names_all_its_corpora(own: Path, tmp_path: Path) -> None:
    (tmp_path / "verse.txt").write_text(text_of(2000, 1), encoding="utf-8")
    verse = prepare(str(tmp_path / "verse.txt"), tokenizer="byte", out=tmp_path / "verse", progress=False)
    recipe = tiny_recipe(own, data__path="", data__mixture={str(own): 0.5, str(verse): 0.5}, train__max_steps=1)
    train(recipe, tmp_path / "run", quiet=True)
    stored = RunDir(tmp_path / "run").read_recipe()
    assert stored.data.corpus == f"{tmp_path / 'novels'}, {tmp_path / 'verse.txt'}"
    assert (stored.data.path, stored.data.tokenizer) == ("", "byte")


def test_a_run_that_recorded_its_recipe_s_names_goes_on(own: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(own, train__max_steps=4, schedule__decay_steps=8)
    train(recipe, tmp_path / "run", quiet=True)
    run = RunDir(tmp_path / "run")
    run.write_recipe(run.read_recipe().replace({"data.corpus": "shakespeare", "data.tokenizer": "char"}))
    shutil.copytree(own, tmp_path / "moved")
    longer = {"train.max_steps": 8, "data.path": str(tmp_path / "moved"), "data.corpus": "stdlib"}
    assert train(recipe.replace(longer), run.path, quiet=True).steps == 8
    assert run.read_recipe().data.corpus == str(tmp_path / "novels")
    (tmp_path / "verse.txt").write_text(text_of(2000, 1), encoding="utf-8")
    verse = prepare(str(tmp_path / "verse.txt"), tokenizer="byte", out=tmp_path / "verse", progress=False)
    with pytest.raises(RunError, match="was trained on other data"):
        train(recipe.replace({"data.path": str(verse)}), run.path, quiet=True)
