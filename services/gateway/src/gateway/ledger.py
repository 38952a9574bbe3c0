"""The ledger: every task, its state, and how it came there.

Functions take an AsyncConnection first and never commit. READ COMMITTED is assumed. Rows travel to PostgreSQL as one
JSON parameter and are unfolded there, so one task and five hundred are the same statement.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

import pydantic_core
from sqlalchemy import ColumnElement, Row, Select, and_, func, literal, select, text, tuple_
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.identifiers import uuid7
from gateway.models import TASKS_CHANNEL, task_events, tasks
from taskmesh import celery_protocol
from taskmesh.celery_protocol import TaskMessage
from taskmesh.contracts.lifecycle import TERMINAL, LifecycleEvent, TaskKind, TaskState
from taskmesh.errors import NotFound
from taskmesh.outbox import OutboxMessage

RANK: Final[Mapping[TaskState, int]] = {
    TaskState.SCHEDULED: 0,
    TaskState.QUEUED: 1,
    TaskState.RUNNING: 2,
    TaskState.RETRYING: 3,
    TaskState.SUCCEEDED: 4,
    TaskState.FAILED: 4,
    TaskState.CANCELLED: 4,
    TaskState.EXPIRED: 4,
}
"""Orders the states within one attempt; between attempts `sequence` decides."""

STARTED: Final = frozenset({TaskState.RUNNING, TaskState.RETRYING, TaskState.SUCCEEDED, TaskState.FAILED})
"""States that an attempt can be in only after it was started."""

BEFORE_EVERYTHING: Final = -1
"""The sequence of a task that the ledger learns of through its first event: any event is news to it."""

# NOTIFY takes fewer than 8000 bytes; a root id in hexadecimal and its comma are 33.
ROOTS_A_NOTIFICATION: Final = 240


@dataclass(frozen=True, slots=True, kw_only=True)
class NewTask:
    """A task that somebody has asked for, with its id and its time of birth.

    Attributes:
        due_at: Not published before; None means at once.
        traceparent: The creation context that its message carries.
        root_id: None makes it its own root.
        event_id: The event that it handles, if it is a listener's task.
        retry_of: The task that this one is another try of.
    """

    type: str
    service: str
    payload: Mapping[str, Any]
    version: int = 1
    id: UUID = field(default_factory=uuid7)
    created_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    due_at: datetime | None = None
    expires_at: datetime | None = None
    priority: int | None = None
    tags: Sequence[str] = ()
    schedule_id: UUID | None = None
    api_key_id: UUID | None = None
    traceparent: str | None = None
    kind: TaskKind = TaskKind.COMMAND
    root_id: UUID | None = None
    parent_id: UUID | None = None
    event_id: UUID | None = None
    retry_of: UUID | None = None

    @property
    def state(self) -> TaskState:
        """`scheduled` until the due time, and `queued` from the start when there is none."""
        waits = self.due_at is not None and self.due_at > self.created_at
        return TaskState.SCHEDULED if waits else TaskState.QUEUED

    def row(self) -> dict[str, Any]:
        """Its first row in the ledger, which is also what the caller is shown."""
        return {
            "id": self.id,
            "type": self.type,
            "kind": self.kind,
            "state": self.state,
            "attempt": 0,
            "service": self.service,
            "version": self.version,
            "payload": self.payload,
            "result": None,
            "error": None,
            "priority": self.priority,
            "tags": list(self.tags),
            "parent_id": self.parent_id,
            "root_id": self.root_id or self.id,
            "event_id": self.event_id,
            "schedule_id": self.schedule_id,
            "api_key_id": self.api_key_id,
            "created_at": self.created_at,
            "due_at": self.due_at,
            "expires_at": self.expires_at,
            "queued_at": self.created_at if self.state is TaskState.QUEUED else None,
            "started_at": None,
            "finished_at": None,
            "updated_at": self.created_at,
            "trace_id": trace_id_of(self.traceparent),
            "cancel_requested_at": None,
            "cancel_reason": None,
            "retry_of": self.retry_of,
            "retried_as": None,
        }

    def message(self) -> OutboxMessage:
        """The message that its worker will receive."""
        message = TaskMessage(
            type=self.type,
            id=self.id,
            payload=self.payload,
            kind=self.kind,
            root_id=self.root_id,
            parent_id=self.parent_id,
            expires_at=self.expires_at,
            priority=self.priority,
            traceparent=self.traceparent,
            version=self.version,
        )
        if self.kind is TaskKind.EVENT:
            return celery_protocol.listening(
                message, service=self.service, event_id=self.event_id or self.id, due_at=self.due_at
            )
        return celery_protocol.command(message, due_at=self.due_at)


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Which tasks to list; None leaves a field open."""

    type: str | None = None
    state: TaskState | None = None
    tag: str | None = None
    root_id: UUID | None = None
    parent_id: UUID | None = None
    schedule_id: UUID | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None


