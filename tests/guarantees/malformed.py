"""Messages that no worker can run, of every kind that somebody thought of; the values in them are hypothesis's."""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import pika
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from taskmesh import celery_protocol
from taskmesh.celery_protocol import TaskMessage

TYPE = "orders.order.place"


@dataclass
class Message:
    """A message as it is published.

    Attributes:
        code: What the gateway must find wrong with it.
        table: Headers as bytes, for what pika does not write.
    """

    code: str = "malformed"
    headers: dict[str, Any] | None = None
    table: bytes | None = None
    properties: dict[str, Any] = field(default_factory=dict)
    body: bytes = b""
    key: str = TYPE

    def encoded(self, message_id: str) -> pika.BasicProperties:
        """Its properties and headers."""
        facts = {**self.properties, "message_id": message_id}
        if self.table is not None:
            return RawHeaders(self.table, **facts)
        return pika.BasicProperties(headers=self.headers, **facts)


class RawHeaders(pika.BasicProperties):
    """Properties whose headers are written by hand."""

    MARK = b"\x00\x00\x00\x06\x04markV"

    def __init__(self, table: bytes, **properties: Any) -> None:
        super().__init__(headers={"mark": None}, **properties)
        self._table = struct.pack(">I", len(table)) + table

    def encode(self) -> list[bytes]:
        return [b"".join(super().encode()).replace(self.MARK, self._table)]


def good(**changes: Any) -> Message:
    """A message that would be run, with changes in its headers."""
    headers, properties, body = celery_protocol.encode(TaskMessage(type=TYPE, id=uuid4(), payload={"name": "Ada"}))
    return Message(headers=headers | changes, properties=properties, body=body)


def with_body(body: bytes, **properties: Any) -> Message:
    message = good()
    message.body = body
    message.properties |= properties
    return message


def with_content(content: Any) -> Message:
    return with_body(json.dumps(content).encode())


def without(*names: str) -> Message:
    message = good()
    assert message.headers is not None
    message.headers = {name: value for name, value in message.headers.items() if name not in names}
    return message


def short(text: str) -> bool:
    return len(text.encode()) < 200


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=50)
plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    # Erlang has no other numbers: the broker closes the connection of whoever sends one.
    st.floats(allow_nan=False, allow_infinity=False),
    st.binary(max_size=50),
    texts,
    st.decimals(-1000, 1000, places=3),
    st.datetimes(datetime(1971, 1, 1), datetime(9000, 1, 1)).map(lambda at: at.replace(tzinfo=UTC)),  # noqa: DTZ001
)
amqp = st.recursive(
    plain,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts.filter(short), inner, max_size=4)),
    max_leaves=20,
)
odd = st.one_of(
    st.integers(1, 2**62), st.floats(1, 2), st.binary(min_size=1), st.just([1]), st.just({"a": 1}), st.just(True)
)
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=10,
)


def is_uuid(text: str) -> bool:
    try:
        UUID(text)
    except ValueError:
        return False
    return True


def is_json(body: bytes) -> bool:
    try:
        json.loads(body.decode())
    except ValueError:
        return False
    return True


def entry(name: bytes, kind: bytes, value: bytes) -> bytes:
    """One entry of a field table."""
    return bytes([len(name)]) + name + kind + value


def nested_table(levels: int) -> bytes:
    table = b""
    for _ in range(levels):
        table = entry(b"t", b"F", struct.pack(">I", len(table)) + table)
    return table


def raw(table: bytes) -> Message:
    message = good()
    message.table = table
    return message


