"""Submissions that arrive together are committed together: a commit costs the disk as much for one task as for many.

While transactions are on their way to the disk the next submissions gather, and leave with the one after them. So
nobody waits for company: a submission that comes alone is committed at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Coroutine, Sequence
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import UUID

from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from gateway import idempotency, ledger
from gateway.idempotency import Key
from gateway.new_tasks import NewTask
from gateway.transactions import RETRY_AFTER, single_statement, transaction
from taskmesh.errors import DatabaseUnavailable

logger = logging.getLogger(__name__)

TRANSACTIONS: Final = 2
"""How many are under way at most: one on its way to the disk, and one that is being written meanwhile."""
TASKS_TOGETHER: Final = 500
"""No more tasks share a transaction, unless one submission has more: each waits for all of them."""
BYTES_TOGETHER: Final = 4 * 1024 * 1024
"""Nor do tasks of more bytes."""
CLOSE_SECONDS: Final = 5.0
"""How long a gateway that stops waits for transactions whose callers have gone."""

NOT_ANSWERED: Final = ("08", "57P")
"""SQLSTATEs with which a server ends a connection. Whether a COMMIT that was under way counts, nobody knows then."""


@dataclass(slots=True, eq=False)
class _Submission:
    """Tasks of one request, all of which are committed, or none.

    Attributes:
        size: Of the tasks, in bytes.
        outcome: None once they are committed; the first answer, when the request was accepted before.
        deadline: Fails it if it has not begun by then.
    """

    new: Sequence[NewTask]
    key: Key | None
    size: int
    outcome: asyncio.Future[bytes | None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    deadline: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        if self.deadline is not None:
            self.deadline.cancel()

    def settle(self, first: bytes | None) -> None:
        # A caller that has gone away has cancelled its future.
        if not self.outcome.done():
            self.outcome.set_result(first)

    def fail(self, error: BaseException) -> None:
        if not self.outcome.done():
            self.outcome.set_exception(error)


class Submissions:
    """The one way of new tasks into the ledger that callers wait for.

    Args:
        engine: Of the gateway's database.
        wait_seconds: The longest wait for a turn.
    """

    def __init__(self, engine: AsyncEngine, *, wait_seconds: float) -> None:
        self._engine = engine
        self._wait_seconds = wait_seconds
        self._waiting: deque[_Submission] = deque()
        self._running = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def submit(self, new: Sequence[NewTask], key: Key | None, *, size: int = 0) -> bytes | None:
        """Commit tasks: all of them or none. Returns the first answer instead if the request was accepted before.

        Once begun it goes on when the caller goes away; a repetition under the same key finds what came of it.

        Args:
            new: The tasks.
            key: The request's name, if it has one.
            size: Of the tasks, in bytes, as near as the caller knows.

        Raises:
            DatabaseUnavailable: As of any transaction, or no transaction had room in time.
            IdempotencyConflict: The key is taken by a request that reads otherwise.
        """
        submission = _Submission(new, key, size)
        submission.deadline = asyncio.get_running_loop().call_later(self._wait_seconds, self._give_up, submission)
        self._waiting.append(submission)
        if self._running < TRANSACTIONS:
            self._running += 1
            self._start(self._commit_all())
        return await submission.outcome

    async def close(self) -> None:
        """Wait for what has begun, for some seconds at most."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_SECONDS)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        # Of nobody's trace: it serves many.
        task = asyncio.create_task(work, context=Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _give_up(self, submission: _Submission) -> None:
        self._waiting.remove(submission)
        submission.fail(DatabaseUnavailable("the database has no room for more in time", retry_after=RETRY_AFTER))

    async def _commit_all(self) -> None:
        try:
            while together := self._next():
                try:
                    await self._commit(together)
                finally:
                    # If the gateway stops; else each has been told, or tries alone.
                    if (task := asyncio.current_task()) is not None and task.cancelling():
                        _fail_all(together, DatabaseUnavailable("the gateway stops", retry_after=RETRY_AFTER))
        finally:
            # In the turn of the loop that has found nobody: whoever comes later in it starts the next.
            self._running -= 1

    def _next(self) -> list[_Submission]:
        """Those that leave together; of two with one key the second waits for what becomes of the first."""
        together: list[_Submission] = []
        repeated: list[_Submission] = []
        keys: set[tuple[UUID, str]] = set()
        count = size = 0
        while self._waiting:
            each = self._waiting[0]
            count += len(each.new)
            size += each.size
            if together and (count > TASKS_TOGETHER or size > BYTES_TOGETHER):
                break
            self._waiting.popleft()
            if each.key is not None and each.key.identity in keys:
                repeated.append(each)
                continue
            if each.key is not None:
                keys.add(each.key.identity)
            each.begin()
            together.append(each)
        self._waiting.extendleft(reversed(repeated))
        return together

    async def _commit(self, together: Sequence[_Submission]) -> None:
        if len(together) == 1:
            await self._commit_alone(together[0])
            return
        try:
            accepted, known = await self._write(together)
        except Exception as error:  # noqa: BLE001 - each is told
            if isinstance(error, DatabaseUnavailable) and not _is_answer(error):
                _fail_all(together, error)
                return
            # Perhaps one of them is at fault, and is told so when it is alone.
            logger.warning("submissions tried alone", extra={"count": len(together), "exception": _class_of(error)})
            known = list(together)
        else:
            for each in accepted:
                each.settle(None)
        # Beside the others, as many at a time as there are connections.
        for each in known:
            self._start(self._commit_alone(each))

    async def _commit_alone(self, submission: _Submission) -> None:
        key, first = submission.key, None
        try:
            if key is None:
                await self._write([submission])
            else:
                async with transaction(self._engine) as connection:
                    first = await idempotency.claim(connection, key)
                    if first is None:
                        await ledger.submit(connection, submission.new)
        except asyncio.CancelledError:
            submission.fail(DatabaseUnavailable("the gateway stops", retry_after=RETRY_AFTER))
            raise
        except Exception as error:  # noqa: BLE001 - is raised where the outcome is waited for
            submission.fail(error)
        else:
            submission.settle(first)

    async def _write(self, together: Sequence[_Submission]) -> tuple[list[_Submission], list[_Submission]]:
        """Commit them; returns those that are accepted, and those whose key was taken before."""
        if not any(each.key for each in together):
            # Without keys there is one statement to execute.
            async with single_statement(self._engine) as connection:
                await ledger.submit(connection, [task for each in together for task in each.new])
            return list(together), []
        async with transaction(self._engine) as connection:
            accepted, known = await _claim(connection, together)
            await ledger.submit(connection, [task for each in accepted for task in each.new])
        return accepted, known


async def _claim(
    connection: AsyncConnection, together: Sequence[_Submission]
) -> tuple[list[_Submission], list[_Submission]]:
    """Take all their keys; returns those that are new, and those whose key was taken before."""
    keys = [each.key for each in together if each.key is not None]
    free = await idempotency.claim_all(connection, keys, wait_seconds=idempotency.PATIENCE_SECONDS) if keys else set()
    known = [each for each in together if each.key is not None and each.key.identity not in free]
    return [each for each in together if each not in known], known


def _fail_all(together: Sequence[_Submission], error: DatabaseUnavailable) -> None:
    for each in together:
        # Their own each: a raised error collects the frames of whoever raises it.
        each.fail(DatabaseUnavailable(str(error), retry_after=error.retry_after))


def _is_answer(error: DatabaseUnavailable) -> bool:
    """True if the server has refused the transaction, and so undone it: for a lock, or a statement's time limit."""
    cause = error.__cause__
    state = getattr(cause.orig, "sqlstate", None) if isinstance(cause, DBAPIError) else None
    return state is not None and not state.startswith(NOT_ANSWERED)


def _class_of(error: BaseException) -> str:
    cause = error.__cause__ if isinstance(error, DatabaseUnavailable) else error
    origin = cause.orig if isinstance(cause, DBAPIError) else cause
    return type(origin).__qualname__
