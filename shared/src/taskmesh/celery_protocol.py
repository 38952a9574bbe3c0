"""Celery message protocol v2, written and read here and nowhere else.

A Taskmesh message *is* a Celery message: plain Celery can publish to the mesh, and Celery's worker runs what the
gateway publishes. What the mesh adds travels in headers that start with `taskmesh_`, and in W3C `traceparent`.

Source: https://docs.celeryq.dev/en/stable/internals/protocol.html, held against Celery's own code by
`tests/shared/test_celery_protocol.py` and the golden files in `tests/contracts/golden/`.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any
from uuid import UUID, uuid5

import pydantic_core

from taskmesh import exchanges, logs
from taskmesh.contracts._base import TYPE_MAX_LENGTH, TYPE_PATTERN
from taskmesh.contracts.lifecycle import TaskKind
from taskmesh.errors import PermanentError
from taskmesh.outbox import OutboxMessage

KIND_HEADER = "taskmesh_kind"
VERSION_HEADER = "taskmesh_version"
TENANT_HEADER = "taskmesh_tenant"
EXPIRES_HEADER = "taskmesh_expires_at"
EVENT_ID_HEADER = "taskmesh_event_id"
ETA_HEADER = "taskmesh_eta"
"""The `eta` of a message that plain Celery published: our consumer moves it here, so no worker holds it in memory."""
TRACE_LINKS_HEADER = "taskmesh_trace_links"
"""Of a message that begins a trace of its own: what the trace is linked to. The relay reads it, and sends it not."""
RETRY_REASON_HEADER = "taskmesh_retry_reason"
"""Code of the failure that the attempt before ended with."""
DUE_HEADER = "taskmesh_due_us"
PUBLISHED_HEADER = "taskmesh_published_us"
RECEIVED_HEADER = "taskmesh_received_us"
"""When a message was due, published by a relay, and received by a worker: microseconds of Unix time."""

OF_ONE_MESSAGE = frozenset(
    {ETA_HEADER, TRACE_LINKS_HEADER, RETRY_REASON_HEADER, DUE_HEADER, PUBLISHED_HEADER, RECEIVED_HEADER}
)
"""Headers that say something of one message, and nothing of the next one of the same task."""

HEADERS = (
    "task",
    "id",
    "root_id",
    "parent_id",
    "retries",
    "replaced_task_nesting",
    "timelimit",
    "expires",
    "traceparent",
    "tracestate",
    "baggage",
    KIND_HEADER,
    VERSION_HEADER,
    TENANT_HEADER,
    EXPIRES_HEADER,
    EVENT_ID_HEADER,
    ETA_HEADER,
)
"""What `read` reads."""

REDACTED = "<redacted>"
"""Stands for the arguments in `argsrepr` and `kwargsrepr`, which Celery would fill with payload, and log."""

REPLACEMENT_STRIDE = 10_000
"""`Task.replace` keeps the id and restarts `retries` at 0, so an attempt's place is nesting * stride + retries."""

MAX_SEQUENCE = 2**31 - 1
"""What the inbox's column holds."""

ZLIB = ("application/x-gzip", "gzip", "zlib")
"""What plain Celery writes into the header `compression`; the mesh itself never compresses."""

MAX_DECOMPRESSED = 64 * 1024 * 1024


class MalformedMessage(PermanentError):
    """The message is not Celery protocol v2; the first word of the text says what is wrong with it."""

    code = "malformed"


# Not frozen, which would have each field set by a function call: this and an outbox message are made for each task.
@dataclass(slots=True, kw_only=True)
class TaskMessage:
    """One task on the wire.

    Attributes:
        payload: The contract's fields; Celery's keyword arguments.
        args: Positional arguments, as plain Celery may send; a Taskmesh publisher sends none.
        root_id: The task that a caller asked for; None means this one.
        parent_id: The task that sent this one.
        expires_at: Not started after this.
        trace_links: What the trace that begins with this message is linked to, as in `traces.Creation`.
        headers: Further headers, such as those of other tools.
    """

    type: str
    id: UUID
    payload: Mapping[str, Any] = field(default_factory=dict)
    args: tuple[Any, ...] = ()
    kind: TaskKind = TaskKind.COMMAND
    root_id: UUID | None = None
    parent_id: UUID | None = None
    retries: int = 0
    replacements: int = 0
    expires_at: datetime | None = None
    priority: int | None = None
    traceparent: str | None = None
    tracestate: str | None = None
    baggage: str | None = None
    tenant: str | None = None
    version: int = 1
    trace_links: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sequence(self) -> int:
        """Orders the attempts of one task."""
        return sequence(self.replacements, self.retries)


def sequence(replacements: int, retries: int) -> int:
    """The place of an attempt among all attempts of its task."""
    return replacements * REPLACEMENT_STRIDE + retries


def listener_task_id(event_id: UUID, service: str) -> UUID:
    """The id of the task in which `service` handles the event: one for each service, however often it is delivered."""
    return uuid5(event_id, service)


