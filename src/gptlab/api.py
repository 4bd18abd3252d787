"""What Python code and notebooks use beside `train` and the recipes: a run with all that can be done with it.

Everything here is done by the rooms below; the command line calls the same functions.
"""

from __future__ import annotations

import io
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptlab.config import Study, load_study
from gptlab.errors import DataError, UserError
from gptlab.progress import Progress, Tell, tell_nobody
from gptlab.report import report
from gptlab.report.card import card
from gptlab.report.listing import Runs, list_runs
from gptlab.report.plots import run_figures
from gptlab.report.write import Report
from gptlab.rundir import RunDir
from gptlab.streams import say
from gptlab.study import runner
from gptlab.training import load

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXPORTS = ("hf", "gguf", "sparse24")


class Run(load.Run):
    """A trained run: what `load_run` gives.

    >>> run = gptlab.load_run("runs/first")
    >>> run.sample("def ", max_tokens=20)
    ['def __init__(self, name):\\n        self.name = name']
    """

    @property
    def metrics(self) -> Any:
        """What was logged: a DataFrame of pandas or polars, or where neither is installed a dictionary of columns.

        >>> table = run.metrics
        >>> table[table.kind == "eval"][["step", "val_loss"]]

        A row is a line of metrics.jsonl. `kind` is "train" for a row of an update, with loss, lr and so on, and "eval"
        for an evaluation, with val_loss and other scores; what a row does not have is missing.
        """
        return data_frame(metric_columns(RunDir(self.path)))

    def evaluate(
        self, on: str | Sequence[str] = "loss", tasks: Sequence[str] = (), **settings: Any
    ) -> dict[str, float]:
        """Scores of the model, as of `gptlab eval`.

        >>> run.evaluate()
        {'step': 400, 'val_loss': 2.7301, ...}
        >>> run.evaluate(on=["loss", "hellaswag"], hellaswag={"path": "hellaswag_val.jsonl"})

        Args:
            on: what to measure, any of loss, hellaswag, wikitext, lambada and harness.
            tasks: names of lm-eval's tasks, for harness.
            settings: sections of the recipe with values that replace the run's.

        Raises:
            UserError: a dataset, file or task that is missing or does not fit the run.
        """
        from gptlab.training.scoring import evaluate_run

        with Progress(f"evaluating {self.path}") as shown:
            return evaluate_run(self, [on] if isinstance(on, str) else on, settings, tasks, shown.tell)

    def plot(self, name: str = "train-val_loss") -> Figure:
        """A plot of the run, which a notebook shows.

        >>> run.plot()
        >>> run.plot("learning_rate").savefig("lr.png")

        Args:
            name: train-val_loss, training_loss, validation_loss, learning_rate, throughput or hellaswag_accuracy.

        Raises:
            UserError: an unknown name, or the run has not logged what the plot shows.
        """
        figures = run_figures([RunDir(self.path)])
        if name not in figures:
            raise UserError(f"{self.path} has no plot {name!r}: it has {', '.join(figures) or 'none'}")
        figure = figures[name]
        # matplotlib tells a notebook how to show figures of pyplot, and this is none
        vars(figure)["_repr_png_"] = partial(png_of, figure)
        return figure

    def export(self, to: str, folder: str | Path, license: str = "", push: str = "") -> Path:
        """Write the model in another library's format, as `gptlab export`.

        >>> run.export("hf", "model")
        PosixPath('model')

        Args:
            to: hf: a Hugging Face folder; gguf: llama.cpp's file; sparse24: 2:4 matrices without their zeros.
            folder: the folder, or file for gguf, to write.
            license: an id such as mit, for the model card.
            push: also upload the hf folder to this repository, USER/NAME, of the Hugging Face hub.

        Raises:
            UserError: a format that does not fit the model, or a folder that cannot be written.
        """
        if to not in EXPORTS:
            raise UserError(f"no format {to!r}: there are {', '.join(EXPORTS)}")
        for name, given, kinds in (("push", push, ["hf"]), ("license", license, ["hf", "gguf"])):
            if given and to not in kinds:
                raise UserError(f"{name} = {given!r}: is for {' and '.join(kinds)}, not for {to}")
        with Progress(f"exporting {self.path}") as shown:
            remarks = export_run(self, to, Path(folder), license, push, shown.tell)
        for remark in remarks:
            say(remark)
        if push:
            from gptlab.interop.push import upload

            with Progress(f"uploading to {push}"):
                address = upload(Path(folder), push)
            say(f"pushed: {address}")
        return Path(folder)

    @property
    def card(self) -> Markdown:
        """The run on one page, as Markdown: results, settings, data and hardware. Nothing is written.

        >>> print(run.card)
        # Run first
        ...
        """
        text = card(RunDir(self.path))
        return Markdown(text.replace("](plots/", f"]({self.path.as_posix()}/plots/"))

    def _repr_html_(self) -> str:
        return Runs(list_runs([self.path]))._repr_html_()


