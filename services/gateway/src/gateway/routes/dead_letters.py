"""Dead letters over HTTP: what could not be run, why, and what shall become of it."""

from __future__ import annotations

import base64
import json
import logging
from typing import Annotated, Any, Final
from uuid import UUID

from fastapi import APIRouter, Path, Query, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway import ledger
from gateway.auth import DeadLetterReader, DeadLetterWriter
from gateway.bodies import JsonRoute
from gateway.dead_letters import discarding, listing, replaying
from gateway.dead_letters.listing import Filter, LetterState
from gateway.dead_letters.replaying import Edit, Order, Outcome
from gateway.dependencies import GatewayParts
from gateway.problems import FieldError, Problem, declare
from gateway.schemas import TaskView, TypeName, Utc
from gateway.transactions import transaction
from taskmesh import telemetry
from taskmesh.contracts.lifecycle import TaskState
from taskmesh.errors import NotFound

logger = logging.getLogger(__name__)

router = APIRouter(prefix="/v1/dead-letters", tags=["dead letters"], route_class=JsonRoute)

MOST_AT_ONCE: Final = 10_000
TIMELINE_SHOWN: Final = 500

LetterId = Annotated[int, Path(ge=1, lt=2**63, description="The dead letter's id.")]
Word = Annotated[str, Field(max_length=255, pattern=r"^[^\x00]*$")]


class LetterFilter(BaseModel):
    """Which dead letters are meant; what is left out does not narrow the choice."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    service: Word | None = None
    """The service whose queue it died in."""
    type: Word | None = None
    reason: Word | None = None
    """The broker's word: `rejected`, `delivery_limit`, `expired`, `maxlen`; or `malformed` from the projector."""
    code: Word | None = None
    """What is wrong with it, such as `malformed`, `unknown_task`, `contract_violation` or `poison`."""
    task_id: UUID | None = None
    fingerprint: Word | None = None
    """The same for letters that died of the same thing; see `GET /v1/dead-letters/groups`."""
    since: Utc | None = None
    """Stored at or after."""
    until: Utc | None = None
    """Stored before."""

    def chosen(self, state: LetterState | None) -> Filter:
        """What will be looked for."""
        names = ("service", "type", "reason", "code", "task_id", "fingerprint", "since", "until")
        return Filter(state=state, **{name: getattr(self, name) for name in names})


class LetterQuery(LetterFilter):
    """Filters of a list of dead letters, and which page of it."""

    state: LetterState | None = None
    limit: Annotated[int, Field(ge=1, le=200)] = 50
    cursor: Annotated[str, Field(max_length=100)] | None = None

    def before(self) -> int | None:
        """Where the page before ended."""
        if self.cursor is None:
            return None
        try:
            return _decode_cursor(self.cursor)
        except ValueError as error:
            fault = FieldError(pointer="/query:cursor", detail="is not a cursor of this gateway")
            raise Problem("invalid_request", "the cursor cannot be read", errors=[fault]) from error


class GroupQuery(LetterFilter):
    """Filters of groups of dead letters."""

    state: LetterState | None = None
    limit: Annotated[int, Field(ge=1, le=200)] = 50


class LetterView(BaseModel):
    """A dead letter in a list: nothing of its body or headers. Times are RFC 3339 in UTC."""

    model_config = ConfigDict(from_attributes=True, use_attribute_docstrings=True)

    id: int
    state: LetterState
    service: str | None
    queue: str
    """Where it died."""
    type: str | None
    task_id: UUID | None
    """Null if it has no id that can be read."""
    reason: str
    code: str | None
    error: str | None
    """One sentence; names places and limits, never a value of the payload."""
    exception: str | None
    error_fingerprint: str | None
    attempt: int | None
    trace_id: str | None
    size: int
    """Bytes of the body."""
    died_at: Utc | None
    """By the broker's clock, to the second."""
    received_at: Utc
    resolved_at: Utc | None
    resolved_by: UUID | None
    """The API key."""
    resolution_note: str | None
    replay_task_id: UUID | None


class LetterPage(BaseModel):
    """One page of dead letters, the newest first."""

    items: list[LetterView]
    next_cursor: str | None = None


