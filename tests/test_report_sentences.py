"""The plain sentences of a report: each verdict's words, what they rest on, and that they say what the numbers say."""

import math
import re
from typing import Any

import numpy as np
import pytest
from scipy import stats
from test_report_analysis import made, noise, shifted

from gptlab.config import Comparison
from gptlab.report import sentences
from gptlab.report import statistics as st
from gptlab.report.analysis import analyse
from gptlab.report.divergence import Divergence, fisher
from gptlab.report.questions import divergence_data


def row(**changes: Any) -> dict[str, Any]:
    """A comparison of muon with adamw, as `comparison_data` makes it."""
    found: dict[str, Any] = {
        "study": "lm",
        "a": "muon",
        "b": "adamw",
        "of": ["muon", "adamw"],
        "edges": ["", ""],
        "metric": "final_val_loss",
        "label": "validation loss, nats per token",
        "better": "lower",
        "margin": 0.02,
        "verdict": "better",
        "n": 3,
        "mean": -0.307,
        "low": -0.402,
        "high": -0.212,
        "p": 0.005,
        "p_holm": 0.025,
        "p_equivalent": 0.9,
        "more_seeds": None,
        "why": "",
        "family": 5,
        "wins": 3,
        "runs": None,
        "holds_from": None,
        "diverged": [0, 3],
        "reference_diverged": [0, 3],
        "reason": None,
        "started": [3, 3],
        "speed": {"value": 0.83, "low": 0.8, "high": 0.86},
        "memory_ratio": 1.1,
        "steps_ratio": 1.0,
        "divergence": None,
        "most_seeds": None,
        "hopeless": False,
    }
    assert changes.keys() <= found.keys()
    return found | changes


