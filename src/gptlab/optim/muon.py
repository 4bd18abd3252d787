"""Muon for the matrices inside the blocks, AdamW for all else, in one optimizer."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from gptlab.distributed.shard import ShardSpec, global_shape, local_rows, shard_spec

# a, b, c of the quintic a x + b x^3 + c x^5 and how often it is applied (Jordan et al. 2024): the steepest at 0 that
# brings every singular value near 1, and not to 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
SMALLEST_NORM = 1e-7  # of a matrix; what is smaller is not blown up, and a zero stays zero
AT_ONCE = 2**26  # numbers in one batch: GPT-2's 24 MLP matrices, 128 MiB in bf16; it bounds the memory of larger models


def orthogonalize(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest matrix with orthogonal rows, roughly: x = U S V^T to U S' V^T, S' in about [0.7, 1.2].

    Newton-Schulz iteration (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/): it multiplies matrices
    only, and acts on each singular value, divided by the Frobenius norm first, as the polynomial does on a number.

    Args:
        x: (B, m, n), m <= n for the least work: B matrices, each on its own.
        dtype: to iterate in; the norm is taken in float32 or wider.
    """
    a, b, c = COEFFICIENTS
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    x = (x / norm.clamp(min=SMALLEST_NORM)).to(dtype)
    if x.shape[2] >= 2 * x.shape[1] and dtype is not torch.bfloat16:
        return small_side(x @ x.mT) @ x
    for _ in range(ITERATIONS):
        gram = x @ x.mT  # (B, m, m)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def small_side(gram: Tensor) -> Tensor:
    """The Q with Q X = `orthogonalize(X)`, from the Gram matrices X X^T (B, m, m) alone.

    An iteration multiplies X from the left by P = a + b G + c G^2, a polynomial of its Gram matrix G, which becomes
    P G P: the large side need not be carried along. That is 25 m^3 multiplications for 45 where n = 4 m. The Gram
    matrix has the condition number squared, and its small eigenvalues drown in rounding. In float32 the result differs
    by n eps a^5 of its norm at most (1.5% at n = 256; some 1e-4 on real matrices), which is small beside what the
    quintic leaves. In bf16 it would not be.
    """
    a, b, c = COEFFICIENTS
    q: Tensor | None = None
    for i in range(ITERATIONS):
        rest = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # P - a
        if q is None:
            q = rest.clone()
            q.diagonal(dim1=1, dim2=2).add_(a)
        else:
            q = torch.baddbmm(q, rest, q, beta=a)
        if i + 1 < ITERATIONS:
            half = torch.baddbmm(gram, rest, gram, beta=a)  # P G
            gram = torch.baddbmm(half, half, rest, beta=a)
    assert q is not None
    return q


def shared_out(x: Tensor, dtype: torch.dtype, shard: ShardSpec | None) -> Tensor:
    """`orthogonalize` B matrices; each rank that the weights are sharded over computes an equal share of them."""
    if shard is None:
        return orthogonalize(x, dtype)
    each = -(-len(x) // shard.group.size())
    mine = x[each * shard.group.rank() :][:each]
    return replace(shard, shape=x.shape).all_gather(orthogonalize(mine, dtype))


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by Newton-Schulz iteration (Jordan et al. 2024), beside PyTorch's fused AdamW.

    A group with `muon` true is of matrices (rows, cols), as nn.Linear stores them, output first. Each step takes

        momentum <- mu momentum + (1 - mu) grad
        weight   <- (1 - lr weight_decay) weight - lr sqrt(max(1, rows / cols)) O(mu momentum + (1 - mu) grad)

    with O = `orthogonalize`: Nesterov's momentum, and the scale of the authors' code (KellerJordan/Muon, muon.py;
    "original" in torch.optim.Muon), under which a tall matrix changes its outputs as much as a square one.

    Several matrices may be stored as one above the other: `parts` of a group says how many, and each is orthogonalised
    by itself, as the authors advise for queries, keys and values. All matrices of one shape, or its transpose, and of
    whichever layer go through the iteration together, in a few kernels instead of hundreds. It is done in bf16 on
    a GPU, as the authors do, in float32 elsewhere, and in float64 where the weights are; weights in 16 bits are
    rounded once a step, to nearest, and the momentum is stored in their dtype. Where processes have rows of a matrix,
    the momentum is of these rows too, and what goes into O is gathered.

    Args:
        params: groups, each with `muon` and, where that is true, `parts`. `lr_scale` is multiplied with what `set_lr`
            is given.
        lr, betas, eps, weight_decay: AdamW's; a Muon group has an lr and weight_decay of its own.
        momentum: mu.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 6e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
    ) -> None:
        # fused tells, as for PyTorch's own, that AdamW counts its steps beside the weights
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(params, {**defaults, "muon": False, "parts": 1, "lr_scale": 1.0, "fused": True})
        for group in self.param_groups:
            for p in group["params"] if group["muon"] else ():
                assert p.dim() == 2 and global_shape(p)[0] % group["parts"] == 0, "Muon is for matrices"

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        alike: dict[object, list[tuple[dict[str, Any], Tensor]]] = defaultdict(list)
        for group in self.param_groups:
            given = [p for p in group["params"] if p.grad is not None]
            if not group["muon"]:
                self._adamw(group, given)
                continue
            for p in given:
                sides = sorted((global_shape(p)[0] // group["parts"], p.shape[1]))
                alike[*sides, p.dtype, p.device].append((group, p))
        for members in alike.values():
            n = max(1, AT_ONCE // max(global_shape(p).numel() for _, p in members))
            for i in range(0, len(members), n):
                self._muon(members[i : i + n])

    def _muon(self, members: list[tuple[dict[str, Any], Tensor]]) -> None:
        """Update matrices of one shape (or its transpose), dtype and device."""
        inputs = []
        for group, p in members:
            assert p.grad is not None
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            momentum = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
            x, shard = p.grad.lerp(momentum, group["momentum"]), shard_spec(p)
            x = x if shard is None else shard.all_gather(x)
            x = x.unflatten(0, (group["parts"], -1))  # (parts, rows, cols)
            inputs.append(x.mT if x.shape[1] > x.shape[2] else x)
        wide = torch.promote_types(inputs[0].dtype, torch.float32)
        dtype = torch.bfloat16 if inputs[0].is_cuda and wide is torch.float32 else wide
        outputs = shared_out(torch.cat(inputs), dtype, shard).split([len(x) for x in inputs])
        for (group, p), x in zip(members, outputs, strict=True):
            rows, cols = global_shape(p)[0] // group["parts"], p.shape[1]
            update = local_rows((x.mT if rows > cols else x).flatten(0, 1), p)  # (parts * rows, cols), as p
            weight = p.to(wide)  # p itself where it is wide already
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(update, alpha=-group["lr"] * math.sqrt(max(1, rows / cols)))
            if weight is not p:
                p.copy_(weight)

    def _adamw(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Update what is not Muon's with the kernel of torch.optim.AdamW(fused=True)."""
        for p in params:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        adamw(
            params,
            [p.grad for p in params if p.grad is not None],
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            [],
            [self.state[p]["step"] for p in params],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
