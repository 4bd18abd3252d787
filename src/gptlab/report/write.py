"""A report from study folders to files: one page, CSV tables and figures."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

from rich.console import Console

from gptlab.config import Comparison, load_comparison
from gptlab.errors import UserError
from gptlab.files import because
from gptlab.logs.read import read_logs
from gptlab.logs.run import How
from gptlab.logs.tables import COUNTS
from gptlab.progress import Tell, tell_nobody
from gptlab.report.analysis import analyse
from gptlab.report.estimates import Plain
from gptlab.report.figures import draw_report
from gptlab.report.judging import Asked, judge_logs, metric_asked, name_of
from gptlab.report.ledger import NOTE, family_of, record, summary
from gptlab.report.page import write_page
from gptlab.report.studies import ReadStudy, read_study_folder
from gptlab.report.tables import print_report, report_html, write_csv
from gptlab.report.words import told_apart
from gptlab.rundir import RunDir, write_atomically

JUDGED = "judged.json"  # in the folder of a judgement: of what


@dataclass(frozen=True)
class Report:
    """What was written."""

    payload: Plain
    """Everything that the report shows, as `analyse` returns it."""
    page: Path
    files: list[Path]
    """CSV files and figures."""

    def __repr__(self) -> str:
        across = self.payload["across"]
        asked = [*self.payload["studies"], *([across] if across else [])]
        answers = {question["id"]: question["answer"] for of in asked for question in told_apart(of)}
        return f"Report({', '.join(of['name'] for of in asked)}, answers={answers}, page='{self.page}')"

    def _repr_html_(self) -> str:
        return f"{report_html(self.payload)}<p>page: {escape(str(self.page))}</p>"


def write_report(
    folders: Sequence[Path],
    compare: str | Path | None = None,
    out: Path | None = None,
    formats: Sequence[str] = ("png",),
    console: Console | None = None,
    command: str | None = None,
    version: str | None = None,
    tell: Tell = tell_nobody,
    family: str = "report",
) -> Report:
    """Analyse study folders, write report.html, CSV files and figures, and print the tables.

    Args:
        folders: of studies, in any state; a folder given twice is read once.
        compare: a shipped comparison's name, or a comparison file.
        out: folder of the report; the study's own folder by default, or `results/<a>-and-<b>` of several studies.
        formats: of the figures: png, svg, pdf.
        console: where the tables are printed, if at all.
        command, version: the command line and gptlab's version, for the last line of the page.
        tell: called as the work goes on.
        family: what Holm's correction is over: "report", the comparisons of this one, or "ledger", all that the folder
            of the report was ever asked about. Both are recorded in its ledger.

    Raises:
        UserError: a folder without a study, two folders of one study, a comparison without its studies, or an `out`
            that cannot be written.
        ConfigError: an invalid comparison.
    """
    folders = list({os.path.realpath(folder): folder for folder in folders}.values())
    studies = [read_study_folder(folder, tell) for folder in folders]
    names = [read.study.name for read in studies]
    for name in names:
        if names.count(name) > 1:
            twice = [str(read.folder) for read in studies if read.study.name == name]
            raise UserError(f"{' and '.join(twice)} hold the same study, {name}: a report takes it once")
    tell("analysing the runs", 0, 0)
    out = out or (folders[0] if len(studies) == 1 else Path("results") / "-and-".join(names))
    if family == "ledger" and compare:
        raise UserError("--family ledger is for comparisons of arms: leave out --compare, whose pairs it does not hold")
    control = _control(studies, compare)
    report = _written(
        studies,
        lambda read: analyse(read, *control),
        out,
        formats,
        tell,
        family,
        {"gptlab": version, "command": command},
    )
    if console:
        print_report(report.payload, console)
    return report


def _written(
    studies: Sequence[ReadStudy],
    analysed: Callable[[Sequence[ReadStudy]], Plain],
    out: Path,
    formats: Sequence[str],
    tell: Tell,
    family: str,
    also: Plain,
    at: str = "last",
) -> Report:
    """Analyse, record what was asked, and write.

    Args:
        also: keys of the payload: gptlab, command.
        at: where the metric was taken.
    """
    page, payload = out / "report.html", analysed(studies)
    try:
        looks = record(out, payload | {"at": at}, also["command"])
        if family == "ledger":
            studies = [replace(read, ledger=family_of(looks)) for read in studies]
            payload = analysed(studies)
            for study in payload["studies"]:
                study["ledger"] = True
                study["notes"].append(NOTE.format(summary(looks)["text"]))
        payload |= also | {"ledger": summary(looks) if family == "ledger" else None}
        write_page(payload, page)
        files = [*write_csv(payload, out), *draw_report(payload, out / "plots", formats, tell)]
    except OSError as error:
        raise UserError(f"{error.filename or out} cannot be written: {error.strerror}; choose --out") from None
    return Report(payload, page, files)


def write_judgement(
    paths: Sequence[Path],
    how: How,
    asked: Asked,
    out: Path | None = None,
    formats: Sequence[str] = ("png",),
    command: str = "gptlab judge",
    version: str | None = None,
    tell: Tell = tell_nobody,
    family: str = "report",
) -> Report:
    """Judge runs that something else trained, and write report.html, CSV files and figures.

    Args:
        paths: files and folders of logs, read together.
        how: what is known of the logs.
        asked: what is asked of the runs.
        out: folder of the report; default results/judged-NAME, after the first path.
        formats, command, version, tell, family: as of `write_report`.

    Raises:
        UserError: no run, an option that does not fit them, or an `out` that holds something else.
    """
    if not how.metric:
        how = replace(how, metric=metric_asked(asked.questions))
    logs = read_logs(paths, how, tell)
    name = name_of(paths[0])
    out, sources = out or Path("results") / name, [str(path) for path in paths]
    _check_out(out, sources[0])
    tell("judging the runs", 0, 0)
    if asked.paired is None and how.seed in COUNTS:
        asked = replace(asked, paired=False)
    read = judge_logs(logs, asked, name, sources, command)
    also = {"gptlab": version, "command": command}
    report = _written([read], analyse, out, formats, tell, family, also, asked.at)
    write_atomically(out / JUDGED, json.dumps({"sources": sources, "command": command}) + "\n")
    return report


def _check_out(out: Path, source: str) -> None:
    """Raise UserError if the folder holds anything but an earlier judgement of this source."""
    try:
        held = out.exists() and (not out.is_dir() or any(out.iterdir()))
    except OSError as error:
        raise UserError(f"{out}: {because(error)}; choose --out") from None
    if not held:
        return
    earlier = RunDir(out).read_json(JUDGED) if (out / JUDGED).is_file() else {}
    sources = earlier.get("sources") if isinstance(earlier, dict) else None
    if not sources:
        raise UserError(f"{out} holds something else; choose --out")
    if sources[0] != source:
        raise UserError(f"{out} holds the judgement of {sources[0]}; choose --out")


def _control(studies: Sequence[ReadStudy], compare: str | Path | None) -> tuple[Comparison | None, ReadStudy | None]:
    """A comparison, and its control study if that was read."""
    if not compare:
        return None, None
    comparison = load_comparison(compare)
    control = comparison.control and comparison.control.study
    return comparison, next((read for read in studies if read.study.name == control), None)
