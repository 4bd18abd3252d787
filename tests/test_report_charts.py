"""The charts of the report's page in a browser: reading values, zooming, marks, pictures."""

import re

import pytest
from browsers import BLUE, CHARTS, inked, needs_chromium, started, tip, x_ticks
from made_report import make_payload

from gptlab.report.page import render_page


@pytest.fixture(scope="module")
def browser():
    with started() as one:
        yield one


@pytest.fixture(scope="module")
def study() -> dict:
    """The first study of the report that the tests below open."""
    return make_payload()["studies"][0]


@pytest.fixture
def report(browser):
    """The browser with the report of two studies open."""
    browser.resize(1280, 900)
    browser.open(render_page(make_payload()))
    yield browser
    assert browser.complaints() == []


@pytest.mark.slow
@needs_chromium
def test_hovering_a_curve_reads_it_out(report, study):
    left, top, width, height = report.box(f"{CHARTS} .curves")
    report.mouse("Moved", left + 0.6 * width, top + 0.85 * height)
    name, which, where = tip(report).split("\n")
    step, loss = re.fullmatch(r"step ([\d\u2009]+), loss ([\d.]+)", where).groups()
    seeds = {f"seed {run['seed']}, completed": run["val"] for run in study["runs"] if run["arm"] == name}
    curve = dict(map(tuple, (seeds | {"mean of its seeds": study["means"][name]["val"]})[which]))
    assert curve[int(step.replace("\u2009", ""))] == pytest.approx(float(loss), abs=1e-4)
    report.mouse("Moved", 2, 2)
    assert tip(report) == ""
    report.hover(f"{CHARTS} [data-tip*=seed] .cross")
    assert "fp16_naive" in tip(report)


@pytest.mark.slow
@needs_chromium
def test_zoom_by_dragging_wheel_keys_and_fingers(report):
    chart, whole = f"{CHARTS} .curves", x_ticks(report)
    assert whole[0] == "0" and whole[-1] in ("9K", "10K")
    left, top, width, height = report.box(chart)
    report.mouse("Pressed", left + 0.5 * width, top + 0.4 * height, button="left", buttons=1, clickCount=1)
    report.mouse("Moved", left + 0.7 * width, top + 0.9 * height, button="left", buttons=1)
    assert float(report.first(f"{CHARTS} .band", "one.getAttribute('width')")) == pytest.approx(0.2 * width, abs=1)
    report.mouse("Released", left + 0.7 * width, top + 0.9 * height, button="left", clickCount=1)
    near = [float(tick.replace("\u2009", "")) for tick in x_ticks(report)]
    assert near[0] > 4000 and near[-1] < 8000 and not report.first(f"{CHARTS} .reset", "one.disabled")
    report.click(chart, times=2)
    assert x_ticks(report) == whole and report.first(f"{CHARTS} .reset", "one.disabled")

    report.run("document.activeElement.blur()")
    scrolled = report.run("scrollY")
    middle = (left + width / 2, top + height / 2)
    report.mouse("Wheel", *middle, deltaX=0, deltaY=-300, modifiers=2)  # with Ctrl
    assert x_ticks(report) != whole and report.run("scrollY") == scrolled
    report.click(f"{CHARTS} .reset")
    assert x_ticks(report) == whole

    report.first(chart, "one.focus()")
    for key in ("+", "ArrowRight"):
        before = x_ticks(report)
        report.key(key)
        assert x_ticks(report) != before
    report.key("0")
    assert x_ticks(report) == whole

    left, top, width, height = report.box(chart)
    for kind, apart in (("touchStart", 40), ("touchMove", 60), ("touchMove", 120), ("touchEnd", 0)):
        spots = [{"x": left + width / 2 + side * apart, "y": top + height / 2, "id": side} for side in (0, 1)]
        report.send("Input.dispatchTouchEvent", type=kind, touchPoints=spots if apart else [])
    assert x_ticks(report) != whole


@pytest.mark.slow
@needs_chromium
def test_training_curves_and_logarithmic_scale(report):
    label = f"{CHARTS} .curves > div:first-child text:last-child"
    assert report.first(label, "one.textContent") == "validation loss"
    report.click(f"{CHARTS} .choices:first-of-type button:nth-child(2)")
    assert report.first(label, "one.textContent") == "training loss"
    report.click(f"{CHARTS} .choices:nth-of-type(2) button:nth-child(2)")
    assert report.first(label, "one.textContent") == "training loss, logarithmic"
    assert inked(report, BLUE) > 100


@pytest.mark.slow
@needs_chromium
def test_frontier_is_that_of_the_means(report, study):
    arms = [arm for arm in study["arms"] if not arm["statuses"].get("diverged")]
    points = {arm["name"]: (arm["throughput"]["value"], -arm["quality"]["mean"]) for arm in arms}
    edge = {
        name
        for name, (speed, good) in points.items()
        if not any(a >= speed and b >= good and (a, b) != (speed, good) for a, b in points.values())
    }
    told = report.first(f"{CHARTS} .pair [role=img]", "one.getAttribute('aria-label')")
    assert set(re.search(r"frontier: (.*)\. The numbers", told)[1].split(", ")) == edge and len(edge) > 2