@dataclass(frozen=True, slots=True)
class Position:
    """Where a page ended: the key of its last task."""

    created_at: datetime
    id: UUID


def trace_id_of(traceparent: str | None) -> str | None:
    """The trace id inside a W3C traceparent."""
    parts = (traceparent or "").split("-")
    return parts[1] if len(parts) >= 4 and len(parts[1]) == 32 else None


_SUBMIT = text(
    """
    with given as materialized (
        select *
        from json_to_recordset(cast(:rows as json)) as r(
            id uuid, type text, kind text, state text, service text, version integer, payload jsonb, priority smallint,
            tags text[], parent_id uuid, root_id uuid, event_id uuid, schedule_id uuid, api_key_id uuid,
            created_at timestamptz, due_at timestamptz, expires_at timestamptz, queued_at timestamptz,
            updated_at timestamptz, trace_id text, retry_of uuid, exchange text, routing_key text, mandatory boolean,
            headers jsonb, properties jsonb, body text)
    ), messages as (
        -- At once means now() by the database's clock, which is also the relay's.
        insert into outbox (due_at, exchange, routing_key, mandatory, headers, properties, body, task_id, expires_at)
        select coalesce(due_at, now()), exchange, routing_key, mandatory, headers, properties,
               convert_to(body, 'UTF8'), id, expires_at
        from given
    ), new as (
        insert into tasks (id, type, kind, state, service, version, payload, priority, tags, parent_id, root_id,
                           event_id, schedule_id, api_key_id, created_at, due_at, expires_at, queued_at, updated_at,
                           trace_id, retry_of)
        select id, type, kind, state, service, version, payload, priority, tags, parent_id, root_id, event_id,
               schedule_id, api_key_id, created_at, due_at, expires_at, queued_at, updated_at, trace_id, retry_of
        from given
        returning id, root_id, state, attempt, created_at, due_at
    )
    insert into task_events (task_id, root_id, state, attempt, at, detail)
    select id, root_id, state, attempt, created_at,
           case when due_at is not null then jsonb_build_object('due_at', due_at) end
    from new order by created_at, id
    """
)


async def submit(connection: AsyncConnection, new: Sequence[NewTask]) -> None:
    """Write tasks, the beginning of their timelines, and their messages: all of it or, with the caller, nothing."""
    if new:
        await connection.execute(_SUBMIT, {"rows": _rows({**_message_row(task), **task.row()} for task in new)})


def _message_row(task: NewTask) -> dict[str, Any]:
    """What the outbox has beyond the task's own row; the body is JSON, and so text."""
    message = task.message()
    return {
        "exchange": message.exchange,
        "routing_key": message.routing_key,
        "mandatory": message.mandatory,
        "headers": message.headers,
        "properties": message.properties,
        "body": message.body.decode(),
    }


def _rows(rows: Iterable[Mapping[str, Any]]) -> str:
    return pydantic_core.to_json(list(rows)).decode()


async def get_task(connection: AsyncConnection, task_id: UUID) -> Row[Any]:
    """The task.

    Raises:
        NotFound: The ledger does not know it.
    """
    row = (await connection.execute(select(tasks).where(tasks.c.id == task_id))).one_or_none()
    if row is None:
        raise NotFound(f"there is no task {task_id}")
    return row


