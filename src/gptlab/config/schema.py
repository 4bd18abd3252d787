"""Recipes and studies: every setting of a run, with its unit, default and bounds, in one schema.

A recipe file, an arm's overrides and the flags on a command line are dictionaries of the same keys. They are
merged in that order and validated once, so each way of saying a setting has the same names, bounds and errors:

    >>> recipe = load_recipe("shakespeare-char-cpu", {"optim.lr": "3e-4"})
    >>> recipe.optim.lr
    0.0003
"""

from __future__ import annotations

import difflib
import fnmatch
import math
import re
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from gptlab.errors import ConfigError

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


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value  # 1e10 tokens is a whole number


Int = Annotated[int, BeforeValidator(_whole)]
Positive = Annotated[Int, Field(ge=1)]
Count = Annotated[Int, Field(ge=0)]


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


class Model(Section):
    """Shape and parts of the network. `model.preset = "gpt2"` stands for the layers, heads and width of that size."""

    n_layer: Positive = 12
    """Transformer blocks."""
    n_head: Positive = 12
    """Attention heads; must divide n_embd."""
    n_embd: Positive = 768
    """Width of the residual stream."""
    block_size: Positive = 1024
    """Context length in tokens."""
    vocab_size: Count = 0
    """Rows of the embedding; 0 takes the tokenizer's number, 50304 pads GPT-2's 50257 to a multiple of 128."""
    position: Literal["learned", "rope"] = "learned"
    """Position embeddings: learned (GPT-2) or rotary (RoFormer, arXiv 2104.09864)."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalisation: LayerNorm (GPT-2) or RMSNorm (arXiv 1910.07467)."""
    norm_eps: float = Field(1e-5, gt=0)
    """Added to the variance inside the norm."""
    mlp: Literal["gelu", "gelu_erf", "swiglu", "relu2"] = "gelu"
    """gelu: GPT-2's tanh form; gelu_erf: exact, as nanoGPT's; swiglu: arXiv 2002.05202; relu2: arXiv 2109.08668."""
    mlp_width: Count = 0
    """Hidden width of the MLP; 0 takes 4 n_embd, or the 8/3 n_embd that costs swiglu as many parameters."""
    bias: bool = True
    """Biases in linear layers and LayerNorm."""
    tied: bool = True
    """Share the token embedding with the output head."""
    qk_norm: bool = False
    """RMSNorm on queries and keys, per head, before attention (arXiv 2302.05442)."""
    zero_init: bool = False
    """Start the projections that write to the residual stream at 0, so that blocks begin as the identity."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability of dropping an activation while training."""
    rope_theta: float = Field(10000.0, gt=0)
    """Base of the rotary frequencies."""
    document_attention: bool = False
    """Attend within a document only: a token never sees what stands before the last end-of-text."""

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
        """Width inside the MLP; for swiglu 8/3 n_embd in multiples of 8, so three matrices weigh what gelu's two do."""
        if self.mlp_width:
            return self.mlp_width
        return 8 * round(self.n_embd / 3) if self.mlp == "swiglu" else 4 * self.n_embd


class Data(Section):
    """What is learnt from."""

    corpus: str = "stdlib"
    """Name of the corpus the dataset is prepared from (`gptlab prepare CORPUS`)."""
    tokenizer: str = "gpt2"
    """gpt2, byte, char, bpe-N (trained on the corpus) or a Hugging Face tokenizer.json."""
    path: str = ""
    """Folder of the prepared dataset; empty means data/<corpus>-<tokenizer>."""
    mixture: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Several prepared datasets instead of one: {folder = weight}; the weights are shares of the sequences."""
    sampling: Literal["shuffled", "random", "sequential"] = "shuffled"
    """shuffled: every window once an epoch, in an order of its own; random: nanoGPT's random offsets; sequential."""

    @model_validator(mode="after")
    def _one_source(self) -> Data:
        if self.path and self.mixture:
            raise ValueError("data.path and data.mixture are both set: name one dataset or a mixture, not both")
        return self

    @property
    def folder(self) -> str:
        """Folder of the prepared dataset, the default filled in."""
        return self.path or f"data/{self.corpus}-{Path(self.tokenizer).stem}"


class Batch(Section):
    """How many tokens an optimizer step sees, and in what pieces."""

    micro_batch: Positive | Literal["auto"] = "auto"
    """Sequences in one pass; auto takes the largest that fits. Accumulation follows; the last one may be smaller."""
    tokens_per_step: Positive = 524288
    """Tokens in one optimizer step, over all devices; a multiple of model.block_size. A document counts block_size."""


