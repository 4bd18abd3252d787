"""Effects of a factorial: estimates and variances against other software, words, and error rates by simulation.

The error rates of the slow tests, as a table: `python tests/test_report_effects.py`.
"""

import csv
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from browsers import Browser, needs_chromium, started
from planted_runs import planted, write_runs
from rich.console import Console
from scipy import stats
from statsmodels.regression.linear_model import OLS

from gptlab.config import Study, load_study
from gptlab.config.factors import two_level_design
from gptlab.report import effects as ef
from gptlab.report.analysis import analyse
from gptlab.report.page import render_page
from gptlab.report.studies import read_study_folder
from gptlab.report.tables import print_report, write_csv

CHANGES = {
    "rope": {"model": {"position": "rope"}},
    "mlp": {"model": {"mlp": "swiglu"}},
    "norm": {"model": {"norm": "rmsnorm"}},
    "lr": {"optim": {"lr": 3e-3}},
    "warm": {"schedule": {"warmup_steps": 5}},
    "long": {"train": {"max_steps": 200}},
    "seven": {"optim": {"weight_decay": 0.0}},
    "eight": {"optim": {"grad_clip": 0.0}},
}


def factorial(k: int, fraction: int = 1, seeds: int = 3, **more: object) -> Study:
    factors = {name: {"settings": CHANGES[name]} for name in list(CHANGES)[:k]}
    arms = {}
    for on in two_level_design(list(factors), fraction):
        settings: dict[str, dict[str, object]] = {}
        for name in on:
            for section, values in CHANGES[name].items():
                settings.setdefault(section, {}).update(values)
        arms["+".join(on) or "none"] = {"settings": settings}
    base = {"name": "made", "recipe": {"train": {"max_steps": 100}}, "arms": arms, "baseline": "none"}
    base |= {"factors": factors, "fraction": fraction, "seeds": list(range(seeds))}
    return Study.model_validate(base | {"metric": {"margin": 0.01}} | more)


def on(arm: str) -> list[str]:
    return arm.split("+")


# -- numbers


def test_effects_of_two_factors_are_differences_of_means() -> None:
    """none 5, rope 4, mlp 3, both 1: rope is worth 1 without and 2 with mlp."""
    contrasts = ef.contrasts_of(factorial(2))
    assert contrasts.names == [["rope"], ["mlp"], ["rope x mlp"]]
    found = ef.estimate_effects(np.array([[5.0, 5.2], [4.0, 4.2], [3.0, 3.3], [1.0, 1.1]]), contrasts)
    assert found.mean == pytest.approx([-(1.0 + 1.0 + 2.0 + 2.2) / 4, -(2.0 + 1.9 + 3.0 + 3.1) / 4, -(1.0 + 1.2) / 2])


@pytest.mark.parametrize(("k", "fraction", "seeds"), [(2, 1, 3), (3, 1, 5), (6, 4, 3), (5, 2, 2)])
def test_estimates_and_variances_are_those_of_least_squares(k: int, fraction: int, seeds: int) -> None:
    """Effects: coefficients of one regression with a block for each seed. Variances: of each effect over seeds, and
    the residual mean square of arms and seeds, by statsmodels, weighted by their degrees of freedom."""
    study = factorial(k, fraction, seeds)
    contrasts, arms = ef.contrasts_of(study), len(study.arms)
    y = np.random.default_rng(k).normal(3, 1, (arms, seeds))
    found = ef.estimate_effects(y, contrasts)

    def regression(columns: np.ndarray) -> OLS:
        blocks = np.kron(np.ones((arms, 1)), np.eye(seeds))
        return OLS(y.ravel(), np.hstack([blocks, np.repeat(columns, seeds, axis=0)])).fit()

    coefficients = regression(contrasts.levels.T).params[seeds:]
    per_unit = np.where([" x " in names[0] for names in contrasts.names], 4, 2)
    assert found.mean == pytest.approx(coefficients * per_unit)
    pooled = regression(np.eye(arms)[:, 1:]).mse_resid * per_unit**2 / arms
    each = [OLS(y[:, s], np.vstack([np.ones(arms), contrasts.levels]).T).fit().params[1:] for s in range(seeds)]
    own = np.var(each, axis=0, ddof=1) * per_unit**2
    prior = {(4, 3): 1, (8, 5): 1, (16, 3): 2, (16, 2): 1}[arms, seeds]
    assert found.df == seeds - 1 + prior
    assert found.se**2 * seeds == pytest.approx(((seeds - 1) * own + prior * pooled) / found.df)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(found.mean) / found.se, found.df))
    low, high = found.interval()
    half = stats.t.ppf(1 - 0.025 / len(per_unit), found.df) * found.se
    assert low == pytest.approx(found.mean - half) and high == pytest.approx(found.mean + half)


