"""card.md: one run on one page, from its recipe.toml, environment.json, result.json and metrics.jsonl alone.

What those files do not say is left out of the card.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptlab.config import Recipe, settings
from gptlab.report.known import DEFINITIONS, beside_the_known
from gptlab.report.reading import duration, human, number, series, short_names
from gptlab.rundir import RunDir, write_atomically

MOST_EVALUATIONS = 12  # rows of the table: the card is one page

# Settings that say what a run was, even at their defaults; any other is named where it differs from its default.
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
IDENTITY = ("name", "description")  # what a run is called is no setting of it

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
    "float8": "float8",
}
RESULTS = {
    "final_train_loss": "final training loss (nats per token)",
    "final_val_loss": "final validation loss (nats per token)",
    "val_bits_per_byte": "validation bits per byte",
    "val_perplexity": "validation perplexity",
    "tokens_per_second": "tokens per second",
    "samples_per_second": "samples per second",
    "time_per_iter_ms": "time per step (ms)",
    "peak_memory_gb": "peak memory (GB)",
    "wall_seconds": "wall time",
    "cpu_seconds": "CPU time",
}
EVALUATION = {
    "val_loss": "val loss",
    "train_eval_loss": "train loss, same measure",
    "val_bits_per_byte": "bits per byte",
    "val_perplexity": "perplexity",
    "hellaswag_acc": "HellaSwag acc",
    "hellaswag_acc_norm": "HellaSwag acc_norm",
    "hellaswag_harness_acc": "HellaSwag acc (lm-eval's)",
    "hellaswag_harness_acc_norm": "HellaSwag acc_norm (lm-eval's)",
}
TOLD_ELSEWHERE = ("status", "steps", "tokens", "failed_at_step", "reason")


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
        _architecture(recipe, environment, result),
        _settings(recipe),
        _data(recipe, environment, result),
        _table("Hardware and versions", _named(environment, HARDWARE, ("command", "data", "parameters"))),
        _results(result, lines),
        _evaluations(lines),
        _known(recipe, environment, result, lines),
        _differences(run, compare) if compare else "",
        _again(run, environment),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


# -- values as Markdown ---------------------------------------------------------------------------------------------


def escape(text: str) -> str:
    """Text as Markdown shows it letter for letter, on one line, within a table too."""
    return re.sub(r"([\\`*_{}\[\]<>|#~$&!])", r"\\\1", " ".join(text.split()))


def show(value: Any) -> str:
    """A setting or a fact: texts that blanks would be lost from are quoted, other values stand as in TOML."""
    if isinstance(value, str):
        plain = value == " ".join(value.split()) and value
        return escape(value if plain else json.dumps(value, ensure_ascii=False))
    if isinstance(value, float):
        return f"{value:.6g}"
    return escape(json.dumps(value, ensure_ascii=False))


def _measured(value: Any) -> str:
    """A measured number: four decimals for a loss, separators for what is large."""
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


def _table(title: str, rows: list[tuple[str, str]], header: Sequence[str] = ("", "")) -> str:
    return f"## {title}\n\n{_rows(header, rows)}" if rows else ""


def _named(facts: Mapping[str, Any], names: Mapping[str, str], without: Sequence[str] = ()) -> list[tuple[str, str]]:
    """(name, value) of the facts that are known: those with a name of their own first, then the rest by their key."""
    keys = [key for key in names if key in facts] + [key for key in facts if key not in names]
    known = [key for key in keys if key not in without and facts[key] not in (None, "", {}, [])]
    return [(names.get(key) or escape(key), show(facts[key])) for key in known]


def _fenced(command: str) -> str:
    """A block of code whose fence the command cannot close."""
    longest = max((len(run) for run in re.findall("`+", command)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{command}\n{fence}"


# -- the sections ---------------------------------------------------------------------------------------------------


def _head(run: RunDir, recipe: Recipe, result: dict[str, Any], lines: list[dict[str, Any]]) -> str:
    title = f"# Run {escape(run.path.resolve().name)}"
    about = f"Recipe {escape(recipe.name)}, seed {recipe.seed}."
    if recipe.description:
        about += f" {escape(recipe.description)}"
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


def _architecture(recipe: Recipe, environment: dict[str, Any], result: dict[str, Any]) -> str:
    model, defaults = recipe.model, _defaults()
    rows = []
    for key, value in model.model_dump().items():
        if key in ARCHITECTURE or value != defaults[f"model.{key}"]:
            says = show(value)
            if key == "n_head":
                says += f" of width {model.head_size}"
            if key == "vocab_size" and value == 0:
                says = "the tokenizer's"
            if key == "mlp":
                says += f", hidden width {model.mlp_hidden}"
            rows.append((_code(f"model.{key}"), says))
    parameters = result.get("parameters", environment.get("parameters"))
    if isinstance(parameters, int):
        rows.append(("parameters", f"{parameters:,} ({human(parameters)})"))
    elif parameters:
        rows.append(("parameters", show(parameters)))
    return _table("Architecture", rows, ("setting", "value"))


def _defaults() -> dict[str, Any]:
    return {key: field.get_default(call_default_factory=True) for key, field in settings()}


def _flat(recipe: Recipe) -> dict[str, Any]:
    """Every setting by its dotted name."""
    values = {}
    for key, _ in settings():
        value: Any = recipe
        for part in key.split("."):
            value = getattr(value, part)
        values[key] = value
    return values


def _settings(recipe: Recipe) -> str:
    told_elsewhere = (*IDENTITY, "data.corpus", "data.tokenizer", "data.path")
    defaults = _defaults()
    rows = [
        (_code(key), show(value))
        for key, value in _flat(recipe).items()
        if not key.startswith("model.") and key not in told_elsewhere and (key in ESSENTIAL or value != defaults[key])
    ]
    return _table("Settings", rows, ("setting", "value"))


def _data(recipe: Recipe, environment: dict[str, Any], result: dict[str, Any]) -> str:
    facts = environment.get("data")
    facts = dict(facts) if isinstance(facts, dict) else {}
    told = {"corpus": recipe.data.corpus, "tokenizer": recipe.data.tokenizer} if not recipe.data.mixture else {}
    if recipe.data.path:
        told["path"] = recipe.data.path
    facts = {**told, **facts}  # what was trained on, where the environment says it, rather than what was asked for
    rows = []
    for key, value in facts.items():
        if value in (None, "", {}, []):
            continue
        tokens = key.endswith("_tokens") and isinstance(value, int)
        rows.append((escape(key.replace("_", " ")), f"{value:,} ({human(value)})" if tokens else show(value)))
    trained, split = number(result.get("tokens")), number(facts.get("train_tokens"))
    if trained > 0 and split > 0:
        rows.append(("passes over the training split", f"{trained / split:.3g}"))
    return _table("Data", rows)


def _best(lines: list[dict[str, Any]]) -> tuple[float, float] | None:
    """(value, step) of the lowest validation loss."""
    steps, values = series(lines, "val_loss")
    if not np.isfinite(values).any():
        return None
    best = int(np.nanargmin(np.where(np.isfinite(values), values, np.nan)))
    return float(values[best]), float(steps[best])


def _outcome(result: dict[str, Any], lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The result, and from the last evaluation what the result does not repeat."""
    outcome = {key: value for key, value in result.items() if key not in (*TOLD_ELSEWHERE, "parameters")}
    for key in EVALUATION:
        if key in ("val_loss", "train_eval_loss"):  # the result has them under names of its own
            continue
        _, values = series(lines, key)
        if len(values):
            outcome.setdefault(key, float(values[-1]))
    return outcome


