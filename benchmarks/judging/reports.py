"""Whole reports of planted studies: runs are written as folders, read back and analysed as `gptlab study report` does.

A report errs if anything in it is false: a verdict on an arm, an answer, or a recommendation.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator

from gptlab.config import Study
from gptlab.machine import cores
from gptlab.report import statistics as st
from gptlab.report.analysis import analyse
from gptlab.report.studies import read_study_folder
from gptlab.rundir import RunDir, run_name
from gptlab.study.folder import keep_study
from judging.rules import EFFECTS, Row
from judging.worlds import WORLDS, Array

SD, LOSS = 0.01, 3.0  # nats: of a healthy run, and where losses lie
TOKENS_PER_SECOND, SPEED_NOISE = 1000.0, 0.005  # of a run; relative
ARMS = ["base", "x_1", "x_2", "x_3", "x_4", "y_1", "y_2", "y_3", "y_4"]
QUESTIONS = [
    {"id": "better", "claim": "y_4 is better", "contrast": ["y_4", "base"], "confirmed_if": "better"},
    {"id": "equal", "claim": "x_2 is as good as x_1", "contrast": ["x_2", "x_1"], "confirmed_if": "equivalent"},
    {"id": "no worse", "claim": "x_3 costs nothing", "contrast": ["x_3", "base"], "confirmed_if": "not worse"},
    {"id": "grids", "claim": "the best x beats the best y", "contrast": ["x_*", "y_*"], "confirmed_if": "better"},
]
# For each planted truth the answers that are false. An open question is never false.
FALSE_ANSWERS = {
    "nothing differs": {"better": "confirmed", "equal": "rejected", "no worse": "rejected", "grids": "confirmed"},
    "one arm is better": {"better": "rejected", "equal": "rejected", "no worse": "rejected", "grids": "confirmed"},
    "all worse by the margin": {"better": "confirmed", "no worse": "confirmed"},
}
SPEEDUP = 1.5  # of arms that are worse by the margin
PLANTED = "y_4"
MOST_SEEDS = 12
PARTS = ("a verdict", "an answer", "a recommendation")
SIZE = f"{len(ARMS) - 1} arms, {len(QUESTIONS)} questions"
MEMORY = Path("/dev/shm")  # a disk takes as long to write a report's summaries as a processor to analyse them
LOOKED = ("equal noise, seeds share nothing", "unequal noise, lognormal 1", "one bad run in twenty, all arms")


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None)


class Folder:
    """A study's folder on disk. Everything but the summaries of its runs is written once.

    Args:
        margin: in sds of a run.
    """

    def __init__(self, path: Path, seeds: int, margin: float, until_decided: bool = False) -> None:
        self.path, self.arms, self.seeds = path, ARMS, seeds
        metric = {"name": "final_val_loss", "better": "lower", "margin": margin * SD}
        content: dict[str, Any] = {
            "name": "planted",
            "recipe": {"train": {"max_steps": 100}},
            "arms": {arm: {} for arm in ARMS},
        }
        content |= {"baseline": "base", "metric": metric, "seeds": list(range(seeds)), "questions": QUESTIONS}
        content |= {"until_decided": until_decided, "most_seeds": MOST_SEEDS}
        path.mkdir(parents=True)
        self.study = keep_study(path, Study.model_validate(content), [])
        lines = [json.dumps({"step": step, "loss": LOSS + 1 / step}) for step in range(10, 101, 10)]
        for arm in ARMS:
            for seed in self.study.seeds:
                run = RunDir(path / run_name(arm, seed))
                run.write_recipe(self.study.build(arm, seed))
                run.write_json("environment.json", {"device_name": "a machine", "torch": "2.13.0", "data": {}})
                run.metrics_file.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def report(self, losses: Array, speeds: Array) -> dict[str, Any]:
        """The report's content for losses and speeds, (arms, seeds), in sds and in shares of the usual speed."""
        for a, arm in enumerate(self.arms):
            for seed in range(self.seeds):
                result = {
                    "study": self.study.name,
                    "arm": arm,
                    "group": "core",
                    "seed": seed,
                    "status": "completed",
                    "steps": 100,
                    "tokens": 100_000,
                    "final_val_loss": LOSS + SD * float(losses[a, seed]),
                    "tokens_per_second": TOKENS_PER_SECOND * float(speeds[a, seed]),
                    "time_per_iter_ms": 1000 / float(speeds[a, seed]),
                    "peak_memory_gb": 10.0,
                }
                (self.path / f"{run_name(arm, seed)}.json").write_text(json.dumps(result), encoding="utf-8")
        payload: dict[str, Any] = analyse([read_study_folder(self.path)])["studies"][0]
        return payload


