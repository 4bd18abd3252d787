"""The command line: one function a verb, and no logic. Heavy imports happen inside the verb that needs them."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptlab import __version__
from gptlab.config import (
    Data,
    Study,
    build_recipe,
    load_comparison,
    load_study,
    parse_flag,
    read_layer,
    settings,
    shipped,
    unknown_setting,
)
from gptlab.errors import ConfigError, LostRank, OutOfMemory, UserError
from gptlab.status import EXIT_CODES

if TYPE_CHECKING:
    from rich.console import Console


LINGER = 5  # seconds


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line and exit with its status."""
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        arguments, overrides = lift_settings(given)
        options = parser().parse_args(arguments)
        options.overrides, options.command = overrides, shlex.join(["gptlab", *given])
        if overrides and not getattr(options, "takes_settings", False):
            raise ConfigError(f"`gptlab {options.verb}` takes no settings such as --{next(iter(overrides))}")
        sys.exit(options.run(options) or 0)
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(2)  # if the first process says the same, torchrun ends this one meanwhile: it is said once
        print(f"gptlab: {error}", file=sys.stderr)
        sys.exit(2)
    except OutOfMemory as error:
        print(f"gptlab: {error}", file=sys.stderr)
        sys.exit(3)
    except LostRank as error:
        print(f"gptlab: {error}", file=sys.stderr)
        time.sleep(LINGER)  # the rank that failed first ends first, and torchrun reports that one
        sys.exit(1)
    except BrokenPipeError:  # `gptlab sample RUN | head`
        sys.stderr.close()
        sys.exit(0)
    except KeyboardInterrupt:
        sys.exit(4)


