"""Labelled documents for task = "classify": `gptlab prepare` of a labelled corpus, and its reading.

    eurlex57k    57,000 EU acts with EuroVoc concepts (Chalkidis et al. 2019, arXiv 1906.02192); multi-label
    agnews       news in 4 classes (Zhang et al. 2015)
    imdb         film reviews, positive or negative (Maas et al. 2011)
    constructs   functions of Python's standard library with the syntax they use; multi-label, nothing is downloaded
    FILES        .json, .jsonl (these also as .gz) and .parquet with a field of labels (--label-field)

A folder holds for each split the tokens of whole documents one after the other, their offsets, the label ids of all
documents one after the other, and their offsets, as numpy files. No special token is stored: a batch gets them.

The label space is built from the training split alone and is sorted. Labels that only val or test have follow after
it, with a training count of 0, since zero-shot scores need them; a classifier has `n_train_labels` outputs.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import platform
import re
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gptlab.config import Data
from gptlab.data.corpora import DEFAULT_VAL_FRACTION, fraction_of, listing, read_text, suffix_of
from gptlab.data.prepare import BATCH_CHARACTERS, disk_errors, lock, progress_bar, refuse_another, version
from gptlab.data.shards import MANIFEST_VERSION, file_sha256, shard_header, token_dtype
from gptlab.data.tokenizers import HuggingFaceTokenizer, Tokenizer, load_tokenizer, make_tokenizer, valid_text
from gptlab.errors import DataError
from gptlab.rundir import write_atomically

NAMES = ("eurlex57k", "agnews", "imdb", "constructs")
SPLITS = ("train", "val", "test")
# What files and splits of the hub are called; others (imdb's "unsupervised") are not read.
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}

HUB = {
    "eurlex57k": "pietrolesci/eurlex-57k",
    "agnews": "fancyzhx/ag_news",
    "imdb": "stanfordnlp/imdb",
}
HUB_CONFIGURATIONS = {"NLP-AUEB/eurlex": "eurlex57k"}  # other repositories are read as they open without one
LABEL_FIELDS = {"eurlex57k": ("eurovoc_concepts", "concepts"), "agnews": ("label",), "imdb": ("label",)}
CLASSES = {"agnews": ("World", "Sports", "Business", "Sci/Tech"), "imdb": ("neg", "pos")}  # by number
EURLEX_SECTIONS = ("header", "recitals", "main_body", "attachments")  # of an act, in the order upstream joins them

# Specials at the beginning, at the end and after a document: RoBERTa's, then BERT's.
SPECIALS = (("<s>", "</s>", "<pad>"), ("[CLS]", "[SEP]", "[PAD]"))
FILES = ("tokens", "offsets", "labels", "label_offsets")


class Document(NamedTuple):
    """A text with its labels: a list, one label, or none (None, "" or an empty list)."""

    text: str
    labels: list[str] | str | None
    where: str  # for messages: the file and the line


@dataclass(frozen=True)
class LabeledCorpus:
    """Where documents come from.

    Attributes:
        source: what identifies the text, for the manifest.
        splits: opens the corpus: for each split it has, its documents, in the same order every time.
    """

    name: str
    source: dict[str, Any]
    splits: Callable[[], dict[str, Iterable[Document]]]


# -- preparing ------------------------------------------------------------------------------------------------------


def prepare_labeled(
    corpus: str,
    source: Path | str | None = None,
    out: Path | str | None = None,
    tokenizer: str = "gpt2",
    text_field: str = "text",
    label_field: str | None = None,
    max_documents: int | None = None,
    val_fraction: float | None = None,
) -> Path:
    """Tokenise a labelled corpus into a folder that `LabeledDataset` reads.

    The folder is written under a hidden name beside its own and renamed when it is complete. A folder that holds the
    same dataset already is left as it is. Documents without a label or without text are left out and counted.

    Args:
        corpus: eurlex57k, agnews, imdb, constructs; with `label_field` also text or the path of a file or folder.
        source: a local file or folder, or another hub id, to read instead of the usual source; needed for `text`.
        out: the folder; by default where a recipe with this corpus and tokenizer looks for it.
        tokenizer: gpt2, byte, char, bpe-N (learnt from the training split), a tokenizer.json, a folder with one or
            with vocab.json and merges.txt, or a hub id such as FacebookAI/roberta-base.
        text_field: field or column that holds the text.
        label_field: field or column that holds the labels: a text or whole number each, or a list of them each.
        max_documents: read no more than this many labelled documents of each split.
        val_fraction: share of the training documents held out as val where the corpus has no such split; 0.05.

    Returns:
        The folder.

    Raises:
        DataError: one sentence on what is wrong with a setting, the source, or the folder.
    """
    folder = Path(out or Data(corpus=corpus, tokenizer=tokenizer).folder)
    if corpus not in NAMES and source is None and Path(corpus).exists():
        corpus, source = "text", corpus
    if max_documents is not None and max_documents < 1:
        raise DataError(f"max_documents = {max_documents}: must be at least 1")
    if val_fraction is not None and not 0 < val_fraction <= 0.5:
        raise DataError(f"val_fraction = {val_fraction}: must be more than 0 and at most 0.5")
    opened = open_labeled(corpus, source, text_field, label_field)
    draft = {
        "kind": "labeled",
        "format": "npy",
        "version": MANIFEST_VERSION,
        "corpus": corpus,
        "source": opened.source,
        "tokenizer": _named(tokenizer),
        "settings": {
            "text_field": text_field,
            "label_field": label_field,
            "max_documents": max_documents,
            "val_fraction": val_fraction,
        },
    }
    if (folder / "manifest.json").is_file():
        found = _manifest(folder)
        refuse_another(folder, found, draft)
        print(f"{folder}: already prepared, {_summary(found)}")
        return folder
    if folder.is_dir() and any(folder.iterdir()):
        names = sorted(path.name for path in folder.iterdir())
        raise DataError(f"{folder} holds other files ({', '.join(names[:3])}): name another --out")

    def documents(left_out: Counter[str] | None = None) -> Iterator[tuple[str, Document]]:
        return _documents(opened, max_documents, val_fraction, Counter() if left_out is None else left_out)

    made = _make_tokenizer(tokenizer, documents)
    workshop = folder.with_name(f".{folder.name}.tmp")
    with disk_errors(folder), lock(workshop):
        temporary = workshop / folder.name
        shutil.rmtree(temporary, ignore_errors=True)  # what a kill has left
        temporary.mkdir()
        try:
            manifest = _write(temporary, folder, draft, made, documents)
            if folder.is_dir():
                folder.rmdir()  # it is empty; Windows does not replace it
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)  # nothing is there any more unless something went wrong
    print(f"{folder}: {_summary(manifest)}")
    return folder


def _summary(manifest: dict[str, Any]) -> str:
    splits, labels = manifest["splits"], manifest["labels"]
    sizes = ", ".join(f"{entry['documents']:,} {name}" for name, entry in splits.items())
    each = sum(entry["labels"] for entry in splits.values()) / sum(entry["documents"] for entry in splits.values())
    unseen = f" ({manifest['unseen_labels']:,} never in train)" if manifest["unseen_labels"] else ""
    left_out = "".join(f", {number:,} left out without {what}" for what, number in manifest["left_out"].items())
    tokens = sum(entry["tokens"] for entry in splits.values())
    return f"{sizes} documents, {tokens:,} tokens, {len(labels):,} labels{unseen}, {each:.2f} a document{left_out}"


def _documents(
    corpus: LabeledCorpus, max_documents: int | None, val_fraction: float | None, left_out: Counter[str]
) -> Iterator[tuple[str, Document]]:
    """(split, document) of what has text and labels, split by split; `left_out` counts the rest."""
    multi: bool | None = None

    def usable(documents: Iterable[Document]) -> Iterator[Document]:
        nonlocal multi
        for document in documents:
            if not document.labels:
                left_out["a label"] += 1
            elif not document.text:
                left_out["text"] += 1
            else:
                is_list = isinstance(document.labels, list)
                if multi is not None and multi != is_list:
                    kinds = ("a list of labels", "one label") if is_list else ("one label", "a list of labels")
                    raise DataError(
                        f"{document.where} has {kinds[0]}, and documents before it have {kinds[1]}: "
                        "a dataset has either lists or single labels"
                    )
                multi = is_list
                yield document

    splits = corpus.splits()
    if "train" not in splits:
        raise DataError(f"the corpus {corpus.name} has no training documents, only {', '.join(splits) or 'none'}")
    if "val" in splits and val_fraction is not None:
        raise DataError(f"val_fraction = {val_fraction}: the corpus {corpus.name} has a validation split of its own")
    for split in SPLITS:
        if split in splits:
            documents = islice(usable(splits[split]), max_documents)
            if split == "train" and "val" not in splits:
                yield from _hold_out(documents, val_fraction or DEFAULT_VAL_FRACTION)
            else:
                yield from ((split, document) for document in documents)


def _hold_out(documents: Iterator[Document], fraction: float) -> Iterator[tuple[str, Document]]:
    """One of every 1 / fraction documents in turn is val, by a hash of its position; of fewer than that also one."""
    size = max(2, round(1 / fraction))
    for block in count():
        group = list(islice(documents, size))
        held_out = int(fraction_of(f"document {block}") * (size if block else len(group)))
        yield from (("val" if index == held_out else "train", document) for index, document in enumerate(group))
        if len(group) < size:
            return


def _write(
    temporary: Path,
    folder: Path,
    draft: dict[str, Any],
    tokenizer: Tokenizer,
    documents: Callable[[Counter[str]], Iterator[tuple[str, Document]]],
) -> dict[str, Any]:
    """All files of the dataset, the manifest last."""
    cls, sep, pad, vocab_size = _special_ids(tokenizer)
    dtype = token_dtype("llmc", vocab_size)
    left_out: Counter[str] = Counter()
    writers: dict[str, _SplitWriter] = {}
    multi = False
    try:
        with progress_bar(True, folder) as show:
            for batch in _batches(documents(left_out)):
                texts = [document.text for _, document in batch]
                for (split, document), ids in zip(batch, tokenizer.encode_batch(texts), strict=True):
                    if split not in writers:
                        writers[split] = _SplitWriter(temporary, split, dtype)
                    multi = isinstance(document.labels, list)
                    writers[split].add(ids, document.labels if isinstance(document.labels, list) else [document.labels])
                show(sum(writer.tokens for writer in writers.values()))
        for split, name in (("train", "training"), ("val", "validation")):
            if split not in writers:
                raise DataError(f"the corpus {draft['corpus']} has no {name} documents with text and labels")
        counts = Counter(label for labels in writers["train"].labels for label in labels)
        others = {label for writer in writers.values() for labels in writer.labels for label in labels} - set(counts)
        labels = [*_in_order(counts), *_in_order(others)]
        numbers = {label: number for number, label in enumerate(labels)}
        splits = {split: writers[split].finish(numbers) for split in SPLITS if split in writers}
    finally:
        for writer in writers.values():
            writer.file.close()
    write_atomically(temporary / "tokenizer.json", json.dumps(tokenizer.spec()) + "\n")
    manifest = {
        **draft,
        "tokenizer": {
            **draft["tokenizer"],
            "vocab_size": tokenizer.vocab_size,
            "eot": tokenizer.eot,
            "file": "tokenizer.json",
            "sha256": file_sha256(temporary / "tokenizer.json"),
        },
        "dtype": dtype.name,
        "vocab_size": vocab_size,
        "cls": cls,
        "sep": sep,
        "pad": pad,
        "multi": multi,
        "n_train_labels": len(counts),
        "unseen_labels": len(others),
        "left_out": dict(sorted(left_out.items())),
        "splits": splits,
        "labels": labels,
        "train_counts": [counts[label] for label in labels],
        "gptlab": version(),
    }
    write_atomically(temporary / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    return manifest


def _in_order(labels: Iterable[str]) -> list[str]:
    """Sorted, numbers as numbers where all are."""
    names = sorted(labels)
    return sorted(names, key=int) if all(name.isascii() and name.isdigit() for name in names) else names


def _batches(documents: Iterator[tuple[str, Document]]) -> Iterator[list[tuple[str, Document]]]:
    batch: list[tuple[str, Document]] = []
    size = 0
    for item in documents:
        batch.append(item)
        size += len(item[1].text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _SplitWriter:
    """One split's files: tokens as they come, the rest when the label space is known."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype[Any]) -> None:
        self.folder, self.split, self.dtype = folder, split, dtype
        self.lengths: list[int] = []
        self.labels: list[list[str]] = []
        self.tokens = 0
        self.file = open(folder / f"{split}.tokens.npy", "wb")  # noqa: SIM115 - stays open from batch to batch
        self.file.write(shard_header("npy", dtype, 0))  # the count comes when it is known

    def add(self, ids: NDArray[Any], labels: list[Any]) -> None:
        self.file.write(ids.astype(self.dtype).tobytes())
        self.lengths.append(len(ids))
        self.labels.append(labels)
        self.tokens += len(ids)

    def finish(self, numbers: dict[str, int]) -> dict[str, Any]:
        """Write what is missing; the split's entry in the manifest."""
        self.file.seek(0)
        self.file.write(shard_header("npy", self.dtype, self.tokens))
        self.file.flush()
        os.fsync(self.file.fileno())
        ids = [sorted(numbers[label] for label in labels) for labels in self.labels]
        arrays: dict[str, NDArray[Any]] = {
            "offsets": np.cumsum([0, *self.lengths], dtype=np.int64),
            "labels": np.array([number for row in ids for number in row], np.int32),
            "label_offsets": np.cumsum([0, *map(len, ids)], dtype=np.int64),
        }
        for name, array in arrays.items():
            with open(self.folder / f"{self.split}.{name}.npy", "wb") as file:
                np.save(file, array)
                file.flush()
                os.fsync(file.fileno())
        files = {name: f"{self.split}.{name}.npy" for name in FILES}
        return {
            "documents": len(self.lengths),
            "tokens": self.tokens,
            "labels": len(arrays["labels"]),
            "files": {name: {"file": file, "sha256": file_sha256(self.folder / file)} for name, file in files.items()},
        }


