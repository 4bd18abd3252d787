"""HellaSwag rows per second, and generation: prefill and decoding.

HellaSwag: gptlab's batches against one row of four padded endings at a time, as in build-nanogpt. Both sides take turns
with the same model (random weights, GPT-2 124M's shape), and their losses must agree. The rows are those of
--hellaswag, or synthetic rows of similar lengths, whose accuracy is meaningless.
"""

from __future__ import annotations

import contextlib
import random
import time
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from common import in_turn, ratios, show, spread
from hellaswag import one_row_at_a_time
from torch import Tensor

from gptlab.bench.inference import bench_inference
from gptlab.config import Model, build_recipe
from gptlab.data.tokenizers import load_tokenizer
from gptlab.evals import hellaswag
from gptlab.model.generate import generate
from gptlab.model.gpt import build_model
from gptlab.rundir import RunDir
from gpu_stages.stage import Row, Stage, pick, run

SHAPE: dict[str, Any] = {"n_layer": 12, "n_embd": 768, "n_head": 12, "block_size": 1024, "vocab_size": 50304}
TINY_SHAPE: dict[str, Any] = {"n_layer": 2, "n_embd": 32, "n_head": 2, "block_size": 256, "vocab_size": 512}
WORDS = "the a cat man woman dog runs walks into over house water then while and slowly takes ball picks up shows"
# Largest allowed relative difference of the summed losses. The epsilon of bf16 is 2^-8.
AGREE = {"fp32": 1e-4, "bf16": 2e-2}


