"""Jobs: what is submitted, what a job does and when it requeues itself, stopping; SLURM's own part is in test_slurm."""

import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_recipe
from processes import HANGS
from test_cli import call
from test_study_runner import Fakes, statuses, study_file, summary
from test_training_resume import measured

from gptlab.config import Recipe, load_recipe, load_study
from gptlab.errors import ConfigError
from gptlab.rundir import RunDir
from gptlab.study.launch import job
from gptlab.study.launch.record import Launch
from gptlab.study.launch.resources import limit_seconds, read_resources
from gptlab.study.launch.status import job_states
from gptlab.study.runner import run_study
from gptlab.training import loop, signals
from gptlab.training.loop import Result, train
from gptlab.training.signals import StopSignal


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fakes:
    """Workers that end as they are told to; see test_study_runner."""
    return Fakes(tmp_path).replace_workers(monkeypatch)


# -- the wish to stop


def test_a_warning_is_told_from_the_end_and_from_a_wish() -> None:
    for name in ("SIGTERM", "SIGINT", "SIGUSR2", "SIGUSR1", "SIGHUP"):
        with StopSignal() as stop:
            assert (stop(), stop.reason) == (False, None)
            os.kill(os.getpid(), getattr(signal, name))
            assert (stop(), stop.reason) == (True, name)
    with StopSignal() as stop:  # SLURM's preemption may send both
        os.kill(os.getpid(), signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == "SIGUSR2"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_a_closed_terminal_ends_a_run_with_a_checkpoint(dataset: Path, tmp_path: Path) -> None:
    """Its progress bar would fail at every line, and so it must not write any more."""
    recipe = tmp_path / "long.toml"
    recipe.write_text(tiny_recipe(dataset, train__max_steps=1_000_000, train__eval_every=0).to_toml(), encoding="utf-8")
    out = tmp_path / "run"
    child, terminal = pty.fork()
    if not child:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup leaves it ignored, here and in every child
        os.execv(sys.executable, [sys.executable, "-m", "gptlab", "train", str(recipe), "--out", str(out)])
    while not list(out.glob("checkpoints/step-*/manifest.json")):
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 65536)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 4
    result = RunDir(out).read_json("result.json")
    assert result["status"] == "interrupted"
    assert (out / f"checkpoints/step-{result['steps']:08d}/manifest.json").is_file()


def test_of_two_contexts_both_hear_a_signal() -> None:
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    with StopSignal() as outer:
        with StopSignal() as inner:
            os.kill(os.getpid(), signal.SIGUSR2)
            assert inner.reason == outer.reason == "SIGUSR2"
        with StopSignal() as later:  # what was heard before it listened
            assert (later(), later.reason) == (True, "SIGUSR2")
    assert [signal.getsignal(number) for number in signals.SIGNALS] == before


def test_a_file_stops_too_and_is_looked_for_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(signals.time, "monotonic", lambda: now)
    (tmp_path / "stop").touch()  # left over from an earlier run
    with StopSignal() as outer, StopSignal(tmp_path) as stop:
        assert not stop()
        (tmp_path / "stop").touch()
        now += 0.9
        assert not stop()
        now += 0.2
        assert (stop(), stop.reason) == (True, "gptlab stop")
        assert not outer()  # it was not warned: nothing is requeued
    assert not (tmp_path / "stop").exists()


# -- what a job asks for


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("1:30", 90), ("2:00:05", 7205), ("1-0", 86400), ("1-2:30", 95400), ("0-0:0:7", 7)],
)
def test_limits_are_read_as_sbatch_reads_them(text: str, seconds: int) -> None:
    assert limit_seconds(text) == seconds


