"""Perplexities and lm-eval: compared with loops over plain logits, and with lm-eval's `hf` model."""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_evals_hellaswag import original_rows

from gptlab.config import Model, build_recipe
from gptlab.data.tokenizers import CharTokenizer, characters_tokenizer, load_tokenizer, make_tokenizer
from gptlab.errors import DataError, UserError
from gptlab.evals.hellaswag import evaluate_hellaswag, open_hellaswag
from gptlab.evals.likelihood import encode_pairs, lay_out, likelihoods, rolling_pairs
from gptlab.evals.perplexity import (
    Passage,
    detokenize,
    lambada_perplexity,
    load_lambada,
    load_wikitext,
    wikitext_perplexity,
)
from gptlab.interop.hf import export_hf
from gptlab.model.gpt import GPT, build_model
from gptlab.training.load import Run
from gptlab.training.scoring import evaluate_run

CPU = torch.device("cpu")
BLOCK = 64
BYTES = load_tokenizer({"kind": "byte"})
GPT2 = load_tokenizer({"kind": "gpt2"})
HOW: Any = (CPU, contextlib.nullcontext, 4)
MODERN: dict[str, Any] = {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "bias": False, "tied": False}
WORDS = [
    "the",
    "a",
    "man",
    "roof",
    "water",
    "he",
    "puts",
    "on",
    "cleans",
    "knife",
    "hand",
    "pan",
    "then",
    "she",
    "café",
    "slowly",
    "and",
    "turns",
    "it",
    "over",
    "Dr.",
    "2",
]


def latin_json() -> str:
    """Letters within words, and none for what is not listed: without an unknown token it is left out."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    fast = Tokenizer(models.BPE({letter: i for i, letter in enumerate("=abenotw")}, []))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.add_special_tokens(["<|endoftext|>"])
    return fast.to_str()


class EndedCharacters(CharTokenizer):
    def __init__(self) -> None:
        super().__init__(" =ab\n", end_of_text=True)


def make(vocab_size: int, **changes: Any) -> GPT:
    """A model with noise on every weight, so that its predictions are not uniform."""
    config = Model(n_layer=2, n_head=2, n_embd=32, block_size=BLOCK, vocab_size=vocab_size)
    model = build_model(config.model_copy(update=changes), init=3)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def text(n_words: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=n_words))


# -- likelihoods ----------------------------------------------------------------------------------------------------

ids = st.lists(st.integers(0, 255), min_size=1, max_size=20)
short_ids = st.lists(st.integers(0, 255), min_size=1, max_size=12)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(ids, st.lists(ids.filter(lambda x: len(x) <= 12), min_size=1, max_size=5)), min_size=1, max_size=6
    ),
    st.integers(1, 3),
    st.sampled_from([{}, MODERN]),
)
def test_rows_that_share_a_context_are_as_likely_as_alone(forks, micro_batch, parts):
    """Batched log-likelihoods equal those of each pair alone by the model's forward pass."""
    model = make(257, block_size=12, **parts)
    pairs = [(context, new) for context, continuations in forks for new in continuations]
    measured = likelihoods(model, lay_out(pairs, 12), CPU, contextlib.nullcontext, micro_batch)
    assert measured is not None
    for (context, new), loss, greedy in zip(pairs, *measured, strict=True):
        whole = (context + new)[-13:]
        with torch.no_grad():
            scores = model(torch.tensor([whole[:-1]])).log_softmax(dim=-1)[0, -len(new) :]  # (e, V)
        expected = -scores.gather(1, torch.tensor(new)[:, None]).sum().item()
        assert loss == pytest.approx(expected, rel=2e-5, abs=2e-5)
        assert greedy == (scores.argmax(dim=1).tolist() == new)


