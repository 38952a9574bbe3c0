"""A connection that listens hears at once, and does not look around meanwhile."""

from __future__ import annotations

import asyncio

import psycopg
from psycopg import waiting

from taskmesh.listening import SLEEP_SECONDS, ListeningConnection


async def test_a_notification_ends_a_wait_that_nothing_else_has_interrupted(database_url, monkeypatch):
    """psycopg's own connection wakes its process ten times a second: half of what an idle role took."""
    intervals = []
    wait = waiting.wait_async

    async def noted(gen, fileno, interval=0.0, timeout=None):  # noqa: ASYNC109 - psycopg's signature
        intervals.append(interval)
        return await wait(gen, fileno, interval, timeout)

    async def hear(connection):
        return [each.payload async for each in connection.notifies(stop_after=1)]

    async with await ListeningConnection.connect(database_url, autocommit=True) as connection:
        await connection.execute("listen news")
        monkeypatch.setattr(waiting, "wait_async", noted)
        heard = asyncio.create_task(hear(connection))
        async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as other:
            await other.execute("notify news, 'today'")
        async with asyncio.timeout(5):
            assert await heard == ["today"]

    assert intervals[0] == SLEEP_SECONDS
