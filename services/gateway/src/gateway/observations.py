"""What the reconciler last saw of the broker: whether it answers, and how full the queues are.

Functions take an AsyncConnection first and never commit. The figures are the management API's, which are up to five
seconds older than `observed_at` says.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime

import pydantic_core
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.models import broker_queues, broker_status


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueFacts:
    """One queue at one moment.

    Attributes:
        ready: Messages that wait for a consumer.
        unacknowledged: Messages that a consumer holds: prefetched, or being run.
    """

    queue: str
    service: str
    ready: int
    unacknowledged: int
    consumers: int
    observed_at: datetime

    @property
    def messages(self) -> int:
        """All messages, whoever holds them."""
        return self.ready + self.unacknowledged


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerFacts:
    """Whether the broker answered at the last look.

    Attributes:
        since: When this began to be so.
        error: Why it did not answer.
    """

    reachable: bool
    since: datetime
    observed_at: datetime
    error: str | None = None


async def queue(connection: AsyncConnection, name: str) -> QueueFacts | None:
    """Return what was last seen of a queue; None if there is no such queue, or nobody has looked yet."""
    row = (await connection.execute(select(broker_queues).where(broker_queues.c.queue == name))).mappings().first()
    return QueueFacts(**row) if row is not None else None


async def queues(connection: AsyncConnection) -> dict[str, QueueFacts]:
    """Return what was last seen of every queue, by name."""
    rows = (await connection.execute(select(broker_queues))).mappings()
    return {row["queue"]: QueueFacts(**row) for row in rows}


async def broker(connection: AsyncConnection) -> BrokerFacts | None:
    """Return what was last seen of the broker; None if nobody has looked yet."""
    columns = (column for column in broker_status.c if column.name != "one")
    row = (await connection.execute(select(*columns))).mappings().first()
    return BrokerFacts(**row) if row is not None else None


async def store_queues(connection: AsyncConnection, seen: Iterable[QueueFacts]) -> None:
    """Make `seen` all there is to say of queues; those that are not in it are forgotten."""
    await connection.execute(_STORE_QUEUES, {"rows": pydantic_core.to_json([asdict(facts) for facts in seen]).decode()})


async def store_broker(connection: AsyncConnection, *, reachable: bool, at: datetime, error: str | None = None) -> None:
    """Write whether the broker answered; `since` moves when that changes only."""
    await connection.execute(_STORE_BROKER, {"reachable": reachable, "at": at, "error": error})


_STORE_QUEUES = text(
    """
    with seen as materialized (
        select *
        from json_to_recordset(cast(:rows as json)) as r(
            queue text, service text, ready bigint, unacknowledged bigint, consumers integer, observed_at timestamptz)
    ), gone as (
        delete from broker_queues where not exists (select from seen where seen.queue = broker_queues.queue)
    )
    insert into broker_queues (queue, service, ready, unacknowledged, consumers, observed_at)
    select queue, service, ready, unacknowledged, consumers, observed_at from seen order by queue
    on conflict (queue) do update
    set service = excluded.service, ready = excluded.ready, unacknowledged = excluded.unacknowledged,
        consumers = excluded.consumers, observed_at = excluded.observed_at
    """
)

_STORE_BROKER = text(
    """
    insert into broker_status (one, reachable, since, observed_at, error)
    values (true, :reachable, :at, :at, :error)
    on conflict (one) do update
    set reachable = excluded.reachable, observed_at = excluded.observed_at, error = excluded.error,
        since = case when broker_status.reachable = excluded.reachable then broker_status.since else excluded.since end
    """
)
