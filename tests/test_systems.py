"""Systems without Unix's modules, signals and calls, such as Windows: commands that work, and clear errors."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_recipe

from gptlab import machine
from gptlab.config import load_study
from gptlab.distributed.world import process_group
from gptlab.errors import UserError
from gptlab.rundir import RunDir
from gptlab.study import runner
from gptlab.study.runs import planned_runs
from gptlab.training.loop import train

# Removes what Windows lacks, runs command lines one after the other in its process, and prints how each one ended.
PROGRAM = """
import sys
GONE = ("fcntl", "resource", "termios", "pwd", "grp", "tty", "pty", "syslog")
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in GONE:
            raise ImportError(f"No module named {name!r}", name=name)
for name in GONE:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Missing())

import contextlib, io, json, os, signal
if sys.argv[2] == "torch":  # this build of torch needs Unix's modules
    import torch
    import torch.distributed.fsdp
for name in ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGKILL", "SIGQUIT", "SIGALRM", "SIGCHLD"):
    delattr(signal, name)
for name in (
    "sched_getaffinity", "sched_setaffinity", "posix_fadvise", "killpg", "getloadavg", "statvfs", "fork", "setsid",
    "register_at_fork", "getuid", "geteuid", "mkfifo", "nice", "getpgid",
):
    delattr(os, name)

from gptlab import cli
ends = []
for words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main(words)
        except SystemExit as end:
            ends.append([end.code, out.getvalue(), err.getvalue()])
print(json.dumps(ends))
"""


def elsewhere(commands: list[list[Any]], folder: Path, with_torch: bool) -> list[tuple[int, str, str]]:
    """Run command lines in one process without Unix's modules. Returns status, stdout and stderr of each."""
    words = [[str(word) for word in command] for command in commands]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(words), "torch" if with_torch else ""],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "MPLCONFIGDIR": str(folder)},
    )
    assert done.returncode == 0, done.stderr
    ends = [tuple(end) for end in json.loads(done.stdout.splitlines()[-1])]
    assert not [end for end in ends if "Traceback" in end[2]]
    return ends