class Optim(Section):
    """The optimizer; weight decay acts on matrices and embeddings, not on biases and norms."""

    name: Literal["adamw", "adamw_8bit", "adamw-spam", "adamw-prune", "muon", "sgd"] = "adamw"
    """AdamW (arXiv 1711.05101); its moments in 8 bits (arXiv 2110.02861); with spike handling; pruning by its moments
    (sparsity.method = state); Muon for the blocks' matrices, else AdamW; SGD with momentum betas[0]."""
    kernel: Literal["fused", "foreach"] = "fused"
    """PyTorch's kernel for AdamW: fused computes in float32 inside, foreach in the dtype of the weights."""
    rounding: Literal["nearest", "stochastic", "kahan"] = "nearest"
    """How bf16 weights take an update: to nearest, stochastically, or with Kahan's compensation (arXiv 2010.06192)."""
    lr: float = Field(6e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.95), strict=False
    )
    """Decay of the first and second moments."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled weight decay, multiplied by the learning rate (Muon's, for Muon's matrices)."""
    grad_clip: float = Field(1.0, ge=0)
    """Largest global gradient norm; 0 turns clipping off."""
    muon_lr: float = Field(0.02, gt=0)
    """Peak learning rate of Muon's matrices (kellerjordan.github.io/posts/muon); the schedule's factor is lr's."""
    muon_momentum: float = Field(0.95, ge=0, lt=1)
    """Decay of Muon's Nesterov momentum."""
    amsgrad: bool | Literal["auto"] = "auto"
    """Divide by the largest second moment so far (arXiv 1904.09237); auto: in adamw-spam of form seed, else not."""
    spam_form: Literal["seed", "paper", "stable"] = "seed"
    """adamw-spam: z-score and theta clip; SPAM's paper (arXiv 2501.06842); Stable-SPAM (arXiv 2502.17055)."""
    spam_enable_clip: bool = True
    """Clip gradient spikes, entry by entry."""
    spam_spike_threshold: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    """Standard deviations above which a gradient norm weakens the moments; 0 is off; auto: 2 in form seed, else off."""
    spam_theta: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """An entry is clipped where its square exceeds theta times the second moment; auto: 50 in form seed, 5000 paper."""
    spam_periodic_reset: bool = True
    """Set the moments to zero every spam_interval steps."""
    spam_interval: Positive | Literal["auto"] = "auto"
    """Steps between resets; auto: 500 in form paper, else 1000."""
    spam_warmup: bool = True
    """Raise the learning rate anew after a reset; form stable has no such warm-up."""
    spam_warmup_steps: Count | Literal["auto"] = "auto"
    """Steps of that; auto: 100 in form seed, 150 paper, 0 stable."""
    spam_density: float = Field(1.0, gt=0, le=1)
    """Share of a matrix that moves between two resets, drawn at random (sparse momentum); below 1 in form paper."""


class Sparsity(Section):
    """Which weights become zero, when, and by what score. Masked weights, gradients and moments stay zero."""

    method: Literal["none", "magnitude", "movement", "state", "rigl", "2:4"] = "none"
    """By |w|; movement; state: by adamw-prune's moments; rigl (arXiv 1911.11134); 2:4: two of four, once at begin."""
    target: float = Field(0.5, gt=0, lt=1)
    """Share of the prunable weights that is zero in the end: exactly int(target N) of them."""
    variant: Literal["bitter0", "bitter1", "bitter3", "bitter7"] = "bitter1"
    """Score of method = state: |w m| |w| / sqrt(v); |w|; |w| sqrt|m|; |w| v^0.25 (m, v: the moments)."""
    movement: Literal["gradient", "distance"] = "gradient"
    """Score of method = movement: -sum of gradient times w (Sanh et al., arXiv 2005.07683), or w (w - its start)."""
    schedule: Literal["cubic", "linear", "late"] = "cubic"
    """Ramp from 0 to target: 1 - (1 - p)^3 (arXiv 1710.01878), p, or p^3. Not of rigl and 2:4."""
    begin: float = Field(0.25, ge=0, lt=1)
    """Where the ramp begins, as a share of schedule.decay_steps (the run's length where nothing else is said)."""
    end: float = Field(0.75, gt=0, le=1)
    """Where it ends; what follows is recovery. rigl regrows until there."""
    every: Positive = 50
    """Steps between changes of the masks."""
    scope: Literal["global", "layer"] = "global"
    """One threshold for all matrices, or each matrix pruned to the same share."""
    head: bool = False
    """Prune the output head too, with the embedding where the two are tied."""
    rigl_alpha: float = Field(0.3, gt=0, lt=1)
    """Share of a matrix's weights that rigl moves at first; it falls to 0 at `end` with a cosine."""


class Faults(Section):
    """Damage done on purpose, to see which optimizer survives it."""

    gradient_every: Count = 0
    """Steps between gradient spikes; 0 is none."""
    gradient_factor: float = Field(1000.0, gt=0)
    """What a spike multiplies the gradient by."""
    batch_every: Count = 0
    """Steps between batches of uniformly random tokens, for task = lm; 0 is none."""


class Schedule(Section):
    """The learning rate over steps: linear warm-up, then a shape down to min_lr."""

    shape: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """cosine or linear to min_lr; constant; wsd: linear over the last decay_fraction only (arXiv 2404.06395)."""
    warmup_steps: Count = 0
    """Steps of linear warm-up; may be longer than the run."""
    decay_steps: Count = 0
    """Step at which min_lr is reached; 0 takes the run's limit and keeps it when the run is made longer."""
    decay_fraction: float = Field(0.2, gt=0, le=1)
    """Share of decay_steps that wsd spends going down."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate at the end of the decay."""


