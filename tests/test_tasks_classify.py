"""A classification run end to end: the task behind the loop that trains GPTs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import gptlab
from gptlab.cli import main
from gptlab.config import Recipe, build_recipe, load_study
from gptlab.data.labeled import LabeledDataset, constant_loss
from gptlab.data.prepare import prepare
from gptlab.errors import ConfigError, DataError, RunError, UserError
from gptlab.rundir import RunDir
from gptlab.tasks.classify import Classification, LabeledData
from gptlab.training.scoring import evaluate_run

WORDS = ["alpha", "beta", "gamma", "delta", "and", "or", "with", "the", "of", "in"]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 documents of words and 40 to test on, whose labels are the first four words that they hold."""
    folder = tmp_path_factory.mktemp("labelled")
    rng = np.random.default_rng(0)
    lines = []
    for _ in range(440):
        words = rng.choice(WORDS, size=int(rng.integers(3, 14))).tolist()
        labels = sorted(set(words) & set(WORDS[:4])) or ["none"]
        lines.append(f'{{"text": "{" ".join(words)}", "labels": {labels}}}'.replace("'", '"'))
    (folder / "train.jsonl").write_text("\n".join(lines[:400]), encoding="utf-8")
    (folder / "test.jsonl").write_text("\n".join(lines[400:]), encoding="utf-8")
    return prepare(str(folder), out=folder / "data", tokenizer="byte", label_field="labels")


def recipe(data: Path, **settings: object) -> Recipe:
    base = {
        "task": "classify",
        "model.n_layer": 2,
        "model.n_head": 2,
        "model.n_embd": 32,
        "model.block_size": 64,
        "model.mlp": "gelu_erf",
        "data.path": str(data),
        "batch.micro_batch": 4,
        "batch.tokens_per_step": 1024,
        "optim.lr": 2e-3,
        "train.max_steps": 8,
        "train.eval_every": 4,
        "checkpoint.every": 4,
        "log.every": 1,
        "eval.tokens": 2048,
        "train.device": "cpu",
    }
    return build_recipe(base, {key.replace("__", "."): value for key, value in settings.items()})


def losses(folder: Path, key: str = "loss") -> list[float]:
    return [line[key] for line in RunDir(folder).read_metrics() if key in line]


def test_it_learns_labels_that_the_text_tells(labelled: Path, tmp_path: Path) -> None:
    result = gptlab.train(recipe(labelled, train__max_steps=120, train__eval_every=0), tmp_path, quiet=True)
    assert result.status == "completed" and result.samples == 120 * 16 and result.tokens is None
    constant = constant_loss(LabeledDataset(labelled))
    assert losses(tmp_path, "val_loss")[0] > constant
    assert result.final_val_loss is not None and result.final_val_loss < constant - 0.05
    assert result.scores["micro_f1"] > losses(tmp_path, "micro_f1")[0] + 0.1
    assert (
        result.samples_per_second and RunDir(tmp_path).read_json("result.json")["micro_f1"] == result.scores["micro_f1"]
    )


def test_a_stopped_run_goes_on_as_if_it_had_not_been(labelled: Path, tmp_path: Path) -> None:
    chosen = {"model__dropout": 0.1, "precision__regime": "amp_fp16"}
    gptlab.train(recipe(labelled, **chosen), tmp_path / "whole", quiet=True)
    gptlab.train(
        recipe(labelled, **{**chosen, "schedule__decay_steps": 8, "train__max_steps": 4}), tmp_path / "cut", quiet=True
    )
    gptlab.train(recipe(labelled, **{**chosen, "schedule__decay_steps": 8}), tmp_path / "cut", quiet=True)
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    assert losses(tmp_path / "whole", "val_loss")[-1] == losses(tmp_path / "cut", "val_loss")[-1]


def test_a_step_has_the_same_documents_whatever_the_micro_batch(labelled: Path, tmp_path: Path) -> None:
    dataset = LabeledDataset(labelled)
    made = recipe(labelled, model__vocab_size=dataset.vocab_size)
    task = Classification(made, LabeledData(dataset), torch.device("cpu"), tmp_path)

    def rows(step: int, micro_batch: int) -> list[tuple[int, ...]]:
        found = []
        for tokens, lengths, targets in task.micro_batches(step, micro_batch):
            assert len(tokens) == len(lengths) == len(targets) <= micro_batch
            assert (tokens[:, 0] == dataset.cls).all()
            found += [tuple(row[:n].tolist()) for row, n in zip(tokens, lengths, strict=True)]
        return sorted(found)

    assert rows(3, 4) == rows(3, 16) and len(rows(3, 16)) == 16
    assert rows(3, 4) != rows(4, 4)
    per_epoch = len(dataset.splits["train"]) // 16
    seen = [row for step in range(per_epoch) for row in rows(step, 16)]
    assert len(seen) == per_epoch * 16


