"""The plots say what metrics.jsonl says: checked on the figures' artists, not on pixels."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gptlab.config import build_recipe
from gptlab.report import curves, plots
from gptlab.report.reading import duration, human, series, short_names
from gptlab.rundir import RunDir


def make_run(path: Path, lines, result=None, **recipe) -> RunDir:
    run = RunDir(path)
    run.write_recipe(build_recipe({"train.max_steps": 10}, {key.replace("__", "."): v for key, v in recipe.items()}))
    with run.open_metrics() as file:
        for line in lines:
            file.write((line if isinstance(line, str) else json.dumps(line)) + "\n")
    if result:
        run.write_json("result.json", result)
    return run


def training(steps, losses, per_step=100, speeds=None):
    """Training lines; speeds default to 1000 tokens a second."""
    speeds = speeds or [1000.0] * len(steps)
    return [
        {"step": s, "tokens": s * per_step, "loss": x, "lr": 1e-3, "tokens_per_second": v, "mfu": 0.4}
        for s, x, v in zip(steps, losses, speeds, strict=True)
    ]


def evaluations(steps, losses, per_step=100):
    return [{"step": s, "tokens": s * per_step, "val_loss": x} for s, x in zip(steps, losses, strict=True)]


def lines_of(figure, gid):
    return [line for line in figure.axes[0].get_lines() if line.get_gid() == gid]


def texts_of(figure, gid):
    return [text.get_text() for text in figure.axes[0].texts if text.get_gid() == gid]


def legend_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_the_drawn_points_are_the_logged_ones(tmp_path):
    losses = [5.0, 4.0, 3.5]
    run = make_run(tmp_path / "a", evaluations([0, 3], [6.0, 3.6]) + training([1, 2, 3], losses))
    drawn = plots.run_figures([run])
    assert list(drawn) == ["training_loss", "validation_loss", "train-val_loss", "learning_rate", "throughput"]
    (raw,) = lines_of(drawn["training_loss"], "raw")
    assert raw.get_xydata().tolist() == [[1, 5.0], [2, 4.0], [3, 3.5]]
    assert lines_of(drawn["train-val_loss"], "val")[0].get_xydata().tolist() == [[0, 6.0], [3, 3.6]]
    assert lines_of(drawn["train-val_loss"], "raw")[0].get_ydata().tolist() == losses
    low, high = drawn["training_loss"].axes[0].get_ylim()
    assert low < 3.5 and high > 5.0


def test_files_have_the_promised_names_and_are_png(tmp_path):
    lines = [*training([1, 2], [5.0, 4.0]), {"step": 2, "hellaswag_acc": 0.26, "hellaswag_acc_norm": 0.27}]
    written = plots.draw([make_run(tmp_path / "a", lines)], tmp_path / "out" / "deep")
    assert [file.name for file in written] == [
        "training_loss.png",
        "learning_rate.png",
        "throughput.png",
        "hellaswag_accuracy.png",
    ]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in written)


def test_a_step_written_twice_counts_once_and_steps_are_sorted():
    lines = [{"step": 2, "loss": 9.0}, {"step": 1, "loss": 5.0}, {"step": 2, "loss": 4.0}, {"step": 3}]
    steps, values = series(lines, "loss")
    assert steps.tolist() == [1, 2] and values.tolist() == [5.0, 4.0]


def test_thinning_keeps_both_kinds_of_spikes_and_the_ends():
    rng = np.random.default_rng(0)
    steps, values = np.arange(50_000.0), rng.normal(3, 0.1, 50_000)
    values[31_234], values[17], values[40_001] = 11.0, -7.0, 9.0
    few_steps, few = curves.thin(steps, values, most=1000)
    assert len(few) <= 1002 and few_steps[0] == 0 and few_steps[-1] == 49_999
    assert {11.0, -7.0, 9.0} <= set(few.tolist())
    assert np.all(np.diff(few_steps) > 0)
    assert np.array_equal(few, values[few_steps.astype(int)])


def test_smoothing_follows_a_line_exactly_at_the_start_and_damps_noise():
    steps = np.arange(1000.0)
    at, means, window = curves.smooth(steps, 10 - 0.01 * steps)
    inner = at < 1000 - window
    assert window == 41
    np.testing.assert_allclose(means[inner], 10 - 0.01 * at[inner])  # a symmetric mean does not lag
    noise = np.random.default_rng(1).normal(size=1000)
    assert curves.smooth(steps, noise)[1].std() < 0.35 * noise.std()
    impulse = curves.smooth(steps, np.where(steps == 500, 1.0, 0.0))[1]
    weights = np.hanning(43)[1:-1]
    np.testing.assert_allclose(impulse[480:521], weights / weights.sum())


def test_high_first_losses_are_cut_off_and_marked(tmp_path):
    steps = list(range(1, 1001))
    losses = [11.0 if s < 10 else 4.0 - s / 1000 for s in steps]
    figure = plots.run_figures([make_run(tmp_path / "a", training(steps, losses))])["training_loss"]
    high = figure.axes[0].get_ylim()[1]
    assert 3.98 < high < 4.5
    assert all(x < 10 for line in lines_of(figure, "above") for x in line.get_xdata())
    assert "above the scale (up to 11)" in legend_of(figure)
    assert any("smoothed over 41 steps" in text for text in legend_of(figure))


def test_a_divergence_at_the_end_stays_in_view(tmp_path):
    steps = list(range(1, 1001))
    losses = [11.0 if s < 10 else 3.0 for s in steps]
    losses[-5:] = [4.0, 5.0, 6.5, 8.0, None]
    lines = training(steps, losses) + evaluations([0, 500, 1000], [11.0, 3.0, None])
    run = make_run(tmp_path / "a", lines, result={"status": "diverged", "failed_at_step": 1000})
    drawn = plots.run_figures([run])
    for name, figure in drawn.items():
        (mark,) = lines_of(figure, "diverged")
        assert list(mark.get_xdata()) == [1000, 1000], name
        assert "diverged at step 1,000" in legend_of(figure)
    figure = drawn["training_loss"]
    assert figure.axes[0].get_ylim()[1] >= 8.0
    (lost,) = lines_of(figure, "not finite")
    assert lost.get_xdata().tolist() == [1000]
    assert texts_of(drawn["validation_loss"], "best") == ["last finite and best 3.0000 at step 500"]


def test_only_a_diverged_run_is_marked(tmp_path):
    run = make_run(tmp_path / "a", training([1, 2], [5.0, 4.0]), result={"status": "completed", "steps": 2})
    assert not lines_of(plots.run_figures([run])["training_loss"], "diverged")


def test_best_and_last_validation_are_annotated_where_they_are(tmp_path):
    run = make_run(tmp_path / "a", evaluations([0, 10, 20, 30], [6.0, 3.25, 3.125, 3.5]))
    figure = plots.run_figures([run])["validation_loss"]
    (ring,) = lines_of(figure, "best")
    assert ring.get_xydata().tolist() == [[20, 3.125]]
    assert texts_of(figure, "best") == ["best 3.1250 at step 20"]
    assert texts_of(figure, "last") == ["last\n3.5000"]


def test_no_words_cover_a_curve_where_two_are_drawn(tmp_path):
    lines = evaluations([0, 100, 200], [6.0, 4.0, 3.5]) + training([10, 100, 190, 200], [5.0, 4.2, 2.9, 3.6])
    figure = plots.run_figures([make_run(tmp_path / "a", lines)])["train-val_loss"]
    assert not figure.axes[0].texts and legend_of(figure)[1] == "validation loss: last and best 3.5000 at step 200"


def test_every_run_has_a_line_of_the_same_width_and_runs_with_one_schedule_share_it(tmp_path):
    same = [{"step": s, "lr": 1e-3, "tokens_per_second": v} for s, v in ((1, 5162.0), (2, 2500.0), (3, 2510.0))]
    other = [line | {"lr": 2e-3} for line in same]
    runs = [make_run(tmp_path / name, lines) for name, lines in (("a", same), ("b", other), ("c", same))]
    drawn = plots.run_figures(runs)
    assert legend_of(drawn["learning_rate"]) == ["a and 1 more", "b"]
    for name, gid, count in (("learning_rate", "lr", 2), ("throughput", "raw", 3), ("throughput", "median", 3)):
        lines = lines_of(drawn[name], gid)
        assert len(lines) == count and len({line.get_linewidth() for line in lines}) == 1
    assert drawn["throughput"].axes[0].get_ylim()[1] > 5162 and not lines_of(drawn["throughput"], "above")


def test_a_curve_of_few_points_is_shown_whole(tmp_path):
    run = make_run(tmp_path / "a", evaluations(range(0, 90, 10), [7.7, 4.6, 4.3, 4.0, 3.9, 3.8, 3.7, 3.6, 3.5]))
    figure = plots.run_figures([run])["validation_loss"]
    assert figure.axes[0].get_ylim()[1] > 7.7 and not lines_of(figure, "above")


def test_overlays_name_each_run_by_its_folder(tmp_path):
    one = make_run(tmp_path / "x" / "same_seed1", training([1, 2], [5.0, 4.0]) + evaluations([0, 2], [6.0, 4.5]))
    two = make_run(tmp_path / "y" / "same_seed1", training([1, 2], [5.5, 4.5]) + evaluations([0, 2], [6.0, 4.25]))
    other = make_run(
        tmp_path / "_o$t$her", training([1, 2], [5.0, 9.0]), result={"status": "diverged", "failed_at_step": 2}
    )
    drawn = plots.run_figures([one, two, other, RunDir(one.path)])  # the same run twice is one run
    figure = drawn["training_loss"]
    assert legend_of(figure) == [
        "x/same_seed1",
        "y/same_seed1",
        r" _o\$t\$her",
        r" _o\$t\$her diverged at step 2",
    ]
    curves = lines_of(figure, "raw")
    assert [line.get_ydata().tolist() for line in curves] == [[5.0, 4.0], [5.5, 4.5], [5.0, 9.0]]
    assert len({line.get_color() for line in curves}) == 3
    assert lines_of(figure, "diverged")[0].get_color() == curves[2].get_color()
    assert "y/same_seed1: last and best 4.2500 at step 2" in legend_of(drawn["validation_loss"])
    assert "x/same_seed1" in figure.axes[0].get_title(loc="left")


@pytest.mark.filterwarnings("error")
def test_characters_that_the_font_does_not_have_are_escapes(tmp_path):
    lines = training([1, 2], [5.0, 4.0])
    runs = [make_run(tmp_path / name, lines) for name in ("日本", "çé±€")]
    drawn = plots.run_figures(runs)
    assert legend_of(drawn["training_loss"]) == [r"\u65e5\u672c", "çé±€"]
    assert len(plots.draw(runs, tmp_path / "plots")) == 3


def test_short_names_are_as_short_as_they_can_be():
    paths = [Path("/r/s/a_seed0"), Path("/r/t/a_seed0"), Path("/r/s/b")]
    assert short_names(paths) == ["s/a_seed0", "t/a_seed0", "b"]


def test_the_token_axis_needs_runs_that_agree(tmp_path):
    one = make_run(tmp_path / "a", training([1, 2], [5.0, 4.0], per_step=512))
    two = make_run(tmp_path / "b", training([1, 2], [5.0, 4.0], per_step=1024))
    figure = plots.run_figures([one])["training_loss"]
    (above,) = figure.axes[0].child_axes
    figure.draw_without_rendering()
    np.testing.assert_allclose(above.get_xlim(), np.array(figure.axes[0].get_xlim()) * 512)
    assert not plots.run_figures([one, two])["training_loss"].axes[0].child_axes


def test_median_throughput_leaves_out_the_first_interval(tmp_path):
    run = make_run(tmp_path / "a", training([1, 2, 3, 4], [5.0] * 4, speeds=[10.0, 900.0, 1100.0, 1000.0]))
    figure = plots.run_figures([run])["throughput"]
    assert lines_of(figure, "median")[0].get_ydata() == [1000.0, 1000.0]
    assert "median 1K tokens/s, MFU 40.0%, first interval left out" in legend_of(figure)
    assert lines_of(figure, "raw")[0].get_ydata().tolist() == [10.0, 900.0, 1100.0, 1000.0]
    alone = make_run(tmp_path / "b", training([1], [5.0]))
    assert not lines_of(plots.run_figures([alone])["throughput"], "median")


def test_warmup_is_shaded_and_enlarged_when_it_is_short(tmp_path):
    lines = [{"step": s, "lr": 1e-3 * min(s / 20, 1)} for s in range(1, 1001)]
    figure = plots.run_figures([make_run(tmp_path / "a", lines, schedule__warmup_steps=20)])["learning_rate"]
    assert "warm-up, 20 steps" in legend_of(figure)
    (closer,) = figure.axes[0].child_axes
    assert closer.get_xlim() == (0, 40)
    wide = make_run(tmp_path / "b", lines, schedule__warmup_steps=500)
    assert not plots.run_figures([wide])["learning_rate"].axes[0].child_axes


def test_hellaswag_shows_chance_and_gpt2(tmp_path):
    lines = [{"step": s, "hellaswag_acc": 0.25 + s / 1e4, "hellaswag_acc_norm": 0.25 + s / 5e3} for s in (100, 200)]
    figure = plots.run_figures([make_run(tmp_path / "a", lines)])["hellaswag_accuracy"]
    assert {line.get_ydata()[0] for line in lines_of(figure, "reference")} == {0.25, 0.2955, 0.2859}
    assert lines_of(figure, "acc_norm")[0].get_ydata() == pytest.approx([0.27, 0.29])
    assert lines_of(figure, "acc")[0].get_ydata() == pytest.approx([0.26, 0.27])
    assert legend_of(figure) == ["last acc_norm 0.2900", "last acc 0.2700"]
    assert "token-normalised" in figure.legends[0].get_title().get_text()


@pytest.mark.parametrize("best", [0.27, 0.9])
def test_words_beside_an_axis_do_not_overlap(tmp_path, best):
    lines = [{"step": s, "hellaswag_acc": 0.25, "hellaswag_acc_norm": best} for s in (100, 200)]
    figure = plots.run_figures([make_run(tmp_path / "a", lines)])["hellaswag_accuracy"]
    figure.draw_without_rendering()
    boxes = sorted((text.get_window_extent() for text in figure.axes[0].texts), key=lambda box: box.y0)
    assert len(boxes) == 3 and all(below.y1 <= above.y0 for below, above in itertools.pairwise(boxes))


def test_hellaswag_by_the_harness_has_marks_of_its_own(tmp_path):
    lines = [{"step": s, "hellaswag_harness_acc": 0.26, "hellaswag_harness_acc_norm": 0.27} for s in (100, 200)]
    figure = plots.run_figures([make_run(tmp_path / "a", lines)])["hellaswag_accuracy"]
    assert {line.get_ydata()[0] for line in lines_of(figure, "reference")} == {0.25, 0.3114, 0.2892}
    assert lines_of(figure, "harness_acc_norm")[0].get_ydata() == pytest.approx([0.27, 0.27])
    assert "lm-eval" in figure.legends[0].get_title().get_text()


def test_what_is_missing_is_skipped(tmp_path):
    empty = make_run(tmp_path / "empty", [])
    assert plots.run_figures([]) == {} and plots.draw([empty], tmp_path / "none") == []
    assert not (tmp_path / "none").exists()
    nulls = make_run(tmp_path / "nulls", training([1, 2], [None, None], speeds=[None, None]))
    assert list(plots.run_figures([nulls, empty])) == ["learning_rate"]
    start = make_run(tmp_path / "start", evaluations([0], [6.0]))
    assert texts_of(plots.run_figures([start])["validation_loss"], "best") == ["last and best 6.0000 at step 0"]
    damaged = make_run(tmp_path / "damaged", [*training([1, 2], [5.0, 4.0]), '{"step": 3, "lo'])
    (damaged.path / "result.json").write_text("{", encoding="utf-8")
    (damaged.path / "recipe.toml").write_text("= no", encoding="utf-8")
    figure = plots.run_figures([damaged])["training_loss"]
    assert lines_of(figure, "raw")[0].get_xdata().tolist() == [1, 2]


def test_infinite_and_huge_losses_do_not_break_the_axes(tmp_path):
    losses = [3.0] * 97 + [1e30, float("inf"), float("nan")]
    figure = plots.run_figures([make_run(tmp_path / "a", training(range(1, 101), losses))])["training_loss"]
    assert figure.axes[0].get_ylim()[1] < 100
    assert [line.get_xdata().tolist() for line in lines_of(figure, "above")] == [[98]]
    assert [line.get_xdata().tolist() for line in lines_of(figure, "not finite")] == [[99, 100]]


@pytest.mark.parametrize(
    ("count", "says"), [(0, "0"), (768, "768"), (999.7, "1K"), (524288, "524K"), (999_700, "1M"), (1e10, "10B")]
)
def test_human_numbers(count, says):
    assert human(count) == says


def test_durations():
    assert [duration(s) for s in (3.14159, 61, 36184, 200000)] == ["3.14 s", "1 min 1 s", "10 h 3 min", "2 d 7 h"]


def test_importing_loads_neither_torch_nor_matplotlib():
    code = "import sys, gptlab.report.plots, gptlab.report.card; print({'torch', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
