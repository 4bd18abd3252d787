"""What both scripts begin with: the environment that `make install` made, and the folder it is in."""

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def enter() -> None:
    """Go on under .venv's Python where this one has no gptlab. Import gptlab after it."""
    venv = ROOT / ".venv"
    if importlib.util.find_spec("gptlab"):
        return
    if Path(sys.prefix).resolve() == venv or not (venv / "bin/python").exists():
        sys.exit("gptlab is not installed: `make install` at the repository's root, once")
    os.execv(venv / "bin/python", [str(venv / "bin/python"), *sys.argv])


def from_root(path: str) -> str:
    """A path as given, seen from where `go_to_root` goes."""
    return os.path.normpath(os.path.join("gpt2", path)) if Path.cwd() == ROOT / "gpt2" else path


def go_to_root() -> None:
    """data/ and runs/ are the root's, also for a call from within gpt2/."""
    if Path.cwd() == ROOT / "gpt2":
        os.chdir(ROOT)