def test_rolling_windows_predict_each_token_once():
    tokens = list(range(10))
    tokenizer = type("Tens", (), {"eot": 99, "encode_batch": lambda self, texts: [np.array(tokens)]})()
    windows = [([99], [0, 1, 2, 3]), ([0, 1, 2, 3], [4, 5, 6, 7]), ([4, 5, 6, 7], [8, 9])]
    assert rolling_pairs(tokenizer, "", 4, "") == windows
    laid = lay_out(windows, 4)  # the last window is extended to the left: 5 + 6 + 7, and 8 to predict 9
    assert laid.tokens.tolist() == [99, 0, 1, 2, 3, 4, 5, 6, 5, 6, 7, 8]
    assert laid.lengths.tolist() == [4, 4, 2]
    assert laid.targets.tolist() == tokens


def test_pairs_are_cut_where_the_context_ends():
    assert encode_pairs(BYTES, [("ab  ", "c"), ("", "x"), ("é", " y")], str) == [
        (list(b"ab"), list(b"  c")),
        ([256], list(b"x")),
        (list("é".encode()), list(b" y")),
    ]
    ((context, new),) = encode_pairs(GPT2, [("The man", " sits")], str)
    assert (context, new) == (GPT2.encode("The man"), GPT2.encode(" sits"))
    with pytest.raises(UserError, match="the tokenizer char has no end-of-text"):
        encode_pairs(characters_tokenizer("abc"), [("", "a")], str)


# -- perplexity -----------------------------------------------------------------------------------------------------

ARTICLES = " \n ".join(
    (
        "",
        "= Robert <unk> =",
        "",
        "Robert <unk> is an English film , television actor . "
        "He had a guest @-@ starring role ( in 1 @,@ 000 scenes ) .",
        "= = Career = =",
        '" Herons " , the actors \' play : " a [ very ] long one " ; 25 ° C ! Cold ?',
        "",
        "= A second = title =",
        "It 's short .",
        "",
    )
)


def test_wikitext_against_a_loop(tmp_path):
    file = tmp_path / "wiki.test.raw.gz"
    file.write_bytes(gzip.compress(ARTICLES.encode()))
    pages = load_wikitext(str(file))
    assert [page.text.strip().split(" \n")[0] for page in pages] == ["= Robert <unk> =", "= A second = title ="]
    assert [page.where for page in pages] == [f"{file}, the article at line {n}" for n in (2, 8)]
    assert "\n".join(page.text for page in pages).strip() == ARTICLES.strip()
    model = make(257)
    scores = wikitext_perplexity(model, BYTES, pages, *HOW)
    loss = 0.0
    for page in pages:
        tokens = [256, *detokenize(page.text).encode()]
        for i in range(1, len(tokens)):  # window k predicts BLOCK tokens from 1 + k BLOCK; the last has more context
            first = (i - 1) // BLOCK * BLOCK
            begin = min(first, max(0, len(tokens) - 1 - BLOCK)) if len(tokens) - 1 - first < BLOCK else first
            begin = max(begin, 1) if first else begin  # only the first window has the end-of-text
            with torch.no_grad():
                loss -= model(torch.tensor([tokens[begin:i]]))[0, -1].log_softmax(dim=0)[tokens[i]].item()
    n_words = sum(len(re.split(r"\s+", page.text)) for page in pages)
    n_bytes = sum(len(page.text.encode()) for page in pages)
    assert scores == pytest.approx(
        {
            "wikitext_word_perplexity": math.exp(loss / n_words),
            "wikitext_byte_perplexity": math.exp(loss / n_bytes),
            "wikitext_bits_per_byte": loss / n_bytes / math.log(2),
            "wikitext_pages": 2,
        },
        rel=1e-5,
    )


def test_detokenized_text(tmp_path):
    (tmp_path / "wiki.test.tokens").write_text(ARTICLES, encoding="utf-8")
    first, second = (page.text for page in load_wikitext(str(tmp_path / "wiki.test.tokens")))
    assert detokenize(first).split("\n") == [
        " = Robert <unk> =",
        "",
        "Robert <unk> is an English film, television actor. He had a guest-starring role (in 1,000 scenes).",
        "== Career ==",
        '"Herons", the actors\' play: "a [very] long one"; 25°C! Cold?',
        " ",
    ]
    assert detokenize(second) == " = A second = title =\nIt's short.\n"


