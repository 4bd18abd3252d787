"""Runs made of models that were trained elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gptlab.config import build_recipe
from gptlab.data.shards import Dataset
from gptlab.errors import RunError
from gptlab.interop.nanogpt import import_nanogpt
from gptlab.interop.source import read_source, source_tokenizer
from gptlab.model.gpt import build_model
from gptlab.rundir import RunDir
from gptlab.streams import say
from gptlab.training.checkpoint import Checkpoints


def import_run(kind: str, source: str, out: Path, overrides: dict[str, Any]) -> Path:
    """Make a run directory of a Hugging Face folder or id, or of nanoGPT's ckpt.pt.

    It can be evaluated (give the dataset as data.path), sampled from, exported, and trained on with train.init_from.

    Args:
        kind: "hf" or "nanogpt".
        overrides: settings to record; with data.path the tokenizer is that dataset's, else the source's own.

    Raises:
        UserError: the source cannot be read, or is a model gptlab cannot represent exactly.
        RunError: there is a run in `out` already, or nothing tells what the token ids stand for.
    """
    run = RunDir(out)
    if run.exists():
        raise RunError(f"{out} already has a run in it: --out names another folder")
    shape, fill = import_nanogpt(source) if kind == "nanogpt" else read_source(source)
    given = overrides.get("data.path")
    tokenizer = source_tokenizer(source) if given is None else Dataset(given).tokenizer
    if tokenizer is None:
        raise RunError(
            f"{source} does not say what its {shape.vocab_size} token ids stand for, in a tokenizer.json or in "
            "vocab.json and merges.txt: --data.path names a prepared dataset whose tokenizer it was trained with"
        )
    if tokenizer.vocab_size > shape.vocab_size:
        say(
            f"{source}: the tokenizer has ids up to {tokenizer.vocab_size - 1} and the model's vocabulary ends at "
            f"{shape.vocab_size - 1}: text that needs the others is refused"
        )
    described = {
        "name": Path(out).name,
        "description": f"imported from {source}",
        "model": shape.model_dump(),
        "data": {"tokenizer": tokenizer.name, "corpus": ""},  # what it was trained on is not known
        "batch": {"tokens_per_step": shape.block_size},
        "train": {"eval_only": True},
    }
    recipe = build_recipe(described, overrides)
    with run.lock():
        model = build_model(recipe.model, "cpu", init=fill)
        checkpoints = Checkpoints(run, keep_last=1, keep_best=False)
        checkpoints.save(model, None, {"step": 0})
        checkpoints.wait()
        run.write_json("tokenizer.json", tokenizer.spec())
        run.write_recipe(recipe)
        run.write_json("result.json", {"status": "completed", "steps": 0, "tokens": 0})
    return out
