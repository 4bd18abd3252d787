"""`gptlab bench step` and `bench data`: the parts of a step, peers that take the same step, and refusals."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_recipe

from gptlab import cli, machine
from gptlab.bench import peers, sides, step
from gptlab.bench.sides import OURS, PARTS, Order, opened, timed
from gptlab.bench.step import bench_step
from gptlab.config import Recipe
from gptlab.errors import UserError
from gptlab.progress import tell_nobody

PLAIN = {"model__dropout": 0.0, "train__threads": 1}


class Process(threading.Thread):
    """A thread in place of a side's process, which would import PyTorch again."""

    def __init__(
        self, target: Callable[[Order, Connection], None], args: tuple[Order, Connection], daemon: bool
    ) -> None:
        super().__init__(daemon=daemon)
        self.serve, self.order = target, args[0]
        self.pipe = Connection(os.dup(args[1].fileno()))  # a new process would have its own as well

    def run(self) -> None:
        with self.pipe:
            self.serve(self.order, self.pipe)

    def kill(self) -> None:
        assert not self.is_alive()


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    class Context:
        Process, Pipe = Process, staticmethod(multiprocessing.Pipe)

    def context(kind: str) -> type[Context]:
        return Context

    monkeypatch.setattr(multiprocessing, "get_context", context)
    monkeypatch.setattr(sides, "forget_peak", tell_nobody)
    monkeypatch.setattr(step, "PAUSE", 0.0)


@pytest.fixture
def file(dataset: Path, tmp_path: Path) -> str:
    path = tmp_path / "tiny.toml"
    content = tiny_recipe(dataset, **PLAIN).model_dump(exclude_defaults=True)
    lines = [
        f"[{name}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in part.items())
        for name, part in content.items()
        if isinstance(part, dict)
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def status(words: list[str]) -> object:
    """The exit status of a command line."""
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    return ended.value.code


def steps_of(name: str, recipe: Recipe, folder: Path, n: int) -> tuple[list[float], Recipe, dict[str, torch.Tensor]]:
    """Losses of the first steps of a side, its resolved recipe, and its weights by gptlab's names at the end."""
    with opened(Order(name, recipe, str(folder / name))) as (side, facts):
        losses = []
        for _ in range(n):
            side.update()
            losses.append(side.loss())
        model = side.trainer.model if isinstance(side, sides.Ours) else side.model  # type: ignore[attr-defined]
        return losses, facts.get("recipe", recipe), {k: v.detach().clone() for k, v in model.named_parameters()}


@pytest.mark.parametrize("changes", [{}, {"tied": False, "bias": False, "mlp": "relu2"}], ids=["classic", "untied"])
@pytest.mark.parametrize("name", [pytest.param("hf", marks=pytest.mark.slow), "nanogpt-loop"])  # transformers: 5 s
def test_a_peer_takes_the_same_steps(name: str, changes: dict[str, Any], dataset: Path, tmp_path: Path) -> None:
    if name == "hf":
        pytest.importorskip("transformers")
    recipe = tiny_recipe(dataset, **PLAIN, **{f"model__{key}": value for key, value in changes.items()})
    if name == "hf" and changes:
        recipe = recipe.replace({"model.bias": True})  # theirs has biases, which train
    ours, resolved, _ = steps_of(OURS, recipe, tmp_path, 4)
    theirs, _, _ = steps_of(name, resolved, tmp_path, 4)
    assert theirs == pytest.approx(ours, abs=2e-5)
    assert ours[0] - ours[-1] > 0.1  # the optimizers have done something, and the same


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"norm": "rmsnorm", "mlp": "swiglu", "bias": False, "qk_norm": True},
        {"norm": "layernorm", "mlp": "gelu", "bias": True, "tied": False},
    ],
    ids=["modern", "gelu"],
)
def test_litgpt_takes_the_same_steps(changes: dict[str, Any], dataset: Path, tmp_path: Path) -> None:
    pytest.importorskip("litgpt")  # it asks for a huggingface-hub that transformers 5 does not take
    shape = {f"model__{key}": value for key, value in {"position": "rope", **changes}.items()}
    ours, resolved, _ = steps_of(OURS, tiny_recipe(dataset, **PLAIN, **shape), tmp_path, 4)
    theirs, _, _ = steps_of("litgpt", resolved, tmp_path, 4)
    assert theirs == pytest.approx(ours, abs=2e-5)
    assert ours[0] - ours[-1] > 0.1


