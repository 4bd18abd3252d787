"""Tokenizers that others made: files, folders and hub ids; and the special tokens of classification."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptlab.data.tokenizers import (
    END_OF_TEXT_NAMES,
    MOST_IDS,
    SPECIALS,
    HuggingFaceTokenizer,
    Tokenizer,
    check_unknown_text,
    hugging_face,
    is_learnt,
    load_tokenizer,
)
from gptlab.data.verified import file_sha256
from gptlab.errors import DataError
from gptlab.files import because, check_values, damaged, parse_json, read_json, read_text

if TYPE_CHECKING:
    from tokenizers import AddedToken

OURS = ("gpt2", "byte")  # names of tokenizers that are not learnt
VOCABULARY = ("vocab.json", "merges.txt")
VOCABULARY_NOTES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")  # say more about it
FILES = ("tokenizer.json", *VOCABULARY, *VOCABULARY_NOTES)
_NO_FILES = "neither a tokenizer.json nor vocab.json and merges.txt"


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of cls, sep and pad, and the vocab_size with them: the tokenizer's own, or three new ids at the end."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        ids = {token["content"]: token["id"] for token in tokenizer.hf_json()["added_tokens"] if token["special"]}
        for cls, sep, pad in SPECIALS:
            if cls in ids and sep in ids and pad in ids:
                return {"cls": ids[cls], "sep": ids[sep], "pad": ids[pad], "vocab_size": tokenizer.vocab_size}
    size = tokenizer.vocab_size
    return {"cls": size, "sep": size + 1, "pad": size + 2, "vocab_size": size + 3}


# -- by name --------------------------------------------------------------------------------------------------------


def identify_tokenizer(name: str) -> dict[str, Any]:
    """What a manifest says about a tokenizer before it is made: its name, and a sha256 of the digests of its files."""
    digests = "".join(file_sha256(path) for path in local_files(name))
    named = {"name": Path(name).stem}
    return named | ({"source_sha256": hashlib.sha256(digests.encode()).hexdigest()} if digests else {})


def local_files(name: str) -> list[Path]:
    """Files on this machine that a tokenizer is read from; none for gpt2, byte, char, bpe-N and hub ids.

    Raises:
        DataError: a folder without a tokenizer.
    """
    path = Path(os.path.expanduser(name))
    if name in OURS or is_learnt(name) or not path.exists():  # a folder may be called gpt2
        return []
    if path.is_dir() and not _files_in(path):
        raise DataError(f"{path} has no tokenizer: {_NO_FILES}")
    return _files_in(path) if path.is_dir() else [path]


def open_tokenizer(name: str) -> Tokenizer:
    """A tokenizer that is not learnt from the documents.

    Args:
        name: gpt2, byte, a tokenizer.json, a folder with a tokenizer.json or with vocab.json and merges.txt, or a hub
            id such as FacebookAI/roberta-base.

    Raises:
        DataError: an unknown name, unreadable files, or no network for a hub id.
    """
    if name in OURS:
        return load_tokenizer({"kind": name})
    files = local_files(name)
    if files and Path(os.path.expanduser(name)).is_file():
        return load_tokenizer(files[0])
    tokenizer = read_folder(files[0].parent if files else _download(name), Path(name).stem)
    if tokenizer is None:
        raise DataError(f"{name} has no tokenizer on the Hugging Face hub: {_NO_FILES}")
    return tokenizer


def open_text_tokenizer(name: str) -> Tokenizer:
    """As `open_tokenizer`, for a stream of documents. Raises DataError if nothing can stand between them."""
    tokenizer = open_tokenizer(name)
    check_unknown_text(tokenizer)
    if tokenizer.eot is None:
        names = ", ".join(END_OF_TEXT_NAMES)
        raise DataError(f"{tokenizer.name} has no end-of-text token: none of {names} is in it")
    return tokenizer


def _download(name: str) -> Path:
    known = "use gpt2, byte, char, bpe-N, a tokenizer.json, a folder that has one, or a hub id"
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.endswith(".json"):
        raise DataError(f"no tokenizer '{name}': {known}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except Exception as error:  # of the hub's client and of the network, which share no class
        raise DataError(
            f"no tokenizer '{name}' here, and its files could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}): {known}, which needs the network once"
        ) from None


# -- by files -------------------------------------------------------------------------------------------------------

# Tokenizers of transformers that are byte-level BPE with GPT-2's words, and differ in their special tokens.
BYTE_LEVEL = ("GPT2", "Roberta", "Bart", "Longformer", "LED", "CodeGen")

# Special tokens that a vocabulary need not name, and keys that name special tokens, in the order of their ids.
KNOWN_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>")
SPECIAL_KEYS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRA_KEYS = ("extra_special_tokens", "additional_special_tokens")
NOTED = (*SPECIAL_KEYS, *EXTRA_KEYS, "added_tokens_decoder", "tokenizer_class", "add_prefix_space")


def _files_in(folder: Path) -> list[Path]:
    if (folder / "tokenizer.json").is_file():
        return [folder / "tokenizer.json"]
    if all((folder / file).is_file() for file in VOCABULARY):
        return [folder / file for file in FILES if (folder / file).is_file()]
    return []


def read_folder(folder: Path, name: str) -> Tokenizer | None:
    """The tokenizer in a folder: tokenizer.json, else vocab.json with merges.txt; None if there is neither.

    Args:
        name: of the tokenizer that is read, if it is none of ours.
    """
    files = _files_in(folder)
    if not files:
        return None
    tokenizer = load_tokenizer(files[0]) if len(files) == 1 else _read_vocabulary(folder)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        tokenizer.name = name
    return tokenizer


def _read_vocabulary(folder: Path) -> Tokenizer:
    """Byte-level BPE from the two files of GPT-2 and RoBERTa, and the tokens that the files beside them add."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers

    vocabulary, merges = (folder / file for file in VOCABULARY)
    not_ours = f"{vocabulary} and {merges.name} are not a vocabulary of byte-level BPE"
    settings = _noted(folder / "tokenizer_config.json", NOTED)
    kind = settings.get("tokenizer_class") or _noted(folder / "config.json", NOTED).get("tokenizer_class")
    if kind and str(kind).removesuffix("Fast").removesuffix("Tokenizer") not in BYTE_LEVEL:
        raise DataError(
            f"{folder}: vocab.json and merges.txt of a {kind} are not read: in transformers, "
            f"AutoTokenizer.from_pretrained(...).save_pretrained(...) writes the tokenizer.json that is"
        )
    ids = read_json(vocabulary, DataError)
    if not all(isinstance(index, int) and 0 <= index < MOST_IDS for index in ids.values()):
        raise DataError(f"{not_ours}: an id is no number of a token")
    if "\u0120" not in ids:  # how such a vocabulary writes a space
        raise DataError(f"{not_ours}: it has no space")
    try:
        fast = Fast(models.BPE.from_file(str(vocabulary), str(merges)))
    except Exception as error:  # the library raises plain exceptions
        raise DataError(f"{not_ours}: {because(error)}") from None
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=settings.get("add_prefix_space") is True)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([token for token in KNOWN_SPECIALS if token in ids])
    for token, wanted in _added_tokens(folder, settings):
        fast.add_tokens([token])
        if wanted not in (None, found := fast.token_to_id(token.content)):
            raise DataError(
                f"{folder}: the added token {token.content!r} has the id {wanted} in its file and {found} after the "
                f"{len(ids)} of {vocabulary.name}: one of the files belongs to another tokenizer"
            )
    return hugging_face(folder.name, json.loads(fast.to_str()))


