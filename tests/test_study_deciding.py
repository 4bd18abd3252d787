"""Studies that run until they are decided: which arms get which seeds, what is said, and what a kill changes."""

import io
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from test_cli import call
from test_study_runner import Fakes, study_file

from gptlab.config import Study, load_study
from gptlab.errors import ConfigError, RunError
from gptlab.report.analysis import analyse
from gptlab.report.looks import Looks
from gptlab.report.studies import read_study_folder
from gptlab.report.tables import print_report
from gptlab.rundir import open_study, read_plan
from gptlab.study import runner
from gptlab.study.launch.resources import Resources
from gptlab.study.launch.submit import launch_study
from gptlab.study.runner import run_study
from gptlab.study.table import read_study

FOLDER = Path("results/tiny")
METRIC = 'metric = { name = "final_val_loss", margin = 0.05 }\n'
NOISE = np.random.default_rng(115).normal(0, 0.02, (3, 12))
# What each arm's runs end with: `fast` is far better, `late` is a little better, by about the margin.
LOSSES = {
    "plain": 3.0 + NOISE[0],
    "fast": 2.7 + NOISE[1],
    "late": 2.95 + 3 * NOISE[2],
}


class Instant:
    """A worker that has ended as soon as it starts, as the fake worker of the runner's tests would end."""

    def __init__(self, line: list[str], **_: Any) -> None:
        folder, (end, say) = Path(line[-3]), line[-2:]
        self.code = {"completed": 0, "diverged": 3, "not_applicable": 2, "signal15": 4, "failed": 1}[end]
        result = {"status": "interrupted" if end == "signal15" else end, "steps": 24, "wall_seconds": 10.0}
        if end == "completed":
            result["final_val_loss"] = loss = float(say)
            lines = [{"step": 0, "val_loss": 4.0}, {"step": 24, "val_loss": loss}]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
        (folder / "result.json").write_text(json.dumps(result | {"reason": say}))
        with open("order", "a") as file:
            file.write(f"{folder.name} 1\n")

    def poll(self) -> int:
        return self.code


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fakes:
    fakes = Fakes(tmp_path).replace_workers(monkeypatch)
    monkeypatch.setattr(runner, "subprocess", SimpleNamespace(Popen=Instant, DEVNULL=None))
    monkeypatch.setattr(runner, "POLL_SECONDS", 0)
    for arm, losses in LOSSES.items():
        fakes.ends |= {f"{arm} seed {seed}": [f"completed: {loss}"] for seed, loss in enumerate(losses)}
    return fakes


@pytest.fixture
def study(dataset: Path, tmp_path: Path) -> Study:
    return load_study(study_file(tmp_path, dataset, METRIC))


def seeds_of(fakes: Fakes, arm: str) -> list[int]:
    return [int(name.removeprefix(f"{arm}_seed")) for name in fakes.started() if name.startswith(f"{arm}_seed")]


def seeds_until(arm: str, level: float, most: int) -> int:
    """Seeds after which an arm is better or equivalent by the looks alone."""
    x = LOSSES[arm] - LOSSES["plain"]
    for n in range(2, most + 1):
        one = Looks(x[:n], most)
        if (one.p < level and abs(x[:n].mean()) > 0.05) or one.p_within(0.05) < 0.05:
            return n
    return most


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    lines = capsys.readouterr().err.splitlines()
    return [line for line in lines if " against " in line]


# -- which seeds


