"""One run on several processes is the run on one: its losses, its order of data, its checkpoints."""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from conftest import WORDS, tiny_recipe
from processes import HANGS, float64, free_port, killed, together
from test_training_resume import measured

from gptlab.config import build_recipe
from gptlab.data.prepare import prepare
from gptlab.distributed.world import SINGLE, SharedFlag, World
from gptlab.errors import UserError
from gptlab.interop.hf import export_hf
from gptlab.model.gpt import GPT
from gptlab.rundir import RunDir
from gptlab.tasks.lm import LanguageModelling
from gptlab.training import loop
from gptlab.training.checkpoint import find_checkpoint, list_checkpoints
from gptlab.training.load import load_run
from gptlab.training.loop import train

STEPS = 50
pytestmark = pytest.mark.xdist_group("parallel")  # they share processes that take seconds to start


def hellaswag(folder: Path) -> Path:
    draw = random.Random(1)
    lines = [
        {
            "ind": i,
            "ctx": " ".join(draw.choices(WORDS, k=4)),
            "label": i % 4,
            "endings": [" ".join(draw.choices(WORDS, k=draw.choice((1, 2)))) for _ in range(4)],
        }
        for i in range(11)
    ]
    path = folder / "hellaswag.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def job(dataset: Path, out: Path, **changes: object) -> tuple[str, str, dict[str, Any]]:
    """A run of 7 sequences a step: 3 + 3 + 1 on one process, 3 and 4 on two, 1, 2, 2 and 2 on four."""
    given = {
        "model__dropout": 0.0,
        "batch__tokens_per_step": 224,
        "train__max_steps": STEPS,
        "train__eval_every": 20,
        "checkpoint__every": 25,
        "optim__lr": 3e-3,
        **changes,
    }
    return str(dataset), str(out), given


