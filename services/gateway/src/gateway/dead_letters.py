"""Dead letters: messages that could not be run, kept as they were until a person has seen to them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.models import dead_letters
from taskmesh import celery_protocol
from taskmesh.celery_protocol import MalformedMessage, TaskMessage
from taskmesh.consuming import Delivery
from taskmesh.contracts.lifecycle import LifecycleEvent, TaskFailure, TaskKind, TaskState

EVENTS_SUFFIX = ".events"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """A message that was given up, and by whom.

    Attributes:
        queue: Where it died.
        reason: The broker's word (`rejected`, `delivery_limit`, `expired`, `maxlen`), or `malformed` from ourselves.
        task: What it says, if it can be read.
        task_id: Its task, even where the rest cannot be read.
        died_at: By the broker's clock, to the second.
    """

    queue: str
    reason: str
    exchange: str
    routing_key: str
    headers: Mapping[str, Any]
    properties: Mapping[str, Any]
    body: bytes
    task: TaskMessage | None
    task_id: UUID | None
    died_at: datetime | None

    @property
    def service(self) -> str:
        """The service whose queue it died in."""
        return self.queue.removesuffix(EVENTS_SUFFIX)

    def fingerprint(self) -> bytes:
        """The same for every delivery of the same dead letter."""
        facts = [self.queue, self.reason, str(self.task_id), str(self.died_at), self.routing_key]
        return hashlib.sha256(json.dumps(facts).encode() + b"\x00" + self.body).digest()

    def row(self) -> dict[str, Any]:
        """Its row, in values that PostgreSQL can keep."""
        return {
            "fingerprint": self.fingerprint(),
            "task_id": self.task_id,
            "type": self.task.type if self.task else _plain(self.headers.get("task")),
            "reason": _plain(self.reason) or "unknown",
            "queue": _plain(self.queue) or "unknown",
            "exchange": _plain(self.exchange) or "",
            "routing_key": _plain(self.routing_key) or "",
            "headers": _storable(self.headers),
            "properties": _storable(self.properties),
            "body": self.body,
            "died_at": self.died_at,
        }

    def failure(self, now: datetime) -> LifecycleEvent | None:
        """What the ledger shall say of its task; None when nobody can tell which task it was.

        A worker that parks a message on purpose has said why already, and the ledger keeps what it heard first. What
        is said here counts when the worker could not speak: it was killed each time, or could not read the message.
        """
        if self.task_id is None:
            return None
        expired = self.reason == "expired"
        codes = {"delivery_limit": "poison", "rejected": "rejected" if self.task else "malformed"}
        code = codes.get(self.reason, self.reason)
        return LifecycleEvent(
            task_id=self.task_id,
            type=self.task.type if self.task else _plain(self.headers.get("task")) or "unknown",
            state=TaskState.EXPIRED if expired else TaskState.FAILED,
            at=now,
            service=self.service,
            kind=TaskKind.EVENT if self.queue.endswith(EVENTS_SUFFIX) else TaskKind.COMMAND,
            sequence=self.task.sequence if self.task else 0,
            attempt=self.task.retries + 1 if self.task else 0,
            root_id=self.task.root_id if self.task else None,
            parent_id=self.task.parent_id if self.task else None,
            traceparent=self.task.traceparent if self.task else None,
            failure=TaskFailure(code=code, message=f"the message was dead-lettered from {self.queue}: {self.reason}"),
        )


def from_broker(delivery: Delivery) -> DeadLetter:
    """A dead letter as the broker routed it to us: what happened is in `x-death`, the newest first."""
    deaths = delivery.headers.get("x-death")
    death: Mapping[str, Any] = deaths[0] if isinstance(deaths, list) and deaths else {}
    queue = str(death.get("queue") or delivery.headers.get("x-first-death-queue") or delivery.routing_key)
    keys = death.get("routing-keys")
    died_at = death.get("time")
    task, task_id = _identify(delivery, queue)
    return DeadLetter(
        queue=queue,
        reason=str(death.get("reason") or delivery.headers.get("x-first-death-reason") or "unknown"),
        exchange=str(death.get("exchange", "")),
        routing_key=str(keys[0]) if isinstance(keys, list) and keys else delivery.routing_key,
        headers=delivery.headers,
        properties=delivery.properties,
        body=delivery.body,
        task=task,
        task_id=task_id,
        died_at=_utc(died_at),
    )


def _utc(moment: object) -> datetime | None:
    if not isinstance(moment, datetime):
        return None
    # pika reads AMQP timestamps as UTC, with or without saying so.
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def malformed(delivery: Delivery) -> DeadLetter:
    """A message of our own queue that we cannot read, or cannot keep."""
    return DeadLetter(
        queue=delivery.queue,
        reason="malformed",
        exchange=delivery.exchange,
        routing_key=delivery.routing_key,
        headers=delivery.headers,
        properties=delivery.properties,
        body=delivery.body,
        task=None,
        task_id=None,
        died_at=None,
    )


def _identify(delivery: Delivery, queue: str) -> tuple[TaskMessage | None, UUID | None]:
    try:
        task = celery_protocol.decode(delivery.headers, delivery.properties, delivery.body)
    except MalformedMessage:
        return None, _task_id(delivery.headers, delivery.headers.get("id"), queue)
    return task, _task_id(delivery.headers, task.id, queue)


def _task_id(headers: Mapping[str, Any], message_id: object, queue: str) -> UUID | None:
    try:
        identity = UUID(str(message_id))
    except ValueError:
        return None
    # An event has its own id until a listener takes it; a listener's retry carries the listener's already.
    is_first_delivery = headers.get(celery_protocol.EVENT_ID_HEADER) is None
    if queue.endswith(EVENTS_SUFFIX) and is_first_delivery:
        return celery_protocol.listener_task_id(identity, queue.removesuffix(EVENTS_SUFFIX))
    return identity


async def store(connection: AsyncConnection, letters: Sequence[DeadLetter]) -> None:
    """Keep dead letters; one that is kept already is not kept twice."""
    if letters:
        rows = sorted((letter.row() for letter in letters), key=lambda row: row["fingerprint"])
        await connection.execute(insert(dead_letters).on_conflict_do_nothing(), rows)


def _plain(value: object) -> str | None:
    return None if value is None else str(value).replace("\x00", "\N{SYMBOL FOR NULL}")


def _storable(value: Any) -> Any:
    """AMQP header values as JSON that PostgreSQL takes: bytes, times and NUL characters become text."""
    match value:
        case None | bool() | int() | float():
            return value
        case Mapping():
            return {_plain(name): _storable(item) for name, item in value.items()}
        case list() | tuple():
            return [_storable(item) for item in value]
        case bytes():
            return _plain(value.decode("utf-8", "backslashreplace"))
        case datetime():
            return value.isoformat()
        case _:
            return _plain(value)
