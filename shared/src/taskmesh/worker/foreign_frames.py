"""py-amqp, made to read every frame that a broker may hand on.

It raises on texts that are no UTF-8, and on headers that Python has no value for, out of the consumer's event loop:
one message of a stranger would end the worker, and each worker after it.
"""

from __future__ import annotations

from typing import Any, Final

import amqp.abstract_channel
import amqp.serialization

from taskmesh import field_tables

_SIZES: Final = {"o": 1, "B": 2, "l": 4, "L": 8, "T": 8}
_strict_loads = amqp.serialization.loads


def install() -> None:
    """Have py-amqp read frames in this way; once or often is the same."""
    # Its functions call one another through their module.
    amqp.serialization.pstr_t = read_text
    amqp.serialization.loads = loads
    amqp.abstract_channel.loads = loads


def read_text(value: Any) -> Any:
    """A short string of a message's properties; with escapes where it is no UTF-8."""
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else value


def loads(layout: Any, buffer: bytes, offset: int) -> tuple[list[Any], int]:
    """The arguments of a method, or the table of a header frame."""
    if layout == "F":
        table, offset = field_tables.read_table(buffer, offset)
        return [table], offset
    try:
        return _strict_loads(layout, buffer, offset)  # type: ignore[no-any-return]
    except UnicodeDecodeError:
        return _strict_loads(layout, _in_ascii(layout, buffer, offset), offset)  # type: ignore[no-any-return]


def _in_ascii(layout: str, buffer: bytes, offset: int) -> bytes:
    """The frame with a question mark for each byte of its short strings that is none of ASCII."""
    plain = bytearray(buffer)
    bits = 0
    for kind in layout:
        if kind == "b":
            # Eight of them share a byte.
            offset += bits % 8 == 0
            bits += 1
            continue
        bits = 0
        if kind == "s":
            begin, offset = offset + 1, offset + 1 + buffer[offset]
            plain[begin:offset] = bytes(byte if byte < 128 else ord("?") for byte in buffer[begin:offset])
        elif kind in _SIZES:
            offset += _SIZES[kind]
        else:
            # No method that a consumer receives holds anything else.
            break
    return bytes(plain)