@pytest.mark.parametrize(
    ("changes", "because"),
    [
        ({}, "model.position = learned"),
        ({"position": "rope", "mlp": "relu2"}, "model.mlp = relu2"),
        ({"position": "rope", "norm": "layernorm", "bias": False}, "model.norm = layernorm without biases"),
        ({"position": "rope", "dropout": 0.1}, "model.dropout = 0.1"),
        ({"position": "rope"}, "`pip install litgpt`"),
    ],
)
def test_what_litgpt_cannot_take(
    changes: dict[str, Any], because: str, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    recipe = tiny_recipe(dataset, **{**PLAIN, **{f"model__{key}": value for key, value in changes.items()}})
    with pytest.raises(UserError, match=f"--vs litgpt .*{because}"):
        peers.refuse("litgpt", recipe)


def test_parts_add_up_to_the_clock(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks: list[float] = []

    def clock() -> float:
        ticks.append(ticks[-1] + 2.0 ** len(ticks) if ticks else 0.0)
        return ticks[-1]

    with opened(Order(OURS, tiny_recipe(dataset, **PLAIN), str(tmp_path / "run"))) as (side, _):
        marks: list[str] = []
        side.update(marks.append)
        monkeypatch.setattr("gptlab.training.throughput.time.perf_counter", clock)
        seconds = timed(side)
    pass_ = ["forward", "head", "backward"]
    micro = ["data", "data", *pass_, "data", *pass_, *pass_]  # one ahead
    assert marks == [*micro, "clipping", "logging", "optimizer", "logging", "optimizer", "optimizer", "logging"]
    assert tuple(seconds) == PARTS and min(seconds.values()) > 0
    assert sum(seconds.values()) == ticks[-1]  # nothing of the step is left out


def test_a_compiled_step_has_no_part_for_its_head(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module, **_: None
    )  # the parts are those of a compiled step, not compiled
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    recipe, marks = tiny_recipe(dataset, **PLAIN, compile__enabled=True), {}
    for name in (OURS, "nanogpt-loop"):
        with opened(Order(name, recipe, str(tmp_path / name))) as (side, facts):
            recipe, marks[name] = facts.get("recipe", recipe), []
            side.update(marks[name].append)
            assert "forward" in marks[name] and "head" not in marks[name]


def test_parts_take_most_of_a_step(dataset: Path, tmp_path: Path) -> None:
    import time

    with opened(Order(OURS, tiny_recipe(dataset, **PLAIN), str(tmp_path / "run"))) as (side, _):
        timed(side)
        shares = []
        for _ in range(5):
            began = time.perf_counter()
            parts = timed(side)
            shares.append(sum(parts.values()) / (time.perf_counter() - began))
    assert max(shares) > 0.9 and max(shares) <= 1.0


def test_the_trainer_is_the_same_when_it_is_timed(recipe: Recipe, tmp_path: Path) -> None:
    def trained(update: Callable[[Any], object], where: str) -> dict[str, torch.Tensor]:
        with opened(Order(OURS, recipe, str(tmp_path / where))) as (side, _):
            for _ in range(3):
                update(side)
            return {k: v.detach().clone() for k, v in side.trainer.model.named_parameters()}  # type: ignore[attr-defined]

    plain, under = trained(lambda side: side.update(), "a"), trained(timed, "b")
    assert all(torch.equal(plain[name], under[name]) for name in plain)


def test_what_is_reported(file: str, threads: None) -> None:
    report = bench_step(file, {}, ["nanogpt-loop"], rounds=3, profile=True)
    ours, plain = report["rows"]
    assert [ours["name"], plain["name"]] == [OURS, "nanogpt-loop"]
    for row in report["rows"]:
        assert len(row["seconds"]) == 3 and set(row["step_seconds"]) == {"median", "min", "max"}
        assert sum(row["parts"].values()) == pytest.approx(sum(row["seconds"]) / 3)
        assert row["tokens_per_second"] == pytest.approx(256 / row["step_seconds"]["median"])
        assert tuple(row["parts"]) == PARTS and min(row["parts"]["forward"], row["parts"]["head"]) > 0
        assert row["peak_memory_gb"] > 0 and row["first_step_seconds"] > 0 and row["micro_batch"] == 3
        assert "mfu" not in row  # no peak is known of a CPU
    assert plain["first_loss"] == pytest.approx(ours["first_loss"], abs=1e-5)
    pairs = [a / b for a, b in zip(plain["seconds"], ours["seconds"], strict=True)]
    assert report["ratios"] == {"nanogpt-loop": step._spread(pairs)}
    assert report["parameters"] > 0 and report["tokens_per_step"] == 256 and report["compiled"] is False
    assert any("mm" in one["operation"] for one in report["profile"][OURS])
    json.dumps(report)


def test_the_verbs_print_and_write(
    file: str, threads: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(["bench", "step", file, "--rounds", "1", "--json", str(tmp_path / "step.json")]) == 0
    shown = capsys.readouterr().out
    assert "forward, mean ms" in shown and "tokens/s" in shown and "fp32, not compiled, adamw" in shown
    assert json.loads((tmp_path / "step.json").read_text(encoding="utf-8"))["rounds"] == 1
    assert status(["bench", "data", file, "--rounds", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    rates = report["batches_tokens_per_second"], report["step_tokens_per_second"]
    assert report["times_as_fast"] == pytest.approx(rates[0] / rates[1])
    assert 0 < report["waits_percent"] < 100


def test_without_data_steps_are_of_random_tokens_and_batches_are_refused(
    file: str, threads: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "RANDOM_TOKENS", 1 << 14)
    nowhere = {"data.path": str(tmp_path / "nowhere"), "data.tokenizer": "gpt2"}
    report = bench_step(file, nowhere, rounds=1)
    assert report["data"].startswith("random tokens")
    with pytest.raises(UserError, match="nowhere"):
        step.bench_data(file, nowhere, 1)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"model.position": "rope"}, "--vs nanogpt-loop cannot train tiny: model.position = rope"),
        ({"model.qk_norm": True}, "qk_norm = True"),
        ({"model.parametrization": "mup"}, "model.parametrization = mup"),
        ({"model.document_attention": True}, "model.document_attention is on"),
        ({"precision.regime": "amp_fp16"}, "precision.regime = amp_fp16"),
        ({"precision.regime": "bf16_pure", "precision.head": "fp32"}, "or its head or norms"),
    ],
    ids=["rope", "qk_norm", "mup", "documents", "loss_scaling", "head"],
)
def test_a_peer_that_cannot_take_the_step_is_refused(changes: dict[str, Any], sentence: str, file: str) -> None:
    with pytest.raises(UserError, match=sentence):
        bench_step(file, changes, ["nanogpt-loop"])


def test_refusals(
    file: str, threads: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(["bench", "step", file, "--rounds", "0"]) == 2
    assert "rounds = 0: must be at least 1" in capsys.readouterr().err
    assert status(["bench", "step", file, "--vs", "torchtitan"]) == 2
    assert "invalid choice: 'torchtitan'" in capsys.readouterr().err
    assert status(["bench", "step", file, "--optim.name", "adamw", "--optim.rounding", "stochastic"]) == 2
    assert "optim.rounding" in capsys.readouterr().err  # said by the process of a side
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]
    assert status(["bench", "step", file, "--vs", "hf"]) == 2
    assert "--vs hf needs transformers, which is not installed" in capsys.readouterr().err


def test_a_failure_of_a_side_is_a_sentence(file: str, threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sides, "update", full)
    with pytest.raises(UserError, match="gptlab ran out of memory: CUDA out of memory"):
        bench_step(file, {}, rounds=1)


def test_a_side_that_is_killed_is_a_sentence(file: str, threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sides, "serve", lambda order, pipe: None)
    with pytest.raises(UserError, match="the process of gptlab ended without a word"):
        bench_step(file, {}, rounds=1)


def test_a_peer_without_memory_takes_smaller_micro_batches() -> None:
    class Hungry(peers.Peer):
        def __init__(self) -> None:
            self.micro_batch, self.device = 12, torch.device("cpu")
            self.optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])

        def update(self, did: Callable[[str], None] = tell_nobody) -> None:
            if self.micro_batch > 3:
                raise torch.OutOfMemoryError("no")
            did("forward")

    hungry = Hungry()
    sides.first_step(hungry)
    assert hungry.micro_batch == 3


@pytest.mark.skipif(sys.platform != "linux", reason="the peak cannot be forgotten")
def test_peak_memory_since() -> None:
    large = bytearray(1 << 28)
    with_it = machine.peak_memory_since()
    del large
    machine.forget_peak()
    assert machine.peak_memory_since() < with_it - (1 << 27)


@pytest.mark.slow
def test_each_side_has_its_own_process(file: str) -> None:
    report = bench_step(file, {}, ["hf", "nanogpt-loop"], rounds=2)
    losses = [row["first_loss"] for row in report["rows"]]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)
    assert not multiprocessing.active_children()
