"""HellaSwag: its rows, what becomes of long ones, and losses that do not depend on how rows are batched."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import io
import json
import math
import random
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptlab.config import Model
from gptlab.data.tokenizers import characters_tokenizer, load_tokenizer
from gptlab.errors import DataError, Stopped, UserError
from gptlab.evals import hellaswag, likelihood
from gptlab.evals.hellaswag import (
    Encoded,
    HellaSwagResult,
    Row,
    encode_rows,
    evaluate_hellaswag,
    load_rows,
    open_hellaswag,
    standard_error,
    wilson_interval,
    write_results,
)
from gptlab.model.gpt import GPT, build_model

CPU = torch.device("cpu")
BLOCK = 96
TOKENIZER = load_tokenizer({"kind": "byte"})
PARTS: dict[str, dict[str, Any]] = {
    "classic": {},
    "modern": {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "bias": False, "qk_norm": True, "tied": False},
}


def make(parts: str = "classic", **changes: Any) -> GPT:
    """A model off its initial weights, so that it has opinions."""
    config = Model(n_layer=2, n_head=2, n_embd=32, block_size=BLOCK, vocab_size=TOKENIZER.vocab_size)
    model = build_model(config.model_copy(update=PARTS[parts] | changes), init=3)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def make_rows(
    n: int, seed: int = 0, context: tuple[int, int] = (1, 50), ending: tuple[int, int] = (0, 35)
) -> list[Row]:
    """Rows of letters, with lengths from the given ranges; an ending may be empty, which leaves its space."""
    rng = random.Random(seed)

    def text(lengths: tuple[int, int]) -> str:
        return "".join(rng.choices("abcdefgh ,.é", k=rng.randint(*lengths)))

    return [
        Row(1000 + i, text(context), (text(ending), text(ending), text(ending), text(ending)), rng.randrange(4))
        for i in range(n)
    ]


def evaluate(model: Any, rows: list[Row] | Encoded, micro_batch: int = 3, **kwargs: Any) -> HellaSwagResult:
    encoded = rows if isinstance(rows, Encoded) else encode_rows(rows, TOKENIZER, BLOCK)
    result = evaluate_hellaswag(model, encoded, CPU, contextlib.nullcontext, micro_batch, **kwargs)
    assert result is not None
    return result


def original_rows(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with the fields and the quirks of the original hellaswag_val.jsonl: two sources, WikiHow's marks, spaces."""
    rng = random.Random(seed)
    words = "the a man roof water he puts on cleans knife hand pan then she café slowly and turns it over Dr. 2 o'clock"

    def text(n_words: int) -> str:
        return " ".join(rng.choices(words.split(), k=n_words))

    rows = []
    for i in range(n):
        endings = [text(rng.randint(3, 25)) + "." for _ in range(4)]
        if wikihow := rng.random() < 0.6:
            ctx_a = f"[header] How to {text(4)} [title] {text(5)}. [step] {text(rng.randint(5, 40))}."
            ctx_b, ctx = "", ctx_a
            endings = [f"{ending} [substeps] {text(3)}.  {text(2)} [title] {text(2)}" for ending in endings]
        else:
            ctx_a, ctx_b = f"{text(rng.randint(5, 30))}.", rng.choice(["he", "The other Man", "a  lady [unclear]"])
            ctx = f"{ctx_a} {ctx_b}"
        rows.append(
            {
                "ind": 3 * i,
                "activity_label": rng.choice(["Roof shingle removal", "Food and Entertaining"]),
                "ctx_a": ctx_a,
                "ctx_b": ctx_b,
                "ctx": ctx,
                "endings": endings,
                "label": rng.randrange(4),
                "split": "val",
                "split_type": "indomain",
                "source_id": "wikihow~1" if wikihow else "activitynet~v_1",
            }
        )
    return rows


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 200 rows in the original's format."""
    file = tmp_path_factory.mktemp("hellaswag") / "hellaswag_val.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in original_rows(200)), encoding="utf-8")
    return file


