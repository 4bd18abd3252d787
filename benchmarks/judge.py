"""How often the judge of a report errs, and what it finds: rule, world, stated error, simulated error, power.

    python benchmarks/judge.py rules [--draws 20000] [--only looks]     each rule on arrays of simulated studies
    python benchmarks/judge.py reports [--reports 200]                  whole reports, from run directories
    python benchmarks/judge.py track3 track3_given.csv.gz               real runs, subsampled

The tables are Markdown on stdout: first the worst world of each rule, then every world. `!` marks an error that exceeds
the stated one by four standard errors; the exit status is then 1. Power is that of the first world, and its range.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
from common import machine, say, write_json
from judging import diverging, factorial, looking, reports, rules, targets, track3
from judging.rules import Row
from numpy.random import Generator

from gptlab.machine import cores

RULES: dict[str, Callable[[int, Generator], Iterator[Row]]] = {
    "baseline": rules.against_baseline,
    "grids": rules.best_of_grids,
    "equivalence": rules.equivalence,
    "flips": rules.flips,
    "looks": looking.looks,
    "factors": factorial.factors,
    "targets": targets.targets,
    "divergence": diverging.divergence,
    "frontiers": diverging.two_frontiers,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    every = argparse.ArgumentParser(add_help=False)
    every.add_argument("--json", type=Path, metavar="FILE")
    every.add_argument("--seed", type=int, default=0, help="of the simulation")
    each = commands.add_parser("rules", parents=[every], help="each rule on arrays of simulated studies")
    each.add_argument("--draws", type=int, default=20_000, help="studies in each world")
    each.add_argument("--only", choices=RULES, help="one rule")
    whole = commands.add_parser("reports", parents=[every], help="whole reports, from run directories")
    whole.add_argument("--reports", type=int, default=200, help="in each world")
    real = commands.add_parser("track3", parents=[every], help="real runs, subsampled")
    real.add_argument("file", type=Path, help="configuration,run,step,val_loss; may be gzipped")
    real.add_argument("--draws", type=int, default=5000, help="studies of 3 and of 5 runs")
    args = parser.parse_args()

    before, began = machine(), time.perf_counter()
    cells: Sequence[Row] | Sequence[track3.Cell]
    if args.command == "rules":
        cells = play(args.draws, args.seed, [args.only] if args.only else list(RULES))
    elif args.command == "reports":
        cells = list(reports.play(args.reports, args.seed))
    else:
        cells = list(track3.play(args.file, args.draws, args.seed))
    broken = [cell for cell in cells if not cell.holds]
    write_json(args.json, {"machine": before, "cells": [asdict(cell) for cell in cells]})
    for lines in tables(cells):
        print("\n".join("| " + " | ".join(line) + " |" for line in lines), end="\n\n")
    say(f"{len(cells)} cells in {time.perf_counter() - began:.0f} s; {len(broken)} above the stated error")
    sys.exit(bool(broken))


def play(draws: int, seed: int, names: Sequence[str]) -> list[Row]:
    """The rows of the named rules, spread over the cores. A rule's draws do not depend on which others are played."""
    if len(names) == 1:
        return play_one(names[0], draws, seed)
    with ProcessPoolExecutor(cores()) as pool:
        running = [pool.submit(play_one, name, draws, seed) for name in names]
        return [row for one in running for row in one.result()]


def play_one(name: str, draws: int, seed: int) -> list[Row]:
    began = time.perf_counter()
    rows = list(RULES[name](draws, np.random.default_rng([seed, zlib.crc32(name.encode())])))
    say(f"{name}: {time.perf_counter() - began:.1f} s")
    return rows


# -- tables, as lists of lines ----------------------------------------------------------------------------------------

Table = list[list[str]]


def tables(cells: Sequence[Row] | Sequence[track3.Cell]) -> Iterator[Table]:
    rows = [cell for cell in cells if isinstance(cell, Row)]
    if rows:
        yield worst_cases(rows)
    for rule in dict.fromkeys(row.rule for row in rows):
        yield every_world([row for row in rows if row.rule == rule])
    if real := [cell for cell in cells if isinstance(cell, track3.Cell)]:
        yield real_runs(real)


def worst_cases(rows: Sequence[Row]) -> Table:
    """A line for each variant of a rule, size and number of seeds: the world in which it errs most."""
    groups: dict[tuple[str, str, str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.rule, row.variant, row.size, row.seeds), []).append(row)
    lines = [["rule", "variant", "of", "seeds", "worlds", "stated error", "largest error", "in", "effect", "power"]]
    lines.append(["---"] * len(lines[0]))
    for (rule, variant, size, seeds), cells in groups.items():
        worst = max(cells, key=lambda row: row.error)
        powers = [row.power for row in cells if not math.isnan(row.power)]
        power = f"{powers[0]:.0%} ({min(powers):.0%} to {max(powers):.0%})" if powers else ""
        error = f"{show_error(worst)} \u00b1 {worst.se:.1%}"
        line = [rule, variant, size, f"{seeds}", f"{len(cells)}", share(worst.stated), error, worst.world]
        lines.append([*line, worst.effect, power])
    return lines


def every_world(rows: Sequence[Row]) -> Table:
    """A table of one rule: a line for each world, size and number of seeds; a column for each variant."""
    variants = list(dict.fromkeys(row.variant for row in rows))
    cells: dict[tuple[str, str, int], dict[str, Row]] = {}
    for row in rows:
        cells.setdefault((row.world, row.size, row.seeds), {})[row.variant] = row
    heading = ["rule", "world", "of", "seeds", *(f"error: {name}" for name in variants), "effect"]
    heading += [f"power: {name}" for name in variants]
    lines = [heading, ["---"] * len(heading)]
    for (world, size, seeds), found in cells.items():
        errors = [show_error(found[name]) if name in found else "" for name in variants]
        powers = ["" if name not in found else share(found[name].power) for name in variants]
        some = next(iter(found.values()))
        lines.append([some.rule, world, size, f"{seeds}", *errors, some.effect, *powers])
    return lines


def real_runs(cells: Sequence[track3.Cell]) -> Table:
    heading = ["losses", "margin", "runs of each", "rule", "better or worse", "equivalent", "some opposite sign"]
    heading += ["equivalent though different", "different though equivalent", "a finding where none is"]
    lines = [heading, ["---"] * len(heading)]
    for c in cells:
        shares = (c.differ, c.equivalent, c.opposite, c.equal_in_error, c.found_in_error, c.null)
        lines.append([c.losses, f"{c.margin:g}", c.runs, c.rule, *map(share, shares)])
    return lines


def show_error(row: Row) -> str:
    return share(row.error) + ("" if row.holds else " !")


def share(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.1%}" if value else "0"


if __name__ == "__main__":
    main()
