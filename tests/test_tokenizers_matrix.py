"""Every family of tokenizers x what is done with one: text stays text, units, training, and the way out."""

import json
import math
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORDS, tiny_recipe
from hypothesis import given, settings
from hypothesis import strategies as st
from interrupted import killed_before
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Fast

import gptlab
from gptlab.data.corpora.base import hold_out
from gptlab.data.prepare import pipeline, prepare
from gptlab.data.shards import Dataset
from gptlab.data.tokenizer_files import special_ids
from gptlab.data.tokenizers import END_OF_TEXT, HuggingFaceTokenizer, Tokenizer, load_tokenizer, make_tokenizer
from gptlab.errors import DataError
from gptlab.interop.hf import export_hf
from gptlab.training.scoring import evaluate_run

PROSE = [f"{' '.join(WORDS[i:] + WORDS[:i]).capitalize()}, naïve café. <b> / s 1{i}\n" for i in range(len(WORDS))]
NAMES = ["<unk>", "<s>", "</s>", "<pad>"]


# -- the families ---------------------------------------------------------------------------------------------------


def trained(model: Any, trainer: Any, **parts: Any) -> dict[str, Any]:
    fast = Fast(model)
    for name, part in parts.items():
        setattr(fast, name, part)
    fast.train_from_iterator(PROSE, trainer)
    return as_json(fast)


def as_json(fast: Fast) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(fast.to_str())
    return content


def byte_level(end: str = END_OF_TEXT, special: bool = True, **parts: Any) -> dict[str, Any]:
    parts = {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False), "decoder": decoders.ByteLevel()} | parts
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    content = trained(
        models.BPE(), trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False), **parts
    )
    fast = Fast.from_str(json.dumps(content))
    (fast.add_special_tokens if special else fast.add_tokens)([AddedToken(end, special=special, normalized=False)])
    return as_json(fast)


def llama3() -> dict[str, Any]:
    words = pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated")
    parts = [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    content = byte_level("<|end_of_text|>", pre_tokenizer=pre_tokenizers.Sequence(parts))
    content["model"]["ignore_merges"] = True
    return content


def llama2() -> dict[str, Any]:
    """A vocabulary of SentencePiece's BPE: words with their space, and bytes for what it does not know."""
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<unk>", "<s>", "</s>", *fallback], show_progress=False
    )
    steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    back = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    content = trained(
        models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True),
        trainer,
        normalizer=normalizers.Sequence(steps),
        decoder=decoders.Sequence(back),
        pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="never"),  # for training
    )
    content["pre_tokenizer"] = None
    content["added_tokens"] = content["added_tokens"][:3]
    return content


def unigram(normalizer: Any = None) -> dict[str, Any]:
    """T5's and XLM-R's form: the special tokens are pieces of the model."""
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=NAMES, unk_token="<unk>", show_progress=False, initial_alphabet=list("</>")
    )
    parts = {"pre_tokenizer": pre_tokenizers.Metaspace(), "decoder": decoders.Metaspace()}
    return trained(models.Unigram(), trainer, normalizer=normalizer, **parts)


def wordpiece(lowercase: bool) -> dict[str, Any]:
    names = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[EOS]"]
    return trained(
        models.WordPiece(unk_token="[UNK]"),
        trainers.WordPieceTrainer(vocab_size=130, special_tokens=names, show_progress=False),
        normalizer=normalizers.BertNormalizer(lowercase=lowercase),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer() if lowercase else pre_tokenizers.WhitespaceSplit(),
        decoder=decoders.WordPiece(),
    )


def word_level(normalizer: Any = None) -> dict[str, Any]:
    trainer = trainers.WordLevelTrainer(vocab_size=60, special_tokens=NAMES, show_progress=False)
    parts = {"normalizer": normalizer, "pre_tokenizer": pre_tokenizers.WhitespaceSplit()}
    return trained(models.WordLevel(unk_token="<unk>"), trainer, **parts)


def plain_bpe() -> dict[str, Any]:
    """No token for unknown characters, and end-of-text is what some merges make."""
    content = trained(
        models.BPE(),
        trainers.BpeTrainer(vocab_size=90, initial_alphabet=list("</>"), show_progress=False),
        pre_tokenizer=pre_tokenizers.Split(Regex(r"\s+|\S+"), "isolated"),
        decoder=decoders.Fuse(),
    )
    vocab = content["model"]["vocab"]
    for token in ("</", "s>", "</s>"):
        vocab.setdefault(token, len(vocab))
    content["model"]["merges"] += [["<", "/"], ["s", ">"], ["</", "s>"]]
    return content


