"""Folders of labelled documents as people have them: which file is of which split, and what a label is."""

import csv
import json
import math
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from labelled import Rows, contents, quietly, visible, write_jsonl, write_parquet

from gptlab.data.corpora import files, open_corpus
from gptlab.data.corpora.labels import LabelField, missing, unpacked
from gptlab.data.corpora.splits import sort_files, split_of, splits_of
from gptlab.data.labeled import LabeledDataset
from gptlab.data.prepare import prepare
from gptlab.errors import DataError


def write_json(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def write_csv(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


WRITERS = {"jsonl": write_jsonl, "json": write_json, "parquet": write_parquet}
WRITERS |= {"csv": write_csv} if ".csv" in files.TABLES else {}
FORMS = list(WRITERS)


def folder_of(root: Path, form: str, **labels: list[Any]) -> Path:
    """A file for each split, named by its keyword, of one row for each label; the text names file and row."""
    for name, values in labels.items():
        rows = [{"text": f"{name} {number}", "y": value} for number, value in enumerate(values)]
        WRITERS[form](root / f"{name}.{form}", rows)
    return root


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


# -- files


@pytest.mark.parametrize(
    ("name", "splits"),
    [
        ("train.jsonl", ["train"]),
        ("training.csv", ["train"]),
        ("x_trn.tsv", ["train"]),
        ("train2.jsonl", ["train"]),
        ("train-00000-of-00002.parquet", ["train"]),
        ("labeledTrainData.tsv", ["train"]),
        ("trainset.csv", ["train"]),
        ("en/train/0.json", ["train"]),
        ("eurlex57k_dev.jsonl.gz", ["val"]),
        ("VALIDATION-00000-of-00002.parquet", ["val"]),
        ("valid/0000.parquet", ["val"]),
        ("news.devel.json", ["val"]),
        ("eval.json", ["val"]),
        ("dev_matched.tsv", ["val"]),
        ("holdout.csv", ["val"]),
        ("dataset/test/32001R0001.json", ["test"]),
        ("testing.jsonl", ["test"]),
        ("tst.jsonl", ["test"]),
        ("test_labels.csv", ["test"]),
        ("test2017.json", ["test"]),
        ("20news-bydate-test/sci.med", ["test"]),
        ("plain_text/unsupervised-00000-of-00001.parquet", ["unlabelled"]),
        ("unlabeledTrainData.tsv", ["unlabelled"]),
        ("train_test.jsonl", ["train", "test"]),
        ("test_data/train-00000-of-00001.parquet", ["test", "train"]),
        ("latest.json", []),
        ("constraints.json", []),
        ("contest.json", []),
        ("evaluated.json", []),
        ("restrain.json", []),
    ],
)
def test_names_of_files_say_their_split(name: str, splits: list[str]) -> None:
    assert splits_of(name) == splits
    assert split_of(name) == {"unlabelled": None, "test train": "test", "train test": "test"}.get(
        " ".join(splits), next(iter(splits), None)
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("training", "valid", "testing"),
        ("trn", "dev", "tst"),
        ("my-train2", "eval", "TestSet"),
        ("train", "devel", "test"),
    ],
)
def test_usual_names_of_splits(train: str, val: str, test: str, form: str, tmp_path: Path) -> None:
    folder_of(tmp_path / "in", form, **{train: ["a", "b", "a"], val: ["a"], test: ["b", "b"]})
    dataset = quietly(str(tmp_path / "in"), tmp_path / "set", label_field="y")
    for split, name, count in (("train", train, 3), ("val", val, 1), ("test", test, 2)):
        assert [text for text, _ in contents(dataset, split)] == [f"{name} {number}" for number in range(count)]
        assert dataset.manifest["read"][split] == {"files": 1, "names": [f"{name}.{form}"]}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (("train", "test", "more"), "cannot tell the split of more.X, where train.X names one: put train, val or test"),
        (("train", "a", "b", "c", "d"), "cannot tell the split of a.X, b.X, c.X and 1 more, where train.X names one"),
        (("train", "train_test"), "train_test.X names two splits, train and test: rename it"),
        (("train/test/0", "train/0"), "train/test/0.X names two splits, train and test: rename it"),
        (("train", "dev", "eval"), "dev.X and eval.X may be validation and test documents: call the validation"),
        (("newstrain", "newstest"), "newstrain.X and newstest.X seem to be two splits: set the word apart"),
        (("test", "dev"), "has no training documents: name files by their split"),
    ],
)
def test_files_of_no_certain_split_are_asked_about(
    names: tuple[str, ...], sentence: str, form: str, tmp_path: Path
) -> None:
    folder_of(tmp_path / "in", form, **{name: ["a", "b"] for name in names})
    with pytest.raises(DataError) as error:
        quietly(str(tmp_path / "in"), tmp_path / "set", label_field="y")
    assert sentence.replace(".X", f".{form}") in str(error.value)
    assert not (tmp_path / "set").exists()


