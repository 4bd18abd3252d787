"""Token shards, which are memory-mapped files of token ids, and folders of shards.

There are three containers for a stream of little-endian token ids:

    llmc      llm.c's: 256 int32 (magic, version, tokens, zeros), then uint16, or uint32 for large vocabularies
    nanogpt   nanoGPT's train.bin and val.bin: uint16 and nothing else
    npy       build-nanogpt's: a numpy file of uint16

Other people's headerless files may hold uint32 or int32; their content tells.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import mmap
import os
import pickletools
import re
import sys
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptlab.data.manifest import MOST_LOST, lost_share, prepared_folder, read_manifest, refuse_unfinished
from gptlab.data.tokenizers import END_OF_TEXT, CharTokenizer, Tokenizer, load_tokenizer, make_tokenizer
from gptlab.data.verified import verify_files
from gptlab.errors import DataError
from gptlab.files import because, open_regular, read_json, refuse_pointer

LLMC_HEADER_INTS = 256
LLMC_MAGIC = {2: (20240520, 1), 4: (20240801, 7)}  # bytes an id -> magic, version (llm.c, dev/data/data_common.py)
MAX_SHARD_TOKENS = 2**31 - 1  # the count in llm.c's header is an int32

MAX_OPEN_SHARDS = 128  # a map holds a file descriptor; 256 is the smallest usual limit
RELEASE_EVERY = 1024  # windows; each maps at most some 64 KiB of pages, so about 64 MiB stay resident
# A split of this size is read page by page, all windows of a batch together. The system's own read-ahead, up to 8 MiB
# for a window of 2 KiB, pays only for a split that fits into the page cache.
LARGE_SPLIT_BYTES = 2**30
SCAN_TOKENS = 2**24  # tokens read at a time when ids are checked: 32 MiB

# Shards of other packers, by the bytes they begin with.
PACKERS = {
    b"LITPKDS": "LitGPT's or TinyLlama's packed shards (LITPKDS)",
    b"MMIDIDX": "Megatron-LM's or fairseq's indexed shards (MMIDIDX)",
    b"TNTIDX": "fairseq's indexed shards (TNTIDX)",
    b"PK\x03\x04": "torch.save or zip",
}
# Datasets of other packers, by the ending of a file in them.
ENDINGS = {
    ".idx": "Megatron-LM's or fairseq's indexed shards (.bin with .idx)",
    ".ds": "datatrove's shards for nanoset (.ds)",
    ".mds": "MosaicML's streaming shards (.mds)",
    ".tar": "WebDataset's shards (.tar)",
    ".tfrecord": "TFRecord shards (.tfrecord)",
    ".arrow": "a folder of Hugging Face datasets (.arrow)",
    ".parquet": "rows of text (.parquet)",
    ".jsonl": "rows of text (.jsonl)",
    ".txt": "text (.txt)",
}
INDEX_KEYS = {  # of an index.json
    "chunks": "LitData's chunks (index.json)",
    "shards": "MosaicML's streaming shards (index.json)",
}
INSTEAD = (
    "prepare its text with `gptlab prepare PATH`, or write its ids as nanoGPT does, uint16 without a header, to "
    "train.bin and val.bin"
)
SPLIT_WORDS = {
    split: re.compile(rf"(^|[_\-.])({words})\d*([_\-.]|$)")
    for split, words in (
        ("train", "train|training"),
        ("val", "val|valid|validation|dev|eval"),
        ("test", "test|testing"),
    )
}

# A file without a header is told to hold ids of 16 or 32 bits from rows of four 16-bit words at some places of it.
PLACES, ROWS = 16, 2048
FEWEST_ROWS = 16  # of a file whose rows tell anything
HIGH_WORD = 16  # the higher word of a 32-bit id is below this for vocabularies up to 2^20
TEXT = np.array([9, 10, 13, *range(32, 127)], np.uint8)
MANY_IDS = 256  # different lower words: too many for a file of 16-bit ids of two kinds in turn

# What numpy raises for a damaged header, which it reads with Python's own parser.
NPY_FAULTS = (
    *(OSError, ValueError, EOFError, SyntaxError, TypeError, LookupError, OverflowError, MemoryError, RecursionError),
    *(AttributeError, tokenize.TokenError),
)


# -- one shard ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """One token file whose header is checked; `offset` bytes precede the first token."""

    path: Path
    format: str
    dtype: np.dtype[Any]
    offset: int
    tokens: int
    max_token: int | None = None  # where a manifest records it
    sha256: str = ""

    def map(self) -> tuple[NDArray[Any], mmap.mmap | None]:
        """The token ids, (tokens,), which are not read yet, and their memory map."""
        if self.tokens == 0:
            return np.empty(0, self.dtype), None  # an empty range cannot be mapped
        try:
            with open(self.path, "rb") as file:
                pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return np.frombuffer(pages, self.dtype, self.tokens, self.offset), pages
        except (OSError, ValueError) as error:
            raise DataError(f"{self.path} cannot be read: {because(error)}") from None

    def refuse_shorter(self, pages: mmap.mmap | None) -> None:
        """Raises DataError where the file was truncated after it was mapped: reading past its end kills the process."""
        if pages is not None and pages.size() < self.offset + self.tokens * self.dtype.itemsize:
            raise DataError(f"{self.path} was truncated while it was in use: prepare the dataset again, or restore it")


def _release(pages: mmap.mmap | None) -> None:
    """Unmap the pages read so far. They stay in the system's page cache and count for no process."""
    if pages is not None and hasattr(pages, "madvise"):
        pages.madvise(mmap.MADV_DONTNEED)


