"""What a run takes, before it starts: memory by kind, time, cost, host memory and disk.

Weights, gradients, moments and masks are counted. What autograd keeps is found by a forward pass on fake tensors, which
have shapes and no memory: of one and two layers, and of two and three sequences, as it is linear in both. The head's
temporaries are counted as `model.loss` makes them, a chunk of tokens at a time.

    >>> plan(load_recipe("gpt2-124m-fineweb-edu"), Device.named("H100")).sentence
    'needs about 29.5 GB of the 79.0 GB that a run can have of H100'

All is of an eager run: a compiled one keeps fewer activations, and how many fewer is known when it is compiled.
Under DDP and FSDP it is what one process of several has.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from gptlab import hardware
from gptlab.config import Model, Precision, Recipe, Study, build_recipe
from gptlab.data.labeled import CLASSES
from gptlab.errors import ConfigError, DataError, UserError
from gptlab.hardware import GB, Gpu
from gptlab.machine import free_memory
from gptlab.model.encoder import Encoder, build_encoder
from gptlab.model.gpt import GPT, build_model
from gptlab.model.loss import chunk_length
from gptlab.optim.muon import AT_ONCE
from gptlab.optim.optimizers import make_optimizer, set_lr
from gptlab.precision.regimes import FP32, Regime, apply_regime, enter_regime, make_regime
from gptlab.rundir import RunDir
from gptlab.sparsity.pruner import prunable
from gptlab.tasks.base import open_data

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

# -- devices --------------------------------------------------------------------------------------------------------


CONTEXT = 1 * GB  # of a GPU's memory that a CUDA context, libraries and their workspaces take; assumed, not measured
HOST = {"cpu": 0.4 * GB, "cuda": 3 * GB}  # a process with PyTorch loaded: measured on a CPU, assumed with CUDA
TOO_MUCH = 0.15  # a run that needs more than what is available by this share is not begun
SLACK = 0.95  # of what is available that the largest micro-batch may fill: allocators leave gaps


@dataclass(frozen=True)
class Device:
    """Where a run is to be."""

    name: str
    kind: Literal["cpu", "cuda"]
    available: float
    """Bytes that a run can have."""
    gpu: Gpu | None = None
    """Its peaks, where they are known."""
    host: float = math.inf
    """Bytes of host memory that a process of a run on a GPU can have, PyTorch's own included, where they are known."""

    @classmethod
    def named(cls, name: str = "", memory_gb: float | None = None) -> Device:
        """A GPU that need not be at hand.

        Args:
            name: of `hardware.GPUS`; none is a GPU whose peaks are not known.
            memory_gb: of the GPU, in place of the table's.

        Raises:
            UserError: the name is not in the table, or the memory is no more than the CUDA context takes.
        """
        gpu = hardware.named(name) if name else None
        if memory_gb is None:
            assert gpu is not None, "a name, a memory or both are given"
            return cls(gpu.name, "cuda", gpu.memory - CONTEXT, gpu)
        if not CONTEXT < memory_gb * GB < math.inf:
            raise UserError(f"--memory {memory_gb:g}: must be above {CONTEXT / GB:g}, the GB that a CUDA context takes")
        kind = f"{gpu.name} with" if gpu else "a GPU with"
        return cls(f"{kind} {memory_gb:g} GB", "cuda", memory_gb * GB - CONTEXT, gpu)


def at_hand(device: torch.device, processes: int = 1) -> Device:
    """A device of this machine, with what is free of its memory now.

    Args:
        device: of this process.
        processes: of the run. Those of this machine, which torchrun has counted, share its host memory.
    """
    free = free_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    if device.type != "cuda":
        return Device(f"this machine ({device.type})", "cpu", free)
    import psutil

    ours, here = torch.cuda.memory_reserved(device), psutil.Process().memory_info().rss
    free_there = torch.cuda.mem_get_info(device)[0] + ours
    return Device(hardware.device_name(device), "cuda", free_there, hardware.gpu_of(device), free + here)


# -- the shape ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """What of a recipe says how large its tensors are."""

    model: Model
    precision: Precision
    n_labels: int
    """Outputs of a classifier; 0 is a language model."""

    @property
    def regime(self) -> Regime:
        return make_regime(self.precision)

    def lay_out(self, layers: int | None = None) -> GPT | Encoder:
        """The model in its regime's dtypes, without memory."""
        config = self.model if layers is None else self.model.model_copy(update={"n_layer": layers})
        with torch.device("meta"):
            model = Encoder(config, self.n_labels) if self.n_labels else GPT(config)
            apply_regime(model, self.regime)
        return model

    def lay_out_rows(self, over: int) -> GPT | Encoder:
        """The model with the rows that the first of `over` processes holds of each parameter under FSDP."""
        model = self.lay_out()
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    module._parameters[name] = nn.Parameter(p.detach()[: math.ceil(len(p) / over)])
        return model


LABELS = {**{name: len(classes) for name, classes in CLASSES.items()}, "eurlex57k": 4271}  # outputs, in training


