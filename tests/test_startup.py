"""What happens before the first step: which modules a run imports, and how often it opens its data."""

import json
import subprocess
import sys
from pathlib import Path

from conftest import text_of

from gptlab.data.prepare import prepare

HEAVY = ("matplotlib", "pandas", "scipy", "sympy", "tokenizers", "torch._dynamo", "torch._inductor", "transformers")

CODE = """
import json, sys
from collections import Counter
from pathlib import Path

data, out = sys.argv[1:]
opened = Counter()

def listen(event, found):
    if event == "open" and found[1] and str(found[0]).startswith(data):  # without a mode it is os.open, for open
        opened[Path(found[0]).name] += 1

sys.addaudithook(listen)
import gptlab

toy = {"model.n_layer": 1, "model.n_head": 1, "model.n_embd": 16, "model.block_size": 16, "data.path": data,
       "batch.tokens_per_step": 64, "batch.micro_batch": 2, "eval.tokens": 64, "checkpoint.every": 2}
first = None
for name in ("adamw", "muon"):
    recipe = gptlab.load_recipe("smoke-lm", {**toy, "optim.name": name})
    for steps in (2, 4):  # a new run, and the same one resumed
        gptlab.train(recipe.replace({"train.max_steps": steps}), out=f"{out}/{name}", quiet=True)
        first = first or dict(opened)
print(json.dumps([list(sys.modules), first]))
"""


def test_what_a_run_imports_and_how_often_it_opens_its_data(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(text_of(3000, 0))
    data = prepare("text", source=text, tokenizer="byte", out=tmp_path / "data", progress=False)
    words = [sys.executable, "-c", CODE, str(data), str(tmp_path / "runs")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    modules, opened = json.loads(done.stdout)
    assert "torch" in modules
    assert [name for name in HEAVY if name in modules] == []
    # the header of a shard is read, its sha256 is compared once, and it is mapped
    assert opened == {"manifest.json": 1, "tokenizer.json": 2, "train-000000.bin": 3, "val-000000.bin": 3}