def test_an_arm_stops_when_it_is_decided_and_the_baseline_goes_on(
    study: Study, fakes: Fakes, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_study(study, until_decided=True, most_seeds=8) == 0
    decided = seeds_until("fast", 0.05 / 2, 8)  # Holm's first step of two comparisons
    assert 2 < decided < 8
    assert sorted(seeds_of(fakes, "fast")) == list(range(decided))
    late = len(seeds_of(fakes, "late"))
    assert late > decided
    assert sorted(seeds_of(fakes, "plain")) == sorted(seeds_of(fakes, "late")) == list(range(late))
    lines = said(capsys)
    assert lines[0] == f"fast against plain: better after {decided} seeds"
    assert lines.count(lines[0]) == 2  # after its round, and in the summary
    assert late == 8
    assert lines[-1] == "late against plain: open after 8 seeds: 8 seeds are the most that were stated"

    before = fakes.started()
    assert run_study(study, until_decided=True, most_seeds=8) == 0
    assert fakes.started() == before
    assert said(capsys) == lines
    states = {f"{state.arm} {state.seed}": state.status for state in read_study(FOLDER)}
    assert states == {f"{arm} {seed}": "completed" for arm in LOSSES for seed in sorted(seeds_of(fakes, arm))}


def test_a_study_that_was_killed_comes_to_the_same_decisions(
    study: Study, fakes: Fakes, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_study(study, until_decided=True, most_seeds=8, out="whole") == 0
    whole, lines = sorted(fakes.started()), said(capsys)
    (fakes.folder / "order").unlink()
    kept = dict(fakes.ends)
    for victim in ("late seed 0", "plain seed 3"):
        fakes.ends = kept | {victim: ["signal15"]}
        assert run_study(study, until_decided=True, most_seeds=8, out="killed") == 4
        assert "1 interrupted" in capsys.readouterr().err
    fakes.ends = kept
    assert run_study(study, until_decided=True, most_seeds=8, out="killed", jobs=3) == 0
    assert said(capsys) == lines
    assert sorted(set(fakes.started())) == whole
    results = [{path.name: path.read_text() for path in Path(out).glob("*.json")} for out in ("whole", "killed")]
    results = [{name: json.loads(text) for name, text in found.items() if name != "plan.json"} for found in results]
    assert results[0] == results[1]


def test_a_question_with_a_number_gets_seeds_until_it_is_decided(
    dataset: Path, tmp_path: Path, fakes: Fakes, capsys: pytest.CaptureFixture[str]
) -> None:
    target = float(LOSSES["fast"].mean()) + 0.03
    asked = f'[[questions]]\nid = "t"\nclaim = "c"\ncontrast = ["fast"]\ntarget = {target}\nlevel = 0.01\n'
    study = load_study(study_file(tmp_path, dataset, METRIC + asked))
    assert run_study(study, until_decided=True) == 0
    looks = [Looks(LOSSES["fast"][:n] - target, 12) for n in range(2, 13)]
    decided = next(n for n, one in enumerate(looks, 2) if one.p_below() < 0.01)
    assert 2 < decided < 12
    assert sorted(seeds_of(fakes, "fast")) == list(range(decided))
    assert sorted(seeds_of(fakes, "plain")) == [0, 1]  # of no question
    assert said(capsys)[-1] == f"t fast against {target:g}: confirmed after {decided} seeds"
    (told,) = analyse([read_study_folder(FOLDER)])["studies"][0]["questions"]
    assert told["answer"] == "confirmed" and f"p = {looks[decided - 2].p_below():.2g}" in told["text"]


def test_a_hopeless_comparison_ends_before_the_last_seed(
    study: Study, fakes: Fakes, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(12):  # as far from the margin as the noise, on either side of it
        fakes.ends[f"late seed {seed}"] = [f"completed: {LOSSES['plain'][seed] - 0.05 + 0.2 * (-1) ** seed}"]
    assert run_study(study, until_decided=True) == 0
    (line,) = (line for line in said(capsys)[-2:] if line.startswith("late"))
    assert re.fullmatch(
        r"late against plain: hopeless after \d seeds: a chance below 10% to decide it within 12 seeds", line
    )
    assert len(seeds_of(fakes, "late")) < 8


def test_questions_decide_where_a_study_has_them(dataset: Path, tmp_path: Path, fakes: Fakes) -> None:
    question = '[[questions]]\nid = "Q1"\nclaim = "c"\ncontrast = ["fast", "plain"]\nconfirmed_if = "better"\n'
    study = load_study(study_file(tmp_path, dataset, METRIC + question))
    assert run_study(study, until_decided=True, quiet=True) == 0
    decided = seeds_until("fast", 0.05, 12)  # a family of one
    assert {arm: len(seeds_of(fakes, arm)) for arm in LOSSES} == {"plain": decided, "fast": decided, "late": 2}


def test_a_grid_goes_on_without_its_diverged_arms(
    dataset: Path, tmp_path: Path, fakes: Fakes, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = "".join(f"[arms.fast_{i}]\noptim.lr = {i}e-3\n" for i in (1, 2, 3))
    question = '[[questions]]\nid = "Q1"\nclaim = "c"\ncontrast = ["fast_*", "plain"]\nconfirmed_if = "better"\n'
    study = load_study(study_file(tmp_path, dataset, METRIC + question + arms))
    for seed, loss in enumerate(LOSSES["fast"]):
        fakes.ends[f"fast_1 seed {seed}"] = [f"completed: {loss}"]
        fakes.ends[f"fast_2 seed {seed}"] = [f"completed: {loss + 0.6 + NOISE[0][seed]}"]
    fakes.ends["fast_3"] = ["diverged"]
    assert run_study(study, until_decided=True) == 0
    lines = said(capsys)
    assert re.fullmatch(r"Q1 fast_\* against plain: better after \d seeds", lines[-1])
    n = int(lines[-1].split()[-2])
    assert n > 2
    counts = {arm: len(seeds_of(fakes, arm)) for arm in study.arms}
    assert counts == {"plain": n, "fast_1": n, "fast_2": n, "fast_3": 2, "fast": 2, "late": 2}


@pytest.mark.parametrize(
    "end", ["diverged", pytest.param("failed: TypeError: no", marks=pytest.mark.slow), "not_applicable"]
)
def test_an_arm_that_cannot_be_compared_gets_no_seeds(
    study: Study, fakes: Fakes, capsys: pytest.CaptureFixture[str], end: str
) -> None:
    kept = fakes.ends["late seed 1"]
    fakes.ends["late seed 1"] = [end]
    failed = end.startswith("failed")
    assert run_study(study, until_decided=True, most_seeds=8) == failed
    assert sorted(seeds_of(fakes, "late")) == [0, 1]
    assert sorted(seeds_of(fakes, "plain")) == sorted(seeds_of(fakes, "fast"))
    says = {
        "diverged": "late against plain: not compared, 1 of 2 runs of late diverged",
        "not_applicable": "late against plain: open after 1 seed: late seed 1 is not applicable",
    }
    lines = said(capsys)
    assert lines[-1] == says.get(end, "late against plain: open after 1 seed: late seed 1 is failed")
    assert "fast against plain: better" in lines[-2]
    if failed:  # tried again at the next start, and then goes on
        fakes.ends["late seed 1"] = kept
        assert run_study(study, until_decided=True, most_seeds=8, quiet=True) == 0
        assert len(seeds_of(fakes, "late")) > 4


def test_no_seed_starts_beyond_the_budget(study: Study, fakes: Fakes, capsys: pytest.CaptureFixture[str]) -> None:
    hour = 1 / 3600  # of a second; each run takes 10 seconds
    assert run_study(study, until_decided=True, budget=75 * hour) == 0
    assert {arm: seeds_of(fakes, arm) for arm in LOSSES} == {arm: [0, 1] for arm in LOSSES}
    lines = said(capsys)
    assert lines == [
        f"{arm} against plain: open after 2 seeds: 0.0167 of 0.0208 hours are used, and the next seed takes about "
        "0.0083"
        for arm in ("fast", "late")
    ]
    assert run_study(study, until_decided=True, budget=45 * hour) == 0  # already spent
    assert run_study(study, until_decided=True, budget=90 * hour, quiet=True) == 0
    assert len(fakes.started()) == 9
    assert run_study(study, out="other", until_decided=True, budget=45 * hour, quiet=True) == 0
    assert len(fakes.started()) == 12  # a budget may end between the study's own seeds


# -- the rule


def test_the_folder_keeps_the_rule(study: Study, fakes: Fakes, capsys: pytest.CaptureFixture[str]) -> None:
    first = fakes.ends["late seed 2"]
    fakes.ends["late seed 2"] = ["signal15"]
    assert run_study(study, until_decided=True, most_seeds=8, quiet=True) == 4
    kept = open_study(FOLDER)
    assert (kept.until_decided, kept.most_seeds) == (True, 8)
    plan = read_plan(FOLDER, kept)
    assert plan is not None
    assert plan.remarks == []
    assert json.loads((FOLDER / "plan.json").read_text())["plan"]["most_seeds"] == 8
    with pytest.raises(RunError, match=r"begun with most_seeds = 8, .*: use --most-seeds 8, or name another folder"):
        run_study(study, until_decided=True, most_seeds=12)
    with pytest.raises(ConfigError, match="most_seeds = 8: must be at least 9, the number of seeds"):
        run_study(study, seeds=range(9))

    capsys.readouterr()
    fakes.ends["late seed 2"] = first
    assert run_study(study, arms=["late"], seeds=[2]) == 0  # only that run
    assert "at most 8; now only the named runs start" in capsys.readouterr().err
    assert max(seeds_of(fakes, "plain")) == 2
    assert run_study(study) == 0  # without the flag
    says = capsys.readouterr().err
    assert "tiny: seeds are added until it is decided, at most 8\n" in says
    assert "fast against plain: better after" in says
    assert max(seeds_of(fakes, "late")) > 3


@pytest.mark.slow
def test_a_study_that_began_without_the_rule_may_take_it_and_that_is_shown(study: Study, fakes: Fakes) -> None:
    assert run_study(study, quiet=True) == 0
    assert run_study(study, until_decided=True, most_seeds=8, quiet=True) == 0
    assert read_study_folder(FOLDER).warnings == [
        "tiny: the until_decided was changed after the first run: false then, true now",
        "tiny: the most_seeds was changed after the first run: 12 then, 8 now",
    ]
    whole = {path.name: path.read_text() for path in FOLDER.glob("*_seed*.json")}
    shutil.rmtree(FOLDER)
    assert run_study(study, until_decided=True, most_seeds=8, quiet=True) == 0
    assert whole == {path.name: path.read_text() for path in FOLDER.glob("*_seed*.json")}


def test_mistakes_are_said_before_anything_starts(study: Study, fakes: Fakes, dataset: Path, tmp_path: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"most_seeds": 5}, "--most-seeds needs --until-decided"),
        ({"budget": 5.0}, "--budget 5: must be hours above 0, and needs --until-decided"),
        ({"until_decided": True, "budget": 0.0}, "--budget 0: must be hours above 0"),
        ({"until_decided": True, "arms": ["late"]}, "--arm names the arms to train, and --until-decided chooses them"),
        ({"until_decided": True, "most_seeds": 2}, "most_seeds = 2: must be at least 3"),
    ]
    for options, says in wrong:
        with pytest.raises(ConfigError, match=says):
            run_study(study, **options)
    assert not FOLDER.exists()
    file = study_file(tmp_path, dataset, "until_decided = true\nmost_seeds = 3\n")
    with pytest.raises(ConfigError, match="most_seeds = 3: must be at least 4, the number of seeds"):
        run_study(load_study(file), seeds=range(4))
    file.write_text(file.read_text().replace("seeds = [0, 1]", "seeds = [0, 1, 2, 3]"))
    with pytest.raises(ConfigError, match="most_seeds = 3: must be at least 4, the number of seeds"):
        load_study(file)


def test_jobs_on_slurm_are_refused_and_named_runs_are_not(study: Study, fakes: Fakes) -> None:
    decided = study.model_copy(update={"until_decided": True})
    for seeds, on in ((None, "slurm"), ([0, 1], "slurm"), (None, "local")):
        given = (None, seeds, None, on, Resources(), "", True)
        if seeds is None and on == "slurm":
            with pytest.raises(
                ConfigError, match="tiny runs until it is decided, and jobs on SLURM are planned before"
            ):
                launch_study(decided, FOLDER, *given)
        else:
            assert launch_study(decided, FOLDER, *given).seeds == seeds


# -- the report


def test_report_and_status_judge_by_the_rule(study: Study, fakes: Fakes, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_study(study, until_decided=True, most_seeds=8, quiet=True) == 0
    (report,) = analyse([read_study_folder(FOLDER)])["studies"]
    n = seeds_until("fast", 0.05 / 2, 8)
    one = Looks((LOSSES["fast"] - LOSSES["plain"])[:n], 8)
    (fast,) = (arm["comparison"] for arm in report["arms"] if arm["name"] == "fast")
    assert (fast["verdict"], fast["n"]) == ("better", n)
    assert fast["p"] == pytest.approx(one.p)
    assert (fast["low"], fast["high"]) == pytest.approx(one.interval())
    assert report["most_seeds"] == 8
    assert report["runs_planned"] == report["runs_found"] == 8 + n + 8
    assert any("pay for a look after every seed from 2 to 8" in note for note in report["notes"])
    (late,) = (arm["comparison"] for arm in report["arms"] if arm["name"] == "late")
    assert "would resolve" not in late["text"]
    code, out, _ = call(capsys, "study", "status", str(FOLDER))
    assert code == 0
    assert f"fast against plain: better after {n} seeds" in out
    console = Console(file=io.StringIO(), width=160)
    print_report(analyse([read_study_folder(FOLDER)]), console)
    out = console.file.getvalue()
    assert "seeds may be added: looks are paid for" in " ".join(out.split())
    assert "raise the error" not in out


def test_the_command_line_takes_the_rule(
    study: Study, fakes: Fakes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("study", "run", str(tmp_path / "tiny.toml"))
    assert call(capsys, *given, "--until-decided", "--most-seeds", "4", "--budget", "1")[0] == 0
    assert open_study(FOLDER).most_seeds == 4
    code, _, err = call(capsys, *given, "--until-decided", "--seed", "3")
    assert (code, err.count("\n")) == (2, 1)
    assert "--seed trains one seed, and --until-decided chooses the seeds" in err
