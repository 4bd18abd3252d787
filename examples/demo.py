"""`make demo`: from Python's own source to a language model, in a minute or two on two cores.

Every step is a command you could type; this script types them, compares the model with gzip and xz, and shows a text
that the model wrote. On a GPU, which is untested, the same commands use the GPU.
"""

import ast
import gzip
import json
import lzma
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

from gptlab import load_run
from gptlab.config import load_recipe
from gptlab.data.shards import Dataset
from gptlab.report.card import write_card
from gptlab.report.run_page import write_run_page
from gptlab.rundir import RunDir

RECIPE = "stdlib-demo"
BOUND = 0.95  # of xz's bits per byte, to reach on held-out text; docs/notebook.md has the measurement it comes from
TEXTS = 8
CHOICE = f"Of {TEXTS} texts that go on from the prompt, the longest that Python's parser accepts"


def gptlab(command: str) -> None:
    print(f"\n$ gptlab {command}", flush=True)
    subprocess.run([sys.executable, "-m", "gptlab", *shlex.split(command)], check=True)


def valid_python(text: str) -> str:
    """The longest beginning of a text, in whole lines, that Python's parser accepts."""
    lines = text.split("\n")[:-1]  # the last one is cut off somewhere
    for count in range(len(lines), 0, -1):
        try:
            ast.parse(beginning := "\n".join(lines[:count]).rstrip())
            return beginning
        except (SyntaxError, ValueError):
            continue
    return ""


def keep_text(run: RunDir, step: int, text: str) -> None:
    """Write the text among the run's samples, which its card and page show, and how it was chosen."""
    (run.path / "samples").mkdir(exist_ok=True)
    (run.path / f"samples/step-{step:08d}.txt").write_text(f"# {CHOICE}:\n{text}\n", encoding="utf-8")
    write_card(run)
    write_run_page(run)


def main() -> None:
    recipe = load_recipe(RECIPE)
    dataset, run = Path(recipe.data.folder), Path(f"runs/{RECIPE}_seed{recipe.seed}")
    gptlab(f"prepare {recipe.data.corpus} --tokenizer {recipe.data.tokenizer}")
    gptlab(f"train {RECIPE} --out {run} --precision.regime auto")
    gptlab(f"eval {run} --out {run}/eval.json")

    val = Dataset(dataset).val
    tokenizer = Dataset(dataset).tokenizer
    ids = val.gather(np.array([0]), len(val))[0]
    text = tokenizer.decode(ids[ids != tokenizer.eot].tolist()).encode()
    model = json.loads((run / "eval.json").read_text(encoding="utf-8"))["val_bits_per_byte"]
    xz = 8 * len(lzma.compress(text, preset=9)) / len(text)
    rows = {
        "gzip -9": 8 * len(gzip.compress(text, 9)) / len(text),
        "xz -9": xz,
        f"this model, {recipe.train.max_steps} steps": model,
    }
    print(f"\nBits per byte of the same {len(text):,} bytes of held-out source (less is better):")
    for name, bits in rows.items():
        print(f"  {name:28} {bits:.3f}")

    best = max(map(valid_python, load_run(run).sample(recipe.sample.prompt, TEXTS)), key=len)
    print(f"\n{CHOICE}:\n\n{best}")
    keep_text(RunDir(run), recipe.train.max_steps, best)

    print(f"\nThe run is in {run}: look at run.html, card.md and plots/train-val_loss.png. What to type next:")
    print(f"  .venv/bin/gptlab sample {run} --prompt 'class Tree' --temperature 0.6")
    print(f"  .venv/bin/gptlab export {run} --to hf demo-hf    # a folder for transformers; --to gguf for llama.cpp")
    print("  .venv/bin/gptlab recipes")
    print("  .venv/bin/gptlab train --help")
    if model > BOUND * xz:
        sys.exit(f"the model reaches {model / xz:.3f} of xz's bits per byte; {BOUND} or less was expected")


if __name__ == "__main__":
    main()
