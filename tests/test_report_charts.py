"""The charts of the report's page in a browser: reading values, zooming, marks, pictures."""

import re
import time

import matplotlib.image
import pytest
from browsers import BLUE, CHARTS, LOADED, SKY, inked, needs_chromium, picked, tip, x_ticks
from made_report import ARMS, make_payload, mean_curve, small

from gptlab.report.page import render_page

BOXES = "(({ left, top, right, bottom }) => [left, top, right, bottom])(one.getBoundingClientRect())"


def number(text: str) -> float:
    return float(text.replace("\u2009", "").replace("\u2212", "-"))


def reading(browser) -> tuple[int, dict[str, float]]:
    """The step and the values that the crosshair's table shows; (0, {}) without one."""
    if not (told := tip(browser)):
        return 0, {}
    rows = browser.each("#tip tr", "[...one.cells].map((cell) => cell.innerText)")
    return int(number(re.match(r"step ([\d\u2009]+)", told)[1])), {name: number(value) for _, name, value, _ in rows}


def nearest(points: list, step: int) -> float:
    return min((abs(at - step), loss) for at, loss in points if loss is not None)[1]


def crosshair(browser) -> list[float]:
    """Where the vertical line is, in pixels of the chart; [] without one."""
    return browser.each(f"{CHARTS} .crosshair line", "Number(one.getAttribute('x1'))")


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("kind", ["val", "train"])
def test_the_pointer_anywhere_reads_all_picked_arms(report, study, kind):
    if kind == "train":
        report.click(f"{CHARTS} .choices:first-of-type button:nth-child(2)")
    left, top, width, height = report.box(f"{CHARTS} .curves")
    ticks = {}
    for across in (0.1, 0.35, 0.6, 0.95):
        for down in (0.15, 0.5, 0.85):  # whether a curve is near or not
            report.mouse("Moved", left + across * width, top + down * height)
            step, values = reading(report)
            expected = {arm: nearest(study["means"][arm][kind], step) for arm in picked(report)}
            assert len(expected) == 7
            assert {arm: values[arm] for arm in expected} == pytest.approx(expected, rel=1e-4)
            assert abs(crosshair(report)[0] - across * width) < 25
            ticks[across] = step
    assert sorted(ticks.values()) == list(ticks.values()) and len(set(ticks.values())) == 4
    assert set(ticks.values()) <= {at for run in study["runs"] for at, _ in run[kind]}  # nothing is interpolated
    report.mouse("Moved", 2, 2)
    assert tip(report) == "" and crosshair(report) == []


@pytest.mark.slow
@needs_chromium
def test_an_arm_without_a_mean_is_read_run_by_run_at_the_nearest_logged_step(browser):
    payload = small()
    study = payload["studies"][0]
    del study["means"]["amp_bf16"]
    runs = {f"amp_bf16, seed {run['seed']}": run["val"] for run in study["runs"] if run["arm"] == "amp_bf16"}
    early = study["runs"][3]
    early["val"] = [point for point in early["val"] if point[0] < 4000]  # its last loss is far from the pointer
    browser.resize(1280, 900)
    browser.open(render_page(payload))
    left, top, width, height = browser.box(f"{CHARTS} .curves")
    browser.mouse("Moved", left + 0.9 * width, top + 0.2 * height)
    step, values = reading(browser)
    runs["amp_bf16, seed 0"] = early["val"]
    assert {name: values[name] for name in runs} == pytest.approx(
        {name: nearest(points, step) for name, points in runs.items()}, rel=1e-4
    )
    at = browser.each("#tip tr", "[one.cells[1].innerText, one.cells[3].innerText]")
    assert {name: text.replace("\u2009", "") for name, text in at if text} == {
        "amp_bf16, seed 0": f"at step {early['val'][-1][0]}"
    }


@pytest.mark.slow
@needs_chromium
def test_a_single_seed_and_a_grey_arm_are_read_at_the_pointer(report, study):
    left, top, width, height = report.box(f"{CHARTS} .curves")
    names = set()
    for i in range(40):
        report.mouse("Moved", left + 0.5 * width, top + height * (0.3 + 0.015 * i))
        names |= set(reading(report)[1])
    seeds = {tuple(name.split(", seed ")) for name in names if "seed" in name}
    runs = {(run["arm"], str(run["seed"])) for run in study["runs"]}
    assert seeds and seeds <= runs
    assert {arm for arm, _ in seeds} - set(picked(report))