class Train(Section):
    """How long, where, and from what."""

    max_steps: Count = 0
    """Stop after this many optimizer steps; 0 is no limit. Of several limits the first rules."""
    max_tokens: Count = 0
    """Stop after this many training tokens; 0 is no limit."""
    max_epochs: float = Field(0.0, ge=0)
    """Stop after this many passes over the training split; 0 is no limit."""
    eval_every: Count = 250
    """Steps between evaluations; 0 evaluates only at the start and at the end."""
    eval_only: bool = False
    """Evaluate once and stop, without a step of training."""
    init_from: str = ""
    """A run directory, or a Hugging Face folder or id, to start from; its shape replaces that of `model`."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto takes a GPU where there is one. ROCm GPUs are called cuda. mps is untested."""
    threads: Count = 0
    """CPU threads; 0 takes OMP_NUM_THREADS, or all cores. A run repeats bit by bit at one number of threads."""
    price_per_hour: float = Field(0.0, ge=0)
    """What an hour of the machine costs, in a currency of your choice; a run's result then has its cost."""
    deterministic: bool = False
    """Only kernels that repeat bit for bit; needed for exact resume under compile, slower on GPUs."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time."""


class Distributed(Section):
    """Several processes for one run, started by torchrun or `gptlab launch`; alone, a process ignores this."""

    strategy: Literal["ddp", "fsdp", "none"] = "ddp"
    """ddp: each process has all weights; fsdp: each has some rows of every tensor (FSDP2); none refuses several."""
    shard_over: Count = 0
    """fsdp: processes that one copy is spread over; 0 is all, fewer the hybrid form with copies side by side."""


class Eval(Section):
    """Held-out loss while training: the same windows at every evaluation, drawn once from `seed`."""

    tokens: Positive = 655360
    """Tokens of the validation split in one evaluation; the whole split where it is smaller."""
    train: bool = False
    """Measure as many tokens of the training split too (train_eval_loss)."""
    seed: Int = 0
    """Seed of the windows."""
    wikitext: str = ""
    """`gptlab eval --on wikitext`: WikiText-2's wiki.test.raw (or .tokens), whole; .gz is read too."""
    lambada: str = ""
    """`gptlab eval --on lambada`: lambada_test_en.jsonl or another file of {"text": ...} lines; .gz is read too."""


class HellaSwag(Section):
    """HellaSwag, while training and in `gptlab eval` (arXiv 1905.07830)."""

    every: Count = 0
    """Steps between evaluations; 0 turns it off."""
    path: str = ""
    """hellaswag_val.jsonl, llm.c's .bin, or `download`; without it a recipe that asks for HellaSwag trains on."""
    definition: Literal["tokens", "harness"] = "tokens"
    """tokens: raw text, mean loss a token (build-nanogpt, llm.c); harness: lm-eval's edited text, and characters."""


class Checkpoint(Section):
    """What is written to come back to."""

    every: Count = 1000
    """Steps between checkpoints; 0 saves only at the end (and when interrupted)."""
    keep_last: Positive = 2
    """Checkpoints kept, besides the best."""
    keep_best: bool = True
    """Keep the written checkpoint with the lowest val_loss."""


class Precision(Section):
    """What is stored and multiplied in which format."""

    regime: Literal[
        "fp32", "tf32", "amp_bf16", "amp_fp16", "bf16_pure", "fp16_pure", "fp8_tensorwise", "fp8_rowwise"
    ] = "fp32"
    """fp32; tf32: its matmuls in TF32; amp_*: autocast, fp32 weights; *_pure: all in that type; fp8_*: see torchao."""
    head: Literal["auto", "fp32"] = "auto"
    """Matrix multiplication of the output head: as the regime has it, or in float32 (stored in float32 too)."""
    loss: Literal["auto", "fp32", "bf16"] = "auto"
    """Softmax and its gradient: as the regime has it (pure ones in their own type), or this. Logs are float32."""
    norms: Literal["auto", "fp32"] = "auto"
    """Norms: as the regime has them, or stored and computed in float32."""


class Compile(Section):
    """torch.compile."""

    enabled: bool | Literal["auto"] = "auto"
    """auto compiles on a GPU and not on a CPU, where a cold compile does not pay back for a small model."""


class Sample(Section):
    """Text generation, in `gptlab sample` and while training."""

    every: Count = 0
    """Steps between completions of the prompt while training, into the run's samples/ folder; 0 is none."""
    number: Positive = 1
    """Completions at a time while training."""

    prompt: str = "\n"
    """Text to go on from; empty starts from end-of-text where the tokenizer has one."""
    max_tokens: Positive = 500
    """Tokens to generate."""
    temperature: float = Field(0.8, ge=0)
    """Logits are divided by it; 0 takes the likeliest token."""
    top_k: Count = 200
    """Only the k likeliest tokens; 0 is all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Only the likeliest tokens that together have this probability."""
    seed: Int = 42
    """Seed of the generation."""


