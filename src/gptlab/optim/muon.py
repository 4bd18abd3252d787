"""Muon for the matrices inside the blocks and AdamW for the rest, in one optimizer."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from gptlab.config import Optim
from gptlab.distributed.shard import ShardSpec, Weights, global_shape, local_rows, shard_spec
from gptlab.hardware import cpu_multiplies_bf16
from gptlab.model.matmul import batch_product, batch_sum
from gptlab.optim.cost import OptimizerBytes, Parameters, total_bytes, widest
from gptlab.optim.elementwise import decay

# The quintic a x + b x^3 + c x^5 and its number of iterations (Jordan et al. 2024). It is the steepest at 0 of those
# that bring every singular value near 1, though not to 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
SMALLEST_ROOT = 1e-10  # added to what NorMuon divides by
SMALLEST_NORM = 1e-7  # lower bound of the norm that a matrix is divided by; a zero matrix stays zero
AT_ONCE = 2**26  # elements in one batch, which bounds temporary memory: GPT-2's 24 MLP matrices, 128 MiB in bf16


def orthogonalize(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Approximately the nearest matrix with orthogonal rows: x = U S V^T becomes U S' V^T, S' in about [0.7, 1.2].

    Newton-Schulz iteration (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/): matrix multiplications
    alone apply the polynomial to every singular value, after division by the Frobenius norm.

    Args:
        x: (B, m, n), a batch of B matrices. m <= n needs the least work.
        dtype: of the iteration. The norm is computed in float32 or wider.
    """
    a, b, c = COEFFICIENTS
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    x = (x / norm.clamp(min=SMALLEST_NORM)).to(dtype)
    if x.shape[2] >= 2 * x.shape[1] and dtype is not torch.bfloat16:
        return batch_product(small_side(batch_product(x, x.mT)), x)
    for _ in range(ITERATIONS):
        gram = batch_product(x, x.mT)  # (B, m, m)
        x = batch_sum(a, x, 1, batch_sum(b, gram, c, gram, gram), x)
    return x


