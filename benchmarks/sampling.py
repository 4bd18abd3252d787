"""Generation with a cache of keys and values against computing the whole context again for every token.

`generate` writes --tokens tokens after a short prompt, with random weights of GPT-2 124M's shape, both ways in turns.
Decoding is greedy, and both ways must give the same ids.

    python benchmarks/sampling.py --rounds 3
    python benchmarks/sampling.py --layers 2 --tokens 32
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from common import machine, ratios, say, show, spread, table, write_json

from gptlab.config import Model
from gptlab.model.generate import generate
from gptlab.model.gpt import build_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=16, help="tokens in the prompt")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--block", type=int, default=1024)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()

    before = machine()
    model = build_model(Model(n_layer=args.layers, block_size=args.block, vocab_size=50304), init=1)
    with torch.no_grad():  # a tied head with random weights would repeat one token; shift the embedding to get a text
        model.wte.weight.copy_(model.wte.weight.roll(1, 0) + 0.02 * torch.randn(model.wte.weight.shape))
    prompt = torch.randint(50257, (1, args.prompt), generator=torch.Generator().manual_seed(0))

    def write(use_cache: bool) -> tuple[float, list[int]]:
        began = time.perf_counter()
        ids = [int(i) for i in generate(model, prompt, args.tokens, temperature=0, n_ids=50257, use_cache=use_cache)]
        return time.perf_counter() - began, ids

    write(True)  # warm up
    seconds: dict[str, list[float]] = {"recomputed": [], "cached": []}
    texts: dict[str, list[int]] = {}
    for round in range(args.rounds):
        for name in seconds:
            taken, texts[name] = write(name == "cached")
            seconds[name].append(taken)
        say(f"round {round + 1}/{args.rounds}: " + "  ".join(f"{k} {v[-1]:.2f} s" for k, v in seconds.items()))

    ratio = ratios(seconds["recomputed"], seconds["cached"])
    equal = texts["cached"] == texts["recomputed"]
    distinct = len(set(texts["cached"]))
    write_json(
        args.json,
        {
            "machine": before,
            "threads": torch.get_num_threads(),
            "tokens": args.tokens,
            "prompt": args.prompt,
            "layers": args.layers,
            "seconds": seconds,
            "recomputed / cached": ratio,
            "equal": equal,
            "distinct": distinct,
        },
    )
    table(
        [
            (f"{args.tokens} tokens", "seconds", "tokens/s"),
            *(
                (name, show(spread(s), ".2f"), f"{args.tokens / spread(s)['median']:.1f}")
                for name, s in seconds.items()
            ),
            ("recomputed / cached", show(ratio, ".2f"), ""),
        ]
    )
    print(f"greedy ids equal: {'yes' if equal else 'NO'} ({distinct} distinct)")
    sys.exit(not equal)


if __name__ == "__main__":
    main()
