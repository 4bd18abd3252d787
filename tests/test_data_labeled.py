"""Labelled documents: every form they come in, the label space, what is stored, and the batches that are read."""

import gzip
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import textwrap
import time
import types
from collections import Counter
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from interrupted import Killed, killed_before
from labelled import Rows, contents, quietly, visible, write_jsonl, write_parquet

from gptlab import cli, locks
from gptlab.data.corpora import LABELED, TEXT, constructs
from gptlab.data.corpora.base import Corpus, LabeledCorpus, Row, Wanted
from gptlab.data.labeled import LabeledDataset, LabeledSplit, bucket_length, constant_loss
from gptlab.data.prepare import pipeline, prepare
from gptlab.data.shards import Dataset
from gptlab.errors import DataError

# Multi-label rows of three splits: b is the commonest, d is in val and test alone, e in test alone.
TRAIN = [
    {"text": "one", "tags": ["b", "a"]},
    {"text": "two na\u00efve words", "tags": ["b"]},
    {"text": "three", "tags": ["c", "b", "b"]},
    {"text": "nothing said of it", "tags": []},
]
VAL = [{"text": "four", "tags": ["a", "d"]}, {"text": "five", "tags": ["b"]}]
TEST = [{"text": "six", "tags": ["e", "d"]}, {"text": "", "tags": ["a"]}]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for name, rows in (("train", TRAIN), ("dev", VAL), ("test", TEST)):
        write_jsonl(tmp_path / f"source/{name}.jsonl", rows)
    return tmp_path / "source"


@pytest.fixture
def dataset(source: Path, tmp_path: Path) -> LabeledDataset:
    return quietly(str(source), tmp_path / "set", label_field="tags")


# -- what is stored


def test_documents_come_back_with_their_labels(dataset: LabeledDataset) -> None:
    assert list(dataset.splits) == ["train", "val", "test"]
    assert contents(dataset, "train") == [("one", ["a", "b"]), ("two na\u00efve words", ["b"]), ("three", ["b", "c"])]
    assert contents(dataset, "val") == [("four", ["a", "d"]), ("five", ["b"])]
    assert contents(dataset, "test") == [("six", ["d", "e"])]
    assert dataset.splits["train"].lengths.tolist() == [3, 16, 5]  # bytes, and no specials among them


def test_the_label_space_is_that_of_training_and_others_follow(dataset: LabeledDataset) -> None:
    assert dataset.labels == ["a", "b", "c", "d", "e"]
    assert dataset.n_train_labels == 3
    assert dataset.train_counts.tolist() == [1, 3, 1, 0, 0]
    assert dataset.manifest["unseen_labels"] == 2
    assert dataset.multi
    assert dataset.manifest["left_out"] == {"a label": 1, "text": 1}


def test_unseen_labels_come_last_even_where_they_sort_first(tmp_path: Path) -> None:
    for name, label in (("train", "m"), ("val", "a"), ("test", "z")):
        write_jsonl(tmp_path / f"in/{name}.jsonl", [{"text": "t", "y": label}])
    dataset = quietly(str(tmp_path / "in"), tmp_path / "set", label_field="y")
    assert dataset.labels == ["m", "a", "z"]
    assert dataset.n_train_labels == 1


def test_numbered_classes_are_sorted_as_numbers(tmp_path: Path) -> None:
    rows = [{"text": f"t{number}", "y": number} for number in (10, 9, 2, 10, 11, 2, 9, 11)]
    write_jsonl(tmp_path / "in/train.jsonl", rows)
    write_jsonl(tmp_path / "in/val.jsonl", rows)
    dataset = quietly(str(tmp_path / "in"), tmp_path / "set", label_field="y")
    assert dataset.labels == ["2", "9", "10", "11"]
    assert not dataset.multi
    assert dataset.splits["train"].targets(np.arange(4), 4).tolist() == [2, 1, 0, 2]


def test_the_same_source_gives_the_same_files(source: Path, tmp_path: Path) -> None:
    one = quietly(str(source), tmp_path / "one", label_field="tags", tokenizer="bpe-260")
    two = quietly(str(source), tmp_path / "two", label_field="tags", tokenizer="bpe-260")
    files = sorted(path.name for path in one.path.iterdir() if path.name != ".lock")
    assert len(files) == 3 * 4 + 2
    assert [(one.path / name).read_bytes() for name in files] == [(two.path / name).read_bytes() for name in files]
    assert one.fingerprint() == two.fingerprint()
    write_jsonl(source / "dev.jsonl", VAL[:1])
    assert quietly(str(source), tmp_path / "three", label_field="tags", tokenizer="bpe-260").fingerprint() not in (
        one.fingerprint(),
        "",
    )


def test_a_vocabulary_is_learnt_from_training_alone(source: Path, tmp_path: Path) -> None:
    first = quietly(str(source), tmp_path / "one", label_field="tags", tokenizer="bpe-260")
    write_jsonl(source / "dev.jsonl", [{"text": "zqzqzqzq " * 100, "tags": ["a"]}])
    second = quietly(str(source), tmp_path / "two", label_field="tags", tokenizer="bpe-260")
    assert first.tokenizer.spec() == second.tokenizer.spec()
    write_jsonl(source / "train.jsonl", [{"text": "zqzqzqzq " * 100, "tags": ["a"]}])
    third = quietly(str(source), tmp_path / "three", label_field="tags", tokenizer="bpe-260")
    assert third.tokenizer.spec() != second.tokenizer.spec()


def test_char_has_an_id_for_every_character(source: Path, tmp_path: Path) -> None:
    dataset = quietly(str(source), tmp_path / "set", label_field="tags", tokenizer="char")
    assert contents(dataset, "val")[1][0] == "five"  # no v in training


def test_verify_finds_a_changed_file(dataset: LabeledDataset) -> None:
    dataset.verify()
    file = dataset.path / "val.labels.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match="val.labels.npy is damaged"):
        LabeledDataset(dataset.path).verify()


# -- forms


