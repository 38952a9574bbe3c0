"""What a caller can ask of dead letters, as operations without I/O (exchange.py), and what the gateway answers."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal, TypedDict
from uuid import UUID

from pydantic import Field

from taskmesh.client.exchange import Operation, Patience, Request, call
from taskmesh.client.operations import instant
from taskmesh.client.paging import emit_pages
from taskmesh.client.results import Result, Task
from taskmesh.contracts.lifecycle import TaskState

PATH = "/v1/dead-letters"
BULK_SECONDS = 20.0
"""How much longer than usual the gateway may take for thousands of letters."""


class LetterFilter(TypedDict, total=False):
    """Which dead letters are meant; what is left out, or None, does not narrow the choice."""

    service: str | None
    type: str | None
    reason: str | None
    """The broker's word: `rejected`, `delivery_limit`, `expired`, `maxlen`; or `malformed` from the projector."""
    code: str | None
    """What is wrong with it, such as `malformed`, `unknown_task`, `contract_violation` or `poison`."""
    task_id: UUID | str | None
    fingerprint: str | None
    """The same for letters that died of the same thing."""
    since: datetime | None
    until: datetime | None


class DeadLetter(Result):
    """A message that could not be run."""

    id: int
    state: Literal["open", "replayed", "discarded"]
    service: str | None = None
    queue: str
    type: str | None = None
    task_id: UUID | None = None
    reason: str
    code: str | None = None
    error: str | None = None
    exception: str | None = None
    error_fingerprint: str | None = None
    attempt: int | None = None
    trace_id: str | None = None
    size: int = 0
    died_at: datetime | None = None
    received_at: datetime
    resolved_at: datetime | None = None
    resolved_by: UUID | None = None
    resolution_note: str | None = None
    replay_task_id: UUID | None = None


class DeadLetterPage(Result):
    """One page of dead letters."""

    items: tuple[DeadLetter, ...] = ()
    next_cursor: str | None = None


class DeadLetterGroup(Result):
    """Dead letters that died of the same thing."""

    fingerprint: str | None
    count: int
    first_at: datetime
    last_at: datetime
    sample_id: int
    """The newest letter of the group."""
    service: str | None = None
    type: str | None = None
    reason: str
    code: str | None = None
    error: str | None = None
    exception: str | None = None


class DeadLetterGroups(Result):
    """Groups of dead letters, the largest first."""

    items: tuple[DeadLetterGroup, ...] = ()


class Body(Result):
    """A message's body, as text if it is UTF-8, else in base64."""

    text: str | None = None
    base64: str | None = None
    truncated: bool = False


class Step(Result):
    """One step in the timeline of a letter's task."""

    seq: int
    state: TaskState
    attempt: int
    at: datetime
    detail: dict[str, Any] | None = None


class DeadLetterDetail(DeadLetter):
    """A dead letter with all that is known of it."""

    exchange: str = ""
    routing_key: str = ""
    headers: dict[str, Any] = Field(default_factory=dict)
    properties: dict[str, Any] = Field(default_factory=dict)
    body: Body
    history: tuple[Step, ...] = ()
    task_url: str | None = None


class Replayed(Result):
    """A letter that was sent again, and its task; None for a message that is no task."""

    letter: DeadLetter
    task: Task | None = None


class RefusalReason(Result):
    """Why some letters cannot be sent again."""

    code: str
    count: int
    sample_id: int
    detail: str = ""


class BulkReplay(Result):
    """What a bulk replay has done, or would do."""

    dry_run: bool
    matched: int
    replayed: int
    refused: int
    reasons: tuple[RefusalReason, ...] = ()
    first_due_at: datetime | None = None
    last_due_at: datetime | None = None


class BulkDiscard(Result):
    """What a bulk discard has done, or would do."""

    dry_run: bool
    matched: int
    discarded: int


def list_letters(
    wanted: LetterFilter, state: str | None, limit: int | None, page_size: int, patience: Patience
) -> Operation[None]:
    """Emit dead letters, newest first."""
    query = _query(wanted, state)
    yield from emit_pages(PATH, query, DeadLetterPage, limit=limit, page_size=page_size, patience=patience)


def list_groups(wanted: LetterFilter, state: str | None, patience: Patience) -> Operation[tuple[DeadLetterGroup, ...]]:
    """The groups of letters that died of the same thing, the largest first."""
    request = Request(method="GET", path=f"{PATH}/groups", query=_query(wanted, state), repeatable=True)
    answer = yield from call(request, patience)
    return DeadLetterGroups.model_validate_json(answer.body).items


def get(letter_id: int, patience: Patience) -> Operation[DeadLetterDetail]:
    """The letter with its body, its headers and what has happened to its task."""
    answer = yield from call(Request(method="GET", path=f"{PATH}/{letter_id}", repeatable=True), patience)
    return DeadLetterDetail.model_validate_json(answer.body)


def replay(
    letter_id: int, payload: Mapping[str, Any] | None, type_name: str | None, patience: Patience
) -> Operation[Replayed]:
    """Send a letter again. Repeated after a lost answer it would be refused, as its own doing: so it is not."""
    edit = {"payload": None if payload is None else dict(payload), "type": type_name}
    body = {name: value for name, value in edit.items() if value is not None} or None
    request = Request(method="POST", path=f"{PATH}/{letter_id}:replay", body=body, repeatable=False)
    answer = yield from call(request, patience)
    return Replayed.model_validate_json(answer.body)


def discard(letter_id: int, note: str | None, patience: Patience) -> Operation[DeadLetter]:
    """Put a letter away."""
    body = None if note is None else {"note": note}
    request = Request(method="POST", path=f"{PATH}/{letter_id}:discard", body=body, repeatable=True)
    answer = yield from call(request, patience)
    return DeadLetter.model_validate_json(answer.body)


def replay_many(
    wanted: LetterFilter, rate_per_second: float | None, limit: int | None, patience: Patience, *, dry_run: bool
) -> Operation[BulkReplay]:
    """Send the open letters that match again, at most 10,000 of them; each is sent once however often this is said."""
    said = {"rate_per_second": rate_per_second, "limit": limit}
    body = {"filter": _json(wanted), "dry_run": dry_run, **{k: v for k, v in said.items() if v is not None}}
    return BulkReplay.model_validate_json((yield from _bulk("replay", body, repeatable=dry_run, patience=patience)))


def discard_many(
    wanted: LetterFilter, note: str | None, limit: int | None, patience: Patience, *, dry_run: bool
) -> Operation[BulkDiscard]:
    """Put the open letters that match away, at most 10,000 of them."""
    said = {"note": note, "limit": limit}
    body = {"filter": _json(wanted), "dry_run": dry_run, **{k: v for k, v in said.items() if v is not None}}
    return BulkDiscard.model_validate_json((yield from _bulk("discard", body, repeatable=dry_run, patience=patience)))


def _bulk(verb: str, body: Mapping[str, Any], *, repeatable: bool, patience: Patience) -> Operation[bytes]:
    # A figure of what was done must not be lost to a repetition, which would find less to do.
    request = Request(method="POST", path=f"{PATH}:{verb}", body=body, repeatable=repeatable, hold_seconds=BULK_SECONDS)
    answer = yield from call(request, patience)
    return answer.body


def _query(wanted: LetterFilter, state: str | None) -> tuple[tuple[str, str], ...]:
    return (*((("state", state),) if state else ()), *_json(wanted).items())


def _json(wanted: LetterFilter) -> dict[str, str]:
    return {
        name: instant(value) if isinstance(value, datetime) else str(value)
        for name, value in wanted.items()
        if value is not None
    }
