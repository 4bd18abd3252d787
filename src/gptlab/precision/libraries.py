"""Loading of the optional low-precision libraries, torchao and bitsandbytes."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import logging
import warnings
from typing import Any

import torch

from gptlab.errors import NotApplicable


def load_library(module: str, wanted_by: str, *names: str) -> Any:
    """Import a module of an optional library.

    Output, log records and warnings of the import are suppressed. They are mostly about extensions that do not fit
    this machine and about deprecated parts of other libraries, which gptlab does not use.

    Args:
        module: such as "torchao.float8".
        wanted_by: the setting that needs the library, such as "optim.name = adamw_8bit".
        names: attributes that the module must have.

    Raises:
        NotApplicable: the library is not installed, or does not work with this PyTorch.
    """
    library = module.partition(".")[0]
    logging_was = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            found = importlib.import_module(module)
            for name in names:
                getattr(found, name)
    except Exception as error:  # a library that is too old for this PyTorch may fail with any error
        if isinstance(error, ModuleNotFoundError) and error.name == library:
            raise NotApplicable(
                f"{wanted_by}: needs {library}, which `pip install 'gptlab[precision]'` installs"
            ) from None
        says = " ".join(str(error).split()) or "no reason given"
        raise NotApplicable(
            f"{wanted_by}: {library} {_version(library)} does not work with PyTorch {torch.__version__} "
            f"({type(error).__name__}: {says}). Run: pip install --upgrade {library}"
        ) from None
    finally:
        logging.disable(logging_was)
    return found


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "(unknown version)"
