"""card.md: one run on one page: curve, sample and results, then settings by group, then where it all comes from.

The card is made from recipe.toml, environment.json, result.json and metrics.jsonl. What these files do not say is left
out.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from gptlab.config import Recipe, settings
from gptlab.files import printable
from gptlab.report.known import DEFINITIONS, beside_the_known
from gptlab.report.reading import duration, human, number, series, settings_of, short_names
from gptlab.rundir import RunDir, write_atomically

MOST_EVALUATIONS = 12  # rows of the table: the card is one page
MOST_SAMPLE = 1200  # characters

# Settings that a card always shows; other settings are shown if they differ from their defaults.
ARCHITECTURE = (
    "n_layer",
    "n_head",
    "n_embd",
    "block_size",
    "vocab_size",
    "position",
    "norm",
    "mlp",
    "bias",
    "tied",
    "dropout",
)
ESSENTIAL = (
    "seed",
    "batch.tokens_per_step",
    "batch.micro_batch",
    "optim.name",
    "optim.lr",
    "optim.betas",
    "optim.eps",
    "optim.weight_decay",
    "optim.grad_clip",
    "schedule.shape",
    "schedule.warmup_steps",
    "schedule.min_lr",
    "precision.regime",
    "compile.enabled",
    "data.sampling",
)
NOT_SETTINGS = ("name", "description")
TOLD_AS_DATA = ("data.corpus", "data.tokenizer", "data.path")

# The sections of a recipe as titles, and settings in words where their names are not words already.
GROUPS = {
    "model": "Model",
    "data": "Data",
    "batch": "Batch",
    "optim": "Optimizer",
    "sparsity": "Sparsity",
    "schedule": "Learning rate schedule",
    "train": "Length and device",
    "eval": "Evaluation",
    "hellaswag": "HellaSwag",
    "checkpoint": "Checkpoints",
    "precision": "Precision",
    "compile": "torch.compile",
    "distributed": "Processes",
    "sample": "Samples",
    "log": "Logs",
    "faults": "Injected faults",
}
SETTING_NAMES = {
    "model.n_layer": "layers",
    "model.n_head": "attention heads",
    "model.n_embd": "width",
    "model.block_size": "context, tokens",
    "model.vocab_size": "vocabulary",
    "model.position": "positions",
    "model.norm_eps": "epsilon of the norms",
    "model.mlp": "MLP",
    "model.mlp_width": "width of the MLP",
    "model.bias": "biases",
    "model.tied": "embedding and head tied",
    "model.qk_norm": "norm of queries and keys",
    "model.zero_init": "residual projections start at 0",
    "model.base_width": "width at which it is the standard one",
    "model.base_depth": "layers at which it is the standard one",
    "model.base_head_size": "head size at which it is the standard one",
    "batch.tokens_per_step": "tokens per step",
    "batch.micro_batch": "sequences at a time",
    "optim.name": "optimizer",
    "optim.lr": "learning rate",
    "optim.eps": "epsilon",
    "optim.grad_clip": "gradients clipped to norm",
    "optim.muon_lr": "learning rate of Muon's matrices",
    "optim.muon_momentum": "momentum of Muon's matrices",
    "optim.cautious_decay": "decay only where update and weight agree in sign",
    "train.ema": "decay rate of the weights' moving average",
    "schedule.warmup_steps": "warm-up, steps",
    "schedule.decay_steps": "decay ends at step",
    "schedule.decay_fraction": "share of the run that decays",
    "schedule.min_lr": "learning rate at the end",
    "train.max_steps": "steps at most",
    "train.max_tokens": "tokens at most",
    "train.max_epochs": "passes at most",
    "train.eval_every": "steps between evaluations",
    "eval.tokens": "tokens of an evaluation",
    "checkpoint.every": "steps between checkpoints",
    "checkpoint.keep_last": "newest checkpoints kept",
    "precision.regime": "numbers",
    "compile.enabled": "compiled",
    "sample.every": "steps between samples",
    "sample.max_tokens": "tokens at most",
    "log.every": "steps between lines",
    "log.to": "loggers",
}
# Values in words, of settings whose values are names.
VALUE_NAMES: dict[str, dict[Any, str]] = {
    "model.position": {"rope": "rotary (RoPE)"},
    "model.norm": {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"},
    "model.mlp": {"gelu": "GELU (tanh)", "gelu_erf": "GELU", "relu2": "ReLU²", "swiglu": "SwiGLU"},
    "optim.name": {
        "adamw": "AdamW",
        "muon": "Muon",
        "sgd": "SGD",
        "lion": "Lion",
        "ademamix": "AdEMAMix",
        "normuon": "NorMuon",
        "adamw-schedule-free": "Schedule-Free AdamW",
        "soap": "SOAP",
        "soap-muon": "SOAP-Muon",
    },
    "schedule.shape": {"wsd": "constant, then linear (wsd)", "wsd-sqrt": "constant, then 1 - sqrt (wsd-sqrt)"},
    "precision.regime": {"fp32": "float32", "amp_bf16": "bf16 by autocast (amp\\_bf16)"},
}

HARDWARE = {
    "device_name": "device",
    "device": "device type",
    "cpu_count": "CPU cores",
    "threads": "threads",
    "processes": "processes",
    "platform": "platform",
    "gptlab": "gptlab",
    "python": "Python",
    "torch": "PyTorch",
    "git_commit": "git commit",
    "cuda": "CUDA",
    "optimizer": "optimizer",
    "float8": "float8",
}
RESULT_NAMES = {
    "final_train_loss": "final training loss (nats per token)",
    "final_val_loss": "final validation loss (nats per token)",
    "val_bits_per_byte": "validation bits per byte",
    "val_perplexity": "validation perplexity",
    "tokens_per_second": "tokens per second",
    "samples_per_second": "samples per second",
    "time_per_iter_ms": "time per step (ms, median)",
    "time_per_iter_p95_ms": "time per step (ms, 95th percentile)",
    "peak_memory_gb": "peak memory (GB)",
    "peak_memory_reserved_gb": "peak memory reserved by PyTorch (GB)",
    "wall_seconds": "wall time",
    "cpu_seconds": "CPU time",
    "mask_bytes": "masks (bytes)",
    "mask_overhead_percent": "mask overhead (% of step time)",
    "final_train_eval_loss": "final loss on the training split (nats per token)",
    "failure": "kind of failure",
    "failed_tensor": "first failed tensor",
    "memory_asked_gb": "memory asked for (GB)",
    "memory_free_gb": "memory free (GB)",
    "memory_total_gb": "memory in total (GB)",
}
EVALUATION_NAMES = {
    "val_loss": "val loss",
    "train_eval_loss": "train loss, measured like val",
    "val_bits_per_byte": "bits per byte",
    "val_perplexity": "perplexity",
    "hellaswag_acc": "HellaSwag acc",
    "hellaswag_acc_norm": "HellaSwag acc_norm",
    "hellaswag_harness_acc": "HellaSwag acc (lm-eval's)",
    "hellaswag_harness_acc_norm": "HellaSwag acc_norm (lm-eval's)",
}
TOLD_ELSEWHERE = ("status", "steps", "tokens", "failed_at_step", "reason", "timed_steps")


def write_card(run: RunDir, compare: RunDir | None = None) -> Path:
    """Write card.md into the run's folder.

    Args:
        run: the run that the card is about.
        compare: an earlier run, to say what differs from it.

    Raises:
        RunError: a recipe, environment or result that cannot be read.
    """
    file = run.path / "card.md"
    write_atomically(file, card(run, compare))
    return file


def card(run: RunDir, compare: RunDir | None = None) -> str:
    """The text of card.md."""
    recipe = run.read_recipe()
    environment, result, lines = run.read_json("environment.json"), run.read_json("result.json"), run.read_metrics()
    sections = [
        _head(run, recipe, result, lines),
        _picture(run),
        _sample(run, recipe),
        _results(result, lines),
        _evaluations(lines),
        _published(recipe, environment, result, lines),
        _since(run, compare) if compare else "",
        _settings(recipe, environment, result),
        _provenance(run, environment),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


# -- values as Markdown ---------------------------------------------------------------------------------------------


def escape(text: str) -> str:
    """Text that Markdown shows as it is, on one line, also within a table."""
    return re.sub(r"([\\`*_{}\[\]<>|#~$&!])", r"\\\1", printable(" ".join(text.split())))


def show(value: Any) -> str:
    """A setting or a fact: texts with blanks at the ends are quoted, other values look as in TOML."""
    if isinstance(value, str):
        plain = value == " ".join(value.split()) and value
        return escape(value if plain else json.dumps(value, ensure_ascii=False))
    if isinstance(value, float):
        return f"{value:.6g}"
    return escape(json.dumps(value, ensure_ascii=False))


def _measured(value: Any) -> str:
    """A measured number: four decimals for a loss, separators for large numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "not finite" if value is None else show(value)
    if not np.isfinite(value):
        return "not finite"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4f}" if abs(value) >= 0.01 or value == 0 else f"{value:.4g}"