LUCK = "if there were no difference, at most 2.5% of such studies would show one this clear."
OPEN = {"verdict": "not resolved", "mean": 0.0117, "low": -0.06, "high": 0.084, "p": 0.5, "p_holm": 1.0}
GRIDS = {"a": "muon_3", "b": "adamw_2", "of": ["muon_*", "adamw_*"]}
ALIKE = {
    "verdict": "equivalent",
    "mean": 0.003,
    "low": -0.002,
    "high": 0.008,
    "p_equivalent": 0.004,
    "holds_from": 0.0071,
}
NO_RUN = {
    "verdict": "not run",
    "n": 0,
    **dict.fromkeys(("mean", "low", "high", "p", "p_holm", "speed", "memory_ratio")),
}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {},
            "muon is better than adamw here: lower validation loss by 0.31 (0.21 to 0.40) nats per token, in 3 of 3 "
            f"seeds; {LUCK}",
        ),
        (
            {"verdict": "worse", "mean": 0.307, "low": 0.212, "high": 0.402, "wins": 1},
            "muon is worse than adamw here: higher validation loss by 0.31 (0.21 to 0.40) nats per token, in 2 of 3 "
            f"seeds; {LUCK}",
        ),
        (
            {"better": "higher", "label": "micro-F1", "mean": 0.307, "low": 0.212, "high": 0.402, **GRIDS},
            "the best of muon_* (muon_3) is better than the best of adamw_* (adamw_2) here: higher micro-F1 by 0.31 "
            f"(0.21 to 0.40), in 3 of 3 seeds; {LUCK}",
        ),
        (
            ALIKE,
            "muon is as good as adamw here, within 0.02 nats per token of validation loss: the difference is +0.003 "
            "over 3 seeds, and shown to be under 0.0071; if it were 0.02, at most 0.4% of such studies would look this "
            "alike.",
        ),
        (
            {**ALIKE, "mean": 0.0, "p_equivalent": 0.0},
            "muon is as good as adamw here, within 0.02 nats per token of validation loss: the results are identical "
            "in 3 seeds.",
        ),
        (
            OPEN,
            "It is open whether muon or adamw is better here: the first minus the second is +0.01 (-0.06 to 0.08) nats "
            "per token in validation loss, over 3 seeds.",
        ),
        (
            {**OPEN, "n": 1, "low": None, "high": None},
            "It is open whether muon or adamw is better here: the first minus the second is +0.0117 nats per token in "
            "validation loss, in the one seed so far.",
        ),
        (
            {**OPEN, "n": 0},
            "It is open whether muon or adamw is better here: no seed has a completed run of both with a validation "
            "loss.",
        ),
        (
            {**OPEN, "why": "differs, perhaps by less than the margin"},
            "muon differs from adamw here, but it is open whether by more than the margin of 0.02: the first minus the "
            "second is +0.01 (-0.06 to 0.08) nats per token in validation loss, over 3 seeds.",
        ),
        (
            {"verdict": "diverges", "diverged": [2, 3]},
            "muon diverges here: 2 of 3 runs did, and 0 of 3 of adamw, so they are not compared.",
        ),
        (
            {"verdict": "reference diverges", "reference_diverged": [1, 3]},
            "It is open whether muon or adamw is better here: 1 of 3 runs of adamw diverged, and 0 of 3 of muon.",
        ),
        ({**NO_RUN, "started": [0, 3]}, "muon has no run yet, so muon and adamw are not compared."),
        ({**NO_RUN, "started": [0, 0]}, "Neither muon nor adamw has a run yet, so muon and adamw are not compared."),
    ],
)
def test_every_verdict_has_its_sentence(changes: dict[str, Any], sentence: str) -> None:
    assert sentences.finding(row(**changes)) == sentence
    there = sentences.finding(row(**changes), "in lm")
    assert there == (sentence.replace(" yet,", " in lm,") if "yet" in sentence else sentence.replace(" here", " in lm"))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, "muon runs at 0.83 (0.80 to 0.86) times the speed of adamw and takes 1.10 times as much memory."),
        (
            {"speed": {"value": 0.9, "low": 0.6, "high": 1.4}, "memory_ratio": 1.001},
            "muon may be faster or slower than adamw, 0.90 (0.60 to 1.40) times its speed, and takes as much memory.",
        ),
        (
            {"speed": {"value": 1.0, "low": 0.98, "high": 1.02}, "memory_ratio": None},
            "muon runs about as fast as adamw.",
        ),
        (
            {"speed": {"value": 0.9, "low": None, "high": None}, "memory_ratio": None},
            "muon runs at 0.90 times the speed of adamw.",
        ),
        ({"speed": None}, "muon takes 1.10 times as much memory as adamw."),
        ({"speed": None, "memory_ratio": None}, ""),
        (
            {"speed": None, "memory_ratio": None, "steps_ratio": 2.0},
            "muon trains for 2.00 times as many steps.",
        ),
        ({"metric": "tokens_per_second"}, ""),  # what was asked about is no cost
        ({"verdict": "diverges"}, ""),
    ],
)
def test_the_cost_is_told_with_its_interval(changes: dict[str, Any], sentence: str) -> None:
    assert sentences.cost(row(**changes)) == sentence


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, "A margin above 0.31 nats per token would make it too small to matter."),
        (
            {**GRIDS, "edges": ["optim.lr = 0.04 is the largest", ""]},
            "A margin above 0.31 nats per token would make it too small to matter. muon_3 lies at the edge of its grid "
            "(optim.lr = 0.04 is the largest): settings beyond it may be better.",
        ),
        (ALIKE, "A margin below 0.0071 nats per token would leave it open."),
        (
            {**ALIKE, "holds_from": 0.0, "p_equivalent": 0.02},
            "Taken as one of 5 comparisons it is not shown (p = 0.1).",
        ),
        (
            {**OPEN, "more_seeds": 17},
            "17 more seeds would settle it in four of five cases if the difference and the spread are as seen, but that"
            " second look raises the chance of a false finding from 5% to about 11%.",
        ),
        (
            {**OPEN, "p": 0.02, "p_holm": 0.1},
            "Taken alone it would count, but not as one of 5 comparisons.",
        ),
        ({**OPEN, "n": 1}, "Two seeds or more that both have completed are needed."),
        ({**OPEN, "margin": None, "why": "no margin"}, "No margin is stated, so nothing is called as good as another."),
        ({**OPEN, "why": "every seed shows the same difference"}, "Every seed shows the same difference."),
        ({"verdict": "diverges", "diverged": [2, 3]}, "How often it diverges takes more seeds to say."),
        ({**NO_RUN, "started": [0, 3]}, "Run it: gptlab study run 'my results/lm' --arm muon."),
        ({**NO_RUN, **GRIDS, "started": [0, 3]}, "Run it: gptlab study run 'my results/lm'."),
        ({**NO_RUN, "reason": "TF32 needs a GPU"}, "It needs another machine: TF32 needs a GPU."),
    ],
)
def test_what_would_change_the_answer(changes: dict[str, Any], sentence: str) -> None:
    assert sentences.outlook(row(**changes), "my results/lm") == sentence


