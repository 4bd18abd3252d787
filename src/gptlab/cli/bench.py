"""gptlab bench step, data, inference, scaling, coords"""

import argparse
import sys
from pathlib import Path
from typing import Any

from gptlab.cli.common import Parser, add_json, add_verb, json_too, named, wide_console
from gptlab.progress import Progress


def add_to(verbs: Any) -> None:
    v = add_verb(
        verbs, "bench", None, "Measure the speed of training, of its data, or of generation; check a parametrization."
    )
    kinds = "step|data|inference|scaling|coords"
    parts = v.add_subparsers(dest="part", required=True, metavar=kinds, parser_class=Parser)
    help = "Time the optimizer steps of a recipe, part by part, beside other trainers."
    v = add_verb(parts, "step", do_bench_step, help, settings=True)
    v.add_argument("name", metavar="RECIPE", help="where its data is not prepared: on random tokens")
    help = "peers of the same shape, dtype and weights: hf (transformers' GPT-2), nanogpt-loop (a plain loop in the "
    help += "style of nanoGPT), litgpt (models with RoPE)"
    v.add_argument("--vs", nargs="+", default=[], choices=["hf", "nanogpt-loop", "litgpt"], metavar="PEER", help=help)
    v.add_argument("--profile", action="store_true", help="also name the operations that take most of a step")
    v.add_argument("--rounds", type=int, default=10, metavar="N", help="timed steps of each (default: 10)")
    add_json(v)
    help = "Time the making of a recipe's batches, beside the steps that need them."
    v = add_verb(parts, "data", do_bench_data, help, settings=True)
    v.add_argument("name", nargs="?", metavar="RECIPE", help="default: gpt2-124m-openwebtext")
    v.add_argument("--rounds", type=int, default=10, metavar="N", help="timed steps (default: 10)")
    add_json(v)
    help = "Time prefill and decoding, not compiled, for several precision regimes and batch sizes."
    v = add_verb(parts, "inference", do_bench_inference, help, settings=True)
    help = "a recipe (random weights) or a run directory (default: gpt2-124m-openwebtext)"
    v.add_argument("name", nargs="?", metavar="RECIPE|RUN", help=help)
    v.add_argument("--regimes", nargs="+", metavar="NAME", help="default: fp32 tf32 amp_bf16 bf16_pure")
    v.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8], metavar="N", help="sequences (default: 1 8)")
    v.add_argument("--prompt-tokens", type=int, metavar="N", help="default: half of the context, at most 256")
    v.add_argument("--new-tokens", type=int, metavar="N", help="default: a quarter of the context, at most 64")
    v.add_argument("--repeats", type=int, default=5, metavar="N", help="timed generations (default: 5)")
    help = "draw tokens by the settings sample.temperature, top_k and top_p (default: greedy)"
    v.add_argument("--sample", action="store_true", help=help)
    help = "transformers' `generate` with the same weights, in turn"
    v.add_argument("--vs", nargs="+", default=[], choices=["hf"], metavar="PEER", help=help)
    add_json(v)
    help = "Measure how the cost of data, metrics and reports grows: flat, linear, or worse."
    v = add_verb(parts, "scaling", do_bench_scaling, help, settings=True)
    v.add_argument("name", nargs="?", metavar="RECIPE", help="default: gpt2-124m-openwebtext")
    add_json(v)
    help = "Coordinate check: whether activations change as much in a step at every width, or depth."
    v = add_verb(parts, "coords", do_bench_coords, help, settings=True)
    v.add_argument("name", metavar="RECIPE", help="its learning rate and shape; its data is not needed")
    sizes = v.add_mutually_exclusive_group()
    sizes.add_argument("--widths", nargs="+", type=int, metavar="N", help="n_embd (default: 64 128 256 512)")
    sizes.add_argument("--depths", nargs="+", type=int, metavar="N", help="n_layer, at the recipe's width")
    v.add_argument("--steps", type=int, default=5, metavar="N", help="optimizer steps (default: 5)")
    v.add_argument("--seeds", type=int, default=3, metavar="N", help="averaged (default: 3)")
    names = ["standard", "mup", "completep"]
    help = "default: standard, and the recipe's or mup"
    v.add_argument("--parametrization", nargs="+", choices=names, metavar="NAME", help=help)
    v.add_argument("--out", type=named, metavar="DIR", help="also draw coords.png there")
    add_json(v)


def progress(text: str) -> None:
    """A line that is written over: a spinner's thread would run while something is timed."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def finish(report: dict[str, Any], table: Any, file: Path | None, width: int = 200) -> None:
    """Print a report's table in the place of the last line of progress, and write the report for --json."""
    progress("")
    with json_too(file) as tell:
        tell(report)
        wide_console(width).print(table)


def do_bench_step(options: argparse.Namespace) -> None:
    with Progress("loading PyTorch"):
        from gptlab.bench.step import bench_step, render

    report = bench_step(options.name, options.overrides, options.vs, options.rounds, options.profile, progress)
    finish(report, render(report), options.json, width=160)


def do_bench_data(options: argparse.Namespace) -> None:
    with Progress("loading PyTorch"):
        from gptlab.bench.inference import DEFAULT_RECIPE
        from gptlab.bench.step import bench_data, render_data

    report = bench_data(options.name or DEFAULT_RECIPE, options.overrides, options.rounds, progress)
    finish(report, render_data(report), options.json)


def do_bench_inference(options: argparse.Namespace) -> None:
    with Progress("loading PyTorch"):
        from gptlab.bench.inference import DEFAULT_RECIPE, DEFAULT_REGIMES, bench_inference, render

    report = bench_inference(
        options.name or DEFAULT_RECIPE,
        options.overrides,
        options.regimes or DEFAULT_REGIMES,
        options.batch_sizes,
        options.prompt_tokens,
        options.new_tokens,
        options.repeats,
        progress,
        options.vs,
        options.sample,
    )
    finish(report, render(report), options.json)


def do_bench_scaling(options: argparse.Namespace) -> None:
    with Progress("loading PyTorch"):
        from gptlab.bench.inference import DEFAULT_RECIPE
        from gptlab.bench.scaling import bench_scaling, render

    report = bench_scaling(options.name or DEFAULT_RECIPE, options.overrides, progress)
    finish(report, render(report), options.json, width=160)


def do_bench_coords(options: argparse.Namespace) -> None:
    with Progress("loading PyTorch"):
        from gptlab.bench.coords import WIDTHS, bench_coords, render, write_figure

    report = bench_coords(
        options.name,
        options.overrides,
        options.depths or options.widths or WIDTHS,
        bool(options.depths),
        options.steps,
        options.parametrization,
        options.seeds,
        progress,
    )
    finish(report, render(report), options.json, width=120)
    if options.out:
        print(f"picture: {write_figure(report, options.out)}", file=sys.stderr)
