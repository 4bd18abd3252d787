"""The arm and the seed of a run by its name, path and settings, and what metrics are called."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

from gptlab.errors import UserError
from gptlab.files import printable
from gptlab.logs.run import How, LogRun

SEEDS = ("seed", "random_seed", "rng_seed", "training_seed")
VALIDATION = ("val_loss", "eval_loss", "validation_loss", "valid_loss")  # names of one thing
METRICS = (*VALIDATION, "test_loss", "loss", "train_loss")  # from the one most worth judging by
HIGHER = re.compile(
    r"(^|_)(acc|accuracy|f1|score|bleu|rouge|auc|auroc|reward|return|hellaswag|(win|pass|success)_rate"
    r"|recall|ndcg|mrr|iou|exact_match)(_|$)"
)
LOWER = re.compile(r"(^|_)(loss|nll|ppl|perplexity|bpb|bits_per_byte|error|wer|mse|mae)(_|$)")
# settings that tell runs apart and say nothing of what was trained
PLACES = re.compile(
    r"(.*_)?((random_|rng_|training_)?seed|dir|path|file|folder|url|host|hostname|time|date|timestamp)"
    r"|(run_|exp_|experiment_|job_)?(name|id)|wandb.*|project|entity|group|tags|notes?|description|_.*"
)
# last parts of a path that say nothing about a run
GENERIC = re.compile(
    r"((metrics|logs?|main|train|training|trainer_state|history|out|output|outputs|results?|stdout|wandb|tensorboard)"
    r"(\.\w+)*|checkpoint-\d+|events\.out\.tfevents.*|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12})"
)
ENDING = re.compile(r"\.(csv|tsv|jsonl|ndjson|json|parquet|log|txt|out)(\.(gz|zst|bz2|xz))?$")
MOST_NAMED = 5  # arms in a remark


@lru_cache(4096)
def plain(name: str) -> str:
    """A column's or metric's name without regard to case and punctuation: `Val Loss` and val/loss are val_loss."""
    return re.sub(r"[\s/.:@-]+", "_", name.strip().lower())


def is_metric(name: str) -> bool:
    """Whether a name is one of what runs are judged by, as far as names tell."""
    return LOWER.search(plain(name)) is not None or HIGHER.search(plain(name)) is not None


def better_of(metric: str) -> Literal["lower", "higher"]:
    """Which direction of a metric is better, by its name."""
    name = plain(metric)
    return "higher" if HIGHER.search(name) and "loss" not in name else "lower"


def arm_and_seed(parts: Sequence[str]) -> tuple[tuple[str, ...], int] | None:
    """The parts of a path without its seed, and the seed; None if no part has one.

    A seed is said in any part (`adamw_seed0`, `seed0`, `adamw-s0`), or is all of the last one (`adamw/0`).
    """
    for i in reversed(range(len(parts))):
        match = re.fullmatch(r"(.*?)[ _.-]*(?<![a-zA-Z])seed[ _=-]*(\d{1,18})(?!\d)(.*)", parts[i], re.IGNORECASE)
        match = match or re.fullmatch(r"(.+)[_.-]s(\d{1,6})()", parts[i])
        if match is None and i and i == len(parts) - 1:
            match = re.fullmatch(r"()s?(\d{1,6})()", parts[i])
        if match is not None:
            arm = "_".join(filter(None, (match[1], match[3].strip(" _.-"))))
            return (*parts[:i], *filter(None, [arm]), *parts[i + 1 :]), int(match[2])
    return None


def name_runs(runs: list[LogRun], how: How) -> list[str]:
    """Give each run an arm and a seed that no other run has. Returns what was guessed, one sentence each.

    In this order: what the log says; --arm-from; a seed in the run's name or path; the settings in which runs differ;
    a number at the end of names; names and folders. Runs without a seed are numbered. Of equal runs one is kept.

    Raises:
        UserError: two different runs have one arm and seed, or an option fits no run.
    """
    for run in runs:
        _from_settings(run, how)
    if how.arm and all(run.arm is None for run in runs):
        known = ", ".join(sorted({printable(name) for run in runs for name in run.settings})[:20]) or "none"
        raise UserError(f"no log has a column or setting {how.arm!r}, which --arm names; the settings are {known}")
    if how.arm_from:
        _by_pattern([run for run in runs if run.arm is None], how.arm_from)
    remarks = list[str]()
    for what, rule in (
        ("the seeds in their names", _by_name),
        ("the settings in which runs differ", _by_settings),
        ("the numbers at the end of their names", _by_number),
        ("their names", _by_place),
    ):
        todo = [run for run in runs if run.arm is None]
        rule(todo)
        if named := [run for run in todo if run.arm is not None]:
            arms = list(dict.fromkeys(printable(run.arm or "") for run in named))
            more = f" and {len(arms) - MOST_NAMED} more" if len(arms) > MOST_NAMED else ""
            remarks.append(f"arms of {_count(named)} by {what}: {', '.join(arms[:MOST_NAMED])}{more}")
    for run in runs:
        run.arm = " ".join(str(run.arm).split())  # it is said in one line
    runs.sort(key=lambda run: (str(run.arm), run.seed is None, run.seed or 0, str(run.source), run.name))
    return [*remarks, *_number_runs(runs), *_drop_twins(runs)]


def _count(runs: Sequence[Any]) -> str:
    return f"{len(runs)} run{'s' * (len(runs) != 1)}"


def _from_settings(run: LogRun, how: How) -> None:
    if run.arm is None and how.arm in run.settings:
        run.arm = str(run.settings[how.arm])
    for name, value in run.settings.items():
        of_seed = name == how.seed if how.seed else plain(name.rpartition(".")[2]) in SEEDS
        if run.seed is None and of_seed and isinstance(value, int) and not isinstance(value, bool):
            run.seed = value


def _by_pattern(runs: Sequence[LogRun], text: str) -> None:
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise UserError(f"--arm-from {text!r} is not a regular expression: {error}") from None
    for run in runs:
        where = run.source.as_posix() + f"/{run.name}" * bool(run.name)
        if (match := pattern.search(where)) is None:
            raise UserError(f"--arm-from {text!r} does not match {where}")
        named = match.groupdict()
        unnamed = [value for i, value in enumerate(match.groups(), 1) if i not in pattern.groupindex.values()]
        run.arm = named["arm"] if "arm" in named else unnamed[0] if unnamed else match[0]
        if not run.arm:
            raise UserError(f"--arm-from {text!r} finds no arm in {where}")
        if seed := named.get("seed"):
            if not re.fullmatch(r"\d{1,18}", seed):
                raise UserError(f"--arm-from {text!r}: the group seed is {seed!r} in {where} and must be a number")
            run.seed = int(seed)


def _path_of(run: LogRun) -> tuple[str, ...]:
    """The parts of a run's name, or of its path, that may say something."""
    if run.name:
        return tuple(filter(None, run.name.split("/")))
    *parts, last = run.source.absolute().parts[1:]
    parts = [*parts, ENDING.sub("", last)]
    while len(parts) > 1 and GENERIC.fullmatch(parts[-1]):
        parts.pop()
    return tuple(parts)


