"""muP and CompleteP: at the base the standard model, updates of one size at every width, and exports that are plain."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_recipe
from torch import Tensor

from gptlab import cli
from gptlab.bench import coords
from gptlab.bench.coords import bench_coords, render
from gptlab.config import OPTIMIZER_NAMES, Model, Optim, build_recipe
from gptlab.config.recipe import TRANSFERRING
from gptlab.errors import ConfigError, RunError
from gptlab.interop.hf import export_hf, import_hf
from gptlab.interop.sparse24 import export_sparse24, load_sparse24
from gptlab.model.generate import generate
from gptlab.model.gpt import GPT, build_model
from gptlab.model.parametrization import folded, plain
from gptlab.optim.optimizers import make_optimizer, set_lr
from gptlab.training.loop import train

BASE: dict[str, Any] = {"base_width": 32, "base_depth": 2, "base_head_size": 16}
CLASSIC = Model(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=40, **BASE)
MODERN = CLASSIC.model_copy(update={"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "bias": False})
# twice as wide in two heads, three times as deep
LARGE: dict[str, Any] = {"n_embd": 64, "n_layer": 6, "parametrization": "completep"}
TOKENS = torch.randint(40, (2, 17), generator=torch.Generator().manual_seed(0))


def some(names: Iterable[str], *quick: str) -> list[Any]:
    """All names as parameters, those that are not quick marked as slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def with_noise(config: Model, dtype: torch.dtype = torch.float32, **changes: Any) -> GPT:
    """A model with noise on every parameter, because norms of 1 and biases of 0 would hide errors."""
    model = build_model(config.model_copy(update={**LARGE, **changes}), dtype=dtype, init=3).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=dtype))
    return model


# -- at the base


def losses(config: Model, optim: Optim, steps: int = 4) -> list[float]:
    model = build_model(config, init=1)
    optimizer, found = make_optimizer(model, optim, seed=2, shape=config), []
    for step in range(steps):
        set_lr(optimizer, optim.lr * (step + 1) / steps)
        loss = model(TOKENS[:, :-1], TOKENS[:, 1:])
        (loss / TOKENS[:, 1:].numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("name", some(TRANSFERRING, "adamw", "muon", "adamw-schedule-free"))
@pytest.mark.parametrize("config", [CLASSIC, pytest.param(MODERN, marks=pytest.mark.slow)], ids=["classic", "modern"])
def test_at_the_base_losses_are_the_standard_ones_bit_for_bit(config: Model, name: str) -> None:
    optim = Optim(name=name, lr=3e-3)
    standard = losses(config, optim)
    assert standard[-1] < standard[0]
    for parametrization in ("mup", "completep"):
        assert losses(config.model_copy(update={"parametrization": parametrization}), optim) == standard
        wider = config.model_copy(update={"parametrization": parametrization, "n_embd": 64})
        assert losses(wider, optim) != losses(plain(wider), optim)


def test_below_the_base_depth_mup_is_not_completep() -> None:
    deep, optim = CLASSIC.model_copy(update={"n_layer": 4}), Optim()
    of = {p: losses(deep.model_copy(update={"parametrization": p}), optim) for p in ("standard", "mup", "completep")}
    assert of["standard"] == of["mup"] != of["completep"]


# -- the rules


def test_initial_scales() -> None:
    """At four times the width and the depth: hidden matrices by 4^-0.5, all others as they were."""
    changes = {"n_embd": 128, "n_head": 8, "n_layer": 8}
    expected = {"wte": 0.02, "wpe": 0.02, "lm_head": 0.02, "c_attn": 0.01, "c_fc": 0.01}
    for parametrization, residual in (("mup", 0.01 / 16**0.5), ("completep", 0.01 / 4**0.5)):
        model = build_model(CLASSIC.model_copy(update={**changes, "tied": False, "parametrization": parametrization}))
        for name, p in model.named_parameters():
            if p.dim() == 2:
                std = {**expected, "c_proj": residual}[name.split(".")[-2]]
                assert p.std().item() == pytest.approx(std, rel=0.05), name


def gradient(p: Tensor, step: int, i: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + i)
    return torch.randn(p.shape, generator=generator, dtype=p.dtype) * 1e-3


def trained(config: Model, optim: Optim, only: str = "", steps: int = 12) -> dict[str, Tensor]:
    """The weights after some steps with gradients that are given; `only`: the parameters that are trained."""
    model = build_model(config, dtype=torch.float64, init=1)
    optimizer = make_optimizer(model, optim, shape=config)
    for step in range(steps):
        for i, (name, p) in enumerate(model.named_parameters()):
            p.grad = gradient(p, step, i) if only in name else None
        set_lr(optimizer, optim.lr / (1 + step))
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters() if only in name}