FOR_WORKERS: Mapping[str, SearchStrategy[Message]] = {
    "no headers": st.just(None).map(lambda _: Message(properties=good().properties, body=good().body)),
    "junk headers": st.dictionaries(texts.filter(short), amqp, max_size=8).map(
        lambda junk: Message(headers={**junk, "task": None}, properties=good().properties, body=good().body)
    ),
    "an id is missing": st.just(None).map(lambda _: without("id")),
    "an id that is no UUID": texts.filter(lambda text: not is_uuid(text)).map(lambda text: good(id=text)),
    "an id of an odd type": odd.map(lambda value: good(id=value)),
    "an unknown task": st.from_regex(r"orders(\.[a-z]{1,9}){2}", fullmatch=True).map(
        lambda name: Message(**{**vars(good(task=name + "_x")), "code": "unknown_task"})
    ),
    "a task that is no name": st.one_of(texts.map(lambda text: text + " "), odd).map(lambda value: good(task=value)),
    "no JSON": st.binary(max_size=200)
    .map(lambda junk: b"{" + junk)
    .filter(lambda body: not is_json(body))
    .map(with_body),
    "no UTF-8": st.binary(max_size=50).map(lambda junk: with_body(b'[[], {"name": "\xff' + junk + b'"}, null]')),
    "another content type": st.sampled_from(
        ["text/plain", "application/x-python-serialize", "application/x-yaml", "json", "", "application/data"]
    ).map(lambda kind: with_body(good().body, content_type=kind)),
    "an unknown compression": st.one_of(texts.filter(bool), odd).map(lambda name: good(compression=name)),
    "another encoding than it says": st.sampled_from(["utf-16", "utf-32"]).map(
        lambda name: with_body(good().body.decode().encode(name))
    ),
    "an encoding that is a compression": st.just("gzip").map(
        lambda name: with_body(gzip.compress(good().body), content_encoding=name)
    ),
    "a body of another shape": st.one_of(
        json_values.filter(lambda value: not (isinstance(value, list) and len(value) == 3)),
        st.just([[], {}]),
        st.just({"args": [], "kwargs": {}}),
    ).map(with_content),
    "args that are no list": st.one_of(st.integers(), texts, st.just({})).map(
        lambda args: with_content([args, {}, None])
    ),
    "kwargs that are no mapping": st.one_of(st.integers(), texts, st.just([1])).map(
        lambda kwargs: with_content([[], kwargs, None])
    ),
    "an embed that is no mapping": st.one_of(st.integers(), texts, st.just([1])).map(
        lambda embed: with_content([[], {"name": "Ada"}, embed])
    ),
    "a bad eta": st.one_of(texts.map(lambda text: "x" + text), odd).map(lambda eta: good(eta=eta)),
    "a bad expiry": st.one_of(texts, odd).map(lambda moment: good(expires=moment)),
    "a bad time limit": st.one_of(texts, odd, st.lists(st.just(1), min_size=3, max_size=5)).map(
        lambda limit: good(timelimit=limit)
    ),
    "huge retries": st.one_of(
        st.integers(2**31, 2**62), st.integers(-(2**62), -1), st.sampled_from([1.5, "3", b"3", True])
    ).map(lambda retries: good(retries=retries)),
    "huge replacements": st.integers(214_749, 2**62).map(lambda nesting: good(replaced_task_nesting=nesting)),
    "a payload that breaks its contract": st.one_of(
        st.fixed_dictionaries({"name": st.one_of(st.none(), st.integers(), st.just([]))}),
        st.fixed_dictionaries({"mode": st.just("well")}),
        st.fixed_dictionaries({"name": st.just("Ada"), "mode": texts}),
        st.fixed_dictionaries({"name": st.just("Ada"), "times": st.sampled_from(["x", {}, [], 1.5])}),
        st.fixed_dictionaries({"name": st.just("Ada"), "more": json_values}),
    ).map(lambda payload: Message(**{**vars(with_content([[], payload, None])), "code": "contract_violation"})),
    "NUL characters": st.sampled_from(["task", "id", "root_id", "traceparent", "tracestate", "taskmesh_tenant"]).map(
        lambda name: good(**{name: "a\x00b"})
    ),
    "a body nested deeply": st.integers(5_000, 50_000).map(lambda depth: with_body(b"[" * depth + b"]" * depth)),
    "oversized strings": st.integers(300, 60_000).flatmap(
        lambda size: st.sampled_from(["task", "id", "root_id", "eta", "expires"]).map(
            lambda name: good(**{name: "a." + "b" * size})
        )
    ),
    "bad headers of our own": st.sampled_from(
        ["taskmesh_kind", "taskmesh_version", "taskmesh_event_id", "taskmesh_expires_at", "taskmesh_eta"]
    ).flatmap(
        lambda name: st.one_of(st.just("x"), st.just([1]), st.just(1.5)).map(lambda value: good(**{name: value}))
    ),
    "times beyond the calendar": st.integers(253_402_300_800, 2**64 - 1).map(
        lambda seconds: raw(entry(b"at", b"T", struct.pack(">Q", seconds)))
    ),
    "headers nested deeply": st.integers(40, 10_000).map(lambda levels: raw(nested_table(levels))),
    "headers that are no UTF-8": st.binary(max_size=50).map(
        lambda junk: raw(entry(b"n\xff", b"S", struct.pack(">I", len(junk) + 1) + b"\xff" + junk))
    ),
    "properties that are no UTF-8": st.sampled_from(["type", "app_id", "correlation_id", "content_type"]).map(
        lambda name: with_body(b"?", **{name: b"\xff\xfe"})
    ),
    "a routing key that is no UTF-8": st.just(b"orders.\xff").map(
        lambda key: Message(properties=good().properties, body=b"?", key=key)
    ),
}
"""Into a worker's queue, by what is wrong with them."""

