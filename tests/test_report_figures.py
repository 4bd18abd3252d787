"""The figures say what the payload says: checked on the figures' artists, not on pixels."""

import itertools
import warnings
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Annotation, Text

from gptlab.report import figures as f


def make_arm(name, values=(), speed=None, memory=None, comparison=None, diverged=0, spread=0.02, frontier=None):
    n = len(values)
    mean = float(np.mean(values)) if n else None
    ends = (mean - spread, mean + spread) if n > 1 else (None, None)
    return {
        "name": name,
        "group": "core",
        "note": "",
        "settings": {},
        "planned": n + diverged,
        "statuses": {key: count for key, count in (("completed", n), ("diverged", diverged)) if count},
        "values": {str(seed): value for seed, value in enumerate(values)},
        "quality": {"n": n, "mean": mean, "sd": 0.01, "low": ends[0], "high": ends[1]} if n else None,
        "throughput": {"value": speed, "low": 0.9 * speed, "high": 1.1 * speed, "n": 3} if speed else None,
        "speedup": None,
        "memory_gb": {"mean": memory, "n": 1} if memory else None,
        "memory_ratio": None,
        "other": {},
        "frontier": frontier,
        "comparison": comparison,
    }


def make_run(arm, seed=0, val=(), train=(), status="completed", ended=None):
    points = {key: [list(point) for point in curve] for key, curve in (("train", train), ("val", val))}
    return {"arm": arm, "seed": seed, "status": status, "ended": ended, "folder": "", **points}


def make_study(arms, runs=(), means=None, name="precision", better="lower", margin=0.01, label="validation loss, nats"):
    return {
        "name": name,
        "description": "",
        "folder": "",
        "task": "lm",
        "unit": "tokens",
        "baseline": arms[0]["name"],
        "metric": {"key": "m", "label": label, "better": better, "margin": margin, "margin_from": "stated"},
        "seeds": [0],
        "most_seeds": None,
        "elsewhere": False,
        "paired": True,
        "groups": None,
        "runs_planned": 1,
        "runs_found": 1,
        "columns": [],
        "arms": arms,
        "failures": [],
        "runs": list(runs),
        "means": means or {},
        "questions": [],
        "recommendations": [],
        "provenance": {},
    }


def versus(mean, low=None, high=None, verdict="not resolved"):
    return {"verdict": verdict, "n": 3, "mean": mean, "low": low, "high": high}


def payload_of(*studies, across=None):
    return {"title": "t", "gptlab": "0", "command": "", "warnings": [], "studies": list(studies), "across": across}


def points(figure, gid, panel=0):
    """[[x, y], ...] of the lines of that name in a panel; NaN dropped."""
    (line,) = [line for line in figure.axes[panel].get_lines() if line.get_gid() == gid]
    xy = np.asarray(line.get_xydata())
    return xy[np.isfinite(xy).all(axis=1)].tolist()


def gids(figure, start, panel=0):
    return [line.get_gid() for line in figure.axes[panel].get_lines() if str(line.get_gid()).startswith(start)]


def text_of(figure, gid, panel=0):
    (text,) = [text for text in figure.axes[panel].texts if text.get_gid() == gid]
    return text


def legend_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def boxes_of(figure, texts):
    figure.draw_without_rendering()
    return [Text.get_window_extent(text) for text in texts]


def many_arms(n=19, seeds=3):
    """Arms as a precision study has them: a slow baseline, a crowd, one that diverges; runs with 21 evaluations."""
    rng = np.random.default_rng(0)
    arms, runs, means = [], [], {}
    for i in range(n):
        name = f"arm_number_{i}_with_a_name"
        level, speed = 3.3 + 0.04 * rng.random(), 60_000 + 12_000 * rng.random() if i else 18_000.0
        steps = np.arange(0, 10_001, 500)
        curves = [level + 7 * np.exp(-steps / 700) + 0.002 * rng.random() for _ in range(seeds)]
        runs += [make_run(name, s, val=zip(steps.tolist(), c.tolist(), strict=True)) for s, c in enumerate(curves)]
        means[name] = {
            "train": [],
            "val": [list(p) for p in zip(steps.tolist(), np.mean(curves, 0).tolist(), strict=True)],
        }
        comparison = versus(level - 3.32, level - 3.33, level - 3.31) if i else None
        arms.append(make_arm(name, [c[-1] for c in curves], speed, 20 + 10 * rng.random(), comparison))
    arms.append(make_arm("broken", (), None, None, versus(None, verdict="diverges"), diverged=1))
    runs.append(make_run("broken", 0, val=[(0, 10.3), (500, 9e4)], status="diverged", ended=700))
    return make_study(arms, runs, means)


