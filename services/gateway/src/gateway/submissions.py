"""Submissions that arrive together are committed together: a commit costs the disk as much for one task as for many.

While one transaction is on its way to the disk the next submissions gather, and leave with the one after it. So nobody
waits for company: a submission that comes alone is committed at once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from contextvars import Context
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from gateway import idempotency, ledger
from gateway.idempotency import Key
from gateway.new_tasks import NewTask
from gateway.transactions import transaction
from taskmesh.errors import DatabaseUnavailable

TRANSACTIONS: Final = 2
"""How many are under way at most: one on its way to the disk, and one that is being written meanwhile."""
TASKS_TOGETHER: Final = 500
"""No more tasks join a transaction that has so many: each waits for all of them."""


@dataclass(slots=True, eq=False)
class _Submission:
    """Tasks of one request, all of which are committed, or none.

    Attributes:
        outcome: None once they are committed; the first answer, when the request was accepted before.
    """

    new: Sequence[NewTask]
    key: Key | None
    outcome: asyncio.Future[bytes | None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def settle(self, first: bytes | None) -> None:
        # A caller that has gone away has cancelled its future.
        if not self.outcome.done():
            self.outcome.set_result(first)

    def fail(self, error: BaseException) -> None:
        if not self.outcome.done():
            self.outcome.set_exception(error)


class Submissions:
    """The one way of new tasks into the ledger that callers wait for."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._waiting: deque[_Submission] = deque()
        self._running: set[asyncio.Task[None]] = set()

    async def submit(self, new: Sequence[NewTask], key: Key | None) -> bytes | None:
        """Commit tasks: all of them or none. Returns the first answer instead if the request was accepted before.

        Once begun it goes on when the caller goes away; a repetition under the same key finds what came of it.

        Raises:
            DatabaseUnavailable: As of any transaction.
            IdempotencyConflict: The key is taken by a request that reads otherwise.
        """
        submission = _Submission(new, key)
        self._waiting.append(submission)
        if len(self._running) < TRANSACTIONS:
            # Of nobody's trace: it serves many.
            task = asyncio.create_task(self._commit_all(), context=Context())
            self._running.add(task)
            task.add_done_callback(self._running.discard)
        return await submission.outcome

    async def _commit_all(self) -> None:
        while together := self._next():
            await self._commit(together)

    def _next(self) -> list[_Submission]:
        """Those that leave together; of two with one key the second waits for what becomes of the first."""
        together: list[_Submission] = []
        keys: set[tuple[UUID, str]] = set()
        count = 0
        while self._waiting and count < TASKS_TOGETHER:
            key = self._waiting[0].key
            if key is not None:
                if key.identity in keys:
                    break
                keys.add(key.identity)
            together.append(self._waiting.popleft())
            count += len(together[-1].new)
        return together

    async def _commit(self, together: Sequence[_Submission]) -> None:
        if len(together) == 1:
            await self._commit_alone(together[0])
            return
        try:
            async with transaction(self._engine) as connection:
                accepted, known = await _claim(connection, together)
                await ledger.submit(connection, [task for each in accepted for task in each.new])
        except DatabaseUnavailable as error:
            # Their own each: a raised error collects the frames of whoever raises it.
            for each in together:
                each.fail(DatabaseUnavailable(str(error), retry_after=error.retry_after))
            return
        except Exception:  # noqa: BLE001 - one of them is at fault, and is told so when it is alone
            known = list(together)
        else:
            for each in accepted:
                each.settle(None)
        for each in known:
            await self._commit_alone(each)

    async def _commit_alone(self, submission: _Submission) -> None:
        key, first = submission.key, None
        try:
            async with transaction(self._engine) as connection:
                if key is not None:
                    first = await idempotency.claim(connection, key)
                if first is None:
                    await ledger.submit(connection, submission.new)
        except Exception as error:  # noqa: BLE001 - is raised where the outcome is waited for
            submission.fail(error)
        else:
            submission.settle(first)


async def _claim(
    connection: AsyncConnection, together: Sequence[_Submission]
) -> tuple[list[_Submission], list[_Submission]]:
    """Take all their keys; returns those that are new, and those whose key was taken before."""
    keys = [each.key for each in together if each.key is not None]
    free = await idempotency.claim_all(connection, keys) if keys else set()
    known = [each for each in together if each.key is not None and each.key.identity not in free]
    return [each for each in together if each not in known], known
