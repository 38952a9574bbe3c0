"""The wire format, held against Celery's own code and against golden bytes."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from celery import Celery
from celery.app.task import Context
from hypothesis import given
from hypothesis import strategies as st
from kombu.serialization import dumps, loads

from taskmesh import celery_protocol
from taskmesh.celery_protocol import MalformedMessage, TaskMessage
from taskmesh.contracts.lifecycle import TaskKind

GOLDEN = Path(__file__).parents[1] / "contracts" / "golden"

MESSAGE = TaskMessage(
    type="billing.invoice.issue",
    id=UUID("0192a1b2-0000-7000-8000-000000000001"),
    payload={"currency": "EUR", "buyer": {"name": "Ελένη 山田 مريم"}},
    root_id=UUID("0192a1b2-0000-7000-8000-000000000000"),
    parent_id=UUID("0192a1b2-0000-7000-8000-000000000000"),
    expires_at=datetime(2026, 11, 22, 12, 0, tzinfo=UTC),
    priority=5,
    traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    version=2,
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=20),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=8,
)


def celery_message(**options: Any) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """What Celery itself would send."""
    app = Celery(set_as_current=False)
    message = app.amqp.as_task_v2(str(MESSAGE.id), MESSAGE.type, kwargs=dict(MESSAGE.payload), **options)
    content_type, content_encoding, body = dumps(message.body, "json")
    properties = {**message.properties, "content_type": content_type, "content_encoding": content_encoding}
    return message.headers, properties, body if isinstance(body, bytes) else body.encode()


@pytest.mark.parametrize("name", ["command", "event"])
def test_the_wire_bytes_are_the_golden_ones(name: str) -> None:
    """A change of the wire format is a change of this file, seen in review."""
    message = (
        MESSAGE if name == "command" else TaskMessage(type="billing.document.ready", id=MESSAGE.id, kind=TaskKind.EVENT)
    )
    headers, properties, body = celery_protocol.encode(message)

    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    assert {"headers": headers, "properties": properties, "body": body.decode()} == golden


def test_headers_and_properties_are_a_superset_of_celerys() -> None:
    """No header that Celery's worker may read is missing."""
    theirs, their_properties, _ = celery_message()
    ours, our_properties, _ = celery_protocol.encode(MESSAGE)

    assert theirs.keys() - ours.keys() == set()
    assert their_properties.keys() - our_properties.keys() <= {"reply_to"}


def test_celery_reads_our_body_as_it_reads_its_own() -> None:
    """Both bodies decode to the same arguments."""
    headers, properties, body = celery_protocol.encode(MESSAGE)
    args, kwargs, embed = loads(body, properties["content_type"], properties["content_encoding"])
    context = Context(headers, args=args, kwargs=kwargs, **embed)

    _, _, their_body = celery_message()
    assert [args, kwargs, embed] == json.loads(their_body)
    assert (context.id, context.retries, context.callbacks, context.expires) == (str(MESSAGE.id), 0, None, None)
    assert context.headers["traceparent"] == MESSAGE.traceparent


def test_a_message_of_plain_celery_is_read() -> None:
    """Expiry included, which Celery writes into a header of its own."""
    headers, properties, body = celery_message(expires=MESSAGE.expires_at, root_id=str(MESSAGE.root_id), retries=3)

    read = celery_protocol.decode(headers, properties, body)

    assert (read.type, read.id, read.payload) == (MESSAGE.type, MESSAGE.id, MESSAGE.payload)
    assert (read.root_id, read.retries, read.expires_at) == (MESSAGE.root_id, 3, MESSAGE.expires_at)
    assert read.kind is TaskKind.COMMAND


@given(payload=st.dictionaries(st.text(max_size=10), json_values, max_size=4), retries=st.integers(0, 50))
def test_what_is_encoded_is_decoded(payload: dict[str, Any], retries: int) -> None:
    """Any JSON payload comes back as it was."""
    message = TaskMessage(type="a.b", id=uuid4(), payload=payload, retries=retries, priority=3)

    read = celery_protocol.decode(*celery_protocol.encode(message))

    assert (read.payload, read.retries, read.priority, read.id) == (payload, retries, 3, message.id)


GOOD_HEADERS = {"task": "a.b", "id": str(uuid4())}


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        (None, "[[],{},null]"),
        ({}, "[[],{},null]"),
        (GOOD_HEADERS, "not json"),
        (GOOD_HEADERS, "[]"),
        (GOOD_HEADERS, "{}"),
        (GOOD_HEADERS, "5"),
        (GOOD_HEADERS, "[{},{},null]"),
        (GOOD_HEADERS, "[[],[],null]"),
        (GOOD_HEADERS, "[[],{},[]]"),
        ({**GOOD_HEADERS, "id": None}, "[[],{},null]"),
        ({**GOOD_HEADERS, "id": "invoice-42"}, "[[],{},null]"),
        ({**GOOD_HEADERS, "retries": 2**31}, "[[],{},null]"),
        ({**GOOD_HEADERS, "traceparent": "00-\x00"}, "[[],{},null]"),
        ({**GOOD_HEADERS, "taskmesh_eta": "tomorrow"}, "[[],{},null]"),
        ({**GOOD_HEADERS, "taskmesh_event_id": "an event"}, "[[],{},null]"),
        ({**GOOD_HEADERS, "id": 42}, "[[],{},null]"),
        ({**GOOD_HEADERS, "task": 5}, "[[],{},null]"),
        ({**GOOD_HEADERS, "task": "no dots"}, "[[],{},null]"),
        ({**GOOD_HEADERS, "timelimit": "soon"}, "[[],{},null]"),
        ({**GOOD_HEADERS, "timelimit": [1]}, "[[],{},null]"),
        ({**GOOD_HEADERS, "retries": -1}, "[[],{},null]"),
        ({**GOOD_HEADERS, "retries": "many"}, "[[],{},null]"),
        ({**GOOD_HEADERS, "expires": "tomorrow"}, "[[],{},null]"),
        ({**GOOD_HEADERS, "taskmesh_kind": "wish"}, "[[],{},null]"),
        ({**GOOD_HEADERS, "traceparent": 7}, "[[],{},null]"),
    ],
)
def test_a_malformed_message_is_refused_with_a_reason(headers: Any, body: str) -> None:
    """Every way of being wrong has its words, and none of them quotes the message."""
    with pytest.raises(MalformedMessage) as refusal:
        celery_protocol.decode(headers, {"content_type": "application/json"}, body.encode())

    assert str(refusal.value)
    assert "invoice-42" not in str(refusal.value)
