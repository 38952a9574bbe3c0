"""Another try of a task that ended badly: a task of its own, linked both ways.

Terminal states stay terminal, so what is tried again gets a new id, new attempts, and a place in the same tree. The
same is done for a dead letter whose task the ledger has never seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Row, func, literal, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway import ledger
from gateway.catalogue import Catalogue, KnownType
from gateway.identifiers import uuid7
from gateway.models import dead_letters, tasks
from gateway.new_tasks import NewTask
from gateway.problems import Problem
from taskmesh import traces
from taskmesh.contracts.lifecycle import TaskKind, TaskState
from taskmesh.errors import ConflictError
from taskmesh.traces import Relation

RETRIABLE: Final = frozenset({TaskState.FAILED, TaskState.CANCELLED, TaskState.EXPIRED})
"""How a task must have ended for somebody to want it tried again."""


class NotFailed(ConflictError):
    """The task is on its way, or has succeeded."""

    code = "not_failed"


class PayloadUnknown(ConflictError):
    """The gateway never saw what the task was asked to do, and the caller does not say."""

    code = "payload_unknown"


class AlreadyRetried(ConflictError):
    """A later try of the task is on its way, or has succeeded."""

    code = "already_retried"


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What is to be tried again, wherever it is known from: the ledger, or a dead letter's headers and body.

    Attributes:
        service: Who handles it; of a command the owner of its type.
        retry_of: The task that ended; None if it had no id that could be read.
        root_id: None makes the new task a root of its own.
        event_id: For kind `event`: the event that is handled. None lets the new task's id stand for it.
        traceparent: What its message was created under.
    """

    type: str
    service: str
    payload: Mapping[str, Any]
    kind: TaskKind = TaskKind.COMMAND
    version: int = 1
    retry_of: UUID | None = None
    root_id: UUID | None = None
    parent_id: UUID | None = None
    event_id: UUID | None = None
    priority: int | None = None
    tags: Sequence[str] = ()
    traceparent: str | None = None


async def retry(
    connection: AsyncConnection,
    task_id: UUID,
    *,
    payload: Mapping[str, Any] | None = None,
    version: int | None = None,
    due_at: datetime | None = None,
    api_key_id: UUID | None = None,
) -> NewTask:
    """Try a task again that failed, was cancelled or expired; of one that was tried again before, the newest try.

    The payload is taken as it is: hold it against its contract first (`check`).

    Args:
        payload: Instead of the task's own.
        version: Of the contract that the payload fits; None for the task's own.
        due_at: Not published before; None means at once.

    Raises:
        NotFound: The ledger does not know the task.
        NotFailed: It has not ended, or it has succeeded.
        AlreadyRetried: A later try has not ended, or has succeeded.
        PayloadUnknown: No payload is given, and the ledger has none.
    """
    last = await newest_try(connection, task_id)
    origin = origin_of(last, payload_for(last, payload))
    if version is not None:
        origin = replace(origin, version=version)
    return await submit_again(connection, origin, due_at=due_at, api_key_id=api_key_id)


