"""Worker services: what they announce, and whether their workers take tasks.

Functions take an AsyncConnection first and never commit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway import observations
from gateway.models import manifests, services
from gateway.observations import QueueFacts
from taskmesh import control
from taskmesh.contracts.control import Pause
from taskmesh.errors import NotFound
from taskmesh.outbox import insert_messages


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """One worker service as the gateway knows it.

    Attributes:
        types: How many commands it runs and events it listens to.
        paused_at: None while its workers take tasks.
        queues: What was last seen of its queues of work.
    """

    service: str
    release: str
    announced_at: datetime
    types: int
    paused_at: datetime | None
    pause_reason: str | None
    queues: Sequence[QueueFacts]


async def list_services(connection: AsyncConnection, *, only: str | None = None) -> list[Service]:
    """Every service that has announced itself, by name."""
    statement = (
        select(
            manifests.c.service,
            manifests.c.release,
            manifests.c.announced_at,
            func.jsonb_array_length(manifests.c.manifest["types"]).label("types"),
            services.c.paused_at,
            services.c.pause_reason,
        )
        .outerjoin(services, services.c.service == manifests.c.service)
        .order_by(manifests.c.service)
    )
    if only is not None:
        statement = statement.where(manifests.c.service == only)
    seen = await observations.queues(connection)
    rows = (await connection.execute(statement)).mappings()
    return [Service(**row, queues=_queues_of(row["service"], seen)) for row in rows]


def _queues_of(service: str, seen: dict[str, QueueFacts]) -> list[QueueFacts]:
    return [seen[name] for name in (service, f"{service}.events") if name in seen]


async def pause(connection: AsyncConnection, service: str, *, by: UUID, reason: str | None) -> Service:
    """Have the service's workers take no more tasks; what runs is finished.

    Raises:
        NotFound: It has never announced itself.
    """
    return await _set(connection, service, paused=True, by=by, reason=reason)


async def resume(connection: AsyncConnection, service: str, *, by: UUID) -> Service:
    """Have the service's workers take tasks again.

    Raises:
        NotFound: It has never announced itself.
    """
    return await _set(connection, service, paused=False, by=by, reason=None)


async def _set(connection: AsyncConnection, service: str, *, paused: bool, by: UUID, reason: str | None) -> Service:
    if not await list_services(connection, only=service):
        raise NotFound(f"no service {service} has announced itself")
    # Two requests at once are told to the service in the order in which they are written here.
    statement = insert(services).values(service=service, paused_at=None).on_conflict_do_nothing()
    await connection.execute(statement)
    await connection.execute(select(services.c.service).where(services.c.service == service).with_for_update())
    now: datetime = (await connection.execute(select(func.clock_timestamp()))).scalar_one()
    change: dict[str, Any] = {"paused_at": None, "paused_by": None, "pause_reason": None}
    if paused:
        change = {
            "paused_at": func.coalesce(services.c.paused_at, now),
            "paused_by": func.coalesce(services.c.paused_by, by),
            "pause_reason": func.coalesce(services.c.pause_reason, reason),
        }
    await connection.execute(services.update().where(services.c.service == service).values(**change))
    # Said again when it is asked again: repeating it changes nothing, and mends a service whose database was restored.
    await connection.execute(insert_messages([control.outgoing(service, Pause(paused=paused, at=now))]))
    [changed] = await list_services(connection, only=service)
    return changed
