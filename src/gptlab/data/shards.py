"""Folders of token shards, read as two streams of token ids.

A shard is a file of one of three containers (`containers`); folders of other trainers have no manifest (`foreign`).
"""

from __future__ import annotations

import hashlib
import mmap
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptlab.data.containers import Shard, read_shard, shard_header
from gptlab.data.foreign import foreign_manifest, foreign_shards, nanogpt_characters
from gptlab.data.manifest import MOST_LOST, lost_share, prepared_folder, read_manifest
from gptlab.data.tokenizers import Tokenizer, load_tokenizer, make_tokenizer
from gptlab.data.verified import verify_files
from gptlab.errors import DataError
from gptlab.progress import tell_nobody

MAX_OPEN_SHARDS = 128  # a map holds a file descriptor; 256 is the smallest usual limit
RELEASE_EVERY = 1024  # windows; each maps at most some 64 KiB of pages, so about 64 MiB stay resident
# A split of this size is read page by page, all windows of a batch together. The system's own read-ahead, up to 8 MiB
# for a window of 2 KiB, pays only for a split that fits into the page cache.
LARGE_SPLIT_BYTES = 2**30
SCAN_TOKENS = 2**24  # tokens read at a time when ids are checked: 32 MiB


def _release(pages: mmap.mmap | None) -> None:
    """Unmap the pages read so far. They stay in the system's page cache and count for no process."""
    if pages is not None and hasattr(pages, "madvise"):
        pages.madvise(mmap.MADV_DONTNEED)


# -- a split --------------------------------------------------------------------------------------------------------