# -- tokenizers -----------------------------------------------------------------------------------------------------


def _named(tokenizer: str) -> dict[str, Any]:
    """What identifies the tokenizer that was asked for, before it is made."""
    digests = "".join(file_sha256(path) for path in _tokenizer_files(Path(tokenizer)))
    named = {"name": Path(tokenizer).stem}
    return named | ({"source_sha256": hashlib.sha256(digests.encode()).hexdigest()} if digests else {})


OURS = ("gpt2", "byte", "char")


def _tokenizer_files(path: Path) -> list[Path]:
    """A tokenizer.json, or vocab.json and merges.txt; nothing where `path` is neither a file nor a folder."""
    if path.is_file():
        return [path]
    if not path.is_dir() or str(path) in OURS:  # a folder may be called as a tokenizer is
        return []
    for files in (["tokenizer.json"], ["vocab.json", "merges.txt"]):
        if all((path / file).is_file() for file in files):
            return [path / file for file in files]
    raise DataError(f"{path} has no tokenizer: neither a tokenizer.json nor vocab.json and merges.txt")


def _make_tokenizer(name: str, documents: Callable[[], Iterator[tuple[str, Document]]]) -> Tokenizer:
    files = _tokenizer_files(Path(name))
    if not files and (name in OURS or re.fullmatch(r"bpe-\d+", name)):
        learnt_from = SPLITS if name == "char" else SPLITS[:1]  # every character has to have an id
        return make_tokenizer(name, lambda: (doc.text for split, doc in documents() if split in learnt_from))
    if not files:
        files = [_download_tokenizer(name)]
    tokenizer = load_tokenizer(files[0]) if len(files) == 1 else _read_vocabulary(*files)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        tokenizer.name = Path(name).stem
    return tokenizer


