"""`gptlab bench inference`: the same ids as `generate`, numbers that follow from the times, and its errors."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_recipe
from torch.utils._python_dispatch import TorchDispatchMode

import gptlab
from gptlab import cli
from gptlab.bench import inference
from gptlab.bench.inference import Cell, bench_inference, excused, generate_timed, open_model
from gptlab.config import Model, Precision
from gptlab.config.sections import Sample
from gptlab.errors import ConfigError, UserError
from gptlab.model.generate import generate
from gptlab.model.gpt import GPT, KVCache, build_model
from gptlab.precision.regimes import NotApplicable, Regime, apply_regime, enter_regime

CPU = torch.device("cpu")
SHAPE = Model(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=50)
MODERN = SHAPE.model_copy(update={"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "qk_norm": True})
TINY = """
[model]
n_layer = 1
n_head = 2
n_embd = 32
block_size = 32
[data]
tokenizer = "byte"
[batch]
tokens_per_step = 64
[train]
max_steps = 1
device = "cpu"
threads = 1
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A recipe without prepared data."""
    file = tmp_path_factory.mktemp("recipes") / "tiny.toml"
    file.write_text(TINY, encoding="utf-8")
    return str(file)


def lively(regime: Regime, config: Model = SHAPE) -> GPT:
    """A model with large weights, whose next token depends on many previous tokens."""
    model = build_model(config, init=1, on_meta=lambda m: apply_regime(m, regime)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(4.0 if name.startswith("wte") else 8.0 if p.dim() > 1 else 1.0)
    return model


# -- what is generated


@pytest.mark.parametrize("config", [SHAPE, MODERN], ids=["classic", "modern"])
@pytest.mark.parametrize(
    "precision",
    [{"regime": "fp32"}, {"regime": "amp_bf16"}, {"regime": "bf16_pure"}, {"regime": "bf16_pure", "head": "fp32"}],
    ids=["fp32", "amp_bf16", "bf16_pure", "bf16_pure_fp32_head"],
)
def test_the_tokens_are_those_of_greedy_generation(precision: dict[str, str], config: Model) -> None:
    regime = enter_regime(Precision(**precision), CPU)
    model = lively(regime, config)
    prompt = torch.tensor([[3, 1, 4, 1], [1, 5, 9, 2]])
    ids, seconds = generate_timed(model, regime, prompt, 20)
    with regime.context(CPU):
        expected = torch.stack(list(generate(model, prompt, 20, temperature=0.0)), dim=1)
    assert ids.tolist() == expected.tolist()
    assert len(set(ids[0].tolist())) > 5  # not one repeated token, which even a broken cache would give
    assert ids[0].tolist() != ids[1].tolist()
    assert len(seconds) == 20 and min(seconds) > 0


def test_sampled_tokens_are_those_of_generate(tiny: str) -> None:
    regime, sample = enter_regime(Precision(regime="fp32"), CPU), Sample(temperature=0.9, top_k=12, top_p=0.8, seed=3)
    model, prompt = lively(regime), torch.tensor([[3, 1, 4, 1], [1, 5, 9, 2]])
    ids, _ = generate_timed(model, regime, prompt, 20, sample)
    drawing = sample.model_dump(include={"temperature", "top_k", "top_p", "seed"})
    expected = torch.stack(list(generate(model, prompt, 20, **drawing)), dim=1)
    assert ids.tolist() == expected.tolist() != generate_timed(model, regime, prompt, 20)[0].tolist()
    own = {"sample.temperature": 0.9, "sample.top_k": 12}
    report = bench_inference(tiny, own, ["fp32"], [2], 4, 3, repeats=1, peers=["hf"], sampled=True)
    assert report["sample"] == {"temperature": 0.9, "top_k": 12, "top_p": 1.0}
    assert [row["status"] for row in report["rows"]] == ["completed"] * 2
    assert "sampled by temperature 0.9, top_k 12, top_p 1, not compiled" in str(
        inference.render(report).renderables[-1]
    )
    assert bench_inference(tiny, own, ["fp32"], [2], 4, 3, repeats=1)["sample"]["temperature"] == 0


class Casts(TorchDispatchMode):
    """Records the sizes of the tensors that are cast, for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: list[list[int]] = [[]]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "_to_copy" or (name == "copy_" and args[0].dtype != args[1].dtype):
            self.tokens[-1].append(args[0].numel())
        result = func(*args, **(kwargs or {}))
        if name == "argmax":
            self.tokens.append([])
        return result