class Tokens:
    """The shards of a split as one stream of token ids.

    Attributes:
        name: which split of which folder, for messages.
        vocab_size: ids that `gather` returns are below this.

    A shard is memory-mapped when it is first read. Pages are released now and then, so resident memory does not
    depend on the size of the dataset.
    """

    def __init__(self, shards: Sequence[Shard], name: str = "the split") -> None:
        self.shards, self.name = list(shards), name
        self.vocab_size = 2**32  # until `Dataset.check` says
        self._ends = np.cumsum([0] + [shard.tokens for shard in self.shards], dtype=np.int64)[1:]  # exclusive
        self._begins = [int(end) - shard.tokens for end, shard in zip(self._ends, self.shards, strict=True)]
        self._open: dict[int, tuple[NDArray[Any], mmap.mmap | None]] = {}
        self._since_release = 0
        size = sum(shard.tokens * shard.dtype.itemsize for shard in self.shards)
        self._large = size >= LARGE_SPLIT_BYTES and hasattr(mmap.mmap, "madvise")

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.shards else 0

    def _map(self, index: int) -> NDArray[Any]:
        if index not in self._open:
            if len(self._open) >= MAX_OPEN_SHARDS:
                del self._open[next(iter(self._open))]
            self._open[index] = self.shards[index].map()
            pages = self._open[index][1]
            if self._large and pages is not None:
                pages.madvise(mmap.MADV_RANDOM)
        return self._open[index][0]

    def _read_ahead(self, starts: list[int], holders: list[int], length: int) -> None:
        """Ask the system for the pages of all windows together, those in the first shard of each window."""
        for start, holder in zip(starts, holders, strict=True):
            self._map(holder)
            shard, pages = self.shards[holder], self._open[holder][1]
            assert pages is not None  # an empty shard holds no window
            begin = shard.offset + (start - self._begins[holder]) * shard.dtype.itemsize
            page = begin // mmap.PAGESIZE * mmap.PAGESIZE
            pages.madvise(mmap.MADV_WILLNEED, page, begin + length * shard.dtype.itemsize - page)

    def gather(self, starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """Windows of `length` tokens from each of `starts`, (B,), as token ids, (B, length). They may span shards."""
        starts = np.asarray(starts, np.int64)
        assert starts.size == 0 or (starts.min() >= 0 and starts.max() + length <= len(self))
        windows = np.empty((len(starts), length), np.int64)
        firsts = starts.tolist()
        holders = np.searchsorted(self._ends, starts, side="right").tolist()  # (B,) shard of the first token
        if self._large:
            self._read_ahead(firsts, holders, length)
        looked: set[int] = set()  # at the sizes of these shards: the system is asked once a call
        for window, start, holder in zip(windows, firsts, holders, strict=True):
            done = 0
            while done < length:
                begin = start + done - self._begins[holder]
                piece = self._map(holder)[begin : begin + length - done]
                if holder not in looked:
                    looked.add(holder)
                    self.shards[holder].refuse_shorter(self._open[holder][1])
                window[done : done + len(piece)] = piece
                done += len(piece)
                holder += 1
        if windows.size and windows.max() >= self.vocab_size:
            self._refuse_id(int(windows.max()), starts, length)
        self._since_release += len(starts)
        if self._since_release >= RELEASE_EVERY:
            self._since_release = 0
            for _, pages in self._open.values():
                _release(pages)
        return windows

    def _refuse_id(self, largest: int, starts: NDArray[np.int64], length: int) -> None:
        first, last = np.searchsorted(self._ends, [starts.min(), starts.max() + length - 1], side="right").tolist()
        where = f"{self.shards[first].path}" + f" to {self.shards[last].path.name}" * (last > first)
        raise DataError(
            f"{where} holds token id {largest}, and the vocabulary ends at {self.vocab_size - 1}: the file is damaged; "
            f"`gptlab verify {self.shards[first].path.parent}` looks at all of them"
        )


def _scan(shard: Shard) -> Iterator[NDArray[Any]]:
    """The ids of a shard, SCAN_TOKENS at a time."""
    ids, pages = shard.map()
    for begin in range(0, shard.tokens, SCAN_TOKENS):
        shard.refuse_shorter(pages)
        yield ids[begin : begin + SCAN_TOKENS]
        _release(pages)


def _scan_max(shard: Shard) -> int:
    """The largest id in a shard, which is read whole; -1 if it is empty."""
    return max((int(ids.max()) for ids in _scan(shard)), default=-1)


# -- a prepared folder ----------------------------------------------------------------------------------------------


class Dataset:
    """A folder of token shards: gptlab's (manifest.json), nanoGPT's, build-nanogpt's or llm.c's.

    Args:
        path: the folder.
        look: read the header of each shard; else the manifest is trusted. One rank of a run looks for all.

    Attributes:
        manifest: content of manifest.json; for other people's folders, the same fields as far as they are known.
        train, val: the splits.
        vocab_size: ids of the tokenizer; 0 if the folder does not say.

    Raises:
        DataError: there is no dataset or an unfinished one, or a shard is missing, truncated or another file.
    """

    train: Tokens
    val: Tokens

    def __init__(self, path: str | Path, look: bool = True) -> None:
        self.path = prepared_folder(path)
        if (self.path / "manifest.json").is_file():
            self.manifest = read_manifest(self.path)
            splits = {split: list(self._listed_shards(split, look)) for split in ("train", "val")}
        else:
            splits = foreign_shards(self.path, look)
            self.manifest = foreign_manifest(splits)
        self.train, self.val = (Tokens(splits[split], f"{self.path}: the {split} split") for split in ("train", "val"))
        self.vocab_size = int(self.manifest["tokenizer"]["vocab_size"])
        self._max_token: tuple[int, Path] | None = None

    @property
    def shards(self) -> list[Shard]:
        return self.train.shards + self.val.shards

    def _listed_shards(self, split: str, look: bool) -> Iterator[Shard]:
        form, dtype = self.manifest["format"], np.dtype(self.manifest["dtype"])
        for entry in self.manifest["splits"][split]["shards"]:
            file, tokens = self.path / entry["file"], entry["tokens"]
            shard = Shard(file, form, dtype, len(shard_header(form, dtype, tokens)), tokens)
            if look:
                shard = read_shard(file, form)
            if shard.tokens != tokens:
                fault = "is truncated" if shard.tokens < tokens else "is another file"
                raise DataError(f"{file} {fault}: it holds {shard.tokens} tokens, the manifest {tokens}")
            if shard.dtype != dtype:
                raise DataError(f"{file} is another file: it holds {shard.dtype}, not {dtype}")
            yield replace(shard, max_token=entry["max_token"], sha256=entry["sha256"])

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the folder; GPT-2's if the folder does not say and all ids fit. Else raises DataError."""
        if (self.path / "tokenizer.json").is_file():
            return load_tokenizer(self.path / "tokenizer.json")
        if (self.path / "meta.pkl").is_file():
            return nanogpt_characters(self.path / "meta.pkl")
        largest, shard = self.max_token()
        if largest < 50257:
            return make_tokenizer("gpt2", lambda: iter(()))
        raise DataError(
            f"{self.path} does not say what its tokenizer is, and id {largest} in {shard.name} is none of GPT-2's: "
            "put the tokenizer.json of the dataset into the folder"
        )

    def max_token(self) -> tuple[int, Path]:
        """The largest token id, and a shard that has it. Shards without a record of it are read whole, once."""
        if self._max_token is None:
            unknown = [shard for shard in self.shards if shard.max_token is None]
            if (tokens := sum(shard.tokens for shard in unknown)) > 10**9:
                print(f"{self.path}: reading {tokens:,} token ids to find the largest", file=sys.stderr)
            known = [(_scan_max(shard) if shard.max_token is None else shard.max_token, shard) for shard in self.shards]
            self._max_token = max(((largest, shard.path) for largest, shard in known), default=(-1, self.path))
        return self._max_token

    def check(self, vocab_size: int) -> None:
        """Raises DataError if a token id is outside a vocabulary; it names the shard and the id.

        A manifest's record of the largest id is believed; `Tokens.gather` refuses what is larger when it is read.
        """
        self.train.vocab_size = self.val.vocab_size = vocab_size
        largest, shard = self.max_token()
        if largest >= vocab_size:
            raise DataError(
                f"{shard} holds token id {largest}, and a vocabulary of {vocab_size} ends at {vocab_size - 1}: "
                "the dataset was made with another tokenizer, or model.vocab_size is too small"
            )

    def token_bytes(self) -> NDArray[Any]:
        """Bytes of text that each id of the validation split stands for, (vocab_size,); they add up to the text's size.

        A tokenizer that is not exact says so in the mean only, of this split.

        Raises:
            DataError: that is not known, or the tokenizer loses too much of the text; it says why.
        """
        lengths, split = self.tokenizer.token_bytes(), self.manifest["splits"]["val"]
        if self.tokenizer.exact:
            return lengths
        if (lost := lost_share(self.manifest)) > MOST_LOST:
            raise DataError(f"the tokenizer drops or changes {100 * lost:.2g}% of the bytes of the text")
        if not split.get("bytes"):
            raise DataError(f"{self.path} does not say how many bytes its text has")
        of_ids = split.get("token_bytes")
        if of_ids is None:  # it was prepared by an older gptlab
            of_ids = sum(int(lengths[ids].sum()) for shard in self.val.shards for ids in _scan(shard))
        return lengths * (split["bytes"] / max(of_ids, 1))

    def verify(self, read: Callable[[int], None] = tell_nobody) -> None:
        """Read all shards. Raises DataError if the sha256 of one is not the manifest's, or if none is recorded.

        Args:
            read: called with the bytes of each block that is read.
        """
        if not all(shard.sha256 for shard in self.shards):
            raise DataError(f"{self.path} records no sha256: only what `gptlab prepare` made can be verified")
        verify_files(self.path, self._recorded(), again=True, read=read)

    def verify_new(self) -> None:
        """As `verify`, of the files with a recorded sha256 that have not been verified since they were written."""
        verify_files(self.path, self._recorded())

    def _recorded(self) -> list[tuple[Path, str]]:
        """(file, sha256) of what the manifest records one of."""
        tokenizer = self.path / "tokenizer.json", self.manifest["tokenizer"].get("sha256")
        recorded = [tokenizer, *((shard.path, shard.sha256) for shard in self.shards)]
        return [(path, sha256) for path, sha256 in recorded if sha256]

    def fingerprint(self) -> str:
        """16 hexadecimal digits that identify the content; they do not depend on the folder's path.

        They are a digest of the recorded sha256s, or of the size, beginning and end of each shard without a record.
        """
        digest = hashlib.sha256()
        for split, tokens in (("train", self.train), ("val", self.val)):
            for shard in tokens.shards:
                digest.update(f"{split} {shard.tokens} {shard.sha256}\n".encode())
                if not shard.sha256:
                    ids, _ = shard.map()
                    digest.update(ids[:65536].tobytes())
                    digest.update(ids[-65536:].tobytes())
        return digest.hexdigest()[:16]
