"""Sweeps of a study: which arms form one, the sentences, the drift, and where a report shows them."""

import csv
import io
import math
from pathlib import Path

import numpy as np
import pytest
from browsers import needs_chromium, started
from planted import planted
from rich.console import Console

from gptlab.config import load_study, sweep_study
from gptlab.report.analysis import analyse
from gptlab.report.as_json import as_json
from gptlab.report.effect_tables import sweep_rows
from gptlab.report.figures import sweep_curves
from gptlab.report.page import render_page
from gptlab.report.studies import read_study_folder
from gptlab.report.sweeps import drift_of, short, sweeps_of
from gptlab.report.tables import print_report, report_html, write_csv


def swept(folder: Path, study, best, diverged=None, sd=0.001):
    """A study with losses that are lowest at `best`, a function of an arm's recipe."""
    draw = np.random.default_rng(0)

    def value(arm):
        recipe = study.build(arm, 0)
        rate = recipe.optim.muon_lr if "muon" in recipe.optim.name else recipe.optim.lr
        x = math.log(rate / best(recipe))
        return [3 + 0.03 * x**2 + sd * draw.normal() for _ in study.seeds]

    return read_study_folder(planted(folder, study, {arm: value(arm) for arm in study.arms}, diverged=diverged))


def rates(*changes, **more):
    return sweep_study({"name": "tiny", "train": {"max_steps": 10}, **more}, changes, {}, 3)


def test_a_sweep_ends_in_a_number(tmp_path: Path) -> None:
    found = sweeps_of(swept(tmp_path / "s", rates("optim.lr=1e-3,2e-3,4e-3,8e-3,1.6e-2"), lambda _: 3e-3))
    (sweep,) = found["sweeps"]
    assert sweep["optimum"]["low"] < 3e-3 < sweep["optimum"]["high"] and found["drifts"] == []
    assert sweep["text"].startswith("best optim.lr 3e-3 [2.9e-3, 3.1e-3] ")
    assert "at 90%, validation loss 3 there; twice or half of it costs about 0.01" in sweep["text"]
    assert sweep["text"].endswith("; the grid is 1e-3 to 0.016")
    assert len(sweep["points"]) == 5 and sweep["points"][0]["losses"].keys() == {"0", "1", "2"}


def test_two_settings_are_a_sweep_for_each_value_of_the_second(tmp_path: Path) -> None:
    study = rates("optim.lr=1e-3,2e-3,4e-3,8e-3", "optim.weight_decay=0,0.1")
    found = sweeps_of(swept(tmp_path / "s", study, lambda r: 2e-3 if r.optim.weight_decay else 4e-3))
    assert [sweep["name"] for sweep in found["sweeps"]] == ["optim.weight_decay = 0", "optim.weight_decay = 0.1"]
    first, second = (sweep["optimum"]["value"] for sweep in found["sweeps"])
    assert first == pytest.approx(4e-3, rel=0.1) and second == pytest.approx(2e-3, rel=0.1)


def test_a_rate_that_another_follows_is_one_sweep(tmp_path: Path) -> None:
    arms = {
        f"a{i}": {"settings": {"optim": {"lr": lr}, "schedule": {"min_lr": lr / 10}}}
        for i, lr in enumerate((1e-3, 2e-3, 4e-3))
    }
    study = rates("optim.lr=1e-3,2e-3,4e-3").model_copy(deep=True)
    study = type(study)(**study.model_dump() | {"arms": arms, "baseline": "a0"})
    (sweep,) = sweeps_of(swept(tmp_path / "s", study, lambda _: 2e-3))["sweeps"]
    assert sweep["setting"] == "optim.lr"


def test_families_of_a_shipped_study(tmp_path: Path) -> None:
    best = {"adamw": 6e-4, "muon": 0.02, "normuon": 0.02, "lion": 1.5e-4, "soap": 1.5e-3}
    read = swept(tmp_path / "s", load_study("optimizers-2026"), lambda r: best.get(r.optim.name, 6e-4))
    found = sweeps_of(read)["sweeps"]
    names = [
        "adamw",
        "cautious",
        "lion",
        "ademamix",
        "soap",
        "schedule_free",
        "averaged",
        "muon",
        "normuon",
        "soapmuon",
    ]
    assert [sweep["name"] for sweep in found] == names
    assert [sweep["setting"] for sweep in found[-4:]] == ["optim.lr", *["optim.muon_lr"] * 3]
    assert found[5]["optimum"]["edge"] == "lowest" and "add values below it" in found[5]["text"]
    assert sweeps_of(read)["drifts"] == []


def test_the_drift_over_the_width(tmp_path: Path) -> None:
    def best(recipe):
        return 2e-3 if recipe.model.parametrization == "mup" else 8e-3 * 64 / recipe.model.n_embd

    found = sweeps_of(swept(tmp_path / "s", load_study("lr-transfer"), best))
    standard, mup = found["drifts"]
    assert (standard["over"], standard["from"], standard["to"]) == ("model.n_embd", 64, 512)
    assert standard["low"] < 1 / 8 < standard["high"] < 0.2 and mup["low"] < 1 < mup["high"] < 1.3
    assert mup["text"].startswith(
        "model.parametrization = mup: from model.n_embd = 64 to 512 (8x) the best optim.lr moves"
    )
    assert mup["sweeps"] == ["mup_64", "mup_128", "mup_256", "mup_512"]


