"""Rules for runs that are not alike, not whole, or were chosen by what they show.

Each rule is a function that returns sentences.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from statistics import median

import numpy as np

from gptlab.logs.divergence import EMPTY, plain, training_losses
from gptlab.logs.run import Array, Curve
from gptlab.report import repeats
from gptlab.report.judged import Judged, listed, pooled_sd
from gptlab.report.reading import number
from gptlab.report.words import counted, one_line

SAME_LENGTH = 0.01  # steps that differ by less count as the same
RISE, RISE_WOBBLES, RISE_SDS = 0.05, 6.0, 5.0  # of what has been learnt, of the wobble, between seeds
DATA = re.compile(
    r"(train_|val_|eval_)?(data|dataset|corpus|tokenizer|task)(_name|_path|_dir|_files?|_fingerprint|_sha256|_hash)?"
    r"|fingerprint|sha256|block_size|seq_len(gth)?|sequence_length|context_length|max_(seq_)?length"
)
TOKENS = ("tokens", "train_tokens", "tokens_seen", "num_input_tokens_seen", "num_tokens", "consumed_tokens")
OF_A_RUN = re.compile(r"seed|(^|_)(id|pid|port|rank|time|timestamp|date|run|host|wall)(_|$)")  # differs between seeds


# -- where on its curve a run is judged


def best_among_last(judged: Judged) -> Iterator[str]:
    """Values that are the best of a run's curve where the last was asked for."""
    if judged.at != "last":
        return
    found = []
    for i, (_, values) in enumerate(judged.curves):
        value = judged.values.get((judged.runs[i].arm or "", judged.runs[i].seed or 0))
        if value is None or len(values) < 2 or i in judged.lost or value == values[-1]:
            continue
        last, best = values[-1] * judged.sign, (values * judged.sign).min()
        slack = 0.5 * judged.steps[judged.runs[i].arm or ""] * (1 + 1e-6)
        if abs(value * judged.sign - best) <= slack and last - best > 2 * slack:
            found.append(f"{judged.name(i)} ({value:.6g}; its curve ends at {values[-1]:.6g})")
    if found:
        yield (
            f"The value is the best of the run, not the last: {listed(found)}. The best of noisy evaluations is "
            "too good: take the last of all runs."
        )


def divergences(judged: Judged) -> Iterator[str]:
    for i, found in list(judged.lost.items())[:5]:
        rule = {"non_finite": "not finite", "unknown": "by its log"}.get(found.kind, found.kind)
        at = f" at step {found.step}" if judged.runs[i].curves else ""
        yield f"{judged.name(i)} diverged{at} ({rule}): {found.reason}."
    if len(judged.lost) > 5:
        yield f"{judged.names([*judged.lost][5:])} diverged, too."


def cut_short(judged: Judged) -> Iterator[str]:
    """Runs that did not end, that end before the others of their arm, or go on after the last value of the metric."""
    status = [
        f"{judged.name(i)} ({run.status.replace('_', ' ')})"
        for i, run in enumerate(judged.runs)
        if i not in judged.lost and run.status not in ("completed", "diverged")
    ]
    if status:
        yield f"Runs did not complete: {listed(status)}. Finish them, or leave them out of every arm alike."
    short = [
        f"{judged.name(i)} ends at step {judged.ends[i]:g} and the others of its arm at {end:g}"
        for arm, end in judged.usual_ends.items()
        for i in judged.arms[arm]
        if judged.runs[i].status == "completed" and _longer(end, judged.ends.get(i, end))
    ]
    if short and judged.at not in ("common",):
        yield f"Runs end early: {listed(short)}. Finish them, or judge at a step that all reached."
    late = []
    for i, end in judged.ends.items():
        steps, _ = judged.curves[i]
        trained, _ = training_losses(judged.runs[i])
        if len(steps) > 2 and len(trained) and trained[-1] - end > 1.5 * float(np.diff(steps).max()):
            late.append(f"{judged.name(i)} (last value at step {end:g} of {trained[-1]:g})")
    if late and judged.at == "last":
        yield f"Runs go on after the last {judged.metric}: {listed(late)}. Check that no evaluation was left out."


def _longer(one: float, other: float) -> bool:
    return one - other > SAME_LENGTH * abs(one)


def not_finite(judged: Judged) -> Iterator[str]:
    found = []
    for i, run in enumerate(judged.runs):
        _, values = run.curves.get(judged.metric, EMPTY)
        gone = len(values) - len(judged.curves[i][1])
        if gone and i not in judged.lost:
            found.append(f"{judged.name(i)} ({counted(gone, 'point')})")
    if found:
        yield f"The {judged.metric} is not finite in between: {listed(found)}. Check whether the log or the run broke."


