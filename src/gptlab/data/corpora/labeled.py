"""Labelled corpora. Opening one makes a `LabeledCorpus`; its documents are read later."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gptlab.data.corpora import files
from gptlab.data.corpora.base import SPLITS, LabeledCorpus, Reading, Row, Wanted
from gptlab.data.corpora.labels import LabelField
from gptlab.data.corpora.splits import refuse_held_out, sort_files, splits_of
from gptlab.data.tokenizers import valid_text
from gptlab.errors import DataError

HUB_CONFIGURATIONS = {"NLP-AUEB/eurlex": "eurlex57k"}  # other repositories open without one
CLASSES = {"agnews": ("World", "Sports", "Business", "Sci/Tech"), "imdb": ("neg", "pos")}  # by number
FOLDER = "folder"  # the field of labels of a text file
# JSON that holds no documents, of Hugging Face datasets and of EURLEX57K.
DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
DESCRIPTIONS |= {"EURLEX57K.json", "eurovoc_labels.json"}
UNLABELLED, NO_DOCUMENTS = "unlabelled by name", "without labelled documents"
OTHER_SPLIT = "that is a split of another kind than train, val and test"


@dataclass(frozen=True)
class Table:
    """Where the rows of a corpus are and what their fields are called."""

    hub: str = ""  # hub id of the usual source
    labels: tuple[str, ...] = ()  # names for the field of labels; the first that a row has is taken
    classes: tuple[str, ...] = ()  # names of numbered labels; () leaves the numbers
    sections: tuple[str, ...] = ()  # fields that are joined to the text if there is no field of text
    from_one: str = ""  # a field of labels whose numbers begin with 1
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
        reading = Reading()
        return LabeledCorpus(wanted.name, identity, lambda: table._hub_splits(hub, reading), reading=reading)

    def _open_local(self, name: str, source: Path) -> LabeledCorpus:
        if source.is_file():
            if files.suffix_of(source) not in files.TABLES:
                raise DataError(f"{source} has no fields: a labelled file is {_kinds()}")
            refuse_held_out(source)
            return self._of_tables(name, source, source.parent, {"train": [source]})
        inner = source / "data"  # in a copy of the hub's repository: the configuration that opens by default
        root = inner if self.hub and inner.is_dir() else source
        found = files.files_in(root, files.TABLES)
        found = {
            name: path
            for name, path in found.items()
            if path.name not in DESCRIPTIONS and not _is_prepared(path.parent)
        }
        if not found and self.labels == (FOLDER,):
            return _of_folders(name, source)
        _refuse_twice(root, list(found))
        splits = {split: [found[name] for name in names] for split, names in sort_files(root, found).items()}
        if "train" not in splits:
            raise DataError(
                f"{source} has no training documents: name files by their split, such as train.jsonl, dev.jsonl and "
                f"test.jsonl (or {_kinds()}; or in folders of these names); a folder of text files for each label is "
                f"read with --label-field {FOLDER}"
            )
        return self._of_tables(name, root, source, splits)

    def _of_tables(self, name: str, source: Path, folder: Path, splits: dict[str, list[Path]]) -> LabeledCorpus:
        paths = [path for split in SPLITS for path in splits.get(split, [])]
        column = self.labels[0] if len(self.labels) == 1 else None
        of_rows = self._fields(lambda: (row.content for row in files.read_rows(paths, Reading(), column)))

        def row(split: str, found: files.FileRow) -> Row:
            return self._row(split, found.content, found.where, of_rows)

        return _of_files(name, source, folder, splits, row)

    def _hub_splits(self, hub: str, reading: Reading) -> dict[str, Iterable[Row]]:
        with files.hub_errors(hub):
            import datasets

            stored = datasets.load_dataset(hub, HUB_CONFIGURATIONS.get(hub))

        of_rows = self._fields(lambda: (row for name in stored for row in stored[name]))
        splits: dict[str, list[str]] = {split: [] for split in SPLITS}
        for name in stored:
            found = splits_of(name)
            if len(found) == 1 and found[0] in splits:
                splits[found[0]].append(name)
        reading.read = {split: names for split, names in splits.items() if names}
        others = [name for name in stored if not any(name in names for names in splits.values())]
        reading.skipped = {OTHER_SPLIT: others} if others else {}

        def rows(split: str) -> Iterator[Row]:
            for name in splits[split]:
                for number, row in enumerate(stored[name], 1):
                    yield self._row(split, row, f"{hub}, {name} row {number}", of_rows)

        return {split: rows(split) for split in reading.read}

    def _fields(self, rows: Callable[[], Iterable[Any]]) -> dict[str, LabelField]:
        """The fields that may hold labels."""

        def of_field(name: str) -> LabelField:
            values = lambda: (files.field_of(row, name) for row in rows() if _has(row, name))  # noqa: E731
            return LabelField(name, values, self.classes, first=int(name == self.from_one))

        return {name: of_field(name) for name in self.labels}

    def _row(self, split: str, content: Any, where: str, of_rows: dict[str, LabelField]) -> Row:
        if not isinstance(content, dict):
            raise DataError(f"{where} is not an object with fields")
        label_field = next((name for name in self.labels if _has(content, name)), None)
        if label_field is None and split != "test":  # test documents are often published without labels
            wanted, known = " or ".join(f"'{name}'" for name in self.labels), ", ".join(map(str, content))
            header = " (add a line of names if the first is a document)" if re.search(r"\.[ct]sv", where) else ""
            raise DataError(
                f"{where} has no field {wanted}, only {known}{header}: name the field of labels with --label-field"
            )
        labels = of_rows[label_field].names(files.field_of(content, label_field), where) if label_field else None
        if self.text not in content and any(section in content for section in self.sections):
            values = [content.get(section) or "" for section in self.sections]
            parts = [part for value in values for part in (value if isinstance(value, list) else [value])]
            text = valid_text("\n".join(str(part) for part in parts if part))
        else:
            found = files.find_text(content, self.text)
            if isinstance(found, files.Lack) and found.reason == files.NO_FIELD:
                raise DataError(where + found.says)
            text = found if isinstance(found, str) else ""  # null, or a number: counted, as in a corpus of text
        return Row(text, labels, where)


def _of_files(
    name: str, source: Path, folder: Path, splits: dict[str, list[Path]], row: Callable[[str, files.FileRow], Row]
) -> LabeledCorpus:
    """A corpus of chosen files of a folder, in which `source` is, or of the one file `source`."""
    paths = [path for part in splits.values() for path in part]
    root = source.parent if source.is_file() else source
    reading = Reading(total=sum(path.stat().st_size for path in paths))
    reading.read = {split: [p.relative_to(folder).as_posix() for p in part] for split, part in splits.items() if part}
    if source.is_dir():
        chosen = {name for names in reading.read.values() for name in names}
        listing = files.list_folder(folder, (*files.SUFFIXES, ""))
        beside = [(why, name) for why, names in listing.skipped.items() for name in names]
        for name in listing.files.keys() - chosen:
            beside.append((UNLABELLED if "unlabelled" in splits_of(name) else NO_DOCUMENTS, name))
        for why, name in sorted(beside):
            if not _is_prepared((folder / name).parent):
                reading.skipped.setdefault(why, []).append(name)

    def opened() -> dict[str, Iterable[Row]]:
        def rows(split: str) -> Iterator[Row]:
            return (row(split, found) for found in files.read_rows(splits[split], reading))

        return {split: rows(split) for split, part in splits.items() if part}

    return LabeledCorpus(name, files.identity_of(source, root, paths), opened, reading=reading)


def _of_folders(name: str, source: Path) -> LabeledCorpus:
    """Text files, each a document, in folders with the name of its label: train/sci.med/1.txt, or sci.med/53068.

    The labels take turns, so that the first documents are of all of them.
    """
    folders: dict[str, list[Path]] = {}
    texts = (*(suffix for suffix in files.SUFFIXES if suffix not in files.TABLES), "")
    for found, path in files.files_in(source, texts).items():
        if files.suffix_of(path) or "." not in path.name:  # those of 20 Newsgroups are called 53068
            folders.setdefault(found.rpartition("/")[0], []).append(path)
    label_of = {
        folder: next((part for part in reversed(folder.split("/")) if part and not splits_of(part)), "")
        for folder in folders
    }
    splits: dict[str, list[Path]] = {}
    for split, names in sort_files(source, [folder for folder in folders if label_of[folder]]).items():
        numbered = sorted((number, name) for name in names for number in range(len(folders[name])))
        splits[split] = [folders[name][number] for number, name in numbered]
    if "train" not in splits:
        raise DataError(
            f"{source} has no training documents: --label-field {FOLDER} reads text files (.txt) in a folder for each "
            "label, such as train/sports/1.txt"
        )

    def row(split: str, found: files.FileRow) -> Row:
        folder = found.path.parent.relative_to(source).as_posix()
        return Row(files.text_of(found.content, "", found.where), label_of[folder], found.where)

    return _of_files(name, source, source, splits, row)


def _has(content: Any, name: str) -> bool:
    """Whether a row has a field; `a.b` is one of a."""
    try:
        files.field_of(content, name)
    except (KeyError, TypeError):
        return False
    return True


def _is_prepared(folder: Path) -> bool:
    """Whether a folder is a dataset that was prepared here, or is being prepared."""
    names = ("manifest.json", "progress.json")
    return (folder / "tokenizer.json").is_file() and any((folder / name).is_file() for name in names)


def _kinds() -> str:
    """The kinds of files that have fields, as a text."""
    kinds = [suffix for suffix in files.TABLES if suffix.count(".") == 1]
    return f"{', '.join(kinds[:-1])} or {kinds[-1]}"


def _refuse_twice(source: Path, names: list[str]) -> None:
    """Refuse two files of the same documents, and two configurations of a repository of the hub.

    The first differ by their suffix alone, the second are the same shard of a split in two folders.
    """
    stems: dict[str, str] = {}
    shards: dict[tuple[str, ...], str] = {}
    for name in names:
        stem = name[: len(name) - len(files.suffix_of(Path(name)))]
        if other := stems.get(stem):
            raise DataError(f"{source}: {other} and {name} may be the same documents: move one of them elsewhere")
        stems[stem] = name
        if re.search(r"-\d{5}-of-\d{5}|/\d{4}\.parquet$", name):
            other = shards.setdefault((*splits_of(name), Path(name).name), name)
            if other != name:
                raise DataError(f"{source}: {other} and {name} are of two configurations: name the folder of one")


EURLEX57K = Table(
    "pietrolesci/eurlex-57k",
    ("eurovoc_concepts", "concepts"),
    sections=("header", "recitals", "main_body", "attachments"),  # in the order of the original release
)
AGNEWS = Table(
    "fancyzhx/ag_news",
    ("label", "Class Index"),  # the second of the original release, whose classes are 1 to 4
    CLASSES["agnews"],
    ("Title", "Description"),
    from_one="Class Index",
)
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

    def row(split: str, found: files.FileRow) -> Row:
        return Row(found.content, found.path.parent.name, found.where)

    return _of_files(wanted.name, source, source, splits, row)
