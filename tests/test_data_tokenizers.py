"""Tokenizers: round trips, known ids, and agreement with Hugging Face's implementation."""

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Fast

from gptlab.data import tokenizers
from gptlab.data.tokenizer_files import open_text_tokenizer, open_tokenizer
from gptlab.data.tokenizers import END_OF_TEXT, Tokenizer, load_tokenizer, make_tokenizer
from gptlab.errors import DataError

TEXTS = [
    "The quick brown fox jumps over the lazy dog.\n\n    def f(x):\n\treturn x ** 2  # don't\r\n",
    "na\u00efve caf\u00e9 \u2014 \u4f60\u597d, \u4e16\u754c! \U0001f600\U0001f468\u200d\U0001f469 12345 \u00bd",
    "ends in spaces   ",
    f"a {END_OF_TEXT} in a document is text",
    "\x00\x7f\u2028",
]


def texts() -> Iterator[str]:
    return iter(TEXTS * 2)


@pytest.fixture(scope="module", params=["gpt2", "byte", "char", "bpe-300"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return make_tokenizer(request.param, texts)


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return make_tokenizer("gpt2", texts)


def test_known_ids(gpt2: Tokenizer) -> None:
    assert gpt2.encode("hello world") == [31373, 995]
    assert gpt2.encode("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert (gpt2.vocab_size, gpt2.eot) == (50257, 50256)
    assert gpt2.decode([50256]) == END_OF_TEXT
    byte = make_tokenizer("byte", texts)
    assert byte.encode("h\u00e9") == [104, 195, 169]
    assert (byte.vocab_size, byte.eot) == (257, 256)


def test_what_every_tokenizer_does(tokenizer: Tokenizer) -> None:
    lengths = tokenizer.token_bytes()
    assert lengths.shape == (tokenizer.vocab_size,)
    assert tokenizer.eot is not None
    assert lengths[tokenizer.eot] == 0
    batch = tokenizer.encode_batch(TEXTS)
    for text, of_batch in zip(TEXTS, batch, strict=True):
        ids = tokenizer.encode(text)
        assert ids == of_batch.tolist()
        assert tokenizer.decode(ids) == text
        assert tokenizer.eot not in ids
        assert 0 <= min(ids) <= max(ids) < tokenizer.vocab_size
        assert lengths[ids].sum() == len(text.encode())
    assert tokenizer.encode("") == []


def test_a_spec_is_enough(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer.spec()), encoding="utf-8")
    for again in (load_tokenizer(tmp_path / "tokenizer.json"), load_tokenizer(tokenizer.spec())):
        assert (again.name, again.vocab_size, again.eot) == (tokenizer.name, tokenizer.vocab_size, tokenizer.eot)
        assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def test_the_exported_json_is_the_same_tokenizer(tokenizer: Tokenizer) -> None:
    fast = Fast.from_str(json.dumps(tokenizer.hf_json()))
    assert fast.token_to_id(END_OF_TEXT) == tokenizer.eot
    assert fast.encode(f"a{END_OF_TEXT}a", add_special_tokens=False).ids[1] == tokenizer.eot
    fast.encode_special_tokens = True
    for text in TEXTS:
        ids = fast.encode(text, add_special_tokens=False).ids
        assert ids == tokenizer.encode(text)
        assert fast.decode(ids, skip_special_tokens=False) == text
    # any ids, also such as no text gives
    some = np.random.default_rng(0).integers(0, tokenizer.vocab_size, 200).tolist()
    assert fast.decode(some, skip_special_tokens=False) == tokenizer.decode(some)


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
@settings(max_examples=80, deadline=None)
def test_any_text_comes_back(gpt2: Tokenizer, text: str) -> None:
    for tokenizer in (gpt2, make_tokenizer("byte", texts), BPE):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    if text:
        char = make_tokenizer("char", lambda: iter([text]))
        assert char.decode(char.encode(text)) == text
        assert char.vocab_size == len(set(text))


BPE = make_tokenizer("bpe-290", texts)


def test_invalid_bytes_and_lone_surrogates_are_replaced(tokenizer: Tokenizer) -> None:
    if tokenizer.name in ("gpt2", "byte"):
        first = tokenizer.encode("\u20ac")[:1] if tokenizer.name == "byte" else tokenizer.encode("\U0001f600")[:1]
        assert tokenizer.decode(first) == "\ufffd"
    if tokenizer.name != "char":
        assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_char_vocabulary() -> None:
    one = make_tokenizer("char", lambda: iter(["hello\n"]))
    assert (one.vocab_size, one.eot) == (5, None)  # "\nehlo"
    assert one.encode("hello") == [2, 1, 3, 3, 4]
    two = make_tokenizer("char", lambda: iter(["hello", "help"]))
    assert (two.vocab_size, two.eot) == (6, 5)
    for unknown in ("x", "\U0001f600"):
        with pytest.raises(
            DataError, match=rf"the character '{unknown}' \(U\+{ord(unknown):04X}\) is not in the vocab"
        ):
            one.encode(f"he{unknown}")


def test_bpe_is_trained_to_size_and_repeatable(tmp_path: Path) -> None:
    first = make_tokenizer("bpe-320", texts)
    assert (first.vocab_size, first.eot) == (320, 319)
    assert first.spec() == make_tokenizer("bpe-320", texts).spec()
    assert first.spec() != make_tokenizer("bpe-320", lambda: iter(["other words, other merges " * 3, *TEXTS])).spec()
    assert len(first.encode(TEXTS[0])) < len(TEXTS[0].encode())
    with pytest.raises(DataError, match="at least 257"):
        make_tokenizer("bpe-256", texts)
    with pytest.raises(DataError, match="the documents give at most 259 ids: use bpe-259"):
        make_tokenizer("bpe-1000", lambda: iter(["ab ab"]))
    assert make_tokenizer("bpe-259", lambda: iter(["ab ab"])).encode("ab ab") == [256, 257]


# -- long runs without a word break


WHITE = [chr(code) for code in range(0x10000) if chr(code).isspace()]  # more than the tokenizer's: \x1c to \x1f
runs = st.tuples(st.sampled_from([*WHITE, "\u180e", "\u200b", "a", "'s", "1", "!", "\u65e5"]), st.integers(1, 5))


@given(text=st.lists(runs, max_size=12).map(lambda parts: "".join(c * n for c, n in parts)))
@settings(max_examples=200, deadline=None)
def test_cut_in_white_space_a_text_keeps_its_ids(gpt2: Tokenizer, text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers, "LONG_SPACE", re.compile(tokenizers.LONG_SPACE.pattern.replace("1000", "2")))
        pieces = tokenizers._cut_in_long_space(text)
    assert "".join(pieces) == text
    assert [index for piece in pieces for index in gpt2.encode(piece)] == gpt2.encode(text)


def test_a_million_spaces_in_a_row(gpt2: Tokenizer) -> None:
    """tiktoken's regular expression fails on them."""
    few = [f"start{space * 999}end{space * 2000}" for space in (" ", "\n", "\t ")]
    many = [f"start{space * 1_000_001}end{space * 1_200_000}" for space in (" ", "\n", "\t ")]
    for text in many:
        ids = gpt2.encode(text)
        assert gpt2.decode(ids) == text
        assert ids[-2:] != gpt2.encode("end"), "the run at the end is there too"
    assert [ids.tolist() for ids in gpt2.encode_batch([*few, many[0], "a"])[:3]] == [gpt2.encode(text) for text in few]


def test_learning_from_a_long_run_takes_linear_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(length: int) -> float:
        begin = time.thread_time()
        make_tokenizer("bpe-260", lambda: iter(["ab" * (length // 2)]))
        return time.thread_time() - begin

    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    seconds(100)
    few, many = min(seconds(2**14) for _ in range(3)), seconds(2**19)
    assert many < 160 * few, "32 times the bytes; in quadratic time it is a thousand times"


def test_words_of_usual_length_are_learnt_from_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    prose = ["the cat sat on the mat; " * 20 + "x" * 500, "a" * 300 + " " * 400 + "\n"]
    made = make_tokenizer("bpe-280", lambda: iter(prose)).spec()
    monkeypatch.setattr(tokenizers, "LONGEST_WORD", 2**40)
    assert make_tokenizer("bpe-280", lambda: iter(prose)).spec() == made
    monkeypatch.setattr(tokenizers, "LONGEST_WORD", 8)
    assert max(map(len, make_tokenizer("bpe-270", lambda: iter(prose)).hf_json()["model"]["vocab"])) <= 8


def test_merges_do_not_depend_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    many = make_tokenizer("bpe-300", texts).spec()
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert make_tokenizer("bpe-300", texts).spec() == many


# -- anybody's tokenizer.json


def written(folder: Path, change: Callable[[dict[str, Any]], object], name: str = "custom.json") -> Path:
    content = make_tokenizer("bpe-300", texts).hf_json()
    change(content)
    (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder / name


def test_a_hugging_face_file(tmp_path: Path) -> None:
    def truncating(content: dict[str, Any]) -> None:
        content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
        content["padding"] = {
            "strategy": {"Fixed": 64},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "!",
        }

    tokenizer = open_tokenizer(str(written(tmp_path, truncating)))
    assert tokenizer.name == "custom"
    assert tokenizer.encode(TEXTS[0]) == make_tokenizer("bpe-300", texts).encode(TEXTS[0])
    assert load_tokenizer(tokenizer.spec()).encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def test_end_of_text_is_looked_for_by_its_usual_names(tmp_path: Path) -> None:
    def renamed(name: str) -> Callable[[dict[str, Any]], None]:
        def change(content: dict[str, Any]) -> None:
            content["added_tokens"][0]["content"] = name
            content["model"]["vocab"] = {
                token: index for token, index in content["model"]["vocab"].items() if index < 299
            }

        return change

    assert load_tokenizer(written(tmp_path, renamed("</s>"))).eot == 299
    without = written(tmp_path, renamed("<stop>"))
    assert load_tokenizer(without).eot is None  # a model that was trained so can be used; documents need it
    with pytest.raises(DataError, match=r"no end-of-text token: none of <\|endoftext\|>, .*</s>.* is in it"):
        open_text_tokenizer(str(without))


def test_sentencepiece_style_bytes(tmp_path: Path) -> None:
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "added_tokens": [
            {
                "id": 2,
                "content": "</s>",
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {
                "a": 0,
                "\u2581": 1,
                "</s>": 2,
                "\u2581a": 3,
                **{f"<0x{byte:02X}>": 4 + byte for byte in range(256)},
            },
            "merges": [["\u2581", "a"]],
        },
    }
    (tmp_path / "t.json").write_text(json.dumps(content), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path / "t.json")
    text = "a a \u00e9a"
    ids = tokenizer.encode(text)
    assert ids == [0, 3, 1, 4 + 0xC3, 4 + 0xA9, 0]
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].tolist() == [1, 2, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "t.json is damaged"),
        ("[]", "does not hold a JSON object"),
        ('{"kind": "char"}', "damaged: KeyError 'characters'"),
        ('{"kind": "morse"}', "neither a known kind nor a Hugging Face model"),
        ('{"model": {"type": "BPE"}}', "is not a Hugging Face tokenizer.json"),
    ],
)
def test_files_that_are_no_tokenizer(tmp_path: Path, content: str, sentence: str) -> None:
    (tmp_path / "t.json").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=sentence):
        load_tokenizer(tmp_path / "t.json")


def test_a_name_that_is_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tokenizer 'gpt9': use gpt2, byte, char or bpe-N"):
        make_tokenizer("gpt9", texts)
    with pytest.raises(DataError, match="is missing"):
        load_tokenizer(tmp_path / "none.json")
