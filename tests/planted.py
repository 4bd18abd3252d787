"""Study folders with planted results, as a runner leaves them, to try whole reports on known truths."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from gptlab.config import Study, load_study

MACHINE = {"device_name": "a machine", "torch": "2.13.0", "git_commit": "abc", "data": {}}
LINES = 20  # of metrics.jsonl, evenly spaced

PerSeed = float | Sequence[float]


def planted(
    folder: Path,
    study: Study | str,
    values: Mapping[str, Sequence[float | None]],
    speeds: Mapping[str, PerSeed] | None = None,
    memory: Mapping[str, PerSeed] | None = None,
    diverged: Mapping[tuple[str, int], int] | None = None,
) -> Path:
    """Write a study's folder: study.toml, and each run's result, summary, environment and metrics.

    Args:
        folder: is created.
        study: a study, or the name of a shipped one.
        values: arm to its metric in the study's seeds and further ones, in order; None, and an arm that is left out,
            means no run.
        speeds: arm to tokens (or samples) per second, of all its runs or of each; default 1,000.
        memory: arm to peak memory in GB, likewise; default 10.
        diverged: (arm, seed) of runs that diverged to the step at which they did.

    Returns:
        The folder, for `read_study_folder`.
    """
    study = load_study(study) if isinstance(study, str) else study
    folder.mkdir(parents=True)
    (folder / "study.toml").write_text(study.to_toml(), encoding="utf-8")
    classify = study.recipe.get("task") == "classify"
    unit, steps = "samples" if classify else "tokens", study.build(study.baseline, 0).train.max_steps or 100
    for arm, row in values.items():
        seeds = [*study.seeds, *range(max(study.seeds) + 1, max(study.seeds) + 1 + len(row))]
        for i, value in enumerate(row):
            if value is None:
                continue
            seed, speed, most = seeds[i], _of(speeds, arm, i, 1000.0), _of(memory, arm, i, 10.0)
            failed = (diverged or {}).get((arm, seed))
            last = steps if failed is None else failed
            result = {"status": "completed", "steps": last, unit: last * 1000, study.metric.name: value}
            result |= {f"{unit}_per_second": speed, "peak_memory_gb": most, "time_per_iter_ms": 1e6 / speed}
            if failed is not None:
                result |= {
                    "status": "diverged",
                    "failed_at_step": failed,
                    "failure": "non_finite",
                    "reason": "no number",
                }
            run = folder / f"{arm}_seed{seed}"
            run.mkdir()
            at = sorted({max(1, last * (k + 1) // LINES) for k in range(LINES)})
            lines = [{"step": s, "loss": 3 + 7 / s, f"{unit}_per_second": speed} for s in at]
            (run / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8")
            (run / "environment.json").write_text(json.dumps(MACHINE), encoding="utf-8")
            (run / "result.json").write_text(json.dumps(result), encoding="utf-8")
            summary = {"study": study.name, "arm": arm, "group": study.arms[arm].group, "seed": seed, **result}
            (folder / f"{run.name}.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


def _of(given: Mapping[str, PerSeed] | None, arm: str, i: int, default: float) -> float:
    value = (given or {}).get(arm, default)
    return float(value) if isinstance(value, int | float) else value[i]