def rows_of(stage: Stage, number: int) -> tuple[list[hellaswag.Row], bool]:
    """Rows evenly spread over the file, or synthetic rows; and whether they are real."""
    if stage.hellaswag:
        every = hellaswag.load_rows(stage.hellaswag)
        return every[:: max(1, len(every) // number)][:number], True
    draw, shorter = random.Random(0), 4 if stage.tiny else 1  # a word has several byte tokens

    def text(least: int, most: int) -> str:
        return " ".join(draw.choices(WORDS.split(), k=draw.randint(least // shorter, most // shorter)))

    made = [hellaswag.Row(i, text(20, 70), tuple(text(8, 30) for _ in range(4)), 0) for i in range(number)]  # type: ignore[arg-type]
    return made, False


def score(stage: Stage, device: torch.device, dtype: str) -> Row:
    config = Model(**(TINY_SHAPE if stage.tiny else SHAPE))
    number, micro = (8, 4) if stage.tiny else (200, 32)
    model = build_model(config, device, init=1).eval()
    rows, real = rows_of(stage, number)
    kind = "byte" if stage.tiny else "gpt2"
    try:
        tokenizer = load_tokenizer({"kind": kind})
    except Exception:
        tokenizer = load_tokenizer({"kind": "byte"})
        kind = "byte"
    encoded = hellaswag.encode_rows(rows, tokenizer, config.block_size)
    texts = [[row.ctx, *(" " + ending for ending in row.endings)] for row in rows]
    pieces = [[torch.tensor(tokenizer.encode(text)) for text in row] for row in texts]

    def context() -> AbstractContextManager[object]:
        return torch.autocast(device.type, torch.bfloat16) if dtype == "bf16" else contextlib.nullcontext()

    def one(how: str) -> tuple[float, Any]:
        began = time.perf_counter()
        if how == "a row at a time":
            losses = one_row_at_a_time(model, pieces, device, context)
        else:
            result = hellaswag.evaluate_hellaswag(model, encoded, device, context, micro)
            losses = result.losses
        return time.perf_counter() - began, losses

    names = ["a row at a time", "gptlab"]
    losses = {name: one(name)[1] for name in names}  # warms up
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in in_turn(names, 2 if stage.tiny else 3):
        seconds[name].append(one(name)[0])
    off = float(np.abs(losses["gptlab"] / losses["a row at a time"] - 1).max())
    gain = ratios(seconds["a row at a time"], seconds["gptlab"])
    speed = spread([len(rows) / s for s in seconds["gptlab"]])
    if not off <= AGREE[dtype]:
        raise RuntimeError(f"losses differ by {off:.1e}, more than {AGREE[dtype]:.0e}")
    made = "" if real else " (synthetic rows)"
    return {
        "rows": len(rows),
        "real_rows": real,
        "tokenizer": kind,
        "micro_batch": micro,
        "seconds": seconds,
        "rows_per_second": speed,
        "faster_by": gain,
        "losses_differ_by": off,
        "says": f"{show(speed, ',.0f')} rows/s{made}, {show(gain, '.2f')} times as fast as a row at a time",
    }


def generation(stage: Stage, regime: str, batches: list[int]) -> Row:
    shape = {f"model.{key}": value for key, value in (TINY_SHAPE if stage.tiny else SHAPE).items()}
    run = RunDir(stage.work / "generation")
    run.path.mkdir(parents=True, exist_ok=True)
    recipe = build_recipe({"name": "generation", "train.max_steps": 1, "batch.tokens_per_step": 1024, **shape})
    run.write_recipe(recipe)
    lengths = (16, 8) if stage.tiny else (256, 64)
    report = bench_inference(str(run.recipe_file), {}, [regime], batches, *lengths, repeats=2 if stage.tiny else 4)
    told = [
        f"{row['batch_size']} x: decode {row['decode_tokens_per_second']:,.0f}, prefill "
        f"{row['prefill_tokens_per_second']:,.0f}"
        if row["status"] == "completed"
        else row["reason"]
        for row in report["rows"]
    ]
    return report | {"says": "tokens/s " + "; ".join(told)}


def compiled_decoding(stage: Stage, device: torch.device, batch: int) -> Row:
    """Decoding with the reading of one token compiled against not compiled, in turns: bf16, the same ids."""
    config = Model(**(TINY_SHAPE if stage.tiny else SHAPE))
    prompt_tokens, new_tokens = (16, 4) if stage.tiny else (256, 64)
    model = build_model(config, device, torch.bfloat16, init=1)
    draw = torch.Generator().manual_seed(0)
    prompt = torch.randint(config.vocab_size, (batch, prompt_tokens), generator=draw)

    def one(on: bool) -> tuple[float, list[Tensor]]:
        """Seconds a token without the first, and the ids."""
        ids, began = [], 0.0
        for token in generate(model, prompt, new_tokens, temperature=0.0, compiled=on):
            ids.append(token)
            began = began or time.perf_counter()
        return (time.perf_counter() - began) / (new_tokens - 1), ids

    began = time.perf_counter()
    _, compiled = one(True)
    first = time.perf_counter() - began
    _, plain = one(False)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for on in in_turn([False, True], 2 if stage.tiny else 5):
        seconds[on].append(one(on)[0])
    gain = ratios(seconds[False], seconds[True])
    speed = spread([batch / s for s in seconds[True]])
    same = sum(int((a == b).sum()) for a, b in zip(compiled, plain, strict=True)) / (batch * new_tokens)
    return {
        "batch_size": batch,
        "seconds_a_token": {"plain": seconds[False], "compiled": seconds[True]},
        "first_seconds": first,
        "compiled_is_faster_by": gain,
        "same_ids": same,
        "says": f"{show(gain, '.2f')} times as fast, {show(speed, ',.0f')} tokens/s, the first text in {first:.0f} s; "
        f"{100 * same:.0f}% of the ids are the same",
    }


def main(stage: Stage) -> None:
    device = pick(stage)
    batches = [1, 4] if stage.tiny else [1, 8, 64]
    stage.all(
        {
            "hellaswag bf16": lambda: score(stage, device, "bf16"),
            "generation bf16_pure": lambda: generation(stage, "bf16_pure", batches),
            "compiled decoding, 1": lambda: compiled_decoding(stage, device, 1),
            f"compiled decoding, {batches[-1]}": lambda: compiled_decoding(stage, device, batches[-1]),
            "hellaswag fp32": lambda: score(stage, device, "fp32"),
            "generation fp32": lambda: generation(stage, "fp32", batches),
            "generation amp_bf16": lambda: generation(stage, "amp_bf16", batches),
        },
        expects=5.0,
        most=45.0,
    )


if __name__ == "__main__":
    run(main)
