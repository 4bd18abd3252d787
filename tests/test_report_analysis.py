"""What a report says: planted effects are found and named, noise is not; what people's folders are like is survived."""

import json
import math
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from gptlab.cli import main
from gptlab.config import Comparison, Study, load_comparison, load_study, shipped
from gptlab.errors import ConfigError, UserError
from gptlab.report import statistics as st
from gptlab.report import verdicts
from gptlab.report.advice import shown_as_good
from gptlab.report.analysis import analyse
from gptlab.report.power import Noise, pilot_noise, power_report
from gptlab.report.questions import answer_questions
from gptlab.report.studies import ReadRun, ReadStudy, read_study_folder
from gptlab.report.tables import print_report, write_csv
from gptlab.report.write import write_report

Arms = Mapping[str, Iterable[float]]


def make_study(arms: Iterable[str], name: str = "made", task: str = "lm", **more: Any) -> Study:
    better = {"lm": ("final_val_loss", "lower"), "classify": ("micro_f1", "higher")}[task]
    recipe = {"task": task, "train": {"max_steps": 100}, "model": {"mlp": "gelu_erf"}, "optim": {"lr": 6e-4}}
    base = {
        "name": name,
        "recipe": recipe,
        "arms": {arm: {"note": f"what {arm} is"} for arm in arms},
        "baseline": "base",
        "metric": {"name": better[0], "better": better[1], "margin": 0.01},
    }
    return Study.model_validate({**base, **more})


def made(
    values: Arms,
    speeds: Mapping[str, float] | None = None,
    memory: Mapping[str, float] | None = None,
    diverged: Iterable[tuple[str, int]] = (),
    **more: Any,
) -> ReadStudy:
    """A study read from nowhere: seed k of an arm has the arm's k-th value; a value of None is a missing run."""
    study = make_study(values, **more)
    key, unit = study.metric.name, "samples" if study.recipe["task"] == "classify" else "tokens"
    rng = np.random.default_rng(1)
    runs = {}
    for arm, row in values.items():
        for seed, value in enumerate(row):
            if value is None:
                continue
            status = "diverged" if (arm, seed) in set(diverged) else "completed"
            rate = (speeds or {}).get(arm, 1000.0) * math.exp(0.01 * rng.standard_normal())
            result = {
                "status": status,
                key: value,
                "steps": 100,
                unit: 1000,
                f"{unit}_per_second": rate,
                "peak_memory_gb": (memory or {}).get(arm, 10.0),
            }
            if status == "diverged":
                result |= {
                    "failed_at_step": 7,
                    "failure": "non_finite",
                    "failed_tensor": "logits",
                    "reason": "no number",
                }
            at = np.arange(5.0, 101, 5)
            nothing = (np.array([]), np.array([]))
            curves = {"loss": (at, 5 - at / 50), "val_loss": nothing, f"{unit}_per_second": (at, np.full(20, rate))}
            run = ReadRun(arm, seed, Path(f"{arm}_seed{seed}"), status, result, curves, {"device_name": "a machine"})
            runs[arm, seed] = run
    return ReadStudy(study, Path("results/made"), runs, [])


def noise(rng: np.random.Generator, n: int, sd: float = 0.01, mean: float = 3.0) -> list[float]:
    return (mean + sd * rng.standard_normal(n)).tolist()


def shifted(base: list[float], by: float, rng: np.random.Generator, sd: float = 1e-4) -> list[float]:
    return [value + by + sd * rng.standard_normal() for value in base]


QUESTION = {"id": "Q", "claim": "x differs", "contrast": ["x", "base"]}


def one(confirmed_if: str, rejected_if: str = "", **study: Any) -> tuple[str, str]:
    """Answer and recommendation of a question on x against base."""
    question = {**QUESTION, "confirmed_if": confirmed_if, "rejected_if": rejected_if}
    read = made(**study, questions=[question])
    ((reply, advice),) = answer_questions(read.study.questions, {read.study.name: read})
    return reply["answer"], advice["text"]


def test_each_rule_fires_on_what_is_planted() -> None:
    rng = np.random.default_rng(0)
    base = noise(rng, 4)
    lower, higher, same = (shifted(base, by, rng) for by in (-0.05, 0.05, 0.0))
    here, cost = "for language modelling on a machine", "at 1.00 times the speed and 1.00 times the memory of"
    better = {"values": {"base": base, "x": lower}}
    worse = {"values": {"base": base, "x": higher}}
    equal = {"values": {"base": base, "x": same}}
    assert one("better", **better) == (
        "confirmed",
        f"{here}: use x rather than base, for better validation loss, {cost} base",
    )
    assert one("not better", **better)[0] == one("worse", **better)[0] == "rejected"
    assert one("worse", **worse) == (
        "confirmed",
        f"{here}: use base rather than x, for better validation loss, {cost} x",
    )
    assert one("better", "equivalent", **worse)[0] == "not resolved"  # only what was said beforehand rejects it
    assert one("better", "equivalent", **equal)[0] == "rejected"
    assert one("not worse", **equal)[0] == one("equivalent", **equal)[0] == "confirmed"
    for x, winner in ((2000.0, "x, as good as base"), (500.0, "base, as good as x")):
        says = one("equivalent", **equal, speeds={"base": 1000.0, "x": x})[1]
        assert re.match(
            rf"{here}: use {winner} and [12]\.\d\d \[1\.9\d, 2\.\d\d\] times as fast, with 1.00 times the memory$", says
        )
    assert one("equivalent", **equal)[1].endswith("equivalent, neither is significantly faster")
    dead = {"values": {"base": base, "x": same}, "diverged": [("x", 2)]}
    few = "too few to say that it diverges more often than the study's other arms (0 of 4 runs; p = 0.5, Fisher's"
    assert one("diverges", **dead) == (
        "not resolved",
        f"no arm is recommended {here}: 1 of 4 runs of x diverged (non_finite); {few} exact test)",
    )
    assert one("better", **dead)[0] == one("not better", **dead)[0] == "not resolved"
    always = {**dead, "diverged": [("x", seed) for seed in range(4)]}
    more = "more often than the study's other arms (0 of 4 runs; p = 0.014, Fisher's exact test)"
    assert one("diverges", **always) == (
        "confirmed",
        f"{here}: do not use x; 4 of 4 runs of x diverged (non_finite); {more}",
    )
    both = {**dead, "diverged": [("x", 2), ("base", 0)]}
    assert one("diverges", **both)[0] == "not resolved"
    two, three = ({"base": base[:n], "x": same[:n]} for n in (2, 3))
    assert one("diverges", values=two)[0] == "not resolved"  # none of two: up to 78% may
    assert one("diverges", values=three)[0] == "rejected"  # none of three: at most 63%, less than two of three
    assert one("not diverges", values=three)[0] == "confirmed"


