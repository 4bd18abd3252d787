"""A recipe: all settings of a run, what identifies a run, and the rules between settings."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import model_validator

from gptlab.config.layers import merged, settings_of, unknown_name, validated
from gptlab.config.sections import (
    IN_STUDY,
    ON_RESUME,
    Batch,
    Checkpoint,
    Compile,
    Data,
    Distributed,
    Eval,
    Faults,
    HellaSwag,
    Int,
    Log,
    Model,
    Optim,
    Precision,
    Sample,
    Schedule,
    Section,
    Sparsity,
    Train,
)
from gptlab.errors import ConfigError


class Recipe(Section):
    """Everything that defines a run."""

    name: Annotated[str, ON_RESUME, IN_STUDY] = "recipe"
    """Name of the recipe; the default run folder is runs/<name>_seed<seed>."""
    description: Annotated[str, ON_RESUME, IN_STUDY] = ""
    """One line for `gptlab recipes`."""
    task: Literal["lm", "classify"] = "lm"
    """What the model learns: the next token (a GPT), or a document's labels (an encoder with a linear head)."""
    seed: Annotated[Int, IN_STUDY] = 1337
    """Seed of initialization, dropout and data order; --seed and the seeds of a study replace it."""
    model: Model = Model()
    data: Data = Data()
    batch: Batch = Batch()
    optim: Optim = Optim()
    sparsity: Sparsity = Sparsity()
    schedule: Schedule = Schedule()
    train: Train = Train()
    eval: Eval = Eval()
    hellaswag: Annotated[HellaSwag, ON_RESUME, IN_STUDY] = HellaSwag()
    checkpoint: Annotated[Checkpoint, ON_RESUME, IN_STUDY] = Checkpoint()
    precision: Precision = Precision()
    compile: Annotated[Compile, ON_RESUME] = Compile()
    distributed: Annotated[Distributed, ON_RESUME, IN_STUDY] = Distributed()
    sample: Annotated[Sample, ON_RESUME, IN_STUDY] = Sample()
    log: Annotated[Log, ON_RESUME, IN_STUDY] = Log()
    faults: Faults = Faults()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        for rules in (_batch_rules, _optim_rules, _spam_rules, _sparsity_rules, _classifier_rules):
            for problem in rules(self):
                raise ValueError(problem)
        return self

    @property
    def sequences_per_step(self) -> int:
        return self.batch.tokens_per_step // self.model.block_size

    def step_limit(self, train_tokens: int) -> int:
        """Optimizer steps until the first of the limits, for a training split of `train_tokens` tokens.

        The step that completes a limit in tokens or epochs is the last: such a limit is exceeded by less than a step.
        """
        limits = [
            self.train.max_steps or math.inf,
            math.ceil(self.train.max_tokens / self.batch.tokens_per_step) or math.inf,
            math.ceil(self.train.max_epochs * train_tokens / self.batch.tokens_per_step) or math.inf,
        ]
        return 0 if self.train.eval_only else int(min(limits))

    def replace(self, settings: Mapping[str, Any]) -> Recipe:
        """A validated copy with some settings replaced: `recipe.replace({"optim.lr": 1e-3})`."""
        return build_recipe(self.model_dump(), settings)

    def to_toml(self) -> str:
        return tomli_w.dumps(self.model_dump())


def build_recipe(*layers: Mapping[str, Any]) -> Recipe:
    """Merge layers of settings and validate the result once.

    Args:
        layers: dictionaries, nested by section or with dotted keys; values as TOML gives them. Later layers win.

    Raises:
        ConfigError: one line for each setting that is unknown or out of bounds.
    """
    return validated(Recipe, merged(*layers))


def settings() -> Iterator[tuple[str, Any]]:
    """Every setting of a recipe as (dotted name, pydantic FieldInfo), in the order of the schema."""
    return settings_of(Recipe)


def unknown_setting(name: str) -> ConfigError:
    """The error for a name that is not a setting of a recipe, with the setting that was probably meant."""
    return unknown_name(name, (key for key, _ in settings()))


# -- what identifies a run ------------------------------------------------------------------------------------------


@functools.cache
def settings_marked(mark: str) -> tuple[str, ...]:
    """The settings with a mark of their own or of their section: ON_RESUME or IN_STUDY."""
    sections = Recipe.model_fields
    return tuple(
        name
        for name, field in settings()
        if mark in field.metadata or mark in sections[name.partition(".")[0]].metadata
    )


def may_change(name: str) -> bool:
    """Whether a resumed run may change a setting."""
    return name in settings_marked(ON_RESUME)


