"""The classic 124M for some minutes on one GPU: tokens a second, MFU, memory, the loss, and HellaSwag's rows a second.

    gptlab prepare novels/ --out data/novels-gpt2          # a folder of text files, in GPT-2's tokens
    python benchmarks/minutes.py --data data/novels-gpt2 --hellaswag hellaswag_val.jsonl --minutes 6 --out minutes.json
    python benchmarks/minutes.py --data data/novels-gpt2 --tiny --minutes 0.2      # proves the script, on a CPU too

The recipe is gpt2-124m-fineweb-edu (B = 64, T = 1,024, 524,288 tokens a step, compiled) on the data given. A first
short run measures the step; the second has as many steps as fit into the minutes, 5% of them warm-up, its decay to the
end.
HellaSwag: rows in shapes of their own, many at a time, against one row of four padded endings, in turns.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from common import machine, ratios, say, write_json

from gptlab.config import Recipe, load_recipe

RECIPE = "gpt2-124m-fineweb-edu"
PILOT = 30  # steps, of which the first ten are not timed
ROUNDS, ROWS = 5, 256  # of HellaSwag
TINY = {
    "model.n_layer": 2, "model.n_head": 2, "model.n_embd": 32, "model.block_size": 128, "batch.micro_batch": 4,
    "batch.tokens_per_step": 1024, "train.threads": 1, "precision.regime": "fp32",
}  # fmt: skip


def recipe_of(options: argparse.Namespace, steps: int) -> Recipe:
    """The recipe for so many steps."""
    recipe = load_recipe(RECIPE, {
        "data.path": str(options.data), "train.max_steps": steps, "schedule.warmup_steps": max(1, round(0.05 * steps)),
        "train.eval_every": max(1, steps // 10), "hellaswag.every": 0, "sample.every": 0, "checkpoint.every": 0,
        "checkpoint.keep_best": False, "log.every": 5, **(TINY if options.tiny else {}),
    })  # fmt: skip
    return recipe.replace({"eval.tokens": 65536 if not options.tiny else 1024})


def run(options: argparse.Namespace, steps: int, name: str) -> dict[str, Any]:
    from gptlab.rundir import RunDir
    from gptlab.training.loop import train

    folder = options.work / name
    shutil.rmtree(folder, ignore_errors=True)
    result = train(recipe_of(options, steps), folder, quiet=True)
    lines = RunDir(folder).read_metrics()
    told = {key: [[line["step"], line[key]] for line in lines if key in line] for key in ("loss", "val_loss", "mfu")}
    return {**result.to_json(), **told, "environment": RunDir(folder).read_json("environment.json")}


def hellaswag(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Rows a second of gptlab's evaluation over that of a row at a time, on the trained model, eager."""
    import torch

    from gptlab.evals.hellaswag import encode_rows, evaluate_hellaswag, load_rows
    from gptlab.precision.regimes import enter_regime
    from gptlab.training.load import load_run

    loaded = load_run(folder)
    device, block = loaded.model.device, loaded.recipe.model.block_size
    regime = enter_regime(loaded.recipe.precision, device)
    rows = load_rows(options.hellaswag)[:ROWS]
    encoded = encode_rows(rows, loaded.tokenizer, block)
    singles = [encode_rows([row], loaded.tokenizer, block) for row in rows]
    micro_batch = loaded.recipe.batch.micro_batch
    assert isinstance(micro_batch, int)

    def batched() -> None:
        evaluate_hellaswag(loaded.model, encoded, device, lambda: regime.context(device), micro_batch)

    @torch.no_grad()
    def one_by_one() -> None:
        for single in singles:
            evaluate_hellaswag(loaded.model, single, device, lambda: regime.context(device), 4)

    seconds: dict[str, list[float]] = {"batched": [], "one row": []}
    for round in range(ROUNDS + 1):
        for name, work in (("batched", batched), ("one row", one_by_one)):
            began = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if round:  # the first one warms up
                seconds[name].append(time.perf_counter() - began)
    rate = len(rows) / statistics.median(seconds["batched"])
    return {"rows": len(rows), "rows_per_second": rate, "times_as_fast": ratios(seconds["one row"], seconds["batched"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a dataset in GPT-2's tokens")
    parser.add_argument("--hellaswag", type=Path, help="hellaswag_val.jsonl; without it HellaSwag is left out")
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--work", type=Path, default=Path("runs/minutes"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, for a CPU")
    options = parser.parse_args()
    pilot = run(options, PILOT, "pilot")
    assert pilot["status"] == "completed", pilot.get("reason")
    steps = max(20, int(options.minutes * 60_000 / pilot["time_per_iter_ms"]))
    say(f"{pilot['time_per_iter_ms']:.0f} ms a step: {steps} steps in {options.minutes:g} minutes")
    measured = {"machine": machine(), "pilot": pilot, "run": run(options, steps, "run")}
    write_json(options.out, measured)
    if options.hellaswag:
        measured["hellaswag"] = hellaswag(options, options.work / "run")
        write_json(options.out, measured)
    shown = {
        key: measured["run"].get(key) for key in ("steps", "final_val_loss", "tokens_per_second", "peak_memory_gb")
    }
    mfu = [value for _, value in measured["run"]["mfu"]]
    shown |= {"mfu": statistics.median(mfu) if mfu else None, "hellaswag": measured.get("hellaswag")}
    print(json.dumps(shown, indent=2))


if __name__ == "__main__":
    main()
