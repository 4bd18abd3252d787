"""The scripts in gpt2/: which recipe and settings their flags stand for, and whole runs of a tiny model."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import gptlab
from gptlab.cli import lift_settings
from gptlab.config import Recipe, build_recipe, read_layer
from gptlab.data.shards import Dataset
from gptlab.errors import UserError
from gptlab.rundir import RunDir

SCRIPTS = Path(__file__).parent.parent / "gpt2"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"gpt2_{name}", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(SCRIPTS))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(SCRIPTS))
    return module


train, prepare_data = script("train"), script("prepare_data")


def resolved(line: str) -> tuple[Recipe, list[str]]:
    """The recipe that a command line of train.py trains, by the way `gptlab train` goes, and its other words."""
    words, overrides = lift_settings(train.call_of(line.split()))
    assert words[0] == "train"
    return build_recipe(read_layer(words[1]), overrides), words[2:]


# -- flags ----------------------------------------------------------------------------------------------------------


def test_the_published_example() -> None:
    recipe, _ = resolved(
        "--batch-size 32 --gradient-accumulation 4 --num-epochs 2 --optimizer adamw --pruning-method none --device cuda"
    )
    assert (recipe.name, recipe.optim.name, recipe.sparsity.method) == ("gpt2-shakespeare-w7900", "adamw", "none")
    assert (recipe.batch.micro_batch, recipe.batch.tokens_per_step) == (32, 32 * 4 * 1024)
    assert (recipe.train.max_epochs, recipe.train.max_steps, recipe.train.device) == (2.0, 0, "cuda")
    assert recipe.step_limit(train_tokens=301_966) == 5  # 2 x 301,966 / 131,072 = 4.6


def test_the_default_is_the_base_recipe() -> None:
    recipe, rest = resolved("")
    assert recipe == build_recipe(read_layer("gpt2-shakespeare-w7900"))
    assert rest == ["--out", "runs/gpt2-shakespeare-adamwspam"]


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("adamw", "adamw"),
        ("adamwspam", "adamw-spam"),
        ("muon", "muon"),
        ("sgd", "sgd"),
        ("adam8bit", "adamw_8bit"),
    ],
)
def test_optimizers(flag: str, name: str) -> None:
    assert resolved(f"--optimizer {flag}")[0].optim.name == name


def test_pruning() -> None:
    recipe, rest = resolved("--optimizer adamwspam --pruning-method magnitude --target-sparsity 0.7")
    assert (recipe.optim.name, recipe.sparsity.method, recipe.sparsity.target) == ("adamw-spam", "magnitude", 0.7)
    assert rest[-1] == "runs/gpt2-shakespeare-adamwspam-magnitude"
    recipe, rest = resolved("--optimizer adamwprune --pruning-method state")
    assert (recipe.optim.name, recipe.sparsity.method, recipe.sparsity.variant) == ("adamw-prune", "state", "bitter1")
    assert recipe.sparsity.target == 0.5
    for variant in ("bitter0", "bitter3", "bitter7"):
        line = f"--optimizer adamwprune --pruning-method state --adamwprune-variant {variant}"
        recipe, rest = resolved(line)
        assert recipe.sparsity.variant == variant
        assert rest[-1] == f"runs/gpt2-shakespeare-adamwprune-state-{variant}"


def test_bitter2_is_bitter1_for_21_percent_longer(capsys: pytest.CaptureFixture[str]) -> None:
    line = "--optimizer adamwprune --pruning-method state --adamwprune-variant bitter"
    ten_thousand = " --train.max-steps 10000"
    one, two = resolved(line + "1" + ten_thousand)[0], resolved(line + "2" + ten_thousand)[0]
    assert two == one.replace({"train.max_steps": 12100})
    assert "21% more iterations: train.max_steps = 12100" in capsys.readouterr().out
    assert resolved(line + "2 --num-epochs 2")[0].train.max_epochs == pytest.approx(2.42)
    assert resolved(line + "2")[0].train.max_steps == 363  # the recipe's 300


def test_one_of_the_two_batch_flags_keeps_the_step() -> None:
    for line, rows in (("--batch-size 8", 8), ("--gradient-accumulation 4", 8)):
        batch = resolved(line)[0].batch
        assert (batch.micro_batch, batch.tokens_per_step) == (rows, 32 * 1024)


def test_datasets_and_sizes() -> None:
    for dataset, corpus in prepare_data.CORPORA.items():
        recipe, _ = resolved(f"--dataset {dataset} --batch-size 16 --gradient-accumulation 2")
        assert recipe.data.corpus == corpus
        assert recipe.batch.tokens_per_step == 32 * recipe.model.block_size
    recipe, _ = resolved("--model-size gpt2-medium")
    assert (recipe.model.n_layer, recipe.model.n_head, recipe.model.n_embd) == (24, 16, 1024)


def test_settings_win_and_the_rest_is_passed_on() -> None:
    recipe, rest = resolved("--batch-size 4 --optim.lr 3e-4 --model.block-size 64 --out here --seed 3 --resume never")
    assert (recipe.optim.lr, recipe.model.block_size) == (3e-4, 64)
    assert recipe.batch.tokens_per_step == 4 * 8 * 64  # 32 sequences, as the recipe has them
    assert rest == ["--seed", "3", "--resume", "never", "--out", "here"]
    assert (
        resolved("--batch-size 4 --batch.micro-batch 2 --device cuda --train.device cpu")[0]
        == resolved("--gradient-accumulation 8 --batch.micro-batch 2 --device cpu")[0]
    )


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--optimizer adamwprune", "--optimizer adamwprune and --pruning-method state are for each other"),
        ("--pruning-method state", "--optimizer adamwprune and --pruning-method state are for each other"),
        ("--adamwprune-variant bitter0", "--adamwprune-variant is a score of"),
        ("--target-sparsity 0.5", "--target-sparsity needs a --pruning-method"),
        ("--pruning-method magnitude --target-sparsity 2", "sparsity.target = 2.0: must be less than 1"),
        ("--batch-size 0", "whole numbers from 1 on"),
        ("--gradient-accumulation -1", "whole numbers from 1 on"),
        ("--num-epochs -1", "train.max_epochs = -1.0: must be at least 0"),
        ("--num-epochs 0", "the run has no end"),
        ("--optim.lrr 1", "did you mean 'optim.lr'?"),
    ],
)
def test_what_is_wrong_is_said(line: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        train.call_of(line.split())


def test_prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert prepare_data.call_of(["--dataset", "finewebedu"]) == ["prepare", "fineweb-edu"]
    words = ["--dataset", "openwebtext", "--from", "org/text", "--max-documents", "9", "--out", "x"]
    assert prepare_data.call_of(words) == [
        "prepare",
        "openwebtext",
        "--max-documents",
        "9",
        "--from",
        "org/text",
        "--out",
        "x",
    ]
    # paths typed within gpt2/ are seen from the root, where the call goes
    monkeypatch.chdir(SCRIPTS)
    assert prepare_data.call_of(["--from", "train.py", "--out", "../data/x"])[2:] == [
        "--from",
        "gpt2/train.py",
        "--out",
        "data/x",
    ]
    assert train.call_of(["--out", "../runs/x", "--data.path", "."])[-1] == "runs/x"
    assert "--data.path=gpt2" in train.call_of(["--data.path", "."])


# -- whole runs -----------------------------------------------------------------------------------------------------

TINY = (
    "--model.n-layer 1 --model.n-head 2 --model.n-embd 32 --model.block-size 32 --model.vocab-size 0 --batch-size 4 "
    "--gradient-accumulation 2 --train.max-steps 6 --train.threads 1 --eval.tokens 64 --schedule.warmup-steps 0 "
    "--precision.regime fp32 --device cpu --data.tokenizer char --sparsity.every 1"
)


def call(script: ModuleType, line: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a script in this process: its exit status."""
    monkeypatch.setattr(sys, "argv", [script.__file__, *line.split()])
    with pytest.raises(SystemExit) as exit:
        script.checkout.run(script.call_of)
    return int(exit.value.code or 0)


