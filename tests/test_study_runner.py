"""Studies: what is started, in which order, with what around it; what is not done twice; and every way to be killed."""

import io
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import psutil
import pytest
from conftest import tiny_recipe
from test_cli import call
from test_training_resume import measured

from gptlab import locks, machine
from gptlab.config import Study, load_study
from gptlab.errors import ConfigError, Locked
from gptlab.rundir import RunDir
from gptlab.study import runner, worker
from gptlab.study.folder import study_in_use
from gptlab.study.runner import RETRIES, is_transient, run_study, worker_environment
from gptlab.study.runs import PlannedRun, first_seeds, planned_runs
from gptlab.study.table import RunState, read_study, study_progress, study_seconds_left, study_table
from gptlab.training.loop import train

# Stands in for a worker in tests that are about the runner: it ends as it is told to, without a step of training.
FAKE = """
import json, os, signal, sys, time
from pathlib import Path
run, end, say = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
result = {"steps": 24, "tokens": 6144, "wall_seconds": 10.0}
def leave(status, code, **more):
    (run / "result.json").write_text(json.dumps({"status": status, **result, **more}))
    sys.exit(code)
def stop(number, frame):
    leave("interrupted", 4)
signal.signal(signal.SIGTERM, stop)
with open("order", "a") as file:
    file.write(run.name + " " + os.environ["OMP_NUM_THREADS"] + chr(10))
if end.startswith("signal"):
    os.kill(os.getpid(), int(end.removeprefix("signal")))
if end == "wait":
    time.sleep(60)
if end in ("completed", "unlearnt"):
    loss = float(say or 3.0) if end == "completed" else 4.5
    trained = {"step": 24, "loss": 2.9, "tokens_per_second": 512}
    lines = [{"step": 0, "val_loss": 4.0}, trained, {"step": 24, "val_loss": loss}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + chr(10) for line in lines))
    leave("completed", 0, final_val_loss=loss)
if end == "diverged":
    leave("diverged", 3, failed_at_step=7, reason="the training loss is nan")
if end == "not_applicable":
    leave("not_applicable", 2, reason="no GPU")
if end == "failed":
    leave("failed", 1, reason=say)
print(say)
sys.exit(2 if end == "wrong" else 1)
"""


def study_file(folder: Path, dataset: Path, arms: str = "", **changes: Any) -> Path:
    """A study of tiny runs: a core arm, an extended one, and what `arms` says."""
    import tomli_w

    recipe = tiny_recipe(dataset, **changes).model_dump()
    text = f'name = "tiny"\nseeds = [0, 1]\nbaseline = "plain"\n{arms}\n[arms.plain]\n[arms.fast]\noptim.lr = 2e-2\n'
    file = folder / "tiny.toml"
    file.write_text(
        text + '[arms.late]\ngroup = "extended"\noptim.lr = 5e-3\n' + tomli_w.dumps({"recipe": recipe}),
        encoding="utf-8",
    )
    return file


@pytest.fixture
def study(dataset: Path, tmp_path: Path) -> Study:
    return load_study(study_file(tmp_path, dataset))


