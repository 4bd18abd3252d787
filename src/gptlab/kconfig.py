"""The make front: a Kconfig made of the schema, and a .config that is a recipe, or a study and flags for all its arms.

    make defconfig-NAME -> .config -> make menuconfig -> make, make test-matrix

Every setting is one symbol, `optim.lr` CONFIG_OPTIM_LR (a choice has one for each value), and the same in either
direction. What a .config leaves out is as in the recipe or study that it names.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import itertools
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import TypeAdapter

from gptlab import config as schema
from gptlab.config import Recipe, build_recipe, shipped
from gptlab.errors import ConfigError, UserError

CONFIG = Path(".config")
FOLDER = Path(".kconfig")  # what is made on the way: Kconfig, and the recipe that is trained
ALIASES = {
    "gpt2-shakespeare-matrix": "shakespeare-matrix",
    "gpt2-adamwprune-finewebedu-79000-bitter-lesson": "bitter-lesson",
    "gpt2-adamwprune-finewebedu-79000-bitter-lesson-as-published": "bitter-lesson-as-published",
}
LARGEST = 2**63 - 1  # of TOML's whole numbers


@dataclass(frozen=True)
class Setting:
    """A setting as Kconfig has it."""

    name: str
    help: str
    kind: str
    """bool, choice, int or string; `auto` is -1 in an int, and numbers with a point are strings."""
    values: tuple[Any, ...]
    """What it can be by name: all of a choice, `auto` of an int or a string, or nothing."""
    low: int | None

    @property
    def symbol(self) -> str:
        """optim.lr is OPTIM_LR; optim.spam_theta is SPAM_THETA."""
        return re.sub(r"^optim\.spam_", "spam_", self.name).replace(".", "_").upper()

    def of_value(self, value: Any) -> str:
        """The symbol of one value of a choice: OPTIM_NAME_ADAMW_SPAM."""
        return f"{self.symbol}_{re.sub('[^A-Z0-9]', '_', as_text(value).upper())}"

    def written(self, value: Any) -> str:
        """A value as Kconfig writes it."""
        if self.kind == "bool":
            return "y" if value else "n"
        if self.kind == "int":
            return "-1" if value == "auto" else str(value)
        if isinstance(value, str):  # there are no line breaks within a value
            value = value.replace("\\", r"\\").replace("\n", r"\n").replace("\r", r"\r")
        return _quoted(as_text(value))

    def read(self, text: str) -> Any:
        """The value that a .config gives an int or a string, quoted or not; the schema judges it."""
        text = _unquoted(text)
        if self.kind == "int" and text == "-1" and "auto" in self.values:
            return "auto"
        value = schema.parse_flag(self.name, text)
        breaks = {"n": "\n", "r": "\r"}
        return re.sub(r"\\(.)", lambda m: breaks.get(m[1], m[1]), value) if isinstance(value, str) else value

    def lines(self, value: Any) -> list[str]:
        """The setting in a .config."""
        switches = [(self.symbol, value)] if self.kind == "bool" else []
        if self.kind == "choice":
            switches = [(self.of_value(one), one == value) for one in self.values]
        if switches:
            return [f"CONFIG_{symbol}=y" if on else f"# CONFIG_{symbol} is not set" for symbol, on in switches]
        return [f"CONFIG_{self.symbol}={self.written(value)}"]

    def entry(self, default: Any) -> list[str]:
        """The setting in a Kconfig."""
        help = ["\thelp", *(f"\t  {line.strip()}" for line in self.help.splitlines()), ""]
        if self.kind == "choice":
            lines = ["choice", f'\tprompt "{self.name}"', f"\tdefault {self.of_value(default)}", *help]
            for value in self.values:
                lines += [f"config {self.of_value(value)}", f'\tbool "{as_text(value)}"', ""]
            return [*lines, "endchoice", ""]
        or_auto = self.kind == "int" and "auto" in self.values
        lines = [f"config {self.symbol}", f'\t{self.kind} "{self.name}{" (-1: auto)" * or_auto}"']
        if self.kind == "int" and self.low is not None:
            lines.append(f"\trange {-1 if or_auto else self.low} {LARGEST}")
        return [*lines, f"\tdefault {_no_macro(self.written(default))}", *help]


@functools.cache
def all_settings() -> tuple[Setting, ...]:
    """Every setting of the schema, in its order."""
    found = []
    for name, field in schema.settings():
        annotation: Any = Annotated[field.annotation, field]
        accepts = TypeAdapter(annotation).json_schema()
        parts = accepts.get("anyOf", [accepts])
        types = {part["type"] for part in parts}
        named = [v for part in parts for v in part.get("enum", [part["const"]] if "const" in part else [])]
        kind = "int" if "integer" in types else "choice" if named and "number" not in types else "string"
        if "boolean" in types:
            kind, named = ("choice", [*named, True, False]) if named else ("bool", [])
        low = next((part[key] for part in parts for key in ("ge", "minimum") if key in part), None)
        found.append(Setting(name, field.description, kind, tuple(named), low))
    return tuple(found)


@functools.cache
def symbols() -> dict[str, tuple[Setting, Any]]:
    """The setting of every symbol, and the value it stands for where it is one of a choice."""
    pairs = [
        (setting.symbol if value is None else setting.of_value(value), (setting, value))
        for setting in all_settings()
        for value in (setting.values if setting.kind == "choice" else (None,))
    ]
    table = dict(pairs)
    assert len(table | {"RECIPE": 0, "STUDY": 0}) == len(pairs) + 2, "every symbol is of one setting"
    return table


def as_text(value: Any) -> str:
    """A value as on a command line: a text as it is, the rest as TOML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k, ensure_ascii=False)} = {as_text(v)}" for k, v in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else str(list(value) if isinstance(value, tuple) else value)