# -- loss curves


def test_runs_and_means_are_drawn_where_the_payload_has_them_and_losses_that_were_not_finite_are_not():
    a = make_run("a", 0, val=[(0, 5.0), (10, 4.0), (20, 3.0)])
    b = make_run("a", 1, val=[(0, 5.2), (10, None), (20, 3.2)])
    mean = [[0, 5.1], [10, 4.0], [20, 3.1]]
    figure = f.loss_curves(make_study([make_arm("a", (3.0, 3.2))], [a, b], {"a": {"train": [], "val": mean}}))
    assert points(figure, "run a 0") == a["val"]
    assert points(figure, "run a 1") == [[0, 5.2], [20, 3.2]]
    assert points(figure, "mean a") == mean == points(figure, "late mean a", panel=1)
    assert figure.axes[0].get_ylabel() == "validation loss, nats (lower is better)"
    assert "a run diverged here" not in legend_of(figure)
    low, high = figure.axes[1].get_ylim()
    assert 2.9 < low < 3.0 and 4.0 < high < 5.0  # the last two evaluations fill the enlarged panel


def test_a_diverged_run_is_marked_where_it_diverged_and_does_not_set_the_scale():
    good = make_run("a", 0, val=[(0, 5.0), (10, 4.0), (20, 3.0)])
    seen = make_run("b", 0, val=[(0, 4.9), (10, 1e6), (20, 1e9)], status="diverged", ended=4)
    high = make_run("b", 1, val=[(0, 4.9), (10, 1e6)], status="diverged", ended=12)
    never = make_run("b", 2, val=[(0, None)], status="diverged", ended=1)
    study = make_study([make_arm("a", (3.0,)), make_arm("b", diverged=3)], [good, seen, high, never])
    figure = f.loss_curves(study)
    top = figure.axes[0].get_ylim()[1]
    assert top < 5.5
    assert points(figure, "diverged b 0") == [[4, 4.9]]
    assert points(figure, "diverged b 1") == [[12, top]] and points(figure, "diverged b 2") == [[1, top]]
    assert "a run diverged here" in legend_of(figure)
    assert text_of(figure, "name b", panel=-1).get_text() == "b, 3 of 3 diverged"


def test_where_all_runs_diverged_the_scale_is_theirs():
    run = make_run("a", 0, train=[(1, 5.0), (2, 7.0), (3, None)], status="diverged", ended=3)
    figure = f.loss_curves(make_study([make_arm("a", diverged=1)], [run]))
    assert len(figure.axes) == 1 and figure.axes[0].get_ylim()[1] > 7
    assert points(figure, "run a 0") == [[1, 5.0], [2, 7.0]] and points(figure, "diverged a 0") == [[3, 7.0]]


def test_training_losses_are_drawn_smoothed_where_evaluations_are_too_few():
    rng = np.random.default_rng(0)
    noisy = [(step, 3 + float(rng.normal())) for step in range(1, 501)]
    run = make_run("a", 0, val=[(0, 9.0), (500, 3.0)], train=noisy)
    figure = f.loss_curves(make_study([make_arm("a", (3.0,))], [run]))
    assert figure.axes[0].get_ylabel().startswith("training loss, nats")
    drawn = np.array(points(figure, "mean a"))  # one run is its own mean
    assert drawn[0, 0] == 1 and drawn[-1, 0] == 500
    assert drawn[:, 1].std() < 0.5 and abs(drawn[:, 1].mean() - 3) < 0.2
    assert "Hann window" in figure.legends[0].get_title().get_text()
    few = make_run("a", 0, val=[(0, 9.0)], train=noisy[:5])
    figure = f.loss_curves(make_study([make_arm("a", (3.0,))], [few]))
    assert points(figure, "run a 0") == [list(point) for point in noisy[:5]]