TASK = {"task_id": str(uuid4()), "type": TYPE, "state": "running", "at": "2026-06-01T12:00:00Z", "service": "orders"}


def told(body: bytes, key: str = "task.running.orders") -> Message:
    return Message(properties={"content_type": "application/json", "delivery_mode": 2}, body=body, key=key)


def telling(**changes: Any) -> Message:
    return told(json.dumps([{**TASK, "task_id": str(uuid4()), **changes}]).encode())


FOR_THE_PROJECTOR: Mapping[str, SearchStrategy[Message]] = {
    "no JSON": st.binary(max_size=200).filter(lambda body: not is_json(body)).map(told),
    "another shape": json_values.filter(lambda value: value != []).map(lambda value: told(json.dumps(value).encode())),
    "a field is missing": st.sampled_from(sorted(TASK)).map(
        lambda name: told(json.dumps([{k: v for k, v in TASK.items() if k != name}]).encode())
    ),
    "a field of an odd type": st.sampled_from(["task_id", "state", "at", "kind", "sequence", "attempt"]).flatmap(
        lambda name: st.one_of(texts.map(lambda text: text + "?"), st.just([]), st.just({})).map(
            lambda value: telling(**{name: value})
        )
    ),
    "a time without an offset": st.just("2026-06-01T12:00:00").map(lambda at: telling(at=at)),
    "a NUL character in a result": texts.map(lambda text: telling(state="succeeded", result=text + "\x00")),
    "a number beyond every column": st.integers(2**31, 2**62).map(lambda number: telling(sequence=number)),
    "a name of any length": st.integers(300, 50_000).map(lambda size: telling(type="a" * size)),
    "children without an end": st.integers(300, 2000).map(
        lambda depth: told(b'[{"children":' * depth + b"[]" + b"}]" * depth)
    ),
    "nested deeply": st.integers(5_000, 50_000).map(lambda depth: told(b"[" * depth + b"]" * depth)),
    "a manifest that is none": json_values.map(lambda value: told(json.dumps(value).encode(), "manifest.orders")),
    "a sighting that is none": json_values.filter(lambda value: value != []).map(
        lambda value: told(json.dumps(value).encode(), "task.sighted.orders")
    ),
    "times beyond the calendar": st.integers(253_402_300_800, 2**64 - 1).map(
        lambda seconds: Message(table=entry(b"at", b"T", struct.pack(">Q", seconds)), body=b"?", key="task.x.orders")
    ),
    "headers nested deeply": st.integers(40, 10_000).map(
        lambda levels: Message(table=nested_table(levels), body=b"?", key="task.x.orders")
    ),
    "a routing key that is no UTF-8": st.just(b"task.\xff").map(lambda key: Message(body=b"?", key=key)),
}
"""Into the projector's queue of what workers tell."""


def examples(kinds: Mapping[str, SearchStrategy[Message]], count: int) -> Iterator[tuple[str, Message]]:
    """So many messages, the same in each run, of each kind as many as of the others."""
    share, rest = divmod(count, len(kinds))
    for place, (kind, strategy) in enumerate(kinds.items()):
        wanted = share + (place < rest)
        found = _generate(strategy, wanted)
        # A kind may have fewer faces than are wanted.
        for number in range(wanted):
            yield kind, found[number % len(found)]


def _generate(strategy: SearchStrategy[Message], most: int) -> list[Message]:
    found: list[Message] = []

    @settings(
        max_examples=most,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(message: Message) -> None:
        found.append(message)

    collect()
    return found
