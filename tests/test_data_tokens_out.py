"""What `gptlab prepare --format` writes, read as nanoGPT, llm.c and build-nanogpt read it.

The readers here follow those programs' formats and their way to find files, and use nothing of gptlab.
"""

from __future__ import annotations

import glob
import itertools
import json
import os
import pickle
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gptlab.data.containers import read_shard
from gptlab.data.prepare import prepare
from gptlab.data.shards import Dataset
from gptlab.errors import DataError

DOCUMENTS = [f"document {n}: " + "caf\u00e9 \U0001f600 " * (n % 7) + "the end.\n" * (n % 3) for n in range(120)]


def source(folder: Path) -> Path:
    file = folder / "documents.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def large_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A byte-level tokenizer.json whose end-of-text is beyond 16 bits, and that id."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {token: index for index, token in enumerate([*alphabet, *(f"<{n}>" for n in range(66_000))])}
    tokenizer = Tokenizer(models.BPE(ids, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    file = tmp_path_factory.mktemp("vocabulary") / "large.json"
    tokenizer.save(str(file))
    return file, len(ids)


# -- the readers


def nanogpt_split(folder: Path, split: str) -> np.ndarray:
    return np.memmap(folder / f"{split}.bin", dtype=np.uint16, mode="r")


def nanogpt_batch(folder: Path, split: str, block: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch at random places, as nanoGPT's train.py draws it."""
    data = nanogpt_split(folder, split)
    starts = torch.randint(len(data) - block, (rows,))
    x = torch.stack([torch.from_numpy(data[i : i + block].astype(np.int64)) for i in starts])
    y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + block].astype(np.int64)) for i in starts])
    return x, y


def llmc_shard(file: str) -> np.ndarray:
    """A shard as llm.c checks and reads it; train_llama3.py reads the form with 32 bits."""
    content = Path(file).read_bytes()
    header = struct.unpack_from("<256i", content)
    magic, version, count = header[:3]
    assert (magic, version) in ((20240520, 1), (20240801, 7)), "bad magic or version in the data file"
    assert not any(header[3:])
    width = 2 if magic == 20240520 else 4
    assert count > 0 and len(content) == 256 * 4 + count * width, "file size is not as expected"
    return np.frombuffer(content, f"<u{width}", count, 256 * 4)


def llmc_files(pattern: str) -> list[str]:
    """The shards in llm.c's order: C's glob sorts names by their bytes."""
    files = sorted(glob.glob(pattern), key=os.fsencode)
    assert files, "no files found"
    return files


