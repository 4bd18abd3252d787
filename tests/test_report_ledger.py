"""The ledger of a folder: what is in it, and that whoever asks on and on errs in at most 5%."""

import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted import planted
from planted_runs import planted as read_runs
from scipy import special
from test_cli import call

from gptlab.config import Study
from gptlab.errors import DataError, UserError
from gptlab.report import statistics as st
from gptlab.report.analysis import analyse
from gptlab.report.as_json import as_json
from gptlab.report.ledger import adjusted, family_of, family_size, left, read_ledger, record, spend, summary
from gptlab.report.studies import ReadStudy
from gptlab.report.write import write_report

# -- what asking costs ----------------------------------------------------------------------------------------------


def test_the_shares_never_add_up_to_more_than_all() -> None:
    for sizes in ([1] * 200, [18], [18, 1, 1, 40], [0, 3, 0, 2]):
        spent = [1 / p[0] for n in sizes for p in []]
        before = 0
        for n in sizes:
            spent.append(left(before) - left(before + n))
            before += n
        assert sum(spent) == pytest.approx(1 - left(before)) and min(spent) >= 0
    first = spend([[0.01] * 18])[0]
    assert first == pytest.approx(np.full(18, 18 * 0.01 / 0.8 / (1 - 19**-0.5)))
    assert 0.04 * (1 - left(18)) == pytest.approx(0.0308, abs=1e-4)  # what the module says
    assert 0.04 * (1 - left(1)) == pytest.approx(0.0117, abs=1e-4)
    assert 0.04 * (left(19) - left(20)) == pytest.approx(0.00022, abs=1e-5)


def test_the_looks_of_a_call_are_holm_s() -> None:
    p = [0.03, 0.0001, 0.5, 0.002]
    alone = spend([p])[0]
    assert alone == pytest.approx(np.minimum(1, st.holm(p) / 0.8 / (1 - 5**-0.5)))
    later = spend([[0.5], p])[1]
    assert later == pytest.approx(np.minimum(1, st.holm(p) / 0.8 / (2**-0.5 - 6**-0.5)))


def sessions(questions: int, number: int, seed: int) -> tuple[float, float, float]:
    """Shares of sessions of null questions, asked and acted on one at a time, with a false answer.

    Without a ledger; with Holm over all that was asked so far; with the ledger.
    """
    p = np.random.default_rng(seed).random((number, questions))
    so_far = np.array([[st.holm(row[: k + 1])[k] < st.ALPHA for k in range(questions)] for row in p])
    kept = np.array([[found[0] < st.ALPHA for found in spend(row[:, None])] for row in p])
    return float((p < st.ALPHA).any(1).mean()), float(so_far.any(1).mean()), float(kept.any(1).mean())


def check(found: tuple[float, float, float], number: int) -> None:
    def near(share: float) -> float:
        return 3 * math.sqrt(share * (1 - share) / number)

    without, so_far, kept = found
    assert without == pytest.approx(1 - 0.95**20, abs=near(0.64))
    assert so_far == pytest.approx(0.17, abs=near(0.17) + 0.01)
    assert kept <= 0.05 + near(0.05)


def test_who_asks_one_thing_after_another_errs_in_five_percent() -> None:
    check(sessions(20, 400, 0), 400)


@pytest.mark.slow
def test_who_asks_one_thing_after_another_errs_in_five_percent_of_many_sessions() -> None:
    check(sessions(20, 20_000, 1), 20_000)


def look(pair: int, call: int, p: float, n: int = 4) -> dict[str, Any]:
    of = {"study": "s", "metric": "m", "margin": 0.0, "a": f"x{pair}", "b": "base"}
    return of | {"asked": call, "p": p, "data": f"{pair} {n}"}


def add_to_what_is_promising(number: int, seed: int, questions: int = 20, most: int = 12) -> tuple[float, float]:
    """Shares of sessions of null comparisons with a false answer, if seeds are added, one by one, where p < 0.2.

    Where each look is paid as a new question is, and with the ledger.
    """
    rng, wrong = np.random.default_rng(seed), np.zeros(2)
    for _ in range(number):
        looks, ps = [], []
        for pair in range(questions):
            x = rng.normal(size=4 + most)
            for n in range(4, 5 + most):
                p = 2 * special.stdtr(n - 1, -abs(x[:n].mean() / x[:n].std(ddof=1) * n**0.5))
                ps.append(p)
                looks.append(look(pair, len(ps), p, n))
                if p >= 0.2:
                    break
        as_new = [p / (left(k) - left(k + 1)) for k, p in enumerate(ps)]
        wrong += [min(as_new) < st.ALPHA, min(p for _, p in adjusted(looks)) < st.ALPHA]
    return float(wrong[0] / number), float(wrong[1] / number)


