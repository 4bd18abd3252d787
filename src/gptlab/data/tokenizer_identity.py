"""What a tokenizer.json does, without the ways in which it can be written: by this, tokenizers are compared."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def token_ids(content: Mapping[str, Any]) -> dict[str, int]:
    """All tokens of a tokenizer.json and their ids."""
    vocabulary = content["model"].get("vocab") or {}
    if isinstance(vocabulary, list):  # of Unigram: pieces and their scores
        vocabulary = {piece: index for index, (piece, _) in enumerate(vocabulary)}
    return dict(vocabulary) | {token["content"]: token["id"] for token in content.get("added_tokens") or ()}


def identity(content: Mapping[str, Any], ends: Sequence[str], alphabet: Iterable[str]) -> str:
    """sha256 of what in a tokenizer.json decides the ids of a text, and of the id of end-of-text.

    The rest is left out: names, truncation, padding, post-processor, decoder, and the tokens that no text becomes, such
    as the special ones.

    Args:
        ends: names of end-of-text; the first that the tokenizer has is taken.
        alphabet: the 256 characters of byte-level vocabularies.
    """
    ids = token_ids(content)
    added = content.get("added_tokens") or []
    special = {token["content"] for token in added if token.get("special") or token["content"] in ends}
    matched = [token for token in added if token["content"] not in special]
    cutting = _cutting(content.get("pre_tokenizer"))
    model = {key: value for key, value in content["model"].items() if value is not None and value is not False}
    if isinstance(model.get("vocab"), dict):
        never = special - {model.get("unk_token")}
        model["vocab"] = {token: index for token, index in model["vocab"].items() if token not in never}
    if "merges" in model:
        model = _merging(model, complete="ByteLevel" in json.dumps(cutting) and model["vocab"].keys() >= {*alphabet})
    told = {
        "model": model,
        "normalizer": content.get("normalizer"),
        "pre_tokenizer": cutting,
        "added_tokens": sorted(matched, key=lambda token: token["id"]),
        "eot": next((ids[name] for name in ends if name in ids), None),
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _cutting(described: dict[str, Any] | None) -> dict[str, Any] | None:
    """A pre_tokenizer without what changes no id."""
    if described and described["type"] == "Sequence":
        return {**described, "pretokenizers": [_cutting(step) for step in described["pretokenizers"]]}
    if described and described["type"] == "ByteLevel":
        defaults = {"add_prefix_space": True, "use_regex": True}
        return {key: value for key, value in (defaults | described).items() if key != "trim_offsets"}
    return described


def _merging(model: dict[str, Any], complete: bool) -> dict[str, Any]:
    """The model of a BPE with its merges as pairs, and of its tokens those that a text can become.

    Args:
        complete: whether nothing is unknown to it.
    """
    merges = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
    model = {key: value for key, value in model.items() if value != ""} | {"type": "BPE", "merges": merges}
    if complete:
        model.pop("unk_token", None)
    if "unk_token" not in model:
        model.pop("fuse_unk", None)
    if model.keys().isdisjoint(("ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")):
        reached = {left + right for left, right in merges} | {model.get("unk_token")}
        model["vocab"] = {
            token: index
            for token, index in model["vocab"].items()
            if len(token) == 1 or token in reached or (model.get("byte_fallback") and re.fullmatch("<0x..>", token))
        }
    return model
