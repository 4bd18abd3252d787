"""precision.regime = auto: what is measured, what is chosen, and who keeps to it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import tiny_recipe

from gptlab.bench.step import bench_step
from gptlab.config import Recipe, load_study
from gptlab.distributed.world import World
from gptlab.errors import ConfigError, UserError
from gptlab.model.gpt import build_model, linear_weights
from gptlab.planning import regime as measured
from gptlab.planning import resolve as resolving
from gptlab.planning.device import Device
from gptlab.planning.plan import plan_recipe
from gptlab.planning.regime import COLUMNS, GAIN, bf16_speed, choose_regime, matrices
from gptlab.planning.resolve import resolve_recipe
from gptlab.planning.shape import Shape
from gptlab.rundir import RunDir
from gptlab.tasks.base import open_data
from gptlab.training.loop import train
from gptlab.training.setup import settle_regime

CPU = torch.device("cpu")


def fake(monkeypatch: pytest.MonkeyPatch, speed: float | None) -> None:
    """A machine that multiplies bf16 so many times as fast as float32; None: nothing may be measured."""

    def measure(recipe: Recipe, shape: Shape, device: torch.device) -> float:
        assert speed is not None, "a measurement"
        assert shape.model.vocab_size and shape.regime.name == "fp32"
        return speed

    monkeypatch.setattr(resolving, "bf16_speed", measure)


@pytest.fixture
def left_open(dataset: Path) -> Recipe:
    return tiny_recipe(dataset, precision__regime="auto", train__max_steps=2, train__eval_every=0)


@pytest.mark.parametrize(("speed", "regime"), [(2.5, "bf16_master"), (0.75, "fp32")])
def test_a_run_records_what_was_chosen_and_keeps_it(
    speed: float,
    regime: str,
    left_open: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake(monkeypatch, speed)
    run = RunDir(tmp_path)
    assert train(left_open, tmp_path).status == "completed"
    assert run.read_recipe().precision.regime == regime
    assert run.read_json("environment.json")["bf16_speed"] == speed
    said = " ".join(capsys.readouterr().err.split())
    assert f"bf16 matrix products are {speed} times as fast" in said

    fake(monkeypatch, None)  # on another machine
    for again in (left_open, left_open.replace({"precision.regime": regime})):
        steps = RunDir(tmp_path).read_json("result.json")["steps"] + 1
        assert train(again.replace({"train.max_steps": steps}), tmp_path, quiet=True).steps == steps
        assert run.read_recipe().precision.regime == regime
        assert run.read_json("environment.json")["bf16_speed"] == speed


def test_a_given_regime_is_not_measured(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, None)
    recipe = tiny_recipe(dataset)
    assert settle_regime(recipe, RunDir(tmp_path), open_data(recipe), CPU) == (recipe, None)


def test_rank_0_measures_for_all(left_open: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[object] = []

    def broadcast(world: World, value: object, src: int = 0) -> object:
        sent.append(value)
        return 4.0

    monkeypatch.setattr(World, "broadcast", broadcast)
    data = open_data(left_open)
    for rank, speed in ((0, 4.0), (1, None)):
        fake(monkeypatch, speed)
        recipe, found = settle_regime(left_open, RunDir(tmp_path), data, CPU, World(rank, 2))
        assert (recipe.precision.regime, found) == ("bf16_master", 4.0)
    assert sent == [4.0, None]


@pytest.mark.parametrize("where", ["recipe", "arm", "flag"])
def test_a_study_says_which_regime_it_means(where: str, tmp_path: Path) -> None:
    auto = 'precision.regime = "auto"'
    file = tmp_path / "open.toml"
    file.write_text(
        'name = "open"\nrecipe = "smoke-lm"\nseeds = [0]\nbaseline = "a"\n'
        'metric = { name = "final_val_loss", better = "lower", margin = 0.01 }\n'
        + (f"[settings]\n{auto}\n" if where == "recipe" else "")
        + f"[arms.a]\n[arms.b]\n{auto if where == 'arm' else 'optim.lr = 1e-3'}\n",
        encoding="utf-8",
    )
    flags = {"precision.regime": "auto"} if where == "flag" else {}
    arm = "b" if where == "arm" else "a"
    with pytest.raises(ConfigError, match=rf'arm {arm}: precision.regime = auto: .* write .* = "fp32" or "amp_bf16"'):
        study = load_study(file, flags)
        for each in study.arms:
            study.build(each, 0)


def test_a_plan_asks_the_data_sheet_of_a_gpu_and_measures_a_cpu(
    left_open: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(monkeypatch, 2.0)
    monkeypatch.setattr(measured.torch.cuda, "is_available", lambda: False)
    cpu = Device("this machine (cpu)", "cpu", 1e12)
    for device, regime in (("H100", "amp_bf16"), ("V100-SXM2-32", "fp32"), (cpu, "bf16_master")):
        where = device if isinstance(device, Device) else Device.named(device)
        plan = plan_recipe(left_open, where)
        given = plan_recipe(left_open.replace({"precision.regime": regime}), where)
        assert plan.memory == given.memory and plan.tokens_per_second == given.tokens_per_second
        assert any(note.startswith(f"precision.regime = auto is {regime}: bf16") for note in plan.notes)


def test_a_benchmark_settles_the_regime_before_it_asks_a_peer(
    left_open: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(monkeypatch, 2.0)
    file = tmp_path / "open.toml"
    file.write_text(left_open.to_toml(), encoding="utf-8")
    with pytest.raises(UserError, match=r"precision\.regime = bf16_master, or its head or norms"):
        bench_step(str(file), {"precision.head": "fp32"}, ["nanogpt-loop"])


def test_bf16_has_to_gain_something() -> None:
    assert [choose_regime(speed, "cpu") for speed in (0.0, 1.0, GAIN)] == ["fp32", "fp32", "bf16_master"]
    assert choose_regime(9.0, "cuda") == "amp_bf16"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vocabulary", [300, 3 * COLUMNS + 100])
def test_the_products_are_those_of_the_model(tied: bool, vocabulary: int, dataset: Path) -> None:
    recipe = tiny_recipe(dataset, model__tied=tied, model__vocab_size=0).replace({"model.vocab_size": vocabulary})
    shape = Shape(recipe.model, recipe.precision, 0)
    model = build_model(recipe.model)
    head = vocabulary * recipe.model.n_embd
    body = linear_weights(model) - (0 if tied else head)
    whole = COLUMNS * 3 * recipe.model.n_embd if vocabulary > COLUMNS else head
    assert sum(count * rows * columns for (rows, columns), count in matrices(shape).items()) == body + whole


def test_a_measurement_leaves_the_process_as_it_was(left_open: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "SECONDS", 0.0)
    monkeypatch.setitem(measured.FLOPS, "cpu", 1e6)
    before = torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.get_rng_state()
    speed = resolve_recipe(left_open.replace({"train.threads": 2}), "cpu").bf16
    after = torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.get_rng_state()
    assert speed is not None and speed > 0
    assert before[:2] == after[:2] and torch.equal(before[2], after[2])
    found = resolve_recipe(left_open, "cpu")
    assert bf16_speed(left_open, found.shape, torch.device("meta")) == 0.0
