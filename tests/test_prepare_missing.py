"""A dataset that needs no download is prepared where it is missing."""

import threading
import time
from pathlib import Path

import pytest
from conftest import tiny_recipe

from gptlab.cli import main
from gptlab.config import Data
from gptlab.data.corpora import text
from gptlab.data.prepare.missing import prepare_missing
from gptlab.data.shards import Dataset


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an empty folder, with a standard library of forty modules."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(text, "stdlib_files", lambda: iter([(f"{i}.py", f"x = {i}\n" * 40) for i in range(40)]))


def test_training_prepares_it_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny_recipe(tmp_path, data__path="", data__corpus="stdlib", data__tokenizer="byte", train__max_steps=2)
    Path("r.toml").write_text(recipe.to_toml(), encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        main(["train", "r.toml"])
    assert end.value.code == 0
    assert capsys.readouterr().err.count("data/stdlib-byte is missing: preparing it") == 1
    assert Dataset("data/stdlib-byte").manifest["corpus"] == "stdlib"


def test_a_named_folder_and_a_corpus_to_download_are_left_to_the_user() -> None:
    prepare_missing([Data(corpus="stdlib", tokenizer="byte", path="elsewhere"), Data(corpus="shakespeare")])
    assert list(Path().iterdir()) == []


def test_what_is_there_is_left_alone() -> None:
    Path("data/stdlib-byte").mkdir(parents=True)
    Path("data/stdlib-byte/train.bin").write_bytes(b"12")
    prepare_missing([Data(corpus="stdlib", tokenizer="byte")])
    assert [path.name for path in Path("data/stdlib-byte").iterdir()] == ["train.bin"]


def test_another_rank_waits_for_rank_0() -> None:
    data = Data(corpus="stdlib", tokenizer="byte")
    waiting = threading.Thread(target=prepare_missing, args=([data], False))
    waiting.start()
    time.sleep(0.3)
    assert waiting.is_alive()
    prepare_missing([data], quiet=True)
    waiting.join(timeout=60)
    assert not waiting.is_alive()
    assert len(Dataset("data/stdlib-byte").train) > 0