def test_the_overall_recommendation_is_the_fastest_that_is_as_good() -> None:
    rng = np.random.default_rng(0)
    base = noise(rng, 5)
    same = {name: shifted(base, 0.0, rng) for name in ("fast", "faster")}
    values = {"base": base, **same, "fastest": shifted(base, 0.05, rng), "unknown": noise(rng, 5, sd=0.05)}
    speeds = {"base": 1000.0, "fast": 1500.0, "faster": 2000.0, "fastest": 3000.0, "unknown": 4000.0}
    advice = analyse([made(values, speeds, {"faster": 8.0})])["studies"][0]["recommendations"][0]
    assert advice["text"].startswith("for language modelling on a machine: use faster, 1.99")
    assert advice["text"].endswith(
        "times as fast as base, with 0.80 times the memory; validation loss is equivalent within 0.01"
    )
    assert advice["evidence"] == ["faster", "base"]
    slow = analyse([made(values, {**speeds, "fast": 900.0, "faster": 900.0})])["studies"][0]["recommendations"][0]
    assert slow["text"].endswith(": no arm that is equivalent to base (fast, faster) is significantly faster")
    good = analyse(
        [made({**values, "good": shifted(base, -0.1, rng)}, {**speeds, "fast": 9.0, "faster": 9.0, "good": 9.0})]
    )
    cost = "at 0.01 times the speed and 1.00 times the memory of base"
    assert good["studies"][0]["recommendations"][0]["text"].endswith(
        f": use good rather than base, for better validation loss, {cost}"
    )
    none = analyse([made({"base": base, "unknown": values["unknown"]})])["studies"][0]["recommendations"][0]
    assert none["text"].endswith(": no arm is shown to be better than base, or equivalent within 0.01")


def test_what_is_not_sure_is_not_recommended() -> None:
    rng = np.random.default_rng(0)
    base = noise(rng, 5)
    same = shifted(base, 0.0, rng)

    def overall(read: ReadStudy) -> str:
        return analyse([read])["studies"][0]["recommendations"][0]["text"]

    fast = {"base": base, "a": same}, {"a": 2000.0}
    assert ": use a, " in overall(made(*fast))
    assert "significantly faster" in overall(
        made({"base": base, "a": same}, {"a": 1010.0})
    )  # within the noise of speeds
    # a speed of one seed says nothing of another day
    read = made(*fast)
    for seed in range(1, 5):
        run = read.runs["a", seed]
        del run.curves["tokens_per_second"], run.result["tokens_per_second"]
    assert analyse([read])["studies"][0]["arms"][1]["speedup"]["of"] == "steps"
    assert overall(read).endswith(": no arm that is equivalent to base (a) is significantly faster")
    # nor does an arm that did not always fit
    read = made(*fast)
    read.runs["a", 4].status = "out_of_memory"
    assert overall(read).startswith("no arm is recommended")
    question = {**QUESTION, "contrast": ["a", "base"], "confirmed_if": "equivalent"}
    read = made(*fast, questions=[question])
    read.runs["a", 4].status = "out_of_memory"
    ((_, advice),) = answer_questions(read.study.questions, {"made": read})
    assert advice["text"].endswith(
        "times as fast, with 1.00 times the memory; 1 of 5 runs of a failed or ran out of memory"
    )
    # the best by paired difference, not by a mean over easier seeds
    easy = [value - 1 for value in base[:3]] + base[3:]
    values = {"base": easy, "a": [*shifted(easy[:3], -0.1, rng), None, None], "b": shifted(easy, -0.2, rng)}
    assert ": use b rather than base" in overall(made(values))


def test_a_speed_up_under_two_percent_is_no_reason_and_a_constant_score_no_equivalence() -> None:
    rng = np.random.default_rng(0)
    base = noise(rng, 40)
    read = made({"base": base, "a": shifted(base, 0.0, rng)}, {"a": 1010.0})
    ratio = analyse([read])["studies"][0]["arms"][1]["speedup"]
    assert 1 < ratio["low"] < ratio["value"] < 1.02
    assert analyse([read])["studies"][0]["recommendations"][0]["text"].endswith("(a) is significantly faster")
    zeros = {"base": [0.0] * 3, "a": [0.0] * 3}
    payload = analyse([made(zeros, task="classify")])
    told = payload["studies"][0]
    assert payload["warnings"] == ["made: micro-F1 is 0 in every run, so it measures nothing here"]
    assert told["arms"][1]["comparison"]["verdict"] == "not resolved"
    assert told["arms"][1]["comparison"]["text"].endswith("every run has the same value, which measures nothing")


