"""The coordinate check: how the change of each activation in some steps depends on a model's width or depth.

Under muP the root mean square of every activation's change is the same at all widths, under CompleteP also at all
depths, so log size over log width has the slope 0 (Yang et al. 2022, arXiv 2203.03466, appendix D.1). In the standard
parametrization hidden layers and logits change more in wider models, by a power of the width.

Models of several sizes take the same steps on one sequence of random ids. It is short: the rule is for models that are
wide beside the number of tokens, and the updates of many unrelated tokens add up as noise does, by the root of the
width. For the same reason logits are those of ids in the sequence; the others' rows of the head are hardly trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from gptlab.config import Model, Recipe, build_recipe, read_layer
from gptlab.errors import ConfigError
from gptlab.model.gpt import GPT, build_model
from gptlab.model.parametrization import logit_multiplier
from gptlab.optim.optimizers import make_optimizer, set_lr
from gptlab.optim.schedule import learning_rate
from gptlab.planning.resolve import resolve_recipe
from gptlab.progress import tell_nobody
from gptlab.report.drawing import PALETTE, draw_line, legend_below, style_axes
from gptlab.seeding import address
from gptlab.training.setup import pick_device

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTHS = (64, 128, 256, 512)
TOKENS = 8  # of the sequence
FLAT = 0.1  # largest |slope| of a flat line


def bench_coords(
    name: str,
    overrides: Mapping[str, Any] | None = None,
    sizes: Sequence[int] = WIDTHS,
    depth: bool = False,
    steps: int = 5,
    parametrizations: Sequence[str] | None = None,
    seeds: int = 3,
    progress: Callable[[str], None] = tell_nobody,
) -> dict[str, Any]:
    """Check how activations change with the width, in float32, at the learning rate of the recipe.

    The size of heads stays, and the ratio of the MLP's width to the model's.

    Args:
        name: a recipe's name or path; its data is not needed.
        overrides: dotted settings.
        sizes: values of n_embd, or of n_layer.
        depth: whether the sizes are numbers of layers.
        steps: optimizer steps.
        parametrizations: to compare; default: standard, and the recipe's or mup.
        seeds: logarithms are averaged over as many initialisations and sequences.
        progress: called with a message before each model.

    Returns:
        The report, ready for JSON: facts, "rows" with one entry per parametrization and activation, and "flat": by
        parametrization, whether no slope of a change exceeds `FLAT`.

    Raises:
        UserError: something that cannot be measured here; it says why.
    """
    recipe = build_recipe(read_layer(name), overrides or {})
    if recipe.task != "lm":
        raise ConfigError(f"bench coords: works only with task = lm, not {recipe.task}")
    if len(set(sizes)) < 2 or min(sizes) < 1:
        raise ConfigError(f"{'--depths' if depth else '--widths'} {' '.join(map(str, sizes))}: give two sizes at least")
    for flag, value in (("--steps", steps), ("--seeds", seeds)):
        if value < 1:
            raise ConfigError(f"{flag} {value}: must be at least 1")
    if not parametrizations:
        own = recipe.model.parametrization
        parametrizations = "standard", "mup" if own == "standard" else own
    device = pick_device(recipe.train.device)
    resolved = resolve_recipe(recipe, device.type)
    recipe, shape = resolved.recipe, resolved.shape.model
    rows = []
    for parametrization in parametrizations:
        sized = [resized(recipe, shape, size, depth, parametrization) for size in sizes]
        found = []
        for one in sized:
            progress(f"{parametrization}: {one.model.n_layer} layers of {one.model.n_embd}")
            found.append([activation_sizes(one, steps, seed, device) for seed in range(seeds)])
        for activation in found[0][0]:
            pairs = np.array([[each[activation] for each in of_size] for of_size in found])  # (sizes, seeds, 2)
            with np.errstate(divide="ignore", invalid="ignore"):  # what never changes has no slope
                logs = np.log(pairs).mean(axis=1)  # (sizes, 2)
                slopes = np.polyfit(np.log(sizes), logs, 1)[0] if np.isfinite(logs).all() else [math.nan, math.nan]
            row: dict[str, Any] = {"parametrization": parametrization, "activation": activation}
            row |= {"change": np.exp(logs[:, 0]).tolist(), "change_slope": float(slopes[0])}
            row |= {"size": np.exp(logs[:, 1]).tolist(), "size_slope": float(slopes[1])}
            rows.append(row)
    return {
        "recipe": recipe.name,
        "optimizer": recipe.optim.name,
        "over": "n_layer" if depth else "n_embd",
        "sizes": list(sizes),
        "steps": steps,
        "seeds": seeds,
        "rows": rows,
        "flat": {
            of: all(abs(row["change_slope"]) <= FLAT for row in rows if row["parametrization"] == of)
            for of in parametrizations
        },
    }


def resized(recipe: Recipe, shape: Model, size: int, depth: bool, parametrization: str) -> Recipe:
    """The recipe at another width or depth. Raises ConfigError for a width that heads of this size cannot have."""
    if depth:
        changed: dict[str, Any] = {"n_layer": size}
    elif size % shape.head_size:
        raise ConfigError(
            f"--widths {size}: must be a multiple of the head size, model.n_embd / n_head = {shape.head_size}"
        )
    else:
        width = shape.mlp_width * size // shape.n_embd
        changed = {"n_embd": size, "n_head": size // shape.head_size, "mlp_width": width}
    changed |= {"parametrization": parametrization, "dropout": 0.0, "document_attention": False}
    return recipe.replace({"model": {**shape.model_dump(), **changed}})


def activation_sizes(recipe: Recipe, steps: int, seed: int, device: torch.device) -> dict[str, tuple[float, float]]:
    """Root mean square of each activation's change in some steps, and of the activation after them.

    Args:
        recipe: with model.vocab_size resolved.
        seed: of the initial weights and the ids.
    """
    config, optim = recipe.model, recipe.optim
    model = build_model(config, device, init=seed)
    optimizer = make_optimizer(model, optim, seed, shape=config)
    draw = torch.Generator().manual_seed(address(seed, "coordinate check"))
    ids = torch.randint(config.vocab_size, (1, min(TOKENS, config.block_size) + 1), generator=draw).to(device)
    x, y = ids[:, :-1], ids[:, 1:]
    before = activations(model, x, y)
    for step in range(steps):
        set_lr(optimizer, learning_rate(step, optim.lr, recipe.schedule))
        (model(x, y) / y.numel()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()
    after = activations(model, x, y)
    return {
        kind: (_rms([new - old for new, old in zip(after[kind], before[kind], strict=True)]), _rms(after[kind]))
        for kind in after
    }


@torch.no_grad()
def activations(model: GPT, x: Tensor, y: Tensor) -> dict[str, list[Tensor]]:
    """Activations of the ids x (1, T): for each kind one tensor, or one per block; logits of the ids y alone."""
    kinds = {
        "embedding": ["wte"],
        "queries, keys, values": [f"h.{i}.attn.c_attn" for i in range(len(model.h))],
        "attention": [f"h.{i}.attn" for i in range(len(model.h))],
        "inside the MLP": [f"h.{i}.mlp.c_fc" for i in range(len(model.h))],
        "MLP": [f"h.{i}.mlp" for i in range(len(model.h))],
        "residual stream, last": [f"h.{len(model.h) - 1}"],
        "final norm": ["ln_f"],
    }
    found: dict[str, list[Tensor]] = {kind: [] for kind in kinds}

    def keep(kind: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, given, out: found[kind].append(out)

    hooks = [
        model.get_submodule(path).register_forward_hook(keep(kind)) for kind, paths in kinds.items() for path in paths
    ]
    logits = model(x)  # (1, T, V)
    for hook in hooks:
        hook.remove()
    found["final norm"] = [out / logit_multiplier(model.config) for out in found["final norm"]]
    return {**found, "logits": [logits[..., y.unique()]]}


def _rms(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(t.double().square().mean().item() for t in tensors) / len(tensors))


# -- as text and as a picture ---------------------------------------------------------------------------------------


def render(report: Mapping[str, Any]) -> Group:
    """The report for a terminal: a table for each parametrization, and a sentence on each."""
    shown: list[Any] = []
    for of, flat in report["flat"].items():
        table = Table(title=of, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("rms change")
        for size in report["sizes"]:
            table.add_column(f"{size:,}", justify="right")
        table.add_column("slope", justify="right")
        rows = [row for row in report["rows"] if row["parametrization"] == of]
        for row in rows:
            table.add_row(
                row["activation"], *(f"{value:.3g}" for value in row["change"]), f"{row['change_slope']:+.3f}"
            )
        shown += [table, Text(sentence(report, of, flat, rows), overflow="fold"), Text()]
    about = (
        f"{report['recipe']}, {report['optimizer']}: {report['steps']} steps, {report['seeds']} seeds; slope of "
        f"log change over log {report['over']}, flat up to {FLAT}"
    )
    return Group(*shown, Text(about, overflow="fold"))


def sentence(report: Mapping[str, Any], of: str, flat: bool, rows: Sequence[Mapping[str, Any]]) -> str:
    """Whether a parametrization is flat, and what is steepest."""
    worst = max(rows, key=lambda row: math.inf if math.isnan(row["change_slope"]) else abs(row["change_slope"]))
    verdict = "flat" if flat else "not flat"
    return (
        f"{of} is {verdict} over {report['over']}: the steepest is {worst['activation']}, {worst['change_slope']:+.3f}"
    )


def figure(report: Mapping[str, Any]) -> Figure:
    """Change of each activation over the size, both logarithmic; one panel for each parametrization."""
    from matplotlib.figure import Figure

    drawn, sizes = Figure(figsize=(4.6 * len(report["flat"]), 5), layout="constrained"), np.array(report["sizes"])
    panels = drawn.subplots(1, len(report["flat"]), sharey=True, squeeze=False)[0]
    for axes, (of, flat) in zip(panels, report["flat"].items(), strict=True):
        rows = [row for row in report["rows"] if row["parametrization"] == of]
        axes.set(xscale="log", yscale="log")
        style_axes(axes, report["over"], f"rms change in {report['steps']} steps" if axes is panels[0] else "")
        axes.set_title(f"{of}: {'flat' if flat else 'not flat'}", loc="left", fontsize=11, fontweight="bold")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes], minor=False)
        axes.set_xticks([], minor=True)
        for i, row in enumerate(rows):
            color, dash = PALETTE[i % len(PALETTE)], "-" if i < len(PALETTE) else "--"
            draw_line(axes, sizes, np.array(row["change"]), color, dash, label=row["activation"])
    legend_below(drawn, panels[0].get_legend_handles_labels()[0], 4, "")
    return drawn


def write_figure(report: Mapping[str, Any], folder: Path) -> Path:
    """Write coords.png; the folder is created if it is needed."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "coords.png"
    figure(report).savefig(file, dpi=120)
    return file
