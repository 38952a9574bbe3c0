"""AMQP values of strangers, as text and JSON that PostgreSQL can keep, in bounded size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from datetime import datetime
from itertools import islice
from typing import Any, Final

MAX_TEXT: Final = 4096
MAX_NAME: Final = 255
MAX_DEPTH: Final = 8
MAX_VALUES: Final = 500
"""Of all levels together."""
CUT: Final = "\N{HORIZONTAL ELLIPSIS}"


def plain(value: object, limit: int = MAX_NAME) -> str | None:
    """The value as text of at most so many characters, without what PostgreSQL cannot keep."""
    if value is None:
        return None
    text = value.decode("utf-8", "backslashreplace") if isinstance(value, bytes | bytearray) else str(value)
    if len(text) > limit:
        text = text[: limit - 1] + CUT
    # U+0000, and halves of surrogate pairs.
    return text.replace("\x00", "\N{SYMBOL FOR NULL}").encode("utf-8", "backslashreplace").decode()


def bounded(values: Mapping[Any, Any]) -> dict[str, Any]:
    """Headers or properties as JSON; what is too deep, too long or too much is cut, and marked by an ellipsis."""
    return _Bounded().mapping(values, 0)


class _Bounded:
    """Converts values until it has seen too many."""

    def __init__(self) -> None:
        self._left = MAX_VALUES

    def mapping(self, values: Mapping[Any, Any], depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in values.items():
            if self._left <= 0:
                found[CUT] = CUT
                break
            found[plain(name) or ""] = self.value(value, depth + 1)
        return found

    def sequence(self, values: Iterable[Any], depth: int) -> list[Any]:
        found = [self.value(value, depth + 1) for value in islice(values, max(self._left, 0))]
        return found if self._left > 0 else [*found, CUT]

    def value(self, value: Any, depth: int) -> Any:  # noqa: PLR0911 - a line for each kind of value
        self._left -= 1
        match value:
            case None | bool():
                return value
            case int() if value.bit_length() <= 64:
                return value
            case float() if math.isfinite(value):
                return value
            case Mapping() | list() | tuple() if depth > MAX_DEPTH:
                return CUT
            case Mapping():
                return self.mapping(value, depth)
            case list() | tuple():
                return self.sequence(value, depth)
            case datetime():
                return value.isoformat()
            case int() if value.bit_length() > 4096:
                # Its decimal form would take longer than it is worth.
                return CUT
            case _:
                return plain(value, MAX_TEXT)
