"""The report's page: what is embedded in it, and what a browser makes of its tables and texts."""

import base64
import copy
import csv
import hashlib
import json
import re
import time
from html.parser import HTMLParser

import pytest
from browsers import BLUE, CHARTS, FOREST, SKY, TABLE, Browser, arms_in, inked, needs_chromium, picked, tip
from made_report import ARMS, ENDS, EVIL, evil, make_payload, small

from gptlab.report.page import render_page, write_page

# -- what is in the file --------------------------------------------------------------------------------------------


class Outline(HTMLParser):
    """Checks that elements close in order, and keeps what the tests look at."""

    VOID = ("meta", "link", "br", "img", "input", "hr", "wbr")

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open_tags, self.tags, self.attributes, self.scripts = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open_tags == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, key, value) for key, value in attributes]
        if tag not in self.VOID:
            self.open_tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag

    def handle_data(self, text):
        if self.open_tags and self.open_tags[-1] == "script":
            self.scripts.append(text)

    def payload(self):
        return json.loads(self.scripts[0])


def test_payload_comes_back_out_of_the_page():
    payload = small()
    before = copy.deepcopy(payload)
    found = Outline(render_page(payload)).payload()
    assert payload == before  # and is itself left as it was
    for study, original in zip(found["studies"], payload["studies"], strict=True):
        assert list(study["means"]) == list(original["means"]) and "fp16_naive" in study["means"]
        curves = [*study.pop("runs"), *study.pop("means").values()]
        for curve, points in zip(curves, [*original.pop("runs"), *original.pop("means").values()], strict=True):
            for kind in ("train", "val"):
                steps, losses = curve.pop(kind)
                near = [loss if loss is None else pytest.approx(loss, rel=5e-5) for _, loss in points[kind]]
                assert steps == [step for step, _ in points.pop(kind)] and losses == near
            assert curve == points
    assert found == payload


def test_markup_in_texts_ends_no_script():
    payload = evil()
    outline = Outline(render_page(payload))
    assert outline.tags.count("script") == 2 and "img" not in outline.tags
    assert not re.search(r"[<>&\u2028\u2029]", outline.scripts[0])
    found = outline.payload()
    assert ENDS in found["title"] and found["title"] == payload["title"]
    assert found["studies"][0]["arms"] == payload["studies"][0]["arms"]


def test_placeholders_in_texts_are_left_alone():
    page = render_page(small() | {"title": "{{script}} {{payload}}"})
    assert "<title>{{script}} {{payload}}</title>" in page
    assert Outline(page).payload()["title"] == "{{script}} {{payload}}"


def test_what_is_no_number_is_refused():
    payload = small()
    payload["studies"][0]["arms"][0]["quality"]["mean"] = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        render_page(payload)


