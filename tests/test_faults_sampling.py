"""The same text streamed, at once and beside others, to the last character."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from gptlab.config import Model, build_recipe
from gptlab.data.tokenizers import ByteTokenizer, CharTokenizer, HuggingFaceTokenizer, Tokenizer
from gptlab.errors import UserError
from gptlab.evals.likelihood import encode_pairs, lay_out, likelihoods
from gptlab.model.generate import NotFinite, pick_token
from gptlab.model.gpt import build_model
from gptlab.tasks.lm import continued, sample_texts, streamed
from gptlab.training.load import Run


def metaspace() -> Tokenizer:
    """A tokenizer as SentencePiece makes them: words begin with their space, and a text loses its first one."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers

    fast = Fast(models.BPE(unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.decoder = decoders.Metaspace()
    words = ["I will not speak and the dog will not speak to the cat"] * 20
    fast.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "</s>"], show_progress=False)
    )
    return HuggingFaceTokenizer("metaspace", json.loads(fast.to_str()))


def run_of(tokenizer: Tokenizer, **sample: Any) -> Run:
    shape = Model(n_layer=1, n_head=2, n_embd=16, block_size=32, vocab_size=tokenizer.vocab_size)
    model = build_model(shape, "cpu", init=3)
    with torch.no_grad():
        model.wte.weight.mul_(8)  # so that ids differ in probability
    settings = {"max_tokens": 16, "temperature": 1.0, "top_k": 0, **sample}
    recipe = build_recipe({"name": "x", "train": {"max_steps": 1}, "model": shape.model_dump(), "sample": settings})
    return Run(Path("run"), recipe, model, tokenizer, 1)


TOKENIZERS = {"byte": (ByteTokenizer(), 3.0), "char": (CharTokenizer("\nabc d", True), 1.0), "metaspace": (None, 1.5)}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_streamed_at_once_and_beside_others_it_is_one_text(name: str) -> None:
    found, temperature = TOKENIZERS[name]
    tokenizer = found or metaspace()
    prompt = "I will not speak" if name != "char" else "ab c"
    run = run_of(tokenizer, prompt=prompt, temperature=temperature)
    for seed in range(6):
        text = run.sample(seed=seed)[0]
        assert "".join(run.stream(seed=seed)) == text  # with what a last, incomplete character is shown as
        three = run.sample(samples=3, seed=seed)
        assert three[0] == text
        longer = prompt + prompt
        together = run.sample([prompt, longer, prompt[:1]], samples=3, seed=seed)
        assert together[:3] == three and together[3:6] == run.sample(longer, samples=3, seed=seed)
        assert run.sample([]) == []
        assert together[6:] == run.sample(prompt[:1], samples=3, seed=seed)
        assert sample_texts(run.model, tokenizer, run.recipe.sample.model_copy(update={"seed": seed})) == [text]
        assert text.startswith(prompt) and len(text) > len(prompt)


def test_the_space_after_a_prompt_is_kept() -> None:
    tokenizer = metaspace()
    whole = tokenizer.encode("I will not speak and the dog")
    cut = len(tokenizer.encode("I will not speak"))
    assert tokenizer.decode(whole[cut:]) == "and the dog"  # alone it is a text, without its space
    assert continued(tokenizer, "I will not speak", whole[cut:]) == "I will not speak and the dog"
    assert "".join(streamed(tokenizer, "I will not speak", whole[cut:])) == "I will not speak and the dog"
    assert continued(tokenizer, "", whole) == "I will not speak and the dog"


def test_generation_stops_at_end_of_text_when_asked() -> None:
    tokenizer = CharTokenizer("ab", True)
    run = run_of(tokenizer, prompt="a", max_tokens=60)
    with torch.no_grad():
        run.model.wte.weight.zero_()  # every id is as likely
    seen = []
    for seed in range(4):
        free, stopped = run.sample(samples=3, seed=seed), run.sample(samples=3, stop=True, seed=seed)
        assert stopped == [text.partition("<|endoftext|>")[0] for text in free]
        assert "".join(run.stream(stop=True, seed=seed)) == stopped[0]
        assert run.sample(["a", "ab"], stop=True, seed=seed) == [stopped[0], *run.sample("ab", stop=True, seed=seed)]
        drawn = list(run.ids("a", 1, stop=True, seed=seed))
        assert drawn[-1] == [tokenizer.eot] and [tokenizer.eot] not in drawn[:-1]
        seen.append(len(drawn))
    assert len(set(seen)) > 1 and max(seen) < 60
    for run in (run_of(CharTokenizer("ab", False), prompt="a"),):
        with pytest.raises(UserError, match="no end-of-text to stop at"):
            run.sample(stop=True)


@pytest.mark.parametrize("temperature", [1e-300, 1e-50, 1e-45, 1e-40, 1e-39, 1e-31, 1e-30, 1e-20, 1e-10])
def test_a_temperature_near_0_is_greedy(temperature: float) -> None:
    logits = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)) * 100
    draws = torch.rand(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.equal(pick_token(logits, temperature, 0, 1.0, draws), logits.argmax(1))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_draw_nothing(temperature: float, value: float) -> None:
    run = run_of(ByteTokenizer(), prompt="a", temperature=temperature)
    with torch.no_grad():
        run.model.ln_f.weight[2] = value
    with pytest.raises(NotFinite, match="logits are NaN or infinite"):
        run.sample()


def test_an_id_that_the_model_lacks_is_named() -> None:
    tokenizer = CharTokenizer("abc", True)
    run = run_of(tokenizer, prompt="ab")
    run.tokenizer = CharTokenizer("abcd", True)  # as of a folder whose embedding was not resized
    with pytest.raises(UserError, match="token id 4, and the model's vocabulary ends at 3"):
        run.sample(prompt="")
    assert run.sample(prompt="abc")[0].startswith("abc")
    texts = [("ab", "cd"), ("ab", "c")]
    pairs = encode_pairs(CharTokenizer("abcde", True), [*texts, ("ab", "e")], str)
    with pytest.raises(UserError, match="a text has token id 4, and the model's vocabulary ends at 3"):
        likelihoods(run.model, lay_out(pairs, 8), torch.device("cpu"), contextlib.nullcontext, 2)
