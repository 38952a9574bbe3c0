"""Schedules over HTTP: tasks that are submitted again and again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated, Any, Final
from uuid import UUID

from fastapi import APIRouter, Body, Path, Query, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from gateway import idempotency, schedules
from gateway.accepting import check_payload, recall
from gateway.auth import Client, ScheduleReader, ScheduleWriter
from gateway.bodies import JsonRoute
from gateway.dependencies import Gateway, GatewayParts
from gateway.ledger import Position
from gateway.problems import FieldError, Problem, declare
from gateway.routes.tasks import IdempotencyKey
from gateway.schedules import Definition, Fire, Misfire, Outcome, Overlap, Reason, Schedule
from gateway.schemas import Tag, TypeName, Utc, decode_cursor, encode_cursor
from gateway.timetable import InvalidTimetable
from gateway.transactions import transaction

router = APIRouter(prefix="/v1/schedules", tags=["schedules"], route_class=JsonRoute)

NEXT_FIRES: Final = 5
MERGE_PATCH: Final = "application/merge-patch+json"

# No slash: an announced schedule is named `<service>/<name>`, so the two kinds never meet.
Name = Annotated[str, StringConstraints(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._:-]*$")]
ScheduleId = Annotated[UUID, Path(description="The schedule's id.")]


class ScheduleDefinition(BaseModel):
    """A schedule as a caller asks for it: what is submitted, and when, by `cron` or by `interval_seconds`."""

    model_config = ConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        json_schema_extra={
            "examples": [
                {
                    "name": "nightly close",
                    "type": "billing.books.close",
                    "payload": {},
                    "cron": "30 2 * * *",
                    "timezone": "Europe/Berlin",
                    "misfire": "once",
                    "overlap": "skip",
                }
            ]
        },
    )

    name: Name
    """Unique among all schedules."""
    type: TypeName
    """A task type that some worker has announced; see `GET /v1/types`."""
    payload: dict[str, Any]
    """What the type's JSON Schema asks for; the same for each task."""
    tags: Annotated[list[Tag], Field(max_length=20)] = []
    priority: Annotated[int, Field(ge=0, le=9)] | None = None
    cron: str | None = None
    """Five fields: minute, hour, day of month, month, day of week; read in `timezone`. A line that names its hour
    fires once on a night when clocks change."""
    interval_seconds: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """At least 1. Counted from `starts_at`, or else from when the schedule was made; lateness does not add up."""
    timezone: Annotated[str, Field(max_length=100)] = "UTC"
    """An IANA name such as `Europe/Berlin`."""
    starts_at: Utc | None = None
    """No fire before it."""
    ends_at: Utc | None = None
    """No fire after it."""
    misfire: Misfire = Misfire.ONCE
    """What becomes of fires that were due while no scheduler ran: `skip` leaves them out, `once` makes up the newest
    for all of them, `all` makes up each that is not older than `misfire_window_seconds`. A fire at most five seconds
    late is on time."""
    misfire_window_seconds: Annotated[float, Field(gt=0, le=7 * 86_400, allow_inf_nan=False)] = 3600.0
    overlap: Overlap = Overlap.ALLOW
    """`skip` leaves out a fire while the task of the last one is still going."""
    paused: bool = False
    """Fires missed while paused are not made up."""

    def definition(self) -> Definition:
        """What will be stored."""
        return Definition(**dict(self))


class ScheduleChange(BaseModel):
    """A JSON merge patch (RFC 7396): fields left out stay as they are, null takes a field back to its default."""

    model_config = ConfigDict(extra="forbid")

    # Read loosely: what counts is whether the merged whole is a ScheduleDefinition.
    name: str | None = None
    type: str | None = None
    payload: dict[str, Any] | None = None
    tags: list[str] | None = None
    priority: int | None = None
    cron: str | None = None
    interval_seconds: float | None = None
    timezone: str | None = None
    starts_at: Utc | None = None
    ends_at: Utc | None = None
    misfire: Misfire | None = None
    misfire_window_seconds: float | None = None
    overlap: Overlap | None = None
    paused: bool | None = None


class ScheduleView(BaseModel):
    """A schedule as callers see it. Times are RFC 3339 in UTC."""

    model_config = ConfigDict(from_attributes=True, use_attribute_docstrings=True)

    id: UUID
    name: str
    type: str
    payload: dict[str, Any]
    tags: list[str]
    priority: int | None
    cron: str | None
    interval_seconds: float | None
    timezone: str
    starts_at: Utc | None
    ends_at: Utc | None
    misfire: Misfire
    misfire_window_seconds: float
    overlap: Overlap
    paused: bool
    owner: str | None
    """The service whose code declares it: to be paused and resumed here, and changed there."""
    created_at: Utc
    updated_at: Utc
    last_fire_at: Utc | None
    """When the newest task was due."""
    last_task_id: UUID | None
    last_error: str | None
    """Why the newest fire did not go as it should; null while all is well."""
    next_fire_at: Utc | None
    """Null while paused, and when no fire is left."""
    next_fires: list[Utc]

    @classmethod
    def of(cls, schedule: Schedule) -> ScheduleView:
        """The view of a stored schedule."""
        return cls.model_validate({**asdict(schedule), "next_fires": schedule.preview(NEXT_FIRES)})


