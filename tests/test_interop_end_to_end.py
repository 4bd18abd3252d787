"""A model like the demo's, trained a few steps, leaves for transformers, lm-eval, the hub and llama.cpp's format."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import tiny_recipe
from test_interop_push import TOKEN, Hub

import gptlab

GENERATE = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

folder, prompt, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
generate = pipeline("text-generation", folder, trust_remote_code=True)
texts = [generate(prompt, do_sample=False, max_new_tokens=n)[0]["generated_text"]]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
ids = tokenizer(prompt, return_tensors="pt")
for use_cache in (True, False):
    drawn = model.generate(**ids, do_sample=False, max_new_tokens=n, use_cache=use_cache)
    texts.append(tokenizer.decode(drawn[0]))
assert len(set(texts)) == 1, texts
assert len(generate(prompt)[0]["generated_text"]) > len(prompt)
print(texts[0])
"""


def command(*words: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
@pytest.mark.parametrize("form", ["own code", "standard"])
def test_a_trained_model_generates_elsewhere_what_it_generates_here(form: str, dataset: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    shape = {"model__position": "rope", "model__qk_norm": True, "model__bias": False, "model__dropout": 0.0}
    if form == "own code":
        shape |= {"model__mlp": "relu2", "model__tied": False}
    else:
        shape |= {"model__mlp": "swiglu", "model__norm": "rmsnorm"}
    gptlab.train(tiny_recipe(dataset, **shape), tmp_path / "run", quiet=True)
    source = {"PYTHONPATH": str(Path(gptlab.__file__).parents[1])}
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, args=[0.01], daemon=True).start()
        environment = source | {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        words = ("-m", "gptlab", "export", "run", "--to", "hf", "out", "--license", "mit", "--push", "somebody/model")
        said = command(*words, cwd=tmp_path, **environment)
        hub.shutdown()
    assert said.stdout == f"hf model: out\npushed: {hub.url}/somebody/model\n"
    assert ("trust_remote_code" in said.stderr) == (form == "own code")

    fresh = tmp_path / "fresh"  # what is on the hub, and nothing of gptlab
    for name, content in hub.files.items():
        (fresh / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (fresh / "model" / name).write_bytes(content)
    sample = ("sample", tmp_path / "run", "--prompt", "the dog", "--temperature", "0", "--max-tokens", "20")
    ours = command("-m", "gptlab", *sample, cwd=tmp_path, **source)
    blocked = {"PYTHONPATH": "", "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    theirs = command("-c", GENERATE, "model", "the dog", 20, cwd=fresh, **blocked)
    assert theirs.stdout == ours.stdout


@pytest.mark.slow
def test_lm_eval_loads_the_code(dataset: Path, tmp_path: Path, foreign_code: None) -> None:
    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from gptlab.evals.harness import HarnessLM
    from gptlab.interop.hf import export_hf

    gptlab.train(tiny_recipe(dataset, model__qk_norm=True), tmp_path / "run", quiet=True)
    run = gptlab.load_run(tmp_path / "run", device="cpu")
    assert export_hf(run.model, run.tokenizer, tmp_path / "out") == "gptlab"
    theirs = HFLM(pretrained=str(tmp_path / "out"), device="cpu", batch_size=2, dtype="float32", trust_remote_code=True)
    pairs = [("the cat", " sat on a mat"), ("the", " dog had run"), ("an old man who", " sold red hats")]
    asked = [Instance("loglikelihood", {}, pair, i, (f"task{i}", i, 1)) for i, pair in enumerate(pairs)]
    ours = HarnessLM(run.model, run.tokenizer, torch.device("cpu"), contextlib.nullcontext, 2)
    measured, expected = ours.loglikelihood(asked), theirs.loglikelihood(asked, disable_tqdm=True)
    assert [score for score, _ in measured] == pytest.approx([score for score, _ in expected], abs=1e-4)
