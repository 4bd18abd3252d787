"""Detects divergence: a run's training loss is judged update by update, its held-out loss at each evaluation.

The guard keeps the medians of blocks of 50 losses; the lowest of the last six is the level. A rise is a divergence
when it is far above the level, has lasted, and is not falling back. Every threshold is a share of the level, of the
noise or of what has been learnt, so that the nats of a language model and the thousandths of a multi-label loss are
judged alike. The numbers were chosen on the synthetic curves of tests/test_guard.py, which states the guard's
error rates on them.

A held-out loss has risen when it stands far above its best and the training losses stand far above what they were then.
Overfitting is therefore none, however far it goes: a model that knows its training data by heart is sure of itself, and
pays 10 or 20 nats for what it has wrong elsewhere, where an untrained one pays 0.7 (of two classes) or 11 (of 50,000
tokens). No multiple of the held-out loss separates that from a broken model; the training loss does, which falls when a
model overfits and rises when it breaks.

The guard cannot distinguish a model that forgets from data that is read in order and becomes much harder for 40 steps,
as small batches of sequential data do at the end of an easy stretch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import Any

BLOCK = 50  # losses a median is taken of: a spike of 20 hardly moves it, noise of 15% moves it by 3%
FIRST_BLOCK = 10  # the first five blocks: without them a run that diverges in its first 50 steps has no level
BLOCKS = 6  # how far back the level reaches: 300 steps outlast a rise that is under way
LAST_BLOCKS = 5  # what the noise, and a loss that rests at the constant predictor's, are judged by

SHARE_OF_LEVEL = 0.35  # the rise that counts; another domain in the data raises a loss by 10-20% for good
SHARE_OF_LEARNT = 1 / 3  # of the constant predictor's loss (or the first loss) minus the level
SPREADS = 3.0  # of the noise; one wild loss passes that, 38 of 42 do not
CLEAR = 0.6  # of the rise that counts: where a loss has left its level; a ramp of 30 steps is there in ten
HOPELESS = 2.0  # times the untrained model's loss: to stay up there is no spike, falling or not

HOLD, HELD = 42, 38  # 38 of the last 42 losses beyond the lower line: a spike of 20 steps has come back by then
LATE, LATE_HELD = 20, 17  # ... and 17 of the last 20 beyond the upper one
NOW, BACK = 15, 0.75  # the last 15 losses are up by less than this share of the 27 before: it is coming back, if slowly

NEAR = (0.9, 1.1)  # of the constant predictor's loss: a risen loss that rests here is a collapse, elsewhere a spike
LEFT = 0.99  # a model that is not 1% better than the constant predictor has learnt nothing
# Steps without that 1% until it counts as resting there for good. Multi-label losses of 4,000 labels rest for 600 and
# then learn, masked language models for as long as the warm-up lasts.
PATIENCE, PATIENCE_WARMUPS = 1500, 4
# Until there are BLOCKS blocks the first loss is a level, or the held-out loss before it if that is higher: a run that
# starts low and jumps at its second step has no other. One loss tells no noise, and may be low by chance: it has to lie
# this many spreads below every block. 3 of 24,000 healthy curves are called diverged for it, with 4 spreads 5, and none
# where the held-out loss is known. Of jumps at steps 2 to 5 it misses 1 in 400, with 8 spreads 1 in 50; of those at 6,
# in the middle of the first block, 1 in 16.
FIRST_SPREADS = 6.0

# The rise of a held-out loss that counts, as a share of the best, and of the training losses since. Evaluations repeat
# the same windows, so neither noise nor another domain moves them; restarts of the learning rate do, by up to 25% for
# a moment. 0.15 would call 2 of 9,600 healthy runs diverged, 0.2 none; 0.35 would miss a run that forgets all it had
# learnt where that was a quarter of the constant predictor's loss.
HELD_OUT_SHARE = 0.25
HELD_OUT_LOSSES = 50  # training losses whose median is up; at the end those of both halves: a spike of 20 moves one
EVALUATIONS, EVALUATION_STEPS = 3, 100  # in a row, and from the first to the last: slow recoveries take a hundred steps

SKIPS = 50  # in a row: GradScaler's 2**16 is then 2**-34, below anything fp16 can hold
RECENT = 200  # losses kept, to look up where a rise began


@dataclass(frozen=True)
class Divergence:
    """How and where a training run failed."""

    step: int
    """Where it began, not where it was noticed: the first non-finite value, the first step of the rise, or the first
    evaluation that shows it."""
    kind: str
    """non_finite, spike (the loss rose and stays up) or collapse (it is no better than the constant predictor's)."""
    reason: str
    """One sentence with the numbers."""


class Diverged(Exception):
    """The run has diverged. No checkpoint holds what broke."""

    def __init__(self, divergence: Divergence, tensor: str | None = None) -> None:
        super().__init__(divergence.reason)
        self.divergence, self.tensor = divergence, tensor


class Guard:
    """Decides from the losses of a run whether it has diverged.

    A healthy curve is called diverged less than once in a thousand, also if it starts low, as after train.init_from.

    Args:
        constant_loss: the loss in nats of the best constant prediction, the entropy of token or label frequencies.
            With None a collapse to that loss is not distinguished from a spike, and what a run that starts low has
            learnt is not known: a spike of such a run may count before it has come back.
        warmup_steps: of the learning rate. A loss may rest at the constant prediction's for four warm-ups.
    """

    def __init__(self, constant_loss: float | None, warmup_steps: int) -> None:
        self.constant = constant_loss
        self.patience = max(PATIENCE, PATIENCE_WARMUPS * warmup_steps)
        self.recent: list[float] = []
        self.block: list[float] = []
        self.levels: list[float] = []  # median of each of the last blocks ...
        self.spreads: list[float] = []  # ... and its noise
        self.first: float | None = None  # loss
        self.start: float | None = None  # the first loss, or the held-out loss before it if that is higher
        self.skips = 0  # in a row
        self.best: float | None = None  # the lowest that the last five blocks have been
        self.resting_since: int | None = None  # from here on no better than the constant predictor, and no nearer
        self.best_held_out: float | None = None  # held-out loss ...
        self.trained_then: float | None = None  # ... and the training losses' median at that evaluation
        self.risen: list[float] = []  # evaluations in a row that have risen: step and loss of the first, how many
        self._draw_lines()

    def update(self, step: int, loss: float, grad_norm: float, skipped: bool = False) -> Divergence | None:
        """Judge one optimizer update; call it for each update, in order.

        Args:
            step: the update's number.
            loss: its training loss in nats.
            grad_norm: the gradient's norm before clipping.
            skipped: the loss scaler skipped this update, because its gradient is not finite.

        Returns:
            The divergence that this step shows, or None. The first divergence counts.
        """
        if not math.isfinite(loss):
            return Divergence(step, "non_finite", f"the training loss is {loss} at step {step}")
        if not (skipped or math.isfinite(grad_norm)):
            return Divergence(step, "non_finite", f"the gradient norm is {grad_norm} at step {step}")
        self.skips = self.skips + 1 if skipped else 0
        if self.skips >= SKIPS:
            reason = f"the gradients were not finite for {SKIPS} steps in a row at any loss scale"
            return Divergence(step - SKIPS + 1, "non_finite", reason)

        if self.first is None:
            self.first = loss
            self.start = max(loss, self.best_held_out or 0.0)
            self._draw_lines()
        self.recent.append(loss)
        if len(self.recent) > RECENT:
            del self.recent[0]
        if loss > self.upper and (rise := self._rise(step)):
            return rise
        self.block.append(loss)
        if len(self.block) < (FIRST_BLOCK if len(self.levels) < LAST_BLOCKS else BLOCK):
            return None
        self._end_block()
        return self._rest(step)

    def _end_block(self) -> None:
        level, spread = centre(self.block)
        self.levels, self.spreads = [*self.levels, level][-BLOCKS:], [*self.spreads, spread][-BLOCKS:]
        self.block = []
        self._draw_lines()

    def _draw_lines(self) -> None:
        """Set the thresholds: above `lower` a loss has left the level, above `upper` it is far from the level."""
        self.level = self.lower = self.upper = self.hopeless = math.inf
        if self.first is None:
            return
        untrained = max(self.first, self.start or 0.0, self.constant or 0.0)
        self.hopeless = HOPELESS * untrained
        lowest = min(self.levels, default=untrained)  # of a rise that is under way, the medians are not the lowest
        self.level = lowest if lowest < self.hopeless else untrained
        self.upper = self.hopeless
        if self.levels:
            # Noise falls with the loss, so the lowest block knows it best, unless a rise began in that block.
            noise = SPREADS * min(self.spreads[self.levels.index(lowest)], median(self.spreads[-LAST_BLOCKS:]))
            far = FIRST_SPREADS * median(self.spreads)
            early = self.constant is not None and len(self.levels) < BLOCKS
            if early and self.start is not None and self.start < lowest - far:
                self.level, noise = self.start, far
            self.upper = min(self.upper, max(self.level + noise, self._far_above(self.level, SHARE_OF_LEVEL)))
        self.lower = self.level + CLEAR * (self.upper - self.level)

    def _far_above(self, level: float, share: float) -> float:
        """The level and a rise of `share` of it, or of a share of what has been learnt, whichever is more."""
        untrained = self.first if self.constant is None else self.constant
        learnt = 0.0 if untrained is None else untrained - level
        return level + max(share * level, SHARE_OF_LEARNT * learnt)

    def _rise(self, step: int) -> Divergence | None:
        """The divergence, if the loss stays far above its level."""
        last = self.recent[-HOLD:]
        if (
            sum(loss > self.lower for loss in last) < HELD
            or sum(loss > self.upper for loss in last[-LATE:]) < LATE_HELD
        ):
            return None
        now = median(last[-NOW:])
        if self._comes_back(self.level):
            return None
        index, level = self._beginning()
        began = self.told(step - len(self.recent) + 1 + index)
        reason = f"the training loss rose from {level:.3g} to {now:.3g} at step {began} and stayed up"
        if near := self._near(median(last[-20:-10]), median(last[-10:])):
            reason += f", no better than a constant prediction's {self.constant:.3g},"
        return Divergence(began, "collapse" if near else "spike", f"{reason} for {self.told(step) - began + 1} steps")

    def told(self, step: int) -> int:
        """The number by which a rise is dated; of a curve that has not every update, not the count of its losses."""
        return step

    def _comes_back(self, level: float) -> bool:
        """Whether the last losses are nearer to the level than those before: a spike, if a slow one."""
        last = self.recent[-HOLD:]
        now, before = median(last[-NOW:]), median(last[:-NOW] or last)
        return now < self.hopeless and now - level < BACK * (before - level)

    def _near(self, *losses: float) -> bool:
        """Whether they are the constant predictor's."""
        return self.constant is not None and all(
            NEAR[0] * self.constant <= loss <= NEAR[1] * self.constant for loss in losses
        )

    def _beginning(self) -> tuple[int, float]:
        """(index, level): the first of the recent losses that belongs to the rise, and the level before it."""
        # The losses since then are mostly beyond the lower line, those before are not.
        first = len(self.recent)
        balance = highest = 0
        for index in reversed(range(len(self.recent))):
            balance += 1 if self.recent[index] > self.lower else -1
            if balance > highest:
                first, highest = index, balance
            elif balance < highest - 10:
                break
        # A ramp was under way before it reached that line: back to where the loss was within its noise.
        before = self.recent[max(0, first - 50) : max(0, first - 10)] or self.recent[:first] or [self.level]
        level, spread = centre(before)
        while first > 0 and self.recent[first - 1] > level + 2 * spread:
            first -= 1
        return first, level

    def _rest(self, step: int) -> Divergence | None:
        """After a block: the divergence, if the loss has stayed at a constant prediction's for too long."""
        if self.constant is None or len(self.levels) < LAST_BLOCKS:
            return None
        now = median(self.levels[-LAST_BLOCKS:])
        if self.best is None or self.resting_since is None:
            self.best, self.resting_since = now, step - LAST_BLOCKS * FIRST_BLOCK + 1
        if now < LEFT * max(self.constant, self.best):
            # Two blocks later than this one, three of five may rest: the earliest that it can have begun.
            self.resting_since = max(self.resting_since, step - 2 * BLOCK + 1)
        self.best = min(self.best, now)
        if (steps := step - self.resting_since + 1) < self.patience:
            return None
        left = "has come back to" if self.best < LEFT * self.constant else "never left"
        reason = f"the training loss {left} a constant prediction's {self.constant:.3g}: {now:.3g} for {steps} steps"
        return Divergence(self.resting_since, "collapse", reason)

    def evaluated(self, step: int, loss: float, last: bool) -> Divergence | None:
        """Judge one evaluation; call it for each, the one before the first update included, in order with `update`.

        Args:
            step: updates done.
            loss: the held-out loss in nats.
            last: the run ends here.

        Returns:
            The divergence that this evaluation shows, or None.
        """
        if not math.isfinite(loss):
            return Divergence(step, "non_finite", f"the held-out loss is {loss} at step {step}")
        if self.best_held_out is None or self.first is None or loss <= self.best_held_out:
            self.best_held_out, self.risen = loss, []
            self.trained_then = median(self.recent[-NOW:]) if self.recent else None
            return None
        best, then = self.best_held_out, self.first if self.trained_then is None else self.trained_then
        losses = self.recent[-HELD_OUT_LOSSES:]
        trained, line = median(losses), self._far_above(then, HELD_OUT_SHARE)
        if loss < self._far_above(best, HELD_OUT_SHARE) or trained < line:
            self.risen = []
            return None
        began, height, n = self.risen or (step, loss, 0)
        self.risen = [began, height, n + 1]
        lasted = n + 1 >= EVALUATIONS and step - began >= EVALUATION_STEPS
        if last:  # whether it would have come back no one sees
            half = (len(losses) + 1) // 2
            up = min(median(losses[:half]), median(losses[-half:])) >= line
            shown = lasted or (up and not self._comes_back(then))
        else:
            shown = lasted and (loss >= self.hopeless or loss - best >= BACK * (height - best))
        if not shown:
            return None
        reason = f"the held-out loss rose from {best:.3g} to {height:.3g} by step {began}"
        if n:
            reason += f" and is {loss:.3g} at step {step}"
        reason += f", as the training loss rose from {then:.3g} to {trained:.3g}"
        if near := self._near(loss, trained):
            reason += f"; a constant prediction's is {self.constant:.3g}"
        return Divergence(int(began), "collapse" if near else "spike", reason)

    STATE = (
        *("recent", "block", "levels", "spreads", "first", "start", "skips", "best", "resting_since"),
        *("best_held_out", "trained_then", "risen"),
    )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to reach the same verdicts, as JSON values."""
        state = {name: getattr(self, name) for name in self.STATE}
        return {name: list(value) if isinstance(value, list) else value for name, value in state.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.STATE:
            value = state.get(name, getattr(self, name))  # older checkpoints hold nothing of evaluations
            setattr(self, name, list(value) if isinstance(value, list) else value)
        self._draw_lines()


def centre(values: list[float]) -> tuple[float, float]:
    """Median, and standard deviation as the median distance from it tells: a few wild values move neither."""
    middle = median(values)
    return middle, 1.4826 * median(abs(value - middle) for value in values)  # the ratio of the two for a normal law