@pytest.mark.slow
@needs_chromium
def test_keys_and_fingers_move_the_crosshair(report, study):
    steps = [at for at, _ in study["means"]["fp32_baseline"]["val"]]
    report.box(f"{CHARTS} .curves")
    report.first(f"{CHARTS} .curves", "one.focus()")
    report.key("ArrowRight")
    first, values = reading(report)
    assert first in steps and set(values) >= set(picked(report))
    for key, expected in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1)):
        report.key(key)
        assert reading(report)[0] == steps[steps.index(first) + expected]
    report.key("ArrowLeft", modifiers=8)  # with Shift
    assert reading(report)[0] == steps[steps.index(first) + 1 - 10]
    heard = report.first(f"{CHARTS} .curves [role=status]", "one.textContent")
    assert heard.startswith("step ") and all(arm in heard for arm in picked(report))
    report.key("End")
    assert reading(report)[0] == steps[-1]
    report.key("+")  # the middle of the chart stays; the last step leaves the view, and a key brings it back
    assert max(map(whole_tick, x_ticks(report))) < steps[-1]
    report.key("End")
    assert reading(report)[0] == steps[-1] and max(map(whole_tick, x_ticks(report))) > steps[-1] - 1000
    report.key("0")

    left, top, width, height = report.box(f"{CHARTS} .curves")
    touched = []
    for kind, across in (("touchStart", 0.3), ("touchMove", 0.5), ("touchMove", 0.7)):
        spot = {"x": left + across * width, "y": top + height / 2}
        report.send("Input.dispatchTouchEvent", type=kind, touchPoints=[spot])
        report.run(LOADED)  # moves are handed on with the next frame
        touched.append(reading(report)[0])
    report.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    assert touched[0] < touched[-1] and reading(report)[0] == touched[-1]  # it stays when the finger is lifted
    report.mouse("Moved", 2, 2)
    assert reading(report)[0] == 0


@pytest.mark.slow
@needs_chromium
def test_a_reading_on_a_phone_covers_no_crosshair(browser):
    browser.resize(390, 844)
    browser.open(render_page(make_payload()))
    left, top, width, _ = browser.box(f"{CHARTS} .curves")
    for across in (0.2, 0.5, 0.9):
        browser.send(
            "Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": left + across * width, "y": top + 99}]
        )
        browser.run(LOADED)
        assert len(reading(browser)[1]) >= 7
        edge = browser.first("#tip", BOXES)
        assert edge[0] >= 0 and edge[2] <= 390 and edge[3] <= top
        browser.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    browser.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": 5, "y": top - 5}])
    browser.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    browser.run(LOADED)
    assert tip(browser) == ""  # a touch elsewhere ends it


def whole_tick(text: str) -> int:
    """The step that a label of the axis stands for; anything but a whole number fails."""
    value = number(text.removesuffix("K")) * (1000 if text.endswith("K") else 1)
    assert value == round(value)
    return round(value)


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("last", [1, 2, 7, 10, 26, 40, 75, 250, 1000, 12345])
def test_steps_on_the_axis_are_whole(browser, last):
    payload = small()
    for study in payload["studies"]:
        for curve in [*study["runs"], *study["means"].values()]:
            for kind in ("train", "val"):
                curve[kind] = [[round(last * i / 29), loss] for i, (_, loss) in enumerate(curve[kind])]
            curve["ended"] = None
    browser.resize(1280, 900)
    browser.open(render_page(payload))
    browser.first(f"{CHARTS} .curves", "one.focus()")
    seen = []
    for _ in range(12):
        ticks = [whole_tick(tick) for tick in x_ticks(browser)]
        assert ticks == sorted(set(ticks))
        seen.append(ticks)
        browser.key("+")
    assert seen[0] and seen[-1] and browser.complaints() == []


def y_top(browser) -> float:
    ticks = browser.each(f"{CHARTS} .curves > div:first-child text[text-anchor=end]", "one.textContent")
    return max(float(tick) for tick in ticks if tick != "step")


# -- runs that leave the frame ---------------------------------------------------------------------------------------