def test_the_same_documents_twice_and_names_that_deny_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of(tmp_path / "twice", "jsonl", train=["a", "b"])
    folder_of(tmp_path / "twice", "json", train=["a", "b"])
    with pytest.raises(DataError, match=r"train.json and train.jsonl may be the same documents: move one of them"):
        quietly(str(tmp_path / "twice"), tmp_path / "set", label_field="y")
    folder_of(tmp_path / "my_test", "jsonl", rows=["a", "b"], test=["a"])
    with pytest.raises(DataError, match=r"test.jsonl has the name of test documents, and one file alone is for train"):
        quietly(str(tmp_path / "my_test/test.jsonl"), tmp_path / "set", label_field="y")
    (tmp_path / "my_test/test.jsonl").unlink()
    with pytest.raises(DataError, match=r"my_test has the name of test documents, and nothing in it is for training"):
        quietly(str(tmp_path / "my_test"), tmp_path / "set", label_field="y")
    monkeypatch.chdir(tmp_path / "my_test")
    with pytest.raises(DataError, match="has the name of test documents, and nothing in it is for training"):
        quietly(".", tmp_path / "set", label_field="y")


def test_where_no_name_says_a_split_all_is_for_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder_of(tmp_path / "in", "jsonl", **{f"part{n}": ["a", "b"] * 10 for n in range(12)})
    (tmp_path / "in/README.md").write_text("Not a document.", encoding="utf-8")
    (tmp_path / "in/dataset_infos.json").write_text("{}", encoding="utf-8")
    dataset = quietly(str(tmp_path / "in"), tmp_path / "set", label_field="y")
    assert [len(split) for split in dataset.splits.values()] == [228, 12]
    assert capsys.readouterr().out.splitlines()[1:] == [
        "  train is 12 files: part0.jsonl, part1.jsonl, part10.jsonl, part11.jsonl, part2.jsonl, ...",
        "  val is held out of train",
        "  not read (without labelled documents): README.md; dataset_infos.json",
    ]


def test_configurations_of_a_repository_are_asked_about(tmp_path: Path) -> None:
    for name in ("cola/train", "cola/test", "sst2/train"):
        write_parquet(tmp_path / f"in/{name}-00000-of-00001.parquet", [{"text": "a", "y": 1}] * 40)
    with pytest.raises(DataError, match=r"cola/train\S+ and sst2/train\S+ are of two configurations: name the folder"):
        quietly(str(tmp_path / "in"), tmp_path / "set", label_field="y")
    assert [
        len(split) for split in quietly(str(tmp_path / "in/cola"), tmp_path / "set", label_field="y").splits.values()
    ] == [38, 2, 40]


NAMES = st.lists(
    st.tuples(
        st.sampled_from(["", "a/", "test/", "dev/", "train/"]),
        st.sampled_from(["test", "Test", "TESTING", "tst", "train", "val", "more", "latest", "eval"]),
        st.sampled_from(["", "-", "_", " ", ".", "2", "-0 of 2"]),
        st.text("abTz09_-.", max_size=4),
    ).map("".join),
    min_size=1,
    max_size=6,
    unique_by=str.lower,
)