def _name(key: str) -> str:
    return escape(RESULTS.get(key) or EVALUATION.get(key) or key)


def _told(key: str, value: Any) -> str:
    """A result in the unit that its name promises."""
    if key in ("wall_seconds", "cpu_seconds") and np.isfinite(number(value)):
        return duration(value)
    if key in ("time_per_iter_ms", "peak_memory_gb") and np.isfinite(number(value)):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return _measured(value)


def _results(result: dict[str, Any], lines: list[dict[str, Any]]) -> str:
    outcome = _outcome(result, lines)
    keys = [key for key in RESULTS if key in outcome] + [key for key in outcome if key not in RESULTS]
    rows = []
    for key in keys:
        rows.append((_name(key), _told(key, outcome[key])))
        if key == "final_val_loss" and (best := _best(lines)):
            rows.append(("best validation loss", f"{best[0]:.4f} at step {best[1]:,.0f}"))
    if "final_val_loss" not in keys and (best := _best(lines)):
        rows.append(("best validation loss", f"{best[0]:.4f} at step {best[1]:,.0f}"))
    return _table("Results", rows)


def _evaluations(lines: list[dict[str, Any]]) -> str:
    rows: dict[float, dict[str, Any]] = {}
    for line in lines:
        measured = {key: line[key] for key in line if key in EVALUATION or key.startswith("val_")}
        if measured and np.isfinite(number(line["step"])):
            extra = {"tokens": line["tokens"]} if "tokens" in line else {}
            rows.setdefault(number(line["step"]), {}).update(measured | extra)
    if not rows:
        return ""
    present = dict.fromkeys(key for row in rows.values() for key in row)
    known = ("tokens", *EVALUATION)
    columns = [key for key in known if key in present] + [key for key in present if key not in known]
    steps = sorted(rows)
    kept = {steps[i] for i in np.linspace(0, len(steps) - 1, min(MOST_EVALUATIONS, len(steps))).round().astype(int)}
    best = _best(lines)
    if best and best[1] not in kept:  # the best row takes the place of its nearest neighbour, never of an end
        inner = kept - {steps[0], steps[-1]}
        kept = kept - {min(inner, key=lambda step: abs(step - best[1]))} | {best[1]}
    body = []
    for step in sorted(kept):
        row = rows[step]
        cells = [f"{step:,.0f}" + (" (best)" if best and step == best[1] else "")]
        for key in columns:
            if key not in row:
                cells.append("")
            elif key == "tokens":
                cells.append(human(number(row[key])))
            else:
                cells.append(_measured(row[key]))
        body.append(cells)
    table = _rows(["step", *(escape(EVALUATION.get(key, key)) for key in columns)], body)
    thinned = f"{len(kept)} of {len(steps)} evaluations.\n\n" if len(kept) < len(steps) else ""
    return f"## Evaluations\n\n{thinned}{table}"