def test_autocast_casts_the_weights_once_and_never_the_cache(tiny: str) -> None:
    regime = enter_regime(Precision(regime="amp_bf16"), CPU)
    model = inference._build(*open_model(tiny, {}), regime, CPU)
    matrices = sorted(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and name != "wpe.weight")
    with Casts() as casts:
        generate_timed(model, regime, torch.randint(50, (2, 8)), 6)
    prefill, *decode = casts.tokens
    activations = {2 * 8 * 32, 2 * 32}  # (B, T, C), and the last token for the head
    assert sorted(n for n in prefill if n not in activations and n >= 32 * 32) == matrices
    assert max(itertools.chain(*decode)) == 2 * 32  # (B, C): neither a matrix nor the cached keys (2, 2, 9, 16)


@pytest.mark.parametrize("name", ["fp32", "amp_bf16", "amp_fp16", "bf16_pure", "fp16_pure"])
@pytest.mark.parametrize("parts", [{}, {"head": "fp32", "norms": "fp32"}], ids=["", "fp32_head_and_norms"])
def test_the_cache_has_the_dtype_of_the_keys(name: str, parts: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen, kept = set[torch.dtype](), set[torch.dtype]()
    append = KVCache.append

    def watched(self: KVCache, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.update((k.dtype, v.dtype))
        kept.add(self.keys.dtype)
        return append(self, layer, k, v)

    monkeypatch.setattr(KVCache, "append", watched)
    regime = enter_regime(Precision(regime=name, **parts), CPU)
    generate_timed(lively(regime, MODERN), regime, torch.tensor([[1, 2]]), 2)
    assert seen == {regime.matmul}
    assert kept == {torch.float32 if name == "bf16_pure" else regime.matmul}  # faster to attend to on a CPU


# -- what is said of it


def test_rates_and_latencies_follow_from_the_clock(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two cells, 4 generations each, in the order a b, b a, a b, b a. The first generation of each warms up.
    prefills = {"a": [2.0, 4.0, 9.0], "b": [1.0, 3.0, 2.0]}
    steps = {"a": [[0.5, 0.5], [0.25, 0.75], [1.0, 3.0]], "b": [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]}
    generations = [(100.0, [100.0, 100.0])] * 2  # a and b warm up
    for r, order in enumerate(["ba", "ab", "ba"]):
        generations += [(prefills[cell][r], steps[cell][r]) for cell in order]
    ticks = itertools.accumulate(t for prefill, rest in generations for t in (1.0, prefill, *rest))  # 1.0: in between
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    report = bench_inference(tiny, {}, ["fp32"], [2, 3], prompt_tokens=10, new_tokens=3, repeats=3)
    a, b = report["rows"]
    assert next(ticks, None) is None  # all ticks were used
    assert (a["batch_size"], b["batch_size"]) == (2, 3)
    assert a["prefill_tokens_per_second"] == pytest.approx(2 * 10 * 3 / 15)  # 20 tokens thrice in 2 + 4 + 9 s
    assert b["prefill_tokens_per_second"] == pytest.approx(3 * 10 * 3 / 6)
    assert a["decode_tokens_per_second"] == pytest.approx(2 * 6 / 6)  # 2 tokens a step, 6 steps in 6 s
    assert b["decode_tokens_per_second"] == pytest.approx(3 * 6 / 12)
    assert (a["first_token_ms_p50"], a["first_token_ms_p95"]) == pytest.approx((4000, 9000))
    assert (a["decode_ms_p50"], a["decode_ms_p95"]) == pytest.approx((500, 3000))
    assert (b["decode_ms_p50"], b["decode_ms_p95"]) == pytest.approx((2000, 3000))


def test_bytes_are_those_of_the_tensors(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    caches: list[KVCache] = []
    init = KVCache.__init__
    monkeypatch.setattr(KVCache, "__init__", lambda self, *given: (init(self, *given), caches.append(self))[0])
    report = bench_inference(tiny, {"model.position": "rope"}, ["fp32", "amp_bf16", "bf16_pure"], [3], 4, 2, repeats=1)
    sizes = [cache.keys.nbytes + cache.values.nbytes for cache in caches[:3]]  # of the warm-up
    assert [row["cache_gb"] * 1e9 for row in report["rows"]] == pytest.approx(sizes)
    assert sizes[0] == 2 * sizes[1] == sizes[2]  # without autocast a CPU keeps float32
    tables = 2 * 32 * 8 * 4  # cos and sin, float32 in every regime
    n = report["parameters"]
    assert [row["weights_gb"] * 1e9 for row in report["rows"]] == pytest.approx([4 * n + tables] * 2 + [2 * n + tables])
    assert all("peak_memory_gb" not in row for row in report["rows"])


@pytest.mark.parametrize("together", [True, False])
def test_cells_take_turns_where_there_is_memory_for_all_models(
    tiny: str, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[tuple[str, str, bool]] = []

    def watched(model: GPT, regime: Regime, *given: Any) -> tuple[torch.Tensor, list[float]]:
        turns.append((regime.name, torch.get_float32_matmul_precision(), model.training))
        return generate_timed(model, regime, *given)

    monkeypatch.setattr(inference, "fit_together", lambda *_: together)
    monkeypatch.setattr(inference, "generate_timed", watched)
    report = bench_inference(tiny, {}, ["fp32", "amp_bf16"], [1], 4, 2, repeats=2)
    one, other = ("fp32", "highest", False), ("amp_bf16", "high", False)  # TF32 for amp_bf16, but not for fp32
    assert turns == ([one, other, other, one, one, other] if together else [one] * 3 + [other] * 3)
    assert report["interleaved"] is together
    assert [row["status"] for row in report["rows"]] == ["completed"] * 2


def test_a_peer_writes_the_same_ids_and_is_compared_in_its_own_round(
    tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    regime = enter_regime(Precision(regime="fp32"), CPU)
    model, prompt = lively(regime), torch.tensor([[3, 1, 4, 1], [1, 5, 9, 2]])
    ids, seconds = inference.peer_timed(inference.of_peer(model, regime), regime, prompt, 12)
    assert ids.tolist() == generate_timed(model, regime, prompt, 12)[0].tolist()
    assert len(seconds) == 12 and min(seconds) > 0
    times = {"generate_timed": iter([9.0, 1.0, 2.0]), "peer_timed": iter([9.0, 3.0, 4.0])}  # the first ones warm up
    for name, each in times.items():
        monkeypatch.setattr(inference, name, lambda *_, each=each: (prompt, [next(each) / 2] * 2))
    report = bench_inference(tiny, {}, ["fp32"], [1], 4, 2, repeats=2, peers=["hf"])
    ours, theirs = report["rows"]
    assert theirs["peer"] == "hf" and "peer" not in ours
    assert theirs["time_ratio"] == {"median": 2.5, "min": 2.0, "max": 3.0}
    with pytest.raises(NotApplicable, match="one dtype, or autocast"):
        inference.of_peer(model, enter_regime(Precision(regime="bf16_master"), CPU))
    assert "hf fp32" in str(inference.render(report).renderables[0].columns[0]._cells)


# -- what cannot be measured


def test_what_the_machine_cannot_do_is_a_line_and_the_others_go_on(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new/bench.json"
    with pytest.raises(SystemExit) as exit:
        cli.main(
            [
                "bench",
                "inference",
                tiny,
                "--regimes",
                "tf32",
                "fp32",
                "--batch-sizes",
                "100000000000",
                "2",
                "--prompt-tokens",
                "5",
                "--new-tokens",
                "3",
                "--repeats",
                "1",
                "--json",
                str(file),
                "--model.n-layer",
                "3",
            ]
        )
    assert not exit.value.code
    report = json.loads(file.read_text(encoding="utf-8"))
    assert (report["device"], report["torch"], report["recipe"]) == ("cpu", torch.__version__, "tiny")
    assert (report["prompt_tokens"], report["new_tokens"], report["vocab_size"]) == (5, 3, 257)
    assert report["parameters"] == GPT(open_model(tiny, {"model.n_layer": 3})[0].model).parameter_count()
    refused, again, too_large, measured = report["rows"]
    assert refused == {**again, "batch_size": 10**11}
    assert (refused["regime"], refused["status"]) == ("tf32", "not_applicable")
    assert "TF32 needs an NVIDIA GPU" in refused["reason"]
    assert too_large["status"] == "out_of_memory"
    assert too_large["cache_gb"] == pytest.approx(2 * 3 * 1e11 * 8 * 32 * 4 / 1e9)
    assert "decode_tokens_per_second" not in too_large
    assert (measured["status"], measured["batch_size"]) == ("completed", 2)
    assert measured["decode_tokens_per_second"] > 0 and "reason" not in measured
    out = capsys.readouterr().out
    assert f"{measured['decode_tokens_per_second']:,.0f}" in out
    assert "tf32 not_applicable: precision.regime = tf32: TF32 needs" in out


@pytest.mark.parametrize(
    ("regime", "error", "status"),
    [
        ("fp8_rowwise", RuntimeError("no such shape\nin float8"), "not_applicable"),
        ("fp8_rowwise", torch.OutOfMemoryError("CUDA out of memory."), "out_of_memory"),
        ("fp32", NotApplicable("not here"), "not_applicable"),
        ("fp32", RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out_of_memory"),
    ],
)
def test_an_error_of_the_machine_is_a_status(regime: str, error: Exception, status: str) -> None:
    cells = [Cell(regime, 1), Cell(regime, 2)]
    with excused(cells):
        raise error
    assert [(cell.status, cell.reason) for cell in cells] == [(status, str(error).splitlines()[0])] * 2


@pytest.mark.parametrize("error", [RuntimeError("a bug"), UserError("a wrong call")])
def test_any_other_error_is_raised(error: Exception) -> None:
    cell = Cell("fp32", 1)
    with pytest.raises(type(error), match=str(error)), excused([cell]):
        raise error
    assert cell.status == "completed"


# -- which model


def test_a_run_is_measured_with_its_own_weights(dataset: Path, tmp_path: Path) -> None:
    gptlab.train(tiny_recipe(dataset, train__max_steps=1), tmp_path / "run", quiet=True)
    recipe, init = open_model(str(tmp_path / "run"), {"train.device": "cpu"})
    trained = gptlab.load_run(tmp_path / "run", device="cpu")
    assert recipe.model == trained.recipe.model  # vocab_size is resolved in it
    for ours, theirs in zip(build_model(recipe.model, init=init).parameters(), trained.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    report = bench_inference(str(tmp_path / "run"), {"train.device": "cpu"}, ["bf16_pure"], [1], 4, 2, repeats=1)
    assert report["rows"][0]["status"] == "completed"
    with pytest.raises(UserError, match=r"model.n_layer: cannot change the shape of the trained model"):
        open_model(str(tmp_path / "run"), {"model.n_layer": 3})


@pytest.mark.parametrize(
    ("tokenizer", "number"), [("gpt2", 50257), ("byte", 257), ("bpe-4096", 4096), ("char", None), ("file", 27)]
)
def test_the_number_of_token_ids_needs_no_dataset_where_the_name_says_it(
    tiny: str, tokenizer: str, number: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if tokenizer == "file":
        (tmp_path / "t.json").write_text(
            json.dumps({"kind": "char", "characters": "abcdefghijklmnopqrstuvwxyz", "end_of_text": True}),
            encoding="utf-8",
        )
        tokenizer = "t.json"
    if number is not None:
        assert open_model(tiny, {"data.tokenizer": tokenizer})[0].model.vocab_size == number
        return
    with pytest.raises(ConfigError, match="data.tokenizer = char: .* not known until data/stdlib-char is prepared"):
        open_model(tiny, {"data.tokenizer": tokenizer})
    assert open_model(tiny, {"data.tokenizer": tokenizer, "model.vocab_size": 65})[0].model.vocab_size == 65


def test_the_characters_of_a_prepared_dataset_are_counted(tiny: str, dataset: Path) -> None:
    characters = json.loads((dataset / "tokenizer.json").read_text(encoding="utf-8"))["characters"]
    recipe, _ = open_model(tiny, {"data.tokenizer": "char", "data.path": str(dataset)})
    assert recipe.model.vocab_size == len(characters) + 1  # plus end-of-text


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["smoke-cls"], "smoke-cls is a classifier"),
        (["nothing"], "no recipe 'nothing'"),
        (["TINY", "--regimes", "fp33"], "regimes = fp33: must be one of fp32, tf32, "),
        (["TINY", "--batch-sizes", "1", "0"], "batch_sizes = 0: must be at least 1"),
        (["TINY", "--batch-sizes", "many"], "invalid int value: 'many'"),
        (["TINY", "--prompt-tokens", "0"], "prompt_tokens = 0: must be at least 1"),
        (["TINY", "--new-tokens", "1"], "new_tokens = 1: must be at least 2"),
        (["TINY", "--repeats", "0"], "repeats = 0: must be at least 1"),
        (["TINY", "--prompt-tokens", "28", "--new-tokens", "5"], "28 + 5: must be at most model.block_size = 32"),
        (["TINY", "--model.block-size", "1"], "1 + 2: must be at most"),
        (["TINY", "--optim.lrr", "1"], "no setting 'optim.lrr'; did you mean 'optim.lr'?"),
        (["TINY", "--json", "."], "--json: . is a folder"),
    ],
)
def test_a_wrong_call_is_a_sentence_and_2(
    words: list[str],
    sentence: str,
    tiny: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        cli.main(["bench", "inference", *(tiny if word == "TINY" else word for word in words)])
    out, err = capsys.readouterr()
    assert exit.value.code == 2
    assert err.startswith("gptlab: ") and sentence in err
    assert out == ""
