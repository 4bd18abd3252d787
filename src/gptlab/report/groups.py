"""Every pair of arms compared, and the groups of arms that cannot be told apart, as letters.

Two arms share a letter if and only if neither is shown to be better: the compact letter display, by insertion and
absorption (Piepho 2004). All pairs are one family, so that in at most 5% of studies two arms that are equal share none.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from gptlab.report import noise, verdicts
from gptlab.report.estimates import Plain, clean, contrast_of
from gptlab.report.studies import ReadStudy

Pair = tuple[str, str]
MOST_GROUPS = 200  # of more, nobody could read the letters


def judge_pairs(read: ReadStudy) -> dict[Pair, verdicts.Judgement]:
    """Each arm against each other, by (arm, reference): the reference is the baseline, or comes before the arm."""
    arms, baseline = list(read.study.arms), read.study.baseline
    pairs = [(b, a) for a, b in itertools.combinations(arms, 2)]
    pairs = [(b, a) if a == baseline else (a, b) if b == baseline else (b, a) for b, a in pairs]
    metric = read.study.metric
    others = noise.Others(read, metric.name)
    return verdicts.judge({pair: contrast_of(read, *pair, metric, others) for pair in pairs})


def groups_of(read: ReadStudy, arms: Sequence[Plain], judged: Mapping[Pair, verdicts.Judgement]) -> Plain:
    """The groups, the letters of each arm, and the pairs without the baseline, which the arms' own rows have.

    Args:
        arms: rows of the report; those of which a run diverged, and those without a value, have no letter.
    """
    sign = 1 if read.study.metric.better == "lower" else -1
    ranked = [arm for arm in arms if arm["quality"] and not arm["statuses"].get("diverged")]
    ranked.sort(key=lambda arm: sign * arm["quality"]["mean"])
    names = [arm["name"] for arm in ranked]
    apart = [pair for pair, one in judged.items() if one.verdict in ("better", "worse")]
    found = letters(names, apart)
    held = {name: "".join(letter for letter, members in found if name in members) for name in names}
    rest = [arm["name"] for arm in arms if arm["name"] not in held]
    plain: Plain = clean(
        {
            "order": [*names, *rest],
            "letters": held,
            "groups": [{"letter": letter, "arms": members} for letter, members in found],
            "pairs": [_row(read, pair, one) for pair, one in judged.items() if pair[1] != read.study.baseline],
            "family": len(judged),
        }
    )
    return plain


def _row(read: ReadStudy, pair: Pair, judged: verdicts.Judgement) -> Plain:
    d, metric = judged.contrast.difference, read.study.metric
    return {
        "study": read.study.name,
        **dict(zip("ab", pair, strict=True)),
        "metric": metric.name,
        "margin": metric.margin or None,
        **{key: getattr(d, key) for key in ("n", "mean", "low", "high", "p")},
        **{key: getattr(judged, key) for key in ("p_holm", "p_equivalent", "verdict", "why")},
        "data": read.digest(pair, metric.name),
        "most_seeds": None,
        "runs": judged.contrast.runs,
        "diverged": judged.contrast.diverged,
        "reference_diverged": judged.contrast.reference_diverged,
    }


def letters(names: Sequence[str], apart: Sequence[Pair]) -> list[tuple[str, list[str]]]:
    """(letter, its names) for each group; [] if there would be more than `MOST_GROUPS`.

    Args:
        names: the best first; letters are given in this order.
        apart: pairs that must share no letter. All other pairs share one.
    """
    place = {name: i for i, name in enumerate(names)}
    differ = sorted(sorted((place[a], place[b])) for a, b in apart if a in place and b in place)
    groups = [(1 << len(names)) - 1] if names else []  # sets of places, as bits
    for i, j in differ:
        both = 1 << i | 1 << j
        split = [group & ~(1 << one) for group in groups if group & both == both for one in (i, j)]
        kept = [group for group in groups if group & both != both]
        for group in split:  # absorb what is part of another group
            if not any(group & other == group for other in kept):
                kept = [other for other in kept if other & group != other]
                kept.append(group)
        groups = kept
        if len(groups) > MOST_GROUPS:
            return []
    members = sorted([i for i in range(len(names)) if group >> i & 1] for group in groups)
    return [(_letter(k), [names[i] for i in group]) for k, group in enumerate(members)]


def _letter(k: int) -> str:
    """a to z, A to Z, then a2, b2 ..."""
    alphabet = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return alphabet[k % 52] + (str(k // 52 + 1) if k >= 52 else "")