def _noted(file: Path, keys: Collection[str] = ()) -> dict[str, Any]:
    """The object in a file beside the vocabulary, {} without the file.

    Args:
        keys: what is read of it. model_max_length, which is not, is a number of 100 bits in many.
    """
    if not file.is_file():
        return {}
    with damaged(file, DataError):
        content = parse_json(read_text(file, DataError))
        content = {key: value for key, value in content.items() if key in (keys or content)}
        check_values(content)
        return content


def _added_tokens(folder: Path, settings: dict[str, Any]) -> list[tuple[AddedToken, int | None]]:
    """Tokens beside the vocabulary, as transformers adds them, each with the id that its file gives, or None.

    tokenizer_config.json of newer versions lists them. Before, special_tokens_map.json named the special ones, and
    added_tokens.json gave the ids of those that are not in the vocabulary.
    """
    with damaged(folder / "tokenizer_config.json", DataError):
        listed = settings.get("added_tokens_decoder")
        named = settings if listed else settings | _noted(folder / "special_tokens_map.json", NOTED)
        extra: Any = next((named[key] for key in EXTRA_KEYS if named.get(key)), [])
        names = [named.get(key) for key in SPECIAL_KEYS] + [*(extra.values() if isinstance(extra, dict) else extra)]
        special = {token.content: token for token in (_added_token(name) for name in names if name)}
        given = listed or {index: token for token, index in _noted(folder / "added_tokens.json").items()}
        tokens = [(_added_token(given[index]), int(index)) for index in sorted(given, key=int)]
        for token, _ in tokens:
            known = special.pop(token.content, None) is not None or token.content in KNOWN_SPECIALS
            token.special = known or token.special
        for token in special.values():
            token.special = True
        return [*tokens, *((token, None) for token in special.values())]


def _added_token(described: str | dict[str, Any]) -> AddedToken:
    """A token as these files write it: its text, or an object."""
    from tokenizers import AddedToken

    if isinstance(described, str):
        return AddedToken(described)
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(described["content"], **{flag: described[flag] for flag in flags if flag in described})