class SchedulePage(BaseModel):
    """One page of schedules, newest first."""

    items: list[ScheduleView]
    next_cursor: str | None = None


class FireView(BaseModel):
    """What became of one fire."""

    model_config = ConfigDict(from_attributes=True, use_attribute_docstrings=True)

    fire_at: Utc
    """When it was due."""
    fired_at: Utc
    """When a scheduler got to it."""
    outcome: Outcome
    reason: Reason | None
    """Why it was skipped; or `unknown_type`: submitted, and waiting for a worker that announces the type."""
    missed_until: Utc | None
    """For `missed`: the newest of the fires that this entry stands for."""
    task_id: UUID | None


class FirePage(BaseModel):
    """One page of fires, newest first."""

    items: list[FireView]
    next_cursor: str | None = None


class PageQuery(BaseModel):
    """Which page of a list."""

    model_config = ConfigDict(extra="forbid")

    limit: Annotated[int, Field(ge=1, le=200)] = 50
    cursor: Annotated[str, Field(max_length=500)] | None = None

    def position(self) -> Position | None:
        """Where the page before ended."""
        if self.cursor is None:
            return None
        try:
            return decode_cursor(self.cursor)
        except ValueError as error:
            fault = FieldError(pointer="/query:cursor", detail="is not a cursor of this gateway")
            raise Problem("invalid_request", "the cursor cannot be read", errors=[fault]) from error


class ScheduleQuery(PageQuery):
    """Filters of a list of schedules, and which page of it."""

    type: Annotated[str, Field(max_length=200, pattern=r"^[^\x00]*$")] | None = None
    owner: Annotated[str, Field(max_length=63, pattern=r"^[^\x00]*$")] | None = None
    """The service that announces them."""
    paused: bool | None = None


@router.post(
    "",
    status_code=201,
    response_model=ScheduleView,
    responses=declare(
        "unknown_type",
        "contract_violation",
        "invalid_request",
        "conflict",
        "idempotency_conflict",
        "payload_too_large",
        "unsupported_media_type",
    ),
)
async def create_schedule(
    wanted: ScheduleDefinition, client: ScheduleWriter, gateway: GatewayParts, idempotency_key: IdempotencyKey = None
) -> Response:
    """Make a schedule. Its payload is held against the type's contract as a task's is."""
    try:
        await check_payload(gateway, wanted.type, wanted.payload)
        answer, replayed = await _make(gateway, client, wanted, idempotency_key)
    except Problem as refusal:
        answer, replayed = await recall(gateway, client, idempotency_key, wanted, refusal), True
    headers = {"Location": f"/v1/schedules/{ScheduleView.model_validate_json(answer).id}"}
    if replayed:
        headers["Idempotent-Replayed"] = "true"
    return Response(answer, 201, headers=headers, media_type="application/json")


async def _make(gateway: Gateway, client: Client, wanted: ScheduleDefinition, key: str | None) -> tuple[bytes, bool]:
    """Commit a schedule and return its view; or the first answer to the same request, and True."""
    async with transaction(gateway.engine) as connection:
        now = await schedules.clock(connection)
        with _explained():
            schedule = schedules.draft(wanted.definition(), now=now, api_key_id=client.id)
        body = ScheduleView.of(schedule).model_dump_json().encode()
        if key is not None:
            named = idempotency.Key.of(wanted, key, api_key_id=client.id, response=body)
            first = await idempotency.claim(connection, named)
            if first is not None:
                return first, True
        await schedules.store(connection, schedule)
    return body, False


@router.get("", responses=declare("invalid_request"))
async def list_schedules(
    query: Annotated[ScheduleQuery, Query()], _: ScheduleReader, gateway: GatewayParts
) -> SchedulePage:
    """List schedules, newest first: those made here and those that services announce."""
    after = query.position()
    async with transaction(gateway.engine) as connection:
        found = await schedules.list_page(
            connection,
            # One more than asked for tells whether there is a next page.
            limit=query.limit + 1,
            after=None if after is None else (after.created_at, after.id),
            type_name=query.type,
            owner=query.owner,
            paused=query.paused,
        )
    shown = found[: query.limit]
    cursor = encode_cursor(shown[-1]) if len(found) > query.limit else None
    return SchedulePage(items=[ScheduleView.of(schedule) for schedule in shown], next_cursor=cursor)


@router.get("/{schedule_id}", responses=declare("not_found", "invalid_request"))
async def get_schedule(schedule_id: ScheduleId, _: ScheduleReader, gateway: GatewayParts) -> ScheduleView:
    """Show a schedule with its next five fires."""
    async with transaction(gateway.engine) as connection:
        return ScheduleView.of(await schedules.get(connection, schedule_id))


