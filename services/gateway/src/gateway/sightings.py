"""What services have answered when they were asked about tasks.

Functions take an AsyncConnection first and never commit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

import pydantic_core
from sqlalchemy import RowMapping, delete, func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.models import SIGHTINGS_CHANNEL, sightings
from taskmesh.contracts.control import Sightings

REMEMBERED_FOR: Final = timedelta(hours=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a service knew of one task when it answered; the fields are those of `taskmesh.contracts.control.Sighting`.

    Attributes:
        inquiry_id: What it answered to.
        seen_at: By the service's clock.
    """

    task_id: UUID
    service: str
    inquiry_id: UUID
    state: str
    sequence: int | None
    starts: int | None
    started_at: datetime | None
    worker: str | None
    due_at: datetime | None
    alive: bool | None
    seen_at: datetime

    @property
    def mark(self) -> str:
        """The same for two sightings between which nothing has happened to the task in its service."""
        return f"{self.state} {self.sequence} {self.starts}"


async def store(connection: AsyncConnection, answers: Sequence[Sightings]) -> None:
    """Keep what services say, the newest only, and wake whoever has asked."""
    newest: dict[tuple[UUID, str], dict[str, Any]] = {}
    for answer in sorted(answers, key=lambda one: one.at):
        said = {"service": answer.service, "inquiry_id": answer.inquiry_id, "seen_at": answer.at}
        newest |= {(item.task_id, answer.service): {**dict(item), **said} for item in answer.items}
    if newest:
        await connection.execute(_STORE, {"rows": pydantic_core.to_json(list(newest.values())).decode()})
        await connection.execute(select(func.pg_notify(SIGHTINGS_CHANNEL, "")))


async def of_tasks(connection: AsyncConnection, task_ids: Iterable[UUID]) -> dict[tuple[UUID, str], Seen]:
    """Return what each service last said of the tasks, by task and service."""
    statement = select(sightings).where(sightings.c.task_id == func.any(sorted(task_ids)))
    seen = (_seen(row) for row in (await connection.execute(statement)).mappings())
    return {(one.task_id, one.service): one for one in seen}


async def of_task(connection: AsyncConnection, task_id: UUID, service: str) -> Seen | None:
    """Return what the service last said of the task; None if it was not asked, or the answer is too old to be kept."""
    return (await of_tasks(connection, [task_id])).get((task_id, service))


async def forget(connection: AsyncConnection, before: datetime) -> None:
    """Drop what was said before that moment."""
    await connection.execute(delete(sightings).where(sightings.c.seen_at < before))


def _seen(row: RowMapping) -> Seen:
    return Seen(**row)


_STORE = text(
    """
    insert into sightings (task_id, service, inquiry_id, state, sequence, starts, started_at, worker, due_at, alive,
                           seen_at)
    select task_id, service, inquiry_id, state, sequence, starts, started_at, worker, due_at, alive, seen_at
    from json_to_recordset(cast(:rows as json)) as r(
        task_id uuid, service text, inquiry_id uuid, state text, sequence integer, starts integer,
        started_at timestamptz, worker text, due_at timestamptz, alive boolean, seen_at timestamptz)
    order by task_id, service
    on conflict (task_id, service) do update
    set inquiry_id = excluded.inquiry_id, state = excluded.state, sequence = excluded.sequence,
        starts = excluded.starts, started_at = excluded.started_at, worker = excluded.worker, due_at = excluded.due_at,
        alive = excluded.alive, seen_at = excluded.seen_at
    where excluded.seen_at >= sightings.seen_at
    """
)
