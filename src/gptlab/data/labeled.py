"""Prepared labelled documents, for task = "classify".

A folder holds for each split the token ids of whole documents one after another, their offsets, the label numbers of
all documents one after another, and their offsets, as numpy files. No special token is stored: a batch gets them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptlab.data.containers import NPY_FAULTS
from gptlab.data.manifest import has, read_manifest
from gptlab.data.tokenizers import Tokenizer, load_tokenizer
from gptlab.data.verified import verify_files
from gptlab.errors import DataError
from gptlab.files import because, damaged
from gptlab.progress import tell_nobody


def bucket_length(longest: int, block_size: int) -> int:
    """Length of a batch whose longest row has `longest` tokens: the next of 1/8, 1/4, 1/2, 3/4 and 1 times block_size.

    Few lengths keep compilation cheap. Fractions are rounded up to a multiple of 8, but never above block_size.
    """
    assert longest <= block_size
    eighths = (math.ceil(block_size * share / 64) * 8 for share in (1, 2, 4, 6))
    return min((length for length in (*eighths, block_size) if longest <= length <= block_size), default=block_size)


class LabeledSplit:
    """One split of a labelled dataset, memory-mapped.

    Attributes:
        lengths: tokens of each document without cls and sep, (documents,).
    """

    def __init__(
        self,
        arrays: dict[str, NDArray[Any]],
        multi: bool,
        cls: int,
        sep: int,
        pad: int,
        vocab_size: int = 2**32,
        labels: int = 2**31,
        name: str = "the split",
    ) -> None:
        self.vocab_size, self.n_labels, self.name = vocab_size, labels, name
        self._maps = [getattr(arrays[kind], "_mmap", None) for kind in ("tokens", "labels")]
        self._bytes = [arrays[kind].nbytes for kind in ("tokens", "labels")]
        self._tokens, self._labels = np.asarray(arrays["tokens"]), np.asarray(arrays["labels"])  # stay memory-mapped
        self._offsets, self._label_offsets = np.array(arrays["offsets"]), np.array(arrays["label_offsets"])
        self.lengths: NDArray[np.int64] = np.diff(self._offsets)
        self.multi, self.cls, self.sep, self.pad = multi, cls, sep, pad

    def __len__(self) -> int:
        return len(self.lengths)

    def _within(self, array: NDArray[Any], start: int, stop: int, bound: int) -> NDArray[Any]:
        """A part of the tokens or of the labels. Raises DataError where a number in it is none of the dataset's."""
        for pages, size in zip(self._maps, self._bytes, strict=True):
            if pages is not None and pages.size() < size:  # reading past the end kills the process
                raise DataError(f"{self.name} was truncated while it was in use: prepare the dataset again")
        part = array[start:stop]
        if len(part) and not (part.min() >= 0 and part.max() < bound):
            number = int(part.max() if part.max() >= bound else part.min())
            what = "token id" if array is self._tokens else "label"
            raise DataError(
                f"{self.name} holds {what} {number}, and the dataset's end at {bound - 1}: a file is damaged; "
                "prepare the dataset again"
            )
        return part

    def tokens(self, document: int) -> NDArray[Any]:
        """Stored token ids of a document, (tokens,)."""
        return self._within(self._tokens, self._offsets[document], self._offsets[document + 1], self.vocab_size)

    def batch(self, documents: NDArray[Any], block_size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Documents as rows: cls, the first block_size - 2 tokens, sep, and pad up to `bucket_length`.

        Args:
            documents: numbers of documents in the split, (B,).

        Returns:
            Token ids, (B, T), and the number of tokens of each row that are not padding, (B,).
        """
        assert block_size >= 2
        stored = np.minimum(self.lengths[documents], block_size - 2)  # (B,)
        longest = int(stored.max(initial=0)) + 2
        tokens = np.full((len(stored), bucket_length(longest, block_size)), self.pad, np.int64)
        tokens[:, 0] = self.cls
        starts = self._offsets[:-1][documents].tolist()
        for row, start, length in zip(tokens, starts, stored.tolist(), strict=True):
            row[1 : 1 + length] = self._within(self._tokens, start, start + length, self.vocab_size)
            row[1 + length] = self.sep
        return tokens, stored + 2

    def label_ids(self, document: int) -> NDArray[np.int64]:
        """Numbers of a document's labels, ascending."""
        start, stop = self._label_offsets[document], self._label_offsets[document + 1]
        return self._within(self._labels, start, stop, self.n_labels).astype(np.int64)

    def targets(self, documents: NDArray[Any], n_labels: int) -> NDArray[Any]:
        """Targets of a classifier of the first `n_labels` labels.

        Returns:
            Multi-label: 0 and 1, (B, n_labels), float32. Single-label: label numbers, (B,), int64, with -1 for a
            label beyond the first n_labels.
        """
        ids = [self.label_ids(document) for document in documents]
        if not self.multi:
            labels = np.array([row[0] for row in ids], np.int64)
            return np.where(labels < n_labels, labels, -1)
        targets = np.zeros((len(ids), n_labels), np.float32)
        for target, row in zip(targets, ids, strict=True):
            target[row[row < n_labels]] = 1
        return targets


class LabeledDataset:
    """A folder of labelled documents that `gptlab prepare` made.

    Attributes:
        path, manifest: the folder, and the content of its manifest.json.
        labels: names of labels: sorted, first the labels of the training split, then labels of val and test alone.
        n_train_labels: number of labels in the training split, which is the number of outputs of a classifier.
        train_counts: training documents with each label, (len(labels),), int64.
        multi: whether a document has a set of labels, or one label.
        cls, sep, pad: ids of the special tokens that `LabeledSplit.batch` puts around documents.
        vocab_size: number of ids, special tokens included.
        splits: "train", "val" and perhaps "test".

    Raises:
        DataError: there is no dataset, it has no labels, or a file is missing or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path, labeled=True)
        with damaged(self.path / "manifest.json", DataError):
            has(self.manifest, dict.fromkeys(("cls", "sep", "pad", "vocab_size", "n_train_labels"), int))
            has(self.manifest, {"labels": list, "train_counts": list, "multi": bool, "splits": dict, "corpus": str})
            has(self.manifest["tokenizer"], {"sha256": str})
            self.labels: list[str] = list(self.manifest["labels"])
            if not all(isinstance(label, str) for label in self.labels):
                raise ValueError("a label is no text")
            self.train_counts = np.array(self.manifest["train_counts"], np.int64)
            self.n_train_labels, self.multi = int(self.manifest["n_train_labels"]), bool(self.manifest["multi"])
            self.cls, self.sep, self.pad, self.vocab_size = (
                int(self.manifest[key]) for key in ("cls", "sep", "pad", "vocab_size")
            )
            fewest = 0 if "part" in self.manifest.get("settings", {}) else 1
            if not fewest <= self.n_train_labels <= len(self.labels) == len(self.train_counts):
                raise ValueError("the number of labels is not that of their counts")
            if not all(0 <= index < self.vocab_size < 2**32 for index in (self.cls, self.sep, self.pad)):
                raise ValueError("a special token is outside the vocabulary")
            if not {"train", "val"} <= self.manifest["splits"].keys() <= {"train", "val", "test"}:
                raise ValueError("the splits are others than train, val and test")
            self.splits = {name: self._open(name) for name in self.manifest["splits"]}

    def _open(self, split: str) -> LabeledSplit:
        entry = self.manifest["splits"][split]
        has(entry, {"documents": int, "tokens": int, "labels": int, "files": dict})
        documents, tokens, labels = entry["documents"], entry["tokens"], entry["labels"]
        sizes = {"tokens": tokens, "offsets": documents + 1, "labels": labels, "label_offsets": documents + 1}
        arrays = {}
        for name, size in sizes.items():
            has(entry["files"][name], {"sha256": str})
            file, mapped = self.path / f"{split}.{name}.npy", "r" if size else None  # an empty file cannot be mapped
            try:
                arrays[name] = np.asanyarray(np.load(file, mmap_mode=mapped))  # type: ignore[arg-type]
            except FileNotFoundError:
                raise DataError(f"{file} is missing: prepare the dataset again, or restore the file") from None
            except NPY_FAULTS as error:
                raise DataError(
                    f"{file} is truncated or damaged ({because(error)}): prepare the dataset again"
                ) from None
            if arrays[name].shape != (size,):
                raise DataError(f"{file} is another file: it holds {arrays[name].shape}, the manifest says ({size},)")
            if arrays[name].dtype.kind not in "iu":
                raise DataError(f"{file} is another file: it holds {arrays[name].dtype}, not whole numbers")
        for name, of in (("offsets", tokens), ("label_offsets", labels)):
            counts = np.diff(arrays[name].astype(np.int64))
            fewest = 0 if self.multi or name == "offsets" else 1
            if arrays[name][0] != 0 or arrays[name][-1] != of or (counts < fewest).any():
                raise DataError(f"{self.path / f'{split}.{name}.npy'} is damaged: prepare the dataset again")
        where, bounds = f"{self.path}, split {split},", (self.vocab_size, len(self.labels))
        return LabeledSplit(arrays, self.multi, self.cls, self.sep, self.pad, *bounds, where)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the documents; special tokens may have ids beyond its vocabulary."""
        return load_tokenizer(self.path / "tokenizer.json")

    def _recorded(self) -> Iterator[tuple[Path, str]]:
        yield self.path / "tokenizer.json", self.manifest["tokenizer"]["sha256"]
        for split, entry in self.manifest["splits"].items():
            for name in ("tokens", "offsets", "labels", "label_offsets"):
                yield self.path / f"{split}.{name}.npy", entry["files"][name]["sha256"]

    def verify(self, read: Callable[[int], None] = tell_nobody) -> None:
        """Read all files; `read` is called with the bytes of each block. Raises DataError for a wrong sha256."""
        verify_files(self.path, list(self._recorded()), again=True, read=read)

    def verify_new(self) -> None:
        """As `verify`, of the files that have not been verified since they were written."""
        verify_files(self.path, list(self._recorded()))

    def fingerprint(self) -> str:
        """16 hexadecimal digits that identify the content; they do not depend on the folder's path."""
        content = [*((file.name, sha256) for file, sha256 in self._recorded()), *enumerate(self.labels)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def constant_loss(dataset: LabeledDataset) -> float:
    """Training loss in nats of the best prediction that is the same for all documents.

    Multi-label: the mean over the training labels of the binary entropy of their frequencies. Single-label: the
    entropy of the class frequencies.
    """
    share = dataset.train_counts[: dataset.n_train_labels] / len(dataset.splits["train"])

    def entropy(p: NDArray[np.float64]) -> NDArray[np.float64]:
        return -p * np.log(np.where(p > 0, p, 1))

    if dataset.multi:
        return float((entropy(share) + entropy(1 - share)).mean())
    return float(entropy(share).sum())
