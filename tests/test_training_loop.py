"""What a step does, measured from outside: accumulation, learning rate, groups, precision, evaluation, logs."""

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_recipe
from processes import float64

import gptlab
from gptlab.config import Schedule
from gptlab.data.sampler import Windows
from gptlab.data.shards import Dataset
from gptlab.errors import DataError, UserError
from gptlab.model.gpt import GPT, build_model
from gptlab.optim.optimizers import make_optimizer, parameter_groups
from gptlab.optim.schedule import learning_rate
from gptlab.planning.memory import auto_micro_batch
from gptlab.planning.resolve import resolve_recipe
from gptlab.precision.regimes import REGIMES
from gptlab.rundir import RunDir
from gptlab.training.load import load_run
from gptlab.training.scoring import evaluate_run
from gptlab.training.throughput import Stopwatch, percentile


def lines(run: Path, key: str) -> list[float]:
    return [line[key] for line in RunDir(run).read_metrics() if key in line]


def test_the_loop_is_the_loop_one_would_write(dataset: Path, tmp_path: Path) -> None:
    """Losses, gradient norms and learning rates of 12 steps against a loop on whole batches, in its plainest form.

    Both train in float64; what is logged goes through float32.
    """
    logged = 4 * torch.finfo(torch.float32).eps
    recipe = tiny_recipe(
        dataset, model__dropout=0.0, optim__grad_clip=0.5, train__max_steps=12, optim__weight_decay=0.3
    )
    with float64():
        gptlab.train(recipe, tmp_path, quiet=True)

    resolved = RunDir(tmp_path).read_recipe()
    model = build_model(resolved.model, "cpu", torch.float64, resolved.seed)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0}],
        betas=(0.9, 0.95),
        eps=1e-8,
        foreach=False,
        fused=False,
    )
    windows = Windows(Dataset(dataset).train, 32, "shuffled", seed=f"{resolved.seed}/data/0")
    losses, norms, rates = [], [], []
    for step in range(12):
        batch = torch.from_numpy(windows.batch(8 * step, 8))
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
        for p in model.parameters():
            p.grad.mul_(min(1, 0.5 / (norm + 1e-6)))  # as torch.nn.utils.clip_grad_norm_
        rate = 1e-2 * (step + 1) / 5 if step < 5 else 1e-3 + 9e-3 * (1 + math.cos(math.pi * (step - 5) / 7)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        losses.append(loss.item())
        norms.append(norm)
        rates.append(rate)
    assert lines(tmp_path, "loss") == pytest.approx(losses, rel=logged)
    assert lines(tmp_path, "grad_norm") == pytest.approx(norms, rel=logged)
    assert lines(tmp_path, "lr") == pytest.approx(rates, rel=1e-12)


def test_the_pieces_of_a_batch_do_not_matter(dataset: Path, tmp_path: Path) -> None:
    """8 sequences as 8, as 3 + 3 + 2 and as eight times 1: a mean over micro-batches would fail on the ragged one."""
    curves = {}
    for size in (8, 3, 1):
        recipe = tiny_recipe(dataset, model__dropout=0.0, batch__micro_batch=size, train__max_steps=10)
        with float64():
            gptlab.train(recipe, tmp_path / str(size), quiet=True)
        curves[size] = lines(tmp_path / str(size), "loss") + lines(tmp_path / str(size), "val_loss")
    logged = 4 * torch.finfo(torch.float32).eps  # the runs agree to 1e-15
    assert curves[3] == pytest.approx(curves[8], rel=logged)
    assert curves[1] == pytest.approx(curves[8], rel=logged)


def test_a_run_leaves_the_number_of_threads_as_it_was(dataset: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    gptlab.train(tiny_recipe(dataset, train__max_steps=1, train__threads=before + 1), tmp_path, quiet=True)
    assert RunDir(tmp_path).read_json("environment.json")["threads"] == before + 1
    assert torch.get_num_threads() == before


def test_a_run_learns_what_there_is_to_learn(dataset: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(dataset, train__max_steps=150, model__dropout=0.0, train__eval_every=0)
    result = gptlab.train(recipe, tmp_path, quiet=True)
    ids = Dataset(dataset).val.gather(np.array([0]), len(Dataset(dataset).val))[0]
    shares = np.bincount(ids) / len(ids)
    entropy = -(shares[shares > 0] * np.log(shares[shares > 0])).sum()  # what counting characters alone could reach
    assert result.final_val_loss < entropy - 0.7
    assert result.val_perplexity == pytest.approx(math.exp(result.final_val_loss))


def test_emulated_float8_is_said(dataset: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    small = {"model__n_layer": 1, "model__n_embd": 16, "model__block_size": 16, "train__max_steps": 2}
    for name in ("fp8_rowwise", "amp_bf16"):
        gptlab.train(tiny_recipe(dataset, precision__regime=name, **small), tmp_path / name, quiet=True)
        said = RunDir(tmp_path / name).read_json("environment.json").get("float8")
        assert said == ("emulated in float32" if name == "fp8_rowwise" else None)
    layer = load_run(tmp_path / "fp8_rowwise", device="cpu").model.h[0].mlp.c_fc
    assert layer.config.emulate  # what is loaded multiplies as what was trained


@pytest.mark.parametrize("name", ["amp_bf16", "amp_fp16", "bf16_pure"])
def test_a_regime_stores_and_multiplies_in_its_formats(dataset: Path, tmp_path: Path, name: str) -> None:
    small = {"model__n_layer": 1, "model__n_embd": 16, "model__block_size": 16, "model__dropout": 0.0}
    seen: dict[str, torch.dtype] = {}
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, _, out: seen.__setitem__(type(module).__name__, out.dtype) if torch.is_tensor(out) else None
    )
    try:
        gptlab.train(
            tiny_recipe(dataset, precision__regime=name, train__max_steps=8, **small), tmp_path / name, quiet=True
        )
    finally:
        hook.remove()
    low = {"amp_bf16": torch.bfloat16, "amp_fp16": torch.float16, "bf16_pure": torch.bfloat16}[name]
    assert seen["Linear"] == low
    assert seen["LayerNorm"] == (torch.bfloat16 if name == "bf16_pure" else torch.float32)
    assert seen["GPT"] == torch.float32  # the loss, whatever the regime
    run = load_run(tmp_path / name, device="cpu")
    assert {p.dtype for p in run.model.parameters()} == {REGIMES[name].weights}
    assert ("loss_scale" in RunDir(tmp_path / name).read_metrics()[-2]) == (name == "amp_fp16")
    gptlab.train(tiny_recipe(dataset, train__max_steps=8, **small), tmp_path / "fp32", quiet=True)
    full, half = lines(tmp_path / "fp32", "loss"), lines(tmp_path / name, "loss")
    assert half == pytest.approx(full, rel=0.03)
    assert half != full


def test_a_scaled_step_that_overflows_is_skipped_and_training_goes_on(dataset: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        dataset,
        precision__regime="amp_fp16",
        model__n_layer=1,
        model__n_embd=16,
        model__block_size=16,
        train__max_steps=6,
        optim__lr=1e-3,
    )
    original = torch.amp.GradScaler.__init__
    try:  # a first scale that overflows float16 for sure
        torch.amp.GradScaler.__init__ = lambda self, device, enabled: original(self, device, 2.0**40, enabled=enabled)
        result = gptlab.train(recipe, tmp_path, quiet=True)
    finally:
        torch.amp.GradScaler.__init__ = original
    assert result.status == "completed"
    scales = lines(tmp_path, "loss_scale")
    assert scales[0] == 2.0**39
    assert (
        "null" in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[1]
    )  # a gradient norm that is no number
    assert len(set(lines(tmp_path, "loss"))) == 6


def test_activation_checkpointing_changes_memory_and_not_the_losses(dataset: Path, tmp_path: Path) -> None:
    for name in (True, False):
        recipe = tiny_recipe(dataset, train__activation_checkpointing=name, train__max_steps=6)
        gptlab.train(recipe, tmp_path / str(name), quiet=True)
    assert lines(tmp_path / "True", "loss") == pytest.approx(lines(tmp_path / "False", "loss"), rel=1e-6)


@pytest.mark.slow
@pytest.mark.compiles
def test_compiled_trains_as_eager_does(dataset: Path, tmp_path: Path) -> None:
    for name in (True, False):
        recipe = tiny_recipe(dataset, compile__enabled=name, model__dropout=0.0)
        assert gptlab.train(recipe, tmp_path / str(name), quiet=True).status == "completed"
    for key in ("loss", "val_loss", "train_eval_loss"):
        assert lines(tmp_path / "True", key) == pytest.approx(lines(tmp_path / "False", key), rel=1e-4)


@pytest.mark.slow
@pytest.mark.compiles
def test_compiled_evaluation_compiles_no_shape_twice(dataset: Path, tmp_path: Path) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    recipe = tiny_recipe(dataset, compile__enabled=True, batch__micro_batch=4, eval__tokens=32 * 11, eval__train=False)
    gptlab.train(recipe, tmp_path, quiet=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # training and evaluation


def test_documents_are_kept_apart_where_asked(dataset: Path, tmp_path: Path) -> None:
    for name in (True, False):
        recipe = tiny_recipe(dataset, model__document_attention=name, model__dropout=0.0, train__max_steps=3)
        gptlab.train(recipe, tmp_path / str(name), quiet=True)
    assert lines(tmp_path / "True", "val_loss")[0] != lines(tmp_path / "False", "val_loss")[0]
    scores = evaluate_run(load_run(tmp_path / "True", device="cpu"), ["loss"], {})
    assert scores["val_loss"] == pytest.approx(lines(tmp_path / "True", "val_loss")[-1], rel=0.2)


def test_a_mixture_takes_its_shares(dataset: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(dataset, other)
    mixture = {str(dataset): 0.75, str(other): 0.25}
    recipe = tiny_recipe(dataset).replace({"data.path": "", "data.mixture": mixture, "train.max_steps": 2})
    assert gptlab.train(recipe, tmp_path / "run", quiet=True).status == "completed"
    assert RunDir(tmp_path / "run").read_recipe().data.mixture == mixture

    with pytest.raises(DataError, match="names one folder twice"):
        gptlab.train(
            recipe.replace({"data.mixture": {str(other): 1.0, f"{other}/.": 1.0}}), tmp_path / "no", quiet=True
        )
    (other / "tokenizer.json").write_text('{"kind": "byte"}', encoding="utf-8")
    with pytest.raises(DataError, match="was made with another tokenizer"):
        gptlab.train(recipe, tmp_path / "no", quiet=True)
    with pytest.raises(UserError, match="has another tokenizer than"):
        start = {"data.path": str(other), "data.mixture": {}, "train.init_from": str(tmp_path / "run")}
        gptlab.train(recipe.replace(start), tmp_path / "no", quiet=True)
    assert not (tmp_path / "no").exists()


def test_ids_outside_the_vocabulary_stop_before_training(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="and a vocabulary of 5 ends at 4"):
        gptlab.train(tiny_recipe(dataset, model__vocab_size=5), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_model_larger_than_memory_is_a_result(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptlab.planning.plan.TOO_MUCH", math.inf)  # the plan lets it begin
    result = gptlab.train(tiny_recipe(dataset, model__vocab_size=10**12), tmp_path / "run", quiet=True)
    assert (result.status, result.steps) == ("out_of_memory", 0)
    assert result.memory_asked_gb == pytest.approx(10**12 * 32 * 4 / 1e9)
    assert result.memory_free_gb and result.memory_total_gb
    assert result.memory_free_gb < result.memory_total_gb < result.memory_asked_gb
    run = RunDir.open(tmp_path / "run")
    assert run.read_json("result.json") == result.to_json()
    assert run.read_recipe().model.vocab_size == 10**12


def test_a_gpu_without_room_is_a_result(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    says = "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 79.11 GiB ..."

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError(says)

    monkeypatch.setattr("gptlab.training.trainer.make_optimizer", full)
    result = gptlab.train(tiny_recipe(dataset), tmp_path / "run", quiet=True)
    assert result.status == "out_of_memory" and result.reason.startswith(says)
    assert result.memory_asked_gb == pytest.approx(1.5 * 2**30 / 1e9)


def too_large(monkeypatch: pytest.MonkeyPatch, most: int, after: int = 0) -> None:
    """A device that has room for so many sequences at a time, from the so many-th call on."""
    forward, calls = GPT.forward, 0

    def full(self: GPT, tokens: torch.Tensor, *rest: Any) -> Any:
        nonlocal calls
        calls += self.training
        if self.training and len(tokens) > most and calls > after:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, tokens, *rest)

    monkeypatch.setattr(GPT, "forward", full)


def test_out_of_memory_in_the_first_steps_takes_less_at_a_time(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    auto = tiny_recipe(dataset, batch__micro_batch="auto", model__dropout=0.0)
    whole = gptlab.train(auto, tmp_path / "whole", quiet=True)
    assert RunDir(tmp_path / "whole").read_recipe().batch.micro_batch == 8  # all of a step
    too_large(monkeypatch, 2)
    result = gptlab.train(auto, tmp_path / "run")
    said = capsys.readouterr().err
    assert "with micro-batches of 8 sequences: trying again with 4" in said
    assert "with micro-batches of 4 sequences: trying again with 2" in said
    assert (result.status, result.steps) == ("completed", 24)
    assert RunDir(tmp_path / "run").read_recipe().batch.micro_batch == 2
    assert result.final_val_loss == pytest.approx(whole.final_val_loss, rel=1e-4)  # the same tokens a step
    too_large(monkeypatch, 0)
    assert gptlab.train(auto, tmp_path / "none", quiet=True).status == "out_of_memory"


def test_a_micro_batch_that_was_given_is_not_changed(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    too_large(monkeypatch, 2)
    result = gptlab.train(tiny_recipe(dataset, batch__micro_batch=4), tmp_path / "run", quiet=True)
    assert (result.status, result.steps) == ("out_of_memory", 0)
    assert result.reason is not None and "--batch.micro-batch 2 needs less" in result.reason
    assert RunDir(tmp_path / "run").read_recipe().batch.micro_batch == 4


def test_out_of_memory_later_ends_the_run(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    too_large(monkeypatch, 2, after=15)
    recipe = tiny_recipe(dataset, batch__micro_batch="auto", checkpoint__every=0)
    assert gptlab.train(recipe, tmp_path / "run", quiet=True).status == "out_of_memory"
    assert RunDir(tmp_path / "run").read_recipe().batch.micro_batch == 8


def test_tensorboard_gets_the_curves_and_wandb_is_asked_for_by_name(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gptlab.train(tiny_recipe(dataset, log__to=["tensorboard"], train__max_steps=3), tmp_path / "run", quiet=True)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(lines(tmp_path / "run", "loss"))
    assert [event.step for event in events.Scalars("val/loss")] == [0, 3]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb cannot be imported"):
        gptlab.train(tiny_recipe(dataset, log__to=["wandb"]), tmp_path / "other", quiet=True)


def test_the_environment_is_written_down(dataset: Path, tmp_path: Path) -> None:
    gptlab.train(tiny_recipe(dataset, train__max_steps=1), tmp_path, quiet=True)
    environment = json.loads((tmp_path / "environment.json").read_text(encoding="utf-8"))
    model = load_run(tmp_path, device="cpu").model
    assert environment["parameters"] == sum(p.numel() for p in model.parameters())
    assert environment["torch"] == torch.__version__
    assert environment["threads"] == torch.get_num_threads()
    assert environment["data"]["train_tokens"] == len(Dataset(dataset).train)
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert result["cpu_seconds"] > 0
    assert result["wall_seconds"] > 0


# -- parts


def test_schedules_have_their_shapes() -> None:
    def rates(shape: str, **changes: object) -> list[float]:
        schedule = Schedule(shape=shape, warmup_steps=10, decay_steps=110, min_lr=0.1, **changes)
        return [learning_rate(step, 1.0, schedule) for step in range(130)]

    for shape in ("cosine", "linear", "constant", "wsd", "wsd-sqrt"):
        assert rates(shape)[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert rates("constant")[10:] == [1.0] * 120
    for shape in ("cosine", "linear"):
        curve = rates(shape)
        assert curve[10] == 1.0
        assert curve[60] == pytest.approx(0.55)  # half-way both are half-way
        assert curve[110:] == [0.1] * 20
        assert curve[10:111] == sorted(set(curve[10:111]), reverse=True)
    assert rates("cosine")[35] > rates("linear")[35] == pytest.approx(0.775)
    wsd = rates("wsd", decay_fraction=0.2)
    assert wsd[10:89] == [1.0] * 79
    assert wsd[99] == pytest.approx(0.1 + 0.9 * 0.5)
    assert wsd[110] == 0.1
    root = rates("wsd-sqrt", decay_fraction=0.2)  # steps 88 to 110
    assert root[10:89] == [1.0] * 79 and root[110:] == [0.1] * 20
    assert root[88:110] == pytest.approx([0.1 + 0.9 * (1 - (i / 22) ** 0.5) for i in range(22)])
    longer = Schedule(shape="cosine", warmup_steps=500, decay_steps=100, min_lr=0.0)  # a warm-up longer than the run
    assert learning_rate(99, 1.0, longer) == pytest.approx(0.2)


def test_groups_cover_every_parameter_once(dataset: Path) -> None:
    recipe = tiny_recipe(dataset, model__vocab_size=64, model__norm="rmsnorm", model__tied=False)
    model = build_model(recipe.model)
    decays, rest = parameter_groups(model, 0.1)
    assert len(decays["params"]) + len(rest["params"]) == len(list(model.parameters()))
    assert {p.dim() for p in decays["params"]} == {2}
    assert {p.dim() for p in rest["params"]} == {1}
    assert (decays["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert make_optimizer(model, recipe.optim).defaults["fused"]


def test_the_stopwatch_leaves_out_pauses_and_the_first_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    watch = Stopwatch(torch.device("cpu"))

    def steps(*seconds: float) -> None:
        watch.start()
        for each in seconds:
            now[0] += each
            watch.step()

    steps(50.0)  # compiles
    assert watch.lap() == 50.0
    steps(*[1.0] * 4, *[3.0] * 5)
    watch.pause()
    now[0] += 1000.0  # an evaluation
    steps(5.0)
    assert watch.lap() == pytest.approx(24 / 10)
    assert watch.steady() == [3.0] * 5 + [5.0]  # of eleven steps the first five are left out
    steps(*[3.0] * 12)
    watch.lap()
    assert watch.steady() == [5.0] + [3.0] * 12  # of more than twenty the first ten
    assert Stopwatch(torch.device("cpu")).steady() == []
    assert percentile([float(n) for n in range(1, 101)], 0.95) == 95.0 and percentile([7.0], 0.95) == 7.0


def test_auto_micro_batch_is_a_size_that_divides_work_and_fits(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe(dataset, model__vocab_size=64, batch__micro_batch="auto")
    assert auto_micro_batch(resolve_recipe(recipe, "cpu"), torch.device("cpu")) == 8  # all of a small step
    big = recipe.replace({"model.preset": "gpt2", "model.block_size": 1024, "batch.tokens_per_step": 524288})
    free = 0.0
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": free})())
    sizes = []
    for gigabytes in (4, 16, 64, 256):
        free = gigabytes * 1e9
        sizes.append(auto_micro_batch(resolve_recipe(big, "cpu"), torch.device("cpu")))
    assert sizes == sorted(sizes)
    assert sizes[0] == 1
    assert all(size & (size - 1) == 0 for size in sizes)


def test_hellaswag_is_measured_on_the_way_and_disturbs_nothing(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"ind": i, "ctx": "the cat sat on", "endings": ["a mat", "the dog", "an old man", "red hats"], "label": i % 4}
        for i in range(12)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    changes = {"model__block_size": 64, "hellaswag__every": 4}
    gptlab.train(tiny_recipe(dataset, **changes, hellaswag__path=str(file)), tmp_path / "with", quiet=True)
    gptlab.train(tiny_recipe(dataset, **changes), tmp_path / "without")
    assert "HellaSwag is left out" in capsys.readouterr().err
    measured = [line for line in RunDir(tmp_path / "with").read_metrics() if "hellaswag_acc" in line]
    assert [line["step"] for line in measured] == [0, 4, 8, 12, 16, 20, 24]
    assert ["val_loss" in line for line in measured] == [True, False, False, True, False, False, True]
    assert {line["hellaswag_acc"] for line in measured} == {0.25}  # one context, and each ending is right as often
    assert lines(tmp_path / "with", "loss") == lines(tmp_path / "without", "loss")
    results = [
        json.loads(line)
        for line in (tmp_path / "with/hellaswag_results.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [row["label"] for row in results] == [0, 1, 2, 3] * 3
    run = load_run(tmp_path / "with", device="cpu")
    scores = evaluate_run(run, ["hellaswag"], {})
    assert (scores["hellaswag_acc"], scores["hellaswag_rows"]) == (0.25, 12)
    assert scores["hellaswag_acc_low"] < 0.25 < scores["hellaswag_acc_high"]
    with pytest.raises(UserError, match="there is no HellaSwag file nowhere"):
        evaluate_run(run, ["hellaswag"], {"hellaswag.path": "nowhere"})


def test_samples_while_training_disturb_nothing(dataset: Path, tmp_path: Path) -> None:
    """Every sixth step and at both ends two completions, the same whenever they are drawn, and the same losses."""
    plain = tiny_recipe(dataset, train__max_steps=12)
    sampled = tiny_recipe(
        dataset, train__max_steps=12, sample__every=6, sample__number=2, sample__max_tokens=40, sample__prompt="the cat"
    )
    for name, recipe in (("plain", plain), ("sampled", sampled)):
        gptlab.train(recipe, tmp_path / name, quiet=True)
    losses = [
        [(line["step"], line.get("loss"), line.get("val_loss")) for line in RunDir(tmp_path / name).read_metrics()]
        for name in ("plain", "sampled")
    ]
    assert losses[0] == losses[1]
    files = sorted((tmp_path / "sampled/samples").iterdir())
    assert [file.name for file in files] == ["step-00000000.txt", "step-00000006.txt", "step-00000012.txt"]
    texts = [file.read_text(encoding="utf-8").removesuffix("\n").split("\n---\n") for file in files]
    assert all(len(both) == 2 and both[0] != both[1] and both[0].startswith("the cat") for both in texts)
    assert not (tmp_path / "plain/samples").exists()
    run = load_run(tmp_path / "sampled")
    assert run.sample(samples=2) == texts[-1]


def test_a_run_without_its_tokenizer_can_be_started_from(dataset: Path, tmp_path: Path) -> None:
    gptlab.train(tiny_recipe(dataset, train__max_steps=2), tmp_path / "first", quiet=True)
    (tmp_path / "first/tokenizer.json").unlink()
    again = tiny_recipe(dataset, train__max_steps=1, train__init_from=str(tmp_path / "first"))
    assert gptlab.train(again, tmp_path / "second", quiet=True).status == "completed"