class Fakes:
    """How runs end, attempt by attempt; the last way again and again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ends: dict[str, list[str]] = {}
        (folder / "fake.py").write_text(FAKE, encoding="utf-8")

    def replace_workers(self, monkeypatch: pytest.MonkeyPatch) -> Self:
        """Stand in for the workers of studies that run in this folder."""
        monkeypatch.chdir(self.folder)
        monkeypatch.setattr(runner, "command", self.command)
        monkeypatch.setattr(runner, "POLL_SECONDS", 0.02)
        return self

    def command(self, folder: Path, run: PlannedRun) -> list[str]:
        if not run.dir.exists():
            run.dir.write_recipe(run.recipe)
        ends = self.ends.get(str(run), self.ends.get(run.arm, ["completed"]))
        end, _, say = ends[min(run.attempts, len(ends)) - 1].partition(": ")
        return [sys.executable, "-I", "-S", str(self.folder / "fake.py"), str(run.dir.path), end, say]

    def started(self) -> list[str]:
        file = self.folder / "order"
        return [line.split()[0] for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return Fakes(tmp_path).replace_workers(monkeypatch)


def summary(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def statuses(folder: Path) -> dict[str, str]:
    return {f"{state.arm} {state.seed}": state.status for state in read_study(folder)}


# -- order, gate, and what is not done twice


def test_the_first_seeds_core_arms_come_first_and_nothing_runs_twice(study: Study, fakes: Fakes) -> None:
    assert run_study(study, quiet=True) == 0
    assert fakes.started() == ["plain_seed0", "fast_seed0", "late_seed0", "late_seed1", "plain_seed1", "fast_seed1"]
    assert [f"{state.arm}_seed{state.seed}" for state in read_study(Path("results/tiny"))] == fakes.started()
    folder = Path("results/tiny")
    card = summary(folder, "late_seed1")
    assert {key: card[key] for key in ("study", "arm", "group", "seed", "status", "final_val_loss")} == {
        "study": "tiny",
        "arm": "late",
        "group": "extended",
        "seed": 1,
        "status": "completed",
        "final_val_loss": 3.0,
    }
    assert card.items() >= json.loads((folder / "late_seed1/result.json").read_text(encoding="utf-8")).items()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert run_study(study, quiet=True) == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert len(fakes.started()) == 6


def test_arms_and_seeds_may_be_chosen(study: Study, fakes: Fakes) -> None:
    assert first_seeds(study, 1) == [0]
    assert first_seeds(study, 4) == [0, 1, 2, 3]
    assert first_seeds(study.model_copy(update={"seeds": [7, 3]}), 4) == [7, 3, 8, 9]
    assert run_study(study, arms=["late"], seeds=[5], quiet=True) == 0  # without a gate
    assert run_study(study, arms=["late", "plain"], seeds=[0], quiet=True) == 0
    assert fakes.started() == ["late_seed5", "late_seed0", "plain_seed0"]
    assert load_study("results/tiny/study.toml").seeds == [0, 1, 5]
    with pytest.raises(ConfigError, match="study tiny has no arm 'lat'; did you mean 'late'?"):
        run_study(study, arms=["lat"])
    with pytest.raises(ConfigError, match="jobs = 0: must be at least 1"):
        run_study(study, jobs=0)


def test_a_summary_is_written_for_a_run_that_has_none_and_without_training(study: Study, fakes: Fakes) -> None:
    run_study(study, quiet=True)
    folder = Path("results/tiny")
    (folder / "plain_seed0.json").unlink()  # as if the runner had been killed just before
    for path in sorted((folder / "fast_seed0").rglob("*"), reverse=True):  # a run that was deleted to save space
        path.unlink()
    (folder / "fast_seed0").rmdir()
    assert run_study(study, quiet=True) == 0
    assert summary(folder, "plain_seed0")["status"] == "completed"
    assert len(fakes.started()) == 6
    assert statuses(folder)["fast 0"] == "completed"


@pytest.mark.parametrize("end", ["diverged", "unlearnt", "not_applicable", "failed: TypeError: no"])
def test_extended_arms_wait_for_a_baseline_that_has_learnt(
    study: Study, fakes: Fakes, capsys: pytest.CaptureFixture[str], end: str
) -> None:
    fakes.ends["plain seed 0"] = [end, "completed"]
    assert run_study(study) == 1
    assert fakes.started() == ["plain_seed0", "fast_seed0", "plain_seed1", "fast_seed1"]  # core arms are, all the same
    says = " ".join(capsys.readouterr().err.split())
    assert says.count("extended arms are not started: plain seed 0") == 1
    assert "--arm NAME runs an arm anyway" in says
    if end == "unlearnt":
        assert "ended with val_loss 4.5, no lower than its first val_loss 4.0" in says
    assert run_study(study, arms=["late"], quiet=True) == 0
    assert fakes.started()[4:] == ["late_seed0", "late_seed1"]


@pytest.mark.parametrize(("end", "closes"), [("diverged", True), ("unlearnt", True), ("failed: TypeError: no", False)])
def test_a_core_run_of_a_later_seed_closes_the_gate_once_it_has_a_result(
    study: Study, fakes: Fakes, capsys: pytest.CaptureFixture[str], end: str, closes: bool
) -> None:
    seeds = [0, 1, 2]
    order = [str(run) for run in planned_runs(study, Path("results/tiny"), None, seeds)]
    bad = "plain seed 1"
    after = [run for run in order[order.index(bad) :] if run.startswith("late")]
    assert after == ["late seed 2"]
    fakes.ends[bad] = [end]
    assert run_study(study, seeds=seeds) == 1
    started = [name.replace("_seed", " seed ") for name in fakes.started()]
    assert started == [run for run in order if not (closes and run in after)]
    assert (f"extended arms are not started: {bad}" in " ".join(capsys.readouterr().err.split())) == closes
    assert run_study(study, seeds=seeds, quiet=True) == 1  # nor at the next start
    assert statuses(Path("results/tiny"))["late 2"] == ("waiting" if closes else "completed")


def test_a_gate_that_is_open_lets_the_arms_of_more_seeds_mix(study: Study, fakes: Fakes) -> None:
    folder = Path("results/tiny")

    def groups(seeds: list[int], arms: list[str] | None = None) -> list[str]:
        return [run.group for run in planned_runs(study, folder, arms, seeds)]

    assert groups([1]) == ["core", "core", "extended"]  # alone it opens its own gate
    assert groups([1], ["late", "plain"]) == ["extended", "core"]  # no gate: fast, a core arm, is missing
    assert groups([1], ["late", "plain", "fast"]) == groups([1])
    assert run_study(study, seeds=[0], arms=["plain"], quiet=True) == 0
    assert groups([1]) == ["core", "core", "extended"]  # fast has not ended
    assert run_study(study, seeds=[0], quiet=True) == 0
    assert groups([1]) == ["extended", "core", "core"]
    assert run_study(study, seeds=[1], quiet=True) == 0
    assert fakes.started()[3:] == ["late_seed1", "plain_seed1", "fast_seed1"]


def test_arms_that_are_named_have_the_gate_if_all_core_arms_are_among_them(study: Study, fakes: Fakes) -> None:
    fakes.ends["plain"] = ["diverged"]
    assert run_study(study, arms=["late", "plain"], quiet=True) == 0
    assert fakes.started() == ["late_seed0", "plain_seed0", "late_seed1", "plain_seed1"]
    for path in Path("results/tiny").glob("late_seed*/result.json"):
        path.unlink()
    assert run_study(study, arms=["fast", "late", "plain"], quiet=True) == 1
    assert fakes.started()[4:] == ["fast_seed0", "fast_seed1"]


def test_with_more_jobs_than_core_arms_no_extended_arm_starts_before_the_gate(study: Study, fakes: Fakes) -> None:
    fakes.ends["plain"] = ["unlearnt"]
    assert run_study(study, jobs=6, quiet=True) == 1
    assert set(fakes.started()[:2]) == {"plain_seed0", "fast_seed0"}
    assert set(fakes.started()[2:]) == {"plain_seed1", "fast_seed1"}


def test_extended_arms_do_not_wait_for_another_arm_that_diverged(study: Study, fakes: Fakes) -> None:
    fakes.ends = {"fast": ["diverged"], "late seed 0": ["not_applicable"]}
    assert run_study(study, quiet=True) == 0  # these are results
    folder = Path("results/tiny")
    assert summary(folder, "fast_seed0")["failed_at_step"] == 7
    assert run_study(study, quiet=True) == 0
    assert fakes.started()[6:] == ["late_seed0"]  # another machine may be able to
    fakes.ends["late seed 0"] = ["wrong: gptlab: /x was trained on other data"]
    assert run_study(study, quiet=True) == 1  # exit status 2, as before: the old result is not taken for the new one
    assert summary(folder, "late_seed0")["reason"] == "/x was trained on other data"


# -- faults


def test_a_fault_of_the_machine_is_tried_again_and_any_other_is_not(
    study: Study, fakes: Fakes, capsys: pytest.CaptureFixture[str]
) -> None:
    fakes.ends = {
        "plain seed 0": ["signal9", "failed: RuntimeError: CUDA error: an illegal memory access", "completed"],
        "fast seed 0": ["signal9"],
        "late seed 0": ["failed: TypeError: one two"],
        "plain seed 1": ["crash: ConnectionResetError: [Errno 104]", "completed"],
        "fast seed 1": ["wrong: gptlab: /x was trained on other data"],
        "late seed 1": ["failed: OSError: [Errno 28] No space left on device"],
    }
    assert run_study(study) == 1
    folder = Path("results/tiny")
    starts = {name: fakes.started().count(name) for name in set(fakes.started())}
    assert starts == {
        "plain_seed0": 3,
        "fast_seed0": 1 + RETRIES,
        "late_seed0": 1,
        "plain_seed1": 2,
        "fast_seed1": 1,
        "late_seed1": 1,
    }
    reason = "the process was killed by signal 9, three times; the system log may say that memory ran out"
    assert (summary(folder, "fast_seed0")["status"], summary(folder, "fast_seed0")["reason"]) == ("failed", reason)
    assert json.loads((folder / "fast_seed0/result.json").read_text(encoding="utf-8")) == {
        "status": "failed",
        "reason": reason,
    }
    assert summary(folder, "late_seed0")["reason"] == "TypeError: one two"
    assert summary(folder, "fast_seed1")["reason"] == "/x was trained on other data"
    assert "fast seed 1: failed: /x was trained on other data" in " ".join(capsys.readouterr().err.split())
    log = (folder / "plain_seed0/worker.log").read_text(encoding="utf-8")
    assert [f"start {n}: " in log for n in (1, 2, 3, 4)] == [True, True, True, False]

    fakes.ends = {}  # what had failed is looked at again
    assert run_study(study, quiet=True) == 0
    assert set(statuses(folder).values()) == {"completed"}
    assert len(fakes.started()) == 11 + 4


def test_which_reasons_are_faults_of_the_machine() -> None:
    for text in (
        "AcceleratorError: CUDA error: unspecified launch failure",
        "RuntimeError: cuDNN error: X",
        "NCCL error in",
        "OSError: [Errno 5] Input/output error",
        "ConnectionError: x",
        "ConnectionResetError: [Errno 104] Connection reset by peer",
        "requests.exceptions.ConnectionError: x",
        "TimeoutError: x",
        "x timed out",
    ):
        assert is_transient(text), text
    for text in (
        "IndexError: list index",
        "RuntimeError: aten::x_cuda has no deterministic implementation",
        "OSError: [Errno 28] No space left on device",
        "FileNotFoundError: [Errno 2] No such file or directory",
        "AcceleratorError: CUDA error: device-side assert triggered",
        "OutOfMemoryError: CUDA out of memory",
    ):
        assert not is_transient(text), text


# -- the folder


def test_a_folder_of_another_study_is_refused_and_names_what_differs(
    study: Study, fakes: Fakes, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file = Path("results/tiny"), tmp_path / "tiny.toml"
    run_study(study, arms=["plain"], quiet=True)
    before = (folder / "study.toml").read_text(encoding="utf-8")
    status, _, err = call(capsys, "study", "run", file, "--optim.weight-decay", "0.2")
    assert (status, "optim.weight_decay (0.1 then, 0.2 now); --out names another folder" in err) == (2, True)
    status, _, err = call(capsys, "study", "run", file, "--optim.lr", "0.02")
    assert (status, "optim.lr (0.01 then, 0.02 now) in plain" in err) == (2, True)
    assert "there was no arm" not in err
    # a longer run whose learning rate would have decayed already
    status, _, err = call(capsys, "study", "run", file, "--train.max-steps", "48")
    assert (status, "schedule.decay_steps (24 then, 48 now)" in err) == (2, True)
    assert "the learning rate decays until the run's limit" in err
    study_file(tmp_path, dataset, arms="[arms.new]")
    status, _, err = call(capsys, "study", "run", file)
    assert (status, "holds another study: there was no arm new" in err) == (2, True)
    assert (folder / "study.toml").read_text(encoding="utf-8") == before
    assert len(fakes.started()) == 2
    # words, cadences and, where the decay is given, limits make no other study
    study_file(tmp_path, dataset)
    changes = ["--train.eval-every", "3", "--schedule.decay-steps", "24", "--train.max-steps", "48"]
    assert call(capsys, "study", "run", file, "--arm", "plain", "--seed", "0", *changes)[0] == 0
    assert fakes.started()[2:] == ["plain_seed0"]  # it is to be trained on
    assert load_study(folder / "study.toml").build("plain", 0).train.max_steps == 48


def test_two_runners_do_not_share_a_folder(study: Study, fakes: Fakes) -> None:
    folder = Path("results/tiny")
    with (
        locks.hold(folder, study_in_use(folder)),
        pytest.raises(Locked, match="is being run by another process; `gptlab study status"),
    ):
        run_study(study, quiet=True)
    assert fakes.started() == []


def test_everything_is_checked_before_anything_starts(
    study: Study, fakes: Fakes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, sentence in (
        (["--optim.lr", "-1"], "study tiny, arm plain: optim.lr = -1: must be greater than 0"),
        (["--arm", "fasd"], "study tiny has no arm 'fasd'; did you mean 'fast'?"),
        (["--data.path", "nowhere"], "make one with `gptlab prepare stdlib --tokenizer char --out nowhere`"),
        (["--seeds", "0"], "seeds = 0: must be at least 1"),
        (["--seeds", "1", "--seed", "1"], "not allowed with"),
    ):
        status, _, err = call(capsys, "study", "run", tmp_path / "tiny.toml", *words)
        assert (status, sentence in err) == (2, True), err
    assert call(capsys, "study", "run", "precision-ml")[0] == 2
    assert call(capsys, "study", "status", tmp_path)[0] == 2
    assert not Path("results").exists()


def test_a_flag_that_beats_arms_is_said_once(
    study: Study, fakes: Fakes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = call(capsys, "study", "run", tmp_path / "tiny.toml", "--optim.lr", "3e-3", "--seed", "0")
    assert status == 0
    assert err.count("--optim.lr overrides the value of fast, late") == 1


def test_the_folder_of_a_study_goes_on_with_it(
    study: Study, fakes: Fakes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--out", "there", "--optim.weight-decay", "0.2", "--seed", "0", "--arm", "plain"]
    assert call(capsys, "study", "run", tmp_path / "tiny.toml", *words)[0] == 0
    assert call(capsys, "study", "run", "there", "--arm", "fast", "late", "--seeds", "1")[0] == 0
    assert call(capsys, "study", "run", "there/study.toml")[0] == 0
    assert len(fakes.started()) == len(set(fakes.started())) == 6
    assert RunDir("there/late_seed1").read_recipe().optim.weight_decay == 0.2
    assert not Path("results").exists()


# -- jobs, threads, GPUs


def test_jobs_run_at_the_same_time_and_share_the_cores(
    study: Study, fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 8)
    assert run_study(study, jobs=4, quiet=True) == 0
    assert {line.split()[1] for line in Path("order").read_text(encoding="utf-8").splitlines()} == {"2"}


def test_runs_outside_the_study_are_left_their_cores_and_it_is_said_once(
    study: Study, fakes: Fakes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 8)
    monkeypatch.setattr(machine, "other_runs", lambda: 3)
    assert run_study(study, seeds=[0], arms=["plain", "fast"]) == 0
    assert {line.split()[1] for line in Path("order").read_text(encoding="utf-8").splitlines()} == {"2"}
    assert (
        capsys.readouterr().err.count("3 other runs of gptlab train on this machine: each run of the study takes 2")
        == 1
    )


def test_the_environment_of_a_worker(dataset: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")

    def seen(slot: int, jobs: int, gpus: list[str], others: int = 0, **changes: Any) -> tuple[str | None, str | None]:
        run = PlannedRun("plain", 0, "core", tiny_recipe(dataset, **changes), RunDir(tmp_path / "run"))
        environment = worker_environment(run, slot, jobs, gpus, others)
        assert environment[worker.RUNNER] == str(os.getpid())
        return environment.get("OMP_NUM_THREADS"), environment.get("CUDA_VISIBLE_DEVICES")

    gpus, auto = ["3", "GPU-5"], {"train__device": "auto"}
    assert seen(0, 1, []) == ("7", "3,GPU-5")
    assert seen(0, 3, []) == ("2", "3,GPU-5")
    assert seen(0, 99, [])[0] == "1"
    assert seen(0, 3, [], train__threads=5)[0] == "5"
    assert [seen(slot, 3, gpus, **auto)[1] for slot in range(3)] == ["3", "GPU-5", "3"]
    assert seen(1, 2, gpus)[1] == "3,GPU-5"  # train.device = cpu
    # other runs take their share too, and a run that goes on keeps its threads where it can
    assert [seen(0, jobs, [], others=others)[0] for jobs, others in ((1, 1), (2, 2), (1, 9))] == ["4", "2", "1"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run/environment.json").write_text('{"threads": 3}', encoding="utf-8")
    assert [seen(0, jobs, [], others=others)[0] for jobs, others in ((1, 0), (1, 1), (4, 0))] == ["3", "3", "2"]

    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert runner.visible_gpus() == gpus
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert runner.visible_gpus() == ["0", "1"]

    def jobs(gpus: list[str], **changes: Any) -> int:
        study = load_study(study_file(tmp_path, dataset, **changes))
        return runner.default_jobs(planned_runs(study, tmp_path, None, None), gpus)

    assert (jobs(gpus), jobs([]), jobs([], train__threads=3), jobs([], train__threads=9)) == (2, 1, 2, 1)


# -- the table


def test_the_table_of_a_study_in_every_state(study: Study, fakes: Fakes, capsys: pytest.CaptureFixture[str]) -> None:
    fakes.ends = {"fast": ["diverged"], "late": ["failed: TypeError: no"]}
    assert run_study(study, seeds=[0], quiet=True) == 1
    folder = Path("results/tiny")
    for name in ("plain_seed1", "fast_seed1"):
        run = RunDir(folder / name)
        run.write_recipe(study.build(name[:5].strip("_"), 1))
        lines = [{"step": 0, "val_loss": 4.0}, {"step": 6, "loss": 3.5, "tokens_per_second": 64.0}]
        run.metrics_file.write_text(
            "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 7, "lo', encoding="utf-8"
        )
    with RunDir(folder / "plain_seed1").lock():
        assert statuses(folder) == {
            "plain 0": "completed",
            "fast 0": "diverged",
            "plain 1": "running",
            "fast 1": "stopped",
            "late 0": "failed",
            "late 1": "waiting",
        }
        status, out, _ = call(capsys, "study", "status", folder)
    assert status == 0
    rows = {tuple(line.split()[:2]): line.split() for line in out.splitlines()}
    assert rows["plain", "1"] == ["plain", "1", "running", "6/24", "3.5000", "4.0000", "64", "tokens/s", "0:01:12"]
    assert rows["plain", "0"][2:6] == ["completed", "24/24", "2.9000", "3.0000"]
    assert "fast seed 0 diverged: the training loss is nan" in out
    assert "late seed 0 failed: TypeError: no" in out
    last = out.splitlines()[-1]
    assert last.startswith("done 3 of 6: 1 completed, 1 diverged, 1 failed, 1 running, 1 stopped, 1 waiting; about 0:")


def test_the_time_left_of_a_study_counts_what_waits() -> None:
    states = [
        RunState("a", 0, "completed", seconds_whole=100),
        RunState("b", 0, "running", seconds_whole=200, seconds_left=50),
        RunState("c", 0, "running", seconds_whole=300, seconds_left=250),
        RunState("d", 0, "waiting"),
        RunState("e", 0, "stopped"),
        RunState("f", 0, "diverged", seconds_whole=1),
    ]
    assert study_seconds_left(states, 1) == 50 + 250 + 2 * 200
    assert study_seconds_left(states, 2) == 350
    assert study_seconds_left(states, 99) == 250  # no faster than its longest run
    assert study_seconds_left([RunState("a", 0, "waiting")], 1) is None
    assert study_progress([RunState("a", 0, "waiting")]) == "done 0 of 1: 1 waiting"


def test_a_table_that_is_too_long_shows_what_is_at_work() -> None:
    from rich.console import Console

    kinds = ["completed"] * 5 + ["failed", "running", "running"] + ["waiting"] * 5
    states = [RunState(f"arm{i}", 0, status) for i, status in enumerate(kinds)]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(study_table(states, 1, rows=5))
    text = console.export_text()
    assert [line.split()[0] for line in text.splitlines()[1:6]] == ["arm3", "arm4", "arm5", "arm6", "arm7"]
    assert "8 more runs are not shown" in text


# -- interrupted


@pytest.fixture
def left() -> Callable[[], set[psutil.Process]]:
    """Processes that this test has started and that live; PyTorch's compiler may have started others before."""
    before = set(psutil.Process().children())
    return lambda: set(psutil.Process().children()) - before