async def lock(connection: AsyncConnection, task_ids: Iterable[UUID]) -> None:
    """Keep others from changing these tasks until the transaction ends; in the order in which `advance` locks them."""
    statement = (
        select(tasks.c.id)
        .where(tasks.c.id == func.any(sorted(set(task_ids))))
        .order_by(tasks.c.id)
        .with_for_update(key_share=True)
    )
    await connection.execute(statement)


async def list_tasks(
    connection: AsyncConnection, wanted: Filter, *, after: Position | None, limit: int
) -> Sequence[Row[Any]]:
    """One page, newest first. Tasks that arrive between two pages belong before the first and move nothing."""
    statement = select(tasks).where(*_conditions(wanted)).order_by(tasks.c.created_at.desc(), tasks.c.id.desc())
    if after is not None:
        key = tuple_(tasks.c.created_at, tasks.c.id)
        statement = statement.where(key < tuple_(literal(after.created_at), literal(after.id)))
    return (await connection.execute(statement.limit(limit))).all()


def _conditions(wanted: Filter) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = []
    if wanted.type is not None:
        conditions.append(tasks.c.type == wanted.type)
    if wanted.state is not None:
        # Written out rather than bound, so that the planner sees that the partial index covers it.
        conditions.append(text("tasks.state = '" + wanted.state.value + "'"))  # type: ignore[arg-type]
    if wanted.tag is not None:
        conditions.append(and_(tasks.c.tags.contains([wanted.tag]), text("tasks.tags <> '{}'")))
    if wanted.root_id is not None:
        conditions.append(tasks.c.root_id == wanted.root_id)
    if wanted.parent_id is not None:
        conditions.append(tasks.c.parent_id == wanted.parent_id)
    if wanted.schedule_id is not None:
        conditions.append(tasks.c.schedule_id == wanted.schedule_id)
    if wanted.created_after is not None:
        conditions.append(tasks.c.created_at > wanted.created_after)
    if wanted.created_before is not None:
        conditions.append(tasks.c.created_at < wanted.created_before)
    return conditions


async def read_timeline(
    connection: AsyncConnection, root_id: UUID, *, task_id: UUID | None, after: int, limit: int = 500
) -> Sequence[Row[Any]]:
    """What happened to a task, or to its whole tree when `task_id` is None, after the event numbered `after`."""
    statement = (
        select(task_events)
        .where(task_events.c.root_id == root_id, task_events.c.seq > after)
        .order_by(task_events.c.seq)
        .limit(limit)
    )
    if task_id is not None:
        statement = statement.where(task_events.c.task_id == task_id)
    return (await connection.execute(statement)).all()


async def count_unfinished(connection: AsyncConnection, root_id: UUID, *, task_id: UUID | None = None) -> int:
    """How many tasks of a tree, as far as the ledger knows it, are on their way; or whether the one is."""
    terminal = [state.value for state in TERMINAL]
    statement = select(func.count()).where(tasks.c.root_id == root_id, tasks.c.state.not_in(terminal))
    if task_id is not None:
        statement = statement.where(tasks.c.id == task_id)
    return (await connection.execute(statement)).scalar_one()


_INSERT_UNKNOWN = text(
    """
    insert into tasks (id, type, kind, state, sequence, service, parent_id, root_id, event_id, expires_at,
                       created_at, updated_at, trace_id)
    select id, type, kind, 'queued', :before_everything, service, parent_id, root_id, event_id, expires_at,
           at, at, trace_id
    from json_to_recordset(cast(:rows as json)) as r(
        id uuid, type text, kind text, service text, parent_id uuid, root_id uuid, event_id uuid,
        expires_at timestamptz, at timestamptz, trace_id text)
    where not exists (select from tasks where tasks.id = r.id)
    order by id
    on conflict (id) do nothing
    """
)