@pytest.mark.parametrize("name", some([name for name in TRANSFERRING if "muon" not in name], "adamw-schedule-free"))
def test_multipliers_are_those_of_a_run_of_its_own(name: str) -> None:
    """Of a model twice as wide and three times as deep: each role against a standard run with other settings."""
    optim = Optim(name=name, lr=1e-2, eps=1e-3, weight_decay=0.3)
    config = CLASSIC.model_copy(update={**LARGE, "tied": False})
    ours = trained(config, optim)
    start = dict(build_model(config, dtype=torch.float64, init=1).named_parameters())
    roles = {  # lr, weight decay, eps
        "lm_head.weight": (1.0, 1.0, 1 / 2),
        "wte.weight": (1.0, 1.0, 1 / 2),
        "ln_f.weight": (1.0, 1.0, 1 / 2),
        "h.4.ln_1.weight": (1.0, 1.0, 1 / 6),
        "h.4.mlp.c_fc.bias": (1.0, 1.0, 1 / 6),
        "h.4.attn.c_attn.weight": (1 / 2, 2.0, 1 / 6),
        "h.4.mlp.c_proj.weight": (1 / 2, 2.0, 1 / 6),
    }
    for role, (lr, decay, eps) in roles.items():
        changed = optim.model_copy(
            update={"lr": optim.lr * lr, "weight_decay": optim.weight_decay * decay, "eps": optim.eps * eps}
        )
        like = build_model(plain(config), dtype=torch.float64, init=lambda model: copy_into(model, start))
        alone = make_optimizer(like, changed)
        for step in range(12):
            for i, (parameter, p) in enumerate(like.named_parameters()):
                p.grad = gradient(p, step, i) if parameter == role else None
            set_lr(alone, changed.lr / (1 + step))
            alone.step()
        torch.testing.assert_close(dict(like.named_parameters())[role].detach(), ours[role], rtol=1e-9, atol=1e-12)


def copy_into(model: GPT, weights: dict[str, Tensor]) -> None:
    for name, p in model.named_parameters():
        p.copy_(weights[name])


