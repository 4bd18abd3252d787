"""gptlab judge"""

import argparse
from typing import Any

from gptlab.cli.common import add_family, add_json, add_reading, add_verb, how_of, named, tell_report
from gptlab.progress import Progress
from gptlab.version import VERSION


def add_to(verbs: Any) -> None:
    help = "Compare runs that anything trained, from their logs: which arms are better, and how sure that is."
    v = add_verb(verbs, "judge", do_judge, help)
    which = add_reading(v).add_mutually_exclusive_group()
    help = "a seed is the same seed in every arm: compare seed by seed"
    which.add_argument("--paired", dest="paired", action="store_true", default=None, help=help)
    help = "seeds only number the runs of an arm"
    which.add_argument("--unpaired", dest="paired", action="store_false", help=help)

    ask = v.add_argument_group("what is asked")
    ask.add_argument("--better", choices=["lower", "higher"], default="", help="default: by the metric's name")
    help = "arm that others are compared with (default: one called baseline or control, else that with the most runs)"
    ask.add_argument("--baseline", default="", metavar="NAME", help=help)
    help = "largest difference that counts as none; without it nothing is called equivalent"
    ask.add_argument("--margin", type=float, metavar="X", help=help)
    help = "where on its curve a run is judged; common: the last step that all have (default: last)"
    ask.add_argument("--at", default="last", metavar="last|common|best|STEP", help=help)
    ask.add_argument("--pairs", choices=["all"], help="compare every pair, and group what cannot be told apart")
    help = "ask of every arm whether its mean reaches X, and give the steps to it; may be given several times"
    ask.add_argument("--target", type=float, action="append", default=[], metavar="X", help=help)
    help = "a study file: its questions, baseline, margin and targets are asked"
    ask.add_argument("--questions", default="", metavar="FILE", help=help)

    v.add_argument("--out", type=named, metavar="DIR", help="default: results/judged-NAME, after the first PATH")
    add_family(v)
    add_json(v)


def do_judge(options: argparse.Namespace) -> None:
    with Progress("reading the logs") as shown:
        from gptlab.report.judging import Asked
        from gptlab.report.write import write_judgement

        asked = Asked(
            baseline=options.baseline,
            better=options.better,
            margin=options.margin,
            at=options.at,
            all_pairs=options.pairs == "all",
            targets=options.target,
            questions=options.questions,
            paired=options.paired,
        )
        report = write_judgement(
            options.paths,
            how_of(options),
            asked,
            options.out,
            command=options.command,
            version=VERSION,
            tell=shown.tell,
            family=options.family,
        )
    tell_report(report, options.json)
