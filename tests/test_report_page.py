"""The report's page: what is embedded in it, and what a browser makes of it.

The browser is Chromium without a window, spoken to in its own protocol over two pipes: no driver and no library.
"""

import base64
import contextlib
import copy
import csv
import fcntl
import hashlib
import json
import os
import random
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gptlab.report.page import render_page, write_page

EVIL = "<img src=x onerror=alert(1)>"
ENDS = "</script><script>alert(2)</script><!-- \u2028 &amp; {{style}} \\u003c"

# -- a report to show: two studies of nineteen arms by three seeds, as `analysis` makes it from runs -------------------

ARMS = {  # name: (group, loss added, speed over fp32, memory over fp32, micro-F1 added)
    "fp32_baseline": ("core", 0.0, 1.0, 1.0, 0.0),
    "amp_fp16": ("core", 0.003, 3.44, 0.65, -0.001),
    "amp_bf16": ("core", 0.004, 3.48, 0.65, -0.001),
    "bf16_pure": ("core", 0.052, 3.90, 0.50, 0.010),
    "fp16_naive": ("extended", 0.3, 3.9, 0.50, -0.2),
    "fp16_naive_foreach": ("extended", 0.5, 3.9, 0.50, -0.2),
    "bf16_naive": ("extended", 0.052, 3.88, 0.50, 0.010),
    "amp_fp16_8bit_adam": ("extended", 0.048, 3.31, 0.62, -0.014),
    "amp_bf16_8bit_adam": ("extended", 0.055, 3.42, 0.63, -0.016),
    "bf16_no_compile": ("extended", 0.051, 2.70, 0.61, 0.010),
    "fp32_tf32_matmul": ("extended", 0.001, 1.92, 1.0, 0.0),
    "amp_bf16_fp32_head": ("extended", -0.002, 2.95, 0.72, 0.009),
    "bf16_body_fp32_head": ("extended", 0.021, 3.22, 0.58, 0.012),
    "bf16_stochastic_rounding": ("extended", 0.010, 3.61, 0.50, -0.003),
    "bf16_kahan": ("extended", 0.006, 3.55, 0.56, -0.002),
    "bf16_fp32_norms": ("extended", 0.040, 3.70, 0.51, 0.004),
    "fp8_tensorwise": ("extended", 0.031, 3.95, 0.61, -0.008),
    "fp8_rowwise": ("extended", 0.024, 3.72, 0.61, -0.006),
    "amp_bf16_bf16_loss": ("extended", 0.015, 3.52, 0.58, -0.004),
}
LM = {
    "description": "Precision regimes on language modelling: GPT-2 124M, OpenWebText, 10,000 steps",
    "unit": "tokens",
    "columns": [{"key": "val_perplexity", "label": "perplexity"}],
    "metric": {
        "key": "final_val_loss",
        "label": "validation loss, nats",
        "better": "lower",
        "margin": 0.02,
        "margin_from": "stated by the study",
    },
}
CLASSIFY = {
    "description": "Precision regimes on classification: RoBERTa-base with a linear head, EURLEX57K",
    "unit": "samples",
    "columns": [],
    "metric": {
        "key": "micro_f1",
        "label": "micro-F1",
        "better": "higher",
        "margin": 0.005,
        "margin_from": "twice the noise between the baseline's seeds",
    },
}


def mean_sd(values: list[float]) -> dict:
    n, mean = len(values), sum(values) / len(values)
    if n == 1:
        return {"n": 1, "mean": mean, "sd": None, "low": None, "high": None}
    sd = (sum((value - mean) ** 2 for value in values) / (n - 1)) ** 0.5
    half = {2: 8.98, 3: 2.48}.get(n, 1.4) * sd  # Student's t over the root of n
    return {"n": n, "mean": mean, "sd": sd, "low": mean - half, "high": mean + half}


