"""Looking dead letters up: one, a page of them, or groups that died of the same thing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Final
from uuid import UUID

from sqlalchemy import ColumnElement, Row, func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.models import dead_letters
from taskmesh.errors import NotFound

SHOWN_BYTES: Final = 1024 * 1024
"""Of a body; the rest is left to SQL."""


class LetterState(StrEnum):
    """What a person has done about a dead letter."""

    OPEN = "open"
    REPLAYED = "replayed"
    DISCARDED = "discarded"


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Which letters are meant; None leaves a field open.

    Attributes:
        since, until: When the gateway has stored them.
        fingerprint: Of their error.
    """

    state: LetterState | None = None
    service: str | None = None
    type: str | None = None
    reason: str | None = None
    code: str | None = None
    task_id: UUID | None = None
    fingerprint: str | None = None
    since: datetime | None = None
    until: datetime | None = None

    def conditions(self) -> list[ColumnElement[bool]]:
        """The same in SQL."""
        letters = dead_letters.c
        conditions: list[ColumnElement[bool]] = []
        if self.state is not None:
            # Written out rather than bound, so that the planner sees that the partial index covers it.
            conditions.append(text("dead_letters.state = '" + self.state.value + "'"))  # type: ignore[arg-type]
        equal = {
            letters.service: self.service,
            letters.type: self.type,
            letters.reason: self.reason,
            letters.code: self.code,
            letters.task_id: self.task_id,
            letters.error_fingerprint: self.fingerprint,
        }
        conditions += [column == value for column, value in equal.items() if value is not None]
        if self.since is not None:
            conditions.append(letters.received_at >= self.since)
        if self.until is not None:
            conditions.append(letters.received_at < self.until)
        return conditions


SHOWN: Final = (
    *(column for column in dead_letters.c if column.name not in {"body", "headers", "properties", "fingerprint"}),
    func.octet_length(dead_letters.c.body).label("size"),
)
"""What a list shows of a letter: nothing that a stranger has written, but the names of its type and queue."""


async def list_letters(
    connection: AsyncConnection, wanted: Filter, *, before: int | None, limit: int
) -> Sequence[Row[*tuple[Any, ...]]]:
    """One page, the newest first."""
    statement = select(*SHOWN).where(*wanted.conditions()).order_by(dead_letters.c.id.desc()).limit(limit)
    if before is not None:
        statement = statement.where(dead_letters.c.id < before)
    return (await connection.execute(statement)).all()


async def list_groups(connection: AsyncConnection, wanted: Filter, *, limit: int) -> Sequence[Row[*tuple[Any, ...]]]:
    """Letters that died of the same thing, the largest group first, each with its newest letter as the sample."""
    letters = dead_letters.c
    groups = (
        select(
            letters.error_fingerprint.label("fingerprint"),
            func.count().label("count"),
            func.min(letters.received_at).label("first_at"),
            func.max(letters.received_at).label("last_at"),
            func.max(letters.id).label("sample_id"),
        )
        .where(*wanted.conditions())
        .group_by(letters.error_fingerprint)
        .order_by(func.count().desc(), func.max(letters.id).desc())
        .limit(limit)
        .subquery()
    )
    shown = (letters.service, letters.type, letters.reason, letters.code, letters.error, letters.exception)
    statement = (
        select(*groups.c, *shown)
        .join(dead_letters, letters.id == groups.c.sample_id)
        .order_by(groups.c["count"].desc(), groups.c.sample_id.desc())
    )
    return (await connection.execute(statement)).all()


async def count(connection: AsyncConnection, wanted: Filter) -> int:
    """How many letters are meant."""
    statement = select(func.count()).select_from(dead_letters).where(*wanted.conditions())
    return (await connection.execute(statement)).scalar_one()


async def get(connection: AsyncConnection, letter_id: int) -> Row[*tuple[Any, ...]]:
    """The letter with its headers, its properties, and the beginning of its body.

    Raises:
        NotFound: There is none.
    """
    letters = dead_letters.c
    beginning = func.substr(letters.body, 1, SHOWN_BYTES).label("body")
    statement = select(*SHOWN, letters.headers, letters.properties, beginning).where(letters.id == letter_id)
    row = (await connection.execute(statement)).one_or_none()
    if row is None:
        raise NotFound(f"there is no dead letter {letter_id}")
    return row


async def matching(connection: AsyncConnection, wanted: Filter, *, limit: int) -> Sequence[int]:
    """The ids of the letters that are meant, the oldest first: who has waited longest is seen to first."""
    statement = select(dead_letters.c.id).where(*wanted.conditions()).order_by(dead_letters.c.id).limit(limit)
    return (await connection.scalars(statement)).all()
