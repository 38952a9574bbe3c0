"""Asking services what they know of tasks: a control message each way, and no wait for a service that cannot hear."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID, uuid4

from sqlalchemy.ext.asyncio import AsyncConnection

from gateway import sightings
from gateway.candidates import Candidate
from gateway.observations import QueueFacts
from taskmesh import control
from taskmesh.contracts.control import Inquiry
from taskmesh.outbox import insert_messages

IDS_AT_ONCE: Final = 500
EXPIRES_AFTER: Final = timedelta(minutes=1)

HEAPED: Final = 100
"""So many control messages wait for a relay that does not take them. More would crowd out cancellations."""

Question = tuple[UUID, str]
"""The id of a task or of an event, and the service that is asked for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Questions:
    """What was asked in one audit.

    Attributes:
        inquiries: The inquiry that each question is part of.
        unheard: Services that were not asked, because nobody takes their control messages.
    """

    inquiries: Mapping[Question, UUID] = field(default_factory=dict)
    unheard: frozenset[str] = frozenset()


def questions_about(candidates: Iterable[Candidate]) -> set[Question]:
    """What must be known of tasks: of the service that runs one, and of the one that may still hold its message."""
    found: set[Question] = set()
    for candidate in candidates:
        found.add((candidate.id, candidate.service))
        if candidate.sender is not None:
            found.add(candidate.sender)
    return found


async def ask(
    connection: AsyncConnection, wanted: Iterable[Question], queues: Mapping[str, QueueFacts], *, at: datetime
) -> Questions:
    """Put the inquiries into the outbox; they leave when the caller commits."""
    of_service: dict[str, list[UUID]] = {}
    for task_id, service in sorted(wanted):
        of_service.setdefault(service, []).append(task_id)
    unheard = frozenset(service for service in of_service if not _hears(queues.get(control.queue_of(service))))
    inquiries: dict[Question, UUID] = {}
    messages = []
    for service, task_ids in of_service.items():
        for start in range(0, len(task_ids), IDS_AT_ONCE) if service not in unheard else ():
            some = tuple(task_ids[start : start + IDS_AT_ONCE])
            inquiry = Inquiry(inquiry_id=uuid4(), task_ids=some, asked_at=at)
            inquiries |= {(task_id, service): inquiry.inquiry_id for task_id in some}
            messages.append(control.outgoing(service, inquiry, expires_at=at + EXPIRES_AFTER))
    if messages:
        await connection.execute(insert_messages(messages))
    return Questions(inquiries=inquiries, unheard=unheard)


async def answers(connection: AsyncConnection, asked: Questions) -> dict[Question, sightings.Seen]:
    """Return what was answered so far to these very inquiries."""
    seen = await sightings.of_tasks(connection, {task_id for task_id, _ in asked.inquiries})
    return {key: one for key, one in seen.items() if asked.inquiries.get(key) == one.inquiry_id}


async def is_answered(connection: AsyncConnection, asked: Questions) -> bool:
    """True once every inquiry has its answer."""
    # An answer is stored as a whole, so one of its tasks stands for it.
    samples = {inquiry_id: question for question, inquiry_id in asked.inquiries.items()}
    seen = await sightings.of_tasks(connection, {task_id for task_id, _ in samples.values()})
    return all(key in seen and seen[key].inquiry_id == inquiry_id for inquiry_id, key in samples.items())


def _hears(queue: QueueFacts | None) -> bool:
    return queue is not None and queue.consumers > 0 and queue.messages < HEAPED
