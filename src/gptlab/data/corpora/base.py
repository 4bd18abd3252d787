"""What a corpus is: documents in a fixed order, and the rule that assigns them to splits.

A corpus yields the same documents in the same order each time it is read; resuming a preparation relies on it.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from gptlab.errors import DataError

SPLITS = ("train", "val", "test")
DEFAULT_VAL_FRACTION = 0.05
ONE_DOCUMENT_VAL_FRACTION = 0.1  # nanoGPT's for Shakespeare

Part = tuple[int, int]  # number of a part, from 1, and the number of parts
T = TypeVar("T")


@dataclass(frozen=True)
class Wanted:
    """What is asked of a corpus; `source` is a local file or folder, or for labelled corpora a hub id."""

    name: str
    source: Path | None = None
    text_field: str = "text"
    label_field: str | None = None
    part: Part | None = None
    strict: bool = False


@dataclass
class Reading:
    """Progress of the newest iterator over a corpus, and what it passed over.

    Attributes:
        strict: refuse what else would be passed over.
        total, done: bytes of files or documents; a total of 0 is unknown.
        unread: number of files that were to be read and gave no document.
        left_out: rows left out, by what they lack.
        first: the first of them, by the same.
        skipped: files that were not read, or not to their end, by reason.
        noted: files that were read and may not have been meant, by reason.
        multi: whether labelled documents have lists of labels.
        read: files (or splits of the hub) of each split of a labelled corpus; {} if it is made of none.
    """

    strict: bool = False
    total: float = 0
    done: float = 0
    unread: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, list[str]] = field(default_factory=dict)
    noted: dict[str, list[str]] = field(default_factory=dict)
    multi: bool | None = None
    read: dict[str, list[str]] = field(default_factory=dict)

    def begin(self, skipped: dict[str, list[str]], noted: dict[str, list[str]]) -> None:
        """Start again, with the files that are known not to be read."""
        self.done, self.unread = 0, 0
        self.left_out.clear()
        self.first.clear()
        self.skipped = {reason: [*names] for reason, names in skipped.items()}
        self.noted = {reason: [*names] for reason, names in noted.items()}

    def leave_out(self, reason: str, where: str) -> None:
        self.left_out[reason] += 1
        self.first.setdefault(reason, where)

    @property
    def share(self) -> float | None:
        return min(self.done / self.total, 1.0) if self.total else None


class Document(NamedTuple):
    """A document and its split, one of SPLITS. Labels are empty in a text corpus."""

    split: str
    text: str
    labels: list[str] = []  # noqa: RUF012 - never changed


class Row(NamedTuple):
    """A document as a labelled corpus yields it: its labels are a list, one label, or missing (None or "")."""

    text: str
    labels: list[str] | str | None
    where: str  # file and line, for messages


@dataclass(frozen=True)
class Corpus:
    """Documents of text, and the rule that splits them.

    Attributes:
        source: what identifies the text, for the manifest: path, url or hub id, with sha256 or sizes.
        documents: makes an iterator of (name, text); the name is "" if only its position identifies a document.
        val_fraction: share of the documents (of the characters, if there is one document) that is held out.
        val_tokens: number of tokens at the beginning to hold out instead; 0 for none.
        held_out: makes the set of positions of held-out documents instead; used for the whole corpus only.
        part: which part of the files `documents` reads; None for all.
        former_source: makes what identified the text in gptlab 0.1, if that may have been something else.
    """

    name: str
    source: dict[str, Any]
    documents: Callable[[], Iterator[tuple[str, str]]]
    val_fraction: float | None = None
    val_tokens: int = 0
    held_out: Callable[[], frozenset[int]] | None = None
    part: Part | None = None
    reading: Reading = field(default_factory=Reading)
    former_source: Callable[[], dict[str, Any]] | None = None

    def texts(self, max_documents: int | None = None) -> Iterator[str]:
        """Every document whole."""
        return (text for _, text in itertools.islice(self.documents(), max_documents) if text)

    def split(self, max_documents: int | None = None) -> Iterator[Document]:
        """Each document that is not empty, in order, with its split.

        With `val_tokens` all are "train"; the writer of the tokens cuts the first ones off. A single document is cut
        in two by position, its end is "val". Otherwise see `held_out`, which counts empty documents, and `hold_out`.

        Raises:
            DataError: the corpus has no documents; a part may be without.
        """
        if self.held_out and max_documents is None:
            chosen = self.held_out()
            for index, (_, text) in enumerate(self.documents()):
                if text:
                    yield Document("val" if index in chosen else "train", text)
            return
        texts = ((name, text) for name, text in itertools.islice(self.documents(), max_documents) if text)
        head = list(itertools.islice(texts, 2))
        if not head and not self.part:
            where = self.source.get("path") or self.source.get("url") or self.source.get("hub") or "it"
            raise DataError(f"the corpus {self.name} has no documents: {where} holds no text")
        if self.val_tokens:
            yield from (Document("train", text) for _, text in itertools.chain(head, texts))
        elif len(head) == 1 and self.part is None:
            text = head[0][1]
            fraction = ONE_DOCUMENT_VAL_FRACTION if self.val_fraction is None else self.val_fraction
            cut = int((1 - fraction) * len(text))
            yield from (Document(*piece) for piece in (("train", text[:cut]), ("val", text[cut:])) if piece[1])
        else:
            yield from (Document(*item) for item in hold_out(itertools.chain(head, texts), self.val_fraction))


@dataclass(frozen=True)
class LabeledCorpus:
    """Documents with labels.

    Attributes:
        source: what identifies the documents, for the manifest.
        splits: opens the corpus: the documents of each split it has, in the same order each time.
        val_fraction: share of the training documents to hold out, if there is no "val" split.
        part: with (I, N), every N-th document of each split is yielded, from the I-th on; None for all.
    """

    name: str
    source: dict[str, Any]
    splits: Callable[[], dict[str, Iterable[Row]]]
    val_fraction: float | None = None
    part: Part | None = None
    reading: Reading = field(default_factory=Reading)

    def texts(self, max_documents: int | None = None) -> Iterator[str]:
        return (document.text for document in self.split(max_documents))

    def split(self, max_documents: int | None = None) -> Iterator[Document]:
        """Documents with text and labels, split after split, at most `max_documents` of each.

        Raises:
            DataError: there is no training split, `val_fraction` is set beside a validation split, or lists of labels
                and single labels are mixed.
        """
        self.reading.done, self.reading.multi = 0, None
        self.reading.left_out.clear()
        splits = self.splits()
        if "train" not in splits:
            raise DataError(f"the corpus {self.name} has no training documents, only {', '.join(splits) or 'none'}")
        if "val" in splits and self.val_fraction is not None:
            raise DataError(
                f"val_fraction = {self.val_fraction}: the corpus {self.name} has a validation split of its own"
            )
        number, parts = self.part or (1, 1)
        seen: Counter[str] = Counter()
        for split in (name for name in SPLITS if name in splits):
            rows = itertools.islice(self._usable(splits[split]), max_documents)
            named: Iterator[tuple[str, Row]] = ((split, row) for row in rows)
            if split == "train" and "val" not in splits:
                named = hold_out((("", row) for _, row in named), self.val_fraction)
            for name, row in named:
                seen[name] += 1
                if (seen[name] - number) % parts == 0:
                    labels = row.labels if isinstance(row.labels, list) else [str(row.labels)]
                    yield Document(name, row.text, labels)

    def _usable(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The rows with text and labels; the others are counted."""
        for row in rows:
            labelled = row.labels not in (None, "")
            if not labelled or not row.text:
                if self.reading.strict:
                    raise DataError(f"{row.where} has no {'text' if labelled else 'label'}")
                self.reading.left_out["text" if labelled else "a label"] += 1
                continue
            is_list = isinstance(row.labels, list)
            if self.reading.multi not in (None, is_list):
                kinds = ("a list of labels", "one label") if is_list else ("one label", "a list of labels")
                raise DataError(
                    f"{row.where} has {kinds[0]}, and documents before it have {kinds[1]}: "
                    "a dataset has either lists or single labels"
                )
            self.reading.multi = is_list
            yield row


