"""What the ledger says of a task whose message leaves the gateway's outbox, written in the relay's transaction."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from sqlalchemy.ext.asyncio import AsyncConnection

from gateway import ledger, measuring
from taskmesh.relay import AfterCommit, OutboxRow


class GatewayHooks:
    """`published` turns scheduled tasks into queued ones; `expired` ends those that may not start any more."""

    async def published(self, connection: AsyncConnection, rows: Sequence[OutboxRow]) -> AfterCommit | None:
        """Note which delayed tasks have left; one that was due at once has been `queued` since it was accepted."""
        delayed = [row.task_id for row in rows if row.task_id is not None and row.was_delayed]
        if not delayed:
            return None
        steps = await ledger.mark_queued(connection, delayed, at=datetime.now(UTC))
        return lambda: measuring.count_steps(steps)

    async def expired(self, connection: AsyncConnection, rows: Sequence[OutboxRow]) -> AfterCommit | None:
        """Note which tasks were not published before they expired."""
        gone = [row.task_id for row in rows if row.task_id is not None]
        if not gone:
            return None
        steps = await ledger.mark_expired(connection, gone, at=datetime.now(UTC))
        return lambda: measuring.count_steps(steps)
