"""The ledger: every task, its state, and how it came there.

Functions take an AsyncConnection first and never commit. READ COMMITTED is assumed. Rows travel to PostgreSQL as one
JSON parameter and are unfolded there, so one task and five hundred are the same statement.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from typing import Any, Final
from uuid import UUID

import pydantic_core
from sqlalchemy import ColumnElement, Row, Select, and_, func, literal, select, text, tuple_
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.models import TASKS_CHANNEL, task_events, tasks
from gateway.new_tasks import NewTask
from gateway.progress import BEFORE_EVERYTHING, Progress, Step, place_of
from taskmesh import logs
from taskmesh.contracts.lifecycle import TERMINAL, LifecycleEvent, TaskState
from taskmesh.errors import NotFound
from taskmesh.traces import Creation

# NOTIFY takes fewer than 8000 bytes; a root id in hexadecimal and its comma are 33.
ROOTS_A_NOTIFICATION: Final = 240


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


_SUBMIT = text(
    """
    with given as materialized (
        select *
        from json_to_recordset(cast(:rows as json)) as r(
            id uuid, type text, kind text, state text, service text, version integer, payload jsonb, priority smallint,
            tags text[], parent_id uuid, root_id uuid, event_id uuid, schedule_id uuid, api_key_id uuid,
            created_at timestamptz, due_at timestamptz, expires_at timestamptz, queued_at timestamptz,
            updated_at timestamptz, trace_id text, span_id text, retry_of uuid, exchange text, routing_key text,
            mandatory boolean, headers jsonb, properties jsonb, body text)
    ), messages as (
        -- At once means now() by the database's clock, which is also the relay's.
        insert into outbox (due_at, exchange, routing_key, mandatory, headers, properties, body, task_id, expires_at)
        select coalesce(due_at, now()), exchange, routing_key, mandatory, headers, properties,
               convert_to(body, 'UTF8'), id, expires_at
        from given
    ), new as (
        insert into tasks (id, type, kind, state, service, version, payload, priority, tags, parent_id, root_id,
                           event_id, schedule_id, api_key_id, created_at, due_at, expires_at, queued_at, updated_at,
                           trace_id, span_id, retry_of)
        select id, type, kind, state, service, version, payload, priority, tags, parent_id, root_id, event_id,
               schedule_id, api_key_id, created_at, due_at, expires_at, queued_at, updated_at, trace_id, span_id,
               retry_of
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
                       created_at, updated_at, trace_id, span_id)
    select id, type, kind, 'queued', :before_everything, service, parent_id, root_id, event_id, expires_at,
           at, at, trace_id, span_id
    from json_to_recordset(cast(:rows as json)) as r(
        id uuid, type text, kind text, service text, parent_id uuid, root_id uuid, event_id uuid,
        expires_at timestamptz, at timestamptz, trace_id text, span_id text)
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
        updated_at = r.updated_at,
        payload = coalesce(tasks.payload, r.payload)
    from json_to_recordset(cast(:rows as json)) as r(
        id uuid, state text, sequence integer, attempt integer, result jsonb, error jsonb, due_at timestamptz,
        queued_at timestamptz, started_at timestamptz, finished_at timestamptz, worker text, updated_at timestamptz,
        payload jsonb)
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


async def advance(connection: AsyncConnection, events: Sequence[LifecycleEvent]) -> list[Step]:
    """Bring tasks forward by what their workers say, and return the steps that were news.

    Late, repeated and reordered events are harmless. Tasks that the ledger has not seen are added to it. Rows are
    inserted and then locked in the order of their ids, so two projectors with overlapping batches cannot deadlock. The
    root's row is locked as well: whoever appends to the timeline of a tree does so alone, so `seq` grows in the order
    in which transactions commit, and a reader that has seen 11 will never find a 10 that was not there before.
    """
    if not events:
        return []
    # A payload is kept whenever it is told, and never read back: rows are locked without it.
    payloads = {event.task_id: event.payload for event in events if event.payload is not None}
    ordered = sorted(events, key=lambda event: (*place_of(event), event.at))
    await connection.execute(
        _INSERT_UNKNOWN, {"rows": _rows(_introductions(ordered)), "before_everything": BEFORE_EVERYTHING}
    )
    progress = await _lock(connection, ordered)
    changed: dict[UUID, Progress] = {}
    accepted: list[dict[str, Any]] = []
    steps: list[Step] = []
    for event in ordered:
        task = progress[event.task_id]
        step = Step.of(task, event)
        if task.note(event) or event.payload is not None:
            changed[task.id] = task
        if task.accepts(event):
            task.move(event)
            changed[task.id] = task
            accepted.append(_timeline_row(len(accepted), task, event))
            steps.append(step)
    if changed:
        rows = ({**asdict(task), "payload": payloads.get(task.id)} for task in changed.values())
        await connection.execute(_ADVANCE, {"rows": _rows(rows)})
    if accepted:
        await connection.execute(_APPEND_TIMELINE, {"rows": _rows(accepted)})
        await notify(connection, {row["root_id"] for row in accepted})
    return steps


def _introductions(events: Iterable[LifecycleEvent]) -> list[dict[str, Any]]:
    """What each task's row would say if the ledger did not know the task yet."""
    rows: dict[UUID, dict[str, Any]] = {}
    for event in events:
        row = rows.get(event.task_id)
        if row is None:
            creation = Creation(event.traceparent)
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
                "trace_id": creation.trace_id,
                "span_id": creation.span_id,
            }
        else:
            row["at"] = min(row["at"], event.at)
    return list(rows.values())


async def _lock(connection: AsyncConnection, events: Iterable[LifecycleEvent]) -> dict[UUID, Progress]:
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
    return {row["id"]: Progress(**{**row, "state": TaskState(row["state"])}) for row in rows}


_PROGRESS_COLUMNS: Final = tuple(tasks.c[column.name] for column in fields(Progress))


def _timeline_row(position: int, task: Progress, event: LifecycleEvent) -> dict[str, Any]:
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


async def mark_queued(connection: AsyncConnection, task_ids: Iterable[UUID], *, at: datetime) -> list[Step]:
    """Say that messages of these tasks have left; only those that were waiting for their due time change."""
    rows = await connection.execute(
        select(tasks.c.id, tasks.c.type, tasks.c.root_id, tasks.c.sequence, tasks.c.service).where(
            tasks.c.id == func.any(sorted(task_ids)), tasks.c.state == TaskState.SCHEDULED.value
        )
    )
    return await advance(connection, [_step(row, TaskState.QUEUED, at) for row in rows])


async def mark_expired(connection: AsyncConnection, task_ids: Iterable[UUID], *, at: datetime) -> list[Step]:
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


def log_facts(task: Row[Any]) -> dict[str, Any]:
    """What every log line about a task of the ledger says."""
    return logs.of_task(task.id, task.type, task.attempt, trace_id=task.trace_id)
