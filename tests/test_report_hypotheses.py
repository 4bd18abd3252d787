"""H1 to H4 of the precision studies, from planted folders to the answers: confirmed, rejected and left open."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted import planted
from scipy import stats

from gptlab.config import Study, load_comparison, load_study
from gptlab.report.analysis import analyse
from gptlab.report.studies import read_study_folder

LM, CLS = "precision-lm", "precision-cls"
SEEDS = 3
HEAD, NAIVE, EIGHT_BIT, FAST = "amp_bf16_fp32_head", "fp16_naive", "amp_bf16_8bit_adam", "fp8_rowwise"
ARMS = [
    "fp32_baseline",
    "amp_fp16",
    "amp_bf16",
    "bf16_pure",
    "bf16_kahan",
    "fp8_tensorwise",
    HEAD,
    NAIVE,
    EIGHT_BIT,
    FAST,
]
Two = tuple[float, float]


@dataclass
class World:
    """What is true of language modelling, and of classification."""

    answers: str
    """Of H1 to H4: c(onfirmed), r(ejected), n(ot resolved)."""
    gains: Mapping[str, Two] = field(default_factory=dict)
    """Arm to how much better it is than the others, in margins."""
    noisy: Mapping[str, float] = field(default_factory=dict)
    """Arm to the standard deviation of its runs, in margins; 0.05 for others."""
    diverged: tuple[Mapping[tuple[str, int], int], Mapping[tuple[str, int], int]] = ({}, {})
    speed: Mapping[str, Two] = field(default_factory=dict)
    """Arm to its speed-up."""
    jitter: float = 0.002
    """Standard deviation of log speeds."""
    memory: Mapping[str, Two] = field(default_factory=dict)


ALL_LOST = {(NAIVE, 0): 5200, (NAIVE, 1): 7000, (NAIVE, 2): 9100}
CLS_LOST = {(NAIVE, 0): 900, (NAIVE, 1): 1100, (NAIVE, 2): 1300}
ONE_LOST = {(NAIVE, 1): 700}
WORLDS = {
    "confirmed": World(
        "cccc",
        gains={HEAD: (0, 5), EIGHT_BIT: (0, -10)},
        diverged=(ALL_LOST, CLS_LOST),
        speed={FAST: (1.5, 0.7)},
    ),
    "rejected": World("rrrr", diverged=(ALL_LOST, {}), speed={FAST: (1.5, 1.5)}, memory={FAST: (0.8, 0.8)}),
    "open": World(
        "nnnn",
        noisy={HEAD: 8, EIGHT_BIT: 8},
        diverged=(ONE_LOST, ONE_LOST),
        jitter=0.2,
    ),
    # both are worse, and one far more; two of three runs; a baseline that lost a run too
    "far more": World(
        "rccc",
        gains={HEAD: (5, 5), EIGHT_BIT: (-1.8, -10)},
        diverged=({k: ALL_LOST[k] for k in [*ALL_LOST][:2]}, CLS_LOST | {("fp32_baseline", 2): 44}),
        memory={FAST: (0.7, 1.4)},
    ),
    # as much worse in both; tasks that differ by less than counts, in speed and memory
    "as much": World(
        "rrrr",
        gains={HEAD: (-5, -5), EIGHT_BIT: (-5, -5)},
        diverged=({}, CLS_LOST),
        speed={FAST: (1.5, 1.5045), "bf16_kahan": (1.0, 1.003)},
        memory={FAST: (0.8, 0.7992), "bf16_kahan": (1.0, 0.999)},
    ),
    "more in the other": World("rrrc", gains={HEAD: (5, 0), EIGHT_BIT: (-10, -1.8)}, speed={FAST: (0.7, 1.5)}),
}


def report(folder: Path, world: World, arms: list[str], seed: int = 0) -> dict[str, Any]:
    """The payload of the two precision studies in a world."""
    rng, folders = np.random.default_rng(seed), []
    for i, name in enumerate((LM, CLS)):
        study: Study = load_study(name)
        unit = study.metric.margin * (-1 if study.metric.better == "lower" else 1)
        common = rng.normal(0.6 if i else 3.0, 2 * study.metric.margin, SEEDS)
        values, speeds = {}, {}
        for arm in arms:
            own = rng.normal(world.gains.get(arm, (0, 0))[i], world.noisy.get(arm, 0.05), SEEDS)
            values[arm] = (common + unit * own).tolist()
            speeds[arm] = (1e3 * world.speed.get(arm, (1, 1))[i] * np.exp(rng.normal(0, world.jitter, SEEDS))).tolist()
        memory = {arm: 10 * ratio[i] for arm, ratio in world.memory.items()}
        folders.append(planted(folder / name, study, values, speeds, memory, world.diverged[i]))
    return analyse([read_study_folder(path) for path in folders], load_comparison("precision"))


def replies(payload: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Question and recommendation of the comparison by id."""
    across = payload["across"]
    advice = {one["id"]: one["text"] for one in across["recommendations"]}
    return {q["id"]: {**q, "advice": advice[q["id"]]} for q in across["questions"]}