def test_nineteen_arms_are_named_in_the_order_in_which_they_end_and_no_two_look_alike():
    study = many_arms()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = f.loss_curves(study)
        figure.draw_without_rendering()
    texts = [text for text in figure.axes[1].texts if str(text.get_gid()).startswith("name ")]
    assert len(texts) == 20
    height = {text.get_gid().removeprefix("name "): text.get_position()[1] for text in texts}
    ends = {arm["name"]: arm["quality"]["mean"] for arm in study["arms"] if arm["quality"]}
    assert sorted(ends, key=ends.get) == sorted(ends, key=height.get)
    assert max(height, key=height.get) == "broken"
    boxes = sorted(boxes_of(figure, texts), key=lambda box: box.y0)
    assert all(above.y0 >= below.y1 - 1 for below, above in itertools.pairwise(boxes))
    assert boxes[0].y0 > 0 and max(box.x1 for box in boxes) <= figure.bbox.x1 + 1
    means = [line for line in figure.axes[0].get_lines() if str(line.get_gid()).startswith("mean ")]
    assert len({(line.get_color(), line.get_linestyle()) for line in means}) == 19


def test_an_arm_far_above_the_others_does_not_flatten_the_enlarged_panel():
    levels = [3.0, 3.01, 3.02, 3.03, 3.04, 3.05, 9.0]
    runs = [make_run(f"a{i}", 0, val=[(0, 11.0), (50, x + 0.1), (100, x)]) for i, x in enumerate(levels)]
    figure = f.loss_curves(make_study([make_arm(f"a{i}", (x,)) for i, x in enumerate(levels)], runs))
    assert figure.axes[1].get_ylim()[1] < 3.3 < figure.axes[0].get_ylim()[1]


# -- the frontier


def beaten(i, xs, ys):
    """The definition, one pair at a time; higher is better."""
    return any(xs[j] >= xs[i] and ys[j] >= ys[i] and (xs[j] > xs[i] or ys[j] > ys[i]) for j in range(len(xs)) if j != i)


def test_the_frontier_is_what_no_other_point_beats():
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 8, 20):
        for _ in range(40):
            xs, ys = rng.integers(0, 6, n).astype(float), rng.integers(0, 6, n).astype(float)  # with many ties
            assert f.pareto(xs, ys).tolist() == [not beaten(i, xs, ys) for i in range(n)]


@pytest.mark.parametrize("better", ["lower", "higher"])
def test_the_frontier_drawn_goes_through_its_points_and_leaves_out_arms_that_diverged(better):
    rng = np.random.default_rng(1)
    speeds, losses = rng.uniform(10, 99, 12), rng.uniform(3, 4, 12)
    arms = [make_arm(f"a{i}", (y,), float(x)) for i, (x, y) in enumerate(zip(speeds, losses, strict=True))]
    arms.append(make_arm("mad", (2.9 if better == "lower" else 4.1,), 200.0, diverged=2))
    figure = f.tradeoff(make_study(arms, better=better), "quality")
    sign = -1 if better == "lower" else 1
    best = {i for i in range(12) if not beaten(i, speeds, sign * losses)}
    line = points(figure, "frontier")
    (left, _), (bottom, top) = figure.axes[0].get_xlim(), figure.axes[0].get_ylim()
    inner = sorted((float(speeds[i]), float(losses[i])) for i in best)
    edge = top if better == "lower" else bottom
    assert line == [[left, inner[0][1]], *map(list, inner), [inner[-1][0], edge]]
    blue = [i for i in range(12) if to_hex(_marker(figure, f"point a{i}").get_color()).upper() == f.BLUE]
    assert set(blue) == best
    assert _marker(figure, "point mad").get_marker() == "X"
    assert "mad (2 of 3 diverged)" in [text.get_text() for text in figure.axes[0].texts]


def _marker(figure, gid):
    (line,) = [line for line in figure.axes[0].get_lines() if line.get_gid() == gid]
    return line