def resolve(recipe: Recipe) -> tuple[Shape, int | None, list[str]]:
    """Shape of a recipe, tokens of an epoch where the dataset is at hand, and what was taken for granted.

    Raises:
        UserError: the vocabulary or the labels are in the dataset alone, and that is not prepared.
    """
    notes = []
    data = None
    try:
        data = open_data(recipe)
    except DataError:
        notes.append(f"no prepared dataset at {', '.join(recipe.data.mixture) or recipe.data.folder}")
    model = recipe.model
    if recipe.train.init_from:
        if RunDir(recipe.train.init_from).exists():
            source = RunDir.open(recipe.train.init_from).read_recipe().model
            shorter = {"block_size": min(model.block_size, source.block_size), "dropout": model.dropout}
            model = source.model_copy(update=shorter)
        else:
            notes.append(f"the shape is the recipe's own: train.init_from = {recipe.train.init_from} is not read")
    if not model.vocab_size:
        name = recipe.data.tokenizer
        trained = re.fullmatch(r"bpe-(\d+)", name)
        known = {"gpt2": 50257, "byte": 257}.get(name) or (int(trained[1]) if trained else 0)
        if data is None and not known:
            raise UserError(
                f"data.tokenizer = {name}: how many ids it has is known when {recipe.data.folder} is prepared; "
                f"--model.vocab-size N says it before"
            )
        model = model.model_copy(update={"vocab_size": data.vocab_size if data is not None else known})
    labels = 0
    if recipe.task == "classify":
        labels = data.facts()["labels"] if data is not None else LABELS.get(recipe.data.corpus, 0)
        if not labels:
            raise UserError(
                f"data.corpus = {recipe.data.corpus}: how many labels it has is known when {recipe.data.folder} is "
                f"prepared; `gptlab prepare {recipe.data.corpus}` does it"
            )
    return (
        Shape(model, recipe.precision, labels),
        None if data is None else data.epoch_tokens(recipe.model.block_size),
        notes,
    )


# -- activations ----------------------------------------------------------------------------------------------------


class _Saves(torch.autograd.Function):
    """A new tensor, and what a kernel keeps to differentiate it: other tensors, and perhaps itself."""

    @staticmethod
    def forward(ctx: Any, make: Callable[[], Tensor], kept: list[Tensor], itself: bool, *inputs: Tensor) -> Tensor:
        out = make()
        ctx.save_for_backward(*kept, *([out] if itself else []))
        return out


class _GpuKernels(TorchFunctionMode):
    """Stands in for kernels that keep something else on a GPU than on a CPU, where the pass is made.

    Attention keeps queries, keys, values, output and a float32 a row, never the scores (flash attention; in float32
    or with a mask, which is kept in the dtype of the queries, the memory-efficient kernel); dropout a byte a number;
    RMSNorm its input and a float32 a row.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k, v = args
            mask = kwargs["attn_mask"]
            rows = q.new_empty(q.shape[:-1], dtype=torch.float32)  # (B, H, T), log-sum-exp
            masks = [] if mask is None else [q.new_empty(mask.shape)]
            flash = mask is None and q.dtype is not torch.float32
            B, H, T, D = q.shape

            def attended() -> Tensor:  # laid out as the queries are, or else (B, T, H, D)
                low = q.detach().transpose(1, 2)
                return (torch.empty_like(low) if flash else low.new_empty(B, T, H, D)).transpose(1, 2)

            return _Saves.apply(attended, [q, k, v, rows, *masks], True, q, k, v)
        if func is F.dropout and kwargs["p"] and kwargs["training"]:
            x = args[0]
            return _Saves.apply(lambda: torch.empty_like(x), [torch.empty_like(x, dtype=torch.bool)], False, x)
        if func is F.rms_norm:
            x, weight = args[0], kwargs["weight"]
            kept = [x, weight, x.new_empty(x.shape[:-1])]
            return _Saves.apply(lambda: torch.empty_like(x), kept, False, x, weight)
        return func(*args, **kwargs)


def kept_bytes(model: GPT | Encoder, regime: Regime, batch: int, gpu: bool) -> int:
    """Bytes that a forward pass keeps for the backward one, parameters left out and each storage once.

    A language model's is up to its last hidden states, as the head's is `head_bytes`; a classifier's is all.

    Args:
        model: on the CPU, real or fake.
        batch: sequences of model.config.block_size tokens.
        gpu: count kernels as a GPU has them.
    """
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, tuple[int, Tensor]] = {}  # the tensor too: an address is not used again while it lives

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes(), tensor
        return tensor

    tokens = torch.zeros(batch, model.config.block_size, dtype=torch.long)
    model.train()
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        regime.context(torch.device("cpu")),
        _GpuKernels() if gpu else nullcontext(),
    ):
        if isinstance(model, Encoder):
            model(tokens, torch.ones(batch, dtype=torch.long), torch.zeros(batch, model.head.out_features))
        else:
            model.hidden(tokens, tokens if model.config.document_attention else None)
    return sum(size for size, _ in kept.values())


@dataclass(frozen=True)
class Activations:
    """Bytes kept for the backward pass, linear in sequences and layers."""

    fixed: float
    a_sequence: float
    a_layer: float
    """Casts of a layer's weights under autocast."""
    a_layer_and_sequence: float

    def of(self, sequences: float, layers: float) -> float:
        return self.fixed + self.a_sequence * sequences + layers * self.layer(sequences)

    def layer(self, sequences: float) -> float:
        return self.a_layer + self.a_layer_and_sequence * sequences


@functools.lru_cache(maxsize=256)
def activations(shape: Shape, gpu: bool) -> Activations:
    """What a shape's forward pass keeps: from one and two layers, of two and three sequences, without memory."""
    found = {}
    models = {layers: shape.lay_out(layers) for layers in (1, 2)}
    with FakeTensorMode():
        for layers, model in models.items():
            for module in model.modules():  # `to_empty` would swap parameters, which fake ones do not allow
                for name, p in module._parameters.items():
                    if p is not None:
                        module._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype))
                for name, b in module._buffers.items():
                    if b is not None:
                        module._buffers[name] = torch.empty(b.shape, dtype=b.dtype)
            for batch in (2, 3):
                found[layers, batch] = kept_bytes(model, shape.regime, batch, gpu)
    both = found[2, 3] - found[2, 2] - found[1, 3] + found[1, 2]
    a_sequence = found[1, 3] - found[1, 2] - both
    a_layer = found[2, 2] - found[1, 2] - 2 * both
    return Activations(found[1, 2] - 2 * a_sequence - a_layer - 2 * both, a_sequence, a_layer, both)