def test_a_profile_and_flags_which_beat_it(tmp_path: Path) -> None:
    file = tmp_path / "profile.toml"
    file.write_text(
        'partition = "gpu"\ntime = 600\ngpus = 8\nmem = "64G"\nextra = { constraint = "h100" }\n', encoding="utf-8"
    )
    both = read_resources(file, {"gpus": 4, "nodes": 2})
    assert (both.partition, both.seconds, both.gpus, both.nodes, both.tasks_per_node) == ("gpu", 36000, 4, 2, 4)
    assert both.extra == {"constraint": "h100"}
    for content, says in (
        ('partitoin = "gpu"', "has no key 'partitoin'; it may have partition, time"),
        ('gpus = "all"', "gpus = all: must be a valid integer"),
        ("nodes = 0", "nodes = 0: must be greater than or equal to 1"),
        ('time = "soon"', "time = soon: must be minutes"),
        ('time = "2"', "must be longer than signal_delay (120 s)"),
        ("time =", "is not a TOML file"),
    ):
        file.write_text(content, encoding="utf-8")
        with pytest.raises(ConfigError, match=re.escape(says)):
            read_resources(file, {})
    with pytest.raises(ConfigError, match="cannot be read"):
        read_resources(tmp_path / "none.toml", {})


def options(script: str) -> dict[str, str]:
    """The #SBATCH lines of a batch script."""
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


@pytest.fixture
def recipe(dataset: Path) -> Recipe:
    """On one thread, as runs of several processes are compared bit for bit: each may find another number of cores."""
    return tiny_recipe(dataset, train__threads=1)


