"""An automated researcher that cannot fool itself: it edits a recipe, one change at a time, and keeps what holds.

    python examples/researcher.py smoke-lm --out runs/session --edit optim.lr=0.01 --edit model.mlp=swiglu
    python examples/researcher.py smoke-lm --out runs/session --propose './my-agent'
    python examples/researcher.py --simulate 1000

Each edit is trained with a few search seeds beside the recipe as it is. What looks better there, by a lenient rule,
is trained with held-out seeds, which no choice has seen: every confirmation takes new ones. Only the judge's verdict on
these accepts an edit, and the recipe goes on from there.

The budget of edits is fixed before the first one. A confirmation may err with 5% / budget, so the chance that a session
accepts any edit that changes nothing, or harms, is at most 5%, whatever proposes the edits and however it reacts. With
the defaults (20 edits, 4 search seeds, 12 held-out seeds) a gain of two standard deviations of a run between seeds is
found in 85%; an edit without a gain costs 9 runs on average, one with a gain 28. `--simulate` shows both.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import gptlab
from gptlab.config import Recipe, load_recipe, parse_flag
from gptlab.errors import ConfigError, UserError
from gptlab.report.verdicts import Runs, contrast, judge

ALPHA = 0.05  # chance that a session accepts any edit without a gain
SCREEN = 0.2  # one-sided p on the search seeds below which an edit is worth held-out seeds
FIRST_HELD_OUT = 1000  # search seeds are 0, 1, ...

Values = dict[int, float]  # by seed; NaN of a run that did not complete


@dataclass(frozen=True)
class Plan:
    """What is fixed before a session begins."""

    budget: int = 20
    """Edits that may be tried."""
    search: int = 4
    """Seeds that an edit is first tried with, the same for all."""
    held_out: int = 12
    """New seeds of each confirmation."""
    better: str = "lower"

    @property
    def level(self) -> float:
        """One-sided p that a confirmation asks for."""
        return ALPHA / self.budget


def p_better(edit: Values, base: Values, better: str) -> float:
    """The judge's p that the edit is no better, one-sided; 1 where a run of either did not complete.

    The judge compares the seeds that both have. Seeds in which an edit failed would be lost in silence, and those that
    are left are no fair sample, so all must complete.
    """
    if not np.isfinite([*edit.values(), *base.values()]).all():
        return 1.0
    judged = judge({"edit": contrast(Runs(edit), Runs(base), "lower" if better == "lower" else "higher", 0.0)})["edit"]
    d = judged.contrast.difference
    if not np.isfinite(d.p):  # without a spread between seeds nothing can be said
        return 1.0
    return d.p / 2 if (d.mean < 0) == (better == "lower") else 1 - d.p / 2


def base_after(rows: Sequence[Mapping[str, Any]]) -> str:
    """The label of the recipe that the next edit begins with."""
    return next((row["label"] for row in reversed(rows) if row["accepted"]), "base")


def session(
    plan: Plan, changes: Iterator[str], lab: "Lab | Draws", done: Sequence[Any] = ()
) -> Iterator[dict[str, Any]]:
    """Try edits one after another; yields what was found of each.

    Args:
        changes: asked for the next one when the last one is decided, so that it may depend on all before.
        lab: what trains, or draws.
        done: what earlier calls yielded, to go on from.
    """
    found = list(done)
    for number in range(len(found) + 1, plan.budget + 1):
        if (change := next(changes, None)) is None:
            return
        label, base, p_held_out, fresh = f"edit-{number:02}", base_after(found), None, list[int]()
        row: dict[str, Any] = {"label": label, "change": change, "base": base, "p_search": None, "p_held_out": None}
        try:
            lab.add(label, change, base)
        except ConfigError as error:  # it is one of the budget, so that a session has an end
            found.append(row | {"seeds": [], "accepted": False, "why": str(error)})
            yield found[-1]
            continue
        seeds = range(plan.search)
        p_search = p_better(lab.measure(label, seeds), lab.measure(base, seeds), plan.better)
        if p_search < SCREEN:
            used = sum(len(row["seeds"]) for row in found)
            fresh = list(range(FIRST_HELD_OUT + used, FIRST_HELD_OUT + used + plan.held_out))
            p_held_out = p_better(lab.measure(label, fresh), lab.measure(base, fresh), plan.better)
        accepted = p_held_out is not None and p_held_out < plan.level
        row |= {"p_search": p_search, "p_held_out": p_held_out}
        found.append(row | {"seeds": fresh, "accepted": accepted, "why": ""})
        yield found[-1]


# -- in earnest -----------------------------------------------------------------------------------------------------


class Lab:
    """A session's folder: session.json with the plan, session.jsonl with a line for each edit, and the runs.

    The runs are runs/<label>_seed<k>, which `gptlab judge` reads. A session that was stopped goes on.
    """

    def __init__(self, folder: Path, recipe: str, metric: str, plan: Plan) -> None:
        self.folder, self.metric, self.log = folder, metric, folder / "session.jsonl"
        self.recipe = load_recipe(recipe)
        self.recipes: dict[str, Recipe] = {"base": self.recipe}
        fixed = {"recipe": recipe, "metric": metric, **asdict(plan)}
        folder.mkdir(parents=True, exist_ok=True)
        kept = folder / "session.json"
        if not kept.exists():
            kept.write_text(json.dumps(fixed, indent=2) + "\n", encoding="utf-8")
        if (before := json.loads(kept.read_text(encoding="utf-8"))) != fixed:
            differ = ", ".join(f"{key} ({before.get(key)} then)" for key in fixed if before.get(key) != fixed[key])
            raise UserError(f"{folder} was begun with another plan: {differ}; --out names another folder")
        lines = self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []
        self.done = [json.loads(line) for line in lines]
        for row in self.done:
            if not row["why"]:
                self.add(row["label"], row["change"], row["base"])

    def add(self, label: str, change: str, base: str) -> None:
        """A recipe: the base with a change such as `optim.lr=0.01`, or several with spaces between."""
        pairs = [part.partition("=") for part in shlex.split(change)]
        if not pairs or not all(name and equals for name, equals, _ in pairs):
            raise UserError(f"{change!r} is no change: write it as optim.lr=0.01")
        self.recipes[label] = self.recipes[base].replace({name: parse_flag(name, value) for name, _, value in pairs})

    def measure(self, label: str, seeds: Sequence[int]) -> Values:
        values = {}
        for seed in seeds:
            result = gptlab.train(
                self.recipes[label], out=self.folder / f"runs/{label}_seed{seed}", seed=seed, quiet=True
            )
            if result.status == "interrupted":
                raise KeyboardInterrupt
            value = result.to_json().get(self.metric) if result.status == "completed" else None
            values[seed] = float("nan") if value is None else float(value)
            if value is None and label == "base":
                raise UserError(f"{label} seed {seed} {result.status} without a {self.metric}: mend the recipe first")
        return values

    def run(self, plan: Plan, changes: Iterator[str]) -> None:
        """A session to its end, with a line for each edit as it is decided."""
        for row in session(plan, changes, self, tuple(self.done)):
            self.done.append(row)
            with open(self.log, "a", encoding="utf-8") as log:
                log.write(json.dumps(row) + "\n")
            says = row["why"] or f"p on search seeds {row['p_search']:.2g}"
            says += "" if row["p_held_out"] is None else f", on held-out seeds {row['p_held_out']:.2g}"
            print(f"{row['label']} {row['change']}: {'accepted' if row['accepted'] else 'not accepted'}; {says}")
        best = self.folder / "best.toml"
        best.write_text(self.recipes[base_after(self.done)].to_toml(), encoding="utf-8")
        print(f"{len(self.done)} of {plan.budget} edits tried; the recipe after them is {best}")
        print(f"accepted is p < {plan.level:.2g} on held-out seeds: a session errs in at most {ALPHA:.0%}")


def proposals(command: str, log: Path) -> Iterator[str]:
    """Changes from a command that reads session.jsonl and prints the next one; nothing ends the session."""
    while True:
        so_far = log.read_text(encoding="utf-8") if log.exists() else ""
        try:
            done = subprocess.run(shlex.split(command), input=so_far, stdout=subprocess.PIPE, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(f"--propose {command}: {error}") from None
        if not done.stdout.strip():
            return
        yield done.stdout.strip().splitlines()[0]


# -- simulated ------------------------------------------------------------------------------------------------------


class Draws:
    """Draws in the place of trainings; the change `gain=2` is worth two standard deviations of a run between seeds.

    What two runs of one seed have in common, which would make all of it easier, is nothing.
    """

    def __init__(self, plan: Plan, seed: int) -> None:
        self.sign, self.rng = -1 if plan.better == "lower" else 1, np.random.default_rng(seed)
        self.means, self.runs = {"base": 0.0}, dict[tuple[str, int], float]()

    def add(self, label: str, change: str, base: str) -> None:
        self.means[label] = self.means[base] + self.sign * float(change.partition("=")[2])

    def measure(self, label: str, seeds: Sequence[int]) -> Values:
        for seed in seeds:
            if (label, seed) not in self.runs:
                self.runs[label, seed] = self.means[label] + self.rng.normal()
        return {seed: self.runs[label, seed] for seed in seeds}


def simulated(plan: Plan, sessions: int, gain: float = 2.0, every: int = 5, seed: int = 0) -> dict[str, float]:
    """Many sessions in which each `every`-th edit has a gain and the others change nothing."""
    gains = [gain if every and i % every == every - 1 else 0.0 for i in range(plan.budget)]
    accepted, runs = np.zeros((sessions, plan.budget), dtype=bool), 0
    for k in range(sessions):
        draws = Draws(plan, seed + k)
        accepted[k] = [row["accepted"] for row in session(plan, iter([f"gain={gain}" for gain in gains]), draws)]
        runs += len(draws.runs)
    real = np.array(gains) > 0
    return {
        "null_accepted": float(accepted[:, ~real].mean()),
        "sessions_with_a_false_one": float(accepted[:, ~real].any(axis=1).mean()),
        "gains_found": float(accepted[:, real].mean()) if real.any() else float("nan"),
        "runs_per_session": runs / sessions,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("recipe", nargs="?", help="a recipe to begin with: a shipped name, or a TOML file")
    parser.add_argument("--out", type=Path, default=Path("runs/researcher"), metavar="DIR", help="the session's folder")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--edit", action="append", metavar="KEY=VALUE", help="a change to try; may be given many times")
    which.add_argument("--propose", metavar="COMMAND", help="reads the edits so far and prints the next change")
    which.add_argument("--simulate", type=int, metavar="SESSIONS", help="draw in the place of training")
    parser.add_argument("--metric", default="final_val_loss", metavar="KEY", help="of result.json")
    parser.add_argument("--better", choices=["lower", "higher"], default="lower")
    for name, value in asdict(Plan()).items():
        if isinstance(value, int):
            parser.add_argument(
                f"--{name.replace('_', '-')}", type=int, default=value, metavar="N", help=f"default: {value}"
            )
    options = parser.parse_args(arguments)
    plan = Plan(options.budget, options.search, options.held_out, options.better)
    try:
        if min(plan.budget, plan.search - 1, plan.held_out - 1) < 1:
            raise UserError("--budget must be at least 1, --search and --held-out at least 2")
        if options.simulate:
            for name, value in simulated(plan, options.simulate).items():
                print(f"{name.replace('_', ' '):28} {value:.4g}")
            return 0
        if not options.recipe or not (options.edit or options.propose):
            raise UserError("name a recipe, and changes by --edit KEY=VALUE or --propose COMMAND; or --simulate N")
        lab = Lab(options.out, options.recipe, options.metric, plan)
        if options.edit and (before := [row["change"] for row in lab.done]) != options.edit[: len(before)]:
            raise UserError(f"{options.out} has tried {', '.join(before)}: give these first, and new edits after them")
        changes = iter(options.edit[len(lab.done) :]) if options.edit else proposals(options.propose, lab.log)
        lab.run(plan, changes)
    except UserError as error:
        print(f"researcher: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