ACTS = [
    {"celex_id": "1", "title": "T", "header": "H1", "recitals": "R1", "main_body": ["M1", "M2"], "attachments": "A1"},
    {"celex_id": "2", "title": "T", "header": "H2", "recitals": None, "main_body": ["M3"], "attachments": ""},
    {"celex_id": "3", "title": "T", "header": "H3", "recitals": "R3", "main_body": ["M4"], "attachments": ["A", "B"]},
]
ACT_TEXTS = ["H1\nR1\nM1\nM2\nA1", "H2\nM3", "H3\nR3\nM4\nA\nB"]
CONCEPTS = [["2", "10"], ["c_1"], []]


@pytest.mark.parametrize("form", ["json", "jsonl.gz", "parquet", "text and parquet", "hub copy"])
def test_eurlex_forms(form: str, tmp_path: Path) -> None:
    root = tmp_path / "in"
    for split in ("train", "dev", "test"):
        rows: Rows = [{**act, "concepts": concepts} for act, concepts in zip(ACTS, CONCEPTS, strict=True)]
        if form == "json":  # the original release, a file an act
            for act in rows:
                (root / "dataset" / split).mkdir(parents=True, exist_ok=True)
                (root / "dataset" / split / f"{act['celex_id']}.json").write_text(json.dumps(act), encoding="utf-8")
            (root / "EURLEX57K.json").write_text(json.dumps({"2": {"label": "two", "parents": []}}), encoding="utf-8")
        elif form == "jsonl.gz":
            write_jsonl(root / f"{split}.jsonl.gz", rows)
            (root / "eurovoc_labels.json").write_text("{}", encoding="utf-8")
        elif form == "parquet":
            rows = [{**row, "attachments": "".join(row["attachments"])} for row in rows]  # a column has one type
            write_parquet(root / f"{split}-00000-of-00001.parquet", rows)
        else:
            rows = [
                {"celex_id": "1", "text": text, "eurovoc_concepts": concepts}
                for text, concepts in zip(ACT_TEXTS, CONCEPTS, strict=True)
            ]
            name = {"dev": "validation"}.get(split, split)
            inner = "data" if form == "hub copy" else "."
            write_parquet(root / inner / f"{name}-00000-of-00001.parquet", rows)
            if form == "hub copy":
                write_parquet(root / "eurovoc_concepts/train-00000-of-00001.parquet", [{"concept": "x"}])
    dataset = quietly("eurlex57k", tmp_path / "set", source=root)
    assert dataset.labels == ["10", "2", "c_1"]
    for split in ("train", "val", "test"):
        assert contents(dataset, split) == [(ACT_TEXTS[0], ["10", "2"]), (ACT_TEXTS[1], ["c_1"])]
    assert dataset.manifest["left_out"] == {"a label": 3}


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_agnews_forms(form: str, tmp_path: Path) -> None:
    write = write_parquet if form == "parquet" else write_jsonl
    rows = [{"text": f"story {number}", "label": number % 4} for number in range(100)]
    write(tmp_path / f"in/data/train-00000.{form}", rows)
    write(tmp_path / f"in/data/test-00000.{form}", rows[:3])
    dataset = quietly("agnews", tmp_path / "set", source=tmp_path / "in")
    assert dataset.labels == ["Business", "Sci/Tech", "Sports", "World"]
    assert not dataset.multi
    assert contents(dataset, "test") == [("story 0", ["World"]), ("story 1", ["Sports"]), ("story 2", ["Business"])]
    assert len(dataset.splits["val"]) == 5  # one of every 20, as there is no such split
    both = [text for split in ("train", "val") for text, _ in contents(dataset, split)]
    assert sorted(both) == sorted(row["text"] for row in rows)


@pytest.mark.parametrize("inside", [".", "aclImdb"])
def test_the_classic_layout_of_imdb(inside: str, tmp_path: Path) -> None:
    root = tmp_path / "in" / inside
    for part in ("train", "test"):
        for label in ("pos", "neg", "unsup"):
            (root / part / label).mkdir(parents=True)
            for number in range(12):
                (root / part / label / f"{number}_9.txt").write_text(f"{part} {label} {number}", encoding="utf-8")
    dataset = quietly("imdb", tmp_path / "set", source=tmp_path / "in")
    assert dataset.labels == ["neg", "pos"]
    assert [len(split) for split in dataset.splits.values()] == [23, 1, 24]
    for split in dataset.splits:
        assert all(text.split()[1:2] == labels for text, labels in contents(dataset, split))
    assert all(text.startswith("test") for text, _ in contents(dataset, "test"))


def test_imdb_as_two_folders_has_no_test_split(tmp_path: Path) -> None:
    for label in ("pos", "neg"):
        (tmp_path / "in" / label).mkdir(parents=True)
        for number in range(3):
            (tmp_path / "in" / label / f"{number}.txt").write_text(f"{label} {number}", encoding="utf-8")
    dataset = quietly("imdb", tmp_path / "set", source=tmp_path / "in")
    assert {split: len(part) for split, part in dataset.splits.items()} == {"train": 5, "val": 1}


def test_imdb_tables_leave_unsupervised_reviews_alone(tmp_path: Path) -> None:
    for name, label in (("train", 1), ("test", 0), ("unsupervised", -1)):
        rows = [{"text": f"{name} {number}", "label": label} for number in range(3)]
        write_parquet(tmp_path / f"in/plain_text/{name}-00000-of-00001.parquet", rows)
    dataset = quietly("imdb", tmp_path / "set", source=tmp_path / "in")
    left = ["plain_text/unsupervised-00000-of-00001.parquet"]
    assert dataset.manifest["reading"]["skipped"] == {"unlabelled by name": {"files": 1, "names": left}}
    assert dataset.labels == ["pos", "neg"]  # neg is in test alone
    assert {split: len(part) for split, part in dataset.splits.items()} == {"train": 2, "val": 1, "test": 3}