# name: (makes the content of a tokenizer.json, or the name of one of ours; the share of PROSE lost is over 1%)
FAMILIES: dict[str, tuple[Callable[[], dict[str, Any]] | str, bool]] = {
    "gpt2": ("gpt2", False),
    "byte": ("byte", False),
    "char": ("char", False),
    "bpe": ("bpe-300", False),
    "byte-level": (byte_level, False),
    "byte-level, not special": (lambda: byte_level(special=False), False),
    "byte-level, no decoder": (lambda: byte_level(decoder=None), False),
    "byte-level, prefix space": (lambda: byte_level("</s>", pre_tokenizer=pre_tokenizers.ByteLevel()), False),
    "llama 3": (llama3, False),
    "llama 2": (llama2, False),
    "unigram": (unigram, False),
    "unigram, lower case": (lambda: unigram(normalizers.Lowercase()), False),
    "wordpiece": (lambda: wordpiece(lowercase=False), False),
    "wordpiece, lower case": (lambda: wordpiece(lowercase=True), True),
    "word level": (word_level, True),
    "word level, lower case": (lambda: word_level(normalizers.Lowercase()), True),
    "plain bpe": (plain_bpe, False),
}
FILES = [name for name, (made, _) in FAMILIES.items() if not isinstance(made, str)]


@cache
def content_of(family: str) -> dict[str, Any]:
    made = FAMILIES[family][0]
    assert not isinstance(made, str)
    return made()


def everything() -> Iterator[str]:
    return iter([*PROSE, "<|endoftext|> </s> [SEP] \u65e5\u672c"])


@cache
def tokenizer_of(family: str) -> Tokenizer:
    made = FAMILIES[family][0]
    return make_tokenizer(made, everything) if isinstance(made, str) else load_tokenizer(content_of(family))


def named(family: str, folder: Path) -> str:
    """What --tokenizer is given."""
    made = FAMILIES[family][0]
    if isinstance(made, str):
        return made
    (folder / "tokenizer.json").write_text(json.dumps(content_of(family)), encoding="utf-8")
    return str(folder / "tokenizer.json")


# -- text is text ---------------------------------------------------------------------------------------------------

LITERALS = [*NAMES, END_OF_TEXT, "<|end_of_text|>", "[CLS]", "[SEP]", "[PAD]", "[EOS]", "[UNK]"]
pieces = st.sampled_from([*LITERALS, *(name.swapcase() for name in LITERALS), *WORDS[:6], " ", "\n", "  ", "<", "s>"])
texts_of_pieces = st.lists(pieces, min_size=1, max_size=8).map("".join).filter(str.strip)  # white space is no document
documents = st.lists(texts_of_pieces, min_size=3, max_size=12)


def specials(tokenizer: Tokenizer) -> set[int | None]:
    """The ids that no text may give: all special tokens save the one for unknown text, and those of a classifier."""
    ids = special_ids(tokenizer)
    found = {tokenizer.eot, ids["cls"], ids["sep"], ids["pad"]}
    if isinstance(tokenizer, HuggingFaceTokenizer):
        added = tokenizer.hf_json()["added_tokens"]
        found |= {token["id"] for token in added if token["special"] and token["content"] not in ("<unk>", "[UNK]")}
    return found


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=12, deadline=None)
@given(texts=documents)
def test_no_text_gives_a_special_token(family: str, texts: list[str]) -> None:
    tokenizer = tokenizer_of(family)
    if family == "char":
        texts = [text for text in texts if {*text} <= {*tokenizer.characters}]  # type: ignore[attr-defined]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert not specials(tokenizer) & {*ids.tolist()}
        assert tokenizer.encode(text) == ids.tolist()
        if tokenizer.exact or family == "llama 2":
            assert tokenizer.decode(ids.tolist()) == text


def count_ends(folder: Path) -> tuple[int, int]:
    """End-of-text ids in the shards, and documents by the manifest."""
    dataset = Dataset(folder)
    ends = 0
    for tokens in (dataset.train, dataset.val):
        ends += int((tokens.gather(np.array([0]), len(tokens)) == dataset.tokenizer.eot).sum()) if len(tokens) else 0
    return ends, sum(dataset.manifest["splits"][split]["documents"] for split in ("train", "val"))