def false_in(report: Mapping[str, Any], truth: str) -> dict[str, bool]:
    """Which parts of a report are false: verdicts, answers, recommendations."""
    verdicts = {arm["name"]: arm["comparison"]["verdict"] for arm in report["arms"] if arm["comparison"]}
    said = {advice["id"]: advice["text"] for advice in report["recommendations"]}
    wrong = {"better", "worse"} if truth != "all worse by the margin" else {"better", "equivalent"}
    planted = {PLANTED} if truth == "one arm is better" else set()
    false_answers = FALSE_ANSWERS[truth]
    used = [text for text in said.values() if recommends(text) and not any(f"use {arm} " in text for arm in planted)]
    if truth == "all worse by the margin":
        used = [said["overall"]] if recommends(said["overall"]) else []
    return {
        "a verdict": any(verdict in wrong for arm, verdict in verdicts.items() if arm not in planted),
        "an answer": any(false_answers.get(answer["id"]) == answer["answer"] for answer in report["questions"]),
        "a recommendation": bool(used),
    }


def recommends(text: str) -> bool:
    """Whether a recommendation prefers one arm to another."""
    return ": use " in text and "neither is significantly faster" not in text


def found_in(report: Mapping[str, Any]) -> dict[str, bool]:
    """Which parts of a report say that the planted arm is better."""
    verdicts = {arm["name"]: arm["comparison"]["verdict"] for arm in report["arms"] if arm["comparison"]}
    answers = {answer["id"]: answer["answer"] for answer in report["questions"]}
    overall = next(advice["text"] for advice in report["recommendations"] if advice["id"] == "overall")
    return {
        "a verdict": verdicts[PLANTED] == "better",
        "an answer": answers["better"] == "confirmed",
        "a recommendation": f"use {PLANTED} " in overall,
    }


# -- scenarios: each returns the rows of one world --------------------------------------------------------------------


def draw_speeds(rng: Generator, seeds: int, ratio: float = 1.0) -> Array:
    speeds = np.exp(SPEED_NOISE * rng.standard_normal((len(ARMS), seeds)))
    speeds[1:] *= ratio
    return speeds


def one_report(truth: str, world: str, reports: int, seed: Sequence[int], seeds: int = 3) -> list[Row]:
    rng = np.random.default_rng(seed)
    margin = 6.0 if truth == "all worse by the margin" else 0.1
    false, found = Counter[str](), Counter[str]()
    with temporary_folder() as parent:
        folder = Folder(Path(parent) / "planted", seeds, margin)
        for x in WORLDS[world](rng, (reports, len(ARMS), seeds)):
            if truth == "one arm is better":
                x[ARMS.index(PLANTED)] -= EFFECTS[seeds]
            if truth == "all worse by the margin":
                x[1:] += margin
            report = folder.report(x, draw_speeds(rng, seeds, SPEEDUP if margin > 1 else 1.0))
            false += Counter(false_in(report, truth))
            found += Counter(found_in(report))
    effect = f"{EFFECTS[seeds]:g} sd" if truth == "one arm is better" else ""
    # Equivalence is 5% for each arm, so "some arm is equivalent" is not: what is recommended of it is.
    parts = [part for part in PARTS if truth != "all worse by the margin" or part != "a verdict"]
    return [
        Row(
            f"whole reports: {truth}",
            part,
            world,
            SIZE,
            seeds,
            st.ALPHA,
            false[part] / reports,
            reports,
            effect,
            found[part] / reports if effect else st.NAN,
        )
        for part in parts
    ]


def looks(truth: str, world: str, reports: int, seed: Sequence[int]) -> list[Row]:
    """A report after every seed from the third on, of studies that pay for the looks: each report's findings count."""
    rng = np.random.default_rng(seed)
    false = Counter[str]()
    with temporary_folder() as parent:
        folders = [Folder(Path(parent) / str(n), n, 0.1, until_decided=True) for n in range(3, MOST_SEEDS + 1)]
        for x in WORLDS[world](rng, (reports, len(ARMS), MOST_SEEDS)):
            speeds = draw_speeds(rng, MOST_SEEDS)
            seen = Counter[str]()
            for folder in folders:
                seen |= Counter(false_in(folder.report(x[:, : folder.seeds], speeds[:, : folder.seeds]), truth))
            false += seen
    return [
        Row("whole reports after every seed", part, world, SIZE, MOST_SEEDS, st.ALPHA, false[part] / reports, reports)
        for part in PARTS[:2]
    ]


def worlds_of(truth: str) -> Iterable[str]:
    return WORLDS if truth == "nothing differs" else LOOKED


def play(reports: int, seed: int) -> Iterator[Row]:
    """All scenarios, spread over the cores. Studies with looks are a quarter as many, as each has ten reports."""
    calls: list[tuple[Callable[..., list[Row]], str, str, int]]
    calls = [(one_report, truth, world, reports) for truth in FALSE_ANSWERS for world in worlds_of(truth)]
    calls += [(looks, "nothing differs", world, max(1, reports // 4)) for world in LOOKED]
    with ProcessPoolExecutor(cores()) as pool:
        running = [pool.submit(scenario, *args, (seed, k)) for k, (scenario, *args) in enumerate(calls)]
        for result in running:
            yield from result.result()