def rows_of(deltas: np.ndarray) -> list[dict[str, Any]]:
    """Arms of the payload from paired differences (arms, seeds)."""
    n = deltas.shape[-1]
    family = {
        i: verdicts.Contrast(st.difference(n, float(d.mean()), float(d.std(ddof=1))), "lower", 0.01)
        for i, d in enumerate(deltas)
    }
    judged = verdicts.judge(family)
    said = {i: {"verdict": j.verdict, "p_equivalent": j.p_equivalent} for i, j in judged.items()}
    return [{"name": str(i), "comparison": comparison} for i, comparison in said.items()]


@pytest.mark.slow
@pytest.mark.parametrize("n", [3, 5])
@pytest.mark.parametrize("arms", [5, 18])
def test_an_arm_worse_by_the_margin_is_recommended_in_at_most_5_percent(arms: int, n: int) -> None:
    draw, trials, wrong, alone = np.random.default_rng(0), 1500, 0, 0
    for _ in range(trials):
        base, own = draw.normal(0, 0.0005, (1, n)), draw.normal(0, 0.0005, (arms, n))
        rows = rows_of(0.01 + own - base)  # each truly worse by the margin
        wrong += bool(shown_as_good(rows))
        alone += any(row["comparison"]["verdict"] == "equivalent" for row in rows)
    assert wrong <= stats.binom.ppf(0.999, trials, 0.05)
    assert alone > 0.12 * trials  # what was recommended without Holm


def test_of_equivalent_arms_only_those_are_recommended_that_hold_together() -> None:
    deltas = np.array(
        [[-0.0004, 0.0005, 0.0001], [0.002, -0.0031, 0.004], [0.05, 0.051, 0.052], [-0.05, -0.052, -0.051]]
    )
    rows = rows_of(deltas)
    assert [row["comparison"]["verdict"] for row in rows] == ["equivalent", "equivalent", "worse", "better"]
    assert [row["name"] for row in shown_as_good(rows)] == ["0", "3"]
    assert [row["name"] for row in shown_as_good(rows[1:2])] == ["1"]  # p = 0.03: alone it holds
    rng = np.random.default_rng(0)
    base = noise(rng, 3)
    near = [value + by for value, by in zip(base, deltas[1], strict=True)]
    values = {"base": base, **dict.fromkeys(("a", "b", "c"), near)}
    told = analyse([made(values, {"a": 2000.0, "b": 2000.0, "c": 2000.0})])["studies"][0]["recommendations"][0]["text"]
    assert told.startswith("no arm is recommended")
    assert told.endswith(
        "a, b, c, each taken alone, would be equivalent to base, but not after Holm over 3 faster arms"
    )
    questions = [{**QUESTION, "id": arm, "contrast": [arm, "base"], "confirmed_if": "equivalent"} for arm in "abc"]
    read = made(values, {"a": 2000.0}, questions=questions)
    reply, advice = answer_questions(read.study.questions, {"made": read})[0]
    assert reply["answer"] == "confirmed" and "taken alone, but not as one of 3 comparisons" in advice["text"]


def cumulative(gains: Mapping[str, float]) -> str:
    """The recommendation of the study of architectures, whose arms keep the changes of those before them."""
    rng = np.random.default_rng(2)
    study = load_study("architecture")
    base, at, values = noise(rng, 5), 0.0, {}
    for arm in study.arms:
        at -= gains.get(arm, 0.0)
        values[arm] = shifted(base, at, rng)
    more = {key: study.model_dump()[key] for key in ("baseline", "metric")}
    read = made(values, **more)
    told = analyse([replace(read, study=study.model_copy(update={"recipe": read.study.recipe}))])["studies"][0]
    answers = {q["id"]: q["answer"] for q in told["questions"]}
    shown = {arm for arm in gains if gains[arm] > 0.004}
    assert {arm for arm, answer in answers.items() if answer == "confirmed"} == shown
    return str(told["recommendations"][0]["text"]).partition(": use ")[2]


def test_no_arm_is_recommended_for_a_last_change_that_did_nothing() -> None:
    told = cumulative({"rope": 0.2, "swiglu": 0.05, "rmsnorm": 0.001})
    assert told.startswith("swiglu rather than classic, for better validation loss, at 1.00 times the speed")
    assert "(all changes of swiglu together: it keeps those of rope)" in told
    assert told.endswith(" adds changes to it and is not shown to be better than it")
    assert cumulative({"rope": 0.2}).startswith("rope rather than classic")
    whole = cumulative({"rope": 0.02, "swiglu": 0.03, "rmsnorm": 0.02, "lr": 0.03, "warmup": 0.02})
    assert whole.startswith("warmup rather than classic") and "not shown" not in whole
    assert "it keeps those of rope, swiglu, rmsnorm, lr)" in whole


def test_diverged_runs_are_in_no_mean() -> None:
    read = made({"base": [3.0, 3.1, 3.2], "x": [3.0, 3.1, 3.2]}, diverged=[("x", 0)])
    read.runs["x", 0].curves["tokens_per_second"] = (np.array([20.0]), np.array([1e9]))
    x = analyse([read])["studies"][0]["arms"][1]
    assert x["throughput"]["n"] == 2 and x["throughput"]["value"] < 1100


