"""The make front: a Kconfig made from the schema, and a .config that stands for a recipe or a study.

    make defconfig-NAME -> .config -> make menuconfig -> make, make test-matrix

A setting is one symbol, `optim.lr` CONFIG_OPTIM_LR; a choice has a symbol for each value. A setting that the .config
leaves out is as in the recipe or study that the .config names.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptlab import config as schema
from gptlab.config import Recipe, build_recipe, flag_sections, shipped, value_of
from gptlab.errors import ConfigError, UserError
from gptlab.files import because, printable, read_text

CONFIG = Path(".config")
FOLDER = Path(".kconfig")  # for generated files: the Kconfig, and the recipe to train
ALIASES = {
    "gpt2-shakespeare-matrix": "shakespeare-matrix",
    "gpt2-adamwprune-finewebedu-79000-bitter-lesson": "bitter-lesson",
    "gpt2-adamwprune-finewebedu-79000-bitter-lesson-as-published": "bitter-lesson-as-published",
}
LARGEST = 2**63 - 1  # of TOML's whole numbers


class Setting(schema.Setting):
    """A setting as Kconfig has it."""

    @property
    def kind(self) -> str:
        """bool, choice, int or string. In an int -1 stands for `auto`; numbers with a decimal point are strings."""
        if "integer" in self.types:
            return "int"
        if self.choices == (True, False):
            return "bool"
        return "choice" if self.choices and not {"number", "array"} & {*self.types} else "string"

    @property
    def symbol(self) -> str:
        """optim.lr is OPTIM_LR; optim.spam_theta is SPAM_THETA."""
        return re.sub(r"^optim\.spam_", "spam_", self.name).replace(".", "_").upper()

    def of_value(self, value: Any) -> str:
        """The symbol of one value of a choice: OPTIM_NAME_ADAMW_SPAM."""
        return f"{self.symbol}_{re.sub('[^A-Z0-9]', '_', as_text(value).upper())}"

    def written(self, value: Any) -> str:
        """A value in Kconfig's syntax."""
        if self.kind == "bool":
            return "y" if value else "n"
        if self.kind == "int":
            return "-1" if value == "auto" else str(value)
        if isinstance(value, str):  # a value cannot contain a line break
            value = value.replace("\\", r"\\").replace("\n", r"\n").replace("\r", r"\r")
        return _quoted(as_text(value))

    def read(self, text: str) -> Any:
        """The value of an int or a string in a .config, quoted or not, before validation."""
        text = _unquoted(text)
        if self.kind == "int" and text == "-1" and "auto" in self.choices:
            return "auto"
        value = schema.parse_flag(self.name, text)
        breaks = {"n": "\n", "r": "\r"}
        return re.sub(r"\\(.)", lambda m: breaks.get(m[1], m[1]), value) if isinstance(value, str) else value

    def lines(self, value: Any) -> list[str]:
        """The lines of the setting in a .config."""
        if self.kind in ("int", "string"):
            return [f"CONFIG_{self.symbol}={self.written(value)}"]
        switches = {self.symbol: value}
        if self.kind == "choice":
            switches = {self.of_value(one): one == value for one in self.choices}
        return [f"CONFIG_{symbol}=y" if on else f"# CONFIG_{symbol} is not set" for symbol, on in switches.items()]

    def entry(self, default: Any) -> list[str]:
        """The lines of the setting in a Kconfig."""
        help = ["\thelp", *(f"\t  {line.strip()}" for line in self.description.splitlines()), ""]
        if self.kind == "choice":
            lines = ["choice", f'\tprompt "{self.name}"', f"\tdefault {self.of_value(default)}", *help]
            for value in self.choices:
                lines += [f"config {self.of_value(value)}", f'\tbool "{as_text(value)}"', ""]
            return [*lines, "endchoice", ""]
        or_auto = self.kind == "int" and "auto" in self.choices
        lines = [f"config {self.symbol}", f'\t{self.kind} "{self.name}{" (-1: auto)" * or_auto}"']
        if self.kind == "int" and self.low is not None:
            lines.append(f"\trange {-1 if or_auto else self.low} {LARGEST}")
        return [*lines, f"\tdefault {_no_macro(self.written(default))}", *help]


@functools.cache
def menus() -> dict[str, tuple[Setting, ...]]:
    """The settings by the title of their menu; those without a section have the title ""."""
    return {
        title: tuple(Setting(**vars(row)) for row in rows if row.name != "model.preset")
        for title, rows in flag_sections().values()
    }


def all_settings() -> list[Setting]:
    """Every setting of the schema, in its order."""
    return [setting for rows in menus().values() for setting in rows]


@functools.cache
def symbols() -> dict[str, tuple[Setting, Any]]:
    """The setting of every symbol, and the value that the symbol of a choice stands for."""
    pairs = [
        (setting.symbol if value is None else setting.of_value(value), (setting, value))
        for setting in all_settings()
        for value in (setting.choices if setting.kind == "choice" else (None,))
    ]
    table = dict(pairs)
    assert len(table | {"RECIPE": 0, "STUDY": 0}) == len(pairs) + 2, "two settings share a symbol"
    return table


