"""Two runs side by side: their losses window by window, and what may be said of them."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_recipe
from rich.cells import cell_len
from scipy import stats
from test_cli import call

import gptlab
from gptlab.errors import RunError
from gptlab.report import comparing
from gptlab.report.comparing import FEWEST, differ_data, models_differ, paired_difference
from gptlab.report.scores import compare_scores
from gptlab.report.statistics import bootstrap
from gptlab.rundir import RunDir
from gptlab.training.load import load_run
from gptlab.training.windows import shared_windows, window_losses

ODD = {"model.block_size": 24, "batch.tokens_per_step": 240}
QUICK = {"train__max_steps": 12, "train__eval_every": 12, "checkpoint__every": 12, "model__dropout": 0.0}


@pytest.fixture(scope="module")
def runs(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDir]:
    """A run, one with a tenth of its learning rate, and one with half of its context."""
    folder = tmp_path_factory.mktemp("compared")
    changes = {"a": {}, "slow": {"optim__lr": 1e-3}, "short": {"model__block_size": 16}}
    for name, change in changes.items():
        recipe = tiny_recipe(dataset, **QUICK, eval__tokens=960, eval__train=False, **change)
        gptlab.train(recipe, folder / name, quiet=True)
    return {name: RunDir(folder / name) for name in changes}


def test_the_mean_over_windows_is_the_last_evaluation(runs):
    for name in ("a", "slow"):
        windows = shared_windows([runs[name]], {})
        losses = window_losses(load_run(runs[name].path, device="cpu"), windows)
        assert losses.shape == (30,) and np.diff(windows.starts).min() >= windows.length == 32
        assert losses.mean() == pytest.approx(runs[name].read_json("result.json")["final_val_loss"], rel=1e-5)


def test_a_shorter_context_predicts_the_same_text_in_pieces(runs):
    windows = shared_windows([runs["short"], runs["a"]], {})
    assert windows.length == 32
    trained = load_run(runs["short"].path, device="cpu")
    pieces = np.concatenate([windows.starts, windows.starts + 16])
    halves = window_losses(trained, type(windows)(windows.tokens, pieces, 16, None, windows.tokenizer)).reshape(2, -1)
    assert window_losses(trained, windows) == pytest.approx(halves.mean(0), rel=1e-5)


def test_windows_know_their_documents(runs):
    windows = shared_windows([runs["a"]], {"eval.tokens": 10**9})  # all of the split
    every = windows.tokens.gather(np.array([0]), len(windows.tokens))[0]
    ends = np.flatnonzero(every == windows.tokenizer.eot)
    assert windows.documents.tolist() == [int((ends <= start).sum()) for start in windows.starts]
    assert 15 <= len(set(windows.documents.tolist())) <= 20 < len(windows.starts)


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda run: (run.path / "environment.json").unlink(), "not trained on the same data"),
        (lambda run: run.write_json("environment.json", {"data": {"fingerprint": "other"}}), "no text is held out"),
        (lambda run: run.write_recipe(run.read_recipe().replace(ODD)), "do not divide"),
        (lambda run: run.tokenizer_file.write_text('{"kind": "byte"}', encoding="utf-8"), "bits per byte"),
    ],
)
def test_what_cannot_be_compared_is_said(runs, tmp_path, break_it, says):
    other = copied(runs["slow"], tmp_path / "other")
    break_it(other)
    with pytest.raises(RunError, match=says):
        shared_windows([runs["a"], other], {})


def copied(run: RunDir, to: Path) -> RunDir:
    to.mkdir()
    for name in ("recipe.toml", "environment.json", "tokenizer.json"):
        (to / name).write_bytes((run.path / name).read_bytes())
    return RunDir(to)


# -- the statistics -----------------------------------------------------------------------------------------------


def test_windows_of_one_document_are_averaged_first():
    draw = np.random.default_rng(1)
    documents = np.repeat(np.arange(40), 5)
    shift = draw.normal(0.05, 0.1, 40)[documents]  # a document is easier for one model as a whole
    first = draw.normal(3, 0.5, 200)
    other = first + shift + draw.normal(0, 0.01, 200)
    estimate, unit = paired_difference(first, other, documents)
    assert unit == "documents" and estimate.n == 40
    means = [(other - first)[documents == i].mean() for i in range(40)]
    assert (estimate.low, estimate.high) == pytest.approx(
        (bootstrap(means, np.zeros(40)).low, bootstrap(means, np.zeros(40)).high)
    )
    alone, unit = paired_difference(first, other, None)
    assert unit == "windows" and alone.n == 200
    assert estimate.high - estimate.low > 1.8 * (alone.high - alone.low)  # sqrt(5) times, as if they were independent
    few = np.repeat(np.arange(FEWEST - 1), 11)[:200]
    assert paired_difference(first, other, few)[1] == "windows"  # too few to resample
    assert paired_difference(first, other, np.arange(200))[1] == "windows"  # each begins in one of its own


def test_the_sentence_is_about_the_models():
    draw = np.random.default_rng(1)
    first, noise = draw.normal(3, 0.5, 100), draw.normal(0, 0.1, 100)
    noise -= noise.mean()

    def says(delta):
        return models_differ(("A", "B"), (first, first + delta), None, 32)

    better, interval = says(noise - 0.2)
    assert better.startswith("The model B is better than A. B minus A: -0.2000 nats a token, 95% interval [-0.2")
    assert "over 100 windows of the validation split, 32 tokens each" in better and "these weights" in interval
    assert "taken as independent" in interval
    own = models_differ(("A", "B"), (first, first + noise), np.arange(100), 32)  # each begins in a document of its own
    assert own[1].endswith("Windows do not overlap.")
    assert says(noise + 0.2)[0].startswith("The model A is better than B.")
    assert says(noise)[0].startswith("No difference between the models A and B is seen.")
    assert "equal in what was measured" in says(0.0)[0]
    few = models_differ(("A", "B"), (first[:5], first[:5] - 1), None, 32)
    assert few == [
        "B minus A: -1.0000 nats a token over 5 windows of 32 tokens: too few for an interval; "
        "--eval.tokens N takes more."
    ]


@pytest.mark.parametrize(
    ("n", "pairs", "trials"),
    [(60, 3, 30), *(pytest.param(*one, marks=pytest.mark.slow) for one in ((30, 3, 300), (60, 7, 150)))],
)
def test_several_intervals_hold_together(n, pairs, trials, monkeypatch):
    """Of models that do not differ, one is said to be better in 5% of the comparisons; of 7 pairs alone in 25%."""
    monkeypatch.setattr(comparing, "RESAMPLES", 300)
    draw = np.random.default_rng(n)
    wrong = 0
    for _ in range(trials):
        first = draw.normal(3, 0.5, n)  # all pairs share the reference
        others = [draw.normal(3, 0.5, n) for _ in range(pairs)]
        found = [paired_difference(first, other, None, pairs)[0] for other in others]
        wrong += any(not one.low <= 0 <= one.high for one in found)
    assert wrong <= 0.075 * trials + 2 * (0.05 * 0.95 * trials) ** 0.5


def test_an_interval_of_several_is_wider_and_asks_for_more_windows():
    draw = np.random.default_rng(1)
    first, other = draw.normal(3, 0.5, 40), draw.normal(3, 0.5, 40)
    widths = [one.high - one.low for one in (paired_difference(first, other, None, pairs)[0] for pairs in (1, 5))]
    assert widths[1] / widths[0] == pytest.approx(2.576 / 1.96, rel=0.1)  # of a normal distribution, 99% over 95%
    assert "too few" in models_differ(("A", "B"), (first[:25], other[:25]), None, 32, pairs=2)[0]
    assert "95% interval" in models_differ(("A", "B"), (first[:25], other[:25]), None, 32)[0]


def heavy(seed):
    rng = np.random.default_rng(seed)
    return rng.choice([-1, 1], 30) * rng.lognormal(0, 1, 30)


def test_a_window_that_differs_much_shows_nothing():
    delta = heavy(23)
    estimate = bootstrap(delta, np.zeros(30))
    assert estimate.high < 0 and estimate.p == pytest.approx(stats.ttest_1samp(delta, 0).pvalue) and estimate.p > 0.1
    losses = np.zeros(30), delta
    assert models_differ(("A", "B"), losses, None, 32)[0].startswith("No difference")
    assert differ_data(("A", "B"), losses, None)["verdict"] == "not resolved"


@pytest.mark.slow
def test_equal_models_are_called_different_in_five_percent():
    """The bootstrap's interval alone is too short for them."""
    first, wrong, alone = np.zeros(30), 0, 0
    for k in range(300):
        delta = heavy(k)
        wrong += not models_differ(("A", "B"), (first, delta), None, 32)[0].startswith("No difference")
        estimate = bootstrap(delta, first, resamples=500)
        alone += not estimate.low <= 0 <= estimate.high
    assert wrong < 27 < alone  # 5% and three standard errors are 26