def test_bf16_pure_and_the_same_under_another_name_are_equal_bit_for_bit(labelled: Path, tmp_path: Path) -> None:
    study = load_study("precision-lm")
    arms = [dict(study.arms[name].settings) for name in ("bf16_pure", "bf16_naive")]
    for name, arm in zip("ab", arms, strict=True):
        gptlab.train(build_recipe(recipe(labelled).model_dump(), arm), tmp_path / name, quiet=True)
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != []


def test_what_does_not_fit_is_said(labelled: Path, dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model.position = rope: must be learned where task = classify"):
        recipe(labelled, model__position="rope")
    with pytest.raises(DataError, match="no prepared dataset at"):
        gptlab.train(recipe(dataset), tmp_path / "a", quiet=True)
    with pytest.raises(DataError, match="holds labelled documents, for task = classify"):
        gptlab.train(recipe(labelled, task="lm", model__mlp="gelu"), tmp_path / "b", quiet=True)
    gptlab.train(recipe(labelled, train__max_steps=1), tmp_path / "c", quiet=True)
    run = gptlab.load_run(tmp_path / "c", device="cpu")
    with pytest.raises(RunError, match="run of task = classify: it generates no text"):
        run.sample("alpha")
    with pytest.raises(UserError, match="--on hellaswag does not apply"):
        evaluate_run(run, ["hellaswag"], {})
    with pytest.raises(SystemExit, match="2"):
        main(["export", str(tmp_path / "c"), "--to", "gguf", str(tmp_path / "c.gguf")])
    other = shutil.copytree(labelled, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text(encoding="utf-8"))
    manifest["labels"][0] = "renamed"
    (other / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(RunError, match="is not the dataset that .* was trained on"):
        evaluate_run(run, ["loss"], {"data.path": str(other)})


def test_lists_of_one_label_are_refused(tmp_path: Path) -> None:
    for split in ("train", "val"):
        rows = [json.dumps({"text": "a", "labels": labels}) for labels in ([0, 1, 0], [0, 0, 0])]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    data = prepare(str(tmp_path), out=tmp_path / "data", tokenizer="byte", label_field="labels")
    with pytest.raises(DataError, match="data has the label 1 alone: lists of labels need two or more"):
        gptlab.train(recipe(data), tmp_path / "run", quiet=True)


def test_an_export_names_the_labels_as_long_as_the_dataset_is_there(
    labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(labelled, tmp_path / "data")
    gptlab.train(recipe(data, train__max_steps=1), tmp_path / "run", quiet=True)
    known = LabeledDataset(data).labels[0], "multi_label_classification"
    for name, first, problem in (("a", *known), ("b", "LABEL_0", None)):
        with pytest.raises(SystemExit, match="0"):
            main(["export", str(tmp_path / "run"), "--to", "hf", str(tmp_path / name)])
        assert ("the labels are numbered" in capsys.readouterr().err) == (name == "b")
        config = json.loads((tmp_path / name / "config.json").read_text(encoding="utf-8"))
        assert (config["id2label"]["0"], config["problem_type"]) == (first, problem)
        assert "pipeline_tag: text-classification" in (tmp_path / name / "README.md").read_text(encoding="utf-8")
        shutil.rmtree(data, ignore_errors=True)


@pytest.mark.parametrize("regime", ["fp32", "bf16_pure"])
def test_a_finished_run_is_scored_over_whole_splits(labelled: Path, tmp_path: Path, regime: str) -> None:
    made = recipe(labelled, precision__regime=regime, eval__tokens=64 * 10**6)  # every document, on the way too
    result = gptlab.train(made, tmp_path / "run", quiet=True)
    scores = evaluate_run(gptlab.load_run(tmp_path / "run", device="cpu"), ["loss"], {})
    dataset = LabeledDataset(labelled)
    assert scores["val_loss"] == result.final_val_loss
    assert {key: scores[key] for key in result.scores} == result.scores
    assert scores["documents"] == len(dataset.splits["val"]) and scores["test_documents"] == 40
    # the test split, by hand: each document alone, without padding
    model, test, total = gptlab.load_run(tmp_path / "run", device="cpu").model, dataset.splits["test"], 0.0
    with torch.no_grad():
        for i in range(40):
            tokens, lengths = test.batch(np.array([i]), 64)
            logits = model(torch.from_numpy(tokens), torch.from_numpy(lengths)).float()
            target = torch.from_numpy(test.targets(np.array([i]), dataset.n_train_labels))
            total += torch.nn.functional.binary_cross_entropy_with_logits(logits, target).item()
    assert scores["test_loss"] == pytest.approx(total / 40, rel=1e-5 if regime == "fp32" else 2e-2)
