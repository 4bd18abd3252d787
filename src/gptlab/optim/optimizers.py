"""Parameter groups and the optimizers over them."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from gptlab.config import Optim
from gptlab.distributed.shard import Weights, global_shape, shard_spec
from gptlab.errors import ConfigError, NotApplicable
from gptlab.optim.adamw import AdamW
from gptlab.optim.muon import Muon
from gptlab.optim.spam import AdamWSPAM
from gptlab.precision.libraries import load_library


def parameter_groups(model: Weights, weight_decay: float) -> list[dict[str, object]]:
    """Two groups: matrices and embeddings decay, biases and norm weights (one dimension) do not.

    Every parameter is in exactly one group.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    decays = [p for p in parameters if p.dim() >= 2]
    rest = [p for p in parameters if p.dim() < 2]
    assert {id(p) for p in parameters} == {id(p) for p in decays} | {id(p) for p in rest}
    groups: list[dict[str, object]] = [{"params": decays, "weight_decay": weight_decay}]
    return [*groups, {"params": rest, "weight_decay": 0.0}] if rest else groups


def muon_groups(model: Weights, optim: Optim) -> list[dict[str, Any]]:
    """Four groups: Muon's matrices, Muon's that are three in one (c_attn: q, k, v), and AdamW's two.

    Muon has every matrix inside the blocks, `h.*` of a GPT or an Encoder. AdamW has the embeddings and the head,
    whose rows are looked up or compared one at a time, and what has one dimension. Every parameter is in exactly one
    group.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    hidden = {name: p for name, p in parameters.items() if name.startswith("h.") and p.dim() == 2}
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


def make_optimizer(model: Weights, optim: Optim, seed: int = 0) -> torch.optim.Optimizer:
    """What `optim` says: AdamW (PyTorch's; gptlab's own for another rounding; with 8-bit moments or spike handling),
    Muon beside AdamW, or SGD, whose weight decay is added to the gradient.

    adamw-prune is PyTorch's AdamW; what prunes by its moments is `gptlab.sparsity`.

    Args:
        model: on its device already; that decides the library for 8 bits. Under FSDP, the rows here.
        optim: name, kernel, rounding and the usual numbers; auto is resolved.
        seed: of the stochastic rounding, and of sparse momentum.

    Raises:
        ConfigError: settings that exclude one another.
        NotApplicable: the library for 8-bit moments is not installed or does not work; FSDP cuts through what shares a
            scale in them; no weights that the rounding is for.
    """
    common: dict[str, Any] = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps}
    torchs = optim.name in ("adamw", "adamw-spam", "adamw-prune") and optim.rounding == "nearest"
    if optim.kernel == "foreach" and not torchs:
        raise ConfigError("optim.kernel = foreach: is PyTorch's AdamW's, without Muon, 8 bits or a rounding")
    if optim.name != "adamw" and optim.rounding != "nearest":
        raise ConfigError(f"optim.rounding = {optim.rounding}: is of optim.name = adamw")
    fused = optim.kernel == "fused"
    if optim.name == "muon":
        return Muon(muon_groups(model, optim), **common, momentum=optim.muon_momentum)
    groups = parameter_groups(model, optim.weight_decay)
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.betas[0], foreach=True)
    if optim.name == "adamw_8bit":
        device = next(model.parameters()).device
        library = _eight_bit(device)
        _refuse_other_blocks(model, whole_blocks=device.type == "cuda")
        return library(groups, **common)
    if optim.rounding != "nearest":
        if all(p.dtype is not torch.bfloat16 for p in model.parameters()):
            raise NotApplicable(f"optim.rounding = {optim.rounding}: rounds bf16 weights, and this model has none")
        return AdamW(groups, **common, rounding=optim.rounding, seed=seed)
    if optim.name == "adamw-spam":
        return AdamWSPAM(
            groups,
            optim.spam_form,
            **common,
            amsgrad=_given(optim.amsgrad),
            spike_clip=optim.spam_enable_clip,
            theta=_given(optim.spam_theta),
            threshold=_given(optim.spam_spike_threshold),
            reset=optim.spam_periodic_reset,
            interval=_given(optim.spam_interval),
            warmup=optim.spam_warmup,
            warmup_steps=_given(optim.spam_warmup_steps),
            max_norm=optim.grad_clip,
            density=optim.spam_density,
            seed=seed,
            fused=fused,
        )
    return torch.optim.AdamW(groups, **common, amsgrad=optim.amsgrad is True, fused=fused, foreach=not fused)


def _given(value: Any) -> Any:
    """None, which stands for a form's own, where a setting is auto."""
    return None if value == "auto" else value


