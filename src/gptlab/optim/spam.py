"""AdamW that takes the harm out of gradient spikes: SPAM, in three forms."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gptlab.distributed.shard import global_shape, local_rows, norms
from gptlab.seeding import address

Form = Literal["seed", "paper", "stable"]


@dataclass(frozen=True)
class Defaults:
    """What a form has where a setting is None; 0 is off."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    amsgrad: bool = False
    theta: float = 0.0
    threshold: float = 0.0
    interval: int = 1000
    warmup_steps: int = 0
    max_norm: float = 0.0


SEED = Defaults(amsgrad=True, theta=50.0, threshold=2.0, warmup_steps=100, max_norm=1.0)
PAPER = Defaults(eps=1e-6, theta=5000.0, interval=500, warmup_steps=150)  # arXiv 2501.06842
STABLE = Defaults()  # arXiv 2502.17055
DEFAULTS: dict[Form, Defaults] = {"seed": SEED, "paper": PAPER, "stable": STABLE}

# form = seed
HISTORY, ACTIVE_FROM = 100, 10  # norms that a norm is compared with: at most, at least
EXP_AVG_DECAY, EXP_AVG_SQ_DECAY = 0.5, 0.9  # after an outlier
SQUARE_FLOOR = 1e-12  # added to exp_avg_sq
STD_FLOOR = 1e-6  # of the mean: where all norms are equal, rounding is no outlier
# form = paper
CLIP_FROM = 20  # steps after a reset
# form = stable
GAMMAS = 0.7, 0.9, 0.999  # decay of the gradient's norm, of its square, and of its largest entry

SHARED = "spam"  # key of what is kept beside the parameters' own state


