"""gptlab bench inference"""

import argparse
import sys
from typing import Any

from gptlab.cli.common import Parser, add_verb, output_file, wide_console, write_json
from gptlab.progress import Progress


def add_to(verbs: Any) -> None:
    v = add_verb(verbs, "bench", None, "Measure the speed of a model.")
    parts = v.add_subparsers(dest="part", required=True, metavar="inference", parser_class=Parser)
    help = "Time prefill and greedy decoding, not compiled, for several precision regimes and batch sizes."
    v = add_verb(parts, "inference", do_bench_inference, help, settings=True)
    help = "a recipe (random weights) or a run directory (default: gpt2-124m-openwebtext)"
    v.add_argument("name", nargs="?", metavar="RECIPE|RUN", help=help)
    v.add_argument("--regimes", nargs="+", metavar="NAME", help="default: fp32 tf32 amp_bf16 bf16_pure")
    v.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8], metavar="N", help="sequences (default: 1 8)")
    v.add_argument("--prompt-tokens", type=int, metavar="N", help="default: half of the context, at most 256")
    v.add_argument("--new-tokens", type=int, metavar="N", help="default: a quarter of the context, at most 64")
    v.add_argument("--repeats", type=int, default=5, metavar="N", help="timed generations (default: 5)")
    v.add_argument("--json", type=output_file, metavar="FILE", help="also write the report to this file")


def do_bench_inference(options: argparse.Namespace) -> None:
    with Progress("loading PyTorch"):
        from gptlab.bench.inference import DEFAULT_RECIPE, DEFAULT_REGIMES, bench_inference, render

    def progress(text: str) -> None:  # a spinner's thread would run while a generation is timed
        if sys.stderr.isatty():
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)

    report = bench_inference(
        options.name or DEFAULT_RECIPE,
        options.overrides,
        options.regimes or DEFAULT_REGIMES,
        options.batch_sizes,
        options.prompt_tokens,
        options.new_tokens,
        options.repeats,
        progress,
    )
    progress("")
    try:
        if options.json:
            write_json(options.json, report)
    finally:
        wide_console(200).print(render(report))