def make_study(name: str, task: str, arms: dict, seeds: int, points: int, draw: random.Random) -> dict:
    runs = len(arms) * seeds
    study = {
        "name": name,
        "task": task,
        "folder": f"results/{name}",
        "baseline": next(iter(arms)),
        "inference": None,
        "seeds": list(range(seeds)),
        "runs_planned": runs,
        "runs_found": runs,
        "arms": [],
        "failures": [],
        "runs": [],
        "means": {},
        **copy.deepcopy(LM if task == "lm" else CLASSIFY),
    }
    study["columns"].append({"key": "wall_seconds", "label": "wall time, s"})
    noise = [draw.gauss(0, 1) for _ in range(seeds)]  # what a seed does to all arms alike
    base: dict[str, float] = {}
    for arm, plan in arms.items():
        runs, values = [], {}
        for seed in range(seeds):
            diverges = arm == "fp16_naive_foreach" or (arm == "fp16_naive" and seed > 0)
            runs.append(make_run(study, arm, seed, plan[1], diverges, points, draw))
            if not diverges and task == "lm":
                values[str(seed)] = 2.95 + plan[1] + 0.02 * noise[seed] + draw.gauss(0, 0.004)
            elif not diverges:
                values[str(seed)] = 0.70 + plan[4] + 0.006 * noise[seed] + draw.gauss(0, 0.001)
        base = base or values
        study["runs"] += runs
        completed = [run for run in runs if run["status"] == "completed"]
        if completed:
            study["means"][arm] = {kind: mean_curve([run[kind] for run in completed]) for kind in ("train", "val")}
        study["arms"].append(make_arm(study, arm, plan, values, base, len(runs) - len(completed), draw))
    return study


