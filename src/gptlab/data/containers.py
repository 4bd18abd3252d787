"""One file of token ids: its header, its width, its memory map.

There are three containers for a stream of little-endian token ids:

    llmc      llm.c's: 256 int32 (magic, version, tokens, zeros), then uint16, or uint32 for large vocabularies
    nanogpt   nanoGPT's train.bin and val.bin: uint16 and nothing else
    npy       build-nanogpt's: a numpy file of uint16

Other people's headerless files may hold uint32 or int32; their content tells.
"""

from __future__ import annotations

import io
import mmap
import os
import re
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptlab.errors import DataError
from gptlab.files import because, open_regular, refuse_pointer

LLMC_HEADER_INTS = 256
LLMC_MAGIC = {2: (20240520, 1), 4: (20240801, 7)}  # bytes an id -> magic, version (llm.c, dev/data/data_common.py)
MAX_SHARD_TOKENS = 2**31 - 1  # the count in llm.c's header is an int32

# Shards of other packers, by the bytes they begin with.
PACKERS = {
    b"LITPKDS": "LitGPT's or TinyLlama's packed shards (LITPKDS)",
    b"MMIDIDX": "Megatron-LM's or fairseq's indexed shards (MMIDIDX)",
    b"TNTIDX": "fairseq's indexed shards (TNTIDX)",
    b"PK\x03\x04": "torch.save or zip",
}
INSTEAD = (
    "prepare its text with `gptlab prepare PATH`, or write its ids as nanoGPT does, uint16 without a header, to "
    "train.bin and val.bin"
)
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


def packer(head: bytes) -> str:
    return next((whose for begins, whose in PACKERS.items() if head.startswith(begins)), "")


def _refuse_other(path: Path, head: bytes, magic: int) -> None:
    """Refuse a file that begins as no shard does which is read here."""
    if whose := packer(head):
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
