"""Whether this checkout trains what another revision trained, bit for bit.

    python benchmarks/same_losses.py c234047 [NAME ...] [--keep DIR]

Both revisions train the same small configurations on the same data. The script compares every logged number that is not
a time or a size of memory (loss, lr, gradient norm, largest logit, evaluations, loss scale, sparsity, ...), how the run
ended, samples, and the last checkpoint's weights. Then this checkout resumes from the other revision's checkpoint, and
has to end as the run that was never stopped. The exit status is 1 where anything differs.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parents[1]
STEPS, HALF = 24, 16  # HALF is among the steps that are evaluated
# not compared: times, memory, and FLOP counts, whose definition may change
LEFT_OUT = {"tokens_per_second", "samples_per_second", "memory_gb", "mfu", "mask_overhead_percent"}
ENDING = ("status", "steps", "failed_at_step", "failure", "failed_tensor", "sparsity", "skipped_steps")

BASE: dict[str, Any] = {
    "model.n_layer": 2,
    "model.n_head": 2,
    "model.n_embd": 32,
    "model.block_size": 32,
    "data.path": "text",
    "batch.micro_batch": 3,  # 8 sequences a step: 3 + 3 + 2
    "batch.tokens_per_step": 8 * 32,
    "optim.lr": 3e-3,
    "schedule.warmup_steps": 3,
    "schedule.decay_steps": STEPS,
    "train.max_steps": STEPS,
    "train.eval_every": 8,
    "train.device": "cpu",
    "train.threads": 1,
    "eval.tokens": 512,
    "checkpoint.every": 8,
    "checkpoint.keep_last": 9,
    "compile.enabled": False,
    "log.every": 1,
}
CHANGES: dict[str, dict[str, Any]] = {
    "adamw-dropout": {"model.dropout": 0.1, "eval.train": True},
    "muon": {"optim.name": "muon"},
    "spam-spikes": {"optim.name": "adamw-spam", "faults.gradient_every": 7},
    "bad-batches": {"faults.batch_every": 5, "optim.name": "sgd"},
    "amp-fp16": {"precision.regime": "amp_fp16"},
    "amp-bf16-fp32-head": {"precision.regime": "amp_bf16", "precision.head": "fp32"},
    "bf16-pure": {"precision.regime": "bf16_pure"},
    "bf16-stochastic": {"precision.regime": "bf16_pure", "optim.rounding": "stochastic"},
    "magnitude": {"sparsity.method": "magnitude", "sparsity.every": 3},
    "movement": {"sparsity.method": "movement", "sparsity.every": 3},
    "rigl": {"sparsity.method": "rigl", "sparsity.every": 4},
    "adamw-prune": {"optim.name": "adamw-prune", "sparsity.method": "state", "sparsity.every": 3},
    "modern-samples": {
        "model.position": "rope",
        "model.norm": "rmsnorm",
        "model.mlp": "swiglu",
        "model.bias": False,
        "sample.every": 8,
        "sample.prompt": "a",
        "sample.max_tokens": 16,
    },
    "document-attention": {"model.document_attention": True},
    "mixture": {"data.path": "", "data.mixture": {"text": 2.0, "other": 1.0}},
    "classification": {
        "task": "classify",
        "data.corpus": "constructs",
        "data.path": "labels",
        "model.mlp": "gelu_erf",
        "model.tied": False,
    },
    "diverges": {"optim.lr": 1e3, "optim.grad_clip": 0.0, "precision.regime": "fp16_pure"},
    "ddp": {"batch.tokens_per_step": 7 * 32, "distributed.strategy": "ddp"},
    "fsdp": {"batch.tokens_per_step": 7 * 32, "distributed.strategy": "fsdp", "optim.name": "muon"},
}
SEVERAL = ("ddp", "fsdp")  # two processes

# takes pairs of a recipe file and a run directory
TRAIN = """
import sys
from gptlab import load_recipe, train
for recipe, out in zip(sys.argv[1::2], sys.argv[2::2]):
    result = train(load_recipe(recipe), out, quiet=True)
    if result.status == "failed":
        sys.exit(f"{out}: {result.reason}")