def llmc_batches(pattern: str, B: int, T: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """One epoch of llm.c's data loader on one process, without shuffling: whole batches of each shard."""
    for file in llmc_files(pattern):
        ids = llmc_shard(file)
        assert len(ids) >= B * T + 1, "a shard needs at least one batch"
        for at in range(0, (len(ids) - 1) // (B * T) * B * T, B * T):
            window = ids[at : at + B * T + 1].astype(np.int32)
            yield window[:-1].reshape(B, T), window[1:].reshape(B, T)


class BuildNanogptLoader:
    """build-nanogpt's loader: every file in the folder with the split in its name, in order of name."""

    def __init__(self, folder: Path, split: str, B: int, T: int) -> None:
        self.B, self.T = B, T
        self.shards = [os.path.join(folder, name) for name in sorted(os.listdir(folder)) if split in name]
        assert self.shards, f"no shards found for split {split}"
        self.shard, self.position = 0, 0
        self.tokens = self.load(self.shards[0])

    @staticmethod
    def load(file: str) -> torch.Tensor:
        return torch.tensor(np.load(file).astype(np.int32), dtype=torch.long)

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        size = self.B * self.T
        window = self.tokens[self.position : self.position + size + 1]
        x, y = window[:-1].view(self.B, self.T), window[1:].view(self.B, self.T)
        self.position += size
        if self.position + size + 1 > len(self.tokens):
            self.shard, self.position = (self.shard + 1) % len(self.shards), 0
            self.tokens = self.load(self.shards[self.shard])
        return x, y


# -- what they find


def pieces(ids: np.ndarray, eot: int, first: bool) -> list[list[int]]:
    """The documents of a stream; end-of-text stands before each of them (`first`), or after."""
    ends = np.flatnonzero(ids == eot)
    assert ids[0 if first else -1] == eot
    cuts = [*ends.tolist(), len(ids)] if first else [-1, *ends.tolist()]
    return [ids[begin + 1 : end].tolist() for begin, end in itertools.pairwise(cuts)]


def check_documents(folder: Path, streams: dict[str, np.ndarray], eot: int, first: bool, text: Any) -> None:
    """Each document is once in one of the splits, in its order; the counts are the manifest's."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    found = {split: [text(piece) for piece in pieces(ids, eot, first)] for split, ids in streams.items()}
    for split, ids in streams.items():
        entry = manifest["splits"][split]
        assert (entry["tokens"], entry["documents"]) == (len(ids), len(found[split]))
        assert entry["bytes"] == sum(len(document.encode()) for document in found[split])
        assert [shard["file"] for shard in entry["shards"]] == sorted(shard["file"] for shard in entry["shards"])
        places = [DOCUMENTS.index(document) for document in found[split]]
        assert places == sorted(places) and len(places) > 1
    assert sorted(found["train"] + found["val"]) == sorted(DOCUMENTS)


def byte_text(ids: list[int]) -> str:
    return bytes(ids).decode()


def test_nanogpt_reads_what_is_written(tmp_path: Path) -> None:
    folder = prepare(
        str(source(tmp_path)), out=tmp_path / "o", tokenizer="byte", format="nanogpt", val_fraction=0.2, progress=False
    )
    assert not (folder / "meta.pkl").exists()  # it could say characters only
    streams = {split: nanogpt_split(folder, split) for split in ("train", "val")}
    check_documents(folder, streams, 256, False, byte_text)
    x, y = nanogpt_batch(folder, "val", 16, 5)
    assert x.shape == y.shape == (5, 16) and torch.equal(x[:, 1:], y[:, :-1]) and int(x.max()) <= 256


@pytest.mark.parametrize("documents", [1, 120])
def test_nanogpt_reads_characters_by_its_meta(documents: int, tmp_path: Path) -> None:
    file = source(tmp_path)
    if documents == 1:
        file = tmp_path / "one.txt"
        file.write_text("".join(DOCUMENTS), encoding="utf-8")
    folder = prepare(
        str(file), out=tmp_path / "o", tokenizer="char", format="nanogpt", val_fraction=0.2, progress=False
    )
    with open(folder / "meta.pkl", "rb") as opened:
        meta = pickle.load(opened)
    assert meta["vocab_size"] == len(meta["itos"]) == len(meta["stoi"]) == max(meta["itos"]) + 1
    encode, decode = (lambda s: [meta["stoi"][c] for c in s]), (lambda ids: "".join(meta["itos"][i] for i in ids))
    assert decode(encode("caf\u00e9 \U0001f600")) == "caf\u00e9 \U0001f600"
    streams = {split: nanogpt_split(folder, split) for split in ("train", "val")}
    assert max(int(ids.max()) for ids in streams.values()) < meta["vocab_size"]
    if documents == 1:
        assert decode(np.concatenate(list(streams.values())).tolist()) == "".join(DOCUMENTS)
    else:
        check_documents(folder, streams, meta["stoi"]["<|endoftext|>"], False, decode)
    # nanoGPT's three files alone are a dataset here, too
    ours = Dataset(folder)
    for name in ("manifest.json", "tokenizer.json"):
        (folder / name).unlink()
    theirs = Dataset(folder)
    assert theirs.tokenizer.spec() == ours.tokenizer.spec()
    assert theirs.vocab_size == meta["vocab_size"]
    assert np.array_equal(theirs.train.gather(np.array([0]), 50), ours.train.gather(np.array([0]), 50))


@pytest.mark.parametrize("wide", [False, True])
def test_llmc_reads_what_is_written(wide: bool, large_vocabulary: tuple[Path, int], tmp_path: Path) -> None:
    tokenizer, eot = large_vocabulary if wide else ("byte", 256)
    folder = prepare(
        str(source(tmp_path)), out=tmp_path / "o", tokenizer=str(tokenizer), shard_tokens=700, val_fraction=0.2,
        progress=False,
    )  # fmt: skip
    text = byte_text
    if wide:
        from tokenizers import Tokenizer

        text = Tokenizer.from_file(str(tokenizer)).decode
    streams = {}
    for split in ("train", "val"):
        files = llmc_files(f"{folder}/{split}-*.bin")
        assert len(files) > 1
        streams[split] = np.concatenate([llmc_shard(file) for file in files])
        assert {llmc_shard(file).dtype for file in files} == {np.dtype("<u4" if wide else "<u2")}
    check_documents(folder, streams, eot, True, text)
    for x, y in llmc_batches(f"{folder}/train-*.bin", 2, 16):
        assert np.array_equal(x.ravel()[1:], y.ravel()[:-1])
    assert sum(1 for _ in llmc_batches(f"{folder}/train-*.bin", 2, 16)) == sum(
        (len(llmc_shard(file)) - 1) // 32 for file in llmc_files(f"{folder}/train-*.bin")
    )


def test_build_nanogpt_reads_what_is_written(tmp_path: Path) -> None:
    folder = prepare(
        str(source(tmp_path)), out=tmp_path / "o", tokenizer="byte", format="npy", shard_tokens=700, val_fraction=0.2,
        progress=False,
    )  # fmt: skip
    streams = {}
    for split in ("train", "val"):
        loader = BuildNanogptLoader(folder, split, 2, 16)
        files = [np.load(shard) for shard in loader.shards]
        assert len(files) > 1 and all(ids.dtype == np.uint16 and ids.flags.c_contiguous for ids in files)
        streams[split] = np.concatenate(files)
        for _ in range(2 * len(streams[split]) // 32):  # round its shards
            x, y = loader.next_batch()
            assert torch.equal(x.flatten()[1:], y.flatten()[:-1])
    check_documents(folder, streams, 256, True, byte_text)
    assert (folder / "text_train_000001.npy").is_file()


@pytest.mark.parametrize("format", ["nanogpt", "npy"])
def test_a_large_vocabulary_has_no_form_of_16_bits(
    format: str, large_vocabulary: tuple[Path, int], tmp_path: Path
) -> None:
    tokenizer, _ = large_vocabulary
    with pytest.raises(DataError, match="holds 16-bit ids and the vocabulary has 66257: use --format llmc"):
        prepare(str(source(tmp_path)), out=tmp_path / "o", tokenizer=str(tokenizer), format=format, progress=False)


def test_the_first_tokens_held_out_leave_one_stream(tmp_path: Path) -> None:
    """Validation ends and training begins within a document, as in build-nanogpt's shards."""
    file = source(tmp_path)
    whole = prepare(str(file), out=tmp_path / "a", tokenizer="byte", val_tokens=1, progress=False)
    folder = prepare(str(file), out=tmp_path / "b", tokenizer="byte", val_tokens=1000, shard_tokens=700, progress=False)
    streams = [
        np.concatenate([llmc_shard(file) for split in ("val", "train") for file in llmc_files(f"{d}/{split}-*.bin")])
        for d in (whole, folder)
    ]
    assert np.array_equal(*streams)
    assert [byte_text(piece) for piece in pieces(streams[0], 256, True)] == DOCUMENTS
    assert sum(read_shard(file).tokens for file in llmc_files(f"{folder}/val-*.bin")) == 1000