def prepared(family: str, texts: list[str], folder: Path, **changes: Any) -> Path:
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    how = {"out": folder / "set", "tokenizer": named(family, folder), "progress": False, "workers": 1, **changes}
    return prepare(str(folder / "texts.jsonl"), **how)


@pytest.mark.parametrize("family", FAMILIES)
def test_ends_of_text_are_documents(family: str, tmp_path: Path) -> None:
    texts = [f"{PROSE[0]}{name} sat{name}\n{name.upper()}" for name in LITERALS for _ in range(2)]
    assert count_ends(prepared(family, texts, tmp_path)) == (len(texts), len(texts))


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "bpe"])  # it has too little to learn from
@settings(max_examples=40, deadline=None)
@given(texts=documents)
def test_ends_of_text_are_documents_whatever_they_say(
    family: str, texts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert count_ends(prepared(family, texts, tmp_path_factory.mktemp("set"))) == (len(texts), len(texts))


@pytest.mark.parametrize("family", ["unigram", "word level", "plain bpe"])
def test_the_rest_of_a_text_keeps_its_ids(family: str) -> None:
    """Words have their ids, whether there is a special token's name beside them or not."""
    tokenizer = tokenizer_of(family)
    a, b = "the cat sat", " on a mat"
    ids = tokenizer.encode(f"{a} </s>{b}")
    before, after = tokenizer.encode(a), tokenizer.encode(b)
    assert ids[: len(before)] == before
    assert ids[len(ids) - len(after) :] == after
    if family != "word level":
        assert tokenizer.decode(ids) == f"{a} </s>{b}"


def test_one_for_which_unknown_text_is_end_of_text_is_refused(tmp_path: Path) -> None:
    content = word_level()
    content["model"]["unk_token"] = "</s>"
    (tmp_path / "t.json").write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "t.txt").write_text("the cat", encoding="utf-8")  # all of it known
    with pytest.raises(DataError, match=r"t writes text that it does not know as its special token </s>"):
        prepare(str(tmp_path / "t.txt"), out=tmp_path / "set", tokenizer=str(tmp_path / "t.json"), progress=False)
    assert load_tokenizer(content).encode("the cat") == tokenizer_of("word level").encode("the cat")


