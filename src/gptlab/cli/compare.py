"""gptlab compare"""

import argparse
import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gptlab.cli.common import add_json, add_verb, json_too, named, wide_console
from gptlab.errors import DataError, RunError, UserError
from gptlab.files import printable
from gptlab.progress import Progress

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
    add_json(v)


def do_compare(options: argparse.Namespace) -> None:
    with json_too(options.json) as tell:
        tell(_compare(options))


def _compare(options: argparse.Namespace) -> dict[str, Any]:
    """Print the comparison; returns it as plain data."""
    with Progress("reading the runs") as shown:
        from gptlab.report.comparing import differing_settings, results_beside
        from gptlab.report.listing import read_run, runs_in
        from gptlab.report.plots import draw
        from gptlab.report.reading import short_names

        runs = runs_in(options.folders)
        if not 2 <= len(runs) <= MOST_RUNS:
            raise UserError(
                f"`gptlab compare` takes 2 to {MOST_RUNS} runs; named {'is' if len(runs) == 1 else 'are'} {len(runs)}"
            )
        differing = differing_settings(runs)
        settings = [(name, [_written(value) for value in values]) for name, values in differing]
        rows = [read_run(run.path)[0] for run in shown.each("reading the runs", runs, len(runs))]
        results = results_beside(runs, rows)
    labels, console = [chr(ord("A") + i) for i in range(len(runs))], wide_console(160)
    for label, run in zip(labels, runs, strict=True):
        _say(console, f"{label}  {run.path}", soft_wrap=True)
    _table(console, "Differing settings", labels, settings, "no setting differs")
    _table(console, "Results", labels, results, "no run has a result")

    names = [name.replace("/", "-") for name in short_names([run.path for run in runs])]
    together = "-and-".join(names)
    if len(together) > LONGEST:
        together = f"{together[:LONGEST]}-{hashlib.sha256(together.encode()).hexdigest()[:8]}"
    out = options.out or Path("plots") / together
    with Progress("reading the runs") as shown:
        drawn = draw(runs, out, shown.tell)
    says = f"\ncurves: {len(drawn)} plots in {out}" if drawn else "\ncurves: no run has logged any"
    _say(console, says, soft_wrap=True)
    return {
        "runs": [{"label": label, **row.to_json()} for label, row in zip(labels, rows, strict=True)],
        "settings": [{"name": name, "values": values} for name, values in differing],
        "plots": [str(file) for file in drawn],
        **_models(console, options, runs, labels),
    }


def _models(console: Any, options: argparse.Namespace, runs: Sequence[Any], labels: Sequence[str]) -> dict[str, Any]:
    """Whether the models differ, and what they answer; each is loaded once, one after another."""
    with Progress("loading PyTorch"):
        from gptlab.report.comparing import NOT_THE_METHODS, differ_data, models_differ
        from gptlab.training.load import load_run
        from gptlab.training.windows import SharedWindows, shared_windows, window_losses

    pairs: dict[int, SharedWindows] = {}  # of the first run and another
    says: list[str] = []
    found: list[dict[str, Any]] = []
    for i in range(1, len(runs)):
        try:
            pairs[i] = shared_windows([runs[0], runs[i]], options.overrides)
        except (RunError, DataError) as error:  # the rest of the comparison stands
            says.append(f"Whether the models {labels[0]} and {labels[i]} differ is not measured: {error}.")
    recipes = [run.read_recipe() for run in runs]
    prompts = options.prompt or [*dict.fromkeys(recipe.sample.prompt for recipe in recipes if recipe.sample.prompt)]
    if pairs and not options.prompt:
        prompts += next(iter(pairs.values())).beginnings(BEGINNINGS)
    drawing = recipes[0].sample.model_dump(include={"temperature", "top_k", "top_p", "seed"})
    reference: dict[int, Any] = {}  # the first run's losses, by the length of a window
    answers = []
    fault: RunError | None = None
    with Progress("opening A") as shown:
        for i, run in enumerate(runs):
            shown.tell(f"opening {labels[i]}")
            try:
                trained = load_run(run.path, options.checkpoint)
            except RunError as error:
                fault = error
                break
            tell = partial(shown.tell, f"measuring {labels[i]}")
            if i == 0:
                by_length = {windows.length: windows for windows in pairs.values()}
                reference = {length: window_losses(trained, windows, tell) for length, windows in by_length.items()}
            elif windows := pairs.get(i):
                losses = reference[windows.length], window_losses(trained, windows, tell)
                names = labels[0], labels[i]
                says += models_differ(names, losses, windows.documents, windows.length, len(pairs))
                found.append(differ_data(names, losses, windows.documents, len(pairs)))
            asked = shown.each(f"asking {labels[i]}", prompts, len(prompts))
            if trained.recipe.task == "lm":
                answers.append([_answer(trained, prompt, options.max_tokens, drawing) for prompt in asked])
            else:
                answers.append(["(a classifier generates no text)"] * len(prompts))
            del trained  # the next model takes its memory
    if fault is not None:
        says = [f"The models are not compared: {fault}."]
        _say(console, f"\n{says[0]}")
        return {"comparisons": [], "text": says, "prompts": []}
    _title(console, "Models")
    says += [NOT_THE_METHODS] if pairs else []
    for sentence in says:
        _say(console, sentence)
    how = "greedy" if not drawing["temperature"] else f"temperature {drawing['temperature']:g}, seed {drawing['seed']}"
    for i, prompt in enumerate(prompts):
        _table(console, f"Prompt {prompt!r}, {how}", labels, [("", [answer[i] for answer in answers])], "")
    told = [{"prompt": prompt, "answers": [of[i] for of in answers]} for i, prompt in enumerate(prompts)]
    return {"comparisons": found, "text": says, "prompts": told}


def _answer(trained: Any, prompt: str, max_tokens: int, drawing: dict[str, Any]) -> str:
    """What follows a prompt; why there is no answer where the tokenizer cannot read it."""
    try:
        text: str = trained.sample(prompt, max_tokens=max_tokens, **drawing)[0]
        return text.removeprefix(prompt)
    except UserError as error:
        return f"(none: {error})"


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
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0), expand=not named)
    if named:
        table.add_column("", no_wrap=True)
    for label in labels:
        table.add_column(label, overflow="fold", ratio=None if named else 1)
    for name, texts in rows:
        table.add_row(*([Text(name)] if named else []), *(Text(printable(text)) for text in texts))
    console.print(table)


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