def as_text(value: Any) -> str:
    """A value as on a command line: text as it is, everything else as TOML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k, ensure_ascii=False)} = {as_text(v)}" for k, v in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else str(list(value) if isinstance(value, tuple) else value)


def _quoted(text: str) -> str:
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


def _unquoted(text: str) -> str:
    match = re.match(r'"((?:[^\\"]|\\.)*)"', text)
    return re.sub(r"\\(.)", r"\1", match[1]) if match else text


def _no_macro(text: str) -> str:
    """Escape $, which starts a macro in a Kconfig."""
    return text.replace("$", "\\$")


# -- a .config ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """The content of a .config."""

    study: str
    """Name of the study, or empty."""
    source: str
    """Name of the recipe it started from; empty for a study."""
    base: Recipe
    """The settings of that recipe, or the settings that all arms of the study share."""
    recipe: Recipe
    """The settings of the .config."""

    def sections(self) -> list[tuple[str, tuple[Setting, ...]]]:
        """Title and settings of every section. Name, description, task and seed of a study's runs are the study's."""
        return [(title, rows) for title, rows in menus().items() if title or not self.study]

    def to_text(self) -> str:
        """The whole .config, byte for byte as Kconfig's own tools write it."""
        lines = [f"CONFIG_RECIPE={_quoted(self.source)}", f"CONFIG_STUDY={_quoted(self.study)}"]
        for title, group in self.sections():
            lines += ["", "#", f"# {title}", "#"] if title else []
            lines += [line for setting in group for line in setting.lines(value_of(self.recipe, setting.name))]
            lines += [f"# end of {title}"] if title else []
        return "\n".join(lines) + "\n"

    def to_kconfig(self) -> str:
        """The Kconfig for this .config: the schema, with the settings of the recipe or study as defaults."""
        lines = [f"mainmenu {_no_macro(_quoted(f'gptlab: {self.study or self.source}'))}", ""]
        for symbol, text in (("RECIPE", self.source), ("STUDY", self.study)):
            lines += [f"config {symbol}", "\tstring", f"\tdefault {_no_macro(_quoted(text))}", ""]
        for title, group in self.sections():
            entries = [line for setting in group for line in setting.entry(value_of(self.base, setting.name))]
            lines += [f"menu {_quoted(title)}", "", *entries, "endmenu", ""] if title else entries
        return "\n".join(lines)

    def command(self) -> list[str]:
        """The words after `gptlab` that run it. A recipe must have been written to FOLDER."""
        if not self.study:
            return ["train", str(FOLDER / "recipe.toml")]
        chosen = [
            s
            for _, group in self.sections()
            for s in group
            if value_of(self.recipe, s.name) != value_of(self.base, s.name)
        ]
        return ["study", "run", self.study, *(f"--{s.name}={as_text(value_of(self.recipe, s.name))}" for s in chosen)]


def start(name: str) -> Config:
    """The .config of a shipped recipe or study. Raises ConfigError if there is none of that name."""
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
    """Read a .config.

    Raises:
        ConfigError: there is no such file, or a line, a symbol or a value in it is wrong.
    """
    try:
        text = read_text(path, ConfigError)
    except FileNotFoundError:
        raise ConfigError(
            f"there is no {path}: `make defconfig-NAME` writes it; `gptlab recipes` and `gptlab studies` list the names"
        ) from None
    heads = {"RECIPE": "", "STUDY": ""}
    layer: dict[str, Any] = {}
    for number, line in enumerate(text.split("\n"), 1):
        match = re.fullmatch(r"(?:CONFIG_(\w+)=(.*)|# CONFIG_(\w+) is not set)\s*", line)
        if not match:
            if line.strip() and not line.startswith("#"):
                raise ConfigError(f"{path}, line {number}: {line.strip()[:200]!r} is not of the form CONFIG_NAME=value")
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
        raise ConfigError(f"{path}: either CONFIG_RECIPE or CONFIG_STUDY must be set: `make defconfig-NAME` writes it")
    if own := [name for name in layer if heads["STUDY"] and "." not in name]:
        raise ConfigError(f"{path}: sets {own[0]}, which only the study {heads['STUDY']} can set; remove the line")
    return _config(heads["STUDY"], heads["RECIPE"], layer)


# -- commands, as make calls them -----------------------------------------------------------------------------------


def write_kconfig(config: Config) -> Path:
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "Kconfig").write_text(config.to_kconfig(), encoding="utf-8")
    return FOLDER / "Kconfig"


def defconfig(name: str) -> None:
    config = start(name)
    replaced = " was replaced and" if CONFIG.exists() else ""
    CONFIG.write_text(config.to_text(), encoding="utf-8")
    what = f"study {config.study}: `make test-matrix`" if config.study else f"recipe {config.source}: `make`"
    print(f".config{replaced} holds {what} runs it, `make menuconfig` changes it")


def menuconfig() -> None:
    config = read()
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UserError("menuconfig needs a terminal")
    try:
        from kconfiglib import Kconfig
        from menuconfig import menuconfig as open_menu
    except ImportError:
        raise UserError("menuconfig needs kconfiglib: `make install-demo` or `pip install kconfiglib`") from None
    CONFIG.write_text(config.to_text(), encoding="utf-8")  # in Kconfig's quoting, even if it was written by hand
    open_menu(Kconfig(str(write_kconfig(config))))
    read()


def run(config: Config) -> None:
    """Replace this process by `gptlab train` or `gptlab study run`."""
    if not config.study:
        FOLDER.mkdir(exist_ok=True)
        (FOLDER / "recipe.toml").write_text(config.recipe.to_toml(), encoding="utf-8")
    print("gptlab", *config.command(), flush=True)
    os.execv(sys.executable, [sys.executable, "-m", "gptlab", *config.command()])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m gptlab.kconfig", description=__doc__.partition("\n")[0])
    parser.add_argument("verb", choices=["defconfig", "menuconfig", "run", "test-matrix", "write"])
    parser.add_argument("name", nargs="?", help="name of a recipe or study, for defconfig")
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
                    f".config holds the recipe {config.source}, and test-matrix runs a study: "
                    f"`make defconfig-gpt2-shakespeare-matrix` writes the .config of a study"
                )
            run(config)
    except UserError as error:
        print(f"gptlab: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"gptlab: {error.filename or CONFIG}: {because(error)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
