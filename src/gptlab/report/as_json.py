"""A report as JSON for programs: everything that the page has, in rows that each name their study.

Keys may be added, and are never renamed. An unknown number is null.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptlab.report.estimates import Plain

NO_GROUPS: Plain = {"pairs": [], "groups": []}
ROWS = ("recommendations", "failures", "runs")  # lists of a study that become lists of the report


def as_json(payload: Mapping[str, Any]) -> Plain:
    """The payload of a report in its JSON shape.

    * arms: `study`, `arm`, then `n`, `mean`, `sd`, `low`, `high` of the study's metric (null without a value), and the
      arm's other numbers.
    * comparisons: `study`, `a`, `b`, `difference` (a minus b), `low`, `high`, `p`, `p_adjusted`, `verdict` of a against
      b: better, worse, equivalent, not resolved, diverges or not run. Where b diverges and a does not it is not
      resolved, and `reference_diverged` has the counts. `question` is the question's id, or null for an arm against the
      baseline; `asked_in` is the study or the comparison file that asks.
    * groups: of arms that cannot be told apart, where all pairs were compared: `study`, `letter`, `arms`. Pairs without
      the baseline are comparisons like the others.
    * questions, recommendations, failures, runs (with curves as [step, loss] pairs): as the page has them.
    * laws: of studies with a ladder, there only: each arm's laws and points, and pairs of arms at the sizes asked for.
    * studies: what else is known of each; across: of a comparison of two studies, or null.

    Args:
        payload: as `analyse` returns it.
    """
    studies, across = payload["studies"], payload["across"]
    asked = [*studies, across] if across else studies
    rows: dict[str, list[Plain]] = {
        key: [{"study": of["name"]} | row for of in asked for row in of.get(key, ())] for key in ROWS
    }
    moved = ("arms", "questions", "laws", *ROWS)
    return {
        "arms": [_arm(study["name"], arm) for study in studies for arm in study["arms"]],
        "comparisons": [
            *(
                _comparison(a["comparison"], None, study["name"])
                for study in studies
                for a in study["arms"]
                if a["comparison"]
            ),
            *(
                _comparison(row, None, study["name"])
                for study in studies
                for row in (study["groups"] or NO_GROUPS)["pairs"]
            ),
            *(
                _comparison(row, q["id"], of["name"])
                for of in asked
                for q in of["questions"]
                for row in q["comparisons"]
            ),
        ],
        "questions": [
            {"study": of["name"]} | {key: value for key, value in question.items() if key != "comparisons"}
            for of in asked
            for question in of["questions"]
        ],
        "groups": [
            {"study": study["name"]} | group for study in studies for group in (study["groups"] or NO_GROUPS)["groups"]
        ],
        "recommendations": rows["recommendations"],
        "warnings": payload["warnings"],
        "failures": rows["failures"],
        "across": across and {key: value for key, value in across.items() if key not in moved},
        "studies": [
            {key: value for key, value in study.items() if key not in moved}
            | {"groups": study["groups"] and {k: v for k, v in study["groups"].items() if k != "pairs"}}
            for study in studies
        ],
        **{key: value for key, value in payload.items() if key not in ("warnings", "across", "studies")},
        **(
            {"laws": found}
            if (found := [{"study": of["name"]} | of["laws"] for of in studies if of.get("laws")])
            else {}
        ),
        "runs": rows["runs"],
    }


def _arm(study: str, arm: Mapping[str, Any]) -> Plain:
    quality = arm["quality"] or {}
    numbers = {key: quality.get(key) for key in ("mean", "sd", "low", "high")}
    others = {key: value for key, value in arm.items() if key not in ("name", "quality", "comparison")}
    return {"study": study, "arm": arm["name"], "n": quality.get("n", 0), **numbers, **others}


def _comparison(row: Mapping[str, Any], question: str | None, asked_in: str) -> Plain:
    verdict = "not resolved" if row["verdict"] == "reference diverges" else row["verdict"]
    first = {"study": row["study"], "a": row["a"], "b": row["b"], "question": question, "asked_in": asked_in}
    first |= {
        "difference": row["mean"],
        "low": row["low"],
        "high": row["high"],
        "p": row["p"],
        "p_adjusted": row["p_holm"],
    }
    return (
        first
        | {"verdict": verdict}
        | {key: value for key, value in row.items() if key not in ("mean", "p_holm", *first, "verdict")}
    )
