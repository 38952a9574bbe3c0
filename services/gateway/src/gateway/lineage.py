"""What a task has started, as tasks of the ledger.

A worker tells of its follow-up tasks and events together with its outcome, so a tree is never finished and incomplete
at the same time. An event is no task by itself: each service that listens to it has one, whose id is known beforehand.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from taskmesh import celery_protocol
from taskmesh.contracts.lifecycle import LifecycleEvent, TaskKind

_LISTENERS = text(
    """
    select announced ->> 'type' as type, manifests.service
    from manifests, jsonb_array_elements(manifests.manifest -> 'types') as announced
    where announced ->> 'kind' = 'event' and announced ->> 'type' = any(:types)
    """
)


async def with_children(connection: AsyncConnection, events: Sequence[LifecycleEvent]) -> list[LifecycleEvent]:
    """The events, and one for each task that they say was started."""
    told = list(flat(events))
    types = sorted({event.type for event in told if _is_emitted(event)})
    listeners = await _listeners(connection, types) if types else {}
    return [
        task
        for event in told
        for task in (_tasks_of(event, listeners.get(event.type, ())) if _is_emitted(event) else (event,))
    ]


def flat(events: Iterable[LifecycleEvent]) -> Iterator[LifecycleEvent]:
    """All events that are told of, each after those of its children."""
    for event in events:
        yield from flat(event.children)
        yield event


def _is_emitted(event: LifecycleEvent) -> bool:
    """True for an event that was published, false for a listener's handling of one."""
    return event.kind is TaskKind.EVENT and event.task_id == event.event_id


def _tasks_of(event: LifecycleEvent, services: Iterable[str]) -> Iterator[LifecycleEvent]:
    for service in services:
        task_id = celery_protocol.listener_task_id(event.task_id, service)
        yield event.model_copy(update={"task_id": task_id, "service": service})


async def _listeners(connection: AsyncConnection, types: list[str]) -> Mapping[str, list[str]]:
    found: dict[str, list[str]] = {}
    for row in await connection.execute(_LISTENERS, {"types": types}):
        found.setdefault(row.type, []).append(row.service)
    return found
