"""2:4 matrices: compression, export and import, and error messages."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from gptlab.config import Model
from gptlab.data.tokenizers import make_tokenizer
from gptlab.errors import UserError
from gptlab.interop import sparse24
from gptlab.interop.sparse24 import block_matrices, compress, decompress, export_sparse24, load_sparse24
from gptlab.model.generate import generate
from gptlab.model.gpt import GPT, build_model

CLASSIC = Model(n_layer=2, n_head=2, n_embd=32, block_size=24, vocab_size=80)
MODERN = CLASSIC.model_copy(update={"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "bias": False})
TOKENS = torch.randint(80, (2, 24), generator=torch.Generator().manual_seed(1))


def to_24(weight: Tensor) -> Tensor:
    """The weight with the two largest of each four, without code of the package."""
    fours = weight.reshape(weight.shape[0], -1, 4)
    smaller = (fours[..., :, None].abs() > fours[..., None, :].abs()).sum(-1)  # how many of its group a weight exceeds
    return torch.where(smaller >= 2, fours, 0.0).reshape(weight.shape)


def sparse_model(config: Model = CLASSIC, **changes: object) -> GPT:
    """A 2:4 model with every parameter off its initial value."""
    model = build_model(config.model_copy(update=changes), init=3).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            if name.startswith("h.") and parameter.dim() == 2:
                parameter.copy_(to_24(parameter))
    return model


# -- a matrix -------------------------------------------------------------------------------------------------------


def test_a_hand_computed_matrix() -> None:
    weight = torch.tensor(
        [
            [0, 5, 0, 6, 1, 2, 0, 0],  # places 1 3 and 0 1
            [0, 0, 7, 8, 0, 0, 0, 9],  # places 2 3; the single weight at 3 is stored with the first zero
        ],
        dtype=torch.bfloat16,
    )
    values, places = compress(weight)
    assert values.tolist() == [[5, 6, 1, 2], [7, 8, 0, 9]] and values.dtype is torch.bfloat16
    assert places.tolist() == [1 | 3 << 2 | 0 << 4 | 1 << 6, 2 | 3 << 2 | 0 << 4 | 3 << 6]
    assert torch.equal(decompress(values, places), weight)


@given(
    rows=st.integers(1, 5),
    fours=st.integers(1, 5),
    seed=st.integers(0, 2**32),
    holes=st.floats(0, 1),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
@settings(deadline=None)
def test_every_24_matrix_comes_back_and_takes_nine_bits_a_weight(
    rows: int, fours: int, seed: int, holes: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = to_24(torch.randn(rows, 4 * fours, generator=generator)).to(dtype)
    weight[torch.rand(weight.shape, generator=generator) < holes] = 0  # groups with one weight or none
    values, places = compress(weight)
    assert torch.equal(decompress(values, places), weight)
    assert values.numel() == weight.numel() // 2 and places.nbytes == math.ceil(values.numel() * 2 / 8)


def test_a_matrix_that_is_not_24_cannot_be_compressed() -> None:
    with pytest.raises(AssertionError):
        compress(torch.tensor([[1.0, 2.0, 3.0, 0.0]]))


# -- a model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [CLASSIC, MODERN, CLASSIC.model_copy(update={"tied": False})])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_comes_back_with_its_weights_rounded_and_its_tokenizer(
    config: Model, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, tokenizer = sparse_model(config), make_tokenizer("char", lambda: iter(["abc"]))
    export_sparse24(model, tokenizer, tmp_path / "out", dtype)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    loaded, found = load_sparse24(tmp_path / "out", semi_structured=False)
    assert found is not None and found.decode(found.encode("cab")) == "cab"
    assert loaded.config == model.config and not loaded.training
    theirs = dict(loaded.named_parameters())
    assert theirs.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(theirs[name], parameter.to(dtype)), name
        assert not theirs[name].requires_grad
    rope = (model.rope_cos, model.rope_sin) if config.position == "rope" else None
    rounded = model.to(dtype)
    if rope:
        rounded.rope_cos, rounded.rope_sin = rope  # the tables stay float32
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS), rounded(TOKENS))


def test_the_file_has_nine_sixteenths_of_the_blocks_matrices(tmp_path: Path) -> None:
    model = sparse_model(n_embd=64, n_head=4)
    export_sparse24(model, None, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    inside = sum(12 * 64 * 64 for _ in range(2))  # 3 C^2 + C^2 + 4 C^2 + 4 C^2 per block
    outside = sum(p.numel() for p in model.parameters()) - inside
    assert sum(t.nbytes for t in stored.values()) == inside * 9 / 8 + outside * 2
    assert not (tmp_path / "out" / "tokenizer.json").exists() and load_sparse24(tmp_path / "out", semi_structured=False)


def test_every_matrix_of_the_blocks_and_no_other_is_compressed() -> None:
    assert list(block_matrices(sparse_model(MODERN, n_layer=1))) == [
        f"h.0.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_gate", "mlp.c_proj")
    ]


def test_without_a_gpu_it_is_dense_and_says_so(tmp_path: Path) -> None:
    export_sparse24(sparse_model(), None, tmp_path / "out")
    with pytest.warns(
        UserWarning, match=r"dense matrices, without a gain in speed: .* capability 8.0 or more, not device"
    ):
        model, tokenizer = load_sparse24(tmp_path / "out")
    assert tokenizer is None and model.h[0].attn.c_attn.weight.shape == (96, 32)
    with pytest.raises(UserError, match="Use semi_structured = False for dense"):
        load_sparse24(tmp_path / "out", semi_structured=True)


def test_on_a_gpu_all_matrices_are_converted_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sparse_model(n_embd=64)
    before = {name: layer.weight for name, layer in block_matrices(model).items()}
    monkeypatch.setattr(GPT, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def refuse(dense: Tensor) -> Tensor:
        if dense.shape[0] == 256:
            raise RuntimeError("architecture mismatch\nand more")
        return dense.clone()

    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", refuse)
    assert sparse24.to_semi_structured(model) == "PyTorch says: architecture mismatch"
    assert all(layer.weight is before[name] for name, layer in block_matrices(model).items())
    assert "96 x 32 is not a multiple of 32 x 64" in sparse24.to_semi_structured(sparse_model())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert "not Tesla T4" in sparse24.to_semi_structured(model)


class Emulated(SparseSemiStructuredTensorCUTLASS):
    """PyTorch's semi-structured tensor, with a dense product, as there is no GPU."""

    def _mm(self, B: Tensor, *, bias: Tensor | None = None, **how: object) -> Tensor:
        B = B.t() if how.get("should_transpose_dense") else B
        y = sparse_semi_structured_to_dense_cutlass(self.packed, self.meta) @ B  # (rows, n)
        y = y if bias is None else y + bias[:, None]
        return y.t() if how.get("should_transpose_dense") else y

    @classmethod
    def make(cls, dense: Tensor) -> Tensor:
        packed, meta = sparse_semi_structured_from_dense_cutlass(dense)
        return cls(dense.shape, packed, meta, None, None, None)