class Log(Section):
    """What is written while training."""

    every: Positive = 10
    """Steps between training lines in metrics.jsonl."""
    tensorboard: bool = False
    """Also write TensorBoard events into the run's tensorboard/ folder."""
    wandb: bool = False
    """Also log to Weights & Biases, where wandb is installed."""


class Recipe(Section):
    """Everything that defines a run. `seed` rules initialisation, dropout and data order."""

    name: str = "recipe"
    """Name of the recipe; the default run folder is runs/<name>_seed<seed>."""
    description: str = ""
    """One line for `gptlab recipes`."""
    task: Literal["lm", "classify"] = "lm"
    """What is learnt: the next token (a GPT), or a document's labels (an encoder with a linear head)."""
    seed: Int = 1337
    """Rules initialisation, dropout and data order; --seed and a study's seeds replace it."""
    model: Model = Model()
    data: Data = Data()
    batch: Batch = Batch()
    optim: Optim = Optim()
    sparsity: Sparsity = Sparsity()
    schedule: Schedule = Schedule()
    train: Train = Train()
    eval: Eval = Eval()
    hellaswag: HellaSwag = HellaSwag()
    checkpoint: Checkpoint = Checkpoint()
    precision: Precision = Precision()
    compile: Compile = Compile()
    distributed: Distributed = Distributed()
    sample: Sample = Sample()
    log: Log = Log()
    faults: Faults = Faults()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        tokens, block = self.batch.tokens_per_step, self.model.block_size
        if tokens % block:
            raise ValueError(
                f"batch.tokens_per_step = {tokens}: must be a multiple of model.block_size = {block}; "
                f"{max(1, round(tokens / block)) * block} is the nearest"
            )
        if isinstance(self.batch.micro_batch, int) and self.batch.micro_batch > self.sequences_per_step:
            raise ValueError(
                f"batch.micro_batch = {self.batch.micro_batch}: is more than the {self.sequences_per_step} sequences "
                f"of a step (batch.tokens_per_step / model.block_size = {tokens} / {block})"
            )
        if self.schedule.min_lr > self.optim.lr:
            raise ValueError(f"schedule.min_lr = {self.schedule.min_lr}: must not exceed optim.lr = {self.optim.lr}")
        if not (self.train.max_steps or self.train.max_tokens or self.train.max_epochs or self.train.eval_only):
            raise ValueError("the run has no end: set train.max_steps, train.max_tokens or train.max_epochs")
        if self.optim.rounding != "nearest" and self.precision.regime != "bf16_pure":
            raise ValueError(
                f"optim.rounding = {self.optim.rounding}: is for bf16 weights, and precision.regime = "
                f"{self.precision.regime} stores others"
            )
        whole = self.optim.name in ("adamw", "adamw-spam", "adamw-prune") and self.optim.rounding == "nearest"
        for key, value, plain in (
            ("kernel", self.optim.kernel, "fused"),
            ("amsgrad", str(self.optim.amsgrad is True).lower(), "false"),
        ):
            if value != plain and not whole:
                raise ValueError(f"optim.{key} = {value}: is PyTorch's AdamW's, without Muon, 8 bits or a rounding")
        if self.optim.name != "adamw" and self.optim.rounding != "nearest":
            raise ValueError(f"optim.rounding = {self.optim.rounding}: is for optim.name = adamw")
        if self.optim.name == "muon" and self.precision.regime == "fp16_pure":
            raise ValueError(
                "optim.name = muon: its momentum would underflow in float16 (precision.regime = fp16_pure)"
            )
        if self.optim.name == "adamw-spam":
            self._spam()
        self._sparse()
        if self.task == "classify":
            self._encoder()
        return self

    def _spam(self) -> None:
        optim = self.optim
        if optim.spam_form == "stable" and optim.spam_theta != "auto":
            raise ValueError(f"optim.spam_theta = {optim.spam_theta}: form stable has none, its bound is an average")
        if optim.spam_form == "stable" and optim.spam_warmup_steps not in ("auto", 0):
            raise ValueError(f"optim.spam_warmup_steps = {optim.spam_warmup_steps}: form stable has no such warm-up")
        if optim.spam_density < 1 and not (optim.spam_form == "paper" and optim.spam_periodic_reset):
            raise ValueError(f"optim.spam_density = {optim.spam_density}: below 1 is for form paper, with resets")

    def _sparse(self) -> None:
        sparsity, prunes = self.sparsity, self.optim.name == "adamw-prune"
        if (sparsity.method == "state") != prunes:
            raise ValueError(
                f"sparsity.method = {sparsity.method}, optim.name = {self.optim.name}: state and adamw-prune are for "
                f"each other"
            )
        if sparsity.method != "none" and sparsity.begin >= sparsity.end:
            raise ValueError(f"sparsity.begin = {sparsity.begin}: must be before sparsity.end = {sparsity.end}")
        if sparsity.method == "2:4" and sparsity.target != 0.5:
            raise ValueError(f"sparsity.target = {sparsity.target}: two of four is 0.5")
        if self.faults.batch_every and self.task != "lm":
            raise ValueError(f"faults.batch_every = {self.faults.batch_every}: is for task = lm")

    def _encoder(self) -> None:
        """A classifier is BERT's encoder: what the other parts would change is not there, so they are refused."""
        wants = {
            "position": "learned",
            "norm": "layernorm",
            "mlp": "gelu_erf",
            "bias": True,
            "qk_norm": False,
            "document_attention": False,
            "zero_init": False,
        }
        for key, value in wants.items():
            if getattr(self.model, key) != value:
                shown, right = getattr(self.model, key), str(value).lower()
                raise ValueError(f"model.{key} = {str(shown).lower()}: must be {right} where task = classify")
        if self.data.mixture:
            raise ValueError("data.mixture: is for task = lm; a classifier has one prepared dataset")

    @property
    def sequences_per_step(self) -> int:
        return self.batch.tokens_per_step // self.model.block_size

    def step_limit(self, train_tokens: int) -> int:
        """Optimizer steps until the first of the limits, for a training split of `train_tokens` tokens.

        A limit in tokens or epochs is reached by the step that completes it, never overrun by more than one step.
        """
        limits = [
            self.train.max_steps or math.inf,
            math.ceil(self.train.max_tokens / self.batch.tokens_per_step) or math.inf,
            math.ceil(self.train.max_epochs * train_tokens / self.batch.tokens_per_step) or math.inf,
        ]
        return 0 if self.train.eval_only else int(min(limits))

    def replace(self, settings: Mapping[str, Any]) -> Recipe:
        """A copy with dotted settings replaced, validated: `recipe.replace({"optim.lr": 1e-3})`."""
        return build_recipe(self.model_dump(), settings)

    def to_toml(self) -> str:
        return tomli_w.dumps(self.model_dump())