@settings(deadline=None)
@given(NAMES)
def test_what_is_called_test_is_never_in_training(names: list[str]) -> None:
    try:
        found = sort_files(Path("in"), [f"{name}.jsonl" for name in names])
    except DataError:
        return
    kept = [name for split in found.values() for name in split]
    assert sorted(kept) == sorted(f"{name}.jsonl" for name in names)  # none is dropped
    for name in found.get("train", []):
        assert not {"test", "testing", "tst"} & {*splits_of(name)}
        for part in name.lower().split("/"):
            assert not part.startswith(("test-", "test_", "test.", "test ", "testing.", "tst."))


@settings(max_examples=30, deadline=None)
@given(NAMES, st.sampled_from(FORMS), st.integers(1, 3))
def test_no_document_of_a_test_file_is_ever_in_training(names: list[str], form: str, parts: int) -> None:
    with tempfile.TemporaryDirectory() as root:
        for name in names:
            WRITERS[form](Path(root, "in", f"{name}.{form}"), [{"text": name, "y": "a"}] * 3)
        try:
            found = [
                document
                for part in range(1, parts + 1)
                for document in open_corpus("text", Path(root, "in"), label_field="y", part=(part, parts)).split()
            ]
        except DataError:
            return
    assert sorted(document.text for document in found) == sorted(names * 3)
    for document in found:
        if document.split != "test":
            assert not re.match(r"(test|testing|tst)(?![a-z])", Path(document.text).name.lower())


def test_preparing_within_the_source_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder_of(tmp_path, "jsonl", train=["a", "b"], val=["a"])
    first = quietly(str(tmp_path), tmp_path / "data", label_field="y").manifest
    capsys.readouterr()
    assert quietly(str(tmp_path), tmp_path / "data", label_field="y").manifest == first
    assert "already prepared" in capsys.readouterr().out
    old = {key: value for key, value in first.items() if key not in ("read", "reading")}  # of an earlier version
    (tmp_path / "data/manifest.json").write_text(json.dumps(old), encoding="utf-8")
    assert quietly(str(tmp_path), tmp_path / "data", label_field="y").manifest == old
    assert "already prepared, 2 train, 1 val documents" in capsys.readouterr().out


# -- labels


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("values", "names", "without"),
    [
        ([0, 1, -1, 1, None], ["0", "1"], 2),
        ([0.0, 1.0, math.nan, 2.0, -1.0], ["0", "1", "2"], 2),
        (["neg", "pos", "", None, "pos"], ["neg", "pos"], 2),
        (["0", "1", "-1", "", "1"], ["0", "1"], 2),
        (["0.0", "1.0", "-1.0", "", "nan"], ["0", "1"], 3),
        ([True, False, None, True], ["false", "true"], 1),
        (["True", "FALSE", "true"], ["false", "true"], 0),
        (["401.0", "401", "V30.1", "038"], ["038", "401", "401.0", "V30.1"], 0),  # texts as they are
        (["True", "perhaps"], ["True", "perhaps"], 0),
    ],
)
def test_what_is_a_label(values: list[Any], names: list[str], without: int, form: str, tmp_path: Path) -> None:
    folder_of(tmp_path / "in", form, train=values, val=values)
    dataset = quietly(str(tmp_path / "in"), tmp_path / "set", label_field="y")
    assert dataset.labels == names
    assert not dataset.multi
    assert dataset.manifest["left_out"] == ({"a label": 2 * without} if without else {})


@pytest.mark.parametrize("form", [form for form in FORMS if form != "csv"])
@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([[0, 1, 1], [0, 0, 0], [1, 0, 0]], [["1", "2"], [], ["0"]]),
        ([[0.0, 1.0], [1.0, 0.0]], [["1"], ["0"]]),
        ([[False, True], [True, True], [False, False]], [["1"], ["0", "1"], []]),
        ([[0, 1], [1, 0], [1, 1]], [["1"], ["0"], ["0", "1"]]),  # no list names a label twice
        ([[0, 1], [1], [0]], [["0", "1"], ["1"], ["0"]]),  # label numbers: lists of other lengths
        ([[0, 1], [1, 2], [0, 2]], [["0", "1"], ["1", "2"], ["0", "2"]]),
        ([[0], [1], [1]], [["0"], ["1"], ["1"]]),
        ([["0", "1"], ["1", "0"]], [["0", "1"], ["0", "1"]]),
    ],
)
def test_lists_are_numbers_of_labels_or_flags(
    values: list[Any], labels: list[list[str]], form: str, tmp_path: Path
) -> None:
    folder_of(tmp_path / "in", form, train=values, val=[values[0]] * 2, test=values)
    dataset = quietly(str(tmp_path / "in"), tmp_path / "set", label_field="y")
    assert dataset.multi
    assert [found for _, found in contents(dataset, "train")] == labels
    assert [found for _, found in contents(dataset, "test")] == labels