@torch.no_grad()
def one_by_one(model: GPT, row: Row) -> list[float]:
    """Summed losses of the endings, from all logits of one sequence at a time; for rows that fit the context."""
    losses = []
    for ending in row.endings:
        before, after = list(row.ctx.encode()), list(f" {ending}".encode())
        logits = model(torch.tensor([before + after]))[0].float()  # (T, V)
        picked = logits[len(before) - 1 : -1]
        losses.append(F.cross_entropy(picked, torch.tensor(after), reduction="sum").item())
    return losses


# -- losses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", list(PARTS))
def test_equals_an_unbatched_reference(parts):
    model, rows = make(parts), make_rows(37)
    result = evaluate(model, rows, micro_batch=2)
    expected = np.array([one_by_one(model, row) for row in rows])
    np.testing.assert_allclose(result.losses, expected, rtol=2e-6, atol=2e-5)
    assert result.lengths.tolist() == [[len(f" {ending}".encode()) for ending in row.endings] for row in rows]
    assert result.ind.tolist() == [row.ind for row in rows]
    assert result.label.tolist() == [row.label for row in rows]
    right = [row.label for row in rows]
    assert result.acc == np.mean(expected.argmin(1) == right)
    assert result.acc_norm == np.mean((expected / result.lengths).argmin(1) == right)
    assert result.scores() == {"hellaswag_acc": result.acc, "hellaswag_acc_norm": result.acc_norm}


@pytest.mark.parametrize("parts", list(PARTS))
def test_two_hundred_rows_in_the_original_format(parts, original):
    """Row by row against a loop over texts that has nothing but the model's logits and the tokenizer in common."""
    model = make(parts, block_size=1024)
    result = evaluate(model, open_hellaswag(str(original), TOKENIZER, 1024), micro_batch=1)
    picks, picks_norm = [], []
    for i, line in enumerate(original.read_text(encoding="utf-8").splitlines()):
        value = json.loads(line)
        losses, means = [], []
        for ending in value["endings"]:
            before, after = TOKENIZER.encode(value["ctx"]), TOKENIZER.encode(" " + ending)
            with torch.no_grad():
                scores = model(torch.tensor([before + after])).log_softmax(dim=-1)[0]  # (T, V)
            losses.append(-sum(scores[len(before) + j - 1, token].item() for j, token in enumerate(after)))
            means.append(losses[-1] / len(after))
        np.testing.assert_allclose(result.losses[i], losses, rtol=1e-5)
        assert (result.ind[i], result.label[i]) == (value["ind"], value["label"])
        picks.append(losses.index(min(losses)))
        picks_norm.append(means.index(min(means)))
    assert result.pick.tolist() == picks
    assert result.pick_norm.tolist() == picks_norm
    assert picks != picks_norm


@pytest.mark.parametrize("micro_batch", [1, 2, 5, 1000])
def test_batch_size_and_order_change_nothing(micro_batch):
    model, rows = make("modern"), make_rows(23, seed=1)
    expected = evaluate(model, rows)
    order = random.Random(5).sample(range(len(rows)), len(rows))
    result = evaluate(model, [rows[i] for i in order], micro_batch)
    np.testing.assert_allclose(result.losses, expected.losses[order], rtol=2e-6, atol=2e-5)
    assert result.ind.tolist() == expected.ind[order].tolist()
    assert (result.acc, result.acc_norm) == (expected.acc, expected.acc_norm)


def test_a_single_row():
    model, rows = make(), make_rows(1)
    np.testing.assert_allclose(evaluate(model, rows).losses[0], one_by_one(model, rows[0]), rtol=2e-6, atol=2e-5)


