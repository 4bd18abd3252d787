"""The code that goes with an exported GPT: the same logits as ours, in generation and in training too."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gptlab.config import Model, Sample
from gptlab.data.tokenizers import load_tokenizer
from gptlab.interop.hf import REMOTE, export_hf, hf_model_type
from gptlab.interop.source import read_source, source_tokenizer
from gptlab.model import matmul
from gptlab.model.generate import generate
from gptlab.model.gpt import GPT, build_model

V = 80
DEMO = Model(
    n_layer=2, n_head=2, n_embd=32, block_size=24, vocab_size=V, position="rope", mlp="relu2", bias=False, qk_norm=True
)
SHAPES = {
    "demo": {},
    "untied": {"tied": False, "mlp": "gelu", "rope_theta": 500.0, "norm_eps": 1e-3},
    "biases": {"bias": True, "mlp": "gelu_erf", "qk_norm": False, "mlp_width": 40},
    "gated": {"mlp": "swiglu", "qk_norm": False, "mlp_width": 40},
    "learned": {"position": "learned", "norm": "rmsnorm", "tied": False},
    "learned, QK norm": {"position": "learned", "bias": True, "mlp": "gelu"},
    "biased Qwen3": {"norm": "rmsnorm", "mlp": "swiglu", "bias": True},
}
TOKENS = torch.randint(V, (3, 24), generator=torch.Generator().manual_seed(1))


def make(dtype: torch.dtype = torch.float32, **changes: object) -> GPT:
    """A model with noise on every parameter, because norms of 1 and biases of 0 would hide errors."""
    model = build_model(DEMO.model_copy(update=changes), dtype=dtype, init=3).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(dtype))
    return model


@pytest.fixture(autouse=True)
def same_products():
    """Bits are compared: gptlab takes the kernels that PyTorch takes by itself."""
    with matmul.mkl():
        yield


@pytest.fixture
def load(foreign_code):
    """Loads a folder in transformers with its code, which is copied into a cache of this test's own."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.disable_progress_bar()

    def loaded(folder: Path, **settings: object):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, output_loading_info=True, **settings
        )
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        return model

    return loaded


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_logits_are_equal_and_weights_come_back(shape, tmp_path, load):
    ours = make(**SHAPES[shape])
    assert export_hf(ours, None, tmp_path / "out") == "gptlab"
    theirs = load(tmp_path / "out")
    assert torch.equal(theirs(TOKENS).logits, ours(TOKENS))
    assert torch.equal(theirs(TOKENS, use_cache=False, logits_to_keep=2).logits, ours(TOKENS)[:, -2:])
    theirs.save_pretrained(tmp_path / "saved")  # with the code
    assert torch.equal(load(tmp_path / "saved")(TOKENS).logits, ours(TOKENS))
    for folder in ("out", "saved"):
        config, init = read_source(tmp_path / folder)
        assert config == ours.config
        back = build_model(config, init=init).state_dict()
        assert all(torch.equal(weight, back[name]) for name, weight in ours.state_dict().items())


