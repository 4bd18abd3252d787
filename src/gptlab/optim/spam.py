"""AdamW with handling of gradient spikes: SPAM, in three forms."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gptlab.config import Optim
from gptlab.distributed.shard import global_shape, local_rows, norms
from gptlab.optim.adamw import PlainAdamW, adamw_bytes
from gptlab.optim.cost import OptimizerBytes, Parameters, largest, widest
from gptlab.seeding import address

Form = Literal["seed", "paper", "stable"]


@dataclass(frozen=True)
class Defaults:
    """Values of a form for settings that are None; 0 is off."""

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
HISTORY, ACTIVE_FROM = 100, 10  # a norm is compared with at most, and at least, so many earlier norms
EXP_AVG_DECAY, EXP_AVG_SQ_DECAY = 0.5, 0.9  # after an outlier
SQUARE_FLOOR = 1e-12  # added to exp_avg_sq
STD_FLOOR = 1e-6  # share of the mean; keeps rounding errors of equal norms from being outliers
# form = paper
CLIP_FROM = 20  # steps after a reset
# form = stable
GAMMAS = 0.7, 0.9, 0.999  # decay of the averages of the gradient's norm, its square, and its largest entry

SHARED = "spam"  # key of the state that belongs to no parameter


class AdamWSPAM(PlainAdamW):
    """AdamW with spike handling before each update. The update itself is PyTorch's.

    A step t (counted from 1) does the following. Resets are at multiples of `interval`.

    1. Spike clip. Forms seed and paper: an entry with g^2 > theta v becomes sign(g) sqrt(theta v), v being
       `exp_avg_sq`. Entries with v = 0 are left alone, as before the first update and in the row of a token that has
       not occurred since the reset. Form stable (AdaClip): an entry above T, the bias-corrected moving average of the
       tensor's largest |g|, becomes g T / max|g|.
    2. Outliers: if the gradient's global norm is more than `threshold` population standard deviations above the mean
       of the last 100 norms (without this one), then exp_avg *= 0.5 and exp_avg_sq *= 0.9.
    3. The global norm is clipped at `max_norm`.
    4. Form stable (AdaGN): each tensor's norm becomes m / (sqrt(v) + eps), with the bias-corrected moving averages of
       its norm and of its squared norm.
    5. Reset, at t = k interval: exp_avg = exp_avg_sq = 0. The step count of the bias correction goes on, and AMSGrad's
       maximum stays. Form stable resets these two as well, and this is step 1.
    6. The learning rate is multiplied by `warmup_factor` for this step, and weight decay with it.

    Forms:
    - seed: the code that CONFIG_SPAM_* configures, except that v in the spike clip is bias-corrected by the number of
      gradients since the reset. Without it, v would bound g at 0.22 |g| right after a reset and at the start.
    - paper: SPAM (Huang et al. 2025, arXiv 2501.06842), with v uncorrected and the clip from 20 steps after a reset on.
    - stable: Stable-SPAM (Huang et al. 2025, arXiv 2502.17055), without warm-up. A reset does not touch the moving
      averages of norms, whose bias correction counts by itself.

    Decisions that depend on gradients are made on the device, so a GPU is never waited for. Gradients are changed in
    place. A step that loss scaling skips is not counted. Under FSDP, norms and largest entries are those of whole
    tensors, the same on all ranks.

    Settings are checked in the recipe's schema, not here.

    Args:
        params: parameters, or groups of parameters; all must have a gradient at each step.
        form: decides the defaults, and the rules above.
        lr, betas, eps, weight_decay, amsgrad, fused: as in torch.optim.AdamW.
        spike_clip: step 1, and step 4 of form stable.
        theta: of the spike clip, above 0; not for form stable.
        threshold: in standard deviations; 0 is off.
        reset, interval: whether to reset, and the number of steps between resets.
        warmup, warmup_steps: whether the learning rate rises again after a reset, and for how many steps.
        max_norm: of the global norm; 0 is off.
        density: share of a matrix's entries that move between two resets, drawn at random (sparse momentum of arXiv
            2501.06842). Below 1 it needs resets. Moments stay dense, so it saves no memory.
        seed: of that draw, which is addressed by (seed, reset, parameter), so a resumed run repeats it.
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
        default = DEFAULTS[form]
        self.form, self.spike_clip, self.reset, self.warmup = form, spike_clip, reset, warmup
        self.theta = default.theta if theta is None else theta
        self.threshold = default.threshold if threshold is None else threshold
        self.interval = default.interval if interval is None else interval
        self.warmup_steps = default.warmup_steps if warmup_steps is None else warmup_steps
        self.max_norm = default.max_norm if max_norm is None else max_norm
        self.density, self.seed = density, seed
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
        # PyTorch's fused kernel would skip a step with non-finite gradients by itself, after the spike handling
        self._step_supports_amp_scaling = False
        self._masks: tuple[int, list[Tensor | None]] = (-1, [])  # number of resets, and the masks drawn at the last

    @property
    def shared(self) -> dict[str, Any]:
        """State that belongs to no parameter: `updates` (int), `norms` (100,), `events`, `largest`, `norm_avg`, ..."""
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
                    if kind in self.state[p]:  # with interval = 1 the first step resets before there is any state
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
        absorbed = updates - last + (last > 0)  # gradients in exp_avg_sq; a reset precedes its step's gradient
        for group, p in parameters:
            assert p.grad is not None
            theta, floor = self.theta, 0.0
            if self.form == "seed":
                theta, floor = self.theta / (1 - group["betas"][1] ** absorbed), self.theta * SQUARE_FLOOR
            clip_spikes(p.grad, self.state[p]["exp_avg_sq"], theta, floor)

    def _damp(self, norm: Tensor, t: int) -> None:
        """Weaken the moments if the global norm is an outlier."""
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
        """AdaClip (arXiv 2502.17055): each of n tensors has its own bound."""
        maxima = norms(grads, tensors, math.inf)  # (n,)
        bounds = self._average("largest", maxima, GAMMAS[2], t)
        for grad, bound, ratio in zip(grads, bounds.unbind(), (bounds / maxima).unbind(), strict=True):
            grad.copy_(torch.where(grad.abs() > bound, grad * ratio, grad))

    def _adapt_norms(self, grads: list[Tensor], tensors: list[Tensor], t: int) -> None:
        """AdaGN (arXiv 2502.17055), for each tensor."""
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
        """The shared state of a name, at first zeros, on the device of the gradients."""
        kept: Tensor | None = self.shared.get(name)
        kept = like.new_zeros(shape) if kept is None else kept.to(like.device)
        self.shared[name] = kept
        return kept

    def _mask(self, tensors: list[Tensor], resets: int) -> None:
        """Sparse momentum: an entry with zero moments and no gradient does not move."""
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
    """Factor of the learning rate `since` steps after a reset, 0 being the reset itself; exactly 1 from `steps` on."""
    if since >= steps:
        return 1.0
    if form == "paper":
        return 1 - 0.99 * 0.5 * (1 + math.cos(math.pi * since / (steps + 1)))
    return max(1e-3, 0.5 * (1 - math.cos(math.pi * since / steps)))


