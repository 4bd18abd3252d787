"""What a folder holds, which arm and seed a run has, and by which metric runs are judged."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign_logs import wandb_records, write_mlflow, write_wandb
from planted import planted

from gptlab.errors import UserError
from gptlab.logs.read import Logs, read_logs
from gptlab.logs.run import How
from gptlab.rundir import RunDir, open_study


def metrics(folder: Path, last: float = 3.0, name: str = "val_loss", **settings: Any) -> Path:
    """A folder of a run that logs lines of JSON."""
    folder.mkdir(parents=True)
    lines = [{"step": 0, name: 10.0}, {"step": 10, name: last, "loss": last + 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if settings:
        (folder / "config.json").write_text(json.dumps(settings))
    return folder


def csv(file: Path, last: float = 3.0) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"step,val_loss\n0,10\n10,{last}\n")
    return file


def named(logs: Logs) -> list[tuple[str | None, int | None]]:
    return [(run.arm, run.seed) for run in logs.runs]


def in_folder(folder: Path, files: Sequence[str], **how: str) -> Logs:
    """The logs of a folder with these tables, of which each has another last value."""
    for i, name in enumerate(files):
        csv(folder / name, 3 + i / 8)
    return read_logs([folder], How(**how))


PATHS = {
    "arm_seed": (["b_seed0.csv", "a_seed1.csv", "a_seed0.csv", "b_seed1.csv"]),
    "arm/seed": (["a/seed0.csv", "a/seed1.csv", "b/seed0.csv", "b/seed1.csv"]),
    "arm/k": (["a/0.csv", "a/1.csv", "b/0.csv", "b/1.csv"]),
    "arm/k/log": (["a/0/log.csv", "a/1/log.csv", "b/0/log.csv", "b/1/log.csv"]),
    "arm-s": (["a-s0.csv", "a-s1.csv", "b-s0.csv", "b-s1.csv"]),
    "seed_arm": (["seed0-a.csv", "seed1-a.csv", "seed0-b.csv", "seed1-b.csv"]),
    "arm-k": (["a-0.csv", "a-1.csv", "b-0.csv", "b-1.csv"]),
    "below a seed": (["a/seed_0/out/x.csv", "a/seed_1/out/x.csv", "b/seed_0/out/x.csv", "b/seed_1/out/x.csv"]),
}


@pytest.mark.parametrize("form", PATHS)
def test_arm_and_seed_by_the_path(tmp_path: Path, form: str) -> None:
    logs = in_folder(tmp_path / "all", PATHS[form])
    arms = {"below a seed": ["a/out/x", "b/out/x"]}.get(form, ["a", "b"])
    assert named(logs) == [(arm, seed) for arm in arms for seed in (0, 1)]
    assert logs.paired and f"arms of 4 runs by the {'numbers' if form == 'arm-k' else 'seeds'}" in " ".join(
        logs.remarks
    )


def test_arms_have_as_much_of_the_path_as_tells_them_apart(tmp_path: Path) -> None:
    logs = in_folder(tmp_path, ["x/a/lr1/seed0.csv", "x/a/lr2/seed0.csv", "x/b/lr1/seed0.csv"])
    assert named(logs) == [("a/lr1", 0), ("a/lr2", 0), ("b/lr1", 0)]


def test_names_without_seeds_are_arms_and_folders_of_several_runs_too(tmp_path: Path) -> None:
    logs = in_folder(tmp_path / "one", ["adamw.csv", "muon-2.csv", "lion.csv"])
    assert named(logs) == [("adamw", 0), ("lion", 0), ("muon-2", 0)] and not logs.paired
    logs = in_folder(tmp_path / "two", ["adamw/7f.csv", "adamw/k2.csv", "muon/b.csv", "muon/z.csv"])
    assert named(logs) == [("adamw", 0), ("adamw", 1), ("muon", 0), ("muon", 1)] and not logs.paired
    assert "4 runs without a seed numbered from 0: pairing by seed then means nothing" in logs.remarks
    assert [run.source.name for run in logs.runs] == ["7f.csv", "k2.csv", "b.csv", "z.csv"]


def test_a_folder_of_files_called_by_ids_is_one_arm(tmp_path: Path) -> None:
    ids = [f"{i}b5ae9e1-4be1-9c6e-9000-0123456789a{i}" for i in range(3)]
    assert named(in_folder(tmp_path / "record", [f"{name}.csv" for name in ids])) == [("record", k) for k in range(3)]
    logs = in_folder(tmp_path / "two", [f"{arm}/{name}.csv" for arm, name in zip("aab", ids, strict=True)])
    assert named(logs) == [("a", 0), ("a", 1), ("b", 0)] and not logs.paired


@pytest.mark.parametrize(
    ("pattern", "arms"),
    [
        (r"/(?P<arm>\w+)-s(?P<seed>\d)", ["a", "b"]),
        (r"(?P<seed>\d+)\.csv", ["0.csv", "1.csv"]),
        ("/([ab])-", ["a", "b"]),
    ],
    ids=["both groups", "seed alone", "first group"],
)
def test_arm_from_the_path_by_a_pattern(tmp_path: Path, pattern: str, arms: list[str]) -> None:
    if "seed>\\d+" in pattern:
        logs = in_folder(tmp_path, ["a-try0.csv", "a-try1.csv"], arm_from=pattern)
        assert named(logs) == [("0.csv", 0), ("1.csv", 1)]
        return
    logs = in_folder(tmp_path, ["a-s0.csv", "a-s1.csv", "b-s0.csv", "b-s1.csv"], arm_from=pattern)
    assert named(logs) == [(arm, seed) for arm in arms for seed in (0, 1)]
    assert logs.paired


@pytest.mark.parametrize(
    ("pattern", "says"),
    [("(", "is not a regular expression"), ("x+y", "does not match"), ("(?P<arm>)", "finds no arm in")],
)
def test_a_pattern_of_the_path_that_does_not_fit(tmp_path: Path, pattern: str, says: str) -> None:
    with pytest.raises(UserError, match=f"--arm-from .* {says}"):
        in_folder(tmp_path, ["a.csv"], arm_from=pattern)


def test_arms_by_the_settings_in_which_runs_differ(tmp_path: Path) -> None:
    for i, (optimizer, lr, seed) in enumerate(
        [("adamw", 0.1, 3), ("adamw", 0.1, 4), ("muon", 0.02, 3), ("muon", 0.02, 4)]
    ):
        metrics(
            tmp_path / f"run{i}x", 3 + i, optim={"name": optimizer, "lr": lr}, seed=seed, out_dir=f"run{i}", d_model=64
        )
    logs = read_logs([tmp_path], How())
    assert named(logs) == [(f"name={arm}", seed) for arm in ("adamw,lr=0.1", "muon,lr=0.02") for seed in (3, 4)]
    assert "arms of 4 runs by the settings in which runs differ: name=adamw,lr=0.1, name=muon,lr=0.02" in logs.remarks


def test_arm_and_seed_by_a_setting_that_is_named(tmp_path: Path) -> None:
    for i in range(4):
        metrics(tmp_path / f"a_seed{i}", 3 + i, optim={"name": "ab"[i // 2]}, init=i % 2)
    logs = read_logs([tmp_path], How(arm="optim.name", seed="init"))
    assert named(logs) == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    with pytest.raises(UserError, match="no log has a column or setting 'nothing', which --arm names; .*optim.name"):
        read_logs([tmp_path], How(arm="nothing"))


def test_runs_with_the_same_settings_and_other_seeds_are_one_arm(tmp_path: Path) -> None:
    for name, seed in (("quiet-tree", 1), ("blue-sky", 2)):
        metrics(tmp_path / "study" / name, 3 + seed, lr=0.1, seed=seed)
    assert named(read_logs([tmp_path], How())) == [("study", 1), ("study", 2)]


def test_two_runs_with_one_arm_and_seed(tmp_path: Path) -> None:
    one, two = metrics(tmp_path / "x" / "a_seed0", 3.0), metrics(tmp_path / "y" / "a_seed0", 3.5)
    arms = {run.arm for run in read_logs([one, two], How()).runs}
    assert arms == {"x/a", "y/a"}  # the path tells them apart
    with pytest.raises(UserError, match=r"x/a_seed0 and .*y/a_seed0 are both a seed 0: .*--arm.*--seed.*--arm-from"):
        read_logs([one, two], How(arm_from="/([ab])_"))
    logs = read_logs([one, one], How())
    assert named(logs) == [("a", 0)] and f"{one} is left out: it equals {one}" in logs.remarks


def test_forms_can_be_mixed_and_another_name_of_the_validation_loss_is_taken(tmp_path: Path) -> None:
    metrics(tmp_path / "a_seed0", 3.0)
    metrics(tmp_path / "b_seed0", 3.5, "eval/loss")
    csv(tmp_path / "c_seed0.csv", 4.0)
    (tmp_path / "notes.txt").write_text("todo\n")
    (tmp_path / "model.pt").write_bytes(b"\0\1")
    logs = read_logs([tmp_path], How())
    assert [(run.arm, run.curves["val_loss"][1][-1]) for run in logs.runs] == [("a", 3), ("b", 3.5), ("c", 4)]
    assert "eval/loss of metrics logs is taken for val_loss" in logs.remarks
    assert any(remark.startswith(f"{tmp_path / 'notes.txt'}: no line is known") for remark in logs.remarks)
    assert not any("model.pt" in remark for remark in logs.remarks)


def test_runs_below_a_run_are_found(tmp_path: Path) -> None:
    metrics(tmp_path / "all" / "a_seed0", 3.0)
    (tmp_path / "all" / "metrics.jsonl").write_text('{"step": 1, "val_loss": 5.0}\n')
    (tmp_path / "all" / "a_seed0" / "log.txt").write_text("step 10: train loss 2.0, val loss 3.0\n")  # the same run
    logs = read_logs([tmp_path], How())
    assert [(run.arm, run.curves["val_loss"][1][-1]) for run in logs.runs] == [("a", 3), ("all", 5)]


def test_a_folder_with_logs_of_many_tools(tmp_path: Path) -> None:
    rows = [(step, {"val_loss": 4 / step, "train/loss": 3 / step}) for step in (1, 2, 4)]
    for seed in (0, 1):
        for optimizer in ("adamw", "lion"):
            settings = {"optimizer": optimizer, "seed": seed, "out_dir": f"out{seed}{optimizer}"}
            records = wandb_records(rows, settings, name=f"quiet-tree-{seed}")
            write_wandb(tmp_path / f"w{seed}{optimizer}", records, run=f"id{seed}{optimizer}")
        write_mlflow(tmp_path / "mlruns", f"muon-seed{seed}", rows, {"lr": "0.1"})
        folder = tmp_path / "trainer" / f"soap_seed{seed}" / "checkpoint-4"
        folder.mkdir(parents=True)
        history = [{"step": step, "eval_loss": row["val_loss"], "epoch": 0.5} for step, row in rows]
        state = {"log_history": history, "global_step": 4, "max_steps": 4, "epoch": 1.0}
        (folder / "trainer_state.json").write_text(json.dumps(state))
        csv(tmp_path / "tables" / f"sgd_seed{seed}.csv", 1.0)
        metrics(tmp_path / "lines" / f"shampoo_seed{seed}", 1.0, "eval/loss")
        (tmp_path / f"kron_seed{seed}.log").write_text("step 4: train loss 0.75, val loss 1.0\n")
    logs = read_logs([tmp_path], How())
    arms = ("kron", "muon", "optimizer=adamw", "optimizer=lion", "sgd", "shampoo", "soap")
    assert named(logs) == [(arm, seed) for arm in arms for seed in (0, 1)]
    assert [run.curves["val_loss"][1][-1] for run in logs.runs] == [1.0] * 14
    assert logs.paired and logs.metric == "val_loss"
    assert {run.form for run in logs.runs} == {"text", "mlflow", "wandb", "csv", "metrics", "trainer_state"}


@pytest.mark.parametrize(
    ("names", "metric", "better"),
    [
        (["loss", "val_loss", "lr"], "val_loss", "lower"),
        (["train_loss", "test_loss"], "test_loss", "lower"),
        (["Validation Loss", "loss"], "Validation Loss", "lower"),
        (["eval/loss", "train/loss"], "eval/loss", "lower"),
        (["top1_acc", "seconds"], "top1_acc", "higher"),
        (["lr", "word_ppl"], "word_ppl", "lower"),
        (["eval_f1"], "eval_f1", "higher"),
        (["val_bpb"], "val_bpb", "lower"),
        (["reward"], "reward", "higher"),
        (["accuracy_loss"], "accuracy_loss", "lower"),
        (["space"], "space", "lower"),
        (["recall@5", "seconds"], "recall@5", "higher"),
        (["lr", "mmlu/exact_match"], "mmlu/exact_match", "higher"),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_the_metric_and_its_better_direction(tmp_path: Path, names: list[str], metric: str, better: str) -> None:
    (tmp_path / "a.csv").write_text(",".join(["step", *names]) + "\n" + ",".join("1" for _ in range(len(names) + 1)))
    logs = read_logs([tmp_path], How())
    assert (logs.metric, logs.better) == (metric, better)
    assert f"judged by {metric}, {better} is better" in logs.remarks


def test_a_metric_that_is_asked_for(tmp_path: Path) -> None:
    metrics(tmp_path / "a_seed0")
    assert read_logs([tmp_path], How(metric="loss")).metric == "loss"
    with pytest.raises(UserError, match="no run has a metric 'acc', which --metric names; there are loss, val_loss"):
        read_logs([tmp_path], How(metric="acc"))
    (tmp_path / "b_seed0.csv").write_text("step,this,that\n1,2,3\n")
    with pytest.raises(UserError, match="--metric must say by which number runs are judged: that, this"):
        read_logs([tmp_path / "b_seed0.csv"], How())
    logs = read_logs([tmp_path], How())
    assert f"b seed 0 ({tmp_path / 'b_seed0.csv'}) logged no val_loss" in logs.remarks


def test_null_in_lines_of_a_run_is_a_point_without_a_number(tmp_path: Path) -> None:
    folder = tmp_path / "a_seed0"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 0, "val_loss": 9.0, "loss": 9.5}\n{"step": 5, "val_loss": null}\n')
    run = read_logs([folder], How()).runs[0]
    assert run.curves["val_loss"][0].tolist() == [0, 5] and np.isnan(run.curves["val_loss"][1][1])
    assert run.curves["loss"][0].tolist() == [0]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: folder / "nothing", "nothing does not exist"),
        (lambda folder: folder, "holds no log that gptlab knows"),
        (lambda folder: (folder / "notes.txt", (folder / "notes.txt").write_text("x"))[0], "no line is known"),
        (lambda folder: (folder / "a.bin", (folder / "a.bin").write_bytes(bytes(99)))[0], "no line is known"),
    ],
    ids=["missing", "empty folder", "other text", "binary"],
)
def test_where_there_is_no_run_one_sentence_says_so(tmp_path: Path, make: Any, says: str) -> None:
    path = make(tmp_path)
    with pytest.raises(UserError) as caught:
        read_logs([path], How())
    assert says in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_that_may_not_be_read_is_said(tmp_path: Path) -> None:
    metrics(tmp_path / "a_seed0")
    (tmp_path / "b").mkdir(mode=0)
    logs = read_logs([tmp_path], How())
    (tmp_path / "b").chmod(0o700)
    assert f"{tmp_path / 'b'} cannot be read: Permission denied" in logs.remarks


# -- gptlab's own -----------------------------------------------------------------------------------------------------


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A study of two arms and three seeds; the first run of the baseline diverged, and one has no folder any more."""
    values = {"classic": [3.0, 3.125, 3.25], "rope": [2.75, 2.875, 3.0]}
    folder = planted(tmp_path / "planted", "architecture-smoke", values, diverged={("classic", 0): 50})
    study = open_study(folder)
    for run in folder.glob("*_seed*/"):
        arm, _, seed = run.name.rpartition("_seed")
        RunDir(run).write_recipe(study.build(arm, int(seed)))
    shutil.rmtree(folder / "rope_seed2")
    return folder