def test_interactions_that_share_a_contrast_are_named_together() -> None:
    names = ef.contrasts_of(load_study("architecture-factors")).names
    assert names[:6] == [["rope"], ["swiglu"], ["warmup"], ["rmsnorm"], ["lr"], ["long"]]
    pairs = [set(name) for name in names[6:]]
    assert len(pairs) == 7 and sum(map(len, pairs)) == 15
    # changes of the architecture share contrasts with changes of training, as the file says
    assert {"rope x swiglu", "warmup x lr"} in pairs and {"rope x rmsnorm", "lr x long"} in pairs
    assert {"swiglu x rmsnorm", "warmup x long"} in pairs
    assert ef.contrasts_of(factorial(5, 2)).names[5:] == [[f"{a} x {b}"] for a, b in _pairs(list(CHANGES)[:5])]


def _pairs(names: list[str]) -> list[tuple[str, str]]:
    return [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]


# -- words


def test_what_is_planted_is_found_and_said() -> None:
    draw = np.random.default_rng(0)

    def value(arm: str, seed: int) -> float:
        gain = -0.2 * ("rope" in on(arm)) + 0.1 * ("lr" in on(arm)) - 0.15 * ({"rope", "mlp"} <= set(on(arm)))
        return 3.0 + 0.3 * seed + gain + draw.normal(0, 0.01)  # a seed that is worse in all arms matters nothing

    factors = analyse([planted(factorial(6, 4), value)])["studies"][0]["factors"]
    found = {effect["name"]: effect for effect in factors["effects"]}
    assert len(found) == 13 and list(found)[:6] == list(CHANGES)[:6]
    assert (found["rope"]["verdict"], found["mlp"]["verdict"], found["lr"]["verdict"]) == ("better", "better", "worse")
    assert found["rope"]["effect"] == pytest.approx(-0.275, abs=0.02)  # -0.2, and -0.15 in half of the arms
    assert found["rope"]["low"] < -0.275 < found["rope"]["high"] < 0
    both = found["rope x mlp"]
    assert both["verdict"] == "interact" and both["effect"] == pytest.approx(-0.15, abs=0.04)
    assert both["aliases"] == ["norm x warm"] and both["text"].startswith("rope x mlp or norm x warm: together they ch")
    said = factors["text"]
    assert said.startswith("2 of 6 changes lower validation loss: rope by 0.2")
    assert " and mlp by 0.07" in said and "; lr raises it by 0.1" in said and "), which is worse" in said
    assert said.endswith("; shown to depend on one another: rope x mlp or norm x warm")
    assert factors["design"].startswith("16 of the 64 combinations of 6 factors, 3 whole seeds. Main effects are clear")
    assert factors["notes"] == []
    assert found["warm"]["text"].startswith(
        ("warm lowers validation loss by 0.0", "warm raises validation loss by 0.0")
    )


def test_small_effects_with_little_noise_are_equivalent_and_large_noise_resolves_nothing() -> None:
    draw = np.random.default_rng(1)
    quiet = ef.effects_of(planted(factorial(3), lambda arm, seed: 3 + draw.normal(0, 1e-4)))
    loud = ef.effects_of(planted(factorial(3), lambda arm, seed: 3 + draw.normal(0, 1.0)))
    assert quiet is not None and loud is not None
    assert {effect["verdict"] for effect in quiet["effects"]} == {"equivalent"}
    assert quiet["text"] == (
        "no change is shown to help; rope, mlp and norm change it by less than the margin; no interaction is shown"
    )
    assert {effect["verdict"] for effect in loud["effects"]} == {"not resolved"}
    assert loud["text"].startswith("no change is shown to help; not resolved: rope, mlp, norm")


def test_more_is_better_where_the_metric_says_so() -> None:
    draw = np.random.default_rng(1)
    study = factorial(3, metric={"name": "accuracy", "better": "higher", "margin": 0.01})
    found = ef.effects_of(planted(study, lambda arm, seed: 0.5 + 0.1 * ("mlp" in on(arm)) + draw.normal(0, 1e-3)))
    assert found is not None and found["effects"][1]["verdict"] == "better"
    assert found["text"].startswith("1 of 3 changes raises accuracy: mlp by 0.1")


