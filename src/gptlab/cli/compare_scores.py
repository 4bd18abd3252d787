"""gptlab compare-scores"""

import argparse
from typing import Any

from gptlab.cli.common import add_json, add_verb, json_too, named, wide_console
from gptlab.errors import UserError
from gptlab.files import printable
from gptlab.progress import Progress


def add_to(verbs: Any) -> None:
    help = (
        "Compare models document by document on one test set: lm-eval's samples files, hellaswag_results.jsonl, losses "
        "of `gptlab eval --windows`, or any JSON lines with an id and a score. Every file is compared with the first."
    )
    v = add_verb(verbs, "compare-scores", do_compare_scores, help)
    v.add_argument("files", type=named, nargs="+", metavar="FILE", help="scores of one model; two or more files")
    v.add_argument("--metric", metavar="NAME", help="the score (default: the plain one among those that all have)")
    v.add_argument("--better", choices=["lower", "higher"], help="which direction is better (default: by the name)")
    help = "documents to show in which each model is ahead (default: 5)"
    v.add_argument("--top", type=int, default=5, metavar="N", help=help)
    add_json(v)


def do_compare_scores(options: argparse.Namespace) -> None:
    if len(options.files) < 2:
        raise UserError("`gptlab compare-scores` takes two files of scores or more")
    if twice := [file for file in options.files if options.files.count(file) > 1]:
        raise UserError(f"{twice[0]} is named twice: two models are compared by two files")
    if options.top < 0:
        raise UserError(f"--top {options.top}: must be at least 0")
    with Progress("reading the scores"):
        from gptlab.report.scores import compare_scores

        report = compare_scores(options.files, options.metric, options.better, options.top)
    with json_too(options.json) as tell:
        _show(options, report)
        tell(report)


def _show(options: argparse.Namespace, report: dict[str, Any]) -> None:
    from gptlab.report.scores import sentences

    names = [chr(ord("A") + i) if len(options.files) <= 26 else f"M{i}" for i in range(len(options.files))]
    console = wide_console(160)

    def say(text: str) -> None:
        console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    others = f"; there are also {', '.join(report['other_metrics'])}" if report["other_metrics"] else ""
    say(f"{report['metric']}, {report['better']} is better{others}")
    for name, arm in zip(names, report["arms"], strict=True):
        mean = "" if arm["mean"] is None else f"mean {arm['mean']:.4f}"
        say(f"{name}  {mean} over {arm['n']:,} rows  {arm['arm']} ({arm['form']})")
    say("")
    for sentence in [*sentences(report, names), report["text"]]:
        say(sentence)
    for name, row in zip(names[1:], report["comparisons"], strict=True):
        if row["moved"]:
            _moved(console, f"{name} against {names[0]}: where they differ most", (names[0], name), row["moved"])
    if report["warnings"]:
        say("\nWarnings")
    for warning in report["warnings"]:
        say(f"- {warning}")


def _moved(console: Any, title: str, names: tuple[str, str], rows: list[dict[str, Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    console.print(Text(f"\n{title}", style="bold"))
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in ("document", *names):
        table.add_column(name, justify="left" if name == "document" else "right", no_wrap=True)
    table.add_column("text", overflow="fold")
    for row in rows:
        table.add_row(Text(printable(row["id"])), f"{row['b']:.4g}", f"{row['a']:.4g}", Text(row["text"]))
    console.print(table)