@pytest.mark.parametrize("config", [CLASSIC, MODERN])
@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
def test_a_model_reads_and_writes_with_semi_structured_matrices(
    config: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_sparse24(sparse_model(config, n_embd=64, mlp_width=128), None, tmp_path / "out", torch.float16)
    dense, _ = load_sparse24(tmp_path / "out", semi_structured=False)
    with monkeypatch.context() as gpu:
        gpu.setattr(GPT, "device", torch.device("cuda"))
        gpu.setattr(torch.version, "cuda", "13.0")
        gpu.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        gpu.setattr(torch.sparse, "to_sparse_semi_structured", Emulated.make)
        sparse, _ = load_sparse24(tmp_path / "out", semi_structured=True)
    assert all(isinstance(layer.weight, Emulated) for layer in block_matrices(sparse).values())
    with torch.no_grad():
        torch.testing.assert_close(sparse(TOKENS), dense(TOKENS), atol=0.01, rtol=0.01)
    drawn = [
        torch.stack(list(generate(model, TOKENS[:, :8], max_tokens=6, temperature=1.0, top_k=1, top_p=1.0, seed=0)))
        for model in (sparse, dense)
    ]
    assert torch.equal(*drawn)


# -- refusals -------------------------------------------------------------------------------------------------------


def test_what_is_not_24_is_refused_by_name(tmp_path: Path) -> None:
    model = sparse_model()
    with torch.no_grad():
        model.h[1].mlp.c_fc.weight[3, 4:8] = 1.0
    with pytest.raises(UserError, match=r"h\.1\.mlp\.c_fc\.weight: is not 2:4: 1 of its 1,024 .*sparsity\.method 2:4"):
        export_sparse24(model, None, tmp_path / "out")
    odd = build_model(CLASSIC.model_copy(update={"mlp_width": 30}))
    with torch.no_grad():
        for layer in block_matrices(odd).values():
            layer.weight.zero_()
    with pytest.raises(UserError, match="30 columns are not a multiple of four"):
        export_sparse24(odd, None, tmp_path / "out")
    model = sparse_model()
    with torch.no_grad():
        model.wte.weight[0, 0] = 1e5
    with pytest.raises(UserError, match=r"wte\.weight: .*not finite in float16"):
        export_sparse24(model, None, tmp_path / "out", torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_an_export_overwrites_nothing_and_appears_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="not empty"):
        export_sparse24(sparse_model(), None, tmp_path / "full")
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    export_sparse24(sparse_model(), None, tmp_path / "empty")
    monkeypatch.setattr(
        sparse24.files, "write_safetensors", lambda *_, **__: (_ for _ in ()).throw(OSError("the disk is full"))
    )
    with pytest.raises(OSError, match="the disk is full"):
        export_sparse24(sparse_model(), None, tmp_path / "half")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["empty", "full"]


def test_a_damaged_folder_is_refused(tmp_path: Path) -> None:
    folder, name = tmp_path / "out", "h.0.mlp.c_fc.weight"
    with pytest.raises(UserError, match="config.json is missing"):
        load_sparse24(tmp_path)
    export_sparse24(sparse_model(), None, folder)
    config, file = (folder / "config.json").read_text(encoding="utf-8"), folder / "model.safetensors"
    whole = load_file(file)

    def refused(changed: dict[str, Tensor | None], match: str) -> None:
        save_file({key: value for key, value in (whole | changed).items() if value is not None}, file)
        with pytest.raises(UserError, match=match):
            load_sparse24(folder, semi_structured=False)

    refused({f"{name}.places": None}, rf"lacks {name}\.places")
    refused({"wxe.weight": torch.zeros(1)}, r"has tensors that our model lacks: wxe\.weight")
    refused(
        {f"{name}.places": torch.zeros_like(whole[f"{name}.places"])}, f"{name} is damaged: two values have the same"
    )
    refused({f"{name}.places": whole[f"{name}.places"][1:]}, f"{name} is damaged: values .* are not a 2:4 matrix")
    short = {f"{name}.values": whole[f"{name}.values"][1:].contiguous(), f"{name}.places": None}
    short[f"{name}.places"] = whole[f"{name}.places"][: short[f"{name}.values"].numel() // 4]  # type: ignore[union-attr]
    refused(short, rf"{name} has shape \[127, 32\], not \[128, 32\]")
    file.write_bytes(b"no tensors")
    with pytest.raises(UserError, match="cannot be read"):
        load_sparse24(folder)
    for key, value in (("format", "other"), ("version", 2)):
        (folder / "config.json").write_text(json.dumps(json.loads(config) | {key: value}), encoding="utf-8")
        with pytest.raises(UserError, match="the format is not gptlab-sparse24, version 1"):
            load_sparse24(folder)
    for text in ("[]", "{", config.replace("bfloat16", "int4"), config.replace('"n_head": 2', '"n_head": 3')):
        (folder / "config.json").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match="config.json is damaged"):
            load_sparse24(folder)