def _quoted(text: str) -> str:
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


def _unquoted(text: str) -> str:
    match = re.match(r'"((?:[^\\"]|\\.)*)"', text)
    return re.sub(r"\\(.)", r"\1", match[1]) if match else text


def _no_macro(text: str) -> str:
    """$ would begin one in a Kconfig."""
    return text.replace("$", "\\$")


# -- a .config ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """What a .config says."""

    study: str
    """Name of the study it runs, or empty."""
    source: str
    """Name of the recipe it started from, or empty: of a study it has the shared recipe."""
    base: Recipe
    """The settings of that recipe."""
    recipe: Recipe
    """The settings of the .config."""

    def sections(self) -> list[tuple[str, list[Setting]]]:
        """Its settings by title of their section; names, seeds and the task of a study's runs are not set here."""
        groups = itertools.groupby(all_settings(), lambda setting: setting.name.rpartition(".")[0])
        return [(_title(name), list(group)) for name, group in groups if name or not self.study]

    def to_text(self) -> str:
        """The whole .config, as Kconfig's own tools write it."""
        lines = [f"CONFIG_RECIPE={_quoted(self.source)}", f"CONFIG_STUDY={_quoted(self.study)}"]
        for title, group in self.sections():
            lines += ["", "#", f"# {title}", "#"] if title else []
            lines += [line for setting in group for line in setting.lines(_value(self.recipe, setting))]
            lines += [f"# end of {title}"] if title else []
        return "\n".join(lines) + "\n"

    def to_kconfig(self) -> str:
        """The Kconfig that this .config is of: the schema, with what it started from as defaults."""
        lines = [f"mainmenu {_no_macro(_quoted(f'gptlab: {self.study or self.source}'))}", ""]
        for symbol, text in (("RECIPE", self.source), ("STUDY", self.study)):
            lines += [f"config {symbol}", "\tstring", f"\tdefault {_no_macro(_quoted(text))}", ""]
        for title, group in self.sections():
            entries = [line for setting in group for line in setting.entry(_value(self.base, setting))]
            lines += [f"menu {_quoted(title)}", "", *entries, "endmenu", ""] if title else entries
        return "\n".join(lines)

    def command(self) -> list[str]:
        """What runs it, after `gptlab`; a recipe has to be in FOLDER then."""
        if not self.study:
            return ["train", str(FOLDER / "recipe.toml")]
        chosen = [s for _, group in self.sections() for s in group if _value(self.recipe, s) != _value(self.base, s)]
        return ["study", "run", self.study, *(f"--{s.name}={as_text(_value(self.recipe, s))}" for s in chosen)]


def _value(recipe: Recipe, setting: Setting) -> Any:
    return functools.reduce(getattr, setting.name.split("."), recipe)


def _title(section: str) -> str:
    says = Recipe.model_fields[section].annotation.__doc__ if section else ""
    return f"{section}: " + re.split(r"[.;:]( |$)| \(", says)[0] if says else ""


def start(name: str) -> Config:
    """The .config of a shipped recipe or study. Raises ConfigError where NAME is neither."""
    meant = ALIASES.get(name, name)
    if meant in shipped("studies"):
        return _config(meant, "", {})
    if meant in shipped():
        return _config("", meant, {})
    known = [*shipped(), *shipped("studies"), *ALIASES]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean '{close[0]}'? " if close else ""
    raise ConfigError(f"no recipe or study '{name}': {hint}`gptlab recipes` and `gptlab studies` list them")


def _config(study: str, source: str, layer: Mapping[str, Any]) -> Config:
    under = schema.load_study(study).recipe if study else schema.read_layer(source)
    return Config(study, source, build_recipe(under), build_recipe(under, layer))


