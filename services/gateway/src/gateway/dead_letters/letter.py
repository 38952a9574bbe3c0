"""A dead letter as it came: where it died, what it says as far as anybody can read it, and how it is kept."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

from gateway.dead_letters.storable import bounded, plain
from taskmesh import celery_protocol, logs
from taskmesh.celery_protocol import MalformedMessage, TaskMessage
from taskmesh.consuming import Delivery
from taskmesh.contracts.lifecycle import LifecycleEvent, TaskFailure, TaskKind, TaskState
from taskmesh.topology import LIFECYCLE_QUEUE

EVENTS_SUFFIX: Final = ".events"
CONTROL_SUFFIX: Final = ".control"

COUNTS: Final = frozenset({"x-delivery-count", "x-acquired-count"})
"""Headers that differ between two deliveries of one message."""

MAX_DECOMPRESSED: Final = 4 * 1024 * 1024
"""Of a body: many letters are read together, and 64 KiB may unpack to a thousand times as much."""

VARYING: Final = re.compile(r"""'[^']*'|"[^"]*"|\b[0-9a-f]{8}-?[0-9a-f-]{8,}\b|\d+""", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What is wrong with a dead letter.

    Attributes:
        code: A failure's code, as in `tasks.error`.
        error: One sentence; names places and limits, never a value.
        exception: The class of the exception that the worker told of; None for what was found here.
        attempt: The start that it died of, if the ledger knows it.
    """

    code: str
    error: str
    exception: str | None = None
    attempt: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """A message that was given up, and by whom.

    Attributes:
        queue: Where it died.
        reason: The broker's word (`rejected`, `delivery_limit`, `expired`, `maxlen`), or `malformed` from ourselves.
        task: What it says, if it can be read.
        task_id: Its task, even where the rest cannot be read.
        fault: Why it cannot be read.
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
    fault: str | None
    died_at: datetime | None

    @property
    def service(self) -> str:
        """The service whose queue it died in."""
        return self.queue.partition(".")[0]

    @property
    def type(self) -> str | None:
        """The task's type, if it names one: what cannot be the name of a type is shown with the headers alone."""
        return self.task.type if self.task else celery_protocol.named_type(self.headers)

    @property
    def kind(self) -> TaskKind:
        """Whether it was a command, or an event on its way to one listener."""
        return TaskKind.EVENT if self.queue.endswith(EVENTS_SUFFIX) else TaskKind.COMMAND

    def fingerprint(self) -> bytes:
        """The same for every delivery of the same dead letter, and of no other."""
        headers = {name: value for name, value in self.headers.items() if name not in COUNTS}
        facts = [
            self.queue,
            self.reason,
            str(self.died_at),
            self.routing_key,
            bounded(headers),
            bounded(self.properties),
        ]
        return hashlib.sha256(json.dumps(facts).encode() + b"\x00" + self.body).digest()

    def row(self, diagnosis: Diagnosis) -> dict[str, Any]:
        """Its row, in values that PostgreSQL can keep; the body is kept byte for byte."""
        return {
            "fingerprint": self.fingerprint(),
            "task_id": self.task_id,
            "type": self.type,
            "reason": plain(self.reason) or "unknown",
            "queue": plain(self.queue) or "unknown",
            "exchange": plain(self.exchange) or "",
            "routing_key": plain(self.routing_key) or "",
            "headers": bounded(_protocol_first(self.headers)),
            "properties": bounded(self.properties),
            "body": self.body,
            "died_at": self.died_at,
            "service": plain(self.service) or "unknown",
            "code": diagnosis.code,
            "error": diagnosis.error,
            "exception": diagnosis.exception,
            "error_fingerprint": error_fingerprint(self.service, self.type, self.reason, diagnosis),
            "attempt": diagnosis.attempt,
            "trace_id": self.trace_id,
        }

    def failure(self, diagnosis: Diagnosis, now: datetime) -> LifecycleEvent | None:
        """What the ledger shall say of its task; None when nobody can tell which task it was.

        A worker that parks a message on purpose has said why already, and the ledger keeps what it heard first. What
        is said here counts when the worker could not speak: it was killed each time, or could not read the message.
        """
        if self.task_id is None:
            return None
        return LifecycleEvent(
            task_id=self.task_id,
            type=self.type or "unknown",
            state=TaskState.EXPIRED if self.reason == "expired" else TaskState.FAILED,
            at=now,
            service=self.service,
            kind=self.kind,
            sequence=self.task.sequence if self.task else 0,
            attempt=self.task.retries + 1 if self.task else 0,
            root_id=self.task.root_id if self.task else None,
            parent_id=self.task.parent_id if self.task else None,
            traceparent=self.task.traceparent if self.task else None,
            failure=TaskFailure(code=diagnosis.code, message=diagnosis.error, exception=diagnosis.exception),
        )

    @property
    def trace_id(self) -> str | None:
        """Of the trace that its message carries."""
        traceparent = self.headers.get("traceparent")
        return logs.trace_id_of(traceparent) if isinstance(traceparent, str) else None


