"""The command line: its verbs end to end on tiny data, its sentences, its exit statuses."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_recipe

import gptlab
from gptlab import cli
from gptlab.rundir import RunDir


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Run a command line in this process: exit status, stdout, stderr."""
    with pytest.raises(SystemExit) as exit:
        cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return int(exit.value.code or 0), out, err


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "tiny"
    gptlab.train(tiny_recipe(dataset, train__max_steps=60, train__eval_every=20, model__dropout=0.0), out, quiet=True)
    return out


def test_train_leaves_a_whole_run_directory(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.toml").write_text(
        tiny_recipe(dataset).to_toml().replace('name = "tiny"', 'name = "mine"'), encoding="utf-8"
    )
    status, out, _ = call(capsys, "train", "my.toml", "--train.max-steps", "8", "--optim.lr=2e-3", "--seed", "3")
    assert status == 0
    assert "runs/mine+lr=2e-3_seed3" in out
    folder = tmp_path / "runs/mine+lr=2e-3_seed3"
    assert {path.name for path in folder.iterdir()} >= {
        "recipe.toml",
        "environment.json",
        "tokenizer.json",
        "metrics.jsonl",
        "result.json",
        "card.md",
        "run.html",
        "plots",
    }
    names = {path.name for path in (folder / "plots").iterdir()}
    assert names == {
        "training_loss.png",
        "validation_loss.png",
        "train-val_loss.png",
        "learning_rate.png",
        "throughput.png",
    }
    recipe = RunDir(folder).read_recipe()
    assert (recipe.seed, recipe.train.max_steps, recipe.optim.lr) == (3, 8, 2e-3)
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert (result["status"], result["steps"], result["tokens"]) == ("completed", 8, 8 * 256)
    lines = RunDir(folder).read_metrics()
    evaluations = [line for line in lines if "val_loss" in line]
    assert [line["step"] for line in evaluations] == [0, 6, 8]
    assert result["final_val_loss"] == evaluations[-1]["val_loss"] < evaluations[0]["val_loss"]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))

    # the recipe of the folder repeats the run, to the bit
    assert call(capsys, "train", folder / "recipe.toml", "--out", "again")[0] == 0
    again = [line.get("loss", line.get("val_loss")) for line in RunDir(tmp_path / "again").read_metrics()]
    assert again == [line.get("loss", line.get("val_loss")) for line in lines]

    # finished is answered; never refuses; another setting is named
    assert call(capsys, "train", folder / "recipe.toml")[0] == 0
    status, _, err = call(capsys, "train", folder / "recipe.toml", "--resume", "never")
    assert (status, "already has a run in it" in err) == (2, True)
    status, _, err = call(capsys, "train", folder / "recipe.toml", "--optim.lr", "1e-3", "--out", folder)
    assert (status, "optim.lr (0.002 then, 0.001 now)" in err) == (2, True)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train", "nothing"], "no recipe 'nothing'"),
        (["train", "shakespeare-char-cpu", "--optim.lrr", "1"], "no setting 'optim.lrr'; did you mean 'optim.lr'?"),
        (["train", "shakespeare-char-cpu", "--optim.lr", "fast"], "optim.lr = fast: must be a number"),
        (["train", "shakespeare-char-cpu", "--data.path", "/nowhere"], "no prepared dataset at /nowhere"),
        (["train", "shakespeare-char-cpu", "--train.device", "cuda"], "train.device = cuda: this machine"),
        (["train", "shakespeare-char-cpu", "--lr", "1"], "no setting 'lr'; did you mean 'optim.lr'?"),
        (["train", "shakespeare-char-cpu", "--task", "clasify"], "task = clasify: must be one of 'lm' or 'classify'"),
        (["train", "shakespeare-char-cpu", "--steps", "9"], "no flag --steps; did you mean --train.max-steps?"),
        (
            ["train", "shakespeare-char-cpu", "--batch-size=9"],
            "did you mean --batch.micro-batch (sequences per forward",
        ),
        (["train", "shakespeare-char-cpu", "--epochs", "1"], "did you mean --train.max-epochs?"),
        (["train", "shakespeare-char-cpu", "--learning-rate", "1"], "did you mean --optim.lr?"),
        (["train", "shakespeare-char-cpu", "--train.max-steps"], "--train.max-steps needs a value"),
        (["train", "shakespeare-char-cpu", "--seed", "x"], "argument --seed: invalid int value: 'x'"),
        (["train", "shakespeare-char-cpu", "more"], "unrecognized arguments: more (`gptlab --help` lists"),
        (["train", "precision-lm"], "precision-lm is a study; did you mean `gptlab study run precision-lm`?"),
        (["train"], "the following arguments are required: RECIPE (`gptlab train --help` lists the arguments)"),
        (["prepare", "nothing"], "no corpus 'nothing'"),
        (["prepare", "stdlib", "--part", "5/4"], "part 5/4: give I/N"),
        (["plan", "nothing"], "no recipe 'nothing'"),
        (["plan", "smoke-lm", "--json", "/"], "argument --json: / is a folder; give a file name"),
        (["plan", "smoke-lm", "--gpus", "0"], "--gpus 0: must be at least 1"),
        (["import", "hf", "nowhere"], "the following arguments are required: --out"),
        (["import", "nanogpt", "nowhere", "--out", "x"], "nowhere cannot be read"),
        (["study", "run", "nothing"], "no study 'nothing'"),
        (["study", "run", "smoke", "--seed", "0", "--seeds", "1"], "--seeds: not allowed with argument --seed"),
        (["study", "run", "precision-lm", "--name", "x"], "--name and --description are for a recipe"),
        (["study", "status", "nowhere"], "nowhere is not a study's folder"),
        (["study", "report", "nowhere"], "nowhere is not a study's folder"),
        (["study", "power", "smoke", "--effect", "1", "--noise", "1", "--pilot", "x"], "--pilot: not allowed with"),
        (["launch", "smoke-lm"], "`gptlab launch RECIPE|STUDY --on slurm|local` starts jobs"),
        (["launch", "smoke-lm", "--on", "local", "--arm", "x"], "--arm, --seeds and --jobs are for a study"),
        (["launch", "--status", "nowhere"], "nowhere has no launched run or study"),
        (["stop", "nowhere"], "nowhere is neither the folder of a run nor of a study"),
        (["bench", "steps"], "invalid choice: 'steps'"),
        (["bench", "step"], "the following arguments are required: RECIPE"),
        (["bench", "step", "smoke-lm", "--vs", "x"], "invalid choice: 'x'"),
        (["bench", "inference", "nothing"], "no recipe 'nothing'"),
        (["fly"], "invalid choice: 'fly'"),
        (["eval", "/nowhere"], "/nowhere is not a run directory"),
        (["sample", "/nowhere", "--optim.lr", "1"], "`gptlab sample` takes no settings such as --optim.lr"),
        (["plot", "/nowhere"], "/nowhere is not a run directory"),
        (["export", "/nowhere", "--to", "hf", "x"], "/nowhere is not a run directory"),
    ],
)
def test_a_wrong_call_is_a_sentence_and_2(
    words: list[str],
    sentence: str,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if "cuda" in words:
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
        words = [*words, "--data.path", str(dataset)]
    status, _, err = call(capsys, *words)
    assert status == 2
    assert err.startswith("gptlab: ")
    assert sentence in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_a_run_directory_stands_for_its_recipe_and_itself(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call(capsys, "train", run)
    assert (status, f"run: {run}" in out) == (0, True)
    assert call(capsys, "plan", run)[0] == call(capsys, "plan", run / "recipe.toml")[0]


def test_the_task_is_a_setting_too() -> None:
    words = ["train", "x", "--task", "lm", "--seed", "1", "--out=y", "--task=classify", "--optim.lr", "2"]
    assert cli.lift_settings(words) == (
        ["train", "x", "--seed", "1", "--out=y"],
        {"task": "classify", "optim.lr": 2},
    )


def test_a_divergence_is_a_result_with_its_step(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.toml").write_text(
        tiny_recipe(dataset, optim__lr=1e18, schedule__warmup_steps=0, model__norm_eps=1e-30, log__every=50).to_toml(),
        encoding="utf-8",
    )
    status, out, _ = call(capsys, "train", tmp_path / "r.toml", "--out", tmp_path / "run", "--checkpoint.every", "50")
    assert status == 3
    result = json.loads((tmp_path / "run/result.json").read_text(encoding="utf-8"))
    assert result["status"] == "diverged"
    assert result["failed_at_step"] >= 2  # the loss of the first batch is that of fresh weights
    assert "loss is" in result["reason"]  # of training, or of an evaluation that came first
    assert "diverged" in out
    assert not list((tmp_path / "run/checkpoints").glob("step-*"))  # nothing broken is saved
    assert "NaN" not in (tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8")


def test_what_this_machine_cannot_do_is_not_applicable(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.toml").write_text(tiny_recipe(dataset, precision__regime="tf32").to_toml(), encoding="utf-8")
    status, out, _ = call(capsys, "train", tmp_path / "r.toml", "--out", tmp_path / "run")
    assert status == 2
    assert "TF32 needs an NVIDIA GPU" in out
    assert json.loads((tmp_path / "run/result.json").read_text(encoding="utf-8"))["status"] == "not_applicable"


def test_eval_covers_the_whole_split_and_writes_its_scores(
    run: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, _ = call(capsys, "eval", run, "--on", "loss", "--out", tmp_path / "scores.json")
    assert status == 0
    scores = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    opened = gptlab.load_run(run, device="cpu")
    from gptlab.data.shards import Dataset

    ids = torch.tensor(Dataset(dataset).val.gather([0], len(Dataset(dataset).val)))[0]
    block = opened.recipe.model.block_size
    windows = (len(ids) - 1) // block
    x, y = ids[: windows * block].view(windows, block), ids[1 : windows * block + 1].view(windows, block)
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(opened.model(x).flatten(0, 1).double(), y.flatten())
    assert scores["tokens"] == windows * block
    assert scores["val_loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert scores["val_perplexity"] == pytest.approx(loss.exp().item(), rel=1e-6)
    n_bytes = len(opened.tokenizer.decode([i for i in y.flatten().tolist() if i != opened.tokenizer.eot]).encode())
    bits = loss.item() * windows * block / torch.log(torch.tensor(2.0)).item() / n_bytes
    assert scores["val_bits_per_byte"] == pytest.approx(bits, rel=1e-6)


def test_sample_is_repeatable_and_bounded(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("sample", run, "--prompt", "the c", "--max-tokens", "40", "--seed", "5")
    _, first, _ = call(capsys, *words)
    assert first.startswith("the c")
    assert len(first.rstrip("\n")) >= 40
    assert call(capsys, *words)[1] == first
    assert call(capsys, *words[:-1], "6")[1] != first
    _, several, _ = call(capsys, *words, "--samples", "2")
    assert several.split("\n" + "-" * 40)[0] == first.rstrip("\n")  # beside others, the same first sample
    _, several, _ = call(capsys, *words[:2], "--prompt", "a cat", "--samples", "2", *words[2:])
    texts = several.split("\n" + "-" * 40 + "\n")
    assert [text[:5] for text in texts] == ["a cat", "a cat", "the c", "the c", ""]
    assert texts[2] == first.rstrip("\n")  # beside another prompt too
    status, _, err = call(capsys, "sample", run, "--temperature", "-1")
    assert (status, "sample.temperature = -1.0: must be at least 0" in err) == (2, True)
    assert call(capsys, "sample", run, "--samples", "0") == (2, "", "gptlab: --samples 0: must be at least 1\n")
    assert "10,000 texts are drawn together" in call(capsys, "sample", run, "--samples", "10001")[2]
    status, _, err = call(capsys, "sample", run, "--prompt", "\N{SNOWMAN}")
    assert status == 2
    assert "\N{SNOWMAN}" in err


def test_export_and_import_keep_the_model(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = call(capsys, "export", run, "--to", "hf", tmp_path / "hf")
    assert (status, out) == (0, f"hf model: {tmp_path / 'hf'}\n")
    assert "README.md names no licence" in err
    assert call(capsys, "import", "hf", tmp_path / "hf", "--out", tmp_path / "back")[0] == 0
    status, _, err = call(capsys, "import", "nanogpt", tmp_path / "hf/config.json", "--out", tmp_path / "no")
    assert status == 2
    assert not (tmp_path / "no").exists()
    one, other = gptlab.load_run(run, device="cpu"), gptlab.load_run(tmp_path / "back", device="cpu")
    ids = torch.tensor([one.tokenizer.encode("the dog sat")])
    assert other.tokenizer.encode("the dog sat") == ids[0].tolist()
    torch.testing.assert_close(one.model(ids), other.model(ids), rtol=0, atol=1e-5)
    status, _, err = call(capsys, "import", "hf", tmp_path / "hf", "--out", run)
    assert (status, "already has a run in it" in err) == (2, True)


def test_an_export_brings_a_model_card(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from huggingface_hub import ModelCard

    folder, known = tmp_path / "hf", shutil.copytree(run, tmp_path / "known")
    facts = RunDir(known).read_json("environment.json")
    RunDir(known).write_json("environment.json", facts | {"data": {"corpus": "fineweb-edu"}})
    status, _, err = call(capsys, "export", known, "--to", "hf", folder, "--license", "apache-2.0")
    assert (status, err) == (0, "")
    card, lines = ModelCard.load(folder / "README.md"), RunDir(run).read_metrics()
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "transformers")
    assert 'pipeline("text-generation", ' in card.text and "## Results" in card.text
    last = next(line for line in reversed(lines) if "val_loss" in line)
    assert (card.data.datasets, card.data.language) == (["HuggingFaceFW/fineweb-edu"], "en")
    scores = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert scores["loss"] == pytest.approx(last["val_loss"], abs=1e-6)
    for shown in re.findall(r"^!\[.*\]\((.*)\)$", card.text, re.M):
        assert (folder / shown).is_file()
    for words, said in (
        (("--to", "hf", tmp_path / "x", "--license", "My Licence"), "My Licence: an id of a licence is like mit"),
        (("--to", "sparse24", tmp_path / "x", "--license", "mit"), "--license is for --to hf and gguf"),
        (("--to", "gguf", tmp_path / "x", "--push", "a/b"), "--push is for --to hf"),
        (("--to", "hf", tmp_path / "x", "--push", "b"), "--push b: a repository is named USER/NAME"),
        (("--to", "gguf", tmp_path / "x"), "the tokenizer char cannot be exported to GGUF"),
    ):
        status, _, err = call(capsys, "export", run, *words)
        assert (status, err.count("\n"), (tmp_path / "x").exists()) == (2, 1, False)
        assert said in err


def test_training_goes_on_from_another_run(
    run: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(dataset, train__init_from=str(run), train__max_steps=2, model__n_layer=1, model__block_size=16)
    gptlab.train(recipe, tmp_path / "tuned", quiet=True)
    resolved = RunDir(tmp_path / "tuned").read_recipe()
    assert (resolved.model.n_layer, resolved.model.block_size) == (
        2,
        16,
    )  # the source's shape, cut to a shorter context
    first = next(line["val_loss"] for line in RunDir(tmp_path / "tuned").read_metrics() if "val_loss" in line)
    assert first < 2.0 < 3.4  # as trained, not as initialised: ln 30 is 3.4
    only = gptlab.train(recipe.replace({"train.eval_only": True}), tmp_path / "only", quiet=True)
    assert (only.status, only.steps) == ("completed", 0)
    assert only.final_val_loss == first


def test_plot_overlays_runs(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call(capsys, "plot", run, run, "--out", tmp_path)
    assert status == 0
    assert len(out.splitlines()) == 5


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call(capsys, "recipes")
    assert status == 0
    assert "shakespeare-char-cpu" in out


def test_help_is_quick_and_knows_every_setting() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    help = subprocess.run([sys.executable, "-m", "gptlab", "train", "--help"], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert help.returncode == 0
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5  # CPU seconds: others may be busy
    for flag in ("--optim.lr", "--train.max-steps", "--batch.micro-batch", "--checkpoint.every", "--compile.enabled"):
        assert flag in help.stdout


def test_help_of_one_section_and_of_all(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for words, has, lacks in (
        (["--help"], "--optim.lr X", "--optim.muon-lr"),
        (["--help", "optim"], "--optim.muon-lr X", "--model"),
        (["--help-all"], "--optim.muon-lr X", "nothing"),
    ):
        status, out, _ = call(capsys, "train", *words)
        assert status == 0 and has in out and lacks not in out
        assert max(map(len, out.splitlines())) <= 80
    assert call(capsys, "train", "--help", "optimizer")[2].startswith("gptlab: --help optimizer: no section")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom gptlab import cli\ntry:\n    cli.main(['train', '--help'])\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('torch', 'numpy', 'matplotlib', 'transformers', 'rich') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"


def test_in_an_ascii_locale_signs_are_replaced_and_a_compiled_run_is_refused(dataset: Path, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONIOENCODING": "ascii",
    }
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(tiny_recipe(dataset, compile__enabled=True).to_toml(), encoding="utf-8")
    words = [sys.executable, "-m", "gptlab", "train", str(recipe), "--out", str(tmp_path / "run")]
    refused = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert refused.returncode == 2 and "set PYTHONUTF8=1, or pass --compile.enabled false" in refused.stderr
    assert not (tmp_path / "run").exists()
    code = (
        "import sys; from gptlab.cli import main\ntry:\n    main(['recipes'])\nexcept SystemExit:\n    print('\\u00b1')"
    )
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert printed.stdout.endswith("?\n") and not printed.stderr


def test_eval_offers_the_scores_that_there_are() -> None:
    from gptlab.cli.evaluate import SCORES
    from gptlab.training.scoring import SCORERS

    assert list(SCORERS) == SCORES