@pytest.mark.slow
def test_no_rule_fires_on_noise() -> None:
    rng, fired, trials = np.random.default_rng(0), 0, 300
    question = {**QUESTION, "confirmed_if": "better"}
    for _ in range(trials):
        values = {name: noise(rng, 3, sd=0.02) for name in ("base", "x", "a", "b", "c", "d")}
        told = analyse([made(values, questions=[question])])["studies"][0]
        fired += any(not advice["text"].startswith("no arm is recommended") for advice in told["recommendations"])
    # two families at 5% each, and equivalence at 5% each where the margin is half a standard deviation: few pass
    assert fired <= 0.12 * trials


def test_a_payload_is_what_a_page_needs() -> None:
    values = {"base": [3.0, 3.1, 3.2], "x": [2.9, 3.05, 3.1], "late": [None, None, 3.0], "dead": [9.0, None, 3.0]}
    payload = analyse([made(values, diverged=[("dead", 0)], speeds={"x": 2000.0})])
    assert json.loads(json.dumps(payload, allow_nan=False)) == payload
    study = payload["studies"][0]
    base, x, late, dead = study["arms"]
    assert (base["comparison"], base["speedup"], base["memory_ratio"]) == (None, None, 1.0)
    assert x["quality"]["mean"] == pytest.approx(3.01666667) and x["quality"]["n"] == 3
    assert x["quality"]["low"] < 3.01666667 < x["quality"]["high"]
    assert x["comparison"]["mean"] == pytest.approx(-0.08333333)
    assert x["speedup"]["low"] < 2 < x["speedup"]["high"] and x["throughput"]["n"] == 3
    assert (late["quality"]["n"], late["quality"]["low"], late["values"]) == (1, None, {"2": 3.0})
    assert late["comparison"]["text"] == "not resolved: -0.2 in validation loss over 1 seed; one seed has no spread"
    assert (dead["statuses"], dead["values"]) == ({"diverged": 1, "completed": 1}, {"2": 3.0})  # never averaged in
    assert dead["comparison"]["text"].startswith("diverges: 1 of 2 runs diverged")
    assert study["failures"] == [
        {
            "arm": "dead",
            "seed": 0,
            "status": "diverged",
            "step": 7,
            "failure": "non_finite",
            "tensor": "logits",
            "reason": "no number",
        }
    ]
    assert (study["runs_planned"], study["runs_found"], study["seeds"]) == (12, 9, [0, 1, 2])
    assert study["means"]["base"]["train"][0] == [5, 4.9] and "late" not in study["means"]
    assert [run["ended"] for run in study["runs"] if run["arm"] == "dead"] == [7, None]
    assert study["metric"] == {
        "key": "final_val_loss",
        "label": "validation loss, nats per token",
        "better": "lower",
        "margin": 0.01,
        "margin_from": "stated by the study",
    }


def test_without_a_margin_nothing_is_equivalent_and_the_report_says_so() -> None:
    rng = np.random.default_rng(0)
    base = noise(rng, 5)
    values = {"base": base, "same": shifted(base, 0.0, rng), "copy": base, "worse": shifted(base, 0.05, rng)}
    question = {**QUESTION, "contrast": ["same", "base"], "confirmed_if": "equivalent"}
    read = made(values, {"same": 2000.0}, metric={"name": "final_val_loss"}, questions=[question])
    told = analyse([read])["studies"][0]
    why = "no margin is stated, so nothing is called equivalent"
    assert (told["metric"]["margin"], told["metric"]["margin_from"]) == (None, why)
    assert [arm["comparison"]["verdict"] for arm in told["arms"][1:]] == ["not resolved", "not resolved", "worse"]
    assert told["questions"][0]["answer"] == "not resolved" and why in told["questions"][0]["text"]
    assert told["recommendations"][0]["text"].endswith(f"no arm is shown to be better than base; {why}")
    console = Console(record=True, width=160)
    print_report(analyse([read]), console)
    assert f"N{why[1:]}." in " ".join(console.export_text().split())


@pytest.mark.parametrize(("n", "correlation", "at_least"), [(3, 0.9, 0.17), (10, 0.99, 0.35)])
def test_a_margin_from_the_same_runs_decided_by_chance(n: int, correlation: float, at_least: float) -> None:
    """Why there is no default: the margin was twice the sd of the baseline, the test uses the smaller paired sd."""
    draw, trials = np.random.default_rng(0), 20_000
    own = math.sqrt(1 - correlation) * draw.normal(size=(trials, 2, n))
    base, arm = np.moveaxis(math.sqrt(correlation) * draw.normal(size=(trials, 1, n)) + own, 1, 0)
    delta = arm + 2 - base  # truly different by the population's margin
    mean, sd = delta.mean(-1), delta.std(-1, ddof=1)
    stated, guessed = (np.mean(st.tost(n, mean, sd, m) < 0.05) for m in (2.0, 2 * base.std(-1, ddof=1)))
    assert stated < 0.05 + 4 * 0.0016 and guessed > at_least


def test_hellaswag_is_compared_row_by_row_within_a_seed(tmp_path: Path) -> None:
    folder, rng = tmp_path / "made", np.random.default_rng(0)
    write_study(folder, make_study(["base", "x", "y"], seeds=[0]))
    right = {"base": rng.random(400) < 0.3, "x": rng.random(400) < 0.6}  # y was not asked
    for arm, answers in right.items():
        rows = [{"ind": i, "label": 2, "pick": 0, "pick_norm": 2 if yes else None} for i, yes in enumerate(answers)]
        (folder / f"{arm}_seed0/hellaswag_results.jsonl").write_text(
            "\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8"
        )
    (told,) = analyse([read_study_folder(folder)])["studies"][0]["within"]
    assert (told["arm"], told["seed"], told["rows"]) == ("x", 0, 400)
    assert told["mean"] == pytest.approx(right["x"].mean() - right["base"].mean())
    half = 1.96 * np.std(right["x"].astype(float) - right["base"]) / 20
    assert told["low"] == pytest.approx(told["mean"] - half, abs=0.01) and told["high"] > told["mean"] > 0.2


