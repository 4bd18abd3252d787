"""What the scripts in experiments/ and gpt2/ share: the environment of `make install`, and the folder they work in.

Called from any folder of this checkout, a script reads and writes data/, runs/ and results/ at the checkout's root;
paths on its command line are relative to the caller's folder, as always. Called from elsewhere, it works there.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent
PATHS = ["from", "out", "study", "tokenizer", "data.path", "data.tokenizer", "train.init-from"]
PATHS += ["hellaswag.path", "eval.wikitext", "eval.lambada"]


def enter() -> None:
    """Continue with .venv's Python if this Python has no gptlab. Call this before gptlab is imported."""
    venv = ROOT / ".venv"
    if importlib.util.find_spec("gptlab") and importlib.util.find_spec("torch"):
        return
    if Path(sys.prefix).resolve() == venv.resolve() or not (venv / "bin/python").exists():
        sys.exit(f"gptlab is not installed: run `make install` in {ROOT}")
    os.execv(venv / "bin/python", [str(venv / "bin/python"), *sys.argv])


def folder() -> Path:
    """Where a script works: the root if it was called in the checkout, else the caller's folder."""
    here = Path.cwd()
    return ROOT if ROOT in (here, *here.parents) else here


def from_folder(words: Sequence[str]) -> list[str]:
    """A command line with its paths as seen from `folder()`: those that exist, and what --out names."""
    moved = list(words)
    for i, word in enumerate(words):
        flag, equals, value = word.partition("=")
        name = flag[2:].replace("_", "-") if flag.startswith("--") else ""
        if not equals and i + 1 < len(words):
            value = words[i + 1]
        if name in PATHS and value and (name == "out" or Path(value).exists()):
            seen = os.path.relpath(value, folder()) if not os.path.isabs(value) else value
            moved[i : i + 1 if equals else i + 2] = [f"{flag}={seen}"] if equals else [flag, seen]
    return moved


def run(call_of: Callable[[list[str]], list[str]]) -> None:
    """Run the `gptlab` command line that a script's own command line stands for, as `call_of` says, and exit."""
    enter()
    from gptlab import cli
    from gptlab.errors import UserError

    try:
        call = call_of(sys.argv[1:])
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    print(shlex.join(["gptlab", *call]), flush=True)
    os.chdir(folder())
    cli.main(call)
