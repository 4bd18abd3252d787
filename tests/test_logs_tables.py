import bz2
import gzip
import json
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gptlab.errors import DataError, UserError
from gptlab.logs import tables
from gptlab.logs.read import Logs, read_logs
from gptlab.logs.run import How, Unclear

LONG = """arm,seed,step,val_loss,loss
adamw,0,0,10.5,
adamw,0,10,4.25,4.5
adamw,1,0,10.25,
adamw,1,10,4.75,4.625
muon,0,0,10.5,
muon,0,10,4.0,4.125
muon,1,0,10.125,
muon,1,10,3.5,3.75
"""


@pytest.fixture(params=["pyarrow", "python"])
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who reads: pyarrow, or Python where it is not installed."""
    if request.param == "pyarrow":
        pytest.importorskip("pyarrow")
    else:
        monkeypatch.setitem(sys.modules, "pyarrow", None)
    return request.param


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def read(path: Path, **how: str) -> Logs:
    return read_logs([path], How(**how))


def last(logs: Logs, metric: str = "val_loss") -> dict[tuple[str | None, int | None], float]:
    return {(run.arm, run.seed): float(run.curves[metric][1][-1]) for run in logs.runs}


EXPECTED = {("adamw", 0): 4.25, ("adamw", 1): 4.75, ("muon", 0): 4.0, ("muon", 1): 3.5}


def test_a_long_table_becomes_runs_with_a_curve_for_each_column_of_numbers(tmp_path: Path, by: str) -> None:
    logs = read(write(tmp_path / "a.csv", LONG))
    assert last(logs) == EXPECTED
    assert (logs.metric, logs.better, logs.paired) == ("val_loss", "lower", True)
    steps, values = logs.runs[3].curves["loss"]
    assert (steps.tolist(), values.tolist()) == ([10], [3.75])  # an empty cell is no point
    assert logs.remarks == ["judged by val_loss, lower is better"]


FORMS: dict[str, Callable[[str], tuple[str, bytes]]] = {
    "crlf": lambda text: ("a.csv", text.replace("\n", "\r\n").encode()),
    "no last newline": lambda text: ("a.csv", text.rstrip().encode()),
    "byte order mark": lambda text: ("a.csv", b"\xef\xbb\xbf" + text.encode()),
    "blank lines": lambda text: ("a.csv", ("\n" + text.replace("\n", "\n\n", 3)).encode()),
    "quotes": lambda text: ("a.csv", text.replace("adamw", '"adamw"').encode()),
    "tabs": lambda text: ("a.tsv", text.replace(",", "\t").encode()),
    "tabs in csv": lambda text: ("a.csv", text.replace(",", "\t").encode()),
    "semicolons": lambda text: ("a.csv", text.replace(",", ";").encode()),
    "decimal commas": lambda text: ("a.csv", text.replace(",", ";").replace(".", ",").encode()),
    "gzip": lambda text: ("a.csv.gz", gzip.compress(text.encode())),
    "bzip2": lambda text: ("a.csv.bz2", bz2.compress(text.encode())),
    "spaces": lambda text: ("a.csv", text.replace(",", ", ").encode()),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_table_written_another_way_has_the_same_numbers(tmp_path: Path, by: str, form: str) -> None:
    name, content = FORMS[form](LONG)
    logs = read(write(tmp_path / name, content))
    assert last(logs) == EXPECTED
    assert [run.curves["loss"][1].tolist() for run in logs.runs] == [[4.5], [4.625], [4.125], [3.75]]


def as_objects(text: str) -> list[dict[str, object]]:
    names, *rows = (line.split(",") for line in text.split())
    return [
        {k: v if k == "arm" else float(v) if "." in v else int(v) for k, v in zip(names, row, strict=True) if v}
        for row in rows
    ]


def test_lines_of_json_and_parquet_have_the_numbers_of_csv(tmp_path: Path, by: str) -> None:
    rows = as_objects(LONG)
    lines = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert last(read(lines)) == EXPECTED
    packed = write(tmp_path / "b.jsonl.gz", gzip.compress(lines.read_bytes()))
    assert last(read(packed)) == EXPECTED
    if by == "pyarrow":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist([{"loss": None, **row} for row in rows]), tmp_path / "a.parquet")
        logs = read(tmp_path / "a.parquet")
        assert last(logs) == EXPECTED
        assert [run.curves["loss"][1].tolist() for run in logs.runs] == [[4.5], [4.625], [4.125], [3.75]]


def test_parquet_without_pyarrow_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"a.parquet: parquet needs a package: pip install 'gptlab\[data\]'"):
        read(write(tmp_path / "a.parquet", b"PAR1"))


NO_NUMBERS = ["OOM", "0x10", "n/a", "."]


@pytest.mark.parametrize("seed", range(6))
def test_python_reads_what_pyarrow_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Odd cells of all kinds in the column of the metric and of the step."""
    pytest.importorskip("pyarrow")
    draw = random.Random(seed)
    odd = ["", "nan", "NaN", "inf", "-Infinity", "null", "None", " 3.5 ", "+2", "1e-3", "1_0", *NO_NUMBERS]
    lines = ["arm,seed,step,val_loss,note"]
    for arm in "ab":
        for run in range(3):
            for step in range(40):
                cell = draw.choice(odd) if draw.random() < 0.2 * seed / 5 else f"{draw.random():.6f}"
                line = f"{arm},{run},{step},{cell},{draw.choice(['x', 'y', '', 'null', '7'])}"
                lines.append(line if draw.random() > 0.02 else line + ",more")
    text = "\n".join(lines) + "\n"

    def content() -> tuple[list[object], list[str]]:
        runs = tables.read(write(tmp_path / "a.csv", text), How(arm="arm"))
        shown = [
            (run.arm, run.seed, {k: (x.tolist(), repr(y.tolist())) for k, (x, y) in run.curves.items()}) for run in runs
        ]
        return shown, runs[0].remarks

    with_arrow = content()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert content() == with_arrow
    assert ("values of val_loss are no numbers, such as" in " ".join(with_arrow[1])) == any(
        f",{cell}," in text for cell in NO_NUMBERS
    )


