"""Putting dead letters away: nothing is sent, and nothing is deleted before its time."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.models import dead_letters


async def discard(connection: AsyncConnection, letter_ids: Sequence[int], *, note: str | None, api_key_id: UUID) -> int:
    """Discard those of the letters that are open; return how many."""
    open_ones = (
        select(dead_letters.c.id)
        .where(dead_letters.c.id == func.any(list(letter_ids)), dead_letters.c.state == "open")
        .order_by(dead_letters.c.id)
        .with_for_update()
    )
    statement = (
        update(dead_letters)
        .where(dead_letters.c.id.in_(open_ones))
        .values(state="discarded", resolved_at=func.now(), resolved_by=api_key_id, resolution_note=note)
    )
    return (await connection.execute(statement)).rowcount