def test_nothing_is_fetched_from_anywhere():
    page = render_page(small())
    outline = Outline(page)
    assert not re.search(r"(https?|wss?)://|@import|url\(|innerHTML|insertAdjacentHTML|document\.write|\beval\(", page)
    assert [value for _, key, value in outline.attributes if key in ("src", "href")] == ["data:,", "#main"]
    policy = next(value for _, key, value in outline.attributes if key == "content" and "default-src" in value)
    digest = base64.b64encode(hashlib.sha256(outline.scripts[1].encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy and "unsafe" not in policy


def test_page_has_its_landmarks():
    outline = Outline(render_page(small()))
    assert {"html", "head", "title", "header", "nav", "main", "footer", "noscript"} <= set(outline.tags)
    assert ("html", "lang", "en") in outline.attributes
    assert ("meta", "content", "width=device-width, initial-scale=1") in outline.attributes


def test_page_is_written_into_a_new_folder(tmp_path):
    file = tmp_path / "new" / "report.html"
    write_page(small(), file)
    assert file.read_text(encoding="utf-8") == render_page(small()) and list(file.parent.iterdir()) == [file]
    assert file.stat().st_size < 200_000
    write_page(make_payload(studies=1), file)  # nineteen arms, three seeds, curves of as many points as a page takes
    assert file.stat().st_size < 500_000


def test_a_page_of_very_many_curves_thins_them_and_keeps_their_spikes(monkeypatch):
    payload = small()
    curves = [of[kind] for study in payload["studies"] for of in study["runs"] for kind in ("train", "val")]
    curves[0][:] = [[step, None if step == 5 else 99.5 if step == 77 else 3.0] for step in range(100)]
    before = copy.deepcopy(payload)
    shown = Outline(render_page(payload)).payload()["studies"]
    assert shown[0]["runs"][0]["train"][0] == list(range(100))
    monkeypatch.setattr("gptlab.report.page.MOST_POINTS", 20 * len(curves))
    shown = Outline(render_page(payload)).payload()["studies"]
    steps, losses = shown[0]["runs"][0]["train"]
    assert payload == before and (losses[0], losses[-1], steps[-1]) == (3.0, 3.0, 99)
    assert losses[steps.index(77)] == 99.5 and losses[steps.index(5)] is None and len(steps) <= 24


# -- what a browser makes of it -------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_chromium
def test_opens_from_a_file_without_complaint_or_request(browser):
    page = render_page(make_payload())
    for width, height, dark in ((1280, 900, False), (390, 844, False), (360, 740, True)):
        browser.resize(width, height, dark)
        browser.open(page)
        assert browser.complaints() == []
        assert browser.run("performance.getEntriesByType('resource').length") == 0
        assert browser.run("document.documentElement.scrollWidth") == width  # tables scroll in boxes of their own
        assert inked(browser, SKY if dark else BLUE) > 100


@pytest.mark.slow
@needs_chromium
def test_each_question_begins_with_a_sentence_and_its_numbers_fold_out(report, study):
    cards, question = "#study-0-answers .card", study["questions"][1]
    tops = report.each("#study-0 > *", "one.className || one.id")
    assert tops.index("answers") < tops.index("facts") < tops.index("part")  # answers stand before everything else
    assert report.each(f"{cards} .finding", "one.textContent") == [one["sentence"] for one in study["questions"]]
    second = "#study-0-answers .card:nth-child(2)"
    lines = report.first(second, "one.innerText").split("\n")
    head = ["\u2713 confirmed", "H2", question["claim"]]
    assert [" ".join(line.split()) for line in lines if line] == [
        " ".join(head),
        question["sentence"],
        f"{question['cost']} {question['change']}",
        "Numbers",
    ]
    assert not report.first(f"{second} .evidence", "one.checkVisibility()")
    report.click(f"{second} summary")
    assert question["text"] in report.first(second, "one.innerText")
    assert report.first(f"{second} .evidence", "one.checkVisibility()")
    shown = report.first("#study-0", "one.innerText")
    advice = [one["text"] for one in study["recommendations"]]  # of the study, and of a question
    assert [shown.count(text[1:]) for text in advice] == [1, 0]  # its first letter is a capital
    order = "[...document.querySelectorAll('#study-0-answers > *')].map((one) => one.className)"
    assert report.run(order) == ["cards", "advice"]


@pytest.mark.slow
@needs_chromium
def test_a_study_without_questions_begins_with_its_summary_and_warnings_take_a_line(browser):
    payload = make_payload(points=20, studies=1)
    study = payload["studies"][0]
    browser.open(render_page(payload))
    assert study["summary"] in browser.first(TABLE, "one.innerText")
    study["questions"] = []
    payload["warnings"][0] += ", and more" * 60
    for width in (1280, 390):
        browser.resize(width, 900)
        browser.open(render_page(payload))
        assert browser.first("#study-0-answers > *", "[one.className, one.textContent]") == [
            "finding",
            study["summary"],
        ]
        assert study["summary"] not in browser.first(TABLE, "one.innerText")
        assert browser.first(".warnings", "one.innerText").startswith("2 warnings: precision-lm")
        assert browser.first(".warnings", "one.offsetHeight") < 60
    browser.click(".warnings summary")
    assert browser.each(".warnings li", "one.textContent") == payload["warnings"]
    assert browser.first(".warnings", "one.innerText").count(payload["warnings"][0]) == 1
    assert browser.complaints() == []


@pytest.mark.slow
@needs_chromium
def test_sorting_by_headers(report, study):
    as_it_was, sort = arms_in(report, TABLE), f"{TABLE} thead th:nth-child(3) button"
    quality = {arm["name"]: arm["quality"]["mean"] for arm in study["arms"] if arm["quality"]}
    for direction in ("ascending", "descending"):
        report.click(sort)
        order = sorted(quality, key=quality.__getitem__, reverse=direction == "descending")
        assert arms_in(report, TABLE) == [*order, "fp16_naive_foreach"]  # without a quality it is last, both ways
        assert report.each(f"{TABLE} thead th", "one.getAttribute('aria-sort')")[1:4] == ["none", direction, "none"]
        rest = [arm for arm in arms_in(report, TABLE) if arm != "fp32_baseline"]
        assert arms_in(report, FOREST, "[role=listitem]") == rest
    report.click(sort)
    assert arms_in(report, TABLE) == as_it_was == list(ARMS)
    report.first(f"{TABLE} thead button", "one.focus()")
    report.key("Enter", code="Enter", windowsVirtualKeyCode=13, text="\r")
    natural = sorted(ARMS, key=lambda arm: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", arm)])
    assert arms_in(report, TABLE) == natural and natural.index("fp8_rowwise") < natural.index("fp16_naive")


@pytest.mark.slow
@needs_chromium
def test_filters_narrow_table_and_differences(report):
    report.click(f"{TABLE} input[type=search]")
    report.send("Input.insertText", text="8BIT amp")
    assert arms_in(report, TABLE) == ["amp_fp16_8bit_adam", "amp_bf16_8bit_adam"]
    assert arms_in(report, FOREST, "[role=listitem]") == arms_in(report, TABLE)
    assert report.first(f"{TABLE} .count", "one.textContent") == "2 of 19 rows"
    clear = "one.value = ''; one.dispatchEvent(new Event('input'))"
    report.first(f"{TABLE} input[type=search]", f"(() => {{ {clear} }})()")

    def choose(label, value):
        set_it = f"one.value = '{value}'; one.dispatchEvent(new Event('change'))"
        report.first(f"{TABLE} select[aria-label$='{label}']", f"(() => {{ {set_it} }})()")
        return arms_in(report, TABLE)

    assert choose("status", "diverged") == ["fp16_naive", "fp16_naive_foreach"]
    choose("status", "")
    assert choose("group", "core") == ["fp32_baseline", "amp_fp16", "amp_bf16", "bf16_pure"]
    assert choose("verdict", "worse") == ["bf16_pure"]


@pytest.mark.slow
@needs_chromium
def test_picked_arms_have_a_colour_and_look_the_same_everywhere(report):
    assert len(picked(report)) == 7 and "fp32_baseline" in picked(report) and inked(report, BLUE) > 100
    report.click(f"{TABLE} tr[data-arm=fp32_baseline] td:nth-child(2)")
    assert "fp32_baseline" not in picked(report) and inked(report, BLUE) == 0
    chip = f"{CHARTS} .chip[data-arm=amp_fp16]"
    assert report.first(chip, "one.getAttribute('aria-pressed')") == "false"
    report.click(chip)  # takes the colour that has become free
    assert report.first(chip, "one.getAttribute('aria-pressed')") == "true" and inked(report, BLUE) > 100
    assert "amp_fp16" in picked(report)
    color = "one.style.getPropertyValue('--look')"
    assert report.each(".point[data-arm=amp_fp16]", color) == ["var(--c0)"] * 6  # three charts of two studies
    preset = "[...document.querySelectorAll('.presets button')].find((one) => one.textContent === '{}').click()"
    report.run(preset.format("all"))
    assert picked(report) == list(ARMS)
    look = "getComputedStyle(one).color + one.innerHTML"  # colour, dashes and mark
    assert len(set(report.each(f"{TABLE} [data-swatch]", look))) == len(ARMS)
    report.run(preset.format("none"))
    assert picked(report) == []


@pytest.mark.slow
@needs_chromium
def test_hovering_a_row_lights_its_arm_in_the_charts(report):
    report.hover(f"{TABLE} tr[data-arm=bf16_kahan]")
    assert set(report.each(".hot", "one.dataset.arm")) == {"bf16_kahan"}
    assert len(report.each(".point.hot", "1")) == 6
    assert report.first(".point:not(.hot)", "getComputedStyle(one).opacity") == "0.2"
    report.mouse("Moved", 2, 2)
    assert report.each(".hot", "1") == []


@pytest.mark.slow
@needs_chromium
def test_csv_has_what_is_shown(report, study):
    report.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(report.folder / "saved"))
    report.click(f"{TABLE} input[type=search]")
    report.send("Input.insertText", text="amp_bf16_8bit")
    report.click(f"{TABLE} .save")
    file, late = report.folder / "saved" / "precision-lm.csv", time.monotonic() + 10
    while not (file.exists() and file.stat().st_size) and time.monotonic() < late:
        time.sleep(0.05)
    (row,) = csv.DictReader(file.read_text(encoding="utf-8").splitlines())
    arm = next(arm for arm in study["arms"] if arm["name"] == row["name"] == "amp_bf16_8bit_adam")
    assert float(row["final_val_loss_mean"]) == arm["quality"]["mean"] and row["completed"] == "3"
    assert float(row["difference_low"]) == arm["comparison"]["low"] and row["verdict"] == arm["comparison"]["verdict"]
    cell = report.run("""["=1+1", "-x", -1.5, null, 'a "b", c'].map(csvCell)""")
    assert cell == ["'=1+1", "'-x", "-1.5", "", '"a ""b"", c"']


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("decimals", [2, 5])
def test_columns_that_decide_fit_and_the_rest_is_behind_a_button(browser, decimals):
    payload = make_payload(points=20)
    for study in payload["studies"]:
        study["metric"]["margin"] = 2 * 10**-decimals
    browser.resize(1400, 900)
    browser.open(render_page(payload))
    heads = f"{TABLE} thead th"
    shown = "one.offsetWidth > 0 ? one.textContent : ''"
    first = ["arm", "runs", "validation loss, nats", "difference", "verdict", "tokens/s", "memory, GB"]
    assert [head for head in browser.each(heads, shown) if head] == first
    for study in (0, 1):
        assert browser.first(f"#study-{study}-table .table-box", "one.scrollWidth - one.clientWidth") == 0
    cells = browser.each(f"{TABLE} tr[data-arm=amp_bf16] > :not(.further)", "one.innerText")
    assert cells[5].split("\n") == ["63\u2009336", "3.48\u00d7 [3.38, 3.58]"] and len(cells) == len(first)
    browser.click(f"{TABLE} .wider")
    further = ["frontier", "tokens/s, 95% interval", "perplexity", "wall time, s"]
    assert browser.each(heads, shown) == first + further
    assert browser.first(f"{TABLE} .wider", "one.getAttribute('aria-pressed')") == "true"
    browser.click(f"{TABLE} .wider")
    assert [head for head in browser.each(heads, shown) if head] == first and browser.complaints() == []


@pytest.mark.slow
@needs_chromium
def test_the_copy_button_covers_no_command(browser):
    payload = small()
    command = "gptlab study run " + "/a/long/way/to/a/study/" * 30 + "study.toml"
    payload["studies"][0]["provenance"]["command"] = command
    for width in (1400, 390):
        browser.resize(width, 900)
        browser.open(render_page(payload))
        where = "#study-0-origin .copyable"
        browser.first(f"{where} pre", "one.scrollLeft = 1e6")
        code = browser.first(f"{where} code", "one.getBoundingClientRect().right")
        button = browser.first(f"{where} button", "one.getBoundingClientRect().left")
        assert code <= button and browser.first(f"{where} pre", "one.scrollLeft") > 0
        assert browser.run("document.documentElement.scrollWidth") == width


@pytest.mark.slow
@needs_chromium
def test_copy_button_copies_or_selects(report):
    button, late = "#study-0-origin .copyable button", time.monotonic() + 10
    report.click(button)
    while report.first(button, "one.textContent") == "Copy" and time.monotonic() < late:
        time.sleep(0.02)
    assert report.first(button, "one.textContent") in ("Copied", "Selected: press Ctrl+C")


@pytest.mark.slow
@needs_chromium
def test_evidence_leads_to_the_arms_row(report):
    report.click("#across .evidence button[data-arm=bf16_body_fp32_head]")
    row = f"{TABLE} tr[data-arm=bf16_body_fp32_head]"
    shown = "one.getBoundingClientRect().top > 0 && one.getBoundingClientRect().bottom < innerHeight"
    late = time.monotonic() + 10
    while not report.first(row, shown) and time.monotonic() < late:  # it scrolls there smoothly
        time.sleep(0.05)
    assert report.first(row, shown)


@pytest.mark.slow
@needs_chromium
def test_markup_is_shown_as_text(browser):
    payload = evil()
    browser.resize(1280, 900)
    browser.open(render_page(payload))
    browser.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    browser.hover(f"{TABLE} tbody tr:nth-child(2) [data-tip]")
    assert EVIL in tip(browser)
    assert browser.complaints() == [] and browser.each("img, script:not(#payload):not(:last-of-type)", "1") == []
    assert arms_in(browser, TABLE) == ["fp32_baseline", EVIL, "fp16_naive"]
    shown, study = " ".join(browser.run("document.body.innerText").split()), payload["studies"][0]
    reason, recipe = study["failures"][0]["reason"], study["provenance"]["recipe"]
    for text in (payload["title"], payload["warnings"][0], reason, recipe):
        assert EVIL in text and " ".join(text.split()) in shown


def without_curves(study):
    study["means"] = {}
    for run in study["runs"]:
        run.update(train=[], val=[])


def without_numbers(study):
    study["metric"]["margin"], study["baseline"] = None, "gone"
    for arm in study["arms"]:
        nothing = ("quality", "throughput", "speedup", "memory_gb", "memory_ratio", "frontier", "comparison")
        arm.update(dict.fromkeys(nothing), values={}, other={}, statuses={}, note="", group="")


def without_runs(study):
    study.update(arms=[], runs=[], means={}, failures=[], seeds=[], questions=[], recommendations=[], provenance={})


@pytest.mark.slow
@needs_chromium
def test_hellaswag_within_a_seed_has_a_table_where_it_was_measured(browser: Browser) -> None:
    payload = make_payload(points=20, studies=1)
    browser.open(render_page(payload))
    assert browser.each("section[id$=within]", "one.id") == []
    payload["studies"][0]["within"] = [
        {"arm": "amp_bf16", "seed": 1, "mean": -0.0123, "low": -0.02, "high": -0.0046, "rows": 10042}
    ]
    browser.open(render_page(payload))
    cells = browser.each("section[id$=within] tbody tr > *", "one.textContent")
    assert [cell.replace("\u2212", "-") for cell in cells] == [
        "amp_bf16",
        "1",
        "10042",
        "-0.0123",
        "-0.0200",
        "-0.0046",
    ]
    assert browser.complaints() == []


@pytest.mark.slow
@needs_chromium
def test_arms_at_equal_cost_have_a_table_where_they_differ_in_it(browser: Browser) -> None:
    payload = make_payload(points=20, studies=1)
    browser.open(render_page(payload))
    assert browser.each("section[id$=equal]", "one.id") == []
    quality = {"n": 3, "mean": 2.5, "sd": 0.01, "low": 2.4, "high": 2.6}
    first, *rest = [arm["name"] for arm in payload["studies"][0]["arms"]]
    arms = [{"name": first, "quality": quality, "difference": None}]
    arms += [{"name": name, "quality": quality, "difference": {**quality, "mean": -0.25}} for name in rest]
    arms[-1] |= {"quality": None, "difference": None}
    payload["studies"][0]["equal"] = [{"what": "seconds", "budget": 12.5, "arms": arms}]
    browser.open(render_page(payload))
    assert browser.each("section[id$=equal] thead th", "one.textContent")[-1].startswith("at 12.5 seconds")
    cells = browser.each("section[id$=equal] tbody td:last-child", "one.textContent")
    assert len(cells) == len(arms) and sum("2.5" in cell and "0.25" in cell for cell in cells) == len(arms) - 2
    assert browser.complaints() == []


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_curves, "No run has logged a finite loss yet."),
        (without_numbers, "No arm has a seed in common with the baseline yet."),
        (without_runs, "No arm of this study has a run yet."),
    ],
)
def test_what_is_missing_is_said(browser, change, said):
    payload = small()
    for study in payload["studies"]:
        change(study)
    browser.open(render_page(payload))
    shown = browser.run("document.body.innerText")
    assert browser.complaints() == [] and said in shown
    assert not re.search(r"NaN|undefined|\[object|null|Infinity", shown)


