"""Start-up time of commands that do not train, and a check that they do not import torch.

Each command is a new process; the commands take turns. `python -c pass` is the lower bound, and `import torch` shows
the cost of an unnecessary import. The check reads the output of `python -X importtime`.

    python benchmarks/startup.py --rounds 10
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

from common import machine, say, show, spread, table, write_json

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import gptlab": ["-c", "import gptlab"],
    "gptlab --help": ["-m", "gptlab", "--help"],
    "gptlab train --help": ["-m", "gptlab", "train", "--help"],
    "gptlab recipes": ["-m", "gptlab", "recipes"],
    "import torch": ["-c", "import torch"],
    "import the training loop": ["-c", "import gptlab.training.loop"],
}
LIGHT = ("import gptlab", "gptlab --help", "gptlab train --help", "gptlab recipes")  # must not import HEAVY modules
HEAVY = ("torch", "transformers", "matplotlib", "numpy", "rich")


def imported(command: list[str]) -> dict[str, float]:
    """The modules that a command imports, with the milliseconds of each module alone."""
    done = subprocess.run([sys.executable, "-X", "importtime", *command], capture_output=True, text=True, check=True)
    lines = re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", done.stderr)
    return {name: int(own) / 1000 for own, name in lines}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()

    before = machine()
    for command in COMMANDS.values():  # warm up the page cache
        subprocess.run([sys.executable, *command], check=True, capture_output=True)
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for round in range(args.rounds):
        for name, command in COMMANDS.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - began)
        say(f"round {round + 1}/{args.rounds}")

    modules = {name: imported(COMMANDS[name]) for name in LIGHT}
    heavy = {name: [m for m in HEAVY if m in found] for name, found in modules.items()}
    write_json(args.json, {"machine": before, "seconds": seconds, "heavy imports": heavy, "imports_ms": modules})
    table(
        [
            ("command", "seconds", "heavy imports"),
            *(
                (name, show(spread(taken)), (", ".join(heavy[name]) or "none") if name in heavy else "")
                for name, taken in seconds.items()
            ),
        ]
    )
    sys.exit(any("torch" in found for found in heavy.values()))


if __name__ == "__main__":
    main()
