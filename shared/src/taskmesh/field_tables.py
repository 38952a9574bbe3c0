"""Reading AMQP field tables, the headers of messages, as strangers write them.

The protocol allows what Python's types do not: a time in the year 56,000 (somebody sent milliseconds), tables in tables
a thousand levels deep, names that are no UTF-8. pika and py-amqp raise on some of these from within their I/O loops,
before any handler sees the message: it would end a worker, or stop a consumer for good. Here all is read as something.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from struct import Struct
from typing import Any, Final

MAX_DEPTH: Final = 32
TOO_DEEP: Final = "\N{HORIZONTAL ELLIPSIS}"
"""Stands for tables and arrays below so many levels."""

_LENGTH: Final = Struct(">I")
_DECIMAL: Final = Struct(">Bi")
_TIME: Final = Struct(">Q")

# As RabbitMQ understands the letters: https://www.rabbitmq.com/docs/amqp-0-9-1-errata#section_3
_FIXED: Final[Mapping[int, Struct]] = {
    ord(letter): Struct(layout)
    for letter, layout in {
        "t": ">?",
        "b": ">b",
        "B": ">B",
        "s": ">h",
        "U": ">h",
        "u": ">H",
        "I": ">i",
        "i": ">I",
        "L": ">q",
        "l": ">q",
        "f": ">f",
        "d": ">d",
    }.items()
}


def read_table(buffer: bytes, offset: int) -> tuple[dict[str, Any], int]:
    """Read a table, and return it with the offset of what follows it.

    Names and texts that are no UTF-8 come as text with escapes, and as bytes.
    """
    return _read_table(bytes(buffer), offset, 0)


def _read_table(buffer: bytes, offset: int, depth: int) -> tuple[dict[str, Any], int]:
    table: dict[str, Any] = {}
    (length,) = _LENGTH.unpack_from(buffer, offset)
    offset += _LENGTH.size
    end = offset + length
    while offset < end:
        begin = offset + 1
        offset = begin + buffer[offset]
        name = buffer[begin:offset].decode("utf-8", "backslashreplace")
        table[name], offset = _read_value(buffer, offset, end, depth)
    return table, end


def _read_array(buffer: bytes, offset: int, depth: int) -> tuple[list[Any], int]:
    array: list[Any] = []
    (length,) = _LENGTH.unpack_from(buffer, offset)
    offset += _LENGTH.size
    end = offset + length
    while offset < end:
        value, offset = _read_value(buffer, offset, end, depth)
        array.append(value)
    return array, end


def _read_value(buffer: bytes, offset: int, end: int, depth: int) -> tuple[Any, int]:
    kind = buffer[offset]
    offset += 1
    fixed = _FIXED.get(kind)
    if fixed is not None:
        return fixed.unpack_from(buffer, offset)[0], offset + fixed.size
    read = _READERS.get(kind)
    # The length of a kind that nobody knows is not known either: what is left of the table is passed over.
    return read(buffer, offset, depth + 1) if read else (buffer[offset:end], end)


def _read_nested(
    read: Callable[[bytes, int, int], tuple[Any, int]],
) -> Callable[[bytes, int, int], tuple[Any, int]]:
    def bounded(buffer: bytes, offset: int, depth: int) -> tuple[Any, int]:
        if depth > MAX_DEPTH:
            (length,) = _LENGTH.unpack_from(buffer, offset)
            return TOO_DEEP, offset + _LENGTH.size + length
        return read(buffer, offset, depth)

    return bounded


def _read_bytes(buffer: bytes, offset: int, _: int) -> tuple[bytes, int]:
    (length,) = _LENGTH.unpack_from(buffer, offset)
    begin = offset + _LENGTH.size
    return buffer[begin : begin + length], begin + length


def _read_text(buffer: bytes, offset: int, depth: int) -> tuple[str | bytes, int]:
    value, offset = _read_bytes(buffer, offset, depth)
    try:
        return value.decode(), offset
    except UnicodeDecodeError:
        return value, offset


def _read_decimal(buffer: bytes, offset: int, _: int) -> tuple[Decimal, int]:
    places, digits = _DECIMAL.unpack_from(buffer, offset)
    return Decimal(digits).scaleb(-places), offset + _DECIMAL.size


def _read_time(buffer: bytes, offset: int, _: int) -> tuple[datetime | int, int]:
    (seconds,) = _TIME.unpack_from(buffer, offset)
    try:
        return datetime.fromtimestamp(seconds, UTC), offset + _TIME.size
    except (ValueError, OverflowError, OSError):
        return seconds, offset + _TIME.size


def _read_nothing(_: bytes, offset: int, __: int) -> tuple[None, int]:
    return None, offset


_READERS: Final[Mapping[int, Callable[[bytes, int, int], tuple[Any, int]]]] = {
    ord("S"): _read_text,
    ord("x"): _read_bytes,
    ord("D"): _read_decimal,
    ord("T"): _read_time,
    ord("F"): _read_nested(_read_table),
    ord("A"): _read_nested(_read_array),
    ord("V"): _read_nothing,
}
