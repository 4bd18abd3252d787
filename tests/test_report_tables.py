"""Every number of the payload stands in the CSV files to the last digit, and text stays text wherever it is shown."""

import csv
import io
import json
import math

import pytest
from rich.console import Console

from gptlab.report import tables as t
from gptlab.report.words import decimals

ODD = 0.1 + 0.2  # has no short decimal form


def make_arm(name="a", number=1.0, **fields):
    """An arm in which every number is another one, derived from `number`."""
    return {
        "name": name,
        "group": "core",
        "note": "a note",
        "settings": {"optim.lr": ODD},
        "planned": 3,
        "statuses": {"completed": 2, "diverged": 1},
        "values": {"0": number + ODD, "1": number / 3},
        "quality": {"n": 2, "mean": number * math.pi, "sd": 1e-17, "low": -number, "high": 1.7e308},
        "throughput": {"value": 12345.678901234567, "low": 12000.5, "high": 13000.25, "n": 190, "of": "steps"},
        "speedup": {"value": 3.4999999999999996, "low": 3.1, "high": 3.9, "n": 17, "of": "seeds"},
        "memory_gb": {"mean": 26.500000000000004, "n": 5},
        "memory_ratio": 0.6499999999999999,
        "other": {"val_perplexity": {"mean": 27.1828, "sd": 0.00314, "n": 7}},
        "frontier": 0.97265625,
        "comparison": {
            "verdict": "not resolved",
            "n": 11,
            "mean": -0.012345678901234567,
            "sd": 0.02,
            "low": -0.031,
            "high": 0.0625,
            "p": 0.41,
            "p_holm": 0.9999999999999999,
            "p_equivalent": 2.5e-05,
            "mde": 0.0712,
            "mde_family": 0.0917,
            "more_seeds": 1234,
            "welch": {"value": -0.0111, "low": -0.06, "high": 0.04, "p": 0.52},
            "why": "few seeds",
            "text": "a sentence",
        },
    } | fields


def bare_arm(name="bare", **fields):
    """An arm of which nothing is known."""
    empty = dict.fromkeys(("quality", "throughput", "speedup", "memory_gb", "memory_ratio", "frontier", "comparison"))
    return {
        "name": name,
        "group": "core",
        "note": "",
        "settings": {},
        "statuses": {},
        "planned": 3,
        "values": {},
        "other": {},
        **empty,
        **fields,
    }


def make_question(**fields):
    empty = {"sentence": "", "cost": "", "change": "", "comparisons": [], "evidence": []}
    return empty | fields


def make_failure(arm, **fields):
    failure = {"arm": arm, "seed": 0, "status": "failed", "step": None, "failure": None, "tensor": None, "reason": None}
    return failure | fields


def make_study(*arms, **fields):
    return {
        "name": "precision",
        "description": "what it is",
        "folder": "results/precision",
        "task": "lm",
        "unit": "tokens",
        "metric": {
            "key": "final_val_loss",
            "label": "validation loss, nats",
            "better": "lower",
            "margin": 0.004,
            "margin_from": "stated by the study",
        },
        "baseline": arms[0]["name"],
        "seeds": [0, 1],
        "most_seeds": None,
        "elsewhere": False,
        "paired": True,
        "groups": None,
        "runs_planned": 6,
        "runs_found": 5,
        "columns": [{"key": "val_perplexity", "label": "perplexity"}],
        "arms": list(arms),
        "summary": "a summary",
        "equal": [],
        "notes": [],
        "failures": [],
        "runs": [],
        "means": {},
        "questions": [],
        "recommendations": [],
        "provenance": {},
    } | fields


def make_payload(*studies, across=None, warnings=()):
    return {
        "title": "t",
        "gptlab": "0",
        "command": "",
        "warnings": [*warnings],
        "studies": [*studies],
        "across": across,
    }


