"""Tasks that an audit could not account for: suspects, and those that were named after the next audit found the same.

Functions take an AsyncConnection first and never commit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

import pydantic_core
from sqlalchemy import RowMapping, func, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.models import unaccounted_tasks

MOST: Final = 20_000
"""Rows that one audit looks at again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspect:
    """A task whose place is not known, as an audit finds it.

    Attributes:
        mark: What is known of it. While it stays the same, nothing has happened to the task.
        last_seen_where: In words.
    """

    task_id: UUID
    service: str
    type: str
    mark: str
    last_seen_at: datetime | None
    last_seen_where: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What earlier audits wrote of a task; the fields are columns of `unaccounted_tasks`."""

    task_id: UUID
    service: str
    type: str
    mark: str
    since: datetime | None
    confirmed_at: datetime | None
    last_seen_at: datetime | None
    last_seen_where: str | None
    redriven_at: datetime | None
    redrives: int


async def read(connection: AsyncConnection) -> dict[UUID, Record]:
    """Return what is written of each task, suspects and named ones, the oldest first."""
    statement = select(unaccounted_tasks).order_by(unaccounted_tasks.c.since, unaccounted_tasks.c.task_id).limit(MOST)
    return {row["task_id"]: _record(row) for row in (await connection.execute(statement)).mappings()}


async def named(connection: AsyncConnection, *, limit: int) -> list[Record]:
    """Return the tasks that are named as unaccounted for, the oldest first."""
    statement = (
        select(unaccounted_tasks)
        .where(unaccounted_tasks.c.confirmed_at.is_not(None))
        .order_by(unaccounted_tasks.c.since, unaccounted_tasks.c.task_id)
        .limit(limit)
    )
    return [_record(row) for row in (await connection.execute(statement)).mappings()]


async def suspect(connection: AsyncConnection, suspects: Sequence[Suspect], *, at: datetime) -> None:
    """Write down whom this audit suspects; whoever was suspected for the same before stays so since then."""
    if suspects:
        rows = pydantic_core.to_json([asdict(one) for one in suspects]).decode()
        await connection.execute(_SUSPECT, {"rows": rows, "at": at})


async def name(connection: AsyncConnection, task_ids: Iterable[UUID], *, at: datetime) -> None:
    """Say that these suspects are unaccounted for."""
    await connection.execute(
        update(unaccounted_tasks)
        .where(unaccounted_tasks.c.task_id == func.any(sorted(task_ids)), unaccounted_tasks.c.confirmed_at.is_(None))
        .values(confirmed_at=at)
    )


async def clear(connection: AsyncConnection, task_ids: Iterable[UUID]) -> None:
    """Say that these tasks are accounted for; of one that was re-driven, that is remembered until it ends."""
    await connection.execute(_CLEAR, {"ids": sorted(task_ids)})


async def drop_ended(connection: AsyncConnection) -> None:
    """Forget tasks that have ended."""
    await connection.execute(_DROP_ENDED)


def _record(row: RowMapping) -> Record:
    return Record(**row)


_SUSPECT = text(
    """
    insert into unaccounted_tasks as known (task_id, service, type, mark, since, last_seen_at, last_seen_where)
    select task_id, service, type, mark, :at, last_seen_at, last_seen_where
    from json_to_recordset(cast(:rows as json)) as r(
        task_id uuid, service text, type text, mark text, last_seen_at timestamptz, last_seen_where text)
    order by task_id
    on conflict (task_id) do update
    set since = case when known.mark = excluded.mark then coalesce(known.since, excluded.since) else excluded.since end,
        confirmed_at = case when known.mark = excluded.mark then known.confirmed_at end,
        mark = excluded.mark, last_seen_at = excluded.last_seen_at, last_seen_where = excluded.last_seen_where
    """
)

_CLEAR = text(
    """
    with forgotten as (
        delete from unaccounted_tasks where task_id = any(:ids) and redrives = 0
    )
    update unaccounted_tasks set since = null, confirmed_at = null where task_id = any(:ids) and redrives > 0
    """
)

_DROP_ENDED = text(
    """
    delete from unaccounted_tasks as known
    where not exists (
        select from tasks
        where tasks.id = known.task_id and tasks.state in ('scheduled', 'queued', 'running', 'retrying'))
    """
)