def in_blocks(steps: Array, values: Array) -> Curve:
    """A curve of at most 40 points: of more, medians of blocks. The lowest of 10,000 noisy losses says nothing."""
    size = max(1, len(steps) // 20)
    first = len(steps) % size
    blocks = (np.median(column[first:].reshape(-1, size), axis=1) for column in (steps, values))
    return next(blocks), next(blocks)


def rising(judged: Judged) -> Iterator[str]:
    """Runs that end above their best: the last three by 6 wobbles, 5 sds of seeds' bests and 5% of what was learnt.

    Of a curve with more than 40 points, its blocks count.

    Honest runs end so in less than one set in a thousand; a run that overfits does, and one that begins to diverge.
    """
    bests = [
        [float((judged.sign * judged.curves[i][1]).min()) for i in own if i in judged.ends]
        for own in judged.arms.values()
    ]
    found, between = [], np.nan_to_num(pooled_sd(bests)[0])
    for i in judged.ends:
        steps, values = in_blocks(*judged.curves[i])
        wobble, least = repeats.late_wobble(steps, values), judged.sign * values
        if not math.isfinite(wobble):
            continue
        best = int(least.argmin())
        above = float(least[-3:].min() - least[best])
        if above > max(RISE_WOBBLES * wobble, RISE_SDS * between, RISE * float(least[0] - least[best])):
            ends = f"{values[best]:.4g} at step {steps[best]:g}, {values[-1]:.4g} at {steps[-1]:g}"
            found.append(f"{judged.name(i)} ({ends})")
    if found:
        told = (
            ""
            if all(len(training_losses(judged.runs[i])[0]) for i in judged.ends)
            else ", which only training losses tell"
        )
        yield (
            f"Runs end worse than their best: {listed(found)}. They overfit, or began to diverge{told}: look at the "
            "curves, and state beforehand where runs are judged."
        )


# -- runs that are not alike


def lengths(judged: Judged) -> Iterator[str]:
    """Arms that end at different steps, or after different numbers of tokens, and are compared at their ends."""
    if judged.at not in ("last", "best"):
        return
    ends = judged.usual_ends
    if ends and _longer(max(ends.values()), min(ends.values())):
        texts = [f"{one_line(arm)} at {end:g}" for arm, end in sorted(ends.items(), key=lambda item: item[1])]
        told = listed(texts) if len(texts) < 5 else f"{texts[0]}, others up to {texts[-1]}"
        how = "the steps to the target" if judged.targets else "--at common, or the steps to a --target"
        yield f"Arms end at different steps: {told}. Judge them by {how}."
        return
    tokens = {arm: median(own) for arm, indices in judged.arms.items() if (own := [*_tokens(judged, indices)])}
    if tokens and _longer(max(tokens.values()), min(tokens.values())):
        texts = [f"{one_line(arm)} {count:g}" for arm, count in sorted(tokens.items(), key=lambda item: item[1])]
        yield f"Arms were trained on different numbers of tokens: {listed(texts)}. Compare them at equal cost."


def _tokens(judged: Judged, indices: Iterable[int]) -> Iterator[float]:
    for i in indices:
        run = judged.runs[i]
        found = [curve[1][-1] for name, curve in run.curves.items() if plain(name) in TOKENS and len(curve[1])]
        found += [number(value) for name, value in run.result.items() if plain(name) in TOKENS]
        if found and math.isfinite(found[0]) and i not in judged.lost:
            yield float(found[0])


def other_data(judged: Judged) -> Iterator[str]:
    """Settings that say which data a run read, and differ."""
    known: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i, run in enumerate(judged.runs):
        for key, value in run.settings.items():
            last = plain(key.rsplit(".", 1)[-1])
            if isinstance(value, str | int) and (DATA.fullmatch(last) or DATA.fullmatch(plain(key))):
                known[key][str(value).rstrip("/").rsplit("/", 1)[-1]].append(i)
    for key, groups in known.items():
        if len(groups) > 1:
            texts = [f"{one_line(value)} in {_arms_of(judged, indices)}" for value, indices in groups.items()]
            yield f"Runs read different data: {key} is {listed(texts)}. Compare runs of the same data."


def _arms_of(judged: Judged, indices: Sequence[int]) -> str:
    """Whole arms by their names, other runs by their own."""
    chosen, names = set(indices), list[str]()
    for arm, own in judged.arms.items():
        if chosen.issuperset(own):
            names.append(one_line(arm))
        else:
            names += [judged.name(i) for i in own if i in chosen]
    return listed(names)


def other_settings(judged: Judged) -> Iterator[str]:
    """Numbers in the settings that differ between the seeds of one arm."""
    found = []
    for arm, indices in judged.arms.items():
        settings = [judged.runs[i].settings for i in indices]
        for key in dict.fromkeys(key for one in settings for key in one):
            own = {value for one in settings if math.isfinite(value := number(one.get(key)))}
            last = plain(key.rsplit(".", 1)[-1])
            if len(own) > 1 and not OF_A_RUN.search(last) and not DATA.fullmatch(last) and last not in TOKENS:
                found.append(f"{key} is {listed([f'{value:g}' for value in sorted(own)], 3)} in {one_line(arm)}")
    if found:
        yield f"Seeds of one arm have different settings: {listed(found)}. Check that they belong together."


# -- runs that were chosen


def more_arms(judged: Judged) -> Iterator[str]:
    if judged.arms_declared is not None and len(judged.arms) > judged.arms_declared:
        yield (
            f"{len(judged.arms)} arms were logged and {judged.arms_declared} declared. An arm that is asked about "
            "because it looked good on these runs wins by chance: judge all arms, or give it seeds that were not seen."
        )


def stopped_at_target(judged: Judged) -> Iterator[str]:
    """Arms that end where they first pass: each run at its own first crossing, or all at that of the mean.

    A run that stops there is one of a lucky evaluation. The first needs three runs that end at two steps at least; the
    second a target, and an arm that goes on for longer.
    """
    own, together = list[str](), list[str]()
    longest = max(judged.usual_ends.values(), default=0.0)
    for arm, indices in judged.arms.items():
        curves = [judged.curves[i] for i in indices if i in judged.ends and len(judged.curves[i][0]) > 1]
        if not curves:
            continue
        stops = sorted({steps[-1] for steps, _ in curves})
        last = max(judged.sign * values[-1] for _, values in curves)
        before = min(float((judged.sign * values[:-1]).min()) for _, values in curves)
        if len(curves) > 2 and len(stops) > 1 and last < before:
            own.append(f"{one_line(arm)} (steps {stops[0]:g} to {stops[-1]:g})")
        elif len(curves) > 1 and len(stops) == 1 and len({len(steps) for steps, _ in curves}) == 1:
            mean = judged.sign * np.mean([values for _, values in curves], axis=0)
            passed = [t for t in judged.targets if mean[-1] <= judged.sign * t < mean[:-1].min()]
            if passed and _longer(longest, stops[0]):
                together.append(f"{one_line(arm)} (step {stops[0]:g}, target {passed[0]:g})")
    if own:
        yield (
            f"Each run ends at its best, beyond all that any run had before: {listed(own)}. Runs that stop at a target "
            "are stopped by luck: choose the step beforehand."
        )
    if together:
        yield (
            f"Arms end at the first evaluation whose mean passes, others go on: {listed(together)}. A step that was "
            "chosen on these runs passes by luck: repeat it with seeds that were not seen."
        )


def missing_runs(judged: Judged) -> Iterator[str]:
    """Seeds that others have, or that a row of numbers lacks, and arms with fewer runs than most."""
    seeds = {arm: {judged.runs[i].seed or 0 for i in indices} for arm, indices in judged.arms.items()}
    union = set.union(*seeds.values()) if seeds else set()
    usual, times = Counter(len(own) for own in seeds.values()).most_common(1)[0] if seeds else (0, 0)
    found = []
    for arm, own in seeds.items():
        gaps = _gaps(own)
        if len(seeds) > 2 and 2 * times > len(seeds) and len(own) < usual:
            lacking = sorted(union - own) if 2 * len(own & union) > len(own) else []
            gaps = lacking[: usual - len(own)] if len(lacking) == usual - len(own) else []
            found.append(f"{one_line(arm)} has {len(own)} of {usual}" + (f" (no {_numbers(gaps)})" if gaps else ""))
        elif gaps:
            found.append(f"{one_line(arm)} has no {_numbers(gaps)}")
    if found:
        yield f"Runs are missing: {listed(found)}. Check that none was left out because it was bad."
    valueless = [
        i for i, run in enumerate(judged.runs) if not len(judged.curves[i][0]) and judged.metric not in run.result
    ]
    valueless = [i for i in valueless if i not in judged.lost]
    if valueless:
        yield f"Runs have no {judged.metric} to judge: {judged.names(valueless)}. Check that their logs are whole."


def _gaps(seeds: set[int]) -> list[int]:
    """What a row of seeds lacks that begins at 0, 1 or above 9, and has at most a third of it missing."""
    low, high = min(seeds), max(seeds)
    if len(seeds) < 3 or 1 < low < 10 or high - low + 1 > len(seeds) + max(1, len(seeds) // 3):
        return []
    return sorted(set(range(low, high + 1)) - seeds)


def _numbers(seeds: Sequence[int]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {listed([str(seed) for seed in seeds])}"
