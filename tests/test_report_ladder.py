"""What a report says of a ladder: planted laws come back as sentences, rows, pictures and a page, or are refused."""

import csv
import io
import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from browsers import Browser, needs_chromium
from conftest import tiny_recipe
from rich.console import Console

from gptlab.config import Study
from gptlab.config.study import validated
from gptlab.report import ladders
from gptlab.report.analysis import analyse
from gptlab.report.as_json import as_json
from gptlab.report.figures import report_figures
from gptlab.report.laws import Point, fit
from gptlab.report.page import render_page
from gptlab.report.studies import ReadRun, ReadStudy
from gptlab.report.tables import print_report, write_csv

SIZES = ["1x16", "2x16", "2x32", "4x32", "4x64", "8x64"]
Loss = Callable[[float, float], float]


def chinchilla(n: float, d: float, scale: float = 4.0, alpha: float = 0.2) -> float:
    return 1.7 + scale * n**-alpha + 30 * d**-0.3


def read(
    laws: dict[str, Loss], sizes: list[str] = SIZES, multiples: tuple[float, ...] = (5, 20), **ladder: object
) -> ReadStudy:
    """A study with planted losses, whose seeds differ by 0.1%; arms share most of what a seed changes."""
    recipe = tiny_recipe(Path("data"), schedule__shape="wsd", schedule__min_lr=0.0).model_dump()
    content = {
        "name": "planted",
        "recipe": {key: value for key, value in recipe.items() if key not in ("name", "description", "seed")},
        "baseline": f"{next(iter(laws))}@{sizes[-1]}-{multiples[-1]:g}tpp",
        "ladder": {"sizes": sizes, "tokens_per_parameter": list(multiples), "hold_out": "largest", **ladder},
    }
    rungs = [f"{size}-{multiple:g}tpp" for size in sizes for multiple in multiples]
    content["arms"] = {f"{base}@{rung}": {} for base in laws for rung in rungs}
    study, draw = validated(Study, content), np.random.default_rng(0)
    assert study.ladder is not None
    runs = {}
    for seed in study.seeds:
        for rung in rungs:
            shared = draw.normal()
            for base, law in laws.items():
                _, size, multiple = study.ladder.place(arm := f"{base}@{rung}")
                layers, width = map(int, size.split("x"))
                n = 12 * layers * width**2 + width
                d = multiple * 12 * layers * width**2
                loss = law(n, d) * (1 + 1e-3 * (0.8 * shared + 0.6 * draw.normal()))
                result = {"tokens": d, "steps": d // 256, "final_val_loss": loss}
                facts = {"non_embedding_parameters": n, "flops_per_token": 6 * n + 1000, "data": {}}
                none = {key: (np.array([]), np.array([])) for key in ("loss", "val_loss", "tokens_per_second")}
                none["samples_per_second"] = none["loss"]
                run = ReadRun(arm, seed, Path(f"{arm}_seed{seed}"), "completed", result, none, facts)
                runs[arm, seed] = run
    order = {(arm, seed): runs[arm, seed] for arm in study.arms for seed in study.seeds}
    return ReadStudy(study, Path("planted"), order, [])


@pytest.fixture(scope="module")
def payload() -> dict:
    study = read(
        {"plain": chinchilla, "steeper": lambda n, d: chinchilla(n, d, 4.4, 0.22), "same": chinchilla},
        extrapolate=["1M", "12x128"],
    )
    return analyse([study])


def test_a_planted_difference_is_said_at_the_sizes_asked_for_and_where_it_is_zero(payload: dict) -> None:
    laws = payload["studies"][0]["laws"]
    pair = next(pair for pair in laws["pairs"] if pair["a"] == "steeper")
    truth = {row["n"]: 4.4 * row["n"] ** -0.22 - 4 * row["n"] ** -0.2 for row in pair["at"]}
    assert [row["size"] for row in pair["at"]] == ["1M", "12x128"] and [*truth] == [1e6, 12 * 12 * 128**2]
    for row in pair["at"]:
        assert row["low"] < truth[row["n"]] < row["high"] and row["shown"] and row["d"] == 20 * row["n"]
    assert re.match(
        r"steeper against plain: at 1M \(1M parameters, 20M tokens, 5\.\d times the largest size that was fitted\) "
        r"steeper is better by 0\.\d+ \[0\.\d+, 0\.\d+\]; at 12x128 ",
        pair["text"],
    )
    zero = 1.1**50  # 4.4 n^-0.22 = 4 n^-0.2
    assert pair["crossing"]["none"] or pair["crossing"]["low"] < zero
    same = next(pair for pair in laws["pairs"] if pair["a"] == "same")
    assert not same["at"][0]["shown"] and "same is open: " in same["text"]


def test_laws_that_cross_say_where() -> None:
    cross = 4e4
    study = read({"plain": chinchilla, "late": lambda n, d: chinchilla(n, d) + 0.2 * ((n / cross) ** -0.1 - 1)})
    laws = ladders.laws_of(study)
    assert laws is not None
    found = laws["pairs"][0]["crossing"]
    assert found["low"] < cross < found["high"] and not found["none"]
    assert found["value"] == pytest.approx(cross, rel=0.3)
    assert re.search(
        r": the difference is zero at \d[\d.]+K parameters \[\d[\d.]+K to \d[\d.]+K\]\.", laws["pairs"][0]["text"]
    )


def test_the_held_out_size_is_in_no_law_and_is_predicted(payload: dict) -> None:
    laws = payload["studies"][0]["laws"]
    for arm in laws["arms"]:
        held = arm["held_out"]
        assert (held["size"], held["runs"], held["inside"]) == ("8x64", 3, True)
        assert f"at 8x64, which was held out: predicted {held['predicted']:.3g} [" in held["text"]
        assert {point["size"] for point in arm["points"] if point["held_out"]} == {"8x64"}
    jump = read({"plain": lambda n, d: chinchilla(n, d) + (0.3 if n > 3e5 else 0.0)})
    (arm,) = (ladders.laws_of(jump) or {})["arms"]
    assert not arm["held_out"]["inside"] and arm["held_out"]["text"].endswith("outside the interval")
    steady = (ladders.laws_of(read({"plain": chinchilla})) or {})["arms"][0]
    assert arm["laws"] == steady["laws"]  # bit for bit: the laws have not seen it


def test_the_three_laws_are_those_that_were_planted(payload: dict) -> None:
    laws = {law["law"]: law for law in payload["studies"][0]["laws"]["arms"][0]["laws"]}
    assert [*laws] == ["L(N)", "L(C)", "L(N, D)"]
    plane = laws["L(N, D)"]
    assert plane["e_low"] < 1.7 < plane["e_high"]
    for low, planted, high in zip(plane["exponent_lows"], (0.2, 0.3), plane["exponent_highs"], strict=True):
        assert low < planted < high
    assert plane["formula"].startswith(f"{plane['e']:.3f} + ")


def test_runs_of_one_trunk_count_as_one() -> None:
    """Losses are the same; that runs share their first steps makes the intervals of L(N, D) wider, and no other's."""
    alone, branched = (ladders.laws_of(read({"plain": chinchilla}, branch=branch)) for branch in (False, True))
    assert alone is not None and branched is not None
    one, two = ({law["law"]: law for law in laws["arms"][0]["laws"]} for laws in (alone, branched))
    assert one["L(N)"] == two["L(N)"] and one["L(C)"] == two["L(C)"]
    wide = [law["exponent_highs"][1] - law["exponent_lows"][1] for law in (one["L(N, D)"], two["L(N, D)"])]
    assert wide[1] > 1.2 * wide[0]


def test_below_four_sizes_nothing_is_extrapolated() -> None:
    laws = ladders.laws_of(read({"plain": chinchilla, "other": chinchilla}, SIZES[:4], extrapolate=["1M"]))
    assert laws is not None and laws["pairs"][0]["at"] == [] and laws["pairs"][0]["curve"] == []
    assert laws["pairs"][0]["text"] == (
        "other against plain: nothing is extrapolated: other has finished runs of 3 sizes: a law in parameters takes 4"
        "; plain has finished runs of 3 sizes: a law in parameters takes 4."
    )
    assert all(law["why"] and not law["formula"] for arm in laws["arms"] for law in arm["laws"])


def test_arms_are_compared_at_their_rung_and_no_size_is_recommended(payload: dict) -> None:
    (study,) = payload["studies"]
    for arm in study["arms"]:
        rung = arm["name"].rpartition("@")[2]
        assert (arm["comparison"] or {"b": arm["name"]})["b"] == f"plain@{rung}"
    assert study["recommendations"] == [] and study["equal"] == [] and study["against"] == "plain at the same rung"
    assert study["summary"].startswith("Of 24 arms compared with plain at the same rung, ")


def test_the_laws_are_in_every_form_of_a_report(payload: dict, tmp_path: Path) -> None:
    told = io.StringIO()
    print_report(payload | {"warnings": []}, Console(file=told, width=2000))
    sentence = payload["studies"][0]["laws"]["pairs"][0]["text"]
    assert sentence in told.getvalue() and "L(N, D)" in told.getvalue()
    rows = as_json(payload)
    assert [law["study"] for law in rows["laws"]] == ["planted"] and "laws" not in rows["studies"][0]
    json.dumps(rows, allow_nan=False)
    files = {file.name: file for file in write_csv(payload, tmp_path)}
    with open(files["planted-extrapolated.csv"], newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert [row["size"] for row in found] == ["1M", "12x128"] * 2
    assert len(files["planted-laws.csv"].read_text(encoding="utf-8").splitlines()) == 1 + 3 * 3
    figure = report_figures(payload)["planted-laws"]
    drawn = {line.get_gid() for axes in figure.axes for line in (*axes.lines, *axes.collections)}
    assert {"law plain", "band steeper", "held out plain", "difference steeper", "at 1M steeper"} <= drawn
    assert [axes.get_xscale() for axes in figure.axes] == ["log", "log"] and figure.axes[0].get_yscale() == "log"
    figure.canvas.draw()


@needs_chromium
def test_the_page_shows_the_sentences_and_both_charts(browser: Browser, payload: dict) -> None:
    browser.open(render_page(payload))
    laws = payload["studies"][0]["laws"]
    told = browser.each("#study-0-laws .lead", "one.textContent")
    assert told == [pair["text"] for pair in laws["pairs"]] + [f"{arm['held_out']['text']}." for arm in laws["arms"]]
    assert browser.each("#study-0-laws figure h4", "one.textContent") == ["Loss over compute", "Difference over size"]
    points = browser.each("#study-0-laws figure", "one.querySelectorAll('circle').length")
    assert points == [3 * 36, 4]
    assert browser.each("#study-0-laws figure", "one.querySelectorAll('polyline').length") == [3, 2]
    assert browser.each("nav a", "one.textContent")[:2] == ["Answers", "Scale"]
    assert browser.each("#study-0-laws figure svg", "one.textContent.includes('NaN')") == [False, False]
    assert (
        browser.each("#study-0-laws tbody tr", "one.cells[0].textContent")
        == ["plain"] * 3 + ["steeper"] * 3 + ["same"] * 3
    )
    assert browser.complaints() == []


@pytest.mark.slow
def test_intervals_hold_where_the_runs_of_a_trunk_share_their_noise() -> None:
    """90% intervals of L(N, D) four times beyond the largest size, where 80% of the noise is the trunk's."""

    def planted(n: float, d: float) -> float:
        return 1.69 + 406.4 * n**-0.34 + 410.7 * d**-0.28

    draw, covered, ladders_ = np.random.default_rng(2), {1.0: 0, 1 / 3: 0}, 80
    for _ in range(ladders_):
        rows = []
        for seed, n in itertools.product(range(3), (2e6, 4e6, 8e6, 16e6, 32e6)):
            shared = draw.normal()
            for d in (10 * n, 20 * n, 40 * n):
                noise = math.sqrt(0.8) * shared + math.sqrt(0.2) * draw.normal()
                rows.append((n, d, seed, planted(n, d) * math.exp(0.003 * noise)))
        for share in covered:
            law = fit([Point("a", n, d, seed, loss, share=share) for n, d, seed, loss in rows], "a", "n,d")
            told = law.predict(128e6, 2.56e9)[0]
            covered[share] += told.low <= planted(128e6, 2.56e9) <= told.high
    assert covered[1 / 3] >= 0.85 * ladders_ > covered[1.0]