"""


def write_text(folder: Path, seed: int) -> None:
    """Documents of random words: a corpus that needs no download, the same on every machine."""
    draw, words = random.Random(seed), [f"{a}{b}" for a in "bcdfgklm" for b in ("a", "e", "ing", "ous")]
    folder.mkdir(parents=True)
    for i in range(200):
        lines = [" ".join(draw.choices(words, range(1, len(words) + 1), k=12)) for _ in range(8)]
        (folder / f"{i:03d}.txt").write_text("\n".join(lines), encoding="utf-8")


def flat_toml(settings: dict[str, Any]) -> str:
    def value(v: Any) -> str:
        return "{" + ", ".join(f'"{k}" = {w}' for k, w in v.items()) + "}" if isinstance(v, dict) else json.dumps(v)

    return "".join(f"{name} = {value(v)}\n" for name, v in settings.items())


def environment(code: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(code / "src"), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def train(code: Path, work: Path, jobs: list[tuple[str, Path, Path]]) -> None:
    """Train (name, recipe file, run directory) with the package in `code`."""
    alone = [str(path) for name, *paths in jobs if name not in SEVERAL for path in paths]
    if alone:
        subprocess.run([sys.executable, "-c", TRAIN, *alone], cwd=work, env=environment(code), check=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    for name, *paths in jobs:
        if name in SEVERAL:
            command = [*torchrun, sys.executable, "-c", TRAIN, *map(str, paths)]
            subprocess.run(command, cwd=work, env=environment(code), check=True)


def read(run: Path) -> dict[str, Any]:
    """What is compared of a run; a line that was written again after a restart counts once."""
    lines: dict[tuple[int, bool], dict[str, Any]] = {}
    for text in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        lines[line["step"], "loss" in line] = {k: repr(v) for k, v in line.items() if k not in LEFT_OUT}
    weights = {}
    if checkpoints := sorted((run / "checkpoints").glob("step-*")):
        for file in sorted(checkpoints[-1].glob("model*.safetensors")):
            for name, tensor in load_file(file).items():
                weights[f"{file.name}: {name}"] = tensor.contiguous().view(torch.uint8).numpy().tobytes().hex()
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    samples = {file.name: file.read_text(encoding="utf-8") for file in (run / "samples").glob("*.txt")}
    return {
        **{f"line {key}": line for key, line in lines.items()},
        **weights,
        **samples,
        "result": {key: repr(result.get(key)) for key in ENDING},
    }


def difference(a: dict[str, Any], b: dict[str, Any]) -> str:
    """The first thing that differs; "" where nothing does."""
    for key in [*a, *b]:
        if a.get(key) != b.get(key):
            one, two = a.get(key), b.get(key)
            if isinstance(one, dict) and isinstance(two, dict):
                changed = {k: (one.get(k), two.get(k)) for k in one | two if one.get(k) != two.get(k)}
                return f"{key}: {changed}"
            return f"{key}: {str(one)[:60]} and {str(two)[:60]}"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", help="of git, such as a commit or HEAD~1")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(CHANGES)} (default: all)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave the runs in this folder")
    options = parser.parse_args()
    names = options.names or list(CHANGES)
    work = Path(options.keep or tempfile.mkdtemp()).resolve()
    code = {"then": work / "then", "now": HERE}
    archive = subprocess.run(
        ["git", "-C", str(HERE), "archive", options.revision, "src"], check=True, capture_output=True
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(code["then"], filter="data")

    write_text(work / "texts", 1)
    write_text(work / "others", 2)
    corpora = {"text": ["texts"], "other": ["others"], "labels": ["constructs", "--max-documents", "300"]}
    for out, arguments in corpora.items():
        tokenizer = ["--tokenizer", "byte"] if out != "labels" else ["--tokenizer", "bpe-512"]
        command = [sys.executable, "-m", "gptlab", "prepare", *arguments, *tokenizer, "--out", out]
        subprocess.run(command, cwd=work, env=environment(code["then"]), check=True, stdout=subprocess.DEVNULL)

    jobs: dict[str, list[tuple[str, Path, Path]]] = {"then": [], "now": [], "half": [], "resumed": []}
    for name in names:
        settings = {**BASE, **CHANGES[name]}
        (work / f"{name}.toml").write_text(flat_toml(settings), encoding="utf-8")
        (work / f"{name}-half.toml").write_text(flat_toml({**settings, "train.max_steps": HALF}), encoding="utf-8")
        for kind, wanted in jobs.items():
            wanted.append((name, work / f"{name}{'-half' * (kind == 'half')}.toml", work / kind / name))
    train(code["then"], work, jobs["then"])
    train(code["now"], work, jobs["now"])
    train(code["then"], work, jobs["half"])
    shutil.copytree(work / "half", work / "resumed")
    train(code["now"], work, jobs["resumed"])

    failed = 0
    for name in names:
        then = read(work / "then" / name)
        found = difference(then, read(work / "now" / name)), difference(then, read(work / "resumed" / name))
        losses = [json.loads(line) for line in (work / "then" / name / "metrics.jsonl").open(encoding="utf-8")]
        last = next((line["loss"] for line in reversed(losses) if line.get("loss") is not None), math.nan)
        failed += any(found)
        says = ["equal" if not text else f"DIFFERS: {text}" for text in found]
        print(f"{name:20} {then['result']['status']:12} last loss {last:.4f}  trained {says[0]}, resumed {says[1]}")
    print(f"{len(names) - failed} of {len(names)} are equal to {options.revision}")
    if not options.keep:
        shutil.rmtree(work)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