def test_texts_that_a_tokenizer_cannot_take_are_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = word_level()
    content["model"]["unk_token"] = "absent"  # unknown text is an error of the library
    (tmp_path / "t.json").write_text(json.dumps(content), encoding="utf-8")
    rows = [f"the cat {('sat', 'flew')[i % 8 == 5]} on a mat" for i in range(40)]
    folders = [tmp_path / f"set{workers}" for workers in (1, 3)]
    for folder, workers in zip(folders, (1, 3), strict=True):
        (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
        prepare(str(tmp_path / "t.jsonl"), out=folder, tokenizer=str(tmp_path / "t.json"), workers=workers)
    output = capsys.readouterr()
    assert output.out.count("\n  the tokenizer could not take 5 documents, which were left out\n") == 2
    named = "document 6, 'the cat flew on a mat' (21 characters): t cannot take a text: "
    assert output.err.count(named) == 2
    assert output.err.count("it is left out") == 10
    first, second = (json.loads((folder / "manifest.json").read_text(encoding="utf-8")) for folder in folders)
    assert first == second
    assert first["left_out"] == {"token ids": 5}
    assert count_ends(folders[0]) == (35, 35)
    (tmp_path / "t.jsonl").write_text('{"text": "flew"}\n' * 3)
    with pytest.raises(DataError, match="the tokenizer can take no document of the corpus text: use another one"):
        prepare(str(tmp_path / "t.jsonl"), out=tmp_path / "none", tokenizer=str(tmp_path / "t.json"), progress=False)


# -- units ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bytes_of_ids_are_those_of_the_text(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = prepared(family, PROSE, tmp_path, val_fraction=0.5, progress=True)
    dataset = Dataset(folder)
    said = capsys.readouterr().out
    assert sum(split["bytes"] for split in dataset.manifest["splits"].values()) == len("".join(PROSE).encode())
    if FAMILIES[family][1]:
        with pytest.raises(DataError, match=r"the tokenizer drops or changes \d+\.\d+% of the bytes of the text"):
            dataset.token_bytes()
        assert "\n  the tokenizer drops" in said
        assert "% of the bytes of the text, so that no val_bits_per_byte will be given\n" in said
        return
    lost = sum(split.get("lost_bytes", 0) for split in dataset.manifest["splits"].values())
    assert lost == (family in ("wordpiece", "unigram, lower case")) * len(PROSE)  # a line end or a capital each
    assert ("drops or changes 0.82% of the bytes of the text\n" in said) == (lost > 0)
    ids = dataset.val.gather(np.array([0]), len(dataset.val))[0]
    assert dataset.token_bytes()[ids].sum() == pytest.approx(dataset.manifest["splits"]["val"]["bytes"], rel=1e-12)
    exact = [
        "gpt2",
        "byte",
        "char",
        "bpe",
        "byte-level",
        "llama 3",
        "byte-level, not special",
        "byte-level, no decoder",
    ]
    assert dataset.tokenizer.exact == (family in exact)
    if dataset.tokenizer.exact:  # not changed by a bit
        assert dataset.token_bytes().dtype == np.int64
        assert "token_bytes" not in dataset.manifest["splits"]["val"]


def test_a_dataset_without_the_new_fields_has_the_unit_too(tmp_path: Path) -> None:
    folder = prepared("unigram", PROSE, tmp_path)
    expected = Dataset(folder).token_bytes()
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    for split in manifest["splits"].values():
        del split["token_bytes"], split["lost_bytes"]
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    np.testing.assert_array_equal(Dataset(folder).token_bytes(), expected)
    (folder / "manifest.json").unlink()  # as of another tool, which does not say how many bytes there were
    with pytest.raises(DataError, match="does not say how many bytes its text has"):
        Dataset(folder).token_bytes()


def test_what_is_lost_is_counted_in_parts_and_in_a_text_that_is_cut(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for i, half in enumerate((PROSE[:12], PROSE[12:])):
        (tmp_path / f"texts/{i}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in half))
    (tmp_path / "t.json").write_text(json.dumps(content_of("unigram, lower case")), encoding="utf-8")
    how = {"source": tmp_path / "texts", "tokenizer": str(tmp_path / "t.json"), "val_tokens": 100, "progress": False}
    whole = prepare("text", out=tmp_path / "whole", **how)
    for part in ("1/2", "2/2"):
        prepare("text", out=tmp_path / "parts", part=part, **how)
    prepare("text", out=tmp_path / "parts", merge=True, progress=False)
    splits = [Dataset(folder).manifest["splits"] for folder in (whole, tmp_path / "parts")]
    counts = [{name: {k: v for k, v in e.items() if k != "shards"} for name, e in split.items()} for split in splits]
    assert sum(split["lost_bytes"] for split in counts[0].values()) == len(PROSE)
    for key in ("tokens", "documents", "token_bytes"):
        assert [counts[0][split][key] for split in ("train", "val")] == [
            counts[1][split][key] for split in ("train", "val")
        ]
    assert sum(split["bytes"] for split in counts[1].values()) == len("".join(PROSE).encode())


@pytest.mark.slow
def test_what_is_counted_does_not_depend_on_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(pipeline, "BATCH_CHARACTERS", 300)
    monkeypatch.setattr(pipeline, "RECORD_SECONDS", 0.0)
    content = word_level(normalizers.Lowercase())
    content["model"]["unk_token"] = "absent"
    (tmp_path / "t.json").write_text(json.dumps(content), encoding="utf-8")
    texts = [text.split(",")[0].replace("sat", "flew" if i % 5 == 3 else "sat") for i, text in enumerate(PROSE * 3)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")

    def made(out: Path) -> dict[str, bytes]:
        how = {"out": out, "tokenizer": str(tmp_path / "t.json"), "workers": 1, "progress": False, "shard_tokens": 200}
        prepare(str(tmp_path / "t.jsonl"), **how)
        return {path.name: path.read_bytes() for path in out.iterdir() if path.name[0] != "."}

    whole = made(tmp_path / "whole")
    manifest = json.loads(whole["manifest.json"])
    assert manifest["left_out"] == {"token ids": sum("flew" in text for text in texts)}
    assert sum(split["lost_bytes"] for split in manifest["splits"].values()) > 0
    for stop in range(1, 60, 7):
        out = tmp_path / f"stop{stop}"
        for number in (stop, 2 * stop):
            with killed_before(number, (os, "replace"), (os, "fsync")):
                made(out)
        assert made(out) == whole


def test_labelled_documents_say_what_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": text, "label": str(i % 2)} for i, text in enumerate(PROSE)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    how = {"label_field": "label", "val_fraction": 0.25, "tokenizer": named("wordpiece, lower case", tmp_path)}
    prepare(str(tmp_path / "rows.jsonl"), out=tmp_path / "set", **how)
    assert "\n  the tokenizer drops or changes 4.9% of the bytes of the text\n" in capsys.readouterr().out
    for part in ("1/2", "2/2"):
        prepare(str(tmp_path / "rows.jsonl"), out=tmp_path / "parts", part=part, progress=False, **how)
    prepare(str(tmp_path / "rows.jsonl"), out=tmp_path / "parts", merge=True, progress=False)
    splits = [json.loads((tmp_path / d / "manifest.json").read_text())["splits"] for d in ("set", "parts")]
    assert splits[0] == splits[1]
    assert sum(split["bytes"] for split in splits[0].values()) == len("".join(PROSE).encode())


# -- the whole way --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_way(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    texts = [text for text in PROSE for _ in range(8)]
    folder = prepared(family, texts, tmp_path, val_fraction=0.25)
    dataset = Dataset(folder)
    assert count_ends(folder) == (len(texts), len(texts))
    shape = {"model__position": "learned", "model__norm": "layernorm", "model__mlp": "gelu", "model__block_size": 1}
    recipe = tiny_recipe(folder, train__max_steps=3, train__eval_every=3, batch__tokens_per_step=64, **shape)
    gptlab.train(recipe, out=tmp_path / "run")
    said = capsys.readouterr().err
    run = gptlab.load_run(tmp_path / "run", device="cpu")

    # A window is one token and predicts the next: all but the first end-of-text, so all of the text.
    scores = evaluate_run(run, ["loss"], {})
    ids = torch.from_numpy(dataset.val.gather(np.array([0]), len(dataset.val))[0])
    with torch.no_grad():
        logits = run.model(ids[:-1, None]).double().flatten(0, 1)
    nats = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item()
    documents = len(ids[ids == dataset.tokenizer.eot])
    n_bytes = dataset.manifest["splits"]["val"]["bytes"]
    assert n_bytes == sum(len(text.encode()) for text in held_out(texts, 0.25))
    assert scores["val_loss"] * (len(ids) - 1) == pytest.approx(nats, rel=1e-5)
    assert documents == dataset.manifest["splits"]["val"]["documents"]
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    if FAMILIES[family][1]:
        assert "val_bits_per_byte" not in scores
        assert not any("val_bits_per_byte" in line for line in metrics)
        assert "val_bits_per_byte" not in (tmp_path / "run/result.json").read_text()
        assert said.count("val_bits_per_byte is left out: the tokenizer drops or changes") == 1
    else:
        assert scores["val_bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)
        assert any("val_bits_per_byte" in line for line in metrics)
        assert "left out" not in said

    if family != "char":  # the other scores that are per byte
        (tmp_path / "wiki.txt").write_text(" = Cats = \n" + "".join(PROSE), encoding="utf-8")
        of_wikitext = evaluate_run(run, ["wikitext"], {"eval.wikitext": str(tmp_path / "wiki.txt")})
        assert ("wikitext_bits_per_byte" in of_wikitext) == (not FAMILIES[family][1])
        assert "wikitext_word_perplexity" in of_wikitext
        said = "wikitext_bits_per_byte and wikitext_byte_perplexity: left out, the tokenizer drops or changes"
        assert (said in capsys.readouterr().err) == FAMILIES[family][1]

    # What a model says is text: no character stands for a byte.
    sample = run.sample("the cat", max_tokens=40, seed=1)[0]
    assert sample.startswith("the cat")
    assert not {"\u0120", "\u010a", "\u2581"} & {*sample}

    export_hf(run.model, run.tokenizer, tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", split_special_tokens=True)
    back = load_tokenizer(tmp_path / "hf/tokenizer.json")
    ours = dataset.tokenizer
    assert theirs.eos_token_id == ours.eot == back.eot
    spelt = f"the cat {END_OF_TEXT} sat </s>\n"
    for text in PROSE if family == "char" else [*PROSE, spelt]:
        assert back.encode(text) == ours.encode(text)
        if text != spelt or family not in WORDS_OF_THE_MODEL:  # transformers finds the special token among the words
            assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
            assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text))


WORDS_OF_THE_MODEL = [family for family in FAMILIES if family.startswith(("unigram", "word", "plain bpe"))]


def held_out(texts: list[str], fraction: float) -> list[str]:
    return [text for split, text in hold_out((("", text) for text in texts), fraction) if split == "val"]