def may_differ(name: str) -> bool:
    """Whether two calls for the same study may differ in a setting."""
    return name in settings_marked(IN_STUDY)


# -- rules between settings: each yields a sentence for what is wrong -----------------------------------------------


def _batch_rules(recipe: Recipe) -> Iterator[str]:
    tokens, block, micro_batch = recipe.batch.tokens_per_step, recipe.model.block_size, recipe.batch.micro_batch
    if tokens % block:
        nearest = max(1, round(tokens / block)) * block
        yield (
            f"batch.tokens_per_step = {tokens}: must be a multiple of model.block_size = {block}; the nearest is "
            f"{nearest}"
        )
    if isinstance(micro_batch, int) and micro_batch > recipe.sequences_per_step:
        yield (
            f"batch.micro_batch = {micro_batch}: must not exceed the {recipe.sequences_per_step} sequences of a step "
            f"(batch.tokens_per_step / model.block_size = {tokens} / {block})"
        )
    if not (recipe.train.max_steps or recipe.train.max_tokens or recipe.train.max_epochs or recipe.train.eval_only):
        yield "the run has no end: set train.max_steps, train.max_tokens or train.max_epochs"


def _optim_rules(recipe: Recipe) -> Iterator[str]:
    optim, regime = recipe.optim, recipe.precision.regime
    if recipe.schedule.min_lr > optim.lr:
        yield f"schedule.min_lr = {recipe.schedule.min_lr}: must not exceed optim.lr = {optim.lr}"
    if optim.rounding != "nearest" and regime != "bf16_pure":
        yield f"optim.rounding = {optim.rounding}: needs bf16 weights, precision.regime = bf16_pure"
    if optim.rounding != "nearest" and optim.name != "adamw":
        yield f"optim.rounding = {optim.rounding}: works only with optim.name = adamw"
    if optim.name not in ("adamw", "adamw-spam", "adamw-prune") or optim.rounding != "nearest":
        needs = "works only with optim.name = adamw, adamw-spam or adamw-prune and with optim.rounding = nearest"
        if optim.kernel != "fused":
            yield f"optim.kernel = {optim.kernel}: {needs}"
        if optim.amsgrad is True:
            yield f"optim.amsgrad = true: {needs}"
    if optim.name == "muon" and regime == "fp16_pure":
        yield "optim.name = muon: does not work with precision.regime = fp16_pure, where its momentum would underflow"


def _spam_rules(recipe: Recipe) -> Iterator[str]:
    optim = recipe.optim
    if optim.name != "adamw-spam":
        return
    if optim.spam_form == "stable" and optim.spam_theta != "auto":
        yield f"optim.spam_theta = {optim.spam_theta}: has no meaning with optim.spam_form = stable; remove it"
    if optim.spam_form == "stable" and optim.spam_warmup_steps not in ("auto", 0):
        yield f"optim.spam_warmup_steps = {optim.spam_warmup_steps}: must be 0 with optim.spam_form = stable"
    if optim.spam_density < 1 and not (optim.spam_form == "paper" and optim.spam_periodic_reset):
        yield (
            f"optim.spam_density = {optim.spam_density}: below 1 works only with optim.spam_form = paper and "
            f"optim.spam_periodic_reset = true"
        )


def _sparsity_rules(recipe: Recipe) -> Iterator[str]:
    sparsity, prunes = recipe.sparsity, recipe.optim.name == "adamw-prune"
    if sparsity.method == "state" and not prunes:
        yield f"sparsity.method = state: needs optim.name = adamw-prune, not {recipe.optim.name}"
    if sparsity.method != "state" and prunes:
        yield f"optim.name = adamw-prune: needs sparsity.method = state, not {sparsity.method}"
    if sparsity.method != "none" and sparsity.begin >= sparsity.end:
        yield f"sparsity.begin = {sparsity.begin}: must be before sparsity.end = {sparsity.end}"
    if sparsity.method == "2:4" and sparsity.target != 0.5:
        yield "sparsity.method = 2:4: always gives sparsity 0.5; remove sparsity.target"
    if recipe.faults.batch_every and recipe.task != "lm":
        yield f"faults.batch_every = {recipe.faults.batch_every}: works only with task = lm"


def _classifier_rules(recipe: Recipe) -> Iterator[str]:
    """A classifier is BERT's encoder, which these settings cannot change."""
    if recipe.task != "classify":
        return
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
        given = getattr(recipe.model, key)
        if given != value:
            yield f"model.{key} = {str(given).lower()}: must be {str(value).lower()} where task = classify"
    if recipe.data.mixture:
        yield "data.mixture: works only with task = lm; a classifier trains on one prepared dataset"