class LetterGroup(BaseModel):
    """Dead letters that died of the same thing."""

    model_config = ConfigDict(from_attributes=True, use_attribute_docstrings=True)

    fingerprint: str | None
    count: int
    first_at: Utc
    last_at: Utc
    sample_id: int
    """The newest letter of the group."""
    service: str | None
    type: str | None
    reason: str
    code: str | None
    error: str | None
    exception: str | None


class LetterGroups(BaseModel):
    """Groups of dead letters, the largest first."""

    items: list[LetterGroup]


class Attempt(BaseModel):
    """One step in the timeline of the letter's task."""

    model_config = ConfigDict(from_attributes=True)

    seq: int
    state: TaskState
    attempt: int
    at: Utc
    detail: dict[str, Any] | None


class BodyView(BaseModel):
    """A message's body: as text if it is UTF-8, else in base64."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    text: str | None = None
    base64: str | None = None
    truncated: bool
    """True if only the first mebibyte is shown."""

    @classmethod
    def of(cls, body: bytes, size: int) -> BodyView:
        """The view of a body of which perhaps only the beginning was read."""
        truncated = len(body) < size
        try:
            return cls(text=body.decode(), truncated=truncated)
        except UnicodeDecodeError:
            return cls(base64=base64.b64encode(body).decode(), truncated=truncated)


class LetterDetail(LetterView):
    """A dead letter with all that is known of it."""

    exchange: str
    routing_key: str
    headers: dict[str, Any]
    """As they came; what is no JSON is shown as text, and what is too long or too deep is cut."""
    properties: dict[str, Any]
    body: BodyView
    history: list[Attempt]
    """What the ledger knows of its task, the oldest first."""
    task_url: str | None


class ReplayRequest(BaseModel):
    """How a dead letter is to be changed before it is sent again."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    payload: dict[str, Any] | None = None
    """Instead of the letter's own; what the type's JSON Schema asks for."""
    type: TypeName | None = None
    """Of a letter that cannot be read."""


class ReplayView(BaseModel):
    """A letter that was sent again, and the task that it is by now; null for a message that is no task."""

    letter: LetterView
    task: TaskView | None


class DiscardRequest(BaseModel):
    """Why a letter is put away."""

    model_config = ConfigDict(extra="forbid")

    note: Annotated[str, Field(max_length=1000, pattern=r"^[^\x00]*$")] | None = None


class BulkReplayRequest(BaseModel):
    """Which open letters are to be sent again, and how fast; the oldest first."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    filter: LetterFilter
    rate_per_second: Annotated[float, Field(gt=0, le=10_000, allow_inf_nan=False)] | None = None
    """Tasks become due one after the other at this rate; without it, all at once."""
    dry_run: bool = False
    """Only say what would be done."""
    limit: Annotated[int, Field(ge=1, le=MOST_AT_ONCE)] = MOST_AT_ONCE


class Reason(BaseModel):
    """Why some letters cannot be sent again."""

    code: str
    count: int
    sample_id: int
    detail: str


class BulkReplayView(BaseModel):
    """What a bulk replay has done, or would do."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    dry_run: bool
    matched: int
    """Open letters that the filter means, all of them."""
    replayed: int
    """Letters that were sent again, or would be."""
    refused: int
    """Letters that cannot be sent again; they stay open."""
    reasons: list[Reason]
    first_due_at: Utc | None
    last_due_at: Utc | None


class BulkDiscardRequest(DiscardRequest):
    """Which open letters are to be put away; the oldest first."""

    filter: LetterFilter
    dry_run: bool = False
    limit: Annotated[int, Field(ge=1, le=MOST_AT_ONCE)] = MOST_AT_ONCE


class BulkDiscardView(BaseModel):
    """What a bulk discard has done, or would do."""

    dry_run: bool
    matched: int
    discarded: int


