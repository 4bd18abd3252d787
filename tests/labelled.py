"""Labelled documents for the tests: their files, and what a dataset made of them holds."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np

from gptlab.data.labeled import LabeledDataset
from gptlab.data.prepare import prepare

Rows = list[dict[str, Any]]


def write_jsonl(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_parquet(path: Path, rows: Rows) -> Path:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def quietly(corpus: str, out: Path, **settings: Any) -> LabeledDataset:
    return LabeledDataset(prepare(corpus, out=out, **{"tokenizer": "byte", **settings}))


def contents(dataset: LabeledDataset, split: str) -> list[tuple[str, list[str]]]:
    """Text and label names of every document of a split, back from what is stored."""
    part = dataset.splits[split]
    block_size = int(part.lengths.max(initial=0)) + 2
    tokens, lengths = part.batch(np.arange(len(part)), block_size)
    return [
        (dataset.tokenizer.decode(row[1 : length - 1].tolist()), [dataset.labels[i] for i in part.label_ids(document)])
        for document, (row, length) in enumerate(zip(tokens, lengths, strict=True))
    ]


def visible(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name[0] != "."}
