"""Start-up time of commands, and a check of what they import.

Each command is a new process; the commands take turns. `python -c pass` is the lower bound, and `import torch` shows
the cost of an unnecessary import, and the least that a run can take. The run is of one step: it evaluates, trains and
saves. The check reads the output of `python -X importtime`: commands that do not train import no torch, and a run
imports nothing of PyTorch's compiler.

    python benchmarks/startup.py --rounds 10
"""

from __future__ import annotations

import argparse
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import machine, say, show, spread, table, write_json

TRAIN = """
import os, gptlab
changes = {"data.path": "data", "train.max_steps": 1, "train.threads": 1}
gptlab.train(gptlab.load_recipe("smoke-lm", changes), out=f"run-{os.getpid()}", quiet=True)
"""
RUN = "a run of one step"
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import gptlab": ["-c", "import gptlab"],
    "gptlab --help": ["-m", "gptlab", "--help"],
    "gptlab train --help": ["-m", "gptlab", "train", "--help"],
    "gptlab recipes": ["-m", "gptlab", "recipes"],
    "import torch": ["-c", "import torch"],
    "import the training loop": ["-c", "import gptlab.training.loop"],
    RUN: ["-c", TRAIN],
}
LIGHT = ("import gptlab", "gptlab --help", "gptlab train --help", "gptlab recipes")
COMPILER = ("torch._dynamo", "torch._inductor", "sympy")
NOT_FOR = {  # modules that a command must not import
    **dict.fromkeys(LIGHT, ("torch", "transformers", "matplotlib", "numpy", "rich")),
    RUN: (*COMPILER, "matplotlib", "pandas", "scipy", "transformers"),
}


def run(*arguments: str, folder: Path) -> tuple[float, float, str]:
    """Seconds and CPU seconds of a Python process, and what it says on stderr."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True, cwd=folder)
    took, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return took, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stderr


def imported(command: list[str], folder: Path) -> dict[str, float]:
    """The modules that a command imports, with the milliseconds of each module alone."""
    *_, said = run("-X", "importtime", *command, folder=folder)
    return {name: int(own) / 1000 for own, name in re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", said)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()

    before = machine()
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text.txt").write_text("A few words of text, again and again.\n" * 2000, encoding="utf-8")
        prepare = "-m gptlab prepare text --from text.txt --tokenizer byte --out data"
        run(*prepare.split(), folder=folder)
        for command in COMMANDS.values():  # warm up the page cache
            run(*command, folder=folder)
        for number in range(args.rounds):
            for which, command in COMMANDS.items():
                taken[which].append(run(*command, folder=folder)[:2])
            say(f"round {number + 1}/{args.rounds}")
        modules = {which: imported(COMMANDS[which], folder) for which in NOT_FOR}

    heavy = {which: [m for m in NOT_FOR[which] if m in found] for which, found in modules.items()}
    seconds = {which: [wall for wall, _ in each] for which, each in taken.items()}
    cpu = {which: [cpu for _, cpu in each] for which, each in taken.items()}
    measured = {"seconds": seconds, "cpu_seconds": cpu, "heavy imports": heavy, "imports_ms": modules}
    write_json(args.json, {"machine": before, **measured})
    rows = [
        (which, show(spread(each)), show(spread(cpu[which])), ", ".join(heavy.get(which, [])))
        for which, each in seconds.items()
    ]
    table([("command", "seconds", "CPU seconds", "heavy imports"), *rows])
    sys.exit(any(map(bool, heavy.values())))


if __name__ == "__main__":
    main()