def test_a_study_of_gptlab_keeps_its_arms_seeds_and_how_runs_ended(study: Path) -> None:
    (study / "classic_seed9").mkdir()
    (study / "other_seed0").mkdir()
    logs = read_logs([study], How())
    assert named(logs) == [(arm, seed) for arm in ("classic", "rope") for seed in range(3)]
    assert [run.status for run in logs.runs] == ["diverged"] + 5 * ["completed"]
    assert [run.result["val_loss"] for run in logs.runs] == [3, 3.125, 3.25, 2.75, 2.875, 3]
    assert logs.runs[0].curves["loss"][0][-1] == 50 and logs.runs[0].settings["seed"] == 0 and logs.paired
    assert f"{study / 'classic_seed9'} has logged nothing yet" in logs.remarks
    assert f"{study / 'other_seed0'} left out: architecture-smoke has no such arm" in logs.remarks


def test_a_run_of_gptlab_alone_and_a_damaged_one(study: Path) -> None:
    (study / "classic_seed1" / "result.json").write_text("{")
    logs = read_logs([study / f"{arm}_seed{seed}" for arm in ("classic", "rope") for seed in (0, 1)], How())
    assert named(logs) == [("classic", 0), ("rope", 0), ("rope", 1)]
    assert {run.form for run in logs.runs} == {"gptlab"}
    assert any("classic_seed1/result.json is damaged" in remark for remark in logs.remarks)


def test_runs_of_gptlab_in_folders_of_other_names_are_told_apart_by_their_settings(study: Path, tmp_path: Path) -> None:
    for i, name in enumerate(["rope_seed0", "rope_seed1", "classic_seed1"]):
        shutil.copytree(study / name, tmp_path / "mine" / f"try {'xyz'[i]}")
    logs = read_logs([tmp_path / "mine"], How())
    arms = {run.arm for run in logs.runs}
    assert len(arms) == 2 and all("=" in str(arm) for arm in arms)
    assert sorted(run.seed or 0 for run in logs.runs) == [0, 1, 1]
