"""A folder of files of every kind, right and damaged: each is read or named, and the documents are counted right."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from interrupted import killed_before

from gptlab.data.corpora import TEXT, files, kinds, open_corpus, text
from gptlab.data.prepare import pipeline, prepare
from gptlab.data.shards import Dataset
from gptlab.errors import DataError

zstandard = pytest.importorskip("zstandard")
pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def quietly(corpus: Path | str, out: Path, **settings: Any) -> Dataset:
    return Dataset(
        prepare(str(corpus), **{"out": out, "tokenizer": "byte", "workers": 1, "progress": False, **settings})
    )


def texts_of(corpus: Path | str, **settings: Any) -> list[str]:
    return [text for _, text in open_corpus("text", Path(corpus), **settings).documents() if text]


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def table(texts: list[str], delimiter: str = ",") -> bytes:
    out = io.StringIO()
    rows = csv.writer(out, delimiter=delimiter)
    rows.writerows([["id", "text"], *([index, text] for index, text in enumerate(texts))])
    return out.getvalue().encode()


def columns(texts: list[Any], name: str = "text") -> bytes:
    out = io.BytesIO()
    parquet.write_table(pa.table({name: texts, "n": list(range(len(texts)))}), out)
    return out.getvalue()


def save_to_disk(folder: Path, texts: list[str], files: int = 1) -> None:
    """What `datasets.Dataset.save_to_disk` writes; a slow test compares the two."""
    folder.mkdir(parents=True)
    names = [f"data-{index:05d}-of-{files:05d}.arrow" for index in range(files)]
    for index, name in enumerate(names):
        part = pa.table({"text": texts[index::files]})
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, part.schema) as stream:
            stream.write_table(part)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 99\n"
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "zst": lambda content: zstandard.ZstdCompressor().compress(content),
    "bz2": bz2.compress,
    "xz": lzma.compress,
}


def two(name: str) -> list[str]:
    return [f"first of {name}", f"second of {name}, na\u00efve"]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], dict[str, str]]:
    """A folder, the documents in it in order, and the names that must not be read, each with a word of the reason."""
    root = tmp_path_factory.mktemp("mixed")
    good: dict[str, tuple[bytes, list[str]]] = {
        "a.txt": (b"plain text", ["plain text"]),
        "b.md": (b"\xef\xbb\xbf# a mark\r\nand\rlines", ["# a mark\nand\nlines"]),
        "c.jsonl": (lines(two("c")), two("c")),
        "d.ndjson": (lines(two("d")), two("d")),
        "e.JSONL": (lines(two("e")), two("e")),
        "f.json": (json.dumps([{"text": text} for text in two("f")], indent=1).encode(), two("f")),
        "g.Json": (lines(two("g")), two("g")),  # lines, as datasets.to_json and C4 call them
        "h.csv": (table(two("h")), two("h")),
        "i.tsv": (table(two("i"), "\t"), two("i")),
        "j.parquet": (columns(two("j")), two("j")),
        "k.txt": (gzip.compress(b"a gzip called .txt"), ["a gzip called .txt"]),
        "l.jsonl": (PACKERS["zst"](lines(two("l"))), two("l")),
        "m.jsonl.gz": (lines(two("m")), two("m")),  # plain, as a client that unpacks it leaves it
        "n.json.gz": (gzip.compress(lines(two("n"))), two("n")),
        "o.jsonl": (json.dumps([{"text": text} for text in two("o")]).encode(), two("o")),  # an array
        "p.jsonl": (PACKERS["zst"](lines(two("p1"))) + PACKERS["zst"](lines(two("p2"))), [*two("p1"), *two("p2")]),
        "q.txt": (b"no byte order mark", ["no byte order mark"]),
        "r.jsonl": (
            b'{"text": null}\n{"text": ""}\n{"text": " \\n"}\n{"text": NaN}\n{"text": 7}\n{"body": "x"}\n'
            b'{"text": "of r"}\n{"text": "torn\n{"text": "\xe9"}\n',
            ["of r"],
        ),
        "s.parquet": (columns([None, "", " \n", "of s"]), ["of s"]),
        "t.csv": (b'id,text\n1,\n2," "\n3,"one\n""two"""\n4,cut, here\n', ['one\n"two"']),
    }
    for name, pack in PACKERS.items():
        good[f"v.txt.{name}"] = (pack(f"text in {name}".encode()), [f"text in {name}"])
        good[f"w.jsonl.{name}"] = (pack(lines(two(name))), two(name))
        good[f"x.csv.{name.upper()}"] = (pack(table(two(name))), two(name))
    good["y.parquet.gz"] = (gzip.compress(columns(two("y"))), two("y"))
    bad: dict[str, tuple[bytes, str]] = {
        "bad/empty.txt": (b"", "empty"),
        "bad/blank.md": (b" \n\n", "empty"),
        "bad/empty.jsonl": (b"\n", "empty"),
        "bad/empty.json": (b"[]", "empty"),
        "bad/pointer.parquet": (POINTER, "git lfs pull"),
        "bad/pointer.jsonl": (POINTER, "git lfs pull"),
        "bad/wide.txt": ("wide".encode("utf-16"), "UTF-16"),
        "bad/latin.txt": (b"caf\xe9 au lait", "not UTF-8"),
        "bad/binary.txt": (bytes(range(256)), "zero bytes"),
        "bad/paper.txt": (b"%PDF-1.4 ...", "a PDF"),
        "bad/book.md": (b"PK\x03\x04....", "a zip archive"),
        "bad/plain.txt.gz": (b"404 not found", "Not a gzipped file"),
        "bad/prose.jsonl": (b"It was the best of times\nit was the worst\n", "not JSON"),
        "bad/prose.json": (b"It was the best of times\n", "not JSON"),
        "bad/cut.json": (json.dumps([{"text": "x" * 99}]).encode()[:-9], "not JSON"),
        "bad/none.parquet": (b"PAR1 nothing", "not a readable parquet file"),
        "bad/cut.parquet": (columns(two("cut"))[:-40], "not a readable parquet file"),
        "bad/field.parquet": (columns(two("x"), "body"), "only body, n"),
        "bad/field.jsonl": (b'{"body": "x"}\n' * 3, "without the field"),
        "bad/numbers.csv": (b"a,b\n1,2\n", "only a, b"),
        "bad/numbers.jsonl": (b'{"text": 1}\n{"text": 2}\n', "holds int"),
        "bad/quote.csv": (b'id,text\n1,"never closed\n2,x\n', "not CSV"),
        "bad/x.png": (b"\x89PNG", "of a kind that is not read"),
        "bad/script": (b"#!/bin/sh\n", "of a kind that is not read"),
    }
    for name, pack in PACKERS.items():
        bad[f"bad/cut.jsonl.{name}"] = (pack(os.urandom(4000).hex().encode())[:-200], "cannot be read")
        bad[f"bad/cut.txt.{name}"] = (pack(lines(two(name)))[:-6], "cannot be read")
    documents = {name: texts for name, (_, texts) in good.items()}
    for name, (content, _) in {**good, **bad}.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content)
    save_to_disk(root / "saved/train", two("saved"), files=2)
    save_to_disk(root / "saved/test", ["never trained on"])
    (root / "saved/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    documents |= {f"saved/train/data-0000{index}-of-00002.arrow": [two("saved")[index]] for index in range(2)}
    (root / "saved/train/cache-1.arrow").write_bytes(b"of datasets.map")
    (root / "real/inner").mkdir(parents=True)
    (root / "real/inner/z.txt").write_text("linked once")
    (root / "aa").symlink_to("real/inner")
    (root / "real/inner/up").symlink_to("../..")
    outside = tmp_path_factory.mktemp("outside")
    (outside / "far.txt").write_text("from afar")
    (root / "link").symlink_to(outside)
    (root / "other").symlink_to(outside)
    (root / "bad/broken.txt").symlink_to("nowhere")
    (root / "made").mkdir()
    for name in ("manifest.json", "tokenizer.json", "train-000000.bin"):
        (root / "made" / name).write_text("{}")
    (root / ".git").mkdir()
    (root / ".git/config.txt").write_text("x")
    (root / "._a.txt").write_text("x")
    documents |= {"real/inner/z.txt": ["linked once"], "link/far.txt": ["from afar"]}
    unread = {name: reason for name, (_, reason) in bad.items()} | {
        "saved/test/data-00000-of-00001.arrow": "test or validation",
        "saved/dataset_dict.json": "of save_to_disk",
        "saved/train/state.json": "of save_to_disk",
        "saved/train/dataset_info.json": "of save_to_disk",
        "saved/train/cache-1.arrow": "not in the state.json",
        "aa/": "read already",
        "other/": "read already",
        "real/inner/up/": "read already",
        "bad/broken.txt": "broken links",
        "made/": "prepared datasets",
        ".git/": "hidden",
        "._a.txt": "hidden",
    }
    return root, [text for name in sorted(documents) for text in documents[name]], unread


def every_name(manifest: dict[str, Any]) -> dict[str, str]:
    """The files that a manifest says were not read, each with the reason and what is said beside it."""
    named = {}
    for reason, entry in manifest["reading"]["skipped"].items():
        assert entry["files"] == len(entry["names"])
        for said in entry["names"]:
            name, _, detail = said.partition(" (")
            named[name] = f"{reason}: {detail}"
    return named


def test_a_folder_of_every_kind(
    mixed: tuple[Path, list[str], dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    root, documents, unread = mixed
    assert texts_of(root) == documents
    monkeypatch.setattr("gptlab.data.prepare.summary.SHOWN_NAMES", 99)
    manifest = quietly(root, tmp_path / "set", progress=True).manifest
    shown = capsys.readouterr().out
    print(shown)
    named = every_name(manifest)
    for name, reason in unread.items():
        assert reason in named[name], name
        assert name in shown, name
    others = {name.rpartition("/")[0] for name in named.keys() - unread.keys()}
    assert others == {"saved/test"}  # its state.json and dataset_info.json
    assert sum(split["documents"] for split in manifest["splits"].values()) == len(documents)
    left_out = {reason: entry["rows"] for reason, entry in manifest["reading"]["left_out"].items()}
    assert left_out == {files.NULL: 4 + 3 + 2, files.NO_TEXT: 1, files.NO_FIELD: 1, files.NO_ROW: 2 + 1}
    assert manifest["reading"]["left_out"][files.NULL]["first"].endswith("r.jsonl, line 1")
    assert (
        f"{len(documents)} documents from {manifest['source']['files'] - manifest['reading']['unread']} files" in shown
    )


def test_a_stop_changes_neither_the_documents_nor_what_is_said_of_the_others(
    mixed: tuple[Path, list[str], dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(pipeline, "BATCH_CHARACTERS", 100)
    monkeypatch.setattr(pipeline, "RECORD_SECONDS", 0.0)
    whole = quietly(mixed[0], tmp_path / "whole", workers=2).manifest
    assert whole["reading"]["left_out"] and whole["reading"]["unread"] > 20
    for stop in (3, 9):
        with killed_before(stop, (os, "replace")):
            quietly(mixed[0], tmp_path / str(stop))
        assert (tmp_path / str(stop) / "progress.json").is_file()
        assert quietly(mixed[0], tmp_path / str(stop)).manifest == whole


def test_parts_say_together_what_the_whole_says(
    mixed: tuple[Path, list[str], dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, few = mixed[0], tmp_path / "few"
    few.mkdir()
    for name in ("r.jsonl", "s.parquet", "t.csv", "a.txt"):
        (few / name).write_bytes((root / name).read_bytes())
    (few / "b.jsonl").write_bytes(lines(two("b")) + b"torn")
    (few / "c.txt").write_bytes(b"")
    (few / "d.png").write_bytes(b"")
    whole = quietly(few, tmp_path / "whole", val_fraction=0.1).manifest["reading"]
    for part in (1, 2):
        quietly(few, tmp_path / "set", val_fraction=0.1, part=f"{part}/2")
    prepare("text", out=tmp_path / "set", merge=True)
    assert Dataset(tmp_path / "set").manifest["reading"] == whole
    assert whole["skipped"] == {
        kinds.EMPTY: {"files": 1, "names": ["c.txt"]},
        files.OTHER_KIND: {"files": 1, "names": ["d.png"]},
    }
    assert "6 documents from 5 files" in capsys.readouterr().out


def test_strict_refuses_the_first_that_is_left_out(
    mixed: tuple[Path, list[str], dict[str, str]], tmp_path: Path
) -> None:
    root = mixed[0]
    for name, sentence in (
        ("r.jsonl", "r.jsonl, line 1 has no text"),
        ("s.parquet", "s.parquet, row 1 has no text"),
        ("t.csv", "t.csv, line 2 has no text"),
        ("bad/latin.txt", "latin.txt is not UTF-8 text"),
        ("bad/field.jsonl", "field.jsonl, line 1 has no field 'text', only body"),
    ):
        folder = tmp_path / name.replace("/", "-")
        folder.mkdir()
        (folder / "0.jsonl").write_bytes(lines(two("0")))
        (folder / name.replace("/", "-")).write_bytes((root / name).read_bytes())
        with pytest.raises(DataError, match=sentence.replace(name.rpartition("/")[2], "[^ ]*")):
            quietly(folder, tmp_path / "set", strict=True)
        quietly(folder, folder.with_suffix(".set"))
        with pytest.raises(DataError, match="was prepared without --strict, and lacks rows or files"):
            quietly(folder, folder.with_suffix(".set"), strict=True)
    with pytest.raises(DataError, match="bad/broken.txt cannot be read: it is one of the files broken links"):
        quietly(root, tmp_path / "set", strict=True)
    clean = tmp_path / "clean"
    clean.mkdir()
    (clean / "a.jsonl").write_bytes(lines(two("a")))
    (clean / "a.png").write_bytes(b"")  # nothing that could have been text
    quietly(clean, tmp_path / "set", strict=True)
    quietly(clean, tmp_path / "set", strict=True)
    (clean / "b.jsonl").write_text('{"text": "a", "y": 1}\n{"text": "b", "y": ""}\n' * 9)
    with pytest.raises(DataError, match="b.jsonl, line 2 has no label"):
        prepare(str(clean / "b.jsonl"), out=tmp_path / "labels", tokenizer="byte", label_field="y", strict=True)


# -- one file


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.dat", lines(two("a")), two("a")),  # JSON is never taken for text
        ("a", json.dumps([{"text": "one"}], indent=1).encode(), ["one"]),
        ("a.dat", columns(two("a")), two("a")),
        ("a.dat.gz", gzip.compress(lines(two("a")), mtime=0), two("a")),
        ("a.py", b"{this} is no JSON\n", ["{this} is no JSON\n"]),
        ("setup.cfg", b"[mypy]\nstrict = true\n", ["[mypy]\nstrict = true\n"]),
        ("a.rst", b"prose", ["prose"]),
        ("a.json", b'{"text":\n "one object"}', ["one object"]),
        ("a.json", b'{"text": "one"}', ["one"]),
        ("a.json", b'\xef\xbb\xbf"one"\n"two"\n', ["one", "two"]),
        ("a.jsonl", b'\xef\xbb\xbf{"text": "\\ufeffone\\r\\ntwo\\rthree"}\r\n', ["one\ntwo\nthree"]),
        ("a.parquet", columns(["\ufeffone\r\ntwo\rthree"]), ["one\ntwo\nthree"]),
        ("a.csv", b'\xef\xbb\xbftext\r\n"one\r\ntwo\rthree"\r\n', ["one\ntwo\nthree"]),
        ("a.tsv", b"text\tn\nsays 'one', two\t1\n", ["says 'one', two"]),
        ("a.csv", b"text,n\nshort\n", ["short"]),
        ("a.jsonl", b'["a", "list"]\n{"text": "after it"}\n', ["after it"]),
        ("a.jsonl", b'[\n{"text": "an array"}\n]\n', ["an array"]),
    ],
)
def test_one_file_is_read_as_what_it_is(tmp_path: Path, name: str, content: bytes, expected: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    assert texts_of(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.csv", b"text\nx, y\n", "line 2 has 2 fields, and the header has 1"),
        ("a.csv", b'"text\n', "has no header: line 1 is not CSV"),
        ("a.csv", b"text\ncaf\xe9\n", "line 2 is not UTF-8 text"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "\xe9"}\n',
            "line 2 is not UTF-8 text .invalid continuation byte at byte 10",
        ),
        ("a.jsonl", b"{}\n" * 3, "line 1 has no field 'text': name the field of the text with --text-field"),
        ("a.jsonl", b'{"text": {"b": 1}}\n', "line 1: field 'text' holds dict, not text"),
        ("a.dat", b"\x00\x01", "is not text: it holds zero bytes"),
        ("a.gz", b"404 not found", "Not a gzipped file"),
        ("a.jsonl.zst", b"404 not found", "Not a .zst file"),
        (
            "a.tar.gz",
            gzip.compress(b"name".ljust(257, b"\0") + b"ustar" + b"\0" * 99, mtime=0),
            "is a tar archive, not text",
        ),
        ("a.parquet", POINTER, "is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`"),
        ("a.jsonl", b'{"text": 1}\n{"text": null}\n', "line 1: field 'text' holds int, not text"),
        ("a.jsonl", b'{"text": null}\n', "the corpus text has no documents"),
        ("a.txt", b" \n", "the corpus text has no documents"),
    ],
)
def test_one_file_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}.*{sentence}|{sentence}.*{name}"):
        quietly(tmp_path / name, tmp_path / "set")


def test_a_wrong_field_is_found_before_everything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "GIVE_UP", 5)
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_bytes(b'{"body": "x", "title": "y"}\n' * 6 + b"torn\n" * 99)
    with pytest.raises(
        DataError, match=r"a.jsonl, line 1 has no field 'text', only body, title: .* .1 more of its files"
    ):
        list(open_corpus("text", tmp_path).documents())
    assert len(texts_of(tmp_path, text_field="body")) == 12


def test_a_wrong_field_is_refused_where_the_rest_is_not_the_corpus(tmp_path: Path) -> None:
    (tmp_path / "about.txt").write_text("what the tables are")
    (tmp_path / "a.jsonl").write_bytes(b'{"body": "x"}\n' * 9)
    with pytest.raises(DataError, match="a.jsonl, line 1 has no field 'text', only body: name the field"):
        quietly(tmp_path, tmp_path / "set")
    (tmp_path / "about.txt").write_text("a long document " * 99)
    assert len(texts_of(tmp_path)) == 1  # a stray table
    assert len(texts_of(tmp_path, text_field="body")) == 10


def test_nested_fields(tmp_path: Path) -> None:
    rows = [{"content": {"text": f"{n}", "more": {"b": None}}, "n": n} for n in range(3)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    (tmp_path / "c").mkdir()
    with pa.OSFile(str(tmp_path / "c/x.arrow"), "wb") as file:
        nested = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(file, nested.schema) as stream:
            stream.write_table(nested)
    for name in ("a.jsonl", "b.parquet", "c/x.arrow"):
        assert texts_of(tmp_path / name, text_field="content.text") == ["0", "1", "2"]
        with pytest.raises(DataError, match=r"has no field 'content.body', only content, n"):
            texts_of(tmp_path / name, text_field="content.body")
        assert texts_of(tmp_path / name, text_field="content.more.b") == []
    literal = [{"a.b": "literal", "a": {"b": "nested"}}]
    (tmp_path / "d.jsonl").write_text(json.dumps(literal[0]), encoding="utf-8")
    parquet.write_table(pa.Table.from_pylist(literal), tmp_path / "d.parquet")
    for name in ("d.jsonl", "d.parquet"):
        assert texts_of(tmp_path / name, text_field="a.b") == ["literal"]


@pytest.mark.parametrize(
    ("module", "name", "needs"),
    [
        ("zstandard", "a.jsonl.zst", "pip install zstandard"),
        ("lzma", "a.jsonl.xz", "this Python was built without xz"),
        ("bz2", "a.jsonl.bz2", "this Python was built without bzip2"),
        ("pyarrow", "a.parquet", "pip install pyarrow"),
    ],
)
def test_what_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str, needs: str
) -> None:
    pack = PACKERS.get(name.rpartition(".")[2])
    (tmp_path / "in").mkdir()
    (tmp_path / "in/0.txt").write_text("whole")
    (tmp_path / "in" / name).write_bytes(pack(lines(two("a"))) if pack else columns(two("a")))
    monkeypatch.setitem(sys.modules, module, None)
    for source in (tmp_path / "in" / name, tmp_path / "in"):  # no file is passed over that a package would read
        with pytest.raises(DataError, match=f"{name} .*{needs}"):
            texts_of(source)


# -- repositories, splits, earlier versions


def test_a_clone_of_a_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clone = tmp_path / "clone"
    (clone / "data").mkdir(parents=True)
    (clone / "README.md").write_text("---\nlicense: mit\nconfigs:\n- config_name: default\n---\n# The dataset\n")
    (clone / "notes.txt").write_text("how it was made")
    for split in ("train", "test", "validation"):
        (clone / f"data/{split}-00000-of-00001.parquet").write_bytes(columns(two(split)))
    quietly(clone, tmp_path / "set", progress=True)
    shown = capsys.readouterr().out
    assert texts_of(clone) == two("train")
    assert "from 1 file\n" in shown
    assert f"not read ({text.OTHER_SPLIT}): data/test-00000-of-00001.parquet; data/validation-" in shown
    assert f"not read ({text.REPOSITORY}): README.md; notes.txt" in shown
    (clone / "data/train-00000-of-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"no text for training, only files of a test or .* .data/test-"):
        open_corpus("text", clone)
    assert texts_of(clone / "data/test-00000-of-00001.parquet") == two("test")  # by its name, it is read
    nested = tmp_path / "nested"
    nested.mkdir()
    clone.rename(nested / "clone")
    (nested / "README.md").write_text("---\ntitle: my notes\n---\nmine")
    (nested / "test.md").write_text("mine too")
    assert texts_of(nested) == ["---\ntitle: my notes\n---\nmine", "mine too"]


def test_files_named_as_tests_in_a_folder_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a", "test", "val"):
        (tmp_path / f"in/{name}.txt").write_text(f"text of {name}")
    quietly(tmp_path / "in", tmp_path / "set", progress=True)
    assert f"read all the same ({text.OTHER_SPLIT}): test.txt; val.txt" in capsys.readouterr().out
    assert len(texts_of(tmp_path / "in")) == 3
    (tmp_path / "in/train.txt").write_text("text of train")  # now there is no doubt
    quietly(tmp_path / "in", tmp_path / "split", progress=True)
    assert f"not read ({text.OTHER_SPLIT}): test.txt; val.txt" in capsys.readouterr().out
    assert texts_of(tmp_path / "in") == ["text of a", "text of train"]


def test_json_that_is_called_text_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.txt").write_bytes(lines(two("a")))
    (tmp_path / "code.txt").write_text("{this is code}")
    quietly(tmp_path, tmp_path / "set", progress=True)
    assert f"read all the same ({text.JSON_TEXT}): rows.txt\n" in capsys.readouterr().out
    quietly(tmp_path / "rows.txt", tmp_path / "one", progress=True)
    assert f"read all the same ({text.JSON_TEXT}): rows.txt\n" in capsys.readouterr().out


def test_what_an_earlier_version_prepared_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.txt").write_text("one document")
    (source / "b.jsonl").write_bytes(lines(two("b")))
    quietly(source, tmp_path / "set")
    manifest = (tmp_path / "set/manifest.json").read_bytes()
    (source / "c.csv").write_bytes(table(two("c")))  # as if it had been there; 0.1 passed over it
    (source / "D.JSONL").write_bytes(lines(two("d")))
    monkeypatch.setattr(pipeline, "_prepare", None)
    quietly(source, tmp_path / "set", progress=True)
    assert "already prepared, by a gptlab that read 2 of its files where this one reads 4" in capsys.readouterr().out
    assert (tmp_path / "set/manifest.json").read_bytes() == manifest
    (source / "e.txt").write_text("new")
    with pytest.raises(DataError, match=r"source.files = 2 \(now 5\)"):
        quietly(source, tmp_path / "set")


def test_a_preparation_that_an_earlier_version_began_is_not_continued(tmp_path: Path) -> None:
    """It counted documents of white space, so its place in the text is another."""
    (tmp_path / "a.jsonl").write_bytes(lines(two("a")))
    with killed_before(3, (os, "replace")):
        quietly(tmp_path / "a.jsonl", tmp_path / "set")
    record = json.loads((tmp_path / "set/progress.json").read_text())
    (tmp_path / "set/progress.json").write_text(json.dumps({k: v for k, v in record.items() if k != "reader"}))
    with pytest.raises(DataError, match="set was begun by an earlier gptlab, which read text in another way: delete"):
        quietly(tmp_path / "a.jsonl", tmp_path / "set")


def test_a_name_that_is_not_utf_8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for name in (b"caf\xe9.txt", b"na\xefve.png", b"two\nlines.png"):
        try:
            Path(os.fsdecode(os.fsencode(source) + b"/" + name)).write_text("some text", encoding="utf-8")
        except OSError:
            pytest.skip("this file system has names of UTF-8 only")
    manifest = quietly(source, tmp_path / "set", part="1/1", progress=True).manifest
    assert manifest["reading"]["skipped"][files.OTHER_KIND]["names"] == ["na\\udcefve.png", "two\\nlines.png"]
    assert "na\\udcefve.png; two\\nlines.png" in capsys.readouterr().out


# -- the corpora of the hub


def test_a_corpus_of_the_hub_is_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "copy/en").mkdir(parents=True)
    (tmp_path / "copy/README.md").write_text("---\npretty_name: C4\n---\n")
    for index in range(2):
        (tmp_path / f"copy/en/c4-train.0000{index}.json.gz").write_bytes(gzip.compress(lines(two(f"{index}\r\n"))))
    monkeypatch.setitem(TEXT, "c4", text.Hub("allenai/c4", "en", folder="en", whole=10**4, val_tokens=5).open)
    dataset = quietly("c4", tmp_path / "set", source=tmp_path / "copy")
    assert dataset.manifest["splits"]["train"]["documents"] == 3
    assert [text for _, text in open_corpus("c4", tmp_path / "copy").documents()] == [*two("0\r\n"), *two("1\r\n")]
    monkeypatch.setitem(TEXT, "c4", text.Hub("allenai/c4", "en", folder="en", whole=10, val_tokens=5).open)
    assert len(quietly("c4", tmp_path / "whole", source=tmp_path / "copy").val) == 5
    (tmp_path / "copy/en/c4-train.00002.json.gz").write_bytes(POINTER)  # a copy that lacks a file is another corpus
    with pytest.raises(DataError, match="c4-train.00002.json.gz is a Git LFS pointer"):
        quietly("c4", tmp_path / "none", source=tmp_path / "copy")


@pytest.mark.slow
def test_save_to_disk_is_read_as_datasets_reads_it(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": [f"row {n}" for n in range(2500)], "n": list(range(2500))})
    shuffled = rows.shuffle(seed=1).select(range(2000))  # saved through its indices
    shuffled.save_to_disk(str(tmp_path / "one"), num_shards=3)
    loaded = datasets.load_from_disk(str(tmp_path / "one"))
    loaded.map(lambda row: {"text": row["text"] + "!"})  # leaves a cache file beside the data
    assert list((tmp_path / "one").glob("cache-*.arrow"))
    assert texts_of(tmp_path / "one") == shuffled["text"][:]
    both = datasets.DatasetDict({"train": rows, "test": shuffled})
    both.save_to_disk(str(tmp_path / "two"))
    assert texts_of(tmp_path / "two") == rows["text"][:]
    assert len(texts_of(tmp_path)) == 4500
    old = prepare("openwebtext", source=tmp_path / "two", out=tmp_path / "set", tokenizer="byte", progress=False)
    new = prepare(str(tmp_path / "two"), out=tmp_path / "set2", val_fraction=0.0005, tokenizer="byte", progress=False)
    assert Dataset(old).fingerprint() == Dataset(new).fingerprint()
    for part in (1, 2):
        prepare(str(tmp_path / "one"), out=tmp_path / "parts", part=f"{part}/2", tokenizer="byte", progress=False)
    prepare("text", out=tmp_path / "parts", merge=True, progress=False)
    assert sum(split["documents"] for split in Dataset(tmp_path / "parts").manifest["splits"].values()) == 2000


# -- bounds


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "csv", "parquet", "arrow"])
def test_memory_does_not_grow_with_a_file(tmp_path: Path, kind: str) -> None:
    code = (
        "import re, sys\nfrom pathlib import Path\nfrom gptlab.data.corpora import open_corpus\n"
        "count = sum(len(text) for _, text in open_corpus('text', Path(sys.argv[1])).documents())\n"
        "print(count, re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1])"
    )
    draw = np.random.default_rng(1)
    peak = []
    for count in (1000, 30_000):
        texts = [draw.bytes(500).hex() for _ in range(count)]
        path = tmp_path / f"{count}.{kind}"
        if kind == "arrow":
            with (
                pa.OSFile(str(path), "wb") as file,
                pa.ipc.new_stream(file, pa.schema({"text": pa.string()})) as stream,
            ):
                for begin in range(0, count, 1000):
                    stream.write_table(pa.table({"text": texts[begin : begin + 1000]}))
        elif kind == "parquet":
            parquet.write_table(pa.table({"text": texts}), path, row_group_size=1000)
        else:
            content = table(texts) if kind == "csv" else lines(texts)
            path.write_bytes(PACKERS.get(kind.rpartition(".")[2], bytes)(content))
        made = subprocess.run(
            [sys.executable, "-c", code, str(path)], check=True, capture_output=True, text=True
        ).stdout
        characters, size = map(int, made.split())
        assert characters == 1000 * count
        peak.append(size * 1024)
    allowed = 40e6 if kind == "arrow" else 12e6  # a mapped file's pages are in memory as long as it is free
    assert peak[1] - peak[0] < allowed, peak