def test_seeds_with_a_missing_run_are_left_out_and_named() -> None:
    draw = np.random.default_rng(2)
    ended = {("mlp", 2): "diverged", ("rope+mlp", 2): "diverged", ("norm", 3): "failed"}

    def value(arm: str, seed: int) -> float | None:
        return None if (arm, seed) in ended or (arm, seed) == ("none", 3) else 3 + draw.normal(0, 0.01)

    found = ef.effects_of(planted(factorial(3, seeds=4), value, ended))
    assert found is not None and len(found["effects"]) == 6 and "2 whole seeds" in found["design"]
    assert found["notes"] == [
        "seed 2 is left out: no final_val_loss of mlp diverged, rope+mlp diverged",
        "seed 3 is left out: no final_val_loss of none not run, norm failed",
        "2 runs diverged, all with mlp; the effects are of the seeds in which none did",
    ]


def test_without_two_whole_seeds_there_are_no_effects() -> None:
    one = ef.effects_of(planted(factorial(2), lambda arm, seed: 3.0 if seed == 0 else None))
    none = ef.effects_of(planted(factorial(2), lambda arm, seed: None))
    assert one is not None and none is not None and one["effects"] == none["effects"] == []
    assert one["text"] == "no effects yet: 1 seed so far has a final_val_loss in every arm, and two must"
    assert none["text"] == "no effects yet: no seed has a final_val_loss in every arm, and two must"
    assert len(none["notes"]) == 3 and none["notes"][0].endswith(
        "none not run, rope not run, mlp not run, rope+mlp not run"
    )


def test_runs_without_noise_test_nothing() -> None:
    found = ef.effects_of(planted(factorial(2), lambda arm, seed: 3.0 - 0.5 * ("rope" in on(arm)) + seed))
    assert found is not None and {effect["verdict"] for effect in found["effects"]} == {"not resolved"}
    assert found["effects"][0]["text"].endswith("-0.5 in validation loss, without a spread to test against")


def test_a_study_without_factors_and_arms_that_are_no_factorial_have_no_effects() -> None:
    study = factorial(2)
    plain = study.model_copy(update={"factors": {}})
    assert ef.effects_of(planted(plain, lambda arm, seed: 3.0)) is None
    arms = {name: arm for name, arm in study.arms.items() if name != "rope"}
    found = ef.effects_of(planted(study.model_copy(update={"arms": arms}), lambda arm, seed: 3.0 + seed))
    assert found is not None and found["text"] == "no effects: the arms are not a balanced factorial"


# -- files


