"""A rank that is killed or hangs: the others notice within a limit of time, and say which one it is."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from conftest import tiny_recipe
from processes import killed

from gptlab.distributed import world
from gptlab.distributed.world import World
from gptlab.errors import LostRank
from gptlab.rundir import RunDir
from gptlab.training.outcome import typed
from gptlab.training.signals import StopSignal, stack_on_sigterm


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "GRACE", 0.2)


def test_the_ranks_that_say_nothing_are_missing(soon: None) -> None:
    store, said = dist.HashStore(), {}

    def fail(rank: int) -> None:
        said[rank] = str(typed(RuntimeError("Timed out waiting 1000ms for recv"), World(rank, 5, store=store)))

    threads = [threading.Thread(target=fail, args=(rank,)) for rank in (0, 1, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in (0, 1, 3):
        assert said[rank].startswith(f"rank {rank} of 5 lost rank 2, 4, which ended or hangs: RuntimeError: Timed out")
    many = typed(dist.DistBackendError("a fault"), World(0, 100, store=dist.HashStore()))
    assert isinstance(many, LostRank) and "lost rank 1, 2, 3, 4, 5, 6, 7, 8, ..., which" in str(many)


class Gone:
    def set(self, key: str, value: str) -> None:
        raise dist.DistNetworkError("Broken pipe")


class Hangs:
    def set(self, key: str, value: str) -> None:
        time.sleep(1)  # longer than a rank waits
        raise dist.DistNetworkError("its process was killed")


@pytest.mark.parametrize("store", [Gone(), Hangs(), None])
def test_a_store_that_does_not_answer_is_rank_0s(store: Any, soon: None) -> None:
    assert World(1, 2, store=store).missing() == [0]
    assert World(0, 2, store=store).missing() == []


def lose(dataset: str, out: str, how: str) -> None:
    """Train until update 3, in which one rank is killed or hangs. The other one writes what it says to a file."""
    from gptlab.training.loop import train
    from gptlab.training.trainer import Trainer

    world.LIMIT, world.GRACE = 8.0, 1.0
    rank, said = int(os.environ["RANK"]), Path(out, "said.txt")
    place, _, lost = how.partition(" ")
    before = getattr(Trainer, place)

    def step(self: Trainer, step: int) -> None:
        if step == 3 and str(rank) == lost[-1]:
            if lost.startswith("killed"):
                os.kill(os.getpid(), signal.SIGKILL)
            if lost.startswith("aborts"):
                os.abort()
            Path(out, "hangs").write_text(str(os.getpid()), encoding="ascii")
            while not said.exists():
                time.sleep(0.1)
            os._exit(7)
        before(self, step)

    setattr(Trainer, place, step)
    Path(out, f"ready-{rank}").touch()
    while not Path(out, f"ready-{1 - rank}").exists():  # the limit is for the start too
        time.sleep(0.05)
    changes = {"batch__tokens_per_step": 224, "train__max_steps": 50, "distributed__strategy": "ddp"}
    try:
        train(tiny_recipe(Path(dataset), **changes), Path(out, "run"), quiet=True)
    except LostRank as error:
        if (hangs := Path(out, "hangs")).exists():  # what torchrun does then
            os.kill(int(hangs.read_text(encoding="ascii")), signal.SIGTERM)
            time.sleep(0.5)
        said.with_suffix(".part").write_text(str(error), encoding="utf-8")
        said.with_suffix(".part").rename(said)


@pytest.mark.slow
@pytest.mark.xdist_group("parallel")
@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL here")
@pytest.mark.parametrize(
    "how",
    [
        "seed_dropout hangs 1",
        "inject_faults hangs 1",
        "inject_faults hangs 0",
        "seed_dropout killed 1",
        "seed_dropout killed 0",
        "inject_faults aborts 1",
    ],
)
def test_a_lost_rank_is_named(how: str, dataset: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It hangs before its backward pass, where PyTorch waits for it, or after, where `World` does."""
    began = time.monotonic()
    killed(2, lose, str(dataset), str(tmp_path), how, seconds=90)
    lost = int(how[-1])
    says = (tmp_path / "said.txt").read_text(encoding="utf-8")
    assert says.startswith(f"rank {1 - lost} of 2 lost rank {lost}, which ended or hangs: "), says
    result = RunDir(tmp_path / "run").read_json("result.json")
    assert (result["status"], result["reason"]) == ("failed", says)
    assert "stack\nTraceback" in (tmp_path / "run" / "failure.txt").read_text(encoding="utf-8")
    assert time.monotonic() - began < 90
    stacks = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "run").glob("stack-rank-*.txt")}
    assert list(stacks) == [f"stack-rank-{lost}.txt"]
    assert "hangs" not in how or " in step\n" in stacks[f"stack-rank-{lost}.txt"]
    said = capfd.readouterr().err
    assert ("Fatal Python error: Aborted" in said and " in step\n" in said) is ("aborts" in how)


def test_a_stack_is_left_by_what_is_ended_and_not_by_what_ends(tmp_path: Path) -> None:
    file = tmp_path / "stack-rank-1.txt"
    with StopSignal() as asked, stack_on_sigterm(file):
        assert file.read_text(encoding="utf-8") == ""
        os.kill(os.getpid(), signal.SIGTERM)
        assert "in test_a_stack_is_left_by_what_is_ended" in file.read_text(encoding="utf-8")
        assert asked() and asked.reason == "SIGTERM"
    assert not file.exists()
    with StopSignal() as asked:
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked() and not file.exists()
