"""The scripts of the precision studies, called word for word, with overrides that make the runs tiny."""

import importlib
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_study_runner import Fakes, study_file
from test_training_resume import measured

from gptlab.config import load_study
from gptlab.rundir import RunDir
from gptlab.study import runner

ROOT = Path(__file__).resolve().parents[1]
TINY = {
    "model.n_layer": 1,
    "model.n_head": 1,
    "model.n_embd": 16,
    "model.block_size": 16,
    "model.vocab_size": 0,
    "batch.micro_batch": 2,
    "batch.tokens_per_step": 64,
    "eval.tokens": 64,
    "data.tokenizer": "char",
    "train.device": "cpu",
    "train.eval_every": 4,
    "checkpoint.every": 4,
    "log.every": 1,
    "schedule.warmup_steps": 1,
    "compile.enabled": "false",
}


def settings(dataset: Path, **changes: Any) -> list[str]:
    values = {**TINY, "data.path": dataset, **{key.replace("__", "."): value for key, value in changes.items()}}
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def script(folder: Path, words: str, *more: str) -> subprocess.CompletedProcess[str]:
    """`python experiments/...` in a folder of its own."""
    name, *rest = words.split()
    command = [sys.executable, str(ROOT / name), *rest, *more]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env={**os.environ})


def call(monkeypatch: pytest.MonkeyPatch, words: str, *more: object) -> int:
    """The same in this process, where workers can be replaced."""
    name, *rest = words.split()
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", [name, *rest, *map(str, more)])
        patch.setattr(sys, "path", [str((ROOT / name).parent), *sys.path])
        sys.modules.pop("run", None)
        runpy.run_path(str(ROOT / name), run_name="__main__")
    return int(end.value.code or 0)