def shard_header(format: str, dtype: np.dtype[Any], tokens: int) -> bytes:
    """The bytes before the tokens; their number does not depend on `tokens`."""
    if format == "llmc":
        header = np.zeros(LLMC_HEADER_INTS, "<i4")
        header[:3] = (*LLMC_MAGIC[dtype.itemsize], tokens)
        return header.tobytes()
    if format == "npy":
        buffer = io.BytesIO()
        description = {"descr": dtype.newbyteorder("<").str, "fortran_order": False, "shape": (tokens,)}
        np.lib.format.write_array_header_1_0(buffer, description)
        assert buffer.tell() == 128  # numpy leaves room for the count to grow
        return buffer.getvalue()
    assert format == "nanogpt"
    return b""


def token_dtype(format: str, vocab_size: int) -> np.dtype[Any]:
    """uint16, or uint32 for a large vocabulary. Raises DataError if the container has no uint32 form."""
    if vocab_size <= 2**16:
        return np.dtype("<u2")
    if format != "llmc":
        raise DataError(f"format {format} holds 16-bit ids and the vocabulary has {vocab_size}: use --format llmc")
    return np.dtype("<u4")


def write_shard(path: str | Path, tokens: NDArray[Any], format: str = "llmc", dtype: Any = np.uint16) -> None:
    """Write token ids, (n,), as uint16 or (llmc only) uint32. A reader sees a complete shard or none."""
    path, kind = Path(path), np.dtype(dtype).newbyteorder("<")
    assert tokens.ndim == 1
    assert tokens.size == 0 or 0 <= int(tokens.min()) <= int(tokens.max()) <= np.iinfo(kind).max
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(shard_header(format, kind, len(tokens)))
        file.write(tokens.astype(kind).tobytes())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_shard(path: str | Path, format: str | None = None, width: int = 0) -> Shard:
    """A shard from its header and size. Without `format` the file's first bytes decide, or else its name and content.

    Args:
        width: bytes of an id in a file without a header that does not tell.

    Raises:
        DataError: the file is missing, truncated, or not a token shard (of that format).
    """
    path = Path(path)
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(4 * LLMC_HEADER_INTS)
    except FileNotFoundError:
        raise DataError(f"{path} is missing: prepare the dataset again, or restore the file") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {because(error)}") from None
    refuse_pointer(path, head, DataError)
    magic = int.from_bytes(head[:4], "little")
    of_llmc = next((width for width, (known, _) in LLMC_MAGIC.items() if known == magic), 0)  # bytes an id
    if other := format is None:
        _refuse_other(path, head, magic)
        format = "npy" if head[:6] == b"\x93NUMPY" else "llmc" if of_llmc else "nanogpt"
    if format == "llmc":
        return _read_llmc(path, head, size, of_llmc)
    if format == "npy":
        return _read_npy(path, head, size)
    if of_llmc or head[:6] == b"\x93NUMPY":
        raise DataError(f"{path} is not a nanogpt shard: it has the header of another format")
    width = _width(path, size, width) if other else 2
    if size % width:
        raise DataError(f"{path} is truncated: {size} bytes are no whole number of {8 * width}-bit ids")
    return Shard(path, "nanogpt", np.dtype(f"<u{width}"), 0, size // width)


def _read_llmc(path: Path, head: bytes, size: int, width: int) -> Shard:
    if len(head) < 4 * LLMC_HEADER_INTS:
        raise DataError(f"{path} is truncated: {size} bytes are less than llm.c's header of {4 * LLMC_HEADER_INTS}")
    magic, version, tokens = (int(number) for number in np.frombuffer(head, "<i4", 3))
    if not width:
        known = " or ".join(str(known) for known, _ in LLMC_MAGIC.values())
        raise DataError(f"{path} is not a token shard of llm.c: its first number is {magic} instead of {known}")
    if version != LLMC_MAGIC[width][1]:
        raise DataError(f"{path} has version {version} of llm.c's format; version {LLMC_MAGIC[width][1]} is understood")
    _check_size(path, size, len(head), tokens, width)
    return Shard(path, "llmc", np.dtype(f"<u{width}"), len(head), tokens)


def _packer(head: bytes) -> str:
    return next((whose for begins, whose in PACKERS.items() if head.startswith(begins)), "")


def _refuse_other(path: Path, head: bytes, magic: int) -> None:
    """Refuse a file that begins as no shard does which is read here."""
    if whose := _packer(head):
        raise DataError(f"{path} is of {whose}, which gptlab does not read: {INSTEAD}")
    if magic // 10**4 in range(2024, 2030) and magic not in (known for known, _ in LLMC_MAGIC.values()):
        raise DataError(
            f"{path} has a header of llm.c ({magic}) that is none of token shards, but of a model, a tokenizer or "
            "HellaSwag: move it out of the folder"
        )


def _width(path: Path, size: int, otherwise: int) -> int:
    """Bytes of an id in a file without a header: 2, or 4 for uint32 and int32.

    The higher word of each 32-bit id is small, and 0 for vocabularies up to 65,536.

    Args:
        otherwise: the answer for a file that is too small to tell, or could hold either.

    Raises:
        DataError: it holds no ids of these sizes, or could hold either.
    """
    for width, word in ((2, "uint16"), (4, "u?int32")):
        if re.search(rf"[_\-.]{word}([_\-.]|$)", path.stem):
            return width
    if size < 8 * FEWEST_ROWS:
        return otherwise or 2
    places = sorted({place // 8 * 8 for place in np.linspace(0, max(size - 8 * ROWS, 0), PLACES).astype(int).tolist()})
    try:
        with open_regular(path) as file:
            read = b"".join(file.read(8 * ROWS) for place in places if file.seek(place) == place)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {because(error)}") from None
    words = np.frombuffer(read[: len(read) // 8 * 8], "<u2").reshape(-1, 4)
    if np.isin(words.view(np.uint8), TEXT).mean() > 0.9:
        raise DataError(f"{path} holds text or 8-bit numbers, no 16-bit ids: `gptlab prepare {path}` tokenizes text")
    if words[:, 0].any() and words[:, 1].max() < HIGH_WORD and not words[:, 2:].any():
        raise DataError(f"{path} holds 64-bit numbers: {INSTEAD}")
    low, high = words[:, ::2], words[:, 1::2]
    many = len(np.unique(low)) >= MANY_IDS
    if size % 4 or not low.any() or high.max() >= HIGH_WORD:
        return 2
    if high.any() and not many:
        return otherwise or 2
    if not many and not otherwise:
        raise DataError(
            f"{path} holds 16-bit or 32-bit ids, and its content does not tell which: say it in the name, "
            f"{path.stem}.uint16{path.suffix} or {path.stem}.uint32{path.suffix}"
        )
    return 4 if many else otherwise


def _read_npy(path: Path, head: bytes, size: int) -> Shard:
    file = io.BytesIO(head)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    except NPY_FAULTS as error:
        raise DataError(f"{path} is not a numpy file: {because(error)}") from None
    if len(shape) != 1 or dtype not in (np.dtype("<u2"), np.dtype("<u4")):
        raise DataError(
            f"{path} holds {dtype} of shape {shape}: token shards are one row of uint16 or uint32, as "
            "np.save(FILE, ids.astype(np.uint16)) writes it"
        )
    _check_size(path, size, file.tell(), shape[0], dtype.itemsize)
    return Shard(path, "npy", dtype, file.tell(), shape[0])


def _check_size(path: Path, size: int, offset: int, tokens: int, width: int) -> None:
    expected = offset + tokens * width
    if size != expected:
        fault = "is truncated" if size < expected else "is longer than it says"
        raise DataError(f"{path} {fault}: its header counts {tokens} tokens, {expected} bytes, and it has {size} bytes")


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
        for window, start, holder in zip(windows, firsts, holders, strict=True):
            done = 0
            while done < length:
                begin = start + done - self._begins[holder]
                piece = self._map(holder)[begin : begin + length - done]
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
            splits = _foreign_shards(self.path, look)
            self.manifest = _foreign_manifest(splits)
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
            return _nanogpt_characters(self.path / "meta.pkl")
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

    def verify(self) -> None:
        """Read all shards. Raises DataError if the sha256 of one is not the manifest's, or if none is recorded."""
        if not all(shard.sha256 for shard in self.shards):
            raise DataError(f"{self.path} records no sha256: only what `gptlab prepare` made can be verified")
        verify_files(self.path, self._recorded(), again=True)

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


def _foreign_shards(folder: Path, say: bool) -> dict[str, list[Shard]]:
    """nanoGPT's train.bin and val.bin, or all files with a word for train or val in their name. Test files are left.

    Args:
        say: name files that are left out, because their name has none of these words.

    Raises:
        DataError: a split has no shards, a name says two splits, a shard is none, or the widths of ids differ.
    """
    refuse_unfinished(folder)
    files: dict[str, list[Path]] = {"train": [], "val": [], "test": [], "": []}
    for file in sorted(folder.iterdir()):
        if file.suffix not in (".bin", ".npy") or file.name.startswith("."):
            continue
        said = [split for split, words in SPLIT_WORDS.items() if words.search(file.stem)]
        if len(said) > 1:
            raise DataError(
                f"{file} says both {' and '.join(said)} in its name, and a file belongs to one split: rename it, or "
                "move it out of the folder"
            )
        if file.suffix == ".bin" and file.with_suffix(".idx").is_file():
            raise DataError(f"{file} is one of {ENDINGS['.idx']}, which gptlab does not read: {INSTEAD}")
        files[said[0] if said else ""].append(file)
    missing = [split for split in ("train", "val") if not files[split]]
    if missing:
        if len(missing) == 2 and (whose := _other_packer(folder)):
            raise DataError(f"{folder} holds {whose}, which gptlab does not read as token ids: {INSTEAD}")
        what = " and no ".join(f"{split} shard ({split}.bin, *_{split}_*.npy or .bin)" for split in missing)
        raise DataError(f"{folder} is not a prepared dataset: it has no manifest.json and no {what}")
    if say and files[""]:
        names = ", ".join(file.name for file in files[""][:3]) + (", ..." if len(files[""]) > 3 else "")
        print(f"{folder}: left out, for no word for train or val in the name: {names}", file=sys.stderr)
    both = files["train"] + files["val"]
    largest = read_shard(max(both, key=lambda file: file.stat().st_size if file.is_file() else 0))
    width = largest.dtype.itemsize if largest.format == "nanogpt" else 0
    splits = {split: [read_shard(file, width=width) for file in files[split]] for split in ("train", "val")}
    for shard in splits["train"] + splits["val"]:
        if shard.format == largest.format == "nanogpt" and shard.dtype != largest.dtype:
            raise DataError(
                f"{shard.path} holds {shard.dtype} ids, and {largest.path} {largest.dtype}: write both alike"
            )
    return splits


def _other_packer(folder: Path) -> str:
    """Whose dataset a folder holds, by the files in it or directly below it; "" if nothing tells."""
    found = list(itertools.islice(itertools.chain(folder.iterdir(), folder.glob("*/*")), 10**4))
    for index in (path for path in found if path.name == "index.json"):
        with contextlib.suppress(DataError, OSError):
            keys = read_json(index, DataError)
            for key, whose in INDEX_KEYS.items():
                if key in keys:
                    return whose
    for path in [path for path in found if path.suffix == ".bin"][:3]:
        with contextlib.suppress(OSError), open_regular(path) as file:
            if whose := _packer(file.read(8)):
                return whose
    endings = {path.suffix.lower() for path in found}
    return next((whose for ending, whose in ENDINGS.items() if ending in endings), "")


def _foreign_manifest(splits: dict[str, list[Shard]]) -> dict[str, Any]:
    shards = [shard for split in splits.values() for shard in split]
    meta = shards[0].path.with_name("meta.pkl")
    vocab_size = _nanogpt_characters(meta).vocab_size if meta.is_file() else 0
    return {
        "format": shards[0].format,
        "version": 0,
        "corpus": "",
        "tokenizer": {"name": "", "vocab_size": vocab_size, "eot": None},
        "dtype": str(shards[0].dtype),
        "splits": {
            name: {
                "tokens": sum(shard.tokens for shard in split),
                "shards": [{"file": shard.path.name, "tokens": shard.tokens} for shard in split],
            }
            for name, split in splits.items()
        },
    }


def _nanogpt_characters(path: Path) -> CharTokenizer:
    """The vocabulary in nanoGPT's meta.pkl, read from the pickle's opcodes; nothing is unpickled.

    The content is {"vocab_size": n, "itos": {id: character}, "stoi": ...}: pairs of ids and characters follow the word
    itos. After them may stand end-of-text, as `prepare` writes it. Anything else is refused.
    """
    try:
        refuse_pointer(path, path.read_bytes()[:100], DataError)
        atoms = [argument for _, argument, _ in pickletools.genops(path.read_bytes()) if argument is not None]
        memo = [atom for atom in atoms[atoms.index("itos") + 1 :] if isinstance(atom, str)]
        tokens = memo[: memo.index("stoi")]
        if end_of_text := tokens[-1:] == [END_OF_TEXT]:
            tokens.pop()
        if tokens != sorted(set("".join(tokens))):
            raise ValueError
    except DataError:
        raise
    except (OSError, ValueError, IndexError):
        raise DataError(f"{path} is not the character vocabulary that nanoGPT writes: prepare the text again") from None
    return CharTokenizer("".join(tokens), end_of_text)