def _download_tokenizer(name: str) -> Path:
    known = "use gpt2, byte, char, bpe-N, a tokenizer.json, a folder that has one, or a hub id"
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.endswith(".json"):
        raise DataError(f"no tokenizer '{name}': {known}")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "tokenizer.json"))
    except Exception as error:  # of the hub's client and of the network: there is no common class
        raise DataError(
            f"no tokenizer '{name}' here, and its tokenizer.json could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}): {known}, which needs the network once"
        ) from None


def _read_vocabulary(vocabulary: Path, merges: Path) -> Tokenizer:
    """Byte-level BPE from the two files of GPT-2 and RoBERTa."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers

    try:
        fast = Fast(models.BPE.from_file(str(vocabulary), str(merges)))
        ids = json.loads(vocabulary.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises nothing more special
        raise DataError(f"{vocabulary} and {merges.name} are not a vocabulary of byte-level BPE: {error}") from None
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    specials = ("<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>")
    fast.add_special_tokens([token for token in specials if token in ids])
    return HuggingFaceTokenizer(vocabulary.parent.name, json.loads(fast.to_str()))


def _special_ids(tokenizer: Tokenizer) -> tuple[int, int, int, int]:
    """Ids of cls, sep and pad, and the size of the vocabulary with them: its own, or three new ids at its end."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        ids = {token["content"]: token["id"] for token in tokenizer.hf_json()["added_tokens"] if token["special"]}
        for cls, sep, pad in SPECIALS:
            if cls in ids and sep in ids and pad in ids:
                return ids[cls], ids[sep], ids[pad], tokenizer.vocab_size
    size = tokenizer.vocab_size
    return size, size + 1, size + 2, size + 3