def test_a_drift_to_an_edge_is_open(tmp_path: Path) -> None:
    found = sweeps_of(swept(tmp_path / "s", load_study("lr-transfer"), lambda _: 2e-4))
    assert all(drift["value"] is None and "is open: that of" in drift["text"] for drift in found["drifts"])


def test_the_drift_of_equal_intervals_is_root_two_wider() -> None:
    one = {"value": 2e-3, "low": 1e-3, "high": 4e-3}
    assert drift_of(one, one) == pytest.approx((1, 2 ** -math.sqrt(2), 2 ** math.sqrt(2)))
    assert drift_of(one, one | {"high": None})[2] == math.inf


def test_diverged_arms_are_left_out_and_said(tmp_path: Path) -> None:
    study = rates("optim.lr=1e-3,2e-3,4e-3,8e-3")
    read = swept(tmp_path / "s", study, lambda _: 4e-3, {("lr=8e-3", 1): 5})
    (sweep,) = sweeps_of(read)["sweeps"]
    assert "values above it diverged: put some between" in sweep["text"]
    assert sweep["text"].endswith("left out: lr=8e-3 (1 of 3 runs diverged)")
    assert sweep["optimum"]["highest"] == 4e-3


@pytest.mark.parametrize(
    "study",
    [
        lambda: rates("optim.lr=1e-3,2e-3"),
        lambda: rates("optim.weight_decay=0,0.1,0.2"),  # 0 has no logarithm
        lambda: rates("model.n_layer=1,2,3"),
        lambda: load_study("sizes-smoke"),
    ],
)
def test_a_study_without_a_sweep_is_unchanged(tmp_path: Path, study) -> None:
    read = swept(tmp_path / "s", study(), lambda _: 1e-3)
    payload = analyse([read])
    assert sweeps_of(read) is None and "sweeps" not in payload["studies"][0]
    assert sweep_curves(payload["studies"][0]) is None and sweep_rows(payload["studies"][0]) == []


def test_a_sweep_without_runs_is_none_yet(tmp_path: Path) -> None:
    study = rates("optim.lr=1e-3,2e-3,4e-3", "optim.weight_decay=0,0.1")
    arms = [arm for arm in study.arms if arm.endswith("weight_decay=0")]
    some = planted(tmp_path / "s", study, {arms[0]: [3.0, 3.1, 3.0], arms[1]: [2.9, 3.0, 2.9]})
    (sweep,) = sweeps_of(read_study_folder(some))["sweeps"]
    assert sweep["text"] == "no best optim.lr: a parabola takes 3 values with losses, and there are 2"
    assert sweeps_of(read_study_folder(planted(tmp_path / "t", study, {}))) is None


def test_a_report_shows_sweeps_everywhere(tmp_path: Path) -> None:
    payload = analyse([swept(tmp_path / "s", rates("optim.lr=1e-3,2e-3,4e-3"), lambda _: 2e-3)])
    text = payload["studies"][0]["sweeps"]["sweeps"][0]["text"]
    assert as_json(payload)["studies"][0]["sweeps"]["sweeps"][0]["text"] == text
    console = Console(file=io.StringIO(), width=250)
    print_report(payload, console)
    assert text in console.file.getvalue() and text in report_html(payload)
    (file,) = [file for file in write_csv(payload, tmp_path / "out") if file.name.endswith("-sweeps.csv")]
    (row,) = csv.DictReader(file.open(encoding="utf-8"))
    assert float(row["best value"]) == payload["studies"][0]["sweeps"]["sweeps"][0]["optimum"]["value"]
    assert row["text"] == text and float(row["best value 90% low"]) < 2e-3 < float(row["best value 90% high"])
    figure = sweep_curves(payload["studies"][0])
    drawn = {artist.get_gid() for artist in figure.axes[0].get_lines()}
    assert {"runs optim.lr", "curve optim.lr", "interval optim.lr", "best optim.lr"} <= drawn


@needs_chromium
@pytest.mark.slow
def test_the_page_draws_sweeps(tmp_path: Path) -> None:
    payload = analyse([swept(tmp_path / "s", load_study("lr-transfer"), lambda _: 2e-3)])
    with started() as browser:
        browser.open(render_page(payload))
        assert browser.complaints() == []
        assert "Sweeps" in browser.each("nav a", "one.textContent")
        part = "#study-0-sweeps"
        assert browser.each(f"{part} figure h4", "one.textContent") == [
            "model.parametrization = standard",
            "model.parametrization = mup",
        ]
        assert len(browser.each(f"{part} path.cross", "1")) == len(browser.each(f"{part} tbody tr", "1")) == 8
        text = payload["studies"][0]["sweeps"]["drifts"][1]["text"]
        assert f"{text}." in browser.each(f"{part} p.finding", "one.textContent")


@pytest.mark.parametrize(
    "value, text", [(3.14e-3, "3.1e-3"), (1e-3, "1e-3"), (0.016, "0.016"), (0.1, "0.1"), (200, "200"), (2e6, "2e6")]
)
def test_settings_are_short(value: float, text: str) -> None:
    assert short(value) == text