# -- across studies


def pair_of_studies(second: Mapping[str, float], lr: float = 6e-4, seeds: int = 5) -> list[ReadStudy]:
    """Loss of the arms a, b, base 3.0, 3.1, 3.2; and a classifier's F1 as `second` says, with little noise."""
    rng = np.random.default_rng(3)
    common, f1 = noise(rng, seeds), noise(rng, seeds, mean=0.0)
    arms = ("base", "a", "b")
    values = {arm: shifted(common, by, rng) for arm, by in zip(arms, (0.2, 0.0, 0.1), strict=True)}
    scores = {arm: shifted(f1, second[arm], rng) for arm in arms}
    recipe = make_study(arms, task="classify").recipe | {"optim": {"lr": lr}}
    return [made(values, name="one"), made(scores, name="two", task="classify", recipe=recipe)]


COMPARISON = {
    "name": "both",
    "compare": ["one", "two"],
    "questions": [
        {"id": "H1", "claim": "a", "contrast": ["a", "b"], "confirmed_if": "better in one, not better in two"},
        {"id": "H4", "claim": "frontiers", "confirmed_if": "frontier differs"},
    ],
}


def test_an_arm_of_which_one_run_diverged_is_not_ranked_and_the_report_says_so() -> None:
    one, two = pair_of_studies({"base": 0.5, "a": 0.6, "b": 0.7})
    run = one.runs["b", 0]
    run.status, run.result = "diverged", {"status": "diverged", "steps": 7}
    across = analyse([one, two], Comparison.model_validate(COMPARISON))["across"]
    assert [rank["ranks"] for rank in across["ranks"]] == [[2, 3], [1, 2], [None, 1]]
    assert across["ranking"]["unranked"] == ["b"] and across["ranking"]["n"] == 2
    assert across["ranking"]["text"].endswith("; not ranked, as runs diverged, but too few to call it last: b")


def test_a_planted_flip_is_found_and_none_where_there_is_none() -> None:
    comparison = Comparison.model_validate(COMPARISON)
    flipped = analyse(pair_of_studies({"base": 0.5, "a": 0.6, "b": 0.7}), comparison)["across"]
    verdicts = {(flip["arm"], flip["reference"]): flip["verdict"] for flip in flipped["flips"]}
    assert verdicts == {("base", "a"): "agrees", ("base", "b"): "agrees", ("a", "b"): "flips"}
    assert [rank["ranks"] for rank in flipped["ranks"]] == [[3, 3], [1, 2], [2, 1]]
    assert [rank["flip"] for rank in flipped["ranks"]] == [False, True, True]
    assert flipped["ranking"]["tau"] == pytest.approx(1 / 3)
    assert flipped["questions"][0]["answer"] == "confirmed"
    alike = analyse(pair_of_studies({"base": 0.5, "a": 0.7, "b": 0.6}), comparison)["across"]
    assert alike["counts"] == {"agrees": 3} and alike["questions"][0]["answer"] == "rejected"
    assert alike["ranking"]["tau"] == pytest.approx(1)


def test_a_flip_may_be_the_learning_rates_doing() -> None:
    comparison = Comparison.model_validate(
        {**COMPARISON, "control": {"of": "one", "study": "matched"}, "questions": []}
    )
    studies = pair_of_studies({"base": 0.5, "a": 0.6, "b": 0.7}, lr=2e-5)
    (told,) = [flip for flip in analyse(studies, comparison)["across"]["flips"] if flip["verdict"] == "flips"]
    assert "the different learning rates (0.0006, 2e-05) may be the cause; run matched to find out" in told["text"]
    rng = np.random.default_rng(0)
    common = noise(rng, 5)
    cases = (
        (0.1, 5, "it stays at a matched learning rate"),
        (-0.1, 5, "gone at a matched learning rate, so it is an artefact"),
        (0.0, 5, "gone at a matched learning rate, so it is an artefact"),
        (-0.1, 1, "matched does not resolve whether"),
    )
    for gap, seeds, says in cases:
        values = {"base": common, "a": shifted(common, 0.0, rng), "b": shifted(common, gap, rng)}
        control = made({arm: row[:seeds] for arm, row in values.items()}, name="matched")
        flips = analyse(studies, comparison, control)["across"]["flips"]
        assert says in next(flip["text"] for flip in flips if flip["verdict"] == "flips")


def test_frontiers_differ_where_another_arm_pays() -> None:
    comparison = Comparison.model_validate(COMPARISON)
    speeds, memory = {"base": 1000.0, "a": 2000.0, "b": 1500.0}, {"base": 10.0, "a": 8.0, "b": 6.0}
    one, two = pair_of_studies({"base": 0.5, "a": 0.6, "b": 0.7})

    def at(read: ReadStudy, memory: Mapping[str, float]) -> ReadStudy:
        values = {arm: [run.value(read.study.metric.name) for run in read.of(arm)] for arm in read.study.arms}
        task = read.study.recipe["task"]
        return made(values, speeds, memory, name=read.study.name, task=task)

    told = analyse([at(one, memory), at(two, {**memory, "b": 9.0})], comparison)["across"]
    assert [(q["answer"], q["evidence"]) for q in told["questions"] if q["id"] == "H4"] == [("confirmed", ["b"])]
    # an arm that one study has not run is on no frontier, and tells nothing
    partial = at(two, memory)
    for seed in range(1, 5):
        del partial.runs["a", seed]
    told = analyse([at(one, {**memory, "b": 9.0}), partial], comparison)["across"]
    (reply,) = [q for q in told["questions"] if q["id"] == "H4"]
    assert reply["answer"] != "confirmed" and reply["text"].endswith("left out: a (fewer than two runs in two)")
    told = analyse([at(one, memory), at(two, memory)], comparison)["across"]
    assert [q["answer"] for q in told["questions"] if q["id"] == "H4"] == ["rejected"]
    assert told["recommendations"][1]["text"] == "the same choice for one and two: a, b"