def test_a_signal_stops_the_workers_and_the_same_call_goes_on(
    study: Study,
    fakes: Fakes,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    left: Callable[[], set[psutil.Process]],
) -> None:
    fakes.ends = {"plain": ["wait"], "fast": ["wait"]}

    def stop_when(started: int, *numbers: int) -> None:
        while len(fakes.started()) < started:
            time.sleep(0.01)
        for number in numbers:
            time.sleep(0.3)
            os.kill(os.getpid(), number)

    for numbers in ((signal.SIGINT,), (signal.SIGTERM,)):
        before = len(fakes.started())
        threading.Thread(target=stop_when, args=(before + 2, *numbers)).start()
        assert run_study(study, jobs=2) == 4
        assert "2 interrupted" in capsys.readouterr().err
        assert statuses(Path("results/tiny"))["plain 0"] == "interrupted"
        assert not Path("results/tiny/plain_seed0.json").exists()
    assert left() == set()
    fakes.ends = {}
    assert run_study(study, jobs=2, quiet=True) == 0
    assert set(statuses(Path("results/tiny")).values()) == {"completed"}


def test_a_second_ctrl_c_kills(
    study: Study, fakes: Fakes, tmp_path: Path, left: Callable[[], set[psutil.Process]]
) -> None:
    (tmp_path / "fake.py").write_text(
        "import signal, time, pathlib\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "pathlib.Path('order').write_text('x 1')\ntime.sleep(600)\n",
        encoding="utf-8",
    )
    threading.Thread(target=lambda: _interrupt_twice(tmp_path)).start()
    began = time.monotonic()
    assert run_study(study, quiet=True) == 4
    assert time.monotonic() - began < 600, "the worker slept to its end"
    assert left() == set()