def test_the_last_row_of_the_last_file_decides_for_all(tmp_path: Path) -> None:
    folder_of(tmp_path / "ids", "jsonl", train=[[0, 1]] * 9, val=[[0, 1]], test=[[0, 1], [0]])
    assert contents(quietly(str(tmp_path / "ids"), tmp_path / "set", label_field="y"), "val")[0][1] == ["0", "1"]
    folder_of(tmp_path / "flags", "jsonl", train=[[0, 1]] * 9 + [[1, 0]], val=[[0, 1]], test=[[0, 1], [0, 0]])
    flags = quietly(str(tmp_path / "flags"), tmp_path / "set2", label_field="y", max_documents=3)
    assert contents(flags, "val")[0][1] == ["1"]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            [[0, 1], [1, 0]],
            "train.jsonl, line 1: field 'y' holds lists of 0 and 1 that may be label numbers, or a 0 or",
        ),
        ([[3, -1], [1, 0]], "train.jsonl, line 1 has -1, which is no label, among others in field 'y'"),
        ([{"0": "a", "1": "b"}], "pandas writes rows with to_json(orient='records', lines=True)"),
        (["3.8", "4.0"], "train.jsonl, line 1 has the label 3.8: labels are texts, whole numbers or booleans"),
        ([3.8, 4.0], "train.jsonl, line 1 has the label 3.8: labels are texts, whole numbers or booleans"),
        ([[0, 0], [0, 0]], "the corpus text has no training documents that have one of the labels"),
    ],
)
def test_labels_that_are_refused(values: list[Any], sentence: str, tmp_path: Path) -> None:
    folder_of(tmp_path / "in", "jsonl", train=values, val=values)
    with pytest.raises(DataError) as error:
        quietly(str(tmp_path / "in"), tmp_path / "set", label_field="y")
    assert sentence in str(error.value)


def test_lists_that_are_written_as_texts() -> None:
    assert unpacked("['a', 'b']") == ["a", "b"]
    assert unpacked('["a"]') == ["a"]
    assert unpacked("[0, 1, 1]") == [0, 1, 1]
    assert unpacked("[0. 1.\n 1.]") == [0.0, 1.0, 1.0]
    assert unpacked("[unclear]") == "[unclear]"
    assert unpacked("[" * 10**5 + "]") == "[" * 10**5 + "]"
    assert missing(unpacked("[]"))
    assert missing(unpacked("[-1, -1]"))


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text("[]'-1.0aN", max_size=6)
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text("a"), v, max_size=1))


@settings(deadline=None)
@given(st.lists(VALUES, min_size=1, max_size=4), st.sampled_from([(), ("neg", "pos")]))
def test_any_value_is_labels_or_one_sentence(values: list[Any], classes: tuple[str, ...]) -> None:
    field = LabelField("y", lambda: values, classes)
    for value in values:
        try:
            found = field.names(value, "rows.jsonl, line 1")
        except DataError as error:
            assert str(error).startswith("rows.jsonl, line 1")
            continue
        assert found is None or (isinstance(found, str) and found) or all(isinstance(name, str) for name in found)
        again = LabelField("y", lambda: values, classes)  # in another process, or after a stop
        assert again.names(value, "") == found


def test_a_label_in_very_many_lists() -> None:
    deep: Any = []
    for _ in range(900):
        deep = [deep]
    with pytest.raises(DataError, match="line 1 has the label"):
        LabelField("y", lambda: [deep]).names(deep, "line 1")


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=1, max_size=6))
def test_label_numbers_are_read_as_such_or_not_at_all(rows: list[list[int]]) -> None:
    """Lists without a repeated number are never flags, whatever the order in which they are read."""
    rows = [list(dict.fromkeys(row)) for row in rows]
    field = LabelField("y", lambda: rows)
    for row in rows:
        try:
            assert field.names(row, "here") == [str(number) for number in row]
        except DataError as error:
            assert "may be label numbers" in str(error)
            assert {len(row) for row in rows} == {2}