# -- corpora --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Fields:
    """Where a row has its text and its labels."""

    text: str
    labels: tuple[str, ...]  # the first of these that a row has
    classes: tuple[str, ...]  # names of numbered labels; () leaves the numbers
    sections: tuple[str, ...]  # joined, where there is no field of the text


def open_labeled(corpus: str, source: Path | str | None, text_field: str, label_field: str | None) -> LabeledCorpus:
    """A labelled corpus by name; nothing is read yet.

    Raises:
        DataError: an unknown corpus, one without labels, or a source that is missing or has nothing to read.
    """
    if corpus == "constructs":
        if source is not None or label_field is not None:
            raise DataError("the corpus constructs is made from the Python that runs it: it takes no --from or fields")
        return LabeledCorpus(corpus, {"python": platform.python_version()}, _constructs)
    if corpus not in NAMES and corpus != "text":
        raise DataError(
            f"no labelled corpus '{corpus}': use {', '.join(NAMES)} or the path of a file or folder with --label-field"
        )
    if corpus == "text" and (source is None or label_field is None):
        raise DataError("the labelled corpus text needs both: --from names a file or folder, --label-field its labels")
    fields = _Fields(
        text_field,
        (label_field,) if label_field else LABEL_FIELDS[corpus],
        CLASSES.get(corpus, ()),
        EURLEX_SECTIONS if corpus == "eurlex57k" else (),
    )
    path = Path(source or "")
    if source is not None and path.exists():
        return _local(corpus, path, fields)
    hub = str(source or HUB[corpus])
    if corpus == "text" or not re.fullmatch(r"[\w.-]+/[\w.-]+", hub):
        raise DataError(f"{source} does not exist: --from names a file or folder to read")
    configuration = HUB_CONFIGURATIONS.get(hub)
    return LabeledCorpus(
        corpus, {"hub": hub, "configuration": configuration}, lambda: _hub_splits(hub, configuration, fields)
    )