class Markdown(str):
    """Text that a notebook shows as Markdown."""

    def __repr__(self) -> str:
        return str(self)

    def _repr_markdown_(self) -> str:
        return str(self)


def load_run(path: str | Path, checkpoint: str = "last", device: str = "auto") -> Run:
    """Open a run directory.

    >>> gptlab.load_run("runs/first")
    Run('runs/first', recipe='stdlib-demo', step=400, parameters=2,245,824)

    Args:
        path: the run directory.
        checkpoint: "last", "best" (lowest val_loss among those written) or a step.
        device: as train.device.

    Raises:
        RunError: no run, no such checkpoint, or a damaged one.
    """
    return Run(**vars(load.load_run(path, checkpoint, device)))


def run_study(
    study: Study | str | Path,
    out: str | Path | None = None,
    arms: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    jobs: int | None = None,
    quiet: bool = False,
) -> Report:
    """Train the runs of a study, or continue with them, and report what they show.

    >>> gptlab.run_study("architecture-smoke")
    Report(architecture-smoke, answers={...}, page='results/architecture-smoke/report.html')

    Args:
        study: of `load_study`, a name that `gptlab studies` lists, or a TOML file.
        out: the study's folder; default results/<study>.
        arms: train only these arms.
        seeds: default: the seeds of the study.
        jobs: runs at the same time. Default: one per GPU, or one.
        quiet: print nothing.

    Returns:
        The report. It tells of runs that failed, and of those that an interrupt (Ctrl-C) has left out; the same call
        continues with them.

    Raises:
        UserError: an arm, setting, dataset or folder cannot be used. Nothing has been started then.
    """
    study = study if isinstance(study, Study) else load_study(study)
    folder = Path(out or f"results/{study.name}")
    runner.run_study(study, folder, arms, seeds, jobs, quiet)
    return report(folder, quiet=quiet)


def judge(
    paths: str | Path | Sequence[str | Path],
    arm: str = "",
    seed: str = "",
    step: str = "",
    metric: str = "",
    pattern: str = "",
    arm_from: str = "",
    better: str = "",
    baseline: str = "",
    margin: float | None = None,
    at: str | float = "last",
    pairs: str = "",
    targets: Sequence[float] = (),
    questions: str | Path = "",
    paired: bool | None = None,
    out: str | Path | None = None,
) -> Report:
    """Compare runs that anything trained, from their logs, as `gptlab judge`.

    >>> gptlab.judge("runs.csv", arm="optimizer", baseline="adamw", margin=0.004)
    Report(judged-runs, answers={}, page='results/judged-runs/report.html')

    Args:
        paths: files and folders: CSV, TSV, JSONL, Parquet and text logs, TensorBoard, W&B, MLflow, the Trainer's and
            gptlab's own folders.
        arm, seed, step, metric: columns of tables or settings of logs. What is left out is guessed where it is plain.
        pattern: of text logs: a regular expression with groups step and the metric, or the name of a shipped one.
        arm_from: a regular expression for a run's path: its group arm, or the first, is the arm.
        better: lower or higher. Default: by the metric's name.
        baseline: the arm that others are compared with.
        margin: largest difference that counts as none; without it nothing is called equivalent.
        at: where on its curve a run is judged: last, common, best, or a step.
        pairs: all, to compare every pair and to group what cannot be told apart.
        targets: whether each arm's mean reaches these values, and after how many steps.
        questions: a study file, whose questions, margin, baseline and targets are asked.
        paired: whether a seed is the same seed in every arm.
        out: folder of the page; default results/judged-NAME.

    Returns:
        The report; `payload` has all numbers.

    Raises:
        UserError: no run, an option that does not fit them, or an `out` that holds something else.
    """
    from gptlab.logs.run import How
    from gptlab.report.judging import Asked
    from gptlab.report.write import write_judgement
    from gptlab.version import VERSION

    for name, value, known in (("better", better, ("", "lower", "higher")), ("pairs", pairs, ("", "all"))):
        if value not in known:
            raise UserError(f"{name} = {value!r}: must be {' or '.join(known[1:])}")
    several = [paths] if isinstance(paths, str | Path) else [*paths]
    how = How(arm, seed, step, metric, pattern, arm_from)
    asked = Asked(baseline, better, margin, str(at), pairs == "all", targets, str(questions), paired)
    given: dict[str, Any] = {"arm": arm, "seed": seed, "step": step, "metric": metric, "pattern": pattern}
    given |= {
        "arm-from": arm_from,
        "better": better,
        "baseline": baseline,
        "margin": margin,
        "at": at,
        "pairs": pairs,
        "questions": questions,
    }
    flags = [word for name, value in given.items() if value not in ("", None) for word in (f"--{name}", str(value))]
    flags += [word for target in targets for word in ("--target", str(target))]
    flags += [] if paired is None else ["--paired" if paired else "--unpaired"]
    command = shlex.join(["gptlab", "judge", *map(str, several), *flags, *(["--out", str(out)] if out else [])])
    folder = Path(out) if out else None
    return write_judgement([Path(path) for path in several], how, asked, folder, command=command, version=VERSION)


