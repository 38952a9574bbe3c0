"""What each service has still to do: how long its oldest task has waited, and how many seconds of work lie before it.

The ledger knows the tasks; the broker knows how many messages wait, also of tasks that the ledger has not heard of yet.
The larger count is believed. Nothing is never said blindly: while the broker is not seen, or nobody writes down what
workers report, a service without known tasks may have any number of them, and its figures are None.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from sqlalchemy import RowMapping, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway import observations, run_times
from gateway.models import manifests
from gateway.observations import BrokerFacts, QueueFacts
from taskmesh.topology import LIFECYCLE_QUEUE

FRESH: Final = timedelta(seconds=30)
"""Of an observation of the broker; older ones say nothing."""

SOON: Final = timedelta(minutes=1)
"""Tasks that are due within this time are work already: a worker takes as long to start."""

ASSUMED_SECONDS: Final = 1.0
"""The run time of a task as long as no task of its service has run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outstanding:
    """What one service has to do.

    Attributes:
        waiting: Tasks that wait for a worker, retries included, or are due within the next minute: at least so many.
        oldest_age_seconds: How long the oldest task has been due whose next attempt has not begun; 0 when none waits,
            None when that cannot be known.
        work_seconds: Run time, of one process, of all that waits; 0 when nothing does, None when that cannot be known.
        is_certain: The broker is seen, and reports are written down. Otherwise the figures are those of the last known
            state: tasks may have come, or be done.
    """

    service: str
    waiting: int
    oldest_age_seconds: float | None
    work_seconds: float | None
    is_certain: bool


async def read(connection: AsyncConnection, *, only: str | None = None) -> dict[str, Outstanding]:
    """Return what each service that has announced itself has to do, and each other one that has tasks which wait.

    Reads an index that holds waiting tasks alone, so it costs the same whatever the ledger has finished.

    Args:
        only: Look at one service. It is missing from the answer when it has never announced itself and has no tasks.

    Raises:
        sqlalchemy.exc.DBAPIError: The database is away, and so nothing is known (`gateway.transactions.transaction`
            makes `DatabaseUnavailable` of it).
    """
    now: datetime = (await connection.execute(text("select clock_timestamp()"))).scalar_one()
    rows = (await connection.execute(_WAITING, {"until": now + SOON, "only": only})).mappings().all()
    means = await run_times.means(connection)
    queues = await observations.queues(connection)
    is_certain = _is_seen(await observations.broker(connection), queues.get(LIFECYCLE_QUEUE), now)
    announced = (await connection.execute(select(manifests.c.service))).scalars()
    services = {row["service"] for row in rows} | {name for name in announced if only in (None, name)}
    return {
        service: _of_service(
            service,
            [row for row in rows if row["service"] == service],
            means,
            ready=_ready(service, queues.values()) if is_certain else 0,
            now=now,
            is_certain=is_certain,
        )
        for service in sorted(services)
    }


def _is_seen(broker: BrokerFacts | None, reports: QueueFacts | None, now: datetime) -> bool:
    """True if the broker was seen lately, and what workers report is being written down, or nothing waits for that."""
    if broker is None or not broker.reachable or now - broker.observed_at > FRESH:
        return False
    return reports is not None and (reports.consumers > 0 or reports.messages == 0)


def _ready(service: str, queues: Iterable[QueueFacts]) -> int:
    """How many messages wait in the service's queues of work."""
    return sum(facts.ready for facts in queues if facts.queue in {service, f"{service}.events"})


def _of_service(
    service: str,
    rows: list[RowMapping],
    means: Mapping[tuple[str, str], float],
    *,
    ready: int,
    now: datetime,
    is_certain: bool,
) -> Outstanding:
    usual = _usual_seconds(service, means)
    known = sum(row["count"] for row in rows)
    # Messages that the ledger has no task for are of any type.
    unknown = max(0, ready - known)
    work = sum(row["count"] * means.get((service, row["type"]), usual) for row in rows) + unknown * usual
    age = max((max(0.0, (now - row["since"]).total_seconds()) for row in rows), default=0.0)
    return Outstanding(
        service=service,
        waiting=known + unknown,
        # Of a message that the ledger has no task for nobody knows how long it has waited.
        oldest_age_seconds=age if rows or (is_certain and not unknown) else None,
        work_seconds=work if known or is_certain else None,
        is_certain=is_certain,
    )


def _usual_seconds(service: str, means: Mapping[tuple[str, str], float]) -> float:
    own = [seconds for (name, _), seconds in means.items() if name == service]
    return sum(own) / len(own) if own else ASSUMED_SECONDS


# The states are written out, so that the planner sees that the partial index `tasks_waiting` covers them. A task that
# has begun and is queued again, after a retry or the loss of its worker, has waited since then.
_WAITING = text(
    """
    select service, type, count(*) as count,
           min(case when state = 'queued' and started_at is not null then updated_at
                    else coalesce(due_at, created_at) end) as since
    from tasks
    where state in ('scheduled', 'queued', 'retrying')
      and (due_at is null or due_at <= :until)
      and (cast(:only as text) is null or service = :only)
    group by service, type
    """
)