@pytest.mark.parametrize("kind", ["lm", "cls"])
def test_which_runs_a_call_starts_and_where_their_results_are(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    fakes = Fakes(tmp_path).replace_workers(monkeypatch)
    file, out = study_file(tmp_path, dataset), Path("results", kind)
    run = f"experiments/{kind}/run.py"

    def result(name: str) -> str:
        return json.loads((out / f"{name}.json").read_text(encoding="utf-8"))["study"]

    assert call(monkeypatch, f"{run} --config fast --max_iters 100", "--study", file) == 0
    assert result("fast_seed0") == "tiny-quick-100"
    assert (out / "quick-100/fast_seed0/recipe.toml").is_file()
    assert call(monkeypatch, f"{run} --config fast --seed 0", "--study", file) == 0  # starts anew
    assert result("fast_seed0") == "tiny"
    assert RunDir(out / "fast_seed0").read_recipe().train.max_steps == 24
    assert call(monkeypatch, f"{run} --config fast --max_iters 50", "--study", file) == 0
    assert result("fast_seed0") == "tiny"  # a full result stays
    before = fakes.started()
    assert before == ["fast_seed0"] * 3
    assert call(monkeypatch, f"{run} --config all --seeds 3", "--study", file, "--jobs", 2) == 0
    names = [f"{arm}_seed{seed}" for arm in ("plain", "fast", "late") for seed in range(3)]
    assert [result(name) for name in names] == ["tiny"] * 9
    assert sorted(fakes.started()[3:]) == sorted(set(names) - {"fast_seed0"})
    assert call(monkeypatch, f"{run} --config all --seeds 0", "--study", file) == 2


@pytest.mark.parametrize("kind", ["lm", "cls"])
def test_the_published_arms_have_the_sanity_gate(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    fakes = Fakes(tmp_path).replace_workers(monkeypatch)
    fakes.ends["fp32_baseline"] = ["diverged"]
    assert call(monkeypatch, f"experiments/{kind}/run.py --config published --jobs 2", "--data.path", dataset) == 1
    core = {"fp32_baseline", "amp_fp16", "amp_bf16", "bf16_pure"}
    assert set(fakes.started()) == {f"{arm}_seed0" for arm in core}


@pytest.mark.slow
def test_a_quick_test_does_not_become_the_full_run(dataset: Path, tmp_path: Path) -> None:
    tiny = settings(dataset, train__max_steps=8)
    quick = script(tmp_path, "experiments/lm/run.py --config amp_bf16 --max_iters 3", *tiny)
    assert quick.returncode == 0, quick.stderr
    file = tmp_path / "results/lm/amp_bf16_seed0.json"
    first = json.loads(file.read_text(encoding="utf-8"))
    assert (first["study"], first["status"], first["steps"]) == ("precision-lm-quick-3", "completed", 3)

    full = script(tmp_path, "experiments/lm/run.py --config amp_bf16 --seed 0", *tiny)
    assert full.returncode == 0, full.stderr
    second = json.loads(file.read_text(encoding="utf-8"))
    assert (second["study"], second["steps"], second["seed"]) == ("precision-lm", 8, 0)
    run = RunDir(tmp_path / "results/lm/amp_bf16_seed0")
    assert run.read_recipe().schedule.decay_steps == 8
    assert [line["step"] for line in measured(run.path) if "loss" in line] == list(range(1, 9))

    again = script(tmp_path, "experiments/lm/run.py --config amp_bf16 --max_iters 3", *tiny)
    assert again.returncode == 0, again.stderr
    assert json.loads(file.read_text(encoding="utf-8")) == second  # a full result stays
    other = script(tmp_path, "experiments/lm/run.py --config amp_bf16 --seed 0", *settings(dataset, train__max_steps=9))
    assert other.returncode == 2
    assert "run.py: results/lm holds another study: schedule.decay_steps (8 then, 9 now)" in other.stderr


def test_what_is_wrong_with_a_call_is_said_in_a_sentence(tmp_path: Path) -> None:
    wrong = script(tmp_path, "experiments/lm/run.py --config amp_bf61 --seed 0")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert "study precision-lm has no arm 'amp_bf61'; did you mean 'amp_bf16'?" in wrong.stderr
    unprepared = script(tmp_path, "experiments/lm/run.py --config all --seeds 3")
    assert unprepared.returncode == 2
    assert (
        "make one with `gptlab prepare openwebtext --tokenizer gpt2 --out data/openwebtext-gpt2`" in unprepared.stderr
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_every_configuration_of_the_language_model(dataset: Path, tmp_path: Path) -> None:
    """Arms that this machine cannot do are not applicable, and none fails."""
    tiny = settings(dataset, train__max_steps=4)
    done = script(tmp_path, "experiments/lm/run.py --config all --seeds 1", "--jobs", "2", *tiny)
    assert done.returncode == 0, done.stderr
    for arm in load_study("precision-lm").arms:
        result = json.loads((tmp_path / f"results/lm/{arm}_seed0.json").read_text(encoding="utf-8"))
        assert (result["arm"], result["seed"]) == (arm, 0)
        assert result["status"] in ("completed", "diverged", "not_applicable"), result
    assert (
        json.loads((tmp_path / "results/lm/fp32_tf32_matmul_seed0.json").read_text(encoding="utf-8"))["status"]
        == "not_applicable"
    )


@pytest.mark.parametrize(("kind", "count"), [("lm", 10), ("cls", 12)])
def test_published_names_the_published_configurations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str, count: int
) -> None:
    asked = []
    monkeypatch.setattr(runner, "run_study", lambda study, out, arms, *_: asked.append((study.name, str(out), arms)))
    monkeypatch.chdir(tmp_path)
    call(monkeypatch, f"experiments/{kind}/run.py --config published --seeds 3")
    ((study, out, arms),) = asked
    assert (study, out, len(arms), len(set(arms))) == (f"precision-{kind}", f"results/{kind}", count, count)
    assert set(arms) <= set(load_study(study).arms)
    assert ("amp_bf16_fp32_head" in arms) == (kind == "cls")  # heads are compared in classification only
    assert capsys.readouterr().out == ""  # no hours: the dataset is not there


def test_the_hours_are_printed_before_several_runs_begin(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "run_study", lambda *_: print("begins"))
    file = study_file(tmp_path, dataset)
    call(monkeypatch, "experiments/lm/run.py --config all --seeds 2 --train.max-steps 100000000", "--study", file)
    hours, begins = capsys.readouterr().out.splitlines()
    assert re.match(r"3 arms x 2 seeds = 6 runs: about [0-9.,]+ hours on one .* at 40% of its peak FLOP/s", hours)
    assert begins == "begins"
    call(monkeypatch, "experiments/lm/run.py --config fast", "--study", file)
    assert capsys.readouterr().out == "begins\n"


def test_a_python_without_gptlab_is_left_for_the_environment_of_make_install(tmp_path: Path) -> None:
    if not (ROOT / ".venv/bin/python").exists():
        pytest.skip("there is no .venv: `make install` makes it")
    bare = [sys.executable, "-I", "-S"]  # sees the standard library only
    for name, words, says in (
        ("experiments/cls/run.py", ["--config", "x"], "run.py: study precision-cls has no arm 'x'"),
        ("experiments/lm/prepare_data.py", ["--from", "/nowhere"], "gptlab: /nowhere does not exist"),
    ):
        done = subprocess.run([*bare, ROOT / name, *words], cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stderr.startswith(says)) == (2, True), done.stderr


def test_within_the_checkout_all_scripts_work_at_its_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    checkout = importlib.import_module("checkout")
    for folder in (ROOT, ROOT / "experiments/lm", ROOT / "docs"):
        monkeypatch.chdir(folder)
        assert checkout.folder() == ROOT
    words = ["--from", "README.md", "--out=../x", "--tokenizer", "gpt2", "--data.path", "img"]
    expected = ["--from", "docs/README.md", "--out=x", "--tokenizer", "gpt2", "--data.path", "docs/img"]
    assert checkout.from_folder(words) == expected
    monkeypatch.chdir(tmp_path)
    assert checkout.folder() == tmp_path
    assert checkout.from_folder(words) == [*words[:2], *words[2:]]


def test_data_is_prepared_where_the_recipes_look_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "documents.jsonl"
    text.write_text("".join(json.dumps({"text": f"document {i} " * 20}) + "\n" for i in range(40)), encoding="utf-8")
    done = script(tmp_path, "experiments/lm/prepare_data.py --tokenizer byte --val-fraction 0.2 --from", str(text))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "data/openwebtext-byte/manifest.json").is_file()  # further arguments are passed on
    recipe = load_study("precision-lm").build("amp_bf16", 0)
    assert recipe.data.folder == "data/openwebtext-gpt2"