def test_who_adds_seeds_to_what_is_promising_errs_in_five_percent() -> None:
    as_new, kept = add_to_what_is_promising(300, 0)
    assert as_new > 0.05 and kept <= 0.05


@pytest.mark.slow
def test_who_adds_seeds_to_what_is_promising_errs_in_five_percent_of_many_sessions() -> None:
    as_new, kept = add_to_what_is_promising(6000, 1)
    assert as_new > 0.065 and kept <= 0.05


def test_looks_at_a_pair_again_have_a_share_of_their_own() -> None:
    looks = [look(0, 1, 0.001), look(1, 1, 0.5), look(0, 2, 0.0001, 5), look(2, 3, 0.001), look(0, 4, 0.0001, 6)]
    found = [p for _, p in adjusted(looks)]
    share, again = 1 - 3**-0.5, 0.2 * (1 - 3**-0.5) / 2
    assert found == pytest.approx(
        [
            2 * 0.001 / (0.8 * share),
            1.0,
            0.0001 / (again * (1 - 2**-0.5)),
            0.001 / 0.8 / (3**-0.5 - 4**-0.5),  # the looks before it at another pair cost it nothing
            0.0001 / (again * (2**-0.5 - 3**-0.5)),
        ]
    )
    assert summary(looks)["looks"] == 5 and summary(looks)["left"] == pytest.approx(0.05 * left(3))


@pytest.mark.slow
def test_who_asks_reports_errs_in_five_percent(tmp_path: Path) -> None:
    """The whole way: studies, verdicts and the file."""
    wrong, number = {"report": 0, "ledger": 0}, 60
    for session in range(number):
        rng, seen = np.random.default_rng(session), {"report": False, "ledger": False}
        for k in range(20):
            values = {arm: rng.normal(3, 0.01, 4).tolist() for arm in ("base", "x")}
            read = study_of(values, name=f"s{k}")
            looks = record(tmp_path / str(session), analyse([read]), "agent")
            for family in seen:
                own = replace(read, ledger=family_of(looks)) if family == "ledger" else read
                (row,) = as_json(analyse([own]))["comparisons"]
                seen[family] |= row["verdict"] in ("better", "worse")
        for family, found in seen.items():
            wrong[family] += found
    assert wrong["report"] / number == pytest.approx(0.64, abs=0.18) and wrong["ledger"] / number <= 0.05 + 0.085


# -- what is in it --------------------------------------------------------------------------------------------------


def study_of(values: dict[str, Sequence[float]], **changes: Any) -> ReadStudy:
    seeds = list(range(max(map(len, values.values()))))
    content: dict[str, Any] = {
        "name": "made",
        "recipe": {"train": {"max_steps": 100}},
        "seeds": seeds,
        "baseline": "base",
    }
    content |= {"arms": {arm: {} for arm in values}, "metric": {"margin": 0.001}, "variances": "own"}
    study = Study.model_validate(content | changes)
    return read_runs(study, lambda arm, seed: values[arm][seed] if seed < len(values[arm]) else None)


VALUES = {"base": [3.0, 3.1, 3.2], "x": [2.9, 3.01, 3.11], "y": [3.0, 3.2, 3.1]}
QUESTION = {"id": "Q", "claim": "c", "confirmed_if": "better"}


def test_a_comparison_is_there_once_however_often_it_is_asked(tmp_path: Path) -> None:
    same = [QUESTION | {"contrast": ["base", "x"]}]  # the table asks it the other way round
    looks = record(tmp_path, analyse([study_of(VALUES, questions=same)]), "gptlab study report made")
    assert [(look["asked"], look["a"], look["b"]) for look in looks] == [(1, "x", "base"), (1, "y", "base")]
    assert looks == read_ledger(tmp_path) == record(tmp_path, analyse([study_of(VALUES)]), "again")
    first = looks[0]
    assert first["command"] == "gptlab study report made" and first["date"][:2] == "20" and first["at"] == "last"
    row = as_json(analyse([study_of(VALUES)]))["comparisons"][0]
    for key in ("study", "metric", "margin", "n", "difference", "low", "high", "p", "verdict"):
        assert first[key] == row[key]
    assert not (tmp_path / ".ledger").exists()  # the lock


