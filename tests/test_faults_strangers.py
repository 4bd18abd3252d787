"""A stranger's files run no code: what is planted in them does not happen."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_recipe
from planted_runs import write_runs
from readers import STUDY, make_readers
from test_faults_files import command

from gptlab.config import flag_sections, load_study
from gptlab.data.shards import Dataset
from gptlab.report.write import write_report
from gptlab.rundir import RunDir
from gptlab.training.checkpoint import list_checkpoints
from gptlab.training.loop import train


class Plant:
    """Makes a folder when its pickle is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """A folder that only planted code makes."""
    yield tmp_path / "planted"
    assert not (tmp_path / "planted").exists()


def pickles(mark: Path) -> dict[str, bytes]:
    """Pickles that make the folder, as pickle, torch.save and numpy.save write them."""
    zipped, legacy, array = io.BytesIO(), io.BytesIO(), io.BytesIO()
    content = {"model": {"wte.weight": torch.zeros(2, 2)}, "model_args": Plant(mark)}
    torch.save(content, zipped)
    torch.save(content, legacy, _use_new_zipfile_serialization=False)
    np.save(array, np.array([Plant(mark)], dtype=object), allow_pickle=True)
    return {
        "pickle": pickle.dumps(Plant(mark)),
        "pickle 0": pickle.dumps(Plant(mark), 0),
        "torch": zipped.getvalue(),
        "legacy": legacy.getvalue(),
        "npy": array.getvalue(),
    }


def test_the_plants_grow(tmp_path: Path) -> None:
    """What the other tests rely on."""
    for content in (value for key, value in pickles(tmp_path / "planted").items() if key.startswith("pickle")):
        pickle.loads(content)
        (tmp_path / "planted").rmdir()
    np.load(io.BytesIO(pickles(tmp_path / "planted")["npy"]), allow_pickle=True)
    (tmp_path / "planted").rmdir()
    torch.load(io.BytesIO(pickles(tmp_path / "planted")["torch"]), weights_only=False)
    assert (tmp_path / "planted").exists()


@pytest.mark.slow
def test_no_reader_loads_a_pickle(mark: Path, tmp_path: Path) -> None:
    (tmp_path / "readers").mkdir()
    for reader in make_readers(tmp_path / "readers"):
        for content in pickles(mark).values():
            reader.survives(content)
            assert not mark.exists(), reader.name