def exploding(losses: list, at: int) -> list:
    return [[step, loss if step < at else 9.0 + (step - at) / 100] for step, loss in losses]


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("count", [1, 3])
def test_a_run_that_explodes_is_marked_and_stretches_no_axis(browser, count):
    payload = make_payload({arm: ARMS[arm] for arm in ("fp32_baseline", "amp_bf16")}, points=30)
    for study in payload["studies"]:
        mine = [run for run in study["runs"] if run["arm"] == "amp_bf16"]
        for run in mine[:count]:  # completed, all the same
            run["train"], run["val"] = exploding(run["train"], 3000), exploding(run["val"], 3000)
        study["means"]["amp_bf16"] = {kind: mean_curve([run[kind] for run in mine]) for kind in ("train", "val")}
    browser.resize(1280, 900)
    browser.open(render_page(payload))
    step = min(at for at, _ in payload["studies"][0]["runs"][3]["val"] if at >= 3000)
    assert y_top(browser) < 4.5
    marks = browser.each(f"{CHARTS} .leaves", "one.closest('[data-arm]').dataset.arm")
    assert marks == ["amp_bf16"] * count
    frame = browser.each(f"{CHARTS} .leaves", "Number(one.getAttribute('d').match(/M\\S+ (\\S+?)l/)[1])")
    assert set(frame) == {26}  # the top of the frame
    names = " ".join(browser.each(f"{CHARTS} .curves .label", "one.textContent")).replace("\u2009", "")
    assert f"amp_bf16, step {step}" in names and ("3 runs" in names) == (count == 3)
    browser.hover(f"{CHARTS} [data-arm=amp_bf16] .leaves")
    assert "left the frame at step" in tip(browser) and "last finite loss" in tip(browser)


@pytest.mark.slow
@needs_chromium
def test_diverged_runs_are_marked_with_arm_and_step(report, study):
    report.click(f"{CHARTS} .choices:first-of-type button:nth-child(2)")
    marked = report.each(f"{CHARTS} g[data-tip*=diverged]", "one.dataset.tip")
    for run in (one for one in study["runs"] if one["status"] == "diverged"):
        (said,) = [text for text in marked if text.startswith(f"{run['arm']}, seed {run['seed']}\n")]
        assert f"diverged at step {run['ended']}" in said.replace("\u2009", "")
    names = " ".join(report.each(f"{CHARTS} .curves .label", "one.textContent")).replace("\u2009", "")
    assert "fp16_naive_foreach, step 51, 3 runs" in names
    ended = [run["ended"] for run in study["runs"] if run["arm"] == "fp16_naive" and run["ended"]]
    assert len(ended) == 2 and all(f"fp16_naive, step {step}" in names for step in ended)
    report.hover(f"{CHARTS} [data-arm=fp16_naive] .leaves")
    assert tip(report).startswith("fp16_naive, seed") and crosshair(report) == []


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
    report.key("+")
    near, grid = x_ticks(report), "Number(one.getAttribute('y1'))"
    assert near != whole
    before = report.each(f"{CHARTS} .curves .grid", grid)
    report.key("ArrowUp")
    assert x_ticks(report) == near and report.each(f"{CHARTS} .curves .grid", grid) != before
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


def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a[0] >= b[0] and a[1] >= b[1] and a != b


@pytest.mark.slow
@needs_chromium
def test_frontier_is_that_of_the_means(report, study):
    arms = [arm for arm in study["arms"] if not arm["statuses"].get("diverged")]
    points = {arm["name"]: (arm["throughput"]["value"], -arm["quality"]["mean"]) for arm in arms}
    edge = {arm for arm, one in points.items() if not any(beats(other, one) for other in points.values())}
    told = report.first(f"{CHARTS} .pair [role=img]", "one.getAttribute('aria-label')")
    assert set(re.search(r"frontier: (.*)\. The numbers", told)[1].split(", ")) == edge and len(edge) > 2


# -- quality, throughput and memory -----------------------------------------------------------------------------------


def meet(a: list[float], b: list[float]) -> bool:
    return a[0] < b[2] - 1 and b[0] < a[2] - 1 and a[1] < b[3] - 1 and b[1] < a[3] - 1


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("width", [1400, 390])
def test_labels_cover_no_mark_and_no_label(browser, width):
    browser.resize(width, 900)
    browser.open(render_page(make_payload()))
    browser.run("[...document.querySelectorAll('.presets button')].find((one) => one.textContent === 'all').click()")
    for study in (0, 1):
        charts = browser.each(f"#study-{study}-curves .chart", "1")
        assert len(charts) == 4
        for i in range(len(charts)):
            chart = f"#study-{study}-curves .chart:nth-child({i})" if i else f"#study-{study}-curves .curves"
            texts = browser.each(f"{chart} svg text", f"[one.textContent, {BOXES}]")
            marks = browser.each(f"{chart} .dot, {chart} .leaves, {chart} .cross", BOXES)
            labels = browser.each(f"{chart} svg .label", f"[one.textContent, {BOXES}]")
            for j, (text, box) in enumerate(texts):
                assert not [other for other, at in texts[:j] if meet(box, at)], (i, text)
            for text, box in labels:
                assert not [mark for mark in marks if meet(box, mark)], (i, text)
            assert labels and (i == 0 or len(marks) > 15)