# -- what the methods are made of -----------------------------------------------------------------------------------


def metric_columns(run: RunDir) -> dict[str, list[Any]]:
    """The lines of metrics.jsonl by column, None where a line lacks it; `kind` is train or eval."""
    lines = run.read_metrics(most=sys.maxsize)
    if run.damaged_lines:
        say(f"{run.metrics_file}: {run.damaged_lines} damaged lines are left out")
    kinds = ["train" if "loss" in line else "eval" for line in lines]
    names = dict.fromkeys(name for line in lines for name in line)
    columns = {name: [line.get(name) for line in lines] for name in ("step", *names)}
    return {"step": columns.pop("step"), "kind": kinds, **columns}


def data_frame(columns: dict[str, list[Any]]) -> Any:
    """A DataFrame of pandas or else of polars; the columns where neither is installed."""
    try:
        import pandas
    except ImportError:
        pass
    else:
        return pandas.DataFrame(columns)
    try:
        import polars
    except ImportError:
        return columns
    return polars.DataFrame(columns, strict=False, infer_schema_length=None)


def png_of(figure: Figure) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=72)
    return picture.getvalue()


def export_run(
    run: load.Run,
    to: str,
    target: Path,
    license: str = "",
    push: str = "",
    tell: Tell = tell_nobody,
) -> list[str]:
    """Write a run's model in another library's format; nothing is uploaded.

    Args:
        run, to, target, license: as for `Run.export`.
        push: the repository that the folder is for; it is made where it is missing.
        tell: called with what is being done.

    Returns:
        What the user should know of the files, in sentences.

    Raises:
        UserError: a format that does not fit the model, or a folder that cannot be written.
    """
    from gptlab.interop.gguf import export_gguf
    from gptlab.interop.hf import export_hf, hf_model_type
    from gptlab.interop.hf_classifier import export_classifier
    from gptlab.interop.push import create_repository
    from gptlab.interop.sparse24 import export_sparse24
    from gptlab.model.encoder import Encoder
    from gptlab.report.model_card import model_card
    from gptlab.tasks.classify import label_names

    model, tokenizer = run.model, run.tokenizer
    classifier, remarks = isinstance(model, Encoder), list[str]()
    if classifier and to != "hf":
        raise UserError(f"{run.path} is a classifier, which --to hf alone exports")
    writing = f"writing {sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9:,.2f} GB"
    if push:
        tell("asking the hub", 0, 0)
        create_repository(push)
    tell(writing, 0, 0)
    written = partial(tell, writing)
    if to == "sparse24":
        export_sparse24(model, tokenizer, target, written=written)
    elif to == "gguf":
        export_gguf(model, tokenizer, target, run.recipe.name, license, written)
    else:
        remote_code = classifier or hf_model_type(model.config) == "gptlab"
        readme = model_card(RunDir.open(run.path), run.step, push or str(target), license, remote_code)
        if classifier:
            try:
                labels, multi = label_names(run.recipe)
            except DataError as error:
                labels, multi = None, None
                remarks.append(f"the labels are numbered, as their names are not at hand: {error}")
            export_classifier(model, tokenizer, target, labels, multi, readme, written)
        else:
            export_hf(model, tokenizer, target, run.recipe.sample, readme, written)
        if not license:
            remarks.append("README.md names no licence: --license mit, or another id, would")
        if remote_code:
            remarks.append("transformers loads the model and its tokenizer with trust_remote_code=True")
    if model.config.document_attention and to != "sparse24":
        remarks.append("model.document_attention is not part of the format: tokens see the whole context")
    return remarks
