"""A report from study folders to files: one page, CSV tables and figures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from rich.console import Console

from gptlab.config import load_comparison
from gptlab.errors import UserError
from gptlab.progress import Tell, tell_nobody
from gptlab.report.analysis import analyse
from gptlab.report.estimates import Plain
from gptlab.report.figures import draw_report
from gptlab.report.page import write_page
from gptlab.report.studies import ReadStudy, read_study_folder
from gptlab.report.tables import print_report, report_html, write_csv


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
        answers = {question["id"]: question["answer"] for of in asked for question in of["questions"]}
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
    payload = _payload(studies, compare) | {"gptlab": version, "command": command}
    out = out or (folders[0] if len(studies) == 1 else Path("results") / "-and-".join(names))
    page = out / "report.html"
    try:
        write_page(payload, page)
        files = [*write_csv(payload, out), *draw_report(payload, out / "plots", formats, tell)]
    except OSError as error:
        raise UserError(f"{error.filename or out} cannot be written: {error.strerror}; choose --out") from None
    if console:
        print_report(payload, console)
    return Report(payload, page, files)


def _payload(studies: Sequence[ReadStudy], compare: str | Path | None) -> Plain:
    if not compare:
        return analyse(studies)
    comparison = load_comparison(compare)
    control = comparison.control and comparison.control.study
    return analyse(studies, comparison, next((read for read in studies if read.study.name == control), None))
