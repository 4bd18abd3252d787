"""What a Hugging Face tokenizer.json does with text: as a JSON object in the form in which the library writes it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

Json = dict[str, Any]

# Put before the name of a special token where no text may give it. These code points are no characters (Unicode, 23.7).
NO_TEXT = "\ufdd0\ufdef" * 8


def complete(described: Json, end: str | None, eot: int | None) -> Json:
    """The same tokenizer with end-of-text as a special token, a decoder, and one way to write each text.

    Files exist in which end-of-text is "special": false, or only a word of the vocabulary; in which byte-level BPE has
    no decoder, so that decoded text shows the characters that stand for bytes; and with BPE dropout, for training.
    """
    added = [{**token, "special": token["special"] or token["id"] == eot} for token in described["added_tokens"]]
    if end is not None and all(token["id"] != eot for token in added):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added.append({"id": eot, "content": end, **flags, "special": True})
    decoder = described["decoder"]
    if decoder is None:  # these two steps are their own decoders
        steps = (step for step in _steps(described) if step["type"] in ("ByteLevel", "Metaspace"))
        decoder = next(steps, None)
    model = described["model"]
    if model.get("dropout") is not None:
        model = {**model, "dropout": None}
    return {**described, "added_tokens": added, "decoder": decoder, "model": model}


def is_byte_level(described: Json) -> bool:
    """Whether each character of the vocabulary stands for a byte."""
    return '"ByteLevel"' in json.dumps([described[part] for part in ("normalizer", "pre_tokenizer", "decoder")])


def is_exact(described: Json, byte_characters: Iterable[str]) -> bool:
    """Whether the ids hold every text byte for byte: byte-level BPE with all 256 bytes that drops and adds nothing."""
    model, steps = described["model"], _steps(described)
    kept = {"ByteLevel", "Split", "Punctuation", "Digits", "UnicodeScripts"}
    return (
        model["type"] == "BPE"
        and not (model["continuing_subword_prefix"] or model["end_of_word_suffix"])
        and model["vocab"].keys() >= set(byte_characters)
        and described["normalizer"] is None
        and any(step["type"] == "ByteLevel" for step in steps)
        and all(step["type"] in kept and step.get("behavior") != "Removed" for step in steps)
        and not any(step.get("add_prefix_space") for step in steps)
        and not any(token["lstrip"] or token["rstrip"] for token in described["added_tokens"] if not token["special"])
    )


def unknown_token(described: Json) -> str | None:
    """The token that stands for text that the vocabulary does not have."""
    model = described["model"]
    if model["type"] == "Unigram":
        return None if model["unk_id"] is None else str(model["vocab"][model["unk_id"]][0])
    return model["unk_token"] or None


def specials_in_vocabulary(described: Json) -> list[str]:
    """The special tokens that text could give, because they are also words of the model's vocabulary.

    A single character is left out: text that has it could not be written without its id.
    """
    vocab = described["model"]["vocab"]
    words = vocab.keys() if isinstance(vocab, dict) else {piece for piece, _ in vocab}
    special = (token["content"] for token in described["added_tokens"] if token["special"])
    return [content for content in special if content in words and len(content) > 1]


def without(described: Json, names: Iterable[str]) -> Json:
    """The same tokenizer, with the same ids, for which these words are not in the vocabulary.

    They keep their ids under names that are no text. Merges that make them, or that need them, are gone.
    """
    hidden = {name: NO_TEXT + name for name in names}
    model = dict(described["model"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {hidden.get(word, word): index for word, index in model["vocab"].items()}
        model["unk_token"] = hidden.get(model["unk_token"], model["unk_token"])
    else:
        model["vocab"] = [[hidden.get(piece, piece), score] for piece, score in model["vocab"]]
    if "merges" in model:
        prefix = model["continuing_subword_prefix"] or ""
        model["merges"] = [
            (left, right)
            for left, right in model["merges"]
            if not {left, right, left + right.removeprefix(prefix)} & hidden.keys()
        ]
    added = [token for token in described["added_tokens"] if token["content"] not in hidden]
    return {**described, "model": model, "added_tokens": added, "post_processor": None}


def _steps(described: Json) -> list[Json]:
    """The pre-tokenizers, one after another."""

    def flat(step: Json | None) -> list[Json]:
        if step is None:
            return []
        return [one for part in step["pretokenizers"] for one in flat(part)] if "pretokenizers" in step else [step]

    return flat(described["pre_tokenizer"])