def from_broker(delivery: Delivery) -> DeadLetter:
    """A dead letter as the broker routed it to us: what happened is in `x-death`, the newest first.

    Whatever a publisher has put into its headers, there is always a letter to keep.
    """
    headers = delivery.headers
    deaths = headers.get("x-death")
    newest = deaths[0] if isinstance(deaths, list) and deaths else None
    death: Mapping[str, Any] = newest if isinstance(newest, Mapping) else {}
    queue = _text(death.get("queue") or headers.get("x-first-death-queue") or delivery.routing_key)
    keys = death.get("routing-keys")
    task, task_id, fault = _identify(delivery, queue)
    return DeadLetter(
        queue=queue,
        reason=_text(death.get("reason") or headers.get("x-first-death-reason") or "unknown"),
        exchange=_text(death.get("exchange") or ""),
        routing_key=_text(keys[0] if isinstance(keys, list) and keys else delivery.routing_key),
        headers=headers,
        properties=delivery.properties,
        body=delivery.body,
        task=task,
        task_id=task_id,
        fault=fault,
        died_at=_utc(death.get("time")),
    )


def malformed(delivery: Delivery, fault: str, *, body: bytes | None = None, task_id: UUID | None = None) -> DeadLetter:
    """A message of our own queues that we cannot read, or cannot keep.

    Args:
        fault: Why; is stored and shown.
        body: Of the part that cannot be kept; None for the whole message.
    """
    return DeadLetter(
        queue=delivery.queue,
        reason="malformed",
        exchange=_text(delivery.exchange),
        routing_key=_text(delivery.routing_key),
        headers=delivery.headers,
        properties=delivery.properties,
        body=delivery.body if body is None else body,
        task=None,
        task_id=task_id,
        fault=fault,
        died_at=None,
    )


def error_fingerprint(service: str, type_name: str | None, reason: str, diagnosis: Diagnosis) -> str:
    """The same for letters that died of the same thing, whichever ids and figures their errors name."""
    facts = [service, type_name, reason, diagnosis.code, diagnosis.exception, _normalized(diagnosis.error)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


def _normalized(error: str) -> str:
    """The text without what differs from letter to letter: quoted parts, ids and figures."""
    return VARYING.sub("*", error)


def _identify(delivery: Delivery, queue: str) -> tuple[TaskMessage | None, UUID | None, str | None]:
    if queue == LIFECYCLE_QUEUE or queue.endswith(CONTROL_SUFFIX):
        return None, None, None
    try:
        task = celery_protocol.decode(
            delivery.headers, delivery.properties, delivery.body, max_decompressed_bytes=MAX_DECOMPRESSED
        )
    except MalformedMessage as error:
        return None, _task_id(delivery.headers, delivery.headers.get("id"), queue), str(error)
    return task, _task_id(delivery.headers, task.id, queue), None


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


def _text(value: object) -> str:
    return plain(value) or ""


def _protocol_first(headers: Mapping[str, Any]) -> dict[str, Any]:
    """The headers, in an order that lets a replay read its message although a stranger's junk was cut off."""
    return {name: headers[name] for name in celery_protocol.HEADERS if name in headers} | dict(headers)


def _utc(moment: object) -> datetime | None:
    if not isinstance(moment, datetime):
        return None
    # pika reads AMQP timestamps as UTC, with or without saying so.
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