def test_what_is_no_number_is_a_point_without_one_or_is_said(tmp_path: Path, by: str) -> None:
    rows = ["a,0,1,3.0,0.5", "a,0,2,NaN,0.5", "a,0,3,inf,", "a,0,4,,0.5", "a,0,5,oops,0.5", "a,0,6,2.5,1"]
    logs = read(write(tmp_path / "a.csv", "\n".join(["arm,seed,step,val_loss,acc", *rows])))
    steps, values = logs.runs[0].curves["val_loss"]
    assert steps.tolist() == [1, 2, 3, 6]
    assert np.isnan(values[1]) and np.isnan(values[2]) and values[3] == 2.5
    assert f"{tmp_path / 'a.csv'}: 1 values of val_loss are no numbers, such as 'oops': left out" in logs.remarks


def test_an_empty_value_of_the_only_metric_is_a_point_without_a_number(tmp_path: Path, by: str) -> None:
    logs = read(write(tmp_path / "a.csv", "arm,seed,step,val_loss\na,0,1,3.0\na,0,2,\na,0,3,\n"))
    steps, values = logs.runs[0].curves["val_loss"]
    assert steps.tolist() == [1, 2, 3] and np.isnan(values[1:]).all()


def test_rows_of_another_length_are_counted(tmp_path: Path, by: str) -> None:
    path = write(tmp_path / "a.csv", LONG + "muon,2,0\nmuon,2,10,1,2,3\n")
    logs = read(path)
    assert last(logs) == EXPECTED
    assert f"{path}: 2 rows with another number of values than its first row left out" in logs.remarks