def lift_settings(arguments: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Take every `--section.key value` out of a command line; dashes and underscores are the same.

    Returns:
        (what is left, {dotted name: value})
    """
    left: list[str] = []
    lifted: dict[str, Any] = {}
    words = iter(arguments)
    for word in words:
        flag, equals, value = word.partition("=")
        if not (flag.startswith("--") and "." in flag):
            left.append(word)
            continue
        name = flag[2:].replace("-", "_")
        if not equals:
            value = next(words, "")
            if not value or (value.startswith("--") and "." in value):
                raise ConfigError(f"{flag} needs a value: {flag} VALUE")
        lifted[name] = parse_flag(name, value)
    return left, lifted


# -- verbs ----------------------------------------------------------------------------------------------------------


def prepare(options: argparse.Namespace) -> None:
    from gptlab.data.labeled import NAMES, prepare_labeled
    from gptlab.data.prepare import merge, prepare

    if options.corpus in NAMES or options.label_field:
        if options.val_tokens is not None or options.format != "llmc":
            raise UserError("--val-tokens and --format are for text without labels: use --val-fraction")
        if options.part or options.merge:
            raise UserError("--part and --merge are for text without labels")
        folder = prepare_labeled(
            options.corpus,
            source=options.source,
            out=options.out,
            tokenizer=options.tokenizer,
            text_field=options.text_field,
            label_field=options.label_field,
            max_documents=options.max_documents,
            val_fraction=options.val_fraction,
        )
        print(f"dataset: {folder}")
        return
    if options.merge:
        folder = merge(options.out or Data(corpus=options.corpus, tokenizer=options.tokenizer).folder)
        print(f"dataset: {folder}")
        return
    folder = prepare(
        options.corpus,
        source=options.source,
        out=options.out,
        tokenizer=options.tokenizer,
        format=options.format,
        shard_tokens=options.shard_tokens,
        workers=options.workers,
        val_fraction=options.val_fraction,
        val_tokens=options.val_tokens,
        text_field=options.text_field,
        max_documents=options.max_documents,
        part=options.part,
    )
    print(f"dataset: {folder}")


def train(options: argparse.Namespace) -> int:
    layer = read_layer(options.recipe)
    seed = {} if options.seed is None else {"seed": options.seed}
    recipe = build_recipe(layer, options.overrides, seed)
    out = Path(options.out or f"runs/{recipe.name}_seed{recipe.seed}")
    from gptlab.machine import spin_less

    spin_less(os.environ)  # before PyTorch is loaded
    from gptlab.distributed.world import world_from_env
    from gptlab.training.loop import train

    result = train(recipe, out, resume=options.resume)
    # torchrun takes any status but 0 for a failure, and would start a run again that has ended in an orderly way
    status = 0 if "TORCHELASTIC_RUN_ID" in os.environ and result.status != "failed" else EXIT_CODES[result.status]
    if not world_from_env().first:  # of its processes one writes and prints
        return status
    draw_run(out)
    says = f"{result.status} after {result.steps} steps"
    if result.final_val_loss is not None:
        says += f", val_loss {result.final_val_loss:.4f}"
    if result.reason:
        at = f" at step {result.failed_at_step}" if result.failed_at_step and "at step" not in result.reason else ""
        says += f": {result.reason}{at}"
    print(f"{says}\nrun: {out}")
    if result.status == "interrupted":
        print("the same command goes on from here")
    return status


def draw_run(out: Path) -> None:
    """Plots and card of a run that has measured something."""
    from gptlab.report.card import write_card
    from gptlab.report.plots import draw
    from gptlab.rundir import RunDir

    run = RunDir(out)
    if run.read_json("result.json").get("status") in ("completed", "diverged", "interrupted"):
        draw([run], run.plots)
        write_card(run)


def plan(options: argparse.Namespace) -> None:
    from gptlab import planner
    from gptlab.planner import Device
    from gptlab.training.setup import pick_device

    layer = read_layer(options.name, "studies" if options.name in shipped("studies") else "recipes")
    cost: dict[str, Any] = {"mfu": options.mfu, "price": options.price, "processes": options.gpus}
    if options.gpu or options.memory is not None:
        device = Device.named(options.gpu or "", options.memory)
    else:
        here = pick_device("auto")
        device = planner.at_hand(here, max(1, options.gpus))
        if here.type == "cpu" and options.gpus == 1:
            cost["measure"] = planner.measure
    shown: Any
    facts: Any
    if "arms" in layer or "arms_of" in layer:
        if options.sizes or options.micro_batches:
            raise UserError("--sizes and --micro-batches are for a recipe")
        study = planner.plan_study(load_study(options.name, options.overrides), device, **cost)
        shown, facts = planner.render_study(study), study.to_json()
    elif options.sizes or options.micro_batches:
        rows = planner.sweep([layer, options.overrides], device, options.sizes, options.micro_batches, **cost)
        shown = planner.render_rows(rows, f"{layer['name']} on {device.name}")
        facts = {name: row.to_json() for name, row in rows.items()}
    else:
        one = planner.plan(build_recipe(layer, options.overrides), device, **cost)
        shown, facts = planner.render(one), one.to_json()
    _console(200).print(shown)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def evaluate(options: argparse.Namespace) -> None:
    from gptlab.training.load import load_run
    from gptlab.training.scoring import evaluate_run

    run = load_run(options.folder, options.checkpoint)
    scores = evaluate_run(run, options.on, options.overrides, options.tasks)
    text = json.dumps(scores, indent=2)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n", encoding="utf-8")


def sample(options: argparse.Namespace) -> None:
    from gptlab.training.load import load_run

    run = load_run(options.folder, options.checkpoint)
    given = {key: getattr(options, key) for key in ("max_tokens", "temperature", "top_k", "top_p", "seed")}
    chosen = {f"sample.{key}": value for key, value in given.items() if value is not None}
    if options.prompt is not None:
        chosen["sample.prompt"] = options.prompt
    run.recipe = run.recipe.replace(chosen)  # the same bounds as in a recipe
    if options.samples > 1:
        for text in run.sample(samples=options.samples):
            print(text + "\n" + "-" * 40)
        return
    print(run.recipe.sample.prompt, end="", flush=True)
    ids: list[int] = []
    shown = 0
    for (token,) in run.stream(run.recipe.sample.prompt):
        ids.append(token)
        text = run.tokenizer.decode(ids)
        whole = text.rstrip("\N{REPLACEMENT CHARACTER}")  # a character whose last bytes are yet to come waits
        print(whole[shown:], end="", flush=True)
        shown = max(shown, len(whole))
    print()


def plot(options: argparse.Namespace) -> None:
    from gptlab.report.plots import draw
    from gptlab.rundir import RunDir

    runs = [RunDir.open(folder) for folder in options.folders]
    out = options.out or (runs[0].plots if len(runs) == 1 else Path("plots"))
    for file in draw(runs, out):
        print(file)
    if options.compare:
        from gptlab.report.card import write_card

        earlier = RunDir.open(options.compare)
        for run in runs:
            print(write_card(run, earlier))


def export(options: argparse.Namespace) -> None:
    from gptlab.interop.hf import export_hf
    from gptlab.interop.sparse24 import export_sparse24
    from gptlab.model.encoder import Encoder
    from gptlab.training.load import load_run

    run = load_run(options.folder, options.checkpoint, device="cpu")
    if isinstance(run.model, Encoder):
        raise UserError(f"{options.folder} is a classifier's run: only language models are exported")
    if options.to == "sparse24":
        export_sparse24(run.model, run.tokenizer, options.target)
    else:
        export_hf(run.model, run.tokenizer, options.target)
    print(f"{options.to} model: {options.target}")


def import_(options: argparse.Namespace) -> None:
    from gptlab.training.importing import import_run

    print(f"run: {import_run(options.kind, options.source, options.out, options.overrides)}")


def study_run(options: argparse.Namespace) -> int:
    from gptlab.study.runner import run_study

    study, folder, seeds = _study_asked(options, options.study)
    return run_study(study, folder, options.arm, seeds, options.jobs)


def _study_asked(options: argparse.Namespace, name: str) -> tuple[Study, Path, list[int] | None]:
    """The study that is named, its folder, and the seeds that are asked for; None is all of its own."""
    from gptlab.study.runner import find_study, first_seeds

    name, begun = find_study(name)
    study = load_study(name, options.overrides)
    seeds = None if options.seed is None else [options.seed]
    if options.seeds is not None:
        seeds = first_seeds(study, options.seeds)
    return study, Path(options.out or begun or f"results/{study.name}"), seeds


def study_status(options: argparse.Namespace) -> None:
    from gptlab.study.table import read_study, render

    console = _console(200)
    states = read_study(options.folder)
    console.print(render(states, jobs=sum(state.status == "running" for state in states)))


def study_report(options: argparse.Namespace) -> None:
    from gptlab.report.analysis import analyse
    from gptlab.report.figures import draw_report
    from gptlab.report.page import write_page
    from gptlab.report.studies import read_study_folder
    from gptlab.report.tables import print_report, write_csv

    folders = list({folder.resolve(): folder for folder in options.folders}.values())
    studies = [read_study_folder(folder) for folder in folders]
    names = [read.study.name for read in studies]
    for name in names:
        if names.count(name) > 1:
            twice = [str(read.folder) for read in studies if read.study.name == name]
            raise UserError(f"{' and '.join(twice)} hold one study, {name}: a report takes it once")
    comparison, control = None, None
    if options.compare:
        comparison = load_comparison(options.compare)
        if comparison.control:
            control = next((read for read in studies if read.study.name == comparison.control.study), None)
    payload = analyse(studies, comparison, control)
    payload |= {"gptlab": __version__, "command": shlex.join(["gptlab", *sys.argv[1:]])}
    out = options.out or (folders[0] if len(studies) == 1 else Path("results") / "-and-".join(names))
    console = _console(160)
    print_report(payload, console)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_page(payload, out / "report.html")
        files = [*write_csv(payload, out), *draw_report(payload, out / "plots", options.figures)]
    except OSError as error:
        raise UserError(f"{error.filename or out} cannot be written: {error.strerror}; --out names a folder") from None
    print(f"page: {out / 'report.html'}")
    print(f"tables and figures: {len(files)} files in {out} and {out / 'plots'}")


def study_power(options: argparse.Namespace) -> None:
    from gptlab.report.power import Noise, pilot_noise, power_report
    from gptlab.report.studies import read_study_folder

    study = load_study(options.study)
    noise = (
        Noise(options.noise)
        if options.pilot is None
        else pilot_noise(read_study_folder(options.pilot), study.metric.name)
    )
    print("\n".join(power_report(study, options.effect, noise)))


def bench_inference(options: argparse.Namespace) -> None:
    from gptlab.bench.inference import DEFAULT_RECIPE, DEFAULT_REGIMES, bench_inference, render

    if options.json and options.json.is_dir():
        raise UserError(f"--json {options.json}: is a folder; a file's name was expected")

    def progress(text: str) -> None:  # between generations only: the thread of a spinner would be timed with them
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
    console = _console(200)
    console.print(render(report))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def launch(options: argparse.Namespace) -> int | None:
    from gptlab.study import launch as launching

    if options.job is not None:
        return launching.work(options.job, options.part, draw_run)
    if options.status is not None:
        _console(200).print(launching.render(launching.find_launches(options.status)))
        return None
    if options.name is None or options.on is None:
        raise UserError("`gptlab launch RECIPE|STUDY --on slurm|local` launches; `gptlab launch --status` shows it")
    flags = {key: getattr(options, key) for key in launching.FLAGS if getattr(options, key) is not None}
    resources = launching.read_resources(options.profile, flags)
    layer: dict[str, Any] = {"arms": {}}  # a folder is that of a study that was begun
    if not Path(options.name).is_dir():
        layer = read_layer(options.name, "studies" if options.name in shipped("studies") else "recipes")
    if "arms" in layer or "arms_of" in layer:
        study, folder, seeds = _study_asked(options, options.name)
        started = launching.launch_study(
            study, folder, options.arm, seeds, options.jobs, options.on, resources, options.command, options.print
        )
    else:
        if options.arm or options.seeds is not None or options.jobs is not None:
            raise UserError("--arm, --seeds and --jobs are for a study")
        recipe = build_recipe(layer, options.overrides, {} if options.seed is None else {"seed": options.seed})
        out = Path(options.out or f"runs/{recipe.name}_seed{recipe.seed}")
        started = launching.launch_recipe(recipe, out, options.on, resources, options.command, options.print)
    if options.print:
        print("\n".join(launching.scripts(started)))
        return None
    for part in started.parts:
        of = f" of {len(part.runs)} runs" if part.runs else ""
        print(f"{part.name}: job {part.job}{of}")
    print(
        f"{started.folder}: logs are in {started.folder / launching.FILES}; `gptlab launch --status {started.folder}`"
    )
    return None


def stop(options: argparse.Namespace) -> None:
    from gptlab.study.launch import stop

    stop(options.folder, not options.no_wait, print)


def recipes(options: argparse.Namespace) -> None:
    _list("recipes")


def studies(options: argparse.Namespace) -> None:
    _list("studies")


def _console(width: int) -> Console:
    """What tables are printed on; a pipe, which has no width of its own, gets this one."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = width
    return console


def _list(kind: str) -> None:
    width = max(map(len, shipped(kind)))
    for name in shipped(kind):
        print(f"{name:{width}}  {read_layer(name, kind).get('description', '')}")


# -- the parser -----------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        flag = message.partition("unrecognized arguments: --")[2].partition(" ")[0].partition("=")[0]
        if " mean " in (says := str(unknown_setting(flag.replace("-", "_")))):  # --lr for --optim.lr
            raise UserError(says)
        raise UserError(f"{message}\n{self.format_usage().strip()}")


def parser() -> argparse.ArgumentParser:
    top = _Parser(prog="gptlab", description="A laboratory for pretraining GPT-2-class language models.")
    top.add_argument("--version", action="version", version=f"gptlab {__version__}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=_Parser)

    def verb(name: str, run: Any, help: str, **kwargs: Any) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=help, description=help, **kwargs)
        added.set_defaults(run=run)
        return added

    v = verb("prepare", prepare, "Turn a corpus into a dataset of token shards, or of labelled documents.")
    v.add_argument(
        "corpus",
        metavar="CORPUS",
        help="stdlib, shakespeare, openwebtext, fineweb-edu, or a file or folder; with labels: eurlex57k, agnews, "
        "imdb, constructs, or a file or folder and --label-field",
    )
    v.add_argument("--from", dest="source", metavar="PATH", help="local text, or a hub id, instead of the usual source")
    v.add_argument("--out", type=Path, metavar="DIR", help="default: data/CORPUS-TOKENIZER")
    v.add_argument("--tokenizer", default="gpt2", help="gpt2, byte, char, bpe-N or a tokenizer.json (default: gpt2)")
    v.add_argument("--format", choices=["llmc", "nanogpt", "npy"], default="llmc", help="of the shards (default: llmc)")
    v.add_argument("--shard-tokens", type=int, default=100_000_000, metavar="N", help="tokens in a shard")
    v.add_argument("--workers", type=int, metavar="N", help="threads that tokenise (default: all cores)")
    v.add_argument("--val-fraction", type=float, metavar="X", help="share of the documents held out")
    v.add_argument("--val-tokens", type=int, metavar="N", help="hold out the first N tokens instead")
    v.add_argument("--text-field", default="text", metavar="NAME", help="of jsonl and parquet rows (default: text)")
    v.add_argument("--label-field", metavar="NAME", help="of rows that have labels, for task = classify")
    v.add_argument("--max-documents", type=int, metavar="N", help="stop after N documents (of a split, with labels)")
    v.add_argument("--part", metavar="I/N", help="only part I of N, for a job array: --part $SLURM_ARRAY_TASK_ID/14")
    v.add_argument("--merge", action="store_true", help="make one dataset of all parts, when they are finished")

    v = verb(
        "train",
        train,
        "Train a recipe, or go on with a run that was stopped.",
        epilog=settings_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    v.add_argument("recipe", metavar="RECIPE", help="a name that `gptlab recipes` lists, or a path to a TOML file")
    v.add_argument("--out", metavar="DIR", help="run directory (default: runs/<recipe>_seed<k>)")
    v.add_argument("--seed", type=int, metavar="N", help="of initialisation, dropout and data order")
    v.add_argument(
        "--resume", choices=["auto", "never"], default="auto", help="go on with a run in DIR (default: auto)"
    )
    v.set_defaults(takes_settings=True)

    v = verb("plan", plan, "Say what a recipe or a study takes: memory, time, cost, host memory and disk.")
    v.add_argument("name", metavar="RECIPE|STUDY", help="a shipped name, or a path to a TOML file")
    v.add_argument("--gpu", metavar="NAME", help="H100, A100-80, RTX4090, ... (default: the device at hand)")
    v.add_argument("--memory", type=float, metavar="GB", help="of the GPU; without --gpu, of any GPU: no hours then")
    v.add_argument("--gpus", type=int, default=1, metavar="N", help="of them, a process each (default: 1)")
    v.add_argument("--mfu", type=float, default=0.4, metavar="X", help="share of the regime's peak (default: 0.4)")
    v.add_argument("--price", type=float, default=0.0, metavar="P", help="GPU hour (default: train.price_per_hour)")
    v.add_argument("--sizes", nargs="+", default=[], metavar="PRESET", help="a row for each model.preset")
    v.add_argument("--micro-batches", nargs="+", type=int, default=[], metavar="N", help="a row for each")
    v.add_argument("--json", type=Path, metavar="FILE", help="write the plan here too")
    v.set_defaults(takes_settings=True)

    v = verb(
        "eval",
        evaluate,
        "Score a run: loss over the whole validation split, HellaSwag (--hellaswag.path FILE), WikiText and LAMBADA "
        "(--eval.wikitext FILE, --eval.lambada FILE), tasks of lm-eval (harness, --tasks).",
    )
    v.add_argument("folder", metavar="RUN")
    v.add_argument(
        "--on",
        nargs="+",
        choices=["loss", "hellaswag", "wikitext", "lambada", "harness"],
        default=["loss"],
        help="what to measure (default: loss)",
    )
    v.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="of harness: lm-eval's names, or YAML files")
    v.add_argument("--checkpoint", default="last", metavar="last|best|STEP")
    v.add_argument("--out", type=Path, metavar="FILE.json", help="write the scores here too")
    v.set_defaults(takes_settings=True)

    v = verb("sample", sample, "Let a run write text.")
    v.add_argument("folder", metavar="RUN")
    v.add_argument("--prompt", metavar="TEXT", help="text to go on from (default: the recipe's)")
    v.add_argument("--max-tokens", type=int, metavar="N")
    v.add_argument("--temperature", type=float, metavar="T")
    v.add_argument("--top-k", type=int, metavar="K")
    v.add_argument("--top-p", type=float, metavar="P")
    v.add_argument("--seed", type=int, metavar="N")
    v.add_argument("--samples", type=int, default=1, metavar="N", help="how many texts (default: 1)")
    v.add_argument("--checkpoint", default="last", metavar="last|best|STEP")

    v = verb("plot", plot, "Draw a run's curves, or several runs' over one another.")
    v.add_argument("folders", nargs="+", metavar="RUN")
    v.add_argument("--out", type=Path, metavar="DIR", help="default: the run's plots/, or plots/ for several")
    v.add_argument("--compare", metavar="RUN", help="write card.md anew, with what differs from this earlier run")

    v = verb("export", export, "Write a run's model for another library.")
    v.add_argument("folder", metavar="RUN")
    v.add_argument(
        "--to",
        choices=["hf", "sparse24"],
        required=True,
        help="hf: a Hugging Face folder, GPT-2 or Llama form; sparse24: 2:4 matrices without their zeros",
    )
    v.add_argument("target", type=Path, metavar="DIR")
    v.add_argument("--checkpoint", default="last", metavar="last|best|STEP")

    v = verb("import", import_, "Make a run of a model that was trained elsewhere.")
    v.add_argument("kind", choices=["hf", "nanogpt"], help="a Hugging Face folder or id, or nanoGPT's ckpt.pt")
    v.add_argument("source", metavar="SRC")
    v.add_argument("--out", type=Path, required=True, metavar="RUN")
    v.set_defaults(takes_settings=True)

    v = verb("study", study_run, "Train every arm of a study with every seed, see how far it is, and what it says.")
    parts = v.add_subparsers(dest="part", required=True, metavar="run|status|report|power", parser_class=_Parser)
    help = "Train the runs of a study, a process each; what is there already is not done again."
    v = parts.add_parser("run", help=help, description=help)
    v.add_argument(
        "study", metavar="STUDY", help="a name that `gptlab studies` lists, a TOML file, or the folder of one begun"
    )
    v.add_argument("--arm", nargs="+", action="extend", metavar="NAME", help="only these arms, without the sanity gate")
    which = v.add_mutually_exclusive_group()
    which.add_argument("--seeds", type=int, metavar="N", help="the first N seeds (default: the study's)")
    which.add_argument("--seed", type=int, metavar="K", help="this one alone")
    v.add_argument("--jobs", type=int, metavar="N", help="runs at the same time (default: one a GPU, or one)")
    v.add_argument("--out", type=Path, metavar="DIR", help="default: results/<study>")
    v.set_defaults(run=study_run, takes_settings=True)
    help = "Show how far a study is, also while it runs."
    v = parts.add_parser("status", help=help, description=help)
    v.add_argument("folder", type=Path, metavar="DIR")
    v.set_defaults(run=study_status)
    help = "Answer a study's questions, or those of several studies: tables, pictures and one web page."
    v = parts.add_parser("report", help=help, description=help)
    v.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="folders of studies, finished or not")
    v.add_argument("--compare", metavar="NAME", help="a comparison of two of them: precision, or a TOML file")
    v.add_argument("--out", type=Path, metavar="DIR", help="default: the study's folder, or results/A-and-B")
    v.add_argument(
        "--figures", nargs="+", choices=["png", "svg"], default=["png"], help="formats of the pictures (default: png)"
    )
    v.set_defaults(run=study_report)
    help = "Say how many seeds a study needs to find a difference."
    v = parts.add_parser("power", help=help, description=help)
    v.add_argument("study", metavar="STUDY", help="a name that `gptlab studies` lists, or a TOML file")
    v.add_argument("--effect", type=float, required=True, metavar="X", help="the difference, in units of its metric")
    which = v.add_mutually_exclusive_group(required=True)
    which.add_argument("--pilot", type=Path, metavar="DIR", help="a study's folder to take the noise from")
    which.add_argument("--noise", type=float, metavar="SD", help="of the difference of two arms, over seeds")
    v.set_defaults(run=study_power)

    v = verb(
        "launch",
        launch,
        "Submit a recipe or a study to SLURM, or start it in the background here; a job that is near its time limit, "
        "or preempted, saves, requeues itself and goes on.",
    )
    v.add_argument("name", nargs="?", metavar="RECIPE|STUDY", help="a shipped name, a TOML file, or a study's folder")
    v.add_argument("--on", choices=["slurm", "local"])
    v.add_argument("--print", action="store_true", help="show the batch script and submit nothing")
    v.add_argument(
        "--status",
        nargs="?",
        type=Path,
        const=Path(),
        metavar="DIR",
        help="show what was launched for a run or a study, or for those in runs/ and results/",
    )
    v.add_argument("--profile", type=Path, metavar="FILE", help="TOML with the following flags as keys, and extra")
    v.add_argument("--partition", metavar="NAME")
    v.add_argument("--time", metavar="LIMIT", help="minutes, H:M:S or D-H:M:S")
    v.add_argument("--gpus", type=int, metavar="N", help="GPUs a node")
    v.add_argument("--nodes", type=int, metavar="N")
    v.add_argument("--tasks", type=int, metavar="N", help="processes a node (default: one a GPU, or one)")
    v.add_argument("--cpus", type=int, metavar="N", help="cores a process")
    v.add_argument("--mem", metavar="SIZE", help="memory a node: 64G")
    v.add_argument("--account", metavar="NAME")
    v.add_argument("--qos", metavar="NAME")
    v.add_argument(
        "--signal-delay", type=int, metavar="S", help="seconds before the limit at which to save (default: 120)"
    )
    v.add_argument("--out", type=Path, metavar="DIR", help="of the run or the study")
    which = v.add_mutually_exclusive_group()
    which.add_argument("--seed", type=int, metavar="K", help="of the run; of a study, this one alone")
    which.add_argument("--seeds", type=int, metavar="N", help="the first N seeds of a study")
    v.add_argument("--arm", nargs="+", action="extend", metavar="NAME", help="only these arms of a study")
    v.add_argument("--jobs", type=int, metavar="N", help="runs of a study at the same time (default: all that fit)")
    v.add_argument("--job", type=Path, help=argparse.SUPPRESS)  # what a job calls
    v.add_argument("--part", help=argparse.SUPPRESS)
    v.set_defaults(takes_settings=True)

    v = verb("stop", stop, "Ask whoever trains a run, or runs a study, to save a checkpoint and end.")
    v.add_argument("folder", type=Path, metavar="RUN|STUDY")
    v.add_argument("--no-wait", action="store_true", help="do not wait until it has ended")

    v = verb("bench", None, "Measure how fast a model is.")
    parts = v.add_subparsers(dest="part", required=True, metavar="inference", parser_class=_Parser)
    help = "Time prefill and decoding in several precision regimes and batch sizes, greedy and not compiled."
    v = parts.add_parser("inference", help=help, description=help)
    v.add_argument(
        "name",
        nargs="?",
        metavar="RECIPE|RUN",
        help="a recipe, with random weights, or a run directory (default: gpt2-124m-openwebtext)",
    )
    v.add_argument(
        "--regimes",
        nargs="+",
        metavar="NAME",
        help="values of precision.regime (default: fp32 tf32 amp_bf16 bf16_pure)",
    )
    v.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8], metavar="N", help="sequences (default: 1 8)")
    v.add_argument("--prompt-tokens", type=int, metavar="N", help="default: half of the context, at most 256")
    v.add_argument("--new-tokens", type=int, metavar="N", help="default: a quarter of the context, at most 64")
    v.add_argument("--repeats", type=int, default=5, metavar="N", help="generations that count (default: 5)")
    v.add_argument("--json", type=Path, metavar="FILE", help="write the report here too")
    v.set_defaults(run=bench_inference, takes_settings=True)

    verb("recipes", recipes, "List the shipped recipes.")
    verb("studies", studies, "List the shipped studies.")
    return top


def settings_help() -> str:
    """Every setting of a recipe with its default and meaning, for `gptlab train --help`."""
    lines = ["settings (any of them, as --section.key VALUE; a recipe's own values replace these defaults):"]
    for name, field in settings():
        if name in ("name", "description", "seed"):
            continue
        default = field.get_default(call_default_factory=True)
        shown = json.dumps(default)
        lines.append(f"  --{name.replace('_', '-'):35} {field.description} [{shown}]")
    return "\n".join(lines)