def clip_spikes(grad: Tensor, exp_avg_sq: Tensor, theta: float, floor: float = 0.0) -> None:
    """Bound |grad| by sqrt(theta exp_avg_sq + floor), in place, where exp_avg_sq is not 0. Shapes are equal."""
    bound = (exp_avg_sq * theta).add_(floor).sqrt_().masked_fill_(exp_avg_sq == 0, math.inf)
    grad.clamp_(-bound, bound)


def _multiply(tensors: list[Tensor], factor: Tensor) -> None:
    """Multiply tensors in place by one number () on their device."""
    if all(tensor.dtype is factor.dtype for tensor in tensors):
        torch._foreach_mul_(tensors, factor)
    else:
        for tensor in tensors:
            tensor.mul_(factor)


def spam_bytes(parameters: Parameters, optim: Optim, gpu: bool) -> OptimizerBytes:
    """AdamW's bytes and the masks of sparse momentum (torch.bool); temporarily the clip's bounds of one tensor.

    The bounds are a tensor, its negative, and the places where it is infinite.
    """
    amsgrad = DEFAULTS[optim.spam_form].amsgrad if optim.amsgrad == "auto" else optim.amsgrad
    kept, temporary = adamw_bytes(parameters, optim.model_copy(update={"amsgrad": amsgrad}), gpu)
    masks = sum(p.numel() for p in parameters.values() if p.dim() == 2) if optim.spam_density < 1 else 0
    return OptimizerBytes(kept + masks, temporary + 2.25 * widest(parameters) * largest(parameters))