def most_activations(shape: Shape, gpu: bool) -> Activations:
    """A bound on `activations` from the widths alone, some 1.5 to 3 times as much, for a question asked in a hurry.

    All is taken as float32: 20 numbers a channel and 5 a hidden unit of the MLP for every token, and what attention
    with dropout keeps of its scores on a CPU.
    """
    m, T = shape.model, shape.model.block_size
    matrices = 4 * m.n_embd**2 + 3 * m.n_embd * m.mlp_hidden
    scores = 4 * m.n_head * T * T if m.dropout and not gpu else 0
    return Activations(
        fixed=4 * m.n_embd * shape.n_labels,
        a_sequence=4 * (T * (6 * m.n_embd + 4) + T * T + 8 * shape.n_labels),
        a_layer=4 * matrices,
        a_layer_and_sequence=4 * (T * (20 * m.n_embd + 5 * m.mlp_hidden) + T * T + scores),
    )


# -- memory by kind -------------------------------------------------------------------------------------------------


def size(dtype: torch.dtype) -> int:
    return dtype.itemsize


def optimizer_bytes(model: nn.Module, recipe: Recipe, gpu: bool) -> tuple[float, float]:
    """What the optimizer keeps, and the largest that it needs besides for a moment.

    Fused kernels need nothing besides. What the others need is counted in whole tensors, roughly: it is beside weights
    and gradients alone, when the activations are gone.
    """
    optim = recipe.optim
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    largest = max(p.numel() for p in parameters.values())
    amsgrad = optim.amsgrad is True
    if optim.name == "adamw-spam" and optim.amsgrad == "auto":
        amsgrad = optim.spam_form == "seed"
    kept = temporary = 0.0
    for name, p in parameters.items():
        n, width, matrix = p.numel(), size(p.dtype), p.dim() == 2
        if optim.name == "sgd":
            kept += width * n if optim.betas[0] else 0
        elif optim.name == "muon":
            kept += width * n * (1 if name.startswith("h.") and matrix else 2)
        elif optim.name == "adamw_8bit" and n >= 4096:
            # a byte for each moment, and a float32 scale for 256 numbers; torchao has two tables of 256 for each tensor
            kept += 2 * (n + 4 * math.ceil(n / 256)) + (2 * 4 * 256 if gpu else 0)
        elif optim.name == "adamw_8bit":
            kept += 2 * n * (width if gpu else 4)  # small tensors in full; bitsandbytes' are float32
        else:
            kept += width * n * (3 if amsgrad else 2)
            if optim.rounding == "kahan" and p.dtype is torch.bfloat16:
                kept += width * n
            if optim.name == "adamw-spam" and optim.spam_density < 1 and matrix:
                kept += n  # torch.bool
    widest = max(size(p.dtype) for p in parameters.values())
    every = sum(p.numel() * size(p.dtype) for p in parameters.values())
    if optim.rounding != "nearest":
        temporary = 6 * 4 * largest + (8 * largest if optim.rounding == "stochastic" else 0)
    elif optim.name == "muon":
        blocks = sum(p.numel() for name, p in parameters.items() if name.startswith("h.") and p.dim() == 2)
        temporary = min(AT_ONCE, blocks) * (2 * widest + (4 + 3 * 2 if gpu else 4 * 4))
    elif optim.name == "adamw_8bit" and gpu:
        temporary = 4 * 4 * largest  # the moments in float32
    elif optim.name == "sgd" or optim.kernel == "foreach":
        temporary = every
    if optim.name == "adamw-spam":
        temporary += 2.25 * widest * largest  # the bound of an entry, its negative, and where it is infinite
    return kept, temporary


def mask_bytes(model: nn.Module, recipe: Recipe) -> float:
    """What the pruner keeps on the device: a bit a weight, and until the ramp ends what movement scores by."""
    sparsity = recipe.sparsity
    if sparsity.method == "none":
        return 0.0
    kept = 0.0
    for p in prunable(model, sparsity.head).values():
        kept += p.shape[0] * math.ceil(p.shape[1] / 8)
        if sparsity.method == "movement":  # scores and the dense weights, or the weights at the start
            kept += p.numel() * (4 + size(p.dtype) if sparsity.movement == "gradient" else 4)
    return kept


def head_bytes(shape: Shape, model: GPT, sequences: int, kind: str) -> float:
    """What a language model's head needs at once, as `linear_cross_entropy` makes it, beside what is kept below it.

    Hidden states and weight in the dtype of the matmul, the gradients of both, and the largest of what a chunk of
    logits goes through: the logits in float32, as much again inside log-sum-exp, and the chunk before's gradient.
    """
    V, C = model.head_weight.shape
    N = sequences * shape.model.block_size
    regime = shape.regime
    stream = regime.weights if regime.autocast is None else FP32
    dtype = regime.head or regime.autocast or stream
    low, wide = size(dtype), size(torch.promote_types(dtype, FP32))
    n = chunk_length(N, V, kind)
    cast = wide != low
    chunk = 2 * wide + (low + wide - 2 * wide if regime.loss is not FP32 else 0) + (low if n < N else 0)
    chunk = max(chunk, wide + (low if cast else 0) + (low if n < N else 0))
    if regime.loss is not FP32:
        chunk = max(chunk, 2 * wide + size(regime.loss) + (low if n < N else 0))
    last = n * V * (wide + (low if cast else 0)) + low * V * C  # its gradient, times the hidden states
    total = N * C * size(stream)  # the last hidden states
    total += N * C * low if dtype is not stream else 0
    total += V * C * low if dtype is not model.head_weight.dtype else 0
    total += V * C * wide + N * C * low  # gradients of the weight and of the hidden states
    return total + max(n * V * chunk, last)


