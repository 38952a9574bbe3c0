"""The audits: what became of all tasks that were ever accepted, counted again and again.

Functions take an AsyncConnection first and never commit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import Row, delete, func, insert, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.models import AUDITS_CHANNEL, audits
from gateway.tallies import Tally

KEPT_FOR: Final = timedelta(days=7)


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """Every task of the ledger, in one of five places; `accepted` is their sum.

    Attributes:
        waiting: Scheduled, queued or retrying.
        dead: With an open dead letter.
        unaccounted: Nobody knows where its message is.
    """

    accepted: int
    waiting: int
    running: int
    finished: int
    dead: int
    unaccounted: int


# Succeeded tasks are in no partial index: the one number that grows for ever is remembered, and added to.
_BALANCE = text(
    """
    with dead as (
        select distinct task_id as id from dead_letters where state = 'open' and task_id is not null
    ), unfinished as (
        select tasks.state, named.task_id is not null as is_named
        from tasks
        left join unaccounted_tasks as named on named.task_id = tasks.id and named.confirmed_at is not null
        where tasks.state in ('scheduled', 'queued', 'running', 'retrying')
          and not exists (select from dead where dead.id = tasks.id)
    )
    select (select count(*) from tasks where created_at > :until) as latest,
           (select count(*) from dead join tasks using (id)) as dead,
           count(*) filter (where is_named) as unaccounted,
           count(*) filter (where not is_named and state = 'running') as running,
           count(*) filter (where not is_named and state <> 'running') as waiting
    from unfinished
    """
)


async def balance(connection: AsyncConnection, tally: Tally, *, unnamed: int) -> Balance:
    """Count all tasks at one moment.

    Args:
        tally: Of the tasks that need not be counted again.
        unnamed: How many more are missing from queues that are not empty; nobody can tell which.
    """
    row = (await connection.execute(_BALANCE, {"until": tally.until})).one()
    waiting = max(row.waiting - unnamed, 0)
    unaccounted = row.unaccounted + row.waiting - waiting
    unfinished = row.dead + waiting + row.running + unaccounted
    # One that came late to the tally may be among the unfinished.
    finished = max(tally.count + row.latest - unfinished, 0)
    return Balance(
        accepted=finished + unfinished,
        waiting=waiting,
        running=row.running,
        finished=finished,
        dead=row.dead,
        unaccounted=unaccounted,
    )


async def store(
    connection: AsyncConnection, found: Balance, *, started_at: datetime, redriven: int, detail: Mapping[str, Any]
) -> Row[Any]:
    """Write down a finished audit and return its row; those that are too old are dropped."""
    values = {**asdict(found), "started_at": started_at, "redriven": redriven, "detail": detail}
    statement = insert(audits).values(finished_at=func.clock_timestamp(), **values).returning(audits)
    row: Row[Any] = (await connection.execute(statement)).one()
    await connection.execute(delete(audits).where(audits.c.started_at < started_at - KEPT_FOR))
    return row


async def last(connection: AsyncConnection) -> Row[Any] | None:
    """Return the newest audit; None before the first."""
    return (await connection.execute(select(audits).order_by(audits.c.id.desc()).limit(1))).one_or_none()


async def started_after(
    connection: AsyncConnection, moment: datetime, *, grace_seconds: float | None
) -> Row[Any] | None:
    """Return the first audit that started after that moment.

    Args:
        grace_seconds: It must also have examined tasks as young as that.
    """
    statement = select(audits).where(audits.c.started_at > moment).order_by(audits.c.id).limit(1)
    if grace_seconds is not None:
        # Audits know microseconds, and round to them.
        statement = statement.where(audits.c.detail["grace_seconds"].as_float() < grace_seconds + 1e-6)
    return (await connection.execute(statement)).one_or_none()


async def ask(connection: AsyncConnection, *, grace_seconds: float | None) -> None:
    """Have an audit begin when the caller commits."""
    payload = "" if grace_seconds is None else repr(grace_seconds)
    await connection.execute(select(func.pg_notify(AUDITS_CHANNEL, payload)))
