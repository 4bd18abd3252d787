"""Token ids to files: shards of text, or arrays of labelled documents.

A file grows under a hidden name and gets its final name when it is complete. The state of a writer, in progress.json,
says how much of its files is recorded; a rerun cuts them back to that.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from gptlab.data.containers import shard_header, token_dtype
from gptlab.data.corpora.base import SPLITS, Reading
from gptlab.data.manifest import INEXACT
from gptlab.data.prepare.summary import listing, reading_fields
from gptlab.data.tokenizer_files import special_ids
from gptlab.data.tokenizers import CharTokenizer, Tokenizer
from gptlab.data.verified import file_sha256
from gptlab.errors import DataError

ARRAYS = ("tokens", "offsets", "labels", "label_offsets")
States = dict[str, dict[str, Any]]  # of the writers, by split


@dataclass
class Piece:
    """Consecutive documents of one split.

    Attributes:
        ids: token ids, with end-of-text where the format has it, (tokens,).
        bytes: size of the documents as UTF-8.
        rows: number of tokens and labels of each document, for labelled documents.
        inexact: `manifest.INEXACT` of the documents, where the tokenizer is not exact.
        refused: position in the batch of each document that the tokenizer cannot take, and why.
    """

    split: str
    ids: NDArray[Any]
    documents: int
    bytes: int
    rows: list[tuple[int, list[str]]] = field(default_factory=list)
    inexact: dict[str, int] = field(default_factory=dict)
    refused: list[tuple[int, str]] = field(default_factory=list)


def _count(state: dict[str, Any], piece: Piece) -> None:
    """Add a piece to the state of its split. Numbers that few datasets have are not in the states of the others."""
    state["documents"] += piece.documents
    more = piece.inexact | ({"refused": len(piece.refused)} if piece.refused else {})
    if "bytes" in state or piece.inexact:
        more["bytes"] = piece.bytes
    for key, number in more.items():
        state[key] = state.get(key, 0) + number


def _left_out(found: Counter[str], states: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Documents that are not in the dataset, by what they lack."""
    refused = Counter({"token ids": sum(state.get("refused", 0) for state in states)})
    return dict(sorted((found + refused).items()))


def hidden(path: Path) -> Path:
    """The name of a file that is not complete."""
    return path.with_name(f".{path.name}.tmp")


class Stream:
    """A growing file of numbers.

    Args:
        path: its final name.
        format: container, see `manifest.FORMATS`.
        count: numbers that are recorded; the file is cut back to them. With 0 the file starts empty.

    Raises:
        DataError: the file holds fewer numbers than were recorded.
    """

    def __init__(self, path: Path, format: str, dtype: np.dtype[Any], count: int) -> None:
        self.path, self.format, self.dtype, self.count = path, format, dtype, count
        header = shard_header(format, dtype, 0)  # `finish` enters the count
        self.offset = len(header)
        if count and path.is_file() and not hidden(path).is_file():
            os.replace(path, hidden(path))  # it was complete, but the process was killed before the manifest
        size = self.offset + count * dtype.itemsize
        if count and (not hidden(path).is_file() or hidden(path).stat().st_size < size):
            raise DataError(f"{hidden(path)} is missing or truncated: delete the folder to prepare it again")
        self.file: IO[bytes] = open(hidden(path), "r+b" if count else "w+b")  # noqa: SIM115 - stays open
        self.file.write(header)
        self.file.truncate(size)
        self.file.seek(size)

    def write(self, numbers: NDArray[Any]) -> None:
        self.file.write(numbers.astype(self.dtype, copy=False).tobytes())
        self.count += len(numbers)

    def flush(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())

    def finish(self) -> str:
        """Enter the count and close the file, which keeps its hidden name. Returns its sha256."""
        self.file.seek(0)
        self.file.write(shard_header(self.format, self.dtype, self.count))
        self.flush()
        self.file.close()
        return file_sha256(hidden(self.path))