def test_other_machines_are_said(tmp_path: Path) -> None:
    studies = pair_of_studies({"base": 0.5, "a": 0.6, "b": 0.7})
    for run in studies[1].runs.values():
        run.environment["device_name"] = "another"
    warnings = analyse(studies, Comparison.model_validate(COMPARISON))["warnings"]
    assert warnings == ["the studies differ in their device: one a machine and two another"]


def test_a_comparison_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the comparison both is of one and two: no folder of two was given"):
        analyse(pair_of_studies({"base": 0.5, "a": 0.6, "b": 0.7})[:1], Comparison.model_validate(COMPARISON))
    asks = 'compare = ["a", "b"]\n[[questions]]\nid = "Q"\nclaim = "c"\n'
    same = 'confirmed_if = "frontier differs"'
    for change, sentence in (
        ('compare = ["a", "a"]', "must name two different studies"),
        ('compare = ["a", "b"]\ncontrol = { of = "a", study = "b" }', "control.study = b: must differ from a and b"),
        (f'{asks}{same}\n[[questions]]\nid = "Q"\nclaim = "c"\n{same}', "two questions have the same id: Q"),
        (f'{asks}contrast = ["x", "x"]\nconfirmed_if = "better in a"', "must name two arms"),
        ('compare = ["a"]', r"comparison c: compare = \['a'\]: must be a list of at least 2"),
        ('compare = ["a", "b"]\ncontrol = { of = "c", study = "d" }', "control.of = c: must be one of a, b"),
        (
            f'{asks}contrast = ["x", "y"]\nconfirmed_if = "better"',
            "question Q: 'better': each clause must end with `in a` or `in b`",
        ),
        (
            f'{asks}contrast = ["x", "y"]\nconfirmed_if = "nicer in a"',
            "question Q: 'nicer in a': each clause between commas must be better, worse",
        ),
        (
            f'{asks}contrast = ["x", "y"]\nconfirmed_if = "equivalent in a by more than b"',
            "`by more than` goes with better and worse, not with equivalent",
        ),
        (
            f'{asks}contrast = ["x", "y"]\nconfirmed_if = "worse in a by more than c"',
            "question Q: 'worse in a by more than c': must be `in a by more than b`",
        ),
        (
            f'{asks}contrast = ["x", "y"]\nconfirmed_if = "worse in b by more than b"',
            "'worse in b by more than b': must be `in b by more than a`",
        ),
        (
            f'{asks}contrast = ["x", "y"]\nconfirmed_if = "worse in b"\nleast_speedup = 0.1',
            "question Q: least_speedup goes with confirmed_if = 'frontier differs' only",
        ),
        (f"{asks}{same}\nleast_memory = 0", "questions.0.least_memory = 0: must be greater than 0"),
        (f'{asks}confirmed_if = "better in a"', r"question Q: contrast = \[\]: must name two arms"),
    ):
        (tmp_path / "c.toml").write_text(change, encoding="utf-8")
        with pytest.raises(ConfigError, match=sentence):
            load_comparison(tmp_path / "c.toml")
    with pytest.raises(ConfigError, match="no comparison 'precisoin': did you mean 'precision'?"):
        load_comparison("precisoin")


@pytest.mark.parametrize("name", shipped("comparisons"))
def test_every_shipped_comparison_is_of_shipped_studies(name: str) -> None:
    comparison = load_comparison(name)
    studies = [load_study(study) for study in comparison.compare]
    for question in comparison.questions:
        assert all(arm in study.arms for study in studies for arm in question.contrast)
    if comparison.control:
        assert list(load_study(comparison.control.study).arms) == list(studies[0].arms)


# -- folders