def test_one_file_with_other_fields(tmp_path: Path) -> None:
    rows = [{"body": f"b{number}", "kind": "xy"[number % 2]} for number in range(40)]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    dataset = quietly(str(tmp_path / "rows.json"), tmp_path / "set", text_field="body", label_field="kind")
    assert {split: len(part) for split, part in dataset.splits.items()} == {"train": 38, "val": 2}
    assert dataset.labels == ["x", "y"]
    assert dataset.manifest["corpus"] == "text"
    other = quietly("text", tmp_path / "other", source=tmp_path / "rows.json", text_field="body", label_field="kind")
    assert other.fingerprint() == dataset.fingerprint()


def test_held_out_documents_are_the_same_everywhere(tmp_path: Path) -> None:
    rows = [{"text": f"{number}", "y": "a"} for number in range(100)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    dataset = quietly(str(tmp_path / "rows.jsonl"), tmp_path / "set", label_field="y")
    # By blake2b("document 0") and so on: these numbers may never change.
    assert [text for text, _ in contents(dataset, "val")] == ["7", "29", "46", "70", "94"]
    more = quietly(str(tmp_path / "rows.jsonl"), tmp_path / "more", label_field="y", val_fraction=0.25)
    assert len(more.splits["val"]) == 25


def test_max_documents_counts_each_split(source: Path, tmp_path: Path) -> None:
    write_jsonl(source / "train.jsonl", [TRAIN[-1], *TRAIN])  # what has no label does not count
    dataset = quietly(str(source), tmp_path / "set", label_field="tags", max_documents=1)
    assert [len(split) for split in dataset.splits.values()] == [1, 1, 1]
    assert dataset.labels == ["a", "b", "d", "e"]


@pytest.mark.parametrize(
    ("corpus", "given_source", "asked"),
    [
        ("eurlex57k", None, ("pietrolesci/eurlex-57k", None)),
        ("eurlex57k", "NLP-AUEB/eurlex", ("NLP-AUEB/eurlex", "eurlex57k")),
        ("agnews", None, ("fancyzhx/ag_news", None)),
        ("imdb", None, ("stanfordnlp/imdb", None)),
    ],
)
def test_the_hub(
    corpus: str,
    given_source: str | None,
    asked: tuple[str, str | None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    value: Any = ["7"] if corpus == "eurlex57k" else 1
    field = "eurovoc_concepts" if corpus == "eurlex57k" else "label"
    rows = [{"text": f"document {number}", field: value} for number in range(4)]
    hub = {"train": rows, "validation": rows[:2], "test": rows[:1], "unsupervised": [{"text": "no", field: -1}]}
    calls = []

    def load_dataset(name: str, configuration: str | None) -> dict[str, Rows]:
        calls.append((name, configuration))
        return hub

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    dataset = quietly(corpus, tmp_path / "set", source=given_source)
    assert calls == [asked]
    left = {"files": 1, "names": ["unsupervised"]}
    assert dataset.manifest["reading"]["skipped"] == {"that is a split of another kind than train, val and test": left}
    assert [len(split) for split in dataset.splits.values()] == [4, 2, 1]
    assert dataset.labels == {"eurlex57k": ["7"], "agnews": ["Sports"], "imdb": ["pos"]}[corpus]

    def offline(name: str, configuration: str | None) -> dict[str, Rows]:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=offline))
    with pytest.raises(DataError, match=r"could not be read \(ConnectionError: no route\): connect to the network, or"):
        quietly(corpus, tmp_path / "offline", source=given_source)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_corpus_is_a_function_and_a_line_in_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_toy_text(wanted: Wanted) -> Corpus:
        return Corpus(wanted.name, {"made": "here"}, lambda: (("", f"text {number}") for number in range(40)))

    def open_toy_labels(wanted: Wanted) -> LabeledCorpus:
        rows = [Row(f"text {number}", "ab"[number % 2], f"row {number}") for number in range(40)]
        return LabeledCorpus(wanted.name, {"made": "here"}, lambda: {"train": rows, "test": rows[:4]})

    monkeypatch.setitem(TEXT, "toy-text", open_toy_text)
    monkeypatch.setitem(LABELED, "toy-labels", open_toy_labels)
    manifest = Dataset(prepare("toy-text", out=tmp_path / "text", tokenizer="byte")).manifest
    assert manifest["source"] == {"made": "here"}
    assert [manifest["splits"][split]["documents"] for split in ("train", "val")] == [38, 2]
    with pytest.raises(DataError, match="the corpus toy-text has no files to share out: prepare it without --part"):
        prepare("toy-text", out=tmp_path / "part", tokenizer="byte", part="1/2")
    whole = visible(quietly("toy-labels", tmp_path / "whole").path)
    for part in ("1/2", "2/2"):
        quietly("toy-labels", tmp_path / "parts", part=part)
    assert visible(prepare("toy-labels", out=tmp_path / "parts", merge=True)) == whole
    assert [len(split) for split in LabeledDataset(tmp_path / "parts").splits.values()] == [38, 2, 4]


# -- syntax constructs


FUNCTIONS = '''
import os

def plain(path):
    """Nothing but a docstring and a call in it."""
    os.fsdecode(path)
    os.fsencode(path)
    print("as long as a document has to be, which is a hundred and twenty characters")

@staticmethod
def busy(items, *rest):
    """A form feed follows.\f"""
    for item in items:
        try:
            yield f"{item}"
        finally:
            continue
    else:
        values = [lambda: value for value in rest[1:] if 0 < value < 2]
        with open(os.devnull, "rb") as file:
            return print(*values, file=file)

def short(): return 1

class Thing:
    async def wait(self, other):
        global state
        state = await other if other else {key: None async for key in self.things}
        while state := (state and state - 1):
            assert state not in {1, 2, 3}, "long enough to be taken in as a document of its own"
'''


def test_functions_are_labelled_with_their_syntax(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"module{number}.py" for number in range(60)]
    files = [(name, f"def own{name[:-3]}(x):\n    return {'x + ' * 40}x\n") for name in names]
    broken = [("broken.py", "def f(:"), ("pydoc_data/topics/for", "a" * 200)]
    monkeypatch.setattr(constructs, "LONGEST", 6000)
    monkeypatch.setattr(
        constructs, "stdlib_files", lambda: iter([("a.py", FUNCTIONS), ("b.py", FUNCTIONS), *broken, *files])
    )
    documents = list(constructs.documents())
    assert [labels for _, _, labels in documents[:3]] == [
        [],
        [
            "chained-comparison",
            "continue",
            "decorator",
            "f-string",
            "finally",
            "for",
            "lambda",
            "list-comprehension",
            "loop-else",
            "return",
            "slice",
            "starred",
            "try",
            "with",
            "yield",
        ],
        ["assert", "await", "conditional-expression", "dict-comprehension", "global", "walrus", "while"],
    ]
    assert documents[1][1].startswith("@staticmethod\ndef busy(")
    assert documents[1][1].endswith("return print(*values, file=file)\n")
    assert documents[2][1].startswith("async def wait(self, other):\n    global state")  # dedented
    assert len(documents) == 3 + 60  # b.py has the same functions again
    sizes = Counter(split for split, _, _ in documents[3:])
    assert sizes == {"train": 46, "val": 5, "test": 9}  # by blake2b of the name: these may never change
    dataset = quietly("constructs", tmp_path / "set")
    assert dataset.multi
    assert dataset.manifest["left_out"] == {"a label": 1}
    assert sum(len(split) for split in dataset.splits.values()) == 62


def test_the_corpus_constructs_of_this_python() -> None:
    split_of: dict[str, str] = {}
    counts: Counter[str] = Counter()
    wanted = ("_collections_abc.py", "abc.py", "argparse.py", "ast.py", "asyncio/base_events.py", "asyncio/locks.py")
    first = itertools.takewhile(lambda item: item[0] <= wanted[-1], constructs.stdlib_files())
    for module, text in [item for item in first if item[0] in wanted]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(constructs, "stdlib_files", lambda module=module, text=text: iter([(module, text)]))
            documents = list(constructs.documents())
        assert len({split for split, _, _ in documents}) <= 1  # a module is in one split
        split_of.update((module, split) for split, _, _ in documents)
        for _, source, labels in documents:
            compile("class _:\n" + textwrap.indent(source, "    "), module, "exec")  # whole functions
            counts.update(labels)
    assert len(set(split_of.values())) > 1
    assert len(counts) > 15
    assert counts["return"] > 20 * counts["set-comprehension"]
    assert 25 <= len({*constructs.NODES.values()}) + 5 <= 42


# -- tokenizers and specials


def hf_tokenizer(path: Path, specials: list[str]) -> Path:
    """A trained byte-level tokenizer.json, and the two files of the same vocabulary beside it."""
    fast = tokenizers.Tokenizer(tokenizers.models.BPE())
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280, initial_alphabet=alphabet, show_progress=False, special_tokens=specials
    )
    fast.train_from_iterator(["one two three four five six words and words"] * 3, trainer)
    if len(specials) > 2:  # as in a classifier's tokenizer.json: encoding would add them, and cut
        fast.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{specials[0]} $A {specials[2]}",
            special_tokens=[(token, fast.token_to_id(token)) for token in (specials[0], specials[2])],
        )
        fast.enable_truncation(4)
    path.mkdir(parents=True)
    fast.save(str(path / "tokenizer.json"))
    fast.model.save(str(path))
    return path


