"""How many tasks the ledger has, found without counting all of them at each audit.

What was created a while ago is counted once and remembered with the audit; what came since is added. A report that was
held up in an outage may bring a task that was created before: the next count of everything finds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any, Final, Self

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from gateway.models import tasks
from gateway.transactions import transaction

SETTLED_AFTER: Final = timedelta(minutes=5)
"""A task that was created longer ago has been committed."""

RECOUNT_EVERY: Final = timedelta(hours=1)
RECOUNTED_ALWAYS: Final = 200_000
"""So many tasks are counted in no time."""

SLICES: Final = 16
"""Of a count of everything: each is a statement of its own, and has the time limit of one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """A count of the tasks that were created until some moment.

    Attributes:
        counted_at: When everything was counted.
    """

    count: int
    until: datetime
    counted_at: datetime

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        return {"count": self.count, "until": self.until.isoformat(), "counted_at": self.counted_at.isoformat()}

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Self:
        """Read what `to_json` made."""
        until, counted_at = (datetime.fromisoformat(said[name]) for name in ("until", "counted_at"))
        return cls(count=said["count"], until=until, counted_at=counted_at)


async def bring_forward(engine: AsyncEngine, known: Tally | None, *, now: datetime) -> Tally:
    """Return a tally that ends a little before now: the one that is known and what came since, or a count of all."""
    until = now - SETTLED_AFTER
    if known is None or known.count < RECOUNTED_ALWAYS or now - known.counted_at >= RECOUNT_EVERY:
        return Tally(count=await _count_all(engine, until), until=until, counted_at=now)
    until = max(known.until, until)
    async with transaction(engine) as connection:
        return replace(known, count=known.count + await _count(connection, known.until, until), until=until)


async def _count_all(engine: AsyncEngine, until: datetime) -> int:
    async with transaction(engine) as connection:
        oldest: datetime | None = (await connection.execute(select(func.min(tasks.c.created_at)))).scalar_one()
    if oldest is None or oldest > until:
        return 0
    begin = oldest - timedelta(microseconds=1)
    places = [begin + (until - begin) * slice_ / SLICES for slice_ in range(SLICES)] + [until]
    total = 0
    for after, last in pairwise(places):
        async with transaction(engine) as connection:
            total += await _count(connection, after, last)
    return total


async def _count(connection: AsyncConnection, after: datetime, last: datetime) -> int:
    statement = select(func.count()).where(tasks.c.created_at > after, tasks.c.created_at <= last)
    return (await connection.execute(statement)).scalar_one()
