"""What a field of labels holds, as names: the same for a file of any format, and of .csv, where all values are texts.

A label is a text, a whole number or a boolean; a row has one label or a list of them, or for each label a 0 or 1. No
label is null, "", NaN, -1, or an empty list. What one row leaves open is decided by all rows of the source, so that it
is the same in every part of a preparation and after every stop.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any

from gptlab.errors import DataError

NUMBER = re.compile(r"-?\d+(\.\d+)?")


def missing(value: Any) -> bool:
    """Whether a value, or each value of a list, says that there is no label."""
    if isinstance(value, list):
        return not any(isinstance(item, list) or not missing(item) for item in value)
    if isinstance(value, str):
        return value.strip() in ("", "-1", "-1.0", "nan", "NaN")
    return value is None or (isinstance(value, int | float) and (value == -1 or math.isnan(value)))


def unpacked(value: Any) -> Any:
    """A list that is written as a text, as pandas writes it to .csv: "[0, 1, 1]" or "['a', 'b']"; or the value."""
    if not isinstance(value, str) or value[:1] + value[-1:] != "[]" or len(value) > 10**6:
        return value
    try:
        found = ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        numbers = value[1:-1].split()  # NumPy separates by spaces
        if not all(re.fullmatch(r"-?\d+\.?\d*", number) for number in numbers):
            return value
        found = [float(number) for number in numbers]
    return found if isinstance(found, list) else value


class LabelField:
    """The labels of a source.

    Args:
        name: of the field, for messages.
        values: makes an iterator over the field's values in all rows. It is read only where one row is not enough.
        classes: names of numbered labels; () leaves the numbers.
        first: the number of the first class.
    """

    def __init__(
        self, name: str, values: Callable[[], Iterable[Any]], classes: tuple[str, ...] = (), first: int = 0
    ) -> None:
        self.name, self.classes, self.first = name, classes, first
        self._values = values

    def names(self, value: Any, where: str) -> list[str] | str | None:
        """The labels of a row: each name of a list once, one name, or None if it has none.

        Raises:
            DataError: it is no label, or it can be read in two ways.
        """
        value = unpacked(value)
        if missing(value):
            return None
        if not isinstance(value, list):
            return self._name(value, where)
        for item in value:
            if missing(item):
                raise DataError(f"{where} has {item!r}, which is no label, among others in field '{self.name}'")
        if all(map(_is_flag, value)) and self._multi_hot(where):
            return [str(number) for number, flag in enumerate(value) if flag]
        return list(dict.fromkeys(self._name(item, where) for item in value))

    def _name(self, value: Any, where: str) -> str:
        if isinstance(value, str):
            value = self._from_text(value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, str) or (isinstance(value, int) and not self.classes):
            return str(value).lower() if isinstance(value, bool) else str(value)
        if type(value) is int and 0 <= value - self.first < len(self.classes):
            return self.classes[value - self.first]
        last = self.first + len(self.classes) - 1
        among = f"; the classes are {self.first} to {last}" if self.classes else ""
        if isinstance(value, dict):
            among = "; pandas writes rows with to_json(orient='records', lines=True)"
        raise DataError(
            f"{where} has the label {value!r:.60}: labels are texts, whole numbers or booleans, or lists of them{among}"
        )

    def _from_text(self, text: str) -> Any:
        """A text as it is, or what it stands for in a file that has nothing but texts."""
        if NUMBER.fullmatch(text):
            whole, _, fraction = text.partition(".")
            if self.classes or (fraction.strip("0") and self._all_numbers):
                return float(text)
            return whole if fraction and self._all_numbers else text
        if text in ("True", "TRUE", "False", "FALSE") and self._all_booleans:
            return text.lower()
        return text

    def _all(self) -> Iterator[Any]:
        """The values of all rows that say something, lists in one piece."""
        return (value for value in map(unpacked, self._values()) if not missing(value))

    def _single(self) -> Iterator[Any]:
        for value in self._all():
            yield from value if isinstance(value, list) else (value,)

    @cached_property
    def _all_numbers(self) -> bool:
        """Whether all labels are numbers: then 1.0 is a 1 that pandas wrote. Beside other texts it is one of them."""
        return all(isinstance(v, int | float) or (isinstance(v, str) and NUMBER.fullmatch(v)) for v in self._single())

    @cached_property
    def _all_booleans(self) -> bool:
        return all(isinstance(v, bool) or str(v).lower() in ("true", "false") for v in self._single())

    def _multi_hot(self, where: str) -> bool:
        """Whether lists hold a 0 or 1 for each label. Raises DataError where they may as well hold label numbers."""
        if self._flags is None:
            raise DataError(
                f"{where}: field '{self.name}' holds lists of 0 and 1 that may be label numbers, or a 0 or 1 for each "
                'label: write label numbers as texts, ["0", "1"], or a 0 or 1 for each label as false and true'
            )
        return self._flags

    @cached_property
    def _flags(self) -> bool | None:
        """True if all lists are of one length and 0 and 1 alone, and one is no list of label numbers; None if unsure.

        Label numbers do not repeat in a list, as they do in any of three flags, and are no booleans or floats.
        """
        length, sure = 0, False
        for value in self._all():
            if not isinstance(value, list) or length not in (0, len(value)) or not all(map(_is_flag, value)):
                return False
            length = len(value)
            sure = sure or len({*value}) < length or any(isinstance(flag, bool | float) for flag in value)
        return length > 1 and (sure or None)


def _is_flag(value: Any) -> bool:
    return isinstance(value, int | float) and value in (0, 1)
