"""`make demo`: from Python's own source to a language model, in a minute or two on two cores.

Every step is a command you could type; this script types them and compares the model with gzip and xz.
"""

import gzip
import json
import lzma
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

from gptlab.config import load_recipe
from gptlab.data.shards import Dataset

RECIPE = "stdlib-demo"
BOUND = 1.74  # bits per byte to reach on held-out text; docs/notebook.md has the measurement it comes from


def gptlab(command: str) -> None:
    print(f"\n$ gptlab {command}", flush=True)
    subprocess.run([sys.executable, "-m", "gptlab", *shlex.split(command)], check=True)


def main() -> None:
    recipe = load_recipe(RECIPE)
    dataset, run = Path(recipe.data.folder), Path(f"runs/{RECIPE}_seed{recipe.seed}")
    gptlab(f"prepare {recipe.data.corpus} --tokenizer {recipe.data.tokenizer}")
    gptlab(f"train {RECIPE}")
    gptlab(f"eval {run} --out {run}/eval.json")
    gptlab(f"sample {run}")

    val = Dataset(dataset).val
    tokenizer = Dataset(dataset).tokenizer
    ids = val.gather(np.array([0]), len(val))[0]
    text = tokenizer.decode(ids[ids != tokenizer.eot].tolist()).encode()
    model = json.loads((run / "eval.json").read_text(encoding="utf-8"))["val_bits_per_byte"]
    rows = {
        "gzip -9": 8 * len(gzip.compress(text, 9)) / len(text),
        "xz": 8 * len(lzma.compress(text)) / len(text),
        f"this model, {recipe.train.max_steps} steps": model,
    }
    print(f"\nBits per byte of the same {len(text):,} bytes of held-out source (less is better):")
    for name, bits in rows.items():
        print(f"  {name:28} {bits:.2f}")
    print(f"\nThe run is in {run}: look at plots/train-val_loss.png and card.md. What to type next:")
    print(f"  .venv/bin/gptlab sample {run} --prompt 'class Tree' --temperature 0.6")
    print(f"  .venv/bin/gptlab export {run} --to hf demo-hf    # a folder for transformers; --to gguf for llama.cpp")
    print("  .venv/bin/gptlab recipes")
    print("  .venv/bin/gptlab train --help")
    if model > BOUND:
        sys.exit(f"the model reaches {model:.3f} bits per byte; {BOUND} or better was expected")


if __name__ == "__main__":
    main()