class AdamWSPAM(torch.optim.AdamW):
    """AdamW with spike handling before each update; the update itself is PyTorch's.

    In the order of a step (t counts steps from 1; `interval` steps after the last reset comes the next):

    1. Spike clip. seed, paper: an entry with g^2 > theta v becomes sign(g) sqrt(theta v), v being `exp_avg_sq`, never
       where v is 0, as before the first update and in the row of a token that was not seen since the reset.
       stable: AdaClip, an entry above T, the bias-corrected moving average of the tensor's largest |g|, becomes
       g T / max|g|.
    2. Outliers (`threshold`): where the gradient's global norm is more than `threshold` population standard deviations
       above the mean of the last 100, exp_avg *= 0.5 and exp_avg_sq *= 0.9. The norm is not among those 100 yet.
    3. The global norm is clipped at `max_norm`.
    4. stable: AdaGN, each tensor's norm becomes m / (sqrt(v) + eps), the bias-corrected moving averages of its norm
       and of the norm's square.
    5. Reset, at t = k interval: exp_avg = exp_avg_sq = 0. `step`, which the bias correction goes by, goes on, and
       AMSGrad's maximum stays; in stable all begins anew, and this is step 1.
    6. The learning rate, as it is set, times `warmup_factor`, for this step alone; weight decay goes with it.

    Forms:
    - seed: as published with CONFIG_SPAM_*, where v in the spike clip is bias-corrected by the number of gradients
      that are in it: raw, it would bound g at 0.22 |g| right after a reset, and at the start.
    - paper: SPAM (Huang et al. 2025, arXiv 2501.06842): v raw, the clip from 20 steps after a reset on.
    - stable: Stable-SPAM (Huang et al. 2025, arXiv 2502.17055): no warm-up. The moving averages of norms
      have a count of their own in their bias correction, as a reset leaves them alone.

    A GPU waits for nothing here: what depends on gradients is decided on it. Gradients are changed in place. Where
    loss scaling skips a step, nothing counts it. Norms and largest entries are those of whole tensors, where processes
    have rows of them, and what follows from them is the same on all.

    Args:
        params: parameters or groups of them; a step takes all to have a gradient.
        form: gives the defaults, and the rules where forms differ.
        lr, betas, eps, weight_decay, amsgrad, fused: as torch.optim.AdamW has them.
        spike_clip: step 1, and 4 in stable.
        theta: of the spike clip, above 0; stable has none.
        threshold: in standard deviations; 0 is off.
        reset, interval: whether to reset, and every how many steps.
        warmup, warmup_steps: whether the learning rate rises anew after a reset, and for how many steps.
        max_norm: of the global norm; 0 is off.
        density: share of the entries of matrices that move between two resets, drawn at random (sparse momentum
            of arXiv 2501.06842); below 1 it needs resets. The moments stay dense: it trains so, it saves no memory.
        seed: of that draw, which is addressed by (seed, reset, parameter): a resumed run repeats it.

    Raises:
        ValueError: a setting out of bounds.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        form: Form = "seed",
        lr: float = 1e-3,
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
        weight_decay: float = 0.0,
        amsgrad: bool | None = None,
        *,
        spike_clip: bool = True,
        theta: float | None = None,
        threshold: float | None = None,
        reset: bool = True,
        interval: int | None = None,
        warmup: bool = True,
        warmup_steps: int | None = None,
        max_norm: float | None = None,
        density: float = 1.0,
        seed: int = 0,
        fused: bool = False,
    ) -> None:
        if form not in DEFAULTS:
            raise ValueError(f"form = {form}: must be one of {', '.join(DEFAULTS)}")
        default = DEFAULTS[form]
        self.form, self.spike_clip, self.reset, self.warmup = form, spike_clip, reset, warmup
        self.theta = default.theta if theta is None else theta
        self.threshold = default.threshold if threshold is None else threshold
        self.interval = default.interval if interval is None else interval
        self.warmup_steps = default.warmup_steps if warmup_steps is None else warmup_steps
        self.max_norm = default.max_norm if max_norm is None else max_norm
        self.density, self.seed = density, seed
        if form == "stable" and theta is not None:
            raise ValueError(f"theta = {theta}: form = stable has none, its bound is a moving average")
        if form == "stable" and self.warmup_steps:
            raise ValueError(f"warmup_steps = {warmup_steps}: form = stable has no warm-up after a reset")
        if form != "stable" and self.theta <= 0:
            raise ValueError(f"theta = {theta}: must be greater than 0; spike_clip = false switches the clip off")
        if self.interval < 1:
            raise ValueError(f"interval = {interval}: must be at least 1; reset = false switches resets off")
        if min(self.threshold, self.warmup_steps, self.max_norm) < 0:
            raise ValueError("threshold, warmup_steps and max_norm must be at least 0")
        if not 0 < density <= 1 or (density < 1 and (form != "paper" or not reset)):
            raise ValueError(f"density = {density}: above 0 and at most 1; below 1 with form = paper and resets only")
        super().__init__(
            params,
            lr=lr,
            betas=default.betas if betas is None else betas,
            eps=default.eps if eps is None else eps,
            weight_decay=weight_decay,
            amsgrad=default.amsgrad if amsgrad is None else amsgrad,
            fused=fused,
            foreach=not fused,
        )
        # PyTorch's fused kernel would skip a step with gradients that are not finite by itself, when all above is done
        self._step_supports_amp_scaling = False
        self._masks: tuple[int, list[Tensor | None]] = (-1, [])  # number of the reset, and what was drawn at it

    @property
    def shared(self) -> dict[str, Any]:
        """Beside the parameters' own state: `updates` (int), `norms` (100,), `events`, `largest`, `norm_avg`, ..."""
        return self.state[SHARED]  # type: ignore[index]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter."""
        parameters = [(group, p) for group in self.param_groups for p in group["params"]]
        tensors = [p for _, p in parameters]
        grads = [p.grad for p in tensors]
        assert all(g is not None for g in grads), "every parameter takes part in the loss"
        t = self.shared["updates"] = self.shared.get("updates", 0) + 1
        resets, since = divmod(t, self.interval) if self.reset else (0, t)

        if self.spike_clip and self.form == "stable":
            self._adapt_clip(grads, tensors, t)
        elif self.spike_clip and t > 1 and (self.form == "seed" or since >= CLIP_FROM):
            self._clip_spikes(parameters, t)
        if self.threshold or self.max_norm:
            norm = torch.linalg.vector_norm(norms(grads, tensors))
            if self.threshold:
                self._damp(norm, t)
            if self.max_norm:  # as torch's clip_grad_norm_
                _multiply(grads, (self.max_norm / (norm + 1e-6)).clamp(max=1.0))
        if self.spike_clip and self.form == "stable":
            self._adapt_norms(grads, tensors, t)

        if resets and not since:
            anew = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq", "step") if self.form == "stable" else ()))
            for _, p in parameters:
                for kind in anew:
                    if kind in self.state[p]:  # with interval = 1 the first step resets before there is anything
                        self.state[p][kind].zero_()
        if self.density < 1:
            self._mask(tensors, resets)

        rates = [group["lr"] for group in self.param_groups]
        factor = warmup_factor(self.form, since, self.warmup_steps) if resets and self.warmup else 1.0
        try:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            super().step()
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate

    def _clip_spikes(self, parameters: list[tuple[dict[str, Any], Tensor]], t: int) -> None:
        updates = t - 1
        last = updates - updates % self.interval if self.reset else 0
        absorbed = updates - last + (last > 0)  # gradients in exp_avg_sq; a reset comes before its step's gradient
        for group, p in parameters:
            assert p.grad is not None
            theta, floor = self.theta, 0.0
            if self.form == "seed":
                theta, floor = self.theta / (1 - group["betas"][1] ** absorbed), self.theta * SQUARE_FLOOR
            clip_spikes(p.grad, self.state[p]["exp_avg_sq"], theta, floor)

    def _damp(self, norm: Tensor, t: int) -> None:
        """Let an outlier among the global norms weaken the moments."""
        ring = self._keep("norms", norm, HISTORY)  # (100,)
        events = self._keep("events", norm)
        seen = ring[: min(t - 1, HISTORY)]
        if len(seen) >= ACTIVE_FROM:
            mean, std = seen.mean(), seen.std(correction=0)
            event = norm - mean > self.threshold * torch.maximum(std, STD_FLOOR * mean)
            events += event
            for kind, decay in (("exp_avg", EXP_AVG_DECAY), ("exp_avg_sq", EXP_AVG_SQ_DECAY)):
                moments = [self.state[p][kind] for group in self.param_groups for p in group["params"]]
                _multiply(moments, torch.where(event, torch.full_like(norm, decay), 1.0))
        ring[(t - 1) % HISTORY] = norm

    def _adapt_clip(self, grads: list[Tensor], tensors: list[Tensor], t: int) -> None:
        """AdaClip (arXiv 2502.17055): n tensors, each with a bound of its own."""
        largest = norms(grads, tensors, math.inf)  # (n,) of n tensors
        bounds = self._average("largest", largest, GAMMAS[2], t)
        for grad, bound, ratio in zip(grads, bounds.unbind(), (bounds / largest).unbind(), strict=True):
            grad.copy_(torch.where(grad.abs() > bound, grad * ratio, grad))

    def _adapt_norms(self, grads: list[Tensor], tensors: list[Tensor], t: int) -> None:
        """AdaGN (arXiv 2502.17055), tensor by tensor."""
        found = norms(grads, tensors)  # (n,)
        mean = self._average("norm_avg", found, GAMMAS[0], t)
        square = self._average("norm_avg_sq", found.square(), GAMMAS[1], t)
        target = mean / (square.sqrt() + self.defaults["eps"])
        for grad, scale in zip(grads, torch.where(found > 0, target / found, 1.0).unbind(), strict=True):
            grad.mul_(scale)

    def _average(self, name: str, value: Tensor, gamma: float, t: int) -> Tensor:
        """The bias-corrected moving average of value (n,)."""
        return self._keep(name, value, len(value)).lerp_(value, 1 - gamma) / (1 - gamma**t)

    def _keep(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """What is kept under a name, zeros at first, on the device of the gradients also where it was loaded."""
        kept: Tensor | None = self.shared.get(name)
        kept = like.new_zeros(shape) if kept is None else kept.to(like.device)
        self.shared[name] = kept
        return kept

    def _mask(self, tensors: list[Tensor], resets: int) -> None:
        """Sparse momentum: where moments are zero and no gradient comes, nothing moves."""
        if self._masks[0] != resets:
            drawn: list[Tensor | None] = []
            for index, p in enumerate(tensors):
                draw = torch.Generator(p.device).manual_seed(address(self.seed, "sparse momentum", resets, index))
                share = torch.rand(global_shape(p), generator=draw, device=p.device) if p.dim() == 2 else None
                drawn.append(None if share is None else local_rows(share, p) < self.density)
            self._masks = resets, drawn
        for p, mask in zip(tensors, self._masks[1], strict=True):
            if mask is not None:
                assert p.grad is not None
                p.grad.mul_(mask)


def warmup_factor(form: Form, since: int, steps: int) -> float:
    """What the learning rate is multiplied with `since` steps after a reset (0: at it); exactly 1 from `steps` on."""
    if since >= steps:
        return 1.0
    if form == "paper":
        return 1 - 0.99 * 0.5 * (1 + math.cos(math.pi * since / (steps + 1)))
    return max(1e-3, 0.5 * (1 - math.cos(math.pi * since / steps)))


def clip_spikes(grad: Tensor, exp_avg_sq: Tensor, theta: float, floor: float = 0.0) -> None:
    """Bound |grad| by sqrt(theta exp_avg_sq + floor), in place, where exp_avg_sq is not 0; all of one shape."""
    bound = (exp_avg_sq * theta).add_(floor).sqrt_().masked_fill_(exp_avg_sq == 0, math.inf)
    grad.clamp_(-bound, bound)


def _multiply(tensors: list[Tensor], factor: Tensor) -> None:
    """All tensors by one number that is on their device, in place."""
    if all(tensor.dtype is factor.dtype for tensor in tensors):
        torch._foreach_mul_(tensors, factor)
    else:
        for tensor in tensors:
            tensor.mul_(factor)
