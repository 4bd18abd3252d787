"""Two models on the same documents: a score for each, paired.

Read are the samples files of lm-eval, hellaswag_results.jsonl, the losses of `gptlab eval --windows`, and any JSON
lines with an id and a number. What is said is about these two models on documents of this kind: a model trained with
another seed is another model.

* interval: of the mean difference, by a bootstrap over documents (BCa), after averaging what belongs to one document.
* better, worse: for scores of 0 and 1 where McNemar's exact p is below 5%, which errs in at most 5%. For others where
  p of the paired t is, and the interval excludes 0: the interval alone is too short where a few documents differ much.
  In simulations the two err in 4 to 5%, and with lognormal differences in 7% of 50 and 9% of 20 documents.
  Of several models against the first both are Bonferroni's, at 5% over their number.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy import special

from gptlab.errors import DataError, UserError
from gptlab.files import because, open_regular, parse_json, printable, refuse_pointer, unpacked_lines
from gptlab.report import statistics as st
from gptlab.report.comparing import FEWEST
from gptlab.report.estimates import Plain, clean
from gptlab.report.reading import Array
from gptlab.report.words import counted

IDS = ("doc_id", "id", "ind", "window", "idx", "index", "document", "qid", "question_id", "example_id", "key", "name")
"""Columns that may tell documents apart, in the order in which they are looked for."""
HASHES = ("doc_hash", "hash", "sha256")
SCORES = ("acc_norm", "acc", "exact_match", "correct", "score", "accuracy", "em", "f1", "val_loss", "loss", "nll")
"""Columns taken for the score where there are several, in this order."""
NO_SCORES = ("label", "target", "step", "seed", "epoch", "time", "seconds", "length", "tokens", "n", "count", "line")
LOWER = ("loss", "nll", "ppl", "perplexity", "error", "bits", "brier", "wer", "cer", "ter", "mse", "mae", "distance")
"""A metric with one of these in its name is taken as lower is better."""
TEXTS = ("question", "query", "text", "ctx", "prompt", "passage", "sentence", "input", "problem", "goal", "page")
MOST_TEXT = 72  # characters of a document that are shown
MOST_RESAMPLES = 20_000  # of the bootstrap, for the narrower tails of several models

NOT_THE_METHODS = (
    "This is about these models, not about the methods that made them: with another seed a method gives another model. "
    "`gptlab study run` compares methods."
)


@dataclass(frozen=True)
class Scored:
    """One file: the scores of one model."""

    path: Path
    form: str
    """lm-eval, hellaswag, windows or table."""
    rows: list[Plain]
    """`id`, `hash` (of the document; None if unknown), `prompt` (its hash; None), `group` (what it belongs to; None),
    `text`, and `scores`: metric to number, NaN where it is none."""
    remarks: list[str] = field(default_factory=list)

    @property
    def metrics(self) -> list[str]:
        return list(dict.fromkeys(name for row in self.rows for name in row["scores"]))


# -- files ----------------------------------------------------------------------------------------------------------


def read_scores(path: Path) -> Scored:
    """Read a file of scores, packed or not.

    Raises:
        UserError: nothing in it tells documents apart, or it has no score.
        DataError: it cannot be read, or a line of it is no JSON object.
    """
    rows, number = list[Plain](), 0
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file of scores in it, such as hellaswag_results.jsonl")
    try:
        with open_regular(path) as file:
            refuse_pointer(path, file.peek(100)[:100], DataError)
            for number, line in enumerate(unpacked_lines(file), start=1):  # noqa: B007 - said below
                if line.strip():
                    row = parse_json(line.decode("utf-8-sig"))
                    if not isinstance(row, dict):
                        raise ValueError("an object was expected")
                    rows.append(row)
    except FileNotFoundError:
        raise DataError(f"there is no file {path}") from None
    except UserError:
        raise
    except ValueError as error:
        raise DataError(f"{path}, line {number} is not JSON lines: {because(error)}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read beyond line {number}: {because(error)}") from None
    if not rows:
        raise UserError(f"{path} has no rows")
    if all("doc_id" in row and ("filtered_resps" in row or "metrics" in row) for row in rows):
        return _lm_eval(path, rows)
    if all(row.keys() >= {"ind", "label", "pick", "pick_norm"} for row in rows):
        scores = [{f"acc{end}": float(row[f"pick{end}"] == row["label"]) for end in ("_norm", "")} for row in rows]
        return Scored(path, "hellaswag", _rows(rows, "ind", "label", scores))
    return _table(path, rows)


def _lm_eval(path: Path, rows: Sequence[Plain]) -> Scored:
    """A samples file: a line for each document and filter. A filter other than `none` is part of a metric's name."""
    known = {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics"}
    merged: dict[tuple[str, str | None, int], Plain] = {}
    seen: Counter[tuple[str, str | None, str]] = Counter()
    left_out: dict[str, None] = {}
    for row in rows:
        chosen = row.get("filter") or "none"
        names = row["metrics"] if isinstance(row.get("metrics"), list) else row.keys() - known
        (whole,) = _rows([row], "doc_id", "doc_hash", [{}])
        of = whole["id"], whole["hash"], str(chosen)
        seen[of] += 1
        whole = merged.setdefault((*of[:2], seen[of]), whole)
        for name in sorted(map(str, names)) if isinstance(names, set) else map(str, names):
            metric = name if chosen == "none" else f"{name},{chosen}"
            if _is_number(row.get(name)):
                whole["scores"][metric] = _number(row.get(name))
            elif name in row and not isinstance(row[name], str):
                left_out[metric] = None
    remarks = [f"{', '.join(left_out)} left out: no number for each document"] if left_out else []
    return _checked(Scored(path, "lm-eval", list(merged.values()), remarks))


def _table(path: Path, rows: Sequence[Plain]) -> Scored:
    columns = [name for name in rows[0] if all(name in row for row in rows)]
    lower = {name.lower(): name for name in reversed(columns)}
    id_ = next((lower[name] for name in IDS if name in lower and _tells_apart(rows, lower[name])), None)
    if id_ is None:
        raise UserError(
            f"{path} has no column that tells documents apart: call one id, with a number or a text in every row"
        )
    hash_ = next((lower[name] for name in HASHES if name in lower), None)
    windows = {"window", "loss", "data", "tokens"} <= set(columns)
    texts = {id_, hash_, *(lower.get(name) for name in NO_SCORES), "document"}
    numbers = [name for name in columns if name not in texts and all(_is_number(row[name]) for row in rows)]
    scores = [{name: _number(row[name]) for name in numbers} for row in rows]
    found = _rows(rows, id_, hash_, scores)
    if windows:
        for one, row in zip(found, rows, strict=True):
            one |= {"hash": f"{row['data']} {row['tokens']}", "group": row.get("document")}
    return _checked(Scored(path, "windows" if windows else f"table by {id_}", found))


def _checked(scored: Scored) -> Scored:
    if not scored.metrics:
        raise UserError(f"{scored.path} has no score: a column with a number, or true and false, in every row")
    return scored


def _tells_apart(rows: Sequence[Plain], name: str) -> bool:
    """Whether a column names the rows: few of them twice."""
    values = [row[name] for row in rows]
    if not all(isinstance(value, str | int) and not isinstance(value, bool) for value in values):
        return False
    return len(set(values)) > len(values) / 2


def _rows(rows: Sequence[Plain], id_: str, hash_: str | None, scores: Sequence[dict[str, float]]) -> list[Plain]:
    return [
        {"id": str(row[id_]), "hash": _known(row.get(hash_ or "")), "prompt": _known(row.get("prompt_hash"))}
        | {"group": None, "text": _text(row), "scores": of}
        for row, of in zip(rows, scores, strict=True)
    ]


def _known(value: Any) -> str | None:
    return None if value is None else str(value)


def _is_number(value: Any) -> bool:
    """Whether a value may be a score; null is one that is missing."""
    return value is None or isinstance(value, int | float)


def _number(value: Any) -> float:
    try:
        return float(value) if value is not None and math.isfinite(value) else math.nan
    except OverflowError:
        return math.nan


def _text(row: Plain) -> str:
    """A few words of a document, by which a reader knows it; "" if the row has none."""
    doc = row.get("doc") if isinstance(row.get("doc"), dict) else row
    assert isinstance(doc, dict)
    named = [doc[name] for name in TEXTS if isinstance(doc.get(name), str) and doc[name].strip()]
    if not named and doc is not row:
        named = [value for value in doc.values() if isinstance(value, str) and value.strip()]
    words = printable(" ".join(named[0].split())) if named else ""
    return words if len(words) <= MOST_TEXT else f"{words[: MOST_TEXT - 3]}..."


# -- two of them ----------------------------------------------------------------------------------------------------


def choose_metric(files: Sequence[Scored], asked: str | None) -> str:
    """The metric that is compared: the one asked for, or the plain one among those that all files have.

    Raises:
        UserError: they have none in common, the one asked for is not in all, or several could be meant.
    """
    for one in files:
        if asked is not None and asked.removesuffix(",none") not in one.metrics:
            raise UserError(f"{one.path} has no metric {asked}: it has {', '.join(one.metrics)}")
    if asked is not None:
        return asked.removesuffix(",none")
    common = [name for name in files[0].metrics if all(name in one.metrics for one in files)]
    if not common:
        told = "; ".join(f"{one.path} has {', '.join(one.metrics)}" for one in files)
        raise UserError(f"the files have no metric in common: {told}")
    plain = [name for known in SCORES for name in common if name.partition(",")[0].lower() == known]
    if not plain and len(common) > 1:
        raise UserError(f"{', '.join(common)} could each be the score: --metric NAME says which")
    return (plain or common)[0]


def better_of(metric: str, form: str = "") -> Literal["lower", "higher"]:
    """Which direction is better, guessed from a metric's name. lm-eval's perplexity of one document is a
    log-likelihood."""
    if form == "lm-eval" and metric.startswith("perplexity"):
        return "higher"
    return "lower" if any(word in metric.lower() for word in LOWER) else "higher"


@dataclass(frozen=True, eq=False)
class Matched:
    """The documents that two files share."""

    ids: list[str]
    texts: list[str]
    groups: list[Any]
    first: Array
    other: Array
    """Scores, (documents,)."""
    of: str
    """documents or windows."""
    left_out: list[str]
    """What was left out, and what differs, in sentences."""


def match(first: Scored, other: Scored, metric: str) -> Matched:
    """The documents of two files with a score in both, by id and, where both know it, by the hash of their content.

    Raises:
        UserError: they have no document in common.
    """
    hashed = all(row["hash"] is not None for one in (first, other) for row in one.rows)
    mine, theirs = _by_key(first, metric, hashed), _by_key(other, metric, hashed)
    said = [*mine.left_out, *theirs.left_out]
    shared = [key for key in mine.rows if key in theirs.rows]
    alone = [one.rows.keys() - many.rows.keys() for one, many in ((mine, theirs), (theirs, mine))]
    if changed := {key[0] for key in alone[0]} & {key[0] for key in alone[1]} if hashed else set():
        said.append(f"{counted(len(changed), 'document')} with one id and other content left out: {_some(changed)}")
    for keys, one, many in ((alone[0], first, other), (alone[1], other, first)):
        if rest := {key[0] for key in keys} - changed:
            said.append(f"{counted(len(rest), 'document')} of {one.path} left out, not in {many.path}: {_some(rest)}")
    if not shared:
        same = " with the same content" * bool(changed)
        raise UserError(f"{first.path} and {other.path} have no document in common{same}: are they of one test set?")
    if not hashed and any(row["hash"] is not None for one in (first, other) for row in one.rows):
        said.append("documents are matched by id alone, as one of the files does not know their content")
    pairs = [(mine.rows[key], theirs.rows[key]) for key in shared]
    kept = [pair for pair in pairs if not any(math.isnan(row["scores"][metric]) for row in pair)]
    if unknown := len(pairs) - len(kept):
        said.append(f"{counted(unknown, 'document')} left out: no {metric} in one of the files")
    if not kept:
        raise UserError(f"{first.path} and {other.path} have no document with {metric} in both")
    if prompts := sum(a["prompt"] != b["prompt"] for a, b in kept if None not in (a["prompt"], b["prompt"])):
        said.append(
            f"the prompts of {counted(prompts, 'document')} differ: other examples, another template or instruction"
        )
    ids, texts = [a["id"] for a, _ in kept], [a["text"] or b["text"] for a, b in kept]
    x, y = (np.array([pair[side]["scores"][metric] for pair in kept]) for side in (0, 1))
    of = "windows" if first.form == other.form == "windows" else "documents"
    return Matched(ids, texts, [a["group"] for a, _ in kept], x, y, of, said)


@dataclass(frozen=True)
class _Keyed:
    rows: dict[tuple[str, Any], Plain]
    left_out: list[str]


def _by_key(one: Scored, metric: str, hashed: bool) -> _Keyed:
    """Rows by id and hash. One that is there twice with equal scores counts once; with different ones not at all."""
    rows: dict[tuple[str, Any], Plain] = {}
    equal, unlike = 0, dict[tuple[str, Any], None]()
    for row in [row for row in one.rows if metric in row["scores"]]:
        key = row["id"], row["hash"] if hashed else None
        if key not in rows:
            rows[key] = row
        elif np.array_equal(rows[key]["scores"][metric], row["scores"][metric], equal_nan=True):
            equal += 1
        else:
            unlike[key] = None
    said = [f"{counted(equal, 'row')} of {one.path} left out: a document twice, with one score"] if equal else []
    if unlike:
        told = _some({id_ for id_, _ in unlike})
        said.append(f"{counted(len(unlike), 'document')} of {one.path} left out, there with several scores: {told}")
    return _Keyed({key: row for key, row in rows.items() if key not in unlike}, said)


def _some(ids: set[str]) -> str:
    shown = sorted(ids, key=lambda id_: (len(id_), id_))
    return ", ".join(printable(id_[:40]) for id_ in shown[:3]) + (", ..." if len(shown) > 3 else "")


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p that as many documents turn one way as the other (McNemar 1947): a sign test."""
    n = only_a + only_b
    return min(1.0, 2 * float(special.bdtr(min(only_a, only_b), n, 0.5))) if n else 1.0


def compare_scores(
    paths: Sequence[Path], metric: str | None = None, better: Literal["lower", "higher"] | None = None, top: int = 5
) -> Plain:
    """Every file against the first, in the JSON shape of a report.

    Args:
        paths: two or more files of scores.
        metric: default: the plain one.
        better: default: by the metric's name.
        top: documents to name in each direction.

    Raises:
        UserError: see `read_scores`, `choose_metric`, `match`.

    Returns:
        `metric`, `better`; `arms`: `arm` (the path), `form`, `n`, `mean`, `sd`; `comparisons`: as of a report, of `a`
        (a later file) against `b` (the first), with `mean_a`, `mean_b`, `n`, `of`, `signs`, `moved`; `warnings`.
    """
    files = [read_scores(path) for path in paths]
    metric = choose_metric(files, metric)
    better = better or better_of(metric, files[0].form)
    warnings = [f"{one.path}: {remark}" for one in files for remark in one.remarks]
    arms = []
    for one in files:
        known = np.array([x for row in one.rows if math.isfinite(x := row["scores"].get(metric, math.nan))])
        sd = float(known.std(ddof=1)) if len(known) > 1 else math.nan
        mean = float(known.mean()) if len(known) else math.nan
        arms.append({"arm": str(one.path), "form": one.form, "n": len(known), "mean": mean, "sd": sd})
    comparisons = []
    for other in files[1:]:
        matched = match(files[0], other, metric)
        warnings += [said for said in matched.left_out if said not in warnings]
        found = paired(matched, better, len(files) - 1, top)
        comparisons.append({"a": str(other.path), "b": str(files[0].path)} | found)
    others = [name for name in files[0].metrics if name != metric and all(name in one.metrics for one in files)]
    told = {"metric": metric, "better": better, "other_metrics": others, "arms": arms, "comparisons": comparisons}
    plain: Plain = clean({**told, "warnings": warnings, "text": NOT_THE_METHODS})
    return plain


def paired(matched: Matched, better: str, family: int, top: int) -> Plain:
    """The comparison of the other model with the first.

    Args:
        family: number of models that are compared with the first.
    """
    first, other, alpha = matched.first, matched.other, st.ALPHA / family
    means = _by_group(matched.groups, np.column_stack([other, first]))
    a, b = (np.column_stack([other, first]) if means is None else means).T
    estimate = st.bootstrap(a, b, resamples=min(MOST_RESAMPLES, st.RESAMPLES * family), alpha=alpha)
    few = estimate.n < FEWEST
    low, high = (math.nan, math.nan) if few else (estimate.low, estimate.high)
    sign = -1 if better == "lower" else 1
    binary = bool(np.isin([first, other], (0, 1)).all()) and better == "higher"
    gain = sign * (other - first)
    wins, losses = int((gain > 0).sum()), int((gain < 0).sum())
    signs = {"a_better": wins, "b_better": losses, "equal": len(gain) - wins - losses}
    p = math.nan if few else estimate.p
    if binary:
        both = int(((first == 1) & (other == 1)).sum())
        signs = {"both_right": both, "a_only": wins, "b_only": losses, "both_wrong": len(gain) - both - wins - losses}
        p = mcnemar(wins, losses)
    adjusted = min(1.0, p * family) if math.isfinite(p) else math.nan
    shown = adjusted < st.ALPHA and (binary or low > 0 or high < 0)
    ahead = wins > losses if binary else sign * estimate.value > 0
    return {
        "difference": estimate.value,
        "low": low,
        "high": high,
        "p": p,
        "p_adjusted": adjusted,
        "verdict": ("better" if ahead else "worse") if shown else "not resolved",
        "n": estimate.n,
        "of": matched.of if means is None else "documents",
        "rows": len(first),
        "mean_a": float(a.mean()),
        "mean_b": float(b.mean()),
        "level": 1 - alpha,
        "signs": signs,
        "moved": _moved(matched, gain, top),
    }


def _by_group(groups: Sequence[Any], values: Array) -> Array | None:
    """(groups, ...) means of the rows of each document; None if documents are not known, are too few, or have one row.

    Rows of one document are not independent.
    """
    if any(group is None for group in groups):
        return None
    found = np.unique([str(group) for group in groups], return_inverse=True)[1]
    counts = np.bincount(found)
    if len(counts) == len(found) or len(counts) < FEWEST:
        return None
    return np.stack([np.bincount(found, column) / counts for column in values.T], axis=1)


def _moved(matched: Matched, gain: Array, top: int) -> list[Plain]:
    """The documents in which the models differ most: up to `top` in which a is better, then as many of b."""
    order = np.argsort(-np.abs(gain), kind="stable")
    chosen = [i for side in (1, -1) for i in [i for i in order if side * gain[i] > 0][:top]]
    return [
        {"id": matched.ids[i], "a": matched.other[i], "b": matched.first[i]}
        | {"difference": matched.other[i] - matched.first[i], "text": matched.texts[i]}
        for i in chosen
    ]


def sentences(report: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """What is said of each comparison, in sentences.

    Args:
        names: of the files, in order; short.
    """
    lines, family = [], len(report["comparisons"])
    for name, row in zip(names[1:], report["comparisons"], strict=True):
        a, b, n = name, names[0], f"{row['n']:,} {row['of']}"
        n += f" ({row['rows']:,} rows)" if row["rows"] != row["n"] else ""
        told = f"{a} minus {b}: {row['difference']:+.4g} in {report['metric']}"
        if row["low"] is None:
            says = f"{told} over {n}, too few for an interval"
        else:
            says = f"{told}, {100 * row['level']:.4g}% interval [{row['low']:+.4g}, {row['high']:+.4g}]"
            says += f" by a bootstrap (BCa), paired over {n}"
        if row["p"] is not None:
            test = "McNemar's exact" if "both_right" in row["signs"] else "paired t,"
            says += f"; {test} p = {row['p_adjusted']:.2g}" + f", times {family} (Bonferroni)" * (family > 1)
        heads = {"better": f"The model {a} is better than {b}", "worse": f"The model {a} is worse than {b}"}
        lines.append(f"{heads.get(row['verdict'], f'No difference between {a} and {b} is shown')}. {says}.")
        s = row["signs"]
        if "both_right" in s:
            agree = f"Both right: {s['both_right']:,}; {a} only: {s['a_only']:,}; {b} only: {s['b_only']:,}; "
            lines.append(f"{agree}both wrong: {s['both_wrong']:,}.")
        else:
            agree = f"{a} better: {s['a_better']:,}; {b} better: {s['b_better']:,}; equal: {s['equal']:,}"
            lines.append(f"{agree}, of {row['rows']:,} rows.")
    if family > 1:
        level = f"each at {5 / family:.3g}%, so that all of them together err in at most 5%"
        lines.append(f"{family} models are compared with {names[0]}, {level} (Bonferroni).")
    return lines
