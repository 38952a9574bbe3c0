"""Accepting work: submissions are held against the contracts of their types and committed, each of them once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

import pydantic_core
from opentelemetry import trace
from pydantic import BaseModel

from gateway import idempotency, measuring
from gateway.auth import Client
from gateway.bodies import MAX_TASK_BYTES
from gateway.catalogue import KnownType, Snapshot
from gateway.dependencies import Gateway
from gateway.new_tasks import NewTask
from gateway.problems import KINDS, FieldError, Problem, pointer
from gateway.schemas import BatchSubmission, TaskBatch, TaskSubmission, TaskView
from gateway.tracing import ledger_span
from gateway.transactions import transaction
from taskmesh import traces

logger = logging.getLogger(__name__)

MANY: Final = 20
"""More payloads than these are validated off the event loop, which has other callers to serve."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """An answer to a submission.

    Attributes:
        body: Byte for byte.
        replayed: The request was answered before.
        task_id: Of the one task that was submitted; None for a batch.
    """

    body: bytes
    replayed: bool
    task_id: UUID | None = None

    @property
    def headers(self) -> dict[str, str]:
        """What the answer says beside its body."""
        headers = {} if self.task_id is None else {"Location": f"/v1/tasks/{self.task_id}"}
        return headers | {"Idempotent-Replayed": "true"} if self.replayed else headers


async def accept_task(gateway: Gateway, client: Client, submission: TaskSubmission, *, key: str | None) -> Accepted:
    """Commit a task, or find the answer that the same request got before.

    Args:
        key: The request's idempotency key.

    Raises:
        Problem: `unknown_type` or `contract_violation`.
        TaskmeshError: As of `Submissions.submit`.
    """
    first: bytes | None
    try:
        known = await check_payload(gateway, submission.type, submission.payload)
    except Problem as refusal:
        first = await recall(gateway, client, key, submission, refusal)
    else:
        task = _new_task(submission, known, client)
        body = TaskView.json_of(task.row())
        first = await _commit(gateway, client, [task], key=key, request=submission, body=body)
        if first is None:
            span = trace.get_current_span()
            span.set_attribute("taskmesh.task.id", str(task.id))
            span.set_attribute("taskmesh.task.type", task.type)
            return Accepted(body=body, replayed=False, task_id=task.id)
    return Accepted(body=first, replayed=True, task_id=UUID(pydantic_core.from_json(first)["id"]))


async def accept_batch(gateway: Gateway, client: Client, batch: BatchSubmission, *, key: str | None) -> Accepted:
    """The same of many tasks: all of them or none.

    Raises:
        Problem, TaskmeshError: As of `accept_task`; or `payload_too_large`.
    """
    snapshot = await gateway.catalogue.current()
    if any(submission.type not in snapshot.commands for submission in batch.tasks):
        snapshot = await gateway.catalogue.current(max_age_seconds=0)
    first: bytes | None
    try:
        if len(batch.tasks) > MANY:
            await asyncio.to_thread(_check_batch, batch.tasks, snapshot)
        else:
            _check_batch(batch.tasks, snapshot)
    except Problem as refusal:
        first = await recall(gateway, client, key, batch, refusal)
    else:
        new = [_new_task(submission, snapshot.commands[submission.type], client) for submission in batch.tasks]
        body = TaskBatch.json_of([task.row() for task in new])
        first = await _commit(gateway, client, new, key=key, request=batch, body=body)
        if first is None:
            return Accepted(body=body, replayed=False)
    return Accepted(body=first, replayed=True)


async def check_payload(gateway: Gateway, type_name: str, payload: Mapping[str, Any]) -> KnownType:
    """Hold a payload against the contract of its type, as its worker announces it.

    Raises:
        Problem: `unknown_type` or `contract_violation`.
    """
    known, snapshot = await gateway.catalogue.find_command(type_name)
    if known is None:
        raise _unknown_type(type_name, snapshot)
    errors = known.validator.errors(payload)
    if errors:
        raise Problem("contract_violation", f"the payload does not fit {known.type}", errors=errors)
    return known


def _unknown_type(type_name: str, snapshot: Snapshot, errors: Sequence[FieldError] = ()) -> Problem:
    if snapshot.find(type_name) is not None:
        return Problem("unknown_type", "this type is an event; only commands can be submitted", errors=errors)
    return Problem(
        "unknown_type",
        "no worker has announced this type",
        errors=errors or [FieldError(pointer="/type", detail="is not a known task type")],
        nearest=snapshot.nearest(type_name),
    )


def _check_batch(submissions: Sequence[TaskSubmission], snapshot: Snapshot) -> None:
    errors: list[FieldError] = []
    for index, submission in enumerate(submissions):
        known = snapshot.commands.get(submission.type)
        if known is None:
            fault = FieldError(pointer=pointer(["tasks", index, "type"]), detail="is not a known task type")
            raise _unknown_type(submission.type, snapshot, [fault])
        if len(pydantic_core.to_json(submission.payload)) > MAX_TASK_BYTES:
            fault = FieldError(pointer=pointer(["tasks", index, "payload"]), detail="has more than 128 KiB")
            raise Problem("payload_too_large", KINDS["payload_too_large"].advice, errors=[fault])
        errors += known.validator.errors(submission.payload, at=("tasks", index, "payload"))
    if errors:
        raise Problem("contract_violation", "payloads do not fit their types; no task was accepted", errors=errors)


def _new_task(submission: TaskSubmission, known: KnownType, client: Client) -> NewTask:
    now = datetime.now(UTC)
    due_at = submission.due_at(now)
    return NewTask(
        type=known.type,
        service=known.service,
        version=known.manifest.version,
        payload=submission.payload,
        created_at=now,
        due_at=due_at,
        expires_at=submission.expires_at,
        priority=submission.priority,
        tags=submission.tags,
        api_key_id=client.id,
        creation=traces.due(due_at),
    )


async def _commit(
    gateway: Gateway,
    client: Client,
    new: Sequence[NewTask],
    *,
    key: str | None,
    request: BaseModel,
    body: bytes,
) -> bytes | None:
    """Commit tasks; returns the first answer instead if the request was answered before."""
    named = None if key is None else idempotency.Key.of(request, key, api_key_id=client.id, response=body)
    with ledger_span():
        first = await gateway.submissions.submit(new, named, size=len(body))
    if first is None:
        measuring.count_accepted(new)
        for task in new:
            logger.info("task accepted", extra={**task.log_facts, "state": task.state})
    return first


async def recall(gateway: Gateway, client: Client, key: str | None, request: BaseModel, refusal: Problem) -> bytes:
    """The first answer to a request that is refused by now: what was accepted once stays accepted.

    Its type may have changed or gone by the time that a caller repeats it.

    Raises:
        Problem: The refusal, if the request is new.
    """
    if key is not None:
        async with transaction(gateway.engine) as connection:
            sha256 = idempotency.fingerprint(request)
            first = await idempotency.recall(connection, client.id, key, request_sha256=sha256)
        if first is not None:
            return first
    raise refusal