def test_logits_come_in_chunks(monkeypatch):
    model, rows = make(), make_rows(9)
    expected = evaluate(model, rows)
    seen = []
    cross_entropy = F.cross_entropy

    def spy(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append((logits.dtype, len(logits)))
        return cross_entropy(logits, *args, **kwargs)

    monkeypatch.setattr(likelihood, "chunk_length", lambda n_tokens, vocab_size, device: 7)
    monkeypatch.setattr(likelihood.F, "cross_entropy", spy)
    np.testing.assert_allclose(evaluate(model, rows).losses, expected.losses, rtol=2e-6, atol=2e-5)
    assert {dtype for dtype, _ in seen} == {torch.float32}
    assert max(n for _, n in seen) == 7
    assert sum(n for _, n in seen) == expected.lengths.sum()  # logits of nothing but the endings


def test_autocast_losses_are_float32():
    model, rows = make(), make_rows(5)

    def bf16() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16)

    with bf16():
        expected = np.array([one_by_one(model, row) for row in rows])
    result = evaluate_hellaswag(model, encode_rows(rows, TOKENIZER, BLOCK), CPU, bf16, 4)
    assert result is not None
    np.testing.assert_allclose(result.losses, expected, rtol=1e-2)
    assert not np.array_equal(result.losses, evaluate(model, rows).losses)  # autocast was on


def fixed(favourite: str = "a", nats: float = 0.0) -> GPT:
    """Predicts the same everywhere: `favourite` is likelier than the other bytes by `nats`."""
    model = make(n_layer=1, tied=False)
    with torch.no_grad():
        model.ln_f.weight.zero_()
        model.ln_f.bias.copy_(torch.eye(32)[0])
        model.head_weight.zero_()
        model.head_weight[ord(favourite), 0] = nats
    return model


def test_the_right_ending_wins():
    rows = [
        Row(i, "context", tuple("aaaa" if j == i % 4 else "bbbb" for j in range(4)), i % 4)  # type: ignore[arg-type]
        for i in range(9)
    ]
    assert evaluate(fixed("a", 3.0), rows).scores() == {"hellaswag_acc": 1.0, "hellaswag_acc_norm": 1.0}
    assert evaluate(fixed("b", 3.0), rows).scores() == {"hellaswag_acc": 0.0, "hellaswag_acc_norm": 0.0}


def test_sums_favour_short_endings_and_means_do_not():
    # "a" costs log(e^3 + 256) - 3 nats, any other byte, the space before an ending among them, 3 nats more.
    rare = math.log(math.exp(3) + 256)
    result = evaluate(fixed("a", 3.0), [Row(0, "c", ("bbb", "b", "aaaaaaaa", "baaa"), 2)])
    expected = [4 * rare, 2 * rare, rare + 8 * (rare - 3), 2 * rare + 3 * (rare - 3)]
    np.testing.assert_allclose(result.losses[0], expected, rtol=1e-6)
    assert (result.pick.tolist(), result.pick_norm.tolist()) == ([1], [2])
    assert (result.acc, result.acc_norm) == (0.0, 1.0)


def test_of_equal_losses_the_first_is_picked():
    # Every byte costs log V: by sum the shortest endings tie, by mean all four.
    rows = [
        Row(0, "c", ("bbbb", "aa", "x", "y"), 2),
        Row(1, "context", ("long one", "longer one", "é", "longest one"), 0),
    ]
    result = evaluate(fixed(), rows)
    np.testing.assert_allclose(result.losses, result.lengths * math.log(TOKENIZER.vocab_size), rtol=1e-7)
    assert result.pick.tolist() == [2, 2]
    assert result.pick_norm.tolist() == [0, 0]
    many = evaluate(fixed(), make_rows(50))
    assert len(np.unique(many.losses / many.lengths)) == 1  # exactly, whatever the length


