"""gptlab eval, gptlab sample"""

import argparse
import itertools
import json
from collections.abc import Iterator
from functools import partial
from typing import Any

from gptlab.cli.common import add_trained_run, add_verb, output_file, write_json
from gptlab.errors import UserError
from gptlab.files import for_terminal
from gptlab.progress import Progress

SCORES = ["loss", "hellaswag", "wikitext", "lambada", "harness"]


MOST_TEXTS = 10_000  # that are drawn together


def add_to(verbs: Any) -> None:
    help = (
        "Score a trained model: loss over the whole validation split, HellaSwag (--hellaswag.path FILE), WikiText "
        "(--eval.wikitext FILE), LAMBADA (--eval.lambada FILE), or tasks of lm-eval (--on harness --tasks NAME)."
    )
    add_trained_run(v := add_verb(verbs, "eval", do_evaluate, help, settings=True))
    v.add_argument("--on", nargs="+", choices=SCORES, default=["loss"], help="what to measure (default: loss)")
    v.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="harness: names of lm-eval's tasks, or files")
    v.add_argument("--out", type=output_file, metavar="FILE.json", help="also write the scores to this file")
    help = (
        "write the loss of each window that the run is evaluated on (--eval.tokens N takes more) to this file, for "
        "`gptlab compare-scores`"
    )
    v.add_argument("--windows", type=output_file, metavar="FILE.jsonl", help=help)

    add_trained_run(v := add_verb(verbs, "sample", do_sample, "Generate text with a trained model."))
    help = "text to continue (default: the recipe's sample.prompt); several: --prompt A --prompt B"
    v.add_argument("--prompt", action="append", metavar="TEXT", help=help)
    v.add_argument("--max-tokens", type=int, metavar="N", help="tokens to generate (default: sample.max_tokens)")
    v.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (default: sample.temperature)")
    v.add_argument("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens (default: sample.top_k)")
    v.add_argument("--top-p", type=float, metavar="P", help="nucleus sampling (default: sample.top_p)")
    v.add_argument("--seed", type=int, metavar="N", help="seed of the generation (default: sample.seed)")
    v.add_argument("--samples", type=int, default=1, metavar="N", help="texts of each prompt (default: 1)")
    v.add_argument("--stop", action="store_true", help="end at end-of-text")


def do_evaluate(options: argparse.Namespace) -> None:
    with Progress(f"opening {options.folder}") as shown:
        from gptlab.training.load import load_run
        from gptlab.training.scoring import evaluate_run

        run = load_run(options.folder, options.checkpoint)
        scores = evaluate_run(run, options.on, options.overrides, options.tasks, shown.tell)
    try:
        if options.out:
            write_json(options.out, scores)
        if options.windows:
            _write_windows(run, options)
    finally:  # what has been measured is shown, whether it can be written or not
        print(json.dumps(scores, indent=2))


def _write_windows(run: Any, options: argparse.Namespace) -> None:
    from gptlab.rundir import RunDir, write_atomically
    from gptlab.training.windows import shared_windows, window_losses

    windows = shared_windows([RunDir(options.folder)], options.overrides)
    with Progress("measuring the windows") as shown:
        losses = window_losses(run, windows, partial(shown.tell, "measuring the windows"))
    options.windows.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.windows, windows.lines(losses))


def do_sample(options: argparse.Namespace) -> None:
    if options.samples < 1:
        raise UserError(f"--samples {options.samples}: must be at least 1")
    if options.samples * max(1, len(options.prompt or [])) > MOST_TEXTS:
        raise UserError(f"--samples {options.samples}: at most {MOST_TEXTS:,} texts are drawn together")
    keys = ("max_tokens", "temperature", "top_k", "top_p", "seed")
    given = {f"sample.{key}": getattr(options, key) for key in keys if getattr(options, key) is not None}
    with Progress(f"opening {options.folder}") as shown:
        from gptlab.tasks.lm import continued, repeated
        from gptlab.training.load import load_run

        run = load_run(options.folder, options.checkpoint)
        run.recipe = run.recipe.replace(given)  # the same bounds as in a recipe
        prompts = repeated(options.prompt or run.recipe.sample.prompt, options.samples)
        if several := len(prompts) > 1:
            drawn = run.ids(options.prompt or run.recipe.sample.prompt, options.samples, options.stop)
            rows = list(shown.each(f"drawing {len(prompts)} texts", drawn, run.recipe.sample.max_tokens))
            ids = [[row[i] for row in rows] for i in range(len(prompts))]
            texts: Iterator[str] = (
                continued(run.tokenizer, prompt, one, options.stop) for prompt, one in zip(prompts, ids, strict=True)
            )
        else:
            shown.tell("reading the prompt")
            pieces = run.stream(prompts[0], stop=options.stop)
            pieces = itertools.chain([next(pieces, "")], pieces)
    if several:
        for text in texts:
            print(for_terminal(text) + "\n" + "-" * 40)
        return
    for piece in pieces:
        print(for_terminal(piece), end="", flush=True)
    print()
