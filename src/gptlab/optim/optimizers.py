"""Parameter groups and the optimizers over them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptlab.config import Model, Optim
from gptlab.distributed.shard import Weights, global_shape, shard_spec
from gptlab.errors import NotApplicable, UserError
from gptlab.model.parametrization import Multipliers, optimizer_multipliers
from gptlab.optim.adamw import AdamW, PlainAdamW, adamw_bytes
from gptlab.optim.ademamix import AdEMAMix, ademamix_bytes
from gptlab.optim.average import WeightAverage
from gptlab.optim.cost import OptimizerBytes, Parameters, largest, total_bytes
from gptlab.optim.lion import Lion, lion_bytes
from gptlab.optim.muon import Muon, muon_bytes, muon_groups, normuon_bytes
from gptlab.optim.schedule_free import ScheduleFreeAdamW, schedule_free_bytes
from gptlab.optim.soap import SOAP, soap_bytes
from gptlab.optim.soap_muon import SOAPMuon, soap_muon_bytes
from gptlab.optim.spam import AdamWSPAM, spam_bytes
from gptlab.precision.libraries import load_library

# PyTorch keeps these methods out of compiled code, and imports its compiler for that, a second's work, at their first
# call. They are the same without.
for _name in ("add_param_group", "load_state_dict", "state_dict", "zero_grad"):
    if _plain := getattr(getattr(torch.optim.Optimizer, _name), "__wrapped__", None):
        _plain.__dynamo_disable = _plain


def parameter_groups(model: Weights, weight_decay: float) -> list[dict[str, object]]:
    """Two groups: matrices and embeddings with weight decay, biases and norm weights (one dimension) without.

    Every parameter is in exactly one group.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    decays = [p for p in parameters if p.dim() >= 2]
    rest = [p for p in parameters if p.dim() < 2]
    assert {id(p) for p in parameters} == {id(p) for p in decays} | {id(p) for p in rest}
    groups: list[dict[str, object]] = [{"params": decays, "weight_decay": weight_decay}]
    return [*groups, {"params": rest, "weight_decay": 0.0}] if rest else groups


def _adamw(model: Weights, optim: Optim, seed: int) -> torch.optim.Optimizer:
    groups = parameter_groups(model, optim.weight_decay)
    if optim.rounding != "nearest" and all(p.dtype is not torch.bfloat16 for p in model.parameters()):
        raise NotApplicable(f"optim.rounding = {optim.rounding}: rounds bf16 weights, and this model has none")
    if optim.rounding != "nearest" or optim.cautious_decay:
        rounding, cautious = optim.rounding, optim.cautious_decay
        return AdamW(groups, **_common(optim), rounding=rounding, seed=seed, cautious_decay=cautious)
    fused = optim.kernel == "fused"
    return PlainAdamW(groups, **_common(optim), amsgrad=optim.amsgrad is True, fused=fused, foreach=not fused)


def _spam(model: Weights, optim: Optim, seed: int) -> torch.optim.Optimizer:
    return AdamWSPAM(
        parameter_groups(model, optim.weight_decay),
        optim.spam_form,
        **_common(optim),
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
        fused=optim.kernel == "fused",
    )


def _muon(model: Weights, optim: Optim, seed: int) -> torch.optim.Optimizer:
    return Muon(
        muon_groups(model, optim),
        **_common(optim),
        momentum=optim.muon_momentum,
        neuron_beta=optim.normuon_beta2 if optim.name == "normuon" else None,
        cautious_decay=optim.cautious_decay,
    )


def _lion(model: Weights, optim: Optim, seed: int) -> torch.optim.Optimizer:
    groups = parameter_groups(model, optim.weight_decay)
    return Lion(groups, lr=optim.lr, betas=optim.betas, cautious_decay=optim.cautious_decay)


def _ademamix(model: Weights, optim: Optim, seed: int) -> torch.optim.Optimizer:
    return AdEMAMix(
        parameter_groups(model, optim.weight_decay),
        **_common(optim),
        beta3=optim.ademamix_beta3,
        alpha=optim.ademamix_alpha,
        warmup=optim.ademamix_warmup,
        cautious_decay=optim.cautious_decay,
    )


def _schedule_free(model: Weights, optim: Optim, seed: int) -> torch.optim.Optimizer:
    return ScheduleFreeAdamW(parameter_groups(model, optim.weight_decay), **_common(optim))


def _refuse_rows(model: Weights, name: str) -> None:
    """Refuse an optimizer with eigenvectors where processes have some rows of a matrix each."""
    if any((shard := shard_spec(p)) is not None and shard.group.size() > 1 for p in model.parameters()):
        raise NotApplicable(
            f"optim.name = {name}: works with the eigenvectors of whole matrices, which no process has under fsdp; "
            "pass --distributed.strategy ddp"
        )


def _soap_muon(model: Weights, optim: Optim, seed: int) -> torch.optim.Optimizer:
    _refuse_rows(model, optim.name)
    return SOAPMuon(
        muon_groups(model, optim),
        beta=optim.soap_muon_beta2,
        every=optim.soap_every,
        largest_side=optim.soap_largest_side,
        **_common(optim),
        momentum=optim.muon_momentum,
    )