@pytest.mark.slow
@needs_chromium
def test_an_arm_that_was_not_run_says_so(browser):
    payload = make_payload(points=20, studies=1)
    arm = payload["studies"][0]["arms"][1]
    arm |= dict.fromkeys(("quality", "throughput", "speedup", "memory_gb", "memory_ratio", "frontier"))
    arm |= {"values": {}, "statuses": {}, "other": {}}
    arm["comparison"] |= dict.fromkeys(("mean", "sd", "low", "high")) | {"n": 0, "verdict": "not run"}
    arm["comparison"]["text"] = "not run: this arm has no run yet"
    browser.open(render_page(payload))
    for row in (f"{TABLE} tr[data-arm={arm['name']}]", f"{FOREST} [data-arm={arm['name']}]"):
        assert browser.first(f"{row} .badge", "one.textContent").endswith(" not run")
    shown = browser.first(f"{FOREST} [data-arm={arm['name']}] .says", "one.textContent")
    assert shown.count("not run") == 1 and shown.endswith("this arm has no run yet")


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize(("seeds", "studies", "points"), [(1, 1, 300), (2, 2, 2), (1, 2, 1)])
def test_few_seeds_and_points_draw(browser, seeds, studies, points):
    browser.open(render_page(make_payload(seeds=seeds, studies=studies, points=points)))
    assert browser.complaints() == []
    assert not re.search(r"NaN|undefined", browser.run("document.body.innerText"))