def make_run(study: dict, arm: str, seed: int, loss: float, diverges: bool, points: int, draw: random.Random) -> dict:
    last = 10_000
    ended = last if not diverges else 1 if arm == "fp16_naive_foreach" else draw.randrange(900, 4000)
    steps = [round(1 + (last - 1) * i / max(1, points - 1)) for i in range(points)]
    smooth = {step: 2.95 + loss + 7.9 / (1 + step / 70) ** 0.9 for step in steps if step <= ended}
    train = [[step, value + draw.gauss(0, 0.05)] for step, value in smooth.items()]
    few = [step for step in smooth if steps.index(step) % max(1, points // 40) == 0]
    val = [[step - 1, smooth[step] + 0.02 + draw.gauss(0, 0.006)] for step in few]
    if diverges:
        train += [[ended + 10 * k, 3.4 + 0.7 * k * k] for k in range(1, 5)] + [[ended + 50, None]]
        spike = f"the training loss rose from 3.41 to 68.8 at step {ended} and stayed up for 39 steps"
        broken = "the update of step 1 left weight wte.weight not finite: the training loss is nan at step 2"
        study["failures"].append(
            {
                "arm": arm,
                "seed": seed,
                "status": "diverged",
                "step": ended + 50,
                "failure": "spike" if ended > 1 else "non_finite",
                "tensor": None if ended > 1 else "weight wte.weight",
                "reason": spike if ended > 1 else broken,
            }
        )
    return {
        "arm": arm,
        "seed": seed,
        "status": "diverged" if diverges else "completed",
        "train": train,
        "val": val,
        "ended": ended + 50 if diverges else None,
        "folder": f"{study['folder']}/{arm}_seed{seed}",
    }


def mean_curve(curves: list[list]) -> list:
    return [[at[0][0], sum(loss for _, loss in at) / len(at)] for at in zip(*curves, strict=True)]


def make_arm(study: dict, name: str, plan: tuple, values: dict, base: dict, diverged: int, draw) -> dict:
    group, _, speed, memory, _ = plan
    first, planned = name == study["baseline"], len(study["seeds"])
    rate = speed * (18_200 if study["task"] == "lm" else 48)
    other = {"wall_seconds": mean_sd([33_758 / speed + draw.gauss(0, 40) for _ in range(3)])}
    if values and study["task"] == "lm":
        other["val_perplexity"] = mean_sd([2.718281828**value for value in values.values()])
    statuses = {"completed": planned - diverged, "diverged": diverged}
    return {
        "name": name,
        "group": group,
        "planned": planned,
        "values": values,
        "settings": {"precision.regime": name},
        "note": "the reference: float32 throughout, TF32 off" if first else "autocast to bfloat16, the rest in float32",
        "statuses": {status: count for status, count in statuses.items() if count},
        "quality": mean_sd(list(values.values())) if values else None,
        "throughput": {"value": rate, "low": rate * 0.97, "high": rate * 1.03, "n": 3, "of": "runs"},
        "speedup": None if first else {"value": speed, "low": speed - 0.1, "high": speed + 0.1, "n": 3, "of": "seeds"},
        "memory_gb": {"mean": 40.9 * memory, "n": 3},
        "memory_ratio": memory,
        "other": other,
        "frontier": None if diverged else round(draw.random(), 3),
        "comparison": None if first else compare(study, values, base, diverged, planned),
    }


def compare(study: dict, values: dict, base: dict, diverged: int, planned: int) -> dict:
    pairs = [values[seed] - base[seed] for seed in values if seed in base]
    found = mean_sd(pairs) if pairs else dict.fromkeys(("mean", "sd", "low", "high")) | {"n": 0}
    margin, sign = study["metric"]["margin"], -1 if study["metric"]["better"] == "lower" else 1
    verdict, text = "not resolved", "; detectable with 80% power from 3 seeds: 0.05; 5 more seeds would resolve it"
    if found["low"] is not None:
        low, high = sorted((sign * found["low"], sign * found["high"]))
        if abs(found["mean"]) > margin and (low > 0 or high < 0):
            verdict = "better" if low > 0 else "worse"
        elif -margin < low and high < margin:
            verdict = "equivalent"
        numbers = f"{found['mean']:+.3g} [{found['low']:+.3g}, {found['high']:+.3g}] over {found['n']} seeds"
        text = f"{numbers}, p = 0.012 after Holm over 18" + (text if verdict == "not resolved" else "")
    if diverged:
        verdict, text = "diverges", f"{diverged} of {planned} runs diverged (95% interval of the rate 9% to 99%)"
    return found | {
        "verdict": verdict,
        "text": f"{verdict}: {text}",
        "p": 0.01,
        "p_holm": 0.012,
        "p_equivalent": 0.4,
        "mde": 0.05,
        "more_seeds": 5,
        "welch": None,
        "why": "",
    }


def ask(name: str, answer: str, claim: str, text: str, *evidence: str) -> dict:
    return {"id": name, "answer": answer, "claim": claim, "text": text, "evidence": list(evidence), "contrast": []}


def make_payload(arms: dict | None = None, seeds: int = 3, points: int = 300, studies: int = 2) -> dict:
    """A payload as `analysis` makes it, from planted differences and a fixed draw."""
    draw, arms = random.Random(4), arms or ARMS
    named = [("precision-lm", "lm"), ("precision-cls", "classify")][:studies]
    made = [make_study(name, task, arms, seeds, points, draw) for name, task in named]
    for study in made:
        study["questions"] = [
            ask(
                "H1",
                "confirmed",
                "a float32 head does not help language modelling",
                "equivalent: -0.006 [-0.011, -0.001] nats over 3 seeds, within the margin of 0.02 (p = 0.004)",
                "amp_bf16_fp32_head",
                "amp_bf16",
            ),
            ask(
                "H2",
                "confirmed",
                "float16 without loss scaling diverges",
                "diverges: 2 of 3 runs diverged (95% interval of the rate 9% to 99%)",
                "fp16_naive",
            ),
            ask(
                "H3",
                "rejected",
                "8-bit moments cost quality",
                "equivalent: +0.003 [-0.002, +0.008] nats over 3 seeds",
                "amp_bf16_8bit_adam",
                "amp_bf16",
            ),
            ask(
                "H4",
                "not resolved",
                "the frontier has the same arms on both tasks",
                "not resolved: fp8_tensorwise differs by 31% [-4%, 66%]; 6 more seeds would resolve it",
                "fp8_tensorwise",
            ),
        ]
        study["recommendations"] = [
            {
                "id": "overall",
                "evidence": ["amp_bf16", "fp32_baseline"],
                "text": "for language modelling on one H100: "
                "amp_bf16, 3.48 times as fast as fp32_baseline and equivalent within 0.02",
            },
            {"id": "H1", "text": "no arm is recommended: an fp32 head is equivalent and slower", "evidence": []},
        ]
        study["provenance"] = {
            "hardware": ["NVIDIA H100 80GB HBM3"],
            "commits": ["560430dfdf0e7268f60f3a952704f76180dc18b4"],
            "versions": {"gptlab": ["0.1.0"], "torch": ["2.13.0+cu128"], "python": ["3.11.7"], "cuda": []},
            "command": f"gptlab study run {study['name']}",
            "flags": "",
            "recipe": "[model]\nn_layer = 12\nn_head = 12\nn_embd = 768\n\n[optim]\nlr = 0.0006\nbetas = [0.9, 0.95]\n",
            "overrides": {arm: f'[precision]\nregime = "{arm}"\n' for arm in arms},
        }
    return {
        "title": " and ".join(study["name"] for study in made),
        "gptlab": "0.1.0",
        "studies": made,
        "command": f"gptlab study report {' '.join(study['folder'] for study in made)}",
        "warnings": [
            "precision-lm: runs differ in their commit: 560430dfdf0e (48 runs), 4675ceb00a11 (9 runs)",
            "precision-cls: three seeds; nothing below 0.03 in micro-F1 can be told apart",
        ],
        "across": make_across(made) if studies == 2 else None,
    }


def make_across(studies: list[dict]) -> dict:
    names, places = [arm["name"] for arm in studies[0]["arms"]], []
    for study in studies:
        sign = 1 if study["metric"]["better"] == "lower" else -1
        judged = [arm for arm in study["arms"] if not arm["statuses"].get("diverged")]
        order = sorted(judged, key=lambda arm: sign * arm["quality"]["mean"])
        places.append({arm["name"]: place + 1 for place, arm in enumerate(order)})
    flipped = [("amp_bf16_8bit_adam", "bf16_pure"), ("bf16_body_fp32_head", "amp_fp16_8bit_adam")]
    flips = [
        {
            "arm": arm,
            "reference": other,
            "verdict": "flips" if (arm, other) in flipped else "unresolved",
            "p_interaction": 0.0002 if (arm, other) in flipped else 0.6,
            "text": "precision-lm: -0.0411 [-0.0533, -0.0289]; precision-cls: +0.0262 [+0.021, +0.0314]",
        }
        for i, arm in enumerate(names)
        for other in names[:i]
    ]
    return {
        "name": "precision",
        "description": "The same regimes on two tasks",
        "flips": flips,
        "studies": [study["name"] for study in studies],
        "ranking": {
            "tau": 0.31,
            "low": -0.12,
            "high": 0.66,
            "p": 0.09,
            "n": 17,
            "text": "Kendall's tau-b 0.31 [-0.12, 0.66] over 17 arms, p = 0.09 of no association",
        },
        "ranks": [
            {
                "arm": name,
                "ranks": [place.get(name, len(names) - 0.5) for place in places],
                "flip": any(name in pair for pair in flipped),
            }
            for name in names
        ],
        "questions": [
            ask(
                "H5",
                "rejected",
                "the ranking of regimes is the same on both tasks",
                "2 pairs flip: bf16_pure and amp_bf16_8bit_adam, bf16_body_fp32_head and amp_fp16_8bit_adam",
                "bf16_pure",
                "amp_bf16_8bit_adam",
            )
        ],
        "recommendations": [
            {
                "id": "overall",
                "evidence": ["bf16_pure", "bf16_body_fp32_head"],
                "text": "choose the "
                "regime for the task: bf16_pure wins on classification and loses on language modelling",
            }
        ],
    }


def small() -> dict:
    return make_payload({arm: ARMS[arm] for arm in ("fp32_baseline", "amp_bf16", "fp16_naive")}, points=30)


def evil() -> dict:
    """Texts that hold markup, and an arm whose name is nothing else."""

    def poison(value):
        if isinstance(value, dict):
            return {key: poison(one) for key, one in value.items()}
        if isinstance(value, list):
            return [poison(one) for one in value]
        free = isinstance(value, str) and re.search(r"[ /]", value) and value not in (EVIL, "not resolved")
        return value + EVIL + ENDS if free else value

    return poison(json.loads(json.dumps(small()).replace("amp_bf16", EVIL)))


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


# -- a browser ------------------------------------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",
    "--no-first-run",
    "--disable-gpu",
    "--hide-scrollbars",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WIRE = "import os, sys; a = sys.argv; os.dup2(int(a[1]), 3); os.dup2(int(a[2]), 4); os.execvp(a[3], a[3:])"
LOADED = "new Promise((done) => requestAnimationFrame(() => setTimeout(() => done(performance.now()))))"


class Browser:
    """One page in a headless Chromium, by its DevTools protocol: JSON with a zero byte after it, over pipes 3 and 4."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.events, self.count, self.rest, self.session = folder, [], 0, b"", None
        theirs_in, self.out = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in os.pipe())
        self.into, theirs_out = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in os.pipe())
        wired = [sys.executable, "-c", WIRE, str(theirs_in), str(theirs_out), CHROMIUM, *FLAGS]
        self.process = subprocess.Popen(
            [*wired, f"--user-data-dir={folder / 'profile'}"],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.resize(1280, 900)

    def close(self) -> None:
        self.session = None
        with contextlib.suppress(OSError):
            self.send("Browser.close")
        self.process.wait(20)
        os.close(self.out)
        os.close(self.into)

    def send(self, method: str, **params):
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.count:
            pass
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def receive(self) -> dict:
        """The next message; what the page does of itself is kept in `events`."""
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.into], [], [], 60)
            data = os.read(self.into, 1 << 20) if ready else b""
            if not data:
                raise OSError("Chromium is gone" if ready else "Chromium has not answered for a minute")
            self.rest += data
        message, self.rest = self.rest.split(b"\0", 1)
        answer = json.loads(message)
        if "id" not in answer:
            self.events.append(answer)
        return answer

    def resize(self, width: int, height: int, dark: bool = False) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 700}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, page: str) -> float:
        """Open a page from a file and say how many milliseconds that took until all was drawn."""
        file = self.folder / "report.html"
        file.write_text(page, encoding="utf-8")
        self.events.clear()
        self.send("Page.navigate", url=file.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.receive()
        return self.run(LOADED)

    def run(self, script: str):
        """The value of an expression in the page."""
        how = {"awaitPromise": True, "returnByValue": True, "userGesture": True}
        answer = self.send("Runtime.evaluate", expression=script, **how)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def each(self, selector: str, script: str) -> list:
        """The value of an expression of `one` for each element that a selector finds."""
        return self.run(f"[...document.querySelectorAll({json.dumps(selector)})].map((one) => {script})")

    def first(self, selector: str, script: str):
        """The same for the first of them."""
        return self.run(f"((one) => {script})(document.querySelector({json.dumps(selector)}))")

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """Left, top, width and height of an element, scrolled into view."""
        self.first(selector, "one.scrollIntoView({ block: 'center', behavior: 'instant' })")
        self.run(LOADED)
        edges = "(({ left, top, width, height }) => [left, top, width, height])(one.getBoundingClientRect())"
        return tuple(self.first(selector, edges))

    def mouse(self, kind: str, x: float, y: float, **more) -> None:
        self.send("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, **more)

    def hover(self, selector: str) -> None:
        left, top, width, height = self.box(selector)
        self.mouse("Moved", left + width / 2, top + height / 2)

    def click(self, selector: str, times: int = 1) -> None:
        left, top, width, height = self.box(selector)
        for count in range(1, times + 1):
            for kind in ("Pressed", "Released"):
                button = {"button": "left", "buttons": 1, "clickCount": count}
                self.mouse(kind, left + width / 2, top + height / 2, **button)

    def key(self, key: str, **more) -> None:
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **more)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key)

    def picture(self, file: Path, whole: bool = True) -> None:
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(shot["data"]))

    def complaints(self) -> list:
        """Console messages, exceptions, dialogs, and requests for anything but the page itself."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        kinds += ("Page.javascriptDialogOpening",)
        asked = [event["params"] for event in self.events if event["method"] == "Network.requestWillBeSent"]
        own = [one for one in asked if one["request"]["url"].startswith((one["documentURL"], "blob:", "data:"))]
        return [event for event in self.events if event["method"] in kinds] + [one for one in asked if one not in own]


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium")


@pytest.fixture(scope="module")
def browser():
    with tempfile.TemporaryDirectory(prefix="gptlab-page-", ignore_cleanup_errors=True) as folder:
        one = Browser(Path(folder))
        yield one
        one.close()


# -- what a browser makes of it -------------------------------------------------------------------------------------

TABLE, CHARTS, FOREST = "#study-0-table", "#study-0-curves", "#study-0-differences"
BLUE, SKY = "#0072B2", "#56B4E9"  # the first arm's colour, on white and on black


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


def arms_in(browser: Browser, where: str, row: str = "tbody tr") -> list[str]:
    return browser.each(f"{where} {row}", "one.dataset.arm")


def picked(browser: Browser) -> list[str]:
    return browser.each(f"{TABLE} input:checked", "one.dataset.pick")


def tip(browser: Browser) -> str:
    return browser.first("#tip", "one.hidden ? '' : one.innerText")


def x_ticks(browser: Browser) -> list[str]:
    return browser.each(f"{CHARTS} .curves > div:first-child text[text-anchor=middle]", "one.textContent")


def inked(browser: Browser, color: str) -> int:
    """How many pixels of the first study's curves have this colour."""
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)] + [255]
    read = (  # of a copy: the page's own canvas stays where the browser has put it
        "(() => { const from = document.querySelector('CANVAS'), copy = new OffscreenCanvas(from.width, from.height);"
        " const pen = copy.getContext('2d', { willReadFrequently: true }); pen.drawImage(from, 0, 0);"
        " const { data } = pen.getImageData(0, 0, copy.width, copy.height); let count = 0;"
        " for (let i = 0; i < data.length; i += 4) count += WANTED.every((one, j) => Math.abs(data[i + j] - one) < 3);"
        " return count; })()"
    )
    return browser.run(read.replace("CANVAS", f"{CHARTS} canvas").replace("WANTED", str(wanted)))


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
    assert report.each(".point[data-arm=amp_fp16]", color) == ["var(--c0)"] * 4  # two charts of two studies
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
    assert len(report.each(".point.hot", "1")) == 4
    assert report.first(".point:not(.hot)", "getComputedStyle(one).opacity") == "0.2"
    report.mouse("Moved", 2, 2)
    assert report.each(".hot", "1") == []


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
    arm["comparison"] |= dict.fromkeys(("mean", "sd", "low", "high")) | {"n": 0, "verdict": "not resolved"}
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
