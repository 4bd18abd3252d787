"""Export to GGUF: the tensors and the tokenizer, read back, give our logits and our ids."""

from __future__ import annotations

import builtins
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptlab.config import Model
from gptlab.data.tokenizers import CharTokenizer, HuggingFaceTokenizer, Tokenizer, load_tokenizer, make_tokenizer
from gptlab.errors import HubError
from gptlab.interop.gguf import export_gguf
from gptlab.model.gpt import GPT, build_model

TEXT = "the cat sat on the mat, it's 1234 mats\n\n  two  spaces naïve café 日本"
CLASSIC = Model(n_layer=2, n_head=2, n_embd=32, block_size=24, vocab_size=280)
MODERN = CLASSIC.model_copy(update={"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "bias": False})
SHAPES = {
    "gpt2": (CLASSIC, {}),
    "gpt2 untied, no biases": (CLASSIC, {"tied": False, "bias": False, "mlp_width": 40, "norm_eps": 1e-3}),
    "llama": (MODERN, {"mlp_width": 40}),
    "llama untied, biases": (MODERN, {"tied": False, "bias": True, "rope_theta": 500.0, "norm_eps": 1e-3}),
    "qwen3": (MODERN, {"qk_norm": True, "n_head": 4}),
    "completep": (MODERN, {"parametrization": "completep", "base_width": 8, "base_depth": 1}),
}
TOKENS = torch.randint(280, (2, 24), generator=torch.Generator().manual_seed(1))


def make(config: Model, dtype: torch.dtype = torch.float32, **changes: object) -> GPT:
    """A model with noise on every parameter, because norms of 1 and biases of 0 would hide errors."""
    model = build_model(config.model_copy(update=changes), dtype=dtype, init=3).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(dtype))
    return model


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return make_tokenizer("bpe-270", lambda: iter([TEXT]))


class Read:
    """A GGUF file: metadata, and tensors as float32."""

    def __init__(self, file: Path) -> None:
        gguf = pytest.importorskip("gguf")
        reader = gguf.GGUFReader(file)
        self.facts: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        self.types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        self.tensors = {
            tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
            for tensor in reader.tensors
        }

    def fact(self, name: str) -> Any:
        return self.facts[f"{self.facts['general.architecture']}.{name}"]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias", 0.0)
        if self.facts["general.architecture"] == "gpt2":
            x = x - x.mean(-1, keepdim=True)
            return (
                x / (x.square().mean(-1, keepdim=True) + self.fact("attention.layer_norm_epsilon")).sqrt() * weight
                + bias
            )
        return x / (x.square().mean(-1, keepdim=True) + self.fact("attention.layer_norm_rms_epsilon")).sqrt() * weight

    def rotate(self, x: Tensor) -> Tensor:
        """Llama's pairs are neighbours, Qwen3's are half a head apart; x is (B, H, T, D)."""
        n, T = self.fact("rope.dimension_count"), x.shape[2]
        angles = torch.arange(T)[:, None] / self.fact("rope.freq_base") ** (torch.arange(0, n, 2) / n)
        turn = torch.polar(torch.ones_like(angles), angles)  # (T, D / 2)
        if self.facts["general.architecture"] == "llama":
            return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)
        turned = torch.complex(*x.chunk(2, -1)) * turn
        return torch.cat((turned.real, turned.imag), -1)

    def logits(self, tokens: Tensor) -> Tensor:
        """The forward pass of llama.cpp, from what the file says alone."""
        t, H, T = self.tensors, self.fact("attention.head_count"), tokens.shape[1]
        x = t["token_embd.weight"][tokens]
        if "position_embd.weight" in t:
            x = x + t["position_embd.weight"][:T]
        for layer in range(self.fact("block_count")):
            name = f"blk.{layer}"
            h = self.norm(x, f"{name}.attn_norm")
            if f"{name}.attn_qkv.weight" in t:
                parts = self.linear(h, f"{name}.attn_qkv").chunk(3, -1)
            else:
                parts = tuple(self.linear(h, f"{name}.attn_{part}") for part in "qkv")
            q, k, v = (part.unflatten(-1, (H, -1)).transpose(1, 2) for part in parts)
            if f"{name}.attn_q_norm.weight" in t:
                q, k = self.norm(q, f"{name}.attn_q_norm"), self.norm(k, f"{name}.attn_k_norm")
            if "position_embd.weight" not in t:
                q, k = self.rotate(q), self.rotate(k)
            scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
            x = x + self.linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), f"{name}.attn_output")
            h = self.norm(x, f"{name}.ffn_norm")
            up = self.linear(h, f"{name}.ffn_up")
            if f"{name}.ffn_gate.weight" in t:
                up = F.silu(self.linear(h, f"{name}.ffn_gate")) * up
            else:
                up = 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
            x = x + self.linear(up, f"{name}.ffn_down")
        return self.norm(x, "output_norm") @ t.get("output.weight", t["token_embd.weight"]).T

    def ids(self, text: str) -> list[int]:
        """GPT-2's byte-level BPE from the tokens and merges of the file: the pair of lowest rank first."""
        import regex

        pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
        tokens = {token: index for index, token in enumerate(self.facts["tokenizer.ggml.tokens"])}
        ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(self.facts["tokenizer.ggml.merges"])}
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = iter(range(256, 512))
        shown = [chr(byte if byte in printable else next(others)) for byte in range(256)]
        found = []
        for word in regex.findall(pattern, text):
            parts = [shown[byte] for byte in word.encode()]
            while len(parts) > 1:
                pairs = [ranks.get(pair, math.inf) for pair in itertools.pairwise(parts)]
                if min(pairs) == math.inf:
                    break
                first = pairs.index(min(pairs))
                parts[first : first + 2] = [parts[first] + parts[first + 1]]
            found += [tokens[part] for part in parts]
        return found


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_from_the_file(shape: str, tmp_path: Path, bpe: Tokenizer) -> None:
    config, changes = SHAPES[shape]
    ours = make(config, **changes)
    export_gguf(ours, bpe, tmp_path / "model.gguf", "a model", "mit")
    read = Read(tmp_path / "model.gguf")
    with torch.no_grad():
        torch.testing.assert_close(read.logits(TOKENS), ours(TOKENS), atol=2e-5, rtol=0)
    assert (read.facts["general.name"], read.facts["general.license"]) == ("a model", "mit")
    assert (read.fact("context_length"), read.fact("embedding_length")) == (24, 32)
    assert read.fact("feed_forward_length") == ours.config.mlp_hidden
    assert set(read.types.values()) == {"F32"}
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    with pytest.raises(HubError, match=r"model\.gguf exists"):
        export_gguf(ours, bpe, tmp_path / "model.gguf", "a model")