@pytest.mark.parametrize(
    ("content", "says"),
    {
        "empty": (b"", "holds no rows"),
        "names alone": (b"arm,seed,step,val_loss\n", "holds no rows"),
        "no names": (b"0,1,2\n1,2,3\n", "begins with numbers: its first row must name the columns"),
        "comment": (
            b"# of today\narm,step,loss\na,1,2\n",
            "begins with a comment: its first row must name the columns",
        ),
        "twice": (b"arm,step,loss,loss\na,1,2,3\n", "has the column 'loss' twice"),
        "utf-16": ("arm,step,loss\na,1,2\n".encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
        "latin-1": (b"arm,step,loss\n\xe9,1,2\nb,1,2\n", "is not UTF-8 text; save it as UTF-8"),
        "no number": (b"arm,note\na,b\n", "has no column of numbers that could be a metric"),
        "cut gzip": (gzip.compress(LONG.encode() * 50)[:-40], "cannot be read: "),
        "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
    }.values(),
    ids=[
        "empty",
        "names alone",
        "no names",
        "comment",
        "twice",
        "utf-16",
        "latin-1",
        "no number",
        "cut gzip",
        "pointer",
    ],
)
def test_a_damaged_table_is_one_sentence(tmp_path: Path, by: str, content: bytes, says: str) -> None:
    path = write(tmp_path / "a.csv", content)
    with pytest.raises(DataError) as caught:
        tables.read(path, How())
    assert str(path) in str(caught.value) and says in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_lines_of_json_are_counted(tmp_path: Path, by: str) -> None:
    path = write(
        tmp_path / "a.jsonl", '{"step": 1, "loss": 2.0}\n[1]\n\nx\n{"step": 2, "loss": NaN, "more": {"x": 1}}\n{"st'
    )
    logs = read(path)
    steps, values = logs.runs[0].curves["loss"]
    assert steps.tolist() == [1, 2] and math.isnan(values[1])
    assert logs.runs[0].curves["more.x"][1].tolist() == [1]
    assert f"{path}: 3 damaged lines left out" in logs.remarks


# -- which column is which --------------------------------------------------------------------------------------------


def test_columns_are_found_by_their_names_and_said(tmp_path: Path, by: str) -> None:
    path = write(tmp_path / "a.csv", LONG.replace("arm,seed,step", "Optimizer,random seed,train/global_step"))
    logs = read(path)
    assert last(logs) == EXPECTED
    assert (
        f"{path}: Optimizer names the arms, train/global_step names the steps, random seed is the seed" in logs.remarks
    )


def test_columns_are_as_they_are_said(tmp_path: Path, by: str) -> None:
    path = write(tmp_path / "a.csv", LONG.replace("arm,seed,step,val_loss", "seed,arm,epoch,y"))
    logs = read(path, arm="seed", seed="arm", step="epoch", metric="y")
    assert last(logs, "y") == EXPECTED and logs.remarks == ["judged by y, lower is better"]


def test_a_step_must_be_a_number(tmp_path: Path, by: str) -> None:
    with pytest.raises(UserError, match="the column 'arm', which --step names, holds no numbers"):
        read(write(tmp_path / "a.csv", LONG), step="arm")


def test_a_metric_with_a_dash_is_no_run(tmp_path: Path, by: str) -> None:
    logs = read(write(tmp_path / "a_seed0.csv", "step,loss,loss - smooth\n1,3,3\n2,2,2.5\n"))
    assert [(run.arm, sorted(run.curves)) for run in logs.runs] == [("a", ["loss", "loss - smooth"])]


@pytest.mark.parametrize("flag", ["arm", "seed", "step"])
def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path, flag: str) -> None:
    path = write(tmp_path / "a.csv", LONG)
    with pytest.raises(
        UserError, match=f"has no column 'x', which --{flag} names; it has arm, seed, step, val_loss, loss"
    ):
        read(path, **{flag: "x"})


def test_two_columns_that_may_name_the_arms_are_an_error_that_names_them(tmp_path: Path, by: str) -> None:
    text = "method,model,seed,step,loss\na,x,0,1,2\na,y,0,1,3\nb,x,0,1,2\nb,y,0,1,4\n"
    with pytest.raises(Unclear, match="method or model may name the arms; --arm method chooses"):
        read(write(tmp_path / "a.csv", text))
    with pytest.raises(Unclear, match="1 steps of a seed 0 are there again, so .* such as model"):
        read(write(tmp_path / "a.csv", text), arm="method")


def test_a_column_with_one_text_or_the_same_parts_is_no_second_choice(tmp_path: Path, by: str) -> None:
    text = "model,method,optimizer,seed,step,loss\ngpt2,a,A,0,1,2\ngpt2,b,B,0,1,3\ngpt2,a,A,1,1,2\n"
    logs = read(write(tmp_path / "a.csv", text))
    assert list(last(logs, "loss")) == [("a", 0), ("a", 1), ("b", 0)]


