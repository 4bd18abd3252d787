"""gptlab prepare"""

import argparse
import json
import os
import shlex
from pathlib import Path
from typing import Any

from gptlab.cli.common import add_verb, named
from gptlab.config import Data, load_recipe, shipped
from gptlab.streams import best_effort

CORPORA = (
    "stdlib, shakespeare, openwebtext, fineweb-edu, or a file or folder of text; labelled documents: eurlex57k, "
    "agnews, imdb, constructs, or a file or folder with --label-field"
)

TOKENIZERS = (
    "gpt2, byte, char, bpe-N, a tokenizer.json, or a folder or hub id of a model with a tokenizer.json or with "
    "vocab.json and merges.txt (default: gpt2)"
)


def add_to(verbs: Any) -> None:
    v = add_verb(verbs, "prepare", do_prepare, "Turn text or labelled documents into a dataset that `train` reads.")
    v.add_argument("corpus", metavar="CORPUS", help=CORPORA)
    v.add_argument("--from", dest="source", metavar="PATH", help="read this local text or Hugging Face dataset instead")
    v.add_argument("--out", type=named, metavar="DIR", help="folder to write (default: data/CORPUS-TOKENIZER)")
    v.add_argument("--tokenizer", default="gpt2", help=TOKENIZERS)
    v.add_argument("--format", choices=["llmc", "nanogpt", "npy"], default="llmc", help="of shards (default: llmc)")
    v.add_argument("--shard-tokens", type=int, default=100_000_000, metavar="N", help="tokens per shard (default: 1e8)")
    v.add_argument("--workers", type=int, metavar="N", help="number of tokenizer threads (default: all cores)")
    v.add_argument("--val-fraction", type=float, metavar="X", help="share of the documents to use for validation")
    v.add_argument("--val-tokens", type=int, metavar="N", help="use the first N tokens for validation instead")
    v.add_argument("--text-field", default="text", metavar="NAME", help="field with the text (default: text)")
    v.add_argument("--label-field", metavar="NAME", help="field with the labels; makes a dataset for task = classify")
    v.add_argument("--max-documents", type=int, metavar="N", help="stop after N documents (labelled: N per split)")
    v.add_argument("--strict", action="store_true", help="refuse files and rows that would be left out and counted")
    v.add_argument("--part", metavar="I/N", help="prepare part I of N; in a job array: $SLURM_ARRAY_TASK_ID/14")
    v.add_argument("--merge", action="store_true", help="combine the finished parts into one dataset")


@best_effort()
def do_prepare(options: argparse.Namespace) -> None:
    from gptlab.data.prepare import prepare

    names = (
        "source out tokenizer format shard_tokens workers val_fraction val_tokens text_field label_field "
        "max_documents part merge strict"
    )
    folder = prepare(options.corpus, **{name: getattr(options, name) for name in names.split()})
    print(f"dataset: {folder}")
    print(f"next: {next_command(folder, options)}")


def next_command(folder: Path, options: argparse.Namespace) -> str:
    """What to type after a preparation: the training of a fitting recipe, or after a part the merge of all parts."""
    if options.part:
        return shlex.join(["gptlab", "prepare", options.corpus, "--out", str(folder.parent), "--merge"])
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    task = "classify" if manifest.get("kind") == "labeled" else "lm"
    made = Data(corpus=manifest["corpus"], tokenizer=manifest["tokenizer"]["name"]).folder
    recipe = fitting_recipe(task, made)
    words = ["gptlab", "train", recipe]
    if load_recipe(recipe).data.folder != str(folder):
        words += ["--data.path", str(folder), "--name", folder.resolve().name]
    return shlex.join(words)


def fitting_recipe(task: str, folder: str) -> str:
    """A shipped recipe that is made for the dataset of this default folder; else one that trains on any, in minutes."""
    recipes = {name: load_recipe(name) for name in shipped("recipes")}
    made = sorted((n for n, r in recipes.items() if r.task == task and r.data.folder == folder), key=len)
    if not made:
        return "smoke-cls" if task == "classify" else "stdlib-demo"
    for_cpu = f"{made[0]}-cpu"
    return for_cpu if for_cpu in made and not os.path.exists("/dev/nvidia0") else made[0]