@dataclass(frozen=True)
class Memory:
    """Bytes of a run by kind. `peak` is the largest sum that is there at one moment, which is not the sum of all."""

    weights: float
    gradients: float
    optimizer: float
    masks: float
    activations: float
    head: float
    gathered: float
    """Under FSDP: other processes' weights for a while, and whole gradients until they are sent."""
    peak: float
    moment: str
    """When that is: in the loss, in the backward pass, at its end, in the optimizer's step or in an evaluation."""
    least: float
    """What the run needs in any case: the peak, or for a compiled run the peak with what no compiler leaves out."""


def spread_over(recipe: Recipe, processes: int) -> int:
    """Processes that share one copy of the weights; 1 is a copy for each.

    Raises:
        UserError: distributed.strategy and distributed.shard_over do not go with so many processes.
    """
    distributed = recipe.distributed
    if processes > 1 and distributed.strategy == "none":
        raise UserError(f"distributed.strategy = none: is for one process, and these are {processes}; ddp or fsdp")
    if distributed.strategy != "fsdp":
        return 1
    over = min(distributed.shard_over, processes) or processes
    if processes % over:
        raise UserError(f"distributed.shard_over = {over}: does not divide the {processes} processes")
    return over


def share_of_step(recipe: Recipe, processes: int) -> int:
    """Sequences of a step that one process has, the most of them."""
    if recipe.sequences_per_step < processes:
        raise UserError(
            f"{processes} processes cannot share the {recipe.sequences_per_step} sequences of a step: "
            f"batch.tokens_per_step must be more, or the processes fewer"
        )
    return math.ceil(recipe.sequences_per_step / processes)


def bytes_of(tensors: Iterable[Tensor]) -> float:
    return float(sum(t.numel() * size(t.dtype) for t in tensors))


def memory(
    recipe: Recipe, shape: Shape, sequences: int, kind: str, processes: int = 1, saved: Activations | None = None
) -> Memory:
    """Memory of a process of a run with `sequences` in a micro-batch, on a "cpu" or on a GPU ("cuda").

    Gradients are there while the loss is taken from the second micro-batch of a step on, under FSDP whole ones; with
    one micro-batch they come as activations go, save under DDP, which has a place for them from the start.

    Args:
        saved: default `activations` of the shape.
    """
    model, gpu = _laid_out(shape), kind == "cuda"
    over = spread_over(recipe, processes)
    rows = _laid_out(shape, over)
    weights = bytes_of(rows.parameters()) + bytes_of(rows.buffers())
    gradients = bytes_of(rows.parameters())
    kept, temporary = optimizer_bytes(rows, recipe, gpu)
    masks = mask_bytes(rows, recipe)
    saved, layers = saved or activations(shape, gpu), shape.model.n_layer
    regime, config = shape.regime, shape.model
    stream, width = size(regime.weights if regime.autocast is None else FP32), size(regime.autocast or regime.weights)
    tokens = sequences * config.block_size
    gathered = reduced = root = 0.0
    if over > 1:
        # the root's weights from the first layer to the last; of the blocks' matrices those that are used and those
        # that come next; a block's gradients, and the float32 that they are summed in
        block = sum(p.numel() for m in model.h[0].modules() if isinstance(m, nn.Linear) for p in m.parameters())
        rest = model.parameter_count() - layers * block
        low = size(regime.gathered or regime.weights)
        gathered, reduced = rest * size(regime.weights) + 2 * block * low, block * (low + 4.0)
        root = rest * (size(regime.weights) + 4.0)
        if regime.gathered:  # in the dtype that autocast would cast them to
            saved = dataclasses.replace(saved, a_layer=0)
        if recipe.optim.name == "muon":
            temporary = optimizer_bytes(model, recipe, gpu)[1]  # of whole matrices
    work = casts = 0.0  # of one layer that is computed again; of weights, which autocast keeps while it is on
    if recipe.train.activation_checkpointing:
        a = saved.of(sequences, 0) + layers * tokens * config.n_embd * stream  # the input of each layer
        if config.document_attention:
            a += sequences * config.block_size**2  # the mask, torch.bool
        work, casts = saved.layer(sequences), layers * saved.a_layer
    else:
        a = saved.of(sequences, layers)
    head = 0.0
    if isinstance(model, GPT):
        head = head_bytes(shape, model, sequences, kind)
        V, C = model.head_weight.shape
        work += 4 * V * C  # the gradient of its weight, which waits for the embedding's where they are one
    # gradients of a block's stream and of its branch, and inside the MLP one more than the activations that it frees
    work += tokens * (2 * stream * config.n_embd + width * config.mlp_hidden)
    wte = model.wte.weight
    embedding = wte.numel() * size(wte.dtype)  # its gradient is made dense before it is added
    before = weights + kept + masks
    accumulates, copied = sequences < share_of_step(recipe, processes), processes > 1 and over == 1  # copied: DDP
    held = gradients if accumulates or copied else 0.0
    if over > 1 and accumulates:  # they are sent with those of the last micro-batch, and wait whole, in float32
        held = 4.0 * model.parameter_count()
    last = root if over > 1 else embedding * (2 if config.tied and held else 1)
    moments = {
        "in the loss": before + gathered + held + a + casts + head,
        "in the backward pass": before + gathered + reduced + held + a + work,
        "at the end of the backward pass": before + gathered + gradients + last,
        "in the optimizer's step": before + gradients + temporary,
    }
    if over > 1:  # a whole model is made for it
        moments["in an evaluation"] = before + bytes_of(model.parameters()) + saved.layer(sequences) + head
    moment = max(moments, key=lambda name: moments[name])
    peak = least = moments[moment]
    if compiles(recipe, kind):
        # Outputs of matmuls and of attention are not computed again: queries, keys, values, attention and its
        # projection, the MLP's hidden and its output. All else may be.
        matrices = 2 if config.mlp == "swiglu" else 1
        floor = layers * tokens * width * (6 * config.n_embd + matrices * config.mlp_hidden)
        least = max(before + gathered + held + min(a, floor), before + gradients)
    gathered += reduced + (held if over > 1 else 0.0)
    return Memory(weights, gradients, kept, masks, a, head, gathered, peak, moment, least)


