"""SIGKILL before the n-th change of the disk of a study's runner, and of one of two processes that train together."""

from __future__ import annotations

import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_recipe
from processes import killed as killed_together
from test_faults_kills import FORK, PROCESSES, SMALL, assert_same, count_changes
from test_study_runner import Fakes, study_file, summary, untimed
from test_training_resume import measured

from gptlab.config import Study, load_study
from gptlab.rundir import RunDir
from gptlab.study import runner
from gptlab.study.runner import run_study
from gptlab.study.table import read_study
from gptlab.training.checkpoint import list_checkpoints
from gptlab.training.loop import train

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
forked = pytest.mark.skipif(not FORK, reason="a forked child has the test's workers")

# -- studies


def study_child(study: Study, out: Path, limit: int, fakes: Fakes | None) -> None:
    if fakes:
        runner.command = fakes.command  # type: ignore[assignment]
        runner.POLL_SECONDS = 0.02
    count_changes(out, limit)
    raise SystemExit(run_study(study, out, jobs=2, quiet=True))


def start(study: Study, out: Path, limit: int, fakes: Fakes | None) -> int:
    """Run a study in a process that is killed so. Returns its exit code."""
    process = PROCESSES.Process(target=study_child, args=(study, out, limit, fakes))
    process.start()
    process.join(600)
    code = process.exitcode
    process.kill()
    assert code in (0, -signal.SIGKILL), code
    return code


def summaries(folder: Path) -> dict[str, Any]:
    names = [f"{state.arm}_seed{state.seed}" for state in read_study(folder)]
    return {name: untimed(summary(folder, name)) for name in names}


def assert_same_study(whole: Path, pieces: Path) -> None:
    assert summaries(whole) == summaries(pieces)
    assert (whole / "study.toml").read_bytes() == (pieces / "study.toml").read_bytes()
    plans = [RunDir(folder).read_json("plan.json") for folder in (whole, pieces)]
    assert plans[0]["sha256"] == plans[1]["sha256"] and not plans[1]["late"]
    assert not list(pieces.glob(".*.tmp"))


@forked
def test_a_runner_killed_before_some_changes_of_the_disk(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six runs by workers that train nothing. Each start goes on from what the last one left."""
    monkeypatch.chdir(tmp_path)
    fakes, study = Fakes(tmp_path), load_study(study_file(tmp_path, dataset))
    assert start(study, tmp_path / "whole", 0, fakes) == 0
    for limit in (4, 9, 13):
        assert start(study, tmp_path / "pieces", limit, fakes) != 0
    assert start(study, tmp_path / "pieces", 0, fakes) == 0
    assert_same_study(tmp_path / "whole", tmp_path / "pieces")


@forked
@pytest.mark.slow
def test_a_runner_killed_before_each_change_of_the_disk(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fakes, study = Fakes(tmp_path), load_study(study_file(tmp_path, dataset))
    assert start(study, tmp_path / "whole", 0, fakes) == 0
    limit = 1
    while start(study, pieces := tmp_path / str(limit), limit, fakes) != 0:
        assert start(study, pieces, 0, fakes) == 0
        assert_same_study(tmp_path / "whole", pieces)
        limit += 1
    print(f"a runner: {limit - 1} kills")
    assert limit > 30


@forked
@pytest.mark.faults
def test_a_runner_of_real_runs_killed_before_changes_of_the_disk(dataset: Path, tmp_path: Path) -> None:
    file = study_file(tmp_path, dataset, train__max_steps=6, train__eval_every=3, checkpoint__every=1, eval__tokens=64)
    study = load_study(file)
    assert start(study, tmp_path / "whole", 0, None) == 0
    draw = random.Random(0)
    kills = sum(start(study, tmp_path / "pieces", draw.randint(1, 14), None) != 0 for _ in range(12))
    assert start(study, tmp_path / "pieces", 0, None) == 0
    assert_same_study(tmp_path / "whole", tmp_path / "pieces")
    for name in summaries(tmp_path / "whole"):
        assert measured(tmp_path / "whole" / name) == measured(tmp_path / "pieces" / name)
    print(f"a runner of real runs: {kills} kills")
    assert kills >= 3


# -- two processes


def rank(dataset: str, out: str, changes: dict[str, Any], limit: int, which: int) -> None:
    import os

    if int(os.environ["RANK"]) == which:
        count_changes(Path(out), limit)
    train(tiny_recipe(Path(dataset), **changes), out, quiet=True)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("kills", [pytest.param(1, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.faults)])
def test_one_of_two_processes_killed_before_a_change_of_the_disk(
    strategy: str, kills: int, dataset: Path, tmp_path: Path
) -> None:
    """The other one ends too, and two go on to the same bits."""
    changes = {**SMALL, "distributed__strategy": strategy, "batch__tokens_per_step": 256}
    draw, done = random.Random(strategy), 0
    assert killed_together(2, rank, str(dataset), str(tmp_path / "whole"), changes, 0, 0) == [0, 0]
    for kill in range(kills):
        which = (kill + 1) % 2 if strategy == "fsdp" else 0  # of ddp the first process alone writes
        limit = draw.randint(3, 12) if which else draw.randint(5, 40)
        codes = killed_together(2, rank, str(dataset), str(tmp_path / "run"), changes, limit, which, seconds=120)
        assert None not in codes, "a process hangs"
        if codes[which] == -signal.SIGKILL:
            done += 1
        else:
            assert codes == [0, 0]
            break
    assert killed_together(2, rank, str(dataset), str(tmp_path / "run"), changes, 0, 0) == [0, 0]
    if strategy == "ddp":
        assert_same(tmp_path / "whole", tmp_path / "run")
    else:
        assert_same_shards(tmp_path / "whole", tmp_path / "run")
    print(f"{strategy}: {done} kills")
    assert done >= 1


def assert_same_shards(whole: Path, pieces: Path) -> None:
    from safetensors.torch import load_file

    assert measured(whole) == measured(pieces)
    last = [list_checkpoints(RunDir(path))[-1] for path in (whole, pieces)]
    names = [sorted(path.name for path in one.glob("*.safetensors")) for one in last]
    assert names[0] == names[1] and names[0]
    for name in names[0]:
        one, other = (load_file(path / name) for path in last)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
