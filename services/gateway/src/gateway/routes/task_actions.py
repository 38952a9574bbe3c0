"""What can be done to a task that exists: cancel it, try it again, ask why it is not done."""

from __future__ import annotations

import logging
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Path, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Row

from gateway import cancelling, evidence, explaining, idempotency, ledger, measuring, retries, waiting
from gateway.auth import Client, TaskReader, TaskWriter
from gateway.bodies import JsonRoute
from gateway.cancelling import CancelOutcome, Wish
from gateway.dependencies import Gateway, GatewayParts
from gateway.explaining import Reason
from gateway.problems import declare
from gateway.routes.preferences import Prefer, wait_seconds
from gateway.routes.tasks import IdempotencyKey
from gateway.schemas import TaskView, Utc
from gateway.tracing import ledger_transaction
from gateway.transactions import transaction
from taskmesh import telemetry
from taskmesh.contracts.lifecycle import TaskKind, TaskState
from taskmesh.errors import DatabaseUnavailable

logger = logging.getLogger(__name__)

router = APIRouter(prefix="/v1/tasks", tags=["tasks"], route_class=JsonRoute)

TaskId = Annotated[UUID, Path(description="The task's id.")]


class CancelRequest(BaseModel):
    """How a task is to be cancelled."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    reason: Annotated[str, Field(max_length=500, pattern=r"^[^\x00]*$")] | None = None
    """Shown with the task."""
    force: bool = False
    """Kill the process that runs it, if its type allows that."""


class CancelAnswer(BaseModel):
    """What became of a cancellation."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    outcome: CancelOutcome
    detail: str
    """What has happened and what will, in one sentence."""
    task: TaskView


class RetryRequest(BaseModel):
    """How a task is to be tried again."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    payload: dict[str, Any] | None = None
    """Instead of the task's own; needed where the gateway does not know that."""


class ExplanationView(BaseModel):
    """Why a task is not done."""

    model_config = ConfigDict(from_attributes=True, use_attribute_docstrings=True)

    task_id: UUID
    state: TaskState
    reason: Reason
    """For programs."""
    summary: str
    """For people."""
    advice: str
    next_at: Utc | None
    """When something is to happen next, where that is known."""
    facts: dict[str, Any]
    """What the reason was found by. `stale` marks what was seen too long ago to prove anything."""
    observed_at: Utc


class _Retry(BaseModel):
    """A retry as its idempotency key names it."""

    task_id: UUID
    payload: dict[str, Any] | None


@router.post(
    "/{task_id}:cancel",
    response_model=CancelAnswer,
    responses={
        202: {"model": CancelAnswer, "description": "The task's service has been told, and will say how it ended"},
        **declare("not_found", "invalid_request", "force_not_allowed", "unsupported_media_type"),
    },
)
async def cancel_task(
    task_id: TaskId,
    client: TaskWriter,
    gateway: GatewayParts,
    request: CancelRequest | None = None,
    prefer: Prefer = None,
) -> Response:
    """Cancel a task at whatever stage it is. 200 says how it has ended; 202 that its service will say so."""
    asked = request or CancelRequest()
    wish = Wish(by=client.id, reason=asked.reason, force=asked.force)
    allowed = asked.force and await _force_allowed(gateway, task_id)
    async with ledger_transaction(gateway.engine) as connection:
        outcome, task = await cancelling.cancel(
            connection, task_id, wish, force_allowed=allowed, traceparent=telemetry.current_traceparent()
        )
    if outcome is CancelOutcome.CANCELLED:
        measuring.count_cancelled(task)
    logger.info("cancellation asked for", extra={**ledger.log_facts(task), "outcome": outcome, "force": asked.force})
    headers = {}
    seconds = wait_seconds(prefer)
    if seconds and outcome is CancelOutcome.REQUESTED:
        headers["Preference-Applied"] = f"wait={seconds}"
        outcome, task = await _wait(gateway, task, seconds)
    view = TaskView.of(task) if client.may_read(task) else TaskView.of(task).without_contents()
    answer = CancelAnswer(outcome=outcome, detail=cancelling.describe(outcome, task), task=view)
    status = 202 if outcome is CancelOutcome.REQUESTED else 200
    return Response(answer.model_dump_json(), status, headers=headers, media_type="application/json")