def _interrupt_twice(folder: Path) -> None:
    while not (folder / "order").exists():
        time.sleep(0.01)
    for _ in range(2):
        time.sleep(0.4)
        os.kill(os.getpid(), signal.SIGINT)


# -- real workers


def test_a_study_of_real_runs(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that completes, one that TF32 keeps off a CPU, and one that diverges."""
    monkeypatch.chdir(tmp_path)
    arms = '[arms.tf32]\nprecision.regime = "tf32"\n[arms.hot]\noptim = { lr = 1e30, grad_clip = 0.0 }\n'
    file = study_file(tmp_path, dataset, arms=arms, model__dropout=0.0, train__max_steps=8, train__threads=1)
    folder = tmp_path / "results/tiny"
    words = ["study", "run", file, "--seed", "0", "--arm", "plain"]
    status, out, err = call(capsys, *words)
    assert status == 0, err
    assert "plain seed 0: completed at step 8, val_loss" in err
    assert "detects" in out and out.splitlines()[-1] == "next: gptlab study report results/tiny"
    assert summary(folder, "plain_seed0")["status"] == "completed"
    # the run is what `gptlab train` of its recipe makes
    train(RunDir(folder / "plain_seed0").read_recipe(), tmp_path / "alone", quiet=True)
    assert measured(tmp_path / "alone") == measured(folder / "plain_seed0")

    monkeypatch.setattr(worker, "_end_with_runner", lambda: None)
    monkeypatch.setattr(runner, "command", lambda *_: pytest.fail("nothing is left to be done"))
    assert worker.main([str(folder), "tf32", "0"]) == 2
    result = RunDir(folder / "tf32_seed0").read_json("result.json")
    assert (result["status"], "TF32 needs an NVIDIA GPU" in result["reason"]) == ("not_applicable", True)
    assert worker.main([str(folder), "hot", "0"]) == 3
    pages = {path.parent.name for path in folder.glob("*/run.html")}
    assert pages == {"plain_seed0", "hot_seed0"} == {path.parent.name for path in folder.glob("*/card.md")}
    (folder / "hot_seed0/run.html").unlink()
    (folder / "hot_seed0/run.html").mkdir()  # it cannot be written, and the run has ended as it has
    assert worker.main([str(folder), "hot", "0"]) == 3
    assert "hot_seed0: no card.md and run.html: " in capsys.readouterr().err
    assert call(capsys, *words, "hot")[0] == 0  # a result as any other: it is not tried again
    assert summary(folder, "hot_seed0")["status"] == "diverged"
    assert statuses(folder)["tf32 0"] == "not_applicable"


def test_a_worker_waits_for_the_orphan_that_holds_its_run(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, released = tiny_recipe(dataset, train__max_steps=2), []

    def orphan() -> None:
        with RunDir(tmp_path).lock():
            held.set()
            time.sleep(0.7)
            released.append(time.monotonic())

    held = threading.Event()
    thread = threading.Thread(target=orphan)
    thread.start()
    held.wait()
    assert worker._train(recipe, tmp_path).status == "completed"
    assert released
    thread.join()
    monkeypatch.setattr(worker, "LOCK_SECONDS", 0)
    with RunDir(tmp_path).lock(), pytest.raises(Locked, match="is being trained by another process"):
        worker._train(recipe, tmp_path)


def test_a_worker_ends_when_its_runner_does(study: Study, tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(study.to_toml(), encoding="utf-8")
    runner = subprocess.Popen(["true"])
    runner.wait()
    command = [sys.executable, "-m", "gptlab.study.worker", str(tmp_path), "plain", "0"]
    process = subprocess.Popen(command, env={**os.environ, worker.RUNNER: str(runner.pid)}, stderr=subprocess.PIPE)
    assert process.wait() == -signal.SIGTERM  # while it still loads PyTorch: nothing is lost
    assert "the study's runner has ended" in process.stderr.read().decode()


# -- kills


def start(folder: Path, file: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "gptlab", "study", "run", str(file), "--out", str(folder), "--jobs", "2"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def workers(runner: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        return [child for child in psutil.Process(runner.pid).children() if "gptlab.study.worker" in child.cmdline()]
    except psutil.Error:
        return []


def untimed(result: dict[str, Any]) -> dict[str, Any]:
    """What must repeat of a result: everything but times, memory and what they cost."""
    return {k: v for k, v in result.items() if not k.endswith(("_second", "_seconds", "_ms", "_gb", "cost", "_steps"))}


def steps_done(folder: Path) -> int:
    return sum(state.step for state in read_study(folder)) if (folder / "study.toml").is_file() else 0


def wait_for(process: subprocess.Popen[bytes], folder: Path, steps: int, seconds: float) -> None:
    """Until the study has made so many steps more, or the seconds have passed."""
    end, steps = time.monotonic() + seconds, steps + steps_done(folder)
    while steps_done(folder) < steps and time.monotonic() < end and process.poll() is None:
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["runner", "worker"])
def test_killed_at_random_moments_a_study_comes_to_the_same_end(dataset: Path, tmp_path: Path, target: str) -> None:
    file = study_file(tmp_path, dataset, train__max_steps=80, checkpoint__every=2, train__eval_every=20)
    whole = start(tmp_path / "whole", file)
    assert whole.wait() == 0, whole.stderr.read()
    draw, pieces = random.Random(target), tmp_path / "pieces"
    process = start(pieces, file)
    for kill in range(6):
        if process.poll() is not None:  # a run was killed three times
            assert process.returncode == 1, process.stderr.read()
            process = start(pieces, file)
        # a third of the kills perhaps while it starts; and of the 480 steps of all runs no kill waits for more than 40
        wait_for(process, pieces, draw.randint(1, 40), draw.uniform(0, 4) if kill % 3 == 0 else math.inf)
        time.sleep(draw.uniform(0, 0.05))
        if target == "runner":
            assert process.poll() is None, f"it ended before kill {kill}: {process.stderr.read()}"
            process.kill()
            process.wait()
            process = start(pieces, file)
            continue
        while not (found := workers(process)):
            assert process.poll() is None, f"it ended before kill {kill}: {process.stderr.read()}"
        draw.choice(found).kill()
    process.wait()
    last = start(pieces, file)
    assert last.wait() == 0, last.stderr.read()
    for state in read_study(tmp_path / "whole"):
        name = f"{state.arm}_seed{state.seed}"
        one, other = summary(tmp_path / "whole", name), summary(tmp_path / "pieces", name)
        assert untimed(one) == untimed(other)
        assert one["status"] == "completed"
        assert measured(tmp_path / "whole" / name) == measured(tmp_path / "pieces" / name)


@pytest.mark.slow
def test_sigterm_to_a_runner_of_real_runs(dataset: Path, tmp_path: Path) -> None:
    file = study_file(tmp_path, dataset, train__max_steps=100_000)
    process = start(tmp_path / "study", file)
    runs = [RunDir(tmp_path / "study" / name) for name in ("plain_seed0", "fast_seed0")]
    while not all(run.read_metrics() for run in runs):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 4
    for run in runs:
        result = run.read_json("result.json")
        assert result["status"] == "interrupted"
        assert (run.checkpoints / f"step-{result['steps']:08d}").is_dir()
