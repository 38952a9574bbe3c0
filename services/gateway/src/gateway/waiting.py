"""Waiting for tasks: one LISTEN connection for each process wakes all who wait for something to happen to a task.

A notification says only *that* a tree's timeline has grown. Whoever waits subscribes first and reads afterwards, so
nothing that happens in between is missed; and reads now and then without being woken, so a lost notification, or a
lost LISTEN connection, makes an answer late and never wrong.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

import psycopg
from pydantic import SecretStr
from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncEngine

from gateway import ledger
from gateway.models import TASKS_CHANNEL
from gateway.transactions import CONNECT_SECONDS, transaction
from taskmesh.contracts.lifecycle import TaskState
from taskmesh.errors import DatabaseUnavailable
from taskmesh.listening import ListeningConnection

logger = logging.getLogger(__name__)

POLL_SECONDS: Final = 2.0
KEEP_ALIVE_SECONDS: Final = 15.0
PAGE: Final = 500


class Doorbell:
    """Rings for the roots of trees whose timelines have grown."""

    def __init__(self, database_url: SecretStr) -> None:
        self._url = database_url
        self._waiting: dict[str, set[asyncio.Event]] = {}
        self._stopping = False

    @property
    def stopping(self) -> bool:
        """True once the process has been told to stop: nobody waits any longer."""
        return self._stopping

    @contextmanager
    def subscribe(self, root_id: UUID) -> Iterator[asyncio.Event]:
        """An event that is set when something happens in the tree; the subscriber clears it."""
        bell = asyncio.Event()
        subscribers = self._waiting.setdefault(root_id.hex, set())
        subscribers.add(bell)
        if self._stopping:
            bell.set()
        try:
            yield bell
        finally:
            subscribers.discard(bell)
            # A later subscriber may have put another set in the place of this one.
            if not subscribers and self._waiting.get(root_id.hex) is subscribers:
                del self._waiting[root_id.hex]

    def stop(self) -> None:
        """Send everybody home: answers that wait are given as things stand, and streams end."""
        self._stopping = True
        self._ring_all()

    async def run(self) -> None:
        """Listen until cancelled, through any loss of the connection."""
        delay_seconds = 0.1
        while True:
            try:
                connection = await ListeningConnection.connect(
                    self._url.get_secret_value(),
                    autocommit=True,
                    connect_timeout=CONNECT_SECONDS,
                    application_name="gateway-doorbell",
                )
                async with connection:
                    await connection.execute(f"listen {TASKS_CHANNEL}")
                    delay_seconds = 0.1
                    # What happened while nobody listened.
                    self._ring_all()
                    async for notification in connection.notifies():
                        for root in notification.payload.split(","):
                            self._ring(root)
            except (psycopg.Error, OSError) as error:
                logger.warning("listening interrupted", extra={"exception": type(error).__qualname__})
            await asyncio.sleep(delay_seconds)
            delay_seconds = min(2 * delay_seconds, POLL_SECONDS)

    def _ring(self, root: str) -> None:
        for bell in self._waiting.get(root, ()):
            bell.set()

    def _ring_all(self) -> None:
        for root in list(self._waiting):
            self._ring(root)


async def wait_until_finished(
    engine: AsyncEngine, doorbell: Doorbell, task_id: UUID, root_id: UUID, *, seconds: float
) -> Row[Any]:
    """The task once it is in a terminal state, or as it is after the time.

    Raises:
        DatabaseUnavailable: It could not be read.
    """
    clock = asyncio.get_running_loop().time
    deadline = clock() + seconds
    with doorbell.subscribe(root_id) as bell:
        while True:
            bell.clear()
            async with transaction(engine) as connection:
                row = await ledger.get_task(connection, task_id)
            left = deadline - clock()
            if TaskState(row.state).terminal or left <= 0 or doorbell.stopping:
                return row
            await _rung(bell, min(left, POLL_SECONDS))


async def _rung(bell: asyncio.Event, seconds: float) -> bool:
    try:
        await asyncio.wait_for(bell.wait(), seconds)
    except TimeoutError:
        return False
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Follower:
    """Follows the timeline of one task, or with `task_id` None of a whole tree, after the event numbered `after`."""

    engine: AsyncEngine
    doorbell: Doorbell
    root_id: UUID
    task_id: UUID | None
    after: int

    async def follow(self) -> AsyncIterator[Row[Any] | None]:
        """Yield timeline rows as they come, and None when nothing has come for a while; end with the last one.

        Also ends when the process stops or the database goes away: the reader comes back with what it saw last.
        """
        clock = asyncio.get_running_loop().time
        after, spoke_at = self.after, clock()
        with self.doorbell.subscribe(self.root_id) as bell:
            while not self.doorbell.stopping:
                bell.clear()
                try:
                    rows, unfinished = await self._read(after)
                except DatabaseUnavailable:
                    logger.warning("stream interrupted", extra={"root_id": str(self.root_id)})
                    return
                for row in rows:
                    after, spoke_at = row.seq, clock()
                    yield row
                if len(rows) == PAGE:
                    continue
                if not unfinished:
                    return
                if not await _rung(bell, POLL_SECONDS) and clock() - spoke_at >= KEEP_ALIVE_SECONDS:
                    spoke_at = clock()
                    yield None

    async def is_over(self) -> bool:
        """True if there is nothing to follow: all has happened, and was seen."""
        rows, unfinished = await self._read(self.after)
        return not rows and not unfinished

    async def _read(self, after: int) -> tuple[list[Row[Any]], int]:
        """What is new, and how many tasks may still move."""
        async with transaction(self.engine) as connection:
            # Counted first: the events of whatever was finished by then are there to be read. The other way round, the
            # last event could come between the two statements, and the stream would end without it.
            unfinished = await ledger.count_unfinished(connection, self.root_id, task_id=self.task_id)
            rows = await ledger.read_timeline(connection, self.root_id, task_id=self.task_id, after=after, limit=PAGE)
        return list(rows), unfinished