def named_type(headers: Mapping[str, Any]) -> str | None:
    """The type that headers name; None if what they name cannot be one, and might be anything."""
    name = headers.get("task")
    return name if isinstance(name, str) and _is_type(name) else None


def log_facts(headers: Mapping[str, Any] | None) -> dict[str, Any]:
    """The facts of a log line about a message's task, as far as its headers can be trusted to name one."""
    headers = headers if isinstance(headers, Mapping) else {}
    task_id = None
    with suppress(MalformedMessage):
        task_id = _uuid(headers, "id")
    retries, traceparent = headers.get("retries"), headers.get("traceparent")
    return logs.of_task(
        task_id,
        named_type(headers),
        retries + 1 if isinstance(retries, int) else None,
        traceparent=traceparent if isinstance(traceparent, str) else None,
    )


def encode(message: TaskMessage) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """Headers, basic properties (pika's names) and body of a message."""
    identity = str(message.id)
    headers: dict[str, Any] = {
        **message.headers,
        "lang": "py",
        "task": message.type,
        "id": identity,
        "shadow": None,
        "eta": None,
        "expires": None,
        "group": None,
        "group_index": None,
        "retries": message.retries,
        "timelimit": [None, None],
        "root_id": str(message.root_id or message.id),
        "parent_id": str(message.parent_id) if message.parent_id else None,
        "argsrepr": REDACTED,
        "kwargsrepr": REDACTED,
        "origin": "taskmesh",
        "ignore_result": False,
        "replaced_task_nesting": message.replacements,
        "stamped_headers": None,
        "stamps": {},
        KIND_HEADER: message.kind.value,
        VERSION_HEADER: message.version,
    }
    if message.expires_at:
        headers[EXPIRES_HEADER] = message.expires_at.isoformat()
    if message.tenant:
        headers[TENANT_HEADER] = message.tenant
    if message.traceparent:
        headers["traceparent"] = message.traceparent
    if message.tracestate:
        headers["tracestate"] = message.tracestate
    if message.baggage:
        headers["baggage"] = message.baggage
    if message.trace_links:
        headers[TRACE_LINKS_HEADER] = dict(message.trace_links)
    properties: dict[str, Any] = {
        "content_type": "application/json",
        "content_encoding": "utf-8",
        "delivery_mode": 2,
        "correlation_id": identity,
        "message_id": identity,
        "type": message.type,
    }
    if message.priority is not None:
        properties["priority"] = message.priority
    embed = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
    return headers, properties, _dumps([list(message.args), dict(message.payload), embed])


def command(message: TaskMessage, *, due_at: datetime | None = None) -> OutboxMessage:
    """The outbox form of a command: routed by its type, and never dropped when no queue takes it."""
    return _outbox(message, exchanges.COMMANDS, mandatory=True, due_at=due_at)


def event(message: TaskMessage) -> OutboxMessage:
    """The outbox form of an event: for any number of listeners, none included."""
    return _outbox(message, exchanges.EVENTS, mandatory=False, due_at=None)


def listening(message: TaskMessage, *, service: str, event_id: UUID, due_at: datetime | None = None) -> OutboxMessage:
    """The outbox form of one listener's handling of an event, under the task's own id: for that listener alone."""
    handled = replace(message, kind=TaskKind.EVENT, headers={**message.headers, EVENT_ID_HEADER: str(event_id)})
    queue = exchanges.queue_of(service, TaskKind.EVENT)
    return _outbox(handled, exchanges.DIRECT, routing_key=queue, mandatory=True, due_at=due_at)


def _outbox(
    message: TaskMessage, exchange: str, *, mandatory: bool, due_at: datetime | None, routing_key: str | None = None
) -> OutboxMessage:
    headers, properties, body = encode(message)
    return OutboxMessage(
        exchange=exchange,
        routing_key=routing_key or message.type,
        headers=headers,
        properties=properties,
        body=body,
        mandatory=mandatory,
        due_at=due_at,
        expires_at=message.expires_at,
        task_id=message.id,
    )


def decode(
    headers: Mapping[str, Any] | None,
    properties: Mapping[str, Any],
    body: bytes,
    *,
    max_decompressed_bytes: int = MAX_DECOMPRESSED,
) -> TaskMessage:
    """Read a message, or say what is wrong with it.

    Raises:
        MalformedMessage: It is not Celery protocol v2 in JSON with a UUID for an id.
    """
    content_type = properties.get("content_type")
    if content_type != "application/json":
        raise MalformedMessage("content_type must be application/json")
    compression = headers.get("compression") if headers else None
    try:
        content = json.loads(
            _text_of(_plain_body(body, compression, max_decompressed_bytes), properties.get("content_encoding"))
        )
    except UnicodeDecodeError as error:
        raise MalformedMessage("body is not UTF-8") from error
    except ValueError as error:
        raise MalformedMessage("body is not JSON") from error
    except RecursionError as error:
        raise MalformedMessage("body is nested too deeply") from error
    return read(headers, content, priority=properties.get("priority"))


