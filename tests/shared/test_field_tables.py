"""Headers of strangers are read as something, whatever they hold."""

from __future__ import annotations

import struct
from datetime import UTC, datetime
from decimal import Decimal

import amqp.serialization
import pika
import pytest

from taskmesh import amqp as our_amqp
from taskmesh.field_tables import MAX_DEPTH, TOO_DEEP, read_table
from taskmesh.worker import foreign_frames

FAR = 1_700_000_000_000
"""Now in milliseconds, which somebody took for seconds."""


def table(*entries: bytes) -> bytes:
    content = b"".join(entries)
    return struct.pack(">I", len(content)) + content


def entry(kind: bytes, value: bytes, name: bytes = b"x") -> bytes:
    return bytes([len(name)]) + name + kind + value


def text(value: bytes) -> bytes:
    return struct.pack(">I", len(value)) + value


def nested(levels: int) -> bytes:
    made = table()
    for _ in range(levels):
        made = table(entry(b"F", made))
    return made


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (b"t", b"\x01", True),
        (b"b", b"\xff", -1),
        (b"B", b"\xff", 255),
        (b"s", b"\xff\xfe", -2),
        (b"u", b"\xff\xfe", 65534),
        (b"I", b"\xff\xff\xff\xfd", -3),
        (b"i", b"\x00\x00\x00\x05", 5),
        (b"l", b"\xff" * 8, -1),
        (b"d", struct.pack(">d", 2.5), 2.5),
        (b"f", struct.pack(">f", 2.5), 2.5),
        (b"D", b"\x02" + struct.pack(">i", 314), Decimal("3.14")),
        (b"S", text("Zoë".encode()), "Zoë"),
        (b"S", text(b"\xff"), b"\xff"),
        (b"x", text(b"ab"), b"ab"),
        (b"T", struct.pack(">Q", 86_400), datetime(1970, 1, 2, tzinfo=UTC)),
        (b"T", struct.pack(">Q", FAR), FAR),
        (b"T", b"\xff" * 8, 2**64 - 1),
        (b"V", b"", None),
        (b"A", text(b"t\x01V"), [True, None]),
        (b"F", table(entry(b"V", b"")), {"x": None}),
        (b"?", b"what is this", b"what is this"),
    ],
)
def test_every_kind_of_value_is_read(kind, value, expected):
    encoded = table(entry(kind, value))

    assert read_table(b"??" + encoded + b"!", 2) == ({"x": expected}, 2 + len(encoded))


def test_an_unknown_kind_costs_only_what_follows_it_in_its_own_table():
    inner = table(entry(b"?", b"junk"))

    read, _ = read_table(table(entry(b"F", inner, b"inner"), entry(b"t", b"\x01", b"after")), 0)

    assert read == {"inner": {"x": b"junk"}, "after": True}


def test_tables_are_read_to_a_depth_and_passed_over_below_it():
    encoded = nested(20_000)

    read, end = read_table(encoded, 0)

    depth = 0
    value: object = read
    while isinstance(value, dict):
        depth, value = depth + 1, value["x"]
    assert (depth, value, end) == (MAX_DEPTH + 1, TOO_DEEP, len(encoded))


def test_a_name_that_is_no_utf_8_is_read_with_escapes():
    assert read_table(table(entry(b"V", b"", b"n\xff")), 0)[0] == {"n\\xff": None}


def test_pika_and_py_amqp_read_headers_this_way():
    foreign_frames.install()
    header = table(entry(b"T", struct.pack(">Q", FAR), b"at"))
    properties = b"\x20\x00" + header

    assert our_amqp.pika.BasicProperties().decode(properties).headers == {"at": FAR}
    assert amqp.serialization.decode_properties_basic(properties, 0)[0] == {"application_headers": {"at": FAR}}


def test_py_amqp_reads_a_routing_key_that_is_no_utf_8():
    """A delivery's arguments: consumer tag, delivery tag, redelivered, exchange, routing key."""
    foreign_frames.install()
    arguments = b"\x01c" + struct.pack(">Q", 0xFFFF) + b"\x01" + b"\x01e" + b"\x03a.\xff"

    values, end = amqp.abstract_channel.loads("sLbss", arguments, 0)

    assert (values, end) == (["c", 0xFFFF, True, "e", "a.?"], len(arguments))


def test_properties_that_are_no_utf_8_are_read_with_escapes():
    foreign_frames.install()

    assert amqp.serialization.decode_properties_basic(b"\x80\x00\x02\xff\xfe", 0)[0] == {"content_type": "\\xff\\xfe"}
    assert pika.BasicProperties().decode(b"\x80\x00\x02\xff\xfe").content_type == b"\xff\xfe"
