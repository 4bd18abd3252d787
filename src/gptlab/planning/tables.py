"""Plans as tables for a terminal."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from gptlab.hardware import GB
from gptlab.planning.plan import Plan
from gptlab.planning.study import StudyPlan

KINDS = ("weights", "gradients", "optimizer", "masks", "activations", "head", "gathered")


NARROW = 120  # columns; a narrower table of several plans leaves out the memory by kind


def headline(verdict: str) -> Text:
    """A verdict, coloured by its first words."""
    style = "red" if verdict.startswith("does not fit") else "yellow" if verdict.startswith("may not") else "green"
    head, colon, rest = verdict.partition(":")
    return Text.assemble((head + colon, f"bold {style}"), rest)


def plan_table(plan: Plan) -> Group:
    """The verdict, memory by kind, and the other facts of a plan."""
    m, several = plan.memory, plan.processes > 1
    title = f"{plan.name} on {plan.device}, micro-batch {plan.micro_batch}"
    if several:
        title = f"{plan.name} on {plan.processes} x {plan.device}, micro-batch {plan.micro_batch} per GPU"
    kinds = Table()
    kinds.add_column("memory per GPU" if several else "memory")
    kinds.add_column("GB", justify="right")
    for kind in KINDS:
        if getattr(m, kind):
            kinds.add_row(kind, _gb(getattr(m, kind)))
    kinds.add_section()
    kinds.add_row(f"peak, {m.moment}", _gb(m.peak))
    kinds.add_row("available", _gb(plan.available))

    facts = Table(show_header=False)
    facts.add_column()
    facts.add_column(justify="right")
    rate = "measured" if plan.measured else f"at MFU {plan.mfu:g}"
    for name, value in (
        ("parameters", f"{plan.parameters:,}"),
        ("training FLOPs per token", f"{plan.flops_per_token:,}"),
        ("largest micro-batch that fits", f"{plan.largest_micro_batch:,} sequences"),
        ("micro-batches per step" + (" and GPU" if several else ""), f"{plan.micro_batches:,}"),
        ("steps", _known(plan.steps, ",.0f")),
        ("training tokens", _known(plan.tokens, ",.0f")),
        (f"tokens per second, {rate}", _known(plan.tokens_per_second, ",.0f")),
        ("hours, with evaluations of the held-out loss", _known(plan.hours, ",.2f")),
        *([("GPU hours", _known(plan.device_hours, ",.2f"))] if several else []),
        *([("cost", _known(plan.cost, ",.2f"))] if plan.cost is not None else []),
        ("host memory" + (" per process" if several else ""), f"{_gb(plan.host)} GB"),
        *([("host memory, all processes", f"{_gb(plan.host * plan.processes)} GB")] if several else []),
        ("host memory for copies of a checkpoint, if free", f"{_gb(plan.copies)} GB"),
        ("disk, dataset", "unknown" if plan.data is None else f"{_gb(plan.data)} GB"),
        ("disk, one checkpoint", f"{_gb(plan.checkpoint)} GB"),
        ("disk, all checkpoints", f"{_gb(plan.checkpoints)} GB"),
    ):
        facts.add_row(name, value)
    return Group(headline(plan.verdict), Text(title), kinds, facts, *map(Text, plan.notes))


def sweep_table(plans: dict[str, Plan], first: str, width: int) -> Group:
    """Plans of a recipe in several sizes: which fit, and the table."""
    groups = {"fits": "yes", "may not fit": "perhaps", "does not fit": "no"}
    found = {says: [name for name, plan in plans.items() if _fits(plan) == answer] for says, answer in groups.items()}
    verdict = "; ".join(f"{says}: {', '.join(names)}" for says, names in found.items() if names)
    return Group(headline(verdict), plans_table(plans, first, width))


def plans_table(plans: dict[str, Plan], first: str, width: int) -> Table:
    """Several plans, one per row; those that do not fit are marked.

    Args:
        plans: by the text of the first column.
        first: heading of the first column.
        width: columns of the terminal.
    """
    kinds = ("weights", "gradients", "optimizer", "activations", "head") if width >= NARROW else ()
    table = Table()
    table.add_column(first)
    table.add_column("fits")
    for head in ("parameters", "micro-batch", *kinds, "peak GB", "largest", "host GB", "hours"):
        table.add_column(head, justify="right")
    for name, plan in plans.items():
        millions = plan.parameters / 1e6
        table.add_row(
            name,
            _fits(plan),
            f"{millions:,.0f}M" if millions >= 10 else f"{millions:.3g}M",
            str(plan.micro_batch),
            *(_gb(getattr(plan.memory, kind)) for kind in kinds),
            _gb(plan.memory.peak),
            str(plan.largest_micro_batch),
            f"{plan.host / GB:.1f}",
            _known(plan.hours, ",.2f"),
            style="red" if plan.refused else None,
        )
    return table


def study_plan_table(plan: StudyPlan, width: int) -> Group:
    """The verdict on a study, its arms, and what is wrong with those that do not fit."""
    disk = f"checkpoints {_gb(plan.checkpoints)} GB"
    tight = [f"{arm} {p.sentence}" for arm, p in plan.arms.items() if p.memory.peak > p.available]
    notes = dict.fromkeys(note for p in plan.arms.values() for note in p.notes)
    table = plans_table(plan.arms, f"{plan.name}: arm", width)
    return Group(headline(plan.verdict), table, *map(Text, [disk, *notes, *tight]))


def _fits(plan: Plan) -> str:
    return "no" if plan.refused else "perhaps" if plan.memory.peak > plan.available else "yes"


def _gb(size: float) -> str:
    return f"{size / GB:,.2f}" if size >= 0.1 * GB or not size else f"{size / GB:.2g}"


def _known(value: float | None, form: str) -> str:
    return "unknown" if value is None else format(value, form)
