"""Work that is cut short before a given call, as a kill may do it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest


class Killed(BaseException):
    """The process is gone."""


class Calls:
    """How many calls are left until the process is gone; 0 once it is."""

    def __init__(self, left: int) -> None:
        self.left = left

    def counted(self, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                raise Killed
            return function(*args, **kwargs)

        return call


@contextlib.contextmanager
def killed_before(number: int, *functions: tuple[Any, str]) -> Iterator[Calls]:
    """End the block before the call of this number, from 1, of any of these functions, given as (module, name)."""
    calls = Calls(number)
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
        for module, name in functions:
            patch.setattr(module, name, calls.counted(getattr(module, name)))
        yield calls
