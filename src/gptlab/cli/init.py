"""gptlab init"""

import argparse
import functools
import math
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from gptlab.cli.common import add_verb, named
from gptlab.cli.plan import this_machine
from gptlab.config import build_recipe
from gptlab.config.schema import schema_file
from gptlab.errors import DataError, UserError
from gptlab.files import printable
from gptlab.progress import Progress
from gptlab.status import EXIT_CODES
from gptlab.streams import say

T = TypeVar("T")

SECONDS = 1.5  # of timing each size of model
ENOUGH = 4_000_000  # bytes of text that are read to estimate how much there is
LEAST = 20_000  # bytes of text below which there is nothing to learn and to hold out
# Tokenizer by bytes of text from which it is taken, and bytes that one of its tokens stands for, roughly, in English.
TOKENIZERS = ((2e9, "bpe-16384", 4.0), (1e8, "bpe-8192", 3.6), (4e6, "bpe-2048", 3.0), (0.0, "byte", 1.0))
TOKENIZERS_OF_A_CPU = TOKENIZERS[2:]  # it trains models that a larger vocabulary would be most of


def add_to(verbs: Any) -> None:
    help = (
        "Write a recipe for your text, your time and your machine. What is not given as a flag is asked for. The model "
        "is the one whose loss is predicted to be lowest in the time, by a scaling law and the measured speed."
    )
    v = add_verb(verbs, "init", do_init, help)
    v.add_argument("--data", metavar="PATH|CORPUS", help="a file or folder of text, a prepared dataset, or a corpus")
    v.add_argument("--minutes", type=float, metavar="X", help="how long the training may take")
    v.add_argument("--gpu", metavar="NAME", help="GPU that will train it, such as L4 (default: this machine)")
    v.add_argument("--text-field", default="text", metavar="NAME", help="field with the text in .jsonl and tables")
    help = "recipe to write; it must not exist (default: mine.toml)"
    v.add_argument("--out", type=named, default=Path("mine.toml"), metavar="FILE", help=help)


def do_init(options: argparse.Namespace) -> int:
    refuse_existing(options.out)
    try:
        return write_recipe(options)
    except EOFError:
        raise UserError("the answers ended: nothing was written; --data PATH --minutes N answer beforehand") from None
    except KeyboardInterrupt:
        say("\ngptlab: stopped; nothing was written")
        return EXIT_CODES["interrupted"]


def refuse_existing(out: Path) -> None:
    if os.path.lexists(out):
        raise UserError(f"{out} exists: --out names another file")
    if not out.parent.is_dir():
        raise UserError(f"{out.parent} is no folder: --out names a file in one")


def write_recipe(options: argparse.Namespace) -> int:
    asked = options.data is None or options.minutes is None
    name = (
        known_data(options.data) if options.data is not None else ask("text: a file, a folder or a corpus", known_data)
    )
    minutes = known_time(options.minutes) if options.minutes is not None else ask("minutes of training", known_time)
    gpu = options.gpu or (ask("GPU (Enter: this machine)", known_gpu, "this machine") if asked else "")

    with Progress(f"looking at {name}"):
        from gptlab.machine import is_busy, spin_less

        spin_less(os.environ)  # as training does, before PyTorch is loaded
        from gptlab.planning.choose import choose, facts
        from gptlab.planning.device import Device

        device, measure = (Device.named(gpu), None) if gpu else this_machine()
        found = look(name, options.text_field, device.kind == "cpu")
    print(printable(found.says), flush=True)
    timed = ", each timed on this machine" * (device.kind == "cpu")
    with Progress(f"comparing sizes of model{timed}") as shown:
        measure = measure and functools.partial(measure, seconds=SECONDS)
        how = (60 * minutes, device, measure, lambda text: shown.message(f"  {text}"))
        layer, plan = choose(found.data, found.tokens, *how)
        lines = list(facts(build_recipe(layer), plan, found.tokens))
    if plan.measured and is_busy():
        lines.append("other programs are using these cores: without them the run is shorter than planned")
    write(options.out, layer, [found.says, *lines])
    print(printable("\n".join([*lines, f"recipe: {options.out}", "next:"])))
    for command in [*found.commands, f"gptlab train {shlex.quote(str(options.out))}"]:
        print(printable(f"  {command}"))
    return 0


def write(out: Path, layer: Mapping[str, Any], remarks: list[str]) -> None:
    """A recipe with the schema for editors, and with how it was chosen."""
    import tomli_w

    lines = [f"#:schema {schema_file('recipe').as_uri()}", *(f"# {printable(remark)}" for remark in remarks)]
    with open(out, "x", encoding="utf-8") as file:  # it may have been made meanwhile
        file.write("\n".join(lines) + f"\n{tomli_w.dumps(layer)}")