@pytest.mark.parametrize(("dtype", "stored"), [(torch.bfloat16, "BF16"), (torch.float16, "F16")])
def test_matrices_keep_sixteen_bits_and_vectors_are_float32(
    dtype: torch.dtype, stored: str, tmp_path: Path, bpe: Tokenizer
) -> None:
    ours = make(CLASSIC, dtype)
    export_gguf(ours, bpe, tmp_path / "model.gguf", "a model")
    read = Read(tmp_path / "model.gguf")
    assert read.types["blk.0.ffn_up.weight"] == read.types["token_embd.weight"] == stored
    assert read.types["blk.0.ffn_up.bias"] == read.types["position_embd.weight"] == "F32"
    assert torch.equal(read.tensors["blk.1.ffn_up.weight"], ours.h[1].mlp.c_fc.weight.float())
    assert torch.equal(read.tensors["position_embd.weight"], ours.wpe.weight.float())


@pytest.mark.parametrize("kind", ["byte", "bpe", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_ids_from_the_file(kind: str, tmp_path: Path, bpe: Tokenizer) -> None:
    ours = bpe if kind == "bpe" else load_tokenizer({"kind": kind})
    model = build_model(Model(n_layer=1, n_head=1, n_embd=4, block_size=8, vocab_size=ours.vocab_size + 3))
    export_gguf(model, ours, tmp_path / "model.gguf", "a model")
    read = Read(tmp_path / "model.gguf")
    assert read.ids(TEXT) == ours.encode(TEXT)
    tokens, types = read.facts["tokenizer.ggml.tokens"], read.facts["tokenizer.ggml.token_type"]
    assert tokens[ours.eot] == "<|endoftext|>" and types[ours.eot] == 3
    assert len(tokens) == len(types) == ours.vocab_size + 3 and types[-3:] == [5, 5, 5]
    assert read.facts["tokenizer.ggml.eos_token_id"] == ours.eot and not read.facts["tokenizer.ggml.add_bos_token"]


def test_models_and_tokenizers_without_a_form_are_named(
    tmp_path: Path, bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(model: GPT, tokenizer: Tokenizer) -> str:
        with pytest.raises(HubError) as error:
            export_gguf(model, tokenizer, tmp_path / "model.gguf", "a model")
        assert not list(tmp_path.iterdir())
        return str(error.value)

    assert "mlp = relu2" in refused(make(CLASSIC, mlp="relu2"), bpe)
    assert "mlp = gelu_erf" in refused(make(CLASSIC, mlp="gelu_erf"), bpe)
    assert "qk_norm = true" in refused(make(MODERN, qk_norm=True, bias=True), bpe)
    assert "position = rope, norm = layernorm" in refused(make(MODERN, norm="layernorm"), bpe)
    assert "char cannot be exported to GGUF: llama.cpp has byte-level BPE" in refused(
        make(CLASSIC), CharTokenizer("ab", end_of_text=True)
    )
    described = bpe.hf_json()
    for changes in (
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}},
        {"model": described["model"] | {"ignore_merges": True}},
    ):
        assert "no exact form" in refused(make(CLASSIC), HuggingFaceTokenizer("other", described | changes))
    vocabulary = {token: index for token, index in described["model"]["vocab"].items() if index != bpe.eot}
    nothing = described | {"added_tokens": [], "model": described["model"] | {"vocab": vocabulary}}
    assert "no end-of-text" in refused(make(CLASSIC), HuggingFaceTokenizer("other", nothing))
    assert "has 270 ids, and the model 260" in refused(make(CLASSIC, vocab_size=260), bpe)

    def without(name: str, *rest: Any) -> Any:
        if name == "gguf":
            raise ImportError
        return found(name, *rest)

    found = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without)
    assert refused(make(CLASSIC), bpe) == "--to gguf needs the package gguf: pip install 'gptlab[gguf]'"