def read(path: Path = CONFIG) -> Config:
    """What a .config says.

    Raises:
        ConfigError: there is none, or a line, a symbol or a value of it is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"there is no {path}: `make defconfig-NAME` writes one, NAME as `gptlab recipes` and `gptlab studies` list"
        ) from None
    heads = {"RECIPE": "", "STUDY": ""}
    layer: dict[str, Any] = {}
    for number, line in enumerate(text.split("\n"), 1):
        match = re.fullmatch(r"(?:CONFIG_(\w+)=(.*)|# CONFIG_(\w+) is not set)\s*", line)
        if not match:
            if line.strip() and not line.startswith("#"):
                raise ConfigError(f"{path}, line {number}: {line.strip()!r} is no CONFIG_NAME=value")
            continue
        symbol, value = match[1] or match[3], (match[2] or "n").strip()
        if symbol in heads:
            heads[symbol] = _unquoted(value)
            continue
        if symbol not in symbols():
            close = difflib.get_close_matches(symbol, symbols(), n=1)
            hint = f"; did you mean 'CONFIG_{close[0]}'?" if close else ""
            raise ConfigError(f"{path}, line {number}: no symbol 'CONFIG_{symbol}'{hint}")
        setting, stands_for = symbols()[symbol]
        if setting.kind in ("bool", "choice") and value not in ("y", "n"):
            raise ConfigError(f"{path}, line {number}: CONFIG_{symbol}={value}: must be y or n")
        if setting.kind == "bool":
            layer[setting.name] = value == "y"
        elif setting.kind != "choice":
            layer[setting.name] = setting.read(value)
        elif value == "y":
            layer[setting.name] = stands_for
    if bool(heads["RECIPE"]) == bool(heads["STUDY"]):
        raise ConfigError(
            f"{path}: one of CONFIG_RECIPE and CONFIG_STUDY must be a name: `make defconfig-NAME` writes it"
        )
    if own := [name for name in layer if heads["STUDY"] and "." not in name]:
        raise ConfigError(f"{path}: sets {own[0]}, which is the study's own: CONFIG_STUDY is {heads['STUDY']}")
    return _config(heads["STUDY"], heads["RECIPE"], layer)


# -- what make calls ------------------------------------------------------------------------------------------------


def write_kconfig(config: Config) -> Path:
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "Kconfig").write_text(config.to_kconfig(), encoding="utf-8")
    return FOLDER / "Kconfig"


def defconfig(name: str) -> None:
    config = start(name)
    instead = " in place of the one there was" if CONFIG.exists() else ""
    CONFIG.write_text(config.to_text(), encoding="utf-8")
    what = f"study {config.study}: `make test-matrix`" if config.study else f"recipe {config.source}: `make`"
    print(f".config is written{instead}, of {what} runs it, `make menuconfig` changes it")


def menuconfig() -> None:
    config = read()
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UserError("menuconfig needs a terminal")
    try:
        from kconfiglib import Kconfig
        from menuconfig import menuconfig as open_menu
    except ImportError:
        raise UserError("menuconfig needs kconfiglib: `make install` or `pip install kconfiglib`") from None
    CONFIG.write_text(config.to_text(), encoding="utf-8")  # as Kconfig quotes it, whoever wrote it
    open_menu(Kconfig(str(write_kconfig(config))))
    read()


def run(config: Config) -> None:
    """Become `gptlab train` or `gptlab study run`, which says how it ends."""
    if not config.study:
        FOLDER.mkdir(exist_ok=True)
        (FOLDER / "recipe.toml").write_text(config.recipe.to_toml(), encoding="utf-8")
    print("gptlab", *config.command(), flush=True)
    os.execv(sys.executable, [sys.executable, "-m", "gptlab", *config.command()])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m gptlab.kconfig", description=__doc__.partition("\n")[0])
    parser.add_argument("verb", choices=["defconfig", "menuconfig", "run", "test-matrix", "write"])
    parser.add_argument("name", nargs="?", help="of a recipe or study, for defconfig")
    options = parser.parse_args(argv)
    try:
        if options.verb == "defconfig":
            defconfig(options.name or "")
        elif options.verb == "menuconfig":
            menuconfig()
        elif options.verb == "write":
            print(write_kconfig(read()))
        else:
            config = read()
            if options.verb == "test-matrix" and not config.study:
                raise ConfigError(
                    f".config is of a recipe, {config.source or config.recipe.name}, and test-matrix runs a study: "
                    f"`make defconfig-gpt2-shakespeare-matrix` writes one"
                )
            run(config)
    except UserError as error:
        print(f"gptlab: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