def _set_shortest(runs: Sequence[LogRun], paths: Sequence[tuple[str, ...]]) -> None:
    """Name each run by as few of the last parts of its path as tell different paths apart."""
    different, count = set(paths), 1
    while len({path[-count:] for path in different}) < len(different):
        count += 1
    for run, path in zip(runs, paths, strict=True):
        run.arm = "/".join(path[-count:]) or "run"


def _by_name(runs: Sequence[LogRun]) -> None:
    found = [(run, split) for run in runs if (split := arm_and_seed(_path_of(run)))]
    for run, (_, seed) in found:
        run.seed = seed if run.seed is None else run.seed
    _set_shortest([run for run, _ in found], [path for _, (path, _) in found])


def _by_settings(runs: Sequence[LogRun]) -> None:
    if not runs or not all(run.settings for run in runs):
        return
    names = dict.fromkeys(name for run in runs for name in run.settings)
    values = {name: [_shown(run.settings.get(name)) for run in runs] for name in names}
    differ = [name for name in names if len(set(values[name])) > 1 and not PLACES.fullmatch(plain(name))]
    last = Counter(name.rpartition(".")[2] for name in differ)
    for i, run in enumerate(runs if differ else ()):
        short = {name: name if last[name.rpartition(".")[2]] > 1 else name.rpartition(".")[2] for name in differ}
        run.arm = ",".join(f"{short[name]}={values[name][i]}" for name in differ)
    if not differ and len({run.seed for run in runs}) == len(runs) > 1 and None not in {run.seed for run in runs}:
        same = _path_of(runs[0])[:-1] if not runs[0].name else ()
        for run in runs:  # one arm with several seeds
            run.arm = same[-1] if same else "run"


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _by_number(runs: Sequence[LogRun]) -> None:
    found = []
    for run in runs:
        *before, last = _path_of(run)
        match = re.fullmatch(r"(.+?)[ _.-](\d{1,6})", last)
        if match and run.seed in (None, int(match[2])):
            found.append((run, (*before, match[1]), int(match[2])))
    arms = Counter(path for _, path, _ in found)
    found = [one for one in found if arms[one[1]] > 1]
    for run, _, seed in found:
        run.seed = seed
    _set_shortest([run for run, _, _ in found], [path for _, path, _ in found])


