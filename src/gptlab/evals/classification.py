"""Scores of document classifiers: F1, and for documents of many labels how well the best-scored ones are the true ones.

F1 is 0 for a label that is neither true nor predicted. Labels are ranked by logit, equal ones by label id, and what is
not a number stands last.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

FREQUENT = 50  # a frequent label has more training documents than this (Chalkidis et al. 2019, arXiv 1906.02192)


def multi_label_scores(
    logits: np.ndarray,  # (N, L)
    truth: Sequence[np.ndarray],
    train_counts: np.ndarray,  # (n_labels,)
    threshold: float = 0.5,
) -> dict[str, float]:
    """Scores of N documents over a space of n_labels labels, of which the model scores the first L.

    Labels from L on never occurred in training: no model can predict them, and they count as missed.

    - micro_f1; macro_f1, the mean over all n_labels labels, 0 for one that is neither true nor predicted;
      macro_f1_present, the mean over the labels that some document of this split has.
    - p_at_1, p_at_3, p_at_5: the share of true ones among a document's first K labels.
    - rp_at_5: R-Precision@K (Chalkidis et al. 2019, arXiv 1905.10892), true ones among the first 5 by the most there
      can be, min(5, the document's labels). ndcg_at_5: the same with each rank discounted by log2(rank + 1) (Jarvelin
      and Kekalainen 2002, doi 10.1145/582415.582418).
    - micro_f1, rp_at_5 and ndcg_at_5 of the labels with more than 50 training documents, as micro_f1_frequent and so
      on, and of those with 1 to 50, as _few; of those with none rp_at_5_zero and ndcg_at_5_zero, 0 where the model has
      no logits for them. A bucket's labels are ranked among themselves (arXiv 1906.02192).

    What is ranked is averaged over the documents that have a label, of the bucket if it is a bucket's. A score that
    needs true labels is left out where no document has any.

    Args:
        logits: a document a row.
        truth: ids of each document's labels.
        train_counts: how many training documents have each label.
        threshold: a label of a larger probability is predicted.
    """
    (N, L), n_labels = logits.shape, len(train_counts)
    assert N == len(truth) > 0, "a row of logits for each document"
    assert n_labels >= max(2, L), "a training count for each label, of several"
    true = np.zeros((N, n_labels), dtype=bool)
    for i, labels in enumerate(truth):
        true[i, np.asarray(labels, dtype=np.int64)] = True
    predicted = np.zeros((N, n_labels), dtype=bool)
    predicted[:, :L] = logits > np.log(threshold / (1 - threshold))
    right = np.count_nonzero(true & predicted, axis=0)  # (n_labels,), as are the next two
    either = np.count_nonzero(true, axis=0) + np.count_nonzero(predicted, axis=0)
    by_label = _f1(right, either)

    def micro_f1(labels: np.ndarray) -> float:
        return float(_f1(right[labels].sum(), either[labels].sum()))

    everything = np.arange(n_labels)
    scores = {"micro_f1": micro_f1(everything), "macro_f1": float(by_label.mean())}
    if not true.any():
        return scores
    scores["macro_f1_present"] = float(by_label[true.any(axis=0)].mean())
    hits = _hits(logits, true, everything)
    scores |= {f"p_at_{k}": float(hits[true.any(axis=1), :k].mean()) for k in (1, 3, 5)}
    scores |= _ranking(hits, true, "")

    buckets = {
        "_frequent": train_counts > FREQUENT,
        "_few": (train_counts > 0) & (train_counts <= FREQUENT),
        "_zero": train_counts == 0,
    }
    for name, members in buckets.items():
        labels = np.flatnonzero(members)
        if not true[:, labels].any():
            continue
        if name != "_zero":
            scores["micro_f1" + name] = micro_f1(labels)
        scores |= _ranking(_hits(logits, true, labels), true[:, labels], name)
    return scores


def _f1(right: np.ndarray, either: np.ndarray) -> np.ndarray:
    """F1 from how often a label is true and predicted, and how often it is the one plus how often the other."""
    return 2 * right / np.maximum(either, 1)


def _hits(logits: np.ndarray, true: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether each document's five best-scored of these labels are true ones, (N, 5); past the last label, none is."""
    hits = np.zeros((len(logits), 5), dtype=bool)
    scored, rows = labels[labels < logits.shape[1]], np.arange(len(logits))
    left = np.fmax(logits.take(scored, axis=1), np.finfo(logits.dtype).min)  # where there is no number, the smallest
    for rank in range(min(5, len(scored))):
        best = left.argmax(axis=1)  # (N,); of equals the first
        hits[:, rank] = true[rows, scored[best]]
        left[rows, best] = -np.inf
    return hits


def _ranking(hits: np.ndarray, true: np.ndarray, suffix: str) -> dict[str, float]:
    """rp_at_5 and ndcg_at_5 from hits (N, 5), over the documents that have one of the labels `true` (N, ...) tells."""
    most = np.minimum(true.sum(axis=1), 5)  # (N,)
    hits, most = hits[most > 0], most[most > 0]
    discounts = 1 / np.log2(np.arange(2, 7))  # (5,)
    ndcg = hits @ discounts / discounts.cumsum()[most - 1]
    return {f"rp_at_5{suffix}": float((hits.sum(axis=1) / most).mean()), f"ndcg_at_5{suffix}": float(ndcg.mean())}


def single_label_scores(logits: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Scores of documents that have one label each: accuracy, micro_f1, which is the same, and the two macro_f1.

    macro_f1 is the mean over the K labels that the model scores, 0 for one that is neither true nor predicted;
    macro_f1_present the mean over the labels that some document of this split has. Of equal logits the first is taken.

    Args:
        logits: (N, K).
        truth: (N,) ids; one from K on never occurred in training, and its document is missed.
    """
    assert len(logits) == len(truth) > 0, "a row of logits for each document"
    predicted = np.fmax(logits, -np.inf).argmax(axis=1)  # of a number and none, the number
    scored, most = logits.shape[1], max(logits.shape[1], int(truth.max()) + 1)
    right = np.bincount(truth[truth == predicted], minlength=most)
    by_label = _f1(right, np.bincount(truth, minlength=most) + np.bincount(predicted, minlength=most))  # (most,)
    accuracy = float(np.mean(truth == predicted))
    return {
        "accuracy": accuracy,
        "micro_f1": accuracy,
        "macro_f1": float(by_label[:scored].mean()),
        "macro_f1_present": float(by_label[np.unique(truth)].mean()),
    }
