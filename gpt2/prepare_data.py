"""Prepare a dataset for train.py: `gptlab prepare` by the names of the published commands.

python3 gpt2/prepare_data.py --dataset shakespeare
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import checkout

CORPORA = {"shakespeare": "shakespeare", "finewebedu": "fineweb-edu", "openwebtext": "openwebtext"}


def call_of(words: Sequence[str]) -> list[str]:
    """The `gptlab prepare` that a command line stands for."""
    parser = argparse.ArgumentParser(
        prog="prepare_data.py",
        description="Prepare a dataset.",
        allow_abbrev=False,
        epilog="What else `gptlab prepare` takes, such as --max-documents N, is passed to it.",
    )
    parser.add_argument("--dataset", choices=list(CORPORA), default="shakespeare", help="default: shakespeare")
    parser.add_argument("--from", dest="source", metavar="PATH", help="local text, or a hub id, instead of a download")
    parser.add_argument("--out", metavar="DIR", help="default: data/CORPUS-gpt2 at the repository's root")
    options, rest = parser.parse_known_args(words)
    call = ["prepare", CORPORA[options.dataset], *rest]
    if options.source:
        is_path = Path(options.source).exists()  # or else an id
        call += ["--from", checkout.from_root(options.source) if is_path else options.source]
    return [*call, "--out", checkout.from_root(options.out)] if options.out else call


def main() -> None:
    checkout.enter()
    from gptlab import cli

    call = call_of(sys.argv[1:])
    print(shlex.join(["gptlab", *call]), flush=True)
    checkout.go_to_root()
    cli.main(call)


if __name__ == "__main__":
    main()
