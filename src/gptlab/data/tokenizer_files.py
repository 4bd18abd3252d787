"""Tokenizers of other people for classification: files, folders and hub ids, and their special tokens."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gptlab.data.tokenizers import MOST_IDS, HuggingFaceTokenizer, Tokenizer, load_tokenizer, make_tokenizer
from gptlab.data.verified import file_sha256
from gptlab.errors import DataError
from gptlab.files import because, read_json

OURS = ("gpt2", "byte", "char")
# Special tokens at the beginning, at the end and after a document: RoBERTa's, then BERT's.
SPECIALS = (("<s>", "</s>", "<pad>"), ("[CLS]", "[SEP]", "[PAD]"))


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of cls, sep and pad, and the vocab_size with them: the tokenizer's own, or three new ids at the end."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        ids = {token["content"]: token["id"] for token in tokenizer.hf_json()["added_tokens"] if token["special"]}
        for cls, sep, pad in SPECIALS:
            if cls in ids and sep in ids and pad in ids:
                return {"cls": ids[cls], "sep": ids[sep], "pad": ids[pad], "vocab_size": tokenizer.vocab_size}
    size = tokenizer.vocab_size
    return {"cls": size, "sep": size + 1, "pad": size + 2, "vocab_size": size + 3}


def identify_tokenizer(name: str, labeled: bool) -> dict[str, Any]:
    """What identifies a tokenizer before it is made: its name, and a sha256 of its files (of digests, with labels)."""
    named = {"name": Path(name).stem}
    if not labeled:
        return named | ({"source_sha256": file_sha256(Path(name))} if Path(name).is_file() else {})
    digests = "".join(file_sha256(path) for path in _files_of(Path(name)))
    return named | ({"source_sha256": hashlib.sha256(digests.encode()).hexdigest()} if digests else {})


def make_classifier_tokenizer(name: str, texts: Callable[[], Iterator[str]]) -> Tokenizer:
    """A tokenizer for labelled documents; end-of-text is not needed.

    Args:
        name: gpt2, byte, char, bpe-N, a tokenizer.json, a folder with a tokenizer.json or with vocab.json and
            merges.txt, or a hub id such as FacebookAI/roberta-base.
        texts: makes an iterator over the documents to learn char and bpe-N from.

    Raises:
        DataError: an unknown name, unreadable files, or no network for a hub id.
    """
    files = _files_of(Path(name))
    if not files and (name in OURS or re.fullmatch(r"bpe-\d+", name)):
        return make_tokenizer(name, texts)
    if not files:
        files = [_download(name)]
    tokenizer = load_tokenizer(files[0]) if len(files) == 1 else _read_vocabulary(*files)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        tokenizer.name = Path(name).stem
    return tokenizer


def _files_of(path: Path) -> list[Path]:
    """A tokenizer.json, or vocab.json and merges.txt; nothing if `path` is neither a file nor a folder."""
    if path.is_file():
        return [path]
    if not path.is_dir() or str(path) in OURS:  # a folder may be called gpt2
        return []
    for files in (["tokenizer.json"], ["vocab.json", "merges.txt"]):
        if all((path / file).is_file() for file in files):
            return [path / file for file in files]
    raise DataError(f"{path} has no tokenizer: neither a tokenizer.json nor vocab.json and merges.txt")


def _download(name: str) -> Path:
    known = "use gpt2, byte, char, bpe-N, a tokenizer.json, a folder that has one, or a hub id"
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.endswith(".json"):
        raise DataError(f"no tokenizer '{name}': {known}")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "tokenizer.json"))
    except Exception as error:  # of the hub's client and of the network, which share no class
        raise DataError(
            f"no tokenizer '{name}' here, and its tokenizer.json could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}): {known}, which needs the network once"
        ) from None


def _read_vocabulary(vocabulary: Path, merges: Path) -> Tokenizer:
    """Byte-level BPE from the two files of GPT-2 and RoBERTa."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers

    not_ours = f"{vocabulary} and {merges.name} are not a vocabulary of byte-level BPE"
    ids = read_json(vocabulary, DataError)
    if not all(isinstance(index, int) and 0 <= index < MOST_IDS for index in ids.values()):
        raise DataError(f"{not_ours}: an id is no number of a token")
    try:
        fast = Fast(models.BPE.from_file(str(vocabulary), str(merges)))
    except Exception as error:  # the library raises plain exceptions
        raise DataError(f"{not_ours}: {because(error)}") from None
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    specials = ("<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>")
    fast.add_special_tokens([token for token in specials if token in ids])
    return HuggingFaceTokenizer(vocabulary.parent.name, json.loads(fast.to_str()))