@pytest.mark.parametrize(
    ("values", "changes", "new"),
    [
        (VALUES | {"x": [2.9, 3.01, 3.12]}, {}, 1),
        ({arm: [*row, row[0] + 0.01 * i] for i, (arm, row) in enumerate(VALUES.items())}, {}, 2),
        (VALUES | {"z": [3.0, 3.1, 3.3]}, {}, 1),
        (VALUES, {"metric": {"margin": 0.002}}, 2),
        (VALUES, {"metric": {"name": "steps_to", "margin": 0.001}}, 2),
        (VALUES, {"name": "other"}, 2),
        (VALUES, {"baseline": "x"}, 1),
        (VALUES, {"questions": [QUESTION | {"contrast": ["x", "y"]}]}, 1),
        (VALUES, {"questions": [QUESTION | {"contrast": ["x", "base"]}]}, 0),
        ({arm: row[:1] for arm, row in VALUES.items()}, {}, 0),
    ],
    ids=["value", "seeds", "arm", "margin", "metric", "study", "baseline", "pair", "table's pair", "one seed"],
)
def test_what_is_another_look(tmp_path: Path, values: Any, changes: dict[str, Any], new: int) -> None:
    record(tmp_path, analyse([study_of(VALUES)]), "first")
    looks = record(tmp_path, analyse([study_of(values, **changes)]), "second")
    assert [look["asked"] for look in looks] == [1, 1] + [2] * new
    assert record(tmp_path, analyse([study_of(VALUES)]) | {"at": 500}, "third") == looks  # the same values


def test_looks_that_are_paid_for_take_one_place(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(3, 0.1, 6)
    values = {"base": base, "x": base - 0.05 + rng.normal(0, 0.01, 6)}
    for n in range(2, 7):
        cut = {arm: row[:n].tolist() for arm, row in values.items()}
        looks = record(tmp_path, analyse([study_of(cut, until_decided=True)]), "look")
    assert len(looks) == 5 and family_size(tmp_path) == 1 and [look["asked"] for look in looks] == [1, 2, 3, 4, 5]
    ((look, p),) = adjusted(looks)
    assert look["n"] == 6 and p == pytest.approx(looks[-1]["p"] / 0.8 / (1 - 2**-0.5))
    assert summary(looks)["looks"] == 1


def test_the_ledger_makes_verdicts_harder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptlab.report.write.draw_report", lambda *_: [])  # it takes seconds
    folder = planted(tmp_path / "one", study_of(VALUES).study, VALUES)
    for k in range(30):  # of other studies, before
        rng = np.random.default_rng(k)
        values = {arm: rng.normal(3, 0.01, 3).tolist() for arm in ("base", "x")}
        record(folder, analyse([study_of(values, name=f"s{k}")]), "before")
    before = as_json(write_report([folder], formats=[]).payload)
    assert before["comparisons"][0]["verdict"] == "better" and before["ledger"] is None
    report = write_report([folder], formats=[], family="ledger")
    after = as_json(report.payload)
    row = after["comparisons"][0]
    assert row["verdict"] == "not resolved" and row["p_adjusted"] == pytest.approx(
        min(1, float(spend([[0.5]] * 30 + [[r["p"] for r in after["comparisons"]]])[-1][0]))
    )
    assert (
        "over all that this folder was asked so far: 32 looks in 31 calls" in report.payload["studies"][0]["notes"][-1]
    )
    assert "adjusted over the 32 looks in the ledger" in row["text"] and after["ledger"]["looks"] == 32
    assert as_json(write_report([folder], formats=[], family="ledger").payload)["comparisons"] == after["comparisons"]
    alone = planted(tmp_path / "two", study_of(VALUES).study, VALUES)
    found = as_json(write_report([alone], formats=[], family="ledger").payload)["comparisons"][0]
    assert found["verdict"] == "better" and found["p_adjusted"] == pytest.approx(2 * found["p"] / 0.8 / (1 - 3**-0.5))
    with pytest.raises(UserError, match="leave out --compare"):
        write_report([folder], "precision", formats=[], family="ledger")


def test_targets_are_questions_too(tmp_path: Path) -> None:
    values = {"base": [3.3, 3.301, 3.302], "x": [3.2, 3.201, 3.203]}
    asked = [{"id": arm, "claim": "c", "contrast": [arm], "target": 3.28} for arm in values]
    read = study_of(values, questions=asked)
    looks = record(tmp_path, analyse([read]), "first")
    assert [(look["a"], look["b"], look["verdict"]) for look in looks[1:]] == [
        ("base", "target 3.28", "rejected"),
        ("x", "target 3.28", "confirmed"),
    ]
    x = np.array(values["x"]) - 3.28
    p = 2 * special.stdtr(2, -abs(x.mean() / (x.std(ddof=1) / 3**0.5)))
    assert looks[2]["p"] == pytest.approx(p) and looks[2]["difference"] == pytest.approx(x.mean())
    assert looks == record(tmp_path, analyse([read]), "again")

    def told(read: ReadStudy) -> dict[str, Any]:
        return {question["id"]: question for question in analyse([read])["studies"][0]["questions"]}

    held = told(replace(read, ledger=family_of(looks)))
    expected = spend([[look["p"] for look in looks]])[0]
    assert held["x"]["answer"] == "confirmed" and held["x"]["p"] == pytest.approx(expected[2])
    assert f"one-sided p = {expected[2]:.2g} (level 0.05, over the ledger)" in held["x"]["text"]
    others = [looks[0] | {"study": f"s{k}", "asked": k + 2, "p": 0.5} for k in range(200)]
    later = study_of(values | {"x": [3.2, 3.21, 3.22]}, questions=asked)
    last = [look | {"asked": 300} for look in record(tmp_path / "later", analyse([later]), "last")]
    held = told(replace(later, ledger=family_of([*looks, *others, *last])))
    assert told(later)["x"]["answer"] == "confirmed" and held["x"]["answer"] == "not resolved"


def test_many_processes_lose_nothing(tmp_path: Path) -> None:
    def ask(k: int) -> None:
        record(tmp_path, analyse([study_of(VALUES, name=f"s{k}")]), str(k))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(24)))
    looks = read_ledger(tmp_path)
    assert sorted({look["study"] for look in looks}) == sorted(f"s{k}" for k in range(24)) and len(looks) == 48
    assert sorted({look["asked"] for look in looks}) == list(range(1, 25))


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"asked": 1}', '{"asked": "1"}'], ids=["cut off", "a list", "no p", "a text"]
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    record(tmp_path, analyse([study_of(VALUES)]), "first")
    with open(tmp_path / "ledger.jsonl", "a", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=r"ledger.jsonl, line 3 is damaged: .*; mend or remove it"):
        record(tmp_path, analyse([study_of(VALUES)]), "second")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / ".ledger").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=r"\.ledger cannot be written: .*; choose --out"):
        record(tmp_path, analyse([study_of(VALUES)]), "first")


