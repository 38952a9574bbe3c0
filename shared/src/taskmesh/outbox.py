"""The outbox: messages that leave if, and only if, the transaction that wrote them commits.

A row waits for its `due_at`, so a follow-up task, an event, a retry and a task for next Tuesday are all the same thing.
The relay (`taskmesh.relay`) publishes due rows and deletes them once the broker has confirmed them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final
from uuid import UUID

import pydantic_core
from psycopg.types.json import Jsonb
from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Connection,
    DateTime,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    Uuid,
    func,
    insert,
    true,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.sql import Insert

metadata = MetaData()
"""The tables that every service has: outbox and inbox. Created by the library's own migrations."""

NOTIFY_CHANNEL = "taskmesh_outbox"
"""A trigger notifies it when rows are inserted and no relay keeps watch; the payload is empty."""

outbox = Table(
    "outbox",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("due_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("exchange", Text, nullable=False),
    Column("routing_key", Text, nullable=False),
    Column("mandatory", Boolean, nullable=False),
    Column("headers", JSONB, nullable=False),
    Column("properties", JSONB, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("task_id", Uuid, nullable=True),
    Column("expires_at", DateTime(timezone=True), nullable=True),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("failures", Integer, nullable=False, server_default="0"),
    Column("last_error", Text, nullable=True),
    Index("outbox_due", "due_at", "id"),
    Index("outbox_task", "task_id"),
)

outbox_watch = Table(
    "outbox_watch",
    metadata,
    Column("is_one", Boolean, primary_key=True, server_default=true()),
    Column("until", DateTime(timezone=True), nullable=False),
    CheckConstraint("is_one", name="outbox_watch_is_one"),
    prefixes=["UNLOGGED"],
)
"""Until when a relay looks at the outbox unasked, in at most one row. Unlogged: after a crash nobody keeps watch."""


@dataclass(slots=True, kw_only=True)
class OutboxMessage:
    """A message on its way into the outbox.

    Attributes:
        exchange, routing_key: Where it will be published.
        headers, properties: AMQP headers, and basic properties under pika's names; JSON values only.
        body: The bytes as they will travel.
        mandatory: A message that no queue takes is kept and reported (commands) rather than dropped (events).
        due_at: Not published before; None means at once.
        expires_at: Not published after; the relay reports the task `expired` instead.
        task_id: The task that the message carries; None for lifecycle events and manifests.
    """

    exchange: str
    routing_key: str
    body: bytes
    headers: dict[str, Any] = field(default_factory=dict)
    properties: dict[str, Any] = field(default_factory=dict)
    mandatory: bool = True
    due_at: datetime | None = None
    expires_at: datetime | None = None
    task_id: UUID | None = None


_GIVEN: Final = (
    "exchange",
    "routing_key",
    "mandatory",
    "headers",
    "properties",
    "body",
    "task_id",
    "expires_at",
)
"""Columns that are written as the message has them."""


def insert_messages(messages: Sequence[OutboxMessage]) -> Insert:
    """One INSERT for some thousands of messages at most; the caller executes it in its transaction."""
    return insert(outbox).values(
        [
            {
                "due_at": message.due_at if message.due_at is not None else func.now(),
                **{name: getattr(message, name) for name in _GIVEN},
            }
            for message in messages
        ]
    )


_PUT: Final = (
    f"insert into outbox (due_at, {', '.join(_GIVEN)}) "  # noqa: S608 - names of columns
    f"values (coalesce(%(due_at)s, now()), {', '.join(f'%({name})s' for name in _GIVEN)})"
)
"""In the driver's own form: every task writes a row or more, and to compile it costs more than to send it."""


def put(connection: Connection, messages: Sequence[OutboxMessage]) -> None:
    """Add messages to the caller's transaction; many are sent without waiting for each."""
    rows = [
        {
            **{name: getattr(message, name) for name in _GIVEN},
            "due_at": message.due_at,
            "headers": Jsonb(message.headers, dumps=pydantic_core.to_json),
            "properties": Jsonb(message.properties, dumps=pydantic_core.to_json),
        }
        for message in messages
    ]
    if rows:
        connection.exec_driver_sql(_PUT, rows if len(rows) > 1 else rows[0])
