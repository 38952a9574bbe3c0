"""Dead letters over HTTP: what could not be run, why, and what shall become of it."""

from __future__ import annotations

import logging
from typing import Annotated, Any, Final
from uuid import UUID

from fastapi import APIRouter, Path, Query, Response
from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway import ledger, measuring
from gateway.auth import DeadLetterReader, DeadLetterWriter
from gateway.bodies import JsonRoute
from gateway.dead_letters import discarding, listing, replaying
from gateway.dead_letters.listing import LetterState
from gateway.dead_letters.replaying import Edit, Order, Outcome
from gateway.dead_letters.views import (
    Attempt,
    BodyView,
    BulkDiscardRequest,
    BulkDiscardView,
    BulkReplayRequest,
    BulkReplayView,
    DiscardRequest,
    GroupQuery,
    LetterDetail,
    LetterGroup,
    LetterGroups,
    LetterPage,
    LetterQuery,
    LetterView,
    Reason,
    ReplayRequest,
    ReplayView,
    encode_cursor,
)
from gateway.dependencies import GatewayParts
from gateway.problems import Problem, declare
from gateway.schemas import TaskView
from gateway.scopes import Scope
from gateway.tracing import ledger_transaction
from gateway.transactions import transaction
from taskmesh import logs
from taskmesh.errors import NotFound

logger = logging.getLogger(__name__)

router = APIRouter(prefix="/v1/dead-letters", tags=["dead letters"], route_class=JsonRoute)

TIMELINE_SHOWN: Final = 500

LetterId = Annotated[int, Path(ge=1, lt=2**63, description="The dead letter's id.")]


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
    cursor = encode_cursor(shown[-1].id) if len(rows) > query.limit else None
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
    order = Order(api_key_id=client.id, edit=edit)
    announced = await gateway.catalogue.current(max_age_seconds=0)
    async with ledger_transaction(gateway.engine) as connection:
        _check_open(await listing.get(connection, letter_id))
        outcome = await replaying.replay(connection, [letter_id], announced, order)
        letter = await listing.get(connection, letter_id)
        if letter_id not in outcome.replayed:
            raise _refusal(outcome, letter)
        task_id = outcome.replayed[letter_id]
        row = None if task_id is None else await ledger.get_task(connection, task_id)
    measuring.count_accepted(outcome.accepted)
    task = None if row is None else TaskView.of(row)
    if task is not None and not client.scopes & {Scope.TASKS_READ, Scope.DEAD_LETTERS_READ}:
        task = task.without_contents()
    if task is not None:
        response.headers["Location"] = f"/v1/tasks/{task.id}"
    logger.info("dead letter replayed", extra={**(ledger.log_facts(row) if row else {}), "letter_id": letter_id})
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
    facts = logs.of_task(letter.task_id, letter.type, letter.attempt, trace_id=letter.trace_id)
    logger.info("dead letter discarded", extra={**facts, "letter_id": letter_id})
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
        rate_per_second=request.rate_per_second,
        dry_run=request.dry_run,
    )
    wanted = request.filter.chosen(LetterState.OPEN)
    announced = await gateway.catalogue.current(max_age_seconds=0)
    async with ledger_transaction(gateway.engine) as connection:
        matched = await listing.count(connection, wanted)
        chosen = await listing.matching(connection, wanted, limit=request.limit)
        outcome = await replaying.replay(connection, chosen, announced, order)
    measuring.count_accepted(outcome.accepted)
    if not request.dry_run:
        facts = {"replayed": len(outcome.replayed), "refused": len(outcome.refused)}
        facts |= logs.of_tasks(filter(None, outcome.replayed.values()))
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
        logger.info(
            "dead letters discarded",
            extra={"discarded": discarded, "letter_ids": chosen[: logs.IDS_LOGGED], "api_key_id": str(client.id)},
        )
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