def trained(line: str, dataset: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The result of a tiny run of train.py."""
    assert call(train, f"{TINY} --data.path {dataset} --out {out} {line}", monkeypatch) == 0
    return json.loads((out / "result.json").read_text(encoding="utf-8"))


def test_trains_from_within_its_folder(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(SCRIPTS)
    result = trained("--optimizer adamw", dataset, tmp_path / "run", monkeypatch)
    assert (result["status"], result["steps"]) == ("completed", 6)
    assert capsys.readouterr().out.startswith("gptlab train gpt2-shakespeare-w7900 --optim.name=adamw ")
    recipe = RunDir(tmp_path / "run").read_recipe()
    assert (recipe.optim.name, recipe.sequences_per_step, recipe.batch.micro_batch) == ("adamw", 8, 4)


def test_a_short_run_has_a_short_warm_up_and_learns(dataset: Path, tmp_path: Path) -> None:
    """The published example is 5 steps long, and the recipe's warm-up 30."""
    epochs = 4.5 * 8 * 32 / len(Dataset(dataset).train)
    line = TINY.replace("--train.max-steps 6", f"--num-epochs {epochs:.6f} --optim.lr 3e-3 --data.path {dataset}")

    def fall(warmup: str) -> tuple[int, float]:
        """Steps of warm-up of a run of 5 steps, and by how much its val_loss fell."""
        recipe = resolved(line.replace("--schedule.warmup-steps 0", warmup))[0]
        out = tmp_path / str(recipe.schedule.warmup_steps)
        result = gptlab.train(recipe, out, quiet=True)
        assert result.steps == 5
        first = next(line["val_loss"] for line in RunDir(out).read_metrics() if "val_loss" in line)
        return recipe.schedule.warmup_steps, first - result.final_val_loss

    (short, learnt), (given, little) = fall(""), fall("--schedule.warmup-steps 30")
    assert (short, given) == (0, 30)  # what the caller gives, stays
    assert learnt > 0.1 and learnt > 2 * little
    assert resolved("--train.max-steps 50")[0].schedule.warmup_steps == 30 * 50 // 300
    assert resolved("--train.max-steps 9000")[0].schedule.warmup_steps == 30
    assert resolved("--dataset openwebtext --train.max-steps 100")[0].schedule.warmup_steps == 10


def test_is_called_from_the_root_and_from_its_folder(tmp_path: Path) -> None:
    """As the published commands have it: another process, with or without gptlab on its path."""
    for folder, name in ((SCRIPTS.parent, "gpt2/train.py"), (SCRIPTS, "train.py")):
        words = [sys.executable, name, "--optimizer", "adamwprune"]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith("train.py: --optimizer adamwprune and --pruning-method state are for each other")


def test_a_wrong_call_ends_with_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for script, line in (
        (train, "--optimizer adamwprune"),
        (train, "--nothing 3"),
        (train, "--data.path /nowhere"),
        (train, "--optimizer adagrad"),
        (prepare_data, "--dataset shakespear"),
        (prepare_data, "--from /nowhere"),
    ):
        assert call(script, line, monkeypatch) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_prepares_local_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("To be, or not to be, that is the question.\n" * 200, encoding="utf-8")
    assert call(prepare_data, "--dataset shakespeare --from text.txt --tokenizer byte", monkeypatch) == 0
    assert Path("data/shakespeare-byte/manifest.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "adamwspam", "muon", "sgd", "adam8bit"])
@pytest.mark.parametrize("pruning", ["none", "magnitude", "movement"])
def test_every_optimizer_trains_and_prunes(
    optimizer: str, pruning: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = f"--optimizer {optimizer} --pruning-method {pruning}"
    if pruning != "none":
        line += " --target-sparsity 0.4 --sparsity.end 0.5"
    result = trained(line, dataset, tmp_path / "run", monkeypatch)
    assert (result["status"], result["steps"]) == ("completed", 6)
    if pruning != "none":
        assert result["sparsity"] == pytest.approx(0.4, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["bitter0", "bitter1", "bitter2", "bitter3", "bitter7"])
def test_every_variant_prunes(variant: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = f"--optimizer adamwprune --pruning-method state --adamwprune-variant {variant} --target-sparsity 0.4"
    result = trained(line, dataset, tmp_path / "run", monkeypatch)
    assert (result["status"], result["steps"]) == ("completed", 7 if variant == "bitter2" else 6)
    assert result["sparsity"] == pytest.approx(0.4, abs=1e-3)
