"""What the verbs share: the parser class, flags that several verbs have, and how a table or a JSON file is written."""

import argparse
import contextlib
import errno
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gptlab.config import read_layer, shipped, unknown_setting
from gptlab.errors import UserError
from gptlab.files import because

OTHER_TRAINERS = {
    "steps": "--train.max-steps",
    "max_iters": "--train.max-steps",
    "epochs": "--train.max-epochs",
    "batch_size": "--batch.micro-batch (sequences per forward pass) or --batch.tokens-per-step",
    "learning_rate": "--optim.lr",
}  # flags that users of other trainers type, and what to type here


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UserError instead of exiting."""

    def error(self, message: str) -> Any:
        flag = message.partition("unrecognized arguments: --")[2].partition(" ")[0].partition("=")[0]
        if meant := OTHER_TRAINERS.get(flag.replace("-", "_")):
            raise UserError(f"no flag --{flag}; did you mean {meant}?")
        if " mean " in (says := str(unknown_setting(flag.replace("-", "_")))):  # --lr for --optim.lr
            raise UserError(says)
        raise UserError(f"{message} (`{self.prog} --help` lists the arguments)")


def add_verb(
    verbs: Any, name: str, do: Callable[[Any], int | None] | None, help: str, settings: bool = False, **more: Any
) -> argparse.ArgumentParser:
    """Add a verb: `do(options)` returns its exit status (None: 0); `settings`: it takes --section.key VALUE."""
    added: argparse.ArgumentParser = verbs.add_parser(name, help=help, description=help, **more)
    added.set_defaults(do=do, takes_settings=settings)
    return added


def add_trained_run(parser: argparse.ArgumentParser) -> None:
    """The arguments RUN and --checkpoint, for verbs that load a trained model."""
    parser.add_argument("folder", type=named, metavar="RUN", help="run directory")
    parser.add_argument("--checkpoint", default="last", metavar="last|best|STEP", help="default: last")


def add_reading(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The arguments PATH and how logs are read, see `how_of`."""
    help = "CSV, TSV, JSONL, Parquet or text logs; folders of TensorBoard, W&B, MLflow, the HF Trainer or gptlab"
    parser.add_argument("paths", type=named, nargs="+", metavar="PATH", help=help)
    read = parser.add_argument_group("how the logs are read (guessed where it is plain, and said)")
    read.add_argument("--arm", default="", metavar="COL", help="column or setting that names a run's arm")
    read.add_argument("--seed", default="", metavar="COL", help="column or setting with its seed")
    read.add_argument("--step", default="", metavar="COL", help="column or setting with the step")
    read.add_argument("--metric", default="", metavar="COL", help="what the runs are judged by")
    help = "for text logs: a regular expression with groups step and METRIC, or nanogpt, llm.c, modded-nanogpt ..."
    read.add_argument("--pattern", default="", metavar="P", help=help)
    help = "a regular expression for a run's path: its group arm, or the first, names the arm; group seed the seed"
    read.add_argument("--arm-from", default="", metavar="RE", help=help)
    return read


def how_of(options: argparse.Namespace) -> Any:
    """What the flags of `add_reading` say, for `read_logs`."""
    from gptlab.logs.run import How  # it loads numpy

    return How(options.arm, options.seed, options.step, options.metric, options.pattern, options.arm_from)


def named(text: str) -> Path:
    """The type of an argument that names a file or a folder, which need not exist; refused is what can name none."""
    try:
        os.stat(text)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
            raise argparse.ArgumentTypeError(f"{text[:200]}: {because(error)}") from None
    return Path(text)


def output_file(text: str) -> Path:
    """The type of a flag that names a file to write."""
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; give a file name")
    return Path(text)


STDOUT = Path("-")


def add_json(parser: argparse.ArgumentParser) -> None:
    """The flag --json, for verbs that print tables; see `json_too`."""
    help = "also write what is shown to this file, as JSON (-, or no FILE: to the standard output, instead of tables)"
    parser.add_argument("--json", nargs="?", type=output_file, const=STDOUT, metavar="FILE", help=help)


def add_family(parser: argparse.ArgumentParser) -> None:
    """The flag --family, for verbs that write a report."""
    help = "what 5%% are held over: the comparisons of this report (default), or all that its folder was asked so far"
    parser.add_argument("--family", choices=["report", "ledger"], default="report", help=help)


@contextlib.contextmanager
def json_too(file: Path | None) -> Iterator[Callable[[Any], None]]:
    """Inside, a verb prints its tables and calls what it gets with the same as plain data, for --json.

    With `-` the tables are not printed. NaN and infinity become null.
    """
    given: list[Any] = []
    aside = contextlib.redirect_stdout(io.StringIO()) if file == STDOUT else contextlib.nullcontext()
    try:
        with aside:
            yield given.append
    finally:  # what has been found is written, whatever failed after it
        for facts in given:
            if file is not None:
                from gptlab.report.estimates import clean

                write_json(file, clean(facts))


def write_json(file: Path, facts: Any) -> None:
    """Write to a file, or with `-` to the standard output."""
    if file == STDOUT:
        print(json.dumps(facts, indent=2))
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {file}: {because(error)}") from None


def tell_report(report: Any, file: Path | None) -> None:
    """Print a report's tables and where its files are, and write it for --json; with `-` in the place of the tables."""
    from gptlab.report.as_json import as_json
    from gptlab.report.tables import print_report

    to_stdout = file == STDOUT
    if not to_stdout:
        print_report(report.payload, wide_console(160))
    folder, says = report.page.parent, sys.stderr if to_stdout else sys.stdout
    print(f"page: {report.page}", file=says)
    print(f"tables and figures: {len(report.files)} files in {folder} and {folder / 'plots'}", file=says)
    if to_stdout:
        print(json.dumps(as_json(report.payload), allow_nan=False))
    elif file:
        write_json(file, as_json(report.payload))


def recipe_or_study(options: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """The content of the recipe or study that options.name names, not yet validated, and whether it is a study.

    A run directory stands for its recipe.
    """
    if (recipe := Path(options.name) / "recipe.toml").is_file():
        return read_layer(recipe), False
    if (Path(options.name) / "study.toml").is_file():  # the folder of a study that was begun
        return {}, True
    layer = read_layer(options.name, "studies" if options.name in shipped("studies") else "recipes")
    return layer, not layer.keys().isdisjoint(("arms", "arms_of", "factors"))


def wide_console(width: int) -> Any:
    """A rich Console for tables, `width` columns wide where the output is a file or a pipe.

    Where the reader has left (`| head`), it raises BrokenPipeError as `print` does; rich's own would exit with 1.
    """
    from rich.console import Console

    class Table(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    console = Table()
    if not console.is_terminal:
        console.width = width
    return console
