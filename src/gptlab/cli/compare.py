"""gptlab compare"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptlab.cli.common import add_verb, named, wide_console
from gptlab.errors import DataError, RunError, UserError
from gptlab.files import printable

MOST_RUNS, BEGINNINGS = 8, 2  # side by side; prompts from the validation split
LONGEST = 100  # characters of the name of a folder of plots, before a hash


def add_to(verbs: Any) -> None:
    help = (
        "Compare runs: settings, results, curves, answers to the same prompts, and whether the models differ on the "
        "same validation text (--eval.tokens N takes more of it)."
    )
    v = add_verb(verbs, "compare", do_compare, help, settings=True)
    v.add_argument("folders", type=named, nargs="+", metavar="RUN", help="run directories; the first is the reference")
    v.add_argument("--checkpoint", default="last", metavar="last|best|STEP", help="of each run (default: last)")
    v.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times (default: some)")
    v.add_argument("--max-tokens", type=int, default=48, metavar="N", help="tokens of an answer (default: 48)")
    v.add_argument("--out", type=named, metavar="DIR", help="folder of the curves (default: plots/A-and-B)")


def do_compare(options: argparse.Namespace) -> None:
    from gptlab.report.comparing import differing_settings, results_beside
    from gptlab.report.listing import read_run, runs_in
    from gptlab.report.plots import draw
    from gptlab.report.reading import short_names

    runs = runs_in(options.folders)
    if not 2 <= len(runs) <= MOST_RUNS:
        raise UserError(f"{len(runs)} runs are named: `gptlab compare` takes 2 to {MOST_RUNS}")
    labels, console = [chr(ord("A") + i) for i in range(len(runs))], wide_console(160)
    for label, run in zip(labels, runs, strict=True):
        _say(console, f"{label}  {run.path}", soft_wrap=True)
    settings = [(name, [_written(value) for value in values]) for name, values in differing_settings(runs)]
    _table(console, "Differing settings", labels, settings, "no setting differs")
    rows = [read_run(run.path)[0] for run in runs]
    _table(console, "Results", labels, results_beside(runs, rows), "no run has a result")

    names = [name.replace("/", "-") for name in short_names([run.path for run in runs])]
    together = "-and-".join(names)
    if len(together) > LONGEST:
        together = f"{together[:LONGEST]}-{hashlib.sha256(together.encode()).hexdigest()[:8]}"
    out = options.out or Path("plots") / together
    drawn = draw(runs, out)
    says = f"\ncurves: {len(drawn)} plots in {out}" if drawn else "\ncurves: no run has logged any"
    _say(console, says, soft_wrap=True)
    _models(console, options, runs, labels)


def _models(console: Any, options: argparse.Namespace, runs: Sequence[Any], labels: Sequence[str]) -> None:
    """Whether the models differ, and what they answer; each is loaded once, one after another."""
    from gptlab.report.comparing import NOT_THE_METHODS, models_differ
    from gptlab.training.load import load_run
    from gptlab.training.windows import shared_windows, window_losses

    windows = None
    try:
        windows = shared_windows(runs, options.overrides)
        why = ""
    except (RunError, DataError) as error:  # the rest of the comparison stands
        why = f"Whether the models differ is not measured: {error}."
    recipes = [run.read_recipe() for run in runs]
    prompts = options.prompt or [*dict.fromkeys(recipe.sample.prompt for recipe in recipes if recipe.sample.prompt)]
    if windows is not None and not options.prompt:
        prompts += windows.beginnings(BEGINNINGS)
    drawing = recipes[0].sample.model_dump(include={"temperature", "top_k", "top_p", "seed"})
    losses, answers = [], []
    for label, run in zip(labels, runs, strict=True):
        if sys.stderr.isatty():
            print(f"\r\x1b[Kmeasuring {label} ...", end="", file=sys.stderr, flush=True)
        try:
            trained = load_run(run.path, options.checkpoint)
        except RunError as error:
            _clear()
            _say(console, f"\nThe models are not compared: {error}.")
            return
        if windows is not None:
            losses.append(window_losses(trained, windows))
        if trained.recipe.task == "lm":
            answers.append([_answer(trained, prompt, options.max_tokens, drawing) for prompt in prompts])
        else:
            answers.append(["(a classifier generates no text)"] * len(prompts))
    _clear()
    _title(console, "Models")
    if windows is None:
        _say(console, why)
    else:
        for label, one in zip(labels[1:], losses[1:], strict=True):
            pair = (losses[0], one)
            for sentence in models_differ((labels[0], label), pair, windows.documents, windows.length):
                _say(console, sentence)
        _say(console, NOT_THE_METHODS)
    how = "greedy" if not drawing["temperature"] else f"temperature {drawing['temperature']:g}, seed {drawing['seed']}"
    for i, prompt in enumerate(prompts):
        _table(console, f"Prompt {prompt!r}, {how}", labels, [("", [answer[i] for answer in answers])], "")


def _answer(trained: Any, prompt: str, max_tokens: int, drawing: dict[str, Any]) -> str:
    """What follows a prompt; why there is no answer where the tokenizer cannot read it."""
    try:
        text: str = trained.sample(prompt, max_tokens=max_tokens, **drawing)[0]
        return text.removeprefix(prompt)
    except UserError as error:
        return f"(none: {error})"


def _clear() -> None:
    """Take the line of progress away."""
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _say(console: Any, text: str, soft_wrap: bool = False) -> None:
    console.print(printable(text), markup=False, highlight=False, soft_wrap=soft_wrap)


def _title(console: Any, text: str) -> None:
    from rich.text import Text

    console.print(Text(f"\n{printable(text)}", style="bold"))


def _table(console: Any, title: str, labels: Sequence[str], rows: Sequence[tuple[str, list[str]]], none: str) -> None:
    from rich.table import Table
    from rich.text import Text

    _title(console, title)
    if not rows:
        _say(console, none)
        return
    named = any(name for name, _ in rows)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for header in ([""] if named else []) + list(labels):
        table.add_column(header, overflow="fold", ratio=None if named else 1)
    for name, texts in rows:
        table.add_row(*([Text(name)] if named else []), *(Text(printable(text)) for text in texts))
    console.print(table)


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