@router.get("", responses=declare("invalid_request"))
async def list_dead_letters(
    query: Annotated[LetterQuery, Query()], _: DeadLetterReader, gateway: GatewayParts
) -> LetterPage:
    """List dead letters, newest first. `next_cursor` leads to the next page, with the same filters."""
    before = query.before()
    async with transaction(gateway.engine) as connection:
        # One more than asked for tells whether there is a next page.
        rows = await listing.list_letters(connection, query.chosen(query.state), before=before, limit=query.limit + 1)
    shown = rows[: query.limit]
    cursor = _encode_cursor(shown[-1].id) if len(rows) > query.limit else None
    return LetterPage(items=[LetterView.model_validate(row) for row in shown], next_cursor=cursor)


@router.get("/groups", responses=declare("invalid_request"))
async def list_groups(
    query: Annotated[GroupQuery, Query()], _: DeadLetterReader, gateway: GatewayParts
) -> LetterGroups:
    """Group dead letters by what they died of; the largest group first."""
    async with transaction(gateway.engine) as connection:
        rows = await listing.list_groups(connection, query.chosen(query.state), limit=query.limit)
    return LetterGroups(items=[LetterGroup.model_validate(row) for row in rows])


@router.get("/{letter_id}", responses=declare("not_found", "invalid_request"))
async def get_dead_letter(letter_id: LetterId, _: DeadLetterReader, gateway: GatewayParts) -> LetterDetail:
    """Show a dead letter with its body, its headers, and what has happened to its task."""
    async with transaction(gateway.engine) as connection:
        row = await listing.get(connection, letter_id)
        history = await _history(connection, row.task_id)
    fields = LetterView.model_validate(row).model_dump()
    return LetterDetail(
        **fields,
        exchange=row.exchange,
        routing_key=row.routing_key,
        headers=row.headers,
        properties=row.properties,
        body=BodyView.of(bytes(row.body), row.size),
        history=history,
        task_url=f"/v1/tasks/{row.task_id}" if history else None,
    )


async def _history(connection: AsyncConnection, task_id: UUID | None) -> list[Attempt]:
    if task_id is None:
        return []
    try:
        task = await ledger.get_task(connection, task_id)
    except NotFound:
        return []
    rows = await ledger.read_timeline(connection, task.root_id, task_id=task_id, after=0, limit=TIMELINE_SHOWN)
    return [Attempt.model_validate(row) for row in rows]


@router.post(
    "/{letter_id}:replay",
    status_code=202,
    responses=declare(
        "not_found",
        "invalid_request",
        "unreadable",
        "unknown_type",
        "contract_violation",
        "already_resolved",
        "already_retried",
        "not_failed",
        "payload_too_large",
        "unsupported_media_type",
    ),
)
async def replay_dead_letter(
    letter_id: LetterId,
    client: DeadLetterWriter,
    gateway: GatewayParts,
    response: Response,
    request: ReplayRequest | None = None,
) -> ReplayView:
    """Send a dead letter again, once, as a new task that is linked to the old one."""
    edit = Edit(**request.model_dump()) if request else Edit()
    order = Order(api_key_id=client.id, traceparent=telemetry.current_traceparent(), edit=edit)
    announced = await gateway.catalogue.current(max_age_seconds=0)
    async with transaction(gateway.engine) as connection:
        _check_open(await listing.get(connection, letter_id))
        outcome = await replaying.replay(connection, [letter_id], announced, order)
        letter = await listing.get(connection, letter_id)
        if letter_id not in outcome.replayed:
            raise _refusal(outcome, letter)
        task_id = outcome.replayed[letter_id]
        task = None if task_id is None else TaskView.of(await ledger.get_task(connection, task_id))
    if task is not None:
        response.headers["Location"] = f"/v1/tasks/{task.id}"
    logger.info("dead letter replayed", extra={"letter_id": letter_id, "task_id": str(task_id)})
    return ReplayView(letter=LetterView.model_validate(letter), task=task)


@router.post(
    "/{letter_id}:discard",
    responses=declare("not_found", "invalid_request", "already_resolved", "unsupported_media_type"),
)
async def discard_dead_letter(
    letter_id: LetterId, client: DeadLetterWriter, gateway: GatewayParts, request: DiscardRequest | None = None
) -> LetterView:
    """Put a dead letter away. Discarding a discarded letter changes nothing."""
    note = request.note if request else None
    async with transaction(gateway.engine) as connection:
        await discarding.discard(connection, [letter_id], note=note, api_key_id=client.id)
        letter = await listing.get(connection, letter_id)
    if letter.state == LetterState.REPLAYED:
        _check_open(letter)
    logger.info("dead letter discarded", extra={"letter_id": letter_id})
    return LetterView.model_validate(letter)


