"""A recipe: layers of settings merged in order, validated once, and refused in sentences.

A recipe file, an arm's overrides and the flags of a command line are layers: dictionaries with the same keys.
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeVar

import tomli_w
from pydantic import BaseModel, ValidationError, model_validator

from gptlab.config import sections
from gptlab.config.sections import IN_STUDY, ON_RESUME, PRESETS
from gptlab.errors import ConfigError

MOST_PROBLEMS = 30  # that one message names
IN_REPR = ("model.n_layer", "model.n_embd", "model.block_size", "data.corpus", "optim.name", "optim.lr")

Validated = TypeVar("Validated", bound=BaseModel)


class Recipe(sections.Section):
    """Everything that defines a run."""

    name: Annotated[str, ON_RESUME, IN_STUDY] = "recipe"
    """Name of the recipe; the default run folder is runs/<name>_seed<seed>."""
    description: Annotated[str, ON_RESUME, IN_STUDY] = ""
    """One line for `gptlab recipes`."""
    task: Annotated[str, sections.OneOf(sections.TASKS)] = "lm"
    """What the model learns: the next token (a GPT), or a document's labels (an encoder with a linear head)."""
    seed: Annotated[sections.Int, IN_STUDY] = 1337
    """Seed of initialization, dropout and data order; --seed and the seeds of a study replace it."""
    model: sections.Model = sections.Model()
    data: sections.Data = sections.Data()
    batch: sections.Batch = sections.Batch()
    optim: sections.Optim = sections.Optim()
    sparsity: sections.Sparsity = sections.Sparsity()
    schedule: sections.Schedule = sections.Schedule()
    train: sections.Train = sections.Train()
    eval: sections.Eval = sections.Eval()
    hellaswag: Annotated[sections.HellaSwag, ON_RESUME, IN_STUDY] = sections.HellaSwag()
    checkpoint: Annotated[sections.Checkpoint, ON_RESUME, IN_STUDY] = sections.Checkpoint()
    precision: sections.Precision = sections.Precision()
    compile: Annotated[sections.Compile, ON_RESUME] = sections.Compile()
    distributed: Annotated[sections.Distributed, ON_RESUME, IN_STUDY] = sections.Distributed()
    sample: Annotated[sections.Sample, ON_RESUME, IN_STUDY] = sections.Sample()
    log: Annotated[sections.Log, ON_RESUME, IN_STUDY] = sections.Log()
    faults: sections.Faults = sections.Faults()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        for rules in (_name_rules, _step_rules, _optim_rules, _shape_rules, _sparsity_rules, _classifier_rules):
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

    def __repr_args__(self) -> Iterator[tuple[str, Any]]:
        """The settings that repr and print show; `to_toml` writes all."""
        limits = (f"train.{limit}" for limit in ("max_steps", "max_tokens", "max_epochs") if getattr(self.train, limit))
        for name in ("name", "task", *IN_REPR, *limits, "seed"):
            yield name, value_of(self, name)

    def to_toml(self) -> str:
        """All settings, as a recipe file."""
        return tomli_w.dumps(self.model_dump())


def value_of(recipe: Recipe, name: str) -> Any:
    """The value of a setting by its dotted name."""
    return functools.reduce(getattr, name.split("."), recipe)


def build_recipe(*layers: Mapping[str, Any]) -> Recipe:
    """Merge layers of settings and validate the result once.

    Args:
        layers: dictionaries, nested by section or with dotted keys; values as TOML gives them. Later layers win.

    Raises:
        ConfigError: one line for each setting that is unknown or out of bounds.
    """
    return validated(Recipe, merged(*layers))


# -- names of settings ----------------------------------------------------------------------------------------------