def test_lambada_against_a_loop(tmp_path):
    texts = [f"{text(12, seed)} word{seed}" for seed in range(9)] + [text(30, 3) + " café"]
    file = tmp_path / "lambada.jsonl"
    file.write_text("\n".join(json.dumps({"text": t}) for t in texts) + "\n\n", encoding="utf-8")
    passages = load_lambada(str(file))
    assert passages == [(t, f"{file}, line {n}") for n, t in enumerate(texts, 1)]
    model, losses, right = make(257), [], []
    scores = lambada_perplexity(model, BYTES, passages, *HOW)
    for t in texts:
        whole, n = list(t.encode())[-(BLOCK + 1) :], len(t.encode()) - t.encode().rindex(b" ")
        with torch.no_grad():
            picked = model(torch.tensor([whole[:-1]])).log_softmax(dim=-1)[0, -n:]
        losses.append(-picked.gather(1, torch.tensor(whole[-n:])[:, None]).sum().item())
        right.append(picked.argmax(dim=1).tolist() == whole[-n:])
    n_bytes = sum(len(t.encode()) - t.encode().rindex(b" ") for t in texts)
    assert scores == pytest.approx(
        {
            "lambada_perplexity": math.exp(np.mean(losses)),
            "lambada_byte_perplexity": math.exp(sum(losses) / n_bytes),
            "lambada_acc": np.mean(right),
            "lambada_passages": 10,
        },
        rel=1e-5,
    )


def test_lambada_counts_a_word_that_is_greedy_throughout():
    model = make(257)
    with torch.no_grad():  # predicts "a" everywhere
        model.ln_f.weight.zero_()
        model.ln_f.bias.copy_(torch.eye(32)[0])
        model.wte.weight.zero_()
        model.wte.weight[ord("a"), 0] = 5.0
    scores = lambada_perplexity(model, BYTES, [Passage(t, "") for t in ("b aa", "a b", "c ab")], *HOW)
    assert scores["lambada_acc"] == 0.0  # the model misses the space before the word
    with torch.no_grad():
        model.wte.weight[ord(" "), 0] = 6.0
    assert lambada_perplexity(model, BYTES, [Passage("b  ", "")], *HOW)["lambada_acc"] == 1.0


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "has no passages"),
        ('{"text": "a b"}\n{"txt": 1}', "line 2: expected a passage"),
        ('{"text": 3}', "line 1: expected a passage"),
        ("[1]", "line 1: expected a passage"),
        ("nothing", "line 1: expected a passage"),
        ('{"text": "one"}', "line 1: a passage needs at least two words"),
        ('{"text": "one "}', "line 1: a passage needs at least two words"),
    ],
)
def test_files_that_are_not_lambada(tmp_path, content, says):
    file = tmp_path / "lambada.jsonl"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=says) as caught:
        load_lambada(str(file))
    assert str(caught.value).startswith(str(file))


