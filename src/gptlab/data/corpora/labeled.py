"""Labelled corpora. Opening one makes a `LabeledCorpus`; its documents are read later."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gptlab.data.corpora import files
from gptlab.data.corpora.base import LabeledCorpus, Reading, Row, Wanted
from gptlab.data.tokenizers import valid_text
from gptlab.errors import DataError

# Words in names of files and hub splits; other splits (imdb's "unsupervised") are not read.
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}
HUB_CONFIGURATIONS = {"NLP-AUEB/eurlex": "eurlex57k"}  # other repositories open without one
CLASSES = {"agnews": ("World", "Sports", "Business", "Sci/Tech"), "imdb": ("neg", "pos")}  # by number


@dataclass(frozen=True)
class Table:
    """Where the rows of a corpus are and what their fields are called."""

    hub: str = ""  # hub id of the usual source
    labels: tuple[str, ...] = ()  # names for the field of labels; the first that a row has is taken
    classes: tuple[str, ...] = ()  # names of numbered labels; () leaves the numbers
    sections: tuple[str, ...] = ()  # fields that are joined to the text if there is no field of text
    text: str = field(default="text", kw_only=True)

    def open(self, wanted: Wanted) -> LabeledCorpus:
        """A local file, which is all training documents; a folder of files; or a repository of the hub."""
        labels = (wanted.label_field,) if wanted.label_field else self.labels
        table = replace(self, text=wanted.text_field, labels=labels)
        if wanted.source is not None and wanted.source.exists():
            return table._open_local(wanted.name, wanted.source)
        if wanted.source is None and not self.hub:
            raise DataError(
                f"the labelled corpus {wanted.name} needs both: --from names a file or folder, --label-field its labels"
            )
        hub = str(wanted.source or self.hub)
        if not self.hub or not re.fullmatch(r"[\w.-]+/[\w.-]+", hub):
            raise DataError(f"{wanted.source} does not exist: --from names a file or folder to read")
        identity = {"hub": hub, "configuration": HUB_CONFIGURATIONS.get(hub)}
        return LabeledCorpus(wanted.name, identity, lambda: table._hub_splits(hub))

    def _open_local(self, name: str, source: Path) -> LabeledCorpus:
        if source.is_file():
            if files.suffix_of(source) not in files.TABLES:
                raise DataError(f"{source} has no fields: a labelled file is .json, .jsonl or .parquet")
            return _of_files(name, source, source.parent, {"train": [source]}, self.row)
        if self.hub and (source / "data").is_dir():
            source = source / "data"  # a copy of the hub's repository: the configuration that opens by default
        found = files.files_in(source, files.TABLES)
        splits: dict[str, list[Path]] = {}
        for path_within, path in found.items():
            if split := split_of(path_within):
                splits.setdefault(split, []).append(path)
        if not splits and found:
            splits = {"train": list(found.values())}
        if "train" not in splits:
            raise DataError(
                f"{source} has no training documents: name files by their split, "
                "such as train.jsonl, dev.jsonl and test.jsonl (or .json, .parquet; or in folders of these names)"
            )
        return _of_files(name, source, source, splits, self.row)

    def _hub_splits(self, hub: str) -> dict[str, Iterable[Row]]:
        with files.hub_errors(hub):
            import datasets

            stored = datasets.load_dataset(hub, HUB_CONFIGURATIONS.get(hub))

        def rows(name: str) -> Iterator[Row]:
            return (self._row(row, f"{hub}, {name} row {number}") for number, row in enumerate(stored[name], 1))

        return {SPLIT_NAMES[name]: rows(name) for name in stored if name in SPLIT_NAMES}

    def row(self, found: files.FileRow) -> Row:
        return self._row(found.content, found.where)

    def _row(self, content: Any, where: str) -> Row:
        if not isinstance(content, dict):
            raise DataError(f"{where} is not an object with fields")
        label_field = next((name for name in self.labels if name in content), None)
        if label_field is None:
            wanted, known = " or ".join(f"'{name}'" for name in self.labels), ", ".join(map(str, content))
            raise DataError(f"{where} has no field {wanted}, only {known}: name the field of labels with --label-field")
        if self.text not in content and any(section in content for section in self.sections):
            values = [content.get(section) or "" for section in self.sections]
            parts = [part for value in values for part in (value if isinstance(value, list) else [value])]
            text = valid_text("\n".join(str(part) for part in parts if part))
        else:
            text = files.text_of(content, self.text, where)
        return Row(text, self._labels(content[label_field], where), where)

    def _labels(self, value: Any, where: str) -> list[str] | str | None:
        """The labels of a row as names, each name of a list once."""
        if value is None or value == "":
            return None
        if isinstance(value, list):
            return list(dict.fromkeys(self._label(item, where) for item in value))
        return self._label(value, where)

    def _label(self, value: Any, where: str) -> str:
        if isinstance(value, str) and value:
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            if not self.classes:
                return str(value)
            if 0 <= value < len(self.classes):
                return self.classes[value]
        among = f"; the classes are 0 to {len(self.classes) - 1}" if self.classes else ""
        raise DataError(f"{where} has the label {value!r}: labels are texts or whole numbers, or lists of them{among}")


def _of_files(
    name: str, source: Path, root: Path, splits: dict[str, list[Path]], row: Callable[[files.FileRow], Row]
) -> LabeledCorpus:
    paths = [path for part in splits.values() for path in part]
    reading = Reading(total=sum(path.stat().st_size for path in paths))

    def opened() -> dict[str, Iterable[Row]]:
        return {split: map(row, files.read_rows(part, reading)) for split, part in splits.items() if part}

    return LabeledCorpus(name, files.identity_of(source, root, paths), opened, reading=reading)


def split_of(name: str) -> str | None:
    """The split that the name of a file says, else the nearest folder's: data/train-00000-of-00002.parquet is train."""
    for part in reversed(name.lower().split("/")):
        for word in re.split(r"[^a-z0-9]+", part):
            if word in SPLIT_NAMES:
                return SPLIT_NAMES[word]
    return None


EURLEX57K = Table(
    "pietrolesci/eurlex-57k",
    ("eurovoc_concepts", "concepts"),
    sections=("header", "recitals", "main_body", "attachments"),  # in the order of the original release
)
AGNEWS = Table("fancyzhx/ag_news", ("label",), CLASSES["agnews"])
IMDB = Table("stanfordnlp/imdb", ("label",), CLASSES["imdb"])


def open_imdb(wanted: Wanted) -> LabeledCorpus:
    """aclImdb as released (pos/*.txt and neg/*.txt, in train/ and test/ or alone), or tables."""
    source = wanted.source
    if source is None or not source.is_dir():
        return IMDB.open(wanted)
    root = source / "aclImdb" if (source / "aclImdb").is_dir() else source
    folders = {"train": root / "train", "test": root / "test"} if (root / "train" / "pos").is_dir() else {"train": root}
    splits = {
        split: [file for name in CLASSES["imdb"] for file in sorted((folder / name).glob("*.txt"))]
        for split, folder in folders.items()
    }
    if not any(splits.values()):
        return IMDB.open(wanted)
    return _of_files(
        wanted.name, source, source, splits, lambda found: Row(found.content, found.path.parent.name, found.where)
    )
