"""Lifecycle events: how a service tells the ledger what became of a task.

A state change is an outbox row in the transaction that changes the state, so the ledger learns of it exactly when it
is true. The relay sends many of them in one message.
"""

from __future__ import annotations

import json
from typing import Any

from taskmesh import exchanges
from taskmesh.contracts.lifecycle import LIFECYCLE_BATCH, LifecycleEvent
from taskmesh.outbox import OutboxMessage

PROPERTIES = {"content_type": "application/json", "content_encoding": "utf-8", "delivery_mode": 2}


def message(event: LifecycleEvent) -> OutboxMessage:
    """The outbox form of one lifecycle event: a batch of one, which the relay may join with others of its key."""
    return OutboxMessage(
        exchange=exchanges.LIFECYCLE,
        routing_key=routing_key(event),
        body=encode([event]),
        # For the relay's span; it is no part of the message.
        headers={"traceparent": event.traceparent} if event.traceparent else {},
        properties=PROPERTIES,
        mandatory=True,
    )


def routing_key(event: LifecycleEvent) -> str:
    """`task.<state>.<service>`: the broker lets a service publish its own keys only."""
    return f"task.{event.state}.{event.service}"


def encode(events: list[LifecycleEvent]) -> bytes:
    """The body of a lifecycle message."""
    return LIFECYCLE_BATCH.dump_json(events, exclude_none=True, exclude_defaults=True)


def decode(body: bytes) -> list[LifecycleEvent]:
    """Read the body of a lifecycle message.

    Raises:
        pydantic.ValidationError: It is none.
    """
    return LIFECYCLE_BATCH.validate_json(body)


def json_bytes(value: Any) -> bytes:
    """The JSON form of a task's result.

    Raises:
        TypeError, ValueError: It has none.
    """
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