@pytest.mark.parametrize("name", ["muon", "normuon", "soap-muon"])
def test_muons_matrices_have_the_update_of_every_width(name: str) -> None:
    """The spectral norm of the change in a step is that at the base: lr (rows / cols)^0.5 where there are more rows."""
    optim = Optim(name=name, muon_lr=0.03, weight_decay=0.0)
    for wide in (32, 128):
        config = CLASSIC.model_copy(update={"n_embd": wide, "n_head": wide // 16, "parametrization": "mup"})
        start = dict(build_model(config, dtype=torch.float64, init=1).named_parameters())
        for role, factor in {"h.1.attn.c_proj.weight": 1.0, "h.1.mlp.c_fc.weight": 2.0}.items():
            change = trained(config, optim, only=role, steps=1)[role] - start[role].detach()
            assert torch.linalg.matrix_norm(change, 2).item() == pytest.approx(0.03 * factor, rel=0.3)
    slow = optim.model_copy(update={"lr": 1e-4})  # of AdamW
    wide = CLASSIC.model_copy(update={"n_embd": 64, "parametrization": "mup"})
    embedding = trained(wide, slow, "wte", steps=1)["wte.weight"]
    start = dict(build_model(wide, dtype=torch.float64, init=1).named_parameters())
    assert (embedding - start["wte.weight"].detach()).abs().max().item() == pytest.approx(1e-4, rel=1e-3)


def test_attention_is_scaled_by_one_over_the_head_size() -> None:
    model = build_model(CLASSIC.model_copy(update={"n_embd": 128, "n_layer": 1, "parametrization": "mup"}), init=1)
    block = model.h[0].attn
    x = torch.randn(1, 5, 128, generator=torch.Generator().manual_seed(1))
    q, k, v = (part.view(5, 2, 64).transpose(0, 1) for part in block.c_attn(x)[0].split(128, dim=1))
    scores = q @ k.mT * (16**0.5 / 64)  # (H, T, T); 16^-0.5 at head size 16
    scores = scores.masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -math.inf)
    expected = block.c_proj((scores.softmax(-1) @ v).transpose(0, 1).reshape(5, 128))
    torch.testing.assert_close(block(x, None, None, None)[0], expected, rtol=1e-4, atol=1e-6)


# -- exports

FORMS = {
    "classic": CLASSIC,
    "classic untied": CLASSIC.model_copy(update={"tied": False}),
    "no biases": CLASSIC.model_copy(update={"bias": False}),
    "llama": MODERN,
    "llama with biases": MODERN.model_copy(update={"bias": True, "tied": False}),
    "qwen3": MODERN.model_copy(update={"qk_norm": True}),
    "own": CLASSIC.model_copy(update={"qk_norm": True, "mlp": "relu2"}),
}


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_folded_weights_are_those_of_a_standard_model(form: str) -> None:
    ours = with_noise(FORMS[form], torch.float64)
    weights = {name: folded(ours.config, name, p) for name, p in ours.named_parameters()}
    standard = build_model(plain(ours.config), dtype=torch.float64, init=lambda model: copy_into(model, weights)).eval()
    torch.testing.assert_close(standard(TOKENS[:, :-1]), ours(TOKENS[:, :-1]), rtol=1e-10, atol=1e-10)
    as_it_is = build_model(
        plain(ours.config), dtype=torch.float64, init=lambda m: copy_into(m, dict(ours.named_parameters()))
    )
    assert not torch.allclose(as_it_is(TOKENS[:, :-1]), ours(TOKENS[:, :-1]), atol=1e-2)


@pytest.mark.parametrize("form", some(FORMS, "classic"))
@torch.no_grad()
def test_an_export_is_plain(form: str, tmp_path: Path, foreign_code: None) -> None:
    from transformers import AutoModelForCausalLM

    ours = with_noise(FORMS[form])
    remote = export_hf(ours, None, tmp_path / "hf") == "gptlab"
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=remote).eval()
    logits = ours(TOKENS[:, :-1])
    torch.testing.assert_close(theirs(TOKENS[:, :-1]).logits, logits, rtol=0, atol=1e-5)
    config, init = import_hf(tmp_path / "hf")
    assert config.parametrization == "standard"
    torch.testing.assert_close(build_model(config, init=init)(TOKENS[:, :-1]), logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_sparse_export_is_plain(tmp_path: Path) -> None:
    ours = with_noise(CLASSIC)
    for name, p in ours.named_parameters():
        if name.startswith("h.") and p.dim() == 2:
            p.view(-1, 4)[:, 2:] = 0
    export_sparse24(ours, None, tmp_path / "out", torch.float16)
    loaded, _ = load_sparse24(tmp_path / "out", semi_structured=False)
    assert loaded.config == plain(ours.config)
    torch.testing.assert_close(loaded.float()(TOKENS[:, :-1]), ours(TOKENS[:, :-1]), rtol=0, atol=0.05)


@pytest.mark.parametrize("form", ["classic", "qwen3"])
def test_generation_with_a_cache_is_that_without(form: str) -> None:
    ours = with_noise(FORMS[form])
    both = [
        torch.stack([*generate(ours, TOKENS[:, :5], 8, temperature=0.0, use_cache=cache)]) for cache in (True, False)
    ]
    assert torch.equal(*both)
    last = F.log_softmax(ours(torch.cat((TOKENS[:, :5], both[0].T[:, :7]), dim=1))[:, -1], dim=-1)
    assert torch.equal(last.argmax(dim=-1), both[0][-1])


# -- what is refused


def test_optimizers_without_rules_are_refused(dataset: Path) -> None:
    for name in sorted({*OPTIMIZER_NAMES} - {*TRANSFERRING, "adamw-prune"}):
        with pytest.raises(
            ConfigError, match=f"model.parametrization = mup: works only with optim.name = .*, not {name}"
        ):
            tiny_recipe(dataset, model__parametrization="mup", optim__name=name)
        assert tiny_recipe(dataset, optim__name=name).optim.name == name


def test_a_classifier_is_refused() -> None:
    with pytest.raises(ConfigError, match="model.parametrization = mup: must be standard where task = classify"):
        build_recipe(
            {"task": "classify", "train": {"max_steps": 1}, "model": {"mlp": "gelu_erf", "parametrization": "mup"}}
        )


def test_weights_keep_their_parametrization(dataset: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(dataset, train__max_steps=2, model__parametrization="mup", model__base_width=16)
    assert train(recipe, tmp_path / "mup", quiet=True).status == "completed"
    assert train(tiny_recipe(dataset, train__max_steps=2), tmp_path / "standard", quiet=True).status == "completed"
    onwards = {"train__max_steps": 1, "train__init_from": str(tmp_path / "mup")}
    first = train(tiny_recipe(dataset, **onwards), tmp_path / "on", quiet=True)
    stored = (tmp_path / "on/recipe.toml").read_text(encoding="utf-8")
    assert 'parametrization = "mup"' in stored and "base_width = 16" in stored
    lines = [json.loads(line) for line in (tmp_path / "mup/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    began = [json.loads(line) for line in (tmp_path / "on/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert first.status == "completed" and began[0]["val_loss"] == [x for x in lines if "val_loss" in x][-1]["val_loss"]
    onwards["train__init_from"] = str(tmp_path / "standard")
    with pytest.raises(RunError, match="has model.parametrization = standard, this recipe completep"):
        train(tiny_recipe(dataset, model__parametrization="completep", **onwards), tmp_path / "no", quiet=True)


# -- the coordinate check

RECIPE = """
[model]
n_layer = 2
n_head = 4
n_embd = 64
block_size = 16
base_width = 64
base_depth = 4
base_head_size = 16
[data]
tokenizer = "byte"
[batch]
tokens_per_step = 64
[optim]
lr = 1e-3
[train]
max_steps = 100
device = "cpu"
"""


@pytest.fixture
def file(tmp_path: Path) -> Iterator[str]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    (tmp_path / "tiny.toml").write_text(RECIPE, encoding="utf-8")
    yield str(tmp_path / "tiny.toml")
    torch.set_num_threads(threads)


def steepest(report: dict[str, Any], parametrization: str) -> float:
    return max(abs(row["change_slope"]) for row in report["rows"] if row["parametrization"] == parametrization)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon", "lion", "adamw-schedule-free", "soap-muon"])
def test_changes_are_flat_over_the_width(file: str, name: str) -> None:
    more = {"schedule.shape": "constant"} if name == "adamw-schedule-free" else {}
    widths = [32, 64, 128] if name == "soap-muon" else [64, 128, 256]
    report = bench_coords(file, {"optim.name": name, **more}, widths)
    assert report["flat"] == {"standard": False, "mup": True}
    assert steepest(report, "standard") > 0.5


@pytest.mark.slow
def test_changes_are_flat_over_the_depth(file: str) -> None:
    report = bench_coords(file, {}, [4, 8, 16], depth=True, parametrizations=["mup", "completep"], seeds=4)
    assert report["flat"] == {"mup": False, "completep": True}
    assert steepest(report, "mup") > 0.5


def test_slopes_are_of_the_sizes(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: what changes by width^0.3 and has the size width^-1, with factors of the seed that cancel."""

    def planted(recipe: Any, steps: int, seed: int, device: Any) -> dict[str, tuple[float, float]]:
        n, by = recipe.model.n_embd, (0.5, 1.0, 2.0)[seed]
        flat = 0.3 if recipe.model.parametrization == "standard" else 0.09
        return {"one": (by * n**flat, by / n), "two": (by, 7 * by)}

    monkeypatch.setattr(coords, "activation_sizes", planted)
    report = bench_coords(file, {"model.parametrization": "completep"}, [64, 128, 512])
    assert report["flat"] == {"standard": False, "completep": True}
    one, two = report["rows"][:2]
    assert one["change_slope"] == pytest.approx(0.3) and one["size_slope"] == pytest.approx(-1)
    assert two["change_slope"] == pytest.approx(0, abs=1e-12) and two["size"] == pytest.approx([7, 7, 7])
    assert one["change"] == pytest.approx([64**0.3, 128**0.3, 512**0.3])


def test_the_verb_prints_and_draws(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def call(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            cli.main(["bench", "coords", file, *words])
        return (int(end.value.code or 0), *capsys.readouterr())

    few = ("--seeds", "1", "--steps", "2")
    status, shown, _ = call(
        "--widths", "16", "64", *few, "--json", str(tmp_path / "c.json"), "--out", str(tmp_path / "d")
    )
    assert status == 0 and "standard is not flat over n_embd: the steepest is" in shown and "mup is " in shown
    assert (tmp_path / "d/coords.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
    assert report["sizes"] == [16, 64] and report["steps"] == 2 and len(report["rows"]) == 16
    assert {len(row["change"]) for row in report["rows"]} == {2}
    status, shown, _ = call("--depths", "1", "2", *few, "--parametrization", "completep")
    assert status == 0 and "completep is" in shown and "over n_layer" in shown and "standard" not in shown
    for words, sentence in {
        ("--widths", "60", "64"): "--widths 60: must be a multiple of the head size, model.n_embd / n_head = 16",
        ("--widths", "64"): "--widths 64: give two sizes at least",
        ("--depths", "0", "2"): "--depths 0 2: give two sizes at least",
        ("--steps", "0"): "--steps 0: must be at least 1",
        ("--optim.name", "sgd"): "model.parametrization = mup: works only with optim.name",
    }.items():
        status, _, said = call(*words)
        assert status == 2 and sentence in said and "Traceback" not in said


def test_what_never_changes_is_not_flat(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coords, "activation_sizes", lambda *_: {"one": (0.0, 1.0)})
    report = bench_coords(file, {}, [64, 128])
    assert report["flat"] == {"standard": False, "mup": False} and render(report)
