"""The entry point of `gptlab`, and its parser. A verb imports what is heavy when it is called."""

import argparse
import atexit
import errno
import gc
import io
import os
import shlex
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn

from gptlab.cli import (
    bench,
    compare,
    compare_scores,
    completion,
    doctor,
    evaluate,
    init,
    judge,
    launch,
    ledger,
    output,
    plan,
    prepare,
    runs,
    schema,
    study,
    train,
    verify,
    watch,
)
from gptlab.cli.common import Parser, add_json, add_verb, json_too
from gptlab.config import parse_flag, read_layer, settings, shipped
from gptlab.errors import ConfigError, LostRank, OutOfMemory, UserError
from gptlab.files import because, printable
from gptlab.streams import discard, fill_descriptors, say
from gptlab.version import VERSION

LINGER = 5  # seconds
MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE)
"""What the file system says that another command line would not mend."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line and exit with its status; gptlab.status says what each status means."""
    given = list(sys.argv[1:] if argv is None else argv)
    fill_descriptors()
    if "RANK" not in os.environ:  # the process group of a rank is garbage whose threads must end
        atexit.register(gc.freeze)  # else Python looks for garbage among PyTorch's objects before it ends, for a second
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # in an ASCII locale ± is printed as ?
    try:
        check_text(given)
        arguments, overrides = lift_settings(given)
        options = make_parser().parse_args(arguments)
        options.overrides, options.command = overrides, shlex.join(["gptlab", *given])
        if overrides and not options.takes_settings:
            raise ConfigError(f"`gptlab {options.verb}` takes no settings such as --{next(iter(overrides))}")
        status = options.do(options) or 0
        if sys.stdout is not None:
            sys.stdout.flush()  # here it can be said that the output is lost
        sys.exit(status)
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(2)  # if rank 0 says the same, torchrun ends this rank meanwhile and it is said once
        _end(2, str(error))
    except OutOfMemory as error:
        _end(3, str(error))
    except LostRank as error:
        say(f"gptlab: {printable(str(error))}")
        time.sleep(LINGER)  # the rank that failed first ends first, and torchrun reports that rank
        sys.exit(1)
    except BrokenPipeError:  # `gptlab sample RUN | head`
        _end(0)
    except OSError as error:
        names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
        _end(1 if error.errno in MACHINE else 2, ": ".join([*names, because(error)]))
    except MemoryError:
        _end(3, f"`gptlab {given[0] if given else ''}` ran out of host memory")
    except KeyboardInterrupt:
        goes_on = (given and given[0] in ("prepare", "train")) or given[:2] == ["study", "run"]
        _end(4, f"stopped; to go on: {shlex.join(['gptlab', *given])}" if goes_on else "")


def _end(status: int, says: str = "") -> NoReturn:
    """Exit with a status after one sentence on stderr, also where stdout and stderr cannot be written."""
    if says:
        say(f"gptlab: {printable(says)}")
    try:
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError):
        discard(sys.stdout)
    sys.exit(status)


def check_text(arguments: Sequence[str]) -> None:
    """Raise UserError for an argument that is empty, as "$DIR" may be by mistake, or not UTF-8.

    No recipe, record or message could hold what is not UTF-8.
    """
    for before, word in zip(["", *arguments], arguments, strict=False):
        if not word and before != "--prompt":
            raise UserError(f"an argument is empty, after {before or 'gptlab'}: a variable of the shell may be unset")
        try:
            word.encode()
        except UnicodeEncodeError:
            raise UserError(f"an argument is not UTF-8 text: {ascii(word[:200])[1:-1]}") from None


def lift_settings(arguments: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Take every `--section.key value` and `--task value` out of a command line; dashes and underscores are the same.

    Returns:
        (the remaining words, {dotted name: value}); --seed remains, as a flag of the verbs.
    """
    top_level = {name for name, _ in settings() if "." not in name} - {"seed"}
    left: list[str] = []
    lifted: dict[str, Any] = {}
    words = iter(arguments)
    for word in words:
        flag, equals, value = word.partition("=")
        name = flag[2:].replace("-", "_")
        if not (flag.startswith("--") and ("." in flag or name in top_level)):
            left.append(word)
            continue
        if not equals:
            value = next(words, "")
            if not value or (value.startswith("--") and "." in value):
                raise ConfigError(f"{flag} needs a value: {flag} VALUE")
        lifted[name] = parse_flag(name, value)
    return left, lifted


def make_parser() -> argparse.ArgumentParser:
    top = Parser(prog="gptlab", description="A laboratory for pretraining GPT-2-class language models.")
    top.add_argument("--version", action="version", version=f"gptlab {VERSION}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=Parser)
    looks = (runs, watch, compare, judge, compare_scores, ledger, plan, evaluate, output, verify)
    for module in (init, prepare, train, *looks, study, launch, bench, doctor, schema, completion):
        module.add_to(verbs)
    for kind in ("recipes", "studies"):
        add_json(add_verb(verbs, kind, do_list, f"List the shipped {kind}."))
    return top


def do_list(options: argparse.Namespace) -> None:
    about = {name: read_layer(name, options.verb).get("description", "") for name in shipped(options.verb)}
    width = max(map(len, about))
    with json_too(options.json) as tell:
        tell([{"name": name, "description": text} for name, text in about.items()])
        for name, text in about.items():
            print(f"{name:{width}}  {text}")