def test_qwen3_is_llama_with_qk_norm(tmp_path, load):
    ours = make(norm="rmsnorm", mlp="swiglu", tied=False, norm_eps=1e-3)
    assert export_hf(ours, None, tmp_path / "out") == "qwen3"
    assert not list((tmp_path / "out").glob("*.py"))
    theirs = load(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(theirs(TOKENS).logits, ours(TOKENS), atol=1e-5, rtol=0)
    theirs.save_pretrained(tmp_path / "saved")
    for folder in ("out", "saved"):
        config, init = read_source(tmp_path / folder)
        assert config == ours.config
        assert torch.equal(build_model(config, init=init).h[1].attn.k_norm.weight, ours.h[1].attn.k_norm.weight)


@pytest.mark.parametrize("shape", ["demo", "learned"])
def test_generation_with_and_without_cache_alone_and_in_a_padded_batch(shape, tmp_path, load):
    ours = make(**SHAPES[shape])
    export_hf(ours, None, tmp_path / "out")
    theirs = load(tmp_path / "out")
    prompts, new = [TOKENS[0, :3], TOKENS[1, :9], TOKENS[2, :6]], 12
    settings = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    expected = [[int(ids) for ids in generate(ours, prompt[None], new, temperature=0)] for prompt in prompts]
    for prompt, ids in zip(prompts, expected, strict=True):
        for use_cache in (True, False):
            drawn = theirs.generate(prompt[None], use_cache=use_cache, **settings)
            assert drawn[0, len(prompt) :].tolist() == ids
    padded = torch.stack([torch.nn.functional.pad(prompt, (9 - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([torch.arange(9) >= 9 - len(prompt) for prompt in prompts]).long()
    for use_cache in (True, False):
        drawn = theirs.generate(padded, attention_mask=mask, use_cache=use_cache, **settings)
        assert drawn[:, 9:].tolist() == expected
    assert theirs.generate(padded[:1], attention_mask=mask[:1], num_beams=3, **settings).shape == (1, 21)
    with pytest.raises(ValueError, match="takes a DynamicCache"):
        theirs.generate(prompts[0][None], cache_implementation="static", **settings)
    with torch.no_grad():  # padding at the end, and a second piece of text after a cache
        right = theirs(padded.flip(1), attention_mask=mask.flip(1)).logits
        assert right.isfinite().all()
        first = theirs(TOKENS[:, :10])
        rest = theirs(TOKENS[:, 10:], past_key_values=first.past_key_values).logits
        torch.testing.assert_close(rest, ours(TOKENS)[:, 10:], atol=1e-5, rtol=0)
        alone = ours(prompts[0].flip(0)[None])[0]
        torch.testing.assert_close(right[0, :3], alone, atol=1e-5, rtol=0)


def test_a_text_longer_than_a_learned_context_is_refused_in_a_sentence(tmp_path, load):
    export_hf(make(**SHAPES["learned"]), None, tmp_path / "out")
    with pytest.raises(ValueError, match="longer than this model's context of 24 tokens"):
        load(tmp_path / "out")(torch.zeros(1, 25, dtype=torch.long))


def test_loss_of_training(tmp_path, load):
    ours = make()
    export_hf(ours, None, tmp_path / "out")
    theirs = load(tmp_path / "out").train()
    labels = TOKENS.clone()
    labels[0, 5:] = -100
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    total, n = ours(TOKENS, targets.where(targets >= 0, -1)), int((targets >= 0).sum())
    for settings in ({}, {"num_items_in_batch": torch.tensor(n)}):
        loss = theirs(TOKENS, labels=labels, **settings).loss
        torch.testing.assert_close(loss, total / n, atol=1e-5, rtol=0)
    loss.backward()
    assert all(parameter.grad is not None for parameter in theirs.parameters())


def test_bf16_is_kept_and_mixed_weights_take_the_widest(tmp_path, load):
    ours = make(torch.bfloat16)
    export_hf(ours, None, tmp_path / "out")
    theirs = load(tmp_path / "out", dtype="auto")
    assert {tensor.dtype for tensor in load_file(tmp_path / "out/model.safetensors").values()} == {torch.bfloat16}
    with torch.no_grad():
        assert torch.equal(theirs(TOKENS).logits, ours(TOKENS))
    ours.ln_f.float()
    export_hf(ours, None, tmp_path / "mixed")
    assert {tensor.dtype for tensor in load_file(tmp_path / "mixed/model.safetensors").values()} == {torch.float32}
    assert json.loads((tmp_path / "mixed/config.json").read_text(encoding="utf-8"))["dtype"] == "float32"


def test_the_settings_of_generation_are_the_recipes(tmp_path):
    tokenizer = load_tokenizer({"kind": "byte"})
    model = build_model(DEMO.model_copy(update={"vocab_size": 259}))
    drawn = {"do_sample": True, "temperature": 0.5, "top_k": 7, "top_p": 0.9}
    for name, sample, expected in (
        ("hot", Sample(temperature=0.5, top_k=7, top_p=0.9), drawn),
        ("cold", Sample(temperature=0, max_tokens=5), {"do_sample": False}),
    ):
        export_hf(model, tokenizer, tmp_path / name, sample)
        settings = json.loads((tmp_path / name / "generation_config.json").read_text(encoding="utf-8"))
        ids = {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256, "suppress_tokens": [257, 258]}
        assert settings == ids | expected | {"max_new_tokens": 5 if name == "cold" else 12}


def test_an_imported_folder_of_our_own_keeps_its_tokenizer_and_runs_no_code(tmp_path):
    tokenizer = load_tokenizer({"kind": "byte"})
    export_hf(build_model(DEMO.model_copy(update={"vocab_size": 257})), tokenizer, tmp_path / "out")
    for code in (tmp_path / "out").glob("*.py"):
        code.write_text("raise SystemExit", encoding="utf-8")
    assert read_source(tmp_path / "out")[0].qk_norm
    assert source_tokenizer(tmp_path / "out").encode("é") == [0xC3, 0xA9]


def test_the_code_stands_alone():
    files = sorted(REMOTE.glob("*_gptlab.py"))
    assert [file.name for file in files] == ["configuration_gptlab.py", "modeling_gptlab.py"]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module] if not node.level else []
                assert not node.level or (node.level == 1 and node.module == "configuration_gptlab")
            assert all(name.split(".")[0] in ("torch", "transformers", "typing", "__future__") for name in names)


def test_only_models_without_a_standard_form_need_code():
    standard = {
        "gpt2": {"position": "learned", "qk_norm": False, "mlp": "gelu"},
        "llama": {"norm": "rmsnorm", "mlp": "swiglu", "qk_norm": False},
        "qwen3": {"norm": "rmsnorm", "mlp": "swiglu"},
    }
    for model_type, changes in standard.items():
        assert hf_model_type(DEMO.model_copy(update=changes)) == model_type