@router.post(
    ":replay",
    responses=declare("invalid_request", "payload_too_large", "unsupported_media_type"),
)
async def replay_dead_letters(
    request: BulkReplayRequest, client: DeadLetterWriter, gateway: GatewayParts
) -> BulkReplayView:
    """Send many open letters again, at most 10,000 in one request: all of them together, or none."""
    order = Order(
        api_key_id=client.id,
        traceparent=telemetry.current_traceparent(),
        rate_per_second=request.rate_per_second,
        dry_run=request.dry_run,
    )
    wanted = request.filter.chosen(LetterState.OPEN)
    announced = await gateway.catalogue.current(max_age_seconds=0)
    async with transaction(gateway.engine) as connection:
        matched = await listing.count(connection, wanted)
        chosen = await listing.matching(connection, wanted, limit=request.limit)
        outcome = await replaying.replay(connection, chosen, announced, order)
    if not request.dry_run:
        facts = {"replayed": len(outcome.replayed), "refused": len(outcome.refused)}
        logger.info("dead letters replayed", extra={**facts, "api_key_id": str(client.id)})
    return BulkReplayView(
        dry_run=request.dry_run,
        matched=matched,
        replayed=len(outcome.replayed),
        refused=len(outcome.refused),
        reasons=_reasons(outcome),
        first_due_at=outcome.first_due_at,
        last_due_at=outcome.last_due_at,
    )


@router.post(
    ":discard",
    responses=declare("invalid_request", "payload_too_large", "unsupported_media_type"),
)
async def discard_dead_letters(
    request: BulkDiscardRequest, client: DeadLetterWriter, gateway: GatewayParts
) -> BulkDiscardView:
    """Put many open letters away, at most 10,000 in one request."""
    wanted = request.filter.chosen(LetterState.OPEN)
    async with transaction(gateway.engine) as connection:
        matched = await listing.count(connection, wanted)
        chosen = await listing.matching(connection, wanted, limit=request.limit)
        discarded = len(chosen)
        if not request.dry_run:
            discarded = await discarding.discard(connection, chosen, note=request.note, api_key_id=client.id)
    if not request.dry_run:
        logger.info("dead letters discarded", extra={"discarded": discarded, "api_key_id": str(client.id)})
    return BulkDiscardView(dry_run=request.dry_run, matched=matched, discarded=discarded)


def _check_open(letter: Row[Any]) -> None:
    if letter.state == LetterState.OPEN:
        return
    replayed = f" as task {letter.replay_task_id}" if letter.replay_task_id else ""
    headers = {"Location": f"/v1/tasks/{letter.replay_task_id}"} if letter.replay_task_id else {}
    raise Problem("already_resolved", f"dead letter {letter.id} was {letter.state} already{replayed}", headers=headers)


def _refusal(outcome: Outcome, letter: Row[Any]) -> Problem:
    # Whoever was faster has resolved the letter while we waited for its lock.
    _check_open(letter)
    [refusal] = outcome.refused
    return Problem(refusal.code, f"dead letter {letter.id} cannot be replayed: {refusal.detail}", errors=refusal.errors)


def _reasons(outcome: Outcome) -> list[Reason]:
    samples = {refusal.code: refusal for refusal in outcome.refused}
    return [
        Reason(code=code, count=count, sample_id=samples[code].letter_id, detail=samples[code].detail)
        for code, count in sorted(outcome.reasons().items())
    ]


def _encode_cursor(letter_id: int) -> str:
    return base64.urlsafe_b64encode(json.dumps([letter_id]).encode()).rstrip(b"=").decode()


def _decode_cursor(cursor: str) -> int:
    match json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4))):
        case [int(letter_id)] if 0 < letter_id < 2**63:
            return letter_id
    raise ValueError("not a cursor")