def settings(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting as (dotted name, pydantic FieldInfo), in the order of the schema."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from settings(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


@functools.cache
def settings_marked(mark: str) -> tuple[str, ...]:
    """The settings with a mark, ON_RESUME or IN_STUDY, of their own or of their section."""
    tops = Recipe.model_fields
    return tuple(k for k, field in settings() if mark in [*field.metadata, *tops[k.partition(".")[0]].metadata])


def may_change(name: str) -> bool:
    """Whether a resumed run may change a setting."""
    return name in settings_marked(ON_RESUME)


def may_differ(name: str) -> bool:
    """Whether two calls for the same study may differ in a setting."""
    return name in settings_marked(IN_STUDY)


def unknown_setting(name: str, model: type[BaseModel] = Recipe) -> ConfigError:
    """The error for a name that is not a setting, with the setting that was probably meant."""
    known = [key for key, _ in settings(model)] + ["model.preset"]
    if name in known:  # on a command line, where only the settings of a section are flags
        return ConfigError(f"no flag '--{name}'; did you mean a line '{name} = ...' in the recipe file?")
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    if not close:  # the right word in the wrong section
        close = [key for key in known if key.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return ConfigError(f"no setting '{name}'{hint}")


# -- merging and validating -----------------------------------------------------------------------------------------


def nested(layer: Mapping[str, Any]) -> dict[str, Any]:
    """Nest dotted keys: {"optim.lr": 1} becomes {"optim": {"lr": 1}}. model.preset is replaced by the shape it names.

    Raises:
        ConfigError: a section that is given a value, or an unknown preset.
    """
    result: dict[str, Any] = {}
    for key, value in layer.items():
        section, dot, leaf = key.partition(".")
        if dot:
            inner = result.setdefault(section, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"{section} = {inner}: must be a section of settings")
            inner[leaf] = value
        elif isinstance(value, Mapping) and isinstance(result.get(key, {}), dict):
            result[key] = {**result.get(key, {}), **value}
        else:
            result[key] = value
    model = result.get("model")
    if isinstance(model, dict) and "preset" in model:
        preset = model.pop("preset")
        if not isinstance(preset, str) or preset not in PRESETS:
            raise ConfigError(f"model.preset = {preset!r}: must be one of {', '.join(PRESETS)}")
        result["model"] = {**PRESETS[preset], **model}
    return result


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Layers nested and merged setting by setting; later layers win."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in nested(layer).items():
            is_section = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = {**result[key], **value} if is_section else value
    return result


def validated(model: type[Validated], content: Mapping[str, Any], where: str = "") -> Validated:
    """The model made of `content`. Raises ConfigError with a sentence for each wrong setting, after `where`."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise ConfigError(where + _sentences(error, model)) from None


_BOUNDS = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}
_WORDS = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}
_KINDS = {"bool": "true or false", "int": "a whole number", "float": "a number", "string": "text", "dict": "a table"}


def _sentences(error: ValidationError, model: type[BaseModel]) -> str:
    """Pydantic's errors, one sentence per setting: `optim.lr = -1: must be greater than 0`."""
    problems: dict[str, list[str]] = {}
    errors = error.errors()
    for item in errors[:MOST_PROBLEMS]:
        name = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            problems.setdefault(str(unknown_setting(name, model)), [])
        elif item["type"] == "missing":  # only in a study: every setting of a recipe has a default
            problems.setdefault(f"{name} is missing", [])
        elif item["type"] == "value_error":  # a complete sentence of our own
            problems.setdefault(str(item["ctx"]["error"]), [])
        else:  # the location may go on after the setting: an element, or a branch of a union
            name = next((key for key, _ in settings(model) if "." in key and name.startswith(key + ".")), name)
            value = f"{item['input']}" if not isinstance(item["input"], dict) else "{...}"
            value = value if len(value) <= 200 else f"{value[:200]}..."
            problems.setdefault(f"{name} = {value}", []).append(_requirement(item))
    lines = [f"{head}: must be {' or '.join(dict.fromkeys(says))}" if says else head for head, says in problems.items()]
    if len(errors) > MOST_PROBLEMS:
        lines.append(f"and {len(errors) - MOST_PROBLEMS:,} more")
    return "\n".join(lines)


def _requirement(item: Any) -> str:
    """What pydantic requires of a value: `greater than 0`."""
    kind, context = item["type"], item.get("ctx", {})
    if kind in _BOUNDS:
        return f"{_WORDS[_BOUNDS[kind]]} {context[_BOUNDS[kind]]:g}"
    if kind == "literal_error":
        return f"one of {context['expected']}" if " or " in context["expected"] else str(context["expected"])
    if kind == "too_short":
        return f"a list of at least {context['min_length']}"
    if kind == "finite_number":
        return "a finite number"
    if kind in ("model_type", "model_attributes_type"):
        return "a section of settings"
    return _KINDS.get(kind.removesuffix("_type").removesuffix("_parsing"), item["msg"].replace("Input should be ", ""))


# -- rules between settings: each yields a sentence for what is wrong -----------------------------------------------


def _name_rules(recipe: Recipe) -> Iterator[str]:
    """The name of a run's folder: a recipe of someone else's must not lead out of runs/. A study's are study/arm."""
    parts = recipe.name.split("/")
    wrong = not recipe.name or not recipe.name.isprintable() or recipe.name.startswith("/")
    if wrong or {".", ".."} & {*parts} or "\\" in recipe.name:
        yield f"name = {recipe.name!r}: must be a name for a folder in runs/, without .. and not absolute"


def _step_rules(recipe: Recipe) -> Iterator[str]:
    tokens, micro, block = recipe.batch.tokens_per_step, recipe.batch.micro_batch, recipe.model.block_size
    train, min_lr, lr = recipe.train, recipe.schedule.min_lr, recipe.optim.lr
    if tokens % block:
        wrong = f"batch.tokens_per_step = {tokens}: must be a multiple of model.block_size = {block}"
        yield f"{wrong}; the nearest is {max(1, round(tokens / block)) * block}"
    if isinstance(micro, int) and micro > recipe.sequences_per_step:
        wrong = f"batch.micro_batch = {micro}: must not exceed the {recipe.sequences_per_step} sequences of a step"
        yield f"{wrong} (batch.tokens_per_step / model.block_size = {tokens} / {block})"
    if min_lr > lr:
        yield f"schedule.min_lr = {min_lr}: must not exceed optim.lr = {lr}"
    if not (train.max_steps or train.max_tokens or train.max_epochs or train.eval_only):
        yield "the run has no end: set train.max_steps, train.max_tokens or train.max_epochs"


CAUTIOUS = ("adamw", "lion", "ademamix", "muon", "normuon")  # optimizers that have optim.cautious_decay


def _optim_rules(recipe: Recipe) -> Iterator[str]:
    optim, regime = recipe.optim, recipe.precision.regime
    if optim.rounding != "nearest" and regime != "bf16_pure":
        yield f"optim.rounding = {optim.rounding}: works only with precision.regime = bf16_pure, not {regime}"
    if optim.rounding != "nearest" and optim.name != "adamw":
        yield f"optim.rounding = {optim.rounding}: works only with optim.name = adamw, not {optim.name}"
    if optim.name not in ("adamw", "adamw-spam", "adamw-prune") or optim.rounding != "nearest":
        needs = "works only with optim.name = adamw, adamw-spam or adamw-prune and with optim.rounding = nearest"
        if optim.kernel != "fused":
            yield f"optim.kernel = {optim.kernel}: {needs}"
        if optim.amsgrad is True:
            yield f"optim.amsgrad = true: {needs}"
    if optim.name in ("muon", "normuon") and regime == "fp16_pure":
        wrong = f"optim.name = {optim.name}: does not work with precision.regime = fp16_pure"
        yield f"{wrong}, where its momentum would underflow"
    pure = regime in ("bf16_pure", "fp16_pure")
    if optim.name in ("ademamix", "adamw-schedule-free", "soap", "soap-muon") and pure:
        wrong = f"optim.name = {optim.name}: does not work with precision.regime = {regime}"
        yield f"{wrong}, which would round its averages"
    if optim.cautious_decay and (optim.name not in CAUTIOUS or optim.kernel != "fused" or optim.amsgrad is True):
        names = f"{', '.join(CAUTIOUS[:-1])} or {CAUTIOUS[-1]}"
        yield f"optim.cautious_decay = true: works only with optim.name = {names}, without amsgrad and kernel = foreach"
    if optim.cautious_decay and optim.name in ("muon", "normuon") and pure:
        yield f"optim.cautious_decay = true: does not work with optim.name = {optim.name} and {regime}"
    if optim.name == "adamw-schedule-free":
        if recipe.schedule.shape != "constant":
            wrong = f"schedule.shape = {recipe.schedule.shape}: must be constant with optim.name = adamw-schedule-free"
            yield f"{wrong}, which averages the weights instead of lowering the rate; a warm-up may precede it"
        if not optim.betas[0]:
            yield "optim.betas: the first must be above 0 with optim.name = adamw-schedule-free"
    if recipe.train.ema and (pure or optim.name == "adamw-schedule-free"):
        other = f"precision.regime = {regime}, which would round the average" if pure else f"optim.name = {optim.name}"
        yield f"train.ema = {recipe.train.ema}: does not work with {other}"
    if optim.name == "adamw-spam" and optim.spam_form == "stable":
        if optim.spam_theta != "auto":
            yield f"optim.spam_theta = {optim.spam_theta}: has no meaning with optim.spam_form = stable; remove it"
        if optim.spam_warmup_steps not in ("auto", 0):
            yield f"optim.spam_warmup_steps = {optim.spam_warmup_steps}: must be 0 with optim.spam_form = stable"
    resets = optim.spam_form == "paper" and optim.spam_periodic_reset
    if optim.name == "adamw-spam" and optim.spam_density < 1 and not resets:
        yield f"optim.spam_density = {optim.spam_density}: below 1 works only with optim.spam_form = paper and resets"


TRANSFERRING = (
    "adamw",
    "lion",
    "ademamix",
    "adamw-schedule-free",
    "muon",
    "normuon",
    "soap-muon",
)  # whose rules muP has


def _shape_rules(recipe: Recipe) -> Iterator[str]:
    found, name = recipe.model.parametrization, recipe.optim.name
    if found != "standard" and name not in TRANSFERRING:
        names = f"{', '.join(TRANSFERRING[:-1])} or {TRANSFERRING[-1]}"
        yield f"model.parametrization = {found}: works only with optim.name = {names}, not {name}"


def _sparsity_rules(recipe: Recipe) -> Iterator[str]:
    sparsity, name = recipe.sparsity, recipe.optim.name
    if sparsity.method == "state" and name != "adamw-prune":
        yield f"sparsity.method = state: works only with optim.name = adamw-prune, not {name}"
    if sparsity.method != "state" and name == "adamw-prune":
        yield f"optim.name = adamw-prune: works only with sparsity.method = state, not {sparsity.method}"
    if sparsity.method != "none" and (name in ("adamw-schedule-free", "soap", "soap-muon") or recipe.train.ema):
        other = f"train.ema = {recipe.train.ema}" if recipe.train.ema else f"optim.name = {name}"
        yield f"sparsity.method = {sparsity.method}: does not work with {other}"
    if sparsity.method != "none" and sparsity.begin >= sparsity.end:
        yield f"sparsity.begin = {sparsity.begin}: must be before sparsity.end = {sparsity.end}"
    if sparsity.method == "2:4" and sparsity.target != 0.5:
        yield "sparsity.method = 2:4: always gives sparsity 0.5; remove sparsity.target"


def _classifier_rules(recipe: Recipe) -> Iterator[str]:
    """A classifier is BERT's encoder, which has one form of these parts."""
    if recipe.task != "classify":
        return
    wants = {"position": "learned", "norm": "layernorm", "mlp": "gelu_erf", "bias": True, "parametrization": "standard"}
    for key, value in (wants | dict.fromkeys(("qk_norm", "document_attention", "zero_init"), False)).items():
        if (given := getattr(recipe.model, key)) != value:
            yield f"model.{key} = {str(given).lower()}: must be {str(value).lower()} where task = classify"
    if recipe.data.mixture:
        yield "data.mixture: works only with task = lm; a classifier trains on one prepared dataset"
    if recipe.faults.batch_every:
        yield f"faults.batch_every = {recipe.faults.batch_every}: works only with task = lm"
