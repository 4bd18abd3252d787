"""README.md of an exported model: the front matter that the Hugging Face hub reads, how to load it, and card.md."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from gptlab.report.card import card
from gptlab.rundir import RunDir

# Corpora by name: their data set on the hub and their language. Of other corpora neither is known.
HUB_NAMES = {
    "openwebtext": "Skylion007/openwebtext",
    "fineweb-edu": "HuggingFaceFW/fineweb-edu",
    "agnews": "fancyzhx/ag_news",
    "imdb": "stanfordnlp/imdb",
}
LANGUAGES = dict.fromkeys((*HUB_NAMES, "shakespeare"), "en") | {"stdlib": "code"}

# What metrics.jsonl measures, as (type, name) of a model card's metric; HellaSwag's have a data set of their own.
METRICS = {
    "val_loss": ("loss", "validation loss, nats per token"),
    "val_bits_per_byte": ("bits_per_byte", "validation bits per byte"),
    "val_perplexity": ("perplexity", "validation perplexity"),
    "hellaswag_acc": ("accuracy", "HellaSwag acc"),
    "hellaswag_acc_norm": ("accuracy", "HellaSwag acc_norm"),
    "accuracy": ("accuracy", "validation accuracy"),  # of a classifier, as the next two
    "micro_f1": ("f1", "validation micro F1"),
    "macro_f1": ("f1", "validation macro F1"),
}


def model_card(run: RunDir, step: int, name: str, license: str, remote_code: bool) -> dict[str, bytes]:
    """README.md and the picture that it shows, by their names in the exported folder.

    Args:
        run: the run whose model is exported.
        step: of the exported checkpoint; scores that were measured at it are told.
        name: of the model: a hub id or a folder.
        license: an id of the hub's such as mit, or "".
        remote_code: whether loading it needs `trust_remote_code`.
    """
    from huggingface_hub import EvalResult, ModelCardData  # importing it takes half a second

    facts = run.read_json("environment.json").get("data")
    corpus = facts.get("corpus") if isinstance(facts, dict) else None
    corpus = corpus if isinstance(corpus, str) else ""
    measured: dict[str, Any] = {}
    for line in run.read_metrics():
        if line.get("step") == step:
            measured |= {key: line[key] for key in METRICS if isinstance(line.get(key), int | float)}
    results, task = [], f"text-{'classification' if run.read_recipe().task == 'classify' else 'generation'}"
    for key, value in measured.items():
        if math.isfinite(value) and (corpus or "hellaswag" in key):
            data, hub = ("HellaSwag", "Rowan/hellaswag") if "hellaswag" in key else (corpus, HUB_NAMES.get(corpus))
            results.append(
                EvalResult(
                    task_type=task,
                    dataset_type=hub or data,
                    dataset_name=data,
                    dataset_split="validation",
                    metric_type=METRICS[key][0],
                    metric_name=METRICS[key][1],
                    metric_value=round(float(value), 6),
                )
            )
    front = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        tags=["gptlab"],
        license=license or None,
        language=LANGUAGES.get(corpus),
        datasets=[HUB_NAMES[corpus]] if corpus in HUB_NAMES else None,
        model_name=name.rpartition("/")[2] if results else None,  # of the results
        eval_results=results or None,
    )
    head, found, rest = card(run).partition("\n\n## ")
    text = f"---\n{front.to_yaml().strip()}\n---\n\n{head}\n\n{_use(run, step, name, task, remote_code)}{found}{rest}"
    files = {"README.md": text.encode()}
    for picture in re.findall(r"^!\[[^\]]*\]\(([\w./-]+)\)$", text, re.M):
        if (run.path / picture).is_file():
            files[str(Path(picture))] = (run.path / picture).read_bytes()
    return files


def _use(run: RunDir, step: int, name: str, task: str, remote_code: bool) -> str:
    recipe = run.read_recipe()
    trust = ", trust_remote_code=True" if remote_code else ""
    prompt = recipe.sample.prompt.strip() or "The"
    verb = "classify" if task == "text-classification" else "generate"
    lines = [
        "## Use",
        "",
        f"The weights after step {step:,}, exported by gptlab.",
        "",
        "```python",
        "from transformers import pipeline",
        "",
        f'{verb} = pipeline("{task}", {json.dumps(name)}{trust})',
        f"print({verb}({json.dumps(prompt)}))",
        "```",
    ]
    if remote_code:
        lines[2] += " The Python files beside the weights are the model's code, which transformers runs."
    if recipe.model.document_attention:
        lines[2] += " In training a token saw its own document alone; in this form it sees the whole context."
    return "\n".join(lines)