async def _force_allowed(gateway: Gateway, task_id: UUID) -> bool:
    async with transaction(gateway.engine) as connection:
        task = await ledger.get_task(connection, task_id)
    known = await gateway.catalogue.find(task.type, TaskKind(task.kind), task.service)
    return known is not None and known.manifest.force_cancel


async def _wait(gateway: Gateway, task: Row[Any], seconds: int) -> tuple[CancelOutcome, Row[Any]]:
    """What became of a cancellation that was asked for, within the time."""
    try:
        task = await waiting.wait_until_finished(
            gateway.engine, gateway.doorbell, task.id, task.root_id, seconds=seconds
        )
    except DatabaseUnavailable:
        # The wish is committed; only its end is not known.
        logger.warning("wait given up", extra=ledger.log_facts(task))
    state = TaskState(task.state)
    if not state.terminal:
        return CancelOutcome.REQUESTED, task
    return (CancelOutcome.CANCELLED if state is TaskState.CANCELLED else CancelOutcome.TOO_LATE), task


@router.post(
    "/{task_id}:retry",
    status_code=202,
    response_model=TaskView,
    responses=declare(
        "not_found",
        "not_failed",
        "already_retried",
        "payload_unknown",
        "unknown_type",
        "contract_violation",
        "invalid_request",
        "idempotency_conflict",
        "unsupported_media_type",
    ),
)
async def retry_task(
    task_id: TaskId,
    client: TaskWriter,
    gateway: GatewayParts,
    request: RetryRequest | None = None,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Try a task again that failed, was cancelled or expired: as a new task, with `retry_of` the old one's id."""
    asked = _Retry(task_id=task_id, payload=request.payload if request else None)
    first = await _recall(gateway, client, idempotency_key, asked)
    if first is None:
        try:
            body, replayed = await _retry(gateway, client, idempotency_key, asked), False
        except retries.AlreadyRetried:
            # Perhaps by this very request, on another connection.
            first = await _recall(gateway, client, idempotency_key, asked)
            if first is None:
                raise
    if first is not None:
        body, replayed = first, True
    headers = {"Location": f"/v1/tasks/{TaskView.model_validate_json(body).id}"}
    if replayed:
        headers["Idempotent-Replayed"] = "true"
    return Response(body, 202, headers=headers, media_type="application/json")


async def _recall(gateway: Gateway, client: Client, key: str | None, asked: _Retry) -> bytes | None:
    if key is None:
        return None
    async with transaction(gateway.engine) as connection:
        return await idempotency.recall(connection, client.id, key, request_sha256=idempotency.fingerprint(asked))


async def _retry(gateway: Gateway, client: Client, key: str | None, asked: _Retry) -> bytes:
    async with transaction(gateway.engine) as connection:
        last = await retries.newest_try(connection, asked.task_id)
        payload = retries.payload_for(last, asked.payload)
    # Outside the transaction, for the catalogue reads on a connection of its own; a payload does not change.
    known = await retries.check(gateway.catalogue, retries.origin_of(last, payload))
    async with ledger_transaction(gateway.engine) as connection:
        new = await retries.retry(
            connection,
            asked.task_id,
            payload=payload,
            version=known.manifest.version,
            api_key_id=client.id,
        )
        view = TaskView.of(new.row())
        body = (view if client.may_read(last) else view.without_contents()).model_dump_json().encode()
        if key is not None:
            named = idempotency.Key.of(asked, key, api_key_id=client.id, response=body)
            if await idempotency.claim(connection, named):
                raise retries.AlreadyRetried(f"task {asked.task_id} was tried again by this very request")
    measuring.count_accepted([new])
    logger.info("task retried", extra={**new.log_facts, "retry_of": str(new.retry_of)})
    return body


@router.get("/{task_id}:explain", responses=declare("not_found", "invalid_request"))
async def explain_task(task_id: TaskId, _: TaskReader, gateway: GatewayParts) -> ExplanationView:
    """Say why a task is not done: one reason, the facts, and what to do about it."""
    async with transaction(gateway.engine) as connection:
        seen = await evidence.gather(connection, task_id)
    finding = explaining.explain(seen)
    return ExplanationView(
        task_id=task_id,
        state=seen.state,
        reason=finding.reason,
        summary=finding.summary,
        advice=finding.advice,
        next_at=finding.next_at,
        facts=seen.facts(),
        observed_at=seen.now,
    )