# -- questions ------------------------------------------------------------------------------------------------------


def ask(question: str, check: Callable[[Any], T], default: str = "") -> T:
    """The answer, checked; the question is put again until it is one."""
    if not sys.stdin.isatty():
        raise UserError("`gptlab init` asks in a terminal; without one, give --data PATH --minutes N")
    while True:
        answer = input(f"{question}: ").strip() or default
        try:
            return check(answer)
        except UserError as error:
            print(printable(str(error)))


def known_data(text: str) -> str:
    from gptlab.data.corpora import LABELED, TEXT

    if text in TEXT and text != "text":
        return text
    if text in LABELED and text != "text":
        raise UserError(f"{text} has labels, and `gptlab init` is for language models: see `gptlab recipes`")
    if not text or not Path(text).exists():
        names = ", ".join(name for name in TEXT if name != "text")
        raise UserError(f"{text or 'nothing'}: no file or folder, and not one of {names}")
    return text


def known_time(text: str | float) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes <= 1e6:
        raise UserError(f"{text or 'nothing'}: minutes must be a number above 0, such as 10")
    return minutes


def known_gpu(text: str) -> str:
    from gptlab import hardware

    return "" if text == "this machine" else hardware.named(text).name


# -- the data -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """What was seen of the data."""

    data: dict[str, Any]
    """The recipe's [data]."""
    tokens: float
    """Of the training split; estimated if it is not prepared, infinity if it is larger than any run reads."""
    says: str
    commands: list[str]
    """That prepare it."""


def look(name: str, text_field: str, cpu: bool) -> Look:
    """Size and kind of some data, and the tokenizer for it.

    Raises:
        DataError: it cannot be read, or is too short.
    """
    from gptlab.data.corpora import TEXT, open_corpus
    from gptlab.data.corpora.base import Corpus
    from gptlab.data.corpora.text import Hub
    from gptlab.data.prepare.missing import OF_THIS_PYTHON

    tokens: float
    if (Path(name) / "manifest.json").is_file():
        tokens = prepared({"path": name})
        return Look({"path": name}, tokens, f"{name}: a prepared dataset of {tokens:,.0f} training tokens", [])
    own = name not in TEXT
    if not own and isinstance(getattr(TEXT[name], "__self__", None), Hub):
        data, tokens, says = {"corpus": name, "tokenizer": "gpt2"}, math.inf, f"{name}: billions of tokens"
    else:
        corpus = open_corpus("text" if own else name, Path(name) if own else None, text_field)
        assert isinstance(corpus, Corpus)
        size, documents = text_bytes(corpus)
        if size < LEAST:
            raise DataError(f"{name} holds {size:,.0f} bytes of text: too little to learn from, {LEAST:,} is the least")
        kinds = TOKENIZERS_OF_A_CPU if cpu else TOKENIZERS
        tokenizer, per_token = next((name, per) for least, name, per in kinds if size >= least)
        data = {"corpus": name, "tokenizer": tokenizer}
        tokens = 0.95 * size / per_token
        several = "one document" if documents == 1 else f"{documents:,} documents"
        says = f"{name}: {say_bytes(size)} of text in {several}, about {tokens:,.0f} training tokens ({tokenizer})"
    try:
        tokens = prepared(data)
    except DataError:
        words = ["gptlab", "prepare", name, "--tokenizer", data["tokenizer"]]
        words += ["--text-field", text_field] if text_field != "text" else []
        return Look(data, tokens, says, [] if name in OF_THIS_PYTHON else [shlex.join(words)])
    return Look(data, tokens, f"{says}; it is prepared", [])


def text_bytes(corpus: Any) -> tuple[float, int]:
    """About how many bytes of text and documents a corpus has, by its beginning."""
    size, documents = 0.0, 0
    for text in corpus.texts():
        size, documents = size + len(text.encode(errors="surrogateescape")), documents + 1
        share = corpus.reading.share
        if size >= ENOUGH and share:
            return size / share, round(documents / share)
    return size, documents


def say_bytes(size: float) -> str:
    unit, divisor = next((u, d) for u, d in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)) if size >= d)
    return f"{size / divisor:.3g} {unit}"


def prepared(data: dict[str, Any]) -> int:
    """Training tokens of a prepared dataset of text. Raises DataError if there is none."""
    from gptlab.tasks.base import open_data

    return open_data(build_recipe({"data": data, "train": {"max_steps": 1}})).epoch_tokens(32)