def compiles(recipe: Recipe, kind: str) -> bool:
    return recipe.compile.enabled is True or (recipe.compile.enabled == "auto" and kind == "cuda")


@functools.lru_cache(maxsize=64)
def _laid_out(shape: Shape, over: int = 1) -> GPT | Encoder:
    return shape.lay_out() if over == 1 else shape.lay_out_rows(over)


def largest_micro_batch(
    recipe: Recipe, shape: Shape, device: Device, processes: int = 1, most: float = math.inf
) -> int:
    """The most sequences whose run fits into `SLACK` of what is available; 0 is none.

    Args:
        processes: that share a step; what one of them has of it is never exceeded.
        most: nor is this.
    """

    def fit(sequences: int, saved: Activations | None = None) -> bool:
        return memory(recipe, shape, sequences, device.kind, processes, saved).peak <= SLACK * device.available

    share = share_of_step(recipe, processes)
    if share <= most:  # in one piece, when no gradients wait, it may take less than in two
        if fit(share, most_activations(shape, device.kind == "cuda")) or fit(share):
            return share
        most = share - 1
    if fit(int(most), most_activations(shape, device.kind == "cuda")):
        return int(most)
    low, high = 0, int(most)  # low fits
    while low < high:
        middle = (low + high + 1) // 2
        if fit(middle):
            low = middle
        else:
            high = middle - 1
    return low


# -- the speed of a CPU ---------------------------------------------------------------------------------------------

SAMPLE = 2e10  # FLOPs of a micro-step up to which it is timed as it is


@dataclass(frozen=True)
class Speed:
    """How fast this machine trains a model."""

    tokens: float
    """Training tokens a second."""
    note: str
    """What was timed."""