def test_points_and_intervals_of_speed_and_quality_are_the_payload_s_and_what_is_unknown_is_not_drawn():
    arms = [make_arm("a", (3.0, 3.1), 1000.0, frontier=0.97), make_arm("b", (2.9,), 500.0), make_arm("c", (2.8,))]
    figure = f.tradeoff(make_study(arms), "quality")
    mean = arms[0]["quality"]["mean"]
    assert points(figure, "point a") == [[1000.0, mean]] and points(figure, "point b") == [[500.0, 2.9]]
    assert points(figure, "x a") == [[900.0, mean], [1100.0, mean]]
    assert points(figure, "y a") == [[1000.0, arms[0]["quality"]["low"]], [1000.0, arms[0]["quality"]["high"]]]
    assert points(figure, "y b") == [] and gids(figure, "point") == ["point a", "point b"]  # c's speed is not known
    axes = figure.axes[0]
    assert axes.get_xlabel() == "tokens per second (higher is better)"
    assert axes.get_ylabel() == "validation loss, nats (lower is better)"
    assert [text.get_text() for text in axes.texts] == ["a 97%", "b"]


def test_memory_has_its_own_frontier():
    arms = [make_arm("a", (3.0,), 100.0, 40.0), make_arm("b", (3.5,), 90.0, 20.0), make_arm("c", (2.0,), 80.0, 30.0)]
    figure = f.tradeoff(make_study(arms), "memory_gb")
    assert figure.axes[0].get_ylabel() == "peak memory, GB (lower is better)"
    assert points(figure, "frontier")[1:-1] == [[90.0, 20.0], [100.0, 40.0]]


def test_what_an_allocator_adds_does_not_fill_an_axis():
    arms = [make_arm("a", (3.0,), 100.0, 0.3617), make_arm("b", (3.1,), 100.5, 0.3622)]
    axes = f.tradeoff(make_study(arms), "memory_gb").axes[0]
    for (low, high), value in ((axes.get_ylim(), 0.362), (axes.get_xlim(), 100.0)):
        assert high - low > 0.1 * value and low < 0.97 * value and high > 1.03 * value


def test_a_quality_far_out_is_marked_on_the_edge_with_its_value():
    arms = [make_arm(f"a{i}", (3 + i / 100,), 100.0 + i) for i in range(8)] + [make_arm("far", (9.1234,), 100.5)]
    figure = f.tradeoff(make_study(arms), "quality")
    top = figure.axes[0].get_ylim()[1]
    assert top < 3.5 and points(figure, "point far") == [[100.5, top]]
    assert "far (9.123)" in [text.get_text() for text in figure.axes[0].texts]


def test_labels_cover_neither_each_other_nor_points_and_stay_in_the_frame():
    figure = f.tradeoff(many_arms(), "quality")
    labels = [text for text in figure.axes[0].texts if isinstance(text, Annotation)]
    assert len(labels) == 19
    boxes = boxes_of(figure, labels)
    for a, b in itertools.combinations(boxes, 2):
        assert min(a.x1, b.x1) - max(a.x0, b.x0) < 1 or min(a.y1, b.y1) - max(a.y0, b.y0) < 1
    at = figure.axes[0].transData.transform([label.xy for label in labels])
    assert not any(box.contains(x, y) for box in boxes for x, y in at)
    frame = figure.axes[0].bbox
    assert all(box.x0 >= frame.x0 - 3 and box.x1 <= frame.x1 + 3 for box in boxes)


# -- differences