def read(folder, name):
    with open(folder / f"{name}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def printed(payload, width=120):
    console = Console(file=io.StringIO(), width=width)
    t.print_report(payload, console)
    return console.file.getvalue()


def numbers(value):
    if isinstance(value, dict):
        return [number for inner in value.values() for number in numbers(inner)]
    return [value] if isinstance(value, int | float) else []


# -- CSV


def test_every_number_of_an_arm_comes_back_from_the_csv_exactly(tmp_path):
    arms = [make_arm("a", 1.0), make_arm("b", 7.0)]
    files = t.write_csv(make_payload(make_study(*arms)), tmp_path / "new" / "folder")
    assert [file.name for file in files] == ["precision-arms.csv"]
    for arm, row in zip(arms, read(files[0].parent, "precision-arms"), strict=True):
        cells = set()
        for cell in row.values():
            try:
                cells.add(float(cell))
            except ValueError:
                continue
        assert set(map(float, numbers(arm | {"settings": {}}))) <= cells
        assert json.loads(row["settings"]) == arm["settings"]
        assert (row["arm"], row["note"], row["verdict"], row["text"]) == (
            arm["name"],
            "a note",
            "not resolved",
            "a sentence",
        )


def test_headers_say_what_a_number_is_and_its_unit(tmp_path):
    t.write_csv(make_payload(make_study(make_arm())), tmp_path)
    (row,) = read(tmp_path, "precision-arms")
    expected = {
        "baseline": "true",
        "runs planned": "3",
        "runs completed": "2",
        "runs diverged": "1",
        "runs failed": "0",
        "quality mean [validation loss, nats]": repr(math.pi),
        "quality sd [validation loss, nats]": "1e-17",
        "quality 95% low [validation loss, nats]": "-1.0",
        "quality n": "2",
        "seed 0 [validation loss, nats]": repr(1.0 + ODD),
        "throughput [tokens/s]": "12345.678901234567",
        "throughput 95% high [tokens/s]": "13000.25",
        "throughput of": "steps",
        "speed-up [x baseline]": "3.4999999999999996",
        "peak memory mean [GB]": "26.500000000000004",
        "peak memory [x baseline]": "0.6499999999999999",
        "perplexity mean": "27.1828",
        "frontier [share of draws]": "0.97265625",
        "difference mean [validation loss, nats]": "-0.012345678901234567",
        "p_holm": "0.9999999999999999",
        "mde [validation loss, nats]": "0.0712",
        "more_seeds": "1234",
        "welch [validation loss, nats]": "-0.0111",
        "welch p": "0.52",
        "why": "few seeds",
    }
    assert {header: row[header] for header in expected} == expected


def test_the_unit_of_a_further_column_stands_at_its_end(tmp_path):
    arm = make_arm(other={"wall_seconds": {"mean": 9.5, "sd": None, "n": 1}})
    t.write_csv(make_payload(make_study(arm, columns=[{"key": "wall_seconds", "label": "wall time, s"}])), tmp_path)
    (row,) = read(tmp_path, "precision-arms")
    assert (row["wall time mean [s]"], row["wall time n"], row["wall time sd [s]"]) == ("9.5", "1", "")


def test_what_is_not_known_is_an_empty_cell(tmp_path):
    t.write_csv(make_payload(make_study(make_arm(), bare_arm())), tmp_path)
    row = read(tmp_path, "precision-arms")[1]
    known = {header: cell for header, cell in row.items() if cell not in ("", "0")}
    assert known == {"arm": "bare", "baseline": "false", "group": "core", "settings": "{}", "runs planned": "3"}


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n"])
def test_no_text_begins_as_a_formula_and_numbers_do(tmp_path, start):
    evil = f'{start}HYPERLINK("http://x","y"),\r\nsecond "line"'
    shown = ("" if start == "\r" else "'") + evil.replace("\r", "\\r")
    failure = make_failure(evil, seed=-3, failure=evil, reason=evil)
    run = {"arm": evil, "seed": -3, "status": "failed", "ended": None, "folder": evil, "train": [], "val": []}
    row = {"study": evil, "a": evil, "b": evil, "verdict": evil, "difference": -0.5, "why": evil}
    question = make_question(id=evil, claim=evil, answer=evil, text=evil, evidence=[evil, evil], comparisons=[row])
    question |= {"sentence": evil, "cost": evil, "change": evil}
    flip = {"arm": evil, "reference": evil, "verdict": "flips", "text": evil, "p_interaction": -0.5}
    across = {
        "name": evil,
        "studies": [evil],
        "ranking": {"text": evil},
        "flips": [flip],
        "questions": [question],
        "ranks": [{"arm": evil, "ranks": [-1.5], "flip": True}],
        "recommendations": [],
    }
    arm = make_arm(evil, group=evil, note=evil)
    arm["comparison"] |= {"verdict": evil, "why": evil, "text": evil}
    study = make_study(arm, failures=[failure], runs=[run], questions=[question])
    study["columns"][0]["label"] = evil
    files = t.write_csv(make_payload(study, across=across), tmp_path)
    assert {file.name for file in files} == {
        "precision-arms.csv",
        "precision-runs.csv",
        "precision-failures.csv",
        "questions.csv",
        "comparisons.csv",
        "ranks.csv",
        "flips.csv",
    }
    seen = 0
    for file in files:
        with open(file, newline="", encoding="utf-8") as handle:
            for cell in (cell for row in csv.reader(handle) for cell in row):
                if cell.startswith(t.FORMULA):
                    float(cell)  # a negative number is one, and no text
                seen += cell == shown  # quotes and line ends came back as they were
    assert seen == 44
    assert read(tmp_path, "flips")[0]["p_interaction"] == "-0.5"


def test_runs_failures_questions_and_ranks_have_a_line_each(tmp_path):
    reason = "the training loss is nan"
    reasons = {"failure": "non_finite", "tensor": "wte", "reason": reason}
    failure = make_failure("a", seed=1, status="diverged", step=7, **reasons)
    runs = [
        {
            "arm": "a",
            "seed": 0,
            "status": "completed",
            "ended": None,
            "folder": "r/a_seed0",
            "train": [[1, 5.0], [90, 4.0]],
            "val": [[0, 6.0], [100, 4.5]],
        },
        {
            "arm": "a",
            "seed": 1,
            "status": "diverged",
            "ended": 7,
            "folder": "r/a_seed1",
            "train": [[1, None]],
            "val": [],
        },
    ]
    question = make_question(id="H1", claim="c", answer="confirmed", text="x", evidence=["a", "b"])
    across = {
        "name": "both",
        "studies": ["lm", "cls"],
        "ranking": {"text": ""},
        "flips": [],
        "recommendations": [],
        "ranks": [{"arm": "a", "ranks": [1, None], "flip": False}],
        "questions": [question | {"id": "H9"}],
    }
    study = make_study(make_arm(), runs=runs, failures=[failure], questions=[question])
    t.write_csv(make_payload(study, across=across), tmp_path)
    first, second = read(tmp_path, "precision-runs")
    value = "final_val_loss [validation loss, nats]"
    assert first == {
        "arm": "a",
        "seed": "0",
        "status": "completed",
        "ended [step]": "",
        "last logged [step]": "100",
        value: repr(1.0 + ODD),
        "failure": "",
        "reason": "",
        "folder": "r/a_seed0",
    }
    assert (second["ended [step]"], second["failure"], second["reason"]) == ("7", "non_finite", reason)
    assert second["last logged [step]"] == "1"
    assert read(tmp_path, "precision-failures")[0] == {key: str(inner) for key, inner in failure.items()}
    asked = [(row["study"], row["id"], row["answer"], row["evidence"]) for row in read(tmp_path, "questions")]
    assert asked == [("precision", "H1", "confirmed", "a; b"), ("both", "H9", "confirmed", "a; b")]
    assert read(tmp_path, "ranks") == [{"arm": "a", "rank in lm": "1", "rank in cls": "", "flip": "false"}]


def test_files_of_studies_are_safe_and_their_own():
    assert t.stems(["a", "a", "A", "../up", "x/y z", "$", ""]) == ["a", "a-2", "A-3", "up", "x-y-z", "study", "study-7"]
    assert t.stems(["a", "a-2", "a"]) == ["a", "a-2", "a-3"]


# -- the terminal


def nineteen():
    names = [f"an_arm_of_{i}_letters".ljust(24, "x") for i in range(19)]
    return make_study(
        make_arm(names[0], comparison=None), *(make_arm(name, 3.0 + i) for i, name in enumerate(names[1:]))
    )


def test_nineteen_arms_are_a_line_each_at_120_columns_and_twice_a_line_at_80():
    study = nineteen()
    for arm in study["arms"]:
        arm["quality"] |= {"mean": 3.2841, "sd": 0.0021}
        if arm["comparison"]:
            arm["comparison"] |= {"mean": -0.00123, "low": -0.0111, "high": 0.0099, "mde": 0.0073}
    for width, times in ((120, 1), (80, 2)):
        lines = printed(make_payload(study), width).splitlines()
        assert max(map(len, lines)) <= width
        for arm in study["arms"][1:]:  # the baseline is named below the table too
            assert sum(line.startswith(arm["name"]) for line in lines) == times, (width, arm["name"])
    row = next(line for line in printed(make_payload(study)).splitlines() if line.startswith(study["arms"][5]["name"]))
    cells = "2 of 3 3.2841 ± 0.0021 -0.0012 [-0.0111, 0.0099] not resolved 0.0073 1,234 12.3K x3.50 26.5"
    assert row.split()[1:] == cells.split()
    wide = "\n".join(line.rstrip() for line in printed(make_payload(study), 80).splitlines())
    assert "0.0073" in wide and "12.3K x3.50 26.5" in wide  # nothing is left out where there is little room


def test_survivors_of_a_divergence_are_no_evidence_and_unknown_numbers_are_blank():
    diverging = make_arm("mad")
    diverging["comparison"] |= {"verdict": "diverges", "mean": 77.0}
    one = make_arm("one")
    one["quality"] |= {"n": 1, "mean": 3.5, "sd": None, "low": None, "high": None}
    one["comparison"] |= {"mean": 0.25, "low": None, "high": None, "mde": None, "more_seeds": None}
    absent = bare_arm(
        "absent", statuses={"not_applicable": 3}, comparison=one["comparison"] | {"mean": None, "verdict": "not run"}
    )
    text = printed(make_payload(make_study(bare_arm("base"), diverging, one, absent)))
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert "77" not in text and "1 of 3 diverged diverges" in lines["mad"]
    assert "3.5000 " in lines["one"] and "±" not in lines["one"] and "+0.2500 not" in lines["one"]
    assert lines["base"].split() == ["base", "0", "of", "3", "baseline"]
    assert "3 of 3 not applicable not run" in lines["absent"]


def test_answers_recommendations_failures_flips_and_warnings_are_told():
    failures = [
        make_failure("a", seed=seed, status="out_of_memory", step=step, reason=reason)
        for seed, step, reason in ((0, 1200, "asked 3 GB"), (1, None, None))
    ]
    question = make_question(id="H1", claim="it helps", answer="not resolved", text="x minus y: +0.1")
    question |= {"sentence": "It is open.", "cost": "It costs 2 GB.", "change": "3 more seeds."}
    advice = {"id": "overall", "text": "none, because of noise", "evidence": []}
    flips = [
        {"arm": f"x{i}", "reference": "y", "verdict": verdict, "text": f"{verdict}: numbers", "p_interaction": 0.1}
        for i, verdict in enumerate(["flips", "agrees", "agrees"])
    ]
    across = {
        "name": "both",
        "studies": ["lm", "cls"],
        "ranking": {"text": "tau 0.6 [0.1, 0.9]"},
        "ranks": [],
        "flips": flips,
        "questions": [question | {"id": "H9", "answer": "confirmed"}],
        "recommendations": [],
    }
    more = [advice | {"id": "H1"}, advice | {"id": "default", "text": "the default stays a"}]
    study = make_study(make_arm(), failures=failures, questions=[question], recommendations=[advice, *more])
    text = printed(make_payload(study, across=across, warnings=["two machines"]), 200)
    lines = [line.strip() for line in text.splitlines()]
    begins = ["precision: what it is", "H1 it helps: not resolved", "It is open.", "It costs 2 GB. 3 more seeds."]
    start = lines.index(begins[0])
    assert lines[start : start + 4] == begins
    assert "H9 it helps: confirmed" in lines and lines.index("H9 it helps: confirmed") < start
    evidence = lines.index("evidence on H1: x minus y: +0.1", start)
    assert evidence > max(lines.index(line) for line in lines if line.startswith(("a ", "at:", "recommendation")))
    assert "recommendation: none, because of noise" in lines and "warning: two machines" in lines
    assert "recommendation: the default stays a" in lines and text.count("because of noise") == 1  # told once
    plain = printed(make_payload(make_study(make_arm(), recommendations=[advice])))
    assert [line.strip() for line in plain.splitlines()][1:3] == ["a summary", f"recommendation: {advice['text']}"]
    assert "a: 2 out of memory (seed 0 at step 1,200, seed 1): asked 3 GB" in lines
    assert "tau 0.6 [0.1, 0.9]" in lines and "pairs of arms: 2 agrees, 1 flips" in lines
    assert "x0 against y: flips: numbers" in lines and not any("x1" in line for line in lines)
    assert "5 of 6 runs." in text and "margin 0.004 (stated by the study)" in text


def test_markup_emoji_and_control_codes_are_shown_as_text():
    evil = "[red]x[/red] [/] :smile: [link=file:///x]y[/link]"
    code = "\x1b[31m\x1b]0;title\x07\u202eabc\ud800"
    question = make_question(id="Q", claim=evil, answer="confirmed", text=evil + code)
    question |= {"sentence": evil + code, "cost": evil + code, "change": evil + code}
    study = make_study(
        make_arm(evil),
        name="n " + evil,
        description=evil,
        questions=[question],
        recommendations=[{"id": "overall", "text": evil, "evidence": []}],
        failures=[make_failure(evil, reason=evil)],
    )
    study["metric"] |= {"label": evil, "margin_from": evil}
    text = printed(make_payload(study, warnings=[evil + code]), 400)
    assert text.count(evil) >= 8
    assert not {"\x1b", "\x07", "\u202e", "\ud800"} & set(text)


def test_a_hundred_kinds_of_failures_do_not_flood_the_terminal():
    failures = [make_failure(f"arm{i}") for i in range(100)]
    text = printed(make_payload(make_study(make_arm(), failures=failures)))
    assert text.count("failed (seed 0)") == t.MOST_FAILURES and f"and {100 - t.MOST_FAILURES} more" in text


@pytest.mark.parametrize(
    ("scale", "mean"), [(1e-9, "3e-09 ± 1e-11"), (1e12, "3e+12 ± 1e+10"), (1.0, "3.0000 ± 0.0100")]
)
def test_tiny_and_huge_values_have_five_digits(scale, mean):
    arm = make_arm("a", quality={"mean": 3 * scale, "sd": 0.01 * scale, "n": 3})
    study = make_study(arm)
    study["metric"]["margin"] = None
    assert mean in printed(make_payload(study))


def test_a_spread_far_below_the_margin_is_not_zero():
    study = make_study(make_arm("a", quality={"mean": 3.3, "sd": 0.0013, "n": 3}))
    study["metric"]["margin"] = 0.1
    assert "3.300 ± 0.001" in printed(make_payload(study))


def test_digits_show_a_tenth_of_the_margin():
    digits = {margin: decimals({"margin": margin}) for margin in (0.004, 0.02, 0.005, 1.0, 20.0, 1e-9, 0.0, None)}
    assert digits == {0.004: 4, 0.02: 3, 0.005: 4, 1.0: 2, 20.0: 2, 1e-9: 6, 0.0: 4, None: 4}
    assert (
        t.interval(0.0123, -0.5, 0.5, ".3f") == "+0.012 [-0.500, 0.500]"
        and t.interval(-1.0, None, None, ".2f") == "-1.00"
    )