@settings(deadline=None)
@given(st.integers(3, 6), st.data())
def test_flags_of_three_labels_or_more_are_always_flags(width: int, data: st.DataObject) -> None:
    flag = data.draw(st.sampled_from([st.integers(0, 1), st.booleans(), st.sampled_from([0.0, 1.0])]))
    rows = data.draw(st.lists(st.lists(flag, min_size=width, max_size=width), min_size=1, max_size=5))
    field = LabelField("y", lambda: rows)
    assert [field.names(row, "here") for row in rows] == [[str(i) for i, f in enumerate(row) if f] for row in rows]


@pytest.mark.parametrize("form", [form for form in FORMS if form != "csv"])
def test_rows_without_text_and_fields_within_fields(form: str, tmp_path: Path) -> None:
    texts: list[Any] = ["one", None, "", "two"]
    for name in ("train", "val"):
        rows = [{"a": {"b": text, "y": {"z": number % 2}}} for number, text in enumerate(texts)]
        WRITERS[form](tmp_path / f"in/{name}.{form}", rows)
    settings: dict[str, Any] = {"text_field": "a.b", "label_field": "a.y.z"}
    dataset = quietly(str(tmp_path / "in"), tmp_path / "set", **settings)
    assert contents(dataset, "train") == [("one", ["0"]), ("two", ["1"])]
    assert dataset.manifest["left_out"] == {"text": 4}
    with pytest.raises(DataError, match="2 has no text"):
        quietly(str(tmp_path / "in"), tmp_path / "strict", strict=True, **settings)
    write_jsonl(
        tmp_path / "numbers/train.jsonl", [{"text": text, "y": 1} for text in ("a", 3, math.nan, "b", [], True)]
    )
    assert quietly(str(tmp_path / "numbers"), tmp_path / "n", label_field="y").manifest["left_out"] == {"text": 4}