def _constructs() -> dict[str, Iterable[Document]]:
    from gptlab.data.constructs import documents

    splits: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for split, text, labels in documents():
        splits[split].append(Document(text, labels, "a function"))
    return dict(splits)


def _hub_splits(hub: str, configuration: str | None, fields: _Fields) -> dict[str, Iterable[Document]]:
    try:
        import datasets
    except ImportError:
        raise DataError(f"{hub} needs the package datasets to be read: pip install datasets") from None
    try:
        stored = datasets.load_dataset(hub, configuration)
    except Exception as error:  # of requests, fsspec, pyarrow and datasets: there is no common class
        first_line = str(error).splitlines()[0] if str(error) else ""
        raise DataError(
            f"{hub} on the Hugging Face hub could not be read ({type(error).__name__}: {first_line}): "
            "connect to the network, or name a local copy with --from PATH"
        ) from None

    def documents(name: str) -> Iterator[Document]:
        for number, row in enumerate(stored[name], 1):
            yield _document(row, fields, f"{hub}, {name} row {number}")

    return {SPLIT_NAMES[name]: documents(name) for name in stored if name in SPLIT_NAMES}


def _local(corpus: str, source: Path, fields: _Fields) -> LabeledCorpus:
    """A file, which is all training documents; or a folder, whose files have their split in their name or folder's."""
    if source.is_file():
        if not _is_table(source):
            raise DataError(f"{source} has no fields: a labelled file is .json, .jsonl or .parquet")
        identity = {"path": str(source), "bytes": source.stat().st_size, "sha256": file_sha256(source)}
        return LabeledCorpus(corpus, identity, lambda: {"train": _file_documents([source], fields)})
    if corpus == "imdb" and (classic := _imdb_files(source)):
        files = [file for part in classic.values() for file in part]
        return LabeledCorpus(
            corpus,
            {"path": str(source)} | listing(source, files),
            lambda: {split: _reviews(part) for split, part in classic.items()},
        )
    if corpus in HUB and (source / "data").is_dir():
        source = source / "data"  # a copy of the hub's repository: the configuration that opens by default
    found = (path for path in source.rglob("*") if path.is_file() and _is_table(path))
    names = {path: path.relative_to(source).as_posix() for path in found}
    names = {path: name for path, name in names.items() if not any(part[0] == "." for part in name.split("/"))}
    splits: dict[str, list[Path]] = {}
    for path in sorted(names, key=names.__getitem__):
        if split := _split_of(names[path]):
            splits.setdefault(split, []).append(path)
    if not splits and names:
        splits = {"train": sorted(names, key=names.__getitem__)}
    if "train" not in splits:
        raise DataError(
            f"{source} has no training documents: name files by their split, "
            "such as train.jsonl, dev.jsonl and test.jsonl (or .json, .parquet; or in folders of these names)"
        )
    return LabeledCorpus(
        corpus,
        {"path": str(source)} | listing(source, [path for part in splits.values() for path in part]),
        lambda: {split: _file_documents(part, fields) for split, part in splits.items()},
    )


