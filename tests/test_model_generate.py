"""Generation: the cache does not change the text, and samples respect temperature, top_k and top_p."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gptlab.config import Model, Precision
from gptlab.model.decoding import PAYS, Fixed, multiplies_by_onednn
from gptlab.model.generate import generate, nucleus, pick_token
from gptlab.model.gpt import GPT, build_model
from gptlab.precision.regimes import apply_regime, make_regime

CLASSIC = Model(n_layer=2, n_head=2, n_embd=32, block_size=24, vocab_size=50)
MODERN = CLASSIC.model_copy(
    update={"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "qk_norm": True, "tied": False, "bias": False}
)


def lively(config: Model, by: float = 4.0) -> GPT:
    """A model with large weights, so that no two logits are equal and the context matters."""
    model = build_model(config, init=1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(1.0 if p.dim() == 1 else 4.0 if name == "wte.weight" else by)
    return model


def ids(model: GPT, prompts: list[list[int]], n: int, **settings: object) -> list[list[int]]:
    return torch.stack(list(generate(model, prompts, n, **settings)), dim=1).tolist()


@pytest.mark.parametrize("config", [CLASSIC, MODERN], ids=["classic", "modern"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_cache_changes_nothing_past_the_end_of_the_context_too(config: Model, temperature: float) -> None:
    model = lively(config)
    prompt = [[3, 1, 4], [1, 5, 9]]
    with_cache = ids(model, prompt, 60, temperature=temperature, use_cache=True)  # the context is full after 21 tokens
    without = ids(model, prompt, 60, temperature=temperature, use_cache=False)
    assert with_cache == without
    assert with_cache[0] != with_cache[1]


def test_greedy_is_the_argmax_of_the_model() -> None:
    model = lively(CLASSIC)
    context = [7, 8]
    for drawn in ids(model, [context], 15, temperature=0.0)[0]:
        with torch.no_grad():
            assert drawn == model(torch.tensor([context]))[0, -1].argmax().item()
        context = [*context, drawn]


def test_a_sample_depends_on_its_seed_and_not_on_its_neighbours() -> None:
    model = lively(CLASSIC)
    one = ids(model, [[1]], 30, seed=4)[0]
    assert ids(model, [[1], [1], [1]], 30, seed=4)[0] == one
    assert ids(model, [[1]], 30, seed=5)[0] != one
    several = ids(model, [[1], [1]], 30, seed=4)
    assert several[0] != several[1]


def test_padding_of_the_vocabulary_is_never_drawn() -> None:
    model = build_model(CLASSIC)
    drawn = ids(model, [[0]] * 8, 100, temperature=5.0, n_ids=10)
    assert max(map(max, drawn)) == 9


def test_a_prompt_longer_than_the_context_is_read_from_its_end() -> None:
    model = lively(CLASSIC)
    long = [*range(1, 50), 2, 3]
    assert ids(model, [long], 5, temperature=0.0) == ids(model, [long[-24:]], 5, temperature=0.0)


def counts(logits: list[float], n: int = 4000, **settings: float) -> torch.Tensor:
    rows = torch.tensor(logits).log().repeat(n, 1)
    chosen = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **settings}
    draws = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.bincount(pick_token(rows, uniforms=draws, **chosen), minlength=len(logits)) / n


def test_draws_have_the_probabilities_of_temperature_top_k_and_top_p() -> None:
    p = [0.1, 0.4, 0.2, 0.3]
    close = {"rtol": 0, "atol": 0.03}  # 4 standard errors of 4,000 draws
    torch.testing.assert_close(counts(p), torch.tensor(p), **close)
    squared = torch.tensor(p).square() / torch.tensor(p).square().sum()
    torch.testing.assert_close(counts(p, temperature=0.5), squared, **close)
    torch.testing.assert_close(counts(p, top_k=2), torch.tensor([0, 4 / 7, 0, 3 / 7]), **close)
    # 0.4 + 0.3 >= 0.65, so the id of probability 0.2 is dropped
    torch.testing.assert_close(counts(p, top_p=0.65), torch.tensor([0, 4 / 7, 0, 3 / 7]), **close)
    torch.testing.assert_close(counts(p, top_p=0.75), torch.tensor([0, 4 / 9, 2 / 9, 3 / 9]), **close)
    assert counts(p, top_p=1e-6)[1] == 1  # the most likely id is always kept
    assert counts(p, top_k=3, top_p=0.5)[1] < 1


def drawn_by_sorting(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, u: torch.Tensor) -> list[int]:
    """One row at a time, in float64: sort, cut, and walk along the probabilities, in descending order after a top_k,
    else in the order of the ids."""
    found = []
    for row, below in zip(logits.double() / temperature, u.tolist(), strict=True):
        order = row.sort(descending=True, stable=True).indices[: top_k or None]
        p = row[order].softmax(0)
        n = int((p.cumsum(0) - p < top_p).sum()) if top_p < 1 else len(p)
        order = order[:n] if 0 < top_k < len(row) else order[:n].sort().values
        p = row[order].softmax(0)
        found.append(int(order[min(int((p.cumsum(0) <= below).sum()), n - 1)]))
    return found


@pytest.mark.parametrize("top_k", [0, 1, 5, 3000, 5000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-9])
@pytest.mark.parametrize("spread", [0.1, 4.0])
def test_a_draw_is_that_of_the_sorted_vocabulary(top_k: int, top_p: float, spread: float) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = spread * torch.randn(40, 3000, generator=generator)
    u = torch.rand(40, generator=generator, dtype=torch.float64)
    ours = pick_token(logits, 0.7, top_k, top_p, u).tolist()
    wanted = drawn_by_sorting(logits, 0.7, top_k, top_p, u)
    assert sum(a != b for a, b in zip(ours, wanted, strict=True)) <= 1  # a sum in float32 may end at a neighbour


def test_of_equal_ids_the_first_ones_are_in_the_nucleus() -> None:
    p = torch.tensor([[0.1, 0.2, 0.2, 0.3, 0.2], [0.2] * 5, [0.0, 0.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    wanted = [[False, True, False, True, False], [True, True, True, False, False], [False, False, True, False, False]]
    assert nucleus(p, 0.45).tolist() == wanted


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_the_ends_of_the_draw_are_ids_that_can_be_drawn(u: float) -> None:
    logits = torch.full((1, 2000), -200.0)  # of probability 0 in float64
    logits[0, [7, 1500]] = torch.tensor([1.0, 1.0])
    for top_k, top_p in ((0, 1.0), (50, 1.0), (0, 0.9), (50, 0.9)):
        drawn = pick_token(logits, 0.1, top_k, top_p, torch.tensor([u], dtype=torch.float64))
        assert drawn.item() in (7, 1500)


# -- prompts of different lengths

UNEQUAL = [[3, 1, 4], [1], [*range(30)], [5, 9, 2, 6, 5, 3, 5], [2, 7, 1]]  # each fills its context at its own time


@pytest.mark.parametrize("config", [CLASSIC, MODERN], ids=["classic", "modern"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_follows_a_prompt_is_what_follows_it_alone(config: Model, temperature: float) -> None:
    model = lively(config, 8.0)
    settings = {"temperature": temperature, "seed": 3}
    alone = [ids(model, [prompt], 40, numbers=[i], **settings)[0] for i, prompt in enumerate(UNEQUAL)]
    assert ids(model, UNEQUAL, 40, **settings) == alone
    assert ids(model, UNEQUAL, 40, use_cache=False, **settings) == alone
    assert len({str(row) for row in alone}) == len(UNEQUAL)


@pytest.mark.parametrize(
    ("config", "backend"),
    [(CLASSIC, "eager"), (MODERN, "eager"), pytest.param(MODERN, "inductor", marks=pytest.mark.slow)],
    ids=["classic", "modern", "inductor"],
)
def test_the_step_is_compiled_once_in_one_graph(config: Model, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively(config.model_copy(update={"n_layer": 1}))
    plain = ids(model, UNEQUAL, 40, temperature=0.0)
    graphs = []

    def compiling(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, mode, **given: compile(f, backend=compiling, **given))
    torch._dynamo.reset()
    for new in (40, 15):
        assert ids(model, UNEQUAL, new, temperature=0.0, compiled=True) == [row[:new] for row in plain]
    assert len(graphs) == 1


def test_sequences_of_one_number_draw_the_same() -> None:
    model = lively(CLASSIC)
    a, b, c = ids(model, [[1], [1], [1]], 20, numbers=[4, 4, 5])
    assert a == b != c


# -- what is done once


class Casts(TorchDispatchMode):
    """Sizes of the tensors that are cast to another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ == "_to_copy" and result.dtype is not args[0].dtype:
            self.sizes.append(result.numel())
        return result