@pytest.mark.slow
@needs_chromium
def test_five_hundred_runs_open_in_two_seconds(browser):
    arms = {f"arm_{i:03d}": ("core", 0.001 * i, 1 + 0.01 * i, 1 - 0.002 * i, 0.0) for i in range(167)}
    payload = make_payload(arms, studies=1)
    assert len(payload["studies"][0]["runs"]) == 501
    page = render_page(payload)
    assert len(page.encode()) < 10e6
    browser.resize(1280, 900)
    times = []
    while len(times) < 8 and min(times, default=9999) >= 2000:  # other work on the machine is not the page's
        times.append(browser.open(page))
    assert min(times) < 2000 and browser.complaints() == [] and inked(browser, BLUE) > 100


@pytest.mark.slow
@needs_chromium
def test_a_thousand_runs_of_250_arms_make_a_page_that_can_be_read(browser):
    arms = {f"arm_{i:03d}": ("core", 0.001 * i, 1 + 0.01 * i, 1 - 0.002 * i, 0.0) for i in range(250)}
    page = render_page(make_payload(arms, seeds=4, studies=1))
    assert len(page.encode()) < 10e6
    browser.resize(1280, 900)
    browser.open(page)
    assert browser.complaints() == [] and inked(browser, BLUE) > 100
    chosen = picked(browser)
    assert len(chosen) == 7 and {"arm_000", "arm_249"} <= set(chosen)  # the baseline, and the worst beside the best
    shown = browser.each(f"{CHARTS} .legend .chip", "one.offsetHeight > 0")
    assert len(shown) == 250 and sum(shown) == 7
    browser.click(f"{TABLE} tr[data-arm=arm_100]")  # each of the others is a click away
    assert "arm_100" in picked(browser)
    rows = browser.each(f"{FOREST} .forest-row[data-arm] .says", "[one.offsetHeight, one.innerText, one.dataset.tip]")
    assert len(rows) == 249 and max(height for height, *_ in rows) < 80
    assert any("power" in whole for *_, whole in rows) and not any("power" in told for _, told, _ in rows)