AnyCorpus = Corpus | LabeledCorpus


def hold_out(items: Iterator[tuple[str, T]], fraction: float | None) -> Iterator[tuple[str, T]]:
    """("train" or "val", item) for each (name, item), with a share of `fraction` (default 0.05) in "val".

    A named item is held out if a hash of its name says so, so it keeps its split in another version of the corpus. Of
    each block of 1 / fraction unnamed items one is held out, at a position that a hash of the block's number gives.
    """
    fraction = DEFAULT_VAL_FRACTION if fraction is None else fraction
    if fraction == 0:
        yield from (("train", item) for _, item in items)
        return
    size = max(2, round(1 / fraction))
    for block in itertools.count():
        # The first block is read before it is split, because the corpus may end within it.
        group = list(itertools.islice(items, size)) if block == 0 else itertools.islice(items, size)
        held_out = int(fraction_of(f"document {block}") * (len(group) if isinstance(group, list) else size))
        empty = True
        for index, (name, item) in enumerate(group):
            empty = False
            yield "val" if (fraction_of(name) < fraction if name else index == held_out) else "train", item
        if empty:
            return


def fraction_of(name: str) -> float:
    """A hash of a name as a number in [0, 1)."""
    return int.from_bytes(hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest(), "big") / 2**64


def share_out(items: list[Any], part: Part | None, what: str) -> list[Any]:
    """The consecutive items of one part, of `what`. Raises DataError if there are fewer items than parts."""
    if part is None:
        return items
    number, parts = part
    if len(items) < parts:
        raise DataError(f"{what} has {len(items)} files and a part is whole files: use at most {len(items)} parts")
    return items[(number - 1) * len(items) // parts : number * len(items) // parts]