ROBERTA = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
BERT = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"]


@pytest.mark.parametrize(
    ("specials", "form", "ids"),
    [
        (ROBERTA, "file", (0, 2, 1, 280)),
        (ROBERTA, "folder", (0, 2, 1, 280)),
        (ROBERTA, "vocabulary", (0, 2, 1, 280)),
        (ROBERTA, "hub", (0, 2, 1, 280)),
        (BERT, "file", (0, 2, 1, 280)),
        (["<|endoftext|>"], "file", (280, 281, 282, 283)),
        ([], "folder", (280, 281, 282, 283)),
    ],
)
def test_specials_of_hugging_face_tokenizers(
    specials: list[str],
    form: str,
    ids: tuple[int, ...],
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = hf_tokenizer(tmp_path / "made" / "some-base", specials)
    name = {"file": str(folder / "tokenizer.json"), "hub": "Somebody/some-base"}.get(form, str(folder))
    if form == "vocabulary":
        (folder / "tokenizer.json").unlink()
    if form == "hub":
        hub = {"Somebody/some-base": str(folder)}
        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, allow_patterns: hub[repo])
    write_jsonl(source / "test.jsonl", [{"text": "a document of <s>more</s> than four [SEP] tokens", "tags": ["a"]}])
    monkeypatch.chdir(tmp_path)
    dataset = LabeledDataset(prepare("text", source=source, tokenizer=name, label_field="tags"))
    assert dataset.path == Path("data/text-tokenizer" if form == "file" else "data/text-some-base")
    assert (dataset.cls, dataset.sep, dataset.pad, dataset.vocab_size) == ids
    assert dataset.manifest["tokenizer"]["vocab_size"] == 280
    # the text comes back whole: nothing was cut, and no special was added or taken out of it
    assert contents(dataset, "test")[0][0] == "a document of <s>more</s> than four [SEP] tokens"
    tokens = np.load(dataset.path / "test.tokens.npy")
    assert not np.isin(tokens, [dataset.cls, dataset.sep, dataset.pad]).any()
    plain = tokenizers.Tokenizer.from_str(json.dumps(dataset.tokenizer.hf_json()))
    assert np.load(dataset.path / "train.tokens.npy")[: dataset.splits["train"].lengths[0]].tolist() == (
        plain.encode("one", add_special_tokens=False).ids
    )