@pytest.mark.slow
@needs_chromium
def test_throughput_against_memory_has_its_frontier(report, study):
    arms = [arm for arm in study["arms"] if not arm["statuses"].get("diverged")]
    points = {arm["name"]: (arm["throughput"]["value"], -arm["memory_gb"]["mean"]) for arm in arms}
    edge = {arm for arm, one in points.items() if not any(beats(other, one) for other in points.values())}
    told = report.each(f"{CHARTS} .pair [role=img]", "one.getAttribute('aria-label')")
    (told,) = [one for one in told if one.startswith("Throughput against memory.")]
    assert set(re.search(r"frontier: (.*)\. The numbers", told)[1].split(", ")) == edge
    assert len(report.each(f"{CHARTS} .pair .chart:nth-child(3) .point", "1")) == len(study["arms"])


@pytest.mark.slow
@needs_chromium
def test_noise_of_an_allocator_does_not_fill_an_axis(browser):
    payload = small()
    for i, arm in enumerate(payload["studies"][0]["arms"]):
        arm["memory_gb"] = {"mean": 0.362 + 0.0002 * i, "n": 3}
        arm["throughput"] |= {"value": 5000 + 3 * i, "low": 4999 + 3 * i, "high": 5001 + 3 * i}
    browser.resize(1280, 900)
    browser.open(render_page(payload))
    for i, along in ((1, "width"), (2, "width"), (3, "width"), (3, "height")):
        chart = f"{CHARTS} .pair .chart:nth-child({i})"
        (frame,) = browser.each(f"{chart} .plot", f"one.getBoundingClientRect().{along}")
        start = "left" if along == "width" else "top"
        at = browser.each(f"{chart} .dot", f"one.getBoundingClientRect().{start}")
        assert len(at) > 1 and max(at) - min(at) < 0.06 * frame, (i, along)
    quality = browser.each(f"{CHARTS} .pair .chart:nth-child(1) .dot", "one.getBoundingClientRect().top")
    assert max(quality) - min(quality) > 20  # a small difference in quality is no noise


# -- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_a_chart_is_saved_as_png(browser, dark, tmp_path):
    browser.resize(1280, 900, dark)
    browser.open(render_page(make_payload(studies=1)))
    browser.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    names = ("loss_curves", "quality_against_throughput", "quality_against_memory", "throughput_against_memory")
    for i, name in enumerate(names):
        browser.run(f"document.querySelectorAll('{CHARTS} .picture')[{i}].click()")
        file, late = tmp_path / f"precision-lm-{name}.png", time.monotonic() + 20
        while not file.exists() and time.monotonic() < late:
            time.sleep(0.05)
        pixels = matplotlib.image.imread(file)[..., :3]
        size = browser.each(f"{CHARTS} .plot", "[one.clientWidth, one.clientHeight]")[i]
        assert pixels.shape[1] == pytest.approx(2 * (size[0] + 32), abs=4) and pixels.shape[0] > 2 * size[1] + 100

        def near(color: str, part, wanted: int = 30) -> bool:
            rgb = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
            return int((abs(part - rgb).max(axis=-1) < 0.02).sum()) > wanted

        ink, card = ("#e8e9e6", "#1b1f23") if dark else ("#1b1f24", "#ffffff")
        assert near(card, pixels, pixels.shape[0] * pixels.shape[1] // 3)
        assert near(ink, pixels[: 2 * 30])  # the title
        chart, legend = pixels[2 * 40 : 2 * (40 + size[1])], pixels[2 * (40 + size[1]) :]
        for color in (SKY, "#e8702a") if dark else (BLUE, "#d55e00"):
            assert near(color, chart) and near(color, legend)
        assert near(ink, legend) and near("#9da6ae" if dark else "#5d6670", chart)  # names; labels of axes
    assert browser.complaints() == []
