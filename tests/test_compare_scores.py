"""`gptlab compare-scores`: two models document by document, from files that lm-eval, gptlab and others write."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from test_cli import call

from gptlab.errors import DataError, UserError
from gptlab.report.scores import NOT_THE_METHODS, better_of, compare_scores, mcnemar, read_scores


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def samples(acc: list[int], prompt: str = "p") -> list[dict[str, Any]]:
    """Rows as lm-eval 0.4.13 writes them."""
    return [
        {
            "doc_id": i,
            "doc": {"activity": "x", "question": f"Who is\n number {i}?", "choices": ["a", "b"]},
            "target": "0",
            "resps": [[["-1.0", "False"]]],
            "filtered_resps": [["-1.0", "False"]],
            "filter": "none",
            "metrics": ["acc", "acc_norm"],
            "doc_hash": f"hash{i}",
            "prompt_hash": f"{prompt}{i}",
            "target_hash": "t",
            "acc": float(right),
            "acc_norm": float(right),
        }
        for i, right in enumerate(acc)
    ]


def random_scores(n: int, share: float, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [int(draw.random() < share) for _ in range(n)]


# -- the statistics -------------------------------------------------------------------------------------------------


def test_the_numbers_of_right_and_wrong(tmp_path: Path) -> None:
    a, b = random_scores(300, 0.4, 0), random_scores(300, 0.7, 1)
    report = compare_scores([write(tmp_path / "a", samples(a)), write(tmp_path / "b", samples(b))])
    (row,) = report["comparisons"]
    x, y = np.array(a), np.array(b)
    assert row["signs"] == {
        "both_right": int((x & y).sum()),
        "a_only": int((y > x).sum()),
        "b_only": int((x > y).sum()),
        "both_wrong": int((1 - (x | y)).sum()),
    }
    assert row["difference"] == pytest.approx((y - x).mean()) and row["mean_a"] == pytest.approx(y.mean())
    n, k = int((x != y).sum()), int((y > x).sum())
    assert row["p"] == pytest.approx(stats.binomtest(k, n).pvalue, rel=1e-9)
    assert row["verdict"] == "better" and row["low"] > 0 and row["p"] < 0.05
    se = (y - x).std(ddof=1) / np.sqrt(300)
    assert (row["low"], row["high"]) == pytest.approx(
        (row["difference"] - 1.96 * se, row["difference"] + 1.96 * se), abs=0.02
    )
    assert [arm["arm"] for arm in report["arms"]] == [row["b"], row["a"]] and report["metric"] == "acc_norm"
    turned = compare_scores([tmp_path / "b", tmp_path / "a"])["comparisons"][0]
    assert turned["verdict"] == "worse" and turned["p"] == row["p"]
    assert turned["difference"] == pytest.approx(-row["difference"])


def test_the_documents_that_moved_most_are_named(tmp_path: Path) -> None:
    base = [{"id": f"d{i}", "text": f"document {i}", "loss": 3.0} for i in range(40)]
    other = [row | {"loss": 3.0 + (i - 20) / 100} for i, row in enumerate(base)]
    report = compare_scores([write(tmp_path / "a", base), write(tmp_path / "b", other)], top=2)
    (row,) = report["comparisons"]
    assert report["better"] == "lower"
    assert [moved["id"] for moved in row["moved"]] == ["d0", "d1", "d39", "d38"]
    assert row["moved"][0] == {
        "id": "d0", "a": 2.8, "b": 3.0, "difference": pytest.approx(-0.2), "text": "document 0"
    }  # fmt: skip
    assert row["signs"] == {"a_better": 20, "b_better": 19, "equal": 1}


def test_several_models_pay_for_their_number(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{k}", samples(random_scores(200, 0.5, k))) for k in range(4)]
    alone = compare_scores(files[:2])["comparisons"][0]
    among = compare_scores(files)["comparisons"]
    assert [row["b"] for row in among] == [str(files[0])] * 3
    assert among[0]["p"] == alone["p"] and among[0]["p_adjusted"] == min(1, 3 * alone["p"])
    assert among[0]["high"] - among[0]["low"] > 1.1 * (alone["high"] - alone["low"])
    assert among[0]["level"] == pytest.approx(1 - 0.05 / 3)


def verdicts(n: int, draws: int, draw: Any, tmp_path: Path) -> float:
    """The share of comparisons of models that do not differ in which one is called better."""
    wrong = 0
    for k in range(draws):
        first, other = draw(k, n)
        files = [
            write(tmp_path / name, [{"id": i, "score": x} for i, x in enumerate(values)])
            for name, values in (("a", first), ("b", other))
        ]
        wrong += compare_scores(files)["comparisons"][0]["verdict"] != "not resolved"
    return wrong / draws


def right_or_wrong(k: int, n: int) -> tuple[list[float], list[float]]:
    rng = np.random.default_rng(k)
    ease = rng.random(n)  # the same documents are hard for both
    return tuple((rng.random(n) < ease).astype(float).tolist() for _ in range(2))  # type: ignore[return-value]


def heavy(k: int, n: int) -> tuple[list[float], list[float]]:
    rng = np.random.default_rng(k)
    ease = rng.normal(3, 1, n)
    return ease.tolist(), (ease + rng.standard_t(3, n)).tolist()


@pytest.mark.parametrize(("n", "draw"), [(40, right_or_wrong), (40, heavy)], ids=["right or wrong", "heavy tails"])
def test_equal_models_are_seldom_called_different(tmp_path: Path, n: int, draw: Any) -> None:
    assert verdicts(n, 25, draw, tmp_path) <= 0.16


@pytest.mark.slow
@pytest.mark.parametrize("n", [20, 60, 200])
@pytest.mark.parametrize("draw", [right_or_wrong, heavy], ids=["right or wrong", "heavy tails"])
def test_equal_models_are_called_different_in_five_percent(tmp_path: Path, n: int, draw: Any) -> None:
    assert verdicts(n, 1000, draw, tmp_path) <= 0.05 + 2 * 0.007


def test_mcnemar_is_the_sign_test() -> None:
    for k, n in ((0, 0), (0, 5), (3, 9), (7, 7), (40, 100)):
        assert mcnemar(k, n - k) == pytest.approx(stats.binomtest(k, n).pvalue if n else 1.0)


def test_few_documents_have_no_interval_but_mcnemar_s_p(tmp_path: Path) -> None:
    files = [write(tmp_path / name, samples([right] * 10)) for name, right in (("a", 0), ("b", 1))]
    (row,) = compare_scores(files)["comparisons"]
    assert row["low"] is None and row["p"] == pytest.approx(2 / 2**10) and row["verdict"] == "better"
    losses = [write(tmp_path / name, [{"id": i, "loss": x + i} for i in range(10)]) for name, x in (("c", 0), ("d", 1))]
    (row,) = compare_scores(losses)["comparisons"]
    assert (row["low"], row["p"], row["verdict"]) == (None, None, "not resolved")


# -- which documents ------------------------------------------------------------------------------------------------


def test_documents_are_matched_and_what_is_left_out_is_said(tmp_path: Path) -> None:
    first, other = samples([1] * 40), samples([0] * 40)
    random.Random(0).shuffle(other)  # another order
    other = [row for row in other if row["doc_id"] != 3]  # missing
    next(row for row in other if row["doc_id"] == 5)["doc_hash"] = "changed"
    again = next(row for row in other if row["doc_id"] == 7)
    other += [again, next(row for row in other if row["doc_id"] == 8) | {"acc_norm": 1.0}]
    first += samples([1] * 41)[40:]
    report = compare_scores([write(tmp_path / "a", first), write(tmp_path / "b", other)])
    (row,) = report["comparisons"]
    assert row["n"] == 41 - 4 - 0 and row["signs"]["b_only"] == 37  # without 3, 5, 8 and 40
    told = "\n".join(report["warnings"])
    a, b = tmp_path / "a", tmp_path / "b"
    assert f"1 row of {b} left out: a document twice, with one score" in told
    assert f"1 document of {b} left out, there with several scores: 8" in told
    assert "1 document with one id and other content left out: 5" in told
    assert f"3 documents of {a} left out, not in {b}: 3, 8, 40" in told


def test_other_prompts_and_missing_scores_are_said(tmp_path: Path) -> None:
    other = samples([1, 0] * 20, prompt="q")
    other[0]["acc_norm"] = None
    report = compare_scores([write(tmp_path / "a", samples([1] * 40)), write(tmp_path / "b", other)])
    assert report["comparisons"][0]["n"] == 39
    assert report["warnings"] == [
        "1 document left out: no acc_norm in one of the files",
        "the prompts of 39 documents differ: other examples, another template or instruction",
    ]


def test_without_hashes_on_one_side_the_id_alone_counts(tmp_path: Path) -> None:
    table = write(tmp_path / "b", [{"doc_id": i, "acc": i % 2 == 0} for i in range(30)])
    report = compare_scores([write(tmp_path / "a", samples([1] * 30)), table])
    assert report["comparisons"][0]["signs"]["b_only"] == 15 and report["metric"] == "acc"
    assert any("matched by id alone" in said for said in report["warnings"])


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"id": "z", "score": 1}], "no document in common: are they of one test set?"),
        ([{"id": i, "grade": 1} for i in range(3)], "no metric in common: .*a has score; .*b has grade"),
        ([{"id": i, "x": 1, "y": 2} for i in range(3)], "no metric in common"),
        ([{"score": 1}, {"score": 2}], "no column that tells documents apart: call one id"),
        ([{"id": 1, "name": "x"}, {"id": 2, "name": "x"}], "b has no score"),
        ([], "b has no rows"),
    ],
    ids=["other documents", "other metric", "two others", "no id", "no score", "empty"],
)
def test_what_cannot_be_compared_is_said(tmp_path: Path, rows: list[dict[str, Any]], says: str) -> None:
    first = write(tmp_path / "a", [{"id": i, "score": i % 2} for i in range(30)])
    with pytest.raises(UserError, match=says):
        compare_scores([first, write(tmp_path / "b", rows)])


def test_damage_is_said_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    for text, says in (
        ('{"id": 1, "score": 1}\n{"id": 2, "sc', "line 2 is not JSON lines"),
        ("[1]\n", "an object was"),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=says):
            read_scores(file)
    with pytest.raises(DataError, match="there is no file"):
        read_scores(tmp_path / "none")
    with pytest.raises(UserError, match="is a folder"):
        read_scores(tmp_path)


# -- which score ----------------------------------------------------------------------------------------------------


def test_filters_are_metrics_of_their_own(tmp_path: Path) -> None:
    rows = []
    for i in range(30):
        for chosen in ("strict", "loose"):
            one = samples([0])[0] | {"doc_id": i, "doc_hash": str(i), "filter": chosen, "metrics": ["exact_match"]}
            rows.append(one | {"exact_match": float(chosen == "loose")})
    a, b = write(tmp_path / "a", rows), write(tmp_path / "b", rows)
    assert read_scores(a).metrics == ["exact_match,strict", "exact_match,loose"] and len(read_scores(a).rows) == 30
    report = compare_scores([a, b], "exact_match,loose")
    assert report["comparisons"][0]["signs"]["both_right"] == 30
    assert compare_scores([a, b])["metric"] == "exact_match,strict"
    with pytest.raises(UserError, match="has no metric acc: it has exact_match,strict"):
        compare_scores([a, b], "acc")


def test_older_samples_name_no_metrics_and_pairs_are_no_scores(tmp_path: Path) -> None:
    rows = [{key: row[key] for key in row if key != "metrics"} for row in samples([1, 0] * 15)]
    read = read_scores(write(tmp_path / "a", [row | {"word_perplexity": [-3.0, 4]} for row in rows]))
    assert read.metrics == ["acc", "acc_norm"]
    assert read.remarks == ["word_perplexity left out: no number for each document"]


def test_the_direction_is_guessed_by_the_name(tmp_path: Path) -> None:
    rows = [{**row, "metrics": ["perplexity"], "perplexity": -float(i)} for i, row in enumerate(samples([1] * 30))]
    a, b = (
        write(tmp_path / "a", rows),
        write(tmp_path / "b", [row | {"perplexity": -3 - i} for i, row in enumerate(rows)]),
    )
    report = compare_scores([a, b])  # lm-eval's of a document is a log-likelihood
    assert (report["better"], report["comparisons"][0]["signs"]["a_better"]) == ("higher", 0)
    for name, better in (("loss", "lower"), ("bits_per_byte", "lower"), ("perplexity", "lower"), ("f1", "higher")):
        assert better_of(name) == better
    assert compare_scores([a, b], better="lower")["better"] == "lower"


ODD: list[Any] = [None, True, -1, 1e400, float("nan"), 10**400, "", "x\x1b[2J", "\ud83d", [], [1], {}, {"a": {"b": []}}]


def test_odd_values_end_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(0)
    good = {"table": [{"id": i, "score": i % 3} for i in range(25)], "samples": samples([1, 0] * 13)}
    hella = {"losses": [1.0] * 4, "lengths": [1] * 4, "pick": 1, "pick_norm": 1}
    good["hellaswag"] = [{"ind": i, "label": i % 4, **hella} for i in range(25)]
    windows = {"tokens": 8, "document": 1, "data": "d", "text": "t"}
    good["windows"] = [{"window": i, "loss": float(i), **windows} for i in range(25)]
    for k in range(50):
        rows = good[draw.choice(list(good))]
        changed = [dict(row) for row in rows]
        for row in draw.choices(changed, k=draw.choice([1, 40])):
            row[draw.choice(list(row))] = draw.choice(ODD)
        file = tmp_path / f"{k}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in changed), encoding="utf-8")
        status, out, err = call(capsys, "compare-scores", write(tmp_path / "a", rows), file, "--json")
        assert status in (0, 2) and "\x1b" not in err and (status == 2) == (err != "")
        if status == 0:
            json.loads(out)


def test_which_of_several_columns_is_asked_for(tmp_path: Path) -> None:
    files = [
        write(tmp_path / name, [{"id": i, "label": 3, "x": i * by, "y": -i} for i in range(30)])
        for name, by in (("a", 1), ("b", 2))
    ]
    with pytest.raises(UserError, match="x, y could each be the score: --metric NAME says which"):
        compare_scores(files)
    report = compare_scores(files, "x", "lower")
    assert report["comparisons"][0]["verdict"] == "worse" and report["other_metrics"] == ["y"]


def test_hellaswag_results_and_packed_files(tmp_path: Path) -> None:
    rows = [
        {"ind": i, "label": i % 4, "losses": [1.0] * 4, "lengths": [2] * 4, "pick": i % 4, "pick_norm": None}
        for i in range(30)
    ]
    a, b = write(tmp_path / "a.jsonl", rows), tmp_path / "b.jsonl.gz"
    b.write_bytes(gzip.compress(a.read_bytes().replace(b'"pick_norm": null', b'"pick_norm": 1')))
    report = compare_scores([a, b])
    assert report["arms"][0]["form"] == "hellaswag" and report["arms"][0]["mean"] == 0
    assert report["comparisons"][0]["signs"]["a_only"] == 8  # of those with label 1
    assert compare_scores([a, b], "acc")["comparisons"][0]["signs"]["both_right"] == 30


# -- the command ----------------------------------------------------------------------------------------------------


def test_the_command_says_all_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "a.jsonl", samples(random_scores(200, 0.2, 0)))
    b = write(tmp_path / "b.jsonl", samples(random_scores(200, 0.8, 1)))
    status, out, err = call(capsys, "compare-scores", a, b, "--top", 1, "--json", tmp_path / "new/x.json")
    assert status == 0 and err == ""
    assert (
        "acc_norm, higher is better; there are also acc" in out
        and "The model B is better than A. B minus A: +0." in out
    )
    assert "McNemar's exact p = " in out and "Both right: " in out and NOT_THE_METHODS in out
    assert "Who is number " in out  # of the document that moved most, on one line
    told = json.loads((tmp_path / "new/x.json").read_text(encoding="utf-8"))
    assert json.loads(call(capsys, "compare-scores", a, b, "--top", 1, "--json")[1]) == told
    status, out, _ = call(capsys, "compare-scores", a, b, b.rename(tmp_path / "c"), "--top", 0)
    assert status == 2
    write(b, samples(random_scores(200, 0.8, 1)))
    out = call(capsys, "compare-scores", a, b, tmp_path / "c", "--top", 0)[1]
    assert "2 models are compared with A, each at 2.5%, so that all of them together err in at most 5%" in out
    assert "C against" not in out
    for words, says in (
        ([a], "two files of scores or more"),
        ([a, a], "is named twice"),
        ([a, b, "--top", -1], "--top -1"),
    ):
        status, _, err = call(capsys, "compare-scores", *words)
        assert status == 2 and says in err


# -- lm-eval itself -------------------------------------------------------------------------------------------------

TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{cache_dir: {folder}/cache, data_files: {{test: {folder}/{name}.jsonl}}}}
test_split: test
doc_to_text: '{{{{question}}}}'
"""


