"""Noise as it was measured elsewhere: the shipped entries, the nearest of them, and what power and plan make of it."""

import itertools
import math
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest

from gptlab.cli import main
from gptlab.config import Study, load_study
from gptlab.errors import UserError
from gptlab.planning.study import size_of
from gptlab.report import detection, precedents
from gptlab.report.power import Noise, plan_line, power_report, precedent_noise, rule_of
from gptlab.report.precedents import measured, nearest
from gptlab.report.studies import ReadRun, ReadStudy


def test_the_shipped_entries_are_whole() -> None:
    entries = precedents.precedents()
    assert entries[0].name == "modded-nanogpt Track 3" and entries[0].sd == pytest.approx(0.0016, abs=0.00001)
    assert len({entry.name for entry in entries}) == len(entries)
    for entry in entries:
        assert entry.run_sd > 0 and entry.df > 0 and entry.parameters > 0 and entry.corpus and entry.source, entry.name
        assert entry.task in ("lm", "classify")
    smoke = [load_study(entry.name) for entry in entries[1:]]
    assert [study.metric.name for study in smoke] == [entry.metric for entry in entries[1:]]


def test_the_nearest_setting_has_the_metric_then_the_task_then_the_size() -> None:
    found = nearest("lm", "final_val_loss", 354_000_000)
    assert found and found.name == "modded-nanogpt Track 3"
    small = nearest("lm", "final_val_loss", 20_000, 100_000)
    assert small and small.parameters < 100_000 and small.task == "lm"
    f1 = nearest("lm", "micro_f1", 124_000_000)
    assert f1 and f1.metric == "micro_f1" and f1.task == "classify"
    assert nearest("lm", "hellaswag_acc_norm", 124_000_000) is None
    assert nearest("lm", "final_val_loss", None) is not None


def test_the_noise_of_a_study_is_typical_of_its_arms() -> None:
    draw = np.random.default_rng(0)
    n, content = 6, {"name": "s", "recipe": {"train": {"max_steps": 9}}, "baseline": "a0"}
    study = Study.model_validate(content | {"arms": {f"a{i}": {} for i in range(30)}, "seeds": [*range(n)]})
    block = 3 + draw.normal(0, 0.1, (30, n)) + draw.normal(0, 0.3, n)
    block[5] *= 10  # one arm far noisier than the rest
    block[6] = block[7]  # a copy
    environment = {"parameters": 1000, "data": {"corpus": "books"}}
    runs = {}
    for i, seed in itertools.product(range(30), range(n)):
        result = {"status": "completed", "final_val_loss": float(block[i, seed]), "tokens": 500}
        runs[f"a{i}", seed] = ReadRun(f"a{i}", seed, Path("x"), "completed", result, {}, environment)
    found = measured(ReadStudy(study, Path("s"), runs, []))
    kept = np.delete(block, (5, 6), axis=0)
    assert found.paired_sd == pytest.approx(0.1 * math.sqrt(2), rel=0.25)
    assert found.run_sd == pytest.approx(math.sqrt(kept.var(axis=1, ddof=1).mean()), rel=0.25)
    assert (found.df, found.parameters, found.tokens, found.corpus) == (29 * 5, 1000, 500, "books")
    with pytest.raises(UserError, match="two arms must have completed the same two seeds"):
        measured(ReadStudy(study, Path("s"), {("a0", 0): runs["a0", 0]}, []))


def test_power_begins_with_the_nearest_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["study", "power", "precision-lm-smoke", "--effect", "0.1"])
    told = capsys.readouterr().out
    study = load_study("precision-lm-smoke")
    noise = precedent_noise(study, *size_of(study))
    assert f"is {noise.sd:.3g}: a starting point from another setting, " in told and "33K parameters" in told
    assert "variances are shrunk toward those of the other arms" in told
    n = detection.seeds_needed(0.1, noise.sd, 19, 0.02, detection.Rule("shrunk", 20))
    assert f"the first of 19 after Holm      {n} seeds" in told
    other = study.model_copy(update={"metric": study.metric.model_copy(update={"name": "hellaswag_acc_norm"})})
    with pytest.raises(UserError, match="known from no other setting; pass --noise SD, or --pilot DIR"):
        precedent_noise(other, None, None)
    assert "--noise or --pilot" in plan_line(other, None, None)


def test_power_knows_the_rule_of_the_study() -> None:
    study = load_study("precision-lm")
    assert rule_of(study) == detection.Rule("shrunk", 20)
    seeds = {}
    for variances in ("own", "shrunk", "shared"):
        told = "\n".join(power_report(study.model_copy(update={"variances": variances}), 0.02, Noise(0.004)))
        found = re.search(r"first of 19 after Holm +(\d+) seeds", told)
        assert found
        seeds[variances] = int(found[1])
    assert seeds["own"] > seeds["shrunk"] >= seeds["shared"]
    few = study.model_copy(update={"arms": dict(itertools.islice(study.arms.items(), 5))})
    assert rule_of(few) == detection.OWN
    one = study.model_copy(update={"seeds": [0]})
    assert plan_line(one, None, None) == ""


def test_power_says_what_it_leaves_out() -> None:
    """Looks after every seed, which have variances of their own; and factors, which all arms tell of."""

    def told(study: Study) -> str:
        return "\n".join(power_report(study, 0.02, Noise(0.004)))

    study = load_study("precision-lm")
    assert "these numbers are of" not in told(study)
    looks = study.model_copy(update={"until_decided": True, "most_seeds": 12})
    assert "looks after every seed from 2 to 12 and pays for it" in told(looks)
    assert rule_of(looks) == detection.OWN and "shrunk" not in told(looks)
    assert "compared over all its arms" in told(load_study("architecture-factors"))


def test_a_plan_says_what_the_seeds_detect(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["plan", "sizes-smoke", "--gpu", "L4"])
    told = " ".join(capsys.readouterr().out.split())
    study = load_study("sizes-smoke")
    noise = precedent_noise(study, *size_of(study))
    family = len(study.arms) - 1
    detects = detection.minimum_detectable(len(study.seeds), noise.sd, family, study.metric.margin, rule_of(study))
    assert f"{detects:.2g} in the first of {family} with 80% power, if the sd of a paired difference is" in told


def test_an_entry_is_printed_as_it_is_read() -> None:
    folder = Path(precedents.__file__).parents[1] / "noise.toml"
    assert tomllib.loads(folder.read_text(encoding="utf-8"))["settings"][1]["name"] == precedents.precedents()[1].name
