"""Tasks over HTTP: here work is accepted. 202 means committed."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Annotated, Any
from uuid import UUID

import pydantic_core
from fastapi import APIRouter, Header, Path, Query, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Row
from starlette.responses import StreamingResponse

from gateway import idempotency, ledger, waiting
from gateway.accepting import Accepted, accept_batch, accept_task
from gateway.auth import TaskReader, TaskWriter
from gateway.bodies import JsonRoute
from gateway.dependencies import Gateway, GatewayParts
from gateway.ledger import Filter
from gateway.problems import FieldError, Problem, declare
from gateway.routes.preferences import Prefer, wait_seconds
from gateway.schemas import (
    BatchSubmission,
    TaskBatch,
    TaskPage,
    TaskSubmission,
    TaskView,
    Utc,
    decode_cursor,
    encode_cursor,
)
from gateway.transactions import single_statement
from taskmesh import logs
from taskmesh.contracts.lifecycle import TaskState
from taskmesh.errors import DatabaseUnavailable

logger = logging.getLogger(__name__)

router = APIRouter(prefix="/v1/tasks", tags=["tasks"], route_class=JsonRoute)

IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=idempotency.MAX_LENGTH,
        description="Names this request: repeated under the same key it is accepted once and answered alike. "
        "Kept for at least 24 hours, and known to your API key alone.",
    ),
]
TaskId = Annotated[UUID, Path(description="The task's id.")]


class TaskQuery(BaseModel):
    """Filters of a list of tasks, and which page of it."""

    model_config = ConfigDict(extra="forbid")

    type: Annotated[str, Field(max_length=200, pattern=r"^[^\x00]*$")] | None = None
    state: TaskState | None = None
    tag: Annotated[str, Field(max_length=64, pattern=r"^[^\x00]*$")] | None = None
    root_id: UUID | None = None
    """The task that a caller asked for, and everything that followed from it."""
    parent_id: UUID | None = None
    schedule_id: UUID | None = None
    created_after: Utc | None = None
    created_before: Utc | None = None
    limit: Annotated[int, Field(ge=1, le=200)] = 50
    cursor: Annotated[str, Field(max_length=500)] | None = None


@router.post(
    "",
    status_code=202,
    response_model=TaskView,
    responses={
        200: {"model": TaskView, "description": "Finished in time (`Prefer: wait`)"},
        **declare(
            "unknown_type",
            "contract_violation",
            "invalid_request",
            "idempotency_conflict",
            "payload_too_large",
            "unsupported_media_type",
        ),
    },
)
async def submit_task(
    submission: TaskSubmission,
    client: TaskWriter,
    gateway: GatewayParts,
    idempotency_key: IdempotencyKey = None,
    prefer: Prefer = None,
) -> Response:
    """Accept a task. 202 means that it is committed: it will reach exactly one terminal state, whatever crashes."""
    accepted = await accept_task(gateway, client, submission, key=idempotency_key)
    return await _answer_submission(gateway, accepted, prefer)


@router.post(
    ":batchCreate",
    status_code=202,
    response_model=TaskBatch,
    responses=declare(
        "unknown_type",
        "contract_violation",
        "invalid_request",
        "idempotency_conflict",
        "payload_too_large",
        "unsupported_media_type",
    ),
)
async def submit_batch(
    batch: BatchSubmission, client: TaskWriter, gateway: GatewayParts, idempotency_key: IdempotencyKey = None
) -> Response:
    """Accept up to 500 tasks together, or none of them."""
    accepted = await accept_batch(gateway, client, batch, key=idempotency_key)
    return Response(accepted.body, 202, headers=accepted.headers, media_type="application/json")


@router.get("", response_model=TaskPage, responses=declare("invalid_request"))
async def list_tasks(query: Annotated[TaskQuery, Query()], _: TaskReader, gateway: GatewayParts) -> Response:
    """List tasks, newest first. `next_cursor` leads to the next page, with the same filters."""
    after = None
    if query.cursor is not None:
        try:
            after = decode_cursor(query.cursor)
        except ValueError as error:
            fault = FieldError(pointer="/query:cursor", detail="is not a cursor of this gateway")
            raise Problem("invalid_request", "the cursor cannot be read", errors=[fault]) from error
    wanted = Filter(**query.model_dump(exclude={"limit", "cursor"}))
    async with single_statement(gateway.engine) as connection:
        # One more than asked for tells whether there is a next page.
        rows = await ledger.list_tasks(connection, wanted, after=after, limit=query.limit + 1)
    shown = rows[: query.limit]
    cursor = encode_cursor(shown[-1]) if len(rows) > query.limit else None
    page = TaskPage(items=[TaskView.of(row) for row in shown], next_cursor=cursor)
    return Response(page.model_dump_json(), media_type="application/json")


@router.get("/{task_id}", response_model=TaskView, responses=declare("not_found", "invalid_request"))
async def get_task(task_id: TaskId, _: TaskReader, gateway: GatewayParts, prefer: Prefer = None) -> Response:
    """Show a task; with `Prefer: wait=N` once it is finished, or as it is after N seconds."""
    async with single_statement(gateway.engine) as connection:
        row = await ledger.get_task(connection, task_id)
    headers = {}
    seconds = wait_seconds(prefer)
    if seconds:
        headers["Preference-Applied"] = f"wait={seconds}"
        if not TaskState(row.state).terminal:
            row = await waiting.wait_until_finished(
                gateway.engine, gateway.doorbell, row.id, row.root_id, seconds=seconds
            )
    return Response(TaskView.of(row).model_dump_json(), headers=headers, media_type="application/json")


@router.get(
    "/{task_id}/events",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "Server-Sent Events: `id` is the event's number, `event` is `state`, `data` is a TaskEvent",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        },
        204: {"description": "Everything has happened, and you have seen it: do not reconnect"},
        **declare("not_found", "invalid_request"),
    },
)
async def follow_task(
    task_id: TaskId,
    _: TaskReader,
    gateway: GatewayParts,
    last_event_id: Annotated[str | None, Header(max_length=20, pattern=r"^\d{0,18}$")] = None,
    tree: Annotated[bool, Query(description="Follow everything that followed from the task's root.")] = False,  # noqa: FBT002 - a query parameter
) -> Response:
    """Stream what happens to a task until it is finished, from the beginning or from after `Last-Event-ID`."""
    async with single_statement(gateway.engine) as connection:
        row = await ledger.get_task(connection, task_id)
    follower = waiting.Follower(
        engine=gateway.engine,
        doorbell=gateway.doorbell,
        root_id=row.root_id,
        task_id=None if tree else row.id,
        after=int(last_event_id or 0),
    )
    if last_event_id and await follower.is_over():
        return Response(status_code=204)
    return StreamingResponse(
        _server_sent(follower),
        media_type="text/event-stream",
        # nginx and its kin would hold small pieces back.
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


class TaskEvent(BaseModel):
    """One step in a task's timeline."""

    seq: int
    task_id: UUID
    state: TaskState
    attempt: int
    at: Utc
    detail: dict[str, Any] | None


