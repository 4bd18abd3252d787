"""The sections of a recipe: every setting with its type, bounds, default and help text.

A setting's docstring is its help text in `gptlab train --help` and in `make menuconfig`. A setting without a mark
(ON_RESUME, IN_STUDY) is part of a run's identity; the mark of a section in `Recipe` holds for all its settings.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticKnownError, core_schema

ON_RESUME = "a resumed run may change it: it changes neither the losses nor the data already seen"
IN_STUDY = "two calls for one study may differ in it: it changes no loss, speed or memory of a run"

# The GPT-2 family (Radford et al. 2019, table 2) and small shapes for laptops and tests.
PRESETS: dict[str, dict[str, int]] = {
    "nano": {"n_layer": 3, "n_head": 3, "n_embd": 48},
    "micro": {"n_layer": 4, "n_head": 4, "n_embd": 128},
    "mini": {"n_layer": 6, "n_head": 6, "n_embd": 192},
    "small": {"n_layer": 6, "n_head": 6, "n_embd": 384},
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},  # 124M
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},  # 355M
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},  # 774M
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},  # 1.5B
    # an encoder for task = "classify" (Liu et al. 2019, arXiv 1907.11692)
    "roberta-base": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 512, "vocab_size": 50265},
}


# What a name stands for is said above this room: OPTIMIZERS in optim/optimizers.py, REGIMES in precision/regimes.py.
# A task is a class, given by where it is: the one line that lists it.
OPTIMIZER_NAMES = ["adamw", "adamw_8bit", "adamw-spam", "adamw-prune", "muon", "sgd", "lion", "ademamix", "normuon"]
OPTIMIZER_NAMES += ["adamw-schedule-free", "soap", "soap-muon"]
REGIME_NAMES = ["fp32", "tf32", "amp_bf16", "amp_fp16", "bf16_master", "bf16_pure", "fp16_pure"]
REGIME_NAMES += ["fp8_tensorwise", "fp8_rowwise"]
TASKS = {"lm": "gptlab.tasks.lm.LanguageModelling", "classify": "gptlab.tasks.classify.Classification"}


class OneOf:
    """Text that must be one of the names, which are read when a value is checked: code outside gptlab can add names."""

    def __init__(self, names: Iterable[str], *more: str) -> None:
        self._names, self._more = names, more

    @property
    def names(self) -> list[str]:
        return [*self._names, *self._more]

    def check(self, value: str) -> str:
        if value in self.names:
            return value
        *first, last = (repr(name) for name in self.names)
        raise PydanticKnownError("literal_error", {"expected": f"{', '.join(first)} or {last}"})

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"type": "string", "enum": self.names}


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value  # 1e10 tokens is a whole number


Int = Annotated[int, BeforeValidator(_whole), Field(lt=2**63)]  # TOML has no larger numbers
Positive = Annotated[Int, Field(ge=1)]
Count = Annotated[Int, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]


def last_name(text: str) -> str:
    """The last part of a path, also of `.` and of one that ends in a slash; a plain name is its own."""
    return Path(os.path.abspath(text)).name if text else ""


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Model(Section):
    """Shape and parts of the network."""

    n_layer: Positive = 12
    """Transformer blocks."""
    n_head: Positive = 12
    """Attention heads; must divide n_embd."""
    n_embd: Positive = 768
    """Width of the residual stream."""
    block_size: Positive = 1024
    """Context length in tokens."""
    vocab_size: Count = 0
    """Rows of the embedding. 0: the tokenizer's vocabulary; 50304 pads GPT-2's 50257 to a multiple of 128."""
    position: Literal["learned", "rope"] = "learned"
    """Position embeddings: learned (GPT-2) or rotary (RoFormer, arXiv 2104.09864)."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalization: LayerNorm (GPT-2) or RMSNorm (arXiv 1910.07467)."""
    norm_eps: float = Field(1e-5, gt=0)
    """Added to the variance inside the norm."""
    mlp: Literal["gelu", "gelu_erf", "swiglu", "relu2"] = "gelu"
    """GPT-2's tanh GELU, exact GELU (nanoGPT), SwiGLU (arXiv 2002.05202) or squared ReLU (arXiv 2109.08668)."""
    mlp_width: Count = 0
    """Hidden width of the MLP. 0: 4 n_embd, or 8/3 n_embd for swiglu, which has the same number of parameters."""
    bias: bool = True
    """Use biases in linear layers and LayerNorm."""
    tied: bool = True
    """Share the token embedding with the output head."""
    qk_norm: bool = False
    """Apply RMSNorm to queries and keys, per head, before attention (arXiv 2302.05442)."""
    zero_init: bool = False
    """Initialize the projections that write to the residual stream to 0; each block then starts as the identity."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout probability while training."""
    rope_theta: float = Field(10000.0, gt=0)
    """Base of the rotary frequencies."""
    document_attention: bool = False
    """Attend only within a document: no token sees anything before the last end-of-text."""
    parametrization: Literal["standard", "mup", "completep"] = "standard"
    """How initial scales and learning rates follow the shape: standard; by width, so that the best lr is that of
    base_width (muP, arXiv 2203.03466); or by width and depth (CompleteP, arXiv 2505.01618)."""
    base_width: Positive = 256
    """n_embd at which mup and completep have the standard scales and learning rates: where lr was tuned."""
    base_depth: Positive = 2
    """n_layer at which completep is mup."""
    base_head_size: Positive = 64
    """n_embd / n_head at which attention has its standard scale under mup and completep, which scale it by 1 / d."""

    @model_validator(mode="after")
    def _shape(self) -> Model:
        if self.n_embd % self.n_head:
            raise ValueError(f"model.n_embd = {self.n_embd}: must be divisible by model.n_head = {self.n_head}")
        if self.position == "rope" and (self.n_embd // self.n_head) % 2:
            raise ValueError(
                f"model.n_embd / model.n_head = {self.n_embd // self.n_head}: must be even for rotary positions"
            )
        return self

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def mlp_hidden(self) -> int:
        """Width inside the MLP. For swiglu 8/3 n_embd in multiples of 8: three such matrices have gelu's parameters."""
        if self.mlp_width:
            return self.mlp_width
        return 8 * round(self.n_embd / 3) if self.mlp == "swiglu" else 4 * self.n_embd


class Data(Section):
    """Training data."""

    corpus: str = "stdlib"
    """Corpus of the dataset, as in `gptlab prepare CORPUS`. A run records what its dataset was prepared from."""
    tokenizer: str = "gpt2"
    """gpt2, byte, char, bpe-N (trained on the corpus), or a Hugging Face tokenizer.json, folder or id."""
    path: Annotated[str, ON_RESUME, IN_STUDY] = ""
    """Folder of the prepared dataset. Empty: data/<corpus>-<tokenizer>, of paths their last parts."""
    mixture: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Several prepared datasets: {folder = weight}. The weights are shares of the sequences."""
    sampling: Literal["shuffled", "random", "sequential"] = "shuffled"
    """Order of the windows: every window once per epoch in a random order, random offsets (nanoGPT), or file order."""

    @model_validator(mode="after")
    def _one_source(self) -> Data:
        if self.path and self.mixture:
            raise ValueError("data.path and data.mixture are both set: name one dataset or a mixture, not both")
        return self

    @property
    def folder(self) -> str:
        """Folder of the prepared dataset, with the default filled in."""
        return self.path or f"data/{last_name(self.corpus)}-{last_name(self.tokenizer).removesuffix('.json')}"


class Batch(Section):
    """Size of an optimizer step; gradient accumulation follows from the two settings."""

    micro_batch: Annotated[Positive | Literal["auto"], ON_RESUME] = "auto"
    """Sequences per forward pass. auto: the largest power of two that fits in memory."""
    tokens_per_step: Positive = 524288
    """Tokens per optimizer step over all devices; a multiple of model.block_size. A document counts as block_size."""


class Optim(Section):
    """The optimizer; weight decay applies to matrices and embeddings, not to biases and norms."""

    name: Annotated[str, OneOf(OPTIMIZER_NAMES)] = "adamw"
    """AdamW (arXiv 1711.05101); AdamW with 8-bit moments (arXiv 2110.02861); AdamW with spike handling; AdamW whose
    moments decide what sparsity.method = state prunes; Muon for the blocks' matrices and AdamW for the rest; SGD with
    momentum betas[0]; Lion (arXiv 2302.06675); AdEMAMix (arXiv 2409.03137); NorMuon, which is Muon with a second
    moment per neuron (arXiv 2510.05491); Schedule-Free AdamW (arXiv 2405.15682); SOAP (arXiv 2409.11321);
    Muon after SOAP's preconditioner (github.com/KellerJordan/modded-nanogpt, pull requests 278 and 321)."""
    kernel: Literal["fused", "foreach"] = "fused"
    """PyTorch's kernel for AdamW: fused computes in float32, foreach in the dtype of the weights."""
    rounding: Literal["nearest", "stochastic", "kahan"] = "nearest"
    """Rounding of updates to bf16 weights: to nearest, stochastic, or Kahan summation (arXiv 2010.06192)."""
    lr: float = Field(6e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[Decay, Decay] = Field((0.9, 0.95), strict=False)
    """Decay rates of the first and second moments."""
    eps: float = Field(1e-8, gt=0)
    """Added to the square root of the second moment."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled weight decay; multiplied by the learning rate (Muon's own for Muon's matrices)."""
    cautious_decay: bool = False
    """Decay only where update and weight agree in sign (arXiv 2510.12402). For adamw, lion, ademamix, muon, normuon."""
    grad_clip: float = Field(1.0, ge=0)
    """Maximum global norm of the gradients; 0 turns clipping off."""
    muon_lr: float = Field(0.02, gt=0)
    """Peak learning rate of Muon's matrices (kellerjordan.github.io/posts/muon); follows the same schedule as lr."""
    muon_momentum: Decay = 0.95
    """Decay rate of Muon's Nesterov momentum."""
    normuon_beta2: Decay = 0.95
    """Decay rate of NorMuon's second moment per neuron; muon_lr and muon_momentum are its too."""
    ademamix_alpha: float = Field(8.0, ge=0)
    """Weight of AdEMAMix's slow average, reached after ademamix_warmup steps."""
    ademamix_beta3: float = Field(0.9999, gt=0, lt=1)
    """Decay rate of AdEMAMix's slow average, reached after ademamix_warmup steps."""
    ademamix_warmup: Count = 0
    """Steps over which alpha rises from 0, and beta3 from betas[0]. 0: schedule.decay_steps; 1: none."""
    soap_every: Positive = 10
    """Steps between two QR decompositions that refresh the eigenvectors of soap and soap-muon."""
    soap_largest_side: Positive = 10000
    """A longer side of a matrix gets no eigenvectors (one-sided SOAP), such as the vocabulary."""
    soap_muon_beta2: Decay = 0.9
    """Decay rate of soap-muon's second moment and preconditioner; muon_lr and muon_momentum are its too."""
    amsgrad: bool | Literal["auto"] = "auto"
    """Divide by the largest second moment so far (arXiv 1904.09237). auto: only adamw-spam with spam_form = seed."""
    spam_form: Literal["seed", "paper", "stable"] = "seed"
    """adamw-spam: z-score and clipping at theta; SPAM (arXiv 2501.06842); or Stable-SPAM (arXiv 2502.17055)."""
    spam_enable_clip: bool = True
    """Clip gradient spikes, entry by entry."""
    spam_spike_threshold: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    """Standard deviations of the gradient norm above which moments are weakened; 0 is off. auto: 2 for seed, else 0."""
    spam_theta: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Clip an entry when its square exceeds theta times the second moment. auto: 50 for seed, 5000 for paper."""
    spam_periodic_reset: bool = True
    """Set the moments to zero every spam_interval steps."""
    spam_interval: Positive | Literal["auto"] = "auto"
    """Steps between resets. auto: 500 for paper, else 1000."""
    spam_warmup: bool = True
    """Warm the learning rate up again after a reset; stable has no such warm-up."""
    spam_warmup_steps: Count | Literal["auto"] = "auto"
    """Steps of the warm-up after a reset. auto: 100 for seed, 150 for paper, 0 for stable."""
    spam_density: float = Field(1.0, gt=0, le=1)
    """Share of a matrix updated between two resets, drawn at random (sparse momentum); below 1 only for paper."""


class Sparsity(Section):
    """Pruning while training; pruned weights, their gradients and their moments stay zero."""

    method: Literal["none", "magnitude", "movement", "state", "rigl", "2:4"] = "none"
    """Prune by |w|, by movement or by adamw-prune's moments (state); rewire (rigl, arXiv 1911.11134); or keep two of
    every four weights, chosen once at `begin` (2:4)."""
    target: float = Field(0.5, gt=0, lt=1)
    """Share of the N prunable weights that is zero at the end: exactly int(target N) weights."""
    variant: Literal["bitter0", "bitter1", "bitter3", "bitter7"] = "bitter1"
    """Score for method = state: |w m| |w| / sqrt(v), |w|, |w| sqrt|m| or |w| v^0.25 (m, v: the moments)."""
    movement: Literal["gradient", "distance"] = "gradient"
    """Score for method = movement: -sum of gradient times w (arXiv 2005.07683), or w (w - initial w)."""
    schedule: Literal["cubic", "linear", "late"] = "cubic"
    """Ramp from 0 to target, p from 0 to 1: 1 - (1 - p)^3 (arXiv 1710.01878), p, or p^3. Not for rigl and 2:4."""
    begin: float = Field(0.25, ge=0, lt=1)
    """Start of the ramp, as a share of schedule.decay_steps (by default the length of the run)."""
    end: float = Field(0.75, gt=0, le=1)
    """End of the ramp, as the same share; the masks stay fixed afterwards. rigl rewires until here."""
    every: Positive = 50
    """Steps between changes of the masks."""
    scope: Literal["global", "layer"] = "global"
    """One threshold for all matrices, or the same share for each matrix."""
    head: bool = False
    """Prune the output head too; if the head is tied, this prunes the embedding."""
    rigl_alpha: float = Field(0.3, gt=0, lt=1)
    """Share of a matrix's weights that rigl moves at first; falls to 0 at `end` along a cosine."""


class Faults(Section):
    """Injected faults, to test which optimizer survives them."""

    gradient_every: Count = 0
    """Steps between gradient spikes; 0 is off."""
    gradient_factor: float = Field(1000.0, gt=0)
    """Factor of a gradient spike."""
    batch_every: Count = 0
    """Steps between batches of random tokens; 0 is off. Only for task = lm."""


class Schedule(Section):
    """Learning rate schedule: linear warm-up, then a decay to min_lr."""

    shape: Literal["cosine", "linear", "constant", "wsd", "wsd-sqrt"] = "cosine"
    """Decay: cosine, linear, none, or over the last decay_fraction only, linear (wsd, arXiv 2404.06395) or as 1 - sqrt
    of the share that is done (wsd-sqrt, arXiv 2405.18392)."""
    warmup_steps: Count = 0
    """Steps of linear warm-up; may be longer than the run."""
    decay_steps: Count = 0
    """Step at which min_lr is reached. 0: the limit at the start of the run, also if the limit is raised later."""
    decay_fraction: float = Field(0.2, gt=0, le=1)
    """Share of decay_steps over which wsd and wsd-sqrt decay."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate at the end of the decay."""

    def decay_begin(self, end: int) -> int:
        """The step at which the decay begins that reaches min_lr at step `end`."""
        late = self.shape in ("wsd", "wsd-sqrt")
        return max(self.warmup_steps, end - round(self.decay_fraction * end)) if late else self.warmup_steps


class Train(Section):
    """Length of the run, device and initial weights."""

    max_steps: Annotated[Count, ON_RESUME, IN_STUDY] = 0
    """Stop after this many optimizer steps; 0 is no limit. The first limit reached ends the run."""
    max_tokens: Annotated[Count, ON_RESUME, IN_STUDY] = 0
    """Stop after this many training tokens; 0 is no limit."""
    max_epochs: Annotated[float, ON_RESUME, IN_STUDY] = Field(0.0, ge=0)
    """Stop after this many passes over the training split; 0 is no limit."""
    eval_every: Annotated[Count, ON_RESUME, IN_STUDY] = 250
    """Steps between evaluations. 0: evaluate only at the start and at the end."""
    eval_only: bool = False
    """Evaluate once and stop without training."""
    ema: Decay = 0.0
    """Evaluate, sample and save as the model the exponential moving average of the weights with this decay rate, such
    as 0.999; training goes on from the raw weights, which checkpoints hold too. 0 is off."""
    init_from: str = ""
    """Run directory, or Hugging Face folder or id, to take initial weights from; its shape replaces [model]."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: a GPU if there is one. cuda includes ROCm GPUs. mps is untested."""
    threads: Count = 0
    """CPU threads. 0: OMP_NUM_THREADS, or all cores. Runs repeat bit for bit only with the same number of threads."""
    price_per_hour: Annotated[float, ON_RESUME, IN_STUDY] = Field(0.0, ge=0)
    """Price of an hour of the machine, in any currency; the result then contains the cost of the run."""
    attention: Annotated[Literal["auto", "fastest", "cudnn", "flash"], ON_RESUME] = "auto"
    """Kernel of attention on a GPU. auto: PyTorch's choice; fastest: cudnn or flash, timed at the run's shape before
    its first step. recipe.toml records which."""
    deterministic: bool = False
    """Use only kernels that repeat bit for bit. Exact resume under compile needs it; slower on GPUs."""
    activation_checkpointing: Annotated[bool, ON_RESUME] = False
    """Recompute each block in the backward pass: less memory, about a third more time."""


class Distributed(Section):
    """Training on several processes, started by torchrun or `gptlab launch`; ignored by a single process."""

    strategy: Literal["ddp", "fsdp", "none"] = "ddp"
    """ddp: each rank holds all weights; fsdp: a shard of every tensor (FSDP2); none: refuse several processes."""
    shard_over: Count = 0
    """Ranks that share one sharded copy under fsdp. 0: all ranks; fewer: hybrid sharding."""


class Eval(Section):
    """Held-out loss while training, on windows that are the same at every evaluation."""

    tokens: Positive = 655360
    """Tokens of the validation split per evaluation; the whole split if it is smaller."""
    train: bool = False
    """Also evaluate on as many tokens of the training split (train_eval_loss)."""
    seed: Int = 0
    """Seed of the windows."""
    wikitext: str = ""
    """File for `gptlab eval --on wikitext`: WikiText-2's wiki.test.raw or .tokens, also .gz."""
    lambada: str = ""
    """File for `gptlab eval --on lambada`: lambada_test_en.jsonl or other lines of {"text": ...}, also .gz."""


class HellaSwag(Section):
    """HellaSwag, while training and in `gptlab eval` (arXiv 1905.07830)."""

    every: Count = 0
    """Steps between evaluations while training; 0 is off."""
    path: str = ""
    """hellaswag_val.jsonl, llm.c's .bin, or `download`. Empty: training skips HellaSwag."""
    definition: Literal["tokens", "harness"] = "tokens"
    """tokens: raw text, loss per token (build-nanogpt, llm.c); harness: lm-eval's edited text, loss per character."""


class Checkpoint(Section):
    """Checkpoints of the run."""

    every: Count = 1000
    """Steps between checkpoints. 0: save only at the end and when interrupted."""
    keep_last: Positive = 2
    """Number of newest checkpoints to keep."""
    keep_best: bool = True
    """Also keep the checkpoint with the lowest val_loss."""
    at: list[Positive] = Field(default_factory=list)
    """Steps at which a checkpoint is saved too, and kept."""


class Precision(Section):
    """Numeric formats of weights, matrix multiplications and loss."""

    regime: Annotated[str, OneOf(REGIME_NAMES, "auto")] = "fp32"
    """amp_*: fp32 weights and autocast; bf16_master: fp32 weights and all activations in bf16; *_pure: everything in
    that type; tf32: fp32 with TF32 matrix multiplications; fp8_*: amp_bf16 with torchao's float8 linear layers;
    auto: amp_bf16 where this machine multiplies it faster, as measured at the start, else fp32 (tf32 on a GPU)."""
    head: Literal["auto", "fp32"] = "auto"
    """Output head: as the regime says, or stored and multiplied in float32."""
    loss: Literal["auto", "fp32", "bf16"] = "auto"
    """Softmax and its gradient: as the regime says, or in this type. The logged loss is always float32."""
    norms: Literal["auto", "fp32"] = "auto"
    """Norms: as the regime says, or stored and computed in float32."""


class Compile(Section):
    """torch.compile."""

    enabled: bool | Literal["auto"] = "auto"
    """auto: on for GPUs, off for CPUs, where compiling a small model takes longer than it saves."""
    mode: Literal["default", "max-autotune"] = "default"
    """max-autotune: time several kernels for each product and reduction, which takes minutes before the first step;
    PyTorch keeps what it compiled for later runs. environment.json has the seconds of the first step."""


class Sample(Section):
    """Text generation, in `gptlab sample` and while training."""

    every: Count = 0
    """Steps between samples while training, written to the run's samples/ folder; 0 is off."""
    number: Positive = 1
    """Completions per sample while training."""
    prompt: str = "\n"
    """Text to complete. Empty: start from end-of-text if the tokenizer has it."""
    max_tokens: Positive = 500
    """Tokens to generate."""
    temperature: float = Field(0.8, ge=0)
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: Count = 200
    """Sample from the k likeliest tokens; 0 is all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the likeliest tokens that together have this probability."""
    seed: Int = 42
    """Seed of the generation."""


class Log(Section):
    """Logs written while training."""

    every: Positive = 10
    """Steps between training lines in metrics.jsonl."""
    to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list)
    """Also log to these, each with its package: TensorBoard (the run's tensorboard/ folder), Weights & Biases, and
    trackio, which is local. `--log.to tensorboard,trackio` names two."""
    project: str = ""
    """Project in W&B and trackio. Empty: WANDB_PROJECT or TRACKIO_PROJECT, else gptlab."""
    entity: str = ""
    """Account or team in W&B. Empty: WANDB_ENTITY, else your own."""
    tags: list[str] = Field(default_factory=list)
    """Tags in W&B."""
    group: str = ""
    """Group of runs in W&B and trackio. Empty: WANDB_RUN_GROUP, else the study's name."""

    @field_validator("to", "tags", mode="before")
    @classmethod
    def _words(cls, value: Any) -> Any:
        """`--log.to tensorboard,wandb` without brackets."""
        return [word for word in value.split(",") if word] if isinstance(value, str) else value

    @field_validator("to")
    @classmethod
    def _once(cls, value: list[str]) -> list[str]:
        return list(dict.fromkeys(value))

    @model_validator(mode="before")
    @classmethod
    def _earlier(cls, content: Any) -> Any:
        """Stored recipes of earlier versions have a switch for each: log.tensorboard, log.wandb."""
        if isinstance(content, dict) and not content.keys().isdisjoint(("tensorboard", "wandb")):
            content = dict(content)
            asked = [name for name in ("tensorboard", "wandb") if content.pop(name, False) is True]
            content["to"] = [*content.get("to", []), *asked]
        return content