def letters(payload: Mapping[str, Any]) -> str:
    return "".join(q["answer"][0] for q in payload["across"]["questions"])


@pytest.fixture(scope="module")
def payload(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """The payload of a world with the arms that the questions name and a few others; made once."""
    return functools.cache(lambda name: report(tmp_path_factory.mktemp("world"), WORLDS[name], ARMS))


Payloads = Callable[[str], dict[str, Any]]
RARE = ("rejected", "more in the other")  # what they have in common with others is tried in every run


@pytest.mark.parametrize("name", [pytest.param(w, marks=[pytest.mark.slow] * (w in RARE)) for w in WORLDS])
def test_planted_worlds_are_answered(name: str, payload: Payloads) -> None:
    assert letters(payload(name)) == WORLDS[name].answers


@pytest.mark.slow
@pytest.mark.parametrize("name", WORLDS)
def test_planted_worlds_are_answered_by_whole_studies_whatever_the_noise(name: str, tmp_path: Path) -> None:
    arms = list(load_study(LM).arms)
    for seed in range(1, 6):
        assert letters(report(tmp_path / str(seed), WORLDS[name], arms, seed)) == WORLDS[name].answers, seed


def test_what_is_confirmed_is_said_with_its_numbers(payload: Payloads) -> None:
    told = replies(payload("confirmed"))
    h2, h3, h4 = told["H2"], told["H3"], told["H4"]
    assert "at steps 5,200 to 9,100, median 7,000 (non_finite 3)" in h2["text"]
    assert "at steps 900 to 1,300, median 1,100 (non_finite 3)" in h2["text"]
    assert (
        "the first 5,000 steps, which both studies ran, 0 of 3 in precision-lm and 3 of 3 in precision-cls"
        in h2["text"]
    )
    assert h2["divergence"][LM]["steps"] == [5200, 7000, 9100] and h2["times"]["p"] == h2["times"]["least_p"] == 0.1
    assert "do not use fp16_naive; 3 of 3 runs of fp16_naive diverged (non_finite)" in h2["advice"]
    assert "Worse by more in precision-cls than in precision-lm, by more than a margin" in h3["text"]
    assert h4["text"].startswith("on the frontier of speed and memory in precision-lm only: fp8_rowwise")
    assert h4["advice"] == (
        "for language modelling on a machine: use fp8_rowwise, at 1.50 times the speed and 1.00 times the memory of "
        "fp32_baseline; validation loss is equivalent"
    )
    assert "fp8_rowwise: 1.50 and 1.00 in precision-lm, 0.70 and 1.00 in precision-cls" in h4["text"]
    assert (h4["frontier"][FAST][LM]["pays"], h4["frontier"][FAST][CLS]["pays"]) == (True, False)
    assert "left out: fp16_naive (diverged in precision-lm and precision-cls)" in h4["text"]


def test_one_diverged_run_is_a_fact_and_no_finding(payload: Payloads) -> None:
    told = replies(payload("open"))["H2"]
    assert "1 of 3 runs diverged" in told["text"] and "too few to say that it diverges more often" in told["text"]
    assert "do not use" not in told["advice"]
    naive = next(arm for arm in payload("open")["studies"][0]["arms"] if arm["name"] == NAIVE)
    assert naive["comparison"]["verdict"] == "diverges" and naive["comparison"]["p"] == pytest.approx(3 / 30)
    assert naive["divergence"]["others"] == [0, 27]


def test_a_baseline_that_lost_a_seed_silences_no_verdict(payload: Payloads) -> None:
    study = payload("far more")["studies"][1]
    said = {arm["name"]: arm["comparison"] for arm in study["arms"] if arm["comparison"] and arm["statuses"]}
    assert said[NAIVE]["verdict"] == "diverges" and {c["n"] for arm, c in said.items() if arm != NAIVE} == {2}
    note = "compared over the 2 seeds in which fp32_baseline did not diverge (it did in seed 2)"
    assert all(note in c["text"] for arm, c in said.items() if arm != NAIVE)
    assert study["recommendations"][0]["text"].endswith(
        "compared over the seeds in which fp32_baseline did not diverge (it did in seed 2)"
    )


def test_the_reason_is_a_baseline_that_broke(tmp_path: Path) -> None:
    lost = {("fp32_baseline", 0): 4, ("fp32_baseline", 2): 44}
    values = {"fp32_baseline": [9.0, 3.1, 9.0], "amp_bf16": [3.0, 3.1, 3.2]}
    (study,) = analyse([read_study_folder(planted(tmp_path / "lm", LM, values, diverged=lost))])["studies"]
    said = {arm["name"]: arm["comparison"] for arm in study["arms"] if arm["comparison"] and arm["statuses"]}
    assert said["amp_bf16"]["verdict"] == "reference diverges"
    assert study["recommendations"][0]["text"] == (
        "no arm is recommended for language modelling on a machine: 2 of 3 runs of fp32_baseline diverged, so no arm "
        "can be compared with it"
    )


def test_an_arm_that_is_worse_in_quality_is_on_no_frontier(tmp_path: Path) -> None:
    world = World("", gains={FAST: (-25, 0)}, speed={FAST: (1.5, 0.7)})
    told = replies(report(tmp_path, world, ["fp32_baseline", "amp_bf16", FAST]))["H4"]
    assert told["answer"] == "rejected" and FAST not in told["frontier"]
    assert "fp8_rowwise (worse than fp32_baseline in precision-lm)" in told["text"]


def test_an_arm_of_unknown_quality_is_not_advised(tmp_path: Path) -> None:
    world = World("", noisy={FAST: 8}, speed={FAST: (1.5, 0.7)})
    told = replies(report(tmp_path, world, ["fp32_baseline", "amp_bf16", FAST]))["H4"]
    assert told["answer"] == "confirmed" and "use fp8_rowwise" not in told["advice"]
    assert "fp8_rowwise, at 1.50 times the speed and 1.00 times the memory of fp32_baseline" in told["advice"]
    assert "but its validation loss is not shown to be as good" in told["advice"]


@pytest.mark.slow
def test_runs_that_break_by_chance_lead_to_no_advice(tmp_path: Path) -> None:
    """Whole reports of two studies in which every run diverges with the same chance and nothing differs."""
    draw, pairs, advised, confirmed = np.random.default_rng(0), 40, 0, 0
    arms = list(load_study(LM).arms)
    for i in range(pairs):
        lost = [
            {(arm, seed): int(draw.integers(50, 4000)) for arm in arms for seed in range(SEEDS) if draw.random() < 0.02}
            for _ in range(2)
        ]
        payload = report(
            tmp_path / str(i), World("", noisy=dict.fromkeys(arms, 1.0), diverged=(lost[0], lost[1])), arms, i
        )
        parts = [*payload["studies"], payload["across"]]
        advised += any("do not use" in advice["text"] for part in parts for advice in part["recommendations"])
        confirmed += any(q["id"] == "H2" and q["answer"] == "confirmed" for part in parts for q in part["questions"])
    assert max(advised, confirmed) <= stats.binom.ppf(0.999, pairs, 0.05)