def run_jobs(jobs: list[tuple[str, str, dict[str, Any]]], ports: list[int]) -> list[dict[str, Any]]:
    """Train one after another, in this process of several (or alone), and in float64."""
    results = []
    for (dataset, out, changes), port in zip(jobs, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        try:
            with float64():
                results.append(train(tiny_recipe(Path(dataset), **changes), out, quiet=True).to_json())
        except UserError as error:
            results.append({"error": str(error)})
    return results


def on(n: int, jobs: list[tuple[str, str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Results of the first process, that of the others being the same."""
    ports = [free_port() for _ in jobs]
    if n == 1:
        return run_jobs(jobs, ports)
    first, *others = together(n, run_jobs, jobs, ports)
    assert all(other == first for other in others)
    return first


def curves(run: Path) -> dict[str, dict[int, float]]:
    kinds = ("loss", "grad_norm", "val_loss", "train_eval_loss", "hellaswag_acc_norm", "largest_logit", "lr")
    lines = RunDir(run).read_metrics()
    return {kind: {line["step"]: line[kind] for line in lines if kind in line} for kind in kinds}


LOGGED = 4 * torch.finfo(torch.float32).eps  # float64 runs agree to 1e-15, and norms and logits are logged in float32


def assert_same_curves(one: Path, other: Path, tolerance: float = LOGGED) -> None:
    first, second = curves(one), curves(other)
    for kind, points in first.items():
        if kind == "hellaswag_acc_norm" and not second[kind]:
            continue  # a run without it
        assert points.keys() == second[kind].keys(), kind
        for step, value in points.items():
            assert second[kind][step] == pytest.approx(value, rel=tolerance), (kind, step)


@pytest.fixture(scope="module")
def alone(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on one process, with HellaSwag."""
    folder = tmp_path_factory.mktemp("alone")
    path = hellaswag(folder)
    on(1, [job(dataset, folder / "run", hellaswag__path=str(path), hellaswag__every=25)])
    return folder


@pytest.mark.parametrize("n", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_train_the_run_of_one(dataset: Path, alone: Path, tmp_path: Path, n: int) -> None:
    extra = {"hellaswag__path": str(alone / "hellaswag.jsonl"), "hellaswag__every": 25}
    results = on(
        n,
        [
            job(dataset, tmp_path / "ddp", **extra),
            job(dataset, tmp_path / "fsdp", distributed__strategy="fsdp", **extra),
            *(
                [job(dataset, tmp_path / "hybrid", distributed__strategy="fsdp", distributed__shard_over=2, **extra)]
                if n == 4
                else []
            ),
        ],
    )
    whole = RunDir(alone / "run").read_json("result.json")
    for strategy, result in zip(("ddp", "fsdp", "hybrid"), results, strict=n == 4):
        assert result["status"] == "completed"
        assert_same_curves(alone / "run", tmp_path / strategy)
        assert result["final_val_loss"] == pytest.approx(whole["final_val_loss"], rel=LOGGED)
        rows = (tmp_path / strategy / "hellaswag_results.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(rows) == 11
        assert RunDir(tmp_path / strategy).read_json("environment.json")["processes"] == n
    with float64():
        one, other = load_run(alone / "run").model, load_run(tmp_path / "fsdp")  # from the files of n processes
        models = [other.model, *([load_run(tmp_path / "hybrid").model] if n == 4 else [])]
    for model in models:
        for (name, p), q in zip(one.named_parameters(), model.parameters(), strict=True):
            assert p.dtype is torch.float64
            # a gradient off by 1e-15, over AdamW's eps of 1e-8, times 50 steps of 3e-3
            torch.testing.assert_close(p, q, rtol=0, atol=1e-7, msg=name)
    if n == 4:
        assert len(list((tmp_path / "hybrid/checkpoints/step-00000050").glob("model-*"))) == 2  # of one copy
    export_hf(other.model, other.tokenizer, tmp_path / "hf")
    assert (tmp_path / "hf/model.safetensors").is_file()


MODERN = {
    "model__position": "rope",
    "model__norm": "rmsnorm",
    "model__mlp": "swiglu",
    "model__bias": False,
    "model__qk_norm": True,
    "model__tied": False,
    "model__document_attention": True,
}
SPARSE = {"sparsity__target": 0.5, "sparsity__every": 2, "sparsity__begin": 0.1, "sparsity__end": 0.6}
# Settings, and how far losses may be apart. Sums in another order round to 16 bits another way now and then: one such
# step moves an activation by an epsilon, and a loss is the mean over 224 tokens of what that does to their logits.
CASES: dict[str, tuple[dict[str, object], float]] = {
    "modern": (MODERN, LOGGED),
    "checkpointing": ({"train__activation_checkpointing": True}, LOGGED),
    "amp_bf16": ({"precision__regime": "amp_bf16"}, 2**-7),
    "amp_fp16": ({"precision__regime": "amp_fp16"}, 2**-7),
    "bf16_pure": ({"precision__regime": "bf16_pure"}, 2**-5),
    "no clipping": ({"optim__grad_clip": 0.0, "optim__name": "sgd", "optim__lr": 0.1}, LOGGED),
    "muon": ({"optim__name": "muon"}, LOGGED),
    "normuon": ({"optim__name": "normuon", "optim__cautious_decay": True}, LOGGED),
    "schedule-free": ({"optim__name": "adamw-schedule-free", "schedule__shape": "constant"}, LOGGED),
    "ema": ({"train__ema": 0.8}, LOGGED),
    "spam": ({"optim__name": "adamw-spam", "optim__spam_interval": 5, "faults__gradient_every": 4}, LOGGED),
    "magnitude": ({"sparsity__method": "magnitude", **SPARSE}, LOGGED),
    "state": ({"optim__name": "adamw-prune", "sparsity__method": "state", **SPARSE}, LOGGED),
    "rigl": ({"sparsity__method": "rigl", "optim__name": "muon", **SPARSE}, LOGGED),
    "bad batches": ({"faults__batch_every": 3}, LOGGED),
}


@pytest.mark.slow
def test_whatever_is_trained_is_what_one_process_trains(dataset: Path, tmp_path: Path) -> None:
    short = {"train__max_steps": 12, "train__eval_every": 6, "checkpoint__every": 0, "schedule__warmup_steps": 2}
    wanted = [(name, strategy) for name in CASES for strategy in ("ddp", "fsdp")]
    alone = on(1, [job(dataset, tmp_path / name / "alone", **short, **CASES[name][0]) for name in CASES])
    several = on(
        2,
        [
            job(dataset, tmp_path / name / strategy, distributed__strategy=strategy, **short, **CASES[name][0])
            for name, strategy in wanted
        ],
    )
    one = dict(zip(CASES, alone, strict=True))
    for (name, strategy), result in zip(wanted, several, strict=True):
        assert result.get("status") == "completed", (name, strategy, result)
        try:
            assert_same_curves(tmp_path / name / "alone", tmp_path / name / strategy, CASES[name][1])
        except AssertionError as error:
            raise AssertionError(f"{name}, {strategy}: {error}") from None
        assert result.get("sparsity") == one[name].get("sparsity")


def classify(n: int, data: str, out: str) -> list[dict[str, Any]]:
    """A classifier of 16 documents a step in micro-batches of 3, on n processes or alone."""
    base = {
        "task": "classify",
        "model.n_layer": 2,
        "model.n_head": 2,
        "model.n_embd": 32,
        "model.block_size": 64,
        "model.mlp": "gelu_erf",
        "data.path": data,
        "batch.micro_batch": 3,
        "batch.tokens_per_step": 1024,
        "optim.lr": 2e-3,
        "train.max_steps": 8,
        "train.eval_every": 4,
        "log.every": 1,
        "eval.tokens": 2048,
        "train.device": "cpu",
    }
    results = []
    for strategy in ("ddp", "fsdp") if n > 1 else ("ddp",):
        recipe = build_recipe(base, {"distributed.strategy": strategy})
        with float64():
            results.append(train(recipe, Path(out) / f"{strategy}{n}", quiet=True).to_json())
        os.environ["MASTER_PORT"] = str(int(os.environ.get("MASTER_PORT", 0)) + 1)
    return results


@pytest.mark.slow
def test_a_classifier_too(tmp_path: Path) -> None:
    draw = random.Random(0)
    lines = [json.dumps({"text": " ".join(draw.choices(WORDS, k=draw.randint(2, 12)))}) for _ in range(120)]
    lines = [line[:-1] + f', "labels": {json.dumps(sorted(set(draw.choices("abc", k=2))))}}}' for line in lines]
    (tmp_path / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    data = prepare(str(tmp_path / "train.jsonl"), out=tmp_path / "data", tokenizer="byte", label_field="labels")
    [one] = classify(1, str(data), str(tmp_path))
    results, _ = together(2, classify, 2, str(data), str(tmp_path))
    for strategy, result in zip(("ddp2", "fsdp2"), results, strict=True):
        assert_same_curves(tmp_path / "ddp1", tmp_path / strategy)
        assert result["micro_f1"] == pytest.approx(one["micro_f1"], abs=1e-6)
        assert result["samples"] == one["samples"] == 128


def killed_at(step: int, dataset: str, out: str, changes: dict[str, Any]) -> None:
    """Train until update `step`, where this process is killed: all of them, at one step."""
    original = LanguageModelling.micro_batches

    def micro_batches(self: Any, at: int, micro_batch: int) -> Any:
        if at == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, at, micro_batch)

    LanguageModelling.micro_batches = micro_batches  # type: ignore[method-assign]
    with float64():
        train(tiny_recipe(Path(dataset), **changes), out, quiet=True)


@pytest.mark.slow
@pytest.mark.parametrize("first, second", [("fsdp", "ddp"), ("ddp", "fsdp")])
def test_killed_on_four_it_goes_on_with_two_and_ends_alone(
    dataset: Path, alone: Path, tmp_path: Path, first: str, second: str
) -> None:
    run, often = tmp_path / "run", {"checkpoint__every": 8}
    codes = killed(4, killed_at, 18, *job(dataset, run, distributed__strategy=first, **often))
    assert -signal.SIGKILL in codes and 0 not in codes
    assert max(curves(run)["loss"]) >= 17
    [checkpoint] = list_checkpoints(RunDir(run))[-1:]
    assert (checkpoint / "index.json").exists() == (first == "fsdp")
    codes = killed(2, killed_at, 33, *job(dataset, run, distributed__strategy=second, **often))
    assert -signal.SIGKILL in codes and 0 not in codes
    [result] = on(1, [job(dataset, run, **often)])
    assert result["status"] == "completed"
    assert_same_curves(alone / "run", run)


@pytest.mark.slow
def test_averages_that_two_processes_have_saved_go_on_with_one(dataset: Path, tmp_path: Path) -> None:
    """The rows of raw weights, of z and of a second moment per neuron, and the numbers that belong to no parameter."""
    short = {"train__max_steps": 12, "train__eval_every": 6, "schedule__warmup_steps": 2, "schedule__decay_steps": 12}
    names = ("ema", "schedule-free", "normuon")
    sharded = {"distributed__strategy": "fsdp", "train__max_steps": 6}
    on(1, [job(dataset, tmp_path / name / "alone", **short, **CASES[name][0]) for name in names])
    on(2, [job(dataset, tmp_path / name / "run", **{**short, **CASES[name][0], **sharded}) for name in names])
    results = on(1, [job(dataset, tmp_path / name / "run", **short, **CASES[name][0]) for name in names])
    for name, result in zip(names, results, strict=True):
        assert result.get("status") == "completed", (name, result)
        one, other = (RunDir(tmp_path / name / run).read_json("result.json") for run in ("alone", "run"))
        assert one["final_val_loss"] == pytest.approx(other["final_val_loss"], rel=LOGGED)
        assert_same_curves(tmp_path / name / "alone", tmp_path / name / "run")


def test_rows_of_a_step_are_shared_without_gap_or_overlap() -> None:
    for n in range(1, 40):
        for size in range(1, 9):
            for most in range(1, 6):
                shares = [(n * r // size, n * (r + 1) // size) for r in range(size)]
                worlds = [World(r, size) for r in range(size)]
                try:
                    cuts = [w.pieces(b - a, n, most) for w, (a, b) in zip(worlds, shares, strict=True)]
                except UserError as error:
                    assert n < size or (most == 1 and n % size), error
                    continue
                assert len({len(cut) for cut in cuts}) == 1  # as many for each, for all to meet
                for cut, (a, b) in zip(cuts, shares, strict=True):
                    rows = [i for piece in cut for i in range(piece.start, piece.stop)]
                    assert rows == list(range(b - a))
                    assert all(0 < piece.stop - piece.start <= most for piece in cut)
    assert World().pieces(7, 7, 3) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert list(World(1, 3).share("abcd")) == ["b", None]
    torch.testing.assert_close(World().sum(torch.ones(2)), torch.ones(2))


@pytest.mark.slow
def test_what_is_refused_is_refused_in_all_of_them_and_nothing_is_written(dataset: Path, tmp_path: Path) -> None:
    with RunDir(tmp_path / "held").lock():
        results = on(
            2,
            [
                job(dataset, tmp_path / "held"),
                job(dataset, tmp_path / "few", batch__tokens_per_step=96, batch__micro_batch=1),
                job(dataset, tmp_path / "none", distributed__strategy="none"),
                job(dataset, tmp_path / "third", distributed__strategy="fsdp", distributed__shard_over=3),
            ],
        )
        assert not (tmp_path / "held/result.json").exists()
    for result, says in zip(
        results,
        (
            "is being trained by another process",
            "3 sequences a step cannot be shared by 2 processes in micro-batches of 1",
            "distributed.strategy = none: 2 processes were started",
            "distributed.shard_over = 3: does not divide the 2 processes",
        ),
        strict=True,
    ):
        assert says in result["error"]
    assert not any((tmp_path / name).exists() for name in ("few", "none", "third"))


def whole_models(dataset: str, out: str, changes: dict[str, Any]) -> int:
    """Train; the most models that are not spread over processes and are there while a step is taken."""
    original, found = LanguageModelling.micro_batches, []

    def micro_batches(self: Any, at: int, micro_batch: int) -> Any:
        models = [thing for thing in gc.get_objects() if type(thing) is GPT]  # FSDP's have a class of their own
        found.append(sum(model.device.type != "meta" for model in models))  # and the planner's have no memory
        return original(self, at, micro_batch)

    LanguageModelling.micro_batches = micro_batches  # type: ignore[method-assign]
    train(tiny_recipe(Path(dataset), **changes), out, quiet=True)
    return max(found)


@pytest.mark.slow
def test_fsdp_has_a_whole_copy_for_an_evaluation_only(dataset: Path, tmp_path: Path) -> None:
    fsdp = job(dataset, tmp_path / "run", distributed__strategy="fsdp", train__max_steps=4, train__eval_every=2)
    assert together(2, whole_models, *fsdp) == [0, 0]


def torchrun(n: int, dataset: Path, out: Path, *flags: str) -> subprocess.Popen[str]:
    """`torchrun ... -m gptlab train` of the run that `job` describes, as a user starts it."""
    recipe = out.parent / "recipe.toml"
    _, _, changes = job(dataset, out)
    recipe.write_text(tiny_recipe(dataset, **changes).to_toml(), encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nproc-per-node={n}",
            f"--master-port={free_port()}",
            "-m",
            "gptlab",
            "train",
            str(recipe),
            "--out",
            str(out),
            *flags,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_job_and_the_run_goes_on(dataset: Path, tmp_path: Path) -> None:
    out, flags = tmp_path / "run", ("--checkpoint.every", "5", "--distributed.strategy", "fsdp")
    began = torchrun(2, dataset, out, *flags)
    try:
        while not list_checkpoints(RunDir(out)):
            assert began.poll() is None, began.stdout.read()
            time.sleep(0.05)
        [agent] = [psutil.Process(began.pid)]
        by_rank = {int(child.environ()["RANK"]): child for child in agent.children()}
        by_rank[1].send_signal(signal.SIGKILL)
        said, _ = began.communicate(timeout=HANGS)
    finally:
        if began.poll() is None:
            os.killpg(began.pid, signal.SIGKILL)
    assert began.returncode != 0
    assert "rank 0 of 2 lost rank 1, which ended or hangs" in said
    cause = said[said.index("Root Cause") :]
    assert "rank      : 1" in cause and "Signal 9" in cause
    assert RunDir(out).read_json("result.json")["status"] == "failed"
    again = torchrun(2, dataset, out, *flags)
    said, _ = again.communicate(timeout=HANGS)
    assert again.returncode == 0, said
    assert said.count("completed after 50 steps") == 1  # one process prints
    assert (out / "card.md").exists()
    unbroken = torchrun(2, dataset, tmp_path / "unbroken", *flags)
    said, _ = unbroken.communicate(timeout=HANGS)
    assert unbroken.returncode == 0, said
    assert measured(tmp_path / "unbroken") == measured(out)
    for p, q in zip(*(load_run(run).model.parameters() for run in (tmp_path / "unbroken", out)), strict=True):
        assert torch.equal(p, q)


@pytest.mark.slow
def test_asked_to_stop_one_process_they_stop_together(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    began = torchrun(2, dataset, out, "--checkpoint.every", "0", "--train.max-steps", "100000")
    try:
        while not (RunDir(out).metrics_file.exists() and len(RunDir(out).read_metrics()) > 3):
            assert began.poll() is None, began.stdout.read()
            time.sleep(0.05)
        by_rank = {int(child.environ()["RANK"]): child for child in psutil.Process(began.pid).children()}
        by_rank[1].send_signal(signal.SIGUSR2)
        said, _ = began.communicate(timeout=HANGS)
    finally:
        if began.poll() is None:
            os.killpg(began.pid, signal.SIGKILL)
    result = RunDir(out).read_json("result.json")
    assert result["status"] == "interrupted"
    assert find_checkpoint(RunDir(out)).name == f"step-{result['steps']:08d}"
    assert "to go on: the same torchrun command" in said


# -- what ranks exchange --------------------------------------------------------------------------------------------


def test_a_shared_flag_is_answered_one_call_later_and_never_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    others = iter([0, 1, 0])  # what the other rank sends
    waiting: list[torch.Tensor] = []

    class Work:
        def __init__(self, flag: torch.Tensor, other: int) -> None:
            self.flag, self.other = flag, other

        def wait(self, limit: object) -> None:
            self.flag.fill_(max(int(self.flag), self.other))  # it arrives now
            waiting.remove(self.flag)

    def all_reduce(flag: torch.Tensor, op: object, async_op: bool) -> Work:
        assert async_op and op is dist.ReduceOp.MAX
        waiting.append(flag)
        return Work(flag, next(others))

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    stop = SharedFlag(World(rank=0, size=2))
    assert [stop(False), stop(False), stop(False)] == [False, False, True]
    assert len(waiting) == 1  # the last one
    assert SharedFlag(SINGLE)(True) and not SharedFlag(SINGLE)(False)


COLLECTIVES = [
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_to_all",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "scatter_object_list",
]


def exchanged(dataset: str, out: str, port: int, changes: dict[str, Any]) -> dict[int, list[tuple[str, bool]]]:
    """For each update the collectives from its beginning to the next: the name, and whether it is asynchronous."""
    os.environ["MASTER_PORT"] = str(port)
    calls: dict[int, list[tuple[str, bool]]] = {-1: []}

    def counted(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            calls[max(calls)].append((name, named.get("async_op", False)))
            return plain(*arguments, **named)

        return call

    def update(t: Any, step: int) -> Any:
        calls[step] = []
        return plain(t, step)

    plain = loop.update
    with pytest.MonkeyPatch.context() as patch:
        for name in COLLECTIVES:
            patch.setattr(dist, name, counted(name, getattr(dist, name)))
        patch.setattr(loop, "update", update)
        train(tiny_recipe(Path(dataset), **changes), out, quiet=True)
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_an_unlogged_step_exchanges_gradients_and_waits_for_nothing_else(
    dataset: Path, tmp_path: Path, strategy: str
) -> None:
    changes = {"distributed__strategy": strategy, "train__max_steps": 7, "train__eval_every": 0, "log__every": 4}
    changes |= {"checkpoint__every": 0, "batch__micro_batch": 4}  # one micro-batch a step
    by_rank = together(2, exchanged, str(dataset), str(tmp_path / "run"), free_port(), changes)
    assert by_rank[0] == by_rank[1]
    unlogged = [by_rank[0][step] for step in (1, 2, 4)]  # 0, 3 and 6 end at a logged step
    flag, norms = ("all_reduce", True), ("all_gather", False)
    for calls in unlogged:
        # a bucket of gradients and the flag; or, as FSDP exchanges those by itself, the norms that all are clipped by
        assert calls == ([flag, flag] if strategy == "ddp" else [norms, flag])
    logged = Counter(by_rank[0][3]) - Counter(unlogged[-1])
    assert logged == {("all_gather", True): 1, **({("all_reduce", False): 1} if strategy == "fsdp" else {})}