def test_the_only_column_of_texts_names_the_arms(tmp_path: Path, by: str) -> None:
    logs = read(write(tmp_path / "a.csv", LONG.replace("arm,", "setup,")))
    assert last(logs) == EXPECTED
    assert f"{tmp_path / 'a.csv'}: setup names the arms" in logs.remarks


def test_a_column_with_one_text_is_a_setting_of_a_single_run(tmp_path: Path, by: str) -> None:
    for name, optimizer, last in (("x", "adamw", 3.5), ("y", "muon", 3.25)):
        write(
            tmp_path / "all" / f"{name}.csv",
            f"model,optimizer,step,loss\ngpt2,{optimizer},1,5\ngpt2,{optimizer},2,{last}\n",
        )
    logs = read(tmp_path / "all")
    assert last_of(logs) == {"optimizer=adamw": 3.5, "optimizer=muon": 3.25}
    (tmp_path / "all").rename(tmp_path / "old")
    for file in sorted((tmp_path / "old").iterdir()):
        write(tmp_path / "new" / f"{file.stem}_seed0.csv", file.read_bytes())
    assert last_of(read(tmp_path / "new")) == {"x": 3.5, "y": 3.25}
    both = write(tmp_path / "b.csv", "model,seed,step,loss\ngpt2,0,1,5\ngpt2,1,1,4\n")
    assert last_of(read(both)) == {"gpt2": 4}


def last_of(logs: Logs) -> dict[str | None, float]:
    return {run.arm: float(run.curves["loss"][1][-1]) for run in logs.runs}


@pytest.mark.parametrize("name", ["split", "phase", "Created", "notes"])
def test_a_column_of_texts_that_says_something_else_names_no_arms(tmp_path: Path, by: str, name: str) -> None:
    logs = read(write(tmp_path / "a_seed3.csv", f"step,{name},loss\n1,x,3\n2,y,2\n3,x,2.5\n4,y,2\n5,y,2\n"))
    assert [(run.arm, run.seed, len(run.curves["loss"][0])) for run in logs.runs] == [("a", 3, 5)]


def test_a_column_that_counts_runs_is_no_seed_to_pair_by(tmp_path: Path, by: str) -> None:
    path = write(tmp_path / "a.csv", LONG.replace("seed", "run"))
    logs = read(path)
    assert last(logs) == EXPECTED and not logs.paired
    assert "run numbers the runs, which is no seed to pair by (--seed run if it is)" in " ".join(logs.remarks)
    assert read(path, seed="run").paired


def test_arms_that_share_no_two_seeds_are_not_paired(tmp_path: Path) -> None:
    assert not read(write(tmp_path / "a.csv", LONG.replace("muon,0", "muon,7"))).paired


def test_arms_of_one_run_with_other_seeds_are_not_paired(tmp_path: Path) -> None:
    text = "arm,seed,val_loss\na,0,3.5\nb,1,3.25\n"
    assert not read(write(tmp_path / "a.csv", text)).paired
    assert read(write(tmp_path / "b.csv", text.replace("b,1", "b,0"))).paired


def test_names_of_runs_give_arm_and_seed(tmp_path: Path, by: str) -> None:
    text = LONG.replace("arm,seed", "run_name")
    for arm in ("adamw", "muon"):
        for seed in "01":
            text = text.replace(f"{arm},{seed}", f"{arm}-s{seed}")
    logs = read(write(tmp_path / "a.csv", text))
    assert last(logs) == EXPECTED and logs.paired


def test_ids_of_runs_are_counted(tmp_path: Path, by: str) -> None:
    text = LONG.replace("seed", "run").replace(",0,", ",ab7f,", 1)
    for arm, seed, name in (("adamw", 0, "k9f"), ("adamw", 1, "b2"), ("muon", 0, "qq"), ("muon", 1, "rr")):
        text = text.replace(f"{arm},{seed},", f"{arm},{name},")
    logs = read(write(tmp_path / "a.csv", text.replace("ab7f", "k9f")))
    assert {(run.arm, run.seed, run.name) for run in logs.runs} == {
        ("adamw", 0, "b2"), ("adamw", 1, "k9f"), ("muon", 0, "qq"), ("muon", 1, "rr")
    }  # fmt: skip
    assert (
        not logs.paired and "4 runs without a seed numbered from 0: pairing by seed then means nothing" in logs.remarks
    )