@pytest.fixture
def recipe_file(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(recipe.to_toml(), encoding="utf-8")
    return tmp_path / "tiny.toml"


def test_print_shows_the_script_and_submits_nothing(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    Path("p.toml").write_text('account = "lab"\nextra = { constraint = "h100", exclusive = true }\n', encoding="utf-8")
    status, out, _ = call(
        capsys,
        "launch",
        recipe_file,
        "--on",
        "slurm",
        "--print",
        "--profile",
        "p.toml",
        "--partition",
        "gpu",
        "--time",
        "12:00:00",
        "--gpus",
        8,
        "--nodes",
        2,
        "--cpus",
        6,
        "--mem",
        "0",
        "--qos",
        "high",
        "--out",
        "my runs",
    )
    assert status == 0
    assert options(out) == {
        "account": "lab",
        "constraint": "h100",
        "exclusive": "",
        "partition": "gpu",
        "time": "12:00:00",
        "nodes": "2",
        "gpus-per-node": "8",
        "ntasks-per-node": "8",
        "cpus-per-task": "6",
        "mem": "0",
        "qos": "high",
        "job-name": "tiny",
        "requeue": "",
        "signal": "USR2@120",
        "open-mode": "append",
    }
    command = shlex.split(out.splitlines()[-1])
    assert command[0] == "srun"
    log = f"--output={Path('my runs/launch/%j_%t_log.out').resolve()}"
    assert {"--kill-on-bad-exit=1", "--cpus-per-task=6", "--open-mode=append", log} < set(command)
    words = [sys.executable, "-uP", "-m", "gptlab", "launch", "--job", str(Path("my runs").resolve()), "--part", "run"]
    assert command[-len(words) :] == words
    assert sorted(path.name for path in Path().iterdir()) == ["p.toml", "tiny.toml"]


def test_a_study_is_two_arrays_and_a_report(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    study_file(tmp_path, dataset)
    words = ["launch", "tiny.toml", "--on", "slurm", "--print", "--jobs", 3, "--gpus", 1, "--optim.weight-decay", "0"]
    submits, *parts = call(capsys, *words)[1].split("#!")[1:]
    scripts = [options("#!" + text) for text in parts]
    assert [script["job-name"] for script in scripts] == ["tiny-gate", "tiny-arms", "tiny-report"]
    assert [script.get("array") for script in scripts] == ["0-1%2", "0-3%3", None]
    after = re.findall(r"^(\w+)=\$\(sbatch .*?(?:--dependency=(\S+) )?<<", "".join(parts) + submits, re.MULTILINE)
    assert sorted(after) == [
        ("ARMS_JOB", "afterany:$GATE_JOB"),
        ("GATE_JOB", ""),
        ("REPORT_JOB", "afterany:$GATE_JOB:$ARMS_JOB"),
    ]
    assert [script.get("gpus-per-node") for script in scripts] == ["1", "1", None]
    no_gate = call(capsys, *words, "--arm", "late", "plain")[1]
    assert re.findall(r"--job-name=(\S+)", no_gate) == ["tiny-arms", "tiny-report"]
    monkeypatch.setenv("PATH", "/nonexistent")
    assert call(capsys, "launch", "tiny.toml", "--on", "slurm", "--print", "--data.path", "nowhere")[0] == 0
    for words, says in (
        (["tiny.toml", "--on", "slurm", "--nodes", 2], "each run of a study is one process"),
        (["tiny.toml", "--on", "slurm", "--arm", "fats"], "did you mean 'fast'?"),
        (["tiny.toml", "--on", "slurm", "--jobs", 0], "must be at least 1"),
    ):
        status, _, err = call(capsys, "launch", *words)
        assert (status, says in err) == (2, True), err
    assert not (tmp_path / "results").exists()


# -- submitting, to programs that stand in for SLURM's


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Put an sbatch, squeue, scancel and scontrol on the PATH that write down what they are called with.

    Returns a function: what was called so far; with `queue`, and `full` to refuse, what is answered from now on.
    """
    folder = tmp_path / "slurm"
    folder.mkdir()
    programs = {
        "sbatch": """
            [ -e full ] && { echo "sbatch: error: QOSMaxSubmitJob" >&2; exit 1; }
            for script; do :; done
            n=$(grep -c ^sbatch calls); cp "$script" $n.sh; [ -e full_next ] && touch full
            echo $((40 + n)) """,
        "squeue": "cat queue 2>/dev/null; true",
    }
    for name in ("sbatch", "squeue", "scancel", "scontrol", "srun", "sacct"):
        file = folder / name
        file.write_text(
            f'#!/bin/sh\ncd {folder}\necho {name} "$@" >> calls\n{programs.get(name, "")}\n', encoding="utf-8"
        )
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def called(queue: str | None = None, full: str | None = None) -> list[str]:
        if queue is not None:
            (folder / "queue").write_text(queue, encoding="utf-8")
        if full is not None:
            (folder / full).touch()
        file = folder / "calls"
        return file.read_text(encoding="utf-8").splitlines() if file.exists() else []

    return called


def test_what_is_submitted_is_what_was_printed(
    recipe_file: Path, slurm: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["launch", recipe_file, "--on", "slurm", "--time", 60, "--seed", 3, "--optim.lr", "2e-3"]
    printed = call(capsys, *words, "--print")[1]
    status, out, _ = call(capsys, *words)
    assert status == 0
    assert "run: job 41" in out
    folder = Path("runs/tiny+lr=2e-3_seed3")
    script = Path("slurm/1.sh").read_text(encoding="utf-8")
    files = folder.resolve() / "launch"
    assert slurm()[0] == f"sbatch --parsable --output={files}/%j_0_log.out {files}/run.sh"
    # beside what is submitted the printed script writes the files that are there when a job is submitted
    shown, _, written = printed.partition("mkdir")
    assert (options(shown), printed.splitlines()[-1]) == (options(script), script.splitlines()[-1])
    assert script.splitlines() == [*shown.splitlines(), written.splitlines()[-1]]
    assert (folder / "launch/recipe.toml").read_text(encoding="utf-8") in printed
    asked = RunDir(folder / "launch").read_recipe()
    assert (asked.seed, asked.optim.lr) == (3, 2e-3)
    record = Launch.read(folder)
    assert record is not None
    assert [job for job, _, _ in record.tasks()] == ["41"]

    slurm(queue="41|PENDING|Priority\n")
    status, out, _ = call(capsys, "launch", "--status")
    assert re.search(r"41 +runs/tiny\+lr=2e-3_seed3 +pending \(priority\) +waiting", out), out
    status, _, err = call(capsys, *words)
    assert (status, "launched already, job 41 is pending" in err) == (2, True)
    assert call(capsys, "stop", folder)[0] == 0  # nothing is trained yet: its job is cancelled
    assert slurm()[-1] == "scancel 41"
    slurm(queue="41|CANCELLED|None\n")
    status, _, err = call(capsys, "stop", folder)
    assert (status, err.count("\n"), "no process works on" in err) == (2, 1, True)
    assert call(capsys, *words)[0] == 0


def test_a_printed_script_needs_no_other_file(
    dataset: Path,
    recipe_file: Path,
    tmp_path: Path,
    slurm: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """test_slurm has real jobs; here srun and sbatch only write down how they are called."""
    words = ["launch", recipe_file, "--on", "slurm", "--print", "--optim.lr", "2e-3"]
    Path("saved.sh").write_text(call(capsys, *words)[1], encoding="utf-8")
    subprocess.run(["bash", "saved.sh"], check=True)
    folder = tmp_path / "runs/tiny+lr=2e-3_seed1337"
    record = Launch.read(folder)
    assert record is not None
    assert record.command == shlex.join(["gptlab", *map(str, words)]).replace(" --print", "")
    assert RunDir(folder / "launch").read_recipe().optim.lr == 2e-3
    assert slurm()[-1].endswith(f"gptlab launch --job {folder} --part run")

    study_file(tmp_path, dataset)
    study = call(capsys, "launch", "tiny.toml", "--on", "slurm", "--print", "--out", "my study")[1]
    Path("saved.sh").write_text(study, encoding="utf-8")
    assert subprocess.run(["bash", "saved.sh"], check=True, capture_output=True).stdout == b"submitted 41 42 43\n"
    record = Launch.read(tmp_path / "my study")
    assert record is not None
    assert [part.job for part in record.parts] == ["41", "42", "43"]
    assert [line.partition("--dependency=")[2] for line in slurm()[-3:]] == ["", "afterany:41", "afterany:41:42"]
    assert json.loads(Path("my study/plan.json").read_text(encoding="utf-8"))["plan"]["baseline"] == "plain"
    assert load_study("my study/study.toml").build("fast", 1) == load_study("tiny.toml").build("fast", 1)


def test_what_is_wrong_is_said_before_anything_is_submitted(
    recipe_file: Path,
    slurm: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train(load_recipe(recipe_file, {"train.max_steps": 1}), "done", quiet=True)
    for words, says in (
        (["--optim.lr", "-1"], "optim.lr = -1: must be"),
        (["--data.path", "nowhere"], "nowhere"),
        (["--out", "done", "--train.max-steps", "1"], "holds a finished run of 1 steps"),
        (["--jobs", "2"], "are for a study"),
        (["--tasks", "2", "--distributed.strategy", "none"], "use ddp or fsdp"),
        (["--nodes", "0"], "nodes = 0"),
        (["--bogus", "2"], "unrecognized"),
    ):
        status, _, err = call(capsys, "launch", recipe_file, "--on", "slurm", *words)
        assert (status, says in err) == (2, True), err
    assert call(capsys, "launch", "tiny.tml", "--on", "slurm")[0] == 2
    assert call(capsys, "launch", recipe_file)[0] == 2  # on what?
    assert call(capsys, "launch", "--status")[0] == 2  # nothing was launched
    assert call(capsys, "launch", recipe_file, "--on", "local", "--gpus", 99)[0] == 2
    assert call(capsys, "stop", "slurm")[0] == 2  # no run
    assert slurm() == []
    assert not Path("runs").exists()

    with monkeypatch.context() as patch:
        patch.setenv("PATH", "/nonexistent")
        status, _, err = call(capsys, "launch", recipe_file, "--on", "slurm")
        assert (status, "there is no sbatch" in err) == (2, True)
    assert not Path("runs").exists()

    slurm(full="full")
    status, _, err = call(capsys, "launch", recipe_file, "--on", "slurm")
    assert (status, err.count("\n"), "SLURM refused the job: sbatch: error: QOSMaxSubmitJob" in err) == (2, 1, True)
    assert Launch.read(Path("runs/tiny_seed1337")) is None


def test_a_study_that_slurm_refuses_half_of_is_taken_back(
    dataset: Path,
    tmp_path: Path,
    slurm: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    study_file(tmp_path, dataset)
    slurm(full="full_next")
    assert call(capsys, "launch", "tiny.toml", "--on", "slurm")[0] == 2
    assert [line.split("/")[0].split()[0] for line in slurm()] == ["sbatch", "sbatch", "scancel"]
    assert slurm()[-1] == "scancel 41"
    assert Launch.read(tmp_path / "results/tiny") is None


# -- in the job


@pytest.mark.parametrize(
    ("number", "folder_file", "status", "requeues"),
    [
        (signal.SIGUSR2, False, "interrupted", True),
        (signal.SIGTERM, False, "interrupted", False),  # scancel; after a preemption SLURM requeues by itself
        (None, True, "interrupted", False),  # gptlab stop
        (signal.SIGUSR2, False, "completed", False),
        (signal.SIGUSR2, False, "diverged", False),
    ],
)
@pytest.mark.parametrize("cluster", ["slurm", "local"])
def test_a_job_requeues_itself_only_where_it_was_warned(
    recipe_file: Path,
    slurm: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    cluster: str,
    number: signal.Signals | None,
    folder_file: bool,
    status: str,
    requeues: bool,
) -> None:
    call(capsys, "launch", recipe_file, "--on", "slurm", "--out", "run")
    drawn: list[Path] = []

    def trained(recipe: Recipe, out: Path) -> Result:
        with StopSignal(out) as stop:
            if number is not None:
                os.kill(os.getpid(), number)
            if folder_file:
                (out / "stop").touch()
            assert stop()
        return Result(status, steps=5)

    monkeypatch.setattr(loop, "train", trained)
    record = Launch.read(Path("run"))
    assert record is not None
    record.on = cluster
    record.write()
    for key, value in {"SLURM_JOB_ID": "43", "SLURM_ARRAY_JOB_ID": "41", "SLURM_ARRAY_TASK_ID": "2"}.items():
        monkeypatch.setenv(key, value)
    ended = job.run_job(Path("run"), "run", drawn.append)
    assert ended == (
        {"slurm": 0, "local": 144}[cluster] if requeues else {"interrupted": 4, "completed": 0, "diverged": 3}[status]
    )
    assert ("scontrol requeue 41_2" in slurm()) == (requeues and cluster == "slurm")
    assert drawn == ([] if requeues else [Path("run")])


def test_a_limit_too_short_for_a_step_is_not_tried_for_ever(
    recipe_file: Path, slurm: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    call(capsys, "launch", recipe_file, "--on", "slurm", "--out", "run", "--time", "3")

    def trained(recipe: Recipe, out: Path) -> Result:
        os.kill(os.getpid(), signal.SIGUSR2)
        clock.append(90.1)
        return Result("interrupted", steps=0)

    clock = [0.0]
    monkeypatch.setattr(job.time, "monotonic", lambda: clock[-1])
    monkeypatch.setattr(loop, "train", trained)
    assert job.run_job(Path("run"), "run", lambda _: None) == 4
    assert "too short for one step" in capsys.readouterr().err
    assert not any(line.startswith("scontrol") for line in slurm())


def test_ranks_are_torchruns() -> None:
    environment = {
        "SLURM_JOB_ID": "123456",
        "SLURM_NTASKS": "8",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_NODELIST": "gpu[07-08]",
        "SLURM_NODEID": "1",
    }
    assert job.slurm_rank_variables(environment) == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "13456",
    }
    for nodes, first in (
        ("gpu07,gpu08", "gpu07"),
        ("rack[1-2]n[03,05]", "rack1n03"),
        ("a[9,11],b", "a9"),
        ("n1-[3-4]x", "n1-3x"),
    ):
        assert job.slurm_rank_variables(environment | {"SLURM_JOB_NODELIST": nodes})["MASTER_ADDR"] == first
    assert job.slurm_rank_variables({"SLURM_NTASKS": "1"}) == {}


def test_an_arrays_task_trains_its_run_and_leaves_its_summary(
    dataset: Path,
    fakes: Fakes,
    slurm: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    study_file(Path(), dataset)
    fakes.ends = {"fast seed 1": ["failed: the tokenizer melted"], "plain seed 1": ["diverged"]}
    call(capsys, "launch", "tiny.toml", "--on", "slurm")
    folder = Path("results/tiny")

    def task(part: str, index: int) -> int:
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(index))
        return job.run_job(folder, part, lambda _: None)

    record = Launch.read(folder)
    assert record is not None
    assert record.part("gate").runs == [("plain", 0), ("fast", 0)]
    assert record.part("arms").runs == [("late", 0), ("late", 1), ("plain", 1), ("fast", 1)]
    assert task("arms", 0) == 1  # the core runs of seed 0 have not ended
    assert "extended arms are not started: plain seed 0, the baseline" in capsys.readouterr().err
    assert task("gate", 0) == 0
    assert statuses(folder) == {
        "plain 0": "completed",
        "fast 0": "waiting",
        "plain 1": "waiting",
        "fast 1": "waiting",
        "late 0": "waiting",
        "late 1": "waiting",
    }
    assert [task("gate", 1), *(task("arms", index) for index in (0, 2, 3))] == [0, 0, 0, 1]
    assert summary(folder, "fast_seed1") | {"reason": ""} == {
        "study": "tiny",
        "arm": "fast",
        "group": "core",
        "seed": 1,
        "status": "failed",
        "reason": "",
        **{"steps": 24, "tokens": 6144, "wall_seconds": 10.0},
    }
    assert "the tokenizer melted" in summary(folder, "fast_seed1")["reason"]
    assert task("arms", 1) == 1  # the baseline of seed 1 diverged
    assert not (folder / "late_seed1").exists()

    fakes.ends = {}
    (folder / "plain_seed1.json").unlink()
    (folder / "plain_seed1/result.json").unlink()
    slurm(queue="")
    call(capsys, "launch", "tiny.toml", "--on", "slurm")  # what has no result is submitted again
    again = Launch.read(folder)
    assert again is not None
    assert [part.name for part in again.parts] == ["arms", "report"]
    assert again.part("arms").runs == [("late", 1), ("plain", 1), ("fast", 1)]
    assert [task("arms", index) for index in (0, 1, 2)] == [0, 0, 0]
    assert summary(folder, "late_seed1")["status"] == "completed"
    out = call(capsys, "launch", "--status", folder)[1]
    assert re.search(r"44_2 +results/tiny/fast_seed1 +ended +completed +24", out), out
    assert re.search(r"45 +results/tiny: report +ended +waiting", out), out


# -- stopping


@pytest.fixture
def trainer() -> Iterator[Callable[[Path], threading.Thread]]:
    """A run that "trains" in a thread until its folder is asked to stop."""
    threads = []

    def work(folder: Path, ready: threading.Event) -> None:
        run = RunDir(folder)
        with run.lock(), StopSignal(folder) as stop:
            (folder / "recipe.toml").touch()
            ready.set()
            while not stop():
                time.sleep(0.01)
            run.write_json("result.json", {"status": "interrupted", "steps": 500})

    def start(folder: Path) -> threading.Thread:
        ready = threading.Event()
        threads.append(threading.Thread(target=work, args=(folder, ready)))
        threads[-1].start()
        ready.wait()
        return threads[-1]

    yield start
    for thread in threads:
        thread.join(timeout=HANGS)
        assert not thread.is_alive()


def test_stop_waits_for_the_checkpoint_and_says_how_to_go_on(
    tmp_path: Path, trainer: Callable[[Path], threading.Thread], capsys: pytest.CaptureFixture[str]
) -> None:
    thread = trainer(tmp_path / "run")
    status, out, _ = call(capsys, "stop", tmp_path / "run")
    assert status == 0
    assert "saved at step 500; `gptlab train" in out
    assert not thread.is_alive() or thread.join(1) is None
    assert not (tmp_path / "run/stop").exists()
    for folder in (tmp_path / "run", tmp_path / "nothing", tmp_path):
        status, _, err = call(capsys, "stop", folder)
        assert (status, err.count("\n")) == (2, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    assert not (tmp_path / "run/stop").exists()

    thread = trainer(tmp_path / "run")
    status, out, _ = call(capsys, "stop", tmp_path / "run", "--no-wait")
    assert (status, "asked to save and end" in out) == (0, True)


def test_stop_of_a_studys_array_reaches_runs_and_cancels_the_rest(
    dataset: Path,
    tmp_path: Path,
    slurm: Callable[..., list[str]],
    trainer: Callable[[Path], threading.Thread],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    study_file(tmp_path, dataset)
    call(capsys, "launch", "tiny.toml", "--on", "slurm", "--jobs", 1)
    waiting = "".join(f"42_{i}|PENDING|Dependency\n" for i in range(4))
    slurm(queue="41_0|RUNNING|None\n41_1|PENDING|JobArrayTaskLimit\n" + waiting + "43|PENDING|Dependency\n")
    folder = Path("results/tiny")
    tiny = load_study("tiny.toml").build("plain", 0)
    trainer(folder / "plain_seed0")
    RunDir(folder / "plain_seed0").write_recipe(tiny)
    status, out, _ = call(capsys, "stop", folder)
    assert status == 0
    assert slurm()[-1] == "scancel 41_1 42_0 42_1 42_2 42_3 43"
    assert "6 jobs cancelled" in out
    assert "1 interrupted, 5 waiting; `gptlab launch tiny.toml --on slurm --jobs 1` continues" in out


def test_stop_of_a_runner_stops_its_runs(
    dataset: Path,
    fakes: Fakes,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fakes.ends = {"plain": ["wait"]}
    study = load_study(study_file(Path(), dataset))
    ended: list[int] = []
    thread = threading.Thread(target=lambda: ended.append(run_study(study, "out", quiet=True, jobs=1)))
    thread.start()
    while not fakes.started():
        time.sleep(0.02)
    status, out, _ = call(capsys, "stop", "out")
    thread.join()
    assert (status, ended) == (0, [4])
    assert "`gptlab study run out` continues" in out
    assert statuses(Path("out"))["plain 0"] == "interrupted"
    assert fakes.started() == ["plain_seed0"]
    assert not Path("out/stop").exists()


# -- on this machine, by the same path


def until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + HANGS
    while not (value := condition()):
        assert time.monotonic() < deadline, "in vain"
        time.sleep(0.1)
    return value


def job_ended(folder: Path) -> bool:
    record = Launch.read(folder)
    assert record is not None
    return all(state == "ENDED" for state in job_states([record]).values())


def log_of(folder: Path) -> str:
    return "".join(file.read_text(encoding="utf-8") for file in sorted((folder / "launch").glob("*_log.out")))


def test_a_recipe_in_the_background(
    recipe_file: Path, recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(capsys, "launch", recipe_file, "--on", "local", "--out", "run")[0] == 0
    status, _, err = call(capsys, "launch", recipe_file, "--on", "local", "--out", "run")
    assert (status, "launched already" in err) == (2, True)
    train(recipe, "alone", quiet=True)
    until(lambda: job_ended(Path("run")))
    assert measured(tmp_path / "run") == measured(tmp_path / "alone"), log_of(Path("run"))
    assert (tmp_path / "run/card.md").is_file()
    assert not list(tmp_path.rglob("*.pkl"))  # nothing travels by pickle
    out = call(capsys, "launch", "--status", ".")[1]
    assert re.search(r"run +ended +completed +24", out), out


@pytest.mark.slow
def test_a_recipe_in_the_background_starts_again_at_its_limit(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    long = tiny_recipe(
        dataset, train__max_steps=100_000, schedule__decay_steps=5000, train__eval_every=0, train__threads=1
    )
    Path("long.toml").write_text(long.to_toml(), encoding="utf-8")
    run = RunDir("run")
    call(capsys, "launch", "long.toml", "--on", "local", "--out", "run", "--time", "2:05", "--signal-delay", 110)
    steps = until(lambda: run.read_json("result.json").get("steps"))  # warned after 15 seconds
    shorter = long.replace({"train.max_steps": steps + 10})  # the limit may change: the second start is to end soon
    RunDir("run/launch").write_recipe(shorter)
    until(lambda: job_ended(Path("run")))
    assert "the job starts again and continues" in log_of(Path("run"))
    train(shorter, "alone", quiet=True)
    assert measured(tmp_path / "run") == measured(tmp_path / "alone")


@pytest.mark.slow
def test_a_printed_script_of_a_local_job_runs_in_the_foreground(
    recipe_file: Path, recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = call(capsys, "launch", recipe_file, "--on", "local", "--out", "run", "--print")[1]
    assert not Path("run").exists()
    assert subprocess.run(["bash", "-c", script]).returncode == 0
    train(recipe, "alone", quiet=True)
    assert measured(tmp_path / "run") == measured(tmp_path / "alone"), log_of(Path("run"))
    out = call(capsys, "launch", "--status", "run")[1]
    assert re.search(r"\d+ +run +ended +completed +24", out), out


@pytest.mark.slow
def test_a_study_in_the_background_ends_with_its_report(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    study_file(tmp_path, dataset, train__max_steps=6)
    assert call(capsys, "launch", "tiny.toml", "--on", "local", "--seeds", 1)[0] == 0
    until(lambda: job_ended(Path("results/tiny")))
    assert set(statuses(Path("results/tiny")).values()) == {"completed", "waiting"}  # one of its two seeds
    assert Path("results/tiny/report.html").is_file(), log_of(Path("results/tiny"))


@pytest.mark.slow
def test_stop_ends_a_run_in_the_background_and_it_goes_on(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    long = tiny_recipe(
        dataset, train__max_steps=100_000, schedule__decay_steps=5000, train__eval_every=0, train__threads=1
    )
    Path("long.toml").write_text(long.to_toml(), encoding="utf-8")
    call(capsys, "launch", "long.toml", "--on", "local", "--out", "run")
    until(lambda: any(line["step"] > 5 for line in RunDir("run").read_metrics()))
    status, out, _ = call(capsys, "stop", "run")
    saved = re.search(r"saved at step (\d+); `", out)
    assert status == 0
    assert saved, out
    until(lambda: job_ended(Path("run")))
    assert "starts again" not in log_of(Path("run"))
    shorter = long.replace({"train.max_steps": int(saved[1]) + 5})
    train(shorter, "run", quiet=True)
    train(shorter, "alone", quiet=True)
    assert measured(tmp_path / "run") == measured(tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_in_the_background(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], strategy: str
) -> None:
    monkeypatch.chdir(tmp_path)
    two = tiny_recipe(dataset, train__max_steps=6, model__dropout=0.0, distributed__strategy=strategy, train__threads=1)
    Path("two.toml").write_text(two.to_toml(), encoding="utf-8")
    assert call(capsys, "launch", "two.toml", "--on", "local", "--out", "run", "--tasks", 2)[0] == 0
    until(lambda: job_ended(Path("run")))
    assert json.loads(Path("run/result.json").read_text(encoding="utf-8"))["status"] == "completed", log_of(Path("run"))
    train(two, "alone", quiet=True)
    for one, other in zip(measured(tmp_path / "run"), measured(tmp_path / "alone"), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize(("status", "alone", "under"), [("interrupted", 4, 0), ("diverged", 3, 0), ("failed", 1, 1)])
def test_torchrun_starts_nothing_again_that_ended_in_an_orderly_way(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, status: str, alone: int, under: int
) -> None:
    monkeypatch.setattr(loop, "train", lambda recipe, out, resume: Result(status))
    assert call(capsys, "train", recipe_file)[0] == alone
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert call(capsys, "train", recipe_file)[0] == under
