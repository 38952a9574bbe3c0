"""Sending dead letters again: each as a task of its own that is linked to the old one, and each once.

A message of the gateway's or a relay's own queue is no task: it is published again byte for byte.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID

import pydantic_core
from sqlalchemy import Row, case, func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway import ledger
from gateway.catalogue import KnownType, Snapshot
from gateway.dead_letters.diagnosing import payload_of
from gateway.dead_letters.letter import CONTROL_SUFFIX, EVENTS_SUFFIX
from gateway.identifiers import uuid7
from gateway.models import dead_letters, tasks
from gateway.new_tasks import NewTask
from gateway.problems import FieldError
from gateway.retries import RETRIABLE
from taskmesh import celery_protocol, exchanges, traces
from taskmesh.celery_protocol import MalformedMessage, TaskMessage
from taskmesh.contracts.lifecycle import TaskKind
from taskmesh.outbox import OutboxMessage, insert_messages
from taskmesh.topology import LIFECYCLE_QUEUE
from taskmesh.traces import Relation

LETTERS_AT_ONCE: Final = 200
BYTES_AT_ONCE: Final = 8 * 1024 * 1024
"""Of bodies that are in memory together."""
MAX_BODY_BYTES: Final = 1024 * 1024
BROKERS_OWN: Final = "x-"
"""Headers with this prefix tell of the message's past; a queue would take them for its own bookkeeping."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """What a caller changes in a letter before it is sent again.

    Attributes:
        type: Of a letter that cannot be read.
        payload: Instead of the letter's own.
    """

    type: str | None = None
    payload: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Who wants letters sent again, and how fast.

    Attributes:
        rate_per_second: None sends all at once.
        dry_run: Only find out what would be done.
    """

    api_key_id: UUID
    edit: Edit = Edit()
    rate_per_second: float | None = None
    dry_run: bool = False
    begin: datetime = field(default_factory=lambda: datetime.now(UTC))

    def due_at(self, place: int) -> datetime | None:
        """When the letter at that place is sent; None means at once."""
        if self.rate_per_second is None or place == 0:
            return None
        return self.begin + timedelta(seconds=place / self.rate_per_second)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why a letter cannot be sent again; the code is one of `problems.KINDS`."""

    letter_id: int
    code: str
    detail: str
    errors: Sequence[FieldError] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """A letter, and what it is sent again as: a task, or the same message."""

    letter_id: int
    task: NewTask | None = None
    message: OutboxMessage | None = None


@dataclass(slots=True)
class Outcome:
    """What became of letters that were to be sent again.

    Attributes:
        replayed: The new tasks' ids by letter; None for a message that is no task.
        accepted: The new tasks, once they are written.
    """

    replayed: dict[int, UUID | None] = field(default_factory=dict)
    accepted: list[NewTask] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    first_due_at: datetime | None = None
    last_due_at: datetime | None = None

    def reasons(self) -> Mapping[str, int]:
        """How many were refused, by code."""
        return Counter(refusal.code for refusal in self.refused)


async def replay(connection: AsyncConnection, letter_ids: Sequence[int], announced: Snapshot, order: Order) -> Outcome:
    """Send letters again that are open still; others are left out, so that each is sent once whoever asks.

    Locks tasks before letters, as the projector does.
    """
    outcome = Outcome()
    await _lock_tasks(connection, letter_ids)
    done: set[UUID] = set()
    for some in await _portions(connection, letter_ids):
        rows = await _read(connection, some, lock=not order.dry_run)
        plans = await asyncio.to_thread(_plan_all, rows, announced, order, len(outcome.replayed), done)
        replays = [plan for plan in plans if isinstance(plan, Replay)]
        outcome.refused += [plan for plan in plans if isinstance(plan, Refusal)]
        outcome.replayed |= {plan.letter_id: plan.task.id if plan.task else None for plan in replays}
        if not order.dry_run:
            await _write(connection, replays, order)
            outcome.accepted += [plan.task for plan in replays if plan.task is not None]
    if outcome.replayed:
        outcome.first_due_at = order.begin
        outcome.last_due_at = order.due_at(len(outcome.replayed) - 1) or order.begin
    return outcome


async def _lock_tasks(connection: AsyncConnection, letter_ids: Sequence[int]) -> None:
    letters = dead_letters.c
    rows = await connection.execute(
        select(tasks.c.id, tasks.c.root_id)
        .join(dead_letters, letters.task_id == tasks.c.id)
        .where(letters.id == func.any(list(letter_ids)))
    )
    wanted = {task_id for row in rows for task_id in (row.id, row.root_id)}
    if wanted:
        await ledger.lock(connection, wanted)


async def _portions(connection: AsyncConnection, letter_ids: Sequence[int]) -> list[list[int]]:
    """The letters in their order, in parts whose bodies have their place in memory."""
    size = func.octet_length(dead_letters.c.body)
    statement = select(dead_letters.c.id, size).where(dead_letters.c.id == func.any(list(letter_ids)))
    portions: list[list[int]] = []
    room = 0
    for letter_id, weight in await connection.execute(statement.order_by(dead_letters.c.id)):
        # A larger body is not read.
        taken = weight if weight <= MAX_BODY_BYTES else 0
        if not portions or taken > room or len(portions[-1]) == LETTERS_AT_ONCE:
            portions.append([])
            room = BYTES_AT_ONCE
        portions[-1].append(letter_id)
        room -= taken
    return portions


async def _read(connection: AsyncConnection, letter_ids: Sequence[int], *, lock: bool) -> Sequence[Row[Any]]:
    letters = dead_letters.c
    small = func.octet_length(letters.body) <= MAX_BODY_BYTES
    of_task = (tasks.c.state, tasks.c.retried_as, tasks.c.root_id, tasks.c.event_id, tasks.c.priority, tasks.c.tags)
    statement = (
        select(
            letters.id,
            letters.queue,
            letters.service,
            letters.exchange,
            letters.routing_key,
            letters.headers,
            letters.properties,
            letters.task_id,
            case((small, letters.body), else_=None).label("body"),
            *(column.label(f"task_{column.name}") for column in of_task),
        )
        .outerjoin(tasks, tasks.c.id == letters.task_id)
        .where(letters.id == func.any(list(letter_ids)), letters.state == "open")
        .order_by(letters.id)
    )
    return (await connection.execute(statement.with_for_update(of=dead_letters) if lock else statement)).all()


class _Unfit(Exception):
    """The letter cannot be sent again; the arguments are those of a `Refusal`."""

    def __init__(self, code: str, detail: str, errors: Sequence[FieldError] = ()) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.errors = errors


def _plan_all(
    rows: Iterable[Row[Any]], announced: Snapshot, order: Order, place: int, done: set[UUID]
) -> list[Replay | Refusal]:
    """Decide on each letter; `done` collects the tasks, of which each is sent once however many letters it left."""
    plans: list[Replay | Refusal] = []
    for row in rows:
        if row.task_id in done:
            continue
        try:
            plans.append(_plan(row, announced, order, order.due_at(place)))
        except _Unfit as unfit:
            plans.append(Refusal(letter_id=row.id, code=unfit.code, detail=unfit.detail, errors=unfit.errors))
            continue
        except RecursionError:
            plans.append(Refusal(letter_id=row.id, code="unreadable", detail="its payload is nested too deeply"))
            continue
        place += 1
        if row.task_id is not None:
            done.add(row.task_id)
    return plans


def _plan(row: Row[Any], announced: Snapshot, order: Order, due_at: datetime | None) -> Replay:
    if row.body is None:
        raise _Unfit("payload_too_large", f"its body has over {MAX_BODY_BYTES} bytes")
    if row.queue == LIFECYCLE_QUEUE or row.queue.endswith(CONTROL_SUFFIX):
        return Replay(letter_id=row.id, message=_same_message(row, due_at))
    _check_task(row)
    message = _message(row)
    type_name, payload = _wanted(message, order.edit)
    known = _find(announced, type_name, row)
    if known is None:
        raise _Unfit("unknown_type", "no worker announces its type")
    errors = known.validator.errors(payload) or _unwritable(payload)
    if errors:
        raise _Unfit("contract_violation", f"its payload does not fit {known.type}", errors)
    return Replay(letter_id=row.id, task=_new_task(row, message, known, payload, order=order, due_at=due_at))


def _message(row: Row[Any]) -> TaskMessage | None:
    try:
        return celery_protocol.decode(
            row.headers, row.properties, bytes(row.body), max_decompressed_bytes=MAX_BODY_BYTES
        )
    except MalformedMessage:
        return None


def _wanted(message: TaskMessage | None, edit: Edit) -> tuple[str, Mapping[str, Any]]:
    """The type and the payload: what the caller says, or else the letter."""
    type_name = edit.type or (message.type if message else None)
    payload = edit.payload
    if payload is None and message is not None:
        payload = payload_of(message.args, message.payload)
    if type_name is not None and payload is not None:
        return type_name, payload
    missing = [name for name, value in (("type", type_name), ("payload", payload)) if value is None]
    errors = [FieldError(pointer=f"/{name}", detail="is required: the letter's own cannot be read") for name in missing]
    raise _Unfit("unreadable", "it cannot be read; say what it was to be", errors)


def _unwritable(payload: Mapping[str, Any]) -> list[FieldError]:
    try:
        pydantic_core.to_json(payload)
    except ValueError:
        return [FieldError(pointer="/payload", detail="holds text that is not Unicode")]
    return []


def _check_task(row: Row[Any]) -> None:
    """Refuse a letter whose task must not be run again."""
    if row.task_retried_as is not None:
        raise _Unfit("already_retried", f"its task was tried again as {row.task_retried_as}")
    if row.task_state is not None and row.task_state not in RETRIABLE:
        detail = f"its task {row.task_id} is {row.task_state}: another delivery of it was handled"
        raise _Unfit("not_failed", detail)


def _find(announced: Snapshot, type_name: str, row: Row[Any]) -> KnownType | None:
    if row.queue.endswith(EVENTS_SUFFIX):
        return announced.listener(type_name, row.service)
    return announced.commands.get(type_name)


def _same_message(row: Row[Any], due_at: datetime | None) -> OutboxMessage:
    """The message as it was published first, to the exchange from which its queue takes it."""
    lifecycle = row.queue == LIFECYCLE_QUEUE
    return OutboxMessage(
        exchange=exchanges.LIFECYCLE if lifecycle else exchanges.DIRECT,
        routing_key=row.routing_key if lifecycle else row.queue,
        headers={name: value for name, value in row.headers.items() if not name.startswith(BROKERS_OWN)},
        properties={
            name: row.properties[name]
            for name in ("content_type", "content_encoding", "delivery_mode")
            if name in row.properties
        },
        body=bytes(row.body),
        due_at=due_at,
    )


def _new_task(
    row: Row[Any],
    message: TaskMessage | None,
    known: KnownType,
    payload: Mapping[str, Any],
    *,
    order: Order,
    due_at: datetime | None,
) -> NewTask:
    task_id = uuid7()
    kind = known.manifest.kind
    event_id = row.task_event_id
    if event_id is None and kind is TaskKind.EVENT:
        event_id = _event_id(row.headers, message) or task_id
    return NewTask(
        id=task_id,
        type=known.type,
        service=known.service,
        payload=payload,
        kind=kind,
        version=known.manifest.version if order.edit.payload is not None or message is None else message.version,
        root_id=row.task_root_id or (message.root_id if message else None) or row.task_id,
        parent_id=message.parent_id if message else None,
        event_id=event_id,
        retry_of=row.task_id if row.task_state is not None else None,
        due_at=due_at,
        priority=row.task_priority,
        tags=row.task_tags or (),
        api_key_id=order.api_key_id,
        creation=traces.beginning(Relation.REPLAYED, of=message.traceparent if message else None),
        created_at=order.begin,
    )


def _event_id(headers: Mapping[str, Any], message: TaskMessage | None) -> UUID | None:
    if message is None:
        return None
    kept = headers.get(celery_protocol.EVENT_ID_HEADER)
    return UUID(kept) if isinstance(kept, str) else message.id


_LINK_TASKS = text(
    """
    update tasks set retried_as = r.new_id
    from json_to_recordset(cast(:rows as json)) as r(old_id uuid, new_id uuid)
    where tasks.id = r.old_id
    """
)

_RESOLVE = text(
    """
    update dead_letters
    set state = 'replayed', replay_task_id = r.new_id, resolved_at = now(), resolved_by = :by
    from json_to_recordset(cast(:rows as json)) as r(letter_id bigint, new_id uuid)
    where dead_letters.id = r.letter_id
    """
)

# Other letters of the same tasks: the same message may have died more than once.
_RESOLVE_OTHERS = text(
    """
    update dead_letters
    set state = 'replayed', replay_task_id = r.new_id, resolved_at = now(), resolved_by = :by
    from json_to_recordset(cast(:rows as json)) as r(task_id uuid, new_id uuid)
    where dead_letters.task_id = r.task_id and dead_letters.state = 'open'
    """
)


async def _write(connection: AsyncConnection, replays: Sequence[Replay], order: Order) -> None:
    """Write the new tasks and messages, and what has become of the letters, in a few statements for all."""
    if not replays:
        return
    new = [replay.task for replay in replays if replay.task is not None]
    messages = [replay.message for replay in replays if replay.message is not None]
    await ledger.submit(connection, new)
    if messages:
        await connection.execute(insert_messages(messages))
    links = [{"old_id": task.retry_of, "task_id": task.retry_of, "new_id": task.id} for task in new if task.retry_of]
    resolved = [
        {"letter_id": replay.letter_id, "new_id": replay.task.id if replay.task else None} for replay in replays
    ]
    await connection.execute(_RESOLVE, {"rows": _json(resolved), "by": order.api_key_id})
    if links:
        await connection.execute(_LINK_TASKS, {"rows": _json(links)})
        await connection.execute(_RESOLVE_OTHERS, {"rows": _json(links), "by": order.api_key_id})
    if new:
        await ledger.notify(connection, {task.root_id or task.id for task in new})


def _json(rows: Sequence[Mapping[str, Any]]) -> str:
    return pydantic_core.to_json(rows).decode()
