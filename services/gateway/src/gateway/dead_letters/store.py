"""Dead letters in the ledger's database: kept once, completed by what workers tell, and dropped when long resolved."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any, Final

from sqlalchemy import bindparam, delete, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.dead_letters.diagnosing import told_by_worker
from gateway.dead_letters.letter import DeadLetter, Diagnosis, error_fingerprint
from gateway.models import dead_letters
from taskmesh.contracts.lifecycle import LifecycleEvent, TaskState


async def store(
    connection: AsyncConnection, letters: Sequence[DeadLetter], diagnoses: Sequence[Diagnosis]
) -> list[tuple[DeadLetter, Diagnosis]]:
    """Keep dead letters, and return those that were new; one that is kept already is not kept twice."""
    if not letters:
        return []
    pairs = zip(letters, diagnoses, strict=True)
    given = {letter.fingerprint(): (letter, diagnosis) for letter, diagnosis in pairs}
    rows = [letter.row(diagnosis) for _, (letter, diagnosis) in sorted(given.items())]
    statement = insert(dead_letters).on_conflict_do_nothing().returning(dead_letters.c.fingerprint)
    return [given[bytes(fingerprint)] for fingerprint in (await connection.execute(statement, rows)).scalars()]


async def complete(connection: AsyncConnection, events: Iterable[LifecycleEvent]) -> int:
    """Let what workers say of failed tasks stand in the letters of these tasks; return how many were completed.

    Only in letters that were diagnosed here: the first word of a worker stays.
    """
    told = {event.task_id: event for event in events if event.state is TaskState.FAILED and _from_worker(event)}
    if not told:
        return 0
    columns = (dead_letters.c.id, dead_letters.c.task_id, dead_letters.c.service, dead_letters.c.type)
    waiting = await connection.execute(
        select(*columns, dead_letters.c.reason)
        .where(dead_letters.c.task_id == func.any(sorted(told)), dead_letters.c.exception.is_(None))
        .order_by(dead_letters.c.id)
        .with_for_update()
    )
    completions = [_completion(row, told[row.task_id]) for row in waiting]
    if completions:
        await connection.execute(_COMPLETE, completions)
    return len(completions)


_COMPLETE: Final = (
    update(dead_letters)
    .where(dead_letters.c.id == bindparam("letter_id"))
    .values({name: bindparam(name) for name in ("code", "error", "exception", "attempt", "error_fingerprint")})
)


def _from_worker(event: LifecycleEvent) -> bool:
    return event.failure is not None and event.failure.exception is not None


def _completion(row: Any, event: LifecycleEvent) -> dict[str, Any]:
    assert event.failure is not None
    diagnosis = told_by_worker(event.failure.model_dump(), event.attempt)
    return {
        "letter_id": row.id,
        "code": diagnosis.code,
        "error": diagnosis.error,
        "exception": diagnosis.exception,
        "attempt": diagnosis.attempt,
        "error_fingerprint": error_fingerprint(row.service, row.type, row.reason, diagnosis),
    }


async def forget_resolved(connection: AsyncConnection, older_than: timedelta, *, limit: int) -> int:
    """Drop at most `limit` letters that were replayed or discarded so long ago; return how many."""
    old = (
        select(dead_letters.c.id)
        .where(dead_letters.c.state != "open", dead_letters.c.resolved_at < func.now() - older_than)
        .limit(limit)
    )
    return (await connection.execute(delete(dead_letters).where(dead_letters.c.id.in_(old)))).rowcount