# -- the command --------------------------------------------------------------------------------------------------


def test_the_command_as_json(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gptlab.report.plots.draw", lambda runs, out, tell: [out / "validation_loss.png"])
    words = ["compare", runs["a"].path, runs["slow"].path, "--prompt", "the cat", "--max-tokens", 4, "--json"]
    status, out, err = call(capsys, *words)
    told = json.loads(out)
    assert status == 0 and err == ""
    assert [run["label"] for run in told["runs"]] == ["A", "B"] and told["runs"][0]["status"] == "completed"
    assert {"name": "optim.lr", "values": [0.01, 0.001]} in told["settings"]
    (row,) = told["comparisons"]
    assert (row["a"], row["b"], row["windows"]) == ("B", "A", 30)
    losses = [run.read_json("result.json")["final_val_loss"] for run in (runs["slow"], runs["a"])]
    assert row["difference"] == pytest.approx(losses[0] - losses[1], rel=0.2)
    assert row["verdict"] == "worse" and row["low"] > 0 and f"{row['difference']:+.4f}" in told["text"][0]
    assert told["prompts"][0]["prompt"] == "the cat" and len(told["prompts"][0]["answers"]) == 2


@pytest.mark.parametrize("width", [80, 160])
def test_the_command_shows_all_of_it(runs, tmp_path, monkeypatch, capsys, width):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gptlab.cli.compare.wide_console", lambda _: console(width))
    monkeypatch.setattr("gptlab.report.plots.draw", lambda runs, out, tell: [out / "validation_loss.png"])
    status, out, err = call(
        capsys, "compare", runs["a"].path, runs["slow"].path, "--prompt", "the cat", "--max-tokens", 8
    )
    assert status == 0 and err == ""
    lines = [line for line in out.splitlines() if "plots in" not in line and str(runs["a"].path.parent) not in line]
    assert all(cell_len(line) <= width for line in lines)
    flat = " ".join(out.split())
    assert "optim.lr 0.01 0.001" in flat and "status completed completed" in flat
    assert "curves: 1 plots in plots/a-and-slow" in flat and "Prompt 'the cat'" in flat
    assert "The model A is better than B. B minus A: +" in flat and "over 30 windows" in flat
    assert "not about the methods" in flat


def test_the_command_goes_on_where_the_models_cannot_be_compared(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gptlab.report.plots.draw", lambda runs, out, tell: [])
    other = copied(runs["slow"], tmp_path / "other")
    status, out, err = call(capsys, "compare", runs["a"].path, other.path)
    assert status == 0, err
    assert "The models are not compared" in out and "no checkpoint" in out
    status, out, _ = call(capsys, "compare", runs["a"].path, runs["slow"].path, "--data.path", str(tmp_path / "gone"))
    flat = " ".join(out.split())
    assert status == 0 and "Whether the models A and B differ is not measured: no prepared dataset" in flat
    assert "Prompt" in flat
    three = [runs[name].path for name in ("a", "slow", "short")]  # windows of 32 for the second, too, and for the third
    status, out, _ = call(capsys, "compare", *three, "--prompt", "the")
    flat = " ".join(out.split())
    assert status == 0 and "better than B" in flat and "C minus A" in flat and flat.count("over 30 windows") == 2
    assert flat.count("(simultaneous: 97.5% each, Bonferroni over 2 pairs)") == 2
    status, _, err = call(capsys, "compare", runs["a"].path)
    assert status == 2 and "takes 2 to 8" in err


def console(width: int):
    from rich.console import Console

    return Console(width=width)


def test_windows_of_two_runs_document_by_document(runs, tmp_path, capsys):
    for name in ("a", "slow"):
        words = ["eval", runs[name].path, "--windows", tmp_path / f"new/{name}.jsonl", "--eval.tokens", 960]
        status, out, _ = call(capsys, *words)
        assert status == 0 and "val_loss" in json.loads(out)
    files = [tmp_path / "new/a.jsonl", tmp_path / "new/slow.jsonl"]
    report = compare_scores(files)
    (row,) = report["comparisons"]
    assert report["metric"] == "loss" and report["arms"][0]["form"] == "windows" and row["rows"] == 30
    losses = [run.read_json("result.json")["final_val_loss"] for run in (runs["a"], runs["slow"])]
    assert [arm["mean"] for arm in report["arms"]] == pytest.approx(losses, rel=1e-5)
    assert row["verdict"] == "worse" and row["difference"] > 0.1 and len(row["moved"][0]["text"]) > 10
    call(capsys, "eval", runs["slow"].path, "--windows", files[1], "--eval.tokens", 640)
    fewer = compare_scores(files)  # other windows of the same text
    assert fewer["comparisons"][0]["rows"] < 30 and fewer["warnings"]
