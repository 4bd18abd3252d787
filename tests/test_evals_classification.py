"""Scores of classifiers: worked by hand, by a slow reference, and as torchmetrics and scikit-learn have them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptlab.evals.classification import multi_label_scores, single_label_scores


def ids(*labels: int) -> np.ndarray:
    return np.array(labels, dtype=np.int64)


# -- worked by hand -------------------------------------------------------------------------------------------------


def test_a_worked_example():
    """Six scored labels and one that never occurred; each document is wrong in its own way."""
    logits = np.array(
        [
            [4.0, 3.0, -1.0, -2.0, -3.0, -4.0],  # predicts 0 and 1; ranks 0 1 2 3 4 | 5
            [-1.0, -2.0, -3.0, 1.0, -4.0, -5.0],  # predicts 3; ranks 3 0 1 2 4 | 5
            [-6.0, -1.0, -2.0, -3.0, -4.0, -5.0],  # predicts nothing; ranks 1 2 3 4 5 | 0
        ],
        dtype=np.float32,
    )
    truth = [ids(0, 2), ids(3, 5, 6), ids(0)]
    scores = multi_label_scores(logits, truth, train_counts=np.array([900, 51, 50, 7, 1, 2, 0]))
    second = 1 / math.log2(3)
    expected = {
        "micro_f1": 2 * 2 / (2 * 2 + 1 + 4),  # hits 0 and 3; 1 is predicted and wrong; 2, 5, 6 and 0 are missed
        "macro_f1": (2 / 3 + 0 + 0 + 1 + 0 + 0 + 0) / 7,
        "macro_f1_present": (2 / 3 + 0 + 1 + 0 + 0) / 5,  # 0, 2, 3, 5 and 6
        "p_at_1": 2 / 3,
        "p_at_3": (2 + 1 + 0) / 9,
        "p_at_5": (2 + 1 + 0) / 15,
        "rp_at_5": (2 / 2 + 1 / 3 + 0 / 1) / 3,
        "ndcg_at_5": ((1 + 1 / 2) / (1 + second) + 1 / (1 + second + 1 / 2) + 0) / 3,
        # labels 0 and 1: documents 0 and 2 have one, ranked first of 0 1, and second of 1 0
        "micro_f1_frequent": 2 / (2 + 1 + 1),
        "rp_at_5_frequent": 1.0,
        "ndcg_at_5_frequent": (1 + second) / 2,
        # labels 2 to 5: documents 0 and 1 have them; 2 3 4 5 has 2 first, 3 2 4 5 has 3 first and 5 fourth
        "micro_f1_few": 2 / (2 + 0 + 2),
        "rp_at_5_few": 1.0,
        "ndcg_at_5_few": (1 + (1 + 1 / math.log2(5)) / (1 + second)) / 2,
        "rp_at_5_zero": 0.0,
        "ndcg_at_5_zero": 0.0,
    }
    assert scores == pytest.approx(expected)
    assert list(scores) == list(expected)
    assert all(type(value) is float for value in scores.values())


def test_a_label_without_training_documents_that_the_model_scores():
    logits = np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]], dtype=np.float32)
    scores = multi_label_scores(logits, [ids(2), ids(2)], train_counts=np.array([60, 0, 0]))
    assert (scores["rp_at_5_zero"], scores["ndcg_at_5_zero"]) == (1.0, pytest.approx((1 + 1 / math.log2(3)) / 2))
    assert not any(key.endswith(("_frequent", "_few")) for key in scores)  # no document has such a label


def test_r_precision_of_more_labels_than_five():
    logits = np.arange(8, 0, -1, dtype=np.float32)[None]
    scores = multi_label_scores(logits, [ids(0, 1, 2, 5, 6, 7)], np.full(8, 60))
    assert (scores["p_at_5"], scores["rp_at_5"]) == (0.6, 0.6)
    scores = multi_label_scores(logits, [ids(0, 1, 2, 3, 4, 7)], np.full(8, 60))
    assert (scores["rp_at_5"], scores["ndcg_at_5"]) == (1.0, pytest.approx(1.0))


def test_what_is_ranked_is_averaged_over_documents_with_labels():
    logits = np.array([[1.0, -1.0], [5.0, 5.0]], dtype=np.float32)
    scores = multi_label_scores(logits, [ids(0), ids()], np.array([60, 60]))
    assert (scores["p_at_1"], scores["rp_at_5"], scores["ndcg_at_5"]) == (1.0, 1.0, 1.0)
    assert scores["micro_f1"] == pytest.approx(2 / (2 + 2))  # F1 counts both


def test_nothing_predicted_and_nothing_true():
    logits, counts = np.full((2, 3), -5.0, dtype=np.float32), np.array([60, 6, 0])
    scores = multi_label_scores(logits, [ids(0), ids(1, 2)], counts)
    f1s = {key: value for key, value in scores.items() if "f1" in key}
    assert f1s == dict.fromkeys(["micro_f1", "macro_f1", "macro_f1_present", "micro_f1_frequent", "micro_f1_few"], 0.0)
    assert multi_label_scores(logits, [ids(), ids()], counts) == {"micro_f1": 0.0, "macro_f1": 0.0}
    assert multi_label_scores(-logits, [ids(), ids()], counts) == {"micro_f1": 0.0, "macro_f1": 0.0}


def test_ties_and_what_is_not_a_number():
    counts = np.full(6, 60)

    def first(row: list[float]) -> list[int]:
        """The labels that are ranked first, second, ..., read off nDCG; the last of six is not among the five."""
        found = {}
        for label in range(6):
            scores = multi_label_scores(np.array([row], dtype=np.float32), [ids(label)], counts)
            found[label] = scores["ndcg_at_5"]
        return sorted(found, key=lambda label: -found[label])

    nan, inf = math.nan, math.inf
    assert first([0, 0, 0, 0, 0, 0]) == [0, 1, 2, 3, 4, 5]
    assert first([1, 2, 1, 2, 1, 2]) == [1, 3, 5, 0, 2, 4]
    assert first([nan, -1, 0, nan, 1, -2]) == [4, 2, 1, 5, 0, 3]
    assert first([-inf, -inf, -1, inf, inf, -inf]) == [3, 4, 2, 0, 1, 5]
    diverged = multi_label_scores(np.full((1, 6), nan, dtype=np.float32), [ids(5)], counts)
    assert set(diverged.values()) == {0.0}


def test_the_threshold_is_a_probability():
    logits = np.array([[0.0, 1.0, -1.0]], dtype=np.float32)  # 0.5, 0.73, 0.27
    counts, truth = np.full(3, 60), [ids(0, 1, 2)]
    by_threshold = {t: multi_label_scores(logits, truth, counts, t)["micro_f1"] for t in (0.5, 0.2, 0.4, 0.8)}
    # a label at the threshold is not predicted
    assert by_threshold == pytest.approx({0.5: 2 / (2 + 2), 0.2: 1.0, 0.4: 4 / (4 + 1), 0.8: 0.0})


def test_counts_for_every_label_and_logits_for_every_document():
    logits = np.zeros((2, 3), dtype=np.float32)
    with pytest.raises(AssertionError, match="a training count for each label"):
        multi_label_scores(logits, [ids(), ids()], np.ones(2))
    with pytest.raises(AssertionError, match="a row of logits for each document"):
        multi_label_scores(logits, [ids()], np.ones(3))
    with pytest.raises(AssertionError, match="a row of logits for each document"):
        single_label_scores(logits, ids(1))


def test_a_worked_single_label_example():
    logits = np.array([[2, 1, 0, 0], [0, 1, 1, 0], [3, 0, 0, 0], [0, 0, 9, 0]], dtype=np.float32)  # 0, 1 (a tie), 0, 2
    scores = single_label_scores(logits, ids(0, 1, 2, 2))
    assert scores == pytest.approx(
        {
            "accuracy": 3 / 4,
            "micro_f1": 3 / 4,
            "macro_f1": (2 / 3 + 1 + 2 / 3 + 0) / 4,
            "macro_f1_present": (2 / 3 + 1 + 2 / 3) / 3,
        }
    )
    assert list(scores) == ["accuracy", "micro_f1", "macro_f1", "macro_f1_present"]


def test_single_labels_that_never_occurred_are_missed():
    logits = np.array([[1, 0], [1, 0]], dtype=np.float32)
    scores = single_label_scores(logits, ids(0, 7))
    assert scores == pytest.approx(
        {"accuracy": 0.5, "micro_f1": 0.5, "macro_f1": (2 / 3) / 2, "macro_f1_present": (2 / 3) / 2}
    )
    assert set(single_label_scores(logits, ids(6, 7)).values()) == {0.0}
    assert single_label_scores(np.full((1, 3), math.nan, dtype=np.float32), ids(2))["accuracy"] == 0.0
    assert single_label_scores(np.array([[math.nan, -5.0, -math.inf]]), ids(1))["accuracy"] == 1.0


# -- a slow reference -----------------------------------------------------------------------------------------------


def f1(true: list[set[int]], predicted: list[set[int]], labels: list[int]) -> float:
    pairs = [(t & set(labels), p & set(labels)) for t, p in zip(true, predicted, strict=True)]
    hits = sum(len(t & p) for t, p in pairs)
    total = sum(len(t) + len(p) for t, p in pairs)
    return 2 * hits / total if total else 0.0


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def slow(logits: list[list[float]], true: list[set[int]], counts: list[int]) -> dict[str, float]:
    n_labels, n_scored = len(counts), len(logits[0])
    predicted = [{label for label, logit in enumerate(row) if logit > 0} for row in logits]
    everything, present = list(range(n_labels)), sorted(set().union(*true))
    result = {
        "micro_f1": f1(true, predicted, everything),
        "macro_f1": mean([f1(true, predicted, [label]) for label in everything]),
    }
    if not present:
        return result
    result["macro_f1_present"] = mean([f1(true, predicted, [label]) for label in present])

    def ranked(labels: list[int], suffix: str) -> dict[str, float]:
        precisions, r_precisions, ndcgs = {k: [] for k in (1, 3, 5)}, [], []
        for row, whole in zip(logits, true, strict=True):
            relevant = whole & set(labels)
            if not relevant:
                continue
            order = sorted((label for label in labels if label < n_scored), key=lambda label: (-row[label], label))
            for k in precisions:
                precisions[k].append(len(relevant & set(order[:k])) / k)
            r_precisions.append(len(relevant & set(order[:5])) / min(5, len(relevant)))
            gain = sum(1 / math.log2(rank + 2) for rank, label in enumerate(order[:5]) if label in relevant)
            ndcgs.append(gain / sum(1 / math.log2(rank + 2) for rank in range(min(5, len(relevant)))))
        scores = {f"p_at_{k}": mean(values) for k, values in precisions.items()} if not suffix else {}
        return scores | {"rp_at_5" + suffix: mean(r_precisions), "ndcg_at_5" + suffix: mean(ndcgs)}

    result |= ranked(everything, "")
    buckets = {
        "_frequent": [label for label in everything if counts[label] > 50],
        "_few": [label for label in everything if 1 <= counts[label] <= 50],
        "_zero": [label for label in everything if counts[label] == 0],
    }
    for suffix, labels in buckets.items():
        if set(labels) & set(present):
            if suffix != "_zero":
                result["micro_f1" + suffix] = f1(true, predicted, labels)
            result |= ranked(labels, suffix)
    return result


@st.composite
def splits(draw: st.DrawFn) -> tuple[list[list[float]], list[set[int]], list[int]]:
    n_labels, n_documents = draw(st.integers(2, 12)), draw(st.integers(1, 6))
    n_scored = draw(st.integers(1, n_labels))
    logit = st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 2.0])  # so few that there are ties
    logits = draw(
        st.lists(st.lists(logit, min_size=n_scored, max_size=n_scored), min_size=n_documents, max_size=n_documents)
    )
    true = draw(st.lists(st.sets(st.integers(0, n_labels - 1)), min_size=n_documents, max_size=n_documents))
    counts = draw(st.lists(st.sampled_from([0, 1, 50, 51]), min_size=n_labels, max_size=n_labels))
    return logits, true, counts


@settings(max_examples=80, deadline=None)
@given(splits())
def test_scores_are_those_of_a_slow_reference(split):
    logits, true, counts = split
    scores = multi_label_scores(np.array(logits, dtype=np.float32), [ids(*labels) for labels in true], np.array(counts))
    assert scores == pytest.approx(slow(logits, true, counts))
    assert all(0 <= value <= 1 + 1e-12 for value in scores.values())


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_single_label_scores_are_those_of_a_slow_reference(data):
    n_labels, n_documents = data.draw(st.integers(2, 6)), data.draw(st.integers(1, 8))
    rows = st.lists(st.sampled_from([-1.0, 0.0, 1.0, 2.0]), min_size=n_labels, max_size=n_labels)
    logits = data.draw(st.lists(rows, min_size=n_documents, max_size=n_documents))
    truth = data.draw(st.lists(st.integers(0, n_labels), min_size=n_documents, max_size=n_documents))
    true, predicted = [{label} for label in truth], [{row.index(max(row))} for row in logits]
    accuracy = mean([float(t == p) for t, p in zip(true, predicted, strict=True)])
    expected = {
        "accuracy": accuracy,
        "micro_f1": accuracy,
        "macro_f1": mean([f1(true, predicted, [label]) for label in range(n_labels)]),
        "macro_f1_present": mean([f1(true, predicted, [label]) for label in sorted(set(truth))]),
    }
    assert single_label_scores(np.array(logits, dtype=np.float32), np.array(truth)) == pytest.approx(expected)


# -- as others compute them -----------------------------------------------------------------------------------------


def random_split(seed: int, n_documents: int = 40, n_labels: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """Logits without ties, which others break in their own ways, and truth that they know something of."""
    draw = np.random.default_rng(seed)
    true = draw.random((n_documents, n_labels)) < 0.1
    true[np.arange(n_documents), draw.integers(n_labels, size=n_documents)] = True
    return (draw.normal(-1, 1, true.shape) + 2 * true).astype(np.float32), true


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_multi_label_scores_are_those_of_torchmetrics(seed):
    retrieval = pytest.importorskip("torchmetrics.retrieval")
    classification = pytest.importorskip("torchmetrics.classification")
    logits, true = random_split(seed)
    ours = multi_label_scores(logits, [np.flatnonzero(row) for row in true], np.full(30, 60))
    scored, target = torch.from_numpy(logits), torch.from_numpy(true)
    for average in ("micro", "macro"):
        metric = classification.MultilabelF1Score(num_labels=30, average=average)
        assert ours[f"{average}_f1"] == pytest.approx(metric(scored.sigmoid(), target.long()).item(), abs=1e-6)
    queries = torch.arange(len(true))[:, None].expand(true.shape)
    flat = scored.flatten(), target.flatten(), queries.flatten()
    for k in (1, 3, 5):
        assert ours[f"p_at_{k}"] == pytest.approx(retrieval.RetrievalPrecision(top_k=k)(*flat).item(), abs=1e-6)
    ndcg = retrieval.RetrievalNormalizedDCG(top_k=5)(*flat).item()
    assert ours["ndcg_at_5"] == ours["ndcg_at_5_frequent"] == pytest.approx(ndcg, abs=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
def test_ndcg_is_scikit_learns_without_ties(seed):
    from sklearn.metrics import ndcg_score

    logits, true = random_split(seed)
    ours = multi_label_scores(logits, [np.flatnonzero(row) for row in true], np.full(30, 7))
    assert ours["ndcg_at_5"] == ours["ndcg_at_5_few"] == pytest.approx(ndcg_score(true, logits, k=5))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_f1_is_scikit_learns(seed):
    """Equal to the last bit, as studies that were reported with scikit-learn's were."""
    from sklearn.metrics import accuracy_score, f1_score

    logits, true = random_split(seed)
    true = np.hstack([true, true[:, :2]])  # the model has no logits of the last two
    predicted = np.hstack([logits > 0, np.zeros((len(true), 2), dtype=bool)])
    few = np.arange(32) % 3 == 0
    ours = multi_label_scores(logits, [np.flatnonzero(row) for row in true], np.where(few, 7, 70))
    how = {"zero_division": 0.0}
    assert ours["micro_f1"] == f1_score(true, predicted, average="micro", **how)
    assert ours["macro_f1"] == f1_score(true, predicted, average="macro", **how)
    assert ours["micro_f1_few"] == f1_score(true, predicted, labels=np.flatnonzero(few), average="micro", **how)

    truth = np.random.default_rng(seed).integers(0, 32, len(logits))  # some labels never occur, some have no logits
    ours, predicted = single_label_scores(logits, truth), logits.argmax(axis=1)
    assert ours["accuracy"] == accuracy_score(truth, predicted)
    for key, labels in (("macro_f1", np.arange(30)), ("macro_f1_present", np.unique(truth))):
        assert ours[key] == f1_score(truth, predicted, labels=labels, average="macro", **how)


@pytest.mark.parametrize("seed", [0, 1])
def test_single_label_scores_are_those_of_torchmetrics(seed):
    classification = pytest.importorskip("torchmetrics.classification")
    logits, true = random_split(seed, n_documents=200, n_labels=9)
    truth = true.argmax(axis=1)  # every one of the 9 labels occurs: torchmetrics leaves absent ones out
    assert len(np.unique(truth)) == 9
    ours = single_label_scores(logits, truth)
    scored, target = torch.from_numpy(logits), torch.from_numpy(truth)
    for key, metric in (
        ("accuracy", classification.MulticlassAccuracy(num_classes=9, average="micro")),
        ("micro_f1", classification.MulticlassF1Score(num_classes=9, average="micro")),
        ("macro_f1", classification.MulticlassF1Score(num_classes=9, average="macro")),
    ):
        assert ours[key] == pytest.approx(metric(scored, target).item(), abs=1e-6)
    assert ours["macro_f1_present"] == ours["macro_f1"]