def test_two_studies_have_a_sentence_each() -> None:
    told = sentences.answer([row(), row(**OPEN, study="cls")], {"lm": "results/lm", "cls": "results/cls"})
    first, second = told["sentence"].split(" It is open whether muon or adamw is better in cls: ")
    assert first.startswith("muon is better than adamw in lm: ") and second.startswith("the first minus")
    assert told["cost"].startswith("lm: muon runs") and " cls: muon runs" in told["cost"]
    alone = sentences.answer([row()], {"lm": "results/lm", "cls": "results/cls"})["sentence"]
    assert alone.startswith("muon is better than adamw in lm") and alone.endswith(" cls has no such arms.")


@pytest.mark.parametrize(
    ("p", "text"), [(0.025, "2.5%"), (0.0251, "2.6%"), (0.31, "31%"), (1.0, "100%"), (1e-9, "0.01%"), (0.07, "7%")]
)
def test_chances_are_rounded_up(p: float, text: str) -> None:
    assert sentences.chance(p) == text
    assert float(text[:-1]) / 100 >= p - 1e-12


def test_a_study_without_questions_has_a_summary() -> None:
    def arm(name: str, verdict: str, mean: float = -0.307) -> dict[str, Any]:
        return {"name": name, "comparison": row(a=name, of=[name, "adamw"], verdict=verdict, mean=mean)}

    arms = [arm(f"x{i}", "not resolved") for i in range(5)]
    arms += [
        arm("b1", "better"),
        arm("b2", "better", -0.35),
        arm("w", "worse"),
        arm("d", "diverges"),
        arm("n", "not run"),
    ]
    told = sentences.summary([{"name": "adamw", "comparison": None}, *arms], "adamw", "lower")
    assert told.startswith(
        "Of 10 arms compared with adamw, 2 are better (b1, b2), 1 is worse (w), 5 are open, 1 diverges (d) and 1 was "
        "not run (n). b2 is better than adamw here: lower validation loss by 0.35"
    )
    assert sentences.summary([{"name": "adamw", "comparison": None}], "adamw", "lower") == ""
    assert sentences.summary(arms[:1], "adamw", "lower") == "Of 1 arm compared with adamw, 1 is open (x0)."


# -- from runs


def asked(confirmed_if: str, values: dict[str, Any], contrast: tuple[str, str] = ("x", "base"), **more: Any) -> dict:
    question = {"id": "Q", "claim": "c", "contrast": list(contrast), "confirmed_if": confirmed_if}
    (reply,) = analyse([made(values, questions=[question], **more)])["studies"][0]["questions"]
    return reply


def test_the_numbers_of_a_sentence_are_those_of_the_runs() -> None:
    rng = np.random.default_rng(0)
    base = noise(rng, 4)
    x = shifted(base, -0.05, rng, 0.01)
    reply = asked("better", {"base": base, "x": x}, speeds={"x": 500.0}, memory={"x": 12.0})
    test = stats.ttest_rel(x, base)
    low, high = test.confidence_interval()
    found = re.fullmatch(
        r"x is better than base here: lower validation loss by ([\d.]+) \(([\d.]+) to ([\d.]+)\) nats per token, in 4"
        r" of 4 seeds; if there were no difference, at most ([\d.]+)% of such studies would show one this clear.",
        reply["sentence"],
    )
    assert found
    assert [float(one) for one in found.groups()[:3]] == pytest.approx(
        [np.mean(base) - np.mean(x), -high, -low], abs=6e-4
    )
    assert 0 <= float(found[4]) / 100 - test.pvalue < 0.1 * test.pvalue + 1e-4
    assert re.match(
        r"x runs at 0\.\d\d \(0\.4\d to 0\.5\d\) times the speed of base and takes 1\.20 times", reply["cost"]
    )
    (one,) = reply["comparisons"]
    assert (one["wins"], one["n"], one["family"], one["memory_ratio"]) == (4, 4, 1, pytest.approx(1.2))


def test_the_smallest_margin_that_holds_is_where_the_test_of_equivalence_turns() -> None:
    rng = np.random.default_rng(3)
    base = noise(rng, 5)
    x = shifted(base, 0.001, rng, 0.001)
    (one,) = asked("equivalent", {"base": base, "x": x})["comparisons"]
    d = np.subtract(x, base)
    reach = abs(d.mean()) + stats.t.ppf(0.95, 4) * d.std(ddof=1) / math.sqrt(5)
    assert one["verdict"] == "equivalent" and one["holds_from"] == pytest.approx(reach, abs=0.01 * 0.011)
    (same,) = asked("equivalent", {"base": base, "x": base})["comparisons"]
    assert (same["verdict"], same["holds_from"]) == ("equivalent", 0.0)