def test_a_broken_model_scores_nothing(tmp_path):
    result = evaluate(fixed("a", math.nan), [Row(i, "c", ("a", "b", "c", "d"), 0) for i in range(3)])
    assert (result.acc, result.acc_norm) == (0.0, 0.0)
    write_results(tmp_path / "results.jsonl", result)
    line = json.loads((tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert line["pick"] is line["pick_norm"] is None
    assert line["losses"] == [None] * 4


# -- batches --------------------------------------------------------------------------------------------------------


def shapes_of(encoded: Encoded, micro_batch: int) -> list[tuple[int, int]]:
    return [(size, width) for _, size, width in likelihood._groups(encoded.pairs, micro_batch)]


@pytest.mark.parametrize("n", [1, 2, 3, 50, 301])
@pytest.mark.parametrize("micro_batch", [1, 8])
def test_few_shapes_within_the_budget(n, micro_batch):
    encoded = encode_rows(make_rows(n, seed=n), TOKENIZER, BLOCK)
    shapes = shapes_of(encoded, micro_batch)
    assert len(set(shapes)) <= 8
    assert max(b * t for b, t in shapes) <= micro_batch * BLOCK
    if n == 301:  # enough to fill batches: little is padded
        assert sum(b * t for b, t in shapes) < 1.2 * len(encoded.pairs.tokens)


def test_equal_lengths_are_one_shape():
    rows = make_rows(11, context=(9, 9), ending=(5, 5))
    rows = [dataclasses.replace(row, ctx=f"{i:09}", endings=("abcde",) * 4) for i, row in enumerate(rows)]
    # 9 of the context and 5 of each of 4 endings (the space is one more, the last letter none): 3 x 29 of 96 tokens
    assert shapes_of(encode_rows(rows, TOKENIZER, BLOCK), 1) == [(3, 29)] * 4


def test_training_is_left_alone():
    model, rows = make(dropout=0.5), make_rows(7)
    expected = evaluate(model, rows)
    model.train()
    before = torch.get_rng_state()
    result = evaluate(model, rows)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(result.losses, expected.losses)
    assert all(parameter.grad is None for parameter in model.parameters())
    evaluate(model.eval(), rows)
    assert not model.training


def test_stop():
    model, encoded = make().train(), encode_rows(make_rows(20), TOKENIZER, BLOCK)
    asked = []

    def stop(done: int, total: int) -> None:
        asked.append((done, total))
        if len(asked) == 3:
            raise Stopped

    with pytest.raises(Stopped):
        evaluate_hellaswag(model, encoded, CPU, contextlib.nullcontext, 1, stop)
    total = asked[0][1]
    assert asked == [(0, total), (1, total), (2, total)] and total > 3
    assert model.training


# -- long rows ------------------------------------------------------------------------------------------------------


def test_a_long_row_loses_the_beginning_of_its_context():
    model = make()
    short = Row(0, "tail of the context", ("ab", "c" * 76, "abc", ""), 1)  # 19 tokens, and 77 of the longest ending
    assert encode_rows([short], TOKENIZER, BLOCK).n_cut == 0
    long = dataclasses.replace(short, ctx="forgotten " * 30 + short.ctx)
    encoded = encode_rows([long, short], TOKENIZER, BLOCK)
    assert encoded.n_cut == 1
    assert encoded.lengths.tolist() == [[3, 77, 4, 1]] * 2
    assert np.array_equal(encoded.pairs.tokens[:19], list(b"tail of the context"))
    # All endings follow the same context, which is read again where they do not fit into 96 tokens together.
    assert encoded.pairs.widths.tolist() == [19 + 2, 19 + 76, 19 + 3 + 0 + 2, 19 + 76, 19 + 3 + 0]
    np.testing.assert_allclose(evaluate(model, encoded).losses[0], one_by_one(model, short), rtol=2e-6, atol=2e-5)


def test_an_ending_without_room_loses_its_end():
    model = make("modern")
    encoded = encode_rows([Row(0, "context", ("d" * 500, "e", "f" * 94, "g" * 95), 0)], TOKENIZER, BLOCK)
    assert (encoded.n_cut, encoded.lengths.tolist()) == (1, [[95, 2, 95, 95]])
    cut = Row(0, "t", ("d" * 94, "e", "f" * 94, "g" * 94), 0)
    np.testing.assert_allclose(evaluate(model, encoded).losses[0], one_by_one(model, cut), rtol=2e-6, atol=3e-5)


def test_texts_a_tokenizer_has_no_ids_for():
    with pytest.raises(DataError, match="HellaSwag row 1000: the character .* is not in the vocabulary"):
        encode_rows(make_rows(1), characters_tokenizer("xyz"), BLOCK)
    with pytest.raises(UserError, match=r"block_size = 1: "):
        encode_rows(make_rows(1), TOKENIZER, 1)
    lone = Row(0, "half a pair \ud83d", ("a", "b", "c", "d"), 0)  # valid JSON, and no UTF-8
    tokens = encode_rows([lone], TOKENIZER, BLOCK).pairs.tokens
    assert bytes(tokens[:15].astype(np.uint8)).decode() == "half a pair \ufffd"


def test_a_tokenizer_that_leaves_nothing():
    class Empty(type(TOKENIZER)):  # type: ignore[misc]
        def encode_batch(self, texts):
            return [ids[1:] for ids in super().encode_batch(texts)]

    with pytest.raises(UserError, match="row 7: its context or an ending has no tokens"):
        encode_rows([Row(7, "context", ("a", "", "c", "d"), 0)], Empty(), BLOCK)


# -- the harness's definition ---------------------------------------------------------------------------------------


def test_the_harness_edits_texts_and_divides_by_characters():
    model, tokenizer = make(block_size=256), TOKENIZER
    row = Row(
        7,
        "unused",
        (" starts  it [substeps] now.", "é", "is [title] done", "[step] goes"),
        1,
        activity_label="Roof",
        ctx_a="A man [header] sits on a roof.",
        ctx_b="THE man",
    )
    encoded = encode_rows([row], tokenizer, 256, "harness")
    assert bytes(encoded.pairs.tokens[:38].astype(np.uint8)) == b"Roof: A man sits on a roof. The man st"
    # "starts it  now." after the brackets' spaces are made one, each a single time
    cleaned = ["starts it now.", "é", "is.  done".replace("  ", " "), " goes"]
    assert encoded.lengths.tolist() == [[len(text) for text in cleaned]]
    result = evaluate(model, encoded)
    plain = Row(7, "Roof: A man sits on a roof. The man", tuple(cleaned), 1)  # type: ignore[arg-type]
    losses = one_by_one(model, plain)
    np.testing.assert_allclose(result.losses[0], losses, rtol=2e-6, atol=2e-5)
    assert result.pick_norm[0] == np.argmin(np.array(losses) / encoded.lengths[0])
    assert set(result.scores()) == {"hellaswag_harness_acc", "hellaswag_harness_acc_norm"}


def test_the_harness_needs_the_parts_of_the_context():
    with pytest.raises(UserError, match=r"row 1000 lacks activity_label, ctx_a or ctx_b, which .* = harness puts"):
        encode_rows(make_rows(1), TOKENIZER, BLOCK, "harness")


def test_the_harness_cuts_each_pair_from_the_left():
    model = make()
    row = Row(0, "", ("a", "b" * 60, "c" * 120, "d"), 0, "X", "y" * 80, "z")
    encoded = encode_rows([row], TOKENIZER, BLOCK, "harness")
    assert encoded.n_cut == 1
    result = evaluate(model, encoded)
    query = "X: " + "y" * 80 + " Z"
    for i, ending in enumerate(row.endings):
        ids = list(f"{query} {ending}".encode())[: len(query) + BLOCK][-(BLOCK + 1) :]
        with torch.no_grad():
            scores = model(torch.tensor([ids[:-1]])).log_softmax(dim=-1)[0]
        n = min(BLOCK, 1 + len(ending))
        expected = -scores[-n:].gather(1, torch.tensor(ids[-n:])[:, None]).sum().item()
        np.testing.assert_allclose(result.losses[0, i], expected, rtol=1e-5)


# -- llm.c's file and the download ----------------------------------------------------------------------------------


def llmc_file(path: Path, rows: list[Row], **header: int) -> Path:
    """hellaswag_val.bin as llm.c's data/hellaswag.py lays it out."""
    stream: list[int] = []
    tokenizer = load_tokenizer({"kind": "gpt2"})
    longest = 0
    for i, row in enumerate(rows):
        example = [65535, 0, i, row.label, 4]
        for text in (row.ctx, *(f" {ending}" for ending in row.endings)):
            ids = tokenizer.encode(text)
            example += [len(ids), *ids]
        example[1] = 2 * len(example)
        longest = max(longest, example[1])
        stream += example
    head = np.zeros(256, "<i4")
    head[:4] = 20240522, 1, len(rows), longest
    for index, value in header.items():
        head[int(index[1:])] = value
    path.write_bytes(head.tobytes() + np.array(stream, "<u2").tobytes())
    return path


def test_llmc_files_give_the_same_as_the_texts(tmp_path, original):
    tokenizer, rows = load_tokenizer({"kind": "gpt2"}), load_rows(original)
    expected = encode_rows(rows, tokenizer, 64)
    encoded = open_hellaswag(str(llmc_file(tmp_path / "hellaswag_val.bin", rows)), tokenizer, 64)
    assert encoded.ind.tolist() == list(range(200))
    assert np.array_equal(encoded.label, expected.label)
    assert encoded.n_cut == expected.n_cut > 0
    for name in ("tokens", "positions", "branches", "widths", "sources", "targets", "lengths"):
        assert np.array_equal(getattr(encoded.pairs, name), getattr(expected.pairs, name))


def test_llmc_files_that_are_none(tmp_path, original):
    tokenizer, file = load_tokenizer({"kind": "gpt2"}), tmp_path / "val.bin"
    rows = load_rows(original)[:3]
    with pytest.raises(UserError, match="cannot be read"):
        open_hellaswag(str(file), tokenizer, 64)
    llmc_file(file, rows)
    with pytest.raises(UserError, match="holds GPT-2's ids, and this model's tokenizer is byte"):
        open_hellaswag(str(file), TOKENIZER, 64)
    with pytest.raises(UserError, match=r"has no text, which hellaswag\.definition = harness needs"):
        open_hellaswag(str(file), tokenizer, 64, "harness")
    whole = file.read_bytes()
    no_label, no_id = whole[:1030] + b"\4\0" + whole[1032:], whole[:1036] + b"\xf0\xff" + whole[1038:]
    for content in (whole[:-2], whole[:1024] + b"\0\0" + whole[1026:], no_label, no_id):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"is damaged: its row \d of 3 is no row"):
            open_hellaswag(str(file), tokenizer, 64)
    for header in ({"_0": 20240520}, {"_1": 2}):
        with pytest.raises(UserError, match="its header is another"):
            open_hellaswag(str(llmc_file(file, rows, **header)), tokenizer, 64)
    with pytest.raises(UserError, match="has no rows"):
        open_hellaswag(str(llmc_file(file, rows, _2=0)), tokenizer, 64)
    file.write_bytes(whole[:100])
    with pytest.raises(UserError, match="its header is another"):
        open_hellaswag(str(file), tokenizer, 64)


def test_the_download_is_checked_and_kept(tmp_path, monkeypatch, original):
    asked = []

    def urlopen(url: str, timeout: float) -> io.BytesIO:
        asked.append(url)
        return io.BytesIO(original.read_bytes())

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tokenizer = load_tokenizer({"kind": "byte"})
    with pytest.raises(UserError, match=r"is not the file it was \(another sha256\)"):
        open_hellaswag("download", tokenizer, 512)
    assert not list(tmp_path.rglob("*.jsonl"))
    monkeypatch.setattr(hellaswag, "SHA256", hashlib.sha256(original.read_bytes()).hexdigest())
    for _ in range(2):
        assert len(open_hellaswag("download", tokenizer, 512).ind) == 200
    assert asked == ["https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"] * 2
    kept = tmp_path / "gptlab/hellaswag_val.jsonl"
    assert kept.read_bytes() == original.read_bytes()

    kept.write_text("damaged", encoding="utf-8")

    def offline(url: str, timeout: float) -> io.BytesIO:
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    with pytest.raises(UserError, match=r"could not be downloaded .*no route.*--hellaswag\.path FILE"):
        open_hellaswag("download", tokenizer, 512)


# -- files ----------------------------------------------------------------------------------------------------------

GOOD: dict[str, Any] = {
    "ind": 24,
    "activity_label": "Roof",
    "ctx": "A man. he",
    "label": 3,
    "endings": ["a", "b", "c", "d"],
    "split": "val",
}


def test_rows_from_files(tmp_path):
    lines = [json.dumps(GOOD), "", json.dumps(GOOD | {"ind": 25, "label": "0", "ctx": "naïve"}), ""]
    plain, packed = tmp_path / "val.jsonl", tmp_path / "val.jsonl.gz"
    plain.write_text("\n".join(lines), encoding="utf-8")
    packed.write_bytes(gzip.compress(b"\xef\xbb\xbf" + plain.read_bytes()))  # a byte order mark
    endings = ("a", "b", "c", "d")
    assert load_rows(plain) == [Row(24, "A man. he", endings, 3, "Roof"), Row(25, "naïve", endings, 0, "Roof")]
    assert load_rows(str(packed)) == load_rows(plain)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "Expecting property name"),
        ('{"ind": 1', "Expecting ',' delimiter"),
        ("[]", "an object was expected"),
        ("{}", "it has no ind and no ctx and no endings and no label"),
        (GOOD | {"label": 4}, "label must be 0, 1, 2 or 3, not 4"),
        (GOOD | {"label": ""}, "label must be 0, 1, 2 or 3, not ''"),
        (GOOD | {"label": True}, "label must be 0, 1, 2 or 3, not True"),
        (GOOD | {"label": 1.0}, "label must be 0, 1, 2 or 3, not 1.0"),
        (GOOD | {"endings": ["a", "b", "c"]}, "endings must be four texts"),
        (GOOD | {"endings": ["a", "b", "c", 4]}, "endings must be four texts"),
        (GOOD | {"endings": "abcd"}, "endings must be four texts"),
        (GOOD | {"ctx": ""}, "ctx must be a text"),
        (GOOD | {"ctx": None}, "ctx must be a text"),
        (GOOD | {"ind": "1"}, "ind must be a whole number"),
        (GOOD | {"ind": 10**30}, "ind must be a whole number"),
        (GOOD | {"ctx_a": 1}, "activity_label, ctx_a and ctx_b must be texts"),
        (b"\xff\xfe\xfa", "can't decode"),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path, line, says):
    file = tmp_path / "val.jsonl"
    raw = line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
    file.write_bytes(json.dumps(GOOD).encode() + b"\n" + raw + b"\n")
    with pytest.raises(UserError) as caught:
        load_rows(file)
    assert str(caught.value).startswith(f"{file}, line 2 is not a HellaSwag row: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    def refuses(path: Path, says: str) -> None:
        with pytest.raises(UserError, match=says) as caught:
            load_rows(path)
        assert str(path) in str(caught.value)

    refuses(tmp_path / "missing.jsonl", "there is no HellaSwag file")
    refuses(tmp_path, "cannot be read")
    (tmp_path / "empty.jsonl").write_text("\n\n", encoding="utf-8")
    refuses(tmp_path / "empty.jsonl", "has no rows")
    (tmp_path / "plain.gz").write_text(json.dumps(GOOD), encoding="utf-8")
    assert len(load_rows(tmp_path / "plain.gz")) == 1  # the content says how a file is packed
    packed = gzip.compress(random.Random(0).randbytes(1000).hex().encode())
    (tmp_path / "half.gz").write_bytes(packed[: len(packed) // 2])
    refuses(tmp_path / "half.gz", "cannot be read")


def test_results_are_written_a_line_per_row(tmp_path):
    result = HellaSwagResult(
        np.array([7, 9]),
        np.array([1, 3]),
        np.array([[8.0, 4.0, 9.0, 5.0], [1.0, 2.0, 3.0, 4.0]]),
        np.array([[8, 2, 3, 5], [1, 1, 1, 8]]),
    )
    file = tmp_path / "hellaswag_results.jsonl"
    file.write_text("of the evaluation before\n", encoding="utf-8")
    write_results(file, result)
    assert [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] == [
        {"ind": 7, "label": 1, "losses": [8.0, 4.0, 9.0, 5.0], "lengths": [8, 2, 3, 5], "pick": 1, "pick_norm": 0},
        {"ind": 9, "label": 3, "losses": [1.0, 2.0, 3.0, 4.0], "lengths": [1, 1, 1, 8], "pick": 0, "pick_norm": 3},
    ]
    assert (result.acc, result.acc_norm) == (0.5, 0.5)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_intervals():
    # 8 of 10 and 0 of 10, as published for Wilson's interval at 95%; and GPT-2 124M's acc_norm over all rows.
    assert wilson_interval(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert standard_error(0.2955, 10042) == pytest.approx(0.00455, abs=1e-5)
