"""gptlab completion: what may be typed, as a table that the scripts for the shells are made of."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gptlab.cli.common import add_verb
from gptlab.config import PRESETS, REGIME_NAMES, Setting, flag_sections, shipped
from gptlab.hardware import GPUS

SHELLS = ("bash", "zsh", "fish")
CORPORA = ("stdlib", "shakespeare", "openwebtext", "fineweb-edu", "eurlex57k", "agnews", "imdb", "constructs")
TOKENIZERS = ("gpt2", "byte", "char")
OF_SETTING = {
    "data.corpus": "CORPUS",
    "data.tokenizer": "TOKENIZER",
    "data.path": "DATASET",
    "train.init_from": "RUN",
    "eval.wikitext": "FILE",
    "eval.lambada": "FILE",
    "hellaswag.path": "FILE",
}
"""Settings that name a path or a thing, and what a verb's argument of that kind is called."""


INSTALL = """to install it, for shells that are opened from then on; after an update of gptlab, do it again:
  bash: gptlab completion bash > ~/.local/share/bash-completion/completions/gptlab
  zsh:  gptlab completion zsh > ~/.zfunc/_gptlab    # and fpath+=~/.zfunc before compinit in ~/.zshrc
  fish: gptlab completion fish > ~/.config/fish/completions/gptlab.fish
for one shell alone, in bash or zsh: source <(gptlab completion bash)"""


def add_to(verbs: Any) -> None:
    help = "Print a script with which bash, zsh or fish completes verbs, flags, settings, recipes and runs at TAB."
    raw: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "epilog": INSTALL}
    v = add_verb(verbs, "completion", do_completion, help, **raw)
    v.add_argument("shell", choices=SHELLS)


def do_completion(options: argparse.Namespace) -> None:
    from gptlab.cli import shells
    from gptlab.cli.main import make_parser

    print(getattr(shells, options.shell)(commands(make_parser())), end="")


@dataclass(frozen=True)
class Kind:
    """What may stand for a metavar."""

    words: tuple[str, ...] = ()
    globs: tuple[str, ...] = ()
    """Paths that are offered first; a folder ends with /."""
    path: str = ""
    """file or folder, where any may be given."""

    def __or__(self, other: Kind) -> Kind:
        path = "file" if "file" in (self.path, other.path) else self.path or other.path
        return Kind((*self.words, *other.words), (*self.globs, *other.globs), path)


@dataclass(frozen=True)
class Argument:
    """A flag, or a positional argument, which has no flags."""

    flags: tuple[str, ...]
    name: str
    """Its metavar."""
    says: str
    kind: Kind
    takes: str
    """How many words: "0", "1", "?", or "+" for several."""


@dataclass(frozen=True)
class Command:
    words: tuple[str, ...]
    """`study run`; of the program itself, none."""
    says: str
    arguments: tuple[Argument, ...]
    parts: tuple[Command, ...]
    takes_settings: bool

    @property
    def flags(self) -> list[Argument]:
        return [argument for argument in self.arguments if argument.flags]

    @property
    def positions(self) -> list[Argument]:
        return [argument for argument in self.arguments if not argument.flags]

    def walk(self) -> Iterator[Command]:
        yield self
        for part in self.parts:
            yield from part.walk()


@functools.cache
def kinds() -> dict[str, Kind]:
    """What may stand for each metavar, or for one of a verb; and for the flags whose metavar does not tell."""
    settings = [setting for _, rows in flag_sections().values() for setting in rows]
    run, begun = Kind(globs=("runs/*/",), path="folder"), Kind(globs=("results/*/",), path="folder")
    return {
        "RECIPE": Kind(tuple(shipped()), ("*.toml", "runs/*/"), "file"),
        "STUDY": Kind(tuple(shipped("studies")), ("*.toml", "results/*/"), "file"),
        "RUN": run,
        "DIR": Kind(path="folder"),
        "DATASET": Kind(globs=("data/*/",), path="folder"),
        "FILE": Kind(path="file"),
        "FILE.json": Kind(path="file"),
        "PATH": Kind(path="file"),
        "SRC": Kind(path="file"),
        "TASK": Kind(path="file"),
        "CORPUS": Kind(CORPORA, path="file"),
        "TOKENIZER": Kind(TOKENIZERS, path="file"),
        "PRESET": Kind(tuple(PRESETS)),
        "SECTION": Kind(tuple(name for name in flag_sections() if name)),
        "SETTING=VALUES": Kind(tuple(f"{setting.name}=" for setting in settings if "." in setting.name)),
        "--gpu": Kind(tuple(GPUS)),
        "--regimes": Kind(tuple(REGIME_NAMES)),
        "study report --compare": Kind(tuple(shipped("comparisons")), path="file"),
        "study power --pilot": begun,
        **dict.fromkeys(("study report DIR", "study status DIR", "stop STUDY", "watch STUDY", "verify STUDY"), begun),
    }


def setting_flags() -> list[Argument]:
    """The settings that are flags of the verbs that take settings."""
    found = []
    for _, rows in flag_sections().values():
        for row in rows:
            if row.name not in ("name", "description", "seed"):
                kind = Kind(_choices(row)) | kinds().get(OF_SETTING.get(row.name, ""), Kind())
                found.append(Argument((row.flag,), row.accepts.partition("|")[0], _says(row.description), kind, "1"))
    return found


def _choices(setting: Setting) -> tuple[str, ...]:
    return tuple(str(value).lower() if isinstance(value, bool) else str(value) for value in setting.choices)


def commands(parser: argparse.ArgumentParser, words: tuple[str, ...] = (), says: str = "") -> Command:
    """The verbs of a parser, with their arguments and their parts."""
    arguments: list[Argument] = []
    parts: list[Command] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            told = {choice.dest: choice.help or "" for choice in action._choices_actions}
            parts = [commands(part, (*words, name), _says(told[name])) for name, part in action.choices.items()]
            arguments.append(Argument((), "verb", "", Kind(tuple(action.choices)), "1"))
        elif action.help != argparse.SUPPRESS:
            arguments.append(_argument(action, " ".join(words)))
    return Command(words, says, tuple(arguments), tuple(parts), bool(parser.get_default("takes_settings")))


def _argument(action: argparse.Action, verb: str) -> Argument:
    name, known = str(action.metavar or action.dest.upper()), kinds()
    flag = action.option_strings[-1] if action.option_strings else ""
    kind = Kind(tuple(map(str, action.choices or ())))
    for key in name.split("|"):
        literal = Kind((key,)) if key.islower() and not action.choices else Kind()
        kind |= known.get(f"{verb} {key}") or known.get(key) or literal
    kind |= known.get(f"{verb} {flag}") or known.get(flag) or Kind()
    many = action.nargs in ("+", "*")
    takes = "0" if action.nargs == 0 else "+" if many else "?" if action.nargs == "?" else "1"
    return Argument(tuple(action.option_strings), name, _says(action.help or ""), kind, takes)


def _says(text: str) -> str:
    """The first sentence or part of a help, for one line."""
    first = " ".join(text.split()).partition(". ")[0].partition("; ")[0].rstrip(".")
    first = first if len(first) <= 72 else first.partition(": ")[0]
    return first if len(first) <= 72 else f"{first[:69]}..."