# -- the commands ---------------------------------------------------------------------------------------------------


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gptlab.report.write.draw_report", lambda *_: [])  # it takes seconds
    planted(tmp_path / "results/made", study_of(VALUES).study, VALUES)
    status, _, err = call(capsys, "ledger")
    assert status == 2 and "results has no ledger.jsonl: `gptlab study report`" in err
    status, out, _ = call(capsys, "study", "report", "results/made", "--family", "ledger", "--json", "-")
    assert status == 0 and json.loads(out)["ledger"]["looks"] == 2
    status, out, err = call(capsys, "ledger")
    assert (
        status == 0 and "results/made: 2 looks in 1 call; of the 5% that --family ledger holds, 2.89% are left" in out
    )
    (row,) = [line for line in out.splitlines() if " x " in line]
    assert "better" in row and "final_val_loss" in row
    (told,) = json.loads(call(capsys, "ledger", "results/made", "--json")[1])
    assert told["folder"] == "results/made" and [look["a"] for look in told["looks"]] == ["x", "y"]
    assert told["looks"][0]["p_adjusted"] == pytest.approx(2 * told["looks"][0]["p"] / 0.8 / (1 - 3**-0.5))
    assert "study report results/made" in told["looks"][0]["command"]
    status, _, err = call(capsys, "ledger", "nowhere")
    assert status == 2 and "nowhere is no folder" in err


def test_judgements_have_a_ledger_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gptlab.report.write.draw_report", lambda *_: [])
    rng = np.random.default_rng(0)
    rows = [
        f"{arm},{seed},{step},{x + 1 - step / 100}"
        for arm, mean in (("base", 3), ("x", 2), ("y", 3))
        for seed, x in enumerate(rng.normal(mean, 0.01, 4))
        for step in (50, 100)
    ]
    (tmp_path / "runs.csv").write_text("\n".join(["arm,seed,step,val_loss", *rows]) + "\n", encoding="utf-8")
    words = ["judge", "runs.csv", "--out", "out", "--json"]
    first = json.loads(call(capsys, *words)[1])
    looks = read_ledger(tmp_path / "out")
    assert [(look["a"], look["b"], look["metric"]) for look in looks] == [
        ("x", "base", "val_loss"),
        ("y", "base", "val_loss"),
    ]
    call(capsys, *words, "--pairs", "all")
    assert [(look["a"], look["b"], look["asked"]) for look in read_ledger(tmp_path / "out")][2:] == [("y", "x", 2)]
    call(capsys, *words, "--at", "common")  # the same values
    assert call(capsys, *words, "--at", "60")[0] == 0
    assert [look["at"] for look in read_ledger(tmp_path / "out")] == ["last"] * 3 + ["60"] * 2
    held = json.loads(call(capsys, *words, "--family", "ledger")[1])
    (before,), (after,) = ([row for row in told["comparisons"] if row["a"] == "x"] for told in (first, held))
    assert after["p_adjusted"] == pytest.approx(min(1, before["p_adjusted"] / 0.8 / (1 - 3**-0.5)))
    assert held["ledger"]["looks"] == 5 and family_size(tmp_path / "out") == 5
