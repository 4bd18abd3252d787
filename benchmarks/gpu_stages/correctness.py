"""The tests marked `cuda` in tests/test_cuda.py, one item each.

The tests share one process, because starting Python with PyTorch takes seconds. The process ends if a test hangs or
breaks the CUDA context; `gpu.py` then restarts the stage for the remaining tests.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from gpu_stages.stage import BROKEN, Stage, pick, run

ROOT = Path(__file__).resolve().parents[2]
MOST = 60.0  # seconds; time limit of a test, most of which compiling may need
ENOUGH = 4.0  # seconds; no test starts with less time left
KEPT = 2500  # number of last characters of a failure's text that are kept


class Recorder:
    """A pytest plugin that records each test in the stage's file."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.reports: list[Any] = []

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self.session = session

    @staticmethod
    def name(nodeid: str) -> str:
        return nodeid.split("::", 1)[-1]

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        by_name = {self.name(item.nodeid): item for item in items if item.get_closest_marker("cuda")}
        items[:] = [by_name[name] for name in self.stage.todo(list(by_name))]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.reports = []
        self.stage.begin(self.name(nodeid), MOST * (10 if self.stage.tiny else 1))  # compiling for a CPU is slow

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.reports.append(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        failed = [report for report in self.reports if report.failed]
        skipped = [report for report in self.reports if report.skipped]
        name = self.name(nodeid)
        if failed:
            text = failed[0].longreprtext
            crash = getattr(failed[0].longrepr, "reprcrash", None)
            message = " ".join((crash.message if crash else text).split())[:300]
            ran_out = "OutOfMemoryError" in message
            self.stage.end(name, "out_of_memory" if ran_out else "failed", error=message, traceback=text[-KEPT:])
            if "CUDA error" in text or "AcceleratorError" in text:
                os._exit(BROKEN)
        elif skipped:
            self.stage.end(name, "not_applicable", error=str(skipped[0].longrepr[2])[:300])
        else:
            self.stage.end(name, "done")
        if self.stage.left() < ENOUGH:
            self.session.shouldstop = "the time is up"


def main(stage: Stage) -> None:
    device = pick(stage)
    if device.type != "cuda":
        os.environ["GPTLAB_CUDA_TESTS"] = device.type
    words = ["-m", "cuda", "-q", "--no-header", "--tb=short", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
    words += ["--rootdir", str(ROOT), "--basetemp", str(stage.work / "tests")]
    pytest.main([str(ROOT / "tests" / "test_cuda.py"), *words], plugins=[Recorder(stage)])


if __name__ == "__main__":
    run(main)