def test_a_row_for_each_run_gives_results(tmp_path: Path, by: str) -> None:
    text = "arm,seed,val_loss,seconds\na,0,3.5,10\na,1,3.25,11\nb,0,3.0,\nb,1,nan,12\n"
    logs = read(write(tmp_path / "a.csv", text))
    assert [run.result for run in logs.runs[:3]] == [
        {"val_loss": 3.5, "seconds": 10}, {"val_loss": 3.25, "seconds": 11}, {"val_loss": 3.0}
    ]  # fmt: skip
    assert math.isnan(logs.runs[3].result["val_loss"]) and not any(run.curves for run in logs.runs)
    with pytest.raises(
        Unclear, match="2 rows are of a seed 0, and nothing tells them apart: --arm, --seed or --step names"
    ):
        read(write(tmp_path / "b.csv", text.replace("a,1", "a,0")))


def test_a_row_for_each_run_is_told_apart_by_its_numeric_settings(tmp_path: Path, by: str) -> None:
    rows = [("0.001", 0, 3.5), ("1e-3", 1, 3.25), ("0.003", 0, 3.0), ("3e-3", 1, 2.75)]
    text = "lr,seed,val_loss\n" + "".join(f"{lr},{seed},{loss}\n" for lr, seed, loss in rows)
    path = write(tmp_path / "a.csv", text)
    logs = read(path)
    assert [(run.arm, run.seed, run.result) for run in logs.runs] == [
        (f"lr={lr}", seed, {"val_loss": loss})
        for lr, seed, loss in [("0.001", 0, 3.5), ("0.001", 1, 3.25), ("0.003", 0, 3.0), ("0.003", 1, 2.75)]
    ]
    assert logs.paired and {run.arm for run in read(path, arm="lr").runs} == {"0.001", "0.003"}
    path.write_text(text.replace("lr", "knob"))
    with pytest.raises(Unclear, match="2 rows are of .* seed 0, and nothing .*; there are knob, seed, val_loss"):
        read(path)
    names = "Name,lr,seed,val_loss,_step\n" + "".join(f"run-{lr}-{s},{lr},{s},{loss},1000\n" for lr, s, loss in rows)
    logs = read(write(tmp_path / "b.csv", names))  # as W&B exports its table of runs
    assert [(run.arm, run.seed) for run in logs.runs] == [(f"lr={lr}", k) for lr in ("0.001", "0.003") for k in (0, 1)]


def test_a_learning_rate_logged_at_each_step_is_no_setting(tmp_path: Path, by: str) -> None:
    text = "arm,step,val_loss,lr\na,1,3.5,0.1\na,2,3.25,0.1\na,3,3.0,0.05\n"
    (run,) = read(write(tmp_path / "a.csv", text)).runs
    assert run.curves["lr"][1].tolist() == [0.1, 0.1, 0.05] and not run.settings


def test_seeds_that_are_texts_pair_the_runs_and_are_said(tmp_path: Path, by: str) -> None:
    text = LONG.replace(",1,", ",south,").replace(",0,0,", ",north,0,").replace(",0,10,", ",north,10,")
    logs = read(write(tmp_path / "a.csv", text))
    assert last(logs) == EXPECTED and logs.paired
    assert any("seed holds texts, numbered in their order: north is 0, south is 1" in r for r in logs.remarks)


def test_a_tab_separates_numbers_with_a_decimal_comma(tmp_path: Path, by: str) -> None:
    text = "arm\tseed\tval_loss\na\t0\t3,25\na\t1\t3,375\n"
    logs = read(write(tmp_path / "a.tsv", text))
    assert [run.result["val_loss"] for run in logs.runs] == [3.25, 3.375]
    thousands = "arm\tseed\tval_loss\ttokens\na\t0\t3.25\t1,25\na\t1\t3.5\t1,5\n"
    logs = read(write(tmp_path / "b.tsv", thousands))
    assert [run.result.get("tokens") for run in logs.runs] == [None, None]