@pytest.mark.parametrize("form", FORMS)
def test_test_documents_may_be_published_without_labels(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder_of(tmp_path / "in", form, train=["a", "b"], dev=["a"])
    WRITERS[form](tmp_path / f"in/test.{form}", [{"text": "one"}, {"text": "two"}])
    dataset = quietly(str(tmp_path / "in"), tmp_path / "set", label_field="y")
    assert list(dataset.splits) == ["train", "val"]
    says = capsys.readouterr().out
    assert "2 left out without a label" in says
    assert f"test is test.{form}, without labelled documents" in says
    WRITERS[form](tmp_path / f"in/dev.{form}", [{"text": "one"}, {"text": "two"}])
    with pytest.raises(DataError, match="has no field 'y', only text.*: name the field of labels with --label-field"):
        quietly(str(tmp_path / "in"), tmp_path / "other", label_field="y")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("values", [[0.0, 1.0, math.nan, -1.0, 2.0], [[0, 1], [1, 0], [0, 0]], [["a"], ["a", "b"], []]])
def test_parts_are_the_whole(form: str, values: list[Any], tmp_path: Path) -> None:
    if form == "csv":
        values = [str(value) for value in values]
    folder_of(tmp_path / "in", form, train=values * 5, test=values)
    whole = visible(quietly(str(tmp_path / "in"), tmp_path / "whole", label_field="y", workers=3).path)
    for part in (3, 1, 2):
        prepare(str(tmp_path / "in"), out=tmp_path / "set", tokenizer="byte", label_field="y", part=f"{part}/3")
    assert visible(prepare("text", out=tmp_path / "set", merge=True)) == whole


def test_more_parts_than_documents(tmp_path: Path) -> None:
    folder_of(tmp_path / "in", "jsonl", train=["a", "b"], val=["a"])
    whole = visible(quietly(str(tmp_path / "in"), tmp_path / "whole", label_field="y").path)
    for part in range(1, 5):
        prepare(str(tmp_path / "in"), out=tmp_path / "set", tokenizer="byte", label_field="y", part=f"{part}/4")
    assert visible(prepare("text", out=tmp_path / "set", merge=True)) == whole
    LabeledDataset(tmp_path / "set").verify()


# -- a folder for each label


def write_texts(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name, encoding="utf-8")
    return root


@pytest.mark.parametrize(
    "name", ["{split}/{label}/{n}.txt", "20news-by-{split}/{label}/5306{n}", "{label}/{split}/{n}.txt"]
)
def test_a_folder_for_each_label(name: str, tmp_path: Path) -> None:
    places = [(split, label, n) for split in ("train", "test") for label in ("sci.med", "rec.autos") for n in range(3)]
    root = tmp_path / "in"
    write_texts(root, *(name.format(split=split, label=label, n=n) for split, label, n in places))
    write_texts(root, "README.txt", "train/unsup/1.txt", "train/sci.med/vocab.npz")
    dataset = quietly(str(root), tmp_path / "set", label_field="folder")
    assert dataset.labels == ["rec.autos", "sci.med"]
    assert [len(split) for split in dataset.splits.values()] == [5, 1, 6]
    for split in dataset.splits:
        for text, labels in contents(dataset, split):
            assert labels[0] in text
            assert ("test" in text) == (split == "test")
    assert [text.removesuffix(".txt")[-1] for text, _ in contents(dataset, "test")] == list(
        "001122"
    )  # labels take turns
    assert dataset.manifest["reading"]["skipped"] == {
        "without labelled documents": {"files": 2, "names": ["README.txt", "train/sci.med/vocab.npz"]},
        "unlabelled by name": {"files": 1, "names": ["train/unsup/1.txt"]},
    }


def test_a_folder_for_each_label_without_splits_and_what_is_refused(tmp_path: Path) -> None:
    root = write_texts(tmp_path / "in", *(f"{label}/{n}.txt" for label in ("pos", "neg") for n in range(3)))
    dataset = quietly(str(root), tmp_path / "set", label_field="folder")
    assert [len(split) for split in dataset.splits.values()] == [5, 1]
    with pytest.raises(DataError, match="a folder of text files for each label is read with --label-field folder"):
        quietly(str(root), tmp_path / "other", label_field="label")
    write_texts(root, "dev/1.txt")
    write_texts(tmp_path / "flat", "1.txt", "2.txt")
    with pytest.raises(DataError, match=r"flat has no training documents: --label-field folder reads text files"):
        quietly(str(tmp_path / "flat"), tmp_path / "other", label_field="folder")


def test_agnews_as_it_was_released(tmp_path: Path) -> None:
    rows = [{"Class Index": 1 + n % 4, "Title": f"T{n}", "Description": f"D{n}"} for n in range(8)]
    for name in ("train", "test"):
        write_jsonl(tmp_path / f"in/{name}.jsonl", rows)
    dataset = quietly("agnews", tmp_path / "set", source=tmp_path / "in")
    assert contents(dataset, "test")[0] == ("T0\nD0", ["World"])
    assert contents(dataset, "test")[3] == ("T3\nD3", ["Sci/Tech"])
    write_jsonl(tmp_path / "in/test.jsonl", [{**rows[0], "Class Index": 0}])
    with pytest.raises(DataError, match="line 1 has the label 0: .*; the classes are 1 to 4"):
        quietly("agnews", tmp_path / "other", source=tmp_path / "in")


def test_looking_at_all_rows_reads_the_field_of_labels_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of(tmp_path / "in", "parquet", train=[[0, 1, 1]] * 4, val=[[0, 0, 1]])
    columns: list[str | None] = []
    read = files.read_rows

    def watched(paths: list[Path], reading: Any, column: str | None = None) -> Any:
        columns.append(column)
        return read(paths, reading, column)

    monkeypatch.setattr(files, "read_rows", watched)
    corpus = open_corpus("text", tmp_path / "in", label_field="y")
    assert [document.labels for document in corpus.split()] == [["1", "2"]] * 4 + [["2"]]
    assert columns == [None, None, "y"]  # train, val, and once to look