def small_side(gram: Tensor) -> Tensor:
    """The Q with Q X = `orthogonalize(X)`, computed from the Gram matrices X X^T (B, m, m) alone.

    An iteration multiplies X from the left by P = a + b G + c G^2, a polynomial of its Gram matrix G, and G becomes
    P G P; the large side of X is not needed. For n = 4 m this takes 25 m^3 multiplications instead of 45 m^3. The Gram
    matrix has the squared condition number, so rounding hides its small eigenvalues. In float32 the result differs by
    at most n eps a^5 of its norm (1.5% at n = 256; about 1e-4 on real matrices), less than the error of the quintic.
    In bf16 the difference would be larger.
    """
    a, b, c = COEFFICIENTS
    q: Tensor | None = None
    for i in range(ITERATIONS):
        rest = batch_sum(b, gram, c, gram, gram)  # P - a
        if q is None:
            q = rest.clone()
            q.diagonal(dim1=1, dim2=2).add_(a)
        else:
            q = batch_sum(a, q, 1, rest, q)
        if i + 1 < ITERATIONS:
            half = batch_sum(a, gram, 1, rest, gram)  # P G
            gram = batch_sum(a, half, 1, half, rest)
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
    """Momentum orthogonalised by Newton-Schulz iteration (Jordan et al. 2024), beside PyTorch's fused AdamW.

    A group with `muon` true has matrices (rows, cols), stored as in nn.Linear, outputs first. Each step computes

        momentum <- mu momentum + (1 - mu) grad
        weight   <- (1 - lr weight_decay) weight - lr sqrt(max(1, rows / cols)) O(mu momentum + (1 - mu) grad)

    with O = `orthogonalize`: Nesterov momentum, and the scale of the authors' code (KellerJordan/Muon, muon.py;
    "original" in torch.optim.Muon), by which a tall matrix changes its outputs as much as a square one.

    A parameter may hold several matrices, one above the other. `parts` of a group is their number; each is
    orthogonalised by itself, as the authors advise for queries, keys and values. Matrices of one shape, or of its
    transpose, go through the iteration as one batch, whatever their layer. The iteration is in bf16 on a GPU, as in the
    authors' code, and on a processor that multiplies bf16 where the regime rounds float32 products, in float32
    elsewhere, and in float64 for float64 weights. Weights in 16 bits are rounded to nearest once per step; the momentum
    has their dtype. Under FSDP the momentum is local, and the input of O is gathered.

    NorMuon (Li et al. 2025, arXiv 2510.05491), with `neuron_beta`, divides each row of O, the update of one neuron, by
    the root of a moving average of its mean square, and then gives the matrix the norm that O had:

        v <- beta v + (1 - beta) mean(O^2 of a row);    O <- O / sqrt(v), times |O before| / |O after|

    That is the authors' code, whose learning rate is Muon's. The paper's algorithm 1 has the norm 0.2 sqrt(rows cols).

    Args:
        params: groups, each with `muon`, and with `parts` if `muon` is true. `set_lr` multiplies with `lr_scale`.
        lr, betas, eps, weight_decay: of AdamW. A Muon group has its own lr and weight_decay.
        momentum: mu.
        neuron_beta: of NorMuon's second moment; None is Muon.
        cautious_decay: decay only where update and weight agree in sign; see `decay`. Weights of AdamW in 16 bits are
            then rounded twice.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 6e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        neuron_beta: float | None = None,
        cautious_decay: bool = False,
    ) -> None:
        # fused says, as in PyTorch's optimizers, that AdamW's step counts are on the device of the weights
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "momentum": momentum}
        defaults |= {"neuron_beta": neuron_beta, "cautious_decay": cautious_decay}
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
            x = self.precondition(group, p, x.unflatten(0, (group["parts"], -1)))  # (parts, rows, cols)
            inputs.append(x.mT if x.shape[1] > x.shape[2] else x)
        wide = torch.promote_types(inputs[0].dtype, torch.float32)
        rounds = torch.get_float32_matmul_precision() != "highest"  # a regime that is not of float32 alone
        low = inputs[0].is_cuda or (rounds and inputs[0].is_cpu and cpu_multiplies_bf16())
        dtype = torch.bfloat16 if low and wide is torch.float32 else wide
        outputs = shared_out(torch.cat(inputs), dtype, shard).split([len(x) for x in inputs])
        for (group, p), x in zip(members, outputs, strict=True):
            rows, cols = global_shape(p)[0] // group["parts"], p.shape[1]
            x = x.mT if rows > cols else x  # (parts, rows, cols)
            x = x if group["neuron_beta"] is None else self._per_neuron(group, p, x.to(wide))
            update = local_rows(x.flatten(0, 1), p)  # (parts * rows, cols), as p
            weight = p.to(wide)  # p itself if it is wide already
            if group["cautious_decay"]:
                weight.add_(decay(group, weight, update))
            else:
                weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(update, alpha=-group["lr"] * math.sqrt(max(1, rows / cols)))
            if weight is not p:
                p.copy_(weight)

    def precondition(self, group: dict[str, Any], p: Tensor, update: Tensor) -> Tensor:
        """What O is applied to in the place of the Nesterov momentum (parts, rows, cols): here itself."""
        return update

    def _per_neuron(self, group: dict[str, Any], p: Tensor, x: Tensor) -> Tensor:
        """NorMuon's form of the orthogonal update x (parts, rows, cols) of a parameter."""
        if "neuron_sq" not in self.state[p]:
            self.state[p]["neuron_sq"] = x.new_zeros(len(p), 1)
        square = self.state[p]["neuron_sq"]
        square.lerp_(local_rows(x.square().mean(2).view(-1, 1), p), 1 - group["neuron_beta"])
        shard = shard_spec(p)
        square = square if shard is None else shard.all_gather(square)
        scaled = x / (square.view(*x.shape[:2], 1).sqrt() + SMALLEST_ROOT)
        before, after = (torch.linalg.vector_norm(y, dim=(1, 2), keepdim=True) for y in (x, scaled))
        return scaled * (before / (after + SMALLEST_ROOT))

    def _adamw(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Update the other parameters with the kernel of torch.optim.AdamW(fused=True)."""
        for p in params:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            if group["cautious_decay"] and p.grad is not None:  # the kernel's update has the sign of the new mean
                p.add_(decay(group, p, self.state[p]["exp_avg"].lerp(p.grad, 1 - group["betas"][0])))
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
            weight_decay=0.0 if group["cautious_decay"] else group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def muon_matrices(parameters: Parameters) -> dict[str, Tensor]:
    """The parameters that Muon updates: every matrix inside the blocks, `h.*` of a GPT or an Encoder."""
    return {name: p for name, p in parameters.items() if name.startswith("h.") and p.dim() == 2}


def muon_groups(model: Weights, optim: Optim) -> list[dict[str, Any]]:
    """Four groups: Muon's matrices, Muon's fused matrices (c_attn: q, k, v), and two of AdamW.

    AdamW has the embeddings and the head, whose rows are used one at a time, and everything with one dimension. Every
    parameter is in exactly one group.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    hidden = muon_matrices(parameters)
    fused = [p for name, p in hidden.items() if name.endswith(".c_attn.weight")]
    assert fused and len(hidden) > len(fused), "the blocks have matrices, and attention's are named c_attn"
    whole = [p for name, p in hidden.items() if not name.endswith(".c_attn.weight")]
    rest = [p for name, p in parameters.items() if name not in hidden]
    shared = {"muon": True, "weight_decay": optim.weight_decay, "lr": optim.muon_lr}
    groups: list[dict[str, Any]] = [
        {**shared, "params": whole, "parts": 1, "lr_scale": optim.muon_lr / optim.lr},
        {**shared, "params": fused, "parts": 3, "lr_scale": optim.muon_lr / optim.lr},
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    covered = [id(p) for group in groups for p in group["params"]]
    assert sorted(covered) == sorted(id(p) for p in parameters.values()), "every parameter is in exactly one group"
    return groups


def muon_bytes(parameters: Parameters, optim: Optim, gpu: bool) -> OptimizerBytes:
    """One momentum for each of Muon's matrices, two moments for the rest; temporarily one batch of whole matrices."""
    matrices = muon_matrices(parameters)
    elements = sum(global_shape(p).numel() for p in matrices.values())
    per_element = 2 * widest(parameters) + (4 + 3 * 2 if gpu else 4 * 4)  # on a GPU the iteration is in bf16
    kept = 2 * total_bytes(parameters) - total_bytes(matrices)
    return OptimizerBytes(kept, min(AT_ONCE, elements) * per_element)


def normuon_bytes(parameters: Parameters, optim: Optim, gpu: bool) -> OptimizerBytes:
    """Muon's bytes and one float32 number per row; temporarily the updates of one matrix in float32, twice."""
    kept, temporary = muon_bytes(parameters, optim, gpu)
    matrices = muon_matrices(parameters).values()
    widest_update = max(global_shape(p).numel() for p in matrices)
    return OptimizerBytes(kept + 4 * sum(len(p) for p in matrices), temporary + 3 * 4 * widest_update)