def _code(key: str) -> str:
    return f"`{key}`"


def _rows(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    table = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in table)


def _section(title: str, rows: list[tuple[str, str]], header: Sequence[str] = ("", "")) -> str:
    return f"## {title}\n\n{_rows(header, rows)}" if rows else ""


def _facts(facts: Mapping[str, Any], names: Mapping[str, str], without: Sequence[str] = ()) -> list[tuple[str, str]]:
    """(name, value) of the known facts: those in `names` first, then the rest by key."""
    keys = [key for key in names if key in facts] + [key for key in facts if key not in names]
    known = [key for key in keys if key not in without and facts[key] not in (None, "", {}, [])]
    return [(names.get(key) or escape(key), _shown_fact(facts[key])) for key in known]


def _shown_fact(value: Any) -> str:
    """A fact; an object as `key value` pairs without what is null."""
    if not isinstance(value, dict):
        return show(value)
    return ", ".join(f"{escape(str(key).replace('_', ' '))} {show(v)}" for key, v in value.items() if v is not None)


def _fenced(command: str) -> str:
    """A block of code with a fence that the command cannot close."""
    longest = max((len(run) for run in re.findall("`+", command)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{printable(command)}\n{fence}"


# -- the sections ---------------------------------------------------------------------------------------------------


def _head(run: RunDir, recipe: Recipe, result: dict[str, Any], lines: list[dict[str, Any]]) -> str:
    title = f"# Run {escape(run.path.resolve().name)}"
    about = f"Recipe {escape(recipe.name)}, seed {recipe.seed}."
    if recipe.description:
        about += f" {escape(recipe.description).rstrip('.')}."
    if result.get("status"):
        says = f"**{escape(str(result['status']).replace('_', ' '))}**"
        if "failed_at_step" in result:
            says += f" at step {_measured(result['failed_at_step'])}"
        if "steps" in result:
            says += f" after {_measured(result['steps'])} steps"
        if "tokens" in result:
            says += f" and {human(number(result['tokens']))} tokens"
        if result.get("reason"):
            says += f": {escape(str(result['reason']))}"
        return f"{title}\n\n{about}\n\nStatus: {says.rstrip('.')}."
    last = max((number(line["step"]) for line in lines), default=0)
    return f"{title}\n\n{about}\n\nStatus: no result yet; the last step logged is {last:,.0f}."


def _defaults() -> dict[str, Any]:
    return {key: field.get_default(call_default_factory=True) for key, field in settings()}


def _shown_setting(key: str, recipe: Recipe) -> str:
    value = attrgetter(key)(recipe)
    if key == "model.vocab_size" and value == 0:
        return "the tokenizer's"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and key != "seed":
        says = f"{value:,}"
    elif isinstance(value, list | tuple) and value:
        says = ", ".join(map(show, value))
    else:
        says = VALUE_NAMES.get(key, {}).get(value) or show(value)
    if key == "model.n_head":
        says += f" of width {recipe.model.head_size}"
    if key == "model.mlp":
        says += f", hidden width {recipe.model.mlp_hidden:,}"
    return says


def _settings(recipe: Recipe, environment: dict[str, Any], result: dict[str, Any]) -> str:
    """Settings that a reader asks for, and those that are not the default's, by section."""
    defaults = _defaults()
    always = {*ESSENTIAL, *(f"model.{key}" for key in ARCHITECTURE)}
    groups: dict[str, list[tuple[str, str, str]]] = {group: [] for group in GROUPS}
    for key, value in settings_of(recipe).items():
        section, _, leaf = key.rpartition(".")
        if key not in (*NOT_SETTINGS, *TOLD_AS_DATA) and (key in always or value != defaults[key]):
            name = SETTING_NAMES.get(key) or leaf.replace("_", " ")
            groups.setdefault(section or "train", []).append((name, _shown_setting(key, recipe), _code(key)))
    groups["model"] += _parameters(environment, result)
    groups["data"] = _data(recipe, environment, result) + groups["data"]
    rows = [
        ("" if i else f"**{GROUPS.get(group) or escape(group)}**", *row)
        for group, members in groups.items()
        for i, row in enumerate(members)
    ]
    return f"## Settings\n\n{_rows(('', '', 'value', 'setting'), rows)}"


def _parameters(environment: dict[str, Any], result: dict[str, Any]) -> list[tuple[str, str, str]]:
    parameters = result.get("parameters", environment.get("parameters"))
    if isinstance(parameters, int):
        return [("parameters", f"{parameters:,} ({human(parameters)})", "")]
    return [("parameters", show(parameters), "")] if parameters else []


def _data(recipe: Recipe, environment: dict[str, Any], result: dict[str, Any]) -> list[tuple[str, str, str]]:
    facts = environment.get("data")
    facts = dict(facts) if isinstance(facts, dict) else {}
    told = {"corpus": recipe.data.corpus, "tokenizer": recipe.data.tokenizer} if not recipe.data.mixture else {}
    if recipe.data.path:
        told["path"] = recipe.data.path
    facts = {**told, **facts}  # the environment knows what was trained on
    rows = []
    for key, value in facts.items():
        if value in (None, "", {}, []):
            continue
        tokens = key.endswith("_tokens") and isinstance(value, int)
        says = f"{value:,} ({human(value)})" if tokens else show(value)
        if isinstance(value, list):
            says = ", ".join(map(show, value))
        setting = f"data.{key}" in TOLD_AS_DATA
        rows.append((escape(key.replace("_", " ")), says, _code(f"data.{key}") if setting else ""))
    trained, split = number(result.get("tokens")), number(facts.get("train_tokens"))
    if trained > 0 and split > 0:
        rows.append(("passes over the training split", f"{trained / split:.3g}", ""))
    return rows


def _sample(run: RunDir, recipe: Recipe) -> str:
    """The last text that was generated while the run trained."""
    try:
        file = max((run.path / "samples").glob("step-*.txt"))
        text = file.read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):  # ValueError: there is none
        return ""
    step = file.stem.removeprefix("step-")
    if not step.isdecimal() or not text.strip():
        return ""
    cut = text[:MOST_SAMPLE] + ("…" if len(text) > MOST_SAMPLE else "")
    prompt = recipe.sample.prompt  # one of several lines is plain in the text, which begins with it
    told = f", which goes on from {escape(json.dumps(prompt, ensure_ascii=False))}"
    told = told if prompt.strip() and "\n" not in prompt else ""
    return f"## Sample\n\nText of the model after step {int(step):,}{told}:\n\n{_fenced(cut.strip(chr(10)))}"


def _picture(run: RunDir) -> str:
    for name in ("train-val_loss", "training_loss"):
        if (run.plots / f"{name}.png").is_file():
            return f"![Losses of the run]({run.plots.name}/{name}.png)"
    return ""


def _best(lines: list[dict[str, Any]]) -> tuple[float, float] | None:
    """(value, step) of the lowest validation loss."""
    steps, values = series(lines, "val_loss")
    if not np.isfinite(values).any():
        return None
    best = int(np.nanargmin(np.where(np.isfinite(values), values, np.nan)))
    return float(values[best]), float(steps[best])


def _outcome(result: dict[str, Any], lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The result, and scores of the last evaluation that the result does not have."""
    outcome = {key: value for key, value in result.items() if key not in (*TOLD_ELSEWHERE, "parameters")}
    for key in EVALUATION_NAMES:
        if key in ("val_loss", "train_eval_loss"):  # the result has them under names of its own
            continue
        _, values = series(lines, key)
        if len(values):
            outcome.setdefault(key, float(values[-1]))
    return outcome


def _name(key: str) -> str:
    if name := RESULT_NAMES.get(key) or EVALUATION_NAMES.get(key):
        return escape(name)
    from gptlab.report.words import metric_name  # loads SciPy, which a page of a run does without

    return escape(metric_name(key))


def _told(key: str, value: Any) -> str:
    """A result, in the unit of its name."""
    if key in ("wall_seconds", "cpu_seconds") and np.isfinite(number(value)):
        return duration(value)
    if key.startswith(("time_per_iter_", "peak_memory_")) and np.isfinite(number(value)):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return _measured(value)


def _results(result: dict[str, Any], lines: list[dict[str, Any]]) -> str:
    outcome = _outcome(result, lines)
    keys = [key for key in RESULT_NAMES if key in outcome] + [key for key in outcome if key not in RESULT_NAMES]
    rows = [(_name(key), _told(key, outcome[key])) for key in keys]
    if best := _best(lines):
        place = keys.index("final_val_loss") + 1 if "final_val_loss" in keys else len(rows)
        rows.insert(place, ("best validation loss", f"{best[0]:.4f} at step {best[1]:,.0f}"))
    return _section("Results", rows)


def _evaluations(lines: list[dict[str, Any]]) -> str:
    rows: dict[float, dict[str, Any]] = {}
    for line in lines:
        measured = {key: line[key] for key in line if key in EVALUATION_NAMES or key.startswith("val_")}
        if measured and np.isfinite(number(line["step"])):
            extra = {"tokens": line["tokens"]} if "tokens" in line else {}
            rows.setdefault(number(line["step"]), {}).update(measured | extra)
    if not rows:
        return ""
    present = dict.fromkeys(key for row in rows.values() for key in row)
    known = ("tokens", *EVALUATION_NAMES)
    columns = [key for key in known if key in present] + [key for key in present if key not in known]
    steps = sorted(rows)
    kept = {steps[i] for i in np.linspace(0, len(steps) - 1, min(MOST_EVALUATIONS, len(steps))).round().astype(int)}
    best = _best(lines)
    if best and best[1] not in kept:  # the best row replaces its nearest neighbour, never an end
        inner = kept - {steps[0], steps[-1]}
        kept = kept - {min(inner, key=lambda step: abs(step - best[1]))} | {best[1]}
    body = []
    for step in sorted(kept):
        row = {k: human(number(value)) if k == "tokens" else _measured(value) for k, value in rows[step].items()}
        name = f"{step:,.0f}" + (" (best)" if best and step == best[1] else "")
        body.append([name, *(row.get(key, "") for key in columns)])
    table = _rows(["step", *(escape(EVALUATION_NAMES.get(key, key)) for key in columns)], body)
    thinned = f"{len(kept)} of {len(steps)} evaluations.\n\n" if len(kept) < len(steps) else ""
    return f"## Evaluations\n\n{thinned}{table}"


def _published(recipe: Recipe, environment: dict[str, Any], result: dict[str, Any], lines: list[dict[str, Any]]) -> str:
    facts = environment.get("data")
    trained_on = facts.get("corpus") if isinstance(facts, dict) else None
    rows = beside_the_known(recipe, str(trained_on or recipe.data.corpus), result, lines)
    return f"## Published results\n\n{_rows(rows[0], rows[1:])}\n\n{DEFINITIONS}" if rows else ""


def _since(run: RunDir, compare: RunDir) -> str:
    here, there = settings_of(run.read_recipe()), settings_of(compare.read_recipe())
    this_name, earlier_name = (escape(name) for name in short_names([run.path, compare.path]))
    rows = [
        (_code(key), show(there[key]), show(here[key]))
        for key in here
        if key not in NOT_SETTINGS and here[key] != there[key]
    ]
    header = ("setting", earlier_name, this_name)
    text = f"## Differences from {earlier_name}\n\n"
    text += _rows(header, rows) if rows else "No setting differs."

    now, then = (_outcome(one.read_json("result.json"), one.read_metrics()) for one in (run, compare))
    changes = []
    for key in dict.fromkeys((*RESULT_NAMES, *EVALUATION_NAMES)):
        new, old = number(now.get(key)), number(then.get(key))
        if np.isfinite(new) and np.isfinite(old):
            sign = "+" if new > old else "-" if new < old else ""
            changes.append((_name(key), _told(key, old), _told(key, new), sign + _told(key, abs(new - old))))
    if changes:
        text += "\n\n" + _rows(("result", earlier_name, this_name, "change"), changes)
    return text


def _provenance(run: RunDir, environment: dict[str, Any]) -> str:
    """What it ran on, and how to repeat it."""
    elsewhere = ("command", "data", "parameters", "non_embedding_parameters", "flops_per_token", "branch_of")
    facts = _facts(environment, HARDWARE, elsewhere)
    text = "## Provenance\n\n" + (f"{_rows(('', ''), facts)}\n\n" if facts else "")
    if isinstance(trunk := environment.get("branch_of"), dict):
        text += (
            f"It branched off {trunk.get('run')} at step {number(trunk.get('step')):,.0f}. The times above are of its "
            f"own steps; the {number(trunk.get('wall_seconds')):,.0f} seconds before are counted there.\n\n"
        )
    folder = run.path if run.path.name not in ("", "..") else run.path.resolve()
    # Another folder, because the run in this one is finished.
    repeat = ["gptlab", "train", str(run.recipe_file), "--out", f"{folder}-again"]
    text += f"To repeat it:\n\n{_fenced(shlex.join(repeat))}"
    command = environment.get("command")
    if isinstance(command, list):
        command = shlex.join(str(part) for part in command)
    if command:
        text += f"\n\nThe command was\n\n{_fenced(str(command))}"
    if places := [where for where in run.read_json("logs.json").values() if isinstance(where, str)]:
        text += "\n\nThe curves are also in\n\n" + "\n\n".join(map(_fenced, places))
    return text
