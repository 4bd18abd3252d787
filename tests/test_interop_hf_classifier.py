"""A classifier in transformers: our logits, our ids with the special tokens, and the names of the labels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gptlab.config import Model
from gptlab.data.tokenizer_files import special_ids
from gptlab.data.tokenizers import HuggingFaceTokenizer, Tokenizer, load_tokenizer
from gptlab.interop.hf_classifier import export_classifier
from gptlab.interop.hf_encoder import read_encoder
from gptlab.model.encoder import Encoder, build_encoder

SHAPE = Model(n_layer=2, n_head=2, n_embd=32, block_size=24, mlp="gelu_erf", tied=False, dropout=0.1)
LABELS = ["bad", "good", "neither"]


def make(vocab_size: int) -> Encoder:
    config = SHAPE.model_copy(update={"vocab_size": vocab_size})
    model = build_encoder(config, len(LABELS), init=3).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def roberta_like() -> Tokenizer:
    described = load_tokenizer({"kind": "byte"}).hf_json()
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    described["added_tokens"] += [
        {"id": 257 + i, "content": c, **flags} for i, c in enumerate(("<s>", "</s>", "<pad>"))
    ]
    return HuggingFaceTokenizer("own", described)


@pytest.mark.parametrize("specials", ["new", "own"])
@torch.no_grad()
def test_logits_ids_and_labels(specials: str, tmp_path: Path, foreign_code: None) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.logging.disable_progress_bar()
    tokenizer = roberta_like() if specials == "own" else load_tokenizer({"kind": "byte"})
    ids = special_ids(tokenizer)
    ours = make(ids["vocab_size"] + 4)
    export_classifier(ours, tokenizer, tmp_path / "out", LABELS, multi=specials == "own")
    theirs, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", trust_remote_code=True, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    encode = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    texts = ["a film", "a longer film, naïve", "a text of more than 24 bytes, which is cut"]
    batch = encode(texts, padding=True, truncation=True, return_tensors="pt")
    stored = [tokenizer.encode(text)[:22] for text in texts]
    lengths = torch.tensor([len(row) + 2 for row in stored])
    tokens = torch.full((3, 24), ids["pad"])
    for row, document in zip(tokens, stored, strict=True):
        row[: len(document) + 2] = torch.tensor([ids["cls"], *document, ids["sep"]])
    assert torch.equal(batch["input_ids"], tokens) and batch["attention_mask"].sum(1).tolist() == lengths.tolist()
    torch.testing.assert_close(theirs(**batch).logits, ours(tokens, lengths), atol=1e-5, rtol=0)
    classify = transformers.pipeline("text-classification", model=theirs, tokenizer=encode, top_k=None)
    scores = {row["label"]: row["score"] for row in classify([texts[0]])[0]}
    logits = ours(tokens[:1, : lengths[0]], lengths[:1])[0]
    expected = logits.sigmoid() if specials == "own" else logits.softmax(-1)
    assert scores == pytest.approx(dict(zip(LABELS, expected.tolist(), strict=True)), abs=1e-5)

    config, offset, init = read_encoder(tmp_path / "out", seed=0)
    assert (config, offset) == (ours.config, 2)
    back = build_encoder(config, 3, init=init)
    assert all(
        torch.equal(weight, back.state_dict()[name])
        for name, weight in ours.state_dict().items()
        if not name.startswith("head.")
    )


def test_loss_of_training(tmp_path: Path, foreign_code: None) -> None:
    transformers = pytest.importorskip("transformers")
    ours = make(300)
    export_classifier(ours, load_tokenizer({"kind": "byte"}), tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text(encoding="utf-8"))["id2label"]["2"] == "LABEL_2"
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", trust_remote_code=True)
    tokens, lengths = torch.randint(256, (4, 10)), torch.full((4,), 10)
    for labels in (torch.tensor([0, 2, 1, 1]), torch.tensor([[1, 0, 1.0], [0, 0, 1], [1, 1, 1], [0, 0, 0]])):
        total = ours(tokens, lengths, labels)
        torch.testing.assert_close(theirs(tokens, labels=labels).loss, total.value / 4, atol=1e-5, rtol=0)