_ADVANCE = text(
    """
    update tasks set
        state = r.state,
        sequence = r.sequence,
        attempt = r.attempt,
        result = r.result,
        error = r.error,
        due_at = r.due_at,
        queued_at = r.queued_at,
        started_at = r.started_at,
        finished_at = r.finished_at,
        worker = r.worker,
        updated_at = r.updated_at
    from json_to_recordset(cast(:rows as json)) as r(
        id uuid, state text, sequence integer, attempt integer, result jsonb, error jsonb, due_at timestamptz,
        queued_at timestamptz, started_at timestamptz, finished_at timestamptz, worker text, updated_at timestamptz)
    where tasks.id = r.id
    """
)

_APPEND_TIMELINE = text(
    """
    insert into task_events (task_id, root_id, state, attempt, at, detail)
    select task_id, root_id, state, attempt, at, detail
    from json_to_recordset(cast(:rows as json)) as r(
        position integer, task_id uuid, root_id uuid, state text, attempt integer, at timestamptz, detail jsonb)
    order by position
    """
)

_NOTIFY = text("select pg_notify(:channel, part) from unnest(cast(:parts as text[])) as part")


@dataclass(slots=True, kw_only=True)
class _Progress:
    """A task's row while a batch of events is applied to it; the fields are columns."""

    id: UUID
    root_id: UUID
    state: TaskState
    sequence: int
    attempt: int
    result: Any
    error: dict[str, Any] | None
    due_at: datetime | None
    queued_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None
    worker: str | None
    updated_at: datetime

    def accepts(self, event: LifecycleEvent) -> bool:
        """True for what is news; terminal states are final."""
        if self.state.terminal:
            return False
        return (event.sequence, RANK[event.state]) > (self.sequence, RANK[self.state])

    def note(self, event: LifecycleEvent) -> bool:
        """Keep what stays true however late it is told: when it was first queued and started, and how often."""
        before = (self.attempt, self.queued_at, self.started_at)
        if event.state in STARTED:
            self.attempt = max(self.attempt, event.attempt)
        if event.state is TaskState.QUEUED:
            self.queued_at = _earlier(self.queued_at, event.at)
        self.started_at = _earlier(self.started_at, event.started_at)
        if event.state is TaskState.RUNNING:
            self.started_at = _earlier(self.started_at, event.at)
        return before != (self.attempt, self.queued_at, self.started_at)

    def move(self, event: LifecycleEvent) -> None:
        """Go to the state that the event tells of."""
        self.state, self.sequence, self.updated_at = event.state, event.sequence, event.at
        self.due_at = event.due_at or self.due_at
        self.worker = event.worker or self.worker
        if event.failure is not None:
            self.error = event.failure.model_dump()
        elif event.state is TaskState.SUCCEEDED:
            self.error = None
        if event.state.terminal:
            self.result, self.finished_at = event.result, event.at


def _earlier(known: datetime | None, told: datetime | None) -> datetime | None:
    return min((at for at in (known, told) if at is not None), default=None)


async def advance(connection: AsyncConnection, events: Sequence[LifecycleEvent]) -> int:
    """Bring tasks forward by what their workers say, and count the events that were news.

    Late, repeated and reordered events are harmless. Tasks that the ledger has not seen are added to it. Rows are
    inserted and then locked in the order of their ids, so two projectors with overlapping batches cannot deadlock. The
    root's row is locked as well: whoever appends to the timeline of a tree does so alone, so `seq` grows in the order
    in which transactions commit, and a reader that has seen 11 will never find a 10 that was not there before.
    """
    if not events:
        return 0
    ordered = sorted(events, key=lambda event: (event.sequence, RANK[event.state], event.at))
    await connection.execute(
        _INSERT_UNKNOWN, {"rows": _rows(_introductions(ordered)), "before_everything": BEFORE_EVERYTHING}
    )
    progress = await _lock(connection, ordered)
    changed: dict[UUID, _Progress] = {}
    accepted: list[dict[str, Any]] = []
    for event in ordered:
        task = progress[event.task_id]
        if task.note(event):
            changed[task.id] = task
        if task.accepts(event):
            task.move(event)
            changed[task.id] = task
            accepted.append(_timeline_row(len(accepted), task, event))
    if changed:
        await connection.execute(_ADVANCE, {"rows": _rows(asdict(task) for task in changed.values())})
    if accepted:
        await connection.execute(_APPEND_TIMELINE, {"rows": _rows(accepted)})
        await notify(connection, {row["root_id"] for row in accepted})
    return len(accepted)