def _soap(model: Weights, optim: Optim, seed: int) -> torch.optim.Optimizer:
    _refuse_rows(model, optim.name)
    groups = parameter_groups(model, optim.weight_decay)
    return SOAP(groups, **_common(optim), every=optim.soap_every, largest_side=optim.soap_largest_side)


def _sgd(model: Weights, optim: Optim, seed: int) -> torch.optim.Optimizer:
    groups = parameter_groups(model, optim.weight_decay)
    return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.betas[0], foreach=True)


def _sgd_bytes(parameters: Parameters, optim: Optim, gpu: bool) -> OptimizerBytes:
    """PyTorch's SGD: momentum, and a temporary copy of everything in its foreach kernel."""
    total = total_bytes(parameters)
    return OptimizerBytes(total if optim.betas[0] else 0, total)


def _adamw_8bit(model: Weights, optim: Optim, seed: int) -> torch.optim.Optimizer:
    device = next(model.parameters()).device
    library = _eight_bit(device)
    _refuse_other_blocks(model, whole_blocks=device.type == "cuda")
    return library(parameter_groups(model, optim.weight_decay), **_common(optim))


def _eight_bit(device: torch.device) -> type[torch.optim.Optimizer]:
    """AdamW with moments in 8 bits and one scale per 256 values (Dettmers et al. 2022, arXiv 2110.02861).

    torchao's on a GPU; bitsandbytes' elsewhere, because torchao compiles first, which takes some 20 s on a CPU. Both
    keep tensors of fewer than 4,096 elements in full.
    """
    library = "torchao" if device.type == "cuda" else "bitsandbytes"
    module = load_library(f"{library}.optim", f"optim.name = adamw_8bit on {device.type}", "AdamW8bit")
    optimizer: type[torch.optim.Optimizer] = module.AdamW8bit
    return optimizer


def _adamw_8bit_bytes(parameters: Parameters, optim: Optim, gpu: bool) -> OptimizerBytes:
    """One byte per moment and a float32 scale per 256 values; torchao (on a GPU) has two tables of 256 per tensor.

    Small tensors are kept in full, in float32 by bitsandbytes. torchao's update takes moments in float32.
    """
    kept = 0
    for p in parameters.values():
        n = p.numel()
        if n >= 4096:
            kept += 2 * (n + 4 * math.ceil(n / 256)) + (2 * 4 * 256 if gpu else 0)
        else:
            kept += 2 * n * (p.dtype.itemsize if gpu else 4)
    return OptimizerBytes(kept, 4 * 4 * largest(parameters) if gpu else 0)


def _common(optim: Optim) -> dict[str, Any]:
    return {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps}


def _given(value: Any) -> Any:
    """None, which stands for the form's default, if a setting is auto."""
    return None if value == "auto" else value


class OptimizerEntry(NamedTuple):
    """One optimizer that a recipe can name."""

    make: Callable[[Weights, Optim, int], torch.optim.Optimizer]
    """From weights, settings and a seed. Its first step makes all of its state: a checkpoint is compared with it."""
    memory: Callable[[Parameters, Optim, bool], OptimizerBytes] | None = None
    """From parameters, settings and whether they are on a GPU. If None, runs with this optimizer cannot be planned."""


# Every optimizer, by optim.name. Which settings go together is checked in the recipe's schema.
OPTIMIZERS: dict[str, OptimizerEntry] = {
    "adamw": OptimizerEntry(_adamw, adamw_bytes),
    "adamw_8bit": OptimizerEntry(_adamw_8bit, _adamw_8bit_bytes),
    "adamw-spam": OptimizerEntry(_spam, spam_bytes),
    "adamw-prune": OptimizerEntry(_adamw, adamw_bytes),  # gptlab.sparsity prunes by its moments
    "muon": OptimizerEntry(_muon, muon_bytes),
    "sgd": OptimizerEntry(_sgd, _sgd_bytes),
    "lion": OptimizerEntry(_lion, lion_bytes),
    "ademamix": OptimizerEntry(_ademamix, ademamix_bytes),
    "normuon": OptimizerEntry(_muon, normuon_bytes),
    "adamw-schedule-free": OptimizerEntry(_schedule_free, schedule_free_bytes),
    "soap": OptimizerEntry(_soap, soap_bytes),
    "soap-muon": OptimizerEntry(_soap_muon, soap_muon_bytes),
}