def measure(
    recipe: Recipe,
    shape: Shape,
    micro_batch: int,
    seconds: float = 3.0,
    clock: Callable[[], float] = time.perf_counter,
) -> Speed:
    """Time micro-steps and the optimizer's step on the CPU, one of each in turn, after one that warms up.

    Of a large model a part is timed, so that neither memory nor time grows with it: as few sequences as needed, then
    two layers, then a shorter context. Seconds of a token grow with its FLOPs, those of an update with the weights.

    Raises:
        UserError: a CPU has no such regime, or a library is missing.
    """
    whole = config = shape.model

    def flops() -> int:  # of one sequence
        return _laid_out(dataclasses.replace(shape, model=config)).flops_per_token() * config.block_size

    sequences = max(1, min(micro_batch, int(SAMPLE // flops())))
    if flops() > SAMPLE:
        config = config.model_copy(update={"n_layer": min(2, config.n_layer)})
    if flops() > SAMPLE:
        block = max(128, int(config.block_size * SAMPLE / flops()))
        config = config.model_copy(update={"block_size": min(block, config.block_size)})

    cpu, threads, mode = torch.device("cpu"), torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        torch.set_num_threads(recipe.train.threads or threads)
        regime = enter_regime(recipe.precision, cpu)
        tokens = torch.arange(sequences * config.block_size).view(sequences, -1) % config.vocab_size
        factor = torch.tensor((2.0**16 if regime.loss_scaling else 1.0) / tokens.numel())
        inputs: tuple[Tensor | None, ...]
        model: GPT | Encoder
        if shape.n_labels:
            model = build_encoder(config, shape.n_labels, on_meta=lambda m: apply_regime(m, regime))
            lengths, targets = torch.full((sequences,), config.block_size), torch.zeros(sequences, shape.n_labels)
            inputs = tokens, lengths, targets, factor
        else:
            model = build_model(config, on_meta=lambda m: apply_regime(m, regime))
            inputs = tokens, tokens, torch.zeros_like(tokens) if config.document_attention else None, factor
        model.activation_checkpointing = recipe.train.activation_checkpointing
        optimizer = make_optimizer(model, recipe.optim, recipe.seed)
        set_lr(optimizer, 0.0)  # the weights stay as they are

        def step() -> tuple[float, float]:
            """Seconds of a micro-step and of an update."""
            begin = clock()
            with regime.context(cpu):
                out = model(*inputs)
            out.train.backward()
            middle = clock()
            optimizer.step()
            return middle - begin, clock() - middle

        step()
        steps = [step()]
        while sum(map(sum, steps)) < seconds:
            steps.append(step())
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(mode)
    forth_and_back, update = (sum(each) / len(steps) for each in zip(*steps, strict=True))
    full = _laid_out(shape)
    a_token = forth_and_back / tokens.numel() * full.flops_per_token() / model.flops_per_token()
    a_step = update * full.parameter_count() / model.parameter_count()
    note = f"tokens a second were measured for about {seconds:.2g} s on this CPU"
    if config != whole:
        note += f" and are extrapolated from {config.n_layer} of {whole.n_layer} layers and {tokens.numel()} tokens"
    return Speed(1 / (a_token + a_step / (recipe.sequences_per_step * whole.block_size)), note)


# -- the plan -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a run takes. Bytes, seconds and FLOPs; None is what cannot be known."""

    name: str
    device: str
    available: float
    """Bytes that the device has for it."""
    processes: int
    """Each has such a device."""
    parameters: int
    flops_per_token: int
    micro_batch: int
    micro_batches: int
    """Of a process in a step."""
    memory: Memory
    """Of a process."""
    largest_micro_batch: int
    """Up to the sequences of a step that a process has; 0 where not even one fits."""
    mfu: float
    measured: bool
    """Whether tokens_per_second was measured here. If not, it follows from `mfu`."""
    tokens_per_second: float | None
    """Of all processes."""
    steps: int | None
    tokens: int | None
    """Training tokens of the whole run."""
    hours: float | None
    """Of training and evaluating on the held-out loss."""
    cost: float | None
    host: float
    """Bytes of host memory that a process needs, PyTorch's own included."""
    copies: float
    """Bytes of host memory that a checkpoint is copied to, by all processes together, where so much is free."""
    host_available: float
    """Bytes that a process can have."""
    data: float | None
    """Bytes of the dataset on disk; where it is not prepared, of as many tokens as the run reads."""
    checkpoint: float
    """Bytes of one checkpoint."""
    checkpoints: float
    """Bytes of all that are there at once, and of the one that is being written."""
    sentence: str
    """Whether it fits, with numbers and the way out."""
    notes: list[str]

    @property
    def needed_gb(self) -> float:
        return self.memory.peak / GB

    @property
    def available_gb(self) -> float:
        return self.available / GB

    @property
    def device_hours(self) -> float | None:
        """Hours of one device: those of all processes together."""
        return None if self.hours is None else self.hours * self.processes

    @property
    def refused(self) -> bool:
        """Whether it needs more than what is available by over 15%, on the device or the host: it is not to start."""
        over = 1 + TOO_MUCH
        return self.memory.least > over * self.available or self.host > over * self.host_available

    def to_json(self) -> dict[str, Any]:
        facts = dataclasses.asdict(self)
        facts["host_available"] = self.host_available if math.isfinite(self.host_available) else None
        return {
            **facts,
            "device_hours": self.device_hours,
            "needed_gb": self.needed_gb,
            "available_gb": self.available_gb,
            "refused": self.refused,
        }


def fits(recipe: Recipe, device: torch.device, processes: int = 1) -> Plan:
    """The plan of a run on a device of this machine, to be asked before it starts: `.refused`, `.sentence`.

    The activations are the bound of `most_activations` where even that is there, as then the answer is known.
    """
    there = at_hand(device, processes)
    found = plan(recipe, there, processes=processes, bound=True)
    return plan(recipe, there, processes=processes) if found.memory.peak > there.available else found


def plan(
    recipe: Recipe,
    device: Device,
    mfu: float = 0.4,
    price: float = 0.0,
    processes: int = 1,
    bound: bool = False,
    measure: Callable[[Recipe, Shape, int], Speed] | None = None,
) -> Plan:
    """What a run takes on a device, or on several that each have a process.

    Args:
        recipe: micro_batch = auto takes the largest that fits.
        device: of `Device.named` or `at_hand`.
        mfu: share of the peak FLOP/s of the regime's matmul format, see `hardware.mfu`.
        price: of an hour of one device; 0 takes train.price_per_hour, which is of the whole machine.
        processes: devices that train together, as distributed.strategy says.
        bound: take `most_activations` for the activations of a given micro-batch, and look for no larger one.
        measure: how fast the device trains, as `measure` finds it for a CPU at hand, where no peak is known. It is not
            asked where nothing fits.

    Raises:
        UserError: see `resolve`, `spread_over` and `share_of_step`.
    """
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu {mfu}: must be above 0 and at most 1")
    if not 0 <= price < math.inf:
        raise UserError(f"--price {price:g}: must be 0 or more")
    if processes < 1:
        raise UserError(f"--gpus {processes}: must be at least 1")
    shape, epoch, notes = resolve(recipe)
    recipe = recipe.replace({"model": shape.model.model_dump()})
    model = _laid_out(shape)
    share, given = share_of_step(recipe, processes), recipe.batch.micro_batch
    if bound and given != "auto":
        largest = micro_batch = min(given, share)
        need = memory(
            recipe, shape, micro_batch, device.kind, processes, most_activations(shape, device.kind == "cuda")
        )
    else:
        largest = largest_micro_batch(recipe, shape, device, processes)
        micro_batch = max(1, largest) if given == "auto" else min(given, share)
        need = memory(recipe, shape, micro_batch, device.kind, processes)
    if compiles(recipe, device.kind):
        notes.append("activations are those of an eager run; a compiled one keeps fewer")
    if recipe.precision.regime.startswith("fp8") and device.kind == "cuda":
        notes.append("FLOP/s are bf16's: float8 is faster in large matrices only")
    if recipe.task == "classify":
        notes.append("every document counts block_size tokens; shorter ones take less")

    steps = _steps(recipe, epoch)
    tokens = None if steps is None else steps * recipe.batch.tokens_per_step
    peak = device.gpu.peak(shape.regime.matmul_format) if device.gpu else None
    rate, measured = processes * mfu * peak / model.flops_per_token() if peak else None, False
    if measure is not None and largest:
        try:
            speed = measure(recipe, shape, min(micro_batch, largest))
        except UserError as error:
            notes.append(str(error))
        else:
            rate, measured = speed.tokens, True
            notes.append(speed.note)
    hours = None
    if rate and tokens is not None and steps is not None:
        evaluations = 2 + (steps // recipe.train.eval_every if recipe.train.eval_every else 0)
        evaluated = evaluations * recipe.eval.tokens * (2 if recipe.eval.train else 1)
        hours = (tokens + evaluated / 3) / rate / 3600  # a forward pass is a third of the FLOPs
    an_hour = price * processes or recipe.train.price_per_hour
    if processes > 1:
        notes.append("what processes wait for one another, and exchange, is not in the hours")

    optimizer, _ = optimizer_bytes(model, recipe, device.kind == "cuda")
    checkpoint = bytes_of(model.parameters()) + optimizer + mask_bytes(model, recipe)
    written = math.inf if steps is None else 1 + (steps // recipe.checkpoint.every if recipe.checkpoint.every else 0)
    there = min(recipe.checkpoint.keep_last + recipe.checkpoint.keep_best + 1, written)
    # weights go to a GPU one at a time, from float32
    host = HOST[device.kind] + (4 * model.wte.weight.numel() if device.kind == "cuda" else need.peak)
    read = epoch if epoch is not None else tokens
    return Plan(
        name=recipe.name,
        device=device.name,
        available=device.available,
        processes=processes,
        parameters=model.parameter_count(),
        flops_per_token=model.flops_per_token(),
        micro_batch=micro_batch,
        micro_batches=math.ceil(share / micro_batch),
        memory=need,
        largest_micro_batch=largest,
        mfu=mfu,
        measured=measured,
        tokens_per_second=rate,
        steps=steps,
        tokens=tokens,
        hours=hours,
        cost=hours * an_hour if hours is not None and an_hour else None,
        host=host,
        copies=checkpoint,
        host_available=device.host,
        data=None if read is None else read * (2 if shape.model.vocab_size <= 2**16 else 4),
        checkpoint=checkpoint,
        checkpoints=there * checkpoint,
        sentence=_sentence(recipe, shape, device, processes, need, host, largest),
        notes=notes,
    )


def _steps(recipe: Recipe, epoch: int | None) -> int | None:
    if epoch is None and recipe.train.max_epochs:
        if not (recipe.train.max_steps or recipe.train.max_tokens):
            return None
        epoch = 2**62  # another limit rules, as far as is known
    return recipe.step_limit(epoch or 0)


def _sentence(
    recipe: Recipe, shape: Shape, device: Device, processes: int, need: Memory, host: float, largest: int
) -> str:
    have = f"the {device.available / GB:.1f} GB that a run can have of {device.name}"
    if device.kind == "cuda" and host > device.host:
        return (
            f"needs about {host / GB:.1f} GB of host memory for PyTorch and one tensor on its way to the GPU, and a "
            f"process can have {device.host / GB:.1f}: end other programs, or start fewer processes on this machine"
        )
    if need.peak <= device.available:
        return f"needs about {need.peak / GB:.3g} GB of {have}"
    says = f"needs about {need.peak / GB:.3g} GB {need.moment}, more than {have}"
    if largest:
        return f"{says}: --batch.micro-batch {largest} fits, with the same tokens in a step"
    ways: list[dict[str, Any]] = [
        {"train.activation_checkpointing": True},
        {"train.activation_checkpointing": True, "precision.regime": "bf16_pure"},
    ]
    if processes > 1:
        ways.insert(0, {"distributed.strategy": "fsdp", "distributed.shard_over": 0})
        ways += [{**ways[0], **way} for way in ways[1:]]
    for way in ways:
        try:
            other = recipe.replace(way)
        except ConfigError:
            continue
        flags = " ".join(f"--{key.replace('_', '-')} {str(value).lower()}" for key, value in way.items())
        other_shape = dataclasses.replace(shape, precision=other.precision)
        if most := largest_micro_batch(other, other_shape, device, processes):
            return f"{says}: {flags} --batch.micro-batch {most} fits"
    return f"{says}, and so would a micro-batch of 1 in bf16 with activation checkpointing: a smaller model is needed"


# -- studies --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StudyPlan:
    """The plans of a study's arms; each is run once for every seed."""

    name: str
    arms: dict[str, Plan]
    seeds: int

    @property
    def hours(self) -> float | None:
        """Of all runs; None where one arm's are not known."""
        return _sum(plan.hours for plan in self.arms.values() for _ in range(self.seeds))

    @property
    def device_hours(self) -> float | None:
        """Of one device: those of all processes together."""
        return _sum(plan.device_hours for plan in self.arms.values() for _ in range(self.seeds))

    @property
    def cost(self) -> float | None:
        return _sum(plan.cost for plan in self.arms.values() for _ in range(self.seeds))

    @property
    def checkpoints(self) -> float:
        """Bytes of the checkpoints of all runs."""
        return sum(plan.checkpoints for plan in self.arms.values()) * self.seeds

    def to_json(self) -> dict[str, Any]:
        arms = {name: plan.to_json() for name, plan in self.arms.items()}
        return {
            "name": self.name,
            "seeds": self.seeds,
            "hours": self.hours,
            "device_hours": self.device_hours,
            "cost": self.cost,
            "checkpoints": self.checkpoints,
            "arms": arms,
        }


def _sum(values: Iterator[float | None]) -> float | None:
    known = list(values)
    return None if None in known else sum(value for value in known if value is not None)


def plan_study(
    study: Study,
    device: Device,
    mfu: float = 0.4,
    price: float = 0.0,
    processes: int = 1,
    measure: Callable[..., Speed] | None = None,
) -> StudyPlan:
    """What every arm of a study takes, and all its runs one after the other; arguments as of `plan`."""
    speed = _shared(measure, len(study.arms))
    arms = {
        arm: plan(study.build(arm, study.seeds[0]), device, mfu, price, processes, measure=speed) for arm in study.arms
    }
    return StudyPlan(study.name, arms, len(study.seeds))


def _shared(measure: Callable[..., Speed] | None, plans: int) -> Callable[..., Speed] | None:
    """The measurement with its three seconds shared among several plans."""
    return measure and functools.partial(measure, seconds=3.0 / plans)


def sweep(
    layers: Sequence[Mapping[str, Any]],
    device: Device,
    presets: Sequence[str] = (),
    micro_batches: Sequence[int] = (),
    mfu: float = 0.4,
    price: float = 0.0,
    processes: int = 1,
    measure: Callable[..., Speed] | None = None,
) -> dict[str, Plan]:
    """Plans of a recipe in several sizes, micro-batches or both, by what differs; other arguments as of `plan`.

    Args:
        layers: of the recipe, as `build_recipe` takes them.
        presets: values of model.preset; none is the recipe's own shape.
        micro_batches: sequences; none is the recipe's own.
    """
    rows = {}
    speed = _shared(measure, len(presets or [""]) * len(micro_batches or [0]))
    for preset in presets or [""]:
        for micro_batch in micro_batches or [0]:
            other: dict[str, Any] = {"model.preset": preset} if preset else {}
            if micro_batch:
                other["batch.micro_batch"] = micro_batch
            name = " x ".join(filter(None, (preset, str(micro_batch or ""))))
            rows[name] = plan(build_recipe(*layers, other), device, mfu, price, processes, measure=speed)
    return rows


# -- tables ---------------------------------------------------------------------------------------------------------


def render(plan: Plan) -> Group:
    """A plan as tables for a terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    m = plan.memory
    several = plan.processes > 1
    title = f"{plan.name} on {plan.device}, micro-batch {plan.micro_batch}"
    if several:
        title = f"{plan.name} on {plan.processes} x {plan.device}, micro-batch {plan.micro_batch} on each"
    kinds = Table()
    kinds.add_column("memory of each" if several else "memory")
    kinds.add_column("GB", justify="right")
    for kind in ("weights", "gradients", "optimizer", "masks", "activations", "head", "gathered"):
        if getattr(m, kind):
            kinds.add_row(kind, _gb(getattr(m, kind)))
    kinds.add_section()
    kinds.add_row(f"peak, {m.moment}", _gb(m.peak))
    kinds.add_row("available", _gb(plan.available))

    facts = Table(show_header=False)
    facts.add_column()
    facts.add_column(justify="right")
    for name, value in (
        ("parameters", f"{plan.parameters:,}"),
        ("training FLOPs a token", f"{plan.flops_per_token:,}"),
        ("largest micro-batch that fits", f"{plan.largest_micro_batch:,} sequences"),
        ("micro-batches in a step" + (", on each" if several else ""), f"{plan.micro_batches:,}"),
        ("steps", _known(plan.steps, ",.0f")),
        ("training tokens", _known(plan.tokens, ",.0f")),
        (
            "tokens a second, " + ("measured" if plan.measured else f"at MFU {plan.mfu:g}"),
            _known(plan.tokens_per_second, ",.0f"),
        ),
        ("hours, held-out loss included", _known(plan.hours, ",.2f")),
        *([("GPU hours", _known(plan.device_hours, ",.2f"))] if several else []),
        *([("cost", _known(plan.cost, ",.2f"))] if plan.cost is not None else []),
        ("host memory" + (" of a process" if several else ""), f"{_gb(plan.host)} GB"),
        *([("host memory of all", f"{_gb(plan.host * plan.processes)} GB")] if several else []),
        ("and where it is free, copies of a checkpoint", f"{_gb(plan.copies)} GB"),
        ("disk, dataset", "unknown" if plan.data is None else f"{_gb(plan.data)} GB"),
        ("disk, a checkpoint", f"{_gb(plan.checkpoint)} GB"),
        ("disk, checkpoints", f"{_gb(plan.checkpoints)} GB"),
    ):
        facts.add_row(name, value)
    return Group(Text(title), kinds, facts, *map(Text, [*plan.notes, plan.sentence]))


def render_rows(rows: dict[str, Plan], first: str) -> Table:
    """Several plans, a row each.

    Args:
        rows: plans by what stands in the first column.
        first: heading of that.
    """
    from rich.table import Table

    table = Table()
    table.add_column(first)
    heads = (
        "parameters",
        "micro-batch",
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "head",
        "peak GB",
        "largest",
        "host GB",
        "hours",
    )
    for head in heads:
        table.add_column(head, justify="right")
    for name, plan in rows.items():
        m, millions = plan.memory, plan.parameters / 1e6
        table.add_row(
            name,
            f"{millions:,.0f}M" if millions >= 10 else f"{millions:.3g}M",
            str(plan.micro_batch),
            _gb(m.weights),
            _gb(m.gradients),
            _gb(m.optimizer),
            _gb(m.activations),
            _gb(m.head),
            _gb(m.peak),
            str(plan.largest_micro_batch),
            f"{plan.host / GB:.1f}",
            _known(plan.hours, ",.2f"),
        )
    return table


def render_study(plan: StudyPlan) -> Group:
    """A study's arms, and what all its runs take together."""
    from rich.console import Group
    from rich.text import Text

    says = [f"{len(plan.arms)} arms x {plan.seeds} seeds"]
    processes = next(iter(plan.arms.values())).processes
    devices = "one device" if processes == 1 else f"{processes} devices ({_known(plan.device_hours, ',.1f')} GPU hours)"
    known = [p.hours * plan.seeds for p in plan.arms.values() if p.hours is not None]
    unknown = [arm for arm, p in plan.arms.items() if p.hours is None]
    if known and unknown:
        says.append(f"{sum(known):,.1f} hours of one machine without {', '.join(unknown)}, whose time is unknown")
    else:
        says.append(f"{sum(known):,.1f} hours of {devices}" if known else "hours unknown")
    if plan.cost is not None:
        says.append(f"cost {plan.cost:,.2f}")
    says.append(f"checkpoints {_gb(plan.checkpoints)} GB")
    tight = [f"{arm} {p.sentence}" for arm, p in plan.arms.items() if p.memory.peak > p.available]
    notes = dict.fromkeys(note for p in plan.arms.values() for note in p.notes)
    return Group(render_rows(plan.arms, f"{plan.name}: arm"), *map(Text, [", ".join(says), *notes, *tight]))


def _gb(size: float) -> str:
    return f"{size / GB:,.2f}" if size >= 0.1 * GB or not size else f"{size / GB:.2g}"


def _known(value: float | None, form: str) -> str:
    return "unknown" if value is None else format(value, form)