def payload_for(task: Row[Any], given: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The payload that is given, or else the task's own.

    Raises:
        PayloadUnknown: There is none.
    """
    chosen: Mapping[str, Any] | None = given if given is not None else task.payload
    if chosen is None:
        raise PayloadUnknown(f"the ledger does not know the payload of task {task.id}; send one")
    return chosen


def origin_of(task: Row[Any], payload: Mapping[str, Any]) -> Origin:
    """What a task of the ledger is tried again as."""
    return Origin(
        type=task.type,
        service=task.service,
        payload=payload,
        kind=TaskKind(task.kind),
        version=task.version,
        retry_of=task.id,
        root_id=task.root_id,
        parent_id=task.parent_id,
        event_id=task.event_id,
        priority=task.priority,
        tags=task.tags,
        traceparent=traces.traceparent(task.trace_id, task.span_id),
    )


async def submit_again(
    connection: AsyncConnection,
    origin: Origin,
    *,
    due_at: datetime | None = None,
    api_key_id: UUID | None = None,
) -> NewTask:
    """Write the new task with its message, link the old one to it, and see its open dead letters as replayed.

    An expiry is not inherited: whoever tries again wants it done. Neither is the schedule: its slot has had its task.
    """
    now = datetime.now(UTC)
    task_id = uuid7()
    # A root that was tried again stays the root of its tree.
    root_id = origin.root_id or origin.retry_of or task_id
    new = NewTask(
        id=task_id,
        type=origin.type,
        service=origin.service,
        payload=origin.payload,
        kind=origin.kind,
        version=origin.version,
        root_id=root_id,
        parent_id=origin.parent_id,
        event_id=origin.event_id or (task_id if origin.kind is TaskKind.EVENT else None),
        retry_of=origin.retry_of,
        created_at=now,
        due_at=due_at,
        priority=origin.priority,
        tags=origin.tags,
        api_key_id=api_key_id,
        creation=traces.beginning(Relation.RETRIED, of=origin.traceparent),
    )
    # The root's lock keeps the numbers of a tree's timeline in the order of their commits.
    await ledger.lock(connection, [root_id, *([origin.retry_of] if origin.retry_of else [])])
    await ledger.submit(connection, [new])
    if origin.retry_of is not None:
        await _link(connection, origin.retry_of, new, api_key_id)
    await ledger.notify(connection, [root_id])
    return new


async def _link(connection: AsyncConnection, task_id: UUID, new: NewTask, api_key_id: UUID | None) -> None:
    await connection.execute(update(tasks).where(tasks.c.id == task_id).values(retried_as=new.id))
    await connection.execute(
        update(dead_letters)
        .where(dead_letters.c.task_id == task_id, dead_letters.c.state == "open")
        .values(state="replayed", replay_task_id=new.id, resolved_at=func.now(), resolved_by=api_key_id)
    )


async def newest_try(connection: AsyncConnection, task_id: UUID) -> Row[Any]:
    """The task that is to be tried again: it, or its newest try; locked together with its tree's root.

    Raises:
        NotFound, NotFailed, AlreadyRetried: See `retry`.
    """
    asked = await ledger.get_task(connection, task_id)
    seen = await _last_of_chain(connection, task_id)
    await ledger.lock(connection, [task_id, seen, asked.root_id])
    # Whoever was faster has linked another try while we waited for the lock.
    last = await ledger.get_task(connection, await _last_of_chain(connection, task_id))
    if TaskState(last.state) in RETRIABLE:
        return last
    if last.id == task_id:
        state = "succeeded" if last.state == TaskState.SUCCEEDED else f"{last.state}, and not over"
        raise NotFailed(f"task {task_id} is {state}; only a failed, cancelled or expired task is tried again")
    raise AlreadyRetried(f"task {task_id} was tried again as {last.id}, which is {last.state}")


async def _last_of_chain(connection: AsyncConnection, task_id: UUID) -> UUID:
    chain = select(tasks.c.id, tasks.c.retried_as, literal(0).label("place")).where(tasks.c.id == task_id)
    tries = chain.cte("tries", recursive=True)
    later = select(tasks.c.id, tasks.c.retried_as, tries.c.place + 1).join(tries, tasks.c.id == tries.c.retried_as)
    tries = tries.union_all(later)
    statement = select(tries.c.id).order_by(tries.c.place.desc()).limit(1)
    found: UUID = (await connection.execute(statement)).scalar_one()
    return found


async def check(catalogue: Catalogue, origin: Origin) -> KnownType:
    """Hold what is tried again against the contract of its type, as its service announces it at the moment.

    Raises:
        Problem: `unknown_type` or `contract_violation`.
    """
    known = await catalogue.find(origin.type, origin.kind, origin.service)
    if known is None:
        raise Problem("unknown_type", "no worker announces the type of this task any more")
    errors = known.validator.errors(origin.payload)
    if errors:
        raise Problem("contract_violation", f"the payload does not fit {known.type}", errors=errors)
    return known
