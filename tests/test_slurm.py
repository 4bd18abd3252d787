"""A real SLURM on this machine: jobs that end, run into their limit, are preempted, stopped and cancelled; studies.

tests/slurm/start.sh sets it up in a temporary folder. What squeue and sinfo say on the way is printed: `pytest -rP`
shows it.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_recipe
from test_cli import call
from test_study_launch import log_of, until
from test_study_runner import statuses, study_file, summary
from test_training_resume import measured

from gptlab.config import Recipe, load_study
from gptlab.rundir import RunDir
from gptlab.study.launch.record import Launch
from gptlab.study.launch.status import job_states
from gptlab.training.loop import train

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("slurm")]  # of one cluster

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "squeue", "scontrol")
SETUP = Path(__file__).parent / "slurm"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cluster of this machine alone; what the tests start finds it by SLURM_CONF."""
    missing = [name for name in PROGRAMS if not shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")]
    if missing:
        pytest.skip(f"no SLURM here ({', '.join(missing)}): apt-get install slurm-wlm munge, and run this as root")
    if os.geteuid() != 0:
        pytest.skip("SLURM is here, but only root may start its daemons: run this as root")
    folder = tmp_path_factory.mktemp("slurm") / "cluster"
    for above in folder.parents:  # munge's user must reach its key
        if above.stat().st_uid == 0 and above != Path("/"):
            above.chmod(above.stat().st_mode | 0o011)
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    before = {key: value for key, value in os.environ.items() if key.startswith(("SLURM", "SBATCH"))}
    for key in before:
        del os.environ[key]
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    started = subprocess.run([SETUP / "start.sh", folder, str(port)], capture_output=True, text=True)
    try:
        assert started.returncode == 0, started.stderr
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
        yield
    finally:
        if "SLURM_CONF" in os.environ:
            sh("scancel", "--user=root")
            time.sleep(1)
        subprocess.run([SETUP / "stop.sh", folder], check=True)
        os.environ.pop("SLURM_CONF", None)
        os.environ.update(before)


def sh(*words: object) -> str:
    return subprocess.run([str(word) for word in words], capture_output=True, text=True).stdout


def excerpt(*words: object) -> None:
    print("$", *words)
    print(sh(*words))


@pytest.fixture
def folder(slurm: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sh("scancel", "--user=root")
    until(lambda: not sh("squeue", "-h"))


@pytest.fixture
def launched(folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Path]:
    """Launch a recipe or a study on SLURM."""

    def launched(content: Recipe | Path, out: str, *words: object) -> Path:
        file = content
        if isinstance(content, Recipe):
            file = Path("recipe.toml")
            file.write_text(content.to_toml(), encoding="utf-8")
        status, said, err = call(capsys, "launch", file, "--on", "slurm", "--out", out, *words)
        assert status == 0, err
        print(said)
        return Path(out)

    return launched


def states(folder: Path) -> dict[str, str]:
    record = Launch.read(folder)
    assert record is not None
    return job_states([record])


def ended(folder: Path) -> Callable[[], bool]:
    return lambda: not any(state.startswith(("PEND", "RUN", "COMPLETING", "CONF")) for state in states(folder).values())


def steps(run: RunDir) -> int:
    return max((line["step"] for line in run.read_metrics()), default=0)


def endless(dataset: Path, **changes: Any) -> Recipe:
    return tiny_recipe(
        dataset,
        train__max_steps=100_000,
        schedule__decay_steps=5000,
        train__eval_every=0,
        checkpoint__every=100,
        train__threads=1,
        **changes,
    )


def start_at_once(job: str) -> None:
    """A requeued job waits for two minutes by itself; at less than a second its node refuses it as one just killed."""
    until(lambda: "PENDING" in sh("squeue", "-h", "-r", "-j", job, "-o", "%T"))
    excerpt("squeue", "-o", "%.8i %.9P %.12j %.10T %.6M %.6D %R")
    time.sleep(3)
    sh("scontrol", "update", f"JobId={job}", "StartTime=now")


def test_a_recipe_is_submitted_and_finishes(
    dataset: Path, launched: Callable[..., Path], recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    excerpt("sinfo")
    out = launched(recipe, "run", "--time", 10)
    excerpt("squeue", "-o", "%.8i %.9P %.12j %.10T %.6M %.6D %R")
    train(recipe, "alone", quiet=True)
    until(ended(out))
    assert set(states(out).values()) == {"COMPLETED"}, log_of(out)
    assert measured(out) == measured(Path("alone"))
    assert (out / "card.md").is_file()
    said = call(capsys, "launch", "--status", out)[1]
    print(said)
    assert re.search(r"run +completed +completed +24", said)


def test_a_printed_script_is_saved_and_handed_to_sbatch(
    recipe: Recipe, dataset: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("recipe.toml").write_text(recipe.to_toml(), encoding="utf-8")
    words = ["--on", "slurm", "--time", 10, "--print"]
    Path("run.sh").write_text(call(capsys, "launch", "recipe.toml", *words, "--out", "run")[1], encoding="utf-8")
    assert sh("sbatch", "run.sh").startswith("Submitted batch job")
    study_file(folder, dataset, train__max_steps=6)
    study = call(capsys, "launch", "tiny.toml", *words, "--out", "study", "--seeds", 1)[1]
    Path("study.sh").write_text(study, encoding="utf-8")
    assert sh("sbatch", "study.sh").startswith("Submitted batch job")  # a job that submits the study's jobs
    train(recipe, "alone", quiet=True)

    until(lambda: not sh("squeue", "-h", "-t", "pending,running"))
    says = "".join(file.read_text(encoding="utf-8") for file in Path().glob("slurm-*.out"))
    assert set(states(Path("run")).values()) == {"COMPLETED"}, says + log_of(Path("run"))
    assert measured(Path("run")) == measured(Path("alone"))
    assert set(states(Path("study")).values()) == {"COMPLETED"}, says + log_of(Path("study"))
    assert [statuses(Path("study"))[f"{arm} 0"] for arm in ("plain", "fast", "late")] == ["completed"] * 3
    assert Path("study/report.html").is_file()
    print(call(capsys, "launch", "--status", ".")[1])


def test_at_its_time_limit_it_saves_requeues_itself_and_goes_on(dataset: Path, launched: Callable[..., Path]) -> None:
    # SLURM's shortest limit is a minute, and it warns up to a minute early: here within half a minute of the start
    recipe = endless(dataset)
    out = launched(recipe, "run", "--time", 1, "--signal-delay", 40)
    (job,) = states(out)
    saved = until(lambda: RunDir(out).read_json("result.json"))["steps"]
    until(lambda: states(out)[job].startswith("PENDING"))
    assert f"interrupted after {saved} steps" in log_of(out)
    assert f"job {job} is requeued and continues" in log_of(out)
    # a run's limit may change, and so may a job's: the second start is to end, however slow this machine is
    shorter = recipe.replace({"train.max_steps": saved + 20})
    RunDir(out / "launch").write_recipe(shorter)
    sh("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    start_at_once(job)
    train(shorter, "alone", quiet=True)
    until(ended(out))
    print(log_of(out))
    assert states(out)[job] == "COMPLETED"
    assert RunDir(out).read_json("result.json")["status"] == "completed"
    assert measured(out) == measured(Path("alone"))


def test_a_preempted_task_of_a_studys_array_goes_on(dataset: Path, folder: Path, launched: Callable[..., Path]) -> None:
    endless_settings = {
        "train__max_steps": 100_000,
        "schedule__decay_steps": 5000,
        "train__eval_every": 0,
        "train__threads": 1,
    }
    file = study_file(folder, dataset, **endless_settings)
    out = launched(file, "study", "--arm", "plain", "--seed", 0, "--time", 10, "--cpus", 2)
    job = next(iter(states(out)))
    run = RunDir(out / "plain_seed0")
    until(lambda: steps(run) > 5)
    sh("sbatch", "--partition=urgent", "--cpus-per-task=2", "--output=/dev/null", "--wrap=true")
    until(lambda: states(out)[job].startswith("PENDING"))
    saved = run.read_json("result.json")["steps"]
    assert "requeued and continues" in log_of(out), log_of(out)
    assert not (out / "plain_seed0.json").exists()
    # the study's folder says what the second start trains: less, to end soon
    text = (out / "study.toml").read_text(encoding="utf-8")
    (out / "study.toml").write_text(text.replace("max_steps = 100000", f"max_steps = {saved + 20}"), encoding="utf-8")
    start_at_once(job)
    train(load_study(out / "study.toml").build("plain", 0), "alone", quiet=True)
    until(ended(out))
    print(log_of(out))
    assert summary(out, "plain_seed0")["status"] == "completed"
    assert measured(run.path) == measured(Path("alone"))


def test_a_study_is_an_array_its_gate_and_its_report(
    dataset: Path, folder: Path, launched: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = study_file(folder, dataset, train__max_steps=6)
    out = launched(file, "study", "--time", 10, "--seed", 0, "--optim.weight-decay", "0.2")
    excerpt("squeue", "-o", "%.8i %.9P %.14j %.10T %.6M %.6D %R")
    core, late = RunDir(out / "plain_seed0"), out / "late_seed0"
    while not ended(out)():
        if late.exists():
            assert core.read_json("result.json")["status"] == "completed"
        time.sleep(0.3)
    said = call(capsys, "launch", "--status", out)[1]
    print(said)
    assert set(states(out).values()) == {"COMPLETED"}, log_of(out)
    assert {name: status for name, status in statuses(out).items() if name.endswith("0")} == {
        "plain 0": "completed",
        "fast 0": "completed",
        "late 0": "completed",
    }
    assert core.read_recipe().optim.weight_decay == 0.2
    assert (out / "report.html").is_file()


def test_stop_and_cancel_leave_a_run_that_goes_on(
    dataset: Path, launched: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = endless(dataset)
    out = launched(recipe, "run", "--time", 10)
    until(lambda: steps(RunDir(out)) > 5)
    status, said, _ = call(capsys, "stop", out)
    print(said)
    assert status == 0
    found = re.search(r"saved at step (\d+); `", said)
    assert found
    until(ended(out))
    assert "requeued" not in log_of(out)

    launched(recipe, "run", "--time", 10)  # the same command
    until(lambda: steps(RunDir(out)) > int(found[1]) + 5)
    sh("scancel", *states(out))
    until(ended(out))
    assert set(states(out).values()) == {"CANCELLED"}
    saved = RunDir(out).read_json("result.json")
    assert saved["status"] == "interrupted"
    assert not (out / "stop").exists()
    shorter = recipe.replace({"train.max_steps": saved["steps"] + 5})
    train(shorter, out, quiet=True)
    train(shorter, "alone", quiet=True)
    assert measured(out) == measured(Path("alone"))


def test_stop_of_a_study_keeps_its_other_jobs_from_starting(
    dataset: Path, folder: Path, launched: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = study_file(folder, dataset, train__max_steps=100_000, schedule__decay_steps=5000)
    out = launched(file, "study", "--time", 10, "--jobs", 1)
    until(lambda: steps(RunDir(out / "plain_seed0")) > 5)
    status, said, _ = call(capsys, "stop", out)
    print(said)
    assert status == 0
    assert "6 jobs cancelled" in said  # five more runs and the report
    until(ended(out))
    assert json.loads((out / "plain_seed0/result.json").read_text(encoding="utf-8"))["status"] == "interrupted"
    assert [path.name for path in out.glob("*_seed*")] == ["plain_seed0"]


def test_two_processes_share_a_run(dataset: Path, launched: Callable[..., Path]) -> None:
    recipe = tiny_recipe(dataset, train__max_steps=6, model__dropout=0.0, distributed__strategy="ddp", train__threads=1)
    out = launched(recipe, "run", "--time", 10, "--tasks", 2)
    train(recipe, "alone", quiet=True)
    until(ended(out))
    assert RunDir(out).read_json("result.json").get("status") == "completed", log_of(out)
    for one, other in zip(measured(out), measured(Path("alone")), strict=True):
        assert one == pytest.approx(other, rel=1e-4)