def _is_table(path: Path) -> bool:
    return suffix_of(path).startswith((".json", ".parquet"))


def _split_of(name: str) -> str | None:
    """The split that a file's name says, or else the nearest folder's: data/train-00000-of-00002.parquet is train."""
    for part in reversed(name.lower().split("/")):
        for word in re.split(r"[^a-z0-9]+", part):
            if word in SPLIT_NAMES:
                return SPLIT_NAMES[word]
    return None


def _imdb_files(source: Path) -> dict[str, list[Path]]:
    """The layout of aclImdb: pos/*.txt and neg/*.txt, in train/ and test/ or alone; {} where it is another."""
    root = source / "aclImdb" if (source / "aclImdb").is_dir() else source
    folders = {"train": root / "train", "test": root / "test"} if (root / "train" / "pos").is_dir() else {"train": root}
    splits = {
        split: [file for name in CLASSES["imdb"] for file in sorted((folder / name).glob("*.txt"))]
        for split, folder in folders.items()
    }
    return {split: files for split, files in splits.items() if files}


def _reviews(files: list[Path]) -> Iterator[Document]:
    for path in files:
        try:
            yield Document(read_text(path), path.parent.name, str(path))
        except (UnicodeDecodeError, OSError) as error:
            raise DataError(f"{path} cannot be read: {error}") from None


def _file_documents(files: list[Path], fields: _Fields) -> Iterator[Document]:
    for path in files:
        try:
            for where, row in _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path):
                yield _document(row, fields, where)
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path} cannot be read: {error}") from None


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, row) of a file with an object a line, or of one with an object or a list of them."""
    if not suffix_of(path).startswith(".jsonl"):
        try:
            content = json.loads(read_text(path))
        except json.JSONDecodeError as error:
            raise DataError(f"{path} is not JSON: {error}; a file with an object a line is called .jsonl") from None
        rows = content if isinstance(content, list) else [content]
        yield from ((f"{path}, record {number}", row) for number, row in enumerate(rows, 1))
        return
    with gzip.open(path, "rb") if path.name.endswith(".gz") else open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(f"{path}, line {number} is not JSON: {error}") from None
                yield f"{path}, line {number}", row


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise DataError(f"{path} needs pyarrow to be read: pip install pyarrow") from None
    try:
        with ParquetFile(path) as table:
            number = 0
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except ArrowException as error:
        raise DataError(f"{path} is not a readable parquet file: {error}") from None


def _document(row: Any, fields: _Fields, where: str) -> Document:
    if not isinstance(row, dict):
        raise DataError(f"{where} is not an object with fields")
    label_field = next((field for field in fields.labels if field in row), None)
    if label_field is None:
        wanted, known = " or ".join(f"'{field}'" for field in fields.labels), ", ".join(map(str, row))
        raise DataError(f"{where} has no field {wanted}, only {known}: name that of the labels with --label-field")
    if fields.text in row:
        text = row[fields.text] or ""
    elif any(section in row for section in fields.sections):
        values = [row.get(section) or "" for section in fields.sections]
        parts = [part for value in values for part in (value if isinstance(value, list) else [value])]
        text = "\n".join(str(part) for part in parts if part)
    else:
        known = ", ".join(map(str, row))
        raise DataError(f"{where} has no field '{fields.text}', only {known}: name that of the text with --text-field")
    if not isinstance(text, str):
        raise DataError(f"{where}: field '{fields.text}' holds {type(text).__name__}, not text")
    return Document(valid_text(text), _labels(row[label_field], fields.classes, where), where)


def _labels(value: Any, classes: tuple[str, ...], where: str) -> list[str] | str | None:
    """A row's labels as names; of a list each one once."""
    if value is None or value == "":
        return None
    if isinstance(value, list):
        return list(dict.fromkeys(_label(item, classes, where) for item in value))
    return _label(value, classes, where)