def test_what_was_not_run_is_not_open() -> None:
    base = [3.0, 3.1, 3.2]
    for values, sentence in (
        ({"base": base, "x": [None] * 3}, "x has no run yet"),
        ({"base": [None] * 3, "x": base}, "base has no run yet"),
        ({"base": [None] * 3, "x": [None] * 3}, "Neither x nor base has a run yet"),
    ):
        reply = asked("better", values)
        assert reply["answer"] == reply["comparisons"][0]["verdict"] == "not run"
        assert reply["sentence"].startswith(sentence) and reply["change"].startswith(
            "Run it: gptlab study run results/made"
        )
    started = asked("better", {"base": base, "x": [math.nan] * 3})  # runs that ended without a loss are runs
    assert started["answer"] == "not resolved" and started["sentence"].startswith("It is open whether x or base")
    one = asked("better", {"base": base, "x_1": [None] * 3, "x_2": [3.0]}, ("x_*", "base"))
    assert one["answer"] == "not resolved"  # one arm of the grid was run
    none = asked("better", {"base": base, "x_1": [None] * 3, "x_2": [None]}, ("x_*", "base"))
    assert none["answer"] == "not run" and none["sentence"].startswith("x_* has no run yet")


def test_an_arm_that_the_hardware_cannot_run_was_not_run() -> None:
    read = made(
        {"base": [3.0, 3.1], "x": [3.0, 3.1]},
        questions=[{"id": "Q", "claim": "c", "contrast": ["x", "base"], "confirmed_if": "better"}],
    )
    for seed in (0, 1):
        run = read.runs["x", seed]
        run.status, run.result = "not_applicable", {"status": "not_applicable", "reason": "TF32 needs a GPU"}
    study = analyse([read])["studies"][0]
    assert study["arms"][1]["comparison"]["verdict"] == study["questions"][0]["answer"] == "not run"
    assert study["questions"][0]["change"] == "It needs another machine: TF32 needs a GPU."
    assert study["summary"] == "Of 1 arm compared with base, 1 was not run (x)."


def test_a_comparison_of_studies_without_runs_was_not_run() -> None:
    both = {"compare": ["one", "two"], "name": "both"}
    questions = [
        {"id": "H1", "claim": "c", "contrast": ["x", "base"], "confirmed_if": "equivalent in one, better in two"},
        {"id": "H4", "claim": "c", "confirmed_if": "frontier differs"},
    ]
    comparison = Comparison.model_validate({**both, "questions": questions})
    nothing: dict[str, Any] = {"base": [None] * 3, "x": [None] * 3}
    base = [3.0, 3.1, 3.2]
    for first, answers in ((nothing, ["not run"] * 2), ({"base": base, "x": base}, ["not resolved", "not run"])):
        told = analyse([made(first, name="one"), made(nothing, name="two")], comparison)["across"]
        assert [question["answer"] for question in told["questions"]] == answers
        assert "in two" in told["questions"][0]["sentence"]


# -- questions about divergence, about two studies, about a number


def lost(diverged: int, runs: int, others: tuple[int, int] = (0, 54)) -> dict[str, Any]:
    p = fisher((diverged, runs), others)
    one = Divergence(diverged, runs, others, p, p, 1)
    return row(of=["x", "base"], a="x", b="base", divergence=divergence_data(one))


@pytest.mark.parametrize(
    ("found", "sentence", "change"),
    [
        (
            lost(3, 3),
            "x diverges here: 3 of 3 runs did, and 0 of 54 of the study's other arms; if it were no more prone to it "
            "than they, at most 0.01% of such studies would show this.",
            "How often it diverges takes more seeds to say.",
        ),
        (
            lost(1, 3),
            "It is open whether x diverges more often than other arms here: 1 of 3 runs did, and 0 of 54 of the "
            "study's other arms.",
            "More seeds would tell.",
        ),
        (
            lost(0, 3),
            "x does not diverge in two of three runs here: 0 of 3 did; if it were so, at most 3.8% of such studies "
            "would show so few.",  # (1/3)^3 = 3.7037%
            "",
        ),
        (
            lost(0, 2),
            "It is open whether x diverges here: none of 2 runs did, too few to say.",
            "More seeds would tell.",
        ),
    ],
)
def test_a_question_about_divergence_is_answered_about_divergence(
    found: dict[str, Any], sentence: str, change: str
) -> None:
    assert (sentences.finding(found), sentences.cost(found), sentences.outlook(found, "f")) == (sentence, "", change)