def test_the_forest_has_each_arm_s_difference_interval_and_seeds_in_the_study_s_order():
    arms = [
        make_arm("base", (3.0, 3.1)),
        make_arm("z", (3.2, 3.2), comparison=versus(0.15, 0.05, 0.25, "worse")),
        make_arm("a", (2.9, 3.0), comparison=versus(-0.1, -0.15, -0.05, "better")),
        make_arm("one", (3.05,), comparison=versus(0.05)),
        make_arm("mad", (9.0,), comparison=versus(6.0, -9.0, 21.0, "diverges"), diverged=2),
    ]
    figure = f.paired_differences(make_study(arms))
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["z", "a", "one", "mad"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first arm on top
    assert points(figure, "mean z") == [[0.15, 0]] and points(figure, "interval z") == [[0.05, 0], [0.25, 0]]
    assert points(figure, "mean one") == [[0.05, 2]] and points(figure, "interval one") == []
    np.testing.assert_allclose(points(figure, "seeds z"), [[0.2, 0], [0.1, 0]])
    assert points(figure, "mean mad") == points(figure, "interval mad") == points(figure, "seeds mad") == []
    assert text_of(figure, "numbers z").get_text() == "+0.150 [0.050, 0.250]"
    assert (
        text_of(figure, "verdict z").get_text() == "worse" and text_of(figure, "verdict mad").get_text() == "diverges"
    )
    assert text_of(figure, "numbers mad").get_text() == "2 of 3 diverged"
    (band,) = [patch for patch in axes.patches if patch.get_gid() == "margin"]
    assert (band.get_x(), band.get_x() + band.get_width()) == (-0.01, 0.01)
    left, right = axes.get_xlim()
    assert left < -0.15 and 0.25 < right < 1
    assert (axes.get_title("left"), axes.get_title("right")) == ("← better", "worse →")
    colors = {_marker(figure, f"mean {name}").get_color() for name in ("z", "a", "one")}
    assert len(colors) == 3 and len({_marker(figure, f"mean {name}").get_marker() for name in ("z", "a")}) == 2


def test_where_higher_is_better_the_forest_s_sides_are_swapped_and_without_a_margin_there_is_no_band():
    arms = [make_arm("base", (0.7,)), make_arm("a", (0.8,), comparison=versus(0.1))]
    figure = f.paired_differences(make_study(arms, better="higher", margin=0.0, label="micro-F1"))
    assert (figure.axes[0].get_title("left"), figure.axes[0].get_title("right")) == ("← worse", "better →")
    assert not figure.axes[0].patches and not any("margin" in text for text in legend_of(figure))


def test_an_interval_too_wide_for_the_forest_ends_in_an_arrow():
    arms = [make_arm("base", (3.0, 3.1, 3.2))]
    arms += [make_arm(f"a{i}", (3.0, 3.1, 3.2), comparison=versus(0.02, -0.01, 0.05)) for i in range(6)]
    arms.append(make_arm("two", (3.0, 3.1), comparison=versus(0.01, -5.0, 5.02)))
    figure = f.paired_differences(make_study(arms))
    left, right = figure.axes[0].get_xlim()
    assert -0.1 < left < -0.01 and 0.05 < right < 0.1
    assert gids(figure, "beyond") == ["beyond two", "beyond two"]
    assert text_of(figure, "numbers two").get_text() == "+0.010 [-5.000, 5.020]"


# -- ranks


def test_the_slope_chart_joins_the_ranks_and_sets_flips_apart():
    ranks = [
        ("a", [1, 3], True),
        ("b", [2, 1], True),
        ("c", [3, 2], False),
        ("d", [4, 4], False),
        ("e", [4, None], False),
    ]
    across = {
        "name": "cmp",
        "studies": ["lm", "cls"],
        "ranking": {"tau": 0.3, "text": "tau 0.3 of $5"},
        "flips": [],
        "ranks": [{"arm": arm, "ranks": at, "flip": flip} for arm, at, flip in ranks],
        "questions": [],
        "recommendations": [],
    }
    figure = f.rank_slopes(across)
    assert points(figure, "ranks a") == [[0, 1], [1, 3]] and points(figure, "ranks e") == [[0, 4]]
    wide = {gid for gid in gids(figure, "ranks") if _marker(figure, gid).get_linewidth() > 2}
    assert wide == {"ranks a", "ranks b"} and len({_marker(figure, gid).get_color() for gid in wide}) == 1
    assert text_of(figure, "right a").get_text() == "a  1" and text_of(figure, "left a").get_text() == "3  a"
    tied = [text_of(figure, f"right {arm}").get_position()[1] for arm in "de"]
    assert abs(tied[0] - tied[1]) > 0.7  # the labels of a tie stand apart
    assert [text for text in figure.axes[0].texts if text.get_gid() == "left e"] == []
    assert figure.axes[0].get_ylim()[0] > figure.axes[0].get_ylim()[1]
    assert f.rank_slopes(across | {"ranks": []}) is None


# -- names, files, and what is not there


HOSTILE = [
    "$x_1$",
    "_under $",
    "<b>&amp;\"'",
    "two\nlines\x1b[31m",
    "long_" * 30 + "a",
    "long_" * 30 + "b",
    "\\frac{1}",
    "=",
]


def test_any_name_is_text_in_every_figure_and_svg_keeps_it_as_text(tmp_path):
    arms = [make_arm(HOSTILE[0], (3.0, 3.1), 50.0, 4.0)]
    for i, name in enumerate(HOSTILE[1:]):
        arms.append(make_arm(name, (3.0 + i / 50, 3.1), 60.0 + i, 5.0 + i, versus(0.01 * i, -0.1, 0.1)))
    runs = [make_run(name, 0, val=[(0, 9.0), (5, 4.0), (9, 3.0)]) for name in HOSTILE]
    ranks = [{"arm": name, "ranks": [i, 8 - i], "flip": False} for i, name in enumerate(HOSTILE)]
    across = {"name": "$a", "studies": ["$l$", "$l$"], "ranking": {"text": "$t$"}, "ranks": ranks}
    payload = payload_of(make_study(arms, runs, name="$s$/<i>"), across=across)
    files = f.draw_report(payload, tmp_path / "a", ("svg",))
    assert [file.name for file in files] == [
        "s-i-loss-curves.svg",
        "s-i-throughput-quality.svg",
        "s-i-throughput-memory.svg",
        "s-i-differences.svg",
        "ranking.svg",
    ]
    for file in files:
        source = file.read_text(encoding="utf-8")
        shown = [text.text for text in ElementTree.fromstring(source).iter("{http://www.w3.org/2000/svg}text")]
        everything = " ".join(filter(None, shown))
        for name in ("$x_1$", "_under $", "<b>&amp;\"'", "two lines?[31m", "\\frac{1}"):
            assert name in everything, (file.name, name)
        assert "<dc:date>" not in source
    (again,) = f.draw_report(payload_of(across=across), tmp_path / "b", ("svg",))
    assert again.read_bytes() == files[-1].read_bytes()


def test_long_names_lose_their_middle_unless_that_makes_two_alike():
    assert f.short_labels(["a" * 50])["a" * 50] == "a" * 17 + "…" + "a" * 16
    labels = f.short_labels(HOSTILE)
    assert len(set(labels.values())) == len(HOSTILE)
    inside = ["x" * 20 + middle + "y" * 30 for middle in "ab"]
    assert sorted(f.short_labels(inside).values()) == sorted(inside)


def test_what_nothing_is_known_for_is_left_out():
    bare = make_study([make_arm("a"), make_arm("b", comparison=versus(None))])
    assert f.report_figures(payload_of(bare)) == {}
    one = make_study([make_arm("a", (3.0,))], [make_run("a", 0, val=[(0, 3.0)], train=[(1, 3.0)])])
    assert list(f.report_figures(payload_of(one))) == ["precision-loss-curves"]
    dead = [
        make_arm("a", speed=5.0, memory=1.0, diverged=1),
        make_arm("b", comparison=versus(None, verdict="diverges")),
    ]
    runs = [
        make_run("a", 0, train=[(1, 4.0), (2, None)], status="diverged", ended=2),
        make_run("b", 0, status="failed"),
    ]
    drawn = f.report_figures(payload_of(make_study(dead, runs)))
    assert list(drawn) == ["precision-loss-curves", "precision-throughput-memory"]
    assert gids(drawn["precision-throughput-memory"], "frontier") == []


def test_a_letter_that_no_font_has_is_no_warning(tmp_path):
    arms = [make_arm("a", (3.0,), 5.0, 1.0), make_arm("\u30a2", (3.0002,), 9.0, 1.0, versus(0.0002))]
    runs = [make_run(name, 0, val=[(0, 9.0), (5, 4.0)]) for name in ("a", "\u30a2")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        f.draw_report(payload_of(make_study(arms, runs)), tmp_path)


def test_one_seed_of_two_arms_makes_every_figure_and_png_files_are_png(tmp_path):
    runs = [make_run(name, 0, val=[(0, 9.0), (5, 4.0), (9, 3.0)]) for name in "ab"]
    arms = [make_arm("a", (3.0,), 5.0, 1.0), make_arm("b", (3.0002,), 9.0, 1.0, versus(0.0002))]
    study = make_study(arms, runs, name="s")
    drawn = f.report_figures(payload_of(study))
    assert list(drawn) == ["s-loss-curves", "s-throughput-quality", "s-throughput-memory", "s-differences"]
    low, high = drawn["s-throughput-quality"].axes[0].get_ylim()
    assert high - low > 0.03  # 0.0002 of a margin of 0.01 is drawn as the little that it is
    (file,) = f.draw_report(payload_of(make_study(arms[:1], runs[:1])), tmp_path / "x" / "y")[:1]
    assert file.name == "precision-loss-curves.png" and file.read_bytes().startswith(b"\x89PNG")


def test_spreading_moves_labels_no_further_than_it_must():
    free = np.array([0.1, 0.9, 0.5])
    np.testing.assert_allclose(f.spread_out(free, 0.1, 0.0, 1.0), free)
    np.testing.assert_allclose(f.spread_out(np.array([0.5, 0.5, 0.0]), 0.2, 0.0, 1.0), [0.4, 0.6, 0.0])
    np.testing.assert_allclose(f.spread_out(np.array([1.0, 1.0]), 0.2, 0.0, 1.0), [0.8, 1.0])
    tight = f.spread_out(np.zeros(30), 0.2, 0.0, 1.0)
    np.testing.assert_allclose(tight, np.linspace(0, 1, 30), atol=1e-12)
    assert f.spread_out(np.array([0.3]), 0.2, 0.0, 1.0).tolist() == [0.3]


def test_of_very_many_arms_a_figure_names_those_that_a_reader_looks_for():
    study = many_arms(70)
    study["recommendations"] = [{"id": "overall", "text": "", "evidence": ["arm_number_50_with_a_name"]}]
    order = sorted(study["arms"][:-1], key=lambda arm: arm["quality"]["mean"])
    wanted = {arm["name"] for arm in (*order[:24], *order[-15:])}
    wanted |= {study["baseline"], "arm_number_50_with_a_name"}
    curves = f.loss_curves(study)
    named = {one[5:] for text in curves.axes[-1].texts if (one := str(text.get_gid())).startswith("name ")}
    assert named == wanted and len(gids(curves, "run ")) == 3 * len(wanted)
    (others,) = [one for one in curves.axes[0].collections if one.get_gid() == "others"]
    assert len(others.get_segments()) + len(gids(curves, "run ")) == len(study["runs"])
    assert points(curves, "others diverged") == [[700, curves.axes[0].get_ylim()[1]]]  # of the arm called broken
    labels = f.short_labels(arm["name"] for arm in study["arms"])
    forest = f.paired_differences(study)
    rows = [label.get_text() for label in forest.axes[0].get_yticklabels()]
    assert rows == [labels[arm["name"]] for arm in study["arms"] if arm["name"] in wanted - {study["baseline"]}]
    speed = f.tradeoff(study, "quality")
    assert len([text for text in speed.axes[0].texts if text.get_text()]) < 60
    drawn = [line for line in speed.axes[0].get_lines() if str(line.get_gid()).startswith(("others", "point "))]
    assert sum(len(line.get_xdata()) for line in drawn) == 70
    for figure in (curves, forest, speed):
        assert "71 arms: the baseline, the 24 best, the 15 worst" in figure.legends[0].get_title().get_text()
        assert figure.get_figheight() < 20
    study["runs"].pop()  # the one that diverged
    curves = f.loss_curves(study)
    curves.draw_without_rendering()
    assert not gids(curves, "others") and curves.axes[0].bbox.width > 200  # what is not there takes no room
