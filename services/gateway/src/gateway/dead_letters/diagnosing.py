"""What is wrong with dead letters: the broker says that a worker gave a message up, and nothing of why.

So the reason is found as a worker would find it: by reading the message, looking its type up in what the service
announces, and holding the payload against the type's schema. A worker that has told the ledger why knows better.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Row, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.catalogue import KnownType, Snapshot
from gateway.dead_letters.letter import CONTROL_SUFFIX, DeadLetter, Diagnosis
from gateway.dead_letters.storable import plain
from gateway.models import tasks
from taskmesh.contracts.lifecycle import TaskState
from taskmesh.topology import LIFECYCLE_QUEUE

logger = logging.getLogger(__name__)

MAX_ERROR: Final = 1000
FAULTS_SHOWN: Final = 10
CHECKED_BYTES: Final = 4 * 1024 * 1024
"""Larger payloads are not held against their schema: one message must not hold up all others."""

OF_THE_BROKER: Final[Mapping[str, Diagnosis]] = {
    "delivery_limit": Diagnosis(
        code="poison", error="it was delivered as often as its queue allows, and no worker settled it"
    ),
    "expired": Diagnosis(code="expired", error="its time to live was over before a worker took it"),
    "maxlen": Diagnosis(code="too_long", error="its queue was full"),
}
REFUSED: Final = Diagnosis(
    code="rejected", error="the worker refused it, though it reads well here; the worker's log has the reason"
)


async def diagnose(connection: AsyncConnection, letters: Sequence[DeadLetter], announced: Snapshot) -> list[Diagnosis]:
    """Say what is wrong with each letter, with one query for all of them; what cannot be found out is `rejected`."""
    told = await _told_by_workers(connection, {letter.task_id for letter in letters if letter.task_id})
    known = {(each.service, each.type): each for each in announced.all()}
    return await asyncio.to_thread(_diagnose_all, letters, told, known, frozenset(announced.version))


def told_by_worker(failure: Mapping[str, Any], attempt: int | None) -> Diagnosis:
    """What a worker has told the ledger, a `TaskFailure` as it is kept, as a diagnosis."""
    return Diagnosis(
        code=plain(failure.get("code")) or "exception",
        error=plain(failure.get("message"), MAX_ERROR) or "",
        exception=plain(failure.get("exception")),
        attempt=attempt,
    )


async def _told_by_workers(connection: AsyncConnection, task_ids: Iterable[UUID]) -> dict[UUID, Diagnosis]:
    """What workers have said of tasks that failed. What the ledger knows from a dead letter has no exception."""
    wanted = sorted(task_ids)
    if not wanted:
        return {}
    rows = await connection.execute(
        select(tasks.c.id, tasks.c.error, tasks.c.attempt).where(
            tasks.c.id == func.any(wanted), tasks.c.state == TaskState.FAILED.value
        )
    )
    return {row.id: diagnosis for row in rows if (diagnosis := _of_ledger(row)) is not None}


def _of_ledger(row: Row[*tuple[Any, ...]]) -> Diagnosis | None:
    error = row.error or {}
    if not error.get("exception"):
        return None
    return told_by_worker(error, row.attempt or None)


def _diagnose_all(
    letters: Sequence[DeadLetter],
    told: Mapping[UUID, Diagnosis],
    known: Mapping[tuple[str, str], KnownType],
    services: frozenset[str],
) -> list[Diagnosis]:
    found = []
    for letter in letters:
        try:
            said = told.get(letter.task_id) if letter.task_id else None
            found.append(said or _diagnose(letter, known, services))
        except Exception:
            # A letter that nobody understands is a letter all the same, and the others of its batch must be stored.
            logger.exception("dead letter not understood", extra={"queue": letter.queue})
            found.append(REFUSED)
    return found


def _diagnose(letter: DeadLetter, known: Mapping[tuple[str, str], KnownType], services: frozenset[str]) -> Diagnosis:
    if letter.reason in OF_THE_BROKER:
        return OF_THE_BROKER[letter.reason]
    if letter.fault is not None:
        return Diagnosis(code="malformed", error=plain(letter.fault, MAX_ERROR) or "")
    if letter.task is None:
        return _unread(letter)
    announced = known.get((letter.service, letter.task.type))
    if announced is None:
        if letter.service not in services:
            return REFUSED
        return Diagnosis(code="unknown_task", error="the service whose queue it died in does not announce its type")
    return _of_payload(letter, announced)


def _unread(letter: DeadLetter) -> Diagnosis:
    if letter.queue == LIFECYCLE_QUEUE:
        return Diagnosis(code="rejected", error="the projector gave it up; its log has the reason")
    if letter.queue.endswith(CONTROL_SUFFIX):
        return Diagnosis(code="malformed", error="the service's relay could not read this control message")
    return REFUSED


def _of_payload(letter: DeadLetter, announced: KnownType) -> Diagnosis:
    assert letter.task is not None
    payload = payload_of(letter.task.args, letter.task.payload)
    if payload is None or len(letter.body) > CHECKED_BYTES:
        return REFUSED
    faults = announced.validator.errors(payload)
    if not faults:
        return REFUSED
    # In order, so that the same faults make the same group.
    text = "; ".join(sorted(f"{fault.pointer} {fault.detail}" for fault in faults)[:FAULTS_SHOWN])
    return Diagnosis(code="contract_violation", error=plain(text, MAX_ERROR) or "")


def payload_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The contract's fields, given as keyword arguments or as one positional mapping; None in any other form."""
    if not args:
        return kwargs
    if len(args) == 1 and not kwargs and isinstance(args[0], Mapping):
        return args[0]
    return None
