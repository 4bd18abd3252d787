"""`gptlab bench scaling`: the exponents, what is made up for it, and the order of 10^13 tokens."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptlab.bench import scaling
from gptlab.bench.scaling import Work, bench_scaling, exponent, growth
from gptlab.cli.main import main
from gptlab.data.sampler import Windows
from gptlab.data.shards import Dataset
from gptlab.report.studies import read_study_folder
from gptlab.rundir import RunDir

SMALL = {"tokens": (10**5, 10**6, 10**9), "shards": (1, 3, 9), "lines": (10, 100, 1000), "runs": (10, 15)}


def test_exponents_are_those_of_the_largest_sizes() -> None:
    sizes = (1, 10, 100, 1000)
    assert exponent(sizes, [9, 1, 10, 100]) == pytest.approx(1)
    assert exponent(sizes, [1, 5, 5, 5]) == pytest.approx(0)
    assert exponent(sizes, [s**2 for s in sizes]) == pytest.approx(2)
    assert [growth(power) for power in (-0.5, 0.1, 0.5, 1.0, 2.0)] == [
        "flat",
        "flat",
        "less than linear",
        "linear",
        "more than linear",
    ]


def test_work_that_grows_is_told_from_work_that_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def prepare(linear: bool, size: int):  # type: ignore[no-untyped-def]
        def work() -> None:
            clock[0] += 1e-3 * (size if linear else 7)

        return work

    def works(*_: object) -> list[Work]:
        sizes = (10, 100, 1000)
        return [
            Work("one", "things", sizes, lambda size: prepare(True, size), "each"),
            Work("other", "things", sizes, lambda size: prepare(False, size), "all"),
        ]

    monkeypatch.setattr(scaling, "works", works)
    monkeypatch.setattr(scaling.time, "process_time", lambda: clock[0])
    monkeypatch.setattr(scaling.machine, "peak_memory_since", lambda: 10**6)
    one, other = bench_scaling("smoke-lm", {"model.vocab_size": 257})["rows"]
    assert one["says"] == "one (each) is linear in things, and its memory is flat"
    assert other["says"] == "other (all) is flat in things, and so is its memory"
    assert other["seconds"] == pytest.approx([7e-3] * 3)


@pytest.mark.slow  # draws two reports
def test_every_row_is_measured_and_its_files_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scaling.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(scaling, "SECONDS", 0.0)
    for name, sizes in SMALL.items():
        monkeypatch.setattr(scaling, name.upper(), sizes)
    with pytest.raises(SystemExit) as ended:
        main(["bench", "scaling", "smoke-lm", "--json", str(tmp_path / "found.json")])
    assert ended.value.code == 0
    report = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]
    grows = ["tokens"] * 2 + ["shards"] * 2 + ["lines"] * 3 + ["runs"] * 2
    assert [row["sizes"] for row in report["rows"]] == [list(SMALL[name]) for name in grows]
    said = " ".join(capsys.readouterr().out.split())
    assert all(row["says"] in said and min(row["seconds"]) > 0 for row in report["rows"])


# -- the order of the data ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> Windows:
    tokens = scaling.far_tokens(10**13, tmp_path_factory.mktemp("far") / "shard.bin")
    return Windows(tokens, 1024, "shuffled", "1337/data/0")


@given(st.integers(0, 2 * 10**6), st.sampled_from([1, 7, 640]), st.integers(1, 4096))
@settings(max_examples=15, deadline=None)
def test_ranks_cover_a_batch_of_ten_trillion_tokens_without_overlap(
    far: Windows, step: int, world: int, batch: int
) -> None:
    first = step * batch
    shares = [range(rank * batch // world, (rank + 1) * batch // world) for rank in range(world)]
    parts = [far.starts(np.arange(first + r.start, first + r.stop)) for r in shares if len(r)]
    starts = np.concatenate(parts)
    assert len(np.unique(starts)) == batch and starts.min() >= 0 and starts.max() + 1025 <= 10**13
    assert (starts % 1024 == 0).all()
    assert np.array_equal(starts, far.starts(np.arange(first, first + batch)))


# -- what is made up is read as the real thing ----------------------------------------------------------------------


def test_sparse_shards_are_a_dataset(tmp_path: Path) -> None:
    scaling.make_shards(tmp_path / "data", 3, 10**8)
    data = Dataset(tmp_path / "data")
    assert len(data.train) == 3 * 10**8 and data.max_token()[0] == 50256
    used = sum(file.stat().st_blocks * 512 for file in (tmp_path / "data").iterdir())
    assert used < 10**6  # of apparently 800 MB


def test_a_made_up_study_is_read_without_complaint(tmp_path: Path) -> None:
    scaling.make_study(tmp_path / "study", arms=3, seeds=2, steps=500)
    read = read_study_folder(tmp_path / "study")
    assert read.warnings == [] and len(read.runs) == 6
    assert all(run.status == "completed" and len(run.curves["loss"][0]) == 50 for run in read.runs.values())


@pytest.mark.slow  # trains a run of one step
def test_made_up_lines_have_the_keys_of_a_run_that_was_trained(dataset: Path, tmp_path: Path) -> None:
    from gptlab.config import load_recipe
    from gptlab.training.loop import train

    recipe = load_recipe("smoke-lm", {"data.path": str(dataset), "train.max_steps": 1, "model.vocab_size": 0})
    train(recipe, tmp_path / "run", quiet=True)
    trained = {frozenset(line) for line in RunDir(tmp_path / "run").read_metrics()}
    made_up = {frozenset(line) - {"mfu"} for line in scaling.metric_lines(10, 10, 10, seed=0)}  # no MFU on a CPU
    assert made_up == trained