@pytest.mark.parametrize("name", ["bf16_master", "bf16_pure", "amp_bf16", "fp32"])
@pytest.mark.parametrize("new", [4, PAYS], ids=["as they are", "packed"])
def test_matrices_are_cast_once(name: str, new: int) -> None:
    config = CLASSIC.model_copy(
        update={"n_embd": 64, "vocab_size": 200, "block_size": 64}
    )  # a matrix has more elements than the logits
    regime = make_regime(Precision(regime=name), torch.device("cpu"))
    model = build_model(config, init=1, on_meta=lambda m: apply_regime(m, regime))
    drawn = []
    with Casts() as casts, regime.context(torch.device("cpu")):
        for i, row in enumerate(generate(model, [[1, 2, 3]], new, temperature=0.0)):
            if i == 0:
                first, casts.sizes = casts.sizes, []
            drawn.append(int(row))
    assert max(casts.sizes, default=0) <= config.vocab_size
    matrices = 64 * 64 in first
    assert matrices == (name in ("bf16_master", "amp_bf16"))
    assert not model.wte.weight.grad_fn and model.training  # the model is as it was
    with torch.no_grad(), regime.context(torch.device("cpu")):  # the first id is that of the model's own forward pass
        assert drawn[0] == model.eval()(torch.tensor([[1, 2, 3]]))[0, -1].argmax()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5])
def test_a_fixed_layer_multiplies_as_the_plain_one(dtype: torch.dtype, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(shape, generator=generator) for shape in ((48, 32), (48,), (rows, 1, 32)))
    plain = torch.nn.functional.linear(x.to(dtype), weight.to(dtype), bias.to(dtype))
    onednn = multiplies_by_onednn(torch.device("cpu"), dtype)
    for packed in (0, rows) if onednn else (0,):
        made = Fixed(weight, bias, dtype, onednn, packed)(x)
        assert made.dtype is dtype
        torch.testing.assert_close(made, plain)