@pytest.mark.parametrize(
    ("verdict", "mean", "sentence"),
    [
        (
            "worse",
            -3.2,
            "It loses more in cls than in lm, by 3.2 (1.8 to 4.6) margins; if there were no difference, at most 2.5% "
            "of such studies would show one this clear.",
        ),
        (
            "better",
            3.2,
            "It gains more in cls than in lm, by 3.2 (1.8 to 4.6) margins; if there were no difference, at most 2.5% "
            "of such studies would show one this clear.",
        ),
        ("equivalent", 0.1, "The difference is the same in cls and lm, within a margin."),
        (
            "not resolved",
            1.0,
            "It is open whether it differs by more in cls than in lm: the first minus the second is +1.0 (-0.4 to 2.4) "
            "margins.",
        ),
    ],
)
def test_a_difference_of_two_studies_has_a_sentence(verdict: str, mean: float, sentence: str) -> None:
    d = st.Difference(3, mean, math.nan, mean - 1.4, mean + 1.4, 0.01)
    assert sentences.by_more(verdict, d, 0.025, "cls", "lm") == sentence
    nothing = st.Difference(0, math.nan, math.nan, math.nan, math.nan, math.nan)
    assert sentences.by_more("not resolved", nothing, 1.0, "cls", "lm").endswith("than in lm is open.")


def test_frontiers_have_a_sentence() -> None:
    told = sentences.frontier(["lm", "cls"], {"lm": ["x"], "cls": []}, ["a", "b"], [], "confirmed")
    assert told == "Choose by task: time or memory is saved in lm alone with x and in both with a, b."
    told = sentences.frontier(["lm", "cls"], {"lm": [], "cls": []}, ["a"], [], "rejected")
    assert told == "The same arms save time or memory in lm and cls: a."
    told = sentences.frontier(["lm", "cls"], {"lm": [], "cls": []}, [], ["y"], "not resolved")
    assert told == "It is open whether the same arms save time or memory in lm and cls; not known of y."


def test_a_study_that_adds_seeds_says_how_and_names_no_number_of_seeds() -> None:
    told = sentences.outlook(row(**OPEN, most_seeds=12), "results/lm")
    assert told == "Add seeds: gptlab study run results/lm --until-decided; looks are paid for."
    told = sentences.outlook(row(**OPEN, most_seeds=12, hopeless=True), "results/lm")
    assert told == "A verdict within 12 seeds is unlikely (below 10%), so it gets no more seeds."
    told = sentences.outlook(row(**{**OPEN, "n": 12}, most_seeds=12), "results/lm")
    assert told == "It is open after 12 seeds, as many as were planned."


def test_seeds_in_which_the_reference_diverged_are_named() -> None:
    told = sentences.finding(row(n=2, wins=2, reference_diverged=[1, 3]))
    assert "in 2 of 2 seeds in which adamw did not diverge; if there were" in told


@pytest.mark.parametrize(
    ("values", "answer", "sentence"),
    [
        (
            [3.27, 3.271, 3.272],
            "confirmed",
            r"x is at most 3.28 in mean validation loss here: 3.271 \(3.269 to 3.273\)",
        ),
        (
            [3.29, 3.291, 3.292],
            "rejected",
            r"x is above 3.28 in mean validation loss here: .* would show one as high\.$",
        ),
        (
            [3.27, 3.29, 3.28],
            "not resolved",
            r"It is open whether x is at most 3.28 in mean validation loss here: 3.28",
        ),
        ([None] * 3, "not run", r"x has no run yet\.$"),
    ],
)
def test_a_question_against_a_number_has_a_sentence(values: list[Any], answer: str, sentence: str) -> None:
    question = {"id": "T", "claim": "c", "contrast": ["x"], "target": 3.28}
    (reply,) = analyse([made({"base": [3.3] * 3, "x": values}, questions=[question])])["studies"][0]["questions"]
    assert reply["answer"] == answer and re.match(sentence, reply["sentence"])
    assert (reply["cost"], reply["change"], reply["comparisons"]) == ("", "", [])
