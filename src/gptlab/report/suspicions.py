"""What makes logged runs doubtful, as sentences; each names the runs and what to check.

Of forty honest sets of runs at most two are warned of (tests/test_report_suspicions.py, which simulates the rate). Of a
set that is warned of nothing more is known than the sentence says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from gptlab.logs.divergence import diverged as diverged
from gptlab.logs.run import LogRun
from gptlab.report import doubtful_runs as of_runs
from gptlab.report import doubtful_values as of_values
from gptlab.report.judged import Judged


def suspicions(
    runs: Sequence[LogRun],
    metric: str,
    better: str,
    at: str,
    values: Mapping[tuple[str, int], float],
    arms_declared: int | None = None,
    targets: Sequence[float] = (),
) -> list[str]:
    """Warnings about the runs of a judgement, the gravest first; empty where nothing is wrong.

    Args:
        runs: with arm and seed.
        metric: by which the arms are judged.
        better: lower or higher.
        at: where on its curve a run is judged: last, common, best, or a step.
        values: what each run is judged by, by arm and seed; runs without a value are left out.
        arms_declared: arms that were planned; None: not known.
        targets: values of the metric that the judgement asks about.
    """
    judged = Judged(runs, metric, better, at, values, arms_declared, targets)
    rules = (
        of_values.same_runs,
        of_values.repeated_values,
        of_values.one_seed,
        of_values.copied_arms,
        of_values.small_spreads,
        of_runs.best_among_last,
        of_runs.divergences,
        of_runs.cut_short,
        of_runs.lengths,
        of_runs.other_data,
        of_runs.other_settings,
        of_runs.more_arms,
        of_runs.stopped_at_target,
        of_runs.missing_runs,
        of_values.sixteen_bits,
        of_values.rounded,
        of_runs.not_finite,
        of_runs.rising,
    )
    with np.errstate(all="ignore"):  # logs hold values near the largest float
        return [sentence for rule in rules for sentence in rule(judged)]