async def _server_sent(follower: waiting.Follower) -> AsyncIterator[str]:
    yield "retry: 1000\n\n"
    async for row in follower.follow():
        yield ": still here\n\n" if row is None else _sse(row)


def _sse(row: Row[Any]) -> str:
    event = TaskEvent(
        seq=row.seq, task_id=row.task_id, state=row.state, attempt=row.attempt, at=row.at, detail=row.detail
    )
    return f"id: {row.seq}\nevent: state\ndata: {event.model_dump_json()}\n\n"


async def _answer_submission(gateway: Gateway, accepted: Accepted, prefer: str | None) -> Response:
    headers = accepted.headers
    seconds = wait_seconds(prefer)
    if seconds and (task_id := accepted.task_id):
        headers["Preference-Applied"] = f"wait={seconds}"
        try:
            row = await waiting.wait_until_finished(gateway.engine, gateway.doorbell, task_id, task_id, seconds=seconds)
        except DatabaseUnavailable:
            # The task is committed. A 503 now would be a lie that has the caller submit it again.
            told = pydantic_core.from_json(accepted.body)
            facts = logs.of_task(task_id, told["type"], told["attempt"], trace_id=told["trace_id"])
            logger.warning("wait given up", extra=facts)
        else:
            if TaskState(row.state).terminal:
                return Response(TaskView.of(row).model_dump_json(), 200, headers=headers, media_type="application/json")
    return Response(accepted.body, 202, headers=headers, media_type="application/json")
