"""Preparation, before training, of corpora that every machine has."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from gptlab.config import Data
from gptlab.data.prepare.folder import RECORD
from gptlab.data.prepare.pipeline import prepare
from gptlab.streams import say

OF_THIS_PYTHON = ("stdlib", "constructs")  # made of the Python that runs this, without a download
WAIT_SECONDS = 1200.0  # of the other ranks for rank 0


def is_of_this_python(data: Data) -> bool:
    """Whether a dataset can be prepared without a download. A folder that data.path names is left to the user."""
    return data.corpus in OF_THIS_PYTHON and not data.path and not data.mixture


def prepare_missing(wanted: Iterable[Data], first: bool = True, quiet: bool = False) -> None:
    """Prepare the datasets that need no download and are missing or unfinished, and say so.

    Args:
        first: whether this process prepares; the other ranks wait until the datasets are there.
    """
    for data in wanted:
        folder = Path(data.folder)
        if not is_of_this_python(data):
            continue
        if first and (not folder.exists() or (folder / RECORD).is_file()):
            if not quiet:
                say(f"{folder} is missing: preparing it from the Python that runs this")
            prepare(data.corpus, tokenizer=data.tokenizer, out=folder, progress=not quiet)
        elif not first:
            until = time.monotonic() + WAIT_SECONDS  # rank 0 ends all ranks where it fails
            while not (folder / "manifest.json").is_file() and time.monotonic() < until:
                time.sleep(0.2)
