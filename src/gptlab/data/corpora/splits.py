"""Which split a file is of, by its name: every file of a folder of labelled documents is of one, or is asked about."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from gptlab.data.corpora.base import SPLITS
from gptlab.errors import DataError

WORDS = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "dev", "devel", "development", "eval", "evaluation", "heldout", "holdout"),
    "test": ("test", "testing", "tst"),
    "unlabelled": ("unsupervised", "unsup", "unlabelled", "unlabeled"),
}
SPLIT_OF = {word: split for split, words in WORDS.items() for word in words}
EITHER = ("eval", "evaluation", "heldout", "holdout")  # beside dev or val, often the test split
AFTER = re.compile(r"(set|data|split|file|part|doc|row|sample|example|label|text)?s?$")  # trainset, test_labels
SHOWN = 3  # names in a message


def words_of(name: str) -> list[str]:
    """The split words in a name: train of data/train-00000-of-00002.parquet, train2.csv, TrainData.csv and trainset."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()
    words = [(word, AFTER.sub("", word, count=1)) for word in re.findall(r"[a-z]+", apart)]
    return [word if word in SPLIT_OF else stem for word, stem in words if {word, stem} & SPLIT_OF.keys()]


def splits_of(name: str) -> list[str]:
    """The splits that the words of a path name, each once; "unlabelled" goes before any other."""
    found = list(dict.fromkeys(SPLIT_OF[word] for word in words_of(name)))
    return ["unlabelled"] if "unlabelled" in found else found


def split_of(name: str) -> str | None:
    """The split that a path names, one of SPLITS; of two the one that is not for training."""
    found = [split for split in splits_of(name) if split in SPLITS]
    return next((split for split in found if split != "train"), "train" if found else None)


def sort_files(source: Path, names: Iterable[str]) -> dict[str, list[str]]:
    """The files of a folder by split. In a folder where no file names one, all files are training documents.

    Files that are called unlabelled are left out.

    Raises:
        DataError: the split of a file cannot be told; the message says what to rename.
    """
    splits: dict[str, list[str]] = {split: [] for split in ("train", "val", "test", "unlabelled", "")}
    for name in names:
        found = splits_of(name)
        if len(found) > 1:
            raise DataError(
                f"{source}: {name} names two splits, {' and '.join(found)}: rename it, or move it elsewhere"
            )
        splits[found[0] if found else ""].append(name)
    unknown = splits[""]
    named = {split: splits[split] for split in SPLITS if splits[split]}
    if not named:
        _refuse_pairs(source, unknown)
        if own := [split for split in splits_of(Path(os.path.abspath(source)).name) if split != "train"]:
            raise DataError(
                f"{source} has the name of {own[0]} documents, and nothing in it is for training: "
                "name the folder that has the training documents too, or rename it"
            )
        return {"train": unknown} if unknown else {}
    if unknown:
        raise DataError(
            f"{source}: cannot tell the split of {listed(unknown)}, where {next(iter(named.values()))[0]} names one: "
            "put train, val or test in the name, as in train-2.jsonl, or move it elsewhere"
        )
    words = {word for name in splits["val"] for word in words_of(name) if SPLIT_OF[word] == "val"}
    if words & set(EITHER) and words - set(EITHER):
        raise DataError(
            f"{source}: {listed(splits['val'])} may be validation and test documents: "
            "call the validation documents val and the others test"
        )
    return named


def refuse_held_out(source: Path) -> None:
    """Refuse a file alone that is called validation or test: all its documents would be for training."""
    found = splits_of(source.name)
    if found not in ([], ["train"]):
        raise DataError(
            f"{source} has the name of {' and '.join(found)} documents, and one file alone is for training: "
            "name the folder of all the files, or rename it"
        )


def _refuse_pairs(source: Path, names: list[str]) -> None:
    """Refuse names that differ by a split alone, such as newstrain.csv and newstest.csv."""
    known = {name.lower(): name for name in names}
    for name in known:
        for word in ("test", "tst", "valid", "val", "dev", "eval"):
            twins = (name.replace(word, twin) for twin in WORDS["train"]) if word in name else ()
            for twin in known.keys() & {*twins}:
                raise DataError(
                    f"{source}: {known[twin]} and {known[name]} seem to be two splits: "
                    "set the word apart, as in news-train.csv and news-test.csv"
                )


def listed(names: list[str]) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    shown = names[:SHOWN]
    return ", ".join(shown) + more if more or len(shown) < 2 else f"{', '.join(shown[:-1])} and {shown[-1]}"