def test_tokenizers_without_specials_get_three_ids(dataset: LabeledDataset, source: Path, tmp_path: Path) -> None:
    assert (dataset.cls, dataset.sep, dataset.pad, dataset.vocab_size) == (257, 258, 259, 260)
    gpt2 = quietly(str(source), tmp_path / "gpt2", label_field="tags", tokenizer="gpt2")
    assert (gpt2.cls, gpt2.sep, gpt2.pad, gpt2.vocab_size) == (50257, 50258, 50259, 50260)
    assert contents(gpt2, "train")[1][0] == "two na\u00efve words"


def test_large_vocabularies_take_32_bits(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptlab.data.tokenizers.ByteTokenizer.vocab_size", 65534)  # and three specials more
    dataset = quietly(str(source), tmp_path / "set", label_field="tags")
    assert np.load(dataset.path / "train.tokens.npy").dtype == np.uint32
    assert contents(dataset, "train")[0][0] == "one"


def test_no_tokenizer_and_no_network(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(repo: str, allow_patterns: list[str]) -> str:
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(DataError, match=r"no tokenizer 'nobody/base' here, .*\(OSError\).* which needs the network"):
        quietly(str(source), tmp_path / "set", label_field="tags", tokenizer="nobody/base")
    with pytest.raises(DataError, match=r"no tokenizer 'made/tokenizer.json': use gpt2, byte"):
        quietly(str(source), tmp_path / "set", label_field="tags", tokenizer="made/tokenizer.json")
    with pytest.raises(DataError, match=r"has no tokenizer: neither a tokenizer.json nor vocab.json and merges.txt"):
        quietly(str(source), tmp_path / "set", label_field="tags", tokenizer=str(source))
    (tmp_path / "bpe").mkdir()
    (tmp_path / "bpe/vocab.json").write_text("{}", encoding="utf-8")
    (tmp_path / "bpe/merges.txt").write_text("a b\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"merges.txt are not a vocabulary of byte-level BPE"):
        quietly(str(source), tmp_path / "set", label_field="tags", tokenizer=str(tmp_path / "bpe"))


# -- batches


@pytest.mark.parametrize(
    ("longest", "block_size", "length"),
    [
        (2, 512, 64),
        (64, 512, 64),
        (65, 512, 128),
        (128, 512, 128),
        (129, 512, 256),
        (257, 512, 384),
        (384, 512, 384),
        (385, 512, 512),
        (512, 512, 512),
        (3, 100, 16),
        (17, 100, 32),
        (33, 100, 56),
        (57, 100, 80),
        (81, 100, 100),
        (2, 10, 8),
        (9, 10, 10),
        (2, 2, 2),
        (5, 6, 6),
    ],
)
def test_lengths_of_batches_are_few(longest: int, block_size: int, length: int) -> None:
    assert bucket_length(longest, block_size) == length


def in_memory(documents: list[list[int]], labels: list[list[int]], multi: bool = True) -> LabeledSplit:
    arrays = {
        "tokens": np.array([token for document in documents for token in document], np.uint16),
        "offsets": np.cumsum([0, *map(len, documents)]),
        "labels": np.array([label for row in labels for label in row], np.int32),
        "label_offsets": np.cumsum([0, *map(len, labels)]),
    }
    return LabeledSplit(arrays, multi, cls=101, sep=102, pad=103)


@given(st.data())
def test_a_batch_is_its_documents_cut_framed_and_padded(data: st.DataObject) -> None:
    documents = data.draw(st.lists(st.lists(st.integers(0, 99), max_size=40), min_size=1, max_size=8))
    chosen = data.draw(st.lists(st.integers(0, len(documents) - 1), min_size=1, max_size=6))
    block_size = data.draw(st.integers(2, 48))
    split = in_memory(documents, [[0]] * len(documents))
    tokens, lengths = split.batch(np.array(chosen), block_size)
    rows = [[101, *documents[number][: block_size - 2], 102] for number in chosen]
    assert tokens.dtype == lengths.dtype == np.int64
    assert tokens.shape[1] == bucket_length(max(map(len, rows)), block_size) <= block_size
    assert lengths.tolist() == [len(row) for row in rows]
    assert tokens.tolist() == [row + [103] * (tokens.shape[1] - len(row)) for row in rows]


@given(st.data())
def test_targets_are_the_labels_below_n(data: st.DataObject) -> None:
    labels = data.draw(st.lists(st.sets(st.integers(0, 9), min_size=1), min_size=1, max_size=6))
    n_labels = data.draw(st.integers(1, 10))
    split = in_memory([[1]] * len(labels), [sorted(row) for row in labels])
    numbers = np.arange(len(labels))[::-1]
    targets = split.targets(numbers, n_labels)
    assert targets.dtype == np.float32
    assert targets.tolist() == [[float(label in labels[number]) for label in range(n_labels)] for number in numbers]
    single = in_memory([[1]] * len(labels), [[min(row)] for row in labels], multi=False).targets(numbers, n_labels)
    assert single.dtype == np.int64
    assert single.tolist() == [min(labels[n]) if min(labels[n]) < n_labels else -1 for n in numbers]


def test_the_loss_of_a_constant(dataset: LabeledDataset, tmp_path: Path) -> None:
    # Of 3 training documents a and c are in one each and b is in all; d and e count for nothing.
    third = -(math.log(1 / 3) / 3 + math.log(2 / 3) * 2 / 3)
    assert constant_loss(dataset) == pytest.approx((third + 0 + third) / 3)
    rows = [{"text": "t", "y": label} for label in "aaab"]
    write_jsonl(tmp_path / "classes/train.jsonl", rows)
    write_jsonl(tmp_path / "classes/val.jsonl", [{"text": "t", "y": "c"}])
    single = quietly(str(tmp_path / "classes"), tmp_path / "single", label_field="y")
    assert constant_loss(single) == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))


# -- reruns and kills


def test_the_same_again_is_left_and_another_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "set"
    dataset = quietly(str(source), out, label_field="tags")
    says = capsys.readouterr().out
    assert says == (
        f"{out}: 3 train, 2 val, 1 test documents, 35 tokens, 5 labels (2 never in train), 1.67 a document, "
        "1 left out without a label, 1 left out without text\n"
        "  train is train.jsonl\n  val is dev.jsonl\n  test is test.jsonl\n"
    )
    before = (out / "manifest.json").stat().st_mtime_ns
    assert quietly(str(source), out, label_field="tags").fingerprint() == dataset.fingerprint()
    assert "already prepared, 3 train" in capsys.readouterr().out
    assert (out / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(DataError, match=r"was made with tokenizer.name = byte \(now gpt2\)"):
        quietly(str(source), out, label_field="tags", tokenizer="gpt2")
    write_jsonl(source / "dev.jsonl", VAL * 2)
    with pytest.raises(DataError, match=r"was made with source.listing_sha256"):
        quietly(str(source), out, label_field="tags")


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """A folder of 330 documents with up to 3 labels; some have none, some labels are in one split alone."""
    for name, count in (("train", 240), ("dev", 60), ("test", 30)):
        rows = [
            {
                "text": f"{name} {number}: " + "na\u00efve word " * (number % 5 + 1),
                "tags": [f"{name[0] if label % 9 == 0 else ''}{label}" for label in range(number % 40, number + 1, 37)][
                    : number % 4
                ],
            }
            for number in range(count)
        ]
        write_jsonl(tmp_path / f"many/{name}.jsonl", rows)
    return tmp_path / "many"


@pytest.mark.parametrize("tokenizer", ["gpt2", "byte", "char", "bpe-280"])
def test_the_number_of_workers_changes_nothing(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: str
) -> None:
    monkeypatch.setattr(pipeline, "BATCH_CHARACTERS", 300)
    made = [
        visible(quietly(str(many), tmp_path / f"{n}", label_field="tags", tokenizer=tokenizer, workers=n).path)
        for n in (1, 4)
    ]
    assert len(made[0]) == 14
    assert made[0] == made[1]


def test_a_stop_at_any_moment_is_made_good(many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # slow, and it is processes that fail here, not disks
    monkeypatch.setattr(pipeline, "BATCH_CHARACTERS", 700)
    monkeypatch.setattr(pipeline, "RECORD_SECONDS", 0.0)
    whole = visible(quietly(str(many), tmp_path / "whole", label_field="tags").path)

    def attempt(out: Path, number: int) -> int:
        """Prepare, and be gone before the call of that number; returns how many calls were left."""
        with killed_before(number, (os, "replace"), (os, "fsync")) as calls:
            quietly(str(many), out, label_field="tags", progress=False)
        return calls.left

    total = 10**6 - attempt(tmp_path / "counted", 10**6)
    assert total > 60
    for stop in [*range(1, total - 22, total // 5), *range(total - 22, total + 1)]:  # and while files get their names
        out = tmp_path / f"stop{stop}"
        assert attempt(out, stop) == 0
        assert attempt(out, 3) == 0  # the rerun is stopped as well
        quietly(str(many), out, label_field="tags", progress=False)
        assert visible(out) == whole
        assert not list(out.glob(".*.tmp"))


def test_a_rerun_does_not_tokenize_again(many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = visible(quietly(str(many), tmp_path / "whole", label_field="tags").path)
    monkeypatch.setattr(pipeline, "BATCH_CHARACTERS", 700)
    monkeypatch.setattr(pipeline, "RECORD_SECONDS", 0.0)
    tokenize, seen, stop_after = pipeline._tokenize, 0, 150.0

    def watched(batch: list[Any], **settings: Any) -> Any:
        nonlocal seen
        if seen >= stop_after:
            raise Killed
        seen += len(batch)
        return tokenize(batch, **settings)

    monkeypatch.setattr(pipeline, "_tokenize", watched)
    with pytest.raises(Killed):
        quietly(str(many), tmp_path / "set", label_field="tags", workers=1)
    with pytest.raises(DataError, match="set is not finished: run the same `gptlab prepare` again to continue"):
        LabeledDataset(tmp_path / "set")
    with pytest.raises(DataError, match=r"was made with tokenizer.name = byte \(now char\)"):
        quietly(str(many), tmp_path / "set", label_field="tags", tokenizer="char")
    first, seen, stop_after = seen, 0, math.inf
    dataset = quietly(str(many), tmp_path / "set", label_field="tags", workers=1)
    documents = sum(len(split) for split in dataset.splits.values())
    assert first > 150
    assert seen == documents - first
    assert visible(dataset.path) == whole


@pytest.mark.parametrize("parts", [1, 2, 7])
def test_parts_are_the_whole(many: Path, tmp_path: Path, parts: int) -> None:
    (many / "dev.jsonl").unlink()  # so that documents of the training split are held out
    settings: dict[str, Any] = {"label_field": "tags", "max_documents": 150, "val_fraction": 0.1}
    whole = visible(quietly(str(many), tmp_path / "whole", **settings).path)
    for index in reversed(range(1, parts + 1)):
        part = quietly(str(many), tmp_path / "set", part=f"{index}/{parts}", **settings)
        assert part.path == tmp_path / f"set/part-{index:04d}-of-{parts:04d}"
    with pytest.raises(DataError, match="set holds parts of a dataset: `gptlab prepare ... --merge` makes"):
        LabeledDataset(tmp_path / "set")
    merged = LabeledDataset(prepare("text", out=tmp_path / "set", merge=True, progress=False))
    merged.verify()
    assert visible(merged.path) == whole
    quietly(str(many), tmp_path / "set", part=f"1/{parts}", **settings)  # late: nothing to do
    assert visible(merged.path) == whole


def test_a_merge_that_was_stopped_goes_on(many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = visible(quietly(str(many), tmp_path / "whole", label_field="tags").path)
    for index in (1, 2, 3):
        quietly(str(many), tmp_path / "set", label_field="tags", part=f"{index}/3")
    for stop in (1, 5, 12, 13, 15, 2):  # before the manifest is written, and in removing the parts
        with killed_before(stop, (os, "replace"), (shutil, "rmtree")):
            prepare("text", out=tmp_path / "set", merge=True, progress=False)
    prepare("text", out=tmp_path / "set", merge=True, progress=False)
    assert visible(tmp_path / "set") == whole


def test_parts_that_do_not_fit_are_refused(many: Path, tmp_path: Path) -> None:
    quietly(str(many), tmp_path / "set", label_field="tags", part="1/2")
    with pytest.raises(DataError, match="1 of 2 parts are not finished: prepare them with --part 2/2"):
        prepare("text", out=tmp_path / "set", merge=True)
    quietly(str(many), tmp_path / "set", label_field="tags", part="2/2", max_documents=9)
    with pytest.raises(DataError, match=r"part-0002-of-0002 was made with max_documents = 9 \(in part-0001.* None\)"):
        prepare("text", out=tmp_path / "set", merge=True)
    with pytest.raises(DataError, match="tokenizer char would be learnt again by each part"):
        quietly(str(many), tmp_path / "other", label_field="tags", part="1/2", tokenizer="char")


@pytest.mark.slow
def test_a_killed_process_goes_on(many: Path, tmp_path: Path) -> None:
    whole = visible(quietly(str(many), tmp_path / "whole", label_field="tags", tokenizer="gpt2").path)
    program = """
        import sys, time
        from gptlab.data.prepare import pipeline
        pipeline.BATCH_CHARACTERS, pipeline.RECORD_SECONDS, tokenize = 400, 0.0, pipeline._tokenize
        def slowly(*args, **settings):
            time.sleep(0.05)
            return tokenize(*args, **settings)
        pipeline._tokenize = slowly
        pipeline.prepare(sys.argv[1], out=sys.argv[2], tokenizer="gpt2", label_field="tags", workers=2)
    """
    out = tmp_path / "killed"

    def recorded() -> int:
        file = out / "progress.json"
        return int(json.loads(file.read_text(encoding="utf-8"))["documents"]) if file.is_file() else 0

    kills, before = 0, 0
    while not (out / "manifest.json").exists() or (out / "progress.json").exists():  # also after the manifest
        process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program), str(many), str(out)])
        while process.poll() is None and recorded() < before + 60:
            time.sleep(0.01)
        if process.poll() is None:
            process.kill()
            kills += 1
        process.wait()
        assert process.returncode in (0, -9)
        before = recorded()
    assert kills >= 2
    assert visible(out) == whole


def test_a_kill_leaves_nothing_half(source: Path, tmp_path: Path) -> None:
    program = f"""
        import os, signal
        from gptlab.data.prepare import pipeline, prepare
        from gptlab.data.prepare.writer import LabeledWriter
        LabeledWriter.finish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        prepare({str(source)!r}, out={str(tmp_path / "set")!r}, tokenizer="byte", label_field="tags")
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(program)], timeout=600).returncode == -9
    assert sorted(visible(tmp_path / "set")) == ["progress.json", "tokenizer.json"]
    assert (tmp_path / "set/.train.tokens.npy.tmp").is_file()
    with pytest.raises(DataError, match="set is not finished"):
        LabeledDataset(tmp_path / "set")
    dataset = quietly(str(source), tmp_path / "set", label_field="tags")
    dataset.verify()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "source"]
    assert sorted({path.name for path in dataset.path.iterdir()} - set(visible(dataset.path))) == [".lock"]
    assert len(visible(dataset.path)) == 3 * 4 + 2
    assert visible(dataset.path) == visible(quietly(str(source), tmp_path / "whole", label_field="tags").path)


def test_a_failure_leaves_nothing_at_all(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "x.npy")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"no space left for .*set: make room"):
        quietly(str(source), tmp_path / "set", label_field="tags")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_two_at_once_are_one_too_many(source: Path, tmp_path: Path) -> None:
    with (
        locks.hold(tmp_path / "set", DataError("")),
        pytest.raises(DataError, match="is being prepared by another process"),
    ):
        quietly(str(source), tmp_path / "set", label_field="tags")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# -- refusals


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"text": "a", "y": "b"}, {"text": "a", "y": ["b"]}], "line 2 has a list of labels, and documents before it"),
        ([{"text": "a", "y": ["b"]}, {"text": "a", "y": "b"}], "line 2 has one label, and documents before it have a"),
        ([{"text": "a", "y": "b"}, {"text": "a"}], "line 2 has no field 'y', only text: name the field of labels"),
        ([{"body": "a", "y": "b"}], "line 1 has no field 'text', only body, y: name the field of the text with --text"),
        ([{"text": 3, "y": "b"}], "the corpus text has no training documents with text and labels"),
        ([{"text": "a", "y": 0.5}], "line 1 has the label 0.5: labels are texts, whole numbers or booleans"),
        ([{"text": "a", "y": {}}], "line 1 has the label {}: labels are"),
        ([{"text": "a", "y": ["b", None]}], "line 1 has None, which is no label, among others in field 'y'"),
        ([["a", "b"]], " 1 is not an object with fields"),
        ([{"text": "a", "y": None}], "the corpus text has no training documents with text and labels"),
        ([{"text": "a", "y": "b"}], "the corpus text has no training documents with text and labels"),
    ],
)
def test_rows_that_cannot_be_read(rows: Any, sentence: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError) as error:
        quietly(str(tmp_path / "rows.jsonl"), tmp_path / "set", label_field="y")
    assert sentence in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("train.jsonl", b'{"text": \n', "line 1 is not JSON"),
        ("train.json", b'{"text": 1}{', "is not JSON: Extra data"),
        ("train.jsonl", b'{"text": "\xff"}', "is not UTF-8 text"),
        ("train.jsonl.gz", b"no gzip", "train.jsonl.gz"),
        ("train.jsonl.gz", gzip.compress(b'{"text": "a", "y": "b"}\n' * 999)[:-9], "cannot be read: Compressed file"),
        ("train.parquet", b"no parquet", "is not a readable parquet file"),
        ("test.jsonl", b"", "has no training documents: name files by their split, such as train.jsonl"),
        ("train.txt", b"text", "has no training documents: name files by their split"),
        (".train.jsonl", b'{"text": "a", "y": "b"}\n', "has no training documents: name files by their split"),
    ],
)
def test_files_that_cannot_be_read(name: str, content: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        quietly(str(tmp_path / "in"), tmp_path / "set", label_field="y")
    assert sentence in str(error.value)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("corpus", "settings", "sentence"),
    [
        ("stdlib", {"label_field": "y"}, "no labelled corpus 'stdlib': use eurlex57k, agnews, imdb, constructs or"),
        ("/nowhere", {"label_field": "y"}, "no labelled corpus '/nowhere'"),
        ("text", {"source": "/nowhere", "label_field": "y"}, "/nowhere does not exist: --from names a file or folder"),
        ("text", {"source": "owner/name", "label_field": "y"}, "owner/name does not exist"),
        ("text", {"label_field": "y"}, "--from names a file or folder, --label-field its labels"),
        ("imdb", {"source": "/nowhere"}, "/nowhere does not exist"),
        ("constructs", {"label_field": "y"}, "the corpus constructs is made from the Python that runs it"),
        ("constructs", {"source": "."}, "the corpus constructs is made from the Python that runs it"),
        ("constructs", {"max_documents": 0}, "max_documents = 0: must be at least 1"),
        ("constructs", {"val_fraction": 0.0}, "val_fraction = 0.0: must be more than 0 and at most 0.5"),
    ],
)
def test_settings_that_cannot_be(corpus: str, settings: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        quietly(corpus, tmp_path / "set", **settings)
    assert sentence in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_classes_out_of_range_and_a_second_validation_split(source: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "news/train.jsonl", [{"text": "a", "label": 4}])
    with pytest.raises(DataError, match="line 1 has the label 4: .*; the classes are 0 to 3"):
        quietly("agnews", tmp_path / "set", source=tmp_path / "news")
    with pytest.raises(DataError, match="val_fraction = 0.1: the corpus text has a validation split of its own"):
        quietly(str(source), tmp_path / "set", label_field="tags", val_fraction=0.1)
    (tmp_path / "notes.txt").write_text("text", encoding="utf-8")
    with pytest.raises(DataError, match="notes.txt has no fields: a labelled file is .json, .jsonl.* or .parquet"):
        quietly(str(tmp_path / "notes.txt"), tmp_path / "set", label_field="y")


def test_folders_that_hold_something_else(dataset: LabeledDataset, source: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"source holds other files \(dev.jsonl, test.jsonl, train.jsonl\): name"):
        quietly(str(source), source, label_field="tags")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").write_text("some text, and more of it" * 9, encoding="utf-8")
    lm = prepare("text", source=tmp_path / "notes", out=tmp_path / "lm", tokenizer="byte", progress=False)
    for folder, sentence in (
        (tmp_path / "nowhere", "no prepared dataset at .*: make one with `gptlab prepare CORPUS --out .*nowhere`"),
        (source, "no prepared dataset at"),
        (
            lm,
            r"lm is a dataset without labels, for task = lm: prepare a labelled corpus with `gptlab prepare CORPUS",
        ),
    ):
        with pytest.raises(DataError, match=sentence):
            LabeledDataset(folder)
    with pytest.raises(DataError, match="is a dataset without labels"):
        quietly(str(source), lm, label_field="tags")


def test_a_damaged_dataset_says_which_file(dataset: LabeledDataset) -> None:
    def reading(change: Any, name: str, sentence: str) -> None:
        content = (dataset.path / name).read_bytes()
        change(dataset.path / name)
        with pytest.raises(DataError, match=sentence):
            LabeledDataset(dataset.path)
        (dataset.path / name).write_bytes(content)
        LabeledDataset(dataset.path)

    reading(Path.unlink, "val.offsets.npy", "val.offsets.npy is missing")
    reading(lambda file: file.write_bytes(file.read_bytes()[:-2]), "train.tokens.npy", "train.tokens.npy is truncated")
    reading(lambda file: np.save(file, np.zeros(3)), "test.labels.npy", r"another file: it holds \(3,\), the manifest")
    reading(lambda file: file.write_text("{", encoding="utf-8"), "manifest.json", "manifest.json is damaged")
    without = {key: value for key, value in dataset.manifest.items() if key != "labels"}
    reading(
        lambda file: file.write_text(json.dumps(without), encoding="utf-8"),
        "manifest.json",
        "is damaged: KeyError: .labels",
    )
    later = {**dataset.manifest, "version": 99}
    reading(
        lambda file: file.write_text(json.dumps(later), encoding="utf-8"),
        "manifest.json",
        "has version 99 and format npy, which this gptlab",
    )


# -- the command line


def test_prepare_on_the_command_line(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(*words: object) -> int:
        with pytest.raises(SystemExit) as exit:
            cli.main(["prepare", *map(str, words)])
        return int(exit.value.code or 0)

    monkeypatch.chdir(tmp_path)
    assert call("text", "--from", source, "--label-field", "tags", "--tokenizer", "byte") == 0
    assert "dataset: data/text-byte\n" in capsys.readouterr().out
    assert LabeledDataset("data/text-byte").labels == ["a", "b", "c", "d", "e"]
    rows = [{"text": "a", "label": number % 2} for number in range(9)]
    write_jsonl(tmp_path / "reviews/train.jsonl", rows)
    assert call("imdb", "--from", "reviews", "--tokenizer", "byte", "--val-fraction", "0.5", "--max-documents", 8) == 0
    assert [len(split) for split in LabeledDataset("data/imdb-byte").splits.values()] == [4, 4]
    capsys.readouterr()
    for words in (["--val-tokens", "5"], ["--format", "npy"]):
        assert call("imdb", "--from", "reviews", *words) == 2
        assert "are for text without labels" in capsys.readouterr().err


def test_names_are_known_to_nobody_else() -> None:
    assert set(LABELED) & set(TEXT) == {"text"}  # which has labels where --label-field names them