@router.get("/{schedule_id}/fires", responses=declare("not_found", "invalid_request"))
async def list_fires(
    schedule_id: ScheduleId, query: Annotated[PageQuery, Query()], _: ScheduleReader, gateway: GatewayParts
) -> FirePage:
    """List what became of a schedule's fires of the last 30 days, newest first, those left out included."""
    before = query.position()
    async with transaction(gateway.engine) as connection:
        await schedules.get(connection, schedule_id)
        found: list[Fire] = await schedules.list_fires(
            connection, schedule_id, limit=query.limit + 1, before=None if before is None else before.created_at
        )
    shown = found[: query.limit]
    cursor = encode_cursor(Position(shown[-1].fire_at, schedule_id)) if len(found) > query.limit else None
    return FirePage(items=[FireView.model_validate(fire) for fire in shown], next_cursor=cursor)


@router.patch(
    "/{schedule_id}",
    responses=declare(
        "not_found",
        "unknown_type",
        "contract_violation",
        "invalid_request",
        "conflict",
        "payload_too_large",
        "unsupported_media_type",
    ),
)
async def change_schedule(
    schedule_id: ScheduleId,
    change: Annotated[ScheduleChange, Body(media_type=MERGE_PATCH)],
    _: ScheduleWriter,
    gateway: GatewayParts,
) -> ScheduleView:
    """Change a schedule by a JSON merge patch. New times count from now; other changes leave the next fire alone."""
    patch = change.model_dump(exclude_unset=True)
    async with transaction(gateway.engine) as connection:
        current = await schedules.get(connection, schedule_id)
    schedules.check_changeable(current)
    # Before the transaction that locks the schedule, which must not wait for a second connection.
    before = await _check_change(gateway, current, patch)
    async with transaction(gateway.engine) as connection:
        current = await schedules.get(connection, schedule_id, lock=True)
        wanted = _merged(current, patch)
        if (wanted.type, wanted.payload) != before:
            raise Problem("conflict", "the schedule was changed by somebody else at the same time")
        now = await schedules.clock(connection)
        with _explained():
            return ScheduleView.of(await schedules.change(connection, current, wanted.definition(), now=now))


@router.delete("/{schedule_id}", status_code=204, responses=declare("not_found", "invalid_request", "conflict"))
async def delete_schedule(schedule_id: ScheduleId, _: ScheduleWriter, gateway: GatewayParts) -> None:
    """Delete a schedule. The tasks that it has submitted go on."""
    async with transaction(gateway.engine) as connection:
        await schedules.remove(connection, schedule_id)


@router.post("/{schedule_id}:pause", responses=declare("not_found", "invalid_request"))
async def pause_schedule(schedule_id: ScheduleId, _: ScheduleWriter, gateway: GatewayParts) -> ScheduleView:
    """Keep a schedule from firing until it is resumed."""
    async with transaction(gateway.engine) as connection:
        now = await schedules.clock(connection)
        return ScheduleView.of(await schedules.pause(connection, schedule_id, now=now))


@router.post("/{schedule_id}:resume", responses=declare("not_found", "invalid_request"))
async def resume_schedule(schedule_id: ScheduleId, _: ScheduleWriter, gateway: GatewayParts) -> ScheduleView:
    """Let a paused schedule fire again from now on; what it missed is not made up."""
    async with transaction(gateway.engine) as connection:
        now = await schedules.clock(connection)
        return ScheduleView.of(await schedules.resume(connection, schedule_id, now=now))


async def _check_change(gateway: Gateway, current: Schedule, patch: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Hold a new type or payload against the catalogue; return what was checked.

    A change of anything else is possible while the type's worker is not announced.
    """
    wanted = _merged(current, patch)
    if (wanted.type, wanted.payload) != (current.type, current.payload):
        await check_payload(gateway, wanted.type, wanted.payload)
    return wanted.type, wanted.payload


def _merged(current: Schedule, patch: Mapping[str, Any]) -> ScheduleDefinition:
    fields = {name: getattr(current, name) for name in ScheduleDefinition.model_fields}
    try:
        return ScheduleDefinition.model_validate(merge_patch({**fields, "tags": list(current.tags)}, patch))
    except ValidationError as error:
        raise RequestValidationError([{**fault, "loc": ("body", *fault["loc"])} for fault in error.errors()]) from error


def merge_patch(target: object, patch: object) -> Any:
    """Apply a JSON merge patch (RFC 7396, section 2)."""
    if not isinstance(patch, Mapping):
        return patch
    merged = dict(target) if isinstance(target, Mapping) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = merge_patch(merged.get(name), value)
    return merged


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except InvalidTimetable as error:
        fault = FieldError(pointer=f"/{error.field}", detail=str(error))
        raise Problem("invalid_request", "the schedule's times are wrong", errors=[fault]) from error