class ShardWriter:
    """The token stream of one split, cut into shards. A shard gets its name after it is recorded.

    Raises:
        DataError: a recorded shard is missing.
    """

    def __init__(self, folder: Path, split: str, dtype: np.dtype[Any], draft: dict[str, Any], state: Any) -> None:
        self.folder, self.split, self.dtype, self.state = folder, split, dtype, state
        self.format, self.corpus = draft["format"], draft["corpus"]
        self.shard_tokens = draft["settings"]["shard_tokens"] or sys.maxsize
        self.unpublished: list[str] = []
        for entry in state["shards"]:
            file = folder / entry["file"]
            if hidden(file).is_file() and not file.is_file():
                os.replace(hidden(file), file)  # recorded, but the process was killed before it was named
            if not file.is_file():
                raise DataError(f"{file} is missing: delete the folder to prepare it again")
        self._shard = self._open() if state["open_tokens"] else None

    def _open(self) -> Stream:
        name = shard_name(self.format, self.corpus, self.split, len(self.state["shards"]))
        return Stream(self.folder / name, self.format, self.dtype, self.state["open_tokens"])

    def write(self, piece: Piece) -> None:
        ids = piece.ids
        while len(ids):
            self._shard = self._shard or self._open()
            room = self.shard_tokens - self._shard.count
            part, ids = ids[:room], ids[room:]
            self._shard.write(part)
            self.state["open_tokens"] += len(part)
            self.state["open_max"] = max(self.state["open_max"], int(part.max()))
            self.state["tokens"] += len(part)
            if self._shard.count == self.shard_tokens:
                self.close()
        _count(self.state, piece)

    def close(self) -> None:
        """Complete the open shard, if there is one."""
        if self._shard is not None:
            name, tokens, largest = self._shard.path.name, self._shard.count, self.state["open_max"]
            entry = {"file": name, "tokens": tokens, "max_token": largest, "sha256": self._shard.finish()}
            self.state["shards"] = [*self.state["shards"], entry]
            self.state["open_tokens"], self.state["open_max"] = 0, -1
            self.unpublished.append(name)
            self._shard = None

    def flush(self) -> None:
        if self._shard is not None:
            self._shard.flush()

    def publish(self) -> None:
        """Give complete shards their names, after the state that lists them is on disk."""
        for name in self.unpublished:
            os.replace(hidden(self.folder / name), self.folder / name)
        self.unpublished.clear()


def shard_name(format: str, corpus: str, split: str, index: int) -> str:
    if format == "nanogpt":
        return f"{split}.bin"
    return f"{corpus}_{split}_{index:06d}.npy" if format == "npy" else f"{split}-{index:06d}.bin"


class ShardOutput:
    """The files of a text dataset.

    Args:
        draft: the manifest as far as it is known before the text is read.
        states: of the writers, from progress.json; `NEW` at first.

    Attributes:
        before, after: ids to put before and after each document.
    """

    SPLITS = ("train", "val")
    NEW = {"tokens": 0, "documents": 0, "bytes": 0, "shards": (), "open_tokens": 0, "open_max": -1}  # noqa: RUF012

    def __init__(self, folder: Path, draft: dict[str, Any], tokenizer: Tokenizer, states: States) -> None:
        self.folder, self.draft, self.tokenizer = folder, draft, tokenizer
        self.dtype = token_dtype(draft["format"], tokenizer.vocab_size)
        self.writers = {split: ShardWriter(folder, split, self.dtype, draft, state) for split, state in states.items()}
        end = [np.array([tokenizer.eot])] if tokenizer.eot is not None else []
        self.before, self.after = ([], end) if draft["settings"]["end_of_text"] == "appended" else (end, [])

    def close(self, corpus: str, whole: bool) -> None:
        """Complete the last shards. Raises DataError if there are no training tokens; a part may be without."""
        if whole and not any(writer.state["tokens"] for writer in self.writers.values()):
            raise DataError(f"the tokenizer can take no document of the corpus {corpus}: use another one")
        if whole and not self.writers["train"].state["tokens"]:
            raise DataError(
                f"all {self.writers['val'].state['tokens']} tokens of the corpus {corpus} fell into the validation "
                "split: hold out less (--val-tokens, --val-fraction)"
            )
        for writer in self.writers.values():
            writer.close()

    def finish(self, reading: Reading) -> dict[str, Any]:
        """The fields of the manifest that depend on the documents. nanoGPT gets its form of a vocabulary, too."""
        if self.draft["format"] == "nanogpt" and isinstance(self.tokenizer, CharTokenizer):
            characters = [self.tokenizer.decode([index]) for index in range(self.tokenizer.vocab_size)]
            vocabulary: dict[str, Any] = {"vocab_size": len(characters), "itos": dict(enumerate(characters))}
            vocabulary["stoi"] = {character: index for index, character in enumerate(characters)}
            meta = self.folder / "meta.pkl"
            hidden(meta).write_bytes(pickle.dumps(vocabulary, protocol=4))
            os.replace(hidden(meta), meta)
        states = {split: writer.state for split, writer in self.writers.items()}
        inexact = [key for key in INEXACT if any(key in state for state in states.values())]
        keys = ("tokens", "documents", "bytes", *inexact, "shards")
        splits = {split: {key: state.get(key, 0) for key in keys} for split, state in states.items()}
        left_out = _left_out(Counter(), states.values())
        more = {"left_out": left_out} if left_out else {}
        return {"dtype": self.dtype.name, **more, "splits": splits, **reading_fields(reading)}