def write_study(folder: Path, study: Study, most: int = 20, commit: str = "abc") -> None:
    """Runs of `most` logged steps, beyond the first ten runs of 1,000 at most."""
    folder.mkdir(parents=True)
    (folder / "study.toml").write_text(study.to_toml(), encoding="utf-8")
    rng = np.random.default_rng(0)
    for a, arm in enumerate(study.arms):
        for seed in study.seeds:
            run, lines = folder / f"{arm}_seed{seed}", most if a < 2 else min(most, 1000)
            run.mkdir()
            (run / "recipe.toml").write_text(study.build(arm, seed).to_toml(), encoding="utf-8")
            environment = {"device_name": "a machine", "torch": "2.13.0", "git_commit": commit, "data": {}}
            (run / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
            losses = 5 - np.linspace(0, 2, lines) + 0.1 * rng.standard_normal(lines)
            losses[lines // 2] = 50.0  # a spike
            text = [json.dumps({"step": i + 1, "loss": x, "tokens_per_second": 1e3}) for i, x in enumerate(losses)]
            (run / "metrics.jsonl").write_text("\n".join(text) + "\n", encoding="utf-8")
            result = {
                "status": "completed",
                "steps": lines,
                "final_val_loss": 3 + 0.1 * a + 0.01 * rng.standard_normal(),
            }
            (run / "result.json").write_text(json.dumps(result), encoding="utf-8")
            summary = {"study": study.name, "arm": arm, "group": "core", "seed": seed, **result}
            (folder / f"{arm}_seed{seed}.json").write_text(json.dumps(summary), encoding="utf-8")


def test_a_folder_is_read_in_whatever_state_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    write_study(folder, make_study(["base", "x", "y"]))
    whole = read_study_folder(folder)
    assert len(whole.runs) == 9 and whole.warnings == []
    environment = folder / "x_seed2" / "environment.json"
    kept = environment.read_text(encoding="utf-8")
    environment.write_text(json.dumps(json.loads(kept) | {"float8": "emulated in float32"}), encoding="utf-8")
    assert [w for w in read_study_folder(folder).warnings if "float8 was emulated in float32 in x, so" in w]
    environment.write_text(kept, encoding="utf-8")
    # unfinished: no summary yet; damaged; foreign; another study's; another machine; another length
    (folder / "x_seed0.json").unlink()
    (folder / "x_seed0" / "result.json").unlink()
    (folder / "x_seed1.json").write_text("{", encoding="utf-8")
    (folder / "ghost_seed0").mkdir()
    (folder / "holiday-photos").mkdir()
    (folder / "notes.json").write_text("[1]", encoding="utf-8")
    summary = json.loads((folder / "y_seed0.json").read_text(encoding="utf-8"))
    (folder / "y_seed0.json").write_text(json.dumps({**summary, "study": "other"}), encoding="utf-8")
    (folder / "y_seed1" / "environment.json").write_text(
        '{"device_name": "another", "torch": "2.13.0"}', encoding="utf-8"
    )
    short = json.loads((folder / "base_seed1.json").read_text(encoding="utf-8")) | {"steps": 7}
    (folder / "base_seed1.json").write_text(json.dumps(short), encoding="utf-8")
    read = read_study_folder(folder)
    assert set(whole.runs) - set(read.runs) == {("x", 1)}
    assert "study" not in read.runs["y", 0].result  # its own, as what lies beside it is another study's
    assert "y_seed0.json in " in "\n".join(read.warnings) and "left out: of the study 'other'" in "\n".join(
        read.warnings
    )
    assert read.runs["x", 0].status == "unfinished" and len(read.runs["x", 0].curves["loss"][0]) == 20
    said = "\n".join(read.warnings)
    assert "x_seed1 is left out" in said and "is damaged" in said
    assert "ghost_seed0 is left out: made has no such arm" in said
    assert "holiday" not in said and "notes" not in said
    assert "runs differ in their device: a machine (7 runs); another (y seed 1)" in said
    assert "runs differ in their length: 20 steps (6 runs); 7 steps (base seed 1)" in said
    arms = {arm["name"]: arm for arm in analyse([read])["studies"][0]["arms"]}
    assert arms["x"]["statuses"] == {"unfinished": 1, "completed": 1}
    with pytest.raises(UserError, match="is not a study's folder"):
        read_study_folder(tmp_path)


def test_a_run_that_is_not_what_the_study_says_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    write_study(folder, make_study(["base", "x"]))
    recipe = (folder / "x_seed1/recipe.toml").read_text(encoding="utf-8")
    (folder / "x_seed1/recipe.toml").write_text(
        recipe.replace("lr = 0.0006", "lr = 0.5").replace('"auto"', "4", 1), encoding="utf-8"
    )
    (warning,) = read_study_folder(folder).warnings
    assert warning.endswith("with other settings than the study's: optim.lr = 0.5 (x seed 1)")
    shutil.copy(folder / "base_seed0.json", folder / "x_seed1.json")
    read = read_study_folder(folder)
    assert ("x", 1) not in read.runs and "its summary is of base seed 0" in read.warnings[0]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("x_seed0.json", {"steps": None, "tokens": "many"}),
        ("x_seed0.json", {"final_val_loss": None}),
        ("x_seed0.json", {"final_val_loss": True}),
        ("x_seed0.json", {"peak_memory_gb": 0}),
        ("x_seed0.json", {"final_val_loss": 10**400}),
        ("x_seed0.json", {"status": "failed", "reason": [1]}),
        ("x_seed0.json", {"status": "diverged", "failed_at_step": "x", "steps": [3], "failure": {}}),
        ("x_seed0/environment.json", []),
        ("x_seed0/environment.json", {"data": [1], "device_name": 3}),
        ("x_seed0/environment.json", {"device_name": None, "data": {"fingerprint": [1]}}),
        ("x_seed0/metrics.jsonl", "[" * 100_000),
        ("x_seed0/metrics.jsonl", '{"step": 1, "loss": 1' + "0" * 400 + "}"),
        ("x_seed0/metrics.jsonl", ""),
        ("x_seed0/hellaswag_results.jsonl", '{"ind": "a", "label": 1}\n{"ind'),
    ],
)
def test_no_damage_ends_in_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, content: Any
) -> None:
    folder = tmp_path / "made"
    write_study(folder, make_study(["base", "x"]))
    if isinstance(content, dict) and "/" not in file:
        content = json.loads((folder / file).read_text(encoding="utf-8")) | content
    (folder / file).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    payload = analyse([read_study_folder(folder)])
    assert json.loads(json.dumps(payload, allow_nan=False)) == payload
    print_report(payload, Console(width=160))
    write_csv(payload, tmp_path)
    shown = capsys.readouterr().out + "".join(payload["warnings"])
    arm = payload["studies"][0]["arms"][1]
    if isinstance(content, dict) and not isinstance(content.get("final_val_loss", 0.0), float):
        assert "0" not in arm["values"]
        assert "x_seed0 completed without a final_val_loss" in shown or "x_seed0.json is damaged" in shown