def test_percent_signs_are_left_out(tmp_path: Path, by: str) -> None:
    logs = read(write(tmp_path / "a.csv", "arm,seed,accuracy\na,0,71.5%\na,1,72%\nb,0,70\n"))
    assert [run.result["accuracy"] for run in logs.runs] == [71.5, 72.0, 70.0]
    with pytest.raises(UserError, match="val_loss holds texts such as 'pending'"):
        read(write(tmp_path / "b.csv", "arm,seed,val_loss\na,0,pending\nb,0,pending\n"))


def test_rows_without_a_seed_are_several_runs_only_if_said(tmp_path: Path, by: str) -> None:
    text = LONG.replace("seed", "lr").replace(",1,", ",0.1,")
    with pytest.raises(Unclear, match="2 steps of adamw are there again, so these are several runs: .* such as lr"):
        read(write(tmp_path / "a.csv", text))


def test_a_step_that_a_resumed_run_logged_again_counts_once(tmp_path: Path, by: str) -> None:
    rows = "".join(f"{step},{value}\n" for step, value in [(1, 5.0), (2, 4.0), (3, 3.5), (4, 3.25), (3, 3.0), (5, 2.0)])
    path = write(tmp_path / "a.csv", "step,loss\n" + rows)
    logs = read(path)
    assert logs.runs[0].curves["loss"][1].tolist() == [5, 4, 3, 3.25, 2]
    assert f"{path}: 1 steps have loss twice in a run; the later row counts" in logs.remarks


def test_a_step_that_is_there_again_with_the_same_value_is_no_remark(tmp_path: Path, by: str) -> None:
    rows = [{"step": step, "tokens": 10 * step, "loss": 5 - step} for step in range(4)]
    rows.insert(3, {"step": 2, "tokens": 20, "val_loss": 3.5})
    (run,) = (logs := read(write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows)))).runs
    assert run.curves["tokens"][1].tolist() == [0, 10, 20, 30] and not any("twice" in text for text in logs.remarks)


def test_rows_of_a_run_need_not_be_together(tmp_path: Path, by: str) -> None:
    header, *rows = LONG.splitlines()
    random.Random(1).shuffle(rows)
    assert last(read(write(tmp_path / "a.csv", "\n".join([header, *rows])))) == EXPECTED


def test_the_tidy_form_has_the_names_of_metrics_in_a_column(tmp_path: Path, by: str) -> None:
    rows = [
        f"{row['arm']},{row['seed']},{row['step']},{name},{row[name]}"
        for row in as_objects(LONG)
        for name in ("val_loss", "loss")
        if name in row
    ]
    logs = read(write(tmp_path / "a.csv", "\n".join(["arm,seed,step,metric,value", *rows])))
    assert last(logs) == EXPECTED and logs.runs[3].curves["loss"][1].tolist() == [3.75]


def wandb_export(step: str = "Step") -> str:
    """A chart of W&B as it is exported: a column for each run and its least and largest value."""
    names = ["adamw-seed0", "adamw-seed1", "muon-seed0", "muon-seed1"]
    ends = [f"{metric}{end}" for metric in ("_step", "val_loss") for end in ("", "__MIN", "__MAX")]
    header = [step, *(f"{name} - {end}" for name in names for end in ends)]
    rows = [["0", *["0", "0", "0", "10.5", "10.5", "10.5"] * 4]]
    for i, value in enumerate(EXPECTED.values()):  # a run has no value at the others' steps
        cells = [str(10 + i)] * 3 + [str(value)] * 3
        rows.append([str(10 + i), *(cell if j == i else "" for j in range(4) for cell in cells)])
    return "\n".join(",".join(f'"{cell}"' if cell else "" for cell in row) for row in [header, *rows])


@pytest.mark.parametrize("step", ["Step", "train/global_step", "Relative Time (Process)"])
def test_a_chart_that_was_exported_by_wandb(tmp_path: Path, by: str, step: str) -> None:
    logs = read(write(tmp_path / "wandb_export_2026.csv", wandb_export(step)))
    assert last(logs) == EXPECTED
    assert [len(run.curves["val_loss"][0]) for run in logs.runs] == [2, 2, 2, 2]
    assert list(logs.runs[0].curves) == ["val_loss"]  # not the least and largest values
    assert "each column is a run's val_loss, such as 'adamw-seed0 - val_loss'" in " ".join(logs.remarks)