def _introductions(events: Iterable[LifecycleEvent]) -> list[dict[str, Any]]:
    """What each task's row would say if the ledger did not know the task yet."""
    rows: dict[UUID, dict[str, Any]] = {}
    for event in events:
        row = rows.get(event.task_id)
        if row is None:
            rows[event.task_id] = {
                "id": event.task_id,
                "type": event.type,
                "kind": event.kind,
                "service": event.service,
                "parent_id": event.parent_id,
                "root_id": event.root_id or event.task_id,
                "event_id": event.event_id,
                "expires_at": event.expires_at,
                "at": event.at,
                "trace_id": trace_id_of(event.traceparent),
            }
        else:
            row["at"] = min(row["at"], event.at)
    return list(rows.values())


async def _lock(connection: AsyncConnection, events: Iterable[LifecycleEvent]) -> dict[UUID, _Progress]:
    wanted: set[UUID] = set()
    for event in events:
        wanted.add(event.task_id)
        wanted.add(event.root_id or event.task_id)
    statement: Select[Any] = (
        select(*_PROGRESS_COLUMNS)
        .where(tasks.c.id == func.any(sorted(wanted)))
        .order_by(tasks.c.id)
        .with_for_update(key_share=True)
    )
    rows = (await connection.execute(statement)).mappings()
    return {row["id"]: _Progress(**{**row, "state": TaskState(row["state"])}) for row in rows}


_PROGRESS_COLUMNS: Final = tuple(tasks.c[column.name] for column in fields(_Progress))


def _timeline_row(position: int, task: _Progress, event: LifecycleEvent) -> dict[str, Any]:
    detail = {
        "due_at": event.due_at,
        "worker": event.worker,
        "failure": event.failure.model_dump(exclude_none=True) if event.failure else None,
    }
    return {
        "position": position,
        "task_id": task.id,
        "root_id": task.root_id,
        "state": event.state,
        "attempt": task.attempt,
        "at": event.at,
        "detail": {name: value for name, value in detail.items() if value is not None} or None,
    }


async def notify(connection: AsyncConnection, roots: Iterable[UUID]) -> None:
    """Wake, once the transaction has committed, whoever waits for something to happen in these trees."""
    names = sorted(root.hex for root in roots)
    parts = [
        ",".join(names[start : start + ROOTS_A_NOTIFICATION]) for start in range(0, len(names), ROOTS_A_NOTIFICATION)
    ]
    await connection.execute(_NOTIFY, {"channel": TASKS_CHANNEL, "parts": parts})


async def mark_queued(connection: AsyncConnection, task_ids: Iterable[UUID], *, at: datetime) -> int:
    """Say that messages of these tasks have left; only those that were waiting for their due time change."""
    rows = await connection.execute(
        select(tasks.c.id, tasks.c.type, tasks.c.root_id, tasks.c.sequence, tasks.c.service).where(
            tasks.c.id == func.any(sorted(task_ids)), tasks.c.state == TaskState.SCHEDULED.value
        )
    )
    return await advance(connection, [_step(row, TaskState.QUEUED, at) for row in rows])


async def mark_expired(connection: AsyncConnection, task_ids: Iterable[UUID], *, at: datetime) -> int:
    """Say that these tasks were not published before they expired."""
    rows = await connection.execute(
        select(tasks.c.id, tasks.c.type, tasks.c.root_id, tasks.c.sequence, tasks.c.service).where(
            tasks.c.id == func.any(sorted(task_ids))
        )
    )
    return await advance(connection, [_step(row, TaskState.EXPIRED, at) for row in rows])


def _step(row: Row[*tuple[Any, ...]], state: TaskState, at: datetime) -> LifecycleEvent:
    return LifecycleEvent(
        task_id=row.id,
        type=row.type,
        state=state,
        at=at,
        service=row.service,
        sequence=row.sequence,
        root_id=row.root_id,
        # Nothing has run: the attempt counter stays where it is.
        attempt=0,
    )
