"""The audit over HTTP: what became of every task, and which ones nobody can account for."""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Annotated, Any, Final
from uuid import UUID

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway import audits, schedules, unaccounted
from gateway.auth import ReconciliationReader, ReconciliationWriter
from gateway.bodies import JsonRoute
from gateway.dependencies import Gateway, GatewayParts
from gateway.problems import Problem, declare
from gateway.schemas import Utc
from gateway.transactions import transaction
from gateway.unaccounted import Record

router = APIRouter(prefix="/v1/reconciliation", tags=["reconciliation"], route_class=JsonRoute)

WAIT_SECONDS: Final = 60.0
ASK_AGAIN_SECONDS: Final = 5.0
POLL_SECONDS: Final = 0.25
SHOWN: Final = 500


class GapView(BaseModel):
    """A queue that holds messages, but fewer than the tasks that can be nowhere else."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    queue: str
    presumed: int
    messages: int
    """With dead letters that are not stored yet."""
    missing: int
    """Nobody can tell which of the presumed ones."""


class AuditView(BaseModel):
    """One audit: `accepted` is the sum of the five numbers after it."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    id: int
    started_at: Utc
    finished_at: Utc
    accepted: int
    waiting: int
    running: int
    finished: int
    dead: int
    """With an open dead letter."""
    unaccounted: int
    suspected: int
    """Tasks that the next audit will name, unless it finds them."""
    mended: int
    """Tasks that had ended in their service, and whose report was lost."""
    redriven: int
    """Tasks whose message was sent again."""
    unknown: dict[str, int]
    """Tasks that could not be judged, by reason: `broker_unreachable`, `service_silent`, `queue_not_observed`. They
    count as waiting or running, as the ledger has them."""
    gaps: list[GapView]
    grace_seconds: float
    """Tasks with newer news were not examined."""
    examined: int
    complete: bool
    """False if there were too many silent tasks for one audit: the next one goes on."""

    @classmethod
    def of(cls, row: Row[Any]) -> AuditView:
        """Show an audit."""
        return cls.model_validate({**row._mapping, **row.detail})  # noqa: SLF001 - SQLAlchemy's documented way


class UnaccountedTask(BaseModel):
    """A task that nobody can account for."""

    model_config = ConfigDict(from_attributes=True, use_attribute_docstrings=True)

    task_id: UUID
    type: str
    service: str
    since: Utc | None
    """When it was missed first."""
    last_seen_at: Utc | None
    last_seen_where: str | None
    redrives: int
    """How often its message was sent again. 0 while it cannot be: the gateway does not know its payload."""
    redriven_at: Utc | None


class Reconciliation(BaseModel):
    """The last audit, and whom it has named."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    audit: AuditView | None
    """None before the first."""
    unaccounted: list[UnaccountedTask]
    """The oldest 500."""


class RunRequest(BaseModel):
    """How to audit."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    grace_seconds: Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)] | None = None
    """Examine tasks as young as that, too. A task is named by two audits at least ten seconds apart all the same."""


@router.get("", responses=declare())
async def get_reconciliation(_: ReconciliationReader, gateway: GatewayParts) -> Reconciliation:
    """Show the last audit."""
    async with transaction(gateway.engine) as connection:
        return await _view(connection, await audits.last(connection))


@router.post(":run", responses=declare("reconciler_silent", "invalid_request"))
async def run_reconciliation(
    _: ReconciliationWriter, gateway: GatewayParts, request: RunRequest | None = None
) -> Reconciliation:
    """Audit now: the answer is an audit that started after the call, and comes when it is finished."""
    grace_seconds = request.grace_seconds if request is not None else None
    async with transaction(gateway.engine) as connection:
        asked_at = await schedules.clock(connection)
    clock = asyncio.get_running_loop().time
    deadline = clock() + WAIT_SECONDS
    ask_at = clock()
    while clock() < deadline and not gateway.doorbell.stopping:
        if clock() >= ask_at:
            # Again and again: nobody may have listened.
            ask_at = clock() + ASK_AGAIN_SECONDS
            async with transaction(gateway.engine) as connection:
                await audits.ask(connection, grace_seconds=grace_seconds)
        await asyncio.sleep(POLL_SECONDS)
        if (found := await _finished(gateway, asked_at, grace_seconds)) is not None:
            return found
    raise Problem("reconciler_silent", f"no audit was finished within {WAIT_SECONDS:.0f} seconds")


async def _finished(gateway: Gateway, asked_at: datetime, grace_seconds: float | None) -> Reconciliation | None:
    async with transaction(gateway.engine) as connection:
        row = await audits.started_after(connection, asked_at, grace_seconds=grace_seconds)
        return None if row is None else await _view(connection, row)


async def _view(connection: AsyncConnection, audit: Row[Any] | None) -> Reconciliation:
    named: list[Record] = await unaccounted.named(connection, limit=SHOWN)
    return Reconciliation(
        audit=None if audit is None else AuditView.of(audit),
        unaccounted=[UnaccountedTask.model_validate(record) for record in named],
    )