def make_optimizer(
    model: Weights, optim: Optim, seed: int = 0, ema: float = 0.0, shape: Model | None = None
) -> torch.optim.Optimizer:
    """The optimizer of a recipe.

    Args:
        model: on its device, which decides the library for 8-bit moments. Under FSDP the local rows.
        optim: the settings.
        seed: of stochastic rounding and of sparse momentum.
        ema: decay rate of the average of the weights, train.ema; 0 is none.
        shape: the model's, whose parametrization multiplies learning rates, decay and eps; None: the standard one.

    Raises:
        NotApplicable: the library for 8-bit moments is not installed or does not work; FSDP would split one of its
            blocks, or SOAP's matrices; or the rounding is for bf16 weights and there are none.
    """
    optimizer = OPTIMIZERS[optim.name].make(model, optim, seed)
    if shape is not None and shape.parametrization != "standard":
        multiply_settings(optimizer, model, shape)
    if ema:
        WeightAverage(optimizer, ema)
    return optimizer


def multiply_settings(optimizer: torch.optim.Optimizer, model: Weights, shape: Model) -> None:
    """Multiply lr, weight_decay and eps by each parameter's multipliers; a group with several becomes several."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups, optimizer.param_groups = optimizer.param_groups, []
    for group in groups:
        alike: dict[Multipliers, list[Tensor]] = {}
        for p in group["params"]:
            by = optimizer_multipliers(shape, names[id(p)], p.dim() == 2, group.get("muon", False))
            alike.setdefault(by, []).append(p)
        for by, params in alike.items():
            changed = {"lr": group["lr"] * by.lr, "lr_scale": group.get("lr_scale", 1.0) * by.lr}
            changed["weight_decay"] = group["weight_decay"] * by.weight_decay
            if "eps" in group:  # Lion has none
                changed["eps"] = group["eps"] * by.eps
            optimizer.param_groups.append({**group, **changed, "params": params})


def is_averaging(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the weights that are evaluated and saved are others than those at which gradients are taken."""
    return hasattr(optimizer, "before_gradients")


def before_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Set the weights at which a step takes its gradients, where they are not those that are evaluated and saved."""
    if is_averaging(optimizer):
        optimizer.before_gradients()  # type: ignore[attr-defined]


def after_update(optimizer: torch.optim.Optimizer) -> None:
    """Set the weights that are evaluated and saved again. `step` does it, unless loss scaling has skipped it."""
    if is_averaging(optimizer):
        optimizer.after_update()  # type: ignore[attr-defined]


def optimizer_bytes(model: Weights, optim: Optim, gpu: bool, ema: float = 0.0) -> OptimizerBytes:
    """What an optimizer needs beside weights and gradients, as it states itself.

    Args:
        model: with or without memory. Under FSDP the local rows.
        gpu: on a GPU or on a CPU.
        ema: train.ema, whose average is as large as the weights.

    Raises:
        UserError: the optimizer states nothing.
    """
    memory = OPTIMIZERS[optim.name].memory
    if memory is None:
        raise UserError(
            f"optim.name = {optim.name}: does not state the memory that it needs, so the run cannot be planned; "
            "add a function that does to its entry in gptlab.optim.optimizers.OPTIMIZERS"
        )
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    kept, temporary = memory(parameters, optim, gpu)
    if ema:  # the swap copies one tensor at a time
        kept, temporary = kept + total_bytes(parameters), max(temporary, max(p.nbytes for p in parameters.values()))
    return OptimizerBytes(kept, temporary)


def _refuse_other_blocks(model: Weights, whole_blocks: bool) -> None:
    """Refuse 8-bit moments if local rows would be quantized otherwise than in the whole tensor.

    Args:
        whole_blocks: tensors whose size is no multiple of 256 are kept in full, as torchao does.

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
                f"optim.name = adamw_8bit: keeps one scale per 256 values, and fsdp would split {name} inside such a "
                f"block ({n:,} values, {each:,} per process); use ddp, or a number of processes that divides it"
            )


def plain_tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    """An optimizer's state of one parameter as plain tensors: {"exp_avg": ..., "step": ...}.

    torchao's 8-bit moments, which are tensors made of tensors, become exp_avg.codes, .scale and .qmap; integers become
    step.int. Several parameters may share a tensor, such as the tables of bitsandbytes.
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
    """Set the learning rate of every group, times its `lr_scale` (muon_lr / lr, the parametrization's multiplier).

    torchao's learning rate is a tensor, which is changed in place for its compiled step.
    """
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr * group.get("lr_scale", 1.0)


def describe(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's facts in environment.json.

    - kernel: PyTorch's kernel (beside Muon, that of AdamW), or the library that has its own.
    - muon_share: share (0 to 1) of the weights that Muon updates; absent without Muon.
    - eps_is_zero: whether eps is 0 in the dtype of some weights, as 1e-8 is in float16. A kernel that computes in that
      dtype then divides by zero.
    - bytes_per_parameter: of moments and compensation, measured; None before the first step.
    """
    cls, defaults = type(optimizer), optimizer.defaults
    library = cls.__module__.partition(".")[0]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    dtypes = {p.dtype for p in parameters}
    kept = [t for state in optimizer.state.values() for t in plain_tensors(state).values() if t.dim()]
    size = sum({t.data_ptr(): t.nbytes for t in kept}.values())  # tables that are shared count once
    told = {
        "optimizer": f"{cls.__module__}.{cls.__qualname__} {getattr(sys.modules[library], '__version__', '')}".rstrip(),
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
