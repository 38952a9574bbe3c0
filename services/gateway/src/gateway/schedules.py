"""Schedules: tasks that are submitted again and again, at the times that a timetable gives.

What a schedule is and how it is changed; `gateway.scheduler` fires them. Functions take the connection first and never
commit. Every change that may bring a fire nearer notifies the schedulers.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID, uuid5

from sqlalchemy import Row, delete, func, select, text, tuple_, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway import models
from gateway.identifiers import uuid7
from gateway.timetable import InvalidTimetable, Timetable
from taskmesh import telemetry
from taskmesh.contracts.manifest import Manifest, ScheduleManifest
from taskmesh.errors import ConflictError, NotFound

logger = logging.getLogger(__name__)

ANNOUNCED = UUID("5f0e2c1e-6a56-4c0e-9a35-2f6c9f3c8b1d")
"""Namespace of the ids of announced schedules: one that is dropped and announced again is the same schedule."""

FIRES_KEPT = timedelta(days=30)
"""How long fires are remembered; more than the widest window in which missed fires are made up."""

_RHYTHM = ("cron", "interval_seconds", "timezone", "starts_at", "ends_at")


class Misfire(StrEnum):
    """What becomes of the fires that no scheduler was there for."""

    SKIP = "skip"
    """They are left out."""
    ONCE = "once"
    """The newest is made up, for all of them."""
    ALL = "all"
    """Each is made up that is not older than `misfire_window_seconds`."""


class Overlap(StrEnum):
    """What happens when the task of the last fire is still going."""

    ALLOW = "allow"
    SKIP = "skip"
    """The fire is left out."""


class Outcome(StrEnum):
    """What became of a fire."""

    SUBMITTED = "submitted"
    SKIPPED = "skipped"


class Reason(StrEnum):
    """Why a fire was left out, or what was odd about it."""

    MISSED = "missed"
    OVERLAP = "overlap"
    UNKNOWN_TYPE = "unknown_type"
    """Submitted although no service announces the type any more: it waits for one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """What whoever makes a schedule decides; units and meanings as in `models.schedules`."""

    name: str
    type: str
    payload: Mapping[str, Any] = field(default_factory=dict)
    tags: Sequence[str] = ()
    priority: int | None = None
    cron: str | None = None
    interval_seconds: float | None = None
    timezone: str = "UTC"
    starts_at: datetime | None = None
    ends_at: datetime | None = None
    misfire: Misfire = Misfire.ONCE
    misfire_window_seconds: float = 3600.0
    overlap: Overlap = Overlap.ALLOW
    paused: bool = False

    def timetable(self, anchor_at: datetime) -> Timetable:
        """Return its fire times.

        Raises:
            InvalidTimetable: They contradict themselves.
        """
        try:
            interval = None if self.interval_seconds is None else timedelta(seconds=self.interval_seconds)
        except (OverflowError, ValueError) as error:
            raise InvalidTimetable("interval_seconds", "is not a length of time") from error
        return Timetable(
            cron=self.cron,
            timezone=self.timezone,
            interval=interval,
            anchor_at=anchor_at,
            starts_at=self.starts_at,
            ends_at=self.ends_at,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule(Definition):
    """A stored schedule."""

    id: UUID
    created_at: datetime
    updated_at: datetime
    next_fire_at: datetime | None = None
    last_fire_at: datetime | None = None
    last_task_id: UUID | None = None
    last_error: str | None = None
    retry_at: datetime | None = None
    paused_at: datetime | None = None
    traceparent: str | None = None
    owner: str | None = None
    api_key_id: UUID | None = None

    def fire_times(self) -> Timetable:
        """Return its timetable; an interval is counted from when the schedule was made."""
        return self.timetable(self.created_at)

    def preview(self, count: int) -> list[datetime]:
        """Return the next fires; none while paused, or when no fire is left."""
        if self.next_fire_at is None:
            return []
        try:
            return [self.next_fire_at, *self.fire_times().preview(self.next_fire_at, count - 1)]
        except InvalidTimetable:
            # Stored under other time zone data; `last_error` tells.
            return [self.next_fire_at]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fire:
    """What became of one fire of a schedule.

    Attributes:
        fire_at: When it was due.
        missed_until: The newest of the missed fires that this one stands for; None if it stands for itself.
        fired_at: When a scheduler got to it.
        type, trace_id: Of its task, for the log of the scheduler that submitted it; not kept.
    """

    schedule_id: UUID
    fire_at: datetime
    outcome: Outcome
    reason: Reason | None = None
    missed_until: datetime | None = None
    task_id: UUID | None = None
    fired_at: datetime
    type: str | None = None
    trace_id: str | None = None


async def clock(connection: AsyncConnection) -> datetime:
    """Return the database's time: the one clock that every scheduler and every caller shares."""
    now: datetime = (await connection.execute(select(func.clock_timestamp()))).scalar_one()
    return now.astimezone(UTC)


def from_row(row: Row[Any]) -> Schedule:
    """Read a row of `models.schedules`."""
    values = dict(row._mapping)  # noqa: SLF001 - SQLAlchemy's documented way to a mapping
    values["misfire"] = Misfire(values["misfire"])
    values["overlap"] = Overlap(values["overlap"])
    return Schedule(paused=values["paused_at"] is not None, **values)


def draft(definition: Definition, *, now: datetime, api_key_id: UUID | None = None) -> Schedule:
    """Return the schedule that `store` will store, so that the answer to its caller can be stored with it.

    Raises:
        InvalidTimetable: It contradicts itself or would never fire.
    """
    next_fire_at = definition.timetable(now).check_fires(now)
    return Schedule(
        id=uuid7(),
        api_key_id=api_key_id,
        created_at=now,
        updated_at=now,
        next_fire_at=None if definition.paused else next_fire_at,
        paused_at=now if definition.paused else None,
        traceparent=telemetry.current_traceparent(),
        **{field_.name: getattr(definition, field_.name) for field_ in fields(Definition)},
    )


async def store(connection: AsyncConnection, schedule: Schedule) -> None:
    """Store a new schedule.

    Raises:
        ConflictError: The name is taken.
    """
    columns = models.schedules.c.keys()
    statement = (
        insert(models.schedules)
        .values({name: getattr(schedule, name) for name in columns})
        .on_conflict_do_nothing()
        .returning(models.schedules.c.id)
    )
    if (await connection.execute(statement)).one_or_none() is None:
        raise _name_taken()
    await notify(connection)


async def create(
    connection: AsyncConnection, definition: Definition, *, now: datetime, api_key_id: UUID | None = None
) -> Schedule:
    """Draft and store a schedule.

    Raises:
        InvalidTimetable: It contradicts itself or would never fire.
        ConflictError: The name is taken.
    """
    schedule = draft(definition, now=now, api_key_id=api_key_id)
    await store(connection, schedule)
    return schedule


async def get(connection: AsyncConnection, schedule_id: UUID, *, lock: bool = False) -> Schedule:
    """Return a schedule; with `lock`, no scheduler fires it before the transaction ends.

    Raises:
        NotFound: There is none.
    """
    statement = select(models.schedules).where(models.schedules.c.id == schedule_id)
    row = (await connection.execute(statement.with_for_update() if lock else statement)).one_or_none()
    if row is None:
        raise NotFound(f"there is no schedule {schedule_id}")
    return from_row(row)


async def list_page(
    connection: AsyncConnection,
    *,
    limit: int,
    after: tuple[datetime, UUID] | None = None,
    type_name: str | None = None,
    owner: str | None = None,
    paused: bool | None = None,
) -> list[Schedule]:
    """Return at most `limit` schedules, the newest first, from behind the one at `after` on."""
    columns = models.schedules.c
    statement = select(models.schedules).order_by(columns.created_at.desc(), columns.id.desc()).limit(limit)
    if after is not None:
        statement = statement.where(tuple_(columns.created_at, columns.id) < tuple_(*after))
    if type_name is not None:
        statement = statement.where(columns.type == type_name)
    if owner is not None:
        statement = statement.where(columns.owner == owner)
    if paused is not None:
        statement = statement.where(columns.paused_at.is_not(None) if paused else columns.paused_at.is_(None))
    return [from_row(row) for row in await connection.execute(statement)]


async def list_fires(
    connection: AsyncConnection, schedule_id: UUID, *, limit: int, before: datetime | None = None
) -> list[Fire]:
    """Return at most `limit` fires of a schedule that were due before `before`, the newest first."""
    columns = models.schedule_fires.c
    statement = (
        select(models.schedule_fires)
        .where(columns.schedule_id == schedule_id)
        .order_by(columns.fire_at.desc())
        .limit(limit)
    )
    if before is not None:
        statement = statement.where(columns.fire_at < before)
    return [
        Fire(
            schedule_id=row.schedule_id,
            fire_at=row.fire_at,
            outcome=Outcome(row.outcome),
            reason=Reason(row.reason) if row.reason else None,
            missed_until=row.missed_until,
            task_id=row.task_id,
            fired_at=row.fired_at,
        )
        for row in await connection.execute(statement)
    ]


def check_changeable(schedule: Schedule) -> None:
    """Pass for a schedule that was made over HTTP.

    Raises:
        ConflictError: It belongs to a service.
    """
    if schedule.owner is not None:
        raise ConflictError(f"the schedule belongs to service {schedule.owner}: pause it, or change the service's code")


async def change(connection: AsyncConnection, schedule: Schedule, definition: Definition, *, now: datetime) -> Schedule:
    """Give a schedule, which the caller has locked, a new definition.

    Fires that are due but not yet fired stay due unless its times change or it is paused.

    Raises:
        InvalidTimetable: The new times contradict themselves or would never come.
        ConflictError: The new name is taken, or the schedule belongs to a service.
    """
    check_changeable(schedule)
    state: dict[str, Any] = {}
    if any(getattr(schedule, name) != getattr(definition, name) for name in _RHYTHM):
        next_fire_at = definition.timetable(schedule.created_at).check_fires(now)
        paused_at = (schedule.paused_at or now) if definition.paused else None
        state = _state(next_fire_at, paused_at=paused_at)
    elif schedule.paused != definition.paused:
        state = _pause(now) if definition.paused else _resume(schedule, now)
    try:
        state["traceparent"] = telemetry.current_traceparent()
        return await _update(connection, schedule.id, updated_at=now, **_columns(definition), **state)
    except IntegrityError as error:
        raise _name_taken() from error


async def pause(connection: AsyncConnection, schedule_id: UUID, *, now: datetime) -> Schedule:
    """Stop a schedule from firing until it is resumed; does nothing to a paused one.

    Raises:
        NotFound: There is none.
    """
    schedule = await get(connection, schedule_id, lock=True)
    if schedule.paused:
        return schedule
    return await _update(connection, schedule_id, updated_at=now, **_pause(now))


async def resume(connection: AsyncConnection, schedule_id: UUID, *, now: datetime) -> Schedule:
    """Let a schedule fire again, from now on: what it missed while paused is not made up.

    Raises:
        NotFound: There is none.
    """
    schedule = await get(connection, schedule_id, lock=True)
    if not schedule.paused:
        return schedule
    return await _update(connection, schedule_id, updated_at=now, **_resume(schedule, now))


async def remove(connection: AsyncConnection, schedule_id: UUID) -> None:
    """Delete a schedule; the tasks that it submitted stay.

    Raises:
        NotFound: There is none.
        ConflictError: It belongs to a service.
    """
    schedule = await get(connection, schedule_id, lock=True)
    check_changeable(schedule)
    await connection.execute(delete(models.schedules).where(models.schedules.c.id == schedule_id))


async def sync_announced(connection: AsyncConnection, manifest: Manifest) -> None:
    """Make the schedules of a service those that its manifest announces.

    Announced again unchanged, nothing is written. A wrong one is logged and left as it was, so that one mistake in a
    service's code stops neither its other schedules nor its types from being known.
    """
    now = await clock(connection)
    table = models.schedules
    stored = {
        row.name: from_row(row)
        for row in await connection.execute(select(table).where(table.c.owner == manifest.service).with_for_update())
    }
    for announced in manifest.schedules:
        definition = _announced(manifest.service, announced)
        known = stored.pop(definition.name, None)
        try:
            await _put_announced(connection, manifest.service, definition, known, now)
        except InvalidTimetable as error:
            logger.error(  # noqa: TRY400 - the mistake is the service's; our traceback says nothing about it
                "announced schedule refused",
                extra={"schedule": definition.name, "field": error.field, "reason": str(error)},
            )
    if stored:
        gone = [schedule.id for schedule in stored.values()]
        await connection.execute(delete(table).where(table.c.id.in_(gone)))
        logger.info("announced schedules removed", extra={"announcer": manifest.service, "count": len(gone)})


async def prune_fires(connection: AsyncConnection, *, now: datetime, limit: int) -> int:
    """Forget at most `limit` fires that are older than `FIRES_KEPT`; return how many."""
    fires = models.schedule_fires
    old = select(fires.c.schedule_id, fires.c.fire_at).where(fires.c.fired_at < now - FIRES_KEPT).limit(limit)
    result = await connection.execute(delete(fires).where(tuple_(fires.c.schedule_id, fires.c.fire_at).in_(old)))
    return result.rowcount


async def notify(connection: AsyncConnection) -> None:
    """Wake every scheduler once the transaction has committed."""
    await connection.execute(text("select pg_notify(:channel, '')"), {"channel": models.SCHEDULES_CHANNEL})


async def _put_announced(
    connection: AsyncConnection, service: str, definition: Definition, known: Schedule | None, now: datetime
) -> None:
    if known is None:
        # Another projector may have stored it since we looked.
        with suppress(ConflictError):
            identity = uuid5(ANNOUNCED, definition.name)
            await store(connection, replace(draft(definition, now=now), id=identity, owner=service, traceparent=None))
        return
    wanted = _columns(definition)
    changed = {name for name in wanted if getattr(known, name) != wanted[name]}
    if not changed:
        return
    state: dict[str, Any] = {}
    if changed & set(_RHYTHM):
        next_fire_at = definition.timetable(known.created_at).check_fires(now)
        state = _state(next_fire_at, paused_at=known.paused_at)
    await _update(connection, known.id, updated_at=now, **wanted, **state)


async def _update(connection: AsyncConnection, schedule_id: UUID, **values: Any) -> Schedule:
    table = models.schedules
    row = (
        await connection.execute(update(table).where(table.c.id == schedule_id).values(**values).returning(table))
    ).one()
    await notify(connection)
    return from_row(row)


def _announced(service: str, announced: ScheduleManifest) -> Definition:
    # A name given over HTTP has no slash, so the two kinds never meet.
    return Definition(
        name=f"{service}/{announced.name}",
        type=announced.type,
        payload=announced.payload,
        cron=announced.cron,
        interval_seconds=announced.interval_seconds,
        timezone=announced.timezone,
    )


def _columns(definition: Definition) -> dict[str, Any]:
    names = {field_.name for field_ in fields(Definition)} - {"paused"}
    values = {name: value for name, value in asdict(definition).items() if name in names}
    return {**values, "tags": list(definition.tags)}


def _state(next_fire_at: datetime | None, *, paused_at: datetime | None) -> dict[str, Any]:
    return {
        "next_fire_at": None if paused_at else next_fire_at,
        "paused_at": paused_at,
        "last_error": None,
        "retry_at": None,
    }


def _pause(now: datetime) -> dict[str, Any]:
    return _state(None, paused_at=now)


def _resume(schedule: Schedule, now: datetime) -> dict[str, Any]:
    return _state(schedule.fire_times().next_after(now), paused_at=None)


def _name_taken() -> ConflictError:
    return ConflictError("there is a schedule with this name already")