def _label(value: Any, classes: tuple[str, ...], where: str) -> str:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        if not classes:
            return str(value)
        if 0 <= value < len(classes):
            return classes[value]
    among = f"; the classes are 0 to {len(classes) - 1}" if classes else ""
    raise DataError(f"{where} has the label {value!r}: labels are texts or whole numbers, or lists of them{among}")


# -- reading --------------------------------------------------------------------------------------------------------


def bucket_length(longest: int, block_size: int) -> int:
    """Length of a batch whose longest row has `longest` tokens: the next of 1/8, 1/4, 1/2, 3/4 and all of block_size.

    Few shapes keep compilation cheap. Fractions are rounded up to a multiple of 8; nothing is above block_size.
    """
    assert longest <= block_size
    eighths = (math.ceil(block_size * share / 64) * 8 for share in (1, 2, 4, 6))
    return min((length for length in (*eighths, block_size) if longest <= length <= block_size), default=block_size)


class LabeledSplit:
    """One split of a labelled dataset, memory-mapped.

    Attributes:
        lengths: stored tokens of each document, (documents,); cls and sep are not among them.
    """

    def __init__(self, arrays: dict[str, NDArray[Any]], multi: bool, cls: int, sep: int, pad: int) -> None:
        self._tokens, self._labels = np.asarray(arrays["tokens"]), np.asarray(arrays["labels"])  # still mapped
        self._offsets, self._label_offsets = np.array(arrays["offsets"]), np.array(arrays["label_offsets"])
        self.lengths: NDArray[np.int64] = np.diff(self._offsets)
        self.multi, self.cls, self.sep, self.pad = multi, cls, sep, pad

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, documents: NDArray[Any], block_size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Documents as rows: cls, the first block_size - 2 tokens, sep, and pad up to a length of `bucket_length`.

        Args:
            documents: their numbers in the split, (B,).
            block_size: tokens of the longest row possible, at least 2.

        Returns:
            Token ids, (B, T), and for each row the tokens that are not padding, (B,).
        """
        assert block_size >= 2
        stored = np.minimum(self.lengths[documents], block_size - 2)  # (B,)
        longest = int(stored.max(initial=0)) + 2
        tokens = np.full((len(stored), bucket_length(longest, block_size)), self.pad, np.int64)
        tokens[:, 0] = self.cls
        starts = self._offsets[:-1][documents].tolist()
        for row, start, length in zip(tokens, starts, stored.tolist(), strict=True):
            row[1 : 1 + length] = self._tokens[start : start + length]
            row[1 + length] = self.sep
        return tokens, stored + 2

    def label_ids(self, document: int) -> NDArray[np.int64]:
        """Numbers of a document's labels, ascending."""
        return self._labels[self._label_offsets[document] : self._label_offsets[document + 1]].astype(np.int64)

    def targets(self, documents: NDArray[Any], n_labels: int) -> NDArray[Any]:
        """What a classifier of the first `n_labels` labels is to answer.

        Returns:
            Multi-label: 0 and 1, (B, n_labels), float32. Single-label: label numbers, (B,), int64, -1 for a label
            that is not among the first n_labels.
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
        path, manifest: the folder, and what its manifest.json says.
        labels: names; first those of the training split, sorted, then those that only val or test have, sorted.
        n_train_labels: where the second kind begins: outputs of a classifier.
        train_counts: training documents with each label, (len(labels),), int64.
        multi: a document has a set of labels; else it has one.
        cls, sep, pad: ids of the specials that `LabeledSplit.batch` puts around documents.
        vocab_size: ids of the tokenizer and of the specials.
        splits: "train", "val" and perhaps "test".

    Raises:
        DataError: no dataset there, one without labels, or a file that is missing or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / "manifest.json").is_file():
            raise DataError(
                f"no prepared dataset at {self.path}: make one with "
                f"`gptlab prepare CORPUS --out {self.path}`, CORPUS being {', '.join(NAMES)} or a file with labels"
            )
        self.manifest = _manifest(self.path)
        try:
            self.labels: list[str] = list(self.manifest["labels"])
            self.train_counts = np.array(self.manifest["train_counts"], np.int64)
            self.n_train_labels, self.multi = int(self.manifest["n_train_labels"]), bool(self.manifest["multi"])
            self.cls, self.sep, self.pad, self.vocab_size = (
                int(self.manifest[key]) for key in ("cls", "sep", "pad", "vocab_size")
            )
            self.splits = {name: self._open(name) for name in self.manifest["splits"]}
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{self.path / 'manifest.json'} is damaged ({error!r}): prepare the dataset again"
            ) from None

    def _open(self, split: str) -> LabeledSplit:
        entry = self.manifest["splits"][split]
        documents, tokens, labels = entry["documents"], entry["tokens"], entry["labels"]
        sizes = {"tokens": tokens, "offsets": documents + 1, "labels": labels, "label_offsets": documents + 1}
        arrays = {}
        for name, size in sizes.items():
            file = self.path / f"{split}.{name}.npy"
            try:
                arrays[name] = np.load(file, mmap_mode="r" if size else None)  # nothing cannot be mapped
            except FileNotFoundError:
                raise DataError(f"{file} is missing: prepare the dataset again, or restore the file") from None
            except (OSError, ValueError) as error:
                raise DataError(f"{file} is truncated or damaged ({error}): prepare the dataset again") from None
            if arrays[name].shape != (size,):
                raise DataError(f"{file} is another file: it holds {arrays[name].shape}, the manifest says ({size},)")
        return LabeledSplit(arrays, self.multi, self.cls, self.sep, self.pad)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer the documents were made with; the specials may be ids beyond its vocabulary."""
        return load_tokenizer(self.path / "tokenizer.json")

    def _recorded(self) -> Iterator[tuple[Path, str]]:
        yield self.path / "tokenizer.json", self.manifest["tokenizer"]["sha256"]
        for entry in self.manifest["splits"].values():
            yield from ((self.path / file["file"], file["sha256"]) for file in entry["files"].values())

    def verify(self) -> None:
        """Read every file and compare its sha256 with the manifest's.

        Raises:
            DataError: names the file that was changed.
        """
        for file, sha256 in self._recorded():
            if not file.is_file() or file_sha256(file) != sha256:
                raise DataError(f"{file} is damaged: its sha256 is not the manifest's; prepare the dataset again")

    def fingerprint(self) -> str:
        """16 hexadecimal digits that name the content, wherever the folder lies."""
        content = [*((file.name, sha256) for file, sha256 in self._recorded()), *enumerate(self.labels)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}): prepare the dataset again") from None
    if not isinstance(manifest, dict) or manifest.get("kind") != "labeled":
        raise DataError(
            f"{folder} is a dataset without labels, for task = lm: make one with labels with "
            f"`gptlab prepare CORPUS --out DIR`, CORPUS being {', '.join(NAMES)} or a file with --label-field"
        )
    if manifest.get("version") != MANIFEST_VERSION:
        raise DataError(f"{path} has version {manifest.get('version')}, which this gptlab does not know")
    return manifest


def constant_loss(dataset: LabeledDataset) -> float:
    """Training loss in nats of the best prediction that does not look at the document.

    Multi-label: the mean over the training labels of the binary entropy of their frequencies. Single-label: the
    entropy of the class frequencies.
    """
    share = dataset.train_counts[: dataset.n_train_labels] / len(dataset.splits["train"])

    def entropy(p: NDArray[np.float64]) -> NDArray[np.float64]:
        return -p * np.log(np.where(p > 0, p, 1))

    if dataset.multi:
        return float((entropy(share) + entropy(1 - share)).mean())
    return float(entropy(share).sum())