def test_the_table_of_runs_of_wandb(tmp_path: Path, by: str) -> None:
    header = '"Name","State","Notes","User","Created","Runtime","optimizer","seed","loss","val_loss"'
    rows = [
        '"quiet-tree-1","finished","-","me","2026-05-01T10:00:00.000Z","120","adamw","3","3.5","3.25"',
        '"blue-sky-2","crashed","-","me","2026-05-01T11:00:00.000Z","60","adamw","4","3.75",""',
        '"red-sea-3","finished","-","me","2026-05-02T10:00:00.000Z","121","muon","3","3.25","3.0"',
    ]
    logs = read(write(tmp_path / "export.csv", "\n".join([header, *rows])))
    assert [(run.arm, run.seed, run.name, run.status, run.result.get("val_loss")) for run in logs.runs] == [
        ("adamw", 3, "quiet-tree-1", "completed", 3.25),
        ("adamw", 4, "blue-sky-2", "unfinished", None),
        ("muon", 3, "red-sea-3", "completed", 3.0),
    ]


@pytest.mark.parametrize("name", ["{}/{}", "{}_seed{}", "{}/seed{}", "{}-s{}"])
def test_a_wide_table_with_a_column_for_each_run(tmp_path: Path, by: str, name: str) -> None:
    header = ["step", *(name.format(arm, seed) for arm, seed in EXPECTED)]
    rows = [["0", *["10.5"] * 4], ["10", *map(str, EXPECTED.values())]]
    path = write(tmp_path / "val_loss.csv", "\n".join(map(",".join, [header, *rows])))
    assert last(read(path)) == EXPECTED
    other = write(tmp_path / "chart.csv", path.read_bytes())
    assert last(read(other, metric="val_bpb"), "val_bpb") == EXPECTED
    assert last(read(other), "value") == EXPECTED


def test_columns_of_metrics_are_no_runs(tmp_path: Path, by: str) -> None:
    logs = read(write(tmp_path / "adamw_seed3.csv", ",step,loss,top1\n0,1,5.0,0.1\n1,2,4.0,0.2\n"))
    assert [(run.arm, run.seed, sorted(run.curves)) for run in logs.runs] == [("adamw", 3, ["loss", "top1"])]


def test_names_of_several_lines_are_one_line(tmp_path: Path, by: str) -> None:
    text = LONG.replace("muon", '"muon\nfast"').replace("loss\n", '"grad\n norm"\n', 1)
    logs = read(write(tmp_path / "a.csv", text))
    assert {run.arm for run in logs.runs} == {"adamw", "muon fast"} and "grad norm" in logs.runs[0].curves


def test_an_arm_of_numbers_keeps_its_text(tmp_path: Path, by: str) -> None:
    logs = read(write(tmp_path / "a.csv", LONG.replace("adamw", "0.0010").replace("muon", "007")))
    assert {run.arm for run in logs.runs} == {"0.0010", "007"}


@pytest.mark.slow
def test_a_thousand_runs_of_ten_thousand_points_are_read(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import csv

    runs, points = 1000, 10_000
    arm = pyarrow.DictionaryArray.from_arrays(
        np.repeat(np.arange(runs, dtype=np.int32) // 10, points), [f"arm{i}" for i in range(runs // 10)]
    )
    step = np.tile(np.arange(points), runs)
    loss = np.round(3 + np.exp(-step / 1000) + np.random.default_rng(0).normal(0, 0.01, len(step)), 5)
    table = pyarrow.table({"arm": arm.cast("string"), "seed": np.repeat(np.arange(runs) % 10, points), "step": step})
    csv.write_csv(table.append_column("val_loss", pyarrow.array(loss)), tmp_path / "a.csv")
    logs = read(tmp_path / "a.csv")
    assert len(logs.runs) == runs
    whole = {(run.arm, run.seed): run for run in logs.runs}["arm99", 9]
    assert whole.curves["val_loss"][1].tolist() == loss[-points:].tolist()


def test_of_a_run_without_a_step_column_the_option_is_named(tmp_path: Path) -> None:
    with pytest.raises(Unclear, match="2 rows are of .*--step"):
        read(write(tmp_path / "a.csv", "loss,lr\n3.5,1\n3.25,1\n"))
