"""Prepare a dataset for train.py: `gptlab prepare` by the names of the published commands.

python3 gpt2/prepare_data.py --dataset shakespeare
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import checkout

CORPORA = {"shakespeare": "shakespeare", "finewebedu": "fineweb-edu", "openwebtext": "openwebtext"}


def call_of(words: Sequence[str]) -> list[str]:
    """The `gptlab prepare` that a command line stands for."""
    parser = argparse.ArgumentParser(
        prog="prepare_data.py",
        description="Prepare a dataset.",
        allow_abbrev=False,
        epilog="Other arguments of `gptlab prepare`, such as --max-documents N, are passed on.",
    )
    parser.add_argument("--dataset", choices=list(CORPORA), default="shakespeare", help="default: shakespeare")
    parser.add_argument(
        "--from", dest="source", metavar="PATH", help="read this local text or Hugging Face dataset instead"
    )
    parser.add_argument("--out", metavar="DIR", help="default: data/CORPUS-gpt2 at the repository's root")
    options, rest = parser.parse_known_args(checkout.from_folder(words))
    source = ["--from", options.source] if options.source else []
    out = ["--out", options.out] if options.out else []
    return ["prepare", CORPORA[options.dataset], *rest, *source, *out]


if __name__ == "__main__":
    checkout.run(call_of)
