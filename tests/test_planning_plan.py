"""Plans: devices, time and money, and the sentence that says what fits."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from planned import CPU, real, shape_of, small

from gptlab.cli import main
from gptlab.config import Recipe, load_recipe, load_study
from gptlab.errors import UserError
from gptlab.hardware import GB, GPUS, device_name
from gptlab.model.gpt import build_model
from gptlab.planning import measure, memory
from gptlab.planning.choose import facts as facts_of_a_choice
from gptlab.planning.device import Device
from gptlab.planning.memory import largest_that_fits, step_memory
from gptlab.planning.plan import plan_here, plan_recipe, say_time
from gptlab.planning.resolve import resolve_recipe
from gptlab.planning.shape import laid_out
from gptlab.planning.study import plan_study, plan_sweep
from gptlab.planning.tables import plan_table, study_plan_table, sweep_table
from gptlab.rundir import RunDir

# -- devices, time and money ---------------------------------------------------------------------------------------


def test_memory_is_given_for_a_gpu_of_any_name_or_none() -> None:
    recipe = load_recipe("gpt2-124m-fineweb-edu")
    card, any_gpu = Device.named("RTX3060"), Device.named(memory_gb=12)
    assert card.available == any_gpu.available == 11 * GB and card.kind == any_gpu.kind == "cuda"
    both = Device.named("RTX4060Ti-8", 12)
    assert (both.name, both.available, both.gpu) == ("RTX4060Ti-8 with 12 GB", 11 * GB, GPUS["RTX4060Ti-8"])
    known, unknown = plan_recipe(recipe, both), plan_recipe(recipe, any_gpu)
    assert known.memory == unknown.memory and known.hours and unknown.hours is unknown.tokens_per_second is None
    for gigabytes in (0, -12, 1, math.nan, math.inf):
        with pytest.raises(UserError, match=f"^--memory {gigabytes:g}: must be above 1, "):
            Device.named(memory_gb=gigabytes)


def test_time_and_cost_follow_from_flops() -> None:
    recipe = load_recipe("gpt2-124m-openwebtext", {"compile.enabled": "false"})
    found = plan_recipe(recipe, Device.named("A100-80"), mfu=0.5, price=2.0)
    n = 50304 * 768 + 1024 * 768 + 12 * (12 * 768**2 + 2 * 768) + 768  # no biases
    assert found.parameters == n
    multiplied = 50304 * 768 + 12 * 12 * 768**2
    assert found.flops_per_token == 6 * multiplied + 12 * 12 * 768 * 1024
    rate = 0.5 * 312e12 / found.flops_per_token
    assert found.tokens_per_second == pytest.approx(rate)
    evaluated = 22 * 2 * 2457600  # at 0, every 500 of 10,000 steps and at the end, of both splits
    assert found.hours == pytest.approx((10000 * 61440 + evaluated / 3) / rate / 3600)
    assert found.cost == pytest.approx(2 * found.hours)
    assert found.data == 2 * 10000 * 61440
    assert found.checkpoint == pytest.approx(12 * n, rel=1e-6)
    assert found.checkpoints == 4 * found.checkpoint  # the last two, the best, and one that is being written
    json.dumps(found.to_json())


def test_a_regime_is_timed_at_its_own_peak() -> None:
    for regime, peak in (("fp32", 19.5e12), ("tf32", 156e12), ("amp_bf16", 312e12)):
        found = plan_recipe(small(precision__regime=regime), Device.named("A100-40"), mfu=0.5)
        assert found.tokens_per_second == pytest.approx(0.5 * peak / found.flops_per_token)
    assert plan_recipe(small(precision__regime="amp_bf16"), Device.named("T4")).hours is None


def clock() -> Callable[[], float]:
    """A clock by which a micro-step takes three seconds, and an update one."""
    ticks = itertools.cycle([0.0, 3.0, 1.0])  # before a micro-step, after it, after the update
    return itertools.accumulate(ticks).__next__


@pytest.mark.parametrize(
    "changes",
    [
        {"optim__name": "muon"},
        {"precision__regime": "amp_fp16", "model__document_attention": True},
        {"task": "classify", "model__mlp": "gelu_erf"},
    ],
    ids=["muon", "amp_fp16", "classify"],
)
def test_the_speed_of_a_cpu_is_that_of_its_steps(changes: dict[str, Any]) -> None:
    recipe = small(**changes)
    step = 2 * 3.0 + 1.0  # two micro-steps of 5 sequences and an update
    speed = measure.measure_speed(recipe, shape_of(recipe), 5, seconds=8.0, clock=clock())
    assert speed.tokens == pytest.approx(64 * 10 / step)
    assert speed.note == "tokens a second were measured for about 8 s on this CPU"
    once = measure.measure_speed(recipe, shape_of(recipe), 5, seconds=0.0, clock=clock())
    assert once.tokens == pytest.approx(64 * 10 / step)


def test_of_a_large_model_a_part_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    monkeypatch.setattr(measure, "build_model", lambda config, **_: built.append(config) or build_model(config, **_))
    monkeypatch.setattr(measure, "SAMPLE", 1e8)
    recipe = small(model__n_layer=12, model__block_size=512, model__n_embd=128, batch__tokens_per_step=8 * 512)
    speed = measure.measure_speed(recipe, shape_of(recipe), 8, seconds=2.0, clock=clock())
    [config] = built
    assert (config.n_layer, config.block_size, config.n_embd) == (2, 128, 128)
    part, whole = build_model(config), real(recipe)
    step = 3.0 * (8 * 512 / 128) * (whole.flops_per_token() / part.flops_per_token())
    step += 1.0 * whole.parameter_count() / part.parameter_count()
    assert speed.tokens == pytest.approx(8 * 512 / step)
    assert speed.note.endswith(" and are extrapolated from 2 of 12 layers and 128 tokens")
    found = plan_recipe(recipe, Device("a CPU", "cpu", 8 * GB), measure=lambda *_: speed)
    assert found.measured and found.tokens_per_second == speed.tokens
    assert found.hours and found.hours > 100 * 8 * 512 / speed.tokens / 3600 and speed.note in found.notes


def test_a_cpu_that_cannot_do_it_is_not_measured() -> None:
    never = plan_recipe(small(), Device("a small CPU", "cpu", 1e5), measure=lambda *_: pytest.fail("it cannot fit"))
    assert never.hours is None and not never.measured
    mode, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    found = plan_recipe(small(precision__regime="tf32"), Device("a CPU", "cpu", 8 * GB), measure=measure.measure_speed)
    assert found.hours is None and any("TF32 needs an NVIDIA GPU" in note for note in found.notes)
    assert (torch.get_float32_matmul_precision(), torch.get_num_threads()) == (mode, threads)


def test_a_study_is_the_sum_of_its_runs() -> None:
    study = load_study("bitter-lesson-smoke")
    whole = plan_study(study, Device.named("L4"), price=3.0)
    assert list(whole.arms) == list(study.arms)
    arms = [plan_recipe(study.build(arm, 0), Device.named("L4")) for arm in study.arms]
    hours = [arm.hours for arm in arms if arm.hours is not None]
    assert whole.hours == pytest.approx(sum(hours) * len(study.seeds))
    assert whole.cost == pytest.approx(3 * whole.hours)


# -- the answer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu", ["T4", "L4", "H100"])
@pytest.mark.parametrize("preset", ["gpt2", "gpt2-large"])
def test_the_largest_micro_batch_fits_and_one_more_does_not(preset: str, gpu: str) -> None:
    recipe = load_recipe("gpt2-124m-fineweb-edu", {"model.preset": preset, "precision.regime": "amp_fp16"})
    device = Device.named(gpu)
    shape = resolve_recipe(recipe, "cuda").shape
    most = largest_that_fits(recipe, shape, device)

    def peak(sequences: int) -> float:
        return step_memory(recipe, shape, sequences, "cuda").peak

    assert 0 <= most < recipe.sequences_per_step
    assert most == 0 or peak(most) <= 0.95 * device.available
    assert peak(most + 1) > 0.95 * device.available
    auto = plan_recipe(recipe.replace({"batch.micro_batch": "auto"}), device)
    assert auto.micro_batch == max(1, most) and auto.largest_micro_batch == most


def test_what_cannot_fit_is_refused_with_a_way_out_that_works() -> None:
    recipe = load_recipe("gpt2-124m-fineweb-edu", {"model.preset": "gpt2-large", "batch.micro_batch": 512})
    device = Device.named("L4")
    found = plan_recipe(recipe, device)
    assert found.refused and found.needed_gb > found.available_gb == 23
    way = re.search(r"--batch.micro-batch (\d+) fits", found.sentence)
    assert way and int(way[1]) == found.largest_micro_batch
    other = plan_recipe(recipe.replace({"batch.micro_batch": int(way[1])}), device)
    assert not other.refused and other.needed_gb < 23 and "of the 23.0 GB" in other.sentence

    tight = Device("a small GPU", "cuda", 15 * GB)  # weights, gradients and moments of 774M take 12.4
    found = plan_recipe(recipe.replace({"batch.micro_batch": 8, "model.block_size": 8192}), tight)
    assert "--train.activation-checkpointing true" in found.sentence
    none = plan_recipe(recipe, Device("a tiny GPU", "cuda", 2 * GB))
    assert none.refused and "Use a smaller model" in none.sentence


def test_a_run_is_refused_from_15_percent_on_and_a_compiled_one_later() -> None:
    recipe = small(precision__regime="amp_bf16", compile__enabled=False)
    peak = step_memory(recipe, shape_of(recipe), 5, "cuda").peak
    assert not plan_recipe(recipe, Device("x", "cuda", peak / 1.14)).refused
    assert plan_recipe(recipe, Device("x", "cuda", peak / 1.16)).refused
    compiled = recipe.replace({"compile.enabled": True})
    assert not plan_recipe(compiled, Device("x", "cuda", peak / 1.16)).refused
    assert plan_recipe(compiled, Device("x", "cuda", peak / 4)).refused


def test_a_host_needs_pytorch_and_one_tensor_and_no_copies() -> None:
    recipe = load_recipe("gpt2-124m-fineweb-edu", {"model.preset": "gpt2-xl", "batch.micro_batch": 1})
    found = plan_recipe(recipe, dataclasses.replace(Device.named("H100"), host=4 * GB))
    assert found.host == 3 * GB + 4 * 50304 * 1600 < 4 * GB
    assert found.copies == found.checkpoint > 18 * GB and not found.refused
    short = plan_recipe(recipe, dataclasses.replace(Device.named("H100"), host=2.8 * GB))
    assert short.refused and "needs about 3.3 GB of host memory" in short.sentence and " 2.8 GB " in short.sentence
    assert plan_recipe(recipe, Device.named("H100"), processes=8).host == found.host  # each


def test_fits_asks_for_what_is_free_and_looks_closer_only_where_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, looks = small(), []
    exact = memory.count_activations
    monkeypatch.setattr(memory, "count_activations", lambda *a: looks.append(a) or exact(*a))

    def free(size: float) -> None:
        monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": size})())

    found = plan_here(recipe, CPU)
    assert not found.refused and not looks
    assert found.tokens_per_second is None and found.hours is None  # no peak is known
    peak = step_memory(recipe, shape_of(recipe), 5, "cpu").peak
    for size, refused in ((1.2 * peak, False), (0.9 * peak, False), (0.8 * peak, True)):
        looks.clear()
        free(size)
        found = plan_here(recipe, CPU)
        assert (found.refused, found.needed_gb) == (refused, peak / GB) and looks
    free(2 * 1.2 * peak)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # of torchrun: the memory is for two
    assert plan_here(recipe.replace({"batch.tokens_per_step": 64 * 20}), CPU, 4).available_gb == 1.2 * peak / GB


# -- several processes ---------------------------------------------------------------------------------------------

FSDP = {"distributed__strategy": "fsdp"}


def test_processes_share_the_time_and_the_batch_and_not_the_cost() -> None:
    recipe = load_recipe("gpt2-124m-fineweb-edu", {"model.preset": "gpt2-large", "batch.micro_batch": "auto"})
    device = Device.named("H100")
    one, eight = plan_recipe(recipe, device, price=2.0), plan_recipe(recipe, device, price=2.0, processes=8)
    assert one.hours and eight.hours and one.tokens_per_second and eight.tokens_per_second
    assert eight.tokens_per_second == pytest.approx(8 * one.tokens_per_second)
    assert eight.hours == pytest.approx(one.hours / 8) and eight.device_hours == pytest.approx(one.hours)
    assert eight.cost == pytest.approx(2 * one.hours) and eight.checkpoint == one.checkpoint
    assert (one.memory.weights, one.memory.optimizer) == (eight.memory.weights, eight.memory.optimizer)
    assert eight.largest_micro_batch == one.largest_micro_batch == eight.micro_batch
    assert eight.micro_batches == -(-64 // eight.micro_batch)  # of 512 sequences
    machine = recipe.replace({"train.price_per_hour": 16.0})
    assert plan_recipe(machine, device, processes=8).cost == pytest.approx(16 * eight.hours)
    small_step = recipe.replace({"batch.tokens_per_step": 12 * 1024, "batch.micro_batch": 4})
    assert plan_recipe(small_step, device, processes=8).micro_batch == 2  # its share, and not more
    study = plan_study(load_study("sizes-smoke", {"data.tokenizer": "byte"}), device, processes=2)
    assert study.hours and study.device_hours == pytest.approx(2 * study.hours)


def test_rows_that_do_not_fit_are_marked(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "smoke-lm", "--memory", "1.05", "--compile.enabled", "false"]
    assert cli(*words, "--sizes", "nano", "gpt2", "--micro-batches", "4") == 0  # one of them fits
    first, *table = capsys.readouterr().out.splitlines()
    assert first == "fits: nano x 4; does not fit: gpt2 x 4"
    rows = [[cell.strip() for cell in row.split("│")[1:3]] for row in table if " x 4 " in row]
    assert rows == [["nano x 4", "yes"], ["gpt2 x 4", "no"]]
    assert cli(*words, "--sizes", "gpt2", "--micro-batches", "4", "8") == 3
    assert capsys.readouterr().out.startswith("does not fit: gpt2 x 4, gpt2 x 8\n")
    assert cli("plan", "sizes-smoke", "--memory", "1.001", "--compile.enabled", "false") == 3
    assert re.match(r"does not fit: narrow, .*, of 3 arms x 3 seeds\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("hours", "says"),
    [
        (None, "time unknown"),
        (250.4, "about 250 h"),
        (1.04, "about 1.0 h"),
        (0.2, "about 12 min"),
        (0.01, "about 36 s"),
    ],
)
def test_times_are_said_as_people_say_them(hours: float | None, says: str) -> None:
    assert say_time(hours) == says


def write_run(folder: Path, recipe: Recipe, speed: float, **facts: Any) -> None:
    """What a run leaves that the planner reads."""
    run = RunDir(folder)
    folder.mkdir(parents=True)
    run.write_recipe(recipe)
    run.write_json("result.json", {"status": "completed", "steps": 90, "tokens_per_second": speed, "timed_steps": 80})
    here = {"device_name": device_name(CPU), "processes": 1, "threads": torch.get_num_threads()}
    run.write_json("environment.json", {**here, **facts})


def test_the_time_is_that_of_an_earlier_run_with_the_same_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = small(compile__enabled=False, eval__tokens=640)
    Path("mine.toml").write_text(recipe.to_toml(), encoding="utf-8")
    runs = tmp_path / "runs"
    longer = recipe.replace({"train.max_steps": 7000, "optim.lr": 1e-4})
    write_run(runs / "a/longer_seed1", longer, 12345.0)  # neither length nor rates change how long a step takes
    write_run(runs / "wider", recipe.replace({"model.n_embd": 128}), 1.0)
    write_run(runs / "threads", recipe, 2.0, threads=99)
    write_run(runs / "elsewhere", recipe, 3.0, device_name="another CPU")
    write_run(runs / "two", recipe, 4.0, processes=2)
    write_run(runs / "damaged", recipe, 5.0)
    (runs / "damaged/result.json").write_text("{", encoding="utf-8")
    assert cli("plan", "mine.toml") == 0
    out = capsys.readouterr().out
    assert re.match(r"fits: [\d.]+ of [\d.]+ GB, about 5 s, 12,345 tokens/s measured here\n", out)
    assert "tokens a second are those of runs/a/longer_seed1" in out
    os.utime(runs / "a/longer_seed1/result.json", (0, 0))
    write_run(runs / "newer", recipe, 54321.0)
    assert cli("plan", "mine.toml") == 0
    assert "54,321 tokens/s measured here" in capsys.readouterr().out


def test_a_gpu_reaches_the_mfu_of_the_earlier_run_that_is_nearest_in_size(tmp_path: Path) -> None:
    recipe, peak = small(compile__enabled=False), 1e12
    shape = shape_of(recipe)
    own = laid_out(shape).parameter_count()
    line = {"step": 9, "loss": 3.0, "lr": 1e-3, "tokens_per_second": 500.0, "mfu": 0.1}
    for name, scale, changes in (
        ("near", 1.5, {}),
        ("far", 20, {}),
        ("compiled", 1, {"compile.enabled": True}),
        ("elsewhere", 1, {"device_name": "another GPU"}),
        ("unknown", 1, {"mfu": None}),
    ):
        facts = {"parameters": int(scale * own)} | {k: changes.pop(k) for k in ["device_name"] if k in changes}
        logged = line | {"mfu": changes.pop("mfu", 0.4 if name == "far" else 0.1)}
        write_run(tmp_path / name, recipe.replace(changes), 1000.0, **facts)
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(logged) + "\n", encoding="utf-8")
    earlier = list(measure.earlier_runs(CPU, sorted(tmp_path.iterdir())))
    assert {one.run.path.name for one in earlier} == {"near", "far", "compiled", "unknown"}
    found = measure.speed_by_mfu(recipe, shape, peak, earlier)
    assert found is not None and found.mfu == pytest.approx(0.2)  # 1000 tokens a second in all, 500 in the last step
    assert found.tokens == pytest.approx(0.2 * peak / laid_out(shape).flops_per_token())
    plan = plan_recipe(recipe, Device.named("H100"), measure=lambda *_: found)
    assert not plan.measured and plan.rate.endswith("assumed at 20% MFU")
    assert plan.notes[-1] == f"the MFU is that of {tmp_path / 'near'}, of {1.5 * own / 1e6:,.3g}M parameters"
    assert plan.notes[-1] in list(facts_of_a_choice(recipe, plan, math.inf))
    assert measure.speed_by_mfu(recipe, shape, None, earlier) is None  # a GPU that the table lacks
    assert measure.speed_by_mfu(recipe.replace({"precision.regime": "bf16_pure"}), shape, peak, earlier) is None


def test_what_does_not_go_with_so_many_processes() -> None:
    device = Device.named("L4")
    for changes, processes, says in (
        ({"distributed__strategy": "none"}, 2, "distributed.strategy = none"),
        ({**FSDP, "distributed__shard_over": 3}, 4, "distributed.shard_over = 3: does not divide the 4"),
        ({}, 11, "11 processes cannot share the 10 sequences"),
        ({}, 0, "--gpus 0: must be at least 1"),
    ):
        with pytest.raises(UserError, match=says):
            plan_recipe(small(**changes), device, processes=processes)


def test_a_model_that_no_gpu_holds_is_told_of_fsdp() -> None:
    recipe = load_recipe("gpt2-124m-fineweb-edu", {"model.preset": "gpt2-xl", "batch.micro_batch": 8})
    found = plan_recipe(recipe, Device.named("L4"), processes=8)
    way = re.search(
        r"--distributed.strategy fsdp --distributed.shard-over 0 --batch.micro-batch (\d+) fits", found.sentence
    )
    assert found.refused and way
    other = recipe.replace({"distributed.strategy": "fsdp", "batch.micro_batch": int(way[1])})
    assert not plan_recipe(other, Device.named("L4"), processes=8).refused


def test_tables_name_what_they_show() -> None:
    from rich.console import Console

    console = Console(width=200, record=True, file=io.StringIO())
    layers = [{"model.preset": "micro", "model.vocab_size": 300, "train.max_steps": 10}]
    rows = plan_sweep(layers, Device.named("L4"), ["micro", "mini"], [32, 64])
    assert list(rows) == ["micro x 32", "micro x 64", "mini x 32", "mini x 64"]
    assert rows["mini x 64"].memory.activations > 1.9 * rows["mini x 32"].memory.activations
    console.print(sweep_table(rows, "size x micro-batch", 200))
    console.print(sweep_table(rows, "narrow", 100))
    console.print(plan_table(dataclasses.replace(rows["mini x 64"], notes=["[a note]"])))
    study = plan_study(load_study("sizes-smoke"), Device.named("L4"))
    console.print(study_plan_table(study, 200))
    [name, *_] = study.arms
    arms = {**study.arms, name: dataclasses.replace(study.arms[name], hours=None)}
    console.print(study_plan_table(dataclasses.replace(study, arms=arms), 200))
    text = console.export_text()
    assert f" of L4 assumed at 40% MFU, without {name}, whose time is unknown" in text
    assert "activations" not in text[text.index("narrow") : text.index("[a note]")].splitlines()[0]
    for word in (
        "size x micro-batch",
        "mini x 64",
        "activations",
        "largest micro-batch that fits",
        "[a note]",
        "seeds",
    ):
        assert word in text


def cli(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(list(words))
    return int(end.value.code or 0)


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("plan", "gpt2-124m-fineweb-edu", "--gpu", "h100", "--json", str(tmp_path / "a/plan.json")) == 0
    facts = json.loads((tmp_path / "a/plan.json").read_text(encoding="utf-8"))
    first = capsys.readouterr().out.splitlines()[0]
    assert re.fullmatch(r"fits: 31.5 of 79 GB, about 6.0 h, [\d,]+ tokens/s assumed at 40% MFU", first)
    assert facts["parameters"] == 124_475_904 and facts["verdict"] == first
    assert cli("plan", "gpt2-124m-fineweb-edu", "--gpu", "L4", "--micro-batches", "4", "8") == 0
    assert capsys.readouterr().out.startswith("fits: 4, 8\n")
    assert cli("plan", "gpt2-124m-fineweb-edu", "--gpu", "RTX3060", "--memory", "12") == 3
    assert "the 11.0 GB available on RTX3060 with 12 GB" in capsys.readouterr().out
    assert cli("plan", "gpt2-124m-fineweb-edu", "--gpu", "h100", "--gpus", "8", "--json", str(tmp_path / "8.json")) == 0
    assert json.loads((tmp_path / "8.json").read_text(encoding="utf-8"))["processes"] == 8
    assert cli("plan", "sizes-smoke", "--gpu", "L4", "--data.tokenizer", "byte") == 0
    assert "3 arms x 3 seeds" in capsys.readouterr().out
    for words, says in (
        (["gpt2-124m-fineweb-edu", "--gpu", "H10"], "--gpu H10: did you mean H100"),
        (["gpt2-124m-fineweb-edu", "--memory", "nan"], "--memory nan: must be above 1"),
        (["gpt2-124m-fineweb-edu", "--gpu", "L4", "--price", "-1"], "--price -1: must be 0 or more"),
        (["sizes-smoke", "--sizes", "gpt2"], "--sizes and --micro-batches are for a recipe"),
        (["no-such-recipe"], "no recipe 'no-such-recipe'"),
        (["gpt2-124m-fineweb-edu", "--optim.lr", "-1"], "optim.lr = -1: must be greater than 0"),
    ):
        assert cli("plan", *words) == 2
        assert says in capsys.readouterr().err