@pytest.mark.slow
def test_hundreds_of_long_runs_stay_readable_and_keep_their_spikes(tmp_path: Path) -> None:
    study = make_study(["base", *(f"arm{i}" for i in range(99))], seeds=[0, 1, 2, 3, 4])
    write_study(tmp_path / "made", study, most=10_000)
    payload = analyse([read_study_folder(tmp_path / "made")])
    assert len(json.dumps(payload)) < 10e6
    for run in payload["studies"][0]["runs"]:
        middle = 5001 if run["arm"] in ("base", "arm0") else 501
        assert len(run["train"]) <= 700 and [middle, 50.0] in run["train"]


def test_report_and_power_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    question = {**QUESTION, "confirmed_if": "worse"}
    write_study(tmp_path / "results/made", make_study(["base", "x"], questions=[question]))
    with pytest.raises(SystemExit) as end:
        main(["study", "report", "results/made"])
    out = capsys.readouterr().out
    assert end.value.code == 0, out
    told = " ".join(out.split())
    assert told.startswith("made Q x differs: confirmed x is worse than base here: higher validation loss by")
    assert told.count("recommend") == 2 and "for language modelling on a machine: no arm is shown to be better" in told
    page = (tmp_path / "results/made/report.html").read_text(encoding="utf-8")
    assert "base rather than x" in page and not re.search(r"https?://(?!www\.w3\.org)", page)
    assert (tmp_path / "results/made/made-arms.csv").is_file()
    assert list((tmp_path / "results/made/plots").glob("*.png"))
    assert len(read_study_folder(tmp_path / "results/made").runs) == 6  # the report is no run
    with pytest.raises(SystemExit) as end:
        main(["study", "report", "results/made", "--compare", "precision"])
    assert end.value.code == 2 and "no folder of precision-lm was given" in capsys.readouterr().err
    shutil.copytree("results/made", "copy")
    for words, sentence in (
        (["results/made", "copy"], "study, made: a report takes it once"),
        (["results/made", "--out", "results/made/study.toml"], "study.toml cannot be written"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["study", "report", *words])
        assert end.value.code == 2 and sentence in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(["study", "report", "results/made", "./results/../results/made"])  # once is enough
    assert end.value.code == 0, capsys.readouterr()
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["study", "power", "precision-cls", "--effect", "0.01", "--pilot", "results/made"])
    assert end.value.code == 2 and "shows no noise of micro_f1" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(["study", "power", "precision-lm", "--effect", "0.01", "--noise", "0.006"])
    assert end.value.code == 0 and "if it is the only comparison    6 seeds" in capsys.readouterr().out


def test_a_report_is_written_as_a_whole_or_refused_in_a_sentence(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    write_study(one, make_study(["base", "x"]))
    shutil.copytree(one, two)
    report = write_report([tmp_path / "two/../one", one], formats=["svg"], command="a command", version="1.2")
    assert report.page == one / "report.html" and report.page.is_file() and all(file.is_file() for file in report.files)
    assert (report.payload["command"], report.payload["gptlab"]) == ("a command", "1.2")
    assert {file.suffix for file in report.files} == {".csv", ".svg"}
    console = Console(record=True, width=160)
    assert write_report([two], out=tmp_path / "out", console=console).page == tmp_path / "out/report.html"
    assert "6 of 6 runs." in console.export_text()
    with pytest.raises(UserError, match="hold the same study, made: a report takes it once"):
        write_report([one, two])
    with pytest.raises(UserError, match=r"study\.toml cannot be written: .*--out"):
        write_report([one], out=one / "study.toml")
    with pytest.raises(UserError, match="no folder of precision-lm was given"):
        write_report([one], compare="precision")


def test_power_from_a_pilot() -> None:
    rng = np.random.default_rng(0)
    base = noise(rng, 6, sd=1.0)
    arms = {f"arm{i}": shifted(base, 0.1 * i, rng, sd=0.05) for i in range(8)}
    read = made({"base": base, **arms, "dead": base}, diverged=[("dead", 1)])
    measured = pilot_noise(read, "final_val_loss")
    assert 4 < measured.df <= 5 * 4 * 8 / 11 and 0.04 < measured.sd < 0.08  # what seeds share cancels
    assert measured.low < 0.05 < measured.high
    copies = made({"base": base, **arms, "again": arms["arm1"], "same": base, "late": [None, None, None, *base[3:]]})
    assert pilot_noise(copies, "final_val_loss") == measured  # copies and an arm with fewer seeds add nothing
    lines = power_report(read.study, 0.05, measured)
    found = re.search(r"only comparison +(\d+) seeds \((\d+) to (\d+) from", "\n".join(lines))
    assert found and int(found[2]) <= int(found[1]) <= int(found[3])
    with pytest.raises(UserError, match="shows no noise of final_val_loss: two seeds must have completed"):
        pilot_noise(made({"base": [1.0], "x": [1.0]}), "final_val_loss")
    short = "\n".join(power_report(read.study, 0.01, Noise(0.004)))  # the margin of the study
    assert "a difference of 0.01 is not beyond the margin of 0.01" in short and "in more than half" in short
    assert "first of" not in short and re.search(r"\n +3 +0\.01\d+ ", short)
    for effect, sd in ((0.0, 1.0), (-1.0, 1.0), (1.0, 0.0), (math.nan, 1.0)):
        with pytest.raises(UserError, match="must be greater than 0"):
            power_report(read.study, effect, Noise(sd))