def test_a_report_of_a_factorial_has_its_effects_in_text_table_csv_and_page(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    write_runs(tmp_path / "made", factorial(2), lambda arm, seed: 3 - 0.2 * ("rope" in on(arm)) + draw.normal(0, 0.01))
    console = Console(file=io.StringIO(), width=120)
    payload = analyse([read_study_folder(tmp_path / "made")])
    print_report(payload, console)
    write_csv(payload, tmp_path)
    text = console.file.getvalue()
    assert "Factors: 1 of 2 changes lowers validation loss: rope by 0." in text and "rope x mlp" in text
    rows = list(csv.DictReader(io.StringIO((tmp_path / "made-factors.csv").read_text(encoding="utf-8"))))
    unit = "[validation loss, nats per token]"
    effects = payload["studies"][0]["factors"]["effects"]
    assert [row["effect"] for row in rows] == ["rope", "mlp", "rope x mlp"]
    assert [float(row[f"change {unit}"]) for row in rows] == [effect["effect"] for effect in effects]
    assert [float(row[f"simultaneous 95% low {unit}"]) for row in rows] == [effect["low"] for effect in effects]
    assert '"rope x mlp"' in render_page(payload)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with started() as one:
        yield one


# -- error rates

Draw = Callable[[np.random.Generator, int, int, np.ndarray], np.ndarray]


def _shared(levels: np.ndarray, rho: float) -> Draw:
    """Runs of a seed with equal `levels` (arms, factors) share a share rho of their variance."""
    _, cell = np.unique(levels, axis=0, return_inverse=True)

    def draw(rng: np.random.Generator, trials: int, seeds: int, design: np.ndarray) -> np.ndarray:
        own = rng.standard_normal((trials, len(cell), seeds))
        common = rng.standard_normal((trials, cell.max() + 1, seeds))
        return np.sqrt(1 - rho) * own + np.sqrt(rho) * common[:, cell.ravel()]

    return draw


def _scaled(sds: Callable[[np.random.Generator, int, int], np.ndarray]) -> Draw:
    def draw(rng: np.random.Generator, trials: int, seeds: int, design: np.ndarray) -> np.ndarray:
        return sds(rng, trials, len(design))[..., None] * rng.standard_normal((trials, len(design), seeds))

    return draw


def _one_noisy(rng: np.random.Generator, trials: int, arms: int) -> np.ndarray:
    return np.where(np.arange(arms) == arms // 2, 10.0, 1.0)[None].repeat(trials, 0)


def _bad_seeds(rng: np.random.Generator, trials: int, seeds: int, design: np.ndarray) -> np.ndarray:
    shape = (trials, len(design), seeds)
    return rng.standard_normal(shape) + 20 * (rng.random(shape) < 0.05)


def _heavy(rng: np.random.Generator, trials: int, seeds: int, design: np.ndarray) -> np.ndarray:
    return rng.standard_t(2, (trials, len(design), seeds))


def worlds(design: np.ndarray) -> dict[str, Draw]:
    """Noise without any effect, by name; design is (arms, factors)."""
    return {
        "equal noise": _scaled(lambda rng, trials, arms: np.ones((trials, arms))),
        "sds lognormal, 0.7": _scaled(lambda rng, trials, arms: np.exp(0.7 * rng.standard_normal((trials, arms)))),
        "one arm x 10": _scaled(_one_noisy),
        "t, 2 degrees of freedom": _heavy,
        "1 run in 20 at +20 sd": _bad_seeds,
        "half shared by one factor": _shared(design[:, :1], 0.5),
        "0.9 shared by one factor": _shared(design[:, :1], 0.9),
        "half shared by three factors": _shared(design[:, :3], 0.5),
        "0.9 shared by three factors": _shared(design[:, :3], 0.9),
    }


def error_rate(study: Study, draw: Draw, seeds: int, trials: int, pooled: bool = False) -> float:
    """How often any effect is called different from 0, or equally any of the intervals misses, where all are 0."""
    contrasts = ef.contrasts_of(study)
    values = draw(np.random.default_rng(seeds), trials, seeds, contrasts.levels[: len(study.factors)].T)
    found = ef.estimate_effects(values, contrasts)
    p = found.p
    if pooled:  # what the residual mean square alone would say
        arms = values.shape[1]
        r = values - values.mean(2, keepdims=True) - values.mean(1, keepdims=True) + values.mean((1, 2), keepdims=True)
        df = (arms - 1) * (seeds - 1)
        se = contrasts.scale * np.sqrt((r**2).sum((1, 2)) / df * arms / seeds)[:, None]
        p = 2 * stats.t.sf(abs(found.mean) / se, df)
    return float((p.min(axis=1) * p.shape[1] < 0.05).mean())


DESIGNS = [(2, 1), (3, 1), (4, 2), (5, 2), (6, 4), (8, 16)]
TRIALS = 20_000


@pytest.mark.slow
@pytest.mark.parametrize(("k", "fraction"), DESIGNS)
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_effects_err_in_at_most_5_percent_of_studies(k: int, fraction: int, seeds: int) -> None:
    study = factorial(k, fraction)
    bound = stats.binom.ppf(0.9999, TRIALS, 0.05) / TRIALS
    rates = {
        name: error_rate(study, draw, seeds, TRIALS)
        for name, draw in worlds(ef.contrasts_of(study).levels[:k].T).items()
    }
    assert {name: rate for name, rate in rates.items() if rate > bound} == {}


@pytest.mark.slow
def test_the_residual_mean_square_alone_would_err_where_runs_share_noise() -> None:
    study = factorial(6, 4)
    shared = worlds(ef.contrasts_of(study).levels[:6].T)
    bound = stats.binom.ppf(0.0001, 5000, 0.1) / 5000
    assert error_rate(study, shared["half shared by one factor"], 3, 5000, pooled=True) > 2 * bound
    assert error_rate(study, shared["0.9 shared by three factors"], 3, 5000, pooled=True) > bound


def power(study: Study, effect: float, seeds: int, trials: int) -> float:
    """How often one main effect, in standard deviations of a run, is found with Bonferroni over all."""
    contrasts = ef.contrasts_of(study)
    values = np.random.default_rng(1).standard_normal((trials, len(study.arms), seeds))
    found = ef.estimate_effects(values + effect / 2 * contrasts.levels[0][:, None], contrasts)
    return float((found.p[:, 0] * found.p.shape[1] < 0.05).mean())


@pytest.mark.slow
def test_intervals_hold_together_and_effects_of_two_sigma_are_found_at_three_seeds() -> None:
    """Coverage does not depend on the effects; power is at least what half as many seeds of one comparison give."""
    study = factorial(6, 4)
    contrasts, rng, trials = ef.contrasts_of(study), np.random.default_rng(0), 20_000
    truth = rng.normal(0, 2, len(contrasts.names))
    noise = rng.standard_normal((trials, 16, 3)) * np.exp(0.5 * rng.standard_normal((trials, 16, 1)))
    per_level = truth / (contrasts.scale * 16)
    low, high = ef.estimate_effects(noise + (per_level @ contrasts.levels)[:, None], contrasts).interval()
    hold = ((low <= truth) & (truth <= high)).all(axis=1)
    assert hold.mean() >= stats.binom.ppf(0.0001, trials, 0.95) / trials
    assert power(study, 2.0, 3, 5000) > 0.7 and power(study, 3.0, 3, 5000) > 0.95


@pytest.mark.slow
def test_whole_reports_of_nothing_name_no_effect() -> None:
    """From run to sentence: of 400 studies with shared seeds and no effect, at most 5% name one."""
    draw, wrong, trials = np.random.default_rng(0), 0, 400
    study = factorial(6, 4, metric={"margin": 0.0})
    for _ in range(trials):
        seeds = draw.normal(0, 1, 3)
        told = ef.effects_of(planted(study, lambda arm, seed, seeds=seeds: 3 + seeds[seed] + draw.normal(0, 0.1)))
        assert told is not None
        wrong += any(effect["verdict"] != "not resolved" for effect in told["effects"])
    assert wrong <= stats.binom.ppf(0.9999, trials, 0.05)


@pytest.mark.slow
@needs_chromium
def test_the_page_shows_effects_and_targets(browser: Browser, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    study = factorial(2, targets=[3.1])
    write_runs(tmp_path / "made", study, lambda arm, seed: 3 - 0.2 * ("rope" in on(arm)) + draw.normal(0, 0.01))
    browser.open(render_page(analyse([read_study_folder(tmp_path / "made")])))
    rows = browser.each("section[id$=factors] tbody tr", "one.textContent")
    assert len(rows) == 3 and rows[0].startswith("rope") and "better" in rows[0]
    heads = browser.each("section[id$=target-0] thead th", "one.textContent")
    assert heads[:5] == ["arm", "runs", "steps", "tokens", "seconds"]
    cells = browser.each("section[id$=target-0] tbody tr", "one.textContent")
    assert len(cells) == 4 and all("3 of 3" in cell for cell in cells)
    assert browser.complaints() == []


def test_print_report_takes_a_study_without_factors_or_targets() -> None:
    payload = analyse([planted(factorial(2).model_copy(update={"factors": {}}), lambda arm, seed: 3.0 + seed)])
    console = Console(file=io.StringIO(), width=120)
    print_report(payload, console)
    assert payload["studies"][0]["factors"] is None and "Factors:" not in console.file.getvalue()


if __name__ == "__main__":
    for seeds in (2, 3, 5):
        print(f"\n{seeds} seeds | " + " | ".join(f"2^{k} / {f}" for k, f in DESIGNS) + " | residual alone, 2^6 / 4")
        studies = [factorial(k, f) for k, f in DESIGNS]
        for name in worlds(np.ones((2, 3))):
            rates = []
            for study in [*studies, studies[4]]:
                levels = ef.contrasts_of(study).levels[: len(study.factors)].T
                rates.append(error_rate(study, worlds(levels)[name], seeds, TRIALS, pooled=len(rates) == len(studies)))
            print(f"{name} | " + " | ".join(f"{100 * rate:.1f}" for rate in rates))
    for seeds in (2, 3, 5):
        print(
            seeds,
            [
                f"{effect} sd: {100 * power(factorial(6, 4), effect, seeds, TRIALS):.0f}%"
                for effect in (1, 1.5, 2, 3, 5)
            ],
        )