@pytest.mark.slow
def test_samples_that_lm_eval_writes(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager
    from test_evals_harness import BYTES, HOW, make, text

    from gptlab.evals.harness import HarnessLM

    rows = [{"question": text(5, i), "options": [text(3, 50 + i), text(3, 90 + i)], "gold": i % 2} for i in range(30)]
    for name in ("choosing", "writing"):
        write(tmp_path / f"{name}.jsonl", rows)
    (tmp_path / "choosing.yaml").write_text(
        TASK.format(name="choosing", folder=tmp_path)
        + "output_type: multiple_choice\ndoc_to_choice: options\ndoc_to_target: gold\nmetric_list: [{metric: acc}, "
        "{metric: acc_norm}]\n",
        encoding="utf-8",
    )
    (tmp_path / "writing.yaml").write_text(
        TASK.format(name="writing", folder=tmp_path)
        + "output_type: generate_until\ndoc_to_target: the\ngeneration_kwargs: {until: ['.'], max_gen_toks: 3}\n"
        "metric_list: [{metric: exact_match}]\nfilter_list:\n- {name: strict, filter: [{function: take_first}]}\n"
        "- {name: loose, filter: [{function: lowercase}, {function: take_first}]}\n",
        encoding="utf-8",
    )
    models = [make(257), make(257)]
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.mul_(1.5)
    found, results = {}, []
    for k, model in enumerate(models):
        tracker = EvaluationTracker(output_path=str(tmp_path / f"model{k}"))
        results.append(
            simple_evaluate(
                HarnessLM(model, BYTES, *HOW),
                tasks=[str(tmp_path / f"{name}.yaml") for name in ("choosing", "writing")],
                task_manager=TaskManager(include_defaults=False),
                bootstrap_iters=0,
                log_samples=True,
            )
        )
        tracker.save_results_aggregated(results=results[-1], samples=results[-1]["samples"])
        for task, of in results[-1]["samples"].items():
            tracker.save_results_samples(task_name=task, samples=of)
        for name in ("choosing", "writing"):
            (found[name, k],) = (tmp_path / f"model{k}").rglob(f"samples_{name}_*.jsonl")
    report = compare_scores([found["choosing", 0], found["choosing", 1]], "acc")
    (row,) = report["comparisons"]
    means = [result["results"]["choosing"]["acc,none"] for result in results]
    assert (row["mean_b"], row["mean_a"]) == pytest.approx(means) and row["n"] == 30 and report["warnings"] == []
    assert report["other_metrics"] == ["acc_norm"] and row["moved"][0]["text"] in {one["question"] for one in rows}
    writing = read_scores(found["writing", 0])
    assert writing.form == "lm-eval" and writing.metrics == ["exact_match,strict", "exact_match,loose"]
    assert len(writing.rows) == 30
    with pytest.raises(UserError, match="no document in common|no metric in common"):
        compare_scores([found["choosing", 0], found["writing", 0]])