def test_files_that_are_not_wikitext(tmp_path):
    for name, content, says in [
        ("a", b"\n \n", "has no text"),
        ("b", b"\xff\xfe", "cannot be read"),
        ("c.gz", b"\x1f\x8bx", "cannot"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=says):
            load_wikitext(str(tmp_path / name))
    with pytest.raises(UserError, match="cannot be read"):
        load_wikitext(str(tmp_path / "missing"))


# -- odd inputs -----------------------------------------------------------------------------------------------------

# byte-pair encoding without an unknown token: of a character that it does not know, it leaves nothing
LATIN = load_tokenizer({"kind": "hf", "name": "latin", "json": json.loads(latin_json())})


def scored(kind: str, file: Path, tokenizer: Any, folder: Path) -> dict[str, float]:
    return evaluate_run(a_run(make(257), tokenizer, folder / "run"), [kind], {f"eval.{kind}": str(file)})


@pytest.mark.parametrize(
    ("line", "tokenizer", "says"),
    [
        ("one two " + "four" * 20, BYTES, "the last word has 81 tokens, more than model.block_size = 64"),
        ("one two 日本", LATIN, "the tokenizer latin has no token for ' 日本'"),
        ("one two 日本", characters_tokenizer("one tw"), "the character '日' .* not in the vocabulary of 6 characters"),
        ("日本 one", characters_tokenizer("one tw"), "the character '日' .* not in the vocabulary"),
    ],
)
def test_a_passage_that_cannot_be_scored_is_named(tmp_path, line, tokenizer, says):
    file = tmp_path / "l.jsonl"
    good = json.dumps({"text": "one two one"})
    file.write_text(f"{good}\n\n{json.dumps({'text': line})}\n{good}\n", encoding="utf-8")
    with pytest.raises(DataError, match=f"^{re.escape(str(file))}, line 3: {says}"):
        scored("lambada", file, tokenizer, tmp_path)


def test_passages_that_are_odd_and_can_be_scored(tmp_path):
    """A word of exactly block_size tokens, half a surrogate pair, empty lines, CRLF and a byte order mark."""
    words = ["w" * (BLOCK - 1), "\ud83d", "日本", "\u2028b", "c\u00a0d"]
    lines = [json.dumps({"text": f"one two {word}"}) for word in words]
    file = tmp_path / "l.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode() + b"\r\n \r\n")
    scores = scored("lambada", file, BYTES, tmp_path)
    assert scores["lambada_passages"] == 5
    model, losses = make(257), []
    for word in words:
        whole = list(f"one two {word}".encode(errors="replace"))
        if word == "\ud83d":
            whole = list("one two \ufffd".encode())
        n, whole = len(whole) - 7, whole[-(BLOCK + 1) :]
        with torch.no_grad():
            picked = model(torch.tensor([whole[:-1]])).log_softmax(dim=-1)[0, -n:]
        losses.append(-picked.gather(1, torch.tensor(whole[-n:])[:, None]).sum().item())
    assert scores["lambada_perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)


def test_articles_of_which_nothing_is_left(tmp_path):
    file = tmp_path / "wiki.test.raw"
    file.write_text("日本\n", encoding="utf-8")
    with pytest.raises(DataError, match=f"^{file}, the article at line 1: the tokenizer latin has no token for this"):
        scored("wikitext", file, LATIN, tmp_path)
    file.write_text(" = a b = \n a b a \n = 日本 = \n 日本 \n", encoding="utf-8")  # lm-eval scores what is left too
    assert scored("wikitext", file, LATIN, tmp_path)["wikitext_pages"] == 2
    with pytest.raises(DataError, match=f"^{file}, the article at line 3: the character '日'"):
        scored("wikitext", file, EndedCharacters(), tmp_path)


# -- lm-eval --------------------------------------------------------------------------------------------------------


def a_run(model: GPT, tokenizer: Any, folder: Path, **changes: Any) -> Run:
    layer = {
        "name": "made",
        "model": model.config.model_dump(),
        "batch": {"micro_batch": 4, "tokens_per_step": 4 * BLOCK},
        "train": {"max_steps": 1},
    }
    folder.mkdir(parents=True, exist_ok=True)
    return Run(folder, build_recipe(layer, changes), model, tokenizer, 0)


@pytest.fixture(scope="module", params=["modern", pytest.param("classic", marks=pytest.mark.slow)])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Any]:
    """A run, and lm-eval's own model on its export: a Llama with 400 ids, or a GPT-2 with GPT-2's tokenizer."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate", reason="lm-eval's `hf` model needs it")
    from lm_eval.models.huggingface import HFLM

    folder = tmp_path_factory.mktemp(request.param)
    model, tokenizer = make(50304), GPT2
    if request.param == "modern":
        model, tokenizer = make(400, **MODERN), make_tokenizer("bpe-400", lambda: iter([text(300, 0), ARTICLES]))
    export_hf(model, tokenizer, folder / "hf")
    theirs = HFLM(pretrained=str(folder / "hf"), device="cpu", batch_size=3, dtype="float32")
    return a_run(model, tokenizer, folder / "run"), theirs


def ours(run: Run) -> Any:
    from gptlab.evals.harness import HarnessLM

    assert isinstance(run.model, GPT)
    return HarnessLM(run.model, run.tokenizer, *HOW)


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, i, (f"task{i}", i, 1)) for i, args in enumerate(arguments)]


def test_log_likelihoods_are_those_of_the_hf_model(pair):
    run, theirs = pair
    pairs = [
        ("", "The man"),
        (" ", "he"),
        ("The man ", "sits"),
        ("The man  ", " sits on"),
        ("A café\n", "\n2 Dr."),
        *((text(n, n), " " + text(m, m)) for n in (3, 20, 90) for m in (1, 5, 30)),  # 90 words do not fit
        *((text(9, 1), f" {word}") for word in WORDS),  # one context, many answers
        *((text(90, 2), words[: end or len(words)]) for words in [text(90, 5)] for end in (1, 120, 150)),
        ("The man\u2028\xa0", "sits\t on"),
        ("\ufeffThe man\r\n", "\x00 on"),
        ("The man", " "),
    ]
    pairs = [pair for pair in pairs if pair[0] != " "]  # lm-eval's model refuses a context of spaces only
    expected = theirs.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    measured = ours(run).loglikelihood(requests("loglikelihood", pairs))
    np.testing.assert_allclose([m[0] for m in measured], [e[0] for e in expected], atol=1e-4, rtol=1e-6)
    assert [m[1] for m in measured] == [e[1] for e in expected]


def test_rolling_log_likelihoods_are_those_of_the_hf_model(pair):
    run, theirs = pair
    texts = [(text(n, n),) for n in (1, 10, 50, 63, 64, 65, 200)]
    texts += [(odd,) for odd in (" ", "\n\n", "\ufeffa\x00b\u2028", "café " * 100)]
    texts += [
        ("".join(map(str, range(400))),)
    ]  # of one token, windows are equal, and lm-eval scores one of them for all
    expected = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True)
    measured = ours(run).loglikelihood_rolling(requests("loglikelihood_rolling", texts))
    np.testing.assert_allclose(measured, expected, atol=1e-4, rtol=1e-6)
    assert ours(run).loglikelihood_rolling(requests("loglikelihood_rolling", [("",), ("",)])) == [0.0, 0.0]


def test_generations_are_those_of_the_hf_model(pair):
    run, theirs = pair
    arguments = [
        *((text(n, n), {"until": ["zzz"], "max_gen_toks": 12}) for n in (1, 5, 8, 8, 30, 90)),
        *((text(n, n), {"until": ["an", "e"], "max_gen_toks": 20, "do_sample": False}) for n in (2, 3, 50)),
        (text(4, 4), {"until": "a", "max_gen_toks": 7, "temperature": 0.0}),
    ]
    expected = theirs.generate_until(requests("generate_until", arguments), disable_tqdm=True)
    measured = ours(run).generate_until(requests("generate_until", arguments))
    assert measured == expected
    assert len(set(measured)) > 3


def test_sampled_generations_do_not_depend_on_their_neighbours(pair):
    run, _ = pair
    sampling = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0, "top_k": 50}
    arguments = [(text(n, n), sampling) for n in (3, 9, 9, 20, 5)]
    together = ours(run).generate_until(requests("generate_until", arguments))
    lm = ours(run)
    lm.micro_batch = 1
    assert lm.generate_until(requests("generate_until", arguments)) == together
    assert together[1] != ours(run).generate_until(requests("generate_until", [(text(9, 9), sampling)]))[0]


def test_generation_under_autocast(pair):
    run, _ = pair
    lm = ours(run)
    lm.context = lambda: torch.autocast("cpu", torch.bfloat16)
    answers = lm.generate_until(
        requests("generate_until", [(text(n, n), {"until": [], "max_gen_toks": 4}) for n in (2, 7)])
    )
    assert all(answers)


def test_answers_that_do_not_fit_are_refused(pair):
    from gptlab.evals.harness import HarnessLM

    run, _ = pair
    with pytest.raises(UserError, match=r"task task0: cannot score an answer of \d+ tokens with model.block_size = 64"):
        ours(run).loglikelihood(requests("loglikelihood", [("a", " " + text(90, 1))]))
    with pytest.raises(UserError, match=r"task task0: cannot generate 256 tokens with model.block_size = 64"):
        ours(run).generate_until(requests("generate_until", [("a", {"until": ["x"]})]))
    with pytest.raises(UserError, match="the tokenizer char has no end-of-text"):
        HarnessLM(run.model, characters_tokenizer("abc"), *HOW)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Local tasks of each kind: lm-eval's own HellaSwag, LAMBADA and WikiText on local data, and one that generates."""
    pytest.importorskip("lm_eval")
    import lm_eval.tasks

    folder, shipped = tmp_path_factory.mktemp("tasks"), Path(lm_eval.tasks.__file__).parent

    def data(name: str, rows: list[dict[str, Any]]) -> None:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    rows = original_rows(200)
    rows[5]["endings"][1] = ""
    data("hellaswag", [row for row in rows if len(row["ctx"]) < 1000])
    passages = [f"{text(12, seed)} {WORDS[seed]}" for seed in range(12)]
    passages += [f"{text(90, 1)} café", "A\tman  puts", "the roof\u2028 \xa0water", f"the {'man' * 40}"]
    data("lambada", [{"text": passage} for passage in passages])  # the last fill the context, and more
    (folder / "wiki.test.raw").write_text(ARTICLES, encoding="utf-8")
    data("wikitext", [{"page": page.text} for page in load_wikitext(str(folder / "wiki.test.raw"))])
    data("writing", [{"question": text(n, n), "answer": "the"} for n in range(3, 9)])
    local = "dataset_path: json\ndataset_name: null\ntraining_split: null\n"
    source = f"dataset_kwargs: {{{{cache_dir: {folder}/cache, data_files: {{{{{{split}}: {{file}}}}}}}}}}\n"
    for name, task, split in [
        ("hellaswag", "hellaswag/hellaswag.yaml", "validation"),
        ("lambada", "lambada/lambada_openai.yaml", "test"),
        ("wikitext", "wikitext/wikitext.yaml", "test"),
    ]:
        (folder / f"{name}.yaml").write_text(
            f"include: {shipped / task}\ntask: local_{name}\n{local}"
            + ("validation_split: null\n" if split == "test" else "")
            + source.format(split=split, file=folder / f"{name}.jsonl"),
            encoding="utf-8",
        )
    (folder / "writing.yaml").write_text(
        f"task: local_writing\n{local}test_split: test\noutput_type: generate_until\ndoc_to_text: '{{{{question}}}}'\n"
        "doc_to_target: '{{answer}}'\ngeneration_kwargs: {until: ['.'], max_gen_toks: 6}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
        + source.format(split="test", file=folder / "writing.jsonl"),
        encoding="utf-8",
    )
    return {name: folder / f"{name}.yaml" for name in ("hellaswag", "lambada", "wikitext", "writing")}


@pytest.fixture(scope="module")
def verdicts(pair: tuple[Run, Any], tasks: dict[str, Path]) -> Any:
    """lm-eval's results with its own model."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    import gptlab.evals.harness  # noqa: F401  # which has lm-eval bootstrap without a pool of processes

    chosen = [str(file) for file in tasks.values()]
    return simple_evaluate(
        pair[1], tasks=chosen, task_manager=TaskManager(include_defaults=False), bootstrap_iters=1000
    )


def test_tasks_score_what_they_score_with_the_hf_model(pair, tasks, verdicts):
    run, _ = pair
    scores = evaluate_run(run, ["harness"], {}, [str(file) for file in tasks.values()])
    expected = {
        f"{task}_harness_{key.removesuffix(',none')}": value
        for task, found in verdicts["results"].items()
        for key, value in found.items()
        if key.endswith(",none") and isinstance(value, float | int)
    }
    assert len(expected) == 4 + 4 + 3 + 2
    assert {key: scores[key] for key in expected} == pytest.approx(expected, rel=1e-4)
    assert scores["local_hellaswag_harness_samples"] == 200
    assert scores.keys() == expected.keys() | {"step"} | {f"local_{name}_harness_samples" for name in tasks}


def test_hellaswag_gets_the_harness_s_verdict_on_every_row(pair, tasks, verdicts):
    run, _ = pair
    rows = open_hellaswag(str(tasks["hellaswag"].with_suffix(".jsonl")), run.tokenizer, BLOCK, "harness")
    result = evaluate_hellaswag(run.model, rows, *HOW)
    samples = sorted(verdicts["samples"]["local_hellaswag"], key=lambda sample: sample["doc_id"])
    assert len(samples) == 200
    theirs = np.array([[-float(answer[0]) for (answer,) in sample["resps"]] for sample in samples])
    np.testing.assert_allclose(result.losses, theirs, atol=1e-4, rtol=1e-6)
    assert (result.pick == result.label).tolist() == [sample["acc"] == 1 for sample in samples]
    assert (result.pick_norm == result.label).tolist() == [sample["acc_norm"] == 1 for sample in samples]
    assert 0 < rows.n_cut < 200
    found = verdicts["results"]["local_hellaswag"]
    assert result.scores() == pytest.approx(
        {"hellaswag_harness_acc": found["acc,none"], "hellaswag_harness_acc_norm": found["acc_norm,none"]}
    )


def test_perplexities_are_those_of_the_harness(pair, tasks, verdicts):
    run, _ = pair
    articles, passages = tasks["wikitext"].with_name("wiki.test.raw"), tasks["lambada"].with_suffix(".jsonl")
    files = {"eval.wikitext": str(articles), "eval.lambada": str(passages)}
    scores = evaluate_run(run, ["wikitext", "lambada"], files)
    for name, metrics in [
        ("wikitext", ["word_perplexity", "byte_perplexity", "bits_per_byte"]),
        ("lambada", ["perplexity", "acc"]),
    ]:
        for metric in metrics:
            theirs = verdicts["results"][f"local_{name}"][f"{metric},none"]
            assert scores[f"{name}_{metric}"] == pytest.approx(theirs, rel=1e-4)


def test_detokenizer_is_that_of_the_harness(tasks):
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    pieces = [
        "s '",
        " @-@ ",
        " @,@ ",
        " . ",
        " , ",
        "( ",
        " )",
        "[ x ]",
        '" ',
        "' ",
        " 's",
        " N ",
        "= =",
        "\n ",
        " \n",
        "ab",
        " ",
    ]
    for seed in range(300):
        page = "".join(random.Random(seed).choices(pieces, k=40))
        assert detokenize(page) == wikitext_detokenizer({"page": page})


def test_wrong_calls(pair, tmp_path):
    run, _ = pair
    with pytest.raises(UserError, match="--tasks hellaswag arc_easy runs two"):
        evaluate_run(run, ["harness"], {})
    with pytest.raises(UserError, match="--on harness runs them"):
        evaluate_run(run, ["wikitext"], {}, ["hellaswag"])
    (tmp_path / "task.yaml").write_text(
        "task: gone\ndataset_path: json\noutput_type: loglikelihood_rolling\ntest_split: test\ndoc_to_text: ''\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/gone.jsonl}}}}\ndoc_to_target: '{{{{page}}}}'\n",
        encoding="utf-8",
    )
    with pytest.raises(UserError, match=r"lm-eval cannot run .*task.yaml: FileNotFoundError: .*gone.jsonl"):
        evaluate_run(run, ["harness"], {}, [str(tmp_path / "task.yaml")])


@pytest.mark.slow  # lm-eval reads all of its tasks
def test_a_task_that_lm_eval_does_not_have(pair):
    with pytest.raises(UserError, match=r"lm-eval has no task helaswag\. "):
        evaluate_run(pair[0], ["harness"], {}, ["helaswag"])


def test_files_must_be_named_and_lm_eval_installed(tmp_path, monkeypatch):
    run = a_run(make(257), BYTES, tmp_path)
    with pytest.raises(UserError, match=r"--eval\.wikitext FILE names wiki\.test\.raw"):
        evaluate_run(run, ["wikitext"], {})
    with pytest.raises(UserError, match=r"--eval\.lambada FILE"):
        evaluate_run(run, ["lambada"], {})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--on harness needs lm-eval: pip install 'gptlab\[harness\]'"):
        evaluate_run(run, ["harness"], {}, ["hellaswag"])
