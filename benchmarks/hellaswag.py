"""HellaSwag rows per second: gptlab's batches against one row of four padded endings at a time, as in build-nanogpt.

Both sides take turns with the same model (random weights, GPT-2 124M's shape) and the same rows in GPT-2's tokens,
evenly spread over the file. Their summed losses must agree. `bf16` means autocast; on a processor without bf16
instructions its speed is not meaningful.

    python benchmarks/hellaswag.py hellaswag_val.jsonl --rows 48
    python benchmarks/hellaswag.py hellaswag_val.jsonl --rows 2000 --device cuda --dtypes fp32 bf16
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import in_turn, machine, ratios, say, show, spread, table, write_json

from gptlab.config import Model
from gptlab.data.tokenizers import load_tokenizer
from gptlab.evals.hellaswag import Row, encode_rows, evaluate_hellaswag, load_rows
from gptlab.model.gpt import GPT, build_model

Context = Callable[[], AbstractContextManager[object]]


@torch.no_grad()
def one_row_at_a_time(model: GPT, rows: list[list[torch.Tensor]], device: torch.device, context: Context) -> np.ndarray:
    """Summed losses (n, 4) of n rows, each a context and four endings."""
    losses = []
    for before, *endings in rows:
        width = len(before) + max(map(len, endings))
        tokens = torch.zeros(4, width, dtype=torch.long)
        mask = torch.zeros(4, width)
        for i, ending in enumerate(endings):
            tokens[i, : len(before) + len(ending)] = torch.cat((before, ending))
            mask[i, len(before) : len(before) + len(ending)] = 1
        tokens, mask = tokens.to(device), mask.to(device)
        with context():
            logits = model(tokens)  # (4, T, V)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        losses.append((loss.view(4, -1) * mask[:, 1:]).sum(dim=1).cpu())
    return torch.stack(losses).double().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="hellaswag_val.jsonl")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences of 1,024 tokens per pass (default: 4)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", choices=["fp32", "bf16"], default=["fp32"])
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()

    before, device = machine(), torch.device(args.device)
    config = Model(n_layer=args.layers, n_embd=args.width, n_head=args.width // 64, block_size=1024, vocab_size=50304)
    model = build_model(config, device, init=1).eval()
    tokenizer = load_tokenizer({"kind": "gpt2"})
    every = load_rows(args.file)
    rows: list[Row] = every[:: max(1, len(every) // args.rows)][: args.rows]
    encoded = encode_rows(rows, tokenizer, config.block_size)
    texts = [[row.ctx, *(" " + ending for ending in row.endings)] for row in rows]
    pieces = [[torch.tensor(tokenizer.encode(text)) for text in row] for row in texts]

    def context(dtype: str) -> AbstractContextManager[object]:
        return torch.autocast(device.type, torch.bfloat16) if dtype == "bf16" else contextlib.nullcontext()

    def score(name: str) -> tuple[float, np.ndarray]:
        how, dtype = name.split()
        began = time.perf_counter()
        if how == "one_row":
            losses = one_row_at_a_time(model, pieces, device, lambda: context(dtype))
        else:
            result = evaluate_hellaswag(model, encoded, device, lambda: context(dtype), args.micro_batch)
            losses = result.losses
        return time.perf_counter() - began, losses

    names = [f"{how} {dtype}" for dtype in args.dtypes for how in ("one_row", "gptlab")]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    losses: dict[str, np.ndarray] = {}
    for i, name in enumerate([*names, *in_turn(names, args.rounds)]):  # the first pass of each side warms up
        taken, losses[name] = score(name)
        if i >= len(names):
            seconds[name].append(taken)
            say(f"{name}: {len(rows) / taken:.2f} rows/s")

    shown = [("", "rows/s"), *((name, show(spread([len(rows) / s for s in seconds[name]]), ".2f")) for name in names)]
    gains, wrong = {}, 0
    for dtype in args.dtypes:
        gains[dtype] = ratios(seconds[f"one_row {dtype}"], seconds[f"gptlab {dtype}"])
        off = np.abs(losses[f"gptlab {dtype}"] / losses[f"one_row {dtype}"] - 1).max()
        wrong += off > (1e-5 if dtype == "fp32" else 1e-2)
        shown.append((f"gptlab / one_row, {dtype}", f"{show(gains[dtype], '.2f')}; losses differ by {off:.0e} at most"))
    if len(args.dtypes) == 2:
        gains["bf16 against one_row fp32"] = ratios(seconds["one_row fp32"], seconds["gptlab bf16"])
        shown.append(("gptlab bf16 / one_row fp32", show(gains["bf16 against one_row fp32"], ".2f")))
    write_json(
        args.json,
        {
            "machine": before,
            "rows": len(rows),
            "layers": args.layers,
            "width": args.width,
            "device": args.device,
            "threads": torch.get_num_threads(),
            "micro_batch": args.micro_batch,
            "seconds": seconds,
            "gains": gains,
        },
    )
    table(shown)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
