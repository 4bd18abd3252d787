"""Import and export: Hugging Face folders and nanoGPT checkpoints keep the logits; error messages."""

from __future__ import annotations

import io
import json
import math
import os
import re
import stat
import sys
import types
import zipfile
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptlab.config import Model
from gptlab.data.tokenizers import CharTokenizer, Tokenizer, load_tokenizer
from gptlab.errors import HubError, UserError
from gptlab.interop import files
from gptlab.interop.hf import export_hf, hf_config
from gptlab.interop.nanogpt import import_nanogpt
from gptlab.interop.source import read_source, source_tokenizer
from gptlab.model.gpt import GPT, build_model
from gptlab.training.importing import import_run
from gptlab.training.load import load_run

V = 80
CLASSIC = Model(n_layer=2, n_head=2, n_embd=32, block_size=24, vocab_size=V)
MODERN = CLASSIC.model_copy(update={"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "bias": False})


def make(config: Model, **changes: object) -> GPT:
    """A model with noise on every parameter, because norms of 1 and biases of 0 would hide errors."""
    model = build_model(config.model_copy(update=changes), init=3)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


TOKENS = torch.randint(V, (2, 24), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    result = model.eval()(TOKENS)
    return result if isinstance(result, Tensor) else result.logits


def same_logits(left: torch.nn.Module, right: torch.nn.Module) -> None:
    torch.testing.assert_close(logits(left).float(), logits(right).float(), atol=1e-5, rtol=0)


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps({key: value for key, value in settings.items() if value != "absent"}), encoding="utf-8")


def imported(source: str | Path) -> GPT:
    config, init = read_source(source)
    return build_model(config, init=init)


@pytest.fixture
def auto_model():
    """transformers' AutoModelForCausalLM."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM


SHAPES = {
    "classic": (CLASSIC, {}),
    "classic untied, no bias, gelu_erf": (CLASSIC, {"tied": False, "bias": False, "mlp": "gelu_erf"}),
    "classic relu2, width": (CLASSIC, {"mlp": "relu2", "mlp_width": 40, "norm_eps": 1e-3}),
    "modern": (MODERN, {}),
    "modern untied, bias": (MODERN, {"tied": False, "bias": True, "rope_theta": 500.0}),
    "modern width": (MODERN, {"mlp_width": 40, "norm_eps": 1e-3}),
}


# -- both ways with Hugging Face ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_export_loads_in_transformers_and_comes_back(shape, tmp_path, auto_model):
    config, changes = SHAPES[shape]
    ours = make(config, **changes)
    export_hf(ours, None, tmp_path / "out")
    theirs, info = auto_model.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert theirs.dtype == torch.float32
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (None, None)
    same_logits(ours, theirs)

    back = imported(tmp_path / "out")
    # GPT-2 always has biases: a model without biases comes back with zeros.
    assert back.config == (ours.config.model_copy(update={"bias": True}) if config is CLASSIC else ours.config)
    weights = back.state_dict()
    for name, weight in ours.state_dict().items():
        assert torch.equal(weights.pop(name), weight), name
    assert not any(extra.any() for extra in weights.values())

    theirs.save_pretrained(tmp_path / "theirs")  # the files that transformers writes
    same_logits(imported(tmp_path / "theirs"), ours)


@pytest.mark.parametrize("config", [CLASSIC, MODERN], ids=["classic", "modern"])
def test_bf16_is_kept_in_export_and_becomes_float32_in_import(config, tmp_path, auto_model):
    ours = make(config).to(torch.bfloat16)
    export_hf(ours, None, tmp_path / "out")
    assert {tensor.dtype for tensor in load_file(tmp_path / "out/model.safetensors").values()} == {torch.bfloat16}
    assert auto_model.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    back = imported(tmp_path / "out")
    assert back.wte.weight.dtype == torch.float32
    for left, right in zip(back.parameters(), ours.parameters(), strict=True):
        assert torch.equal(left, right.float())


def test_rope_theta_stands_where_transformers_4_and_5_look(tmp_path):
    export_hf(make(MODERN, rope_theta=500.0), None, tmp_path / "out")
    settings = json.loads((tmp_path / "out/config.json").read_text(encoding="utf-8"))
    assert settings["rope_theta"] == settings["rope_parameters"]["rope_theta"] == 500.0
    edit_config(tmp_path / "out", rope_parameters="absent")  # as transformers 4 writes it
    assert hf_config(tmp_path / "out").rope_theta == 500.0
    edit_config(tmp_path / "out", rope_theta="absent")
    assert hf_config(tmp_path / "out").rope_theta == 10000.0


def test_a_layout_of_gpt2s_first_upload(tmp_path):
    """No prefix, causal masks among the weights, a stored copy of the tied head, and missing settings."""
    ours = make(CLASSIC)
    export_hf(ours, None, tmp_path / "out")
    file = tmp_path / "out/model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    tensors |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 24, 24).tril() for layer in range(2)}
    tensors |= {"h.0.attn.masked_bias": torch.tensor(-1e4), "lm_head.weight": tensors["wte.weight"].clone()}
    save_file(tensors, file)
    edit_config(tmp_path / "out", n_inner=None, activation_function="absent", tie_word_embeddings="absent")
    back = imported(tmp_path / "out")
    assert back.config == CLASSIC
    same_logits(back, ours)


@pytest.mark.parametrize("kind", ["shards", "bin", "shards of bin"])
def test_other_files_of_weights(kind, tmp_path):
    ours = make(MODERN)
    folder = tmp_path / "out"
    export_hf(ours, None, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if kind == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
        same_logits(imported(folder), ours)
        return
    whole, save = ("model.safetensors", save_file) if kind == "shards" else ("pytorch_model.bin", torch.save)
    names = [whole.replace(".", f"-0000{i}-of-00002.") for i in (1, 2)]
    weight_map = {tensor: names[i % 2] for i, tensor in enumerate(tensors)}
    for name in names:
        save({tensor: tensors[tensor] for tensor in tensors if weight_map[tensor] == name}, folder / name)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / f"{whole}.index.json").write_text(index, encoding="utf-8")
    same_logits(imported(folder), ours)
    if kind != "shards":
        save({tensor: tensors[tensor] for tensor in list(tensors)[:2]}, folder / names[0])
        with pytest.raises(HubError, match=r"model-00002-of-00002\.bin: .* is also stored in another file"):
            read_source(folder)
    (folder / names[1]).unlink()
    with pytest.raises(HubError, match=r"model-00002-of-00002\.\w+ is missing"):
        read_source(folder)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 548105171\n"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json", "tokenizer.json", "ckpt.pt"])
@pytest.mark.parametrize(
    ("content", "sentence"), [(POINTER, "is a Git LFS pointer.*`git lfs pull`"), (b"", "is (damaged: it is )?empty")]
)
def test_pointers_and_empty_files_are_named(name, content, sentence, tmp_path):
    export_hf(make(CLASSIC), CharTokenizer("\n !abc", True), tmp_path / "out")
    file = tmp_path / "out" / name
    if name == "pytorch_model.bin":
        (tmp_path / "out" / "model.safetensors").unlink()
    if name == "ckpt.pt":
        (tmp_path / "out" / "config.json").unlink()
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"^{file} ({sentence})"):
        read_source(tmp_path / "out")
        source_tokenizer(tmp_path / "out")


@pytest.mark.parametrize("config", [CLASSIC, MODERN], ids=["classic", "modern"])
@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: name.replace(".0.", ".0._orig_mod."),
        lambda name: f"model.{name}",
        lambda name: f"_forward_module.net.gpt._orig_mod.{name}",
    ],
)
def test_names_within_wrappers(config, head, wrap, tmp_path):
    ours = make(config)
    export_hf(ours, None, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    if head:
        tensors["lm_head.weight"] = next(tensor for name, tensor in tensors.items() if "wte" in name or "embed" in name)
    file.unlink()
    state = {wrap(name): tensor for name, tensor in tensors.items()}
    torch.save({"state_dict": state, "epoch": 1}, tmp_path / "out" / "pytorch_model.bin")
    same_logits(imported(tmp_path / "out"), ours)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers_are_refused(value, tmp_path):
    ours = make(CLASSIC)
    with torch.no_grad():
        ours.h[1].mlp.c_fc.weight[3, 5] = value
    export_hf(ours, None, tmp_path / "out")
    with pytest.raises(HubError, match=r"transformer\.h\.1\.mlp\.c_fc\.weight holds NaN or infinity"):
        imported(tmp_path / "out")


def test_other_names_of_gpt2s_settings(tmp_path):
    export_hf(make(CLASSIC), None, tmp_path / "out")
    edit_config(tmp_path / "out", n_positions="absent", n_ctx=24)
    assert hf_config(tmp_path / "out").block_size == 24
    edit_config(tmp_path / "out", n_positions=24, n_ctx=12)
    assert hf_config(tmp_path / "out").block_size == 24
    others = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 24}
    edit_config(tmp_path / "out", **dict.fromkeys(("n_positions", "n_ctx", "n_embd", "n_layer", "n_head"), "absent"))
    edit_config(tmp_path / "out", **others)
    config = hf_config(tmp_path / "out")
    assert (config.n_embd, config.n_layer, config.n_head, config.block_size) == (32, 2, 2, 24)


def test_weights_travel_without_transformers(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # importing it fails
    export_hf(make(MODERN), None, tmp_path / "out")
    same_logits(imported(tmp_path / "out"), make(MODERN))


# -- what is refused ------------------------------------------------------------------------------------------------


def test_export_is_whole_or_not_there(tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(HubError, match="not empty"):
        export_hf(make(CLASSIC), None, tmp_path / "full")
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    os.umask(umask := os.umask(0))
    export_hf(make(CLASSIC), None, tmp_path / "empty")
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "empty").iterdir()}
    assert modes == {0o666 & ~umask}

    def full_disk(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(files, "write_safetensors", full_disk)
    with pytest.raises(OSError, match="No space"):
        export_hf(make(CLASSIC), None, tmp_path / "broken")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]


@pytest.mark.parametrize(
    ("config", "changes", "named"),
    [
        (CLASSIC, {"model_type": "gpt_neox"}, "model_type = gpt_neox"),
        (CLASSIC, {"model_type": "absent"}, "model_type = None"),
        (CLASSIC, {"activation_function": "gelu_fast"}, "activation_function = gelu_fast"),
        (CLASSIC, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        (CLASSIC, {"scale_attn_weights": False}, "scale_attn_weights = False"),
        (CLASSIC, {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        (CLASSIC, {"n_head": 5}, "model.n_embd = 32: must be divisible by model.n_head = 5"),
        (CLASSIC, {"n_layer": "two"}, "model.n_layer = two"),
        (MODERN, {"num_key_value_heads": 1}, "num_key_value_heads = 1"),
        (MODERN, {"head_dim": 32}, "head_dim = 32"),
        (MODERN, {"hidden_act": "gelu"}, "hidden_act = gelu"),
        (MODERN, {"attention_bias": True}, "mlp_bias = False"),
        (MODERN, {"sliding_window": 16}, "sliding_window = 16"),
        (MODERN, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type = linear"),
        (MODERN, {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_type = llama3"),
        (MODERN, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
    ],
)
def test_import_names_the_setting_it_cannot_represent(config, changes, named, tmp_path):
    export_hf(make(config), None, tmp_path / "out")
    edit_config(tmp_path / "out", **changes)
    with pytest.raises(HubError) as error:
        read_source(tmp_path / "out")
    assert named in str(error.value)


def test_every_stored_tensor_has_one_place(tmp_path):
    folder = tmp_path / "out"
    export_hf(make(CLASSIC), None, folder)
    good = load_file(folder / "model.safetensors")
    wte, fc = good["transformer.wte.weight"], "transformer.h.0.mlp.c_fc.weight"
    for changed, named in [
        ({name: tensor for name, tensor in good.items() if name != fc}, f"lacks {fc}"),
        (good | {"score.weight": torch.ones(2, 32)}, "has tensors that our model lacks: transformer.score.weight"),
        (good | {"lm_head.weight": wte + 1}, "lm_head.weight differs"),
        (good | {"_orig_mod.transformer.wte.weight": wte.clone()}, "wte.weight is stored twice"),
        (good | {fc: good[fc].t().contiguous()}, "has shape [128, 32], not [32, 128]"),
        (good | {fc: good[fc].to(torch.int8)}, "stored as torch.int8"),
    ]:
        save_file(changed, folder / "model.safetensors")
        with pytest.raises(HubError) as error:
            imported(folder)
        assert named in str(error.value)
    (folder / "model.safetensors").write_bytes(b"\x10" * 100)
    with pytest.raises(HubError, match="cannot be read"):
        imported(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(HubError, match="has no weights"):
        imported(folder)


def test_sources_that_are_nothing(tmp_path, monkeypatch):
    with pytest.raises(HubError, match=r"neither a Hugging Face model \(config.json\) nor nanoGPT's"):
        read_source(tmp_path)
    for path in (tmp_path / "absent", "./models/gpt2", "ckpt.pt"):
        with pytest.raises(HubError, match="no such file or folder"):
            read_source(path)

    def unreachable(*_: object, **__: object) -> str:
        raise ConnectionError("Name or service not known\nand a page of advice")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(HubError, match=r"Check the id, the network.*says: Name or service not known$"):
        read_source("somebody/something")


def test_an_id_is_downloaded_after_a_look_at_its_config(tmp_path, monkeypatch):
    ours = make(CLASSIC)
    export_hf(ours, None, tmp_path / "snapshot")
    asked = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    same_logits(imported("somebody/something"), ours)
    assert asked[0] == ("somebody/something", ["config.json"])
    assert not any("pytorch_model.bin" in patterns for _, patterns in asked)
    edit_config(tmp_path / "snapshot", model_type="mixtral")
    asked.clear()
    with pytest.raises(HubError, match="mixtral"):
        read_source("somebody/something")
    assert len(asked) == 1  # no weights were fetched


# -- tokenizers -----------------------------------------------------------------------------------------------------

TEXTS = ["Hello world", "  two  spaces\nand a line", "naïve café", "<|endoftext|>", "1234 abc!?"]


@pytest.fixture(params=["byte", "char", "gpt2"], scope="module")
def exported(request, tmp_path_factory) -> tuple[Tokenizer, Path]:
    """A gptlab tokenizer, and the folder of its export with a model."""
    if request.param == "char":
        ours: Tokenizer = CharTokenizer("".join(sorted({*"".join(TEXTS)})), end_of_text=True)
    else:
        ours = load_tokenizer({"kind": request.param})
    folder = tmp_path_factory.mktemp("hub") / request.param
    model = build_model(Model(n_layer=1, n_head=1, n_embd=8, block_size=64, vocab_size=ours.vocab_size))
    export_hf(model, ours, folder)
    return ours, folder


def test_tokenizer_goes_with_the_model(exported):
    transformers = pytest.importorskip("transformers")
    ours, folder = exported
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    back = source_tokenizer(folder)
    for text in TEXTS:
        ids = ours.encode(text)
        if "<|" not in text:  # transformers encodes the name of the special token as that token, gptlab as text
            assert theirs(text)["input_ids"] == ids
            assert theirs.decode(ids) == text
        assert back.encode(text) == ids
    assert theirs.eos_token_id == theirs.bos_token_id == ours.eot == back.eot
    assert theirs.model_max_length == 64
    for file in ("config.json", "generation_config.json"):
        settings = json.loads((folder / file).read_text(encoding="utf-8"))
        assert (settings["bos_token_id"], settings["eos_token_id"]) == (ours.eot, ours.eot)
    assert back.spec()["kind"] == ("gpt2" if ours.name == "gpt2" else "hf")
    assert back.identity() == ours.identity()


def test_a_tokenizer_with_more_ids_than_the_model_is_said(tmp_path, capsys):
    tokenizer = CharTokenizer("abcde", True)
    export_hf(make(CLASSIC, vocab_size=4), tokenizer, tmp_path / "out")
    import_run("hf", str(tmp_path / "out"), tmp_path / "run", {})
    said = "the tokenizer has ids up to 5 and the model's vocabulary ends at 3"
    assert capsys.readouterr().err == f"{tmp_path / 'out'}: {said}: text that needs the others is refused\n"
    run = load_run(tmp_path / "run")
    with pytest.raises(UserError, match="the prompt has token id 4, and the model's vocabulary ends at 3"):
        run.sample("abe", max_tokens=1)
    with pytest.raises(UserError, match="the prompt has token id 5"):
        run.sample("", max_tokens=1)  # end-of-text
    assert run.sample("abc", max_tokens=1)[0].startswith("abc")
    export_hf(make(CLASSIC, vocab_size=8), tokenizer, tmp_path / "padded")
    import_run("hf", str(tmp_path / "padded"), tmp_path / "again", {})
    assert not capsys.readouterr().err


def test_a_folder_without_tokenizer_files(tmp_path):
    export_hf(make(CLASSIC), None, tmp_path / "out")
    assert source_tokenizer(tmp_path / "out") is None
    edit_config(tmp_path / "out", vocab_size=50257)
    assert source_tokenizer(tmp_path / "out").spec() == {"kind": "gpt2"}
    (tmp_path / "out" / "spiece.model").touch()  # its ids are not GPT-2's
    assert source_tokenizer(tmp_path / "out") is None


# -- nanoGPT --------------------------------------------------------------------------------------------------------


def nanogpt_checkpoint(bias: bool, vocab_size: int = V) -> dict[str, object]:
    """A checkpoint in the format that nanoGPT's train.py saves after a compiled run."""
    C, T = 32, 24
    generator = torch.Generator().manual_seed(5)
    shapes = {"transformer.wte.weight": (vocab_size, C), "transformer.wpe.weight": (T, C)}
    for layer in range(2):
        h = f"transformer.h.{layer}"
        shapes |= {f"{h}.ln_1.weight": (C,), f"{h}.ln_2.weight": (C,), f"{h}.attn.c_attn.weight": (3 * C, C)}
        shapes |= {f"{h}.attn.c_proj.weight": (C, C), f"{h}.mlp.c_fc.weight": (4 * C, C)}
        shapes |= {f"{h}.mlp.c_proj.weight": (C, 4 * C)}
    shapes |= {"transformer.ln_f.weight": (C,)}
    if bias:
        shapes |= {
            name.replace("weight", "bias"): shape[:1]
            for name, shape in shapes.items()
            if ".h." in name or "ln_f" in name
        }
    state = {f"_orig_mod.{name}": torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
    state["_orig_mod.lm_head.weight"] = state["_orig_mod.transformer.wte.weight"]
    state["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, T, T).tril()  # without flash attention
    arguments = {"n_layer": 2, "n_head": 2, "n_embd": C, "block_size": T, "bias": bias, "vocab_size": vocab_size}
    return {
        "model": state,
        "optimizer": {
            "state": {0: {"step": torch.tensor(5.0), "exp_avg": torch.zeros(2)}},
            "param_groups": [{"lr": 1}],
        },
        "model_args": {**arguments, "dropout": 0.2},
        "iter_num": 5,
        "best_val_loss": torch.tensor(1.5),
        "config": {"out_dir": "out", "learning_rate": 6e-4, "compile": True, "wandb_log": False},
    }


def nanogpt_logits(state: dict[str, Tensor], tokens: Tensor, gelu: str = "none") -> Tensor:
    """nanoGPT's forward pass: pre-norm, GELU in its exact or its tanh form, learned positions, a head."""
    weights = {name.removeprefix("_orig_mod."): tensor for name, tensor in state.items()}

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return x * weights[f"{name}.weight"] + weights.get(f"{name}.bias", 0.0)

    T = tokens.shape[1]
    x = weights["transformer.wte.weight"][tokens] + weights["transformer.wpe.weight"][:T]
    for layer in range(2):
        h = f"transformer.h.{layer}"
        heads = []
        q, k, v = linear(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn").chunk(3, dim=-1)
        for part in (slice(0, 16), slice(16, 32)):  # two heads
            scores = q[..., part] @ k[..., part].mT / math.sqrt(16)
            scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
            heads.append(scores.softmax(-1) @ v[..., part])
        x = x + linear(torch.cat(heads, -1), f"{h}.attn.c_proj")
        hidden = linear(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc")
        inner = math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)
        hidden = hidden * 0.5 * (1 + (torch.tanh(inner) if gelu == "tanh" else torch.erf(hidden / math.sqrt(2))))
        x = x + linear(hidden, f"{h}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ weights["lm_head.weight"].t()


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_checkpoint(bias, tmp_path):
    checkpoint = nanogpt_checkpoint(bias)
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    ours = imported(tmp_path / "ckpt.pt")
    assert ours.config == CLASSIC.model_copy(update={"bias": bias, "mlp": "gelu_erf"})
    torch.testing.assert_close(logits(ours), nanogpt_logits(checkpoint["model"], TOKENS), atol=2e-5, rtol=1e-5)
    assert read_source(tmp_path)[0] == import_nanogpt(tmp_path)[0] == ours.config  # the output folder works too
    assert source_tokenizer(tmp_path) is None  # the checkpoint does not say which 80 characters


def test_nanogpt_tokenizer(tmp_path):
    torch.save(nanogpt_checkpoint(True, vocab_size=50304), tmp_path / "ckpt.pt")
    assert source_tokenizer(tmp_path / "ckpt.pt").spec() == {"kind": "gpt2"}


def test_nanogpt_of_2022(tmp_path):
    checkpoint = nanogpt_checkpoint(True)
    del checkpoint["model_args"]["bias"]
    head = checkpoint["model"]["_orig_mod.lm_head.weight"]
    checkpoint["model"]["_orig_mod.lm_head.weight"] = head.flip(0)  # it was not tied at first
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    ours = imported(tmp_path / "ckpt.pt")
    assert (ours.config.bias, ours.config.mlp, ours.config.tied) == (True, "gelu", False)
    torch.testing.assert_close(logits(ours), nanogpt_logits(checkpoint["model"], TOKENS, "tanh"), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("module", ["numpy._core.multiarray", "numpy.core.multiarray"])
def test_nanogpt_with_numpys_numbers(module, tmp_path):
    checkpoint = nanogpt_checkpoint(True)
    checkpoint["best_val_loss"] = np.float64(1.5)
    checkpoint["model_args"] |= {key: np.int64(checkpoint["model_args"][key]) for key in ("n_layer", "vocab_size")}
    torch.save(checkpoint, tmp_path / "new.pt")
    content = io.BytesIO()
    with zipfile.ZipFile(tmp_path / "new.pt") as old, zipfile.ZipFile(content, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("data.pkl"):
                assert b"cnumpy._core.multiarray\nscalar\n" in data or b"cnumpy.core.multiarray\nscalar\n" in data
                data = re.sub(rb"cnumpy\._?core\.multiarray\n", f"c{module}\n".encode(), data)
            new.writestr(name, data)
    (tmp_path / "ckpt.pt").write_bytes(content.getvalue())
    ours = imported(tmp_path / "ckpt.pt")
    assert ours.config == CLASSIC.model_copy(update={"mlp": "gelu_erf"})
    torch.testing.assert_close(logits(ours), nanogpt_logits(checkpoint["model"], TOKENS), atol=2e-5, rtol=1e-5)


@pytest.fixture
def foreign_class(monkeypatch):
    """The class of build-nanogpt's settings, in its script: to import the script or to make an object prints."""
    made: list[str] = []

    class GPTConfig:
        def __setstate__(self, state: object) -> None:
            made.append("this code ran")

    GPTConfig.__module__, GPTConfig.__qualname__ = "train_gpt2", "GPTConfig"
    module = types.ModuleType("train_gpt2")
    module.GPTConfig = GPTConfig
    monkeypatch.setitem(sys.modules, "train_gpt2", module)
    yield GPTConfig
    assert not made


@pytest.mark.parametrize("form", ["build-nanogpt", "Lightning", "Lightning with an object"])
def test_checkpoints_with_the_shape_elsewhere(form, foreign_class, tmp_path):
    checkpoint = nanogpt_checkpoint(True)
    state = {name.removeprefix("_orig_mod."): tensor for name, tensor in checkpoint["model"].items()}
    shape = {key: checkpoint["model_args"][key] for key in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")}
    config = foreign_class()
    config.__dict__.update(shape)
    trained = {"epoch": 1, "pytorch-lightning_version": "2.1.0", "loops": {}, "callbacks": {"at": Path("x.ckpt")}}
    lightning = {**trained, "state_dict": {f"model.{name}": tensor for name, tensor in state.items()}}
    content, form_of_gelu = {
        "build-nanogpt": ({"model": state, "config": config, "step": 5000, "val_loss": 3.1}, "tanh"),
        "Lightning": (lightning | {"hyper_parameters": {**shape, "bias": True, "lr": 1e-3}}, "none"),
        "Lightning with an object": (lightning | {"hyper_parameters": {"config": config, "lr": 1e-3}}, "tanh"),
    }[form]
    torch.save(content, tmp_path / "model_05000.pt")
    ours = imported(tmp_path / "model_05000.pt")
    torch.testing.assert_close(logits(ours), nanogpt_logits(state, TOKENS, form_of_gelu), atol=2e-5, rtol=1e-5)
    with pytest.raises(HubError, match=r"is a folder of checkpoints: name one of them, such as .*model_05000\.pt"):
        read_source(tmp_path)
    content = {key: value for key, value in content.items() if key not in ("config", "hyper_parameters")}
    torch.save(content, tmp_path / "model_05000.pt")
    with pytest.raises(HubError, match=r"does not say the shape of its model \(n_layer.*beside a config.json"):
        read_source(tmp_path / "model_05000.pt")


class Danger:
    def __reduce__(self):
        return (print, ("this code ran",))


def test_nanogpt_refusals(tmp_path, capsys):
    file = tmp_path / "ckpt.pt"
    good = nanogpt_checkpoint(True)
    arguments = {key: value for key, value in good["model_args"].items() if key != "n_head"}
    for content, named in [
        (good | {"config": {"made by": Danger()}}, "pickle of Python objects"),
        ({"weights": {}}, "not a nanoGPT checkpoint"),
        (good | {"model_args": arguments}, "lack n_head"),
        (good | {"model": {"a": 1}}, "does not hold a dictionary of tensors"),
    ]:
        torch.save(content, file)
        with pytest.raises(HubError) as error:
            import_nanogpt(file)
        assert named in str(error.value)
        assert "\n" not in str(error.value)
    file.write_bytes(b"not a checkpoint")
    with pytest.raises(HubError):
        import_nanogpt(file)
    assert capsys.readouterr().out == ""  # no pickled code was executed


def test_a_folder_called_as_a_hub_id_is_not_taken_for_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("gpt2").mkdir()
    Path("gpt2/train.py").touch()
    asked: list[str] = []

    def download(name: str, check: object) -> Path:
        asked.append(name)
        raise HubError("no network")

    monkeypatch.setattr("gptlab.interop.source.download", download)
    with pytest.raises(HubError, match="no network"):
        read_source("gpt2")
    assert asked == ["gpt2"]
    with pytest.raises(HubError, match="neither a Hugging Face model"):
        read_source("./gpt2")