class LabeledWriter:
    """The tokens of one split, and `rows`: a line of JSON with the number of tokens and the labels of each document."""

    unpublished = ()  # no file is complete before all are

    def __init__(self, folder: Path, split: str, dtype: np.dtype[Any], state: dict[str, Any]) -> None:
        self.folder, self.split, self.state = folder, split, state
        self.tokens = Stream(self._file("tokens"), "npy", dtype, state["tokens"])
        self.rows = Stream(self._file("rows"), "nanogpt", np.dtype("u1"), state["rows"])  # bytes without a header

    def _file(self, name: str) -> Path:
        return self.folder / f"{self.split}.{name}.npy"

    def write(self, piece: Piece) -> None:
        self.tokens.write(piece.ids)
        self.rows.write(np.frombuffer("".join(json.dumps(row) + "\n" for row in piece.rows).encode(), np.uint8))
        _count(self.state, piece)
        self.state["tokens"], self.state["rows"] = self.tokens.count, self.rows.count

    def flush(self) -> None:
        self.tokens.flush()
        self.rows.flush()

    def publish(self) -> None:
        pass

    def read_rows(self) -> list[tuple[int, list[str]]]:
        self.rows.flush()
        return [json.loads(line) for line in hidden(self.rows.path).read_text(encoding="utf-8").splitlines()]

    def finish(self, numbers: dict[str, int]) -> dict[str, Any]:
        """Write the arrays, with the numbers of the labels. Returns the split's entry in the manifest."""
        rows = self.read_rows()
        labels = [sorted(numbers[label] for label in names) for _, names in rows]
        arrays: dict[str, NDArray[Any]] = {
            "offsets": np.cumsum([0, *(length for length, _ in rows)], dtype=np.int64),
            "labels": np.array([number for row in labels for number in row], np.int32),
            "label_offsets": np.cumsum([0, *map(len, labels)], dtype=np.int64),
        }
        streams = {name: Stream(self._file(name), "npy", array.dtype, 0) for name, array in arrays.items()}
        for name, array in arrays.items():
            streams[name].write(array)
        files = {}
        for name in ARRAYS:
            stream = {"tokens": self.tokens, **streams}[name]
            files[name] = {"file": stream.path.name, "sha256": stream.finish()}
            os.replace(hidden(stream.path), stream.path)
        sizes = {"documents": len(rows), "tokens": self.tokens.count, "labels": len(arrays["labels"])}
        inexact = ("bytes", *INEXACT) if INEXACT[0] in self.state else ()
        return {**sizes, **{key: self.state[key] for key in inexact}, "files": files}


class LabeledOutput:
    """The files of a labelled dataset, with the methods of `ShardOutput`."""

    SPLITS = SPLITS
    NEW = {"tokens": 0, "documents": 0, "rows": 0}  # noqa: RUF012

    def __init__(self, folder: Path, draft: dict[str, Any], tokenizer: Tokenizer, states: States) -> None:
        self.folder, self.draft = folder, draft
        self.specials = special_ids(tokenizer)
        self.dtype = token_dtype("llmc", self.specials["vocab_size"])
        self.writers = {split: LabeledWriter(folder, split, self.dtype, state) for split, state in states.items()}
        self.before: list[NDArray[Any]] = []  # no special token is stored: a batch gets them
        self.after: list[NDArray[Any]] = []

    def close(self, corpus: str, whole: bool) -> None:
        """Raises DataError if there are no training or no validation documents; a part may be without."""
        for split, name in (("train", "training"), ("val", "validation")):
            if whole and not self.writers[split].state["documents"]:
                raise DataError(f"the corpus {corpus} has no {name} documents with text and labels")

    def finish(self, reading: Reading) -> dict[str, Any]:
        """The fields of the manifest that depend on the documents.

        The labels are those of the training split, sorted, and after them those of val and test alone, with a
        training count of 0: zero-shot scores need them. A classifier has `n_train_labels` outputs.
        """
        found = {
            split: Counter(label for _, labels in writer.read_rows() for label in labels)
            for split, writer in self.writers.items()
        }
        counts = found["train"]
        others = set().union(*found.values()) - set(counts)
        labels = [*_in_order(counts), *_in_order(others)]
        numbers = {label: number for number, label in enumerate(labels)}
        part = "part" in self.draft["settings"]  # it may be without documents, or without labels
        if not counts and not part:
            raise DataError(f"the corpus {self.draft['corpus']} has no training documents that have one of the labels")
        needed = ("train", "val") if part else ()
        splits = {name: w.finish(numbers) for name, w in self.writers.items() if w.state["documents"] or name in needed}
        for writer in self.writers.values():
            writer.tokens.file.close()
            writer.rows.file.close()
        return {
            "dtype": self.dtype.name,
            **{key: self.specials[key] for key in ("vocab_size", "cls", "sep", "pad")},
            "multi": bool(reading.multi),
            "n_train_labels": len(counts),
            "unseen_labels": len(others),
            "left_out": _left_out(reading.left_out, (writer.state for writer in self.writers.values())),
            "read": {split: listing(names) for split, names in reading.read.items()},
            **reading_fields(replace(reading, left_out=Counter())),
            "splits": splits,
            "labels": labels,
            "train_counts": [counts[label] for label in labels],
        }


def _in_order(labels: Iterable[str]) -> list[str]:
    """Sorted; as numbers if all labels are numbers."""
    names = sorted(labels)
    return sorted(names, key=int) if all(name.isascii() and name.isdigit() for name in names) else names


Output = ShardOutput | LabeledOutput


def new_states(kind: type[Output]) -> States:
    return {split: dict(kind.NEW) for split in kind.SPLITS}