def _eight_bit(device: torch.device) -> type[torch.optim.Optimizer]:
    """AdamW with moments in 8 bits, a scale for 256 numbers (Dettmers et al. 2022, arXiv 2110.02861).

    torchao's on a GPU; elsewhere bitsandbytes', as torchao compiles first, which takes a CPU some 20 s. Either keeps
    tensors of fewer than 4,096 numbers in full.
    """
    library = "torchao" if device.type == "cuda" else "bitsandbytes"
    module = load_library(f"{library}.optim", f"optim.name = adamw_8bit on {device.type}", "AdamW8bit")
    optimizer: type[torch.optim.Optimizer] = module.AdamW8bit
    return optimizer


def _refuse_other_blocks(model: Weights, whole_blocks: bool) -> None:
    """Refuse 8-bit moments where the rows of a process would be quantized otherwise than they are in the whole tensor.

    Args:
        whole_blocks: tensors that are no multiple of 256 numbers are kept in full: torchao's rule.

    Raises:
        NotApplicable: names the first such tensor.
    """
    for name, p in model.named_parameters():
        shard = shard_spec(p)
        if shard is None:
            continue
        n, row = shard.shape.numel(), shard.shape[1:].numel()
        each = -(-shard.shape[0] // shard.group.size()) * row
        starts = range(0, each * shard.group.size(), each)
        sizes = n, *(max(0, min(each, n - start)) for start in starts)
        quantized = {size >= 4096 and not (whole_blocks and size % 256) for size in sizes}
        if quantized != {False} and (quantized != {True} or any(start % 256 for start in starts)):
            raise NotApplicable(
                f"optim.name = adamw_8bit: distributed.strategy = fsdp cuts the {n:,} numbers of {name} into {each:,} "
                "a process, to which other 8-bit scales would fall than on one; use ddp, or another number of processes"
            )


def plain_tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    """What an optimizer keeps of one parameter, as plain tensors: {"exp_avg": ..., "step": ...}.

    torchao's 8-bit moments, tensors made of tensors, come apart (exp_avg.codes, .scale, .qmap); whole numbers are named
    step.int. Tensors may share memory with those of another parameter, as the tables of bitsandbytes do.
    """
    tensors: dict[str, Tensor] = {}
    for kind, value in state.items():
        if isinstance(value, int):
            tensors[f"{kind}.int"] = torch.tensor(value)
        elif hasattr(value, "__tensor_flatten__"):
            tensors |= {f"{kind}.{part}": getattr(value, part) for part in value.__tensor_flatten__()[0]}
        else:
            tensors[kind] = value
    return tensors


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group, times the group's own factor (Muon's muon_lr / lr) where it has one.

    torchao's is a tensor, which its compiled step has to find changed.
    """
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr * group.get("lr_scale", 1.0)


def describe(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a run's environment.json says of its optimizer.

    kernel is PyTorch's (of AdamW, beside Muon), or else the library that has its own. muon_share is the share (0 to 1)
    of the numbers that are Muon's, absent without it. eps_is_zero tells whether eps is 0 in the dtype of (some
    of) the weights, as 1e-8 is in float16: a kernel that computes in that dtype then divides by zero.
    bytes_per_parameter is of moments and compensation, measured, so it is None before the first step.
    """
    cls, defaults = type(optimizer), optimizer.defaults
    library = cls.__module__.partition(".")[0]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    dtypes = {p.dtype for p in parameters}
    kept = [t for state in optimizer.state.values() for t in plain_tensors(state).values() if t.dim()]
    size = sum({t.data_ptr(): t.nbytes for t in kept}.values())  # tables that are shared count once
    told = {
        "optimizer": f"{cls.__module__}.{cls.__qualname__} {sys.modules[library].__version__}",
        "kernel": next((kernel for kernel in ("fused", "foreach") if defaults.get(kernel)), library),
        "rounding": getattr(optimizer, "rounding", "nearest"),
        "eps": (eps := defaults.get("eps")),
        "eps_is_zero": eps is not None and any(not torch.tensor(eps, dtype=dtype) for dtype in dtypes),
        "bytes_per_parameter": size / max(1, sum(p.numel() for p in parameters)) if kept else None,
    }
    if isinstance(optimizer, Muon):
        matrices = [p for group in optimizer.param_groups if group["muon"] for p in group["params"]]
        of_muon, of_all = (sum(global_shape(p).numel() for p in some) for some in (matrices, parameters))
        told["muon_share"] = of_muon / of_all
    return told