# -- names of settings ----------------------------------------------------------------------------------------------


def settings(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting as (dotted name, pydantic FieldInfo), in the order of the schema."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from settings(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def unknown_setting(name: str) -> ConfigError:
    """The error for a name that is no setting, with the one that was probably meant."""
    known = [key for key, _ in settings()] + ["model.preset"]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    if not close:  # the right word in the wrong section
        leaf = name.rsplit(".", 1)[-1]
        close = [key for key in known if key.rsplit(".", 1)[-1] == leaf]
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return ConfigError(f"no setting '{name}'{hint}")


def _accepts(annotation: Any, kind: type) -> bool:
    """Whether an annotation such as `int | Literal["auto"]` takes values of a Python type."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _accepts(typing.get_args(annotation)[0], kind)
    if origin in (typing.Union, types.UnionType):
        return any(_accepts(part, kind) for part in typing.get_args(annotation))
    if origin is Literal:
        return any(isinstance(choice, kind) for choice in typing.get_args(annotation))
    return (origin or annotation) is kind


def parse_flag(name: str, text: str) -> Any:
    """The value of a flag or of an arm written as text, by the type of its setting: TOML, or a bare string.

    Raises ConfigError for a name that is no setting.
    """
    fields = dict(settings())
    if name == "model.preset":
        return text
    if name not in fields:
        raise unknown_setting(name)
    annotation = fields[name].annotation
    if _accepts(annotation, str) and not any(_accepts(annotation, kind) for kind in (int, float, bool)):
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # the schema says what is wrong with it


# -- merging and validating -----------------------------------------------------------------------------------------


def _nested(layer: Mapping[str, Any]) -> dict[str, Any]:
    """{"optim.lr": 1} and {"optim": {"lr": 1}} are the same layer; a preset is written out within its own layer."""
    result: dict[str, Any] = {}
    for key, value in layer.items():
        section, dot, leaf = key.partition(".")
        if dot:
            inner = result.setdefault(section, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"{section} is a section, not a value")
            inner[leaf] = value
        elif isinstance(value, Mapping) and isinstance(result.get(key, {}), dict):
            result[key] = {**result.get(key, {}), **value}
        else:
            result[key] = value
    model = result.get("model")
    if isinstance(model, dict) and "preset" in model:
        preset = model.pop("preset")
        if preset not in PRESETS:
            raise ConfigError(f"model.preset = {preset!r}: must be one of {', '.join(PRESETS)}")
        result["model"] = {**PRESETS[preset], **model}
    return result


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Two nested layers in one, the second one winning setting by setting."""
    result = dict(under)
    for key, value in over.items():
        is_section = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = {**result[key], **value} if is_section else value
    return result


def build_recipe(*layers: Mapping[str, Any]) -> Recipe:
    """Merge layers of settings, later ones winning, and validate the result once.

    Args:
        layers: dictionaries, nested by section or with dotted keys; values as TOML gives them.

    Raises:
        ConfigError: one line for each setting that is unknown or out of bounds.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = _merged(merged, _nested(layer))
    try:
        return Recipe.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(_sentences(error)) from None


_BOUNDS = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}
_WORDS = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}
_KINDS = {"bool": "true or false", "int": "a whole number", "float": "a number", "string": "a text", "dict": "a table"}


def _sentences(error: ValidationError) -> str:
    """Pydantic's errors, one sentence a setting: `optim.lr = -1: must be greater than 0`."""
    fields = dict(settings())
    problems: dict[str, list[str]] = {}
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            problems.setdefault(str(unknown_setting(name)), [])
            continue
        if item["type"] == "missing":  # of a study: every setting of a recipe has a default
            problems.setdefault(f"{name} is missing", [])
            continue
        if item["type"] == "value_error":  # our own sentence, complete as it is
            problems.setdefault(str(item["ctx"]["error"]), [])
            continue
        name = next((key for key in fields if name == key or name.startswith(key + ".")), name)
        kind = item["type"]
        if kind in _BOUNDS:
            bound = _BOUNDS[kind]
            says = f"{_WORDS[bound]} {item['ctx'][bound]:g}"
        elif kind == "literal_error":
            says = f"one of {item['ctx']['expected']}" if " or " in item["ctx"]["expected"] else item["ctx"]["expected"]
        elif kind == "too_short":
            says = f"a list of at least {item['ctx']['min_length']}"
        elif kind == "finite_number":
            says = "a finite number"
        elif (stem := kind.removesuffix("_type").removesuffix("_parsing")) in _KINDS:
            says = _KINDS[stem]
        elif stem in ("model", "model_attributes"):
            says = "a section of settings"
        else:
            says = item["msg"].replace("Input should be ", "")
        value = item["input"] if not isinstance(item["input"], dict) else "{...}"
        problems.setdefault(f"{name} = {value}", []).append(says)
    lines = [f"{head}: must be {' or '.join(dict.fromkeys(says))}" if says else head for head, says in problems.items()]
    return "\n".join(lines)


# -- files ----------------------------------------------------------------------------------------------------------


def shipped(kind: str = "recipes") -> dict[str, Path]:
    """Shipped recipes, studies or comparisons by name."""
    folder = Path(str(resources.files("gptlab") / kind))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def read_layer(name_or_path: str | Path, kind: str = "recipes") -> dict[str, Any]:
    """What is in the file of a recipe, study or comparison, by shipped name or path, not yet validated.

    Raises:
        ConfigError: there is no such file, or it is not TOML.
    """
    text = str(name_or_path)
    path = shipped(kind).get(text) or Path(text)
    if not path.is_file():
        close = difflib.get_close_matches(text, shipped(kind), n=1, cutoff=0.4)
        hint = f"did you mean '{close[0]}'? " if close else ""
        one = {"recipes": "recipe", "studies": "study", "comparisons": "comparison"}[kind]
        listed = f"`gptlab {kind}` lists the shipped ones"
        if kind == "comparisons":
            listed = f"{', '.join(shipped(kind))} are shipped"
        raise ConfigError(f"no {one} '{text}': {hint}{listed}, a path may be given too")
    try:
        layer = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a TOML file: {error}") from None
    return {"name": path.stem, **layer}


def load_recipe(name_or_path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe by shipped name or path, with overrides.

    Args:
        name_or_path: a name that `gptlab recipes` lists, or a path to a TOML file.
        overrides: dotted names to values; a text is read as on the command line.

    Raises:
        ConfigError: an unknown recipe or setting, or a value out of bounds.
    """
    layer = {
        key: parse_flag(key, value) if isinstance(value, str) else value for key, value in (overrides or {}).items()
    }
    return build_recipe(read_layer(name_or_path), layer)


# -- studies --------------------------------------------------------------------------------------------------------


class Metric(Section):
    """What a study's arms are compared by."""

    name: str = "final_val_loss"
    """A key of result.json."""
    better: Literal["lower", "higher"] = "lower"
    """Which way is up."""
    margin: float = Field(0.0, ge=0)
    """Differences up to this are none, in the metric's units."""


CLAUSE = re.compile(r"(not )?(better|worse|equivalent|diverges)(?: in (\S+))?")


def clauses(text: str) -> list[tuple[bool, str, str]]:
    """What confirms or rejects a question: (negated, verdict, study or "") for each clause of it.

    Raises:
        ValueError: a clause that is none.
    """
    found = []
    for part in text.split(","):
        match = CLAUSE.fullmatch(part.strip())
        if match is None:
            raise ValueError(
                f"{text!r}: each clause, between commas, is better, worse, equivalent or diverges, perhaps with `not` "
                f"before it, and across studies with `in STUDY` after it"
            )
        found.append((bool(match[1]), match[2], match[3] or ""))
    return found


class Question(Section):
    """A claim that a study is to decide."""

    id: str
    claim: str
    contrast: list[str] = Field(default_factory=list)
    """Two arms, the second one as the reference. `adamw_*` is the best of the arms that match: on each seed the one
    that is best on the other seeds."""
    metric: Metric | None = None
    """What it is about; default the study's."""
    confirmed_if: str
    """The verdicts that confirm it, all of them: "better", "not worse", across studies "better in A, not better in B";
    or "frontier differs": across studies, an arm is on one's frontier of speed and memory and not on the other's."""
    rejected_if: str = ""
    """The verdicts that reject it, any of them; default the opposite of any that confirms it."""

    @model_validator(mode="after")
    def _consistent(self) -> Question:
        if self.confirmed_if == "frontier differs":
            return self
        if len(set(self.contrast)) != 2 or len(self.contrast) != 2:
            raise ValueError(f"question {self.id}: contrast = {self.contrast}: must name two arms")
        for text in filter(None, (self.confirmed_if, self.rejected_if)):
            try:
                clauses(text)
            except ValueError as error:
                raise ValueError(f"question {self.id}: {error}") from None
        return self

    @property
    def asked(self) -> list[tuple[bool, str, str]]:
        """The clauses of confirmed_if and rejected_if."""
        confirming = [] if self.confirmed_if == "frontier differs" else clauses(self.confirmed_if)
        return confirming + (clauses(self.rejected_if) if self.rejected_if else [])


def _unique_ids(questions: list[Question]) -> None:
    ids = [question.id for question in questions]
    if twice := sorted({name for name in ids if ids.count(name) > 1}):
        raise ValueError(f"questions have one id twice: {', '.join(twice)}")


class Default(Section):
    """Which of several arms is to be the default, by a rule stated before they are run.

    The incumbent stays unless another arm is better than it, by the study's metric and after Holm over the candidates,
    and trains in no more time than `time_of`; of several such arms the best one is chosen.
    """

    incumbent: str
    among: list[str] = Field(min_length=1)
    """The candidates for its place."""
    time_of: str = ""
    """The arm whose training time, up to 2%, none may exceed; default the incumbent."""


class Arm(Section):
    """A named set of overrides of the study's recipe."""

    group: Literal["core", "extended"] = "core"
    """Extended arms start when the core ones have passed the sanity gate."""
    note: str = ""
    """One line for tables."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Nested settings, as in a recipe file."""


class Study(Section):
    """A recipe, its arms, its seeds, and the questions asked of them; `load_study` reads one."""

    name: str
    description: str = ""
    recipe: dict[str, Any]
    """The settings that all arms share."""
    arms: dict[str, Arm] = Field(min_length=1)
    flags: dict[str, Any] = Field(default_factory=dict)
    """Settings of the command line; they beat the arms'."""
    seeds: list[Int] = Field(default=[0, 1, 2], min_length=1)
    baseline: str
    """The arm that the others are compared with."""
    metric: Metric = Metric()
    questions: list[Question] = Field(default_factory=list)
    default: Default | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Study:
        if self.baseline not in self.arms:
            raise ValueError(f"baseline = {self.baseline}: must be one of the arms {', '.join(self.arms)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds = {self.seeds}: names a seed twice")
        for what, name in (("name", self.name), *(("arm", arm) for arm in self.arms)):
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", name):
                raise ValueError(f"{what} {name!r}: a name has letters, digits and any of _ . + - in it")
        _unique_ids(self.questions)
        for question in self.questions:
            for arm in question.contrast:
                if not fnmatch.filter(self.arms, arm):
                    raise ValueError(f"question {question.id}: there is no arm {arm!r}")
            if question.confirmed_if == "frontier differs" or any(study for _, _, study in question.asked):
                raise ValueError(f"question {question.id}: {question.confirmed_if!r} is for a comparison of studies")
        if self.default is not None:
            for arm in (self.default.incumbent, *self.default.among, self.default.time_of or self.baseline):
                if arm not in self.arms:
                    raise ValueError(f"default: there is no arm {arm!r}")
        return self

    def build(self, arm: str, seed: int) -> Recipe:
        """The recipe of a run. Raises ConfigError, naming the arm, where it is no valid one."""
        name = {"name": f"{self.name}/{arm}", "seed": seed}
        try:
            return build_recipe(self.recipe, self.arms[arm].settings, self.flags, name)
        except ConfigError as error:
            raise ConfigError(f"study {self.name}, arm {arm}: {error}") from None

    def beaten(self) -> list[tuple[str, str]]:
        """(arm, setting) where a flag takes the place of what the arm says, and says something else."""
        flags = dict(_flat(_nested(self.flags)))
        return [
            (arm, key)
            for arm, part in self.arms.items()
            for key, value in _flat(_nested(part.settings))
            if key in flags and flags[key] != value
        ]

    def to_toml(self) -> str:
        """The study as a file that stands alone: its recipe is written out, and later versions of it change nothing."""
        content = self.model_dump(exclude={"arms"}, exclude_none=True)
        content["arms"] = {
            name: {"group": arm.group, "note": arm.note, **_nested(arm.settings)} for name, arm in self.arms.items()
        }
        return tomli_w.dumps(content)


def _flat(layer: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A nested layer as dotted names and values."""
    for key, value in layer.items():
        if isinstance(value, Mapping) and prefix + key != "data.mixture":
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _table(arm: Any, study: str, name: str) -> dict[str, Any]:
    """An arm as its file has it, if it is one."""
    if not isinstance(arm, dict):
        raise ConfigError(f"study {study}, arm {name}: is {arm!r} and must be a table of settings")
    for key in ("name", "description", "seed"):
        if key in arm:
            raise ConfigError(
                f"study {study}, arm {name}: sets {key}, which an arm cannot; the study's seeds are for all"
            )
    return arm


def load_study(name_or_path: str | Path, overrides: Mapping[str, Any] | None = None) -> Study:
    """Read a study by shipped name or path; every run of it is validated before anything starts.

    In a study's file `recipe` is a recipe's name, path or settings; `settings` are overrides for all arms; an arm has
    settings of its own beside `group` and `note`; `arms_of = "STUDY"` takes arms, baseline and questions from another
    study, to which its own arms add.

    Args:
        name_or_path: a name that `gptlab studies` lists, or a path to a TOML file.
        overrides: dotted names to values, as on the command line; they beat the arms' settings.

    Raises:
        ConfigError: an unknown study, recipe or setting, or a value out of bounds, with the arm where it is one's.
    """
    content = read_layer(name_or_path, "studies")
    for key in ("arms", "settings", "flags"):
        if not isinstance(content.get(key, {}), dict):
            raise ConfigError(f"study {content['name']}: {key} = {content[key]}: must be a table")
    if "arms_of" in content:
        other = read_layer(content.pop("arms_of"), "studies")
        if "arms_of" in other:
            raise ConfigError(
                f"study {content['name']}: arms_of = {other['name']}: takes its arms from {other['arms_of']}; name that"
            )
        arms = {**other.get("arms", {})}
        for name, arm in content.get("arms", {}).items():
            arms[name] = _merged(_nested(arms.get(name, {})), _nested(_table(arm, content["name"], name)))
        inherited: dict[str, Any] = {
            key: other[key] for key in ("baseline", "questions", "metric", "seeds", "default") if key in other
        }
        content = {**inherited, **content, "arms": arms}
    if "recipe" not in content:
        raise ConfigError(
            f"study {content['name']}: recipe is missing: a recipe's name or path, or a table of settings"
        )
    base = content["recipe"]
    try:
        recipe = base if isinstance(base, dict) else read_layer(base)
        recipe = _merged(_nested(recipe), _nested(content.pop("settings", {})))
        content["recipe"] = {k: v for k, v in recipe.items() if k not in ("name", "description", "seed")}
        build_recipe(content["recipe"])
    except ConfigError as error:
        raise ConfigError(f"study {content['name']}: {error}") from None
    if not content.get("arms"):
        raise ConfigError(f"study {content['name']}: has no arms; [arms.NAME] tables say what differs")
    content["arms"] = {
        name: {
            "settings": {k: v for k, v in _table(arm, content["name"], name).items() if k not in ("group", "note")},
            **{k: arm[k] for k in ("group", "note") if k in arm},
        }
        for name, arm in content["arms"].items()
    }
    flags = {k: parse_flag(k, v) if isinstance(v, str) else v for k, v in (overrides or {}).items()}
    content["flags"] = _merged(_nested(content.get("flags", {})), _nested(flags))
    try:
        study = Study.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"study {content['name']}: {_sentences(error)}") from None
    for arm in study.arms:
        study.build(arm, study.seeds[0])
    return study


class Control(Section):
    """A study with the learning rate of the other one, to see whether a flip is the learning rate's doing."""

    of: str
    """The study whose place it takes."""
    study: str


class Comparison(Section):
    """Two studies of the same arms, and the questions asked of both; `load_comparison` reads one."""

    name: str
    description: str = ""
    compare: list[str] = Field(min_length=2, max_length=2)
    """Names of the studies."""
    control: Control | None = None
    questions: list[Question] = Field(default_factory=list)

    @model_validator(mode="after")
    def _consistent(self) -> Comparison:
        first, second = self.compare
        if first == second:
            raise ValueError(f"compare = {self.compare}: names one study twice")
        if self.control and self.control.of not in self.compare:
            raise ValueError(f"control.of = {self.control.of}: must be one of {first}, {second}")
        if self.control and self.control.study in self.compare:
            raise ValueError(f"control.study = {self.control.study}: must be another study than {first} and {second}")
        _unique_ids(self.questions)
        for question in self.questions:
            for _, _, study in question.asked:
                if study not in self.compare:
                    raise ValueError(
                        f"question {question.id}: {question.confirmed_if!r}: each clause ends with ` in` and one of "
                        f"{first}, {second}"
                    )
        return self


def load_comparison(name_or_path: str | Path) -> Comparison:
    """Read a comparison of studies by shipped name or path.

    Raises:
        ConfigError: there is no such file, or something in it is wrong.
    """
    content = read_layer(name_or_path, "comparisons")
    try:
        return Comparison.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"comparison {content['name']}: {_sentences(error)}") from None