@pytest.mark.slow
def test_no_file_of_a_run_is_loaded_as_a_pickle(dataset: Path, mark: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(dataset, train__max_steps=1, train__eval_every=0, model__n_layer=1)
    train(recipe, tmp_path / "run", quiet=True)
    run = RunDir(tmp_path / "run")
    [checkpoint] = list_checkpoints(run)
    for file in (run.recipe_file, run.tokenizer_file, run.path / "result.json", *sorted(checkpoint.iterdir())):
        good = file.read_bytes()
        for content in pickles(mark).values():
            file.write_bytes(content)
            status, says = command("sample", run.path, "--max-tokens", "1")
            assert status in (0, 2) and "Traceback" not in says, (file, says)
            assert not mark.exists(), file
        file.write_bytes(good)


@pytest.mark.parametrize("form", ["pickle", "pickle 0", "torch", "legacy", "npy"])
def test_no_weights_and_no_vocabulary_of_others_is_loaded_as_a_pickle(
    form: str, dataset: Path, mark: Path, tmp_path: Path
) -> None:
    content = pickles(mark)[form]
    (tmp_path / "ckpt.pt").write_bytes(content)
    hf = tmp_path / "hf"
    hf.mkdir()
    config = '{"model_type": "gpt2", "n_layer": 1, "n_head": 1, "n_embd": 2, "n_positions": 4, "vocab_size": 2, '
    code = '"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}'
    (hf / "config.json").write_text(config + code, encoding="utf-8")
    (hf / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Evil: pass\n", encoding="utf-8")
    (hf / "pytorch_model.bin").write_bytes(content)
    for words in (("nanogpt", tmp_path / "ckpt.pt"), ("hf", hf)):
        status, says = command("import", *words, "--out", tmp_path / "out")
        assert (status, says.count("\n")) == (2, 1), says
        start = ("--data.path", dataset, "--train.init-from", words[1])
        status, says = command("train", "smoke-lm", *start, "--out", tmp_path / "out")
        assert (status, says.count("\n")) == (2, 1), says
    data = tmp_path / "data"
    data.mkdir()
    np.arange(300, dtype="<u2").tofile(data / "train.bin")
    np.arange(300, dtype="<u2").tofile(data / "val.bin")
    (data / "meta.pkl").write_bytes(content)
    try:
        Dataset(data)
    except ValueError as error:
        assert "meta.pkl" in str(error)


CODE = ("$(mkdir planted)", "`mkdir planted`", "'; mkdir planted; '", "__import__('os').mkdir('planted')")


@pytest.mark.parametrize("code", [CODE[0], *(pytest.param(code, marks=pytest.mark.slow) for code in CODE[1:])])
def test_no_text_of_a_recipe_is_run(
    code: str, dataset: Path, mark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by Python nor by the shell of a batch script."""
    monkeypatch.chdir(tmp_path)
    texts = [row.name for _, rows in flag_sections().values() for row in rows if row.types == ("string",)]
    assert {"name", "data.path", "train.init_from"} <= set(texts)
    (tmp_path / "r.toml").write_text(tiny_recipe(dataset).to_toml(), encoding="utf-8")
    printed = []
    for name in texts:
        words = ("r.toml", f"--{name}={code}")
        assert command("plan", *words, "--gpu", "h100")[0] in (0, 2)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            status, _ = command("launch", *words, "--on", "slurm", "--print", "--out", tmp_path / code.replace("/", ""))
        assert status in (0, 2), name
        printed += [out.getvalue()] if status == 0 else []
    assert printed
    for script in printed:
        assert code not in script.replace(shlex.quote(code), "") or "#SBATCH" in script
        script = script.replace(sys.executable, "echo").replace("srun", "echo")
        subprocess.run(["bash", "-c", script], capture_output=True, cwd=tmp_path, timeout=60)
    assert not mark.exists()


MODULES = ("torch", "numpy", "json", "sitecustomize", "usercustomize", "gptlab", "safetensors", "conftest", "__init__")


@pytest.mark.slow
def test_no_module_beside_a_stranger_s_files_is_imported(dataset: Path, mark: Path, tmp_path: Path) -> None:
    """The workers of a study are Pythons of their own, started in the folder where the command is typed."""
    place = tmp_path / "place"
    place.mkdir()
    text = f'[recipe.data]\npath = "{dataset}"\ntokenizer = "char"\n[recipe.eval]\ntokens = 64\n[recipe.train]'
    shape = "[recipe.model]\nn_layer = 1\nn_head = 1\nn_embd = 8\nblock_size = 16\n[arms.a]"
    study = STUDY.replace("[recipe.train]", f'{text}\ndevice = "cpu"').replace("[arms.a]", shape)
    study += "[recipe.batch]\nmicro_batch = 1\ntokens_per_step = 16\n[recipe.schedule]\nwarmup_steps = 0\n"
    (place / "study.toml").write_text(study, encoding="utf-8")
    for folder in (place, place / "results" / "two", place / "results" / "two" / "a_seed0"):
        folder.mkdir(parents=True, exist_ok=True)
        for module in MODULES:
            (folder / f"{module}.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n", encoding="utf-8")
        (folder / "evil.pth").write_text(f"import os; os.mkdir({str(mark)!r})\n", encoding="utf-8")
    for words in (
        ["study", "run", "study.toml"],
        ["study", "report", "results/two"],
        ["sample", "results/two/a_seed0", "--prompt", "the"],
    ):
        line = [sys.executable, "-P", "-m", "gptlab", *words]
        ended = subprocess.run(line, cwd=place, capture_output=True, text=True)
        assert (ended.returncode, mark.exists()) == (0, False), (words, ended.stderr)
    assert RunDir(place / "results" / "two" / "b_seed0").read_json("result.json")["status"] == "completed"


MARKUP = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"


@pytest.mark.slow
def test_markup_in_a_study_is_text_in_all_that_a_report_writes(tmp_path: Path) -> None:
    text = STUDY.replace('"b is better"', f'"{MARKUP}"').replace("[[questions]]", "[[questions]]\n", 1)
    text = text.replace('name = "two"', f'name = "two"\ndescription = "{MARKUP}"')
    (tmp_path / "study.toml").write_text(text.replace("seeds = [0]", "seeds = [0, 1, 2]"), encoding="utf-8")
    study = load_study(tmp_path / "study.toml")
    write_runs(
        tmp_path / "two", study, lambda arm, seed: 3.0 + (arm == "a") + seed / 10 if arm == "a" or seed else None
    )
    for file in (tmp_path / "two").glob("*/result.json"):
        file.write_text(file.read_text(encoding="utf-8")[:-1] + ', "reason": "=HYPERLINK(1)"}', encoding="utf-8")
    for name, reason in (("b_seed0", MARKUP),):
        summary = f'{{"study": "two", "arm": "b", "seed": 0, "status": "failed", "reason": "{reason}"}}'
        (tmp_path / "two" / f"{name}.json").write_text(summary, encoding="utf-8")
    report = write_report([tmp_path / "two"], formats=("svg",))
    written = [report.page, *report.files]
    assert {file.suffix for file in written} >= {".html", ".csv", ".svg"}
    for file in written:
        content = file.read_text(encoding="utf-8")
        if file.suffix != ".csv":
            assert "<img src=x" not in content and "<script>alert" not in content, file
        else:
            cells = [cell for line in content.splitlines() for cell in line.split(",")]
            assert not [cell for cell in cells if cell.startswith(("=", "@"))], file
    assert "onerror" in report.page.read_text(encoding="utf-8")  # it is shown, as text