def _known(recipe: Recipe, environment: dict[str, Any], result: dict[str, Any], lines: list[dict[str, Any]]) -> str:
    facts = environment.get("data")
    trained_on = facts.get("corpus") if isinstance(facts, dict) else None
    rows = beside_the_known(recipe, str(trained_on or recipe.data.corpus), result, lines)
    return f"## Beside the known\n\n{_rows(rows[0], rows[1:])}\n\n{DEFINITIONS}" if rows else ""


def _differences(run: RunDir, compare: RunDir) -> str:
    here, there = _flat(run.read_recipe()), _flat(compare.read_recipe())
    this_name, earlier_name = (escape(name) for name in short_names([run.path, compare.path]))
    rows = [
        (_code(key), show(there[key]), show(here[key]))
        for key in here
        if key not in IDENTITY and here[key] != there[key]
    ]
    header = ("setting", earlier_name, this_name)
    text = f"## Differences from {earlier_name}\n\n"
    text += _rows(header, rows) if rows else "No setting differs."

    now, then = (_outcome(one.read_json("result.json"), one.read_metrics()) for one in (run, compare))
    changes = []
    for key in dict.fromkeys((*RESULTS, *EVALUATION)):
        new, old = number(now.get(key)), number(then.get(key))
        if np.isfinite(new) and np.isfinite(old):
            sign = "+" if new > old else "-" if new < old else ""
            changes.append((_name(key), _told(key, old), _told(key, new), sign + _told(key, abs(new - old))))
    if changes:
        text += "\n\n" + _rows(("result", earlier_name, this_name, "change"), changes)
    return text


def _again(run: RunDir, environment: dict[str, Any]) -> str:
    folder = run.path if run.path.name not in ("", "..") else run.path.resolve()
    # Its own folder would only answer that the run is finished.
    repeat = ["gptlab", "train", str(run.recipe_file), "--out", f"{folder}-again"]
    text = f"## Repeat\n\n{_fenced(shlex.join(repeat))}"
    command = environment.get("command")
    if isinstance(command, list):
        command = shlex.join(str(part) for part in command)
    if command:
        text += f"\n\nIt was started as\n\n{_fenced(str(command))}"
    return text
