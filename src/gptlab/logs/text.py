"""Text logs, read line by line with regular expressions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from gptlab import files
from gptlab.errors import DataError
from gptlab.logs.run import How, LogRun, Unclear, curve

NUMBER = r"[-+]?(?:[0-9]+\.?[0-9]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+|nan|inf)"
EXAMPLE = r"--pattern 'step (?P<step>\d+) .*val_loss (?P<val_loss>[\d.]+)'"
ENDINGS = (".log", ".txt", ".out")


def _compiled(*texts: str) -> list[re.Pattern[str]]:
    """Patterns in which `<name>` stands for a number of this name."""
    return [re.compile(re.sub(r"<(\w+)>", rf"(?P<\1>{NUMBER})", text)) for text in texts]


# What a pattern finds in a line without a step belongs to the last step that was found.
SHIPPED = {
    "nanogpt": _compiled(
        r"\bstep <step>: train loss <train_loss>, val loss <val_loss>",
        r"\biter <step>: loss <loss>, time <time_ms>ms(?:, mfu <mfu>%)?",
    ),
    "build-nanogpt": _compiled(
        r"^<step> val <val_loss>$", r"^<step> train <train_loss>$", r"^<step> hella <hellaswag>$"
    ),
    "llm.c": _compiled(
        r"^s:<step> tel:<val_loss>",
        r"^s:<step> trl:<train_loss>(?: lr:<lr>)?(?: norm:<norm>)?",
        r"^s:<step> eval:<hellaswag>",
        r"\bstep +<step>/\d+ \| loss <train_loss> .*?\| norm <norm> .*?\| lr <lr>",
        r"\bval loss <val_loss>",
        r"\bHellaSwag: \d+/\d+ = <hellaswag>",
    ),
    "modded-nanogpt": _compiled(
        r"\bstep:<step>/\d+ (?:(?=.*\bval_loss:<val_loss>))?(?:(?=.*\btrain_loss:<train_loss>))?"
        r"(?:(?=.*\btrain_time:<train_time_ms>ms))?(?:(?=.*\bstep_avg:<step_avg_ms>ms))?"
    ),
}


def is_mine(path: Path) -> bool:
    name = re.sub(r"\.(gz|zst|bz2|xz)$", "", path.name.lower())
    return name.endswith(ENDINGS) and path.is_file()


def read(path: Path, how: How) -> list[LogRun]:
    """The run of a text file; several where the pattern has the groups `arm` and `seed`.

    Raises:
        Unclear: --pattern is no regular expression, or has no group `step`.
        DataError: the file cannot be read, or no line matches.
    """
    asked = {how.pattern: _asked(how.pattern)} if how.pattern else SHIPPED
    runs, matched = dict[str, list[LogRun]](), dict[str, int]()
    try:
        with files.open_regular(path) as raw:
            files.refuse_pointer(path, raw.peek(64)[:64], DataError)
            lines = [line.decode("utf-8", errors="replace").rstrip("\r\n") for line in files.unpacked_lines(raw)]
    except OSError as error:
        raise DataError(f"{path} cannot be read: {files.because(error)}") from None
    for name, patterns in asked.items():
        runs[name], matched[name] = _read(path, lines, patterns)
    best = max(matched, key=lambda name: matched[name])
    if not matched[best] or not runs[best]:
        if how.pattern:
            raise DataError(f"{path}: no line matches --pattern {how.pattern}")
        raise DataError(f"{path}: no line is known; a pattern names its numbers: {EXAMPLE}")
    if not how.pattern:
        runs[best][0].remarks.append(f"text logs are read by --pattern {best}")
    return runs[best]


def _asked(text: str) -> list[re.Pattern[str]]:
    if text in SHIPPED:
        return SHIPPED[text]
    try:
        pattern = re.compile(text)
    except re.error as error:
        known = ", ".join(SHIPPED)
        raise Unclear(f"--pattern {text!r} is not one of {known} nor a regular expression: {error}") from None
    if "step" not in pattern.groupindex or len(set(pattern.groupindex) - {"step", "arm", "seed"}) < 1:
        raise Unclear(f"--pattern {text!r} must name the groups step and a metric, as in {EXAMPLE}")
    return [pattern]


def _read(path: Path, lines: Sequence[str], patterns: Sequence[re.Pattern[str]]) -> tuple[list[LogRun], int]:
    """The runs that patterns find in lines, and how many lines match one."""
    points: dict[tuple[str, str], dict[str, tuple[list[float], list[float]]]] = {}
    odd = Counter[str]()
    step, matched = 0.0, 0
    for line in lines:
        for pattern in patterns:
            if (match := pattern.search(line)) is None:
                continue
            matched += 1
            found = match.groupdict()
            if "step" in found:
                step = _number(found.pop("step") or "")
            run = points.setdefault((found.pop("arm", None) or "", found.pop("seed", None) or ""), {})
            for name, text in found.items():
                if text is None:
                    continue
                value = _number(text)
                if value != value and text.lower().lstrip("+-") not in ("nan", "inf"):
                    odd[name] += 1
                steps, values = run.setdefault(name, ([], []))
                steps.append(step)
                values.append(value)
            break
    runs = []
    for (arm, seed), found_curves in points.items():
        if found_curves:
            curves = {name: curve(*xy) for name, xy in found_curves.items()}
            run_seed = int(seed) if seed.isdecimal() else None
            runs.append(LogRun(path, "text", curves, arm or None, run_seed, name="" if seed.isdecimal() else seed))
    if runs:
        runs[0].remarks += [f"{path}: {count} values of {name} are no numbers" for name, count in odd.items()]
    return runs, matched


def _number(text: str) -> float:
    """A number, NaN for infinity and for what is none."""
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        return float("nan")
    return value if abs(value) < float("inf") else float("nan")