def read(headers: Mapping[str, Any] | None, content: Any, *, priority: int | None = None) -> TaskMessage:
    """Read a message whose body is decoded already, as Celery's consumer hands it over.

    Raises:
        MalformedMessage: Like `decode`.
    """
    if not isinstance(headers, Mapping):
        raise MalformedMessage("headers are missing")
    args, kwargs = _arguments(content)
    type_name = headers.get("task")
    if not isinstance(type_name, str) or not _is_type(type_name):
        raise MalformedMessage("task must be a name like 'billing.invoice.issue'")
    timelimit = headers.get("timelimit")
    if timelimit is not None and not _is_timelimit(timelimit):
        raise MalformedMessage("timelimit must be two numbers or nulls")
    task_id = _uuid(headers, "id")
    if task_id is None:
        raise MalformedMessage("id is missing")
    try:
        kind = TaskKind(headers.get(KIND_HEADER, TaskKind.COMMAND))
    except ValueError as error:
        raise MalformedMessage(f"{KIND_HEADER} must be command or event") from error
    # No part of the task, but trusted by whoever handles it.
    _time(headers, ETA_HEADER)
    _uuid(headers, EVENT_ID_HEADER)
    if headers.get("eta"):
        _moment(headers, "eta")
    task = TaskMessage(
        type=type_name,
        id=task_id,
        payload=kwargs,
        args=args,
        kind=kind,
        root_id=_uuid(headers, "root_id"),
        parent_id=_uuid(headers, "parent_id"),
        retries=_count(headers, "retries"),
        replacements=_count(headers, "replaced_task_nesting"),
        expires_at=_time(headers, EXPIRES_HEADER) or _time(headers, "expires"),
        priority=priority,
        traceparent=_text(headers, "traceparent"),
        tracestate=_text(headers, "tracestate"),
        baggage=_text(headers, "baggage"),
        tenant=_text(headers, TENANT_HEADER),
        version=_count(headers, VERSION_HEADER, default=1),
    )
    if task.sequence > MAX_SEQUENCE:
        raise MalformedMessage("retries and replaced_task_nesting are too large")
    return task


def _plain_body(body: bytes, compression: Any, max_bytes: int) -> bytes:
    if not compression:
        return body
    if compression not in ZLIB:
        raise MalformedMessage("compression must be gzip")
    decompressor = zlib.decompressobj()
    try:
        plain = decompressor.decompress(body, max_bytes)
    except zlib.error as error:
        raise MalformedMessage("body is not compressed as its header says") from error
    if not decompressor.eof:
        raise MalformedMessage("body is too large, or cut off")
    return plain


def _text_of(body: bytes, encoding: Any) -> str:
    """The body as py-amqp and kombu read it: as its encoding says, and as UTF-8 where that leads to nothing."""
    if isinstance(encoding, str):
        with suppress(LookupError, ValueError):
            return body.decode(encoding)
    return body.decode()


def _arguments(content: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    if not isinstance(content, list | tuple) or len(content) != 3:
        raise MalformedMessage("body must be [args, kwargs, embed]")
    args, kwargs, embed = content
    if not isinstance(args, list | tuple):
        raise MalformedMessage("args must be a list")
    if not isinstance(kwargs, Mapping):
        raise MalformedMessage("kwargs must be a mapping")
    if embed is not None and not isinstance(embed, Mapping):
        raise MalformedMessage("embed must be a mapping")
    return tuple(args), kwargs


def _dumps(content: Any) -> bytes:
    return pydantic_core.to_json(content)


def _is_timelimit(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(limit is None or (isinstance(limit, int | float) and not isinstance(limit, bool)) for limit in value)
    )


def _is_type(name: str) -> bool:
    return len(name) <= TYPE_MAX_LENGTH and bool(TYPE_PATTERN.fullmatch(name))


def _uuid(headers: Mapping[str, Any], name: str) -> UUID | None:
    value = headers.get(name)
    if value is None:
        return None
    try:
        return UUID(value)
    except (ValueError, AttributeError, TypeError) as error:
        raise MalformedMessage(f"{name} must be a UUID") from error


def _count(headers: Mapping[str, Any], name: str, *, default: int = 0) -> int:
    value = headers.get(name, default)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise MalformedMessage(f"{name} must be a whole number")
    return value


def _time(headers: Mapping[str, Any], name: str) -> datetime | None:
    if headers.get(name) is None:
        return None
    moment = _moment(headers, name)
    if moment.tzinfo is None:
        raise MalformedMessage(f"{name} must have an offset")
    return moment


def _moment(headers: Mapping[str, Any], name: str) -> datetime:
    try:
        return datetime.fromisoformat(headers[name])
    except (ValueError, TypeError) as error:
        raise MalformedMessage(f"{name} must be an ISO 8601 time") from error


def _text(headers: Mapping[str, Any], name: str) -> str | None:
    value = headers.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or "\x00" in value:
        raise MalformedMessage(f"{name} must be text")
    return value