def _by_place(runs: Sequence[LogRun]) -> None:
    paths = [_path_of(run) for run in runs]
    folders = Counter(path[:-1] for path in paths)
    if len(folders) > 1 and min(folders.values()) > 1 and not any(run.name for run in runs):
        paths = [path[:-1] for path in paths]  # a folder of runs for each arm
    _set_shortest(runs, paths)


def _number_runs(runs: Sequence[LogRun]) -> list[str]:
    """Take the seeds of runs whose arm is known from their names, and number what is left, arm by arm."""
    by_name = 0
    for run in runs:
        if run.seed is None and (split := arm_and_seed(_path_of(run))) is not None:
            run.seed = split[1]
            by_name += 1
    remarks = [f"seeds of {by_name} run{'s' * (by_name != 1)} by their names"] if by_name else []
    taken = {(run.arm, run.seed) for run in runs}
    todo = [run for run in runs if run.seed is None]
    for run in todo:
        run.seed = next(k for k in range(len(runs)) if (run.arm, k) not in taken)
        run.counted = True
        taken.add((run.arm, run.seed))
    if todo:
        remarks.append(f"{_count(todo)} without a seed numbered from 0: pairing by seed then means nothing")
    return remarks


def _drop_twins(runs: list[LogRun]) -> list[str]:
    """Leave out a run that is there twice. Raises UserError for two different runs of one arm and seed."""
    first: dict[tuple[str | None, int | None], LogRun] = {}
    remarks, kept = [], []
    for run in runs:
        other = first.setdefault((run.arm, run.seed), run)
        if other is run:
            kept.append(run)
            continue
        one, two = (f"{one.source}{f' ({one.name})' if one.name else ''}" for one in (other, run))
        if not _equal(other, run):
            raise UserError(
                f"{one} and {two} are both {run.arm} seed {run.seed}: name what tells them apart with --arm or --seed "
                "(a column or setting) or --arm-from (a part of the path), or give one of them"
            )
        remarks.append(f"{two} is left out: it equals {one}")
    runs[:] = kept
    return remarks


def _equal(one: LogRun, two: LogRun) -> bool:
    def content(run: LogRun) -> dict[str, bytes]:
        curves = {name: x.tobytes() + y.tobytes() for name, (x, y) in run.curves.items()}
        return {**curves, **{f"result {name}": repr(value).encode() for name, value in run.result.items()}}

    return content(one) == content(two)
