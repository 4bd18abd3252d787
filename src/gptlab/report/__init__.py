"""Reports, plots and cards of finished and running runs, made from run directories only.

The package is also the function of this name: `gptlab.report("results/mine")` answers a study's questions.
"""

import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptlab.report.write import Report


class _Callable(ModuleType):
    def __call__(
        self,
        folder: str | Path,
        *more: str | Path,
        compare: str | Path | None = None,
        out: str | Path | None = None,
        quiet: bool = False,
    ) -> "Report":
        """Answer the questions of studies, and write report.html, CSV tables and figures.

        >>> gptlab.report("results/architecture-smoke")
        Report(architecture-smoke, answers={...}, page='results/architecture-smoke/report.html')

        A notebook shows the answers and the table of arms. `payload` has all numbers.

        Args:
            folder, more: of studies, finished or not.
            compare: a comparison of two studies: precision, or a TOML file.
            out: folder of the page; default: the study's own, or results/A-and-B of several.
            quiet: do not show how far it is.

        Raises:
            UserError: a folder without a study, or an `out` that cannot be written.
        """
        from gptlab.progress import Progress
        from gptlab.report.write import write_report
        from gptlab.version import VERSION

        folders = [Path(folder), *map(Path, more)]
        flags = [*(["--compare", str(compare)] if compare else []), *(["--out", str(out)] if out else [])]
        command = shlex.join(["gptlab", "study", "report", *map(str, folders), *flags])
        with Progress("opening the studies", not quiet) as shown:
            to = Path(out) if out else None
            return write_report(folders, compare, to, command=command, version=VERSION, tell=shown.tell)


if TYPE_CHECKING:
    report = _Callable(__name__)
else:
    report = sys.modules[__name__]
    report.__class__ = _Callable
