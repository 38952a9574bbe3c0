"""What the gateway can see of one task: its row, its message, its service, and the broker as it was last looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Row, Select, func, literal, select, tuple_
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway import ledger, observations
from gateway.models import dead_letters, manifests, services, sightings, unaccounted_tasks
from gateway.observations import BrokerFacts, QueueFacts
from taskmesh.contracts.lifecycle import TaskKind, TaskState
from taskmesh.contracts.manifest import Manifest, TypeManifest
from taskmesh.outbox import outbox

FRESH_FOR: Final = timedelta(seconds=30)
"""What was seen longer ago proves nothing any more."""

MOST_AHEAD: Final = 10_000
"""Rows of the outbox are counted up to here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """The task's message in the gateway's own outbox.

    Attributes:
        ahead: Messages that were due before it and have not left, at most `MOST_AHEAD`.
        behind: For how long the first of them has been due.
    """

    due_at: datetime
    failures: int
    last_error: str | None
    ahead: int
    behind: timedelta


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """What the task's service has announced of itself; `type` is None if the task's type is not part of it."""

    release: str
    announced_at: datetime
    type: TypeManifest | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Everything that can be said of one task at one moment.

    Attributes:
        now: By the database's clock.
        queue: The queue of its service that it waits in, if it waits in one.
        control: The service's queue of control messages.
        paused: The service's row, if its workers are paused.
        dead_letter: The newest one that nobody has seen to.
        sighting: What the service last said of it.
        unaccounted: If an audit names it.
    """

    now: datetime
    task: Row[Any]
    message: Message | None
    announcement: Announcement | None
    queue_name: str
    queue: QueueFacts | None
    control: QueueFacts | None
    broker: BrokerFacts | None
    paused: Row[Any] | None
    dead_letter: Row[Any] | None
    sighting: Row[Any] | None
    unaccounted: Row[Any] | None

    @property
    def state(self) -> TaskState:
        return TaskState(self.task.state)

    def is_fresh(self, seen_at: datetime) -> bool:
        """True for what was seen so lately that it may be taken for true."""
        return self.now - seen_at <= FRESH_FOR

    def facts(self) -> dict[str, Any]:
        """All of it, in sections; what is absent is left out, and what is old says so."""
        sections = {
            "task": _columns(self.task, _TASK),
            "message": _message_facts(self.message),
            "announcement": self._announcement_facts(),
            "queue": self._observed(self.queue),
            "control_queue": self._observed(self.control) if self.task.cancel_requested_at else None,
            "broker": self._observed(self.broker),
            "paused": _columns(self.paused, ("paused_at", "pause_reason")),
            "cancellation": _columns(self.task, _CANCELLATION) if self.task.cancel_requested_at else None,
            "dead_letter": _columns(self.dead_letter, _DEAD_LETTER),
            "sighting": self._sighting_facts(),
            "unaccounted": _columns(self.unaccounted, _UNACCOUNTED),
        }
        return {name: section for name, section in sections.items() if section}

    def _announcement_facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"service": self.task.service, "type_announced": False}
        if self.announcement is not None:
            facts |= {
                "release": self.announcement.release,
                "announced_at": self.announcement.announced_at,
                "type_announced": self.announcement.type is not None,
            }
        return facts

    def _observed(self, seen: QueueFacts | BrokerFacts | None) -> dict[str, Any] | None:
        return {**asdict(seen), "stale": not self.is_fresh(seen.observed_at)} if seen is not None else None

    def _sighting_facts(self) -> dict[str, Any] | None:
        if self.sighting is None:
            return None
        return {**_columns(self.sighting, _SIGHTING), "stale": not self.is_fresh(self.sighting.seen_at)}


_TASK: Final = ("state", "attempt", "service", "due_at", "expires_at", "queued_at", "started_at", "worker", "error")
_CANCELLATION: Final = ("cancel_requested_at", "cancel_requested_by", "cancel_reason", "cancel_forced")
_DEAD_LETTER: Final = ("id", "reason", "code", "error", "queue", "received_at")
_SIGHTING: Final = ("state", "starts", "started_at", "worker", "due_at", "alive", "seen_at")
_UNACCOUNTED: Final = ("since", "last_seen_at", "last_seen_where", "redrives", "redriven_at")


def _columns(row: Row[Any] | None, names: tuple[str, ...]) -> dict[str, Any]:
    if row is None:
        return {}
    return {name: value for name in names if (value := getattr(row, name)) is not None}


def _message_facts(message: Message | None) -> dict[str, Any] | None:
    return {**asdict(message), "behind": message.behind.total_seconds()} if message is not None else None


async def gather(connection: AsyncConnection, task_id: UUID) -> Evidence:
    """Look at everything that says something of the task.

    Raises:
        NotFound: The ledger does not know it.
    """
    task = await ledger.get_task(connection, task_id)
    now: datetime = (await connection.execute(select(func.clock_timestamp()))).scalar_one()
    queue_name = task.service if task.kind == TaskKind.COMMAND else f"{task.service}.events"
    newest_letter = (
        select(dead_letters)
        .where(dead_letters.c.task_id == task_id, dead_letters.c.state == "open")
        .order_by(dead_letters.c.id.desc())
        .limit(1)
    )
    return Evidence(
        now=now,
        task=task,
        message=await _message(connection, task_id, now),
        announcement=await _announcement(connection, task),
        queue_name=queue_name,
        queue=await observations.queue(connection, queue_name),
        control=await observations.queue(connection, f"{task.service}.control"),
        broker=await observations.broker(connection),
        paused=await _first(
            connection, select(services).where(services.c.service == task.service, services.c.paused_at.is_not(None))
        ),
        dead_letter=await _first(connection, newest_letter),
        sighting=await _first(
            connection,
            select(sightings).where(sightings.c.task_id == task_id, sightings.c.service == task.service),
        ),
        unaccounted=await _first(
            connection,
            select(unaccounted_tasks).where(
                unaccounted_tasks.c.task_id == task_id,
                unaccounted_tasks.c.since.is_not(None),
                unaccounted_tasks.c.confirmed_at.is_not(None),
            ),
        ),
    )


async def _first(connection: AsyncConnection, statement: Select[Any]) -> Row[Any] | None:
    row: Row[Any] | None = (await connection.execute(statement)).first()
    return row


async def _message(connection: AsyncConnection, task_id: UUID, now: datetime) -> Message | None:
    columns = (outbox.c.id, outbox.c.due_at, outbox.c.failures, outbox.c.last_error)
    own = await _first(connection, select(*columns).where(outbox.c.task_id == task_id).order_by(outbox.c.id).limit(1))
    if own is None:
        return None
    place = tuple_(outbox.c.due_at, outbox.c.id) < tuple_(literal(own.due_at), literal(own.id))
    due = select(outbox.c.due_at).where(outbox.c.due_at <= now)
    ahead = select(func.count()).select_from(due.where(place).limit(MOST_AHEAD).subquery())
    oldest = (await connection.execute(due.order_by(outbox.c.due_at, outbox.c.id).limit(1))).scalar_one_or_none()
    return Message(
        due_at=own.due_at,
        failures=own.failures,
        last_error=own.last_error,
        ahead=(await connection.execute(ahead)).scalar_one(),
        behind=now - oldest if oldest is not None else timedelta(0),
    )


async def _announcement(connection: AsyncConnection, task: Row[Any]) -> Announcement | None:
    row = await _first(connection, select(manifests).where(manifests.c.service == task.service))
    if row is None:
        return None
    types = Manifest.model_validate(row.manifest).types
    mine = next((one for one in types if (one.type, one.kind) == (task.type, task.kind)), None)
    return Announcement(release=row.release, announced_at=row.announced_at, type=mine)


def seconds(length: timedelta) -> str:
    """A length of time as people say it: 12 s, 3 min, 5 h, 2 d."""
    units: Mapping[str, float] = {"d": 86_400, "h": 3600, "min": 60}
    total = length.total_seconds()
    name, size = next(((name, size) for name, size in units.items() if total >= 2 * size), ("s", 1.0))
    return f"{total / size:.0f} {name}"
