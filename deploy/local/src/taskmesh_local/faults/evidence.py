"""What can be seen of a mesh from outside its processes: the services' tables, the broker's queues, the inbox."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, LiteralString
from uuid import UUID

import psycopg
from psycopg.rows import namedtuple_row

from taskmesh.management import Management
from taskmesh.parts.rabbitmq import VHOST
from taskmesh_local.collector import collected
from taskmesh_local.faults.killed import Killed
from taskmesh_local.faults.load import Books
from taskmesh_local.faults.traces import Traces, compact
from taskmesh_local.sqlite import opened

TERMINAL = ("succeeded", "failed", "cancelled", "expired")


@dataclass(frozen=True, slots=True)
class Databases:
    """The services' databases, past every proxy."""

    urls: Mapping[str, str]

    def rows(self, service: str, statement: LiteralString, *parameters: Any) -> list[Any]:
        """What a service's database answers, as named tuples."""
        with (
            psycopg.connect(self.urls[service], connect_timeout=5, autocommit=True) as connection,
            connection.cursor(row_factory=namedtuple_row) as cursor,
        ):
            return cursor.execute(statement, parameters).fetchall()

    def outboxes(self) -> dict[str, int]:
        """How many rows each service's outbox holds."""
        return {service: self.rows(service, "select count(*) from outbox")[0][0] for service in self.urls}

    def open_tasks(self) -> dict[str, int]:
        """How many tasks of the ledger are in each state that is not the last one."""
        statement = "select state, count(*) from tasks where state <> all(%s) group by state"
        return dict(self.rows("gateway", statement, list(TERMINAL)))

    def oldest_open(self, limit: int) -> list[UUID]:
        """Tasks that have waited longest for their end."""
        statement = "select id from tasks where state <> all(%s) order by created_at limit %s"
        return [row.id for row in self.rows("gateway", statement, list(TERMINAL), limit)]


def queues(management_url: str) -> dict[str, int]:
    """How many messages each queue holds, the ones that are being worked on included; some seconds old."""
    with Management(management_url) as management:
        return {queue["name"]: int(queue.get("messages", 0)) for queue in management.queues(VHOST)}


@dataclass(frozen=True)
class Evidence:
    """Everything that the invariants look at, each read once.

    Attributes:
        books: What the gateway has answered to the load.
        databases: What the services have stored.
        queues: How many messages each queue of the broker holds.
        mails: The file of the inbox page.
        audit: What the gateway's own audit says; None when nobody audits.
        spans: The collector's file; None when there was none.
        killed: The processes that were killed with their last spans in them.
    """

    books: Books
    databases: Databases
    queues: Mapping[str, int]
    mails: Path
    audit: Mapping[str, Any] | None
    spans: Path | None = None
    killed: Sequence[Killed] = ()

    @cached_property
    def traces(self) -> Traces | None:
        """The spans; None when nobody collected any."""
        return None if self.spans is None else Traces(compact(collected(self.spans)))

    @cached_property
    def tasks(self) -> dict[UUID, Any]:
        """The ledger."""
        rows = self.databases.rows(
            "gateway",
            "select id, type, kind, state, parent_id, root_id, event_id, schedule_id, api_key_id, service, attempt,"
            " error->>'code' as code, result, created_at, finished_at from tasks",
        )
        return {row.id: row for row in rows}

    @cached_property
    def endings(self) -> dict[UUID, int]:
        """How many last states each task has had."""
        statement = "select task_id, count(*) from task_events where state = any(%s) group by task_id"
        return dict(self.databases.rows("gateway", statement, list(TERMINAL)))

    @cached_property
    def effects(self) -> Counter[UUID]:
        """How often each task of the trial worker has left its effect."""
        return Counter(dict(self.databases.rows("trials", "select task_id, count(*) from effects group by task_id")))

    @cached_property
    def outboxes(self) -> dict[str, int]:
        return self.databases.outboxes()

    @cached_property
    def inboxes(self) -> dict[UUID, Any]:
        """What each service has written down of each task."""
        return {
            row.task_id: row
            for service in self.databases.urls
            if service != "gateway"
            for row in self.databases.rows(service, "select task_id, state, started_at from inbox")
        }

    @cached_property
    def messages(self) -> list[Any]:
        """The mails, as their service knows them."""
        return self.databases.rows("email", "select id, header_id, state, resends, attempt from messages")

    @cached_property
    def received(self) -> Counter[str]:
        """How often the inbox has received each Message-ID."""
        with opened(self.mails) as database:
            contents = database.execute("SELECT content FROM mails").fetchall()
        return Counter(_message_id(bytes(row[0])) for row in contents)

    @cached_property
    def dead_letters(self) -> list[Any]:
        """Those that nobody has dealt with."""
        statement = "select id, task_id, type, queue, reason from dead_letters where state = 'open'"
        return self.databases.rows("gateway", statement)


def _message_id(content: bytes) -> str:
    from email import message_from_bytes, policy

    return str(message_from_bytes(content, policy=policy.default)["Message-ID"])