@pytest.fixture(scope="module")
def study(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished study of two arms and two seeds."""
    import tomli_w

    root = tmp_path_factory.mktemp("systems")
    changes = {
        "train__max_steps": 2,
        "train__eval_every": 2,
        "eval__tokens": 64,
        "checkpoint__every": 2,
        "train__threads": 1,
    }
    recipe = tiny_recipe(dataset, **changes).model_dump()
    (root / "tiny.toml").write_text(
        'name = "tiny"\nseeds = [0, 1]\nbaseline = "plain"\n[arms.plain]\n[arms.fast]\noptim.lr = 2e-2\n'
        + tomli_w.dumps({"recipe": recipe}),
        encoding="utf-8",
    )
    folder, made = root / "tiny", load_study(root / "tiny.toml")
    folder.mkdir()
    runner.keep_study(folder, made, [0, 1])
    for run in planned_runs(made, folder, None, None):
        train(run.recipe, run.dir.path, quiet=True)
        runner.write_summary(made, folder, run, run.dir.read_json("result.json"))
    return folder


def test_what_needs_no_torch_reads(study: Path, tmp_path: Path) -> None:
    run = study / "plain_seed0"
    ends = elsewhere(
        [
            ["study", "status", study],
            ["study", "report", study, "--out", tmp_path / "report"],
            ["study", "power", study / "study.toml", "--effect", "0.1", "--noise", "0.01"],
            ["plot", run, study / "fast_seed0", "--out", tmp_path / "plots", "--compare", study / "fast_seed0"],
            ["recipes"],
            ["studies"],
            ["train", "--help"],
            ["stop", run],
            ["launch", study / "study.toml", "--on", "local", "--seeds", "3", "--out", tmp_path / "launched"],
        ],
        tmp_path,
        with_torch=False,
    )
    assert [status for status, _, _ in ends] == [0] * 7 + [2, 2], ends
    assert ends[0][1].splitlines()[-1] == "done 4 of 4: 4 completed"
    assert (tmp_path / "report/report.html").is_file() and len(list((tmp_path / "plots").iterdir())) >= 3
    assert (
        "the sd of a paired difference over seeds is 0.01" in ends[2][1]
        and "shakespeare-char-cpu" in ends[4][1]
        and "precision-lm" in ends[5][1]
    )
    assert "--optim.lr" in ends[6][1]
    assert ends[8][2].startswith("gptlab: gptlab launch needs Linux or macOS; ")
    assert ends[7][2] == f"gptlab: no process works on {run}: there is nothing to stop\n"


def test_models_are_read_planned_and_trained(study: Path, dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(study / "plain_seed0", run)
    recipe = RunDir(run).read_recipe()
    (tmp_path / "new.toml").write_text(recipe.to_toml(), encoding="utf-8")
    commands = [
        ["eval", run, "--on", "loss"],
        ["sample", run, "--prompt", "the", "--max-tokens", "5"],
        ["plan", tmp_path / "new.toml"],
        ["train", tmp_path / "new.toml", "--out", tmp_path / "again"],
    ]
    ends = elsewhere(commands, tmp_path, with_torch=True)
    assert [status for status, _, _ in ends] == [0] * 4, ends
    assert json.loads(ends[0][1])["val_loss"] > 0
    assert ends[1][1].startswith("the")
    assert "memory" in ends[2][1]
    assert f"{tmp_path / 'again'}: the disk has no locks" in ends[3][2]  # with neither fcntl nor msvcrt
    key = "final_val_loss"
    assert RunDir(tmp_path / "again").read_json("result.json")[key] == RunDir(run).read_json("result.json")[key]


def test_a_command_line_says_whether_a_process_trains() -> None:
    trains = (
        "gptlab train stdlib-demo",
        "/v/bin/python3.12 /v/bin/gptlab train x --out y",
        "python -u -m gptlab train x",
        r"C:\v\Scripts\python.exe C:\v\Scripts\gptlab.exe train x",
        "python -P -m gptlab.study.worker f arm 0",
        "python -uP -m gptlab launch --job f --part run",
    )
    others = (
        "",
        "python",
        "python -m",
        "python -c gptlab",
        "gptlab study run x",
        "gptlab eval train",
        "vim train gptlab",
        "python /v/bin/torchrun --nproc-per-node 2 -m gptlab train",
        "python -m torch.distributed.run -m gptlab train",
        "python -u -m gptlab launch --job f --part study",
        "grep gptlab train",
        "sh -c 'gptlab train x'",
    )
    assert [words for words in trains if not machine.trains(words.split())] == []
    assert [words for words in others if machine.trains(words.split())] == []


def test_a_build_that_cannot_connect_processes_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.distributed.is_available", lambda: False)
    with (
        pytest.raises(UserError, match="2 processes were started, and this build of PyTorch cannot connect them"),
        process_group("ddp", torch.device("cpu")),
    ):
        pass


class Process:
    def __init__(self, pid: int, words: str, cores: tuple[int, ...] = (0, 1), family: tuple[Any, ...] = ()) -> None:
        self.pid, self.words, self.on, self.family = pid, words, list(cores), list(family)

    def cmdline(self) -> list[str]:
        import psutil

        if self.words == "hidden":
            raise psutil.AccessDenied(self.pid)
        return self.words.split()

    def cpu_affinity(self) -> list[int]:
        return self.on

    def parents(self) -> list[Any]:
        return [p for p in self.family if p.pid < self.pid]

    def children(self, recursive: bool) -> list[Any]:
        return [p for p in self.family if p.pid > self.pid]


def test_other_runs_on_the_same_cores_are_counted_and_ones_own_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the patch of conftest.py
    parent, child = Process(1, "gptlab train x"), Process(9, "python -m gptlab.study.worker f plain 0")
    me = Process(5, "gptlab train x", family=(parent, child))
    found = [parent, me, child, Process(20, "hidden"), Process(21, "bash")]
    monkeypatch.setattr("psutil.Process", lambda: me)
    monkeypatch.setattr("psutil.process_iter", lambda: iter(found))
    assert machine.other_runs() == 0
    found += [Process(30, "gptlab train y"), Process(31, "gptlab train y", cores=(2, 3))]  # a job with its own cores
    assert machine.other_runs() == 1

    monkeypatch.setattr(machine, "cores", lambda: 2)
    assert machine.crowded(1) is None
    assert "another run of gptlab trains on this machine: 2 threads per run are too many for 2 cores" in str(
        machine.crowded(2)
    )
    found.append(Process(40, "python -m gptlab.study.worker f plain 1"))
    monkeypatch.setattr(machine, "cores", lambda: 8)
    assert machine.crowded(2) is None
    assert "2 other runs of gptlab train on this machine" in str(machine.crowded(4))
    assert "OMP_NUM_THREADS=2 before each command, or pass --train.threads 2" in str(machine.crowded(4))


def test_threads_spin_less_unless_the_user_says_how_they_wait(study: Path) -> None:
    for given in ({"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}):
        before = dict(given)
        machine.spin_less(given)
        assert given == before
    run = planned_runs(load_study(study / "study.toml"), study, None, None)[0]
    assert runner.worker_environment(run, 0, 1, [])["GOMP_SPINCOUNT"] == "20000"


def test_a_crowded_machine_is_said_once_unless_it_is_to_be_quiet(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "other_runs", lambda: 1)
    monkeypatch.setattr(machine, "cores", lambda: 1)
    recipe = tiny_recipe(dataset, train__max_steps=2, train__threads=2)
    before = torch.get_num_threads()
    try:
        train(recipe, tmp_path / "a", quiet=True)
        assert "another run" not in capsys.readouterr().err
        train(recipe, tmp_path / "b")
    finally:
        torch.set_num_threads(before)
    assert capsys.readouterr().err.count("another run of gptlab trains on this machine") == 1
